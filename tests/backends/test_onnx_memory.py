"""Weights held once, gradient graphs kept on disk, and execution providers that are not believed blindly."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.backends import gradient_cache, onnx_batch, onnx_functions, onnx_runtime, onnx_session
from explainserve.backends.contract import LoadOptions
from explainserve.backends.gradient_cache import GradientCache, cache_key
from explainserve.backends.onnx_runtime import OnnxModel
from explainserve.backends.onnx_verification import LARGEST_DIFFERENCES, largest_difference
from explainserve.backends.onnx_weights import Weights
from explainserve.model_config import ModelConfig, Precision
from explainserve.onnx_vjp import GradientGraph, input_gradient
from explainserve.plan import Differentiation, Rows, Segment, Selector
from explainserve.signature import ScoreHead
from onnx_graphs import model, node, save

random = np.random.default_rng(4)
KERNEL = (random.standard_normal((8, 4, 3, 3)) / 6).astype(np.float32)
MATRIX = (random.standard_normal((8, 64)) / 3).astype(np.float32)
FUNCTION = Differentiation("y", ScoreHead.IDENTITY, ("x",))


def network() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "matrix"], ["y"]),
    ]
    return model(nodes, [("x", ["batch", 4, 6, 6])], [("y", ["batch", 64])], {"kernel": KERNEL, "matrix": MATRIX})


def load(folder: Path, options: LoadOptions | None = None) -> OnnxModel:
    return onnx_runtime.load(save(network(), folder), ModelConfig(), options or LoadOptions())


def selector(index: int) -> Selector:
    return Selector(np.array([index]), np.ones(1, np.float32))


def gradient(loaded: OnnxModel) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((4, 6, 6)).astype(np.float32)
    segment = Segment({"x": 0 * x}, {"x": x}, {}, FUNCTION, np.array([0.5, 1.0]), np.ones(2), (selector(7),))
    (found,) = loaded.evaluate(Rows(FUNCTION, (segment,)))
    return np.asarray(found.gradient_sums["x"])


# -- weights -----------------------------------------------------------------------------------------------------------


def test_large_weights_are_taken_out_of_the_graph_and_equal_ones_held_once() -> None:
    weights, first, second = Weights(), network(), network()
    weights.take(first)
    weights.take(second)
    assert weights.byte_count == KERNEL.nbytes + MATRIX.nbytes
    assert {tensor.name: tensor.data_location for tensor in first.graph.initializer} == {
        "kernel": TensorProto.EXTERNAL,
        "matrix": TensorProto.EXTERNAL,
    }
    np.testing.assert_array_equal(weights.of(second)["kernel"], KERNEL)
    assert first.ByteSize() < 2000


def test_one_weight_is_the_same_memory_for_every_session() -> None:
    weights, graph = Weights(), network()
    weights.take(graph)
    values = [weights.values(graph)["matrix"].data_ptr() for _ in range(2)]
    assert values[0] == values[1] == weights.of(graph)["matrix"].ctypes.data


def test_a_weight_is_read_as_it_is_where_the_runtime_moves_transposes() -> None:
    offsets = random.standard_normal((1, 16, 16)).astype(np.float32)
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        node("Add", ["t", "offsets"], ["s"]),
        node("Transpose", ["s"], ["y"], perm=[0, 2, 1]),
    ]
    graph = model(nodes, [("x", ["n", 16, 16])], [("y", ["n", 16, 16])], {"offsets": offsets})
    weights, x = Weights(), random.standard_normal((2, 16, 16)).astype(np.float32)
    weights.take(graph)
    (y,) = onnx_session.open_session(graph, LoadOptions(), weights).run(None, {"x": x})
    np.testing.assert_array_equal(y, x + offsets.transpose(0, 2, 1))


@pytest.mark.parametrize("share_weights", [False, True])
def test_what_a_model_takes_is_told(tmp_path: Path, share_weights: bool) -> None:
    loaded = load(tmp_path, LoadOptions(share_weights=share_weights, thread_count=1))  # several are tried at load
    assert (loaded.memory.weight_bytes, loaded.memory.gradient_bytes) == (KERNEL.nbytes + MATRIX.nbytes, 0)
    expected = gradient(load(tmp_path))
    np.testing.assert_allclose(gradient(loaded), expected, rtol=1e-4, atol=1e-6)
    assert 0 < loaded.memory.gradient_bytes <= KERNEL.nbytes + MATRIX.nbytes


def test_small_weights_count_too_those_of_branches_included(tmp_path: Path) -> None:
    def branch(name: str, weight: np.ndarray) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])
        scaled = node("Mul", ["h", f"{name}_weight"], [name])
        return helper.make_graph([scaled], name, [], [result], [numpy_helper.from_array(weight, f"{name}_weight")])

    small, one, three = np.eye(3, dtype=np.float32), np.ones(1, np.float32), np.ones(3, np.float32)
    branches = {"then_branch": branch("t", one), "else_branch": branch("e", three)}
    nodes = [node("MatMul", ["x", "small"], ["h"]), node("If", ["on"], ["y"], **branches)]
    weights = {"small": small, "on": np.array(True)}
    proto = model(nodes, [("x", ["batch", 3])], [("y", ["batch", 3])], weights)
    loaded = onnx_runtime.load(save(proto, tmp_path), ModelConfig(), LoadOptions())

    assert loaded.memory.weight_bytes == small.nbytes + one.nbytes + three.nbytes + weights["on"].nbytes
    assert loaded.memory.gradient_bytes == 0


def test_sharing_weights_that_the_runtime_would_transpose_changes_no_value(tmp_path: Path) -> None:
    """onnxruntime pushes the Transpose through Add, and transposes the weight for it in place."""
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        node("Add", ["t", "shift"], ["s"]),
        node("Transpose", ["s"], ["u"], perm=[0, 2, 1]),
        node("Relu", ["u"], ["r"]),
        node("ReduceSum", ["r", "axes"], ["y"], keepdims=0),
    ]
    shift = random.standard_normal((1, 16, 16)).astype(np.float32)
    constants = {"shift": shift, "axes": np.array([1])}
    path = save(model(nodes, [("x", ["batch", 16, 16])], [("y", ["batch", 16])], constants), tmp_path)
    x = random.standard_normal((16, 16)).astype(np.float32)
    rows = Rows(FUNCTION, (Segment({"x": 0 * x}, {"x": x}, {}, FUNCTION, np.ones(1), np.ones(1), (selector(3),)),))
    for share_weights in (True, False):
        loaded = onnx_runtime.load(path, ModelConfig(), LoadOptions(share_weights=share_weights))
        (found,) = loaded.evaluate(rows)
        expected = np.zeros_like(x)
        expected[:, 3] = (x + shift[0].T)[:, 3] > 0
        np.testing.assert_allclose(found.gradient_sums["x"], expected)
        np.testing.assert_allclose(found.scores, np.maximum(x + shift[0].T, 0).sum(0)[3], rtol=1e-5)


# -- the cache ---------------------------------------------------------------------------------------------------------


def never() -> GradientGraph:
    raise AssertionError("the graph is built again")


def test_a_gradient_graph_is_kept_for_the_next_process(tmp_path: Path) -> None:
    options = LoadOptions(cache=tmp_path / "cache")
    expected = gradient(load(tmp_path, options))
    (kept,) = (tmp_path / "cache" / "gradients").iterdir()
    written = kept.read_bytes()
    np.testing.assert_array_equal(gradient(load(tmp_path, options)), expected)
    assert kept.read_bytes() == written
    assert len(written) < KERNEL.nbytes + MATRIX.nbytes + 8192  # what the gradient adds, not the weights again


def test_a_kept_graph_is_not_built_again(tmp_path: Path) -> None:
    cache, built = GradientCache(tmp_path), input_gradient(network(), ["x"], "y")
    cache.get("key", lambda: built)
    found = cache.get("key", never)
    assert found.gradients == built.gradients and found.cotangents == built.cotangents
    assert found.model == built.model


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:40] + b"?" + content[41:]])
def test_a_damaged_file_is_built_again(tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    cache, built = GradientCache(tmp_path), input_gradient(network(), ["x"], "y")
    cache.get("key", lambda: built)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert cache.get("key", lambda: built) is built
    assert "damaged" in caplog.text
    assert cache.get("key", never).model == built.model


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    built = input_gradient(network(), ["x"], "y")
    assert GradientCache(tmp_path / "file" / "cache").get("key", lambda: built) is built
    assert "could not be kept" in caplog.text


def test_nothing_stays_of_a_file_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    built = input_gradient(network(), ["x"], "y")
    monkeypatch.setattr(os, "replace", fail)
    assert GradientCache(tmp_path).get("key", lambda: built) is built
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = input_gradient(network(), ["x"], "y")
    cache = GradientCache(tmp_path)
    cache.get("old", lambda: built)
    size = (tmp_path / "old.onnx").stat().st_size
    monkeypatch.setattr(gradient_cache, "MAX_BYTES", 2 * size + 100)
    for name in ("middle", "new"):
        cache.get(name, lambda: built)
    assert {path.stem for path in tmp_path.iterdir()} == {"middle", "new"}


def test_the_key_tells_models_weights_and_questions_apart() -> None:
    weights, graph, other = Weights(), network(), network()
    other.graph.initializer[0].raw_data = (2 * KERNEL).tobytes()
    weights.take(graph)
    weights.take(other)
    keys = {cache_key(graph, ("x",), "y"), cache_key(graph, ("x",), "z"), cache_key(other, ("x",), "y")}
    assert len(keys) == 3
    assert cache_key(graph, ("x",), "y") in keys


FILLER = """
import sys
from pathlib import Path
import onnx
from explainserve.backends.gradient_cache import GradientCache
from explainserve.onnx_vjp import input_gradient
folder, built = Path(sys.argv[1]), input_gradient(onnx.load(sys.argv[2]), ["x"], "y")
for _ in range(200):
    assert GradientCache(folder).get("key", lambda: built).model == built.model
    (folder / "key.onnx").unlink(missing_ok=True)
