"""Guided Grad-CAM (Selvaraju et al.: Grad-CAM, ICCV 2017, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.activation_map import activations, check_upsampling
from explainserve.methods.contract import Cost, Method, Needs, ReadingGuide
from explainserve.methods.grad_cam import GradCam
from explainserve.methods.grids import grid, upsampled
from explainserve.methods.guided_backpropagation import GuidedBackpropagation
from explainserve.methods.planes import extent, laid_over
from explainserve.plan import Evaluation, Plan
from explainserve.signature import MapSpec


@dataclass(frozen=True, eq=False)
class PixelsPlan(Plan):
    """A round of the pixel method.

    Attributes:
        pixels: its own plan.
        positive: Grad-CAM at the size of the input with ReLU, once it is known.
    """

    pixels: Plan
    positive: NDArray[np.float64] | None


@dataclass(frozen=True)
class GuidedGradCam(Method):
    """A pixel method's map times the upsampled positive part of Grad-CAM.

    Attributes:
        layer: of Grad-CAM.
        pixel_method: guided backpropagation by default; one that attributes to the inputs.
        upsampling: "bilinear" or "nearest".

    Raises:
        InvalidRequest: PIXEL_METHOD_UNSUITABLE, UPSAMPLING_UNSUITABLE.
    """

    layer: str | None = None
    pixel_method: Method | None = None
    upsampling: str = "bilinear"

    def __post_init__(self) -> None:
        if self.pixel_method is None:
            object.__setattr__(self, "pixel_method", GuidedBackpropagation())
        check_upsampling(self.upsampling, "bilinear", "nearest")
        if self._pixels.reading_guide.family not in ("gradient", "path", "backward rule"):
            kind = type(self._pixels).__name__
            raise InvalidRequest(
                "PIXEL_METHOD_UNSUITABLE", f"{kind} does not attribute to pixels by gradients", method=kind
            )

    @property
    def reading_guide(self) -> ReadingGuide:
        """That of the pixel method, but for completeness."""
        return replace(
            self._pixels.reading_guide,
            family="activation",
            units=f"{self._pixels.reading_guide.units} x output",
            complete=False,
            paper="Selvaraju et al.: Grad-CAM, ICCV 2017, arXiv:1610.02391",
            tier="T3",
            score_before_activation=True,
        )

    @property
    def needs(self) -> Needs:
        """Those of the pixel method, and layers, which lie over an image."""
        return replace(self._pixels.needs, layers=True, spatial_axes=True)

    def resolved(self, subject: Subject) -> Self:
        """With the layer that is used, and the pixel method resolved."""
        return replace(self, layer=grid(subject, self.layer).layer, pixel_method=self._pixels.resolved(subject))

    def maps(self, subject: Subject) -> Mapping[str, MapSpec]:
        """One, of the input that the grid covers."""
        covers = grid(subject, self.layer).covers
        return {covers: subject.maps[covers]}

    def cost(self, subject: Subject) -> Cost:
        """That of the pixel method, and one gradient."""
        own = self._pixels.cost(subject)
        return Cost(
            own.min_gradient_rows + 1,
            own.max_gradient_rows + 1,
            own.common_gradient_rows + 1,
            own.min_forward_rows,
            own.max_forward_rows,
        )

    def path_bytes(self, subject: Subject) -> int:
        """That of the pixel method, and the upsampled map."""
        return self._pixels.path_bytes(subject) + super().path_bytes(subject)

    def plan(self, question: Question) -> Plan:
        """The pixel method's first round, and the row of Grad-CAM behind it."""
        pixels = self._pixels.plan(question)
        return PixelsPlan((*pixels.segments, *self._cam.plan(question).segments), pixels, None)

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The pixel method's next round, or the product."""
        assert isinstance(plan, PixelsPlan), "Not a plan of this method. This is a bug."
        positive, own = plan.positive, evaluation
        if positive is None:
            positive = self._positive(question, evaluation)
            own = Evaluation(evaluation.segments[:-1])
        outcome = self._pixels.attribution(question, plan.pixels, own)
        if isinstance(outcome, Plan):
            return PixelsPlan(outcome.segments, outcome, positive)
        return self._product(question, outcome, positive)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The product with the pixel method's map so far."""
        assert isinstance(upcoming, PixelsPlan) and upcoming.positive is not None, "No round came before."
        return self._product(question, self._pixels.so_far(question, upcoming.pixels), upcoming.positive)

    @property
    def _pixels(self) -> Method:
        assert self.pixel_method is not None, "Set after construction."
        return self.pixel_method

    @property
    def _cam(self) -> GradCam:
        return GradCam(layer=self.layer)

    def _positive(self, question: Question, evaluation: Evaluation) -> NDArray[np.float64]:
        own = grid(question.subject, self.layer)
        cells = self._cam.combined(*activations(evaluation.segments[-1], own))
        return upsampled(np.maximum(cells, 0), extent(question.subject, own.covers), self.upsampling)

    def _product(self, question: Question, found: Attribution, positive: NDArray[np.float64]) -> Attribution:
        """Of the input that the grid covers; other inputs have no share in the grid, and are left out."""
        covers = grid(question.subject, self.layer).covers
        product = found.tensors[covers] * laid_over(positive, question.subject, covers)
        return Attribution({covers: product.astype(np.float32)}, found.step_count + 1, found.stop_reason).checked()
