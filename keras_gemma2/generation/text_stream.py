"""Token ids to text while they come: only what later tokens cannot change is given out.

Two things keep text back. A character may take several byte tokens, and it is known only with the last of them. And the end
of the text may be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from keras_gemma2.plain_text import per_vocabulary

REPLACEMENT = "\ufffd"
_PRINTED = "<end_of_turn>"  # a piece that every Gemma vocabulary has, and that is printed as it is spelled


class TextStream:
    """Turns token ids into text piece by piece.

    The pieces add up to `tokenizer.detokenize` of all ids at once, cut where the first stop string begins. The work for a
    token does not grow with the text before it.

    Args:
        tokenizer: a `Gemma2Tokenizer`.
        stop_strings: where the text ends, as `read_stop_strings` takes them; the stop string itself is not given out.
        hidden_token_ids: ids that are left out, as if they were not there. With `tokenizer.special_token_ids` here and
            `(tokenizer.end_of_turn_token_id,)` next, the text is that of the preprocessor's `generate_postprocess`.
        closing_token_ids: ids that are left out at the end, and are text where more text follows them.

    Attributes:
        stopped: whether a stop string has come; no more text will.

    Example:
        >>> stream = TextStream(tokenizer, ["\\nUser:"])
        >>> for token_id in token_ids:
        ...     print(stream.push([token_id]), end="", flush=True)
        ...     if stream.stopped:
        ...         break
        >>> print(stream.finish())
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: str | Sequence[str] | None = None,
        hidden_token_ids: Collection[int] = (),
        closing_token_ids: Collection[int] = (),
    ) -> None:
        self._pieces = _Pieces(tokenizer)
        self._cut = _StopStrings(read_stop_strings(stop_strings))
        self._hidden, self._closing = frozenset(hidden_token_ids), frozenset(closing_token_ids)
        self._held: list[int] = []  # closing ids, until it is known whether they close

    @property
    def stopped(self) -> bool:
        return self._cut.stopped

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that is certain now, often none.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        if self.stopped:
            return ""
        return self._cut.push("".join(map(self._text, token_ids)))

    def finish(self) -> str:
        """Returns the text still held back. Bytes that make no character become U+FFFD."""
        return self._cut.push(self._pieces.finish()) + self._cut.finish()

    def _text(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        if token_id in self._closing:
            self._held.append(token_id)
            return ""
        ids, self._held = [*self._held, token_id], []
        return "".join(map(self._pieces.push, ids))


def read_stop_strings(stop_strings: str | Sequence[str] | None) -> tuple[str, ...]:
    """Checks stop strings: None for none, one string, or a list of them.

    Raises:
        TypeError: for anything else.
        ValueError: for an empty string, which stands everywhere.
    """
    if stop_strings is None:
        return ()
    strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"`stop_strings` must be a string, a list of strings, or None. Received: {stop_strings!r}.")
    if "" in strings:
        raise ValueError(f"`stop_strings` must not hold an empty string, which every text begins with. Received: {stop_strings!r}.")
    return tuple(dict.fromkeys(strings))


