"""What is explained: every spelling of a target.

    3                        class 3
    (3, 10, 12)              an index path: one position per output axis after the batch axis, () where there is none
    "goldfinch"              a label; Label("argmax") where a label equals a keyword
    "argmax", TopK(5)        the highest scores of the instance itself, held fixed along the path
    Margin(3, 8)             one element minus another
    a float array            weights of the output's shape
    Target(3, score=...)     any of these with output, score, reduction or instance of its own
    [3, "argmax", ...]       several

Results are ordered by instance, target, baseline.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from explainserve.v1 import target_pb2
from explainserve_client.errors import RequestTypeError, RequestValueError
from explainserve_client.models import ModelInfo
from explainserve_client.names import enum_value, optional_name, short_name
from explainserve_client.tensors import to_tensor


@dataclass(frozen=True, slots=True)
class Label:
    """A label of the class axis, for labels that equal a keyword, such as Label("argmax")."""

    text: str


@dataclass(frozen=True, slots=True)
class TopK:
    """The `count` highest scores of the instance itself, in descending order (ties: lowest index)."""

    count: int


@dataclass(frozen=True, slots=True)
class Margin:
    """The element `positive` minus the element `negative`, each a class, an index path or a label."""

    positive: Any
    negative: Any


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A selection with options of its own.

    Attributes:
        selection: any spelling of the module's docstring but a list.
        output: name of the output; "" is the only one.
        score: "OUTPUT", "LOGIT", "PROBABILITY" or "LOG_PROBABILITY"; None takes the request's.
        reduction: "SUM" or "MEAN" over the axes that an index path leaves open; None refuses a short path.
        instance_index: the instance it belongs to; None is every one.
    """

    selection: Any
    output: str = ""
    score: str | None = None
    reduction: str | None = None
    instance_index: int | None = None


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """A target as it was explained, resolved on one instance.

    Attributes:
        output, score: which output, and the unit of every value, such as "PROBABILITY".
        index: position of the element after the batch axis; empty for weights.
        negative_index: position of the subtracted element of a margin; empty otherwise.
        label: "" where the model states none.
        selection: "index", "label", "argmax", "top_k", "margin" or "weights".
        request_target_index: position of the request's target this came from.
        reduction: "SUM", "MEAN", or None where no axis was left open.
    """

    output: str
    score: str
    index: tuple[int, ...]
    negative_index: tuple[int, ...]
    label: str
    selection: str
    request_target_index: int
    reduction: str | None

    def __str__(self) -> str:
        positions = [", ".join(map(str, index)) for index in (self.index, self.negative_index) if index]
        name = self.label or " - ".join(positions) or self.selection
        return f"{name} ({self.score} of {self.output})"

    @classmethod
    def from_proto(cls, message: target_pb2.ResolvedTarget) -> ResolvedTarget:
        """Reads the message."""
        return cls(
            output=message.output,
            score=short_name(target_pb2.Score, message.score),
            index=tuple(message.index),
            negative_index=tuple(message.negative_index),
            label=message.label,
            selection=message.selection,
            request_target_index=message.request_target_index,
            reduction=optional_name(target_pb2.Reduction, message.reduction),
        )


def target_messages(targets: Any, score: str | None, info: ModelInfo) -> list[target_pb2.Target]:
    """The messages of a request; `score` is for every target without its own.

    Without targets and score the choice is the server's; a score alone is put on the target that the server would
    choose.
    """
    if targets is None and score is None:
        return []
    if targets is None:
        targets = "argmax" if info.default_target is None else info.default_target
    several = targets if isinstance(targets, list) else [targets]
    if not several:
        raise RequestValueError("targets is an empty list; leave it out for the model's default")
    return [_target_message(target, score) for target in several]


def _target_message(target: Any, score: str | None) -> target_pb2.Target:
    stated = target if isinstance(target, Target) else Target(target)
    message = target_pb2.Target(output=stated.output, instance_index=stated.instance_index)
    unit = score if stated.score is None else stated.score
    if unit is not None:
        message.score = enum_value(target_pb2.Score, unit)
    if stated.reduction is not None:
        message.reduction = enum_value(target_pb2.Reduction, stated.reduction)
    _select(message, stated.selection)
    return message


def _select(message: target_pb2.Target, selection: Any) -> None:
    if isinstance(selection, str) and selection == "argmax":
        message.argmax.SetInParent()
    elif isinstance(selection, TopK):
        message.top_k.count = selection.count
    elif isinstance(selection, Margin):
        message.margin.positive.CopyFrom(_element(selection.positive))
        message.margin.negative.CopyFrom(_element(selection.negative))
    elif isinstance(selection, np.ndarray) and selection.dtype.kind == "f":
        message.weights.CopyFrom(to_tensor(selection, "float32"))
    else:
        message.element.CopyFrom(_element(selection))


def _element(selection: Any) -> target_pb2.Element:
    if isinstance(selection, Label):
        return target_pb2.Element(label=selection.text)
    if isinstance(selection, str):
        return target_pb2.Element(label=selection)
    if isinstance(selection, np.ndarray) and selection.ndim:
        raise RequestTypeError(
            f"an array of {selection.dtype} is no target: use a list for several classes, a tuple for an index path, "
            "a float array for weights"
        )
    path = selection if isinstance(selection, tuple) else (selection,)
    return target_pb2.Element(index=target_pb2.IndexPath(indices=_positions(path)))


def _positions(path: Iterable[Any]) -> list[int]:
    positions = [_position(item) for item in path]
    if any(position < 0 for position in positions):
        raise RequestValueError(f"positions count from 0: {tuple(positions)}")
    return positions


def _position(item: Any) -> int:
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise RequestTypeError(
            f"{item!r} is no target: use a class, an index path, a label, 'argmax', TopK, Margin, weights or Target"
        )
    return operator.index(item)
