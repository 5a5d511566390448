"""Run in a process with 8 virtual devices: what a model gives on one device and on meshes, as JSON. See test_distribution.py."""

import collections
import json
import re
import sys
import tempfile

import keras
import numpy as np
from keras import ops

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, restore_checkpoint
from keras_gemma2.distribution import make_distribution

MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
# 2B's proportions on a small scale: N = 8, F = 4 D; no accidental identities otherwise.
SIZES = {
    "vocabulary_size": 256,
    "num_layers": 2,
    "num_query_heads": 8,
    "hidden_dim": 64,
    "intermediate_dim": 288,
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "sliding_window_size": 5,
    "attention_logit_soft_cap": 5.0,
    "final_logit_soft_cap": 3.0,
    "max_sequence_length": 64,
}
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf"= \(?(\w+)\[([\d,]*)\].* ({COLLECTIVES})(?:-start)?\(")


def data():
    rng = np.random.default_rng(0)
    token_ids, labels = (rng.integers(3, 250, (8, 12)).astype("int32") for _ in range(2))
    mask = np.ones_like(token_ids)
    mask[1, 7:], mask[5, :4] = 0, 0
    weights = (rng.random((8, 12)) > 0.3).astype("float32")
    return {"token_ids": token_ids, "padding_mask": mask}, labels, weights


def ordered():
    """The data as two processes have it between them, each every second row."""
    x, labels, weights = data()
    order = [*range(0, 8, 2), *range(1, 8, 2)]
    return {name: array[order] for name, array in x.items()}, labels[order], weights[order]


def prompts():
    token_ids = data()[0]["token_ids"][:4]
    counts = np.array([12, 7, 3, 12])
    return {"token_ids": token_ids, "padding_mask": (np.arange(12) < counts[:, None]).astype("int32")}


def made(heads, dtype="float32", **sizes):
    keras.utils.set_random_seed(3)
    return Gemma2CausalLM(Gemma2Backbone(**SIZES, num_key_value_heads=heads, dtype=dtype, **sizes), None)


def everything(lm, adapter=False, trains=True):
    """Logits, greedy texts, scores, and what three steps of training make of the weights."""
    x, labels, weights = data()
    if adapter:
        lm.enable_lora(4)
    before = [np.array(variable.value) for variable in lm.trainable_variables]
    found = {
        "logits": np.asarray(lm(x)),
        "greedy": np.asarray(lm.generate(prompts(), max_length=30, stop_token_ids=None)["token_ids"]),
        "scores": np.concatenate(lm.score(prompts())),
    }
    if not trains:
        return found
    lm.compile(optimizer=keras.optimizers.SGD(1.0))
    lm.train_on_batch(x, labels, weights)
    after = [np.asarray(variable.value) for variable in lm.trainable_variables]
    found["gradients"] = np.concatenate([(a - b).ravel() for a, b in zip(after, before)])
    lm.compile(optimizer=keras.optimizers.Adam(1e-3))
    found["losses"] = [lm.train_on_batch(x, labels, weights)[0] for _ in range(3)]
    found["trained"] = np.concatenate([np.asarray(variable.value).ravel() for variable in lm.trainable_variables])
    found["evaluated"] = lm.evaluate(x, labels, sample_weight=weights, verbose=0)[0]
    found["predicted"] = lm.predict(x, verbose=0)
    return found


def differences(found, expected):
    def largest(value, other):
        return float(np.abs(np.asarray(value, "float64") - np.asarray(other, "float64")).max())

    return {name: largest(value, expected[name]) for name, value in found.items()}


def equality(heads, dtype="float32", recipe="tensor_parallel", meshes=MESHES, adapter=False, trains=True):
    expected, results = everything(made(heads, dtype), adapter, trains), {}
    for batch, model in meshes:
        with make_distribution(recipe, batch=batch, model=model).scope():
            results[f"{batch}x{model}"] = differences(everything(made(heads, dtype), adapter, trains), expected)
    return results


def bytes_of(variables):
    """All bytes of some variables, and those on the first device."""
    values = [variable.value for variable in variables]
    return sum(value.nbytes for value in values), sum(value.addressable_shards[0].data.nbytes for value in values)


