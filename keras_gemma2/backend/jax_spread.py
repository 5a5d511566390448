"""JAX: how what is not a weight lies on the devices of a distribution, and values that go between them and the host.

XLA derives where most of a program runs from how its arguments lie. What is said here is what it cannot know: that caches lie as
their heads do, and that what the host looks at is whole on each device.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from keras_gemma2.errors import CheckpointError, OtherProcessError, ProcessesDifferError

CACHE_RANK = 4  # [B, K, S, H]; nothing else that compiled functions of generation give has so many axes


def is_spread() -> bool:
    """Whether a distribution over several devices is set."""
    distribution = keras.distribution.distribution()
    return distribution is not None and distribution.device_mesh.devices.size > 1


def data_groups() -> int:
    """Among how many groups of devices the rows of a batch are split."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else distribution.num_model_replicas


def local_groups() -> int:
    """Among how many groups of devices the rows of a batch that this process gives are split."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else max(1, distribution.num_model_replicas // distribution.num_processes)


def empty_cache(shape: tuple[int, int, int, int], dtype: str) -> jax.Array:
    """Zeros `[B, K, S, H]`, each device with those of its rows and heads."""
    if not is_spread():
        return jnp.zeros(shape, dtype)
    sharding = _cache_sharding(shape)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def laid_out(outputs: Any) -> Any:
    """What a compiled function gives: caches where their heads are, all else whole on each device, where the host can read it."""
    if not is_spread():
        return outputs

    def place(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        return jax.lax.with_sharding_constraint(x, _cache_sharding(x.shape) if x.ndim == CACHE_RANK else _whole())

    return jax.tree.map(place, outputs)


def placed_cache(cache: jax.Array) -> jax.Array:
    """A cache within a compiled function, lying as its heads do."""
    return jax.lax.with_sharding_constraint(cache, _cache_sharding(cache.shape)) if is_spread() else cache


def in_groups(x: jax.Array, groups: int) -> jax.Array:
    """`[groups, ...]` with each group where its rows of data are."""
    if groups == 1:
        return x
    distribution = keras.distribution.distribution()
    spec = PartitionSpec(distribution.batch_dim_name)
    return jax.lax.with_sharding_constraint(x, NamedSharding(distribution.device_mesh.backend_mesh, spec))


def arguments(tree: Any) -> Any:
    """Arguments of a compiled function that every process has made alike, as arrays of all processes' devices."""
    return tree if jax.process_count() == 1 else jax.tree.map(_of_all_processes, tree)


def _of_all_processes(x: Any) -> Any:
    if not isinstance(x, jax.Array) or not x.is_fully_addressable:
        return x
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, _whole(), lambda index: array[index])


def _whole() -> NamedSharding:
    return NamedSharding(keras.distribution.distribution().device_mesh.backend_mesh, PartitionSpec())


def _cache_sharding(shape: tuple[int, ...]) -> NamedSharding:
    distribution = keras.distribution.distribution()
    mesh = distribution.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape))
    model = getattr(getattr(distribution, "_layout_map", None), "model_axis", None)
    names = distribution.batch_dim_name, model
    axes = [name if name in sizes and size % sizes[name] == 0 else None for name, size in zip(names, shape)]
    return NamedSharding(mesh.backend_mesh, PartitionSpec(*axes))


def stored_like(leaf: Any, variable: keras.Variable | None) -> Any:
    """How Orbax is to read an array: as it lies in a variable, or without one, whole on each device.

    Args:
        leaf: its metadata.
        variable: where it goes.
    """
    if not hasattr(leaf, "dtype"):
        return leaf
    if variable is not None:
        sharding = variable.value.sharding
    else:
        sharding = _whole() if is_spread() else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# Weights ----------------------------------------------------------------------------------------------------------------


def layout_of(variable: keras.Variable) -> NamedSharding | None:
    """How a variable's value lies, where that is on several devices."""
    layout = getattr(variable, "_layout", None)
    layout = getattr(layout, "backend_layout", layout)
    return layout if isinstance(layout, NamedSharding) and layout.mesh.size > 1 else None


def own_region(variable: keras.Variable) -> tuple[slice, ...] | None:
    """The part of a variable that this process's devices hold between them, a slice an axis; None for all of it."""
    sharding = layout_of(variable)
    if sharding is None or sharding.is_fully_addressable:
        return None
    shape = tuple(variable.shape)
    indices = list(sharding.addressable_devices_indices_map(shape).values())
    region = []
    for axis, size in enumerate(shape):
        bounds = [index[axis].indices(size)[:2] for index in indices]
        region.append(slice(min(start for start, _ in bounds), max(stop for _, stop in bounds)))
    return None if all(part == slice(0, size) for part, size in zip(region, shape)) else tuple(region)


