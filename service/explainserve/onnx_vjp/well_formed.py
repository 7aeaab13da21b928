"""Whether a graph keeps the rules of ONNX, asked before anything is built on it.

A misshapen node has no shape to differentiate by, and what is built on it does not load. ONNX's own inference, taken
strictly, says which node it is and why; runtimes refuse files by the same code, so that none is refused here that runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import GraphProto, NodeProto, helper

from explainserve.onnx_vjp.shapes import skeleton, stand_in
from explainserve.onnx_vjp.subgraphs import is_standard, subgraphs

_INFERENCE_ERROR = re.compile(r"^.*\(op_type:(\w+)(?:, node name: (.*?))?\): (?:\[\w+\] )?(.*)$", re.MULTILINE)
_EXCUSED = re.compile(
    r"expected to have type but instead is null$|^Ellipsis for input \d+ represents \d+ dimensions, but"
    r"|^Number of elements of input 'sizes' \(0\)"
)
"""Said of a node whose input has no type, which is not its own fault; of an Einsum whose ellipses broadcast, which
runtimes evaluate; and of a Resize whose number of sizes is not known."""

Sizes = Sequence[int | None]


def check_well_formed(model: onnx.ModelProto) -> None:
    """Raises ValueError for a graph whose nodes do not follow one another, or whose operators do not take the types
    and shapes that they get; every node that is wrong is named.
    """
    wrong = list(_misplaced(model.graph, ())) or list(_misshapen(model))
    if wrong:
        raise ValueError(f"the graph is malformed: {'; '.join(wrong)}")


def _misplaced(graph: GraphProto, outer: tuple[set[str], ...]) -> Iterator[str]:
    """What nodes read before it is there, and what they write a second time; `outer` has the names around a body."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known.update(tensor.values.name for tensor in graph.sparse_initializer)
    scopes = (known, *outer)
    for node in graph.node:
        unknown = [name for name in node.input if name and not any(name in scope for scope in scopes)]
        if unknown:
            yield f"{_named(node)}: it reads '{unknown[0]}', which no node before it writes"
        for inner in subgraphs(node):
            yield from _misplaced(inner, scopes)
        twice = {name for scope in scopes for name in scope.intersection(node.output)} - {""}
        if twice:
            yield f"{_named(node)}: it writes '{min(twice)}', which is there already"
        known.update(node.output)
    yield from (f"no node writes '{value.name}'" for value in graph.output if not any(value.name in s for s in scopes))


def _misshapen(model: onnx.ModelProto) -> Iterator[str]:
    """What inference says of nodes whose types or shapes do not fit. Of operators that are not ONNX's own it knows
    nothing, nor of what reads from them.
    """
    reduced = skeleton(model, (node if node.domain else stand_in(node) for node in model.graph.node))
    for node in reduced.graph.node:
        node.name = node.name or next(iter(node.output), "")
    for value, declared in zip(reduced.graph.output, model.graph.output, strict=True):
        if declared.type.tensor_type.elem_type:
            value.type.tensor_type.elem_type = declared.type.tensor_type.elem_type
    try:
        inferred = onnx.shape_inference.infer_shapes(reduced, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        for operator, name, reason in _INFERENCE_ERROR.findall(str(error)):
            if not _EXCUSED.search(reason):
                yield f"{operator} '{name}': {reason}"
    else:
        yield from _overlooked(inferred.graph)


def _named(node: NodeProto) -> str:
    return f"{node.op_type} '{node.name or next(iter(node.output), '')}'"


# -- what inference lets through --------------------------------------------------------------------------------------


def _overlooked(graph: GraphProto) -> Iterator[str]:
    """What runtimes refuse, some only when they evaluate it."""
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes = {value.name: _sizes(value) for value in values if value.type.tensor_type.HasField("shape")}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        check = _CHECKS.get(node.op_type)
        known = [shapes[name] for name in node.input if name in shapes]
        if check is not None and is_standard(node, node.op_type) and len(known) == len(node.input):
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            yield from (f"{_named(node)}: {reason}" for reason in [check(attributes, *known)] if reason)


def _sizes(value: onnx.ValueInfoProto) -> Sizes:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]


def _transpose(attributes: Mapping[str, Any], x: Sizes) -> str:
    perm = attributes.get("perm")
    return f"perm {perm} is no order of {len(x)} axes" if perm and sorted(perm) != list(range(len(x))) else ""


def _layer_normalization(attributes: Mapping[str, Any], x: Sizes, *_: Sizes) -> str:
    axis = attributes.get("axis", -1)
    return "" if -len(x) <= axis < len(x) else f"axis {axis} is none of {len(x)}"


def _conv(attributes: Mapping[str, Any], x: Sizes, kernel: Sizes, *_: Sizes) -> str:
    group = attributes.get("group", 1)
    return _channels(x[1], None if kernel[1] is None else kernel[1] * group)


def _conv_transpose(attributes: Mapping[str, Any], x: Sizes, kernel: Sizes, *_: Sizes) -> str:
    return _channels(x[1], kernel[0])


def _channels(given: int | None, taken: int | None) -> str:
    differ = given is not None and taken is not None and given != taken
    return f"its input has {given} channels, its weights are for {taken}" if differ else ""


_CHECKS: Mapping[str, Callable[..., str]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "LayerNormalization": _layer_normalization,
    "Transpose": _transpose,
}
"""By operator: what is wrong with a node, given its attributes and the shapes of its inputs; "" where nothing is."""
