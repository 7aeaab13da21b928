"""Models whose outputs are not classes, built by hand, each with its closed form in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rpc.loopback import Array

FEATURES, HIDDEN, KINDS = 4, 5, 3
CHANNELS, CLASSES, HEIGHT, WIDTH = 3, 2, 4, 5
BOXES, OBJECTS = 6, 3
IMAGE = (3, 2, 2)

Extents = Sequence[int | str]
_RANDOM = np.random.default_rng(11)
WEIGHTS: dict[str, Array] = {
    name: (_RANDOM.standard_normal(shape) / 2).astype(np.float32)
    for name, shape in {
        "trunk": (FEATURES, HIDDEN),
        "price": (HIDDEN, 1),
        "kinds": (HIDDEN, KINDS),
        "kernel": (CLASSES, CHANNELS, 1, 1),
        "corners": (12, BOXES * 4),
        "objects": (12, OBJECTS * BOXES),
    }.items()
}


def write_models(root: Path) -> Path:
    """Writes every model below `root` and returns it."""
    _regressions(root)
    _two_heads(root)
    _segmentation(root)
    for name, rows in {"detector": "batch", "detector-of-one": 1}.items():
        write_detector(root, name, rows)
    write_detector(root, "suppressed", outputs=("selected", "kept"))
    return root


def price(x: Array) -> float:
    """`regression` and `regression-column` of one instance."""
    return float((np.tanh(x.astype(np.float64) @ WEIGHTS["trunk"]) @ WEIGHTS["price"])[0])


def head_gradient(x: Array, head: str, position: int) -> Array:
    """Gradient of an element of `two-heads`, or of the price, by one instance."""
    hidden = np.tanh(x.astype(np.float64) @ WEIGHTS["trunk"])
    return np.asarray(WEIGHTS["trunk"] @ ((1 - hidden**2) * WEIGHTS[head][:, position]))


def pixels(x: Array) -> Array:
    """`segmentation` of one instance: (classes, height, width)."""
    kernel = WEIGHTS["kernel"][:, :, 0, 0].astype(np.float64)
    return np.asarray(np.tanh(np.einsum("ck,khw->chw", kernel, x)))


def pixels_gradient(x: Array, weights: Array) -> Array:
    """Gradient of the weighted sum of the pixels by one instance."""
    kernel = WEIGHTS["kernel"][:, :, 0, 0].astype(np.float64)
    return np.asarray(np.einsum("ck,chw->khw", kernel, weights * (1 - pixels(x) ** 2)))


def box_score(x: Array, kind: int, box: int) -> float:
    """Score of a class of a box of `detector`, before suppression."""
    return float(1 / (1 + np.exp(-(x.reshape(-1).astype(np.float64) @ _object(kind, box)))))


def box_score_gradient(x: Array, kind: int, box: int) -> Array:
    """Its gradient by one instance."""
    score = box_score(x, kind, box)
    return np.asarray(score * (1 - score) * _object(kind, box).reshape(IMAGE))


def corner_gradient(box: int, corner: int) -> Array:
    """Gradient of a coordinate of a box of `detector`, which is linear."""
    return np.asarray(WEIGHTS["corners"][:, box * 4 + corner].reshape(IMAGE))


def _object(kind: int, box: int) -> Array:
    return WEIGHTS["objects"][:, kind * BOXES + box].astype(np.float64)


def _regressions(root: Path) -> None:
    """One number for each instance: [batch], and [batch, 1]."""
    trunk = [
        helper.make_node("MatMul", ["x", "trunk"], ["z"]),
        helper.make_node("Tanh", ["z"], ["h"]),
    ]
    column = helper.make_node("MatMul", ["h", "price"], ["y"])
    weights = {name: WEIGHTS[name] for name in ("trunk", "price")}
    x: dict[str, Extents] = {"x": ["batch", FEATURES]}
    _write(root, "regression-column", [*trunk, column], x, {"y": ["batch", 1]}, weights)
    flat = [
        helper.make_node("MatMul", ["h", "price"], ["column"]),
        helper.make_node("Squeeze", ["column", "last"], ["y"]),
    ]
    _write(root, "regression", [*trunk, *flat], x, {"y": ["batch"]}, weights | {"last": np.array([1])})


def _two_heads(root: Path) -> None:
    """A price and logits of kinds, of one trunk."""
    nodes = [
        helper.make_node("MatMul", ["x", "trunk"], ["z"]),
        helper.make_node("Tanh", ["z"], ["h"]),
        helper.make_node("MatMul", ["h", "price_weights"], ["price"]),
        helper.make_node("MatMul", ["h", "kinds_weights"], ["kinds"]),
    ]
    weights = {"trunk": WEIGHTS["trunk"], "price_weights": WEIGHTS["price"], "kinds_weights": WEIGHTS["kinds"]}
    toml = '[[outputs]]\nname = "kinds"\nkind = "logits"\nlabels = ["flat", "house", "castle"]\n'
    outputs: dict[str, Extents] = {"price": ["batch", 1], "kinds": ["batch", KINDS]}
    _write(root, "two-heads", nodes, {"x": ["batch", FEATURES]}, outputs, weights, toml)


def _segmentation(root: Path) -> None:
    """Each pixel by itself."""
    nodes = [helper.make_node("Conv", ["x", "kernel"], ["c"]), helper.make_node("Tanh", ["c"], ["y"])]
    x: dict[str, Extents] = {"x": ["batch", CHANNELS, HEIGHT, WIDTH]}
    y: dict[str, Extents] = {"y": ["batch", CLASSES, HEIGHT, WIDTH]}
    toml = '[[inputs]]\nname = "x"\nlayout = "NCHW"\n'
    _write(root, "segmentation", nodes, x, y, {"kernel": WEIGHTS["kernel"]}, toml)


def write_detector(
    root: Path,
    name: str,
    rows: int | str = "batch",
    outputs: Sequence[str] = ("boxes", "scores", "selected", "kept", "count"),
) -> None:
    """Boxes and their scores before suppression, and what is behind it: positions, scores and their number."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "corner_weights"], ["b"]),
        helper.make_node("Reshape", ["b", "boxes_shape"], ["boxes"]),
        helper.make_node("MatMul", ["flat", "object_weights"], ["l"]),
        helper.make_node("Sigmoid", ["l"], ["p"]),
        helper.make_node("Reshape", ["p", "scores_shape"], ["scores"]),
        helper.make_node(
            "NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["selected"], name="suppression"
        ),
        helper.make_node("GatherND", ["scores", "selected"], ["kept"]),
        helper.make_node("Shape", ["kept"], ["kept_shape"]),
        helper.make_node("Cast", ["kept_shape"], ["count"], to=TensorProto.FLOAT),
    ]
    weights = {
        "corner_weights": WEIGHTS["corners"],
        "object_weights": WEIGHTS["objects"],
        "boxes_shape": np.array([0, BOXES, 4]),
        "scores_shape": np.array([0, OBJECTS, BOXES]),
        "most": np.array([2]),
        "overlap": np.array([0.5], np.float32),
        "least": np.array([0.2], np.float32),
    }
    extents: dict[str, Extents] = {
        "boxes": [rows, BOXES, 4],
        "scores": [rows, OBJECTS, BOXES],
        "selected": ["found", 3],
        "kept": ["found"],
        "count": [1],
    }
    chosen = {own: extents[own] for own in outputs}
    _write(root, name, nodes, {"image": [rows, *IMAGE]}, chosen, weights)


def _write(
    root: Path,
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Extents],
    outputs: Mapping[str, Extents],
    weights: Mapping[str, Array],
    toml: str = "",
) -> None:
    graph = helper.make_graph(
        list(nodes),
        name,
        [helper.make_tensor_value_info(own, TensorProto.FLOAT, shape) for own, shape in inputs.items()],
        [helper.make_tensor_value_info(own, _element_type(own), shape) for own, shape in outputs.items()],
        [numpy_helper.from_array(value, own) for own, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = root / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    if toml:
        (root / name / "model.toml").write_text(toml, encoding="utf-8")


def _element_type(output: str) -> int:
    return TensorProto.INT64 if output == "selected" else TensorProto.FLOAT
