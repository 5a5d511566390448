"""Prompts past the chunk, the window and the block of attention, with all at their real sizes; and what compiles, and when."""

import warnings

import keras
import numpy as np
import pytest
from oracle import hugging_face_folder, hugging_face_logits, numpy_logits

from keras_gemma2 import Gemma2CausalLM, Sampler, backend
from keras_gemma2.cache import BLOCK, empty_caches
from keras_gemma2.config import Gemma2Config
from keras_gemma2.generation.runner import CHUNK, Runner, pieces
from keras_gemma2.layers.blocked_attention import RunningSoftmax

# As in test_parity: float32 rounding, as a share of the logits' range.
TOLERANCE = 2e-5
WINDOW = 700


def load(**overrides):
    folder, model = hugging_face_folder(**overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Gemma2CausalLM.from_preset(folder), model


@pytest.fixture(scope="module")
def pair():
    return load(max_position_embeddings=1500, sliding_window=WINDOW, num_hidden_layers=2)


def tokens(*lengths):
    rng = np.random.default_rng(4)
    return [rng.integers(0, 97, n).tolist() for n in lengths]


def test_the_sizes_mean_something():
    assert CHUNK < WINDOW < BLOCK < 1300


def test_long_ragged_prompts_and_what_follows_equal_the_oracle(pair):
    """Rows of one, two and three chunks; the longest wraps its ring, fills more than a block, and goes on decoding past it.

    The context is no multiple of the block, so that the last block overlaps the one before.
    """
    lm, model = pair
    rows = tokens(1300, 530, 3)
    runner = lm.make_generate_function()
    caches, hidden = runner.prefill(runner.new_caches(3, 1340), rows)
    logits = runner.logits(hidden)
    for step in range(4):
        ours = keras.ops.convert_to_numpy(logits)
        for row, ids in enumerate(rows):
            expected = hugging_face_logits(model, [ids])[0, -1]
            assert np.abs(ours[row] - expected).max() <= TOLERANCE * np.ptp(expected), (row, step)
        chosen, positions = ours.argmax(axis=1).astype("int32"), np.array([len(ids) for ids in rows], "int32")
        rows = [[*ids, int(token)] for ids, token in zip(rows, chosen)]
        logits, caches = runner.step(caches, chosen, positions)


def test_the_whole_context_of_8192():
    """With the window of 4096 that the published models have: its ring wraps, and the last token stands in the last place.

    The oracle is the one in float64: transformers' eager attention would hold all 8192 x 8192 scores of each head.
    """
    lm, _ = load(
        max_position_embeddings=8192,
        sliding_window=4096,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    (ids,) = tokens(8191)
    weights = {path: keras.ops.convert_to_numpy(weight) for path, weight in lm.backbone.named_weights().items()}
    runner = lm.make_generate_function()
    caches, hidden = runner.prefill(runner.new_caches(1, 8192), [ids])
    first = keras.ops.convert_to_numpy(runner.logits(hidden))[0]
    after, _ = runner.step(caches, np.array([5], "int32"), np.array([8191], "int32"))
    expected = numpy_logits(weights, lm.backbone.config, [*ids, 5])[-2:]
    for ours, row in zip((first, keras.ops.convert_to_numpy(after)[0]), expected):
        assert np.abs(ours - row).max() <= TOLERANCE * np.ptp(row)
    inputs = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), "int32")}
    out = lm.generate(inputs, max_new_tokens=100, stop_token_ids=None)["token_ids"]
    assert out.shape == (1, 8192) and out[0, -1] == expected[0].argmax()


def test_a_long_text_is_scored_as_by_the_oracle(pair):
    lm, model = pair
    (ids,) = tokens(1100)
    inputs = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), "int32")}
    logits = hugging_face_logits(model, [ids])[0].astype("float64")
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(lm.score(inputs)[0], expected, atol=1e-4)  # TOLERANCE of a range of 6


def test_pieces_cover_each_prompt_once():
    lengths = [1300, 530, 3, 512, 0, 20, 17]
    seen = [[] for _ in lengths]
    for piece in pieces(lengths):
        assert piece.steps * len(piece.rows) <= 1024 and max(piece.counts) <= piece.steps <= max(16, 2 * min(piece.counts))
        for row, first, count in zip(piece.rows, piece.firsts, piece.counts):
            seen[row] += range(first, first + count)
    assert seen == [list(range(length)) for length in lengths]


