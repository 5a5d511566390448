"""`verify`: is this checkpoint what it says it is, and does it work here?

Checks are made in order, the cheap ones first, each on its own: one that fails, or cannot be made, stops no other.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from keras_gemma2.errors import CheckpointError, HubError
from keras_gemma2.presets import hub
from keras_gemma2.presets.registry import preset_names, resolve
from keras_gemma2.presets.verify_subject import FAILED, OK, SKIPPED, Result, Subject, claim_of, failed, skipped

__all__ = ["CHECKS", "FAILED", "OK", "SKIPPED", "Result", "summary", "verify"]

# Each check and the module that makes it, as its `check_NAME(subject) -> Result`.
CHECKS = {
    "files": "keras_gemma2.presets.verify_files",
    "hashes": "keras_gemma2.presets.verify_files",
    "config": "keras_gemma2.presets.verify_weights",
    "parameters": "keras_gemma2.presets.verify_weights",
    "weights": "keras_gemma2.presets.verify_weights",
    "vocabulary": "keras_gemma2.presets.verify_weights",
    "model": "keras_gemma2.presets.verify_model",
    "transformers": "keras_gemma2.presets.verify_model",
    "perplexity": "keras_gemma2.presets.verify_model",
    "greedy": "keras_gemma2.presets.verify_model",
}
NEED_MODEL = ("model", "transformers", "perplexity", "greedy")


def verify(
    where: str | os.PathLike[str],
    dtype: str | None = None,
    claim: str | None = None,
    skip: Sequence[str] = (),
    long: bool = False,
    report: Callable[[Result], Any] | None = None,
) -> list[Result]:
    """Checks a checkpoint of any format that `from_preset` reads.

    Args:
        where: a built-in name, a hub's address, a folder or a file.
        dtype: to load the model in; default its own.
        claim: the built-in name of the published model it should be. None takes it from `where`, if that names one; a model
            that claims nothing is held to what holds for every Gemma 2.
        skip: names in `CHECKS` that are not made. Those of `NEED_MODEL` build a model; without "model" the others of them
            are skipped too.
        long: whether to run what takes minutes on a CPU: the recorded continuation of 4,806 tokens.
        report: called with each result as it is there.

    Returns:
        One result a check, in order; "skipped" for what could not be judged, with the reason.

    Raises:
        CheckpointError: if `where` names nothing.
        HubError: if a hub does not give the files.
        ValueError: for an unknown claim, check or dtype.

    Example:
        >>> verify("gemma2_mini_en", skip=NEED_MODEL)[2].verdict
        'ok'
    """
    where = os.fspath(where)
    _check_arguments(dtype, claim, skip)
    try:
        source, error = resolve(where, hub.WEIGHTS), None
    except HubError:
        raise
    except CheckpointError as unreadable:
        if not os.path.exists(where):
            raise
        source, error = None, unreadable
    subject = Subject(where, source, None if source is None else claim or claim_of(where, source), dtype, long)
    for name in CHECKS:
        result = _unreadable(name, error) if error else _make(name, subject, skip)
        subject.results[name] = dataclasses.replace(result, name=name)
        if report is not None:
            report(subject.results[name])
    return list(subject.results.values())


def summary(where: str, results: Sequence[Result]) -> str:
    """One line that counts the verdicts and names what failed."""
    failures = [result.name for result in results if result.verdict == FAILED]
    counts = ", ".join(f"{sum(r.verdict == verdict for r in results)} {verdict}" for verdict in (OK, SKIPPED))
    return f"{where}: {counts}, {len(failures)} FAILED{': ' + ', '.join(failures) if failures else ''}"


def _check_arguments(dtype: str | None, claim: str | None, skip: Sequence[str]) -> None:
    if claim is not None and claim not in preset_names():
        raise ValueError(f"`claim` must be one of {preset_names()}. Received: {claim!r}.")
    unknown = sorted(set(skip) - set(CHECKS))
    if unknown:
        raise ValueError(f"`skip` must name checks among {list(CHECKS)}. Received: {unknown}.")
    if dtype is not None and "model" not in skip:
        import keras

        keras.dtype_policies.get(dtype)  # raises ValueError for what is none


def _unreadable(name: str, error: CheckpointError) -> Result:
    return failed(str(error)) if name == "files" else skipped("the checkpoint cannot be read")


def _make(name: str, subject: Subject, skip: Sequence[str]) -> Result:
    """A check's result. Whatever it raises is a finding: the report goes on, and the others are made."""
    if name in skip:
        return skipped("left out, as asked")
    try:
        return getattr(importlib.import_module(CHECKS[name]), f"check_{name}")(subject)
    except (ValueError, OSError) as error:  # CheckpointError among them: they say what is wrong in their own words
        return failed(str(error))
    except ImportError as error:  # a format's library, named with the way to install it
        return skipped(str(error))
    except MemoryError:
        return skipped("out of memory; use a larger machine, or --quick")
    except Exception as error:
        return failed(f"{type(error).__name__}: {error}")
