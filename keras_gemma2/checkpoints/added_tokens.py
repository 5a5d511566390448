"""Tokens that a fine-tune added to a vocabulary: named beside tokenizer.model, which itself stays as it was.

transformers 4 writes them to `tokenizer_config.json` (`added_tokens_decoder`) or `added_tokens.json`, transformers 5 to
`tokenizer.json` alone: https://huggingface.co/docs/transformers/main_classes/tokenizer
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from keras_gemma2.checkpoints.sentencepiece_model import CONTROL, USER_DEFINED
from keras_gemma2.checkpoints.source import TOKENIZER_JSON_FILE, find_file, read_json, shown
from keras_gemma2.errors import CheckpointError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
MOST_HOLES = 1 << 16  # ids without a token; far above what rounding up the embedding's rows makes
_HEAD = 1 << 20  # bytes of a tokenizer.json in which its added tokens stand; Gemma's have 50 KB
_RESERVED = re.compile("<unused[0-9]+>")  # pieces that stand in the vocabulary to be given a meaning


def with_added_tokens(proto: bytes, folder: str, rows: int) -> bytes:
    """A SentencePiece model with the tokens that the other files of its folder add.

    An added token becomes a user-defined piece, which is one token wherever a text has it. One with the id of an
    `<unusedN>` takes its place; ids that nothing names get a piece that no text can spell. Tokens
    without a row in the embedding are left out.

    Args:
        proto: the content of tokenizer.model.
        folder: where it is from.
        rows: of the embedding.

    Raises:
        CheckpointError: if a file is damaged, or two tokens have one id.
    """
    from sentencepiece import sentencepiece_model_pb2

    from keras_gemma2.checkpoints.tokenizer_json import checked

    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    count = len(model.pieces)
    differing = [
        (path, content, token_id)
        for path, content, token_id in _named(folder, more=rows > count)
        if token_id < rows and (token_id >= count or model.pieces[token_id].piece != content)
    ]
    known = {piece.piece for piece in model.pieces} if differing else set()
    named: dict[int, str] = {}
    for path, content, token_id in differing:
        if content in known:
            continue
        if named.setdefault(token_id, content) != content:
            raise CheckpointError(f"{path} gives the id {token_id} to {shown(content)}; {shown(named[token_id])} has it already.")
    named = _each_once(named)
    changed = {i: content for i, content in named.items() if i >= count or _RESERVED.fullmatch(model.pieces[i].piece)}
    if not changed:
        return proto
    last = max(changed)
    if last - count - len(changed) > MOST_HOLES:
        raise CheckpointError(f"{folder}: the added token {shown(changed[last])} has the id {last}, far beyond the {count} pieces.")
    for i in range(count, last + 1):
        model.pieces.add(piece=f"<no token {i}>", score=0.0, type=CONTROL)
    for i, content in changed.items():
        model.pieces[i].piece, model.pieces[i].score, model.pieces[i].type = content, 0.0, USER_DEFINED
    model.trainer_spec.vocab_size = len(model.pieces)
    return checked(model.SerializeToString(), folder)


def needs_tokenizer_json(proto: bytes, folder: str, rows: int) -> bool:
    """Whether only tokenizer.json can tell what the embedding's last rows are."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        count = len(sentencepiece_model_pb2.ModelProto.FromString(proto).pieces)
    except DecodeError:
        return False  # whoever reads it for good says so
    return rows > count and all(token_id < count for _, _, token_id in _small_files(folder))


def _each_once(named: Mapping[int, str]) -> dict[int, str]:
    """SentencePiece takes no piece twice; the first id counts."""
    first = {content: token_id for token_id, content in sorted(named.items(), reverse=True)}
    return {token_id: content for content, token_id in first.items()}


def _named(folder: str, more: bool) -> Iterator[tuple[str, str, int]]:
    """File, content and id of every added token, each file's in turn. `more`: whether there must be some beyond the model."""
    yield from _small_files(folder)
    path = find_file(folder, TOKENIZER_JSON_FILE)
    if path is None:
        return
    tokens = _tokens_in_head(path)
    if tokens is None and more:
        tokens = read_json(path).get("added_tokens")
    if not isinstance(tokens, (list, type(None))):
        raise _refusal(path, "added_tokens", tokens)
    for token in tokens or ():
        if not isinstance(token, Mapping):
            raise _refusal(path, "added_tokens", token)
        yield _checked(path, "added_tokens", token.get("content"), token.get("id"))


def _small_files(folder: str) -> Iterator[tuple[str, str, int]]:
    path = find_file(folder, TOKENIZER_CONFIG_FILE)
    if path is not None:
        key = "added_tokens_decoder"
        for token_id, token in _items(path, key, read_json(path).get(key)):
            content = token.get("content") if isinstance(token, Mapping) else token
            number = int(token_id) if re.fullmatch("[0-9]{1,9}", token_id) else token_id
            yield _checked(path, key, content, number)
    path = find_file(folder, ADDED_TOKENS_FILE)
    if path is not None:
        for content, token_id in read_json(path).items():
            yield _checked(path, content, content, token_id)


def _items(path: str, key: str, values: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(values, (Mapping, type(None))):
        raise _refusal(path, key, values)
    return (values or {}).items()


def _tokens_in_head(path: str) -> Any:
    """The added tokens of a tokenizer.json, which stand before the 30 MB of its vocabulary; None if they do not."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD).decode("utf-8-sig", errors="ignore")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    start = re.match(r'\s*\{[^\[]*?"added_tokens"\s*:\s*(?=\[)', head)
    if start is None:
        return None
    try:
        return json.JSONDecoder().raw_decode(head, start.end())[0]
    except (ValueError, RecursionError):
        return None


def _checked(path: str, key: str, content: Any, token_id: Any) -> tuple[str, str, int]:
    from keras_gemma2.checkpoints.tokenizer_json import SPACE, is_id, is_piece

    if not is_piece(content) or not is_id(token_id) or "\0" in content:
        raise _refusal(path, key, {token_id: content} if isinstance(token_id, (str, int)) else token_id)
    return path, content.replace(" ", SPACE), token_id


def _refusal(path: str, key: str, received: Any) -> CheckpointError:
    return CheckpointError(
        f"{path}: {shown(key)} must name added tokens, each a text with an id. Received: {shown(received)}. Download it again."
    )
