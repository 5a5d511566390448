"""Which format a folder or file is in. Imports nothing heavy, so that `info` answers at once."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

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
    read_json,
    refuse_lfs_pointer,
    shown,
    unfinished_download,
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

ADAPTER_FILE = "adapter_config.json"  # https://huggingface.co/docs/peft/developer_guides/checkpoint
_WEIGHTS = (".safetensors", ".weights.h5", ".bin", ".ckpt", ".gguf")
_TRAINING_STATE = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_SINGLE_FILES = (".gguf", ".ckpt", ".pt", ".pth", ".bin")
_PARTS_OF_FOLDERS = (".safetensors", ".json", ".h5", ".model", ".spm")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".keras")


def find_source(name: str, path: str) -> Source:
    """Finds out by its content what a local folder or file is.

    Args:
        name: as the user gave it, for messages.
        path: the folder or file.

    Raises:
        CheckpointError: if it is no Gemma 2 that this package reads; says what it is instead.
    """
    _refuse_adapter(path)
    for module in READERS.values():
        source = importlib.import_module(module).read_source(name, path)
        if source is not None:
            return source
    if os.path.isfile(path):
        raise _unreadable_file(path)
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
        f"Pass the folder with the model's files in it, or download them.{unfinished_download(path)}"
    )


def _unreadable_file(path: str) -> CheckpointError:
    name = os.path.basename(path).lower()
    if name.endswith(_PARTS_OF_FOLDERS):
        refuse_lfs_pointer(path)
        folder = os.path.dirname(path) or "."
        return CheckpointError(f"The file {path!r} is one of several that make a checkpoint: pass its folder, {folder!r}.")
    what = f"The file {path!r} is no checkpoint that this package reads."
    if name.endswith(_ARCHIVES):
        return CheckpointError(f"{what} Unpack an archive first and pass its folder.")
    return CheckpointError(f"{what} Those are folders, and single files in {', '.join(_SINGLE_FILES)}.")


def _refuse_adapter(folder: str) -> None:
    """A folder with an adapter and no weights of a whole model, whatever else is in it."""
    path = find_file(folder, ADAPTER_FILE)
    if path is None:
        return
    try:
        names = os.listdir(folder)
    except OSError:
        return  # the readers say why
    if not has_whole_model(names):
        base = read_json(path).get("base_model_name_or_path")
        raise CheckpointError(
            f"The folder {folder!r} is a LoRA adapter of {shown(base)}, not a model: load the base model, and then this "
            "folder with its `load_adapter`."
        )


def has_whole_model(names: Iterable[str]) -> bool:
    """Whether files beside an adapter's hold a model's weights, merged ones perhaps."""
    own = [name for name in names if not name.startswith("adapter_model")]
    return any(name.endswith(_WEIGHTS) and name not in _TRAINING_STATE for name in own)


def vocabulary(source: Source) -> bytes | None:
    """The serialized SentencePiece model of a checkpoint, or None."""
    return None if source.path is None else importlib.import_module(READERS[source.kind]).vocabulary(source)
