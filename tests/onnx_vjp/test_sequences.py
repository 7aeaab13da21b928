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
