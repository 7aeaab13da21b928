"""Every registered method over a real connection: what it gives alone, among others, and what it costs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from explainserve.methods import METHODS, Needs
from explainserve.rpc.methods import read, write
from explainserve.settings import Settings
from explainserve.v1 import attribution_pb2, method_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.conftest import LIMITS
from rpc.folder import RECTIFIED_TOML, rectified_arrays
from rpc.loopback import Array, Loopback, array, element, every, normal, refusal, relative_distance, request

X = normal(2, 3, 6, 8)

CASES: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"step_count": 5},
    "gradient": {},
    "gradient_x_input": {},
    "smooth_grad": {"sample_count": 6, "noise_std": 0.1, "seed": 3},
    "smooth_grad_squared": {"sample_count": 5, "noise_level": 0.1},
    "var_grad": {"sample_count": 4, "base": {"integrated_gradients": {"step_count": 3}}},
    "expected_gradients": {"sample_count": 7, "noise_std": 0.05},
    "blur_integrated_gradients": {"step_count": 6, "max_sigma": 3.0, "spacing": "BLUR_SPACING_VARIANCE"},
    "guided_integrated_gradients": {"step_count": 8, "max_distance": 0.2},
    "idgi": {"path": {"integrated_gradients": {"step_count": 5}}},
    "grad_cam": {},
    "grad_cam_plus_plus": {"relu": True},
    "layer_cam": {"upsampling": "UPSAMPLING_BILINEAR"},
    "score_cam": {"upsampling": "UPSAMPLING_NEAREST"},
    "guided_grad_cam": {},
    "guided_backpropagation": {},
    "deconv_net": {},
    "deep_lift": {},
    "rise": {"sample_count": 30, "grid_size": 3, "seed": 2},
    "kernel_shap": {"segment_count": 6, "sample_count": 20, "seed": 3},
    "shapley_value_sampling": {"segment_count": 6, "sample_count": 5, "seed": 3},
    "lime": {"segmentation": "SEGMENTATION_GRID", "segment_count": 6, "sample_count": 30, "ridge": 0.5},
    "feature_ablation": {"segment_count": 6},
    "occlusion": {"window": [3, 4], "stride": [2, 3], "aggregation": "WINDOW_AGGREGATION_SUM"},
    "pattern_net": {},
    "pattern_attribution": {},
    "lrp": {"rule": "LRP_RULE_GAMMA", "gamma": 0.1},
    "xrai": {"step_count": 3},
}
"""Options that are quick to compute, for each method."""

NAMES = sorted(CASES)
GAP = {"named": {"name": "gap"}}
BASELINES = [every(zeros={}), every(constant={"values": [0.5]})]


def write_rectified_torch(root: Path) -> None:
    """`rectified` as torch exports it, whose nodes name the patterns, and as it scripts it."""
    import torch

    weights, patterns = rectified_arrays()
    kernel, bias, second, last = (torch.from_numpy(weights[name]) for name in "kblv")

    class Rectified(torch.nn.Module):
        def forward(self, image: Any) -> Any:
            hidden = torch.nn.functional.conv2d(image, kernel, bias, padding=1).relu()
            grid = torch.nn.functional.conv2d(hidden, second, padding=1, stride=2).relu()
            return torch.nn.functional.adaptive_avg_pool2d(grid, 1).flatten(1) @ last

    shapes = {"image": [3, 6, 8], "logits": [4]}  # a TorchScript file does not tell them
    shaped = RECTIFIED_TOML
    for name, shape in shapes.items():
        shaped = shaped.replace(f'name = "{name}"\n', f'name = "{name}"\nshape = {["batch", *shape]}\n')
    for name, toml in (("exported", RECTIFIED_TOML), ("scripted", shaped)):
        (root / name / "1").mkdir(parents=True)
        (root / name / "model.toml").write_text(toml, encoding="utf-8")
    example, axes = torch.zeros(2, 3, 6, 8), ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Rectified(), (example,), dynamic_shapes=axes)
    torch.export.save(program, root / "exported" / "1" / "model.pt2")
    layers = zip(("conv2d", "conv2d_1", "matmul"), patterns.values(), strict=True)
    np.savez(root / "exported" / "1" / "patterns.npz", **dict(layers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        torch.jit.save(torch.jit.trace(Rectified(), example), root / "scripted" / "1" / "model.pt")


@pytest.fixture(scope="module")
def torch_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A server of `rectified` as a `.pt2` and as a TorchScript file."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("torch")
    write_rectified_torch(root)
    server = Loopback(Settings(models=root, **LIMITS))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def exported(torch_service: Loopback) -> ExplainerServiceStub:
    """A client of it."""
    return torch_service.stub


@dataclass(frozen=True)
class Place:
    """A model file and the server that has it."""

    service: Loopback
    model: str

    @cached_property
    def supported(self) -> dict[str, bool]:
        """Methods by name."""
        named = pb.GetModelRequest(model={"named": {"name": self.model}})
        return {m.method: m.supported for m in self.service.stub.GetModel(named).model.methods}

    @property
    def counted(self) -> Array:
        """Rows and backward evaluations that the engine did for the model so far."""
        names = "explainserve_rows_total", "explainserve_backward_evaluations_total"
        return np.array([self.service.metric(name, model=self.model) for name in names])

    def explain(self, *methods: dict[str, Any], **fields: Any) -> pb.ExplainResponse:
        return self.service.stub.Explain(self.asked(*methods, **fields), timeout=120)

    def asked(self, *methods: dict[str, Any], **fields: Any) -> pb.ExplainRequest:
        """One target, unless the fields say otherwise."""
        usual: dict[str, Any] = {"targets": [element(1)], "baselines": BASELINES}
        return request(self.model, {"image": X}, methods=methods, **(usual | fields))


@pytest.fixture(
    scope="module",
    params=[
        ("service", "rectified"),
        pytest.param(("torch_service", "exported"), marks=pytest.mark.torch),
        pytest.param(("torch_service", "scripted"), marks=pytest.mark.torch),
    ],
    ids=["onnx", "pt2", "pt"],
)
def place(request: pytest.FixtureRequest) -> Place:
    """`rectified` in each format."""
    service, model = request.param
    return Place(request.getfixturevalue(service), model)


def spec(name: str) -> dict[str, Any]:
    return {name: CASES[name]}


def explain(stub: ExplainerServiceStub, *names: str, **fields: Any) -> pb.ExplainResponse:
    """Two instances, two targets and two baselines each."""
    usual: dict[str, Any] = {"targets": [element(1), element(3)], "baselines": BASELINES}
    asked = request("rectified", {"image": X}, methods=[spec(name) for name in names], **(usual | fields))
    return stub.Explain(asked, timeout=120)


def tensors(response: pb.ExplainResponse, method_index: int) -> list[Any]:
    return [array(a.inputs[0].tensor) for a in response.attributions if a.method_index == method_index]


def agree(own: Array, other: Array) -> bool:
    """Maps of zeros agree with each other alone."""
    return relative_distance(own, other) < 1e-5 if other.any() else not own.any()


def test_every_method_is_tested() -> None:
    assert CASES.keys() == METHODS.keys()
    assert METHODS.keys() <= set(method_pb2.MethodSpec.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_read_from_its_message_and_written_back(name: str) -> None:
    method = read(method_pb2.MethodSpec(**spec(name)))

    assert read(write(method)) == method
    assert read(method_pb2.MethodSpec(**{name: {}})) == METHODS[name]()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_gives_finite_maps_in_the_shape_of_the_input(stub: ExplainerServiceStub, name: str) -> None:
    response = explain(stub, name)
    guide = read(method_pb2.MethodSpec(**spec(name))).reading_guide

    assert len(response.attributions) == 2 * 2 * (2 if guide.one_map_per_baseline else 1)
    for own in response.attributions:
        assert own.HasField("baseline_index") == guide.one_map_per_baseline
        assert own.HasField("convergence_delta") <= guide.complete
        assert own.stop_reason != attribution_pb2.STOP_REASON_NON_FINITE
        assert np.isfinite(array(own.inputs[0].tensor)).all()
        assert own.inputs[0].statistics


@pytest.mark.parametrize("name", NAMES)
def test_targets_and_instances_together_give_what_each_gives_alone(stub: ExplainerServiceStub, name: str) -> None:
    together = tensors(explain(stub, name), 0)
    alone = [
        tensors(
            stub.Explain(
                request(
                    "rectified", {"image": X[i : i + 1]}, targets=[target], baselines=BASELINES, methods=[spec(name)]
                ),
                timeout=120,
            ),
            0,
        )
        for i in range(2)
        for target in (element(1), element(3))
    ]
    for own, other in zip(together, [one for each in alone for one in each], strict=True):
        assert agree(own, other)


def test_methods_mixed_in_one_request_give_what_each_gives_alone(stub: ExplainerServiceStub) -> None:
    response = explain(stub, *NAMES)

    for index, name in enumerate(NAMES):
        for own, other in zip(tensors(response, index), tensors(explain(stub, name), 0), strict=True):
            assert agree(own, other)
    assert [a.method_index for a in response.attributions] == sorted(a.method_index for a in response.attributions)


def test_methods_mixed_in_one_load_give_what_each_gives_alone(place: Place) -> None:
    """Each that the format supports, all of them at once and each next to others of its own kind."""
    names = [name for name in NAMES if place.supported[name]]
    alone = {name: tensors(place.explain(spec(name)), 0) for name in names}
    found: list[tuple[str, list[Any]]] = []
    threads = [
        threading.Thread(target=lambda n=name: found.append((n, tensors(place.explain(spec(n)), 0))))
        for name in [*names, *reversed(names)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(name for name, _ in found) == sorted(2 * names)
    for name, maps in found:
        assert all(agree(own, other) for own, other in zip(maps, alone[name], strict=True)), name


ADAPTIVE: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"integrated_gradients": {"max_step_count": 64}},
    "smooth_grad": {"smooth_grad": {"sample_count": 3, "base": {"integrated_gradients": {"max_step_count": 32}}}},
    "lime": spec("lime"),
    "shapley_value_sampling": spec("shapley_value_sampling"),
}
"""Methods with options whose rows are known only once they are evaluated: by a tolerance, or by equal draws."""

FIXED = {name: spec(name) for name in NAMES if name not in ("lime", "shapley_value_sampling")}


def cost(place: Place, asked: pb.ExplainRequest) -> dict[str, tuple[int, int, int]]:
    """The least and most that were estimated and what was used, by what is counted, and as the engine counted it."""
    stated = place.service.stub.EstimateCost(pb.EstimateCostRequest(explain=asked))
    before = place.counted
    own = place.service.stub.Explain(asked, timeout=120).provenance
    assert (place.counted - before).tolist() == [own.row_count, own.backward_count]
    return {
        "rows": (stated.min_row_count, own.row_count, stated.max_row_count),
        "forward": (stated.min_forward_count, own.forward_count, stated.max_forward_count),
        "backward": (stated.min_backward_count, own.backward_count, stated.max_backward_count),
    }


@pytest.mark.parametrize("name", FIXED)
def test_a_method_of_fixed_cost_takes_what_was_estimated(place: Place, name: str) -> None:
    """On an idle server without a cache, in each format; where it is not supported, neither is a word of its cost."""
    asked = place.asked(FIXED[name])
    if not place.supported[name]:
        refused = refusal(lambda: place.service.stub.Explain(asked))
        estimated = refusal(lambda: place.service.stub.EstimateCost(pb.EstimateCostRequest(explain=asked)))
        assert (refused.code, refused.reason) == (estimated.code, estimated.reason)
        assert refused.code == grpc.StatusCode.FAILED_PRECONDITION
        return
    for counted, (least, used, most) in cost(place, asked).items():
        assert least == used == most, counted


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_method_of_adaptive_cost_takes_between_what_was_estimated(place: Place, name: str) -> None:
    for counted, (least, used, most) in cost(place, place.asked(ADAPTIVE[name])).items():
        assert least <= used <= most, counted


@pytest.mark.parametrize("name", NAMES)
def test_cost_of_several_targets_is_between_what_was_estimated(service: Loopback, name: str) -> None:
    """They may share all rows or only some; and the answer tells the options that were asked for."""
    asked = request("rectified", {"image": X}, targets=[element(1), element(3)], methods=[spec(name)])
    for counted, (least, used, most) in cost(Place(service, "rectified"), asked).items():
        assert least <= used <= most, counted
    effective = read(service.stub.Explain(asked, timeout=120).provenance.effective_methods[0])
    asked_for = read(method_pb2.MethodSpec(**spec(name)))
    assert {option: getattr(effective, option) for option in CASES[name]} == {
        option: getattr(asked_for, option) for option in CASES[name]
    }


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name]().needs == Needs(rule="")])
def test_a_method_without_gradients_explains_a_model_without_them(stub: ExplainerServiceStub, name: str) -> None:
    response = stub.Explain(
        request("gap", {"x": 3 * normal(1, 2, 2)}, targets=[element(0, 1)], methods=[{name: {}}]), timeout=60
    )
    (support,) = [m for m in stub.GetModel(pb.GetModelRequest(model=GAP)).model.methods if m.method == name]

    assert np.isfinite(array(response.attributions[0].inputs[0].tensor)).all()
    assert response.provenance.backward_count == 0
    assert response.provenance.gradient_rule == ""
    assert support.supported and support.reading_guide.tier == "T0"


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_a_method_gives_the_same_maps_of_a_pt2_file(
    stub: ExplainerServiceStub, exported: ExplainerServiceStub, name: str
) -> None:
    usual = {"targets": [element(1), element(3)], "baselines": BASELINES, "methods": [spec(name)]}
    response = exported.Explain(request("exported", {"image": X}, **usual), timeout=120)
    named = pb.GetModelRequest(model={"named": {"name": "exported"}})
    supported = [m.supported for m in exported.GetModel(named).model.methods if m.method == name]

    assert supported == [True]
    for own, other in zip(tensors(response, 0), tensors(explain(stub, name), 0), strict=True):
        assert relative_distance(own, other) < 1e-4 if other.any() else not own.any()


def test_methods_share_what_they_evaluate(stub: ExplainerServiceStub) -> None:
    """The gradient and its product with the input are one row, and the last node of a closed rule is another's."""
    closed = {"integrated_gradients": {"step_count": 5, "quadrature": "QUADRATURE_RIGHT"}}
    asked = request(
        "rectified",
        {"image": X[:1]},
        targets=[element(1)],
        methods=[closed, {"gradient": {}}, {"gradient_x_input": {}}],
    )
    own = stub.Explain(asked, timeout=60).provenance

    assert (own.row_count, own.backward_count) == (2 + 5, 5)
    assert own.saved_row_count == 2 + 2


