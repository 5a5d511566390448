"""keras-hub's Gemma for `benchmarks generate`, on the running Keras backend.

It prefills the whole length it is given and decodes from the shortest prompt's end on, for all rows, to that length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


class KerasHub:
    """A `keras_hub.models.GemmaCausalLM` with the weights of a Hugging Face folder.

    Args:
        folder: with the model.
        dtype: of the weights and of what is computed.
    """

    def __init__(self, folder: str, dtype: str) -> None:
        import keras_hub

        backbone = keras_hub.models.GemmaBackbone.from_preset(folder, dtype=dtype)
        self._lm = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
        self._lm.compile(sampler="greedy")
        self.weight_bytes = sum(map(keras_bytes, backbone.weights))

    def generate(self, prompts: list[list[int]], new_tokens: int, room: int | None = None, stop: int | None = None) -> list[int]:
        """See `Engine`. Rows shorter than the longest get more than `new_tokens`: it has no other way."""
        lengths = np.array([len(prompt) for prompt in prompts])
        token_ids, mask = padded(prompts, room or int(lengths.max()) + new_tokens)
        inputs = {"token_ids": token_ids, "padding_mask": mask}
        outputs = self._lm.generate(inputs, stop_token_ids=None if stop is None else (stop,))
        return np.asarray(outputs["token_ids"])[np.arange(len(prompts)), lengths].tolist()

    def decode_runs(self, prompts: list[list[int]], few: int, many: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """See `Engine`. Of one length, so that what is prefilled is the same: the shorter run has the longer prompts."""
        longer = [prompt + prompt[: many - few] for prompt in prompts]
        return lambda: self.generate(longer, few), lambda: self.generate(prompts, many)


def padded(prompts: list[list[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and mask bool, each `[B, length]`, padded on the right; `length` is the longest prompt's by default."""
    length = length or max(map(len, prompts))
    token_ids, mask = np.zeros((len(prompts), length), "int32"), np.zeros((len(prompts), length), "bool")
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    return token_ids, mask


def keras_bytes(tensor: Any) -> int:
    """Bytes of a variable or tensor of Keras."""
    import keras
    import ml_dtypes

    name = keras.backend.standardize_dtype(tensor.dtype)
    return math.prod(tensor.shape) * np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name).itemsize
