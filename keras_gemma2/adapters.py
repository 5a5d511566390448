"""The calls by which adapters are switched, merged, removed, written and read: mixed into the backbone and the language model."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from keras_gemma2 import backend
from keras_gemma2.adapter_set import AdapterSet
from keras_gemma2.lora import LoraSettings, check_adapter_name

DEFAULT = "default"  # PEFT's name for an adapter that is given none
_STORED_FACTOR = re.compile("/adapters/[^/]+/vars/1$")


class HasAdapters:
    """Named low-rank adapters: mixed into `Gemma2Backbone` and `Gemma2CausalLM`, which share them.

    Adapters stand beside the weights, float or quantized, by the path of their layer. At most one is active: it is added to what
    the model computes, in training, generation and export, and it alone is trainable.
    """

    @property
    def _adapters(self) -> AdapterSet:
        return self.backbone.adapter_set if hasattr(self, "backbone") else self.adapter_set

    def _adapters_changed(self) -> None:
        """Called after each change."""

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters, the oldest first."""
        return list(self._adapters.settings)

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter that is added to what the model computes; None for none."""
        return self._adapters.active

    def set_adapter(self, name: str) -> None:
        """Switches to another adapter, which is then the trainable one, too.

        Args:
            name: one of `adapter_names`.

        Raises:
            ValueError: for another name, listing those there are.

        Example:
            >>> lm.set_adapter("french")
        """
        self._adapters.activate(self._adapters.known(_text(name)))
        self._adapters_changed()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model is what it is without adapters. Training in it is refused.

        Example:
            >>> with lm.disable_adapter():
            ...     before = lm.generate("Once upon a time", max_new_tokens=20)
        """
        with self._adapters.only(None):
            self._adapters_changed()
            yield
        self._adapters_changed()

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter. With the last one, what was trainable without adapters is so again.

        Args:
            name: one of `adapter_names`.

        Raises:
            ValueError: for another name.
        """
        self._adapters.remove(self._adapters.known(_text(name)))
        self._adapters_changed()

    def merge_adapter(self, name: str | None = None) -> None:
        """Adds `scale * B A` to the weights, and removes the adapter.

        The weights keep their dtype: in 16 bits the sums are rounded, and quantized weights are quantized anew, a block of rows at
        a time, which loses what is finer than their steps. Other adapters stay, on top of the changed weights.

        Args:
            name: one of `adapter_names`; None for the active one.

        Raises:
            ValueError: if there is no such adapter, or a sum is not finite in the weights' dtype; nothing is changed then.

        Example:
            >>> lm.merge_adapter()
            >>> lm.save_to_preset("./my_gemma2")
        """
        self._adapters.merge(self._adapters.known(name))
        self._adapters_changed()

    def save_adapter(self, folder: Any, name: str | None = None) -> None:
        """Writes an adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

        The folder changes in one step; other files in it stay. `peft.PeftModel.from_pretrained(model, folder)` reads it over the
        same weights in transformers, and so do vLLM and llama.cpp's converter.

        Args:
            folder: made if missing, `~` expanded.
            name: one of `adapter_names`; None for the active one.

        Raises:
            ValueError: if there is no such adapter.
            CheckpointError: if the folder cannot be written; what was in it stays then.
            TypeError: if `folder` is no path.

        Example:
            >>> lm.save_adapter("./my_adapter")
        """
        from keras_gemma2.checkpoints.peft_adapter import write_adapter  # checkpoints import the models

        adapters = self._adapters
        name = adapters.known(name)
        found = adapters.factors(name)
        with backend.writing([variable for factors in found.values() for variable in factors.weights]) as is_writer:
            if is_writer:
                arrays = {path: factors.arrays() for path, factors in found.items()}
                write_adapter(folder, adapters.settings[name], arrays, adapters.config)

    def load_adapter(self, folder: Any, name: str | None = None) -> None:
        """Reads an adapter in PEFT's format, activates it, and freezes all else, as `enable_lora` does.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            name: its name here, "default" unless given; an adapter of this name is replaced.

        Raises:
            CheckpointError: for a missing, damaged or incomplete file, tensors of other shapes than this model's, or a feature of
                PEFT that has no counterpart here; the message names it, and nothing is changed.
            ValueError: for a name that layers cannot have.

        Example:
            >>> lm.load_adapter("./my_adapter", name="french")
        """
        from keras_gemma2.checkpoints.peft_adapter import read_adapter

        name = DEFAULT if name is None else name
        check_adapter_name(name)
        with backend.together():
            settings, values = read_adapter(folder, self._adapters.config)
        self._add_adapter(name, settings, values)

    def load_weights(self, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> None:
        """As `keras.Model.load_weights`, which would pass over adapters in a file that the model does not have.

        Raises:
            ValueError: for such a file; nothing is changed then.
        """
        stored = _stored_factors(os.fspath(filepath))
        own = sum(len(settings.ranks) for settings in self._adapters.settings.values())
        if stored > own and not skip_mismatch:
            raise ValueError(
                f"{filepath} holds adapters for {stored} projections, and the model has them for {own}. Call `enable_lora` as "
                "before the file was written, or use `save_adapter` and `load_adapter`."
            )
        super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def _add_adapter(self, name: str, settings: LoraSettings, values: Any = None) -> None:
        self._adapters.add(name, settings, values)
        self._adapters_changed()


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"`name` must be the name of an adapter. Received: {name!r}.")
    return name


def _stored_factors(filepath: str) -> int:
    """How many pairs of factors a file of Keras's weights holds; of another kind of file, 0."""
    paths: list[str] = []
    if filepath.endswith(".weights.h5") and os.path.isfile(filepath):
        import h5py

        with h5py.File(filepath, "r") as file:
            file.visit(paths.append)
    return sum(bool(_STORED_FACTOR.search(path)) for path in paths)
