"""The SavedModel's graph, loaded where there is TensorFlow alone, against the model that it was traced from.

With TensorFlow as the backend only: with others the same graph is traced in another process (`test_export_saved_model.py`).
"""

import keras
import numpy as np
import pytest
from conftest import TINY
from exported import TEXTS, TOLERANCE, N, all_bytes, ask, data_bytes, decoded, default, generate, padded, prompt_rows, small_lm
from oracle import hugging_face_folder, naive_generate
from scipy import stats
from test_sampler import expected_probabilities

from keras_gemma2 import Gemma2CausalLM, Sampler

NO_ROWS = {"token_ids": np.zeros((0, 4), "int32"), "padding_mask": np.zeros((0, 4), "int32")}
# As many tokens as the context has.
FULL = np.random.default_rng(9).integers(200, 4096, (2, 128)).astype("int32")
FULL_TEXT = "7" * 127  # digits are a piece each; and `<bos>`


@pytest.fixture(scope="module")
def lm():
    return small_lm()


@pytest.fixture(scope="module")
def rows():
    return prompt_rows()


@pytest.fixture(scope="module")
def stop(lm, rows):
    """The second token of a row's answer, which is not the first."""
    first, second = lm.generate(padded(rows, 30), max_new_tokens=2, stop_token_ids=None, strip_prompt=True)["token_ids"][1, :2]
    assert first != second
    return int(second)


@pytest.fixture(scope="module")
def folder(lm, stop, tmp_path_factory):
    """An export whose table is in parts, as a large one's is."""
    folder = tmp_path_factory.mktemp("saved") / "served" / "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keras_gemma2.backend.tensorflow_graph.PART_BYTES", lm.backbone.config.hidden_dim * 4 * 1500)
        lm.export(folder, max_new_tokens=N, stop_token_ids=[1, 107, stop], sampler="greedy")
    return folder


@pytest.fixture(scope="module")
def answers(lm, folder, rows):
    """All that the tests below look at, asked in one process."""
    requests = {
        "default": default(),
        "greedy": generate(),
        "nobody": generate([]),
        "one of most": generate(temperature=0.7, top_k=1),
        "drawn": generate(temperature=0.9, top_p=0.9, seed=5),
        "drawn again": generate(temperature=0.9, top_p=0.9, seed=5),
        "drawn otherwise": generate(temperature=0.9, top_p=0.9, seed=6),
        "many": generate(["The state of"] * 6000, n=1, temperature=0.8, top_k=6, top_p=0.9, seed=1),
        "tokens": ("generate_tokens", padded(rows, 30)),
        "many rows": ("generate_tokens", padded([row * 3 for row in rows] * 75, 80)),
        "score": ("score", padded(rows, 30)),
        "logits": ("logits", padded(rows, 30)),
        "loop": ("loop of 8", {**padded(rows, 30), "cache_length": np.int32(40)}),
        "roomy loop": ("loop of 8", {**padded(rows, 30), "cache_length": np.int32(128)}),
        "nobody's step": decode_step([], 20),
        "not utf-8": default([b"fine", b"\xff"]),
        "too long": default(["a b c d e f g " * 40]),
        "no tokens to make": generate(n=0),
        "cold": generate(temperature=-1.0),
        "top_p": generate(top_p=0.0),
        "top_k": generate(top_k=-1),
        "unknown id": ("generate_tokens", {"token_ids": np.int32([[2, 4096]]), "padding_mask": np.int32([[1, 1]])}),
        "unknown id of a step": decode_step([0], 20, token_id=4096),
        "all padding": ("score", {"token_ids": np.int32([[2, 9], [2, 9]]), "padding_mask": np.int32([[1, 1], [0, 0]])}),
        "shapes": ("logits", {"token_ids": np.int32([[2, 9]]), "padding_mask": np.int32([[1]])}),
        "long row": ("score", {"token_ids": np.full((1, 129), 9, "int32"), "padding_mask": np.ones((1, 129), "int32")}),
        "small cache": ("prefill", {**padded(rows, 30), "cache_length": np.int32(22)}),
        "before the start": decode_step([0, -1], 20),
        "past the context": decode_step([0, 128], 128),
        "past the caches": decode_step([19, 20], 20),
        "past rings too small": decode_step([3, 2], 3),
        "the last slot": decode_step([19, 0], 20),
        "nobody by default": default([]),
        **{f"empty {name}": (name, NO_ROWS) for name in ("generate_tokens", "score", "logits")},
        "empty prefill": ("prefill", {**NO_ROWS, "cache_length": np.int32(40)}),
        "full rows": ("generate_tokens", {"token_ids": FULL, "padding_mask": np.ones_like(FULL)}),
        "full scores": ("score", {"token_ids": FULL, "padding_mask": np.ones_like(FULL)}),
        "full text": generate([FULL_TEXT, "I"]),
    }
    return dict(zip(requests, ask(folder, *requests.values())))


