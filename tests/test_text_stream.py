"""Text out of ids that come one by one, against decoding all of them at once."""

import functools
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from vocabulary import HARD_TEXTS, random_texts, train_vocabulary

from keras_gemma2.generation.text_stream import TextStream, read_stop_strings
from keras_gemma2.tokenizer import Gemma2Tokenizer

pytestmark = pytest.mark.backend_free
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def spaced(remove_extra_whitespaces):
    """The small vocabulary as one that puts a space before a text and drops it again."""
    model = sentencepiece_model_pb2.ModelProto.FromString(train_vocabulary())
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = remove_extra_whitespaces
    return model.SerializeToString()


@functools.cache
def tokenizer_of(name):
    if name == "real":
        path = os.environ.get("KERAS_GEMMA2_VOCABULARY")
        if not path:
            pytest.skip("Set KERAS_GEMMA2_VOCABULARY to the path of Gemma 2's `tokenizer.model` to test the real vocabulary.")
        return Gemma2Tokenizer(path)
    protos = {"small": train_vocabulary, "prefix": lambda: spaced(False), "prefix, no extra spaces": lambda: spaced(True)}
    return Gemma2Tokenizer(protos[name]())


@pytest.fixture(params=["small", "prefix", "prefix, no extra spaces", "real"])
def tokenizer(request):
    return tokenizer_of(request.param)


def pieces(tokenizer, chunks, stop_strings=None, **options):
    stream = TextStream(tokenizer, stop_strings, **options)
    return [*(stream.push(chunk) for chunk in chunks), stream.finish()]


def cut(text, stop_strings):
    """Text up to the stop string that begins first."""
    return text[: min((place for place in map(text.find, stop_strings) if place >= 0), default=len(text))]


def random_ids(tokenizer, draw, count):
    """Ids of every kind, many of bytes, runs of spaces and frames."""
    byte = tokenizer.token_to_id("<0x00>")
    starts = [b for text in ("é", "日本", "🙂", "\ufffd", "\u0800\U00010000") for b in text.encode()]
    kinds = (
        lambda: draw.randrange(tokenizer.vocabulary_size()),
        lambda: byte + draw.randrange(256),
        lambda: byte + draw.choice(starts),
        lambda: draw.randrange(0, 4),
        lambda: draw.randrange(106, 145),
        lambda: draw.choice(tokenizer.tokenize("a  b")).item(),
    )
    return [draw.choice(kinds)() for _ in range(count)]


@EXAMPLES
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["small", "prefix", "prefix, no extra spaces", "real"]))
def test_random_ids_add_up_to_the_whole(seed, name):
    tokenizer, draw = tokenizer_of(name), random.Random(seed)
    ids = random_ids(tokenizer, draw, draw.randrange(60))
    chunks, rest = [], list(ids)
    while rest:
        count = draw.randrange(1, 4)
        chunks, rest = [*chunks, rest[:count]], rest[count:]
    parts = pieces(tokenizer, chunks)
    assert "".join(parts) == (tokenizer.detokenize(ids) if ids else "")
    so_far, given_out = [], ""
    for chunk, part in zip(chunks, parts):  # nothing is given out that a later token could change
        so_far, given_out = [*so_far, *chunk], given_out + part
        assert tokenizer.detokenize(so_far).startswith(given_out)


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_random_stop_strings_cut_the_whole(data, seed):
    tokenizer, draw = tokenizer_of("small"), random.Random(seed)
    letters = [tokenizer.token_to_id(draw.choice("ab ")) for _ in range(30)]  # stop strings overlap each other and themselves
    ids = draw.choice([random_ids(tokenizer, draw, 30), letters])
    whole = tokenizer.detokenize(ids)
    own = [whole[i : i + draw.randrange(1, 6)] for i in (draw.randrange(len(whole)) for _ in range(draw.randrange(3)) if whole)]
    random_ones = data.draw(st.lists(st.text("ab ", min_size=1, max_size=5), max_size=3))
    stops = [string for string in [*own, *random_ones] if string]
    stream, text = TextStream(tokenizer, stops), ""
    for token_id in ids:
        text += stream.push([token_id])
        if stream.stopped:
            break
    text += stream.finish()
    assert text == cut(whole, stops)
    assert stream.stopped == any(string in whole for string in stops)


@pytest.mark.parametrize("name", ["small", "real"])
def test_texts_come_out_as_they_went_in(name):
    tokenizer = tokenizer_of(name)
    for text in [*HARD_TEXTS, *random_texts(5, 200)]:
        ids = tokenizer.tokenize(text).tolist()
        assert "".join(pieces(tokenizer, [[i] for i in ids])) == text


