"""Baselines: every kind and space, from its formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from explainserve.baselines import (
    NAMED,
    BaselineSpec,
    Blur,
    Constant,
    Data,
    GaussianNoise,
    Given,
    InputBaseline,
    Tone,
    UniformNoise,
    Zeros,
    digest,
    effective,
)
from explainserve.errors import InvalidRequest, NotFound, Unsupported
from explainserve.explanation import Instance
from explainserve.signature import Axis, InputSpec, Signature

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
IMAGE = InputSpec(
    "image",
    np.dtype("f4"),
    (Axis("batch"), Axis("", 3), Axis("", 6), Axis("", 5)),
    layout="NCHW",
    value_range=(0.0, 1.0),
    mean=MEAN,
    std=STD,
)
PLAIN = InputSpec("image", np.dtype("f4"), (Axis("batch"), Axis("", 3), Axis("", 6), Axis("", 5)))
VALUE = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)


def values(kind: InputBaseline, spec: InputSpec = IMAGE, draw: int = 0, data: dict | None = None) -> np.ndarray:
    return drawn(kind, spec, data)[draw]


def drawn(kind: InputBaseline, spec: InputSpec = IMAGE, data: dict | None = None) -> list[np.ndarray]:
    instance = Instance({"image": VALUE}, {})
    made = BaselineSpec(kind).baselines(Signature((spec,), ()), instance, 1, 4, data or {})
    return [baseline.moving["image"] for baseline in made]


def model_space(pixel: np.ndarray | float) -> np.ndarray:
    return ((pixel / 255.0 - np.array(MEAN)) / np.array(STD))[:, None, None]


def test_zeros_are_zero_and_in_pixel_space_black() -> None:
    assert not values(Zeros()).any()
    np.testing.assert_allclose(values(Zeros(pixel_space=True)), values(Tone(0.0)))


@pytest.mark.parametrize(("name", "pixel"), [("black", 0.0), ("gray", 127.5), ("white", 255.0)])
def test_tones_are_levels_of_the_value_range_preprocessed(name: str, pixel: float) -> None:
    expected = np.broadcast_to(model_space(np.full(3, pixel)), (3, 6, 5))

    np.testing.assert_allclose(values(NAMED[name]), expected, rtol=1e-6)


def test_the_scale_of_pixels_is_that_of_the_value_range() -> None:
    bytes_in = replace(IMAGE, value_range=(0.0, 255.0), mean=(100.0,), std=(50.0,))

    np.testing.assert_allclose(values(Tone(0.5), bytes_in), np.full((3, 6, 5), (127.5 - 100) / 50))


def test_constants_are_one_value_or_one_per_channel_in_either_space() -> None:
    np.testing.assert_allclose(values(Constant((2.5,))), np.full((3, 6, 5), 2.5))
    per_channel = values(Constant((1.0, 2.0, 3.0)))
    np.testing.assert_allclose(per_channel, np.broadcast_to(np.array([1, 2, 3.0])[:, None, None], (3, 6, 5)))
    pixels = values(Constant((10.0, 20.0, 30.0), pixel_space=True))
    np.testing.assert_allclose(pixels, np.broadcast_to(model_space(np.array([10, 20, 30.0])), (3, 6, 5)), rtol=1e-5)
    with pytest.raises(InvalidRequest) as refused:
        values(Constant((1.0, 2.0)))
    assert refused.value.reason == "BASELINE_CHANNEL_MISMATCH"


@pytest.mark.parametrize("leading", [(), (1,), (4,)], ids=["instance", "one", "batch"])
def test_tensors_come_with_or_without_a_batch_axis(leading: tuple[int, ...]) -> None:
    tensor = np.random.default_rng(1).normal(size=(*leading, 3, 6, 5))
    expected = tensor if not leading else tensor[1 if leading == (4,) else 0]

    np.testing.assert_allclose(values(Given(tensor)), expected, rtol=1e-6)


def test_a_tensor_of_pixels_is_preprocessed() -> None:
    pixels = np.random.default_rng(1).uniform(0, 255, size=(3, 6, 5))

    np.testing.assert_allclose(values(Given(pixels, pixel_space=True)), model_space_of(pixels), rtol=1e-4, atol=1e-6)


def model_space_of(pixels: np.ndarray) -> np.ndarray:
    return (pixels / 255.0 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]


def test_blur_is_a_normalized_gaussian_with_edges_repeated() -> None:
    sigma = 1.3
    radius = int(np.ceil(4 * sigma))
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    expected = VALUE.astype(np.float64)
    for axis in (1, 2):
        pad = [(radius, radius) if k == axis else (0, 0) for k in range(3)]
        padded = np.pad(expected, pad, mode="edge")
        expected = np.apply_along_axis(np.convolve, axis, padded, taps, mode="valid")

    np.testing.assert_allclose(values(Blur(sigma)), expected, rtol=1e-5, atol=1e-6)


def test_default_range_of_an_input_without_mean_and_std_is_its_value_range() -> None:
    ranged = InputSpec("x", np.dtype(np.float32), (Axis("batch"), Axis("", 500)), value_range=(-3.0, 5.0))
    instance = Instance({"x": np.zeros(500, np.float32)}, {})
    (made,) = BaselineSpec(UniformNoise(None, None, 3)).baselines(Signature((ranged,), ()), instance, 0, 1, {})

    assert -3 <= made.moving["x"].min() < -2.5 < 4.5 < made.moving["x"].max() < 5
    assert effective(UniformNoise(None, None, 3), ranged) == UniformNoise(-3.0, 5.0, 3)


def test_uniform_noise_fills_the_value_range_and_repeats_by_seed() -> None:
    noise = values(UniformNoise(None, None, seed=7))
    low, high = model_space(np.zeros(3)), model_space(np.full(3, 255.0))

    assert (noise >= low - 1e-5).all() and (noise <= high + 1e-5).all()
    assert noise.std() > 0.2
    np.testing.assert_array_equal(noise, values(UniformNoise(None, None, seed=7)))
    assert digest(noise) != digest(values(UniformNoise(None, None, seed=8)))
    bounded = values(UniformNoise(-2.0, 3.0, seed=0))
    assert bounded.min() >= -2 and bounded.max() <= 3
    pixels = values(UniformNoise(100.0, 101.0, seed=0, pixel_space=True))
    np.testing.assert_allclose(pixels, np.broadcast_to(model_space(np.full(3, 100.5)), pixels.shape), atol=0.04)


def test_gaussian_noise_is_centered_on_the_instance_or_its_mean() -> None:
    around = values(GaussianNoise(None, 1e-3, seed=1))
    np.testing.assert_allclose(around, VALUE, atol=1e-2)
    assert (around != VALUE).any()
    np.testing.assert_allclose(values(GaussianNoise(5.0, 1e-3, seed=1)), np.full((3, 6, 5), 5.0), atol=1e-2)
    in_pixels = values(GaussianNoise(None, 2.55, seed=1, pixel_space=True)) - VALUE
    np.testing.assert_allclose(
        in_pixels, (values(GaussianNoise(0.0, 1.0, seed=1)) * 0.01 / np.array(STD)[:, None, None]), atol=1e-5
    )


def test_draws_are_baselines_of_their_own() -> None:
    draws = drawn(UniformNoise(0.0, 1.0, seed=0, count=3))

    assert len({digest(draw) for draw in draws}) == 3


def test_data_baselines_are_found_by_name() -> None:
    data = {"mean-image": {"image": np.full((3, 6, 5), 0.25, np.float32)}}

    np.testing.assert_array_equal(values(Data("mean-image"), data=data), np.full((3, 6, 5), 0.25))
    with pytest.raises(NotFound) as missing:
        values(Data("nothing"), data=data)
    assert missing.value.reason == "UNKNOWN_DATA_BASELINE"


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        (Tone(0.5), Unsupported, "NO_PREPROCESSING"),
        (Zeros(pixel_space=True), Unsupported, "NO_PREPROCESSING"),
        (Constant((3.0,), pixel_space=True), Unsupported, "NO_PREPROCESSING"),
        (Given(np.zeros((3, 6, 5)), pixel_space=True), Unsupported, "NO_PREPROCESSING"),
        (UniformNoise(0.0, 255.0, 0, pixel_space=True), Unsupported, "NO_PREPROCESSING"),
        (UniformNoise(None, None, 0), InvalidRequest, "BASELINE_RANGE_REQUIRED"),
        (UniformNoise(None, 1.0, 0), InvalidRequest, "BASELINE_RANGE_REQUIRED"),
        (UniformNoise(1.0, 1.0, 0), InvalidRequest, "BASELINE_RANGE_EMPTY"),
        (Blur(2.0), Unsupported, "NO_SPATIAL_AXES"),
        (Given(np.zeros((3, 5, 5))), InvalidRequest, "BASELINE_SHAPE_MISMATCH"),
        (Given(np.full((3, 6, 5), np.inf)), InvalidRequest, "BASELINE_NOT_FINITE"),
    ],
)
def test_a_baseline_is_never_guessed(kind: InputBaseline, error: type[Exception], reason: str) -> None:
    with pytest.raises(error) as refused:
        values(kind, PLAIN)

    assert refused.value.reason == reason  # type: ignore[attr-defined]


def test_inputs_without_a_baseline_get_zeros_and_fixed_ones_none() -> None:
    spec = BaselineSpec(inputs={"image": Constant((1.0,))})
    other = InputSpec("other", np.dtype("f4"), (Axis("batch"), Axis("", 2)))
    instance = Instance({"image": VALUE, "other": np.ones(2, np.float32)}, {})

    (made,) = spec.baselines(Signature((IMAGE, other), ()), instance, 0, 1, {})

    assert not made.moving["other"].any() and made.moving["image"].all()
    with pytest.raises(InvalidRequest) as refused:
        spec.baseline_count(("other",))
    assert refused.value.reason == "BASELINE_FOR_FIXED_INPUT"


def test_two_inputs_never_share_noise() -> None:
    other = replace(IMAGE, name="other")
    instance = Instance({"image": VALUE, "other": VALUE}, {})

    (made,) = BaselineSpec(UniformNoise(0.0, 1.0, 3)).baselines(Signature((IMAGE, other), ()), instance, 0, 1, {})

    assert (made.moving["image"] != made.moving["other"]).any()


def test_values_have_the_inputs_type() -> None:
    double = replace(IMAGE, dtype=np.dtype("f8"))

    assert values(Zeros(), double).dtype == np.float64


@pytest.mark.parametrize("kind", [Zeros(), Constant((0.5,)), Tone(0.5), UniformNoise(0.0, 1.0, 0, pixel_space=True)])
def test_an_input_of_shape_batch_gets_a_baseline_without_axes(kind: InputBaseline) -> None:
    scalar = InputSpec("s", np.dtype("f4"), (Axis("batch"),), value_range=(0.0, 1.0), mean=(0.5,), std=(0.5,))
    instance = Instance({"s": np.float32(2.0).reshape(())}, {})

    (made,) = BaselineSpec(kind).baselines(Signature((scalar,), ()), instance, 0, 1, {})

    assert made.moving["s"].shape == ()
