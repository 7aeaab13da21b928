"""`explainserve models`: what a server has."""

from __future__ import annotations

from typing import Annotated

import typer

from explainserve.cli.connection import DEFAULT_SERVER, ModelsOption, ServerOption, TimeoutOption, connected
from explainserve.cli.explain import VersionOption


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Show all that is known of this model.")
    ] = None,
    version: VersionOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also list what lies in the server's folder and is not loaded.")
    ] = False,
    server: ServerOption = DEFAULT_SERVER,
    models: ModelsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    timeout: TimeoutOption = 60.0,
) -> None:
    """List the models of a server, or describe one.

    Models that failed to load are listed with the reason. --all needs a server with --allow-model-control."""
    if version is not None and name is None:
        raise typer.BadParameter("a version needs the NAME of a model", param_hint="--model-version")
    if everything and name is not None:
        raise typer.BadParameter("lists every model, not one", param_hint="--all")
    with connected(server, models, timeout) as client:
        listed = client.index if everything else client.models
        found = listed() if name is None else client.model(name, version)
    from explainserve.cli import documents, tables

    if as_json:
        typer.echo(documents.document(found))
    elif isinstance(found, tuple):
        typer.echo(tables.models(found))
    else:
        typer.echo(tables.model(found))
