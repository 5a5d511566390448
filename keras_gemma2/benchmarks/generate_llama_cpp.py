"""llama.cpp for `benchmarks generate`, through the package cyllama, on all CPU cores.

The GGUF file is written once, from the Hugging Face folder, beside it. The next token is not chosen from the logits, only
computed with them, as llama.cpp's own `llama-bench` does: copying them to Python would be timed too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from keras_gemma2.benchmarks.folder_to_gguf import gguf_path

ANY_TOKEN = 1000
LARGEST_BATCH = 2048  # tokens of one call, llama.cpp's own default


class LlamaCpp:
    """A model in llama.cpp, on the CPU.

    Args:
        folder: with the model; the GGUF file is beside it.
        dtype: by our names.
    """

    def __init__(self, folder: str, dtype: str) -> None:
        from cyllama.llama import llama_cpp

        self._library = llama_cpp
        llama_cpp.disable_logging()
        parameters = llama_cpp.LlamaModelParams()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.LlamaModel(gguf_path(folder, dtype), parameters)
        self.weight_bytes = self._model.size
        self._shape, self._context = (0, 0), None

    def generate(self, prompts: list[list[int]], new_tokens: int, room: int | None = None, stop: int | None = None) -> list[int]:
        """See `Engine`; `stop` comes at once: that is what the first token costs."""
        longest = max(map(len, prompts))
        context = self._of_shape(len(prompts), room or longest + new_tokens)
        pieces = [
            (token, position, row, position == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(pieces), LARGEST_BATCH):
            self._run(context, pieces[start : start + LARGEST_BATCH], len(prompts))
        for step in range(0 if stop is not None else new_tokens - 1):
            self._run(context, [(ANY_TOKEN, len(p) + step, row, True) for row, p in enumerate(prompts)], len(prompts))
        context.synchronize()
        return [ANY_TOKEN] * len(prompts)

    def decode_runs(self, prompts: list[list[int]], few: int, many: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """See `Engine`."""
        room = max(map(len, prompts)) + many
        return lambda: self.generate(prompts, few, room), lambda: self.generate(prompts, many, room)

    def _run(self, context: Any, pieces: list[tuple[int, int, int, bool]], rows: int) -> None:
        batch = self._library.LlamaBatch(n_tokens=len(pieces), embd=0, n_seq_max=rows)
        for token, position, row, logits in pieces:
            batch.add(token, position, [row], logits)
        context.decode(batch)

    def _of_shape(self, rows: int, length: int) -> Any:
        """An empty context with room for rows of a length."""
        if self._shape != (rows, length):
            options = self._library.LlamaContextParams()
            options.n_ctx, options.n_seq_max, options.n_batch = rows * length, rows, LARGEST_BATCH
            options.n_threads = options.n_threads_batch = os.cpu_count()
            self._shape, self._context = (rows, length), self._library.LlamaContext(self._model, options)
        self._context.kv_cache_clear(False)
        return self._context
