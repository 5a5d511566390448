"""Samplers against transformers' logits processors, draws against their distribution, and bad input."""

import copy
import functools
import json
import pickle

import keras
import numpy as np
import pytest
import torch
import transformers
from oracle import hugging_face_model
from scipy import stats

from keras_gemma2 import Sampler, backend
from keras_gemma2.generation import sampler as sampling
from keras_gemma2.generation.drawing import _first_over, draw, log_probability, most_likely, philox, uniforms
from keras_gemma2.generation.sampler import choose_on_host, initial_marks, plan

V = 3001  # a prime: the blocks of the draw need filling up
LARGE = 256000
ROWS = 8  # of most batches: one shape, so that jax compiles little
INF = np.inf


def numpy(x):
    return keras.ops.convert_to_numpy(x)


@functools.lru_cache
def compiled(name, key):
    """A function of the module, compiled as generation compiles it."""
    function = getattr(sampling, name)
    return backend.compile_function(lambda unused, *arguments: function(key, *arguments), [])


@functools.lru_cache
def compiled_alone(function):
    return backend.compile_function(lambda unused, *arguments: function(*arguments), [])


def call_alone(function, *arrays):
    return numpy(compiled_alone(function)((), *map(keras.ops.convert_to_tensor, arrays)))


def filled_up(samplers):
    return [*samplers, *[Sampler()] * (ROWS - len(samplers))]


def call(name, chosen, marks, logits, *others):
    arrays = {key: keras.ops.convert_to_tensor(value) for key, value in chosen.arrays.items()}
    tensors = [keras.ops.convert_to_tensor(x) for x in (marks, np.asarray(logits, "float32"), *others)]
    return compiled(name, chosen.key)((), arrays, *tensors)


def normal_logits(rows, size=V, seed=0, scale=4.0):
    return np.random.default_rng(seed).normal(0, scale, (rows, size)).astype("float32")


# The oracle: transformers' own list of processors, run in float64 -----------------------------------------------------------


class PresencePenalty(transformers.LogitsProcessor):
    """OpenAI's: subtracted once from each token generated so far. transformers has none."""

    def __init__(self, penalty, generated):
        self.penalty, self.generated = penalty, generated

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, list(set(self.generated))] -= self.penalty
        return scores


@functools.lru_cache
def model():
    return hugging_face_model()


def expected_probabilities(sampler, prompt, generated, logits):
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=sampler.temperature,
        top_k=sampler.top_k or 0,
        top_p=1.0 if sampler.top_p is None else sampler.top_p,
        min_p=sampler.min_p,
        repetition_penalty=sampler.repetition_penalty,
        sequence_bias=[[[i], value] for i, value in (sampler.logit_bias or {}).items()] or None,
    )
    ours = [PresencePenalty(sampler.presence_penalty, generated)]
    if sampler.logits_processor is not None:

        def run(input_ids, scores):
            changed = sampler.logits_processor(input_ids[0].numpy(), scores[0].numpy().astype("float32"))
            return torch.tensor(changed)[None].double()

        ours.append(run)
    processors = model()._get_logits_processor(config, len(prompt), logits_processor=transformers.LogitsProcessorList(ours))
    scores = processors(torch.tensor([[*prompt, *generated]]), torch.tensor(logits, dtype=torch.float64)[None])
    return torch.softmax(scores, -1)[0].numpy()


def check_against_transformers(samplers, logits, seed=1):
    rng = np.random.default_rng(seed)
    size = logits.shape[1]
    # Likely tokens among them, so that penalties move what the filters keep.
    likely = np.argsort(-logits, axis=1)
    prompts = [[*rng.integers(0, size, 20).tolist(), *row[[0, 2, 5]].tolist()] for row in likely]
    generated = [[*rng.integers(0, size, 10).tolist(), *row[[1, 2, 7]].tolist()] for row in likely]
    chosen = plan(samplers, size)
    marks = initial_marks(chosen, prompts, size)
    if chosen.key.penalized:
        for row, ids in zip(marks, generated):
            row[ids] |= 2
    ours = numpy(call("probabilities", chosen, marks, logits))
    assert ours.dtype == np.float32
    for row, sampler in enumerate(samplers):
        expected = expected_probabilities(sampler, prompts[row], generated[row], logits[row])
        # What transformers gives less than float32 can hold, we may drop.
        np.testing.assert_array_equal(ours[row] > 0, expected > 1e-37, err_msg=repr(sampler))
        # float32: a logit of 20 is rounded at 1e-6, divided by a temperature of 0.5 at least.
        np.testing.assert_allclose(ours[row], expected, rtol=2e-5, atol=1e-37, err_msg=repr(sampler))
    return ours


