"""Linear layers z = f(a; w, b) of exported graphs, and the affine maps of channels behind them.

LRP shares relevance out by the weights of a layer, and those are what the layer and a normalization behind it compute
together (Montavon et al. 2019, section 10.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from explainserve.backends.aten import arguments, called, is_item, operator, tensor_of
from explainserve.backends.exported_rule import Copies, HeldParameters, NoRule, Parameters, Route

CONVOLUTIONS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"}
)
NORMALIZATIONS = frozenset({"batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"})
_PARTS = {
    **dict.fromkeys((*CONVOLUTIONS, "linear"), ("input", "weight", "bias")),
    **dict.fromkeys(("mm", "bmm"), ("self", "mat2", "")),
    "matmul": ("self", "other", ""),
    "addmm": ("mat1", "mat2", "self"),
}
"""Arguments that are a, w and b, "" for a bias that there is none of; of a product a and w change places too."""

_PRODUCTS = frozenset({"mm", "bmm", "matmul", "addmm"})
_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})

Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""f(a; w, b)."""


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A node that is linear in one tensor, with weights and a bias that do not depend on what is explained.

    Attributes:
        node: its output.
        source: a.
        weights: w.
        bias: b, if any.
        function: f.
    """

    node: Node
    source: Node
    weights: Node
    bias: Node | None
    function: Function

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution; dense otherwise."""
        return operator(self.node) in CONVOLUTIONS

    @property
    def trailing(self) -> int:
        """The number of axes of z behind that of its channels."""
        return _axis_count(self.node) - 2 if self.convolves else 0

    @property
    def channel_axis(self) -> int | None:
        """The axis of the weights that runs over its channels; None where nothing is merged into it."""
        name, given = operator(self.node), arguments(self.node)
        if name in _PRODUCTS:
            plain = _axis_count(self.weights) == 2 and self.weights is not given[_PARTS[name][0]]
            return 1 if plain else None
        transposed = name.startswith("conv_transpose") or given.get("transposed", False)
        return 0 if not transposed else 1 if given["groups"] == 1 else None

    def parameters(self, graph: Graph, copies: Copies) -> Any:
        """Weights and bias as they are applied, in another graph."""
        stored = (copies[self.weights], None if self.bias is None else copies[self.bias])
        given = arguments(self.node)
        factors = (given.get("alpha", 1), given.get("beta", 1))
        return stored if factors == (1, 1) else graph.call_function(_scaled, (stored, factors))


def is_linear(node: Node) -> bool:
    """Whether a node is an operator of linear layers."""
    return operator(node) in _PARTS and not is_item(node)


def linear_layer(node: Node, route: Route) -> LinearLayer | None:
    """The layer that a node on the route is, or None.

    Raises:
        NoRule: its weights or its bias vary, too.
    """
    if not is_linear(node):
        return None
    name, given = operator(node), arguments(node)
    parts: list[Any] = [given.get(part) for part in _PARTS[name]]
    a, w, b = parts
    if swapped := name in _PRODUCTS and w in route.varying and a not in route.varying:
        a, w = w, a
    if w in route.varying or b in route.varying:
        raise NoRule(node, "there is no rule for a product of two tensors that both depend on what is explained")
    return LinearLayer(node, a, w, b, _product(swapped) if name in _PRODUCTS else _applied(node))


