"""Names, element types, shapes and value domain of a model's inputs and outputs."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest, NotFound, Unsupported


class OutputKind(enum.Enum):
    """What the numbers of an output are."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    VALUES = "values"


class Activation(enum.Enum):
    """The function between logits and probabilities."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


class Score(enum.Enum):
    """The unit in which an output is explained."""

    OUTPUT = "output"
    LOGIT = "logit"
    PROBABILITY = "probability"
    LOG_PROBABILITY = "log_probability"


class ScoreHead(enum.Enum):
    """The function appended to an output so that its values are scores; differentiated with the model.

    PRE_ACTIVATION takes away instead of appending: what the output's own activation is computed from, in the output's
    shape.
    """

    IDENTITY = "identity"
    SOFTMAX = "softmax"
    LOG_SOFTMAX = "log_softmax"
    SIGMOID = "sigmoid"
    LOG_SIGMOID = "log_sigmoid"
    LOG = "log"
    PRE_ACTIVATION = "pre_activation"


@dataclass(frozen=True)
class Axis:
    """One axis: its name, and its extent or None where any extent is accepted."""

    name: str
    size: int | None = None


@dataclass(frozen=True)
class Layer:
    """A floating-point tensor between inputs and outputs that a person can pick.

    Attributes:
        module: path of the module that computes it, "" where the exporter does not tell.
        axes: the batch axis included; empty where even their number is unknown.
        bypassing_inputs: inputs whose values reach this tensor, and around it too an output that depends on it.
    """

    name: str
    operator: str = ""
    module: str = ""
    axes: tuple[Axis, ...] = ()
    bypassing_inputs: tuple[str, ...] = ()


NAMED_LAYERS = 8
"""Layers that an error lists; the model's metadata has all of them."""


def unknown_layer(name: str, layers: Sequence[Layer], likely: Sequence[str]) -> InvalidRequest:
    """UNKNOWN_LAYER, with a few names that may have been meant.

    Args:
        layers: all of the model.
        likely: names among them.
    """
    count, names = len(layers), ", ".join(likely)
    such_as = f", such as {names}" if names else ""
    return InvalidRequest(
        "UNKNOWN_LAYER",
        f"the model has no layer {name!r}; there are {count}{such_as}",
        layer=name,
        layers=names,
        layer_count=count,
    )


def explained_layers(layers: Sequence[Layer], configured: Sequence[str]) -> tuple[str, ...]:
    """Names of the layers to explain where no input can be: those `configured`, else embeddings, else all."""
    embeddings = tuple(layer.name for layer in layers if layer.operator == "Gather")
    return tuple(configured) or embeddings or tuple(layer.name for layer in layers)


@dataclass(frozen=True)
class MapSpec:
    """How one map is laid out, without a batch axis.

    Attributes:
        name: of the input or layer whose elements it attributes to.
        layout: letters of the axes, such as "CHW", or "" where not stated.
        channel_axis: its position, or None where there is none.
        covers: the input over whose H and W axes the map's own extend, cell by cell and without a margin, where it has
            not the input's shape; else "".
    """

    name: str
    layout: str = ""
    channel_axis: int | None = None
    covers: str = ""

    @property
    def spatial_axes(self) -> tuple[int, int] | None:
        """Positions of the H and W axes, or None."""
        height, width = _position("H", self.layout), _position("W", self.layout)
        return None if height is None or width is None else (height, width)


