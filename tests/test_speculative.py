"""Speculative decoding: against plain decoding, transformers, and the exact distribution."""

import re
import warnings

import keras
import numpy as np
import pytest
from oracle import hugging_face_folder, hugging_face_logits, naive_generate
from sentencepiece import sentencepiece_model_pb2
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer, Sampler
from keras_gemma2.generation import drafts, speculative
from keras_gemma2.generation.drafts import PROPOSED, PromptLookup
from keras_gemma2.generation.speculative import SpeculationStats

NOISE = 0.04  # of a draft that is sometimes right
GREEDY = {"sampler": Sampler(temperature=0), "stop_token_ids": None}


def loaded(**overrides):
    folder, model = hugging_face_folder(**overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Gemma2CausalLM.from_preset(folder), model


def shaken(lm, scale):
    """A copy of a model with noise on its matrices."""
    copy = Gemma2CausalLM(Gemma2Backbone.from_config(lm.backbone.get_config()))
    shake(copy, lm, scale)
    return copy


def shake(copy, lm, scale):
    """Gives a copy the weights of the model again, with noise on the matrices: a share of their own spread."""
    rng = np.random.default_rng(5)
    for variable, original in zip(copy.backbone.variables, lm.backbone.variables):
        value = keras.ops.convert_to_numpy(original)
        noise = scale * value.std() * rng.standard_normal(value.shape).astype("float32") if value.ndim == 2 else 0
        variable.assign(value + noise)


@pytest.fixture(scope="module", autouse=True)
def traces():
    """The compiled functions of this subject, each time that one is traced."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((drafts, "propose"), (speculative, "verify")):
            function = getattr(module, name)
            patch.setattr(module, name, lambda *a, function=function, name=name: names.append(name) or function(*a))
        yield names


@pytest.fixture(scope="module")
def pair():
    """Our model and transformers', with the same weights; window 5, a local and a global layer."""
    return loaded(num_hidden_layers=2)


@pytest.fixture(scope="module")
def models(pair):
    """Drafts of every quality. The bad one has other sizes: fewer layers, another window."""
    lm, _ = pair
    config = {**lm.backbone.get_config(), "num_layers": 1, "layer_types": ["local"], "sliding_window_size": 7, "name": "bad"}
    keras.utils.set_random_seed(3)
    bad = Gemma2CausalLM(Gemma2Backbone.from_config(config))
    bad.backbone.layer_norm.scale.assign(np.full(42, -2.0, "float32"))  # logits of the other sign: the least likely token
    return {"noisy": shaken(lm, NOISE), "bad": bad, "prompt_lookup": "prompt_lookup"}


@pytest.fixture(scope="module")
def oracle(pair):
    """Three prompts, the texts that transformers makes of them, five windows long, and the log-probabilities of the new tokens."""
    rows, texts, logprobs = prompts(7, 1, 12), [], []
    for row in rows:
        text, logits = naive_generate(pair[1], row, len(row) + 24)
        assert len(set(text[len(row) :])) > 3  # the text varies, so that a comparison means something
        texts.append(text)
        logprobs.append([np.log(softmax(step)[token]) for step, token in zip(logits, text[len(row) :])])
    return rows, texts, logprobs


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 97, n).tolist() for n in lengths]


def as_dict(rows):
    length = max(map(len, rows))
    token_ids, mask = np.zeros((len(rows), length), "int32"), np.zeros((len(rows), length), "int32")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"token_ids": token_ids, "padding_mask": mask}


def real(output):
    return [ids[mask].tolist() for ids, mask in zip(output["token_ids"], output["padding_mask"])]


def softmax(logits, temperature=1.0):
    shares = np.exp((logits.astype("float64") - logits.max()) / temperature)
    return shares / shares.sum()


