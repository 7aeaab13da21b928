"""Pictures of maps, drawn by the client from the raw tensors and the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from explainserve.cli import tables
from explainserve.cli.inputs import Inputs
from explainserve.cli.spellings import Recipe, Scale, View

if TYPE_CHECKING:
    from PIL import Image

    from explainserve_client import Box, ExplainResult, InputAttribution, InputSpec, Normalization


def require_pillow() -> None:
    """Says what is missing before anything is computed."""
    try:
        import explainserve_client.draw  # noqa: F401
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--png") from error


def write_picture(
    prefix: str,
    result: ExplainResult,
    inputs: Inputs,
    boxes: Mapping[str, Box],
    *,
    recipe: Recipe,
    scale: Scale,
    view: View | None,
) -> Path:
    """Writes PREFIX.png: a row per instance and input or layer, first the input if it is a picture, then its maps."""
    from explainserve_client import draw

    rows = [
        _row(result, inputs, boxes, instance, name, recipe=recipe, scale=scale, view=view)
        for instance in dict.fromkeys(line.instance_index for line in result.attributions)
        for name in dict.fromkeys(name for line in result.attributions for name in line.inputs)
    ]
    page = draw.side_by_side([draw.side_by_side(row) for row in rows], columns=1)
    path = Path(f"{prefix}.png")
    page.save(path)
    return path


def _row(
    result: ExplainResult,
    inputs: Inputs,
    boxes: Mapping[str, Box],
    instance: int,
    name: str,
    *,
    recipe: Recipe,
    scale: Scale,
    view: View | None,
) -> list[Image.Image]:
    from explainserve_client import draw

    placed = inputs.boxes(boxes, name, instance) if name in result.inputs else {}
    panels = []
    if name in result.inputs and _is_picture(result.inputs[name]):
        panels.append(draw.draw_input(inputs.instance(name, instance), result.inputs[name], boxes=placed, caption=name))
    for index, line in enumerate(result.attributions):
        if line.instance_index == instance and name in line.inputs:
            normalization = _normalization(result, index, line.inputs[name], recipe, scale, view)
            start = tables.baseline_name(result, line)
            of = f"{line.target}" if start == "-" else f"{line.target}, from {start}"
            caption = f"{index}: {tables.method_name(result, line)} of {of}, {scale.value} scale"
            panels.append(draw.draw_map(line.inputs[name], normalization, boxes=placed, caption=caption))
    return panels


def _is_picture(spec: InputSpec) -> bool:
    stated = spec.value_range is not None and spec.preprocessing is not None and {"H", "W"} <= set(spec.layout)
    channels = 1 if spec.channel_axis is None else spec.shape[spec.channel_axis]
    return stated and channels in (1, 3)


def _normalization(
    result: ExplainResult, index: int, line: InputAttribution, recipe: Recipe, scale: Scale, view: View | None
) -> Normalization:
    """Joint: from the figures of all maps of the same unit, so that equal colors are equal values."""
    wanted = View.ELEMENTS if line.channel_axis is None else view or View.CHANNEL_SUM
    if scale is Scale.JOINT:
        group = next(group for group in result.joint.values() if index in group.members)
        return group.inputs[line.name].normalization(recipe.name, wanted.name)
    return line.normalization(recipe.name, wanted.name)
