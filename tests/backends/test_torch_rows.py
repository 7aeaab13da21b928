"""What goes to the device for a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from explainserve.backends.contract import LoadedModel
from explainserve.plan import Differentiation, Rows, Segment, Selector
from explainserve.signature import ScoreHead

torch = pytest.importorskip("torch")
torch_rows = pytest.importorskip("explainserve.backends.torch_rows")

FUNCTION = Differentiation("y", ScoreHead.IDENTITY, ("x",))


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[Any]]:
    """The arrays that were copied to the device."""
    copied: list[NDArray[Any]] = []
    copy = torch_rows._Uploads._copy

    def recorded(self: Any, array: NDArray[Any]) -> Any:
        copied.append(array)
        return copy(self, array)

    monkeypatch.setattr(torch_rows._Uploads, "_copy", recorded)
    return copied


@pytest.mark.parametrize("file_format", ["pt", "pt2"])
def test_arrays_that_are_one_object_go_up_once(
    load: Callable[[str, str], LoadedModel], uploaded: list[NDArray[Any]], file_format: str
) -> None:
    """As the ends of a path and its selector are, however many segments the path has."""
    start, end = np.zeros(4, np.float32), np.ones(4, np.float32)
    selector = Selector(np.array([1]), np.ones(1, np.float32))
    segments = [
        Segment({"x": start}, {"x": end}, {}, FUNCTION, np.array([alpha]), np.ones(1), (selector,))
        for alpha in (0.1, 0.4, 0.6, 0.9)
    ]
    model = load("classifier", file_format)
    uploaded.clear()
    model.evaluate(Rows(FUNCTION, tuple(segments)))

    assert {id(array) for array in uploaded} == {id(a) for a in (start, end, selector.indices, selector.weights)}
    assert len(uploaded) == 4
