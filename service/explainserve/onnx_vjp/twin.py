"""A second forward pass beside the first, for gradient rules that compare an instance with its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from explainserve.onnx_vjp.graph import Graph
from explainserve.onnx_vjp.routes import values_read


def add_twin(graph: Graph, nodes: Sequence[NodeProto], given: Mapping[str, str]) -> dict[str, str]:
    """Append copies of those of `nodes` that depend on the values of a tensor of `given`, computed of the tensors that
    `given` maps them to; return the copies of all tensors by name, `given` included.
    """
    twins = dict(given)
    for node in nodes:
        if twins.keys() & set(values_read(node)) and not twins.keys() >= set(filter(None, node.output)):
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [twins.get(name, name) for name in node.input]
            twins |= {name: graph.fresh(f"{name}/baseline") for name in node.output if name and name not in given}
            copy.output[:] = [twins.get(name, "") for name in node.output]
            copy.name = copy.output[0]
            graph.append(copy)
    return twins