"""


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "network.onnx")
    command = [sys.executable, "-c", FILLER, str(tmp_path / "cache"), str(tmp_path / "network.onnx")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert "damaged" not in "".join(errors)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".part"]


# -- providers ---------------------------------------------------------------------------------------------------------


def test_differences_are_relative_to_the_reference() -> None:
    a = np.array([3.0, 4.0])
    assert largest_difference([a * 1.1, a], [a, a]) == pytest.approx(0.1)
    assert largest_difference([a * np.nan], [a]) == np.inf
    assert largest_difference([np.zeros(2)], [np.zeros(2)]) == 0


class _Wrong:
    """A session of a provider whose last output is a factor too large."""

    def __init__(self, session: onnxruntime.InferenceSession, factor: float) -> None:
        self._session, self._factor = session, factor

    def run(self, names: None, feeds: dict[str, np.ndarray], options: object) -> list[np.ndarray]:
        *others, last = self._session.run(names, feeds, options)
        return [*others, last * np.float32(self._factor)]


BELIEVED = LARGEST_DIFFERENCES[Precision.FLOAT32]


@pytest.mark.parametrize(("factor", "believed"), [(1.0, True), (1 + BELIEVED / 2, True), (2.4, False)])
def test_a_provider_that_disagrees_with_the_cpu_is_refused_with_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, believed: bool
) -> None:
    opened = onnx_session.open_session

    def open_session(graph: onnx.ModelProto, options: LoadOptions, weights: Weights | None = None) -> object:
        session = opened(graph, LoadOptions(), weights)
        return session if options.device == "cpu" else _Wrong(session, factor)

    monkeypatch.setattr(onnx_runtime, "available_device", lambda options: "openvino:0")
    monkeypatch.setattr(onnx_functions, "open_session", open_session)
    monkeypatch.setattr(onnx_batch, "open_session", open_session)
    loaded = load(tmp_path, LoadOptions("openvino"))
    assert loaded.gradient_mode == ("gradient_graph" if believed else "black_box")
    if not believed:
        (gap,) = loaded.gaps
        assert "1.4" in gap.reason and "CPU" in gap.remedy


def test_batches_of_many_sizes_and_several_sessions_take_no_more_than_the_largest() -> None:
    program = """
import numpy as np
from explainserve.backends.contract import LoadOptions
from explainserve.backends.onnx_session import open_session
from explainserve.backends.resident_memory import resident_bytes
from onnx_graphs import model, node

stack = [node("Softmax", [f"t{i}"], [f"t{i + 1}"]) for i in range(3)]
graph = model([*stack, node("Sum", ["t0", "t1", "t2", "t3"], ["y"])], [("t0", ["n", 1 << 20])], [("y", ["n", 1 << 20])])
sessions = [open_session(graph, LoadOptions(thread_count=1)) for _ in range(3)]
block = np.ones((9, 1 << 20), np.float32)
start = resident_bytes()
sessions[0].run(None, {"t0": block})
largest = resident_bytes() - start
for session in sessions:
    for count in range(1, 10):
        session.run(None, {"t0": block[:count]})
print((resident_bytes() - start) / largest)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=with_tests())

    assert float(ran.stdout) < 1.5


def with_tests() -> dict[str, str]:
    """The environment of a process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
