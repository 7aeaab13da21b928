"""What other libraries say of the same networks: which call answers which of our methods, with which options.

Libraries that are not installed are left out, and named by `missing_libraries`. Only Captum is a dependency of
development; README.md beside this file says how the others are added.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import captum.attr as captum
import captum.attr._utils.lrp_rules as captum_rules
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Array = NDArray[np.float32]

LIBRARIES = ("captum", "saliency", "zennit", "shap", "lime")
SIDE = 12
CLASSES = 5
TARGET = 3
STEPS = 20
SAMPLES = 200
NOISE = 0.2
"""Standard deviation of noise, in the unit of the input."""
EPSILON = 1e-6
"""Of LRP."""
FILL = 0.25
"""Value of the first baseline."""


@dataclass(frozen=True, eq=False)
class Case:
    """What is explained.

    Attributes:
        module: logits, shape (rows, CLASSES), of images, shape (rows, 3, SIDE, SIDE).
        layer: the last one with a grid.
        x: one image, shape (1, 3, SIDE, SIDE).
        baselines: one of a single value, FILL, and a random one, shape (2, 3, SIDE, SIDE); methods of one baseline take
            the first.
        segments: labels from 0 of the quarters of the image, shape (1, SIDE, SIDE).
    """

    module: nn.Module
    layer: nn.Module
    x: Tensor
    baselines: Tensor
    segments: Tensor

    @property
    def baseline(self) -> Tensor:
        """The first one, shape (1, 3, SIDE, SIDE)."""
        return self.baselines[:1]


Reference = Callable[[Case], Tensor | Array]


@dataclass(frozen=True, eq=False)
class Comparison:
    """One of our methods beside a call of another library.

    Attributes:
        method, options: ours; an option that is a function is what it returns for the case.
        call: theirs, as it is written.
        reference: makes their map.
        reading: what has to be done to one of the maps so that both say the same, or "".
        deviation: why the maps differ nevertheless, and whose choice that is; "" where they have to agree.
        sampled: whether one of both draws random numbers.
        networks: those on which theirs runs; () for all.
    """

    method: str
    options: Mapping[str, Any]
    library: str
    call: str
    reference: Reference
    reading: str = ""
    deviation: str = ""
    sampled: bool = False
    networks: tuple[str, ...] = ()


def quarters(case: Case) -> dict[str, Array]:
    """Labels of the segments, by input."""
    return {"image": case.segments.numpy()}


def masks(case: Case) -> NDArray[np.bool_]:
    """The same segments, each as a mask."""
    labels = case.segments.numpy()
    return np.concatenate([labels == label for label in range(labels.max() + 1)])


def gradient(case: Case) -> Array:
    """A base map for regions, shape (3, SIDE, SIDE)."""
    return _gradient(case)[0].detach().numpy()


def missing_libraries() -> list[str]:
    """Those of LIBRARIES that cannot be imported here."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def comparisons() -> list[Comparison]:
    """Those of all libraries that are installed."""
    missing = missing_libraries()
    found = [*of_captum(), *of_saliency(), *of_zennit(), *of_shap(), *of_lime()]
    return [one for one in found if one.library not in missing]


class Network(nn.Module):
    """Features with a grid and a linear layer. It flattens in a function, for which Captum's LRP needs no rule."""

    def __init__(self, *features: nn.Module, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image).flatten(1))
        return logits


def cases() -> dict[str, Case]:
    """Small networks with seeded random weights."""
    convolution = nn.Conv2d
    rectifiers = (convolution(3, 8, 3, padding=1), nn.ReLU(), convolution(8, 6, 3, stride=2), nn.ReLU())
    pooled = (convolution(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), convolution(8, 6, 3), nn.ReLU())
    smooth = (convolution(3, 8, 3), nn.Tanh(), convolution(8, 6, 3, stride=2), nn.Sigmoid())
    return {
        "rectifiers": _case(Network(*rectifiers, width=150), 1),
        "max pooling": _case(Network(*pooled, width=54), 2),
        "smooth": _case(Network(*smooth, width=96), 3),
    }


