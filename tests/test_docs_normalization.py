"""Every number of the worked example in docs/normalization.md is recomputed; its reference tables match the code."""

import dataclasses
import functools
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from explainserve.normalization import NORMALIZATIONS, Normalization, NormalizationKind, apply, normalizations
from explainserve.regions import Box, RegionSum, region_sums
from explainserve.statistics import (
    ABS_MASS_LEVELS,
    ABS_QUANTILE_PROBABILITIES,
    QUANTILE_PROBABILITIES,
    Statistics,
    View,
    delta_over_abs_sum,
    pooled_statistics,
    reduce_to_view,
    relative_convergence_delta,
    statistics,
)

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "normalization.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:/\d+)?(?![\w.])")
PER_LEVEL = {"quantiles", "abs_quantiles", "abs_mass_thresholds"}
SCALARS = [f.name for f in dataclasses.fields(Statistics) if f.name not in PER_LEVEL | {"view"}]

Rows = list[dict[str, str]]


def sections(page: str, level: str) -> dict[str, str]:
    parts = re.split(rf"^{level} ", page, flags=re.MULTILINE)[1:]
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1] for part in parts}


def table(section: str) -> Rows:
    """The only table of a section, a dict by column per row; backticks and escapes removed."""
    lines = [line.replace("`", "").replace("\\|", "¦") for line in section.split("\n") if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(cells[1])) == {"-"}, "one table per section"
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def column(rows: Rows, name: str) -> list[str]:
    return [row[name] for row in rows]


def worked_example(page: str) -> dict[str, Rows]:
    return {title: table(body) for title, body in sections(sections(page, "##")["Worked example"], "###").items()}


def vector(cell: str) -> np.ndarray:
    """Values of an input map; rows of pixels separated by semicolons."""
    grid = [[float(value) for value in row.split(",")] for row in cell.split(";")]
    return np.array(grid[0] if len(grid) == 1 else grid)


def check_number(printed: str, value: float | int | bool | None) -> None:
    """Printed exactly (fractions, fewer than four decimals), or rounded to the digits shown."""
    if value is None or isinstance(value, bool):
        assert printed == {None: "absent", True: "yes", False: "no"}[value]
        return
    decimals = len(printed.partition(".")[2])
    tolerance = 0.5 * 10.0**-decimals * (1 + 1e-9) if decimals >= 4 else 1e-11
    assert abs(float(Fraction(printed)) - value) <= tolerance, f"printed {printed}, is {value}"


def check_vector(printed: str, values: np.ndarray) -> None:
    cells = printed.replace(";", ",").split(",")
    for cell, value in zip(cells, values.ravel().tolist(), strict=True):
        check_number(cell.strip(), value)


@functools.cache
def figures_of(values: tuple[float, ...], view: View = View.ELEMENTS) -> Statistics:
    return statistics(np.array(values), view)


@functools.cache
def joint_figures(*maps: tuple[float, ...]) -> Statistics:
    return pooled_statistics([np.array(values) for values in maps], View.ELEMENTS)


def maps_in(rows: Rows) -> dict[str, np.ndarray]:
    return {row["map"]: vector(row["values"]) for row in rows}


def two_maps(example: dict[str, Rows]) -> dict[str, Statistics]:
    maps = maps_in(example["Two maps"])
    assert list(maps) == ["a", "b"]
    return {name: figures_of(tuple(v)) for name, v in maps.items()} | {
        "joint": joint_figures(*map(tuple, maps.values()))
    }


def empty_maps(example: dict[str, Rows]) -> dict[str, Statistics]:
    return {name: figures_of(tuple(v)) for name, v in maps_in(example["Maps with nothing to show"]).items()}


def channels(example: dict[str, Rows]) -> np.ndarray:
    rows = example["A map with two channels"]
    assert column(rows, "channel") == ["first", "second"]
    return np.stack([vector(row["values"]) for row in rows]).astype(np.float32)


@functools.cache
def recipes(figures: Statistics) -> dict[str, Normalization]:
    return {n.kind.name: n for n in normalizations(figures)}


