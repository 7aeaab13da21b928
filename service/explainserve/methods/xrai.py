"""XRAI (Kapishnikov, Bolukbasi, Viegas, Terry: XRAI: Better Attributions Through Regions, ICCV 2019, algorithm 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest, Unsupported
from explainserve.explanation import Attribution, Instance, Question, Subject
from explainserve.methods.contract import FLOAT32_BYTES, WORKING_ARRAYS, Cost, Method, Needs, ReadingGuide
from explainserve.methods.features import picture
from explainserve.methods.quadrature import RULES, check_step_count
from explainserve.methods.rows import point
from explainserve.methods.sampling import check_has_effect
from explainserve.methods.superpixels import XRAI_SCALES, check_installed, dilated_segments
from explainserve.plan import STANDARD, Evaluation, Plan, Segment
from explainserve.signature import MapSpec

DEFAULT_STEP_COUNT = 100
SHARE_OF_NEW = 0.001
"""Segments that add less than this share of the image are passed over: 50 of 224 x 224 pixels, as in the authors' code.
"""
_MEMBER_BYTES = 16
"""Of a pixel of a segment: its position and the segment's number, and what is computed with them."""
_OVERLAP = 8
"""Times that a pixel belongs to segments of one scale, at most, after dilation."""


@dataclass(frozen=True, eq=False)
class Memberships:
    """Which pixels belong to which segments.

    Attributes:
        pixels: positions in the image, row by row, shape (members,).
        owners: numbers of the segments that they belong to, shape (members,).
        count: number of segments.
    """

    pixels: NDArray[np.int64]
    owners: NDArray[np.int64]
    count: int

    @classmethod
    def of(cls, masks: Iterable[NDArray[np.bool_]]) -> Memberships:
        """Of masks of shape (H, W)."""
        pixels = [np.flatnonzero(mask) for mask in masks]
        owners = np.repeat(np.arange(len(pixels)), [len(own) for own in pixels])
        return cls(np.concatenate(pixels), owners, len(pixels))


@dataclass(frozen=True, eq=False)
class BaseMapsPlan(Plan):
    """The paths of the base maps.

    Attributes:
        starts: the black and the white baseline, held so that other targets find the same ones; () with a given map.
        memberships: of the instance's segments.
    """

    starts: tuple[Instance, ...]
    memberships: Memberships


