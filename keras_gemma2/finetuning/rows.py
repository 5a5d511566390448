"""Rows of tokens of a .jsonl file, in an order that is a function of seed and epoch alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_gemma2.finetuning.settings import FinetuneSettings
from keras_gemma2.training.data import Reader, check_something_is_learned
from keras_gemma2.training.jsonl import read_jsonl
from keras_gemma2.training.packing import pack
from keras_gemma2.training.samples import Sample, rows_of

_ROUND_TO = 16  # positions
Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


class Rows:
    """Rows of one length.

    Args:
        samples: at least one.
        length: of the rows, T.
        pad_token_id: what fills them.
        packs: whether samples share rows.
        batch_size: rows a batch; the last batch is filled up with rows of weight 0, so that one shape is compiled.
    """

    def __init__(self, samples: list[Sample], length: int, pad_token_id: int, packs: bool, batch_size: int) -> None:
        self._samples, self._length, self._pad_token_id, self._batch_size = samples, length, pad_token_id, batch_size
        self._packed = pack(samples, length, pad_token_id) if packs else None

    def __len__(self) -> int:
        return len(self._packed.y if self._packed else self._samples)

    @property
    def batches(self) -> int:
        """Batches in a pass over all rows."""
        return -(-len(self) // self._batch_size)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The rows in the order of an epoch."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def batch(self, number: int, order: np.ndarray) -> Batch:
        """A batch of an epoch: `(x, y, sample_weight)`, all `[batch_size, T]`."""
        chosen = order[number * self._batch_size : (number + 1) * self._batch_size]
        filled = np.concatenate([chosen, np.repeat(chosen[:1], self._batch_size - len(chosen))])
        if self._packed:
            x = {name: array[filled] for name, array in self._packed.x.items()}
            y, weights = self._packed.y[filled], self._packed.sample_weight[filled]
        else:
            x, y, weights = rows_of([self._samples[index] for index in filled], self._length, self._pad_token_id)
        weights[len(chosen) :] = 0
        return x, y, weights

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self))
        return (self.batch(number, order) for number in range(self.batches))


def read_rows(settings: FinetuneSettings, lm: Any) -> tuple[Rows, Rows | None]:
    """What is trained on, and what is held out, if anything.

    Args:
        settings: of the run.
        lm: with a preprocessor, whose `sequence_length` and `truncation` are set to what the settings say.

    Raises:
        ValueError: for a file that is malformed, samples that are too long, or where there is nothing to learn.
    """
    preprocessor = lm.preprocessor
    if settings.length is not None:
        preprocessor.sequence_length = settings.length
    preprocessor.truncation = "right"  # what is cut is an error, unless settings allow it
    train = _samples(settings.data, lm, settings.truncate)
    if settings.validation is not None:
        held_out = _samples(settings.validation, lm, settings.truncate)
    else:
        order = np.random.default_rng(settings.seed).permutation(len(train))
        count = int(settings.hold_out * len(train))
        held_out, train = ([train[index] for index in sorted(part)] for part in (order[:count], order[count:]))
    length = preprocessor.sequence_length
    if not settings.pack:
        longest = max(len(sample.token_ids) - 1 for sample in (*train, *held_out))
        length = min(length, -(-longest // _ROUND_TO) * _ROUND_TO)
    options = (length, preprocessor.tokenizer.pad_token_id, settings.pack, settings.batch_size)
    return Rows(train, *options), Rows(held_out, *options) if held_out else None


def _samples(path: str | os.PathLike[str], lm: Any, truncate: bool) -> list[Sample]:
    samples, report = Reader(lm.preprocessor, lm.backbone.config.vocabulary_size).samples(read_jsonl(path))
    room = lm.preprocessor.sequence_length
    if report.cut and not truncate:
        raise ValueError(
            f"{os.fspath(path)}: {report.cut} of {report.samples} samples have more than `length` + 1 tokens, {room + 1}. Raise "
            "--length (`length`), or cut their ends with --truncate (`truncate=True`)."
        )
    try:
        check_something_is_learned(report)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    for message in report.messages("right"):
        warnings.warn(f"{os.fspath(path)}: {message}", stacklevel=3)
    return samples
