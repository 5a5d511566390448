"""torch's zip format, looked at without torch: whether a file is safe to map, and where a map of it lies.

Format: https://pytorch.org/docs/stable/notes/serialization.html (a zip of stored entries: `data.pkl`, `data/0`, ...).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import zipfile

from keras_gemma2.checkpoints.pickle_size import check_size
from keras_gemma2.errors import CheckpointError

PICKLES_OF_OLD_FILES = 5  # magic number, version, system, the objects, keys of the storages
_MAGIC = b"PK\x03\x04"


class BoundedFile(io.BufferedReader):
    """A file opened to be read, where no read takes more memory than the file has bytes, whatever a pickle in it asks for."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes; all the rest of the file without it."""
        rest = max(0, self._size - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))


def is_mappable(path: str) -> bool:
    """Whether a file is of torch's zip format, whose tensors can be mapped.

    Raises:
        CheckpointError: for a zip that torch does not write, and for pickles that would take forever to load.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_MAGIC)) == _MAGIC
        if not is_zip:
            _check_old_file(path)
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            orders = [archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder") and entry.file_size < 16]
            for entry in entries:
                if entry.filename.endswith(".pkl") and entry.compress_type == zipfile.ZIP_STORED:
                    check_size(io.BytesIO(archive.read(entry)))
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint of torch ({error}). Download it again.") from error
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size]
    if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise CheckpointError(
            f"{path} is no checkpoint of torch: its zip entries must be stored as they are. Packed: {packed[:3]}."
        )
    return all(order == sys.byteorder.encode() for order in orders)  # torch swaps the bytes of another order in memory


def _check_old_file(path: str) -> None:
    """A ValueError for a file of the format before torch 1.6 whose pickles are damaged or would take forever to load."""
    with BoundedFile(path) as file:
        for _ in range(PICKLES_OF_OLD_FILES):
            check_size(file)


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
