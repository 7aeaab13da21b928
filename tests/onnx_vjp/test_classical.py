"""Files as converters of scikit-learn write them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import onnx
import onnx.parser
import pytest

from explainserve.onnx_vjp import find_gaps, input_gradient
from onnx_vjp.classical_cases import KERNELS, VECTORS, X
from onnx_vjp.vjp_oracle import run, single

PIPELINE = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
pipeline (float[N, 3] x) => (int64[N] label, seq(map(int64, float)) maps) {
    scaled = ai.onnx.ml.Scaler <offset = [0.1, 0.2, 0.3], scale = [2.0, 1.0, 0.5]> (x)
    label, scores = ai.onnx.ml.LinearClassifier <
        classlabels_ints = [0, 1], coefficients = [0.5, -1.0, 2.0, -0.5, 1.0, -2.0], intercepts = [0.1, -0.1],
        post_transform = "LOGISTIC"> (scaled)
    probabilities = ai.onnx.ml.Normalizer <norm = "L1"> (scores)
    maps = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1]> (probabilities)
}"""


def test_probabilities_in_front_of_maps_have_a_gradient() -> None:
    model = onnx.parser.parse_model(PIPELINE)
    gradient = input_gradient(model, ["x"], "probabilities")
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    cotangent = np.array([[0, 1], [0, 1]], np.float32)
    dx, p = run(gradient.model, {"x": x, gradient.cotangent: cotangent}, [gradient.gradients["x"], "probabilities"])
    weights = -np.array([0.5, -1.0, 2.0]) * [2.0, 1.0, 0.5]
    np.testing.assert_allclose(dx, p[:, :1] * p[:, 1:] * weights, rtol=1e-4)


def test_maps_themselves_are_refused() -> None:
    model = onnx.parser.parse_model(PIPELINE)
    (gap,) = find_gaps(model, ["x"], "maps")
    assert gap.operator == "ZipMap"


def _coupled(q: np.ndarray, classes: int) -> np.ndarray:
    """The probabilities that those of all pairs determine, by the linear system of Wu, Lin and Weng 2004."""
    system = np.zeros((len(q), classes + 1, classes + 1))
    system[:, :-1, -1] = system[:, -1, :-1] = 1
    for pair, (i, j) in enumerate(combinations(range(classes), 2)):
        first, second = q[:, pair], 1 - q[:, pair]
        system[:, i, i] += second**2
        system[:, j, j] += first**2
        system[:, i, j] = system[:, j, i] = -first * second
    constraint = np.eye(classes + 1)[:, -1:]
    return np.linalg.solve(system, np.broadcast_to(constraint, (len(q), classes + 1, 1)))[:, :-1, 0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(2, 4), (2, 1, 3), (1, 2, 1, 2)], ids=len)
def test_coupled_probabilities(sizes: tuple[int, ...], kernel: str) -> None:
    generator, classes, (parameters, k) = np.random.default_rng(1), len(sizes), KERNELS[kernel]
    pairs, owner = list(combinations(range(classes), 2)), np.repeat(range(classes), sizes)
    table, rho = generator.standard_normal((classes - 1, 6)), generator.standard_normal(len(pairs)) / 5
    slopes, shifts = -1 - generator.random(len(pairs)), generator.standard_normal(len(pairs)) / 5
    case = single(
        "SVMClassifier",
        {"x": X},
        outputs=2,
        domain="ai.onnx.ml",
        version=3,
        classlabels_ints=list(range(classes)),
        coefficients=list(table.ravel()),
        kernel_params=parameters,
        kernel_type=kernel,
        prob_a=list(slopes),
        prob_b=list(shifts),
        rho=list(rho),
        support_vectors=list(VECTORS.ravel()),
        vectors_per_class=sizes,
    )
    case.model.graph.output[0].name = "y1"

    def probabilities(x: np.ndarray) -> np.ndarray:
        rows = [np.where(owner == i, table[j - 1], 0) + np.where(owner == j, table[i], 0) for i, j in pairs]
        decisions = k(x) @ np.array(rows).T + rho
        return _coupled(1 / (1 + np.exp(slopes * decisions + shifts)), classes)

    gradient = input_gradient(case.model, ["x"], "y1")
    cotangent = generator.standard_normal((len(X), classes)).astype(np.float32)
    p, dx = run(gradient.model, {"x": X, gradient.cotangent: cotangent}, ["y1", gradient.gradients["x"]])
    # The runtime couples them by an iteration that stops early.
    np.testing.assert_allclose(p, probabilities(X.astype(np.float64)), atol=0.01)
    for direction in generator.standard_normal((3, *X.shape)):
        ahead, behind = (probabilities(X + sign * 1e-6 * direction) for sign in (1, -1))
        wanted = float(np.sum((ahead - behind) * cotangent)) / 2e-6
        assert float(np.sum(dx * direction)) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_missing_attribute_is_a_gap() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
    scaler (float[N, 3] x) => (float[N, 3] y) { y = ai.onnx.ml.Scaler <offset = [1.0]> (x) }"""
    (gap,) = find_gaps(onnx.parser.parse_model(text), ["x"], "y")
    assert "do not fit its operator" in gap.reason


def test_probabilities_that_are_transformed_once_more_are_a_gap() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
    svm (float[N, 1] x) => (int64[N] label, float[N, 2] p) {
        label, p = ai.onnx.ml.SVMClassifier <
            classlabels_ints = [0, 1], coefficients = [1.0, -0.5], rho = [0.2], vectors_per_class = [1, 1],
            support_vectors = [1.0, 0.0], kernel_type = "LINEAR", kernel_params = [0.0, 0.0, 0.0],
            prob_a = [-1.0], prob_b = [0.1], post_transform = "SOFTMAX"> (x)
    }"""
    (gap,) = find_gaps(onnx.parser.parse_model(text), ["x"], "p")
    assert "transformed once more" in gap.reason
