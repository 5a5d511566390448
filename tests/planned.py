"""Run in a process with 8 virtual devices: a plan, and what a model of its size holds on a device; see test_plan.py."""

import json
import sys

import jax
import keras
import numpy as np
from keras import ops

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM
from keras_gemma2.config import NAMED_SIZES, Gemma2Config
from keras_gemma2.distribution import make_distribution
from keras_gemma2.planning.plan import make_plan
from keras_gemma2.planning.settings import PlanSettings

# 2B's proportions: F = 4 D, twice as many query heads as key heads.
SMALL = Gemma2Config(4096, 4, 8, 4, 288, 1152, 32, sliding_window_size=32, max_sequence_length=128)


def first(values):
    """Bytes on the first device."""
    return sum(value.addressable_shards[0].data.nbytes for value in values)


def taken(program):
    """Bytes on a device beside the arguments."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def generation(lm, batch, length):
    runner = lm.make_generate_function()
    caches = runner.new_caches(batch, length)
    token_ids, each = ops.zeros((batch, length), "int32"), ops.zeros((batch,), "int32")
    hidden = ops.zeros((batch, SMALL.hidden_dim), "float32")
    program = runner._extend[True].lower((caches, hidden), token_ids, each, each, each, each).compile()
    return first(value for pair in caches for value in pair), taken(program)


def training(lm, batch, length):
    lm.compile(optimizer="adam")
    x = {name: np.ones((batch, length), "int32") for name in ("token_ids", "padding_mask")}
    lm.train_on_batch(x, np.ones((batch, length), "int32"), np.ones((batch, length), "float32"))
    parts = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
    state = lm._get_jax_state(**dict.fromkeys(parts, True))
    data = x, np.ones((batch, length), "int32"), np.ones((batch, length), "float32")
    sharding = keras.distribution.distribution().get_data_layout((batch, length)).backend_layout
    program = lm._compiled_on_devices().lower(state, jax.tree.map(lambda array: jax.device_put(array, sharding), data)).compile()
    return first(variable.value for variable in lm.optimizer.variables), taken(program)


def real(task, mesh, batch, length):
    with make_distribution(batch=mesh[0], model=mesh[1]).scope():
        lm = Gemma2CausalLM(Gemma2Backbone(**SMALL.to_dict(), dtype="float32"), None)
        if task == "lora":
            lm.enable_lora(8, targets="attention")
        optimizer, caches, more = 0, 0, 0
        if task == "generate":
            caches, more = generation(lm, batch, length)
        else:
            optimizer, more = training(lm, batch, length)
        weights = first(variable.value for variable in lm.backbone.weights)
    return {"weights": weights, "optimizer": optimizer, "caches": caches, "total": weights + optimizer + caches + more}


def answer(question):
    task, mesh, batch, length = (question[name] for name in ("task", "mesh", "batch", "length"))
    is_small = question.get("real", False)
    config, dtype = (SMALL, "float32") if is_small else (NAMED_SIZES[question["size"]], "bfloat16")
    plan = make_plan(PlanSettings(config, tuple(mesh), task, batch, length, dtype=dtype))
    found = {name: getattr(plan, name) for name in ("weights", "optimizer", "caches", "total")}
    if is_small:
        return {"plan": found, "real": real(task, mesh, batch, length)}
    step = plan.steps[0]
    sums = sum(c.times for c in step.contents.collectives if c.kind == "all-reduce" and c.bytes > 1000)
    return {**found, "flops": step.contents.flops, "sums": sums, "seconds": step.compiled.seconds}


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    print(json.dumps(answer(json.loads(sys.argv[1]))))