@dataclass(frozen=True)
class InputSpec:
    """One input.

    Attributes:
        axes: in order, the batch axis first where `batched`.
        layout: letters of the axes, such as "NCHW", or "" where not stated.
        value_range: range of the values before mean and std are applied, or None where not stated.
        mean, std: per channel (or one for all), in the unit of `value_range`; None where no preprocessing is stated.
    """

    name: str
    dtype: np.dtype[np.generic]
    axes: tuple[Axis, ...]
    batched: bool = True
    layout: str = ""
    channel_order: str = ""
    value_range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def differentiable(self) -> bool:
        """Whether the input can move along a path."""
        return bool(np.issubdtype(self.dtype, np.floating))

    @property
    def instance_layout(self) -> str:
        """Letters of one instance's axes, without the batch axis."""
        return self.layout[1:] if self.batched else self.layout

    @property
    def channel_axis(self) -> int | None:
        """Position of the channel axis in one instance, or None."""
        return _position("C", self.instance_layout)

    @property
    def spatial_axes(self) -> tuple[int, int] | None:
        """Positions of the H and W axes in one instance, or None."""
        return self.map_spec.spatial_axes

    @property
    def map_spec(self) -> MapSpec:
        """How a map of it is laid out."""
        return MapSpec(self.name, self.instance_layout, self.channel_axis)

    @property
    def instance_axes(self) -> tuple[Axis, ...]:
        """Axes of one instance, without the batch axis."""
        return self.axes[1:] if self.batched else self.axes

    @property
    def integer_range(self) -> tuple[int, int] | None:
        """Least and greatest number that `value_range` allows an integer or bool input, or None where there is none."""
        if self.value_range is None or self.differentiable:
            return None
        limits = None if self.dtype == np.bool_ else np.iinfo(self.dtype.name)
        least, greatest = (limits.min, limits.max) if limits else (0, 1)
        low, high = max(math.ceil(self.value_range[0]), least), min(math.floor(self.value_range[1]), greatest)
        return (int(low), int(high)) if low <= high else None

    @property
    def has_preprocessing(self) -> bool:
        """Whether pixels can be turned into this input."""
        return self.value_range is not None and self.mean is not None and self.std is not None

    @property
    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Least and greatest value that the model gets, broadcastable to an instance; None where no range is stated."""
        if self.value_range is None:
            return None
        behind = 0 if self.channel_axis is None else len(self.instance_axes) - 1 - self.channel_axis
        low, high = (self.model_value(end) if self.has_preprocessing else np.array([end]) for end in self.value_range)
        return low.reshape(-1, *[1] * behind), high.reshape(-1, *[1] * behind)

    def model_value(self, value: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Preprocesses values of `value_range`: (value - mean) / std, shape (1,) or (channels,), float64."""
        if self.mean is None or self.std is None:
            raise Unsupported(
                "NO_PREPROCESSING",
                f"input {self.name!r} states no preprocessing, so a PIXEL-space baseline has no meaning for it",
                input=self.name,
            )
        centered = np.asarray(value, np.float64) - np.asarray(self.mean, np.float64)
        return np.atleast_1d(centered / np.asarray(self.std, np.float64))

    def pixel_value(self, pixel: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Preprocesses pixels of 0..255: (pixel x scale - mean) / std, where scale maps 0..255 onto `value_range`."""
        if self.value_range is None:
            raise Unsupported(
                "NO_PREPROCESSING",
                f"input {self.name!r} states no value range, so a PIXEL-space baseline has no meaning for it",
                input=self.name,
            )
        low, high = self.value_range
        return self.model_value(low + np.asarray(pixel, np.float64) * (high - low) / 255.0)


@dataclass(frozen=True)
class OutputSpec:
    """One output; the first axis is the batch axis.

    Attributes:
        class_axis: position of the class axis, batch axis counted, or None.
        labels: along the class axis, or () where not stated.
        pre_activation: of probabilities, the tensor of the file that their softmax or sigmoid is computed from; ""
            where the file does not show it.
    """

    name: str
    dtype: np.dtype[np.generic]
    axes: tuple[Axis, ...]
    kind: OutputKind = OutputKind.VALUES
    activation: Activation = Activation.NONE
    class_axis: int | None = 1
    labels: tuple[str, ...] = ()
    pre_activation: str = ""

    def score_head(self, score: Score) -> ScoreHead:
        """The head that turns this output into `score`.

        Raises:
            InvalidRequest: the output has no such score (SCORE_NOT_AVAILABLE).
        """
        head = self._head(score)
        if head is None:
            raise InvalidRequest(
                "SCORE_NOT_AVAILABLE",
                f"output {self.name!r} of kind {self.kind.value} with activation {self.activation.value} has no "
                f"{score.name} score",
                output=self.name,
                kind=self.kind.value,
                activation=self.activation.value,
                score=score.name,
            )
        return head

    def _head(self, score: Score) -> ScoreHead | None:
        if score is Score.OUTPUT:
            return ScoreHead.IDENTITY
        if score is Score.LOGIT and self.pre_activation:
            return ScoreHead.PRE_ACTIVATION
        return _HEADS.get((self.kind, self.activation, score))

    @property
    def score_before_activation(self) -> Score:
        """The score in front of the output's own activation, where it can be reached; else the output as it is."""
        return Score.LOGIT if self.pre_activation else Score.OUTPUT

    @property
    def head_before_activation(self) -> ScoreHead:
        """Its head."""
        return self.score_head(self.score_before_activation)

    def is_behind_activation(self, score: Score) -> bool:
        """Whether a score lies behind a softmax or sigmoid, of the model or of the head.

        Raises:
            InvalidRequest: as `score_head`.
        """
        head = self.score_head(score)
        if head is ScoreHead.IDENTITY:
            return self.kind is OutputKind.PROBABILITIES
        return head is not ScoreHead.PRE_ACTIVATION

    def label(self, index: int) -> str:
        """Label of a class, or "" where none is stated."""
        return self.labels[index] if 0 <= index < len(self.labels) else ""

    def class_index(self, label: str) -> int:
        """Position of a label.

        Raises:
            NotFound: no such label (UNKNOWN_LABEL).
        """
        if label in self.labels:
            return self.labels.index(label)
        raise NotFound(
            "UNKNOWN_LABEL",
            f"output {self.name!r} has no label {label!r}"
            + ("" if self.labels else "; the model states no labels, so name classes by position"),
            output=self.name,
            label=label,
            label_count=len(self.labels),
        )


_L, _P = OutputKind.LOGITS, OutputKind.PROBABILITIES
_HEADS: dict[tuple[OutputKind, Activation, Score], ScoreHead] = {
    (_L, Activation.SOFTMAX, Score.LOGIT): ScoreHead.IDENTITY,
    (_L, Activation.SIGMOID, Score.LOGIT): ScoreHead.IDENTITY,
    (_L, Activation.NONE, Score.LOGIT): ScoreHead.IDENTITY,
    (_L, Activation.SOFTMAX, Score.PROBABILITY): ScoreHead.SOFTMAX,
    (_L, Activation.SIGMOID, Score.PROBABILITY): ScoreHead.SIGMOID,
    (_L, Activation.SOFTMAX, Score.LOG_PROBABILITY): ScoreHead.LOG_SOFTMAX,
    (_L, Activation.SIGMOID, Score.LOG_PROBABILITY): ScoreHead.LOG_SIGMOID,
    **{(_P, activation, Score.PROBABILITY): ScoreHead.IDENTITY for activation in Activation},
    **{(_P, activation, Score.LOG_PROBABILITY): ScoreHead.LOG for activation in Activation},
}


@dataclass(frozen=True)
class SuppressedOutput:
    """An output of the file that is not served, since it lies behind a non-maximum suppression.

    Attributes:
        node: name of the suppression.
    """

    name: str
    node: str

    def __str__(self) -> str:
        return (
            f"output {self.name!r} lies behind the NonMaxSuppression {self.node!r}: which boxes it keeps, and in which "
            "order, changes with the input, so that an element of it is no value of one box; "
            "explain a score before it, which has to be an output of the file"
        )


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in the order of the model file.

    Attributes:
        suppressed: outputs of the file that are not served.
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    suppressed: tuple[SuppressedOutput, ...] = ()

    def input(self, name: str) -> InputSpec:
        """The input of that name.

        Raises:
            InvalidRequest: no such input (UNKNOWN_INPUT).
        """
        for spec in self.inputs:
            if spec.name == name:
                return spec
        names = ", ".join(spec.name for spec in self.inputs)
        raise InvalidRequest("UNKNOWN_INPUT", f"no input {name!r}; the model has {names}", input=name, inputs=names)

    def output(self, name: str) -> OutputSpec:
        """The output of that name; "" is the only output.

        Raises:
            InvalidRequest: no such output (UNKNOWN_OUTPUT), or several and none named (OUTPUT_REQUIRED).
            Unsupported: it lies behind a non-maximum suppression (OUTPUT_SUPPRESSED).
        """
        names = ", ".join(spec.name for spec in self.outputs)
        if not name and len(self.outputs) > 1:
            raise InvalidRequest(
                "OUTPUT_REQUIRED", f"the model has several outputs, name one of {names}", outputs=names
            )
        for spec in self.outputs:
            if spec.name == name or not name:
                return spec
        for left_out in self.suppressed:
            if left_out.name == name:
                raise Unsupported("OUTPUT_SUPPRESSED", str(left_out), output=name, node=left_out.node, outputs=names)
        raise InvalidRequest("UNKNOWN_OUTPUT", f"no output {name!r}; the model has {names}", output=name, outputs=names)

    @property
    def has_spatial_axes(self) -> bool:
        """Whether a floating-point input has H and W axes."""
        return any(spec.spatial_axes is not None for spec in self.inputs if spec.differentiable)

    @property
    def differentiable_inputs(self) -> tuple[str, ...]:
        """Names of the floating-point inputs."""
        return tuple(spec.name for spec in self.inputs if spec.differentiable)

    @property
    def differentiable_outputs(self) -> tuple[str, ...]:
        """Names of the floating-point outputs."""
        return tuple(spec.name for spec in self.outputs if np.issubdtype(spec.dtype, np.floating))

    @property
    def undifferentiable_reason(self) -> str:
        """Why no gradient can be taken, whatever operators lie between inputs and outputs, or ""."""
        if not self.differentiable_inputs:
            return "no input is floating-point"
        return "" if self.differentiable_outputs else "no output is floating-point"


def element_count(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return math.prod(shape)


def _position(letter: str, layout: str) -> int | None:
    return layout.index(letter) if letter in layout else None
