"""keras-hub samplers that bring a loop of their own, such as beam search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_gemma2.generation.requests import Request
from keras_gemma2.generation.runner import Runner


def has_own_loop(sampler: Any) -> bool:
    """Whether a sampler does more than choose the next token of each row."""
    return not isinstance(sampler, list) and type(sampler).__call__ is not keras_hub.samplers.Sampler.__call__


def generate_with_own_loop(runner: Runner, request: Request) -> list[list[int]]:
    """Runs such a sampler by keras-hub's protocol: all rows step together from the shortest prompt on.

    Returns:
        The new ids of each row, a stop token that ended it included.
    """
    sampler, prompts, max_length = request.sampler, request.prompts, max(request.limits)
    _refuse(request)
    if all(len(prompt) >= max_length for prompt in prompts):
        return [[] for _ in prompts]
    shortest = min(len(prompt) for prompt in prompts)
    caches = runner.new_caches(len(prompts), max_length)
    caches, _ = runner.prefill(caches, [prompt[:shortest] for prompt in prompts])
    token_ids = np.zeros((len(prompts), max_length), "int32")
    mask = np.zeros((len(prompts), max_length), "bool")
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True

    def next_token(prompt: Any, cache: Any, index: Any) -> tuple[Any, Any, Any]:
        position = ops.cast(index, "int32") - 1
        last = ops.take(prompt, position, axis=1)
        positions = ops.broadcast_to(ops.reshape(position, (1,)), (ops.shape(prompt)[0],))
        logits, cache = runner.step_function(cache, last, positions)
        return logits, None, cache

    stop = list(request.stop_token_ids) or None
    output = sampler(next_token, ops.convert_to_tensor(token_ids), caches, shortest, ops.convert_to_tensor(mask), stop)
    rows = ops.convert_to_numpy(output)
    ends = zip(prompts, request.limits)
    return [_until_stop(rows[i, len(prompt) : limit].tolist(), request.stop_token_ids) for i, (prompt, limit) in enumerate(ends)]


def _refuse(request: Request) -> None:
    name = type(request.sampler).__name__
    if isinstance(request.sampler, keras_hub.samplers.ContrastiveSampler):
        raise ValueError(
            "`sampler` must not be a ContrastiveSampler: it needs the hidden states of the whole prompt, which Gemma 2's cached "
            "decoding does not keep. Use 'greedy', 'top_k', 'top_p', 'random' or 'beam'."
        )
    if request.stop_strings or request.prefix is not None:
        used = "stop_strings" if request.stop_strings else "prefix"
        raise ValueError(f"`{used}` does not go with {name}, which runs a loop of its own. Use keras_gemma2.Sampler.")


def _until_stop(token_ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for i, token_id in enumerate(token_ids):
        if token_id in stop_token_ids:
            return token_ids[: i + 1]
    return token_ids