def test_caches_of_the_published_models_take_three_quarters():
    """At 8192 tokens the local half of the layers keeps 4096; stated in bytes, without making them."""
    config = Gemma2Config(256000, 26, 8, 4, 2304, 9216, 256)
    sizes = []

    def zeros(shape, dtype):
        sizes.append(int(np.prod(shape)) * 2)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keras_gemma2.cache.ops.zeros", zeros)
        empty_caches(config, 1, 8192, "bfloat16")
    full = 2 * 26 * 4 * 8192 * 256 * 2
    assert full == 872_415_232 and sum(sizes) <= 0.76 * full


def test_no_more_keys_than_a_block_are_scored_at_once(pair, monkeypatch):
    """Scores are `[chunk, block]` at most, whatever the length; local layers read no more than their ring and the chunk."""
    seen = []
    add = RunningSoftmax.add

    def recorded(self, state, keys, values, mask):
        seen.append((self.queries.shape[3], keys.shape[2]))
        return add(self, state, keys, values, mask)

    monkeypatch.setattr(RunningSoftmax, "add", recorded)
    runner = Runner(pair[0].backbone)  # which compiles anew
    caches, _ = runner.prefill(runner.new_caches(1, 1340), tokens(1300))
    runner.step(caches, np.array([5], "int32"), np.array([1300], "int32"))
    assert max(queries for queries, _ in seen) == CHUNK and {queries for queries, _ in seen} >= {1, CHUNK}
    # A chunk's own, a ring with the slot that is never seen, a block of a full cache, and of any cache where one token runs.
    assert {keys for _, keys in seen} == {CHUNK, WINDOW + 1, BLOCK, backend.step_block()}


def compilations(runner):
    """What has been compiled so far, by the backend's own count."""
    if keras.backend.backend() == "tensorflow":
        functions = [*runner._extend.values(), *runner._first.values(), *runner._loops.values(), runner._copy, runner._logits]
        return sum(function.experimental_get_tracing_count() for function in functions)
    if keras.backend.backend() == "torch":
        return len(TAPES)
    return JAX_COMPILATIONS[0]


JAX_COMPILATIONS, TAPES = [0], []
if keras.backend.backend() == "jax":
    import jax

    def _count(event, duration, **kwargs):
        JAX_COMPILATIONS[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(_count)


def test_nothing_compiles_anew_within_a_bucket(pair, monkeypatch):
    lm, _ = pair
    runner = lm.make_generate_function()
    if keras.backend.backend() == "torch":
        from keras_gemma2.backend import torch_tapes

        record = torch_tapes.record
        monkeypatch.setattr(torch_tapes, "record", lambda *arguments: (TAPES.append(1), record(*arguments))[1])

    def generate(lengths, count, seed=0, **numbers):
        rows = tokens(*lengths)
        ids, mask = np.zeros((len(rows), max(lengths)), "int32"), np.zeros((len(rows), max(lengths)), "int32")
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        sampler = Sampler(**{"temperature": 0.7, **numbers})
        lm.generate({"token_ids": ids, "padding_mask": mask}, max_new_tokens=count, sampler=sampler, seed=seed, stop_token_ids=None)

    before = compilations(runner)
    generate((20, 30), 3, top_k=3)
    for seed in range(4):  # on torch, a tape for each side that a step of the bisection may take
        generate((20, 30), 3, top_k=20, top_p=0.5, seed=seed)
    first = compilations(runner)
    assert first > before  # so that the count counts
    generate((17, 32), 9, seed=5, temperature=1.1, top_k=4)
    generate((25, 25), 40, seed=-1, top_k=7)
    generate((31, 18), 2, seed=2**70, top_p=0.3, min_p=0.01)
    assert compilations(runner) == first
    generate((20, 30), 3, temperature=0)
    greedy = compilations(runner)
    generate((32, 17), 50, temperature=0)
    assert compilations(runner) == greedy
    generate((32, 17), 300, temperature=0)  # the next bucket of the caches
    wider = compilations(runner)
    assert wider > greedy
    generate((19, 31), 400, temperature=0)
    generate((20, 30), 9, temperature=0)  # back in the one before
    assert compilations(runner) == wider
