"""The distiller against float64 numpy: losses and gradients, teachers of all kinds, files, what it refuses."""

import json
import os

import keras
import numpy as np
import pytest
from conftest import TINY
from keras import ops
from test_loss import assert_close, plain_loss

import keras_gemma2
from keras_gemma2 import Distiller, Gemma2Backbone, Gemma2CausalLM, record_teacher
from keras_gemma2.training import cross_entropy, distiller, recording

# float32 against float64, as a share of the largest gradient of a variable; kernels are moved by a step of rate 1 and back.
TOLERANCE = 2e-5
ROWS, LENGTH, V = 3, 7, 97


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 4 tokens, so that there are several, and one that is not full."""
    monkeypatch.setattr(cross_entropy, "MAX_ROWS", 4)


def model(seed=3, dtype="float32", **overrides):
    keras.utils.set_random_seed(seed)
    backbone = Gemma2Backbone(**{**TINY, "num_layers": 2, **overrides}, dtype=dtype)
    draw = np.random.default_rng(seed)
    for variable in backbone.trainable_variables:
        if len(variable.shape) == 1:
            variable.assign(0.3 * draw.standard_normal(variable.shape))
    return Gemma2CausalLM(backbone)


def teacher(**overrides):
    """Of another depth, width and cap than the student."""
    return model(8, **{"num_layers": 3, "hidden_dim": 34, "final_logit_soft_cap": 4.0, **overrides})


def batch(some=True):
    draw = np.random.default_rng(2)
    x = {"token_ids": draw.integers(1, V, (ROWS, LENGTH)).astype("int32"), "padding_mask": np.ones((ROWS, LENGTH), "int32")}
    y = draw.integers(1, V, (ROWS, LENGTH)).astype("int32")
    weights = draw.uniform(0.2, 2, (ROWS, LENGTH)) * (draw.uniform(size=(ROWS, LENGTH)) < 0.7) if some else np.ones(y.shape)
    return x, y, weights.astype("float32")


def log_softmax(values):
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def logits_of(lm, x):
    return np.asarray(ops.convert_to_numpy(lm(x)), "float64")


def expected(student, of_teacher, data, t, alpha, keep=None):
    """Means of loss, divergence and cross-entropy, in float64, from logits: sums over V written out; `keep`: the k likeliest."""
    x, y, weights = data
    s = logits_of(student, x)
    own, theirs = log_softmax(s / t), log_softmax(of_teacher / t)
    if keep is None:
        kl = (np.exp(theirs) * (theirs - own)).sum(-1)
    else:
        p, q = np.exp(theirs), np.exp(own)
        order = np.argsort(-p, axis=-1, kind="stable")[..., :keep]
        p, q = (np.take_along_axis(a, order, -1) for a in (p, q))
        p, q = (np.concatenate([a, 1 - a.sum(-1, keepdims=True)], -1) for a in (p, q))
        kl = (p * np.log(p / q)).sum(-1)
    nll = -np.take_along_axis(log_softmax(s), y[..., None].astype(int), -1)[..., 0]
    return ((alpha * t**2 * kl + (1 - alpha) * nll) * weights).sum() / weights.size, (kl * weights).sum() / weights.sum()


def plain_gradients(student, of_teacher, data, t, alpha):
    """What one step of descent at rate 1 changes, with the same loss written on logits in Keras's own operations."""
    theirs = ops.convert_to_tensor(log_softmax(of_teacher / t).astype("float32"))

    def loss(labels, logits):
        kl = ops.sum(ops.exp(theirs) * (theirs - ops.log_softmax(logits / t)), axis=-1)
        nll = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        return alpha * t**2 * kl + (1 - alpha) * nll

    return change(student, lambda: student.train_on_batch(*data), lambda: student.compile(keras.optimizers.SGD(1.0), loss))


def change(student, step, compile):
    before = [ops.convert_to_numpy(v.value) for v in student.trainable_variables]
    compile()
    step()
    return [a - ops.convert_to_numpy(v.value) for a, v in zip(before, student.trainable_variables)]


def distilled(student, of, data, **settings):
    trainer = Distiller(student, of, **settings)
    logs = {}
    gradients = change(
        student,
        lambda: logs.update(trainer.train_on_batch(*data, return_dict=True)),
        lambda: trainer.compile(keras.optimizers.SGD(1.0)),
    )
    return {k: float(v) for k, v in logs.items()}, gradients


