"""A SavedModel's functions without operations that repeat others.

Tracing writes each `x.shape[0]` as five operations, three of them constants. TensorFlow merges what is equal when it runs a graph,
but not before it has imported all of it, which takes as long as reading a GB of weights.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from tensorflow.core.protobuf import saved_model_pb2

# Operations that give the same for the same inputs, as far as traced models are full of them.
_PURE = frozenset(
    (
        *("Const", "Identity", "Shape", "StridedSlice", "Pack", "Range", "Reshape", "ExpandDims", "ConcatV2", "BroadcastTo"),
        *("Fill", "Cast", "Add", "AddV2", "Sub", "Mul", "FloorDiv", "FloorMod", "Minimum", "Maximum", "Max", "Min", "Sum", "Prod"),
        *("Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual", "LogicalAnd", "LogicalOr", "LogicalNot"),
    )
)


def merge_duplicates(folder: str) -> None:
    """Rewrites the SavedModel in a folder that is being written."""
    path = os.path.join(folder, "saved_model.pb")
    model = saved_model_pb2.SavedModel()
    with open(path, "rb") as file:
        model.ParseFromString(file.read())
    for meta_graph in model.meta_graphs:
        objects = meta_graph.object_graph_def.nodes
        # Some gradients' functions, which take tensors of another function by their names.
        named = {node.captured_tensor.name.partition(":")[0] for node in objects if node.HasField("captured_tensor")}
        for function in meta_graph.graph_def.library.function:
            while _merged(function, named):
                pass
    with open(path, "wb") as file:
        file.write(model.SerializeToString(deterministic=True))
    with contextlib.suppress(FileNotFoundError):  # TensorFlow does without, and it is the one of the graph as it was
        os.remove(os.path.join(folder, "fingerprint.pb"))


def _merged(function: Any, named: set[str]) -> bool:
    """Whether there was something to merge, all but what is `named` elsewhere; what used it may be equal now."""
    names = {name: other for name, other in _repeated(function).items() if name not in named}
    if not names:
        return False

    def renamed(name: str) -> str:  # "node:output:0", an argument's name, or "^node"
        mark = "^" if name.startswith("^") else ""
        node, colon, output = name[len(mark) :].partition(":")
        return mark + names.get(node, node) + colon + output

    kept = [node for node in function.node_def if node.name not in names]
    for node in kept:
        node.input[:] = [renamed(name) for name in node.input]
        if "_class" in node.attr:  # of "loc:@node", what it is placed beside
            places = [place.decode().removeprefix("loc:@") for place in node.attr["_class"].list.s]
            node.attr["_class"].list.s[:] = [f"loc:@{names.get(place, place)}".encode() for place in places]
    del function.node_def[:]
    function.node_def.extend(kept)
    for results in (function.ret, function.control_ret):
        for key in results:
            results[key] = renamed(results[key])
    return True


def _repeated(function: Any) -> dict[str, str]:
    """The operations that repeat an earlier one, and which."""
    first: dict[Any, str] = {}
    found = {}
    for node in function.node_def:
        if node.op in _PURE and not any(name.startswith("^") for name in node.input):
            attributes = tuple((key, node.attr[key].SerializeToString(deterministic=True)) for key in sorted(node.attr))
            key = (node.op, node.device, tuple(node.input), attributes)
            if first.setdefault(key, node.name) != node.name:
                found[node.name] = first[key]
    return found
