"""A step of a model as StableHLO, by `jax.export`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax import export
from safetensors.numpy import save_file

PLATFORMS = ("cpu", "cuda", "tpu")


def save_stablehlo(step: Callable, model: Any, caches: Sequence[Any], context: int, folder: str, weights_file: str) -> None:
    """Writes `model.stablehlo`, for CPUs, GPUs and TPUs, and beside it, as safetensors, the weights: its first argument.

    Args:
        step: `(token_ids, starts, counts, caches)` to logits and the caches.
        model: the layer whose variables it uses.
        caches: for each cache `(name, heads, width, most_slots, dtype)`, keys and values by turns.
        context: most tokens of a call.
        folder: to write to.
        weights_file: the name of the second file.
    """
    variables = model.variables

    def run(weights: dict[str, Any], token_ids: Any, starts: Any, counts: Any, caches: list[Any]) -> Any:
        with keras.StatelessScope(state_mapping=[(variable, weights[variable.path]) for variable in variables]):
            logits, *caches = step(token_ids, starts, counts, caches)
        return logits, caches

    with _without_paths():
        program = export.export(jax.jit(run, donate_argnums=4), platforms=PLATFORMS)(*_specs(variables, caches, context))
    with open(os.path.join(folder, "model.stablehlo"), "wb") as file:
        file.write(program.serialize())
    save_file({variable.path: np.asarray(variable.value) for variable in variables}, os.path.join(folder, weights_file))


def _specs(variables: Sequence[Any], caches: Sequence[Any], context: int) -> tuple:
    """Shapes and dtypes of the arguments; batch, steps and slots are free."""
    slots = sorted({most for *_, most, _ in caches})
    limits = [f"steps <= {context}", *(f"slots_{most} <= {most}" for most in slots), *(f"slots_{most} >= 2" for most in slots)]
    free = export.symbolic_shape(", ".join(["batch", "steps", *(f"slots_{most}" for most in slots)]), constraints=limits)
    batch, steps, sizes = free[0], free[1], dict(zip(slots, free[2:]))
    spec = jax.ShapeDtypeStruct
    weights = {variable.path: spec(variable.shape, variable.value.dtype) for variable in variables}
    each = spec((batch,), "int32")
    held = [spec((batch, heads, sizes[most], width), dtype) for _, heads, width, most, dtype in caches]
    return weights, spec((batch, steps), "int32"), each, each, held


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """A context in which no program says in whose files its operations stand."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*")
    try:
        yield
    finally:
        jax.config.update(name, before)
