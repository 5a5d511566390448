"""What `fit`, `evaluate` and the others take, as the arrays that a model is trained on.

`Reader.arrays` reads what is in memory (or one batch of a stream, see `data_streams`): strings, pairs of prompts and responses,
conversations, packed samples, tokens.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_gemma2.errors import callers_level
from keras_gemma2.inputs import is_token_dict, label_tokens
from keras_gemma2.text_inputs import shorten, to_python
from keras_gemma2.training.packing import PackedSamples, pack
from keras_gemma2.training.samples import PAIR_KEYS, Sample, chat_samples, pair_samples, rows_of, text_samples, truncated

FORMS = (
    "a list of strings; {'prompts': [...], 'responses': [...]}; a list of conversations, each a list of {'role', 'content'}; "
    "a dict of 'token_ids' and 'padding_mask'; or a dataset, generator, PyDataset or DataLoader of batches of those"
)
_MOST_NAMED = 10  # samples in a warning

Arrays = tuple[dict[str, np.ndarray], np.ndarray, "np.ndarray | None"]


@dataclasses.dataclass
class Report:
    """What happened to the samples of a batch, or of several.

    Attributes:
        samples: how many there are.
        cut: how many were too long.
        dropped: tokens cut from them.
        unanswered: conversations that end with a turn of the user.
        empty: the samples without a token to learn, by name.
        weightless: whether all weights of a batch of tokens are 0, by name.
    """

    samples: int = 0
    cut: int = 0
    dropped: int = 0
    unanswered: int = 0
    empty: tuple[str, ...] = ()
    weightless: tuple[str, ...] = ()

    def __add__(self, other: Report) -> Report:
        return Report(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Report)))

    def named(self, batch: str) -> Report:
        """With the batch in front of the samples' names."""
        return dataclasses.replace(
            self,
            empty=tuple(f"{batch}, {name}" for name in self.empty),
            weightless=tuple(batch for _ in self.weightless),
        )

    def messages(self, truncation: str) -> list[str]:
        """What the user should know."""
        messages = []
        if self.cut:
            messages.append(
                f"Truncation cut {self.cut} of {self.samples} samples and dropped {self.dropped} tokens (the preprocessor's "
                f"truncation={truncation!r}). Raise its `sequence_length` to keep them."
            )
        if self.empty:
            messages.append(
                f"{len(self.empty)} of {self.samples} samples have no token to learn after truncation: {_some(self.empty)}. "
                "Raise the preprocessor's `sequence_length`, or leave them out."
            )
        if self.unanswered:
            messages.append(
                f"{self.unanswered} of {self.samples} conversations end with a turn of the user. Nothing is learned from that turn."
            )
        if self.weightless:
            messages.append(f"All weights are 0 in {_some(self.weightless)}: there is nothing to learn, and the loss is 0.")
        return messages


def say(report: Report, truncation: str) -> None:
    """Warns of what the user should know."""
    for message in report.messages(truncation):
        warnings.warn(message, stacklevel=callers_level())


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads data for one model.

    Args:
        preprocessor: a `Gemma2CausalLMPreprocessor`; None where only tokens are read.
        vocabulary_size: of the model.
        packs: whether several samples share a row.
    """

    preprocessor: Any
    vocabulary_size: int
    packs: bool = False

    @property
    def truncation(self) -> str:
        """What happens to samples that are too long."""
        return "error" if self.preprocessor is None else self.preprocessor.truncation

    def arrays(self, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Arrays, Report]:
        """What is in memory as arrays, checked.

        Args:
            x: any of `FORMS` but the streams; or `PackedSamples`.
            y: labels int `[B, T]`, for tokens only.
            sample_weight: float `[B]`, or for tokens also `[B, T]`.

        Returns:
            `(x, y, sample_weight)`: a dict of `"token_ids"` and `"padding_mask"`, labels (all int32), and weights (float32, or
            None), all `[B, T]`; and what there is to tell.

        Raises:
            TypeError, ValueError: for anything else, or where there is nothing to learn. Names the argument and the index.
        """
        if isinstance(x, PackedSamples):
            x, y, sample_weight = x.x, x.y, x.sample_weight
        if is_token_dict(x):
            if self.packs:
                raise ValueError("`pack=True` packs texts. Pack samples of tokens with `keras_gemma2.pack_samples`.")
            return self._tokens(x, y, sample_weight)
        if y is not None:
            raise ValueError(f"`y` must be None where `x` is text: labels are made of it. Received: y={shorten(y)}.")
        samples, report = self.samples(x, sample_weight)
        if self.packs:
            packed = pack(samples, self.preprocessor.sequence_length, self.preprocessor.tokenizer.pad_token_id)
            return (packed.x, packed.y, packed.sample_weight), report
        return rows_of(samples, self.preprocessor.sequence_length, self.preprocessor.tokenizer.pad_token_id), report

    def samples(self, x: Any, sample_weight: Any = None) -> tuple[list[Sample], Report]:
        """Samples of texts, pairs or conversations, weighted and cut to the preprocessor's length."""
        preprocessor = self._needed_preprocessor(x)
        whole, unanswered = _whole_samples(preprocessor, x)
        limit = preprocessor.sequence_length + 1  # the last token is a label only
        if preprocessor.truncation == "error":
            _check_lengths(whole, limit)
        samples = [truncated(sample, limit, preprocessor.truncation) for sample in whole]
        report = Report(
            samples=len(samples),
            cut=sum(len(sample.token_ids) > limit for sample in whole),
            dropped=sum(max(len(sample.token_ids) - limit, 0) for sample in whole),
            unanswered=unanswered,
            empty=tuple(f"sample {i}" for i, sample in enumerate(samples) if not sample.weights[1:].any()),
        )
        return _weighted(samples, sample_weight), report

    def _tokens(self, x: Mapping[str, Any], y: Any, sample_weight: Any) -> tuple[Arrays, Report]:
        x, y, sample_weight = label_tokens(x, y, sample_weight, self.vocabulary_size)
        if not len(y):
            raise ValueError("`x` must have at least one row. Received `token_ids` of 0 rows.")
        weightless = sample_weight is not None and not sample_weight.any()
        return (x, y, sample_weight), Report(samples=len(y), weightless=("the data",) * weightless)

    def _needed_preprocessor(self, x: Any) -> Any:
        if self.preprocessor is None:
            raise ValueError(
                "`lm.preprocessor` is None, and text needs one: make the model with `Gemma2CausalLM(backbone, "
                "Gemma2CausalLMPreprocessor(tokenizer))`, or pass a dict of 'token_ids' and 'padding_mask'. "
                f"Received: x={shorten(x)}."
            )
        return self.preprocessor


