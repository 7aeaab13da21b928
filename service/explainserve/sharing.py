"""Plans that share forward passes: rows at the same points are evaluated once, for the selectors of all plans.

Plans of several targets of one instance and baseline move along the same path. Segments with the same ends and rows
become one segment with the selectors of all of them, each selector once. What comes back is dealt out again, so that a
plan gets what it would have got alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from explainserve.plan import Evaluation, Plan, Segment, Selector, Tensors


@dataclass(frozen=True, eq=False)
class SharedPlan:
    """Several plans as one.

    Attributes:
        plan: their rows, each once.
        places: for each of them the positions in the evaluation of `plan` where its own evaluations are.
    """

    plan: Plan
    places: tuple[tuple[int, ...], ...]

    def dealt(self, evaluation: Evaluation) -> tuple[Evaluation, ...]:
        """The evaluation of each plan."""
        found = evaluation.segments
        return tuple(Evaluation(tuple(found[position] for position in own)) for own in self.places)


def shared(plans: Sequence[Plan]) -> SharedPlan:
    """Makes one plan of several. The arrays at the ends of segments are the same if they are the same objects."""
    rows = {_row_key(segment): segment for plan in plans for segment in plan.segments}
    selectors: dict[Hashable, dict[Hashable, Selector]] = {key: {} for key in rows}
    for plan in plans:
        for segment in plan.segments:
            selectors[_row_key(segment)].update({_selector_key(selector): selector for selector in segment.selectors})
    merged = [replace(segment, selectors=tuple(selectors[key].values())) for key, segment in rows.items()]
    places = {place: i for i, place in enumerate(place for segment in merged for place in _places(segment))}
    return SharedPlan(
        Plan(tuple(merged)),
        tuple(tuple(places[place] for segment in plan.segments for place in _places(segment)) for plan in plans),
    )


def _places(segment: Segment) -> list[Hashable]:
    """What each evaluation of a segment is of."""
    rows = _row_key(segment)
    return [(rows, _selector_key(selector)) for selector in segment.selectors] or [rows]


def _row_key(segment: Segment) -> Hashable:
    """Equal for segments whose rows are the same points, evaluated for the same kind of answer."""
    return (
        *map(_identity, (segment.start, segment.end, segment.fixed)),
        segment.function,
        segment.alphas.tobytes(),
        segment.weights.tobytes(),
        bool(segment.selectors),
    )


def _identity(tensors: Tensors) -> Hashable:
    return tuple((name, id(array)) for name, array in tensors.items())


def _selector_key(selector: Selector) -> Hashable:
    return selector.indices.tobytes(), selector.weights.tobytes()