@dataclass(frozen=True)
class Xrai(Method):
    """Regions in the order of their mean attribution; each pixel of a region has that mean.

    The base map is the mean of two of Integrated Gradients by the midpoint rule, from baselines that have the lowest
    and the highest value of the instance everywhere, and its largest over channels. The map has shape (H, W).

    Attributes:
        step_count: of each base map, at least 1. None becomes 100, but for a given base map.
        segments: bool, shape (segments, H, W), in place of the server's.
        base_map: in place of the server's: floating point, shape of the input, or (H, W).

    Raises:
        InvalidRequest: STEP_COUNT_OUT_OF_RANGE, OPTION_WITHOUT_EFFECT.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="region",
        units="output",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Kapishnikov et al.: XRAI: Better Attributions Through Regions, ICCV 2019, arXiv:1906.02825",
    )

    step_count: int | None = None
    segments: NDArray[np.generic] | None = field(default=None, compare=False)
    base_map: NDArray[np.generic] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.base_map is not None:
            check_has_effect(self, "step_count", "with a given base_map")
            return
        if self.step_count is None:
            object.__setattr__(self, "step_count", DEFAULT_STEP_COUNT)
        check_step_count("step_count", self._step_count)

    @property
    def needs(self) -> Needs:
        """An image; gradients, but for a given base map; and what finds segments, but for given ones."""
        rule = STANDARD.name if self.base_map is None else ""
        return Needs(rule, spatial_axes=True, segmentation=self.segments is None)

    def resolved(self, subject: Subject) -> Self:
        """The same, where there is one image.

        Raises:
            InvalidRequest: several inputs move (SEVERAL_INPUTS), SEGMENTS_SHAPE_MISMATCH, SEGMENTS_INVALID,
                BASE_MAP_INVALID.
            Unsupported: NO_SPATIAL_AXES, SEGMENTATION_NOT_INSTALLED.
        """
        spec = _only(subject)
        extents = _extents(subject)
        if self.segments is None:
            check_installed("felzenszwalb")
        else:
            _check_segments(self.segments, spec.name, extents)
        if self.base_map is not None:
            _check_base_map(self.base_map, spec.name, subject.shapes[spec.name], extents)
        return self

    def maps(self, subject: Subject) -> Mapping[str, MapSpec]:
        """One, of the places of the input."""
        name = _only(subject).name
        return {name: MapSpec(name, "HW", covers=name)}

    def cost(self, subject: Subject) -> Cost:
        """Two paths, or the score of the instance alone with a given base map."""
        return Cost.fixed(forward_rows=1) if self.base_map is not None else Cost.fixed(2 * self._step_count)

    def path_bytes(self, subject: Subject) -> int:
        """The base maps, and the members of all segments."""
        height, width = _extents(subject)
        members = len(XRAI_SCALES) * _OVERLAP * height * width if self.segments is None else self.segments.size
        return WORKING_ARRAYS * FLOAT32_BYTES * subject.element_count + _MEMBER_BYTES * members

    def plan(self, question: Question) -> Plan:
        """The paths of both base maps."""
        memberships = self._memberships(question)
        if self.base_map is not None:
            return BaseMapsPlan((point(question, question.instance.moving, question.score),), (), memberships)
        starts = tuple(_extreme(question.instance, which) for which in ("lowest", "highest"))
        alphas, weights = RULES["midpoint"].nodes_and_weights(self._step_count)
        paths = tuple(
            Segment(
                start=start.moving,
                end=question.instance.moving,
                fixed=question.instance.fixed,
                function=question.gradient,
                alphas=alphas,
                weights=weights,
                selectors=(question.target.selector,),
            )
            for start in starts
        )
        return BaseMapsPlan(paths, starts, memberships)

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution:
        """The regions; the base maps are parts, and the regions' ranks from 0, the most attributed, are segments."""
        assert isinstance(plan, BaseMapsPlan), "Not a plan of this method. This is a bug."
        spec, extents = _only(question.subject), _extents(question.subject)
        if self.base_map is not None:
            base = _plane(self.base_map.astype(np.float64), spec)
            parts = {}
        else:
            x = question.instance.moving[spec.name].astype(np.float64)
            black, white = (
                (x - segment.start[spec.name].astype(np.float64)) * part.gradient_sums[spec.name]
                for segment, part in zip(plan.segments, evaluation.segments, strict=True)
            )
            base = _plane((black + white) / 2, spec)
            parts = {"black": black.astype(np.float32), "white": white.astype(np.float32)}
        values, ranks = regions(base.reshape(-1), plan.memberships)
        return Attribution(
            {spec.name: values.reshape(extents).astype(np.float32)},
            step_count=plan.row_count,
            maps={spec.name: MapSpec(spec.name, "HW", covers=spec.name)},
            segments={spec.name: ranks.reshape(extents)},
            parts=parts | {"base": base.astype(np.float32)},
        ).checked()

    @property
    def _step_count(self) -> int:
        return cast(int, self.step_count)

    def _memberships(self, question: Question) -> Memberships:
        """The same object for all targets of an instance."""
        if self.segments is None:
            return question.instance.derived("xrai", lambda: Memberships.of(_found(question)))
        masks = self.segments
        key = ("xrai", masks.shape, hashlib.blake2b(np.ascontiguousarray(masks).data, digest_size=16).digest())
        return question.instance.derived(key, lambda: Memberships.of(masks.astype(np.bool_)))


