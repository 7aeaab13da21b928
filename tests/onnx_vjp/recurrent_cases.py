"""Cases of RNN, GRU and LSTM, with what onnx says of them written out in numpy: its reference evaluator knows neither
lengths nor activations, clipping, or the final states of both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from onnx_vjp.vjp_oracle import Case, single

_rng = np.random.default_rng(5)
STEPS, ROWS, INPUT, HIDDEN = 4, 3, 2, 5
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


# Name: (function of x, alpha, beta; defaults of alpha and beta where it has them).
FUNCTIONS: dict[str, tuple[Callable[..., np.ndarray], tuple[float, ...]]] = {
    "Affine": (lambda x, a, b: a * x + b, (1.0, 0.0)),
    "Elu": (lambda x, a: np.where(x < 0, a * (np.exp(x) - 1), x), (1.0,)),
    "HardSigmoid": (lambda x, a, b: np.clip(a * x + b, 0, 1), (0.2, 0.5)),
    "LeakyRelu": (lambda x, a: np.where(x < 0, a * x, x), (0.01,)),
    "Relu": (lambda x: np.maximum(x, 0), ()),
    "ScaledTanh": (lambda x, a, b: a * np.tanh(b * x), (1.0, 1.0)),
    "Sigmoid": (_sigmoid, ()),
    "Softplus": (lambda x: np.log1p(np.exp(x)), ()),
    "Softsign": (lambda x: x / (1 + np.abs(x)), ()),
    "Tanh": (np.tanh, ()),
    "ThresholdedRelu": (lambda x, a: np.where(x > a, x, 0), (1.0,)),
}


def _activations(
    operator: str, directions: int, attributes: dict[str, Any]
) -> list[Callable[[np.ndarray], np.ndarray]]:
    given = [iter(attributes.get(f"activation_{name}", ())) for name in ("alpha", "beta")]
    clip = attributes.get("clip", np.inf)

    def activation(name: str) -> Callable[[np.ndarray], np.ndarray]:
        function, defaults = FUNCTIONS[name]
        values = [next(values, default) for values, default in zip(given, defaults, strict=False)]
        return lambda x: function(np.clip(x, -clip, clip), *values)

    return [activation(name) for name in attributes.get("activations", DEFAULTS[operator] * directions)]


def recurrent(
    operator: str, names: Sequence[str], attributes: dict[str, Any], constants: dict[str, np.ndarray], *values: Any
) -> list[np.ndarray]:
    """All outputs of an operator whose inputs are called as in `recurrent_cases`."""
    feeds = {**constants, **dict(zip(names, values, strict=True))}
    x, layout = feeds["x"], attributes.get("layout", 0)
    x = np.swapaxes(x, 0, 1) if layout else x
    directions = feeds["w"].shape[0]
    lengths = feeds.get("n", np.full(x.shape[1], x.shape[0]))
    zero = np.zeros((directions, x.shape[1], HIDDEN))
    given = {name: np.swapaxes(feeds[name], 0, 1) if layout else feeds[name] for name in "hc" if name in feeds}
    states = [given.get(name, zero) for name in ("hc" if operator == "LSTM" else "h")]
    functions = _activations(operator, directions, attributes)
    each = len(functions) // directions
    whole, final = np.zeros((x.shape[0], directions, x.shape[1], HIDDEN)), []
    for index in range(directions):
        backward = attributes.get("direction", "forward") == "reverse" or index == 1
        parts = {name: feeds[name][index] for name in ("w", "r", "b", "p") if name in feeds}
        step = partial(_STEPS[operator], functions[index * each : (index + 1) * each], attributes, parts)
        now = [state[index] for state in states]
        for time in reversed(range(len(x))) if backward else range(len(x)):
            inside = (time < lengths)[:, None]
            after = step(x[time], *now)
            whole[time, index] = np.where(inside, after[0], 0)
            now = [np.where(inside, new, old) for new, old in zip(after, now, strict=True)]
        final.append(now)
    last = [np.stack(parts) for parts in zip(*final, strict=True)]
    if layout:
        return [whole.transpose(2, 0, 1, 3), *(np.swapaxes(state, 0, 1) for state in last)]
    return [whole, *last]


def _biases(parts: dict[str, np.ndarray], gates: int) -> np.ndarray:
    return parts.get("b", np.zeros(2 * gates * HIDDEN)).reshape(2, gates, HIDDEN)


def _rnn(
    functions: Any, _: dict[str, Any], parts: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray
) -> list[np.ndarray]:
    return [functions[0](x @ parts["w"].T + h @ parts["r"].T + _biases(parts, 1).sum(axis=(0, 1)))]


def _gru(
    functions: Any, attributes: dict[str, Any], parts: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray
) -> list[np.ndarray]:
    f, g = functions
    w, r = (parts[name].reshape(3, HIDDEN, -1) for name in "wr")
    wb, rb = _biases(parts, 3)
    z, reset = (f(x @ w[i].T + h @ r[i].T + wb[i] + rb[i]) for i in (0, 1))
    if attributes.get("linear_before_reset"):
        new = g(x @ w[2].T + reset * (h @ r[2].T + rb[2]) + wb[2])
    else:
        new = g(x @ w[2].T + (reset * h) @ r[2].T + rb[2] + wb[2])
    return [(1 - z) * new + z * h]


def _lstm(
    functions: Any,
    attributes: dict[str, Any],
    parts: dict[str, np.ndarray],
    x: np.ndarray,
    h: np.ndarray,
    c: np.ndarray,
) -> list[np.ndarray]:
    f, g, out = functions
    w, r = (parts[name].reshape(4, HIDDEN, -1) for name in "wr")
    b = _biases(parts, 4).sum(axis=0)
    p = parts.get("p", np.zeros(3 * HIDDEN)).reshape(3, HIDDEN)
    i, o, keep, new = (x @ w[k].T + h @ r[k].T + b[k] for k in range(4))
    i = f(i + p[0] * c)
    keep = 1 - i if attributes.get("input_forget") else f(keep + p[2] * c)
    c = keep * c + i * g(new)
    return [f(o + p[1] * c) * out(c), c]


_STEPS = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}


def _x(*shape: int) -> np.ndarray:
    return (0.5 * _rng.standard_normal(shape)).astype(np.float32)


def recurrent_case(
    operator: str, given: str = "", *, dynamic: bool = False, outputs: int = 0, **attributes: Any
) -> Case:
    """A case with the optional inputs that the letters of `given` name: bias, lengths (n), states (h, c), peepholes."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    gates, layout = GATES[operator], attributes.get("layout", 0)
    state = (ROWS, directions, HIDDEN) if layout else (directions, ROWS, HIDDEN)
    feeds = {
        "x": _x(*((ROWS, STEPS, INPUT) if layout else (STEPS, ROWS, INPUT))),
        "w": _x(directions, gates * HIDDEN, INPUT),
        "r": _x(directions, gates * HIDDEN, HIDDEN),
        "b": _x(directions, 2 * gates * HIDDEN),
        "n": np.array([4, 1, 2][:ROWS], np.int32),
        "h": _x(*state),
        "c": _x(*state),
        "p": _x(directions, 3 * HIDDEN),
    }
    last = max([2, *(list(feeds).index(name) for name in given)])
    inputs = {(key if key in "xwr" + given else f"_{key}"): value for key, value in list(feeds.items())[: last + 1]}
    present = [key for key in inputs if not key.startswith("_")]
    varying = [key for key in present if key != "n" or dynamic]
    count = outputs or (3 if operator == "LSTM" else 2)
    function = partial(recurrent, operator, varying, attributes, {"n": feeds["n"]} if "n" in given else {})
    return single(
        operator,
        inputs,
        outputs=count,
        checked=count,
        version=22,
        name=f"{given}-{attributes}-{count}",
        dynamic=("n",) if dynamic else None,
        function=lambda *values: function(*values)[:count],
        hidden_size=HIDDEN,
        **attributes,
    )


