"""`benchmarks train`: that every contender trains the same kind of model, and that the command prints what they found."""

import argparse
import json

import numpy as np
import pytest

from keras_gemma2.benchmarks import train, train_contenders, train_transformers
from keras_gemma2.benchmarks.loss_alone import loss_and_gradient

# Sizes that keras-hub and transformers take, too.
NUMBERS = {
    "vocabulary_size": 120,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "head_dim": 8,
}


def assert_trains(step):
    """A uniform guess costs ln 120; steps on one batch make that less."""
    losses = [step() for _ in range(12)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert 0.5 * np.log(120) < losses[0] < 2 * np.log(120)


@pytest.fixture
def large_steps(monkeypatch):
    for module in (train_contenders, train_transformers):
        monkeypatch.setattr(module, "LEARNING_RATE", 0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ours(large_steps, checkpointing):
    assert_trains(train_contenders.ours(NUMBERS, "float32", 2, 9, checkpointing))


def test_keras_hub(large_steps):
    assert_trains(train_contenders.keras_hub(NUMBERS, "float32", 2, 9))


@pytest.mark.backend_free
@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers(large_steps, checkpointing):
    assert_trains(train_transformers.transformers_peft(NUMBERS, "float32", 2, 9, checkpointing))


def test_the_loss_alone():
    step = loss_and_gradient(120, 16, 2, 9)
    assert step() == step() == pytest.approx(2 * 9 * np.log(120), rel=0.05)  # small hidden states: nearly uniform


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    train.add_command(parser.add_subparsers())
    return parser.parse_args(["train", *arguments])


def test_the_command_prints_a_row_for_each_contender(monkeypatch, capsys):
    asked = []

    def child(benchmark, backend, *arguments):
        asked.append((backend, parsed(*arguments).child))
        if backend == "jax" and "keras_hub" in arguments:
            raise SystemExit("it failed:\nout of memory")
        return {"first": 2.5, "seconds": 1.25, "growth": 3e6}

    monkeypatch.setattr(train, "in_fresh_process", child)
    options = parsed("--length", "64", "--checkpointing", "--backend", "jax", "--backend", "torch")
    options.run(options)
    printed = capsys.readouterr().out
    assert asked == [
        ("jax", "ours"),
        ("jax", "ours_checkpointing"),
        ("jax", "keras_hub"),
        ("torch", "ours"),
        ("torch", "ours_checkpointing"),
        ("torch", "keras_hub"),
        ("torch", "transformers_peft"),
        ("torch", "transformers_peft_checkpointing"),
    ]
    assert "T = 64: a step" in printed and "| ours | jax | 2.5 | 1.25 | 3 |" in printed
    assert "| keras_hub | jax | failed: out of memory |" in printed


@pytest.mark.parametrize("child", ["ours", "loss"])
def test_a_child_measures(child, capsys):
    options = parsed("--quick", "--child", child, "--length", "16", "--layers", "1", "--steps", "1")
    options.run(options)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"first", "seconds", "growth"} and min(found["first"], found["seconds"]) > 0
