"""Pictures of maps, from the raw tensors and the metadata alone. Needs pillow (the extra `draw`).

White means zero, and only in symmetric recipes, which have a diverging scale (blue, white, red). All others have a
sequential scale without white. The bar beside a map carries raw values at its ends and a tick where zero lies. What
cannot be seen (values that are not finite, or beyond the ends, or a zero off the scale) is said in the caption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve_client.errors import RequestValueError
from explainserve_client.models import InputSpec
from explainserve_client.preprocess import to_pixels
from explainserve_client.regions import Box
from explainserve_client.results import Attribution, InputAttribution
from explainserve_client.statistics import Normalization, Values
from explainserve_client.tensors import Array

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("explainserve_client.draw needs pillow; the extra is explainserve[draw]") from error

Colors = NDArray[np.uint8]

NOT_FINITE_COLOR = (255, 0, 255)
_NEGATIVE, _POSITIVE = (20, 70, 170), (178, 10, 28)
_SEQUENTIAL = ((20, 12, 60), (52, 58, 138), (36, 118, 142), (44, 168, 122), (140, 206, 76), (250, 226, 50))
_PAGE, _INK = (244, 244, 244), (0, 0, 0)
_MARGIN, _BAR_WIDTH, _TICK = 8, 14, 4


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on the color bar: height from 0 (bottom) to 1 (top), and the raw value that is written there."""

    height: float
    label: str


def map_colors(display: Values, normalization: Normalization) -> Colors:
    """Displayed values as RGB, one more axis of 3 at the end; NaN is NOT_FINITE_COLOR.

    In symmetric recipes a value is exactly white if and only if it is zero.
    """
    span = normalization.upper - normalization.lower
    filled = np.nan_to_num(display)
    if normalization.symmetric:
        colors = _diverging(filled / normalization.upper)
    else:
        colors = _sequential((filled - normalization.lower) / span)
    colors[np.isnan(display)] = NOT_FINITE_COLOR
    return colors


def bar_ticks(normalization: Normalization) -> tuple[Tick, ...]:
    """Raw values at the ends of the bar, and zero where it lies between them."""
    if normalization.center is None or normalization.scale is None:
        return ()
    ends = (normalization.lower, normalization.upper)
    raw = [_number(normalization.center + end * normalization.scale) for end in ends]
    ticks = [Tick(0.0, raw[0]), Tick(1.0, raw[1])]
    zero = _zero_height(normalization)
    if zero is not None and 0 < zero < 1:
        ticks.insert(1, Tick(zero, "0"))
    return tuple(ticks)


