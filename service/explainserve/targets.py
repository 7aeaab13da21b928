"""Targets: from what a request names to a constant selector over the score tensor of one instance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Target
from explainserve.plan import Differentiation, Selector
from explainserve.signature import OutputSpec, Score, Signature


@dataclass(frozen=True)
class Element:
    """One element of an output: by position, or by a label of the class axis where `label` is not None."""

    index: tuple[int, ...] = ()
    label: str | None = None

    @property
    def by_label(self) -> bool:
        """Whether a label names it."""
        return self.label is not None


@dataclass(frozen=True)
class Argmax:
    """The highest score of the instance itself (ties: lowest index)."""


@dataclass(frozen=True)
class TopK:
    """The `count` highest scores of the instance itself, descending (ties: lowest index)."""

    count: int


@dataclass(frozen=True)
class Margin:
    """One element minus another."""

    positive: Element
    negative: Element

    @property
    def by_label(self) -> bool:
        """Whether labels name its elements."""
        return self.positive.by_label or self.negative.by_label


@dataclass(frozen=True, eq=False)
class Weights:
    """A weighted sum: float tensor of the output's shape without the batch axis."""

    tensor: NDArray[np.floating]


Selection = Element | Argmax | TopK | Margin | Weights


@dataclass(frozen=True, eq=False)
class TargetSpec:
    """A target as requested.

    Attributes:
        output: name, or "" for the only output.
        reduction: "", "sum" or "mean": how axes that an index path leaves open are folded.
        instance_index: the instance it belongs to, or None for every instance.
        request_index: its position in the request.
        names_score: whether the request does; see `scored`.
    """

    output: str
    score: Score
    selection: Selection
    reduction: str = ""
    instance_index: int | None = None
    request_index: int = 0
    names_score: bool = True

    def scored(self, signature: Signature, *, before_activation: bool) -> TargetSpec:
        """The same with the score that a method explains: its own where the request names none.

        Args:
            before_activation: whether the method is defined on the score before the softmax or sigmoid.

        Raises:
            InvalidRequest: unknown output.
        """
        if self.names_score or not before_activation:
            return self
        return replace(self, score=signature.output(self.output).score_before_activation)

    @property
    def target_count(self) -> int:
        """Number of targets it becomes on one instance."""
        return self.selection.count if isinstance(self.selection, TopK) else 1

    def function(self, signature: Signature) -> Differentiation:
        """The output and head it needs, forward-only.

        Raises:
            InvalidRequest: unknown output, or the output has no such score.
        """
        output = signature.output(self.output)
        return Differentiation(output.name, output.score_head(self.score))

    def output_bytes(self, signature: Signature) -> int:
        """Size of the score tensor of one instance, axes of free extent counted as 1.

        Raises:
            InvalidRequest: unknown output.
        """
        output = signature.output(self.output)
        return math.prod(axis.size or 1 for axis in output.axes[1:]) * output.dtype.itemsize

    def resolve(self, signature: Signature, scores: NDArray[np.generic]) -> list[Target]:
        """Resolves it on one instance.

        Args:
            scores: the instance's score tensor, without the batch axis.

        Raises:
            InvalidRequest: out of range (TARGET_OUT_OF_RANGE), wrong path length (TARGET_PATH_LENGTH), wrong weights
                (TARGET_WEIGHTS_MISMATCH), or no class axis to rank (TARGET_NEEDS_CLASSES).
            NotFound: no such label (UNKNOWN_LABEL).
        """
        output = signature.output(self.output)
        return list(_Resolution(self, output, scores).targets())


def certain_target_count(specs: Sequence[TargetSpec]) -> int:
    """How many targets of one output and score differ whatever the scores and labels are."""
    named = {spec.selection for spec in specs if isinstance(spec.selection, Element | Margin)}
    by_label = sum(selection.by_label for selection in named)
    return max(by_label, len(named) - by_label, *(spec.target_count for spec in specs))


