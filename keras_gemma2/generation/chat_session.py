"""`Chat`: a conversation with a model, one answer after the other."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from keras_gemma2.chat import MODEL, SYSTEM, USER, read_content, read_messages
from keras_gemma2.generation.answers import Answers

VERSION = 1  # of saved conversations


class Chat:
    """A conversation that remembers: each answer runs only what is new through the model.

    The model sees its own answers in the very tokens it chose. An answer that is stopped early, by closing the iterator or by
    Ctrl-C, stays as far as it was given out; if nothing was, the message it would have answered is withdrawn too.

    Args:
        lm: a `Gemma2CausalLM` with a preprocessor. Its weights must not change meanwhile.
        system: text for the model to follow, put in front of the first message.
        sampler: a `keras_gemma2.Sampler`, or "greedy"; None means what `lm.compile` was given, greedy by default.
        max_new_tokens: tokens of an answer at most; None for what the context has room for.
        seed: an integer that makes the answers repeatable; None draws one for each answer.
        stop_strings: a text, or several, that end an answer where they come up; they are not part of it.
        allow_control_pieces: as for `chat_token_ids`.

    Attributes:
        session: the `Session` with the tokens so far; its `prefilled` tells how many the last answer had to run first.

    Raises:
        ValueError: for a model without a preprocessor, or options outside their ranges.

    Example:
        >>> chat = keras_gemma2.Chat(lm, system="Be brief.", sampler=keras_gemma2.Sampler(temperature=0.7), seed=1)
        >>> chat.send("Name a colour.")
        >>> for piece in chat.stream("Another one?"):
        ...     print(piece, end="", flush=True)
        >>> chat.save("colours.json")
    """

    def __init__(
        self,
        lm: Any,
        system: str | None = None,
        sampler: Any = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        allow_control_pieces: bool = False,
    ) -> None:
        self._answers = Answers(lm, sampler, max_new_tokens, seed, stop_strings, allow_control_pieces)
        self._system = "" if system is None else read_content(system, "system")
        self._turns: list[dict[str, str]] = []
        self._running: Iterator[str] | None = None
        self.session = lm.open_session()

    @property
    def messages(self) -> list[dict[str, str]]:
        """A copy of what was said: dicts `{"role", "content"}` with the roles "system", "user" and "model"."""
        system = [{"role": SYSTEM, "content": self._system}] if self._system else []
        return [*system, *({**turn} for turn in self._turns)]

    def send(self, text: str) -> str:
        """Says something to the model and returns its whole answer; otherwise as `stream`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """Says something to the model.

        Args:
            text: what the user says, as a content of `chat_token_ids`.

        Returns:
            An iterator over the pieces of the answer. Nothing is said before its first piece is asked for. Another message ends
            an answer that is not yet complete.

        Raises:
            TypeError: for something else than text.
            ValueError: for text without any, or if the model's context has no room for it and a token of an answer; the
                conversation is then as before.
        """
        self._end_running()
        content = read_content(text, "text")
        if not content:
            raise ValueError(f"`text` must have some text besides white space. Received: {text!r}.")
        self._running = self._answer(content, self._new_token_ids(content))
        return self._running

    def reset(self) -> None:
        """Forgets what was said; the system's text and the options stay."""
        self._end_running()
        self._turns = []
        self.session = self._answers.lm.open_session()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the messages to a JSON file, which changes in one step. A message without an answer yet is left out.

        Raises:
            OSError: if it cannot be written.
        """
        path = os.fspath(path)
        system = len(self.messages) - len(self._turns)
        values = {"version": VERSION, "messages": self.messages[: system + len(self._turns) // 2 * 2]}
        beside = f"{path}.{os.getpid()}.part"
        try:
            with open(beside, "w", encoding="utf-8") as file:
                json.dump(values, file, indent=2, ensure_ascii=False)
                file.write("\n")
            os.replace(beside, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(beside)

    @classmethod
    def load(cls, lm: Any, path: str | os.PathLike[str], **options: Any) -> Chat:
        """A conversation from a file that `save` wrote, with a model and options as the constructor takes them.

        The first answer runs the whole of it through the model.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if there is no conversation in it; names the file and what is wrong.
        """
        system, turns = read_saved(os.fspath(path))
        chat = cls(lm, system=system or None, **options)
        chat._turns = turns
        return chat

    def _new_token_ids(self, content: str) -> list[int]:
        form = self._answers.format
        if self.session.token_ids:
            ids = [form.end_of_turn, *form.next_turn(content)]
        else:
            ids = form.conversation(read_messages([*self.messages, {"role": USER, "content": content}], allow_empty_answers=True))
        self._answers.check_room(len(self.session.token_ids), len(ids))
        return ids

    def _answer(self, content: str, new_token_ids: list[int]) -> Iterator[str]:
        session, turns, before = self.session, self._turns, len(self.session.token_ids)
        session.extend(new_token_ids)
        start, answer, complete = len(session.token_ids), "", False
        turns.append({"role": USER, "content": content})
        try:
            with contextlib.closing(self._answers.pieces(session)) as pieces:
                for piece in pieces:
                    answer += piece
                    yield piece
            complete = True
        finally:
            if answer or complete:
                self._answers.keep(session, start, answer)
                turns.append({"role": MODEL, "content": answer})
            else:
                session.truncate(before)
                turns.pop()

    def _end_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def read_saved(path: str) -> tuple[str, list[dict[str, str]]]:
    """The system's text and the turns of a saved conversation.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if there is no conversation in it.
    """
    with open(path, encoding="utf-8") as file:
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must be a conversation that `Chat.save` wrote. It is no JSON: {error}.") from error
    if not isinstance(values, dict) or values.get("version") != VERSION or not isinstance(values.get("messages"), list):
        raise ValueError(f"{path} must be a conversation that `Chat.save` wrote, with 'version': {VERSION} and 'messages'.")
    messages, system = values["messages"], ""
    try:
        if messages and isinstance(messages[0], dict) and messages[0].get("role") == SYSTEM:
            system, messages = read_content(messages[0].get("content"), "messages[0]['content']"), messages[1:]
        turns = read_messages(messages, to_answer=False, allow_empty_answers=True) if messages else []
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a conversation that `Chat.save` wrote. {error}") from error
    if len(turns) % 2:
        raise ValueError(f"{path} must be a conversation that `Chat.save` wrote: it ends with a message that has no answer.")
    # As they were written; what the model reads is stripped later.
    contents = [m["content"] if isinstance(m["content"], str) else turn.text for m, turn in zip(messages, turns)]
    return system, [{"role": turn.role, "content": content} for turn, content in zip(turns, contents)]
