"""Layer-wise relevance propagation on exported graphs: which ATen operators hand relevance down, and how.

The backward pass carries the relevance R of tensors in place of cotangents, from the explained output's own value on.
Linear layers share it out as `torch_lrp` says, and all else as `onnx_vjp.lrp` does in ONNX graphs, whose choices these
are: what routes, sums or passes relevance, what is merged with a layer, and which layers are first.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from explainserve.backends.aten import arguments, called, dependents, is_item, operator, stored
from explainserve.backends.exported_linear import (
    NORMALIZATIONS,
    Function,
    LinearLayer,
    MergedLayer,
    is_linear,
    merged_layer,
)
from explainserve.backends.exported_rule import Copies, Copy, NoRule, Parameters, Route, Stated
from explainserve.backends.torch_lrp import Distribution, Layer, LrpRules, stabilized

ROUTING = frozenset(
    """
    view reshape flatten unflatten transpose permute t squeeze unsqueeze expand expand_as slice select narrow split
    split_with_sizes chunk unbind cat stack clone contiguous to _to_copy alias _unsafe_view lift_fresh_copy dropout
    feature_dropout alpha_dropout pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d index_select gather index repeat tile where triu tril amax
    pixel_shuffle pixel_unshuffle max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    """.split()  # noqa: SIM905 (a list of words is read more easily than one of strings)
)
"""Every element of the output is one of the inputs, or their derivatives say which."""

SUMMING = NORMALIZATIONS | frozenset(
    """
    add sub rsub mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    """.split()  # noqa: SIM905
)
SCALING = frozenset({"mul", "div"})
_SHIFTING = NORMALIZATIONS | {"add", "sub", "rsub"}
"""Of a single tensor, they add constants."""

_ACTIVATIONS = frozenset(
    {"celu", "elu", "leaky_relu", "neg", "prelu", "_prelu_kernel", "relu", "relu6", "selu", "tanh"}
)
"""Functions of single elements that are zero at zero."""

_EXTREMES = frozenset({"maximum", "minimum"})
_BOUNDING = _EXTREMES | {"clamp", "clamp_min", "clamp_max", "hardtanh", "threshold"}
"""Of a single tensor, activations where they are zero at zero."""

_SIGN_KEEPING = frozenset(
    """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    flatten view reshape squeeze clone dropout max_pool1d max_pool2d max_pool3d max_pool2d_with_indices mean
    """.split()  # noqa: SIM905
)
"""Of what has no negative elements they make nothing that has."""

CARRIED = ROUTING | SUMMING | SCALING | _ACTIVATIONS | _BOUNDING
"""All operators beside linear layers that hand relevance down."""

Share = Callable[[Callable[..., Tensor], Sequence[Tensor], Tensor], Sequence[Tensor]]
"""From an operator as a function of what varies, the values of these, and the relevance of what it computes of them, to
their relevance."""


def relevance_rule(rules: LrpRules, route: Route, stated: Stated) -> Copy:
    """Layer-wise relevance propagation by `rules`."""
    return _Relevance(rules, route, stated).copied


class _Relevance:
    """Copies the nodes of a route so that they hand relevance down."""

    def __init__(self, rules: LrpRules, route: Route, stated: Stated) -> None:
        self._rules, self._route, self._bounds = rules, route, stated.bounds
        self._behind_layers = _behind_layers(route)

    def copied(self, graph: Graph, node: Node, copies: Copies) -> Any:
        """See `exported_rule.Copy`."""
        if is_item(node) and operator(node) in NORMALIZATIONS:
            return copies[node.all_input_nodes[0]]  # which stands for its first item
        merged = merged_layer(node, self._route)
        if merged is not None:
            return self._layer(graph, merged, copies)
        share = self._share(node)
        if share is None:
            return graph.node_copy(node, copies.__getitem__)
        given: Any = map_arg(node.args, copies.__getitem__)
        options: Any = map_arg(node.kwargs, copies.__getitem__)
        return graph.call_function(_sharing(node, self._live(node), share), given, options)

    def _layer(self, graph: Graph, merged: MergedLayer, copies: Copies) -> Node:
        layer, rules = merged.layer, self._rules
        distribution, ends = rules.convolution if layer.convolves else rules.dense, None
        if rules.first is not None and layer.source not in self._behind_layers:
            distribution = rules.first
            ends = self._at_bounds(graph, layer, copies) if rules.boxed else None
        operation = _distributing(layer.function, distribution, _is_rectified(layer.source))
        parameters = merged.parameters(graph, copies, self._route.held)
        z = graph.call_function(operation, (copies[layer.source], parameters, ends))
        for view in merged.views:
            z = graph.node_copy(view, ChainMap({view.all_input_nodes[0]: z}, dict(copies)).__getitem__)
        return z

    def _at_bounds(self, graph: Graph, layer: LinearLayer, copies: Copies) -> tuple[Node, Node]:
        """The layer's input where the inputs of the model have their least and their greatest values. What is in front
        of a first layer is not linear in several elements, but rearranges and rescales them.
        """
        front = [node for node in self._route.module.graph.nodes if node in self._route.varying]
        front = [node for node in front if layer.source in dependents(node)]
        names = {node: name for name, node in self._route.inputs.items()}
        stated = {node: self._bounds.get(names.get(node, "")) for node in front if node in self._route.explained}
        if not stated or None in stated.values():
            raise NoRule(
                layer.node,
                "the box rule needs the value range of what is in front of the layer",
                "state value_range in the configuration, and explain inputs",
            )
        least, greatest = (
            {node: graph.call_function(_filled(ends[end]), (copies[node],)) for node, ends in stated.items() if ends}
            for end in (0, 1)
        )
        for node in front:
            for twins in (least, greatest):
                if node not in twins:
                    twins[node] = graph.node_copy(node, ChainMap(twins, dict(copies)).__getitem__)
        return least[layer.source], greatest[layer.source]

    def _share(self, node: Node) -> Share | None:
        """How a node that is no layer hands relevance down; None by its derivative."""
        name = operator(node)
        if name in ROUTING or (name in _EXTREMES and len(self._live(node)) > 1):
            return None
        if name in SUMMING:
            return self._summed(node)
        if name in _ACTIVATIONS | SCALING:
            return self._passed(node)
        if name in _BOUNDING and not self._is_zero_at_zero(node):
            raise NoRule(node, "there is no rule for it where it is not zero at zero")
        if name in _BOUNDING:
            return self._passed(node)
        raise NoRule(node, "layer-wise relevance propagation has no rule for it")

    def _summed(self, node: Node) -> Share:
        """In proportion to contributions. In front of a first layer with a rule of its own, whose relevance is no
        multiple of its input, constants that are added get no share.
        """
        live = self._live(node)
        in_front = len(live) == 1 and node.args[live[0]] not in self._behind_layers
        if in_front and self._rules.first is not None and operator(node) in _SHIFTING:
            return _handed_on
        return _contributed(self._rules.epsilon)

    def _passed(self, node: Node) -> Share:
        """All relevance to the one argument that varies."""
        live = self._live(node)
        if len(live) != 1:
            raise NoRule(node, "there is no rule for it where several tensors vary")
        if operator(node) == "div" and live != [0]:
            raise NoRule(node, "there is no rule for a quotient whose denominator depends on what is explained")
        return _handed_on

    def _live(self, node: Node) -> list[int]:
        """The positions of the arguments that relevance is handed down to."""
        live = [i for i, value in enumerate(node.args) if isinstance(value, Node) and value in self._route.varying]
        if len({node.args[i] for i in live}) < len(self._route.varying.intersection(node.all_input_nodes)):
            raise NoRule(node, "there is no rule for it with a list of tensors, or one that is given by name")
        return live

    def _is_zero_at_zero(self, node: Node) -> bool:
        """Whether bounds that the file holds let zero through."""
        given = {name: self._at_zero(value) for name, value in arguments(node).items()}
        computed = any(isinstance(value, Node) for value in given.values())
        return not computed and not called(node.target, given).any()

    def _at_zero(self, value: Any) -> Any:
        """Zero in the place of what varies, and what the file holds; a node is what is computed."""
        if not isinstance(value, Node):
            return value
        if value in self._route.varying:
            return torch.zeros(1)
        held = stored(value, self._route.module)
        return value if held is None else held


def _behind_layers(route: Route) -> set[Node]:
    """The nodes of the whole graph that depend on the inputs through a linear layer."""
    varying, behind = set().union(*map(dependents, route.sources)), set[Node]()
    for node in route.module.graph.nodes:
        sources = varying.intersection(node.all_input_nodes)
        if node in varying and any(is_linear(source) or source in behind for source in sources):
            behind.add(node)
    return behind


def _is_rectified(node: Node) -> bool:
    """Whether what a node computes surely has no negative elements."""
    while is_item(node) or operator(node) in _SIGN_KEEPING:
        node = node.all_input_nodes[0]
    return operator(node) == "relu"


# --- what the nodes of the new graph do ------------------------------------------------------------------------------


def _distributing(function: Function, distribution: Distribution, rectified: bool) -> Callable[..., Tensor]:
    """A linear layer by a distribution."""

    def linear(a: Tensor, parameters: Parameters, ends: tuple[Tensor, Tensor] | None) -> Tensor:
        layer = Layer(function, a.detach(), *parameters, rectified, ends)
        with torch.no_grad():
            z = function(layer.a, layer.w, layer.b)
        return handed_down(z, lambda relevance: [distribution(layer, z, relevance)], a)

    return linear


def _sharing(node: Node, live: Sequence[int], share: Share) -> Callable[..., Tensor]:
    """An operator whose arguments at `live` get their share of relevance."""
    target: Any = node.target

    def shared(*given: Any, **options: Any) -> Tensor:
        def function(*values: Tensor) -> Tensor:
            replaced = dict(zip(live, values, strict=True))
            found = target(*(replaced.get(i, value) for i, value in enumerate(given)), **options)
            value: Tensor = found[0] if isinstance(found, tuple) else found
            return value

        sources = [given[i].detach() for i in live]
        with torch.no_grad():
            value = function(*sources)
        return handed_down(value, lambda relevance: share(function, sources, relevance), *(given[i] for i in live))

    return shared


def _handed_on(function: Callable[..., Tensor], sources: Sequence[Tensor], relevance: Tensor) -> Sequence[Tensor]:
    """All of it to the only source."""
    return [relevance.sum_to_size(sources[0].shape)]


def _contributed(epsilon: float) -> Share:
    """In proportion to what each source contributes."""

    def share(function: Callable[..., Tensor], sources: Sequence[Tensor], relevance: Tensor) -> Sequence[Tensor]:
        leaves = [source.detach().requires_grad_() for source in sources]
        with torch.enable_grad():
            z = function(*leaves)
        slopes = torch.autograd.grad(z, leaves, relevance / stabilized(z.detach(), epsilon))
        return [source * slope for source, slope in zip(sources, slopes, strict=True)]

    return share


def _filled(bound: NDArray[Any]) -> Callable[[Tensor], Tensor]:
    """A tensor like another one, at a bound."""

    def filled(value: Tensor) -> Tensor:
        return torch.as_tensor(bound).to(value).expand_as(value)

    return filled


def handed_down(value: Tensor, share: Callable[[Tensor], Sequence[Tensor]], *sources: Tensor) -> Tensor:
    """A value whose cotangent is its relevance; the sources that it is computed of get what `share` makes of that."""
    passed: Tensor = _HandedDown.apply(value, share, *sources)  # type: ignore[no-untyped-call]
    return passed


def explained(value: Tensor) -> Tensor:
    """A value from whose relevance, cotangent times value, a backward pass starts."""
    own = value.detach()
    return handed_down(own, lambda cotangent: [cotangent * own], value)


class _HandedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Callable[[Tensor], Sequence[Tensor]], *sources: Tensor) -> Tensor:
        ctx.share = share
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> Any:
        return None, None, *ctx.share(relevances[0])
