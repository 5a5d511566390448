"""`Gemma2Tokenizer`, directly and inside `tf.data`."""

import ast
import os
import pathlib
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from vocabulary import HARD_TEXTS, random_texts, train_vocabulary

import keras_gemma2.tokenizer
from keras_gemma2.tokenizer import Gemma2Tokenizer

# Every form of text the tests of exactness run over.
TEXTS = [*HARD_TEXTS, *random_texts(seed=0, count=200)]

# From GEMMA2.md, section 4: (text, ids) of the real vocabulary, without <bos>.
GOLDEN = (
    ("Hello world!", [4521, 2134, 235341]),
    (
        "Derinkuyu is an underground city.",
        [8636, 979, 78904, 603, 671, 30073, 3413, 235265],
    ),
    ("2024", [235284, 235276, 235284, 235310]),
    ("\t" * 6 + "test", [255973, 2195]),
    (" " * 50 + "fifty spaces", [168, 156, 132133, 14130]),
    ("<start_of_turn>model\n", [106, 2516, 108]),
)


@pytest.fixture(scope="module")
def tokenizer():
    return Gemma2Tokenizer(train_vocabulary())


@pytest.fixture(scope="module")
def real_tokenizer():
    path = os.environ.get("KERAS_GEMMA2_VOCABULARY")
    if not path:
        pytest.skip(
            "Set KERAS_GEMMA2_VOCABULARY to the path of Gemma 2's "
            "`tokenizer.model` to run the tests on the real vocabulary."
        )
    return Gemma2Tokenizer(path)


def map_texts(function, texts):
    """What `function` makes of `texts` in a pipeline, one batch."""
    dataset = tf.data.Dataset.from_tensor_slices(texts)
    return next(iter(dataset.batch(len(texts)).map(function)))


def test_special_pieces_have_gemmas_ids(tokenizer):
    assert tokenizer.pad_token_id == 0
    assert tokenizer.end_token_id == 1
    assert tokenizer.start_token_id == 2
    assert tokenizer.start_of_turn_token_id == 106
    assert tokenizer.end_of_turn_token_id == 107
    for name in (
        "start_token",
        "end_token",
        "pad_token",
        "start_of_turn_token",
        "end_of_turn_token",
        "end_token2",
    ):
        token_id = getattr(tokenizer, f"{name}_id")
        assert tokenizer.id_to_token(token_id) == getattr(tokenizer, name)


def test_stops_after_the_end_of_text_or_of_a_turn(tokenizer):
    assert tokenizer.stop_token_ids == (1, 107)
    # The name under which keras-hub's `CausalLM.generate` looks for it.
    assert tokenizer.end_token2_id == 107


def test_turn_pieces_are_part_of_the_text(tokenizer):
    assert sorted(tokenizer.special_token_ids) == [0, 1, 2]
    assert sorted(tokenizer.special_tokens) == ["<bos>", "<eos>", "<pad>"]


@pytest.mark.parametrize(
    "piece", ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
)
def test_a_vocabulary_without_a_special_piece_is_refused(piece):
    with pytest.raises(ValueError, match=f"lacks the piece `{piece}`"):
        Gemma2Tokenizer(train_vocabulary(without=piece))


@pytest.mark.parametrize("proto", [b"garbage", b"", b"\x12\x00", 3])
def test_what_is_no_model_is_refused(proto, tmp_path):
    with pytest.raises(ValueError, match="proto"):
        Gemma2Tokenizer(proto)
    if isinstance(proto, bytes):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(proto)
        message = "`proto` must be a SentencePiece model.*tokenizer.model"
        with pytest.raises(ValueError, match=message):
            Gemma2Tokenizer(path)


def test_vocabulary_may_be_a_path(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_vocabulary())
    for proto in (path, str(path)):
        ids = Gemma2Tokenizer(proto).tokenize("the fox")
        np.testing.assert_array_equal(ids, tokenizer.tokenize("the fox"))


def test_without_a_vocabulary_use_is_refused():
    tokenizer = Gemma2Tokenizer(None)
    for use in (
        lambda: tokenizer.tokenize("a"),
        lambda: tokenizer.detokenize([5]),
        lambda: tokenizer.stop_token_ids,
        lambda: tokenizer.special_token_ids,
    ):
        with pytest.raises(ValueError, match="vocabulary"):
            use()


@pytest.mark.parametrize("text", HARD_TEXTS, ids=ascii)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_texts_survive_the_round_trip_as_a_batch(tokenizer):
    assert tokenizer.detokenize(tokenizer.tokenize(TEXTS)) == TEXTS


