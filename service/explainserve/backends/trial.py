"""A file that was never loaded here is first tried in a process of its own.

Reading a model runs much native code on bytes that anyone may have written: protobuf, ONNX's checker and shape
inference, the runtime's graph optimizer, its kernels. Each has crashed on some file, and a crash takes the whole server
with it. So a process with limits on memory and time goes through all that the server is about to do; when it dies, the
file is refused with what it died of, and the next one gets a fresh process. This contains accidents; it is no sandbox
against a file that takes the process over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from explainserve.backends.contract import LoadOptions
from explainserve.backends.trial_main import Answer, Task
from explainserve.backends.trial_process import TrialProcess
from explainserve.backends.tried import Tried, file_key, model_key
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig

FATAL = frozenset({"MODEL_CRASHES", "MODEL_LOAD_TIMEOUT", "MODEL_LOAD_MEMORY", "TRIAL_NOT_STARTED"})
"""Reasons of a refusal after which the file must not be touched here."""

_BYTES_PER_SECOND = 10_000_000
"""Size of a file that gets one more second."""

_MEMORY_PER_BYTE = 12
"""Copies of a file's weights: as read, as handed to the runtime, in its sessions, and again for gradients."""


@dataclass(frozen=True)
class TrialLimits:
    """What the trial of a file may take.

    Attributes:
        seconds: in which it can run, and one more for each 10 MB of the model; see `trial_process.Patience`.
        memory_bytes: of private memory beyond that of the imported libraries, and 12 more for each byte of the model.
    """

    seconds: float
    memory_bytes: int


class Trials:
    """Tries model files, one at a time, in a process that is started when the first unknown file comes.

    A context manager; at its end the process ends. Used by one thread.

    Args:
        tried: the files that are known to load.
    """

    def __init__(self, limits: TrialLimits, tried: Tried) -> None:
        self._limits = limits
        self._tried = tried
        self._process: TrialProcess | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def files(self, path: Path) -> tuple[Path, ...]:
        """An ONNX file, then the external data that it names; see `onnx_file.files`.

        Raises:
            ModelRefused: see `onnx_file.files` and `check`.
        """
        key = file_key(path)
        if key not in self._tried:
            answer = self._answer(self._task("files", (path,), ModelConfig(), LoadOptions()))
            self._tried.add(key)
            return tuple(Path(file) for file in answer["files"])
        from explainserve.backends import onnx_file  # servers of torch models have no onnx

        return onnx_file.files(path)

    def check(
        self, files: Sequence[Path], sha256: str, config: ModelConfig, options: LoadOptions, step: str = "load"
    ) -> None:
        """Passes a model that another process could load, and whose rows it could evaluate.

        Args:
            files: the model file, then those that belong to it.
            sha256: of all of them.
            step: "load" or "inspect"; see `trial_main.Task`.

        Raises:
            ModelRefused: what loading and probing raise, and what `TrialProcess.answer` does.
        """
        key = model_key(sha256, config, options, step)
        if key not in self._tried:
            self._answer(self._task(step, files, config, replace(options, compile_seconds=0)))
            self._tried.add(key)

    def _task(self, step: str, files: Sequence[Path], config: ModelConfig, options: LoadOptions) -> Task:
        size = sum(file.stat().st_size for file in files)
        seconds = self._limits.seconds + size / _BYTES_PER_SECOND
        memory_bytes = self._limits.memory_bytes + _MEMORY_PER_BYTE * size
        return Task(step, files[0].absolute(), config, options, seconds, memory_bytes)

    def _answer(self, task: Task) -> Answer:
        """How a task went. A crash counts only in a process that has read no other file, whose fault it might be."""
        if self._process is not None and not self._process.read <= {task.path}:
            try:
                return self._answer_of_process(task)
            except ModelRefused as refusal:
                if refusal.reason != "MODEL_CRASHES":
                    raise
        return self._answer_of_process(task)

    def _answer_of_process(self, task: Task) -> Answer:
        self._process = self._process or TrialProcess()
        try:
            return self._process.answer(task)
        except ModelRefused as refusal:
            if refusal.reason in FATAL:
                self._end()
            raise

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None
