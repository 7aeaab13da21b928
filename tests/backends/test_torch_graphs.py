"""Recorded passes give what passes give that are run one operator at a time.

On the CPU "replaying" runs the same work again into the same memory, which is all that a CUDA graph does.
"""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn
from torch.utils import _pytree as pytree  # noqa: E402

from explainserve import backends  # noqa: E402
from explainserve.backends import torch_rows  # noqa: E402
from explainserve.backends.contract import LoadedModel, LoadOptions  # noqa: E402
from explainserve.backends.torch_graphs import WARM_UPS, Graphs, fixed_size  # noqa: E402
from explainserve.backends.torch_queue import CpuQueue  # noqa: E402
from explainserve.errors import Unsupported  # noqa: E402
from explainserve.model_config import ModelConfig, Precision  # noqa: E402
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector  # noqa: E402
from explainserve.signature import ScoreHead  # noqa: E402

SHAPE = (3, 8, 8)
GRADIENT = Differentiation("y", ScoreHead.SOFTMAX, ("x",))
FORWARD = Differentiation("y", ScoreHead.SOFTMAX)

both_formats = pytest.mark.parametrize("suffix", ["pt", "pt2"])


class Rerun:
    """Replays by running again.

    Attributes:
        count: what was recorded so far, forward and backward passes apart.
        failure: raised by what is recorded where it is set.
    """

    byte_count = 1000

    def __init__(self) -> None:
        self.count = 0
        self.failure: Exception | None = None

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.failure is not None:
            raise self.failure
        recorded = pytree.tree_map(lambda tensor: torch.full_like(tensor, float("nan")), work())
        self.count += 1

        def replay() -> None:
            for memory, value in zip(pytree.tree_leaves(recorded), pytree.tree_leaves(work()), strict=True):
                memory.copy_(value)

        return recorded, replay  # recording computes nothing


class Recording(CpuQueue):
    """A device that records."""

    def __init__(self, device: Any) -> None:
        super().__init__(device)
        self.record = Rerun()

    def fetch(self, tensor: Any) -> Any:
        return tensor.clone()


