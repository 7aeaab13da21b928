"""`explainserve predict`: the model's own answer."""

from __future__ import annotations

from typing import Annotated

import typer

from explainserve.cli.connection import DEFAULT_SERVER, ModelsOption, ServerOption, TimeoutOption, connected
from explainserve.cli.explain import ModelOption, ScoreOption, VersionOption
from explainserve.cli.inputs import CropOption, InputsArgument, ResizeOption, read_inputs


def predict(
    inputs: InputsArgument,
    model: ModelOption,
    version: VersionOption = None,
    server: ServerOption = DEFAULT_SERVER,
    models: ModelsOption = None,
    top: Annotated[int, typer.Option("--top", "-k", metavar="N", min=1, help="Number of classes.")] = 5,
    score: ScoreOption = None,
    resize: ResizeOption = None,
    crop: CropOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="With --json: include the raw outputs.")] = False,
    timeout: TimeoutOption = 60.0,
) -> None:
    """Show the highest classes that a model answers, and outputs of one number."""
    if tensors and not as_json:
        raise typer.BadParameter("--tensors needs --json", param_hint="--tensors")
    unit = None if score is None else score.name
    with connected(server, models, timeout) as client:
        info = client.model(model, version)
        given = read_inputs(client, info, version, inputs, resize, crop)
        numbers = any(len(spec.axes) == 1 for spec in info.outputs.values())  # of shape [batch]; they come as tensors
        result = client.predict(
            model,
            given.argument,
            version=version,
            top_k=top,
            score=unit,
            include_tensors=tensors or (numbers and not as_json),
        )
    from explainserve.cli import documents, tables

    typer.echo(documents.document(result) if as_json else tables.predictions(result))
