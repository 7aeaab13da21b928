"""The parts of benchmarks that judge answers: an error there would hide one elsewhere."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equality import differences, unequal_maps
from explainserve.rpc.tensors import encode
from explainserve.v1 import attribution_pb2, statistics_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from holding import Growth, Holding
from second_look import Ask, doubts
from slow_reader import reading_slowly

ROOT = Path(__file__).parents[1]
MAP = np.array([3.0, 4.0], np.float32)


def answer(values: np.ndarray[Any, Any] = MAP, **fields: Any) -> pb.ExplainResponse:
    """One map of a fixed rule, with its norm."""
    norm = float(np.linalg.norm(values.astype(np.float64)))
    statistics = statistics_pb2.Statistics(view="VIEW_ELEMENTS", finite_count=values.size, l2_norm=norm)
    part = attribution_pb2.InputAttribution(name="x", tensor=encode(values), statistics=[statistics])
    attribution = {
        "inputs": [part],
        "step_count": 8,
        "instance_output_value": 1.0,
        "stop_reason": "STOP_REASON_FIXED_STEPS",
        **fields,
    }
    return pb.ExplainResponse(attributions=[attribution], provenance={"noise_floor": 1e-6})


def test_equal_answers_have_no_differences() -> None:
    assert not list(differences(answer(), answer()))
    assert not list(differences(answer(MAP + np.float32(1e-6)), answer()))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (answer(step_count=9), "fixed rule"),
        (answer(target_index=1), "position"),
        (answer(instance_output_value=1.1), "instance_output_value"),
        (pb.ExplainResponse(provenance={"noise_floor": 1e-6}), "0 attributions"),
    ],
)
def test_what_is_wrong_is_told(found: pb.ExplainResponse, told: str) -> None:
    assert told in "; ".join(differences(found, answer()))


def test_figures_of_another_map_are_told() -> None:
    mixed = answer()
    mixed.attributions[0].inputs[0].statistics[0].l2_norm = 7.0

    assert "statistics of x" in "; ".join(differences(mixed, answer()))


@pytest.mark.parametrize("values", [MAP[::-1].copy(), np.array([np.nan, 4.0], np.float32), MAP * np.float32(1.0001)])
def test_unequal_maps_need_a_second_look(values: np.ndarray[Any, Any]) -> None:
    assert unequal_maps(answer(values), answer()) == [0]
    assert unequal_maps(answer(MAP + np.float32(1e-6)), answer()) == []


@pytest.mark.parametrize(
    ("method", "moved", "equal"),
    [
        ("occlusion", 2e-5, True),
        ("occlusion", 2e-3, False),
        ("feature_ablation", 2e-5, True),
        ("integrated_gradients", 2e-5, False),
    ],
)
def test_maps_of_small_differences_of_scores_have_the_rounding_of_the_scores(
    method: str, moved: float, equal: bool
) -> None:
    """A score of 100 whose differences are 3 and 4, and a noise floor of 1e-6."""

    def given(values: np.ndarray[Any, Any]) -> pb.ExplainResponse:
        response = answer(values, instance_output_value=100.0)
        getattr(response.provenance.effective_methods.add(), method).SetInParent()
        return response

    assert unequal_maps(given(MAP * np.float32(1 + moved)), given(MAP)) == ([] if equal else [0])


ADAPTIVE: dict[str, Any] = {"map_error": 0.01, "stop_reason": "STOP_REASON_CONVERGED", "baseline_index": 0}
REQUEST = pb.ExplainRequest(inputs={"x": encode(np.ones(2, np.float32))})


def verdict(found: pb.ExplainResponse, alone: pb.ExplainResponse, ask: Ask) -> tuple[bool, bool]:
    """Whether the only map is explained, and whether it is wrong."""
    (doubt,) = doubts("answer", REQUEST, found, alone)
    explained, wrong = doubt.verdict(ask)
    return bool(explained), bool(wrong)


def test_a_cut_map_is_equal_to_the_one_alone_after_as_many_steps() -> None:
    """Whatever the estimates of their errors allow."""
    alone = answer(step_count=24, **ADAPTIVE)
    cut = answer(MAP * np.float32(1.01), step_count=16, **ADAPTIVE)
    asked: list[int] = []

    def gives(values: np.ndarray[Any, Any]) -> Ask:
        def ask(request: pb.ExplainRequest) -> pb.ExplainResponse:
            asked.append(request.methods[0].integrated_gradients.max_step_count)
            return answer(values, step_count=16, **ADAPTIVE)

        return ask

    assert verdict(cut, alone, gives(MAP * np.float32(1.01))) == (True, False)
    assert verdict(cut, alone, gives(MAP)) == (False, True)
    assert asked[:2] == [16, 16]


def test_maps_of_other_points_agree_within_their_estimates() -> None:
    alone = answer(step_count=24, **ADAPTIVE)

    def elsewhere(request: pb.ExplainRequest) -> pb.ExplainResponse:
        return answer(step_count=12, **ADAPTIVE)

    assert verdict(answer(MAP * np.float32(1.015), step_count=16, **ADAPTIVE), alone, elsewhere) == (True, False)
    assert verdict(answer(MAP * np.float32(1.05), step_count=16, **ADAPTIVE), alone, elsewhere) == (False, True)


@pytest.mark.parametrize(("moves", "explained"), [(1e-4, True), (1e-6, False), (0.0, False)])
def test_a_badly_conditioned_map_may_move_as_far_as_last_bits_move_it(moves: float, explained: bool) -> None:
    def ask(request: pb.ExplainRequest) -> pb.ExplainResponse:
        nudged = request.inputs["x"] != REQUEST.inputs["x"]
        return answer(MAP * np.float32(1 + moves) if nudged else MAP)

    assert verdict(answer(MAP * np.float32(1.0001)), answer(), ask) == (explained, not explained)


@pytest.mark.torch
def test_rows_to_an_error_are_read_between_the_points_of_a_curve() -> None:
    pytest.importorskip("captum")
    from curves import rows_to

    curve = [(4, 0.4), (16, 0.1), (64, 0.025)]

    assert rows_to(curve, 0.5) == 4
    assert rows_to(curve, 0.2) == 8
    assert rows_to(curve, 0.1) == 16
    assert rows_to(curve, 0.01) is None


@pytest.mark.torch
def test_contestants_give_the_same_map() -> None:
    """What the benchmark calls in process is our explainer, and what it calls Captum is Captum."""
    pytest.importorskip("captum")
    from contestants import Ask, Captum, InProcess, Rule
    from subjects import Subject, Task

    folder = ROOT / "examples" / "two_digits"
    random = np.random.default_rng(0)
    x, baseline = random.standard_normal((2, 3, 64, 64)).astype(np.float32), np.zeros((3, 64, 64), np.float32)
    subject = Subject("two-digits", folder, ("models",), None)
    task = Task("image", x, baseline, (3, 8), 10, probability=True)
    ask = Ask(x, (3, 8), Rule("midpoint", 4))

    ours = InProcess(subject, task, threads=1).explain([ask, ask])
    theirs = Captum(task, two_digits(), threads=1).explain([ask, ask])

    assert [rows for _, rows in ours] == [rows for _, rows in theirs] == [4, 4]
    for (mine, _), (other, _) in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape == (4, 3, 64, 64)
        np.testing.assert_allclose(mine, other, atol=1e-5 * float(np.abs(other).max()))


def two_digits() -> Any:
    import three_formats  # noqa: F401  # puts the example on the path
    from network import load_weights

    return load_weights()


@pytest.mark.torch
@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the device: three processes of its own, precisions that are there and are not, and the page."""
    pytest.importorskip("captum")
    import gpu
    import networks

    net = networks.calibrated(networks.ResNet((1,), 1, width=8, classes=5), 16)
    for file_format in ("onnx", "pt"):
        networks.write_model(net, file_format, tmp_path / file_format / "tiny", 16, classes=5)
    monkeypatch.setattr(gpu, "cache_folder", lambda: tmp_path)
    files = [str(tmp_path / kind / "tiny" / "1" / f"model.{kind}") for kind in ("onnx", "pt")]
    page = tmp_path / "page.md"
    gpu.main(["--device", "cpu", "--quick", "--threads", "1", "--output", str(page), ",".join(files)])
    lines = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| tiny")]

    assert [line[2] for line in lines] == ["float32", "float16"]
    assert all(len(line) == len(gpu.HEADER) for line in lines)
    assert "the CPU" in page.read_text(encoding="utf-8")


