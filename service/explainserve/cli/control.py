"""`explainserve load` and `explainserve unload`: the models of a server that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from explainserve.cli.connection import DEFAULT_SERVER, ServerOption, TimeoutOption, connected
from explainserve.cli.explain import VersionOption

if TYPE_CHECKING:
    from explainserve_client import ModelSummary

NameArgument = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="Folder of the model.")]


def load(
    name: NameArgument,
    version: Annotated[
        int | None,
        typer.Option("--model-version", metavar="N", min=1, help="Version of the model; the highest in the folder."),
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Load a model of a server's folder, or load it anew.

    A version that is served already answers until the new one is ready, and goes on where the new one cannot be served.
    The server must have been started with --allow-model-control."""
    with connected(server, None, timeout) as client:
        _tell(client.load_model(name, version))


def unload(
    name: NameArgument,
    version: VersionOption = None,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = 60.0,
) -> None:
    """Unload a model of a server; running requests finish.

    The server must have been started with --allow-model-control."""
    with connected(server, None, timeout) as client:
        _tell(client.unload_model(name, version))


def _tell(summary: ModelSummary) -> None:
    typer.echo(f"{summary.name} version {summary.version}, {summary.state}")
