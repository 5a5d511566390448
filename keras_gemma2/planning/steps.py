"""A plan's models, which have no weights, and its compiled steps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import keras

from keras_gemma2 import backend
from keras_gemma2.backbone import Gemma2Backbone
from keras_gemma2.backend import jax_plan
from keras_gemma2.cache import Tokens
from keras_gemma2.causal_lm import Gemma2CausalLM
from keras_gemma2.config import Gemma2Config
from keras_gemma2.generation.decode import extend_prompts, next_logits
from keras_gemma2.generation.runner import spread_pieces
from keras_gemma2.layers.initializers import skip_random_weights
from keras_gemma2.layers.trained_attention import BLOCK
from keras_gemma2.lora import LoraSettings
from keras_gemma2.planning.held import cache_shapes
from keras_gemma2.planning.program import Contents, read_program
from keras_gemma2.planning.settings import PlanSettings
from keras_gemma2.training.cross_entropy import next_token_sums, rows_a_chunk
from keras_gemma2.training.distiller import Distiller

_LAYER = re.compile(r"decoder_block_(\d+)")


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step.

    Args:
        name: what it is.
        tokens: that it runs, of all rows.
        compiled: what the compiler says of it.
        contents: what its text says.
    """

    name: str
    tokens: int
    compiled: Any
    contents: Contents


def language_model(config: Gemma2Config, dtype: str, mode: str | None, lora: LoraSettings | None = None) -> Gemma2CausalLM:
    """A language model of variables without values, which know how they lie on the devices of the distribution that is set.

    Args:
        config: the model's.
        dtype: dtype or policy of the floats.
        mode: "int8" or "int4", to keep matrices in.
        lora: an adapter to add.
    """
    with skip_random_weights():
        with jax_plan.shapes_only():
            backbone = Gemma2Backbone(**config.to_dict(), dtype=f"{mode}_from_{dtype}" if mode else dtype)
            if lora is not None:
                backbone._add_adapter("default", lora)
        jax_plan.lay_out(backbone.variables)
        return Gemma2CausalLM(backbone, None)


# Generation -------------------------------------------------------------------------------------------------------------


def generation_steps(lm: Gemma2CausalLM, settings: PlanSettings) -> list[Step]:
    """A step of one token a row, and the first piece of the prompts."""
    config, batch, length = settings.config, settings.batch, settings.length
    backbone, variables = lm.backbone, lm.backbone.variables
    dtype = backend.cache_dtype(backbone.compute_dtype)
    caches = [(jax_plan.cache(shape, dtype),) * 2 for shape in cache_shapes(config, batch, length)]
    each = jax_plan.host_array((batch,), "int32")

    def step(caches: Any, token_ids: Any, positions: Any) -> Any:
        return next_logits(backbone, caches, token_ids, positions)

    decoding = jax_plan.compiled_function(step, variables, caches, each, each)
    piece = next(iter(spread_pieces([length] * batch)))

    def extend(state: Any, token_ids: Any, starts: Any, counts: Any, sources: Any) -> Any:
        tokens = Tokens(None, starts, counts, token_ids.shape[1], True)
        return extend_prompts(backbone, *state, token_ids, tokens, sources)

    hidden = jax_plan.host_array((batch, config.hidden_dim), backbone.compute_dtype)
    token_ids = jax_plan.host_array((batch, piece.steps), "int32")
    prompts = jax_plan.compiled_function(extend, variables, (caches, hidden), token_ids, each, each, each)
    blocks = _trips(config, lambda window: -(-min(length, window or length) // backend.step_block()), 1)
    return [
        Step("a token of each row", batch, decoding, read_program(decoding.text, blocks)),
        Step(f"{piece.steps} tokens of each prompt", batch * piece.steps, prompts, read_program(prompts.text, blocks)),
    ]


# Training ---------------------------------------------------------------------------------------------------------------


def training_step(model: Any, settings: PlanSettings) -> Step:
    """A training step of a model that is compiled."""
    shape = settings.batch, settings.length
    tokens = jax_plan.rows_of_data(shape, "int32")
    data = {"token_ids": tokens, "padding_mask": tokens}, tokens, jax_plan.rows_of_data(shape, "float32")
    compiled = jax_plan.compiled_training(model, data)
    contents = read_program(compiled.text, training_trips(settings))
    return Step("a training step", settings.batch * settings.length, compiled, contents)


def compile_model(lm: Gemma2CausalLM, settings: PlanSettings) -> Any:
    """The model to be trained, with an optimizer whose variables have no values either."""
    model = lm
    if settings.task == "distill":
        model = Distiller(lm, language_model(settings.teacher or settings.config, settings.dtype, settings.quantize))
    for block in lm.backbone.transformer_layers if settings.gradient_checkpointing else ():
        block.recomputes = True
    model.compile(optimizer=settings.optimizer)
    with jax_plan.shapes_only():
        model.optimizer.build(model.trainable_variables)
    return model


def loss_bytes(lm: Gemma2CausalLM, settings: PlanSettings) -> int:
    """What the loss alone holds, with its gradients: that of the hidden states, and of the embedding where that is trained."""
    embedding, shape = lm.backbone.token_embedding, (settings.batch, settings.length)
    hidden = jax_plan.rows_of_data((*shape, settings.config.hidden_dim), lm.backbone.compute_dtype)

    def loss(hidden: Any, labels: Any, weights: Any) -> Any:
        return next_token_sums(embedding, hidden, labels, weights, True)["loss"]

    labels, weights = jax_plan.rows_of_data(shape, "int32"), jax_plan.rows_of_data(shape, "float32")
    return jax_plan.compiled_gradient(loss, embedding.variables, hidden, labels, weights).temporary


def training_trips(settings: PlanSettings) -> Callable[[Any], float]:
    """How often loops run in training whose trips XLA does not know, where no token is padding."""
    count = -(-settings.length // BLOCK)

    def blocks(window: int | None) -> float:
        """Blocks of keys that a block of queries sees, on average."""
        back = count if window is None else -(-(window - 1) // BLOCK)
        return sum(min(i, back) + 1 for i in range(count)) / count

    chunks = -(-settings.rows * settings.length // rows_a_chunk(settings.config.vocabulary_size))
    return _trips(settings.config, blocks, chunks)


def _trips(config: Gemma2Config, of_layer: Callable[[int | None], float], otherwise: float) -> Callable[[Any], float]:
    def trips(line: Any) -> float:
        layer = _LAYER.search(line.op_name)
        return otherwise if layer is None else of_layer(config.window(config.layer_types[int(layer[1]) % config.num_layers]))

    return trips


def distribution_of(settings: PlanSettings) -> keras.distribution.ModelParallel:
    """The distribution that is planned for, over the first devices of this process.

    Raises:
        ValueError: if there are too few of them.
    """
    from keras_gemma2.distribution import make_distribution

    devices = keras.distribution.list_devices()[: settings.devices]
    return make_distribution(settings.recipe, batch=settings.mesh[0], model=settings.mesh[1], devices=devices)
