"""Token ids in, token ids out: sampling with keras-hub's samplers on top of the decode loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.generation.decode import generate_loop
from keras_gemma2.generation.runner import Runner


def generate_tokens(
    runner: Runner,
    sampler: keras_hub.samplers.Sampler,
    prompts: list[list[int]],
    max_lengths: Sequence[int],
    stop_token_ids: Sequence[int],
) -> list[list[int]]:
    """Continues each prompt until a stop token or its length.

    Args:
        runner: of the model.
        sampler: any keras-hub sampler. One that defines only `get_next_token` chooses row by row inside our loop; one with
            a loop of its own (beam search) runs that.
        prompts: token ids of each row, at least one each.
        max_lengths: tokens each row may have at the end, prompt included.
        stop_token_ids: ids that end a row.

    Returns:
        The new ids of each row, a stop token that ended it included.
    """
    lengths, limits = np.array([len(p) for p in prompts], "int32"), np.array(max_lengths, "int32")
    if (lengths >= limits).all():
        return [[] for _ in prompts]
    with backend.no_gradients():
        if type(sampler).__call__ is not keras_hub.samplers.Sampler.__call__:
            return _run_own_loop(runner, sampler, prompts, int(limits.max()), stop_token_ids)
        logits, caches = runner.prefill(prompts, int(limits.max()))

        def choose(logits: Any) -> np.ndarray:
            return ops.convert_to_numpy(sampler.get_next_token(sampler.compute_probabilities(logits)))

        return generate_loop(logits, caches, runner.step, choose, lengths, limits, stop_token_ids)


def _run_own_loop(
    runner: Runner, sampler: Any, prompts: list[list[int]], max_length: int, stop_token_ids: Sequence[int]
) -> list[list[int]]:
    """Runs a sampler that brings its own loop, by keras-hub's protocol: all rows step together from the shortest prompt on."""
    if isinstance(sampler, keras_hub.samplers.ContrastiveSampler):
        raise ValueError(
            "`sampler` must not be a ContrastiveSampler: it needs the hidden states of the whole prompt, which Gemma 2's cached "
            "decoding does not keep. Use 'greedy', 'top_k', 'top_p', 'random' or 'beam'."
        )
    shortest = min(len(prompt) for prompt in prompts)
    _, caches = runner.prefill([prompt[:shortest] for prompt in prompts], max_length)
    token_ids = np.zeros((len(prompts), max_length), "int32")
    mask = np.zeros((len(prompts), max_length), "bool")
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True

    def next_token(prompt: Any, cache: Any, index: Any) -> tuple[Any, Any, Any]:
        position = ops.cast(index, "int32") - 1
        last = ops.take(prompt, position, axis=1)
        positions = ops.broadcast_to(ops.reshape(position, (1,)), (ops.shape(prompt)[0],))
        logits, cache = runner._step(cache, last, positions)
        return logits, None, cache

    stop = list(stop_token_ids) or None
    output = sampler(next_token, ops.convert_to_tensor(token_ids), caches, shortest, ops.convert_to_tensor(mask), stop)
    rows = ops.convert_to_numpy(output)
    return [_until_stop(rows[i, len(prompt) :].tolist(), stop_token_ids) for i, prompt in enumerate(prompts)]


def _until_stop(token_ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for i, token_id in enumerate(token_ids):
        if token_id in stop_token_ids:
            return token_ids[: i + 1]
    return token_ids
