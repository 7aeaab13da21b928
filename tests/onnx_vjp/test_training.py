"""What files hold that were exported in training mode: dropout that draws, and statistics of the batch."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest

from explainserve.onnx_vjp import GRADIENT_RULES, find_gaps, input_gradient, split
from onnx_vjp.vjp_oracle import run

X = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
G = np.random.default_rng(1).standard_normal((8, 50)).astype(np.float32)


def _dropout(nodes: str = "y, kept = Dropout (x, ratio, training)") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 50] x, bool training) => (float[N, 50] y, bool[N, 50] kept)
        <float ratio = {{0.25}}, int64[1] first = {{0}}> {{ {nodes} }}"""
    )


def test_dropout_passes_what_its_own_mask_kept() -> None:
    gradient = input_gradient(_dropout(), ["x"], "y")
    session = ort.InferenceSession(gradient.model.SerializeToString())
    names, feeds = ["y", "kept", gradient.gradients["x"]], {"x": X, gradient.cotangent: G, "training": np.array(True)}
    masks = []
    for _ in range(2):
        y, kept, dx = session.run(names, feeds)
        np.testing.assert_allclose(y, X * kept / 0.75, rtol=1e-6)
        np.testing.assert_allclose(dx, G * kept / 0.75, rtol=1e-6)
        masks.append(kept)
    assert 0.6 < masks[0].mean() < 0.9 and np.any(masks[0] != masks[1])
    y, kept, dx = session.run(names, feeds | {"training": np.array(False)})
    assert kept.all()
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(dx, G)


def test_dropout_with_the_default_ratio_needs_no_mask_of_its_own() -> None:
    model = _dropout("y = Dropout (x, , training)  kept = Not (training)")
    gradient = input_gradient(model, ["x"], "y")
    y, dx = run(
        gradient.model,
        {"x": X, gradient.cotangent: G, "training": np.array(True)},
        ["y", gradient.gradients["x"]],
    )
    np.testing.assert_allclose(dx, G * (y != 0) * 2, rtol=1e-6)


def test_one_drawing_serves_many_cotangents() -> None:
    gradient = input_gradient(_dropout(), ["x"], "y")
    parts, given = split(gradient), {"x": X, "training": np.array(True)}
    drawn = [name for name in parts.residuals if name not in given]
    kept, *values = run(parts.forward, given, ["kept", *drawn])
    residuals = given | dict(zip(drawn, values, strict=True))
    for g in (G, G[::-1].copy()):
        feeds = {name: residuals[name] for name in parts.residuals} | {gradient.cotangent: g}
        (dx,) = run(parts.backward, feeds, [gradient.gradients["x"]])
        np.testing.assert_allclose(dx, g * kept / 0.75, rtol=1e-6)


def test_a_loop_keeps_what_it_drew() -> None:
    step = """step (float[50] h, float[50] row) => (float[50] after, float[50] written, bool[50] kept) {
        written, kept = Dropout (row, ratio, training)
        after = Identity (h)
    }"""
    scan = f"last, y, kept = Scan <body = {step}, num_scan_inputs = 1> (h, x)"
    gradient = input_gradient(_dropout(f"h = ReduceSum <keepdims = 0> (x, first)  {scan}"), ["x"], "y")
    feeds = {"x": X, gradient.cotangent: G, "training": np.array(True)}
    kept, dx = run(gradient.model, feeds, ["kept", gradient.gradients["x"]])
    np.testing.assert_allclose(dx, G * kept / 0.75, rtol=1e-6)


def test_a_branch_that_would_draw_twice_is_a_gap() -> None:
    drawing = "then_branch = drawn () => (float[N, 50] z, bool[N, 50] a) { z, a = Dropout (x, ratio, training) }"
    other = "else_branch = plain () => (float[N, 50] z, bool[N, 50] a) { z = Neg (x)  a = IsNaN (x) }"
    (gap,) = find_gaps(_dropout(f"y, kept = If (training) <{drawing}, {other}>"), ["x"], "y")
    assert gap.operator == "If" and "Dropout in a body would be drawn twice" in gap.reason


NORMALIZATION = """<ir_version: 8, opset_import: ["" : {version}]>
    g (float[N, 3, 4] x, float[3] scale, float[3] bias, float[3] mean, float[3] variance) => (float[N, 3, 4] y)
    {{ {outputs} = BatchNormalization {attributes} (x, scale, bias, mean, variance) }}"""


@pytest.mark.parametrize(
    ("version", "outputs", "attributes"),
    [(9, "y, m, v, a, b", "<epsilon = 0.01>"), (18, "y, m, v", "<training_mode = 1, epsilon = 0.01>")],
)
def test_statistics_of_the_batch_have_the_gradient_of_autograd(version: int, outputs: str, attributes: str) -> None:
    torch = pytest.importorskip("torch")
    model = onnx.parser.parse_model(NORMALIZATION.format(version=version, outputs=outputs, attributes=attributes))
    gradient = input_gradient(model, ["x", "scale", "bias"], "y")
    x, scale, bias, g = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 3, 4), 3, 3, (5, 3, 4)))
    leaves = [value.requires_grad_(True) for value in (x, scale, bias)]
    y = torch.nn.functional.batch_norm(x, None, None, scale, bias, training=True, eps=0.01)
    expected = torch.autograd.grad(y, leaves, g)
    feeds = {"x": x, "scale": scale, "bias": bias, "mean": torch.zeros(3), "variance": torch.ones(3)}
    given = {name: value.detach().numpy().astype(np.float32) for name, value in feeds.items()}
    given[gradient.cotangent] = g.numpy().astype(np.float32)
    for found, value in zip(run(gradient.model, given, list(gradient.gradients.values())), expected, strict=True):
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        _dropout(),
        onnx.parser.parse_model(NORMALIZATION.format(version=18, outputs="y, m, v", attributes="<training_mode = 1>")),
    ],
    ids=["dropout", "statistics"],
)
def test_deeplift_has_no_rule_for_training(model: onnx.ModelProto) -> None:
    (gap,) = find_gaps(model, ["x"], "y", rules=GRADIENT_RULES["deeplift_rescale"]())
    assert "training mode" in gap.reason
