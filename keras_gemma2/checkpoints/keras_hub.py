"""keras-hub's own presets of Gemma 2 (`GemmaBackbone`, `GemmaCausalLM`): read, and written.

Source: keras-hub 0.32, `keras_hub/src/models/gemma/` and `keras_hub/src/utils/preset_utils.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from keras_gemma2.checkpoints.keras_objects import (
    Classes,
    policy_name,
    quantization_modes,
    saved_preprocessor,
    write_json_files,
)
from keras_gemma2.checkpoints.keras_preset import vocabulary as vocabulary  # the same asset
from keras_gemma2.checkpoints.source import CONFIG_FILE, KERAS_HUB, Source, find_file, read_json
from keras_gemma2.config import GLOBAL, LOCAL, Gemma2Config
from keras_gemma2.errors import CheckpointError, callers_level

if TYPE_CHECKING:
    import numpy as np

    from keras_gemma2.checkpoints.weight_map import Foreign
    from keras_gemma2.checkpoints.writing import OutgoingWeights

_MODULES = "keras_hub.src.models.gemma"
CLASSES = Classes(
    package="keras_hub",
    backbone=(f"{_MODULES}.gemma_backbone", "GemmaBackbone"),
    task=(f"{_MODULES}.gemma_causal_lm", "GemmaCausalLM"),
    tokenizer=(f"{_MODULES}.gemma_tokenizer", "GemmaTokenizer"),
    preprocessor=(f"{_MODULES}.gemma_causal_lm_preprocessor", "GemmaCausalLMPreprocessor"),
    preprocessor_arguments={"add_start_token": True, "add_end_token": True},
    tasks=("CausalLM",),
)
PACKAGES = ("keras_hub", "keras_nlp")  # the second is its old name
# What keras-hub's layers are written for; its config has no keys for the base, and its blocks do not get the epsilon.
ROPE_MAX_WAVELENGTH = 10000.0
BLOCK_EPSILON = 1e-6
# Ours and theirs, under one name, and what keras-hub fills in where a config leaves the key out (None: it has to be there).
_SAME = {
    "vocabulary_size": None,
    "num_layers": None,
    "num_query_heads": None,
    "num_key_value_heads": None,
    "hidden_dim": None,
    "head_dim": None,
    "sliding_window_size": 4096,
    "layer_norm_epsilon": 1e-6,
    "dropout": 0.0,
}
_CAPS = ("attention_logit_soft_cap", "final_logit_soft_cap")
READABLE_MODES = ("int8", "int4")


# Reading ----------------------------------------------------------------------------------------------------------------


def read_source(name: str, path: str) -> Source | None:
    """Recognizes a folder by the class in its config.json.

    Raises:
        CheckpointError: for a Gemma 1 and for other models of keras-hub; says what they are.
    """
    file = find_file(path, CONFIG_FILE)
    values = read_json(file) if file else {}
    class_name = _keras_hub_class(values)
    if class_name is None:
        return None
    if class_name != CLASSES.backbone[1]:
        raise CheckpointError(f"{path} is a keras-hub preset of {class_name}. Gemma 2's are of {CLASSES.backbone[1]}.")
    arguments = values.get("config")
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{file} must hold the backbone's arguments under 'config'. Received: {arguments!r}.")
    _refuse_gemma_1(arguments, path)
    unreadable = [mode for mode in quantization_modes(arguments.get("dtype")) if mode.partition("/")[0] not in READABLE_MODES]
    if unreadable:
        raise CheckpointError(
            f"{path} is quantized to {unreadable[0]}; those read are {', '.join(READABLE_MODES)} and floats. "
            "Load it with keras-hub, or take the preset it was made of."
        )
    try:
        config = _config(arguments)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    policy = policy_name(arguments.get("dtype"), file)
    return Source(name, KERAS_HUB, config, path, values, policy, preprocessor=saved_preprocessor(path))


def open_tensors(source: Source, config: Gemma2Config, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every weight of the h5 files, one or several; quantized ones as floats."""
    from keras_gemma2.checkpoints.h5_weights import open_weight_files
    from keras_gemma2.checkpoints.keras_hub_quantized import dequantized
    from keras_gemma2.checkpoints.weight_map import rows_for

    cells = dict(rows_for(config, KERAS_HUB))
    return dequantized(open_weight_files(source.path, stack), config, cells, source.path), cells