@pytest.mark.torch
def test_the_work_of_a_row_is_that_of_its_products() -> None:
    pytest.importorskip("torch")
    import torch

    import floor

    net = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 4, bias=False))
    work = floor.work_of(net.requires_grad_(False), torch.randn(8))
    weights = 8 * 16 + 16 * 4

    assert work.operations == 2 * 2 * weights  # forward and backward
    assert work.elements == 2 * (8 + 16 + 16 + 4 + weights / floor.ROWS)
    assert floor.Peak(100.0, 10.0).seconds(floor.Work(50.0, 10.0), "float16") == (0.5, 2.0)


def held(minutes: float, growth_per_minute: float) -> list[Holding]:
    """1000 MB every half second, a fifth more while the server settles, and maps that come and go within seconds."""
    times, random = np.arange(0, minutes * 60, 0.5), np.random.default_rng(1)
    maps = np.repeat(random.exponential(5e7, len(times)), 8)[: len(times)]
    settling = 2e8 * np.clip(1 - times / 30, 0, 1)
    grown = 1e9 * (1 + growth_per_minute * times / 60)
    return [Holding(float(t), int(b), 8, 8) for t, b in zip(times, grown + maps - settling, strict=True)]


@pytest.mark.parametrize(
    ("minutes", "growth", "told"),
    [(5, 0.0, ""), (5, 0.01, ""), (5, 0.03, "memory grows by"), (0.5, 0.0, "soak for longer")],
)
def test_a_soak_of_minutes_tells_whether_memory_grows(minutes: float, growth: float, told: str) -> None:
    failure = Growth.of(held(minutes, growth)).failure

    assert told in failure if told else not failure


