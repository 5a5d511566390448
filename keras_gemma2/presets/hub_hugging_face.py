"""`hf://owner/name[@revision][/file.gguf]` through huggingface_hub, with its cache, tokens and progress bars.

https://huggingface.co/docs/huggingface_hub/package_reference/file_download
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from keras_gemma2.presets.hub_errors import Access, explained, missing_library
from keras_gemma2.presets.hub_listing import fetch_listed, parse

SCHEME = "hf://"
# Seconds for the first answer; the library itself would wait without limit, and a machine without network for minutes.
_TIMEOUT = 10


def fetch(where: str, need: str) -> str:
    """As `hub.fetch`."""
    model, revision, file = parse(where, SCHEME, "Hugging Face", "google/gemma-2-2b")
    return fetch_listed(_Repository(where, model, revision), file, need)


class _Repository:
    def __init__(self, where: str, model: str, revision: str | None) -> None:
        self.where, self.model, self.revision = where, model, revision
        self.never_changes = revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None
        self.access = Access(
            "Hugging Face",
            model if revision is None else f"{model}@{revision}",
            f"https://huggingface.co/{model}",
            "run `hf auth login` or set HF_TOKEN to a token from https://huggingface.co/settings/tokens",
            "HF_HOME",
        )

    def names(self) -> Collection[str]:
        hub = _library(self.where)
        with explained(self.access):
            info = hub.HfApi().model_info(self.model, revision=self.revision, timeout=_TIMEOUT)
            return {sibling.rfilename for sibling in info.siblings or ()}

    def download(self, names: list[str]) -> str:
        hub = _library(self.where)
        with explained(self.access):
            return hub.snapshot_download(self.model, revision=self.revision, allow_patterns=[_literal(name) for name in names])

    def cached(self) -> tuple[str, Collection[str]] | None:
        hub = _library(self.where)
        try:  # no pattern: nothing is asked of the folder but to be there
            folder = hub.snapshot_download(self.model, revision=self.revision, allow_patterns=[], local_files_only=True)
        except (OSError, ValueError):  # LocalEntryNotFoundError, or a name that huggingface_hub refuses
            return None
        return folder, self._cached_listing(hub) or files_below(folder)

    def _cached_listing(self, hub: Any) -> set[str] | None:
        """The list of all files that huggingface_hub 2 keeps of a snapshot."""
        if not hasattr(hub, "get_cached_repo_tree"):
            return None
        try:
            return {file.path for file in hub.get_cached_repo_tree(self.model, revision=self.revision)}
        except hub.errors.CachedRepoTreeNotFoundError:
            return None


def files_below(folder: str) -> set[str]:
    """The files in a folder and below, as a hub lists them."""
    found = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder).replace(os.sep, "/") for path in found}


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _library(where: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise missing_library("huggingface_hub", where) from error
    return huggingface_hub
