"""A teacher's likeliest tokens on disk: written once by `record_teacher`, read batch by batch in training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import safetensors

from keras_gemma2.errors import CheckpointError
from keras_gemma2.staging import folder_path

SETTINGS_FILE = "records.json"
SHARD = "records-{:05d}.safetensors"
FORMAT = 1
IDS, PROBABILITIES = "teacher_ids", "teacher_probabilities"  # of a batch's inputs
_PER_ROW = ("token_ids", "padding_mask", "labels", "weights")
_PER_TOKEN = ("ids", "probabilities")


class TeacherRecords:
    """What `record_teacher` has written: rows of tokens, and for each token that counts the teacher's likeliest next ones.

    Args:
        folder: of the records.

    Attributes:
        folder: the folder's path.
        rows: how many there are.
        length: tokens in a row, T.
        top_k: how many next tokens are kept of each, k.
        temperature: that the teacher's logits were divided by.
        vocabulary_size: the teacher's.

    Raises:
        CheckpointError: for a missing, damaged or unfinished folder; the message names the file and the mend.
        TypeError: if `folder` is no path.

    Example:
        >>> records = TeacherRecords("./records")
        >>> x, y, weights = records.read([0, 5])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder_path(folder, "folder")
        settings = read_settings(self.folder)
        if settings is None:
            raise CheckpointError(
                f"{self.folder} has no {SETTINGS_FILE}: it holds no teacher's records. Write them with "
                "`keras_gemma2.record_teacher`."
            )
        if settings["rows"] is None:
            raise CheckpointError(
                f"The records in {self.folder} are not finished. Call `record_teacher` again, with the same arguments: it goes on "
                "where it was stopped."
            )
        self.rows, self.length = settings["rows"], settings["length"]
        self.top_k, self.temperature = settings["top_k"], settings["temperature"]
        self.vocabulary_size, self._rows_a_shard = settings["vocabulary_size"], settings["rows_a_shard"]
        self._starts = [self._check_shard(number) for number in range(math.ceil(self.rows / self._rows_a_shard))]

    def __len__(self) -> int:
        return self.rows

    def read(self, indices: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Some rows, as a batch.

        Args:
            indices: of the rows, B of them.

        Returns:
            `(x, y, weights)`: x has int32 "token_ids" and "padding_mask" `[B, T]`, "teacher_ids" int32 `[B, T, k]` and
            "teacher_probabilities" float32 `[B, T, k]`, 0 where a token's weight is 0; labels int32 and weights float32 `[B, T]`.
        """
        shape = (len(indices), self.length)
        batch = {name: np.zeros(shape, "float32" if name == "weights" else "int32") for name in _PER_ROW}
        batch[IDS] = np.zeros((*shape, self.top_k), "int32")
        batch[PROBABILITIES] = np.zeros((*shape, self.top_k), "float32")
        shards = np.asarray(indices) // self._rows_a_shard
        for number in np.unique(shards):
            with self._open(number) as file:
                slices = {name: file.get_slice(name) for name in (*_PER_ROW, *_PER_TOKEN)}
                for place in np.flatnonzero(shards == number):
                    row = int(indices[place]) - int(number) * self._rows_a_shard
                    for name in _PER_ROW:
                        batch[name][place] = slices[name][row : row + 1][0]
                    start, end = (int(bound) for bound in self._starts[number][row : row + 2])
                    counts = batch["weights"][place] != 0
                    batch[IDS][place, counts] = slices["ids"][start:end]
                    batch[PROBABILITIES][place, counts] = slices["probabilities"][start:end]
        x = {name: batch[name] for name in ("token_ids", "padding_mask", IDS, PROBABILITIES)}
        return x, batch["labels"], batch["weights"]

    def batches(self, batch_size: int, shuffle: bool = True) -> RecordedBatches:
        """All rows in batches, for `fit`; the last may be smaller.

        Args:
            batch_size: rows of a batch.
            shuffle: whether the rows come in another order each epoch, which follows `keras.utils.set_random_seed`.
        """
        return RecordedBatches(self, batch_size, shuffle)

    def _open(self, number: int) -> Any:
        return open_shard(os.path.join(self.folder, SHARD.format(number)))

    def _check_shard(self, number: int) -> np.ndarray:
        """Where each row's tokens start in the shard, and the end; its shapes are checked."""
        path = os.path.join(self.folder, SHARD.format(number))
        rows = min(self._rows_a_shard, self.rows - number * self._rows_a_shard)
        with open_shard(path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            expected = {name: (rows, self.length) for name in _PER_ROW}
            if set(shapes) == {*_PER_ROW, *_PER_TOKEN} and all(shapes[name] == expected[name] for name in expected):
                counts = np.count_nonzero(file.get_tensor("weights"), axis=1)
                expected |= {name: (int(counts.sum()), self.top_k) for name in _PER_TOKEN}
        if shapes != expected:
            raise CheckpointError(
                f"{path} does not fit {SETTINGS_FILE}: it has {shapes}. Delete it and call `record_teacher` again: it makes up for "
                "it."
            )
        return np.concatenate([[0], np.cumsum(counts)])


class RecordedBatches(keras.utils.PyDataset):
    """Batches of a teacher's records; see `TeacherRecords.batches`."""

    def __init__(self, records: TeacherRecords, batch_size: int, shuffle: bool) -> None:
        super().__init__()
        self._records, self._batch_size, self._shuffle = records, batch_size, shuffle
        self._seed, self._epoch = int(np.random.randint(2**31)), 0
        self._draw()

    @property
    def num_batches(self) -> int:
        return math.ceil(len(self._records) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        return self._records.read(self._order[index * self._batch_size : (index + 1) * self._batch_size])

    def on_epoch_end(self) -> None:
        self._epoch += 1
        self._draw()

    def _draw(self) -> None:
        rows = np.arange(len(self._records))
        self._order = np.random.default_rng([self._seed, self._epoch]).permutation(rows) if self._shuffle else rows


def read_settings(folder: str) -> dict[str, Any] | None:
    """What `records.json` says; None where there is none.

    Raises:
        CheckpointError: for a file that is not one of `record_teacher`'s.
    """
    path = os.path.join(folder, SETTINGS_FILE)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        known = settings["format"] == FORMAT
        for name in ("length", "top_k", "vocabulary_size", "rows_a_shard"):
            known = known and isinstance(settings[name], int) and settings[name] > 0
        known = known and (settings["rows"] is None or isinstance(settings["rows"], int)) and settings["temperature"] > 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as the settings of a teacher's records: {error!r}.") from error
    if not known:
        raise CheckpointError(f"{path} is of another version of teacher's records than {FORMAT}. Record the teacher again.")
    return settings


def open_shard(path: str) -> Any:
    """An open safetensors file, to be used as a context.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Delete it and call `record_teacher` again: it makes up for it."
        ) from error


def batches_in(records: Any, batch_size: int | None, shuffle: bool) -> Any:
    """Batches of records that are given as such or by their folder; what is neither is given back."""
    if isinstance(records, (str, os.PathLike)):
        records = TeacherRecords(records)
    return records.batches(batch_size or 32, shuffle) if isinstance(records, TeacherRecords) else records


def row_arrays(x: dict[str, np.ndarray], labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What a shard keeps of a batch's rows."""
    return {"token_ids": x["token_ids"], "padding_mask": x["padding_mask"], "labels": labels, "weights": weights.astype("float32")}


def stored_rows(path: str) -> dict[str, np.ndarray]:
    """The rows of a shard, without what the teacher said of them."""
    with open_shard(path) as file:
        return {name: file.get_tensor(name) for name in _PER_ROW}


def rows_in_shards(batches: Iterator[dict[str, np.ndarray]], rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of rows cut and joined to pieces of so many rows; the last may be smaller."""
    held: list[dict[str, np.ndarray]] = []
    room = rows
    for batch in batches:
        start = 0
        while start < len(batch["labels"]):
            held.append({name: batch[name][start : start + room] for name in _PER_ROW})
            taken = len(held[-1]["labels"])
            start, room = start + taken, room - taken
            if room == 0:
                yield _joined(held)
                held, room = [], rows
    if held:
        yield _joined(held)


def _joined(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in _PER_ROW}
