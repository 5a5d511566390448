"""What a plan is made for, checked before a backend is imported."""

from __future__ import annotations

import dataclasses

from keras_gemma2.config import NAMED_SIZES, Gemma2Config

TASKS = ("generate", "lora", "full", "distill")
MOST_DEVICES = 256
_PREFIX = "gemma2_"


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """A step of a model on a mesh.

    Args:
        config: the model's.
        mesh: devices along the axes "batch" and "model".
        task: "generate" (a token a row, and a piece of the prompts), "lora" (an adapter's training step), "full" (that of all
            weights) or "distill" (that of a student, with its teacher).
        batch: rows of a step, on all devices together.
        length: tokens of a row; in generation that the caches have room for and hold.
        recipe: as `keras_gemma2.distribution.make_mesh` takes it.
        dtype: dtype or policy, as `Gemma2Backbone` takes it.
        quantize: None, "int8" or "int4"; of a distillation the teacher's.
        lora_rank: of the adapter.
        targets: of the adapter.
        gradient_checkpointing: whether blocks keep their input alone.
        optimizer: name of a Keras optimizer.
        teacher: the teacher's config; None for the student's.
        name: what the model is called in the report.

    Raises:
        ValueError: for numbers that are not positive, names that there are not, or a mesh that the model does not divide among.

    Example:
        >>> PlanSettings(NAMED_SIZES["gemma2_27b"], (2, 8), "lora", batch=8, length=2048, dtype="bfloat16")
    """

    config: Gemma2Config
    mesh: tuple[int, int]
    task: str = "generate"
    batch: int = 1
    length: int = 2048
    recipe: str = "tensor_parallel"
    dtype: str = "bfloat16"
    quantize: str | None = None
    lora_rank: int = 8
    targets: str = "attention"
    gradient_checkpointing: bool = False
    optimizer: str = "adam"
    teacher: Gemma2Config | None = None
    name: str = "model"

    def __post_init__(self) -> None:
        # Which import Keras: its backend is chosen once the sizes are known.
        from keras_gemma2.distribution import RECIPES
        from keras_gemma2.training.memory import SLOTS

        for name in ("batch", "length", "lora_rank"):
            _check_positive(name, getattr(self, name))
        for size in self.mesh:
            _check_positive("mesh", size)
        _check_one_of("task", self.task, TASKS)
        _check_one_of("recipe", self.recipe, tuple(RECIPES))
        _check_one_of("optimizer", self.optimizer, tuple(SLOTS))
        if self.devices > MOST_DEVICES:
            raise ValueError(f"argument --mesh: must have at most {MOST_DEVICES} devices in all, got {self.devices}")
        if self.length > self.config.max_sequence_length:
            raise ValueError(f"argument --length: must be at most {self.config.max_sequence_length} tokens, got {self.length}")
        if self.quantize is not None and self.task == "full":
            raise ValueError("argument --quantize: quantized weights are not trained; --task lora trains an adapter over them")
        self._check_mesh()

    def _check_mesh(self) -> None:
        from keras_gemma2.distribution import RECIPES, check_divides

        splits_heads, is_sharded = RECIPES[self.recipe]
        batch, model = self.mesh
        if not splits_heads and model != 1:
            raise ValueError(f"argument --mesh: model must be 1 with --recipe {self.recipe}, which splits no heads, got {model}")
        if self.task != "generate" and self.batch % batch:
            raise ValueError(
                f"argument --batch: must be a multiple of {batch}, the mesh's batch axis, for equal shares, got {self.batch}"
            )
        modes = (self.quantize,) if self.task != "distill" else (None,)
        models = [(self.config, mode) for mode in modes] + ([(self.teacher, self.quantize)] if self.teacher is not None else [])
        for config, mode in models:
            check_divides(config, model, batch if is_sharded else 1, mode)

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return self.mesh[0] * self.mesh[1]

    @property
    def rows(self) -> int:
        """Of a batch, on one device; all of them where they do not divide."""
        return self.batch if self.batch % self.mesh[0] else self.batch // self.mesh[0]


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"argument --{name.replace('_', '-')}: must be an integer of at least 1, got {value!r}")


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"argument --{name}: must be one of {', '.join(known)}, got {value!r}")


def config_of(size: str, argument: str = "--size") -> Gemma2Config:
    """The config of a published size: "2b", "9b", "27b", or the whole name.

    Raises:
        ValueError: for another.

    Example:
        >>> config_of("27b").num_layers
        46
    """
    name = size if size.startswith(_PREFIX) else _PREFIX + size
    if name not in NAMED_SIZES:
        sizes = ", ".join(known.removeprefix(_PREFIX) for known in NAMED_SIZES)
        raise ValueError(f"argument {argument}: must be one of {sizes}, got {size!r}")
    return NAMED_SIZES[name]


def mesh_of(text: str) -> tuple[int, int]:
    """The sizes of the axes "batch" and "model"; 1 for one that is not named.

    Raises:
        ValueError: for another axis, one named twice, or a size that is no positive integer.

    Example:
        >>> mesh_of("batch=2,model=8")
        (2, 8)
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in ("batch", "model"):
            raise ValueError(f"argument --mesh: axes are batch and model, as in batch=2,model=8, got {axis!r}")
        if axis in sizes:
            raise ValueError(f"argument --mesh: must name each axis once, got {axis!r} twice in {text!r}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"argument --mesh: the size of {axis} must be an integer of at least 1, got {size!r}")
        sizes[axis] = int(size)
    return sizes.get("batch", 1), sizes.get("model", 1)