class Net(nn.Module):
    """Convolutions, an activation that is not linear, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(64, 3)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.second(torch.relu(self.first(x)))).flatten(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the network in both formats."""
    folder = tmp_path_factory.mktemp("graphs")
    torch.manual_seed(0)
    net, example = Net().eval(), (torch.randn(2, *SHAPE),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        torch.jit.trace(net, example).save(str(folder / "model.pt"))
        batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
        torch.export.save(torch.export.export(net, example, dynamic_shapes=batch), folder / "model.pt2")
    return folder


def load(folder: Path, suffix: str, precision: Precision = Precision.FLOAT32, device: str = "cpu") -> Any:
    config = {
        "inputs": [{"name": "x", "shape": ["batch", *SHAPE]}],
        "outputs": [{"name": "y", "shape": ["batch", 3], "kind": "logits"}],
        "precision": precision,
    }
    return backends.load(folder / f"model.{suffix}", ModelConfig.model_validate(config), LoadOptions(device=device))


@pytest.fixture
def recording(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A model whose passes are recorded, by its format; nothing has been yet."""

    def loaded(suffix: str, precision: Precision = Precision.FLOAT32) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(torch_rows, "queue_of", Recording)
            model = load(folder, suffix, precision)
        model._graphs = Graphs(Rerun())
        return model

    return loaded


def rows(count: int, seed: int = 0, targets: int = 1, function: Differentiation = GRADIENT) -> Rows:
    """Two paths to random rows that share a micro-batch."""
    random = np.random.default_rng(seed)
    selectors = tuple(Selector(np.array([index]), np.ones(1, np.float32)) for index in range(targets))
    return Rows(
        function, tuple(segment(part, random, selectors, function) for part in (count // 2, -(-count // 2)) if part)
    )


def segment(count: int, random: np.random.Generator, selectors: Any, function: Differentiation) -> Segment:
    end = random.standard_normal(SHAPE).astype(np.float32)
    weights = np.full(count, 1 / count) * (np.arange(count) != 1)  # a row that is left out
    return Segment({"x": 0 * end}, {"x": end}, {}, function, np.linspace(0.1, 1, count), weights, selectors)


def warm_up(model: LoadedModel, *batches: Rows) -> None:
    for _ in range(WARM_UPS):
        for batch in batches:
            model.evaluate(batch)


def assert_alike(found: tuple[SegmentEvaluation, ...], expected: tuple[SegmentEvaluation, ...], rtol: float) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol, rtol)
        assert one.gradient_sums.keys() == other.gradient_sums.keys()
        for name, sums in one.gradient_sums.items():
            assert np.linalg.norm(sums - other.gradient_sums[name]) <= rtol * np.linalg.norm(other.gradient_sums[name])
        assert (one.outputs is None) is (other.outputs is None)
        if one.outputs is not None and other.outputs is not None:
            np.testing.assert_allclose(one.outputs, other.outputs, rtol, rtol)


def test_sizes_are_few_and_hold_their_rows() -> None:
    sizes = [fixed_size(count) for count in range(1, 257)]

    assert all(count <= size < 1.5 * count + 1 for count, size in enumerate(sizes, 1))
    assert all(fixed_size(size) == size for size in sizes)
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


@both_formats
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16, Precision.FLOAT16])
@pytest.mark.parametrize("targets", [1, 3])
def test_replayed_gradients_are_those_of_the_network(
    folder: Path, recording: Callable[..., Any], suffix: str, precision: Precision, targets: int
) -> None:
    model, reference = recording(suffix, precision), load(folder, suffix, precision)
    warm_up(model, rows(5, targets=targets))
    for seed, count in enumerate((5, 6, 5), 1):
        batch = rows(count, seed, targets)
        assert_alike(model.evaluate(batch), reference.evaluate(batch), 1e-5 if precision is Precision.FLOAT32 else 2e-2)

    assert model._graphs._record.count == 2, "five and six rows share a forward and a backward pass"


@both_formats
@pytest.mark.parametrize("targets", [0, 2])
def test_replayed_scores_are_those_of_the_network(
    folder: Path, recording: Callable[..., Any], suffix: str, targets: int
) -> None:
    model, reference = recording(suffix), load(folder, suffix)
    warm_up(model, rows(5, 0, targets, FORWARD))
    found = [model.evaluate(rows(5, seed, targets, FORWARD)) for seed in (1, 2)]

    assert model._graphs._record.count == 1
    for seed, each in enumerate(found, 1):
        assert_alike(each, reference.evaluate(rows(5, seed, targets, FORWARD)), 1e-5)


def test_functions_sizes_and_heads_do_not_mix(folder: Path, recording: Callable[..., Any]) -> None:
    model, reference = recording("pt2"), load(folder, "pt2")
    logits = Differentiation("y", ScoreHead.IDENTITY, ("x",))
    batches = [rows(3), rows(8, 1), rows(3, 2, 1, FORWARD), rows(3, 3, 1, logits), rows(1, 4)]
    warm_up(model, *batches)

    for batch in (*batches, *reversed(batches)):
        assert_alike(model.evaluate(batch), reference.evaluate(batch), 1e-5)
    assert model._graphs._record.count == 9


def test_rows_of_before_that_fill_up_change_nothing(folder: Path, recording: Callable[..., Any]) -> None:
    model, reference = recording("pt2"), load(folder, "pt2")
    warm_up(model, rows(6))
    spoiled = rows(6, 1)
    spoiled.segments[-1].end["x"][:] = np.nan
    model.evaluate(spoiled)

    assert_alike(model.evaluate(rows(5, 2)), reference.evaluate(rows(5, 2)), 1e-5)


def test_results_are_not_those_of_the_next_micro_batch(folder: Path, recording: Callable[..., Any]) -> None:
    model, reference = recording("pt"), load(folder, "pt")
    warm_up(model, rows(4))
    collects = [model.submit(rows(4, seed)) for seed in (1, 2)]

    for seed, collect in enumerate(collects, 1):
        assert_alike(collect(), reference.evaluate(rows(4, seed)), 1e-5)


@both_formats
def test_what_cannot_be_recorded_is_run_and_said_once(
    folder: Path, recording: Callable[..., Any], caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    model, reference = recording(suffix), load(folder, suffix)
    assert model.execution.endswith("+cuda_graphs")
    model._graphs._record.failure = RuntimeError("operation not permitted when stream is capturing\nmore")
    with caplog.at_level(logging.WARNING):
        for seed in range(WARM_UPS + 3):
            for count in (2, 4):
                batch = rows(count, seed)
                assert_alike(model.evaluate(batch), reference.evaluate(batch), 1e-5)

    assert model.execution.endswith("+no_cuda_graphs")
    assert model._graphs.refusal == "operation not permitted when stream is capturing"
    assert sum("recorded" in record.message for record in caplog.records) == 1


def test_the_number_of_graphs_is_bounded_and_the_last_used_stay(recording: Callable[..., Any]) -> None:
    model = recording("pt2")
    model._graphs = graphs = Graphs(Rerun(), most=2)
    for count in (1, 2, 1, 4):  # 2 has to go
        warm_up(model, rows(count))
        model.evaluate(rows(count))
    recorded = graphs._record.count
    model.evaluate(rows(1))
    model.evaluate(rows(4))

    assert len(graphs._entries) == 2
    assert graphs._record.count == recorded == 6


def test_memory_is_counted(recording: Callable[..., Any]) -> None:
    model = recording("pt2")
    assert model._graphs.byte_count == Rerun.byte_count
    warm_up(model, rows(5))
    model.evaluate(rows(5))

    assert model._graphs.byte_count == Rerun.byte_count + 6 * 4 * int(np.prod(SHAPE))


def test_another_thread_records_anew(folder: Path, recording: Callable[..., Any]) -> None:
    model, reference = recording("pt2"), load(folder, "pt2")
    warm_up(model, rows(5))
    model.evaluate(rows(5))
    assert model._graphs._record.count == 2
    found = []

    def work() -> None:
        warm_up(model, rows(5))
        assert model._graphs._record.count == 2
        found.append(model.evaluate(rows(5, 1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert model._graphs._record.count == 4
    assert_alike(found[0], reference.evaluate(rows(5, 1)), 1e-5)


def test_a_single_use_is_not_recorded(recording: Callable[..., Any]) -> None:
    model = recording("pt2")
    for count in (1, 2, 3, 4):
        model.evaluate(rows(count))

    assert model._graphs._record.count == 0


def test_the_cpu_records_nothing(folder: Path) -> None:
    model = load(folder, "pt2")

    assert model._graphs is None
    assert "cuda_graphs" not in model.execution


def test_what_has_no_gradient_says_so(recording: Callable[..., Any]) -> None:
    model = recording("pt2")
    forward = model._forward
    model._forward = lambda inputs: [output.detach() for output in forward(inputs)]
    for _ in range(WARM_UPS + 2):
        with pytest.raises(Unsupported):
            model.evaluate(rows(2))


@pytest.mark.gpu
@both_formats
@pytest.mark.parametrize("precision", list(Precision), ids=lambda each: each.value)
def test_cuda_graphs_give_what_the_cpu_gives(folder: Path, suffix: str, precision: Precision) -> None:
    model, reference = load(folder, suffix, precision, "cuda"), load(folder, suffix)
    model._graphs = Graphs(model._queue.record)
    tolerance = {Precision.FLOAT32: 1e-4, Precision.TF32: 1e-2}.get(precision, 5e-2)
    warm_up(model, rows(5, targets=3), rows(5, 0, 0, FORWARD))
    for seed, count in enumerate((5, 6, 5), 1):
        for batch in (rows(count, seed, 3), rows(count, seed, 0, FORWARD)):
            assert_alike(model.evaluate(batch), reference.evaluate(batch), tolerance)

    assert model._graphs.refusal == ""
    assert sum(entry.graph is not None for entry in model._graphs._entries.values()) == 2
    assert model._graphs.byte_count > 0
    assert model.execution.endswith("+cuda_graphs")


@pytest.mark.gpu
@both_formats
def test_micro_batches_on_the_way_do_not_disturb_each_other(folder: Path, suffix: str) -> None:
    """Many times two at once, before and after they are recorded, through memory that is used again."""
    model, reference = load(folder, suffix, device="cuda"), load(folder, suffix)
    assert model.runs_ahead
    batches = [rows(count, seed) for seed, count in enumerate((5, 8, 2, 5, 6, 1) * 8)]
    earlier = model.submit(batches[0])
    for before, batch in itertools.pairwise(batches):
        later = model.submit(batch)
        assert_alike(earlier(), reference.evaluate(before), 1e-4)
        earlier = later