def is_in_memory(x: Any) -> bool:
    """Whether `x` is data itself, as opposed to something that gives batches of it."""
    return isinstance(x, (str, bytes, list, tuple, Mapping, PackedSamples)) or any(
        hasattr(x, name) for name in ("__array__", "to_list")
    )


def unpacked(batch: Any) -> tuple[Any, Any, Any]:
    """`(x, y, sample_weight)` of a batch, or of `validation_data`, as Keras unpacks them; a list of texts or conversations is x."""
    is_packed = isinstance(batch, (list, tuple)) and 1 <= len(batch) <= 3 and not _is_text_like(batch[0])
    return (*batch, None, None)[:3] if is_packed else (batch, None, None)


def _is_text_like(first: Any) -> bool:
    """Whether this is the first of a list of texts or conversations."""
    if isinstance(first, (list, tuple)):
        return bool(first) and isinstance(first[0], Mapping) and "role" in first[0]
    is_text = isinstance(first, (str, bytes)) or (getattr(first, "ndim", None) == 0)
    return is_text or (isinstance(first, Mapping) and "role" in first)


def _is_pairs(x: Any) -> bool:
    return isinstance(x, Mapping) and all(key in x for key in PAIR_KEYS)


def _whole_samples(preprocessor: Any, x: Any) -> tuple[list[Sample], int]:
    if _is_pairs(x):
        return pair_samples(preprocessor, x), 0
    values = to_python(x)
    first = values[0] if isinstance(values, (list, tuple)) and len(values) else None
    if isinstance(x, Mapping) or isinstance(first, Mapping):
        received = f"a dict of {sorted(map(str, x))}" if isinstance(x, Mapping) else f"a list of {shorten(first)}"
        hint = " One conversation is a list of its messages: put it in a list." if "role" in (first or ()) else ""
        raise ValueError(f"`x` must be {FORMS}. Received: {received}.{hint}")
    if isinstance(first, (list, tuple)) and all(isinstance(message, Mapping) for message in first):
        return chat_samples(preprocessor, values)
    return text_samples(preprocessor, values), 0


def _check_lengths(samples: Sequence[Sample], limit: int) -> None:
    for index, sample in enumerate(samples):
        count = len(sample.token_ids)
        if count > limit:
            raise ValueError(
                f"`x` at index {index} has {count} tokens, with those that frame it, but the preprocessor's "
                f"`sequence_length={limit - 1}` has room for {limit} (one of them as a label only). Set it to {count - 1} or more, "
                "shorten the text, or set the preprocessor's `truncation` to 'right' to keep the first tokens or to 'left' to keep "
                "the last."
            )


def _weighted(samples: list[Sample], sample_weight: Any) -> list[Sample]:
    if sample_weight is None:
        return samples
    weight = np.asarray(to_python(sample_weight), "float32")
    if weight.shape != (len(samples),):
        raise ValueError(
            f"`sample_weight` must have one number a sample where `x` is text, {len(samples)}. Received the shape {weight.shape}."
        )
    return [sample._replace(weights=sample.weights * factor) for sample, factor in zip(samples, weight)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return "; ".join(names[:_MOST_NAMED]) + more


def check_something_is_learned(report: Report) -> None:
    """Raises a ValueError if no sample has a token to learn."""
    if report.samples and len(report.empty) == report.samples:
        raise ValueError(
            f"None of the {report.samples} samples has a token to learn after truncation: the responses were cut off. Raise the "
            "preprocessor's `sequence_length`, or set its `truncation` to 'left' to keep the last tokens."
        )
