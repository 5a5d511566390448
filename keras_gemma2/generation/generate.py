"""Requests in, token ids out."""

from __future__ import annotations

from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.generation.decode import STEPS
from keras_gemma2.generation.decoding import Decoding, HostDecoding
from keras_gemma2.generation.own_loop import generate_with_own_loop, has_own_loop
from keras_gemma2.generation.requests import GREEDY, Request, tokens_before
from keras_gemma2.generation.runner import Runner
from keras_gemma2.generation.sampler import plan
from keras_gemma2.generation.text_stream import TextStream

STEPS_BETWEEN_CHECKS = 8  # for stop strings, which are looked for on the host


def begin(runner: Runner, request: Request) -> Decoding:
    """Runs the prompts of a request; what it returns goes on from there."""
    before = tokens_before(request.prefix)
    rows = [[*before, *prompt] for prompt in request.prompts]
    caches, hidden = [], None
    if any(len(row) < limit for row, limit in zip(rows, request.limits)):
        with backend.no_gradients():
            caches, hidden = _prefilled(runner, request, max(request.limits))
    ours = request.sampler if isinstance(request.sampler, list) else [GREEDY] * len(rows)
    chosen = plan(ours, runner.backbone.config.vocabulary_size)
    arguments = (runner, caches, hidden, rows, request.limits, chosen, request.seeds, [request.stop_token_ids] * len(rows))
    if not isinstance(request.sampler, list):
        return HostDecoding(*arguments, choose=_keras_hub_choice(request.sampler))
    return HostDecoding(*arguments) if chosen.on_host else Decoding(*arguments)


def _prefilled(runner: Runner, request: Request, room: int) -> tuple[Any, Any]:
    batch, prefix = len(request.prompts), request.prefix
    if prefix is None:
        return runner.prefill(runner.new_caches(batch, room), request.prompts)
    caches = runner.copied_caches(prefix.caches, len(prefix), batch, room)
    return runner.prefill(caches, request.prompts, [len(prefix)] * batch)


def _keras_hub_choice(sampler: keras_hub.samplers.Sampler) -> Any:
    """Chooses with a keras-hub sampler, which looks at all rows at once and draws from a generator of its own."""

    def choose(logits: Any, decoding: HostDecoding) -> np.ndarray:
        return ops.convert_to_numpy(sampler.get_next_token(sampler.compute_probabilities(logits)))

    return choose


def check_streams(request: Request) -> None:
    """Raises a ValueError if the sampler decides nothing before the end."""
    if has_own_loop(request.sampler):
        raise ValueError(
            f"`sampler` must choose one token at a time to stream. Received: {type(request.sampler).__name__}, which decides at the end. "
            "Use `generate`, or another sampler."
        )


def run(runner: Runner, request: Request, tokenizer: Any) -> tuple[list[list[int]], list[list[float]], list[str] | None]:
    """Continues each prompt of a request until a stop or its limit.

    Args:
        runner: of the model.
        request: what to do.
        tokenizer: for stop strings; None where there are none.

    Returns:
        The new ids of each row (a stop token that ended it included), their log-probabilities, and, if there are stop strings, the new
        texts, cut before them.
    """
    if has_own_loop(request.sampler):
        with backend.no_gradients():
            rows = generate_with_own_loop(runner, request)
        return rows, [[] for _ in rows], None
    decoding = begin(runner, request)
    texts = RowTexts(tokenizer, request) if request.stop_strings else None
    new: list[list[int]] = [[] for _ in request.prompts]
    while decoding.open_rows.any():
        with backend.no_gradients():
            chosen = decoding.advance(STEPS_BETWEEN_CHECKS if texts else STEPS)
        for row, tokens in enumerate(chosen):
            kept = texts.push(decoding, row, tokens)[1] if texts else len(tokens)
            new[row] += tokens[:kept]
    logprobs = [of_row[: len(ids)] for of_row, ids in zip(decoding.logprobs, new)]
    return new, logprobs, texts.texts if texts else None


class RowTexts:
    """The text of each row as its tokens come, and the end of a row at a stop string.

    Args:
        tokenizer: the model's.
        request: what is done.

    Attributes:
        texts: of each row, what is decided so far.
    """

    def __init__(self, tokenizer: Any, request: Request) -> None:
        # The text is that of the preprocessor's generate_postprocess.
        dropped = tokenizer.special_token_ids, (tokenizer.end_of_turn_token_id,)
        self._streams = [TextStream(tokenizer, request.stop_strings, *dropped) for _ in request.prompts]
        self.texts = ["" for _ in request.prompts]

    def push(self, decoding: Decoding, row: int, tokens: list[int]) -> tuple[str, int]:
        """Takes a row's new tokens; closes the row where a stop string comes up.

        Returns:
            The text that is decided by them, and how many of the tokens stand before the row's end.
        """
        if not tokens:
            return "", 0
        stream, piece, count = self._streams[row], "", 0
        while count < len(tokens) and not stream.stopped:
            piece += stream.push([tokens[count]])
            count += 1
        if stream.stopped:
            decoding.close(row)
        elif not decoding.open_rows[row]:
            piece += stream.finish()
        self.texts[row] += piece
        return piece, count
