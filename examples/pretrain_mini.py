"""Train the small real Gemma 2, `gemma2_mini_en`, from nothing to a folder ready to load.

    python examples/pretrain_mini.py --output gemma2_mini_en
    python examples/pretrain_mini.py --output gemma2_mini_en --corpus my_texts --epochs 20

Any Keras backend and device will do (`KERAS_BACKEND=jax`, `tensorflow` or `torch`). A machine
without network gets its corpus and vocabulary from another one:

    python examples/pretrain_mini.py --output prepared --prepare-only
    python examples/pretrain_mini.py --output gemma2_mini_en --corpus prepared --dtype mixed_bfloat16
"""

import argparse
import math
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import keras
import keras_hub
import mini_corpus
import numpy as np

import keras_gemma2

SIZE_LIMIT = 10_000_000  # bytes of the whole folder, so that it fits into the wheel
PROMPTS = ("To the Senate and House of Representatives:", "The state of our Union is", "The whale")
ARCHITECTURE = {
    "num_layers": 8,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 192,
    "intermediate_dim": 576,
    "head_dim": 64,
    "query_pre_attn_scalar": 48,  # hidden_dim / num_query_heads, the 27B's rule
    "sliding_window_size": 128,
}


def parse_arguments() -> argparse.Namespace:
    """The command line; every number of the recipe has a flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write the model or corpus to")
    add("--corpus", type=Path, help="folder of .txt files, or a prepared one; default: fetched")
    cache = Path.home() / ".cache" / "keras_gemma2" / "corpus"
    add("--cache", type=Path, default=cache, help="where the default corpus is downloaded to (default: %(default)s)")
    add("--prepare-only", action="store_true", help="write the split text and the vocabulary only")
    add("--vocabulary-size", type=int, default=4096, help="unless --corpus brings one (default: %(default)s)")
    add("--context", type=int, default=512, help="tokens a training row (default: %(default)s)")
    names = ", ".join(ARCHITECTURE)
    add("--set", action="append", default=[], metavar="NAME=NUMBER", dest="overrides", help=f"change one of {names}")
    add("--epochs", type=int, default=45, help="passes over the text (default: %(default)s)")
    add("--steps-per-epoch", type=int, help="shorten every epoch, for a quick trial")
    add("--batch-size", type=int, default=32, help="rows a step (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="peak rate (default: %(default)s)")
    add("--warmup", type=float, default=0.03, help="share of the steps (default: %(default)s)")
    add("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    add("--dropout", type=float, default=0.25, help="default: %(default)s")
    add("--ema-momentum", type=float, default=0.995, help="weight average (default: %(default)s)")
    add("--dtype", choices=("float32", "mixed_bfloat16"), default="float32")
    stop = "stop training after this long; the learning rate follows --epochs all the same, so it is then still high"
    add("--minutes", type=float, default=math.inf, help=stop)
    add("--seed", type=int, default=0)
    return parser.parse_args()


# --- held-out bits per byte -----------------------------------------------------------------


class BitsPerByte:
    """Held-out bits per byte of one model: log2 likelihood of whole documents over UTF-8 bytes."""

    def __init__(self, lm: keras.Model, context: int, vocabulary: bytes) -> None:
        self.context, self.vocabulary = context, vocabulary
        names = ("token_ids", "padding_mask", "targets")
        inputs = {name: keras.Input((context,), dtype="int32", name=name) for name in names}
        logits = lm({name: inputs[name] for name in ("token_ids", "padding_mask")})
        log_probs = keras.ops.log_softmax(keras.ops.cast(logits, "float32"))
        targets = keras.ops.expand_dims(inputs["targets"], -1)
        # Gathered on the device: the logits of one batch alone are a hundred megabytes.
        picked = keras.ops.take_along_axis(log_probs, targets, axis=-1)
        self.scorer = keras.Model(inputs, keras.ops.squeeze(picked, -1))

    def __call__(self, documents: mini_corpus.Documents, stride: int) -> float:
        token_ids = mini_corpus.encode(documents, self.vocabulary)
        rows = mini_corpus.windows(token_ids, self.context, stride)
        score = rows.pop("score")
        log_probs = np.asarray(self.scorer.predict(rows, batch_size=16, verbose=0), "float64")
        bits = -(log_probs * score).sum() / math.log(2)
        return bits / mini_corpus.byte_count(documents)


class BestOnDev(keras.callbacks.Callback):
    """Scores the dev text after every epoch, keeps the best weights, and watches the clock.

    It stands after `SwapEMAWeights`, so what it scores and keeps are the averaged weights.
    """

    def __init__(self, measure: BitsPerByte, dev: mini_corpus.Documents, minutes: float) -> None:
        super().__init__()
        self.measure, self.dev = measure, dev
        self.start = time.monotonic()
        self.deadline = self.start + 60 * minutes
        self.best, self.best_epoch, self.weights = math.inf, 0, None

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if time.monotonic() > self.deadline:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        # Windows side by side, not overlapping: a little pessimistic, and half the work.
        bits = self.measure(self.dev, stride=self.measure.context)
        if bits < self.best:
            self.best, self.best_epoch, self.weights = bits, epoch + 1, self.model.get_weights()
        loss, minutes = (logs or {}).get("loss", math.nan), (time.monotonic() - self.start) / 60
        print(
            f"epoch {epoch + 1}: loss {loss:.4f}, dev {bits:.4f} bits per byte "
            f"(best {self.best:.4f}, epoch {self.best_epoch}), {minutes:.1f} minutes",
            flush=True,
        )


# --- model and training ---------------------------------------------------------------------


def build_backbone(args: argparse.Namespace) -> keras.Model:
    """The model of `ARCHITECTURE`, with random weights."""
    numbers: dict[str, Any] = dict(ARCHITECTURE)
    for override in args.overrides:
        name, _, value = override.partition("=")
        if name not in numbers or not value.isdigit():
            raise SystemExit(f"--set {override}: not NAME=NUMBER of {', '.join(numbers)}.")
        numbers[name] = int(value)
    numbers |= {"vocabulary_size": args.vocabulary_size, "max_sequence_length": args.context}
    return keras_gemma2.Gemma2Backbone(**numbers, dropout=args.dropout, dtype=args.dtype)


def build_optimizer(args: argparse.Namespace, steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up, cosine decay, clipping, and an average of the weights."""
    warmup = max(1, int(args.warmup * steps))
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=max(1, steps - warmup),
        alpha=0.02,
        warmup_target=args.learning_rate,
        warmup_steps=warmup,
    )
    return keras.optimizers.AdamW(
        schedule,
        weight_decay=args.weight_decay,
        beta_2=0.98,
        global_clipnorm=1.0,
        use_ema=True,
        # In a short trial a long average would still hold the random beginning.
        ema_momentum=min(args.ema_momentum, max(0.0, 1 - 10 / steps)),
    )


