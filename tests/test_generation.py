"""Cached generation against the naive, cache-less oracle on transformers' model."""

import warnings

import keras
import keras_hub
import numpy as np
import pytest
from oracle import hugging_face_folder, hugging_face_logits, naive_generate

from keras_gemma2 import Gemma2CausalLM
from keras_gemma2.cache import cache_slots, slot_positions
from keras_gemma2.generation.runner import cache_bucket, prompt_bucket

# As in test_parity: float32 rounding, as a share of the logits' range.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pair():
    """Our model and transformers', with the same weights; window 5, four layers."""
    folder, model = hugging_face_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Gemma2CausalLM.from_preset(folder), model


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 97, n).tolist() for n in lengths]


def as_dict(rows, length, side="right"):
    token_ids, mask = np.zeros((len(rows), length), "int32"), np.zeros((len(rows), length), "int32")
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        token_ids[i, where], mask[i, where] = row, 1
    return {"token_ids": token_ids, "padding_mask": mask}


@pytest.mark.parametrize("lengths", [(1,), (4,), (5,), (6,), (23,), (3, 17, 1, 9)], ids=str)
def test_cached_logits_equal_uncached_step_by_step(pair, lengths):
    """Prompts shorter and longer than the window and the bucket; decoding runs past the window several times."""
    lm, model = pair
    rows = prompts(*lengths)
    oracle = [naive_generate(model, row, len(row) + 14) for row in rows]
    runner = lm.make_generate_function()
    caches, hidden = runner.prefill(runner.new_caches(len(rows), 40), rows)
    logits = runner.logits(hidden)
    positions = np.array(lengths, "int32")
    for step in range(14):
        ours = keras.ops.convert_to_numpy(logits)
        for row, (_, expected) in enumerate(oracle):
            assert np.abs(ours[row] - expected[step]).max() <= TOLERANCE * np.ptp(expected), (row, step)
        tokens = np.array([text[n + step] for (text, _), n in zip(oracle, lengths)], "int32")
        if step < 13:
            logits, caches = runner.step(caches, tokens, positions)
            positions = positions + 1


def test_local_layers_keep_a_ring_of_the_window(pair):
    """One slot more, where padding is thrown."""
    lm, _ = pair
    sizes = [tuple(keys.shape) for keys, _ in lm.make_generate_function().new_caches(1, 40)]
    assert sizes == [(1, 2, 5 + 1, 16), (1, 2, 64 + 1, 16)] * 2
    assert cache_slots(40, 5) == 5 and cache_slots(3, 5) == 3 and cache_slots(40, None) == 40 and cache_slots(40, 5, 3) == 8


def test_slot_positions():
    positions = slot_positions(keras.ops.convert_to_tensor(np.array([0, 3, 9], "int32")), 4)
    assert keras.ops.convert_to_numpy(positions).tolist() == [[0, -3, -2, -1], [0, 1, 2, 3], [8, 9, 6, 7]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_generate_equals_the_oracle(pair, side):
    lm, model = pair
    lm.compile(sampler="greedy")
    rows = prompts(7, 2, 12)
    out = lm.generate(as_dict(rows, 12, side), max_length=24, stop_token_ids=None)
    assert out["token_ids"].dtype == np.int32 and out["padding_mask"].all()
    for row, text in zip(rows, out["token_ids"]):
        assert text.tolist() == naive_generate(model, row, 24)[0]
        assert len(set(text[len(row) :].tolist())) > 3  # the text varies, so that the comparison means something


def test_stop_tokens_end_a_row_and_not_the_others(pair):
    lm, model = pair
    lm.compile(sampler="greedy")
    rows = prompts(7, 2)
    texts = [naive_generate(model, row, 30)[0] for row in rows]
    stop = texts[0][10]
    out = lm.generate(as_dict(rows, 30), stop_token_ids=[stop])
    for row, text, ids, mask in zip(rows, texts, out["token_ids"], out["padding_mask"]):
        new = text[len(row) :]
        expected = text[: len(row) + new.index(stop) + 1] if stop in new else text
        assert ids[mask].tolist() == expected
        assert not ids[~mask].any()
    assert out["padding_mask"][0].sum() <= 11


def test_strip_prompt(pair):
    lm, model = pair
    lm.compile(sampler="greedy")
    rows = prompts(7, 2)
    out = lm.generate(as_dict(rows, 9), max_length=15, stop_token_ids=None, strip_prompt=True)
    for row, ids, mask in zip(rows, out["token_ids"], out["padding_mask"]):
        assert ids[mask].tolist() == naive_generate(model, row, 15)[0][len(row) :]


def test_a_full_row_comes_back_as_it_is(pair):
    lm, _ = pair
    inputs = as_dict(prompts(6), 6)
    np.testing.assert_array_equal(lm.generate(inputs, stop_token_ids=None)["token_ids"], inputs["token_ids"])


@pytest.mark.parametrize("sampler", ["top_k", "top_p", "random", keras_hub.samplers.TopKSampler(k=3, seed=2)], ids=str)
def test_other_samplers_draw_likely_tokens(pair, sampler):
    lm, model = pair
    lm.compile(sampler=sampler)
    row = prompts(4)[0]
    out = lm.generate(as_dict([row] * 3, 12), stop_token_ids=None)["token_ids"]
    assert out.shape == (3, 12) and (out[:, :4] == row).all()
    if isinstance(sampler, keras_hub.samplers.TopKSampler):
        for text in out:
            logits = hugging_face_logits(model, [text])[0]
            for t in range(3, 11):
                assert text[t + 1] in np.argsort(-logits[t])[:3]


def test_seeded_sampler_repeats(pair):
    lm, _ = pair
    inputs, outputs = as_dict(prompts(4), 30), []
    for seed in (1, 1, 2):
        lm.compile(sampler=keras_hub.samplers.RandomSampler(seed=seed))
        outputs.append(lm.generate(inputs, stop_token_ids=None)["token_ids"].tolist())
    assert outputs[0] == outputs[1] != outputs[2]


def test_beam_search_equals_a_plain_beam_search(pair):
    lm, model = pair
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=3))
    rows = prompts(6, 6)
    out = lm.generate(as_dict(rows, 11), stop_token_ids=None)["token_ids"]
    for row, text in zip(rows, out):
        beams = [(0.0, row)]
        for _ in range(5):
            candidates = []
            for score, ids in beams:
                logits = hugging_face_logits(model, [ids])[0, -1].astype("float64")
                log_probs = logits - np.log(np.exp(logits).sum())
                candidates += [(score + p, [*ids, i]) for i, p in enumerate(log_probs)]
            beams = sorted(candidates, reverse=True)[:3]
        assert text.tolist() == beams[0][1]


