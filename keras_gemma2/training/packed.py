"""`pack_samples`: several samples in a row, of tokens or of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.text_inputs import read_length, shorten, to_numpy
from keras_gemma2.training.data import Reader, check_something_is_learned, say
from keras_gemma2.training.packing import PackedSamples, pack
from keras_gemma2.training.samples import Sample


def pack_samples(
    x: Any,
    sequence_length: int | None = None,
    *,
    preprocessor: Gemma2CausalLMPreprocessor | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    pad_token_id: int = 0,
) -> PackedSamples:
    """Puts samples side by side in rows of one length, so that little of a batch is padding.

    Each sample sees itself alone and has positions of its own, so the sum of the loss over tokens, and its gradient, are those of
    the samples in rows of their own. (Keras's default reduction divides by the number of positions: fewer of them are padding
    here, so the mean is larger.) A sample of n tokens takes n - 1 positions, as its last token is a label only. The longest go
    first, each into the row with the least room that is enough ("best-fit decreasing", Johnson et al., "Worst-case performance
    bounds for simple one-dimensional packing algorithms", 1974: asymptotically at most 11/9 of the fewest rows).

    Args:
        x: a list of samples, each a list or array of token ids, `<bos>` and `<eos>` included. With a preprocessor: strings, pairs
            or conversations, as `lm.fit` takes them; what they teach is as there.
        sequence_length: positions in a row, T. With a preprocessor it is the preprocessor's.
        preprocessor: makes tokens of text, and cuts what is too long if its `truncation` says so.
        weights: what each token counts in the loss, as a label, in the form of `x`; 1 by default. 0 for a prompt's. The weight of a
            sample's first token is not looked at. For tokens only.
        pad_token_id: what fills the rest of a row; with a preprocessor, its tokenizer's.

    Returns:
        The rows, ordered by their first sample; within a row the samples keep their order. Equal input gives equal rows.

    Raises:
        TypeError: if `sequence_length` is not an integer, or `x` no text where there is a preprocessor.
        ValueError: if there is no sample, a sample is too long or has fewer than 2 tokens, or weights do not fit it.

    Example:
        >>> packed = keras_gemma2.pack_samples([[2, 5, 6, 1], [2, 7, 1], [2, 8, 9, 1]], sequence_length=5)
        >>> packed.x["padding_mask"].tolist(), packed.rows, packed.fill
        ([[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]], ((0, 1), (2,)), 0.8)
        >>> lm.fit(packed)
        >>> keras_gemma2.pack_samples(["Call me Ishmael.", "A whale!"], preprocessor=lm.preprocessor).fill
    """
    if preprocessor is None:
        return pack(_token_samples(x, weights), read_length(sequence_length), pad_token_id)
    if sequence_length is not None or weights is not None:
        raise ValueError(
            "`sequence_length` and `weights` do not go with `preprocessor`, which sets both. Set the preprocessor's "
            f"`sequence_length`. Received: sequence_length={sequence_length}, weights={shorten(weights)}."
        )
    samples, report = Reader(preprocessor, vocabulary_size=0).samples(x)
    check_something_is_learned(report)
    say(report, preprocessor.truncation)
    return pack(samples, preprocessor.sequence_length, preprocessor.tokenizer.pad_token_id)


def _token_samples(token_ids: Sequence[Any], weights: Sequence[Any] | None) -> list[Sample]:
    if weights is not None and len(weights) != len(token_ids):
        raise ValueError(f"`weights` must have one entry a sample. Received: {len(weights)} for {len(token_ids)} samples.")
    samples = []
    for index, ids in enumerate(token_ids):
        ids = np.asarray(to_numpy(ids))
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 2:
            raise ValueError(
                f"`x[{index}]` must be a list of 2 token ids or more: each is learned from those before it. "
                f"Received: {shorten(ids.tolist())}. For text, pass `preprocessor=lm.preprocessor`."
            )
        counts = np.ones(len(ids)) if weights is None else np.asarray(weights[index])
        if counts.shape != ids.shape:
            raise ValueError(f"`weights[{index}]` must have one number a token, {len(ids)}. Received the shape {counts.shape}.")
        samples.append(Sample(ids.astype("int32"), counts.astype("float32")))
    return samples
