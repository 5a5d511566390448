"""The JSON files of a Keras preset, written as `keras_hub`'s `save_to_preset` writes them, without making the objects.

Format: `keras.saving.serialize_keras_object` and keras-hub's `KerasPresetSaver` (`keras_hub/src/utils/preset_utils.py`).
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from keras_gemma2.checkpoints.source import find_file, read_json
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError
from keras_gemma2.quantization import MODES

VOCABULARY_FILE = os.path.join("assets", "tokenizer", "vocabulary.spm")
POLICIES = ("float64", "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
_DEFAULT_LENGTH = 1024  # of a preprocessor's sequences


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of one package that a preset's files name: `(module, class name)` of each.

    Args:
        package: under which they are registered with Keras.
        backbone, task, tokenizer, preprocessor: the four.
        preprocessor_arguments: those the preprocessor takes, with their defaults.
        tasks: the base classes that keras-hub lists in `metadata.json`.
    """

    package: str
    backbone: tuple[str, str]
    task: tuple[str, str]
    tokenizer: tuple[str, str]
    preprocessor: tuple[str, str]
    preprocessor_arguments: Mapping[str, Any]
    tasks: tuple[str, ...]


def write_json_files(
    folder: str,
    classes: Classes,
    backbone_arguments: Mapping[str, Any],
    config: Gemma2Config,
    dtype: str,
    proto: bytes | None,
    tokenizer_arguments: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
) -> None:
    """Writes all files of a preset but its weights.

    Args:
        folder: where; it holds none of them yet.
        classes: whose preset it is.
        backbone_arguments: of the backbone, but name and dtype.
        config: the model's.
        dtype: of its weights.
        proto: the serialized SentencePiece model; None leaves tokenizer and preprocessor out.
        tokenizer_arguments: of the tokenizer, beyond the usual ones.
        preprocessor: arguments of the preprocessor that are not to be the default ones; those it does not take are left out.
    """
    backbone = _object(classes, classes.backbone, dtype, backbone_arguments)
    parts = {"config.json": backbone, "metadata.json": _metadata(config, classes)}
    task: dict[str, Any] = {"backbone": backbone, "preprocessor": None}
    if proto is not None:
        unpacked = {"config_file": "tokenizer.json", "proto": None, "sequence_length": None, "add_bos": False, "add_eos": False}
        tokenizer = _object(classes, classes.tokenizer, "int32", {**unpacked, **tokenizer_arguments})
        usual = {**classes.preprocessor_arguments, "sequence_length": min(_DEFAULT_LENGTH, config.max_sequence_length)}
        given = {key: value for key, value in (preprocessor or {}).items() if key in usual}
        arguments = {"tokenizer": tokenizer, "config_file": "preprocessor.json", **usual, **given}
        task["preprocessor"] = _object(classes, classes.preprocessor, "float32", arguments)
        parts |= {"tokenizer.json": tokenizer, "preprocessor.json": task["preprocessor"]}
        _write_vocabulary(folder, proto)
    parts["task.json"] = _object(classes, classes.task, None, task)
    for name, values in parts.items():
        with open(os.path.join(folder, name), "x", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=4))


def saved_preprocessor(folder: str) -> dict[str, Any]:
    """The arguments in a preset's `preprocessor.json` that a preprocessor of this package takes too.

    Raises:
        CheckpointError: for a value of the wrong kind. Nothing is deserialized: a file could name any class.
    """
    arguments = _arguments(folder, "preprocessor.json")
    for name, valid in _PREPROCESSOR_ARGUMENTS.items():
        if name in arguments and not valid(arguments[name]):
            raise CheckpointError(f"{os.path.join(folder, 'preprocessor.json')}: `{name}` cannot be {arguments[name]!r}.")
    return {name: arguments[name] for name in _PREPROCESSOR_ARGUMENTS if name in arguments}


def saved_stop_token_ids(folder: str) -> tuple[int, ...]:
    """The `extra_stop_token_ids` in a preset's `tokenizer.json`.

    Raises:
        CheckpointError: if they are no ids.
    """
    ids = _arguments(folder, "tokenizer.json").get("extra_stop_token_ids", [])
    if not isinstance(ids, list) or not all(_is_count(i) for i in ids):
        raise CheckpointError(f"{os.path.join(folder, 'tokenizer.json')}: `extra_stop_token_ids` cannot be {ids!r}.")
    return tuple(ids)


