"""Nouns to messages: everything that the server says."""

from __future__ import annotations

import dataclasses
import enum
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from numpy.typing import NDArray

from explainserve import __version__
from explainserve import baselines as domain_baselines
from explainserve.cautions import Caution, cautions_for_map, cautions_for_response
from explainserve.explainer import Answer, Cost, Usage
from explainserve.explanation import Baseline, StopReason, Target, absolute_sum, attribution_sum
from explainserve.figures import Entry, InputFigures, JointFigures, entries, input_figures
from explainserve.figures import joint_figures as joint_figures_of
from explainserve.methods import METHODS, IntegratedGradients, Method
from explainserve.repository import ModelEntry, ServedModel
from explainserve.rpc.requests import QUADRATURES, SCORES, Explain
from explainserve.rpc.tensors import data_type, encode
from explainserve.signature import Activation, Axis, InputSpec, OutputKind, OutputSpec, Score
from explainserve.statistics import delta_over_abs_sum, relative_convergence_delta
from explainserve.v1 import (
    attribution_pb2,
    baseline_pb2,
    explainer_service_pb2,
    method_pb2,
    model_pb2,
    statistics_pb2,
    target_pb2,
)

M = TypeVar("M", bound=Message)

_SCORES: dict[Score, Any] = {score: code for code, score in SCORES.items() if code}
_QUADRATURES: dict[str, Any] = {name: code for code, name in QUADRATURES.items() if name}
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
    model, options = request.query.model, request.options
    maps = entries(answer, request.fold_baselines)
    joint = joint_figures_of(maps, model.signature, request.figures, request.groups)
    return explainer_service_pb2.ExplainResponse(
        attributions=[_attribution(entry, request, answer) for entry in maps],
        joint=[_joint(figures) for figures in joint],
        baselines=list(_used_baselines(answer, include_tensors=options.include_baseline_tensors)),
        inputs=[input_spec(spec) for spec in model.signature.inputs if spec.name in shapes(request)],
        provenance=provenance(model, answer.usage, [request.query.method]),
        cautions=_cautions(
            cautions_for_response(map_count=len(maps), needs_baseline=request.query.method.reading_guide.needs_baseline)
        ),
    )


def shapes(request: Explain) -> dict[str, tuple[int, ...]]:
    """Shapes of one instance's explained inputs."""
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
        gradient_rule="standard",
        device=loaded.device,
        precision=_precision(model),
        noise_floor=_noise_floor(model),
        effective_methods=[METHOD_WRITERS[type(method)](method) for method in methods],
        row_count=usage.forward_rows + usage.gradient_rows,
        forward_count=usage.forward_rows + usage.gradient_rows,
        backward_count=usage.gradient_rows,
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
    request: Explain, cost: Cost, *, row_limit: int, reply_bytes_limit: int
) -> explainer_service_pb2.EstimateCostResponse:
    """The cost of a request on an idle server."""
    lowest, highest = cost.min_gradient_rows, cost.max_gradient_rows
    return explainer_service_pb2.EstimateCostResponse(
        min_row_count=cost.end_point_rows + lowest,
        max_row_count=cost.end_point_rows + highest,
        min_forward_count=cost.end_point_rows + lowest,
        max_forward_count=cost.end_point_rows + highest,
        min_backward_count=lowest,
        max_backward_count=highest,
        reply_bytes=reply_bytes(request, cost),
        attribution_count=_map_count(request, cost),
        row_limit=row_limit,
        reply_bytes_limit=reply_bytes_limit,
    )


_STATISTICS_BYTES = 2200
_MAP_BYTES = 4096
_REGION_BYTES = 192
_POINT_BYTES = 18


def reply_bytes(request: Explain, cost: Cost) -> int:
    """Size of the reply: tensors exactly, the rest as an upper estimate."""
    options, model = request.options, request.query.model
    elements = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes(request).items()}
    tensor_bytes = 4 * sum(elements.values()) * (2 if request.fold_baselines else 1)
    views = sum(len(request.figures.views_of(model.signature.input(name))) for name in elements)
    per_map = _MAP_BYTES + _POINT_BYTES * request.query.method.cost().max_gradient_rows
    per_map += 0 if options.omit_tensors else tensor_bytes
    per_map += 0 if options.omit_statistics else views * _STATISTICS_BYTES
    per_map += sum(2 * (_REGION_BYTES + len(region.name.encode())) for region in request.regions)
    baselines = cost.question_count * 4 * sum(elements.values()) if options.include_baseline_tensors else 0
    groups = (1 + len(request.groups)) * views * _STATISTICS_BYTES
    return _map_count(request, cost) * per_map + baselines + groups


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
        layers=model.config.layers,
        backend=model.loaded.backend,
        device=model.loaded.device,
        noise_floor=_noise_floor(model),
        data_baselines=sorted(model.data_baselines),
        default_target=model.default_target,
        default_baseline=model.config.default_baseline,
        differentiable=model.differentiable,
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


