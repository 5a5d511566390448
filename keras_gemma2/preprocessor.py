"""Text to the padded token ids that Gemma 2 reads, and back.

One path for both uses: training (`call`) and prompts (`generate_preprocess`)
differ in one number, the shift between a token and its label. Direct calls
run in NumPy, `tf.data` pipelines in TensorFlow, with equal results.
"""

import operator
import re
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.tensor_utils import (
    convert_preprocessing_outputs_python,
    in_tf_function,
)

from keras_gemma2.from_preset import FromPreset
from keras_gemma2.tokenizer import Gemma2Tokenizer, identity_if, read_graph_texts, read_texts, shorten, shorten_in_graph, to_numpy

_TRUNCATIONS = ("error", "right", "left")


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Gemma2CausalLMPreprocessor(FromPreset, keras_hub.models.CausalLMPreprocessor):
    """Turns text into the inputs of a Gemma 2 model, and its output into text.

    Every sequence has `<bos>` at most once, and first: Gemma is much worse
    without it, and was never trained with two. Text that begins with the
    characters `<bos>`, as the output of a chat template does, means the
    token: those characters are dropped and the token takes their place, with
    `add_start_token` on or off. `add_start_token` decides what happens to all
    other text. Further on in a text, `<bos>` is ordinary characters.

    A text too long for `sequence_length` is an error, unless `truncation`
    says which end to keep.

    Args:
        tokenizer: A `Gemma2Tokenizer`. It must leave `sequence_length`,
            `add_bos` and `add_eos` alone, as those are set here.
        sequence_length: int. The length all sequences are padded to.
        add_start_token: bool. Whether `<bos>` comes first, in training and
            in prompts.
        add_end_token: bool. Whether `<eos>` comes last, in training only.
        truncation: What happens to a text with too many tokens: `"error"`
            raises, `"right"` keeps its first tokens and `"left"` its last.
            `<bos>` and `<eos>` are kept in either case.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name`.

    Raises:
        TypeError: If `tokenizer` is not a `Gemma2Tokenizer`, or
            `sequence_length` is not an integer.
        ValueError: If `sequence_length` is not positive, `truncation` is
            unknown, or `tokenizer` pads or adds tokens by itself.

    Example:

    ```python
    tokenizer = Gemma2Tokenizer("tokenizer.model")
    preprocessor = Gemma2CausalLMPreprocessor(tokenizer, sequence_length=6)
    x, y, sample_weight = preprocessor(["Hello world!"])
    x["token_ids"]  # [[2, 4521, 2134, 235341, 1, 0]]
    y  # [[4521, 2134, 235341, 1, 0, 0]]
    prompt = preprocessor.generate_preprocess(["Hello world!"])
    prompt["token_ids"]  # [[2, 4521, 2134, 235341, 0, 0]]
    preprocessor.generate_postprocess(prompt)  # ["Hello world!"]
    ```

    Source: the Gemma 2 technical report, arXiv 2408.00118, for the control
    tokens; `keras_hub.models.CausalLMPreprocessor` for the interface.
    """

    tokenizer_cls = Gemma2Tokenizer

    def __init__(
        self,
        tokenizer: Gemma2Tokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        truncation: str = "error",
        **kwargs,
    ):
        _check_tokenizer(tokenizer)
        super().__init__(
            tokenizer,
            sequence_length=sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )
        self.truncation = truncation

    @property
    def sequence_length(self) -> int:
        """int. The length sequences are padded to; it can be set."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int) -> None:
        self._sequence_length = _check_length(value)

    @property
    def truncation(self) -> str:
        """`"error"`, `"right"` or `"left"`; it can be set."""
        return self._truncation

    @truncation.setter
    def truncation(self, value: str) -> None:
        if value not in _TRUNCATIONS:
            raise ValueError(
                f"`truncation` must be one of {_TRUNCATIONS}. Received: "
                f"truncation={shorten(value)}. Choose 'error' to be told of "
                "texts that are too long, 'right' to keep their first tokens, "
                "'left' to keep their last."
            )
        self._truncation = value

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: sequences are packed here, by no other layer."""
        self.built = True

    def call(
        self,
        x: str | Sequence[str],
        y: None = None,
        sample_weight: None = None,
        sequence_length: int | None = None,
    ) -> tuple:
        """Makes training samples: each token's label is the next token.

        Args:
            x: A string, or a list, array or tensor of strings of rank 1.
            y: Must be `None`: labels come from `x`.
            sample_weight: Must be `None`: weights come from `x`.
            sequence_length: int. A length for this call, in place of the
                configured one.

        Returns:
            `(x, y, sample_weight)`. `x` is a dictionary of `"token_ids"`,
            int32, and `"padding_mask"`, bool, `True` on tokens. `y`, int32,
            and `sample_weight`, bool, are the same one position on. All have
            the shape `[batch, sequence_length]`, or `[sequence_length]` for
            one string. A text may have `sequence_length + 1` tokens, with
            `<bos>` and `<eos>`, as the last is a label only.

        Raises:
            TypeError: If `x` is not text.
            ValueError: If `x` is empty or has no UTF-8 form, if a text is too
                long and `truncation` is `"error"`, if `y` or `sample_weight`
                is given, or if `sequence_length` is not positive. What
                depends on the text is a `tf.errors.InvalidArgumentError` in a
                `tf.data` pipeline.
        """
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise ValueError(
                    f"`{name}` must be `None`: labels and weights are made "
                    f"from the tokens of `x`. Received: {name}="
                    f"{shorten(value)}. Join prompt and answer into one text, "
                    "or give the model token ids, labels and weights of your "
                    "own in place of text."
                )
        token_ids, mask = self._pack(x, sequence_length, shift=1)
        inputs = {
            "token_ids": token_ids[..., :-1],
            "padding_mask": mask[..., :-1],
        }
        return _to_backend((inputs, token_ids[..., 1:], mask[..., 1:]))

    def generate_preprocess(
        self, x: str | Sequence[str], sequence_length: int | None = None
    ) -> dict:
        """Makes prompts: tokens to continue, without `<eos>`.

        An empty text is a prompt of `<bos>` alone.

        Args:
            x: A string, or a list, array or tensor of strings of rank 1.
            sequence_length: int. A length for this call, in place of the
                configured one. It is the length of prompt and answer together.

        Returns:
            A dictionary of `"token_ids"`, int32, and `"padding_mask"`, bool,
            `True` on tokens. Both have the shape `[batch, sequence_length]`,
            or `[sequence_length]` for one string.

        Raises:
            TypeError: If `x` is not text.
            ValueError: As for a call; also if a prompt has no token at all,
                which takes an empty text and `add_start_token=False`.
        """
        token_ids, mask = self._pack(x, sequence_length, shift=0)
        return _to_backend({"token_ids": token_ids, "padding_mask": mask})

    def generate_postprocess(self, x: dict) -> str | list[str]:
        """Makes text of generated token ids.

        Padding, `<bos>`, `<eos>` and `<pad>` are dropped, and so is an
        `<end_of_turn>` at the end, where it only says that the model was
        done. Turn pieces within the text are kept: they tell a prompt from
        its answer. Byte tokens that make no character become U+FFFD.

        Args:
            x: A dictionary of `"token_ids"`, integers, and `"padding_mask"`,
                both of shape `[batch, length]` or `[length]`.

        Returns:
            A list of strings, or one string for ids of rank 1. In a `tf.data`
            pipeline, a string tensor of shape `[batch]` or `[]`.

        Raises:
            ValueError: If `x` lacks a key, the shapes differ, or an id is
                outside the vocabulary.
        """
        token_ids, mask = _read_packed(x)
        if in_tf_function():
            return self._text_in_graph(token_ids, mask)
        token_ids, mask = to_numpy(token_ids), to_numpy(mask)
        if token_ids.ndim not in (1, 2) or token_ids.shape != mask.shape:
            raise ValueError(
                "`token_ids` and `padding_mask` must have one shape, of rank "
                f"1 or 2. Received: shapes {token_ids.shape} and {mask.shape}."
            )
        kept = mask.astype(bool)
        kept &= ~np.isin(token_ids, self.tokenizer.special_token_ids)
        positions = np.arange(1, kept.shape[-1] + 1)
        text = kept & (token_ids != self.tokenizer.end_of_turn_token_id)
        length = np.where(text, positions, 0).max(axis=-1, initial=0)
        kept &= positions <= length[..., None]
        if token_ids.ndim == 1:
            return self.tokenizer.detokenize(token_ids[kept].tolist())
        rows = [row[keep].tolist() for row, keep in zip(token_ids, kept)]
        return self.tokenizer.detokenize(rows) if rows else []

    def get_config(self) -> dict:
        """The constructor's arguments, for `from_config`."""
        return {**super().get_config(), "truncation": self.truncation}

    def _pack(
        self, x: Any, sequence_length: int | None, shift: int
    ) -> tuple[Any, Any]:
        """Padded ids, and where they are tokens.

        Args:
            x: Text, as given by the user.
            sequence_length: As given by the user.
            shift: 1 for training, where a token's label lies one position on
                and `<eos>` may be added; 0 for prompts.

        Returns:
            int32 ids and a bool mask of shape `[..., sequence_length + shift]`.
        """
        if sequence_length is None:
            sequence_length = self.sequence_length
        limit = _check_length(sequence_length) + shift
        has_end = bool(shift and self.add_end_token)
        tail = [self.tokenizer.end_token_id] if has_end else []
        if in_tf_function():
            return self._pack_in_graph(x, limit, shift, tail)
        texts, batched = read_texts(x, "x")
        rows = self._token_rows(texts, limit, shift, tail)
        token_ids, mask = _pad(rows, limit, self.tokenizer.pad_token_id)
        return (token_ids, mask) if batched else (token_ids[0], mask[0])

    def _token_rows(
        self, texts: list[str], limit: int, shift: int, tail: list[int]
    ) -> list[list[int]]:
        """The tokens of each text, `limit` at most."""
        pattern = re.compile(self._start_pattern)
        bodies = [pattern.sub("", text) for text in texts]
        starts = [
            self.add_start_token or text != body
            for text, body in zip(texts, bodies)
        ]
        bodies = self.tokenizer.tokenize(bodies)
        rows = []
        for index, (start, body) in enumerate(zip(starts, bodies)):
            head = [self.tokenizer.start_token_id] if start else []
            count = len(head) + len(body) + len(tail)
            self._check_count(index, texts[index], count, limit, shift)
            excess = max(count - limit, 0)
            first = excess if self.truncation == "left" else 0
            kept = body[first : first + len(body) - excess]
            rows.append([*head, *kept, *tail])
        return rows

    def _check_count(
        self, index: int, text: str, count: int, limit: int, shift: int
    ) -> None:
        """Raises if a text has too many tokens, or a prompt none."""
        if count > limit and self.truncation == "error":
            problem, mend = _too_long(limit, shift, str(count - shift))
            raise ValueError(
                f"`x` at index {index} has {count} {problem} Received: "
                f"{shorten(text)}. {mend}"
            )
        if count == 0 and not shift:
            problem, mend = _no_tokens(self.tokenizer.start_token)
            raise ValueError(
                f"`x` at index {index} {problem} Received: {text!r}. {mend}"
            )

    def _pack_in_graph(
        self, x: Any, limit: int, shift: int, tail: list[int]
    ) -> tuple[Any, Any]:
        """`_pack`, for a `tf.data` pipeline."""
        import tensorflow as tf

        with tf.device("cpu"):
            x = read_graph_texts(x, "x")
            batched = x.shape.rank == 1
            texts = x if batched else x[tf.newaxis]
            bodies, *sizes = self._count_in_graph(texts, limit, shift, tail)
            token_ids, mask = self._arrange_in_graph(bodies, *sizes, limit)
            return (token_ids, mask) if batched else (token_ids[0], mask[0])

    def _count_in_graph(
        self, texts: Any, limit: int, shift: int, tail: list[int]
    ) -> tuple[Any, Any, Any, Any]:
        """Each text's own tokens, ragged, and how many frame it.

        Returns:
            The ragged ids `[batch, tokens]`; and, as int64 of shape
            `[batch, 1]`, how many tokens go before them, how many after, and
            all of them together.
        """
        import tensorflow as tf

        stripped = tf.strings.regex_replace(texts, self._start_pattern, "")
        starts = tf.not_equal(texts, stripped) | self.add_start_token
        bodies = tf.cast(self.tokenizer.tokenize(stripped), tf.int32)
        heads = tf.cast(starts, tf.int64)
        tails = tf.ones_like(heads) * len(tail)
        counts = heads + bodies.row_lengths() + tails
        if self.truncation == "error":
            counts = _check_fit_in_graph(counts, texts, limit, shift)
        if not shift:
            start_token = self.tokenizer.start_token
            counts = _check_some_in_graph(counts, start_token)
        sizes = (size[:, tf.newaxis] for size in (heads, tails, counts))
        return bodies, *sizes

    def _arrange_in_graph(
        self, bodies: Any, heads: Any, tails: Any, counts: Any, limit: int
    ) -> tuple[Any, Any]:
        """What `_token_rows` and `_pad` do, each position by itself.

        Ragged operations would read more like `_token_rows`, but take three
        times as long to trace and to run.
        """
        import tensorflow as tf

        excess = tf.maximum(counts - limit, 0)
        first = excess if self.truncation == "left" else tf.zeros_like(excess)
        # A column more, so that there is one even where no text has tokens.
        bodies = tf.pad(bodies.to_tensor(), [[0, 0], [0, 1]])
        columns = tf.range(limit, dtype=tf.int64)[tf.newaxis]
        places = columns - heads + first
        last = tf.shape(bodies, out_type=tf.int64)[1] - 1
        places = tf.clip_by_value(places, 0, last)
        token_ids = tf.gather(bodies, places, batch_dims=1)
        ends = counts - excess
        mask = columns < ends
        for condition, token_id in (
            (columns < heads, self.tokenizer.start_token_id),
            (columns >= ends - tails, self.tokenizer.end_token_id),
            (~mask, self.tokenizer.pad_token_id),
        ):
            token_ids = tf.where(condition, token_id, token_ids)
        return token_ids, mask

    def _text_in_graph(self, token_ids: Any, mask: Any) -> Any:
        """`generate_postprocess`, for a `tf.data` pipeline."""
        import tensorflow as tf

        with tf.device("cpu"):
            token_ids = tf.convert_to_tensor(token_ids)
            kept = tf.cast(mask, tf.bool)
            for special_id in self.tokenizer.special_token_ids:
                kept &= token_ids != special_id
            positions = tf.range(1, tf.shape(token_ids)[-1] + 1)
            text = kept & (token_ids != self.tokenizer.end_of_turn_token_id)
            length = tf.reduce_max(tf.where(text, positions, 0), axis=-1)
            kept &= positions <= length[..., tf.newaxis]
            return self.tokenizer.detokenize(
                tf.ragged.boolean_mask(token_ids, kept)
            )

    @property
    def _start_pattern(self) -> str:
        """`<bos>` spelled out at the start of a text, however often."""
        return rf"\A(?:{re.escape(self.tokenizer.start_token)})+"


