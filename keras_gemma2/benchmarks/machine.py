"""What the machine allows: how fast its memory is read, and how fast it multiplies float32 matrices."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

HOST_BYTES, DEVICE_BYTES = 1 << 30, 8 << 30  # far over any cache; on an accelerator, far over the time of a call too
HOST_SIDE, DEVICE_SIDE = 4096, 16384
PASSES = 10


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def repeated(function: Callable[[], Any], times: int) -> float:
    """Median wall time of some calls."""
    return statistics.median(seconds(function) for _ in range(times))


def has_accelerator() -> bool:
    """Whether NVIDIA's driver is at hand; asks no backend."""
    return shutil.which("nvidia-smi") is not None


def device_name() -> str:
    """The accelerator's name, or the number of CPU cores and the processor's name."""
    if has_accelerator():
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else 'a CPU'}"


def host_read_rate(nbytes: int = HOST_BYTES) -> float:
    """Bytes a second at which all cores together read memory: the greatest element, the best of several passes.

    The maximum is numpy's fastest reduction of float32; a thread reads its own part.
    """
    threads = os.cpu_count() or 1
    parts = np.ones((threads, nbytes // 4 // threads), np.float32)
    with ThreadPoolExecutor(threads) as pool:
        return parts.nbytes / min(seconds(lambda: list(pool.map(np.max, parts))) for _ in range(PASSES))


def limits(nbytes: int | None = None, side: int | None = None) -> dict[str, float]:
    """Measures where the running backend computes; on a CPU, numpy too, and the better of both counts.

    Args:
        nbytes: to read; by default 1 GiB, and 8 on an accelerator.
        side: of the square float32 matrices to multiply.

    Returns:
        `read`, bytes a second, and `product`, floating point operations a second.
    """
    from keras import ops

    on_host = "cpu" in str(ops.zeros(1).device).lower()
    side = side or (HOST_SIDE if on_host else DEVICE_SIDE)
    read = _read_rate(nbytes or (HOST_BYTES if on_host else DEVICE_BYTES))
    matrix = np.random.default_rng(0).standard_normal((side, side), np.float32)
    tensor = ops.convert_to_tensor(matrix)
    # One element is copied out: the product has to be done by then.
    times = [seconds(lambda: ops.convert_to_numpy(ops.matmul(tensor, tensor)[0, 0])) for _ in range(3)]
    if on_host:
        times += [seconds(lambda: matrix @ matrix) for _ in range(3)]
        read = max(read, host_read_rate(nbytes or HOST_BYTES))
    return {"read": read, "product": 2 * side**3 / min(times)}


def _read_rate(nbytes: int) -> float:
    from keras import ops

    vector = ops.ones(nbytes // 4, "float32")
    return nbytes / min(seconds(lambda: ops.convert_to_numpy(ops.max(vector))) for _ in range(PASSES))


def _cpuinfo() -> list[str]:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return file.read().splitlines()
