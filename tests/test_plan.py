"""Plans against arithmetic by hand, against programs written by hand, and against models that are there, on JAX."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keras_gemma2.cli import main
from keras_gemma2.config import NAMED_SIZES
from keras_gemma2.planning.chips import CHIPS, chips
from keras_gemma2.planning.program import Collective, group_of, read_program
from keras_gemma2.planning.roofline import bandwidth, estimate, sent_bytes
from keras_gemma2.planning.settings import PlanSettings, config_of, mesh_of

# A loop that runs 5 times around a sum over 4 devices, a product of [8, 16] and [16, 32], and a gather that XLA cannot count.
PROGRAM = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %x = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %all = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, metadata={op_name="decoder_block_0"}
  ROOT %out = (s32[], f32[8,16]) tuple(%i, %all)
}

%unknown (state: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %gathered = bf16[8]{0} all-gather(%y), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %out2 = (s32[], bf16[4]) tuple(%i, %y)
}

%condition (state: (s32[], f32[8,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,16], w: f32[16,32]) -> f32[8,32] {
  %p = f32[8,16]{1,0} parameter(0)
  %w = f32[16,32]{1,0} parameter(1)
  %known = (s32[], f32[8,16]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %other = (s32[], bf16[4]) while(%t2), condition=%condition, body=%unknown, metadata={op_name="decoder_block_3/while"}
  ROOT %out3 = f32[8,32]{1,0} dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def planned(question):
    """What a plan says and, where it is small enough to be built, what is there; in a process with 8 virtual devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "KERAS_BACKEND": "jax"}
    command = [sys.executable, str(Path(__file__).with_name("planned.py")), json.dumps(question)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_programs_are_read():
    asked = []

    def trips(line):
        asked.append(line.op_name)
        return 3

    found = read_program(PROGRAM, trips)
    assert found.flops == 2 * 8 * 16 * 32
    assert set(asked) == {"decoder_block_3/while"} and found.unknown_loops == 1
    summed, gathered = sorted(found.collectives, key=lambda collective: collective.kind, reverse=True)
    assert (summed.kind, summed.times, summed.bytes, summed.group) == ("all-reduce", 5, 8 * 16 * 4, (0, 1, 2, 3))
    assert (gathered.kind, gathered.times, gathered.bytes, gathered.group) == ("all-gather", 3, 16, (0, 1))
    assert summed.is_counted and not gathered.is_counted
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("nothing", trips)


def test_groups_are_read():
    assert group_of("replica_groups=[2,4]<=[8], x") == (0, 1, 2, 3)
    assert group_of("replica_groups=[2,4]<=[4,2]T(1,0), x") == (0, 2, 4, 6)
    assert group_of("source_target_pairs={{0,0},{1,2}}") == (1, 2)
    assert group_of("nothing") == ()


def test_the_roofline():
    assert sent_bytes("all-reduce", 800, 4) == 2 * 800 * 3 / 4
    assert sent_bytes("all-gather", 800, 4) == 800 * 3 / 4
    assert sent_bytes("reduce-scatter", 200, 4) == 200 * 3
    chip = CHIPS["h100"]
    assert bandwidth(chip, (0, 1)) == chip.link and bandwidth(chip, (0, 8)) == chip.network
    assert bandwidth(CHIPS["v5p"], (0, 8)) == CHIPS["v5p"].link
    one = Collective("all-reduce", [("f32", (1000,))], (0, 1), "", 3, True)
    found = estimate(chip, 2 * chip.flops, chip.bandwidth, [(one, 4000.0)])
    assert (found.compute, found.memory, found.limit) == (2, 1, "compute")
    assert found.interconnect == pytest.approx(3 * 4000 / chip.link)


@pytest.mark.parametrize(("settings", "message"), [
    ({"mesh": (1, 64)}, "query_heads"),
    ({"batch": 0}, "argument --batch: must be an integer of at least 1"),
    ({"task": "train"}, "argument --task: must be one of"),
    ({"recipe": "tensor"}, "argument --recipe: must be one of"),
    ({"mesh": (2, 1), "task": "lora", "batch": 3}, "must be a multiple of 2"),
    ({"mesh": (32, 16)}, "at most 256 devices"),
    ({"length": 10_000}, "at most 8192 tokens"),
    ({"task": "full", "quantize": "int8"}, "are not trained"),
])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PlanSettings(**{"config": NAMED_SIZES["gemma2_27b"], "mesh": (1, 8), **settings})


def test_bad_names_are_refused(capsys):
    wrong = (("heads=2", "axes are batch and model"), ("batch=2,batch=2", "twice"), ("model=x", "integer of at least 1"))
    for text, message in wrong:
        with pytest.raises(ValueError, match=message):
            mesh_of(text)
    with pytest.raises(ValueError, match="argument --size: must be one of 2b, 9b, 27b"):
        config_of("7b")
    with pytest.raises(ValueError, match="argument --chips"):
        chips("v6e")
    assert main(["plan", "--size", "7b", "--mesh", "model=8"]) == 2
    assert "argument --size" in capsys.readouterr().err


def test_the_memory_of_a_published_size():
    """By hand: 2B in bfloat16 on 8 devices, 4 key heads whole on each; 4 rows of 1,000 tokens."""
    found = planned({"size": "gemma2_2b", "mesh": [1, 8], "task": "generate", "batch": 4, "length": 1000})
    config = NAMED_SIZES["gemma2_2b"]
    split = whole = 0
    for path, shape in config.weight_shapes().items():
        is_whole = len(shape) == 1 or "/key/" in path or "/value/" in path
        whole, split = whole + is_whole * math.prod(shape), split + (not is_whole) * math.prod(shape)
    assert found["weights"] == 2 * (split // 8 + whole)
    # Layers, keys and values, rows, heads, slots (1,024 and one), width, bytes.
    assert found["caches"] == 26 * 2 * 4 * 4 * 1025 * 256 * 2
    # A token of each row: two for each weight and row, all matrices but the table's lookup; and attention over the blocks of the
    # caches. Keys and values are made by all.
    products = 2 * 4 * (split / 8 + whole)
    assert found["flops"] == pytest.approx(products, rel=0.1)
    assert found["sums"] == 2 * 26 + 1
    assert 0 < found["seconds"] < 300


@pytest.mark.parametrize("task", ["generate", "full", "lora"])
def test_a_plan_is_what_a_run_takes(task):
    """On 8 virtual devices in float32: weights, optimizer and caches to the byte, all of a device to 15%."""
    found = planned({"real": True, "mesh": [2, 4], "task": task, "batch": 8, "length": 64})
    for name in ("weights", "optimizer", "caches"):
        assert found["plan"][name] == found["real"][name], name
    assert found["plan"]["total"] == pytest.approx(found["real"]["total"], rel=0.15)
