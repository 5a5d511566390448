"""What a folder or file of weights turned out to be. Nothing heavier than JSON is read to find out."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError, MissingFileError

HUGGING_FACE = "hugging_face"
KERAS = "keras"
KERAS_HUB = "keras_hub"
GEMMA_PYTORCH = "gemma_pytorch"
FLAX = "flax"
GGUF = "gguf"
SIZE_ONLY = "size_only"

CONFIG_FILE = "config.json"
TOKENIZER_JSON_FILE = "tokenizer.json"
LONGEST_SHOWN = 100  # characters of a value in a message
LARGEST_JSON = 256 << 20  # bytes; Gemma's tokenizer.json is 34 MB
_LFS_POINTER = b"version https://git-lfs.github.com/spec"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")  # what programs call a file while it comes
_DOWNLOADS = (".cache", "huggingface", "download")  # where `hf download --local-dir` has those


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that was found, not yet opened.

    Args:
        name: as the user gave it.
        kind: one of the constants of this module, which are the columns of the weight table; `SIZE_ONLY` for an
            architecture without files.
        config: the architecture.
        path: local folder or file, or None.
        values: the parsed config.json, or whatever stands for it.
        dtype: the dtype policy's name, or config, to load the weights in unless the caller asks for another; None for the
            stored one.
        stop_token_ids: where generation stops, besides the tokenizer's own stop tokens.
        preprocessor: saved arguments of the preprocessor.
    """

    name: str
    kind: str
    config: Gemma2Config
    path: str | None = None
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Any = None
    stop_token_ids: tuple[int, ...] = ()
    preprocessor: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointError: if it is no JSON object, or too large to be one of a checkpoint's.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors put a byte order mark in front
            size = os.fstat(file.fileno()).st_size
            text = file.read() if size <= LARGEST_JSON else ""
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is not there. Download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON, which is UTF-8: {error}. Download it again.") from error
    if size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {size} bytes; no JSON file of a checkpoint is that large. Download it again.")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError for integers of thousands of digits
        refuse_lfs_pointer(path)
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object. Received: {type(values).__name__}.")
    return values


def find_file(folder: str, *names: str) -> str | None:
    """The first of these files that a folder holds."""
    paths = [os.path.join(folder, name) for name in names]
    return next((path for path in paths if os.path.isfile(path)), None)


def read_bytes(path: str) -> bytes:
    """A whole file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def refuse_lfs_pointer(path: str) -> None:
    """For a reader that finds a file not to be of its format: says so if git put a few lines in its place.

    Raises:
        CheckpointError: if it is a pointer of git-lfs.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS_POINTER))
    except OSError:
        return  # the reader says why
    if head == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder, or download it again with "
            "`hf download`."
        )


def unfinished_download(folder: str) -> str:
    """A sentence about what a download that is not complete left in a folder; empty if there is nothing of that kind."""
    for each in (folder, os.path.join(folder, *_DOWNLOADS)):
        try:
            names = sorted(name for name in os.listdir(each) if name.lower().endswith(_UNFINISHED))
        except OSError:
            continue
        if names:
            found = os.path.relpath(os.path.join(each, names[0]), folder)
            return f" The download is not complete: {shown(found)} is there. Resume it."
    return ""


def shown(value: Any) -> str:
    """A value out of a file for a message: its `repr`, shortened."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def file_inside(folder: str, name: Any, named_by: str) -> str:
    """The path of a file that an index names, which must lie directly in the index's folder.

    Raises:
        CheckpointError: if the name leads elsewhere.
        MissingFileError: if the file is not there.
    """
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or "\0" in name
        or os.path.basename(name) != name
        or "\\" in name
    ):
        raise CheckpointError(f"{named_by} names the file {shown(name)}; only files of its own folder may be named there.")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise MissingFileError(
            f"{named_by} names the file {shown(name)}, which is not in the folder. Download it.{unfinished_download(folder)}"
        )
    return path
