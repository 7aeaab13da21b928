"""Files as converters of scikit-learn write them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

from explainserve.onnx_vjp import find_gaps, input_gradient
from onnx_vjp.vjp_oracle import run

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


SVM = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
svm (float[N, 2] x) => (int64[N] label, float[N, C] p) {{
    label, p = ai.onnx.ml.SVMClassifier <
        classlabels_ints = [{labels}], coefficients = [{coefficients}], rho = [{rho}], vectors_per_class = [{sizes}],
        support_vectors = [1.0, 0.0, 0.0, 1.0, -1.0, 0.5], kernel_type = "RBF", kernel_params = [0.5, 0.0, 0.0],
        prob_a = [{a}], prob_b = [{b}]> (x)
}}"""


def test_calibrated_probabilities_of_two_classes() -> None:
    text = SVM.format(labels="0, 1", coefficients="1.0, -0.5, 0.7", rho="0.25", sizes="1, 2", a="-1.3", b="0.2")
    model = onnx.parser.parse_model(text)
    gradient = input_gradient(model, ["x"], "p")
    x = np.random.default_rng(0).standard_normal((1, 2)).astype(np.float32)

    def probability(x: np.ndarray) -> float:
        vectors = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]])
        decision = np.exp(-0.5 * ((x - vectors) ** 2).sum(axis=1)) @ [1.0, -0.5, 0.7] + 0.25
        return float(1 / (1 + np.exp(-1.3 * decision + 0.2)))

    cotangent = np.array([[1, 0]], np.float32)
    (dx,) = run(gradient.model, {"x": x, gradient.cotangent: cotangent}, [gradient.gradients["x"]])
    steps = 1e-6 * np.eye(2)
    wanted = [(probability(x + step) - probability(x - step)) / 2e-6 for step in steps]
    # onnxruntime couples even two probabilities by an iteration that stops early.
    np.testing.assert_allclose(dx[0], wanted, rtol=2e-2)


def test_coupled_probabilities_of_three_classes_are_a_gap() -> None:
    coefficients = "1.0, -0.5, 0.7, 0.2, 0.3, 0.4"
    numbers = {"labels": "0, 1, 2", "rho": "0.2, 0.1, 0.3", "a": "-1.0, -1.0, -1.0", "b": "0.1, 0.2, 0.3"}
    model = onnx.parser.parse_model(SVM.format(coefficients=coefficients, sizes="1, 1, 1", **numbers))
    assert "iteration" in find_gaps(model, ["x"], "p")[0].reason
