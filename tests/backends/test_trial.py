"""Whatever a file does to the process that loads it, it does to a process of its own; this one goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explainserve.backends import LoadOptions, trial, trial_process
from explainserve.backends.trial import TrialLimits, Trials
from explainserve.backends.trial_main import Task
from explainserve.backends.trial_process import TrialProcess
from explainserve.backends.tried import Tried
from explainserve.errors import ModelRefused
from explainserve.model_config import InputConfig, ModelConfig
from hostile_graphs import CRASHERS, divided, endless, plus
from onnx_graphs import linear, make_external, model, node, save

LIMITS = TrialLimits(seconds=120.0, memory_bytes=1 << 30)
OPTIONS = LoadOptions(thread_count=1)


@pytest.fixture
def trials() -> Iterator[Trials]:
    with Trials(LIMITS, Tried()) as running:
        yield running


def check(trials: Trials, path: Path, config: ModelConfig | None = None) -> None:
    files = trials.files(path) if path.suffix == ".onnx" else (path,)
    trials.check(files, path.read_bytes().hex(), config or ModelConfig(), OPTIONS)


def refusal(trials: Trials, path: Path) -> ModelRefused:
    with pytest.raises(ModelRefused) as caught:
        check(trials, path)
    return caught.value


def test_files_that_crash_the_libraries_are_refused_and_the_next_one_loads(trials: Trials, tmp_path: Path) -> None:
    """A library may learn to refuse one of the files; while it kills the process, that is what the refusal says."""
    good = save(linear(np.ones((3, 2), np.float32)), tmp_path / "good")
    refusals = []
    for name, crasher in CRASHERS.items():
        refusals.append(refusal(trials, save(crasher(), tmp_path / name)))
        check(trials, good)

    assert "MODEL_CRASHES" in [found.reason for found in refusals]


def test_a_file_that_needs_too_much_memory_is_refused(trials: Trials, tmp_path: Path) -> None:
    zeros = [node("ConstantOfShape", ["huge"], ["z"]), node("ReduceMax", ["z"], ["c"])]
    path = save(plus(zeros, huge=np.array([1 << 15, 1 << 15], np.int64)), tmp_path)

    found = refusal(trials, path)

    assert found.reason == "MODEL_LOAD_MEMORY"
    assert int(found.metadata["limit_bytes"]) == LIMITS.memory_bytes + 12 * path.stat().st_size


def test_a_file_that_needs_too_much_time_is_refused(tmp_path: Path) -> None:
    path = save(endless(), tmp_path)
    with Trials(TrialLimits(seconds=1.0, memory_bytes=1 << 30), Tried()) as trials:
        found = refusal(trials, path)

    assert found.reason == "MODEL_LOAD_TIMEOUT"
    assert found.metadata["seconds"] == "1"


@pytest.mark.torch
def test_a_script_without_an_end_is_refused(tmp_path: Path) -> None:
    import torch

    class Endless(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while bool(x.sum() == x.sum()):
                x = x + 1
            return x

    path = tmp_path / "model.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(Endless()), path)
    config = ModelConfig.model_validate(
        {kind: [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}] for kind in ("inputs", "outputs")}
    )
    with (
        Trials(TrialLimits(seconds=1.0, memory_bytes=1 << 30), Tried()) as trials,
        pytest.raises(ModelRefused) as found,
    ):
        check(trials, path, config)

    assert found.value.reason == "MODEL_LOAD_TIMEOUT"


def test_what_loading_refuses_comes_as_it_is(trials: Trials, tmp_path: Path) -> None:
    tmp_path.joinpath("model.onnx").write_bytes(b"\x0a" * 100)

    found = refusal(trials, tmp_path / "model.onnx")

    assert (found.reason, found.metadata) == ("MODEL_FILE_CORRUPT", {"file": "model.onnx"})
    assert found.message.startswith("model.onnx is truncated")


def test_external_data_belong_to_the_model(trials: Trials, tmp_path: Path) -> None:
    proto = linear(np.ones((3, 2), np.float32))
    make_external(proto.graph.initializer[0], location="weights.bin")
    path = save(proto, tmp_path)
    np.ones((3, 2), np.float32).tofile(tmp_path / "weights.bin")

    assert trials.files(path) == (path, tmp_path / "weights.bin")
    assert trials.files(path) == (path, tmp_path / "weights.bin"), "once more, now that the file is known"
    check(trials, path)


class TestTried:
    """What loaded once is not tried again."""

    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[TrialProcess]:
        """The processes that are started."""
        found: list[TrialProcess] = []

        def start() -> TrialProcess:
            found.append(TrialProcess())
            return found[-1]

        monkeypatch.setattr(trial, "TrialProcess", start)
        return found

    def test_by_this_process(self, started: list[TrialProcess], tmp_path: Path) -> None:
        path, tried = save(linear(np.ones((3, 2), np.float32)), tmp_path), Tried()
        for _ in range(2):
            with Trials(LIMITS, tried) as trials:
                check(trials, path)

        assert len(started) == 1

    def test_by_another_process_with_the_same_folder(self, started: list[TrialProcess], tmp_path: Path) -> None:
        path = save(linear(np.ones((3, 2), np.float32)), tmp_path)
        for _ in range(2):
            with Trials(LIMITS, Tried(tmp_path / "cache" / "tried")) as trials:
                check(trials, path)

        assert len(started) == 1

    def test_a_changed_file_or_configuration_is_tried(self, started: list[TrialProcess], tmp_path: Path) -> None:
        path, tried = save(linear(np.ones((3, 2), np.float32)), tmp_path), Tried()
        ranged = ModelConfig(inputs=(InputConfig(name="x", value_range=(0.0, 1.0)),))
        with Trials(LIMITS, tried) as trials:
            check(trials, path)
        with Trials(LIMITS, tried) as trials:
            check(trials, path, ranged)
        with Trials(LIMITS, tried) as trials:
            check(trials, save(linear(np.zeros((3, 2), np.float32)), tmp_path))

        assert len(started) == 3

    def test_a_refused_file_is_tried_again(self, started: list[TrialProcess], tmp_path: Path) -> None:
        tmp_path.joinpath("model.onnx").write_bytes(b"\x0a" * 100)
        tried = Tried()
        for _ in range(2):
            with Trials(LIMITS, tried) as trials:
                refusal(trials, tmp_path / "model.onnx")

        assert len(started) == 2

    def test_files_share_a_process_until_one_dies(self, started: list[TrialProcess], tmp_path: Path) -> None:
        """A crash is the fault of a file only where no other file was read before it."""
        with Trials(LIMITS, Tried()) as trials:
            for scale in (1, 2):
                check(trials, save(linear(np.full((3, 2), scale, np.float32)), tmp_path / str(scale)))
            assert len(started) == 1
            found = refusal(trials, save(divided(), tmp_path / "crash"))

        assert found.reason == "MODEL_CRASHES"
        assert len(started) == 2

    def test_a_folder_that_cannot_be_written_costs_only_trials(self, tmp_path: Path, caplog: Any) -> None:
        tmp_path.joinpath("taken").write_text("a file")
        tried = Tried(tmp_path / "taken" / "tried")
        tried.add("key")

        assert "key" in tried
        assert "cannot be written" in caplog.text


class TestPatience:
    """What a process waits for a processor is not held against its file."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Seconds by the clock, and in line by thread."""
        now: dict[str, Any] = {"clock": 0.0, "in line": {}}
        monkeypatch.setattr(trial_process.time, "monotonic", lambda: now["clock"])
        monkeypatch.setattr(trial_process, "_seconds_in_line", lambda pid: dict(now["in line"]))
        return now

    def test_time_in_line_does_not_count(self, clock: dict[str, Any]) -> None:
        clock["in line"] = {"old": 100.0}
        patience = trial_process.Patience(1, 10.0)
        clock["clock"], clock["in line"] = 12.0, {"old": 105.0, "new": 4.0}

        assert patience.left() == 3.0

    def test_what_a_thread_waited_that_has_ended_does_not_count_either(self, clock: dict[str, Any]) -> None:
        patience = trial_process.Patience(1, 10.0)
        clock["clock"], clock["in line"] = 6.0, {"short": 5.0}
        patience.left()
        clock["clock"], clock["in line"] = 7.0, {}

        assert patience.left() == 8.0

    def test_it_has_an_end_by_the_clock(self, clock: dict[str, Any]) -> None:
        patience = trial_process.Patience(1, 10.0)
        clock["clock"], clock["in line"] = 99.0, {"1": 98.0}
        assert patience.left() == 1.0

        clock["clock"], clock["in line"] = 101.0, {"1": 100.0}
        assert patience.left() < 0

    @pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
    def test_processes_on_one_processor_wait_for_each_other(self) -> None:
        spin = ["taskset", "-c", "0", sys.executable, "-c", "while True: pass"]
        spinning = [subprocess.Popen(spin) for _ in range(3)]
        patience = trial_process.Patience(spinning[0].pid, 60.0)
        time.sleep(2.0)
        left = patience.left()
        for process in spinning:
            process.kill()
            process.wait()

        assert left > 58.5