def decode_step(positions, room, token_id=9):
    """A step over empty caches with room for some tokens; the window is 5."""
    rooms = {f"{kind}_{layer}": min(room, 5) if layer % 2 == 0 else room for layer in range(3) for kind in ("keys", "values")}
    caches = {name: np.zeros((len(positions), 2, slots + 1, 16), "float32") for name, slots in rooms.items()}
    return "decode_step", {"token_ids": np.full(len(positions), token_id, "int32"), "positions": np.int32(positions), **caches}


# Against the model ------------------------------------------------------------------------------------------------------


def test_completions_are_those_of_generate(lm, answers, stop):
    expected = lm.generate(TEXTS, max_new_tokens=N, stop_token_ids=[1, 107, stop], strip_prompt=True)
    assert decoded(answers["default"]["completions"]) == expected
    assert decoded(answers["greedy"]["completions"]) == expected
    assert len(set(expected)) > 1


def test_num_tokens_counts_the_stop_token(lm, answers, stop):
    prompts = lm.preprocessor.generate_preprocess(TEXTS, sequence_length=60)
    prompts = {key: keras.ops.convert_to_numpy(value) for key, value in prompts.items()}
    expected = lm.generate(prompts, max_new_tokens=N, stop_token_ids=[1, 107, stop], strip_prompt=True)["padding_mask"].sum(axis=1)
    assert answers["greedy"]["num_tokens"].tolist() == expected.tolist()


def test_rows_padded_anywhere(lm, answers, rows, stop):
    expected = lm.generate(padded(rows, 30), max_new_tokens=N, stop_token_ids=[1, 107, stop])
    found = answers["tokens"]
    assert found["padding_mask"][1].sum() == len(rows[1]) + 2  # it stopped
    width = found["token_ids"].shape[1]
    assert not expected["padding_mask"][:, width:].any()
    assert np.array_equal(found["padding_mask"], expected["padding_mask"][:, :width])
    assert np.array_equal(found["token_ids"], expected["token_ids"][:, :width])


def test_a_large_batch_runs_in_pieces(lm, answers, rows, stop):
    """300 rows of up to 69 tokens run in pieces of 32, and rings of 5 lose keys in between."""
    expected = lm.generate(padded([row * 3 for row in rows], 80), max_new_tokens=N, stop_token_ids=[1, 107, stop])
    found = answers["many rows"]
    for row in range(300):
        ids = found["token_ids"][row][found["padding_mask"][row] > 0]
        assert ids.tolist() == expected["token_ids"][row % 4][expected["padding_mask"][row % 4]].tolist()


def test_scores_and_logits(lm, answers, rows):
    inputs = padded(rows, 30)
    real = inputs["padding_mask"] > 0
    logits = keras.ops.convert_to_numpy(lm({key: keras.ops.convert_to_tensor(value) for key, value in inputs.items()}))
    assert np.abs(answers["logits"]["logits"] - logits)[real].max() < TOLERANCE
    scores = answers["score"]["log_probabilities"]
    assert not scores[~real].any()
    for found, mask, expected in zip(scores, real, lm.score(inputs)):
        assert found[mask][0] == 0
        assert np.abs(found[mask][1:] - expected).max(initial=0) < TOLERANCE


def test_a_loop_of_the_servers_own(lm, answers, rows):
    """`prefill`, then `decode_step` past the window and the rings' end, greedily."""
    expected = lm.generate(padded(rows, 30), max_new_tokens=8, stop_token_ids=None, strip_prompt=True)["token_ids"]
    assert np.array_equal(answers["loop"]["token_ids"], expected[:, :8])
    assert np.array_equal(answers["roomy loop"]["token_ids"], expected[:, :8])  # most slots are empty: they are not read


def test_a_step_of_no_rows(answers):
    assert answers["nobody's step"]["logits"].shape == (0, 4096)
    assert answers["nobody's step"]["keys_1"].shape == (0, 2, 21, 16)


