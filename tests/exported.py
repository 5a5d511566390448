"""A small model to export, and its SavedModel asked in a process of its own: for the tests of both."""

import atexit
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from conftest import TINY

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor

# float32 sums in another order, on a range of logits of 6 (their cap is 3): as in test_parity, 2e-5 of the range.
TOLERANCE = 1.2e-4
TEXTS = ["The state of our union is", "", "  Two spaces, and\nlines: <end_of_turn> é 漢", "I"]
N = 9  # new tokens


def small_lm(seed=6, **overrides):
    """Three layers of random weights over the embedded preset's vocabulary; window 5."""
    preprocessor = Gemma2CausalLMPreprocessor.from_preset("gemma2_mini_en")
    sizes = {"num_layers": 3, "vocabulary_size": 4096, "max_sequence_length": 128, **overrides}
    backbone = Gemma2Backbone(**{**TINY, **sizes})
    draw = np.random.default_rng(seed)
    for variable in backbone.variables:  # the same on each backend
        # Branches of much weight: else the tied embedding says each token again.
        variable.assign(draw.normal(3 if "post_" in variable.path else 0, 0.3, variable.shape))
    return Gemma2CausalLM(backbone, preprocessor)


@functools.cache
def small_preset():
    """A folder with a model of two layers: for commands, which load and compile it in a third of the embedded preset's time."""
    folder = tempfile.TemporaryDirectory(prefix="gemma2-small-")
    atexit.register(folder.cleanup)
    small_lm(num_layers=2, max_sequence_length=512, sliding_window_size=100).save_to_preset(folder.name)
    return folder.name


class Runtime:
    """A process without this package, nor keras-hub, that runs exported models one after the other: a runtime is slow to import.

    Args:
        command: a file beside this one, and its arguments.
    """

    def __init__(self, *command):
        self._command, self._process = [sys.executable, str(Path(__file__).with_name(command[0])), *command[1:]], None

    def __call__(self, folder, requests):
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            atexit.register(self.close)
        pickle.dump((str(folder), requests), self._process.stdin)
        self._process.stdin.flush()
        answers, modules = pickle.load(self._process.stdout)
        assert not modules
        return answers

    def close(self):
        with self._process:  # closes its input, at which it ends
            pass


RUNTIMES = {kind: Runtime("served.py", kind) for kind in ("text", "tokens")}


def ask(folder, *requests, kind="text"):
    """Answers of a process that has TensorFlow, and TensorFlow Text where texts are asked for."""
    return RUNTIMES[kind](folder, requests)


def generate(texts=TEXTS, n=N, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    numbers = {"temperature": np.float32(temperature), "top_p": np.float32(top_p)}
    integers = {"max_new_tokens": np.int32(n), "top_k": np.int32(top_k), "seed": np.int32(seed)}
    return "generate", {"prompts": np.array(texts, object), **numbers, **integers}


def default(texts=TEXTS):
    return "serving_default", {"prompts": np.array(texts, object)}


def padded(rows, length, seed=0):
    """Rows with their tokens anywhere."""
    draw = np.random.default_rng(seed)
    ids, mask = np.full((len(rows), length), 77, "int32"), np.zeros((len(rows), length), "int32")
    for i, row in enumerate(rows):
        where = np.sort(draw.choice(length, len(row), replace=False))
        ids[i, where], mask[i, where] = row, 1
    return {"token_ids": ids, "padding_mask": mask}


def decoded(texts):
    return [text.decode("utf-8") for text in texts]


def data_bytes(folder):
    return sum(path.stat().st_size for path in (folder / "variables").iterdir())


def all_bytes(lm):
    sizes = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}
    return sum(int(np.prod(variable.shape)) * sizes[variable.dtype] for variable in lm.backbone.variables)


def prompt_rows():
    draw = np.random.default_rng(3)
    return [[2, *draw.integers(200, 4096, n - 1).tolist()] for n in (1, 7, 23, 4)]
