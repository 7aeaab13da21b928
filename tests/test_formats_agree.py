"""The same weights give the same map whatever file they came in, over a real connection."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch

from explainserve_client import (
    BlurIntegratedGradients,
    Client,
    Constant,
    DeconvNet,
    DeepLift,
    GradCam,
    GradCamPlusPlus,
    GuidedBackpropagation,
    GuidedGradCam,
    GuidedIntegratedGradients,
    Idgi,
    IntegratedGradients,
    LayerCam,
    Lrp,
    ScoreCam,
)
from three_formats import FORMATS, WRITERS, Array, module_and_input, relative, serving

METHODS = {
    "midpoint": IntegratedGradients(step_count=10),
    "gauss_legendre": IntegratedGradients(step_count=10, quadrature="gauss_legendre"),
}

PATH_METHODS = {
    "blur": BlurIntegratedGradients(step_count=10, max_sigma=3),
    "guided": GuidedIntegratedGradients(step_count=20, max_distance=0.2),
    "idgi": Idgi(IntegratedGradients(step_count=10, quadrature="midpoint")),
    "idgi_of_blur": Idgi(BlurIntegratedGradients(step_count=10, max_sigma=3)),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("models"), WRITERS) as client:
        yield client


@pytest.mark.parametrize("score", ["LOGIT", "PROBABILITY", "LOG_PROBABILITY"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRITERS)
def test_formats_give_the_same_map(client: Client, name: str, method: str, score: str) -> None:
    x = module_and_input(name)[1]
    first, *others = (
        client.explain(
            f"{name}-{f}", x, targets=["argmax", 1], baselines="zeros", score=score, method=METHODS[method]
        ).attributions
        for f in FORMATS
    )
    for attributions in others:
        for ours, theirs in zip(first, attributions, strict=True):
            assert relative(ours.tensor, theirs.tensor) < 1e-4
            assert ours.instance_output_value == pytest.approx(theirs.instance_output_value, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", PATH_METHODS)
@pytest.mark.parametrize("name", ["conv", "two-digits"])
def test_formats_agree_on_path_methods(client: Client, name: str, method: str) -> None:
    x = module_and_input(name)[1]
    asked = {"targets": 1, "baselines": "zeros", "method": PATH_METHODS[method]}
    first, *others = (client.explain(f"{name}-{f}", x, **asked).attributions[0] for f in FORMATS)
    for other in others:
        assert relative(other.tensor, first.tensor) < 1e-4
        assert other.baseline_output_value == pytest.approx(first.baseline_output_value, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_the_adaptive_rule_chooses_the_same_points(client: Client, name: str) -> None:
    x = module_and_input(name)[1]
    found = [client.explain(f"{name}-{f}", x, targets=1, baselines="zeros").attributions[0] for f in FORMATS]
    for other in found[1:]:
        if other.score_path.alphas == found[0].score_path.alphas:
            assert relative(other.tensor, found[0].tensor) < 1e-4
        else:  # a point moved by rounding: both maps keep what they promise
            assert relative(other.tensor, found[0].tensor) < other.map_error + found[0].map_error


WITHIN = {
    "grad_cam": GradCam(),
    "grad_cam_plus_plus": GradCamPlusPlus(),
    "layer_cam": LayerCam(),
    "score_cam": ScoreCam(),
    "guided_grad_cam": GuidedGradCam(),
    "guided_backpropagation": GuidedBackpropagation(),
    "deconv_net": DeconvNet(),
    "lrp": Lrp(),
}


@pytest.mark.parametrize("method", WITHIN)
@pytest.mark.parametrize("name", ["conv", "two-digits"])
def test_onnx_and_pt2_give_the_same_maps_of_layers_and_altered_rules(client: Client, name: str, method: str) -> None:
    """By default of the same layer too, whatever it is called."""
    x = module_and_input(name)[1]
    first, other = (
        client.explain(f"{name}-{f}", x, targets=["argmax", 1], method=WITHIN[method]).attributions
        for f in ("onnx", "pt2")
    )
    for ours, theirs in zip(first, other, strict=True):
        assert ours.tensor.any()
        assert relative(ours.tensor, theirs.tensor) < 1e-4


@pytest.mark.parametrize("score", ["PROBABILITY", "LOG_PROBABILITY"])
@pytest.mark.parametrize("baseline", ["zeros", Constant(0.7)])
def test_deeplift_agrees_through_heads_and_pools(client: Client, score: str, baseline: Any) -> None:
    x = module_and_input("conv")[1]
    onnx, pt2 = (
        client.explain(f"conv-{f}", x, targets=[1, 4], baselines=baseline, score=score, method=DeepLift()).attributions
        for f in ("onnx", "pt2")
    )
    for ours, theirs in zip(onnx, pt2, strict=True):
        assert relative(theirs.tensor, ours.tensor) < 1e-4
        gained = theirs.instance_output_value - theirs.baseline_output_value
        assert theirs.tensor.astype(np.float64).sum() == pytest.approx(gained, rel=1e-3, abs=1e-5)


# --- deep networks ---------------------------------------------------------------------------------------------------


def deep_networks() -> dict[str, tuple[Callable[[], Any], int, int]]:
    """Networks with random weights, the side of their images, and steps."""
    import networks

    return {
        "resnet18": (lambda: networks.resnet18(224), 224, 16),
        "resnet50": (lambda: networks.resnet50(64), 64, 16),
        "vit": (lambda: networks.served(networks.VisionTransformer(64, 8, 96, 6, 3)), 64, 4),
        "vit_small": (lambda: networks.vit_small(224), 224, 4),
    }


def mean_gradient_map(net: Any, x: Array, step_count: int) -> Array:
    """Integrated Gradients of class 3 from zeros by the midpoint rule, in the precision and memory format of `net`."""
    parameter = next(net.parameters())
    alphas = (torch.arange(step_count, dtype=torch.float64) + 0.5) / step_count
    rows = alphas[:, None, None, None] * torch.from_numpy(x).double()
    rows = rows.float().to(parameter.dtype)  # the points are float32 in every precision
    if any(p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters()):
        rows = rows.contiguous(memory_format=torch.channels_last)
    gradients = []
    for part in rows.split(8):
        part.requires_grad_()
        gradients += torch.autograd.grad(net(part)[:, 3].sum(), part)
    return torch.cat(gradients).double().mean(0).numpy() * x


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit", "vit_small"])
def test_deep_networks_are_as_near_to_float64_as_torch(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """ReLU gates flip by rounding, so maps of deep networks differ between any two float32 implementations.

    Over several pictures together, the distance to torch float64 is at most twice torch float32's own, the worse of its
    two memory formats. A gate that flips moves the map by a thousandth: there are enough of them for averages.
    """
    import networks

    make, side, step_count = deep_networks()[name]
    net = make()
    pictures = np.random.default_rng(2).standard_normal((4, 3, side, side)).astype(np.float32)

    def maps(variant: Any) -> Array:
        return np.stack([mean_gradient_map(variant, x, step_count) for x in pictures])

    exact = maps(copy.deepcopy(net).double())
    own = max(relative(maps(v), exact) for v in (net, copy.deepcopy(net).to(memory_format=torch.channels_last)))
    writers = {name: lambda file_format, folder: networks.write_model(net, file_format, folder, side)}
    with serving(tmp_path_factory.mktemp("models"), writers) as client:
        method = IntegratedGradients(step_count=step_count)
        for file_format in FORMATS:
            model = f"{name}-{file_format}"
            result = client.explain(model, pictures, targets=3, baselines="zeros", method=method)
            ours = np.stack([attribution.tensor for attribution in result.attributions])
            distance = relative(ours, exact)
            assert distance < 2 * own, f"{model}: {distance:.2e}, torch float32 {own:.2e}"