def test_texts_survive_the_round_trip_in_a_pipeline(tokenizer):
    def round_trip(text):
        return tokenizer.detokenize(tokenizer.tokenize(text))

    texts = map_texts(round_trip, TEXTS).numpy()
    assert [text.decode() for text in texts] == TEXTS


def test_the_one_character_that_does_not_survive(tokenizer):
    # SentencePiece spells a space U+2581, and reads U+2581 as one.
    assert tokenizer.detokenize(tokenizer.tokenize("a\u2581b")) == "a b"


def test_a_pipeline_gives_the_same_ids(tokenizer):
    expected = tokenizer.tokenize(TEXTS)
    assert map_texts(tokenizer, TEXTS).to_list() == expected
    one_by_one = tf.data.Dataset.from_tensor_slices(TEXTS).map(tokenizer)
    assert [ids.numpy().tolist() for ids in one_by_one] == expected
    ids = next(iter(one_by_one))
    assert ids.dtype == tf.int32


def test_one_text_gives_an_array_and_a_batch_gives_lists(tokenizer):
    ids = tokenizer.tokenize("the fox")
    assert isinstance(ids, np.ndarray)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    batch = tokenizer.tokenize(["the fox", ""])
    assert batch == [ids.tolist(), []]
    assert tokenizer.tokenize("").shape == (0,)
    assert tokenizer.detokenize(ids) == "the fox"
    assert tokenizer.detokenize(batch) == ["the fox", ""]


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        tuple,
        np.array,
        tf.constant,
        lambda texts: [text.encode() for text in texts],
        lambda texts: np.array(texts, dtype=object),
        lambda texts: [tf.constant(text) for text in texts],
    ],
)
def test_all_forms_of_a_batch_are_read_alike(tokenizer, wrap):
    texts = ["the fox", "10 dogs"]
    assert tokenizer.tokenize(wrap(texts)) == tokenizer.tokenize(texts)


@pytest.mark.parametrize("wrap", [np.str_, np.array, tf.constant, str.encode])
def test_all_forms_of_one_text_are_read_alike(tokenizer, wrap):
    expected = tokenizer.tokenize("the fox")
    np.testing.assert_array_equal(tokenizer.tokenize(wrap("the fox")), expected)


def test_runs_are_one_token_and_digits_are_not(tokenizer):
    assert tokenizer.tokenize("\n\n\n").tolist() == [110]
    assert tokenizer.tokenize("   ").tolist() == [140]
    assert tokenizer.tokenize("\t\t").tolist() == [170]
    assert len(tokenizer.tokenize("2024")) == 4


def test_turns_can_be_written_in_text_but_frames_cannot(tokenizer):
    ids = tokenizer.tokenize("<start_of_turn>user\nhi<end_of_turn>\n").tolist()
    assert ids[0] == 106 and ids[-2:] == [107, 108]
    for piece in ("<bos>", "<eos>", "<pad>"):
        ids = tokenizer.tokenize(piece)
        assert not set(tokenizer.special_token_ids) & set(ids.tolist())


def test_bytes_that_are_no_character_do_not_break_detokenize(tokenizer):
    first_byte = tokenizer.token_to_id("<0x00>")
    broken = [first_byte + 0xFF, first_byte + 0xE2, first_byte + 0x82]
    assert tokenizer.detokenize(broken) == "\ufffd" * 3
    graph = map_texts(lambda _: tokenizer.detokenize([broken]), ["x"])
    assert graph.numpy()[0].decode() == "\ufffd" * 3


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        np.array,
        tf.constant,
        keras.ops.convert_to_tensor,
        lambda rows: [np.array(row) for row in rows],
        lambda rows: tf.ragged.constant(rows, dtype="int32"),
    ],
)
def test_all_forms_of_ids_are_read_alike(tokenizer, wrap):
    rows = [[110, 140], [170, 106]]
    expected = ["\n\n\n   ", "\t\t<start_of_turn>"]
    assert tokenizer.detokenize(wrap(rows)) == expected


def test_no_ids_make_no_text(tokenizer):
    assert tokenizer.detokenize([]) == ""
    assert tokenizer.detokenize([[]]) == [""]
    assert tokenizer.detokenize(np.zeros((2, 0), dtype="int32")) == ["", ""]
    assert tokenizer.detokenize(np.zeros((0, 3), dtype="int32")) == []
    assert tokenizer.detokenize(110) == "\n\n\n"


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        (3, TypeError, "`inputs` must be a string.*inputs=3.*int"),
        (None, TypeError, "`inputs` must be a string.*None"),
        ({"a": "b"}, TypeError, "`inputs` must be a string.*dict"),
        (["a", 3], TypeError, r"`inputs\[1\]` must be a string.*3.*int"),
        ([["a"]], TypeError, r"`inputs\[0\]` must be a string.*list"),
        (np.array([1]), TypeError, r"`inputs\[0\]` must be a string.*int"),
        ([], ValueError, r"`inputs` must hold at least one.*\[\].*Skip"),
        ("a\ud800", ValueError, r"`inputs`.*'a\\ud800'.*position 1.*Mend it"),
        (["a", "\udfff"], ValueError, r"`inputs\[1\]`.*\\udfff.*position 0"),
        (b"a\xff", ValueError, r"`inputs` must be UTF-8.*byte 1.*Decode"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer, inputs, error, message):
    with pytest.raises(error, match=message):
        tokenizer.tokenize(inputs)
    with pytest.raises(error, match=message):
        tokenizer(inputs)


