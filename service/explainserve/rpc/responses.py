"""Nouns to messages: everything that the server says."""

from __future__ import annotations

import dataclasses
import enum
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from explainserve import __version__
from explainserve import baselines as domain_baselines
from explainserve.cautions import Caution, cautions_for_map, cautions_for_response
from explainserve.explainer import Answer, Cost, Prepared, Round, Usage
from explainserve.explanation import Attribution, Baseline, StopReason, Target, absolute_sum, attribution_sum
from explainserve.figures import (
    Entry,
    InputFigures,
    JointFigures,
    ViewFigures,
    entries,
    group_sizes,
    input_figures,
)
from explainserve.figures import joint_figures as joint_figures_of
from explainserve.methods import METHODS, Method
from explainserve.repository import ModelEntry, ServedModel
from explainserve.rpc.methods import write as write_method
from explainserve.rpc.requests import SCORES, Explain
from explainserve.rpc.tensors import data_type, encode
from explainserve.signature import Activation, Axis, InputSpec, Layer, MapSpec, OutputKind, OutputSpec, Score
from explainserve.statistics import delta_over_abs_sum, relative_convergence_delta
from explainserve.v1 import (
    attribution_pb2,
    baseline_pb2,
    explainer_service_pb2,
    model_pb2,
    statistics_pb2,
    target_pb2,
)

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
_KINDS = {
    OutputKind.LOGITS: model_pb2.OUTPUT_KIND_LOGITS,
    OutputKind.PROBABILITIES: model_pb2.OUTPUT_KIND_PROBABILITIES,
    OutputKind.VALUES: model_pb2.OUTPUT_KIND_VALUES,
}
_ACTIVATIONS = {
    Activation.SOFTMAX: model_pb2.ACTIVATION_SOFTMAX,
    Activation.SIGMOID: model_pb2.ACTIVATION_SIGMOID,
    Activation.NONE: model_pb2.ACTIVATION_NONE,
}
_FORMATS = {
    "onnx": model_pb2.MODEL_FORMAT_ONNX,
    "torch_export": model_pb2.MODEL_FORMAT_TORCH_EXPORT,
    "torchscript": model_pb2.MODEL_FORMAT_TORCHSCRIPT,
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
        baselines=list(_used_baselines(answer, include_tensors=options.include_baseline_tensors)),
        inputs=[input_spec(spec) for spec in model.signature.inputs if spec.name in shapes(request)],
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


def shapes(request: Explain) -> dict[str, tuple[int, ...]]:
    """Shapes of one instance's explained inputs; of layers, the inputs that they are computed from."""
    return {name: array.shape for name, array in request.query.instances[0].moving.items()}


def provenance(model: ServedModel, usage: Usage, methods: Sequence[Method]) -> attribution_pb2.Provenance:
    """How an answer was computed."""
    loaded = model.loaded
    return attribution_pb2.Provenance(
        model_name=model.name,
        model_version=model.version,
        model_sha256=model.sha256,
        backend=loaded.backend,
        gradient_mode=loaded.gradient_mode,
        gradient_rule=", ".join(dict.fromkeys(method.needs.rule for method in methods if method.needs.rule)),
        device=model.runs_on,
        execution=loaded.execution,
        precision=model.precision,
        noise_floor=_noise_floor(model),
        precision_map_error=model.probe.precision_map_error,
        effective_methods=[write_method(method) for method in methods],
        row_count=usage.row_count,
        forward_count=usage.row_count,
        backward_count=usage.backward_count,
        saved_row_count=usage.saved_rows,
        server_version=__version__,
        library_versions={**_COMMON_VERSIONS, **loaded.library_versions},
        queue_duration=_duration(usage.queue_seconds),
        compute_duration=_duration(usage.compute_seconds),
    )


def set_serialize_duration(message: attribution_pb2.Provenance, seconds: float) -> None:
    """States the time for statistics and encoding, known only once they are done."""
    message.serialize_duration.CopyFrom(_duration(seconds))


def cost_response(
    request: Explain,
    cost: Cost,
    *,
    message_bytes: int,
    row_limit: int,
    held_bytes_limit: int,
    host_bytes_limit: int,
    reply_bytes_limit: int,
) -> explainer_service_pb2.EstimateCostResponse:
    """The cost of a request on an idle server.

    Args:
        message_bytes: size of the request.

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
        "attribution_count": _map_count(request, cost),
        "row_limit": row_limit,
        "reply_bytes_limit": reply_bytes_limit,
        "held_bytes": cost.held_bytes,
        "held_bytes_limit": held_bytes_limit,
        "max_host_bytes": cost.host_bytes + memory_of_messages(message_bytes, reply.total_bytes),
        "max_host_bytes_limit": host_bytes_limit,
    }
    # A short message can ask for more than an int64 counts.
    counted = {name: min(n, 2**63 - 1) for name, n in figures.items()}
    return explainer_service_pb2.EstimateCostResponse(
        **counted, micro_batch_bytes=request.query.model.micro_batch_bytes
    )


_MESSAGE_COPIES = 2  # as it came in and as a message; decoded inputs are counted where they are held
_REPLY_COPIES = 3  # as a message, as bytes, and on its way into the network


def memory_of_messages(message_bytes: int, reply_bytes: int) -> int:
    """What a request and its reply take at most, as long as the reader takes."""
    return _MESSAGE_COPIES * message_bytes + _REPLY_COPIES * reply_bytes


_RESPONSE_BYTES = 8192  # provenance, cautions
_MAP_BYTES = 4096  # numbers, and all cautions at once
_INPUT_BYTES = 384  # shape and layout, twice where there is a spread
_STATISTICS_BYTES = 2200  # one view with its recipes
_REGION_BYTES = 192
_PART_COPIES = 3  # segments, and two base maps
_POINT_BYTES = 16
_GROUP_BYTES = 64
_MEMBER_BYTES = 4
_PAIR_BYTES = 64
_BASELINE_BYTES = 320  # digest, positions, numbers of noise
_CLASS_BYTES = 40


@dataclasses.dataclass(frozen=True)
class ReplySize:
    """Size of a reply.

    Attributes:
        tensor_bytes: of its tensors, exactly.
        head_bytes: of the rest, an upper estimate.
    """

    tensor_bytes: int
    head_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of the reply in one message."""
        return self.tensor_bytes + self.head_bytes


def reply_size(request: Explain, cost: Cost, row_limit: int) -> ReplySize:
    """Size of the reply of Explain.

    Args:
        row_limit: above it groups are not looked at, and count as if each held all maps.

    Raises:
        InvalidRequest: a group selects nothing, or maps of different units (EMPTY_GROUP, INCOMMENSURABLE_GROUP).
    """
    maps = _map_count(request, cost)
    if cost.max_rows > row_limit:
        sizes = [maps] * len(request.groups)
    else:
        sizes = group_sizes(request.query, request.fold_baselines, request.groups)
    layouts = sum(_text_bytes(input_spec(spec).ByteSize()) for spec in _explained(request))
    joint = _joint_bytes(request, maps, sizes)
    head_bytes = _RESPONSE_BYTES + layouts + maps * _bytes_of_map(request) + joint + _baselines_bytes(request)
    return ReplySize(_tensor_bytes(request, maps), head_bytes)


def _explained(request: Explain) -> list[InputSpec]:
    return [request.query.model.signature.input(name) for name in shapes(request)]


def _text_bytes(text: str | int) -> int:
    """Of a name, or of that many bytes, with what stands before them."""
    return 8 + (text if isinstance(text, int) else len(text.encode()))


def _tensor_bytes(request: Explain, map_count: int) -> int:
    """Of maps, with what else comes with each of their elements, and of baselines."""
    options, query, total = request.options, request.query, 0
    of_map = 4 * query.subject.element_count
    if not options.omit_tensors:
        total += map_count * of_map * (1 + request.fold_baselines + options.include_standard_errors)
    if options.include_parts:
        total += map_count * of_map * _PART_COPIES
    if options.include_baseline_tensors:
        of_one = sum(values.nbytes for values in query.instances[0].moving.values())
        total += of_one * sum(query.baseline_count(index) for index in range(len(query.instances)))
    return total


def _bytes_of_map(request: Explain) -> int:
    """Without its tensors."""
    options, signature = request.options, request.query.model.signature
    total = _MAP_BYTES + max(_text_bytes(spec.name) + 2 * _label_bytes(spec) for spec in signature.outputs)
    for spec in request.query.subject.maps.values():
        views = 0 if options.omit_statistics else len(request.figures.views_of(spec))
        total += _INPUT_BYTES + 2 * _text_bytes(spec.name) + views * _STATISTICS_BYTES  # a caution names it too
    if not options.omit_regions:
        total += sum(2 * (_REGION_BYTES + _text_bytes(region.name)) for region in request.regions)
    if not (options.omit_score_path or request.fold_baselines):
        costs = [method.cost(request.query.subject) for method in request.query.methods]
        total += _POINT_BYTES * (2 + max(cost.max_gradient_rows for cost in costs))
    return total


def _label_bytes(spec: OutputSpec) -> int:
    return _text_bytes(max((len(label.encode()) for label in spec.labels), default=0))


def _joint_bytes(request: Explain, maps: int, sizes: Sequence[int]) -> int:
    views = {spec.name: len(request.figures.views_of(spec)) for spec in request.query.subject.maps.values()}
    figures = sum(_GROUP_BYTES + _text_bytes(name) + count * _STATISTICS_BYTES for name, count in views.items())
    pair = sum(count * (_PAIR_BYTES + _text_bytes(name)) for name, count in views.items())
    total = 0
    if request.figures.joint:
        signature = request.query.model.signature
        units = {(spec.function(signature).output, spec.score) for spec in request.query.targets}
        total += _MEMBER_BYTES * maps + sum(_GROUP_BYTES + _text_bytes(output) + figures for output, _ in units)
    for group, size in zip(request.groups, sizes, strict=True):
        total += _GROUP_BYTES + _text_bytes(group.name) + _MEMBER_BYTES * size + figures
        total += pair * (size * (size - 1) // 2) if group.pairwise else 0
    return total


def _baselines_bytes(request: Explain) -> int:
    """Without their tensors."""
    query, total = request.query, 0
    for spec in query.baselines:
        own = _BASELINE_BYTES
        for name in query.instances[0].moving:
            own += _BASELINE_BYTES + _text_bytes(name) + _effective_baseline(spec.of(name)).ByteSize()
        copies = len(query.instances) if spec.instance_index is None else 1
        total += own * copies * spec.baseline_count(tuple(query.instances[0].moving))
    return total


def prediction_bytes(spec: OutputSpec, shape: Sequence[int], count: int, *, include_tensor: bool) -> int:
    """Size of a prediction, as an upper estimate.

    Args:
        shape: of the scores of one instance.
        count: of classes that are asked for.
    """
    total = _INPUT_BYTES + _text_bytes(spec.name)
    if len(shape) == 1 and spec.class_axis == 1:
        total += min(count, shape[0]) * (_CLASS_BYTES + _label_bytes(spec))
    return total + (math.prod(shape) * spec.dtype.itemsize if include_tensor else 0)


def _map_count(request: Explain, cost: Cost) -> int:
    if not request.fold_baselines:
        return cost.question_count
    return sum(request.query.target_count(index) for index in range(len(request.query.instances)))


def model_summary(entry: ModelEntry) -> model_pb2.ModelSummary:
    """One line about a model version."""
    return model_pb2.ModelSummary(
        name=entry.name,
        version=entry.version,
        state=model_pb2.ModelState.Value(f"MODEL_STATE_{entry.state.name}"),
        reason=entry.reason,
        error_reason=entry.error_reason,
        format=_FORMATS.get(entry.format, model_pb2.MODEL_FORMAT_UNSPECIFIED),
        devices=[replica.runs_on for replica in entry.replicas],
    )


def model_message(entry: ModelEntry, model: ServedModel) -> model_pb2.Model:
    """All that the server knows of one model version."""
    return model_pb2.Model(
        summary=model_summary(entry),
        sha256=model.sha256,
        inputs=[input_spec(spec) for spec in model.signature.inputs],
        outputs=[_output_spec(spec) for spec in model.signature.outputs],
        batching=model_pb2.BATCHING_ROW_BY_ROW if model.row_by_row else model_pb2.BATCHING_ROWS,
        warnings=model.probe.warnings,
        methods=[_method_support(name, method, model) for name, method in METHODS.items()],
        gaps=[model_pb2.OperatorGap(**dataclasses.asdict(gap)) for gap in model.loaded.gaps],
        layers=_layers(model),
        backend=model.loaded.backend,
        device=model.runs_on,
        execution=model.loaded.execution,
        noise_floor=_noise_floor(model),
        precision=model.precision,
        precision_map_error=model.probe.precision_map_error,
        data_baselines=sorted(model.data_baselines),
        default_target=model.default_target,
        default_baseline=model.config.default_baseline,
        differentiable=model.differentiable,
        memory=_memory(model),
        max_batch_rows=model.max_batch_rows,
        row_duration=None if model.seconds_per_row is None else _duration(model.seconds_per_row),
    )


def _memory(model: ServedModel) -> model_pb2.Memory | None:
    memory = model.loaded.memory
    return None if memory is None else model_pb2.Memory(**dataclasses.asdict(memory))


def _layers(model: ServedModel) -> list[model_pb2.Layer]:
    return [_layer(layer, layer.name in model.config.layers) for layer in model.layers]


def _layer(layer: Layer, configured: bool) -> model_pb2.Layer:
    return model_pb2.Layer(
        name=layer.name,
        operator=layer.operator,
        module=layer.module,
        axes=[_axis(axis) for axis in layer.axes],
        bypassing_inputs=layer.bypassing_inputs,
        configured=configured,
    )


def input_spec(spec: InputSpec) -> model_pb2.InputSpec:
    """One input."""
    channel = spec.channel_axis
    message = model_pb2.InputSpec(
        name=spec.name,
        data_type=data_type(spec.dtype),
        axes=[_axis(axis) for axis in spec.axes],
        layout=spec.layout,
        batch_axis=0 if spec.batched else None,
        channel_axis=None if channel is None else channel + (1 if spec.batched else 0),
        channel_order=spec.channel_order,
        differentiable=spec.differentiable,
    )
    if spec.value_range is not None:
        message.value_range.low, message.value_range.high = spec.value_range
    if spec.mean is not None and spec.std is not None:
        message.preprocessing.mean.extend(spec.mean)
        message.preprocessing.std.extend(spec.std)
    return message


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
            if options.include_standard_errors and name in entry.attribution.standard_errors and not entry.folded:
                message.inputs[-1].standard_error.CopyFrom(encode(entry.attribution.standard_errors[name]))
        if options.include_parts and name in entry.attribution.segments and not entry.folded:
            message.inputs[-1].segments.CopyFrom(encode(entry.attribution.segments[name]))
    if entry.attribution.alphas.size and not (entry.folded or options.omit_score_path):
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
    guide = entry.method.reading_guide
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
    )


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


def _used_baselines(answer: Answer, *, include_tensors: bool) -> list[baseline_pb2.UsedBaseline]:
    used, signature, effective = [], answer.query.model.signature, domain_baselines.effective
    for instance_index, own in enumerate(answer.baselines):
        for baseline_index, baseline in enumerate(own):
            spec = answer.query.baselines[baseline.request_index]
            used.append(
                baseline_pb2.UsedBaseline(
                    instance_index=instance_index,
                    baseline_index=baseline_index,
                    request_baseline_index=baseline.request_index,
                    inputs=[
                        _used_input(
                            name, effective(spec.of(name), signature.input(name)), baseline, values, include_tensors
                        )
                        for name, values in baseline.moving.items()
                    ],
                )
            )
    return used


def _used_input(
    name: str,
    kind: domain_baselines.InputBaseline,
    baseline: Baseline,
    values: NDArray[np.generic],
    include_tensor: bool,
) -> baseline_pb2.UsedInputBaseline:
    return baseline_pb2.UsedInputBaseline(
        input=name,
        effective=_effective_baseline(kind),
        sha256=domain_baselines.digest(values),
        tensor=encode(values) if include_tensor else None,
        draw_index=baseline.draw_index,
    )


def _effective_baseline(kind: domain_baselines.InputBaseline) -> baseline_pb2.InputBaseline:
    pixel_space = isinstance(kind, domain_baselines.Tone) or getattr(kind, "pixel_space", False)
    message = baseline_pb2.InputBaseline(space=model_pb2.SPACE_PIXEL if pixel_space else model_pb2.SPACE_MODEL)
    match kind:
        case domain_baselines.Zeros():
            message.zeros.SetInParent()
        case domain_baselines.Constant(numbers):
            message.constant.values.extend(numbers)
        case domain_baselines.Tone(level):
            getattr(message, {0.0: "black", 0.5: "gray", 1.0: "white"}[level]).SetInParent()
        case domain_baselines.Given():
            message.tensor.SetInParent()
        case domain_baselines.Blur(sigma):
            message.blur.sigma = sigma
        case domain_baselines.UniformNoise(low, high, seed, count):
            message.uniform_noise.CopyFrom(
                baseline_pb2.UniformNoiseBaseline(low=low, high=high, seed=seed, count=count)
            )
        case domain_baselines.GaussianNoise(mean, std, seed, count):
            message.gaussian_noise.CopyFrom(
                baseline_pb2.GaussianNoiseBaseline(mean=mean, std=std, seed=seed, count=count)
            )
        case domain_baselines.Data(name):
            message.data.name = name
    return message


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


def _method_support(name: str, method: type[Method], model: ServedModel) -> model_pb2.MethodSupport:
    default = method()
    guide, needs = default.reading_guide, default.needs
    missing = model.missing(needs.rule, layers=needs.layers)
    return model_pb2.MethodSupport(
        method=name,
        supported=missing is None,
        reason=missing.reason if missing else "",
        missing_capability=missing.capability if missing else "",
        reading_guide=model_pb2.ReadingGuide(**dataclasses.asdict(guide)),
    )


def _output_spec(spec: OutputSpec) -> model_pb2.OutputSpec:
    return model_pb2.OutputSpec(
        name=spec.name,
        data_type=data_type(spec.dtype),
        axes=[_axis(axis) for axis in spec.axes],
        kind=_KINDS[spec.kind],
        activation=_ACTIVATIONS[spec.activation],
        class_axis=spec.class_axis,
        labels=spec.labels,
    )


def _axis(axis: Axis) -> model_pb2.Axis:
    return model_pb2.Axis(name=axis.name, size=axis.size)


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


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _noise_floor(model: ServedModel) -> float | None:
    return model.probe.noise_floor if model.differentiable else None


_COMMON_VERSIONS = {
    "numpy": np.__version__,
    "python": platform.python_version(),
    "grpcio": metadata.version("grpcio"),
    "protobuf": metadata.version("protobuf"),
}

__all__ = [
    "ReplySize",
    "cost_response",
    "explain_response",
    "input_spec",
    "memory_of_messages",
    "model_message",
    "model_summary",
    "predict_response",
    "prediction_bytes",
    "provenance",
    "reply_size",
    "round_messages",
    "set_serialize_duration",
    "shapes",
]
