"""Text to token ids and back: Gemma's SentencePiece vocabulary.

keras-hub's `SentencePieceTokenizer` does the work, in Python when called
directly and in TensorFlow inside a `tf.data` pipeline. This file adds the
pieces Gemma gives a meaning to, input checks that say what to mend, and a
construction that stays quick with 256,000 pieces.
"""

import os
from typing import Any

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.tensor_utils import assert_tf_libs_installed, in_tf_function

from keras_gemma2.from_preset import FromPreset

# Pieces that frame a sequence; they are dropped from generated text.
_FRAME_PIECES = {
    "start_token": "<bos>",
    "end_token": "<eos>",
    "pad_token": "<pad>",
}
# Pieces that frame one turn of a chat; they stay, as part of the text.
_TURN_PIECES = {
    "start_of_turn_token": "<start_of_turn>",
    "end_of_turn_token": "<end_of_turn>",
}
# keras-hub's list and dictionary of all pieces.
_PLAIN_ATTRIBUTES = ("_vocabulary", "_token_to_id_map")


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Gemma2Tokenizer(FromPreset, keras_hub.tokenizers.SentencePieceTokenizer):
    """Turns text into Gemma 2 token ids, and token ids back into text.

    No beginning-of-sequence token is added here: that is the preprocessor's
    task. A piece that only marks structure, such as `"<bos>"`, is read as the
    five characters it is spelled with, so text from strangers cannot forge
    it. The chat pieces `"<start_of_turn>"` and `"<end_of_turn>"` are read as
    one token each, as in every Gemma tokenizer.

    `detokenize(tokenize(text)) == text` holds for every text but one that has
    the character U+2581 (lower one eighth block): SentencePiece writes spaces
    with it, so it comes back as a space.

    The same ids come out of a direct call, which runs in Python, and of a
    `tf.data` pipeline, which runs in TensorFlow. A pipeline has its own copy
    of the vocabulary, read (in a third of a second) when an iteration starts.

    Args:
        proto: The vocabulary: a path to a SentencePiece model file
            (`tokenizer.model`, `vocabulary.spm`), or its bytes. `None` leaves
            the tokenizer empty until `load_assets` fills it.
        **kwargs: Arguments of `keras_hub.tokenizers.SentencePieceTokenizer`
            and `keras.layers.Layer`, such as `name`. `dtype` is the integer
            type of the ids, `"int32"` unless given.

    Attributes:
        start_token, end_token, pad_token: The pieces `"<bos>"`, `"<eos>"` and
            `"<pad>"`; their ids are `start_token_id` and so on.
        start_of_turn_token, end_of_turn_token: The pieces that open and close
            a chat turn; their ids are `start_of_turn_token_id` and
            `end_of_turn_token_id`.
        end_token2, end_token2_id: The end of a turn once more, under the name
            keras-hub's `CausalLM` looks for when it decides where to stop.
        stop_token_ids: Where generation stops: after `"<eos>"`, or after
            `"<end_of_turn>"`.
        special_token_ids: The ids of `"<bos>"`, `"<eos>"` and `"<pad>"`. The
            turn pieces are not among them: a conversation without them would
            run its turns together. The preprocessor drops the one that ends
            the generated text.

    Raises:
        ValueError: If `proto` is not a SentencePiece model, or its vocabulary
            lacks one of the pieces above.

    Example:

    ```python
    tokenizer = Gemma2Tokenizer("tokenizer.model")
    tokenizer.tokenize("Hello world!")  # int32 array [4521, 2134, 235341]
    tokenizer.tokenize(["Hello", "2024"])  # list of two lists of ids
    tokenizer.detokenize([4521, 2134, 235341])  # "Hello world!"
    dataset = tf.data.Dataset.from_tensor_slices(["Hello"]).map(tokenizer)
    ```

    Source: SentencePiece, arXiv 1808.06226; the Gemma 2 technical report,
    arXiv 2408.00118, for the vocabulary and the control tokens.
    """

    start_of_turn_token = _TURN_PIECES["start_of_turn_token"]
    end_of_turn_token = _TURN_PIECES["end_of_turn_token"]
    end_token2 = end_of_turn_token
    start_of_turn_token_id = None
    end_of_turn_token_id = None

    def __init__(self, proto: str | bytes | os.PathLike | None, **kwargs):
        for name, piece in _FRAME_PIECES.items():
            self._add_special_token(piece, name)
        super().__init__(proto=proto, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Keras, and TensorFlow once more, would copy these into containers
        # that look for layers among the 256,000 pieces: up to 3 seconds.
        if name in _PLAIN_ATTRIBUTES:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def end_token2_id(self) -> int | None:
        """int, or `None` without a vocabulary: the id of `<end_of_turn>`."""
        return self.end_of_turn_token_id

    @property
    def stop_token_ids(self) -> tuple[int, int]:
        """The ids of `<eos>` and `<end_of_turn>`; either one ends generation.

        Raises:
            ValueError: If no vocabulary is set.
        """
        self._check_vocabulary()
        return (self.end_token_id, self.end_of_turn_token_id)

    def set_proto(self, proto: str | bytes | os.PathLike | None) -> None:
        """Replaces the vocabulary.

        Args:
            proto: As in the constructor.

        Raises:
            ValueError: If `proto` is not a SentencePiece model, or its
                vocabulary lacks a piece that Gemma needs.
        """
        if isinstance(proto, os.PathLike):
            proto = os.fspath(proto)
        try:
            super().set_proto(proto)
        except RuntimeError as error:
            raise ValueError(
                "`proto` must be a SentencePiece model: the path of a file "
                "such as `tokenizer.model` or `vocabulary.spm`, or its bytes. "
                f"Received: proto={shorten(proto)}, which SentencePiece could "
                f"not read ({error})."
            ) from error

    def tokenize(self, inputs: Any) -> Any:
        """Turns text into token ids.

        Args:
            inputs: A string, or a list, tuple or array of strings of rank 1.
                `bytes` are taken as UTF-8. An empty string has no tokens.
                Inside a `tf.data` pipeline, a string tensor of rank 0 or 1.

        Returns:
            For one string, its ids as an int32 array of shape `[tokens]`. For
            a batch, a list of lists of ids. Inside a `tf.data` pipeline, an
            int32 tensor of shape `[tokens]`, or a ragged one of shape
            `[batch, tokens]`.

        Raises:
            TypeError: If `inputs`, or a member of it, is not a string.
            ValueError: If `inputs` is an empty list, or a text cannot be
                written in UTF-8 (a lone surrogate, or broken bytes). Inside a
                pipeline this is a `tf.errors.InvalidArgumentError`.
        """
        self._check_vocabulary()
        if in_tf_function():
            texts = read_graph_texts(inputs, "inputs")
            return self._tokenize_in_graph(texts)
        texts, batched = read_texts(inputs, "inputs")
        return super().tokenize(texts if batched else texts[0])

    def detokenize(self, inputs: Any) -> Any:
        """Turns token ids into text.

        `"<bos>"`, `"<eos>"` and `"<pad>"` become nothing. Byte tokens that
        do not add up to a character become U+FFFD.

        Args:
            inputs: One id, a list or array of ids, or a batch of those: a
                list of lists or an array of shape `[batch, tokens]`. Inside a
                `tf.data` pipeline, a dense or ragged integer tensor of rank 1
                or 2.

        Returns:
            A string, or a list of strings for a batch. Inside a `tf.data`
            pipeline, a string tensor of shape `[]` or `[batch]`.

        Raises:
            TypeError: If `inputs` holds something else than integers.
            ValueError: If an id is outside the vocabulary. Inside a pipeline
                this is a `tf.errors.InvalidArgumentError`.
        """
        self._check_vocabulary()
        if in_tf_function():
            return self._detokenize_in_graph(self._check_graph_ids(inputs))
        rows, batched = self._read_id_rows(inputs)
        if not rows:
            return []
        return super().detokenize(rows if batched else rows[0])

    def _read_id_rows(self, inputs: Any) -> tuple[list[list[int]], bool]:
        """Ids as a list of rows, and whether `inputs` was a batch."""
        values = to_python(inputs)
        if isinstance(values, int):
            values = [values]
        if not isinstance(values, (list, tuple)):
            raise TypeError(_NOT_IDS.format("inputs", shorten(inputs)))
        values = [v if isinstance(v, int) else to_python(v) for v in values]
        batched = any(isinstance(v, (list, tuple)) for v in values)
        # An array with no rows is an empty batch; `[]` is an empty text.
        batched = batched or getattr(inputs, "ndim", 1) == 2
        if not batched:
            return [self._read_ids(values, "inputs")], False
        names = (f"inputs[{index}]" for index in range(len(values)))
        return list(map(self._read_ids, values, names)), True

    def _read_ids(self, values: Any, name: str) -> list[int]:
        """One row of ids, as Python integers inside the vocabulary."""
        if not isinstance(values, (list, tuple)):
            raise TypeError(_NOT_IDS.format(name, shorten(values)))
        for value in values:
            whole = isinstance(value, (int, np.integer))
            if not whole or isinstance(value, bool):
                raise TypeError(_NOT_IDS.format(name, shorten(value)))
            if not 0 <= value < self._vocabulary_size:
                raise ValueError(
                    f"`{name}` must hold token ids of the vocabulary, from 0 "
                    f"to {self._vocabulary_size - 1}. Received: {value}. Mask "
                    "the model's logits beyond the vocabulary, or load the "
                    "vocabulary the ids were made with."
                )
        return [int(value) for value in values]

    def _check_graph_ids(self, inputs: Any) -> Any:
        """`inputs` as a tensor that fails where an id is unknown."""
        import tensorflow as tf

        if not isinstance(inputs, (tf.Tensor, tf.RaggedTensor)):
            inputs = tf.convert_to_tensor(inputs)
        if not inputs.dtype.is_integer:
            raise TypeError(_NOT_IDS.format("inputs", inputs))
        if inputs.shape.rank not in (1, 2):
            raise ValueError(
                "`inputs` must have rank 1 or 2. Received a tensor of shape "
                f"{inputs.shape}. Reshape it, or state its shape with "
                "`tf.ensure_shape`."
            )
        # Without this, the op's own error is one that `tf.data` may take for
        # the end of the data set.
        flat = getattr(inputs, "flat_values", inputs)
        unknown = (flat < 0) | (flat >= self._vocabulary_size)
        flat = identity_if(
            ~tf.reduce_any(unknown),
            "`inputs` must hold token ids of the vocabulary, from 0 to "
            f"{self._vocabulary_size - 1}. Received:",
            tf.boolean_mask(flat, unknown),
            value=flat,
        )
        if isinstance(inputs, tf.RaggedTensor):
            return inputs.with_flat_values(flat)
        return flat

    def _use_tf_workflow(self) -> bool:
        """Whether a `tf.data` pipeline or a `tf.function` is being traced.

        Direct calls always run in Python, whatever keras-hub's private
        `_allow_python_workflow` says: the ids are the same.
        """
        return in_tf_function()

    def _set_proto_tf(self, proto: bytes) -> None:
        """Makes no op: each graph has its own. Called by `set_proto`."""
        self._sentence_piece = None

    def _set_proto_spm(self, proto: bytes) -> None:
        """Loads the vocabulary. Called by `set_proto`."""
        if not proto:
            # Before 0.2.2, SentencePiece takes this for no vocabulary at all
            # and ends the process when asked about it.
            raise RuntimeError("it is empty")
        super()._set_proto_spm(proto)

    def _graph_op(self) -> Any:
        """The TensorFlow tokenizer, as part of the graph being traced.

        keras-hub makes one, outside of all graphs, for all of them. But what
        it makes lives in TensorFlow's cache of kernels, which
        `keras.utils.set_random_seed` and `keras.utils.clear_session` empty;
        pipelines then fail with "Resource ... does not exist". One in the
        graph lives as long as the graph, is saved with it, and costs nothing
        where there is none.
        """
        assert_tf_libs_installed(type(self).__name__)
        import tensorflow as tf
        import tensorflow_text as tf_text

        is_text = tf.as_dtype(self.compute_dtype) == tf.string
        return tf_text.SentencepieceTokenizer(
            model=self.proto,
            out_type=tf.string if is_text else tf.int32,
            add_bos=self.add_bos,
            add_eos=self.add_eos,
        )

    def _tokenize_in_graph(self, texts: Any) -> Any:
        """`tokenize`, for a string tensor of rank 0 or 1."""
        import tensorflow as tf

        with tf.device("cpu"):
            batch = texts if texts.shape.rank == 1 else texts[tf.newaxis]
            rows = self._graph_op().tokenize(batch)
            rows = tf.cast(rows, self.compute_dtype)
            if self.sequence_length:
                shape = (None, self.sequence_length)
                rows = rows.to_tensor(self.pad_token_id, shape=shape)
            return rows if texts.shape.rank == 1 else rows[0]

    def _detokenize_in_graph(self, ids: Any) -> Any:
        """`detokenize`, for a dense or ragged tensor of rank 1 or 2."""
        import tensorflow as tf

        with tf.device("cpu"):
            return self._graph_op().detokenize(tf.cast(ids, tf.int32))

    def _update_special_token_ids(self) -> None:
        """Looks the special pieces up. Called by `set_proto`."""
        for name, piece in (_FRAME_PIECES | _TURN_PIECES).items():
            # keras-hub searches a list of all pieces; this is a dictionary.
            token_id = self._token_to_id_map.get(piece)
            if token_id is None:
                raise ValueError(
                    f"`proto` must be a Gemma vocabulary: it lacks the piece "
                    f"`{piece}` among its {self._vocabulary_size} pieces. "
                    "Pass the `tokenizer.model` or `vocabulary.spm` that came "
                    "with the Gemma weights, or train one with this piece "
                    "among its `user_defined_symbols` or as its bos, eos or "
                    "pad piece."
                )
            setattr(self, f"{name}_id", token_id)


_NOT_IDS = (
    "`{}` must hold integer token ids: one id, a list of ids, or a list of "
    "such lists. Received: {}. Convert strings with `tokenize()` first."
)


def read_texts(inputs: Any, argument: str) -> tuple[list[str], bool]:
    """Any accepted form of text as a list of strings.

    Args:
        inputs: A string, or a list, tuple, array or eager tensor of strings.
        argument: What error messages call `inputs`.

    Returns:
        The strings, and whether `inputs` was a batch of them.

    Raises:
        TypeError: If something else than strings was given.
        ValueError: If the batch is empty, or a text has no UTF-8 form.
    """
    if not isinstance(inputs, (str, bytes)):
        inputs = to_python(inputs)
    if isinstance(inputs, (str, bytes)):
        return [_read_text(inputs, argument)], False
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(
            f"`{argument}` must be a string or a list of strings. Received: "
            f"{argument}={shorten(inputs)}, of type {type(inputs).__name__}. "
            "Convert it with `str()`."
        )
    if not inputs:
        raise ValueError(
            f"`{argument}` must hold at least one text. Received: "
            f"{argument}={inputs}. Skip empty batches, or pass `['']` for one "
            "empty text."
        )
    texts = [_read_text(t, f"{argument}[{i}]") for i, t in enumerate(inputs)]
    return texts, True


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
            f"`{name}` must be UTF-8. Received: {shorten(text)}, where byte "
            f"{error.start} is not. Decode the bytes with their own encoding "
            "first, or with `bytes.decode('utf-8', 'replace')`."
        ) from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` must not have lone surrogates: they have no UTF-8 "
            f"form. Received: {shorten(text)}, with {text[error.start]!r} at "
            f"position {error.start}. Mend it with `text.encode('utf-16', "
            "'surrogatepass').decode('utf-16', 'replace')`, which joins "
            "surrogates that are pairs."
        ) from None
    raise TypeError(
        f"`{name}` must be a string. Received: {shorten(text)}, of type "
        f"{type(text).__name__}. Convert it with `str()`; batches have one "
        "dimension."
    )


