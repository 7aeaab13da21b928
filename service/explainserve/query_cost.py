"""What a query costs on an idle server, stated before anything is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from explainserve.methods import Method
from explainserve.plan import Differentiation
from explainserve.query import MAX_SHARING_TARGETS, Query
from explainserve.targets import TargetSpec, certain_target_count


@dataclass(frozen=True)
class Cost:
    """Rows and backward passes of a query on an idle server.

    Attributes:
        question_count: attributions before baselines are folded.
        end_point_rows: forward-only rows.
        min_forward_rows, max_forward_rows: forward-only rows of methods that evaluate some.
        min_gradient_rows: if targets that may share rows share all of them.
        max_gradient_rows: if they share only those that are the same for every target.
        min_backward_count: if targets that may turn out to be the same one do.
        max_backward_count: if they do not.
        case_count: cases (instance, target, baseline) whose rounds are in flight together.
        held_bytes: memory of inputs, baselines and maps; see `Query.held_bytes`.
        path_bytes: memory of all paths in flight, at most.
        score_bytes: memory of the score tensors at the end points, axes of free extent counted as 1.
    """

    question_count: int
    end_point_rows: int
    min_forward_rows: int
    max_forward_rows: int
    min_gradient_rows: int
    max_gradient_rows: int
    min_backward_count: int
    max_backward_count: int
    case_count: int
    held_bytes: int
    path_bytes: int
    score_bytes: int

    @property
    def host_bytes(self) -> int:
        """Most memory on the host at once, beside the model."""
        return self.held_bytes + self.path_bytes + self.score_bytes

    @property
    def min_rows(self) -> int:
        """Fewest rows, each with one forward pass."""
        return self.end_point_rows + self.min_forward_rows + self.min_gradient_rows

    @property
    def max_rows(self) -> int:
        """Most rows."""
        return self.end_point_rows + self.max_forward_rows + self.max_gradient_rows


def sharing_limit(case_count: int) -> int:
    """Most targets that share rows: their paths are in flight together."""
    return min(MAX_SHARING_TARGETS, case_count)


def cost_of(query: Query, end_point_rows: int, case_count: int) -> Cost:
    """What a query costs.

    Args:
        end_point_rows: forward-only rows at the ends of its paths.
        case_count: cases whose rounds are in flight together.
    """
    limit = sharing_limit(case_count)
    paths = [
        (method.cost(query.subject), path)
        for method in query.methods
        for index in range(len(query.instances))
        for path in _paths(query, method, index, limit)
    ]
    return Cost(
        question_count=query.question_count,
        end_point_rows=end_point_rows,
        min_forward_rows=sum(one.min_forward_rows * p.count * p.groups for one, p in paths),
        max_forward_rows=sum(one.max_forward_rows * p.count * p.groups for one, p in paths),
        min_gradient_rows=sum(one.min_gradient_rows * p.count * p.groups for one, p in paths),
        max_gradient_rows=sum(
            one.common_gradient_rows * p.count * p.groups
            + (one.max_gradient_rows - one.common_gradient_rows) * p.count * p.targets
            for one, p in paths
        ),
        min_backward_count=sum(one.min_gradient_rows * p.count * p.certain_targets for one, p in paths),
        max_backward_count=sum(one.max_gradient_rows * p.count * p.targets for one, p in paths),
        case_count=case_count,
        held_bytes=query.held_bytes,
        path_bytes=case_count * query.case_bytes,
        score_bytes=end_point_rows * max(spec.output_bytes(query.model.signature) for spec in query.targets),
    )


@dataclass(frozen=True)
class _Paths:
    """Paths of one method to one instance, under one function.

    Attributes:
        count: number of baselines, or 1 where the method needs none.
        targets: number of targets, of which `certain_targets` certainly differ.
        groups: of targets that share rows.
    """

    count: int
    targets: int
    certain_targets: int
    groups: int


def _paths(query: Query, method: Method, instance_index: int, sharing_limit: int) -> Iterator[_Paths]:
    specs: dict[Differentiation, list[TargetSpec]] = {}
    for spec in query.scored_targets_of(method, instance_index):
        specs.setdefault(spec.function(query.model.signature), []).append(spec)
    for own in specs.values():
        target_count = sum(spec.target_count for spec in own)
        groups = -(-target_count // sharing_limit)
        yield _Paths(query.path_count_of(method, instance_index), target_count, certain_target_count(own), groups)
