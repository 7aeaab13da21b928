"""Tiny models whose answers are known, in every format that is served.

Those with a closed form are written down three times: as a formula in numpy, as a torch module, and as an ONNX graph
built by hand, so that tests of the ONNX backend need no torch. `write_model` puts any of them into a model folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx
    import torch

Array = NDArray[Any]
Inputs = Mapping[str, Array]

FORMATS = ("onnx", "pt2", "pt")
_OPSET = 18


@dataclass(frozen=True)
class Port:
    """An input or output: name, shape of one instance, element type, and what model.toml says beside these."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    extra: str = ""


@dataclass(frozen=True, eq=False)
class ModelCase:
    """One model.

    Attributes:
        module: makes the torch module.
        graph: makes the nodes and weights of the ONNX graph; None where torch exports it.
        value: closed form of the first output of one instance, float64, or None.
        gradient: closed form of the vector-Jacobian product of the first output: (instance, cotangent) to one array per
            floating-point input, or None.
        draw: random instance; standard normal and ids below 7 unless stated.
        traced: torch exports the ONNX graph from a trace: in milliseconds, where the newer exporter takes a second.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    module: Callable[[], torch.nn.Module]
    graph: Callable[[], tuple[list[onnx.NodeProto], dict[str, Array]]] | None = None
    value: Callable[[Inputs], Array] | None = None
    gradient: Callable[[Inputs, Array], dict[str, Array]] | None = None
    static_batch: bool = False
    differentiable: bool = True
    rows_independent: bool = True
    traced: bool = False

    def instance(self, seed: int = 0) -> dict[str, Array]:
        """A random instance, without the batch axis."""
        random = np.random.default_rng(seed)
        return {port.name: _draw(port, random) for port in self.inputs}

    @property
    def model_toml(self) -> str:
        """The configuration in its simplest form."""
        batch = 1 if self.static_batch else '"batch"'
        tables = [("inputs", port) for port in self.inputs] + [("outputs", port) for port in self.outputs]
        return "\n".join(
            f'[[{kind}]]\nname = "{p.name}"\ndtype = "{p.dtype}"\n'
            f"shape = [{', '.join(str(n) for n in (batch, *p.shape))}]\n{p.extra}\n"
            for kind, p in tables
        )


def _draw(port: Port, random: np.random.Generator) -> Array:
    if port.dtype == "int64":
        return random.integers(0, 7, port.shape)
    return np.asarray(random.standard_normal(port.shape), port.dtype)


def write_model(case: ModelCase, file_format: str, folder: Path) -> Path:
    """Writes `folder/<name>/1/model.<format>` and `folder/<name>/model.toml`; returns the model file."""
    path = folder / case.name / "1" / f"model.{file_format}"
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / case.name / "model.toml").write_text(case.model_toml, encoding="utf-8")
    _WRITERS[file_format](case, path)
    return path


def _write_onnx(case: ModelCase, path: Path) -> None:
    import onnx

    if case.graph is None:
        _export_onnx(case, path)
        return
    nodes, weights = case.graph()
    batch = 1 if case.static_batch else "batch"
    graph = onnx.helper.make_graph(
        nodes,
        case.name,
        [_value_info(port, batch) for port in case.inputs],
        [_value_info(port, batch) for port in case.outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _value_info(port: Port, batch: int | str) -> onnx.ValueInfoProto:
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    return onnx.helper.make_tensor_value_info(port.name, kind, [batch, *port.shape])


def _export_onnx(case: ModelCase, path: Path) -> None:
    import torch

    inputs, outputs = ([port.name for port in ports] for ports in (case.inputs, case.outputs))
    extents: dict[str, Any] = (
        {"dynamic_axes": {name: {0: "batch"} for name in (*inputs, *outputs)}, "opset_version": _OPSET}
        if case.traced
        else {"dynamic_shapes": _dynamic_shapes(case), "external_data": False}
    )
    torch.onnx.export(
        case.module().eval(),
        _example(case),
        path,
        dynamo=not case.traced,
        verbose=False,
        input_names=inputs,
        output_names=outputs,
        **extents,
    )


def _write_pt2(case: ModelCase, path: Path) -> None:
    import torch

    program = torch.export.export(case.module().eval(), _example(case), dynamic_shapes=_dynamic_shapes(case))
    torch.export.save(program, path)


def _write_torchscript(case: ModelCase, path: Path) -> None:
    import torch

    torch.jit.trace(case.module().eval(), _example(case)).save(str(path))


def _example(case: ModelCase) -> tuple[torch.Tensor, ...]:
    import torch

    rows = [case.instance(seed) for seed in range(1 if case.static_batch else 2)]
    return tuple(torch.from_numpy(np.stack([row[port.name] for row in rows])) for port in case.inputs)


def _dynamic_shapes(case: ModelCase) -> tuple[dict[int, Any], ...] | None:
    import torch

    if case.static_batch:
        return None
    batch = torch.export.Dim("batch", min=1, max=4096)
    return tuple({0: batch} for _ in case.inputs)


_WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "pt": _write_torchscript}


def _module(forward: Callable[..., Any], **weights: Array) -> torch.nn.Module:
    """A module whose buffers are `weights` and whose forward calls `forward(self, ...)`."""
    import torch

    class Closed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in weights.items():
                self.register_buffer(name, torch.from_numpy(value))

    Closed.forward = forward  # type: ignore[method-assign]
    return Closed()


def _weights(*shape: int, seed: int = 11) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@functools.cache
def _node() -> Any:
    import onnx

    return onnx.helper.make_node


_W, _B, _E = _weights(4, 3), _weights(3), _weights(7, 1)
_IMAGE = _weights(48, 2)


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def _logits(x: Inputs) -> Array:
    return x["x"].astype(np.float64) @ _W.astype(np.float64) + _B


def _softmax_gradient(x: Inputs, g: Array) -> dict[str, Array]:
    p = _softmax(_logits(x))
    return {"x": _W.astype(np.float64) @ (p * (g - g @ p))}


def _linear(self: Any, x: Any) -> Any:
    return x @ self.w + self.b


def _linear_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    return [_node()("Gemm", ["x", "w", "b"], ["y"])], {"w": _W, "b": _B}


def _probability_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [_node()("Gemm", ["x", "w", "b"], ["z"]), _node()("Softmax", ["z"], ["y"], axis=1)]
    return nodes, {"w": _W, "b": _B}


def _product_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [_node()("Mul", ["x", "y"], ["p"]), _node()("ReduceSum", ["p", "axes"], ["z"], keepdims=1)]
    return nodes, {"axes": np.array([1], np.int64)}


def _quadratic_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    return [_node()("MatMul", ["x", "w"], ["z"]), _node()("Mul", ["z", "z"], ["y"])], {"w": _W}


def _saturated_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        _node()("Sub", ["one", "x"], ["d"]),
        _node()("Relu", ["d"], ["r"]),
        _node()("Sub", ["one", "r"], ["y"]),
    ]
    return nodes, {"one": np.ones(1, np.float32)}


def _multi_input_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        _node()("Flatten", ["image"], ["flat"], axis=1),
        _node()("MatMul", ["flat", "w"], ["z"]),
        _node()("Gather", ["e", "ids"], ["words"], axis=0),
        _node()("ReduceMean", ["words", "axes"], ["scale"], keepdims=0),
        _node()("Mul", ["z", "scale"], ["y"]),
    ]
    return nodes, {"w": _IMAGE, "e": _E, "axes": np.array([1], np.int64)}


def _multi_output_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        _node()("Gemm", ["x", "w", "b"], ["y"]),
        _node()("Mul", ["x", "x"], ["s"]),
        _node()("ReduceSum", ["s", "axes"], ["energy"], keepdims=0),
    ]
    return nodes, {"w": _W, "b": _B, "axes": np.array([1], np.int64)}


def _mixing_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        _node()("ReduceMean", ["x", "axes"], ["m"], keepdims=1),
        _node()("Sub", ["x", "m"], ["d"]),
        _node()("Mul", ["d", "d"], ["y"]),
    ]
    return nodes, {"axes": np.array([0], np.int64)}


def _step_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    return [_node()("Greater", ["x", "zero"], ["b"]), _node()("Cast", ["b"], ["y"], to=1)], {
        "zero": np.zeros(1, np.float32)
    }


def _root_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    return [_node()("Sqrt", ["x"], ["y"])], {}


def _mixing(self: Any, x: Any) -> Any:
    centered = x - x.mean(0, keepdim=True)
    return centered * centered


def _multi_input(self: Any, image: Any, ids: Any) -> Any:
    return (image.flatten(1) @ self.w) * self.e[ids].mean(1)


def _multi_input_gradient(x: Inputs, g: Array) -> dict[str, Array]:
    scale = _E.astype(np.float64)[x["ids"]].mean()
    return {"image": (_IMAGE.astype(np.float64) @ g * scale).reshape(3, 4, 4)}


def _scalar_input_nodes() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        _node()("Unsqueeze", ["x", "axes"], ["column"]),
        _node()("Mul", ["column", "b"], ["z"]),
        _node()("Mul", ["z", "z"], ["y"]),
    ]
    return nodes, {"b": _B, "axes": np.array([1], np.int64)}


def _conv_module() -> torch.nn.Module:
    """conv, batch norm, ReLU, max pool, conv, ReLU, mean over space, linear."""
    import torch
    from torch import nn

    torch.manual_seed(5)
    norm = nn.BatchNorm2d(6)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    with torch.no_grad():
        for buffer, low in ((norm.running_mean, -0.3), (norm.running_var, 0.6), (norm.weight, 0.5), (norm.bias, -0.2)):
            buffer.uniform_(low, low + 0.8)
    return net.eval()


def _transformer_module() -> torch.nn.Module:
    """One block on six tokens of width eight: attention with two heads, GELU, layer norms, mean, linear."""
    import torch
    from torch import nn

    torch.manual_seed(6)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            self.head = nn.Linear(8, 5)

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(self.norm1(x)).reshape(-1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
            weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1)
            x = x + self.out((weights @ v).transpose(1, 2).reshape(-1, 6, 8))
            x = x + self.mlp(self.norm2(x))
            return self.head(x.mean(1))

    return Block()


_LOGITS = 'kind = "logits"'
_PROBABILITIES = 'kind = "probabilities"'
_X4, _Y3 = (Port("x", (4,)),), (Port("y", (3,)),)

_CASES = (
    ModelCase(
        "linear",
        _X4,
        _Y3,
        lambda: _module(_linear, w=_W, b=_B),
        _linear_nodes,
        _logits,
        lambda x, g: {"x": _W.astype(np.float64) @ g},
    ),
    ModelCase(
        "product",
        (Port("x", (5,)), Port("y", (5,))),
        (Port("z", (1,)),),
        lambda: _module(lambda self, x, y: (x * y).sum(1, keepdim=True)),
        _product_nodes,
        lambda x: np.array([x["x"].astype(np.float64) @ x["y"]]),
        lambda x, g: {"x": x["y"] * g[0], "y": x["x"] * g[0]},
    ),
    ModelCase(
        "quadratic",
        _X4,
        _Y3,
        lambda: _module(lambda self, x: (x @ self.w) ** 2, w=_W),
        _quadratic_nodes,
        lambda x: (x["x"].astype(np.float64) @ _W) ** 2,
        lambda x, g: {"x": _W.astype(np.float64) @ (2 * (x["x"].astype(np.float64) @ _W) * g)},
    ),
    ModelCase(
        "saturated_relu",
        (Port("x", (3,)),),
        _Y3,
        lambda: _module(lambda self, x: 1 - (1 - x).relu()),
        _saturated_nodes,
        lambda x: 1 - np.maximum(1 - x["x"].astype(np.float64), 0),
        lambda x, g: {"x": (x["x"] < 1) * g},
    ),
    ModelCase(
        "classifier",
        _X4,
        (Port("y", (3,), extra=_LOGITS),),
        lambda: _module(_linear, w=_W, b=_B),
        _linear_nodes,
        _logits,
        lambda x, g: {"x": _W.astype(np.float64) @ g},
    ),
    ModelCase(
        "probabilities",
        _X4,
        (Port("y", (3,), extra=_PROBABILITIES),),
        lambda: _module(lambda self, x: _linear(self, x).softmax(1), w=_W, b=_B),
        _probability_nodes,
        lambda x: _softmax(_logits(x)),
        _softmax_gradient,
    ),
    ModelCase(
        "conv", (Port("x", (3, 16, 16), extra='layout = "NCHW"'),), (Port("y", (10,), extra=_LOGITS),), _conv_module
    ),
    ModelCase("transformer", (Port("x", (6, 8)),), (Port("y", (5,), extra=_LOGITS),), _transformer_module),
    ModelCase(
        "multi_input",
        (Port("image", (3, 4, 4)), Port("ids", (5,), "int64")),
        (Port("y", (2,)),),
        lambda: _module(_multi_input, w=_IMAGE, e=_E),
        _multi_input_nodes,
        lambda x: x["image"].reshape(-1).astype(np.float64) @ _IMAGE * _E.astype(np.float64)[x["ids"]].mean(),
        _multi_input_gradient,
    ),
    ModelCase(
        "multi_output",
        _X4,
        (*_Y3, Port("energy", ())),
        lambda: _module(lambda self, x: (_linear(self, x), (x * x).sum(1)), w=_W, b=_B),
        _multi_output_nodes,
        _logits,
        lambda x, g: {"x": _W.astype(np.float64) @ g},
    ),
    ModelCase(
        "scalar_input",
        (Port("x", ()),),
        _Y3,
        lambda: _module(lambda self, x: (x[:, None] * self.b) ** 2, b=_B),
        _scalar_input_nodes,
        lambda x: (x["x"].astype(np.float64) * _B) ** 2,
        lambda x, g: {"x": np.asarray(2 * x["x"] * (_B.astype(np.float64) ** 2) @ g)},
    ),
    ModelCase("batch_mixing", _X4, (Port("y", (4,)),), lambda: _module(_mixing), _mixing_nodes, rows_independent=False),
    ModelCase(
        "static_batch",
        _X4,
        _Y3,
        lambda: _module(_linear, w=_W, b=_B),
        _linear_nodes,
        _logits,
        lambda x, g: {"x": _W.astype(np.float64) @ g},
        static_batch=True,
    ),
    ModelCase(
        "step",
        _X4,
        (Port("y", (4,)),),
        lambda: _module(lambda self, x: (x > 0).float()),
        _step_nodes,
        lambda x: (x["x"] > 0).astype(np.float64),
        differentiable=False,
    ),
    ModelCase(
        "root",
        _X4,
        (Port("y", (4,)),),
        lambda: _module(lambda self, x: x.sqrt()),
        _root_nodes,
    ),
)

MODELS: dict[str, ModelCase] = {case.name: case for case in _CASES}
"""All cases by name. `root` is not a number on negative values."""
