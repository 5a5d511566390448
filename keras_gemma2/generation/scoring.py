"""How likely a model finds texts: mixed into `Gemma2CausalLM`."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_gemma2 import backend
from keras_gemma2.generation.decoding import not_numbers
from keras_gemma2.generation.prefix import CachedPrefix
from keras_gemma2.generation.requests import Options, Request, read_request

ROWS_AT_ONCE, TOKENS_AT_ONCE = 8, 8192  # of caches


class Scores:
    """`score` and `perplexity`, over what `Generates` needs."""

    def score(self, inputs: Any, prefix: CachedPrefix | None = None) -> Any:
        """Log-probability of each token of texts, given what stands before it.

        Args:
            inputs: a string, a list of strings, or a dict of token ids and padding mask, each `[B, T]`.
            prefix: from `prefill`: a text that the inputs continue; it is not scored.

        Returns:
            Float32 numpy `[n]` for a string, else a list with one for each row: natural logarithms, one a token. The first token of
            a row, the start token, has none unless there is a prefix before it.

        Raises:
            ValueError: for an empty list, something else than text, a text without tokens or with more than the model's context, or
                ids outside the vocabulary.
            FloatingPointError: if the model's logits are not numbers.

        Example:
            >>> lm.score("Once upon a time").sum()  # of the whole text
        """
        options = Options(max_length=self.backbone.config.max_sequence_length, stop_token_ids=None, prefix=prefix)
        request = read_request(self, inputs, options)
        scores: list[Any] = [None] * len(request.prompts)
        # Rows of like length run together, so that short ones do not wait in the caches of long ones.
        order = sorted(range(len(scores)), key=lambda row: len(request.prompts[row]))
        with backend.no_gradients():
            while order:
                together = max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // len(request.prompts[order[-1]])))
                rows, order = order[-together:], order[:-together]  # the longest first
                for row, found in zip(rows, self._score_rows(request, rows)):
                    scores[row] = found
        return scores[0] if request.kind == "text" else scores

    def _score_rows(self, request: Request, rows: list[int]) -> list[np.ndarray]:
        runner, prompts = self.make_generate_function(), [request.prompts[row] for row in rows]
        if request.prefix is None:
            start, targets = 0, [prompt[1:] for prompt in prompts]
            inputs = [prompt[:-1] for prompt in prompts]
            caches = runner.new_caches(len(rows), max(map(len, prompts)))
        else:
            # The prefix's last token runs once more: what follows it is the first thing to score.
            start, targets = len(request.prefix) - 1, prompts
            inputs = [[request.prefix.token_ids[-1], *prompt[:-1]] for prompt in prompts]
            room = len(request.prefix) + max(map(len, prompts))
            caches = runner.copied_caches(request.prefix.caches, len(request.prefix), len(rows), room)
        scores = runner.scores(caches, inputs, targets, [start] * len(rows))
        for row, found in zip(rows, scores):
            if not np.isfinite(found).all():
                raise not_numbers(row, len(request.prompts[row]))
        return scores

    def perplexity(self, inputs: Any, prefix: CachedPrefix | None = None) -> float:
        """`exp` of the mean negative log-probability over all scored tokens of the inputs.

        Args:
            inputs, prefix: as `score` takes them.

        Raises:
            ValueError: as `score`, and if no token is scored.

        Example:
            >>> lm.perplexity(["Once upon a time, there was a king.", "He had a daughter."])
        """
        scores = self.score(inputs, prefix)
        every = np.concatenate([np.atleast_1d(row) for row in (scores if isinstance(scores, list) else [scores])])
        if not every.size:
            raise ValueError("`inputs` must have a token to score beside each row's first. Received only rows of one token.")
        return float(np.exp(-every.astype("float64").mean()))
