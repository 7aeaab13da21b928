"""Score heads: the last step from a model's output to what is explained, as part of the graph and differentiated with
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx import NodeProto, helper

from explainserve.onnx_vjp.opset import raise_opset

Chain = list[tuple[str, dict[str, Any]]]


def _log(producer: NodeProto | None) -> tuple[str | None, Chain] | None:
    """The logarithm of a Softmax or Sigmoid is taken of its input, where it cannot underflow."""
    if producer is None or producer.domain not in ("", "ai.onnx"):
        return None
    if producer.op_type == "Softmax":
        axis = next((attribute.i for attribute in producer.attribute if attribute.name == "axis"), -1)
        return producer.input[0], [("LogSoftmax", {"axis": axis})]
    if producer.op_type == "Sigmoid":
        return producer.input[0], _LOG_SIGMOID
    return None


_LOG_SIGMOID: Chain = [("Neg", {}), ("Softplus", {}), ("Neg", {})]

HEADS: Mapping[str, Callable[[int], Chain]] = {
    "identity": lambda axis: [],
    "softmax": lambda axis: [("Softmax", {"axis": axis})],
    "log_softmax": lambda axis: [("LogSoftmax", {"axis": axis})],
    "sigmoid": lambda axis: [("Sigmoid", {})],
    "log_sigmoid": lambda axis: _LOG_SIGMOID,
    "log": lambda axis: [("Log", {})],
}


def append_score_head(model: onnx.ModelProto, output: str, head: str, axis: int) -> tuple[onnx.ModelProto, str]:
    """A copy of `model` with a score head on the tensor `output`, and the name of the score tensor, which is an
    output too.

    `head` is a key of HEADS; `axis` is the class axis for softmax and log_softmax and ignored by the others. `log`
    expects probabilities. Raises ValueError for an unknown head or tensor.
    """
    if head not in HEADS:
        raise ValueError(f"unknown score head '{head}'; expected one of {', '.join(HEADS)}")
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    raise_opset(extended)
    producers = {name: node for node in extended.graph.node for name in node.output}
    if output not in producers and output not in {value.name for value in extended.graph.input}:
        raise ValueError(f"the model has no tensor '{output}'")
    stable = _log(producers.get(output)) if head == "log" else None
    source, chain = stable or (output, HEADS[head](axis))
    score = _append_chain(extended.graph, str(source), chain, f"{output}/{head}", set(producers))
    score = score if chain else output
    if score not in {value.name for value in extended.graph.output}:
        extended.graph.output.append(_score_info(extended, score, output))
    return extended, score


def _append_chain(graph: onnx.GraphProto, source: str, chain: Chain, hint: str, taken: set[str]) -> str:
    for position, (operator, attributes) in enumerate(chain):
        name = hint if position == len(chain) - 1 else f"{hint}/{operator}_{position}"
        while name in taken:
            name += "_"
        taken.add(name)
        graph.node.append(helper.make_node(operator, [source], [name], name=name, **attributes))
        source = name
    return source


def _score_info(model: onnx.ModelProto, score: str, output: str) -> onnx.ValueInfoProto:
    known = (*model.graph.output, *model.graph.value_info, *model.graph.input)
    info = onnx.ValueInfoProto(name=score)
    kind = next((value.type for value in known if value.name == output), None)
    info.type.CopyFrom(kind if kind is not None else helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None))
    return info
