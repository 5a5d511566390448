"""Requests in, token ids out."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras_hub
import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.generation.decode import STEPS
from keras_gemma2.generation.decoding import Decoding, HostDecoding
from keras_gemma2.generation.drafts import PROMPT_LOOKUP, PROPOSED, DraftModel, PromptLookup
from keras_gemma2.generation.own_loop import generate_with_own_loop, has_own_loop
from keras_gemma2.generation.requests import GREEDY, Request, tokens_before
from keras_gemma2.generation.runner import Runner
from keras_gemma2.generation.sampler import Plan, plan
from keras_gemma2.generation.speculative import SpeculationStats, SpeculativeDecoding
from keras_gemma2.generation.text_stream import TextStream

STEPS_BETWEEN_CHECKS = 8  # for stop strings, which are looked for on the host


class Result(NamedTuple):
    """What a request came to.

    Args:
        token_ids: the new ids of each row, a stop token that ended it included.
        logprobs: their log-probabilities.
        texts: if there are stop strings, the new texts, cut before them.
        stats: if there is a draft, what it was good for.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    texts: list[str] | None
    stats: SpeculationStats | None


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
    if request.draft is not None:
        return SpeculativeDecoding(*arguments, draft=_proposer(request, chosen))
    return HostDecoding(*arguments) if chosen.on_host else Decoding(*arguments)


def _proposer(request: Request, chosen: Plan) -> DraftModel | PromptLookup:
    if request.draft == PROMPT_LOOKUP:
        return PromptLookup(len(request.prompts))
    return DraftModel(request.draft.make_generate_function(), chosen, max(request.limits))


def _prefilled(runner: Runner, request: Request, room: int) -> tuple[Any, Any]:
    batch, prefix, slack = len(request.prompts), request.prefix, 0 if request.draft is None else PROPOSED
    if prefix is None:
        return runner.prefill(runner.new_caches(batch, room, slack), request.prompts)
    caches = runner.copied_caches(prefix.caches, len(prefix), batch, room, slack)
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
            f"`sampler` must choose one token at a time to stream. Received: {type(request.sampler).__name__}, which decides at "
            "the end. Use `generate`, or another sampler."
        )


def check_has_logprobs(request: Request) -> None:
    """Raises a ValueError if the sampler runs a loop that tells no log-probabilities."""
    if has_own_loop(request.sampler):
        raise ValueError(
            f"`return_logprobs` does not go with {type(request.sampler).__name__}, which runs a loop of its own. Score what it "
            "returns with `score`, or use keras_gemma2.Sampler."
        )


def run(runner: Runner, request: Request, tokenizer: Any) -> Result:
    """Continues each prompt of a request until a stop or its limit.

    Args:
        runner: of the model.
        request: what to do.
        tokenizer: for stop strings; None where there are none.

    Returns:
        What came of it.
    """
    if has_own_loop(request.sampler):
        with backend.no_gradients():
            rows = generate_with_own_loop(runner, request)
        return Result(rows, [[] for _ in rows], None, None)
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
    return Result(new, logprobs, texts.texts if texts else None, stats_of(decoding))


def stats_of(decoding: Decoding) -> SpeculationStats | None:
    """What a draft was good for so far; None without one."""
    return decoding.stats if isinstance(decoding, SpeculativeDecoding) else None


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