@pytest.mark.parametrize("t, alpha", [(1.0, 1.0), (2.5, 0.7), (0.5, 0.0)])
def test_loss_and_gradients(t, alpha):
    data, of = batch(), teacher()
    of_teacher = logits_of(of, data[0])
    logs, gradients = distilled(model(), of, data, temperature=t, alpha=alpha)
    loss, kl = expected(model(), of_teacher, data, t, alpha)
    assert logs["loss"] == pytest.approx(loss, rel=1e-5) and logs["kl"] == pytest.approx(kl, rel=1e-5)
    assert_close(gradients, plain_gradients(model(), of_teacher, data, t, alpha), TOLERANCE)
    assert all(np.abs(g).max() > 1e-6 for g in gradients)
    plain = model()
    plain.compile(loss=plain_loss())
    assert logs["perplexity"] == pytest.approx(
        np.exp(plain.test_on_batch(*data, return_dict=True)["loss"] * data[2].size / data[2].sum()), rel=1e-4
    )


def test_a_teacher_equal_to_the_student_teaches_nothing():
    logs, gradients = distilled(model(), model(), batch())
    assert logs["kl"] == pytest.approx(0, abs=1e-6) and all(np.abs(g).max() < 1e-6 for g in gradients)


def test_the_teacher_stays_as_it_is():
    of = teacher(dropout=0.5)
    trainer = Distiller(model(), of)
    trainer.compile(keras.optimizers.Adam(0.01))
    before = [ops.convert_to_numpy(v.value) for v in of.backbone.variables]
    losses = trainer.fit(*batch()[:2], epochs=6, batch_size=2, shuffle=False, verbose=0).history["loss"]
    for one, variable in zip(before, of.backbone.variables):
        np.testing.assert_array_equal(one, ops.convert_to_numpy(variable.value))
    assert losses[-1] < 0.8 * losses[0]
    assert {id(v) for v in trainer.optimizer._trainable_variables} == {id(v) for v in trainer.student.trainable_variables}
    assert trainer.evaluate(*batch()[:2], verbose=0, return_dict=True)["loss"] < losses[-1]


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_teachers_of_fewer_bits(kind):
    """What counts is what such a teacher itself says."""
    of = teacher(dtype="bfloat16" if kind == "bfloat16" else "float32")
    if kind != "bfloat16":
        of.quantize(kind)
    data = batch(some=False)
    logs, _ = distilled(model(), of, data)
    # The teacher's logits are made for other numbers of rows at once: bfloat16 keeps 8 bits, int8 products round activations.
    assert logs["kl"] == pytest.approx(expected(model(), logits_of(of, data[0]), data, 1, 1)[1], rel=0.03)


def test_students_with_adapters_train_those_alone():
    student, of = model(), teacher()
    student.enable_lora(rank=2, targets="all")
    trainer = Distiller(student, of)
    trainer.compile(keras.optimizers.Adam(0.05))
    kernel = ops.convert_to_numpy(student.backbone.transformer_layers[0].attention.query.kernel.value)
    losses = trainer.fit(*batch()[:2], epochs=5, verbose=0).history["loss"]
    np.testing.assert_array_equal(kernel, ops.convert_to_numpy(student.backbone.transformer_layers[0].attention.query.kernel.value))
    assert losses[-1] < losses[0]
    student.enable_lora(rank=3)  # another adapter: the distiller follows
    trainer.fit(*batch()[:2], epochs=1, verbose=0)
    assert len(trainer.optimizer._trainable_variables) == len(student.trainable_variables)


def test_no_logits_of_the_whole_batch(monkeypatch):
    seen = []
    embedding = type(model().backbone.token_embedding)
    product = embedding.uncapped_logits

    def recorded(self, hidden):
        seen.append(tuple(hidden.shape))
        return product(self, hidden)

    monkeypatch.setattr(embedding, "uncapped_logits", recorded)
    monkeypatch.setattr(embedding, "_logits", lambda *args: pytest.fail("all logits at once"))
    trainer = Distiller(model(), teacher())
    trainer.compile()
    trainer.train_on_batch(*batch())
    trainer.test_on_batch(*batch())
    assert {shape[-1] for shape in seen} == {34, 42} and all(shape[0] <= 4 for shape in seen)


def test_keras_files(tmp_path):
    data = batch()
    trainer = Distiller(model(), teacher(), temperature=1.5, alpha=0.8)
    trainer.compile(keras.optimizers.Adam(0.01))
    trainer.train_on_batch(*data)
    trainer.save(tmp_path / "distiller.keras")
    again = keras.models.load_model(tmp_path / "distiller.keras")
    assert (again.temperature, again.alpha) == (1.5, 0.8) and again.teacher.backbone.config.hidden_dim == 34
    trainer.reset_metrics()
    for _ in range(2):  # the second step uses the optimizer's values
        np.testing.assert_allclose(again.train_on_batch(*data), trainer.train_on_batch(*data), rtol=1e-5)


