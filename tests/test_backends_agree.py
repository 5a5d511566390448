"""The three backends compute the same model.

`tests/run.py` gives the runs a folder to exchange logits in: each run leaves its own and compares them with those that are there,
so that of two runs at the same time at least one compares. A run alone compares with the float64 oracle.
"""

import os
from pathlib import Path

import keras
import numpy as np
import pytest
from oracle import numpy_logits

from keras_gemma2 import Gemma2CausalLM

TEXT = "To the Senate and House of Representatives: the state of our union is strong, and the whale swims on. " * 9


@pytest.fixture(scope="module")
def logits():
    """Token ids [T] and float32 logits [T, V] of the embedded preset on a text past its window, and the model."""
    lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
    inputs = lm.preprocessor.generate_preprocess([TEXT], sequence_length=512)
    length = int(keras.ops.convert_to_numpy(inputs["padding_mask"]).sum())
    assert length > lm.backbone.config.sliding_window_size + 20
    inputs = {key: keras.ops.convert_to_numpy(value)[:, :length] for key, value in inputs.items()}
    return inputs["token_ids"][0], keras.ops.convert_to_numpy(lm(inputs))[0], lm


def test_with_float64(logits):
    token_ids, ours, lm = logits
    weights = {path: keras.ops.convert_to_numpy(v) for path, v in lm.backbone.named_weights().items()}
    expected = numpy_logits(weights, lm.backbone.config, token_ids)
    # The promise of 2e-5 of the range; measured 1e-6 on each backend.
    assert np.abs(ours - expected).max() <= 2e-5 * np.ptp(expected)


def test_with_each_other(logits, tmp_path):
    _, ours, _ = logits
    folder = Path(os.environ.get("KERAS_GEMMA2_EXCHANGE", tmp_path))
    mine = folder / f"{keras.backend.backend()}.npy"
    assert not mine.exists()
    np.save(folder / f"{mine.stem}.partial", ours)
    os.replace(folder / f"{mine.stem}.partial.npy", mine)
    found = [path for path in sorted(folder.glob("*.npy")) if not path.stem.endswith(".partial")]
    assert mine in found
    for path in found:
        assert np.abs(ours - np.load(path)).max() <= 2e-5 * np.ptp(ours), path.stem
