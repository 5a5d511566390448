"""Text and token ids in plain Python: read as users hand them over, checked, packed and unpacked.

`backend.tf_pipeline` has functions of the same names, for text inside a `tf.data` pipeline.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import keras
import numpy as np

NOT_IDS = (
    "`{}` must hold integer token ids: one id, a list of ids, or a list of such lists. "
    "Received: {}. Convert strings with `tokenize()` first."
)


def read_texts(inputs: Any, argument: str) -> str | list[str]:
    """Any accepted form of text as a string, or a batch as a list of strings.

    Args:
        inputs: A string, or a list, tuple, array or eager tensor of strings.
        argument: What error messages call `inputs`.

    Raises:
        TypeError: If something else than strings was given.
        ValueError: If the batch is empty, or a text has no UTF-8 form.
    """
    if not isinstance(inputs, (str, bytes)):
        inputs = to_python(inputs)
    if isinstance(inputs, (str, bytes)):
        return _read_text(inputs, argument)
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(
            f"`{argument}` must be a string or a list of strings. Received: "
            f"{argument}={shorten(inputs)}, of type {type(inputs).__name__}. "
            "Convert it with `str()`."
        )
    if not inputs:
        raise ValueError(
            f"`{argument}` must hold at least one text. Received: {argument}={inputs}. "
            "Skip empty batches, or pass `['']` for one empty text."
        )
    return [_read_text(text, f"{argument}[{i}]") for i, text in enumerate(inputs)]


def _read_text(text: Any, name: str) -> str:
    """One text as a string that has a UTF-8 form."""
    if not isinstance(text, (str, bytes)):
        text = to_python(text)
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        if isinstance(text, str):
            text.encode("utf-8")
            return str(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{name}` must be UTF-8. Received: {shorten(text)}, where byte {error.start} is not. "
            "Decode the bytes with their own encoding first, or with "
            "`bytes.decode('utf-8', 'replace')`."
        ) from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` must not have lone surrogates: they have no UTF-8 form. Received: "
            f"{shorten(text)}, with {text[error.start]!r} at position {error.start}. Mend it with "
            "`text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')`, which joins "
            "surrogates that are pairs."
        ) from None
    raise TypeError(
        f"`{name}` must be a string. Received: {shorten(text)}, of type {type(text).__name__}. "
        "Convert it with `str()`; batches have one dimension."
    )


def read_id_rows(inputs: Any, vocabulary_size: int) -> tuple[list[list[int]], bool]:
    """Any accepted form of token ids as a list of rows, and whether `inputs` was a batch."""
    values = to_python(inputs)
    if isinstance(values, int):
        values = [values]
    if not isinstance(values, (list, tuple)):
        raise TypeError(NOT_IDS.format("inputs", shorten(inputs)))
    values = [v if isinstance(v, int) else to_python(v) for v in values]
    # An array with no rows is an empty batch; `[]` is an empty text.
    batched = any(isinstance(v, (list, tuple)) for v in values) or getattr(inputs, "ndim", 1) == 2
    if not batched:
        return [_read_ids(values, vocabulary_size, "inputs")], False
    return [_read_ids(v, vocabulary_size, f"inputs[{i}]") for i, v in enumerate(values)], True


def _read_ids(values: Any, vocabulary_size: int, name: str) -> list[int]:
    """One row of ids, as Python integers inside the vocabulary."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(NOT_IDS.format(name, shorten(values)))
    for value in values:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(NOT_IDS.format(name, shorten(value)))
        if not 0 <= value < vocabulary_size:
            raise ValueError(
                f"`{name}` must hold token ids of the vocabulary, from 0 to "
                f"{vocabulary_size - 1}. Received: {value}. Mask the model's logits beyond the "
                "vocabulary, or load the vocabulary the ids were made with."
            )
    return [int(value) for value in values]


def read_length(value: Any) -> int:
    """`value`, a `sequence_length`, as a positive Python integer."""
    try:
        length = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        length = None
    if length is None:
        raise TypeError(
            "`sequence_length` must be a positive integer. Received: sequence_length="
            f"{shorten(value)}, of type {type(value).__name__}. Convert it with `int()`."
        )
    if length <= 0:
        raise ValueError(
            f"`sequence_length` must be a positive integer. Received: sequence_length={length}. "
            "Pass 1 or more; Gemma 2 was trained with up to 8192 tokens."
        )
    return length


def read_packed(x: Any) -> tuple[Any, Any]:
    """The token ids and the padding mask of a dictionary of both."""
    keys = ("token_ids", "padding_mask")
    if not isinstance(x, dict) or not all(key in x for key in keys):
        found = sorted(x) if isinstance(x, dict) else type(x).__name__
        raise ValueError(
            f"`x` must be a dictionary with the keys {keys}. Received: {found}. "
            "Pass what `generate_preprocess` or the model returned."
        )
    return tuple(np.asarray(x[k]) if isinstance(x[k], (list, tuple)) else x[k] for k in keys)


