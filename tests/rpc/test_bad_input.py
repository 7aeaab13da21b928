"""What bad input gets: a code, a reason and metadata, and a server that goes on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from explainserve.rpc.tensors import encode
from explainserve.settings import Settings
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import tensor_pb2
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.conftest import LIMITS
from rpc.loopback import (
    Loopback,
    adaptive,
    element,
    every,
    label,
    named,
    normal,
    refusal,
    request,
    steps,
    until,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
INTERNAL = grpc.StatusCode.INTERNAL

X = normal(1, 4)
IMAGE = np.zeros((1, 3, 6, 8), np.float32)


@pytest.fixture(autouse=True)
def server_goes_on(stub: ExplainerServiceStub) -> Iterator[None]:
    """After every test a good request is answered."""
    yield
    answer = stub.Explain(request("plain", {"x": X}, targets=[element(0)], methods=steps(4)), timeout=60)
    assert len(answer.attributions) == 1


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
    "logit of probabilities": Case(
        request("probabilities", {"x": X}, targets=[element(0, score="SCORE_LOGIT")]),
        INVALID,
        "SCORE_NOT_AVAILABLE",
        {"kind": "probabilities", "score": "LOGIT"},
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
    "several methods": Case(plain(methods=[*steps(4), *steps(8)]), UNIMPLEMENTED, "SEVERAL_METHODS", {"count": "2"}),
    "priority": Case(plain(priority=11), INVALID, "PRIORITY_OUT_OF_RANGE", {"priority": "11"}),
    "time budget": Case(plain(time_budget={"seconds": -1}), INVALID, "TIME_BUDGET_INVALID"),
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
        {"group": "g", "units": "logits/OUTPUT, logits/PROBABILITY"},
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


@pytest.mark.parametrize("name", CASES)
def test_bad_request_is_refused_with_its_reason(stub: ExplainerServiceStub, name: str) -> None:
    case = CASES[name]

    refused = refusal(lambda: stub.Explain(case.request, timeout=60))

    assert (refused.code, refused.reason) == (case.code, case.reason), refused.message
    assert case.metadata.items() <= refused.metadata.items()
    assert refused.message


KNOWN_BEFOREHAND = ("region", "baseline", "method", "input", "group")


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(KNOWN_BEFOREHAND)])
def test_bad_request_is_refused_before_it_is_computed(service: Loopback, name: str) -> None:
    """Nothing that can be known beforehand costs a row."""
    before = service.metric("explainserve_rows_total")

    refusal(lambda: service.stub.Explain(CASES[name].request, timeout=60))

    assert service.metric("explainserve_rows_total") == before


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith((*KNOWN_BEFOREHAND, "model"))])
def test_estimate_refuses_what_explain_refuses(stub: ExplainerServiceStub, name: str) -> None:
    case = CASES[name]

    refused = refusal(lambda: stub.EstimateCost(pb.EstimateCostRequest(explain=case.request), timeout=60))

    assert (refused.code, refused.reason) == (case.code, case.reason)


def test_model_that_raises_fails_its_own_request(stub: ExplainerServiceStub) -> None:
    """An index beyond the embedding passes every check and fails inside the model."""
    bad = request(
        "multi_input",
        {"image": normal(1, 3, 4, 4), "ids": np.full((1, 5), 10**6, np.int64)},
        targets=[element(0)],
    )

    refused = refusal(lambda: stub.Explain(bad, timeout=60))

    assert (refused.code, refused.reason) == (INTERNAL, "MODEL_RAISED")


def test_request_above_the_message_limit(service: Loopback) -> None:
    large = plain_input(normal(3 * 2**16, 4))
    counted = {"method": "Explain", "code": "RESOURCE_EXHAUSTED"}
    before = service.metric("explainserve_requests_total", **counted)

    refused = refusal(lambda: service.stub.Explain(large, timeout=60, metadata=[("x-request-id", "too-large")]))

    assert (refused.code, refused.reason) == (EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert refused.metadata == {"size": str(large.ByteSize()), "limit": str(2 * 1024 * 1024)}
    assert refused.trailing["x-request-id"] == "too-large"
    until(lambda: service.metric("explainserve_requests_total", **counted) == before + 1)


def test_request_far_above_the_message_limit_is_not_read(stub: ExplainerServiceStub) -> None:
    refused = refusal(lambda: stub.Explain(plain_input(normal(3 * 2**18, 4)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "")


PART = {"name": "p", "selectors": [{}] * 50}
PARTS = {
    "targets": {"targets": [element(0)] * 101},
    "baselines": {"baselines": [every(zeros={})] * 101},
    "regions": {"regions": [{"name": "p"}] * 101},
    "groups": {"groups": [{"name": "p"}] * 101},
    "selectors": {"groups": [PART, PART, {"name": "p", "selectors": [{}]}]},
}


@pytest.fixture(scope="module")
def few_parts(folder: Path) -> Iterator[Loopback]:
    loopback = Loopback(Settings(models=folder, **{**LIMITS, "max_request_parts": 100}))
    yield loopback
    loopback.stop()


@pytest.mark.parametrize("part", PARTS)
def test_too_many_parts_are_refused_before_one_is_looked_at(few_parts: Loopback, part: str) -> None:
    """Not even the missing input is noticed."""
    refused = refusal(lambda: few_parts.stub.Explain(request("plain", {}, **PARTS[part]), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "TOO_MANY_PARTS")
    assert refused.metadata == {"part": part, "count": "101", "limit": "100"}


def noisy(count: int, **fields: Any) -> pb.ExplainRequest:
    return image(baselines=[every(uniform_noise={"count": count})], **fields)


def test_reply_above_the_message_limit_is_refused_before_it_is_computed(service: Loopback) -> None:
    before = service.metric("explainserve_rows_total", model="image")

    refused = refusal(lambda: service.stub.Explain(noisy(1000, methods=steps(1)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REPLY_TOO_LARGE")
    assert int(refused.metadata["reply_bytes"]) > int(refused.metadata["limit"]) == 2 * 1024 * 1024
    assert "ExplainStream" in refused.message
    assert service.metric("explainserve_rows_total", model="image") == before


def test_pairs_count_towards_the_reply(service: Loopback) -> None:
    """Maps leave everything out; 150 of them have 11175 pairs, each in two views."""
    before = service.metric("explainserve_rows_total", model="image")
    groups = [{"name": f"g{k}", "selectors": [{}], "pairwise": True} for k in range(2)]
    left_out = {"omit_tensors": True, "omit_statistics": True, "omit_score_path": True}
    many = noisy(150, methods=steps(1), groups=groups, response_options=left_out)

    refused = refusal(lambda: service.stub.Explain(many, timeout=60))
    alone = pb.ExplainRequest()
    alone.CopyFrom(many)
    alone.ClearField("groups")

    assert (refused.code, refused.reason) == (EXHAUSTED, "REPLY_TOO_LARGE")
    assert service.metric("explainserve_rows_total", model="image") == before
    assert len(service.stub.Explain(alone, timeout=60).attributions) == 150


def test_reply_that_is_larger_than_estimated_is_refused_with_its_size(
    service: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explainserve.rpc.responses.reply_bytes", lambda *_: 0)
    counted = {"method": "Explain", "code": "RESOURCE_EXHAUSTED"}
    before = service.metric("explainserve_requests_total", **counted)

    refused = refusal(lambda: service.stub.Explain(noisy(1000, methods=steps(1)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REPLY_TOO_LARGE")
    assert int(refused.metadata["reply_bytes"]) > int(refused.metadata["limit"]) == 2 * 1024 * 1024
    until(lambda: service.metric("explainserve_requests_total", **counted) == before + 1)


def test_too_many_rows_are_refused_before_they_are_computed(service: Loopback) -> None:
    before = service.metric("explainserve_rows_total", model="image")

    refused = refusal(lambda: service.stub.Explain(noisy(100, methods=steps(512)), timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REQUEST_ROWS_EXCEEDED")
    assert int(refused.metadata["rows"]) >= 51_200
    assert refused.metadata["limit"] == "20000"
    assert service.metric("explainserve_rows_total", model="image") == before


def test_memory_of_one_request_is_bounded(stub: ExplainerServiceStub) -> None:
    """A small request can ask for baselines and maps of many times its size, even where the reply leaves them out."""
    pixels = np.zeros((4, 3, 64, 64), np.float32)
    greedy = request(
        "two-digits",
        {"image": pixels},
        baselines=[every(uniform_noise={"count": 1024})],
        methods=steps(1),
        baseline_reduction="BASELINE_REDUCTION_MEAN",
        response_options={"omit_tensors": True},
    )

    refused = refusal(lambda: stub.Explain(greedy, timeout=60))

    assert (refused.code, refused.reason) == (EXHAUSTED, "REQUEST_BYTES_EXCEEDED")
    assert refused.metadata["bytes"] == str(4 * 1024 * 2 * pixels[0].nbytes)


def test_request_that_the_queue_can_never_hold_is_no_matter_of_trying_again(serve: Callable[..., Loopback]) -> None:
    small = serve(max_waiting_rows=40)
    large = plain(methods=steps(39))

    refused = refusal(lambda: small.stub.Explain(large, timeout=60))
    expected = small.stub.EstimateCost(pb.EstimateCostRequest(explain=large), timeout=60)

    assert (refused.code, refused.reason) == (EXHAUSTED, "REQUEST_ROWS_EXCEEDED")
    assert refused.metadata == {"rows": "41", "limit": "40"}
    assert (expected.max_row_count, expected.row_limit) == (41, 40)
    assert small.stub.Explain(plain(methods=steps(38)), timeout=60).attributions


def test_full_queue_refuses_at_once_and_never_those_it_admitted(serve: Callable[..., Loopback]) -> None:
    """Rounds of one request come and go; its place is kept for all of them until it ends."""
    small = serve(max_waiting_rows=522)
    strict = adaptive(tolerance=1e-7, completeness_tolerance=1e-7, max_step_count=512)
    first = small.stub.Explain.future(request("slow", {"x": X}, targets=[element(0)], methods=strict), timeout=60)
    until(lambda: small.metric("explainserve_rows_total", model="slow", kind="gradient") > 0)

    refused = refusal(lambda: small.stub.Explain(plain(methods=steps(512)), timeout=60))
    predicted = small.stub.Predict(pb.PredictRequest(model=named("plain"), inputs={"x": encode(X)}), timeout=60)

    assert (refused.code, refused.reason) == (EXHAUSTED, "QUEUE_FULL")
    assert refused.metadata.items() >= {"rows": "514", "limit": "522"}.items()
    assert predicted.predictions
    assert first.result().attributions[0].step_count == 512
    assert small.stub.Explain(plain(methods=steps(512)), timeout=60).attributions


def test_bytes_that_are_no_message(service: Loopback) -> None:
    send = service.channel.unary_unary("/explainserve.v1.ExplainerService/Explain")

    refused = refusal(lambda: send(b"\xff\xfe not protobuf", timeout=60))

    assert (refused.code, refused.reason) == (INVALID, "MESSAGE_MALFORMED")
    assert service.metric("explainserve_requests_total", method="Explain", code="INVALID_ARGUMENT") > 0


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(range(256)) * 64, b"PRI * HT"])
def test_garbage_on_the_port(service: Loopback, garbage: bytes) -> None:
    """The connection may be closed on us; the server may not."""
    with socket.create_connection(("127.0.0.1", service.server.port), timeout=10) as connection, suppress(OSError):
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)

    assert service.stub.ListModels(pb.ListModelsRequest(), timeout=60).models


def test_unknown_method_of_a_known_service(service: Loopback) -> None:
    send = service.channel.unary_unary("/explainserve.v1.ExplainerService/Predetermine")

    assert refusal(lambda: send(b"", timeout=60)).code is UNIMPLEMENTED


ABSURD = {
    "long": "n" * 60_000,
    "wide": "\N{SNOWMAN}" * 20_000,
    "wider": "\N{PILE OF POO}" * 15_000,
    "control": "\x00\x01\r\n" * 10_000,
}


@pytest.mark.parametrize("name", ABSURD)
def test_details_stay_small_whatever_is_named(stub: ExplainerServiceStub, name: str) -> None:
    """Trailing metadata above 8 KiB would reach the client as RESOURCE_EXHAUSTED."""
    text = ABSURD[name]
    cases = {
        "UNKNOWN_MODEL": pb.ExplainRequest(model=named(text)),
        "UNKNOWN_INPUT": request("plain", {text: X}),
        "UNKNOWN_LABEL": image(targets=[label(text)]),
        "UNKNOWN_OUTPUT": plain(targets=[element(0, output=text)]),
        "REGION_OUT_OF_BOUNDS": image(regions=[{**box(0, 0, 99, 99), "name": text}]),
        "EMPTY_GROUP": plain(groups=[{"name": text}]),
    }
    for reason, bad in cases.items():
        refused = refusal(lambda bad=bad: stub.Explain(bad, timeout=60))  # type: ignore[misc]

        assert refused.reason == reason
        assert len(refused.trailing["grpc-status-details-bin"]) <= 4096
