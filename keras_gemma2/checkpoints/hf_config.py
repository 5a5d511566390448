"""Hugging Face's `config.json` of a Gemma 2 model, in both dialects, as a `Gemma2Config` and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from keras_gemma2.checkpoints.source import shown
from keras_gemma2.config import GLOBAL, LOCAL, Gemma2Config

LAYER_TYPE_NAMES = {"sliding_attention": LOCAL, "full_attention": GLOBAL}
ACTIVATION = "gelu_pytorch_tanh"
DTYPES = ("float64", "float32", "float16", "bfloat16")

# Our name, theirs, and the value transformers' Gemma2Config fills in where a file leaves the key out.
_FIELDS = (
    ("vocabulary_size", "vocab_size", 256000),
    ("num_layers", "num_hidden_layers", 26),
    ("num_query_heads", "num_attention_heads", 8),
    ("num_key_value_heads", "num_key_value_heads", 4),
    ("hidden_dim", "hidden_size", 2304),
    ("intermediate_dim", "intermediate_size", 9216),
    ("head_dim", "head_dim", 256),
    ("query_pre_attn_scalar", "query_pre_attn_scalar", 256),
    ("sliding_window_size", "sliding_window", 4096),
    ("attention_logit_soft_cap", "attn_logit_softcapping", 50.0),
    ("final_logit_soft_cap", "final_logit_softcapping", 30.0),
    ("layer_norm_epsilon", "rms_norm_eps", 1e-6),
    ("max_sequence_length", "max_position_embeddings", 8192),
)


def is_hugging_face_config(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is a Hugging Face one."""
    return "model_type" in values


def config_from_hugging_face(values: Mapping[str, Any]) -> Gemma2Config:
    """Reads a parsed `config.json`, of transformers 4 or 5.

    Raises:
        ValueError: for another model, or for a feature Gemma 2 does not have; names the key and its value.
    """
    _refuse_other_models(values)
    ours = {name: values.get(theirs, default) for name, theirs, default in _FIELDS}
    ours["rope_max_wavelength"] = _rope_theta(values)
    ours["layer_types"] = _layer_types(values.get("layer_types"))
    no_window = ours["sliding_window_size"] is None  # every layer is global
    if no_window:
        ours["sliding_window_size"] = ours["max_sequence_length"]
    try:
        config = Gemma2Config(**ours)
    except ValueError as error:
        raise ValueError(_in_their_words(str(error))) from error
    return dataclasses.replace(config, layer_types=(GLOBAL,) * config.num_layers) if no_window else config


def config_to_hugging_face(config: Gemma2Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model, readable by transformers 4 and 5.

    Args:
        config: the model's.
        dtype: the dtype that readers should load the weights in.
    """
    names = {ours: theirs for theirs, ours in LAYER_TYPE_NAMES.items()}
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **{theirs: getattr(config, ours) for ours, theirs, _ in _FIELDS},
        "rope_theta": config.rope_max_wavelength,
        "layer_types": [names[kind] for kind in config.layer_types],
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def dtype_from_hugging_face(values: Mapping[str, Any]) -> str | None:
    """The dtype a `config.json` asks for, or None.

    Raises:
        ValueError: if no weights are of that dtype.
    """
    key = "dtype" if values.get("dtype") else "torch_dtype"
    dtype = values.get(key)
    if dtype is None:
        return None
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if name not in DTYPES:
        raise ValueError(f"`{key}` must be one of {', '.join(DTYPES)}. Received: {shown(dtype)}.")
    return name


def stop_token_ids_from_hugging_face(values: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Where generation stops: `eos_token_id` of the generation config, or else of the config; an id or a list of ids.

    Ids that no token has are passed over (some files say -1 for "none").

    Raises:
        ValueError: if it is something else than integers.
    """
    stated = generation.get("eos_token_id", values.get("eos_token_id"))
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"`eos_token_id` must be a token id or a list of them. Received: {shown(stated)}.")
    size = values.get("vocab_size", dict((theirs, default) for _, theirs, default in _FIELDS)["vocab_size"])
    return tuple(i for i in ids if 0 <= i < size)


def _refuse_other_models(values: Mapping[str, Any]) -> None:
    if values.get("model_type") != "gemma2":
        raise ValueError(
            "`config.json` must describe a Gemma 2 model (model_type 'gemma2'). Received: "
            f"model_type={shown(values.get('model_type'))}."
        )
    quantization = values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"`quantization_config` says that the weights are quantized, with quant_method={shown(method)}, which this package "
            "does not read. Take the unquantized model, such as the one it was made of, or a GGUF."
        )
    activation = values.get("hidden_activation") or values.get("hidden_act") or ACTIVATION
    if activation != ACTIVATION:
        raise ValueError(f"`hidden_activation` must be {ACTIVATION!r} for Gemma 2. Received: {shown(activation)}.")
    if values.get("attention_bias"):
        raise ValueError("`attention_bias` must be false for Gemma 2: its projections have no biases. Received: true.")
    if not values.get("tie_word_embeddings", True):
        raise ValueError("`tie_word_embeddings` must be true for Gemma 2. Received: false.")


def _rope_theta(values: Mapping[str, Any]) -> float:
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"`rope_parameters` and `rope_scaling` must be objects or null. Received: {shown(parameters)}.")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"`rope_type` must be 'default' for Gemma 2. Received: {shown(kind)}.")
    theta = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
    return float(theta) if type(theta) is int and abs(theta) < 2**53 else theta  # what else it may be, the config refuses


def _layer_types(names: list[str] | None) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, list):
        raise ValueError(f"`layer_types` must be a list. Received: {shown(names)}.")
    unknown = [name for name in names if not isinstance(name, str) or name not in LAYER_TYPE_NAMES]
    if unknown:
        raise ValueError(f"`layer_types` entries must be among {list(LAYER_TYPE_NAMES)}. Received: {shown(unknown[0])}.")
    return [LAYER_TYPE_NAMES[name] for name in names]


def _in_their_words(message: str) -> str:
    """A message about our config with the names that the keys have in the file."""
    theirs = {"rope_max_wavelength": "rope_theta", **{ours: name for ours, name, _ in _FIELDS}}
    return re.sub("|".join(rf"\b{ours}\b" for ours in theirs), lambda found: theirs[found[0]], message)
