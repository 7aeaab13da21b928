"""Operators that are made of others, replaced by what they are made of where they have no rule of their own.

ONNX defines some operators by function bodies; compositions of the rule table define more. A choice whose condition is
constant is made of one of its branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import onnx
from onnx import FunctionProto, NodeProto, TensorProto, defs, helper

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.graph import Graph, consumed
from explainserve.onnx_vjp.path import live_path, state_in
from explainserve.onnx_vjp.registry import Composition, Refusal, Table, canonical_domain, standard
from explainserve.onnx_vjp.subgraphs import is_standard, rename, subgraphs
from explainserve.onnx_vjp.unrolling import unrolled


def expand(graph: Graph, wrt: Sequence[str], of: Sequence[str], table: Table) -> Mapping[str, Refusal]:
    """Replace, until none is left, every node of the live path that has a composition in `table`, or no state there
    but a function body; beside the path, the compositions through which shape inference does not see, and those that
    lay out their values otherwise.

    Returns the compositions that refuse a node, by the name of its first output.
    """
    while True:
        once = _expanded_once(graph, {id(node) for node in live_path(graph, wrt, of, table).nodes}, table)
        if not once.replaced:
            return once.refusals
        graph.rewrite(once.nodes)
        if once.opened:
            graph.infer_again()


class _Expansion(NamedTuple):
    """The nodes of a graph after a look at each; whether any was replaced, and any that shape inference did not see
    through; and what refuses, by the name of its first output.
    """

    nodes: list[NodeProto]
    replaced: bool
    opened: bool
    refusals: dict[str, Refusal]


def _expanded_once(graph: Graph, on_path: Set[int], table: Table) -> _Expansion:
    """One round of `expand`. `on_path` holds the identities of the nodes of the live path."""
    refusals: dict[str, Refusal] = {}
    nodes: list[NodeProto] = []
    replaced = opened = False
    for node in graph.nodes:
        if opened and _is_opaque(graph, node):
            graph.register(node)
        blocks = _is_opaque(graph, node)
        wanted = id(node) in on_path or _concerns_all(graph, node, table, blocks)
        parts = _chosen(graph, node) or _counted_by_scalars(graph, node)
        if parts is None and wanted:
            parts = unrolled(graph, node) or _replacement(graph, node, table, refusals)
        replaced |= parts is not None
        opened |= parts is not None and blocks
        nodes += [node] if parts is None else parts
    return _Expansion(nodes, replaced, opened, refusals)


def _chosen(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """The branch that a constant condition takes, in place of its If node."""
    condition = graph.constant(node.input[0]) if is_standard(node, "If") else None
    if condition is None:
        return None
    taken = "then_branch" if condition.any() else "else_branch"
    branch = next((attribute.g for attribute in node.attribute if attribute.name == taken), None)
    if branch is None:
        raise ValueError(f"If '{node.name or next(iter(node.output), '')}' has no {taken}")
    for tensor in branch.initializer:
        graph.adopt(tensor)
    results = zip(branch.output, node.output, strict=False)
    parts = [*branch.node, *(helper.make_node("Identity", [inner.name], [name]) for inner, name in results if name)]
    for part in parts:
        graph.register(part)
    return parts


def _counted_by_scalars(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """A Range of scalars in place of one of vectors that hold one number each.

    onnx's function body of AffineGrid has them. onnxruntime takes them as long as it does not know their shape, as
    behind an If that is replaced here by its branch.
    """
    if not is_standard(node, "Range") or not any(graph.shape(name) == (1,) for name in node.input):
        return None
    numbers = [graph.fresh(f"{name}/number") for name in node.input]
    parts = [helper.make_node("Squeeze", [name], [number]) for name, number in zip(node.input, numbers, strict=True)]
    parts.append(helper.make_node("Range", numbers, node.output, node.name))
    for part in parts:
        graph.register(part)
    return parts


def make_readable(graph: Graph) -> None:
    """Make each tensor one that can be read by itself: replace every node whose values are laid out otherwise than
    their shapes say, and every composition of whose outputs shape inference does not find the types. Raises ValueError
    where one cannot be laid out plainly; an output whose type nothing tells is left without.
    """
    nodes: list[NodeProto] = []
    replaced = False
    for node in graph.nodes:
        parts = _readable(graph, node)
        replaced |= parts is not None
        nodes += [node] if parts is None else parts
    if replaced:
        graph.rewrite(nodes)
        graph.infer_again()


def _readable(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """What replaces a node of which an output could not be read by itself, or None."""
    state = state_in(standard(), graph, node)
    everywhere = isinstance(state, Composition) and state.everywhere
    if not everywhere and _is_opaque(graph, node):
        graph.register(node)  # what it reads may be known by now
    untyped = any(name and graph.dtype(name) == TensorProto.UNDEFINED for name in node.output)
    if not isinstance(state, Composition) or not (everywhere or untyped):
        return None
    try:
        return _composed(graph, node, state)
    except Refusal as refusal:
        if everywhere:
            raise ValueError(f"{node.op_type} '{node.output[0]}': {refusal.reason}; {refusal.remedy}") from refusal
        return None


def _replacement(graph: Graph, node: NodeProto, table: Table, refusals: dict[str, Refusal]) -> list[NodeProto] | None:
    state = state_in(table, graph, node)
    if isinstance(state, Composition):
        try:
            return _composed(graph, node, state)
        except Refusal as refusal:
            refusals[node.output[0]] = refusal
            return None
    body = _body(graph, node) if state is None else None
    return _instance(graph, node, body) if body else None


def _concerns_all(graph: Graph, node: NodeProto, table: Table, opaque: bool) -> bool:
    """Whether a node beside the path matters to it. One that reads stored tensors only is the runtime's to fold, and
    what is read from a sequence may say how often a Loop runs.
    """
    state = state_in(table, graph, node)
    stored = all(name in graph.initializers for name in node.input if name)
    takes_apart = any(graph.dtype(name) == TensorProto.UNDEFINED for name in node.input if name)
    return isinstance(state, Composition) and (state.everywhere or opaque or takes_apart) and not stored


def _is_opaque(graph: Graph, node: NodeProto) -> bool:
    """Whether shape inference does not see through the operator, so that all behind it is unknown too."""
    return any(graph.dtype(n) == TensorProto.UNDEFINED or graph.shape(n) is None for n in node.output if n)


def _composed(graph: Graph, node: NodeProto, state: Composition) -> list[NodeProto]:
    around = graph.nodes
    with graph.collecting() as nodes:
        values = state.formula(Emitter(graph), Node(node, frozenset()))
        written = {name: value for name, value in zip(node.output, values, strict=False) if name and value}
        _check_unused(graph, [name for name in node.output if name and name not in written], around)
        for name, value in written.items():
            graph.append(helper.make_node("Identity", [value], [name], name=graph.fresh(f"{name}/composed")))
        return nodes


def _check_unused(graph: Graph, names: Sequence[str], nodes: Sequence[NodeProto]) -> None:
    used = {name for node in nodes for name in consumed(node)} if names else set()
    used |= {value.name for value in graph.proto.graph.output}
    for name in names:
        if name in used:
            raise Refusal(
                f"its output '{name}' cannot be written in standard operators", "remove the use of that output"
            )


def _body(graph: Graph, node: NodeProto) -> FunctionProto | None:
    """The function body for the graph's operator set, or None where the operator is primitive."""
    version = graph.version(node)
    try:
        # The published type stubs of onnx do not know the function members of a schema.
        schema: Any = defs.get_schema(node.op_type, version, node.domain)
    except defs.SchemaError:
        return None
    if schema.has_function:
        return _parsed(schema.get_function_with_opset_version(_newest(schema.function_opset_versions, version)), schema)
    if schema.has_context_dependent_function:
        types = [graph.shapes.type_proto(name).SerializeToString() if name else b"" for name in node.input]
        chosen = _newest(schema.context_dependent_function_opset_versions, version)
        body = schema.get_context_dependent_function_with_opset_version(chosen, node.SerializeToString(), types)
        return _parsed(body, schema)
    return None


