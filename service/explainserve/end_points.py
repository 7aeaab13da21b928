"""The forward-only rows at the ends of all paths of a query, each distinct one once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Instance
from explainserve.plan import Differentiation, Plan, Segment, SegmentEvaluation, Tensors
from explainserve.query import Baselines, Query


@dataclass(frozen=True, eq=False)
class EndPoints:
    """Forward-only rows of all instances and baselines, each distinct one once.

    Attributes:
        plan: one segment per row.
        positions: in the plan, by (function, instance, baseline or None for the instance itself).
    """

    plan: Plan
    positions: dict[tuple[Differentiation, int, int | None], int]


def first_points(query: Query, baselines: Baselines) -> EndPoints:
    """What is evaluated first: the ends of all paths, or where layers are explained what gives their values there."""
    return distinct_taps(query, baselines) if query.subject.cut else distinct_end_points(query, baselines)


def first_rows(query: Query, baselines: Baselines, first: EndPoints) -> int:
    """Rows at the ends of all paths; where layers are explained, those that give their values there come on top.

    Args:
        first: as `first_points` gives them.
    """
    if not query.subject.cut:
        return first.plan.row_count
    behind = replace(query, instances=tuple(map(_kept_beside_layers, query.instances)))
    stated = tuple(
        tuple(replace(one, moving={**one.moving, **one.layers}) for one in of_instance) for of_instance in baselines
    )
    return first.plan.row_count + distinct_end_points(behind, stated).plan.row_count


def _kept_beside_layers(instance: Instance) -> Instance:
    """Inputs keep the instance's values beside layers, so rows of different instances differ even at one baseline."""
    return Instance(instance.moving, {f"{name} beside layers": array for name, array in instance.moving.items()})


def distinct_taps(query: Query, baselines: Baselines) -> EndPoints:
    """Rows at the instances and baselines of the inputs that give the values of the layers."""
    return _points(query, baselines, lambda _: [query.tap])


def distinct_end_points(query: Query, baselines: Baselines) -> EndPoints:
    """Rows at the ends of all paths that give their scores."""
    return _points(query, baselines, query.functions_of)


def _points(query: Query, baselines: Baselines, functions_of: Callable[[int], Sequence[Differentiation]]) -> EndPoints:
    points: dict[tuple[Differentiation, bytes], Segment] = {}
    wanted: dict[tuple[Differentiation, int, int | None], tuple[Differentiation, bytes]] = {}
    for i, instance in enumerate(query.instances):
        functions = functions_of(i)
        ends: dict[int | None, Tensors] = {None: instance.moving, **{b: e.moving for b, e in enumerate(baselines[i])}}
        for b, moving in ends.items():
            identity = _identity(moving, instance.fixed)
            for function in functions:
                wanted[function, i, b] = function, identity
                points.setdefault((function, identity), point(moving, instance.fixed, function))
    place = {key: position for position, key in enumerate(points)}
    return EndPoints(Plan(tuple(points.values())), {end: place[key] for end, key in wanted.items()})


def end_point_bound(query: Query) -> int:
    """End points if all were distinct."""
    return sum(
        (len(query.functions_of(index)) + bool(query.subject.cut)) * (1 + query.baseline_count(index))
        for index in range(len(query.instances))
    )


def point(moving: Tensors, fixed: Tensors, function: Differentiation) -> Segment:
    """One forward-only row."""
    return Segment(moving, moving, fixed, function, np.ones(1), np.zeros(1))


def _identity(moving: Tensors, fixed: Tensors) -> bytes:
    """Digest of all inputs of one row."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, array in sorted({**fixed, **moving}.items()):
        hashed.update(f"{name}{array.dtype.str}{array.shape}".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.digest()


def score_tensor(evaluation: SegmentEvaluation) -> NDArray[np.generic]:
    """The score tensor of a one-row forward-only segment."""
    assert evaluation.outputs is not None, "A forward-only segment came back without outputs. This is a bug."
    output: NDArray[np.generic] = evaluation.outputs[0]
    return output