def _case(module: Network, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        nn.init.normal_(parameter, std=1.5 * scale, generator=generator)
    x, other = torch.randn(2, 3, SIDE, SIDE, generator=generator)
    baselines = torch.stack([torch.full_like(x, FILL), 0.3 * other])
    quarter = torch.arange(SIDE) * 2 // SIDE
    segments = (2 * quarter[:, None] + quarter)[None]
    return Case(module.eval(), module.features[-1], x[None], baselines, segments)


# --- Captum ----------------------------------------------------------------------------------------------------------


def of_captum() -> list[Comparison]:
    """The paths, the gradients, the activations, the backward rules and the perturbations."""
    return [*_paths(), *_gradients(), *_noise(), *_activations(), *_rules(), *_perturbations()]


def _captum(method: str, options: Mapping[str, Any], call: str, reference: Reference, **more: Any) -> Comparison:
    return Comparison(method, options, "captum", call, reference, **more)


def _path(rule: str) -> Reference:
    return lambda case: captum.IntegratedGradients(case.module).attribute(
        case.x, case.baseline, TARGET, n_steps=STEPS, method=rule
    )


def _paths() -> list[Comparison]:
    rules = {
        "gauss_legendre": "gausslegendre",
        "midpoint": "riemann_middle",
        "left": "riemann_left",
        "right": "riemann_right",
    }
    trapezoid = {"step_count": STEPS, "quadrature": "trapezoid"}
    call = f'IntegratedGradients, n_steps={STEPS}, method="riemann_trapezoid"'
    theirs = _path("riemann_trapezoid")
    return [
        *(
            _captum(
                "integrated_gradients",
                {"step_count": STEPS, "quadrature": ours},
                f'IntegratedGradients, n_steps={STEPS}, method="{rule}"',
                _path(rule),
            )
            for ours, rule in rules.items()
        ),
        _captum(
            "integrated_gradients",
            trapezoid,
            call,
            theirs,
            deviation="Theirs: weights of riemann_trapezoid sum to (n-1)/n, so that even a linear model is attributed "
            "too little.",
        ),
        _captum(
            "integrated_gradients",
            trapezoid,
            call,
            lambda case: theirs(case) * (STEPS / (STEPS - 1)),
            reading="theirs times n/(n-1)",
        ),
        _captum(
            "expected_gradients",
            {"sample_count": SAMPLES},
            f"GradientShap, n_samples={SAMPLES}, stdevs=0",
            lambda case: captum.GradientShap(case.module).attribute(
                case.x, case.baselines, n_samples=SAMPLES, target=TARGET
            ),
            reading="theirs draws baselines and alpha independently, ours stratifies both: the same mean, less spread",
            sampled=True,
        ),
        _captum("deep_lift", {}, "DeepLift", _deep_lift, networks=("rectifiers", "smooth")),
        _captum(
            "deep_lift",
            {},
            "DeepLift, behind max pooling",
            _deep_lift,
            networks=("max pooling",),
            deviation="Theirs: its rule for max pooling, as its source states it, computed without its hooks, gives "
            "our map, and so does shap's DeepExplainer (above); what it returns is another one. All sum to "
            "F(x) - F(x').",
        ),
    ]


def _deep_lift(case: Case) -> Tensor:
    return captum.DeepLift(case.module).attribute(case.x, case.baseline, target=TARGET)


def _gradients() -> list[Comparison]:
    return [
        _captum("gradient", {}, "Saliency, abs=False", _gradient),
        _captum(
            "gradient",
            {},
            "Saliency",
            lambda case: captum.Saliency(case.module).attribute(case.x, target=TARGET),
            deviation="Theirs: the absolute value by default. Ours keeps the sign, which a client can drop and not "
            "restore.",
        ),
        _captum(
            "gradient_x_input",
            {},
            "InputXGradient",
            lambda case: captum.InputXGradient(case.module).attribute(case.x, target=TARGET),
        ),
    ]


def _gradient(case: Case) -> Tensor:
    return captum.Saliency(case.module).attribute(case.x, target=TARGET, abs=False)


def _noise() -> list[Comparison]:
    kinds = {"smooth_grad": "smoothgrad", "smooth_grad_squared": "smoothgrad_sq", "var_grad": "vargrad"}
    return [
        _captum(
            method,
            {"sample_count": SAMPLES, "noise_std": NOISE},
            f'NoiseTunnel(Saliency), nt_type="{kind}", nt_samples={SAMPLES}, stdevs={NOISE}, abs=False',
            _tunnel(kind),
            sampled=True,
        )
        for method, kind in kinds.items()
    ]


def _tunnel(kind: str) -> Reference:
    return lambda case: captum.NoiseTunnel(captum.Saliency(case.module)).attribute(
        case.x, nt_type=kind, nt_samples=SAMPLES, nt_samples_batch_size=50, stdevs=NOISE, target=TARGET, abs=False
    )


def _activations() -> list[Comparison]:
    return [
        _captum(
            "grad_cam",
            {},
            "LayerGradCam",
            lambda case: captum.LayerGradCam(case.module, case.layer).attribute(case.x, TARGET),
            reading="signed and in the layer's grid, as theirs is by default",
        ),
        _captum(
            "grad_cam",
            {"relu": True, "upsampling": "bilinear"},
            "LayerGradCam, relu_attributions=True, interpolated bilinearly",
            lambda case: functional.interpolate(
                captum.LayerGradCam(case.module, case.layer).attribute(case.x, TARGET, relu_attributions=True),
                (SIDE, SIDE),
                mode="bilinear",
            ),
        ),
        _captum(
            "guided_grad_cam",
            {"upsampling": "bilinear"},
            'GuidedGradCam, interpolate_mode="bilinear"',
            _guided_grad_cam("bilinear"),
        ),
        _captum(
            "guided_grad_cam",
            {"upsampling": "nearest"},
            'GuidedGradCam, interpolate_mode="nearest-exact"',
            _guided_grad_cam("nearest-exact"),
        ),
        _captum(
            "guided_grad_cam",
            {"upsampling": "nearest"},
            'GuidedGradCam, interpolate_mode="nearest"',
            _guided_grad_cam("nearest"),
            deviation="Theirs: torch's nearest takes the cell at the corner of an element instead of the one at its "
            "middle, which moves the map where the image is no multiple of the grid; nearest-exact does not.",
        ),
    ]


def _guided_grad_cam(mode: str) -> Reference:
    return lambda case: captum.GuidedGradCam(case.module, case.layer).attribute(case.x, TARGET, interpolate_mode=mode)


def _rules() -> list[Comparison]:
    return [
        _captum(
            "guided_backpropagation",
            {},
            "GuidedBackprop",
            lambda case: captum.GuidedBackprop(case.module).attribute(case.x, target=TARGET),
        ),
        _captum(
            "deconv_net",
            {},
            "Deconvolution",
            lambda case: captum.Deconvolution(case.module).attribute(case.x, target=TARGET),
        ),
        _captum(
            "lrp",
            {"rule": "epsilon", "epsilon": EPSILON},
            f"LRP, EpsilonRule(epsilon={EPSILON}) in every layer",
            lambda case: _relevance(case, captum_rules.EpsilonRule, epsilon=EPSILON),
            networks=("rectifiers", "max pooling"),
            reading="theirs has no rule for sigmoids",
        ),
        _captum(
            "lrp",
            {"rule": "gamma", "gamma": 0.25},
            "LRP, GammaRule(gamma=0.25) in every layer",
            lambda case: _relevance(case, captum_rules.GammaRule, gamma=0.25),
            networks=("rectifiers", "max pooling"),
            deviation="Ours: the rule for values of either sign (Andeol et al. 2021), as in zennit, which strengthens "
            "positive biases as it does weights; theirs is the rule for positive values, and leaves biases. Where "
            "inputs and scores are positive and there are no biases both agree within 3e-6.",
        ),
    ]


def _relevance(case: Case, rule: Callable[..., Any], **options: float) -> Tensor:
    module = copy.deepcopy(case.module)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.MaxPool2d):
            layer.rule = rule(**options)
    return captum.LRP(module).attribute(case.x.clone(), target=TARGET)  # it leaves its input with a gradient to take


