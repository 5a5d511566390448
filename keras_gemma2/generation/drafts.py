"""What proposes tokens for speculation: a smaller model, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma2.backbone import Gemma2Backbone
from keras_gemma2.cache import Cache
from keras_gemma2.generation.decode import CLOSED, following_logits
from keras_gemma2.generation.drawing import draw, most_likely, uniforms
from keras_gemma2.generation.filters import penalized
from keras_gemma2.generation.runner import Runner
from keras_gemma2.generation.sampler import Plan, Sampler, probabilities

PROMPT_LOOKUP = "prompt_lookup"
PROPOSED = 4  # tokens proposed at a time, at most: the shape that is compiled
LONGEST = 3  # tokens in a row that prompt lookup looks for
PROPOSING = 0  # the stream of draws that proposals are made with; speculative.py has its own


class Proposals(NamedTuple):
    """What a round tries.

    Args:
        tokens: int32 `[B, PROPOSED]`, numpy or a tensor; negative where a draft has no number for a token.
        counts: numpy int32 `[B]`, how many of them there are in each row.
        probabilities: float32 `[B, PROPOSED, V]`, what each was drawn from; None where they were not drawn.
    """

    tokens: Any
    counts: np.ndarray
    probabilities: Any


class PromptLookup:
    """Proposes what followed the last tokens of a row when they stood in it before.

    Of the row's last three, two or one tokens, the longest that occur earlier count, at their last place before the end; where what
    followed them reaches the end, it goes on with the proposal itself. An index that grows with the row makes a round's work linear
    in its new tokens.

    Source: A. Saxena, "Prompt lookup decoding", 2023; after Yang et al., arXiv 2304.04487.

    Args:
        rows: how many.
    """

    def __init__(self, rows: int) -> None:
        self._followers: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]  # n-gram -> where its follower stands
        self._indexed = [1] * rows  # followers from here on are not in the index yet

    def propose(self, rows: Sequence[Sequence[int]], most: np.ndarray, seeds: Sequence[int]) -> Proposals:
        """Up to `most` tokens for each row; `seeds` are not needed."""
        tokens, counts = np.zeros((len(rows), PROPOSED), "int32"), np.zeros(len(rows), "int32")
        for row, token_ids in enumerate(rows):
            if most[row] > 0:
                found = self._continuation(row, token_ids, int(most[row]))
                tokens[row, : len(found)], counts[row] = found, len(found)
        return Proposals(tokens, counts, None)

    def learn(self, accepted: np.ndarray) -> None:
        """Nothing to learn: a proposal costs nothing."""

    def _continuation(self, row: int, token_ids: Sequence[int], most: int) -> list[int]:
        followers, length = self._followers[row], len(token_ids)
        for place in range(self._indexed[row], length):
            for n in range(1, min(LONGEST, place) + 1):
                followers[tuple(token_ids[place - n : place])] = place
        self._indexed[row] = max(self._indexed[row], length)
        for n in range(min(LONGEST, length), 0, -1):
            place = followers.get(tuple(token_ids[length - n :]))
            if place is not None:
                period = length - place
                return [token_ids[place + i % period] for i in range(most)]
        return []


class DraftModel:
    """Proposes what a smaller model would write, chosen by the same samplers.

    A row for which all was accepted is proposed two tokens more the next time, any other one fewer; a row's own past alone decides.

    Args:
        runner: of the draft.
        plan: the rows' samplers.
        room: tokens that a row can have at the end.
    """

    def __init__(self, runner: Runner, plan: Plan, room: int) -> None:
        self._runner, self._plan, self._room = runner, plan, room
        self._arrays = {name: ops.convert_to_tensor(array) for name, array in plan.arrays.items()}
        self._caches: list[Cache] | None = None
        self._eager = np.full(len(plan.processors), PROPOSED)
        self._counts = np.zeros(len(plan.processors), "int32")

    def propose(self, rows: Sequence[Sequence[int]], most: np.ndarray, seeds: Sequence[int]) -> Proposals:
        """Up to `most` tokens for each row, of at least two tokens each where `most` is not 0."""
        if self._caches is None:
            self._prefill(rows)
        counts = self._counts = np.minimum(most, self._eager).astype("int32")
        lengths = np.array([len(row) for row in rows], "int32")
        # A token that was accepted last may not have run here: the last two run, which for the first of them changes nothing else.
        last = np.array([row[-2:] if count else (0, 0) for row, count in zip(rows, counts)], "int32")
        draws = uniforms(seeds, lengths[:, None] + np.arange(PROPOSED), PROPOSING)
        arguments = (last, np.maximum(lengths - 2, 0), counts, draws, np.int32(counts.max()))
        run = self._runner.compiled(propose, self._plan.key)
        self._caches, tokens, chances = run(self._caches, self._arrays, *map(ops.convert_to_tensor, arguments))
        return Proposals(tokens, counts, chances)

    def learn(self, accepted: np.ndarray) -> None:
        """Takes how many of each row's last proposals were accepted."""
        eager = np.where(accepted == self._counts, self._eager + 2, self._eager - 1)
        self._eager = np.where(self._counts > 0, np.clip(eager, 1, PROPOSED), self._eager)

    def _prefill(self, rows: Sequence[Sequence[int]]) -> None:
        caches = self._runner.new_caches(len(rows), self._room, PROPOSED)
        self._caches, _ = self._runner.prefill(caches, [row[:-1] for row in rows])


