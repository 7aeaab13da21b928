"""A process that tries model files, seen from its parent: tasks go in, answers come out, or it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from explainserve.backends.trial_main import LENGTH_BYTES, Answer, Task
from explainserve.errors import ModelRefused

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Time to start and to import the libraries, which is not the file's fault."""

LONGEST = 10.0
"""How many times its seconds a file may take by the clock, where other processes keep its own from running."""

_MAIN = "import sys; from explainserve.backends.trial_main import main; main(int(sys.argv[1]))"
_MAX_ANSWER_BYTES = 1 << 20
_QUOTED_BYTES = 4096
_ENVIRONMENT = frozenset(
    {
        "PATH",
        "CXX",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "MALLOC_ARENA_MAX",
    }
)
_ENVIRONMENT_OF_LIBRARIES = (
    "LC_",
    "OMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "ORT_",
    "CUDA_",
    "NVIDIA_",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
)


class Patience:
    """How long a process is waited for: `seconds` in which it could run, and by the clock LONGEST times as many.

    On a busy machine a process stands in line for a processor, through no fault of its file. The longest line that one
    of its threads stood in does not count; where the system does not tell it, all time counts.
    """

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid, self._seconds = pid, seconds
        self._started, self._before, self._in_line = time.monotonic(), _seconds_in_line(pid), 0.0

    def left(self) -> float:
        """Seconds that may pass before it is asked again; none where patience has ended."""
        elapsed = time.monotonic() - self._started
        lines = (now - self._before.get(thread, 0.0) for thread, now in _seconds_in_line(self._pid).items())
        self._in_line = max(self._in_line, *lines, 0.0)
        return min(self._seconds - (elapsed - self._in_line), LONGEST * self._seconds - elapsed)


class TrialProcess:
    """Starts at once and imports libraries with its first task. It gets no open file of its parent, and of its
    environment only what libraries need, so no secrets.

    Attributes:
        read: the files that it has been given.
    """

    def __init__(self) -> None:
        self.read: set[Path] = set()
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=_environment(),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def answer(self, task: Task) -> Answer:
        """Does a task.

        Raises:
            ModelRefused: what the task raised there; or the process did not start (TRIAL_NOT_STARTED), died of the file
                (MODEL_CRASHES), took longer than it may (MODEL_LOAD_TIMEOUT) or needed more memory (MODEL_LOAD_MEMORY).
        """
        self.read.add(task.path)
        try:
            self._send(task)
            answer = self._received(START_SECONDS)
        except (EOFError, TimeoutError) as error:
            raise self._not_started(error) from error
        try:
            answer = self._received(task.seconds) if "ready" in answer else answer
        except TimeoutError as error:
            raise _timeout(task) from error
        except EOFError as error:
            raise self._death(task) from error
        if "exhausted" in answer:
            raise _exhausted(task, answer["exhausted"])
        if "reason" in answer:
            raise ModelRefused.told(answer["reason"], answer["message"], answer["metadata"])
        return answer

    def kill(self) -> None:
        """Ends it now, and the compilers that it may have started, whatever they are at."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.communicate()
        self._printed.close()

    def _send(self, task: Task) -> None:
        content = pickle.dumps(task)
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
            stream.flush()
        except BrokenPipeError as error:
            raise EOFError from error

    def _received(self, seconds: float) -> Answer:
        patience = Patience(self.pid, seconds)
        length = int.from_bytes(self._bytes(LENGTH_BYTES, patience), "big")
        if length > _MAX_ANSWER_BYTES:
            raise EOFError
        answer: Answer = json.loads(self._bytes(length, patience))
        return answer

    def _bytes(self, count: int, patience: Patience) -> bytes:
        """Exactly so many bytes of its answers. Raises EOFError, or TimeoutError."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        content = b""
        while len(content) < count:
            while not poll.poll(max(0.0, left := patience.left()) * 1000):
                if left <= 0.0:
                    raise TimeoutError
            part = os.read(pipe, count - len(content))
            if not part:
                raise EOFError
            content += part
        return content

    def _not_started(self, error: Exception) -> ModelRefused:
        how = "took too long" if isinstance(error, TimeoutError) else f"ended with {self._ending()[0]}"
        return ModelRefused(
            "TRIAL_NOT_STARTED",
            f"the process that tries files {how} before it read the file: {self._last_line()}",
        )

    def _death(self, task: Task) -> ModelRefused:
        """What the process died of."""
        ending, code = self._ending()
        logger.warning("the process that tried %s ended with %s\n%s", task.path.name, ending, self._tail())
        if code == -signal.SIGXCPU:
            return _timeout(task)
        if code == -signal.SIGABRT and "bad_alloc" in self._tail():
            return _exhausted(task, f"it was ended by {ending}")
        if code == -signal.SIGKILL:
            return _killed(task)
        return ModelRefused(
            "MODEL_CRASHES",
            f"{task.path.name} crashes the libraries that load and evaluate it: a process that tried it ended with "
            f"{ending}",
            file=task.path.name,
            signal=ending,
        )

    def _ending(self) -> tuple[str, int]:
        """Name and number: SIGSEGV and -11, or "exit code 1" and 1."""
        try:
            code = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            return "an answer that is none", 0
        return (signal.Signals(-code).name if code < 0 else f"exit code {code}"), code

    def _tail(self) -> str:
        """The end of what it printed."""
        size = os.fstat(self._printed.fileno()).st_size
        return os.pread(self._printed.fileno(), _QUOTED_BYTES, max(0, size - _QUOTED_BYTES)).decode(errors="replace")

    def _last_line(self) -> str:
        return (self._tail().strip().splitlines() or ["it printed nothing"])[-1]


def _timeout(task: Task) -> ModelRefused:
    return ModelRefused(
        "MODEL_LOAD_TIMEOUT",
        f"{task.path.name} was not loaded and evaluated within {task.seconds:.0f} s in a process of its own, not "
        "counting those in which it waited for a processor; where that is to be expected of it, raise --trial-seconds",
        file=task.path.name,
        seconds=f"{task.seconds:.0f}",
    )


def _exhausted(task: Task, why: str) -> ModelRefused:
    return ModelRefused(
        "MODEL_LOAD_MEMORY",
        f"{task.path.name} needs more than {task.memory_bytes} bytes to be loaded and evaluated ({why}); where that is "
        "to be expected of it, raise --trial-memory-bytes",
        file=task.path.name,
        limit_bytes=task.memory_bytes,
    )


def _killed(task: Task) -> ModelRefused:
    """Limits end a process otherwise, so that it was the system."""
    return ModelRefused(
        "MODEL_LOAD_MEMORY",
        f"the system ended the process that tried {task.path.name} with SIGKILL, as it does where a machine or "
        f"container has no memory left; the limit of {task.memory_bytes} bytes was not the reason",
        file=task.path.name,
        limit_bytes=task.memory_bytes,
    )


def _seconds_in_line(pid: int) -> dict[str, float]:
    """By thread of a process, for how long it was ready to run and did not."""
    found = {}
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                found[thread.name] = int(thread.joinpath("schedstat").read_text().split()[1]) / 1e9
    return found


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_OF_LIBRARIES)
    }
    return kept | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "PYTHONFAULTHANDLER": "1"}
