"""`fit`, `evaluate` and `predict` on everything that `data` reads: mixed into what is trained on text."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_gemma2.training.data import Reader, unpacked
from keras_gemma2.training.data_streams import DataOfCall, SaysWhatWasCut, with_callbacks
from keras_gemma2.training.shares import check_batches_divide
from keras_gemma2.training.stop_on_nan import StopOnNaN


class FitsText:
    """Mixed in before `keras.Model`. The class has a `preprocessor`, or None, and a `backbone`, whose vocabulary ids must be of."""

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        *,
        pack: bool = False,
        stop_on_nan: bool | StopOnNaN = True,
        **kwargs: Any,
    ) -> Any:
        """Trains the model; as `keras.Model.fit`.

        Args:
            x: one of
                - strings: a list, an array;
                - `{"prompts": [...], "responses": [...]}`: the loss is on the responses and their `<eos>` alone;
                - a list of conversations, each a list of `{"role", "content"}`: the loss is on the model's turns alone;
                - tokens, which need no preprocessor: a dict `{"token_ids", "padding_mask"}` of arrays or lists `[B, T]`, whose mask
                  may be of numbers (1 1 1 2 2 0) that tell samples in a row apart; or what `keras_gemma2.pack_samples` gives;
                - batches of any of those: a `tf.data.Dataset`, a generator, a `keras.utils.PyDataset`, a PyTorch `DataLoader`.
                  A batch is x alone or a tuple `(x, y[, sample_weight])`. It is read, and checked, when it is asked for.
            y: labels int `[B, T]` for a dict of tokens; None means each next token, weighted 0 where that is padding or of another
                sample.
            batch_size: samples a step; default 32. Not for batches.
            sample_weight: float `[B]`; with a dict of tokens also `[B, T]`.
            pack: whether texts, pairs or conversations share rows of the preprocessor's `sequence_length`: see
                `keras_gemma2.pack_samples`.
            stop_on_nan: whether a loss of NaN raises: see `keras_gemma2.training.stop_on_nan.StopOnNaN`, of which one can be given.
            **kwargs: as `keras.Model.fit`. `validation_data` has the same forms as x, or is a tuple `(x, y[, sample_weight])`.

        Raises:
            TypeError, ValueError: for data that is none of these, ids outside the vocabulary, texts too long for the preprocessor
                (if its `truncation` is "error"), or where nothing is to be learned. For batches, with the batch's number.
            FloatingPointError: if the loss is not finite.
        """
        self._before_training()
        if kwargs.get("class_weight") is not None:
            raise ValueError("`class_weight` does not apply to a language model: its classes are tokens. Use `sample_weight`.")
        data, validation = self._data(pack), self._data(pack, "validation_data")
        x, y, sample_weight = data.read(x, y, sample_weight, batch_size)
        check_batches_divide(x, batch_size, kwargs.get("steps_per_epoch"))
        if kwargs.get("validation_data") is not None:
            kwargs["validation_data"] = validation.read_validation(kwargs["validation_data"])
            size, steps = kwargs.get("validation_batch_size") or batch_size, kwargs.get("validation_steps")
            check_batches_divide(unpacked(kwargs["validation_data"])[0], size, steps, "validation_data")
        guard = StopOnNaN() if stop_on_nan is True else stop_on_nan or None
        kwargs["callbacks"] = with_callbacks(kwargs.get("callbacks"), SaysWhatWasCut(data, validation), guard)
        restoring = guard.restoring() if guard else contextlib.nullcontext()
        with validation.telling(), data.telling(), restoring, self.keeping_values():
            return keras.Model.fit(self, x, y, batch_size=batch_size, sample_weight=sample_weight, **kwargs)

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        *,
        pack: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loss and metrics; inputs as `fit` takes them."""
        arguments = {"batch_size": batch_size, **kwargs}
        if kwargs.get("_use_cached_eval_dataset"):  # within `fit`, which has read the data
            return keras.Model.evaluate(self, x, y, sample_weight=sample_weight, **arguments)
        data = self._data(pack)
        x, y, sample_weight = data.read(x, y, sample_weight, batch_size)
        check_batches_divide(x, batch_size, kwargs.get("steps"))
        with data.telling(), self.keeping_values():
            return keras.Model.evaluate(self, x, y, sample_weight=sample_weight, **arguments)

    def predict(self, x: Any = None, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Float32 logits `[B, T, V]`; inputs as `fit` takes them, without labels."""
        data = self._data()
        x, _, _ = data.read(x, batch_size=batch_size)
        check_batches_divide(x, batch_size, kwargs.get("steps"))
        with data.telling(), self.keeping_values():
            return keras.Model.predict(self, x, batch_size=batch_size, **kwargs)

    def train_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """One training step; inputs as `fit` takes them, in memory."""
        self._before_training()
        return super().train_on_batch(*self._data().read_batch(x, y, sample_weight), **kwargs)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """Loss and metrics of one batch; inputs as `fit` takes them, in memory."""
        return super().test_on_batch(*self._data().read_batch(x, y, sample_weight), **kwargs)

    def predict_on_batch(self, x: Any, **kwargs: Any) -> Any:
        """Float32 logits of one batch; inputs as `fit` takes them, in memory, without labels."""
        x, _, _ = self._data().read_batch(x)
        return super().predict_on_batch(x, **kwargs)

    def _before_training(self) -> None:
        """Called before each training."""

    def _data(self, pack: bool = False, name: str = "x") -> DataOfCall:
        return DataOfCall(Reader(self.preprocessor, self.backbone.config.vocabulary_size, pack), name)
