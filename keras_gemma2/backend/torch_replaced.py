"""PyTorch: whether a module's parameters are still its Keras variables.

FSDP2's `fully_shard` puts parameters of its own, slices of the old ones, in the places of a module's parameters. Keras's layers and
optimizers work on the tensors that their variables hold, which are then the old ones: each process would go on training whole
weights, by its own data alone. Of a model as a whole, Keras even puts the old ones back before it trains.
"""

from __future__ import annotations

import sys
from typing import Any


def check_parameters(model: Any) -> None:
    """Refuses a model whose parameters were replaced.

    Args:
        model: a `keras.Model` with `variables`, each of which is a parameter of the module.

    Raises:
        RuntimeError: if one is not; it names the first.
    """
    layers = [model, *model._flatten_layers(include_self=False)]
    weights = {id(variable): variable for layer in layers for variable in _replaced(layer)}
    if not weights:
        return
    first = next(iter(weights.values())).path
    raise RuntimeError(
        f"{len(weights)} of the model's {len(model.weights)} weights are no longer parameters of the PyTorch module "
        f"(`fully_shard`, FSDP or DeepSpeed puts others in their place); the first is {first!r}. Keras trains its variables, which "
        "would get no gradient, or that of their own process alone. Make the model anew and do not shard it: use "
        "`keras_gemma2.distribution.data_parallel(lm)`, with `lm.enable_lora`, `quantize='int4'` or "
        "`lm.enable_gradient_checkpointing()` where memory is short; or split the weights over devices with KERAS_BACKEND=jax and "
        "`keras_gemma2.distribution.make_distribution('fully_sharded')`."
    )


def _replaced(layer: Any) -> list[Any]:
    """Variables of a layer that are no longer its parameters; a module that was never built has none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, nothing is sharded
    if fsdp is not None and isinstance(layer, fsdp.FSDPModule):
        return layer.variables
    own = layer._trainable_variables + layer._non_trainable_variables
    if not own or not hasattr(layer, "_torch_params"):
        return []
    parameters = {id(parameter) for parameter in layer.parameters()}
    return [variable for variable in own if id(variable.value) not in parameters]
