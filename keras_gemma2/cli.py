"""The command line: `keras-gemma2 generate | chat | info | convert | verify | finetune | plan-memory | plan | export | serve`.

`python -m keras_gemma2` is the same.

Only the standard library is imported until a command needs more, so that `--help` answers at once. stdout carries a
command's result and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence

BACKENDS = ("jax", "tensorflow", "torch")
DEFAULT_PRESET = "gemma2_mini_en"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if `verify` finds a fault, or 2 for wrong input, with one line on stderr.

    Args:
        arguments: without the program's name; None means `sys.argv[1:]`.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:  # the reader of stdout (head, say) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"keras-gemma2: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineErrors(prog="keras-gemma2", description="Gemma 2 in Keras 3, on JAX, TensorFlow and PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="continue a text", description="Continues a text and prints it.")
    add = generate.add_argument
    add("prompt", type=_text, help="the text to continue")
    add("--preset", default=DEFAULT_PRESET, help="built-in name, hub address, folder or file (default: %(default)s)")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND or keras.json, as Keras itself")
    add("--dtype", help="float32, bfloat16, ... (default: what the preset says)")
    add("--max-new-tokens", type=_at_least(int, 1), default=128, metavar="N", help="default: %(default)s")
    add("--quantize", choices=("int8", "int4"), help="keep the weights in fewer bits, from reading them on")
    _add_sampling(generate)
    add("--draft", metavar="PRESET", help="a smaller model that proposes tokens, or prompt_lookup; says on stderr how many it took")
    add("--strip-prompt", action="store_true", help="print the continuation without the prompt")
    generate.set_defaults(run=_generate)
    _add_chat(commands)
    info = commands.add_parser("info", help="print a model's layers", description="Prints the tree of layers; loads no weights.")
    info.add_argument("preset", help="built-in name, hub address, folder or file")
    info.set_defaults(run=_info)
    _add_convert(commands)
    _add_verify(commands)
    _add_finetune(commands)
    _add_plan_memory(commands)
    _add_plan(commands)
    _add_export(commands)
    _add_serve(commands)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add, number, integer = parser.add_argument, _at_least(float, 0), _at_least(int, 0)
    add("--temperature", type=number, default=0.8, metavar="X", help="0 is greedy (default: %(default)s)")
    add("--top-k", type=integer, default=0, metavar="K", help="keep the K likeliest tokens; 0 is off (default)")
    add(
        "--top-p",
        type=_probability,
        default=0.95,
        metavar="P",
        help="keep the likeliest up to this sum (default: %(default)s)",
    )
    add("--seed", type=integer, metavar="N", help="makes the text repeatable on one backend")


def _add_chat(commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talks with a model: an answer to each line of input. /help shows what else can be typed.",
    )
    add = parser.add_argument
    add("preset", help="built-in name, hub address, folder or file; best one tuned on instructions")
    add("--system", metavar="TEXT", help="what the model should follow throughout")
    add("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND or keras.json, as Keras itself")
    add("--dtype", help="float32, bfloat16, ... (default: what the preset says)")
    add("--quantize", choices=("int8", "int4"), help="keep the weights in fewer bits, from reading them on")
    add(
        "--max-new-tokens", type=_at_least(int, 1), metavar="N", help="of an answer (default: 512, or a quarter of a small context)"
    )
    _add_sampling(parser)
    parser.set_defaults(run=_chat)


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert", help="write a checkpoint in another format", description="Writes a checkpoint in another format."
    )
    add = parser.add_argument
    add("source", help="built-in name, hub address, folder or file, as from_preset takes it")
    add("target", help="folder to write")
    add("--to", choices=("hf", "preset", "keras_hub"), default="hf", help="format (default: %(default)s)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the stored weights (default: the source's)")
    add("--max-shard-size", metavar="SIZE", help="of one file, such as 2GB (default: 5GB for hf, else 10GB)")
    add("--quiet", action="store_true", help="draw no progress bar")
    parser.set_defaults(run=_convert)


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="check that a checkpoint is whole, and what it says it is",
        description="Checks a checkpoint's files, numbers and texts. The exit code is 1 if a check failed.",
    )
    add = parser.add_argument
    add("where", help="built-in name, hub address, folder or file, as from_preset takes it")
    add("--as", dest="claim", metavar="NAME", help="the published model it should be (default: what WHERE is called)")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND or keras.json, as Keras itself")
    add("--dtype", help="float32, bfloat16, ... (default: what the checkpoint says)")
    add("--quick", action="store_true", help="only what needs no model: files, config, weights, vocabulary")
    add("--no-transformers", action="store_true", help="no logits beside transformers'")
    add("--long", action="store_true", help="also a continuation of 4,806 tokens, minutes on a CPU")
    parser.set_defaults(run=_verify)


def _add_finetune(commands) -> None:
    from keras_gemma2.cli_finetune import add_options

    parser = commands.add_parser(
        "finetune",
        help="train an adapter (LoRA) on a file of texts, pairs or conversations",
        description="Trains an adapter on a .jsonl file. The same command after an interruption goes on where it was.",
    )
    add_options(parser.add_argument, _at_least, BACKENDS, DEFAULT_PRESET)
    parser.set_defaults(run=_finetune)


def _add_export(commands) -> None:
    from keras_gemma2.cli_export import add_options

    parser = commands.add_parser(
        "export",
        help="write the model for another runtime: TensorFlow, ONNX, OpenVINO, LiteRT, StableHLO or PyTorch",
        description="Writes the model for a runtime without this package: a SavedModel, texts in, texts out, or a step of it.",
    )
    add_options(parser.add_argument, _at_least, _probability)
    parser.set_defaults(run=_export)


def _add_serve(commands) -> None:
    from keras_gemma2.cli_serve import add_options

    parser = commands.add_parser(
        "serve",
        help="answer requests over HTTP, as OpenAI's interface has them",
        description="Serves a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /health, /ready.",
    )
    add_options(parser.add_argument, _at_least, BACKENDS, DEFAULT_PRESET)
    parser.set_defaults(run=_serve)


def _add_plan_memory(commands) -> None:
    parser = commands.add_parser(
        "plan-memory",
        help="estimate the memory of a training step",
        description="Prints what a training step would hold in memory, estimated from the model's config; loads no weights.",
    )
    add, positive = parser.add_argument, _at_least(int, 1)
    add("preset", help="built-in name, hub address, folder or file")
    add("--batch", type=positive, default=1, metavar="B", help="rows of a step (default: %(default)s)")
    add("--length", type=positive, default=2048, metavar="T", help="tokens of a row (default: %(default)s)")
    add("--dtype", default="float32", help="float32, bfloat16, mixed_bfloat16, ... (default: %(default)s)")
    add("--quantize", choices=("int8", "int4"), help="weights kept in fewer bits")
    add("--lora-rank", type=positive, metavar="R", help="train an adapter of this rank (default: train all weights)")
    add("--targets", default="attention", help="of the adapter: attention, all, or a layer's name (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="keep of each block its input alone")
    add("--optimizer", default="adam", metavar="NAME", help="sgd, adam, adamw, ... (default: %(default)s)")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND or keras.json, as Keras itself")
    parser.set_defaults(run=_plan_memory)


def _add_plan(commands) -> None:
    from keras_gemma2.cli_plan import add_options, plan_command

    parser = commands.add_parser(
        "plan",
        help="say what a step takes on a mesh of devices: memory, collectives, time",
        description="Compiles a step of a model for a mesh of devices that need not exist, and prints what it takes of them.",
    )
    add_options(parser.add_argument, _at_least)
    parser.set_defaults(run=plan_command)


class _OneLineErrors(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage block."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("the prompt is not valid UTF-8") from error
    if not value:
        raise argparse.ArgumentTypeError("the prompt is empty; give at least one character")
    return value


def _at_least(kind: Callable[[str], float], lowest: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = kind(value)
        except ValueError:
            number = math.nan
        if not lowest <= number < math.inf:
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} of at least {lowest}, got {value!r}")
        return number

    return parse


def _probability(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be over 0 and at most 1, got {value!r}")
    return number


def _generate(options: argparse.Namespace) -> int:
    from keras_gemma2.presets.registry import resolve

    resolve(options.preset)  # a wrong name is told at once, before the seconds that a backend takes to import
    has_model = options.draft not in (None, "prompt_lookup")
    if has_model:
        resolve(options.draft)
    _choose_backend(options.backend)
    from keras_gemma2 import Sampler

    lm = _load(options.preset, options.dtype, options.quantize)
    draft = _load(options.draft, options.dtype) if has_model else options.draft
    pieces = lm.stream(
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        sampler=Sampler(temperature=options.temperature, top_k=options.top_k or None, top_p=options.top_p),
        seed=options.seed,
        draft=draft,
    )
    prompt = lm.preprocessor.generate_postprocess(lm.preprocessor.generate_preprocess([options.prompt]))  # as `generate` returns it
    for piece in itertools.chain([] if options.strip_prompt else prompt, pieces):
        print(piece, end="", flush=True)
    print(flush=True)
    if lm.generation_stats is not None:
        print(f"keras-gemma2: {lm.generation_stats}", file=sys.stderr)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from keras_gemma2.cli_chat import chat_command
    from keras_gemma2.presets.registry import resolve

    if options.system is not None and options.load is not None:
        raise ValueError("argument --system: the conversation of --load has its own; give one of them.")
    if options.load is not None and not os.path.isfile(options.load):
        raise FileNotFoundError(f"argument --load: there is no file {options.load!r}")
    resolve(options.preset)  # before the seconds that a backend takes to import
    _choose_backend(options.backend)
    if options.load is not None:
        from keras_gemma2.generation.chat_session import read_saved

        read_saved(options.load)  # a file that holds no conversation is told before a model loads
    return chat_command(_load(options.preset, options.dtype, options.quantize), options)


def _choose_backend(name: str | None) -> None:
    """Sets Keras's backend by its own rules, and checks that it is installed before Keras fails on it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if name is not None:
        os.environ["KERAS_BACKEND"] = name
    name = os.environ.get("KERAS_BACKEND")
    if name in BACKENDS and importlib.util.find_spec(name) is None:
        raise ValueError(f"The backend {name!r} is not installed. Install it with: pip install {name}")


