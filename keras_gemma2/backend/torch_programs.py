"""A step of a model as a program of `torch.export`, and as ONNX."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch
from keras.src.backend.torch.core import to_torch_dtype

from keras_gemma2.backend import torch_packed

BATCH, STEPS, SLOTS = 3, 4, 8  # of the example that is traced; none of them is kept, so none may be 1
OPSET = 20


class _Step(torch.nn.Module):
    """`(token_ids, starts, counts, caches)` to logits, and to the new caches where they are not written in place."""

    def __init__(self, step: Callable, model: torch.nn.Module, in_place: bool) -> None:
        super().__init__()
        self.step, self.model, self.in_place = step, model, in_place

    def forward(self, token_ids: Any, starts: Any, counts: Any, caches: list[Any]) -> Any:
        if not self.in_place:
            caches = [cache.clone() for cache in caches]
        logits, pairs = self.step(token_ids, starts, counts, list(zip(caches[::2], caches[1::2])))
        return logits if self.in_place else (logits, *(cache for pair in pairs for cache in pair))


def save_program(step: Callable, model: Any, caches: Sequence[Any], context: int, folder: str) -> None:
    """Writes `model.pt2`: a program of `torch.export` over caches that it writes to.

    Args:
        step: `(token_ids, starts, counts, caches)` to logits and caches, in pairs.
        model: the module whose parameters it uses.
        caches: for each cache `(name, heads, width, most_slots, dtype)`, keys and values by turns.
        context: most tokens of a call.
        folder: to write to.
    """
    with _for_export(model):
        arguments, sizes = _example(caches, context)
        program = torch.export.export(_Step(step, model, in_place=True), arguments, dynamic_shapes=sizes, strict=False)
        for node in program.graph.nodes:  # where in whose files each came from: most of the file, and nobody's business
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)
        torch.export.save(program, os.path.join(folder, "model.pt2"))


def save_onnx(step: Callable, model: Any, caches: Sequence[Any], context: int, folder: str) -> None:
    """Writes `model.onnx` and, with the weights, `model.onnx.data`; arguments as `save_program`'s.

    Its inputs are `token_ids`, `starts`, `counts` and the caches by their names, its outputs `logits` and, as `new_` and the name,
    the caches.
    """
    names = [cache[0] for cache in caches]
    with _for_export(model):
        arguments, sizes = _example(caches, context)
        program = torch.onnx.export(
            _Step(step, model, in_place=False),
            arguments,
            dynamo=True,
            dynamic_shapes=sizes,
            opset_version=OPSET,
            input_names=["token_ids", "starts", "counts", *names],
            output_names=["logits", *(f"new_{name}" for name in names)],
            verbose=False,
        )
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        program.save(os.path.join(folder, "model.onnx"), external_data=True)


def _example(caches: Sequence[Any], context: int) -> tuple[tuple, tuple]:
    """Arguments to trace with, and which of their sizes are free."""
    device = keras.src.backend.torch.core.get_device()
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1, max=context)
    sizes = {most: torch.export.Dim(f"slots_{most}", min=3, max=most) for most in {cache[3] for cache in caches}}

    def integers(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.int32, device=device)

    def zeros(cache: Any) -> torch.Tensor:
        _, heads, width, most, dtype = cache
        return torch.zeros((BATCH, heads, min(SLOTS, most), width), dtype=to_torch_dtype(dtype), device=device)

    arguments = (integers(BATCH, min(STEPS, context)), 0 * integers(BATCH), integers(BATCH), [zeros(cache) for cache in caches])
    free = ({0: batch, 1: steps}, {0: batch}, {0: batch}, [{0: batch, 2: sizes[cache[3]]} for cache in caches])
    return arguments, free


@contextlib.contextmanager
def _for_export(model: Any) -> Iterator[None]:
    """A context without gradients, with all codes in plain order, and without warnings about PyTorch's own exporter."""
    for parameter in model.parameters():
        torch_packed.plain(parameter)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