def test_one_path_yields_integrated_gradients_idgi_and_the_gradient(stub: ExplainerServiceStub) -> None:
    """The rows are those of the path alone, of which the last node is the instance."""
    path = {"integrated_gradients": {"step_count": 5, "quadrature": "QUADRATURE_TRAPEZOID"}}
    several = [path, {"idgi": {"path": path}}, {"gradient": {}}, {"gradient_x_input": {}}]
    response = stub.Explain(request("rectified", {"image": X[:1]}, targets=[element(1)], methods=several), timeout=60)
    own = response.provenance

    assert (own.row_count, own.backward_count) == (2 + 5, 5)
    assert own.saved_row_count == 4 + 7  # end points of the second to fourth method; nodes and the instance
    idgi = response.attributions[1]
    assert abs(idgi.relative_convergence_delta) < 1e-4
    kinds = [[caution.kind for caution in own.cautions] for own in response.attributions]
    by_construction = attribution_pb2.CAUTION_KIND_COMPLETE_BY_CONSTRUCTION
    assert [by_construction in own for own in kinds] == [False, True, False, False]
    assert attribution_pb2.CAUTION_KIND_BLIND_TO_BASELINE not in kinds[1]


def test_saved_rows_are_those_that_the_methods_take_alone(service: Loopback) -> None:
    """By the rows that the engine counts, not by what the answers say of themselves."""
    path = {"integrated_gradients": {"step_count": 5, "quadrature": "QUADRATURE_TRAPEZOID"}}
    several = [path, {"idgi": {"path": path}}, {"gradient": {}}, {"gradient_x_input": {}}]
    place = Place(service, "rectified")

    def counted(*methods: dict[str, Any]) -> tuple[pb.ExplainResponse, int]:
        before = place.counted
        response = place.explain(*methods, targets=[element(1), element(3)])
        return response, int((place.counted - before)[0])

    together, rows = counted(*several)
    alone = [counted(own) for own in several]

    assert rows == together.provenance.row_count
    beside = sum(own for _, own in alone) + sum(own.provenance.saved_row_count for own, _ in alone)
    assert together.provenance.saved_row_count == beside - rows
    for index, (own, _) in enumerate(alone):
        assert all(agree(a, b) for a, b in zip(tensors(together, index), tensors(own, 0), strict=True))


def test_methods_that_fail_the_randomization_check_say_so(stub: ExplainerServiceStub) -> None:
    kind = attribution_pb2.CAUTION_KIND_FAILS_RANDOMIZATION
    maps = explain(stub, *NAMES).attributions
    cautioned = {NAMES[own.method_index] for own in maps if kind in [caution.kind for caution in own.cautions]}

    assert cautioned == {"guided_backpropagation", "guided_grad_cam", "deconv_net", "pattern_attribution"}


def test_a_method_that_is_not_built_says_so(stub: ExplainerServiceStub) -> None:
    missing = set(method_pb2.MethodSpec.DESCRIPTOR.fields_by_name) - METHODS.keys()
    for name in missing:
        asked = request("plain", {"x": normal(1, 4)}, methods=[{name: {}}])
        assert refusal(lambda a=asked: stub.Explain(a)).reason == "METHOD_UNIMPLEMENTED"
