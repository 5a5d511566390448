"""Tokens that a fine-tune added: transformers' ids, from every file that may name them, with and without tokenizer.model."""

import json
import os
import time

import pytest
import sentencepiece
import transformers
from oracle import BASE
from vocabulary import train_vocabulary

from keras_gemma2.checkpoints import formats
from keras_gemma2.checkpoints.added_tokens import with_added_tokens

pytestmark = pytest.mark.backend_free

CHAT = ["<|im_start|>", "<|im_end|>", "<tool call>"]
TEXTS = [
    "<|im_start|>user\nthe quick fox<|im_end|>\n",
    "a<|im_start|><|im_start|>b <|im_end|> c",
    "<|im_start|",
    "x<tool call>y <tool  call>",
    "<start_of_turn>user  <|im_end|><end_of_turn>",
    "plain text, 2024  \t\n",
    "<no token 603>",
]


def config(folder, rows):
    values = transformers.Gemma2Config(**{**BASE, "vocab_size": rows}).to_dict()
    (folder / "config.json").write_text(json.dumps({**values, "architectures": ["Gemma2ForCausalLM"]}))


def ours(folder):
    proto = formats.vocabulary(formats.find_source("it", str(folder)))
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def pieces():
    return sentencepiece.SentencePieceProcessor(model_proto=train_vocabulary())


@pytest.fixture
def tuned(tmp_path):
    """What transformers 5 saves, and its tokenizer."""
    (tmp_path / "tokenizer.model").write_bytes(train_vocabulary())
    tokenizer = transformers.GemmaTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT[:2]})
    tokenizer.add_tokens(CHAT[2:])
    folder = tmp_path / "saved"
    tokenizer.save_pretrained(folder)
    config(folder, 640)  # rounded up, as trainers do
    return folder, tokenizer


def assert_like(folder, tokenizer):
    assert ours(folder).encode(TEXTS) == [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert (
        [ours(folder).piece_to_id(token.replace(" ", "\u2581")) for token in CHAT]
        == tokenizer.convert_tokens_to_ids(CHAT)
        == [600, 601, 602]
    )


@pytest.mark.parametrize("with_model", [True, False])
def test_ids_are_those_of_transformers(tuned, with_model):
    folder, tokenizer = tuned
    if with_model:
        (folder / "tokenizer.model").write_bytes(train_vocabulary())
    assert_like(folder, tokenizer)


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json, last"])
def test_each_file_alone_is_enough(tuned, file):
    folder, tokenizer = tuned
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.model").write_bytes(train_vocabulary())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(folder / name)
    added = [token for token in values["added_tokens"] if token["id"] >= 600]
    if file == "added_tokens.json":
        (folder / file).write_text(json.dumps({token["content"]: token["id"] for token in added}))
    elif file == "tokenizer_config.json":
        decoder = {str(token.pop("id")): token for token in values["added_tokens"]}
        (folder / file).write_text(json.dumps({"added_tokens_decoder": decoder}))
    else:  # with the list of tokens behind everything else, where only the whole file shows it
        values["added_tokens"] = values.pop("added_tokens")
        (folder / "tokenizer.json").write_text(json.dumps(values))
    assert_like(folder, tokenizer)


def test_holes_and_new_names_of_unused_pieces(tmp_path):
    config(tmp_path, 608)
    (tmp_path / "tokenizer.model").write_bytes(train_vocabulary())
    named = {"<late>": 605, "<think>": 7, "<no row>": 608, "<eos>": 1, "<mine>": 2, "<end_of_turn>": 107}
    (tmp_path / "added_tokens.json").write_text(json.dumps(named))
    model = ours(tmp_path)
    assert model.get_piece_size() == 606 and model.encode("<think>the<late>") == [7, *pieces().encode("the"), 605]
    assert model.id_to_piece(2) == "<bos>"  # a piece with a meaning keeps it
    assert model.encode("<no row><no token 603><unused0>") == pieces().encode("<no row><no token 603>") + model.encode("<unused0>")
    assert not {*range(600, 605)} & set(model.encode("<no token 600>")) and model.decode([601, 605]) == "<late>"


def test_without_added_tokens_the_file_is_taken_as_it_is(tmp_path):
    config(tmp_path, 640)
    (tmp_path / "tokenizer.model").write_bytes(train_vocabulary())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"7": {"content": "<unused0>"}}}))
    assert formats.vocabulary(formats.find_source("it", str(tmp_path))) == train_vocabulary()


def test_the_real_vocabulary_costs_little(tmp_path):
    path = os.environ.get("KERAS_GEMMA2_VOCABULARY")
    if not path:
        pytest.skip("Set KERAS_GEMMA2_VOCABULARY to the path of Gemma 2's `tokenizer.model` to test the real vocabulary.")
    with open(path, "rb") as file:
        proto = file.read()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 256000, "<|im_end|>": 256001}))
    start = time.perf_counter()
    longer = with_added_tokens(proto, str(tmp_path), 256064)
    assert time.perf_counter() - start < 10  # measured: below 1 s
    model = sentencepiece.SentencePieceProcessor(model_proto=longer)
    assert model.encode("<|im_start|>Hello world!<|im_end|>") == [256000, 4521, 2134, 235341, 256001]
