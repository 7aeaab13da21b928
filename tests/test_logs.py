"""Log lines: one JSON object or one line of text each, with the request id, for our own logs and those of libraries."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog

from explainserve import logs


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_a_json_object_with_event_level_and_utc_time() -> None:
    stream = io.StringIO()
    logs.configure("json", stream).info("rpc", method="Explain", seconds=0.5, path=object)

    (line,) = lines(stream)
    assert (line["event"], line["level"], line["method"], line["seconds"]) == ("rpc", "info", "Explain", 0.5)
    assert datetime.fromisoformat(line["timestamp"]).tzinfo == UTC


def test_the_bound_request_id_is_on_every_line_until_it_is_unbound() -> None:
    stream = io.StringIO()
    log = logs.configure("json", stream)
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        log.info("inside")
        logging.getLogger("library").warning("of a library")
    log.info("outside")

    assert [line.get("request_id") for line in lines(stream)] == ["r-1", "r-1", None]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_exceptions_carry_their_traceback(log_format: logs.LogFormat) -> None:
    stream = io.StringIO()
    log = logs.configure(log_format, stream)
    try:
        raise ValueError("broken")
    except ValueError as error:
        log.error("rpc", exc_info=error)

    assert "ValueError: broken" in stream.getvalue()
    assert "Traceback" in stream.getvalue()


def test_an_exception_is_one_json_line() -> None:
    stream = io.StringIO()
    logs.configure("json", stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("grpc").exception("failed")

    (line,) = lines(stream)
    assert line["logger"] == "grpc"
    assert "two\nlines" in line["exception"]


def test_libraries_log_from_warning_on_in_the_same_format() -> None:
    stream = io.StringIO()
    logs.configure("json", stream)
    logging.getLogger("library").info("not this")
    logging.getLogger("library").warning("but %s", "this")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.configure("json", stream)
        warnings.warn("and this", UserWarning, stacklevel=1)

    assert [line["level"] for line in lines(stream)] == ["warning", "warning"]
    assert lines(stream)[0]["event"] == "but this"
    assert "and this" in lines(stream)[1]["event"]


def test_configuring_again_does_not_repeat_lines() -> None:
    stream = io.StringIO()
    logs.configure("json", stream)
    logs.configure("json", stream)
    logging.getLogger("library").warning("once")

    assert len(lines(stream)) == 1


@pytest.mark.parametrize(("stream", "colored"), [(io.StringIO(), False), (Terminal(), True)])
def test_console_lines_are_text_colored_only_on_a_terminal(stream: io.StringIO, colored: bool) -> None:
    logs.configure("console", stream).info("model", name="two-digits")

    assert "two-digits" in stream.getvalue()
    assert ("\x1b[" in stream.getvalue()) is colored


def test_the_default_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json").info("here")

    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["event"] == "here"