def regions(base: NDArray[np.float64], memberships: Memberships) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The value and the rank of each pixel.

    Segments are added one after the other, each time that whose new pixels have the largest mean. What no segment
    reaches is the last region.

    Args:
        base: shape (pixels,).
    """
    pixels, owners, count = memberships.pixels, memberships.owners, memberships.count
    fewest = max(1, round(SHARE_OF_NEW * len(base)))
    values, ranks = np.zeros(len(base)), np.full(len(base), -1, np.int32)
    means: list[float] = []
    while True:
        members = np.bincount(owners, minlength=count)
        sums = np.bincount(owners, base[pixels], minlength=count)
        gains = np.where(members >= fewest, sums / np.maximum(1, members), -np.inf)
        best = int(gains.argmax())
        if members[best] < fewest:
            break
        new = pixels[owners == best]
        values[new], ranks[new] = gains[best], len(means)
        means.append(float(gains[best]))
        left = ranks[pixels] < 0
        pixels, owners = pixels[left], owners[left]
    rest = ranks < 0
    if rest.any():
        values[rest], ranks[rest] = base[rest].mean(), len(means)
        means.append(float(base[rest].mean()))
    places = np.empty(len(means), np.int32)
    places[np.argsort(-np.array(means), kind="stable")] = np.arange(len(means), dtype=np.int32)
    return values, places[ranks]


def _extreme(instance: Instance, which: str) -> Instance:
    """An instance that has the lowest or highest value of this one everywhere."""
    value = {"lowest": np.min, "highest": np.max}[which]

    def make() -> Instance:
        moving = {name: np.full_like(x, value(x)) for name, x in instance.moving.items()}
        return Instance(moving, instance.fixed)

    return instance.derived(("extreme", which), make)


def _found(question: Question) -> Iterable[NDArray[np.bool_]]:
    spec = _only(question.subject)
    axes = spec.spatial_axes
    assert axes is not None, "An input without H and W axes was resolved. This is a bug."
    return dilated_segments(picture(question.instance.moving[spec.name], spec, axes))


def _plane(values: NDArray[np.float64], spec: MapSpec) -> NDArray[np.float64]:
    """The largest over all axes but H and W, shape (H, W)."""
    axes = spec.spatial_axes
    if axes is None or values.ndim == len(axes):
        return values
    return np.asarray(np.moveaxis(values, axes, (0, 1)).max(axis=tuple(range(2, values.ndim))))


def _only(subject: Subject) -> MapSpec:
    if len(subject.maps) != 1:
        raise InvalidRequest(
            "SEVERAL_INPUTS",
            f"XRAI explains one input, and {', '.join(subject.maps)} move; name all but one in fixed_inputs",
            inputs=", ".join(subject.maps),
        )
    (spec,) = subject.maps.values()
    return spec


def _extents(subject: Subject) -> tuple[int, int]:
    """H and W."""
    spec = _only(subject)
    if spec.spatial_axes is None:
        raise Unsupported(
            "NO_SPATIAL_AXES",
            f"input {spec.name!r} states no layout with H and W axes, which regions extend over",
            input=spec.name,
            layout=spec.layout,
        )
    height, width = (subject.shapes[spec.name][axis] for axis in spec.spatial_axes)
    return height, width


def _check_segments(segments: NDArray[np.generic], name: str, extents: tuple[int, int]) -> None:
    if segments.ndim != 1 + len(extents) or segments.shape[1:] != extents or not len(segments):
        raise InvalidRequest(
            "SEGMENTS_SHAPE_MISMATCH",
            f"segments of XRAI have shape {list(segments.shape)}, expected [segments, {extents[0]}, {extents[1]}]",
            input=name,
            expected=["segments", *extents],
            actual=list(segments.shape),
        )
    if segments.dtype != np.bool_:
        raise InvalidRequest(
            "SEGMENTS_INVALID",
            f"segments of XRAI are {segments.dtype.name}, expected bool: a mask each",
            input=name,
            actual=segments.dtype.name,
        )


def _check_base_map(base_map: NDArray[np.generic], name: str, shape: tuple[int, ...], extents: tuple[int, int]) -> None:
    if base_map.shape not in (shape, extents) or not np.issubdtype(base_map.dtype, np.floating):
        raise InvalidRequest(
            "BASE_MAP_INVALID",
            f"base_map is {base_map.dtype.name} of shape {list(base_map.shape)}, expected floating point of shape "
            f"{list(shape)} or {list(extents)}",
            input=name,
            expected=list(shape),
            actual=list(base_map.shape),
        )
