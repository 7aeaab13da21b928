"""Pictures that say the truth: where white is, where zero is, what cannot be seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.fake_service import explain_response, tensor, two_digits
from explainserve_client import Attribution, Box, InputSpec, Normalization, RequestValueError
from explainserve_client.draw import (
    NOT_FINITE_COLOR,
    Tick,
    bar_ticks,
    draw_input,
    draw_map,
    map_colors,
    side_by_side,
    tick_row,
)
from explainserve_client.preprocess import preprocess
from explainserve_client.results import explain_result

WHITE = (255, 255, 255)
SYMMETRIC = Normalization.stated(-2, 2, "CHANNEL_SUM", 0, 3)
SEQUENTIAL = Normalization.stated(-1, 3, "CHANNEL_SUM", 0, 3)


def attribution(values: np.ndarray) -> Attribution:
    message = explain_response()
    message.attributions[0].inputs[0].tensor.CopyFrom(tensor(values))
    return explain_result(message, {}, "id").attributions[0]


def colors_of(picture: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(picture).reshape(-1, 3).tolist()))


def rows_with(picture: Image.Image, color: tuple[int, int, int], column: int) -> list[int]:
    return np.flatnonzero((np.asarray(picture)[:, column] == color).all(axis=-1)).tolist()


@given(value=st.floats(-1, 1))
def test_in_symmetric_recipes_white_is_zero_and_only_zero(value: float) -> None:
    assert (tuple(map_colors(np.array([value]), SYMMETRIC)[0].tolist()) == WHITE) == (value == 0)


@given(value=st.floats(0, 1))
def test_in_other_recipes_nothing_is_white(value: float) -> None:
    assert tuple(map_colors(np.array([value]), SEQUENTIAL)[0].tolist()) != WHITE


def test_sides_of_zero_have_different_colors_of_growing_strength() -> None:
    negative, positive = (map_colors(np.linspace(0, end, 20), SYMMETRIC).astype(int) for end in (-1, 1))

    assert (np.diff(negative[:, 0]) < 0).all() and (np.diff(positive[:, 2]) < 0).all()
    assert negative[-1, 2] > negative[-1, 0] and positive[-1, 0] > positive[-1, 2]


def test_the_sequential_scale_gets_lighter() -> None:
    luminance = map_colors(np.linspace(0, 1, 50), SEQUENTIAL) @ np.array([0.2126, 0.7152, 0.0722])

    assert (np.diff(luminance) > 0).all()


@pytest.mark.parametrize("recipe", [SYMMETRIC, SEQUENTIAL])
def test_nan_has_a_color_of_its_own(recipe: Normalization) -> None:
    levels = np.linspace(recipe.lower, recipe.upper, 300)

    assert tuple(map_colors(np.array([np.nan]), recipe)[0].tolist()) == NOT_FINITE_COLOR
    assert NOT_FINITE_COLOR not in set(map(tuple, map_colors(levels, recipe).tolist()))


def recipe(**numbers: object) -> Normalization:
    return dataclasses.replace(SEQUENTIAL, **numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        (SYMMETRIC, (Tick(0, "-2"), Tick(0.5, "0"), Tick(1, "2"))),
        (SEQUENTIAL, (Tick(0, "-1"), Tick(0.25, "0"), Tick(1, "3"))),
        (recipe(center=0.0, scale=5e-13, zero_at=0.0), (Tick(0, "0"), Tick(1, "5e-13"))),
        (recipe(center=2.0, scale=1.0, zero_at=0.0), (Tick(0, "2"), Tick(1, "3"))),
        (recipe(center=-5.0, scale=1.0, zero_at=1.0), (Tick(0, "-5"), Tick(1, "-4"))),
        (recipe(center=None, scale=None, zero_at=None), ()),
    ],
)
def test_the_bar_has_raw_values_at_its_ends_and_zero_where_it_lies(
    normalization: Normalization, expected: tuple[Tick, ...]
) -> None:
    assert bar_ticks(normalization) == expected


@pytest.mark.parametrize("normalization", [SYMMETRIC, SEQUENTIAL])
def test_the_tick_is_drawn_across_the_bar_at_zero(normalization: Normalization) -> None:
    picture = draw_map(attribution(np.ones((1, 64, 64))), normalization, size=256)
    pixels = np.asarray(picture)
    ((top, left), (bottom, right)) = map_bounds(pixels, map_colors(normalization.display(np.ones(1)), normalization)[0])
    assert (bottom - top, right - left) == (256, 256)
    bar_middle = right + 8 + 7
    zero = next(tick for tick in bar_ticks(normalization) if tick.label == "0")

    assert rows_with(picture, (0, 0, 0), bar_middle) == [top + tick_row(zero, 256)]


def map_bounds(pixels: np.ndarray, color: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners of the map, which is all of one color and larger than anything else of that color."""
    same = (pixels == color).all(axis=-1)
    rows = np.flatnonzero(same.sum(axis=1) >= 256)
    columns = np.flatnonzero(same[rows[0] : rows[-1] + 1].sum(axis=0) >= 256)
    return (int(rows[0]), int(columns[0])), (int(rows[-1]) + 1, int(columns[-1]) + 1)


def test_elements_are_repeated_and_never_blended() -> None:
    values = np.array([[[0.0, 2.0], [-2.0, 1.0]]])
    colors = {tuple(color) for color in map_colors(values[0].ravel() / 2, SYMMETRIC).tolist()}
    plain = draw_map(attribution(values), SYMMETRIC, size=200)

    assert all((np.asarray(plain) == color).all(axis=-1).sum() >= 100 * 100 for color in colors)


