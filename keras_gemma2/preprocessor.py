"""Text to the padded token ids that Gemma 2 reads, and back.

One path for both uses: training (`call`) and prompts (`generate_preprocess`) differ in one number,
the shift between a token and its label. Direct calls run in Python (`text_inputs`), `tf.data`
pipelines in TensorFlow (`backend.tf_pipeline`): the same functions, with equal results.
"""

import re
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
from keras_hub.src.utils.tensor_utils import convert_preprocessing_outputs_python, in_tf_function

from keras_gemma2 import text_inputs
from keras_gemma2.backend import tf_pipeline
from keras_gemma2.from_preset import FromPreset
from keras_gemma2.text_inputs import shorten
from keras_gemma2.tokenizer import Gemma2Tokenizer

_TRUNCATIONS = ("error", "right", "left")


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Gemma2CausalLMPreprocessor(FromPreset, keras_hub.models.CausalLMPreprocessor):
    """Turns text into the inputs of a Gemma 2 model, and its output into text.

    Every sequence has `<bos>` at most once, and first: Gemma is much worse without it, and was
    never trained with two. Text that begins with the characters `<bos>`, as the output of a chat
    template does, means the token: those characters are dropped and the token takes their place,
    with `add_start_token` on or off. `add_start_token` decides what happens to all other text.
    Further on in a text, `<bos>` is ordinary characters.

    A text too long for `sequence_length` is an error, unless `truncation` says which end to keep.

    Args:
        tokenizer: A `Gemma2Tokenizer`. It must leave `sequence_length`, `add_bos` and `add_eos`
            alone, as those are set here.
        sequence_length: int. The length all sequences are padded to.
        add_start_token: bool. Whether `<bos>` comes first, in training and in prompts.
        add_end_token: bool. Whether `<eos>` comes last, in training only.
        truncation: What happens to a text with too many tokens: `"error"` raises, `"right"` keeps
            its first tokens and `"left"` its last. `<bos>` and `<eos>` are kept in either case.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name`.

    Raises:
        TypeError: If `tokenizer` is not a `Gemma2Tokenizer`, or `sequence_length` is not an
            integer.
        ValueError: If `sequence_length` is not positive, `truncation` is unknown, or `tokenizer`
            pads or adds tokens by itself.

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

    Source: the Gemma 2 technical report, arXiv 2408.00118, for the control tokens;
    `keras_hub.models.CausalLMPreprocessor` for the interface.
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
        self._sequence_length = text_inputs.read_length(value)

    @property
    def truncation(self) -> str:
        """`"error"`, `"right"` or `"left"`; it can be set."""
        return self._truncation

    @truncation.setter
    def truncation(self, value: str) -> None:
        if value not in _TRUNCATIONS:
            raise ValueError(
                f"`truncation` must be one of {_TRUNCATIONS}. Received: truncation="
                f"{shorten(value)}. Choose 'error' to be told of texts that are too long, 'right' "
                "to keep their first tokens, 'left' to keep their last."
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
            sequence_length: int. A length for this call, in place of the configured one.

        Returns:
            `(x, y, sample_weight)`. `x` is a dictionary of `"token_ids"`, int32, and
            `"padding_mask"`, bool, `True` on tokens. `y`, int32, and `sample_weight`, bool, are the
            same one position on. All have the shape `[batch, sequence_length]`, or
            `[sequence_length]` for one string. A text may have `sequence_length + 1` tokens, with
            `<bos>` and `<eos>`, as the last is a label only.

        Raises:
            TypeError: If `x` is not text.
            ValueError: If `x` is empty or has no UTF-8 form, if a text is too long and `truncation`
                is `"error"`, if `y` or `sample_weight` is given, or if `sequence_length` is not
                positive. What depends on the text is a `tf.errors.InvalidArgumentError` in a
                `tf.data` pipeline.
        """
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise ValueError(
                    f"`{name}` must be `None`: labels and weights are made from the tokens of "
                    f"`x`. Received: {name}={shorten(value)}. Join prompt and answer into one "
                    "text, or give the model token ids, labels and weights of your own in place "
                    "of text."
                )
        token_ids, mask = self._pack(x, sequence_length, shift=1)
        inputs = {"token_ids": token_ids[..., :-1], "padding_mask": mask[..., :-1]}
        return _to_backend((inputs, token_ids[..., 1:], mask[..., 1:]))

    def generate_preprocess(
        self, x: str | Sequence[str], sequence_length: int | None = None
    ) -> dict:
        """Makes prompts: tokens to continue, without `<eos>`.

        An empty text is a prompt of `<bos>` alone.

        Args:
            x: A string, or a list, array or tensor of strings of rank 1.
            sequence_length: int. A length for this call, in place of the configured one. It is the
                length of prompt and answer together.

        Returns:
            A dictionary of `"token_ids"`, int32, and `"padding_mask"`, bool, `True` on tokens. Both
            have the shape `[batch, sequence_length]`, or `[sequence_length]` for one string.

        Raises:
            TypeError: If `x` is not text.
            ValueError: As for a call; also if a prompt has no token at all, which takes an empty
                text and `add_start_token=False`.
        """
        token_ids, mask = self._pack(x, sequence_length, shift=0)
        return _to_backend({"token_ids": token_ids, "padding_mask": mask})

    def generate_postprocess(self, x: dict) -> str | list[str]:
        """Makes text of generated token ids.

        Padding, `<bos>`, `<eos>` and `<pad>` are dropped, and so is an `<end_of_turn>` at the end,
        where it only says that the model was done. Turn pieces within the text are kept: they tell
        a prompt from its answer. Byte tokens that make no character become U+FFFD.

        Args:
            x: A dictionary of `"token_ids"`, integers, and `"padding_mask"`, both of shape
                `[batch, length]` or `[length]`.

        Returns:
            A list of strings, or one string for ids of rank 1. In a `tf.data` pipeline, a string
            tensor of shape `[batch]` or `[]`.

        Raises:
            ValueError: If `x` lacks a key, the shapes differ, or an id is outside the vocabulary.
        """
        tokenizer, pipeline = self.tokenizer, _pipeline()
        dropped = (tokenizer.special_token_ids, tokenizer.end_of_turn_token_id)
        return tokenizer.detokenize(pipeline.unpack(*text_inputs.read_packed(x), *dropped))

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, as `generate_preprocess` makes them, but neither cut nor padded.

        Args:
            texts: A list of strings.

        Returns:
            A list of ids for each text, `<bos>` first where it belongs.

        Raises:
            TypeError, ValueError: If `texts` is not a list of strings, or is empty.
        """
        texts = text_inputs.read_texts(list(texts), "texts")
        bodies, starts = text_inputs.split_starts(texts, self._start_pattern, self.add_start_token)
        rows = self.tokenizer.tokenize(bodies)
        return [[self.tokenizer.start_token_id] * start + list(row) for start, row in zip(starts, rows)]

    @property
    def _start_pattern(self) -> str:
        """`<bos>` spelled out at the start of a text, however often."""
        return rf"\A(?:{re.escape(self.tokenizer.start_token)})+"

    def get_config(self) -> dict:
        """The constructor's arguments, for `from_config`."""
        return {**super().get_config(), "truncation": self.truncation}

    def _pack(self, x: Any, sequence_length: int | None, shift: int) -> tuple[Any, Any]:
        """int32 ids and a bool mask of their tokens, of shape `[..., sequence_length + shift]`.

        `shift` is 1 for training, where a token's label lies one position on and `<eos>` may be
        added; 0 for prompts.
        """
        if sequence_length is None:
            sequence_length = self.sequence_length
        length = text_inputs.read_length(sequence_length)
        tokenizer, pipeline = self.tokenizer, _pipeline()
        texts = pipeline.read_texts(x, "x")
        bodies, starts = pipeline.split_starts(texts, self._start_pattern, self.add_start_token)
        return pipeline.pack(
            texts,
            starts,
            tokenizer.tokenize(bodies),
            ids=(tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id),
            limit=length + shift,
            shift=shift,
            has_end=bool(shift and self.add_end_token),
            truncation=self.truncation,
            too_long=text_inputs.too_long_message(length, shift),
            no_tokens=text_inputs.no_tokens_message(tokenizer.start_token),
        )


