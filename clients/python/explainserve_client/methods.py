"""Attribution methods and their options: one class for each, with the names of the message's fields.

What is left at None is the server's default, which the provenance of the answer echoes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from explainserve.v1 import method_pb2
from explainserve.v1.tensor_pb2 import Tensor
from explainserve_client.errors import RequestTypeError, RequestValueError
from explainserve_client.tensors import to_array, to_tensor


@dataclass(frozen=True, slots=True)
class IntegratedGradients:
    """Integrated Gradients (Sundararajan, Taly, Yan 2017): (x - x') times the mean gradient on the line from x' to x.

    With `step_count` a fixed rule, without it adaptive. What is left at None is the server's default.

    Attributes:
        step_count: gradient evaluations of one path, at least 1 (trapezoid: 2).
        quadrature: "midpoint" (default with a step count), "left", "right", "trapezoid", "gauss_legendre"; "adaptive".
        tolerance: adaptive only, in (0, 1]: the largest estimated relative L2 error of the map. Server default 0.05.
        completeness_tolerance: adaptive only, in (0, 1]: the largest relative completeness gap. Server default 0.05.
        max_step_count: adaptive only, at least 16: the most gradient evaluations of one path. Server default 128.
    """

    step_count: int | None = None
    quadrature: str | None = None
    tolerance: float | None = None
    completeness_tolerance: float | None = None
    max_step_count: int | None = None

    def __post_init__(self) -> None:
        adaptive = self.quadrature is None or self.quadrature.upper() == "ADAPTIVE"
        options = (self.tolerance, self.completeness_tolerance, self.max_step_count)
        if self.step_count is None and not adaptive:
            raise RequestValueError(f"quadrature {self.quadrature!r} is a fixed rule and needs a step_count")
        if self.step_count is not None and (self.quadrature or "").upper() == "ADAPTIVE":
            raise RequestValueError("adaptive quadrature takes max_step_count, not step_count")
        if self.step_count is not None and any(option is not None for option in options):
            raise RequestValueError(
                "tolerance, completeness_tolerance and max_step_count are for the adaptive rule: leave step_count out"
            )


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient at the instance (Simonyan, Vedaldi, Zisserman 2014), signed."""


@dataclass(frozen=True, slots=True)
class GradientXInput:
    """Gradient x input (Shrikumar et al. 2016)."""


@dataclass(frozen=True, slots=True)
class SmoothGrad:
    """SmoothGrad (Smilkov et al. 2017): the mean of a method's maps at noisy copies of the instance.

    Attributes:
        base: the method of each sample. Server default: Gradient().
        sample_count: at least 2. Server default 50.
        noise_level: standard deviation of the noise as a share of max(x) - min(x), positive. Server default 0.15.
        noise_std: the same in the unit of the input, in its place.
        seed: at least 0. Server default 0.
    """

    base: Method | None = None
    sample_count: int | None = None
    noise_level: float | None = None
    noise_std: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class SmoothGradSquared:
    """SmoothGrad-squared (Hooker et al. 2019): the mean of the squares of the maps; options as of SmoothGrad."""

    base: Method | None = None
    sample_count: int | None = None
    noise_level: float | None = None
    noise_std: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class VarGrad:
    """VarGrad (Adebayo et al. 2018): the population variance of the maps; options as of SmoothGrad."""

    base: Method | None = None
    sample_count: int | None = None
    noise_level: float | None = None
    noise_std: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class ExpectedGradients:
    """Expected Gradients (Erion et al. 2021), which GradientSHAP is: one map of all baselines of an instance.

    Attributes:
        sample_count: over all baselines, at least one for each. Server default 200.
        noise_std: standard deviation of noise that is added to the instance in each sample, at least 0. Server default
            0.
        seed: at least 0. Server default 0.
    """

    sample_count: int | None = None
    noise_std: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class GuidedIntegratedGradients:
    """Guided Integrated Gradients (Kapishnikov et al. 2021): a path that moves first where the gradient is small.

    Its steps follow each other, so it takes as long as that many evaluations of one row. On networks with rectifiers
    its convergence delta does not vanish with more steps, and grows with `max_distance`.

    Attributes:
        step_count: at least 1. Server default 200.
        fraction: share of elements that move at a time, in (0, 1]. Server default 0.25.
        max_distance: how far an element may stray from the straight line, as a share of its way, in (0, 1]. Server
            default 0.02.
    """

    step_count: int | None = None
    fraction: float | None = None
    max_distance: float | None = None


@dataclass(frozen=True, slots=True)
class Idgi:
    """IDGI (Yang, Wang, Bilgic 2023): changes of the score along a path, in proportion to the squared gradient.

    Attributes:
        path: server default: IntegratedGradients(step_count=50, quadrature="left").
    """

    path: Method | None = None


@dataclass(frozen=True, slots=True)
class GradCam:
    """Grad-CAM (Selvaraju et al. 2017) of a layer, signed, in the layer's grid.

    Attributes:
        layer: its name. Server default: the first that the model's owner names, else the last with a grid.
        relu: keep positive values only. Server default False.
        upsampling: "none" (server default), "bilinear" or "nearest", to the input's H and W.
    """

    layer: str | None = None
    relu: bool | None = None
    upsampling: str | None = None


@dataclass(frozen=True, slots=True)
class GradCamPlusPlus:
    """Grad-CAM++ (Chattopadhay et al. 2018).

    Attributes:
        layer: its name. Server default: the first that the model's owner names, else the last with a grid.
        relu: keep positive values only. Server default False.
        upsampling: "none" (server default), "bilinear" or "nearest", to the input's H and W.
    """

    layer: str | None = None
    relu: bool | None = None
    upsampling: str | None = None


@dataclass(frozen=True, slots=True)
class LayerCam:
    """LayerCAM (Jiang et al. 2021).

    Attributes:
        layer: its name. Server default: the first that the model's owner names, else the last with a grid.
        relu: keep positive values only. Server default False.
        upsampling: "none" (server default), "bilinear" or "nearest", to the input's H and W.
    """

    layer: str | None = None
    relu: bool | None = None
    upsampling: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreCam:
    """Score-CAM (Wang et al. 2020): takes no gradient, and an evaluation per channel.

    Attributes:
        layer: its name. Server default: the first that the model's owner names, else the last with a grid.
        relu: keep positive values only. Server default False.
        upsampling: "none" (server default), "bilinear" or "nearest", to the input's H and W.
    """

    layer: str | None = None
    relu: bool | None = None
    upsampling: str | None = None


@dataclass(frozen=True, slots=True)
class GuidedGradCam:
    """Guided Grad-CAM: a pixel method times the upsampled positive part of Grad-CAM.

    Attributes:
        layer: as of GradCam.
        pixel_method: server default: GuidedBackpropagation().
        upsampling: "bilinear" (server default) or "nearest".
    """

    layer: str | None = None
    pixel_method: Method | None = None
    upsampling: str | None = None


@dataclass(frozen=True, slots=True)
class GuidedBackpropagation:
    """Guided backpropagation (Springenberg et al. 2015). Fails the parameter randomization check."""


@dataclass(frozen=True, slots=True)
class DeconvNet:
    """DeconvNet (Zeiler, Fergus 2014)."""


@dataclass(frozen=True, slots=True)
class DeepLift:
    """DeepLIFT with the rescale rule (Shrikumar et al. 2017)."""


@dataclass(frozen=True, slots=True)
class BlurIntegratedGradients:
    """Blur Integrated Gradients (Xu, Venugopalan, Sundararajan 2020): from the blurred instance to the instance.

    It takes no baseline, and inputs with H and W axes.

    Attributes:
        step_count: gradient evaluations, at least 1. Server default 100.
        max_sigma: standard deviation of the strongest blur in elements, in (0, 1000]. Server default 50.
        spacing: of the blurs: "linear" (default) in the standard deviation, or in the "variance".
    """

    step_count: int | None = None
    max_sigma: float | None = None
    spacing: str | None = None


@dataclass(frozen=True, slots=True)
class Occlusion:
    """Occlusion (Zeiler, Fergus 2014): what the score loses where a window shows the baseline.

    Attributes:
        window: extents along H and W, or along the last axis of inputs without these. Server default: an eighth.
        stride: likewise, at most the window's extents. Server default: half the window.
        aggregation: "mean" (server default) over the windows that cover an element, or "sum".
    """

    window: Sequence[int] | None = None
    stride: Sequence[int] | None = None
    aggregation: str | None = None


@dataclass(frozen=True, slots=True)
class Lrp:
    """Layer-wise relevance propagation (Bach et al. 2015). Sums to F(x) less what biases and epsilon absorb.

    Attributes:
        rule: "composite" (server default: epsilon in dense layers, z+ in convolutions, flat in the first), "epsilon",
            "gamma", "alpha_beta", "epsilon_gamma_box" or "deep_taylor"; the last two need the value range of the input.
        epsilon: added to denominators. Server default 1e-6.
        gamma: of "gamma" and "epsilon_gamma_box" alone. Server default 0.25.
        alpha: of "alpha_beta" alone, at least 1. Server default 2.
    """

    rule: str | None = None
    epsilon: float | None = None
    gamma: float | None = None
    alpha: float | None = None


@dataclass(frozen=True, slots=True)
class FeatureAblation:
    """Feature ablation: what the score loses where a segment shows the baseline.

    Attributes:
        segments: labels by input name, integers from 0 in the input's shape, with extent 1 along axes on which they do
            not depend. Equal labels are one segment, in several inputs too. Excludes the recipe.
        segmentation: the recipe, "grid" (server default) for inputs with H and W axes; each element of other inputs is
            a segment of its own.
        segment_count: about how many segments a grid has. Server default 16.
    """

    segments: Mapping[str, ArrayLike] | None = None
    segmentation: str | None = None
    segment_count: int | None = None


@dataclass(frozen=True, slots=True)
class PatternNet:
    """PatternNet (Kindermans et al. 2018): the signal, by the patterns that lie beside the model."""


@dataclass(frozen=True, slots=True)
class PatternAttribution:
    """PatternAttribution (Kindermans et al. 2018): the share of the signal, by the patterns beside the model."""


@dataclass(frozen=True, slots=True)
class Rise:
    """RISE (Petsiuk, Das, Saenko 2018): the mean of scores of masked instances, weighted by their masks.

    Attributes:
        sample_count: of masks, at least 2. Server default 4000.
        grid_size: cells of the coarse mask along H and W, for inputs with these axes. Server default 7.
        keep_probability: of a cell, in (0, 1). Server default 0.5.
        seed: at least 0. Server default 0.
    """

    sample_count: int | None = None
    grid_size: int | None = None
    keep_probability: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class KernelShap:
    """KernelSHAP (Lundberg, Lee 2017): Shapley values of segments by weighted regression, which sum to F(x) - F(x').

    Attributes:
        segments: as of FeatureAblation.
        segmentation: "grid" (server default), "slic", "quickshift" or "felzenszwalb", for inputs with H and W axes.
        segment_count: about how many segments "grid" and "slic" make. Server default 16.
        sample_count: of subsets, at least 2. Server default: all where they are few, else 2 M + 2048 for M segments.
        seed: at least 0. Server default 0.
    """

    segments: Mapping[str, ArrayLike] | None = None
    segmentation: str | None = None
    segment_count: int | None = None
    sample_count: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class ShapleyValueSampling:
    """Shapley value sampling (Castro et al. 2009): the mean over random orders of what each segment adds.

    Attributes:
        segments: as of FeatureAblation.
        segmentation: as of FeatureAblation.
        segment_count: about how many segments a grid has. Server default 16.
        sample_count: of orders, at least 1. Server default 25.
        seed: at least 0. Server default 0.
    """

    segments: Mapping[str, ArrayLike] | None = None
    segmentation: str | None = None
    segment_count: int | None = None
    sample_count: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Lime:
    """LIME (Ribeiro, Singh, Guestrin 2016): a ridge regression of the score on which segments are there.

    Attributes:
        segments: as of FeatureAblation.
        segmentation: "quickshift" (server default), "grid", "slic" or "felzenszwalb", for inputs with H and W axes.
        segment_count: about how many segments "grid" and "slic" make. Server default 50.
        sample_count: at least 2. Server default 1000.
        kernel_width: of the cosine distance, positive. Server default 0.25.
        ridge: penalty, at least 0. Server default 1.
        seed: at least 0. Server default 0.
    """

    segments: Mapping[str, ArrayLike] | None = None
    segmentation: str | None = None
    segment_count: int | None = None
    sample_count: int | None = None
    kernel_width: float | None = None
    ridge: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Xrai:
    """XRAI (Kapishnikov et al. 2019): regions in the order of their mean attribution, a map of shape (H, W).

    Attributes:
        step_count: of each of the two base maps, at least 1, where the server makes them. Server default 100.
        segments: bool masks, shape (segments, H, W), which may overlap. Server default: Felzenszwalb's at six scales.
        base_map: in place of the server's, shape of the input or (H, W).
    """

    step_count: int | None = None
    segments: Any = None
    base_map: Any = None


Method: TypeAlias = (
    IntegratedGradients
    | Gradient
    | GradientXInput
    | SmoothGrad
    | SmoothGradSquared
    | VarGrad
    | ExpectedGradients
    | BlurIntegratedGradients
    | GuidedIntegratedGradients
    | Idgi
    | GradCam
    | GradCamPlusPlus
    | LayerCam
    | ScoreCam
    | GuidedGradCam
    | GuidedBackpropagation
    | DeconvNet
    | DeepLift
    | Occlusion
    | Rise
    | Lrp
    | FeatureAblation
    | PatternNet
    | PatternAttribution
    | KernelShap
    | ShapleyValueSampling
    | Lime
    | Xrai
)

METHODS: Mapping[str, type[Method]] = {
    "integrated_gradients": IntegratedGradients,
    "gradient": Gradient,
    "gradient_x_input": GradientXInput,
    "smooth_grad": SmoothGrad,
    "smooth_grad_squared": SmoothGradSquared,
    "var_grad": VarGrad,
    "expected_gradients": ExpectedGradients,
    "blur_integrated_gradients": BlurIntegratedGradients,
    "guided_integrated_gradients": GuidedIntegratedGradients,
    "idgi": Idgi,
    "grad_cam": GradCam,
    "grad_cam_plus_plus": GradCamPlusPlus,
    "layer_cam": LayerCam,
    "score_cam": ScoreCam,
    "guided_grad_cam": GuidedGradCam,
    "guided_backpropagation": GuidedBackpropagation,
    "deconv_net": DeconvNet,
    "deep_lift": DeepLift,
    "occlusion": Occlusion,
    "rise": Rise,
    "lrp": Lrp,
    "feature_ablation": FeatureAblation,
    "pattern_net": PatternNet,
    "pattern_attribution": PatternAttribution,
    "kernel_shap": KernelShap,
    "shapley_value_sampling": ShapleyValueSampling,
    "lime": Lime,
    "xrai": Xrai,
}
"""Methods by the name of their field in the message."""


def method_specs(method: Method | Sequence[Method] | None) -> list[method_pb2.MethodSpec]:
    """The messages of a request; None leaves the choice to the server (adaptive Integrated Gradients)."""
    if method is None:
        return []
    return [method_spec(one) for one in _several(method)]


def method_spec(method: Method) -> method_pb2.MethodSpec:
    """The message of one method.

    Raises:
        RequestTypeError: it is none, or an option has another type than its field.
        RequestValueError: an enum has no such value, or a number does not fit into its field.
    """
    if not _is_method(method):
        known = ", ".join(kind.__name__ for kind in METHODS.values())
        raise RequestTypeError(f"a method is one of {known}, not {method!r}")
    spec = method_pb2.MethodSpec()
    name = next(name for name, kind in METHODS.items() if kind is type(method))
    message: Message = getattr(spec, name)
    message.SetInParent()
    for option in dataclasses.fields(method):
        value = getattr(method, option.name)
        if value is not None:
            _set(message, option.name, value)
    return spec


def used_method(spec: method_pb2.MethodSpec) -> Method | None:
    """Reads a method of the provenance; None for one that this client does not know yet."""
    name = spec.WhichOneof("method")
    if name is None or name not in METHODS:
        return None
    message: Message = getattr(spec, str(name))
    options = {field.name: _value(field.enum_type, value) for field, value in message.ListFields()}
    return METHODS[str(name)](**options)


def _is_method(method: object) -> bool:
    return type(method) in METHODS.values()


def _several(methods: Any) -> Sequence[Method]:
    if _is_method(methods):
        return [methods]
    if isinstance(methods, str | bytes) or not isinstance(methods, Sequence):
        raise RequestTypeError(
            f"method is an IntegratedGradients(...), another method or a list of them, not {methods!r}"
        )
    return methods


def _set(message: Message, name: str, value: Any) -> None:
    field: Any = message.DESCRIPTOR.fields_by_name[name]
    try:
        if isinstance(value, Mapping):
            for key, array in value.items():
                getattr(message, name)[key].CopyFrom(to_tensor(np.asarray(array)))
        elif field.enum_type is not None:
            setattr(message, name, _enum_number(field.enum_type, name, value))
        elif field.message_type is Tensor.DESCRIPTOR:
            getattr(message, name).CopyFrom(to_tensor(np.asarray(value)))
        elif field.message_type is not None:
            getattr(message, name).CopyFrom(method_spec(value))
        elif hasattr(getattr(message, name), "extend"):
            getattr(message, name).extend(_of_each_axis(value))
        else:
            setattr(message, name, value)
    except (TypeError, AttributeError) as error:
        raise RequestTypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, RequestValueError) else RequestValueError(f"{name}: {error}") from error