def _perturbations() -> list[Comparison]:
    return [
        _captum(
            "occlusion",
            {"window": [4, 4], "stride": [2, 2], "aggregation": "mean"},
            "Occlusion, sliding_window_shapes=(3, 4, 4), strides=(3, 2, 2)",
            lambda case: captum.Occlusion(case.module).attribute(case.x, (3, 4, 4), (3, 2, 2), case.baseline, TARGET),
            reading="windows end with the image here; where they do not, ours moves the last one in, theirs cuts it",
        ),
        *(
            _captum(
                method,
                {"segments": quarters},
                "ShapleyValues, feature_mask=quarters",
                _shares,
                reading="exact in both; an element has its share of its segment's value here, all of it there",
            )
            for method in ("kernel_shap", "shapley_value_sampling")
        ),
        _captum(
            "feature_ablation",
            {"segments": quarters},
            "FeatureAblation, feature_mask=quarters",
            lambda case: captum.FeatureAblation(case.module).attribute(
                case.x, case.baseline, TARGET, feature_mask=case.segments
            ),
        ),
    ]


def _shares(case: Case) -> Tensor:
    values = captum.ShapleyValues(case.module).attribute(case.x, case.baseline, TARGET, feature_mask=case.segments)
    return values / (case.x.numel() / 4)