def _pipeline() -> Any:
    """Where texts are read and packed: in TensorFlow while it traces, in Python otherwise."""
    return tf_pipeline if in_tf_function() else text_inputs


def _check_tokenizer(tokenizer: Any) -> None:
    """Raises unless `tokenizer` gives bare Gemma token ids."""
    if not isinstance(tokenizer, Gemma2Tokenizer):
        raise TypeError(
            f"`tokenizer` must be a `Gemma2Tokenizer`. Received: tokenizer={shorten(tokenizer)}, "
            f"of type {type(tokenizer).__name__}. Build one with `Gemma2Tokenizer(proto)`."
        )
    names = ("sequence_length", "add_bos", "add_eos")
    settings = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name)}
    if "int" not in tokenizer.compute_dtype:
        settings["dtype"] = tokenizer.compute_dtype
    if settings:
        raise ValueError(
            "`tokenizer` must not pad, cut or add tokens by itself, as its preprocessor does. "
            f"Received a tokenizer with {settings}. Leave these arguments out, and set "
            "`sequence_length`, `add_start_token` and `add_end_token` on the preprocessor."
        )


def _to_backend(outputs: Any) -> Any:
    """Arrays as tensors of the Keras backend; graph tensors as they are."""
    return outputs if in_tf_function() else convert_preprocessing_outputs_python(outputs)
