"""Fetching from hubs that list a model's files: what is asked for is chosen from the list, never guessed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection
from typing import Protocol

from keras_gemma2.checkpoints.source import CONFIG_FILE
from keras_gemma2.errors import CheckpointError, HubError
from keras_gemma2.presets.hub import CONFIG, TOKENIZER, WEIGHTS
from keras_gemma2.presets.hub_errors import is_offline_mode
from keras_gemma2.presets.hub_files import check_config, describes_itself, further_files, gguf_parts, small_files, weight_files

# Names as the hubs themselves allow them: no spaces, no leading dot; ".." is refused besides.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_REVISION = rf"refs/(?:pr|convert)/{_NAME}|{_NAME}"
_ADDRESS = re.compile(
    rf"(?P<owner>{_NAME})/(?P<name>{_NAME})(?:@(?P<revision>{_REVISION}))?(?:/(?P<file>(?:{_NAME}/)*{_NAME}\.gguf))?"
)


class Repository(Protocol):
    """A model on a hub, at one revision."""

    where: str
    never_changes: bool

    def names(self) -> Collection[str]:
        """All files, from the hub."""

    def download(self, names: list[str]) -> str:
        """Has the library fetch these files into its cache; returns the folder."""

    def cached(self) -> tuple[str, Collection[str]] | None:
        """The folder in the library's cache and the files that the model has as far as is known there."""


def parse(where: str, scheme: str, hub: str, example: str) -> tuple[str, str | None, str | None]:
    """Takes an address apart: the model, the revision and the file.

    Raises:
        CheckpointError: if it is malformed; shows the form.
    """
    found = _ADDRESS.fullmatch(where.removeprefix(scheme))
    if found is None or ".." in where:
        raise CheckpointError(
            f"{where!r} is no address of a model on {hub}. The form is {scheme}owner/name[@revision][/file.gguf], such as "
            f"'{scheme}{example}'; a revision is a branch, a tag or a commit."
        )
    return f"{found['owner']}/{found['name']}", found["revision"], found["file"]


def fetch_listed(repository: Repository, file: str | None, need: str) -> str:
    """Fetches what is needed of a model; where the hub cannot be asked, its cache answers if it holds all of that.

    Args:
        repository: the model.
        file: the one file wanted, or None.
        need: as `hub.fetch` takes it.

    Returns:
        The folder, or the path of a file that stands for the whole model.
    """
    if repository.never_changes:
        found = _in_cache(repository, file, need)
        if found is not None:
            return found
    try:
        return _collect(repository.where, repository.names(), file, need, repository.download)
    except HubError as error:
        found = _in_cache(repository, file, need)
        if found is None:
            raise
        if not is_offline_mode(error):
            warnings.warn(f"The files of {repository.where!r} are those in the cache. {error}", stacklevel=2)
        return found


def _in_cache(repository: Repository, file: str | None, need: str) -> str | None:
    cached = repository.cached()
    if cached is None:
        return None
    folder, names = cached

    def have(wanted: list[str]) -> str:
        missing = [name for name in wanted if not os.path.isfile(os.path.join(folder, name))]
        if missing:
            raise HubError(f"The cache lacks {missing[:3]} of {repository.where!r}.")
        return folder

    try:
        return _collect(repository.where, names, file, need, have)
    except CheckpointError:  # not whole; the caller says why the hub was of no help
        return None


def _collect(where: str, names: Collection[str], file: str | None, need: str, get: Callable[[list[str]], str]) -> str:
    """Chooses files of a list, and gets them: small ones, then weights."""
    if file is None:
        check_config(names, where)
        if need == CONFIG and CONFIG_FILE in names:
            folder = get(small_files(names, CONFIG))
            if describes_itself(folder):
                return folder
    parts = gguf_parts(names, file, where)
    if parts:
        return os.path.join(get(parts), *parts[0].split("/"))
    if need == TOKENIZER and CONFIG_FILE in names:
        folder = _get_small(names, TOKENIZER, get)
        if describes_itself(folder):
            return folder
    folder = _get_small(names, WEIGHTS, get)
    return get(weight_files(names, folder, where))


def _get_small(names: Collection[str], need: str, get: Callable[[list[str]], str]) -> str:
    small = small_files(names, need)
    folder = get(small) if small else ""  # "no names" would mean "all files" to some libraries
    further = further_files(names, folder) if folder else []
    return get(further) if further else folder