# Records -----------------------------------------------------------------------------------------------------------------------


def recorded(folder, data, of=None, **kwargs):
    x, y, weights = data
    batches = [({k: v[:2] for k, v in x.items()}, y[:2], weights[:2]), ({k: v[2:] for k, v in x.items()}, y[2:], weights[2:])]
    return record_teacher(of or teacher(), iter(batches), folder, **{"top_k": 5, "rows_a_shard": 2, "verbose": False, **kwargs})


@pytest.mark.parametrize("top_k", [5, V])
def test_records_teach_what_the_teacher_would(tmp_path, top_k):
    data, of = batch(), teacher()
    records = recorded(tmp_path / "records", data, of, top_k=top_k)
    assert (len(records), records.top_k, records.length) == (ROWS, top_k, LENGTH)
    _, y, weights = records.read(range(ROWS))
    np.testing.assert_array_equal(y, np.where(data[2] != 0, data[1], 0))  # labels that do not count may be anything
    np.testing.assert_array_equal(weights, data[2])
    loss, kl = expected(model(), logits_of(of, data[0]), data, 1, 1, keep=None if top_k == V else top_k)
    student = model()
    trainer = Distiller(student, str(tmp_path / "records"))
    trainer.compile(keras.optimizers.SGD(1.0))
    before = [ops.convert_to_numpy(v.value) for v in student.trainable_variables]
    logs = trainer.fit(batch_size=ROWS, verbose=0).history
    # Probabilities are stored with 11 bits.
    assert logs["loss"][0] == pytest.approx(loss, rel=2e-3) and logs["kl"][0] == pytest.approx(kl, rel=2e-3)
    if top_k == V:
        found = [a - ops.convert_to_numpy(v.value) for a, v in zip(before, student.trainable_variables)]
        assert_close(found, plain_gradients(model(), logits_of(of, data[0]), data, 1, 1), 5e-3)


def test_the_gradient_of_records_is_that_of_their_loss():
    """By differences of the loss, in float64 as far as the backend's float32 goes."""
    from keras_gemma2.training.distillation_terms import DistillationTerms

    draw = np.random.default_rng(5)
    logits = draw.normal(0, 3, (4, 11)).astype("float32")
    ids = np.argsort(draw.uniform(size=(4, 11)), axis=-1)[:, :3].astype("int32")
    probabilities = np.array([[0.5, 0.2, 0.1], [0.9, 0.1, 0.0], [0.0, 0.0, 0.3], [0.3, 0.3, 0.3]], "float32")
    labels, weights = np.array([1, 2, 3, 4], "int32"), np.array([1, 2, 0, 0.5], "float32")
    terms = DistillationTerms(cap=4.0, temperature=1.7, alpha=0.6)
    targets = [ops.convert_to_tensor(a) for a in (labels, ids, probabilities)]

    def loss(values):
        return float(terms(ops.convert_to_tensor(values), targets, ops.convert_to_tensor(weights), False)[0][0])

    gradient = ops.convert_to_numpy(terms(ops.convert_to_tensor(logits), targets, ops.convert_to_tensor(weights), True)[1])
    assert (gradient[2] == 0).all()
    for place in [(0, ids[0, 0]), (0, 1), (1, ids[1, 2]), (1, 2), (3, ids[3, 1]), (3, 4), (2, 5)]:
        step = np.zeros_like(logits)
        step[place] = 0.05
        # Central differences: the error of 0.05^2 / 6 times third derivatives of order 1, and float32's over 0.1.
        assert (loss(logits + step) - loss(logits - step)) / 0.1 == pytest.approx(gradient[place], abs=2e-3)


def test_recording_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    data, of = batch(), teacher()
    whole = recorded(tmp_path / "whole", data, of)
    write, written = recording._write_shard, []

    def killed(path, arrays):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, arrays)

    monkeypatch.setattr(recording, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path / "records", data, of)
    with pytest.raises(keras_gemma2.CheckpointError, match="not finished.*goes on"):
        Distiller(model(), tmp_path / "records")
    monkeypatch.setattr(recording, "_write_shard", lambda path, arrays: (written.append(path), write(path, arrays)))
    found = recorded(tmp_path / "records", data, of)
    assert [os.path.basename(path) for path in written] == ["records-00000.safetensors", "records-00001.safetensors"]
    for one, other in zip(keras.tree.flatten(whole.read([2, 0])), keras.tree.flatten(found.read([2, 0]))):
        np.testing.assert_array_equal(one, other)


