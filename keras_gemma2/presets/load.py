"""Builds the public classes from what a preset resolves to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_gemma2.backbone import Gemma2Backbone
from keras_gemma2.checkpoints import hf
from keras_gemma2.checkpoints.hf_config import dtype_from_hugging_face
from keras_gemma2.config import Gemma2Config
from keras_gemma2.layers.initializers import skip_random_weights
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.presets.registry import HUGGING_FACE, KERAS, SIZE_ONLY, Source, resolve
from keras_gemma2.tokenizer import Gemma2Tokenizer


def load_object(
    cls: type, keras_hub_loader: Callable[..., Any], preset: Any, load_weights: bool, kwargs: dict[str, Any]
) -> Any:
    """Loads an object of one of the public classes; `from_preset` of each of them ends here.

    Args:
        cls: the class (or a subclass) to make.
        keras_hub_loader: the class's inherited `from_preset`, which reads the folders that `save_to_preset` writes.
        preset: a name or a folder.
        load_weights: whether to fill the weights.
        kwargs: arguments of the class; those of the backbone may be among them.
    """
    source = resolve(preset)
    if source.kind == KERAS:
        if issubclass(cls, keras.Model):
            kwargs["load_weights"] = load_weights
            if kwargs.get("dtype") is None:  # keras-hub's own loader would take Keras's global default
                kwargs["dtype"] = keras.dtype_policies.get(source.values["config"]["dtype"])
        return keras_hub_loader(source.folder, **kwargs)
    if issubclass(cls, Gemma2Tokenizer):
        return cls(_vocabulary(source), **kwargs)
    if issubclass(cls, Gemma2CausalLMPreprocessor):
        return _preprocessor(cls, source, kwargs)
    backbone_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in (*Gemma2Config.field_names(), "dtype")}
    if issubclass(cls, Gemma2Backbone):
        return _backbone(cls, source, load_weights, {**backbone_kwargs, **kwargs})
    backbone = kwargs.pop("backbone", None) or _backbone(Gemma2Backbone, source, load_weights, backbone_kwargs)
    if "preprocessor" not in kwargs:
        kwargs["preprocessor"] = _optional_preprocessor(cls, source)
    return cls(backbone=backbone, **kwargs)


def _backbone(cls: type, source: Source, load_weights: bool, kwargs: dict[str, Any]) -> Gemma2Backbone:
    if source.kind == SIZE_ONLY and load_weights:
        raise ValueError(
            f"The weights of {source.name!r} are not part of this package, and this version does not download them. Download the "
            "Hugging Face folder (for example `hf download google/gemma-2-2b --local-dir FOLDER`) and pass FOLDER, or pass "
            "`load_weights=False` for the architecture with random weights."
        )
    if kwargs.get("dtype") is None and source.kind == HUGGING_FACE:
        kwargs["dtype"] = dtype_from_hugging_face(source.values) or hf.stored_dtype(source.folder)
    arguments = {**source.config.to_dict(), **kwargs}
    if not load_weights:
        return cls(**arguments)
    with skip_random_weights():
        backbone = cls(**arguments)
    hf.load_weights(backbone, source.folder)
    return backbone


def _vocabulary(source: Source) -> str:
    path = os.path.join(source.folder or "", hf.TOKENIZER_FILE)
    if source.folder is None or not os.path.exists(path):
        where = (
            f"the folder {source.folder!r} has no {hf.TOKENIZER_FILE}"
            if source.folder
            else "its files are not part of this package"
        )
        raise ValueError(
            f"The preset {source.name!r} has no tokenizer here: {where}. Pass `Gemma2Tokenizer(proto=path)` instead."
        )
    return path


def _preprocessor(cls: type, source: Source, kwargs: dict[str, Any]) -> Gemma2CausalLMPreprocessor:
    tokenizer = kwargs.pop("tokenizer", None) or Gemma2Tokenizer(_vocabulary(source))
    kwargs.setdefault("sequence_length", min(1024, source.config.max_sequence_length))
    return cls(tokenizer, **kwargs)


def _optional_preprocessor(cls: type, source: Source) -> Gemma2CausalLMPreprocessor | None:
    if source.folder is not None and os.path.exists(os.path.join(source.folder, hf.TOKENIZER_FILE)):
        return _preprocessor(cls.preprocessor_cls, source, {})
    warnings.warn(
        f"The preset {source.name!r} has no {hf.TOKENIZER_FILE}: the model is loaded without a preprocessor and works on token "
        "ids alone. Pass `preprocessor=` to work on text.",
        stacklevel=5,
    )
    return None
