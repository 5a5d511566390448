"""The header of a GGUF file, checked before anything in it is believed.

It is parsed here and not by the `gguf` package: its reader maps the whole file (touched pages would count as this process's
memory), takes 16 seconds for the 256,000 entries of Gemma's token list, and believes every count and offset. Here, nothing
is taken from a header that the file's size does not cover.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import os
import struct
from typing import Any

from keras_gemma2.checkpoints.source import refuse_lfs_pointer
from keras_gemma2.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_HEADER = 64 << 20  # bytes; with 256,000 tokens a header has 6 MB
LARGEST_RANK = 4  # GGML_MAX_DIMS of ggml.h
ALIGNMENT = 32  # where `general.alignment` is not given
_STEP = 1 << 18  # bytes of a header read at once

# Metadata value types by their number in the format, as `struct` reads them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Tensor types that are plain numbers; all others are in blocks.
PLAIN_TYPES = {0: "float32", 1: "float16", 30: "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Array:
    """A list in the metadata: where it stands, since most are long and few are needed.

    Args:
        kind: the number of the entries' type.
        count: of entries.
        data: the bytes of all entries.
    """

    kind: int
    count: int
    data: bytes = dataclasses.field(repr=False)

    def numbers(self) -> tuple[Any, ...]:
        """The entries, if they are numbers; else a ValueError."""
        if self.kind not in _SCALARS:
            raise ValueError("must be a list of numbers")
        return struct.unpack(f"<{self.count}{_SCALARS[self.kind]}", self.data)

    def strings(self) -> list[str]:
        """The entries, if they are strings in UTF-8; else a ValueError."""
        if self.kind != _STRING:
            raise ValueError("must be a list of strings")
        texts, position = [], 0
        for _ in range(self.count):
            start = position + 8
            position = start + int.from_bytes(self.data[position:start], "little")
            texts.append(self.data[start:position].decode("utf-8"))
        return texts


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor stands. The shape's last axis is the contiguous one; the file lists axes the other way round."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Args:
        path: the file.
        values: the metadata: numbers, bools, strings and `Array`.
        tensors: in the order of the file.
    """

    path: str
    values: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


def is_gguf(path: str) -> bool:
    """Whether a file starts as GGUF files do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # whoever opens it next says why


def read_header(path: str) -> Header:
    """Reads metadata and the list of tensors; no weights, and neither numpy nor `gguf`.

    Raises:
        CheckpointError: if it is not a whole, consistent header.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return _Parser(path, file).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


class _Parser:
    """Walks through a header, holding what was read of it."""

    def __init__(self, path: str, file: Any) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.data, self.position = bytearray(), 0

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            refuse_lfs_pointer(self.path)
            raise self.broken("it does not start with 'GGUF'")
        self.check_version(self.scalar("I"))
        tensor_count, value_count = self.scalar("Q"), self.scalar("Q")
        self.check_count(tensor_count, 32, "tensors")  # a tensor's shortest entry, a value's shortest entry, in bytes
        self.check_count(value_count, 13, "metadata values")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.string()
            if key in values:
                raise self.broken(f"the metadata key {key!r} stands twice")
            values[key] = self.value(key)
        entries = [self.tensor() for _ in range(tensor_count)]
        start = -(-self.position // self.alignment(values)) * self.alignment(values)
        return Header(self.path, values, self.placed(entries, start, self.alignment(values)))

    def broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a complete GGUF file: {why}. Download it again.")

    def need(self, count: int) -> None:
        """Makes sure that this many bytes after the position are in memory."""
        end = self.position + count
        if end <= len(self.data):
            return
        if end > self.size:
            raise self.broken(f"its header goes on for {count} bytes at byte {self.position}, but the file has {self.size}")
        if end > LARGEST_HEADER:
            raise self.broken(f"its header is longer than {LARGEST_HEADER} bytes")
        while end > len(self.data):
            part = self.file.read(min(_STEP, self.size - len(self.data)))
            if not part:
                raise self.broken("it became shorter while it was read")
            self.data += part

    def take(self, count: int) -> bytes:
        self.need(count)
        self.position += count
        return bytes(self.data[self.position - count : self.position])

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"the string before byte {self.position} is not UTF-8") from error

    def value(self, key: str) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.broken(f"the metadata value {key!r} has the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, key: str) -> Array:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind != _STRING and kind not in _SCALARS:
            raise self.broken(f"the metadata list {key!r} has entries of type {kind}, which are no strings or numbers")
        width = 8 if kind == _STRING else struct.calcsize(f"<{_SCALARS[kind]}")
        self.check_count(count, width, f"entries of {key!r}")
        if kind != _STRING:
            return Array(kind, count, self.take(count * width))
        start = self.position
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):  # 256,000 times for Gemma: the common case makes no call but one
            if self.position + 8 > len(self.data):
                self.need(8)
            self.position += 8 + unpack(self.data, self.position)[0]
            if self.position > len(self.data):
                end, self.position = self.position, start
                self.need(end - start)
                self.position = end
        return Array(kind, count, bytes(self.data[start : self.position]))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self.string(), self.scalar("I")
        if not 1 <= rank <= LARGEST_RANK:
            raise self.broken(f"the tensor {name!r} has {rank} axes")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def alignment(self, values: dict[str, Any]) -> int:
        alignment = values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            raise self.broken(f"general.alignment must be a multiple of 8, not {alignment!r}")
        return alignment

    def placed(self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int) -> tuple[TensorInfo, ...]:
        names: set[str] = set()
        for name, shape, _, offset in entries:
            if name in names:
                raise self.broken(f"the tensor {name!r} stands twice")
            names.add(name)
            if not all(shape):
                raise self.broken(f"the tensor {name!r} has no elements: its shape is {shape}")
            if offset % alignment or start + offset >= self.size:
                raise self.broken(f"the tensor {name!r} would start at byte {start + offset} of {self.size}")
        return tuple(TensorInfo(name, shape, kind, start + offset) for name, shape, kind, offset in entries)

    def check_version(self, version: int) -> None:
        if version & 0xFFFF == 0 and version:
            raise CheckpointError(f"{self.path} is big-endian. Run llama.cpp's `gguf_convert_endian.py {self.path} little` first.")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path} is GGUF version {version}; those read are {VERSIONS}. Convert the model again.")

    def check_count(self, count: int, bytes_each: int, what: str) -> None:
        if count * bytes_each > self.size - self.position:
            raise self.broken(f"it declares {count} {what}, more than its {self.size} bytes can hold")
