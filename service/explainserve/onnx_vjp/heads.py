"""Score heads: the last step from a model's output to what is explained, as part of the graph and differentiated with
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import onnx
from onnx import NodeProto, helper

from explainserve.onnx_vjp.final_activation import attributes_of, final_activation
from explainserve.onnx_vjp.opset import FLOOR, SINGLE_AXIS_SOFTMAX, version_of


class Step(NamedTuple):
    """A node of a head; it takes what the step before it makes, and `parameters`."""

    operator: str
    attributes: Mapping[str, Any] = {}
    parameters: tuple[str, ...] = ()


Chain = list[Step]

_LOG_SIGMOID: Chain = [Step("Neg"), Step("Softplus"), Step("Neg")]

HEADS: Mapping[str, Callable[[int], Chain]] = {
    "identity": lambda axis: [],
    "softmax": lambda axis: [Step("Softmax", {"axis": axis})],
    "log_softmax": lambda axis: [Step("LogSoftmax", {"axis": axis})],
    "sigmoid": lambda axis: [Step("Sigmoid")],
    "log_sigmoid": lambda axis: _LOG_SIGMOID,
    "log": lambda axis: [Step("Log")],
}

HEADS_BEFORE_ACTIVATION: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], Chain]]] = {
    "log": {
        # the axis means the same in every operator set
        "Softmax": lambda attributes: [Step("LogSoftmax", attributes)],
        "Sigmoid": lambda attributes: _LOG_SIGMOID,
    },
    "pre_activation": {"Softmax": lambda attributes: [], "Sigmoid": lambda attributes: []},
}
"""Heads on what stands before the softmax or sigmoid in which an output ends, by that operator: a logarithm cannot
underflow there."""


def append_score_head(model: onnx.ModelProto, output: str, head: str, axis: int) -> tuple[onnx.ModelProto, str]:
    """A copy of `model` with a score head on the tensor `output`, and the name of the score tensor, which is an
    output too. The operator set stays that of the model.

    `head` is a key of HEADS or HEADS_BEFORE_ACTIVATION; `axis` is the class axis for softmax and log_softmax and
    ignored by the others. `log` expects probabilities, `pre_activation` takes what the softmax or sigmoid takes in
    which the tensor ends. Raises ValueError for an unknown head or tensor, where there is no such activation, and
    before operator set 13 for a softmax over an axis other than -1 of a tensor that declares no shape.
    """
    known = dict.fromkeys([*HEADS, *HEADS_BEFORE_ACTIVATION])
    if head not in known:
        raise ValueError(f"unknown score head '{head}'; expected one of {', '.join(known)}")
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    producers = {name: node for node in extended.graph.node for name in node.output}
    if output not in producers and output not in {value.name for value in extended.graph.input}:
        raise ValueError(f"the model has no tensor '{output}'")
    source, chain = _before_activation(extended, output, head) or _on_output(extended, output, head, axis)
    if chain and version_of(extended) is None:
        extended.opset_import.append(helper.make_opsetid("", FLOOR))
    score = _append_chain(extended.graph, source, chain, f"{output}/{head}", set(producers)) if chain else source
    if score not in {value.name for value in extended.graph.output}:
        extended.graph.output.append(_score_info(extended, score, output))
    return extended, score


def _before_activation(model: onnx.ModelProto, output: str, head: str) -> tuple[str, Chain] | None:
    """The head on what stands before the activation in which the output ends, followed by what rearranges the output;
    None where there is no such head or activation.
    """
    found = final_activation(model, output) if head in HEADS_BEFORE_ACTIVATION else None
    if found is None:
        return None
    own = HEADS_BEFORE_ACTIVATION[head][found.operator](attributes_of(found.node))
    chain = [*own, *map(_repeated, found.behind)]
    is_input = found.source in {value.name for value in model.graph.input}
    return found.source, chain or [Step("Identity")] * is_input


def _repeated(node: NodeProto) -> Step:
    return Step(node.op_type, attributes_of(node), tuple(node.input[1:]))


def _on_output(model: onnx.ModelProto, output: str, head: str, axis: int) -> tuple[str, Chain]:
    if head not in HEADS:
        raise ValueError(f"tensor '{output}' does not end in a softmax or sigmoid")
    return output, _over_last_axis(model, output, HEADS[head](axis))


def _over_last_axis(model: onnx.ModelProto, output: str, chain: Chain) -> Chain:
    """The chain with its Softmax between two transpositions that make the class axis the last one, in operator sets
    where Softmax runs over all axes from the given one on.
    """
    axis = chain[0].attributes.get("axis", -1) if chain else -1
    if axis == -1 or (version_of(model) or FLOOR) >= SINGLE_AXIS_SOFTMAX:
        return chain
    kind = _declared_type(model, output)
    if kind is None or not kind.tensor_type.HasField("shape"):
        raise ValueError(f"tensor '{output}' declares no shape, which a softmax over its axis {axis} needs")
    exchanged = list(range(len(kind.tensor_type.shape.dim)))
    exchanged[axis], exchanged[-1] = exchanged[-1], exchanged[axis]
    over_last = [step._replace(attributes={"axis": -1}) for step in chain]
    transposition = [] if exchanged == sorted(exchanged) else [Step("Transpose", {"perm": exchanged})]
    return [*transposition, *over_last, *transposition]


def _append_chain(graph: onnx.GraphProto, source: str, chain: Chain, hint: str, taken: set[str]) -> str:
    for position, step in enumerate(chain):
        name = hint if position == len(chain) - 1 else f"{hint}/{step.operator}_{position}"
        while name in taken:
            name += "_"
        taken.add(name)
        sources = [source, *step.parameters]
        graph.node.append(helper.make_node(step.operator, sources, [name], name=name, **step.attributes))
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