@dataclass(frozen=True, eq=False)
class _Resolution:
    """One target spec on one score tensor."""

    spec: TargetSpec
    output: OutputSpec
    scores: NDArray[np.generic]

    def targets(self) -> Iterator[Target]:
        match self.spec.selection:
            case Element(label=label) as element:
                index = self._index(element)
                yield self._target(self._selector(index), "index" if label is None else "label", index)
            case Argmax():
                yield from self._ranked(1, "argmax")
            case TopK(count):
                yield from self._ranked(count, "top_k")
            case Margin(positive, negative):
                yield self._margin(self._index(positive), self._index(negative))
            case Weights(tensor):
                yield self._target(self._weight_selector(tensor), "weights")

    def _ranked(self, count: int, selection: str) -> Iterator[Target]:
        if self.scores.ndim > 1:
            raise InvalidRequest(
                "TARGET_NEEDS_CLASSES",
                f"{selection} ranks outputs of shape [batch, classes]; {self.output.name!r} has "
                f"{self.scores.ndim} axes after the batch axis",
                output=self.output.name,
                shape=list(self.scores.shape),
            )
        if not 1 <= count <= self.scores.size:
            raise InvalidRequest(
                "TARGET_OUT_OF_RANGE",
                f"top_k count {count} is not between 1 and {self.scores.size}",
                output=self.output.name,
                count=count,
                class_count=self.scores.size,
            )
        order = np.argsort(-self.scores.reshape(-1).astype(np.float64), kind="stable")[:count]
        for position in order.tolist():
            index = (position,) if self.scores.ndim else ()
            yield self._target(self._selector(index), selection, index)

    def _margin(self, positive: tuple[int, ...], negative: tuple[int, ...]) -> Target:
        plus, minus = self._selector(positive), self._selector(negative)
        selector = Selector(
            np.concatenate([plus.indices, minus.indices]), np.concatenate([plus.weights, -minus.weights])
        )
        label = " - ".join((self._label(positive), self._label(negative))) if self._label(positive) else ""
        return replace(self._target(selector, "margin", positive), negative_index=negative, label=label)

    def _target(self, selector: Selector, selection: str, index: tuple[int, ...] = ()) -> Target:
        folded = selection != "weights" and len(index) < self.scores.ndim
        return Target(
            output=self.output.name,
            score=self.spec.score,
            head=self.output.score_head(self.spec.score),
            selector=selector,
            index=index,
            label=self._label(index),
            selection=selection,
            reduction=self.spec.reduction if folded else "",
            request_index=self.spec.request_index,
        )

    def _label(self, index: tuple[int, ...]) -> str:
        axis = self.output.class_axis
        return self.output.label(index[axis - 1]) if axis is not None and len(index) >= axis else ""

    def _index(self, element: Element) -> tuple[int, ...]:
        index = element.index if element.label is None else self._class_path(element.label)
        shorter = len(index) < self.scores.ndim
        if len(index) > self.scores.ndim or (shorter and not self.spec.reduction):
            raise InvalidRequest(
                "TARGET_PATH_LENGTH",
                f"output {self.output.name!r} has {self.scores.ndim} axes after the batch axis, the index path "
                f"{list(index)} has {len(index)} entries"
                + ("; a shorter path needs reduction SUM or MEAN" if shorter else ""),
                output=self.output.name,
                path=list(index),
                shape=list(self.scores.shape),
            )
        for axis, (position, size) in enumerate(zip(index, self.scores.shape, strict=False)):
            if not 0 <= position < size:
                raise InvalidRequest(
                    "TARGET_OUT_OF_RANGE",
                    f"output {self.output.name!r}: index {position} of axis {axis} is not in [0, {size})",
                    output=self.output.name,
                    axis=axis,
                    index=position,
                    size=size,
                )
        return index

    def _class_path(self, label: str) -> tuple[int, ...]:
        position = self.output.class_index(label)
        if self.output.class_axis != 1:
            raise InvalidRequest(
                "TARGET_NEEDS_CLASSES",
                f"labels name positions of axis 1; the class axis of {self.output.name!r} is {self.output.class_axis}",
                output=self.output.name,
                class_axis=self.output.class_axis,
            )
        return (position,)

    def _selector(self, index: tuple[int, ...]) -> Selector:
        rest = self.scores.shape[len(index) :]
        first = sum(position * stride for position, stride in zip(index, _strides(self.scores.shape), strict=False))
        count = int(np.prod(rest, dtype=np.int64))
        weight = 1.0 / count if self.spec.reduction == "mean" else 1.0
        return Selector(np.arange(first, first + count, dtype=np.int64), np.full(count, weight, np.float32))

    def _weight_selector(self, tensor: NDArray[np.floating]) -> Selector:
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
            flat = tensor.reshape(-1).astype(np.float32)
        if tensor.shape != self.scores.shape or not np.isfinite(flat).all():
            raise InvalidRequest(
                "TARGET_WEIGHTS_MISMATCH",
                f"target weights of shape {list(tensor.shape)} are finite in float32 and of the shape of output "
                f"{self.output.name!r}, {list(self.scores.shape)}",
                output=self.output.name,
                expected=list(self.scores.shape),
                actual=list(tensor.shape),
            )
        indices = np.flatnonzero(flat)
        return Selector(indices, flat[indices])


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Elements between neighbours of each axis, row-major."""
    return list(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]
