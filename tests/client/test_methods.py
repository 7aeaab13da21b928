"""Integrated Gradients: fixed with a step count, adaptive without."""

from __future__ import annotations

from typing import Any

import pytest

from explainserve.v1 import method_pb2
from explainserve_client import IntegratedGradients, RequestTypeError, RequestValueError
from explainserve_client.methods import method_specs, used_method


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (IntegratedGradients(), method_pb2.IntegratedGradients()),
        (IntegratedGradients(step_count=64), method_pb2.IntegratedGradients(step_count=64)),
        (
            IntegratedGradients(step_count=4, quadrature="midpoint"),
            method_pb2.IntegratedGradients(step_count=4, quadrature=method_pb2.QUADRATURE_MIDPOINT),
        ),
        (
            IntegratedGradients(step_count=8, quadrature="gauss_legendre"),
            method_pb2.IntegratedGradients(step_count=8, quadrature=method_pb2.QUADRATURE_GAUSS_LEGENDRE),
        ),
        (
            IntegratedGradients(tolerance=0.01, completeness_tolerance=0.02, max_step_count=256),
            method_pb2.IntegratedGradients(tolerance=0.01, completeness_tolerance=0.02, max_step_count=256),
        ),
        (
            IntegratedGradients(quadrature="adaptive", max_step_count=32),
            method_pb2.IntegratedGradients(quadrature=method_pb2.QUADRATURE_ADAPTIVE, max_step_count=32),
        ),
    ],
)
def test_a_method_becomes_its_message_and_back(
    method: IntegratedGradients, expected: method_pb2.IntegratedGradients
) -> None:
    (spec,) = method_specs(method)

    assert spec == method_pb2.MethodSpec(integrated_gradients=expected)
    assert used_method(spec) == method


def test_without_a_method_the_server_chooses() -> None:
    assert method_specs(None) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quadrature": "midpoint"}, "needs a step_count"),
        ({"quadrature": "adaptive", "step_count": 8}, "takes max_step_count"),
        ({"step_count": 8, "tolerance": 0.1}, "leave step_count out"),
        ({"step_count": 8, "max_step_count": 16}, "leave step_count out"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestValueError, match=message):
        IntegratedGradients(**options)


def test_an_unknown_quadrature_is_refused() -> None:
    with pytest.raises(RequestValueError, match="no quadrature 'simpson'"):
        method_specs(IntegratedGradients(step_count=4, quadrature="simpson"))


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(RequestTypeError, match="IntegratedGradients"):
        method_specs("integrated_gradients")  # type: ignore[arg-type]