def train(args: argparse.Namespace, split: mini_corpus.Split, vocabulary: bytes) -> tuple:
    """Fit the model; returns its backbone with the best weights, and the figures of the run."""
    documents = mini_corpus.encode(split["train"], vocabulary)
    blocks = mini_corpus.TokenBlocks(documents, args.context, args.batch_size, args.steps_per_epoch, args.seed)
    # Rows of token ids need no preprocessor.
    lm = keras_gemma2.Gemma2CausalLM(build_backbone(args), preprocessor=None)
    size = 2 * lm.count_params() + len(vocabulary)
    print(f"{lm.count_params():,} parameters; {size:,} bytes in float16 with the vocabulary")
    optimizer = build_optimizer(args, args.epochs * len(blocks))
    # Norm scales stand for 1 + w: decay would pull them to 1, which nothing asks for.
    optimizer.exclude_from_weight_decay([scale for scale in lm.trainable_variables if len(scale.shape) == 1])
    lm.compile(optimizer=optimizer, loss="auto", weighted_metrics="auto")
    measure = BitsPerByte(lm, args.context, vocabulary)
    best = BestOnDev(measure, split["dev"], args.minutes)
    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True), best]
    lm.fit(blocks, epochs=args.epochs, callbacks=callbacks, verbose=0)
    minutes = (time.monotonic() - best.start) / 60
    steps = int(keras.ops.convert_to_numpy(optimizer.iterations))
    lm.set_weights(best.weights)
    figures = {
        "parameters": lm.count_params(),
        "steps": steps,
        "tokens": steps * args.batch_size * args.context,
        "minutes": minutes,
        "best_epoch": best.best_epoch,
        "dev": measure(split["dev"], stride=args.context // 2),
        "test_before_saving": measure(split["test"], stride=args.context // 2),
    }
    return lm.backbone, figures


# --- the folder that ships ------------------------------------------------------------------


def save(backbone: keras.Model, vocabulary: bytes, context: int, folder: Path) -> None:
    """Write the Hugging Face folder in float16."""
    tokenizer = keras_gemma2.Gemma2Tokenizer(proto=vocabulary)
    preprocessor = keras_gemma2.Gemma2CausalLMPreprocessor(tokenizer, sequence_length=context)
    lm = keras_gemma2.Gemma2CausalLM(backbone, preprocessor=preprocessor)
    lm.export_to_transformers(folder, dtype="float16", config_dtype="float32")


def judge(folder: Path, split: mini_corpus.Split, vocabulary: bytes, context: int) -> dict[str, Any]:
    """Test figure and samples of the folder as anyone will load it."""
    lm = keras_gemma2.Gemma2CausalLM.from_preset(str(folder))
    bare = keras_gemma2.Gemma2CausalLM(lm.backbone, preprocessor=None)
    bits = BitsPerByte(bare, context, vocabulary)(split["test"], stride=context // 2)
    lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.95, temperature=0.8, seed=1))
    samples = [lm.generate(prompt, max_length=min(160, context)) for prompt in PROMPTS]
    return {"test": bits, "samples": samples}


def device_name() -> str:
    """The accelerator's product name where NVIDIA's tool knows it, else the processor's."""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip().splitlines()[0]
    return platform.processor() or platform.machine()


def held_out_table(figures: dict[str, Any]) -> str:
    """The held-out figures as a Markdown table."""
    rows = {
        "this folder (float16 weights)": figures["test"],
        "the same model before rounding to float16": figures["test_before_saving"],
        "`xz -9`, test text alone": figures["xz"]["alone"],
        "`xz -9`, growth when the test text follows the training text": figures["xz"]["after train"],
    }
    lines = [f"| {name} | {value:.4f} |" for name, value in rows.items()]
    return "\n".join(["| test text | bits per byte |", "|---|---|", *lines])


def readme(args: argparse.Namespace, split: mini_corpus.Split, figures: dict[str, Any]) -> str:
    """The model's card."""
    sizes = {part: (len(split[part]), mini_corpus.byte_count(split[part])) for part in split}
    parts = ", ".join(f"{part} {count} ({size:,} bytes)" for part, (count, size) in sizes.items())
    hidden, unset = ("output", "corpus", "cache", "prepare_only"), (None, [], math.inf)
    chosen = {name: value for name, value in vars(args).items() if name not in hidden and value not in unset}
    settings = ", ".join(f"{name} {value}" for name, value in chosen.items())
    samples = "\n\n".join("> " + text.replace("\n", "\n> ") for text in figures["samples"])
    return f"""# A small Gemma 2

{figures["parameters"]:,} parameters, trained from random weights by `examples/pretrain_mini.py` of keras_gemma2.
It shows that the package trains and runs; it knows nothing but its corpus.

## Data

{mini_corpus.read_source(args.corpus)}

Documents: {parts}.
Nothing of `dev` and `test` was trained on: `dev` chose the epoch, `test` is only reported.
The vocabulary (SentencePiece BPE) is trained on `train` alone.

## Training

{figures["steps"]:,} steps, {figures["tokens"]:,} tokens, {figures["minutes"]:.1f} minutes on {figures["device"]}
(Keras {keras.version()}, {keras.backend.backend()}). The weights are an exponential moving average, taken after epoch
{figures["best_epoch"]}; dev {figures["dev"]:.4f} bits per byte.

Settings: {settings}.

## Held-out text

Windows of {args.context} tokens, each begun with `<bos>`; every token is scored once, with at least
{args.context - args.context // 2} tokens before it except at the beginning of a document.

{held_out_table(figures)}

## Samples

Temperature 0.8, top-p 0.95, not selected.

{samples}
"""


def main() -> None:
    args = parse_arguments()
    keras.utils.set_random_seed(args.seed)
    split = mini_corpus.load_corpus(args.corpus, args.cache)
    vocabulary = mini_corpus.load_vocabulary(args.corpus, split, args.vocabulary_size)
    args.vocabulary_size = mini_corpus.piece_count(vocabulary)
    for part, documents in split.items():
        ids = sum(map(len, mini_corpus.encode(documents, vocabulary)))
        size = mini_corpus.byte_count(documents)
        print(f"{part}: {len(documents)} documents, {size:,} bytes, {ids:,} tokens")
    if args.prepare_only:
        source = mini_corpus.read_source(args.corpus)
        mini_corpus.save_corpus(split, vocabulary, source, args.output)
        return
    backbone, figures = train(args, split, vocabulary)
    save(backbone, vocabulary, args.context, args.output)
    figures |= judge(args.output, split, vocabulary, args.context)
    figures |= {"xz": mini_corpus.xz_bits_per_byte(split), "device": device_name()}
    (args.output / "README.md").write_text(readme(args, split, figures), encoding="utf-8")
    print(held_out_table(figures), *figures["samples"], sep="\n\n")
    size = sum(path.stat().st_size for path in args.output.iterdir() if path.is_file())
    print(f"\n{args.output}: {size:,} bytes" + (" (too large to ship)" if size > SIZE_LIMIT else ""))


if __name__ == "__main__":
    main()
