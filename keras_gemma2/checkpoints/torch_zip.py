"""torch's zip format, looked at without torch: whether a file is safe to map, and where a map of it lies.

Format: https://pytorch.org/docs/stable/notes/serialization.html (a zip of stored entries: `data.pkl`, `data/0`, ...).
"""

from __future__ import annotations

import contextlib
import os
import sys
import zipfile

from keras_gemma2.errors import CheckpointError

_MAGIC = b"PK\x03\x04"


def is_mappable(path: str) -> bool:
    """Whether a file is of torch's zip format, whose tensors can be mapped; a zip that torch does not write is refused."""
    try:
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            orders = [archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder") and entry.file_size < 16]
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint of torch ({error}). Download it again.") from error
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size]
    if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise CheckpointError(
            f"{path} is no checkpoint of torch: its zip entries must be stored as they are. Packed: {packed[:3]}."
        )
    return all(order == sys.byteorder.encode() for order in orders)  # torch swaps the bytes of another order in memory


def memory_maps(path: str) -> list[tuple[int, int, int]]:
    """Address range and file offset of each memory map of a file; none where the system does not tell (not Linux)."""
    path, maps = os.path.realpath(path), []
    with contextlib.suppress(FileNotFoundError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            addresses, _, offset, _, _, *name = line.rstrip("\n").split(maxsplit=5)
            if name == [path]:
                first, end = (int(address, 16) for address in addresses.split("-"))
                maps.append((first, end, int(offset, 16)))
    return maps
