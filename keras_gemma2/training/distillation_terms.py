"""The distance to a teacher's distribution, of a chunk of tokens: what `Distiller` gives `backend.sums_in_chunks`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

SUMS = ("loss", "kl", "nll", "correct")


@dataclasses.dataclass(frozen=True)
class DistillationTerms:
    """`alpha * t^2 KL(teacher || student) + (1 - alpha) * cross-entropy to the labels`, with its gradient.

    Both distributions of the first term are those of capped logits divided by the temperature t; its square keeps the gradient's
    size (Hinton et al., arXiv 1503.02531, section 2). With alpha 1 and t 1 the gradient is that of the cross-entropy to the
    teacher's distribution, which Gemma 2 was trained with (arXiv 2408.00118, section 3.2).

    Args:
        cap: of the student's logits; None for none.
        temperature: t.
        alpha: the share of the first term.
        teacher: gives, for what a chunk's targets hold beside the labels, the teacher's log-probabilities float32 `[n, V]`; None if
            those targets are the teacher's likeliest tokens int32 `[n, k]` and their probabilities `[n, k]`. What is left of 1
            counts as one outcome, "another token": the student is free in how it shares that out.
    """

    cap: float | None
    temperature: float
    alpha: float
    teacher: Callable[..., Any] | None = None

    def __call__(self, logits: Any, targets: Sequence[Any], weights: Any, differentiate: bool) -> tuple[tuple[Any, ...], Any]:
        """The sums of `SUMS`, each weighted, and the gradient of the first; as `backend.sums_in_chunks` asks for.

        Args:
            logits: float32 `[n, V]`, the student's, before the soft cap.
            targets: labels int32 `[n]`, and what tells of the teacher.
            weights: float32 `[n]`.
            differentiate: whether the gradient is wanted.
        """
        labels, *of_teacher = targets
        capped = logits if self.cap is None else self.cap * ops.tanh(logits / self.cap)
        nll, right, to_labels = _label_terms(capped, labels)
        log_probs = ops.log_softmax(capped / self.temperature, axis=-1)
        compare = _to_likeliest if self.teacher is None else _to_distribution
        if self.teacher is not None:
            of_teacher = [self.teacher(*of_teacher)]
        kl, to_teacher = compare(log_probs, *of_teacher)

        t, alpha = self.temperature, self.alpha
        counts = weights != 0
        loss = alpha * t**2 * kl + (1.0 - alpha) * nll if alpha < 1 else t**2 * kl
        sums = tuple(ops.sum(ops.where(counts, values * weights, 0.0)) for values in (loss, kl, nll, right))
        if not differentiate:
            return sums, None
        gradient = alpha * t * to_teacher  # t^2 of the loss, 1 / t of the logits
        if alpha < 1:
            gradient = gradient + (1.0 - alpha) * to_labels()
        if self.cap is not None:
            gradient = gradient * (1.0 - ops.square(capped / self.cap))
        return sums, ops.where(counts[:, None], gradient * weights[:, None], 0.0)


def _label_terms(capped: Any, labels: Any) -> tuple[Any, Any, Callable[[], Any]]:
    """Negative log-likelihoods `[n]`, which labels are right `[n]`, and a function that gives the first one's gradient `[n, V]`."""
    known = ops.logical_and(labels >= 0, labels < capped.shape[-1])
    inside = ops.where(known, labels, 0)[:, None]
    label_logits = ops.take_along_axis(capped, inside, axis=-1)
    nll = ops.where(known, (ops.logsumexp(capped, axis=-1, keepdims=True) - label_logits)[:, 0], float("nan"))
    right = ops.cast(label_logits[:, 0] >= ops.max(capped, axis=-1), "float32")

    def gradient() -> Any:
        is_label = ops.arange(capped.shape[-1], dtype="int32")[None] == inside
        return ops.softmax(capped, axis=-1) - ops.cast(is_label, "float32")

    return nll, right, gradient


def _to_distribution(log_probs: Any, of_teacher: Any) -> tuple[Any, Any]:
    """KL divergences `[n]` of a whole distribution, and their gradient `[n, V]` with respect to the student's divided logits."""
    teacher = ops.exp(of_teacher)
    kl = ops.sum(ops.where(teacher > 0, teacher * (of_teacher - log_probs), 0.0), axis=-1)
    return kl, ops.exp(log_probs) - teacher


def _to_likeliest(log_probs: Any, token_ids: Any, probabilities: Any) -> tuple[Any, Any]:
    """As `_to_distribution`, for the teacher's likeliest tokens and one outcome more, all others together."""
    top = ops.cast(probabilities, "float32")
    rest = ops.maximum(1.0 - ops.sum(top, axis=-1, keepdims=True), 0.0)
    total = ops.sum(top, axis=-1, keepdims=True) + rest  # probabilities are stored rounded, so it can be a little over 1
    top, rest = top / total, rest / total
    of_top = ops.take_along_axis(log_probs, token_ids, axis=-1)
    places = _places(token_ids)

    def put(array: Any, values: Any) -> Any:
        return ops.scatter_update(array, places, ops.reshape(values, (-1,)))

    others = put(ops.exp(log_probs), ops.zeros_like(of_top))  # the student's, which `1 - sum` would leave few digits of
    rest_of_student = ops.sum(others, axis=-1, keepdims=True)
    divisor = ops.maximum(rest_of_student, keras.config.epsilon() ** 4)
    kl = ops.sum(ops.where(top > 0, top * (ops.log(ops.where(top > 0, top, 1.0)) - of_top), 0.0), axis=-1)
    ratio = ops.where(rest > 0, rest / divisor, 1.0)
    kl = kl + ops.where(rest > 0, rest * ops.log(ratio), 0.0)[:, 0]
    return kl, put(others * (1.0 - rest / divisor), ops.exp(of_top) - top)


def _places(token_ids: Any) -> Any:
    """Where `[n, k]` ids are in `[n, V]`: int32 `[n * k, 2]`."""
    rows = ops.broadcast_to(ops.arange(ops.shape(token_ids)[0], dtype="int32")[:, None], ops.shape(token_ids))
    return ops.reshape(ops.stack([rows, ops.cast(token_ids, "int32")], axis=-1), (-1, 2))
