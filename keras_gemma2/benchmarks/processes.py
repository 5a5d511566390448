"""Figures of fresh processes: a peak is the process's own, and nothing that ran before it counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

BACKENDS = ("jax", "tensorflow", "torch")
WIDTHS_2B = {
    "vocabulary_size": 256000,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "hidden_dim": 2304,
    "intermediate_dim": 9216,
    "head_dim": 256,
}
NARROW = {**WIDTHS_2B, "vocabulary_size": 4096, "hidden_dim": 256, "intermediate_dim": 512, "head_dim": 32}  # for --quick


def in_fresh_process(benchmark: str, backend: str, *arguments: str) -> dict[str, float]:
    """What one benchmark's child process printed last, as JSON.

    Raises:
        SystemExit: if the process failed, with what it wrote to stderr.
    """
    command = [sys.executable, "-m", "keras_gemma2.benchmarks", benchmark, *arguments]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} on {backend} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Highest resident memory of this process so far (Linux)."""
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(key):
                return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}; this measurement needs Linux.")


def reset_peak() -> None:
    """Makes `peak_bytes` count from now on (Linux, proc(5): `clear_refs`)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def rise(function: Callable[[], Any]) -> int:
    """Bytes that resident memory rises during a call, at its highest, over what it was before (Linux)."""
    before = resident_bytes()
    reset_peak()
    function()
    return peak_bytes() - before
