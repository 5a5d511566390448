"""What a call of `generate` or `stream` asks for, checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_gemma2.generation.drafts import check_draft
from keras_gemma2.generation.prefix import CachedPrefix
from keras_gemma2.generation.sampler import Sampler, check_bias
from keras_gemma2.generation.text_stream import read_stop_strings
from keras_gemma2.inputs import as_texts, check_prompts, check_room, is_token_dict, token_arrays

SAMPLER_NAMES = ("greedy", "top_k", "top_p", "random", "beam")
GREEDY = Sampler(temperature=0)


@dataclasses.dataclass
class Request:
    """A checked call.

    Args:
        prompts: token ids of each row, a cached prefix not included.
        limits: tokens that each row may have at the end, prefix and prompt included.
        stop_token_ids: ids that end a row.
        stop_strings: texts that end a row, and are not part of it.
        sampler: a keras-hub sampler, or one of ours for each row.
        seeds: one a row.
        prefix: what stands before all prompts, or None.
        draft: a smaller model, "prompt_lookup", or None.
        kind: what was given: "text", "texts" or "tokens".
        length: tokens of a row of the output, for "tokens".
    """

    prompts: list[list[int]]
    limits: list[int]
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    sampler: Any
    seeds: list[int]
    prefix: CachedPrefix | None
    draft: Any
    kind: str
    length: int


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `generate` and `stream` beside their inputs; see `Generates.generate`."""

    max_length: int | None = None
    max_new_tokens: int | None = None
    stop_token_ids: Any = "auto"
    stop_strings: Any = None
    sampler: Any = None
    seed: Any = None
    prefix: CachedPrefix | None = None
    draft: Any = None
    logprobs: bool = False


def read_request(lm: Any, inputs: Any, options: Options, first_row: int = 0) -> Request:
    """Checks a call.

    Args:
        lm: the model.
        inputs: as `generate` takes them, a batch of them.
        options: the other arguments.
        first_row: rows in the batches before, which took their seeds already.

    Raises:
        ValueError: names the argument, the value and the mend.
    """
    context = lm.backbone.config.max_sequence_length
    max_length = None if options.max_length is None else check_length("max_length", options.max_length, context)
    if options.max_new_tokens is not None:
        check_length("max_new_tokens", options.max_new_tokens, None)
    stop_strings = read_stop_strings(options.stop_strings)
    if stop_strings and lm.preprocessor is None:
        raise ValueError("`stop_strings` needs a preprocessor, whose tokenizer makes text of tokens. Use `stop_token_ids`.")
    stop_token_ids = read_stop_token_ids(lm, options.stop_token_ids)
    before = 0 if options.prefix is None else options.prefix.check(lm.backbone)
    if is_token_dict(inputs):
        kind, prompts, default = "tokens", *_token_prompts(lm, inputs, before)
    else:
        kind, prompts, default = _text_prompts(lm, inputs, max_length, options, before)
    if max_length is None:
        max_length = default if options.max_new_tokens is None else context
    check_prompts(prompts, max_length, context, before)
    limits = [max_length] * len(prompts)
    if options.max_new_tokens is not None:
        limits = [min(max_length, before + len(prompt) + options.max_new_tokens) for prompt in prompts]
    sampler, seeds = read_sampler(lm, options.sampler, options.seed, len(prompts), first_row)
    check_draft(lm, options.draft, sampler, limits)
    length = max_length if options.max_new_tokens is None else max(limits)
    return Request(prompts, limits, stop_token_ids, stop_strings, sampler, seeds, options.prefix, options.draft, kind, length)


def _token_prompts(lm: Any, inputs: Any, before: int) -> tuple[list[list[int]], int]:
    arrays = token_arrays(inputs, lm.backbone.config.vocabulary_size)
    prompts = [ids[mask.astype(bool)].tolist() for ids, mask in zip(arrays["token_ids"], arrays["padding_mask"])]
    default = min(before + arrays["token_ids"].shape[1], lm.backbone.config.max_sequence_length)
    return prompts, default


def _text_prompts(lm: Any, inputs: Any, max_length: int | None, options: Options, before: int) -> tuple[str, list[list[int]], int]:
    if lm.preprocessor is None:
        raise ValueError(
            "`inputs` must be a dict with 'token_ids' and 'padding_mask' when the model has no preprocessor. "
            f"Received: {type(inputs).__name__}. Pass `preprocessor=` to Gemma2CausalLM to generate from text."
        )
    texts, is_scalar = as_texts(inputs)
    kind = "text" if is_scalar else "texts"
    context = lm.backbone.config.max_sequence_length
    default = min(lm.preprocessor.sequence_length, context)
    room = context if options.max_new_tokens is not None else default
    room = room if max_length is None else max_length
    if options.prefix is not None:  # what follows a prefix has no start token of its own
        rows = [list(map(int, row)) for row in lm.preprocessor.tokenizer(texts)]
        return kind, rows, default
    if getattr(lm.preprocessor, "truncation", "right") == "error":
        # Said in the words of `generate`, where the preprocessor would use its own.
        rows = lm.preprocessor.tokenizer([text.removeprefix("<bos>") for text in texts])
        check_room([len(row) + bool(lm.preprocessor.add_start_token) for row in rows], room, context)
    tokens = lm.preprocessor.generate_preprocess(texts, sequence_length=room)
    ids, mask = (ops.convert_to_numpy(tokens[key]) for key in ("token_ids", "padding_mask"))
    return kind, [row[real.astype(bool)].tolist() for row, real in zip(ids, mask)], default


