"""A step of a model as a program of `torch.export`, and as ONNX."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch
from keras.src.backend.torch.core import to_torch_dtype

from keras_gemma2.backend import torch_packed

BATCH, STEPS, SLOTS = 3, 4, 8  # of the example that is traced; none of them is kept, so none may be 1
LEAST_SLOTS = 3  # of a cache whose slots are free: PyTorch's exporter makes special cases of fewer
OPSET = 20


class _Step(torch.nn.Module):
    """`(token_ids, starts, counts, caches)` to logits, and to the new caches where they are not written in place."""

    def __init__(self, step: Callable, in_place: bool) -> None:
        super().__init__()
        # Not the model: what it holds as parameters would be stored once more, beside the tensors that the step reads.
        self.step, self.in_place = step, in_place

    def forward(self, token_ids: Any, starts: Any, counts: Any, caches: list[Any]) -> Any:
        if not self.in_place:
            caches = [cache.clone() for cache in caches]
        logits, *caches = self.step(token_ids, starts, counts, caches)
        return logits if self.in_place else (logits, *caches)


def save_program(step: Callable, model: Any, caches: Sequence[Any], context: int, folder: str) -> None:
    """Writes `model.pt2`: a program of `torch.export` over caches that it writes to.

    Args:
        step: `(token_ids, starts, counts, caches)` to logits and the caches.
        model: the layer whose variables it uses.
        caches: for each cache `(name, heads, width, most_slots, dtype)`, keys and values by turns.
        context: most tokens of a call.
        folder: to write to.
    """
    with _for_export(model):
        arguments, sizes = _example(caches, context)
        program = torch.export.export(_Step(step, in_place=True), arguments, dynamic_shapes=sizes, strict=False)
        for node in program.graph.nodes:  # where in whose files each came from: most of the file, and nobody's business
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)
        with _KeepsErrors(os.path.join(folder, "model.pt2"), "wb") as file:
            torch.export.save(program, file)
            file.raise_error()


def save_onnx(step: Callable, model: Any, caches: Sequence[Any], context: int, folder: str) -> None:
    """Writes `model.onnx` and, with the weights, `model.onnx.data`; arguments as `save_program`'s.

    Its inputs are `token_ids`, `starts`, `counts` and the caches by their names, its outputs `logits` and, as `new_` and the name,
    the caches.
    """
    names = [cache[0] for cache in caches]
    with _for_export(model):
        arguments, sizes = _example(caches, context)
        program = torch.onnx.export(
            _Step(step, in_place=False),
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


class _KeepsErrors(io.FileIO):
    """A file whose errors wait until `raise_error`: PyTorch's writer ends the process when a file of its own cannot be written."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def raise_error(self) -> None:
        """Raises what was kept.

        Raises:
            OSError: the first error of a write.
        """
        if self.error is not None:
            raise self.error


def _example(caches: Sequence[Any], context: int) -> tuple[tuple, tuple]:
    """Arguments to trace with, and which of their sizes are free."""
    device = keras.src.backend.torch.core.get_device()
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1, max=context) if context > 1 else None
    free_slots = {cache[3] for cache in caches if cache[3] > LEAST_SLOTS}
    sizes = {most: torch.export.Dim(f"slots_{most}", min=LEAST_SLOTS, max=most) for most in free_slots}

    def integers(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.int32, device=device)

    def zeros(cache: Any) -> torch.Tensor:
        _, heads, width, most, dtype = cache
        return torch.zeros((BATCH, heads, min(SLOTS, most), width), dtype=to_torch_dtype(dtype), device=device)

    arguments = (integers(BATCH, min(STEPS, context)), 0 * integers(BATCH), integers(BATCH), [zeros(cache) for cache in caches])
    free = ({0: batch, 1: steps}, {0: batch}, {0: batch}, [{0: batch, 2: sizes.get(cache[3])} for cache in caches])
    return arguments, free


@contextlib.contextmanager
def _for_export(model: Any) -> Iterator[None]:
    """A context without gradients, with all codes in plain order, and without warnings about PyTorch's own exporter."""
    for variable in model.variables:  # not `parameters`, which Keras has for some layers only
        torch_packed.plain(variable.value)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