def split_starts(
    texts: str | list[str], pattern: str, add_start: bool
) -> tuple[list[str], list[bool]]:
    """Texts without the `pattern`, and which of them begin with `<bos>`, as batches."""
    texts = [texts] if isinstance(texts, str) else texts
    stripped = [re.sub(pattern, "", text) for text in texts]
    return stripped, [bool(add_start or text != rest) for text, rest in zip(texts, stripped)]


def pack(
    texts: str | list[str],
    starts: list[bool],
    rows: list[list[int]],
    ids: tuple[int, int, int],
    limit: int,
    shift: int,
    has_end: bool,
    truncation: str,
    too_long: tuple[str, str],
    no_tokens: tuple[str, str],
) -> tuple[np.ndarray, np.ndarray]:
    """Frames tokens with `<bos>` and `<eos>`, cuts and pads them; see `tf_pipeline.pack`."""
    start_id, end_id, pad_id = ids
    batch = [texts] if isinstance(texts, str) else texts
    token_ids = np.full((len(batch), limit), pad_id, dtype="int32")
    mask = np.zeros((len(batch), limit), dtype=bool)
    for index, (text, start, body) in enumerate(zip(batch, starts, rows)):
        count = start + len(body) + has_end
        if count > limit and truncation == "error":
            problem, mend = too_long[0], too_long[1].format(needed=count - shift)
            raise ValueError(
                f"`x` at index {index} has {count} {problem} Received: {shorten(text)}. {mend}"
            )
        if count == 0 and not shift:
            problem, mend = no_tokens
            raise ValueError(f"`x` at index {index} {problem} Received: {text!r}. {mend}")
        excess = max(count - limit, 0)
        first = excess if truncation == "left" else 0
        body = body[first : first + len(body) - excess]
        row = [start_id] * start + body + [end_id] * has_end
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return (token_ids[0], mask[0]) if isinstance(texts, str) else (token_ids, mask)


def too_long_message(length: int, shift: int) -> tuple[str, str]:
    """What is wrong with a text of too many tokens, and what to do; `{needed}` is left open."""
    room = f"{length + 1} (one of them as a label only)" if shift else length
    return (
        f"tokens, with those that frame it, but `sequence_length={length}` has room for {room}.",
        "Pass `sequence_length={needed}` or more, shorten the text, or set `truncation` to "
        "'right' to keep the first tokens or to 'left' to keep the last.",
    )


def no_tokens_message(start_token: str) -> tuple[str, str]:
    """What is wrong with a prompt of no tokens, and what to do."""
    return (
        "has no tokens, so there is nothing to continue.",
        f"Pass some text, or `add_start_token=True` to have `{start_token}`.",
    )


def unpack(token_ids: Any, mask: Any, special_ids: list[int], last_id: int) -> Any:
    """The ids of the text, a row or rows: no padding, no special ids, no `last_id` at the end."""
    token_ids, mask = to_numpy(token_ids), to_numpy(mask)
    if token_ids.ndim not in (1, 2) or token_ids.shape != mask.shape:
        raise ValueError(
            "`token_ids` and `padding_mask` must have one shape, of rank 1 or 2. Received: "
            f"shapes {token_ids.shape} and {mask.shape}."
        )
    kept = mask.astype(bool) & ~np.isin(token_ids, special_ids)
    positions = np.arange(1, kept.shape[-1] + 1)
    ends = np.where(kept & (token_ids != last_id), positions, 0)
    kept &= positions <= ends.max(axis=-1, initial=0, keepdims=True)
    if token_ids.ndim == 1:
        return token_ids[kept].tolist()
    if not len(token_ids):
        return token_ids  # an empty batch; `[]` would be an empty text
    return [row[keep].tolist() for row, keep in zip(token_ids, kept)]


def to_numpy(value: Any) -> Any:
    """Arrays and eager tensors, of any backend, as NumPy arrays; anything else as it is."""
    if keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value)
    return np.asarray(value) if hasattr(value, "__array__") else value


def to_python(value: Any) -> Any:
    """Arrays, eager and ragged tensors as Python lists or scalars; anything else as it is."""
    if hasattr(value, "to_list"):  # tf.RaggedTensor, pandas.Series
        return value.to_list()
    value = to_numpy(value)
    return value.tolist() if isinstance(value, np.ndarray) else value


def shorten(value: Any, limit: int = 120) -> str:
    """`repr(value)`, cut to fit an error message; printable even with lone surrogates."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
