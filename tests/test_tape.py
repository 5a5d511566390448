"""Tapes of PyTorch operations: they do what the recorded function does. PyTorch only (see conftest.py)."""

import concurrent.futures
import gc
import importlib
import weakref

import keras
import numpy as np
import pytest
import torch
from conftest import TINY
from keras import ops

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Sampler, backend
from keras_gemma2.backend import torch_tape, torch_tapes
from keras_gemma2.backend.torch_int8 import PackedInt8
from keras_gemma2.backend.torch_tape import Diverged, record
from keras_gemma2.generation.decode import next_logits


def tensors(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [torch.tensor(generator.normal(size=shape).astype("float32")) for shape in shapes]


def assert_same(function, first, *others):
    """Recorded with some arguments, the tape gives what the function gives for others; arguments are written to alike."""
    _, tape = record(lambda: function(*first), first)
    for arguments in (first, *others):
        copies = [argument.clone() for argument in arguments]
        expected, found = function(*copies), tape(*arguments)
        assert len(found) == len(expected)
        for one, other in zip((*found, *arguments), (*expected, *copies)):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return tape


@torch.no_grad()
def test_what_is_the_same_each_time_is_done_once():
    weight = tensors(0, (4, 4))[0]
    calls = []

    def function(x):
        calls.append(1)
        table = torch.arange(4).float() * weight.sum()  # of constants
        unused = torch.sin(x)
        del unused
        return [(x * 2.0 + 1.0) @ weight + table, (x * 2.0 + 1.0).half()]

    tape = assert_same(function, tensors(1, (3, 4)), tensors(2, (3, 4)))
    names = tape.__code__.co_varnames
    # x; x * 2, + 1, @, + table, half
    assert len(names) == 6, names


@torch.no_grad()
def test_writes_and_views():
    """Views of what is written to are read where they were read, not earlier, and not once for two times."""

    def function(cache, x):
        view = cache[1:3]
        before = view.sum()
        cache[1] = x
        after = view.sum()
        fresh = torch.zeros(4)
        fresh.add_(x)
        first, second = fresh.sum(), None
        fresh.mul_(2)
        second = fresh.sum()
        return [before, after, first, second, cache]

    assert_same(function, tensors(1, (4, 4), (4,)), tensors(2, (4, 4), (4,)), tensors(3, (4, 4), (4,)))


@torch.no_grad()
def test_constants_that_are_written_to_are_read_anew():
    count = torch.zeros(())

    def function(x):
        count.add_(1)
        return [x * count]

    _, tape = record(lambda: function(torch.ones(2)), [torch.ones(2)])
    x = torch.ones(2)
    _, tape = record(lambda: function(x), [x])
    assert [tape(x)[0][0].item() for _ in range(3)] == [3, 4, 5]


@torch.no_grad()
def test_infinities_and_other_arguments():
    def function(x):
        norm = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
        filled = torch.where(x > 0, x, -torch.inf)
        parts = filled.split([1, 3], dim=1)
        return [norm, *parts, torch.full_like(x, torch.nan), x.to(torch.bfloat16).float(), x.double() * 0.1, x * 0.1]

    assert_same(function, tensors(1, (3, 4)), tensors(2, (3, 4)))


@torch.no_grad()
def test_answers_are_asked_again():
    def function(x):
        return [x * 2 if x.sum() > 0 else x * 3]

    _, tape = record(lambda: function(torch.ones(2)), [torch.ones(2)])
    x = torch.ones(2)
    _, tape = record(lambda: function(x), [x])
    assert tape(torch.ones(2))[0].tolist() == [2, 2]
    with pytest.raises(Diverged):
        tape(-torch.ones(2))


def test_arguments_that_are_one_tensor_in_one_run_only():
    tapes, function = torch_tapes.Tapes([]), lambda a, b, c: (a - b, b * c)
    one, two, three = tensors(0, (3,), (3,), (3,))
    for arguments in [(one, one, two), (one, two, three), (two, two, three), (two, three, three), (three, three, three)] * 2:
        found, expected = tapes.run(function, "function", arguments), function(*arguments)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@torch.no_grad()
def test_runs_that_look_at_values_get_a_tape_each():
    runs = []

    def function(x):
        runs.append(1)
        return x * int(x[0])

    compiled = backend.compile_function(lambda unused, x: backend.repeated(function, "function")(x), [])
    for value in (1.0, 2.0, 1.0, 2.0, 1.0):
        assert compiled((), torch.full((2,), value)).tolist() == [value * value] * 2
    assert len(runs) == 2
    for value in range(3, 30):  # more than are kept: runs as it is
        assert compiled((), torch.full((2,), float(value)))[0].item() == value * value
    assert len(runs) == 29
    assert compiled((), torch.full((3,), 2.0)).tolist() == [4, 4, 4]  # another shape


def model(seed=3, **overrides):
    keras.utils.set_random_seed(seed)
    return Gemma2CausalLM(Gemma2Backbone(**{**TINY, **overrides}))


def tokens(rows):
    rows = np.array(rows)
    return {"token_ids": rows, "padding_mask": np.ones_like(rows)}


def test_a_step_is_bit_by_bit_the_same():
    """Past the window, and over several blocks of a cache."""
    lm = model()
    runner = lm.make_generate_function()
    with torch.no_grad():
        caches, _ = runner.prefill(runner.new_caches(2, 40), [[2, 5, 7, 9], [2, 11]])
        copies = [tuple(part.clone() for part in cache) for cache in caches]
        compiled = backend.compile_function(
            lambda caches, ids, positions: next_logits(lm.backbone, caches, ids, positions), lm.backbone.variables
        )
        for step in range(30):
            ids, positions = torch.tensor([3 + step, 50 - step]).int(), torch.tensor([4 + step, 2 + step]).int()
            expected, copies = next_logits(lm.backbone, copies, ids, positions)
            found, caches = compiled(caches, ids, positions)
            assert torch.equal(found, expected)
    for one, other in zip(caches, copies):
        # All but the slot that nothing is read of.
        assert all(torch.equal(a[:, :, :-1], b[:, :, :-1]) for a, b in zip(one, other))


def recordings(monkeypatch):
    """The number of tapes recorded from here on."""
    found, original = [], torch_tapes.record

    def counted(*args):
        found.append(1)
        return original(*args)

    monkeypatch.setattr(torch_tapes, "record", counted)
    return found


def test_nothing_is_recorded_twice(monkeypatch):
    lm, found = model(), recordings(monkeypatch)
    lm.generate(tokens([[2, 5, 7]]), max_new_tokens=5, stop_token_ids=None)
    assert len(found) == 1
    lm.generate(tokens([[2, 5, 7, 8, 9, 4]]), max_new_tokens=12, stop_token_ids=None)
    list(lm.stream(tokens([[2, 9]]), max_new_tokens=7, stop_token_ids=None))
    assert len(found) == 1
    counts = []
    for seed, top_k in ((1, 5), (2, 9), (3, 4)):
        sampler = Sampler(temperature=0.7, top_k=top_k)
        lm.generate(tokens([[2, 5, 7]]), max_new_tokens=9, stop_token_ids=None, sampler=sampler, seed=seed)
        counts.append(len(found))
    # The model, and one or two ways of a step of the bisection, of which not each top_k may need both.
    assert counts[0] > 1 and counts[-1] <= 5 and counts[-1] == counts[-2], counts


@pytest.mark.parametrize("change", ["assign", "fit", "in place", "unnoticed", "quantize", "load"])
def test_changed_weights_are_seen(change, tmp_path):
    lm = model()
    prompt = [2, 5, 7, 30, 12]
    lm.generate(tokens([prompt]), max_new_tokens=6, stop_token_ids=None)
    norm = lm.backbone.transformer_layers[1].post_ffw_norm.scale
    if change == "assign":
        norm.assign(ops.ones_like(norm) * 3)
    elif change == "in place":
        with torch.no_grad():
            norm.value.mul_(-2).add_(1)
    elif change == "unnoticed":  # which no count of writes shows
        norm.value.data.copy_(torch.full(norm.shape, 3.0))
    elif change == "fit":
        lm.compile(optimizer=keras.optimizers.SGD(1.0))
        lm.fit({"token_ids": np.array([prompt]), "padding_mask": np.ones((1, 5), "int32")}, verbose=0)
    elif change == "quantize":
        lm.quantize("int4")
    else:
        model(seed=4).save_weights(tmp_path / "other.weights.h5")
        lm.load_weights(tmp_path / "other.weights.h5")
    row = list(prompt)
    with torch.no_grad():
        while len(row) < len(prompt) + 6:
            row.append(int(ops.argmax(lm(tokens([row]))[0, -1])))
    out = lm.generate(tokens([prompt]), max_new_tokens=6, stop_token_ids=None)
    assert out["token_ids"][0].tolist() == row


def test_autocast_is_not_on_a_tape():
    """A recording made without it is not run within it, and the other way round."""
    inputs, lm, other = tokens([[2, 5, 7, 30, 12]]), model(), model()

    def logprobs(lm):
        return lm.generate(inputs, max_new_tokens=6, stop_token_ids=None, return_logprobs=True)[1][0]

    plain = logprobs(lm)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logprobs(lm)
        np.testing.assert_array_equal(logprobs(other), cast)
    np.testing.assert_array_equal(logprobs(other), plain)
    assert (cast != plain).any()


def test_constants_are_float32_whatever_the_default_is():
    torch_tape._as_tensor.cache_clear()
    x = tensors(0, (3,))[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = assert_same(lambda x: [x * 1.2345678, x + -0.0], [x])(x)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, x * 1.2345678, rtol=0, atol=0)


def test_weights_made_in_inference_mode():
    expected = model().generate(tokens([[2, 5, 7]]), max_new_tokens=4, stop_token_ids=None)["token_ids"]
    with torch.inference_mode():
        found = model().generate(tokens([[2, 5, 7]]), max_new_tokens=4, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, expected)


def test_packing_in_threads_leaves_pytorchs_engine_as_it_was():
    engines = torch.backends.quantized.supported_engines
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn" if "onednn" in engines else before
    chosen = torch.backends.quantized.engine
    codes = torch.randint(-127, 127, (200, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            packed = list(pool.map(lambda _: PackedInt8(codes), range(64)))
        assert torch.backends.quantized.engine == chosen
    finally:
        torch.backends.quantized.engine = before
    for one in packed:
        assert torch.equal(one.unpacked(), codes)


def test_caches_are_written_in_place():
    runner = model().make_generate_function()
    caches, _ = runner.prefill(runner.new_caches(1, 64), [[2, 5, 7]])
    before = [array.data_ptr() for pair in caches for array in pair]
    for position in (3, 4):  # recorded, and from the recording
        _, caches = runner.step(caches, np.array([9], "int32"), np.array([position], "int32"))
        assert [array.data_ptr() for pair in caches for array in pair] == before


def test_the_loop_ends_when_all_rows_have_ended(monkeypatch):
    lm, steps = model(), []
    inputs = tokens([[2, 5, 7]])
    row = lm.generate(inputs, max_new_tokens=8, stop_token_ids=None, strip_prompt=True)["token_ids"][0].tolist()
    place = next(i for i in range(2, 8) if row[i] not in row[:i])
    run = torch_tapes.Tapes.run
    monkeypatch.setattr(torch_tapes.Tapes, "run", lambda self, f, name, args: steps.append(name) or run(self, f, name, args))
    lm.generate(inputs, max_new_tokens=30, stop_token_ids=[row[place]])
    assert steps.count("step") == place  # the first token comes of the prompt


def test_weights_given_up_are_freed():
    """Tapes hold no memory of weights that are quantized, packed or unpacked."""
    lm = model()
    lm.generate(tokens([[2, 5, 7]]), max_new_tokens=3, stop_token_ids=None)
    storage = weakref.ref(lm.backbone.transformer_layers[0].feed_forward.gate.kernel.value.untyped_storage())
    lm.quantize("int8")
    gc.collect()
    assert storage() is None or not storage().nbytes()


def test_run_eagerly_calls_the_layers():
    lm, calls = model(), []
    lm.generate(tokens([[2, 5, 7]]), max_new_tokens=4, stop_token_ids=None)
    lm.backbone.layer_norm.register_forward_hook(lambda *_: calls.append(1))
    taped = lm.generate(tokens([[2, 5, 7]]), max_new_tokens=4, stop_token_ids=None)["token_ids"]
    assert len(calls) == 1  # the prompt's
    lm.run_eagerly = True
    eager = lm.generate(tokens([[2, 5, 7]]), max_new_tokens=4, stop_token_ids=None)["token_ids"]
    assert len(calls) == 1 + 4
    np.testing.assert_array_equal(taped, eager)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_compiled_with_torch_compile(quantize, monkeypatch):
    """By the backend that compiles nothing, which needs no C++ compiler; over two blocks of the cache."""
    original, compiled = torch.compile, []

    def compile(function, **kwargs):
        compiled.append(function)
        return original(function, backend="eager", **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(importlib.import_module("keras_gemma2.cache"), "BLOCK", 8)
    monkeypatch.setattr(importlib.import_module("keras_gemma2.backend.torch_packed"), "MIN_ELEMENTS", 0)
    lm = model(num_layers=2)
    if quantize:
        lm.quantize(quantize)
    expected = lm.generate(tokens([[2, 5, 7]]), max_new_tokens=12, stop_token_ids=None)["token_ids"]
    lm.jit_compile = True
    found = lm.generate(tokens([[2, 5, 7]]), max_new_tokens=12, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, expected)
    assert len(compiled) >= 2


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    def fails(graph, inputs):
        raise OSError("no compiler")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: original(function, backend=fails, **kwargs))
    lm = model(num_layers=1)
    lm.jit_compile = True
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        lm.generate(tokens([[2, 5, 7]]), max_new_tokens=4, stop_token_ids=None)
