"""DeepLIFT's rescale rule (Shrikumar et al. 2017, arXiv:1704.02685, section 3.5) on exported graphs.

Rows go forward together with the starts of their paths: the first half of a batch is compared with the second. Back
come multipliers in place of derivatives: a function of one tensor has the slope of its secant, and what is linear its
derivative. What ONNX graphs have beside it, products of two tensors that vary, is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from explainserve.backends.aten import arguments, operator
from explainserve.backends.exported_rule import Copies, Copy, NoRule, Route
from explainserve.signature import ScoreHead

RULE = "deeplift_rescale"

SMALLEST_DIFFERENCE = 1e-7
"""Smaller differences have the slope of the tangent: their quotient would be rounding."""

_LINEAR = frozenset(
    """
    view reshape flatten unflatten transpose permute t squeeze unsqueeze expand slice select narrow split chunk cat
    stack clone contiguous to _to_copy dropout pad constant_pad_nd add sub rsub neg mean sum avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest2d upsample_bilinear2d
    batch_norm _native_batch_norm_legit_no_training alias _unsafe_view embedding
    """.split()  # noqa: SIM905 (a list of words is read more easily than one of strings)
)
_BILINEAR = frozenset(
    """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d linear addmm mm matmul bmm mul
    div
    """.split()  # noqa: SIM905
)
_OF_ONE_TENSOR = frozenset(
    """
    relu relu6 leaky_relu elu celu selu hardtanh clamp clamp_min clamp_max sigmoid tanh gelu silu hardswish hardsigmoid
    mish softplus exp log sqrt rsqrt reciprocal abs sin cos erf pow
    """.split()  # noqa: SIM905
)
_POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d"})
_SOFTMAX = frozenset({"softmax", "log_softmax"})


def deeplift_rule(route: Route) -> Copy:
    """The rescale rule on a route."""

    def copied(graph: Graph, node: Node, copies: Copies) -> Node:
        _check(node, route.varying)
        return _copied(graph, node, copies)

    return copied


def _copied(graph: Graph, node: Node, copies: Copies) -> Node:
    """A node of another graph in this one, where it has the rule."""
    name = operator(node)
    if name in _OF_ONE_TENSOR:
        source = node.all_input_nodes[0]
        return graph.call_function(rescaled, (copies[source], graph.node_copy(node, copies.__getitem__)))
    if name in _POOLS:
        pool: Any = node.target
        return graph.call_function(max_pooled, (copies[node.all_input_nodes[0]], pool, *node.args[1:]))
    if name in _SOFTMAX:
        function = softmax if name == "softmax" else log_softmax
        return graph.call_function(function, (copies[node.all_input_nodes[0]], arguments(node)["dim"]))
    return graph.node_copy(node, copies.__getitem__)


def headed(output: Tensor, head: ScoreHead, axis: int) -> Tensor:
    """The score of a batch and of what it is compared with."""
    functions: dict[ScoreHead, Callable[[Tensor], Tensor]] = {
        **dict.fromkeys((ScoreHead.IDENTITY, ScoreHead.PRE_ACTIVATION), lambda x: x),
        ScoreHead.SOFTMAX: lambda x: softmax(x, axis),
        ScoreHead.LOG_SOFTMAX: lambda x: log_softmax(x, axis),
        ScoreHead.SIGMOID: lambda x: rescaled(x, x.sigmoid()),
        ScoreHead.LOG_SIGMOID: lambda x: rescaled(x, torch.nn.functional.logsigmoid(x)),
        ScoreHead.LOG: lambda x: rescaled(x, x.log()),
    }
    return functions[head](output)


def rescaled(source: Tensor, value: Tensor) -> Tensor:
    """The value of a function of one tensor, with the slope of its secant."""
    passed: Tensor = _Rescaled.apply(source, value)  # type: ignore[no-untyped-call]
    return passed


def max_pooled(source: Tensor, pool: Callable[..., Tensor], *options: Any) -> Tensor:
    """Maxima; what the larger of both exceeds the other by is due to its own position."""
    passed: Tensor = _MaxPooled.apply(source, lambda x: pool(x, *options))  # type: ignore[no-untyped-call]
    return passed


def log_softmax(source: Tensor, axis: int) -> Tensor:
    """x - log sum exp(x), each step with its rule."""
    half = len(source) // 2
    largest = torch.maximum(source[:half], source[half:]).amax(axis, keepdim=True).detach()
    top = torch.cat([largest, largest])
    exponentials = rescaled(source, (source - top).exp())
    total = exponentials.sum(axis, keepdim=True)
    return source - top - rescaled(total, total.log())


def softmax(source: Tensor, axis: int) -> Tensor:
    """exp of `log_softmax`."""
    logarithms = log_softmax(source, axis)
    return rescaled(logarithms, logarithms.exp())


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(source, value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """Through the secant, or where there is none through the function itself."""
        dx, dy = (_difference(tensor) for tensor in ctx.saved_tensors)
        g = cotangents[0][: len(dx)]
        apart = dx.abs() > SMALLEST_DIFFERENCE
        secant = torch.where(apart, g * dy / torch.where(apart, dx, 1), 0)
        return _with_zeros(secant), _with_zeros(torch.where(apart, 0, g))


class _MaxPooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(source)
        ctx.pool = pool
        return pool(source)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (source,) = ctx.saved_tensors
        dx = _difference(source)
        g = cotangents[0][: len(dx)]
        with torch.enable_grad():
            points = source.detach().requires_grad_()
            maxima = ctx.pool(points)
        own, other = maxima[: len(dx)].detach(), maxima[len(dx) :].detach()
        larger = torch.maximum(own, other)
        moved = torch.cat([g * (larger - other), g * (own - larger)])
        (routed,) = torch.autograd.grad(maxima, points, moved, retain_graph=True)
        (tangent,) = torch.autograd.grad(maxima, points, _with_zeros(g))
        apart = dx.abs() > SMALLEST_DIFFERENCE
        secant = (routed[: len(dx)] + routed[len(dx) :]) / torch.where(apart, dx, 1)
        return _with_zeros(torch.where(apart, secant, tangent[: len(dx)])), None


def _difference(both: Tensor) -> Tensor:
    half = len(both) // 2
    return both[:half] - both[half:]


def _with_zeros(own: Tensor) -> Tensor:
    """What passes back to a batch and what it is compared with: nothing to the latter."""
    return torch.cat([own, torch.zeros_like(own)])


def _check(node: Node, varying: Collection[Node]) -> None:
    """Raises NoRule."""
    name = operator(node)
    if node.op != "call_function" or name in _LINEAR or name in _POOLS or name in _SOFTMAX:
        return
    factors = [value for value in arguments(node).values() if isinstance(value, Node) and value in varying]
    of_quotient = name == "div" and arguments(node)["other"] in factors
    if of_quotient or name not in _OF_ONE_TENSOR | _BILINEAR:
        raise NoRule(node, "DeepLIFT has no rule for it here")
    if len(factors) > 1:
        raise NoRule(node, "DeepLIFT has no rule for it here where several tensors vary")
