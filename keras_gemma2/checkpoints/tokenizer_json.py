"""Hugging Face's `tokenizer.json` out of a SentencePiece model, and a SentencePiece model out of a `tokenizer.json`.

Both say the same in other words. SentencePiece joins two neighbours whose joined text is a piece, the piece with the highest
score first. A `tokenizer.json` lists the pairs that may be joined, the first one first. So a piece's score orders all ways
of making it among the merges, and back, the order of the pieces that merges make gives scores.

Format: https://huggingface.co/docs/tokenizers (the classes `BPE`, `Replace`, `AddedToken`, `TemplateProcessing`), and
https://github.com/google/sentencepiece/blob/master/src/bpe_model.cc for the order of merges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from keras_gemma2.checkpoints.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, build_model
from keras_gemma2.errors import CheckpointError

SPACE = "\u2581"  # what SentencePiece writes for a space
FRAME = ("<pad>", "<eos>", "<bos>")  # pieces that no text can spell
TURNS = ("<start_of_turn>", "<end_of_turn>")
BYTE_PIECES = [f"<0x{i:02X}>" for i in range(256)]
LARGEST_ID = 1 << 24  # scores are float32 and must stay apart


# Out --------------------------------------------------------------------------------------------------------------------


def to_tokenizer_json(proto: bytes) -> dict[str, Any]:
    """The content of a `tokenizer.json` that gives the ids of a SentencePiece model.

    User-defined pieces become added tokens, which are taken out of a text before anything is merged, as SentencePiece does.
    Two differences remain. The `tokenizers` library reads `<bos>`, `<eos>`, `<pad>` and `<unk>` in a text as tokens, where
    SentencePiece sees plain characters. And it puts `<bos>` in front, unless told `add_special_tokens=False`.

    Args:
        proto: a serialized SentencePiece model.

    Raises:
        CheckpointError: if it is not a BPE model with byte fallback and Gemma's (that is, no) normalization.

    Example:
        >>> values = to_tokenizer_json(tokenizer.proto)
        >>> ids = tokenizers.Tokenizer.from_str(json.dumps(values)).encode("Hello world!", add_special_tokens=False).ids
    """
    model = _parse(proto)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    unknown = next(piece for piece, _, kind in pieces if kind == UNKNOWN)
    bos = next((i for i, (piece, _, _) in enumerate(pieces) if piece == "<bos>"), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(pieces)),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": None if bos is None else _bos_first(bos),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, (piece, _, _) in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _parse(proto: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(proto)
    except DecodeError as error:
        raise CheckpointError(f"The vocabulary is not a SentencePiece model: {error}.") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    found = {
        "a BPE model": trainer.model_type == trainer.BPE,
        "with byte fallback": trainer.byte_fallback,
        "without a dummy prefix": not normalizer.add_dummy_prefix,
        "without normalization": not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces,
        "with an unknown piece": any(piece.type == UNKNOWN for piece in model.pieces),
    }
    lacking = [what for what, holds in found.items() if not holds]
    if lacking:
        raise CheckpointError(f"A tokenizer.json can be made of Gemma's kind of vocabulary only; this one is not {lacking[0]}.")
    return model


def _added_tokens(pieces: list[tuple[str, float, int]]) -> Iterator[dict[str, Any]]:
    for i, (piece, _, kind) in enumerate(pieces):
        special = kind == UNKNOWN or piece in (*FRAME, *TURNS)
        if special or kind == USER_DEFINED:
            # A run of spaces is looked for after spaces have become U+2581; all others in the text as it is.
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": SPACE in piece}
            yield {"id": i, "content": piece, **flags, "special": special}


def _bos_first(bos: int) -> dict[str, Any]:
    def special(row: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": "<bos>", "type_id": row}}

    def text(name: str, row: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": row}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
    }


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """Every pair of normal pieces that makes a normal piece, the highest score first."""
    normal = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    ordered = sorted(normal, key=normal.__getitem__, reverse=True)
    return [
        [piece[:i], piece[i:]]
        for piece in ordered
        for i in range(len(piece) - 1, 0, -1)
        if piece[:i] in normal and piece[i:] in normal
    ]


# In ---------------------------------------------------------------------------------------------------------------------


def from_tokenizer_json(values: Mapping[str, Any], path: str = "tokenizer.json") -> bytes:
    """The SentencePiece model that gives the ids of a `tokenizer.json`.

    Added tokens become user-defined pieces, those that frame a sequence control pieces (which no text can spell). Older files
    name the byte of a tab `"\\t"`; it gets its byte piece's name back.

    Args:
        values: the file's content.
        path: the file's, for messages.

    Returns:
        A serialized model.

    Raises:
        CheckpointError: if it is not a byte-fallback BPE vocabulary with the ids 0, 1, 2, ..., or one that contradicts
            itself. Names the file and the key.
    """
    model = values.get("model")
    if not isinstance(model, Mapping):
        raise _refusal(path, "model", "must hold the vocabulary", model)
    if model.get("type", "BPE") != "BPE":
        raise _refusal(path, "model.type", "must be 'BPE', as in every Gemma", model.get("type"))
    vocabulary = _vocabulary(model.get("vocab"), path)
    added = _added(values.get("added_tokens"), vocabulary, path)
    unknown = model.get("unk_token")
    if not isinstance(unknown, str) or unknown not in vocabulary:
        raise _refusal(path, "model.unk_token", "must be a piece of the vocabulary", unknown)
    rank = _made_pieces(model.get("merges"), vocabulary, path)
    pieces = _name_bytes(_in_order(vocabulary, path), path)
    return checked(build_model(_typed(pieces, added, unknown, rank, path)), path)


def _refusal(path: str, key: str, must: str, received: Any) -> CheckpointError:
    shown = repr(received)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    return CheckpointError(f"{path}: {key!r} {must}. Received: {shown}. Use the tokenizer.model that came with the weights.")


def is_id(value: Any) -> bool:
    """Whether something may be the id of a token."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_ID