# Greedy -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["equal", "noisy", "bad", "prompt_lookup"])
def test_greedy_equals_the_oracle_in_fewer_runs(pair, models, oracle, draft, monkeypatch):
    """Ragged rows, far past the window; the bad draft's tokens are taken back again and again. Runs are counted."""
    lm, _ = pair
    rows, texts, _ = oracle
    runner, runs = lm.make_generate_function(), []
    if draft in ("equal", "noisy"):
        shake(models["noisy"], lm, 0 if draft == "equal" else NOISE)
    loop, compiled = runner.loop, runner.compiled
    monkeypatch.setattr(runner, "loop", lambda *arguments: runs.append(loop) or loop(*arguments))
    monkeypatch.setattr(runner, "compiled", lambda function, key: runs.append(function) or compiled(function, key))
    out = lm.generate(as_dict(rows), max_new_tokens=24, draft=models["noisy" if draft == "equal" else draft], **GREEDY)
    assert real(out) == texts
    stats = lm.generation_stats
    assert 0 <= stats.accepted <= stats.proposed
    assert len([run for run in runs if run is not drafts.propose]) == stats.rounds
    rate = stats.acceptance_rate
    expected = {
        # 23 tokens a row after its first, 5 a run: 4 proposed and one of the model's own, and 3 at the end.
        "equal": stats == SpeculationStats(3 * (4 * 4 + 3), 3 * (4 * 4 + 3), 5),
        "noisy": 0.3 < rate < 0.95 and stats.rounds < 20,
        "bad": rate < 0.2,
        "prompt_lookup": 0 < rate < 1 and stats.rounds <= 23,
    }
    assert expected[draft], stats


def test_stop_tokens_limits_and_logprobs(pair, models, oracle):
    lm, _ = pair
    rows, texts, logprobs = oracle
    stop = [texts[0][7 + 9], texts[1][1 + 4]]
    for limits in ({"max_new_tokens": 13}, {"max_length": 20}, {"max_length": 12}, {"max_new_tokens": 1}):
        out, ours = lm.generate(
            as_dict(rows), **{**GREEDY, "stop_token_ids": stop}, return_logprobs=True, draft=models["noisy"], **limits
        )
        for i, (row, text) in enumerate(zip(rows, texts)):
            end = limits.get("max_length", len(row) + limits.get("max_new_tokens", 0))
            new = text[len(row) : end]
            new = new[: min([new.index(token) + 1 for token in stop if token in new], default=None)]
            assert real(out)[i] == row + new
            np.testing.assert_allclose(ours[i], logprobs[i][: len(new)], atol=1e-4)  # float32, logits of up to 3


def test_stream_gives_what_generate_gives(pair, models, oracle):
    lm, _ = pair
    rows, texts, _ = oracle
    streamed = [list(row) for row in rows]
    for row, token in lm.stream(as_dict(rows), max_new_tokens=15, draft=models["noisy"], **GREEDY):
        streamed[row].append(token)
    assert streamed == [text[: len(row) + 15] for row, text in zip(rows, texts)]
    assert lm.generation_stats.accepted > 0
    lm.generate(as_dict(rows[:1]), **GREEDY)
    assert lm.generation_stats is None


def test_prefix(pair, models):
    lm, model = pair
    prefix, rows = prompts(13, seed=4)[0], prompts(3, 8, 5)
    out = lm.generate(as_dict(rows), prefix=lm.prefill(prefix), max_new_tokens=12, draft=models["noisy"], **GREEDY)
    assert real(out) == [naive_generate(model, prefix + row, 13 + len(row) + 12)[0] for row in rows]


# Drawn ------------------------------------------------------------------------------------------------------------------


def exact_distribution(model, prompt, sampler_probabilities):
    """Probability of each pair of next tokens, float64 `[V, V]`, from transformers' logits."""
    size = model.config.vocab_size
    first = sampler_probabilities(hugging_face_logits(model, [prompt])[0, -1])
    texts = [[*prompt, i] for i in range(size)]
    return first[:, None] * np.stack([sampler_probabilities(row) for row in hugging_face_logits(model, texts)[:, -1]])


def top_3(logits):
    """Temperature 1.5, and the three most likely."""
    shares = softmax(logits, 1.5)
    shares[shares < np.sort(shares)[-3]] = 0
    return shares / shares.sum()


