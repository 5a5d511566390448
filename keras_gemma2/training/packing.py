"""Several samples in a row, so that little of a batch is padding."""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_gemma2.inputs import TOKEN_KEYS
from keras_gemma2.text_inputs import read_length, shorten
from keras_gemma2.training.samples import Sample


@dataclasses.dataclass(frozen=True)
class PackedSamples:
    """Rows of several samples each; `lm.fit(packed)` takes them.

    Attributes:
        x: `{"token_ids", "padding_mask"}`, int32 `[R, T]`. The mask numbers the samples of a row from 1; 0 is padding.
        y: int32 `[R, T]`: the next token of the same sample.
        sample_weight: float32 `[R, T]`.
        rows: the indices of the samples of each row, in their order in it.
        fill: the share of the positions that hold a token, from 0 to 1.
    """

    x: dict[str, np.ndarray]
    y: np.ndarray
    sample_weight: np.ndarray
    rows: tuple[tuple[int, ...], ...]
    fill: float


def pack_samples(
    token_ids: Sequence[Sequence[int]],
    sequence_length: int,
    weights: Sequence[Sequence[float]] | None = None,
    pad_token_id: int = 0,
) -> PackedSamples:
    """Puts samples of tokens side by side in rows of one length.

    Each sample sees itself alone and has positions of its own, so the sum of the loss over tokens, and its gradient, are those of
    the samples in rows of their own. (Keras's default reduction divides by the number of positions: fewer of them are padding
    here, so the mean is larger.) A sample of n tokens takes n - 1 positions, as its last token is a label only. The longest go
    first, each into the row with the least room that is enough ("best-fit decreasing", Johnson et al., "Worst-case performance
    bounds for simple one-dimensional packing algorithms", 1974: asymptotically at most 11/9 of the fewest rows).

    Args:
        token_ids: a list of samples, each a list or array of ids, `<bos>` and `<eos>` included.
        sequence_length: positions in a row, T.
        weights: what each token counts in the loss, as a label, in the form of `token_ids`; 1 by default. 0 for a prompt's. The
            weight of a sample's first token is not looked at.
        pad_token_id: what fills the rest of a row.

    Returns:
        The rows, ordered by their first sample; within a row the samples keep their order. Equal input gives equal rows.

    Raises:
        TypeError: if `sequence_length` is not an integer.
        ValueError: if there is no sample, a sample is too long or has fewer than 2 tokens, or weights do not fit it.

    Example:
        >>> packed = keras_gemma2.pack_samples([[2, 5, 6, 1], [2, 7, 1], [2, 8, 9, 1]], sequence_length=5)
        >>> packed.x["padding_mask"].tolist(), packed.rows, packed.fill
        ([[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]], ((0, 1), (2,)), 0.8)
        >>> lm.fit(packed)
    """
    if weights is not None and len(weights) != len(token_ids):
        raise ValueError(f"`weights` must have one entry a sample. Received: {len(weights)} for {len(token_ids)} samples.")
    samples = []
    for index, ids in enumerate(token_ids):
        ids = _ids(ids, index)
        counts = np.ones(len(ids)) if weights is None else np.asarray(weights[index])
        if counts.shape != ids.shape:
            raise ValueError(f"`weights[{index}]` must have one number a token, {len(ids)}. Received the shape {counts.shape}.")
        samples.append(Sample(ids, counts.astype("float32")))
    return pack(samples, read_length(sequence_length), pad_token_id)


def pack(samples: Sequence[Sample], length: int, pad_token_id: int) -> PackedSamples:
    """`pack_samples` of what `training.samples` makes. A sample of one token has nothing to learn and is in no row."""
    sizes = [max(len(sample.token_ids) - 1, 0) for sample in samples]
    if not any(sizes):
        raise ValueError(f"There must be a sample of 2 tokens or more to pack. Received: {len(samples)} samples without.")
    longest = int(np.argmax(sizes))
    if sizes[longest] > length:
        raise ValueError(
            f"Samples must have at most `sequence_length` + 1 tokens, {length + 1}. Received {sizes[longest] + 1} in sample "
            f"{longest}. Raise `sequence_length`, or cut the sample."
        )
    rows = best_fit(sizes, length)
    token_ids, labels = np.full((2, len(rows), length), pad_token_id, "int32")
    mask, weights = np.zeros((len(rows), length), "int32"), np.zeros((len(rows), length), "float32")
    for row, members in enumerate(rows):
        start = 0
        for number, index in enumerate(members, 1):
            place = np.s_[row, start : start + sizes[index]]
            sample, mask[place] = samples[index], number
            token_ids[place], labels[place], weights[place] = sample.token_ids[:-1], sample.token_ids[1:], sample.weights[1:]
            start += sizes[index]
    fill = sum(sizes) / (len(rows) * length)
    return PackedSamples(dict(zip(TOKEN_KEYS, (token_ids, mask))), labels, weights, rows, fill)


def best_fit(sizes: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    """Bins of `room` for things of these sizes: the largest first, each where the least room is left that is enough.

    Things of size 0 are in no bin. The indices in a bin ascend, and so do the first ones of the bins.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # room left -> bins
    rooms: list[int] = []  # the keys that have bins, ascending
    for index in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(rooms, sizes[index])
        if place < len(rooms):
            left = rooms[place]
            chosen = by_room[left].pop()
            if not by_room[left]:
                rooms.pop(place)
        else:
            left, chosen = room, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left -= sizes[index]
        if left and not by_room[left]:
            bisect.insort(rooms, left)
        if left:
            by_room[left].append(chosen)
    return tuple(sorted(tuple(sorted(members)) for members in bins))


def _ids(ids: Any, index: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 2:
        raise ValueError(
            f"`token_ids[{index}]` must be a list of 2 token ids or more: each is learned from those before it. "
            f"Received: {shorten(ids.tolist())}."
        )
    return ids.astype("int32")
