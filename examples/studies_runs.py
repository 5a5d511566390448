"""The training runs of `studies.py`: rows of tokens, one run, its held-out figures, and the folder that keeps what is finished."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import mini_corpus
import numpy as np

import keras_gemma2

Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]  # inputs, targets, weights
PRESET = "gemma2_mini_en"
EVALUATION_ROWS = 32  # a batch
TOP_K = 64  # of the teacher's probabilities, a token


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all runs of a study have in common."""

    steps: int = 256
    batch_size: int = 16  # rows
    context: int = 128  # tokens a row
    learning_rate: float = 1.6e-2  # the peak: see the study `rate`
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.1
    beta_2: float = 0.98
    clipnorm: float = 1.0

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.context


@dataclasses.dataclass(frozen=True)
class Data:
    """The corpus in tokens: rows to train on, the same ones for every run, and documents that none has seen.

    Attributes:
        rows: `[R, T + 1]`, cut from the training documents; column T is the last token's target.
        documents: name -> ids, of "dev" and "test".
        sizes: UTF-8 bytes of "dev" and "test".
        digest: names all of it, so that results on other text are never mistaken for these.
        held_out_digest: names the documents, for what is only evaluated.
    """

    rows: np.ndarray
    documents: dict[str, dict[str, np.ndarray]]
    sizes: dict[str, int]
    digest: str
    held_out_digest: str

    def batches(
        self, batch_size: int, order: np.ndarray | None = None
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
        """The rows as `fit` takes them: inputs, targets and their weights, each `[batch_size, T]`."""
        order = np.arange(len(self.rows)) if order is None else order
        for start in range(0, len(order), batch_size):
            rows = self.rows[order[start : start + batch_size]]
            token_ids, targets = rows[:, :-1].copy(), rows[:, 1:]
            token_ids[:, 0] = mini_corpus.BOS
            weights = (targets != mini_corpus.BOS).astype("float32")  # nothing has to learn that a document follows another one
            yield {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}, targets, weights


def load_data(recipe: Recipe, corpus: Path | None, cache: Path) -> Data:
    """Reads the corpus with the embedded preset's vocabulary, and cuts the rows that every run trains on."""
    if corpus is not None and not corpus.is_dir():
        raise SystemExit(f"--corpus {corpus}: there is no such folder.")
    split = mini_corpus.load_corpus(corpus, cache)
    vocabulary = keras_gemma2.Gemma2Tokenizer.from_preset(PRESET).proto
    # One choice of rows for all seeds: what the teacher says about them is computed once.
    blocks = mini_corpus.TokenBlocks(
        mini_corpus.encode(split["train"], vocabulary), recipe.context, recipe.batch_size, recipe.steps
    )
    if blocks.steps < recipe.steps:
        raise SystemExit(f"The training text is enough for {blocks.steps} steps of new text. Received: --steps {recipe.steps}.")
    parts = ("dev", "test")
    held = {part: dict(zip(split[part], mini_corpus.encode(split[part], vocabulary), strict=True)) for part in parts}
    held_out_tokens = b"".join(ids.tobytes() for part in parts for ids in held[part].values())
    digests = (hashlib.sha256(content).hexdigest()[:16] for content in (blocks.rows.tobytes() + held_out_tokens, held_out_tokens))
    return Data(blocks.rows, held, {part: mini_corpus.byte_count(split[part]) for part in parts}, *digests)


# --- one run --------------------------------------------------------------------------------------------------------------


def build(config: dict[str, Any], recipe: Recipe) -> keras_gemma2.Gemma2CausalLM:
    """A model with random weights."""
    return keras_gemma2.Gemma2CausalLM(keras_gemma2.Gemma2Backbone(**config, max_sequence_length=recipe.context))


def build_optimizer(recipe: Recipe, variables: list[Any]) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay: the same for every run."""
    warmup = max(1, int(recipe.warmup * recipe.steps))
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, recipe.steps - warmup), alpha=0.02, warmup_target=recipe.learning_rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=recipe.weight_decay, beta_2=recipe.beta_2, global_clipnorm=recipe.clipnorm
    )
    # Norm scales stand for 1 + w: decay would pull them to 1, which nothing asks for.
    optimizer.exclude_from_weight_decay([scale for scale in variables if len(scale.shape) == 1])
    return optimizer


def train(config: dict[str, Any], recipe: Recipe, data: Data, seed: int) -> keras_gemma2.Gemma2CausalLM:
    """A model trained on the rows, each seen once. The seed draws its weights and the order of the rows."""
    keras.utils.set_random_seed(seed)
    lm = build(config, recipe)
    lm.compile(optimizer=build_optimizer(recipe, lm.trainable_variables))
    order = np.random.default_rng(seed).permutation(len(data.rows))
    lm.fit(data.batches(recipe.batch_size, order), steps_per_epoch=recipe.steps, shuffle=False, verbose=0)
    return lm


def record(data: Data, folder: Path) -> None:
    """Writes what the embedded preset expects of each token of the rows, or what of it is missing."""
    teacher = keras_gemma2.Gemma2CausalLM.from_preset(PRESET)
    keras_gemma2.record_teacher(
        teacher, data.batches(EVALUATION_ROWS), folder, top_k=TOP_K, batch_size=EVALUATION_ROWS, verbose=False
    )


def distill(config: dict[str, Any], recipe: Recipe, seed: int, folder: Path) -> keras_gemma2.Gemma2CausalLM:
    """A model trained on the same rows by what `record` has written of them. The seed draws weights and order here, too."""
    keras.utils.set_random_seed(seed)
    lm = build(config, recipe)
    distiller = keras_gemma2.Distiller(lm, folder, temperature=1.0, alpha=1.0)
    distiller.compile(optimizer=build_optimizer(recipe, lm.trainable_variables))
    distiller.fit(batch_size=recipe.batch_size, verbose=0)
    return lm


def held_out(lm: keras_gemma2.Gemma2CausalLM, data: Data, part: str, context: int) -> dict[str, Any]:
    """Perplexity per token and bits per byte of whole documents, each token scored once.

    Rows overlap by half, so that a scored token has at least half a row before it, but for the beginning of a document.
    """
    nats = {}
    lm.compile()  # the default metrics; the optimizer is not needed any more
    for name, ids in data.documents[part].items():
        rows = mini_corpus.windows([ids], context, max(1, context // 2))
        x = {key: rows[key] for key in ("token_ids", "padding_mask")}
        weights = rows["score"].astype("float32")
        figures = lm.evaluate(x, rows["targets"], batch_size=EVALUATION_ROWS, sample_weight=weights, verbose=0, return_dict=True)
        nats[name] = math.log(figures["perplexity"]) * len(ids)
    total, tokens = math.fsum(nats.values()), sum(map(len, data.documents[part].values()))
    return {
        "perplexity": math.exp(total / tokens),
        "bits_per_byte": total / math.log(2) / data.sizes[part],
        "nats_per_token": {name: value / len(data.documents[part][name]) for name, value in nats.items()},
    }


# --- what is finished -----------------------------------------------------------------------------------------------------


def write_beside(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and moves it there, so that a killed process leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    beside.replace(path)


def finished(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run with exactly these settings, if there is a whole one."""
    try:
        kept = json.loads(result_file(folder, name, settings).read_text("utf-8"))
        return kept["result"] if kept["settings"] == json.loads(json.dumps(settings)) else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or half of one, or something else
        return None


def result_file(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Where the result of such a run lies."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{name}-{digest}.json"


def run_once(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    make: Callable[[], dict[str, Any]],
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The result of a run: from the folder, or made now and kept there.

    `prepare` is called before `make`, and its time is not the run's.
    """
    result = finished(folder, name, settings)
    if result is None:
        print(f"{name} ...", end=" ", flush=True)
        if prepare is not None:
            prepare()
        start = time.process_time()  # of all threads, whatever else the machine does meanwhile
        result = make()
        result |= {"cpu_seconds": time.process_time() - start, "processor": processor(), "backend": keras.backend.backend()}
        write_beside(result_file(folder, name, settings), json.dumps({"settings": settings, "result": result}, indent=1) + "\n")
        print(f"perplexity {result['perplexity']:.2f}, {result['cpu_seconds']:.0f} s of processor time", flush=True)
    return result


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
