"""JAX: steps compiled from shapes alone, for the devices of a distribution; nothing is allocated.

Models are made inside a `keras.StatelessScope`, where Keras puts off giving variables values. A step is then traced with stand-ins
in their place, which carry shapes, dtypes and how they lie on the devices (https://docs.jax.dev/en/latest/aot.html).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras
from jax.sharding import NamedSharding, PartitionSpec
from keras.src.backend.common import global_state

from keras_gemma2.backend import jax_spread, jax_steps


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Args:
        text: of its program on one device.
        arguments, outputs, reused, temporary: bytes a device, of what it is given, of what it gives, of what it gives in the memory
            of what it is given, and of what it holds besides.
        seconds: that compiling took.
    """

    text: str
    arguments: int
    outputs: int
    reused: int
    temporary: int
    seconds: float


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """A context in which variables that are made have shapes and dtypes, and never get values."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:  # Keras would give them values at the end of the next such scope
        global_state.set_global_attribute("uninitialized_variables", [])


def lay_out(variables: Sequence[keras.Variable]) -> None:
    """Tells variables how they lie: Keras asks that only once they get values."""
    for variable in variables:
        if variable._layout is None:
            variable._layout = keras.distribution.distribution().get_variable_layout(variable)


def device_bytes(variables: Sequence[keras.Variable]) -> int:
    """Bytes of some variables on one device."""
    return sum(_bytes_of(value) for value in _stand_ins(variables))


def _bytes_of(value: jax.ShapeDtypeStruct) -> int:
    size = value.dtype.itemsize
    for extent in value.sharding.shard_shape(value.shape):
        size *= extent
    return size


# What stands in for values ----------------------------------------------------------------------------------------------


def _stand_ins(variables: Sequence[keras.Variable]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(tuple(v.shape), v.dtype, sharding=jax_spread.layout_of(v) or _lying()) for v in variables]


def _lying(*axes: str | None) -> NamedSharding:
    """A layout on the mesh; without axes, whole on each device."""
    return NamedSharding(keras.distribution.distribution().device_mesh.backend_mesh, PartitionSpec(*axes))


def rows_of_data(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    """An array of a batch, whose rows are split."""
    divides = shape[0] % jax_spread.data_groups() == 0
    axis = keras.distribution.distribution().batch_dim_name if divides else None
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_lying(axis))


def host_array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    """An array that the host gives to each device."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_lying())


def cache(shape: tuple[int, int, int, int], dtype: str) -> jax.ShapeDtypeStruct:
    """A cache, lying where its heads are."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax_spread._cache_sharding(shape))


def cache_bytes(caches: Any) -> int:
    """Bytes of caches on one device."""
    return sum(map(_bytes_of, jax.tree.leaves(caches)))


# Programs ---------------------------------------------------------------------------------------------------------------


def compiled_function(function: Callable, variables: list[keras.Variable], donated: Any, *arguments: Any) -> Compiled:
    """`function(donated, *arguments)`, which reads variables, compiled as `backend.compile_function` would."""

    def stateless(values: list[jax.Array], donated: Any, *arguments: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return jax_spread.laid_out(function(donated, *arguments))

    return _compiled(jax.jit(stateless, donate_argnums=1), None, _stand_ins(variables), donated, *arguments)


def compiled_training(model: Any, batch: Any) -> Compiled:
    """A model's training step, compiled as Keras does where there is a distribution, but that CPUs keep memory low, too."""
    parts = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, model.metrics_variables)
    state = tuple(_stand_ins(variables) for variables in parts)
    shardings = jax.tree.map(lambda value: value.sharding, state)
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
    return _compiled(step, jax_steps._compiler_options(), state, batch)


def compiled_gradient(function: Callable, variables: list[keras.Variable], *arguments: Any) -> Compiled:
    """`function(*arguments)`, a scalar, which reads variables, and its gradient with respect to the first argument."""

    def stateless(values: list[jax.Array], *arguments: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return jax.value_and_grad(function)(*arguments)

    return _compiled(jax.jit(stateless), jax_steps._compiler_options(), _stand_ins(variables), *arguments)


def _compiled(function: Any, options: dict[str, str] | None, *arguments: Any) -> Compiled:
    start = time.perf_counter()
    program = function.lower(*arguments).compile(compiler_options=options)
    memory = program.memory_analysis()
    return Compiled(
        program.as_text(),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        time.perf_counter() - start,
    )
