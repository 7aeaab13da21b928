"""model.toml: what a model file cannot say of itself."""

from __future__ import annotations

import enum
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from explainserve.containment import inside
from explainserve.errors import ModelRefused
from explainserve.signature import Activation, Axis, InputSpec, OutputKind, OutputSpec, Signature

DTYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
)


class Precision(enum.Enum):
    """Arithmetic of a model's products and convolutions; inputs, outputs, score heads and sums stay in float32."""

    FLOAT32 = "float32"
    TF32 = "tf32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Compile(enum.Enum):
    """Whether the graph of a model is compiled for the processor or GPU that it is loaded on."""

    OFF = "off"
    WHEN_FASTER = "when-faster"


Extent = Annotated[int, Field(ge=1, strict=True)]
Position = Annotated[int, Field(strict=True)]
"""Strict: `true` and 1.0 are no positions."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputConfig(_Table):
    """One `[[inputs]]` table.

    `shape` lists extents or names of axes; "batch" or any name first is the batch axis. `value_range` is the range
    before `mean` and `std` are applied, which are in its unit, one per channel or one for all.
    """

    name: str
    dtype: Literal[DTYPES] | None = None  # type: ignore[valid-type]
    shape: tuple[Extent | str, ...] | None = None
    layout: Annotated[str, Field(pattern="^[A-Z]*$")] = ""
    channel_order: str = ""
    value_range: tuple[FiniteFloat, FiniteFloat] | None = None
    mean: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> InputConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("every std is positive")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range is [low, high] with low < high")
        if self.shape is not None and self.layout and len(self.layout) != len(self.shape):
            raise ValueError(f"layout {self.layout!r} has {len(self.layout)} letters, shape has {len(self.shape)} axes")
        return self


class OutputConfig(_Table):
    """One `[[outputs]]` table.

    `labels` is a list, or the name of a text file with one label a line, in the folder of model.toml.
    """

    name: str
    dtype: Literal[DTYPES] | None = None  # type: ignore[valid-type]
    shape: tuple[Extent | str, ...] | None = None
    kind: OutputKind | None = None
    activation: Activation | None = None
    class_axis: Position | None = None
    labels: tuple[str, ...] | str = ()


class BaselineConfig(_Table):
    """One `[baselines.NAME]` table: a .npy file per input, in MODEL space, in the folder of model.toml."""

    files: dict[str, str]


class LimitsConfig(_Table):
    """`[limits]`: caps of this model, below the server's."""

    max_step_count: Extent | None = None
    max_batch_rows: Extent | None = None


class ModelConfig(_Table):
    """A whole model.toml; every part is optional where the model file describes itself.

    `devices` are those of the server that may hold the model, by name ("cuda:1") or kind ("cuda"), and `replicas` is on
    how many of them it is loaded at most; by default on all.
    """

    inputs: tuple[InputConfig, ...] = ()
    outputs: tuple[OutputConfig, ...] = ()
    default_target: Position | str | None = None
    default_baseline: str = "zeros"
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    precision: Precision = Precision.FLOAT32
    compile: Compile = Compile.OFF
    devices: tuple[str, ...] = ()
    replicas: Extent | None = None
    layers: tuple[str, ...] = ()
    baselines: dict[str, BaselineConfig] = {}
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _named_once(self) -> ModelConfig:
        for tables in (self.inputs, self.outputs):
            names = [table.name for table in tables]
            if len(set(names)) < len(names):
                raise ValueError(f"a name is stated twice among {', '.join(names)}")
        return self

    def signature(self, found: Signature | None) -> Signature:
        """Completes what a model file says of itself.

        Args:
            found: names, element types and axes read from the file, or None where the file says nothing (TorchScript).

        Raises:
            ModelRefused: the two contradict each other (CONFIG_MISMATCH), or together leave something open
                (SIGNATURE_INCOMPLETE).
        """
        if found is None:
            if not self.inputs or not self.outputs:
                raise ModelRefused(
                    "SIGNATURE_INCOMPLETE", "the file names no inputs and outputs, state them in model.toml"
                )
            return Signature(
                tuple(_input(config, None) for config in self.inputs),
                tuple(_output(config, None) for config in self.outputs),
            )
        _known("input", [c.name for c in self.inputs], [s.name for s in found.inputs])
        _known("output", [c.name for c in self.outputs], [s.name for s in found.outputs])
        inputs = {config.name: config for config in self.inputs}
        outputs = {config.name: config for config in self.outputs}
        return replace(
            found,
            inputs=tuple(_input(inputs.get(s.name, InputConfig(name=s.name)), s) for s in found.inputs),
            outputs=tuple(_output(outputs.get(s.name, OutputConfig(name=s.name)), s) for s in found.outputs),
        )


