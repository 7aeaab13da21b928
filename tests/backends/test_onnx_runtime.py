"""The ONNX backend: what it refuses, what it finds in a file, and that rows come back as closed forms say."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.backends import LoadOptions, onnx_file, onnx_functions, onnx_runtime
from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.errors import EvaluationFailed, ModelRefused, Unsupported
from explainserve.model_config import ModelConfig
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector, Tensors
from explainserve.signature import ScoreHead
from hostile_graphs import patient
from onnx_graphs import linear, make_external, model, node, save

OPTIONS = LoadOptions(thread_count=1)
WEIGHTS = np.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25]], np.float32)


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., OnnxModel]:
    numbers = itertools.count()

    def load(proto: onnx.ModelProto, config: ModelConfig | None = None) -> OnnxModel:
        path = save(proto, tmp_path / str(next(numbers)))
        return onnx_runtime.load(path, config or ModelConfig(), OPTIONS)

    return load


def refusal(path: Path, options: LoadOptions = OPTIONS) -> ModelRefused:
    with pytest.raises(ModelRefused) as caught:
        onnx_runtime.load(path, ModelConfig(), options)
    return caught.value


def selector(*indices: int, weights: list[float] | None = None) -> Selector:
    return Selector(np.array(indices, np.int64), np.array(weights or [1.0] * len(indices), np.float32))


def along(
    function: Differentiation,
    start: Tensors,
    end: Tensors,
    alphas: list[float],
    weights: list[float] | None = None,
    target: Selector | None = None,
    fixed: Tensors | None = None,
) -> Segment:
    """A segment; without weights they are equal and sum to 1."""
    shares = [1.0 / len(alphas)] * len(alphas) if weights is None else weights
    selectors = () if target is None else (target,)
    return Segment(start, end, fixed or {}, function, np.array(alphas), np.array(shares), selectors)


def evaluate(loaded_model: OnnxModel, *segments: Segment) -> tuple[SegmentEvaluation, ...]:
    return loaded_model.evaluate(Rows(segments[0].function, segments))


def forward(loaded_model: OnnxModel, points: Tensors, output: str = "y", fixed: Tensors | None = None) -> np.ndarray:
    """The score tensor of one row at `points`."""
    segment = along(Differentiation(output, ScoreHead.IDENTITY), points, points, [1.0], fixed=fixed)
    (found,) = evaluate(loaded_model, segment)
    assert found.outputs is not None
    return np.asarray(found.outputs[0])


def test_a_number_without_any_axis_is_an_input_and_an_output(loaded: Callable[..., OnnxModel]) -> None:
    """y = s sum(x), with neither a batch axis on s nor on y."""
    proto = model(
        [node("ReduceSum", ["x"], ["sum"], keepdims=0), node("Mul", ["sum", "s"], ["y"])],
        [("x", [1, 3]), ("s", [])],
        [("y", [])],
    )
    own = loaded(proto)
    point = {"x": np.array([1.0, 2.0, 4.0], np.float32), "s": np.array(3.0, np.float32)}
    function = Differentiation("y", ScoreHead.IDENTITY, ("x", "s"))
    (found,) = evaluate(own, along(function, point, point, [0.0, 1.0], target=selector(0)))

    np.testing.assert_allclose(forward(own, point), 21.0)
    np.testing.assert_allclose(found.scores, [21.0, 21.0])
    np.testing.assert_allclose(found.gradient_sums["x"], [3.0, 3.0, 3.0])
    np.testing.assert_allclose(found.gradient_sums["s"], 7.0)
    assert found.gradient_sums["s"].shape == ()


class TestReading:
    @pytest.mark.parametrize("keep", [0, 1, 20, 80])
    def test_a_truncated_file_is_corrupt(self, tmp_path: Path, keep: int) -> None:
        path = save(linear(WEIGHTS), tmp_path)
        path.write_bytes(path.read_bytes()[:keep])

        assert refusal(path).reason == "MODEL_FILE_CORRUPT"

    @pytest.mark.parametrize("content", [b"not a model\n" * 40, b"\x80\x04\x95pickle", bytes(range(256)) * 8])
    def test_garbage_is_corrupt(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)

        assert refusal(path).reason == "MODEL_FILE_CORRUPT"

    def test_a_graph_that_violates_the_specification_is_invalid(self, tmp_path: Path) -> None:
        broken = model([node("Relu", ["nowhere"], ["y"])], [("x", ["batch", 2])], [("y", ["batch", 2])])

        assert refusal(save(broken, tmp_path)).reason == "MODEL_INVALID"

    def test_a_file_of_onnxruntimes_own_tools_is_read(self, loaded: Callable[..., OnnxModel]) -> None:
        """Fused operators without the import of their domain, and some in the default domain before ONNX has them."""
        nodes = [
            node("LayerNormalization", ["x", "scale"], ["normal"], axis=-1, epsilon=0.0),
            node("SimplifiedLayerNormalization", ["normal", "scale"], ["simple"], axis=-1, epsilon=0.0),
            node("FusedMatMul", ["simple", "simple"], ["y"], domain="com.microsoft", transB=1),
        ]
        scale = {"scale": np.ones(2, np.float32)}
        own = loaded(model(nodes, [("x", ["batch", 3, 2])], [("y", ["batch", 3, 3])], scale, opset=14))
        point = {"x": np.array([[1.0, 5.0], [4.0, 2.0], [0.0, 3.0]], np.float32)}
        signs = np.array([-1.0, 1.0, -1.0])

        assert own.gradient_mode == "gradient_graph"
        np.testing.assert_allclose(forward(own, point), 2 * np.outer(signs, signs), rtol=1e-5)

    def test_a_file_with_channels_in_blocks_has_the_gradient_of_the_file_before(
        self, loaded: Callable[..., OnnxModel], tmp_path: Path
    ) -> None:
        generator = np.random.default_rng(2)
        weights = {"V": generator.standard_normal((32, 3, 3, 3)), "W": generator.standard_normal((16, 32, 3, 3))}
        nodes = [
            node("Conv", ["x", "V"], ["wide"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", ["wide"], ["rectified"]),
            node("Conv", ["rectified", "W"], ["narrow"], kernel_shape=[3, 3]),
            node("GlobalAveragePool", ["narrow"], ["mean"]),
            node("Flatten", ["mean"], ["y"]),
        ]
        stored = {name: value.astype(np.float32) for name, value in weights.items()}
        plain = model(nodes, [("x", ["batch", 3, 8, 8])], [("y", ["batch", 16])], stored)
        settings = onnxruntime.SessionOptions()
        settings.optimized_model_filepath = str(tmp_path / "blocked.onnx")
        settings.log_severity_level = 3
        onnxruntime.InferenceSession(plain.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        blocked = onnx.load(tmp_path / "blocked.onnx")
        start, end = ({"x": generator.standard_normal((3, 8, 8)).astype(np.float32)} for _ in range(2))
        segment = along(Differentiation("y", ScoreHead.IDENTITY, ("x",)), start, end, [0.2, 0.8], target=selector(5))
        (expected,), (found,) = (evaluate(loaded(proto), segment) for proto in (plain, blocked))

        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
        np.testing.assert_allclose(found.gradient_sums["x"], expected.gradient_sums["x"], rtol=1e-3, atol=1e-5)

    def test_nodes_in_any_order_are_read(self, loaded: Callable[..., OnnxModel]) -> None:
        nodes = [node("Add", ["double", "x"], ["y"]), node("Add", ["x", "x"], ["double"])]
        own = loaded(model(nodes, [("x", ["batch", 2])], [("y", ["batch", 2])]))
        point = {"x": np.array([1.0, -2.0], np.float32)}
        segment = along(Differentiation("y", ScoreHead.IDENTITY, ("x",)), point, point, [0.5], target=selector(1))
        (found,) = evaluate(own, segment)

        np.testing.assert_allclose(forward(own, point), [3.0, -6.0])
        np.testing.assert_allclose(found.gradient_sums["x"], [0.0, 3.0])

    def test_an_operator_of_nobody_in_the_default_domain_is_invalid(self, tmp_path: Path) -> None:
        strange = model([node("Whirl", ["x"], ["y"])], [("x", ["batch", 2])], [("y", ["batch", 2])])

        assert refusal(save(strange, tmp_path)).reason == "MODEL_INVALID"

    def test_an_operator_that_nobody_knows_is_named(self, tmp_path: Path) -> None:
        custom = model(
            [node("Whirl", ["x"], ["y"], domain="org.example")],
            [("x", ["batch", 2])],
            [("y", ["batch", 2])],
            domains=["org.example"],
        )
        error = refusal(save(custom, tmp_path))

        assert error.reason == "MODEL_NOT_RUNNABLE"
        assert "Whirl" in error.message

    def test_an_operator_set_without_broadcasting_is_refused(self, tmp_path: Path) -> None:
        old = model([node("Relu", ["x"], ["y"])], [("x", ["batch", 2])], [("y", ["batch", 2])], opset=6)

        assert refusal(save(old, tmp_path)).reason == "OPSET_TOO_OLD"


class TestExternalData:
    def model_with(self, **entries: object) -> onnx.ModelProto:
        proto = linear(WEIGHTS)
        make_external(proto.graph.initializer[0], **entries)
        return proto

    def test_data_beside_the_model_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "weights.bin").write_bytes(b"\0" * 64 + WEIGHTS.tobytes())
        path = save(self.model_with(location="data/weights.bin", offset=64), tmp_path)
        x = np.array([1.0, 2.0, 3.0], np.float32)

        np.testing.assert_allclose(forward(onnx_runtime.load(path, ModelConfig(), OPTIONS), {"x": x}), x @ WEIGHTS)
        assert onnx_file.files(path) == (path, tmp_path / "data" / "weights.bin")

    @pytest.mark.parametrize("listed", [False, True], ids=["as a weight", "as an input too"])
    def test_weights_outside_of_the_file_may_be_larger_than_a_message(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
    ) -> None:
        """With 2 GiB in place of 2 KiB, docs/models.md has the figures."""
        monkeypatch.setattr(onnx_file, "PROTOBUF_BYTES", 2 << 10)
        weights = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
        proto = linear(weights)
        if listed:
            proto.ir_version = 3
            proto.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, weights.shape))
        make_external(proto.graph.initializer[0], location="weights.bin")
        (tmp_path / "weights.bin").write_bytes(weights.tobytes())
        model = onnx_runtime.load(save(proto, tmp_path), ModelConfig(), OPTIONS)
        x = np.ones(64, np.float32)

        np.testing.assert_allclose(forward(model, {"x": x}), x @ weights, rtol=1e-5, atol=1e-5)
        assert model.gradient_mode == "gradient_graph"
        assert model.memory.weight_bytes == weights.nbytes

    def test_what_is_more_than_a_message_within_the_file_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(onnx_file, "PROTOBUF_BYTES", 2 << 10)

        assert refusal(save(linear(np.ones((64, 16), np.float32)), tmp_path)).reason == "MODEL_TOO_LARGE"

    def test_a_shape_that_does_not_fit_the_bytes_is_invalid(self, tmp_path: Path) -> None:
        proto = linear(np.ones((64, 16), np.float32))
        make_external(proto.graph.initializer[0], location="weights.bin", length=64 * 16 * 4 - 4)
        (tmp_path / "weights.bin").write_bytes(bytes(64 * 16 * 4))

        assert refusal(save(proto, tmp_path)).reason == "MODEL_INVALID"

    @pytest.mark.parametrize("location", ["{outside}", "../outside.bin", "a/../../outside.bin", "", "..", "/dev/zero"])
    def test_data_outside_the_folder_is_not_touched(self, tmp_path: Path, location: str) -> None:
        outside = tmp_path / "outside.bin"
        outside.write_bytes(WEIGHTS.tobytes())
        path = save(self.model_with(location=location.format(outside=outside)), tmp_path / "model")

        error = refusal(path)

        assert error.reason in ("EXTERNAL_DATA_ESCAPES", "EXTERNAL_DATA_MISSING")
        assert error.reason == "EXTERNAL_DATA_ESCAPES" or location == ""

    @pytest.mark.parametrize("link_folder", [False, True])
    def test_a_symbolic_link_that_leads_out_escapes(self, tmp_path: Path, link_folder: bool) -> None:
        secret = tmp_path / "secret"
        secret.mkdir()
        (secret / "weights.bin").write_bytes(WEIGHTS.tobytes())
        path = save(self.model_with(location="d/weights.bin" if link_folder else "weights.bin"), tmp_path / "model")
        if link_folder:
            (path.parent / "d").symlink_to(secret)
        else:
            (path.parent / "weights.bin").symlink_to(secret / "weights.bin")

        assert refusal(path).reason == "EXTERNAL_DATA_ESCAPES"

    def test_a_symbolic_link_inside_the_folder_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "real.bin").write_bytes(WEIGHTS.tobytes())
        (tmp_path / "weights.bin").symlink_to(tmp_path / "real.bin")
        path = save(self.model_with(location="weights.bin"), tmp_path)

        assert onnx_runtime.load(path, ModelConfig(), OPTIONS).gaps == ()

    def test_a_reference_hidden_in_an_attribute_is_found(self, tmp_path: Path) -> None:
        hidden = numpy_helper.from_array(WEIGHTS, "hidden")
        make_external(hidden, location="../outside.bin")
        (tmp_path / "outside.bin").write_bytes(WEIGHTS.tobytes())
        branches = {
            name: helper.make_graph(
                [node("Constant", [], ["c"], value=hidden)], name, [], [helper.make_tensor_value_info("c", 1, [3, 2])]
            )
            for name in ("then_branch", "else_branch")
        }
        nodes = [node("If", ["yes"], ["W"], **branches), node("MatMul", ["x", "W"], ["y"])]
        nested = model(nodes, [("x", ["batch", 3])], [("y", ["batch", 2])], {"yes": np.array(True)})

        assert refusal(save(nested, tmp_path / "model")).reason == "EXTERNAL_DATA_ESCAPES"

    @pytest.mark.parametrize("entries", [{}, {"offset": 8}, {"length": 1000}])
    def test_data_that_is_too_short_is_missing(self, tmp_path: Path, entries: dict[str, int]) -> None:
        (tmp_path / "weights.bin").write_bytes(WEIGHTS.tobytes()[:-4])
        error = refusal(save(self.model_with(location="weights.bin", **entries), tmp_path))

        assert error.reason == "EXTERNAL_DATA_MISSING"
        assert error.metadata["actual_bytes"] == str(WEIGHTS.nbytes - 4)

    @pytest.mark.parametrize("location", ["nothing.bin", "folder", "pipe"])
    def test_data_that_is_no_file_is_missing(self, tmp_path: Path, location: str) -> None:
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")

        assert refusal(save(self.model_with(location=location), tmp_path)).reason == "EXTERNAL_DATA_MISSING"

    @pytest.mark.parametrize("entries", [{"offset": -4}, {"length": -1}, {"offset": "many"}])
    def test_malformed_positions_are_invalid(self, tmp_path: Path, entries: dict[str, object]) -> None:
        (tmp_path / "weights.bin").write_bytes(WEIGHTS.tobytes())

        assert refusal(save(self.model_with(location="weights.bin", **entries), tmp_path)).reason == "MODEL_INVALID"


class TestSignature:
    def test_symbols_are_free_and_weights_are_no_inputs(self, loaded: Callable[..., OnnxModel]) -> None:
        proto = linear(WEIGHTS)
        proto.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, WEIGHTS.shape))
        signature = loaded(proto).signature

        assert [spec.name for spec in signature.inputs] == ["x"]
        assert [(axis.name, axis.size) for axis in signature.inputs[0].axes] == [("batch", None), ("", 3)]
        assert signature.outputs[0].axes[1].size == 2
        assert signature.inputs[0].batched

    @pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.STRING])
    def test_an_element_type_that_is_not_served_is_named(self, tmp_path: Path, kind: int) -> None:
        proto = model([node("Identity", ["x"], ["y"])], [("x", ["batch", 2], kind)], [("y", ["batch", 2], kind)])
        error = refusal(save(proto, tmp_path))

        assert error.reason == "UNSUPPORTED_TYPE"
        assert error.metadata == {"name": "x", "type": TensorProto.DataType.Name(kind).lower()}

    def test_a_sequence_is_named(self, tmp_path: Path) -> None:
        proto = model([node("SequenceConstruct", ["x"], ["y"])], [("x", ["batch", 2])], [("y", None)])
        proto.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None))

        assert refusal(save(proto, tmp_path)).metadata["type"] == "sequence"

    def test_open_extents_written_as_zero_are_free(self, loaded: Callable[..., OnnxModel]) -> None:
        proto = model([node("Relu", ["x"], ["y"])], [("x", [0, 4])], [("y", [0, 4])])

        assert loaded(proto).signature.inputs[0].axes[0].size is None


class TestBatch:
    def test_a_batch_of_one_in_the_file_is_made_free(self, loaded: Callable[..., OnnxModel]) -> None:
        found = loaded(linear(WEIGHTS, batch=1))

        assert not found.fixed_batch
        assert found.signature.inputs[0].axes[0].size is None
        assert_rows_agree_with_matmul(found)

    @pytest.mark.parametrize("batch", [1, "batch"])
    def test_a_batch_of_one_inside_a_reshape_is_made_free(
        self, loaded: Callable[..., OnnxModel], batch: int | str
    ) -> None:
        nodes = [
            node("Reshape", ["x", "square"], ["s"]),
            node("Transpose", ["s"], ["t"], perm=[0, 2, 1]),
            node("Reshape", ["t", "flat"], ["f"]),
            node("MatMul", ["f", "W"], ["y"]),
        ]
        weights = {
            "square": np.array([1, 1, 3]),
            "flat": np.array([1, -1]),
            "W": WEIGHTS,
        }
        found = loaded(model(nodes, [("x", [batch, 3])], [("y", [batch, 2])], weights))

        assert not found.fixed_batch
        assert_rows_agree_with_matmul(found)

    def test_a_batch_of_one_that_cannot_be_freed_runs_row_by_row(self, loaded: Callable[..., OnnxModel]) -> None:
        token = np.full((1, 3), 0.5, np.float32)
        nodes = [
            node("Concat", ["token", "x"], ["both"], axis=0),
            node("ReduceSum", ["both", "first"], ["sum"], keepdims=1),
            node("MatMul", ["sum", "W"], ["y"]),
        ]
        weights = {"token": token, "first": np.array([0]), "W": WEIGHTS}
        found = loaded(model(nodes, [("x", [1, 3])], [("y", [1, 2])], weights))
        xs = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
        function = Differentiation("y", ScoreHead.IDENTITY, ("x",))
        results = evaluate(found, *(along(function, {"x": x}, {"x": x}, [1.0], target=selector(1)) for x in xs))

        assert found.fixed_batch
        assert found.signature.inputs[0].axes[0].size == 1
        for x, result in zip(xs, results, strict=True):
            np.testing.assert_allclose(result.scores, [((token[0] + x) @ WEIGHTS)[1]], rtol=1e-5)
            np.testing.assert_allclose(result.gradient_sums["x"], WEIGHTS[:, 1], rtol=1e-6)

    def test_an_input_without_a_batch_axis_runs_row_by_row(self, loaded: Callable[..., OnnxModel]) -> None:
        proto = model(
            [node("Mul", ["x", "scale"], ["z"]), node("MatMul", ["z", "W"], ["y"])],
            [("x", ["batch", 3]), ("scale", [3])],
            [("y", ["batch", 2])],
            {"W": WEIGHTS},
        )
        found = loaded(proto)
        ends = [
            {"x": np.full(3, value, np.float32), "scale": np.arange(3, dtype=np.float32) + value} for value in (1, 2)
        ]
        function = Differentiation("y", ScoreHead.IDENTITY, ("x", "scale"))
        results = evaluate(found, *(along(function, end, end, [1.0], target=selector(0)) for end in ends))

        assert found.fixed_batch
        assert [spec.batched for spec in found.signature.inputs] == [True, False]
        for end, result in zip(ends, results, strict=True):
            np.testing.assert_allclose(result.gradient_sums["x"], end["scale"] * WEIGHTS[:, 0], rtol=1e-6)
            np.testing.assert_allclose(result.gradient_sums["scale"], end["x"] * WEIGHTS[:, 0], rtol=1e-6)

    def test_a_model_without_any_batch_axis_gets_one(self, loaded: Callable[..., OnnxModel]) -> None:
        proto = model([node("MatMul", ["x", "W"], ["y"])], [("x", [3])], [("y", [2])], {"W": WEIGHTS})
        found = loaded(proto)
        x = np.array([1.0, -1.0, 2.0], np.float32)
        function = Differentiation("y", ScoreHead.SOFTMAX, ("x",))
        (result,) = evaluate(found, along(function, {"x": x}, {"x": x}, [0.0, 1.0], target=selector(1)))
        p = softmax(x.astype(np.float64) @ WEIGHTS)

        assert [axis.size for axis in found.signature.outputs[0].axes] == [1, 2]
        assert forward(found, {"x": x}).shape == (2,)
        np.testing.assert_allclose(result.scores, [p[1], p[1]], rtol=1e-5)
        np.testing.assert_allclose(result.gradient_sums["x"], WEIGHTS @ (p[1] * (np.eye(2)[1] - p)), rtol=1e-4)


def assert_rows_agree_with_matmul(found: OnnxModel) -> None:
    start, end = np.zeros(3, np.float32), np.array([1.0, 2.0, -4.0], np.float32)
    function = Differentiation("y", ScoreHead.IDENTITY)
    (result,) = evaluate(found, along(function, {"x": start}, {"x": end}, [0.0, 0.5, 1.0]))

    assert result.outputs is not None
    np.testing.assert_allclose(result.outputs, np.outer([0.0, 0.5, 1.0], end @ WEIGHTS), rtol=1e-6)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


class TestRows:
    def product(self, loaded: Callable[..., OnnxModel], kind: int = TensorProto.FLOAT) -> OnnxModel:
        """y = a * b, element by element."""
        shape = ["batch", 2]
        return loaded(
            model([node("Mul", ["a", "b"], ["y"])], [("a", shape, kind), ("b", shape, kind)], [("y", shape, kind)])
        )

    def test_sums_of_a_product_are_its_integral(self, loaded: Callable[..., OnnxModel]) -> None:
        zero, a, b = np.zeros(2, np.float32), np.array([2.0, 3.0], np.float32), np.array([5.0, -7.0], np.float32)
        function = Differentiation("y", ScoreHead.IDENTITY, ("a", "b"))
        segment = along(function, {"a": zero, "b": zero}, {"a": a, "b": b}, [0.25, 0.75], target=selector(0, 1))
        (result,) = evaluate(self.product(loaded), segment)

        np.testing.assert_allclose(result.gradient_sums["a"] * a, a * b / 2, rtol=1e-6)
        np.testing.assert_allclose(result.gradient_sums["b"] * b, a * b / 2, rtol=1e-6)
        np.testing.assert_allclose(result.scores, [(a * b).sum() * t * t for t in (0.25, 0.75)], rtol=1e-6)
        assert result.scores.dtype == np.float64

    def test_rectifiers_of_float64_have_a_gradient(self, loaded: Callable[..., OnnxModel]) -> None:
        kind = TensorProto.DOUBLE
        found = loaded(model([node("Relu", ["x"], ["y"])], [("x", ["batch", 3], kind)], [("y", ["batch", 3], kind)]))
        x = np.array([-1.0, 0.0, 2.0])
        segment = along(
            Differentiation("y", ScoreHead.IDENTITY, ("x",)), {"x": x}, {"x": x}, [1.0], target=selector(0, 1, 2)
        )
        (result,) = evaluate(found, segment)

        np.testing.assert_array_equal(result.gradient_sums["x"], [0, 0, 1])

    def test_end_points_are_exact(self, loaded: Callable[..., OnnxModel]) -> None:
        found = loaded(model([node("Identity", ["x"], ["y"])], [("x", ["batch", 5])], [("y", ["batch", 5])]))
        random = np.random.default_rng(1)
        start = (random.standard_normal(5) * 10.0 ** random.integers(-20, 20, 5)).astype(np.float32)
        end = (random.standard_normal(5) * 10.0 ** random.integers(-20, 20, 5)).astype(np.float32)
        (result,) = evaluate(
            found, along(Differentiation("y", ScoreHead.IDENTITY), {"x": start}, {"x": end}, [0.0, 1.0])
        )

        np.testing.assert_array_equal(result.outputs, [start, end])

    def test_an_instance_may_be_a_single_number(self, loaded: Callable[..., OnnxModel]) -> None:
        found = loaded(model([node("Mul", ["x", "x"], ["y"])], [("x", ["batch"])], [("y", ["batch"])]))
        function = Differentiation("y", ScoreHead.IDENTITY, ("x",))
        start, end = {"x": np.array(1, np.float32)}, {"x": np.array(3, np.float32)}
        (result,) = evaluate(found, along(function, start, end, [0.0, 0.5], target=selector(0)))

        np.testing.assert_allclose(result.scores, [1.0, 4.0])
        np.testing.assert_allclose(result.gradient_sums["x"], 3.0)
        assert result.gradient_sums["x"].shape == ()

    def test_segments_of_one_batch_keep_their_own_selectors_and_weights(self, loaded: Callable[..., OnnxModel]) -> None:
        found = loaded(linear(WEIGHTS))
        function = Differentiation("y", ScoreHead.IDENTITY, ("x",))
        zero, x = np.zeros(3, np.float32), np.array([1.0, 2.0, 3.0], np.float32)
        segments = [
            along(function, {"x": zero}, {"x": x}, [0.1, 0.9], [0.25, 0.5], selector(0)),
            along(function, {"x": x}, {"x": zero}, [0.5], [2.0], selector(0, 1, weights=[1.0, -1.0])),
            along(function, {"x": zero}, {"x": x}, [1.0], [1.0], selector(1, 1)),
        ]
        first, second, third = evaluate(found, *segments)

        np.testing.assert_allclose(first.gradient_sums["x"], 0.75 * WEIGHTS[:, 0], rtol=1e-6)
        np.testing.assert_allclose(second.gradient_sums["x"], 2 * (WEIGHTS[:, 0] - WEIGHTS[:, 1]), rtol=1e-6)
        np.testing.assert_allclose(third.gradient_sums["x"], 2 * WEIGHTS[:, 1], rtol=1e-6)
        np.testing.assert_allclose(third.scores, [2 * (x @ WEIGHTS)[1]], rtol=1e-6)
        assert first.outputs is None

    def test_rows_of_weight_zero_are_left_out_even_where_they_are_not_finite(
        self, loaded: Callable[..., OnnxModel]
    ) -> None:
        found = loaded(model([node("Sqrt", ["x"], ["y"])], [("x", ["batch", 2])], [("y", ["batch", 2])]))
        function = Differentiation("y", ScoreHead.IDENTITY, ("x",))
        start, end = np.array([-4.0, 0.0], np.float32), np.array([4.0, 4.0], np.float32)
        some, none = evaluate(
            found,
            along(function, {"x": start}, {"x": end}, [0.0, 1.0], [0.0, 1.0], selector(0, 1)),
            along(function, {"x": start}, {"x": end}, [0.0], [0.0], selector(0)),
        )

        np.testing.assert_allclose(some.gradient_sums["x"], [0.25, 0.25])
        np.testing.assert_array_equal(none.gradient_sums["x"], [0.0, 0.0])
        assert np.isnan(some.scores[0])

    def test_fixed_inputs_keep_their_value_on_every_row(self, loaded: Callable[..., OnnxModel]) -> None:
        nodes = [node("Gather", ["table", "id"], ["row"]), node("Mul", ["x", "row"], ["y"])]
        table = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
        inputs = [("x", ["batch", 2]), ("id", ["batch"], TensorProto.INT64)]
        found = loaded(model(nodes, inputs, [("y", ["batch", 2])], {"table": table}))
        function = Differentiation("y", ScoreHead.IDENTITY, ("x",))
        zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
        results = evaluate(
            found,
            *(
                along(function, {"x": zero}, {"x": one}, [0.3, 0.6], None, selector(0, 1), {"id": np.array(i)})
                for i in (2, 0)
            ),
        )

        np.testing.assert_allclose(results[0].gradient_sums["x"], table[2], rtol=1e-6)
        np.testing.assert_allclose(results[1].gradient_sums["x"], table[0], rtol=1e-6)
        assert found.signature.differentiable_inputs == ("x",)

    def test_float64_models_stay_in_float64(self, loaded: Callable[..., OnnxModel]) -> None:
        a, b = np.array([1 / 3, 2 / 7]), np.array([np.pi, np.e])
        function = Differentiation("y", ScoreHead.IDENTITY, ("a", "b"))
        end = {"a": a, "b": b}
        (result,) = evaluate(
            self.product(loaded, TensorProto.DOUBLE), along(function, end, end, [0.2, 0.4, 0.9], target=selector(0, 1))
        )

        np.testing.assert_allclose(result.gradient_sums["a"], b, rtol=1e-14)
        assert result.gradient_sums["a"].dtype == np.float64

    def test_float16_models_are_summed_in_float32(self, loaded: Callable[..., OnnxModel]) -> None:
        end = {name: np.array([0.5, 1.0], np.float16) for name in "ab"}
        function = Differentiation("y", ScoreHead.IDENTITY, ("a", "b"))
        count = 64
        (result,) = evaluate(
            self.product(loaded, TensorProto.FLOAT16),
            along(function, end, end, [1.0] * count, [1001 / count] * count, selector(0, 1)),
        )

        np.testing.assert_allclose(result.gradient_sums["a"], 1001 * end["b"].astype(np.float64), rtol=1e-6)
        assert result.gradient_sums["a"].dtype == np.float32

    @pytest.mark.parametrize("head", [ScoreHead.SOFTMAX, ScoreHead.LOG_SOFTMAX])
    def test_score_heads_are_differentiated(self, loaded: Callable[..., OnnxModel], head: ScoreHead) -> None:
        found = loaded(linear(WEIGHTS))
        x = np.array([0.3, -0.2, 0.5], np.float32)
        p = softmax(x.astype(np.float64) @ WEIGHTS)
        function = Differentiation("y", head, ("x",))
        (result,) = evaluate(found, along(function, {"x": x}, {"x": x}, [1.0], target=selector(1)))
        slope = (np.eye(2)[1] - p) * (p[1] if head is ScoreHead.SOFTMAX else 1.0)

        np.testing.assert_allclose(result.scores, [p[1] if head is ScoreHead.SOFTMAX else np.log(p[1])], rtol=1e-5)
        np.testing.assert_allclose(result.gradient_sums["x"], WEIGHTS @ slope, rtol=1e-4)

    def test_outputs_of_open_extent_are_differentiated_at_each_size(self, loaded: Callable[..., OnnxModel]) -> None:
        shape = ["batch", "height", "width"]
        found = loaded(model([node("Mul", ["x", "x"], ["y"])], [("x", shape)], [("y", shape)]))
        function = Differentiation("y", ScoreHead.IDENTITY, ("x",))
        for size in ((2, 3), (4, 1)):
            x = np.random.default_rng(2).standard_normal(size).astype(np.float32)
            (result,) = evaluate(found, along(function, {"x": x}, {"x": x}, [1.0], target=selector(3)))

            np.testing.assert_allclose(
                result.gradient_sums["x"], 2 * x * (np.arange(x.size) == 3).reshape(size), rtol=1e-6
            )

    def test_each_output_has_its_own_gradient(self, loaded: Callable[..., OnnxModel]) -> None:
        nodes = [node("MatMul", ["x", "W"], ["y"]), node("Mul", ["x", "x"], ["z"])]
        outputs = [("y", ["batch", 2]), ("z", ["batch", 3])]
        found = loaded(model(nodes, [("x", ["batch", 3])], outputs, {"W": WEIGHTS}))
        x = np.array([1.0, 2.0, 3.0], np.float32)
        for output, expected in (("y", WEIGHTS[:, 1]), ("z", [0.0, 4.0, 0.0])):
            function = Differentiation(output, ScoreHead.IDENTITY, ("x",))
            (result,) = evaluate(found, along(function, {"x": x}, {"x": x}, [1.0], target=selector(1)))

            np.testing.assert_allclose(result.gradient_sums["x"], expected, rtol=1e-6)

    def test_forward_rows_never_build_a_gradient(
        self, loaded: Callable[..., OnnxModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = loaded(linear(WEIGHTS))

        def unexpected(*_: object) -> None:
            raise AssertionError("a gradient graph was built")

        monkeypatch.setattr(onnx_functions, "input_gradient", unexpected)
        assert_rows_agree_with_matmul(found)

    def test_what_onnxruntime_raises_is_an_evaluation_failure(self, loaded: Callable[..., OnnxModel]) -> None:
        nodes = [node("Gather", ["table", "id"], ["y"])]
        inputs = [("id", ["batch"], TensorProto.INT64)]
        found = loaded(model(nodes, inputs, [("y", ["batch", 2])], {"table": np.ones((3, 2), np.float32)}))
        fine = forward(found, {}, fixed={"id": np.array(1)})

        with pytest.raises(EvaluationFailed) as caught:
            forward(found, {}, fixed={"id": np.array(99)})
        assert caught.value.reason == "MODEL_RAISED"
        np.testing.assert_array_equal(fine, [1.0, 1.0])


class TestGaps:
    @pytest.fixture
    def rounded(self, loaded: Callable[..., OnnxModel]) -> OnnxModel:
        """Rounds to halves on the way."""
        nodes = [
            node("QuantizeLinear", ["x", "half", "zero"], ["q"], name="first"),
            node("DequantizeLinear", ["q", "half", "zero"], ["b"], name="second"),
            node("MatMul", ["b", "W"], ["y"]),
        ]
        shapes = [("x", ["batch", 3])], [("y", ["batch", 2])]
        steps = {"half": np.array(0.5, np.float32), "zero": np.array(0, np.int8)}
        return loaded(model(nodes, *shapes, {"W": WEIGHTS, **steps}))

    def test_a_model_with_gaps_still_predicts(self, rounded: OnnxModel) -> None:
        x = np.array([1.1, 0.4, -2.0], np.float32)

        assert rounded.gradient_mode == "black_box"
        assert {"first", "second"} <= {gap.node for gap in rounded.gaps}
        assert all(gap.reason and gap.remedy for gap in rounded.gaps)
        np.testing.assert_allclose(forward(rounded, {"x": x}), np.round(x * 2) / 2 @ WEIGHTS, rtol=1e-5)

    def test_a_gradient_of_it_is_refused_with_its_gaps(self, rounded: OnnxModel) -> None:
        x = np.zeros(3, np.float32)
        function = Differentiation("y", ScoreHead.IDENTITY, ("x",))

        with pytest.raises(Unsupported) as caught:
            evaluate(rounded, along(function, {"x": x}, {"x": x}, [1.0], target=selector(0)))
        assert caught.value.reason == "NOT_DIFFERENTIABLE"
        assert caught.value.metadata["gap_count"] == str(len(rounded.gaps))
        assert rounded.gaps[0].node in caught.value.metadata["gaps"]

    def test_a_model_of_integers_is_a_black_box(self, loaded: Callable[..., OnnxModel]) -> None:
        integers = TensorProto.INT64
        found = loaded(
            model([node("Neg", ["x"], ["y"])], [("x", ["batch", 2], integers)], [("y", ["batch", 2], integers)])
        )

        assert found.gradient_mode == "black_box"
        np.testing.assert_array_equal(forward(found, {}, fixed={"x": np.array([3, 4])}), [-3, -4])


class TestDevice:
    pytestmark = pytest.mark.skipif(
        "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime knows CUDA"
    )

    def test_a_missing_device_is_refused(self, tmp_path: Path) -> None:
        assert refusal(save(linear(WEIGHTS), tmp_path), LoadOptions("cuda:0")).reason == "DEVICE_UNAVAILABLE"

    def test_falling_back_is_allowed_when_asked_for_and_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        found = onnx_runtime.load(
            save(linear(WEIGHTS), tmp_path), ModelConfig(), LoadOptions("cuda", allow_fallback=True)
        )

        assert found.device == "cpu"
        assert "cuda" in caplog.text
        assert_rows_agree_with_matmul(found)


def test_a_session_that_fell_back_silently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime with CUDA on a machine without it lists the provider and runs on the CPU."""
    from explainserve.backends import onnx_session
    from explainserve.backends.onnx_providers import CPU

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnx_session, "session_providers", lambda options, compiled: [CPU])

    assert refusal(save(linear(WEIGHTS), tmp_path), LoadOptions("cuda")).reason == "DEVICE_UNAVAILABLE"


def test_an_evaluation_is_ended_from_another_thread_and_the_next_one_is_not(loaded: Callable[..., OnnxModel]) -> None:
    """In the middle of a loop that would take years."""
    patient_model = loaded(patient())
    endless = np.full(4, 2.0**50, np.float32)
    failures: list[str] = []

    def run() -> None:
        with pytest.raises(EvaluationFailed) as caught:
            forward(patient_model, {"x": endless})
        failures.append(caught.value.reason)

    running = threading.Thread(target=run)
    running.start()
    while running.is_alive():
        patient_model.interrupt()
        running.join(0.05)

    assert failures == ["MODEL_RAISED"]
    np.testing.assert_array_equal(forward(patient_model, {"x": np.ones(4, np.float32)}), np.ones(4))