def test_a_character_comes_whole_with_its_last_byte(tokenizer):
    byte = tokenizer.token_to_id("<0x00>")
    ids = [byte + b for b in "aé日🙂".encode()]
    assert pieces(tokenizer, [[i] for i in ids]) == ["a", "", "é", "", "", "日", "", "", "", "🙂", ""]


BROKEN = (
    "80 c3 c341 e282 e28241 f09f99 f09f99f09f9982 c0af fffe eda080 f4908080 f888808080 e228a1 efbfbd e282ac82ac c3c3a9 f0808080"
)


@pytest.mark.parametrize("broken", list(map(bytes.fromhex, BROKEN.split())), ids=BROKEN.split())
def test_broken_bytes_are_replaced_one_by_one(tokenizer, broken):
    byte, word = tokenizer.token_to_id("<0x00>"), tokenizer.token_to_id("a")
    ids = [byte + b for b in broken]
    for row in (ids, [word, *ids, word], [*ids, 2, byte + 0x82]):
        assert "".join(pieces(tokenizer, [[i] for i in row])) == tokenizer.detokenize(row)


def test_a_stop_string_across_tokens_and_across_bytes(tokenizer):
    byte = tokenizer.token_to_id("<0x00>")
    a = tokenizer.token_to_id("a")
    euro = [byte + b for b in "€".encode()]
    assert pieces(tokenizer, [[i] for i in [a, *euro, a, a]], ["€a"]) == ["a", "", "", "", "", "", ""]
    assert pieces(tokenizer, [[i] for i in [a, *euro, *euro, a]], ["€a"]) == ["a", "", "", "", "", "", "€", "", ""]
    assert pieces(tokenizer, [[a], [a], [107]], "<end_of_turn>") == ["a", "a", "", ""]


def test_text_that_might_have_been_a_stop_string_is_not_lost():
    tokenizer = tokenizer_of("small")
    ids = [[tokenizer.token_to_id(c)] for c in "abaabab"]
    assert pieces(tokenizer, ids, ["ababx", "bb"]) == ["", "", "", "aba", "", "", "", "abab"]
    assert pieces(tokenizer, ids, ["abab"]) == ["", "", "", "aba", "", "", "", ""]
    assert pieces(tokenizer, ids, ["b", "abax"]) == ["", "", "", "a", "", "", "", ""], "the first by its beginning"
    assert pieces(tokenizer, ids[:2], ["b", "abax"]) == ["", "", "a"], "unless it never completes"


def test_hidden_and_closing_ids_are_those_of_the_preprocessor():
    from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor

    tokenizer = tokenizer_of("small")
    preprocessor, draw = Gemma2CausalLMPreprocessor(tokenizer, sequence_length=32), random.Random(8)
    options = {"hidden_token_ids": tokenizer.special_token_ids, "closing_token_ids": [tokenizer.end_of_turn_token_id]}
    for _ in range(100):
        ids = random_ids(tokenizer, draw, 12) + draw.choice([[], [107], [107, 107], [107, 1, 107, 0], [1]])
        expected = preprocessor.generate_postprocess({"token_ids": ids, "padding_mask": [True] * len(ids)})
        assert "".join(pieces(tokenizer, [[i] for i in ids], **options)) == expected
    a = tokenizer.token_to_id("a")
    assert pieces(tokenizer, [[a], [107], [a], [107]], **options) == ["a", "", "<end_of_turn>a", "", ""]


def test_the_work_is_linear():
    tokenizer = tokenizer_of("small")
    stops, a = ["a" * 2000 + "b", "x" * 50], tokenizer.token_to_id("a")

    def seconds(count):
        stream, start = TextStream(tokenizer, stops), time.perf_counter()
        text = "".join(stream.push([a]) for _ in range(count))
        assert len(text + stream.finish()) == count
        return time.perf_counter() - start

    seconds(1000)
    short, long = min(seconds(5_000) for _ in range(3)), seconds(50_000)
    assert long < 40 * short, "10 times the tokens; quadratic work would take 100 times as long"


def test_wrong_stop_strings_and_ids():
    tokenizer = tokenizer_of("small")
    for wrong in ("", [""], ["a", ""]):
        with pytest.raises(ValueError, match="`stop_strings` must not hold an empty string"):
            TextStream(tokenizer, wrong)
    for wrong in (3, [3], ["a", None], b"a", {"a": 1}):
        with pytest.raises(TypeError, match="`stop_strings` must be a string, a list"):
            TextStream(tokenizer, wrong)
    assert read_stop_strings(None) == () and read_stop_strings("ab") == ("ab",) and read_stop_strings(("a", "a")) == ("a",)
    with pytest.raises(ValueError, match="600|599"):
        TextStream(tokenizer).push([600])