def test_ragged_beam_search_keeps_the_prompts(pair):
    lm, _ = pair
    lm.compile(sampler="beam")
    rows = prompts(3, 8)
    out = lm.generate(as_dict(rows, 12), stop_token_ids=None)["token_ids"]
    assert all(text[: len(row)].tolist() == row for row, text in zip(rows, out))


def test_a_stop_that_is_the_padding_does_not_end_beams_before_they_begin(pair):
    lm, _ = pair
    inputs = as_dict(prompts(3), 12)
    free = lm.generate(inputs, stop_token_ids=None, sampler="beam")["token_ids"]
    assert (free != 0).all(), "another seed is needed"
    np.testing.assert_array_equal(lm.generate(inputs, stop_token_ids=[0], sampler="beam")["token_ids"], free)


def test_a_beam_sampler_that_changes_is_another_one(pair):
    lm, _ = pair
    inputs = as_dict(prompts(3), 12)
    one, three = (keras_hub.samplers.BeamSampler(num_beams=count) for count in (1, 3))
    greedy, wide = (lm.generate(inputs, stop_token_ids=None, sampler=sampler)["token_ids"] for sampler in (one, three))
    assert (greedy != wide).any(), "another seed is needed"
    three.num_beams = 1
    np.testing.assert_array_equal(lm.generate(inputs, stop_token_ids=None, sampler=three)["token_ids"], greedy)
    again = lm.generate(inputs, stop_token_ids=None, sampler=keras_hub.samplers.BeamSampler(num_beams=3))["token_ids"]
    np.testing.assert_array_equal(again, wide)


def test_contrastive_search_is_refused(pair):
    lm, _ = pair
    lm.compile(sampler=keras_hub.samplers.ContrastiveSampler())
    with pytest.raises(ValueError, match="ContrastiveSampler"):
        lm.generate(as_dict(prompts(3), 8), stop_token_ids=None)
    lm.compile()


def test_generation_sees_training_in_between(pair):
    folder, _ = hugging_face_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = Gemma2CausalLM.from_preset(folder)
    inputs = as_dict(prompts(4), 20)
    before = lm.generate(inputs, stop_token_ids=None)["token_ids"]
    embedding = lm.backbone.token_embedding.embeddings
    embedding.assign(keras.ops.flip(embedding, axis=0))
    assert (lm.generate(inputs, stop_token_ids=None)["token_ids"] != before).any()


def test_compiled_steps_outlive_the_sampler_but_not_the_variables(pair):
    lm, _ = pair
    runner = lm.make_generate_function()
    lm.compile(sampler="top_k")
    assert lm.make_generate_function() is runner
    folder, _ = hugging_face_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = Gemma2CausalLM.from_preset(folder)
    lm.compile()
    assert other.make_generate_function() is not runner


def test_buckets():
    assert [prompt_bucket(n) for n in (1, 16, 17, 100, 257, 512, 1000)] == [16, 16, 32, 128, 512, 512, 512]
    assert [cache_bucket(n, 8192) for n in (1, 256, 257, 4097)] == [256, 256, 512, 8192]
    assert cache_bucket(20, 64) == 64


@pytest.mark.parametrize(
    "inputs, kwargs, message",
    [
        (as_dict([[1, 2, 3]], 3), {"max_length": 2, "stop_token_ids": None}, "max_length=2.*row 0 has 3 tokens"),
        (as_dict([[1]], 3), {"max_length": 65, "stop_token_ids": None}, "max_sequence_length, 64.*max_length=65"),
        (as_dict([[1]], 3), {"max_length": 0, "stop_token_ids": None}, "`max_length`.*0"),
        (as_dict([[1]], 3), {"max_length": 7.5, "stop_token_ids": None}, "`max_length`.*7.5"),
        (as_dict([[1], []], 3), {"stop_token_ids": None}, "Row 1 is all padding"),
        (as_dict([], 3), {"stop_token_ids": None}, "at least one prompt"),
        (as_dict([[1, 97]], 3), {"stop_token_ids": None}, r"in \[0, 97\).*the id 97"),
        (as_dict([[1]], 3), {}, "needs a preprocessor"),
        (as_dict([[1]], 3), {"stop_token_ids": "eos"}, "`stop_token_ids`.*'eos'"),
        ("some text", {"stop_token_ids": None}, "no preprocessor.*str"),
        ({"token_ids": np.ones((1, 2)), "padding_mask": np.ones((1, 2))}, {"stop_token_ids": None}, "integers.*float"),
    ],
)
def test_bad_input(pair, inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pair[0].generate(inputs, **kwargs)