def read_model_config(path: Path) -> ModelConfig:
    """Reads a model.toml; a missing one is empty.

    Raises:
        ModelRefused: it is not valid, or names files outside of its folder (CONFIG_INVALID).
    """
    try:
        if not path.exists():
            return ModelConfig()
        config = ModelConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        _require_own_files(config, path)
        return _with_labels(config, path.parent)
    except (tomllib.TOMLDecodeError, ValidationError, UnicodeDecodeError, OSError) as error:
        raise ModelRefused("CONFIG_INVALID", f"{path.name}: {error}", file=path.name) from error


def _require_own_files(config: ModelConfig, path: Path) -> None:
    labels = [output.labels for output in config.outputs if isinstance(output.labels, str)]
    baselines = [file for table in config.baselines.values() for file in table.files.values()]
    outside = [name for name in (*labels, *baselines) if inside(path.parent, name) is None]
    if outside:
        raise ModelRefused(
            "CONFIG_INVALID",
            f"{path.name} names {', '.join(map(repr, outside))}, which is not inside its folder",
            file=path.name,
            locations=", ".join(outside),
        )


def _with_labels(config: ModelConfig, folder: Path) -> ModelConfig:
    """Replaces names of label files by their lines."""
    outputs = tuple(
        output.model_copy(update={"labels": tuple((folder / output.labels).read_text(encoding="utf-8").splitlines())})
        if isinstance(output.labels, str)
        else output
        for output in config.outputs
    )
    return config.model_copy(update={"outputs": outputs})


def _known(what: str, configured: list[str], found: list[str]) -> None:
    unknown = sorted(set(configured) - set(found))
    if unknown:
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"model.toml names {what} {', '.join(unknown)}; the file has {', '.join(found)}",
            **{what: ", ".join(unknown)},
        )


def _input(config: InputConfig, found: InputSpec | None) -> InputSpec:
    dtype = _dtype("input", config.name, config.dtype, found)
    axes = _axes("input", config.name, config.shape, found)
    spec = InputSpec(
        name=config.name,
        dtype=dtype,
        axes=axes,
        batched=_batched(config.shape, axes, found),
        layout=config.layout,
        channel_order=config.channel_order,
        value_range=config.value_range,
        mean=config.mean,
        std=config.std,
    )
    if config.layout and len(config.layout) != len(axes):
        raise ModelRefused(
            "CONFIG_MISMATCH", f"input {config.name!r}: layout {config.layout!r} does not fit {len(axes)} axes"
        )
    _per_channel(spec)
    if config.value_range is not None and not spec.differentiable and spec.integer_range is None:
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"input {config.name!r}: value_range {config.value_range} holds no number of type {dtype}",
        )
    return spec


