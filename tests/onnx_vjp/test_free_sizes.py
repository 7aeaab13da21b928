"""Files with free sizes that cut, pad or pool them: one gradient graph has to be right for small and odd sizes too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from explainserve.onnx_vjp import input_gradient
from explainserve.onnx_vjp.graph import Graph
from onnx_vjp.vjp_oracle import Case, check, run

_rng = np.random.default_rng(11)
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "seven": 7, "eight": 8, "twenty": 20, "hundred": 100}
NUMBERS |= {"last": -1, "last_hundred": -100, "far": 1 << 40}
STORED = {
    **{name: np.array([number]) for name, number in NUMBERS.items()},
    "sides": np.array([2, 3]),
    "two_zeros": np.zeros(2, np.int64),
    "six_zeros": np.zeros(6, np.int64),
    "split": np.array([0, -1, 2, 2]),
    "merge": np.array([-1, 7, 7, 2]),
    "doubled": np.array([1, 1, 2, 2], np.float32),
    "matrix": _rng.standard_normal((4, 3)).astype(np.float32),
    "kernel": _rng.standard_normal((2, 2, 3, 3)).astype(np.float32),
    "mask": np.where(np.tri(20, dtype=bool), 0, -9).astype(np.float32)[None],
    "table": _rng.standard_normal((1, 20, 4)).astype(np.float32),
}


def parsed(inputs: str, body: str) -> onnx.ModelProto:
    """A model of the statements `body`, with output y and with those of `STORED` that it reads."""
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> test ({inputs}) => (float[] y) {{{body}}}')
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(STORED[name], name) for name in sorted(read & STORED.keys()))
    return model


LENGTH = "length = Shape<start = 1, end = 2>(x)"
MEAN = "squares = Mul(kept, kept) y = ReduceMean<keepdims = 0>(squares, one)"
TEXTS = {
    "the first 100": f"kept = Slice(x, zero, hundred, one) {MEAN}",
    "the first 3": f"kept = Slice(x, zero, three, one) {MEAN}",
    "the first 20": f"kept = Slice(x, zero, twenty, one) {MEAN}",
    "the last 100": f"kept = Slice(x, last_hundred, far, one) {MEAN}",
    "up to the smaller of two": f"{LENGTH} end = Min(length, hundred) kept = Slice(x, zero, end, one) {MEAN}",
    "the largest 100": f"{LENGTH} k = Min(length, hundred) kept, places = TopK<axis = 1>(x, k) {MEAN}",
    "the last of the first 100": "kept = Slice(x, zero, hundred, one) y = Gather<axis = 1>(kept, last)",
    "the first 100, mapped": f"cut = Slice(x, zero, hundred, one) kept = MatMul(cut, matrix) {MEAN}",
    "the first 100, pooled": "t = Transpose<perm = [0, 2, 1]>(x) kept = Slice(t, zero, hundred, two)"
    " squares = Mul(kept, kept) y = GlobalAveragePool(squares)",
    "at least 20": f"{LENGTH} lacking = Sub(twenty, length) added = Max(lacking, zero)"
    f" pads = Concat<axis = 0>(zero, zero, zero, zero, added, zero) kept = Pad(x, pads) {MEAN}",
    "first half after the second": f"{LENGTH} half = Div(length, two) first = Slice(x, zero, half, one)"
    f" second = Slice(x, half, length, one) kept = Concat<axis = 1>(second, first) {MEAN}",
}


@pytest.mark.parametrize("length", [1, 2, 5, 20, 64, 100, 131])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_of_any_length(name: str, length: int) -> None:
    x = _rng.standard_normal((2, length, 4)).astype(np.float32)
    assert check(Case(name, parsed("float[N, L, 4] x", TEXTS[name]), {"x": x}))


SIZES = "sizes = Shape<start = 2>(x) negative = Neg(sizes)"
TO_EIGHTS = f"{SIZES} lacking = Mod(negative, eight) pads = Concat<axis = 0>(six_zeros, lacking) whole = Pad(x, pads)"
AVERAGE = "squares = Mul(sum, sum) y = ReduceMean<keepdims = 0>(squares, sides)"
IMAGES = {
    "padded to eights, resized back": f"{TO_EIGHTS} mapped = Conv<pads = [1, 1, 1, 1]>(whole, kernel) all = Shape(x)"
    f' back = Resize<mode = "linear">(mapped, , , all) sum = Add(back, x) {AVERAGE}',
    "padded to eights, cut back": f"{TO_EIGHTS} mapped = Conv<pads = [1, 1, 1, 1]>(whole, kernel)"
    f" back = Slice(mapped, two_zeros, sizes, sides) sum = Add(back, x) {AVERAGE}",
    "pooled, doubled, padded back": "pooled = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(x)"
    ' large = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">'
    "(pooled, , doubled) all = Shape(x) doubled_all = Shape(large) lacking = Sub(all, doubled_all)"
    f" pads = Concat<axis = 0>(two_zeros, two_zeros, lacking) back = Pad(large, pads) sum = Add(back, x) {AVERAGE}",
    "windows of 7, cut back": f"{SIZES} lacking = Mod(negative, seven) pads = Concat<axis = 0>(six_zeros, lacking)"
    " whole = Pad(x, pads) padded = Shape<start = 2>(whole) windows = Div(padded, seven)"
    " rows = Slice(windows, zero, one) columns = Slice(windows, one, two)"
    " target = Concat<axis = 0>(zero, two, rows, seven, columns, seven) split_up = Reshape(whole, target)"
    " grouped = Transpose<perm = [0, 2, 4, 3, 5, 1]>(split_up) cells = Reshape(grouped, merge)"
    " weights = Softmax<axis = 1>(cells) weighted = Mul(weights, cells)"
    " batch = Shape<end = 1>(x) six = Concat<axis = 0>(batch, rows, columns, seven, seven, two)"
    " ungrouped = Reshape(weighted, six) along = Transpose<perm = [0, 5, 1, 3, 2, 4]>(ungrouped)"
    " image = Concat<axis = 0>(batch, two, padded) joined = Reshape(along, image)"
    f" back = Slice(joined, two_zeros, sizes, sides) sum = Add(back, x) {AVERAGE}",
}


@pytest.mark.parametrize("sides", [(2, 3), (8, 14), (13, 13), (7, 20), (21, 16)], ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_any_size(name: str, sides: tuple[int, int]) -> None:
    x = _rng.standard_normal((2, 2, *sides)).astype(np.float32)
    assert check(Case(name, parsed("float[N, 2, H, W] x", IMAGES[name]), {"x": x}))


UP_TO_LENGTH = "all = Shape(x) length = Slice(all, one, two)"
TABLES = {
    "positions": f"{UP_TO_LENGTH} kept = Slice(table, zero, length, one) sum = Add(x, kept)"
    " heads = Reshape(sum, split) y = ReduceMax<keepdims = 0>(heads, three)",
    "a mask": f"{UP_TO_LENGTH} rows = Slice(mask, zero, length, one) kept = Slice(rows, zero, length, two)"
    " t = Transpose<perm = [0, 2, 1]>(x) scores = MatMul(x, t) masked = Add(kept, scores)"
    " weights = Softmax<axis = 2>(masked) sum = MatMul(weights, x)"
    " heads = Reshape(sum, split) y = ReduceMax<keepdims = 0>(heads, three)",
    # ONNX does not follow Mod: the shapes of both operands of the sum are computed.
    "positions of what is computed": f"{UP_TO_LENGTH} kept = Slice(table, zero, length, one) end = Mod(last, three)"
    " until = Reshape(end, last) lead = Slice(all, zero, until, zero) whole = Concat<axis = 0>(lead, last)"
    " rows = Reshape(x, whole) sum = Add(rows, kept)"
    " heads = Reshape(sum, split) y = ReduceMax<keepdims = 0>(heads, three)",
}


@pytest.mark.parametrize("name", TABLES)
def test_what_is_behind_the_cut_of_a_table_keeps_its_shape(name: str) -> None:
    shapes = Graph(parsed("float[N, L, 4] x", TABLES[name])).shapes
    assert shapes.shape("sum") == ("N", "L", 4)
    assert shapes.shape("heads") == ("N", "L", 2, 2)
    assert {20, "L"}.isdisjoint(shapes.shape("kept") or ())


@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_cut_to_any_length(name: str, length: int) -> None:
    x = _rng.standard_normal((2, length, 4)).astype(np.float32)
    assert check(Case(name, parsed("float[N, L, 4] x", TABLES[name]), {"x": x}))


def test_cuts_of_one_length_have_one_shape() -> None:
    model = parsed(
        "float[N, L, 4] a, float[N, L, 4] b",
        "c = Slice(a, zero, hundred, one) d = Slice(b, zero, hundred, one) e = Slice(a, zero, twenty, one)"
        " y = Mul(c, d)",
    )
    shapes = Graph(model).shapes
    assert shapes.shape("c") == shapes.shape("d") == shapes.shape("y") != shapes.shape("e")
    operators = [node.op_type for node in input_gradient(model, ["a", "b"], "y").model.graph.node]
    assert "ReduceSum" not in operators  # nothing is broadcast


@pytest.mark.parametrize("sizes", [(1, 2, 6, 9), (2, 2, 3, 5)], ids=str)
def test_a_resize_to_as_many_sizes_as_there_are(sizes: tuple[int, ...]) -> None:
    """Not even how many sizes are given is known."""
    body = 'r = Resize<mode = "linear">(x, , , sizes) y = Mul(r, r)'
    x, size = _rng.standard_normal((*sizes[:2], 4, 7)).astype(np.float32), np.array(sizes)
    assert check(Case("resized", parsed("float[N, C, H, W] x, int64[R] sizes", body), {"x": x, "sizes": size}))


def test_two_symbols_of_one_size_take_what_the_file_declares() -> None:
    """A sum of vectors of lengths A and B is declared to have two elements: no probe may find that A is B."""
    model = parsed("float[A] a, float[B] b", "sum = Add(a, b) y = Mul(sum, sum)")
    model.graph.value_info.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, [2]))
    assert Graph(model).shape("sum") == (2,)


def test_more_elements_than_64_bits_count() -> None:
    """Frames of a video as a batch: N T is computed, and the product of all six sizes of a probe exceeds 2 ** 63."""
    model = parsed(
        "float[N, T, C, D, H, W] x",
        "all = Shape(x) lead = Slice(all, zero, two) rest = Slice(all, two, far)"
        " frames = ReduceProd<keepdims = 1>(lead) target = Concat<axis = 0>(frames, rest)"
        " joined = Reshape(x, target) y = Mul(joined, joined)",
    )
    assert len(Graph(model).shape("joined") or ()) == 5
    assert check(Case("video", model, {"x": _rng.standard_normal((2, 3, 1, 2, 3, 2)).astype(np.float32)}))


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (2, 3, 4)], ids=str)
def test_axes_of_no_elements(sizes: tuple[int, ...]) -> None:
    """x has no static size, so any of them may be zero where the gradient takes its shape."""
    model = parsed("float[A, B, C] x, int64[3] target", "r = Reshape<allowzero = 1>(x, target) y = Mul(r, r)")
    gradient = input_gradient(model, ["x"], "y")
    x, target = _rng.standard_normal(sizes).astype(np.float32), np.array(sizes[::-1])
    g = np.ones(sizes[::-1], np.float32)
    feeds = {"x": x, "target": target, gradient.cotangent: g}
    (dx,) = run(gradient.model, feeds, [gradient.gradients["x"]])
    np.testing.assert_array_equal(dx, 2 * x)
