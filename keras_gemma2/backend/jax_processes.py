"""JAX: this process as one of several that hold a model between them."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
from keras.src.backend.jax.distribution_lib import initialize_rng

ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"  # Keras's own variables, as `keras.distribution.initialize` reads them
COUNT, INDEX = "KERAS_DISTRIBUTION_NUM_PROCESSES", "KERAS_DISTRIBUTION_PROCESS_ID"


def join_processes(timeout: float) -> None:
    """See `keras_gemma2.processes.join_processes`."""
    if not jax.distributed.is_initialized():
        given = _given()
        try:
            jax.distributed.initialize(**given, heartbeat_timeout_seconds=math.ceil(timeout))
        except ValueError as error:
            if given:
                raise
            raise RuntimeError(
                f"Several processes are to be joined, and nothing says where they are ({error}). Set {ADDRESSES} (host:port of the "
                f"first), {COUNT} and {INDEX} in each. On Cloud TPUs, with Slurm and Open MPI, and on Kubernetes with the Python "
                "package kubernetes, JAX finds them itself."
            ) from error
    initialize_rng()  # as `keras.distribution.initialize`: what is drawn must be the same in all processes


def _given() -> dict[str, Any]:
    """What Keras's variables say; nothing where there are none."""
    set_here = [name for name in (ADDRESSES, COUNT, INDEX) if name in os.environ]
    if not set_here:
        return {}
    if len(set_here) < 3:
        missing = [name for name in (ADDRESSES, COUNT, INDEX) if name not in os.environ]
        raise RuntimeError(f"{' and '.join(set_here)} are set for several processes, {' and '.join(missing)} not: set all three.")
    count, index = _number(COUNT), _number(INDEX)
    if not 0 <= index < count:
        raise RuntimeError(f"{INDEX} must be from 0 to {COUNT} - 1. Received: {index}, of {count} processes.")
    return {"coordinator_address": os.environ[ADDRESSES].split(",")[0], "num_processes": count, "process_id": index}


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise RuntimeError(f"{name} must be a whole number. Received: {os.environ[name]!r}.") from error
