"""For formats that carry no config: the one of a file beside the weights, or the published size that the shapes have."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from keras_gemma2.checkpoints.sentencepiece_model import read_model
from keras_gemma2.checkpoints.source import Source, find_file
from keras_gemma2.config import NAMED_SIZES, Gemma2Config
from keras_gemma2.errors import CheckpointError

# The formats whose config.json may stand beside weights of another one.
_CONFIG_READERS = ("keras_gemma2.checkpoints.hf", "keras_gemma2.checkpoints.keras_preset")
_VOCABULARY_FILE = "tokenizer.model"
# Weights that a folder's own reader takes before any other.
_MAIN_WEIGHTS = (".safetensors", ".weights.h5")
_LAYER = re.compile(r"(?:layers\.|layer_)(\d+)[./]")
_GEMMA_2_ONLY = ("post_feedforward_layernorm", "post_ffw_norm")


def folder_of(path: str) -> str:
    """A folder itself; of a file, the folder it is in."""
    return path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))


def file_names(folder: str) -> list[str]:
    """What is in a folder; nothing, if it may not be looked into."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def has_main_weights(folder: str) -> bool:
    """Whether a folder has safetensors or h5 weights, beside which those of other formats do not count."""
    return any(name.endswith(_MAIN_WEIGHTS) for name in file_names(folder))


def source_of_config(name: str, kind: str, path: str, *folders: str) -> Source | None:
    """The source that the first config.json in these folders describes, Hugging Face's or ours; None if there is none.

    Args:
        name: as the user gave it.
        kind: of the weights.
        path: of the weights.
        *folders: where to look.

    Raises:
        CheckpointError: if such a config is broken, or of another model.
    """
    for folder in folders:
        for module in _CONFIG_READERS:
            source = importlib.import_module(module).read_source(name, folder)
            if source is not None:
                return dataclasses.replace(source, kind=kind, path=path)
    return None


def published_size(
    shapes: Mapping[str, tuple[int, ...]], cells_of: Callable[[Gemma2Config], Mapping[str, Any]], where: str
) -> Gemma2Config:
    """The config of the published size that has exactly these tensors.

    Args:
        shapes: of the checkpoint's tensors, by name.
        cells_of: the weight table's cells in the checkpoint's format, for a config.
        where: file or folder, for messages.

    Raises:
        CheckpointError: if there is none; names the shapes found.
    """
    from keras_gemma2.checkpoints.weight_map import foreign_shapes

    for config in NAMED_SIZES.values():
        if foreign_shapes(config, cells_of(config)) == shapes:
            return config
    layers = {int(found[1]) for name in shapes if (found := _LAYER.search(name))}
    shown = {name: shape for name, shape in shapes.items() if not (found := _LAYER.search(name)) or found[1] == "0"}
    gemma_1 = (
        ""
        if any(part in name for name in shapes for part in _GEMMA_2_ONLY)
        else (" It has no norm behind its feed-forward layers: is it Gemma 1, which this package does not read?")
    )
    raise CheckpointError(
        f"{where} carries no config, and its {len(shapes)} tensors in {len(layers)} layers are those of none of the published "
        f"sizes ({', '.join(NAMED_SIZES)}). Put the model's Hugging Face config.json beside the weights. Found outside the "
        f"layers and in layer 0: {dict(list(sorted(shown.items()))[:20])}.{gemma_1}"
    )


def vocabulary_beside(source: Source) -> bytes | None:
    """The SentencePiece model in the folder of the weights, or else the one in the folder above."""
    from keras_gemma2.checkpoints import hf

    folder = folder_of(source.path)
    proto = hf.vocabulary(dataclasses.replace(source, path=folder))
    if proto is not None:
        return proto
    above = find_file(os.path.dirname(os.path.abspath(folder)), _VOCABULARY_FILE)
    return None if above is None else read_model(above)
