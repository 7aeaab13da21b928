"""The command `explainserve`.

Reading order: `serve.py` runs the server; `explain.py`, `predict.py`, `models.py` and `control.py` are clients of one,
reached through `connection.py`; `health.py` asks whether it answers; `inspect.py` reads a model file without a server.
What people type becomes values in `spellings.py` and `inputs.py`; what they get is written in `documents.py`,
`tables.py` and `pictures.py`; errors become exit codes in `failures.py`. Heavy libraries are imported by the command
that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from explainserve import __version__
from explainserve.cli.control import load, unload
from explainserve.cli.explain import explain
from explainserve.cli.failures import ReportingGroup
from explainserve.cli.health import health
from explainserve.cli.inspect import inspect
from explainserve.cli.models import models
from explainserve.cli.predict import predict
from explainserve.cli.serve import serve

app = typer.Typer(
    name="explainserve",
    cls=ReportingGroup,
    no_args_is_help=True,
    add_completion=False,
    # Plain text: frames and colors do not belong into pipes, logs and containers.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"explainserve {__version__}")
        raise typer.Exit


@app.callback()
def explainserve(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Raw feature attributions of compiled models over gRPC.

    Exit codes: 0 success, 1 failure (one line on standard error says why), 2 wrong usage, 130 interrupted.
    """


for _command in (serve, explain, predict, models, load, unload, health, inspect):
    app.command()(_command)


def main() -> None:
    """Entry point of the command and of `python -m explainserve`."""
    # gRPC's own notes, such as a connection that a stopped server took away, are not for standard error
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app(prog_name="explainserve")
