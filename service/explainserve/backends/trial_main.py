"""What runs in the process that tries model files. Whatever a file does here, it does to this process alone.

It reads tasks from standard input and writes how each went to standard output, both as a length and so many bytes.
Tasks are pickled, for they come from the server; answers are JSON, for they come from a process that has read an
unknown file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import pickle
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from explainserve.backends import load, loader, probe
from explainserve.backends.contract import LoadOptions
from explainserve.errors import ExplainServeError, first_line, is_out_of_memory
from explainserve.model_config import ModelConfig

LENGTH_BYTES = 8
"""Bytes of the length before each message, big-endian."""

_PR_SET_PDEATHSIG = 1

Answer = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What to try.

    Attributes:
        step: "files" finds the files that belong to the model, "load" loads and evaluates it as a server does,
            "inspect" loads it as `explainserve inspect` does, "compile" keeps the code of a `.pt2` file in the cache.
        seconds: processor time on each core.
        memory_bytes: how much this process may grow; no file that it writes may be larger either.
    """

    step: str
    path: Path
    config: ModelConfig
    options: LoadOptions
    seconds: float
    memory_bytes: int


def main(parent: int) -> None:
    """Answers tasks until there are no more: first that the libraries are imported, then how it went.

    Args:
        parent: number of the process that asks.
    """
    answers = _private_output()
    _be_expendable(parent)
    while length := sys.stdin.buffer.read(LENGTH_BYTES):
        task = pickle.loads(sys.stdin.buffer.read(int.from_bytes(length, "big")))
        for answer in _answers(task):
            _send(answers, answer)


def _private_output() -> BinaryIO:
    """Standard output for answers alone: what libraries print there goes to standard error from now on."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return stream


def _be_expendable(parent: int) -> None:
    """Ends with its parent, is the first to be killed when the machine runs out of memory, and leaves nothing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the system was asked to tell
        os._exit(0)
    with contextlib.suppress(OSError):  # some sandboxes have no such file
        Path("/proc/self/oom_score_adj").write_text("1000")
    _set_limit(resource.RLIMIT_CORE, 0)


def _answers(task: Task) -> Iterator[Answer]:
    try:
        loader(task.path.suffix)
    except ExplainServeError as error:
        yield _refused(error.reason, error.message, error.metadata)
        return
    yield {"ready": True}
    _set_limit(resource.RLIMIT_FSIZE, task.memory_bytes)
    _set_limit(resource.RLIMIT_DATA, _data_bytes() + task.memory_bytes)
    _set_limit(resource.RLIMIT_CPU, math.ceil(_processor_seconds() + task.seconds * len(os.sched_getaffinity(0))))
    yield _outcome(task)


def _outcome(task: Task) -> Answer:
    try:
        return {"files": [str(path) for path in _tried(task)]}
    except MemoryError as error:
        return {"exhausted": first_line(error)}
    except ExplainServeError as error:
        if is_out_of_memory(error):
            return {"exhausted": error.message}
        return _refused(error.reason, error.message, error.metadata)
    except Exception as error:  # whatever a library raises on a bad file
        if is_out_of_memory(error):
            return {"exhausted": first_line(error)}
        return _refused("LOAD_FAILED", f"{type(error).__name__}: {first_line(error)}", {})


def _tried(task: Task) -> Iterable[Path]:
    """Does what the parent is going to do, and returns the files that belong to the model where it asked for them."""
    if task.step == "files":
        from explainserve.backends import onnx_file

        return onnx_file.files(task.path)
    if task.step == "compile":
        from explainserve.backends import torch_export

        torch_export.compile_into_cache(task.path, task.config, task.options)
        return ()
    loaded = load(task.path, task.config, task.options)
    if task.step == "load":
        probe.check(loaded)
    return ()


def _refused(reason: str, message: str, metadata: dict[str, str]) -> Answer:
    return {"reason": reason, "message": message, "metadata": metadata}


def _send(stream: BinaryIO, answer: Answer) -> None:
    content = json.dumps(answer).encode()
    stream.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    stream.flush()


def _set_limit(kind: int, value: int) -> None:
    """Lowers or raises a limit, within what the system allows this process at all."""
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA: private memory that can be written, touched or not. Address space that a driver
    or an allocator merely reserves does not count, so the limit can be kept on every device.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
