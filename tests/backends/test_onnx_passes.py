"""Targets that share rows share the forward pass of an ONNX model too, and get what each alone would get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from explainserve.backends import onnx_functions, onnx_runtime
from explainserve.backends.contract import LoadOptions
from explainserve.backends.onnx_passes import SplitPasses
from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.model_config import ModelConfig
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import ScoreHead
from onnx_graphs import linear, model, node, save

WEIGHTS = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
SELECTORS = tuple(Selector(np.array([index]), np.array([weight], np.float32)) for index, weight in [(0, 1), (3, -2)])

Load = Callable[[onnx.ModelProto], OnnxModel]


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    return lambda proto: onnx_runtime.load(save(proto, tmp_path), ModelConfig(), LoadOptions(thread_count=1))


def classifier(batch: int | str = "batch") -> onnx.ModelProto:
    """y = softmax(tanh(x W) W'), with W' the transpose of W and a product behind it."""
    nodes = [
        node("MatMul", ["x", "W"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("MatMul", ["t", "V"], ["z"]),
        node("Softmax", ["z"], ["y"], axis=1),
    ]
    weights = {"W": WEIGHTS, "V": WEIGHTS.T @ WEIGHTS}
    return model(nodes, [("x", [batch, 3])], [("y", [batch, 4])], weights)


def segment(alphas: list[float], *selectors: Selector, size: int = 3, seed: int = 1) -> Segment:
    start, end = np.random.default_rng(seed).standard_normal((2, size)).astype(np.float32)
    function = Differentiation("y", ScoreHead.IDENTITY, ("x",))
    return Segment({"x": start}, {"x": end}, {}, function, np.array(alphas), np.ones(len(alphas)), selectors)


def evaluate(found: OnnxModel, *segments: Segment) -> tuple[SegmentEvaluation, ...]:
    return found.evaluate(Rows(segments[0].function, segments))


def assert_as_alone(found: OnnxModel, *segments: Segment) -> None:
    together = evaluate(found, *segments)
    alone = [replace(part, selectors=(selector,)) for part in segments for selector in part.selectors]
    for own, part in zip(together, alone, strict=True):
        (expected,) = evaluate(found, part)
        np.testing.assert_allclose(own.scores, expected.scores, rtol=1e-5)
        np.testing.assert_allclose(own.gradient_sums["x"], expected.gradient_sums["x"], rtol=1e-5, atol=1e-7)


def test_one_forward_pass_serves_all_targets(loaded: Load) -> None:
    """y = x noise: whoever goes forward again meets other noise."""
    nodes = [node("RandomNormalLike", ["x"], ["noise"]), node("Mul", ["x", "noise"], ["y"])]
    found = loaded(model(nodes, [("x", ["batch", 3])], [("y", ["batch", 3])]))
    once, twice = (Selector(np.array([1]), np.array([weight], np.float32)) for weight in (1, 2))
    part = segment([1.0], once, twice)
    first, second = evaluate(found, part)

    np.testing.assert_allclose(second.scores, 2 * first.scores, rtol=1e-6)
    np.testing.assert_allclose(second.gradient_sums["x"], 2 * first.gradient_sums["x"], rtol=1e-6)
    np.testing.assert_allclose(first.gradient_sums["x"][1] * part.end["x"][1], first.scores[0], rtol=1e-5)


@pytest.mark.parametrize("batch", ["batch", 1])
def test_each_gets_what_it_would_get_alone(loaded: Load, batch: int | str) -> None:
    assert_as_alone(
        loaded(classifier(batch)), segment([0.1, 0.7], *SELECTORS), segment([0.4], *SELECTORS[::-1], seed=2)
    )


def test_rows_that_run_one_by_one(loaded: Load) -> None:
    """The sum over the batch keeps the batch from being freed."""
    nodes = [
        node("Concat", ["token", "x"], ["both"], axis=0),
        node("ReduceSum", ["both", "first"], ["sum"], keepdims=1),
        node("MatMul", ["sum", "W"], ["h"]),
        node("Mul", ["h", "h"], ["y"]),
    ]
    weights = {"token": np.full((1, 3), 0.5, np.float32), "first": np.array([0]), "W": WEIGHTS}
    found = loaded(model(nodes, [("x", [1, 3])], [("y", [1, 4])], weights))

    assert found.fixed_batch
    assert_as_alone(found, segment([0.1, 0.7, 1.0], *SELECTORS), segment([0.4], *SELECTORS, seed=2))


def test_a_model_without_any_batch_axis(loaded: Load) -> None:
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("Exp", ["h"], ["y"])]
    found = loaded(model(nodes, [("x", [3])], [("y", [4])], {"W": WEIGHTS}))

    assert_as_alone(found, segment([0.1, 0.7], *SELECTORS))


def test_a_linear_model_has_nothing_to_hand_over(loaded: Load) -> None:
    assert_as_alone(loaded(linear(WEIGHTS)), segment([0.1, 0.7], *SELECTORS))


def test_gradients_that_cannot_be_parted_go_forward_for_each_target(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Any:
        raise ValueError("no way")

    monkeypatch.setattr(onnx_functions, "split", fail)

    assert_as_alone(loaded(classifier()), segment([0.1, 0.7], *SELECTORS))
    assert caplog.text.count("no way") == 1


def test_what_is_handed_over_holds_no_subnormal_numbers(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would make each backward pass ten times as slow; see `onnx_subnormal`."""
    mask = np.where(np.eye(4), 0, -100).astype(np.float32)
    nodes = [
        node("MatMul", ["x", "W"], ["h"]),
        node("Unsqueeze", ["h", "last"], ["column"]),
        node("Mul", ["column", "column"], ["square"]),
        node("Add", ["square", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["p"], axis=-1),
        node("MatMul", ["p", "column"], ["mixed"]),
        node("Squeeze", ["mixed", "last"], ["y"]),
    ]
    weights = {"W": WEIGHTS, "mask": mask, "last": np.array([2])}
    found = loaded(model(nodes, [("x", ["batch", 3])], [("y", ["batch", 4])], weights))
    handed: list[np.ndarray] = []
    run = SplitPasses._run

    def record(*arguments: Any) -> Any:
        results = run(*arguments)
        handed.extend(value.numpy() for value in results.values())
        return results

    monkeypatch.setattr(SplitPasses, "_run", record)
    assert_as_alone(found, segment([0.1, 0.7], *SELECTORS))

    numbers = np.concatenate([np.abs(array).ravel() for array in handed if array.dtype == np.float32])
    assert len(numbers) > 32
    assert not ((numbers > 0) & (numbers < np.finfo(np.float32).smallest_normal)).any()


def test_what_the_model_raises_is_an_error_of_ours(loaded: Load) -> None:
    part = segment([0.5], *SELECTORS, size=9)
    with pytest.raises(onnx_runtime.EvaluationFailed) as failed:
        evaluate(loaded(classifier()), part)
    assert failed.value.reason == "MODEL_RAISED"
