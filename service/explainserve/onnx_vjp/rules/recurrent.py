"""RNN, GRU and LSTM as Scans over time, one per direction: the gradient is that of the Scan.

What does not depend on the state, the product of the input and its weights, is computed for all steps at once. Rows
beyond the length of their sequence keep their state and give zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.bodies import emit_scan
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Refusal, composition
from explainserve.onnx_vjp.rules.indexing import counted
from explainserve.onnx_vjp.shapes import Dimension, TensorType

Activation = Callable[[Emitter, str], str]
Step = Callable[[Emitter, Sequence[str], str], Sequence[str]]
"""`(op, states, z)`: the states after a step, the hidden one first, from those before and the weighted input z."""


@composition("RNN")
def rnn(op: Emitter, node: Node) -> Sequence[str | None]:
    """H' = f(z + H R)."""
    layer = _Layer(op, node, "RNN")

    def step_of(way: _Direction) -> Step:
        (f,) = way.activations
        return lambda op, states, z: [f(op, op.Gemm(states[0], way.r, z, transB=1))]

    return layer.outputs(step_of)


@composition("GRU")
def gru(op: Emitter, node: Node) -> Sequence[str | None]:
    """u, r = f(z + H R) and n = g(z + (r H) R) or, linear before the reset, n = g(z + r (H R + b));
    H' = (1 - u) n + u H.
    """
    layer = _Layer(op, node, "GRU", own_bias=bool(node.attribute("linear_before_reset", 0)))

    def step_of(way: _Direction) -> Step:
        f, g = way.activations
        size = layer.hidden
        r_gates, r_new = (
            op.Slice(way.r, [start], [stop], [0]) for start, stop in ((0, 2 * size), (2 * size, 3 * size))
        )

        def step(op: Emitter, states: Sequence[str], z: str) -> Sequence[str]:
            (h,) = states
            z_gates, z_new = op.emit("Split", z, [2 * size, size], outputs=2, axis=1)
            gates = f(op, op.Gemm(h, r_gates, z_gates, transB=1))
            update, reset = op.emit("Split", gates, outputs=2, axis=1, num_outputs=2)
            if layer.own_bias:
                new = g(op, op.Add(z_new, op.Mul(reset, op.Gemm(h, r_new, way.bias, transB=1))))
            else:
                new = g(op, op.Gemm(op.Mul(reset, h), r_new, z_new, transB=1))
            return [op.Add(new, op.Mul(update, op.Sub(h, new)))]

        return step

    return layer.outputs(step_of)


@composition("LSTM")
def lstm(op: Emitter, node: Node) -> Sequence[str | None]:
    """i, o, f = f(z + H R), c = g(z + H R); C' = f C + i c, H' = o h(C'). Peepholes add p C to i and f, p C' to o."""
    layer = _Layer(op, node, "LSTM")
    coupled = node.attribute("input_forget", 0)

    def step_of(way: _Direction) -> Step:
        f, g, h = way.activations
        size = layer.hidden

        def step(op: Emitter, states: Sequence[str], z: str) -> Sequence[str]:
            hidden, cell = states
            z_gates, z_cell = op.emit("Split", op.Gemm(hidden, way.r, z, transB=1), [3 * size, size], outputs=2, axis=1)
            gates = z_gates if way.peepholes else f(op, z_gates)
            enter, leave, keep = op.emit("Split", gates, outputs=3, axis=1, num_outputs=3)
            if way.peepholes:
                enter, keep = (
                    f(op, op.Add(gate, op.Mul(p, cell)))
                    for gate, p in zip((enter, keep), way.peepholes[::2], strict=True)
                )
            keep = op.Sub(1, enter) if coupled else keep
            cell = op.Add(op.Mul(keep, cell), op.Mul(enter, g(op, z_cell)))
            leave = f(op, op.Add(leave, op.Mul(way.peepholes[1], cell))) if way.peepholes else leave
            return [op.Mul(leave, h(op, cell)), cell]

        return step

    return layer.outputs(step_of)


_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_STATES = {"RNN": 1, "GRU": 1, "LSTM": 2}
_ACTIVATIONS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


@dataclass(frozen=True)
class _Direction:
    """What one direction computes with: the weighted input of all steps, (time, rows, gates * hidden); the weights of
    the state, (gates * hidden, hidden), and their bias where it is not in the weighted input; three peepholes.
    """

    backward: bool
    z: str
    r: str
    bias: str | None
    peepholes: Sequence[str]
    states: Sequence[str]
    activations: Sequence[Activation]


