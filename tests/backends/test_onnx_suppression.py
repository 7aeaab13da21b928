"""Which outputs lie behind a non-maximum suppression, wherever the graph hides it."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("onnxruntime")

from explainserve.backends.onnx_suppression import leave_out_suppressed
from explainserve.errors import ModelRefused

SUPPRESSION = helper.make_node("NonMaxSuppression", ["boxes", "scores"], ["selected"], name="suppression")
AFTER = helper.make_node("Cast", ["selected"], ["y"], to=TensorProto.FLOAT)


def model(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("scores", "y"), **fields: object) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("boxes", "scores")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return helper.make_model(helper.make_graph(list(nodes), "detector", inputs, values), **fields)


def in_a_branch() -> onnx.ModelProto:
    branch = helper.make_graph(
        [SUPPRESSION, AFTER], "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    return model(helper.make_node("If", ["which"], ["y"], name="branches", then_branch=branch, else_branch=branch))


def in_a_function() -> onnx.ModelProto:
    body = helper.make_function(
        "own", "detect", ["boxes", "scores"], ["y"], [SUPPRESSION, AFTER], [helper.make_opsetid("", 18)]
    )
    call = helper.make_node("detect", ["boxes", "scores"], ["y"], name="call", domain="own")
    return model(call, functions=[body])


def padded() -> onnx.ModelProto:
    """The number of boxes is fixed, which makes none of them the same one."""
    pad = helper.make_node("Pad", ["kept", "amounts"], ["y"])
    return model(SUPPRESSION, helper.make_node("Cast", ["selected"], ["kept"], to=TensorProto.FLOAT), pad)


def counted() -> onnx.ModelProto:
    return model(SUPPRESSION, helper.make_node("Shape", ["selected"], ["y"]))


@pytest.mark.parametrize(
    ("graph", "node"),
    [(in_a_branch, "branches"), (in_a_function, "call"), (padded, "suppression"), (counted, "suppression")],
)
def test_an_output_behind_suppression_is_left_out(graph, node: str) -> None:
    found = graph()
    (left_out,) = leave_out_suppressed(found)

    assert (left_out.name, left_out.node) == ("y", node)
    assert [value.name for value in found.graph.output] == ["scores"]


def test_an_output_beside_suppression_stays() -> None:
    beside = helper.make_node("Relu", ["scores"], ["y"])
    found = model(SUPPRESSION, beside)

    assert leave_out_suppressed(found) == ()
    assert [value.name for value in found.graph.output] == ["scores", "y"]


def test_a_file_whose_every_output_lies_behind_suppression_is_refused() -> None:
    with pytest.raises(ModelRefused) as refused:
        leave_out_suppressed(model(SUPPRESSION, AFTER, outputs=("y",)))
    assert refused.value.reason == "OUTPUT_SUPPRESSED"


def test_an_operator_of_that_name_elsewhere_is_none() -> None:
    other = helper.make_node("NonMaxSuppression", ["boxes", "scores"], ["y"], domain="own")
    assert leave_out_suppressed(model(other)) == ()
