"""The model folder that the tests serve: tiny ONNX models, each with one trait, built by hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models import MODELS, write_model

Array = NDArray[Any]

TWO_DIGITS = Path(__file__).parents[2] / "examples" / "two_digits"

FROM_CASES = ("batch_mixing", "multi_input", "multi_output", "probabilities", "product", "root", "static_batch", "step")
"""Taken from `models.py`."""

MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
LABELS = ("ant", "bee", "cat", "dog")
WEIGHTS = {
    "image": (0.1 * np.random.default_rng(1).standard_normal((3 * 6 * 8, 5))).astype(np.float32),
    "head": np.random.default_rng(2).standard_normal((5, 4)).astype(np.float32),
    "plain": np.random.default_rng(3).standard_normal((4, 3)).astype(np.float32),
    "kernel": np.random.default_rng(4).standard_normal((2, 3, 1, 1)).astype(np.float32),
    "slow": (np.random.default_rng(5).standard_normal((1200, 1200)) * 1.6 / np.sqrt(1200)).astype(np.float32),
}

IMAGE_TOML = f"""
default_target = "cat"
default_baseline = "training_mean"

[[inputs]]
name = "image"
shape = ["batch", 3, 6, 8]
layout = "NCHW"
channel_order = "RGB"
value_range = [0.0, 1.0]
mean = {MEAN.tolist()}
std = {STD.tolist()}

[[outputs]]
name = "logits"
kind = "logits"
shape = ["batch", 4]
labels = {list(LABELS)}

[baselines.training_mean]
files = {{ image = "training_mean.npy" }}
"""

RECTIFIED_LAYERS = {"c": "k", "e": "l", "logits": "v"}
"""The weights of each linear layer of `rectified`."""


def write_folder(root: Path) -> Path:
    """Writes every model below `root` and returns it."""
    for name in FROM_CASES:
        write_model(MODELS[name], "onnx", root)
    _image(root, "image", IMAGE_TOML)
    np.save(root / "image" / "training_mean.npy", np.full((3, 6, 8), 0.25, np.float32))
    _plain(root)
    _rectified(root)
    _words(root)
    _versions(root)
    _unusual(root)
    write_slow(root)
    _refused(root)
    shutil.copytree(TWO_DIGITS / "models" / "two-digits", root / "two-digits")
    return root


def training_mean() -> Array:
    """The data baseline of `image`."""
    return np.full((3, 6, 8), 0.25, np.float32)


def image_logits(image: Array) -> Array:
    """Closed form of `image` for one instance, float64."""
    hidden = np.tanh(image.reshape(-1).astype(np.float64) @ WEIGHTS["image"])
    return np.asarray(hidden @ WEIGHTS["head"])


def _write(
    root: Path,
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, Sequence[int | str]]],
    outputs: dict[str, Sequence[int | str]],
    weights: dict[str, Array],
    toml: str = "",
    version: int = 1,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        name,
        [helper.make_tensor_value_info(key, kind, shape) for key, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in outputs.items()],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = root / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    if toml:
        (root / name / "model.toml").write_text(toml, encoding="utf-8")
    return path


def _image(root: Path, name: str, toml: str) -> None:
    """Labels, preprocessing, a default target and a data baseline."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["z"]),
        helper.make_node("Tanh", ["z"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["logits"]),
    ]
    weights = {"w": WEIGHTS["image"], "v": WEIGHTS["head"]}
    image = {"image": (TensorProto.FLOAT, ["batch", 3, 6, 8])}
    _write(root, name, nodes, image, {"logits": ["batch", 4]}, weights, toml)


def rectified_arrays() -> tuple[dict[str, Array], dict[str, Array]]:
    """The weights of `rectified`, and its patterns by layer."""
    random = np.random.default_rng(6)
    weights = {
        "k": random.standard_normal((6, 3, 3, 3)) / 4,
        "b": random.standard_normal(6) / 4,
        "l": random.standard_normal((5, 6, 3, 3)) / 6,
        "v": random.standard_normal((5, 4)),
    }
    patterns = {layer: random.standard_normal(weights[name].shape) for layer, name in RECTIFIED_LAYERS.items()}
    return {name: value.astype(np.float32) for name, value in weights.items()}, patterns


RECTIFIED_TOML = '[[inputs]]\nname = "image"\nlayout = "NCHW"\n\n[[outputs]]\nname = "logits"\nkind = "logits"\n'


