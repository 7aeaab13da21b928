"""A batch of one in a file becomes any batch, whatever the one was baked into."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from explainserve.backends import LoadOptions, onnx_runtime
from explainserve.model_config import ModelConfig
from explainserve.plan import Differentiation, Rows, Segment, Selector
from explainserve.signature import ScoreHead
from onnx_graphs import model, node, save

random = np.random.default_rng(8)


def f32(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def fixed(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int], output: Sequence[int], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    return model(list(nodes), [("x", list(shape))], [("y", list(output))], constants)


def class_token() -> onnx.ModelProto:
    nodes = [node("Concat", ["token", "x"], ["t"], axis=1), node("MatMul", ["t", "w"], ["y"])]
    return fixed(nodes, [1, 4, 6], [1, 5, 3], {"token": f32(1, 1, 6), "w": f32(6, 3)})


def windows() -> onnx.ModelProto:
    """Windows of an image join the batch and leave it again, as in Swin."""
    nodes = [
        node("Reshape", ["x", "split"], ["s"]),
        node("Transpose", ["s"], ["t"], perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", ["t", "join"], ["j"]),
        node("Softmax", ["j"], ["m"], axis=1),
        node("Reshape", ["m", "back"], ["b"]),
        node("ReduceMean", ["b", "axes"], ["y"], keepdims=0),
    ]
    constants = {
        "split": i64(1, 2, 2, 2, 2, 3),
        "join": i64(4, 4, 3),
        "back": i64(1, 2, 2, 2, 2, 3),
        "axes": i64(1, 2),
    }
    return fixed(nodes, [1, 4, 4, 3], [1, 2, 2, 3], constants)


def tokens_first() -> onnx.ModelProto:
    """The batch is the second axis while heads are split off, as in torch's attention."""
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("Reshape", ["t", "heads"], ["h"]),
        node("Transpose", ["h"], ["u"], perm=[1, 0, 2]),
        node("Softmax", ["u"], ["s"], axis=2),
        node("Transpose", ["s"], ["v"], perm=[1, 0, 2]),
        node("Reshape", ["v", "joined"], ["w"]),
        node("Transpose", ["w"], ["y"], perm=[1, 0, 2]),
    ]
    return fixed(nodes, [1, 5, 8], [1, 5, 8], {"heads": i64(5, 2, 4), "joined": i64(5, 1, 8)})


def resized() -> onnx.ModelProto:
    nodes = [helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear", name="resize")]
    return fixed(nodes, [1, 2, 3, 4], [1, 2, 6, 4], {"sizes": i64(1, 2, 6, 4)})


def recurrent() -> onnx.ModelProto:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "w", "r", "", "", "h", "c"], ["", "last"], hidden_size=3, name="lstm"),
        node("Squeeze", ["last", "zero"], ["y"]),
    ]
    constants = {"w": f32(1, 12, 2), "r": f32(1, 12, 3), "h": f32(1, 1, 3), "c": f32(1, 1, 3), "zero": i64(0)}
    return fixed(nodes, [1, 6, 2], [1, 3], constants)


def sampled() -> onnx.ModelProto:
    nodes = [node("GridSample", ["x", "grid"], ["y"], align_corners=1)]
    return fixed(nodes, [1, 2, 5, 5], [1, 2, 3, 3], {"grid": np.clip(f32(1, 3, 3, 2), -1, 1)})


