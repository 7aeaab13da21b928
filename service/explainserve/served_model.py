"""A model version on a device: what is known of it, and what it can carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explainserve import placement
from explainserve.backends import LoadedModel
from explainserve.backends.probe import ProbeResult
from explainserve.baselines import NAMED, Data, InputBaseline
from explainserve.errors import Unsupported
from explainserve.fingerprint import fingerprint
from explainserve.model_config import Compile, ModelConfig, Precision
from explainserve.plan import STANDARD
from explainserve.signature import Layer, Signature

Baselines = Mapping[str, Mapping[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class MissingCapability:
    """What a method needs and a model or its server lacks: "gradient", "layers", "spatial_axes", "grid_layer", "rule:"
    and the name of a gradient rule, or "segmentation"."""

    capability: str
    reason: str


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model version that answers requests, on one of the devices that hold it: a replica.

    Attributes:
        device: name of the device whose engine evaluates it.
        file_bytes: size of the model file and of its external data files.
        sha256: of the model file followed by its external data files in the order of their names, and the patterns
            beside it, hexadecimal.
        format: a value of FORMATS.
        max_batch_rows: rows that may share a micro-batch; 1 where the model sees its rows together.
        seconds_per_row: of a full micro-batch, measured at load; None where it was not.
        micro_batch_bytes: memory that one takes at most on its device; None where it was not measured.
        default_target: position in the class axis of the first output, or None where argmax is explained.
        data_baselines: by name, for each input, float32 in MODEL space and in the shape of one instance.
    """

    name: str
    version: int
    device: str
    path: Path
    file_bytes: int
    sha256: str
    format: str
    config: ModelConfig
    loaded: LoadedModel
    probe: ProbeResult
    max_batch_rows: int
    default_target: int | None = None
    data_baselines: Baselines = field(default_factory=dict)
    seconds_per_row: float | None = None
    micro_batch_bytes: int | None = None

    @property
    def signature(self) -> Signature:
        """Inputs and outputs."""
        return self.loaded.signature

    @cached_property
    def identity(self) -> bytes:
        """Digest of all of it that decides answers: its files, its model.toml, and the files that one names."""
        stated = self.config.model_dump_json()
        return fingerprint((self.name, self.version, self.sha256, stated, self.signature, self.data_baselines))

    @property
    def precision(self) -> str:
        """The precision that model.toml chooses, or else the element type of the file."""
        if self.config.precision is not Precision.FLOAT32:
            return str(self.config.precision.value)
        types = [spec.dtype.name for spec in self.signature.inputs if spec.differentiable]
        return str(types[0]) if types else "float32"

    @property
    def row_by_row(self) -> bool:
        """Whether rows cannot be evaluated together."""
        return row_by_row(self.loaded, self.probe)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was found out at load, as sentences for people."""
        return (*self.probe.warnings, *self._not_compiled)

    @property
    def _not_compiled(self) -> tuple[str, ...]:
        if self.config.compile is Compile.OFF:
            return ()
        compilation = self.loaded.compilation
        why = "only .pt2 files are, and only by servers that allow it" if compilation is None else compilation.refusal
        return (f"the model is not compiled: {why}",) if why else ()

    @property
    def execution_map_error(self) -> float | None:
        """Relative L2 error that compiling makes in whole maps; None where it runs as it is in the file."""
        compilation = self.loaded.compilation
        return None if compilation is None else compilation.map_error

    @property
    def runs_on(self) -> str:
        """The device that evaluates it: another one where its own is missing and the server may fall back."""
        return placement.where_it_runs(self.device, self.loaded.device)

    @property
    def default_baseline(self) -> InputBaseline:
        """The baseline where a request names none."""
        name = self.config.default_baseline
        return Data(name) if name in self.data_baselines else NAMED[name]

    @property
    def differentiable(self) -> bool:
        """Whether gradients of the model can be taken."""
        return not self.undifferentiable_reason

    @property
    def undifferentiable_reason(self) -> str:
        """Why no gradient can be taken, or ""."""
        if self.loaded.gaps:
            first, others = self.loaded.gaps[:3], len(self.loaded.gaps[3:])
            return "; ".join([*map(str, first), *([f"and {others} more"] if others else [])])
        return self.signature.undifferentiable_reason

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Those of the graph, then those that only the configuration names."""
        known = {layer.name for layer in self.loaded.layers}
        return (*self.loaded.layers, *(Layer(name) for name in self.config.layers if name not in known))

    def missing(
        self, rule: str, *, layers: bool, spatial_axes: bool = False, cut: bool = False
    ) -> MissingCapability | None:
        """What keeps methods with these needs from explaining it, or None.

        Args:
            rule: name of the gradient rule, or "" for none.
            layers: whether layers are reached.
            spatial_axes: whether an input that moves must have H and W axes.
            cut: whether a request names layers that are explained in the place of inputs, which then need no gradient.
        """
        at_layers = not self.signature.differentiable_inputs  # nothing else of the model can be explained
        if rule and not (self.differentiable or cut or at_layers):
            return MissingCapability("gradient", self.undifferentiable_reason)
        reason = self._rule_refusal(rule, cut=cut) if rule else ""
        if reason:
            return MissingCapability("gradient" if rule == STANDARD.name else f"rule:{rule}", reason)
        if (layers or at_layers) and self._layers_refusal:
            return MissingCapability("layers", self._layers_refusal)
        if spatial_axes and not self.signature.has_spatial_axes:
            return MissingCapability("spatial_axes", "no floating-point input states a layout with H and W axes")
        return None

    def _rule_refusal(self, rule: str, *, cut: bool) -> str:
        """Why the model cannot follow a rule, or "". Layers that a request names may lie behind a gap."""
        unknown = self.loaded.layers_refusal or f"backend {self.loaded.backend} has no gradient rule {rule!r}"
        return self.loaded.gradient_rules.get(rule, unknown) or ("" if cut else self.loaded.rule_gap(rule))

    @property
    def _layers_refusal(self) -> str:
        nothing = "" if self.layers else "no floating-point tensor lies between its inputs and outputs"
        return self.loaded.layers_refusal or nothing

    def check_supports(self, rule: str, *, layers: bool, cut: bool = False) -> None:
        """Raises Unsupported where a capability is missing: a gradient (NOT_DIFFERENTIABLE), or a gradient rule or
        layers (CAPABILITY_MISSING). GetModel says so beforehand.
        """
        missing = self.missing(rule, layers=layers, cut=cut)
        if missing is None:
            return
        if missing.capability == "gradient":
            self._check_differentiable()
        raise Unsupported(
            "CAPABILITY_MISSING",
            f"model {self.name!r} lacks {missing.capability}: {missing.reason}",
            model=self.name,
            capability=missing.capability,
        )

    def _check_differentiable(self) -> None:
        if not self.differentiable:
            raise Unsupported(
                "NOT_DIFFERENTIABLE",
                f"model {self.name!r} has no gradient: {self.undifferentiable_reason}",
                model=self.name,
                gap_count=len(self.loaded.gaps),
                gaps="; ".join(f"{gap.operator} {gap.node}".strip() for gap in self.loaded.gaps[:8]),
            )


def row_by_row(loaded: LoadedModel, found: ProbeResult) -> bool:
    """Whether micro-batches hold one row: rows mix, or the model takes no batch."""
    batched = all(spec.batched for spec in loaded.signature.inputs)
    return not (batched and found.rows_independent) or loaded.fixed_batch