def chi_square(counts, expected):
    """The statistic over its degrees of freedom, in standard deviations of that; cells of few are put together."""
    order = np.argsort(-expected.ravel())
    counts, expected = counts.ravel()[order], expected.ravel()[order]
    large = expected >= 5
    counts = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 1e-6:
        assert counts[-1] == 0  # what has no probability does not come out
        counts, expected = counts[:-1], expected[:-1]
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def small():
    """A model of 11 tokens, transformers' of the same weights, and drafts that differ a lot."""
    lm, model = loaded(vocab_size=11, num_hidden_layers=1)
    return lm, model, {"shaken": shaken(lm, 1.0), "prompt_lookup": "prompt_lookup"}


PROMPT = [3, 7, 1, 3, 7, 2, 3]


@pytest.mark.parametrize(
    "draft, sampler, filtered",
    [
        ("shaken", Sampler(), softmax),
        ("shaken", Sampler(temperature=1.5, top_k=3), top_3),
        ("prompt_lookup", Sampler(), softmax),
    ],
)
def test_drawn_pairs_have_the_models_distribution(small, draft, sampler, filtered):
    """Tokens 2 and 3 after the prompt, over rows of other seeds: the first is always drawn without the draft."""
    lm, model, models = small
    arguments = {"max_new_tokens": 4, "stop_token_ids": None, "sampler": sampler, "seed": 100, "strip_prompt": True}
    tokens = lm.generate(as_dict([PROMPT] * 2048), draft=models[draft], **arguments)["token_ids"]
    counts, expected = np.zeros((11, 11)), np.zeros((11, 11))
    firsts = np.bincount(tokens[:, 0], minlength=11)
    for first in np.flatnonzero(firsts):
        np.add.at(counts, tuple(tokens[tokens[:, 0] == first, 1:3].T), 1)
        expected += firsts[first] * exact_distribution(model, [*PROMPT, int(first)], filtered)
    # Five standard deviations: a chance of about one in ten thousand, given the statistic's skew.
    assert abs(chi_square(counts, expected)) < 5
    assert 0.02 < lm.generation_stats.acceptance_rate < 0.95


@pytest.mark.parametrize("certain", [False, True])
def test_acceptance_and_replacement_make_up_the_models_distribution(certain):
    """Exactly, without drawing: q(x) min(1, p / q) + (1 - accepted) rest(x) = p(x) for each token x."""
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.full(11, 0.5), 6).astype("float32") for _ in range(2))
    proposed = rng.integers(0, 11, 6).astype("int32")
    if certain:
        q = np.eye(11, dtype="float32")[proposed]
    chances = None if certain else keras.ops.convert_to_tensor(q)
    tensors = [keras.ops.convert_to_tensor(x) for x in (p, proposed)]
    rest = speculative._rest(*tensors, chances, keras.ops.ones(6, "bool"))
    rest = keras.ops.convert_to_numpy(rest)
    kept = np.minimum(p, q)
    total = kept + (1 - kept.sum(1, keepdims=True)) * rest / rest.sum(1, keepdims=True)
    np.testing.assert_allclose(total, p, atol=1e-6)
    # And draws that are just under min(1, p / q) accept, those just over it do not.
    shares = keras.ops.convert_to_tensor(np.stack([p, p], axis=1))
    bound = np.minimum(1, p / np.maximum(q, 1e-30))[np.arange(6), proposed]
    chances = None if certain else chances[:, None]
    for factor in (0.999, 1.001):
        accepting = keras.ops.convert_to_tensor((factor * bound)[:, None].astype("float32"))
        accepted = speculative._is_accepted(shares, tensors[1][:, None], chances, accepting)
        expected = (factor < 1) | (bound == 1) & (p > q)[np.arange(6), proposed]
        assert (keras.ops.convert_to_numpy(accepted)[:, 0] == expected)[bound > 0].all()


SAMPLERS = [
    Sampler(top_k=7),
    Sampler(temperature=1.2),
    Sampler(temperature=1.3, top_p=0.9, logit_bias={4: -np.inf, 7: 0.5}),
    Sampler(temperature=0, logit_bias={5: -np.inf}),
]


