"""Sequences and optional values whose positions are known are differentiated as if they were not there."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from explainserve.onnx_vjp import find_gaps
from onnx_vjp.vjp_oracle import Case, check

CHAINS = {
    "split and pick": """
        s = SplitToSequence <axis = 1, keepdims = 0> (x)
        i = Constant <value_int = 2> ()
        j = Constant <value_int = -1> ()
        a = SequenceAt (s, i)
        b = SequenceAt (s, j)
        y = Mul (a, b)
    """,
    "rows": """
        s = SplitToSequence (x)
        y = ConcatFromSequence <axis = -1, new_axis = 1> (s)
    """,
    "uneven chunks": """
        size = Constant <value_int = 3> ()
        s = SplitToSequence <axis = -1> (x, size)
        i = Constant <value_int = 1> ()
        y = SequenceAt (s, i)
    """,
    "edited": """
        double = Add (x, x)
        square = Mul (x, x)
        e = SequenceEmpty ()
        s1 = SequenceInsert (e, x)
        zero = Constant <value_int = 0> ()
        last = Constant <value_int = -1> ()
        s2 = SequenceInsert (s1, double, zero)
        s3 = SequenceInsert (s2, square, last)
        s4 = Identity (s3)
        s5 = SequenceErase (s4, zero)
        s6 = SequenceErase (s5)
        y = ConcatFromSequence <axis = 0> (s6)
    """,
    "looked up twice": """
        s = SequenceConstruct (x, x, x)
        o = Optional (s)
        t = OptionalGetElement (o)
        p = Constant <value_int = 1> ()
        a = SequenceAt (t, p)
        n = SequenceLength (t)
        factor = CastLike (n, a)
        b = Mul (a, factor)
        c = Optional (b)
        y = OptionalGetElement (c)
    """,
}


def _model(nodes: str, dims: str = "3, 4") -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["" : 18]> g (float[{dims}] x, int64 p0) => (float[U, V] y) {{ {nodes} }}'
    return onnx.parser.parse_model(text)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_with_known_positions(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    check(Case(name, _model(CHAINS[name]), {"x": x, "p0": np.array(0)}))


def test_a_body_for_each_element() -> None:
    nodes = """
        s = SplitToSequence (x)
        m = SequenceMap (s, x) <body = each (float[R, C] row, float[N, M] whole) => (float[N, M] z) {
            shifted = Sub (whole, row)
            z = Mul (shifted, whole)
        }>
        y = ConcatFromSequence <axis = 0> (m)
    """
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    # The reference evaluator has no SequenceMap that starts.
    case = Case(
        "mapped", _model(nodes), {"x": x, "p0": np.array(0)}, lambda x, _: np.vstack([(x - row) * x for row in x])
    )
    check(case)


def test_a_body_with_a_choice_for_each_element() -> None:
    nodes = """
        s = SplitToSequence (x)
        m = SequenceMap (s) <body = each (float[R, C] row) => (float[R, C] z) {
            total = ReduceSum <keepdims = 0> (row)
            zero = Sub (total, total)
            positive = Greater (total, zero)
            z = If (positive) <then_branch = t () => (float[R, C] o) { o = Mul (row, row) },
                               else_branch = e () => (float[R, C] o) { o = Sin (row) }>
        }>
        y = ConcatFromSequence <axis = 0> (m)
    """
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)

    def mapped(x: np.ndarray, _: np.ndarray) -> np.ndarray:
        return np.where(x.sum(axis=1, keepdims=True) > 0, x**2, np.sin(x))

    check(Case("chosen", _model(nodes), {"x": x, "p0": np.array(0)}, mapped))


# How often the Loop runs, what decides on going on, and the rounds that make it so.
ROUNDS = {
    "counted": ("most = Constant <value_int = 3> ()", "more = Identity (on)", 3),
    "as long as the sequence": ("t = SplitToSequence (x)  most = SequenceLength (t)", "more = Identity (on)", 3),
    "stopped": ("most = Constant <value_int = 9> ()", "few = Constant <value_int = 1> ()  more = Less (i, few)", 2),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_a_loop_that_carries_a_sequence(name: str) -> None:
    most, more, rounds = ROUNDS[name]
    nodes = f"""
        {most}
        go = Constant <value = bool {{1}}> ()
        s = SequenceConstruct (x)
        t2, squares = Loop (most, go, s) <body = step (int64 i, bool on, seq(float[N, M]) old)
            => (bool more, seq(float[N, M]) new, float[N, M] square) {{
            end = Constant <value_int = -1> ()
            last = SequenceAt (old, end)
            factor = Cast <to = 1> (i)
            shifted = Add (last, factor)
            next = Sin (shifted)
            square = Mul (next, last)
            new = SequenceInsert (old, next)
            {more}
        }}>
        tail = Constant <value_int = -1> ()
        z = SequenceAt (t2, tail)
        sum = ReduceSum <keepdims = 0> (squares, first)
        y = Add (z, sum)
    """
    model = _model(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "first"))

    def stepped(x: np.ndarray, _: np.ndarray) -> np.ndarray:
        total = 0
        for step in range(rounds):
            x, before = np.sin(x + step), x
            total = total + x * before
        return x + total

    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert check(Case(name, model, {"x": x, "p0": np.array(0)}, stepped))


def _writing(most: int) -> onnx.ModelProto:
    """A Loop that hands a sequence on, and writes what nothing reads."""
    return _model(f"""
        most = Constant <value_int = {most}> ()
        go = Constant <value = bool {{1}}> ()
        s = SequenceConstruct (x)
        t, unread = Loop (most, go, s) <body = step (int64 i, bool on, seq(float[N, M]) old)
            => (bool more, seq(float[N, M]) new, float[N, M] square) {{
            more = Identity (on)
            square = Mul (x, x)
            new = SequenceInsert (old, square)
        }}>
        last = Constant <value_int = -1> ()
        y = SequenceAt (t, last)
    """)


def test_a_loop_whose_writing_has_no_name() -> None:
    model = _writing(2)
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    loop.output[1] = ""
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert check(Case("unread", model, {"x": x, "p0": np.array(0)}, lambda x, _: x**2))


def test_a_loop_of_no_rounds_that_writes_stays_a_loop() -> None:
    assert "Loop" in {gap.operator for gap in find_gaps(_writing(0), ["x"], "y")}


def test_a_loop_of_too_many_rounds_is_not_written_out() -> None:
    nodes = """
        most = Constant <value_int = 1000000> ()
        go = Constant <value = bool {1}> ()
        s = SequenceConstruct (x)
        t = Loop (most, go, s) <body = step (int64 i, bool on, seq(float[N, M]) old)
            => (bool more, seq(float[N, M]) new) { more = Identity (on)  new = SequenceInsert (old, x) }>
        first = Constant <value_int = 0> ()
        y = SequenceAt (t, first)
    """
    assert "Loop" in {gap.operator for gap in find_gaps(_model(nodes), ["x"], "y")}


def test_loops_within_loops_do_not_multiply() -> None:
    nodes = """
        most = Constant <value_int = 1000> ()
        go = Constant <value = bool {1}> ()
        s = SequenceConstruct (x)
        t = Loop (most, go, s) <body = outer (int64 i, bool on, seq(float[N, M]) old)
            => (bool more, seq(float[N, M]) new) {
            more = Identity (on)
            new = Loop (most, go, old) <body = inner (int64 j, bool up, seq(float[N, M]) before)
                => (bool further, seq(float[N, M]) after) {
                further = Identity (up)
                after = SequenceInsert (before, x)
            }>
        }>
        first = Constant <value_int = 0> ()
        y = SequenceAt (t, first)
    """
    assert "Loop" in {gap.operator for gap in find_gaps(_model(nodes), ["x"], "y")}


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("is_new", [0, 1])
def test_a_list_of_a_loop_joined_along_any_axis(axis: int, is_new: int) -> None:
    if not is_new and axis == 2:
        axis = -2  # of two axes
    nodes = f"""
        go = Constant <value = bool {{1}}> ()
        e = SequenceEmpty ()
        s = Loop (p0, go, e) <body = step (int64 i, bool on, seq(float[N, M]) old)
            => (bool more, seq(float[N, M]) new) {{
            more = Identity (on)
            factor = Cast <to = 1> (i)
            scaled = Mul (x, factor)
            each = Sin (scaled)
            new = SequenceInsert (old, each)
        }}>
        y = ConcatFromSequence <axis = {axis}, new_axis = {is_new}> (s)
    """

    def joined(x: np.ndarray, count: np.ndarray) -> np.ndarray:
        parts = [np.sin(x * step) for step in range(int(count))]
        return np.stack(parts, axis) if is_new else np.concatenate(parts, axis)

    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    model = _model(nodes, "N, M")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert check(Case(f"{axis} {is_new}", model, {"x": x, "p0": np.array(4)}, joined))


def test_a_row_of_an_unknown_number() -> None:
    nodes = """
        s = SplitToSequence <keepdims = 0> (x)
        i = Constant <value_int = 1> ()
        y = SequenceAt (s, i)
    """
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    check(Case("rows", _model(nodes, "N, M"), {"x": x, "p0": np.array(0)}))


UNKNOWN = {
    "position": ("s = SplitToSequence (x)  y = SequenceAt (s, p0)", "position"),
    "length": ("s = SplitToSequence (x)  y = ConcatFromSequence <axis = 0> (s)", "length"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_only_the_run_tells_is_a_gap(name: str) -> None:
    nodes, reason = UNKNOWN[name]
    gaps = find_gaps(_model(nodes, "N, M"), ["x"], "y")
    assert any(reason in gap.reason for gap in gaps)
