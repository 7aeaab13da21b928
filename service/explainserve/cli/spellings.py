"""What people type for targets, baselines, regions and methods. Wrong spellings are usage errors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from explainserve_client import Box, IntegratedGradients
    from explainserve_client.methods import Method

BASELINES = ("zeros", "black", "gray", "white", "random")


class Score(StrEnum):
    """What of the model's output is explained."""

    OUTPUT = "output"
    LOGIT = "logit"
    PROBABILITY = "probability"
    LOG_PROBABILITY = "log_probability"


class Quadrature(StrEnum):
    """Where on the path gradients are evaluated."""

    ADAPTIVE = "adaptive"
    MIDPOINT = "midpoint"
    LEFT = "left"
    RIGHT = "right"
    TRAPEZOID = "trapezoid"
    GAUSS_LEGENDRE = "gauss_legendre"


class View(StrEnum):
    """What a map is reduced to before it is drawn."""

    ELEMENTS = "elements"
    CHANNEL_SUM = "channel_sum"
    CHANNEL_ABS_SUM = "channel_abs_sum"
    CHANNEL_MAX_ABS = "channel_max_abs"


class Recipe(StrEnum):
    """Normalizations that a picture can be drawn with."""

    MIN_MAX = "min_max"
    QUANTILE_RANGE = "quantile_range"
    POSITIVE_MAX = "positive_max"
    SYMMETRIC_ABS_MAX = "symmetric_abs_max"
    SYMMETRIC_QUANTILE = "symmetric_quantile"
    ABS_MASS = "abs_mass"


class Scale(StrEnum):
    """Whose figures the normalization takes."""

    JOINT = "joint"
    INDIVIDUAL = "individual"


def target(text: str) -> Any:
    """3, 2,10,12 (index path), a label, argmax, top5, margin:3:8, label:TEXT for any label, or output:NAME: and any of
    these, of a model with several outputs."""
    from explainserve_client import Label, Margin, Target, TopK

    if of_output := re.fullmatch(r"output:([^:]+):(.+)", text):
        return Target(target(of_output[2]), output=of_output[1])
    if top := re.fullmatch(r"top([1-9]\d*)", text):
        return TopK(int(top[1]))
    if text.startswith("label:"):
        return Label(text.removeprefix("label:"))
    if margin := re.fullmatch(r"margin:([^:]+):([^:]+)", text):
        return Margin(_element(margin[1]), _element(margin[2]))
    if not text:
        raise typer.BadParameter("a target is not empty", param_hint="--target")
    return _element(text)


def _element(text: str) -> int | tuple[int, ...] | str:
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"\d+(,\d+)+", text):
        return tuple(map(int, text.split(",")))
    return text


def baseline(text: str) -> Any:
    """A keyword, data:NAME of model.toml, a .npy file in model space, or several by input: image=gray,mask=mask.npy."""
    from explainserve_client import DataBaseline

    if text in BASELINES:
        return text
    if text.startswith("data:"):
        return DataBaseline(text.removeprefix("data:"))
    if Path(text).is_file():
        return array(Path(text), "--baseline")
    if "=" in text:
        named = [part.partition("=") for part in text.split(",")]
        return {name: baseline(kind) for name, _, kind in named}
    expected = f"{', '.join(BASELINES)}, data:NAME, a .npy file, or INPUT=BASELINE,..."
    raise typer.BadParameter(f"{text!r} is no baseline and no file; expected {expected}", param_hint="--baseline")


def array(path: Path, hint: str) -> NDArray[np.generic]:
    """The array of a .npy file; nothing in it is unpickled."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise typer.BadParameter(f"{path} cannot be read as a .npy file: {error}", param_hint=hint) from error
    if not isinstance(loaded, np.ndarray):
        raise typer.BadParameter(f"{path} holds several arrays; expected a .npy file with one", param_hint=hint)
    return loaded


def regions(texts: Iterable[str]) -> dict[str, Box]:
    """Boxes by name from NAME=X,Y,WIDTH,HEIGHT."""
    from explainserve_client import Box

    boxes: dict[str, Box] = {}
    for text in texts:
        found = re.fullmatch(r"(.+)=(\d+),(\d+),([1-9]\d*),([1-9]\d*)", text)
        if found is None:
            message = (
                f"{text!r} is no region; expected NAME=X,Y,WIDTH,HEIGHT in whole numbers, width and height above 0"
            )
            raise typer.BadParameter(message, param_hint="--region")
        if found[1] in boxes:
            raise typer.BadParameter(f"{found[1]!r} is there twice", param_hint="--region")
        boxes[found[1]] = Box(*map(int, found.groups()[1:]))
    return boxes


def named_methods(texts: Sequence[str]) -> list[Method]:
    """Methods as NAME or NAME:OPTION=VALUE,... with values as JSON, such as [8, 8], as NAME of a method, or as text."""
    return [_named_method(text) for text in texts]


def _named_method(text: str) -> Method:
    from explainserve_client.methods import METHODS

    name, _, rest = text.partition(":")
    kind = METHODS.get(name)
    if kind is None:
        raise typer.BadParameter(f"no method {name!r}; there are {', '.join(METHODS)}", param_hint="--method")
    pairs = [part.partition("=") for part in re.split(r",(?![^\[]*\])", rest) if part]  # not at commas within a list
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    unknown = {option for option, _, _ in pairs} - types.keys()
    if unknown:
        raise typer.BadParameter(f"{name} has no option {', '.join(sorted(unknown))}", param_hint="--method")
    options: dict[str, Any] = {
        option: _named_method(value) if types[option].startswith("Method") else _value(value)
        for option, _, value in pairs
    }
    return kind(**options)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def method(
    steps: int | None,
    quadrature: Quadrature | None,
    tolerance: float | None,
    completeness_tolerance: float | None,
    max_steps: int | None,
) -> IntegratedGradients:
    """Integrated Gradients with what was asked for; the rest is the server's default."""
    from explainserve_client import IntegratedGradients

    adaptive = quadrature in (None, Quadrature.ADAPTIVE)
    if steps is None and not adaptive:
        raise typer.BadParameter(f"{quadrature} is a fixed rule and needs --steps", param_hint="--quadrature")
    if steps is not None and quadrature is Quadrature.ADAPTIVE:
        raise typer.BadParameter("adaptive quadrature takes --max-steps, not --steps", param_hint="--steps")
    if steps is not None and (tolerance, completeness_tolerance, max_steps) != (None, None, None):
        message = "--tolerance, --completeness-tolerance and --max-steps are for the adaptive rule: leave --steps out"
        raise typer.BadParameter(message, param_hint="--steps")
    return IntegratedGradients(
        step_count=steps,
        quadrature=None if quadrature is None else quadrature.value,
        tolerance=tolerance,
        completeness_tolerance=completeness_tolerance,
        max_step_count=max_steps,
    )
