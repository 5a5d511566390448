"""The adapters of one backbone: made, switched, merged, removed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from keras_gemma2 import backend
from keras_gemma2.config import Gemma2Config
from keras_gemma2.layers.linear import Linear
from keras_gemma2.layers.low_rank import LowRank
from keras_gemma2.lora import LoraSettings, check_adapter_name, projection_shapes

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
