"""Checks of a checkpoint's numbers that need no model: its config, its parameters, its weights, its vocabulary."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

from keras_gemma2.checkpoints import formats
from keras_gemma2.config import NAMED_SIZES, Gemma2Config
from keras_gemma2.errors import CheckpointError
from keras_gemma2.presets.registry import EMBEDDED, PUBLISHED
from keras_gemma2.presets.verify_known import (
    CONFIGS,
    EMBEDDED_GOLDEN_IDS,
    EMBEDDED_MEAN_NORM_SCALE,
    EMBEDDED_PIECES,
    GOLDEN_IDS,
    PARAMETER_COUNTS,
    VOCABULARY_PIECES,
    VOCABULARY_SIZE,
)
from keras_gemma2.presets.verify_subject import Result, Subject, failed, ok, skipped

# What a fine-tuned model may well have changed, so that it is told but is no fault unless the model says it is a published one.
_FREE_FIELDS = ("vocabulary_size", "max_sequence_length", "dropout")
# The stored figure has five digits; scales stored as 1 + w would be off by 1.
_NORM_SCALE_TOLERANCE = 1e-4


def named_size(config: Gemma2Config) -> str | None:
    """Which published size has this config's depth and width, or None."""
    shape = (config.num_layers, config.hidden_dim)
    return next((name for name, size in NAMED_SIZES.items() if (size.num_layers, size.hidden_dim) == shape), None)


def check_config(subject: Subject) -> Result:
    """Every field, beside those of the published model or size."""
    config = subject.source.config
    name = subject.claim or named_size(config)
    if name is None:
        return skipped(f"no published size has {config.num_layers} layers of hidden_dim {config.hidden_dim} to compare with")
    expected = CONFIGS[name] if subject.claim else NAMED_SIZES[name]
    changed = {
        field: f"{field} is {_shown(found)}, {name} has {_shown(wanted)}"
        for field in config.field_names()
        if (found := getattr(config, field)) != (wanted := getattr(expected, field))
    }
    faults = [text for field, text in changed.items() if subject.claim or field not in _FREE_FIELDS]
    if faults:
        return failed("; ".join(faults))
    rest = f" but for what a fine-tuned model may change: {'; '.join(changed.values())}" if changed else ""
    return ok(f"every field is that of {name}{rest}")


def _shown(value: Any) -> str:
    return f"[{value[0]}, {value[1]}, ...]" if isinstance(value, tuple) and len(value) > 2 else str(value)


def check_parameters(subject: Subject) -> Result:
    """The tensors' headers: each name and shape, and the number of all elements."""
    from keras_gemma2.checkpoints import reading

    config = subject.source.config
    with reading.open_weights(subject.source) as entries:
        count = sum(math.prod(entry.tensor.shape) for entry in entries.values())
        mode = getattr(entries["token_embedding/embeddings"].tensor, "mode", None)
        found = f"{count:,} parameters in {len(entries)} weights, {mode or reading.stored_dtype(entries)}"
    size = PUBLISHED[subject.claim][0] if subject.claim in PUBLISHED else named_size(config)
    published = PARAMETER_COUNTS.get(size) if config.vocabulary_size == VOCABULARY_SIZE or subject.claim in PUBLISHED else None
    if published is not None and published != count:
        return failed(f"{found}; {size} has {published:,}")
    if count != config.parameter_count():
        return failed(f"{found}; the config makes {config.parameter_count():,}")
    return ok(found + (f", as published for {size}" if published else ", as the config makes them"))


@dataclasses.dataclass
class _Statistics:
    """Of one weight: are all values finite, are all zero; their mean; for the embedding, its rows' norms."""

    finite: bool = True
    zero: bool = True
    total: float = 0.0
    count: int = 0
    smallest_row: float = math.inf
    largest_row: float = 0.0

    @classmethod
    def of(cls, entry: Any) -> _Statistics:
        import numpy as np

        from keras_gemma2.checkpoints.reading import is_finite

        self = cls()
        for block in entry.row_blocks():
            values = block.astype(np.float32, copy=False)
            self.finite &= is_finite(values)
            self.zero &= not values.any()
            self.count += values.size
            if not self.finite:
                continue  # sums say nothing any more
            self.total += float(values.sum(dtype=np.float64))
            if values.ndim == 2:
                rows = np.sqrt(np.einsum("vd,vd->v", values, values))
                self.smallest_row, self.largest_row = min(self.smallest_row, rows.min()), max(self.largest_row, rows.max())
        return self


