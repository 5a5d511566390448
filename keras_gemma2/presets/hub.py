"""Addresses of model hubs: `kaggle://`, `hf://`, `modelscope://`; the files come through each hub's own library."""

from __future__ import annotations

CONFIG = "config"
TOKENIZER = "tokenizer"
WEIGHTS = "weights"
SCHEMES = ("kaggle://", "hf://", "modelscope://")


def is_address(where: str) -> bool:
    """Whether this is a hub's address."""
    return where.startswith(SCHEMES)


def fetch(where: str, need: str) -> str:
    """Downloads what is needed of a model, unless it is in the hub's cache, and returns its local folder."""
    raise NotImplementedError
