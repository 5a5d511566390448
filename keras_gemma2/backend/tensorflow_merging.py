"""A SavedModel's functions without operations that repeat others, or do nothing.

Tracing writes each `x.shape[0]` as five operations, three of them constants, and an identity for each result of a function.
TensorFlow drops all that when it runs a graph, but not before it has imported it, which takes as long as reading a GB of weights.
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
            _renamed(function, _passed_on(function, named))
            while repeated := _repeated(function, named):
                _renamed(function, repeated)
    with open(path, "wb") as file:
        file.write(model.SerializeToString(deterministic=True))
    with contextlib.suppress(FileNotFoundError):  # TensorFlow does without, and it is the one of the graph as it was
        os.remove(os.path.join(folder, "fingerprint.pb"))


def _renamed(function: Any, outputs: dict[str, str]) -> None:
    """Takes nodes out of a function; what used them uses others.

    Args:
        function: a `FunctionDef`.
        outputs: for each node that goes, what its output is called instead, as "node:output:0"; the name of a node alone stands
            for one of the same outputs.
    """

    def renamed(name: str) -> str:  # "node:output:0", an argument's name, or "^node"
        mark = "^" if name.startswith("^") else ""
        node, colon, output = name[len(mark) :].partition(":")
        if node not in outputs:
            return name
        other, is_output, _ = outputs[node].partition(":")
        return mark + other if mark else outputs[node] if is_output else other + colon + output

    kept = [node for node in function.node_def if node.name not in outputs]
    for node in kept:
        node.input[:] = [renamed(name) for name in node.input]
        if "_class" in node.attr:  # of "loc:@node", what it is placed beside
            places = [place.decode().removeprefix("loc:@") for place in node.attr["_class"].list.s]
            node.attr["_class"].list.s[:] = [f"loc:@{outputs.get(place, place).partition(':')[0]}".encode() for place in places]
    del function.node_def[:]
    function.node_def.extend(kept)
    for results in (function.ret, function.control_ret):
        for key in list(results):  # a map of protobuf, which changes under an iterator
            results[key] = renamed(results[key])


def _repeated(function: Any, named: set[str]) -> dict[str, str]:
    """The operations that repeat an earlier one, and which; all but those that are `named` elsewhere."""
    first: dict[Any, str] = {}
    found = {}
    for node in function.node_def:
        if node.op in _PURE and not any(name.startswith("^") for name in node.input):
            attributes = tuple((key, node.attr[key].SerializeToString(deterministic=True)) for key in sorted(node.attr))
            key = (node.op, node.device, tuple(node.input), attributes)
            if first.setdefault(key, node.name) != node.name and node.name not in named:
                found[node.name] = first[key]
    return found


def _passed_on(function: Any, named: set[str]) -> dict[str, str]:
    """The identities that neither wait for anything nor stand for an argument, and what they pass on.

    One that waits, and is nothing but a result, need not: a function ends when all that it does has ended.
    """
    nodes = {node.name for node in function.node_def}
    used = {name.lstrip("^").partition(":")[0] for node in function.node_def for name in node.input}
    used |= {name.partition(":")[0] for name in function.control_ret.values()}
    found: dict[str, str] = {}
    for node in function.node_def:
        needless = len(node.input) == 1 or node.name not in used
        if node.op == "Identity" and needless and node.name not in named and node.input[0].partition(":")[0] in nodes:
            found[node.name] = node.input[0]
    for name, source in found.items():
        while source.partition(":")[0] in found:
            source = found[source.partition(":")[0]]
        found[name] = source
    return found
