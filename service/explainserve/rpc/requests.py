"""Explain requests to nouns, checked against a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from explainserve.errors import InvalidRequest, LimitExceeded
from explainserve.figures import FigureOptions, Group, Region, check_regions
from explainserve.query import Query
from explainserve.rpc.enumerations import looked_up
from explainserve.rpc.request_baselines import baselines
from explainserve.rpc.request_figures import figure_options, groups, regions
from explainserve.rpc.request_inputs import inputs, instances, leaves_range
from explainserve.rpc.request_methods import methods
from explainserve.rpc.request_subjects import input_subject, layer_subject, moving_inputs
from explainserve.rpc.request_targets import targets
from explainserve.scheduling import Request
from explainserve.served_model import ServedModel
from explainserve.settings import Settings
from explainserve.v1 import (
    baseline_pb2,
    explainer_service_pb2,
)

FOLDS: dict[int, bool] = {
    baseline_pb2.BASELINE_REDUCTION_UNSPECIFIED: False,
    baseline_pb2.BASELINE_REDUCTION_EACH: False,
    baseline_pb2.BASELINE_REDUCTION_MEAN: True,
}


@dataclass(frozen=True, eq=False)
class Explain:
    """A checked Explain request.

    Attributes:
        fold_baselines: whether maps come back as their mean over baselines.
        out_of_range: names of inputs with values outside the stated value range.
    """

    query: Query
    regions: tuple[Region, ...]
    groups: tuple[Group, ...]
    figures: FigureOptions
    fold_baselines: bool
    options: explainer_service_pb2.ResponseOptions
    out_of_range: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one instance's explained inputs; of layers, the inputs that they are computed from."""
        return {name: array.shape for name, array in self.query.instances[0].moving.items()}


def explain(
    message: explainer_service_pb2.ExplainRequest,
    model: ServedModel,
    settings: Settings,
    arrived: float,
    deadline: float,
) -> Explain:
    """Decodes and checks a request.

    Args:
        arrived: time of `time.monotonic` from which its time budget counts.
        deadline: time of `time.monotonic` after which its rows are dropped.

    Raises:
        InvalidRequest, LimitExceeded, NotFound, Unimplemented, Unsupported: with the reason.
    """
    _check_part_counts(message, settings.max_request_parts)
    arrays = inputs(message.inputs, model.signature, settings)
    layers = tuple(dict.fromkeys(message.layers))
    moving = moving_inputs(model, message.fixed_inputs, explains_layers=bool(layers))
    given = instances(arrays, model.signature, moving)
    subject = layer_subject(model, layers, arrays) if layers else input_subject(model, given[0])
    query = Query(
        model=model,
        instances=given,
        targets=targets(message.targets, model),
        baselines=baselines(message.baselines, model, subject),
        methods=methods(message.methods, model, subject, settings),
        subject=subject,
        request=Request(priority=_priority(message.priority), expires_at=deadline),
        budget_ends_at=_budget_end(message, arrived),
    )
    _check_instance_indices(message, len(query.instances))
    return Explain(
        query=query,
        regions=tuple(check_regions(regions(message.regions), subject, query.methods)),
        groups=groups(message.groups),
        figures=figure_options(message.response_options),
        fold_baselines=looked_up(FOLDS, message.baseline_reduction, "baseline_reduction"),
        options=message.response_options,
        out_of_range=tuple(spec.name for spec in model.signature.inputs if leaves_range(arrays[spec.name], spec)),
    )


def _priority(value: int) -> int:
    if not -10 <= value <= 10:
        raise InvalidRequest("PRIORITY_OUT_OF_RANGE", f"priority {value} is not in [-10, 10]", priority=value)
    return value


def _budget_end(message: explainer_service_pb2.ExplainRequest, arrived: float) -> float | None:
    if not message.HasField("time_budget"):
        return None
    seconds = message.time_budget.seconds + message.time_budget.nanos / 1e9
    if seconds <= 0:
        raise InvalidRequest("TIME_BUDGET_INVALID", f"time_budget {seconds} s is not positive", seconds=seconds)
    return arrived + seconds


def _check_part_counts(message: explainer_service_pb2.ExplainRequest, limit: int) -> None:
    """Before anything else: parts are cheap to send, and what follows looks at each of them."""
    counts = {name: len(getattr(message, name)) for name in ("methods", "targets", "baselines", "regions", "groups")}
    counts["selectors"] = sum(len(group.selectors) for group in message.groups)
    for part, count in counts.items():
        if count > limit:
            raise LimitExceeded(
                "TOO_MANY_PARTS",
                f"{count} {part} are above the limit of {limit}",
                part=part,
                count=count,
                limit=limit,
            )


def _check_instance_indices(message: explainer_service_pb2.ExplainRequest, count: int) -> None:
    parts: list[Any] = [*message.targets, *message.baselines, *message.regions]
    for part in parts:
        if part.HasField("instance_index") and not 0 <= part.instance_index < count:
            raise InvalidRequest(
                "INSTANCE_INDEX_OUT_OF_RANGE",
                f"instance_index {part.instance_index} is not in [0, {count})",
                instance_index=part.instance_index,
                count=count,
            )
