"""`explainserve inspect`: what a model file says of itself, and a first model.toml."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from explainserve.cli.failures import fail
from explainserve.cli.tables import gap_line, layer_lines

if TYPE_CHECKING:
    from explainserve.inspection import Inspection


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A model file: .onnx, .pt2, .pt or .ts.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a model.toml.")] = False,
    trial_seconds: Annotated[
        float,
        typer.Option(
            envvar="EXPLAINSERVE_TRIAL_SECONDS",
            metavar="SECONDS",
            min=0,
            help="Time that the file gets in the process that tries it first; 0 reads it without a trial.",
        ),
    ] = 60.0,
    trial_memory_bytes: Annotated[
        int,
        typer.Option(envvar="EXPLAINSERVE_TRIAL_MEMORY_BYTES", metavar="N", min=1, help="Memory that it gets there."),
    ] = 4 * 1024 * 1024 * 1024,
) -> None:
    """Write a starter model.toml for a model file.

    What the file says of itself stands above as comments, so that the output is a valid model.toml: `explainserve
    inspect model.onnx > model.toml`. Needs no server. Exits with 1 where the file cannot be served as it is; where no
    model.toml would help, only the reason is printed.
    """
    from explainserve.backends.trial import TrialLimits, Trials
    from explainserve.backends.tried import Tried
    from explainserve.inspection import inspect_file

    limits = TrialLimits(trial_seconds, trial_memory_bytes)
    with Trials(limits, Tried()) if trial_seconds else nullcontext() as trials:
        found = inspect_file(file, trials)
    if as_json:
        from explainserve.cli.documents import document

        typer.echo(document(found))
    elif found.starter:
        typer.echo("\n".join([*_comments(found), "", found.starter.rstrip()]))
    if found.refusal is not None:
        raise fail(f"{found.refusal.reason}: {found.refusal.message}")


def _comments(found: Inspection) -> list[str]:
    operators = ", ".join(f"{name} x{count}" for name, count in found.operators.items())
    facts = {
        "file": found.path.name,
        "format": found.format,
        "sha256": found.sha256,
        "gradients": found.gradient_mode,
        "no gradient": found.undifferentiable_reason,
        "batch": "fixed: one row at a time" if found.fixed_batch else "",
        "operators": operators,
        "refused": "" if found.refusal is None else f"{found.refusal.reason}: {found.refusal.message}",
    }
    lines = [f"# {name}: {' '.join(text.split())}" for name, text in facts.items() if text]
    lines += [f"# left out: {own}" for own in (found.signature.suppressed if found.signature else ())]
    lines += [f"# layer: {text}" for text in layer_lines(found.layers)]
    return [*lines, *(f"# no gradient: {gap_line(gap)}" for gap in found.gaps)]
