"""Running a model for `verify`: ours and transformers', where there is memory for it."""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from keras_gemma2.checkpoints.source import HUGGING_FACE
from keras_gemma2.config import Gemma2Config
from keras_gemma2.presets.verify_known import TEXT
from keras_gemma2.presets.verify_subject import Result, Subject, skipped

_PROBE_TOKENS = 64  # for logits beside transformers': enough to see every formula, few enough for 256,000 logits each
_LOADING = 1.25  # peak memory over the weights, while they are read
_WORKING = 16 * 512  # bytes a vocabulary row beside the weights: logits of a text of up to 512 tokens, four times over


def load(subject: Subject, dtype: str | None) -> Any:
    """The checkpoint as a `Gemma2CausalLM`; None means its own dtype."""
    from keras_gemma2.causal_lm import Gemma2CausalLM

    with warnings.catch_warnings():  # what they tell, the checks tell: NaN, no tokenizer, float16
        warnings.simplefilter("ignore")
        return Gemma2CausalLM.from_preset(subject.source.path, dtype=dtype)


def probe(subject: Subject) -> list[int]:
    """Token ids of the beginning of the text after `<bos>`; without a vocabulary, ids in a row."""
    size, limit = subject.source.config.vocabulary_size, min(_PROBE_TOKENS, subject.source.config.max_sequence_length)
    if subject.lm.preprocessor is None:
        return [i % size for i in range(2, 2 + limit)]
    tokenizer = subject.lm.preprocessor.tokenizer
    return [tokenizer.start_token_id, *(int(i) for i in tokenizer(TEXT))][:limit]


def logits_of(lm: Any, token_ids: list[int]) -> Any:
    """float32 logits [T, V] of one row of token ids."""
    import numpy as np
    from keras import ops

    from keras_gemma2 import backend

    row = np.array([token_ids], "int32")
    with backend.no_gradients():
        return ops.convert_to_numpy(lm({"token_ids": row, "padding_mask": np.ones_like(row)}))[0]


def nats(lm: Any, token_ids: list[int]) -> Any:
    """float64 [T - 1]: minus the log of the probability of each token but the first."""
    import numpy as np

    logits, found = logits_of(lm, token_ids), []
    with np.errstate(invalid="ignore"):  # NaN is told by its result
        for row, next_id in zip(logits, token_ids[1:]):  # one at a time: float64 of them all would be gigabytes
            row = row.astype(np.float64)
            found.append(row.max() + np.log(np.exp(row - row.max()).sum()) - row[next_id])
    return np.array(found)


def float32_logits(subject: Subject, token_ids: list[int]) -> Any:
    """As `logits_of`, computed in float32 whatever the model was loaded in."""
    if compute_dtype(subject.lm) == "float32":
        return logits_of(subject.lm, token_ids)
    logits = logits_of(load(subject, "float32"), token_ids)
    gc.collect()  # Keras models hold themselves in cycles, and transformers' comes next
    return logits


@contextlib.contextmanager
def hugging_face_folder(subject: Subject) -> Iterator[str | Result]:
    """The checkpoint as transformers reads it: itself, or exported to a temporary folder; or why there is none."""
    if subject.source.kind == HUGGING_FACE:
        yield subject.source.path
        return
    from keras_gemma2.presets.convert import convert

    needed = int(4 * subject.source.config.parameter_count() * 1.05)
    with tempfile.TemporaryDirectory(prefix="keras-gemma2-verify-") as folder:
        if shutil.disk_usage(folder).free < needed:
            yield skipped(f"exporting it for transformers needs {needed / 1e9:.1f} GB in {tempfile.gettempdir()}; set TMPDIR")
            return
        convert(subject.source.path, f"{folder}/model", to="hf", dtype="float32")
        yield f"{folder}/model"


def transformers_logits(folder: str, token_ids: list[int]) -> Any:
    """float32 logits [T, V] of transformers' model."""
    import transformers
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", attn_implementation="eager", local_files_only=True, use_safetensors=True
        )
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    model.eval().requires_grad_(False)
    row = transformers.BatchEncoding({"input_ids": [token_ids]}, tensor_type="pt")["input_ids"]
    return model(input_ids=row.to(model.device)).logits[0].float().cpu().numpy()


def compute_dtype(lm: Any) -> str:
    """The name of the dtype that a model computes in."""
    return lm.backbone.dtype_policy.compute_dtype


def itemsize(subject: Subject) -> int:
    """Bytes of one weight once loaded."""
    import keras

    from keras_gemma2.checkpoints import reading

    dtype = subject.dtype or subject.source.dtype
    if dtype is None:
        with reading.open_weights(subject.source) as entries:
            dtype = reading.stored_dtype(entries)
    return 2 if keras.dtype_policies.get(dtype).variable_dtype in ("bfloat16", "float16") else 4


def memory_lacking(config: Gemma2Config, itemsize: int, on_host: bool = False) -> str | None:
    """What is needed and there is, where it does not suffice; None where it does, or where nothing is known of it.

    The system would kill the process, or swap for hours. Accelerators refuse by themselves.
    """
    import keras

    if not on_host and "cpu" not in str(keras.ops.zeros(1).device).lower():
        return None
    needed = _LOADING * itemsize * config.parameter_count() + _WORKING * config.vocabulary_size
    free = available_memory()
    if free is None or needed <= free:
        return None
    return f"{needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free; use a larger machine, or --quick"


def available_memory() -> int | None:
    """Bytes this process may still take: the system's, or what its control group leaves; None where neither is told."""
    known = []
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        known.append(1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        known.append(_number_in("/sys/fs/cgroup/memory.max") - _number_in("/sys/fs/cgroup/memory.current"))
    return min(known, default=None)


def _number_in(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())
