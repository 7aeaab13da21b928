"""What the server says of its models."""

from __future__ import annotations

import dataclasses

from google.protobuf.duration_pb2 import Duration

from explainserve.errors import InvalidRequest, Unsupported
from explainserve.explanation import Subject
from explainserve.methods import METHODS, Method, superpixels
from explainserve.methods.contract import Needs
from explainserve.methods.grids import grid
from explainserve.repository import ModelEntry
from explainserve.rpc.provenance import duration, noise_floor
from explainserve.rpc.tensors import data_type
from explainserve.served_model import MissingCapability, ServedModel
from explainserve.signature import (
    Activation,
    Axis,
    InputSpec,
    Layer,
    OutputKind,
    OutputSpec,
    Signature,
    SuppressedOutput,
)
from explainserve.v1 import model_pb2

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
        suppressed_outputs=[_suppressed_output(own) for own in model.signature.suppressed],
        batching=model_pb2.BATCHING_ROW_BY_ROW if model.row_by_row else model_pb2.BATCHING_ROWS,
        warnings=model.warnings,
        methods=[_method_support(name, method, model) for name, method in METHODS.items()],
        gaps=[model_pb2.OperatorGap(**dataclasses.asdict(gap)) for gap in model.loaded.gaps],
        layers=_layers(model),
        backend=model.loaded.backend,
        device=model.runs_on,
        execution=model.loaded.execution,
        execution_map_error=model.execution_map_error,
        noise_floor=noise_floor(model),
        precision=model.precision,
        precision_map_error=model.probe.precision_map_error,
        data_baselines=sorted(model.data_baselines),
        default_target=model.default_target,
        default_baseline=model.config.default_baseline,
        differentiable=model.differentiable,
        memory=_memory(model),
        max_batch_rows=model.max_batch_rows,
        row_duration=_row_duration(model),
        replicas=[_replica(replica) for replica in entry.replicas],
    )


def _replica(model: ServedModel) -> model_pb2.Replica:
    return model_pb2.Replica(
        device=model.runs_on,
        execution=model.loaded.execution,
        execution_map_error=model.execution_map_error,
        noise_floor=noise_floor(model),
        precision_map_error=model.probe.precision_map_error,
        memory=_memory(model),
        max_batch_rows=model.max_batch_rows,
        row_duration=_row_duration(model),
        micro_batch_bytes=model.micro_batch_bytes,
    )


def _row_duration(model: ServedModel) -> Duration | None:
    return None if model.seconds_per_row is None else duration(model.seconds_per_row)


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


def _method_support(name: str, method: type[Method], model: ServedModel) -> model_pb2.MethodSupport:
    default = method()
    guide, needs = default.reading_guide, default.needs
    missing = (
        model.missing(needs.rule, layers=needs.layers, spatial_axes=needs.spatial_axes)
        or _missing_grid(needs, model)
        or _missing_segmentation(needs, model.signature)
    )
    return model_pb2.MethodSupport(
        method=name,
        supported=missing is None,
        reason=missing.reason if missing else "",
        missing_capability=missing.capability if missing else "",
        reading_guide=model_pb2.ReadingGuide(**dataclasses.asdict(guide)),
    )


def _missing_grid(needs: Needs, model: ServedModel) -> MissingCapability | None:
    """Of methods that read a layer as a grid over an image; unknown where the extents of inputs are."""
    signature = model.signature
    shapes = {
        spec.name: tuple(axis.size for axis in spec.instance_axes if axis.size is not None)
        for spec in signature.inputs
        if spec.differentiable
    }
    known = all(len(shape) == len(signature.input(name).instance_axes) for name, shape in shapes.items())
    if not (needs.layers and needs.spatial_axes and known):
        return None
    subject = Subject(
        maps={name: signature.input(name).map_spec for name in shapes},
        shapes=shapes,
        layers=model.layers,
        configured_layers=model.config.layers,
    )
    try:
        grid(subject, None)
    except (InvalidRequest, Unsupported) as refusal:
        return MissingCapability("grid_layer", refusal.message)
    return None


def _missing_segmentation(needs: Needs, signature: Signature) -> MissingCapability | None:
    """Of methods whose defaults have segments found; inputs without H and W axes have none to find."""
    pictures = any(spec.differentiable and spec.spatial_axes is not None for spec in signature.inputs)
    if needs.segmentation and pictures and not superpixels.is_installed():
        return MissingCapability("segmentation", f"it needs scikit-image: {superpixels.NOT_INSTALLED}")
    return None


def _output_spec(spec: OutputSpec) -> model_pb2.OutputSpec:
    return model_pb2.OutputSpec(
        name=spec.name,
        data_type=data_type(spec.dtype),
        axes=[_axis(axis) for axis in spec.axes],
        kind=_KINDS[spec.kind],
        activation=_ACTIVATIONS[spec.activation],
        class_axis=spec.class_axis,
        labels=spec.labels,
        pre_activation=spec.pre_activation,
    )


def _suppressed_output(own: SuppressedOutput) -> model_pb2.SuppressedOutput:
    return model_pb2.SuppressedOutput(name=own.name, node=own.node, reason=str(own))


def _axis(axis: Axis) -> model_pb2.Axis:
    return model_pb2.Axis(name=axis.name, size=axis.size)