BIAS = {3: 2.5, 17: -1.0, 2999: 30.0, 5: -INF}
CASES = {
    "temperature": [{"temperature": t} for t in (0.5, 1.0, 3.0)],
    "top_k": [{"top_k": k} for k in (1, 2, 50, V - 1, V, 10 * V, None)],
    "top_p": [{"top_p": p} for p in (1e-6, 0.1, 0.9, 0.99, 1.0, None)],
    "min_p": [{"min_p": p} for p in (0.0, 1e-4, 0.05, 0.7, 1.0, None)],
    "repetition_penalty": [{"repetition_penalty": r} for r in (1.0, 0.7, 1.3, 5.0)],
    "presence_penalty": [{"presence_penalty": r} for r in (0.0, -1.5, 0.6, 2.0)],
    "logit_bias": [{"logit_bias": bias} for bias in ({0: 8.0}, BIAS, {V - 1: -3.0})],
    "all": [
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 2.0, "top_k": 400, "top_p": 0.7, "presence_penalty": 0.8, "logit_bias": BIAS},
        {"temperature": 1.4, "top_k": 7, "min_p": 0.2, "repetition_penalty": 0.8, "presence_penalty": -1.0},
        {"top_p": 0.5, "min_p": 0.3, "repetition_penalty": 1.5, "logit_bias": {1: 1.0}},
        {"temperature": 1.1, "top_k": 30, "top_p": 0.8},
        {},
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_filters_equal_transformers(case):
    samplers = filled_up([Sampler(**arguments) for arguments in CASES[case]])
    check_against_transformers(samplers, normal_logits(ROWS))


def test_filters_equal_transformers_on_the_real_vocabulary():
    logits = 30 * np.tanh(normal_logits(3, LARGE, seed=3) / 30)  # Gemma's final cap
    samplers = [Sampler(temperature=0.8, top_k=64), Sampler(top_k=200, top_p=0.95, min_p=0.01), Sampler(top_p=0.9)]
    ours = numpy(call("probabilities", plan(samplers, LARGE), np.zeros((3, 1), "int8"), logits))
    for row, sampler in enumerate(samplers):
        expected = expected_probabilities(sampler, [1], [], logits[row])
        assert ours[row][ours[row] > 0].min() > ours[row][logits[row] < logits[row][ours[row] > 0].min()].max()
        # Without top_k, tokens at the edge weigh no more than float32 rounds: compare how much is kept.
        weight = np.exp(logits[row].astype("float64") / sampler.temperature)
        assert abs(weight[ours[row] > 0].sum() - weight[expected > 0].sum()) < 2e-6 * weight.sum()
        both = (ours[row] > 0) & (expected > 0)
        np.testing.assert_allclose(ours[row][both], expected[both], rtol=2e-5)
        if sampler.top_k:
            np.testing.assert_array_equal(ours[row] > 0, expected > 0)


def test_filters_with_banned_tokens_equal_transformers():
    """-inf in the logits themselves; fewer tokens left than top_k asks for."""
    logits = normal_logits(ROWS)
    logits[:, 10:] = -INF
    logits[0, 1500] = 3.0
    samplers = [Sampler(top_k=50), Sampler(top_p=0.8), Sampler(min_p=0.1), Sampler(top_k=4, top_p=0.9)]
    check_against_transformers(filled_up(samplers), logits)


def test_penalties_follow_what_is_generated():
    """Ten greedy steps; the marks that `choose` returns against transformers on the growing ids."""
    prompts = [[4, 9, 9], [1]]
    samplers = [Sampler(temperature=0, repetition_penalty=1.4, presence_penalty=0.5), Sampler(temperature=0, presence_penalty=1.0)]
    logits, generated = normal_logits(2, 41, scale=1.0), [[], []]
    chosen = plan(samplers, 41)
    marks = initial_marks(chosen, prompts, 41)
    for _ in range(10):
        tokens, marks = call("choose", chosen, marks, logits, np.zeros(2, "float32"))
        for row in range(2):
            sampler = Sampler(**{**samplers[row]._arguments(), "temperature": 1.0})
            expected = expected_probabilities(sampler, prompts[row], generated[row], logits[row]).argmax()
            assert numpy(tokens)[row] == expected
            generated[row].append(int(expected))
    assert all(len(set(row)) > 3 for row in generated)


def test_top_k_is_exact_at_any_magnitude():
    """Logits of 1e-30 to 30, both signs, both zeros and ties: what ties with the last one kept is kept too, as in transformers."""
    rng = np.random.default_rng(5)
    values = rng.choice([-1, 1], 600) * 10.0 ** rng.uniform(-30, 1.4, 600)
    row = np.concatenate([values, values[:200], [0.0, -0.0, 0.0]]).astype("float32")
    rng.shuffle(row)
    ks = (1, 2, 77, 200, 333, 400, 401, 402, 403, 404, 500, 700, 802, 803)
    marks, logits = np.zeros((len(ks), 1), "int8"), np.tile(row, (len(ks), 1))
    ours = numpy(call("probabilities", plan([Sampler(top_k=k) for k in ks], row.size), marks, logits))
    for k, kept in zip(ks, ours > 0):
        np.testing.assert_array_equal(kept, row >= np.sort(row)[-k], err_msg=str(k))


def test_ties_of_top_p_are_kept_together():
    """A token is kept if what is strictly likelier weighs less than top_p; four tokens of 0.1 tie here."""
    shares = np.array([0.1, 0.3, 0.1, 0.05, 0.1, 0.25, 0.1])
    chosen = plan([Sampler(top_p=p) for p in (0.2, 0.5, 0.56, 0.94, 0.96)], 7)
    ours = numpy(call("probabilities", chosen, np.zeros((5, 1), "int8"), np.tile(np.log(shares), (5, 1))))
    likelier = np.array([shares[shares > share].sum() for share in shares])
    for p, row in zip((0.2, 0.5, 0.56, 0.94, 0.96), ours):
        np.testing.assert_array_equal(row > 0, likelier < p)


def test_extreme_temperatures():
    logits = normal_logits(ROWS)
    chosen = plan(filled_up([Sampler(temperature=1e-45), Sampler(temperature=1e38, top_p=0.5)]), V)
    ours = numpy(call("probabilities", chosen, np.zeros((ROWS, 1), "int8"), logits))
    assert ours[0, logits[0].argmax()] == 1 and ours[0].sum() == 1
    assert np.ptp(ours[1][ours[1] > 0]) < 1e-6  # all tie


def test_greedy_rows_in_a_sampled_batch():
    logits, marks = normal_logits(ROWS), np.zeros((ROWS, 1), "int8")
    chosen = plan(filled_up([Sampler(temperature=0), Sampler(top_k=1)]), V)
    tokens, _ = call("choose", chosen, marks, logits, np.full(ROWS, 0.9, "float32"))
    assert numpy(tokens)[:2].tolist() == logits[:2].argmax(1).tolist() and numpy(tokens).dtype == np.int32
    ours = numpy(call("probabilities", chosen, marks, logits))
    assert ours[0, logits[0].argmax()] == 1 and np.count_nonzero(ours[0]) == 1


@pytest.mark.parametrize("size", [1, 2, 7, 97, V, LARGE])
def test_most_likely_is_the_first_of_the_largest(size):
    logits = np.round(normal_logits(5, size, seed=size), 1)
    assert call_alone(most_likely, logits).tolist() == logits.argmax(1).tolist()


# Draws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 97, V, LARGE])
def test_draw_inverts_the_cumulated_probabilities(size):
    rng = np.random.default_rng(size)
    rows = 40 if size < LARGE else 8
    shares = (rng.random((rows, size)) ** 8 * (rng.random((rows, size)) < 0.5)).astype("float32")
    shares[:, size // 3] += 0.1
    numbers = rng.random(rows).astype("float32")
    numbers[:3] = 0.0, 1 - 2**-24, 0.5
    tokens = call_alone(draw, shares, numbers)
    over = np.cumsum(shares, axis=1, dtype="float64") / shares.sum(axis=1, dtype="float64", keepdims=True)
    for row, token in enumerate(tokens):
        assert shares[row, token] > 0
        # Two running sums of at most 1000 float32 terms, each rounded at 6e-8 of the sum.
        assert (over[row, token - 1] if token else 0) - 1e-5 <= numbers[row] < over[row, token] + 1e-5


def test_rounded_running_sums_never_reach_a_weight_of_zero():
    """Parallel running sums may grow where the weight is 0, and end under the target."""
    weights = np.array([[0.3, 0.0, 0.3, 0.0], [0.3, 0.0, 0.3, 0.0], [0.0, 0.3, 0.0, 0.3]], "float32")
    running = np.array([[0.3, 0.31, 0.6, 0.6], [0.3, 0.3, 0.6, 0.6], [0.01, 0.3, 0.3, 0.6]], "float32")
    assert call_alone(_first_over, running, weights, np.array([0.305, 0.7, 0.0], "float32")).tolist() == [2, 2, 1]


def test_improbable_tokens_never_come_out():
    shares = np.zeros((6, V), "float32")
    shares[:3, 1234], shares[3:, [7, 2000]] = 1e-3, 0.5
    numbers = np.array([0, 0.5, 1 - 2**-24] * 2, "float32")
    tokens = call_alone(draw, shares, numbers)
    assert tokens.tolist() == [1234, 1234, 1234, 7, 2000, 2000]


@pytest.mark.parametrize("arguments", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.15}], ids=str)
def test_frequencies(arguments):
    """20,000 draws from 23 tokens. At 1e-4 a right sampler fails once in 10,000 seeds; this seed is fixed."""
    logits, count = normal_logits(1, 23, seed=9, scale=1.0), 20_000
    chosen = plan([Sampler(**arguments)] * count, 23)
    numbers = uniforms([5] * count, np.arange(count))
    tokens, _ = call("choose", chosen, np.zeros((count, 1), "int8"), np.tile(logits, (count, 1)), numbers)
    expected = expected_probabilities(Sampler(**arguments), [1], [], logits[0])
    counts = np.bincount(numpy(tokens), minlength=23)
    assert not counts[expected == 0].any()
    assert stats.chisquare(counts[expected > 0], expected[expected > 0] * count).pvalue > 1e-4


