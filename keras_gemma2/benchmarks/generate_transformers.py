"""transformers' Gemma 2 for `benchmarks generate`, on an accelerator where torch has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class Transformers:
    """A `Gemma2ForCausalLM` from a Hugging Face folder.

    Args:
        folder: with the model.
        dtype: of the weights and of what is computed.
        static: preallocate the cache, which makes transformers compile the decode step.
    """

    def __init__(self, folder: str, dtype: str, static: bool = False) -> None:
        import transformers

        cuda = transformers.utils.is_torch_cuda_available()
        model = transformers.Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda" if cuda else "cpu")
        model.generation_config.eos_token_id = None  # runs have the length that was asked for
        self._model, self._cache = model, {"cache_implementation": "static"} if static else {}
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    def generate(self, prompts: list[list[int]], new_tokens: int, room: int | None = None, stop: int | None = None) -> list[int]:
        """See `Engine`. Prompts are padded on the left; its cache grows, so that room costs nothing."""
        from transformers import BatchEncoding

        length = max(map(len, prompts))
        token_ids, mask = np.zeros((len(prompts), length), "int64"), np.zeros((len(prompts), length), "int64")
        for row, prompt in enumerate(prompts):
            token_ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
        inputs = BatchEncoding({"input_ids": token_ids, "attention_mask": mask}, tensor_type="pt").to(self._model.device)
        outputs = self._model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop, **self._cache)
        return outputs[:, length].tolist()

    def decode_runs(self, prompts: list[list[int]], few: int, many: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """See `Engine`."""
        return lambda: self.generate(prompts, few), lambda: self.generate(prompts, many)
