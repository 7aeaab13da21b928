"""`explainserve serve`: runs a server until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from explainserve.cli.failures import fail

if TYPE_CHECKING:
    import structlog

    from explainserve.settings import Settings

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_FLAGS = {"thread_count": "--threads", "grace_seconds": "--grace", "default_timeout_seconds": "--default-timeout"}


class LogFormat(StrEnum):
    """How log lines look."""

    JSON = "json"
    CONSOLE = "console"


def flag(setting: str) -> str:
    """The flag of a field of `Settings`."""
    return _FLAGS.get(setting, f"--{setting.replace('_', '-')}")


def _knob(setting: str, text: str, metavar: str = "N", **options: Any) -> Any:
    return typer.Option(flag(setting), envvar=f"EXPLAINSERVE_{setting.upper()}", help=text, metavar=metavar, **options)


def serve(
    models: Annotated[Path, _knob("models", "Model folder: NAME/VERSION/model.onnx, .pt2 or .pt.", "DIR")] = Path(
        "models"
    ),
    host: Annotated[str, _knob("host", "Address to listen on, for gRPC and HTTP.", "ADDRESS")] = "127.0.0.1",
    port: Annotated[int, _knob("port", "gRPC port; 0 picks a free one.", min=0, max=65535)] = 8001,
    http_port: Annotated[
        int, _knob("http_port", "Port of /metrics, /livez and /readyz; 0 picks a free one.", min=0, max=65535)
    ] = 8002,
    device: Annotated[
        list[str],
        _knob(
            "device",
            "Where models are evaluated: cpu, cuda, tensorrt (each also with :N) or openvino. Repeat it for several, "
            "each with a queue of its own; cuda is all CUDA devices that there are.",
            "DEVICE",
        ),
    ] = ["cpu"],  # noqa: B006  # typer copies it
    allow_device_fallback: Annotated[
        bool,
        _knob("allow_device_fallback", "Evaluate on the CPU where the device is missing, instead of refusing models."),
    ] = False,
    thread_count: Annotated[int, _knob("thread_count", "Threads of one evaluation; 0 means all cores.", min=0)] = 0,
    share_weights: Annotated[
        bool,
        _knob("share_weights", "Hold the weights of an ONNX model once for all of its graphs, at some speed."),
    ] = False,
    max_batch_rows: Annotated[
        int, _knob("max_batch_rows", "Most rows evaluated together, where a model states no limit of its own.", min=1)
    ] = 64,
    warm_up_seconds: Annotated[
        float,
        _knob(
            "warm_up_seconds",
            "Seconds per model at load to find out how many rows together are fastest; 0 does without.",
            "SECONDS",
            min=0,
        ),
    ] = 10.0,
    max_step_count: Annotated[
        int, _knob("max_step_count", "Most gradient evaluations of one path that a request may ask for.", min=1)
    ] = 512,
    max_request_rows: Annotated[int, _knob("max_request_rows", "Most rows of one request.", min=1)] = 65_536,
    max_request_parts: Annotated[
        int, _knob("max_request_parts", "Most targets, baselines, regions, groups and selectors of one request.", min=1)
    ] = 4096,
    max_waiting_rows: Annotated[
        int, _knob("max_waiting_rows", "Most rows that the requests of one device together may still need.", min=1)
    ] = 262_144,
    max_waiting_bytes: Annotated[
        int,
        _knob(
            "max_waiting_bytes",
            "Most memory that all admitted requests together may hold: inputs, baselines, maps, gradients of paths, "
            "and messages until they are sent.",
            min=1,
        ),
    ] = 4 * 1024 * 1024 * 1024,
    max_message_bytes: Annotated[
        int, _knob("max_message_bytes", "Largest request and largest reply, in bytes.", min=1)
    ] = 64 * 1024 * 1024,
    max_instances: Annotated[int, _knob("max_instances", "Most instances of one request.", min=1)] = 256,
    response_cache_bytes: Annotated[
        int,
        _knob("response_cache_bytes", "Memory for answers that are kept for equal requests; 0 keeps none.", min=0),
    ] = 0,
    allow_model_control: Annotated[
        bool,
        _knob("allow_model_control", "Let clients load and unload models: whoever reaches the server can."),
    ] = False,
    watchdog_seconds: Annotated[
        float,
        _knob(
            "watchdog_seconds",
            "Seconds after which a micro-batch is ended as one that hangs, or 20 times what those of its model take "
            "where that is longer; 0 lets it take for ever.",
            "SECONDS",
            min=0,
        ),
    ] = 60.0,
    grace_seconds: Annotated[
        float,
        _knob(
            "grace_seconds", "Seconds that running requests get to finish after SIGTERM or SIGINT.", "SECONDS", min=0
        ),
    ] = 30.0,
    default_timeout_seconds: Annotated[
        float,
        _knob(
            "default_timeout_seconds", "Seconds for requests that come without a deadline; above 0.", "SECONDS", min=0
        ),
    ] = 600.0,
    trial_seconds: Annotated[
        float,
        _knob(
            "trial_seconds",
            "Seconds, and one more for each 10 MB, that an unknown model file gets in the process that tries it before "
            "the server loads it; 0 loads files without a trial.",
            "SECONDS",
            min=0,
        ),
    ] = 60.0,
    trial_memory_bytes: Annotated[
        int,
        _knob("trial_memory_bytes", "Memory that it gets there, and 12 more for each byte of the file.", min=1),
    ] = 4 * 1024 * 1024 * 1024,
    compile_seconds: Annotated[
        float,
        _knob(
            "compile_seconds",
            "Seconds that compiling a .pt2 model may take, where its model.toml asks for it; 0 compiles none.",
            "SECONDS",
            min=0,
        ),
    ] = 600.0,
    cache: Annotated[
        Path | None,
        _knob(
            "cache",
            "Folder that keeps gradient graphs, compiled code, and which files were tried, for the next start.",
            "DIR",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, _knob("log_format", "Log lines on standard error.", "json|console")
    ] = LogFormat.JSON,
) -> None:
    """Serve the models of a folder.

    Prints `gRPC listening on ADDRESS:PORT` and `HTTP listening on ADDRESS:PORT` on standard output once it is ready.
    Before, while models load, it answers that it is not: the health service, ListModels, /readyz. When told to stop it
    admits nothing new, gives running requests the grace period, and exits with 0; a second signal ends it at once. A
    model that cannot be served is logged and listed by `explainserve models`; the others are served.
    """
    settings = _settings(dict(locals()))
    from explainserve import logs

    log = logs.configure(settings.log_format)
    try:
        asyncio.run(_run(settings, log))
    except (OSError, RuntimeError) as error:
        if not _is_bind_failure(error):
            raise
        addresses = f"gRPC {settings.host}:{settings.port}, HTTP {settings.host}:{settings.http_port}"
        raise fail(f"cannot listen on {addresses}: {error}") from error


def _settings(flags: dict[str, Any]) -> Settings:
    """Flags, which typer filled from the environment and defaults, validated once more as the server's settings."""
    from pydantic import ValidationError

    from explainserve.settings import Settings

    flags["log_format"] = flags["log_format"].value
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(
            f"{first['input']!r}: {first['msg']}", param_hint=flag(str(first["loc"][0]))
        ) from error


async def _run(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        _on_signal(loop, os._exit, 128 + signal.SIGTERM)
        log.info("stopping", grace_seconds=settings.grace_seconds)
        stopped.set()

    _on_signal(loop, stop)
    from explainserve.rpc.server import Server  # takes seconds, and a signal may come meanwhile

    server = Server(settings, log)
    await server.listen()
    loading, stopping = asyncio.create_task(server.load()), asyncio.create_task(stopped.wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        loading.result()
        typer.echo(f"gRPC listening on {settings.host}:{server.port}")
        typer.echo(f"HTTP listening on {settings.host}:{server.http_port}")
    await server.serve_until(stopped.wait)
    _leave()


def _leave() -> NoReturn:
    """Ends the process now: threads still at work for requests that were ended cannot be stopped, only left."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _on_signal(loop: asyncio.AbstractEventLoop, callback: Any, *arguments: object) -> None:
    for number in _STOPPING:
        loop.add_signal_handler(number, callback, *arguments)


def _is_bind_failure(error: OSError | RuntimeError) -> bool:
    """grpc says so with a plain RuntimeError."""
    return isinstance(error, OSError) or "bind" in str(error).lower()