def test_draws_follow_the_filters(lm, answers):
    """One token of 6,000 rows at temperature 0.8, top_k 6, top_p 0.9, against float64 numpy: chi-square, p over 1e-4."""
    counts = {}
    for text in decoded(answers["many"]["completions"]):
        counts[text] = counts.get(text, 0) + 1
    prompt = lm.preprocessor.prompt_ids(["The state of"])[0]
    inputs = {"token_ids": keras.ops.convert_to_tensor([prompt]), "padding_mask": keras.ops.ones((1, len(prompt)), "int32")}
    logits = keras.ops.convert_to_numpy(lm(inputs))[0, -1].astype("float64") / 0.8
    order = np.argsort(-logits)[:6]
    shares = np.exp(logits[order] - logits[order[0]])
    shares /= shares.sum()
    kept = np.cumsum(shares) - shares < 0.9
    shares = shares[kept] / shares[kept].sum()
    texts = [lm.preprocessor.tokenizer.detokenize([int(token)]) for token in order[kept]]
    assert 1 < len(texts) == len(set(texts)) and set(counts) <= set(texts)
    chi = sum((counts.get(text, 0) - 6000 * share) ** 2 / (6000 * share) for text, share in zip(texts, shares))
    assert chi < {1: 15.2, 2: 18.5, 3: 21.2, 4: 23.6, 5: 25.8}[len(texts) - 1]  # the 1 - 1e-4 quantiles


def test_draws_depend_on_the_seed(answers):
    texts = {name: answers[name]["completions"].tolist() for name in answers if name.startswith("drawn")}
    assert texts["drawn"] == texts["drawn again"] != texts["drawn otherwise"]
    assert answers["one of most"]["completions"].tolist() == answers["greedy"]["completions"].tolist()


def test_a_step_in_the_last_slot(answers):
    assert answers["the last slot"]["positions"].tolist() == [20, 1]


def test_no_rows(answers):
    assert answers["nobody"]["completions"].shape == answers["nobody"]["num_tokens"].shape == (0,)
    assert answers["nobody by default"]["completions"].shape == (0,)
    assert answers["empty generate_tokens"]["token_ids"].shape[0] == 0
    assert answers["empty score"]["log_probabilities"].shape == (0, 4)
    assert answers["empty logits"]["logits"].shape == (0, 4, 4096)
    prefilled = answers["empty prefill"]
    assert prefilled["logits"].shape == (0, 4096) and prefilled["keys_1"].shape == (0, 2, 41, 16)


def test_a_prompt_as_long_as_the_context(lm, answers):
    """There is no room for more: nothing is made."""
    assert np.array_equal(answers["full rows"]["token_ids"], FULL) and answers["full rows"]["padding_mask"].all()
    scores = lm.score({"token_ids": FULL, "padding_mask": FULL > 0})
    for found, expected in zip(answers["full scores"]["log_probabilities"], scores):
        assert np.abs(found[1:] - expected).max() < TOLERANCE
    assert [len(row) for row in lm.preprocessor.prompt_ids([FULL_TEXT])] == [128]
    text = answers["full text"]
    assert text["num_tokens"].tolist()[0] == 0 < text["num_tokens"][1] and text["completions"][0] == b""


@pytest.mark.parametrize(
    "name, words",
    [
        ("not utf-8", ["`prompts` must be UTF-8", "[1]"]),
        ("too long", ["`prompts` must have at most 128 tokens", "[0]"]),
        ("no tokens to make", ["`max_new_tokens` must be at least 1"]),
        ("cold", ["`temperature` must be at least 0"]),
        ("top_p", ["`top_p` must be over 0 and at most 1"]),
        ("top_k", ["`top_k` must be at least 0"]),
        ("unknown id", ["`token_ids` must be from 0 to 4095", "[1]"]),
        ("unknown id of a step", ["`token_ids` must be from 0 to 4095", "[0]"]),
        ("all padding", ["Every row must have a token", "[1]"]),
        ("shapes", ["`token_ids` and `padding_mask` must have the same shape"]),
        ("long row", ["at most 128 tokens", "[0]"]),
        ("small cache", ["`cache_length` must have room for the longest row"]),
        ("before the start", ["`positions` must be from 0 to 127", "[1]"]),
        ("past the context", ["`positions` must be from 0 to 127", "[1]"]),
        ("past the caches", ["The caches have no room for `positions`", "[1]"]),
        ("past rings too small", ["The caches have no room for `positions`", "[0]"]),
    ],
)
def test_wrong_inputs_are_named(answers, name, words):
    assert isinstance(answers[name], str)
    assert all(word in answers[name] for word in words)


