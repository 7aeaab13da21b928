"""Attribution methods and their options."""

from __future__ import annotations

from dataclasses import dataclass

from explainserve.v1 import method_pb2
from explainserve_client.errors import RequestTypeError, RequestValueError
from explainserve_client.names import optional_name, optional_value


@dataclass(frozen=True, slots=True)
class IntegratedGradients:
    """Integrated Gradients (Sundararajan, Taly, Yan 2017): (x - x') times the mean gradient on the line from x' to x.

    With `step_count` a fixed rule, without it adaptive. What is left at None is the server's default.

    Attributes:
        step_count: gradient evaluations of one path, at least 1 (trapezoid: 2).
        quadrature: "midpoint" (default with a step count), "left", "right", "trapezoid", "gauss_legendre"; "adaptive".
        tolerance: adaptive only, in (0, 1]: the largest estimated relative L2 error of the map. Server default 0.05.
        completeness_tolerance: adaptive only, in (0, 1]: the largest relative completeness gap. Server default 0.05.
        max_step_count: adaptive only, at least 16: the most gradient evaluations of one path. Server default 128.
    """

    step_count: int | None = None
    quadrature: str | None = None
    tolerance: float | None = None
    completeness_tolerance: float | None = None
    max_step_count: int | None = None

    def __post_init__(self) -> None:
        adaptive = self.quadrature is None or self.quadrature.upper() == "ADAPTIVE"
        options = (self.tolerance, self.completeness_tolerance, self.max_step_count)
        if self.step_count is None and not adaptive:
            raise RequestValueError(f"quadrature {self.quadrature!r} is a fixed rule and needs a step_count")
        if self.step_count is not None and (self.quadrature or "").upper() == "ADAPTIVE":
            raise RequestValueError("adaptive quadrature takes max_step_count, not step_count")
        if self.step_count is not None and any(option is not None for option in options):
            raise RequestValueError(
                "tolerance, completeness_tolerance and max_step_count are for the adaptive rule: leave step_count out"
            )

    def to_proto(self) -> method_pb2.MethodSpec:
        """The message."""
        return method_pb2.MethodSpec(
            integrated_gradients=method_pb2.IntegratedGradients(
                step_count=self.step_count,
                quadrature=optional_value(method_pb2.Quadrature, self.quadrature),
                tolerance=self.tolerance,
                completeness_tolerance=self.completeness_tolerance,
                max_step_count=self.max_step_count,
            )
        )

    @classmethod
    def from_proto(cls, message: method_pb2.IntegratedGradients) -> IntegratedGradients:
        """Reads the message, as provenance echoes it."""
        fixed = message.HasField("step_count")
        quadrature = optional_name(method_pb2.Quadrature, message.quadrature)
        return cls(
            step_count=message.step_count if fixed else None,
            quadrature=quadrature.lower() if quadrature else None,
            tolerance=message.tolerance if message.HasField("tolerance") and not fixed else None,
            completeness_tolerance=message.completeness_tolerance
            if message.HasField("completeness_tolerance") and not fixed
            else None,
            max_step_count=message.max_step_count if message.HasField("max_step_count") and not fixed else None,
        )


Method = IntegratedGradients


def method_specs(method: Method | None) -> list[method_pb2.MethodSpec]:
    """The messages of a request; None leaves the choice to the server (adaptive Integrated Gradients)."""
    if method is None:
        return []
    if not isinstance(method, IntegratedGradients):
        raise RequestTypeError(f"method is an IntegratedGradients(...), not {method!r}")
    return [method.to_proto()]


def used_method(spec: method_pb2.MethodSpec) -> Method:
    """Reads a method of the provenance."""
    return IntegratedGradients.from_proto(spec.integrated_gradients)
