"""Checks of a checkpoint's files: are all there, and are they the ones that were published?"""

from __future__ import annotations

import hashlib
import os
import re

from keras_gemma2.checkpoints.source import FLAX, GEMMA_PYTORCH, GGUF, HUGGING_FACE, KERAS, KERAS_HUB
from keras_gemma2.presets.hub_files import KERAS_WEIGHTS, SAFETENSORS, shard_names
from keras_gemma2.presets.registry import EMBEDDED
from keras_gemma2.presets.verify_known import EMBEDDED_FILES, KNOWN_FILES
from keras_gemma2.presets.verify_subject import Result, Subject, failed, ok, sha256, skipped

_KINDS = {
    HUGGING_FACE: "a Hugging Face folder",
    KERAS: "a preset of this package",
    KERAS_HUB: "a keras-hub preset",
    GEMMA_PYTORCH: "a gemma_pytorch checkpoint",
    FLAX: "a Flax checkpoint",
    GGUF: "a GGUF file",
}
_GIT_HASH, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


def check_files(subject: Subject) -> Result:
    """Every file that an index names, or that the embedded preset has, is there; none is empty."""
    files = {name: os.path.getsize(path) for name, path in subject.files()}
    indexes = [name for name in (SAFETENSORS[0], KERAS_WEIGHTS[0]) if name in files]
    expected = set(EMBEDDED_FILES) if _is_embedded_copy(subject) and not indexes else set()
    for index in indexes:
        expected |= set(shard_names(os.path.join(subject.source.path, index)))
    missing = sorted(expected - set(files))
    empty = sorted(name for name, size in files.items() if not size)
    found = f"{_KINDS[subject.source.kind]}: {len(files)} files, {sum(files.values()):,} bytes"
    if missing:
        return failed(f"{found}; missing: {', '.join(missing)}. Download them.")
    return failed(f"{found}; empty: {', '.join(empty)}. Download them again.") if empty else ok(found)


def check_hashes(subject: Subject) -> Result:
    """The SHA-256 of each file, beside the known one.

    Known are those of the embedded preset, and those that huggingface_hub noted when it downloaded a file: the name of the
    blob that its cache links to, or the second line of `.cache/huggingface/download/NAME.metadata`. For files in git it is
    git's own hash.
    """
    matched, wrong, unknown = [], [], []
    for name, path in subject.files():
        found = sha256(path)
        expected = _expected_hash(subject, name, path)
        if expected is None:
            unknown.append(f"{name}: sha256 {found}" + (f", {KNOWN_FILES[found]}" if found in KNOWN_FILES else ", no known hash"))
        elif expected == (found if _SHA256.fullmatch(expected) else _git_hash(path)):
            matched.append(name)
        else:
            wrong.append(f"{name}: sha256 {found}, expected {expected}")
    if wrong:
        names = ", ".join(line.partition(":")[0] for line in wrong)
        return failed(f"not the published bytes: {names}. Download again what was not changed on purpose.", tuple(wrong))
    if not matched and not any(found in line for line in unknown for found in KNOWN_FILES):
        return skipped("no known hashes; a download by huggingface_hub keeps them beside the files", tuple(unknown))
    return ok(f"{len(matched)} files are the published bytes: {', '.join(matched)}" if matched else "known by hash", tuple(unknown))


def _expected_hash(subject: Subject, name: str, path: str) -> str | None:
    if _is_embedded_copy(subject) and name in EMBEDDED_FILES:
        return EMBEDDED_FILES[name]
    blob = os.path.realpath(path)
    if os.path.islink(path) and os.path.basename(os.path.dirname(blob)) == "blobs":
        return _as_hash(os.path.basename(blob))
    if not subject.is_folder:
        return None
    metadata = os.path.join(subject.source.path, ".cache", "huggingface", "download", *f"{name}.metadata".split("/"))
    if not os.path.isfile(metadata):
        return None
    with open(metadata, encoding="utf-8", errors="replace") as file:
        lines = file.read(4096).splitlines()  # commit, etag, time
    return _as_hash(lines[1].strip()) if len(lines) > 1 else None


def _is_embedded_copy(subject: Subject) -> bool:
    """Whether this should be the embedded preset's own files, and not another format's."""
    return subject.claim == EMBEDDED and subject.source.kind == HUGGING_FACE


def _as_hash(etag: str) -> str | None:
    return etag if _SHA256.fullmatch(etag) or _GIT_HASH.fullmatch(etag) else None


def _git_hash(path: str) -> str:
    """How git names a file's content (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects)."""
    digest = hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