class _Layer:
    """What RNN, GRU and LSTM have in common: their inputs, directions, layouts and outputs.

    `own_bias`: the bias of the last gate's state weights is not part of the weighted input.
    """

    def __init__(self, op: Emitter, node: Node, operator: str, own_bias: bool = False) -> None:
        self.op, self.node, self.operator, self.own_bias = op, node, operator, own_bias
        self.rows_first = bool(node.attribute("layout", 0))
        self.x = op.Transpose(node.inputs[0], perm=[1, 0, 2]) if self.rows_first else node.inputs[0]
        self.hidden = self._hidden()
        self.gates = _GATES[operator]
        self.steps, self.rows = (op.shape(self.x) or (None, None))[:2]

    def _hidden(self) -> int:
        shape = self.op.shape(self.node.inputs[2])
        size = self.node.attribute("hidden_size") or (shape[2] if shape is not None else None)
        if not isinstance(size, int):
            raise Refusal("the size of its state is unknown", "store its weights in the file")
        return size

    def outputs(self, step_of: Callable[[_Direction], Step]) -> list[str | None]:
        """Y and the final states, both in the layout of the node."""
        op, results = self.op, []
        for way in self._directions():
            step, mask = step_of(way), self._mask()
            rows = [way.z, *([mask] if mask else [])]
            results.append(emit_scan(op, way.states, rows, partial(_masked, step), written=1, backward=way.backward))
        *states, y = ([result[index] for result in results] for index in range(len(results[0])))
        whole = op.Concat(*(op.Unsqueeze(part, [1]) for part in y), axis=1)
        final = [op.Concat(*(op.Unsqueeze(part, [0]) for part in parts), axis=0) for parts in states]
        if self.rows_first:
            whole, final = op.Transpose(whole, perm=[2, 0, 1, 3]), [op.Transpose(s, perm=[1, 0, 2]) for s in final]
        return [whole, *final]

    def _directions(self) -> Iterator[_Direction]:
        direction = self.node.attribute("direction", "forward")
        backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
        activations = _activations(self.node, _ACTIVATIONS[self.operator], len(backward))
        for index, back in enumerate(backward):
            yield _Direction(
                back,
                self._weighted(index),
                self._declared(self._part(2, index), self.gates * self.hidden, self.hidden),
                self._last_bias(index),
                self._peepholes(index),
                self._initial(index),
                activations[index],
            )

    def _part(self, position: int, index: int) -> str:
        """The share of one direction in an input."""
        return self.op.Gather(self.node.inputs[position], np.array(index), axis=0)

    def _declared(self, value: str, *shape: Dimension) -> str:
        """A value whose shape the operator fixes, although the model may call its sizes by other names."""
        self.op.graph.shapes.declare(value, TensorType(self.op.graph.dtype(value), shape))
        return value

    def _weighted(self, index: int) -> str:
        """z = x W + b."""
        op, size = self.op, self.gates * self.hidden
        z = op.MatMul(self.x, op.transposed(self._declared(self._part(1, index), size, None)))
        bias = self._bias(index) if self.node.input(3) else None
        return self._declared(op.Add(z, bias) if bias else z, self.steps, self.rows, size)

    def _bias(self, index: int) -> str:
        op, size = self.op, self.gates * self.hidden
        of_input, of_state = op.emit("Split", self._part(3, index), [size, size], outputs=2, axis=0)
        if self.own_bias:
            shared = op.Slice(of_state, [0], [size - self.hidden], [0])
            of_state = op.Concat(shared, op.array(np.zeros(self.hidden, op.numpy_dtype(self.x))), axis=0)
        return op.Add(of_input, of_state)

    def _last_bias(self, index: int) -> str | None:
        if not self.own_bias or not self.node.input(3):
            return None
        end = 2 * self.gates * self.hidden
        return self.op.Slice(self._part(3, index), [end - self.hidden], [end], [0])

    def _peepholes(self, index: int) -> Sequence[str]:
        if self.operator != "LSTM" or not self.node.input(7):
            return ()
        return self.op.emit("Split", self._part(7, index), outputs=3, axis=0, num_outputs=3)

    def _initial(self, index: int) -> list[str]:
        """The states before the first step, (rows, hidden); zeros where they are not given."""
        return [self._state(position, index) for position in (5, 6)[: _STATES[self.operator]]]

    def _state(self, position: int, index: int) -> str:
        op, given = self.op, self.node.input(position)
        if given:
            value = op.Gather(given, np.array(index), axis=1 if self.rows_first else 0)
        else:
            value = op.zeros(op.Concat(op.dim(self.x, 1), [self.hidden], axis=0), self.x)
        return self._declared(value, self.rows, self.hidden)

    def _mask(self) -> str | None:
        """Which steps are within the sequence of each row, (time, rows, 1); None where all are."""
        op, lengths = self.op, self.node.input(4)
        known = op.constant(lengths)
        if not lengths or (known is not None and np.all(known == self.steps)):
            return None
        times = op.Reshape(counted(op, op.dim(self.x, 0)), [-1, 1, 1])
        within = op.Less(times, op.Reshape(op.Cast(lengths, to=TensorProto.INT64), [1, -1, 1]))
        return self._declared(within, self.steps, self.rows, 1)