def _check_tokenizer(tokenizer: Any) -> None:
    """Raises unless `tokenizer` gives bare Gemma token ids."""
    if not isinstance(tokenizer, Gemma2Tokenizer):
        raise TypeError(
            "`tokenizer` must be a `Gemma2Tokenizer`. Received: tokenizer="
            f"{shorten(tokenizer)}, of type {type(tokenizer).__name__}. Build "
            "one with `Gemma2Tokenizer(proto)`."
        )
    settings = {
        name: getattr(tokenizer, name)
        for name in ("sequence_length", "add_bos", "add_eos")
        if getattr(tokenizer, name)
    }
    if "int" not in tokenizer.compute_dtype:
        settings["dtype"] = tokenizer.compute_dtype
    if settings:
        raise ValueError(
            "`tokenizer` must not pad, cut or add tokens by itself, as its "
            f"preprocessor does. Received a tokenizer with {settings}. Leave "
            "these arguments out, and set `sequence_length`, "
            "`add_start_token` and `add_end_token` on the preprocessor."
        )


def _check_length(value: Any) -> int:
    """`value` as a positive Python integer."""
    try:
        length = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        length = None
    if length is None:
        raise TypeError(
            "`sequence_length` must be a positive integer. Received: "
            f"sequence_length={shorten(value)}, of type "
            f"{type(value).__name__}. Convert it with `int()`."
        )
    if length <= 0:
        raise ValueError(
            "`sequence_length` must be a positive integer. Received: "
            f"sequence_length={length}. Pass 1 or more; Gemma 2 was trained "
            "with up to 8192 tokens."
        )
    return length


