"""What the server answered, typed and read-only; tensors are views of the bytes that arrived."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from explainserve.v1 import attribution_pb2, explainer_service_pb2, statistics_pb2
from explainserve_client.baselines import UsedBaseline
from explainserve_client.errors import MissingEntryError
from explainserve_client.methods import Method, used_method
from explainserve_client.models import InputSpec
from explainserve_client.names import short_name
from explainserve_client.preprocess import Geometry
from explainserve_client.statistics import (
    JointInput,
    JointStatistics,
    Normalization,
    PairRange,
    RegionSum,
    Statistics,
    find_normalization,
    statistics_table,
)
from explainserve_client.table import Table
from explainserve_client.targets import ResolvedTarget
from explainserve_client.tensors import Array, to_array

Geometries = Mapping[str, tuple[Geometry, ...]]


@dataclass(frozen=True, slots=True)
class Caution:
    """A warning: kind, such as "SINGLE_CASE", in words, and the paper it comes from ("" for the server's own)."""

    kind: str
    text: str
    source: str

    @classmethod
    def from_proto(cls, message: attribution_pb2.Caution) -> Caution:
        """Reads the message."""
        return cls(short_name(attribution_pb2.CautionKind, message.kind), message.text, message.source)


@dataclass(frozen=True, slots=True)
class ScorePath:
    """F(alpha) on the line from baseline (alpha 0) to instance (alpha 1), alphas ascending."""

    alphas: tuple[float, ...]
    scores: tuple[float, ...]

    def __repr__(self) -> str:
        return f"<ScorePath of {len(self.alphas)} points>"


@dataclass(frozen=True, slots=True, eq=False)
class InputAttribution:
    """The map of one input.

    Attributes:
        name: of the input.
        tensor: raw attributions, float32, shape of one instance, read-only; None where `omit_tensors` left it out.
        layout: letters of its axes, such as "CHW", or "".
        channel_axis: position of the channel axis in the tensor, or None.
        statistics: figures by view.
        normalizations: recipes, one per kind and view.
        regions: sums by region name, then by view: `regions["left"]["CHANNEL_SUM"].sum`.
        spread: standard deviation over baselines, where they were folded.
        standard_error: of each value, of sampled methods where `include_standard_errors` asks for it; of a mean
            over baselines at most this.
        segments: labels of the segments that elements belong to, int32 from 0, with extent 1 along axes on which they
            do not depend; where `include_parts` asks for them.
        covered_input: of a map of a layer: the input over whose H and W its own extend; "" elsewhere.
        geometry: how the tensor lies over the image, where the instance was preprocessed by this client.
        rank: number of axes of the tensor, None where not known.
    """

    name: str
    tensor: Array | None
    layout: str
    channel_axis: int | None
    statistics: Table[Statistics]
    normalizations: tuple[Normalization, ...]
    regions: Table[Table[RegionSum]]
    spread: Array | None = None
    standard_error: Array | None = None
    segments: Array | None = None
    covered_input: str = ""
    geometry: Geometry | None = None
    rank: int | None = None

    def normalization(self, kind: str, view: str) -> Normalization:
        """A recipe of this map, such as ("MIN_MAX", "CHANNEL_SUM").

        Raises:
            MissingEntryError: there is none; the message lists those that there are.
        """
        return find_normalization(self.normalizations, kind, view)

    def stated_scale(self, low: float, high: float, view: str = "CHANNEL_SUM") -> Normalization:
        """A scale stated by hand in raw units, for maps that are to be drawn alike; symmetric where low = -high."""
        return Normalization.stated(low, high, view, self.channel_axis, self.rank)

    def __repr__(self) -> str:
        shape = "left out" if self.tensor is None else str(list(self.tensor.shape))
        return f"<InputAttribution {self.name} {shape}>"


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The attributions of one (method, instance, target, baseline).

    Attributes:
        method_index, instance_index, target_index: positions in the request, and among the instance's resolved targets.
        baseline_index: position among the instance's baselines; None for a mean over baselines, and for methods that
            need none or take all.
        target: what was explained; its score is the unit of every value here.
        inputs: maps by name of the explained input.
        instance_output_value, baseline_output_value: F(x) and F(x'); the second is None for methods without a baseline.
        attribution_sum: over all inputs.
        convergence_delta: attribution_sum - (F(x) - F(x')); None where the method is not complete.
        relative_convergence_delta: |convergence_delta| / |F(x) - F(x')|; None where that is zero.
        delta_over_abs_sum: |convergence_delta| / sum|a|; None where that is zero.
        map_error: estimated relative L2 error of the map; None where the rule gives no estimate.
        step_count: gradient evaluations of this path.
        stop_reason: "FIXED_STEPS", "CONVERGED", "MAX_STEPS", "TIME_BUDGET", "NON_CONVERGENT" or "NON_FINITE";
            "UNFINISHED" in a partial map of a stream.
        score_path: None where left out.
        applied_normalization: "NONE", always.
        cautions: for this map.
        r_squared, intercept: of the model that the method fitted to its samples; None of other methods. A mean over
            baselines has the mean intercept and no r_squared.
        parts: maps that this one was made of, by name, where `include_parts` asks for them.
    """

    method_index: int
    instance_index: int
    target_index: int
    baseline_index: int | None
    target: ResolvedTarget
    inputs: Table[InputAttribution]
    instance_output_value: float
    baseline_output_value: float | None
    attribution_sum: float
    convergence_delta: float | None
    relative_convergence_delta: float | None
    delta_over_abs_sum: float | None
    map_error: float | None
    step_count: int
    stop_reason: str
    score_path: ScorePath | None
    applied_normalization: str
    cautions: tuple[Caution, ...]
    r_squared: float | None = None
    intercept: float | None = None
    parts: Table[Array] = field(default_factory=lambda: Table("part", ()))

    @property
    def tensor(self) -> Array:
        """The raw map, where one input is explained.

        Raises:
            MissingEntryError: several inputs are explained, or `omit_tensors` left it out.
        """
        only = self.inputs.only()
        if only.tensor is None:
            raise MissingEntryError(f"the tensor of {only.name!r} was left out (omit_tensors)")
        return only.tensor

    @property
    def tensors(self) -> Table[Array]:
        """The raw maps by input name."""
        there = ((name, line.tensor) for name, line in self.inputs.items())
        return Table("tensor", ((name, tensor) for name, tensor in there if tensor is not None))

    @property
    def statistics(self) -> Table[Statistics]:
        """Figures by view, where one input is explained."""
        return self.inputs.only().statistics

    @property
    def regions(self) -> Table[Table[RegionSum]]:
        """Sums by region name and view, where one input is explained."""
        return self.inputs.only().regions

    def normalization(self, kind: str, view: str) -> Normalization:
        """A recipe of the map, where one input is explained, such as ("MIN_MAX", "CHANNEL_SUM")."""
        return self.inputs.only().normalization(kind, view)

    def stated_scale(self, low: float, high: float, view: str = "CHANNEL_SUM") -> Normalization:
        """A scale stated by hand in raw units, where one input is explained; symmetric where low = -high."""
        return self.inputs.only().stated_scale(low, high, view)

    def __repr__(self) -> str:
        baseline = "mean over baselines" if self.baseline_index is None else f"baseline {self.baseline_index}"
        delta = "" if self.convergence_delta is None else f", convergence_delta {self.convergence_delta:.3g}"
        return (
            f"<Attribution instance {self.instance_index}, target {self.target}, {baseline}: "
            f"{', '.join(map(repr, self.inputs.values()))}{delta}, {self.stop_reason} after {self.step_count} steps>"
        )


@dataclass(frozen=True, slots=True)
class Provenance:
    """How the answer was computed.

    Attributes:
        backend: "onnxruntime", "torch.export" or "torchscript".
        gradient_mode: "gradient_graph", "autograd" or "black_box"; `gradient_rule`: "standard" or one that alters the
            pass.
        execution: how the backend ran the model where it has a choice, such as "channels_last"; "" where it has none.
        execution_map_error: relative L2 error of whole maps that compiling makes, measured at load; None where nothing
            compiled runs.
        precision_map_error: relative L2 error of whole maps that a reduced precision makes, measured at load; None in
            float32.
        noise_floor: relative L2 noise of the gradients; None where not measured.
        effective_methods: with every effective parameter, defaults included; None for one that this client does not
            know.
        row_count, forward_count, backward_count: rows, and evaluations of them. A row that several targets share has
            one forward evaluation, and a backward one for each target.
        saved_row_count: rows that sharing made unnecessary.
        queue_seconds, compute_seconds, serialize_seconds: in the queue, on the device, for statistics and encoding.
        from_cache: kept from an earlier, equal request; the counts are then those of the computation, the seconds those
            of this request.
    """

    model_name: str
    model_version: int
    model_sha256: str
    backend: str
    gradient_mode: str
    gradient_rule: str
    device: str
    execution: str
    execution_map_error: float | None
    precision: str
    precision_map_error: float | None
    noise_floor: float | None
    effective_methods: tuple[Method | None, ...]
    row_count: int
    forward_count: int
    backward_count: int
    saved_row_count: int
    server_version: str
    library_versions: Mapping[str, str] = field(hash=False)
    queue_seconds: float
    compute_seconds: float
    serialize_seconds: float
    from_cache: bool

    @classmethod
    def from_proto(cls, message: attribution_pb2.Provenance) -> Provenance:
        """Reads the message."""
        return cls(
            model_name=message.model_name,
            model_version=message.model_version,
            model_sha256=message.model_sha256,
            backend=message.backend,
            gradient_mode=message.gradient_mode,
            gradient_rule=message.gradient_rule,
            device=message.device,
            execution=message.execution,
            execution_map_error=message.execution_map_error if message.HasField("execution_map_error") else None,
            precision=message.precision,
            precision_map_error=message.precision_map_error if message.HasField("precision_map_error") else None,
            noise_floor=message.noise_floor if message.HasField("noise_floor") else None,
            effective_methods=tuple(map(used_method, message.effective_methods)),
            row_count=message.row_count,
            forward_count=message.forward_count,
            backward_count=message.backward_count,
            saved_row_count=message.saved_row_count,
            server_version=message.server_version,
            library_versions=dict(message.library_versions),
            queue_seconds=message.queue_duration.ToTimedelta().total_seconds(),
            compute_seconds=message.compute_duration.ToTimedelta().total_seconds(),
            serialize_seconds=message.serialize_duration.ToTimedelta().total_seconds(),
            from_cache=message.from_cache,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ExplainResult:
    """Raw attributions, ordered by method, instance, target, baseline.

    Attributes:
        attributions: the maps.
        joint: pooled figures by group; "all" is the default group.
        baselines: as they were used, by instance.
        inputs: how the explained inputs are laid out and preprocessed.
        provenance: how the answer was computed.
        cautions: for the whole answer.
        request_id: as in the server's logs.
    """

    attributions: tuple[Attribution, ...]
    joint: Table[JointStatistics]
    baselines: tuple[UsedBaseline, ...]
    inputs: Table[InputSpec]
    provenance: Provenance
    cautions: tuple[Caution, ...]
    request_id: str

    def __repr__(self) -> str:
        model = f"{self.provenance.model_name} version {self.provenance.model_version}"
        return f"<ExplainResult of {model}: {len(self.attributions)} attributions, request {self.request_id}>"


@dataclass(frozen=True, slots=True)
class ClassScore:
    """A class: position along the class axis, label ("" where none is stated), score in the unit asked for."""

    index: int
    label: str
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """One output of one instance.

    Attributes:
        classes: the highest, in descending order; empty for outputs that are not [batch, classes].
        tensor: the scores without the batch axis, where asked for.
    """

    instance_index: int
    output: str
    classes: tuple[ClassScore, ...]
    tensor: Array | None

    def __repr__(self) -> str:
        classes = ", ".join(f"{line.label or line.index} {line.score:.4g}" for line in self.classes)
        return f"<Prediction instance {self.instance_index} of {self.output}: {classes or 'no classes'}>"

    @classmethod
    def from_proto(cls, message: explainer_service_pb2.Prediction) -> Prediction:
        """Reads the message."""
        return cls(
            instance_index=message.instance_index,
            output=message.output,
            classes=tuple(ClassScore(line.index, line.label, line.score) for line in message.classes),
            tensor=to_array(message.tensor) if message.HasField("tensor") else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class PredictResult:
    """Predictions, ordered by instance, output."""

    predictions: tuple[Prediction, ...]
    provenance: Provenance
    request_id: str

    @classmethod
    def from_proto(cls, message: explainer_service_pb2.PredictResponse, request_id: str) -> PredictResult:
        """Reads the message."""
        return cls(
            predictions=tuple(Prediction.from_proto(line) for line in message.predictions),
            provenance=Provenance.from_proto(message.provenance),
            request_id=request_id,
        )


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Cost of a request with an idle server: fewest and most rows and evaluations, bytes, the server's limits.

    Attributes:
        held_bytes: inputs, baselines and maps, on the host until the answer is complete.
        max_host_bytes: most memory on the host, beside the model and its micro-batches; its limit is that of all
            requests together that are being answered.
        micro_batch_bytes: most memory of a micro-batch on its device, of several on the one where it is most; None
            where it was not measured.
    """

    min_row_count: int
    max_row_count: int
    min_forward_count: int
    max_forward_count: int
    min_backward_count: int
    max_backward_count: int
    reply_bytes: int
    attribution_count: int
    row_limit: int
    reply_bytes_limit: int
    held_bytes: int
    held_bytes_limit: int
    max_host_bytes: int
    max_host_bytes_limit: int
    micro_batch_bytes: int | None

    @classmethod
    def from_proto(cls, message: explainer_service_pb2.EstimateCostResponse) -> CostEstimate:
        """Reads the message."""
        stated = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
        known = message.HasField("micro_batch_bytes")
        return cls(**stated | {"micro_batch_bytes": message.micro_batch_bytes if known else None})


def explain_result(
    message: explainer_service_pb2.ExplainResponse, geometries: Geometries, request_id: str
) -> ExplainResult:
    """Reads a response; `geometries` are those of the instances that the client preprocessed."""
    inputs = Table("input", ((spec.name, InputSpec.from_proto(spec)) for spec in message.inputs))
    attributions = tuple(attribution_result(line, inputs, geometries) for line in message.attributions)
    return ExplainResult(
        attributions=attributions,
        joint=_joint(message.joint, attributions),
        baselines=tuple(UsedBaseline.from_proto(line) for line in message.baselines),
        inputs=inputs,
        provenance=Provenance.from_proto(message.provenance),
        cautions=tuple(map(Caution.from_proto, message.cautions)),
        request_id=request_id,
    )


def attribution_result(
    message: attribution_pb2.Attribution, specs: Mapping[str, InputSpec], geometries: Geometries
) -> Attribution:
    """Reads one map; `specs` are those of the model's inputs by name."""

    def geometry(name: str) -> Geometry | None:
        found = geometries.get(name, ())
        return found[message.instance_index] if message.instance_index < len(found) else None

    path = message.score_path
    return Attribution(
        method_index=message.method_index,
        instance_index=message.instance_index,
        target_index=message.target_index,
        baseline_index=message.baseline_index if message.HasField("baseline_index") else None,
        target=ResolvedTarget.from_proto(message.target),
        inputs=Table(
            "input",
            (
                (line.name, _input_attribution(line, specs.get(line.name), geometry(line.name)))
                for line in message.inputs
            ),
        ),
        instance_output_value=message.instance_output_value,
        baseline_output_value=message.baseline_output_value if message.HasField("baseline_output_value") else None,
        attribution_sum=message.attribution_sum,
        convergence_delta=message.convergence_delta if message.HasField("convergence_delta") else None,
        relative_convergence_delta=message.relative_convergence_delta
        if message.HasField("relative_convergence_delta")
        else None,
        delta_over_abs_sum=message.delta_over_abs_sum if message.HasField("delta_over_abs_sum") else None,
        map_error=message.map_error if message.HasField("map_error") else None,
        step_count=message.step_count,
        stop_reason=short_name(attribution_pb2.StopReason, message.stop_reason),
        score_path=ScorePath(tuple(path.alphas), tuple(path.scores)) if message.HasField("score_path") else None,
        applied_normalization=short_name(attribution_pb2.AppliedNormalization, message.applied_normalization),
        cautions=tuple(map(Caution.from_proto, message.cautions)),
        r_squared=message.r_squared if message.HasField("r_squared") else None,
        intercept=message.intercept if message.HasField("intercept") else None,
        parts=Table("part", ((part.name, to_array(part.tensor)) for part in message.parts)),
    )


def _input_attribution(
    message: attribution_pb2.InputAttribution, spec: InputSpec | None, geometry: Geometry | None
) -> InputAttribution:
    tensor = to_array(message.tensor) if message.HasField("tensor") else None
    rank = tensor.ndim if tensor is not None else spec.instance_rank if spec is not None else None
    channel_axis = message.channel_axis if message.HasField("channel_axis") else None
    return InputAttribution(
        name=message.name,
        tensor=tensor,
        layout=message.layout,
        channel_axis=channel_axis,
        statistics=statistics_table(message.statistics),
        normalizations=tuple(Normalization.from_proto(line, channel_axis, rank) for line in message.normalizations),
        regions=_regions(message.regions),
        spread=to_array(message.spread) if message.HasField("spread") else None,
        standard_error=to_array(message.standard_error) if message.HasField("standard_error") else None,
        segments=to_array(message.segments) if message.HasField("segments") else None,
        covered_input=message.covered_input,
        geometry=geometry,
        rank=rank,
    )


def _regions(messages: Iterable[statistics_pb2.RegionSum]) -> Table[Table[RegionSum]]:
    sums: dict[str, list[RegionSum]] = {}
    for line in map(RegionSum.from_proto, messages):
        sums.setdefault(line.name, []).append(line)
    return Table(
        "region", ((name, Table("view", ((line.view, line) for line in lines))) for name, lines in sums.items())
    )


def _joint(
    messages: Iterable[statistics_pb2.JointStatistics], attributions: tuple[Attribution, ...]
) -> Table[JointStatistics]:
    return Table("group", ((message.group, _joint_statistics(message, attributions)) for message in messages))


def _joint_statistics(
    message: statistics_pb2.JointStatistics, attributions: tuple[Attribution, ...]
) -> JointStatistics:
    lines: dict[str, list[InputAttribution]] = {}
    for member in message.members:
        for name, line in attributions[member].inputs.items():
            lines.setdefault(name, []).append(line)
    return JointStatistics(
        group=message.group,
        members=tuple(message.members),
        inputs=Table("input", ((line.input, _joint_input(line, lines.get(line.input, ()))) for line in message.inputs)),
        pairs=tuple(map(PairRange.from_proto, message.pairs)),
    )


def _joint_input(message: statistics_pb2.JointInput, members: Sequence[InputAttribution]) -> JointInput:
    return JointInput(
        input=message.input,
        statistics=statistics_table(message.statistics),
        normalizations=tuple(
            Normalization.from_proto(line, *_shared_axes(short_name(statistics_pb2.View, line.view), members))
            for line in message.normalizations
        ),
    )


def _shared_axes(view: str, members: Sequence[InputAttribution]) -> tuple[int | None, int | None]:
    """Channel axis and rank of the maps that have a view, where they share them: one method may lay out its map of an
    input without channels, as XRAI does, which then has ELEMENTS alone."""
    axes = {(line.channel_axis, line.rank) for line in members if view == "ELEMENTS" or line.channel_axis is not None}
    return axes.pop() if len(axes) == 1 else (None, None)