def _of_each_axis(value: Any) -> Sequence[int]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"expected a sequence with one number for each axis, such as [8, 8], got {value!r}")
    return value


def _value(kind: EnumDescriptor | None, value: Any) -> Any:
    if isinstance(value, Tensor):
        return to_array(value)
    if isinstance(value, method_pb2.MethodSpec):
        return used_method(value)
    if hasattr(value, "items"):
        return {key: to_array(tensor) for key, tensor in value.items()}
    if hasattr(value, "extend"):
        return tuple(value)
    return value if kind is None else _enum_name(kind, value)


def _enum_name(kind: EnumDescriptor, number: int) -> str:
    known = kind.values_by_number.get(number)
    return f"unknown_{number}" if known is None else known.name.removeprefix(_prefix(kind)).lower()


def _enum_number(kind: EnumDescriptor, option: str, name: Any) -> int:
    if not isinstance(name, str):
        raise RequestTypeError(f"{option} is named by a string, not {name!r}")
    numbers = {_enum_name(kind, number): number for number in kind.values_by_number if number}
    if name.lower() not in numbers:
        raise RequestValueError(f"no {option} {name!r}; there are {', '.join(numbers)}")
    return numbers[name.lower()]


def _prefix(kind: EnumDescriptor) -> str:
    return str(kind.values_by_number[0].name).removesuffix("UNSPECIFIED")