def test_the_mend_for_surrogates_joins_pairs(tokenizer):
    with pytest.raises(ValueError, match="surrogatepass") as refusal:
        tokenizer.tokenize("\ud83d\ude00")
    mend = str(refusal.value).split("`")[-2]
    mended = eval(mend, {"text": "\ud83d\ude00"})
    assert mended == "\U0001f600"
    assert tokenizer.detokenize(tokenizer.tokenize(mended)) == mended


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        (600, ValueError, "`inputs`.*from 0 to 599.*Received: 600"),
        ([5, -1], ValueError, "`inputs`.*from 0 to 599.*Received: -1"),
        ([[5], [5, 600]], ValueError, r"`inputs\[1\]`.*Received: 600"),
        ([10**30], ValueError, "Received: 10000"),
        ("a", TypeError, "`inputs` must hold integer.*'a'"),
        ([["a"]], TypeError, r"`inputs\[0\]` must hold integer.*'a'"),
        ([1.0], TypeError, "`inputs` must hold integer.*1.0"),
        (np.array([[1.0]]), TypeError, r"`inputs\[0\]` must hold.*1.0"),
        (True, TypeError, "`inputs` must hold integer.*True"),
        ([False], TypeError, "`inputs` must hold integer.*False"),
        (None, TypeError, "`inputs` must hold integer.*None"),
        (np.zeros((1, 1, 1), int), TypeError, "integer token ids"),
    ],
)
def test_what_are_no_ids_are_refused(tokenizer, inputs, error, message):
    with pytest.raises(error, match=message):
        tokenizer.detokenize(inputs)


def test_broken_utf8_is_refused_in_a_pipeline(tokenizer):
    message = r"`inputs` must be UTF-8. At index\] \[1\].*\[a\ufffd\].*Decode"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        map_texts(tokenizer, [b"fine", b"a\xff"])


@pytest.mark.parametrize("token_id", [600, -1])
def test_unknown_ids_are_refused_in_a_pipeline(tokenizer, token_id):
    dataset = tf.data.Dataset.from_tensor_slices([[5, token_id]])
    message = rf"`inputs`.*from 0 to 599.*\[{token_id}\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        list(dataset.map(tokenizer.detokenize))
    ragged = dataset.batch(1).map(
        lambda ids: tokenizer.detokenize(tf.RaggedTensor.from_tensor(ids))
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        list(ragged)


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        (tf.constant([1]), TypeError, "`inputs` must hold strings.*int32"),
        (tf.constant([["a"]]), ValueError, "rank 0 or 1.*(1, 1)"),
        (tf.constant([], tf.string), ValueError, "at least one text"),
    ],
)
def test_wrong_tensors_are_refused_in_a_trace(
    tokenizer, inputs, error, message
):
    with pytest.raises(error, match=message):
        tf.function(tokenizer.tokenize)(inputs)


@pytest.mark.parametrize(
    "reset", [lambda: keras.utils.set_random_seed(0), keras.utils.clear_session]
)
def test_pipelines_survive_a_reset_of_the_session(tokenizer, reset):
    # Both empty TensorFlow's cache of kernels, and with it what keras-hub's
    # tokenizer made there: "Resource ... does not exist".
    def round_trip(text):
        return tokenizer.detokenize(tokenizer.tokenize(text))

    dataset = tf.data.Dataset.from_tensors("the fox")
    before = dataset.map(round_trip)
    traced = tf.function(round_trip)
    assert next(iter(before)) == b"the fox"
    assert traced(tf.constant("the fox")) == b"the fox"
    reset()
    assert next(iter(before)) == b"the fox"
    assert next(iter(dataset.map(round_trip))) == b"the fox"
    assert traced(tf.constant("the fox")) == b"the fox"


def test_a_traced_function_is_saved_with_the_vocabulary(tokenizer, tmp_path):
    module = tf.Module()
    signature = [tf.TensorSpec([None], tf.string)]
    module.tokenize = tf.function(tokenizer.tokenize, signature)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    ids = loaded.tokenize(tf.constant(["the fox", ""]))
    assert ids.to_list() == tokenizer.tokenize(["the fox", ""])


