"""Resize as the runtime computes it: its conventions are not those of the reference evaluator everywhere."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from onnx import numpy_helper, parser

from explainserve.onnx_vjp import input_gradient
from explainserve.onnx_vjp.graph import Graph
from onnx_vjp.vjp_oracle import Case, run, single

MODES: tuple[dict[str, object], ...] = (
    *({"mode": "nearest", "nearest_mode": n} for n in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")),
    *({"mode": mode, "antialias": smooth} for mode in ("linear", "cubic") for smooth in (0, 1)),
    *({"mode": "cubic", "exclude_outside": 1, "antialias": smooth} for smooth in (0, 1)),
    {"mode": "cubic", "cubic_coeff_a": -0.5},
)
COORDINATES = (
    "align_corners",
    "asymmetric",
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "tf_crop_and_resize",
)
REGION = np.array([0, 0, 0.2, -0.1, 1, 1, 0.7, 1.2], np.float32)

_rng = np.random.default_rng(5)
IMAGE = _rng.standard_normal((1, 2, 5, 7)).astype(np.float32)


def _assert_transposed(case: Case) -> None:
    """<g, R v> = <R' g, v>: Resize is linear, up to what it puts outside of the image."""
    gradient = input_gradient(case.model, ["x"], "y0")
    value, nothing = (run(case.model, {**case.feeds, "x": x}, ["y0"])[0] for x in (IMAGE, np.zeros_like(IMAGE)))
    cotangent = _rng.standard_normal(value.shape).astype(np.float32)
    (dx,) = run(gradient.model, {**case.feeds, gradient.cotangent: cotangent}, [gradient.gradients["x"]])
    products = dx * IMAGE
    scale = max(1.0, float(np.linalg.norm(products)))
    assert float(products.sum()) == pytest.approx(float((cotangent * (value - nothing)).sum()), abs=1e-4 * scale)


def _constant(case: Case, *names: str) -> Case:
    """Float inputs as constants of the model: what files hold."""
    for name in names:
        (declared,) = (value for value in case.model.graph.input if value.name == name)
        case.model.graph.input.remove(declared)
        case.model.graph.initializer.append(numpy_helper.from_array(case.feeds.pop(name), name))
    return case


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_the_gradient_is_the_transpose_of_what_runs(mode: dict[str, object], coordinates: str) -> None:
    crops = coordinates == "tf_crop_and_resize"
    shape = {**mode, "coordinate_transformation_mode": coordinates, "extrapolation_value": 3.0, "version": 19}
    region = {"r": REGION} if crops else {"_r": REGION}
    for scales in ([1, 1, 0.6, 0.4], [1, 1, 2, 1.7], [1, 1, 3, 2]):
        feeds = {"x": IMAGE, **region, "s": np.array(scales, np.float32)}
        dynamic = () if scales[2] == 3 else None
        _assert_transposed(_constant(single("Resize", feeds, dynamic=dynamic, **shape), "s", *(["r"] if crops else [])))
    sizes = {"x": IMAGE, **region, "_s": REGION, "z": np.array([1, 2, 1, 13])}
    _assert_transposed(single("Resize", sizes, dynamic=("z",), **shape))


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_an_axis_that_keeps_its_size_is_resized_where_another_one_changes(
    mode: dict[str, object], coordinates: str
) -> None:
    """Five times 1.1 is five. By itself, onnxruntime would copy such an axis, as it does where no size changes."""
    crops = coordinates == "tf_crop_and_resize"
    shape = {**mode, "coordinate_transformation_mode": coordinates, "version": 19}
    region = {"r": REGION} if crops else {"_r": REGION}
    for scales, dynamic in product(([1, 1, 1.1, 1.5], [1, 1, 1.1, 0.5], [1, 1, 1.1, 1.1]), (None, ())):
        feeds = {"x": IMAGE, **region, "s": np.array(scales, np.float32)}
        case = single("Resize", feeds, dynamic=dynamic, **shape)
        _assert_transposed(_constant(case, "s", *(["r"] if crops else [])))


@pytest.mark.parametrize(
    ("mode", "policy", "coordinates"),
    [
        *product(
            ("nearest", "linear", "cubic"), ("not_larger", "not_smaller"), ("half_pixel", "asymmetric", "align_corners")
        )
    ],
)
def test_the_aspect_ratio_is_kept(mode: str, policy: str, coordinates: str) -> None:
    shape = {"mode": mode, "keep_aspect_ratio_policy": policy, "coordinate_transformation_mode": coordinates}
    feeds = {"x": IMAGE, "_r": REGION, "_s": REGION, "z": np.array([8, 8])}
    for dynamic in (None, ("z",)):
        _assert_transposed(single("Resize", feeds, axes=[2, 3], version=19, dynamic=dynamic, **shape))


@pytest.mark.parametrize("stored", [True, False])
def test_sizes_are_rounded_as_the_runtime_does(stored: bool) -> None:
    """float32 makes 7 of 10 * 0.7, which is below 7 in exact arithmetic."""
    image = _rng.standard_normal((1, 2, 10, 5)).astype(np.float32)
    scales = np.array([1, 1, 0.7, 1], np.float32)
    case = single("Resize", {"x": image, "_r": image[:0], "scales": scales}, version=18, mode="linear")
    if stored:
        case = _constant(case, "scales")
    (value,) = run(case.model, case.feeds, ["y0"])
    assert value.shape == (1, 2, 7, 5)
    gradient = input_gradient(case.model, ["x"], "y0")
    feeds = {**case.feeds, gradient.cotangent: np.ones_like(value)}
    (dx,) = run(gradient.model, feeds, [gradient.gradients["x"]])
    assert float((dx * image).sum()) == pytest.approx(float(value.sum()), rel=1e-4)


def test_a_size_is_that_of_the_runtime_where_scales_are_computed() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]>
        g (float[b, 2, 3, 3] x, float[b, 2, 5, 5] z) => (float[b, 2, 5, 5] y) {
        large = Shape <start: int = 2> (z)
        small = Shape <start: int = 2> (x)
        numerator = Cast <to: int = 1> (large)
        denominator = Cast <to: int = 1> (small)
        scales = Div (numerator, denominator)
        resized = Resize <mode: string = "nearest", axes: ints = [2, 3]> (x, , scales)
        y = Add (resized, z)
        }"""
    )
    assert Graph(model).shape("resized") == ("b", 2, 5, 5)