def test_frequencies_on_a_peaked_large_vocabulary():
    logits = normal_logits(1, LARGE, seed=11, scale=2.0)
    likely = np.argsort(-logits[0])[:9]
    logits[0, likely] += 6.0
    expected = expected_probabilities(Sampler(), [1], [], logits[0])
    shares = keras.ops.convert_to_tensor(np.tile(expected.astype("float32"), (16, 1)))
    run = backend.compile_function(lambda unused, numbers: draw(shares, numbers), [])
    numbers = uniforms([77] * 16, np.arange(16 * 125).reshape(16, 125))
    tokens = np.concatenate([numpy(run((), keras.ops.convert_to_tensor(numbers[:, i]))) for i in range(125)])
    # Bins: the peaks, then the rest in ten parts.
    bins = np.arange(LARGE) * 10 // LARGE + 9
    bins[likely] = np.arange(9)
    counts, shares = np.bincount(bins[tokens], minlength=19), np.bincount(bins, expected)
    assert shares[9:].min() * tokens.size > 5 < shares[:9].min() * tokens.size
    assert stats.chisquare(counts, shares * tokens.size).pvalue > 1e-4


def test_log_probability():
    logits, tokens = normal_logits(3), np.array([0, 17, V - 1], "int32")
    ours = call_alone(log_probability, logits, tokens)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()[range(3), tokens]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


