"""What goes to the device for a micro-batch, and when its results are there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from explainserve.backends.contract import LoadedModel
from explainserve.plan import Differentiation, Rows, Segment, Selector
from explainserve.signature import ScoreHead

torch = pytest.importorskip("torch")
torch_batch = pytest.importorskip("explainserve.backends.torch_batch")
torch_queue = pytest.importorskip("explainserve.backends.torch_queue")

FUNCTION = Differentiation("y", ScoreHead.IDENTITY, ("x",))
CPU = torch_queue.CpuQueue(torch.device("cpu"))

both_formats = pytest.mark.parametrize("file_format", ["pt", "pt2"])

Load = Callable[[str, str], LoadedModel]


def path(alphas: list[float], seed: int = 0) -> Rows:
    """A segment per alpha from zeros to a random row, which have their ends and their selector in common."""
    start, end = np.zeros(4, np.float32), np.random.default_rng(seed).standard_normal(4).astype(np.float32)
    selector = Selector(np.array([1]), np.ones(1, np.float32))
    segments = (
        Segment({"x": start}, {"x": end}, {}, FUNCTION, np.array([alpha]), np.ones(1), (selector,)) for alpha in alphas
    )
    return Rows(FUNCTION, tuple(segments))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(5, dtype=np.int64)[::-1],
        np.array(2.5),
        np.array([True, False, True]),
        np.empty((0, 3), np.float32),
        np.array([1, 2, 3], np.uint8),
        np.array([0.5], np.float16),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_arrive_as_they_are(array: NDArray[Any]) -> None:
    """Whatever lies before them in the one buffer; what is read-only too."""
    array.setflags(write=False)
    upload = torch_batch.Uploads([np.array([7], np.uint8), array, np.ones(3)], CPU)

    np.testing.assert_array_equal(upload(array).numpy(), array)
    assert upload(array).numpy().dtype == array.dtype


@both_formats
def test_arrays_that_are_one_object_go_up_once(load: Load, monkeypatch: pytest.MonkeyPatch, file_format: str) -> None:
    """As the ends of a path and its selector are, however many segments the path has."""
    byte_counts: list[int] = []
    staging = torch_queue.CpuQueue.staging
    monkeypatch.setattr(
        torch_queue.CpuQueue, "staging", lambda self, count: byte_counts.append(count) or staging(self, count)
    )
    model = load("classifier", file_format)
    byte_counts.clear()
    for alphas in ([0.1, 0.4], [0.1, 0.4, 0.6, 0.9]):
        model.evaluate(path(alphas))

    assert byte_counts[0] == byte_counts[1]


class Behind(torch_queue.CpuQueue):  # type: ignore[misc, name-defined]
    """Like a device that works behind the thread: results are there when they are waited for, not before.

    Attributes:
        sent: what was uploaded, as long as it lives.
    """

    runs_ahead = True

    def __init__(self, device: Any) -> None:
        super().__init__(device)
        self.sent: list[weakref.ref[Any]] = []
        self._fetched: list[tuple[Any, Any]] = []

    def send(self, host: Any) -> Any:
        sent = host.clone()
        self.sent.append(weakref.ref(sent))
        return sent

    def fetch(self, tensor: Any) -> Any:
        host = torch.full_like(tensor, float("nan"))
        self._fetched.append((host, tensor.clone()))
        return host

    def finish(self) -> Callable[[], None]:
        fetched, self._fetched = self._fetched, []

        def finish() -> None:
            for host, tensor in fetched:
                host.copy_(tensor)

        return finish


@pytest.fixture
def behind(load: Load, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A model on such a device, by its format."""

    def loaded(file_format: str) -> Any:
        model: Any = load("classifier", file_format)
        monkeypatch.setattr(model, "_queue", Behind(torch.device("cpu")))
        return model

    return loaded


@both_formats
def test_rows_may_be_submitted_before_others_are_collected(
    load: Load, behind: Callable[[str], Any], file_format: str
) -> None:
    several = [path([0.1, 0.7]), path([0.3], seed=1), path([0.2, 0.5, 0.9], seed=2)]
    expected = [load("classifier", file_format).evaluate(rows) for rows in several]
    model = behind(file_format)

    assert model.runs_ahead
    found = [collect() for collect in [model.submit(rows) for rows in several]]

    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one.scores, other.scores)
            np.testing.assert_array_equal(one.gradient_sums["x"], other.gradient_sums["x"])


@both_formats
def test_what_was_uploaded_lives_until_results_are_collected(behind: Callable[[str], Any], file_format: str) -> None:
    """Its memory belongs to the stream that copies, which would use it again while it is computed with."""
    model = behind(file_format)
    collect = model.submit(path([0.1, 0.7]))
    (sent,) = model._queue.sent

    assert sent() is not None
    collect()
    del collect
    assert sent() is None


@both_formats
def test_the_cpu_does_not_run_ahead(load: Load, file_format: str) -> None:
    assert not load("classifier", file_format).runs_ahead