def _masked(step: Step, op: Emitter, states: Sequence[str], rows: Sequence[str]) -> list[str]:
    """The states after a step, and what it writes."""
    z, *mask = rows
    after = list(step(op, states, z))
    if not mask:
        return [*after, after[0]]
    return [
        *(op.Where(mask[0], new, old) for new, old in zip(after, states, strict=True)),
        op.Where(mask[0], after[0], 0),
    ]


# -- activations -------------------------------------------------------------------------------------------------------

# By name: the function of (op, x, alpha, beta), and the defaults of alpha and beta, None where it has none.
_FUNCTIONS: dict[str, tuple[Callable[[Emitter, str, Any, Any], str], float | None, float | None]] = {
    "affine": (lambda op, x, alpha, beta: op.Add(op.Mul(x, alpha), beta), 1.0, 0.0),
    "elu": (lambda op, x, alpha, beta: op.Elu(x, alpha=alpha), 1.0, None),
    "hardsigmoid": (lambda op, x, alpha, beta: op.HardSigmoid(x, alpha=alpha, beta=beta), 0.2, 0.5),
    "leakyrelu": (lambda op, x, alpha, beta: op.LeakyRelu(x, alpha=alpha), 0.01, None),
    "relu": (lambda op, x, alpha, beta: op.Relu(x), None, None),
    "scaledtanh": (lambda op, x, alpha, beta: op.Mul(op.Tanh(op.Mul(x, beta)), alpha), 1.0, 1.0),
    "sigmoid": (lambda op, x, alpha, beta: op.Sigmoid(x), None, None),
    "softplus": (lambda op, x, alpha, beta: op.Softplus(x), None, None),
    "softsign": (lambda op, x, alpha, beta: op.Softsign(x), None, None),
    "tanh": (lambda op, x, alpha, beta: op.Tanh(x), None, None),
    "thresholdedrelu": (lambda op, x, alpha, beta: op.ThresholdedRelu(x, alpha=alpha), 1.0, None),
}


def _activations(node: Node, defaults: Sequence[str], directions: int) -> list[list[Activation]]:
    """The activations of each direction, clipped before where the node says so. Alphas and betas are taken in order
    by the functions that have them.
    """
    names = [str(name) for name in node.attribute("activations") or [*defaults] * directions]
    alphas, betas = (iter(node.attribute(f"activation_{name}") or ()) for name in ("alpha", "beta"))
    clip, found = node.attribute("clip"), list[Activation]()
    for name in names:
        if name.lower() not in _FUNCTIONS:
            raise Refusal(f"its activation '{name}' is unknown", "use an activation that ONNX defines")
        function, alpha, beta = _FUNCTIONS[name.lower()]
        alpha = next(alphas, alpha) if alpha is not None else None
        beta = next(betas, beta) if beta is not None else None
        found.append(partial(_activated, function, alpha, beta, clip))
    return [found[start : start + len(defaults)] for start in range(0, len(found), len(defaults))]


def _activated(
    function: Callable[[Emitter, str, Any, Any], str], alpha: Any, beta: Any, clip: float | None, op: Emitter, x: str
) -> str:
    return function(op, op.Clip(x, -clip, clip) if clip else x, alpha, beta)