def check_figures(rows: Rows, by_column: dict[str, Statistics] | dict[str, RegionSum], names: list[str]) -> None:
    assert column(rows, "figure") == names
    assert list(rows[0]) == ["figure", *by_column]
    for row in rows:
        for name, figures in by_column.items():
            check_number(row[name], getattr(figures, row["figure"]))


def check_levels(
    rows: Rows, level: str, by_column: dict[str, Statistics], levels: tuple[float, ...], figure: Callable[..., float]
) -> None:
    assert [float(p) for p in column(rows, level)] == list(levels)
    for row in rows:
        for name, figures in by_column.items():
            check_number(row[name], figure(figures, float(row[level])))


def check_recipes(rows: Rows, by_name: dict[str, Statistics]) -> None:
    expected = [(kind.name, name) for kind in NormalizationKind for name in by_name]
    assert [(row["kind"], row["figures of"]) for row in rows] == expected
    for row in rows:
        recipe = recipes(by_name[row["figures of"]])[row["kind"]]
        for name in ("center", "scale", "zero_at", "degenerate"):
            check_number(row[name], getattr(recipe, name))


def check_displayed(rows: Rows, example: dict[str, Rows]) -> None:
    figures, maps = two_maps(example), maps_in(example["Two maps"])
    scales = ("each map", "joint")
    assert [(row["kind"], row["figures of"]) for row in rows] == [
        (k.name, s) for k in NormalizationKind for s in scales
    ]
    for row in rows:
        for name, values in maps.items():
            own = figures[name if row["figures of"] == "each map" else "joint"]
            check_vector(row[name], apply(recipes(own)[row["kind"]], values))


def check_outlier(rows: Rows) -> None:
    (row,) = rows
    values = (1.0,) * int(row["ones"]) + (float(row["outlier"]),)
    assert len(values) == 100, "ninety-nine ones"
    for kind in ("SYMMETRIC_QUANTILE", "ABS_MASS"):
        check_number(row[f"{kind} scale"], recipes(figures_of(values))[kind].scale)


def check_views(rows: Rows, tensor: np.ndarray) -> None:
    assert column(rows, "view") == [view.name for view in View if view is not View.ELEMENTS]
    for row in rows:
        check_vector(row["values"], reduce_to_view(tensor, View[row["view"]], 0))


def check_region(rows: Rows, example: dict[str, Rows]) -> None:
    (box,) = example["A box in it"]
    sums = region_sums(channels(example), 0, (1, 2), Box(**{name: int(value) for name, value in box.items()}))
    names = [f.name for f in dataclasses.fields(RegionSum) if f.name not in {"name", "view"}]
    check_figures(rows, {s.view.name: s for s in sums}, names)


def check_completeness(rows: Rows, example: dict[str, Rows]) -> None:
    printed = {row["figure"]: row["value"] for row in rows}
    figures = two_maps(example)["a"]
    change = float(printed["F(x)"]) - float(printed["F(x')"])
    delta = figures.sum - change
    expected = {
        "F(x)": change + float(printed["F(x')"]),
        "F(x')": float(printed["F(x)"]) - change,
        "attribution_sum": figures.sum,
        "convergence_delta": delta,
        "relative_convergence_delta": relative_convergence_delta(delta, change),
        "delta_over_abs_sum": delta_over_abs_sum(delta, figures.l1_norm),
    }
    assert list(printed) == list(expected)
    for name, value in expected.items():
        check_number(printed[name], value)


