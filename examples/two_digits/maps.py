"""maps.png: the same raw tensors drawn by the client under four scales."""

from collections.abc import Sequence

from PIL import Image

from explainserve_client import Attribution, Box, Normalization
from explainserve_client.draw import draw_input, draw_map, side_by_side
from report import BOXES, VIEW, Explained

STATED = 0.05
"""The scale stated for the raw drawing: -STATED to +STATED units of probability per pixel."""

PANEL = 192


def draw_maps(answers: Sequence[Explained]) -> Image.Image:
    """One picture under several models: a row per model and class, a column per scale.

    The joint scales are pooled over all rows, which is what makes the rows comparable.
    """
    maps = [(answer, attribution) for answer in answers for attribution in answer.result.attributions]
    statistics = [answer.result.joint["all"].statistics[VIEW] for answer in answers]
    low = min(figure.min for figure in statistics if figure.min is not None)
    high = max(figure.max for figure in statistics if figure.max is not None)
    largest = max(-low, high)
    panels = []
    for answer, attribution in maps:
        scales: list[tuple[str, Normalization]] = [
            (f"raw, stated scale ±{STATED:g}", attribution.stated_scale(-STATED, STATED, VIEW)),
            ("own min-max", attribution.normalization("MIN_MAX", VIEW)),
            ("joint min-max of all rows", attribution.stated_scale(low, high, VIEW)),
            ("joint symmetric of all rows", attribution.stated_scale(-largest, largest, VIEW)),
        ]
        panels.append(_picture(answer, attribution))
        panels += [_panel(answer, attribution, scale, name) for name, scale in scales]
    title = (
        f"Picture {answers[0].picture}: the same raw attributions (sum over channels, unit: probability) under "
        "four scales. White is zero only on symmetric scales; elsewhere the bar marks zero."
    )
    return side_by_side(panels, columns=5, title=title)


def _boxes(answer: Explained) -> dict[str, Box]:
    return {name: Box(*box) for name, box in zip(BOXES, answer.pair.picture.boxes, strict=True)}


def _picture(answer: Explained, attribution: Attribution) -> Image.Image:
    change = attribution.instance_output_value - attribution.baseline_output_value
    caption = (
        f"{answer.model}\nclass {attribution.target.label}: F(x) {attribution.instance_output_value:.3f}\n"
        f"F(x) - F(x') {change:+.3f}"
    )
    spec = answer.result.inputs["image"]
    return draw_input(answer.instance, spec, boxes=_boxes(answer), caption=caption, size=PANEL)


def _panel(answer: Explained, attribution: Attribution, scale: Normalization, name: str) -> Image.Image:
    sums = attribution.regions
    numbers = ", ".join(f"{box} {sums[box][VIEW].sum:+.3f}" for box in BOXES)
    return draw_map(attribution, scale, boxes=_boxes(answer), caption=f"{name}\nsums: {numbers}", size=PANEL)