def test_values_that_are_not_finite_are_marked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((1, 4, 4))
    values[0, 0, 0], values[0, 1, 1] = np.nan, np.inf
    texts = captions(monkeypatch)
    picture = draw_map(attribution(values), SYMMETRIC, caption="digit 3", size=40)

    assert (np.asarray(picture) == NOT_FINITE_COLOR).all(axis=-1).sum() == 2 * 10 * 10
    assert texts == ["digit 3\nSTATED of CHANNEL_SUM\n2 of 16 not finite (magenta)"]


def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what is written above pictures."""
    from PIL import ImageDraw

    texts: list[str] = []
    write = ImageDraw.ImageDraw.multiline_text

    def recording(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, **options: object) -> None:
        texts.append(text)
        write(self, xy, text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", recording)
    return texts


@pytest.mark.parametrize(
    ("normalization", "note"),
    [
        (
            recipe(center=3.0, scale=1.0, degenerate=True, zero_at=0.0),
            "degenerate: the scale is 0 or not finite, 1 was used",
        ),
        (recipe(center=0.5, scale=0.25, zero_at=0.0), "zero is off the scale"),
        (recipe(center=0.5, scale=0.25, zero_at=0.0), "12 of 16 beyond the ends"),
        (recipe(center=None, scale=None, zero_at=None), "no finite value among 16"),
    ],
)
def test_what_the_colors_cannot_show_is_written(
    normalization: Normalization, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = captions(monkeypatch)
    draw_map(attribution(np.repeat([0.0, 0.25, 0.5, 1.0], 4).reshape(1, 4, 4)), normalization, size=40)

    assert note in texts[0].splitlines()[1:]


def test_a_map_without_a_finite_value_is_drawn_as_such() -> None:
    picture = draw_map(attribution(np.full((1, 4, 4), np.nan)), recipe(center=None, scale=None, zero_at=None), size=40)

    assert (np.asarray(picture) == NOT_FINITE_COLOR).all(axis=-1).sum() == 40 * 40


def test_boxes_are_outlined_where_they_are() -> None:
    bare = np.asarray(draw_map(attribution(np.ones((1, 8, 8))), SYMMETRIC, size=80)).astype(int)
    boxed = np.asarray(draw_map(attribution(np.ones((1, 8, 8))), SYMMETRIC, size=80, boxes={"": Box(2, 1, 4, 3)}))
    rows, columns = np.nonzero((bare != boxed).any(axis=-1))
    origin = 8  # the margin

    assert columns.min() == origin + 20 and columns.max() == origin + 59
    assert rows.max() - rows.min() == 29


def test_a_view_that_is_no_plane_is_refused() -> None:
    with pytest.raises(RequestValueError, match="no plane; try CHANNEL_SUM"):
        draw_map(attribution(np.ones((3, 4, 4))), dataclasses.replace(SYMMETRIC, view="ELEMENTS"))


def test_elements_of_a_single_channel_are_a_plane() -> None:
    elements = draw_map(attribution(np.ones((1, 4, 4))), dataclasses.replace(SYMMETRIC, view="ELEMENTS"), size=40)
    assert (np.asarray(elements) == map_colors(np.array([0.5]), SYMMETRIC)[0]).all(axis=-1).sum() >= 1600


def test_a_map_without_tensor_is_refused() -> None:
    bare = dataclasses.replace(attribution(np.ones((1, 4, 4))).inputs["image"], tensor=None)
    with pytest.raises(RequestValueError, match="omit_tensors"):
        draw_map(bare, SYMMETRIC)


def test_an_input_is_drawn_as_the_picture_it_was() -> None:
    spec = InputSpec.from_proto(two_digits().inputs[0])
    image = np.zeros((64, 64), np.uint8)
    image[:32] = 200
    picture = np.asarray(draw_input(preprocess(image, spec).tensor, spec, size=64))

    assert ((picture == 200).all(axis=-1).sum(), (picture == 0).all(axis=-1).sum()) == (32 * 64, 32 * 64)


@pytest.mark.parametrize(("count", "columns", "grid"), [(5, 2, (3, 2)), (3, None, (1, 3)), (2, 5, (1, 2))])
def test_panels_are_put_in_a_grid(count: int, columns: int | None, grid: tuple[int, int]) -> None:
    panels = [Image.new("RGB", (20, 10), (index, 1, 2)) for index in range(count)]
    page = side_by_side(panels, columns=columns)

    assert page.size == (grid[1] * 20, grid[0] * 10)
    assert {(index, 1, 2) for index in range(count)} <= colors_of(page)
    for index in range(count):
        row, column = divmod(index, grid[1])
        assert page.getpixel((column * 20 + 5, row * 10 + 5)) == (index, 1, 2)


def test_maps_of_a_row_are_level_whatever_their_captions() -> None:
    short, tall = Image.new("RGB", (10, 10), (1, 1, 1)), Image.new("RGB", (10, 30), (2, 2, 2))
    page = side_by_side([short, tall])

    assert (page.getpixel((5, 29)), page.getpixel((15, 29))) == ((1, 1, 1), (2, 2, 2))
    assert page.getpixel((5, 15)) not in [(1, 1, 1), (2, 2, 2)]


def test_a_title_makes_the_page_higher_and_no_panels_are_refused() -> None:
    panel = Image.new("RGB", (20, 10))

    assert side_by_side([panel], title="trained").height > side_by_side([panel]).height
    with pytest.raises(RequestValueError, match="no panels"):
        side_by_side([])
