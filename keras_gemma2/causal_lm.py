"""Gemma 2 as a language model: training, evaluation and generation."""

from __future__ import annotations

import types
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_gemma2.backbone import Gemma2Backbone
from keras_gemma2.from_preset import FromPreset
from keras_gemma2.generation.generate import generate_tokens
from keras_gemma2.generation.runner import Runner
from keras_gemma2.inputs import (
    as_texts,
    check_keywords,
    check_prompts,
    check_room,
    check_token_inputs,
    is_token_dict,
    label_tokens,
    pad_rows,
)
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.text_inputs import read_texts

SAMPLER_NAMES = ("greedy", "top_k", "top_p", "random", "beam")


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Gemma2CausalLM(FromPreset, keras_hub.models.CausalLM):
    """A Gemma 2 causal language model: text in, text out.

    Called on `{"token_ids": int [B, T], "padding_mask": bool or int [B, T]}` it gives float32 logits `[B, T, V]` after
    the final soft cap. `fit`, `evaluate`, `predict` and `generate` take strings through the preprocessor, and such a dict
    without it.

    Args:
        backbone: a `Gemma2Backbone`.
        preprocessor: a `Gemma2CausalLMPreprocessor`, or None to work on token ids alone.

    Example:
        >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
        >>> lm.generate("The state of our union is", max_length=64)
    """

    backbone_cls = Gemma2Backbone
    preprocessor_cls = Gemma2CausalLMPreprocessor

    def __init__(self, backbone: Gemma2Backbone, preprocessor: Any = None, **kwargs: Any) -> None:
        check_keywords(
            "Gemma2CausalLM", {k: v for k, v in kwargs.items() if k != "compile"}, ("backbone", "preprocessor")
        )
        self.backbone = backbone
        self.preprocessor = preprocessor
        self._runner: Runner | None = None
        self._runner_variables: list[int] = []
        inputs = backbone.input
        outputs = backbone.token_embedding(backbone(inputs), reverse=True)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        sampler: Any = "greedy",
        **kwargs: Any,
    ) -> None:
        """Configures training and generation.

        Args:
            optimizer: "auto" (Adam at 2e-5), or what `keras.Model.compile` takes.
            loss: "auto" (next-token cross-entropy on the logits), or what `keras.Model.compile` takes.
            weighted_metrics: "auto" (token accuracy), or what `keras.Model.compile` takes.
            sampler: a keras-hub sampler or its name: "greedy", "top_k", "top_p", "random", "beam".
            **kwargs: passed to `keras.Model.compile`.
        """
        if not isinstance(sampler, keras_hub.samplers.Sampler) and sampler not in SAMPLER_NAMES:
            raise ValueError(
                f"`sampler` must be one of {', '.join(map(repr, SAMPLER_NAMES))}, or a keras-hub Sampler. Received: {sampler!r}."
            )
        super().compile(optimizer, loss, weighted_metrics=weighted_metrics, sampler=sampler, **kwargs)

    def get_compile_config(self) -> dict[str, Any] | None:
        """What `.keras` files keep of `compile`: Keras's own arguments and the sampler."""
        if not self.compiled:
            return None
        return {**super().get_compile_config(), "sampler": keras_hub.samplers.serialize(self.sampler)}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as the saved one was, and gives the optimizer its variables to be filled."""
        arguments = keras.saving.deserialize_keras_object({k: v for k, v in config.items() if k != "sampler"})
        self.compile(sampler=keras_hub.samplers.deserialize(config["sampler"]), **arguments)
        self.optimizer.build(self.trainable_variables)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # Before Keras's own checks, which cannot name the mend.
        check_token_inputs(inputs, self.backbone.config.vocabulary_size)
        return super().__call__(inputs, *args, **kwargs)

    # Token dicts bypass the preprocessor -------------------------------------------------------------------------------

    def preprocess_samples(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Runs the preprocessor on texts; leaves token dicts and their labels alone."""
        if is_token_dict(x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        return super().preprocess_samples(x, y, sample_weight)

    def quantize(self, mode: Any = None, **kwargs: Any) -> None:
        """Refused in this version; see `Gemma2Backbone.quantize`."""
        self.backbone.quantize(mode, **kwargs)

    def fit(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """Trains the model; as `keras.Model.fit`.

        Args:
            x: strings, a `tf.data.Dataset` of strings, or tokens that bypass the preprocessor: a dict
                `{"token_ids", "padding_mask"}` of arrays, or a `keras.utils.PyDataset` of `(dict, labels[, weights])`.
            y: labels int `[B, T]` for a dict; None means each next token of the dict, weighted 0 where it is padding.
            batch_size: samples a step; default 32.
            sample_weight: float `[B, T]` or `[B]`, with `y`.
            **kwargs: as `keras.Model.fit`. `validation_data` follows the same rules as x, y and sample_weight.

        Raises:
            ValueError: for token ids or labels outside the vocabulary, where `x` is a dict of arrays. Datasets and generators
                are not looked through beforehand: there, on every backend, such an id makes the loss NaN or raises.
        """
        self._warn_about_half_precision_weights()
        if kwargs.get("class_weight") is not None:
            raise ValueError(
                "`class_weight` does not apply to a language model: its classes are tokens. Use `sample_weight`."
            )
        x, y, sample_weight = self._with_labels(x, y, sample_weight)
        validation = kwargs.get("validation_data")
        if isinstance(validation, (tuple, list)) or is_token_dict(validation):
            parts = keras.utils.unpack_x_y_sample_weight(validation)
            kwargs["validation_data"] = keras.utils.pack_x_y_sample_weight(*self._with_labels(*parts))
        return self._trainer(x).fit(self, x, y, batch_size=batch_size, sample_weight=sample_weight, **kwargs)

    def evaluate(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """Loss and metrics; inputs as `fit` takes them."""
        x, y, sample_weight = self._with_labels(x, y, sample_weight)
        return self._trainer(x).evaluate(self, x, y, batch_size=batch_size, sample_weight=sample_weight, **kwargs)

    def predict(self, x: Any = None, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Float32 logits `[B, T, V]`; inputs as `fit` takes them, without labels."""
        x, _, _ = self._with_labels(x, None, None)
        return self._trainer(x).predict(self, x, batch_size=batch_size, **kwargs)

    def train_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """One training step; inputs as `fit` takes them."""
        self._warn_about_half_precision_weights()
        return super().train_on_batch(*self._with_labels(x, y, sample_weight), **kwargs)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """Loss and metrics of one batch; inputs as `fit` takes them."""
        return super().test_on_batch(*self._with_labels(x, y, sample_weight), **kwargs)

    def predict_on_batch(self, x: Any, **kwargs: Any) -> Any:
        """Float32 logits of one batch; inputs as `fit` takes them, without labels."""
        x, _, _ = self._with_labels(x, None, None)
        return super().predict_on_batch(x, **kwargs)

    def _warn_about_half_precision_weights(self) -> None:
        dtype = self.backbone.dtype_policy.variable_dtype
        if dtype in ("bfloat16", "float16"):
            warnings.warn(
                f"The weights are {dtype}: steps smaller than 1/256 of a weight are rounded away, and Keras's Adam, whose "
                "beta_2 of 0.999 rounds to 1, changes nothing on JAX and TensorFlow. Load the model with "
                "dtype='mixed_bfloat16' to train it.",
                stacklevel=3,
            )

    def _with_labels(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Checks what is at hand: token dicts get labels, texts are read; anything lazy passes."""
        if is_token_dict(x):
            return label_tokens(x, y, sample_weight, self.backbone.config.vocabulary_size)
        if isinstance(x, (list, tuple, np.ndarray)) and self.preprocessor is not None:
            x = np.array(read_texts(x, "x"), dtype=object)
        return x, y, sample_weight

    def _trainer(self, x: Any) -> type:
        """Whose fit, evaluate and predict to run: Keras's own for what is tokens already, keras-hub's for texts."""
        is_torch_loader = type(x).__module__.startswith("torch.utils.data")
        is_tokens = is_token_dict(x) or is_torch_loader or isinstance(x, (keras.utils.PyDataset, types.GeneratorType))
        return keras.Model if is_tokens else keras_hub.models.CausalLM

    # Generation ----------------------------------------------------------------------------------------------------------

    def make_generate_function(self) -> Runner:
        """The compiled prefill and decode step. Kept until the model's variables are replaced, whatever the sampler."""
        variables = [id(variable) for variable in self.backbone.variables]
        if self._runner is None or self._runner_variables != variables:
            self._runner, self._runner_variables = Runner(self.backbone), variables
        return self._runner

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: str | Sequence[int] | None = "auto",
        strip_prompt: bool = False,
    ) -> Any:
        """Continues prompts with the sampler given to `compile`.

        Args:
            inputs: a string, a list of strings, a `tf.data.Dataset` of batches of strings, or a dict of token ids and
                padding mask, each `[B, T]`, which bypasses the preprocessor.
            max_length: tokens at most in each row, prompt included. None means the preprocessor's `sequence_length`; for a
                dict, its length T.
            stop_token_ids: "auto" stops at the tokenizer's `<eos>` and `<end_of_turn>`; a list of ids; or None to go on to
                `max_length`.
            strip_prompt: whether to leave the prompt out of what is returned.

        Returns:
            A string for a string, a list for a list; for a dict, a dict of numpy `token_ids` int32 `[B, max_length]` and
            `padding_mask` bool, each row its prompt and completion from the left (the stop token included), then padding.

        Raises:
            ValueError: for an empty list, something else than text, a prompt longer than `max_length`, `max_length` over the
                model's `max_sequence_length`, ids outside the vocabulary, or "auto" without a tokenizer.
        """
        stop_token_ids = self._resolve_stop_token_ids(stop_token_ids)
        if hasattr(inputs, "as_numpy_iterator"):
            return _concatenate(
                [
                    self._generate_batch(batch, max_length, stop_token_ids, strip_prompt)
                    for batch in inputs.as_numpy_iterator()
                ]
            )
        return self._generate_batch(inputs, max_length, stop_token_ids, strip_prompt)

    def _generate_batch(
        self, inputs: Any, max_length: int | None, stop_token_ids: Sequence[int], strip_prompt: bool
    ) -> Any:
        if is_token_dict(inputs):
            return self._generate_from_tokens(inputs, max_length, stop_token_ids, strip_prompt)
        if self.preprocessor is None:
            raise ValueError(
                "`inputs` must be a dict with 'token_ids' and 'padding_mask' when the model has no preprocessor. "
                f"Received: {type(inputs).__name__}. Pass `preprocessor=` to Gemma2CausalLM to generate from text."
            )
        return self._generate_from_text(inputs, max_length, stop_token_ids, strip_prompt)

    def _generate_from_text(
        self, inputs: Any, max_length: int | None, stop_token_ids: Sequence[int], strip_prompt: bool
    ) -> Any:
        texts, is_scalar = as_texts(inputs)
        length = self._check_max_length(self.preprocessor.sequence_length if max_length is None else max_length)
        self._check_room(texts, length)
        tokens = self.preprocessor.generate_preprocess(texts, sequence_length=length)
        tokens = {key: ops.convert_to_numpy(tokens[key]) for key in ("token_ids", "padding_mask")}
        outputs = self._generate_from_tokens(tokens, length, stop_token_ids, strip_prompt)
        texts = list(self.preprocessor.generate_postprocess(outputs))
        return texts[0] if is_scalar else texts

    def _generate_from_tokens(
        self, inputs: Any, max_length: int | None, stop_token_ids: Sequence[int], strip_prompt: bool
    ) -> dict[str, np.ndarray]:
        inputs, _, _ = self._with_labels(inputs, None, None)
        length = self._check_max_length(inputs["token_ids"].shape[1] if max_length is None else max_length)
        prompts = [ids[mask.astype(bool)].tolist() for ids, mask in zip(inputs["token_ids"], inputs["padding_mask"])]
        check_prompts(prompts, length, self.backbone.config.max_sequence_length)
        completions = generate_tokens(
            self.make_generate_function(), self.sampler, prompts, [length] * len(prompts), stop_token_ids
        )
        rows = completions if strip_prompt else [prompt + new for prompt, new in zip(prompts, completions)]
        return pad_rows(rows, length, self._pad_token_id())

    def _check_room(self, texts: list[str], max_length: int) -> None:
        """Says which prompt is too long in the words of `generate`, where the preprocessor would in its own."""
        if getattr(self.preprocessor, "truncation", "right") != "error":
            return
        rows = self.preprocessor.tokenizer([text.removeprefix("<bos>") for text in texts])
        counts = [len(row) + bool(self.preprocessor.add_start_token) for row in rows]
        check_room(counts, max_length, self.backbone.config.max_sequence_length)

    def _check_max_length(self, max_length: Any) -> int:
        limit = self.backbone.config.max_sequence_length
        if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)) or not 0 < max_length <= limit:
            raise ValueError(
                f"`max_length` must be an integer from 1 to the model's max_sequence_length, {limit}. "
                f"Received: max_length={max_length!r}."
            )
        return int(max_length)

    def _resolve_stop_token_ids(self, stop_token_ids: Any) -> tuple[int, ...]:
        if stop_token_ids is None:
            return ()
        if isinstance(stop_token_ids, str):
            if stop_token_ids != "auto":
                raise ValueError(
                    f"`stop_token_ids` must be 'auto', None or a list of ids. Received: {stop_token_ids!r}."
                )
            if self.preprocessor is None:
                raise ValueError(
                    "`stop_token_ids='auto'` needs a preprocessor, whose tokenizer names the stop tokens. "
                    "Pass a list of ids (Gemma 2's are 1 and 107), or None to go on to `max_length`."
                )
            tokenizer = self.preprocessor.tokenizer
            return tuple(getattr(tokenizer, "stop_token_ids", (tokenizer.end_token_id,)))
        size = self.backbone.config.vocabulary_size
        ids = stop_token_ids if isinstance(stop_token_ids, (list, tuple, set, np.ndarray)) else [None]
        if not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) and 0 <= i < size for i in ids):
            raise ValueError(
                f"`stop_token_ids` must be 'auto', None or a list of ids in [0, {size}). Received: {stop_token_ids!r}."
            )
        return tuple(int(token_id) for token_id in ids)

    def _pad_token_id(self) -> int:
        return 0 if self.preprocessor is None else self.preprocessor.tokenizer.pad_token_id


def _concatenate(outputs: list[Any]) -> Any:
    if not outputs:
        raise ValueError("`inputs` must hold at least one batch. Received an empty dataset.")
    if isinstance(outputs[0], dict):
        return {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}
    return [text for output in outputs for text in (output if isinstance(output, list) else [output])]
