"""Layer-wise relevance propagation as tables of gradient rules.

The walk carries the relevance R of tensors instead of cotangents, from the explained output's own value on. A linear
layer z = f(a; w, b) shares the relevance of its output out among its inputs in proportion to what modified inputs and
weights contribute to it (Bach et al. 2015, doi:10.1371/journal.pone.0130140; Montavon et al. 2019,
doi:10.1007/978-3-030-28954-6_10, whose four steps are `_shared_out`):

    R_j = sum over (a', w') of a'_j  sum over k of w'_jk R_k / z'_k,   z' = sum over (a', w', b') of f(a'; w', b')

    LRP-epsilon    (a, w, b)
    LRP-gamma      (a+, w + gamma w+, b + gamma b+), (a-, w + gamma w-, 0) for positive outputs; signs exchanged for
                   negative ones (Andeol et al. 2021)
    LRP-alpha-beta alpha x [(a+, w+, b+), (a-, w-, 0)] - beta x [(a+, w-, b-), (a-, w+, 0)], beta = alpha - 1
    z+             LRP-alpha-beta with alpha = 1
    flat           (1, 1, 0): in equal parts (Lapuschkin et al. 2019)
    box            (a, w, 0), (-low, w+, 0), (-high, w-, 0) (Montavon et al. 2017, arXiv:1512.02479)

Denominators are kept from zero by epsilon, which absorbs relevance, as biases do. Activations pass relevance as it is,
a max-pool hands it to the maximum, and sums and means share it by contribution: these are layers of LRP-epsilon
without weights. So are a BatchNormalization and an added constant where no linear layer is in front to merge them
with (canonical.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike
from onnx import NodeProto, helper

from explainserve.onnx_vjp import rules as _rules  # noqa: F401  (fills the registry)
from explainserve.onnx_vjp.canonical import merge_affine
from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Formula, Gradients, Key, Refusal, Refused, Rule, State, Table, standard
from explainserve.onnx_vjp.routes import values_read
from explainserve.onnx_vjp.twin import add_twin

Bounds = Mapping[str, Sequence[ArrayLike]]
"""Least and greatest value of inputs by name, broadcastable to them."""

EPSILON, GAMMA, ALPHA = 1e-6, 0.25, 2.0

_REMEDY = "use a method of true gradients"

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
DENSE = frozenset({"Gemm", "MatMul"})
# What has a bias at position 2; Gemm scales it and its product.
_BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})

# Every element of the output is one of the inputs, or their derivatives say which.
_ROUTING = frozenset(
    {
        *("Cast", "CastLike", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"),
        *("GlobalMaxPool", "Identity", "MaxPool", "Pad", "ReduceMax", "Reshape", "Slice", "SpaceToDepth", "Split"),
        *("Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
    }
)
_SUMMING = frozenset(
    {
        *("Add", "AveragePool", "BatchNormalization", "GlobalAveragePool", "Mean", "ReduceMean", "ReduceSum"),
        *("Resize", "Sub", "Sum"),
    }
)
# Functions of single elements that are zero at zero.
_ACTIVATIONS = frozenset(
    {"Celu", "Elu", "LeakyRelu", "Neg", "PRelu", "Relu", "Selu", "Softsign", "Tanh", "ThresholdedRelu"}
)
_SCALING = frozenset({"Div", "Mul"})
_BOUNDING = frozenset({"Clip", "Max", "Min"})
# Of what has no negative elements they make nothing that has.
_SIGN_KEEPING = frozenset(
    {"AveragePool", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "Reshape", "Squeeze"}
)


def _live(node: Node) -> list[int]:
    """The positions of the inputs that relevance is handed down to."""
    return [index for index in range(len(node.inputs)) if node.differentiates(index)]


class Layer:
    """A linear layer z = f(a; w, b) and its transpose, with any inputs and weights."""

    def __init__(self, op: Emitter, node: Node, derivative: Formula) -> None:
        """Raises Refusal where weights or bias depend on what is explained, too."""
        live = _live(node)
        if len(live) != 1 or live[0] > (node.proto.op_type in DENSE):
            raise Refusal("LRP has no rule for a product of two tensors that both depend on the input", _REMEDY)
        self.op, self.node, self._derivative = op, node, derivative
        self.position = live[0]
        self.a, self.w = node.inputs[self.position], node.inputs[1 - self.position]
        self.b = node.input(2) if node.proto.op_type in _BIASED else ""
        self._attributes = {a.name: node.attribute(a.name) for a in node.proto.attribute}
        if node.proto.op_type == "Gemm":  # what is scaled is the weights and the bias
            alpha, beta = (self._attributes.pop(name, 1.0) for name in ("alpha", "beta"))
            self.w = self.w if alpha == 1 else op.Mul(self.w, alpha)
            self.b = self.b if beta == 1 or not self.b else op.Mul(self.b, beta)

    def forward(self, a: str, w: str, b: str) -> str:
        """f(a; w, b), without a bias where it is ""."""
        return self.op.emit(self.node.proto.op_type, *self._ordered(a, w), *([b] if b else []), **self._attributes)[0]

    def backward(self, s: str, w: str) -> str:
        """For each input the sum over outputs of weight times s."""
        inputs = [*self._ordered(self.a, w), *([self.b] if self.b else [])]
        proto = helper.make_node(self.node.proto.op_type, inputs, self.node.outputs, **self._attributes)
        return str(self._derivative(self.op, Node(proto, frozenset({self.a})), s)[self.position])

    def _ordered(self, a: str, w: str) -> list[str]:
        return [a, w] if self.position == 0 else [w, a]

    def positive(self, value: str) -> str:
        """max(value, 0), "" of "" for a bias that is not there."""
        return value and self.op.Relu(value)

    def negative(self, value: str) -> str:
        """min(value, 0)."""
        return value and self.op.Min(value, 0)


Part = tuple[str, str, str]
"""Modified input, weights and bias of a layer."""

Distribution = Callable[[Layer, str], str]
"""From a layer and the relevance of its output to that of its input."""


def _stabilized(op: Emitter, z: str, epsilon: float) -> str:
    """z + epsilon sign(z), with sign 1 at zero."""
    return op.Where(op.Less(z, 0), op.Sub(z, epsilon), op.Add(z, epsilon))


def _shared_out(layer: Layer, relevance: str, parts: Sequence[Part], epsilon: float) -> str:
    """The relevance of a layer's output among its inputs in proportion to the contributions of all parts together."""
    op = layer.op
    z = reduce(op.Add, [layer.forward(*part) for part in parts])
    s = op.Div(relevance, _stabilized(op, z, epsilon))
    return reduce(op.Add, [op.Mul(a, layer.backward(s, w)) for a, w, _ in parts])


