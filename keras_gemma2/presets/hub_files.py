"""Which files of a model are needed: those that the readers in `checkpoints` open, and no others."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from keras_gemma2.checkpoints.added_tokens import ADDED_TOKENS_FILE, TOKENIZER_CONFIG_FILE, needs_tokenizer_json
from keras_gemma2.checkpoints.formats import ADAPTER_FILE, has_whole_model
from keras_gemma2.checkpoints.source import CONFIG_FILE, find_file, read_bytes, read_json
from keras_gemma2.errors import CheckpointError
from keras_gemma2.presets.hub import CONFIG, WEIGHTS

GENERATION_FILE = "generation_config.json"
PREPROCESSOR_FILE = "preprocessor.json"
KERAS_VOCABULARY = "assets/tokenizer/vocabulary.spm"
VOCABULARY = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# For each format with an index: the index, and the file that stands alone without one. Pickles are the last choice.
SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
KERAS_WEIGHTS = ("model.weights.json", "model.weights.h5")
_PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_INDEXED = (SAFETENSORS, KERAS_WEIGHTS, _PICKLES)
_FLAX_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")
_GGUF = ".gguf"
_GGUF_PART = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})\.gguf")


def small_files(names: Collection[str], need: str) -> list[str]:
    """The files of a listing to have before the weights, the weights' index among them."""
    wanted = [CONFIG_FILE, GENERATION_FILE]
    if need != CONFIG:
        # Hugging Face's tokenizer.json has 34 MB, and is read only where tokenizer.model is missing; keras-hub's is small.
        wanted += [PREPROCESSOR_FILE, KERAS_VOCABULARY, VOCABULARY if VOCABULARY in names else TOKENIZER_JSON]
        wanted += [TOKENIZER_CONFIG_FILE, ADDED_TOKENS_FILE]
    if need == WEIGHTS:
        wanted.append(CHAT_TEMPLATE_FILE)  # for those who write the model again
        wanted += [index for index, _ in _INDEXED if index in names][:1]
    return [name for name in wanted if name in names]


def further_files(names: Collection[str], folder: str) -> list[str]:
    """What the small files of a folder call for: tokenizer.json, if it alone has the tokens that a fine-tune added."""
    model, config = find_file(folder, VOCABULARY), find_file(folder, CONFIG_FILE)
    if model is None or config is None or TOKENIZER_JSON not in names:
        return []
    rows = read_json(config).get("vocab_size")
    return [TOKENIZER_JSON] if type(rows) is int and needs_tokenizer_json(read_bytes(model), folder, rows) else []


def describes_itself(folder: str) -> bool:
    """Whether a config.json is one that is read without weights: Hugging Face's or Keras's, not gemma_pytorch's."""
    path = os.path.join(folder, CONFIG_FILE)
    return os.path.isfile(path) and bool({"model_type", "registered_name"} & set(read_json(path)))


def weight_files(names: Collection[str], folder: str, where: str) -> list[str]:
    """The files of a listing that hold the weights.

    Args:
        names: all files of the model.
        folder: holds the small ones.
        where: the address, for messages.

    Raises:
        CheckpointError: if there are none that this package reads, or several models, or the index names a file that the
            model lacks.
    """
    for index, single in _INDEXED:
        if index in names:
            return _listed_shards(names, os.path.join(folder, index), where)
        if single in names:
            return [single]
    others = _one_of([[name] for name in names if "/" not in name and name.endswith(".ckpt")] or _flax(names), where)
    if others:
        return others
    raise CheckpointError(
        f"{where!r} has no weights. Read are safetensors, Keras h5, GGUF, gemma_pytorch's .ckpt and Flax checkpoints; it holds "
        f"{sorted(names)[:10]}."
    )


def check_config(names: Collection[str], where: str) -> None:
    """Refuses weights that say nothing of the architecture, and have no config.json.

    Raises:
        CheckpointError: says so; a LoRA adapter is named as one.
    """
    if ADAPTER_FILE in names and not has_whole_model(names):
        raise CheckpointError(
            f"{where!r} is a LoRA adapter, not a model. Pass the address of a merged model, or of the base model, which "
            f"base_model_name_or_path of its {ADAPTER_FILE} names, and then give the adapter's folder to its `load_adapter`."
        )
    if CONFIG_FILE in names:
        return
    if any(name in names for pair in (SAFETENSORS, KERAS_WEIGHTS) for name in pair):
        raise CheckpointError(f"{where!r} has weights but no {CONFIG_FILE}. Pass the address of a whole model.")


def shard_names(index: str) -> list[str]:
    """The files that an index of weights names, each a plain name that stays in the model's folder.

    Raises:
        CheckpointError: if the index is no index, or names a file elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must hold a `weight_map` from tensors to files. Delete it to download it again.")
    values = (each for value in weight_map.values() for each in (value if isinstance(value, list) else [value]))
    return sorted({_plain(value, index) for value in values})


def gguf_parts(names: Collection[str], file: str | None, where: str) -> list[str]:
    """The files of a GGUF model, the first part first: the one asked for, or the only one of a model without other weights.

    Raises:
        CheckpointError: if there are several and none is asked for, or no such file; lists them.
    """
    ggufs = sorted(name for name in names if name.endswith(_GGUF))
    if file is not None:
        if file not in ggufs:
            raise CheckpointError(f"{where!r}: the model has no such file. Its GGUF files: {ggufs}.")
        return [name for name in ggufs if _model(name) == _model(file)]
    if any(name in names for pair in _INDEXED for name in pair):
        return []
    models = {_model(name): name for name in reversed(ggufs)}
    if len(models) > 1:
        raise CheckpointError(
            f"{where!r} has {len(models)} GGUF models. Name one, as '{where}/FILE.gguf': {sorted(models.values())}."
        )
    return ggufs


def _model(name: str) -> tuple[str, ...]:
    """What the parts of one split GGUF have in common."""
    found = _GGUF_PART.fullmatch(name)
    return (name,) if found is None else found.groups()


def _listed_shards(names: Collection[str], index: str, where: str) -> list[str]:
    shards = shard_names(index)
    missing = [name for name in shards if name not in names]
    if missing:
        raise CheckpointError(f"{index} names {missing[:3]}, which {where!r} does not have: its upload is not complete.")
    return shards


def _plain(value: Any, index: str) -> str:
    if not isinstance(value, str) or value in ("", ".", "..") or any(mark in value for mark in "/\\\0:*?[]"):
        raise CheckpointError(f"{index} names the file {value!r}; only files of its own folder may be named there.")
    return value


def _flax(names: Collection[str]) -> list[list[str]]:
    """The files of each folder that looks like an Orbax checkpoint, or like one around it."""
    folders = {os.path.dirname(name) for name in names if os.path.basename(name) in _FLAX_MARKS}
    tops = sorted(folder for folder in folders if not any(f"{folder}/".startswith(f"{other}/") for other in folders - {folder}))
    return [list(names)] if "" in folders else [[name for name in names if name.startswith(f"{top}/")] for top in tops]


def _one_of(found: list[list[str]], where: str) -> list[str]:
    if len(found) > 1:
        firsts = sorted(files[0] for files in found)
        raise CheckpointError(f"{where!r} holds several checkpoints, such as {firsts[:10]}. Download one, and pass its folder.")
    return found[0] if found else []