def prediction(
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


def _integrated_gradients(method: IntegratedGradients) -> method_pb2.MethodSpec:
    adaptive = method.quadrature == "adaptive"
    message = method_pb2.IntegratedGradients(quadrature=_QUADRATURES[str(method.quadrature)])
    if adaptive:
        message.tolerance = method.tolerance
        message.completeness_tolerance = method.completeness_tolerance
        message.max_step_count = method.max_step_count
    else:
        message.step_count = method.cost().max_gradient_rows
    return method_pb2.MethodSpec(integrated_gradients=message)


METHOD_WRITERS: dict[type, Callable[[Any], method_pb2.MethodSpec]] = {IntegratedGradients: _integrated_gradients}
"""Writes a method with all effective parameters, by its class."""


def _attribution(entry: Entry, request: Explain, answer: Answer) -> attribution_pb2.Attribution:
    model, options = request.query.model, request.options
    delta = _delta(entry) if request.query.method.reading_guide.complete else None
    message = attribution_pb2.Attribution(
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
    for name, tensor in entry.tensors.items():
        spec = model.signature.input(name)
        figures = input_figures(entry, spec, request.figures, request.regions)
        message.inputs.append(_input_attribution(spec, figures))
        if not options.omit_tensors:
            message.inputs[-1].tensor.CopyFrom(encode(tensor))
            if name in entry.spread:
                message.inputs[-1].spread.CopyFrom(encode(entry.spread[name]))
    if entry.baseline_index is not None and not options.omit_score_path:
        message.score_path.alphas.extend(entry.alphas.tolist())
        message.score_path.scores.extend(entry.scores.tolist())
    return message


def _delta(entry: Entry) -> float | None:
    """None where a map or score is not finite."""
    delta = attribution_sum(entry.tensors) - entry.output_change
    return delta if math.isfinite(delta) else None


def _map_cautions(entry: Entry, request: Explain, answer: Answer) -> list[Caution]:
    model = request.query.model
    own = answer.baselines[entry.instance_index]
    used = own if entry.baseline_index is None else own[entry.baseline_index : entry.baseline_index + 1]
    return cautions_for_map(
        out_of_range_inputs=request.out_of_range,
        stop_reason=entry.stop_reason.name,
        negligible_change=_negligible(entry),
        row_by_row=not model.probe.rows_independent,
        constant_baseline=any(_is_constant(baseline) for baseline in used),
    )


def _negligible(entry: Entry) -> bool:
    """F(x) - F(x') is within float32 rounding of the two."""
    size = max(abs(entry.instance_output_value), abs(entry.baseline_output_value))
    return bool(abs(entry.output_change) <= 8 * np.finfo(np.float32).eps * size)


def _is_constant(baseline: Baseline) -> bool:
    return any(float(np.ptp(values.astype(np.float64))) == 0 for values in baseline.moving.values() if values.size > 1)


def _input_attribution(spec: InputSpec, figures: InputFigures) -> attribution_pb2.InputAttribution:
    return attribution_pb2.InputAttribution(
        name=spec.name,
        layout=spec.instance_layout,
        channel_axis=spec.channel_axis,
        statistics=[_mirror(statistics_pb2.Statistics, figure) for figure in figures.statistics],
        normalizations=[_mirror(statistics_pb2.Normalization, recipe) for recipe in figures.normalizations],
        regions=[_mirror(statistics_pb2.RegionSum, found) for found in figures.regions],
    )


def _joint(figures: JointFigures) -> statistics_pb2.JointStatistics:
    return statistics_pb2.JointStatistics(
        group=figures.group,
        members=figures.members,
        inputs=[
            statistics_pb2.JointInput(
                input=name,
                statistics=[_mirror(statistics_pb2.Statistics, figure) for figure in own.statistics],
                normalizations=[_mirror(statistics_pb2.Normalization, recipe) for recipe in own.normalizations],
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
    used = []
    for instance_index, own in enumerate(answer.baselines):
        for baseline_index, baseline in enumerate(own):
            spec = answer.query.baselines[baseline.request_index]
            used.append(
                baseline_pb2.UsedBaseline(
                    instance_index=instance_index,
                    baseline_index=baseline_index,
                    request_baseline_index=baseline.request_index,
                    inputs=[
                        _used_input(name, spec.of(name), baseline, values, include_tensors)
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


def _cautions(cautions: Sequence[Caution]) -> list[attribution_pb2.Caution]:
    return [_mirror(attribution_pb2.Caution, caution) for caution in cautions]


def _method_support(name: str, method: type[Method], model: ServedModel) -> model_pb2.MethodSupport:
    guide = method.reading_guide
    return model_pb2.MethodSupport(
        method=name,
        supported=model.differentiable,
        reason=model.undifferentiable_reason,
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


def _mirror(message_type: type[M], value: Any) -> M:
    """A message from a dataclass with the same field names; None is absent."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return message_type(**{name: _plain(item) for name, item in fields.items() if item is not None})


_ITEMS: Mapping[str, type[Message]] = {
    "Quantile": statistics_pb2.Quantile,
    "AbsMassThreshold": statistics_pb2.AbsMassThreshold,
}


def _plain(item: Any) -> Any:
    if isinstance(item, enum.Enum):
        return _wire(item)
    if isinstance(item, tuple):
        return [_mirror(_ITEMS[type(part).__name__], part) for part in item]
    return item


def _wire(member: enum.Enum) -> Any:
    """The wire's number of an enum whose values are the wire's."""
    return member.value


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _noise_floor(model: ServedModel) -> float | None:
    return model.probe.noise_floor if model.differentiable else None


def _precision(model: ServedModel) -> str:
    types = [spec.dtype.name for spec in model.signature.inputs if spec.differentiable]
    return types[0] if types else "float32"


_COMMON_VERSIONS = {
    "numpy": np.__version__,
    "python": platform.python_version(),
    "grpcio": metadata.version("grpcio"),
    "protobuf": metadata.version("protobuf"),
}

__all__ = [
    "METHOD_WRITERS",
    "cost_response",
    "explain_response",
    "input_spec",
    "model_message",
    "model_summary",
    "prediction",
    "provenance",
    "reply_bytes",
    "set_serialize_duration",
    "shapes",
]
