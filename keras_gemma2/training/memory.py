"""How much memory a training step takes, estimated from shapes alone: nothing is built or allocated.

What is counted is what the layers of this package keep between the forward and the backward pass, and the largest thing that is in
memory for a while on top of it: a chunk of the loss, or the backward pass of one block. Frameworks themselves (their libraries, the
compiler of JAX and TensorFlow) take some hundred MB more, and are not counted. `python -m keras_gemma2.benchmarks memory` compares
estimates with what processes took.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras

from keras_gemma2.config import Gemma2Config
from keras_gemma2.layers.quantization import float_policy
from keras_gemma2.layers.trained_attention import BLOCK
from keras_gemma2.lora import LoraSettings, projection_shapes
from keras_gemma2.quantization import quantized_bytes
from keras_gemma2.training.cross_entropy import rows_a_chunk, rows_over_frozen_table

ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "uint32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
# Variables of a weight's shape that an optimizer keeps, by the name of its class (keras/src/optimizers).
SLOTS = {
    "sgd": 0,
    "adam": 2,
    "adamw": 2,
    "adamax": 2,
    "nadam": 2,
    "lamb": 2,
    "lion": 1,
    "adagrad": 1,
    "adadelta": 2,
    "rmsprop": 1,
    "ftrl": 2,
}
# Arrays [rows, V] in float32 that are in memory at once while a chunk of the loss is computed: in PyTorch the logits, which are
# overwritten, and their gradient; compiled, also the exponentials and what the product with the table reads.
LOGITS_AT_ONCE = {"jax": 4, "tensorflow": 4, "torch": 2}
# The same where the table is frozen and in float32 (`backend/*_frozen_loss.py`): beside the logits, tiles of them.
FROZEN_LOGITS_AT_ONCE = {"jax": 2, "tensorflow": 1.2, "torch": 1.2}
# Arrays [B, T, F] that are in memory at once in the backward pass of a feed-forward, beside its gate and up: the gradients of the
# product and of both.
GATES_AT_ONCE = {"jax": 3, "tensorflow": 3, "torch": 3}


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of a training step; `print` shows them as a table.

    Args:
        weights: variables of the model, adapters included.
        gradients: of what is trained.
        optimizer: its variables.
        activations: what is kept between the forward and the backward pass; in mixed precision also the blocks' weights, rounded.
        loss: in memory while a chunk of the loss and its gradient are computed, in addition to `activations`; with the embedding's
            gradient, where that is trained.
        backward: in memory during the backward pass of one block, in addition to `activations`; with the embedding's gradient too.
        title: what was estimated.

    Example:
        >>> report = lm.memory_report(batch=1, length=2048)
        >>> report.total / 1e9  # GB
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    backward: int
    title: str = "a training step"

    @property
    def total(self) -> int:
        """Bytes at the step's peak.

        The loss and the backward pass of a block are not in memory at the same time, and gradients of blocks take the place of
        what these kept.
        """
        return self.weights + self.optimizer + max(self.activations + max(self.loss, self.backward), self.gradients)

    @property
    def growth(self) -> int:
        """Bytes at the step's peak beside the weights."""
        return self.total - self.weights

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights, ""),
            ("optimizer", self.optimizer, ""),
            ("gradients", self.gradients, "in the place of activations, as blocks are done"),
            ("activations", self.activations, "kept between the passes"),
            ("loss", self.loss, "a chunk of tokens"),
            ("backward of a block", self.backward, "not at the same time as the loss"),
            ("total at the peak", self.total, ""),
        ]
        lines = [f"  {name:<20}{format_bytes(size):>10}{'   ' + note if note else ''}" for name, size, note in rows]
        return "\n".join([f"{self.title}, estimated", *lines])