# Uniform numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    """The known answers for philox4x32-10 that the paper's authors publish with Random123."""

    def words(text):
        return [np.array([int(word, 16)], "uint64") for word in text.split()]

    np.testing.assert_array_equal(philox(np.stack(words(counter)), *words(key)), words(expected))


@pytest.mark.backend_free
@pytest.mark.parametrize("vary", ["seed", "position", "stream", "bit"])
def test_uniforms_of_neighbours_are_independent(vary):
    """Pairs of numbers in a 16 x 16 grid; and each number by itself."""
    n = 40_000
    first = (list(range(n)), np.zeros(n, int), 0) if vary != "position" else ([3] * n, np.arange(n) * 2, 0)
    second = {
        "seed": ([seed + 1 + n for seed in first[0]], first[1], 0),
        "position": (first[0], first[1] + 1, 0),
        "stream": (first[0], first[1], 1),
        "bit": ([seed + 2**64 for seed in first[0]], first[1], 0),
    }[vary]
    a, b = uniforms(*first), uniforms(*second)
    assert a.dtype == np.float32 and a.min() >= 0 and max(a.max(), b.max()) < 1
    grid = np.histogram2d(a, b, bins=16, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(grid.ravel()).pvalue > 1e-4
    adjacent = np.histogram2d(a[:-1:2], a[1::2], bins=16, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(adjacent.ravel()).pvalue > 1e-4


@pytest.mark.backend_free
def test_uniforms_depend_on_the_own_seed_and_position_only():
    seeds = [0, -1, 2**70, -(2**200), np.int64(7)]
    together = uniforms(seeds, np.arange(5))
    assert len(set(together.tolist())) == 5
    for row, seed in enumerate(seeds):
        assert uniforms([seed], [row])[0] == together[row]
    np.testing.assert_array_equal(uniforms([3, 4], [[0, 1, 2**40], [5, 6, 7]])[1], uniforms([4] * 3, [5, 6, 7]))
    assert uniforms([7], [1]) == uniforms([np.int32(7)], np.array([1], "uint8")) and uniforms([], np.zeros(0, int)).size == 0
    assert uniforms([1], [2**32]) != uniforms([1], [0])


@pytest.mark.backend_free
def test_uniforms_refuse_what_is_no_seed_or_position():
    for seed in (1.0, True, None, "1"):
        with pytest.raises(TypeError, match="`seeds`.*integers"):
            uniforms([seed], [0])
    for positions in ([-1], [0, 1], [0.5], 0):
        with pytest.raises(ValueError, match="`positions`.*at least 0"):
            uniforms([1], positions)


# What is no number ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.1}, {"top_k": 9, "repetition_penalty": 1.2}],
    ids=str,
)
def test_unusable_rows_give_minus_one_and_the_others_their_token(arguments):
    logits = normal_logits(8)
    chosen, numbers = plan([Sampler(**arguments)] * 8, V), uniforms(range(8), np.zeros(8, int))
    marks = initial_marks(chosen, [[1, 2]] * 8, V)
    before = numpy(call("choose", chosen, marks, logits, numbers)[0])
    logits[0, 0], logits[1, -1], logits[2, 1500], logits[3, 40] = np.nan, np.nan, -np.nan, INF
    logits[4], logits[5], logits[6] = -INF, np.nan, INF
    tokens, marks_after = call("choose", chosen, marks, logits, numbers)
    assert numpy(tokens).tolist() == [-1] * 7 + [before[7]] and before.min() >= 0
    assert np.isnan(numpy(call("probabilities", chosen, marks, logits))[:7]).any(axis=1).all()
    if chosen.key.penalized:
        assert (numpy(marks_after)[:7] == marks[:7]).all() and numpy(marks_after)[7, before[7]] & 2


def test_a_row_draws_the_same_wherever_it_is_in_the_batch():
    samplers = [Sampler(**arguments) for arguments in (*CASES["all"], {"temperature": 0}, {"top_p": 0.2})]
    logits, seeds, positions = normal_logits(ROWS, seed=2), np.arange(ROWS), np.arange(ROWS)
    found = []
    for order in (np.arange(ROWS), np.arange(ROWS)[::-1], np.roll(np.arange(ROWS), 3)):
        chosen = plan([samplers[row] for row in order], V)
        marks = initial_marks(chosen, [[int(row)] for row in order], V)
        numbers = uniforms(seeds[order], positions[order])
        tokens = numpy(call("choose", chosen, marks, logits[order], numbers)[0])
        found.append(tokens[np.argsort(order)].tolist())
    assert found[0] == found[1] == found[2]


def test_changing_a_number_compiles_nothing():
    traces = []

    def run(unused, arrays, marks, logits, numbers):
        traces.append(1)
        return sampling.choose(key, arrays, marks, logits, numbers)[0]

    compiled_run, logits = backend.compile_function(run, []), keras.ops.convert_to_tensor(normal_logits(2, 97))
    for step, arguments in enumerate([{}, {"top_k": 3}, {"top_k": 4, "top_p": 0.3}, {"temperature": 0.2, "min_p": 0.5}]):
        chosen = plan([Sampler(**arguments)] * 2, 97)
        key = chosen.key
        arrays = {name: keras.ops.convert_to_tensor(array) for name, array in chosen.arrays.items()}
        numbers = keras.ops.convert_to_tensor(uniforms([1, 2], [step, step]))
        compiled_run((), arrays, keras.ops.convert_to_tensor(initial_marks(chosen, [[1]] * 2, 97)), logits, numbers)
    assert len(traces) == (4 if keras.backend.backend() == "torch" else 1)  # torch runs eagerly: each call is one


# Logits processors ------------------------------------------------------------------------------------------------------------


def choose_with(processor, logits, **arguments):
    samplers = [Sampler(logits_processor=processor, **arguments), Sampler(temperature=0)]
    chosen = plan(samplers, logits.shape[1])
    rows = [[3, 5, 8], [2]]
    return choose_on_host(chosen, rows, initial_marks(chosen, rows, logits.shape[1]), logits, np.array([0.3, 0.3]))


def test_a_processor_runs_between_penalties_and_temperature():
    logits, seen = normal_logits(2, 97, seed=4), []

    def lift_the_even(token_ids, scores):
        seen.append((token_ids, scores.copy()))
        return np.where(np.arange(scores.size) % 2 == 0, scores + 3 * np.float32(token_ids.size), np.float32(-INF))

    arguments = {"temperature": 0.7, "top_k": 8, "repetition_penalty": 1.6, "logit_bias": {4: 2.0}}
    token = choose_with(lift_the_even, logits, **arguments)[0]
    assert token.dtype == np.int32 and token[1] == logits[1].argmax()
    assert seen[0][0].tolist() == [3, 5, 8] and seen[0][1].dtype == np.float32
    penalized = logits[0].astype("float64")
    penalized[4] += 2
    for i in (3, 5, 8):
        penalized[i] *= 1.6 if penalized[i] < 0 else 1 / 1.6
    np.testing.assert_allclose(seen[0][1], penalized, rtol=1e-6)
    expected = expected_probabilities(Sampler(logits_processor=lift_the_even, **arguments), [3, 5, 8], [], logits[0])
    over = np.cumsum(expected)
    assert token[0] == np.searchsorted(over, 0.3, side="right") and np.abs(over - 0.3).min() > 1e-4


def test_a_processor_that_changes_nothing_changes_no_token():
    logits, arguments = normal_logits(2, 97, seed=4), {"top_p": 0.9, "presence_penalty": 1.0, "logit_bias": {1: 1.0}}

    def spoil(token_ids, scores):
        kept = scores.copy()
        token_ids[:], scores[:] = 0, 0  # its own copies
        return kept

    token, marks = choose_with(spoil, logits, **arguments)
    chosen = plan([Sampler(**arguments), Sampler(temperature=0)], 97)
    plain, plain_marks = call("choose", chosen, initial_marks(chosen, [[3, 5, 8], [2]], 97), logits, np.full(2, 0.3, "float32"))
    assert token.tolist() == numpy(plain).tolist()
    np.testing.assert_array_equal(numpy(marks), numpy(plain_marks))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x[:-1], r"float32 \[97\]. Received: float32 \[96\]"),
        (lambda x: x.astype("float64"), r"Received: float64 \[97\]"),
        (lambda x: x.tolist(), "Received: list"),
        (lambda x: None, "Received: NoneType"),
        (lambda x: x * np.float32(np.nan), "Received: NaN"),
        (lambda x: x + np.float32(INF), r"Received: \+inf"),
        (lambda x: x - np.float32(INF), "Received: -inf for all tokens"),
    ],
)
def test_what_a_processor_returns_is_checked(returned, message):
    def my_processor(token_ids, logits):
        return returned(logits)

    with pytest.raises(ValueError, match=f"my_processor must return .*{message}"):
        choose_with(my_processor, normal_logits(2, 97))