def draw_map(
    attribution: Attribution | InputAttribution,
    normalization: Normalization,
    *,
    input: str | None = None,
    boxes: Mapping[str, Box] | None = None,
    caption: str = "",
    size: int = 256,
    font_size: int = 12,
) -> Image.Image:
    """A map with its color bar and caption.

    Args:
        attribution: the map, or an attribution of one explained input, or of several with `input` naming one.
        normalization: an individual or a joint recipe of it, or a stated scale.
        boxes: outlines by name, in elements of the map.
        caption: first line; recipe and warnings follow.
        size: the longer side of the map in pixels, reached by repeating its elements and never by resampling.

    Raises:
        RequestValueError: the view is no plane, or the tensor was left out.
    """
    line = _input_attribution(attribution, input)
    if line.tensor is None:
        raise RequestValueError(f"the tensor of {line.name!r} was left out (omit_tensors), so there is nothing to draw")
    values = _plane(normalization.reduce(line.tensor), line, normalization.view)
    plane = _enlarged(_map_plane(values, normalization), size)
    picture = _outlined(plane, boxes or {}, plane.shape[0] // values.shape[0])
    text = "\n".join(
        filter(None, (caption, f"{normalization.kind} of {normalization.view}", *_notes(values, normalization)))
    )
    return _with_caption(_with_bar(picture, normalization, font_size), text, font_size)


def draw_input(
    tensor: Array,
    spec: InputSpec,
    *,
    boxes: Mapping[str, Box] | None = None,
    caption: str = "",
    size: int = 256,
    font_size: int = 12,
) -> Image.Image:
    """One instance as the picture that it was before preprocessing, framed like `draw_map`.

    Raises:
        RequestValueError: the signature states no layout or preprocessing, or channels that are neither one nor three.
    """
    pixels = np.clip(np.rint(to_pixels(tensor, spec)), 0, 255).astype(np.uint8)
    if pixels.shape[2] not in (1, 3):
        raise RequestValueError(f"input {spec.name!r} has {pixels.shape[2]} channels, which is no picture")
    plane = _enlarged(np.repeat(pixels, 3 // pixels.shape[2], axis=2), size)
    return _with_caption(_outlined(plane, boxes or {}, plane.shape[0] // pixels.shape[0]), caption, font_size)


def side_by_side(
    panels: Sequence[Image.Image], *, columns: int | None = None, title: str = "", font_size: int = 15
) -> Image.Image:
    """Panels in rows of `columns` (default: one row), aligned at their bottoms, under a title.

    Raises:
        RequestValueError: no panels.
    """
    if not panels:
        raise RequestValueError("there are no panels to put side by side")
    count = columns or len(panels)
    rows = [panels[start : start + count] for start in range(0, len(panels), count)]
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(min(count, len(panels)))]
    heights = [max(panel.height for panel in row) for row in rows]
    page = Image.new("RGB", (sum(widths), sum(heights)), _PAGE)
    for row_index, row in enumerate(rows):
        for column, panel in enumerate(row):
            page.paste(panel, (sum(widths[:column]), sum(heights[: row_index + 1]) - panel.height))
    return _with_caption(page, title, font_size) if title else page


def _input_attribution(attribution: Attribution | InputAttribution, input: str | None) -> InputAttribution:
    if isinstance(attribution, InputAttribution):
        return attribution
    return attribution.inputs.only() if input is None else attribution.inputs[input]


def _plane(values: Values, line: InputAttribution, view: str) -> Values:
    """The view as [height, width]."""
    if view == "ELEMENTS" and line.channel_axis is not None and values.shape[line.channel_axis] == 1:
        values = np.squeeze(values, line.channel_axis)
    if values.ndim != 2:
        raise RequestValueError(f"{view} of {line.name!r} has shape {values.shape}, which is no plane; try CHANNEL_SUM")
    return values.T if line.layout.replace("C", "") == "WH" else values


def _map_plane(values: Values, normalization: Normalization) -> Colors:
    if normalization.center is None or normalization.scale is None:
        return np.full((*values.shape, 3), NOT_FINITE_COLOR, np.uint8)
    return map_colors(normalization.display(np.where(np.isfinite(values), values, np.nan)), normalization)


def _diverging(share: Values) -> Colors:
    """White at 0, blue at -1, red at 1."""
    ends = np.where(share[..., np.newaxis] < 0, _NEGATIVE, _POSITIVE)
    colors = np.rint(255 + np.abs(share)[..., np.newaxis] * (ends - 255.0)).astype(np.uint8)
    colors[(share != 0) & (colors == 255).all(axis=-1)] = 254  # white is kept for zero itself
    return colors


def _sequential(share: Values) -> Colors:
    """Dark at 0, light at 1, nowhere white."""
    stops = np.linspace(0, 1, len(_SEQUENTIAL))
    channels = [np.interp(share, stops, channel) for channel in zip(*_SEQUENTIAL, strict=True)]
    return np.asarray(np.rint(np.stack(channels, axis=-1)), np.uint8)


def _zero_height(normalization: Normalization) -> float | None:
    """Where zero lies on the bar, 0 at its bottom and 1 at its top; None where it is off the scale."""
    if normalization.zero_at is None or not normalization.zero_on_scale:
        return None
    return (normalization.zero_at - normalization.lower) / (normalization.upper - normalization.lower)


def _notes(values: Values, normalization: Normalization) -> list[str]:
    """What the colors cannot show."""
    notes = []
    lost = int(np.count_nonzero(~np.isfinite(values)))
    if normalization.center is None or normalization.scale is None:
        return [f"no finite value among {values.size}"]
    if normalization.degenerate:
        notes.append("degenerate: the scale is 0 or not finite, 1 was used")
    if lost:
        notes.append(f"{lost} of {values.size} not finite (magenta)")
    with np.errstate(over="ignore"):
        share = (values[np.isfinite(values)] - normalization.center) / normalization.scale
    beyond = int(np.count_nonzero((share < normalization.lower) | (share > normalization.upper)))
    if beyond:
        notes.append(f"{beyond} of {values.size} beyond the ends")
    if not normalization.zero_on_scale:
        notes.append("zero is off the scale")
    return notes


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "0"


def _enlarged(plane: Colors, size: int) -> Colors:
    factor = max(1, size // max(plane.shape[:2]))
    return plane.repeat(factor, axis=0).repeat(factor, axis=1)


def _outlined(plane: Colors, boxes: Mapping[str, Box], factor: int) -> Image.Image:
    """The plane with each box's outline, light in dark so that it shows on any color, and its name."""
    picture = Image.fromarray(plane)
    pen = ImageDraw.Draw(picture)
    for name, box in boxes.items():
        left, top = box.x * factor, box.y * factor
        right, bottom = (box.x + box.width) * factor - 1, (box.y + box.height) * factor - 1
        pen.rectangle((left, top, right, bottom), outline=_INK)
        if min(right - left, bottom - top) > 2:
            pen.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=_PAGE)
        pen.text((left + 4, top + 2), name, fill=_INK, font=_font(11), stroke_width=1, stroke_fill=_PAGE)
    return picture


def _with_bar(picture: Image.Image, normalization: Normalization, font_size: int) -> Image.Image:
    """The picture, and right of it the color bar of the same height with its ticks."""
    ticks = bar_ticks(normalization)
    if not ticks:
        return picture
    font = _font(font_size)
    label_width = math.ceil(max(font.getlength(tick.label) for tick in ticks))
    left = picture.width + _MARGIN
    page = Image.new("RGB", (left + _BAR_WIDTH + _TICK + 3 + label_width, picture.height), _PAGE)
    page.paste(picture, (0, 0))
    levels = np.linspace(normalization.upper, normalization.lower, picture.height)[:, np.newaxis]
    page.paste(Image.fromarray(map_colors(levels, normalization)).resize((_BAR_WIDTH, picture.height)), (left, 0))
    pen = ImageDraw.Draw(page)
    for tick, middle in zip(ticks, _label_rows(ticks, picture.height, font_size), strict=True):
        row = tick_row(tick, picture.height)
        right = left + _BAR_WIDTH
        pen.line((right, row, right + _TICK - 1, row), fill=_INK)
        if 0 < tick.height < 1:
            pen.line((left, row, right, row), fill=_INK)
        pen.text((right + _TICK + 3, middle), tick.label, fill=_INK, font=font, anchor="lm")
    return page


def tick_row(tick: Tick, height: int) -> int:
    """Row of a tick on a bar of `height` rows, 0 at the top."""
    return round((1 - tick.height) * (height - 1))


def _label_rows(ticks: Sequence[Tick], height: int, font_size: int) -> list[float]:
    """Middle rows of the labels: at their ticks, but inside the bar and clear of each other, bottom first."""
    half = font_size / 2
    rows = [min(max(float(tick_row(tick, height)), half), height - half) for tick in ticks]
    for position in range(1, len(rows) - 1):
        clear = min(max(rows[position], rows[-1] + font_size), rows[0] - font_size)
        rows[position] = clear
    return rows


def _with_caption(picture: Image.Image, caption: str, font_size: int) -> Image.Image:
    """The picture in a margin, its caption above."""
    font = _font(font_size)
    right, bottom = ImageDraw.Draw(picture).multiline_textbbox((0, 0), caption, font=font)[2:]
    text_height = math.ceil(bottom) + _MARGIN // 2 if caption else 0
    width = max(picture.width, math.ceil(right))
    page = Image.new("RGB", (width + 2 * _MARGIN, picture.height + text_height + 2 * _MARGIN), _PAGE)
    ImageDraw.Draw(page).multiline_text((_MARGIN, _MARGIN), caption, fill=_INK, font=font)
    page.paste(picture, (_MARGIN, _MARGIN + text_height))
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
