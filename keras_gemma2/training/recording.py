"""`record_teacher`: a teacher's probabilities, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops
from safetensors.numpy import save_file

from keras_gemma2 import backend
from keras_gemma2.errors import CheckpointError
from keras_gemma2.inputs import TOKEN_KEYS
from keras_gemma2.layers.numerics import soft_cap
from keras_gemma2.staging import folder_path
from keras_gemma2.training.cross_entropy import rows_a_chunk
from keras_gemma2.training.data import Reader, is_in_memory
from keras_gemma2.training.data_streams import DataOfCall
from keras_gemma2.training.teacher_records import (
    FORMAT,
    SETTINGS_FILE,
    SHARD,
    TeacherRecords,
    read_settings,
    row_arrays,
    rows_in_shards,
    stored_rows,
)


def record_teacher(
    teacher: Any,
    x: Any,
    folder: str | os.PathLike[str],
    top_k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 8,
    rows_a_shard: int = 1024,
    pack: bool = False,
    verbose: bool = True,
) -> TeacherRecords:
    """Writes a teacher's likeliest next tokens of each token that counts, with their probabilities, for `Distiller`.

    A shard is written when all its rows are done, beside its place, and renamed. Called again with the same arguments, it goes on
    after the shards that are there, whose rows must be those of `x`. A token takes `6 * top_k` bytes: ids as int32, probabilities
    as float16 (11 bits, and steps of 6e-8 below 6e-5).

    Args:
        teacher: a `Gemma2CausalLM`, of any dtype, quantized too.
        x: what `fit` takes, in memory or batch by batch; all rows of one length.
        folder: made if missing, `~` expanded.
        top_k: k, how many next tokens are kept.
        temperature: that logits are divided by; a distiller on the records must have the same.
        batch_size: rows that the teacher runs at once.
        rows_a_shard: rows of a file.
        pack: as in `fit`.
        verbose: whether a line on stderr tells of the progress.

    Returns:
        The records.

    Raises:
        TypeError, ValueError: for data that `fit` would not take, a number outside its range, or a folder with records of another
            teacher, of other data or of other settings; the message names what differs.
        FloatingPointError: if the teacher's logits are not finite.
        CheckpointError: if the folder cannot be written or read.

    Example:
        >>> teacher = Gemma2CausalLM.from_preset("gemma2_9b_en", dtype="bfloat16", quantize="int8")
        >>> keras_gemma2.record_teacher(teacher, texts, "./records")
        >>> distiller = keras_gemma2.Distiller(student, "./records")
        >>> distiller.compile(optimizer=keras.optimizers.AdamW(1e-4))
        >>> distiller.fit(batch_size=8)
    """
    vocabulary_size = teacher.backbone.config.vocabulary_size
    _check_numbers({"top_k": top_k, "batch_size": batch_size, "rows_a_shard": rows_a_shard}, temperature, vocabulary_size)
    folder = folder_path(folder, "folder")
    settings = {
        "format": FORMAT,
        "teacher": fingerprint(teacher),
        "vocabulary_size": vocabulary_size,
        "top_k": top_k,
        "temperature": float(temperature),
        "rows_a_shard": rows_a_shard,
    }
    before = read_settings(folder)
    if before is not None:
        _check_same(before, settings, folder)
    likeliest, rows, length = Likeliest(teacher, top_k, temperature), 0, None
    data = DataOfCall(Reader(teacher.preprocessor, vocabulary_size, pack))
    for number, shard in enumerate(rows_in_shards(_batches(data, x), rows_a_shard)):
        if length is None:
            length = shard["labels"].shape[1]
            _write_settings(folder, {**settings, "length": length, "rows": None if before is None else before["rows"]})
        path = os.path.join(folder, SHARD.format(number))
        if os.path.exists(path):
            _check_rows(stored_rows(path), shard, path)
        else:
            _write_shard(path, shard | likeliest.of(shard, batch_size))
        rows += len(shard["labels"])
        if verbose:
            print(f"\rrecorded {rows} rows", end="", file=sys.stderr, flush=True)
    data.say()
    if before is not None and before["rows"] is not None and before["rows"] != rows:
        raise ValueError(f"{folder} holds records of {before['rows']} rows, and `x` has {rows}. Choose another folder.")
    _write_settings(folder, {**settings, "length": length, "rows": rows})
    if verbose:
        print(f"\rrecorded {rows} rows in {folder}", file=sys.stderr)
    return TeacherRecords(folder)


class Likeliest(backend.CompilesSteps, keras.Model):
    """The k likeliest next tokens after each token, and their probabilities; logits are made for a chunk of tokens at a time.

    Args:
        teacher: a `Gemma2CausalLM`.
        top_k: k.
        temperature: that logits are divided by.
    """

    def __init__(self, teacher: Any, top_k: int, temperature: float) -> None:
        super().__init__()
        self.teacher, self.top_k, self.temperature = teacher, top_k, temperature
        self.built = True

    def call(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Int32 and float32 `[B, T, k]`, for token ids and padding mask `[B, T]`."""
        hidden = self.teacher.backbone(inputs, training=False)
        shape, width = ops.shape(hidden), hidden.shape[-1]
        embedding = self.teacher.backbone.token_embedding
        count = shape[0] * shape[1]
        rows = min(rows_a_chunk(embedding.vocabulary_size), count) if isinstance(count, int) else 1
        hidden = ops.reshape(hidden, (-1, width))
        hidden = ops.concatenate([hidden, ops.zeros((-count % rows, width), hidden.dtype)])
        ids, probabilities = ops.map(self._of_chunk, ops.reshape(hidden, (-1, rows, width)))
        return tuple(ops.reshape(ops.reshape(a, (-1, self.top_k))[:count], (*shape[:2], self.top_k)) for a in (ids, probabilities))

    def _of_chunk(self, hidden: Any) -> tuple[Any, Any]:
        embedding = self.teacher.backbone.token_embedding
        logits = soft_cap(embedding.uncapped_logits(hidden), embedding.logit_soft_cap) / self.temperature
        values, ids = ops.top_k(logits, self.top_k)
        return ops.cast(ids, "int32"), ops.exp(values - ops.logsumexp(logits, axis=-1, keepdims=True))

    def of(self, rows: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
        """Int32 "ids" and float16 "probabilities" `[m, k]` of the m tokens whose weight is not 0, in the rows' order."""
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(rows["labels"]), batch_size):
            part = {name: rows[name][start : start + batch_size] for name in TOKEN_KEYS}
            count = len(part["token_ids"])
            # A last batch that is smaller would be compiled anew.
            part = {name: np.concatenate([array, array[:1].repeat(batch_size - count, axis=0)]) for name, array in part.items()}
            counts = rows["weights"][start : start + batch_size] != 0
            ids, probabilities = (np.asarray(array)[:count][counts] for array in self.predict_on_batch(part))
            if not np.isfinite(probabilities).all():
                raise FloatingPointError(
                    f"The teacher's logits are not finite in rows {start} to {start + count - 1} of a shard. Load it in another "
                    "dtype (bfloat16 or float32), and check its weights."
                )
            found.append((ids.astype("int32"), probabilities.astype("float16")))
        return {"ids": np.concatenate([ids for ids, _ in found]), "probabilities": np.concatenate([p for _, p in found])}


