"""What `fit` and `evaluate` take, on every backend: the loss of each form against transformers' ids and a float64 loss."""

import threading
import warnings

import keras
import numpy as np
import pytest
import transformers
from conftest import TINY
from vocabulary import train_vocabulary

import keras_gemma2
from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer, chat_token_ids
from keras_gemma2.inputs import label_tokens
from keras_gemma2.training.stop_on_nan import StopOnNaN

LENGTH = 48
TEXTS = ["the quick brown fox", "a number is\na number 12", "it never sees a letter", "<bos>so is its answer"]
PAIRS = {
    "prompts": ["the quick", "some ten numbers long and", "", "cut them "],
    "responses": [" brown fox", " so is its answer", "a program", "one by one\n\nand half"],
}


def conversation(*contents, system=None):
    messages = [{"role": ("user", "model")[i % 2], "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


CHATS = [
    conversation("the fox?", " jumps  over\n"),
    conversation("a text", "pieces", "how many?", "ten numbers 10"),
    conversation("spaces", "\u200bruns of  spaces", system="only the numbers"),
    conversation("one", "two", "three"),
]
# Gemma's published template, with the marks by which transformers finds the assistant's tokens.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' }}{% if m['role'] == 'model' %}"
    "{% generation %}{{ m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Gemma2Tokenizer(train_vocabulary())


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.export_to_transformers(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def lm(tokenizer):
    keras.utils.set_random_seed(3)
    backbone = Gemma2Backbone(**{**TINY, "num_layers": 2, "vocabulary_size": 600})
    draw = np.random.default_rng(1)
    for variable in backbone.trainable_variables:
        variable.assign(draw.normal(0, 0.4, variable.shape))
    model = Gemma2CausalLM(backbone, Gemma2CausalLMPreprocessor(tokenizer, LENGTH))
    model.compile(optimizer=keras.optimizers.SGD(0.0))  # what `fit` calls leaves the weights to the next test
    return model


@pytest.fixture
def preprocessor(lm):
    """The model's, put back afterwards."""
    settings = {name: getattr(lm.preprocessor, name) for name in ("sequence_length", "truncation", "add_end_token")}
    yield lm.preprocessor
    for name, value in settings.items():
        setattr(lm.preprocessor, name, value)


def array(x):
    return keras.ops.convert_to_numpy(x)


@pytest.fixture(scope="module")
def oracle(theirs):
    """Of each form: rows of (ids, which of them are learned), by transformers."""

    def encode(text, **kwargs):
        return theirs(text, **kwargs).input_ids

    def pair(prompt, response):
        prompt, response = encode(prompt), [*encode(response, add_special_tokens=False), theirs.eos_token_id]
        return prompt + response, [0] * len(prompt) + [1] * len(response)

    def chat(messages):
        if messages[0]["role"] == "system":  # the package's own rule: in front of the user's text
            text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": text}, *messages[2:]]
        out = theirs.apply_chat_template(messages, chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True)
        return out["input_ids"], out["assistant_masks"]

    texts = [[*encode(text.removeprefix("<bos>")), theirs.eos_token_id] for text in TEXTS]
    return {
        "texts": [(ids, [1] * len(ids)) for ids in texts],
        "pairs": [pair(*each) for each in zip(*PAIRS.values())],
        "chats": [chat(messages) for messages in CHATS],
        "tokens": [(ids, [1] * len(ids)) for ids in texts],
    }


def token_dict(rows, length=LENGTH):
    x = {"token_ids": np.zeros((len(rows), length), "int64"), "padding_mask": np.zeros((len(rows), length), bool)}
    for row, (ids, _) in enumerate(rows):
        x["token_ids"][row, : len(ids)], x["padding_mask"][row, : len(ids)] = ids, True
    return x


@pytest.fixture(scope="module")
def forms(oracle):
    return {"texts": TEXTS, "pairs": PAIRS, "chats": CHATS, "tokens": token_dict(oracle["tokens"])}


@pytest.fixture(scope="module")
def expected(lm, oracle):
    """The loss of each form in float64, from the logits of rows without padding; Keras's mean counts every position."""
    losses = {}
    for form, rows in oracle.items():
        total = 0.0
        x = token_dict(rows)
        every = array(lm(x)).astype("float64")
        for logits, (ids, learned) in zip(every, rows):
            logits = logits[: len(ids) - 1]
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= (log_probs[np.arange(len(ids) - 1), ids[1:]] * learned[1:]).sum()
        losses[form] = total / (len(rows) * LENGTH)
    assert len(set(losses.values())) == 3
    return losses


def batches_of(data, size=2):
    """Batches of any form in memory."""
    if isinstance(data, dict):
        count = len(next(iter(data.values())))
        return [{key: value[i : i + size] for key, value in data.items()} for i in range(0, count, size)]
    return [data[i : i + size] for i in range(0, len(data), size)]


def close(loss, wanted):
    return float(loss) == pytest.approx(wanted, rel=2e-5)  # float32 sums of up to 100 losses near 6


# Forms -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["texts", "pairs", "chats", "tokens"])
def test_forms_in_memory(lm, forms, expected, form):
    data = forms[form]
    assert close(lm.evaluate(data, verbose=0)[0], expected[form])
    assert close(lm.test_on_batch(data)[0], expected[form])
    assert close(lm.train_on_batch(data)[0], expected[form])
    history = lm.fit(data, verbose=0, validation_data=data, batch_size=4).history
    assert close(history["loss"][0], expected[form]) and close(history["val_loss"][0], expected[form])


@pytest.mark.parametrize("form", ["texts", "pairs", "chats"])
def test_ids_and_weights_are_transformers(lm, forms, oracle, form):
    x, y, weights = lm._data().read(forms[form])
    for row, (ids, learned) in enumerate(oracle[form]):
        count = len(ids)
        assert x["token_ids"][row, :count].tolist() == list(ids) and not x["token_ids"][row, count:].any()
        assert x["padding_mask"][row].tolist() == [1] * count + [0] * (LENGTH - count)
        assert y[row, : count - 1].tolist() == list(ids[1:])
        assert weights[row].tolist() == list(learned[1:]) + [0] * (LENGTH - count + 1)


def test_texts_are_what_the_preprocessor_makes_of_them(lm, preprocessor):
    for length, truncation, ends in ((LENGTH, "error", True), (5, "right", True), (5, "left", True), (4, "left", False)):
        preprocessor.sequence_length, preprocessor.truncation, preprocessor.add_end_token = length, truncation, ends
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = lm._data().read(TEXTS)
        wanted = preprocessor(TEXTS)
        for ours, other in zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True):
            np.testing.assert_array_equal(ours, array(other))


def test_a_prompt_has_the_ids_that_generation_sees(lm):
    x, _, weights = lm._data().read(PAIRS)
    prompts = lm.preprocessor.generate_preprocess(PAIRS["prompts"])
    ids, mask = array(prompts["token_ids"]), array(prompts["padding_mask"])
    for row, count in enumerate(mask.sum(1)):
        assert x["token_ids"][row, :count].tolist() == ids[row, :count].tolist()
        assert not weights[row, : count - 1].any() and weights[row, count - 1] == 1


def test_a_conversation_has_the_ids_of_the_chat_template(lm):
    x, _, _ = lm._data().read(CHATS)
    for ids, mask, messages in zip(x["token_ids"], x["padding_mask"], CHATS):
        assert ids[mask > 0].tolist() == chat_token_ids(lm.preprocessor.tokenizer, messages, add_generation_prompt=False)


def test_other_containers_of_texts(lm, expected):
    tf = pytest.importorskip("tensorflow")
    for data in (np.array(TEXTS), np.array(TEXTS, object), tuple(TEXTS), tf.constant(TEXTS), [t.encode() for t in TEXTS]):
        assert close(lm.test_on_batch(data)[0], expected["texts"])
    lists = {key: value.tolist() for key, value in lm._data().read(TEXTS)[0].items()}
    assert close(lm.test_on_batch(lists)[0], expected["tokens"])
    assert close(lm.test_on_batch({key: np.array(value) for key, value in PAIRS.items()})[0], expected["pairs"])


def test_weights_of_samples(lm):
    rows = [lm.test_on_batch({k: [v[i]] for k, v in PAIRS.items()})[0] for i in range(4)]
    found = lm.test_on_batch(PAIRS, sample_weight=[1.0, 0.0, 0.25, 0.0])[0]
    assert close(found, (float(rows[0]) + 0.25 * float(rows[2])) / 4)


# Batches -----------------------------------------------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    def __init__(self, batches, **kwargs):
        super().__init__(**kwargs)
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def loader(data):
    import torch

    if isinstance(data, dict):
        rows = [{key: value[i] for key, value in data.items()} for i in range(4)]
        return torch.utils.data.DataLoader(rows, batch_size=2)
    return torch.utils.data.DataLoader(data, batch_size=2, collate_fn=list)


def dataset(data):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data).batch(2)


STREAMS = {
    "generator": lambda data: (batch for batch in batches_of(data)),
    "iterator": lambda data: iter(batches_of(data)),
    "pydataset": lambda data: Batches(batches_of(data)),
    "workers": lambda data: Batches(batches_of(data), workers=2),
    "loader": loader,
    "dataset": dataset,
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("form", ["texts", "pairs", "chats", "tokens"])
def test_batches_of_forms(lm, forms, expected, form, stream):
    if (form, stream) == ("chats", "dataset"):
        pytest.importorskip("tensorflow")
        return test_a_dataset_cannot_hold_conversations(lm)
    assert close(lm.evaluate(STREAMS[stream](forms[form]), verbose=0)[0], expected[form])


def test_a_dataset_cannot_hold_conversations(lm):
    """TensorFlow has no lists of dicts: a dataset of a message's columns is refused."""
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices({"role": ["user", "model"], "content": ["a", "b"]}).batch(2)
    with pytest.raises(ValueError, match=r"Batch 0 of `x`: `x` must be a list of strings; .*a dict of \['content', 'role'\]"):
        lm.evaluate(data, verbose=0)


@pytest.mark.parametrize("stream", ["pydataset", "loader", "dataset"])
def test_fit_and_validation_over_epochs(lm, forms, expected, stream):
    make = STREAMS[stream]
    history = lm.fit(make(PAIRS), validation_data=make(forms["tokens"]), epochs=3, verbose=0).history
    assert all(close(loss, expected["pairs"]) for loss in history["loss"]) and len(history["loss"]) == 3
    assert all(close(loss, expected["tokens"]) for loss in history["val_loss"])
    history = lm.fit(make(PAIRS), validation_data=TEXTS[:2], epochs=1, verbose=0, steps_per_epoch=2, shuffle=False).history
    assert close(history["loss"][0], expected["pairs"])


def test_validation_data_in_memory(lm, forms, expected):
    x, y, weights = lm._data().read(CHATS)
    for data, form in ((TEXTS, "texts"), (TEXTS[:2], None), (CHATS, "chats"), ((PAIRS,), "pairs"), ((x, y, weights), "chats")):
        wanted = expected[form] if form else lm.test_on_batch(data)[0]
        assert close(lm.fit(TEXTS, validation_data=data, verbose=0).history["val_loss"][0], float(wanted))


@pytest.mark.parametrize("stream", ["generator", "pydataset", "loader", "dataset"])
def test_batches_with_labels_and_weights(lm, stream):
    import tensorflow as tf
    import torch

    draw = np.random.default_rng(4)
    x = {"token_ids": draw.integers(1, 600, (4, 9)), "padding_mask": np.ones((4, 9), int)}
    y, weights = draw.integers(1, 600, (4, 9)), draw.uniform(0, 2, (4, 9)).astype("float32")
    wanted = lm.evaluate(x, y, sample_weight=weights, verbose=0)[0]
    rows = [({k: v[i] for k, v in x.items()}, y[i], weights[i]) for i in range(4)]
    batches = [({k: v[i : i + 2] for k, v in x.items()}, y[i : i + 2], weights[i : i + 2]) for i in (0, 2)]
    data = {
        "generator": lambda: iter(batches),
        "pydataset": lambda: Batches(batches),
        "loader": lambda: torch.utils.data.DataLoader(rows, batch_size=2),
        "dataset": lambda: tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(2),
    }[stream]()
    assert close(lm.evaluate(data, verbose=0)[0], wanted)


def test_predict_on_batches(lm, forms):
    wanted = lm.predict(forms["tokens"], verbose=0)
    for stream in ("dataset", "loader", "pydataset"):
        np.testing.assert_allclose(lm.predict(STREAMS[stream](TEXTS), verbose=0), wanted, atol=1e-5)
    np.testing.assert_allclose(array(lm.predict_on_batch(TEXTS)), wanted, atol=1e-5)


@pytest.mark.parametrize("stream", ["generator", "pydataset", "loader", "dataset"])
def test_a_bad_batch_is_named(lm, stream):
    x = {"token_ids": np.ones((8, 6), int), "padding_mask": np.ones((8, 6), int)}
    x["token_ids"][6, 2] = 600
    data = {**STREAMS, "loader": lambda x: loader_of(x), "dataset": lambda x: dataset(x)}[stream]
    with pytest.raises(ValueError, match=r"^Batch 3 of `x`: `token_ids` must be in \[0, 600\).* 600"):
        lm.fit(data(x), verbose=0, shuffle=False)


def loader_of(x):
    import torch

    return torch.utils.data.DataLoader([{k: v[i] for k, v in x.items()} for i in range(8)], batch_size=2)


@pytest.mark.parametrize("stream", ["generator", "pydataset", "loader", "dataset"])
def test_no_batches(lm, stream):
    import tensorflow as tf
    import torch

    empty = {
        "generator": lambda: iter(()),
        "pydataset": lambda: Batches([]),
        "loader": lambda: torch.utils.data.DataLoader([], batch_size=2),
        "dataset": lambda: tf.data.Dataset.from_tensor_slices(TEXTS).batch(2).take(0),
    }[stream]
    for call in (lm.fit, lm.evaluate):
        with pytest.raises(ValueError, match="at least one batch"):
            call(empty(), verbose=0)


def test_what_does_not_go_with_batches(lm):
    for arguments in ({"batch_size": 2}, {"y": [1]}, {"sample_weight": [1]}, {"pack": True}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` does not go with a Batches.*as they come"):
            lm.fit(Batches([TEXTS]), **arguments)
    with pytest.raises(ValueError, match="must be one batch, in memory"):
        lm.train_on_batch(iter([TEXTS]))


# Truncation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["right", "left"])
def test_truncation_is_counted_and_exact(lm, oracle, preprocessor, truncation):
    preprocessor.truncation = truncation
    for form, data, limit in (("pairs", PAIRS, 12), ("chats", CHATS[:3], 30), ("texts", TEXTS, 11)):
        preprocessor.sequence_length = limit - 1
        rows = oracle[form][: len(data)] if form != "pairs" else oracle[form]
        excess = [max(len(ids) - limit, 0) for ids, _ in rows]
        assert any(excess) and not all(excess), form
        message = f"Truncation cut {np.count_nonzero(excess)} of {len(rows)} samples and dropped {sum(excess)} tokens.*{truncation}"
        with pytest.warns(UserWarning, match=message):
            x, y, weights = lm._data().read(data)
        for row, (ids, learned) in enumerate(rows):
            ids, learned = list(ids), list(learned)
            last = -1 if form == "chats" else -2  # `<eos>` is kept
            while len(ids) > limit:
                place = 1 if truncation == "left" else len(ids) + last
                del ids[place], learned[place]
            assert [*x["token_ids"][row, :1], *y[row, : len(ids) - 1]] == ids
            assert weights[row, : len(ids) - 1].tolist() == learned[1:] and not weights[row, len(ids) - 1 :].any()


def test_too_long_is_an_error_by_default(lm, preprocessor):
    preprocessor.sequence_length = 10
    for data in (TEXTS, PAIRS, CHATS):
        with pytest.raises(ValueError, match=r"`x` at index \d has \d+ tokens.*`sequence_length=10` has room for 11.*'right'"):
            lm.fit(data)
    with pytest.raises(ValueError, match="Batch 1 of `x`: `x` at index 1 has"):
        lm.evaluate(iter([["fox"], ["fox", "the fox " * 9]]), verbose=0)


def test_nothing_left_to_learn(lm, preprocessor):
    preprocessor.truncation, preprocessor.sequence_length = "right", 20
    short = conversation("a", "b")
    long = conversation("the quick brown fox " * 6, "dog")
    with pytest.warns(UserWarning, match="2 of 3 samples have no token to learn after truncation: sample 0; sample 2"):
        lm.fit([long, short, long], verbose=0)
    with pytest.raises(ValueError, match="None of the 2 samples has a token to learn.*'left'"):
        lm.fit([long, long])


@pytest.mark.parametrize("stream", ["generator", "pydataset", "loader"])
def test_batches_are_counted_once(lm, preprocessor, stream):
    """Over two epochs, and where Keras looks at batches beforehand."""
    preprocessor.truncation, preprocessor.sequence_length = "right", 20
    chats = [
        conversation("a", "b"),
        conversation("fox", "dog"),
        conversation("the quick brown fox " * 6, "dog"),
        conversation("a", "c"),
    ]
    lengths = [len(chat_token_ids(preprocessor.tokenizer, chat, False)) - 21 for chat in chats]
    dropped = sum(max(n, 0) for n in lengths)
    epochs = 1 if stream == "generator" else 2
    with pytest.warns(UserWarning) as record:
        lm.fit(STREAMS[stream](chats), verbose=0, epochs=epochs, validation_data=Batches([chats[:2]]))
    said = [str(w.message) for w in record]
    assert sum(f"Truncation cut 1 of 4 samples and dropped {dropped} tokens" in message for message in said) == 1
    assert sum("1 of 4 samples have no token to learn after truncation: batch 1, sample 0." in message for message in said) == 1


# What is wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "at least one text"),
        ({"prompts": [], "responses": []}, "`prompts` must hold at least one text"),
        ({"token_ids": np.zeros((0, 5), int), "padding_mask": np.zeros((0, 5), int)}, "at least one row"),
        ({"prompts": ["a", "b"], "responses": ["a"]}, "2 prompts and 1 responses"),
        ({"prompts": ["a", "b"], "responses": ["a", ""]}, r"`responses\[1\]` must have some text"),
        ({"prompts": "a", "responses": "b"}, r"`prompts` must be a list of strings.*Pass `\[text\]`"),
        ({"prompts": ["a", 1], "responses": ["a", "b"]}, r"`prompts\[1\]` must be a string"),
        ({"prompt": ["a"], "response": ["b"]}, r"\{'prompts': .*Received: a dict of \['prompt', 'response'\]"),
        ("one text", r"one string.*Pass `\[text\]`"),
        (conversation("a", "b"), "One conversation is a list of its messages: put it in a list"),
        ([conversation("a", "b"), conversation("a")], r"`x\[1\]` must have a turn of the model"),
        ([conversation("a", "b"), conversation("a", " ")], r"`x\[1\]`: `messages\[1\]\['content'\]` must have some text"),
        ([[{"role": "model", "content": "a"}]], r"`x\[0\]`: `messages\[0\]` must be of the user"),
        ({"token_ids": [[1, 2], [3]], "padding_mask": [[1, 1], [1]]}, r"`token_ids` must have rows of one length.*\[1, 2\]"),
        ({"token_ids": [[2, 600]], "padding_mask": [[1, 1]]}, r"`token_ids` must be in \[0, 600\).*600"),
        (
            {"token_ids": [[2, 3, 4]], "padding_mask": [[2, 2, 1]]},
            "number the samples of a row upward.*row 0: 1 at position 2, after 2",
        ),
        (3, "must be a list of strings; .*Received: 3, of type int"),
    ],
)
def test_bad_data(lm, data, message):
    for call in (lm.fit, lm.evaluate):
        with pytest.raises((ValueError, TypeError), match=message):
            call(data, verbose=0)
    with pytest.raises((ValueError, TypeError), match=message):
        lm.fit(TEXTS, validation_data=data, verbose=0)


def test_bad_labels(lm):
    x = {"token_ids": [[1, 2], [3, 4]], "padding_mask": [[1, 1], [1, 1]]}
    with pytest.raises(ValueError, match="`y` must have rows of one length"):
        lm.fit(x, [[1, 2], [3]])
    with pytest.raises(ValueError, match="`y` must be None where `x` is text"):
        lm.fit(TEXTS, TEXTS)
    with pytest.raises(ValueError, match="`sample_weight` must have one number a sample.*4"):
        lm.fit(TEXTS, sample_weight=np.ones((4, 3)))


def test_text_needs_a_preprocessor(lm, expected, forms):
    bare = Gemma2CausalLM(lm.backbone)
    for data in (TEXTS, PAIRS, CHATS, iter([TEXTS])):
        with pytest.raises(ValueError, match="`lm.preprocessor` is None, and text needs one"):
            bare.evaluate(data, verbose=0)
    assert close(bare.evaluate(forms["tokens"], verbose=0)[0], expected["tokens"])


def test_all_weights_zero(lm, forms):
    x = forms["tokens"]
    zeros = np.zeros(x["token_ids"].shape, "float32")
    with pytest.warns(UserWarning, match="All weights are 0 in the data"):
        assert lm.fit(x, x["token_ids"], sample_weight=zeros, verbose=0).history["loss"] == [0.0]
    with pytest.warns(UserWarning, match="All weights are 0 in batch 1: "):
        lm.evaluate(iter([x, (x, x["token_ids"], zeros)]), verbose=0)


def test_a_last_turn_of_the_user_is_told(lm):
    with pytest.warns(UserWarning, match="1 of 4 conversations end with a turn of the user"):
        lm.evaluate(CHATS, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lm.evaluate(CHATS[:3], verbose=0)


# Samples that share a row --------------------------------------------------------------------------------------------------


def test_numbers_of_samples_are_kept():
    x = {"token_ids": np.arange(1, 17).reshape(2, 8), "padding_mask": [[7, 7, 7, 9, 9, 0, 12, 0], [True] * 5 + [0] * 3]}
    arrays, labels, weights = label_tokens(x, None, None, 97)
    assert arrays["padding_mask"].tolist() == [[1, 1, 1, 2, 2, 0, 3, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert weights.tolist() == [[1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert labels[0, :7].tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_a_row_of_two_samples_has_their_losses(lm, oracle):
    (first, _), (second, _) = oracle["tokens"][:2]
    alone = [lm.test_on_batch({"token_ids": [ids], "padding_mask": [[1] * len(ids)]})[0] * len(ids) for ids in (first, second)]
    row = {"token_ids": [[*first, *second, 0]], "padding_mask": [[1] * len(first) + [2] * len(second) + [0]]}
    assert close(lm.test_on_batch(row)[0] * (len(first) + len(second) + 1), float(sum(alone)))


# A loss that is no number --------------------------------------------------------------------------------------------------


class Spoil(keras.callbacks.Callback):
    """Makes a weight NaN before a step."""

    def __init__(self, batch, epoch=0):
        super().__init__()
        self.at, self.epoch = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            gain = self.model.backbone.layer_norm.trainable_variables[0]
            gain.assign(keras.ops.full(gain.shape, float("nan")))


def trained(lm, start, steps, epochs=1, **kwargs):
    lm.set_weights(start)
    lm.compile(optimizer=keras.optimizers.Adam(0.01))
    data = Batches([{key: value[i : i + 1] for key, value in PAIRS.items()} for i in (0, 1, 2, 3)] * 2)
    lm.fit(data, verbose=0, epochs=epochs, shuffle=False, steps_per_epoch=steps, **kwargs)


def test_nan_stops_and_the_last_good_weights_are_kept(lm):
    start = lm.get_weights()
    trained(lm, start, 4)
    wanted, moments = lm.get_weights(), [array(v) for v in lm.optimizer.variables]
    with pytest.raises(FloatingPointError, match=r"loss is nan at batch 5 of epoch 0.*step 5.*as they were before step 4\. Lower"):
        trained(lm, start, 8, callbacks=[Spoil(5)], stop_on_nan=StopOnNaN(every=2))
    for found, other in zip([*lm.get_weights(), *map(array, lm.optimizer.variables)], [*wanted, *moments], strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-6)
    with pytest.raises(FloatingPointError, match="batch 1 of epoch 1.*step 5.*before step 0"):
        trained(lm, start, 4, epochs=2, callbacks=[Spoil(1, epoch=1)])
    for found, other in zip(lm.get_weights(), start, strict=True):
        np.testing.assert_array_equal(found, other)
    with pytest.raises(FloatingPointError, match=r"so no copy was kept.*the last epoch ended 2 steps ago"):
        trained(lm, start, 4, epochs=2, callbacks=[Spoil(1, epoch=1)], stop_on_nan=StopOnNaN(kept_bytes=100))
    trained(lm, start, 4, callbacks=[Spoil(1)], stop_on_nan=False)
    lm.set_weights(start)
    lm.compile(optimizer=keras.optimizers.SGD(0.0))


def test_the_first_loss_that_is_no_number_is_named(lm):
    """In whichever order Keras's threads read the losses."""
    lm.compile()
    callback = StopOnNaN(kept_bytes=0)
    callback.set_model(lm)
    callback.on_train_begin()
    callback.on_epoch_begin(2)

    def report_batch_3() -> None:
        with pytest.raises(FloatingPointError):
            callback.on_train_batch_end(3, {"loss": np.nan})

    later = threading.Timer(0.2, report_batch_3)
    with pytest.raises(FloatingPointError, match="batch 3 of epoch 2"), callback.restoring():
        for batch in (3, 4):
            callback.on_train_batch_begin(batch)
        later.start()
        callback.on_train_batch_end(4, {"loss": np.nan})
    later.join()


# Files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, wanted",
    [
        ('{"text": "a"}\n\n{"text": "b\\n", "id": 3}\n', ["a", "b\n"]),
        (
            '\ufeff{"prompt": "p", "response": "r"}\n{"completion": "c", "prompt": "q"}',
            {"prompts": ["p", "q"], "responses": ["r", "c"]},
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}], "prompt": "a"}\r\n',
            [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]],
        ),
    ],
)
def test_jsonl(lm, tmp_path, rows, wanted):
    (tmp_path / "data.jsonl").write_bytes(rows.encode())
    data = keras_gemma2.read_jsonl(tmp_path / "data.jsonl")
    assert data == wanted
    assert np.isfinite(lm.test_on_batch(data)[0])


@pytest.mark.parametrize(
    "rows, message",
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b'{"text": "a"}\n{"text": \n', 'line 2 is not JSON.*"prompt" and "response"'),
        (b'{"text": "a"}\n{"txt": "a"}\n', r'line 2: expected a JSON object with "text".*\[\'txt\'\], which fits none'),
        (b'{"prompt": "a"}\n', "line 1: expected.*fits none"),
        (b'["a"]\n', r"line 1: expected.*\['a'\]"),
        (b'{"text": "a", "messages": []}\n', "line 1.*fits several"),
        (b'{"text": "a"}\n\n{"prompt": "a", "response": "b"}\n', 'line 3: all rows.*Line 1 has "text", this one "prompt" and'),
        (b'{"text": 3}\n', 'line 1: "text" must be a string. Received: 3'),
        (b'{"text": "\\ud800"}\n', 'line 1: "text" has a lone surrogate'),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8: byte 10 of the line is 0xff"),
        (b'{"messages": [{"role": "owner", "content": "a"}]}', r"line 1: `messages\[0\]\['role'\]` must be"),
    ],
)
def test_bad_jsonl(tmp_path, rows, message):
    (tmp_path / "data.jsonl").write_bytes(rows)
    with pytest.raises(ValueError, match=f"data.jsonl.*{message}"):
        keras_gemma2.read_jsonl(tmp_path / "data.jsonl")