def test_a_processor_does_not_see_unusable_rows():
    logits = normal_logits(2, 97)
    logits[0, 3] = np.nan
    assert choose_with(lambda token_ids, scores: pytest.fail("called"), logits)[0].tolist() == [-1, logits[1].argmax()]


# The Sampler and the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, np.nan, INF, True, "0.5", None, 1e39)),
        ("top_k", (0, -1, 2.0, True, "5", np.nan)),
        ("top_p", (0, 0.0, -0.1, 1.01, np.nan, True, "0.5", INF)),
        ("min_p", (-0.1, 1.01, np.nan, False, "0.5")),
        ("repetition_penalty", (0, -1.0, np.nan, INF, True, None)),
        ("presence_penalty", (np.nan, INF, -INF, True, None, "1")),
        (
            "logit_bias",
            ([1, 2], {"a": 1.0}, {-1: 1.0}, {True: 1.0}, {1.5: 1.0}, {1: np.nan}, {1: INF}, {1: "x"}, {1: True}, {1: 1e39}),
        ),
        ("logits_processor", (5, "greedy")),
    ],
)
def test_bad_arguments_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must .*Received"):
            Sampler(**{name: value})


@pytest.mark.backend_free
def test_sampler_object():
    sampler = Sampler(0.7, np.int64(40), np.float32(0.5), logit_bias={np.int32(3): -INF, 2: 1})
    assert repr(sampler) == "Sampler(temperature=0.7, top_k=40, top_p=0.5, logit_bias={3: -inf, 2: 1.0})"
    assert repr(Sampler()) == "Sampler()" and type(sampler.top_k) is int and type(sampler.top_p) is float
    same = Sampler(0.7, 40, 0.5, logit_bias={2: 1.0, 3: -INF})
    assert sampler == same and hash(sampler) == hash(same) and sampler != Sampler(0.7, 40, 0.5) and Sampler() != 1
    assert pickle.loads(pickle.dumps(sampler)) == sampler == copy.deepcopy(sampler)
    assert Sampler(logit_bias={}) == Sampler() and Sampler(temperature=0) == Sampler(temperature=0.0)
    with pytest.raises(AttributeError):
        sampler.top_k = 3
    with pytest.raises(TypeError):
        sampler.logit_bias[3] = 0.0
    bias = {1: 1.0}
    taken = Sampler(logit_bias=bias)
    bias[1] = np.nan
    assert taken.logit_bias[1] == 1.0


