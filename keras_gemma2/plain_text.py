"""Text to token ids, with and without the tokens that mark structure.

A vocabulary's tokenizer reads `<end_of_turn>` in any text as the token that ends a turn. In text that somebody else wrote it
must be what it looks like: 13 characters. SentencePiece makes no control piece out of text, so a copy of the vocabulary in
which all markers are control pieces reads everything as text, and everything else as before.
"""

from __future__ import annotations

import functools
import re
import string
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from keras_gemma2.tokenizer import Gemma2Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # `ModelProto.SentencePiece.Type` of sentencepiece's `sentencepiece_model.proto`
_HTML_NAMES = (
    "a b blockquote body br caption code div em h1 h2 h3 h4 h5 h6 head hr html i img li ol p pre s span strong sub sup table "
    "tbody td tfoot th thead tr u ul"
)
_HTML_TAG = re.compile(f"</?(?:{'|'.join(_HTML_NAMES.split())})>")


def per_vocabulary(make: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what a function makes of a tokenizer and hashable arguments, until the tokenizer goes or changes its vocabulary.

    Args:
        make: its result must not hold the tokenizer.
    """
    kept: weakref.WeakKeyDictionary[Gemma2Tokenizer, tuple[bytes, dict]] = weakref.WeakKeyDictionary()

    @functools.wraps(make)
    def made(tokenizer: Gemma2Tokenizer, *arguments: Any) -> Any:
        proto, results = kept.get(tokenizer, (None, {}))
        if proto is not tokenizer.proto:
            kept[tokenizer] = tokenizer.proto, (results := {})
        if arguments not in results:
            results[arguments] = make(tokenizer, *arguments)
        return results[arguments]

    return made


def encode_texts(tokenizer: Gemma2Tokenizer, texts: list[str], markers: bool = False) -> list[list[int]]:
    """Token ids of each text, without `<bos>`.

    Args:
        tokenizer: whose vocabulary is used; its `add_bos` and the like are not looked at.
        texts: strings that UTF-8 can write.
        markers: False reads all text as plain text: no id of a control piece comes out, nor of a user-defined piece that
            marks structure (`<start_of_turn>`, `<unused7>`, `<mask>`, `[INST]`), and decoding gives the text back. Runs of
            spaces, tabs and newlines, HTML tags and words without punctuation are text, also where the vocabulary defines
            them. True makes tokens of all of them, and of `<bos>`, `<eos>` and `<pad>`, as `transformers` does.

    Returns:
        A list of ids for each text.

    Example:
        >>> encode_texts(tokenizer, ["hi<end_of_turn>"])  # [[544, 235322, 615, 235298, 559, 235298, 15508, 235313]]
        >>> encode_texts(tokenizer, ["hi<end_of_turn>"], markers=True)  # [[544, 107]]
    """
    return _reader(tokenizer, markers).Encode(texts, out_type=int) if texts else []


def marker_ids(tokenizer: Gemma2Tokenizer) -> frozenset[int]:
    """The ids that `encode_texts` never makes of plain text."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    return frozenset(_markers(model, tokenizer)) | {i for i, piece in enumerate(model.pieces) if piece.type == _CONTROL}


@per_vocabulary
def _reader(tokenizer: Gemma2Tokenizer, markers: bool) -> Any:
    """The SentencePiece processor for one way of reading; making it takes 0.1 s."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=reading_proto(tokenizer, markers))


def reading_proto(tokenizer: Gemma2Tokenizer, markers: bool) -> bytes:
    """The SentencePiece model of a tokenizer's vocabulary that reads texts as `encode_texts` does."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    if markers:
        for token_id in tokenizer.special_token_ids:
            model.pieces[token_id].type = _USER_DEFINED
    else:
        for token_id in _markers(model, tokenizer):
            model.pieces[token_id].type = _CONTROL
    return model.SerializeToString()


def _markers(model: Any, tokenizer: Gemma2Tokenizer) -> Iterator[int]:
    """Ids of the pieces that text can spell, but should not."""
    # By their ids, since a vocabulary that somebody converted may have them as normal pieces.
    yield from (*tokenizer.special_token_ids, tokenizer.start_of_turn_token_id, tokenizer.end_of_turn_token_id)
    for token_id, piece in enumerate(model.pieces):
        if piece.type == _USER_DEFINED and not _is_text(piece.piece):
            yield token_id


def _is_text(piece: str) -> bool:
    """Whether a user-defined piece is content rather than a marker, which is told from its punctuation."""
    return not set(piece) & set(string.punctuation) or _HTML_TAG.fullmatch(piece) is not None
