"""By which routes the values of an input reach the outputs, and which tensors they lead around.

A route follows every operator but those that read sizes or types alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce

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


def outputs_reached(nodes: Sequence[NodeProto], outputs: Collection[str]) -> dict[str, set[str]]:
    """The outputs that depend on the values of each tensor; no entry, or an empty one, where none does."""
    reached = {name: {name} for name in outputs}
    for node in reversed(nodes):
        found = set().union(*(reached.get(name, ()) for name in node.output))
        for name in values_read(node):
            reached.setdefault(name, set()).update(found)
    return reached


def bypassed(nodes: Sequence[NodeProto], source: str, reached: Mapping[str, Collection[str]]) -> set[str]:
    """The tensors that depend on `source`, while a route from it to one of the outputs that they reach leads around
    them. `reached` is what `outputs_reached` finds.
    """
    dominators = _immediate_dominators(nodes, source)
    ends = {name for names in reached.values() for name in names}.intersection(dominators)
    dominated = Counter(name for end in ends for name in _back(dominators, end, source))
    return {name for name in dominators if dominated[name] < len(reached.get(name, ()))}


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


def _immediate_dominators(nodes: Sequence[NodeProto], source: str) -> dict[str, str]:
    """For each tensor that depends on `source`, the last one before it that every route from `source` to it passes.

    As Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001), of which one sweep is enough where
    nothing is cyclic.
    """
    dominators, depths = {source: source}, {source: 0}

    def common(one: str, other: str) -> str:
        while one != other:
            if depths[one] < depths[other]:
                one, other = other, one
            one = dominators[one]
        return one

    for node in nodes:
        read = [name for name in values_read(node) if name in depths]
        if read:
            last = reduce(common, read)
            dominators.update((name, last) for name in node.output if name)
            depths.update((name, depths[last] + 1) for name in node.output if name)
    return dominators


def _back(parents: Mapping[str, str], name: str, source: str) -> Iterator[str]:
    """A tensor and its parents, up to `source`."""
    while name != source:
        yield name
        name = parents[name]
    yield source
