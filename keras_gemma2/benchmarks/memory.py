"""Estimates of `lm.memory_report` beside what training steps held: each case in a process of its own.

A first step compiles. What the second holds at its peak, beside the variables, is compared with the estimate of gradients,
activations and loss: TensorFlow's allocator counts it (its pool gives nothing back to the system), and elsewhere it is how far
resident memory rises, with the C library told to give back what is freed. The last column is how far the process rose in the first
step, compiler and allocators included.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_gemma2.benchmarks.processes import BACKENDS, WIDTHS_2B, in_fresh_process, rise

SMALL = {
    "vocabulary_size": 1024,
    "num_layers": 1,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "head_dim": 16,
}
MEDIUM = {
    "vocabulary_size": 4096,
    "num_layers": 8,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "hidden_dim": 512,
    "intermediate_dim": 2048,
    "head_dim": 64,
}
LARGE = {**WIDTHS_2B, "num_layers": 2}
DEEP = {**WIDTHS_2B, "num_layers": 8}
# Name: sizes, length, dtype, LoRA's rank (None: all weights are trained), gradient checkpointing.
CASES: dict[str, tuple[dict[str, int], int, str, int | None, bool]] = {
    "medium, LoRA": (MEDIUM, 1024, "float32", 8, False),
    "medium, LoRA, checkpointing": (MEDIUM, 1024, "float32", 8, True),
    "medium, LoRA, mixed_bfloat16": (MEDIUM, 2048, "mixed_bfloat16", 8, False),
    "medium, all weights": (MEDIUM, 1024, "float32", None, False),
    "2B widths, 2 layers, LoRA": (LARGE, 2048, "float32", 8, False),
    "2B widths, 8 layers, LoRA": (DEEP, 1024, "float32", 8, False),
    "2B widths, 8 layers, LoRA, checkpointing": (DEEP, 1024, "float32", 8, True),
}
MMAP_THRESHOLD = -3  # of mallopt(3)


def add_command(commands: Any) -> None:
    """Adds `memory` to the program's commands."""
    parser = commands.add_parser("memory", help="estimated and measured memory of training steps", description=__doc__)
    add = parser.add_argument
    add("--backend", choices=BACKENDS, action="append", help="may be repeated (default: all three)")
    add("--case", choices=tuple(CASES), action="append", help="may be repeated (default: all)")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints a table with a row for each case and backend."""
    if options.child:
        print(json.dumps(measure(*CASES[options.case[0]])))
        return
    print("| model | T | backend | estimate, MB | measured, MB | estimate / measured | process, first step, MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in options.case or CASES:
        for backend in options.backend or BACKENDS:
            row = in_fresh_process("memory", backend, "--child", "--case", case)
            ratio, megabytes = row["estimate"] / row["measured"], {name: size / 1e6 for name, size in row.items()}
            figures = f"{megabytes['estimate']:.0f} | {megabytes['measured']:.0f} | {ratio:.2f} | {megabytes['process']:.0f}"
            print(f"| {case} | {CASES[case][1]} | {backend} | {figures} |", flush=True)


def measure(numbers: dict[str, int], length: int, dtype: str, rank: int | None, checkpointing: bool) -> dict[str, float]:
    """Bytes of a model's training step, beside its variables: `estimate` and `measured`; and how far the `process` rose."""
    _give_back_what_is_freed()
    lm, step = _model(SMALL, 2 * 256, "float32", 2, False)  # in blocks, as the others: loads libraries
    step()
    lm, step = _model(numbers, length, dtype, rank, checkpointing)
    process = rise(step)
    report = lm.memory_report(1, length)
    return {"estimate": float(report.growth - report.optimizer), "measured": float(_held_by(step)), "process": float(process)}


def _give_back_what_is_freed() -> None:
    """The C library keeps freed blocks of up to 32 MB, and takes more, as it has no use for the holes (Linux, glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 16)


def _held_by(step: Callable[[], Any]) -> int:
    """Bytes that a step holds at its peak, beside what is there before and after."""
    from keras_gemma2 import backend

    counted = backend.counted_peak(step)
    if counted is not None:
        return counted
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return rise(step)


def _model(numbers: dict[str, int], length: int, dtype: str, rank: int | None, checkpointing: bool) -> tuple[Any, Any]:
    import keras

    from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM

    lm = Gemma2CausalLM(Gemma2Backbone(**numbers, dtype=dtype))
    if rank is not None:
        lm.enable_lora(rank)
    if checkpointing:
        lm.enable_gradient_checkpointing()
    lm.compile(optimizer=keras.optimizers.Adam(1e-4))
    token_ids = np.random.default_rng(0).integers(3, numbers["vocabulary_size"], (1, length)).astype("int32")
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    return lm, lambda: lm.train_on_batch(x)
