"""Errors become one line on standard error and an exit code: 1 for failures, 2 for what cannot be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from explainserve.errors import ExplainServeError

FAILURE, USAGE = 1, 2


class ReportingGroup(TyperGroup):
    """The group of commands, which reports what they raise."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen command."""
        with reported():
            return super().invoke(ctx)


@contextmanager
def reported() -> Iterator[None]:
    """Reports errors raised on purpose; anything else is a bug and keeps its traceback."""
    try:
        yield
    except ExplainServeError as error:
        raise fail(_line(error.reason, error.message, error.metadata)) from error
    except Exception as error:
        line, exit_code = _client_failure(error)
        if not line:
            raise
        raise fail(line, exit_code) from error


def fail(line: str, exit_code: int = FAILURE) -> typer.Exit:
    """Prints the line and returns what to raise."""
    typer.echo(f"error: {' '.join(line.split())}", err=True)
    return typer.Exit(exit_code)


def _client_failure(error: Exception) -> tuple[str, int]:
    from explainserve_client import errors

    match error:
        case errors.ServerError():
            heading = " ".join(dict.fromkeys(filter(None, (error.code, error.reason))))
            return _line(heading, error.message, {**error.metadata, "request": error.request_id}), FAILURE
        case errors.RequestValueError() | errors.RequestTypeError() | errors.MissingEntryError():
            return str(error), USAGE
        case errors.ExplainServeError() | OSError():
            return str(error), FAILURE
    return "", FAILURE


def _line(heading: str, message: str, metadata: Mapping[str, str]) -> str:
    """Such as: NOT_FOUND UNKNOWN_MODEL: no model 'x' (model=x, request=7f3a)."""
    pairs = ", ".join(f"{name}={value}" for name, value in metadata.items() if value)
    return f"{heading}: {message}" + (f" ({pairs})" if pairs else "")