def _load(preset: str, dtype: str | None, quantize: str | None = None):
    import keras_gemma2

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The preset .* has no tokenizer")  # an error here, told next
        lm = keras_gemma2.Gemma2CausalLM.from_preset(preset, dtype=dtype, quantize=quantize)
    if lm.preprocessor is None:
        raise ValueError(f"The preset {preset!r} has no tokenizer, which text needs.")
    return lm


def _info(options: argparse.Namespace) -> int:
    from keras_gemma2.presets.registry import resolve
    from keras_gemma2.presets.tree import format_tree

    print(format_tree(resolve(options.preset).config, options.preset))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from keras_gemma2.presets.convert import convert

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    convert(options.source, options.target, options.to, options.dtype, options.max_shard_size, progress=not options.quiet)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from keras_gemma2.presets.registry import preset_names
    from keras_gemma2.presets.verify import FAILED, NEED_MODEL, summary, verify

    if options.claim is not None and options.claim not in preset_names():
        raise ValueError(f"argument --as: must be one of {', '.join(preset_names())}, got {options.claim!r}")
    _choose_backend(options.backend)
    skip = NEED_MODEL if options.quick else ("transformers",) if options.no_transformers else ()
    results = verify(
        options.where, options.dtype, options.claim, skip, options.long, report=lambda result: print(result, flush=True)
    )
    print(summary(options.where, results), flush=True)
    return int(any(result.verdict == FAILED for result in results))


