"""Probabilities that a mask leaves below the smallest normal number, taken to zero.

A mask of -100 before a Softmax, as Swin's shifted windows have it, leaves probabilities near 1e-44. They change no sum
that they are part of, but a processor takes ten times as long over each product with one of them, forward and
backward. Three passes over the probabilities cost less. NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

_ADDING = frozenset({"Add", "Where"})
_CARRYING = _ADDING | {"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_LOWEST, _HIGHEST = -130.0, -60.0
"""Masks whose exponential is subnormal, from exp(-104) to exp(-87), when scores differ by up to about 27."""

_OPSET = 12
_SUFFIX = "/with_subnormals"
_SMALLEST = "smallest_normal_float32"


def flush_subnormals(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> None:
    """Change a model in place: after each Softmax over masked scores, subnormal float32 numbers become zero. `weights`
    holds what the model refers to, by name. Models older than opset 12, which lack the comparison, stay as they are.
    """
    if any(entry.version < _OPSET for entry in model.opset_import if entry.domain in ("", "ai.onnx")):
        return
    masked = _masks(model.graph, weights)
    outputs = {value.name for value in model.graph.output}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type in _CARRYING and masked.intersection(node.input):
            masked.update(node.output)
        if node.op_type == "Softmax" and node.input[0] in masked and _is_unflushed(node.output[0], outputs):
            nodes.extend(_flush(node))
    if len(nodes) > len(model.graph.node):
        model.graph.initializer.append(
            numpy_helper.from_array(np.array(np.finfo(np.float32).smallest_normal), _SMALLEST)
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _is_unflushed(name: str, outputs: set[str]) -> bool:
    return name not in outputs and not name.endswith(_SUFFIX)


def _masks(graph: onnx.GraphProto, weights: Mapping[str, NDArray[Any]]) -> set[str]:
    """Constants that are added or chosen, and hold a number that the exponential makes subnormal."""
    added = {name for node in graph.node if node.op_type in _ADDING for name in node.input}
    constants = {t.name: t for t in graph.initializer if t.name in added and t.data_type == TensorProto.FLOAT}
    arrays = {name: weights[name] if name in weights else numpy_helper.to_array(t) for name, t in constants.items()}
    return {name for name, array in arrays.items() if np.any((array > _LOWEST) & (array < _HIGHEST))}


def _flush(softmax: NodeProto) -> Iterator[NodeProto]:
    """p (p >= smallest normal), where p is the output of `softmax`; the product takes over its name."""
    flushed = softmax.output[0]
    softmax.output[0] = p = f"{flushed}{_SUFFIX}"
    normal, factor = f"{flushed}/normal", f"{flushed}/factor"
    yield helper.make_node("GreaterOrEqual", [p, _SMALLEST], [normal], name=normal)
    yield helper.make_node("Cast", [normal], [factor], name=factor, to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [p, factor], [flushed], name=f"{flushed}/flushed")
