"""The arrays of an Orbax checkpoint, opened by tensorstore: zarr, as plain files or in one OCDBT database.

tensorstore reads checkpoints of any age without jax, and without unpickling anything. One tensor's chunks are in memory at
a time. Formats: https://orbax.readthedocs.io (checkpoint format guide), https://google.github.io/tensorstore (zarr, ocdbt).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from keras_gemma2.checkpoints.source import find_file, read_json
from keras_gemma2.errors import CheckpointError

DATABASE_FILE = "manifest.ocdbt"
TREE_FILE = "_METADATA"
ARRAY_FILES = {".zarray": "zarr", "zarr.json": "zarr3"}
DTYPES = ("float64", "float32", "float16", "bfloat16")


class OrbaxTensor:
    """An array of a checkpoint; slicing reads the chunks it needs.

    Args:
        reader: of the checkpoint.
        spec: the array's, for tensorstore.
        name: for messages.
        shape: the array's.
        dtype: the array's.
    """

    def __init__(self, reader: _ChunkReader, spec: dict[str, Any], name: str, shape: tuple[int, ...], dtype: Any) -> None:
        self._reader, self._spec, self._name = reader, spec, name
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, index: Any) -> Any:
        return self._reader.read(self._name, self._spec, math.prod(self.shape) * self.dtype.itemsize, index)


class _ChunkReader:
    """Keeps the decoded chunks of the tensor that was read last: blocks of rows are smaller than chunks."""

    def __init__(self, folder: str) -> None:
        self._folder, self._name, self._array = folder, "", None

    def read(self, name: str, spec: dict[str, Any], nbytes: int, index: Any) -> Any:
        with _errors_of_tensorstore(self._folder, name):
            if name != self._name:
                self._array = None  # frees the chunks of the tensor before
                self._name, self._array = name, _open(spec, nbytes + (1 << 20)).result()
            return self._array[index].read().result()

    def close(self) -> None:
        """Frees the memory."""
        self._name, self._array = "", None


def open_arrays(folder: str, named: Callable[[str], str], stack: contextlib.ExitStack) -> dict[str, OrbaxTensor]:
    """Lazy tensors of a checkpoint; nothing but the arrays' headers is read.

    Args:
        folder: the checkpoint's.
        named: makes the name to give an array out of its stored one.
        stack: a `contextlib.ExitStack` that frees the memory.

    Raises:
        CheckpointError: if the files are damaged, or of dtypes that no weight has.
    """
    specs = _array_specs(folder, named)
    reader = _ChunkReader(folder)
    stack.callback(reader.close)
    with _errors_of_tensorstore(folder, "an array"):
        opening = {name: _open(spec, 0) for name, spec in specs.items()}
        arrays = {name: future.result() for name, future in opening.items()}
    for name, array in arrays.items():
        _check_array(folder, name, array)
    return {name: OrbaxTensor(reader, specs[name], name, tuple(a.shape), a.dtype.numpy_dtype) for name, a in arrays.items()}


def _array_specs(folder: str, named: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """What tensorstore needs to open each array, by name."""
    store = {"driver": "file", "path": os.path.join(os.path.abspath(folder), "")}
    if find_file(folder, DATABASE_FILE):
        store = {"driver": "ocdbt", "base": store}
    zeros_are_stored = _zeros_are_stored(folder)
    specs: dict[str, dict[str, Any]] = {}
    for key in _keys(folder, store):
        stored, _, file = key.rpartition("/")
        if file not in ARRAY_FILES:
            continue
        name = named(stored)
        if name in specs:
            raise CheckpointError(f"Two arrays of {folder} stand for {name!r}.")
        # A missing chunk stands for zeros where those are not stored; a norm that was never trained is all zeros.
        fill = not zeros_are_stored and name.endswith("/scale")
        kvstore = {**store, "path": store.get("path", "") + stored + "/"}
        specs[name] = {
            "driver": ARRAY_FILES[file],
            "kvstore": kvstore,
            "fill_missing_data_reads": fill,
            "recheck_cached_data": "open",
        }
    if not specs:
        raise CheckpointError(f"{folder} looks like a Flax checkpoint, but there are no arrays in it. Download it again.")
    return specs


def _keys(folder: str, store: dict[str, Any]) -> list[str]:
    tensorstore = _tensorstore(folder)
    with _errors_of_tensorstore(folder, "the list of arrays"):
        return [key.decode("utf-8") for key in tensorstore.KvStore.open(store).result().list().result()]


def _zeros_are_stored(folder: str) -> bool:
    tree = find_file(folder, TREE_FILE)
    return tree is not None and read_json(tree).get("store_array_data_equal_to_fill_value") is True


def _check_array(folder: str, name: str, array: Any) -> None:
    if array.dtype.numpy_dtype.name not in DTYPES:
        raise CheckpointError(f"The array {name!r} of {folder} has dtype {array.dtype.name}; those read are {', '.join(DTYPES)}.")
    chunk = array.chunk_layout.read_chunk.shape or ()
    if any(size > whole for size, whole in zip(chunk, array.shape)):
        raise CheckpointError(
            f"The array {name!r} of {folder} has chunks {tuple(chunk)} larger than its shape {tuple(array.shape)}."
        )


# tensorstore ----------------------------------------------------------------------------------------------------------


def _tensorstore(folder: str) -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is a Flax checkpoint, and reading it needs tensorstore: pip install orbax-checkpoint (or tensorstore alone)."
        ) from error
    return tensorstore


def _open(spec: dict[str, Any], cache_bytes: int) -> Any:
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    return tensorstore.open(spec, open=True, read=True, context=context)


@contextlib.contextmanager
def _errors_of_tensorstore(folder: str, what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # tensorstore gives the many codes of absl as many types of exceptions
        reason = str(error).partition(" [")[0][:300]
        raise CheckpointError(f"{what} of {folder} cannot be read ({reason}). Download the checkpoint again.") from error
