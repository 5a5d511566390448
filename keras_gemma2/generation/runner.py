"""The compiled prefill and decode step of one model, kept from call to call."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.generation.decode import Caches, decode_step, prefill


def bucket(length: int) -> int:
    """The padded length that a length is compiled for: a power of two up to 256, then a multiple of 256.

    Example:
        >>> bucket(5), bucket(17), bucket(300)
        (16, 32, 512)
    """
    if length > 256:
        return -(-length // 256) * 256
    return max(16, 1 << (length - 1).bit_length())


class Runner:
    """Compiles what generation runs, once for each bucket of shapes.

    Args:
        backbone: a `Gemma2Backbone`. Its variables are read at each call, so training in between is seen.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self._prefills: dict[int, Any] = {}
        self.step = backend.compile_function(self._step, backbone.variables)

    def prefill(self, prompts: list[list[int]], max_length: int) -> tuple[Any, Caches]:
        """Runs prompts of token ids; returns the logits `[B, V]` that choose each row's first new token, and the caches.

        Args:
            prompts: ids of each row, at least one each.
            max_length: tokens, prompt included, that the caches must have room for.
        """
        lengths = np.array([len(prompt) for prompt in prompts], "int32")
        token_ids = np.zeros((len(prompts), bucket(int(lengths.max()))), "int32")
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = prompt
        size = bucket(max_length)
        if size not in self._prefills:
            self._prefills[size] = backend.compile_function(self._prefill_for(size), self.backbone.variables)
        return self._prefills[size]((), ops.convert_to_tensor(token_ids), ops.convert_to_tensor(lengths))

    def _prefill_for(self, size: int) -> Any:
        def run(unused: tuple[()], token_ids: Any, lengths: Any) -> tuple[Any, Caches]:
            hidden, caches = prefill(self.backbone, token_ids, lengths, size)
            return self._logits(hidden), caches

        return run

    def _step(self, caches: Caches, token_ids: Any, positions: Any) -> tuple[Any, Caches]:
        hidden, caches = decode_step(self.backbone, caches, token_ids, positions)
        return self._logits(hidden), caches

    def _logits(self, hidden: Any) -> Any:
        return self.backbone.token_embedding(hidden, reverse=True)
