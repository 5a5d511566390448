"""Time and peak memory of building a randomly initialized backbone, ours beside keras-hub's.

Gemma 2 2B's widths with few layers, so that it fits a small machine. Each figure comes from a fresh process.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

from keras_gemma2.benchmarks.processes import BACKENDS, WIDTHS_2B, in_fresh_process, peak_bytes, resident_bytes


def add_command(commands: Any) -> None:
    """Adds `build` to the program's commands."""
    parser = commands.add_parser("build", help="time and peak memory of building the backbone", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all three")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure keras-hub too")
    parser.add_argument("--child", choices=("ours", "keras_hub"), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints a table with one row a backend and package."""
    if options.child:
        print(json.dumps(measure(options.child, options.layers, options.dtype)))
        return
    print(f"Gemma 2 2B's widths, {options.layers} layers, {options.dtype}, random weights; GB above the imports\n")
    print("| backbone | backend | weights, GB | peak, GB | peak / weights | seconds |")
    print("|---|---|---|---|---|---|")
    for backend in options.backend or BACKENDS:
        for who in ("ours", "keras_hub") if options.peer else ("ours",):
            row = in_fresh_process(
                "build", backend, "--child", who, "--layers", str(options.layers), "--dtype", options.dtype
            )
            ratio = row["peak"] / row["weights"]
            print(
                f"| {who} | {backend} | {row['weights'] / 1e9:.2f} | {row['peak'] / 1e9:.2f} | {ratio:.2f} "
                f"| {row['seconds']:.1f} |",
                flush=True,
            )


def measure(who: str, layers: int, dtype: str) -> dict[str, float]:
    """Builds one backbone in this process.

    Returns:
        `weights` and `peak`, in bytes (peak: highest resident memory, less that after imports), and `seconds`.
    """
    make = _ours if who == "ours" else _keras_hub
    build, numbers = make(), {**WIDTHS_2B, "num_layers": layers, "dtype": dtype}
    before, start = resident_bytes(), time.perf_counter()
    backbone = build(**numbers)
    seconds = time.perf_counter() - start
    weights = sum(math.prod(v.shape) for v in backbone.weights)
    itemsize = 4 if dtype.startswith(("float32", "mixed")) else 2
    return {"weights": float(weights * itemsize), "peak": float(peak_bytes() - before), "seconds": seconds}


def _ours() -> Any:
    import keras

    from keras_gemma2 import Gemma2Backbone

    keras.ops.zeros(1)  # the backend's own start-up belongs to the imports
    return Gemma2Backbone


def _keras_hub() -> Any:
    import keras
    import keras_hub

    keras.ops.zeros(1)

    def build(intermediate_dim: int, **numbers: Any) -> Any:
        # keras-hub counts both gates in intermediate_dim.
        return keras_hub.models.GemmaBackbone(
            intermediate_dim=2 * intermediate_dim,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            attention_logit_soft_cap=50,
            final_logit_soft_cap=30,
            use_sliding_window_attention=True,
            **numbers,
        )

    return build