def test_records_of_texts_and_their_order(tmp_path):
    lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
    lm.preprocessor.sequence_length = 16
    texts = ["The state of the union is strong.", "Call me Ishmael.", "A whale!"]
    records = record_teacher(
        lm, {"prompts": texts, "responses": ["Peace.", "Yes.", "Where?"]}, tmp_path / "r", top_k=3, verbose=False
    )
    keras.utils.set_random_seed(1)
    epochs = records.batches(2)
    first = [epochs[i][0]["token_ids"] for i in range(2)]
    epochs.on_epoch_end()
    assert sum(map(len, first)) == 3 and not np.array_equal(epochs._order, np.arange(3))
    x, _, weights = records.read([0])
    answered = weights[0] != 0
    assert answered.sum() == len(lm.preprocessor.tokenizer("Peace.")) + 1  # and <eos>
    logits = logits_of(lm, {k: x[k] for k in ("token_ids", "padding_mask")})[0][answered]
    np.testing.assert_array_equal(x["teacher_ids"][0][answered], np.argsort(-logits, axis=-1)[:, :3])
    top = np.take_along_axis(np.exp(log_softmax(logits)), np.argsort(-logits, axis=-1)[:, :3], -1)
    np.testing.assert_allclose(x["teacher_probabilities"][0][answered], top, rtol=1e-3)  # float16


def test_records_are_refused(tmp_path):
    data, of, folder = batch(), teacher(), tmp_path / "records"
    recorded(folder, data, of)
    with pytest.raises(ValueError, match="top_k=5, and this call has 6"):
        recorded(folder, data, of, top_k=6)
    with pytest.raises(ValueError, match="teacher="):
        recorded(folder, data, model())
    x, y, weights = data
    with pytest.raises(ValueError, match=r"00000.safetensors was recorded of other data: its labels differ"):
        recorded(folder, (x, (y + 1) % V, weights), of)
    with pytest.raises(ValueError, match="`temperature` must be that of the records.*1.0. Received: 2"):
        Distiller(model(), folder, temperature=2)
    with pytest.raises(ValueError, match=r"one vocabulary. Received: 97 pieces.* 60 of the student"):
        Distiller(model(vocabulary_size=60), folder)
    trainer = Distiller(model(), folder)
    trainer.compile()
    with pytest.raises(ValueError, match="student.evaluate"):
        trainer.evaluate(data[0], verbose=0)
    trainer.fit(validation_data=folder, verbose=0)
    path = folder / "records-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(keras_gemma2.CheckpointError, match="00001.safetensors cannot be read.*Delete it"):
        Distiller(model(), folder)
    path.unlink()
    assert len(recorded(folder, data, of)) == ROWS  # makes up for it
    settings = json.loads((folder / "records.json").read_text())
    (folder / "records.json").write_text(json.dumps({**settings, "length": "seven"}))
    with pytest.raises(keras_gemma2.CheckpointError, match="another version"):
        Distiller(model(), folder)
    with pytest.raises(keras_gemma2.CheckpointError, match="holds no teacher's records"):
        Distiller(model(), tmp_path)
    with pytest.raises(ValueError, match="`top_k` must be at most the vocabulary, 97"):
        recorded(tmp_path / "new", data, of, top_k=98)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    data, of = batch(), teacher()
    monkeypatch.setattr(recording, "save_file", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(keras_gemma2.CheckpointError, match="No space left.*What was recorded before stays"):
        recorded(tmp_path / "records", data, of)
    assert sorted(os.listdir(tmp_path / "records")) == ["records.json"]


def test_teachers_that_are_refused():
    student = model()
    with pytest.raises(ValueError, match="another model than `student`"):
        Distiller(student, student)
    with pytest.raises(ValueError, match="60 pieces of the teacher, 97 of the student"):
        Distiller(student, model(vocabulary_size=60))
    with pytest.raises(TypeError, match="`teacher` must be a Gemma2CausalLM, or the folder"):
        Distiller(student, 3)
    with pytest.raises(TypeError, match="`student` must be a Gemma2CausalLM"):
        Distiller(student.backbone, model(4))
    for name, value in [("temperature", 0), ("temperature", "hot"), ("alpha", 1.5), ("alpha", None)]:
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            Distiller(student, model(4), **{name: value})
    with pytest.raises(ValueError, match="`loss` does not go with a Distiller"):
        Distiller(student, model(4)).compile(loss="mse")
    assert distiller.Distiller is keras_gemma2.Distiller