def test_slow_reader_passes_everything_on_and_vanishes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with reading_slowly(address, 1e6) as reader:
            host, _, port = reader.address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=30) as client:
                client.sendall(bytes(20_000))
                answer_stream = client.makefile("rb")
                assert answer_stream.read(20_000) == bytes(20_000)
                reader.vanish()
                assert answer_stream.read(1) == b""


def _echo(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        while data := connection.recv(4096):
            connection.sendall(data)


@pytest.mark.torch
def test_summary_takes_the_place_of_the_one_that_is_quoted() -> None:
    pytest.importorskip("captum")
    from contestants import Run
    from table import CAPTUM, GRPC, IN_PROCESS, Line, Question, quoted

    runs = {name: [Run(wall, 0.0, 0)] for name, wall in ((CAPTUM, 1.0), (IN_PROCESS, 0.25), (GRPC, 0.5))}
    line = Line("mine", Question.STEPS, "32 steps", 1, 1, {}, runs)

    readme = quoted("## How fast\n\nWords.\n\n| old |\n| --- |\n| 1 |\n\n## Read\n", [line])

    assert readme.startswith("## How fast\n\nWords.\n\n| model |")
    assert readme.endswith("| mine | 0.50 | 0.25 | — | — | — |\n\n## Read\n")


def test_readme_quotes_the_results() -> None:
    results = (ROOT / "benchmarks" / "results" / "benchmark.md").read_text(encoding="utf-8")
    summary = results.partition("## Summary")[2].partition("## All lines")[0]
    lines = [line for line in summary.splitlines() if line.startswith("|")]

    assert len(lines) > 2
    assert "\n".join(lines) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.torch
@pytest.mark.slow
def test_maps_of_one_network_agree_with_other_libraries() -> None:
    pytest.importorskip("captum")
    from parity import agreements, page, served
    from references import cases, comparisons

    networks = {"rectifiers": cases()["rectifiers"]}
    wanted = [own for own in comparisons() if not own.sampled and "rectifiers" in (own.networks or networks)]
    with served(networks, ("onnx",)) as client:
        found = list(agreements(client, networks, ("onnx",), wanted))

    assert [own for own in found if not own.as_stated] == []
    assert len([own for own in found if own.distance is not None]) > 10
    assert "`integrated_gradients` step_count=20" in page(found)