def test_against_the_naive_generator(tmp_path, monkeypatch):
    """transformers' model, a token at a time without a cache; token signatures in a process without TensorFlow Text."""
    source, model = hugging_face_folder()
    lm = Gemma2CausalLM.from_preset(source)
    # The table in parts of 33, 32 and 32 rows.
    monkeypatch.setattr("keras_gemma2.backend.tensorflow_graph.PART_BYTES", lm.backbone.config.hidden_dim * 4 * 40)
    lm.export(tmp_path / "served", max_new_tokens=12, sampler="greedy")
    prompts = [np.random.default_rng(0).integers(3, 97, n).tolist() for n in (9, 2)]
    (found,) = ask(tmp_path / "served", ("generate_tokens", padded(prompts, 9)), kind="tokens")
    for i, prompt in enumerate(prompts):
        expected, _ = naive_generate(model, prompt, len(prompt) + 12)
        assert found["token_ids"][i][found["padding_mask"][i] > 0].tolist() == list(expected)


# What goes along --------------------------------------------------------------------------------------------------------


def test_weights_are_stored_once(lm, folder):
    import tensorflow as tf

    width = lm.backbone.config.hidden_dim
    stored = [shape for _, shape in tf.train.list_variables(str(folder / "variables" / "variables"))]
    assert stored.count([1024, width]) == 4 and [4096, width] not in stored  # the table's parts, restored side by side
    assert all_bytes(lm) < data_bytes(folder) < 1.01 * all_bytes(lm) + 4096  # an index of some bytes a weight


def test_a_graph_without_repetitions(tmp_path, folder):
    """Equal operations become one, random and stateful ones do not; the answers above are those of such a graph."""
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    from keras_gemma2.backend.tensorflow_merging import merge_duplicates

    module = tf.Module()
    module.counter = tf.Variable(0)

    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def function(x):
        draws = [tf.random.uniform([2]) for _ in range(2)]  # of the same attributes
        counts = [module.counter.assign_add(1).read_value() for _ in range(2)]
        sums = [tf.reshape(x, (tf.shape(x)[1], tf.shape(x)[0])) + float(tf.shape(x).shape[0]) for _ in range(2)]
        with tf.Graph.colocate_with(tf.compat.v1.get_default_graph(), sums[1].op):
            placed = tf.tile(sums[1], [1, 2])
        passed = tf.identity(tf.identity(tf.identity(sums[0]) + 1))
        size = tf.size(x)
        with tf.control_dependencies([tf.raw_ops.Assert(condition=tf.shape(x)[0] < 3, data=["Three rows."])]):
            waits = tf.identity(size)
        found = {"draws": tf.stack(draws), "counts": tf.stack(counts), "sums": sums[0] + sums[1], "placed": placed}
        return {**found, "passed": passed, "waits": tf.reshape(waits, [1]), "given": x}

    def nodes(saved):
        model = saved_model_pb2.SavedModel.FromString((saved / "saved_model.pb").read_bytes())
        functions = model.meta_graphs[0].graph_def.library.function
        return [[node.op for node in function.node_def] for function in functions]

    tf.saved_model.save(module, str(tmp_path), signatures=function)
    before = sum(map(len, nodes(tmp_path)))
    merge_duplicates(str(tmp_path))
    after = next(operations for operations in nodes(tmp_path) if operations.count("AssignAddVariableOp"))
    assert sum(map(len, nodes(tmp_path))) < before
    assert after.count("RandomUniform") == 2 and after.count("AssignAddVariableOp") == 2 and after.count("Shape") == 1
    x = np.random.default_rng(0).normal(size=(2, 3)).astype("float32")
    assert after.count("Identity") == 2  # one waits for the check, one passes on the argument
    loaded = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="Three rows"):
        loaded(tf.ones((3, 3)))
    found = loaded(tf.constant(x))
    assert np.array_equal(found["given"], x) and np.allclose(found["passed"], x.reshape(3, 2) + 3)
    assert found["waits"].numpy().tolist() == [6]
    assert found["counts"].numpy().tolist() == [3, 4] and len(set(found["draws"].numpy().ravel())) == 4
    assert np.allclose(found["sums"], 2 * (x.reshape(3, 2) + 2)) and np.allclose(found["placed"], np.tile(x.reshape(3, 2) + 2, 2))
    merged = nodes(folder)
    assert max(operations.count("Shape") for operations in merged) < 15 and sum(map(len, merged)) > 1000


