"""`Gemma2CausalLMPreprocessor`, directly and inside `tf.data`."""

import ast
import itertools
import pathlib
import pickle
import re

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from vocabulary import HARD_TEXTS, random_texts, train_vocabulary

import keras_gemma2.preprocessor
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.tokenizer import Gemma2Tokenizer

PAD, END, START, TURN, TURN_END = 0, 1, 2, 106, 107

# Texts of all lengths, some with `<bos>` spelled out.
TEXTS = [
    *HARD_TEXTS,
    *random_texts(seed=1, count=40),
    *(f"<bos>{text}" for text in random_texts(seed=2, count=10)),
    "<bos><bos>the fox",
    "the <bos> fox",
    " <bos>the fox",
    "\n<bos>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Gemma2Tokenizer(train_vocabulary())


def build(tokenizer, *args, **kwargs):
    return Gemma2CausalLMPreprocessor(tokenizer, *args, **kwargs)


def to_arrays(outputs):
    return keras.tree.map_structure(
        lambda x: x.numpy() if isinstance(x, tf.Tensor) else np.asarray(x),
        outputs,
    )


def map_texts(function, texts):
    """What `function` makes of `texts` in a pipeline, one batch, as arrays."""
    dataset = tf.data.Dataset.from_tensor_slices(texts)
    return to_arrays(next(iter(dataset.batch(len(texts)).map(function))))


def assert_equal(actual, expected):
    keras.tree.assert_same_structure(actual, expected)
    pairs = zip(keras.tree.flatten(actual), keras.tree.flatten(expected))
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def oracle_row(preprocessor, text, limit, has_end):
    """The tokens of one text, spelled out one rule after the other."""
    literal = text.startswith("<bos>")
    while text.startswith("<bos>"):
        text = text[len("<bos>") :]
    tokens = preprocessor.tokenizer.tokenize(text).tolist()
    head = [START] if preprocessor.add_start_token or literal else []
    tail = [END] if has_end else []
    while len(head + tokens + tail) > limit:
        assert preprocessor.truncation != "error"
        tokens.pop(0 if preprocessor.truncation == "left" else -1)
    return head + tokens + tail


def oracle(preprocessor, texts, training):
    """What the preprocessor must return, as arrays."""
    length = preprocessor.sequence_length + training
    has_end = training and preprocessor.add_end_token
    token_ids = np.full((len(texts), length), PAD, dtype="int32")
    mask = np.zeros((len(texts), length), dtype=bool)
    for index, text in enumerate(texts):
        row = oracle_row(preprocessor, text, length, has_end)
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    if not training:
        return {"token_ids": token_ids, "padding_mask": mask}
    x = {"token_ids": token_ids[:, :-1], "padding_mask": mask[:, :-1]}
    return x, token_ids[:, 1:], mask[:, 1:]


SETTINGS = [
    dict(sequence_length=n, truncation=t, add_start_token=s, add_end_token=e)
    for n, t, s, e in [
        *itertools.product((1, 2, 6), ("right", "left"), (True, False), [True]),
        (400, "error", True, True),
        (400, "error", False, True),
        (400, "error", True, False),
        (6, "left", True, False),
    ]
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_samples_and_prompts_are_exact(tokenizer, settings):
    preprocessor = build(tokenizer, **settings)
    expected = oracle(preprocessor, TEXTS, training=True)
    assert_equal(to_arrays(preprocessor(TEXTS)), expected)
    assert_equal(map_texts(preprocessor, TEXTS), expected)
    prompts = [t for t in TEXTS if t or preprocessor.add_start_token]
    expected = oracle(preprocessor, prompts, training=False)
    generate_preprocess = preprocessor.generate_preprocess
    assert_equal(to_arrays(generate_preprocess(prompts)), expected)
    assert_equal(map_texts(generate_preprocess, prompts), expected)


def test_one_text_has_no_batch_dimension(tokenizer):
    preprocessor = build(tokenizer, 6, truncation="right")
    row = keras.tree.map_structure(
        lambda array: array[0], oracle(preprocessor, ["the fox"], True)
    )
    dataset = tf.data.Dataset.from_tensors("the fox")
    assert_equal(to_arrays(preprocessor("the fox")), row)
    assert_equal(to_arrays(next(iter(dataset.map(preprocessor)))), row)
    prompt = keras.tree.map_structure(
        lambda array: array[0], oracle(preprocessor, ["the fox"], False)
    )
    generate_preprocess = preprocessor.generate_preprocess
    assert_equal(to_arrays(generate_preprocess("the fox")), prompt)
    in_graph = next(iter(dataset.map(generate_preprocess)))
    assert_equal(to_arrays(in_graph), prompt)


def test_outputs_are_tensors_of_the_backend(tokenizer):
    preprocessor = build(tokenizer, 6)
    outputs = (preprocessor(["a"]), preprocessor.generate_preprocess(["a"]))
    for tensor in keras.tree.flatten(outputs):
        assert keras.ops.is_tensor(tensor)


def test_pipelines_know_their_shapes(tokenizer):
    preprocessor = build(tokenizer, 6)
    dataset = tf.data.Dataset.from_tensor_slices(["a", "b"])
    batched = dataset.batch(2, drop_remainder=True)
    for data, shape in ((dataset, [6]), (batched, [2, 6])):
        specs = data.map(preprocessor).element_spec
        for spec in keras.tree.flatten(specs):
            assert spec.shape.as_list() == shape


def test_agrees_with_keras_hub(tokenizer):
    theirs = keras_hub.models.GemmaCausalLMPreprocessor(
        keras_hub.models.GemmaTokenizer(train_vocabulary()), 6
    )
    ours = build(tokenizer, 6, truncation="right")
    texts = [text for text in TEXTS if not text.startswith("<bos>")]
    assert_equal(to_arrays(ours(texts)), to_arrays(theirs(texts)))
    assert_equal(
        to_arrays(ours.generate_preprocess(texts)),
        to_arrays(theirs.generate_preprocess(texts)),
    )


@pytest.mark.parametrize("add_start_token", [True, False])
def test_a_pasted_chat_has_one_start(tokenizer, add_start_token):
    preprocessor = build(tokenizer, 32, add_start_token=add_start_token)
    chat = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    for run in (preprocessor.generate_preprocess, lambda x: preprocessor(x)[0]):
        for text in (chat, "<bos>" + chat):
            ids = to_arrays(run(text))["token_ids"]
            assert ids[:2].tolist() == [START, TURN]
            assert (ids == START).sum() == 1


def test_no_start_is_added_when_it_is_off(tokenizer):
    preprocessor = build(tokenizer, 8, add_start_token=False)
    # keras-hub's `generate_preprocess` adds one all the same.
    for ids in (
        preprocessor("the fox")[0]["token_ids"],
        preprocessor.generate_preprocess("the fox")["token_ids"],
    ):
        assert START not in np.asarray(ids).tolist()


def test_a_start_within_the_text_is_text(tokenizer):
    preprocessor = build(tokenizer, 32)
    prompt = preprocessor.generate_preprocess("the <bos> fox")
    assert (np.asarray(prompt["token_ids"]) == START).sum() == 1
    assert preprocessor.generate_postprocess(prompt) == "the <bos> fox"


@pytest.mark.parametrize("training", [True, False])
def test_a_long_text_is_named_and_the_mend_works(tokenizer, training):
    preprocessor = build(tokenizer, 5)
    run = preprocessor if training else preprocessor.generate_preprocess
    count = len(tokenizer.tokenize("the fox 2024")) + 1 + training
    limit = 5 + training
    with pytest.raises(ValueError) as refusal:
        run(["a", "the fox 2024", "b"])
    message = str(refusal.value)
    assert f"`x` at index 1 has {count} tokens" in message
    assert f"`sequence_length=5` has room for {limit}" in message
    assert "'the fox 2024'" in message
    assert "'right'" in message and "'left'" in message
    needed = int(re.search(r"Pass `sequence_length=(\d+)`", message)[1])
    run(["the fox 2024"], sequence_length=needed)
    with pytest.raises(ValueError, match="at index 0"):
        run(["the fox 2024"], sequence_length=needed - 1)


@pytest.mark.parametrize("training", [True, False])
def test_a_long_text_stops_a_pipeline(tokenizer, training):
    preprocessor = build(tokenizer, 5)
    run = preprocessor if training else preprocessor.generate_preprocess
    # Long, and of characters of three bytes, which a message must not cut.
    text = "a" + "\u65e5" * 200
    count = len(tokenizer.tokenize(text)) + 1 + training
    message = (
        rf"`x` at index\] \[1\] \[has\] \[{count}\] \[tokens.*"
        rf"`sequence_length=5` has room for {5 + training}.*a\u65e5.*truncation"
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        map_texts(run, ["a", text, "b"])
    # It can be seen how long is long enough.
    map_texts(
        lambda x: run(x, sequence_length=count - training), ["a", text, "b"]
    )


def test_truncation_can_be_changed(tokenizer):
    preprocessor = build(tokenizer, 4)
    digits = tokenizer.tokenize("0123456789").tolist()
    preprocessor.truncation = "right"
    x, y, _ = to_arrays(preprocessor("0123456789"))
    assert x["token_ids"].tolist() == [START, *digits[:3]]
    assert y.tolist() == [*digits[:3], END]
    preprocessor.truncation = "left"
    x, y, _ = to_arrays(preprocessor("0123456789"))
    assert x["token_ids"].tolist() == [START, *digits[-3:]]
    assert y.tolist() == [*digits[-3:], END]


def test_length_can_be_changed(tokenizer):
    preprocessor = build(tokenizer, 4)
    assert preprocessor.generate_preprocess("a")["token_ids"].shape == (4,)
    longer = preprocessor.generate_preprocess("a", sequence_length=9)
    assert longer["token_ids"].shape == (9,)
    assert preprocessor("a", sequence_length=9)[1].shape == (9,)
    preprocessor.sequence_length = 7
    assert preprocessor.generate_preprocess("a")["token_ids"].shape == (7,)
    assert preprocessor("a")[1].shape == (7,)


def test_an_empty_prompt_is_a_start(tokenizer):
    preprocessor = build(tokenizer, 3)
    texts = ["", "<bos>"]
    prompt = to_arrays(preprocessor.generate_preprocess(texts))
    assert prompt["token_ids"].tolist() == [[START, PAD, PAD]] * 2
    assert prompt["padding_mask"].tolist() == [[True, False, False]] * 2
    # No text of the batch has a token of its own to be packed.
    assert_equal(map_texts(preprocessor.generate_preprocess, texts), prompt)
    in_graph = map_texts(preprocessor, texts)
    assert_equal(in_graph, to_arrays(preprocessor(texts)))


def test_a_prompt_of_nothing_is_refused(tokenizer):
    preprocessor = build(tokenizer, 3, add_start_token=False)
    with pytest.raises(ValueError, match="at index 1 has no tokens.*''.*Pass"):
        preprocessor.generate_preprocess(["a", ""])
    message = r"at index\] \[1\] \[has no tokens.*Pass some text"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        map_texts(preprocessor.generate_preprocess, ["a", ""])
    prompt = to_arrays(preprocessor.generate_preprocess("<bos>"))
    assert prompt["token_ids"].tolist() == [START, PAD, PAD]


@pytest.mark.parametrize(
    "x, error, message",
    [
        ([], ValueError, r"`x` must hold at least one.*x=\[\]"),
        (3, TypeError, "`x` must be a string.*x=3"),
        (None, TypeError, "`x` must be a string.*x=None"),
        (["a", 3], TypeError, r"`x\[1\]` must be a string.*3"),
        (["a", "\ud800"], ValueError, r"`x\[1\]`.*lone surrogates.*\\ud800"),
        ([["a"]], TypeError, r"`x\[0\]` must be a string.*one dimension"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer, x, error, message):
    preprocessor = build(tokenizer, 4)
    with pytest.raises(error, match=message):
        preprocessor(x)
    with pytest.raises(error, match=message):
        preprocessor.generate_preprocess(x)


@pytest.mark.parametrize(
    "value, error",
    [
        (0, ValueError),
        (-3, ValueError),
        (1.5, TypeError),
        ("8", TypeError),
        (True, TypeError),
    ],
)
def test_length_must_be_a_positive_integer(tokenizer, value, error):
    preprocessor = build(tokenizer, np.int64(4))
    assert type(preprocessor.sequence_length) is int
    message = f"`sequence_length`.*positive integer.*sequence_length={value!r}"
    for use in (
        lambda: build(tokenizer, value),
        lambda: setattr(preprocessor, "sequence_length", value),
        lambda: preprocessor("a", sequence_length=value),
        lambda: preprocessor.generate_preprocess("a", sequence_length=value),
    ):
        with pytest.raises(error, match=message):
            use()
    assert preprocessor.sequence_length == 4


@pytest.mark.parametrize("value", ["middle", None, ["left"], ""])
def test_unknown_truncation_is_refused(tokenizer, value):
    message = "`truncation` must be one of.*error.*right.*left.*Received"
    with pytest.raises(ValueError, match=message):
        build(tokenizer, truncation=value)


def test_labels_are_not_taken(tokenizer):
    preprocessor = build(tokenizer, 4)
    with pytest.raises(ValueError, match="`y` must be `None`.*'b'"):
        preprocessor("a", "b")
    with pytest.raises(ValueError, match="`sample_weight` must be `None`"):
        preprocessor("a", sample_weight=1.0)
    pairs = tf.data.Dataset.from_tensor_slices((["prompt"], ["answer"]))
    with pytest.raises(ValueError, match="`y` must be `None`"):
        pairs.map(preprocessor)


@pytest.mark.parametrize(
    "settings", [{"sequence_length": 4}, {"add_bos": True}, {"add_eos": True}]
)
def test_a_tokenizer_that_frames_texts_is_refused(settings):
    tokenizer = Gemma2Tokenizer(train_vocabulary(), **settings)
    with pytest.raises(ValueError, match=f"`tokenizer` must not.*{settings}"):
        build(tokenizer)


def test_another_tokenizer_is_refused():
    other = keras_hub.models.GemmaTokenizer(train_vocabulary())
    for tokenizer in (None, other):
        with pytest.raises(TypeError, match="must be a `Gemma2Tokenizer`"):
            build(tokenizer)


def test_texts_survive_the_round_trip(tokenizer):
    preprocessor = build(tokenizer, 400)
    texts = [text for text in TEXTS if not text.startswith("<bos>")]
    prompts = preprocessor.generate_preprocess(texts)
    assert preprocessor.generate_postprocess(prompts) == texts
    assert preprocessor.generate_postprocess(preprocessor(texts)[0]) == texts
    one = preprocessor.generate_preprocess(" a ")
    assert preprocessor.generate_postprocess(one) == " a "


def generated(tokenizer):
    """Token ids as a model makes them, their mask, and their texts."""
    five, six = tokenizer.tokenize("56").tolist()
    first_byte = tokenizer.token_to_id("<0x00>")
    byte = first_byte + 0xE2
    rows = [
        # Stopped at the end of its turn: that piece is not part of the text.
        ([START, five, six, TURN_END, PAD, PAD], 4, "56"),
        # Turns within are; padding is dropped wherever the mask ends.
        (
            [START, TURN, five, TURN_END, six, END],
            6,
            "<start_of_turn>5<end_of_turn>6",
        ),
        ([five, TURN_END, END, TURN_END, six, six], 4, "5"),
        ([PAD, START, five, END, six, PAD], 6, "56"),
        # The first byte of a character, without the others.
        ([START, byte, five, byte, END, five], 5, "\ufffd5\ufffd"),
        ([START, TURN_END, END, PAD, PAD, PAD], 3, ""),
        ([five] * 6, 0, ""),
    ]
    token_ids = np.array([row for row, _, _ in rows], dtype="int32")
    lengths = np.array([length for _, length, _ in rows])
    mask = np.arange(6) < lengths[:, None]
    return token_ids, mask, [text for _, _, text in rows]


@pytest.mark.parametrize(
    "wrap",
    [
        keras.ops.convert_to_tensor,
        np.array,
        tf.constant,
        lambda array: array.tolist(),
    ],
)
@pytest.mark.parametrize("dtype", ["bool", "int32"])
def test_generated_ids_become_text(tokenizer, wrap, dtype):
    preprocessor = build(tokenizer, 6)
    token_ids, mask, texts = generated(tokenizer)
    mask = mask.astype(dtype)
    outputs = {"token_ids": wrap(token_ids), "padding_mask": wrap(mask)}
    assert preprocessor.generate_postprocess(outputs) == texts
    for ids, kept, text in zip(token_ids, mask, texts):
        outputs = {"token_ids": wrap(ids), "padding_mask": wrap(kept)}
        assert preprocessor.generate_postprocess(outputs) == text


def test_generated_ids_become_text_in_a_pipeline(tokenizer):
    preprocessor = build(tokenizer, 6)
    token_ids, mask, texts = generated(tokenizer)
    dataset = tf.data.Dataset.from_tensor_slices(
        {"token_ids": token_ids, "padding_mask": mask}
    )
    one_by_one = dataset.map(preprocessor.generate_postprocess)
    assert [text.numpy().decode() for text in one_by_one] == texts
    batch = next(iter(dataset.batch(9).map(preprocessor.generate_postprocess)))
    assert [text.decode() for text in batch.numpy()] == texts


@pytest.mark.parametrize(
    "x, message",
    [
        ({"token_ids": [1]}, "keys.*padding_mask.*token_ids"),
        ([1, 2], "must be a dictionary.*list"),
        ({"token_ids": [5], "padding_mask": [1, 1]}, r"one shape.*\(1,\)"),
        ({"token_ids": [600], "padding_mask": [1]}, "from 0 to 599.*600"),
    ],
)
def test_what_was_not_generated_is_refused(tokenizer, x, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizer, 6).generate_postprocess(x)


def test_config_round_trip(tokenizer):
    preprocessor = build(tokenizer, 7, False, False, "left", name="p")
    saved = keras.saving.serialize_keras_object(preprocessor)
    name = "keras_gemma2>Gemma2CausalLMPreprocessor"
    assert saved["registered_name"] == name
    revived = keras.saving.deserialize_keras_object(saved)
    assert type(revived) is Gemma2CausalLMPreprocessor
    assert type(revived.tokenizer) is Gemma2Tokenizer
    assert revived.get_config() == preprocessor.get_config()
    for key, value in {
        "sequence_length": 7,
        "add_start_token": False,
        "add_end_token": False,
        "truncation": "left",
        "name": "p",
    }.items():
        assert getattr(revived, key) == value


def test_the_default_is_to_raise(tokenizer):
    config = build(tokenizer).get_config()
    assert config["truncation"] == "error"
    assert config["sequence_length"] == 1024
    assert config["add_start_token"] is True
    assert config["add_end_token"] is True


def test_a_pickle_works_as_before(tokenizer):
    preprocessor = build(tokenizer, 7, truncation="left")
    revived = pickle.loads(pickle.dumps(preprocessor))
    assert_equal(to_arrays(revived(TEXTS)), to_arrays(preprocessor(TEXTS)))


def test_tensorflow_is_imported_only_where_it_is_needed():
    path = pathlib.Path(keras_gemma2.preprocessor.__file__)
    tree = ast.parse(path.read_text())
    lines = [ast.unparse(node).split("\n")[0] for node in tree.body]
    assert "import keras_hub" in lines
    assert not [line for line in lines if "import tensorflow" in line]