def read_graph_texts(inputs: Any, argument: str) -> Any:
    """Text inside a `tf.data` pipeline or a `tf.function`, checked.

    Args:
        inputs: A string tensor of rank 0 or 1.
        argument: What error messages call `inputs`.

    Returns:
        The same tensor. When run, it fails with an `InvalidArgumentError` if
        a text is not UTF-8.

    Raises:
        TypeError: If `inputs` does not hold strings.
        ValueError: If its rank is neither 0 nor 1, or it is empty.
    """
    import tensorflow as tf

    if not isinstance(inputs, tf.RaggedTensor):
        inputs = tf.convert_to_tensor(inputs)
    if inputs.dtype != tf.string:
        raise TypeError(
            f"`{argument}` must hold strings. Received a tensor of dtype "
            f"{inputs.dtype.name}. Convert it with `tf.strings.as_string`."
        )
    if inputs.shape.rank not in (0, 1):
        raise ValueError(
            f"`{argument}` must have rank 0 or 1. Received a tensor of shape "
            f"{inputs.shape}. Reshape it, or state its shape with "
            "`tf.ensure_shape`."
        )
    if inputs.shape.rank == 1 and inputs.shape[0] == 0:
        raise ValueError(
            f"`{argument}` must hold at least one text. Received a tensor of "
            f"shape {inputs.shape}. Skip empty batches."
        )
    # SentencePiece would read broken bytes as U+FFFD, without a word.
    utf8 = tf.strings.unicode_transcode(inputs, "UTF-8", "UTF-8", "replace")
    broken = tf.reshape(tf.not_equal(inputs, utf8), [-1])
    return identity_if(
        ~tf.reduce_any(broken),
        f"`{argument}` must be UTF-8. At index",
        tf.where(broken)[:, 0],
        "received, with U+FFFD for what is not,",
        # The bytes themselves would break TensorFlow's error in turn.
        shorten_in_graph(tf.boolean_mask(tf.reshape(utf8, [-1]), broken)),
        "Decode the bytes with their own encoding first, or mend them with "
        "`tf.strings.unicode_transcode(text, 'UTF-8', 'UTF-8')`.",
        value=inputs,
    )


