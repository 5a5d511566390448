"""`Sampler`: how the tokens of one row are chosen, checked where it is given."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]
_LARGEST = float(np.finfo("float32").max)


@keras.saving.register_keras_serializable(package="keras_gemma2")
@dataclasses.dataclass(frozen=True, repr=False)
class Sampler:
    """How the next token is chosen: filters on the logits, in this order, and then one draw.

    The order is that of transformers' `generate`: `logit_bias`, `repetition_penalty`, `presence_penalty`, `logits_processor`,
    `temperature`, `top_k`, `top_p`, `min_p`. An object does not change and can be shared between rows, calls and threads.

    Args:
        temperature: logits are divided by it; under 1 likely tokens become likelier. 0 is greedy: the most likely token after bias,
            penalties and processor, the first of several.
        top_k: keep this many most likely tokens, and what ties with the last of them; None, or the size of the vocabulary or
            more, keeps all.
        top_p: keep the fewest most likely tokens that make up this share of what top_k has left, and what ties with the last of
            them; over 0, at most 1. None or 1 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one, in [0, 1]; None or 0 keeps all.
        repetition_penalty: over 0. Logits of tokens in the prompt or generated are divided by it where positive and multiplied
            where negative (arXiv 1909.05858); 1 changes nothing.
        presence_penalty: subtracted from the logits of tokens that this call has generated; 0 changes nothing.
        logit_bias: token id -> number added to its logit; -inf bans the token.
        logits_processor: called on the host with one row's token ids (int `[T]`, prompt and generated) and logits
            (float32 `[V]`, after bias and penalties); returns float32 `[V]`. It makes each token wait for the host.

    Raises:
        ValueError: if a number is out of its range; the message names the argument, its value and the mend.

    Example:
        >>> Sampler(temperature=0.7, top_p=0.9)
        Sampler(temperature=0.7, top_p=0.9)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        checked = {
            "temperature": _number("temperature", self.temperature, lambda x: x >= 0, "at least 0 (0 is greedy)"),
            "top_k": None if self.top_k is None else _count("top_k", self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, lambda x: x > 0, "over 0 (1 changes nothing)"
            ),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, lambda x: True, "(0 changes nothing)"),
            "logit_bias": _bias(self.logit_bias),
        }
        if self.top_p is not None:
            checked["top_p"] = _number("top_p", self.top_p, lambda x: 0 < x <= 1, "over 0 and at most 1 (None keeps all tokens)")
        if self.min_p is not None:
            checked["min_p"] = _number("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1 (None keeps all tokens)")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise ValueError(
                "`logits_processor` must be callable: (token_ids int [T], logits float32 [V]) -> float32 [V]. "
                f"Received: {self.logits_processor!r}."
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __repr__(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {name: value for name, value in self._arguments().items() if value != defaults[name]}
        shown = {name: dict(value) if name == "logit_bias" else value for name, value in given.items()}
        return f"Sampler({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __hash__(self) -> int:
        bias = self.logit_bias and tuple(sorted(self.logit_bias.items()))
        return hash((*(value for name, value in self._arguments().items() if name != "logit_bias"), bias))

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # Read-only mappings can be neither copied nor pickled.
        arguments = self._arguments()
        return functools.partial(type(self), **{**arguments, "logit_bias": self.logit_bias and dict(self.logit_bias)}), ()

    def get_config(self) -> dict[str, Any]:
        """The arguments, as JSON can hold them.

        Raises:
            ValueError: if there is a `logits_processor`, which is code.
        """
        config = self._arguments()
        processor = config.pop("logits_processor")
        if processor is not None:
            raise ValueError(
                "A Sampler with a `logits_processor` cannot be saved: the processor is code. Received: logits_processor="
                f"{processor_name(processor)}. Save a Sampler without it and pass the processor again after loading."
            )
        if self.logit_bias is not None:  # JSON has neither integer keys nor infinities
            config["logit_bias"] = [[i, "-inf" if v == -math.inf else v] for i, v in self.logit_bias.items()]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Sampler:
        """A Sampler of the arguments that `get_config` gave."""
        bias = config.get("logit_bias")
        if bias is not None:
            bias = {i: float(v) if v == "-inf" else v for i, v in bias}
        return cls(**{**config, "logit_bias": bias})


def processor_name(processor: Any) -> str:
    """A function's name, or a callable object's class."""
    return getattr(processor, "__qualname__", type(processor).__qualname__)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _number(name: str, value: Any, is_in_range: Callable[[float], bool], words: str) -> float:
    """The value as a float that float32 can hold."""
    if not _is_number(value) or not abs(value) <= _LARGEST or not is_in_range(value):
        raise ValueError(f"`{name}` must be a finite number {words}. Received: {name}={value!r}.")
    return float(value)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral) or not _is_number(value) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, or None to keep all tokens. Received: {name}={value!r}.")
    return int(value)


def _bias(bias: Any) -> Mapping[int, float] | None:
    """A read-only copy; None for an empty one."""
    if bias is None or (isinstance(bias, Mapping) and not bias):
        return None
    if not isinstance(bias, Mapping):
        raise ValueError(f"`logit_bias` must be a dict of token ids to numbers. Received: logit_bias={bias!r}.")
    for token_id, value in bias.items():
        if not isinstance(token_id, numbers.Integral) or not _is_number(token_id) or token_id < 0:
            raise ValueError(
                f"`logit_bias` must have token ids as keys, integers of at least 0. Received: the key {token_id!r}. "
                "`tokenizer.token_to_id` tells a token's id."
            )
        if not _is_number(value) or not (value == -math.inf or abs(value) <= _LARGEST):
            raise ValueError(
                "`logit_bias` must have finite numbers, or -inf to ban a token, as values. "
                f"Received: {value!r} for token {token_id}."
            )
    return types.MappingProxyType({int(token_id): float(value) for token_id, value in bias.items()})