# --- saliency (PAIR) -------------------------------------------------------------------------------------------------


def of_saliency() -> list[Comparison]:
    """Of images with channels last."""
    steps = 200
    return [
        _saliency("gradient", {}, "GradientSaliency", lambda core, case: _mask(core.GradientSaliency(), case)),
        _saliency(
            "integrated_gradients",
            {"step_count": STEPS, "quadrature": "trapezoid"},
            f"IntegratedGradients, x_steps={STEPS}",
            lambda core, case: _mask(
                core.IntegratedGradients(), case, x_baseline=_last(case.baseline), x_steps=STEPS, batch_size=STEPS
            ),
            deviation="Theirs: nodes with both ends and equal weights 1/n, which is no rule of quadrature; both have "
            "the same limit of many steps, theirs with an error in proportion to 1/n.",
        ),
        _saliency(
            "guided_integrated_gradients",
            {"step_count": STEPS, "fraction": 0.25, "max_distance": 0.2},
            f"GuidedIG, x_steps={STEPS}, fraction=0.25, max_dist=0.2",
            _guided_path,
        ),
        _saliency(
            "smooth_grad",
            {"sample_count": SAMPLES, "noise_level": 0.15},
            f"GradientSaliency.GetSmoothedMask, nsamples={SAMPLES}, magnitude=False",
            lambda core, case: _smoothed(core, case, magnitude=False),
            sampled=True,
        ),
        _saliency(
            "smooth_grad_squared",
            {"sample_count": SAMPLES, "noise_level": 0.15},
            f"GradientSaliency.GetSmoothedMask, nsamples={SAMPLES}",
            lambda core, case: _smoothed(core, case, magnitude=True),
            reading="theirs squares by default",
            sampled=True,
        ),
        _saliency(
            "blur_integrated_gradients",
            {"step_count": steps, "max_sigma": 2.0},
            f"BlurIG, max_sigma=2, steps={steps}",
            lambda core, case: _mask(core.BlurIG(), case, max_sigma=2, steps=steps, batch_size=steps),
            deviation="Ours: edge values are repeated, so that a blur does not darken towards the border; theirs pads "
            "with zeros. Theirs takes the gradient at the sharp end of a step, ours in its middle.",
        ),
        _saliency(
            "occlusion",
            {"window": [4, 4], "stride": [1, 1], "aggregation": "sum"},
            f"Occlusion, size=4, value={FILL}",
            lambda core, case: _mask(core.Occlusion(), case, size=4, value=FILL),
        ),
        _saliency(
            "xrai",
            {"segments": masks, "base_map": gradient},
            "XRAI, segments=masks, base_attribution=gradient, min_pixel_diff=1",
            _regions,
        ),
    ]


