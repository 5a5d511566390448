"""One of two processes with 4 virtual devices each, which hold one model between them; see test_distribution.py."""

import json
import os
import resource
import sys
from pathlib import Path

import keras
import numpy as np
import spread

from keras_gemma2 import Gemma2CausalLM, RunCheckpoint, restore_checkpoint
from keras_gemma2.distribution import join_processes, make_distribution, shard_of

port, index, batch, model, folder = sys.argv[1:]
names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
os.environ |= dict(zip((f"KERAS_DISTRIBUTION_{name}" for name in names), (f"localhost:{port}", "2", index)))
join_processes(timeout=20)


def bytes_read():
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def greedy(lm):
    return np.asarray(lm.generate(spread.prompts(), max_length=30, stop_token_ids=None)["token_ids"]).tolist()


def message(function):
    try:
        function()
    except Exception as error:  # what it was is for the test to say
        return f"{type(error).__name__}: {error}"
    return None


def no_room_for_the_second(lm, data):
    saves, unlimited = RunCheckpoint(f"{folder}/full"), resource.getrlimit(resource.RLIMIT_FSIZE)
    if index == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))  # bytes of a file
    try:
        lm.fit(**data, batch_size=len(data["y"]), verbose=0, callbacks=[saves])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def faults():
    """What one process does wrong: it lacks a file, or builds another model."""
    cases = {
        "file": lambda: Gemma2CausalLM.from_preset(f"{folder}/of_{index}", preprocessor=None),
        "config": lambda: spread.made(4 if index == "0" else 8),
    }
    with make_distribution("fully_sharded_tensor_parallel", batch=int(batch), model=int(model)).scope():
        return {name: message(case) for name, case in cases.items()}


if "SPREAD_FAULTS" in os.environ:
    print(json.dumps(faults()))
    sys.exit()

with make_distribution("fully_sharded_tensor_parallel", batch=int(batch), model=int(model)).scope():
    # What is imported on the way is read once. Nothing has set a seed here: what is drawn must be the same all the same.
    Gemma2CausalLM.from_preset(f"{folder}/int8", preprocessor=None)
    Gemma2CausalLM.from_preset(f"{folder}/start", preprocessor=None).enable_lora(2)
    found = {}
    for name in ("int8", "start"):
        before = bytes_read()
        lm = Gemma2CausalLM.from_preset(f"{folder}/{name}", preprocessor=None)
        found |= {f"{name} read": bytes_read() - before, f"{name} greedy": greedy(lm)}
    x, labels, weights = spread.data()
    data = shard_of({"x": x, "y": labels, "sample_weight": weights})
    lm.compile(optimizer=keras.optimizers.Adam(1e-3))
    saves = RunCheckpoint(f"{folder}/run", max_to_keep=None)
    arguments = {"batch_size": len(data["y"]), "shuffle": False, "verbose": 0}
    found["losses"] = lm.fit(**data, epochs=3, callbacks=[saves], **arguments).history["loss"]
    found["no room"] = message(lambda: no_room_for_the_second(lm, data))
    fresh = spread.made(4)
    fresh.compile(optimizer=keras.optimizers.Adam(1e-3))  # its variables are yet to be made
    found["no run"] = message(lambda: restore_checkpoint(fresh, f"{folder}/run" if index == "0" else f"{folder}/none"))
    found["other steps"] = message(lambda: restore_checkpoint(lm, f"{folder}/run", int(index)))
    restore_checkpoint(lm, f"{folder}/run", 1)
    found["losses again"] = lm.fit(**data, initial_epoch=2, epochs=3, **arguments).history["loss"]
    lm.save_to_preset(f"{folder}/saved")
    lm.export_to_transformers(f"{folder}/exported")
    if index == "0":  # the first process alone has no room
        os.environ["TMPDIR"] = folder
        Path(folder, "no_folder").write_text("a file")
    found["refused"] = message(lambda: lm.save_to_preset(f"{folder}/no_folder"))
    found["again"] = greedy(lm)
    found["no adapter"] = message(lambda: lm.load_adapter(f"{folder}/{'none' if index == '1' else 'adapter'}"))
    lm.load_adapter(f"{folder}/adapter")
    found["adapted"] = greedy(lm)
print(json.dumps(found))
