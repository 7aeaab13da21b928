"""Messages to nouns: decoding and checking requests against a model's signature."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from explainserve import baselines as domain_baselines
from explainserve import targets as domain_targets
from explainserve.errors import InvalidRequest, LimitExceeded, Unimplemented, Unsupported
from explainserve.explanation import Instance, Subject
from explainserve.figures import FigureOptions, Group, Region, Selector, check_regions
from explainserve.methods import METHODS, Method, name_of
from explainserve.methods.adaptive import MIN_STEP_COUNT
from explainserve.query import Query
from explainserve.regions import Box
from explainserve.rpc.methods import read as read_method
from explainserve.rpc.tensors import decode, decode_floats
from explainserve.scheduling import Request
from explainserve.served_model import ServedModel
from explainserve.settings import Settings
from explainserve.signature import InputSpec, Layer, MapSpec, Score, Signature
from explainserve.statistics import View
from explainserve.v1 import (
    baseline_pb2,
    explainer_service_pb2,
    method_pb2,
    model_pb2,
    statistics_pb2,
    target_pb2,
    tensor_pb2,
)

T = TypeVar("T")

NAMED_LAYERS = 8
"""Layers that an error lists; the model's metadata has all of them."""

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
FOLDS: dict[int, bool] = {
    baseline_pb2.BASELINE_REDUCTION_UNSPECIFIED: False,
    baseline_pb2.BASELINE_REDUCTION_EACH: False,
    baseline_pb2.BASELINE_REDUCTION_MEAN: True,
}
VIEWS: dict[int, View] = {
    statistics_pb2.VIEW_ELEMENTS: View.ELEMENTS,
    statistics_pb2.VIEW_CHANNEL_SUM: View.CHANNEL_SUM,
    statistics_pb2.VIEW_CHANNEL_ABS_SUM: View.CHANNEL_ABS_SUM,
    statistics_pb2.VIEW_CHANNEL_MAX_ABS: View.CHANNEL_MAX_ABS,
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


def model_name(reference: model_pb2.ModelRef) -> tuple[str, int | None]:
    """Name and version of a model; no version means the highest.

    Raises:
        InvalidRequest: no model is named (MODEL_REQUIRED), or its version is below 1 (VERSION_INVALID).
        Unimplemented: randomized and shifted models.
    """
    source = reference.WhichOneof("source")
    if source in ("randomized", "shifted"):
        raise Unimplemented("MODEL_SOURCE_UNIMPLEMENTED", f"{source} models are not built yet", source=source)
    return named_model(reference.named)


def named_model(message: model_pb2.NamedModel) -> tuple[str, int | None]:
    """Name and version; no version means the highest.

    Raises:
        InvalidRequest: no model is named (MODEL_REQUIRED), or its version is below 1 (VERSION_INVALID).
    """
    if not message.name:
        raise InvalidRequest("MODEL_REQUIRED", "the request names no model")
    if not message.HasField("version"):
        return message.name, None
    if message.version < 1:
        raise InvalidRequest("VERSION_INVALID", f"version {message.version} is below 1", version=message.version)
    return message.name, message.version


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
    moving = _moving(model, message.fixed_inputs, explains_layers=bool(layers))
    given = instances(arrays, model.signature, moving)
    subject = _layer_subject(model, layers, arrays) if layers else _subject(model, given[0])
    query = Query(
        model=model,
        instances=given,
        targets=_targets(message.targets, model),
        baselines=_baselines(message.baselines, model, subject),
        methods=methods(message.methods, model, subject, settings),
        subject=subject,
        request=Request(priority=_priority(message.priority), expires_at=deadline),
        budget_ends_at=_budget_end(message, arrived),
    )
    _check_instance_indices(message, len(query.instances))
    return Explain(
        query=query,
        regions=tuple(check_regions([_region(region) for region in message.regions], subject)),
        groups=_groups(message.groups),
        figures=_figure_options(message.response_options),
        fold_baselines=_lookup(FOLDS, message.baseline_reduction, "baseline_reduction"),
        options=message.response_options,
        out_of_range=tuple(spec.name for spec in model.signature.inputs if _leaves_range(arrays[spec.name], spec)),
    )


def inputs(
    tensors: Mapping[str, tensor_pb2.Tensor], signature: Signature, settings: Settings
) -> dict[str, NDArray[np.generic]]:
    """All inputs of a request, checked against the signature.

    Raises:
        InvalidRequest: UNKNOWN_INPUT, MISSING_INPUT, DTYPE_MISMATCH, SHAPE_MISMATCH, TENSOR_SIZE_MISMATCH,
        NON_FINITE_INPUT,
            EMPTY_BATCH, BATCH_MISMATCH.
        LimitExceeded: too many instances (TOO_MANY_INSTANCES).
    """
    for name in tensors:
        signature.input(name)
    missing = [spec.name for spec in signature.inputs if spec.name not in tensors]
    if missing:
        raise InvalidRequest("MISSING_INPUT", f"input {', '.join(missing)} is missing", inputs=", ".join(missing))
    arrays = {spec.name: _input(spec, tensors[spec.name]) for spec in signature.inputs}
    _check_batch(arrays, signature, settings.max_instances)
    return arrays


def instances(
    arrays: Mapping[str, NDArray[np.generic]], signature: Signature, moving: Sequence[str]
) -> tuple[Instance, ...]:
    """Splits a batch; inputs without a batch axis are the same for every instance."""
    batched = [spec.name for spec in signature.inputs if spec.batched]
    count = arrays[batched[0]].shape[0] if batched else 1

    def of(index: int, name: str) -> NDArray[np.generic]:
        whole = arrays[name]
        return whole[index] if name in batched else whole

    return tuple(
        Instance(
            moving={name: of(index, name) for name in moving},
            fixed={name: of(index, name) for name in arrays if name not in moving},
        )
        for index in range(count)
    )


def methods(
    specs: Sequence[method_pb2.MethodSpec], model: ServedModel, subject: Subject, settings: Settings
) -> tuple[Method, ...]:
    """The methods of a request with their options; adaptive Integrated Gradients where none is named.

    Raises:
        InvalidRequest: an option is out of its range or does not fit the model, or no method is chosen
            (METHOD_REQUIRED).
        LimitExceeded: more steps than the server allows (STEP_COUNT_EXCEEDED).
        Unsupported: the model lacks what a method needs.
    """
    cap = min(settings.max_step_count, model.config.limits.max_step_count or settings.max_step_count)
    chosen = [_capped(read_method(spec), spec, cap) for spec in specs or [_DEFAULT_METHOD]]
    for method in chosen:
        model.check_supports(method.needs.rule, layers=method.needs.layers or bool(subject.cut), cut=bool(subject.cut))
    return tuple(method.resolved(subject) for method in chosen)


_DEFAULT_METHOD = method_pb2.MethodSpec(integrated_gradients=method_pb2.IntegratedGradients())


def _capped(method: Method, spec: method_pb2.MethodSpec, cap: int) -> Method:
    """A default that is above the cap gives way to it, so that a plain request is never refused for it; so do those of
    methods within it."""
    message = getattr(spec, name_of(method))
    options: dict[str, Any] = {option.name: getattr(method, option.name) for option in fields(cast(Any, method))}
    inner = {
        name: _capped(value, getattr(message, name), cap)
        for name, value in options.items()
        if type(value) in METHODS.values()
    }
    option = "max_step_count" if options.get("step_count") is None else "step_count"
    steps = options.get(option) or 0
    if steps <= cap:
        return _with(method, inner) if inner else method
    stated = {field.name for field, _ in message.ListFields()}
    if stated.isdisjoint({"step_count", "max_step_count"}):
        return _with(method, {option: max(cap, MIN_STEP_COUNT if option == "max_step_count" else 1)})
    raise LimitExceeded(
        "STEP_COUNT_EXCEEDED", f"{steps} steps are above the limit of {cap}", step_count=steps, limit=cap
    )


def _with(method: Method, options: Mapping[str, Any]) -> Method:
    return cast(Method, replace(cast(Any, method), **options))


def predicted_score(value: int) -> Score:
    """The score of a Predict request."""
    return _lookup(SCORES, value, "score")


def top_k(value: int) -> int:
    """Number of classes of a Predict request; 5 where none is stated."""
    if value < 0:
        raise InvalidRequest("TOP_K_OUT_OF_RANGE", f"top_k {value} is below 1", top_k=value)
    return value or 5


def _subject(model: ServedModel, instance: Instance) -> Subject:
    specs = {spec.name: spec.map_spec for spec in model.signature.inputs}
    return Subject(
        maps={name: specs[name] for name in instance.moving},
        shapes={name: array.shape for name, array in instance.moving.items()},
        layers=model.layers,
        configured_layers=model.config.layers,
    )


def _layer_subject(model: ServedModel, names: tuple[str, ...], arrays: Mapping[str, NDArray[np.generic]]) -> Subject:
    """Layers in the place of inputs. Extents that the file leaves open are those of the inputs' axes of that name."""
    known = {layer.name: layer for layer in model.layers}
    extents = {
        axis.name: extent
        for spec in model.signature.inputs
        for axis, extent in zip(spec.axes, arrays[spec.name].shape, strict=True)
    }
    shapes = {name: _layer_shape(name, known.get(name), extents) for name in names}
    return Subject({name: _layer_map(name, shape) for name, shape in shapes.items()}, shapes, cut=names)


def _layer_shape(name: str, layer: Layer | None, extents: Mapping[str, int]) -> tuple[int, ...]:
    """Of one instance.

    Raises:
        InvalidRequest: there is no such layer (UNKNOWN_LAYER).
        Unsupported: its extents are not known (LAYER_SHAPE_UNKNOWN).
    """
    if layer is None:
        raise InvalidRequest("UNKNOWN_LAYER", f"the model has no layer {name!r}", layer=name)
    sizes = [axis.size or extents.get(axis.name) for axis in layer.axes[1:]]
    known = tuple(size for size in sizes if size is not None)
    if not layer.axes or len(known) != len(sizes):
        raise Unsupported("LAYER_SHAPE_UNKNOWN", f"the file does not tell the shape of layer {name!r}", layer=name)
    return known


def _layer_map(name: str, shape: tuple[int, ...]) -> MapSpec:
    """Two axes are positions with features, such as tokens with their embedding: sums over channels are per token."""
    return MapSpec(name, "TC", 1) if len(shape) == 2 else MapSpec(name)


def _moving(model: ServedModel, fixed_inputs: Sequence[str], *, explains_layers: bool = False) -> tuple[str, ...]:
    """Inputs that move: the floating-point ones, and where layers are explained all from which these are computed."""
    signature = model.signature
    for name in fixed_inputs:
        signature.input(name)
    if explains_layers:
        return tuple(spec.name for spec in signature.inputs if spec.name not in fixed_inputs)
    moving = tuple(name for name in signature.differentiable_inputs if name not in fixed_inputs)
    if not moving:
        raise Unsupported(
            "NO_DIFFERENTIABLE_INPUT",
            "no floating-point input moves; explain a floating-point tensor of the graph instead, such as an embedding"
            if not signature.differentiable_inputs
            else "every floating-point input is in fixed_inputs",
            inputs=", ".join(spec.name for spec in signature.inputs),
            layers=", ".join(_explainable(model)),
        )
    return moving


def _explainable(model: ServedModel) -> tuple[str, ...]:
    """Tensors that can be explained where no input can: those configured, else embeddings, else the first layers."""
    layers = model.loaded.layers
    embeddings = tuple(layer.name for layer in layers if layer.operator == "Gather")
    return (model.config.layers or embeddings or tuple(layer.name for layer in layers))[:NAMED_LAYERS]


def _input(spec: InputSpec, tensor: tensor_pb2.Tensor) -> NDArray[np.generic]:
    array = decode(f"input {spec.name!r}", tensor)
    if array.dtype != spec.dtype:
        raise InvalidRequest(
            "DTYPE_MISMATCH",
            f"input {spec.name!r} has element type {array.dtype.name}, expected {spec.dtype.name}",
            input=spec.name,
            expected=spec.dtype.name,
            actual=array.dtype.name,
        )
    _check_shape(spec, array.shape)
    if spec.differentiable and not np.isfinite(array).all():
        raise InvalidRequest(
            "NON_FINITE_INPUT",
            f"input {spec.name!r} has {int((~np.isfinite(array)).sum())} values that are NaN or infinite",
            input=spec.name,
            count=int((~np.isfinite(array)).sum()),
        )
    return array


def _check_shape(spec: InputSpec, shape: tuple[int, ...]) -> None:
    axes = spec.axes
    fits = len(shape) == len(axes) and all(
        axis.size is None or axis.size == extent or (spec.batched and position == 0)
        for position, (axis, extent) in enumerate(zip(axes, shape, strict=True))
    )
    if not fits:
        expected = [axis.name if spec.batched and k == 0 else (axis.size or axis.name) for k, axis in enumerate(axes)]
        raise InvalidRequest(
            "SHAPE_MISMATCH",
            f"input {spec.name!r} has shape {list(shape)}, expected {expected}",
            input=spec.name,
            expected=expected,
            actual=list(shape),
        )
    if 0 in shape[1:]:
        raise InvalidRequest(
            "SHAPE_MISMATCH",
            f"input {spec.name!r} has an empty axis: {list(shape)}",
            input=spec.name,
            actual=list(shape),
        )


def _check_batch(arrays: Mapping[str, NDArray[np.generic]], signature: Signature, limit: int) -> None:
    lengths = {spec.name: arrays[spec.name].shape[0] for spec in signature.inputs if spec.batched}
    if len(set(lengths.values())) > 1:
        raise InvalidRequest(
            "BATCH_MISMATCH",
            "inputs disagree on the number of instances: " + ", ".join(f"{n} has {k}" for n, k in lengths.items()),
            inputs=", ".join(lengths),
            lengths=", ".join(str(length) for length in lengths.values()),
        )
    count = next(iter(lengths.values()), 1)
    if count == 0:
        raise InvalidRequest("EMPTY_BATCH", "the batch holds no instance")
    if count > limit:
        raise LimitExceeded(
            "TOO_MANY_INSTANCES", f"{count} instances are above the limit of {limit}", count=count, limit=limit
        )


def _leaves_range(array: NDArray[np.generic], spec: InputSpec) -> bool:
    """Whether values lie outside the stated value range, by more than rounding."""
    if spec.value_range is None:
        return False
    low, high = (spec.model_value(end) if spec.has_preprocessing else np.array([end]) for end in spec.value_range)
    channel_axis = None if spec.channel_axis is None else spec.channel_axis + (1 if spec.batched else 0)
    axes = tuple(axis for axis in range(array.ndim) if axis != channel_axis)
    slack = 1e-5 * (high - low)
    lowest, highest = array.min(axis=axes).astype(np.float64), array.max(axis=axes).astype(np.float64)
    return bool((lowest < low - slack).any() or (highest > high + slack).any())


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


def _targets(messages: Sequence[target_pb2.Target], model: ServedModel) -> tuple[domain_targets.TargetSpec, ...]:
    if messages:
        return tuple(_target(message, position) for position, message in enumerate(messages))
    default = model.default_target
    selection = domain_targets.Argmax() if default is None else domain_targets.Element((default,))
    output = "" if default is None else model.signature.outputs[0].name
    return (domain_targets.TargetSpec(output, Score.OUTPUT, selection),)


def _target(message: target_pb2.Target, position: int) -> domain_targets.TargetSpec:
    return domain_targets.TargetSpec(
        output=message.output,
        score=_lookup(SCORES, message.score, "score"),
        selection=_selection(message),
        reduction=_lookup(REDUCTIONS, message.reduction, "reduction"),
        instance_index=message.instance_index if message.HasField("instance_index") else None,
        request_index=position,
    )


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


def _baselines(
    messages: Sequence[baseline_pb2.Baseline], model: ServedModel, subject: Subject
) -> tuple[domain_baselines.BaselineSpec, ...]:
    if not messages:
        return (domain_baselines.BaselineSpec(model.default_baseline),)
    return tuple(_baseline(message, model, subject, position) for position, message in enumerate(messages))


def _baseline(
    message: baseline_pb2.Baseline, model: ServedModel, subject: Subject, position: int
) -> domain_baselines.BaselineSpec:
    for name in message.inputs:
        model.signature.input(name)
    layers = {name: _input_baseline(own) for name, own in message.layers.items()}
    domain_baselines.check_layers(layers, subject)
    every = _input_baseline(message.every_input) if message.HasField("every_input") else domain_baselines.Zeros()
    return domain_baselines.BaselineSpec(
        every_input=every,
        inputs={name: _input_baseline(own) for name, own in message.inputs.items()},
        layers=layers,
        instance_index=message.instance_index if message.HasField("instance_index") else None,
        request_index=position,
    )


def _input_baseline(message: baseline_pb2.InputBaseline) -> domain_baselines.InputBaseline:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("BASELINE_REQUIRED", "the baseline message names no kind")
    if message.space not in (model_pb2.SPACE_UNSPECIFIED, model_pb2.SPACE_MODEL, model_pb2.SPACE_PIXEL):
        raise InvalidRequest("ENUM_UNKNOWN", f"space {message.space} is unknown", field="space", value=message.space)
    return BASELINE_READERS[kind](getattr(message, kind), message.space == model_pb2.SPACE_PIXEL)


def _constant(message: baseline_pb2.ConstantBaseline, pixel_space: bool) -> domain_baselines.Constant:
    if not message.values or not all(math.isfinite(value) for value in message.values):
        raise InvalidRequest("BASELINE_NOT_FINITE", "a constant baseline needs at least one value, all finite")
    return domain_baselines.Constant(tuple(message.values), pixel_space)


def _blur(message: baseline_pb2.BlurBaseline, pixel_space: bool) -> domain_baselines.Blur:
    if not 0 < message.sigma <= 1000:
        raise InvalidRequest("BASELINE_SIGMA_OUT_OF_RANGE", f"blur sigma {message.sigma} is not in (0, 1000]")
    return domain_baselines.Blur(message.sigma)


def _uniform(message: baseline_pb2.UniformNoiseBaseline, pixel_space: bool) -> domain_baselines.UniformNoise:
    return domain_baselines.UniformNoise(
        low=_finite_or_none(message, "low"),
        high=_finite_or_none(message, "high"),
        seed=_seed(message.seed),
        count=_draw_count(message),
        pixel_space=pixel_space,
    )


def _gaussian(message: baseline_pb2.GaussianNoiseBaseline, pixel_space: bool) -> domain_baselines.GaussianNoise:
    if not (message.std > 0 and math.isfinite(message.std)):
        raise InvalidRequest("BASELINE_SIGMA_OUT_OF_RANGE", f"Gaussian noise needs a positive std, got {message.std}")
    return domain_baselines.GaussianNoise(
        mean=_finite_or_none(message, "mean"),
        std=message.std,
        seed=_seed(message.seed),
        count=_draw_count(message),
        pixel_space=pixel_space,
    )


BASELINE_READERS: dict[str, Callable[[Any, bool], domain_baselines.InputBaseline]] = {
    "zeros": lambda message, pixel_space: domain_baselines.Zeros(pixel_space),
    "constant": _constant,
    "black": lambda message, pixel_space: domain_baselines.NAMED["black"],
    "gray": lambda message, pixel_space: domain_baselines.NAMED["gray"],
    "white": lambda message, pixel_space: domain_baselines.NAMED["white"],
    "tensor": lambda message, pixel_space: domain_baselines.Given(decode_floats("baseline", message), pixel_space),
    "blur": _blur,
    "uniform_noise": _uniform,
    "gaussian_noise": _gaussian,
    "data": lambda message, pixel_space: domain_baselines.Data(message.name),
}
"""Reads a baseline's message, by the name of its field in InputBaseline."""


def _finite_or_none(message: Any, name: str) -> float | None:
    if not message.HasField(name):
        return None
    value = float(getattr(message, name))
    if not math.isfinite(value):
        raise InvalidRequest("BASELINE_NOT_FINITE", f"baseline {name} {value} is not finite", field=name)
    return value


def _seed(value: int) -> int:
    if value < 0:
        raise InvalidRequest("SEED_OUT_OF_RANGE", f"seed {value} is negative", seed=value)
    return value


def _draw_count(message: Any) -> int:
    count = int(message.count) if message.HasField("count") else 1
    if not 1 <= count <= 1024:
        raise InvalidRequest("BASELINE_COUNT_OUT_OF_RANGE", f"{count} draws are not in [1, 1024]", count=count)
    return count


def _region(message: statistics_pb2.Region) -> Region:
    if not message.name:
        raise InvalidRequest("REGION_REQUIRED", "a region has no name")
    return Region(
        name=message.name,
        area=_area(message),
        input=message.input,
        instance_index=message.instance_index if message.HasField("instance_index") else None,
    )


def _area(message: statistics_pb2.Region) -> Box | NDArray[np.bool_]:
    match message.WhichOneof("area"):
        case "box":
            return Box(message.box.x, message.box.y, message.box.width, message.box.height)
        case "mask":
            mask = decode(f"mask of region {message.name!r}", message.mask)
            if mask.dtype != np.bool_:
                raise InvalidRequest(
                    "DTYPE_MISMATCH",
                    f"mask of region {message.name!r} has element type {mask.dtype.name}, expected bool",
                    region=message.name,
                )
            return mask.astype(np.bool_, copy=False)
        case _:
            raise InvalidRequest("REGION_REQUIRED", f"region {message.name!r} has neither box nor mask")


def _groups(messages: Sequence[statistics_pb2.Group]) -> tuple[Group, ...]:
    names = Counter(message.name for message in messages)
    for message in messages:
        if not message.name or message.name == "all" or message.name.startswith("all/") or names[message.name] > 1:
            raise InvalidRequest(
                "GROUP_NAME_INVALID",
                f"group name {message.name!r} is empty, reserved or repeated",
                group=message.name,
            )
        if not message.selectors:
            raise InvalidRequest("EMPTY_GROUP", f"group {message.name!r} has no selector", group=message.name)
    return tuple(
        Group(message.name, tuple(_selector(selector) for selector in message.selectors), message.pairwise)
        for message in messages
    )


def _selector(message: statistics_pb2.AttributionSelector) -> Selector:
    names = ("method_index", "instance_index", "target_index", "baseline_index")
    return Selector(**{n: getattr(message, n) for n in names if message.HasField(n)})  # type: ignore[arg-type]


def _figure_options(message: explainer_service_pb2.ResponseOptions) -> FigureOptions:
    return FigureOptions(
        statistics=not message.omit_statistics,
        joint=not message.omit_joint_statistics,
        regions=not message.omit_regions,
        views=tuple(dict.fromkeys(_lookup(VIEWS, view, "view") for view in message.views)),
    )


def _lookup(table: Mapping[int, T], value: int, field: str) -> T:
    if value not in table:
        raise InvalidRequest("ENUM_UNKNOWN", f"{field} {value} is unknown", field=field, value=value)
    return table[value]
