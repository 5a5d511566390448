"""Adapters in the format of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint; which modules a config targets, and with what rank and alpha,
follows peft 0.21 (`tuners/tuners_utils.py` check_target_module_exists, `utils/other.py` get_pattern_key).
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_gemma2.checkpoints.safetensors_file import CODES, open_safetensors, write_safetensors
from keras_gemma2.checkpoints.source import find_file, read_json, shown
from keras_gemma2.checkpoints.weight_map import check_tensors, rows_for
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError, MissingFileError, callers_level
from keras_gemma2.lora import LoraSettings, projection_shapes
from keras_gemma2.staging import folder_path, replacing_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWNED = (CONFIG, WEIGHTS, "adapter_model.bin")
PREFIX = "base_model.model."
FACTORS = ("lora_A", "lora_B")
# What a config may hold that leaves an adapter a plain one: how it was made, or who reads it.
_HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora"),
}
# Fields that make another model of it, where they hold anything.
_REFUSED = (
    *("modules_to_save", "fan_in_fan_out", "use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "megatron_config", "velora_config", "monteclora_config"),
    *("use_bdlora", "arrow_config", "kasa_config"),
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base weights, too


def _modules(config: Gemma2Config) -> dict[str, str]:
    """What PEFT calls each projection (`model.layers.0.self_attn.q_proj`), by the path of its layer."""
    names = {path: cell.name for path, cell in rows_for(config, "hugging_face")}
    return {path: names[f"{path}/kernel"].removesuffix(".weight") for path in projection_shapes(config)}


def _key(module: str, factor: str) -> str:
    return f"{PREFIX}{module}.{factor}.weight"


# Reading ----------------------------------------------------------------------------------------------------------------


def read_adapter(
    folder: str | os.PathLike[str], config: Gemma2Config
) -> tuple[LoraSettings, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """An adapter of a model.

    Args:
        folder: with both files.
        config: the model's.

    Returns:
        Its settings, and the arrays `[rank, in]` and `[out, rank]` of each adapted projection, by the path of its layer.

    Raises:
        CheckpointError: for a missing or damaged file, a feature that a plain adapter does not have, or tensors that are missing,
            that the config does not name, or that have other shapes than it and the model make them.
        TypeError: if `folder` is no path.
    """
    path = folder_path(folder, "folder")
    names = {name: find_file(path, name) for name in (CONFIG, WEIGHTS)}
    for name, found in names.items():
        if found is None:
            is_old = name == WEIGHTS and find_file(path, "adapter_model.bin")
            mend = "Save it anew with a PEFT of 0.6 or later" if is_old else "An adapter in PEFT's format has one"
            raise MissingFileError(f"{os.path.join(path, name)} is not there. {mend}.")
    settings = _settings(read_json(names[CONFIG]), names[CONFIG], config)
    with contextlib.ExitStack() as stack:
        tensors = open_safetensors(names[WEIGHTS], stack)
        return settings, _values(tensors, settings, config, names[WEIGHTS])


def _values(tensors: Mapping[str, Any], settings: LoraSettings, config: Gemma2Config, path: str) -> dict[str, Any]:
    shapes, modules = projection_shapes(config), _modules(config)
    expected = {}
    for layer, rank in settings.ranks.items():
        out, width = shapes[layer]
        expected.update(zip([_key(modules[layer], factor) for factor in FACTORS], [(rank, width), (out, rank)]))
    model = f"this model of {config.num_layers} layers and width {config.hidden_dim} with the adapter's config"
    check_tensors(tensors, expected, path, model)
    return {layer: tuple(_array(tensors, _key(modules[layer], factor), path) for factor in FACTORS) for layer in settings.ranks}


def _array(tensors: Mapping[str, Any], key: str, path: str) -> np.ndarray:
    array = tensors[key][:]
    array = array if array.dtype == np.float64 else array.astype(np.float32)
    if not np.isfinite(array).all():
        raise CheckpointError(f"The tensor {key!r} of {path} has values that are NaN or infinite.")
    return array


def _settings(values: dict[str, Any], path: str, config: Gemma2Config) -> LoraSettings:
    _refuse_other_kinds(values, path)
    modules = _modules(config)
    targeted = _targeted(values, path, modules)
    ranks, alphas = ({layer: _of_pattern(values, path, *names, modules[layer]) for layer in targeted} for names in _PATTERNS)
    dropout = values.get("lora_dropout", 0.0) or 0.0
    try:
        return LoraSettings(ranks, alphas, dropout, values.get("use_rslora", False) or False)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


_PATTERNS = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))


def _refuse_other_kinds(values: dict[str, Any], path: str) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} has 'peft_type' {shown(kind)}; adapters of 'LORA' are read.")
    for name in _REFUSED:
        if values.get(name):
            raise CheckpointError(f"{path} has {name!r} {shown(values[name])}, which this package has no counterpart of.")
    if values.get("bias", "none") not in ("none", None):
        raise CheckpointError(f"{path} has 'bias' {shown(values['bias'])}; Gemma 2 has no biases to train. Train with 'none'.")
    start = values.get("init_lora_weights", True)
    if not (isinstance(start, (bool, str)) or start is None) or start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path} has 'init_lora_weights' {shown(start)}, which changes the weights beside it, too. Convert the adapter to a "
            "plain one with PEFT (`path_initial_model_for_weight_conversion` of its `save_pretrained`)."
        )
    unknown = sorted(name for name, value in values.items() if value and name not in _HARMLESS and name not in _REFUSED)
    if unknown:
        warnings.warn(f"{path} has fields that are not known here, and not looked at: {unknown}.", stacklevel=callers_level())


def _targeted(values: dict[str, Any], path: str, modules: Mapping[str, str]) -> list[str]:
    """The paths of the layers whose modules a config targets."""
    targets = values.get("target_modules")
    is_text = isinstance(targets, str)
    if not is_text and not (isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets)):
        raise CheckpointError(f"{path} must have 'target_modules' of names, or one regular expression. Received: {shown(targets)}.")
    for target in () if is_text else targets:
        if target.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            raise CheckpointError(f"{path} targets {target!r}; adapters of the embedding have no counterpart here.")
    is_target, is_excluded = _matcher(targets, path), _matcher(values.get("exclude_modules"), path)
    found = [layer for layer, module in modules.items() if is_target(module) and not is_excluded(module)]
    indices = values.get("layers_to_transform")
    if indices is not None and indices != [] and not is_text:
        wanted = indices if isinstance(indices, list) else [indices]
        found = [layer for layer in found if int(modules[layer].split(".")[2]) in wanted]
    if not found:
        raise CheckpointError(f"{path} has 'target_modules' {shown(targets)}, which names no projection of this model.")
    return found


def _matcher(names: Any, path: str) -> Callable[[str], bool]:
    """Whether names of modules are among those that a list or a regular expression of a config names."""
    if not names:
        return lambda module: False
    if isinstance(names, str):
        if names.lower() == "all-linear":
            return lambda module: True
        with _regular_expressions(path):
            expression = re.compile(names)
        return lambda module: expression.fullmatch(module) is not None
    ends = tuple(f".{name}" for name in names)
    return lambda module: f".{module}".endswith(ends)


def _of_pattern(values: dict[str, Any], path: str, patterns: str, default: str, module: str) -> Any:
    """A module's rank or alpha: that of the first pattern that matches, or else the default."""
    table = values.get(patterns) or {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} must have an object as {patterns!r}. Received: {shown(table)}.")
    with _regular_expressions(path):
        found = next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    found = values.get(default) if found is None else found
    if found is None:
        raise CheckpointError(f"{path} lacks {default!r}.")
    return found


