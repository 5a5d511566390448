"""The weights of a Keras preset: `model.weights.h5`, or `model.weights.json` and the files it names; read and written.

Format: `keras.Model.save_weights` of Keras 3 (`keras/src/saving/saving_lib.py`, `H5IOStore` and `ShardedH5IOStore`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_gemma2.checkpoints.h5_file import BFLOAT16, H5Tensor, LastTensor, open_h5
from keras_gemma2.checkpoints.source import file_inside, find_file, read_json, unfinished_download
from keras_gemma2.errors import CheckpointError, MissingFileError

WEIGHTS_FILE = "model.weights.h5"
INDEX_FILE = "model.weights.json"
SHARD_FILE = "model_{:05}.weights.h5"
GIGABYTE = 1 << 30  # what Keras counts `max_shard_size` in
_UNITS = {"": GIGABYTE, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

# Name, shape, dtype and consecutive rows in that dtype.
OutgoingTensor = tuple[str, tuple[int, ...], np.dtype, Iterator[np.ndarray]]


def open_weight_files(folder: str, stack: contextlib.ExitStack) -> dict[str, H5Tensor]:
    """Lazy tensors of every weight of a preset's folder, by path (`layers/.../vars/0`).

    Args:
        folder: the preset's.
        stack: closes the files.

    Raises:
        MissingFileError: if a file is not there.
        CheckpointError: for files that are damaged or hold one weight twice, or an index that names other places.
    """
    tensors: dict[str, H5Tensor] = {}
    last = LastTensor()
    for path in _weight_files(folder):
        for name, tensor in open_h5(path, stack, last).items():
            if name in tensors:
                raise CheckpointError(f"The weight {name!r} stands in two files of {folder}. Save the preset again.")
            tensors[name] = tensor
    return tensors


def _weight_files(folder: str) -> list[str]:
    single = find_file(folder, WEIGHTS_FILE)
    if single is not None:  # keras-hub, too, takes it before the index
        return [single]
    index = find_file(folder, INDEX_FILE)
    if index is None:
        raise MissingFileError(
            f"No {WEIGHTS_FILE} and no {INDEX_FILE} in {folder}. Download the weights.{unfinished_download(folder)}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must hold a `weight_map` from weights to files. Download it again.")
    names: dict[str, None] = {}
    for value in weight_map.values():  # a weight's variables may be spread over several files
        for name in value if isinstance(value, list) else [value]:
            names[name if isinstance(name, str) else repr(name)] = None
    return [file_inside(folder, name, index) for name in sorted(names)]


# Writing ----------------------------------------------------------------------------------------------------------------


def shard_bytes(max_shard_size: str | float | None) -> float:
    """A shard's largest size in bytes.

    Args:
        max_shard_size: a number of gigabytes of 1024 ** 3 bytes, as Keras takes it; a text such as "5GB" or "500MB", as
            Hugging Face takes it; or None for one file.

    Raises:
        ValueError: for anything else.
    """
    if max_shard_size is None:
        return math.inf
    parts = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?B)?\s*", str(max_shard_size).upper())
    if isinstance(max_shard_size, bool) or (not parts and not isinstance(max_shard_size, (int, float))):
        raise ValueError(f"`max_shard_size` must be a number of GB, or a text such as '5GB'. Received: {max_shard_size!r}.")
    size = float(parts[1]) * _UNITS[parts[2] or ""] if parts else float(max_shard_size) * GIGABYTE
    if not size > 0:
        raise ValueError(f"`max_shard_size` must be positive. Received: {max_shard_size!r}.")
    return size


def keras_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which Keras saves them: layers as the model runs through them, by name within a layer."""

    def key(name: str) -> tuple[int, int, str]:
        layer, _, rest = name.removeprefix("layers/").partition("/")
        number = re.search(r"decoder_block(?:_(\d+))?$", layer)
        if number is None:
            return (0 if "embedding" in layer else 2, 0, name)
        return (1, int(number[1] or 0), rest)

    return sorted(names, key=key)


def write_weight_files(
    folder: str,
    tensors: Iterable[OutgoingTensor],
    total_bytes: int,
    max_shard_size: str | float | None = None,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Writes a preset's weights as Keras does, one tensor after another, in blocks of rows.

    Args:
        folder: the preset's; none of the files may exist in it.
        tensors: in the order of `keras_order`.
        total_bytes: the size of all of them.
        max_shard_size: see `shard_bytes`; files are split where a weight would not fit any more.
        progress: called with the number of bytes just written.

    Raises:
        CheckpointError: if one weight alone is larger than a shard may be.
    """
    limit = shard_bytes(max_shard_size)
    with contextlib.ExitStack() as stack:
        if total_bytes <= limit:
            file = _new_file(os.path.join(folder, WEIGHTS_FILE), stack)
            for name, shape, dtype, blocks in tensors:
                _write_tensor(file, name, shape, dtype, blocks, progress)
            return
        weight_map, size, file, shards = {}, math.inf, None, 0
        for name, shape, dtype, blocks in tensors:
            count = math.prod(shape) * dtype.itemsize
            if count > limit:
                raise CheckpointError(
                    f"The weight {name!r} has {count} bytes, more than the {int(limit)} of `max_shard_size`. Pass a larger one."
                )
            if size + count > limit:
                stack.close()
                shard, size, shards = SHARD_FILE.format(shards), 0, shards + 1
                file = _new_file(os.path.join(folder, shard), stack)
            size += count
            _write_tensor(file, name, shape, dtype, blocks, progress)
            weight_map["/" + name.rpartition("/")[0]] = shard
    index = {"metadata": {"total_size": float(total_bytes)}, "weight_map": weight_map}
    with open(os.path.join(folder, INDEX_FILE), "x", encoding="utf-8") as text:
        text.write(json.dumps(index, indent=4))


def _new_file(path: str, stack: contextlib.ExitStack) -> Any:
    import h5py

    return stack.enter_context(h5py.File(path, "x"))


def _write_tensor(
    file: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    blocks: Iterator[np.ndarray],
    progress: Callable[[int], Any] | None,
) -> None:
    dataset, start = file.create_dataset(name, shape, dtype), 0
    if dtype == BFLOAT16:  # HDF5 knows it as two opaque bytes
        dataset.attrs["dtype"] = "bfloat16"
    for block in blocks:
        dataset[start : start + len(block)] = block
        start += len(block)
        if progress is not None:
            progress(block.nbytes)
