"""Logs: JSON lines for machines or text for people, on standard error, with the request id where there is one."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

import structlog
from structlog.typing import Processor

LogFormat = Literal["json", "console"]


def configure(log_format: LogFormat, stream: TextIO | None = None) -> structlog.stdlib.BoundLogger:
    """Sends this process's structured logs, and those of libraries that use `logging`, to one stream in one format.

    Every line has `event`, `level` and `timestamp` (ISO 8601, UTC), and whatever is bound with
    `structlog.contextvars.bind_contextvars`, such as `request_id`. Warnings of Python become lines too.

    Args:
        log_format: "json", one object a line; or "console", colored where the stream is a terminal.
        stream: standard error by default; standard output belongs to what commands print.
    """
    chosen = sys.stderr if stream is None else stream
    renderers = _renderers(log_format, chosen)
    structlog.configure(
        processors=[*_shared(), *renderers],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.WriteLoggerFactory(chosen),
        cache_logger_on_first_use=False,
    )
    _configure_libraries(renderers, chosen)
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    return log


def _shared() -> list[Processor]:
    """What every line gets, whoever wrote it."""
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _renderers(log_format: LogFormat, stream: TextIO) -> list[Processor]:
    if log_format == "console":
        return [structlog.dev.ConsoleRenderer(colors=stream.isatty())]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str, ensure_ascii=False)]


def _configure_libraries(renderers: list[Processor], stream: TextIO) -> None:
    """Lines of `logging` (grpc and asyncio report their failures there) in the same format, from WARNING on."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*_shared(), structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
