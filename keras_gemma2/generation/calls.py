"""The calls of a causal language model that write text: mixed into `Gemma2CausalLM`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_gemma2 import backend
from keras_gemma2.generation import generate
from keras_gemma2.generation.answers import Chats
from keras_gemma2.generation.prefix import CachedPrefix, make_prefix
from keras_gemma2.generation.requests import Options, Request, read_request
from keras_gemma2.generation.runner import Runner
from keras_gemma2.generation.session import Session
from keras_gemma2.generation.speculative import SpeculationStats
from keras_gemma2.generation.text_stream import TextStream
from keras_gemma2.inputs import pad_rows


class Generates(Chats):
    """`generate`, `stream`, `prefill` and `open_session`, over the attributes `backbone`, `preprocessor` and `sampler`."""

    _runners: dict[str | None, Runner] | None = None  # by the adapter that is active
    _runner_state: Sequence[Any] = ()
    generation_stats: SpeculationStats | None = None  # of the last call, if it had a draft

    def make_generate_function(self) -> Runner:
        """The compiled functions that generate. Kept until the model's variables are replaced, whatever the sampler; for each
        adapter there are others, so that switching back compiles nothing.

        On PyTorch a decoding step runs from a recording of its operations. With the model's `jit_compile` set to True (here or in
        `compile`) `torch.compile` makes it faster still, after a minute's work; with `run_eagerly`, each layer is called each time.
        """
        jit = False if self.run_eagerly else self.jit_compile or None
        changes, adapter = self.backbone.adapter_set.state
        state = [jit, changes, *(id(variable) for variable in self.backbone.variables)]
        if self._runners is None or self._runner_state != state:
            self._runners, self._runner_state = {}, state
        if adapter not in self._runners:
            self._runners[adapter] = Runner(self.backbone, jit)
        return self._runners[adapter]

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: str | Sequence[int] | None = "auto",
        stop_strings: str | Sequence[str] | None = None,
        strip_prompt: bool = False,
        sampler: Any = None,
        seed: int | Sequence[int] | None = None,
        return_logprobs: bool = False,
        prefix: CachedPrefix | None = None,
        draft: Any = None,
    ) -> Any:
        """Continues prompts.

        Args:
            inputs: a string, a list of strings, a `tf.data.Dataset` of batches of strings, or a dict of token ids and
                padding mask, each `[B, T]`, which bypasses the preprocessor.
            max_length: tokens at most in each row, prompt included. None means no other bound than `max_new_tokens` and the model's
                context; without `max_new_tokens`, the preprocessor's `sequence_length`, and for a dict its length T.
            max_new_tokens: tokens at most that are added to each row.
            stop_token_ids: "auto" stops at the tokenizer's `<eos>` and `<end_of_turn>`, and at what the checkpoint's generation
                config names; a list of ids; or None to go on to the end.
            stop_strings: a text, or several, that end a row where they come up; they are not part of what is returned.
            strip_prompt: whether to leave the prompt out of what is returned.
            sampler: a `keras_gemma2.Sampler` for all rows, or a list of one a row; a keras-hub sampler or its name; None means what
                `compile` was given, greedy by default.
            seed: of the draws. An integer gives row i the seed `seed + i`; a list gives each row its own. A row's draws depend on
                its seed and its positions only. None draws seeds from numpy's global generator.
            return_logprobs: whether to return log-probabilities too.
            prefix: from `prefill`: a text that the inputs continue.
            draft: a smaller model of the same vocabulary, or "prompt_lookup", which proposes what followed the last tokens earlier
                in the text. Where it proposes well, the model runs once for several tokens. Greedy texts stay the same, up to ties
                that rounding decides; drawn ones stay distributed the same, and are others than without a draft. For samplers
                without penalties and logits processors. `generation_stats` then says how well it did.

        Returns:
            A string for a string, a list for a list; for a dict, a dict of numpy `token_ids` int32 `[B, length]` and
            `padding_mask` bool, each row its prompt and completion from the left (the stop token included), then padding.
            With `return_logprobs`, a pair of that and the float32 log-probabilities of the new tokens under the model's own
            distribution, before the sampler's filters: an array for a string, else a list with an array a row.

        Raises:
            ValueError: for an empty list, something else than text, a prompt longer than `max_length` or the model's
                `max_sequence_length`, other arguments outside their ranges, ids outside the vocabulary, or "auto" without a
                tokenizer.
            FloatingPointError: if the model's logits are not numbers.

        Example:
            >>> lm.generate("Once upon a time", max_new_tokens=20, sampler=keras_gemma2.Sampler(temperature=0.8, top_p=0.9), seed=7)
        """
        options = Options(max_length, max_new_tokens, stop_token_ids, stop_strings, sampler, seed, prefix, draft, return_logprobs)
        self.generation_stats = None
        if hasattr(inputs, "as_numpy_iterator"):
            outputs, logprobs = self._generate_batches(inputs.as_numpy_iterator(), options, strip_prompt)
        else:
            outputs, logprobs = self._generate_batch(inputs, options, strip_prompt, 0)
        if not return_logprobs:
            return outputs
        return outputs, logprobs[0] if isinstance(outputs, str) else logprobs

    def _generate_batches(self, batches: Iterator[Any], options: Options, strip_prompt: bool) -> tuple[Any, list]:
        outputs: list[Any] = []
        logprobs: list[Any] = []
        for batch in batches:
            output, more = self._generate_batch(batch, options, strip_prompt, len(logprobs))
            outputs.append(output)
            logprobs += more
        return _concatenate(outputs, self._pad_token_id()), logprobs

    def _generate_batch(self, inputs: Any, options: Options, strip_prompt: bool, first_row: int) -> tuple[Any, list]:
        request = read_request(self, inputs, options, first_row)
        if options.logprobs:
            generate.check_has_logprobs(request)
        tokenizer = None if self.preprocessor is None else self.preprocessor.tokenizer
        new, logprobs, texts, stats = generate.run(self.make_generate_function(), request, tokenizer)
        if stats is not None:
            self.generation_stats = (self.generation_stats or SpeculationStats()) + stats
        output = self._output(request, new, texts, strip_prompt)
        return output, [np.array(row, "float32") for row in logprobs]

    def _output(self, request: Request, new: list[list[int]], texts: list[str] | None, strip_prompt: bool) -> Any:
        before = [] if request.prefix is None else list(request.prefix.token_ids)
        starts = [[] if strip_prompt else before + prompt for prompt in request.prompts]
        if request.kind == "tokens":
            rows = [start + ids for start, ids in zip(starts, new)]
            return pad_rows(rows, request.length, self._pad_token_id())
        if texts is None:
            outputs = self._texts([start + ids for start, ids in zip(starts, new)])
        else:
            outputs = [self._before(start, text) + text for start, text in zip(starts, texts)]
        return outputs[0] if request.kind == "text" else outputs

    def _before(self, prompt: list[int], text: str) -> str:
        """A prompt's text before a new text: `<end_of_turn>` at its end is left out only where nothing follows."""
        tokenizer = self.preprocessor.tokenizer
        stream = TextStream(tokenizer, (), tokenizer.special_token_ids, () if text else (tokenizer.end_of_turn_token_id,))
        return stream.push(prompt) + stream.finish()

    def _pad_token_id(self) -> int:
        return 0 if self.preprocessor is None else self.preprocessor.tokenizer.pad_token_id

    def _texts(self, rows: list[list[int]]) -> list[str]:
        packed = pad_rows(rows, max(1, *map(len, rows)), self.preprocessor.tokenizer.pad_token_id)
        return list(self.preprocessor.generate_postprocess(packed))

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: str | Sequence[int] | None = "auto",
        stop_strings: str | Sequence[str] | None = None,
        sampler: Any = None,
        seed: int | Sequence[int] | None = None,
        prefix: CachedPrefix | None = None,
        draft: Any = None,
    ) -> Iterator[Any]:
        """Continues prompts and gives what is decided as soon as it is.

        The pieces of a row add up to what `generate` with `strip_prompt=True` and the same seed returns: no piece holds half a
        character, and a text that might be the beginning of a stop string is held back until it is known not to be. Closing the
        iterator early ends the work.

        Args:
            inputs: a string, a list of strings, or a dict of token ids and padding mask.
            max_length, max_new_tokens, stop_token_ids, stop_strings, sampler, seed, prefix, draft: as `generate` takes them.

        Yields:
            For a string, pieces of text. For a list, pairs of the row's index and a piece. For a dict, pairs of the row's index and
            a token id.

        Raises:
            ValueError: as `generate`, at the call and not at the first piece.
            FloatingPointError: if the model's logits are not numbers.

        Example:
            >>> for piece in lm.stream("Once upon a time", max_new_tokens=20):
            ...     print(piece, end="", flush=True)
        """
        options = Options(max_length, max_new_tokens, stop_token_ids, stop_strings, sampler, seed, prefix, draft)
        request = read_request(self, inputs, options)
        generate.check_streams(request)
        self.generation_stats = None
        return self._pieces(request)

    def _pieces(self, request: Request) -> Iterator[Any]:
        decoding = generate.begin(self.make_generate_function(), request)
        needs_text = request.kind != "tokens" or request.stop_strings
        texts = generate.RowTexts(self.preprocessor.tokenizer, request) if needs_text else None
        while decoding.open_rows.any():
            with backend.no_gradients():
                chosen = decoding.advance(1)
            self.generation_stats = generate.stats_of(decoding)
            for row, tokens in enumerate(chosen):
                piece, kept = texts.push(decoding, row, tokens) if texts else ("", len(tokens))
                if request.kind == "tokens":
                    yield from ((row, token) for token in tokens[:kept])
                elif piece:
                    yield piece if request.kind == "text" else (row, piece)

    def prefill(self, prefix: Any) -> CachedPrefix:
        """Runs a text that many calls begin with, once.

        Args:
            prefix: a string (the start token is put before it), or token ids, of which the first should be `<bos>`.

        Returns:
            What `generate`, `stream` and `score` take as `prefix`. Their inputs then go on from there, without a start token of
            their own: their tokens follow the prefix's tokens. It holds for the weights as they are now: make it anew after
            training.

        Raises:
            ValueError: for an empty prefix, or one as long as the model's context.

        Example:
            >>> instruction = lm.prefill("Translate to French.\\n")
            >>> lm.generate(["cheese =>", "bread =>"], prefix=instruction, max_new_tokens=8)
        """
        token_ids = self._prefix_token_ids(prefix)
        limit = self.backbone.config.max_sequence_length
        if not 0 < len(token_ids) < limit:
            raise ValueError(
                f"`prefix` must have from 1 to {limit - 1} tokens, so that the model's context has room for more. Received one of "
                f"{len(token_ids)} tokens."
            )
        with backend.no_gradients():
            return make_prefix(self.make_generate_function(), token_ids)

    def open_session(self) -> Session:
        """A growing sequence of tokens whose caches are kept, so that nothing runs twice; `Chat` is made of one.

        Example:
            >>> session = lm.open_session()
            >>> session.extend([2, 651])
            >>> list(session.stream(max_new_tokens=8))
        """
        return Session(self)

    def _prefix_token_ids(self, prefix: Any) -> list[int]:
        if isinstance(prefix, str):
            return read_request(self, prefix, Options(max_new_tokens=1, stop_token_ids=None)).prompts[0]
        ids = np.asarray(prefix)
        if ids.ndim != 1 or not ids.size:
            raise ValueError(f"`prefix` must be a string, or a list of token ids of at least one. Received: {prefix!r}.")
        inputs = {"token_ids": ids[None], "padding_mask": np.ones_like(ids)[None]}
        return read_request(self, inputs, Options(max_new_tokens=1, stop_token_ids=None)).prompts[0]


def _concatenate(outputs: list[Any], pad_token_id: int) -> Any:
    if not outputs:
        raise ValueError("`inputs` must hold at least one batch. Received an empty dataset.")
    if isinstance(outputs[0], dict):
        length = max(output["token_ids"].shape[1] for output in outputs)
        rows = [ids[mask].tolist() for output in outputs for ids, mask in zip(output["token_ids"], output["padding_mask"])]
        return pad_rows(rows, length, pad_token_id)
    return [text for output in outputs for text in (output if isinstance(output, list) else [output])]