def _by_sign(layer: Layer, rising: tuple[str, str], falling: str) -> list[Part]:
    """Positive inputs with the weights and bias `rising`, and, where there may be any, negative ones with `falling`."""
    parts = [(layer.positive(layer.a), *rising)]
    return parts if _is_rectified(layer.op, layer.a) else [*parts, (layer.negative(layer.a), falling, "")]


def _is_rectified(op: Emitter, value: str) -> bool:
    """Whether a tensor surely has no negative elements."""
    while (node := op.graph.producers.get(value)) is not None and node.op_type in _SIGN_KEEPING:
        value = node.input[0]
    return node is not None and node.op_type == "Relu"


def _epsilon(epsilon: float) -> Distribution:
    return lambda layer, relevance: _shared_out(layer, relevance, [(layer.a, layer.w, layer.b)], epsilon)


def _gamma(gamma: float, epsilon: float) -> Distribution:
    def distribution(layer: Layer, relevance: str) -> str:
        op, z = layer.op, layer.node.outputs[0]
        raised, lowered = (
            tuple(value and op.Add(value, op.Mul(part(value), gamma)) for value in (layer.w, layer.b))
            for part in (layer.positive, layer.negative)
        )
        of_positive, of_negative = (op.Mul(relevance, op.mask(sign(z, 0), z)) for sign in (op.Greater, op.Less))
        return op.Add(
            _shared_out(layer, of_positive, _by_sign(layer, (raised[0], raised[1]), lowered[0]), epsilon),
            _shared_out(layer, of_negative, _by_sign(layer, (lowered[0], lowered[1]), raised[0]), epsilon),
        )

    return distribution


