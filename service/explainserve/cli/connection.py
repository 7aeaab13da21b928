"""Where commands find their server: one that runs, or one of their own for as long as they run."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from explainserve.cli.failures import fail

if TYPE_CHECKING:
    from explainserve_client import Client

DEFAULT_SERVER = "127.0.0.1:8001"
_READY = "gRPC listening on "
_STOP_SECONDS = 10.0


def _alone(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Refuses --server together with --models; whichever is read second sees the first."""
    other = "models" if parameter.name == "server" else "server"
    if _stated(context, str(parameter.name)) and _stated(context, other):
        raise typer.BadParameter("give --server or --models, not both")
    return value


def _stated(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


ServerOption = Annotated[
    str,
    typer.Option("--server", metavar="HOST:PORT", envvar="EXPLAINSERVE_SERVER", help="Server to ask.", callback=_alone),
]
ModelsOption = Annotated[
    Path | None,
    typer.Option(
        "--models",
        metavar="DIR",
        exists=True,
        file_okay=False,
        callback=_alone,
        help="Ask no running server: start one of this model folder on a free loopback port, for this command only.",
    ),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Seconds that one call may take.")
]


@contextmanager
def connected(server: str, models: Path | None, timeout: float) -> Iterator[Client]:
    """A client of the server, or of one that is started for the folder and stopped afterwards."""
    from explainserve_client import Client

    if models is None:
        with Client(server, timeout=timeout) as client:
            yield client
        return
    with _own_server(models) as address, Client(address, timeout=timeout) as client:
        yield client


@contextmanager
def _own_server(models: Path) -> Iterator[str]:
    """Runs `explainserve serve` on a free loopback port and yields its address."""
    command = [sys.executable, "-P", "-m", "explainserve", "serve", "--models", str(models), "--host", "127.0.0.1"]
    command += ["--port", "0", "--http-port", "0", "--grace", "0"]
    with tempfile.TemporaryFile("w+") as log, _terminated_as_exit(), ExitStack() as stack:
        with _signals_deferred():
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
            stack.callback(_stop, child)
        yield _address(child, log)


def _address(child: subprocess.Popen[str], log: IO[str]) -> str:
    """Waits for the line that says where it listens; the output ends early when it fails."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(_READY):
            return line.removeprefix(_READY).strip()
    log.seek(0)
    lines = log.read().splitlines()
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    raise fail(f"the server did not start: {reason.removeprefix('error: ')}")


def _stop(child: subprocess.Popen[str]) -> None:
    with _signals_deferred():
        child.terminate()
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end: an exception in between would lose sight of the child."""
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for arrival in arrived:
            signal.raise_signal(arrival)


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Lets SIGTERM unwind, so that the child is stopped too."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
