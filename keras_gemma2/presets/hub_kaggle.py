"""`kaggle://owner/model/framework/variation[/version]` through kagglehub, with its cache and progress bars.

kagglehub lists no files: each is asked for by name, and a missing one answers 404. What is in its cache
(`models/owner/model/framework/variation/version`, with a marker below `.complete` for each whole file, or one
`version.complete` for all) is found without it and without the network. https://github.com/Kaggle/kagglehub
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

from keras_gemma2.checkpoints.added_tokens import ADDED_TOKENS_FILE, TOKENIZER_CONFIG_FILE
from keras_gemma2.checkpoints.source import CONFIG_FILE, read_json
from keras_gemma2.errors import CheckpointError, HubError
from keras_gemma2.presets.hub import CONFIG, TOKENIZER, WEIGHTS
from keras_gemma2.presets.hub_errors import Access, chain, explained, missing_library, status_of
from keras_gemma2.presets.hub_files import (
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    KERAS_VOCABULARY,
    KERAS_WEIGHTS,
    PREPROCESSOR_FILE,
    SAFETENSORS,
    TOKENIZER_JSON,
    VOCABULARY,
    further_files,
    shard_names,
)

SCHEME = "kaggle://"
# Frameworks whose files have known names; the others' (pyTorch, flax, gguf, ...) are fetched as a whole.
_FILE_BY_FILE = ("keras", "transformers")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_SLUG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_ADDRESS = re.compile(rf"({_SLUG})/({_SLUG})/({_SLUG})/({_SLUG})(?:/([1-9][0-9]{{0,8}}))?")
Get = Callable[[str], "str | None"]


@dataclasses.dataclass(frozen=True)
class _Handle:
    owner: str
    model: str
    framework: str
    variation: str
    version: str | None

    def __str__(self) -> str:
        return "/".join(filter(None, dataclasses.astuple(self)))

    @property
    def address(self) -> str:
        return f"{SCHEME}{self}"

    @property
    def cache_root(self) -> str:
        """The folder of all versions in kagglehub's cache."""
        cache = os.environ.get("KAGGLEHUB_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "kagglehub")
        return os.path.join(cache, "models", self.owner, self.model, self.framework, self.variation)

    @property
    def access(self) -> Access:
        return Access(
            "Kaggle",
            str(self),
            f"https://www.kaggle.com/models/{self.owner}/{self.model}",
            "set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY, or save kaggle.json in ~/.kaggle (keys: "
            "https://www.kaggle.com/settings)",
            "KAGGLEHUB_CACHE",
        )


def fetch(where: str, need: str) -> str:
    """As `hub.fetch`. A version that is whole in the cache is used without asking Kaggle."""
    handle = _parse(where)
    if handle.version is not None:
        folder, is_whole = _in_cache(handle, need)
        if is_whole:
            return _checked(folder, handle)
    try:
        return _checked(_download(handle, need), handle)
    except HubError as error:
        folder = _newest_in_cache(handle, need)
        if folder is None:
            raise
        warnings.warn(f"The files of {where!r} are those in the cache. {error}", stacklevel=2)
        return _checked(folder, handle)


def _parse(where: str) -> _Handle:
    found = _ADDRESS.fullmatch(where.removeprefix(SCHEME))
    if found is None or ".." in where:
        raise CheckpointError(
            f"{where!r} is no address of a model on Kaggle. The form is {SCHEME}owner/model/framework/variation[/version], such "
            f"as '{SCHEME}keras/gemma2/keras/gemma2_2b_en'; a version is a number."
        )
    return _Handle(*found.groups())


def _download(handle: _Handle, need: str) -> str:
    kagglehub = _library(handle)
    if handle.framework.lower() not in _FILE_BY_FILE:
        with explained(handle.access):
            return kagglehub.model_download(str(handle))
    asked = handle

    def get(name: str) -> str | None:
        nonlocal asked
        with explained(handle.access):
            try:
                path = kagglehub.model_download(str(asked), path=name)
            except Exception as error:
                if name != CONFIG_FILE and _is_missing(error):
                    return None
                raise
        if asked.version is None:  # ask for the other files at the version found, without looking it up each time
            version = os.path.basename(os.path.dirname(path))
            asked = dataclasses.replace(asked, version=version if version.isdecimal() else None)
        return path

    missing = _gather(get, need)
    if missing[WEIGHTS]:
        raise CheckpointError(f"{handle.address!r} has no {missing[WEIGHTS][0]}. See its files on {handle.access.page}.")
    return os.path.dirname(get(CONFIG_FILE))


def _gather(get: Get, need: str) -> dict[str, list[str]]:
    """Gets the files that a model of this kind has; returns which of the important ones it has not.

    Weights come last, so that where they are, the optional files were asked for.
    """
    missing: dict[str, list[str]] = {CONFIG: [], TOKENIZER: [], WEIGHTS: []}
    config = get(CONFIG_FILE)
    if config is None:
        return {**missing, CONFIG: [CONFIG_FILE]}
    is_keras = "registered_name" in read_json(config)
    if not is_keras:
        get(GENERATION_FILE)
    if need != CONFIG:
        missing[TOKENIZER] = _missing_tokenizer(get, is_keras)
    if need == WEIGHTS:
        if not is_keras:
            get(CHAT_TEMPLATE_FILE)
        index, single = KERAS_WEIGHTS if is_keras else SAFETENSORS
        path = get(index)
        missing[WEIGHTS] = [name for name in ([single] if path is None else shard_names(path)) if get(name) is None]
    return missing


def _missing_tokenizer(get: Get, is_keras: bool) -> list[str]:
    if is_keras:
        get(PREPROCESSOR_FILE)
        return [name for name in (TOKENIZER_JSON, KERAS_VOCABULARY) if get(name) is None]
    get(TOKENIZER_CONFIG_FILE)
    model = get(VOCABULARY)
    if model is None:
        return [VOCABULARY] if get(TOKENIZER_JSON) is None else []
    get(ADDED_TOKENS_FILE)
    for name in further_files([TOKENIZER_JSON], os.path.dirname(model)):
        get(name)
    return []


def _in_cache(handle: _Handle, need: str) -> tuple[str | None, bool]:
    """The folder of a version in kagglehub's cache if the model loads from it; whether the tokenizer is there too."""
    root = handle.cache_root
    folder = os.path.join(root, handle.version)
    if os.path.isfile(f"{folder}.complete") and os.path.isdir(folder):
        return folder, True

    def get(name: str) -> str | None:
        path, marker = os.path.join(folder, name), os.path.join(root, ".complete", handle.version, f"{name}.complete")
        return path if os.path.isfile(path) and os.path.isfile(marker) else None

    if handle.framework.lower() not in _FILE_BY_FILE:
        return None, False
    missing = _gather(get, need)
    loads = not missing[CONFIG] and not missing[WEIGHTS] and not (need == TOKENIZER and missing[TOKENIZER])
    return folder if loads else None, loads and not missing[TOKENIZER]


def _newest_in_cache(handle: _Handle, need: str) -> str | None:
    versions = [handle.version] if handle.version else _cached_versions(handle)
    found = (_in_cache(dataclasses.replace(handle, version=version), need)[0] for version in versions)
    return next((folder for folder in found if folder is not None), None)


def _cached_versions(handle: _Handle) -> list[str]:
    root = handle.cache_root
    names = os.listdir(root) if os.path.isdir(root) else []
    return sorted((name for name in names if name.isdecimal()), key=int, reverse=True)


def _checked(folder: str, handle: _Handle) -> str:
    """The folder, unless all that is in it is packed."""
    names = sorted(os.listdir(folder))
    if names and all(name.lower().endswith(_ARCHIVES) for name in names):
        raise CheckpointError(
            f"{handle.address!r} holds an archive only: {os.path.join(folder, names[0])}. Unpack it into a folder of its own, and "
            "pass that folder."
        )
    return folder


def _is_missing(error: Exception) -> bool:
    """Whether the model is there but not the file; inside a Kaggle notebook that is a ValueError."""
    return status_of(error) == 404 or any("is not present in the model files" in str(each) for each in chain(error))


def _library(handle: _Handle) -> Any:
    try:
        import kagglehub
    except ImportError as error:
        raise missing_library("kagglehub", handle.address) from error
    return kagglehub