def test_draws_depend_on_a_rows_seed_alone(small, traces):
    """Not on the rows beside it, on their drafts' success, or on how the text is asked for; greedy rows stay greedy.

    And nothing is compiled anew over rounds, prompts, limits, seeds and the samplers' numbers.
    """
    lm, model, models = small
    traces.clear()
    rows, seeds = [PROMPT, [5, 1], PROMPT, PROMPT], [1, 2, 3, 4]
    greedy = list(PROMPT)
    while len(greedy) < len(PROMPT) + 14:
        logits = hugging_face_logits(model, [greedy])[0, -1]
        logits[5] = -np.inf
        greedy.append(int(logits.argmax()))
    for draft in ("shaken", "prompt_lookup"):
        arguments = {"stop_token_ids": None, "draft": models[draft]}
        texts = real(lm.generate(as_dict(rows), max_new_tokens=14, seed=seeds, sampler=SAMPLERS, **arguments))
        assert texts[3] == greedy and len(set(map(tuple, texts))) == 4 and 4 not in texts[2][len(PROMPT) :]
        other = [PROMPT, [1, 2, 3], PROMPT[:5], [5, 1]]
        of_other = [SAMPLERS[0], SAMPLERS[3], SAMPLERS[2], SAMPLERS[1]]
        streamed = [list(row) for row in other]
        for row, token in lm.stream(as_dict(other), max_new_tokens=11, seed=[1, 8, 9, 2], sampler=of_other, **arguments):
            streamed[row].append(token)
        assert streamed[0] == texts[0][:-3] and streamed[3] == texts[1][:-3]
    if keras.backend.backend() != "torch":  # which runs the functions themselves
        assert sorted(traces) == ["propose", "verify", "verify"]  # with and without what proposals were drawn from


def test_a_draft_whose_weights_are_not_numbers(small):
    lm, _, models = small
    scale = models["shaken"].backbone.layer_norm.scale
    before = keras.ops.convert_to_numpy(scale).copy()
    scale.assign(np.full(before.shape, np.nan, "float32"))
    arguments = {"max_new_tokens": 14, "stop_token_ids": None, "seed": 1, "draft": models["shaken"]}
    try:
        for samplers in (SAMPLERS, SAMPLERS[::-1]):  # a row that draws comes first, and one that does not
            with pytest.raises(FloatingPointError, match="draft's logits for row 0"):
                lm.generate(as_dict([PROMPT] * 4), sampler=samplers, **arguments)
    finally:
        scale.assign(before)


def test_stop_strings(tiny):
    """They may stand in the midst of what one run gives."""
    tokenizer = Gemma2Tokenizer(train_vocabulary())
    config = {**tiny, "vocabulary_size": tokenizer.vocabulary_size(), "num_layers": 1}
    lm = Gemma2CausalLM(Gemma2Backbone(**config), Gemma2CausalLMPreprocessor(tokenizer))
    arguments = {"max_new_tokens": 30, "sampler": Sampler(temperature=9), "seed": 3, "stop_token_ids": None}
    whole = lm.generate("so", strip_prompt=True, draft=lm, **arguments)
    stops = [whole[i : i + 2] for i in range(5, len(whole) - 1) if whole[i : i + 2].isascii()][:3]
    assert len(set(stops)) > 1
    for stop in stops:
        expected = whole[: whole.index(stop)]
        assert lm.generate("so", strip_prompt=True, draft=lm, stop_strings=stop, **arguments) == expected
        assert "".join(lm.stream("so", draft=lm, stop_strings=stop, **arguments)) == expected
    ids = [token for _, token in lm.stream(as_dict([[2, 30]]), draft=lm, stop_strings=stop, **arguments)]
    out = lm.generate(as_dict([[2, 30]]), draft=lm, stop_strings=stop, strip_prompt=True, **arguments)
    assert ids == real(out)[0]


# Proposals --------------------------------------------------------------------------------------------------------------


