"""Builds the public classes from what a preset resolves to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_gemma2 import backend
from keras_gemma2.backbone import Gemma2Backbone
from keras_gemma2.checkpoints import reading
from keras_gemma2.checkpoints.keras_objects import VOCABULARY_FILE, saved_preprocessor, saved_stop_token_ids
from keras_gemma2.checkpoints.source import CONFIG_FILE, HUGGING_FACE, KERAS, SIZE_ONLY, Source, find_file, read_json
from keras_gemma2.config import NAMED_SIZES, Gemma2Config
from keras_gemma2.errors import CheckpointError, HubError, callers_level
from keras_gemma2.layers.initializers import skip_random_weights
from keras_gemma2.layers.quantization import float_policy, quantized_policy
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.presets import hub
from keras_gemma2.presets.registry import resolve
from keras_gemma2.quantization import check_mode
from keras_gemma2.tokenizer import Gemma2Tokenizer


def load_object(cls: type, keras_hub_loader: Callable[..., Any], preset: Any, load_weights: bool, kwargs: dict[str, Any]) -> Any:
    """Loads an object of one of the public classes; `from_preset` of each of them ends here.

    Args:
        cls: the class (or a subclass) to make.
        keras_hub_loader: the class's inherited `from_preset`, which reads the JSON files that `save_to_preset` writes.
        preset: a name, an address or a folder.
        load_weights: whether to fill the weights.
        kwargs: arguments of the class; those of the backbone may be among them.
    """
    if not issubclass(cls, keras.Model):
        source = _tokenizer_alone(preset) or resolve(preset, hub.TOKENIZER)
        if _is_custom(source):
            return _custom(keras_hub_loader, source, kwargs)
        return _tokenizer(cls, source, kwargs) if issubclass(cls, Gemma2Tokenizer) else _preprocessor(cls, source, kwargs)
    with backend.together():
        if kwargs.get("quantize") is not None:
            check_mode(kwargs["quantize"])  # before anything is downloaded
        if issubclass(cls, Gemma2Backbone):
            return _backbone(cls, resolve(preset, hub.WEIGHTS if load_weights else hub.CONFIG), load_weights, kwargs)
        return _task(cls, keras_hub_loader, _resolve_task(preset, load_weights), load_weights, kwargs)


def _resolve_task(preset: Any, load_weights: bool) -> Source:
    if load_weights:
        return resolve(preset, hub.WEIGHTS)
    try:
        return resolve(preset, hub.TOKENIZER)
    except HubError:
        source = resolve(preset, hub.CONFIG)
        if source.kind != SIZE_ONLY:
            raise
        return source  # the architecture of a built-in name is known without its files


def _tokenizer_alone(preset: Any) -> Source | None:
    """A folder with no model in it, as `save_to_preset` and `export_to_transformers` of a tokenizer or preprocessor leave it."""
    if not isinstance(preset, (str, os.PathLike)):
        return None
    path = os.path.expanduser(os.fspath(preset))
    if find_file(path, CONFIG_FILE) or not find_file(path, "tokenizer_config.json", VOCABULARY_FILE):
        return None
    usual = NAMED_SIZES["gemma2_2b"]  # the model it goes with is not known, and nothing of it is needed
    if find_file(path, VOCABULARY_FILE):
        return Source(path, KERAS, usual, path, {}, None, saved_stop_token_ids(path), saved_preprocessor(path))
    return Source(path, HUGGING_FACE, usual, path)


def _task(cls: type, keras_hub_loader: Callable[..., Any], source: Source, load_weights: bool, kwargs: dict[str, Any]) -> Any:
    names = (*Gemma2Config.field_names(), "dtype", "quantize")
    backbone_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
    if kwargs.get("backbone") is not None:
        if backbone_kwargs:
            raise ValueError(
                f"`backbone` is given, which {', '.join(f'`{name}`' for name in backbone_kwargs)} would not change: make it "
                "so, or leave `backbone` out."
            )
    else:
        kwargs["backbone"] = _backbone(Gemma2Backbone, source, load_weights, backbone_kwargs)
    if "preprocessor" not in kwargs:
        kwargs["preprocessor"] = _optional_preprocessor(cls, source)
    return cls(**kwargs)


def _backbone(cls: type, source: Source, load_weights: bool, kwargs: dict[str, Any]) -> Gemma2Backbone:
    mode = kwargs.pop("quantize", None)
    arguments = {**source.config.to_dict(), **{key: value for key, value in kwargs.items() if key != "dtype" or value is not None}}
    if not load_weights:
        arguments["dtype"] = _policy(arguments.get("dtype", source.dtype), mode, source)
        return cls(**arguments)
    config = Gemma2Config(**{key: value for key, value in arguments.items() if key in Gemma2Config.field_names()})
    with reading.open_weights(source, config) as entries:
        arguments["dtype"] = _policy(arguments.get("dtype", source.dtype) or reading.stored_dtype(entries), mode, source)
        with skip_random_weights():
            backbone = cls(**arguments)
        reading.fill(backbone, entries, source.name)
    return backbone


def _policy(dtype: Any, mode: str | None, source: Source) -> Any:
    """The dtype policy to build in; `dtype` itself unless it is to be quantized."""
    if mode is None:
        return dtype
    before = keras.dtype_policies.get(dtype)
    if before.quantization_mode not in (None, mode):
        raise ValueError(
            f"`quantize` is {mode!r}, but {source.name!r} or `dtype` is {before.name!r} already. To quantize what its codes stand "
            f"for another time, which loses more, pass dtype={float_policy(dtype).name!r}, too."
        )
    return quantized_policy(dtype, mode)


def _tokenizer(cls: type, source: Source, kwargs: dict[str, Any], proto: bytes | None = None) -> Gemma2Tokenizer:
    proto = proto or reading.vocabulary(source)
    if proto is None:
        where = f"{source.path!r} has no tokenizer" if source.path else "its files are not part of this package"
        raise CheckpointError(
            f"The preset {source.name!r} has no tokenizer here: {where}. Pass `Gemma2Tokenizer(proto=path)` instead."
        )
    if source.stop_token_ids:
        kwargs.setdefault("extra_stop_token_ids", source.stop_token_ids)
    try:
        return cls(proto, **kwargs)
    except ValueError as error:  # no vocabulary of a Gemma
        raise CheckpointError(f"The tokenizer of {source.path}: {error}") from error


def _preprocessor(cls: type, source: Source, kwargs: dict[str, Any]) -> Gemma2CausalLMPreprocessor:
    tokenizer = kwargs.pop("tokenizer", None) or _tokenizer(cls.tokenizer_cls, source, {})
    usual = {"sequence_length": min(1024, source.config.max_sequence_length)}
    return cls(tokenizer, **{**usual, **source.preprocessor, **kwargs})


def _optional_preprocessor(cls: type, source: Source) -> Gemma2CausalLMPreprocessor | None:
    if _is_custom(source):
        return _custom(cls.preprocessor_cls.from_preset, source, {})
    proto = reading.vocabulary(source)  # read once: rebuilding a vocabulary of 256,000 pieces takes a second
    if proto is not None:
        preprocessor = cls.preprocessor_cls
        return _preprocessor(preprocessor, source, {"tokenizer": _tokenizer(preprocessor.tokenizer_cls, source, {}, proto)})
    warnings.warn(
        f"The preset {source.name!r} has no tokenizer: the model is loaded without a preprocessor and works on token "
        "ids alone. Pass `preprocessor=` to work on text.",
        stacklevel=callers_level(),
    )
    return None


def _is_custom(source: Source) -> bool:
    """Whether a preset of ours was saved with a preprocessor class of the user's own, which keras-hub's loader finds."""
    path = find_file(source.path, "preprocessor.json") if source.kind == KERAS else None
    return path is not None and read_json(path).get("registered_name") != keras.saving.get_registered_name(
        Gemma2CausalLMPreprocessor
    )


def _custom(loader: Callable[..., Any], source: Source, kwargs: dict[str, Any]) -> Any:
    try:
        return loader(source.path, **kwargs)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # what Keras makes of a class that is not registered
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The preprocessor of {source.path} is of a class that cannot be loaded: {reason} Or pass `preprocessor=`."
        ) from error