def _product(swapped: bool) -> Function:
    def function(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z = torch.matmul(w, a) if swapped else torch.matmul(a, w)
        return z if b is None else z + b

    return function


def _applied(node: Node) -> Function:
    target, names, given = node.target, _PARTS[operator(node)], arguments(node)

    def function(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        value: Tensor = called(target, {**given, **dict(zip(names, (a, w, b), strict=True))})
        return value

    return function


def _scaled(stored: Parameters, factors: tuple[float, float]) -> Parameters:
    w, b = stored
    return w * factors[0], None if b is None else b * factors[1]


# --- affine maps behind a layer --------------------------------------------------------------------------------------

Coefficients = tuple[Any, Any]
"""Scale and shift, both over channels or the same for all of them."""


def _of_normalization(given: Mapping[str, Any]) -> Coefficients:
    slope = torch.rsqrt(given["running_var"].double() + given["eps"])
    slope = slope if given["weight"] is None else slope * given["weight"]
    shift = -given["running_mean"] * slope
    return slope, shift if given["bias"] is None else shift + given["bias"]


_COEFFICIENTS: Mapping[tuple[str, str], Callable[[Mapping[str, Any]], Coefficients]] = {
    ("add", "self"): lambda given: (1.0, given["other"] * given["alpha"]),
    ("add", "other"): lambda given: (given["alpha"], given["self"]),
    ("sub", "self"): lambda given: (1.0, -given["other"] * given["alpha"]),
    ("sub", "other"): lambda given: (-given["alpha"], given["self"]),
    ("rsub", "self"): lambda given: (-given["alpha"], given["other"]),
    ("mul", "self"): lambda given: (given["other"], 0.0),
    ("mul", "other"): lambda given: (given["self"], 0.0),
    ("div", "self"): lambda given: (1.0 / given["other"], 0.0),
    **dict.fromkeys(((name, "input") for name in NORMALIZATIONS), _of_normalization),
}
"""Scale and shift of an operator that varies in the named argument alone, from the others."""


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """A linear layer and the affine maps of its channels that follow it.

    Attributes:
        maps: in order, each with the name of the argument that it maps.
        views: nodes between them that give the output another shape.
    """

    layer: LinearLayer
    maps: tuple[tuple[Node, str], ...] = ()
    views: tuple[Node, ...] = ()

    def parameters(self, graph: Graph, copies: Copies, held: HeldParameters) -> Any:
        """Weights and bias of all together, in another graph."""
        alone = self.layer.parameters(graph, copies)
        if not self.maps:
            return alone
        given = [
            {name: _copied(value, copies) for name, value in arguments(node).items() if name != mapped}
            for node, mapped in self.maps
        ]
        nodes = (self.layer.node, *(node for node, _ in self.maps))
        return graph.call_function(held.once(nodes, self._together), (alone, given))

    def _together(self, parameters: Parameters, given: Sequence[Mapping[str, Any]]) -> Parameters:
        """Those of the layer and of the maps behind it, each with its other arguments."""
        axis = self.layer.channel_axis
        assert axis is not None, "Nothing is merged into a layer without channels. This is a bug."
        for (node, mapped), others in zip(self.maps, given, strict=True):
            coefficients = _COEFFICIENTS[operator(node), mapped](others)
            parameters = _merged(parameters, coefficients, axis)
        return parameters


def merged_layer(node: Node, route: Route) -> MergedLayer | None:
    """What a node on the route computes, where that is a layer with stored weights and the affine maps behind it, or
    a layer alone. What is kept stays apart from what is behind it.

    Raises:
        NoRule: see `linear_layer`.
    """
    layer = linear_layer(node, route)
    if layer is not None:
        return MergedLayer(layer)
    mapped = _mapped_argument(node, route)
    if mapped is None:
        return None
    given = arguments(node)
    source, views = _behind_views(_behind_items(given[mapped]))
    before = None if route.kept.intersection((source, given[mapped], *views)) else merged_layer(source, route)
    if before is None:
        return None
    extended = MergedLayer(before.layer, (*before.maps, (node, mapped)), (*before.views, *views))
    others = [value for name, value in given.items() if name != mapped]
    return extended if _merges(extended, node, others) else None


def _mapped_argument(node: Node, route: Route) -> str | None:
    """The one argument on the route of a node that maps channels; None for what does nothing of the kind."""
    varying = [name for name, value in arguments(node).items() if isinstance(value, Node) and value in route.varying]
    known = len(varying) == 1 and not is_item(node) and (operator(node), varying[0]) in _COEFFICIENTS
    return varying[0] if known and arguments(node).get("rounding_mode") is None else None


def _merges(merged: MergedLayer, node: Node, others: Sequence[Any]) -> bool:
    """Whether the affine map that is the last of a layer's, with these other arguments, becomes a part of it."""
    layer = merged.layer
    axis = layer.channel_axis
    stored = [value for value in (layer.weights, layer.bias, *others) if isinstance(value, Node)]
    weights = tensor_of(layer.weights)
    if axis is None or weights is None or not all(map(_is_stored, stored)) or (merged.views and layer.convolves):
        return False
    if operator(node) in NORMALIZATIONS:
        return not merged.views and layer.trailing == _axis_count(layer.node) - 2
    tensors = [tensor_of(value) for value in others if isinstance(value, Node)]
    if any(t is None or t.ndim > _axis_count(merged.views[-1] if merged.views else layer.node) for t in tensors):
        return False
    return all(_varies_along(t, layer.trailing, int(weights.shape[axis])) for t in tensors if t is not None)


def _varies_along(value: Tensor, trailing: int, count: int) -> bool:
    """Whether a tensor varies along the axis before the `trailing` last ones only, or not at all."""
    position = value.ndim - 1 - trailing
    return value.numel() == 1 or (position >= 0 and value.shape[position] == value.numel() == count)


def _is_stored(node: Node) -> bool:
    """Whether a node is a constant of the file, or computed from such."""
    return node.op == "get_attr" or (node.op == "call_function" and all(map(_is_stored, node.all_input_nodes)))


def _behind_items(node: Node) -> Node:
    return node.all_input_nodes[0] if is_item(node) else node


def _behind_views(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """What a node shows in another shape with the same last axis, and the nodes that do that, in order."""
    views: list[Node] = []
    while operator(node) in _VIEWS and _last_extent(node) == _last_extent(node.all_input_nodes[0]):
        views.insert(0, node)
        node = node.all_input_nodes[0]
    return node, tuple(views)


def _last_extent(node: Node) -> Any:
    value = tensor_of(node)
    return value.shape[-1] if value is not None and value.ndim else None


def _axis_count(node: Node) -> int:
    value = tensor_of(node)
    return 0 if value is None else value.ndim


def _copied(value: Any, copies: Copies) -> Any:
    return copies[value] if isinstance(value, Node) else value


def _merged(parameters: Parameters, coefficients: Coefficients, axis: int) -> Parameters:
    """Weights and bias of a layer and of the affine map behind it."""
    w, b = parameters
    scale, shift = (torch.as_tensor(value).to(w).reshape(-1).expand(w.shape[axis]) for value in coefficients)
    along = [-1 if index == axis else 1 for index in range(w.ndim)]
    return w * scale.reshape(along), shift if b is None else b.reshape(-1) * scale + shift
