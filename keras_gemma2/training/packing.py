"""Several samples in a row, so that little of a batch is padding."""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np

from keras_gemma2.inputs import TOKEN_KEYS
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


def pack(samples: Sequence[Sample], length: int, pad_token_id: int) -> PackedSamples:
    """Rows of samples: see `pack_samples`. A sample of one token has nothing to learn and is in no row."""
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
    by_room: dict[int, deque[int]] = defaultdict(deque)  # room left -> bins, the earliest first
    rooms: list[int] = []  # the keys that have bins, ascending
    for index in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(rooms, sizes[index])
        if place < len(rooms):
            left = rooms[place]
            chosen = by_room[left].popleft()
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
