"""Folders that change in one step: written beside their place, complete or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator

from keras_gemma2.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks, so leftovers of killed processes stay
    fcntl = None

# What writers of this package, keras-hub and transformers name the files of a checkpoint, as paths from its folder. No wider:
# `epoch_03.weights.h5`, `model_final.weights.h5` or `adapter_model.safetensors` beside them are the user's.
_NUMBER = "[0-9]" * 5
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "metadata.json",
    "task.json",
    "model.safetensors",
    f"model-{_NUMBER}-of-{_NUMBER}.safetensors",
    "model.safetensors.index.json",
    "model.weights.h5",
    f"model_{_NUMBER}.weights.h5",
    "model.weights.json",
    "pytorch_model.bin",
    f"pytorch_model-{_NUMBER}-of-{_NUMBER}.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor.json",
    "assets/tokenizer/vocabulary.spm",
)
CHECKPOINT_FILES = MODEL_FILES + TOKENIZER_FILES
_LAST = "config.json"  # without it a folder is no checkpoint, so one that is moved file by file gets it last
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_CANNOT_MOVE = (errno.EBUSY, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EROFS)
# A path that is still a link when all links are followed.
_LOOP = "is a symbolic link that leads back to itself. Remove it or choose another folder"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_open: set[str] = set()  # staging folders that this process is writing to


@contextlib.contextmanager
def replacing_folder(
    target: str | os.PathLike[str], needed_bytes: int = 0, owned: tuple[str, ...] = CHECKPOINT_FILES
) -> Iterator[str]:
    """An empty folder to write to, which takes the target's place when the block ends well.

    The change is one step of the file system (on Linux; elsewhere a target that exists is renamed first), after all
    files have reached the disk. If the block raises, nothing remains and the old folder is untouched. If the process is
    killed, a hidden folder `.<name>.saving-*` may remain beside the target; the next save removes it.

    Three targets cannot be renamed: the current directory or one above it, a mount point (or a folder with one in it),
    and a folder in a parent that one may not write to. Their files are staged in a hidden folder inside, then moved one
    by one: the old `config.json` is removed first and the new one comes last, so that a save killed in between leaves a
    folder that is no checkpoint rather than a mixture of two.

    A save within a save, to the folder that the outer one stages, writes there directly: keras-hub saves the parts of a task
    through their own `save_to_preset`.

    Args:
        target: the folder, as `folder_path` takes it; made with its parents if missing. A symbolic link to a folder stays,
            its folder is replaced.
        needed_bytes: how much will be written; checked against the free space first.
        owned: patterns of paths, from the folder, that the old content is dropped by. All other files are kept.

    Yields:
        The path of an empty folder on the target's file system.

    Raises:
        CheckpointError: if the target or a parent is a file, it may not be written to, or the disk has too little room.
        TypeError: if the target is no path.

    Example:
        >>> with replacing_folder("./my_gemma2", needed_bytes=5_200_000_000) as folder:
        ...     write_all_files(folder)
    """
    shown = folder_path(target)
    path = os.path.realpath(shown)
    if path in _open:
        yield path
        return
    made: list[str] = []
    try:
        with _clear_errors(shown, needed_bytes):
            made = _missing_parents(path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            beside = not _must_stay(path)
            place, prefix = _place(path, beside)
            _remove_leftovers(path, place, prefix)
            _check_room(shown, place, needed_bytes)
            staging, lock = _locked_folder(place, prefix)
        try:
            _open.add(staging)
            with _clear_errors(shown, needed_bytes):
                yield staging
                _to_disk(staging)
                _take_place(staging, path, beside, owned)
        finally:
            _open.discard(staging)
            shutil.rmtree(staging, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another process uses it already
                os.rmdir(folder)
        raise


def folder_path(target: str | os.PathLike[str], argument: str = "target") -> str:
    """The absolute path of a folder to write, `~` expanded.

    Args:
        target: as the user gave it.
        argument: what the caller's argument is called, for messages.

    Raises:
        TypeError: if it is no string or path.
        CheckpointError: if it is empty, or no file system can hold it.

    Example:
        >>> folder_path("~/gemma2")
        '/home/someone/gemma2'
    """
    path = os.fspath(target) if isinstance(target, os.PathLike) else target
    if not isinstance(path, str):
        raise TypeError(f"`{argument}` must be the path of a folder, as a string or a `pathlib.Path`. Received: {target!r}.")
    if not path:
        raise CheckpointError(f"`{argument}` must be the path of a folder. Received: {path!r}; '.' is the current one.")
    try:
        named = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise CheckpointError(f"`{argument}` has a character that no path can have. Received: {path!r}.")
    return os.path.abspath(os.path.expanduser(path))


# Before writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _clear_errors(shown: str, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        # h5py's own errors have the number in their text only.
        if error.errno in _FULL or "No space left on device" in str(error):
            raise _no_room(shown, needed_bytes, None) from error
        raise CheckpointError(
            f"The folder {shown!r} cannot be written: {error}. Choose another folder, or get the right to write there."
        ) from error


def _no_room(shown: str, needed_bytes: int, free: int | None) -> CheckpointError:
    needs = f"this save needs {needed_bytes / 1e9:.2f} GB" if needed_bytes else "more is needed"
    left = "" if free is None else f" and {free / 1e9:.2f} GB are free"
    return CheckpointError(f"The disk of {shown!r} is full: {needs}{left}. Free some space or choose another folder.")


def _check_room(shown: str, place: str, needed_bytes: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise _no_room(shown, needed_bytes, free)


def _missing_parents(path: str) -> list[str]:
    """The folders above a path that are yet to be made, the outermost first."""
    if os.path.lexists(path) and not os.path.isdir(path):
        what = "is a file; a checkpoint is a folder. Choose another name or move the file away"
        raise CheckpointError(f"{path!r} {_LOOP if os.path.islink(path) else what}.")
    missing, parent = [], os.path.dirname(path)
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        what = f"is a file, so there can be no folder {path!r} below it. Choose another folder"
        raise CheckpointError(f"{parent!r} {_LOOP if os.path.islink(parent) else what}.")
    return missing[::-1]


def _must_stay(path: str) -> bool:
    """Whether a folder cannot be renamed."""
    if not os.path.isdir(path):
        return False
    with contextlib.suppress(FileNotFoundError):  # the current directory was removed
        if os.path.join(os.path.realpath(os.getcwd()), "").startswith(os.path.join(path, "")):
            return True
    if os.path.ismount(path):
        return True
    if not os.access(os.path.dirname(path), os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return True
    return any(os.path.ismount(os.path.join(folder, name)) for folder, names, _ in os.walk(path) for name in names)


def _place(path: str, beside: bool) -> tuple[str, str]:
    """Where to stage, and how the staging folder's name begins."""
    name = os.path.basename(path)
    if len(os.fsencode(name)) > 200:  # file systems allow 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return (os.path.dirname(path), f".{name}.saving-") if beside else (path, ".saving-")