def patches() -> onnx.ModelProto:
    """Parts of a row join the batch, by a target that ONNX's inference does not follow, as in MobileViT."""
    nodes = [
        node("Mod", ["seven", "five"], ["parts"]),
        node("Concat", ["parts", "four", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["p"]),
        node("MatMul", ["p", "w"], ["m"]),
        node("Softmax", ["m"], ["s"], axis=1),
        node("Reshape", ["s", "back"], ["y"]),
    ]
    constants = {"seven": i64(7), "five": i64(5), "four": i64(4), "rest": i64(-1), "back": i64(1, 2, 4, 5)}
    return fixed(nodes, [1, 2, 4, 3], [1, 2, 4, 5], constants | {"w": f32(3, 5)})


CASES: dict[str, Callable[[], onnx.ModelProto]] = {
    case.__name__: case for case in (class_token, patches, windows, tokens_first, resized, sampled)
}


def together_and_alone(
    graph: onnx.ModelProto, folder: Path, share_weights: bool = False
) -> tuple[onnx_runtime.OnnxModel, np.ndarray, np.ndarray]:
    """Gradients of five rows in one batch, and those of a model of the file as it is, one row after the other."""
    loaded = onnx_runtime.load(save(graph, folder), ModelConfig(), LoadOptions(share_weights=share_weights))
    function = Differentiation("y", ScoreHead.IDENTITY, ("x",))
    shape = [axis.size for axis in loaded.signature.inputs[0].instance_axes]
    start, end = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    count = int(np.prod([axis.size for axis in loaded.signature.outputs[0].axes[1:]]))
    alphas, picked = np.linspace(0, 1, 5), Selector(np.array([count - 2, count - 1]), np.array([1, -2], np.float32))
    segments = [
        Segment({"x": start}, {"x": end}, {}, function, np.array([alpha]), np.ones(1), (picked,)) for alpha in alphas
    ]
    together = [found.gradient_sums["x"] for found in loaded.evaluate(Rows(function, tuple(segments)))]
    alone = [loaded.evaluate(Rows(function, (segment,)))[0].gradient_sums["x"] for segment in segments]
    return loaded, np.array(together), np.array(alone)


@pytest.mark.parametrize("name", CASES)
def test_a_baked_batch_becomes_free_and_rows_stay_what_they_are(name: str, tmp_path: Path) -> None:
    graph = CASES[name]()
    loaded, together, alone = together_and_alone(graph, tmp_path)
    assert not loaded.fixed_batch
    assert loaded.signature.inputs[0].axes[0].size is None
    assert np.abs(alone).max() > 0
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)


def test_what_is_tried_and_does_not_run_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx_runtime.load(save(windows(), tmp_path), ModelConfig(), LoadOptions())

    assert capfd.readouterr().err == ""


def test_initial_states_of_one_row_are_repeated(tmp_path: Path) -> None:
    assert not onnx_runtime.load(save(recurrent(), tmp_path), ModelConfig(), LoadOptions()).fixed_batch


def test_rows_that_mix_stay_row_by_row(tmp_path: Path) -> None:
    nodes = [node("Softmax", ["x"], ["s"], axis=0), node("Squeeze", ["s", "zero"], ["q"]), node("Neg", ["q"], ["y"])]
    graph = model(nodes, [("x", [1, 3])], [("y", [3])], {"zero": i64(0)})
    loaded = onnx_runtime.load(save(graph, tmp_path), ModelConfig(), LoadOptions())
    assert loaded.fixed_batch


@pytest.mark.torch
@pytest.mark.parametrize(
    ("dynamo", "share_weights"), [(False, True), pytest.param(True, False, marks=pytest.mark.slow)]
)
def test_a_vision_transformer_exported_with_one_image_takes_many(
    tmp_path: Path, dynamo: bool, share_weights: bool
) -> None:
    torch = pytest.importorskip("torch")

    class Vision(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.patches = torch.nn.Conv2d(3, 16, 4, 4)
            self.token = torch.nn.Parameter(torch.randn(1, 1, 16))
            self.position = torch.nn.Parameter(torch.randn(1, 17, 16))
            self.block = torch.nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
            self.head = torch.nn.Linear(16, 5)

        def forward(self, image: object) -> object:
            patches = self.patches(image).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.position
            return self.head(self.block(tokens)[:, 0])

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(Vision().eval(), (torch.randn(1, 3, 16, 16),), buffer, dynamo=dynamo, **names)
    graph = onnx.load_from_string(buffer.getvalue())
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    loaded, together, alone = together_and_alone(graph, tmp_path, share_weights)
    assert not loaded.fixed_batch
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-5)