def _alpha_beta(alpha: float, epsilon: float) -> Distribution:
    def distribution(layer: Layer, relevance: str) -> str:
        op = layer.op
        positive, negative = ((part(layer.w), part(layer.b)) for part in (layer.positive, layer.negative))
        activating = _shared_out(layer, relevance, _by_sign(layer, positive, negative[0]), epsilon)
        if alpha == 1:
            return activating
        inhibiting = _shared_out(layer, relevance, _by_sign(layer, negative, positive[0]), epsilon)
        return op.Sub(op.Mul(activating, alpha), op.Mul(inhibiting, alpha - 1))

    return distribution


def _flat(epsilon: float) -> Distribution:
    def distribution(layer: Layer, relevance: str) -> str:
        op, weights = layer.op, layer.op.constant(layer.w)
        if weights is None:
            raise Refusal("the flat rule needs stored weights", "store the weights as initializers")
        ones = op.Add(op.zeros_like(layer.a), 1)
        return _shared_out(layer, relevance, [(ones, op.array(np.ones_like(weights)), "")], epsilon)

    return distribution


def _box(bounds: Bounds, epsilon: float) -> Distribution:
    def distribution(layer: Layer, relevance: str) -> str:
        op = layer.op
        low, high = (op.Neg(_at_bound(layer, {name: ends[end] for name, ends in bounds.items()})) for end in (0, 1))
        parts = [(layer.a, layer.w, ""), (low, layer.positive(layer.w), ""), (high, layer.negative(layer.w), "")]
        return _shared_out(layer, relevance, parts, epsilon)

    return distribution


def _at_bound(layer: Layer, values: Mapping[str, ArrayLike]) -> str:
    """A layer's input where the model's inputs have these values. What is in front of a first layer is not linear in
    several elements, but rearranges and rescales them.
    """
    op, behind = layer.op, list(_in_front(layer))
    read = {name for node in behind for name in node.input} | {layer.a}
    given = {
        name: op.expand_like(op.array(np.asarray(value, op.numpy_dtype(name))), name)
        for name, value in values.items()
        if name in read
    }
    if not given:
        raise Refusal(
            "the box rule needs the value range of what is in front of the layer",
            "state value_range in the configuration, and explain inputs",
        )
    return add_twin(op.graph, behind, given)[layer.a]


def _in_front(layer: Layer) -> Iterator[NodeProto]:
    """The nodes that compute a layer's input, in the order of the graph."""
    needed, found = {layer.a}, []
    for node in reversed(layer.op.graph.nodes):
        if needed.intersection(node.output):
            found.append(node)
            needed.update(name for name in node.input if layer.node.on_path(name))
    return reversed(found)


@dataclass(frozen=True)
class _Rules:
    """How relevance is distributed: in convolutions, in dense layers, and in those that no other is in front of.

    `hidden` names tensors that are explained, and that other layers of the network are in front of.
    """

    dense: Distribution
    convolution: Distribution
    first: Distribution | None = None
    hidden: Collection[str] = ()


def behind_layers(nodes: Iterable[NodeProto], inputs: Iterable[str]) -> set[str]:
    """The tensors of a graph that depend on its inputs through a linear layer."""
    reached, behind = set(inputs), set[str]()
    for node in nodes:
        read = reached.intersection(values_read(node))
        if read:
            reached.update(node.output)
        if (read and node.op_type in CONVOLUTIONS | DENSE) or not behind.isdisjoint(read):
            behind.update(node.output)
    return behind


