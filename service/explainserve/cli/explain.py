"""`explainserve explain`: raw attributions of images and arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from explainserve.cli import spellings
from explainserve.cli.connection import DEFAULT_SERVER, ModelsOption, ServerOption, TimeoutOption, connected
from explainserve.cli.inputs import CropOption, InputsArgument, ResizeOption, read_inputs
from explainserve.cli.spellings import Quadrature, Recipe, Scale, Score, View

if TYPE_CHECKING:
    from explainserve_client import ExplainResult, Progress
    from explainserve_client.streams import ExplainEvent

ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="NAME", help="Name of the model.")]
VersionOption = Annotated[
    int | None,
    typer.Option(
        "--model-version", metavar="N", min=1, help="Version of the model; the highest that is ready by default."
    ),
]
ScoreOption = Annotated[
    Score | None,
    typer.Option(
        "--score", case_sensitive=False, help="Unit of the scores; the output as it is, or a method's own, by default."
    ),
]


def explain(
    inputs: InputsArgument,
    model: ModelOption,
    version: VersionOption = None,
    server: ServerOption = DEFAULT_SERVER,
    models: ModelsOption = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            metavar="TARGET",
            help="What is explained, repeatable: a class index, an index path such as 2,10,12, a label, argmax, top5, "
            "margin:3:8 (one minus another), or label:TEXT for any label; output:NAME: in front of it names the output "
            "of a model with several. "
            "If left out, the model's default, else argmax.",
        ),
    ] = None,
    score: ScoreOption = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            "-b",
            metavar="BASELINE",
            help="Where paths start, repeatable: zeros, black, gray, white, random, data:NAME of the model's own, a "
            ".npy file in model space, or INPUT=BASELINE,... If left out, the model's default, else zeros.",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="NAME",
            help="A layer that is explained in the place of the inputs, such as an embedding, repeatable: "
            "`explainserve models NAME` lists those of a model.",
        ),
    ] = None,
    named: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="NAME or NAME:OPTION=VALUE,..., repeatable: `explainserve models NAME` lists those of a model. "
            "If left out, Integrated Gradients with the options below.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Gradient evaluations of one path; without it adaptive."),
    ] = None,
    quadrature: Annotated[
        Quadrature | None,
        typer.Option("--quadrature", case_sensitive=False, help="midpoint with --steps, adaptive without, by default."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="SHARE",
            min=1e-6,
            max=1,
            help="Adaptive: largest estimated relative error of a map; 0.05 by default.",
        ),
    ] = None,
    completeness_tolerance: Annotated[
        float | None,
        typer.Option(
            "--completeness-tolerance",
            metavar="SHARE",
            min=1e-6,
            max=1,
            help="Adaptive: largest relative delta; 0.05 by default.",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            "--max-steps", metavar="N", min=16, help="Adaptive: most gradient evaluations of one path; 128 by default."
        ),
    ] = None,
    time_budget: Annotated[
        float | None,
        typer.Option("--time-budget", metavar="SECONDS", min=0.001, help="Answer with the best maps after this time."),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            "-r",
            metavar="NAME=X,Y,WIDTH,HEIGHT",
            help="A box whose attributions are summed, repeatable: in pixels of the image where INPUT is one, in "
            "elements of the input where it is a .npy file.",
        ),
    ] = None,
    resize: ResizeOption = None,
    crop: CropOption = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="PREFIX", help="Write PREFIX.npz (raw tensors) and PREFIX.json (the rest)."
        ),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Also draw the maps to PREFIX.png (needs pillow).")] = False,
    normalization: Annotated[
        Recipe, typer.Option("--normalization", case_sensitive=False, help="Of the drawing; the tensors stay raw.")
    ] = Recipe.SYMMETRIC_ABS_MAX,
    scale: Annotated[
        Scale,
        typer.Option("--scale", case_sensitive=False, help="Draw all maps on one scale, or each on its own."),
    ] = Scale.JOINT,
    view: Annotated[
        View | None,
        typer.Option(
            "--view", case_sensitive=False, help="Of the drawing; channel_sum by default where it has channels."
        ),
    ] = None,
    timeout: TimeoutOption = 600.0,
    request_id: Annotated[
        str | None, typer.Option("--request-id", metavar="ID", help="Id in the server's logs; made up by default.")
    ] = None,
) -> None:
    """Explain what a model answers: raw attributions.

    The method is Integrated Gradients, adaptive without --steps, or what --method names.

    Prints a row per map, ordered by method: target, F(x) of the instance, F(x') of the baseline, sum of the
    attributions, delta = sum - (F(x) - F(x')), estimated error of the map, steps and why they stopped; and the sums of
    regions.
    """
    _check_output(output, png)
    targets = [spellings.target(text) for text in target or ()] or None
    baselines = [spellings.baseline(text) for text in baseline or ()] or None
    boxes = spellings.regions(region or ())
    path_options = (steps, quadrature, tolerance, completeness_tolerance, max_steps)
    if named and any(option is not None for option in path_options):
        raise typer.BadParameter("options of a path go into the method: NAME:OPTION=VALUE", param_hint="--method")
    methods = spellings.named_methods(named) if named else [spellings.method(*path_options)]
    from explainserve.cli.progress import working

    with connected(server, models, timeout) as client:
        given = read_inputs(client, client.model(model, version), version, inputs, resize, crop)
        events = client.explain_stream(  # maps may be larger than a message here, and a terminal shows how far it is
            model,
            given.argument,
            version=version,
            method=methods,
            targets=targets,
            baselines=baselines,
            layers=tuple(layer or ()),
            score=None if score is None else score.name,
            regions=given.regions(boxes),
            views=_views(view),
            time_budget=time_budget,
            request_id=request_id,
        )
        with working(f"explaining {model}") as show:
            result = _followed(events, show)
    _print(result)
    if output is not None:
        from explainserve.cli.documents import write_result

        written = list(write_result(output, result))
        if png:
            from explainserve.cli.pictures import write_picture

            written.append(write_picture(output, result, given, boxes, recipe=normalization, scale=scale, view=view))
        typer.echo(f"\nwrote {', '.join(map(str, written))}")


def _followed(events: Iterator[ExplainEvent], show: Callable[[Progress], None]) -> ExplainResult:
    """The result, which ends the stream; the progress before it is shown."""
    from explainserve_client import ExplainResult, Progress

    for event in events:
        if isinstance(event, Progress):
            show(event)
        elif isinstance(event, ExplainResult):
            return event
    raise AssertionError("A stream ended without a result. This is a bug.")


def _check_output(output: str | None, png: bool) -> None:
    """Says what cannot be written before anything is computed."""
    if output is None:
        if png:
            raise typer.BadParameter("--png needs --output PREFIX", param_hint="--png")
        return
    folder = Path(f"{output}.npz").parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"{folder} is no folder that can be written to", param_hint="--output")
    if png:
        from explainserve.cli.pictures import require_pillow

        require_pillow()


def _views(view: View | None) -> tuple[str, ...]:
    """The server's default, and one more where the drawing needs it."""
    default = (View.ELEMENTS, View.CHANNEL_SUM)
    return () if view is None or view in default else tuple(wanted.name for wanted in (*default, view))


def _print(result: ExplainResult) -> None:
    from explainserve.cli import tables

    typer.echo(tables.attributions(result))
    if sums := tables.regions(result):
        typer.echo(f"\n{sums}")
    lines = (*result.cautions, *(caution for line in result.attributions for caution in line.cautions))
    kinds = dict.fromkeys(caution.kind for caution in lines)
    if kinds:
        typer.echo(f"\ncautions: {', '.join(kinds)}")
    typer.echo(f"request {result.request_id}")
