"""Training data from a .jsonl file: one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from keras_gemma2.chat import read_messages
from keras_gemma2.text_inputs import shorten

# The keys of a row, by kind. Other keys are not looked at.
_KINDS = {
    ("text",): "texts",
    ("prompt", "response"): "pairs",
    ("prompt", "completion"): "pairs",
    ("messages",): "conversations",
}
_EXPECTED = 'a JSON object with "text"; "prompt" and "response" (or "completion"); or "messages"'


def read_jsonl(path: str | os.PathLike[str]) -> list[str] | dict[str, list[str]] | list[list[dict[str, Any]]]:
    """Reads a .jsonl file as what `lm.fit` takes.

    Each line is a JSON object with `"text"`; with `"prompt"` and `"response"` (or `"completion"`); or with `"messages"`, a list of
    `{"role", "content"}`. All are of one kind. Other keys are not looked at; empty lines are left out.

    Args:
        path: of the file, in UTF-8.

    Returns:
        A list of texts; `{"prompts": [...], "responses": [...]}`; or a list of conversations.

    Raises:
        OSError: if there is no such file.
        ValueError: for a line that is anything else, rows of two kinds, or a file without rows. Names file and line.

    Example:
        >>> with open("data.jsonl", "w") as file:
        ...     _ = file.write('{"prompt": "Who was Ahab?", "response": "A captain."}\\n')
        >>> lm.fit(keras_gemma2.read_jsonl("data.jsonl"))
    """
    rows, first = [], None
    for number, place, row in _rows(path):
        keys = _keys(row, place)
        first = first or (number, keys)
        if _KINDS[keys] != _KINDS[first[1]]:
            raise ValueError(
                f"{place}: all rows must be of one kind. Line {first[0]} has {_quoted(first[1])}, this one {_quoted(keys)}. "
                "Put them into files of their own."
            )
        rows.append(tuple(_read(row[key], key, place) for key in keys))
    if first is None:
        raise ValueError(f"{os.fspath(path)} has no rows. Expected in each line: {_EXPECTED}.")
    if _KINDS[first[1]] == "pairs":
        return dict(zip(("prompts", "responses"), map(list, zip(*rows))))
    return [row[0] for row in rows]


def _rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, str, Any]]:
    """The number of each line, what errors call it, and what it holds."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{os.fspath(path)}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, place, json.loads(text)
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is not UTF-8: byte {error.start} of the line is {line[error.start]:#x}.") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{place} is not JSON ({error}). Expected {_EXPECTED}. Received: {shorten(text)}.") from None


def _keys(row: Any, place: str) -> tuple[str, ...]:
    """Which keys of the row are read."""
    fitting = [keys for keys in _KINDS if isinstance(row, Mapping) and all(key in row for key in keys)]
    if len(fitting) != 1:
        received = "fits several of them" if fitting else "fits none of them"
        keys = f"an object with the keys {sorted(row)}" if isinstance(row, Mapping) else shorten(row)
        raise ValueError(f"{place}: expected {_EXPECTED}. Received {keys}, which {received}.")
    return fitting[0]


def _read(value: Any, key: str, place: str) -> Any:
    if key == "messages":
        try:
            read_messages(value, to_answer=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from None
        return value
    if not isinstance(value, str):
        raise ValueError(f'{place}: "{key}" must be a string. Received: {shorten(value)}.')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'{place}: "{key}" has a lone surrogate at position {error.start}, which UTF-8 cannot write.') from None
    return value


def _quoted(keys: tuple[str, ...]) -> str:
    return " and ".join(f'"{key}"' for key in keys)
