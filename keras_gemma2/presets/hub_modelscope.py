"""`modelscope://owner/name[@revision][/file.gguf]` through modelscope, an optional library with its own cache.

https://modelscope.cn/docs/models/download
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from keras_gemma2.presets.hub_errors import Access, explained, missing_library
from keras_gemma2.presets.hub_hugging_face import files_below
from keras_gemma2.presets.hub_listing import fetch_listed, parse

SCHEME = "modelscope://"


def fetch(where: str, need: str) -> str:
    """As `hub.fetch`."""
    model, revision, file = parse(where, SCHEME, "ModelScope", "LLM-Research/gemma-2-2b-it")
    return fetch_listed(_Repository(where, model, revision), file, need)


class _Repository:
    never_changes = False

    def __init__(self, where: str, model: str, revision: str | None) -> None:
        self.where, self.model, self.revision = where, model, revision
        self.access = Access(
            "ModelScope",
            model if revision is None else f"{model}@{revision}",
            f"https://modelscope.cn/models/{model}",
            "run `modelscope login` or set MODELSCOPE_API_TOKEN to a token from https://modelscope.cn/my/myaccesstoken",
            "MODELSCOPE_CACHE",
        )

    def names(self) -> Collection[str]:
        api, _ = _library(self.where)
        with explained(self.access):
            entries = api().get_model_files(self.model, revision=self.revision, recursive=True)
            return {entry["Path"] for entry in entries if entry.get("Type") != "tree"}

    def download(self, names: list[str]) -> str:
        _, snapshot_download = _library(self.where)
        with explained(self.access):
            return snapshot_download(self.model, revision=self.revision, allow_patterns=names)

    def cached(self) -> tuple[str, Collection[str]] | None:
        _, snapshot_download = _library(self.where)
        try:
            folder = snapshot_download(self.model, revision=self.revision, local_files_only=True)
        except Exception:  # its own CacheNotFound, a ValueError in older releases: not in the cache
            return None
        return folder, files_below(folder)


def _library(where: str) -> tuple[Any, Any]:
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise missing_library("modelscope", where) from error
    return HubApi, snapshot_download
