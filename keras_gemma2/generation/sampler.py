"""The samplers of a batch as arrays, and the choice of its next tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.generation.drawing import draw, log_probability, most_likely, uniforms
from keras_gemma2.generation.filters import IN_PROMPT, mark, penalized, warped
from keras_gemma2.generation.sampler_settings import LogitsProcessor, Sampler, processor_name

__all__ = [
    "Plan",
    "PlanKey",
    "Sampler",
    "choose",
    "choose_on_host",
    "draw",
    "initial_marks",
    "log_probability",
    "mark",
    "plan",
    "probabilities",
    "uniforms",
]
_SMALLEST = np.finfo("float32").tiny


class PlanKey(NamedTuple):
    """What compiled code differs in: whether any row draws, is greedy, is penalized, is biased."""

    sampled: bool
    greedy: bool
    penalized: bool
    biased: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """A batch's samplers.

    key: static switches.
    arrays: name -> numpy, one entry a row. `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`,
        `presence_penalty` float32 `[B]`, `greedy` bool `[B]`, `bias` float32 `[B, V]` if `key.biased`. Filters that are off have
        an infinite `top_k` or `top_p`, or a `min_p` of 0.
    processors: a callable or None for each row.
    """

    key: PlanKey
    arrays: dict[str, np.ndarray]
    processors: tuple[LogitsProcessor | None, ...]

    @property
    def on_host(self) -> bool:
        """Whether a row has a processor, so that `choose_on_host` must choose."""
        return any(processor is not None for processor in self.processors)


def plan(samplers: Sequence[Sampler], vocabulary_size: int) -> Plan:
    """Lays out samplers, one a row.

    Args:
        samplers: at least one.
        vocabulary_size: of the logits (V).

    Raises:
        ValueError: if there is none, if something is no Sampler, if a `logit_bias` names an id outside the vocabulary or bans all
            tokens.

    Example:
        >>> plan([Sampler(temperature=0), Sampler(top_k=40)], 256000).key
        PlanKey(sampled=True, greedy=True, penalized=False, biased=False)
    """
    if not samplers or not all(isinstance(sampler, Sampler) for sampler in samplers):
        raise ValueError(f"`samplers` must hold one keras_gemma2.Sampler for each row. Received: {samplers!r}.")
    for sampler in samplers:
        check_bias(sampler, vocabulary_size)
    greedy = np.array([sampler.temperature == 0 for sampler in samplers])
    # Greedy rows of a sampled batch run along with the filters off.
    top_k = [sampler.top_k or vocabulary_size for sampler in samplers]
    top_p = _column(samplers, "top_p", 1.0)
    arrays = {
        "greedy": greedy,
        "temperature": np.where(greedy, 1.0, np.maximum(_column(samplers, "temperature"), _SMALLEST)),
        "top_k": np.where(greedy | (np.array(top_k, "float64") >= vocabulary_size), np.inf, top_k),
        "top_p": np.where(greedy | (top_p >= 1), np.inf, np.maximum(top_p, _SMALLEST)),
        "min_p": np.where(greedy, 0.0, _column(samplers, "min_p", 0.0)),
        "repetition_penalty": np.maximum(_column(samplers, "repetition_penalty"), _SMALLEST),
        "presence_penalty": _column(samplers, "presence_penalty"),
    }
    arrays = {name: array if name == "greedy" else array.astype("float32") for name, array in arrays.items()}
    is_penalized = any(sampler.repetition_penalty != 1 or sampler.presence_penalty != 0 for sampler in samplers)
    is_biased = any(sampler.logit_bias for sampler in samplers)
    if is_biased:
        arrays["bias"] = _bias_rows(samplers, vocabulary_size)
    key = PlanKey(bool((~greedy).any()), bool(greedy.any()), is_penalized, is_biased)
    return Plan(key, arrays, tuple(sampler.logits_processor for sampler in samplers))


def _column(samplers: Sequence[Sampler], name: str, instead_of_none: float | None = None) -> np.ndarray:
    values = [getattr(sampler, name) for sampler in samplers]
    return np.array([instead_of_none if value is None else value for value in values], "float32")


def _bias_rows(samplers: Sequence[Sampler], vocabulary_size: int) -> np.ndarray:
    rows = np.zeros((len(samplers), vocabulary_size), "float32")
    for row, sampler in zip(rows, samplers):
        if sampler.logit_bias:
            row[list(sampler.logit_bias)] = list(sampler.logit_bias.values())
    return rows


def check_bias(sampler: Sampler, vocabulary_size: int) -> None:
    """Raises a ValueError if a sampler's `logit_bias` names an id outside the vocabulary, or bans all tokens."""
    bias = sampler.logit_bias or {}
    outside = [token_id for token_id in bias if token_id >= vocabulary_size]
    if outside:
        raise ValueError(
            f"`logit_bias` must have token ids in [0, {vocabulary_size}) as keys, the vocabulary of this model. "
            f"Received: {outside[:5]}."
        )
    if len(bias) == vocabulary_size and all(value == -np.inf for value in bias.values()):
        raise ValueError("`logit_bias` must leave at least one token. Received: -inf for the whole vocabulary.")