@contextlib.contextmanager
def _regular_expressions(path: str) -> Iterator[None]:
    try:
        yield
    except re.error as error:
        raise CheckpointError(f"{path} has a name that is no regular expression: {error}.") from error


# Writing ----------------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: str | os.PathLike[str],
    settings: LoraSettings,
    values: Mapping[str, tuple[np.ndarray, np.ndarray]],
    config: Gemma2Config,
) -> None:
    """Writes an adapter's folder in one step; files in it that belong to no adapter stay.

    Args:
        folder: made if missing.
        settings: of the adapter.
        values: arrays `[rank, in]` and `[out, rank]` by path.
        config: the model's.

    Raises:
        CheckpointError: if the folder cannot be written.
        TypeError: if `folder` is no path.
    """
    target = folder_path(folder, "folder")
    modules = _modules(config)
    tensors = {}
    for path, arrays in values.items():
        for factor, array in zip(FACTORS, arrays):
            array = array if array.dtype in CODES else array.astype(np.float32)
            tensors[_key(modules[path], factor)] = (array.shape, array.dtype, iter([array]))
    needed = sum(array.nbytes for arrays in values.values() for array in arrays)
    with replacing_folder(target, needed, OWNED) as staging:
        write_safetensors(os.path.join(staging, WEIGHTS), tensors)
        with open(os.path.join(staging, CONFIG), "w", encoding="utf-8") as file:
            json.dump(_config_values(settings, modules), file, indent=2, sort_keys=True)
            file.write("\n")


def _config_values(settings: LoraSettings, modules: Mapping[str, str]) -> dict[str, Any]:
    rank, ranks = _with_exceptions(settings.ranks, modules)
    alpha, alphas = _with_exceptions(settings.alphas, modules)
    return {
        "alpha_pattern": alphas,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "target_modules": _target_modules(settings, modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": settings.use_rslora,
    }


def _with_exceptions(numbers: Mapping[str, Any], modules: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The most frequent number, and the others by module."""
    usual = collections.Counter(numbers.values()).most_common(1)[0][0]
    return usual, {modules[path]: number for path, number in numbers.items() if number != usual}


def _target_modules(settings: LoraSettings, modules: Mapping[str, str]) -> list[str]:
    """Short names where every module of that name is adapted; else whole ones."""
    by_name: dict[str, list[str]] = {}
    for path, module in modules.items():
        by_name.setdefault(module.rpartition(".")[2], []).append(path)
    targets = []
    for name, paths in by_name.items():
        adapted = [path for path in paths if path in settings.ranks]
        targets += [name] if adapted == paths else [modules[path] for path in adapted]
    return targets