def decode_step(heads, batch, model, dtype="float32"):
    """The collectives of the compiled decode step, by kind and shape, and bytes of weights, of an optimizer and of caches."""
    with make_distribution(batch=batch, model=model).scope():
        lm = made(heads, dtype)
        runner = lm.make_generate_function()
        caches = runner.new_caches(8, 60)
        tokens, positions = (ops.convert_to_tensor(np.full(8, number, "int32")) for number in (3, 9))
        compiled = runner._step.lower(caches, tokens, positions).compile()
        counts = collections.Counter(f"{m[3]} {m[1]}[{m[2]}]" for m in map(COLLECTIVE.search, compiled.as_text().splitlines()) if m)
        lm.compile(optimizer=keras.optimizers.Adam(1e-3))
        lm.optimizer.build(lm.trainable_variables)
        held = [value for pair in caches for value in pair]
        return {
            "collectives": counts,
            "weights": bytes_of(lm.weights),
            "optimizer": bytes_of([v for v in lm.optimizer.variables if v.ndim == 2]),
            "caches": [sum(c.nbytes for c in held), sum(c.addressable_shards[0].data.nbytes for c in held)],
            "arguments": compiled.memory_analysis().argument_size_in_bytes,
        }


def saved(heads):
    """A preset saved on one mesh and read on another: logits of both, and of the same preset on one device."""
    x = data()[0]
    with tempfile.TemporaryDirectory() as folder:
        with make_distribution("fully_sharded_tensor_parallel", batch=2, model=4).scope():
            lm = made(heads)
            lm.save_to_preset(f"{folder}/ours")
            lm.export_to_transformers(f"{folder}/theirs")
            expected = np.asarray(lm(x))
        results = {}
        for name in ("ours", "theirs"):
            for mesh in ((1, 8), (8, 1), None):
                scope = make_distribution("fully_sharded_tensor_parallel", batch=mesh[0], model=mesh[1]).scope() if mesh else None
                if scope:
                    scope.__enter__()
                again = Gemma2CausalLM.from_preset(f"{folder}/{name}", preprocessor=None)
                results[f"{name} {mesh}"] = float(np.abs(np.asarray(again(x)) - expected).max())
                kernel = again.backbone.transformer_layers[0].feed_forward.down.kernel.value
                results[f"{name} {mesh} part"] = kernel.addressable_shards[0].data.size / kernel.size
                if scope:
                    scope.__exit__(None, None, None)
        return results


def resumed(heads, folder, meshes):
    """The loss of the third epoch, after the first two of a run that several processes made on another mesh."""
    x, labels, weights = ordered()
    losses = []
    for batch, model in meshes:
        with make_distribution("fully_sharded_tensor_parallel", batch=batch, model=model).scope():
            lm = made(heads)
            lm.compile(optimizer=keras.optimizers.Adam(1e-3))
            done = restore_checkpoint(lm, folder, 1) + 1
            arguments = {"sample_weight": weights, "batch_size": 8, "shuffle": False, "verbose": 0}
            losses.append(lm.fit(x, labels, initial_epoch=done, epochs=3, **arguments).history["loss"])
    return losses


def errors():
    """What is refused, by what was asked for."""
    cases = {
        "heads": lambda: built(batch=1, model=8, num_query_heads=12, num_key_value_heads=4),
        "hidden": lambda: built("fully_sharded", batch=8, hidden_dim=60),
        "too many": lambda: make_distribution(batch=4, model=4),
        "rows": lambda: trained(rows=7, batch_size=4),
        "validation": lambda: trained(rows=8, batch_size=4, validation_data=data()[0], validation_batch_size=3),
        "stream": lambda: trained(rows=None, x=({name: array[:6] for name, array in data()[0].items()} for _ in range(2))),
    }
    found = {}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            found[name] = str(error)
    return found


def trained(rows, x=None, **arguments):
    with make_distribution(batch=4, model=2).scope():
        lm = made(4)
        lm.compile()
        lm.fit(x or {name: array[:rows] for name, array in data()[0].items()}, verbose=0, **arguments)


def built(recipe="tensor_parallel", batch=None, model=None, **sizes):
    with make_distribution(recipe, batch=batch, model=model).scope():
        return Gemma2Backbone(**{**SIZES, "num_key_value_heads": 4, **sizes})


if __name__ == "__main__":
    print(json.dumps([globals()[name](*arguments) for name, *arguments in json.loads(sys.argv[1])]))