def check_weights(subject: Subject) -> Result:
    """Every value is finite and no weight is all zeros; the scale of norms and embedding rows is told.

    Norm scales of a model that was never trained are all zero (they are w of 1 + w), so that zero norms are a fault only
    beside others. What scales the published models have is not known here, so that they are judged for the embedded preset alone.
    """
    from keras_gemma2.checkpoints import reading

    with reading.open_weights(subject.source) as entries:
        weights = {path: _Statistics.of(entry) for path, entry in entries.items()}
    norms = {path: s for path, s in weights.items() if path.endswith("/scale")}
    untrained = all(s.zero for s in norms.values())
    broken = [path for path, s in weights.items() if not s.finite]
    zero = [path for path, s in weights.items() if s.zero and not (untrained and path in norms)]
    if broken:
        return failed(f"{len(broken)} weights with NaN or infinite values: {_first(broken)}")
    if zero:
        return failed(f"{len(zero)} weights that are zero throughout: {_first(zero)}")
    means = [s.total / s.count for s in norms.values()]
    mean, embedding = sum(means) / len(means), weights["token_embedding/embeddings"]
    found = (
        f"all finite, none zero throughout; norm scales w of 1 + w have means from {min(means):.3f} to {max(means):.3f} "
        f"({mean:.5f} over all), embedding rows norms from {embedding.smallest_row:.3f} to {embedding.largest_row:.3f}"
    )
    if subject.claim == EMBEDDED and abs(mean - EMBEDDED_MEAN_NORM_SCALE) > _NORM_SCALE_TOLERANCE:
        hint = " They look stored as 1 + w." if abs(mean - 1 - EMBEDDED_MEAN_NORM_SCALE) < 0.1 else ""
        return failed(f"the norm scales' mean is {mean:.5f}, {EMBEDDED} has {EMBEDDED_MEAN_NORM_SCALE}.{hint}")
    return ok(found)


def _first(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")


def check_vocabulary(subject: Subject) -> Result:
    """Token ids of a few texts, beside those that the sentencepiece library gives with the published vocabulary."""
    proto = formats.vocabulary(subject.source)
    if proto is None:
        return skipped("no tokenizer here; put the model's tokenizer.model into its folder")
    size, pieces = _pieces(proto)
    if subject.claim is not None and size != CONFIGS[subject.claim].vocabulary_size:
        return failed(f"{size:,} pieces; {subject.claim} has {CONFIGS[subject.claim].vocabulary_size:,}")
    if size > subject.source.config.vocabulary_size:
        return failed(f"{size:,} pieces, but the embedding has only {subject.source.config.vocabulary_size:,} rows")
    golden = EMBEDDED_GOLDEN_IDS if subject.claim == EMBEDDED else GOLDEN_IDS if size == VOCABULARY_SIZE else None
    if golden is None:
        return skipped(f"no golden ids are known for a vocabulary of {size:,} pieces")

    from keras_gemma2.tokenizer import Gemma2Tokenizer

    tokenizer = Gemma2Tokenizer(proto)
    found = {text: tuple(int(i) for i in tokenizer(text)) for text in golden}
    wrong = [
        f"{text[-20:]!r} is {list(found[text])}, expected {list(golden[text])}" for text in golden if found[text] != golden[text]
    ]
    if wrong:
        return failed(f"{len(wrong)} of {len(golden)} golden texts have other token ids: {wrong[0]}")
    same = pieces == (EMBEDDED_PIECES if subject.claim == EMBEDDED else VOCABULARY_PIECES)
    if subject.claim == EMBEDDED and not same:
        return failed(f"the golden token ids are right, but a piece is not that of {EMBEDDED}")
    told = "every piece at its published id" if same else "some pieces are not the published ones, as fine-tuned models may have"
    return ok(f"{size:,} pieces, {len(golden)} golden texts have their token ids; {told}")


def _pieces(proto: bytes) -> tuple[int, str]:
    """How many pieces a SentencePiece model has, and the hash of them all."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise CheckpointError(f"The vocabulary is no SentencePiece model ({error}). Download it again.") from error
    digest = hashlib.sha256()
    for i in range(model.get_piece_size()):
        digest.update(model.id_to_piece(i).encode("utf-8") + b"\0")
    return model.get_piece_size(), digest.hexdigest()
