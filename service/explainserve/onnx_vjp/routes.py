"""By which routes the values of an input reach the outputs, and which tensors all of them pass through.

A route follows every operator but those that read sizes or types alone. A tensor t is on every route from an input
exactly when, in topological order, no other tensor that depends on the input is still to be read once t is there: an
ancestor that is read later would lead around t.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from onnx import NodeProto

from explainserve.onnx_vjp.graph import consumed
from explainserve.onnx_vjp.registry import canonical_domain

# How many inputs have their values read, of operators that read the sizes or types of the others alone.
_VALUES = {"Shape": 0, "Size": 0, "EyeLike": 0, "RandomNormalLike": 0, "RandomUniformLike": 0, "CastLike": 1}


def dependents(nodes: Sequence[NodeProto], source: str) -> set[str]:
    """`source` and every tensor that depends on its values."""
    found = {source}
    for node in nodes:
        if found.intersection(values_read(node)):
            found.update(name for name in node.output if name)
    return found


def bottlenecks(nodes: Sequence[NodeProto], source: str, outputs: Collection[str]) -> set[str]:
    """The tensors that every route from `source` to any of `outputs` passes through; `source` is one of them."""
    route = _on_route(nodes, dependents(nodes, source), outputs)
    pending = dict.fromkeys(route, 0) | dict.fromkeys(route.intersection(outputs), 1)
    for node in nodes:
        for name in _read_on_route(node, route):
            pending[name] += 1
    found, waiting = ({source} if source in route else set()), {source} & route
    for node in nodes:
        written = route.intersection(node.output)
        if not written:
            continue
        for name in _read_on_route(node, route):
            pending[name] -= 1
            if not pending[name]:
                waiting.discard(name)
        waiting |= written
        if len(waiting) == 1:
            found |= waiting
    return found


def around(nodes: Sequence[NodeProto], source: str, outputs: Collection[str], cut: Collection[str]) -> tuple[str, ...]:
    """The tensors of one route from `source` to an output that passes no tensor of `cut`; empty where there is none."""
    parents: dict[str, str] = {}
    for node in nodes:
        before = next((name for name in values_read(node) if name == source or name in parents), None)
        if before is not None:
            parents.update((name, before) for name in node.output if name and name not in cut)
    end = next((name for name in outputs if name in parents), None)
    return tuple(reversed(list(_back(parents, end, source)))) if end and source not in cut else ()


def values_read(node: NodeProto) -> list[str]:
    """The tensors whose values, not only sizes or types, a node reads."""
    count = _VALUES.get(node.op_type) if canonical_domain(node.domain) == "" else None
    return consumed(node)[:count]


def _back(parents: dict[str, str], name: str, source: str) -> Iterator[str]:
    while name != source:
        yield name
        name = parents[name]
    yield source


def _on_route(nodes: Sequence[NodeProto], dependent: set[str], outputs: Collection[str]) -> set[str]:
    route = dependent.intersection(outputs)
    for node in reversed(nodes):
        if route.intersection(node.output):
            route |= dependent.intersection(values_read(node))
    return route


def _read_on_route(node: NodeProto, route: set[str]) -> set[str]:
    return route.intersection(values_read(node)) if route.intersection(node.output) else set()
