"""Targets resolve to constant selectors over the score tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from explainserve.errors import InvalidRequest, NotFound
from explainserve.explanation import Target
from explainserve.plan import Differentiation
from explainserve.signature import Activation, Axis, OutputKind, OutputSpec, Score, ScoreHead, Signature
from explainserve.targets import Argmax, Element, Margin, Selection, TargetSpec, TopK, Weights

CLASSES = np.array([0.5, 3.0, -1.0, 3.0], np.float32)


def signature(*sizes: int, labels: tuple[str, ...] = (), kind: OutputKind = OutputKind.LOGITS) -> Signature:
    axes = (Axis("batch"), *(Axis("", size) for size in sizes))
    class_axis = 1 if sizes else None
    return Signature((), (OutputSpec("y", np.dtype("f4"), axes, kind, Activation.SOFTMAX, class_axis, labels),))


def resolve(
    selection: Selection, scores: np.ndarray, reduction: str = "", labels: tuple[str, ...] = ()
) -> list[Target]:
    spec = TargetSpec("", Score.LOGIT, selection, reduction)
    return spec.resolve(signature(*scores.shape, labels=labels), scores)


def values(selection: Selection, scores: np.ndarray, **kwargs: str) -> list[float]:
    return [target.selector.value(scores) for target in resolve(selection, scores, **kwargs)]  # type: ignore[arg-type]


def test_an_index_selects_its_element() -> None:
    assert values(Element((2,)), CLASSES) == [-1.0]


def test_an_output_of_shape_batch_takes_the_empty_path() -> None:
    assert values(Element(()), np.float32(7.0).reshape(())) == [7.0]
    assert values(Argmax(), np.float32(7.0).reshape(())) == [7.0]


def test_ties_go_to_the_lowest_index() -> None:
    assert [target.index for target in resolve(Argmax(), CLASSES)] == [(1,)]
    assert [target.index for target in resolve(TopK(3), CLASSES)] == [(1,), (3,), (0,)]


def test_a_margin_is_a_difference() -> None:
    (target,) = resolve(Margin(Element((1,)), Element((2,))), CLASSES)

    assert target.selector.value(CLASSES) == 4.0
    assert (target.index, target.negative_index) == ((1,), (2,))


def test_labels_name_classes_and_are_echoed() -> None:
    labels = ("a", "b", "c", "d")
    (named,) = resolve(Element(label="c"), CLASSES, labels=labels)
    (margin,) = resolve(Margin(Element(label="b"), Element((0,))), CLASSES, labels=labels)

    assert (named.index, named.label, named.selection) == ((2,), "c", "label")
    assert margin.label == "b - a"
    with pytest.raises(NotFound) as unknown:
        resolve(Element(label="z"), CLASSES, labels=labels)
    assert unknown.value.reason == "UNKNOWN_LABEL"


@given(scores=hnp.arrays(np.float32, (3, 2, 4), elements=st.floats(-8, 8, width=32)), k=st.integers(0, 2))
def test_short_paths_fold_what_remains(scores: np.ndarray, k: int) -> None:
    np.testing.assert_allclose(values(Element((k,)), scores, reduction="sum"), [scores[k].sum(dtype=float)], atol=1e-4)
    np.testing.assert_allclose(values(Element((k, 1)), scores, reduction="mean"), [scores[k, 1].mean()], atol=1e-4)
    assert values(Element((k, 1, 3)), scores, reduction="mean") == [float(scores[k, 1, 3])]


@given(
    scores=hnp.arrays(np.float32, (2, 3), elements=st.floats(-8, 8, width=32)),
    weights=hnp.arrays(np.float32, (2, 3), elements=st.sampled_from([0.0, 0.5, -2.0])),
)
def test_weights_are_a_weighted_sum(scores: np.ndarray, weights: np.ndarray) -> None:
    np.testing.assert_allclose(values(Weights(weights), scores), [(scores.astype(float) * weights).sum()], atol=1e-6)


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        (Element((4,)), "TARGET_OUT_OF_RANGE"),
        (Element((-1,)), "TARGET_OUT_OF_RANGE"),
        (Element((1, 0)), "TARGET_PATH_LENGTH"),
        (Element(()), "TARGET_PATH_LENGTH"),
        (TopK(0), "TARGET_OUT_OF_RANGE"),
        (TopK(5), "TARGET_OUT_OF_RANGE"),
        (Margin(Element((0,)), Element((9,))), "TARGET_OUT_OF_RANGE"),
        (Weights(np.ones(3)), "TARGET_WEIGHTS_MISMATCH"),
        (Weights(np.full(4, np.nan)), "TARGET_WEIGHTS_MISMATCH"),
        (Weights(np.full(4, 1e300)), "TARGET_WEIGHTS_MISMATCH"),
    ],
)
def test_what_does_not_fit_is_refused(selection: Selection, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(selection, CLASSES)

    assert refused.value.reason == reason


def test_only_a_path_that_is_too_short_is_told_of_reductions() -> None:
    for path, told in [((), True), ((1, 0), False)]:
        with pytest.raises(InvalidRequest) as refused:
            resolve(Element(path), CLASSES)
        assert ("reduction" in refused.value.message) is told


def test_ranking_needs_classes() -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(Argmax(), np.zeros((2, 3), np.float32))

    assert refused.value.reason == "TARGET_NEEDS_CLASSES"


HEADS = {
    (OutputKind.LOGITS, Activation.SOFTMAX): (ScoreHead.IDENTITY, ScoreHead.SOFTMAX, ScoreHead.LOG_SOFTMAX),
    (OutputKind.LOGITS, Activation.SIGMOID): (ScoreHead.IDENTITY, ScoreHead.SIGMOID, ScoreHead.LOG_SIGMOID),
    (OutputKind.LOGITS, Activation.NONE): (ScoreHead.IDENTITY, None, None),
    (OutputKind.PROBABILITIES, Activation.NONE): (None, ScoreHead.IDENTITY, ScoreHead.LOG),
    (OutputKind.PROBABILITIES, Activation.SOFTMAX): (None, ScoreHead.IDENTITY, ScoreHead.LOG),
    (OutputKind.VALUES, Activation.NONE): (None, None, None),
}


@pytest.mark.parametrize(("kind", "activation"), HEADS)
def test_the_score_decides_the_head_or_is_refused(kind: OutputKind, activation: Activation) -> None:
    output = OutputSpec("y", np.dtype("f4"), (Axis("batch"), Axis("", 4)), kind, activation)

    assert output.score_head(Score.OUTPUT) is ScoreHead.IDENTITY
    for score, head in zip(
        (Score.LOGIT, Score.PROBABILITY, Score.LOG_PROBABILITY), HEADS[kind, activation], strict=True
    ):
        if head is None:
            with pytest.raises(InvalidRequest, match="score"):
                output.score_head(score)
        else:
            assert output.score_head(score) is head


def test_a_model_with_several_outputs_needs_a_name() -> None:
    first, second = (OutputSpec(n, np.dtype("f4"), (Axis("batch"), Axis("", 2))) for n in ("a", "b"))
    both = Signature((), (first, second))

    assert TargetSpec("b", Score.OUTPUT, Argmax()).function(both) == Differentiation("b", ScoreHead.IDENTITY)
    for name, reason in (("", "OUTPUT_REQUIRED"), ("c", "UNKNOWN_OUTPUT")):
        with pytest.raises(InvalidRequest) as refused:
            TargetSpec(name, Score.OUTPUT, Argmax()).function(both)
        assert refused.value.reason == reason
