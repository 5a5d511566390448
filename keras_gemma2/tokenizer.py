"""Text to token ids and back: Gemma's SentencePiece vocabulary.

keras-hub's `SentencePieceTokenizer` does the work in Python when called directly, and
`backend.tf_pipeline` in TensorFlow inside a `tf.data` pipeline. This file adds the pieces Gemma
gives a meaning to, input checks that say what to mend, and a construction that stays quick with
256,000 pieces.
"""

import os
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
from keras_hub.src.utils.tensor_utils import in_tf_function

from keras_gemma2.backend import tf_pipeline
from keras_gemma2.from_preset import FromPreset
from keras_gemma2.text_inputs import NOT_IDS, read_id_rows, read_texts, shorten

# Pieces that frame a sequence; they are dropped from generated text.
_FRAME_PIECES = {"start_token": "<bos>", "end_token": "<eos>", "pad_token": "<pad>"}
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

    No beginning-of-sequence token is added here: that is the preprocessor's task. A piece that only
    marks structure, such as `"<bos>"`, is read as the five characters it is spelled with, so text
    from strangers cannot forge it. The chat pieces `"<start_of_turn>"` and `"<end_of_turn>"` are
    read as one token each, as in every Gemma tokenizer.

    `detokenize(tokenize(text)) == text` holds for every text but one that has the character U+2581
    (lower one eighth block): SentencePiece writes spaces with it, so it comes back as a space.

    The same ids come out of a direct call, which runs in Python, and of a `tf.data` pipeline, which
    runs in TensorFlow. A pipeline has its own copy of the vocabulary, read (in a third of a second)
    when an iteration starts.

    Args:
        proto: The vocabulary: a path to a SentencePiece model file (`tokenizer.model`,
            `vocabulary.spm`), or its bytes. `None` leaves the tokenizer empty until `load_assets`
            fills it.
        extra_stop_token_ids: Ids that end generation besides `<eos>` and `<end_of_turn>`: those a
            checkpoint's `generation_config.json` names.
        **kwargs: Arguments of `keras_hub.tokenizers.SentencePieceTokenizer` and
            `keras.layers.Layer`, such as `name`. `dtype` is the integer type of the ids, `"int32"`
            unless given.

    Attributes:
        start_token, end_token, pad_token: The pieces `"<bos>"`, `"<eos>"` and `"<pad>"`; their ids
            are `start_token_id` and so on.
        start_of_turn_token, end_of_turn_token: The pieces that open and close a chat turn; their
            ids are `start_of_turn_token_id` and `end_of_turn_token_id`.
        end_token2, end_token2_id: The end of a turn once more, under the name keras-hub's
            `CausalLM` looks for when it decides where to stop.
        stop_token_ids: Where generation stops: after `"<eos>"`, after `"<end_of_turn>"`, or after
            one of `extra_stop_token_ids`.
        special_token_ids: The ids of `"<bos>"`, `"<eos>"` and `"<pad>"`. The turn pieces are not
            among them: a conversation without them would run its turns together. The preprocessor
            drops the one that ends the generated text.

    Raises:
        ValueError: If `proto` is not a SentencePiece model, or its vocabulary lacks one of the
            pieces above.

    Example:

    ```python
    tokenizer = Gemma2Tokenizer("tokenizer.model")
    tokenizer.tokenize("Hello world!")  # int32 array [4521, 2134, 235341]
    tokenizer.tokenize(["Hello", "2024"])  # list of two lists of ids
    tokenizer.detokenize([4521, 2134, 235341])  # "Hello world!"
    dataset = tf.data.Dataset.from_tensor_slices(["Hello"]).map(tokenizer)
    ```

    Source: SentencePiece, arXiv 1808.06226; the Gemma 2 technical report, arXiv 2408.00118, for the
    vocabulary and the control tokens.
    """

    start_of_turn_token = _TURN_PIECES["start_of_turn_token"]
    end_of_turn_token = _TURN_PIECES["end_of_turn_token"]
    end_token2 = end_of_turn_token
    start_of_turn_token_id = None
    end_of_turn_token_id = None

    def __init__(
        self, proto: str | bytes | os.PathLike | None, extra_stop_token_ids: Sequence[int] = (), **kwargs
    ):
        self.extra_stop_token_ids = tuple(int(token_id) for token_id in extra_stop_token_ids)
        for name, piece in _FRAME_PIECES.items():
            self._add_special_token(piece, name)
        super().__init__(proto=proto, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Keras, and TensorFlow once more, would copy these into containers that look for layers
        # among the 256,000 pieces: up to 3 seconds.
        if name in _PLAIN_ATTRIBUTES:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def end_token2_id(self) -> int | None:
        """int, or `None` without a vocabulary: the id of `<end_of_turn>`."""
        return self.end_of_turn_token_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids of `<eos>` and `<end_of_turn>` and the extra ones; any of them ends generation.

        Raises:
            ValueError: If no vocabulary is set.
        """
        self._check_vocabulary()
        own = (self.end_token_id, self.end_of_turn_token_id)
        return own + tuple(i for i in self.extra_stop_token_ids if i not in own)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        extra = {"extra_stop_token_ids": list(self.extra_stop_token_ids)} if self.extra_stop_token_ids else {}
        return {**super().get_config(), **extra}

    def set_proto(self, proto: str | bytes | os.PathLike | None) -> None:
        """Replaces the vocabulary.

        Args:
            proto: As in the constructor.

        Raises:
            ValueError: If `proto` is not a SentencePiece model, or its vocabulary lacks a piece
                that Gemma needs.
        """
        if isinstance(proto, os.PathLike):
            proto = os.fspath(proto)
        try:
            super().set_proto(proto)
        except RuntimeError as error:
            raise ValueError(
                "`proto` must be a SentencePiece model: the path of a file such as "
                "`tokenizer.model` or `vocabulary.spm`, or its bytes. Received: "
                f"proto={shorten(proto)}, which SentencePiece could not read ({error})."
            ) from error

    def tokenize(self, inputs: Any) -> Any:
        """Turns text into token ids.

        Args:
            inputs: A string, or a list, tuple or array of strings of rank 1. `bytes` are taken as
                UTF-8. An empty string has no tokens. Inside a `tf.data` pipeline, a string tensor
                of rank 0 or 1.

        Returns:
            For one string, its ids as an int32 array of shape `[tokens]`. For a batch, a list of
            lists of ids. Inside a `tf.data` pipeline, an int32 tensor of shape `[tokens]`, or a
            ragged one of shape `[batch, tokens]`.

        Raises:
            TypeError: If `inputs`, or a member of it, is not a string.
            ValueError: If `inputs` is an empty list, or a text cannot be written in UTF-8 (a lone
                surrogate, or broken bytes). Inside a pipeline this is a
                `tf.errors.InvalidArgumentError`.
        """
        self._check_vocabulary()
        if in_tf_function():
            texts = tf_pipeline.read_texts(inputs, "inputs")
            op, padding = self._graph_op(), (self.sequence_length, self.pad_token_id)
            return tf_pipeline.tokenize(texts, op, self.compute_dtype, *padding)
        return super().tokenize(read_texts(inputs, "inputs"))

    def detokenize(self, inputs: Any) -> Any:
        """Turns token ids into text.

        `"<bos>"`, `"<eos>"` and `"<pad>"` become nothing. Byte tokens that do not add up to a
        character become U+FFFD.

        Args:
            inputs: One id, a list or array of ids, or a batch of those: a list of lists or an array
                of shape `[batch, tokens]`. Inside a `tf.data` pipeline, a dense or ragged integer
                tensor of rank 1 or 2.

        Returns:
            A string, or a list of strings for a batch. Inside a `tf.data` pipeline, a string tensor
            of shape `[]` or `[batch]`.

        Raises:
            TypeError: If `inputs` holds something else than integers.
            ValueError: If an id is outside the vocabulary. Inside a pipeline this is a
                `tf.errors.InvalidArgumentError`.
        """
        self._check_vocabulary()
        if in_tf_function():
            ids = tf_pipeline.read_ids(inputs, self._vocabulary_size, NOT_IDS)
            return tf_pipeline.detokenize(ids, self._graph_op())
        rows, batched = read_id_rows(inputs, self._vocabulary_size)
        if not rows:
            return []
        return super().detokenize(rows if batched else rows[0])

    def _graph_op(self) -> Any:
        """The TensorFlow tokenizer, one for each graph being traced."""
        settings = (self.compute_dtype, self.add_bos, self.add_eos)
        return tf_pipeline.sentencepiece(type(self).__name__, self.proto, *settings)

    def _use_tf_workflow(self) -> bool:
        """Whether a `tf.data` pipeline or a `tf.function` is being traced.

        Direct calls always run in Python, whatever keras-hub's private `_allow_python_workflow`
        says: the ids are the same.
        """
        return in_tf_function()

    def _set_proto_tf(self, proto: bytes) -> None:
        """Makes no op: each graph has its own. Called by `set_proto`."""
        self._sentence_piece = None

    def _set_proto_spm(self, proto: bytes) -> None:
        """Loads the vocabulary. Called by `set_proto`."""
        if not proto:
            # Before 0.2.2, SentencePiece takes this for no vocabulary at all and ends the process
            # when asked about it.
            raise RuntimeError("it is empty")
        super()._set_proto_spm(proto)

    def _update_special_token_ids(self) -> None:
        """Looks the special pieces up. Called by `set_proto`."""
        for name, piece in (_FRAME_PIECES | _TURN_PIECES).items():
            # keras-hub searches a list of all pieces; this is a dictionary.
            token_id = self._token_to_id_map.get(piece)
            if token_id is None:
                raise ValueError(
                    f"`proto` must be a Gemma vocabulary: it lacks the piece `{piece}` among its "
                    f"{self._vocabulary_size} pieces. Pass the `tokenizer.model` or "
                    "`vocabulary.spm` that came with the Gemma weights, or train one with this "
                    "piece among its `user_defined_symbols` or as its bos, eos or pad piece."
                )
            setattr(self, f"{name}_id", token_id)
