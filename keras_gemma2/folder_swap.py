"""Puts a finished folder in the place of an older one."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import os
import shutil
import sys

# Without them a folder is no checkpoint and no export, so one that is moved file by file gets them last.
_LAST = ("config.json", "export.json", "saved_model.pb")
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_CANNOT_MOVE = (errno.EBUSY, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EROFS)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def to_disk(folder: str) -> None:
    """Waits until every file and folder below has reached the disk, so that no crash can undo half of a rename."""
    for parent, _, names in os.walk(folder):
        for path in [*(os.path.join(parent, name) for name in names), parent]:
            _sync(path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_place(staging: str, path: str, beside: bool, owned: tuple[str, ...]) -> None:
    """Puts a finished folder in the place of another, in one step where that can be had.

    Args:
        staging: the new folder.
        path: the place, a real path.
        beside: whether the place may be renamed; else, and where the system refuses, files are moved one by one.
        owned: patterns of paths, from the folder, that the old content is dropped by.
    """
    if beside and os.path.isdir(path):
        _keep(path, staging, owned)
    if beside:
        try:
            _swap(staging, path)
            _sync(os.path.dirname(path))
            return
        except OSError as error:
            if error.errno not in _CANNOT_MOVE or not os.path.isdir(path):
                raise
    _move_files(staging, path, owned)
    _sync(path)


def _swap(staging: str, path: str) -> None:
    """Gives the new folder its name; the old one gets the staging folder's, or is removed."""
    if not os.path.lexists(path):
        try:
            os.rename(staging, path)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # those: another process made it just now
                raise
    if _exchange(staging, path):
        return
    old = f"{staging}-old"
    os.rename(path, old)
    os.rename(staging, path)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: str, second: str) -> bool:
    """Swaps two folders in one step; False where system or file system cannot. Source: man 2 renameat2."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), second)


def _is_owned(relative: str, owned: tuple[str, ...]) -> bool:
    relative = relative.replace(os.sep, "/")
    return any(relative.count("/") == pattern.count("/") and fnmatch.fnmatchcase(relative, pattern) for pattern in owned)


def _keep(old: str, new: str, owned: tuple[str, ...]) -> None:
    """Gives the new folder every file of the old one that no save writes; they are linked, so the old one stays whole."""
    made = [(old, new)]
    for parent, folders, names in os.walk(old):
        relative = os.path.normpath(os.path.relpath(parent, old))
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        kept = [n for n in names + links if not _is_owned(os.path.normpath(os.path.join(relative, n)), owned)]
        if relative != "." and (kept or not (folders or names)):  # empty ones are someone's too
            os.makedirs(os.path.join(new, relative), exist_ok=True)
            made.append((parent, os.path.join(new, relative)))
        for name in kept:
            destination = os.path.join(new, relative, name)
            if not os.path.lexists(destination):
                _link(os.path.join(parent, name), destination)
    for source, copy in reversed(made):
        shutil.copymode(source, copy)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # a file system without hard links, or somebody else's file
        shutil.copy2(source, destination, follow_symlinks=False)


def _move_files(staging: str, path: str, owned: tuple[str, ...]) -> None:
    """Replaces a folder's files one by one, for folders that cannot be renamed."""
    new = _files(staging)
    stale = [n for n in _files(path) if _is_owned(n, owned) and n not in new]
    for name in _LAST:
        if name in new and os.path.lexists(os.path.join(path, name)):
            os.remove(os.path.join(path, name))
    for name in sorted(new, key=lambda name: name in _LAST):
        os.makedirs(os.path.dirname(os.path.join(path, name)), exist_ok=True)
        os.replace(os.path.join(staging, name), os.path.join(path, name))
    for name in stale:
        os.remove(os.path.join(path, name))


def _files(folder: str) -> list[str]:
    """Paths of all files from a folder, other saves' staging folders left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".saving-")]
        found += [os.path.normpath(os.path.join(os.path.relpath(parent, folder), name)) for name in names]
    return found
