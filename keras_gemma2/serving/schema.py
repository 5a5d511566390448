"""The bodies of requests, as OpenAI's interface has them.

Source: OpenAI's API reference, "Create chat completion" and "Create completion". What is not known here is refused rather than
ignored: an answer that silently left a wish out would look like one that granted it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_CHOICES = 16
MOST_FIELDS = 64  # of an object: each that is not known makes an error of its own
# All lists end at their first error: a body of 4 MB has room for a million of them.
_Ids = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1, fail_fast=True)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise ValueError(f"has {len(value)} fields, more than {MOST_FIELDS}")
        return value


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    # What an answer of this interface has besides, for clients that send it back as it came.
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream has besides text."""

    include_usage: bool = False


class _Request(_Strict):
    model: str | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Known, but only with the value that changes nothing.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias", mode="before")
    @classmethod
    def _must_be_off(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported by this server, unless it is off (0, or empty). Leave it out")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for requests with `stream` set to true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        """How many answers."""
        return self.n or 1

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(_Request):
    """The body of `/v1/chat/completions`."""

    default_tokens: ClassVar[int | None] = None  # what there is room for
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` is for requests with `logprobs` set to true")
        return self

    @property
    def asked(self) -> int | None:
        """New tokens at most, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to tell of; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """The body of `/v1/completions`."""

    default_tokens: ClassVar[int | None] = 16  # as OpenAI's
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)] | _Ids | Annotated[
        list[_Ids], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)
    ]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=5)] | None = None

    @property
    def asked(self) -> int | None:
        """As of a chat."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """As of a chat."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt


# Answers, for the OpenAPI document -------------------------------------------------------------------------------------


class ErrorDetail(_Strict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Strict):
    """The body of every answer that is none."""

    error: ErrorDetail
