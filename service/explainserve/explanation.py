"""The nouns: an instance, what is asked of it, where its path starts, and the attribution that answers."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from explainserve.plan import STANDARD, Differentiation, GradientRule, Selector, Tensors
from explainserve.signature import Layer, MapSpec, Score, ScoreHead, element_count

T = TypeVar("T")


class StopReason(enum.Enum):
    """Why a path integral ended, or that it has not."""

    FIXED_STEPS = "fixed_steps"
    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    TIME_BUDGET = "time_budget"
    NON_CONVERGENT = "non_convergent"
    NON_FINITE = "non_finite"
    UNFINISHED = "unfinished"


@dataclass(frozen=True, eq=False)
class Instance:
    """One instance, without the batch axis.

    Attributes:
        moving: floating-point inputs that move along the path and receive attributions.
        fixed: all other inputs.
    """

    moving: Tensors
    fixed: Tensors

    def __post_init__(self) -> None:
        object.__setattr__(self, "_derived", _Derived())  # no field: it is no part of what the instance is

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a method makes of this instance alone: the same object for all questions, as long as any of them holds
        it, so that their rows are shared. Questions that are planned at the same time wait for the one that makes it.

        Args:
            key: stands for all that decides the value.
        """
        derived: _Derived = self.__dict__["_derived"]
        return derived.get(key, make)


class _Derived:
    """Values by key, as long as somebody holds them."""

    def __init__(self) -> None:
        self._made: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self._making = RLock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._making:
            found: T | None = self._made.get(key)
            return self._made.setdefault(key, make()) if found is None else found


@dataclass(frozen=True, eq=False)
class Target:
    """What is explained, resolved on one instance: one number computed from one output.

    Attributes:
        index, negative_index: of the element and of a margin's subtracted element; () where there is none.
        selection: how it was chosen: "index", "label", "argmax", "top_k", "margin" or "weights".
        reduction: how remaining axes were folded: "", "sum" or "mean".
        request_index: position of the request's target it came from.
    """

    output: str
    score: Score
    head: ScoreHead
    selector: Selector
    index: tuple[int, ...] = ()
    negative_index: tuple[int, ...] = ()
    label: str = ""
    selection: str = "index"
    reduction: str = ""
    request_index: int = 0


@dataclass(frozen=True, eq=False)
class Baseline:
    """Where a path starts: values of the moving inputs, in MODEL space.

    Attributes:
        layers: stated values of layers that are explained in the place of inputs; others have theirs at `moving`.
        request_index: position of the request's baseline it came from.
        draw_index: draw number of a noise baseline.
    """

    moving: Tensors
    request_index: int = 0
    draw_index: int = 0
    layers: Tensors = field(default_factory=dict)

    def at_layers(self, values: Tensors) -> Tensors:
        """The values of layers at `moving`, but for those that are stated."""
        return {
            name: self.layers[name].astype(own.dtype) if name in self.layers else own for name, own in values.items()
        }


@dataclass(frozen=True, eq=False)
class Subject:
    """What a method may know of the model and the instances before anything is evaluated.

    Attributes:
        maps: how the moving inputs are laid out, by name.
        shapes: of one instance's moving inputs, by name.
        cut: layers that are explained in the place of inputs; `maps` and `shapes` are theirs then.
        layers: of the model, in the order of its graph.
        configured_layers: names of those that the model's owner picked.
        pre_activations: names of those that are scores themselves, before their softmax or sigmoid.
    """

    maps: Mapping[str, MapSpec]
    shapes: Mapping[str, tuple[int, ...]]
    layers: tuple[Layer, ...] = ()
    configured_layers: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    pre_activations: tuple[str, ...] = ()

    @property
    def element_count(self) -> int:
        """Elements of all moving inputs of one instance."""
        return sum(element_count(shape) for shape in self.shapes.values())