def is_piece(text: Any) -> bool:
    """Whether something is a string that UTF-8 can write, and not empty."""
    return isinstance(text, str) and text != "" and not any("\ud800" <= character <= "\udfff" for character in text)


def _vocabulary(vocabulary: Any, path: str) -> dict[str, int]:
    if not isinstance(vocabulary, Mapping) or not vocabulary:
        raise _refusal(path, "model.vocab", "must map pieces to ids", vocabulary)
    for piece, token_id in vocabulary.items():
        if not is_piece(piece) or not is_id(token_id):
            raise _refusal(path, "model.vocab", "must map pieces to ids, which are small integers from 0", {piece: token_id})
    return dict(vocabulary)


def _added(tokens: Any, vocabulary: dict[str, int], path: str) -> set[str]:
    """The contents of the added tokens. They join the vocabulary; one with the id of a plain piece takes its place."""
    tokens = [] if tokens is None else tokens
    if not isinstance(tokens, list):
        raise _refusal(path, "added_tokens", "must be a list", tokens)
    added: set[str] = set()
    plain = {token_id: piece for piece, token_id in vocabulary.items()}
    for token in tokens:
        content, token_id = (token.get("content"), token.get("id")) if isinstance(token, Mapping) else (None, None)
        if not is_piece(content) or not is_id(token_id):
            raise _refusal(path, "added_tokens", "must hold tokens with an 'id' and a 'content'", token)
        content = content if content in vocabulary else content.replace(" ", SPACE)  # as SentencePiece looks for it
        if content not in vocabulary and plain.get(token_id) not in added:  # a fine-tune's name for an unused piece
            vocabulary.pop(plain.get(token_id), None)
        if vocabulary.setdefault(content, token_id) != token_id:
            raise _refusal(path, "added_tokens", f"must agree with the vocabulary, where it has id {vocabulary[content]}", token)
        added.add(content)
    return added


def _in_order(vocabulary: dict[str, int], path: str) -> list[str]:
    pieces: list[str | None] = [None] * len(vocabulary)
    for piece, token_id in vocabulary.items():
        if token_id >= len(pieces):
            missing = min(set(range(len(pieces))) - set(vocabulary.values()))
            raise _refusal(path, "model.vocab", f"must use every id; id {missing} is missing", {piece: token_id})
        if pieces[token_id] is not None:
            raise _refusal(path, "model.vocab", "must give an id once", {pieces[token_id]: token_id, piece: token_id})
        pieces[token_id] = piece
    return pieces


def _name_bytes(pieces: list[str], path: str) -> list[str]:
    """Checks that every byte has a piece; gives the tab's, which older files rename, its name back."""
    missing = sorted(set(BYTE_PIECES) - set(pieces))
    if missing == ["<0x09>"] and "\t" in pieces:
        return ["<0x09>" if piece == "\t" else piece for piece in pieces]
    if missing:
        raise _refusal(
            path, "model.vocab", f"must hold a piece for every byte, as in every Gemma; {missing[0]} is missing", missing
        )
    return pieces


def _made_pieces(merges: Any, vocabulary: dict[str, int], path: str) -> dict[str, int]:
    """The pieces that merges make and the place of the first merge of each among those."""
    if not isinstance(merges, list):
        raise _refusal(path, "model.merges", "must be a list", merges)
    rank: dict[str, int] = {}
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_part, pair)):
            raise _refusal(path, "model.merges", "must hold pairs of pieces, or 'a b'", merge)
        first, second = pair
        if first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise _refusal(path, "model.merges", "must be of pieces of the vocabulary that make another one", merge)
        rank.setdefault(first + second, len(rank))
    return rank


def _is_part(text: Any) -> bool:
    return isinstance(text, str) and text != ""


def _typed(pieces: list[str], added: set[str], unknown: str, rank: dict[str, int], path: str) -> Iterator[tuple[str, float, int]]:
    """Pieces with score and type: what merges make comes first, then single characters, which nothing makes."""
    kinds = {**dict.fromkeys(added, USER_DEFINED), **dict.fromkeys(BYTE_PIECES, BYTE), **dict.fromkeys(FRAME, CONTROL)}
    kinds[unknown] = UNKNOWN
    for i, piece in enumerate(pieces):
        if (kind := kinds.get(piece)) is not None:
            yield piece, 0.0, kind
        elif piece in rank:
            yield piece, -float(rank[piece]), NORMAL
        else:  # a longer piece that no merge makes must not be made here either
            yield piece, -float(len(rank) + i), NORMAL if len(piece) == 1 else CONTROL


def checked(proto: bytes, path: str) -> bytes:
    """A model that SentencePiece takes; a CheckpointError for another one."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: SentencePiece cannot work with this vocabulary ({error}).") from error
    return proto
