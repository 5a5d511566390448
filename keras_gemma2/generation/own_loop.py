"""keras-hub samplers that bring a loop of their own, such as beam search."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_gemma2.generation.decode import next_logits
from keras_gemma2.generation.decoding import not_numbers
from keras_gemma2.generation.requests import Request
from keras_gemma2.generation.runner import Runner

NOT_YET = -1  # no token, so that none stops a row before it is there


def has_own_loop(sampler: Any) -> bool:
    """Whether a sampler does more than choose the next token of each row."""
    return not isinstance(sampler, list) and type(sampler).__call__ is not keras_hub.samplers.Sampler.__call__


def generate_with_own_loop(runner: Runner, request: Request) -> list[list[int]]:
    """Runs such a sampler by keras-hub's protocol: all rows step together from the shortest prompt on.

    Returns:
        The new ids of each row, a stop token that ended it included.

    Raises:
        FloatingPointError: if the logits after the prompts are not numbers; later ones are not looked at.
    """
    sampler, prompts, max_length = request.sampler, request.prompts, max(request.limits)
    _refuse(request)
    if all(len(prompt) >= max_length for prompt in prompts):
        return [[] for _ in prompts]
    shortest = min(len(prompt) for prompt in prompts)
    caches = runner.new_caches(len(prompts), max_length)
    caches, hidden = runner.prefill(caches, [prompt[:shortest] for prompt in prompts])
    _check_numbers(ops.convert_to_numpy(ops.sum(runner.logits(hidden), axis=-1)), shortest)
    token_ids = np.full((len(prompts), max_length), NOT_YET, "int32")
    mask = np.zeros((len(prompts), max_length), "bool")
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True

    if type(sampler) is keras_hub.samplers.BeamSampler:  # a copy is kept: the caller may change this one
        sampler = type(sampler).from_config(sampler.get_config())
    loop = _Loop(json.dumps(sampler.get_config(), default=repr), request.stop_token_ids, sampler)
    arguments = (caches, *map(ops.convert_to_tensor, (token_ids, mask, np.int32(shortest))))
    if type(sampler) is keras_hub.samplers.BeamSampler:
        output = runner.compiled(_run_loop, loop)((), *arguments)
    else:  # may draw, or do whatever else does not compile
        output = _run_loop(runner.backbone, loop, (), *arguments)
    rows = ops.convert_to_numpy(output)
    ends = zip(prompts, request.limits)
    return [_until_stop(rows[i, len(prompt) : limit].tolist(), request.stop_token_ids) for i, (prompt, limit) in enumerate(ends)]


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What is compiled once: equal for samplers of the same settings."""

    config: str
    stop_token_ids: tuple[int, ...]
    sampler: Any = dataclasses.field(compare=False)


def _run_loop(backbone: Any, loop: _Loop, unused: tuple[()], caches: Any, token_ids: Any, mask: Any, index: Any) -> Any:
    """A sampler's own loop over `token_ids [B, max_length]`, of which `mask` tells the prompts, from column `index` on."""

    def next_token(prompt: Any, cache: Any, index: Any) -> tuple[Any, Any, Any]:
        position = ops.cast(index, "int32") - 1
        last = ops.take(prompt, position, axis=1)
        positions = ops.broadcast_to(ops.reshape(position, (1,)), (ops.shape(prompt)[0],))
        logits, cache = next_logits(backbone, cache, last, positions)
        return logits, None, cache

    return loop.sampler(next_token, token_ids, caches, index, mask, list(loop.stop_token_ids) or None)


def _check_numbers(sums: np.ndarray, count: int) -> None:
    """Raises a FloatingPointError where the first logits, summed, are no numbers: within the sampler's loop nobody looks."""
    broken = np.flatnonzero(~np.isfinite(sums))
    if broken.size:
        raise not_numbers(int(broken[0]), count)


def _refuse(request: Request) -> None:
    name = type(request.sampler).__name__
    if getattr(request.sampler, "return_all_beams", False):
        raise ValueError(f"`sampler` must not be a {name} with return_all_beams=True: one text a prompt is given back.")
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
        if token_id == NOT_YET:
            return token_ids[:i]
        if token_id in stop_token_ids:
            return token_ids[: i + 1]
    return token_ids