def _is_behind_layer(op: Emitter, node: Node, value: str, hidden: Collection[str]) -> bool:
    """Whether a tensor depends on a linear layer that is explained through, or on a tensor that is `hidden`."""
    pending, seen = [value], set[str]()
    while pending:
        name = pending.pop()
        if name in hidden:
            return True
        producer = op.graph.producers.get(name)
        if name in seen or producer is None:
            continue
        seen.add(name)
        sources = [source for source in producer.input if node.on_path(source)]
        if sources and producer.op_type in CONVOLUTIONS | DENSE:
            return True
        pending += sources
    return False


def _linear(rules: _Rules, derivative: Formula) -> Formula:
    def formula(op: Emitter, node: Node, relevance: str) -> Gradients:
        layer = Layer(op, node, derivative)
        distribution = rules.convolution if node.proto.op_type in CONVOLUTIONS else rules.dense
        if rules.first is not None and not _is_behind_layer(op, node, layer.a, rules.hidden):
            distribution = rules.first
        shares = distribution(layer, relevance)
        return [shares if index == layer.position else None for index in range(len(node.inputs))]

    return formula


def _summing(rules: _Rules, epsilon: float, derivative: Formula, every_output: bool) -> Formula:
    """In proportion to contributions. In front of a first layer with a rule of its own, whose relevance is no multiple
    of its input, constants that are added get no share.
    """

    def formula(op: Emitter, node: Node, relevance: str) -> Gradients:
        live = _live(node)
        shifts = node.proto.op_type in _SHIFTING and len(live) == 1
        if shifts and rules.first is not None and not _is_behind_layer(op, node, node.inputs[live[0]], rules.hidden):
            return _to_only(op, node, relevance)
        s = op.Div(relevance, _stabilized(op, node.outputs[0], epsilon))
        slopes = derivative(op, node, [s] if every_output else s)
        return [
            op.Mul(name, slope) if slope is not None and index in live else None
            for index, (name, slope) in enumerate(zip(node.inputs, slopes, strict=False))
        ]

    return formula


# Of a single tensor, they add constants.
_SHIFTING = frozenset({"Add", "BatchNormalization", "Sub"})


def _batch_normalization(formula: Formula) -> Formula:
    def of_first_output(op: Emitter, node: Node, relevances: Sequence[str | None]) -> Gradients:
        if node.attribute("training_mode", 0) or len([r for r in relevances if r]) > 1:
            raise Refusal("LRP has no rule for training mode", "export the model in evaluation mode")
        return formula(op, node, relevances[0])

    return of_first_output


def _to_only(op: Emitter, node: Node, relevance: str) -> Gradients:
    """All relevance to the one input that depends on what is explained."""
    live = _live(node)
    if len(live) != 1:
        raise Refusal(f"LRP has no rule for {node.proto.op_type} of several tensors", _REMEDY)
    return [relevance if index == live[0] else None for index in range(len(node.inputs))]


def _scaling(op: Emitter, node: Node, relevance: str) -> Gradients:
    """By a constant."""
    if node.proto.op_type == "Div" and node.differentiates(1):
        raise Refusal("LRP has no rule for a quotient whose denominator depends on the input", _REMEDY)
    return _to_only(op, node, relevance)


def _bounding(derivative: Formula) -> Formula:
    """Maximum or minimum: of two tensors, the one that is taken gets all; with constants, an activation that has to be
    zero at zero.
    """

    def formula(op: Emitter, node: Node, relevance: str) -> Gradients:
        live = _live(node)
        if len(live) > 1:
            return derivative(op, node, relevance)
        for index, name in enumerate(node.inputs):
            if name and index not in live and not _admits_zero(op, node, index):
                raise Refusal(f"LRP has no rule for {node.proto.op_type} that is not zero at zero", _REMEDY)
        return _to_only(op, node, relevance)

    return formula


