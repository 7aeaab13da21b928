"""Images contiguous or with their channels last: the faster of both, and the same numbers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from explainserve import backends  # noqa: E402
from explainserve.backends import torch_export, torchscript  # noqa: E402
from explainserve.backends.contract import LoadedModel, LoadOptions  # noqa: E402
from explainserve.backends.probe import relative_difference, values  # noqa: E402
from explainserve.backends.timing import random_row, repeated  # noqa: E402
from explainserve.backends.torch_layout import in_faster_layout  # noqa: E402
from explainserve.model_config import read_model_config  # noqa: E402
from explainserve.plan import Rows  # noqa: E402

SHAPE = (3, 8, 8)
MODEL_TOML = """
inputs = [{ name = "x", shape = ["batch", 3, 8, 8] }]
outputs = [{ name = "y", shape = ["batch", 2] }]
"""

Seconds = Callable[[LoadedModel, Rows], float]


class Convolutional(nn.Module):
    """A convolution, and how its maps become a vector."""

    def __init__(self, flatten: Callable[[Any], Any] = lambda maps: maps.flatten(1)) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.Linear(144, 2)
        self.flatten = flatten

    def forward(self, x: Any) -> Any:
        return self.last(self.flatten(self.second(self.first(x).relu())))


def write(module: Any, suffix: str, folder: Path, *, frozen: bool = False) -> Path:
    torch.manual_seed(0)
    path = folder / f"model.{suffix}"
    example = (torch.randn(2, *SHAPE),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        if suffix == "pt":
            script = torch.jit.trace(module.eval(), example)
            (torch.jit.freeze(script) if frozen else script).save(str(path))
        else:
            batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
            torch.export.save(torch.export.export(module.eval(), example, dynamic_shapes=batch), path)
    (folder / "model.toml").write_text(MODEL_TOML)
    return path


def load(path: Path) -> LoadedModel:
    return backends.load(path, read_model_config(path.parent / "model.toml"), LoadOptions())


def gradient(model: LoadedModel) -> np.ndarray[Any, Any]:
    return values(model.evaluate(repeated(random_row(model), 3)))[0]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Has the two layouts take so many seconds, by name."""

    def state(seconds: dict[str, float]) -> None:
        choose = functools.partial(in_faster_layout, seconds=lambda model, rows: seconds[model.execution])  # type: ignore[attr-defined]
        for module in (torch_export, torchscript):
            monkeypatch.setattr(module, "in_faster_layout", choose)

    return state


@pytest.mark.parametrize("suffix", ["pt2", "pt"])
@pytest.mark.parametrize(("contiguous", "channels_last", "chosen"), [(1, 2, "contiguous"), (2, 1, "channels_last")])
def test_the_faster_layout_is_kept(
    tmp_path: Path, timed: Any, suffix: str, contiguous: float, channels_last: float, chosen: str
) -> None:
    timed({"contiguous": contiguous, "channels_last": channels_last})

    assert load(write(Convolutional(), suffix, tmp_path)).execution == chosen


@pytest.mark.parametrize("suffix", ["pt2", "pt"])
def test_both_layouts_give_the_same_gradients(tmp_path: Path, timed: Any, suffix: str) -> None:
    path = write(Convolutional(), suffix, tmp_path)
    found = []
    for fast, slow in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        timed({fast: 1.0, slow: 2.0})
        model = load(path)
        assert model.execution == fast
        found.append(gradient(model))

    assert relative_difference(*found) < 1e-5


@pytest.mark.parametrize("suffix", ["pt2", "pt"])
def test_points_and_weights_lie_with_their_channels_last(
    tmp_path: Path, timed: Any, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    timed({"contiguous": 2.0, "channels_last": 1.0})
    model = load(write(Convolutional(), suffix, tmp_path))
    seen = []
    forward = model._forward  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "_forward", lambda inputs: seen.extend(inputs) or forward(inputs))
    gradient(model)

    assert all(points.is_contiguous(memory_format=torch.channels_last) for points in seen)
    assert not any(points.is_contiguous() for points in seen)


def test_images_of_a_file_that_was_frozen_are_laid_out_too(tmp_path: Path, timed: Any) -> None:
    path = write(Convolutional(), "pt", tmp_path, frozen=True)
    timed({"contiguous": 1.0, "channels_last": 2.0})
    contiguous = load(path)
    timed({"contiguous": 2.0, "channels_last": 1.0})
    channels_last = load(path)

    assert channels_last.execution == "channels_last"
    assert relative_difference(gradient(contiguous), gradient(channels_last)) < 1e-5


@pytest.mark.parametrize(
    "flatten",
    [
        pytest.param(lambda maps: maps.as_strided((len(maps), 144), (144, 1)), id="reads memory in its own order"),
        pytest.param(lambda maps: maps.view(len(maps), 144), id="allows no other view"),
    ],
)
def test_a_graph_that_depends_on_the_layout_stays_contiguous(tmp_path: Path, timed: Any, flatten: Any) -> None:
    timed({"contiguous": 2.0, "channels_last": 1.0})

    assert load(write(Convolutional(flatten), "pt", tmp_path)).execution == "contiguous"


def test_a_model_without_convolutions_is_not_timed(tmp_path: Path, timed: Any) -> None:
    timed({})
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))

    assert load(write(module, "pt2", tmp_path)).execution == "contiguous"
