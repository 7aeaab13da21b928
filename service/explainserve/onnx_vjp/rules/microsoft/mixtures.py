"""Mixtures of experts, all of which are computed: those that a token is not sent to have the weight zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Refusal, composition
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN, silu


@composition("MoE", domain=DOMAIN)
def mixture_of_experts(op: Emitter, node: Node) -> Sequence[str]:
    """The sum over experts of routing weight times second layer of activation of first layer."""
    x, router = node.inputs[:2]
    if node.attribute("use_sparse_mixer", 0):
        raise Refusal("experts are chosen by the sparse mixer", "route by the best scores")
    tokens = op.Reshape(x, op.Concat([-1], op.dim(x, -1), axis=0))
    hidden = _hidden(op, node, op.Unsqueeze(tokens, [0]))
    results = _layer(op, hidden, node.input(4), node.input(5))
    weights = op.Unsqueeze(op.Transpose(_routing(op, node, router), perm=[1, 0]), [2])
    return (op.reshape_like(op.ReduceSum(op.Mul(results, weights), [0], keepdims=0), x),)


def _routing(op: Emitter, node: Node, router: str) -> str:
    """(tokens, experts): the shares of the best experts, zero elsewhere."""
    shares = op.Softmax(router, axis=1)
    best, chosen = op.emit("TopK", shares, [node.attribute("k", 1)], outputs=2, axis=1)
    if node.attribute("normalize_routing_weights", 0):
        best = op.Div(best, op.ReduceSum(best, [1], keepdims=1))
    return op.ScatterElements(op.zeros_like(shares), chosen, best, axis=1)


def _layer(op: Emitter, x: str, weights: str, bias: str) -> str:
    """(experts or 1, tokens, inputs) through the layer of each expert, whose weights are (experts, outputs, inputs)."""
    y = op.MatMul(x, op.transposed(weights))
    return op.Add(y, op.Unsqueeze(bias, [1])) if bias else y


def _hidden(op: Emitter, node: Node, x: str) -> str:
    """The first layer, activated, times a third one where there is one."""
    first = _layer(op, x, node.input(2), node.input(3))
    gate = _layer(op, x, node.input(6), node.input(7)) if node.input(6) else ""
    kind = node.attribute("activation_type", "relu")
    if kind == "swiglu":
        return _swiglu(op, node, *_halves(op, node, first, gate))
    if kind not in _ACTIVATIONS:
        raise Refusal(f"the activation '{kind}' is not known", "export the model with standard operators")
    hidden = _ACTIVATIONS[kind](op, first)
    return op.Mul(hidden, gate) if gate else hidden


_ACTIVATIONS: dict[str, Callable[[Emitter, str], str]] = {
    "relu": lambda op, x: op.Relu(x),
    "gelu": lambda op, x: op.emit("FastGelu", x, domain=DOMAIN)[0],
    "silu": silu,
    "identity": lambda op, x: x,
}


def _halves(op: Emitter, node: Node, first: str, gate: str) -> tuple[str, ...]:
    """Both factors, from a layer each, or from one in turns or side by side."""
    fusion = node.attribute("swiglu_fusion", 0)
    if not fusion:
        return first, gate
    if fusion == 2:
        return op.emit("Split", first, outputs=2, axis=2, num_outputs=2)
    pairs = op.Reshape(first, [0, 0, -1, 2])
    return tuple(op.Squeeze(part, [3]) for part in op.emit("Split", pairs, outputs=2, axis=3, num_outputs=2))


def _swiglu(op: Emitter, node: Node, g: str, linear: str) -> str:
    """g sigmoid(alpha g) (l + beta), both clamped where there is a limit."""
    alpha, beta = node.attribute("activation_alpha", 1.0), node.attribute("activation_beta", 0.0)
    limit = node.attribute("swiglu_limit")
    if limit is not None:
        g, linear = op.Clip(g, None, float(limit)), op.Clip(linear, -float(limit), float(limit))
    return op.Mul(op.Mul(g, op.Sigmoid(op.Mul(g, alpha))), op.Add(linear, beta))
