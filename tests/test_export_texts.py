"""The tokenizer of a SavedModel's graph against SentencePiece's own, read in Python: TensorFlow Text's operations, traced."""

import numpy as np
import pytest
import tensorflow as tf
from test_tokenizer import real_tokenizer  # noqa: F401 - a fixture
from vocabulary import HARD_TEXTS, random_texts, train_vocabulary

from keras_gemma2 import Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.chat import chat_token_ids
from keras_gemma2.export.graph_text import GraphText

pytestmark = pytest.mark.backend_free

# Starts that are read as `<bos>`, and what Python takes for white space, at the ends and inside.
TEXTS = [
    *HARD_TEXTS,
    *random_texts(seed=3, count=300),
    "<bos><bos>a",
    " <bos>",
    "<bos> <eos>",
    "\x1c\x1f a \x85\u1680",
    "\u2029 \u202f\u205f b\u200b ",
    "<start_of_turn>model\nYes<end_of_turn>\n<start_of_turn>user\n",
]
CONTEXT = 600


@pytest.fixture(scope="module", params=["trained", "real"])
def tokenizer(request):
    return Gemma2Tokenizer(train_vocabulary()) if request.param == "trained" else request.getfixturevalue("real_tokenizer")


def graph_rows(preprocessor, chat, texts):
    """Ids of texts, by a traced graph."""
    graph = GraphText(preprocessor, chat, CONTEXT)
    traced = tf.function(lambda prompts: graph.rows(prompts)[:2], input_signature=[tf.TensorSpec([None], tf.string)])
    token_ids, counts = traced(tf.constant(texts))
    assert (token_ids.numpy() * (tf.range(token_ids.shape[1])[None] >= counts[:, None]).numpy() == 0).all()  # `<pad>` is 0
    return [row[:count].tolist() for row, count in zip(token_ids.numpy(), counts.numpy())]


@pytest.mark.parametrize("add_start_token", [True, False])
def test_prompts(tokenizer, add_start_token):
    preprocessor = Gemma2CausalLMPreprocessor(tokenizer, add_start_token=add_start_token)
    texts = [text for text in TEXTS if text or add_start_token]
    found = graph_rows(preprocessor, False, texts)
    assert found == preprocessor.prompt_ids(texts)
    plain = [text for text in texts if not text.startswith("<bos>")]
    pieces = tokenizer.tokenize(plain)  # SentencePiece's
    start = [tokenizer.start_token_id] if add_start_token else []
    assert graph_rows(preprocessor, False, plain) == [[*start, *row] for row in pieces]


def test_texts_without_a_token(tokenizer):
    graph = GraphText(Gemma2CausalLMPreprocessor(tokenizer, add_start_token=False), False, CONTEXT)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have a token each"):
        graph.rows(tf.constant(["fine", ""]))


def test_messages(tokenizer):
    preprocessor = Gemma2CausalLMPreprocessor(tokenizer)
    texts = [text for text in TEXTS if text.strip()]
    found = graph_rows(preprocessor, True, texts)
    turns = tokenizer.start_of_turn_token_id, tokenizer.end_of_turn_token_id
    for text, row in zip(texts, found):
        assert row == chat_token_ids(tokenizer, [{"role": "user", "content": text}])
        assert [row.count(turn) for turn in turns] == [2, 1]  # the template's own


def test_texts_of_tokens(tokenizer):
    """Ids anywhere in the vocabulary, byte pieces and control pieces among them."""
    preprocessor, size = Gemma2CausalLMPreprocessor(tokenizer), min(tokenizer.vocabulary_size(), 2000)
    rows = np.random.default_rng(5).integers(0, size, (200, 20)).astype("int32")
    rows = np.concatenate([rows, [[*range(217, 237)], [*range(8), *range(104, 116)]]])
    found = GraphText(preprocessor, False, CONTEXT).texts(rows, tf.ones_like(rows, tf.bool), ())
    expected = preprocessor.generate_postprocess({"token_ids": rows, "padding_mask": np.ones_like(rows)})
    assert [text.decode() for text in found.numpy()] == expected