def _locked_folder(place: str, prefix: str) -> tuple[str, int | None]:
    """A new folder and its lock, which the system drops when this process ends in whatever way."""
    while True:
        staging = os.path.join(place, prefix + secrets.token_hex(4))
        try:
            os.mkdir(staging)  # with the user's umask, unlike tempfile's
        except FileExistsError:
            continue
        lock = _lock(staging)
        # Another process may have taken it for a leftover before it was locked.
        if lock is None or (os.path.isdir(staging) and os.path.samestat(os.fstat(lock), os.stat(staging))):
            return staging, lock
        os.close(lock)


def _lock(folder: str) -> int | None:
    """A descriptor that holds a folder's lock; None where it is held elsewhere or the file system has none."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(path: str, place: str, prefix: str) -> None:
    """Removes what killed processes left, and puts back a folder that one of them had renamed."""
    for name in sorted(os.listdir(place)):
        leftover = os.path.join(place, name)
        if not re.fullmatch(re.escape(prefix) + "[0-9a-f]{8}(-old)?", name) or (lock := _lock(leftover)) is None:
            continue
        if name.endswith("-old") and not os.path.lexists(path):
            os.rename(leftover, path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)


# After writing ----------------------------------------------------------------------------------------------------------


def _to_disk(folder: str) -> None:
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


def _take_place(staging: str, path: str, beside: bool, owned: tuple[str, ...]) -> None:
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
    shutil.copymode(old, new)
    for parent, folders, names in os.walk(old):
        relative = os.path.normpath(os.path.relpath(parent, old))
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        kept = [n for n in names + links if not _is_owned(os.path.normpath(os.path.join(relative, n)), owned)]
        if relative != "." and (kept or not (folders or names)):  # empty ones are someone's too
            os.makedirs(os.path.join(new, relative), exist_ok=True)
        for name in kept:
            destination = os.path.join(new, relative, name)
            if not os.path.lexists(destination):
                _link(os.path.join(parent, name), destination)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # a file system without hard links, or somebody else's file
        shutil.copy2(source, destination, follow_symlinks=False)


def _move_files(staging: str, path: str, owned: tuple[str, ...]) -> None:
    """Replaces a folder's files one by one, for folders that cannot be renamed."""
    new = _files(staging)
    stale = [n for n in _files(path) if _is_owned(n, owned) and n not in new]
    if _LAST in new and os.path.lexists(os.path.join(path, _LAST)):
        os.remove(os.path.join(path, _LAST))
    for name in sorted(new, key=lambda name: name == _LAST):
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
