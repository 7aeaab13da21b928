"""Compiled `.pt2` models: kept where they are right and faster, and what is said where they are not."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from explainserve import backends  # noqa: E402
from explainserve.backends import torch_export  # noqa: E402
from explainserve.backends.contract import LoadedModel, LoadOptions  # noqa: E402
from explainserve.backends.probe import relative_difference, values  # noqa: E402
from explainserve.backends.timing import is_faster, random_row, repeated  # noqa: E402
from explainserve.backends.torch_compilation import NotCompiled, where_faster  # noqa: E402
from explainserve.backends.torch_inductor import TYPICAL_ROWS, CompiledFunction  # noqa: E402
from explainserve.backends.torch_rows import Forward, TorchModel  # noqa: E402
from explainserve.errors import EvaluationFailed  # noqa: E402
from explainserve.model_config import Compile, ModelConfig  # noqa: E402
from explainserve.plan import Rows, Selector  # noqa: E402

OPTIONS = LoadOptions(thread_count=1, channels_last=False)
ASKED = ModelConfig(compile=Compile.WHEN_FASTER)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed")


class Net(nn.Module):
    """Two inputs of one batch, and operators that inductor fuses and that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv2d(2, 3, 3), nn.Linear(3 * 4 + 2, 3)

    def forward(self, image: Any, facts: Any) -> Any:
        return self.dense(torch.cat([nn.functional.gelu(self.conv(image)).flatten(1), facts], 1)).tanh()


def write(folder: Path, rows: int | None = None, module: Any = None) -> Path:
    """The file of a model of any number of rows, or of one."""
    torch.manual_seed(0)
    example = (torch.randn(rows or 2, 2, 4, 4), torch.randn(rows or 2, 2))
    batch = None if rows else ({0: torch.export.Dim("batch", min=1, max=64)},) * 2
    path = folder / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export((module or Net()).eval(), example, dynamic_shapes=batch), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    loaded = backends.load(write(tmp_path_factory.mktemp("eager")), ModelConfig(), OPTIONS)
    assert isinstance(loaded, TorchModel)
    return loaded


def times(factor: float) -> Callable[[Forward, Any], Forward]:
    """A compiler whose code is off by a factor."""
    return lambda forward, examples: lambda inputs: [factor * output for output in forward(inputs)]


def always(*_: object) -> bool:
    return True


def never(*_: object) -> bool:
    return False


def gradient(model: LoadedModel, count: int = 3) -> np.ndarray[Any, Any]:
    return values(model.evaluate(repeated(random_row(model), count)))[0]


def test_the_faster_form_is_kept_and_its_error_told(model: TorchModel) -> None:
    found = where_faster(model, lambda: model.compiled(times(1.001)), 0.01, always)

    assert found.execution == "contiguous+compiled"
    assert found.compilation is not None
    assert found.compilation.map_error == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("factor", "faster", "reason"),
    [
        pytest.param(1.0, never, "not faster", id="slower"),
        pytest.param(1.02, always, "differ by a relative 0.02", id="off"),
        pytest.param(float("nan"), always, "differ by a relative inf", id="not a number"),
    ],
)
def test_a_form_that_is_slower_or_wrong_is_not(model: TorchModel, factor: float, faster: Any, reason: str) -> None:
    found = where_faster(model, lambda: model.compiled(times(factor)), 0.01, faster)

    assert found.execution == "contiguous"
    assert found.compilation is not None
    assert found.compilation.map_error is None
    assert reason in found.compilation.refusal


@pytest.mark.parametrize(
    "failure",
    [
        NotCompiled("no compiler"),
        RuntimeError("no compiler\nin many words"),
        EvaluationFailed("MODEL_RAISED", "no compiler"),
    ],
)
def test_a_compiler_that_fails_is_no_failure_to_load(model: TorchModel, failure: Exception) -> None:
    def fail() -> TorchModel:
        raise failure

    found = where_faster(model, fail, 0.01, always)

    assert found is model
    assert found.compilation is not None
    assert found.compilation.refusal == "no compiler"


def test_free_axes_are_not_compiled(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.tanh().sum((1, 2))[:, None]

    sizes = {axis: torch.export.Dim(f"size{axis}", min=1, max=64) for axis in range(3)}
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Sum(), (torch.randn(2, 3, 4),), dynamic_shapes=(sizes,)), path)
    found = backends.load(path, ASKED, replace(OPTIONS, compile_seconds=60.0))

    assert found.compilation is not None
    assert "free axes" in found.compilation.refusal


@pytest.mark.parametrize(
    ("config", "seconds"), [(ASKED, 0.0), (ModelConfig(), 60.0)], ids=["by the server", "by the model"]
)
def test_nothing_is_compiled_that_was_not_asked_for(tmp_path: Path, config: ModelConfig, seconds: float) -> None:
    found = backends.load(write(tmp_path), config, replace(OPTIONS, compile_seconds=seconds))

    assert found.execution == "contiguous"
    assert found.compilation is None


