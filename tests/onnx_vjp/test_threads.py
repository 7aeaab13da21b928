"""Sums at places that come many times: threads must not overtake each other."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from explainserve.onnx_vjp import input_gradient
from onnx_vjp.operator_cases import own_cases
from onnx_vjp.vjp_oracle import single

_rng = np.random.default_rng(2)
ROWS = _rng.integers(0, 64, 100_000)


@pytest.mark.parametrize(("operator", "indices"), [("Gather", ROWS), ("GatherND", ROWS[:, None])])
def test_sums_are_exact_with_several_threads(operator: str, indices: np.ndarray) -> None:
    x = np.zeros((64, 8), np.float32)
    case = single(operator, {"x": x, "i": indices}, dynamic=("i",))
    gradient = input_gradient(case.model, ["x"], "y0")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 4
    session = ort.InferenceSession(gradient.model.SerializeToString(), options, ["CPUExecutionProvider"])
    feeds = {"x": x, "i": indices, gradient.cotangent: np.ones((len(indices), 8), np.float32)}
    expected = np.repeat(np.bincount(ROWS, minlength=64)[:, None], 8, axis=1)
    for _ in range(5):
        np.testing.assert_array_equal(session.run([gradient.gradients["x"]], feeds)[0], expected)


@pytest.mark.parametrize("operator", ["GridSample", "RoiAlign", "MaxRoiPool", "DeformConv", "GatherND"])
def test_no_gradient_sums_by_scatter_nd(operator: str) -> None:
    """A lost sum shows only now and then, so that the operator itself must not be there."""
    for case in own_cases():
        if case.node.op_type == operator:
            nodes = input_gradient(case.model, case.wrt, case.outputs).model.graph.node
            reduced = [node.name for node in nodes if node.op_type == "ScatterND" and node.attribute]
            assert not reduced, case.name
