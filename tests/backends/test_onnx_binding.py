"""Rows that go in and out through buffers of a device, here emulated by the CPU: all but the provider is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from explainserve.backends import onnx_batch, onnx_binding, onnx_functions, onnx_passes, onnx_runtime, onnx_session
from explainserve.backends.contract import LoadOptions
from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.backends.onnx_session import Interruption
from explainserve.backends.row_feeds import fixed_size
from explainserve.errors import EvaluationFailed, ModelRefused
from explainserve.model_config import ModelConfig
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import ScoreHead
from onnx_graphs import model, node, save

RANDOM = np.random.default_rng(0)
FUNCTION = Differentiation("y", ScoreHead.SOFTMAX, ("x",))


def network() -> onnx.ModelProto:
    """A convolution, and a product behind it."""
    nodes = [
        node("Conv", ["x", "kernels"], ["a"], kernel_shape=[3, 3]),
        node("Relu", ["a"], ["b"]),
        node("Reshape", ["b", "flat"], ["c"]),
        node("MatMul", ["c", "W"], ["y"]),
    ]
    weights = {
        "kernels": RANDOM.standard_normal((8, 2, 3, 3)).astype(np.float32),
        "flat": np.array([0, -1]),
        "W": RANDOM.standard_normal((128, 5)).astype(np.float32),
    }
    return model(nodes, [("x", ["batch", 2, 6, 6])], [("y", ["batch", 5])], weights)


NETWORK = network()


class Emulated:
    """What the sessions of an emulated device do.

    Attributes:
        recordable: whether sessions open that are to be recorded.
        broken: whether runs that are recorded raise.
        bindings: how often buffers were made.
        recordings: the number of each run's recording, None of others.
    """

    def __init__(self) -> None:
        self.recordable = True
        self.broken = False
        self.bindings = 0
        self.recordings: list[int | None] = []


class _Session:
    """A session of the CPU provider that tells what it is asked for."""

    def __init__(self, session: Any, emulated: Emulated) -> None:
        self._session, self._emulated = session, emulated

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def io_binding(self) -> Any:
        self._emulated.bindings += 1
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self._emulated.broken and self._emulated.recordings[-1] is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self._session.run_with_iobinding(binding, options)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """A device "cuda:0" in the memory of the CPU."""
    found, opened = Emulated(), onnx_session.open_session

    def open_session(graph: onnx.ModelProto, options: LoadOptions, weights: Any = None) -> Any:
        if options.captures and not found.recordable:
            raise ModelRefused("MODEL_NOT_RUNNABLE", "some nodes are on the host")
        return _Session(opened(graph, LoadOptions(), weights), found)

    begun = Interruption.begin_recorded

    def begin_recorded(interruption: Interruption, number: int | None) -> Any:
        found.recordings.append(number)
        return begun(interruption, number)

    monkeypatch.setattr(Interruption, "begin_recorded", begin_recorded)
    for module in (onnx_functions, onnx_batch):
        monkeypatch.setattr(module, "open_session", open_session)
    for module in (onnx_functions, onnx_passes):
        monkeypatch.setattr(module, "memory_of", lambda device: ("cpu", 0))
    monkeypatch.setattr(onnx_runtime, "available_device", lambda options: options.device)
    return found


Load = Callable[..., OnnxModel]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(device: str, precision: str = "float32") -> OnnxModel:
        outputs = [{"name": "y", "kind": "logits"}]
        config = ModelConfig.model_validate({"precision": precision, "outputs": outputs})
        return onnx_runtime.load(save(NETWORK, tmp_path), config, LoadOptions(device))

    return loaded


def rows(*counts: int, seed: int = 0, targets: int = 1, function: Differentiation = FUNCTION) -> Rows:
    """A segment for each count of rows, with selectors of one to three entries."""
    random = np.random.default_rng(seed)
    segments = []
    for count in counts:
        start, end = random.standard_normal((2, 2, 6, 6)).astype(np.float32)
        entries = [random.choice(5, size=random.integers(1, 4), replace=False) for _ in range(targets)]
        selectors = tuple(Selector(each, random.standard_normal(len(each)).astype(np.float32)) for each in entries)
        alphas, weights = random.random(count), random.random(count)
        segments.append(Segment({"x": start}, {"x": end}, {}, function, alphas, weights, selectors))
    return Rows(function, tuple(segments))


def assert_equal(found: tuple[SegmentEvaluation, ...], expected: tuple[SegmentEvaluation, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-6)
        for name, gradient in other.gradient_sums.items():
            np.testing.assert_allclose(one.gradient_sums[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", range(1, 200))
def test_sizes_are_few_and_waste_at_most_a_third(count: int) -> None:
    size = fixed_size(count)

    assert count <= size <= 1.5 * count
    assert fixed_size(size) == size
    assert bin(size).count("1") <= 2


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("counts", [(1,), (3,), (5,), (2, 3), (1, 1, 1, 1, 1), (7, 4, 9)])
def test_rows_give_what_they_give_on_the_cpu(
    emulated: Emulated, load: Load, counts: tuple[int, ...], targets: int
) -> None:
    bound, plain = load("cuda:0"), load("cpu")
    for seed in range(4):
        asked = rows(*counts, seed=seed, targets=targets)
        assert_equal(bound.evaluate(asked), plain.evaluate(asked))


def test_forward_rows_give_what_they_give_on_the_cpu(emulated: Emulated, load: Load) -> None:
    function = Differentiation("y", ScoreHead.IDENTITY)
    bound, plain = load("cuda:0"), load("cpu")
    for counts in ((5,), (5, 2), (5,)):
        asked = rows(*counts, function=function)
        assert_equal(bound.evaluate(asked), plain.evaluate(asked))


def test_float16_runs_on_the_same_path(emulated: Emulated, load: Load) -> None:
    asked = rows(3, 4)
    found, exact = load("cuda:0", "float16").evaluate(asked), load("cpu").evaluate(asked)

    for one, other in zip(found, exact, strict=True):
        gradient, expected = one.gradient_sums["x"], other.gradient_sums["x"]
        assert 0 < np.linalg.norm(gradient - expected) < 2e-2 * np.linalg.norm(expected)


def test_a_result_is_not_changed_by_the_next(emulated: Emulated, load: Load) -> None:
    bound = load("cuda:0")
    first = bound.evaluate(rows(4))[0].gradient_sums["x"]
    kept = first.copy()
    bound.evaluate(rows(4, seed=1))

    np.testing.assert_array_equal(first, kept)


def test_buffers_serve_all_micro_batches_of_a_size(emulated: Emulated, load: Load) -> None:
    bound = load("cuda:0")
    bound.evaluate(rows(5))
    before = emulated.bindings
    for seed in range(5):
        bound.evaluate(rows(5 + seed % 2, seed=seed))

    assert emulated.bindings <= before + 2  # one of the selectors has one entry, two or three


def test_each_size_is_recorded_under_its_own_number(emulated: Emulated, load: Load) -> None:
    bound = load("cuda:0")
    function = Differentiation("y", ScoreHead.IDENTITY)
    bound.evaluate(rows(1, function=function))
    emulated.recordings.clear()
    for count in (4, 4, 4, 8, 8, 4):
        bound.evaluate(rows(count, function=function))
    first, again, replayed, other, recorded, earlier = emulated.recordings

    assert first is None and other is None
    assert again == replayed == earlier
    assert recorded not in (None, again)
    assert bound.execution == "cuda_graphs"


def test_what_cannot_be_recorded_runs_unrecorded_and_says_so(
    emulated: Emulated, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    emulated.recordable = False
    bound, plain = load("cuda:0"), load("cpu")
    assert_equal(bound.evaluate(rows(3)), plain.evaluate(rows(3)))

    assert bound.execution == "no_cuda_graphs"
    assert "some nodes are on the host" in caplog.text
    assert set(emulated.recordings) == {None}


def test_a_recording_that_fails_is_given_up_and_the_rows_are_answered(emulated: Emulated, load: Load) -> None:
    bound, plain = load("cuda:0"), load("cpu")
    emulated.broken = True
    for seed in range(3):
        asked = rows(4, seed=seed)
        assert_equal(bound.evaluate(asked), plain.evaluate(asked))

    assert bound.execution == "no_cuda_graphs"


def test_an_evaluation_that_was_ended_does_not_give_recording_up(emulated: Emulated, load: Load) -> None:
    bound = load("cuda:0")
    for _ in range(2):
        bound.evaluate(rows(4))
    emulated.broken = True
    begun = bound._functions.interruption.begin
    bound._functions.interruption.begin = lambda: (begun(), bound.interrupt())  # type: ignore[method-assign, assignment]

    with pytest.raises(EvaluationFailed):
        bound.evaluate(rows(4))
    assert bound.execution == "cuda_graphs"


def test_further_sizes_have_buffers_for_once(emulated: Emulated, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_binding, "MAX_SIZES", 0)
    bound, plain = load("cuda:0"), load("cpu")
    for _ in range(3):
        assert_equal(bound.evaluate(rows(4)), plain.evaluate(rows(4)))

    assert set(emulated.recordings) == {None}


def test_a_gradient_that_a_recording_gets_wrong_is_refused(
    emulated: Emulated, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reads what it was recorded with, whatever is written to its buffers."""
    write = onnx_binding._Bound._write
    monkeypatch.setattr(
        onnx_binding._Bound, "_write", lambda own, feeds: None if own.is_recorded else write(own, feeds)
    )

    assert load("cuda:0").gradient_mode == "black_box"