def test_code_gets_only_what_it_was_made_for() -> None:
    def told(name: str) -> Any:
        return lambda *inputs: [name]

    def function(example: Any, *, any_rows: bool) -> Any:
        return CompiledFunction(told("graph"), told("code"), lambda rows: rows < 8, [example], any_rows=any_rows)

    example = torch.zeros(2, 3, 4, 4)
    wider, last = torch.zeros(5, 3, 4, 4), example.contiguous(memory_format=torch.channels_last)
    any_rows, two_rows = function(example, any_rows=True), function(example, any_rows=False)

    assert [any_rows([each])[0] for each in (example, wider)] == ["code", "code"]
    assert [any_rows([each])[0] for each in (last, example.double(), torch.zeros(9, 3, 4, 4))] == ["graph"] * 3
    assert [two_rows([each])[0] for each in (example, wider)] == ["code", "graph"]
    with torch.no_grad():
        assert any_rows([example])[0] == "graph"


class Slept:
    """A clock that is told how long evaluations take, in turn."""

    def __init__(self, *seconds: float) -> None:
        self._times, self.now = iter(seconds), 0.0

    def evaluate(self, rows: Rows) -> tuple[()]:
        return ()

    def __call__(self) -> float:
        self.now += next(self._times)
        return self.now


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        ([0.9, 0.9, 0.9, 0.9, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0], True),
        ([0.9, 1.1, 1.1, 1.1, 0.9], [1.0, 1.2, 1.2, 1.2, 1.2], False),
        ([1.1] * 5, [1.0] * 5, False),
    ],
    ids=["but for one run", "within the noise", "slower"],
)
def test_faster_is_faster_by_more_than_noise(own: list[float], others: list[float], expected: bool) -> None:
    steps = [step for pair in zip(own, others, strict=True) for seconds in pair for step in (0.0, seconds)]
    clock: Any = Slept(*steps)

    assert is_faster(clock, clock, clock, clock) is expected


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes what is compiled for faster."""
    monkeypatch.setattr(torch_export, "where_faster", functools.partial(where_faster, faster=always))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("rows", [None, 1], ids=["any number of rows", "one row"])
@pytest.mark.usefixtures("believed")
def test_compiled_gradients_are_those_of_the_graph(tmp_path: Path, cache: Path, rows: int | None) -> None:
    path = write(tmp_path, rows)
    eager = backends.load(path, ModelConfig(), OPTIONS)
    found = backends.load(path, ASKED, replace(OPTIONS, compile_seconds=300.0, cache=cache))

    assert found.compilation is not None
    assert found.compilation.refusal == ""
    assert found.compilation.map_error is not None
    assert found.compilation.map_error < 1e-5
    assert found.execution.endswith("+compiled")
    assert found._forward._takes(TYPICAL_ROWS)  # type: ignore[attr-defined]
    for count in (1, 2, 7, TYPICAL_ROWS, 40):
        assert relative_difference(gradient(found, count), gradient(eager, count)) < 1e-5


@pytest.mark.gpu
@pytest.mark.usefixtures("believed")
def test_compiled_gradients_on_cuda_are_those_of_the_processor(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path)
    eager = backends.load(path, ModelConfig(), OPTIONS)
    found = backends.load(path, ASKED, replace(OPTIONS, device="cuda", compile_seconds=300.0, cache=cache))

    assert "+compiled" in found.execution
    for _ in range(5):  # the fourth is recorded
        assert relative_difference(gradient(found, TYPICAL_ROWS), gradient(eager, TYPICAL_ROWS)) < 1e-4


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("believed")
def test_several_targets_go_through_one_forward_pass(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path)
    options = replace(OPTIONS, compile_seconds=300.0, cache=cache)
    models = [backends.load(path, config, options) for config in (ModelConfig(), ASKED)]
    row = random_row(models[0])
    selectors = tuple(Selector(np.array([index]), np.ones(1, np.float32)) for index in range(3))
    rows = repeated(replace(row, selectors=selectors), TYPICAL_ROWS)
    with ThreadPoolExecutor(1) as device_thread:  # a server does not evaluate on the thread that loads
        expected, found = (values(device_thread.submit(model.evaluate, rows).result()) for model in models)

    assert models[1].execution.endswith("+compiled")
    assert max(relative_difference(*pair) for pair in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "programs", "reason"),
    [
        pytest.param(300.0, False, "compiler", id="no compiler"),
        pytest.param(0.5, True, "within 0.5 s", id="too slow"),
    ],
)
def test_a_machine_that_cannot_compile_serves_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, programs: bool, reason: str
) -> None:
    if not programs:
        monkeypatch.setenv("PATH", str(tmp_path))
    found = backends.load(write(tmp_path), ASKED, replace(OPTIONS, compile_seconds=seconds))

    assert found.compilation is not None
    assert reason in found.compilation.refusal
    assert np.isfinite(gradient(found)).all()