def _newest(versions: Sequence[int], limit: int) -> int:
    return max((version for version in versions if version <= limit), default=min(versions))


def _parsed(serialized: bytes, schema: Any) -> FunctionProto | None:
    """The body with the schema's default values, which it leaves out."""
    body = FunctionProto.FromString(serialized)
    defaults = (attribute.default_value for attribute in schema.attributes.values())
    body.attribute_proto.extend(value for value in defaults if value.name)
    return body if body.node else None


def _instance(graph: Graph, node: NodeProto, body: FunctionProto) -> list[NodeProto]:
    """The nodes of a body with the caller's tensors and attributes in place of the formal ones."""
    names = dict(zip(body.input, [*node.input, *[""] * (len(body.input) - len(node.input))], strict=True))
    names.update((formal, actual) for formal, actual in zip(body.output, node.output, strict=False) if actual)
    attributes = {attribute.name: attribute for attribute in (*body.attribute_proto, *node.attribute)}
    label = node.name or node.output[0]
    for entry in body.opset_import:
        graph.opsets.setdefault(canonical_domain(entry.domain), entry.version)
    parts = []
    for inner in body.node:
        part = NodeProto(
            op_type=inner.op_type, domain=inner.domain, name=graph.fresh(f"{label}/{inner.name or inner.op_type}")
        )
        part.input.extend(names[name] if name else "" for name in inner.input)
        names.update((name, graph.fresh(f"{label}/{name}")) for name in inner.output if name and name not in names)
        part.output.extend(names[name] if name else "" for name in inner.output)
        part.attribute.extend(_bound(inner, attributes))
        for within in subgraphs(part):
            rename(within, names, lambda name: graph.fresh(f"{label}/{name}"))
        graph.register(part)
        parts.append(part)
    return parts


def _bound(node: NodeProto, actual: dict[str, onnx.AttributeProto]) -> list[onnx.AttributeProto]:
    """A body node's attributes, references to the function's own resolved; a reference to one that is not set is
    dropped.
    """
    bound = []
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            bound.append(_bound_within(attribute, actual))
        elif attribute.ref_attr_name in actual:
            resolved = onnx.AttributeProto()
            resolved.CopyFrom(actual[attribute.ref_attr_name])
            resolved.name = attribute.name
            bound.append(resolved)
    return bound


def _bound_within(attribute: onnx.AttributeProto, actual: dict[str, onnx.AttributeProto]) -> onnx.AttributeProto:
    """An attribute whose subgraph, where it has one, has its own nodes' references resolved."""
    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    for node in copy.g.node:
        resolved = _bound(node, actual)
        del node.attribute[:]
        node.attribute.extend(resolved)
    return copy
