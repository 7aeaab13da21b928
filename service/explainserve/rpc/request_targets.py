"""The targets of a request."""

from __future__ import annotations

from collections.abc import Sequence

from explainserve import targets as domain_targets
from explainserve.errors import InvalidRequest
from explainserve.rpc.enumerations import looked_up
from explainserve.rpc.tensors import decode_floats
from explainserve.served_model import ServedModel
from explainserve.signature import Score
from explainserve.v1 import target_pb2

SCORES: dict[int, Score] = {
    target_pb2.SCORE_UNSPECIFIED: Score.OUTPUT,
    target_pb2.SCORE_OUTPUT: Score.OUTPUT,
    target_pb2.SCORE_LOGIT: Score.LOGIT,
    target_pb2.SCORE_PROBABILITY: Score.PROBABILITY,
    target_pb2.SCORE_LOG_PROBABILITY: Score.LOG_PROBABILITY,
}
REDUCTIONS: dict[int, str] = {
    target_pb2.REDUCTION_UNSPECIFIED: "",
    target_pb2.REDUCTION_SUM: "sum",
    target_pb2.REDUCTION_MEAN: "mean",
}
WITHOUT_PATH = frozenset({"argmax", "top_k", "weights"})
"""Selections without an index path, which leave no axis open that a reduction could fold."""


def predicted_score(value: int) -> Score:
    """The score of a Predict request."""
    return looked_up(SCORES, value, "score")


def top_k(value: int) -> int:
    """Number of classes of a Predict request; 5 where none is stated."""
    if value < 0:
        raise InvalidRequest("TOP_K_OUT_OF_RANGE", f"top_k {value} is below 1", top_k=value)
    return value or 5


def targets(messages: Sequence[target_pb2.Target], model: ServedModel) -> tuple[domain_targets.TargetSpec, ...]:
    """Those named, else the model's default."""
    if messages:
        return tuple(_target(message, position) for position, message in enumerate(messages))
    default = model.default_target
    selection = domain_targets.Argmax() if default is None else domain_targets.Element((default,))
    output = "" if default is None else model.signature.outputs[0].name
    return (domain_targets.TargetSpec(output, Score.OUTPUT, selection, names_score=False),)


def _target(message: target_pb2.Target, position: int) -> domain_targets.TargetSpec:
    return domain_targets.TargetSpec(
        output=message.output,
        score=looked_up(SCORES, message.score, "score"),
        selection=_selection(message),
        reduction=_reduction(message),
        instance_index=message.instance_index if message.HasField("instance_index") else None,
        request_index=position,
        names_score=message.score != target_pb2.SCORE_UNSPECIFIED,
    )


def _reduction(message: target_pb2.Target) -> str:
    reduction, selection = looked_up(REDUCTIONS, message.reduction, "reduction"), message.WhichOneof("selection")
    if reduction and selection in WITHOUT_PATH:
        raise InvalidRequest(
            "REDUCTION_CONFLICT",
            f"reduction {reduction} folds the axes that an index path leaves open, and {selection} has no path",
            selection=selection,
            reduction=reduction,
        )
    return reduction


def _selection(message: target_pb2.Target) -> domain_targets.Selection:
    match message.WhichOneof("selection"):
        case "element":
            return _element(message.element)
        case "argmax":
            return domain_targets.Argmax()
        case "top_k":
            return domain_targets.TopK(_rank_count(message.top_k.count))
        case "margin":
            return domain_targets.Margin(_element(message.margin.positive), _element(message.margin.negative))
        case "weights":
            return domain_targets.Weights(decode_floats("target weights", message.weights))
        case _:
            raise InvalidRequest("TARGET_REQUIRED", "the target message selects nothing")


def _rank_count(count: int) -> int:
    """Checked here, before it counts towards the cost; the upper end is known once there are scores."""
    if count < 1:
        raise InvalidRequest("TARGET_OUT_OF_RANGE", f"top_k count {count} is below 1", count=count)
    return count


def _element(message: target_pb2.Element) -> domain_targets.Element:
    match message.WhichOneof("element"):
        case "index":
            return domain_targets.Element(tuple(message.index.indices))
        case "label":
            return domain_targets.Element(label=message.label)
        case _:
            raise InvalidRequest("TARGET_REQUIRED", "the element message names neither an index nor a label")
