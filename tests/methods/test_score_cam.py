"""Score-CAM: what the masks hide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Subject
from explainserve.methods import ScoreCam
from explainserve.plan import Evaluation, SegmentEvaluation
from explainserve.signature import Axis, Layer
from methods.analytic import question_of, values_of

PEAK = np.array([[0.0, 1.0], [0.0, 3.0]], np.float32)


def test_masks_reach_from_0_to_1_at_the_size_of_the_image() -> None:
    """As in the paper's algorithm 1, which scales what it has upsampled: bilinear interpolation levels a peak."""
    image = np.ones((1, 8, 8), np.float32)
    asked = question_of(values_of(lambda rows: rows.mean(axis=1)), {"x": image}, {"x": 0 * image}, x="CHW")
    layer = Layer("a", axes=(Axis("batch"), Axis("", 2), Axis("", 2), Axis("", 2)))
    subject: Subject = replace(asked.subject, layers=(layer,))
    asked, method = replace(asked, subject=subject), ScoreCam(layer="a")

    value = np.stack([PEAK, np.ones_like(PEAK)])[None]
    masked = method.attribution(
        asked, method.plan(asked), Evaluation((SegmentEvaluation(np.ones(1), values={"a": value}),))
    )
    assert not isinstance(masked, Attribution)
    varied, constant = (segment.end["x"] for segment in masked.segments)

    assert (varied.min(), varied.max()) == (0, 1)
    assert not constant.any()


def test_an_unknown_layer_is_refused_with_the_last_names_and_how_many_there_are() -> None:
    image = np.ones((1, 8, 8), np.float32)
    asked = question_of(values_of(lambda rows: rows.mean(axis=1)), {"x": image}, {"x": 0 * image}, x="CHW")
    subject: Subject = replace(asked.subject, layers=tuple(Layer(f"layer{k}") for k in range(1, 13)))

    with pytest.raises(InvalidRequest) as refused:
        ScoreCam(layer="layer13").resolved(subject)
    assert refused.value.reason == "UNKNOWN_LAYER"
    assert refused.value.metadata == {
        "layer": "layer13",
        "layers": ", ".join(f"layer{k}" for k in range(5, 13)),
        "layer_count": "12",
    }