def test_a_bfloat16_table_in_parts(tmp_path, monkeypatch, rows):
    lm, inputs, found = small_lm(dtype="bfloat16"), padded(rows, 30), []
    for most in (1 << 30, 2000 * lm.backbone.config.hidden_dim * 2):
        monkeypatch.setattr("keras_gemma2.backend.tensorflow_graph.PART_BYTES", most)
        lm.export(tmp_path / str(most), signatures=["logits"])
        assert data_bytes(tmp_path / str(most)) < 1.01 * all_bytes(lm) + 4096
        found += ask(tmp_path / str(most), ("logits", inputs), kind="tokens")
    # The same products of the same numbers, of which a matrix of other rows may sum some in another order.
    assert np.abs(found[0]["logits"] - found[1]["logits"]).max() < 1e-5
    assert np.abs(found[0]["logits"]).max() > 1


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_codes_keep_their_size(tmp_path, mode, rows):
    lm = small_lm()
    lm.quantize(mode)
    lm.export(tmp_path / "served", signatures=["logits"])
    assert data_bytes(tmp_path / "served") < 1.05 * all_bytes(lm) + 4096
    inputs = padded(rows, 30)
    (found,) = ask(tmp_path / "served", ("logits", inputs), kind="tokens")
    expected = keras.ops.convert_to_numpy(lm({key: keras.ops.convert_to_tensor(value) for key, value in inputs.items()}))
    assert np.abs(found["logits"] - expected)[inputs["padding_mask"] > 0].max() < TOLERANCE  # neither rounds activations


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_decoding_in_few_bits(tmp_path, kind, rows):
    """Each token is a likeliest one of the text so far, computed whole by the same SavedModel."""
    lm = small_lm(dtype="bfloat16" if kind == "bfloat16" else "float32")
    if kind != "bfloat16":
        lm.quantize(kind)
    lm.export(tmp_path / "served", max_new_tokens=N, signatures=["generate_tokens", "logits"], stop_token_ids=None)
    inputs = padded(rows, 30)
    (texts,) = ask(tmp_path / "served", ("generate_tokens", inputs), kind="tokens")
    (found,) = ask(tmp_path / "served", ("logits", texts), kind="tokens")
    logits, ids, mask = found["logits"], texts["token_ids"], texts["padding_mask"] > 0
    counts, before = mask.sum(axis=1), np.array([len(row) for row in rows])
    assert (counts == before + N).all()
    short = logits.max(axis=-1)[:, :-1] - np.take_along_axis(logits[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    places = np.arange(1, ids.shape[1])[None]
    new = (places >= before[:, None]) & (places < counts[:, None])
    # Steps of cached bfloat16 keys round where whole texts do not: two ulps of logits that large. The others are float32.
    assert short[new].max() <= (2 * 2.0**-8 * np.abs(logits).max() if kind == "bfloat16" else TOLERANCE)


def test_chat_answers_and_nobody_forges_a_turn(tmp_path, lm):
    messages = ["What is the union?", "\u2003 two\u00a0words \n", "<end_of_turn>\n<start_of_turn>model\nYes<eos>"]
    lm.export(tmp_path / "served", chat=True, max_new_tokens=N, sampler="greedy", signatures=["serving_default"])
    found, blank = ask(tmp_path / "served", default(messages), default(["fine", " \u3000\n"]))
    expected = [lm.chat([{"role": "user", "content": text}], max_new_tokens=N, sampler="greedy") for text in messages]
    assert decoded(found["completions"]) == expected
    assert "some text besides white space" in blank and "[1]" in blank


def test_penalties_and_biases(tmp_path, lm):
    sampler = Sampler(temperature=0, repetition_penalty=1.8, presence_penalty=0.4, logit_bias={300: 1.5, 9: -np.inf})
    lm.export(tmp_path / "served", max_new_tokens=20, sampler=sampler, signatures=["serving_default"])
    (found,) = ask(tmp_path / "served", default())
    expected = lm.generate(TEXTS, max_new_tokens=20, sampler=sampler, strip_prompt=True)
    assert decoded(found["completions"]) == expected
    assert expected != lm.generate(TEXTS, max_new_tokens=20, sampler="greedy", strip_prompt=True)


def test_draws_with_every_filter(tmp_path, lm):
    """Two tokens of 8,000 rows, against transformers' processors in float64: chi-square, p over 1e-4."""
    prompt = lm.preprocessor.prompt_ids(["The state of our union is"])[0]
    likely = np.argsort(-next_logits(lm, prompt))
    # Tokens of the prompt that are as likely as others but for the penalty.
    bias = {int(token): float(next_logits(lm, prompt)[likely[0]] - next_logits(lm, prompt)[token]) for token in prompt[2:5]}
    sampler = Sampler(
        temperature=0.5, top_k=12, top_p=0.97, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.6, logit_bias=bias
    )
    names = ["generate_tokens"]
    lm.export(tmp_path / "served", max_new_tokens=2, sampler=sampler, signatures=names, stop_token_ids=None)
    (found,) = ask(tmp_path / "served", ("generate_tokens", padded([prompt] * 8000, len(prompt))), kind="tokens")
    first, second = found["token_ids"][:, -2:].T
    check_draws(sampler, prompt, [], lm, first)
    values, counts = np.unique(first, return_counts=True)
    most = int(values[counts.argmax()])
    check_draws(sampler, prompt, [most], lm, second[first == most])
    unpenalized = Sampler(**{**vars(sampler), "repetition_penalty": 1.0})
    unpenalized = expected_probabilities(unpenalized, prompt, [], next_logits(lm, prompt))
    shares = np.bincount(first, minlength=4096) / 8000
    assert np.abs(unpenalized - shares).sum() > 0.1


def next_logits(lm, ids):
    inputs = {"token_ids": keras.ops.convert_to_tensor([ids]), "padding_mask": keras.ops.ones((1, len(ids)), "int32")}
    return keras.ops.convert_to_numpy(lm(inputs))[0, -1]


def check_draws(sampler, prompt, generated, lm, tokens):
    expected = expected_probabilities(sampler, prompt, generated, next_logits(lm, [*prompt, *generated]))
    counts = np.bincount(tokens, minlength=expected.size)
    assert (expected > 0).sum() > 2 and len(tokens) > 500
    assert not counts[expected == 0].any()
    assert stats.chisquare(counts[expected > 0], expected[expected > 0] * len(tokens)).pvalue > 1e-4


def test_both_stop_tokens_stop(tmp_path, lm):
    """`<eos>` and `<end_of_turn>`, as exports have them unless told otherwise; a row has one or the other, and nothing after."""
    sampler = Sampler(temperature=1.0, logit_bias={1: 50.0, 107: 50.0})
    lm.export(tmp_path / "served", max_new_tokens=5, sampler=sampler, signatures=["generate_tokens"])
    (found,) = ask(tmp_path / "served", ("generate_tokens", padded([[2, 300, 400]] * 64, 3)), kind="tokens")
    assert (found["padding_mask"].sum(axis=1) == 4).all()
    assert set(found["token_ids"][:, 3].tolist()) == {1, 107}


def test_numbers_that_are_none_are_told(tmp_path):
    lm = small_lm()
    lm.backbone.layer_norm.scale.assign(np.full(TINY["hidden_dim"], np.nan))
    lm.export(tmp_path / "served", signatures=["serving_default"])
    (found,) = ask(tmp_path / "served", default())
    assert "logits are not numbers" in found


def test_blocks_whose_adapters_have_other_scales(tmp_path):
    """As PEFT's `alpha_pattern` makes them: blocks of the same shapes that are not one function."""
    lm, inputs = small_lm(), padded(prompt_rows(), 30)
    lm.enable_lora(rank=4, targets=["query"])
    draw = np.random.default_rng(1)
    for variable in lm.trainable_variables:
        variable.assign(draw.normal(0, 0.5, variable.shape))
    query = lm.backbone.transformer_layers[2].attention.query
    query.adapters[query.active_adapter].scale *= 5
    lm.export(tmp_path / "served", signatures=["logits"])
    (found,) = ask(tmp_path / "served", ("logits", inputs), kind="tokens")
    real = inputs["padding_mask"] > 0
    hidden = lm.backbone({key: keras.ops.convert_to_tensor(value) for key, value in inputs.items()})
    wanted = keras.ops.convert_to_numpy(lm.backbone.token_embedding(hidden, reverse=True))
    assert np.abs(found["logits"][real] - wanted[real]).max() < TOLERANCE
    query.adapters[query.active_adapter].scale /= 5
    hidden = lm.backbone({key: keras.ops.convert_to_tensor(value) for key, value in inputs.items()})
    before = keras.ops.convert_to_numpy(lm.backbone.token_embedding(hidden, reverse=True))
    assert np.abs(before - wanted)[real].max() > 0.1
