"""Texts to rows of tokens and back, in a TensorFlow graph, by TensorFlow Text's SentencePiece operations."""

from __future__ import annotations

from typing import Any

from keras_hub.src.utils.tensor_utils import assert_tf_libs_installed

from keras_gemma2.backend import tf_pipeline
from keras_gemma2.chat import MODEL, USER
from keras_gemma2.export.graph import Rows
from keras_gemma2.plain_text import encode_texts, reading_proto
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor

# What `str.strip` takes away, for RE2.
_SPACE = r"[\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+"


class GraphText:
    """The tokenizer of a graph: made once, outside of the graph, and saved with it once, whatever uses it.

    Args:
        preprocessor: of the model.
        chat: whether a prompt is a user's message, to be put in Gemma's chat format, in which nothing that it spells out makes a
            control piece; else it is a text to continue, read as `Gemma2CausalLM.generate` reads it.
        context: tokens that a prompt may have.

    Attributes:
        resources: what the SavedModel must keep.
    """

    def __init__(self, preprocessor: Gemma2CausalLMPreprocessor, chat: bool, context: int) -> None:
        assert_tf_libs_installed("The export of text signatures")
        import tensorflow_text as tf_text

        self._preprocessor, self._tokenizer, self._chat, self._context = preprocessor, preprocessor.tokenizer, chat, context
        self._writer = tf_text.SentencepieceTokenizer(model=self._tokenizer.proto)
        self._reader = tf_text.SentencepieceTokenizer(model=reading_proto(self._tokenizer, False)) if chat else self._writer
        self.resources = [self._writer, self._reader] if chat else [self._writer]
        newline, answer = encode_texts(self._tokenizer, ["\n", f"{MODEL}\n"])
        start, end = self._tokenizer.start_of_turn_token_id, self._tokenizer.end_of_turn_token_id
        self._before, self._after = [self._tokenizer.start_token_id, start], [end, *newline, start, *answer]

    def rows(self, texts: Any) -> Rows:
        """Rows to continue, of a string tensor `[B]`.

        When run, it fails with an `InvalidArgumentError` for a text that is not UTF-8, has no tokens (in a chat: nothing but white
        space), or more than the context has room for.
        """
        import tensorflow as tf

        texts = tf_pipeline.read_texts(texts, "prompts")
        rows = self._message(texts) if self._chat else self._plain(texts)
        counts = tf.cast(rows.row_lengths(), tf.int32)
        counts = checked(
            counts <= self._context,
            f"`prompts` must have at most {self._context} tokens, the model's context, in each row. Shorten those at index",
            counts,
        )
        token_ids = tf.cast(rows.to_tensor(self._tokenizer.pad_token_id), tf.int32)
        return Rows(token_ids, counts, tf.zeros_like(token_ids))

    def _plain(self, texts: Any) -> Any:
        import tensorflow as tf

        bodies, starts = tf_pipeline.split_starts(texts, self._preprocessor._start_pattern, self._preprocessor.add_start_token)
        rows = self._reader.tokenize(bodies)
        lengths = tf.cast(starts, rows.row_splits.dtype)
        bos = tf.RaggedTensor.from_row_lengths(tf.fill([tf.reduce_sum(lengths)], self._tokenizer.start_token_id), lengths)
        rows = tf.concat([bos, rows], axis=1)
        lengths = checked(
            rows.row_lengths() > 0,
            "`prompts` must have a token each (export with `add_start_token=True` in the preprocessor to have `<bos>`). "
            "There is nothing to continue at index",
            rows.row_lengths(),
        )
        return tf.RaggedTensor.from_row_lengths(rows.values, lengths, validate=False)

    def _message(self, texts: Any) -> Any:
        import tensorflow as tf

        said = tf.strings.regex_replace(tf.strings.regex_replace(texts, rf"\A{_SPACE}", ""), rf"{_SPACE}\z", "")
        said = checked(said != "", "`prompts` must have some text besides white space. There is none at index", said)
        rows = self._reader.tokenize(tf.strings.join([f"{USER}\n", said]))
        batch = tf.shape(texts)[0]

        def each(ids: list[int]) -> Any:
            return tf.RaggedTensor.from_tensor(tf.tile([ids], [batch, 1]), row_splits_dtype=rows.row_splits.dtype)

        return tf.concat([each(self._before), rows, each(self._after)], axis=1)

    def texts(self, token_ids: Any, is_new: Any, stop_token_ids: tuple[int, ...]) -> Any:
        """Strings `[B]` of the new tokens in `token_ids [B, n]`, bool `is_new` where they are."""
        import tensorflow as tf

        if self._chat:
            is_new &= ~tf.reduce_any(token_ids[..., None] == tf.constant(stop_token_ids, tf.int32), axis=-1)
        kept = tf_pipeline.unpack(
            token_ids, is_new, self._tokenizer.special_token_ids, self._tokenizer.end_of_turn_token_id
        )
        return tf_pipeline.detokenize(kept, self._writer)


def checked(condition: Any, message: str, value: Any) -> Any:
    """`value`; when run, fails with `message` and the index of what is false in `condition [B]`."""
    import tensorflow as tf

    # Not `tf.debugging.Assert`, which is a branch of two functions, each of which takes long to load.
    check = tf.raw_ops.Assert(condition=tf.reduce_all(condition), data=[message, tf.where(~condition)[:, 0]], summarize=5)
    with tf.control_dependencies([check]):
        return tf.identity(value)
