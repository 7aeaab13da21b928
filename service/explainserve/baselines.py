"""Baselines: from what a request names to values of the moving inputs in MODEL space.

To add a kind: its dataclass with `values`, its message in `oneof kind`, its pair in `rpc/request_baselines.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from explainserve.blur import gaussian_blur
from explainserve.errors import InvalidRequest, NotFound, Unsupported
from explainserve.explanation import Baseline, Instance, Subject
from explainserve.plan import Tensors
from explainserve.signature import Axis, InputSpec, Signature

DataBaselines = Mapping[str, Mapping[str, NDArray[np.generic]]]
"""Configured data baselines of a model: name -> input -> values of one instance."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """Where a baseline is wanted: one input of one instance.

    Attributes:
        position: of the input among the model's inputs; part of the seed of noise.
        instance_index, instance_count: position in the batch.
    """

    spec: InputSpec
    value: Array
    position: int
    instance_index: int
    instance_count: int
    data_baselines: DataBaselines

    def fill(self, per_channel: Array) -> Array:
        """An array of the input's shape from one value, or one per channel."""
        if per_channel.size == 1:
            return np.full(self.value.shape, per_channel.reshape(()), np.float64)
        axis = self.spec.channel_axis
        channels = None if axis is None else self.value.shape[axis]
        if axis is None or per_channel.size != channels:
            raise InvalidRequest(
                "BASELINE_CHANNEL_MISMATCH",
                f"baseline of {self.spec.name!r} has {per_channel.size} values; one, or one per channel "
                f"({channels if channels is not None else 'it states no channel axis'}), are accepted",
                input=self.spec.name,
                expected=channels,
                actual=per_channel.size,
            )
        shape = [1] * self.value.ndim
        shape[axis] = per_channel.size
        return np.broadcast_to(per_channel.reshape(shape), self.value.shape).astype(np.float64)

    def from_pixels(self, pixels: Array) -> Array:
        """Preprocesses pixel values of the input's shape."""
        axis = self.spec.channel_axis
        if axis is None:
            return self.spec.pixel_value(pixels.reshape(-1)).reshape(pixels.shape)
        return np.moveaxis(self.spec.pixel_value(np.moveaxis(pixels, axis, -1)), -1, axis)


@dataclass(frozen=True)
class Zeros:
    """Zero in every element; in PIXEL space black."""

    pixel_space: bool = False
    count = 1

    def values(self, site: Site, draw: int) -> Array:
        """The baseline in MODEL space, of the input's shape."""
        return Constant((0.0,), self.pixel_space).values(site, draw)


@dataclass(frozen=True)
class Constant:
    """One value, or one per channel."""

    numbers: tuple[float, ...]
    pixel_space: bool = False
    count = 1

    def values(self, site: Site, draw: int) -> Array:
        """The baseline in MODEL space, of the input's shape."""
        filled = site.fill(np.asarray(self.numbers, np.float64))
        return site.from_pixels(filled) if self.pixel_space else filled


@dataclass(frozen=True)
class Tone:
    """Black, gray or white: a level of the value range, 0 to 1, preprocessed as pixels are."""

    level: float
    count = 1

    def values(self, site: Site, draw: int) -> Array:
        """The baseline in MODEL space, of the input's shape."""
        return site.fill(site.spec.pixel_value(255.0 * self.level))


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor: of one instance's shape, or with a leading axis of one or of the number of instances."""

    tensor: Array
    pixel_space: bool = False
    count = 1

    def values(self, site: Site, draw: int) -> Array:
        """The baseline in MODEL space, of the input's shape."""
        tensor = self._of_instance(site)
        return site.from_pixels(tensor) if self.pixel_space else tensor

    def _of_instance(self, site: Site) -> Array:
        shape = site.value.shape
        if self.tensor.shape == shape:
            return self.tensor
        if self.tensor.shape == (1, *shape):
            return self.tensor.reshape(shape)
        if self.tensor.shape == (site.instance_count, *shape):
            return self.tensor[site.instance_index : site.instance_index + 1].reshape(shape)
        raise InvalidRequest(
            "BASELINE_SHAPE_MISMATCH",
            f"baseline of {site.spec.name!r} has shape {list(self.tensor.shape)}, expected {list(shape)}, "
            f"with an optional leading axis of 1 or {site.instance_count}",
            input=site.spec.name,
            expected=list(shape),
            actual=list(self.tensor.shape),
        )


@dataclass(frozen=True)
class Blur:
    """The instance blurred by a Gaussian along its spatial axes, edge values repeated at the border."""

    sigma: float
    count = 1

    def values(self, site: Site, draw: int) -> Array:
        """The baseline in MODEL space, of the input's shape."""
        axes = [axis for axis, letter in enumerate(site.spec.instance_layout) if letter != "C"]
        if not axes:
            raise Unsupported(
                "NO_SPATIAL_AXES",
                f"input {site.spec.name!r} states no layout with spatial axes, so it cannot be blurred",
                input=site.spec.name,
                layout=site.spec.layout,
            )
        return np.asarray(gaussian_blur(site.value, self.sigma, axes), np.float64)