class _Pieces:
    """Ids to text. Bytes wait for the rest of their character; a character that does not come out is U+FFFD for each byte."""

    def __init__(self, tokenizer: Any) -> None:
        self._detokenize = tokenizer.detokenize
        self._bytes, self._texts = _byte_ids(tokenizer), _known_texts(tokenizer)
        self._pending = b""
        self._printed = [tokenizer.token_to_id(_PRINTED)]
        # Some vocabularies drop a space, or several, before the first text.
        self._at_start = True
        self._dropped: list[int] = []

    def push(self, token_id: int) -> str:
        if (byte := self._bytes.get(token_id)) is not None:
            self._pending += bytes([byte])
            return self._note(self._characters(final=False))
        text = self._note(self._characters(final=True))
        piece = self._texts.get(token_id)
        if piece is None:
            piece = self._texts[token_id] = self._detokenize([*self._printed, token_id]).removeprefix(_PRINTED)
        if self._at_start:
            within, piece = piece, self._detokenize([*self._dropped, token_id])
            if within and not piece:
                self._dropped = [token_id]
        return text + self._note(piece)

    def finish(self) -> str:
        return self._note(self._characters(final=True))

    def _note(self, text: str) -> str:
        self._at_start = self._at_start and not text
        return text

    def _characters(self, final: bool) -> str:
        """The pending bytes that are decided, one character after the other, as SentencePiece reads them."""
        text = ""
        while self._pending:
            length = _utf8_length(self._pending[0])
            character = self._pending[:length]
            if len(character) < length and not final and all(0x80 <= byte < 0xC0 for byte in character[1:]):
                break
            try:
                text += character.decode("utf-8")
            except UnicodeDecodeError:
                text, length = text + REPLACEMENT, 1
            self._pending = self._pending[length:]
        return text


@per_vocabulary
def _known_texts(tokenizer: Any) -> dict[int, str]:
    """What pieces print within a text, filled as they come: detokenizing one takes 0.2 ms."""
    return {}


@per_vocabulary
def _byte_ids(tokenizer: Any) -> dict[int, int]:
    """The bytes that a vocabulary has pieces for, by the pieces' ids."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = [tokenizer.token_to_id(name) for name in names]
    # A piece that is only spelled like a byte, and the unknown piece that stands for a missing one, print something else.
    texts = tokenizer.detokenize([[token_id] for token_id in ids])
    return {ids[byte]: byte for byte in range(256) if texts[byte] == (chr(byte) if byte < 0x80 else REPLACEMENT)}


def _utf8_length(first: int) -> int:
    """Bytes of the character that begins with this one; 1 where none can."""
    for length, (lowest, highest) in enumerate(((0xC2, 0xDF), (0xE0, 0xEF), (0xF0, 0xF4)), 2):
        if lowest <= first <= highest:
            return length
    return 1


class _StopStrings:
    """Passes text on up to the first stop string. Each is followed by Knuth, Morris and Pratt's automaton, a step a character.

    Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", SIAM J. Comput. 6 (1977).
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._patterns = [(string, _failures(string)) for string in stop_strings]
        self._matched = [0] * len(stop_strings)  # how many characters of each stop string the text ends with
        self._held = ""
        self._start: int | None = None  # of the first complete one, in `_held`
        self.stopped = False

    def push(self, text: str) -> str:
        if not self._patterns or self.stopped:
            return "" if self.stopped else text
        base, self._held = len(self._held), self._held + text
        for end, character in enumerate(text, base + 1):
            self._step(character, end)
            # An earlier one may still complete where they overlap.
            if self._start is not None and end - max(self._matched) >= self._start:
                return self._stop()
        keep = max(self._matched) if self._start is None else max(max(self._matched), len(self._held) - self._start)
        decided = len(self._held) - keep
        given, self._held = self._held[:decided], self._held[decided:]
        self._start = None if self._start is None else self._start - decided
        return given

    def finish(self) -> str:
        if self._start is not None:
            return self._stop()
        given, self._held = self._held, ""
        return given

    def _step(self, character: str, end: int) -> None:
        for i, (string, failures) in enumerate(self._patterns):
            count = self._matched[i]
            while count and character != string[count]:
                count = failures[count - 1]
            count += character == string[count]
            if count == len(string):
                start = end - count
                self._start = start if self._start is None else min(self._start, start)
                count = failures[count - 1]
            self._matched[i] = count

    def _stop(self) -> str:
        given, self._held = self._held[: self._start], ""
        self._start, self.stopped = None, True
        return given


def _failures(string: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix."""
    failures = [0] * len(string)
    count = 0
    for i in range(1, len(string)):
        while count and string[i] != string[count]:
            count = failures[count - 1]
        count += string[i] == string[count]
        failures[i] = count
    return failures