def test_whoever_ends_an_evaluation_ends_the_runs_that_come() -> None:
    interruption = Interruption()
    assert not interruption.begin_recorded(1).terminate
    interruption.interrupt()
    assert interruption.begin_recorded(2).terminate
    interruption.begin()
    assert not interruption.begin_recorded(None).terminate


@pytest.mark.gpu
@pytest.mark.parametrize("targets", [1, 3])
def test_rows_on_cuda_give_what_they_give_on_the_cpu(load: Load, targets: int) -> None:
    on_device, plain = load("cuda"), load("cpu")
    for counts in ((3,), (3,), (3,), (7, 4), (7, 4), (7, 4), (1, 1), (3,)):
        asked = rows(*counts, seed=sum(counts), targets=targets)
        assert_equal(on_device.evaluate(asked), plain.evaluate(asked))

    assert on_device.execution == "cuda_graphs"


@pytest.mark.gpu
def test_float16_on_cuda_is_near_float32(load: Load) -> None:
    asked = rows(3, 4)
    found, exact = load("cuda", "float16").evaluate(asked), load("cpu").evaluate(asked)

    for one, other in zip(found, exact, strict=True):
        gradient, expected = one.gradient_sums["x"], other.gradient_sums["x"]
        assert np.linalg.norm(gradient - expected) < 2e-2 * np.linalg.norm(expected)
