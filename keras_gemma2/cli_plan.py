"""`keras-gemma2 plan`: its options, and what it prints."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any


def add_options(add: Callable[..., Any], number: Callable[..., Any]) -> None:
    """Gives a parser the command's options.

    Args:
        add: the parser's `add_argument`.
        number: `number(kind, lowest)` is the type of an option that is a number of at least so much.
    """
    count = number(int, 1)
    add("--size", required=True, metavar="NAME", help="2b, 9b or 27b")
    add("--mesh", required=True, metavar="AXES", help="devices along each axis, as in batch=2,model=8; 256 in all at most")
    add("--task", choices=("generate", "lora", "full", "distill"), default="generate", help="default: %(default)s")
    add("--batch", type=count, default=1, metavar="B", help="rows of a step, on all devices together (default: %(default)s)")
    add("--length", type=count, default=2048, metavar="T", help="tokens of a row (default: %(default)s)")
    help = "default: tensor_parallel; data_parallel, fully_sharded, fully_sharded_tensor_parallel"
    add("--recipe", default="tensor_parallel", metavar="NAME", help=help)
    add("--dtype", default="bfloat16", help="float32, bfloat16, mixed_bfloat16, ... (default: %(default)s)")
    add("--quantize", choices=("int8", "int4"), help="weights kept in fewer bits; with distill the teacher's")
    add("--lora-rank", type=count, default=8, metavar="R", help="lora: of the adapter (default: %(default)s)")
    add("--targets", default="attention", help="lora: attention, all, or a layer's name (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="keep of each block its input alone")
    add("--optimizer", default="adam", metavar="NAME", help="sgd, adam, adamw, ... (default: %(default)s)")
    add("--teacher-size", metavar="NAME", help="distill: 2b, 9b or 27b (default: the student's)")
    add("--chips", default="v5e,v5p,a100,h100,h200", metavar="NAMES", help="default: %(default)s")


def settings_of(options: argparse.Namespace) -> Any:
    """What is planned for, checked without a backend.

    Raises:
        ValueError: naming the argument, its value and the mend.
    """
    from keras_gemma2.planning.settings import PlanSettings, config_of, mesh_of

    for name, task in (("teacher_size", "distill"),):
        if getattr(options, name) is not None and options.task != task:
            raise ValueError(f"argument --{name.replace('_', '-')}: is for --task {task}, not for --task {options.task}")
    same = ("task", "batch", "length", "recipe", "dtype", "quantize", "lora_rank", "targets", "gradient_checkpointing", "optimizer")
    teacher = None if options.teacher_size is None else config_of(options.teacher_size, "--teacher-size")
    return PlanSettings(
        config_of(options.size),
        mesh_of(options.mesh),
        teacher=teacher,
        name=f"Gemma 2 {options.size.removeprefix('gemma2_').upper()}",
        **{name: getattr(options, name) for name in same},
    )


def with_devices(count: int) -> None:
    """Gives this process as many virtual CPU devices, if JAX has not been asked for devices yet."""
    os.environ["KERAS_BACKEND"], os.environ["JAX_PLATFORMS"] = "jax", "cpu"
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={count}"])


def plan_command(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from keras_gemma2.planning.chips import chips
    from keras_gemma2.planning.settings import MOST_DEVICES, mesh_of

    wanted = chips(options.chips)
    with_devices(min(math.prod(mesh_of(options.mesh)), MOST_DEVICES))
    settings = settings_of(options)
    from keras_gemma2.planning.plan import make_plan
    from keras_gemma2.planning.report import report

    print(report(make_plan(settings), wanted))
    return 0