# What each section of the worked example must agree with. Sections that state an input are checked by what follows
# from it.
CHECKS: dict[str, Callable[[Rows, dict[str, Rows]], None]] = {
    "Two maps": lambda rows, example: None,
    "Figures": lambda rows, example: check_figures(rows, two_maps(example), SCALARS),
    "Quantiles of v": lambda rows, example: check_levels(
        rows, "probability", two_maps(example), QUANTILE_PROBABILITIES, Statistics.quantile
    ),
    "Quantiles of the magnitude": lambda rows, example: check_levels(
        rows, "probability", two_maps(example), ABS_QUANTILE_PROBABILITIES, Statistics.abs_quantile
    ),
    "Mass thresholds": lambda rows, example: check_levels(
        rows, "mass", two_maps(example), ABS_MASS_LEVELS, Statistics.abs_mass_threshold
    ),
    "Numbers of the recipes": lambda rows, example: check_recipes(rows, two_maps(example)),
    "Displayed values": check_displayed,
    "An outlier": lambda rows, example: check_outlier(rows),
    "A map with two channels": lambda rows, example: None,
    "Its views": lambda rows, example: check_views(rows, channels(example)),
    "Figures of its views": lambda rows, example: check_figures(
        rows, {v.name: statistics(reduce_to_view(channels(example), v, 0), v) for v in View}, SCALARS
    ),
    "A box in it": lambda rows, example: None,
    "Sums in a region of it": check_region,
    "Maps with nothing to show": lambda rows, example: None,
    "Their figures": lambda rows, example: check_figures(rows, empty_maps(example), SCALARS),
    "Their recipes": lambda rows, example: check_recipes(rows, empty_maps(example)),
    "Completeness of the map a": check_completeness,
}


def check_page(page: str) -> None:
    example = worked_example(page)
    assert list(example) == list(CHECKS)
    for title, check in CHECKS.items():
        check(example[title], example)


def test_every_number_of_the_worked_example_is_right():
    check_page(PAGE)


def numbers_of_the_example() -> list[re.Match[str]]:
    start = PAGE.index("## Worked example")
    lines = re.finditer(r"^\|.*$", PAGE[start:], flags=re.MULTILINE)
    spans = [(start + m.start(), start + m.end()) for m in lines]
    return [number for first, last in spans for number in NUMBER.finditer(PAGE, first, last)]


def test_a_wrong_number_would_be_found():
    for number in numbers_of_the_example():
        last = int(PAGE[number.end() - 1])
        wrong = PAGE[: number.end() - 1] + str((last + 5) % 10) + PAGE[number.end() :]

        with pytest.raises((AssertionError, KeyError, ValueError, ZeroDivisionError)):
            check_page(wrong)
            pytest.fail(f"nothing noticed a change of {number.group()} at {number.start()}")


def test_the_prose_of_the_example_holds_no_number_of_its_own():
    for title, body in sections(sections(PAGE, "##")["Worked example"], "###").items():
        prose = [line for line in body.split("\n") if not line.startswith("|")]
        assert not re.search(r"\d", title + "".join(prose)), title


def test_reference_tables_name_everything():
    reference = sections(PAGE, "##")

    assert column(table(reference["Views"]), "view") == [view.name for view in View]
    assert column(table(reference["Statistics"]), "figure") == [f.name for f in dataclasses.fields(Statistics)][1:]
    assert column(table(reference["Recipes"]), "kind") == [kind.name for kind in NormalizationKind]


def test_reference_table_states_defaults_and_clips():
    for row in table(sections(PAGE, "##")["Recipes"]):
        recipe = NORMALIZATIONS[NormalizationKind[row["kind"]]]
        parameters = {
            name: getattr(recipe, name)
            for name in ("lower_probability", "upper_probability", "mass")
            if getattr(recipe, name) is not None
        }
        stated = dict(part.split(" = ") for part in row["parameters"].split(", ") if part)
        assert {name: float(value) for name, value in stated.items()} == parameters
        assert row["clip"] == f"[{recipe.lower:g}, {recipe.upper:g}]"


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("quantiles", QUANTILE_PROBABILITIES),
        ("abs_quantiles", ABS_QUANTILE_PROBABILITIES),
        ("abs_mass_thresholds", ABS_MASS_LEVELS),
    ],
)
def test_stated_levels_are_those_served(name, levels):
    (stated,) = re.findall(rf"^- (?:Probabilities|Levels) of `{name}`: (.*)$", PAGE, flags=re.MULTILINE)

    assert tuple(map(float, stated.split(", "))) == levels
