"""Running one node on values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, OperatorSetIdProto, ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator

from explainserve.onnx_vjp.subgraphs import is_standard


def measures(node: NodeProto) -> bool:
    """Whether a node reads nothing of a tensor but its sizes."""
    return is_standard(node, "Shape") or is_standard(node, "Size")


def measured(node: NodeProto, sizes: Sequence[int]) -> np.ndarray:
    """What a node that `measures` says of a tensor of these sizes. Raises OverflowError at 2 ** 63 elements."""
    if node.op_type == "Size":
        return np.array(math.prod(sizes), np.int64)
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return np.array(sizes[bounds.get("start") : bounds.get("end")], np.int64)


def evaluate(
    node: NodeProto, inputs: Sequence[np.ndarray | None], imports: Sequence[OperatorSetIdProto]
) -> list[np.ndarray]:
    """The outputs of a node of the operator sets `imports`, by the reference evaluator; an absent input is None.

    Raises whatever the evaluator and numpy raise on values that do not fit.
    """
    feeds = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in feeds.items()
    ]
    results = [ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "constant", declared, results)
    values = iter(ReferenceEvaluator(helper.make_model(graph, opset_imports=imports)).run(None, feeds))
    return [np.asarray(next(values)) if name else np.empty(0) for name in node.output]