def check_length(name: str, value: Any, limit: int | None) -> int:
    """An integer from 1 to `limit`, or a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1 or (limit and value > limit):
        bounds = f"from 1 to the model's max_sequence_length, {limit}" if limit else "of at least 1"
        raise ValueError(f"`{name}` must be an integer {bounds}. Received: {name}={value!r}.")
    return int(value)


def read_stop_token_ids(lm: Any, stop_token_ids: Any) -> tuple[int, ...]:
    """ "auto", None or ids as a tuple of ids."""
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str):
        if stop_token_ids != "auto":
            raise ValueError(f"`stop_token_ids` must be 'auto', None or a list of ids. Received: {stop_token_ids!r}.")
        if lm.preprocessor is None:
            raise ValueError(
                "`stop_token_ids='auto'` needs a preprocessor, whose tokenizer names the stop tokens. "
                "Pass a list of ids (Gemma 2's are 1 and 107), or None to go on to `max_length`."
            )
        tokenizer = lm.preprocessor.tokenizer
        return tuple(getattr(tokenizer, "stop_token_ids", (tokenizer.end_token_id,)))
    size = lm.backbone.config.vocabulary_size
    ids = stop_token_ids if isinstance(stop_token_ids, (list, tuple, set, np.ndarray)) else [None]
    if not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) and 0 <= i < size for i in ids):
        raise ValueError(f"`stop_token_ids` must be 'auto', None or a list of ids in [0, {size}). Received: {stop_token_ids!r}.")
    return tuple(int(token_id) for token_id in ids)


def check_sampler(sampler: Any) -> None:
    """Raises a ValueError unless this is a sampler, or the name of one."""
    known = isinstance(sampler, (Sampler, keras_hub.samplers.Sampler))
    if not known and not (isinstance(sampler, str) and sampler in SAMPLER_NAMES):
        raise ValueError(
            f"`sampler` must be a keras_gemma2.Sampler, one of {', '.join(map(repr, SAMPLER_NAMES))}, or a keras-hub sampler. "
            f"Received: {sampler!r}."
        )


def read_sampler(lm: Any, sampler: Any, seed: Any, rows: int, first_row: int = 0) -> tuple[Any, list[int]]:
    """The sampler, one of ours a row or a keras-hub one, and the seed of each row."""
    sampler = lm.sampler if sampler is None else sampler
    if isinstance(sampler, (list, tuple)):
        if len(sampler) != rows or not all(isinstance(one, Sampler) for one in sampler):
            raise ValueError(
                f"`sampler`, as a list, must hold one keras_gemma2.Sampler a row, {rows} of them. Received: {sampler!r}."
            )
        samplers: Any = list(sampler)
    else:
        check_sampler(sampler)
        samplers = keras_hub.samplers.get(sampler) if isinstance(sampler, str) else sampler
        if type(samplers) is keras_hub.samplers.GreedySampler:
            samplers = GREEDY
        samplers = [samplers] * rows if isinstance(samplers, Sampler) else samplers
    if isinstance(samplers, list):
        for one in {id(one): one for one in samplers}.values():
            check_bias(one, lm.backbone.config.vocabulary_size)
    if seed is not None and not isinstance(samplers, list):
        raise ValueError(
            "`seed` applies to keras_gemma2.Sampler: keras-hub's samplers carry a seed of their own, shared by all rows. Received: "
            f"seed={seed!r} with {type(samplers).__name__}. Give that sampler its `seed`, or use keras_gemma2.Sampler."
        )
    return samplers, read_seeds(seed, rows, first_row)


def read_seeds(seed: Any, rows: int, first_row: int) -> list[int]:
    """One seed a row: of an integer, that integer and the ones after it; None draws from numpy's global generator."""
    if seed is None:
        return [int(drawn) for drawn in np.random.randint(0, 2**31 - 1, size=rows)]
    seeds = [seed + first_row + i for i in range(rows)] if _is_integer(seed) else seed
    if not isinstance(seeds, (list, tuple, np.ndarray)) or len(seeds) != rows or not all(map(_is_integer, seeds)):
        raise ValueError(f"`seed` must be None, an integer, or a list of {rows} integers, one a row. Received: seed={seed!r}.")
    return [int(one) for one in seeds]


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def tokens_before(prefix: CachedPrefix | None) -> Sequence[int]:
    return () if prefix is None else prefix.token_ids
