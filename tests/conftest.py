"""Seeds and sizes shared by the tests."""

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may reach a hub
sys.path.insert(0, str(Path(__file__).parent))  # the suite's own helper modules
# JAX compiles the same functions in many modules and child processes of one run: once is enough.
_COMPILED = tempfile.TemporaryDirectory(prefix="gemma2-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import keras  # noqa: E402 - reads the environment

_ONLY = {  # on one backend
    "jax": ["test_distribution.py", "test_jax_words.py", "test_lowering.py", "test_plan.py"],
    "tensorflow": ["test_distributed_tensorflow.py", "test_export_graph.py"],
    "torch": ["test_distributed_torch.py", "test_tape.py"],
}
_PART, _PARTS = map(int, os.environ.get("KERAS_GEMMA2_PART", "0/1").split("/"))  # of `run.py`
_FILES = sorted(path.name for path in Path(__file__).parent.glob("test_*.py"))
collect_ignore = [name for i, name in enumerate(_FILES) if i % _PARTS != _PART]
collect_ignore += [name for backend, names in _ONLY.items() if backend != keras.backend.backend() for name in names]

# No accidental identities: N * H != D, 1 < K < N, scalar != H, F != D, and every number another.
TINY = {
    "vocabulary_size": 97,
    "num_layers": 4,
    "num_query_heads": 6,
    "num_key_value_heads": 2,
    "hidden_dim": 42,
    "intermediate_dim": 80,
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "sliding_window_size": 5,
    "attention_logit_soft_cap": 5.0,
    "final_logit_soft_cap": 3.0,
    "layer_norm_epsilon": 1e-3,
    "rope_max_wavelength": 500.0,
    "max_sequence_length": 64,
}


def pytest_collection_finish():
    """What is imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(1234)


@pytest.fixture
def tiny():
    """Arguments of a small model; a fresh dict for each test."""
    return dict(TINY)
