"""JAX: this process as one of several that hold a model between them."""

from __future__ import annotations

import math
import os

import jax

ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"  # Keras's own variables, as `keras.distribution.initialize` reads them
COUNT, INDEX = "KERAS_DISTRIBUTION_NUM_PROCESSES", "KERAS_DISTRIBUTION_PROCESS_ID"


def join_processes(timeout: float) -> None:
    """See `keras_gemma2.processes.join_processes`."""
    if jax.distributed.is_initialized():
        return
    set_here = [name for name in (ADDRESSES, COUNT, INDEX) if name in os.environ]
    if set_here and len(set_here) < 3:
        missing = [name for name in (ADDRESSES, COUNT, INDEX) if name not in os.environ]
        raise RuntimeError(f"{' and '.join(set_here)} are set for several processes, {' and '.join(missing)} not: set all three.")
    given = {}
    if set_here:
        given = {"coordinator_address": os.environ[ADDRESSES].split(",")[0]}
        given |= {"num_processes": _number(COUNT), "process_id": _number(INDEX)}
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=math.ceil(timeout))
    except ValueError as error:  # JAX has found no launcher that it knows
        raise RuntimeError(
            f"Several processes are to be joined, and nothing says where they are ({error}). Set {ADDRESSES} (host:port of the "
            f"first), {COUNT} and {INDEX} in each; on Cloud TPUs, Slurm, Open MPI and Kubernetes JAX finds them itself."
        ) from error


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise RuntimeError(f"{name} must be a whole number. Received: {os.environ[name]!r}.") from error
