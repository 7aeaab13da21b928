"""Rows that are divided among threads give what they give at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from explainserve.backends import onnx_runtime
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.backends.row_division import Team, divided
from explainserve.errors import EvaluationFailed
from explainserve.model_config import ModelConfig
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import ScoreHead
from onnx_graphs import model, node, save

THREADS = 3
SELECTORS = tuple(Selector(np.array([index]), np.ones(1, np.float32)) for index in (0, 2))
GRADIENT = Differentiation("y", ScoreHead.SOFTMAX, ("x",))
FORWARD = Differentiation("y", ScoreHead.SOFTMAX)


def micro_batch(function: Differentiation, selectors: Sequence[Selector], *counts: int) -> Rows:
    """A segment of so many rows each."""
    random = np.random.default_rng(3)
    return Rows(function, tuple(_segment(random, function, tuple(selectors), count) for count in counts))


def _segment(
    random: np.random.Generator, function: Differentiation, selectors: tuple[Selector, ...], count: int
) -> Segment:
    start, end = random.standard_normal((2, 3)).astype(np.float32)
    return Segment({"x": start}, {"x": end}, {}, function, random.random(count), random.random(count), selectors)


@pytest.fixture
def loaded(tmp_path: Path) -> OnnxModel:
    """Not divided so far."""
    random = np.random.default_rng(0)
    weights = {"W": random.standard_normal((3, 3)).astype(np.float32)}
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "W"], ["y"])]
    path = save(model(nodes, [("x", ["batch", 3])], [("y", ["batch", 3])], weights), tmp_path)
    found = onnx_runtime.load(path, ModelConfig(), LoadOptions(thread_count=1))
    found._options = replace(found._options, thread_count=THREADS)
    return found


class Stopwatch:
    """Says how long a model takes at once, and divided."""

    def __init__(self, at_once: Sequence[float], divided: Sequence[float]) -> None:
        self.times = {"": iter(at_once), "divided_rows": iter(divided)}

    def __call__(self, timed: LoadedModel, rows: Rows) -> float:
        return next(self.times[timed.execution])


@pytest.mark.parametrize("counts", [(7,), (1, 1, 1), (2, 5, 1), (1,) * 8])
def test_parts_are_even_and_hold_all_rows_in_order(counts: tuple[int, ...]) -> None:
    rows = micro_batch(GRADIENT, SELECTORS, *counts)
    parts = divided(rows, THREADS)
    sizes = [part.rows.row_count for part in parts]
    pieces = [segment for part in parts for segment in part.rows.segments]

    assert sum(sizes) == sum(counts)
    assert max(sizes) - min(sizes) <= 1
    for field in ("alphas", "weights"):
        whole = [getattr(segment, field) for segment in rows.segments]
        np.testing.assert_array_equal(
            np.concatenate([getattr(piece, field) for piece in pieces]), np.concatenate(whole)
        )


@pytest.mark.parametrize(
    ("function", "selectors"),
    [(GRADIENT, SELECTORS[:1]), (GRADIENT, SELECTORS), (FORWARD, SELECTORS), (FORWARD, ())],
    ids=["gradient", "two targets", "scores", "score tensors"],
)
@pytest.mark.parametrize("counts", [(7,), (2, 5, 1), (1,) * 8])
def test_divided_rows_give_what_they_give_at_once(
    loaded: OnnxModel, function: Differentiation, selectors: Sequence[Selector], counts: tuple[int, ...]
) -> None:
    rows = micro_batch(function, selectors, *counts)
    expected = loaded.evaluate(rows)
    loaded.choose_division(Stopwatch([2.0], [1.0]))
    found = loaded.evaluate(rows)

    assert loaded.execution == "divided_rows"
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5)
        assert one.gradient_sums.keys() == other.gradient_sums.keys()
        for name, total in other.gradient_sums.items():
            np.testing.assert_allclose(one.gradient_sums[name], total, rtol=1e-4, atol=1e-6)
        if other.outputs is not None:
            assert one.outputs is not None
            np.testing.assert_allclose(one.outputs, other.outputs, rtol=1e-5)


@pytest.mark.parametrize(
    ("at_once", "parted", "least"),
    [([2.0], [1.0], 2 * THREADS), ([1.0, 2.0], [1.0, 1.0], 4 * THREADS), ([1.0] * 4, [0.99] * 4, None)],
)
def test_rows_are_divided_from_the_first_number_on_that_is_faster(
    loaded: OnnxModel, at_once: list[float], parted: list[float], least: int | None
) -> None:
    loaded.choose_division(Stopwatch(at_once, parted))

    assert (loaded._team and loaded._team.least_rows) == least
    assert loaded.execution == ("" if least is None else "divided_rows")


def test_large_weights_are_not_packed_twice(loaded: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "LARGEST_TWICE_PACKED", 8)
    loaded.choose_division(Stopwatch([2.0], [1.0]))

    assert loaded.execution == ""


def test_a_failure_is_raised_when_no_thread_is_at_work_any_more() -> None:
    rows = micro_batch(GRADIENT, SELECTORS, 6)
    failed, finished = threading.Event(), threading.Event()

    def evaluate(part: Rows) -> list[SegmentEvaluation]:
        if part.segments[0].alphas[0] == rows.segments[0].alphas[0]:
            failed.set()
            raise EvaluationFailed("MODEL_RAISED", "the first part")
        failed.wait(10)
        finished.set()
        return []

    with pytest.raises(EvaluationFailed, match="the first part"):
        Team(2, 2).evaluations(rows, evaluate)
    assert finished.is_set()