def identity_if(condition: Any, *message: Any, value: Any) -> Any:
    """`value`, once TensorFlow has found `condition` true.

    Args:
        condition: A bool tensor of rank 0.
        *message: Strings and tensors, for the error.
        value: The tensor to hand on.

    Returns:
        A tensor equal to `value`. When run, it fails with an
        `InvalidArgumentError` if `condition` is false.
    """
    import tensorflow as tf

    check = tf.debugging.Assert(condition, message, summarize=3)
    with tf.control_dependencies([check]):
        return tf.identity(value)


def to_numpy(value: Any) -> Any:
    """Arrays and eager tensors, of any backend, as NumPy arrays.

    Args:
        value: Anything. What is not an array or a tensor is returned as is.

    Returns:
        A NumPy array, or `value`.
    """
    if keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value)
    return np.asarray(value) if hasattr(value, "__array__") else value


def to_python(value: Any) -> Any:
    """Arrays, eager tensors and ragged tensors as Python lists or scalars.

    Args:
        value: Anything. What is not an array or a tensor is returned as is.

    Returns:
        A Python list, nested as `value` is, or a Python scalar.
    """
    if hasattr(value, "to_list"):  # tf.RaggedTensor, pandas.Series
        return value.to_list()
    value = to_numpy(value)
    return value.tolist() if isinstance(value, np.ndarray) else value


def shorten(value: Any, limit: int = 120) -> str:
    """`repr(value)`, cut to fit an error message.

    Args:
        value: Anything.
        limit: How many characters are kept.

    Returns:
        The representation, printable even if `value` has lone surrogates.
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def shorten_in_graph(texts: Any, limit: int = 120) -> Any:
    """The first characters of texts, to fit an error message.

    Args:
        texts: A string tensor of UTF-8.
        limit: How many characters are kept.

    Returns:
        A string tensor of the same shape.
    """
    import tensorflow as tf

    # Cut between characters: TensorFlow's errors have to be UTF-8, too.
    return tf.strings.substr(texts, 0, limit, unit="UTF8_CHAR")