def _rectified(root: Path) -> None:
    """A small network of convolutions and rectifiers, with what every method needs: channels over a grid, a bias, a
    pool, patterns; its layer before the pool has a grid of 3 by 4 cells."""
    weights, patterns = rectified_arrays()
    nodes = [
        helper.make_node("Conv", ["image", "k", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "l"], ["e"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("GlobalAveragePool", ["f"], ["p"]),
        helper.make_node("Flatten", ["p"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["logits"]),
    ]
    image = {"image": (TensorProto.FLOAT, ["batch", 3, 6, 8])}
    path = _write(root, "rectified", nodes, image, {"logits": ["batch", 4]}, weights, RECTIFIED_TOML)
    np.savez(path.with_name("patterns.npz"), **patterns)


def _words(root: Path) -> None:
    """A classifier of token ids of any number: the mean of their embeddings, and two layers."""
    random = np.random.default_rng(8)
    weights = {
        "e": random.standard_normal((7, 4)),
        "w": random.standard_normal((4, 5)),
        "v": random.standard_normal((5, 3)),
    }
    nodes = [
        helper.make_node("Gather", ["e", "ids"], ["embedding"], axis=0),
        helper.make_node("Tanh", ["embedding"], ["bent"]),
        helper.make_node("ReduceMean", ["bent", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["z"]),
        helper.make_node("Tanh", ["z"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["logits"]),
    ]
    arrays = {name: value.astype(np.float32) for name, value in weights.items()} | {"axes": np.array([1], np.int64)}
    ids = {"ids": (TensorProto.INT64, ["batch", "length"])}
    _write(root, "words", nodes, ids, {"logits": ["batch", 3]}, arrays)


def _plain_nodes() -> list[onnx.NodeProto]:
    return [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Tanh", ["z"], ["y"])]


_X4: dict[str, tuple[int, Sequence[int | str]]] = {"x": (TensorProto.FLOAT, ["batch", 4])}
_Y3: dict[str, Sequence[int | str]] = {"y": ["batch", 3]}


def _plain(root: Path) -> None:
    """No model.toml: no preprocessing, no labels, values; and the same with caps and a value range of its own."""
    weights = {"w": WEIGHTS["plain"]}
    _write(root, "plain", _plain_nodes(), _X4, _Y3, weights)
    _write(root, "capped", _plain_nodes(), _X4, _Y3, weights, "[limits]\nmax_step_count = 24\n")
    ranged = '[[inputs]]\nname = "x"\nvalue_range = [-1.0, 1.0]\n'
    _write(root, "ranged", _plain_nodes(), _X4, _Y3, weights, ranged)


def write_plain(root: Path, name: str, scale: float = 1.0, version: int = 1) -> Path:
    """A version of `plain` with its weights scaled, in place of one that is there; its file."""
    shutil.rmtree(root / name / str(version), ignore_errors=True)
    return _write(root, name, _plain_nodes(), _X4, _Y3, {"w": WEIGHTS["plain"] * scale}, version=version)


def _versions(root: Path) -> None:
    """Versions 1, 2 and 10 are served, 11 is cut short."""
    for version in (1, 2, 10, 11):
        path = write_plain(root, "versions", scale=version, version=version)
    path.write_bytes(path.read_bytes()[:-20])


def _unusual(root: Path) -> None:
    """Outputs and inputs of unusual shapes and types."""
    one = [helper.make_node("ReduceSum", ["x", "axes"], ["s"], keepdims=0), helper.make_node("Tanh", ["s"], ["y"])]
    _write(root, "scalar", one, _X4, {"y": ["batch"]}, {"axes": np.array([1], np.int64)})
    pixels = [helper.make_node("Conv", ["x", "k"], ["c"]), helper.make_node("Tanh", ["c"], ["y"])]
    toml = '[[inputs]]\nname = "x"\nlayout = "NCHW"\n'
    shape: dict[str, tuple[int, Sequence[int | str]]] = {"x": (TensorProto.FLOAT, ["batch", 3, 4, 5])}
    _write(root, "segmentation", pixels, shape, {"y": ["batch", 2, 4, 5]}, {"k": WEIGHTS["kernel"]}, toml)
    wide = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    _write(root, "wide", wide, _X4, {"y": ["batch", 2048]}, {"w": np.ones((4, 2048), np.float32)})
    tokens = [
        helper.make_node("Gather", ["e", "ids"], ["embedding"], axis=0),
        helper.make_node("Identity", ["embedding"], ["y"]),
    ]
    table = np.arange(7, dtype=np.float32)
    _write(root, "tokens", tokens, {"ids": (TensorProto.INT64, ["batch", 5])}, {"y": ["batch", 5]}, {"e": table})
    refused = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], name="the_gap"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"], name="the_way_back"),
    ]
    square: dict[str, tuple[int, Sequence[int | str]]] = {"x": (TensorProto.FLOAT, ["batch", 2, 2])}
    _write(root, "gap", refused, square, {"y": ["batch", 2, 2]}, {"scale": np.array(0.5, np.float32)})


def write_slow(root: Path) -> None:
    """`slow`: milliseconds a row, one row at a time: a deep chain of one large matrix that lies in memory once."""
    nodes = [helper.make_node("MatMul", ["x", "e"], ["h0"])]
    for depth in range(20):
        nodes.append(helper.make_node("MatMul", [f"h{depth}", "w"], [f"z{depth}"]))
        nodes.append(helper.make_node("Tanh", [f"z{depth}"], [f"h{depth + 1}"]))
    nodes.append(helper.make_node("MatMul", ["h20", "v"], ["y"]))
    random = np.random.default_rng(6)
    weights = {
        "e": random.standard_normal((4, 1200)).astype(np.float32),
        "w": WEIGHTS["slow"],
        "v": random.standard_normal((1200, 3)).astype(np.float32),
    }
    _write(root, "slow", nodes, _X4, _Y3, weights, "[limits]\nmax_batch_rows = 1\n")


def _refused(root: Path) -> None:
    """What cannot be served."""
    path = _write(root, "truncated", _plain_nodes(), _X4, _Y3, {"w": WEIGHTS["plain"]})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (root / "no_version").mkdir()
    (root / "no_file" / "1").mkdir(parents=True)
