"""Integrated Gradients: fixed with a step count, adaptive without."""

from __future__ import annotations

from typing import Any

import pytest

from explainserve.v1 import method_pb2
from explainserve_client import IntegratedGradients, Occlusion, RequestTypeError, RequestValueError, SmoothGrad
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


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (Occlusion(window=8), RequestTypeError, r"window: expected a sequence .* for each axis.* got 8"),
        (Occlusion(window=(8, 8), stride="44"), RequestTypeError, r"stride: expected a sequence"),
        (Occlusion(window=(8.5, 8)), RequestTypeError, r"window: .*float"),
        (Occlusion(window=(2**40, 8)), RequestValueError, r"window: .*out of range"),
        (SmoothGrad(sample_count=(8, 8)), RequestTypeError, r"sample_count: .*tuple"),
        (Occlusion(aggregation="median"), RequestValueError, r"no aggregation 'median'; there are mean, sum"),
    ],
)
def test_an_option_of_another_type_is_named(method: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        method_specs(method)


def test_windows_are_any_sequences_of_numbers() -> None:
    (spec,) = method_specs(Occlusion(window=[4, 6], stride=(2, 3)))

    assert spec == method_pb2.MethodSpec(occlusion=method_pb2.Occlusion(window=[4, 6], stride=[2, 3]))


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(RequestTypeError, match="IntegratedGradients"):
        method_specs("integrated_gradients")  # type: ignore[arg-type]
