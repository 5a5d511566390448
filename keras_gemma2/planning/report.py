"""A plan as a text."""

from __future__ import annotations

import collections
from typing import Any

from keras_gemma2.planning.chips import Chip
from keras_gemma2.planning.plan import Plan
from keras_gemma2.planning.settings import MOST_DEVICES
from keras_gemma2.training.memory import format_bytes

_ROW, _COLUMN, _TIME = 26, 12, 14


def report(plan: Plan, chips: list[Chip]) -> str:
    """A plan's memory, programs, and times and meshes on some chips."""
    parts = [_title(plan), _memory(plan), *[_step(plan, step) for step in plan.steps]]
    return "\n\n".join([*parts, *[_times(plan, step, chips) for step in plan.steps], _meshes(plan, chips), _notes(plan, chips)])


def _title(plan: Plan) -> str:
    settings = plan.settings
    what = [f"{settings.batch} x {settings.length} tokens", settings.dtype]
    what += [f"weights in {settings.quantize}"] if settings.quantize else []
    what += [f"LoRA of rank {settings.lora_rank} ({settings.targets})"] if settings.task == "lora" else []
    what += ["gradient checkpointing"] if settings.gradient_checkpointing else []
    head = f"{settings.name}, {settings.task}: {', '.join(what)}"
    return f"{head}\n{settings.recipe}, batch={settings.mesh[0]} x model={settings.mesh[1]}, {settings.devices} devices"


def _memory(plan: Plan) -> str:
    rows = [("weights", plan.weights, ""), ("optimizer", plan.optimizer, ""), ("caches", plan.caches, "")]
    note = "at most: compiled for CPUs, which widen 16-bit products" if plan.is_half else "as compiled"
    rows.append(("activations and the like", plan.temporary, note))
    if plan.loss is not None:
        rows.append(("  of these the loss", plan.loss, "compiled by itself; not at the same time as all the rest"))
    rows.append(("in all", plan.total, ""))
    lines = [f"  {name:<{_ROW}}{format_bytes(size):>{_COLUMN}}{'   ' + note if note else ''}" for name, size, note in rows]
    return "\n".join(["memory of a device", *lines])


def _step(plan: Plan, step: Any) -> str:
    groups: dict[tuple, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    counted = {True: "", False: "  (loops counted by the plan)"}
    for collective, size in plan.sizes(step):
        found = groups[collective.kind, len(collective.group), collective.is_counted]
        found[0], found[1] = found[0] + collective.times, found[1] + collective.times * size
        found[2] = max(found[2], size)
    lines = [
        f"  {kind + ' of ' + str(group):<{_ROW}}{times:>{_COLUMN},.0f}{format_bytes(size):>{_COLUMN}} in all, "
        f"{format_bytes(largest)} the largest{counted[known]}"
        for (kind, group, known), (times, size, largest) in sorted(groups.items(), key=lambda item: -item[1][1])
    ]
    head = f"{step.name}: {step.contents.flops / 1e12:,.3f} TFLOPs a device, compiled in {step.compiled.seconds:.0f} s"
    return "\n".join([head, *(lines or ["  no collectives"])])


def _times(plan: Plan, step: Any, chips: list[Chip]) -> str:
    heads = ("compute", "memory", "between", "at least", "in turn")
    lines = [f"  {'':<15}{''.join(f'{head:>{_TIME}}' for head in heads)}{'tokens/s':>11}   limit"]
    for chip in chips:
        found = plan.estimate(step, chip)
        fits = plan.total <= chip.memory
        limit = found.limit if fits else f"does not fit ({format_bytes(chip.memory)})"
        times = (found.compute, found.memory, found.interconnect, found.at_least, found.in_turn)
        cells = "".join(f"{_milliseconds(seconds):>{_TIME}}" for seconds in times)
        lines.append(f"  {chip.name:<15}{cells}{step.tokens / found.in_turn:>11,.0f}   {limit}")
    return "\n".join([f"{step.name}, time by the chips' peak rates", *lines])


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def _meshes(plan: Plan, chips: list[Chip]) -> str:
    lines = []
    for chip in chips:
        mesh = plan.smallest_mesh(chip)
        text = f"none of up to {MOST_DEVICES} devices"
        if mesh is not None:
            text = f"batch={mesh[0]},model={mesh[1]}   {format_bytes(plan.total_on(mesh))}"
        lines.append(f"  {chip.name:<15}{text}")
    return "\n".join([f"smallest mesh that fits, {plan.settings.recipe} (activations scaled from this mesh)", *lines])


def _notes(plan: Plan, chips: list[Chip]) -> str:
    notes = ["Times leave out what each collective and kernel takes to start. tokens/s: of all devices, nothing overlapping."]
    if plan.is_half:
        notes.append("Sums over devices of what is in 16 bits are counted in 16 bits, as accelerators send them.")
    else:
        notes.append("Peak rates are of bfloat16; float32 is slower.")
    return "\n".join([*notes, *(f"{chip.name}: {chip.source}" for chip in chips)])
