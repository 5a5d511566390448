"""Time and memory of a training step with LoRA, ours beside its peers', each in a process of its own.

Gemma 2 2B's widths with few layers, random weights, LoRA of rank 8 on queries and values. Peak growth is counted from the built and
compiled model on and includes compilation. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

from keras_gemma2.benchmarks import machine
from keras_gemma2.benchmarks.processes import BACKENDS, NARROW, WIDTHS_2B, in_fresh_process, rise

CONTENDERS = {
    "ours": ("train_contenders", "ours"),
    "ours_checkpointing": ("train_contenders", "ours"),
    "keras_hub": ("train_contenders", "keras_hub"),
    "transformers_peft": ("train_transformers", "transformers_peft"),
    "transformers_peft_checkpointing": ("train_transformers", "transformers_peft"),
}
LOSS = "loss"  # what a child does besides measuring a contender's step
PEERS = {"keras_hub": ("keras_hub",), "transformers_peft": ("transformers", "peft")}


def add_command(commands: Any) -> None:
    """Adds `train` to the program's commands."""
    parser = commands.add_parser("train", help="time and memory of a training step with LoRA", description=__doc__)
    add = parser.add_argument
    add("--backend", choices=BACKENDS, action="append", help="may be repeated (default: all three)")
    add("--length", type=int, action="append", help="tokens of a row, may be repeated (default: 512 and 2048)")
    add("--layers", type=int, default=2, help="26 is the whole 2B (default: %(default)s)")
    add("--batch", type=int, default=1, help="rows (default: %(default)s)")
    add("--dtype", default="float32", help="of weights and computation (default: %(default)s)")
    add(
        "--steps",
        type=int,
        default=3,
        help="timed after the first; the best counts, and 0 is for memory alone (default: %(default)s)",
    )
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure keras-hub, and transformers with peft, too")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="also ours with gradient checkpointing")
    add("--loss", action="store_true", help="instead of steps the loss alone, with its gradient")
    add("--quick", action="store_true", help="a narrow model: tries the command, measures nothing")
    add("--child", choices=(*CONTENDERS, LOSS), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints a table for each length, a row for each contender."""
    if options.child:
        length = options.length[0]
        found = _loss_alone(options, length) if options.child == LOSS else _steps(options, length)
        print(json.dumps(found))
        return
    print(f"Gemma 2 2B's widths, {options.layers} layers, {options.dtype}, batch {options.batch}; {machine.device_name()}")
    for length in options.length or ((8192,) if options.loss else (512, 2048)):
        title = "the loss and its gradient alone" if options.loss else "a step"
        print(f"\nT = {length}: {title}\n\n| | backend | first, s | s | peak growth, MB |\n|---|---|---|---|---|", flush=True)
        for who, backend in [(LOSS, b) for b in options.backend or BACKENDS] if options.loss else _contenders(options):
            _print_row(options, who, backend, length)


def _contenders(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Who takes steps, on which backend."""
    backends = options.backend or BACKENDS
    for backend in backends:
        yield "ours", backend
        if options.checkpointing:
            yield "ours_checkpointing", backend
        if _wanted(options, "keras_hub"):
            yield "keras_hub", backend
    if "torch" in backends and _wanted(options, "transformers_peft"):
        yield "transformers_peft", "torch"
        if options.checkpointing:
            yield "transformers_peft_checkpointing", "torch"


def _wanted(options: argparse.Namespace, peer: str) -> bool:
    return options.peers and all(importlib.util.find_spec(module) for module in PEERS[peer])


def _print_row(options: argparse.Namespace, who: str, backend: str, length: int) -> None:
    numbers = [f"--{name}={getattr(options, name)}" for name in ("layers", "batch", "dtype", "steps")]
    arguments = ["--child", who, f"--length={length}", *numbers, *(["--quick"] if options.quick else [])]
    try:
        row = in_fresh_process("train", backend, *arguments)
    except SystemExit as error:  # one contender's failure should not cost the others' figures
        print(f"| {who} | {backend} | failed: {str(error).strip().splitlines()[-1]} |", flush=True)
        return
    print(f"| {who} | {backend} | {row['first']:.1f} | {row['seconds']:.2f} | {row['growth'] / 1e6:.0f} |", flush=True)


def _steps(options: argparse.Namespace, length: int) -> dict[str, float]:
    module, function = CONTENDERS[options.child]
    make = getattr(importlib.import_module(f"keras_gemma2.benchmarks.{module}"), function)
    numbers = {**(NARROW if options.quick else WIDTHS_2B), "num_layers": options.layers}
    more = {"checkpointing": True} if options.child.endswith("checkpointing") else {}
    return _measured(make(numbers, options.dtype, options.batch, length, **more), options.steps)


def _measured(step: Any, steps: int) -> dict[str, float]:
    """The first call's time, the best of the others', and how far resident memory rose over what it was."""
    times: list[float] = []

    def run() -> None:
        times.extend(machine.seconds(step) for _ in range(1 + steps))

    growth = rise(run)
    return {"first": times[0], "seconds": min(times[1:] or times), "growth": float(growth)}


def _loss_alone(options: argparse.Namespace, length: int) -> dict[str, float]:
    """The loss of random hidden states and its gradient with respect to them, with a frozen embedding.

    A small one is computed before, which loads libraries: memory is what the loss takes, its gradient and compilation included.
    """
    from keras_gemma2.benchmarks.loss_alone import loss_and_gradient

    loss_and_gradient(NARROW["vocabulary_size"], NARROW["hidden_dim"], 1, 64)()
    numbers = NARROW if options.quick else WIDTHS_2B
    return _measured(loss_and_gradient(numbers["vocabulary_size"], numbers["hidden_dim"], options.batch, length), options.steps)
