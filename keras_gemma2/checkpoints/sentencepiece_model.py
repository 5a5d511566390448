"""SentencePiece models: read from a file, or made from a list of pieces where a checkpoint has its vocabulary in another form."""

from __future__ import annotations

from collections.abc import Iterable

from keras_gemma2.checkpoints.source import read_bytes, refuse_lfs_pointer
from keras_gemma2.errors import CheckpointError

# `ModelProto.SentencePiece.Type` of sentencepiece's `sentencepiece_model.proto`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def read_model(path: str) -> bytes:
    """The bytes of a SentencePiece model's file.

    Raises:
        CheckpointError: if SentencePiece cannot read it.
    """
    import sentencepiece

    proto = read_bytes(path)
    try:
        if not proto:  # SentencePiece takes this for no model at all
            raise ValueError("it is empty")
        sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, ValueError) as error:  # a UnicodeDecodeError where a message quotes a broken piece
        refuse_lfs_pointer(path)
        raise CheckpointError(f"{path} is not a SentencePiece model ({error}). Download it again.") from error
    return proto


def build_model(pieces: Iterable[tuple[str, float, int]]) -> bytes:
    """A serialized BPE model with Gemma's settings: byte fallback, digits apart, no dummy prefix, no normalization.

    Args:
        pieces: each piece's text, score and type, in the order of ids. Merges with higher scores are made first.

    Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback, trainer.split_digits, trainer.allow_whitespace_only_pieces = True, True, True
    for name, piece in {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}.items():
        setattr(trainer, f"{name}_piece", piece)
        setattr(trainer, f"{name}_id", ids.get(piece, -1))
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, False, True
    return model.SerializeToString()
