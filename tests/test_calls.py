"""What users call: `generate` with its options, `stream`, prefixes, sessions and scores, on the embedded preset."""

import keras
import numpy as np
import pytest
from oracle import hugging_face_logits

from keras_gemma2 import Gemma2CausalLM, Sampler
from keras_gemma2.generation.decoding import Decoding
from keras_gemma2.generation.runner import Runner

PROMPT = "The state of our union is"
DRAWS = Sampler(temperature=1.3, top_k=200)


@pytest.fixture(scope="module")
def lm():
    return Gemma2CausalLM.from_preset("gemma2_mini_en")


@pytest.fixture(scope="module")
def peer(tmp_path_factory, lm):
    """The same model in transformers."""
    import transformers

    folder = tmp_path_factory.mktemp("peer") / "exported"
    lm.export_to_transformers(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()


@pytest.mark.parametrize("sampler", [None, DRAWS], ids=["greedy", "sampled"])
def test_streamed_pieces_add_up_to_generate(lm, sampler):
    prompts = [PROMPT, "Once", "Fellow citizens, the year that is past"]
    whole = lm.generate(prompts, max_new_tokens=24, strip_prompt=True, sampler=sampler, seed=5)
    texts = ["", "", ""]
    for row, piece in lm.stream(prompts, max_new_tokens=24, sampler=sampler, seed=5):
        assert piece
        texts[row] += piece
    assert texts == whole and len(set(whole)) == 3
    alone = list(lm.stream(PROMPT, max_new_tokens=24, sampler=sampler, seed=5))
    assert "".join(alone) == whole[0] and len(alone) > 10


def test_streamed_token_ids_add_up_to_generate(lm):
    inputs = lm.preprocessor.generate_preprocess([PROMPT, "Once"], sequence_length=16)
    whole = lm.generate(inputs, max_new_tokens=6, stop_token_ids=None, strip_prompt=True)
    rows = [[], []]
    for row, token_id in lm.stream(inputs, max_new_tokens=6, stop_token_ids=None):
        rows[row].append(token_id)
    assert [len(row) for row in rows] == [6, 6]
    assert [ids[mask].tolist() for ids, mask in zip(whole["token_ids"], whole["padding_mask"])] == rows


def test_a_seed_gives_a_row_its_draws_whatever_else_is_in_the_batch(lm):
    together = lm.generate(["A", "B and", PROMPT], max_new_tokens=12, sampler=DRAWS, seed=40)
    assert lm.generate(PROMPT, max_new_tokens=12, sampler=DRAWS, seed=42) == together[2]
    assert lm.generate([PROMPT, "A"], max_new_tokens=12, sampler=DRAWS, seed=[42, 40]) == [together[2], together[0]]
    same = lm.generate([PROMPT] * 3, max_new_tokens=12, sampler=DRAWS, seed=42)
    assert len(set(same)) == 3 and same[0] == together[2]
    keras.utils.set_random_seed(3)
    first = lm.generate(PROMPT, max_new_tokens=12, sampler=DRAWS)
    assert lm.generate(PROMPT, max_new_tokens=12, sampler=DRAWS) != first
    keras.utils.set_random_seed(3)
    assert lm.generate(PROMPT, max_new_tokens=12, sampler=DRAWS) == first


def test_samplers_differ_between_the_rows_of_a_batch(lm):
    samplers = [Sampler(temperature=0), DRAWS, Sampler(temperature=0, logit_bias={1: 100.0})]
    rows = lm.generate([PROMPT] * 3, max_new_tokens=10, sampler=samplers, seed=1, strip_prompt=True)
    assert rows[0] == lm.generate(PROMPT, max_new_tokens=10, strip_prompt=True) and rows[1] != rows[0]
    assert rows[2] == ""  # the bias makes <eos> the first token


@pytest.mark.parametrize("stop", ["the", " of our re", "ns"])
def test_stop_strings_end_the_text_before_them(lm, stop):
    whole = lm.generate(PROMPT, max_new_tokens=30, strip_prompt=True)
    assert stop in whole
    expected = whole[: whole.index(stop)]
    assert lm.generate(PROMPT, max_new_tokens=30, strip_prompt=True, stop_strings=["never there", stop]) == expected
    assert lm.generate(PROMPT, max_new_tokens=30, stop_strings=stop) == PROMPT + expected
    pieces = list(lm.stream(PROMPT, max_new_tokens=30, stop_strings=stop))
    assert "".join(pieces) == expected


def test_a_turn_that_ends_before_a_new_text_is_part_of_the_text(lm):
    """`<end_of_turn>` at the very end of a text is left out; before a new text it is not at the end."""
    prompt = PROMPT + "<end_of_turn>"
    plain = lm.generate(prompt, max_new_tokens=5)
    assert plain.startswith(prompt) and len(plain) > len(prompt)
    assert lm.generate(prompt, max_new_tokens=5, stop_strings="never there") == plain
    assert lm.generate(prompt, max_new_tokens=5, stop_strings=plain[len(prompt) :]) == PROMPT  # nothing follows it


def test_a_stop_string_ends_the_work(lm, monkeypatch):
    """No more steps run than the check interval allows, and other rows go on."""
    steps = []
    advance = Decoding.advance
    monkeypatch.setattr(Decoding, "advance", lambda self, n: steps.append(n) or advance(self, n))
    whole = lm.generate(PROMPT, max_new_tokens=30, strip_prompt=True)
    steps.clear()
    lm.generate(PROMPT, max_new_tokens=30, stop_strings=whole[:3])
    assert sum(steps) <= 8
    texts = lm.generate([PROMPT, "Once"], max_new_tokens=30, stop_strings=whole[:8], strip_prompt=True)
    assert texts[0] == "" and len(texts[1]) > 30


def test_closing_a_stream_ends_the_work(lm, monkeypatch):
    steps = []
    advance = Decoding.advance
    monkeypatch.setattr(Decoding, "advance", lambda self, n: steps.append(n) or advance(self, n))
    pieces = lm.stream(PROMPT, max_new_tokens=30)
    next(pieces), next(pieces)
    pieces.close()
    assert sum(steps) <= 4 and list(pieces) == []


def test_max_new_tokens_and_max_length_bound_each_row(lm):
    inputs = lm.preprocessor.generate_preprocess([PROMPT, "Once"], sequence_length=16)
    lengths = np.asarray(inputs["padding_mask"]).sum(axis=1)
    out = lm.generate(inputs, max_new_tokens=5, stop_token_ids=None)
    assert out["padding_mask"].sum(axis=1).tolist() == (lengths + 5).tolist()
    assert out["token_ids"].shape[1] == lengths.max() + 5
    out = lm.generate(inputs, max_new_tokens=5, max_length=int(lengths.max()) + 1, stop_token_ids=None)
    assert out["padding_mask"].sum(axis=1).tolist() == [lengths[0] + 1, lengths[1] + 5]


def test_generating_leaves_what_compile_made_alone(lm):
    optimizer, sampler, functions = lm.optimizer, lm.sampler, (lm.train_function, lm.compiled)
    step = int(optimizer.iterations)
    lm.generate(PROMPT, max_new_tokens=2, sampler=DRAWS, stop_strings="never there", stop_token_ids=[5])
    assert lm.optimizer is optimizer and int(optimizer.iterations) == step and not optimizer.built
    assert lm.sampler is sampler and (lm.train_function, lm.compiled) == functions


def test_a_model_that_is_not_compiled_generates(lm):
    bare = Gemma2CausalLM(lm.backbone, lm.preprocessor, compile=False)
    assert not bare.compiled and bare.generate(PROMPT, max_new_tokens=3) == lm.generate(PROMPT, max_new_tokens=3)


def test_logprobs_are_the_models_own(lm, peer):
    inputs = lm.preprocessor.generate_preprocess([PROMPT, "Once"], sequence_length=16)
    out, logprobs = lm.generate(inputs, max_new_tokens=7, stop_token_ids=None, sampler=DRAWS, seed=0, return_logprobs=True)
    for ids, mask, row, found in zip(out["token_ids"], out["padding_mask"], range(2), logprobs):
        ids, start = ids[mask], int(np.asarray(inputs["padding_mask"])[row].sum())
        logits = hugging_face_logits(peer, [ids])[0].astype("float64")
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = [expected[t - 1, ids[t]] for t in range(start, len(ids))]
        # float32 logits of tens through six layers, and a logsumexp of thousands of them.
        np.testing.assert_allclose(found, expected, atol=2e-4)
    text, scores = lm.generate(PROMPT, max_new_tokens=3, return_logprobs=True)
    assert isinstance(text, str) and scores.shape == (3,) and scores.dtype == np.float32
    texts, (same,) = lm.generate([PROMPT], max_new_tokens=3, return_logprobs=True)
    assert texts == [text] and same.tolist() == scores.tolist()


def test_scores_and_perplexity_equal_transformers(lm, peer):
    texts = ["We the people of the United States, in order to form a more perfect union.", "Once"]
    scores = lm.score(texts)
    total, count = 0.0, 0
    for text, found in zip(texts, scores):
        ids = [lm.preprocessor.tokenizer.start_token_id, *lm.preprocessor.tokenizer(text)]
        logits = hugging_face_logits(peer, [ids])[0].astype("float64")
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = [expected[t - 1, ids[t]] for t in range(1, len(ids))]
        np.testing.assert_allclose(found, expected, atol=2e-4)  # as above
        total, count = total + sum(expected), count + len(expected)
    assert abs(lm.perplexity(texts) - np.exp(-total / count)) < 1e-3 * np.exp(-total / count)
    np.testing.assert_allclose(lm.score(texts[0]), scores[0], atol=1e-5)  # alone: other products, another order of sums
    assert lm.score([""])[0].shape == (0,)
    with pytest.raises(ValueError, match="a token to score"):
        lm.perplexity("")


def test_a_prefix_is_run_once_and_continued_many_times(lm, monkeypatch):
    prefix = lm.prefill("The state of our union")
    plain = [lm.generate("The state of our union" + text, max_new_tokens=9) for text in (" is", " was once")]
    ran = []
    prefill = Runner.prefill

    def counted(self, caches, prompts, *rest):
        ran.extend(map(len, prompts))
        return prefill(self, caches, prompts, *rest)

    monkeypatch.setattr(Runner, "prefill", counted)
    assert lm.generate([" is", " was once"], prefix=prefix, max_new_tokens=9) == plain
    assert ran == [1, 2]
    assert "".join(lm.stream(" is", prefix=prefix, max_new_tokens=9)) == plain[0].removeprefix(PROMPT)
    whole = lm.score("The state of our union is strong")
    np.testing.assert_allclose(lm.score(" is strong", prefix=prefix), whole[-2:], atol=1e-5)  # as above
    assert len(prefix) == 7


def test_a_session_runs_each_token_once(lm):
    ids = [lm.preprocessor.tokenizer.start_token_id, *lm.preprocessor.tokenizer(PROMPT)]
    session = lm.open_session()
    session.extend(ids)
    first = list(session.stream(max_new_tokens=5, stop_token_ids=None))
    assert session.prefilled == len(ids) and session.token_ids == ids + first
    more = lm.preprocessor.tokenizer(" And so").tolist()
    session.extend(more)
    second = list(session.stream(max_new_tokens=5, stop_token_ids=None))
    assert session.prefilled == len(more) + 1  # and the last token of the answer, which nothing had run
    assert second == _continued(lm, ids + first + more, 5)
    session.truncate(len(ids) + 2)
    assert list(session.stream(max_new_tokens=4, stop_token_ids=None)) == _continued(lm, ids + first[:2], 4)
    stream = session.stream(max_new_tokens=9, stop_token_ids=None)
    kept = [next(stream), next(stream)]
    stream.close()
    assert session.token_ids[-2:] == kept
    assert list(session.stream(max_new_tokens=3, stop_token_ids=None)) == _continued(lm, session.token_ids[:-3], 3)


def test_a_session_outgrows_its_room_and_its_window(lm, monkeypatch):
    """The embedded model's window is 128; the room is doubled twice on the way, in the midst of an answer."""
    monkeypatch.setattr("keras_gemma2.generation.session.ROOM", 40)
    rng = np.random.default_rng(2)
    session = lm.open_session()
    session.extend([2, *rng.integers(300, 3000, 30).tolist()])
    for _ in range(3):
        before = list(session.token_ids)
        assert list(session.stream(max_new_tokens=20, stop_token_ids=None)) == _continued(lm, before, 20)
        session.extend(rng.integers(300, 3000, 50).tolist())
    session.truncate(20)  # a ring has lost what was before: all runs again
    assert list(session.stream(max_new_tokens=5, stop_token_ids=None)) == _continued(lm, session.token_ids[:20], 5)
    assert session.prefilled == 20


def test_an_interrupted_session_keeps_its_room(lm, monkeypatch):
    monkeypatch.setattr("keras_gemma2.generation.session.ROOM", 40)
    session = lm.open_session()
    session.extend([2, 300, 301])
    advance = Decoding.advance

    def interrupted(self, steps):
        raise KeyboardInterrupt

    for _ in range(3):
        monkeypatch.setattr(Decoding, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.stream(max_new_tokens=3, stop_token_ids=None))
        monkeypatch.setattr(Decoding, "advance", advance)
        before = list(session.token_ids)
        assert list(session.stream(max_new_tokens=3, stop_token_ids=None)) == _continued(lm, before, 3)
    assert {keys.shape[2] for keys, _ in session._caches} == {128 + 1, 256 + 1}  # the window, and the smallest room


@pytest.mark.parametrize("call", [lambda s: s.truncate(-1), lambda s: s.truncate(4), lambda s: s.stream(max_new_tokens=0)])
def test_bad_session_arguments(lm, call):
    session = lm.open_session()
    session.extend([2, 300, 301])
    with pytest.raises(ValueError, match="`length` must be from 0 to 3|`max_new_tokens`"):
        call(session)


def _continued(lm, ids, count):
    inputs = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), "int32")}
    out = lm.generate(inputs, max_new_tokens=count, stop_token_ids=None, strip_prompt=True)
    return out["token_ids"][0][out["padding_mask"][0]].tolist()