def _finetune(options: argparse.Namespace) -> int:
    from keras_gemma2.cli_finetune import finetune_command, settings_of

    settings = settings_of(options)
    _choose_backend(options.backend)
    return finetune_command(settings, options)


def _export(options: argparse.Namespace) -> int:
    from keras_gemma2.cli_export import export_backend, export_command
    from keras_gemma2.presets.registry import resolve

    needed = export_backend(options)
    resolve(options.preset)  # before the seconds that a backend takes to import
    _choose_backend(needed)
    return export_command(options)


def _plan_memory(options: argparse.Namespace) -> int:
    from keras_gemma2.presets.registry import resolve

    config = resolve(options.preset).config
    _choose_backend(options.backend)
    from keras_gemma2.lora import LoraSettings
    from keras_gemma2.training.memory import plan_memory

    if options.quantize is not None and options.lora_rank is None:
        raise ValueError("argument --quantize: quantized weights are not trained; give --lora-rank to train an adapter over them")
    rank = options.lora_rank
    report = plan_memory(
        config,
        options.batch,
        options.length,
        dtype=options.dtype,
        quantize=options.quantize,
        lora=None if rank is None else LoraSettings.of(config, rank, 16, options.targets),
        gradient_checkpointing=options.gradient_checkpointing,
        optimizer=options.optimizer,
    )
    print(f"{options.preset}: {report}")
    return 0


def _serve(options: argparse.Namespace) -> int:
    from keras_gemma2.cli_serve import check_options, serve_command
    from keras_gemma2.presets.registry import resolve

    adapters = check_options(options)
    resolve(options.preset)  # before the seconds that a backend takes to import
    _choose_backend(options.backend)
    return serve_command(_load(options.preset, options.dtype, options.quantize), options, adapters)