def _keras_hub_class(values: Mapping[str, Any]) -> str | None:
    """The class that a `config.json` serializes, if it is one of keras-hub's."""
    package, _, registered = str(values.get("registered_name") or "").partition(">")
    if package in PACKAGES:
        return registered
    package = str(values.get("module") or "").partition(".")[0]
    return str(values.get("class_name")) if package in PACKAGES else None


def _refuse_gemma_1(arguments: Mapping[str, Any], path: str) -> None:
    norms = [arguments.get("use_post_attention_norm", False), arguments.get("use_post_ffw_norm", False)]
    if any(not isinstance(value, bool) for value in norms) or norms[0] != norms[1]:
        raise CheckpointError(
            f"{path} is no Gemma 2: `use_post_attention_norm` and `use_post_ffw_norm` must be true. Received: {norms}."
        )
    if not norms[0]:
        raise CheckpointError(
            f"{path} is a Gemma 1: it has no norms after attention and feed-forward. This package is for Gemma 2; load it with "
            "`keras_hub.models.GemmaCausalLM`."
        )


def _config(arguments: Mapping[str, Any]) -> Gemma2Config:
    missing = [key for key, default in _SAME.items() if default is None and key not in arguments]
    if missing or "intermediate_dim" not in arguments:
        raise ValueError(f"the backbone's arguments lack {missing or ['intermediate_dim']}.")
    ours = {key: arguments.get(key, default) for key, default in _SAME.items()}
    ours |= {key: arguments.get(key) for key in _CAPS}
    both = arguments["intermediate_dim"]
    if not isinstance(both, int) or both % 2:
        raise ValueError(f"`intermediate_dim` is the width of two gates and must be even. Received: {both!r}.")
    config = Gemma2Config(intermediate_dim=both // 2, **ours)
    changes: dict[str, Any] = {}
    if not _flag(arguments, "query_head_dim_normalize", True):
        scalar = config.hidden_dim / config.num_query_heads
        changes["query_pre_attn_scalar"] = int(scalar) if scalar.is_integer() else scalar
    if not _flag(arguments, "use_sliding_window_attention", False):
        changes["layer_types"] = [GLOBAL] * config.num_layers
    return dataclasses.replace(config, **changes)


def _flag(arguments: Mapping[str, Any], key: str, default: bool) -> bool:
    value = arguments.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"`{key}` must be true or false. Received: {value!r}.")
    return value


# Writing ----------------------------------------------------------------------------------------------------------------


