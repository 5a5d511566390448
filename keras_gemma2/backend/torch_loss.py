"""PyTorch: a loss over chunks of rows, with its gradient from the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.backend.common.variables import AutocastScope


def sums_in_chunks(
    head: Callable,
    cap: float | None,
    variables: list[keras.Variable],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    rows: int,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of rows that a head makes logits of, a chunk of rows at a time.

    Args:
        head: `[n, D] -> float32 [n, V]`, reading the variables.
        cap: soft cap on the logits; None for none.
        variables: what the head reads; those that are trainable get gradients.
        hidden: `[N, D]`.
        labels: int32 `[N]`.
        weights: float32 `[N]`. Rows with weight 0 are in no chunk, but for the few that fill the last one.
        rows: of a chunk.
        training: whether gradients will be asked for.

    Returns:
        The weighted sum of negative log-likelihoods, and the weight of rows whose label has the largest logit. The first can be
        differentiated, once, with respect to `hidden` and the variables.
    """
    with AutocastScope(None):
        trained = [variable.value for variable in variables if variable.trainable]
    if not torch.is_grad_enabled():
        trained = []
    return _Sums.apply(head, cap, rows, training, hidden, labels, weights, *trained)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Callable, cap: float | None, rows: int, training: bool, hidden, labels, weights, *tables) -> Any:
        counted = torch.nonzero(weights).flatten()
        differentiated = [hidden, *tables] if training else []
        asked = [bool(training and needed) for needed in (ctx.needs_input_grad[4], *ctx.needs_input_grad[7:])]
        gradients = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t, a in zip(differentiated, asked) if a]
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        for index in counted.split(rows) if len(counted) else ():
            chunk = hidden[index].detach()
            with torch.set_grad_enabled(any(asked)), AutocastScope(None):
                logits = head(chunk.requires_grad_(asked[0]))
            loss, correct, upstream = _terms(logits.detach(), labels[index], weights[index], cap, any(asked))
            sums += torch.stack([loss, correct])
            if any(asked):
                wanted = [t for t, a in zip([chunk, *tables], asked) if a]
                found = list(torch.autograd.grad(logits, wanted, upstream))
                if asked[0]:
                    gradients[0][index] = found[0].float()
                for total, more in zip(gradients[asked[0] :], found[asked[0] :]):
                    total += more
                del found
            del logits, upstream  # or they are in memory beside the next chunk's
        ctx.asked, ctx.gradients, ctx.dtypes = asked, gradients, [t.dtype for t in (hidden, *tables)]
        return sums[0], sums[1]

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor, of_correct: torch.Tensor) -> tuple:
        gradients = iter(ctx.gradients)
        found = [(of_loss * next(gradients)).to(dtype) if asked else None for asked, dtype in zip(ctx.asked, ctx.dtypes)]
        return None, None, None, None, found[0], None, None, *found[1:]


def _terms(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, cap: float | None, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`loss_terms.chunk_terms` in two buffers of the logits' size, of which the logits' own is one; they are overwritten."""
    capped = logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
    known = (labels >= 0) & (labels < logits.shape[-1])
    labels = torch.where(known, labels, 0).long()[:, None]
    highest = capped.amax(dim=-1, keepdim=True)
    label_logits = capped.gather(-1, labels)
    gradient = (capped - highest).exp_()
    total = gradient.sum(dim=-1, keepdim=True)
    nll = torch.where(known, (total.log() + highest - label_logits)[:, 0], torch.nan)
    right = label_logits[:, 0] >= highest[:, 0]
    sums = torch.dot(nll, weights), torch.dot(right.to(weights.dtype), weights)
    if not differentiate:
        return *sums, None
    gradient.div_(total).scatter_add_(-1, labels, torch.full_like(label_logits, -1.0))
    if cap is not None:
        gradient.mul_(capped.div_(cap).square_().neg_().add_(1.0))
    return *sums, gradient.mul_(weights[:, None])
