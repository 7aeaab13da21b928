"""Bad requests of many kinds, each with the error that it gets; for a server of `folder.write_folder`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from explainserve.rpc.tensors import encode
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import tensor_pb2
from rpc.loopback import adaptive, element, every, label, named, normal, request, steps

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
INTERNAL = grpc.StatusCode.INTERNAL

X = normal(1, 4)
IMAGE = np.zeros((1, 3, 6, 8), np.float32)
IMAGE_LAYERS = ("z", "h")


@dataclass(frozen=True)
class Case:
    """A bad request and what it gets; `metadata` is what ErrorInfo must hold, among others."""

    request: pb.ExplainRequest
    code: grpc.StatusCode
    reason: str
    metadata: dict[str, Any] = field(default_factory=dict)


def plain(**fields: Any) -> pb.ExplainRequest:
    """A good request but for `fields`."""
    return request("plain", {"x": X}, **{"targets": [element(0)], "methods": steps(4), **fields})


def image(**fields: Any) -> pb.ExplainRequest:
    return request("image", {"image": IMAGE}, **{"methods": steps(4), **fields})


def plain_input(value: np.ndarray[Any, Any] | tensor_pb2.Tensor) -> pb.ExplainRequest:
    return request("plain", {"x": value}, targets=[element(0)], methods=steps(4))


def with_value(value: float) -> np.ndarray[Any, Any]:
    array = X.copy()
    array[0, 2] = value
    return array


FLOAT = tensor_pb2.DATA_TYPE_FLOAT32


def raw(*shape: int, data: bytes, data_type: int = FLOAT) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(data_type=data_type, shape=shape, data=data)


INPUTS = {
    "unknown input": Case(
        request("plain", {"x": X, "extra": X}), INVALID, "UNKNOWN_INPUT", {"input": "extra", "inputs": "x"}
    ),
    "missing input": Case(request("product", {"x": normal(1, 5)}), INVALID, "MISSING_INPUT", {"inputs": "y"}),
    "no input at all": Case(request("plain", {}), INVALID, "MISSING_INPUT", {"inputs": "x"}),
    "dtype": Case(
        plain_input(X.astype(np.float64)),
        INVALID,
        "DTYPE_MISMATCH",
        {"input": "x", "expected": "float32", "actual": "float64"},
    ),
    "dtype that numpy lacks": Case(
        plain_input(raw(1, 4, data=bytes(8), data_type=tensor_pb2.DATA_TYPE_BFLOAT16)),
        INVALID,
        "DTYPE_NOT_SUPPORTED",
        {"actual": "DATA_TYPE_BFLOAT16"},
    ),
    "unknown dtype": Case(
        plain_input(raw(1, 4, data=bytes(16), data_type=99)), INVALID, "DTYPE_NOT_SUPPORTED", {"actual": "99"}
    ),
    "no dtype": Case(
        plain_input(raw(1, 4, data=bytes(16), data_type=0)),
        INVALID,
        "DTYPE_NOT_SUPPORTED",
        {"actual": "DATA_TYPE_UNSPECIFIED"},
    ),
    "shape": Case(plain_input(normal(1, 5)), INVALID, "SHAPE_MISMATCH", {"input": "x", "actual": "[1, 5]"}),
    "missing batch axis": Case(plain_input(normal(4)), INVALID, "SHAPE_MISMATCH", {"actual": "[4]"}),
    "too few bytes": Case(
        plain_input(raw(1, 4, data=bytes(15))), INVALID, "TENSOR_SIZE_MISMATCH", {"expected": "16", "actual": "15"}
    ),
    "too many bytes": Case(
        plain_input(raw(1, 4, data=bytes(17))), INVALID, "TENSOR_SIZE_MISMATCH", {"expected": "16", "actual": "17"}
    ),
    "negative extents": Case(
        plain_input(raw(-1, -4, data=bytes(16))), INVALID, "TENSOR_SHAPE_INVALID", {"actual": "[-1, -4]"}
    ),
    "a hundred axes": Case(plain_input(raw(*[1] * 100, data=bytes(4))), INVALID, "TENSOR_SHAPE_INVALID"),
    "extents beside an empty axis": Case(plain_input(raw(0, 2**62, 2**62, data=b"")), INVALID, "TENSOR_SHAPE_INVALID"),
    "extents whose product overflows": Case(plain_input(raw(2**32, 2**32, data=b"")), INVALID, "TENSOR_SHAPE_INVALID"),
    "NaN": Case(plain_input(with_value(np.nan)), INVALID, "NON_FINITE_INPUT", {"input": "x", "count": "1"}),
    "infinity": Case(plain_input(with_value(np.inf)), INVALID, "NON_FINITE_INPUT", {"input": "x", "count": "1"}),
    "empty batch": Case(plain_input(normal(0, 4)), INVALID, "EMPTY_BATCH"),
    "batch lengths": Case(
        request("product", {"x": normal(2, 5), "y": normal(3, 5)}),
        INVALID,
        "BATCH_MISMATCH",
        {"inputs": "x, y", "lengths": "2, 3"},
    ),
    "too many instances": Case(
        plain_input(normal(17, 4)), EXHAUSTED, "TOO_MANY_INSTANCES", {"count": "17", "limit": "16"}
    ),
    "unknown fixed input": Case(plain(fixed_inputs=["z"]), INVALID, "UNKNOWN_INPUT", {"input": "z"}),
    "everything fixed": Case(plain(fixed_inputs=["x"]), PRECONDITION, "NO_DIFFERENTIABLE_INPUT", {"inputs": "x"}),
    "only integers": Case(
        request("tokens", {"ids": np.zeros((1, 5), np.int64)}, targets=[element(0)]),
        PRECONDITION,
        "NO_DIFFERENTIABLE_INPUT",
        {"inputs": "ids", "layers": "embedding"},
    ),
}

TARGETS = {
    "index too high": Case(
        plain(targets=[element(3)]), INVALID, "TARGET_OUT_OF_RANGE", {"output": "y", "index": "3", "size": "3"}
    ),
    "negative index": Case(plain(targets=[element(-1)]), INVALID, "TARGET_OUT_OF_RANGE", {"index": "-1"}),
    "path too long": Case(plain(targets=[element(0, 0)]), INVALID, "TARGET_PATH_LENGTH", {"path": "[0, 0]"}),
    "path too short": Case(plain(targets=[element()]), INVALID, "TARGET_PATH_LENGTH", {"path": "[]"}),
    "unknown label": Case(
        image(targets=[label("eel")]), NOT_FOUND, "UNKNOWN_LABEL", {"label": "eel", "label_count": "4"}
    ),
    "label without labels": Case(plain(targets=[label("ant")]), NOT_FOUND, "UNKNOWN_LABEL", {"label_count": "0"}),
    "top 0": Case(plain(targets=[{"top_k": {"count": 0}}]), INVALID, "TARGET_OUT_OF_RANGE", {"count": "0"}),
    "top -5": Case(plain(targets=[{"top_k": {"count": -5}}]), INVALID, "TARGET_OUT_OF_RANGE", {"count": "-5"}),
    "top of too many": Case(
        plain(targets=[{"top_k": {"count": 4}}]), INVALID, "TARGET_OUT_OF_RANGE", {"count": "4", "class_count": "3"}
    ),
    "top of pixels": Case(
        request("segmentation", {"x": normal(1, 3, 4, 5)}, targets=[{"argmax": {}}]), INVALID, "TARGET_NEEDS_CLASSES"
    ),
    "weights of another shape": Case(
        plain(targets=[{"weights": encode(normal(4))}]),
        INVALID,
        "TARGET_WEIGHTS_MISMATCH",
        {"expected": "[3]", "actual": "[4]"},
    ),
    "weights of integers": Case(
        plain(targets=[{"weights": encode(np.ones(3, np.int64))}]), INVALID, "DTYPE_MISMATCH", {"actual": "int64"}
    ),
    "weights that are NaN": Case(
        plain(targets=[{"weights": encode(np.full(3, np.nan, np.float32))}]), INVALID, "TARGET_WEIGHTS_MISMATCH"
    ),
    "weights beyond float32": Case(
        plain(targets=[{"weights": encode(np.full(3, 1e300))}]), INVALID, "TARGET_WEIGHTS_MISMATCH"
    ),
    **{
        f"reduction of {name}": Case(
            plain(targets=[{name: selection, "reduction": "REDUCTION_MEAN"}]),
            INVALID,
            "REDUCTION_CONFLICT",
            {"selection": name, "reduction": "mean"},
        )
        for name, selection in (
            ("argmax", {}),
            ("top_k", {"count": 2}),
            ("weights", encode(np.ones(3, np.float32))),
        )
    },
    "nothing selected": Case(plain(targets=[{}]), INVALID, "TARGET_REQUIRED"),
    "nothing in an element": Case(plain(targets=[{"element": {}}]), INVALID, "TARGET_REQUIRED"),
    "half a margin": Case(
        plain(targets=[{"margin": {"positive": {"index": {"indices": [0]}}}}]), INVALID, "TARGET_REQUIRED"
    ),
    "unknown output": Case(
        plain(targets=[element(0, output="z")]), INVALID, "UNKNOWN_OUTPUT", {"output": "z", "outputs": "y"}
    ),
    "no output of several": Case(
        request("multi_output", {"x": X}, targets=[element(0)]), INVALID, "OUTPUT_REQUIRED", {"outputs": "y, energy"}
    ),
    "probability of values": Case(
        plain(targets=[element(0, score="SCORE_PROBABILITY")]),
        INVALID,
        "SCORE_NOT_AVAILABLE",
        {"kind": "values", "score": "PROBABILITY"},
    ),
    "logit of values": Case(
        plain(targets=[element(0, score="SCORE_LOGIT")]),
        INVALID,
        "SCORE_NOT_AVAILABLE",
        {"kind": "values", "score": "LOGIT"},
    ),
    "instance that is not there": Case(
        plain(targets=[element(0, instance_index=1)]),
        INVALID,
        "INSTANCE_INDEX_OUT_OF_RANGE",
        {"instance_index": "1", "count": "1"},
    ),
    "instance without a target": Case(
        request("plain", {"x": normal(2, 4)}, targets=[element(0, instance_index=0)]),
        INVALID,
        "INSTANCE_WITHOUT_TARGETS",
        {"instance": "1"},
    ),
}

BASELINES = {
    "pixels without preprocessing": Case(
        plain(baselines=[every(constant={"values": [0.0]}, space="SPACE_PIXEL")]),
        PRECONDITION,
        "NO_PREPROCESSING",
        {"input": "x"},
    ),
    "gray without preprocessing": Case(
        plain(baselines=[every(gray={})]), PRECONDITION, "NO_PREPROCESSING", {"input": "x"}
    ),
    "shape": Case(
        plain(baselines=[every(tensor=encode(normal(5)))]),
        INVALID,
        "BASELINE_SHAPE_MISMATCH",
        {"input": "x", "expected": "[4]", "actual": "[5]"},
    ),
    "batch of another length": Case(
        plain(baselines=[every(tensor=encode(normal(2, 4)))]), INVALID, "BASELINE_SHAPE_MISMATCH", {"actual": "[2, 4]"}
    ),
    "integers": Case(
        plain(baselines=[every(tensor=encode(np.zeros(4, np.int64)))]), INVALID, "DTYPE_MISMATCH", {"actual": "int64"}
    ),
    "NaN": Case(plain(baselines=[every(tensor=encode(with_value(np.nan)))]), INVALID, "BASELINE_NOT_FINITE"),
    "beyond float32": Case(plain(baselines=[every(constant={"values": [1e300]})]), INVALID, "BASELINE_NOT_FINITE"),
    "infinite constant": Case(plain(baselines=[every(constant={"values": [np.inf]})]), INVALID, "BASELINE_NOT_FINITE"),
    "constant without a value": Case(plain(baselines=[every(constant={})]), INVALID, "BASELINE_NOT_FINITE"),
    "channels": Case(
        image(baselines=[every(constant={"values": [0.0, 1.0]})]),
        INVALID,
        "BASELINE_CHANNEL_MISMATCH",
        {"input": "image", "expected": "3", "actual": "2"},
    ),
    "no kind": Case(plain(baselines=[{"every_input": {}}]), INVALID, "BASELINE_REQUIRED"),
    "unknown input": Case(plain(baselines=[{"inputs": {"z": {"zeros": {}}}}]), INVALID, "UNKNOWN_INPUT"),
    "for an input that stays": Case(
        request(
            "multi_input",
            {"image": normal(1, 3, 4, 4), "ids": np.zeros((1, 5), np.int64)},
            targets=[element(0)],
            baselines=[{"inputs": {"ids": {"zeros": {}}}}],
        ),
        INVALID,
        "BASELINE_FOR_FIXED_INPUT",
        {"inputs": "ids", "moving_inputs": "image"},
    ),
    "blurred path without space": Case(
        plain(methods=[{"blur_integrated_gradients": {}}]), PRECONDITION, "NO_SPATIAL_AXES", {"input": "x"}
    ),
    "too many steps within another method": Case(
        plain(methods=[{"smooth_grad": {"base": steps(513)[0]}}]), EXHAUSTED, "STEP_COUNT_EXCEEDED", {"limit": "512"}
    ),
    "blur without space": Case(plain(baselines=[every(blur={"sigma": 1.0})]), PRECONDITION, "NO_SPATIAL_AXES"),
    "blur by nothing": Case(image(baselines=[every(blur={})]), INVALID, "BASELINE_SIGMA_OUT_OF_RANGE"),
    "noise by nothing": Case(
        plain(baselines=[every(gaussian_noise={"std": 0.0})]), INVALID, "BASELINE_SIGMA_OUT_OF_RANGE"
    ),
    "noise without a range": Case(
        plain(baselines=[every(uniform_noise={})]), INVALID, "BASELINE_RANGE_REQUIRED", {"input": "x"}
    ),
    "noise upside down": Case(
        plain(baselines=[every(uniform_noise={"low": 1.0, "high": 1.0})]), INVALID, "BASELINE_RANGE_EMPTY"
    ),
    "noise with one end": Case(
        image(baselines=[every(uniform_noise={"low": 0.0})]), INVALID, "BASELINE_RANGE_REQUIRED", {"input": "image"}
    ),
    "noise up to NaN": Case(
        plain(baselines=[every(uniform_noise={"low": 0.0, "high": np.nan})]), INVALID, "BASELINE_NOT_FINITE"
    ),
    "no draws": Case(
        plain(baselines=[every(gaussian_noise={"std": 1.0, "count": 0})]),
        INVALID,
        "BASELINE_COUNT_OUT_OF_RANGE",
        {"count": "0"},
    ),
    "negative seed": Case(
        plain(baselines=[every(gaussian_noise={"std": 1.0, "seed": -1})]), INVALID, "SEED_OUT_OF_RANGE", {"seed": "-1"}
    ),
    "different numbers of draws": Case(
        request(
            "product",
            {"x": normal(1, 5), "y": normal(1, 5)},
            baselines=[
                {
                    "inputs": {
                        "x": {"gaussian_noise": {"std": 1.0, "count": 2}},
                        "y": {"gaussian_noise": {"std": 1.0, "count": 3}},
                    }
                }
            ],
        ),
        INVALID,
        "BASELINE_COUNT_MISMATCH",
    ),
    "unknown data": Case(
        image(baselines=[every(data={"name": "median"})]),
        NOT_FOUND,
        "UNKNOWN_DATA_BASELINE",
        {"baseline": "median", "baselines": "training_mean"},
    ),
    "instance without a baseline": Case(
        request(
            "plain",
            {"x": normal(2, 4)},
            targets=[element(0)],
            baselines=[{"every_input": {"zeros": {}}, "instance_index": 1}],
        ),
        INVALID,
        "INSTANCE_WITHOUT_BASELINES",
        {"instance": "0"},
    ),
}

METHODS = {
    "no steps": Case(
        plain(methods=steps(0)), INVALID, "STEP_COUNT_OUT_OF_RANGE", {"option": "step_count", "value": "0", "min": "1"}
    ),
    "negative steps": Case(plain(methods=steps(-3)), INVALID, "STEP_COUNT_OUT_OF_RANGE", {"value": "-3"}),
    "steps above the cap": Case(
        plain(methods=steps(513)), EXHAUSTED, "STEP_COUNT_EXCEEDED", {"step_count": "513", "limit": "512"}
    ),
    "absurd steps": Case(
        plain(methods=steps(2**31 - 1, quadrature="QUADRATURE_GAUSS_LEGENDRE")), EXHAUSTED, "STEP_COUNT_EXCEEDED"
    ),
    "adaptive above the cap": Case(
        plain(methods=adaptive(max_step_count=513)), EXHAUSTED, "STEP_COUNT_EXCEEDED", {"step_count": "513"}
    ),
    "above the model's own cap": Case(
        request("capped", {"x": X}, targets=[element(0)], methods=steps(25)),
        EXHAUSTED,
        "STEP_COUNT_EXCEEDED",
        {"limit": "24"},
    ),
    "adaptive below the pilot": Case(
        plain(methods=adaptive(max_step_count=3)), INVALID, "STEP_COUNT_OUT_OF_RANGE", {"option": "max_step_count"}
    ),
    "one point of a trapezoid": Case(
        plain(methods=steps(1, quadrature="QUADRATURE_TRAPEZOID")), INVALID, "STEP_COUNT_OUT_OF_RANGE", {"min": "2"}
    ),
    "adaptive with steps": Case(
        plain(methods=steps(8, quadrature="QUADRATURE_ADAPTIVE")),
        INVALID,
        "QUADRATURE_CONFLICT",
        {"quadrature": "adaptive", "step_count": "8"},
    ),
    "steps with tolerances": Case(
        plain(methods=steps(8, tolerance=0.1, completeness_tolerance=0.1)),
        INVALID,
        "QUADRATURE_CONFLICT",
        {"options": "tolerance, completeness_tolerance", "step_count": "8"},
    ),
    "steps with a cap of its own": Case(
        plain(methods=steps(8, max_step_count=64, quadrature="QUADRATURE_LEFT")), INVALID, "QUADRATURE_CONFLICT"
    ),
    "fixed rule without steps": Case(
        plain(methods=adaptive(quadrature="QUADRATURE_LEFT")), INVALID, "QUADRATURE_CONFLICT", {"quadrature": "left"}
    ),
    "tolerance 0": Case(
        plain(methods=adaptive(tolerance=0.0)), INVALID, "TOLERANCE_OUT_OF_RANGE", {"option": "tolerance"}
    ),
    "tolerance NaN": Case(
        plain(methods=adaptive(completeness_tolerance=np.nan)),
        INVALID,
        "TOLERANCE_OUT_OF_RANGE",
        {"option": "completeness_tolerance"},
    ),
    "no method in a method": Case(plain(methods=[{}]), INVALID, "METHOD_REQUIRED"),
    "priority": Case(plain(priority=11), INVALID, "PRIORITY_OUT_OF_RANGE", {"priority": "11"}),
    "time budget": Case(plain(time_budget={"seconds": -1}), INVALID, "TIME_BUDGET_INVALID"),
    **{
        f"LRP {option} under {rule}": Case(
            plain(methods=[{"lrp": {"rule": f"LRP_RULE_{rule}", option: value}}]),
            INVALID,
            "OPTION_WITHOUT_EFFECT",
            {"method": "Lrp", "option": option, "value": str(value)},
        )
        for rule, option, value in (
            ("UNSPECIFIED", "gamma", 0.25),
            ("EPSILON", "gamma", 0.5),
            ("ALPHA_BETA", "gamma", 0.5),
            ("GAMMA", "alpha", 2.0),
        )
    },
    "XRAI steps of a given base map": Case(
        image(methods=[{"xrai": {"base_map": encode(normal(6, 8)), "step_count": 100}}]),
        INVALID,
        "OPTION_WITHOUT_EFFECT",
        {"method": "Xrai", "option": "step_count", "value": "100"},
    ),
    "layer of Grad-CAM that is not there": Case(
        image(methods=[{"grad_cam": {"layer": "nothing"}}]),
        INVALID,
        "UNKNOWN_LAYER",
        {"layer": "nothing", "layers": ", ".join(IMAGE_LAYERS), "layer_count": str(len(IMAGE_LAYERS))},
    ),
    "layer that is not there": Case(
        image(layers=["nothing"]),
        INVALID,
        "UNKNOWN_LAYER",
        {"layer": "nothing", "layers": ", ".join(IMAGE_LAYERS), "layer_count": str(len(IMAGE_LAYERS))},
    ),
    "layer of Grad-CAM beside layers in the place of inputs": Case(
        image(layers=[IMAGE_LAYERS[0]], methods=[{"grad_cam": {"layer": IMAGE_LAYERS[0]}}]),
        PRECONDITION,
        "NO_GRID_LAYER",
    ),
    "RISE grid over a vector": Case(
        plain(methods=[{"rise": {"grid_size": 2}}]),
        INVALID,
        "OPTION_WITHOUT_EFFECT",
        {"method": "Rise", "option": "grid_size", "value": "2"},
    ),
    "no gradient": Case(
        request("gap", {"x": normal(1, 2, 2)}, targets=[element()]),
        PRECONDITION,
        "NOT_DIFFERENTIABLE",
        {"model": "gap", "gap_count": "2", "gaps": "DequantizeLinear the_way_back; QuantizeLinear the_gap"},
    ),
}


def box(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"name": "r", "box": {"x": x, "y": y, "width": width, "height": height}}


BOOLS = np.ones((6, 8), np.bool_)
REGIONS = {
    "box beyond the right": Case(
        image(regions=[box(4, 0, 5, 2)]), INVALID, "REGION_OUT_OF_BOUNDS", {"region": "r", "input": "image"}
    ),
    "box before the left": Case(image(regions=[box(-1, 0, 2, 2)]), INVALID, "REGION_OUT_OF_BOUNDS"),
    "box below": Case(image(regions=[box(0, 5, 2, 2)]), INVALID, "REGION_OUT_OF_BOUNDS"),
    "empty box": Case(image(regions=[box(0, 0, 0, 2)]), INVALID, "REGION_OUT_OF_BOUNDS"),
    "box on a vector": Case(plain(regions=[box(0, 0, 1, 1)]), INVALID, "REGION_INPUT_REQUIRED", {"region": "r"}),
    "mask of another shape": Case(
        image(regions=[{"name": "r", "mask": encode(BOOLS.T)}]), INVALID, "REGION_OUT_OF_BOUNDS"
    ),
    "mask of numbers": Case(
        image(regions=[{"name": "r", "mask": encode(BOOLS.astype(np.float32))}]), INVALID, "DTYPE_MISMATCH"
    ),
    "region of an unknown input": Case(
        image(regions=[{**box(0, 0, 1, 1), "input": "x"}]), INVALID, "REGION_INPUT_REQUIRED", {"input": "x"}
    ),
    "region of which input": Case(
        request(
            "product",
            {"x": normal(1, 5), "y": normal(1, 5)},
            regions=[{"name": "r", "mask": encode(np.ones(5, np.bool_))}],
        ),
        INVALID,
        "REGION_INPUT_REQUIRED",
    ),
    "region of the input beside a map of a layer": Case(
        request("rectified", {"image": normal(1, 3, 6, 8)}, regions=[box(0, 0, 1, 1)], methods=[{"grad_cam": {}}]),
        INVALID,
        "REGION_NOT_IN_MAP",
        {"region": "r", "input": "image", "method": "grad_cam"},
    ),
    "mask of channels for a map without": Case(
        image(
            regions=[{"name": "r", "mask": encode(np.ones((3, 6, 8), np.bool_))}], methods=[{"xrai": {"step_count": 2}}]
        ),
        INVALID,
        "REGION_NOT_IN_MAP",
        {"region": "r", "method": "xrai"},
    ),
    "region without an area": Case(image(regions=[{"name": "r"}]), INVALID, "REGION_REQUIRED"),
    "region without a name": Case(image(regions=[{"box": {"width": 1, "height": 1}}]), INVALID, "REGION_REQUIRED"),
    "two regions of one name": Case(
        image(regions=[box(0, 0, 1, 1), box(1, 1, 1, 1)]), INVALID, "REGION_NAME_REPEATED", {"region": "r"}
    ),
}

GROUPS = {
    "nothing": Case(
        plain(groups=[{"name": "g", "selectors": [{"target_index": 7}]}]), INVALID, "EMPTY_GROUP", {"group": "g"}
    ),
    "one baseline of a mean": Case(
        plain(
            groups=[{"name": "g", "selectors": [{"baseline_index": 0}]}], baseline_reduction="BASELINE_REDUCTION_MEAN"
        ),
        INVALID,
        "EMPTY_GROUP",
    ),
    "another method": Case(plain(groups=[{"name": "g", "selectors": [{"method_index": 1}]}]), INVALID, "EMPTY_GROUP"),
    "no selector": Case(plain(groups=[{"name": "g"}]), INVALID, "EMPTY_GROUP", {"group": "g"}),
    "different units": Case(
        image(
            targets=[label("ant"), label("ant", score="SCORE_PROBABILITY")],
            groups=[{"name": "g", "selectors": [{}]}],
        ),
        INVALID,
        "INCOMMENSURABLE_GROUP",
        {"group": "g", "units": "logits/OUTPUT/output, logits/PROBABILITY/output"},
    ),
    "named all": Case(plain(groups=[{"name": "all", "selectors": [{}]}]), INVALID, "GROUP_NAME_INVALID"),
    "repeated name": Case(
        plain(groups=[{"name": "g", "selectors": [{}]}] * 2), INVALID, "GROUP_NAME_INVALID", {"group": "g"}
    ),
}

ENUMS = {
    "score": Case(plain(targets=[element(0, score=77)]), INVALID, "ENUM_UNKNOWN", {"field": "score", "value": "77"}),
    "reduction": Case(plain(targets=[element(0, reduction=77)]), INVALID, "ENUM_UNKNOWN", {"field": "reduction"}),
    "quadrature": Case(plain(methods=steps(4, quadrature=77)), INVALID, "ENUM_UNKNOWN", {"field": "quadrature"}),
    "space": Case(
        plain(baselines=[every(zeros={}, space=77)]), INVALID, "ENUM_UNKNOWN", {"field": "space", "value": "77"}
    ),
    "baseline reduction": Case(
        plain(baseline_reduction=77), INVALID, "ENUM_UNKNOWN", {"field": "baseline_reduction", "value": "77"}
    ),
    "view": Case(plain(response_options={"views": [77]}), INVALID, "ENUM_UNKNOWN", {"field": "view"}),
    "no view": Case(plain(response_options={"views": [0]}), INVALID, "ENUM_UNKNOWN", {"field": "view"}),
}

MODELS = {
    "none": Case(pb.ExplainRequest(), INVALID, "MODEL_REQUIRED"),
    "no name": Case(pb.ExplainRequest(model=named("")), INVALID, "MODEL_REQUIRED"),
    "unknown": Case(pb.ExplainRequest(model=named("nope")), NOT_FOUND, "UNKNOWN_MODEL", {"model": "nope"}),
    "unknown version": Case(
        pb.ExplainRequest(model=named("versions", 3)),
        NOT_FOUND,
        "UNKNOWN_VERSION",
        {"model": "versions", "version": "3", "versions": "1, 2, 10, 11"},
    ),
    "version 0": Case(pb.ExplainRequest(model=named("plain", 0)), INVALID, "VERSION_INVALID", {"version": "0"}),
    "cut short": Case(
        pb.ExplainRequest(model=named("truncated")),
        PRECONDITION,
        "MODEL_FAILED",
        {"model": "truncated", "version": "1", "error_reason": "MODEL_FILE_CORRUPT"},
    ),
    "version cut short": Case(
        pb.ExplainRequest(model=named("versions", 11)), PRECONDITION, "MODEL_FAILED", {"version": "11"}
    ),
    "folder without a file": Case(
        pb.ExplainRequest(model=named("no_file")), PRECONDITION, "MODEL_FAILED", {"error_reason": "NO_MODEL_FILE"}
    ),
    "folder without a version": Case(
        pb.ExplainRequest(model=named("no_version")), PRECONDITION, "MODEL_FAILED", {"error_reason": "NO_MODEL_FILE"}
    ),
    "randomized": Case(
        pb.ExplainRequest(model={"randomized": {"model": {"name": "plain"}}}),
        UNIMPLEMENTED,
        "MODEL_SOURCE_UNIMPLEMENTED",
        {"source": "randomized"},
    ),
    "shifted": Case(
        pb.ExplainRequest(model={"shifted": {"model": {"name": "plain"}}}),
        UNIMPLEMENTED,
        "MODEL_SOURCE_UNIMPLEMENTED",
        {"source": "shifted"},
    ),
}

CASES = {
    f"{family}: {name}": case
    for family, cases in (
        ("input", INPUTS),
        ("target", TARGETS),
        ("baseline", BASELINES),
        ("method", METHODS),
        ("region", REGIONS),
        ("group", GROUPS),
        ("enum", ENUMS),
        ("model", MODELS),
    )
    for name, case in cases.items()
}
