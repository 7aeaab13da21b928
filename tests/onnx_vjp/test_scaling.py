"""Cotangents that are scaled on their way down, in graphs with a part in float16."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from explainserve.onnx_vjp import GradientGraph, append_score_head, input_gradient, scaled_gradient, split
from onnx_graphs import model, node
from onnx_vjp.vjp_oracle import run

RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.standard_normal((3, 4)).astype(np.float32)
X = RANDOM.standard_normal((2, 3)).astype(np.float32)
EYE = np.eye(4, dtype=np.float32)


def halved(last: str = "Identity") -> onnx.ModelProto:
    """y = last(x W), with the product in float16."""
    nodes = [
        node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16),
        node("MatMul", ["narrow", "W"], ["product"]),
        node("Cast", ["product"], ["wide"], to=TensorProto.FLOAT),
        node(last, ["wide"], ["y"]),
    ]
    return model(nodes, [("x", ["n", 3])], [("y", ["n", 4])], {"W": WEIGHTS.astype(np.float16)})


def gradient(found: GradientGraph, cotangent: np.ndarray, x: np.ndarray = X) -> np.ndarray:
    return run(found.model, {"x": x, found.cotangent: cotangent}, [found.gradients["x"]])[0]


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_rows_of_all_sizes_keep_their_gradient(size: float) -> None:
    sizes = np.array([[1.0], [size]], np.float32)
    found = gradient(scaled_gradient(halved(), ["x"], "y", "y"), sizes * EYE[[1, 2]])

    assert found.dtype == np.float32
    np.testing.assert_allclose(found / sizes, WEIGHTS.T[[1, 2]], rtol=2e-3)


def test_without_scaling_they_are_lost() -> None:
    assert not gradient(input_gradient(halved(), ["x"], "y"), np.float32(1e-9) * EYE[[1, 2]]).any()


def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_row() -> None:
    found = gradient(scaled_gradient(halved(), ["x"], "y", "y"), np.stack([0 * EYE[0], np.nan * EYE[1]]))

    assert not found[0].any()
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize("head", ["softmax", "log_softmax", "identity", "sigmoid"])
def test_scores_are_scaled_at_the_output_that_they_are_of(head: str) -> None:
    """A logit of 40 leaves probabilities below 1e-17, and as little of the cotangent."""
    extended, score = append_score_head(halved(), "y", head, 1)
    x = np.linalg.pinv(WEIGHTS.astype(np.float64)).T @ np.array([40.0, 0, 0, 0])
    found = gradient(scaled_gradient(extended, ["x"], score, "y"), EYE[[1]], x[None].astype(np.float32))
    exact = gradient(input_gradient(extended, ["x"], score), EYE[[1]], x[None].astype(np.float32))

    assert np.abs(found).max() > 0
    if np.abs(exact).max() > 1e-2:
        np.testing.assert_allclose(found, exact, rtol=1e-2)


def test_a_score_that_goes_around_the_output_is_scaled_where_it_begins() -> None:
    """The logarithm of a Softmax is taken of its input."""
    extended, score = append_score_head(halved("Softmax"), "y", "log", 1)
    found, exact = (
        gradient(build, EYE[[1, 2]])
        for build in (scaled_gradient(extended, ["x"], score, "y"), input_gradient(extended, ["x"], score))
    )

    np.testing.assert_allclose(found, exact, rtol=1e-2, atol=1e-3)
    assert np.abs(found).max() > 0.1


def test_it_is_split_like_any_gradient() -> None:
    whole = scaled_gradient(halved(), ["x"], "y", "y")
    parts = split(whole)
    names = list(parts.residuals)
    residuals = dict(zip(names, run(parts.forward, {"x": X}, names), strict=True)) if names else {}
    (found,) = run(parts.backward, {**residuals, whole.cotangent: EYE[[1, 2]]}, [whole.gradients["x"]])

    np.testing.assert_array_equal(found, gradient(whole, EYE[[1, 2]]))


def test_a_single_row_needs_no_axis_of_rows() -> None:
    nodes = [node("MatMul", ["x", "W"], ["y"])]
    bare = model(nodes, [("x", [3])], [("y", [4])], {"W": WEIGHTS})
    found = scaled_gradient(bare, ["x"], "y", "y", single=True)

    np.testing.assert_allclose(gradient(found, EYE[1], X[0]), WEIGHTS[:, 1], rtol=1e-6)


def test_inputs_and_outputs_are_those_of_a_gradient() -> None:
    found, plain = scaled_gradient(halved(), ["x"], "y", "y"), input_gradient(halved(), ["x"], "y")

    onnx.checker.check_model(found.model, full_check=True)
    assert len(found.model.graph.output) == len(plain.model.graph.output)
    assert {value.name for value in found.model.graph.input} == {"x", found.cotangent}
