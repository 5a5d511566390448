"""Gemma 2 as a language model: training, evaluation and generation."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import keras_hub

from keras_gemma2.backbone import Gemma2Backbone
from keras_gemma2.errors import callers_level
from keras_gemma2.export.exports import Exports
from keras_gemma2.from_preset import FromPreset
from keras_gemma2.generation.calls import Generates
from keras_gemma2.generation.requests import check_sampler
from keras_gemma2.generation.sampler import Sampler
from keras_gemma2.generation.scoring import Scores
from keras_gemma2.inputs import check_keywords, check_token_inputs, is_token_dict
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.training.adapters import TrainsAdapters
from keras_gemma2.training.fitting import FitsText
from keras_gemma2.training.memory import MemoryReport, report_of
from keras_gemma2.training.steps import TrainsInChunks


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Gemma2CausalLM(FitsText, TrainsAdapters, TrainsInChunks, Generates, Scores, Exports, FromPreset, keras_hub.models.CausalLM):
    """A Gemma 2 causal language model: text in, text out.

    Called on `{"token_ids": int [B, T], "padding_mask": bool or int [B, T]}` it gives float32 logits `[B, T, V]` after
    the final soft cap. `fit`, `evaluate` and `predict` take strings, pairs of prompts and responses, and conversations through
    the preprocessor, and such a dict without it; `generate` takes strings and such a dict.

    Args:
        backbone: a `Gemma2Backbone`.
        preprocessor: a `Gemma2CausalLMPreprocessor`, or None to work on token ids alone.

    Example:
        >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
        >>> lm.generate("The state of our union is", max_length=64)
    """

    backbone_cls = Gemma2Backbone
    preprocessor_cls = Gemma2CausalLMPreprocessor

    sampler: Any = "greedy"  # until `compile` sets another

    def __init__(self, backbone: Gemma2Backbone, preprocessor: Any = None, **kwargs: Any) -> None:
        check_keywords("Gemma2CausalLM", {k: v for k, v in kwargs.items() if k != "compile"}, ("backbone", "preprocessor"))
        self.backbone = backbone
        self.preprocessor = preprocessor
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
            loss: "auto" (next-token cross-entropy), or what `keras.Model.compile` takes: a function of labels and logits. "auto",
                and a plain `SparseCategoricalCrossentropy(from_logits=True)`, never make the logits `[B, T, V]`.
            weighted_metrics: "auto" (token accuracy and perplexity, from the loss's own pass), or what `keras.Model.compile` takes;
                metrics of your own are given the logits, and so is then the loss.
            sampler: what `generate` uses when it is given none: a `keras_gemma2.Sampler`, or a keras-hub sampler or its name:
                "greedy", "top_k", "top_p", "random", "beam".
            **kwargs: passed to `keras.Model.compile`.
        """
        check_sampler(sampler)
        ours = isinstance(sampler, Sampler)
        super().compile(optimizer, loss, weighted_metrics=weighted_metrics, sampler="greedy" if ours else sampler, **kwargs)
        self.sampler = sampler if ours else self.sampler

    def get_compile_config(self) -> dict[str, Any] | None:
        """What `.keras` files keep of `compile`: Keras's own arguments and the sampler."""
        if not self.compiled:
            return None
        return {**super().get_compile_config(), "sampler": keras.saving.serialize_keras_object(self.sampler)}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as the saved one was, and gives the optimizer its variables to be filled."""
        arguments = keras.saving.deserialize_keras_object({k: v for k, v in config.items() if k != "sampler"})
        self.compile(sampler=_deserialized_sampler(config["sampler"]), **arguments)
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

    def quantize(self, mode: str | None = None, config: Any = None) -> None:
        """Keeps all matrices in 8 or 4 bits from now on, in place: see `Gemma2Backbone.quantize`.

        Generation is compiled anew when it is next asked for. Where an optimizer has taken steps, a fresh one of the same settings
        takes its place: the weights that it held values for are gone, and those left to train are the norms'.

        Args:
            mode: "int8" or "int4".
            config: not for use; Keras passes its default for the mode.

        Raises:
            ValueError: as the backbone's; nothing is changed then.

        Example:
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
            >>> lm.quantize("int8")
            >>> lm.save_to_preset("./mini_int8")
        """
        self.backbone.quantize(mode, config=config)
        self.dtype_policy = self.backbone.dtype_policy
        self._runners = None  # hold the floats
        self.train_function = self.test_function = self.predict_function = None
        self._post_quantize(mode)
        self._renew_optimizer()

    def enable_gradient_checkpointing(self) -> None:
        """Keeps of each decoder block its input alone in training, and computes the rest again in the backward pass.

        Losses and gradients stay the same; a step takes a forward pass longer. Nothing else changes, and nothing is saved of it.

        Source: Chen et al., arXiv 1604.06174.

        Example:
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
            >>> lm.enable_gradient_checkpointing()
        """
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Undoes `enable_gradient_checkpointing`."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for block in self.backbone.transformer_layers:
            block.recomputes = enabled
        self.train_function = None  # compiled with the blocks as they were

    def memory_report(self, batch: int, length: int) -> MemoryReport:
        """Estimates the memory of a training step from shapes alone; nothing is allocated.

        It follows the dtype policy, quantized weights, the active adapter, gradient checkpointing, the optimizer and the backend.
        What the framework's libraries and compilers take is not in it.

        Args:
            batch: rows of a step.
            length: tokens of a row.

        Returns:
            A `keras_gemma2.training.memory.MemoryReport`, in bytes, which prints as a table.

        Raises:
            ValueError: for a batch or length that makes no step, a length over the context, or a model without an optimizer.

        Example:
            >>> print(lm.memory_report(batch=1, length=2048))
        """
        return report_of(self, batch, length)

    @property
    def _is_quantized(self) -> bool:
        """Keras's mark of a layer that `quantize` has nothing left to do for."""
        return self.backbone.dtype_policy.quantization_mode is not None

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """What Keras calls where the policy is a quantized one: nothing differs here."""
        return self.call(*args, **kwargs)

    def _before_training(self) -> None:
        dtype = self.backbone.dtype_policy.variable_dtype
        # Factors of an adapter are float32 beside such weights.
        if dtype in ("bfloat16", "float16") and any(v.dtype == dtype for v in self.trainable_variables):
            warnings.warn(
                f"The weights are {dtype}: steps smaller than 1/256 of a weight are rounded away, and Keras's Adam, whose "
                "beta_2 of 0.999 rounds to 1, changes nothing on JAX and TensorFlow. Load the model with "
                "dtype='mixed_bfloat16' to train it.",
                stacklevel=callers_level(),
            )


def _deserialized_sampler(config: dict[str, Any]) -> Any:
    ours = config.get("registered_name", "").startswith("keras_gemma2>")
    return keras.saving.deserialize_keras_object(config) if ours else keras_hub.samplers.deserialize(config)
