"""The adapters of one backbone: made, switched, merged, removed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from keras_gemma2 import backend
from keras_gemma2.config import Gemma2Config
from keras_gemma2.layers.linear import Linear
from keras_gemma2.layers.low_rank import LowRank
from keras_gemma2.lora import LoraSettings, check_adapter_name, projection_shapes

DEFAULT = "default"  # PEFT's name for an adapter that is given none
_STORED_FACTOR = re.compile("/adapters/[^/]+/vars/1$")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class AdapterSet:
    """All adapters of a backbone. At most one is active: added to what its projections give, and trainable.

    Args:
        backbone: a `Gemma2Backbone`.

    Attributes:
        settings: `LoraSettings` of each adapter, by name.
        active: the name of the active one; None for none.
    """

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self.settings: dict[str, LoraSettings] = {}
        self.active: str | None = None
        self._changes = 0
        self._before: tuple[list[tuple[Any, bool]], set[str]] | None = None  # what was trainable without adapters

    @property
    def state(self) -> tuple[int, str | None]:
        """What changes when other functions have to be compiled."""
        return self._changes, self.active

    @property
    def config(self) -> Gemma2Config:
        """The model's."""
        return self._backbone.config

    @property
    def projections(self) -> dict[str, Linear]:
        """Every projection by the path of its layer."""
        found = {}
        for path in projection_shapes(self.config):
            block, *names = path.split("/")
            layer = self._backbone.transformer_layers[int(block.rpartition("_")[2])]
            for name in names:
                layer = getattr(layer, name)
            found[path] = layer
        return found

    def factors(self, name: str) -> dict[str, LowRank]:
        """The factors of an adapter by the path of the layer they belong to."""
        layers = self.projections
        return {path: layers[path].adapters[name] for path in self.settings[name].ranks}

    def known(self, name: str | None) -> str:
        """A name that there is an adapter of; the active one's for None.

        Raises:
            ValueError: if there is none, listing those there are.
        """
        if not self.settings:
            raise ValueError("The model has no adapter. Make one with `enable_lora`, or load one with `load_adapter`.")
        if name is None and self.active is None:
            raise ValueError(f"No adapter is active. Pass the `name` of one of {list(self.settings)}.")
        if name is not None and name not in self.settings:
            raise ValueError(f"There is no adapter {name!r}. There are: {list(self.settings)}.")
        return self.active if name is None else name

    def add(self, name: str, settings: LoraSettings, values: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None) -> None:
        """Makes an adapter, in place of one of the same name, and activates it. All else is frozen.

        Args:
            name: its name.
            settings: of the adapter.
            values: `lora_a` and `lora_b` by path; None for new ones.

        Raises:
            ValueError: for a name that layers cannot have; nothing is changed then.
        """
        check_adapter_name(name)
        layers, options = self.projections, (settings.dropout, settings.use_rslora)
        made = {
            path: layers[path].new_factors(name, rank, settings.alphas[path], *options, None if values is None else values[path])
            for path, rank in settings.ranks.items()
        }
        self._remember()
        for layer in layers.values():
            layer.remove_factors(name)
        for path, factors in made.items():
            layers[path].add_factors(name, factors)
        self.settings.pop(name, None)  # the new one comes last, in its layers too
        self.settings[name] = settings
        self._changed()
        self.activate(name)

    def activate(self, name: str | None) -> None:
        """Adds an adapter, or none, to what its projections give, and makes it what is trained."""
        self._switch(name)
        trained = set()
        for layer in self.projections.values():
            trained |= {variable.path for variable in layer.adapters[name].weights} if name in layer.adapters else set()
        self._backbone.trainable = True  # of what its layers hold, the next lines say so
        for variable in self._backbone.variables:
            wanted = variable.path in trained and variable.dtype in _FLOATS
            if variable.trainable != wanted:
                variable.trainable = wanted

    def _switch(self, name: str | None) -> None:
        self.active = name
        for layer in self.projections.values():
            layer.active_adapter = name if name in layer.adapters else None

    @contextlib.contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """A context in which one adapter is active, or none; what is trainable stays as it is."""
        before = self.active
        if name != before:
            self._switch(name)
        try:
            yield
        finally:
            if self.active == name != before and (before is None or before in self.settings):
                self._switch(before)

    def remove(self, name: str) -> None:
        """Removes an adapter. With the last one, what was trainable without adapters is so again."""
        for layer in self.projections.values():
            layer.remove_factors(name)
        del self.settings[name]
        self._changed()
        if not self.settings:
            self.active = None
            self._restore()
        elif self.active == name:
            self.activate(None)

    def merge(self, name: str) -> None:
        """Adds an adapter to the weights and removes it.

        Raises:
            ValueError: if a sum is not finite in the weights' dtype; nothing is changed then.
        """
        layers = {path: self.projections[path] for path in self.settings[name].ranks}
        for path, layer in layers.items():
            if not all(np.isfinite(array).all() for array in layer.adapters[name].arrays()) or layer.overflows(name):
                raise ValueError(
                    f"The adapter {name!r} cannot be merged: with it, {path!r} has values that are not finite in "
                    f"{layer.variable_dtype}. Nothing was changed."
                )
        for layer in layers.values():
            layer.merge_factors(name)
        self.remove(name)

    def _remember(self) -> None:
        if self._before is None:
            layers = [(layer, layer.trainable) for layer in self._backbone._flatten_layers()]
            self._before = layers, {variable.path for variable in self._backbone.variables if variable.trainable}

    def _restore(self) -> None:
        layers, trainable = self._before
        self._before = None
        for layer, flag in layers:  # a layer comes before those that it holds
            layer.trainable = flag
        for variable in self._backbone.variables:
            if variable.dtype in _FLOATS:  # quantized since: its codes have the path that the floats had
                variable.trainable = variable.path in trainable

    def _changed(self) -> None:
        self._changes += 1
        backend.track_variables(self._backbone)

    # Configs ----------------------------------------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """What `from_config` makes these adapters of, values apart; empty where there are none."""
        if not self.settings:
            return {}
        return {"active": self.active, "adapters": {name: settings.to_dict() for name, settings in self.settings.items()}}

    def from_config(self, config: Mapping[str, Any]) -> None:
        """Makes new adapters of a config."""
        for name, settings in config["adapters"].items():
            self.add(name, LoraSettings(**settings))
        self.activate(config["active"])


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
        arrays = {path: factors.arrays() for path, factors in adapters.factors(name).items()}
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