def initial_marks(plan: Plan, prompts: Sequence[Sequence[int]], vocabulary_size: int) -> np.ndarray:
    """Which tokens the prompts hold: int8 `[B, V]` with 1 there, or `[B, 1]` of zeros where no row is penalized."""
    marks = np.zeros((len(prompts), vocabulary_size if plan.key.penalized else 1), "int8")
    if plan.key.penalized:
        for row, prompt in zip(marks, prompts):
            row[np.asarray(prompt, "int64")] = IN_PROMPT
    return marks


def choose(key: PlanKey, arrays: Mapping[str, Any], marks: Any, logits: Any, uniforms: Any) -> tuple[Any, Any]:
    """Chooses the next token of each row; inside compiled code, where only `key` is static.

    Args:
        key: of the plan.
        arrays: of the plan, as tensors.
        marks: int8, from `initial_marks` or the step before.
        logits: float32 `[B, V]`.
        uniforms: float32 `[B]`, in [0, 1); greedy rows do not read theirs.

    Returns:
        int32 `[B]` tokens, -1 for a row whose logits hold NaN or +inf, or -inf only; and the marks with the tokens in.
    """
    tokens = _choose_penalized(key, arrays, penalized(key, arrays, marks, logits), uniforms)
    return tokens, mark(key, marks, tokens)


def _choose_penalized(key: PlanKey, arrays: Mapping[str, Any], logits: Any, uniforms: Any) -> Any:
    if not key.sampled:
        return most_likely(logits)
    tokens = draw(warped(arrays, logits), uniforms)
    return ops.where(arrays["greedy"], most_likely(logits), tokens) if key.greedy else tokens


def probabilities(key: PlanKey, arrays: Mapping[str, Any], marks: Any, logits: Any) -> Any:
    """The distribution that `choose` draws from, after all filters: float32 `[B, V]`, 1 at one token for greedy rows.

    Rows for which `choose` gives -1 are NaN.
    """
    logits = penalized(key, arrays, marks, logits)
    index, token = ops.arange(logits.shape[-1], dtype="int32")[None], most_likely(logits)[:, None]
    certain = ops.where(token < 0, np.float32(np.nan), ops.cast(index == token, "float32"))
    if not key.sampled:
        return certain
    weights = warped(arrays, logits)
    shares = weights / ops.sum(weights, axis=-1, keepdims=True)
    return ops.where(arrays["greedy"][:, None], certain, shares) if key.greedy else shares


def choose_on_host(
    plan: Plan, token_ids: Sequence[Any], marks: Any, logits: Any, uniforms: Any, open_rows: Sequence[bool] | None = None
) -> tuple[np.ndarray, Any]:
    """`choose` with the rows' processors, which run here in between.

    Args:
        plan: from `plan`.
        token_ids: the ids of each row so far, prompt and generated.
        marks, logits, uniforms: as for `choose`.
        open_rows: the rows whose processors run, `[B]`; None for all.

    Returns:
        numpy int32 `[B]` and the marks. A row of unusable logits gets -1, and its processor does not see it.

    Raises:
        ValueError: if a processor returns another shape or dtype, a NaN or +inf, or -inf for all tokens.
    """
    arrays = {name: ops.convert_to_tensor(array) for name, array in plan.arrays.items()}
    before, after = _compiled(plan.key)
    marks, uniforms = ops.convert_to_tensor(marks), ops.convert_to_tensor(uniforms, dtype="float32")
    changed = np.array(ops.convert_to_numpy(before((), arrays, marks, ops.convert_to_tensor(logits))))
    for row, processor in enumerate(plan.processors):
        is_asked = processor is not None and (open_rows is None or open_rows[row])
        if is_asked and np.isfinite(np.max(changed[row])):  # NaN if there is any
            changed[row] = _run(processor, np.array(token_ids[row], "int64"), changed[row])
    tokens, marks = after((), arrays, marks, ops.convert_to_tensor(changed), uniforms)
    return ops.convert_to_numpy(tokens), marks


@functools.lru_cache
def _compiled(key: PlanKey) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What comes before the processors and what comes after them; nothing is donated and no variable is read."""

    def before(unused: tuple[()], arrays: Mapping[str, Any], marks: Any, logits: Any) -> Any:
        return penalized(key, arrays, marks, logits)

    def after(unused: tuple[()], arrays: Mapping[str, Any], marks: Any, logits: Any, uniforms: Any) -> tuple[Any, Any]:
        tokens = _choose_penalized(key, arrays, logits, uniforms)
        return tokens, mark(key, marks, tokens)

    return backend.compile_function(before, []), backend.compile_function(after, [])


def _run(processor: LogitsProcessor, token_ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
    name, returned = processor_name(processor), processor(token_ids, logits)
    if not isinstance(returned, np.ndarray) or returned.shape != logits.shape or returned.dtype != np.float32:
        kind = f"{returned.dtype} {list(returned.shape)}" if isinstance(returned, np.ndarray) else type(returned).__name__
        raise ValueError(f"The logits_processor {name} must return a numpy array, float32 {list(logits.shape)}. Received: {kind}.")
    largest = returned.max()
    if not np.isfinite(largest):
        found = "NaN" if np.isnan(largest) else "+inf" if largest > 0 else "-inf for all tokens"
        raise ValueError(
            f"The logits_processor {name} must return logits that are finite, or -inf for some tokens only. Received: {found}."
        )
    return returned
