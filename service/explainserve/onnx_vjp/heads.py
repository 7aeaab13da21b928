"""Score heads: the last step from a model's output to what is explained, as part of the graph and differentiated with
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx import NodeProto, helper

from explainserve.onnx_vjp.opset import FLOOR, SINGLE_AXIS_SOFTMAX, version_of
from explainserve.onnx_vjp.subgraphs import is_standard

Chain = list[tuple[str, dict[str, Any]]]

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
    output too. The operator set stays that of the model.

    `head` is a key of HEADS; `axis` is the class axis for softmax and log_softmax and ignored by the others. `log`
    expects probabilities. Raises ValueError for an unknown head or tensor, and before operator set 13 for a softmax
    over an axis other than -1 of a tensor that declares no shape.
    """
    if head not in HEADS:
        raise ValueError(f"unknown score head '{head}'; expected one of {', '.join(HEADS)}")
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    producers = {name: node for node in extended.graph.node for name in node.output}
    if output not in producers and output not in {value.name for value in extended.graph.input}:
        raise ValueError(f"the model has no tensor '{output}'")
    stable = _log_of_input(producers.get(output)) if head == "log" else None
    source, chain = stable or (output, _over_last_axis(extended, output, HEADS[head](axis)))
    if chain and version_of(extended) is None:
        extended.opset_import.append(helper.make_opsetid("", FLOOR))
    score = _append_chain(extended.graph, source, chain, f"{output}/{head}", set(producers)) if chain else output
    if score not in {value.name for value in extended.graph.output}:
        extended.graph.output.append(_score_info(extended, score, output))
    return extended, score


def _log_of_input(producer: NodeProto | None) -> tuple[str, Chain] | None:
    """The logarithm of a Softmax or Sigmoid is taken of its input, where it cannot underflow."""
    if producer is not None and is_standard(producer, "Softmax"):
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in producer.attribute}
        return producer.input[0], [("LogSoftmax", attributes)]  # the axis means the same in every operator set
    if producer is not None and is_standard(producer, "Sigmoid"):
        return producer.input[0], _LOG_SIGMOID
    return None


def _over_last_axis(model: onnx.ModelProto, output: str, chain: Chain) -> Chain:
    """The chain with its Softmax between two transpositions that make the class axis the last one, in operator sets
    where Softmax runs over all axes from the given one on.
    """
    axis = chain[0][1].get("axis", -1) if chain else -1
    if axis == -1 or (version_of(model) or FLOOR) >= SINGLE_AXIS_SOFTMAX:
        return chain
    kind = _declared_type(model, output)
    if kind is None or not kind.tensor_type.HasField("shape"):
        raise ValueError(f"tensor '{output}' declares no shape, which a softmax over its axis {axis} needs")
    exchanged = list(range(len(kind.tensor_type.shape.dim)))
    exchanged[axis], exchanged[-1] = exchanged[-1], exchanged[axis]
    over_last = [(operator, {"axis": -1}) for operator, _ in chain]
    transposition = [] if exchanged == sorted(exchanged) else [("Transpose", {"perm": exchanged})]
    return [*transposition, *over_last, *transposition]


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
    info = onnx.ValueInfoProto(name=score)
    kind = _declared_type(model, output)
    info.type.CopyFrom(kind if kind is not None else helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None))
    return info


def _declared_type(model: onnx.ModelProto, name: str) -> onnx.TypeProto | None:
    values = (*model.graph.output, *model.graph.value_info, *model.graph.input)
    return next((value.type for value in values if value.name == name), None)
