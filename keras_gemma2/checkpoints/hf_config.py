"""Hugging Face's `config.json` of a Gemma 2 model, in both dialects, as a `Gemma2Config` and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keras_gemma2.config import GLOBAL, LOCAL, Gemma2Config

LAYER_TYPE_NAMES = {"sliding_attention": LOCAL, "full_attention": GLOBAL}
ACTIVATION = "gelu_pytorch_tanh"

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
    if ours["sliding_window_size"] is None:  # "no window": every layer is global
        ours["sliding_window_size"] = ours["max_sequence_length"]
        ours["layer_types"] = [GLOBAL] * ours["num_layers"]
    return Gemma2Config(**ours)


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
    """The dtype a `config.json` asks for, or None."""
    return values.get("dtype") or values.get("torch_dtype")


def stop_token_ids_from_hugging_face(values: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Where generation stops: `eos_token_id` of the generation config, or else of the config; an id or a list of ids."""
    ids = generation.get("eos_token_id", values.get("eos_token_id"))
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0)


def _refuse_other_models(values: Mapping[str, Any]) -> None:
    if values.get("model_type") != "gemma2":
        raise ValueError(
            f"`config.json` must describe a Gemma 2 model (model_type 'gemma2'). Received: model_type={values.get('model_type')!r}."
        )
    activation = values.get("hidden_activation") or values.get("hidden_act") or ACTIVATION
    if activation != ACTIVATION:
        raise ValueError(f"`hidden_activation` must be {ACTIVATION!r} for Gemma 2. Received: {activation!r}.")
    if values.get("attention_bias"):
        raise ValueError("`attention_bias` must be false for Gemma 2: its projections have no biases. Received: true.")
    if not values.get("tie_word_embeddings", True):
        raise ValueError("`tie_word_embeddings` must be true for Gemma 2. Received: false.")


def _rope_theta(values: Mapping[str, Any]) -> float:
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"`rope_type` must be 'default' for Gemma 2. Received: {kind!r}.")
    return float(parameters.get("rope_theta", values.get("rope_theta", 10000.0)))


def _layer_types(names: list[str] | None) -> list[str] | None:
    if names is None:
        return None
    unknown = sorted(set(names) - set(LAYER_TYPE_NAMES))
    if unknown:
        raise ValueError(f"`layer_types` entries must be among {list(LAYER_TYPE_NAMES)}. Received: {unknown}.")
    return [LAYER_TYPE_NAMES[name] for name in names]
