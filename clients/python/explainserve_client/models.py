"""What the server knows of a model: inputs, outputs, methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from explainserve.v1 import model_pb2, tensor_pb2
from explainserve_client.errors import RequestValueError
from explainserve_client.names import short_name
from explainserve_client.table import Table


def model_ref(name: str, version: int | None) -> model_pb2.ModelRef:
    """Names a model of the server's folder; no version means the highest that is ready."""
    return model_pb2.ModelRef(named=named_model(name, version))


def named_model(name: str, version: int | None) -> model_pb2.NamedModel:
    """Names a model of the server's folder; what no version means, the call says."""
    return model_pb2.NamedModel(name=name, version=version)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its name, and its extent or None where any is accepted."""

    name: str
    size: int | None


@dataclass(frozen=True, slots=True)
class ValueRange:
    """Closed interval of an input's values before mean and std are applied; 0..255 of a pixel is mapped onto it."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """model = (pixel x scale - mean) / std, per channel or one for all, in the unit of the input's value range."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model.

    Attributes:
        dtype: name of the element type, such as "float32".
        axes: in order, the batch axis first where there is one.
        layout: letters of the axes, such as "NCHW", or "" where not stated.
        batch_axis, channel_axis: positions in `axes`, None where there is none.
        channel_order: such as "RGB" or "BGR", or "" where not stated.
        value_range, preprocessing: None where not stated; then pixel-space baselines are refused.
        differentiable: whether the input can move along a path and receive attributions.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    layout: str = ""
    batch_axis: int | None = None
    channel_axis: int | None = None
    channel_order: str = ""
    value_range: ValueRange | None = None
    preprocessing: Preprocessing | None = None
    differentiable: bool = False

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Extents of all axes, None where any is accepted."""
        return tuple(axis.size for axis in self.axes)

    @property
    def instance_rank(self) -> int:
        """Number of axes of one instance, the batch axis left out."""
        return len(self.axes) - (self.batch_axis is not None)

    @property
    def instance_layout(self) -> str:
        """Letters of one instance's axes, such as "CHW", or ""."""
        return self.layout[1:] if self.batch_axis is not None else self.layout

    @property
    def instance_channel_axis(self) -> int | None:
        """Position of the channel axis in one instance, or None."""
        if self.channel_axis is None:
            return None
        return self.channel_axis - (self.batch_axis is not None)

    @classmethod
    def from_proto(cls, message: model_pb2.InputSpec) -> InputSpec:
        """Reads the message."""
        return cls(
            name=message.name,
            dtype=short_name(tensor_pb2.DataType, message.data_type).lower(),
            axes=_axes(message),
            layout=message.layout,
            batch_axis=message.batch_axis if message.HasField("batch_axis") else None,
            channel_axis=message.channel_axis if message.HasField("channel_axis") else None,
            channel_order=message.channel_order,
            value_range=_value_range(message),
            preprocessing=_preprocessing(message),
            differentiable=message.differentiable,
        )


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One output of a model.

    Attributes:
        kind: "LOGITS", "PROBABILITIES" or "VALUES".
        activation: "SOFTMAX", "SIGMOID" or "NONE": the function between logits and probabilities.
        class_axis: position in `axes`, None where there is none.
        labels: along the class axis, empty where not stated.
        pre_activation: of probabilities, the tensor of the file that their softmax or sigmoid is computed from, which
            score "LOGIT" explains; "" where the file does not show it.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    kind: str
    activation: str
    class_axis: int | None
    labels: tuple[str, ...]
    pre_activation: str = ""

    @classmethod
    def from_proto(cls, message: model_pb2.OutputSpec) -> OutputSpec:
        """Reads the message."""
        return cls(
            name=message.name,
            dtype=short_name(tensor_pb2.DataType, message.data_type).lower(),
            axes=_axes(message),
            kind=short_name(model_pb2.OutputKind, message.kind),
            activation=short_name(model_pb2.Activation, message.activation),
            class_axis=message.class_axis if message.HasField("class_axis") else None,
            labels=tuple(message.labels),
            pre_activation=message.pre_activation,
        )


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One line about a model version.

    Attributes:
        version: 0 where a folder without any version is reported.
        state: "LOADING", "READY" or "FAILED".
        reason, error_reason: why it failed, in words and as UPPER_SNAKE; "" otherwise.
        format: "ONNX", "TORCH_EXPORT" or "TORCHSCRIPT".
        devices: that hold it while it is ready, such as "cuda:0".
    """

    name: str
    version: int
    state: str
    reason: str
    error_reason: str
    format: str
    devices: tuple[str, ...] = ()

    @classmethod
    def from_proto(cls, message: model_pb2.ModelSummary) -> ModelSummary:
        """Reads the message."""
        return cls(
            name=message.name,
            version=message.version,
            state=short_name(model_pb2.ModelState, message.state),
            reason=message.reason,
            error_reason=message.error_reason,
            format=short_name(model_pb2.ModelFormat, message.format),
            devices=tuple(message.devices),
        )


@dataclass(frozen=True, slots=True)
class MethodSupport:
    """Whether a model supports a method, and how a value of its maps reads.

    Attributes:
        method: such as "integrated_gradients".
        supported, reason: whether, and the missing capability in words where not.
        family: "gradient", "path", "activation", "backward rule", "perturbation" or "region".
        units: such as "output" or "output per unit of input".
        complete: whether attributions sum to F(x) - F(x').
        needs_baseline, deterministic, paper: as they say.
        tier: what it needs of a model: "T0" values, "T1" also gradients, "T2" also activations, "T3" altered backward
            rules.
        fails_randomization: whether its maps hardly change when the weights of a model are randomized.
        pools_baselines: whether all baselines of an instance make one map.
        complete_by_construction: whether they sum to that whatever the number of steps.
        score_before_activation: whether it is defined on the score before the softmax or sigmoid, and explains that
            where a target names no score and the output has a `pre_activation`.
        missing_capability: "gradient", "layers", "spatial_axes", "grid_layer", "rule:<name>" or "segmentation"; ""
            where supported.
    """

    method: str
    supported: bool
    reason: str
    family: str
    units: str
    complete: bool
    needs_baseline: bool
    deterministic: bool
    paper: str
    tier: str = ""
    fails_randomization: bool = False
    pools_baselines: bool = False
    complete_by_construction: bool = False
    score_before_activation: bool = False
    missing_capability: str = ""

    @classmethod
    def from_proto(cls, message: model_pb2.MethodSupport) -> MethodSupport:
        """Reads the message."""
        guide = message.reading_guide
        return cls(
            method=message.method,
            supported=message.supported,
            reason=message.reason,
            family=guide.family,
            units=guide.units,
            complete=guide.complete,
            needs_baseline=guide.needs_baseline,
            deterministic=guide.deterministic,
            paper=guide.paper,
            tier=guide.tier,
            fails_randomization=guide.fails_randomization,
            pools_baselines=guide.pools_baselines,
            complete_by_construction=guide.complete_by_construction,
            score_before_activation=guide.score_before_activation,
            missing_capability=message.missing_capability,
        )


@dataclass(frozen=True, slots=True)
class OperatorGap:
    """An operator that has no gradient rule: which, in which node, why, and what the model's owner can do."""

    operator: str
    node: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class SuppressedOutput:
    """An output of the model file that is not served: it lies behind the NonMaxSuppression `node`. `reason` says why,
    and what the model's owner can do.
    """

    name: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A floating-point tensor between inputs and outputs that a person can pick.

    Attributes:
        operator, module: what computes it; "" where the file does not tell.
        axes: the batch axis included; empty where even their number is unknown.
        bypassing_inputs: inputs whose values reach this tensor, and around it too an output that depends on it.
        configured: the model's configuration names it.
    """

    name: str
    operator: str
    module: str
    axes: tuple[Axis, ...]
    bypassing_inputs: tuple[str, ...]
    configured: bool

    @classmethod
    def from_proto(cls, message: model_pb2.Layer) -> Layer:
        """Reads the message."""
        return cls(
            name=message.name,
            operator=message.operator,
            module=message.module,
            axes=_axes(message),
            bypassing_inputs=tuple(message.bypassing_inputs),
            configured=message.configured,
        )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a loaded model takes: the weights of its file, larger constants that only gradients have, and by how
    much the server grew when it opened sessions (about right; None where it could not be measured).
    """

    weight_bytes: int
    gradient_bytes: int
    session_bytes: int | None

    @classmethod
    def from_proto(cls, message: model_pb2.Memory) -> Memory:
        """Reads the message."""
        measured = message.session_bytes if message.HasField("session_bytes") else None
        return cls(message.weight_bytes, message.gradient_bytes, measured)


@dataclass(frozen=True, slots=True)
class Replica:
    """A model on one of the devices that hold it, and what was found there when it was loaded; see `ModelInfo`.

    Attributes:
        micro_batch_bytes: most memory that a micro-batch takes there; None where it was not measured.
    """

    device: str
    execution: str
    execution_map_error: float | None
    precision_map_error: float | None
    noise_floor: float | None
    memory: Memory | None
    max_batch_rows: int
    seconds_per_row: float | None
    micro_batch_bytes: int | None

    @classmethod
    def from_proto(cls, message: model_pb2.Replica) -> Replica:
        """Reads the message."""
        return cls(
            micro_batch_bytes=message.micro_batch_bytes if message.HasField("micro_batch_bytes") else None,
            **_found_at_load(message),
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """All that the server knows of one model version.

    Attributes:
        summary: name, version, state and format.
        sha256: of the model file, lower-case hexadecimal.
        inputs, outputs: by name, in the order of the model file.
        suppressed_outputs: outputs of the file that are not served, by name.
        batching: "ROWS", or "ROW_BY_ROW" where rows depend on each other.
        warnings: what was found at load.
        methods: by name, such as "integrated_gradients".
        gaps: operators without a gradient, all of them.
        layers: intermediate tensors that can be picked, by name, in the order of the graph.
        device: the first of those that hold it; what was measured at load is that of this one.
        execution: how the backend runs it where it has a choice, such as "channels_last"; "" where it has none.
        execution_map_error: relative L2 error of whole maps that compiling makes, measured at load; None where nothing
            compiled runs.
        precision_map_error: relative L2 error of whole maps that a reduced precision makes, measured at load; None in
            float32.
        noise_floor: relative L2 noise of the gradients; None where there is none.
        memory: what it takes in the server; None where the backend does not tell.
        max_batch_rows: rows that are evaluated together at most, found to be fastest when the model was loaded.
        seconds_per_row: of a micro-batch of that size, with gradients; None where it was not measured.
        default_target: class that is explained when a request names none; None means argmax.
        replicas: the model on each device that holds it.
    """

    summary: ModelSummary
    sha256: str
    inputs: Table[InputSpec]
    outputs: Table[OutputSpec]
    suppressed_outputs: Table[SuppressedOutput]
    batching: str
    warnings: tuple[str, ...]
    methods: Table[MethodSupport]
    gaps: tuple[OperatorGap, ...]
    layers: Table[Layer]
    backend: str
    device: str
    execution: str
    execution_map_error: float | None
    precision: str
    precision_map_error: float | None
    noise_floor: float | None
    data_baselines: tuple[str, ...]
    default_target: int | None
    default_baseline: str
    differentiable: bool
    memory: Memory | None
    max_batch_rows: int
    seconds_per_row: float | None
    replicas: tuple[Replica, ...]

    @property
    def name(self) -> str:
        """Name of the model's folder."""
        return self.summary.name

    @property
    def version(self) -> int:
        """Version."""
        return self.summary.version

    def __repr__(self) -> str:
        inputs = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in self.inputs.values())
        return f"<ModelInfo {self.name} version {self.version} {self.summary.state}: {inputs} on {self.backend}>"

    @classmethod
    def from_proto(cls, message: model_pb2.Model) -> ModelInfo:
        """Reads the message."""
        return cls(
            summary=ModelSummary.from_proto(message.summary),
            sha256=message.sha256,
            inputs=Table("input", ((spec.name, InputSpec.from_proto(spec)) for spec in message.inputs)),
            outputs=Table("output", ((spec.name, OutputSpec.from_proto(spec)) for spec in message.outputs)),
            suppressed_outputs=Table(
                "suppressed output",
                ((own.name, SuppressedOutput(own.name, own.node, own.reason)) for own in message.suppressed_outputs),
            ),
            batching=short_name(model_pb2.Batching, message.batching),
            warnings=tuple(message.warnings),
            methods=Table("method", ((line.method, MethodSupport.from_proto(line)) for line in message.methods)),
            gaps=tuple(OperatorGap(gap.operator, gap.node, gap.reason, gap.remedy) for gap in message.gaps),
            layers=Table("layer", ((layer.name, Layer.from_proto(layer)) for layer in message.layers)),
            backend=message.backend,
            precision=message.precision,
            data_baselines=tuple(message.data_baselines),
            default_target=message.default_target if message.HasField("default_target") else None,
            default_baseline=message.default_baseline,
            differentiable=message.differentiable,
            replicas=tuple(map(Replica.from_proto, message.replicas)),
            **_found_at_load(message),
        )

    def require_ready(self) -> None:
        """Raises RequestValueError where this version cannot answer, with the server's reason."""
        if self.summary.state != "READY":
            reason = self.summary.reason or "no reason given"
            raise RequestValueError(f"model {self.name!r} version {self.version} is {self.summary.state}: {reason}")


def _found_at_load(message: model_pb2.Model | model_pb2.Replica) -> dict[str, Any]:
    """What a model and each of its replicas state alike."""
    return {
        "device": message.device,
        "execution": message.execution,
        "execution_map_error": message.execution_map_error if message.HasField("execution_map_error") else None,
        "precision_map_error": message.precision_map_error if message.HasField("precision_map_error") else None,
        "noise_floor": message.noise_floor if message.HasField("noise_floor") else None,
        "memory": Memory.from_proto(message.memory) if message.HasField("memory") else None,
        "max_batch_rows": message.max_batch_rows,
        "seconds_per_row": message.row_duration.ToNanoseconds() / 1e9 if message.HasField("row_duration") else None,
    }


def _axes(message: model_pb2.InputSpec | model_pb2.OutputSpec | model_pb2.Layer) -> tuple[Axis, ...]:
    return tuple(Axis(axis.name, axis.size if axis.HasField("size") else None) for axis in message.axes)


def _value_range(message: model_pb2.InputSpec) -> ValueRange | None:
    stated = message.value_range
    return ValueRange(stated.low, stated.high) if message.HasField("value_range") else None


def _preprocessing(message: model_pb2.InputSpec) -> Preprocessing | None:
    stated = message.preprocessing
    return Preprocessing(tuple(stated.mean), tuple(stated.std)) if message.HasField("preprocessing") else None
