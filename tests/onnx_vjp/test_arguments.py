"""A mistake of the caller is a TypeError that names the argument, and is never told as one of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
from onnx import helper

from explainserve.onnx_vjp import cut, find_gaps, input_gradient, layers, standard
from explainserve.onnx_vjp.malformed import malformed_as_value_error
from onnx_graphs import model, node

TWICE = model([node("Relu", ["x"], ["emb"]), node("Neg", ["emb"], ["y"])], [("x", [1, 3])], [("y", [1, 3])])
GRADIENTS: tuple[Callable[..., Any], ...] = (input_gradient, find_gaps)
WRONG: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "lone wrt": ("emb", "y", {}, r"^wrt must be a sequence of tensor names, such as \['x'\], not str$"),
    "no wrt": (None, "y", {}, "^wrt must be a sequence of tensor names, .*not NoneType$"),
    "lists of names": ([["emb"]], "y", {}, "^every name in wrt must be a str, not list$"),
    "positions": ([0], "y", {}, "^every name in wrt must be a str, not int$"),
    "no of": (["x"], None, {}, "^of must be a sequence of tensor names, .*not NoneType$"),
    "name of rules": (["x"], "y", {"rules": "guided_backpropagation"}, "^rules must be a Table, .*not str$"),
    "plain rules": (["x"], "y", {"rules": dict(standard())}, "^rules must be a Table, .*not dict$"),
    "list of weights": (["x"], "y", {"weights": []}, "^weights must be a mapping .*not list$"),
}


@pytest.mark.parametrize("function", GRADIENTS)
@pytest.mark.parametrize(("wrt", "of", "more", "message"), WRONG.values(), ids=WRONG)
def test_arguments_of_another_type_are_named(
    function: Callable[..., Any], wrt: Any, of: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        function(TWICE, wrt, of, **more)


@pytest.mark.parametrize("function", GRADIENTS)
def test_missing_arguments_are_what_python_says_of_them(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'wrt' and 'of'"):
        function(TWICE)


@pytest.mark.parametrize("call", [lambda m: input_gradient(m, ["x"], "y"), lambda m: cut(m, ["emb"]), layers])
def test_a_path_is_no_model(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"^model must be an onnx\.ModelProto, as onnx\.load returns it, not str$"):
        call("model.onnx")


def test_a_lone_name_is_no_sequence_of_tensors_to_cut() -> None:
    with pytest.raises(TypeError, match=r"^tensors must be a sequence of tensor names"):
        cut(TWICE, "emb")


def test_what_may_be_a_bug_is_not_blamed_on_the_graph() -> None:
    message = r"cannot be read \(AttributeError: no such thing\).* this is a bug$"
    with pytest.raises(ValueError, match=message) as caught, malformed_as_value_error():
        raise AttributeError("no such thing")
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_graph_that_trips_the_reader_is_still_a_value_error() -> None:
    """Here by a constant that is nobody's."""
    proto = onnx.ModelProto()
    proto.CopyFrom(TWICE)
    proto.graph.node.append(helper.make_node("Constant", [], [], value=onnx.TensorProto()))
    with pytest.raises(ValueError, match=r"the graph cannot be read \(IndexError: "):
        input_gradient(proto, ["x"], "y")


@pytest.mark.parametrize("listed", [True, False])
def test_a_name_that_is_no_text_is_a_fault_of_the_graph(listed: bool) -> None:
    """Protobuf gives it as bytes."""
    proto = onnx.ModelProto.FromString(TWICE.SerializeToString().replace(b"\x01y", b"\x01\xba"))
    name = proto.graph.output[0].name
    with pytest.raises(ValueError, match=r"^of holds b'\\xba', which is no text$"):
        input_gradient(proto, ["x"], [name] if listed else name)
