"""Samples that share rows: where they are put, and that the loss and its gradients are those of rows of their own."""

import functools
import itertools

import keras
import numpy as np
import pytest
from conftest import TINY
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer, pack_samples
from keras_gemma2.layers import attention
from keras_gemma2.training.packing import best_fit

LENGTHS = (14, 3, 9, 2, 17, 6, 7, 5)  # up to three times the window of 5
ROW = 19


def samples(seed=0, vocabulary=97):
    draw = np.random.default_rng(seed)
    ids = [draw.integers(1, vocabulary, n) for n in LENGTHS]
    return ids, [draw.uniform(0.2, 2, n) * (draw.uniform(size=n) < 0.7) for n in LENGTHS]


def rows_of_their_own(ids, weights):
    x = {"token_ids": np.zeros((len(ids), ROW), "int32"), "padding_mask": np.zeros((len(ids), ROW), "int32")}
    y, w = np.zeros((len(ids), ROW), "int32"), np.zeros((len(ids), ROW), "float32")
    for row, (one, counts) in enumerate(zip(ids, weights)):
        x["token_ids"][row, : len(one)], x["padding_mask"][row, : len(one)] = one, 1
        y[row, : len(one) - 1], w[row, : len(one) - 1] = one[1:], counts[1:]
    return x, y, w


def model(vocabulary=97):
    keras.utils.set_random_seed(3)
    backbone = Gemma2Backbone(**{**TINY, "num_layers": 2, "vocabulary_size": vocabulary})
    draw = np.random.default_rng(1)
    for variable in backbone.trainable_variables:
        variable.assign(draw.normal(0, 0.3, variable.shape))
    return Gemma2CausalLM(backbone)


def array(x):
    return keras.ops.convert_to_numpy(x)


def summed():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")


def trained(data, loss=None, vocabulary=97):
    """The sum of the loss over tokens, and its gradients: what one step of plain descent changed."""
    lm = model(vocabulary)
    before = [np.array(array(v)) for v in lm.trainable_variables]
    lm.compile(optimizer=keras.optimizers.SGD(1.0), loss=loss or summed())
    value = float(lm.train_on_batch(*data, return_dict=True)["loss"])
    return value, [a - array(b) for a, b in zip(before, lm.trainable_variables)]


# Where they are put --------------------------------------------------------------------------------------------------------


def test_every_token_is_learned_from_what_stood_before_it():
    ids, weights = samples()
    packed = pack_samples(ids, ROW, weights=weights)
    assert sorted(itertools.chain(*packed.rows)) == list(range(len(ids)))
    for row, members in enumerate(packed.rows):
        assert list(members) == sorted(members)
        start = 0
        for number, index in enumerate(members, 1):
            place = np.s_[start : start + len(ids[index]) - 1]
            assert packed.x["token_ids"][row, place].tolist() == ids[index][:-1].tolist()
            assert packed.y[row, place].tolist() == ids[index][1:].tolist()
            assert packed.sample_weight[row, place] == pytest.approx(weights[index][1:])
            assert set(packed.x["padding_mask"][row, place].tolist()) == {number}
            start = place.stop
        rest = [packed.x["token_ids"], packed.x["padding_mask"], packed.y, packed.sample_weight]
        assert not any(values[row, start:].any() for values in rest)
    assert [row[0] for row in packed.rows] == sorted(row[0] for row in packed.rows)
    assert packed.fill == (sum(LENGTHS) - len(LENGTHS)) / (len(packed.rows) * ROW) == (packed.x["padding_mask"] > 0).mean()
    again = pack_samples(ids, ROW, weights=weights)
    assert again.rows == packed.rows and (again.x["token_ids"] == packed.x["token_ids"]).all()