@dataclass(frozen=True)
class UniformNoise:
    """Independent uniform noise; `low` and `high` are both given, or the range is the value range."""

    low: float | None
    high: float | None
    seed: int
    count: int = 1
    pixel_space: bool = False

    def effective(self, spec: InputSpec) -> UniformNoise:
        """The same noise with its range stated: pixels of 0..255 where they can be preprocessed, else `value_range`.

        Raises:
            InvalidRequest: one end alone is given, or the input states no range (BASELINE_RANGE_REQUIRED).
        """
        if self.low is not None and self.high is not None:
            return self
        if self.low is not None or self.high is not None:
            raise _range_required(spec, "uniform noise needs low and high together, or neither")
        if self.pixel_space or spec.has_preprocessing:
            return replace(self, low=0.0, high=255.0, pixel_space=True)
        if spec.value_range is None:
            raise _range_required(spec, "it states no value range, so uniform noise needs low and high")
        low, high = spec.value_range
        return replace(self, low=low, high=high)

    def values(self, site: Site, draw: int) -> Array:
        """The baseline in MODEL space, of the input's shape."""
        noise = self.effective(site.spec)
        assert noise.low is not None and noise.high is not None
        if not noise.low < noise.high:
            raise InvalidRequest(
                "BASELINE_RANGE_EMPTY",
                f"uniform noise needs low < high, got {noise.low} and {noise.high}",
                low=noise.low,
                high=noise.high,
            )
        uniform = _generator(self.seed, draw, site.position).random(site.value.shape, np.float32).astype(np.float64)
        values: Array = noise.low + (noise.high - noise.low) * uniform
        return site.from_pixels(values) if noise.pixel_space else values


@dataclass(frozen=True)
class GaussianNoise:
    """Independent Gaussian noise around a mean; the default mean is the instance itself."""

    mean: float | None
    std: float
    seed: int
    count: int = 1
    pixel_space: bool = False

    def values(self, site: Site, draw: int) -> Array:
        """The baseline in MODEL space, of the input's shape."""
        normal = _generator(self.seed, draw, site.position).standard_normal(site.value.shape, np.float32)
        noise: Array = self.std * normal.astype(np.float64)
        if self.mean is not None:
            mean = np.full(site.value.shape, self.mean, np.float64)
            return site.from_pixels(mean + noise) if self.pixel_space else mean + noise
        if self.pixel_space:  # the affine map of pixels, without its offset, scales the noise
            noise = site.from_pixels(noise) - site.from_pixels(np.zeros(site.value.shape))
        return site.value + noise


@dataclass(frozen=True)
class Data:
    """A data baseline that the model's owner configured."""

    name: str
    count = 1

    def values(self, site: Site, draw: int) -> Array:
        """The baseline in MODEL space, of the input's shape."""
        known = site.data_baselines.get(self.name, {})
        if site.spec.name not in known:
            names = ", ".join(sorted(site.data_baselines)) or "none"
            raise NotFound(
                "UNKNOWN_DATA_BASELINE",
                f"no data baseline {self.name!r} for input {site.spec.name!r}; configured: {names}",
                baseline=self.name,
                input=site.spec.name,
                baselines=names,
            )
        return Given(np.asarray(known[site.spec.name], np.float64)).values(site, draw)


InputBaseline = Zeros | Constant | Tone | Given | Blur | UniformNoise | GaussianNoise | Data

NAMED: dict[str, InputBaseline] = {"zeros": Zeros(), "black": Tone(0.0), "gray": Tone(0.5), "white": Tone(1.0)}
"""Baselines that need no parameters, by the name that model.toml uses."""


LAYER_KINDS = (Zeros, Constant, Given)
"""Kinds that need to know nothing of a layer but its shape."""


