"""The bodies of answers, as OpenAI's interface has them.

Source: OpenAI's API reference, "The chat completion object", "... chunk object", "The completion object".
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from keras_gemma2.serving.choices import Piece
from keras_gemma2.serving.jobs import Chosen


class Bodies:
    """What one request is answered with.

    Args:
        chat: whether it is one of a chat.
        model: the name that it is told.
        top: how many of the likeliest tokens to tell of; None for no log-probabilities.
        text_of: the text of a token id by itself, and its bytes.
    """

    def __init__(self, chat: bool, model: str, top: int | None, text_of: Callable[[int], tuple[str, bytes]]) -> None:
        self._chat, self._top, self._text_of = chat, top, text_of
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._model, self._created = model, int(time.time())
        self._offsets: dict[int, int] = {}

    def whole(self, texts: Sequence[Sequence[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request that is not streamed; the pieces of each choice."""
        choices = []
        for index, pieces in enumerate(texts):
            text = "".join(piece.text for piece in pieces)
            chosen = [one for piece in pieces for one in piece.chosen]
            content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            choices.append(self._choice(index, content, chosen, pieces[-1].finish_reason))
        return self._object("chat.completion" if self._chat else "text_completion", choices) | {"usage": usage}

    def first(self, index: int) -> dict[str, Any]:
        """The chunk that begins a choice of a chat."""
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, [], None)])

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A chunk of a stream."""
        delta = {"content": piece.text} if piece.text else {}
        content = {"delta": delta} if self._chat else {"text": piece.text}
        return self._chunk([self._choice(piece.index, content, piece.chosen, piece.finish_reason)])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream that counts tokens."""
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object("chat.completion.chunk" if self._chat else "text_completion", choices)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _choice(self, index: int, content: dict[str, Any], chosen: Sequence[Chosen], reason: str | None) -> dict[str, Any]:
        logprobs = None if self._top is None else self._logprobs(index, chosen)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, chosen: Sequence[Chosen]) -> dict[str, Any]:
        if self._chat:
            tokens = [
                {**self._token(one.token_id, one.logprob), "top_logprobs": [self._token(*each) for each in one.top]}
                for one in chosen
            ]
            return {"content": tokens, "refusal": None}
        texts = [self._legacy(one.token_id) for one in chosen]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        top = [{self._legacy(token_id): logprob for token_id, logprob in one.top} for one in chosen]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": top if self._top else None,
            "text_offset": offsets,
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._text_of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def _legacy(self, token_id: int) -> str:
        text, raw = self._text_of(token_id)
        return text if raw == text.encode("utf-8") else f"bytes:{text}"


def token_text(tokenizer: Any, token_id: int) -> tuple[str, bytes]:
    """A token's text and bytes. Of a piece that is one byte of a character the text is written `\\xNN`, as OpenAI has it."""
    piece = tokenizer.id_to_token(token_id)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        raw = bytes([int(piece[3:5], 16)])
        return (raw.decode() if raw.isascii() else f"\\x{raw[0]:02x}"), raw
    text = tokenizer.detokenize([token_id])
    return text, text.encode("utf-8")


def usage(prompt_tokens: int, reused: int, completion_tokens: int) -> dict[str, Any]:
    """The numbers of tokens of a request; `reused` of the prompts' were in the caches."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error, in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