def propose(
    backbone: Any, key: Any, caches: list[Cache], arrays: Any, last: Any, starts: Any, counts: Any, draws: Any, steps: Any
) -> tuple[list[Cache], Any, Any]:
    """Continues rows by some tokens, in compiled code.

    Args:
        backbone: the draft's `Gemma2Backbone`.
        key, arrays: of the samplers' plan.
        caches: of the draft; may be overwritten.
        last: int32 `[B, 2]`, the last two tokens of each row.
        starts: int32 `[B]`, where the first of them stands.
        counts: int32 `[B]`, tokens to propose; nothing is stored for a row with none.
        draws: float32 `[B, PROPOSED]`, in [0, 1).
        steps: int32 scalar, the largest count.

    Returns:
        The caches, tokens int32 `[B, PROPOSED]`, and float32 `[B, PROPOSED, V]` what they were drawn from; None where all rows are
        greedy.
    """
    batch, column = last.shape[0], ops.arange(PROPOSED, dtype="int32")

    def choose(i: Any, logits: Any, chosen: Any, chances: Any) -> tuple[Any, Any, Any]:
        here = column == i
        if key.sampled:
            shares = probabilities(key, arrays, None, logits)
            chances = ops.where(here[None, :, None], shares[:, None], chances)
            tokens = draw(shares, ops.take(draws, i, axis=1))
        else:
            tokens = most_likely(penalized(key, arrays, None, logits))
        return tokens, ops.where(here[None], tokens[:, None], chosen), chances

    def run(caches: Any, token_ids: Any, starts: Any, counts: Any) -> tuple[Any, Any]:
        logits, caches = following_logits(backbone, caches, ops.maximum(token_ids, 0), starts, counts, last_only=True)
        return logits[:, 0], caches

    def step(i: Any, caches: Any, tokens: Any, chosen: Any, chances: Any) -> tuple:
        logits, caches = run(caches, tokens[:, None], starts + 1 + i, ops.cast(i < counts, "int32"))
        return i + 1, caches, *choose(i, logits, chosen, chances)

    size = backbone.config.vocabulary_size
    chances = ops.zeros((batch, PROPOSED, size) if key.sampled else (batch, 1, 1), "float32")
    logits, caches = run(caches, last, starts, ops.where(counts > 0, 2, 0))
    first = choose(ops.zeros((), "int32"), logits, ops.full((batch, PROPOSED), CLOSED, "int32"), chances)
    state = (ops.ones((), "int32"), caches, *first)
    _, caches, _, chosen, chances = ops.while_loop(lambda i, *_: i < steps, step, state)
    return caches, chosen, chances if key.sampled else None


# Checks -----------------------------------------------------------------------------------------------------------------


def check_draft(lm: Any, draft: Any, sampler: Any, limits: Sequence[int]) -> None:
    """Raises a ValueError unless the draft can propose tokens for this model, these samplers and these lengths.

    Args:
        lm: the model that decides.
        draft: a `Gemma2CausalLM`, "prompt_lookup", or None for no speculation.
        sampler: one of ours a row, or a keras-hub sampler.
        limits: tokens that each row may have.
    """
    if draft is None:
        return
    is_model = isinstance(getattr(draft, "backbone", None), Gemma2Backbone) and hasattr(draft, "make_generate_function")
    if not is_model and not (isinstance(draft, str) and draft == PROMPT_LOOKUP):
        shown = repr(draft) if isinstance(draft, str) else type(draft).__name__
        raise ValueError(f"`draft` must be a Gemma2CausalLM, 'prompt_lookup' or None. Received: {shown}.")
    _check_samplers(sampler)
    if is_model:
        _check_vocabulary(lm, draft)
        context = draft.backbone.config.max_sequence_length
        if max(limits) > context:
            raise ValueError(
                f"`draft` must have room for as many tokens as the model may write. Received: a draft with a context of {context} "
                f"tokens for rows of up to {max(limits)}. Lower `max_length` or `max_new_tokens`, or use draft='prompt_lookup'."
            )


def _check_samplers(sampler: Any) -> None:
    if not isinstance(sampler, list):
        raise ValueError(
            f"`sampler` must be a keras_gemma2.Sampler or 'greedy' with a `draft`. Received: {type(sampler).__name__}, which does "
            "not tell its probabilities."
        )
    for one in sampler:
        used = [name for name, neutral in _REFUSED.items() if getattr(one, name) != neutral]
        if used:
            raise ValueError(
                f"`sampler` must have no {' and no '.join(used)} with a `draft`, since each token would change what the next "
                f"proposals are judged by. Received: {one!r}. Leave it out, or the draft; logit_bias, temperature, top_k, top_p "
                "and min_p go with drafts."
            )


_REFUSED = {name: getattr(Sampler(), name) for name in ("repetition_penalty", "presence_penalty", "logits_processor")}


def _check_vocabulary(lm: Any, draft: Any) -> None:
    size, own = draft.backbone.config.vocabulary_size, lm.backbone.config.vocabulary_size
    if size != own:
        raise ValueError(
            f"`draft` must have the model's vocabulary. Received: a draft with {size} tokens for a model with {own}. Use a smaller "
            "model of the same family, or draft='prompt_lookup'."
        )
    if draft.preprocessor is None or lm.preprocessor is None:
        return
    theirs, ours = draft.preprocessor.tokenizer, lm.preprocessor.tokenizer
    if theirs.proto == ours.proto:
        return
    pieces = zip(theirs.get_vocabulary(), ours.get_vocabulary())
    other = next(((i, a, b) for i, (a, b) in enumerate(pieces) if a != b), None)
    if other is not None:
        raise ValueError(
            f"`draft` must have the model's vocabulary. Received: a draft whose token {other[0]} is {other[1]!r}, and "
            f"{other[2]!r} in the model. Use a model with the same tokenizer, or draft='prompt_lookup'."
        )
