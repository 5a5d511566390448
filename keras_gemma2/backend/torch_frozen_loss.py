"""PyTorch: the loss over chunks of rows where the table is frozen and in float32, as with LoRA.

The logits of a chunk are held once: sums and gradient are taken from them a tile of the vocabulary at a time, and the tile's share
of the hidden states' gradient at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import torch
from keras.src.backend.common.variables import AutocastScope

from keras_gemma2.backend.loss_terms import ChunkRule
from keras_gemma2.backend.torch_products import tile_product

TILE = 4000  # of the vocabulary; glibc keeps holes of larger blocks: with 16000 a process grew by 110 MB more
FROZEN_CHUNKS = ChunkRule(logits_held=1, multiple=16, working_bytes=208 << 20)


def frozen_sums_in_chunks(
    table: keras.Variable,
    cap: float | None,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    rows: int,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sums_in_chunks`, for one way of making logits.

    Args:
        table: float32 `[V, D]`, not trained.
        cap: soft cap on the logits; None for none.
        hidden: float32 `[N, D]`.
        labels: int32 `[N]`.
        weights: float32 `[N]`. Rows with weight 0 are in no chunk, but for the few that fill the last one.
        rows: of a chunk.
        training: whether gradients will be asked for.

    Returns:
        The weighted sum of negative log-likelihoods, and the weight of rows whose label has the largest logit. The first can be
        differentiated, once, with respect to `hidden`.
    """
    with AutocastScope(None):
        return _FrozenSums.apply(table.value.detach(), cap, rows, training, hidden, labels, weights)


class _FrozenSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, cap: float | None, rows: int, training: bool, hidden, labels, weights) -> Any:
        asked = training and ctx.needs_input_grad[4]
        counted = torch.nonzero(weights).flatten()
        ctx.gradient = torch.zeros_like(hidden) if asked else None
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        held = hidden.new_empty(min(rows, len(counted)), table.shape[0])
        for index in counted.split(rows) if len(counted) else ():
            chunk, label, weight = hidden[index], labels[index].long(), weights[index]
            logits = held[: len(index)]
            for tile in _tiles(len(table)):
                logits[:, tile] = tile_product(chunk, table[tile])
            if cap is not None:
                logits.div_(cap).tanh_().mul_(cap)
            loss, right, log_total = _sums(logits, label)
            sums += torch.stack([torch.dot(loss, weight), torch.dot(right.to(weight.dtype), weight)])
            if asked:
                ctx.gradient[index] = _gradient(logits, label, log_total, cap, table) * weight[:, None]
        return sums[0], sums[1]

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor, of_correct: torch.Tensor) -> tuple:
        gradient, ctx.gradient = ctx.gradient, None
        return None, None, None, None, None if gradient is None else gradient.mul_(of_loss), None, None


def _tiles(width: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, width)) for start in range(0, width, TILE))


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods `[n]`, which labels are right `[n]`, and the logarithm of each row's exponentials' sum `[n, 1]`."""
    known = (labels >= 0) & (labels < logits.shape[-1])
    label_logits = logits.gather(-1, torch.where(known, labels, 0)[:, None])
    highest = logits.amax(dim=-1, keepdim=True)
    total = torch.zeros_like(highest)
    for tile in _tiles(logits.shape[-1]):
        total += (logits[:, tile] - highest).exp_().sum(dim=-1, keepdim=True)
    log_total = total.log_() + highest
    return torch.where(known, (log_total - label_logits)[:, 0], torch.nan), (label_logits >= highest)[:, 0], log_total


def _gradient(
    logits: torch.Tensor, labels: torch.Tensor, log_total: torch.Tensor, cap: float | None, table: torch.Tensor
) -> torch.Tensor:
    """`[n, D]`: of the losses of rows, with respect to their hidden states."""
    gradient = logits.new_zeros(len(logits), table.shape[1])
    for tile in _tiles(len(table)):
        capped = logits[:, tile]
        share = (capped - log_total).exp_()
        inside = torch.nonzero((labels >= tile.start) & (labels < tile.stop)).flatten()
        share[inside, labels[inside] - tile.start] -= 1.0
        if cap is not None:
            share.mul_((capped / cap).square_().neg_().add_(1.0))
        gradient += tile_product(share, table[tile].T)
    return gradient
