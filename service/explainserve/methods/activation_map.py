"""Maps from a layer's activations and the gradient with respect to them, both from one forward pass: what Grad-CAM and
its kin have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.contract import Cost, Method, Needs
from explainserve.methods.grids import Grid, grid, upsampled
from explainserve.methods.planes import extent
from explainserve.methods.rows import point
from explainserve.plan import Evaluation, Plan, SegmentEvaluation
from explainserve.signature import MapSpec

Weighted = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class LayerMap(Method):
    """Options of all methods that make a map in the grid of a layer.

    Attributes:
        layer: name of the layer; resolved: the one that is used.
        relu: keep positive values only.
        upsampling: "none", "bilinear" or "nearest", to the input's H and W.
    """

    layer: str | None = None
    relu: bool = False
    upsampling: str = "none"

    def resolved(self, subject: Subject) -> Self:
        """With the layer that is used; see `grids.grid` for the default and for errors."""
        return replace(self, layer=grid(subject, self.layer).layer)

    def maps(self, subject: Subject) -> Mapping[str, MapSpec]:
        """One, of the layer."""
        own = grid(subject, self.layer)
        return {own.layer: own.map_spec}


@dataclass(frozen=True)
class ActivationMap(LayerMap):
    """A map from one forward and one backward pass; how activations and gradients make it is each method's."""

    @property
    def needs(self) -> Needs:
        """Activations and gradients within the model, which lie over an image."""
        return Needs(layers=True, spatial_axes=True)

    def cost(self, subject: Subject) -> Cost:
        """One gradient."""
        return Cost.fixed(1)

    def plan(self, question: Question) -> Plan:
        """The instance, with the layer's value and gradient."""
        layer = str(self.layer)
        function = replace(question.score, wrt=(layer,), taps=(layer,))
        return Plan((point(question, question.instance.moving, function),))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution:
        """The map in the layer's grid, or at the size of the input."""
        own = grid(question.subject, self.layer)
        values = self.combined(*activations(evaluation.segments[0], own))
        return finished(values, own, question.subject, relu=self.relu, upsampling=self.upsampling)

    @abstractmethod
    def combined(self, activation: NDArray[np.float64], gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        """The map (rows, columns) of two arrays (channels, rows, columns)."""


def activations(evaluated: SegmentEvaluation, own: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Activations and gradients of a layer, (channels, rows, columns) each."""
    value, gradient = evaluated.values[own.layer][0], evaluated.gradient_sums[own.layer]
    return own.channels_first(np.asarray(value)), own.channels_first(np.asarray(gradient).reshape(value.shape))


def finished(values: NDArray[np.float64], own: Grid, subject: Subject, *, relu: bool, upsampling: str) -> Attribution:
    """A map with its layout: the layer's grid, or the input's after upsampling."""
    if relu:
        values = np.maximum(values, 0)
    spec = own.map_spec
    if upsampling != "none":
        values = upsampled(values, extent(subject, own.covers), upsampling)
        spec = MapSpec(own.layer, "HW", None, own.covers)
    return Attribution({own.layer: values.astype(np.float32)}, step_count=1, maps={own.layer: spec}).checked()


def check_upsampling(value: str, *allowed: str) -> None:
    """Raises InvalidRequest (UPSAMPLING_UNSUITABLE)."""
    if value not in allowed:
        raise InvalidRequest(
            "UPSAMPLING_UNSUITABLE", f"upsampling {value!r} is not one of {', '.join(allowed)}", upsampling=value
        )