def _read_packed(x: Any) -> tuple[Any, Any]:
    """The token ids and the padding mask of a dictionary of both."""
    keys = ("token_ids", "padding_mask")
    if not isinstance(x, dict) or not all(key in x for key in keys):
        found = sorted(x) if isinstance(x, dict) else type(x).__name__
        raise ValueError(
            f"`x` must be a dictionary with the keys {keys}. Received: "
            f"{found}. Pass what `generate_preprocess` or the model returned."
        )
    return tuple(
        np.asarray(x[key]) if isinstance(x[key], (list, tuple)) else x[key]
        for key in keys
    )


def _pad(
    rows: list[list[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows as an int32 array `[batch, length]`, and a mask of their tokens."""
    token_ids = np.full((len(rows), length), pad_id, dtype="int32")
    mask = np.zeros((len(rows), length), dtype=bool)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return token_ids, mask


def _to_backend(outputs: Any) -> Any:
    """Arrays as tensors of the Keras backend; graph tensors as they are."""
    if in_tf_function():
        return outputs
    return convert_preprocessing_outputs_python(outputs)


def _too_long(limit: int, shift: int, needed: str) -> tuple[str, str]:
    """What is wrong with a text of too many tokens, and what to do."""
    extra = " (one of them as a label only)" if shift else ""
    problem = (
        "tokens, with those that frame it, but "
        f"`sequence_length={limit - shift}` has room for {limit}{extra}."
    )
    mend = (
        f"Pass `sequence_length={needed}` or more, shorten the text, or set "
        "`truncation` to 'right' to keep the first tokens or to 'left' to "
        "keep the last."
    )
    return problem, mend


def _no_tokens(start_token: str) -> tuple[str, str]:
    """What is wrong with a prompt of no tokens, and what to do."""
    problem = "has no tokens, so there is nothing to continue."
    mend = f"Pass some text, or `add_start_token=True` to have `{start_token}`."
    return problem, mend


def _check_fit_in_graph(
    counts: Any, texts: Any, limit: int, shift: int
) -> Any:
    """`counts` of tokens, failing where one is above `limit`."""
    import tensorflow as tf

    needed = "<tokens - 1>" if shift else "<tokens>"
    problem, mend = _too_long(limit, shift, needed)
    long = counts > limit
    return identity_if(
        ~tf.reduce_any(long),
        "`x` at index",
        tf.where(long)[:, 0],
        "has",
        tf.boolean_mask(counts, long),
        f"{problem} Received:",
        shorten_in_graph(tf.boolean_mask(texts, long)),
        mend,
        value=counts,
    )


def _check_some_in_graph(counts: Any, start_token: str) -> Any:
    """`counts` of tokens, failing where one is zero."""
    import tensorflow as tf

    problem, mend = _no_tokens(start_token)
    return identity_if(
        tf.reduce_all(counts > 0),
        "`x` at index",
        tf.where(counts <= 0)[:, 0],
        f"{problem} {mend}",
        value=counts,
    )
