"""Presets that this package's `save_to_preset` writes: keras-hub's folder layout, our classes, our kernels' layout."""

from __future__ import annotations

from typing import Any

from keras_gemma2.checkpoints.source import CONFIG_FILE, KERAS, Source, find_file, read_json
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError

REGISTERED_NAME = "keras_gemma2>Gemma2Backbone"


def read_source(name: str, path: str) -> Source | None:
    """Recognizes a folder by the class in its config.json."""
    config = find_file(path, CONFIG_FILE)
    values = read_json(config) if config else {}
    if values.get("registered_name") != REGISTERED_NAME:
        return None
    arguments = values.get("config")
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{config} must hold the backbone's arguments under 'config'. Received: {arguments!r}.")
    known = {key: value for key, value in arguments.items() if key in Gemma2Config.field_names()}
    try:
        return Source(name, KERAS, Gemma2Config(**known), path, values, arguments.get("dtype"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{config}: {error}") from error


def open_tensors(source: Source, config: Gemma2Config, stack: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every weight of the h5 files, one or several."""
    raise NotImplementedError


def vocabulary(source: Source) -> bytes | None:
    """The bytes of the tokenizer's asset."""
    path = find_file(source.path, "assets/tokenizer/vocabulary.spm")
    if path is None:
        return None
    with open(path, "rb") as file:
        return file.read()