@dataclass(frozen=True, eq=False)
class BaselineSpec:
    """A baseline as requested.

    Attributes:
        every_input: of moving inputs that `inputs` does not name.
        layers: of layers that are explained in the place of inputs.
        instance_index: the instance it belongs to, or None for every instance.
        request_index: its position in the request.
    """

    every_input: InputBaseline = field(default_factory=Zeros)
    inputs: Mapping[str, InputBaseline] = field(default_factory=dict)
    layers: Mapping[str, InputBaseline] = field(default_factory=dict)
    instance_index: int | None = None
    request_index: int = 0

    def of(self, name: str) -> InputBaseline:
        """The baseline of one input."""
        return self.inputs.get(name, self.every_input)

    def baseline_count(self, moving: tuple[str, ...]) -> int:
        """Number of baselines it becomes on one instance: the common count of its noise draws.

        Raises:
            InvalidRequest: inputs ask for different counts (BASELINE_COUNT_MISMATCH), or an input that does not move
            is named
                (BASELINE_FOR_FIXED_INPUT).
        """
        idle = sorted(set(self.inputs) - set(moving))
        if idle:
            raise InvalidRequest(
                "BASELINE_FOR_FIXED_INPUT",
                f"baseline for {', '.join(idle)}, which no moving input is; moving inputs are {', '.join(moving)}",
                inputs=", ".join(idle),
                moving_inputs=", ".join(moving),
            )
        counts = {self.of(name).count for name in moving} - {1}
        if len(counts) > 1:
            raise InvalidRequest(
                "BASELINE_COUNT_MISMATCH",
                f"inputs of one baseline ask for different numbers of draws: {sorted(counts)}",
                counts=sorted(counts),
            )
        return counts.pop() if counts else 1

    def baselines(
        self,
        signature: Signature,
        instance: Instance,
        instance_index: int,
        instance_count: int,
        data_baselines: DataBaselines,
    ) -> list[Baseline]:
        """The baselines of one instance, one per draw.

        Raises:
            InvalidRequest: shape, channel or count mismatch, a missing range, or a value that is not finite.
            Unsupported: PIXEL space without preprocessing (NO_PREPROCESSING), blur without spatial axes
            (NO_SPATIAL_AXES).
            NotFound: no such data baseline (UNKNOWN_DATA_BASELINE).
        """
        sites = {
            spec.name: Site(
                spec,
                instance.moving[spec.name].astype(np.float64),
                position,
                instance_index,
                instance_count,
                data_baselines,
            )
            for position, spec in enumerate(signature.inputs)
            if spec.name in instance.moving
        }
        return [
            Baseline(
                {name: _values(self.of(name), site, draw) for name, site in sites.items()}, self.request_index, draw
            )
            for draw in range(self.baseline_count(tuple(instance.moving)))
        ]

    def at_layers(self, subject: Subject, instance_index: int, instance_count: int) -> Tensors:
        """Stated values of layers at the baselines of one instance, float32.

        Raises:
            InvalidRequest: shape or channel mismatch, or a value that is not finite.
        """
        sites = {name: _layer_site(subject, name, instance_index, instance_count) for name in self.layers}
        return {name: _values(self.layers[name], site, 0) for name, site in sites.items()}


def check_layers(layers: Mapping[str, InputBaseline], subject: Subject) -> None:
    """Refuses baselines of layers that are not explained, and kinds that need to know more of a layer than its shape.

    Raises:
        InvalidRequest: LAYER_NOT_EXPLAINED, LAYER_BASELINE_UNSUITABLE.
    """
    explained = ", ".join(subject.cut)
    for name, kind in layers.items():
        if name not in subject.cut:
            raise InvalidRequest(
                "LAYER_NOT_EXPLAINED",
                f"baseline for layer {name!r}, which is not explained; layers of the request: {explained or 'none'}",
                layer=name,
                layers=explained,
            )
        if not isinstance(kind, LAYER_KINDS) or getattr(kind, "pixel_space", False):
            raise InvalidRequest(
                "LAYER_BASELINE_UNSUITABLE",
                f"the baseline of layer {name!r} is zeros, a constant or a tensor in the layer's own numbers; other "
                "kinds are of inputs",
                layer=name,
            )


def _layer_site(subject: Subject, name: str, instance_index: int, instance_count: int) -> Site:
    """Where the baseline of a layer is wanted. Its value at the instance is not known yet, and no kind asks for it."""
    shape, layout = subject.shapes[name], subject.maps[name].layout
    axes = (Axis("batch"), *(Axis("", extent) for extent in shape))
    spec = InputSpec(name, np.dtype(np.float32), axes, layout=f"N{layout}" if layout else "")
    return Site(spec, np.zeros(shape), 0, instance_index, instance_count, {})


def _values(kind: InputBaseline, site: Site, draw: int) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused below
        # not ascontiguousarray, which makes one axis of none
        values = kind.values(site, draw).astype(site.spec.dtype, order="C")
    if not np.isfinite(values).all():
        raise InvalidRequest(
            "BASELINE_NOT_FINITE",
            f"baseline of {site.spec.name!r} has values that are NaN, infinite, or too large for its type",
            input=site.spec.name,
        )
    return values


def effective(kind: InputBaseline, spec: InputSpec) -> InputBaseline:
    """A baseline of one input with its defaults stated, but for the mean of Gaussian noise where it is the instance."""
    return kind.effective(spec) if isinstance(kind, UniformNoise) else kind


def digest(values: NDArray[np.generic]) -> str:
    """SHA-256 of the float32 values, little-endian, row-major."""
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def _generator(seed: int, draw: int, position: int) -> np.random.Generator:
    """A stream of its own for each draw and input, the same on every machine and backend."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, draw, position])))


def _range_required(spec: InputSpec, why: str) -> InvalidRequest:
    return InvalidRequest("BASELINE_RANGE_REQUIRED", f"input {spec.name!r}: {why}", input=spec.name)
