"""One row whose caches stay from answer to answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from keras_gemma2 import backend
from keras_gemma2.cache import Cache
from keras_gemma2.generation.decoding import Decoding, HostDecoding
from keras_gemma2.generation.requests import check_length, read_sampler, read_stop_token_ids
from keras_gemma2.generation.runner import cache_bucket
from keras_gemma2.generation.sampler import plan

ROOM = 1024  # tokens that the caches are made for at first; they grow by doubling


class Session:
    """A growing sequence of tokens: what has run is not run again.

    Args:
        lm: the model, whose weights must not change meanwhile. With another adapter, all tokens run anew.

    Attributes:
        token_ids: all tokens so far, given and generated.
        prefilled: how many of them the last `stream` ran before its first new token.

    Example:
        >>> session = lm.open_session()
        >>> session.extend(token_ids)
        >>> for token_id in session.stream(max_new_tokens=20):
        ...     ...
    """

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self.token_ids: list[int] = []
        self.prefilled = 0
        self._caches: list[Cache] | None = None
        self._room = 0
        self._cached = 0  # tokens, from the first, that the caches hold
        self._adapter: Any = None  # the state of the model's adapters that they were made with

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds tokens; they run when the next answer begins.

        Raises:
            ValueError: for an id outside the vocabulary, or more tokens than the model's context.
        """
        size, context = self.lm.backbone.config.vocabulary_size, self.context
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < size]
        if unknown:
            raise ValueError(f"`token_ids` must be in [0, {size}), the model's vocabulary. Received the id {unknown[0]}.")
        if len(self.token_ids) + len(token_ids) > context:
            raise ValueError(
                f"`token_ids` must fit in the model's context of {context} tokens. Received: {len(token_ids)} tokens, after "
                f"{len(self.token_ids)} of this session. Begin another session, or shorten it with `truncate`."
            )
        self.token_ids += [int(token_id) for token_id in token_ids]

    def truncate(self, length: int) -> None:
        """Forgets the tokens from position `length` on.

        Raises:
            ValueError: for a length that is not from 0 to the number of tokens.
        """
        if not 0 <= length <= len(self.token_ids):
            raise ValueError(
                f"`length` must be from 0 to {len(self.token_ids)}, the session's tokens. Received: length={length!r}."
            )
        if length < self._cached and self._cached > self._smallest_ring():
            self._cached = 0  # a ring has lost keys that the tokens before would need again
        self.token_ids, self._cached = self.token_ids[:length], min(self._cached, length)

    @property
    def context(self) -> int:
        """Tokens that the model takes at most."""
        return self.lm.backbone.config.max_sequence_length

    def stream(
        self, max_new_tokens: int | None = None, sampler: Any = None, seed: int | None = None, stop_token_ids: Any = "auto"
    ) -> Iterator[int]:
        """Generates tokens, and adds them to the session as they come.

        Args:
            max_new_tokens: at most; None for what the context has room for.
            sampler, seed, stop_token_ids: as `Gemma2CausalLM.generate` takes them.

        Yields:
            Token ids, a stop token that ends the answer included. Closing the iterator early keeps those that were given.

        Raises:
            ValueError: if there is no token to go on from, or no room, or for other arguments outside their ranges.
        """
        stops = read_stop_token_ids(self.lm, stop_token_ids)
        if max_new_tokens is not None:
            check_length("max_new_tokens", max_new_tokens, None)
        samplers, seeds = read_sampler(self.lm, sampler, seed, 1)
        if not isinstance(samplers, list):
            raise ValueError(f"`sampler` must be a keras_gemma2.Sampler or 'greedy' here. Received: {type(samplers).__name__}.")
        if not self.token_ids or len(self.token_ids) >= self.context:
            raise ValueError(
                f"A session must have from 1 to {self.context - 1} tokens before it can go on. This one has {len(self.token_ids)}."
            )
        limit = self.context if max_new_tokens is None else min(self.context, len(self.token_ids) + max_new_tokens)
        return self._stream(limit, plan(samplers, self.lm.backbone.config.vocabulary_size), seeds, stops)

    def _stream(self, limit: int, chosen: Any, seeds: list[int], stops: tuple[int, ...]) -> Iterator[int]:
        runner = self.lm.make_generate_function()
        with backend.no_gradients():
            caches, hidden = self._prefill(runner)
        decoding_class = HostDecoding if chosen.on_host else Decoding
        decoding = decoding_class(runner, caches, hidden, [self.token_ids], [limit], chosen, seeds, [stops])
        while decoding.open_rows.any():
            # An interruption in the midst of a step leaves caches that cannot be used: then all runs again.
            self._caches, cached, self._cached = None, self._cached, 0
            with backend.no_gradients():
                decoding.caches = self._with_room(runner, decoding.caches, cached, len(self.token_ids) + 1)
                new = decoding.advance(1)[0]
            self._caches, self._cached = decoding.caches, len(self.token_ids)
            self.token_ids += new
            yield from new

    def _prefill(self, runner: Any) -> tuple[list[Cache], Any]:
        """Runs the tokens that the caches lack, the last token at least; returns the caches and its hidden state."""
        adapter = self.lm.backbone.adapter_set.state
        if adapter != self._adapter:
            self._adapter, self._cached = adapter, 0
        start = min(self._cached, len(self.token_ids) - 1)
        caches, self._caches, self._cached = self._caches, None, 0
        caches = self._with_room(runner, caches, start, len(self.token_ids) + 1)
        self.prefilled = len(self.token_ids) - start
        caches, hidden = runner.prefill(caches, [self.token_ids[start:]], [start])
        self._caches, self._cached = caches, len(self.token_ids)
        return caches, hidden

    def _with_room(self, runner: Any, caches: list[Cache] | None, cached: int, length: int) -> list[Cache]:
        """The caches, in larger ones if they have no room for `length` tokens."""
        if caches is not None and length <= self._room:
            return caches
        if length > self._room:
            self._room = cache_bucket(min(self.context, max(ROOM, 2 * self._room, length)), self.context)
        if caches is None or cached == 0:
            return runner.new_caches(1, self._room)
        return runner.copied_caches(caches, cached, 1, self._room)

    def _smallest_ring(self) -> int:
        """Tokens that all layers can hold at once."""
        return min(keys.shape[2] - 1 for keys, _ in self._caches) if self._caches else 0