@pytest.mark.backend_free
def test_prompt_lookup_finds_the_last_longest_match():
    """Against a search through the whole row, over growing rows of few different tokens."""

    def searched(row, most):
        for n in (3, 2, 1):
            for place in range(len(row) - 1, n - 1, -1):
                if n < len(row) and row[place - n : place] == row[-n:]:
                    text = list(row)
                    for i in range(most):
                        text.append(text[place + i])
                    return text[len(row) :]
        return []

    rng = np.random.default_rng(0)
    rows = [rng.integers(0, size, 2).tolist() for size in (2, 5, 20)]
    lookup, found = PromptLookup(3), 0
    for _ in range(60):
        most = rng.integers(0, PROPOSED + 1, 3)
        tokens, counts, chances = lookup.propose(rows, most, [0] * 3)
        assert chances is None
        for row, token_ids, count, limit in zip(rows, tokens, counts, most):
            assert token_ids[:count].tolist() == searched(row, limit)
            found += count
        for row, size in zip(rows, (2, 5, 20)):
            row += rng.integers(0, size, rng.integers(1, 4)).tolist()
    assert found > 100


# Bad input --------------------------------------------------------------------------------------------------------------


def test_bad_drafts(pair, models):
    lm, _ = pair
    config = lm.backbone.get_config()
    other = Gemma2CausalLM(Gemma2Backbone.from_config({**config, "vocabulary_size": 98, "num_layers": 2, "layer_types": None}))
    short = Gemma2CausalLM(Gemma2Backbone.from_config({**config, "max_sequence_length": 20, "num_layers": 2, "layer_types": None}))
    for draft, message in (
        (other, "draft with 98 tokens for a model with 97"),
        (short, "context of 20 tokens for rows of up to 23.*max_new_tokens"),
        (lm.backbone, "Gemma2CausalLM, 'prompt_lookup' or None. Received: Gemma2Backbone"),
        ("lookup", "Gemma2CausalLM, 'prompt_lookup' or None. Received: 'lookup'"),
        (4, "Received: int"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate(as_dict(prompts(3)), max_new_tokens=20, draft=draft, **GREEDY)
        with pytest.raises(ValueError, match=message):
            lm.stream(as_dict(prompts(3)), max_new_tokens=20, draft=draft, **GREEDY)


def test_a_draft_with_another_tokenizer(tiny):
    """Of the same size: two pieces have changed places. Other rules for spaces are no other vocabulary."""
    other, spaces = (sentencepiece_model_pb2.ModelProto.FromString(train_vocabulary()) for _ in range(2))
    size, last = len(other.pieces), other.pieces[-1].piece
    other.pieces[-1].piece, other.pieces[-2].piece = other.pieces[-2].piece, last
    spaces.normalizer_spec.add_dummy_prefix = not spaces.normalizer_spec.add_dummy_prefix
    backbone = Gemma2Backbone(**{**tiny, "vocabulary_size": size, "num_layers": 1})

    def with_vocabulary(proto):
        return Gemma2CausalLM(backbone, Gemma2CausalLMPreprocessor(Gemma2Tokenizer(proto)))

    lm = with_vocabulary(train_vocabulary())
    with pytest.raises(ValueError, match=re.escape(f"whose token {size - 2} is {last!r}")):
        lm.generate("so", max_new_tokens=2, draft=with_vocabulary(other.SerializeToString()))
    drafts.check_draft(lm, with_vocabulary(spaces.SerializeToString()), [Sampler()], [9])


@pytest.mark.parametrize(
    "sampler, message",
    [
        (Sampler(repetition_penalty=1.2), "no repetition_penalty with a `draft`.*repetition_penalty=1.2.*logit_bias"),
        (Sampler(presence_penalty=0.5), "no presence_penalty with a `draft`"),
        (Sampler(logits_processor=lambda ids, logits: logits), "no logits_processor with a `draft`"),
        ("beam", "with a `draft`. Received: BeamSampler"),
        ("top_k", "with a `draft`. Received: TopKSampler"),
    ],
)
def test_samplers_that_do_not_go_with_drafts(pair, sampler, message):
    with pytest.raises(ValueError, match=message):
        pair[0].generate(as_dict(prompts(3)), max_length=8, stop_token_ids=None, sampler=sampler, draft="prompt_lookup")
