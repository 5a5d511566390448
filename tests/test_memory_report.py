"""The estimate of a training step's memory, and the switches that it follows."""

import argparse

import keras
import numpy as np
import pytest
from conftest import TINY
from keras import ops

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2Config
from keras_gemma2.benchmarks import memory
from keras_gemma2.benchmarks.processes import in_fresh_process
from keras_gemma2.cli import main
from keras_gemma2.config import NAMED_SIZES
from keras_gemma2.lora import LoraSettings
from keras_gemma2.training.memory import ITEM_BYTES, MemoryReport, plan_memory

EVEN = {**TINY, "hidden_dim": 48, "vocabulary_size": 96, "num_layers": 2, "max_sequence_length": 2048}


def size(variables):
    return sum(int(np.prod(v.shape)) * ITEM_BYTES[v.dtype] for v in variables)


def model(dtype="float32", quantize=None, lora=True, optimizer=None):
    keras.utils.set_random_seed(3)
    lm = Gemma2CausalLM(Gemma2Backbone(**EVEN, dtype=dtype))
    if quantize:
        lm.quantize(quantize)
    if lora:
        lm.enable_lora(2, targets="all")
    lm.compile(optimizer=optimizer or keras.optimizers.Adam(1e-2))
    return lm


def data(rows=4, length=9):
    draw = np.random.default_rng(2)
    return {"token_ids": draw.integers(1, 96, (rows, length)), "padding_mask": np.ones((rows, length), "int32")}


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_variables_are_counted_exactly(dtype, quantize):
    lm = model(dtype, quantize)
    report = lm.memory_report(2, 16)
    lm.optimizer.build(lm.trainable_variables)
    assert report.weights == size(lm.backbone.weights)
    assert report.gradients == size(lm.trainable_variables)
    assert abs(report.optimizer - size(lm.optimizer.variables)) <= 16  # a counter, and a learning rate that may be a schedule
    lora = LoraSettings.of(lm.backbone.config, 2, 16, "all")
    planned = plan_memory(lm.backbone.config, 2, 16, dtype=dtype, quantize=quantize, lora=lora)
    for part in ("weights", "gradients", "activations", "loss", "backward", "total"):
        assert getattr(planned, part) == getattr(report, part), part


@pytest.mark.parametrize(
    "optimizer, slots",
    [
        (lambda: keras.optimizers.SGD(0.1), 0),
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), 1),
        (lambda: keras.optimizers.AdamW(0.1), 2),
        (lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2), 3),
        (lambda: keras.optimizers.Adam(0.1, use_ema=True), 3),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)), 2),
    ],
)
def test_the_optimizer_holds_variables_of_what_is_trained_alone(optimizer, slots):
    lm = model(optimizer=optimizer())
    estimate = lm.memory_report(1, 8).optimizer
    lm.optimizer.build(lm.trainable_variables)
    assert estimate - slots * size(lm.trainable_variables) <= 16
    assert abs(lm.memory_report(1, 8).optimizer - estimate) <= 24
    assert not lm.backbone.token_embedding.embeddings.trainable


