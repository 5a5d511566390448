"""Text inside a traced `tf.data` pipeline or `tf.function`: checks, SentencePiece and packing.

Used on every Keras backend, because `tf.data` pipelines are TensorFlow whatever the backend is.
TensorFlow is imported where a function runs: direct calls, which run in Python, do without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from keras_hub.src.utils.tensor_utils import assert_tf_libs_installed


def read_texts(inputs: Any, argument: str) -> Any:
    """Text, checked.

    Args:
        inputs: A string tensor of rank 0 or 1.
        argument: What error messages call `inputs`.

    Returns:
        The same tensor. When run, it fails with an `InvalidArgumentError` if a text is not UTF-8.
    """
    import tensorflow as tf

    if not isinstance(inputs, tf.RaggedTensor):
        inputs = tf.convert_to_tensor(inputs)
    if inputs.dtype != tf.string:
        raise TypeError(
            f"`{argument}` must hold strings. Received a tensor of dtype {inputs.dtype.name}. "
            "Convert it with `tf.strings.as_string`."
        )
    if inputs.shape.rank not in (0, 1):
        raise ValueError(
            f"`{argument}` must have rank 0 or 1. Received a tensor of shape {inputs.shape}. "
            "Reshape it, or state its shape with `tf.ensure_shape`."
        )
    if inputs.shape.rank == 1 and inputs.shape[0] == 0:
        raise ValueError(
            f"`{argument}` must hold at least one text. Received a tensor of shape {inputs.shape}. Skip empty batches."
        )
    with tf.device("cpu"):
        # SentencePiece would read broken bytes as U+FFFD, without a word.
        utf8 = tf.strings.unicode_transcode(inputs, "UTF-8", "UTF-8", "replace")
        broken = tf.reshape(tf.not_equal(inputs, utf8), [-1])
        return _identity_if(
            ~tf.reduce_any(broken),
            f"`{argument}` must be UTF-8. At index",
            tf.where(broken)[:, 0],
            "received, with U+FFFD for what is not,",
            # The bytes themselves would break TensorFlow's error in turn.
            _shorten(tf.boolean_mask(tf.reshape(utf8, [-1]), broken)),
            "Decode the bytes with their own encoding first, or mend them with "
            "`tf.strings.unicode_transcode(text, 'UTF-8', 'UTF-8')`.",
            value=inputs,
        )


def read_ids(inputs: Any, vocabulary_size: int, not_ids: str) -> Any:
    """Token ids, checked.

    Args:
        inputs: A dense or ragged integer tensor of rank 1 or 2.
        vocabulary_size: How many ids there are.
        not_ids: The error for what is not an integer, to be formatted with a name and a value.

    Returns:
        The same tensor. When run, it fails with an `InvalidArgumentError` if an id is unknown.
    """
    import tensorflow as tf

    if not isinstance(inputs, (tf.Tensor, tf.RaggedTensor)):
        inputs = tf.convert_to_tensor(inputs)
    if not inputs.dtype.is_integer:
        raise TypeError(not_ids.format("inputs", inputs))
    if inputs.shape.rank not in (1, 2):
        raise ValueError(
            f"`inputs` must have rank 1 or 2. Received a tensor of shape {inputs.shape}. "
            "Reshape it, or state its shape with `tf.ensure_shape`."
        )
    with tf.device("cpu"):
        flat = getattr(inputs, "flat_values", inputs)
        unknown = (flat < 0) | (flat >= vocabulary_size)
        # Without this, the op's own error is one that `tf.data` may take for the end of the data.
        flat = _identity_if(
            ~tf.reduce_any(unknown),
            f"`inputs` must hold token ids of the vocabulary, from 0 to {vocabulary_size - 1}. Received:",
            tf.boolean_mask(flat, unknown),
            value=flat,
        )
    return inputs.with_flat_values(flat) if isinstance(inputs, tf.RaggedTensor) else flat


def sentencepiece(owner: str, proto: bytes, dtype: str, add_bos: bool, add_eos: bool) -> Any:
    """The TensorFlow tokenizer, as part of the graph being traced.

    keras-hub makes one, outside of all graphs, for all of them. But what it makes lives in
    TensorFlow's cache of kernels, which `keras.utils.set_random_seed` and
    `keras.utils.clear_session` empty; pipelines then fail with "Resource ... does not exist". One
    in the graph lives as long as the graph, is saved with it, and costs nothing without a graph.

    Args:
        owner: Who needs it, for the error where TensorFlow Text is missing.
        proto: The bytes of the SentencePiece model.
        dtype: `"string"` for pieces, or an integer type for ids.
        add_bos: Whether `<bos>` comes first.
        add_eos: Whether `<eos>` comes last.
    """
    assert_tf_libs_installed(owner)
    import tensorflow as tf
    import tensorflow_text as tf_text

    with tf.device("cpu"):
        return tf_text.SentencepieceTokenizer(
            model=proto,
            out_type=tf.string if tf.as_dtype(dtype) == tf.string else tf.int32,
            add_bos=add_bos,
            add_eos=add_eos,
        )


def tokenize(texts: Any, op: Any, dtype: str, length: int | None, pad_id: int) -> Any:
    """Token ids of texts of rank 0 or 1: ragged, or padded and cut to `length` if there is one."""
    import tensorflow as tf

    with tf.device("cpu"):
        batched = texts.shape.rank == 1
        rows = tf.cast(op.tokenize(texts if batched else texts[tf.newaxis]), dtype)
        if length:
            rows = rows.to_tensor(pad_id, shape=(None, length))
        return rows if batched else rows[0]


def detokenize(ids: Any, op: Any) -> Any:
    """Texts of token ids, a dense or ragged tensor of rank 1 or 2."""
    import tensorflow as tf

    with tf.device("cpu"):
        return op.detokenize(tf.cast(ids, tf.int32))


def split_starts(texts: Any, pattern: str, add_start: bool) -> tuple[Any, Any]:
    """Texts of rank 0 or 1 without the `pattern`, and which begin with `<bos>`, as batches."""
    import tensorflow as tf

    with tf.device("cpu"):
        texts = tf.reshape(texts, [-1])
        stripped = tf.strings.regex_replace(texts, pattern, "")
        return stripped, tf.not_equal(texts, stripped) | add_start


def pack(
    texts: Any,
    starts: Any,
    rows: Any,
    ids: tuple[int, int, int],
    limit: int,
    shift: int,
    has_end: bool,
    truncation: str,
    too_long: tuple[str, str],
    no_tokens: tuple[str, str],
) -> tuple[Any, Any]:
    """Frames tokens with `<bos>` and `<eos>`, cuts and pads them: each position by itself.

    Ragged operations would read more like the Python code, but take three times as long to trace
    and to run.

    Args:
        texts: The texts, of rank 0 or 1.
        starts: bool, of shape `[batch]`: which of them begin with `<bos>`.
        rows: Their own tokens, ragged `[batch, tokens]`.
        ids: The ids of `<bos>`, `<eos>` and `<pad>`.
        limit: How many tokens are kept of each text.
        shift: 1 if the last one is a label only; 0 for prompts, which must have a token.
        has_end: Whether `<eos>` comes last.
        truncation: `"right"` keeps the first tokens of a long text, `"left"` its last.
        too_long: The problem and the mend of a text of too many tokens, if that is an `"error"`.
        no_tokens: The problem and the mend of a prompt of no tokens.

    Returns:
        int32 ids and a bool mask of their tokens, `[batch, limit]`; `[limit]` for rank 0.
    """
    import tensorflow as tf

    with tf.device("cpu"):
        heads = tf.cast(starts, tf.int64)
        counts = heads + rows.row_lengths() + int(has_end)
        if truncation == "error":
            long, (problem, mend) = counts > limit, too_long
            message = (
                "`x` at index",
                tf.where(long)[:, 0],
                "has",
                tf.boolean_mask(counts, long),
                f"{problem} Received:",
                _shorten(tf.boolean_mask(tf.reshape(texts, [-1]), long)),
                mend.format(needed="<tokens - 1>" if shift else "<tokens>"),
            )
            counts = _identity_if(~tf.reduce_any(long), *message, value=counts)
        if not shift:
            message = ("`x` at index", tf.where(counts <= 0)[:, 0], " ".join(no_tokens))
            counts = _identity_if(tf.reduce_all(counts > 0), *message, value=counts)
        heads, counts = heads[:, tf.newaxis], counts[:, tf.newaxis]
        excess = tf.maximum(counts - limit, 0)
        ends = counts - excess
        # A column more, so that there is one even where no text has tokens.
        bodies = tf.pad(tf.cast(rows, tf.int32).to_tensor(), [[0, 0], [0, 1]])
        columns = tf.range(limit, dtype=tf.int64)[tf.newaxis]
        places = columns - heads + (excess if truncation == "left" else 0)
        places = tf.clip_by_value(places, 0, tf.shape(bodies, out_type=tf.int64)[1] - 1)
        token_ids = tf.gather(bodies, places, batch_dims=1)
        mask = columns < ends
        conditions = columns < heads, columns >= ends - int(has_end), ~mask
        for condition, token_id in zip(conditions, ids):
            token_ids = tf.where(condition, token_id, token_ids)
        return (token_ids, mask) if texts.shape.rank == 1 else (token_ids[0], mask[0])


def unpack(token_ids: Any, mask: Any, special_ids: Iterable[int], last_id: int) -> Any:
    """The ids of the text, ragged if batched, without padding, special ids and a last `last_id`."""
    import tensorflow as tf

    with tf.device("cpu"):
        token_ids, kept = tf.convert_to_tensor(token_ids), tf.cast(mask, tf.bool)
        for special_id in special_ids:
            kept &= token_ids != special_id
        positions = tf.range(1, tf.shape(token_ids)[-1] + 1)
        ends = tf.where(kept & (token_ids != last_id), positions, 0)
        kept &= positions <= tf.reduce_max(ends, axis=-1)[..., tf.newaxis]
        return tf.ragged.boolean_mask(token_ids, kept)


def _identity_if(condition: Any, *message: Any, value: Any) -> Any:
    """`value`; when run, fails with `message`, of strings and tensors, if `condition` is false."""
    import tensorflow as tf

    check = tf.debugging.Assert(condition, message, summarize=3)
    with tf.control_dependencies([check]):
        return tf.identity(value)


def _shorten(texts: Any) -> Any:
    """The first characters of UTF-8 texts. TensorFlow's errors have to be UTF-8, too."""
    import tensorflow as tf

    return tf.strings.substr(texts, 0, 120, unit="UTF8_CHAR")


def dataset_of_arrays(iterator: Callable[[], Iterable[Any]]) -> Any:
    """A `tf.data.Dataset` of batches `({"token_ids", "padding_mask"}, labels, weights)` of arrays `[B, T]`.

    Args:
        iterator: gives the batches from the first one on. Two are looked at beforehand: where they have the same shape, so must all
            others, but for the last one's rows.
    """
    import tensorflow as tf

    first = [batch[1].shape for batch in itertools.islice(iterator(), 2)]
    if not first:
        raise ValueError("`x` must have at least one batch. Received a dataset without.")
    length = first[0][1] if all(shape[1] == first[0][1] for shape in first) else None
    ids, weights = (tf.TensorSpec((None, length), dtype) for dtype in ("int32", "float32"))
    spec = ({"token_ids": ids, "padding_mask": ids}, ids, weights)
    return tf.data.Dataset.from_generator(iterator, output_signature=spec).prefetch(tf.data.AUTOTUNE)
