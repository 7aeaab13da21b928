"""What is found out about a model by evaluating it: whether its rows see each other, and what cannot be told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from explainserve.backends import LoadOptions, onnx_runtime, probe
from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.backends.probe import LIKELIEST, free_extents, sample_instances
from explainserve.model_config import InputConfig, ModelConfig
from explainserve.signature import Axis, InputSpec, Signature
from onnx_graphs import linear, model, node, quantized_twice, save

FLOAT = np.dtype(np.float32)


def load(tmp_path: Path, proto: onnx.ModelProto, *inputs: InputConfig) -> OnnxModel:
    return onnx_runtime.load(save(proto, tmp_path), ModelConfig(inputs=inputs), LoadOptions(thread_count=1))


def of_extent(extent: int, *, mixes: bool) -> onnx.ModelProto:
    """y = (x - c) W with a free axis that only `extent` fits; c is half the batch's mean where rows mix, else 0."""
    nodes = [
        node("ReduceMean", ["x", "first"], ["mean"], keepdims=1),
        node("Mul", ["mean", "share"], ["c"]),
        node("Sub", ["x", "c"], ["z"]),
        node("MatMul", ["z", "W"], ["y"]),
    ]
    weights = {
        "first": np.array([0]),
        "share": np.array([0.5 if mixes else 0.0], np.float32),
        "W": np.random.default_rng(0).standard_normal((extent, 2)).astype(np.float32),
    }
    return model(nodes, [("x", ["batch", "n"])], [("y", ["batch", 2])], weights)


@pytest.mark.parametrize("extent", [5, 8, 10, 16, 64, 128, 224])
@pytest.mark.parametrize("mixes", [False, True])
def test_usual_extents_of_free_axes_are_tried(tmp_path: Path, extent: int, mixes: bool) -> None:
    result = probe.check(load(tmp_path, of_extent(extent, mixes=mixes)))

    assert result.rows_independent is not mixes
    assert (result.noise_floor is None) is mixes
    assert bool(result.warnings) is mixes


def test_what_runs_at_no_guess_is_evaluated_row_by_row_and_says_that_it_was_not_checked(tmp_path: Path) -> None:
    loaded = load(tmp_path, of_extent(7, mixes=True))
    result = probe.check(loaded)

    assert not result.rows_independent
    assert result.noise_floor is None
    (warning,) = result.warnings
    assert "could not be checked" in warning and "alone" in warning


def test_stating_the_extents_has_the_rows_checked(tmp_path: Path) -> None:
    stated = InputConfig(name="x", shape=("batch", 7))
    result = probe.check(load(tmp_path, of_extent(7, mixes=False), stated))

    assert result.rows_independent
    assert not result.warnings


def mixing_by_id() -> onnx.ModelProto:
    """y = x + ids times the mean of x over the batch: at ids of zero no row sees another."""
    nodes = [
        node("Cast", ["ids"], ["scale"], to=TensorProto.FLOAT),
        node("ReduceMean", ["x", "first"], ["mean"], keepdims=1),
        node("Mul", ["scale", "mean"], ["seen"]),
        node("Add", ["x", "seen"], ["y"]),
    ]
    inputs = [("x", ["batch", 3]), ("ids", ["batch", 3], TensorProto.INT64)]
    return model(nodes, inputs, [("y", ["batch", 3])], {"first": np.array([0])})


def scaled_by_id() -> onnx.ModelProto:
    """y = ids x: at ids of zero it has no gradient."""
    nodes = [node("Cast", ["ids"], ["scale"], to=TensorProto.FLOAT), node("Mul", ["x", "scale"], ["y"])]
    return model(nodes, [("x", ["batch", 3]), ("ids", ["batch", 3], TensorProto.INT64)], [("y", ["batch", 3])])


def test_integers_are_drawn_from_their_stated_range(tmp_path: Path) -> None:
    ids = InputConfig(name="ids", value_range=(1, 8))

    assert not probe.check(load(tmp_path, mixing_by_id(), ids)).rows_independent
    assert not probe.check(load(tmp_path, scaled_by_id(), ids)).warnings


def test_a_gradient_that_vanishes_at_integers_of_zero_is_not_said_to_vanish_everywhere(tmp_path: Path) -> None:
    (warning,) = probe.check(load(tmp_path, scaled_by_id())).warnings

    assert "ids is zero" in warning and "value_range" in warning
    assert "attribute nothing" not in warning