def _arguments(folder: str, name: str) -> dict[str, Any]:
    path = find_file(folder, name)
    arguments = read_json(path).get("config") if path else {}
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path} must hold arguments under 'config'. Received: {arguments!r}.")
    return arguments


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


_PREPROCESSOR_ARGUMENTS = {
    "sequence_length": lambda value: _is_count(value) and value > 0,
    "add_start_token": lambda value: isinstance(value, bool),
    "add_end_token": lambda value: isinstance(value, bool),
    "truncation": lambda value: value in ("error", "right", "left"),
}


def policy_name(dtype: Any, where: str) -> str | None:
    """The dtype policy that a config stands for.

    Args:
        dtype: a name; a serialized `DTypePolicy` or `DTypePolicyMap`; or None.
        where: the file, for messages.

    Returns:
        The policy's name. None where the weights are quantized and their float dtype is not said.

    Raises:
        CheckpointError: for anything else. Nothing is deserialized: a config could name any class.
    """
    policy = dtype
    if _kind(policy) == "DTypePolicyMap":
        policy = policy["config"].get("default_policy")
    if _kind(policy):
        inner = policy["config"]
        policy = inner.get("source_name") if "mode" in inner else inner.get("name")
    if policy is None:
        return None
    name = policy.rpartition("_from_")[2] if isinstance(policy, str) else policy
    if name not in POLICIES:
        raise CheckpointError(f"{where}: `dtype` must be one of {', '.join(POLICIES)}. Received: {dtype!r}. Pass `dtype=`.")
    return name


def quantized_policy_name(dtype: Any, where: str) -> str | None:
    """As `policy_name`, but "int8_from_bfloat16" and the like stay what they are.

    Raises:
        CheckpointError: for a mode that this package has no weights for, or a model whose matrices differ in mode.
    """
    name, modes = policy_name(dtype, where), quantization_modes(dtype)
    if not modes:
        return name
    if len(modes) > 1 or modes[0] not in MODES or _kind(dtype) == "DTypePolicyMap":
        raise CheckpointError(
            f"{where}: this package's presets are quantized as a whole, to one of {', '.join(MODES)}. Received: {dtype!r}."
        )
    return f"{modes[0]}_from_{name}"


def float_policy_name(policy: str | None) -> str | None:
    """The float policy that a policy's name is made from: "bfloat16" for "int8_from_bfloat16"; any other as it is."""
    return policy if policy is None else policy.rpartition("_from_")[2]


def quantization_modes(dtype: Any) -> list[str]:
    """The quantization modes ("int8", "int4/128", "float8", ...) among the policies of a serialized dtype."""
    policies = [dtype]
    if _kind(dtype) == "DTypePolicyMap":
        mapped = dtype["config"].get("policy_map")
        policies = [dtype["config"].get("default_policy"), *(mapped.values() if isinstance(mapped, dict) else [])]
    modes = set()
    for policy in policies:
        inner = policy["config"] if _kind(policy) else {"name": policy}
        mode, joined, _ = str(inner.get("name")).partition("_from_")
        if "mode" in inner or joined:
            modes.add(str(inner.get("mode", mode)))
    return sorted(modes)


def _kind(policy: Any) -> str:
    """The class name of a serialized policy; "" for anything else."""
    serialized = isinstance(policy, dict) and isinstance(policy.get("config"), dict)
    return str(policy.get("class_name")) if serialized else ""


def _object(classes: Classes, which: tuple[str, str], dtype: str | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    module, name = which
    config: dict[str, Any] = {"name": _snake_case(name)}
    if dtype is None:  # a task, whose own name comes last
        config = {**arguments, **config}
    else:
        policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
        config |= {"trainable": True, "dtype": policy, **arguments}
    return {"module": module, "class_name": name, "config": config, "registered_name": f"{classes.package}>{name}"}


def _snake_case(name: str) -> str:
    """As Keras names its objects: `Gemma2CausalLM` -> `gemma2_causal_lm`."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _metadata(config: Gemma2Config, classes: Classes) -> dict[str, Any]:
    return {
        "keras_version": importlib.metadata.version("keras"),
        "keras_hub_version": importlib.metadata.version("keras-hub"),
        "parameter_count": config.parameter_count(),
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": list(classes.tasks),
    }


def _write_vocabulary(folder: str, proto: bytes) -> None:
    path = os.path.join(folder, VOCABULARY_FILE)
    os.makedirs(os.path.dirname(path))
    with open(path, "xb") as file:
        file.write(proto)
