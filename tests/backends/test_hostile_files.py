"""Files that break the rules, one rule each: refused by name, before anything native works on them where it can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import fuzz
from explainserve.backends import LoadOptions, onnx_file, onnx_runtime
from explainserve.backends.onnx_weights import Weights
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig
from hostile_graphs import circular, doubled
from onnx_graphs import linear, model, node, save

X, Y = [("x", [1, 3])], [("y", [1, 3])]


def weighted(change: str) -> onnx.ModelProto:
    proto = linear(np.ones((3, 2), np.float32))
    tensor = proto.graph.initializer[0]
    match change:
        case "negative":
            tensor.dims[0] = -3
        case "short":
            tensor.raw_data = tensor.raw_data[:-1]
        case "overflow":
            tensor.dims[:] = [2**33, 2**33]
        case "untyped":
            tensor.data_type = TensorProto.UNDEFINED
    return proto


BROKEN: dict[str, onnx.ModelProto] = {
    "a circle": model([node("Neg", ["b"], ["a"]), node("Neg", ["a"], ["b"]), node("Add", ["x", "a"], ["y"])], X, Y),
    "an input from nowhere": model([node("Add", ["x", "nothing"], ["y"])], X, Y),
    "a name twice": model([node("Neg", ["x"], ["y"]), node("Exp", ["x"], ["y"])], X, Y),
    "no such operator": model([node("Negate", ["x"], ["y"])], X, Y),
    "an attribute of another type": model([node("Softmax", ["x"], ["y"], axis="last")], X, Y),
    "too many inputs": model([node("Neg", ["x", "x"], ["y"])], X, Y),
    "a function in a circle": circular(),
    "a negative extent": weighted("negative"),
    "fewer bytes than elements": weighted("short"),
    "extents beyond any memory": weighted("overflow"),
    "no element type": weighted("untyped"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_graph_that_breaks_a_rule_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused) as caught:
        onnx_runtime.load(save(BROKEN[name], tmp_path), ModelConfig(), LoadOptions(thread_count=1))

    assert caught.value.reason in ("MODEL_INVALID", "MODEL_NOT_RUNNABLE")


def test_a_refusal_says_what_is_wrong_with_which_node(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"input .nothing. of node: .*Add.* is not output"):
        onnx_runtime.load(save(BROKEN["an input from nowhere"], tmp_path), ModelConfig(), LoadOptions(thread_count=1))


def test_a_refusal_quotes_no_place_in_the_sources_of_the_runtime(tmp_path: Path) -> None:
    grid = [node("GridSample", ["x", "grid"], ["y"], mode="cu")]
    proto = model(grid, [("x", [1, 1, 2, 2])], [("y", [1, 1, 1, 1])], {"grid": np.zeros((1, 1, 1, 2), np.float32)})

    with pytest.raises(ModelRefused, match=r"mode .cu. not supported") as caught:
        onnx_runtime.load(save(proto, tmp_path), ModelConfig(), LoadOptions(thread_count=1))

    assert "grid_sample" not in caught.value.message
    assert "onnxruntime::" not in caught.value.message


def test_functions_that_multiply_are_counted_and_not_written_out(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused) as caught:
        onnx_file.read(save(doubled(60), tmp_path), Weights())

    assert caught.value.reason == "MODEL_TOO_COMPLEX"
    assert int(caught.value.metadata["node_count"]) > 2**60


def test_whatever_is_changed_in_a_file_it_loads_or_is_refused() -> None:
    """The first cases of `fuzz.py`, which goes on for as long as one likes."""
    outcomes = {reason for _, reason, _ in fuzz.load_outcomes(range(150), fuzz.networks())}

    assert not fuzz.bugs("load", outcomes)
    assert {"", "MODEL_INVALID", "MODEL_FILE_CORRUPT"} <= outcomes
