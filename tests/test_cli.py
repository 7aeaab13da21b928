"""The command line: what people type, see and get as exit code. Servers are real processes on loopback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto
from typer.testing import CliRunner

from explainserve.cli import app, connection, progress, spellings
from explainserve.cli import serve as serve_function
from explainserve.cli.documents import document
from explainserve.process import WORKER_COUNT
from explainserve.rpc.tensors import encode
from explainserve.settings import Settings
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from explainserve_client import (
    AttributionSelector,
    Box,
    DataBaseline,
    GradientXInput,
    Label,
    Margin,
    Occlusion,
    Progress,
    SmoothGrad,
    TopK,
)
from hostile_graphs import CRASHERS, endless, patient
from models import MODELS, write_model
from onnx_graphs import model, node, quantized_twice, quantized_within, save
from rpc.output_models import write_detector

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[1]
MODEL_FOLDER = ROOT / "examples" / "two_digits" / "models"
PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
COMMAND = [sys.executable, "-m", "explainserve"]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SECONDS = 60


@dataclass
class Answer:
    exit_code: int
    out: str
    err: str


@dataclass
class Running:
    """A server process, where it listens, and the file of its log lines."""

    process: subprocess.Popen[str]
    grpc: str
    http: str
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


def call(*arguments: object) -> Answer:
    """The command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="explainserve")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