def _regions(core: Any, case: Case) -> Array:
    """Theirs passes over segments of fewer than 50 pixels by default, whatever the size of the image."""
    parameters = core.XRAIParameters()
    parameters.experimental_params["min_pixel_diff"] = 1
    found: Array = core.XRAI().GetMask(
        _last(case.x),
        None,
        segments=list(masks(case)),
        base_attribution=np.moveaxis(gradient(case), 0, -1),
        extra_parameters=parameters,
    )
    return found


def _saliency(
    method: str, options: Mapping[str, Any], call: str, reference: Callable[[Any, Case], Array], **more: Any
) -> Comparison:
    def found(case: Case) -> Array:
        import saliency.core

        return reference(saliency.core, case)

    return Comparison(method, options, "saliency", call, found, **more)


def _last(batch: Tensor) -> NDArray[np.float64]:
    """One image with channels last, in the double precision that they need to sum in."""
    return batch[0].permute(1, 2, 0).numpy().astype(np.float64)


def _mask(method: Any, case: Case, **options: Any) -> Array:
    return _first(method.GetMask(_last(case.x), _answers(case), **options))


def _guided_path(core: Any, case: Case) -> Array:
    """Theirs calls numpy.quantile with an argument that has another name since NumPy 1.22."""
    quantile = np.quantile

    def renamed(values: Array, share: float, interpolation: str) -> Any:
        return quantile(values, share, method=cast(Any, interpolation))

    with mock.patch.object(np, "quantile", renamed):
        return _mask(core.GuidedIG(), case, x_baseline=_last(case.baseline), x_steps=STEPS, fraction=0.25, max_dist=0.2)


def _smoothed(core: Any, case: Case, *, magnitude: bool) -> Array:
    method = core.GradientSaliency()
    return _first(method.GetSmoothedMask(_last(case.x), _answers(case), nsamples=SAMPLES, magnitude=magnitude))


def _first(mask: NDArray[np.generic]) -> Array:
    return np.moveaxis(mask, -1, 0).astype(np.float32)[None]


def _answers(case: Case) -> Callable[..., dict[str, Array]]:
    """What their methods call: scores and gradients of images with channels last."""

    def answer(images: Any, call_model_args: object = None, expected_keys: object = None) -> dict[str, Array]:
        rows = torch.tensor(np.asarray(images), dtype=torch.float32).permute(0, 3, 1, 2).requires_grad_()
        scores = case.module(rows)[:, TARGET]
        (gradients,) = torch.autograd.grad(scores.sum(), rows)
        return {
            "INPUT_OUTPUT_GRADIENTS": gradients.permute(0, 2, 3, 1).numpy(),
            "OUTPUT_LAYER_VALUES": scores.detach().numpy(),
        }

    return answer


# --- zennit ----------------------------------------------------------------------------------------------------------

RECTIFIED = ("rectifiers", "max pooling")


LOW, HIGH = -2.0, 2.0
"""The value range that the served networks state, as the network sees it."""


