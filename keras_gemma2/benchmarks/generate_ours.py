"""This package for `benchmarks generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_gemma2.benchmarks.generate_keras_hub import keras_bytes, padded


class Ours:
    """A `Gemma2CausalLM` with the weights of a Hugging Face folder.

    Args:
        folder: with the model.
        dtype: of the weights; "int8" and "int4" quantize while loading.
        jit_compile: whether PyTorch compiles decoding steps with `torch.compile`.
    """

    def __init__(self, folder: str, dtype: str, jit_compile: bool = False) -> None:
        from keras_gemma2 import Gemma2CausalLM, Sampler

        quantized = {"quantize": dtype} if dtype.startswith("int") else {"dtype": dtype}
        self._lm = Gemma2CausalLM.from_preset(folder, preprocessor=None, **quantized)
        if jit_compile:
            self._lm.jit_compile = True
        self._greedy = Sampler(temperature=0)
        self.weight_bytes = sum(map(keras_bytes, self._lm.backbone.weights))

    def generate(self, prompts: list[list[int]], new_tokens: int, room: int | None = None, stop: int | None = None) -> list[int]:
        """See `Engine`."""
        token_ids, mask = padded(prompts)
        outputs = self._lm.generate(
            {"token_ids": token_ids, "padding_mask": mask},
            max_length=room,
            max_new_tokens=None if room else new_tokens,
            stop_token_ids=None if stop is None else (stop,),
            sampler=self._greedy,
        )
        return np.asarray(outputs["token_ids"])[np.arange(len(prompts)), mask.sum(1)].tolist()

    def decode_runs(self, prompts: list[list[int]], few: int, many: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """See `Engine`."""
        return lambda: self.generate(prompts, few), lambda: self.generate(prompts, many)

    def cache_bytes(self, length: int) -> tuple[int, int]:
        """Bytes of the cache that a row of `length` tokens gets, and of one number in it."""
        arrays = [array for pair in self._lm.make_generate_function().new_caches(1, length) for array in pair]
        return sum(map(keras_bytes, arrays)), keras_bytes(arrays[0][:1, :1, :1, :1])