@pytest.mark.backend_free
def test_sampler_serializes():
    sampler = Sampler(0.7, 40, 0.9, 0.05, 1.1, 0.2, {5: -1.5, 7: -INF})
    config = keras.saving.serialize_keras_object(sampler)
    assert config["registered_name"] == "keras_gemma2>Sampler"
    text = json.dumps(config, allow_nan=False)
    assert keras.saving.deserialize_keras_object(json.loads(text)) == sampler
    assert Sampler.from_config(Sampler().get_config()) == Sampler()

    def my_processor(token_ids, logits):
        return logits

    with pytest.raises(ValueError, match="cannot be saved.*my_processor"):
        Sampler(logits_processor=my_processor).get_config()


@pytest.mark.backend_free
def test_plan_and_marks():
    chosen = plan([Sampler(), Sampler(temperature=0, top_k=3)], 10)
    assert tuple(chosen.key) == (True, True, False, False) and not chosen.on_host
    assert np.isinf(chosen.arrays["top_k"]).all() and np.isinf(chosen.arrays["top_p"]).all()
    assert initial_marks(chosen, [[1], [2, 2]], 10).shape == (2, 1)
    assert tuple(plan([Sampler(temperature=0)], 10).key) == (False, True, False, False)
    chosen = plan([Sampler(presence_penalty=1), Sampler(logit_bias={9: 1.0}, logits_processor=max)], 10)
    assert tuple(chosen.key) == (True, False, True, True) and chosen.on_host and chosen.processors == (None, max)
    assert chosen.arrays["bias"][:, 9].tolist() == [0.0, 1.0]
    marks = initial_marks(chosen, [[1], [2, 2, 0]], 10)
    assert marks.dtype == np.int8 and marks.tolist() == [[0, 1] + [0] * 8, [1, 0, 1] + [0] * 7]


@pytest.mark.backend_free
def test_a_plan_refuses_what_does_not_fit_the_vocabulary():
    with pytest.raises(ValueError, match=r"`logit_bias` must have token ids in \[0, 10\).*\[10\]"):
        plan([Sampler(), Sampler(logit_bias={10: 1.0})], 10)
    with pytest.raises(ValueError, match="`logit_bias` must leave at least one token"):
        plan([Sampler(logit_bias=dict.fromkeys(range(10), -INF))], 10)
    for samplers in ([], ["greedy"]):
        with pytest.raises(ValueError, match="`samplers` must hold one keras_gemma2.Sampler for each row"):
            plan(samplers, 10)
