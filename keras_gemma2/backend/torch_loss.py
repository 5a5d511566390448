"""PyTorch: a loss over chunks of rows, with its gradient from the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.backend.common.variables import AutocastScope


def sums_in_chunks(
    head: Callable,
    terms: Callable,
    count: int,
    variables: list[keras.Variable],
    hidden: torch.Tensor,
    targets: tuple[torch.Tensor, ...],
    weights: torch.Tensor,
    rows: int,
    training: bool,
) -> tuple[torch.Tensor, ...]:
    """Sums over rows of losses of the logits that a head makes of them, a chunk of rows at a time.

    Args:
        head: `[n, D] -> float32 [n, V]`, reading the variables.
        terms: gives, for logits `[n, V]` (which it may overwrite), the chunk's targets and weights, and whether the gradient is
            wanted, float32 scalars, and the gradient `[n, V]` of the first with respect to the logits, or None.
        count: of those scalars.
        variables: what head and terms read; those that are trainable get gradients.
        hidden: `[N, D]`.
        targets: each `[N, ...]`.
        weights: float32 `[N]`. Rows with weight 0 are in no chunk, but for the few that fill the last one.
        rows: of a chunk.
        training: whether gradients will be asked for.

    Returns:
        The scalars, summed over chunks. The first can be differentiated, once, with respect to `hidden` and the variables.
    """
    with AutocastScope(None):
        trained = [variable.value for variable in variables if variable.trainable]
    if not torch.is_grad_enabled():
        trained = []
    return _Sums.apply(head, terms, count, rows, training, hidden, tuple(targets), weights, *trained)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head, terms, count: int, rows: int, training: bool, hidden, targets, weights, *tables) -> Any:
        counted = torch.nonzero(weights).flatten()
        differentiated = [hidden, *tables] if training else []
        asked = [bool(training and needed) for needed in (ctx.needs_input_grad[5], *ctx.needs_input_grad[8:])]
        gradients = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t, a in zip(differentiated, asked) if a]
        sums = torch.zeros(count, dtype=torch.float32, device=hidden.device)
        for index in counted.split(rows) if len(counted) else ():
            chunk = hidden[index].detach()
            with torch.set_grad_enabled(any(asked)), AutocastScope(None):
                logits = head(chunk.requires_grad_(asked[0]))
            with AutocastScope(None):
                more, upstream = terms(logits.detach(), [target[index] for target in targets], weights[index], any(asked))
            sums += torch.stack(more)
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
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, of_first: torch.Tensor, *of_others: torch.Tensor) -> tuple:
        gradients = iter(ctx.gradients)
        found = [(of_first * next(gradients)).to(dtype) if asked else None for asked, dtype in zip(ctx.asked, ctx.dtypes)]
        return None, None, None, None, None, found[0], None, None, *found[1:]


def label_terms(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, cap: float | None, differentiate: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """`loss_terms.label_terms` in two buffers of the logits' size, of which the logits' own is one; they are overwritten."""
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
        return sums, None
    gradient.div_(total).scatter_add_(-1, labels, torch.full_like(label_logits, -1.0))
    if cap is not None:
        gradient.mul_(capped.div_(cap).square_().neg_().add_(1.0))
    return sums, gradient.mul_(weights[:, None])