def _output(config: OutputConfig, found: OutputSpec | None) -> OutputSpec:
    axes = _axes("output", config.name, config.shape, found)
    class_axis = config.class_axis if config.class_axis is not None else (1 if len(axes) > 1 else None)
    labels = tuple(config.labels)
    kind, activation = _kind(config, found, len(axes))
    if class_axis is not None and not 0 < class_axis < len(axes):
        raise ModelRefused("CONFIG_MISMATCH", f"output {config.name!r}: class_axis {class_axis} of {len(axes)} axes")
    size = axes[class_axis].size if class_axis is not None else None
    if labels and size is not None and len(labels) != size:
        raise ModelRefused("CONFIG_MISMATCH", f"output {config.name!r}: {len(labels)} labels for {size} classes")
    return OutputSpec(
        name=config.name,
        dtype=_dtype("output", config.name, config.dtype, found),
        axes=axes,
        kind=kind,
        activation=activation,
        class_axis=class_axis,
        labels=labels,
        pre_activation=_pre_activation(found, kind, activation),
    )


def _kind(config: OutputConfig, found: OutputSpec | None, rank: int) -> tuple[OutputKind, Activation]:
    """What the numbers of an output are, and their activation."""
    if found is not None and config.kind in (None, found.kind):
        return found.kind, config.activation or found.activation
    kind = config.kind or OutputKind.VALUES
    usual = Activation.SOFTMAX if kind is OutputKind.LOGITS and rank > 1 else Activation.NONE
    return kind, config.activation or usual


def _pre_activation(found: OutputSpec | None, kind: OutputKind, activation: Activation) -> str:
    """The file's, unless the configuration knows better what the output is."""
    believed = found is not None and (found.kind, found.activation) == (kind, activation)
    return found.pre_activation if found is not None and believed else ""


def _dtype(what: str, name: str, stated: str | None, found: InputSpec | OutputSpec | None) -> np.dtype[np.generic]:
    if stated is None and found is None:
        return np.dtype(np.float32)
    if stated is not None and found is not None and np.dtype(stated) != found.dtype:
        raise ModelRefused("CONFIG_MISMATCH", f"{what} {name!r}: model.toml says {stated}, the file {found.dtype}")
    return found.dtype if found is not None else np.dtype(stated)


def _axes(
    what: str, name: str, stated: tuple[int | str, ...] | None, found: InputSpec | OutputSpec | None
) -> tuple[Axis, ...]:
    if stated is None:
        if found is None:
            raise ModelRefused("SIGNATURE_INCOMPLETE", f"{what} {name!r}: the file does not tell its shape, state it")
        return found.axes
    axes = tuple(Axis(e) if isinstance(e, str) else Axis("", e) for e in stated)
    if found is None:
        return axes
    if len(axes) != len(found.axes):
        raise ModelRefused(
            "CONFIG_MISMATCH", f"{what} {name!r}: model.toml states {len(axes)} axes, the file {len(found.axes)}"
        )
    return tuple(_axis(what, name, ours, theirs) for ours, theirs in zip(axes, found.axes, strict=True))


def _axis(what: str, name: str, stated: Axis, found: Axis) -> Axis:
    """The narrower of the two: an extent beats a name."""
    if stated.size is not None and found.size is not None and stated.size != found.size:
        raise ModelRefused(
            "CONFIG_MISMATCH", f"{what} {name!r}: model.toml states extent {stated.size}, the file {found.size}"
        )
    return Axis(stated.name or found.name, stated.size if stated.size is not None else found.size)


def _batched(stated: tuple[int | str, ...] | None, axes: tuple[Axis, ...], found: InputSpec | None) -> bool:
    """A first axis that is named, free, or of extent one is the batch axis; never one that the file fixes above one."""
    if not axes or axes[0].size not in (None, 1):
        return False
    return stated is not None or found is None or found.batched


def _per_channel(spec: InputSpec) -> None:
    """mean and std hold one number, or one per channel."""
    axis = spec.channel_axis
    channels = None if axis is None else spec.instance_axes[axis].size
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if values is not None and len(values) not in (1, channels):
            raise ModelRefused(
                "CONFIG_MISMATCH", f"input {spec.name!r}: {len(values)} values of {name} for {channels} channels"
            )