def recurrent_cases() -> Iterator[Case]:
    """Directions, layouts, inputs, outputs, and every activation.

    Alphas and betas are given where onnxruntime has defaults of its own, other than those of onnx.
    """
    for operator, direction in zip(GATES, ("forward", "reverse", "bidirectional"), strict=True):
        yield recurrent_case(operator, "bnh", direction=direction)
        yield recurrent_case(operator, "bnh", direction=direction, dynamic=True)
        yield recurrent_case(operator, "bh", layout=1, direction="bidirectional", outputs=1)
        yield recurrent_case(operator, "", clip=0.3)
    for name, (_, defaults) in FUNCTIONS.items():
        given = dict(zip(("activation_alpha", "activation_beta"), ([value + 0.1] for value in defaults), strict=False))
        yield recurrent_case("RNN", "b", activations=[name], **given)
    ways = {"activation_alpha": [0.4, 0.3], "activation_beta": [0.6, 0.7]}
    yield recurrent_case("RNN", "b", activations=["Affine", "Elu"], direction="bidirectional", **ways)
    yield recurrent_case("GRU", "b", activations=["HardSigmoid", "LeakyRelu"], **ways)
    yield recurrent_case("GRU", "b", activations=["HardSigmoid", "Softplus"], linear_before_reset=1)
    yield recurrent_case("LSTM", "bhc", activations=["HardSigmoid", "ScaledTanh", "Softsign"], **ways)
    for before in (0, 1):
        yield recurrent_case("GRU", "bnh", linear_before_reset=before, clip=0.4)
        yield recurrent_case("GRU", "", linear_before_reset=before, direction="reverse")
    for coupled in (0, 1):
        yield recurrent_case("LSTM", "bnhcp", input_forget=coupled, direction="bidirectional", dynamic=True)
        yield recurrent_case("LSTM", "cp", input_forget=coupled, clip=0.45, layout=1)