def run(*arguments: object) -> Answer:
    """The command in a process of its own."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS)
    return Answer(done.returncode, done.stdout, done.stderr)


@contextmanager
def serving(folder: Path, log: Path, *options: str, command: list[str] | None = None) -> Iterator[Running]:
    """Starts a server and reads its two lines; ends it where the test did not."""
    arguments = command or [*COMMAND, "serve", "--models", str(folder), "--port", "0", "--http-port", "0", *options]
    with starting(arguments, log) as process:
        assert process.stdout is not None
        addresses = [process.stdout.readline().strip() for _ in range(2)]
        assert addresses[0].startswith("gRPC listening on "), log.read_text()
        assert addresses[1].startswith("HTTP listening on ")
        yield Running(process, addresses[0].rsplit(" ", 1)[1], addresses[1].rsplit(" ", 1)[1], log)


@contextmanager
def starting(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process whose standard error goes to a file; ends it where the test did not."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait(SECONDS)
        process.stdout.close()


def child_of(process: subprocess.Popen[Any]) -> int | None:
    """A process that any of its threads has started."""
    with suppress(OSError):  # a thread, or all of it, has just ended
        for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
            if found := path.read_text().split():
                return int(found[0])
    return None


def runs(process_id: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    with suppress(OSError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded models, one that is truncated, and one with two inputs."""
    folder = tmp_path_factory.mktemp("folder")
    shutil.copytree(MODEL_FOLDER, folder, dirs_exist_ok=True)
    whole = (MODEL_FOLDER / "two-digits" / "1" / "model.onnx").read_bytes()
    (folder / "truncated" / "1").mkdir(parents=True)
    (folder / "truncated" / "1" / "model.onnx").write_bytes(whole[: len(whole) // 2])
    write_model(MODELS["multi_input"], "onnx", folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(folder, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


def pixels(index: int = 0) -> np.ndarray:
    with np.load(ROOT / "examples" / "two_digits" / "pictures.npz") as pictures:
        return np.asarray(pictures["images"][index])


def instance(index: int = 0) -> np.ndarray:
    """A picture in model space, by the formula of the signature."""
    return np.ascontiguousarray(((pixels(index) / 255 - 0.51) / 0.06).transpose(2, 0, 1), np.float32)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.npy"
    np.save(path, instance())
    return path


def save_image(path: Path, index: int = 0, enlarged: int = 1) -> Path:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(pixels(index).repeat(enlarged, axis=0).repeat(enlarged, axis=1)).save(path)
    return path


def oracle_logits(values: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(MODEL_FOLDER / "two-digits" / "1" / "model.onnx")
    return np.asarray(session.run(["logits"], {"image": values[np.newaxis]})[0][0])


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(np.asarray(logits, np.float64) - logits.max())
    return shifted / shifted.sum()


# Usage


def test_every_setting_is_a_flag_of_serve_with_its_variable_and_default() -> None:
    options = {option.name: option for option in COMMANDS["serve"].params if option.name in Settings.model_fields}

    assert set(options) == set(Settings.model_fields)
    for name, knob in Settings.model_fields.items():
        assert options[name].envvar == f"EXPLAINSERVE_{name.upper()}"
        expected = list(knob.default) if isinstance(knob.default, tuple) else knob.default
        assert str(getattr(options[name].default, "value", options[name].default)) == str(expected), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_the_command_and_each_option_in_plain_text(name: str) -> None:
    answer = call(name, "--help")

    assert answer.exit_code == 0
    assert "\x1b" not in answer.out
    assert answer.out.isascii()
    assert COMMANDS[name].help
    for option in COMMANDS[name].params:
        assert option.help, option.name
        assert option.name in ("inputs", "name", "file") or option.opts[-1] in answer.out


def test_help_lists_the_commands_and_version_names_the_release() -> None:
    from explainserve import __version__

    assert all(f"\n  {name} " in call("--help").out for name in COMMANDS)
    assert call("--version").out == f"explainserve {__version__}\n"
    assert run("--version").out == call("--version").out


def test_starting_up_imports_nothing_heavy() -> None:
    code = "import sys, explainserve.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)

    heavy = {"torch", "onnx", "onnxruntime", "numpy", "grpc", "pydantic", "structlog", "explainserve_client"}
    assert not heavy & set(loaded.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing-of-that-name"],
        ["serve", "--port", "65536"],
        ["serve", "--threads", "-1"],
        ["serve", "--device", "abacus"],
        ["serve", "--device", "cpu", "--device", "abacus"],
        ["serve", "--log-format", "xml"],
        ["serve", "--default-timeout", "0"],
        ["explain", "--model", "two-digits"],
        ["explain", "PICTURE"],
        ["explain", "missing.npy"],
        ["explain", "PICTURE", "--steps", "0"],
        ["explain", "PICTURE", "--steps", "8", "--tolerance", "0.1"],
        ["explain", "PICTURE", "--steps", "8", "--quadrature", "adaptive"],
        ["explain", "PICTURE", "--quadrature", "midpoint"],
        ["explain", "PICTURE", "--quadrature", "simpson"],
        ["explain", "PICTURE", "--method", "tea_leaves"],
        ["explain", "PICTURE", "--method", "gradient:depth=3"],
        ["explain", "PICTURE", "--method", "gradient", "--steps", "8"],
        ["explain", "PICTURE", "--score", "happiness"],
        ["explain", "PICTURE", "--baseline", "purple"],
        ["explain", "PICTURE", "--region", "left=0,0,0,4"],
        ["explain", "PICTURE", "--region", "0,0,4,4"],
        ["explain", "PICTURE", "--region", "a=0,0,4,4", "--region", "a=0,0,4,5"],
        ["explain", "PICTURE", "--png"],
        ["explain", "PICTURE", "--output", "no/such/folder/x"],
        ["explain", "PICTURE", "--models", "no-such-folder"],
        ["explain", "PICTURE", "--time-budget", "0"],
        ["explain", "depth=PICTURE"],
        ["predict", "PICTURE", "--top", "0"],
        ["predict", "PICTURE", "--tensors"],
        ["models", "--model-version", "1"],
        ["models", "two-digits", "--all"],
        ["inspect", "missing.onnx"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(
    arguments: list[str], server: Running, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPLAINSERVE_SERVER", server.grpc)
    model = ["--model", "two-digits"] if arguments[0] in ("explain", "predict") and "--model" not in arguments else []
    if arguments == ["explain", "PICTURE"]:
        model = []
    answer = call(*[text.replace("PICTURE", str(picture)) for text in arguments], *model)

    assert answer.exit_code == 2
    assert answer.out == ""
    assert "rror: " in answer.err
    assert "Traceback" not in answer.err


def test_a_file_that_would_be_unpickled_is_refused(server: Running, tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([print], dtype=object), allow_pickle=True)
    answer = call("explain", tmp_path / "objects.npy", "--model", "two-digits", "--server", server.grpc)

    assert answer.exit_code == 2
    assert "objects.npy" in answer.err


def test_flags_win_over_variables_and_variables_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    async def record(settings: Settings, log: object) -> None:
        seen.append(settings)

    monkeypatch.setitem(serve_function.__globals__, "_run", record)
    monkeypatch.setattr("explainserve.logs.configure", lambda log_format: None)
    monkeypatch.setenv("EXPLAINSERVE_MAX_STEP_COUNT", "64")
    monkeypatch.setenv("EXPLAINSERVE_THREAD_COUNT", "3")
    monkeypatch.setenv("EXPLAINSERVE_ALLOW_DEVICE_FALLBACK", "1")
    monkeypatch.setenv("EXPLAINSERVE_DEVICE", "cpu:0 cpu:1")
    answer = call("serve", "--models", tmp_path, "--threads", "2", "--grace", "1.5", "--log-format", "console")

    assert answer.exit_code == 0, answer.err
    expected = Settings(
        models=tmp_path,
        max_step_count=64,
        thread_count=2,
        allow_device_fallback=True,
        device=("cpu:0", "cpu:1"),
        grace_seconds=1.5,
        log_format="console",
    )
    assert seen == [expected]
    assert Settings().device == expected.device, "the variable means the same without the command line"


def test_devices_are_a_repeated_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    async def record(settings: Settings, log: object) -> None:
        seen.append(settings)

    monkeypatch.setitem(serve_function.__globals__, "_run", record)
    monkeypatch.setattr("explainserve.logs.configure", lambda log_format: None)
    answer = call("serve", "--models", tmp_path, "--device", "cuda:1", "--device", "cpu")

    assert answer.exit_code == 0, answer.err
    assert [settings.device for settings in seen] == [("cuda:1", "cpu")]


# Spellings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("2,10,12", (2, 10, 12)),
        ("goldfinch", "goldfinch"),
        ("argmax", "argmax"),
        ("top5", TopK(5)),
        ("topaz", "topaz"),
        ("margin:3:goldfinch", Margin(3, "goldfinch")),
        ("label:3", Label("3")),
        ("label:argmax", Label("argmax")),
        ("label:output:a:3", Label("output:a:3")),
    ],
)
def test_targets(text: str, expected: object) -> None:
    assert spellings.target(text) == expected


def test_a_target_names_its_output() -> None:
    found = spellings.target("output:kinds:margin:3:8")

    assert (found.output, found.selection) == ("kinds", Margin(3, 8))


def test_baselines(picture: Path) -> None:
    assert spellings.baseline("gray") == "gray"
    assert np.array_equal(spellings.baseline(str(picture)), instance())
    assert spellings.baseline("data:mean") == DataBaseline("mean")
    by_input = spellings.baseline(f"image=gray,mask={picture}")
    assert by_input["image"] == "gray"
    assert np.array_equal(by_input["mask"], instance())


def test_regions() -> None:
    assert spellings.regions(["a=1,2,3,4", "b=c=0,0,1,1"]) == {"a": Box(1, 2, 3, 4), "b=c": Box(0, 0, 1, 1)}


def test_documents_have_only_what_json_has() -> None:
    values = {"nan": float("nan"), "ends": (float("inf"), -float("inf")), "none": None, "array": np.zeros((2, 3))}

    assert json.loads(document(values)) == {
        "nan": "NaN",
        "ends": ["Infinity", "-Infinity"],
        "none": None,
        "array": {"array": "array", "dtype": "float64", "shape": [2, 3]},
    }


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_long_work_shows_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.working("explaining two-digits"):
            deadline = time.monotonic() + 5
            while stream.isatty() and "two-digits" not in stream.getvalue() and time.monotonic() < deadline:
                time.sleep(0.02)
        shown[type(stream)] = stream.getvalue()

    assert "two-digits" in shown[Terminal]
    assert shown[io.StringIO] == ""


def test_progress_counts_the_paths_that_ended_and_tells_the_worst_error() -> None:
    def told(target: int, steps: int, error: float | None, stop_reason: str = "UNFINISHED") -> Progress:
        position = AttributionSelector(0, 0, target, 0)
        return Progress(position, steps, 128, error, None, stop_reason, path_count=3)

    paths = progress.Paths()
    lines = []
    for one in (
        told(0, 8, None),
        told(0, 16, 0.25),
        told(1, 16, 0.5),
        told(1, 24, 0.0625, "CONVERGED"),
        told(0, 24, 0.03125, "CONVERGED"),
    ):
        paths.add(one)
        lines.append(str(paths))

    assert lines == [
        "0 of 3 maps",
        "0 of 3 maps, error up to 0.25",
        "0 of 3 maps, error up to 0.5",
        "1 of 3 maps, error up to 0.25",
        "2 of 3 maps, error up to 0.062",
    ]


def test_progress_of_paths_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.working("explaining two-digits") as show:
        show(Progress(AttributionSelector(0, 0, 0, 0), 24, 128, 0.0625, None, "CONVERGED", path_count=2))
        deadline = time.monotonic() + 5
        while "1 of 2 maps" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)

    assert "explaining two-digits: 1 of 2 maps, error up to 0.062" in terminal.getvalue()


# serve


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_listens_and_stops_with_0(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with serving(tmp_path / "models", tmp_path / "log") as running:
        assert call("health", "--server", running.grpc).exit_code == 0
        with urllib.request.urlopen(f"http://{running.http}/readyz", timeout=SECONDS) as response:
            assert response.status == 200
        assert running.stop(number) == 0
        assert running.process.stdout is not None
        assert running.process.stdout.read() == ""
    assert all(json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines())


def active(running: Running, method: str) -> float:
    with urllib.request.urlopen(f"http://{running.http}/metrics", timeout=SECONDS) as response:
        text = response.read().decode()
    found = re.search(rf'^explainserve_active_requests\{{method="{method}"\}} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("devices", [["cpu"], pytest.param(["cpu:0", "cpu:1"], marks=pytest.mark.slow)], ids=" ".join)
def test_requests_that_run_when_it_is_told_to_stop_are_finished(devices: list[str], tmp_path: Path) -> None:
    """As many as there are devices."""
    answers: list[Answer] = []
    np.save(tmp_path / "pictures.npy", np.stack([instance(index) for index in range(8)]))
    options = [*(f"--device={name}" for name in devices), "--threads", "1", "--grace", "120"]
    with serving(MODEL_FOLDER, tmp_path / "log", *options) as running:
        picked = ["--model", "two-digits", "--target", "top2", "--steps", "64"]
        arguments = ["explain", tmp_path / "pictures.npy", *picked, "--server", running.grpc]
        requests = [threading.Thread(target=lambda: answers.append(run(*arguments))) for _ in devices]
        for request in requests:
            request.start()
        while all(request.is_alive() for request in requests) and active(running, "ExplainStream") < len(devices):
            time.sleep(0.01)
        assert all(request.is_alive() for request in requests), answers
        assert running.stop() == 0
        for request in requests:
            request.join(SECONDS)

    assert [answer.exit_code for answer in answers] == [0] * len(devices), answers
    assert all(answer.out.count("FIXED_STEPS") == 16 for answer in answers)


STUCK = """
import sys, time
from explainserve.cli import app
from explainserve.rpc import responses

def stuck(*_):
    print("stuck", file=sys.stderr, flush=True)
    time.sleep(3600)

responses.explain_response = stuck
app()
"""


def test_work_that_outlives_the_grace_period_does_not_hold_the_process(tmp_path: Path) -> None:
    """Enough of it to occupy every thread that requests have; none of them can be interrupted."""
    where = ["serve", "--models", str(MODEL_FOLDER), "--port", "0", "--http-port", "0", "--grace", "0.2"]
    message = pb.ExplainRequest(model={"named": {"name": "two-digits"}}, inputs={"image": encode(instance()[None])})
    message.methods.add().integrated_gradients.step_count = 1
    command = [sys.executable, "-c", STUCK, *where]
    with (
        serving(MODEL_FOLDER, tmp_path / "log", command=command) as running,
        grpc.insecure_channel(running.grpc) as channel,
    ):
        calls = [ExplainerServiceStub(channel).Explain.future(message, timeout=3600) for _ in range(40)]
        while running.log.read_text().count("stuck") < WORKER_COUNT:
            assert not any(call.done() for call in calls)
            time.sleep(0.01)
        assert running.stop() == 0


STUBBORN = """
from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.cli import app

OnnxModel.interrupt = lambda self: None
app()
"""


@pytest.mark.parametrize("command", [COMMAND, [sys.executable, "-c", STUBBORN]], ids=["can be ended", "cannot"])
def test_a_model_that_hangs_does_not_hold_the_process(command: list[str], tmp_path: Path) -> None:
    """Told to stop while a run is under way that would take years, and others wait behind it."""
    where = ["serve", "--models", str(tmp_path), "--port", "0", "--http-port", "0", "--grace", "0.2"]
    save(patient(), tmp_path / "patient" / "1")
    x = encode(np.full((1, 4), 2.0**50, np.float32))
    message = pb.PredictRequest(model={"named": {"name": "patient"}}, inputs={"x": x})
    with (
        serving(tmp_path, tmp_path / "log", command=[*command, *where]) as running,
        grpc.insecure_channel(running.grpc) as channel,
    ):
        calls = [ExplainerServiceStub(channel).Predict.future(message, timeout=3600) for _ in range(8)]
        while active(running, "Predict") < len(calls):
            assert not any(call.done() for call in calls)
            time.sleep(0.01)
        assert running.stop() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("trial_seconds", [3600, 0], ids=["tried", "loaded"])
def test_a_load_that_takes_for_ever_does_not_hold_the_process(trial_seconds: int, tmp_path: Path) -> None:
    """Told to stop while a model is tried in a process of its own, which ends too, or is loaded without a trial."""
    save(endless(), tmp_path / "endless" / "1")
    where = ["serve", "--models", str(tmp_path), "--port", "0", "--http-port", "0", "--grace", str(10 * SECONDS)]
    with starting([*COMMAND, *where, "--trial-seconds", str(trial_seconds)], tmp_path / "log") as process:
        while '"LOADING"' not in (tmp_path / "log").read_text() or (trial_seconds and child_of(process) is None):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        child = child_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        ends = time.monotonic() + SECONDS
        while child is not None and runs(child):
            assert time.monotonic() < ends
            time.sleep(0.01)


@pytest.mark.parametrize("option", ["--port", "--http-port"])
def test_a_taken_port_is_said_on_standard_error_and_exits_with_1(option: str, tmp_path: Path) -> None:
    ports = {"--port": "0", "--http-port": "0"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports[option] = str(taken.getsockname()[1])
        answer = run("serve", "--models", tmp_path, *(text for pair in ports.items() for text in pair))

    assert answer.exit_code == 1
    assert answer.out == ""
    assert re.search(rf"^error: cannot listen on .*:{ports[option]}", answer.err, re.MULTILINE)
    assert "Traceback" not in answer.err


def test_a_missing_model_folder_is_said_on_standard_error_and_exits_with_1(tmp_path: Path) -> None:
    answer = run("serve", "--models", tmp_path / "missing", "--port", "0", "--http-port", "0")

    assert answer.exit_code == 1
    assert answer.out == ""
    assert "error: NO_MODELS_FOLDER" in answer.err
    assert str(tmp_path / "missing") in answer.err


# explain


def test_methods_are_spelled_with_lists_and_other_methods() -> None:
    texts = ["occlusion:window=[8, 4],stride=[2,2],aggregation=sum", "smooth_grad:base=gradient_x_input,seed=7"]
    occlusion, smooth = Occlusion([8, 4], [2, 2], "sum"), SmoothGrad(base=GradientXInput(), seed=7)

    assert spellings.named_methods(texts) == [occlusion, smooth]
    with pytest.raises(typer.BadParameter):
        spellings.named_methods(["smooth_grad:base=tea_leaves"])


def test_explain_by_other_methods_writes_a_row_for_each(server: Running, picture: Path, tmp_path: Path) -> None:
    answer = call(
        *("explain", picture, "--model", "two-digits", "--server", server.grpc, "--output", tmp_path / "out"),
        *("--method", "gradient", "--method", "smooth_grad:sample_count=3,noise_std=0.1,seed=7"),
    )
    assert answer.exit_code == 0, answer.err
    metadata = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    gradient, smooth = metadata["attributions"]
    options = metadata["provenance"]["effective_methods"][1]

    assert (gradient["method_index"], smooth["method_index"]) == (0, 1)
    assert gradient["baseline_output_value"] is None and smooth["map_error"] > 0
    assert (options["sample_count"], options["noise_std"], options["seed"]) == (3, 0.1, 7)
    assert len([line for line in answer.out.splitlines() if line.endswith("FIXED_STEPS")]) == 2


def test_explain_writes_tensors_and_metadata_that_agree(server: Running, picture: Path, tmp_path: Path) -> None:
    answer = call(
        *("explain", picture, "--model", "two-digits", "--server", server.grpc, "--score", "probability"),
        *("--target", "1", "--target", "top2", "--baseline", "gray", "--baseline", "random", "--steps", "24"),
        *("--region", "left=0,0,32,64", "--output", tmp_path / "out", "--request-id", "of-this-test"),
    )
    assert answer.exit_code == 0, answer.err
    metadata = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    rows = [line for line in answer.out.splitlines() if line.endswith("FIXED_STEPS")]
    probabilities = softmax(oracle_logits(instance()))

    assert metadata["request_id"] == "of-this-test"
    assert len(metadata["attributions"]) == len(rows) == 6
    with np.load(tmp_path / "out.npz") as arrays:
        for row, line in zip(rows, metadata["attributions"], strict=True):
            stated = line["inputs"]["image"]
            tensor = arrays[stated["tensor"]["array"]]
            assert tensor.dtype == np.float32
            assert list(tensor.shape) == stated["tensor"]["shape"] == [3, 64, 64]
            values = tensor.astype(np.float64)
            assert line["applied_normalization"] == "NONE"
            assert line["attribution_sum"] == pytest.approx(values.sum(), rel=1e-9)
            gap = line["attribution_sum"] - (line["instance_output_value"] - line["baseline_output_value"])
            assert line["convergence_delta"] == pytest.approx(gap, abs=1e-9)
            assert stated["statistics"]["CHANNEL_SUM"]["max"] == pytest.approx(values.sum(axis=0).max(), rel=1e-9)
            assert stated["regions"]["left"]["ELEMENTS"]["sum"] == pytest.approx(values[:, :, :32].sum(), rel=1e-9)
            assert line["instance_output_value"] == pytest.approx(probabilities[line["target"]["index"][0]], abs=1e-5)
            assert f"{line['attribution_sum']:.4g}" in row.split()
            assert f"{line['instance_output_value']:.4g}" in row.split()
    assert [line["target"]["index"][0] for line in metadata["attributions"][::2]][1] == np.argmax(probabilities)
    assert metadata["provenance"]["effective_methods"][0]["step_count"] == 24
    assert "BASELINE_DEPENDENT" in answer.out


def test_the_request_id_is_in_the_log_of_the_server(server: Running, picture: Path) -> None:
    call("explain", picture, "-m", "two-digits", "--steps", "4", "--server", server.grpc, "--request-id", "find-me")

    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert [
        line["method"] for line in lines if line.get("request_id") == "find-me" and line["method"] == "ExplainStream"
    ] == ["ExplainStream"]


def test_several_files_are_several_instances(server: Running, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", instance(0))
    np.save(tmp_path / "two.npy", np.stack([instance(1), instance(2)]))
    prefix = tmp_path / "three"
    answer = call(
        *("explain", tmp_path / "one.npy", tmp_path / "two.npy", "--model", "two-digits", "--server", server.grpc),
        *("--target", "1", "--steps", "4", "--output", prefix),
    )
    assert answer.exit_code == 0, answer.err
    attributions = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["attributions"]

    scores = [line["instance_output_value"] for line in attributions]
    assert scores == pytest.approx([float(oracle_logits(instance(index))[1]) for index in range(3)], abs=1e-4)


def test_regions_are_in_pixels_of_the_image_and_pictures_are_drawn(server: Running, tmp_path: Path) -> None:
    small, large = save_image(tmp_path / "small.png"), save_image(tmp_path / "large.png", enlarged=2)
    answer = call(
        *("explain", small, large, "--model", "two-digits", "--server", server.grpc, "--target", "1", "--steps", "4"),
        *("--resize", "stretch", "--region", "box=0,0,32,64", "--output", tmp_path / "out", "--png"),
        *("--view", "channel_max_abs", "--normalization", "min_max", "--scale", "individual"),
    )
    assert answer.exit_code == 0, answer.err
    attributions = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["attributions"]
    counts = [line["inputs"]["image"]["regions"]["box"]["ELEMENTS"]["element_count"] for line in attributions]

    assert counts == [3 * 32 * 64, 3 * 16 * 32]
    from PIL import Image

    with Image.open(tmp_path / "out.png") as page:
        assert page.width > 2 * 256
        assert page.height > 2 * 256


def test_images_are_never_resized_silently(server: Running, tmp_path: Path) -> None:
    large = save_image(tmp_path / "large.png", enlarged=2)
    answer = call("explain", large, "--model", "two-digits", "--server", server.grpc, "--output", tmp_path / "out")

    assert answer.exit_code == 2
    assert "128" in answer.err
    assert not (tmp_path / "out.json").exists()


def test_inputs_of_a_model_with_several_are_named(server: Running, tmp_path: Path) -> None:
    case = MODELS["multi_input"]
    values = case.instance()
    for name, value in values.items():
        np.save(tmp_path / f"{name}.npy", value)
    named = [f"{name}={tmp_path / name}.npy" for name in values]
    moving = next(port.name for port in case.inputs if port.dtype == "float32")
    arguments = ["--model", "multi_input", "--server", server.grpc, "--target", "1", "--steps", "4"]
    answer = call("explain", *named, *arguments, "--baseline", f"{moving}=zeros", "--output", tmp_path / "out")

    assert answer.exit_code == 0, answer.err
    line = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["attributions"][0]
    assert case.value is not None
    assert list(line["inputs"]) == [moving]
    assert line["instance_output_value"] == pytest.approx(float(case.value(values)[1]), rel=1e-4)
    assert call("explain", named[0], *arguments).exit_code == 2
    assert call("explain", named[0].partition("=")[2], *arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "unknown"], "NOT_FOUND UNKNOWN_MODEL: "),
        (["--model", "two-digits", "--model-version", "7"], "NOT_FOUND UNKNOWN_VERSION: "),
        (["--model", "truncated"], "FAILED_PRECONDITION MODEL_FAILED: "),
        (["--model", "two-digits", "--target", "33"], "INVALID_ARGUMENT "),
        (["--model", "two-digits", "--steps", "100000"], "RESOURCE_EXHAUSTED "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_of_the_server_is_one_line_with_its_request_and_exits_with_1(
    arguments: list[str], expected: str, server: Running, picture: Path
) -> None:
    answer = call("explain", picture, "--server", server.grpc, *arguments)

    assert answer.exit_code == 1
    assert answer.out == ""
    assert answer.err.startswith(f"error: {expected}")
    assert answer.err.count("\n") == 1
    assert re.search(r"request=[0-9a-f]{32}\)\n$", answer.err)


def test_no_server_is_an_error_of_one_line() -> None:
    answer = call("models", "--server", "127.0.0.1:1", "--timeout", "5")

    assert answer.exit_code == 1
    assert re.match(r"error: (UNAVAILABLE|DEADLINE_EXCEEDED): .*\n$", answer.err)


# A server of one's own


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Every process that the command starts."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def record(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(connection.subprocess, "Popen", record)
    return started


def test_a_server_of_its_own_lasts_as_long_as_the_command(
    children: list[subprocess.Popen[str]], picture: Path, tmp_path: Path
) -> None:
    answer = call(
        *("explain", picture, "--model", "two-digits", "--models", MODEL_FOLDER, "--target", "argmax"),
        *("--baseline", "gray", "--output", tmp_path / "out"),
    )
    assert answer.exit_code == 0, answer.err
    assert [child.returncode for child in children] == [0]
    line = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["attributions"][0]
    with np.load(tmp_path / "out.npz") as arrays:
        total = arrays["attributions/0/inputs/image/tensor"].astype(np.float64).sum()
    assert line["attribution_sum"] == pytest.approx(total, rel=1e-9)
    assert line["target"]["index"] == [int(np.argmax(oracle_logits(instance())))]


def test_a_server_of_its_own_is_stopped_after_an_error(children: list[subprocess.Popen[str]], picture: Path) -> None:
    answer = call("explain", picture, "--model", "unknown", "--models", MODEL_FOLDER)

    assert answer.exit_code == 1
    assert "UNKNOWN_MODEL" in answer.err
    assert [child.returncode for child in children] == [0]


def test_a_server_of_its_own_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLAINSERVE_DEVICE", "abacus")
    answer = call("models", "--models", MODEL_FOLDER)

    assert answer.exit_code == 1
    assert answer.err.startswith("error: the server did not start: ")
    assert "abacus" in answer.err


HEEDING_INTERRUPTS = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
"""Becomes another command that heeds SIGINT, which tests in the background ignore. Nothing runs between fork and exec,
where threads of gRPC in this process could hold a lock."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_server_of_its_own_is_stopped_when_the_command_is(
    number: signal.Signals, exit_code: int, picture: Path
) -> None:
    arguments = ["explain", str(picture), "--model", "two-digits", "--models", str(MODEL_FOLDER)]
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING_INTERRUPTS, *COMMAND, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while (child := child_of(process)) is None and process.poll() is None:
            time.sleep(0.01)
        assert child is not None
        process.send_signal(number)
        assert process.wait(SECONDS) == exit_code
        assert not Path(f"/proc/{child}").exists()
    finally:
        process.kill()
        process.wait(SECONDS)


# predict, models, health


def test_predict_shows_the_classes_that_the_model_itself_gives(server: Running, picture: Path) -> None:
    arguments = ["predict", picture, "--model", "two-digits", "--score", "probability", "--server", server.grpc]
    rows = [line.split() for line in call(*arguments, "--top", "3").out.splitlines()[1:]]
    found = json.loads(call(*arguments, "--top", "3", "--json").out)["predictions"][0]["classes"]
    probabilities = softmax(oracle_logits(instance()))
    order = np.argsort(-probabilities)[:3]

    assert [int(row[2]) for row in rows] == [line["index"] for line in found] == order.tolist()
    assert [line["score"] for line in found] == pytest.approx(probabilities[order], abs=1e-5)


def test_predict_shows_outputs_of_one_number(tmp_path: Path) -> None:
    nodes = [node("ReduceSum", ["x", "axis"], ["sum"], keepdims=0)]
    sums = model(nodes, [("x", ["batch", 3])], [("sum", ["batch"])], {"axis": np.array([1])})
    (tmp_path / "models" / "sums" / "1").mkdir(parents=True)
    onnx.save(sums, tmp_path / "models" / "sums" / "1" / "model.onnx")
    np.save(tmp_path / "x.npy", np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    answer = call("predict", tmp_path / "x.npy", "--model", "sums", "--models", tmp_path / "models")

    assert [line.split() for line in answer.out.splitlines()[1:]] == [
        ["0", "sum", "-", "-", "6"],
        ["1", "sum", "-", "-", "15"],
    ]


def test_explain_takes_a_layer_and_an_output(server: Running, picture: Path, tmp_path: Path) -> None:
    arguments = ["explain", picture, "--model", "two-digits", "--server", server.grpc, "--output", tmp_path / "map"]
    answer = call(*arguments, "--layer", "getitem", "--target", "output:logits:3", "--steps", "8")

    assert answer.exit_code == 0, answer.err
    (found,) = json.loads((tmp_path / "map.json").read_text())["attributions"]
    assert list(found["inputs"]) == ["getitem"]
    assert (found["target"]["output"], found["target"]["index"]) == ("logits", [3])


def test_models_lists_those_that_failed_with_their_reason(server: Running) -> None:
    lines = {line.split()[0]: line for line in call("models", "--server", server.grpc).out.splitlines()[1:]}
    entries = json.loads(call("models", "--server", server.grpc, "--json").out)

    assert set(lines) == {"multi_input", "truncated", "two-digits", "two-digits-random-a", "two-digits-random-b"}
    assert " READY " in lines["two-digits"]
    assert " FAILED " in lines["truncated"]
    (failed,) = [entry for entry in entries if entry["state"] == "FAILED"]
    assert failed["name"] == "truncated"
    assert " ".join(failed["reason"].split()) in lines["truncated"]


def test_models_of_the_folder_are_loaded_and_unloaded(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(MODEL_FOLDER / "two-digits", folder / "two-digits")
    with serving(folder, tmp_path / "log", "--allow-model-control") as running:
        shutil.copytree(MODEL_FOLDER / "two-digits", folder / "later")
        where = ("--server", running.grpc)

        assert call("models", "--all", *where).out.splitlines()[1].split()[:3] == ["later", "1", "UNLOADED"]
        assert call("load", "later", *where).out == "later version 1, READY\n"
        assert call("unload", "two-digits", "--model-version", "1", *where).out == "two-digits version 1, UNLOADED\n"
        assert [line.split()[2] for line in call("models", *where).out.splitlines()[1:]] == ["READY", "UNLOADED"]
        unknown = call("load", "nothing", *where)
        assert (unknown.exit_code, "NOT_FOUND UNKNOWN_MODEL" in unknown.err) == (1, True)


def test_models_describes_one(server: Running) -> None:
    text = call("models", "two-digits", "--server", server.grpc).out
    info = json.loads(call("models", "two-digits", "--json", "--server", server.grpc).out)

    assert info["inputs"]["image"]["layout"] == "NCHW"
    assert info["sha256"] in text
    assert "integrated_gradients: supported" in text
    assert re.search(r" on cpu, up to \d+ rows together, \S+ ms a row\n", text)


def test_models_names_every_gap_of_one_and_what_to_do(tmp_path: Path) -> None:
    save(quantized_twice(), tmp_path / "quantized" / "1")
    lines = call("models", "quantized", "--models", tmp_path).out.splitlines()

    for name in ("first_gap", "second_gap"):
        (line,) = [line for line in lines if f" QuantizeLinear in {name}: " in line]
        assert re.match(r"no gradient +\w+ in \w+: .+; .+", line)


def test_models_and_inspect_name_the_outputs_of_a_detector_that_are_left_out(tmp_path: Path) -> None:
    write_detector(tmp_path, "detector")
    described = call("models", "detector", "--models", tmp_path)
    starter = call("inspect", tmp_path / "detector" / "1" / "model.onnx")

    for name in ("selected", "kept", "count"):
        assert re.search(f"^left out +output '{name}' lies behind .*'suppression'", described.out, re.MULTILINE)
        assert re.search(f"^# left out: output '{name}' lies behind .*'suppression'", starter.out, re.MULTILINE)
    assert [table["name"] for table in tomllib.loads(starter.out)["outputs"]] == ["boxes", "scores"]


def test_health_is_0_where_it_serves_and_1_elsewhere(server: Running) -> None:
    assert call("health", "--server", server.grpc) == Answer(0, "SERVING\n", "")
    assert call("health", "--server", server.grpc, "--service", "unknown").exit_code == 1
    assert call("health", "--server", "127.0.0.1:1").exit_code == 1


# inspect


def test_what_inspect_writes_is_a_configuration_that_serves(tmp_path: Path) -> None:
    file = tmp_path / "models" / "new" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    shutil.copy(MODEL_FOLDER / "two-digits" / "1" / "model.onnx", file)
    text = call("inspect", file).out
    starter = tomllib.loads(text)
    (tmp_path / "models" / "new" / "model.toml").write_text(text, encoding="utf-8")

    assert [table["name"] for table in starter["inputs"]] == ["image"]
    assert starter["inputs"][0]["shape"] == ["batch", 3, 64, 64]
    (entry,) = json.loads(call("models", "--models", tmp_path / "models", "--json").out)
    assert (entry["name"], entry["state"]) == ("new", "READY")


def test_inspect_as_json_tells_operators_and_inputs() -> None:
    found = json.loads(call("inspect", MODEL_FOLDER / "two-digits" / "1" / "model.onnx", "--json").out)

    assert found["operators"]["Conv"] == 4
    assert found["refusal"] is None
    assert found["signature"]["inputs"][0]["name"] == "image"
    assert tomllib.loads(found["starter"])["outputs"]


def test_inspect_of_a_file_that_cannot_be_served_says_why_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    answer = call("inspect", tmp_path / "model.onnx")

    assert answer.exit_code == 1
    assert re.match(r"error: [A-Z_]+: .+\n$", answer.err)
    assert answer.out == "", "what is no model has no model.toml"


def test_inspect_survives_a_file_that_crashes_the_libraries(tmp_path: Path) -> None:
    """Whichever file a library may have learned to refuse."""
    answers = [call("inspect", save(make(), tmp_path / name)) for name, make in CRASHERS.items()]

    assert [answer.exit_code for answer in answers] == [1] * len(CRASHERS)
    assert any(answer.err.startswith("error: MODEL_CRASHES: ") for answer in answers)


def test_inspect_limits_the_time_that_a_file_gets(tmp_path: Path) -> None:
    answer = call("inspect", save(endless(), tmp_path), "--trial-seconds", "1", "--json")

    assert answer.exit_code == 1
    assert json.loads(answer.out)["refusal"]["reason"] == "MODEL_LOAD_TIMEOUT"
    assert json.loads(answer.out)["sha256"], "what is known without reading the file is told"


@pytest.mark.parametrize(
    ("proto", "names"),
    [
        (quantized_twice(), ["first_gap", "second_gap"]),
        (quantized_within(), ["in_branch", "in_loop", "in_scan", "in_function__1"]),
    ],
    ids=["in the graph", "in bodies and functions"],
)
def test_inspect_names_every_gap_and_what_to_do(tmp_path: Path, proto: onnx.ModelProto, names: list[str]) -> None:
    answer = call("inspect", save(proto, tmp_path))

    assert answer.exit_code == 0, answer.err
    for name in names:
        (line,) = [
            line for line in answer.out.splitlines() if line.startswith(f"# no gradient: QuantizeLinear in {name}:")
        ]
        assert re.match(r"# no gradient: \w+ in \w+: .+; .+", line)
    assert tomllib.loads(answer.out)["outputs"], "it serves predictions"


def test_inspect_says_why_integers_have_no_gradient_as_models_does(tmp_path: Path) -> None:
    nodes = [node("ArgMax", ["x"], ["y"], axis=1, keepdims=0)]
    file = save(model(nodes, [("x", ["batch", 3])], [("y", ["batch"], TensorProto.INT64)]), tmp_path / "classes" / "1")

    assert "# no gradient: no output is floating-point" in call("inspect", file).out.splitlines()
    described = call("models", "classes", "--models", tmp_path).out
    assert re.search("^method +integrated_gradients: no output is floating-point$", described, re.MULTILINE)


# docs/command-line.md


@dataclass(frozen=True)
class Example:
    """A command of the page and the output that stands below it; `...` stands for any lines, or any text in a line."""

    command: str
    output: tuple[str, ...]


def examples(page: str) -> Iterator[Example]:
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
            command, *output = part.rstrip().split("\n")
            yield Example(command, tuple(output))


def skeleton(line: str) -> str:
    """Numbers of a line give way to #, runs of spaces to one; figures depend on the machine."""
    return " ".join(re.sub(r"(?<![\w.])-?\d[\d.e-]*(?![\w.])", "#", line).split())


def matches(documented: tuple[str, ...], actual: str) -> bool:
    lines = [".*" if line == "..." else re.escape(skeleton(line)).replace(r"\.\.\.", ".*") for line in documented]
    text = "\n".join(map(skeleton, actual.rstrip().split("\n")))
    return re.fullmatch("\n".join(lines), text, re.DOTALL) is not None


@pytest.fixture
def example_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page says there is, and `explainserve` and `python` as commands."""
    folder, programs = tmp_path / "folder", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()
    shutil.copytree(MODEL_FOLDER, folder / "models")
    save_image(folder / "two-digits.png")
    save_image(folder / "other.png", 1)
    save_image(folder / "large.png", 2, enlarged=2)
    for name, command in (("python", sys.executable), ("explainserve", f"{sys.executable} -m explainserve")):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("EXPLAINSERVE_PORT", "0")
    monkeypatch.setenv("EXPLAINSERVE_HTTP_PORT", "0")
    monkeypatch.chdir(folder)
    return folder


def test_every_example_of_the_page_does_what_it_says(example_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = examples(PAGE)
    assert first.command == "explainserve serve --models models"
    with serving(example_folder, example_folder / "log", command=first.command.split()) as running:
        lines = f"gRPC listening on {running.grpc}\nHTTP listening on {running.http}"
        assert [re.sub(r"\d+$", "#", line) for line in first.output] == re.sub(r"(?m)\d+$", "#", lines).split("\n")
        monkeypatch.setenv("EXPLAINSERVE_SERVER", running.grpc)
        for example in others:
            done = subprocess.run(
                ["/bin/sh", "-c", example.command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
            )
            assert done.returncode == 0, f"{example.command}\n{done.stdout}"
            assert matches(example.output, done.stdout), f"{example.command}\n{done.stdout}"
    assert {"nine.npz", "nine.json", "pictures.png", "model.toml"} <= {path.name for path in example_folder.iterdir()}


def test_the_page_names_every_command() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.split("## serve")[0], re.MULTILINE)) == set(COMMANDS)
    assert all(f"\n## {name}\n" in PAGE for name in ("serve", "predict", "explain", "inspect"))


@pytest.mark.parametrize("order", [("--server", "--models"), ("--models", "--server")], ids="-".join)
def test_a_server_and_a_folder_exclude_each_other(order: tuple[str, str]) -> None:
    values = {"--server": "127.0.0.1:1", "--models": str(MODEL_FOLDER)}

    answer = run("models", *(part for flag in order for part in (flag, values[flag])))

    assert answer.exit_code == 2
    assert "not both" in answer.err
