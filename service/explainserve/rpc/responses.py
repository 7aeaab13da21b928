"""Answers to messages: explanations, rounds of streams, costs and predictions."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve.cautions import Caution, cautions_for_map, cautions_for_response
from explainserve.explainer import Answer, Prepared, Round, Usage
from explainserve.explanation import (
    Attribution,
    Baseline,
    StopReason,
    Target,
    absolute_sum,
    attribution_sum,
    completeness_scale,
)
from explainserve.figures import (
    Entry,
    InputFigures,
    JointFigures,
    ViewFigures,
    entries,
    input_figures,
)
from explainserve.figures import joint_figures as joint_figures_of
from explainserve.query_cost import Cost
from explainserve.rpc.baseline_messages import used_baselines
from explainserve.rpc.model_messages import input_spec
from explainserve.rpc.provenance import provenance
from explainserve.rpc.reply_size import map_count, memory_of_messages, reply_size
from explainserve.rpc.request_targets import SCORES
from explainserve.rpc.requests import Explain
from explainserve.rpc.tensors import encode
from explainserve.served_model import ServedModel
from explainserve.signature import MapSpec, OutputSpec, Score
from explainserve.statistics import delta_over_abs_sum, relative_convergence_delta
from explainserve.v1 import (
    attribution_pb2,
    explainer_service_pb2,
    statistics_pb2,
    target_pb2,
)

_COMPLETENESS_TOLERANCE = 0.05

_SCORES: dict[Score, Any] = {score: code for code, score in SCORES.items() if code}
_REDUCTIONS = {
    "": target_pb2.REDUCTION_UNSPECIFIED,
    "sum": target_pb2.REDUCTION_SUM,
    "mean": target_pb2.REDUCTION_MEAN,
}
_STOP_REASONS = {
    StopReason.FIXED_STEPS: attribution_pb2.STOP_REASON_FIXED_STEPS,
    StopReason.CONVERGED: attribution_pb2.STOP_REASON_CONVERGED,
    StopReason.MAX_STEPS: attribution_pb2.STOP_REASON_MAX_STEPS,
    StopReason.TIME_BUDGET: attribution_pb2.STOP_REASON_TIME_BUDGET,
    StopReason.NON_CONVERGENT: attribution_pb2.STOP_REASON_NON_CONVERGENT,
    StopReason.NON_FINITE: attribution_pb2.STOP_REASON_NON_FINITE,
    StopReason.UNFINISHED: attribution_pb2.STOP_REASON_UNFINISHED,
}


def explain_response(request: Explain, answer: Answer) -> explainer_service_pb2.ExplainResponse:
    """The whole response of Explain: maps, figures, baselines, cautions, provenance.

    Raises:
        InvalidRequest: a region or group does not fit the maps.
    """
    model, options = answer.query.model, request.options
    maps = entries(answer, request.fold_baselines)
    joint, messages = joint_figures_of(maps, request.figures, request.groups), _Figures()
    return explainer_service_pb2.ExplainResponse(
        attributions=[_attribution(entry, request, answer, messages) for entry in maps],
        joint=[_joint(figures, messages) for figures in joint],
        baselines=list(used_baselines(answer, include_tensors=options.include_baseline_tensors)),
        inputs=[input_spec(spec) for spec in model.signature.inputs if spec.name in request.shapes],
        provenance=provenance(model, answer.usage, request.query.methods),
        cautions=_cautions(cautions_for_response(map_count=len(maps), needs_baseline=request.query.needs_baselines)),
    )


def round_messages(
    request: Explain, prepared: Prepared, latest: Round, *, include_map: bool
) -> tuple[explainer_service_pb2.Progress, attribution_pb2.Attribution | None]:
    """Where a path stands after a round, and where asked for its map, with the figures that Explain gives."""
    query = prepared.query
    answer = Answer(query, (latest.explanation(),), prepared.baselines, Usage())
    (own,) = entries(answer, fold_baselines=False)
    progress = explainer_service_pb2.Progress(
        position=statistics_pb2.AttributionSelector(
            method_index=own.method_index,
            instance_index=own.instance_index,
            target_index=own.target_index,
            baseline_index=own.baseline_index,
        ),
        step_count=own.step_count,
        max_step_count=own.method.cost(query.subject).max_step_count,
        map_error=own.map_error,
        convergence_delta=_delta(own),
        stop_reason=_STOP_REASONS[own.stop_reason],
        path_count=prepared.cost.question_count,
    )
    return progress, _attribution(own, request, answer, _Figures()) if include_map else None


def cost_response(
    request: Explain,
    cost: Cost,
    *,
    message_bytes: int,
    row_limit: int,
    held_bytes_limit: int,
    host_bytes_limit: int,
    reply_bytes_limit: int,
    replicas: Sequence[ServedModel],
) -> explainer_service_pb2.EstimateCostResponse:
    """The cost of a request on an idle server.

    Args:
        message_bytes: size of the request.
        replicas: of the model, of which any may evaluate it.

    Raises:
        InvalidRequest: as `reply_size`.
    """
    reply = reply_size(request, cost, row_limit)
    figures = {
        "min_row_count": cost.min_rows,
        "max_row_count": cost.max_rows,
        "min_forward_count": cost.min_rows,
        "max_forward_count": cost.max_rows,
        "min_backward_count": cost.min_backward_count,
        "max_backward_count": cost.max_backward_count,
        "reply_bytes": reply.total_bytes,
        "attribution_count": map_count(request, cost),
        "row_limit": row_limit,
        "reply_bytes_limit": reply_bytes_limit,
        "held_bytes": cost.held_bytes,
        "held_bytes_limit": held_bytes_limit,
        "max_host_bytes": cost.host_bytes + memory_of_messages(message_bytes, reply.total_bytes),
        "max_host_bytes_limit": host_bytes_limit,
    }
    # A short message can ask for more than an int64 counts.
    counted = {name: min(n, 2**63 - 1) for name, n in figures.items()}
    known = [replica.micro_batch_bytes for replica in replicas if replica.micro_batch_bytes is not None]
    return explainer_service_pb2.EstimateCostResponse(**counted, micro_batch_bytes=max(known, default=None))


def predict_response(
    model: ServedModel,
    specs: Sequence[OutputSpec],
    scores: Sequence[Sequence[NDArray[np.generic]]],
    usage: Usage,
    count: int,
    *,
    include_tensors: bool,
) -> explainer_service_pb2.PredictResponse:
    """The whole response of Predict, ordered by instance, output.

    Args:
        scores: per output one array per instance.
        count: of classes that are asked for.
    """
    return explainer_service_pb2.PredictResponse(
        predictions=[
            _prediction(spec, index, own[index], count, include_tensor=include_tensors)
            for index in range(len(scores[0]))
            for spec, own in zip(specs, scores, strict=True)
        ],
        provenance=provenance(model, usage, []),
    )


def _prediction(
    spec: OutputSpec, index: int, scores: NDArray[np.generic], count: int, *, include_tensor: bool
) -> explainer_service_pb2.Prediction:
    """One output of one instance, with its highest classes where it has a class axis and no other."""
    classes = []
    if scores.ndim == 1 and spec.class_axis == 1:
        order = np.argsort(-scores.astype(np.float64), kind="stable")[:count]
        classes = [
            explainer_service_pb2.ClassScore(index=int(k), label=spec.label(int(k)), score=float(scores[k]))
            for k in order
        ]
    return explainer_service_pb2.Prediction(
        instance_index=index,
        output=spec.name,
        classes=classes,
        tensor=encode(scores) if include_tensor else None,
    )


class _Figures:
    """Figures as messages, each made once: those of a group of one map are those of the map."""

    def __init__(self) -> None:
        self._statistics: dict[ViewFigures, statistics_pb2.Statistics] = {}
        self._normalizations: dict[ViewFigures, list[statistics_pb2.Normalization]] = {}

    def statistics(self, views: Sequence[ViewFigures]) -> list[statistics_pb2.Statistics]:
        """Of each view."""
        for own in views:
            if own not in self._statistics:
                self._statistics[own] = statistics_pb2.Statistics(**_mirror(own.statistics))
        return [self._statistics[own] for own in views]

    def normalizations(self, views: Sequence[ViewFigures]) -> list[statistics_pb2.Normalization]:
        """Of each view all recipes."""
        for own in views:
            if own not in self._normalizations:
                recipes = [statistics_pb2.Normalization(**_mirror(recipe)) for recipe in own.normalizations]
                self._normalizations[own] = recipes
        return [recipe for own in views for recipe in self._normalizations[own]]


def _attribution(entry: Entry, request: Explain, answer: Answer, messages: _Figures) -> attribution_pb2.Attribution:
    options, delta = request.options, _delta(entry)
    message = attribution_pb2.Attribution(
        method_index=entry.method_index,
        instance_index=entry.instance_index,
        target_index=entry.target_index,
        baseline_index=entry.baseline_index,
        target=_target(entry.target),
        instance_output_value=entry.instance_output_value,
        baseline_output_value=entry.baseline_output_value,
        attribution_sum=attribution_sum(entry.tensors),
        convergence_delta=delta,
        relative_convergence_delta=relative_convergence_delta(delta, entry.output_change),
        delta_over_abs_sum=delta_over_abs_sum(delta, absolute_sum(entry.tensors)),
        map_error=entry.map_error,
        step_count=entry.step_count,
        stop_reason=_STOP_REASONS[entry.stop_reason],
        applied_normalization=attribution_pb2.APPLIED_NORMALIZATION_NONE,
        cautions=_cautions(_map_cautions(entry, request, answer)),
    )
    _add_what_it_was_made_of(message, entry.attribution, options)
    for name, tensor in entry.tensors.items():
        spec = entry.maps[name]
        figures = input_figures(entry, spec, request.figures, request.regions)
        message.inputs.append(_input_attribution(spec, figures, messages))
        if not options.omit_tensors:
            message.inputs[-1].tensor.CopyFrom(encode(tensor))
            if name in entry.spread:
                message.inputs[-1].spread.CopyFrom(encode(entry.spread[name]))
            if options.include_standard_errors and name in entry.attribution.standard_errors:
                message.inputs[-1].standard_error.CopyFrom(encode(entry.attribution.standard_errors[name]))
        if options.include_parts and name in entry.attribution.segments:
            message.inputs[-1].segments.CopyFrom(encode(entry.attribution.segments[name]))
    if entry.attribution.alphas.size and not options.omit_score_path:
        message.score_path.alphas.extend(entry.attribution.alphas.tolist())
        message.score_path.scores.extend(entry.attribution.scores.tolist())
    return message


def _add_what_it_was_made_of(
    message: attribution_pb2.Attribution,
    attribution: Attribution,
    options: explainer_service_pb2.ResponseOptions,
) -> None:
    if attribution.fit is not None:
        message.intercept = attribution.fit.intercept
        if attribution.fit.r_squared is not None:
            message.r_squared = attribution.fit.r_squared
    for name, tensor in attribution.parts.items() if options.include_parts else ():
        message.parts.add(name=name, tensor=encode(tensor))


def _delta(entry: Entry) -> float | None:
    """None where the method is not complete, or a map or score is not finite."""
    if entry.output_change is None or not entry.method.reading_guide.complete:
        return None
    delta = attribution_sum(entry.tensors) - entry.output_change
    return delta if math.isfinite(delta) else None


def _map_cautions(entry: Entry, request: Explain, answer: Answer) -> list[Caution]:
    model = request.query.model
    own = answer.baselines[entry.instance_index]
    guide, target = entry.method.reading_guide, entry.target
    used = own if entry.folded else [] if entry.baseline_index is None else [own[entry.baseline_index]]
    return cautions_for_map(
        out_of_range_inputs=request.out_of_range,
        stop_reason=entry.stop_reason.name,
        negligible_change=_negligible(entry),
        row_by_row=not model.probe.rows_independent,
        # IDGI gives elements their share whether they move or not
        constant_baseline=not guide.complete_by_construction and any(_is_constant(baseline) for baseline in used),
        fails_randomization=guide.fails_randomization,
        complete_by_construction=guide.complete_by_construction,
        behind_activation=guide.score_before_activation
        and model.signature.output(target.output).is_behind_activation(target.score),
        incomplete=_incomplete(entry),
    )


def _incomplete(entry: Entry) -> bool:
    """The map's sum misses F(x) - F(x') by more than is recommended (Sundararajan, Taly, Yan 2017, section 5), where no
    other tolerance was asked for."""
    delta, change = _delta(entry), entry.output_change
    if delta is None or change is None or _negligible(entry) or entry.stop_reason is not StopReason.FIXED_STEPS:
        return False
    return abs(delta) > _COMPLETENESS_TOLERANCE * completeness_scale(change, absolute_sum(entry.tensors))


def _negligible(entry: Entry) -> bool:
    """F(x) - F(x') is within float32 rounding of the two."""
    if entry.output_change is None or entry.baseline_output_value is None:
        return False
    size = max(abs(entry.instance_output_value), abs(entry.baseline_output_value))
    return math.isfinite(size) and abs(entry.output_change) <= 8 * float(np.finfo(np.float32).eps) * size


def _is_constant(baseline: Baseline) -> bool:
    return any(float(np.ptp(values.astype(np.float64))) == 0 for values in baseline.moving.values() if values.size > 1)


def _input_attribution(spec: MapSpec, figures: InputFigures, messages: _Figures) -> attribution_pb2.InputAttribution:
    return attribution_pb2.InputAttribution(
        name=spec.name,
        layout=spec.layout,
        covered_input=spec.covers,
        channel_axis=spec.channel_axis,
        statistics=messages.statistics(figures.views),
        normalizations=messages.normalizations(figures.views),
        regions=[_mirror(found) for found in figures.regions],
    )


def _joint(figures: JointFigures, messages: _Figures) -> statistics_pb2.JointStatistics:
    return statistics_pb2.JointStatistics(
        group=figures.group,
        members=figures.members,
        inputs=[
            statistics_pb2.JointInput(
                input=name,
                statistics=messages.statistics(own),
                normalizations=messages.normalizations(own),
            )
            for name, own in figures.inputs.items()
        ],
        pairs=[
            statistics_pb2.PairRange(
                first=pair.first,
                second=pair.second,
                input=pair.input,
                view=_wire(pair.view),
                min=pair.range.min,
                max=pair.range.max,
                abs_max=pair.range.abs_max,
            )
            for pair in figures.pairs
        ],
    )


def _target(target: Target) -> target_pb2.ResolvedTarget:
    return target_pb2.ResolvedTarget(
        output=target.output,
        score=_SCORES[target.score],
        index=target.index,
        negative_index=target.negative_index,
        label=target.label,
        selection=target.selection,
        request_target_index=target.request_index,
        reduction=_REDUCTIONS[target.reduction],
    )


def _cautions(cautions: Sequence[Caution]) -> list[Any]:
    return [_mirror(caution) for caution in cautions]


def _mirror(value: Any) -> Any:
    """A message, as a dict, from a dataclass with the same field names; None is absent."""
    return {name: _plain(item) for name, item in vars(value).items() if item is not None}


def _plain(item: Any) -> Any:
    if item.__class__ is float:  # nearly all are
        return item
    if isinstance(item, tuple):
        return [_mirror(part) for part in item]
    return _wire(item) if isinstance(item, enum.Enum) else item


def _wire(member: enum.Enum) -> Any:
    """The wire's number of an enum whose values are the wire's."""
    return member.value