def of_zennit() -> list[Comparison]:
    """Gradients, and relevance handed down from the score."""
    flat = "EpsilonPlusFlat"
    return [
        _zennit(
            "integrated_gradients",
            {"step_count": STEPS, "quadrature": "right"},
            f"IntegratedGradients, n_iter={STEPS}",
            lambda case: _attributed(case, "IntegratedGradients", n_iter=STEPS, baseline_fn=lambda x: case.baseline),
        ),
        _zennit(
            "smooth_grad",
            {"sample_count": SAMPLES, "noise_level": 0.15},
            f"SmoothGrad, n_iter={SAMPLES}, noise_level=0.15",
            lambda case: _attributed(case, "SmoothGrad", n_iter=SAMPLES, noise_level=0.15),
            reading="the last of theirs has no noise",
            sampled=True,
        ),
        _zennit("guided_backpropagation", {}, "GuidedBackprop", lambda case: _composite(case, "GuidedBackprop")),
        _zennit("deconv_net", {}, "DeconvNet", lambda case: _composite(case, "DeconvNet")),
        _relevance_of_zennit(
            {"rule": "epsilon", "epsilon": EPSILON}, f"Epsilon(epsilon={EPSILON})", "Epsilon", EPSILON
        ),
        _relevance_of_zennit({"rule": "gamma", "gamma": 0.25}, "Gamma(gamma=0.25)", "Gamma", 0.25),
        _zennit(
            "lrp",
            {"rule": "composite"},
            flat,
            lambda case: _composite(case, flat, relevance=True),
            networks=RECTIFIED,
        ),
        _zennit(
            "lrp",
            {"rule": "epsilon_gamma_box"},
            f"EpsilonGammaBox, low={LOW:g}, high={HIGH:g}",
            lambda case: _composite(
                case,
                "EpsilonGammaBox",
                relevance=True,
                low=torch.full_like(case.x, LOW),
                high=torch.full_like(case.x, HIGH),
            ),
            networks=RECTIFIED,
        ),
    ]


def _zennit(method: str, options: Mapping[str, Any], call: str, reference: Reference, **more: Any) -> Comparison:
    return Comparison(method, options, "zennit", call, reference, **more)


def _relevance_of_zennit(options: Mapping[str, Any], call: str, rule: str, value: float) -> Comparison:
    def found(case: Case) -> Tensor:
        from zennit import rules
        from zennit.composites import LayerMapComposite
        from zennit.types import Activation, Linear

        layers = [(Activation, rules.Pass()), (Linear, getattr(rules, rule)(value))]
        return _handed_down(case, LayerMapComposite(layer_map=layers))

    return _zennit("lrp", options, f"{call} in every linear layer", found, networks=RECTIFIED)


def _attributed(case: Case, attributor: str, **options: Any) -> Tensor:
    from zennit import attribution

    method = getattr(attribution, attributor)(case.module, attr_output=_selected, **options)
    found: Tensor = method(case.x.clone())[1]
    return found


def _composite(case: Case, name: str, *, relevance: bool = False, **options: Any) -> Tensor:
    from zennit import composites

    return _handed_down(case, getattr(composites, name)(**options), relevance=relevance)


def _handed_down(case: Case, composite: Any, *, relevance: bool = True) -> Tensor:
    from zennit.attribution import Gradient

    start = _relevant if relevance else _selected
    with Gradient(copy.deepcopy(case.module), composite, attr_output=start) as attributor:
        found: Tensor = attributor(case.x.clone())[1]
    return found


def _selected(scores: Tensor) -> Tensor:
    """The gradient that theirs starts from."""
    return functional.one_hot(torch.full(scores.shape[:1], TARGET), CLASSES).to(scores)


def _relevant(scores: Tensor) -> Tensor:
    """The score itself, in the place of its target."""
    return scores * _selected(scores)


# --- shap ------------------------------------------------------------------------------------------------------------