def test_what_follows_what():
    config = Gemma2Config(**EVEN)
    lora = LoraSettings.of(config, 2, 16, "attention")
    plain, again = (plan_memory(config, 1, 1024, lora=lora, gradient_checkpointing=c) for c in (False, True))
    per_block = (plain.activations - again.activations) / config.num_layers
    assert per_block == again.backward - plain.backward - 1024 * config.hidden_dim * 4  # a block but for its input
    doubled = plan_memory(config, 1, 2048, lora=lora)
    assert doubled.activations == 2 * plain.activations and doubled.backward == 2 * plain.backward  # nothing is T x T
    assert plan_memory(config, 2, 1024, lora=lora).activations == doubled.activations
    short, half = plan_memory(config, 1, 256, lora=lora), plan_memory(config, 1, 128, lora=lora)
    assert short.activations > 2 * half.activations  # up to 256 tokens scores are kept
    sizes = [plan_memory(config, 1, 64, lora=lora, quantize=mode).weights for mode in (None, "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    everything = plan_memory(config, 1, 1024)
    assert everything.gradients == everything.weights and everything.activations > plain.activations
    assert plan_memory(config, 1, 1024, dtype="bfloat16", lora=lora).activations < plain.activations


@pytest.mark.parametrize("case", ["medium, LoRA, checkpointing", "medium, LoRA, mixed_bfloat16", "medium, all weights"])
def test_estimates_are_within_a_quarter_of_what_a_step_holds(case):
    found = in_fresh_process("memory", keras.backend.backend(), "--child", "--case", case)
    assert abs(found["estimate"] - found["measured"]) < 0.25 * found["measured"], found


def test_the_largest_model_is_planned_at_once():
    lora = LoraSettings.of(NAMED_SIZES["gemma2_27b"], 8, 16, "attention")
    report = plan_memory(
        NAMED_SIZES["gemma2_27b"], 1, 2048, dtype="bfloat16", quantize="int4", lora=lora, gradient_checkpointing=True
    )
    assert 14e9 < report.weights < 18e9 and report.total > report.weights
    text = str(report)
    assert all(name in text for name in ("weights", "gradients", "optimizer", "activations", "loss", "total")) and "GB" in text
    assert isinstance(report, MemoryReport)


@pytest.mark.parametrize(
    "batch, length, words",
    [(0, 8, "`batch`.*batch=0"), (1, 0, "`length`.*length=0"), (1, 4096, "max_sequence_length, 2048.*4096"), (True, 8, "`batch`")],
)
def test_sizes_that_make_no_step(batch, length, words):
    with pytest.raises(ValueError, match=words):
        model().memory_report(batch, length)


def test_what_is_missing_is_said():
    lm = Gemma2CausalLM(Gemma2Backbone(**EVEN))
    lm.compiled = False
    with pytest.raises(ValueError, match="compile"):
        lm.memory_report(1, 8)
    with pytest.raises(ValueError, match="optimizer.*'adm'"):
        plan_memory(Gemma2Config(**EVEN), 1, 8, optimizer="adm")
    with pytest.raises(ValueError, match="backend.*'numpy'"):
        plan_memory(Gemma2Config(**EVEN), 1, 8, backend="numpy")


# Accumulation and mixed precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, quantize", [("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "int4")])
def test_accumulated_batches_equal_a_larger_one(dtype, quantize, tmp_path):
    """Sums in another order: last bits of float32, or of activations in bfloat16, of which each row has the same either way."""
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-4
    found = []
    for steps in (1, 2):
        more = {} if steps == 1 else {"gradient_accumulation_steps": steps}
        lm = model(dtype, quantize, optimizer=keras.optimizers.SGD(1.0, **more))
        before = [ops.convert_to_numpy(v) for v in lm.trainable_variables]
        x, rows = data(), 4 // steps
        for i in range(steps):
            if steps > 1:
                assert i == 0 or all(np.array_equal(a, ops.convert_to_numpy(v)) for a, v in zip(before, lm.trainable_variables))
            lm.train_on_batch({key: value[i * rows : (i + 1) * rows] for key, value in x.items()})
        found.append([ops.convert_to_numpy(v) - a for a, v in zip(before, lm.trainable_variables)])
    largest = max(np.abs(a).max() for a in found[0])
    assert largest > 1e-4
    assert all(np.abs(a - b).max() <= tolerance * largest for a, b in zip(*found))


def test_gradients_in_mixed_precision_are_near_those_in_float32():
    """bfloat16 keeps 8 bits: 1/256 an operation; a few dozen of them in a row stay under a tenth of the largest gradient."""
    found = []
    for dtype in ("float32", "mixed_bfloat16"):
        lm = model(dtype, lora=False, optimizer=keras.optimizers.SGD(1.0))
        before = [ops.convert_to_numpy(v) for v in lm.trainable_variables]
        assert all(v.dtype == "float32" for v in lm.trainable_variables)
        lm.train_on_batch(data())
        found.append([ops.convert_to_numpy(v) - a for a, v in zip(before, lm.trainable_variables)])
    for one, other in zip(*found):
        assert np.abs(one - other).max() <= 0.1 * np.abs(one).max()


def test_accumulation_goes_through_a_keras_file(tmp_path):
    lm = model(optimizer=keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
    lm.train_on_batch(data())  # half of a step
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    lm.train_on_batch(data())
    loaded.train_on_batch(data())
    for one, other in zip(lm.trainable_variables, loaded.trainable_variables, strict=True):
        assert np.abs(ops.convert_to_numpy(one) - ops.convert_to_numpy(other)).max() < 1e-5


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's autograd tells what it keeps")
def test_activations_are_what_autograd_keeps():
    import torch

    from keras_gemma2.benchmarks.memory import MEDIUM

    lm = Gemma2CausalLM(Gemma2Backbone(**{**MEDIUM, "num_layers": 3}))
    lm.enable_lora(8)
    lm.compile(optimizer="adam")
    own, kept = {v.value.untyped_storage().data_ptr() for v in lm.variables}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = {"token_ids": np.ones((1, 512), "int32"), "padding_mask": np.ones((1, 512), "int32")}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.train_on_batch(x)
    assert lm.memory_report(1, 512).activations == pytest.approx(sum(kept.values()), rel=0.1)


# The command and the benchmark ------------------------------------------------------------------------------------------


@pytest.mark.backend_free
def test_the_command_prints_the_plan(capsys):
    options = ["--dtype", "bfloat16", "--quantize", "int4", "--lora-rank", "4", "--targets", "all", "--gradient-checkpointing"]
    sizes = ["--batch", "2", "--length", "512", "--optimizer", "adamw", "--backend", keras.backend.backend()]
    assert main(["plan-memory", "gemma2_9b_en", *options, *sizes]) == 0
    config = NAMED_SIZES["gemma2_9b"]
    settings = {"dtype": "bfloat16", "quantize": "int4", "gradient_checkpointing": True, "optimizer": "adamw"}
    report = plan_memory(config, 2, 512, lora=LoraSettings.of(config, 4, 16, "all"), **settings)
    assert capsys.readouterr().out == f"gemma2_9b_en: {report}\n"


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "9000"], "`length` must be at most the model's max_sequence_length, 8192. Received: length=9000"),
        (["--optimizer", "adm"], "`optimizer` must be one of"),
        (["--lora-rank", "8", "--targets", "nothing"], "nothing"),
        (["--batch", "0"], "must be an integer of at least 1"),
        (["--dtype", "float7"], "float7"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_refuses(arguments, message, capsys):
    try:
        code = main(["plan-memory", "gemma2_2b_en", "--backend", keras.backend.backend(), *arguments])
    except SystemExit as error:  # what argparse itself refuses
        code = error.code
    printed = capsys.readouterr()
    assert code == 2 and not printed.out
    assert message in printed.err and printed.err.count("\n") == 1


@pytest.mark.backend_free
def test_the_benchmark_prints_a_row_for_each_case_and_backend(monkeypatch, capsys):
    figures = {"estimate": 75e6, "measured": 100e6, "process": 2e8}
    monkeypatch.setattr(memory, "in_fresh_process", lambda *arguments: figures)
    parser = argparse.ArgumentParser()
    memory.add_command(parser.add_subparsers())
    options = parser.parse_args(["memory", "--case", "medium, LoRA", "--backend", "jax", "--backend", "torch"])
    options.run(options)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [f"| medium, LoRA | 1024 | {backend} | 75 | 100 | 0.75 | 200 |" for backend in ("jax", "torch")]