def format_bytes(size: float) -> str:
    """Bytes in MB, or from 1 GB in GB, of 10^6 and 10^9.

    Example:
        >>> format_bytes(2_360_000_000)
        '2.36 GB'
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def plan_memory(
    config: Gemma2Config,
    batch: int,
    length: int,
    *,
    dtype: Any = "float32",
    quantize: str | None = None,
    lora: LoraSettings | None = None,
    gradient_checkpointing: bool = False,
    optimizer: Any = "adam",
    backend: str | None = None,
) -> MemoryReport:
    """The memory of a training step of a model that need not exist.

    Args:
        config: of the model.
        batch: rows of a step (B).
        length: tokens of a row (T).
        dtype: dtype or policy, as `Gemma2Backbone` takes it.
        quantize: None, "int8" or "int4": what matrices are kept in.
        lora: the adapter that is trained; None for all weights that can be.
        gradient_checkpointing: whether blocks keep their input alone.
        optimizer: the name of a Keras optimizer, or an optimizer, built or not.
        backend: "jax", "tensorflow" or "torch"; None for the one that runs.

    Raises:
        ValueError: for a size that makes no step, an unknown optimizer or backend, naming the value and the mend.

    Example:
        >>> from keras_gemma2.config import NAMED_SIZES
        >>> lora = LoraSettings.of(NAMED_SIZES["gemma2_27b"], 8, 16, "attention")
        >>> print(plan_memory(NAMED_SIZES["gemma2_27b"], 1, 2048, dtype="bfloat16", quantize="int4", lora=lora))
    """
    policy = keras.dtype_policies.get(dtype)
    mode = quantize or policy.quantization_mode
    floats = float_policy(dtype)
    variables, trained = _variables(config, floats.variable_dtype, mode, lora)
    title = f"{batch} x {length} tokens, {floats.name}{f', weights in {mode}' if mode else ''}{', LoRA' if lora else ''}"
    return _report(
        config,
        batch,
        length,
        variables=variables,
        trained=trained,
        adapted=None if lora is None else set(lora.ranks),
        compute_dtype=floats.compute_dtype,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        backend=backend,
        title=title,
        table_dtype=mode or floats.variable_dtype,
        weights_dtype=floats.compute_dtype if mode else floats.variable_dtype,  # codes are widened for one product at a time
    )


def report_of(lm: Any, batch: int, length: int) -> MemoryReport:
    """As `Gemma2CausalLM.memory_report`.

    Raises:
        ValueError: as that.
    """
    if not lm.compiled or lm.optimizer is None:
        raise ValueError("The model has no optimizer yet, whose memory is part of the report. Call `compile(optimizer=...)` first.")
    backbone = lm.backbone
    found = [(tuple(v.shape), v.dtype) for v in backbone.weights]
    trained = {f"{v.path}#{i}": (tuple(v.shape), v.dtype) for i, v in enumerate(lm.trainable_variables)}
    active = backbone.adapter_set.active
    adapted = None if not backbone.adapter_set.settings else set(backbone.adapter_set.settings[active].ranks) if active else set()
    trains_embedding = any(v is w for v in lm.trainable_variables for w in backbone.token_embedding.variables)
    blocks = backbone.transformer_layers
    floats = float_policy(backbone.dtype_policy)
    return _report(
        backbone.config,
        batch,
        length,
        variables=found,
        trained=trained,
        adapted=adapted,
        compute_dtype=floats.compute_dtype,
        gradient_checkpointing=all(block.recomputes for block in blocks),
        optimizer=lm.optimizer,
        backend=None,
        title=f"{batch} x {length} tokens, {backbone.dtype_policy.name}" + (f", LoRA {active!r}" if active else ""),
        table_dtype=backbone.token_embedding.embeddings.dtype,
        weights_dtype=floats.compute_dtype if backbone.dtype_policy.quantization_mode else floats.variable_dtype,
        trains_embedding=trains_embedding,
    )


def _report(
    config: Gemma2Config,
    batch: int,
    length: int,
    *,
    variables: list[tuple[tuple[int, ...], str]],
    trained: Mapping[str, tuple[tuple[int, ...], str]],
    adapted: set[str] | None,
    compute_dtype: str,
    gradient_checkpointing: bool,
    optimizer: Any,
    backend: str | None,
    title: str,
    table_dtype: str,
    weights_dtype: str,
    trains_embedding: bool | None = None,
) -> MemoryReport:
    _check("batch", batch)
    _check("length", length)
    if length > config.max_sequence_length:
        raise ValueError(
            f"`length` must be at most the model's max_sequence_length, {config.max_sequence_length}. Received: length={length}."
        )
    backend = backend or keras.backend.backend()
    if backend not in LOGITS_AT_ONCE:
        raise ValueError(f"`backend` must be one of {sorted(LOGITS_AT_ONCE)}. Received: backend={backend!r}.")
    step = _Step(config, batch * length, length, ITEM_BYTES[compute_dtype], adapted, backend)
    gradients = sum(_size(*v) for v in trained.values())
    if trains_embedding is None:
        trains_embedding = any(name.startswith("token_embedding") for name in trained)
    block = step.kept_of_block() + (0 if weights_dtype == compute_dtype else step.rounded_weights())
    kept = config.num_layers * (step.stream if gradient_checkpointing else block) + step.outside_blocks()
    again = block if gradient_checkpointing else 0  # of one block, computed again
    table = 4 * config.vocabulary_size * config.hidden_dim if trains_embedding else 0
    return MemoryReport(
        weights=sum(_size(*v) for v in variables),
        gradients=gradients,
        optimizer=_optimizer_bytes(optimizer, trained),
        activations=kept,
        loss=step.loss(trains_embedding, table_dtype),
        backward=again + step.backward_of_block() + table,
        title=title,
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    """Bytes of what a step holds. `tokens` is B * T, `item` the bytes of a number in the compute dtype."""

    config: Gemma2Config
    tokens: int
    length: int
    item: int
    adapted: set[str] | None
    backend: str

    @property
    def stream(self) -> int:
        """The residual stream once."""
        return self.tokens * self.config.hidden_dim * self.item

    @property
    def _heads(self) -> int:
        return self.config.num_query_heads * self.config.head_dim

    @property
    def _keys(self) -> int:
        return self.config.num_key_value_heads * self.config.head_dim

    def _keeps_input(self, *names: str) -> bool:
        """Whether the input of a projection is kept: for the gradient of its kernel or factors."""
        return self.adapted is None or any(path.rpartition("/")[2] in names for path in self.adapted)

    def kept_of_block(self) -> int:
        """What a block keeps for its backward pass, by the lines of `DecoderBlock.call`."""
        config, item = self.config, self.item
        hidden, gate = config.hidden_dim, config.intermediate_dim
        # Each norm keeps its input in float32, and what it made of it where its scale is trained.
        norms = 4 * 4 * hidden * (1 if self.adapted is not None else 2)
        attention = item * hidden * self._keeps_input("query", "key", "value")
        attention += item * (self._heads + 2 * self._keys)  # queries, keys and values, rotated
        attention += item * self._heads * self._keeps_input("output_projection")
        if self.length > BLOCK:
            attention += 4 * self._heads + 4 * config.num_query_heads  # what queries read, and the sums of their softmax
        else:
            attention += (4 + 4 + (item if item < 4 else 0)) * config.num_query_heads * self.length  # tanh, softmax, rounded
        feed_forward = item * hidden * self._keeps_input("gate", "up")
        feed_forward += 2 * item * gate  # gate and up; the rest is computed again
        feed_forward += item * gate * self._keeps_input("down")
        return self.tokens * (norms + attention + feed_forward)

    def rounded_weights(self) -> int:
        """The matrices of a block in the compute dtype, where they are kept in another."""
        return self.item * sum(math.prod(shape) for shape in self.config.block_weight_shapes().values() if len(shape) == 2)

    def outside_blocks(self) -> int:
        """The final norm's input and output, and the gradient of the hidden states that the loss gives."""
        return self.tokens * self.config.hidden_dim * (4 + self.item + 4)

    def loss(self, trains_embedding: bool, table_dtype: str) -> int:
        """A chunk of the loss, as `training/cross_entropy.py` cuts it."""
        if table_dtype == "float32" and self.item == 4 and not trains_embedding:
            rows = rows_over_frozen_table(self.tokens, self.config.hidden_dim, self.config.vocabulary_size)
            at_once = FROZEN_LOGITS_AT_ONCE[self.backend]
        else:
            rows, at_once = rows_a_chunk(self.config.vocabulary_size), LOGITS_AT_ONCE[self.backend]
        chunk = int(4 * min(rows, self.tokens) * self.config.vocabulary_size * at_once)
        # The gradient of the table from one chunk, beside the sum of those before.
        return chunk + (2 * 4 * self.config.vocabulary_size * self.config.hidden_dim if trains_embedding else 0)

    def backward_of_block(self) -> int:
        """The gradients of a feed-forward's arrays, which are the widest."""
        return self.tokens * self.config.intermediate_dim * self.item * GATES_AT_ONCE[self.backend]


