"""Gradient graphs: a model in, a model with its input gradient out. Start here; the walk itself is in walk.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, helper

from explainserve.onnx_vjp.arguments import check_model, check_type, tensor_names
from explainserve.onnx_vjp.emitter import Emitter
from explainserve.onnx_vjp.gaps import Gap, UnsupportedOperators
from explainserve.onnx_vjp.graph import Graph, consumed
from explainserve.onnx_vjp.malformed import malformed_as_value_error
from explainserve.onnx_vjp.opset import prepared
from explainserve.onnx_vjp.registry import Rule, Table, standard
from explainserve.onnx_vjp.twin import add_twin
from explainserve.onnx_vjp.walk import Walk
from explainserve.onnx_vjp.well_formed import check_well_formed

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class GradientGraph:
    """A model that computes its original outputs and a vector-Jacobian product.

    `cotangents` maps each `of` to the extra input that holds its cotangent, of its shape and type; `gradients` maps
    each `wrt` to the output that holds sum over all `of` of cotangent * d of / d wrt, in the shape and type of that
    `wrt`. A `wrt` or `of` that is an intermediate tensor is an output under its own name too, so that its value and
    its gradient come from the same forward pass.

    Under rules that compare two forward passes, such as DeepLIFT's, `gradients` holds multipliers, `baselines` maps
    each `wrt` to the extra input that holds its baseline, and `baseline_values` each `of` to the output that holds its
    value there; otherwise both are empty.
    """

    model: onnx.ModelProto
    cotangents: dict[str, str]
    gradients: dict[str, str]
    baselines: dict[str, str] = field(default_factory=dict)
    baseline_values: dict[str, str] = field(default_factory=dict)

    @property
    def cotangent(self) -> str:
        """The extra input of a graph with a single `of`."""
        (name,) = self.cotangents.values()
        return name


def input_gradient(
    model: onnx.ModelProto,
    wrt: Sequence[str],
    of: str | Sequence[str],
    *,
    rules: Table | None = None,
    weights: Weights | None = None,
) -> GradientGraph:
    """Differentiate one or more tensors `of` with respect to each tensor of `wrt`; any float tensors of the graph,
    inputs, outputs and intermediates alike.

    `rules` is the table of gradient rules, the true derivatives by default. A tensor on which no `of` depends gets
    zeros. Initializers that the model lists as inputs too become constants: the gradient is built on their values.
    `weights` holds the values of initializers that the model only refers to as external data; the result refers to
    them too.

    Raises ValueError for a malformed graph and for a tensor that does not exist or is not float, UnsupportedOperators
    with every gap of the path, MemoryError, TypeError for an argument of another type, and nothing else. ONNX's own
    shape inference, which is native code, can crash on a malformed graph: give files of strangers to a process that
    may.
    """
    differentiation = _differentiation(model, wrt, of, rules, weights)
    if differentiation.gaps:
        raise UnsupportedOperators(differentiation.gaps)
    return differentiation.result()


def find_gaps(
    model: onnx.ModelProto,
    wrt: Sequence[str],
    of: str | Sequence[str],
    *,
    rules: Table | None = None,
    weights: Weights | None = None,
) -> list[Gap]:
    """Everything that `input_gradient` would refuse. An empty list means that the gradient exists.

    Raises ValueError, TypeError and MemoryError as `input_gradient` does.
    """
    try:
        return _differentiation(model, wrt, of, rules, weights).gaps
    except UnsupportedOperators as error:
        return list(error.gaps)


def _differentiation(
    model: onnx.ModelProto,
    wrt: Sequence[str],
    of: str | Sequence[str],
    rules: Table | None,
    weights: Weights | None,
) -> _Differentiation:
    """Checks the arguments that callers gave, and reads the graph. Raises what `input_gradient` does."""
    check_model(model)
    sources = tensor_names("wrt", wrt)
    targets = tensor_names("of", [of] if isinstance(of, str | bytes) else of)
    table = standard() if rules is None else rules
    check_type("rules", table, Table, "a Table, such as those of GRADIENT_RULES")
    if weights is not None:
        check_type("weights", weights, Mapping, "a mapping from names to arrays")
    return _Differentiation(model, sources, targets, table, weights)


class _Differentiation:
    @malformed_as_value_error()
    def __init__(
        self,
        model: onnx.ModelProto,
        wrt: tuple[str, ...],
        of: tuple[str, ...],
        table: Table,
        weights: Weights | None,
    ) -> None:
        plain = prepared(model)
        check_well_formed(plain)
        self.graph = graph = Graph(plain, weights)
        self.wrt, self.of = wrt, of
        _check_tensors(graph, (*self.wrt, *self.of))
        walk = Walk(graph, self.wrt, self.of, table)
        compares = any(isinstance(state, Rule) and state.compares for state in table.values())
        self.baselines = {name: self._input(f"baseline/{name}", name) for name in self.wrt} if compares else {}
        self.forward_count = len(graph.nodes)
        self.twins = add_twin(graph, tuple(graph.nodes), self.baselines)
        self.cotangents = {
            name: self._input("cotangent" if len(self.of) == 1 else f"cotangent/{name}", name) for name in self.of
        }
        op = Emitter(graph)
        sums = walk.vjp(self.cotangents, op, self.twins)
        self.gaps = walk.gaps
        self.sums = {name: sums.get(name) or op.zeros_like(name) for name in self.wrt}

    def _input(self, hint: str, like: str) -> str:
        """A new input of the type and shape of another tensor."""
        name = self.graph.fresh(hint)
        self.graph.shapes.assign(name, like)
        return name

    @malformed_as_value_error()
    def result(self) -> GradientGraph:
        graph = self.graph
        names = {name: graph.fresh(f"gradient/{name}") for name in self.wrt}
        nodes = graph.nodes + [helper.make_node("Identity", [self.sums[name]], [names[name]]) for name in self.wrt]
        values = {name: self.twins[name] for name in self.of if name in self.twins}
        kept = _without_unused(nodes, self.forward_count, (*names.values(), *values.values()))
        added = [*self.cotangents.items(), *self.baselines.items()]
        inputs = [graph.value_info(name, like) for like, name in added]
        outputs = [graph.value_info(name, name) for name in self._intermediates()]
        outputs += [graph.value_info(name, like) for like, name in [*values.items(), *names.items()]]
        return GradientGraph(graph.model(kept, inputs, outputs), self.cotangents, names, self.baselines, values)

    def _intermediates(self) -> list[str]:
        known = {value.name for value in (*self.graph.proto.graph.input, *self.graph.proto.graph.output)}
        return [name for name in dict.fromkeys((*self.wrt, *self.of)) if name not in known]


def _check_tensors(graph: Graph, names: Iterable[str]) -> None:
    for name in names:
        if name not in graph:
            raise ValueError(f"the model has no tensor '{name}'")
        if not graph.is_float(name):
            kind = onnx.TensorProto.DataType.Name(graph.dtype(name))
            raise ValueError(f"tensor '{name}' is {kind}; gradients exist for float tensors only")


def _without_unused(nodes: Sequence[NodeProto], forward_count: int, outputs: Iterable[str]) -> list[NodeProto]:
    """All forward nodes, and of the others those that the outputs need."""
    needed = set(outputs)
    kept = []
    for position in reversed(range(len(nodes))):
        node = nodes[position]
        if position < forward_count or needed.intersection(node.output):
            kept.append(node)
            needed.update(consumed(node))
    return kept[::-1]
