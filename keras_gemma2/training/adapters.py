"""Adapters of a language model: `enable_lora`, and what its compiled functions and its optimizer must follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_gemma2 import backend
from keras_gemma2.adapters import DEFAULT, HasAdapters
from keras_gemma2.lora import LoraSettings


class TrainsAdapters(HasAdapters):
    """The part of a language model that makes adapters and trains them.

    Where another adapter is active than when training, evaluation or prediction were compiled (also where the backbone's own
    methods made it so), they are compiled anew, and an optimizer that holds values for other variables gives way to a fresh one of
    the same settings.
    """

    _compiled_for: tuple[int, str | None] = (0, None)

    def enable_lora(
        self,
        rank: int = 8,
        alpha: float = 16,
        targets: str | Sequence[str] = "attention",
        dropout: float = 0.0,
        use_rslora: bool = False,
        name: str = DEFAULT,
    ) -> None:
        """Adds low-rank factors to projections, and freezes every other weight (LoRA, arXiv 2106.09685).

        Each targeted projection `W [out, in]` gives `W x + scale * B(A(dropout(x)))` from now on, with `A [rank, in]` random and
        `B [out, rank]` zeros, which changes nothing yet. `A` and `B` are float32 where weights are bfloat16 or float16, or
        quantized ones that were made of such; else of the weights' dtype. Products are made in the compute dtype.

        Args:
            rank: of the factors.
            alpha: `scale` is `alpha / rank`.
            targets: "attention" (query, key, value and output projections), "all" (gate, up and down too), a layer's name, a
                regular expression that whole paths of layers match (`r"decoder_block_3/attention/.*"`), or a list of names and
                paths. Names are "query", "key", "value", "output_projection", "gate", "up", "down", or PEFT's "q_proj", ...
            dropout: rate on the factors' input, in training; its draws follow `keras.utils.set_random_seed`.
            use_rslora: whether `scale` is `alpha / sqrt(rank)` (rank-stabilized LoRA, arXiv 2312.03732).
            name: of the adapter. One of the same name is replaced by a new one.

        Raises:
            ValueError: for a number outside its range, a rank larger than a matrix, a target that names no projection (the message
                lists those there are), or a name that layers cannot have; nothing is changed then.
            TypeError: for a rank that is no integer, or targets that are no strings.

        Example:
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en", dtype="bfloat16", quantize="int4")
            >>> lm.enable_lora(rank=8, alpha=16, targets="all", dropout=0.05)
            >>> lm.compile(optimizer=keras.optimizers.AdamW(2e-4))
            >>> lm.fit(texts)
            >>> lm.save_adapter("./my_adapter")
        """
        settings = LoraSettings.of(self.backbone.config, rank, alpha, targets, dropout, use_rslora)
        self._add_adapter(name, settings)

    def _add_adapter(self, name: str, settings: LoraSettings, values: Any = None) -> None:
        if not self.trainable:
            self.trainable = True
        super()._add_adapter(name, settings, values)

    def _adapters_changed(self) -> None:
        state = self._adapters.state
        if self._compiled_for == state:
            return
        self._compiled_for = state
        self.train_function = self.test_function = self.predict_function = None
        backend.track_variables(self)

    def make_train_function(self, force: bool = False) -> Any:
        """As `keras.Model`'s; Keras calls it before it trains.

        Raises:
            RuntimeError: if the model has adapters and none is active: there is nothing to train.
        """
        if self._adapters.settings and self._adapters.active is None:
            raise RuntimeError(
                f"No adapter is active, and all other weights are frozen: there is nothing to train. Call `set_adapter` with one "
                f"of {self.adapter_names}, outside of `disable_adapter`."
            )
        self._adapters_changed()
        self._renew_optimizer()
        return super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> Any:
        """As `keras.Model`'s."""
        self._adapters_changed()
        return super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> Any:
        """As `keras.Model`'s."""
        self._adapters_changed()
        return super().make_predict_function(force)

    def _renew_optimizer(self) -> None:
        renew_optimizer(self)


def renew_optimizer(model: Any) -> None:
    """Puts a fresh optimizer of the same settings in place of one that was built with other variables."""
    optimizer = model.optimizer
    if not model.compiled or not getattr(optimizer, "built", False):
        return
    known = getattr(optimizer, "inner_optimizer", optimizer)._trainable_variables
    if [id(variable) for variable in known] != [id(variable) for variable in model.trainable_variables]:
        # What else `compile` was given stays as it is: a loss that is a function cannot be made anew from a config.
        model.optimizer = type(optimizer).from_config(optimizer.get_config())
        model.optimizer.build(model.trainable_variables)