def _check(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1. Received: {name}={value!r}.")


def _size(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def _variables(config: Gemma2Config, dtype: str, mode: str | None, lora: LoraSettings | None) -> tuple[list, dict]:
    """Shape and dtype of all variables, and by name of those that are trained."""
    found, trained = [], {}
    for path, shape in config.weight_shapes().items():
        if mode is not None and len(shape) == 2:
            found.append(((quantized_bytes(shape, mode),), "uint8"))
            continue
        found.append((shape, dtype))
        if lora is None:
            trained[path] = (shape, dtype)
    for path, rank in (lora.ranks if lora is not None else {}).items():
        out, width = projection_shapes(config)[path]
        own = "float32" if dtype in ("bfloat16", "float16") else dtype
        for name, shape in (("lora_a", (rank, width)), ("lora_b", (out, rank))):
            found.append((shape, own))
            trained[f"{path}/{name}"] = (shape, own)
    return found, trained


def _optimizer_bytes(optimizer: Any, trained: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """Of the variables that an optimizer has, or will have once it is built."""
    if isinstance(optimizer, str):
        name = optimizer.lower()
        if name not in SLOTS:
            raise ValueError(f"`optimizer` must be one of {sorted(SLOTS)}, or a Keras optimizer. Received: {optimizer!r}.")
        return SLOTS[name] * sum(_size(*v) for v in trained.values()) + 2 * 4
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:  # of LossScaleOptimizer: a step counter and the scale beside the inner one's
        return _optimizer_bytes(inner, trained) + 2 * 4
    if optimizer.built and {v.path for v in optimizer._trainable_variables}:
        known = sorted(tuple(v.shape) for v in optimizer._trainable_variables)
        if known == sorted(shape for shape, _ in trained.values()):
            return sum(_size(tuple(v.shape), v.dtype) for v in optimizer.variables)
    name = type(optimizer).__name__.lower()
    slots = SLOTS.get(name)
    if slots is None:
        raise ValueError(
            f"How much {type(optimizer).__name__} holds is not known before it is built. Call `optimizer.build("
            "lm.trainable_variables)` first."
        )
    config = optimizer.get_config()
    slots += bool(name == "sgd" and config["momentum"]) + bool(config.get("amsgrad"))
    if name == "rmsprop":
        slots += bool(config["momentum"]) + bool(config["centered"])
    slots += bool(config.get("use_ema")) + bool(config.get("gradient_accumulation_steps"))
    return slots * sum(_size(*v) for v in trained.values()) + 2 * 4
