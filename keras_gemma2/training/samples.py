"""What users train on, as samples: token ids, and what each counts in the loss.

A sample is whole: `truncated` cuts it, and `rows_of` makes the rows that a model is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_gemma2.chat import MODEL, ChatFormat, read_messages
from keras_gemma2.inputs import TOKEN_KEYS
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.text_inputs import read_texts, shorten

TEXTS_AT_ONCE = 1024  # tokenized in one call: lists of Python numbers take ten times the memory of arrays
PAIR_KEYS = ("prompts", "responses")


class Sample(NamedTuple):
    """One text, pair or conversation.

    Attributes:
        token_ids: int32 `[n]`.
        weights: float32 `[n]`: what each token counts in the loss, as a label. The first is never one.
        head, tail: how many tokens at either end stay when the sample is cut.
    """

    token_ids: np.ndarray
    weights: np.ndarray
    head: int = 0
    tail: int = 0


def text_samples(preprocessor: Gemma2CausalLMPreprocessor, texts: Any) -> list[Sample]:
    """Samples of strings, in which every token is learned: `<bos>`, text, `<eos>`.

    Raises:
        TypeError, ValueError: if `texts` holds anything else, or nothing.
    """
    texts = read_texts(texts, "x")
    if isinstance(texts, str):
        raise ValueError(f"`x` must be a list of strings. Received one string: {shorten(texts)}. Pass `[text]`.")
    end = _end(preprocessor)
    return [
        _sample(ids + end, np.ones(len(ids + end)), _starts(preprocessor, ids), len(end))
        for ids in _in_parts(preprocessor.prompt_ids, texts)
    ]


def pair_samples(preprocessor: Gemma2CausalLMPreprocessor, pairs: Mapping[str, Any]) -> list[Sample]:
    """Samples of `{"prompts", "responses"}`, in which the response and `<eos>` are learned.

    Prompt and response are tokenized by themselves, so that the prompt's ids are those that `generate` sees.

    Raises:
        TypeError, ValueError: for something else than strings, another count of responses than of prompts, or an empty response.
    """
    prompts, responses = (_strings(pairs[key], key) for key in PAIR_KEYS)
    if len(prompts) != len(responses):
        raise ValueError(
            "`prompts` and `responses` must be as many: one response a prompt. "
            f"Received: {len(prompts)} prompts and {len(responses)} responses."
        )
    for index, response in enumerate(responses):
        if not response:
            raise ValueError(
                f"`responses[{index}]` must have some text: there is nothing to learn from an empty one. "
                "Leave the pair out, or, to teach the model to say nothing, train on token ids."
            )
    end = _end(preprocessor)
    both = zip(_in_parts(preprocessor.prompt_ids, prompts), _in_parts(preprocessor.tokenizer.tokenize, responses))
    samples = []
    for prompt, response in both:
        weights = np.repeat([0.0, 1.0], [len(prompt), len(response + end)])
        samples.append(_sample(prompt + response + end, weights, _starts(preprocessor, prompt), len(end)))
    return samples


def chat_samples(preprocessor: Gemma2CausalLMPreprocessor, conversations: Sequence[Any]) -> tuple[list[Sample], int]:
    """Samples of conversations, in which what the model said and its `<end_of_turn>` are learned.

    The ids are those of `chat_token_ids(..., add_generation_prompt=False)`.

    Returns:
        The samples, and how many conversations end with a turn of the user, of which nothing is learned.

    Raises:
        TypeError, ValueError: for what `chat_token_ids` does not take, or without a turn of the model. Names the conversation.
    """
    chat = ChatFormat(preprocessor.tokenizer)
    every, unanswered = [], 0
    for index, messages in enumerate(conversations):
        try:
            turns = read_messages(messages, to_answer=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`x[{index}]`: {error}") from None
        if all(turn.role != MODEL for turn in turns):
            raise ValueError(f"`x[{index}]` must have a turn of the model: that is what is learned. Received: {shorten(messages)}.")
        unanswered += turns[-1].role != MODEL
        ids, learned = chat.lesson(turns)
        every.append(_sample(ids, learned, head=1))
    return every, unanswered


def truncated(sample: Sample, limit: int, truncation: str) -> Sample:
    """A sample of at most `limit` tokens: without the last ones (`truncation="right"`) or the first (`"left"`).

    What frames it (`<bos>`, and `<eos>` where a preprocessor has set it) is kept.
    """
    excess = len(sample.token_ids) - limit
    if excess <= 0:
        return sample
    first = sample.head if truncation == "left" else len(sample.token_ids) - sample.tail - excess
    kept = np.r_[:first, first + excess : len(sample.token_ids)]
    return sample._replace(token_ids=sample.token_ids[kept], weights=sample.weights[kept])


def rows_of(samples: Sequence[Sample], length: int, pad_token_id: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """One row a sample, as a call of the preprocessor makes them of texts.

    Args:
        samples: of at most `length + 1` tokens: the last of so many is a label only.
        length: of the rows, T.
        pad_token_id: what fills them.

    Returns:
        `(x, y, sample_weight)`: a dict of `"token_ids"` and `"padding_mask"`, labels (int32) and weights (float32), all
        `[len(samples), T]`.
    """
    shape = (len(samples), length)
    token_ids, labels = np.full(shape, pad_token_id, "int32"), np.full(shape, pad_token_id, "int32")
    mask, weights = np.zeros(shape, "int32"), np.zeros(shape, "float32")
    for row, sample in enumerate(samples):
        count = min(len(sample.token_ids), length)
        token_ids[row, :count], mask[row, :count] = sample.token_ids[:count], 1
        labels[row, : len(sample.token_ids) - 1] = sample.token_ids[1:]
        weights[row, : len(sample.token_ids) - 1] = sample.weights[1:]
    return dict(zip(TOKEN_KEYS, (token_ids, mask))), labels, weights


def _sample(ids: list[int], weights: Sequence[float], head: int, tail: int = 0) -> Sample:
    return Sample(np.asarray(ids, "int32"), np.asarray(weights, "float32"), head, tail)


def _starts(preprocessor: Gemma2CausalLMPreprocessor, ids: list[int]) -> int:
    """How many `<bos>` come first."""
    return int(ids[:1] == [preprocessor.tokenizer.start_token_id])


def _end(preprocessor: Gemma2CausalLMPreprocessor) -> list[int]:
    return [preprocessor.tokenizer.end_token_id] if preprocessor.add_end_token else []


def _strings(value: Any, name: str) -> list[str]:
    texts = read_texts(value, name)
    if isinstance(texts, str):
        raise ValueError(f"`{name}` must be a list of strings. Received one string: {shorten(texts)}. Pass `[text]`.")
    return texts


def _in_parts(encode: Any, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of texts, encoded some at a time."""
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        yield from map(list, encode(texts[first : first + TEXTS_AT_ONCE]))
