"""Checks that load the model and run it: logits, transformers' beside them, perplexity, greedy text."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import time
from typing import Any

from keras_gemma2.presets.registry import EMBEDDED, preset_names
from keras_gemma2.presets.verify_known import (
    BITS_PER_BYTE_TOLERANCE,
    CONTINUATIONS,
    EMBEDDED_BITS_PER_BYTE,
    PRETRAINED,
    TEXT,
    Continuation,
)
from keras_gemma2.presets.verify_running import (
    compute_dtype,
    float32_logits,
    hugging_face_folder,
    itemsize,
    load,
    logits_of,
    memory_lacking,
    nats,
    probe,
    transformers_logits,
)
from keras_gemma2.presets.verify_subject import Result, Subject, failed, ok, skipped

# Of the logits' range. Two correct float32 implementations differ by the order of their sums: under 5e-6 in all parity tests;
# a wrong formula moves logits by 1e-3 and more.
_PARITY = 2e-5
_TRANSFORMERS_MAJOR = 5


def check_model(subject: Subject) -> Result:
    """The model loads, and its logits on a text are finite, differ, and stay below the soft cap."""
    import keras
    import numpy as np

    config = subject.source.config
    short = memory_lacking(config, itemsize(subject))
    if short is not None:
        return skipped(f"loading needs {short}")
    start = time.perf_counter()
    subject.lm = load(subject, subject.dtype)
    seconds = time.perf_counter() - start
    logits = logits_of(subject.lm, probe(subject))
    policy = subject.lm.backbone.dtype_policy.name
    found = (
        f"loaded in {seconds:.1f} s on {keras.backend.backend()} in {policy}; logits from {logits.min():.3f} to {logits.max():.3f}"
    )
    if not np.isfinite(logits).all():
        return failed(f"{found}: they must be finite")
    if logits.max() == logits.min():
        return failed(f"{found}: they are all equal")
    cap = config.final_logit_soft_cap
    if cap is not None and np.abs(logits).max() > cap:
        return failed(f"{found}: the config caps them at {cap:g}")
    return ok(found)


def check_transformers(subject: Subject) -> Result:
    """Logits of the same token ids in float32, beside those of transformers' own Gemma 2."""
    import numpy as np

    missing = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        return skipped(f"{' and '.join(missing)} not installed; install with: pip install transformers torch")
    version = importlib.metadata.version("transformers")
    if int(version.partition(".")[0]) < _TRANSFORMERS_MAJOR:
        return skipped(f"transformers {version} is too old; install with: pip install -U transformers")
    if subject.lm is None:
        return skipped("the model is not loaded")
    short = memory_lacking(subject.source.config, 4, on_host=True)
    if short is not None:
        return skipped(f"both models in float32, one after the other, need {short}")
    token_ids = probe(subject)
    ours = float32_logits(subject, token_ids)
    with hugging_face_folder(subject) as folder:
        if isinstance(folder, Result):
            return folder
        theirs = transformers_logits(folder, token_ids)
    share = np.abs(ours - theirs).max() / np.ptp(theirs)
    found = f"largest difference to transformers {version} is {share:.1e} of the logits' range, {len(token_ids)} tokens in float32"
    if not share <= _PARITY:  # NaN is a failure too
        return failed(f"{found}; at most {_PARITY:.0e} comes of rounding")
    return ok(found)


def check_perplexity(subject: Subject) -> Result:
    """How well the model foretells a fixed text, after `<bos>` and without it."""
    reason = _no_text(subject)
    if reason:
        return skipped(reason)
    tokenizer = subject.lm.preprocessor.tokenizer
    token_ids = [int(i) for i in tokenizer(TEXT)]
    if len(token_ids) + 1 > subject.source.config.max_sequence_length:
        return skipped(f"the text has {len(token_ids)} tokens, the model's context {subject.source.config.max_sequence_length}")
    whole = nats(subject.lm, [tokenizer.start_token_id, *token_ids])
    bits, perplexity = whole.sum() / math.log(2) / len(TEXT.encode()), math.exp(min(whole.mean(), 700))
    without = math.exp(min(nats(subject.lm, token_ids).mean(), 700))
    found = f"{bits:.5f} bits per byte; perplexity {perplexity:.2f} a token, {without:.2f} without <bos>"
    if not math.isfinite(bits):
        return failed(f"{found}: it must be finite")
    if subject.claim == EMBEDDED:
        tolerance = BITS_PER_BYTE_TOLERANCE[compute_dtype(subject.lm)]
        close = abs(bits - EMBEDDED_BITS_PER_BYTE) <= tolerance
        return (ok if close else failed)(f"{found}; {EMBEDDED} has {EMBEDDED_BITS_PER_BYTE} within {tolerance:g}")
    if subject.claim in PRETRAINED:
        better = bits < EMBEDDED_BITS_PER_BYTE
        return (ok if better else failed)(f"{found}; {subject.claim} must be below {EMBEDDED_BITS_PER_BYTE}, {EMBEDDED}'s")
    return skipped(f"{found}; nothing is known to compare with{_how_to_claim(subject)}")


def check_greedy(subject: Subject) -> Result:
    """Greedy continuations, beside those on record for the published model."""
    records = [record for record in CONTINUATIONS if record.model == subject.claim]
    if not records:
        return skipped(f"no continuations are on record for this model{_how_to_claim(subject)}")
    reason = _no_text(subject)
    if reason:
        return skipped(reason)
    other = subject.has_failed("config", "vocabulary")
    if other:
        return skipped(f"it is not {subject.claim}: the check {other!r} failed")
    subject.lm.compile(sampler="greedy")
    run = [record for record in records if subject.long or not record.long]
    texts = {record: _continue(subject.lm, record) for record in run}
    wrong = [record for record in run if texts[record] not in record.texts]
    left = "".join(f"; not run: {r.prompt[:24]!r}... of {len(r.prompt):,} characters (--long)" for r in records if r not in run)
    details = tuple(
        f"{record.prompt[-32:]!r} -> {texts[record]!r}, on record {' or '.join(map(repr, record.texts))} ({record.source})"
        for record in wrong
    )
    faults = [record for record in wrong if record.agreed and _is_judged(subject, record)]
    if faults:
        return failed(f"{len(faults)} of {len(run)} continuations are not those on record{left}", details)
    if wrong and len(wrong) == len(run):
        return skipped(f"the continuations differ from the record, which was made in float32; pass --dtype float32{left}", details)
    told = f"; {len(wrong)} differ that depended on hardware or dtype when they were recorded" if wrong else ""
    return ok(f"{len(run) - len(wrong)} of {len(run)} continuations are those on record{told}{left}", details)


def _is_judged(subject: Subject, record: Continuation) -> bool:
    """Rounding may turn the embedded preset's text, whose record is float32's; the others were recorded in 16 bits."""
    return record.model != EMBEDDED or compute_dtype(subject.lm) == "float32"


def _continue(lm: Any, record: Continuation) -> str:
    length = 1 + len(lm.preprocessor.tokenizer(record.prompt)) + record.new_tokens
    return lm.generate(record.prompt, max_length=length, strip_prompt=True)


def _no_text(subject: Subject) -> str | None:
    if subject.lm is None:
        return "the model is not loaded"
    return "the model has no tokenizer" if subject.lm.preprocessor is None else None


def _how_to_claim(subject: Subject) -> str:
    return "" if subject.claim else f"; say what it should be with --as ({', '.join(preset_names()[:3])}, ...)"
