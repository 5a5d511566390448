"""Conversations as token ids, in Gemma's chat format.

Format: https://ai.google.dev/gemma/docs/core/prompt-structure
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keras_gemma2.plain_text import encode_texts
from keras_gemma2.text_inputs import read_texts, shorten
from keras_gemma2.tokenizer import Gemma2Tokenizer

USER, MODEL, SYSTEM = "user", "model", "system"
_ROLES = {"user": USER, "model": MODEL, "assistant": MODEL, "system": SYSTEM}


class Turn(NamedTuple):
    """One turn of a conversation: `"user"` or `"model"`, and what was said."""

    role: str
    text: str


def chat_token_ids(
    tokenizer: Gemma2Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    allow_control_pieces: bool = False,
) -> list[int]:
    """Writes a conversation as the token ids that Gemma was tuned on.

    The ids are those of `<bos>`, and for each turn of `<start_of_turn>{role}\\n{content}<end_of_turn>\\n`, where the role is
    `user` or `model` and the content has no white space at either end. Gemma has no system role: a system message's text
    is put in front of the first user's, with an empty line between them.

    Args:
        tokenizer: of the model.
        messages: a list of dicts `{"role", "content"}`. Roles are `"user"` and `"model"` (or `"assistant"`, which means the
            same) in turn, beginning with `"user"`; before them there may be one `"system"`. A content is a string, or a list
            of `{"type": "text", "text": string}`, which are joined. Other keys are not looked at.
        add_generation_prompt: whether `<start_of_turn>model\\n` comes last, so that the model answers. The last message
            must then be the user's.
        allow_control_pieces: whether `<end_of_turn>`, `<bos>` and other markers spelled out in a content become their
            tokens. By default they are plain text, so that nobody's words can end a turn or begin another.

    Returns:
        Token ids, `<bos>` first. They may be more than a model's context has room for: `generate` and `Chat` check that.

    Raises:
        TypeError: if `messages` is no list, a message no dict, or a content no text.
        ValueError: for an empty list, a missing key, an unknown role, roles out of order, a turn without text, or text that
            has no UTF-8 form. Names the message by its index.

    Example:
        >>> messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
        >>> chat_token_ids(lm.preprocessor.tokenizer, messages)
        [2, 106, 1645, 108, 2448, 9091, 235265, 109, 2151, 235341, 107, 108, 106, 2516, 108]
    """
    chat_format = ChatFormat(tokenizer, allow_control_pieces)
    return chat_format.conversation(read_messages(messages, add_generation_prompt), add_generation_prompt)


class ChatFormat:
    """Gemma's chat format with one tokenizer's ids.

    Args:
        tokenizer: a `Gemma2Tokenizer` with a vocabulary.
        allow_control_pieces: as for `chat_token_ids`.

    Raises:
        TypeError: for another tokenizer.
        ValueError: if it has no vocabulary.
    """

    def __init__(self, tokenizer: Gemma2Tokenizer, allow_control_pieces: bool = False) -> None:
        _check_tokenizer(tokenizer)
        self._tokenizer, self._markers = tokenizer, allow_control_pieces
        self._bos, self._start = tokenizer.start_token_id, tokenizer.start_of_turn_token_id
        self.end_of_turn = tokenizer.end_of_turn_token_id
        self._newline, model = self.encode(["\n", f"{MODEL}\n"])
        self._answer = [self._start, *model]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of parts of turns."""
        return encode_texts(self._tokenizer, texts, self._markers)

    def conversation(self, turns: Sequence[Turn], add_generation_prompt: bool = True) -> list[int]:
        """A whole conversation from `<bos>` on."""
        ids = self.lesson(turns)[0]
        return ids + self._answer if add_generation_prompt else ids

    def lesson(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """A conversation from `<bos>` on, and which of its tokens the model is to say: its own texts, each with `<end_of_turn>`."""
        ids, said = [self._bos], [False]
        given = self._answer[1:]
        # Role and text are one string: the tokens of a text can depend on what stands before it.
        for turn, content in zip(turns, self.encode([f"{turn.role}\n{turn.text}" for turn in turns])):
            ids += [self._start, *content, self.end_of_turn, *self._newline]
            before = next((i for i, (a, b) in enumerate(zip(given, content)) if a != b), len(given))
            own = [turn.role == MODEL] * (len(content) - before + 1)
            said += [False] * (1 + before) + own + [False] * len(self._newline)
        return ids, said

    def next_turn(self, text: str) -> list[int]:
        """What follows the `<end_of_turn>` of an answer: the user's next turn and the beginning of the model's."""
        content = self.encode([f"{USER}\n{text}"])[0]
        return [*self._newline, self._start, *content, self.end_of_turn, *self._newline, *self._answer]


def read_messages(messages: Sequence[Mapping[str, Any]], to_answer: bool = True, allow_empty_answers: bool = False) -> list[Turn]:
    """Checks messages and makes turns of them: texts stripped, the system's text inside the first of the user.

    Args:
        messages: as for `chat_token_ids`.
        to_answer: whether the last one must be the user's.
        allow_empty_answers: whether the model may have said nothing.

    Raises:
        TypeError, ValueError: as for `chat_token_ids`.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(
            "`messages` must be a list of dicts such as {'role': 'user', 'content': 'Hello!'}. "
            f"Received: {shorten(messages)}, of type {type(messages).__name__}."
        )
    turns = [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    preface = turns[0].text if turns and turns[0].role == SYSTEM else ""
    first = int(bool(turns) and turns[0].role == SYSTEM)
    turns = turns[first:]
    _check_order(turns, first, to_answer)
    for i, turn in enumerate(turns, first):
        if not turn.text and not (allow_empty_answers and turn.role == MODEL):
            raise ValueError(
                f"`messages[{i}]['content']` must have some text besides white space. "
                f"Received: {shorten(messages[i]['content'])}. Leave out turns in which nothing is said."
            )
    if preface:
        turns[0] = Turn(USER, f"{preface}\n\n{turns[0].text}")
    return turns


def read_content(content: Any, name: str) -> str:
    """A content, string or list of text parts, as one string without white space at its ends.

    Raises:
        TypeError: if it is neither.
        ValueError: if it has no UTF-8 form.
    """
    if isinstance(content, (list, tuple)):
        content = "".join(_read_part(part, f"{name}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise TypeError(
            f"`{name}` must be a string, or a list of {{'type': 'text', 'text': ...}}. "
            f"Received: {shorten(content)}, of type {type(content).__name__}."
        )
    return read_texts(content, name).strip()


def _read_part(part: Any, name: str) -> str:
    is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    if not is_text:
        raise TypeError(
            f"`{name}` must be {{'type': 'text', 'text': string}}: Gemma 2 reads text alone. Received: {shorten(part)}."
        )
    return part["text"]


def _read_message(message: Any, name: str) -> Turn:
    if not isinstance(message, Mapping):
        raise TypeError(
            f"`{name}` must be a dict such as {{'role': 'user', 'content': 'Hello!'}}. "
            f"Received: {shorten(message)}, of type {type(message).__name__}."
        )
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise ValueError(f"`{name}` lacks the key {missing[0]!r}. Received a dict with the keys {shorten(list(message))}.")
    role = message["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(
            f"`{name}['role']` must be 'user', 'model' ('assistant' means it too) or 'system'. Received: {shorten(role)}."
        )
    return Turn(_ROLES[role], read_content(message["content"], f"{name}['content']"))


def _check_order(turns: list[Turn], first: int, to_answer: bool) -> None:
    """Raises unless user and model alternate, and the last turn is to be answered. `first`: the first turn's index."""
    if not turns:
        received = "one of the system alone" if first else "an empty list"
        raise ValueError(f"`messages` must hold at least one message of the user. Received: {received}.")
    for i, turn in enumerate(turns):
        name, expected = f"messages[{i + first}]", MODEL if i % 2 else USER
        if turn.role == SYSTEM:
            raise ValueError(f"`{name}` is a system message, which can only be the first. Move it there, or into a user's message.")
        if turn.role != expected:
            mend = "Join their contents into one message" if i else "Drop it, or put what it answers in front"
            before = f"follows another of the {turn.role}" if i else "is the first turn"
            raise ValueError(
                f"`{name}` must be of the {expected}: user and model take turns, and the user begins. It is of the {turn.role} "
                f"and {before}. {mend}."
            )
    if to_answer and turns[-1].role == MODEL:
        raise ValueError(
            f"`messages[{len(turns) - 1 + first}]`, the last one, is of the model, so there is nothing to answer. End with a "
            "message of the user, or pass `add_generation_prompt=False` to have the conversation as it is."
        )


def _check_tokenizer(tokenizer: Any) -> None:
    if not isinstance(tokenizer, Gemma2Tokenizer):
        raise TypeError(
            f"`tokenizer` must be a `Gemma2Tokenizer`, which knows the pieces that frame a turn. Received: {shorten(tokenizer)}, "
            f"of type {type(tokenizer).__name__}. `lm.preprocessor.tokenizer` is one."
        )
    if tokenizer.proto is None:
        raise ValueError("`tokenizer` has no vocabulary yet. Pass `proto=` to it, or call its `load_assets`.")