def plain_best_fit(sizes, room):
    """The same rule by the definition: look at all bins."""
    bins, left = [], []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [b for b in range(len(bins)) if left[b] >= sizes[index]]
        if fits:
            chosen = min(fits, key=lambda b: left[b])
        else:
            chosen = len(bins)
            bins.append([])
            left.append(room)
        bins[chosen].append(index)
        left[chosen] -= sizes[index]
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_the_rule(seed):
    draw = np.random.default_rng(seed)
    room = int(draw.integers(5, 60))
    sizes = draw.integers(1, room + 1, 70).tolist()
    bins, plain = best_fit(sizes, room), plain_best_fit(sizes, room)
    assert sorted(itertools.chain(*bins)) == list(range(70))
    assert all(sum(sizes[i] for i in members) <= room for members in bins)
    # Which of several bins with equal room is taken is free, and changes no bin's room.
    assert sorted(sum(sizes[i] for i in members) for members in bins) == sorted(sum(sizes[i] for i in b) for b in plain)
    lower_bound = max(-(-sum(sizes) // room), sum(size > room / 2 for size in sizes))
    assert len(bins) <= 11 / 9 * lower_bound + 4


def test_many_samples_fill_their_rows():
    draw = np.random.default_rng(0)
    sizes = np.minimum(draw.lognormal(5, 1, 20000).astype(int) + 1, 1024).tolist()
    bins = best_fit(sizes, 1024)
    assert sum(sizes) / (len(bins) * 1024) > 0.99


# What they teach -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 4])
def test_loss_and_gradients_are_those_of_rows_of_their_own(monkeypatch, block):
    """With all scores at once and in blocks; samples are longer than the window, and end within blocks."""
    if block:
        monkeypatch.setattr(attention, "BLOCK", block)
        monkeypatch.setattr(attention, "attend_in_blocks", functools.partial(attention.attend_in_blocks, block=block))
    ids, weights = samples()
    packed = pack_samples(ids, ROW, weights=weights)
    assert len(packed.rows) < len(ids) and max(map(len, packed.rows)) > 2
    value, gradients = trained((packed.x, packed.y, packed.sample_weight))
    if block:
        monkeypatch.undo()
    wanted, plain = trained(rows_of_their_own(ids, weights))
    assert value == pytest.approx(wanted, rel=1e-5)
    for found, other in zip(gradients, plain, strict=True):
        # Float32 sums in another order; the last bits of weights up to 2, before and after the step.
        assert np.abs(found - other).max() <= 1e-5 * np.abs(other).max() + 5e-7
        assert np.abs(other).max() > 1e-2
    neighbours = {**packed.x, "padding_mask": (packed.x["padding_mask"] > 0).astype("int32")}
    assert abs(trained((neighbours, packed.y, packed.sample_weight))[0] - wanted) > 0.01  # they would see each other


def test_the_plain_loss_on_logits_too():
    """By a name that the package does not know, so that Keras takes it from the logits."""
    ids, weights = samples()
    packed = pack_samples(ids, ROW, weights=weights)
    loss = summed()
    found, _ = trained((packed.x, packed.y, packed.sample_weight), loss=lambda y, logits: loss.call(y, logits))
    wanted, _ = trained(rows_of_their_own(ids, weights))
    assert found * packed.y.size == pytest.approx(wanted, rel=1e-5)


def test_fit_takes_packed_samples():
    ids, weights = samples()
    packed = pack_samples(ids, ROW, weights=weights)
    lm = model()
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    wanted = lm.evaluate(packed.x, packed.y, sample_weight=packed.sample_weight, verbose=0)[0]
    history = lm.fit(packed, validation_data=packed, verbose=0).history
    assert history["loss"][0] == pytest.approx(wanted, rel=1e-5) == history["val_loss"][0]


# Texts ---------------------------------------------------------------------------------------------------------------------

TEXTS = ["the quick brown fox", "a number", "it never sees a letter, so is its answer", "one by one", "spaces are part of it"]
FORMS = {
    "texts": TEXTS,
    "pairs": {"prompts": TEXTS, "responses": TEXTS[::-1]},
    "chats": [[{"role": "user", "content": a}, {"role": "model", "content": b}] for a, b in zip(TEXTS, TEXTS[::-1])],
}


@pytest.fixture(scope="module")
def lm():
    lm = model(600)
    lm = Gemma2CausalLM(lm.backbone, Gemma2CausalLMPreprocessor(Gemma2Tokenizer(train_vocabulary()), 90))
    lm.compile(optimizer=keras.optimizers.SGD(0.0), loss=summed())
    return lm


@pytest.mark.parametrize("form", FORMS)
def test_packed_texts_have_the_same_loss(lm, form):
    data = FORMS[form]
    packed = pack_samples(data, preprocessor=lm.preprocessor)
    assert len(packed.rows) < len(TEXTS) and 0.4 < packed.fill <= 1
    # One batch: Keras's mean over batches does not weight sums.
    wanted = lm.evaluate(data, verbose=0)[0]
    assert lm.evaluate(data, pack=True, verbose=0)[0] == pytest.approx(wanted, rel=1e-5)
    history = lm.fit(data, pack=True, validation_data=data, verbose=0).history
    assert history["loss"][0] == pytest.approx(wanted, rel=1e-5) == history["val_loss"][0]


def test_packed_texts_are_cut_as_others(lm):
    counts = [len(lm.preprocessor.tokenizer(text)) + 2 for text in TEXTS]
    cut = sum(count > 8 for count in counts)
    assert 0 < cut < 5
    lm.preprocessor.sequence_length, lm.preprocessor.truncation = 7, "left"
    try:
        with pytest.warns(UserWarning, match=f"Truncation cut {cut} of 5 samples"):
            packed = pack_samples(TEXTS, preprocessor=lm.preprocessor)
        x, y, weights = lm.preprocessor(TEXTS)
    finally:
        lm.preprocessor.sequence_length, lm.preprocessor.truncation = 90, "error"
    assert packed.rows == tuple((i,) for i in range(5))
    learned = array(weights).astype(bool)
    assert (packed.x["padding_mask"].astype(bool) == learned).all() and learned.mean() == packed.fill
    assert (packed.x["token_ids"][learned] == array(x["token_ids"])[learned]).all()
    assert (packed.y[learned] == array(y)[learned]).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], 5), "must be a sample of 2 tokens or more"),
        (([[1]], 5), r"`x\[0\]` must be a list of 2 token ids or more"),
        (([[1, 2], "the fox"], 5), r"`x\[1\]` must be.*For text, pass `preprocessor"),
        (([[1, 2], [1.0, 2.0]], 5), r"`x\[1\]` must be"),
        (([[1, 2], list(range(8))], 6), "at most `sequence_length` \\+ 1 tokens, 7. Received 8 in sample 1"),
        (([[1, 2]], 0), "`sequence_length` must be a positive integer"),
        (([[1, 2]], None), "`sequence_length` must be a positive integer"),
    ],
)
def test_bad_samples(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pack_samples(*arguments)


def test_bad_settings(lm):
    with pytest.raises(ValueError, match="`weights` must have one entry a sample. Received: 1 for 2"):
        pack_samples([[1, 2], [3, 4]], 5, weights=[[1, 1]])
    with pytest.raises(ValueError, match=r"`weights\[1\]` must have one number a token, 2.*\(3,\)"):
        pack_samples([[1, 2], [3, 4]], 5, weights=[[1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="`sequence_length` and `weights` do not go with `preprocessor`"):
        pack_samples(TEXTS, 5, preprocessor=lm.preprocessor)
    with pytest.raises(ValueError, match="`pack=True` packs texts.*`keras_gemma2.pack_samples`"):
        lm.fit({"token_ids": [[1, 2]], "padding_mask": [[1, 1]]}, pack=True)
