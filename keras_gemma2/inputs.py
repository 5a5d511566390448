"""Checks of what users hand to the models, made before any work."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.text_inputs import read_texts, shorten, to_numpy

TOKEN_KEYS = ("token_ids", "padding_mask")
BASE_KEYWORDS = ("name", "trainable", "dtype")


def check_keywords(owner: str, received: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Refuses keyword arguments that Keras's base classes would swallow: a misspelled one builds another model.

    Raises:
        TypeError: names the argument and near ones.
    """
    for name in received:
        if name not in BASE_KEYWORDS:
            near = difflib.get_close_matches(name, (*own, *BASE_KEYWORDS), n=2)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise TypeError(f"{owner} has no argument {name!r}.{hint}")


def is_token_dict(inputs: Any) -> bool:
    """Whether inputs are already tokens: a mapping with `token_ids` and `padding_mask`."""
    return isinstance(inputs, Mapping) and all(key in inputs for key in TOKEN_KEYS)


def check_token_inputs(inputs: Any, vocabulary_size: int) -> None:
    """Checks shapes, and, where values are at hand (not while tracing), that every real token is in the vocabulary.

    Raises:
        ValueError: names the argument, the value and the mend.
    """
    if not is_token_dict(inputs):
        received = f"keys {sorted(inputs)}" if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(
            f"`inputs` must be a dict with 'token_ids' and 'padding_mask', each [batch, length]. Received: {received}."
        )
    token_ids, padding_mask = inputs["token_ids"], inputs["padding_mask"]
    shapes = [tuple(ops.shape(x)) for x in (token_ids, padding_mask)]
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or _differ(*shapes):
        raise ValueError(
            "`token_ids` and `padding_mask` must have the same shape [batch, length]. "
            f"Received: token_ids {shapes[0]}, padding_mask {shapes[1]}."
        )
    if _holds_values(token_ids) and _holds_values(padding_mask):
        ids, mask = ops.convert_to_numpy(token_ids), ops.convert_to_numpy(padding_mask)
        _check_integers("token_ids", ids)
        check_ids_in_vocabulary("token_ids", ids[mask.astype(bool)], vocabulary_size)


def _differ(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(first, second))


def _holds_values(x: Any) -> bool:
    return not isinstance(x, keras.KerasTensor) and backend.is_concrete(x)


def check_ids_in_vocabulary(name: str, token_ids: np.ndarray, vocabulary_size: int) -> None:
    """Raises a ValueError that names an id of an array outside `[0, vocabulary_size)`."""
    if token_ids.size == 0:
        return
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocabulary_size:
        raise ValueError(
            f"`{name}` must be in [0, {vocabulary_size}), the model's vocabulary. Received the id "
            f"{low if low < 0 else high}: was the text tokenized with another vocabulary?"
        )


def token_arrays(x: Mapping[str, Any], vocabulary_size: int) -> dict[str, np.ndarray]:
    """A token dict of arrays or lists as int32 arrays `[B, T]`, checked; the numbers in the padding mask are kept.

    Raises:
        ValueError: for other shapes or dtypes, or ids outside the vocabulary.
    """
    x = {key: _to_array(key, x[key]).astype("int32") for key in TOKEN_KEYS}
    check_token_inputs(x, vocabulary_size)
    return x


def label_tokens(x: Any, y: Any, sample_weight: Any, vocabulary_size: int) -> tuple[dict[str, np.ndarray], Any, Any]:
    """Checks a token dict of arrays and, where it has no labels, makes them: each token's next one.

    Args:
        x: `{"token_ids", "padding_mask"}`, each `[B, T]`. The mask is nonzero at real tokens; where several samples share a row,
            they are numbered upward in it (1 1 1 2 2 0), and each sees only itself.
        y: labels int `[B, T]`, or None.
        sample_weight: float `[B, T]` or `[B]`, or None.
        vocabulary_size: ids are below it.

    Returns:
        The dict as int32 arrays, the labels, and the weights: with labels made here, 0 where the token or its next one is padding,
        and where the next one is of another sample. Samples are numbered from 1 in each row.

    Raises:
        ValueError: for other shapes or dtypes, ids outside the vocabulary, or samples that are not numbered upward.

    Example:
        >>> x = {"token_ids": [[2, 5, 1, 2, 7, 0]], "padding_mask": [[1, 1, 1, 2, 2, 0]]}
        >>> _, labels, weights = label_tokens(x, None, None, 97)
        >>> labels[0, :5].tolist(), weights[0].tolist()
        ([5, 1, 2, 7, 0], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    """
    x = token_arrays(x, vocabulary_size)
    numbers = x["padding_mask"] = _numbered_from_1(x["padding_mask"])
    weight = None if sample_weight is None else _per_token(sample_weight, x["token_ids"].shape)
    if y is None:
        y = np.roll(x["token_ids"], -1, axis=1)
        real = ((numbers > 0) & (np.roll(numbers, -1, axis=1) == numbers)).astype("float32")
        real[:, -1:] = 0.0
        return x, y, real if weight is None else real * weight
    return x, _check_labels(y, weight, x["token_ids"].shape, vocabulary_size), weight