@dataclass(frozen=True, eq=False)
class Question:
    """Why does the target have this value at the instance, and not the one at the baseline?

    Attributes:
        baseline: None for methods that need none, or take all.
        instance_output_value, baseline_output_value: F(x) and F(x'), in the unit of the target's score; the second is
            the mean over all baselines for methods that take all, and None without a baseline.
        baselines: all of them, for methods that take all.
        anytime: whether time may end before the answer is whole, so that its first rounds should be small.
    """

    subject: Subject
    instance: Instance
    target: Target
    baseline: Baseline | None
    instance_output_value: float
    baseline_output_value: float | None
    baselines: tuple[Baseline, ...] = ()
    anytime: bool = False

    @property
    def start(self) -> Tensors:
        """The moving inputs at the baseline."""
        assert self.baseline is not None, "A method that needs a baseline was asked without one. This is a bug."
        return self.baseline.moving

    @property
    def start_output_value(self) -> float:
        """F(x')."""
        assert self.baseline_output_value is not None, "A method that needs a baseline was asked without one."
        return self.baseline_output_value

    @property
    def output_change(self) -> float:
        """F(x) - F(x')."""
        return self.instance_output_value - self.start_output_value

    @property
    def score(self) -> Differentiation:
        """The target's output and head, forward only."""
        return Differentiation(self.target.output, self.target.head, cut=self.subject.cut)

    @property
    def gradient(self) -> Differentiation:
        """The same, differentiated with respect to all moving inputs."""
        return self.gradient_by(STANDARD)

    def gradient_by(self, rule: GradientRule) -> Differentiation:
        """The same under a gradient rule."""
        return replace(self.score, wrt=tuple(self.instance.moving), rule=rule)


@dataclass(frozen=True)
class Fit:
    """How well the model that a method fits to the scores of its samples explains them.

    Attributes:
        r_squared: weighted share of their variance, at most 1; None where the scores do not vary, and
            for a mean over baselines.
        intercept: its score where every feature is absent.
    """

    r_squared: float | None
    intercept: float


@dataclass(frozen=True, eq=False)
class Attribution:
    """The answer of a method.

    Attributes:
        tensors: raw attributions by name of the input or layer, float32, without the batch axis.
        step_count: gradient evaluations, or forward evaluations of a method that takes no gradient.
        map_error: estimated relative L2 error over all tensors: of quadrature, or of sampling (the length of the
            standard errors over that of the map); None where there is no estimate.
        alphas, scores: the score path, ascending from 0 (F(x')) to 1 (F(x)), both float64, shape (points,); empty for
            methods without a path.
        baseline_output_value: where the path of the method itself starts, for methods that need no baseline.
        maps: layout of tensors that are not in the shape of an input, by name.
        standard_errors: of sampled methods, float32, in the shapes of `tensors`.
        fit: of methods that fit a model.
        segments: labels of the regions or features that elements belong to, by name of the input, int32 from 0, where
            the method has any: in the input's shape, with extent 1 along axes on which they do not depend.
        parts: further maps that the answer was made of, by name, such as the base maps of XRAI.
    """

    tensors: Mapping[str, NDArray[np.float32]]
    step_count: int
    stop_reason: StopReason = StopReason.FIXED_STEPS
    map_error: float | None = None
    alphas: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    baseline_output_value: float | None = None
    maps: Mapping[str, MapSpec] = field(default_factory=dict)
    standard_errors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    fit: Fit | None = None
    segments: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)
    parts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def checked(self) -> Self:
        """The same, with NON_FINITE and without an error where a map or a score is not finite."""
        finite = np.isfinite(self.scores).all() and all(np.isfinite(tensor).all() for tensor in self.tensors.values())
        return self if finite else replace(self, stop_reason=StopReason.NON_FINITE, map_error=None)


def attribution_sum(tensors: Mapping[str, NDArray[np.float32]]) -> float:
    """Sum over all elements of all inputs, in float64."""
    return float(sum(tensor.sum(dtype=np.float64) for tensor in tensors.values()))


def absolute_sum(tensors: Mapping[str, NDArray[np.float32]]) -> float:
    """Sum of absolute values over all elements of all inputs, in float64."""
    return float(sum(np.abs(tensor.astype(np.float64)).sum() for tensor in tensors.values()))


def completeness_scale(output_change: float, abs_sum: float) -> float:
    """What a convergence delta is compared with: max(|F(x) - F(x')|, .02 x sum|a|)."""
    return max(abs(output_change), 0.02 * abs_sum)
