"""Disks that fail while a runtime's own writer is at it: none of those raises an OSError."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

# TensorFlow, safetensors and other processes have the system's words in their texts; OpenVINO has its C++ library's.
_TEXTS = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)}
_TEXTS["iostream error"] = errno.EIO


def disk_error(text: str) -> OSError | None:
    """The OSError that a text of somebody else's speaks of, if it does.

    Args:
        text: the message of an exception, or what a process wrote to stderr.

    Example:
        >>> disk_error("RuntimeError: saving model.bin: No space left on device").errno == errno.ENOSPC
        True
    """
    for words, code in _TEXTS.items():
        if words in text:
            return OSError(code, f"{os.strerror(code)}, said the writer: {text}")
    return None


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """A context in which exceptions about the disk are OSErrors.

    Raises:
        OSError: for any exception whose text is about the disk.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = disk_error(str(error))
        if found is None:
            raise
        raise found from error
