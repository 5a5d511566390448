"""Which format a folder or file is in. Imports nothing heavy, so that `info` answers at once."""

from __future__ import annotations

import importlib
import os

from keras_gemma2.checkpoints.source import (
    CONFIG_FILE,
    FLAX,
    GEMMA_PYTORCH,
    GGUF,
    HUGGING_FACE,
    KERAS,
    KERAS_HUB,
    Source,
    find_file,
)
from keras_gemma2.errors import CheckpointError

# The modules that read each kind, in the order in which they are asked. Each has
# `read_source(name, path) -> Source | None`, None for what is not of its kind;
# `open_tensors(source, config, stack) -> (tensors, cells)`: lazy tensors by foreign name, and the table's cells for them;
# `vocabulary(source) -> bytes | None`: the SentencePiece model.
# The first two stand before the others since their weights may lie beside a config.json of another format; they leave folders
# with safetensors or h5 weights to the others.
READERS = {
    GEMMA_PYTORCH: "keras_gemma2.checkpoints.gemma_pytorch",
    FLAX: "keras_gemma2.checkpoints.flax",
    HUGGING_FACE: "keras_gemma2.checkpoints.hf",
    KERAS: "keras_gemma2.checkpoints.keras_preset",
    KERAS_HUB: "keras_gemma2.checkpoints.keras_hub",
    GGUF: "keras_gemma2.checkpoints.gguf",
}


def find_source(name: str, path: str) -> Source:
    """Finds out by its content what a local folder or file is.

    Args:
        name: as the user gave it, for messages.
        path: the folder or file.

    Raises:
        CheckpointError: if it is no Gemma 2 that this package reads; says what it is instead.
    """
    for module in READERS.values():
        source = importlib.import_module(module).read_source(name, path)
        if source is not None:
            return source
    if os.path.isfile(path):
        raise CheckpointError(
            f"The file {path!r} is no checkpoint that this package reads: those are .gguf and .ckpt files, and folders. "
            "Unpack an archive first and pass its folder."
        )
    try:
        held = sorted(os.listdir(path))[:10]
    except OSError as error:
        raise CheckpointError(f"The folder {path!r} cannot be read: {error}.") from error
    if find_file(path, CONFIG_FILE):
        raise CheckpointError(
            f"The {CONFIG_FILE} in the folder {path!r} is none of a model that this package reads: it has neither a 'model_type' "
            "(Hugging Face) nor the 'registered_name' of a Gemma 2 (Keras). Download it again."
        )
    raise CheckpointError(
        f"The folder {path!r} is no preset: it has no {CONFIG_FILE} and no other checkpoint. It holds: {held}. "
        "Pass the folder with the model's files in it, or download them."
    )


def vocabulary(source: Source) -> bytes | None:
    """The serialized SentencePiece model of a checkpoint, or None."""
    return None if source.path is None else importlib.import_module(READERS[source.kind]).vocabulary(source)
