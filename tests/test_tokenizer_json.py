"""`tokenizer.json` out of a SentencePiece model and back: the ids stay, by sentencepiece, tokenizers and transformers."""

import json
import os
import random
import time

import pytest
import sentencepiece
import tokenizers
import transformers
from test_tokenizer import GOLDEN
from vocabulary import HARD_TEXTS, random_texts, train_vocabulary

from keras_gemma2.checkpoints.tokenizer_json import from_tokenizer_json, to_tokenizer_json
from keras_gemma2.errors import CheckpointError

pytestmark = pytest.mark.backend_free

FRAMES = ("<bos>", "<eos>", "<pad>", "<unk>")  # tokens for the tokenizers library, plain characters for us


def repetitive_texts(seed, count):
    """Where the order of merges shows: few characters, repeated."""
    draw = random.Random(seed)
    return ["".join(draw.choices(draw.choice(["ae t", "ther", "  \n\ta", "0=-", "in a the of "]), k=40)) for _ in range(count)]


TEXTS = [*HARD_TEXTS, *random_texts(4, 200), *repetitive_texts(4, 200)]
SPELLABLE = [text for text in TEXTS if not any(frame in text for frame in FRAMES)]


def spm(proto):
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def encoded(values, texts):
    fast = tokenizers.Tokenizer.from_str(json.dumps(values))
    return [fast.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture(scope="module")
def values():
    return to_tokenizer_json(train_vocabulary())


@pytest.fixture(scope="module")
def real():
    path = os.environ.get("KERAS_GEMMA2_VOCABULARY")
    if not path:
        pytest.skip("Set KERAS_GEMMA2_VOCABULARY to the path of Gemma 2's `tokenizer.model` to test the real vocabulary.")
    with open(path, "rb") as file:
        return file.read()


def test_the_tokenizers_library_gives_sentencepieces_ids(values):
    assert encoded(values, SPELLABLE) == spm(train_vocabulary()).encode(SPELLABLE)


def test_it_puts_bos_in_front_and_decodes(values):
    fast = tokenizers.Tokenizer.from_str(json.dumps(values))
    ids = spm(train_vocabulary()).encode("the  quick\tfox é")
    assert fast.encode("the  quick\tfox é").ids == [2, *ids]
    assert fast.decode(ids) == "the  quick\tfox é" and fast.decode([2, *ids, 1, 0]) == "the  quick\tfox é"
    assert fast.encode("a", "b").ids == [2, *fast.encode("a").ids[1:], 2, *fast.encode("b").ids[1:]]


def test_frame_pieces_are_tokens_and_special(values):
    assert encoded(values, FRAMES) == [[2], [1], [0], [3]]
    special = {token["content"] for token in values["added_tokens"] if token["special"]}
    assert special == {*FRAMES, "<start_of_turn>", "<end_of_turn>"}


def test_round_trip(values):
    proto = from_tokenizer_json(json.loads(json.dumps(values)))
    before, after = spm(train_vocabulary()), spm(proto)
    assert after.encode(TEXTS) == before.encode(TEXTS)
    assert [after.id_to_piece(i) for i in range(600)] == [before.id_to_piece(i) for i in range(600)]
    for check in ("is_control", "is_byte", "is_unknown"):
        assert [getattr(after, check)(i) for i in range(600)] == [getattr(before, check)(i) for i in range(600)]
    assert [after.decode(after.encode(text)) for text in TEXTS] == [before.decode(before.encode(text)) for text in TEXTS]


def test_merges_as_strings_and_the_renamed_tab(values):
    """As in the files published with Gemma: "a b", and the tab's own character in place of its byte."""
    old = json.loads(json.dumps(values))
    old["model"]["merges"] = [" ".join(merge) for merge in old["model"]["merges"]]
    vocab = {("\t" if piece == "<0x09>" else piece): i for piece, i in old["model"]["vocab"].items() if piece != "\t"}
    gap = next(i for piece, i in values["model"]["vocab"].items() if piece == "\t")
    old["model"]["vocab"] = {**vocab, "<unused99>": gap}
    old["added_tokens"] = [token for token in old["added_tokens"] if token["content"] != "\t"]
    assert spm(from_tokenizer_json(old)).encode(["the fox", "a\tb"]) == [
        spm(train_vocabulary()).encode("the fox"),
        [*spm(train_vocabulary()).encode("a"), old["model"]["vocab"]["\t"], *spm(train_vocabulary()).encode("b")],
    ]


def test_tokens_of_a_fine_tune(values):
    """A new one after the vocabulary, and one that takes an unused piece's place; both are read as one token."""
    changed = json.loads(json.dumps(values))
    flags = changed["added_tokens"][0]
    changed["added_tokens"] = [token for token in changed["added_tokens"] if token["id"] != 7]
    changed["added_tokens"] += [{**flags, "id": 600, "content": "<|tool|>"}, {**flags, "id": 7, "content": "<think>"}]
    proto = from_tokenizer_json(changed)
    assert spm(proto).encode("<|tool|>the<think>") == [600, *spm(train_vocabulary()).encode("the"), 7]
    assert spm(proto).get_piece_size() == 601


def test_transformers_own_conversion_is_read(tmp_path):
    """Its file has the same pieces and pairs; it cuts long runs of spaces otherwise, SentencePiece's way is ours."""
    (tmp_path / "tokenizer.model").write_bytes(train_vocabulary())
    transformers.GemmaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert spm(from_tokenizer_json(values)).encode(TEXTS) == spm(train_vocabulary()).encode(TEXTS)


def test_the_real_vocabulary(real):
    start = time.perf_counter()
    values = to_tokenizer_json(real)
    written = time.perf_counter() - start
    before, texts = spm(real), [*SPELLABLE, *repetitive_texts(7, 1000), *(text for text, _ in GOLDEN)]
    start = time.perf_counter()
    after = spm(from_tokenizer_json(values))
    read = time.perf_counter() - start
    assert max(written, read) < 30  # measured: 2 to 4 s each; a quadratic way would take minutes
    assert encoded(values, texts) == before.encode(texts)
    assert after.encode([*TEXTS, *texts]) == before.encode([*TEXTS, *texts])
    assert after.encode([text for text, _ in GOLDEN]) == [ids for _, ids in GOLDEN]


def broken(change):
    values = json.loads(json.dumps(to_tokenizer_json(train_vocabulary())))
    change(values, values["model"], values["model"]["vocab"])
    return values


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda v, m, d: v.pop("model"), "'model'"),
        (lambda v, m, d: v.update(model=[]), "'model'"),
        (lambda v, m, d: m.update(type="Unigram"), "'model.type'.*Unigram"),
        (lambda v, m, d: m.update(vocab=[["a", 1]]), "'model.vocab'"),
        (lambda v, m, d: m.update(vocab={}), "'model.vocab'"),
        (lambda v, m, d: d.update(the="5"), "'model.vocab'.*small integers.*'the': '5'"),
        (lambda v, m, d: d.update(the=True), "'model.vocab'"),
        (lambda v, m, d: d.update(the=-1), "'model.vocab'"),
        (lambda v, m, d: d.update(the=10**30), "'model.vocab'"),
        (lambda v, m, d: d.update({"": 600}), "'model.vocab'"),
        (lambda v, m, d: d.update({"\ud800": 600}), "'model.vocab'"),
        (lambda v, m, d: d.update(zzz=5), "'model.vocab' must .*zzz"),
        (lambda v, m, d: d.update(zzz=601), "'model.vocab' must use every id; id 600 is missing.*601"),
        (lambda v, m, d: d.update({"zzz": d.pop("<0x41>")}), "'model.vocab'.*<0x41> is missing"),
        (lambda v, m, d: m.pop("merges"), "'model.merges'"),
        (lambda v, m, d: m["merges"].append("ab"), "'model.merges'.*'ab'"),
        (lambda v, m, d: m["merges"].append("a b c"), "'model.merges'"),
        (lambda v, m, d: m["merges"].append(["a", 1]), "'model.merges'"),
        (lambda v, m, d: m["merges"].append(["q", "q"]), "'model.merges'.*'q', 'q'"),
        (lambda v, m, d: m["merges"].append(["", "the"]), "'model.merges'"),
        (lambda v, m, d: m.update(unk_token=None), "'model.unk_token'.*None"),
        (lambda v, m, d: v.update(added_tokens={}), "'added_tokens'"),
        (lambda v, m, d: v["added_tokens"].append("x"), "'added_tokens'.*'x'"),
        (lambda v, m, d: v["added_tokens"].append({"id": 9, "content": "<bos>"}), "'added_tokens'.*has id 2"),
        (lambda v, m, d: v["added_tokens"].append({"id": 7, "content": "again"}), "'model.vocab' must give an id once.*again"),
        (lambda v, m, d: v["added_tokens"].append({"id": 5.0, "content": "x"}), "'added_tokens'"),
    ],
)
def test_malformed_vocabularies_are_refused(change, key):
    with pytest.raises(CheckpointError, match=f"where.json: {key}"):
        from_tokenizer_json(broken(change), "where.json")


def test_other_kinds_of_models_have_no_tokenizer_json():
    from sentencepiece import sentencepiece_model_pb2

    for change in ("unigram", "prefix", "spaces", "charsmap", "bytes"):
        model = sentencepiece_model_pb2.ModelProto.FromString(train_vocabulary())
        if change == "unigram":
            model.trainer_spec.model_type = 1
        elif change == "prefix":
            model.normalizer_spec.add_dummy_prefix = True
        elif change == "spaces":
            model.normalizer_spec.remove_extra_whitespaces = True
        elif change == "charsmap":
            model.normalizer_spec.precompiled_charsmap = b"x"
        else:
            model.trainer_spec.byte_fallback = False
        with pytest.raises(CheckpointError, match="Gemma's kind of vocabulary only"):
            to_tokenizer_json(model.SerializeToString())
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        to_tokenizer_json(b"\xff\xff not one")
