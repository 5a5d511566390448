"""The built-in preset names, and what a name or a folder stands for. Reads files, loads no model."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from typing import Any

from keras_gemma2.checkpoints.hf_config import config_from_hugging_face, is_hugging_face_config
from keras_gemma2.config import NAMED_SIZES, Gemma2Config

EMBEDDED = "gemma2_mini_en"
EMBEDDED_FOLDER = os.path.join(os.path.dirname(__file__), EMBEDDED)

# Names of keras-hub's Gemma 2 presets, by the size whose architecture they share.
PUBLISHED: dict[str, str] = {
    "gemma2_2b_en": "gemma2_2b",
    "gemma2_instruct_2b_en": "gemma2_2b",
    "gemma2_9b_en": "gemma2_9b",
    "gemma2_instruct_9b_en": "gemma2_9b",
    "gemma2_27b_en": "gemma2_27b",
    "gemma2_instruct_27b_en": "gemma2_27b",
    "shieldgemma_2b_en": "gemma2_2b",
    "shieldgemma_9b_en": "gemma2_9b",
    "shieldgemma_27b_en": "gemma2_27b",
}

HUGGING_FACE = "hugging_face"
KERAS = "keras"
SIZE_ONLY = "size_only"

OUR_BACKBONE = "keras_gemma2>Gemma2Backbone"


@dataclasses.dataclass(frozen=True)
class Source:
    """What a preset resolves to.

    Args:
        name: as the user gave it.
        kind: `HUGGING_FACE` or `KERAS` for a folder in that layout; `SIZE_ONLY` for an architecture without weights here.
        config: the architecture.
        folder: local path, or None.
        values: the parsed config.json, or an empty dict.
    """

    name: str
    kind: str
    config: Gemma2Config
    folder: str | None = None
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


def preset_names() -> list[str]:
    """The names `from_preset` knows, the embedded one first."""
    return [EMBEDDED, *PUBLISHED]


def resolve(preset: str | os.PathLike[str]) -> Source:
    """Finds out what a name or a folder stands for, by the folder's content.

    Raises:
        ValueError: for an unknown name (near names are listed), or a folder that holds no Gemma 2.
        TypeError: for something that is neither a string nor a path.
    """
    if not isinstance(preset, (str, os.PathLike)):
        raise TypeError(f"`preset` must be a name or a folder, as a string or a path. Received: {preset!r}.")
    name = os.fspath(preset)
    if name == EMBEDDED:
        return _resolve_folder(name, EMBEDDED_FOLDER)
    if name in PUBLISHED:
        return Source(name, SIZE_ONLY, NAMED_SIZES[PUBLISHED[name]])
    if os.path.isdir(name):
        return _resolve_folder(name, name)
    near = difflib.get_close_matches(name, preset_names(), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"Unknown preset {name!r}: no built-in name and no folder. {hint}Built-in names: {preset_names()}."
    )


def _resolve_folder(name: str, folder: str) -> Source:
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise ValueError(
            f"The folder {folder!r} is no preset: it has no config.json. It holds: {sorted(os.listdir(folder))[:10]}."
        )
    with open(path, encoding="utf-8") as file:
        try:
            values = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object. Received: {type(values).__name__}.")
    if is_hugging_face_config(values):
        return Source(name, HUGGING_FACE, config_from_hugging_face(values), folder, values)
    if values.get("registered_name") == OUR_BACKBONE:
        known = {key: value for key, value in values["config"].items() if key in Gemma2Config.field_names()}
        return Source(name, KERAS, Gemma2Config.from_dict(known), folder, values)
    what = values.get("registered_name") or values.get("class_name") or f"keys {sorted(values)[:8]}"
    raise ValueError(f"{path} describes no Gemma 2 that this version reads. Found: {what}.")