def test_logits_processors_run_on_the_host(lm):
    seen = []

    def only_even(token_ids, logits):
        seen.append(len(token_ids))
        return np.where(np.arange(len(logits)) % 2, -np.inf, logits).astype("float32")

    inputs = lm.preprocessor.generate_preprocess([PROMPT], sequence_length=16)
    out = lm.generate(
        inputs, max_new_tokens=6, stop_token_ids=None, strip_prompt=True, sampler=Sampler(temperature=0, logits_processor=only_even)
    )
    ids = out["token_ids"][0]
    assert not (ids % 2).any() and seen == list(range(seen[0], seen[0] + 6))


def test_a_logits_processor_does_not_see_a_row_that_has_ended(lm):
    seen = []

    def ends(token_ids, logits):
        seen.append(len(token_ids))
        return np.where(np.arange(len(logits)) == 1, 100, logits).astype("float32")

    samplers = [Sampler(temperature=0, logits_processor=ends), Sampler(temperature=0)]
    assert len(lm.generate([PROMPT, PROMPT], max_new_tokens=6, sampler=samplers)[1]) > len(PROMPT)
    assert len(seen) == 1


def test_logits_that_are_not_numbers_are_said_to_be(lm):
    config = {**lm.backbone.get_config(), "name": "broken"}
    broken = Gemma2CausalLM(type(lm.backbone).from_config(config), lm.preprocessor)
    scale = broken.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, np.nan, "float32"))
    with pytest.raises(FloatingPointError, match="row 0.*not numbers.*verify"):
        broken.generate(PROMPT, max_new_tokens=3)
    with pytest.raises(FloatingPointError, match="not numbers"):
        list(broken.stream(PROMPT, max_new_tokens=3, sampler=DRAWS))
    with pytest.raises(FloatingPointError, match="row 0.*not numbers"):
        broken.generate(PROMPT, max_new_tokens=3, sampler="beam")
    for sampler in ("top_p", "random", Sampler(logits_processor=lambda ids, logits: logits)):
        with pytest.raises(FloatingPointError, match="row 0.*not numbers"):
            broken.generate(PROMPT, max_new_tokens=3, sampler=sampler)
    with pytest.raises(FloatingPointError, match="row 0.*not numbers"):
        broken.score(PROMPT)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1.*0"),
        ({"max_new_tokens": -3}, "`max_new_tokens`.*-3"),
        ({"max_new_tokens": True}, "`max_new_tokens`.*True"),
        ({"sampler": "nucleus"}, "`sampler` must be a keras_gemma2.Sampler.*'nucleus'"),
        ({"sampler": [DRAWS, DRAWS]}, "one keras_gemma2.Sampler a row, 1 of them"),
        ({"sampler": 0.7}, "`sampler`.*0.7"),
        ({"stop_strings": ""}, "`stop_strings`.*empty"),
        ({"stop_strings": ["a", ""]}, "`stop_strings`.*empty"),
        ({"seed": "7"}, "`seed` must be None, an integer"),
        ({"seed": [1, 2], "sampler": DRAWS}, "`seed`.*a list of 1 integers"),
        ({"seed": 1, "sampler": "top_k"}, "`seed` applies to keras_gemma2.Sampler"),
        ({"sampler": Sampler(logit_bias={4096: 1.0})}, "`logit_bias`.*4096"),
        ({"max_length": 4}, "the prompt of row 0 has 8 tokens"),
    ],
)
def test_bad_arguments(lm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(PROMPT, **kwargs)
    with pytest.raises(ValueError, match=message):
        lm.stream(PROMPT, **kwargs)  # at the call, not at the first piece


def test_bad_prefixes(lm):
    with pytest.raises(ValueError, match="`prefix` was made by another model"):
        other = Gemma2CausalLM(lm.backbone.__class__.from_config({**lm.backbone.get_config(), "name": "other"}), lm.preprocessor)
        lm.generate(" is", prefix=other.prefill("The"))
    with pytest.raises(ValueError, match="`prefix` must be a string, or a list"):
        lm.prefill([])
    with pytest.raises(ValueError, match="streams|one token at a time to stream"):
        lm.stream(PROMPT, sampler="beam")
    with pytest.raises(ValueError, match="`return_logprobs` does not go with BeamSampler"):
        lm.generate(PROMPT, sampler="beam", return_logprobs=True)
    with pytest.raises(ValueError, match=r"and the prefix\. Received: max_length=4, .* after a prefix of 3\. Raise max_length"):
        lm.generate([" is not"], prefix=lm.prefill([2, 100, 101]), max_length=4)
    with pytest.raises(ValueError, match="`prefix` does not go with BeamSampler"):
        lm.generate(" is", prefix=lm.prefill("The"), sampler="beam")
