"""Addresses of model hubs: `kaggle://`, `hf://`, `modelscope://`; the files come through each hub's own library and cache."""

from __future__ import annotations

import importlib

CONFIG = "config"
TOKENIZER = "tokenizer"
WEIGHTS = "weights"
# Each module has `fetch(where, need)`, and imports the hub's library only when files are asked for.
_MODULES = {
    "kaggle://": "keras_gemma2.presets.hub_kaggle",
    "hf://": "keras_gemma2.presets.hub_hugging_face",
    "modelscope://": "keras_gemma2.presets.hub_modelscope",
}
SCHEMES = tuple(_MODULES)


def is_address(where: str) -> bool:
    """Whether this is a hub's address."""
    return where.startswith(SCHEMES)


def fetch(where: str, need: str) -> str:
    """Downloads what is needed of a model, unless it is in the hub's cache, and returns its local folder.

    Args:
        where: `kaggle://owner/model/framework/variation[/version]`, `hf://owner/name[@revision][/file.gguf]` or
            `modelscope://owner/name[@revision][/file.gguf]`.
        need: `CONFIG` (the architecture), `TOKENIZER` (that and the tokenizer's files) or `WEIGHTS` (all that loading
            reads). Formats without a config.json (GGUF, gemma_pytorch, Flax) hold everything in their weights, and are
            fetched whole for each of the three.

    Returns:
        The folder; for a GGUF, its path.

    Raises:
        CheckpointError: for a malformed address, or a model without files that this package reads.
        HubError: if the hub gives no files; the message names the step to take, `__cause__` is the library's exception.

    Example:
        >>> folder = fetch("hf://google/gemma-2-2b", CONFIG)
    """
    scheme = next(scheme for scheme in SCHEMES if where.startswith(scheme))
    return importlib.import_module(_MODULES[scheme]).fetch(where, need)