def write_folder(
    folder: str | os.PathLike[str],
    weights: OutgoingWeights,
    proto: bytes | None = None,
    stop_token_ids: tuple[int, ...] = (),
    max_shard_size: str | float | None = 10,
    progress: Callable[[int], Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `keras_hub.models.GemmaCausalLM.from_preset` loads, tensor by tensor.

    Args:
        folder: an empty folder.
        weights: all weights, and what to store them in.
        proto: the serialized SentencePiece model; None writes a preset without a tokenizer.
        stop_token_ids: not written, with a warning if they are not Gemma's own: keras-hub's tokenizer has no place for them.
        max_shard_size: in GB of 1024 ** 3 bytes, as keras-hub takes it, or a text such as "5GB".
        progress: called with the number of bytes just written.
        preprocessor: arguments of the preprocessor that are not the default ones, such as `sequence_length`.

    Raises:
        CheckpointError: for a model that keras-hub's classes cannot express; nothing is written then.

    Warns:
        UserWarning: where keras-hub reads the config and computes something else.
    """
    from keras_gemma2.checkpoints.h5_weights import keras_order, write_weight_files
    from keras_gemma2.checkpoints.weight_map import foreign_shapes, rows_for

    folder = os.fspath(folder)
    config = weights.config
    arguments = backbone_arguments(config)
    _warn_of_losses(config, stop_token_ids, preprocessor or {})
    write_json_files(folder, CLASSES, arguments, config, weights.load_dtype, proto, {}, preprocessor)
    rows = {cell.name: (path, cell) for path, cell in rows_for(config, KERAS_HUB)}
    shapes = foreign_shapes(config, dict(rows.values()))
    tensors = (
        (name, shapes[name], weights.dtype_of(rows[name][0]), _foreign_blocks(weights, *rows[name])) for name in keras_order(rows)
    )
    write_weight_files(folder, tensors, weights.nbytes, max_shard_size, progress)


def backbone_arguments(config: Gemma2Config) -> dict[str, Any]:
    """The arguments of keras-hub's `GemmaBackbone` for a model.

    Raises:
        CheckpointError: if there are none; names what cannot be expressed.

    Warns:
        UserWarning: where keras-hub 0.32 takes an argument and does not heed it.
    """
    alternating = tuple((LOCAL, GLOBAL)[i % 2] for i in range(config.num_layers))
    if config.layer_types not in (alternating, (GLOBAL,) * config.num_layers):
        raise _inexpressible("layer_types", list(config.layer_types), "local, global, local, ... or all global")
    if config.rope_max_wavelength != ROPE_MAX_WAVELENGTH:
        raise _inexpressible("rope_max_wavelength", config.rope_max_wavelength, ROPE_MAX_WAVELENGTH)
    by_head_dim = config.query_pre_attn_scalar == config.head_dim
    if not by_head_dim and config.query_pre_attn_scalar * config.num_query_heads != config.hidden_dim:
        raise _inexpressible(
            "query_pre_attn_scalar",
            config.query_pre_attn_scalar,
            f"head_dim={config.head_dim} or hidden_dim / num_query_heads={config.hidden_dim / config.num_query_heads:g}",
        )
    if not by_head_dim:
        _warn(
            f"scales queries by head_dim={config.head_dim}, whatever `query_head_dim_normalize` says: its logits will be wrong. "
            f"This model's scalar is {config.query_pre_attn_scalar}"
        )
    if config.layer_norm_epsilon != BLOCK_EPSILON:
        _warn(
            f"uses the epsilon {BLOCK_EPSILON} in every decoder block, whatever `layer_norm_epsilon` says: its logits will differ. "
            f"This model's is {config.layer_norm_epsilon}"
        )
    return {
        **{key: getattr(config, key) for key in (*_SAME, *_CAPS)},
        "intermediate_dim": 2 * config.intermediate_dim,
        "query_head_dim_normalize": by_head_dim,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": config.layer_types == alternating,
    }


def _warn_of_losses(config: Gemma2Config, stop_token_ids: tuple[int, ...], preprocessor: Mapping[str, Any]) -> None:
    lost = [
        *([] if config.max_sequence_length == Gemma2Config.max_sequence_length else ["max_sequence_length"]),
        *([] if preprocessor.get("truncation", "error") == "error" else ["truncation"]),
        *([] if set(stop_token_ids) <= {1, 107} else ["stop_token_ids"]),
    ]
    if lost:
        _warn(f"has no place for {' and '.join(lost)}, which its preset is written without")


def _foreign_blocks(weights: OutgoingWeights, path: str, cell: Foreign) -> Iterator[np.ndarray]:
    if not cell.pattern:
        yield from weights.blocks(path)
        return
    from keras_gemma2.checkpoints.layout import layout
    from keras_gemma2.checkpoints.weight_map import sizes

    yield layout(cell.pattern).to_foreign(weights.array(path), sizes(weights.config))


def _inexpressible(name: str, value: Any, possible: Any) -> CheckpointError:
    return CheckpointError(
        f"keras-hub's Gemma cannot express {name}={value}; it is always {possible} there. Save in another format: "
        "our own preset, or Hugging Face's."
    )


def _warn(what: str) -> None:
    message = f"keras-hub 0.32 {what}. The files are right otherwise; load them with this package instead."
    warnings.warn(message, stacklevel=callers_level())