def test_a_process_that_the_system_ends_did_not_reach_its_limit(
    tmp_path: Path,
) -> None:
    process = TrialProcess()

    def end_once_it_reads_the_file() -> None:
        limits = Path(f"/proc/{process.pid}/limits")
        while re.search("Max cpu time +unlimited", limits.read_text()):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)

    threading.Thread(target=end_once_it_reads_the_file).start()
    with pytest.raises(ModelRefused, match="no memory left; the limit of 1073741824 bytes was not the reason") as found:
        process.answer(Task("load", save(endless(), tmp_path), ModelConfig(), OPTIONS, 60.0, 1 << 30))
    process.kill()

    assert found.value.reason == "MODEL_LOAD_MEMORY"


class TestProcess:
    @pytest.fixture
    def process(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TrialProcess]:
        """One that has answered, started while this process has a secret and an open file."""
        monkeypatch.setenv("CLOUD_SECRET", "hunter2")
        path = save(linear(np.ones((3, 2), np.float32)), tmp_path)
        with tmp_path.joinpath("private").open("w") as private:
            os.set_inheritable(private.fileno(), True)
            started = TrialProcess()
            started.answer(Task("load", path, ModelConfig(), OPTIONS, 60.0, 1 << 30))
            yield started
            started.kill()

    def test_it_has_no_secret_no_open_file_and_leaves_no_core(self, process: TrialProcess) -> None:
        proc = Path("/proc") / str(process.pid)

        assert b"CLOUD_SECRET" not in proc.joinpath("environ").read_bytes()
        assert not [link for link in proc.joinpath("fd").iterdir() if str(link.readlink()).endswith("private")]
        core = next(line for line in proc.joinpath("limits").read_text().splitlines() if line.startswith("Max core"))
        assert core.split()[4] == "0"

    def test_what_libraries_print_is_no_answer(self, tmp_path: Path) -> None:
        """onnxruntime prints an error for each evaluation that fails."""
        gather = model([node("Gather", ["x", "i"], ["y"])], [("x", [1, 3])], [("y", [1, 3])], {"i": np.array([9])})
        process = TrialProcess()
        with pytest.raises(ModelRefused) as found:
            process.answer(Task("load", save(gather, tmp_path), ModelConfig(), OPTIONS, 60.0, 1 << 30))
        process.kill()

        assert found.value.reason == "PROBE_FAILED"

    def test_one_that_does_not_start_is_not_the_fault_of_the_file(
        self, monkeypatch: pytest.MonkeyPatch, trials: Trials, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")

        assert refusal(trials, save(linear(np.ones((3, 2), np.float32)), tmp_path)).reason == "TRIAL_NOT_STARTED"

    def test_it_ends_with_its_parent(self, tmp_path: Path) -> None:
        path = save(endless(), tmp_path)
        code = (
            "import sys; from pathlib import Path; from explainserve.backends.trial_process import *\n"
            "from explainserve.backends.contract import LoadOptions\n"
            "from explainserve.model_config import ModelConfig\n"
            "process = TrialProcess(); print(process.pid, flush=True)\n"
            "process.answer(Task('load', Path(sys.argv[1]), ModelConfig(), LoadOptions(), 60.0, 1 << 30))"
        )
        command = [sys.executable, "-c", code, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            while b"trial_main" not in Path(f"/proc/{child}/cmdline").read_bytes():
                time.sleep(0.05)
            parent.send_signal(signal.SIGKILL)

        deadline = time.monotonic() + 60.0
        while running(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running(child)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
