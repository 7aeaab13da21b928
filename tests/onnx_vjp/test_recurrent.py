"""RNN, GRU and LSTM: the cases' oracle against onnxruntime, and small networks of torch against autograd."""

from __future__ import annotations

import copy
import warnings
from io import BytesIO
from typing import Any

import numpy as np
import onnx
import pytest

from explainserve.onnx_vjp import find_gaps, input_gradient
from onnx_vjp.recurrent_cases import recurrent_case, recurrent_cases
from onnx_vjp.vjp_oracle import Case, run

# onnxruntime has no kernel for the layout with rows first, nor for every coupling.
CASES = [case for case in recurrent_cases() if "layout': 1" not in case.name]


def test_the_oracle_computes_what_onnxruntime_does() -> None:
    for case in CASES:
        assert case.function is not None
        expected = case.function(*case.feeds.values())
        for value, actual in zip(expected, run(case.model, case.feeds, case.outputs), strict=True):
            np.testing.assert_allclose(actual, value, 1e-4, 1e-5, err_msg=case.name)


def test_an_unknown_activation_is_a_gap() -> None:
    case: Case = recurrent_case("RNN", activations=["Cosine"])
    (gap,) = find_gaps(case.model, case.wrt, "y0")
    assert gap.operator == "RNN"
    assert "'Cosine'" in gap.reason


def test_a_node_that_needs_no_gradient_stays_as_it_is() -> None:
    case = recurrent_case("LSTM", "b")
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.graph.node.append(onnx.helper.make_node("Exp", ["x"], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    gradient = input_gradient(model, ["x"], "z")
    assert "LSTM" in {node.op_type for node in gradient.model.graph.node}


torch = pytest.importorskip("torch")
nn = torch.nn

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", {"nonlinearity": "relu", "bias": False}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
]


class Tagger(nn.Module):  # type: ignore[misc, unused-ignore]
    """A layer over time with a score per step, and its last hidden state."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(3, 4, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 2)

    def forward(self, x: Any) -> Any:
        y, last = self.layer(x)
        last = last[0] if isinstance(last, tuple) else last
        return self.head(y), last * 2


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=[kind for kind, _ in LAYERS])
def test_a_layer_of_torch_has_the_gradient_of_autograd(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    network = Tagger(kind, options).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer, names = BytesIO(), {"input_names": ["x"], "output_names": ["y", "h"]}
        axes = {"x": {0: "a", 1: "b"}}
        torch.onnx.export(
            network, (torch.randn(4, 4, 3),), buffer, dynamo=False, opset_version=17, dynamic_axes=axes, **names
        )
    gradient = input_gradient(onnx.load_from_string(buffer.getvalue()), ["x"], ["y", "h"])
    for sizes in ((5, 2), (3, 6)):
        x = torch.randn(*sizes, 3)
        wide = x.double().requires_grad_(True)
        outputs = copy.deepcopy(network).double()(wide)
        cotangents = [torch.randn(value.shape) for value in outputs]
        (expected,) = torch.autograd.grad(outputs, wide, [g.double() for g in cotangents])
        seeds = {name: g.numpy() for name, g in zip(gradient.cotangents.values(), cotangents, strict=True)}
        (dx,) = run(gradient.model, {"x": x.numpy(), **seeds}, [gradient.gradients["x"]])
        np.testing.assert_allclose(dx, expected.numpy(), 1e-4, 1e-5)
