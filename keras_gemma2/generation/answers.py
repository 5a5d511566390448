"""`lm.chat(messages)`: one answer, and what `Chat` is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keras_gemma2.chat import ChatFormat, read_messages
from keras_gemma2.generation.requests import check_length, read_sampler
from keras_gemma2.generation.text_stream import TextStream, read_stop_strings


class Answers:
    """How a model answers: checked options, and tokens made into text."""

    def __init__(
        self, lm: Any, sampler: Any, max_new_tokens: int | None, seed: Any, stop_strings: Any, allow_control_pieces: bool
    ) -> None:
        if lm.preprocessor is None:
            raise ValueError(
                "A chat needs a model with a preprocessor, whose tokenizer reads text. Pass `preprocessor=` to Gemma2CausalLM."
            )
        samplers, _ = read_sampler(lm, sampler, seed, 1, 0)
        if not isinstance(samplers, list):
            raise ValueError(
                "`sampler` must be a keras_gemma2.Sampler or 'greedy' for a chat; keras-hub's run one call at a time. "
                f"Received: {type(samplers).__name__}."
            )
        self.lm, self.tokenizer = lm, lm.preprocessor.tokenizer
        self.format = ChatFormat(self.tokenizer, allow_control_pieces)
        self._max_new_tokens = None if max_new_tokens is None else check_length("max_new_tokens", max_new_tokens, None)
        self._sampler, self._seed, self._stop_strings = sampler, seed, read_stop_strings(stop_strings)

    def check_room(self, before: int, new: int) -> None:
        """Raises a ValueError unless there is room for so many tokens and one of an answer."""
        context = self.lm.backbone.config.max_sequence_length
        if before + new >= context:
            raise ValueError(
                f"The conversation has {before} tokens and {new} more are to come, but the model's context has room for {context}, "
                "its answer included. Begin anew with `Chat.reset()`, leave out old messages, or shorten this one."
            )

    def pieces(self, session: Any) -> Iterator[str]:
        """Runs a session's new tokens and gives the text of the answer as it is decided."""
        stops, text = self.tokenizer.stop_token_ids, self._text(self._stop_strings)
        tokens = session.stream(self._max_new_tokens, self._sampler, self._seed, stops)
        with contextlib.closing(tokens):
            for token_id in tokens:
                if token_id in stops:
                    break
                if piece := text.push([token_id]):
                    yield piece
                if text.stopped:
                    return
        if piece := text.finish():
            yield piece

    def keep(self, session: Any, start: int, answer: str) -> None:
        """Leaves of the tokens from `start` on those that say the answer.

        What goes is the token that ended it, a stop string, and text that was held back when it was interrupted. Where the
        answer ends within a token, its last part is written in other tokens.
        """
        text, length, kept, said = self._text(), 0, 0, 0
        for count, token_id in enumerate(session.token_ids[start:], 1):
            length += len(text.push([token_id]))
            if said < length <= len(answer):
                kept, said = count, length
        session.truncate(start + kept)
        rest = self.format.encode([answer[said:]])[0] if said < len(answer) else []
        session.extend(rest[: self.lm.backbone.config.max_sequence_length - start - kept])

    def _text(self, stop_strings: Sequence[str] = ()) -> TextStream:
        return TextStream(self.tokenizer, stop_strings, hidden_token_ids=self.tokenizer.special_token_ids)


class Chats:
    """The call `chat` of a causal language model, over its `open_session` and `preprocessor`."""

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        stream: bool = False,
        sampler: Any = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        allow_control_pieces: bool = False,
    ) -> str | Iterator[str]:
        """Answers the last of a conversation's messages.

        Args:
            messages: dicts `{"role", "content"}`, as `keras_gemma2.chat_token_ids` takes them; the last one is the user's.
            stream: whether to return an iterator over pieces of the answer, as they are decided, in place of all of it.
            sampler, max_new_tokens, seed, stop_strings, allow_control_pieces: as `keras_gemma2.Chat` takes them.

        Returns:
            The answer, without the token that ended it.

        Raises:
            TypeError, ValueError: for messages that are no conversation, too many of them for the model's context, a model
                without a preprocessor, or options outside their ranges.

        Example:
            >>> lm.chat([{"role": "user", "content": "Name a colour."}], max_new_tokens=20)
        """
        answers = Answers(self, sampler, max_new_tokens, seed, stop_strings, allow_control_pieces)
        token_ids = answers.format.conversation(read_messages(messages))
        answers.check_room(0, len(token_ids))
        session = self.open_session()
        session.extend(token_ids)
        pieces = answers.pieces(session)
        return pieces if stream else "".join(pieces)
