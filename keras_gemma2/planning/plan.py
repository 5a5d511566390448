"""A plan: what a step of a model would hold, compute and send on a mesh, and on which chips that fits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from keras_gemma2.lora import LoraSettings
from keras_gemma2.planning.chips import Chip
from keras_gemma2.planning.held import caches_bytes, other_meshes, variables_bytes
from keras_gemma2.planning.program import Collective
from keras_gemma2.planning.roofline import Estimate, estimate
from keras_gemma2.planning.settings import PlanSettings

_HALVES = ("bfloat16", "float16")
_OF_MODEL = ("decoder_block_", "token_embedding/jit(_take)")  # whose sums are of the compute dtype


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found; `str` prints it.

    Args:
        settings: what was planned.
        models: of each model (the teacher is the second) its config, its variables and the mode that it is quantized in.
        weights, optimizer, caches: bytes on one device.
        trained: of the weights.
        slots: variables that the optimizer has of each weight that is trained.
        loss: bytes that the loss alone holds; None where it was not asked for.
        compute_dtype: of the model.
        steps: compiled (`planning.steps.Step`).
    """

    settings: PlanSettings
    models: list[tuple[Any, list[Any], str | None]]
    weights: int
    optimizer: int
    caches: int
    trained: int
    slots: float
    loss: int | None
    compute_dtype: str
    steps: list[Any]

    @property
    def temporary(self) -> int:
        """Bytes that the step that holds most holds beside what stays: activations, gradients, the loss, results."""
        return max(step.compiled.temporary + step.compiled.outputs - step.compiled.reused for step in self.steps)

    @property
    def total(self) -> int:
        """Bytes on one device at the peak."""
        return self.weights + self.optimizer + self.caches + self.temporary

    @property
    def is_half(self) -> bool:
        """Whether the model computes in 16 bits, which CPUs widen."""
        return self.compute_dtype in _HALVES

    def sizes(self, step: Any) -> list[tuple[Collective, float]]:
        """The collectives of a step with their bytes on an accelerator, where the sums of layers are in the compute dtype.

        The CPU's compiler sums in float32 what is in 16 bits.
        """
        found = []
        for collective in step.contents.collectives:
            is_widened = self.is_half and any(name in collective.op_name for name in _OF_MODEL) and collective.kind == "all-reduce"
            found.append((collective, collective.bytes / 2 if is_widened else collective.bytes))
        return found

    def moved(self, step: Any) -> float:
        """Bytes of memory that a step reads and writes at least.

        Weights are read once in a forward pass, and once more for each pass of training; what is trained and the optimizer's
        variables are read and written; what is held for a while is written and read.
        """
        if self.settings.task == "generate":
            return self.weights + self.caches + 2 * step.compiled.temporary
        passes = 3 if self.settings.gradient_checkpointing else 2
        return passes * self.weights + 2 * (self.optimizer + self.trained) + 2 * step.compiled.temporary

    def estimate(self, step: Any, chip: Chip) -> Estimate:
        """The roofline of a step on a chip."""
        return estimate(chip, step.contents.flops, self.moved(step), self.sizes(step))

    def total_on(self, mesh: tuple[int, int]) -> float:
        """Bytes on one device of another mesh: weights, optimizer and caches exactly, the rest scaled.

        The rest grows with the rows of a device, and where heads are split less; where they are split more it stays, for part of
        it is whole on each device.
        """
        settings = self.settings
        held = [variables_bytes(v, config, settings.recipe, mesh, mode) for config, v, mode in self.models]
        trained = variables_bytes([v for _, some, _ in self.models for v in some if v.trainable], *self._first(), mesh, None)
        trained = trained if settings.task != "generate" else 0
        caches = 0
        if settings.task == "generate":
            caches = caches_bytes(settings.config, settings.batch, settings.length, self.compute_dtype, mesh)
        rows = settings.batch if settings.batch % mesh[0] else settings.batch // mesh[0]
        scale = rows / settings.rows * max(1, settings.mesh[1] / mesh[1])
        return sum(held) + self.slots * trained + caches + self.temporary * scale

    def _first(self) -> tuple[Any, str]:
        return self.models[0][0], self.settings.recipe

    def smallest_mesh(self, chip: Chip) -> tuple[int, int] | None:
        """The first mesh of the same recipe whose devices' memory holds the step; None if there is none."""
        return next((mesh for mesh in other_meshes(self.settings) if self.total_on(mesh) <= chip.memory), None)


def make_plan(settings: PlanSettings) -> Plan:
    """Compiles what is planned, on this process's devices, of which there must be enough; allocates nothing.

    Args:
        settings: what to plan.

    Raises:
        ValueError: for a mesh larger than the devices, a target or an optimizer that there is not.

    Example:
        >>> print(make_plan(PlanSettings(NAMED_SIZES["gemma2_2b"], (1, 8))))  # with 8 devices
    """
    from keras_gemma2.planning.steps import distribution_of

    with distribution_of(settings).scope():
        return _planned(settings)


def _planned(settings: PlanSettings) -> Plan:
    from keras_gemma2.backend import jax_plan
    from keras_gemma2.planning import steps

    lora = LoraSettings.of(settings.config, settings.lora_rank, 16, settings.targets) if settings.task == "lora" else None
    mode = None if settings.task == "distill" else settings.quantize
    lm = steps.language_model(settings.config, settings.dtype, mode, lora)
    models, loss = [(settings.config, lm.backbone.variables, mode)], None
    optimizer, trained, slots = 0, [], 0.0
    if settings.task == "generate":
        compiled = steps.generation_steps(lm, settings)
    else:
        model = steps.compile_model(lm, settings)
        if settings.task == "distill":
            models.append((settings.teacher or settings.config, model.teacher.backbone.variables, settings.quantize))
        else:
            loss = steps.loss_bytes(lm, settings)
        compiled, trained = [steps.training_step(model, settings)], model.trainable_variables
        optimizer = jax_plan.device_bytes(model.optimizer.variables)
        count = sum(math.prod(variable.shape) for variable in trained)
        slots = sum(math.prod(variable.shape) for variable in model.optimizer.variables) // count
    caches = 0
    compute_dtype = lm.backbone.compute_dtype
    if settings.task == "generate":
        caches = caches_bytes(settings.config, settings.batch, settings.length, compute_dtype, settings.mesh)
    weights = sum(jax_plan.device_bytes(variables) for _, variables, _ in models)
    return Plan(settings, models, weights, optimizer, caches, jax_plan.device_bytes(trained), slots, loss, compute_dtype, compiled)