def from_row_blocks(
    blocks: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding,
    region: tuple[slice, ...] | None,
    empty: Callable[[tuple[int, ...], Any], np.ndarray],
) -> jax.Array:
    """An array of several devices from consecutive blocks of rows; each device's part is gathered on the host, and no more.

    Args:
        blocks: rows of `region`.
        shape, dtype, sharding: the array's.
        region: what the blocks are of it, a slice an axis, or of its rows alone; None for all.
        empty: makes a host array to be filled.
    """
    given = region or ()
    region = (*given, *(slice(0, size) for size in shape[len(given) :]))
    held: dict[tuple, tuple[np.ndarray, list[Any]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(i.indices(size)[:2] for i, size in zip(index, shape))
        if part not in held:
            held[part] = empty(tuple(stop - start for start, stop in part), jnp.dtype(dtype)), []
        held[part][1].append(device)
    first = region[0].start
    for block in blocks:
        for part, (array, _) in held.items():
            _copy_rows(array, part, block, first, region)
        first += block.shape[0]
    arrays = [jax.device_put(array, device) for array, devices in held.values() for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _copy_rows(array: np.ndarray, part: tuple, block: np.ndarray, first: int, region: tuple[slice, ...]) -> None:
    """The rows of a block that belong to a part of the whole."""
    start, stop = max(part[0][0], first), min(part[0][1], first + block.shape[0])
    if start >= stop:
        return
    columns = tuple(slice(low - axis.start, high - axis.start) for (low, high), axis in zip(part[1:], region[1:]))
    array[start - part[0][0] : stop - part[0][0]] = block[(slice(start - first, stop - first), *columns)]


# On the process that writes: the variables' numbers by the ids of their values.
_NUMBERS: contextvars.ContextVar[dict[int, int] | None] = contextvars.ContextVar("numbers", default=None)
_DONE, _FAILED = -1, -2
_MESSAGE = 1000  # bytes of an error
_IS_TOGETHER: contextvars.ContextVar[bool] = contextvars.ContextVar("is_together", default=False)
_FAILURE = "\0"  # before the message of a process that has failed


@contextlib.contextmanager
def writing(variables: Sequence[keras.Variable]) -> Iterator[bool]:
    """A context for writing what several processes hold between them: the first writes, the others give what it asks for.

    Args:
        variables: what may be asked for, in one order on all processes.

    Yields:
        Whether this process is the one to write; the others are through with their part then.

    Raises:
        CheckpointError: on the others, if the first could not write, with its reason.
    """
    if _NUMBERS.get() is not None:  # a part of what is being written
        yield True
        return
    if all(_is_at_hand(variable.value) for variable in variables):
        yield jax.process_index() == 0
        return
    if jax.process_index():
        _give(variables)
        yield False
        return
    token = _NUMBERS.set({id(variable.value): number for number, variable in enumerate(variables)})
    try:
        yield True
    except BaseException as error:
        _said(_FAILED)
        text = f"{type(error).__name__}: {error}".encode()[:_MESSAGE]
        _broadcast(np.frombuffer(text.ljust(_MESSAGE), np.uint8))
        raise
    else:
        _said(_DONE)
    finally:
        _NUMBERS.reset(token)


def _give(variables: Sequence[keras.Variable]) -> None:
    while (number := _said(0)) >= 0:
        _from_all(variables[number].value)
    if number == _FAILED:
        reason = _broadcast(np.zeros(_MESSAGE, np.uint8)).tobytes().decode(errors="replace").strip()
        raise CheckpointError(f"The first process could not write, so nothing was written. {reason}")


def _said(number: int) -> int:
    """The number of the first process, whatever this process's is."""
    return int(_broadcast(np.int32(number)))


def _broadcast(array: Any) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _from_all(tensor: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(tensor, tiled=True))


def _is_at_hand(tensor: jax.Array) -> bool:
    return tensor.is_fully_addressable or tensor.is_fully_replicated


def check_alike(text: str, rule: str = "make the same model, with the same versions") -> None:
    """Compares a text on all processes.

    Args:
        text: what must be the same.
        rule: what all processes must do, for the error.

    Raises:
        ValueError: on each of them if it is not the same on all, with this one's and the first's.
        CheckpointError: if another has failed, within `together`.
    """
    if jax.process_count() == 1:
        return
    every = _told(text)
    others = [index for index, one in enumerate(every) if one != every[0]]
    if others:
        index = jax.process_index()
        shown = others[0] if index == 0 else index
        raise ProcessesDifferError(
            f"All processes must {rule}. Those of index {others} differ from the first, which has {every[0]}; "
            f"{shown} has {every[shown]}."
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context for what all processes do, each its part: where one fails, the others raise, too, and none waits for it.

    Nothing within it may need another process but `check_alike`.

    Raises:
        CheckpointError: on the others, with the reason of the first that failed.
    """
    if jax.process_count() == 1 or not is_spread() or _IS_TOGETHER.get():
        yield
        return
    token = _IS_TOGETHER.set(True)
    try:
        yield
    except (ProcessesDifferError, OtherProcessError):
        raise
    except Exception as error:
        _tell(f"{_FAILURE}{type(error).__name__}: {error}")
        raise
    finally:
        _IS_TOGETHER.reset(token)
    _told("")


def _told(text: str) -> list[str]:
    """Each process's text.

    Raises:
        CheckpointError: if one of them is a failure.
    """
    every = _tell(text)
    failed = [index for index, one in enumerate(every) if one.startswith(_FAILURE)]
    if failed:
        raise OtherProcessError(f"Process {failed[0]} of {len(every)} has failed: {every[failed[0]].removeprefix(_FAILURE)}")
    return every


def _tell(text: str) -> list[str]:
    own = np.frombuffer(text.encode()[:_MESSAGE].ljust(_MESSAGE), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own))
    return [row.tobytes().decode(errors="replace").strip(" ") for row in every]


def gathered(tensor: jax.Array) -> np.ndarray:
    """All of an array as numpy's; of one that several processes hold between them within `writing`.

    Raises:
        RuntimeError: outside of it.
    """
    if _is_at_hand(tensor):
        return np.asarray(tensor)
    numbers = _NUMBERS.get()
    if numbers is None or id(tensor) not in numbers:
        raise RuntimeError("Several processes hold this value between them: only `save_to_preset` and its like put it together.")
    _said(numbers[id(tensor)])
    return _from_all(tensor)
