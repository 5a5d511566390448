"""One `.weights.h5` file of Keras, read in slices.

Reading does not go through the HDF5 library: its parser, in C, has a record of memory errors on crafted files, and checkpoints
come from strangers. What Keras writes is a small part of the format: groups with symbol tables, and datasets in one piece,
uncompressed. That part is read here in full; everything else (links, virtual and external data, chunks, filters) is refused
by name, so nothing outside the file can be reached and nothing larger than it is allocated.
Format: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html (HDF5 File Format Specification, version 3.0).
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from keras_gemma2.checkpoints.file_rows import columns_of, read_rows
from keras_gemma2.checkpoints.source import refuse_lfs_pointer
from keras_gemma2.errors import CheckpointError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Far above what Keras writes, and low enough that no file makes this reader work for long.
LARGEST_HEADER = 1 << 16  # bytes of an object's header, or of the names in a group
MOST_OBJECTS = 100_000
MOST_GROUPS_DEEP = 16
MOST_TREE_LEVELS = 8
DATASPACE, DATATYPE, EXTERNAL_FILES, LAYOUT, ATTRIBUTE, CONTINUATION, SYMBOL_TABLE = 1, 3, 7, 8, 12, 16, 17
LINK_MESSAGES = (2, 6)  # groups of the newer layout
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Bit widths of exponent and fraction.
FLOATS = {(8, 23): np.dtype("<f4"), (5, 10): np.dtype("<f2"), (11, 52): np.dtype("<f8"), (8, 7): BFLOAT16}
MEND = "Download it again, or load it with Keras and save it again."


class LastTensor:
    """Holds one whole tensor at most: slices across rows come in sweeps over one tensor after another."""

    def __init__(self) -> None:
        self._tensor: H5Tensor | None = None
        self._array: np.ndarray | None = None

    def whole(self, tensor: H5Tensor) -> np.ndarray:
        """All of a tensor, read once for each sweep."""
        if self._tensor is not tensor:
            self._tensor = self._array = None  # the old one goes before the new one comes
            self._array = tensor.rows(0, tensor.shape[0])
            self._tensor = tensor
        return self._array


class H5Tensor:
    """A dataset in a file; slicing along the first axis reads the rows asked for, along another one the whole tensor once.

    Args:
        file: an open file descriptor.
        path: the file's, for messages.
        offset: where its data starts, in bytes.
        shape: the tensor's.
        dtype: the tensor's.
        last: shared by the tensors that are read after one another.
    """

    def __init__(self, file: int, path: str, offset: int, shape: tuple[int, ...], dtype: np.dtype, last: LastTensor) -> None:
        self._file, self._path, self.offset, self._last = file, path, offset, last
        self.shape, self.dtype = shape, dtype

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if all(range(size)[item] == range(size) for item, size in zip(index[1:], self.shape[1:])):
            rows = range(self.shape[0])[index[0]]
            return self.rows(rows.start, rows.stop)
        rows = range(self.shape[0])[index[0]]
        if columns := columns_of(index, self.shape):
            return read_rows(self._file, self._path, self.offset, self.shape, self.dtype, rows.start, rows.stop, columns)
        return self._last.whole(self)[index]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Consecutive rows, as a new array."""
        return read_rows(self._file, self._path, self.offset, self.shape, self.dtype, start, stop)


