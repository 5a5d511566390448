"""`keras-gemma2 finetune`: its options, and what it prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any


def add_options(add: Callable[..., Any], number: Callable[..., Any], backends: tuple[str, ...], default_preset: str) -> None:
    """Gives a parser the command's options.

    Args:
        add: the parser's `add_argument`.
        number: `number(kind, lowest)` is the type of an option that is a number of at least so much.
        backends: names of Keras's.
        default_preset: what is tuned unless told otherwise.
    """
    count = number(int, 1)
    add("--preset", default=default_preset, help="built-in name, hub address, folder or file (default: %(default)s)")
    add("--data", required=True, metavar="FILE", help=".jsonl: text; prompt and response; or messages, in each line")
    add("--output", required=True, metavar="FOLDER", help="gets adapter, log and checkpoint; a run that it holds is continued")
    add("--restart", action="store_true", help="drop the run that the folder holds")
    add("--backend", choices=backends, help="default: KERAS_BACKEND or keras.json, as Keras itself")
    add("--dtype", help="float32, bfloat16, mixed_bfloat16, ... (default: what the preset says)")
    add("--quantize", choices=("int8", "int4"), help="keep the frozen weights in fewer bits (QLoRA)")
    add("--lora-rank", type=count, default=8, metavar="N", help="of the factors (default: %(default)s)")
    add("--lora-alpha", type=number(float, 0), default=16.0, metavar="X", help="scale is alpha / rank (default: %(default)s)")
    add("--targets", nargs="+", default=["attention"], metavar="NAME", help="attention (default), all, names of projections, ...")
    add("--dropout", type=number(float, 0), default=0.0, metavar="P", help="on the factors' input (default: %(default)s)")
    add("--rslora", action="store_true", help="scale is alpha / sqrt(rank)")
    add("--learning-rate", type=number(float, 0), default=2e-4, metavar="X", help="of Adam (default: %(default)s)")
    add("--epochs", type=count, default=1, metavar="N", help="passes over the data (default: %(default)s)")
    add("--batch-size", type=count, default=8, metavar="N", help="rows a step (default: %(default)s)")
    add("--accumulate", type=count, default=1, metavar="N", help="steps whose gradients are averaged (default: %(default)s)")
    add("--length", type=count, metavar="N", help="tokens in a row at most (default: what the preset says)")
    add("--truncate", action="store_true", help="cut what is longer, instead of refusing it")
    add("--pack", action="store_true", help="several samples in a row, each seeing itself alone")
    add("--validation", metavar="FILE", help=".jsonl of held-out data")
    add("--hold-out", type=number(float, 0), default=0.1, metavar="X", help="else: this share of DATA (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="default: %(default)s")
    add("--save-every", type=count, default=100, metavar="STEPS", help="between checkpoints (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a forward pass longer")
    add("--tensorboard", metavar="FOLDER", help="write TensorBoard's event files there")
    add("--merge", action="store_true", help="also write the merged model, to OUTPUT/merged")
    add("--quiet", action="store_true", help="draw no progress bar")


def settings_of(options: argparse.Namespace) -> Any:
    """The run's settings, checked as far as that goes without Keras."""
    from keras_gemma2.finetuning.settings import FinetuneSettings

    others = ("run", "restart", "backend", "quiet", "targets")
    values = {name: value for name, value in vars(options).items() if name not in others}
    targets = options.targets[0] if len(options.targets) == 1 else tuple(options.targets)
    settings = FinetuneSettings(targets=targets, **values)
    settings.check_preset()
    return settings


def finetune_command(settings: Any, options: argparse.Namespace) -> int:
    """Runs the command, on the backend that was chosen; returns its exit code."""
    from keras_gemma2.finetuning.run import finetune

    try:
        result = finetune(settings, options.restart, progress=not options.quiet)
    except KeyboardInterrupt:
        print("keras-gemma2: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    if result.before is not None:
        print(f"held-out loss {result.before:.4f} -> {result.after:.4f}, in {result.steps} steps")
    print(f"adapter in {result.folder}")
    return 0