def test_direct_use_needs_no_tensorflow_text(monkeypatch):
    monkeypatch.setattr("tensorflow_text.SentencepieceTokenizer", None)
    # keras-hub's switch to TensorFlow is not followed, either.
    for settings in ({}, {"_allow_python_workflow": False}):
        tokenizer = Gemma2Tokenizer(train_vocabulary(), **settings)
        assert tokenizer.detokenize(tokenizer.tokenize(["a b"])) == ["a b"]


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_length": 3},
        {"add_bos": True, "add_eos": True},
        {"dtype": "int64"},
        {"dtype": "string"},
    ],
    ids=str,
)
def test_settings_of_the_base_class_hold_in_a_pipeline(settings):
    tokenizer = Gemma2Tokenizer(train_vocabulary(), **settings)
    texts = ["the quick brown fox", "a"]
    expected = tf.ragged.constant(np.asarray(tokenizer(texts), object).tolist())
    in_graph = map_texts(tokenizer, texts)
    if not isinstance(in_graph, tf.RaggedTensor):
        assert in_graph.shape == (2, 3)
        in_graph = tf.RaggedTensor.from_tensor(in_graph)
    assert in_graph.dtype == settings.get("dtype", "int32")
    assert in_graph.to_list() == expected.to_list()


def test_a_new_vocabulary_reaches_new_pipelines(tokenizer):
    changed = Gemma2Tokenizer(train_vocabulary())
    map_texts(changed, ["the fox"])
    changed.set_proto(train_vocabulary(without="<mask>"))
    expected = changed.tokenize(["\n"])
    assert expected != tokenizer.tokenize(["\n"])
    assert map_texts(changed, ["\n"]).to_list() == expected


def test_the_pieces_are_not_tracked_by_keras(tokenizer):
    # Tracking 256,000 pieces takes seconds; see `__setattr__`.
    assert type(tokenizer._vocabulary) is list
    assert type(tokenizer._token_to_id_map) is dict


def test_config_round_trip(tokenizer):
    config = tokenizer.get_config()
    revived = Gemma2Tokenizer.from_config(config)
    assert revived.get_config() == config
    saved = keras.saving.serialize_keras_object(tokenizer)
    assert saved["registered_name"] == "keras_gemma2>Gemma2Tokenizer"
    revived = keras.saving.deserialize_keras_object(saved)
    assert type(revived) is Gemma2Tokenizer
    assert revived.get_config() == config


def test_the_vocabulary_is_saved_as_an_asset(tokenizer, tmp_path):
    tokenizer.save_assets(str(tmp_path))
    revived = Gemma2Tokenizer.from_config(tokenizer.get_config())
    revived.load_assets(str(tmp_path))
    assert revived.stop_token_ids == (1, 107)
    assert revived.tokenize(TEXTS) == tokenizer.tokenize(TEXTS)


def test_a_pickle_has_the_vocabulary(tokenizer):
    revived = pickle.loads(pickle.dumps(tokenizer))
    assert revived.tokenize(TEXTS) == tokenizer.tokenize(TEXTS)


def test_tensorflow_is_imported_only_where_it_is_needed():
    tree = ast.parse(pathlib.Path(keras_gemma2.tokenizer.__file__).read_text())
    lines = [ast.unparse(node).split("\n")[0] for node in tree.body]
    assert "import keras_hub" in lines
    assert not [line for line in lines if "import tensorflow" in line]


@pytest.mark.parametrize("text, expected", GOLDEN)
def test_golden_ids(real_tokenizer, text, expected):
    assert real_tokenizer.tokenize(text).tolist() == expected
    assert real_tokenizer.detokenize(expected) == text


def test_golden_ids_in_a_pipeline(real_tokenizer):
    texts, expected = map(list, zip(*GOLDEN))
    assert map_texts(real_tokenizer, texts).to_list() == expected


def test_the_real_vocabulary(real_tokenizer):
    assert real_tokenizer.vocabulary_size() == 256_000
    assert real_tokenizer.start_token_id == 2
    assert real_tokenizer.stop_token_ids == (1, 107)
    assert sorted(real_tokenizer.special_token_ids) == [0, 1, 2]
    assert real_tokenizer.start_of_turn_token_id == 106
    with pytest.raises(ValueError, match="from 0 to 255999"):
        real_tokenizer.detokenize([256_000])


def test_round_trips_on_the_real_vocabulary(real_tokenizer):
    ids = real_tokenizer.tokenize(TEXTS)
    assert real_tokenizer.detokenize(ids) == TEXTS
    assert map_texts(real_tokenizer, TEXTS).to_list() == ids