def open_h5(path: str, stack: contextlib.ExitStack, last: LastTensor | None = None) -> dict[str, H5Tensor]:
    """Every dataset of a file by its path; nothing but their descriptions is read. States of random seeds are left out.

    Args:
        path: the file.
        stack: closes it.
        last: where a whole tensor is kept for slices across rows; pass one for all files of a checkpoint.

    Raises:
        CheckpointError: for a file that is damaged, or holds something that Keras does not write.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        return _Reader(descriptor, path, last or LastTensor()).tensors()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete HDF5 file ({error}). {MEND}") from error


class _Reader:
    """Walks through the groups of one file. Every address is visited once, so that the work is bounded by the file's size."""

    def __init__(self, file: int, path: str, last: LastTensor) -> None:
        self.file, self.path, self.last = file, path, last
        self.size = os.fstat(file).st_size
        self.visited: set[int] = set()
        self.found: dict[str, H5Tensor] = {}

    def tensors(self) -> dict[str, H5Tensor]:
        refuse_lfs_pointer(self.path)
        head = self.read(0, 96)
        if not head.startswith(SIGNATURE):
            raise self.error("is not an HDF5 file")
        if head[8] != 0 or head[13:15] != b"\x08\x08" or head[24:32] != bytes(8):
            raise self.error("is an HDF5 file in another layout than Keras writes (superblock version 0)")
        (end,) = struct.unpack_from("<Q", head, 40)
        if end > self.size:
            raise self.error(f"should have {end} bytes and has {self.size}: it is truncated")
        self.group("", struct.unpack_from("<Q", head, 64)[0], 0)
        self.check_overlaps()
        return self.found

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}. {MEND}")

    def read(self, address: int, count: int) -> bytes:
        if address + count > self.size:
            raise self.error(f"is damaged: it points to byte {address + count} of {self.size}")
        return os.pread(self.file, count, address)

    def visit(self, address: int) -> None:
        if address in self.visited:
            raise self.error(f"is damaged: what stands at byte {address} is used twice")
        if len(self.visited) == MOST_OBJECTS:
            raise self.error(f"holds more than {MOST_OBJECTS} objects")
        self.visited.add(address)

    # Groups -------------------------------------------------------------------------------------------------------------

    def group(self, name: str, address: int, depth: int) -> None:
        if depth > MOST_GROUPS_DEEP:
            raise self.error(f"nests groups more than {MOST_GROUPS_DEEP} deep")
        messages = self.messages(address)
        kinds = {kind for kind, _, _ in messages}
        if SYMBOL_TABLE in kinds:
            tree, heap = struct.unpack_from("<QQ", next(data for kind, data, _ in messages if kind == SYMBOL_TABLE))
            for link, child in self.links(tree, heap, name):
                self.group(f"{name}/{link}" if name else link, child, depth + 1)
        elif kinds & set(LINK_MESSAGES):
            raise self.error(f"holds the group {name!r} in another layout than Keras writes (new-style links)")
        elif LAYOUT in kinds:
            if "/seed_generator/" not in name:
                self.found[name] = self.dataset(name, messages)
        else:
            raise self.error(f"holds {name!r}, which is neither a group nor a dataset")

    def links(self, tree: int, heap: int, name: str) -> Iterator[tuple[str, int]]:
        head = self.read(heap, 32)
        size, _, address = struct.unpack_from("<QQQ", head, 8)
        if head[:4] != b"HEAP" or size > LARGEST_HEADER:
            raise self.error(f"is damaged: the names in the group {name!r} are not where they should be")
        names = self.read(address, size)
        for entry in self.entries(tree, None, name):
            start, child, kind = struct.unpack_from("<QQI", entry)
            if kind == 2:
                raise self.error(f"holds a soft link in the group {name!r}, which Keras does not write")
            end = names.find(b"\0", start)
            link = names[start:end].decode("utf-8")
            if end < 0 or not link or "/" in link:
                raise self.error(f"is damaged: a name in the group {name!r} is {link!r}")
            yield link, child

    def entries(self, node: int, level: int | None, name: str) -> Iterator[bytes]:
        """The symbol table entries below a node of a B-tree."""
        self.visit(node)
        head = self.read(node, 8)
        if head[:4] == b"SNOD" and level in (None, -1):
            count = int.from_bytes(head[6:8], "little")
            table = self.read(node + 8, 40 * count)
            yield from (table[i : i + 40] for i in range(0, len(table), 40))
        elif head[:5] == b"TREE\0" and head[5] <= MOST_TREE_LEVELS and level in (None, head[5]):
            count = int.from_bytes(head[6:8], "little")
            keys = self.read(node + 24, 16 * count)
            for i in range(count):  # a key, a child, a key, a child, ...
                yield from self.entries(int.from_bytes(keys[16 * i + 8 : 16 * i + 16], "little"), head[5] - 1, name)
        else:
            raise self.error(f"is damaged: the list of what is in the group {name!r} is not where it should be")

    def messages(self, address: int) -> list[tuple[int, bytes, int]]:
        """Kind, content and flags of each message in an object's header."""
        self.visit(address)
        head = self.read(address, 16)
        if head[0] != 1:
            raise self.error(f"is damaged, or has an object header in another layout than Keras writes (at byte {address})")
        blocks, found = [(address + 16, int.from_bytes(head[8:12], "little"))], []
        for start, length in blocks:  # grows by continuations
            if length > LARGEST_HEADER:
                raise self.error(f"is damaged: an object header has {length} bytes")
            block, at = self.read(start, length), 0
            while at + 8 <= length:
                kind, count, flags = struct.unpack_from("<HHB", block, at)
                data = block[at + 8 : at + 8 + count]
                if len(data) != count:
                    raise self.error(f"is damaged: a header message at byte {start + at} is cut off")
                if kind == CONTINUATION:
                    following = struct.unpack_from("<QQ", data)
                    self.visit(following[0])
                    blocks.append(following)
                found.append((kind, data, flags))
                at += 8 + count
        return found

    # Datasets -----------------------------------------------------------------------------------------------------------

    def dataset(self, name: str, messages: list[tuple[int, bytes, int]]) -> H5Tensor:
        parts: dict[int, bytes] = {}
        for kind, data, flags in messages:
            if kind == EXTERNAL_FILES:
                raise self.error(f"keeps the data of {name!r} in other files, which Keras does not do")
            if kind in (DATASPACE, DATATYPE, LAYOUT):
                if flags & 2 or kind in parts:
                    raise self.error(f"describes the dataset {name!r} in a way that Keras does not")
                parts[kind] = data
        if len(parts) != 3:
            raise self.error(f"is damaged: the dataset {name!r} is not fully described")
        shape = self.shape(name, parts[DATASPACE])
        dtype = self.dtype(name, parts[DATATYPE], messages)
        layout = parts[LAYOUT]
        if layout[0] not in (3, 4) or layout[1] != 1:
            kinds = {0: "inside its header", 2: "in chunks, as compressed data is", 3: "as a virtual dataset"}
            raise self.error(
                f"stores {name!r} {kinds.get(layout[1], 'in an unknown layout')}, which Keras does not do "
                "(`h5repack -f NONE -l CONTI IN OUT` makes it plain)"
            )
        offset, count = struct.unpack_from("<QQ", layout, 2)
        needed = math.prod(shape) * dtype.itemsize
        if count != needed or offset + count > self.size:
            raise self.error(
                f"declares the dataset {name!r} with shape {shape} and dtype {dtype.name}, {needed} bytes; "
                f"reserved are {count} from byte {offset} on, in a file of {self.size}"
            )
        return H5Tensor(self.file, self.path, offset, shape, dtype, self.last)

    def shape(self, name: str, data: bytes) -> tuple[int, ...]:
        version, rank = data[0], data[1]
        if version not in (1, 2) or (version == 2 and data[3] == 2) or rank > 8:
            raise self.error(f"describes the shape of {name!r} in a way that Keras does not")
        return struct.unpack_from(f"<{rank}Q", data, 8 if version == 1 else 4)

    def dtype(self, name: str, data: bytes, messages: list[tuple[int, bytes, int]]) -> np.dtype:
        kind, bits, size = data[0] & 15, data[1], int.from_bytes(data[4:8], "little")
        if kind == 0 and size == 1:
            return np.dtype("int8") if bits & 8 else np.dtype("uint8")
        if kind == 1 and not bits & 65:  # neither big-endian nor VAX
            dtype = FLOATS.get((data[13], data[15]))
            if dtype is not None and dtype.itemsize == size:
                return dtype
        if kind == 5 and size == 2 and self.text_attribute("dtype", messages) == "bfloat16":
            return BFLOAT16
        kinds = {0: "integers", 1: "floats", 3: "strings", 5: "opaque bytes", 6: "compounds", 7: "references", 8: "enums"}
        what = f"{kinds.get(kind, 'objects')} of {size} bytes"
        raise self.error(f"stores {name!r} as {what}; those read are float32, float16, bfloat16, float64 and int8")

    def text_attribute(self, name: str, messages: list[tuple[int, bytes, int]]) -> str | None:
        """A string among the attributes of an object, as h5py writes strings: of variable length, in a global heap."""
        for kind, data, _ in messages:
            if kind != ATTRIBUTE or data[0] not in (1, 2, 3):
                continue
            lengths, at = struct.unpack_from("<HHH", data, 2), 9 if data[0] == 3 else 8
            steps = [-(-length // 8) * 8 if data[0] == 1 else length for length in lengths]
            if data[at : at + lengths[0]].rstrip(b"\0") != name.encode():
                continue
            datatype, value = data[at + steps[0] :], data[at + sum(steps) :]
            if datatype[0] & 15 == 3:  # fixed length
                return value.rstrip(b"\0").decode("utf-8")
            if datatype[0] & 15 == 9 and datatype[1] & 15 == 1:
                return self.heap_text(*struct.unpack_from("<IQI", value))
        return None

    def heap_text(self, length: int, address: int, index: int) -> str | None:
        head = self.read(address, 16)
        (size,) = struct.unpack_from("<Q", head, 8)
        if head[:4] != b"GCOL" or size > LARGEST_HEADER:
            raise self.error(f"is damaged: a text attribute points to byte {address}, where none is")
        heap, at = self.read(address, size), 16
        while at + 16 <= size:
            number, count = struct.unpack_from("<H6xQ", heap, at)
            if number == index:
                return heap[at + 16 : at + 16 + min(length, count)].decode("utf-8")
            if number == 0:
                break
            at += 16 + -(-count // 8) * 8
        return None

    def check_overlaps(self) -> None:
        """Datasets that share bytes could stand for more than the file's size."""
        end, before = 0, ""
        for name, tensor in sorted(self.found.items(), key=lambda item: item[1].offset):
            if tensor.nbytes and tensor.offset < end:
                raise self.error(f"is damaged: the datasets {before!r} and {name!r} overlap")
            if tensor.nbytes:
                end, before = tensor.offset + tensor.nbytes, name
