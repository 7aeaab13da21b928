"""Every spelling of a target, and the message it becomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from client.fake_service import tensor
from explainserve.v1 import target_pb2
from explainserve_client import (
    Label,
    Margin,
    ModelInfo,
    RequestTypeError,
    RequestValueError,
    ResolvedTarget,
    Target,
    TopK,
)
from explainserve_client.targets import target_messages


def at(*indices: int) -> target_pb2.Element:
    return target_pb2.Element(index=target_pb2.IndexPath(indices=indices))


def labelled(text: str) -> target_pb2.Element:
    return target_pb2.Element(label=text)


WEIGHTS = np.arange(10.0)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        (3, target_pb2.Target(element=at(3))),
        (np.int64(3), target_pb2.Target(element=at(3))),
        (np.array(3), target_pb2.Target(element=at(3))),
        ((3, 10, 12), target_pb2.Target(element=at(3, 10, 12))),
        ((), target_pb2.Target(element=at())),
        ("goldfinch", target_pb2.Target(element=labelled("goldfinch"))),
        (Label("argmax"), target_pb2.Target(element=labelled("argmax"))),
        ("argmax", target_pb2.Target(argmax=target_pb2.Argmax())),
        (TopK(5), target_pb2.Target(top_k=target_pb2.TopK(count=5))),
        (TopK(0), target_pb2.Target(top_k=target_pb2.TopK(count=0))),
        (Margin(3, 8), target_pb2.Target(margin=target_pb2.Margin(positive=at(3), negative=at(8)))),
        (
            Margin("cat", (1, 2)),
            target_pb2.Target(margin=target_pb2.Margin(positive=labelled("cat"), negative=at(1, 2))),
        ),
        (WEIGHTS, target_pb2.Target(weights=tensor(WEIGHTS))),
        (
            Target((3,), output="aux", score="LOGIT", reduction="MEAN", instance_index=1),
            target_pb2.Target(
                element=at(3),
                output="aux",
                score=target_pb2.SCORE_LOGIT,
                reduction=target_pb2.REDUCTION_MEAN,
                instance_index=1,
            ),
        ),
        (Target(3, instance_index=0), target_pb2.Target(element=at(3), instance_index=0)),
    ],
)
def test_a_spelling_becomes_its_message(spelling: Any, expected: target_pb2.Target, info: ModelInfo) -> None:
    assert target_messages(spelling, None, info) == [expected]
    assert target_messages([spelling, spelling], None, info) == [expected, expected]


@pytest.mark.parametrize("score", ["OUTPUT", "LOGIT", "PROBABILITY", "LOG_PROBABILITY", "probability"])
def test_the_score_applies_to_targets_without_their_own(score: str, info: ModelInfo) -> None:
    first, second = target_messages([3, Target(8, score="OUTPUT")], score, info)

    assert target_pb2.Score.Name(first.score) == f"SCORE_{score.upper()}"
    assert second.score == target_pb2.SCORE_OUTPUT


def test_without_targets_the_server_chooses(info: ModelInfo) -> None:
    assert target_messages(None, None, info) == []


def test_a_score_alone_is_put_on_the_target_the_server_would_choose(info: ModelInfo, several_inputs: ModelInfo) -> None:
    probability = target_pb2.SCORE_PROBABILITY

    assert target_messages(None, "PROBABILITY", info) == [
        target_pb2.Target(argmax=target_pb2.Argmax(), score=probability)
    ]
    assert target_messages(None, "PROBABILITY", several_inputs) == [target_pb2.Target(element=at(4), score=probability)]


@pytest.mark.parametrize("spelling", [True, 3.0, None, {}, object(), np.array([3, 8]), Margin(3, 8.0), (1, 2.5)])
def test_what_is_no_target_is_refused(spelling: Any, info: ModelInfo) -> None:
    with pytest.raises(RequestTypeError, match="no target"):
        target_messages([spelling], None, info)


@pytest.mark.parametrize("spelling", [-1, (0, -2)])
def test_positions_count_from_zero(spelling: Any, info: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match="count from 0"):
        target_messages(spelling, None, info)


def test_an_unknown_score_lists_those_there_are(info: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match="no Score 'SOFTMAX'; there are OUTPUT, LOGIT, PROBABILITY, LOG_PROB"):
        target_messages(3, "SOFTMAX", info)


def test_an_empty_list_is_refused(info: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match="empty"):
        target_messages([], None, info)


def test_a_resolved_target_reads_as_a_sentence() -> None:
    message = target_pb2.ResolvedTarget(
        output="logits", score=target_pb2.SCORE_LOGIT, index=[3], negative_index=[8], selection="margin"
    )
    resolved = ResolvedTarget.from_proto(message)

    assert str(resolved) == "3 - 8 (LOGIT of logits)"
    assert (resolved.index, resolved.negative_index, resolved.reduction) == ((3,), (8,), None)