def _admits_zero(op: Emitter, node: Node, index: int) -> bool:
    """Whether a bound lets zero through; one that the file does not hold may not."""
    bound, is_upper = op.constant(node.inputs[index]), node.proto.op_type == "Min" or index == 2
    return bound is not None and bool((bound >= 0).all() if is_upper else (bound <= 0).all())


def _in_evaluation(formula: Formula) -> Formula:
    def checked(op: Emitter, node: Node, relevance: str) -> Gradients:
        if op.graph.is_random(node.proto):
            raise Refusal("LRP has no rule for training mode", "export the model in evaluation mode")
        return formula(op, node, relevance)

    return checked


def _state(operator: str, state: Rule, rules: _Rules, epsilon: float) -> State:
    formula = state.formula
    if operator in CONVOLUTIONS | DENSE:
        return Rule(_linear(rules, formula), state.broadcasts)
    if operator in _SUMMING:
        summing = _summing(rules, epsilon, formula, state.every_output)
        own = _batch_normalization(summing) if operator == "BatchNormalization" else summing
        return Rule(own, state.broadcasts, state.every_output)
    if operator in _ROUTING:
        return state
    if operator == "Dropout":
        return Rule(_in_evaluation(formula), state.broadcasts, state.every_output)
    if operator in _BOUNDING:
        return Rule(_bounding(formula), state.broadcasts)
    if operator in _ACTIVATIONS | _SCALING:
        return Rule(_scaling if operator in _SCALING else _to_only, broadcasts=True)
    return Refused("layer-wise relevance propagation has no rule for it", _REMEDY)


def _table(rules: _Rules, epsilon: float) -> Table:
    states: dict[Key, State] = {}
    for key, state in standard().items():
        domain, operator, _ = key
        states[key] = _state("" if domain else operator, state, rules, epsilon) if isinstance(state, Rule) else state
    return Table(states, canonised=merge_affine, relevance=True)


def lrp_epsilon(epsilon: float = EPSILON) -> Table:
    """LRP-epsilon in every linear layer."""
    return _table(_Rules(_epsilon(epsilon), _epsilon(epsilon)), epsilon)


def lrp_gamma(epsilon: float = EPSILON, gamma: float = GAMMA) -> Table:
    """LRP-gamma in every linear layer."""
    return _table(_Rules(_gamma(gamma, epsilon), _gamma(gamma, epsilon)), epsilon)


def lrp_alpha_beta(epsilon: float = EPSILON, alpha: float = ALPHA) -> Table:
    """LRP-alpha-beta in every linear layer."""
    return _table(_Rules(_alpha_beta(alpha, epsilon), _alpha_beta(alpha, epsilon)), epsilon)


def lrp_composite(epsilon: float = EPSILON, hidden: Collection[str] = ()) -> Table:
    """Epsilon in dense layers, z+ in convolutions, flat in first layers: EpsilonPlusFlat of zennit."""
    return _table(_Rules(_epsilon(epsilon), _alpha_beta(1, epsilon), _flat(epsilon), hidden), epsilon)


def lrp_epsilon_gamma_box(
    bounds: Bounds, epsilon: float = EPSILON, gamma: float = GAMMA, hidden: Collection[str] = ()
) -> Table:
    """Epsilon in dense layers, gamma in convolutions, box in first layers: EpsilonGammaBox of zennit."""
    return _table(_Rules(_epsilon(epsilon), _gamma(gamma, epsilon), _box(bounds, epsilon), hidden), epsilon)


def lrp_deep_taylor(bounds: Bounds, epsilon: float = EPSILON, hidden: Collection[str] = ()) -> Table:
    """Deep Taylor decomposition (Montavon et al. 2017): z+ within, the box rule in first layers."""
    inner = _alpha_beta(1, epsilon)
    return _table(_Rules(inner, inner, _box(bounds, epsilon), hidden), epsilon)
