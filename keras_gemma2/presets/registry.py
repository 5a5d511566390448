"""The built-in preset names, and what a name, a hub's address or a folder stands for. Loads no model."""

from __future__ import annotations

import difflib
import os

from keras_gemma2.checkpoints.formats import find_source
from keras_gemma2.checkpoints.source import SIZE_ONLY, Source
from keras_gemma2.config import NAMED_SIZES
from keras_gemma2.errors import CheckpointError, MissingFileError
from keras_gemma2.presets import hub

EMBEDDED = "gemma2_mini_en"
EMBEDDED_FOLDER = os.path.join(os.path.dirname(__file__), EMBEDDED)

# Names of keras-hub's Gemma 2 presets: the size whose architecture they share, and where their files are.
PUBLISHED: dict[str, tuple[str, str]] = {
    "gemma2_2b_en": ("gemma2_2b", "kaggle://keras/gemma2/keras/gemma2_2b_en/2"),
    "gemma2_instruct_2b_en": ("gemma2_2b", "kaggle://keras/gemma2/keras/gemma2_instruct_2b_en/2"),
    "gemma2_9b_en": ("gemma2_9b", "kaggle://keras/gemma2/keras/gemma2_9b_en/4"),
    "gemma2_instruct_9b_en": ("gemma2_9b", "kaggle://keras/gemma2/keras/gemma2_instruct_9b_en/4"),
    "gemma2_27b_en": ("gemma2_27b", "kaggle://keras/gemma2/keras/gemma2_27b_en/3"),
    "gemma2_instruct_27b_en": ("gemma2_27b", "kaggle://keras/gemma2/keras/gemma2_instruct_27b_en/3"),
    "shieldgemma_2b_en": ("gemma2_2b", "kaggle://google/shieldgemma/keras/shieldgemma_2b_en/2"),
    "shieldgemma_9b_en": ("gemma2_9b", "kaggle://google/shieldgemma/keras/shieldgemma_9b_en/2"),
    "shieldgemma_27b_en": ("gemma2_27b", "kaggle://google/shieldgemma/keras/shieldgemma_27b_en/2"),
}


def preset_names() -> list[str]:
    """The names `from_preset` knows, the embedded one first."""
    return [EMBEDDED, *PUBLISHED]


def resolve(preset: str | os.PathLike[str], need: str = hub.CONFIG) -> Source:
    """Finds out what a name, a hub's address or a folder stands for, by its content.

    Args:
        preset: as `from_preset` takes it.
        need: `hub.CONFIG`, `hub.TOKENIZER` or `hub.WEIGHTS`: how much of it is downloaded where it is not on this machine.

    Raises:
        CheckpointError: for an unknown name (near names are listed), or a folder that holds no Gemma 2.
        HubError: if a hub does not give the files.
        TypeError: for something that is neither a string nor a path.
    """
    if not isinstance(preset, (str, os.PathLike)):
        raise TypeError(f"`preset` must be a name or a folder, as a string or a path. Received: {preset!r}.")
    name = os.fspath(preset)
    if name == EMBEDDED:
        return find_source(name, EMBEDDED_FOLDER)
    if name in PUBLISHED:
        size, address = PUBLISHED[name]
        if need == hub.CONFIG:
            return Source(name, SIZE_ONLY, NAMED_SIZES[size])
        return find_source(name, hub.fetch(address, need))
    if hub.is_address(name):
        return find_source(name, hub.fetch(name, need))
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return find_source(name, path)
    if os.sep in name or name.startswith("."):
        raise MissingFileError(f"There is no folder or file {path!r}, or this user may not see it. Check the path.")
    near = difflib.get_close_matches(name, preset_names(), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise CheckpointError(
        f"Unknown preset {name!r}: no built-in name, no folder or file, and no address such as 'hf://google/gemma-2-2b'. "
        f"{hint}Built-in names: {preset_names()}."
    )