def fingerprint(teacher: Any) -> str:
    """A hash of a model's config and of its small weights (norms, factors of an active adapter): another model's differs."""
    digest = hashlib.sha256(json.dumps(teacher.backbone.config.to_dict(), sort_keys=True, default=str).encode("utf-8"))
    for variable in teacher.backbone.variables:
        if len(variable.shape) == 1 and "seed" not in variable.path:
            digest.update(np.asarray(ops.convert_to_numpy(ops.cast(variable.value, "float32"))).tobytes())
    if teacher.active_adapter is not None:
        for path, factors in sorted(teacher.backbone.adapter_set.factors(teacher.active_adapter).items()):
            digest.update(path.encode("utf-8"))
            for array in factors.arrays():
                digest.update(np.ascontiguousarray(array, "float32").tobytes())
    return digest.hexdigest()[:32]


def _batches(data: DataOfCall, x: Any) -> Iterator[dict[str, np.ndarray]]:
    if is_in_memory(x):
        x, labels, weights = data.read(x)
        yield row_arrays(x, labels, np.ones(labels.shape) if weights is None else weights)
        return
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches is None:
            raise ValueError("`x` must end: a PyDataset whose `num_batches` is None would be recorded for ever.")
        x = (x[index] for index in range(x.num_batches))
    length = None
    for number, batch in enumerate(x):
        tokens, labels, weights = data.batch(batch, number)
        length = length or labels.shape[1]
        if labels.shape[1] != length:
            raise ValueError(
                f"All rows must have one length. Batch {number} of `x` has {labels.shape[1]} tokens, those before {length}."
            )
        yield row_arrays(tokens, labels, weights)
    if length is None:
        raise ValueError("`x` must have at least one batch. Received none.")


def _check_numbers(counts: dict[str, Any], temperature: Any, vocabulary_size: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {value!r}.")
    if counts["top_k"] > vocabulary_size:
        raise ValueError(f"`top_k` must be at most the vocabulary, {vocabulary_size}. Received: {counts['top_k']}.")
    check_temperature(temperature)


def check_temperature(temperature: Any) -> None:
    """Raises a ValueError for what is not a positive number."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be a positive number. Received: {temperature!r}.")


def _check_same(before: dict[str, Any], settings: dict[str, Any], folder: str) -> None:
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} holds records with {name}={before.get(name)!r}, and this call has {value!r}. Choose another folder, or "
                "delete that one."
            )


def _check_rows(stored: dict[str, np.ndarray], shard: dict[str, np.ndarray], path: str) -> None:
    for name, array in stored.items():
        if array.shape != shard[name].shape or not np.array_equal(array, shard[name]):
            raise ValueError(
                f"{path} was recorded of other data: its {name} differ from those of `x` (shape {array.shape} there, "
                f"{shard[name].shape} here). Give the same `x` in the same order, or choose another folder."
            )


def _write_shard(path: str, arrays: dict[str, np.ndarray]) -> None:
    _write(path, lambda place: save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, place))


def _write_settings(folder: str, settings: dict[str, Any]) -> None:
    def write(place: str) -> None:
        with open(place, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2)

    _write(os.path.join(folder, SETTINGS_FILE), write)


def _write(path: str, write: Any) -> None:
    """Writes a file beside its place, on the disk, and renames it."""
    beside = f"{path}.writing"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        if os.path.exists(beside):
            os.remove(beside)
        raise CheckpointError(f"{path} cannot be written: {error}. What was recorded before stays.") from error
