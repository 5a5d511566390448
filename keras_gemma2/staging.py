"""Folders that change in one step: written beside their place, complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator

from keras_gemma2.errors import CheckpointError
from keras_gemma2.folder_swap import take_place, to_disk

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks, so leftovers of killed processes stay
    fcntl = None

PROBE = 4096  # bytes

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
_FULL = (errno.ENOSPC, errno.EDQUOT)
# A path that is still a link when all links are followed.
_LOOP = "is a symbolic link that leads back to itself. Remove it or choose another folder"
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
                to_disk(staging)
                take_place(staging, path, beside, owned)
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


def writable_folder(target: str | os.PathLike[str], needed_bytes: int = 0) -> str:
    """A folder, made if missing, once it is known that it can be written to and has room.

    Args:
        target: the folder, as `folder_path` takes it.
        needed_bytes: the room.

    Returns:
        Its absolute path.

    Raises:
        CheckpointError: if the folder or a parent is a file, it may not be written to, or the disk has too little room.
        TypeError: if the target is no path.
    """
    shown = folder_path(target)
    path = os.path.realpath(shown)
    with _clear_errors(shown, needed_bytes):
        _missing_parents(path)
        os.makedirs(path, exist_ok=True)
        _check_room(shown, path, needed_bytes)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b" " * PROBE)
    return path


@contextlib.contextmanager
def only_writer(path: str) -> Iterator[None]:
    """A context in which no other process that asks for it, too, writes beside a file (where the file system has locks).

    Args:
        path: the file, whose lock is held; it is made, with its folder, if missing.

    Raises:
        CheckpointError: if another process is in its context, or the file cannot be written.

    Example:
        >>> with only_writer("./run/log.csv"):
        ...     go_on()
    """
    folder = os.path.dirname(path)
    with _clear_errors(folder, 0):
        os.makedirs(folder, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115 - closed below
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"Another process is writing to {folder!r}. Wait for it, or choose another folder.") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                raise
        yield


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