def _numbered_from_1(padding_mask: np.ndarray) -> np.ndarray:
    """The samples of each row as 1, 2, ...; 0 is padding. A mask of other numbers (255, say) is one of one sample."""
    highest = np.maximum.accumulate(padding_mask, axis=1)
    fell = (padding_mask != 0) & (padding_mask < highest)
    if fell.any():
        row, column = np.argwhere(fell)[0]
        raise ValueError(
            "`padding_mask` must number the samples of a row upward (1 1 1 2 2 0), with 0 for padding. Received in row "
            f"{row}: {padding_mask[row, column]} at position {column}, after {highest[row, column]}."
        )
    starts = np.diff(highest, axis=1, prepend=0) != 0
    return np.where(padding_mask != 0, np.cumsum(starts, axis=1), 0).astype("int32")


def _check_labels(y: Any, weight: np.ndarray | None, shape: tuple[int, ...], vocabulary_size: int) -> np.ndarray:
    """Labels as int32; those of weight 0 may be anything (-100, say) and become 0, which every backend's loss takes."""
    y = _to_array("y", y)
    if y.shape != shape:
        raise ValueError(f"`y` must have the shape of `token_ids`, {shape}: one label a token. Received: {y.shape}.")
    counts = np.ones(shape, bool) if weight is None else weight != 0
    check_ids_in_vocabulary("y", y[counts], vocabulary_size)
    return np.where(counts, y, 0).astype("int32")


def _to_array(name: str, value: Any) -> np.ndarray:
    array = _rectangle(name, value)
    _check_integers(name, array)
    return array


def _rectangle(name: str, value: Any) -> np.ndarray:
    """Arrays, tensors of any backend, and nested lists as an array."""
    try:
        return np.asarray(to_numpy(value))
    except ValueError:
        counts = sorted({np.size(row) for row in value})
        raise ValueError(
            f"`{name}` must have rows of one length, as an array [batch, length]. Received rows of {shorten(counts)} numbers. "
            "Pad them, and set `padding_mask` to 0 there, or pack them with `keras_gemma2.pack_samples`."
        ) from None


def _check_integers(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "iub":
        raise ValueError(f"`{name}` must hold integers (or booleans, for a mask). Received dtype {array.dtype}.")


def _per_token(sample_weight: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Weights [B] or [B, T] as float32 [B, T]."""
    weight = _rectangle("sample_weight", sample_weight).astype("float32")
    weight = weight[:, None] if weight.ndim == 1 else weight
    if weight.ndim != 2 or weight.shape[0] != shape[0] or weight.shape[1] not in (1, shape[1]):
        raise ValueError(f"`sample_weight` must have the shape {shape[:1]} or {shape}. Received: {np.shape(sample_weight)}.")
    return np.broadcast_to(weight, shape)


def as_texts(inputs: Any) -> tuple[list[str], bool]:
    """Strings in any of the usual containers as a list, and whether it was a single one."""
    texts = read_texts(inputs, "inputs")
    return ([texts], True) if isinstance(texts, str) else (texts, False)


def check_prompts(prompts: list[list[int]], max_length: int, max_sequence_length: int, before: int = 0) -> None:
    """Raises a ValueError if there is no prompt, or one without tokens, or one that makes more than `max_length` with a prefix."""
    if not prompts:
        raise ValueError("`inputs` must hold at least one prompt. Received a batch of 0 rows.")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Every prompt must have at least one token (`<bos>` at least). Row {row} is all padding.")
    check_room([len(prompt) for prompt in prompts], max_length, max_sequence_length, before)


def check_room(counts: list[int], max_length: int, max_sequence_length: int, before: int = 0) -> None:
    """Raises a ValueError that names the first prompt with more tokens than `max_length`, and what can be done.

    Args:
        counts: tokens of each prompt.
        max_length: tokens that a row may have.
        max_sequence_length: the model's context.
        before: tokens of a prefix that stands before each prompt.
    """
    for row, count in enumerate(counts):
        if before + count > max_length:
            fits = before + count <= max_sequence_length
            mend = "Raise max_length" if fits else f"The model takes {max_sequence_length} at most"
            prefix = f" after a prefix of {before}" if before else ""
            truncation = "" if before else ", or build the preprocessor with truncation='left'"
            raise ValueError(
                f"`max_length` counts the prompt's tokens too{', and the prefix' if before else ''}. Received: "
                f"max_length={max_length}, but the prompt of row {row} has {count} tokens{prefix}. {mend}, shorten the prompt"
                f"{truncation}."
            )


def pad_rows(rows: list[list[int]], length: int, pad_token_id: int) -> dict[str, np.ndarray]:
    token_ids = np.full((len(rows), length), pad_token_id, "int32")
    padding_mask = np.zeros((len(rows), length), "bool")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)], padding_mask[i, : len(row)] = row, True
    return {"token_ids": token_ids, "padding_mask": padding_mask}
