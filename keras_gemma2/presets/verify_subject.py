"""What the checks of `verify` share: results, and the checkpoint that is looked at."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

from keras_gemma2.checkpoints.source import Source
from keras_gemma2.presets import hub
from keras_gemma2.presets.registry import EMBEDDED, PUBLISHED, preset_names
from keras_gemma2.presets.verify_known import EMBEDDED_FILES, EMBEDDED_WEIGHTS, HUGGING_FACE_NAMES

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one check found.

    Args:
        name: of the check.
        verdict: `OK`; `FAILED`; or `SKIPPED`, for what could not be judged.
        message: what was found and expected, or why it was skipped and what would change that; one line.
        details: further lines.
    """

    name: str
    verdict: str
    message: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = f"{self.verdict:<8}{self.name:<14}{' '.join(self.message.split())}"
        return "\n".join([first, *(f"{'':22}{line}" for line in self.details)])


def ok(message: str, details: tuple[str, ...] = ()) -> Result:
    return Result("", OK, message, details)


def failed(message: str, details: tuple[str, ...] = ()) -> Result:
    return Result("", FAILED, message, details)


def skipped(message: str, details: tuple[str, ...] = ()) -> Result:
    return Result("", SKIPPED, message, details)


@dataclasses.dataclass
class Subject:
    """A checkpoint under examination.

    Args:
        where: as the user gave it.
        source: what it turned out to be.
        claim: the built-in name of the published model that it is said to be, or None.
        dtype: to load it in, or None for its own.
        long: whether to run what takes minutes.
        results: of the checks made so far, by name.
        lm: the model, once the check "model" has loaded it.
    """

    where: str
    source: Source
    claim: str | None = None
    dtype: str | None = None
    long: bool = False
    results: dict[str, Result] = dataclasses.field(default_factory=dict)
    lm: Any = None

    def has_failed(self, *names: str) -> str | None:
        """The first of these checks that failed, or None."""
        return next((name for name in names if name in self.results and self.results[name].verdict == FAILED), None)

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.source.path)

    def files(self) -> Iterator[tuple[str, str]]:
        """Every file, as its name in the checkpoint and its path; hidden files and folders are left out."""
        path = self.source.path
        if not self.is_folder:
            yield os.path.basename(path), path
            return
        for parent, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    full = os.path.join(parent, name)
                    yield os.path.relpath(full, path).replace(os.sep, "/"), full


def sha256(path: str) -> str:
    """The hash of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim_of(where: str, source: Source) -> str | None:
    """Which published model WHERE says it is: a built-in name, Google's own address, a folder named like it; or None.

    A folder with the embedded preset's weights is a copy of it, whatever its name.
    """
    if where in preset_names():
        return where
    if hub.is_address(where):
        return _claim_of_address(where)
    cached = re.search(r"models--google--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", os.path.abspath(where))
    base = cached[1] if cached else os.path.basename(os.path.abspath(where))
    if base in preset_names():
        return base
    if base in HUGGING_FACE_NAMES:
        return HUGGING_FACE_NAMES[base]
    return EMBEDDED if _has_embedded_weights(source.path) else None


def _claim_of_address(where: str) -> str | None:
    for name, (_, address) in PUBLISHED.items():
        if where.startswith(address.rpartition("/")[0]) and where.rstrip("/0123456789") == address.rstrip("/0123456789"):
            return name
    model = re.fullmatch(r"hf://google/([^/@]+)(@[^/]+)?", where)
    return HUGGING_FACE_NAMES.get(model[1]) if model else None


def _has_embedded_weights(folder: str) -> bool:
    name, size = EMBEDDED_WEIGHTS
    path = os.path.join(folder, name)
    return os.path.isfile(path) and os.path.getsize(path) == size and sha256(path) == EMBEDDED_FILES[name]