def of_shap() -> list[Comparison]:
    """Of presence of quarters, and by gradients."""
    quarterly = {"segments": quarters}
    exact = "exact in both; an element has its share of its segment's value here, all of it there"
    explainers: dict[str, tuple[str, Callable[[Any, Callable[..., Any]], Any]]] = {
        "KernelExplainer": (
            "kernel_shap",
            lambda shap, f: shap.KernelExplainer(f, ABSENT).shap_values(PRESENT, silent=True),
        ),
        "ExactExplainer": (
            "shapley_value_sampling",
            lambda shap, f: shap.explainers.ExactExplainer(f, shap.maskers.Independent(ABSENT))(PRESENT).values,
        ),
    }
    return [
        *(
            _shap(method, quarterly, name, _by_quarter(explain), reading=exact)
            for name, (method, explain) in explainers.items()
        ),
        _shap(
            "shapley_value_sampling",
            quarterly,
            "PermutationExplainer",
            _by_quarter(
                lambda shap, f: (
                    shap.explainers.PermutationExplainer(f, shap.maskers.Independent(ABSENT))(PRESENT).values
                )
            ),
            reading="exact here; theirs draws orders, each with its reverse",
            sampled=True,
        ),
        _shap(
            "expected_gradients",
            {"sample_count": SAMPLES},
            f"GradientExplainer, nsamples={SAMPLES}",
            lambda shap, case: shap.GradientExplainer(case.module, case.baselines).shap_values(
                case.x, nsamples=SAMPLES
            )[..., TARGET],
            reading="theirs draws baselines and alpha independently, ours stratifies both: the same mean, less spread",
            sampled=True,
        ),
        _shap(
            "deep_lift",
            {},
            "DeepExplainer, one baseline",
            lambda shap, case: shap.DeepExplainer(copy.deepcopy(case.module), case.baseline).shap_values(
                case.x, check_additivity=False
            )[..., TARGET],
        ),
    ]


PRESENT, ABSENT = np.ones((1, 4)), np.zeros((1, 4))
"""Quarters of an image."""


def _shap(
    method: str, options: Mapping[str, Any], call: str, reference: Callable[[Any, Case], Array], **more: Any
) -> Comparison:
    def found(case: Case) -> Array:
        import shap

        return reference(shap, case)

    return Comparison(method, options, "shap", call, found, **more)


def _by_quarter(explain: Callable[[Any, Callable[..., Any]], Any]) -> Callable[[Any, Case], Array]:
    """The values of quarters, each shared out among its elements."""

    def found(shap: Any, case: Case) -> Array:
        values = np.asarray(explain(shap, _of_present_quarters(case))).reshape(-1) / (case.x.numel() / 4)
        return np.broadcast_to(values[case.segments.numpy()], case.x.shape)

    return found


def _of_present_quarters(case: Case) -> Callable[[Any], Array]:
    def answer(present: Any) -> Array:
        kept = torch.tensor(np.asarray(present, np.float32))[:, case.segments[0]][:, None]
        with torch.no_grad():
            scores: Array = case.module(kept * case.x + (1 - kept) * case.baseline)[:, TARGET].numpy()
        return scores

    return answer


# --- lime ------------------------------------------------------------------------------------------------------------


def of_lime() -> list[Comparison]:
    """Of images with channels last; its own segmentation is replaced by ours, and its fill by the baseline."""
    return [
        Comparison(
            "lime",
            {"segments": quarters, "sample_count": SAMPLES},
            "lime",
            f"LimeImageExplainer, num_samples={SAMPLES}, segmentation_fn=quarters, hide_color={FILL}",
            _of_lime,
            sampled=True,
        )
    ]


def _of_lime(case: Case) -> Array:
    from lime.lime_image import LimeImageExplainer

    labels = case.segments[0].numpy()
    answers = _answers(case)
    found = LimeImageExplainer(random_state=np.random.randint(2**31)).explain_instance(
        _last(case.x),
        lambda images: answers(images)["OUTPUT_LAYER_VALUES"][:, None],
        labels=(0,),
        top_labels=None,
        hide_color=FILL,
        num_samples=SAMPLES,
        segmentation_fn=lambda image: labels,
    )
    values = np.zeros(labels.max() + 1, np.float32)
    for segment, value in found.local_exp[0]:
        values[segment] = value
    return np.broadcast_to(values[labels], case.x.shape)
