"""Checks of what users hand to the models, made before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma2 import backend

TOKEN_KEYS = ("token_ids", "padding_mask")


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
    if _holds_values(token_ids):
        check_ids_in_vocabulary(ops.convert_to_numpy(token_ids), vocabulary_size)


def _differ(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(first, second))


def _holds_values(x: Any) -> bool:
    return not isinstance(x, keras.KerasTensor) and backend.is_concrete(x)


def check_ids_in_vocabulary(token_ids: Any, vocabulary_size: int) -> None:
    """Raises a ValueError that names the first id of a numpy array outside `[0, vocabulary_size)`."""
    if token_ids.size == 0:
        return
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocabulary_size:
        raise ValueError(
            f"`token_ids` must be in [0, {vocabulary_size}), the model's vocabulary. Received the id "
            f"{low if low < 0 else high}: was the text tokenized with another vocabulary?"
        )


def label_tokens(x: Any, y: Any, sample_weight: Any, vocabulary_size: int) -> tuple[dict[str, np.ndarray], Any, Any]:
    """Checks a token dict of arrays and, where it has no labels, makes them: each token's next one.

    Returns:
        The dict as int32 arrays, the labels, and the weights: 0 where the token or its next one is padding.

    Raises:
        ValueError: for other shapes or dtypes, or ids outside the vocabulary.
    """
    x = {key: _to_array(key, x[key]) for key in TOKEN_KEYS}
    check_token_inputs(x, vocabulary_size)
    if y is None:
        y = np.roll(x["token_ids"], -1, axis=1)
        weight = np.roll(x["padding_mask"], -1, axis=1).astype("float32") * x["padding_mask"]
        weight[:, -1] = 0.0
        sample_weight = weight if sample_weight is None else weight * _per_token(sample_weight)
    return x, y, sample_weight


def _to_array(name: str, value: Any) -> np.ndarray:
    array = ops.convert_to_numpy(value)
    if array.dtype.kind not in "iub":
        raise ValueError(f"`{name}` must hold integers (or booleans, for a mask). Received dtype {array.dtype}.")
    return array if array.dtype == np.int32 else array.astype("int32")


def _per_token(sample_weight: Any) -> np.ndarray:
    weight = ops.convert_to_numpy(sample_weight)
    return weight[:, None] if weight.ndim == 1 else weight


def as_texts(inputs: Any) -> tuple[list[str], bool]:
    """Strings in any of the usual containers as a list, and whether it was a single one."""
    values = inputs.numpy() if hasattr(inputs, "numpy") else inputs
    values = values.tolist() if isinstance(values, np.ndarray) else values
    is_scalar = isinstance(values, (str, bytes))
    values = [values] if is_scalar else values
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, (str, bytes)) for v in values):
        raise ValueError(
            "`inputs` must be a string, a list of strings, or a dict with 'token_ids' and 'padding_mask'. "
            f"Received: {inputs!r:.200}."
        )
    if not values:
        raise ValueError("`inputs` must hold at least one prompt. Received an empty list.")
    return [v.decode("utf-8") if isinstance(v, bytes) else v for v in values], is_scalar


def check_prompts(prompts: list[list[int]], max_length: int) -> None:
    if not prompts:
        raise ValueError("`inputs` must hold at least one prompt. Received a batch of 0 rows.")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Every prompt must have at least one token (`<bos>` at least). Row {row} is all padding.")
        if len(prompt) > max_length:
            raise ValueError(
                f"`max_length` counts the prompt's tokens too. Received: max_length={max_length}, but the prompt of row {row} "
                f"has {len(prompt)} tokens. Raise max_length or shorten the prompt."
            )


def pad_rows(rows: list[list[int]], length: int, pad_token_id: int) -> dict[str, np.ndarray]:
    token_ids = np.full((len(rows), length), pad_token_id, "int32")
    padding_mask = np.zeros((len(rows), length), "bool")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)], padding_mask[i, : len(row)] = row, True
    return {"token_ids": token_ids, "padding_mask": padding_mask}
