"""TensorBoard's event files, of scalars: the few fields that these need, so that no package has to be installed to write them.

Formats: a record is its length, the length's checksum, the bytes and theirs (tensorflow/core/lib/io/record_writer.h); the bytes are
an `Event` of tensorflow/core/util/event.proto in Protocol Buffers' wire format.
"""

from __future__ import annotations

import os
import struct
import time
from typing import BinaryIO

_POLYNOMIAL = 0x82F63B78  # CRC-32C, bits reversed (RFC 3720, appendix B.4)
_SESSION_START = b"\x08\x01"  # SessionLog {status: START}


def _table_entry(number: int) -> int:
    for _ in range(8):
        number = number >> 1 ^ (_POLYNOMIAL if number & 1 else 0)
    return number


_TABLE = [_table_entry(number) for number in range(256)]


class EventFile:
    """An event file, which is made in a folder.

    Args:
        folder: made if missing.
        first_step: the step that comes next: TensorBoard drops what an earlier file of the folder has from there on, so steps that
            are made again after a resume are shown once.

    Raises:
        OSError: if it cannot be written.

    Example:
        >>> events = EventFile("./logs", first_step=1)
        >>> events.scalars(1, {"loss": 3.5})
        >>> events.close()
    """

    def __init__(self, folder: str | os.PathLike[str], first_step: int) -> None:
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{first_step}"
        self._file: BinaryIO = open(os.path.join(folder, name), "wb")  # noqa: SIM115 - closed by `close`
        self._record(_message(3, b"brain.Event:2"))
        self._record(_varint(2, first_step) + _message(7, _SESSION_START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers by their tag."""
        pairs = [_message(1, tag.encode()) + b"\x15" + struct.pack("<f", value) for tag, value in values.items()]
        self._record(_varint(2, step) + _message(5, b"".join(_message(1, pair) for pair in pairs)))

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _record(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def _message(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _number(len(content)) + content


def _varint(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _number(value)


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _checksum(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)  # "masked", as record_writer.h does