@pytest.mark.parametrize(
    ("dtype", "value_range", "expected"),
    [
        ("int64", (1, 8), set(range(1, 9))),
        ("int8", (-3.5, 2.5), {-3, -2, -1, 0, 1, 2}),
        ("uint8", (-5, 1), {0, 1}),
        ("uint64", (2**63, 2**63), {2**63}),
        ("bool", (0, 1), {False, True}),
        ("int64", None, {0}),
        ("bool", None, {False}),
    ],
)
def test_samples_of_integers(dtype: str, value_range: tuple[float, float] | None, expected: set[int]) -> None:
    spec = InputSpec("ids", np.dtype(dtype), (Axis("batch"), Axis("", 200)), value_range=value_range)
    (instance,) = sample_instances(Signature((spec,), ()), 1)

    assert instance["ids"].dtype == np.dtype(dtype)
    assert set(instance["ids"].tolist()) == expected


@pytest.mark.parametrize(("layout", "shape"), [("NCHW", (3, 64, 64)), ("NHWC", (64, 64, 3)), ("", (500,)), ("", ())])
def test_samples_of_a_stated_range_are_preprocessed(layout: str, shape: tuple[int, ...]) -> None:
    mean, std = ((0.2, 0.4, 0.6), (0.1, 0.2, 0.4)) if layout else ((0.5,), (0.25,))
    axes = (Axis("batch"), *(Axis("", extent) for extent in shape))
    spec = InputSpec("x", FLOAT, axes, layout=layout, value_range=(0.0, 1.0), mean=mean, std=std)
    (instance,) = sample_instances(Signature((spec,), ()), 1)
    values = np.moveaxis(instance["x"], spec.channel_axis, -1) if layout else instance["x"]
    drawn = values * np.array(std) + np.array(mean) if layout else values * std[0] + mean[0]

    assert instance["x"].shape == shape
    assert drawn.min() >= -1e-6 and drawn.max() <= 1 + 1e-6
    if layout:
        np.testing.assert_allclose(drawn.reshape(-1, 3).mean(0), 0.5, atol=0.03)


def test_nothing_is_guessed_where_no_axis_is_free_and_nothing_huge_where_many_are() -> None:
    def signature(*sizes: int | None) -> Signature:
        axes = (Axis("batch"), *(Axis("", size) for size in sizes))
        return Signature((InputSpec("x", FLOAT, axes),), ())

    assert free_extents(signature(3, 224, 224)) == (LIKELIEST,)
    for sizes in ((None, None, None, None), (None, 10**6)):
        own = signature(*sizes)
        guesses = free_extents(own)
        assert guesses[0] == LIKELIEST
        assert all(sample_instances(own, 1, guess)[0]["x"].size <= 1 << 22 for guess in guesses[1:])


def lying(shape: list[int | str], declared: list[int | str]) -> onnx.ModelProto:
    """y, which has the shape of x and is declared to have another; onnxruntime only warns."""
    nodes = [node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["z"]), node("Add", ["x", "z"], ["h"])]
    return model([*nodes, node("Reshape", ["h", "s"], ["y"])], [("x", shape)], [("y", declared)])


@pytest.mark.parametrize("extent", [5, 2**36, 2**62])
def test_outputs_that_are_not_what_the_file_declares_have_no_gradient(tmp_path: Path, extent: int) -> None:
    for name, declared in (("rank", ["batch", extent]), ("extent", ["batch", 2, extent])):
        loaded = load(tmp_path / name, lying(["batch", 2, 2], declared))

        (gap,) = loaded.gaps
        assert gap.node == "y" and str(extent) in gap.reason
        assert probe.check(loaded).noise_floor is None


def test_outputs_of_other_extents_at_guesses_for_the_inputs_are_no_gap(tmp_path: Path) -> None:
    assert load(tmp_path, lying(["batch", "n"], ["batch", 7])).gaps == ()


def test_noise_is_absent_where_it_was_not_measured(tmp_path: Path) -> None:
    weights = np.ones((3, 2), np.float32)
    fixed = model(
        [node("Concat", ["x", "x"], ["two"], axis=0), node("ReduceMean", ["two", "first"], ["y"], keepdims=1)],
        [("x", [1, 3])],
        [("y", [1, 3])],
        {"first": np.array([0])},
    )
    loaded = load(tmp_path, fixed)

    assert loaded.fixed_batch
    assert probe.check(loaded).noise_floor is None
    assert probe.check(load(tmp_path, quantized_twice())).noise_floor is None
    assert probe.check(load(tmp_path, linear(weights))).noise_floor is not None
