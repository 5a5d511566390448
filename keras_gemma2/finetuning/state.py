"""What a checkpoint holds: everything that the steps to come depend on, beside the settings and the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma2.errors import CheckpointError


def arrays_of(lm: Any) -> dict[str, np.ndarray]:
    """The values of the factors, of the optimizer (its counters and accumulated gradients too) and of seeds, by name."""
    return {name: _exact(variable) for name, variable in _variables(lm).items()}


def restore(lm: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Puts values back that `arrays_of` gave.

    Raises:
        CheckpointError: if they are those of another model or optimizer; nothing is changed then.
    """
    variables = _variables(lm)
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    found = {name: array.shape for name, array in arrays.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"The checkpoint does not fit this model: it differs in {odd[0]!r} and {len(odd) - 1} more. Was the preset changed "
            "since? Begin anew with --restart."
        )
    for name, variable in variables.items():
        variable.assign(ops.convert_to_tensor(arrays[name], variable.dtype))


def _variables(lm: Any) -> dict[str, Any]:
    seeds = [v for v in lm.non_trainable_variables if v.path.endswith("seed_generator_state")]
    groups = {"factors": lm.trainable_variables, "optimizer": lm.optimizer.variables, "seeds": seeds}
    return {f"{group}/{index}": variable for group, found in groups.items() for index, variable in enumerate(found)}


def _exact(variable: Any) -> np.ndarray:
    # numpy's files have no bfloat16; float32 holds each of its values.
    is_half = keras.backend.standardize_dtype(variable.dtype) == "bfloat16"
    return ops.convert_to_numpy(ops.cast(variable, "float32") if is_half else variable)
