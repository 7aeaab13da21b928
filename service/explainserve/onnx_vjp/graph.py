"""An ONNX graph under differentiation: nodes in topological order, with types and constants by tensor name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from explainserve.onnx_vjp.evaluation import evaluate, measured, measures
from explainserve.onnx_vjp.registry import canonical_domain
from explainserve.onnx_vjp.shapes import SHAPE_ELEMENTS, Shape, Shapes, TensorType
from explainserve.onnx_vjp.subgraphs import captured, is_standard, names_within, read_from_outside, subgraphs

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})

INTEGERS = frozenset(value for name, value in TensorProto.DataType.items() if name.startswith(("INT", "UINT")))

# Of 8 bits and less: numbers that models are quantized to.
_NARROW = ("FLOAT8", "FLOAT6", "FLOAT4", "INT8", "INT4", "INT2", "UINT8", "UINT4", "UINT2")
NARROW = frozenset(value for name, value in TensorProto.DataType.items() if name.startswith(_NARROW))

# Larger constants are left to the runtime to compute.
FOLDED_ELEMENTS = 1 << 26

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)

# Runtimes and the reference evaluator round coordinates differently, and a gradient has to follow what runs forward.
_BY_CONVENTION = frozenset({"Resize"})

# What they return is of a size that their values decide, within that of their inputs.
_SELECTING = frozenset({"Compress", "NonZero", "Unique"})


class Graph:
    """A private, growing copy of a model's graph; the given `model` is never changed.

    `weights` holds the values of initializers that the model only refers to as external data. The body of a node is a
    graph of its own, which `nested` makes: it reads the tensors `outside` from `outer`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        weights: Mapping[str, np.ndarray] | None = None,
        *,
        outer: Graph | None = None,
        outside: Iterable[str] = (),
    ) -> None:
        self._weights = weights or {}
        self.outer, self.outside = outer, frozenset(outside)
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model)
        graph = self.proto.graph
        imports = {canonical_domain(entry.domain): entry.version for entry in model.opset_import}
        self.opsets: dict[str, int] = outer.opsets if outer else imports
        self.nodes: list[NodeProto] = list(graph.node)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.producers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self._values: dict[str, np.ndarray | None] = {}
        self._taken: set[str] = outer._taken if outer else set()
        self._taken.update(names_within(graph))
        self._serial = 0
        self.shapes = Shapes(self.proto)
        self._infer_loops()

    # -- what is known about a tensor
    # ------------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self._taken and (name in self.shapes or name in self.producers)

    def version(self, node: NodeProto) -> int:
        """The operator set version that the graph imports for the node's domain."""
        return self.opsets.get(canonical_domain(node.domain), 1)

    def dtype(self, name: str) -> int:
        """The TensorProto data type, UNDEFINED where shape inference did not find it."""
        return self.shapes.dtype(name)

    def is_float(self, name: str) -> bool:
        """Whether gradients can flow through the tensor; an unknown type counts as float, so that nothing is lost
        silently.
        """
        return self.dtype(name) in FLOATS or self.dtype(name) == TensorProto.UNDEFINED

    def is_narrow(self, name: str) -> bool:
        """Whether the tensor holds numbers of 8 bits or less."""
        return self.dtype(name) in NARROW

    def is_integer(self, name: str) -> bool:
        """Whether the tensor is known to hold integers, of however many bits."""
        return self.dtype(name) in INTEGERS

    def is_random(self, node: NodeProto) -> bool:
        """Whether a node may draw numbers, other ones whenever it is computed."""
        if not is_standard(node, "Dropout"):
            return node.op_type in _RANDOM
        training = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.array(False)
        return training is None or bool(training.any())

    def shape(self, name: str) -> Shape | None:
        """Dimensions as int, symbol or None (unknown), or None where even the rank is unknown."""
        return self.shapes.shape(name)

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a tensor that does not depend on the model's inputs, else None."""
        pending, opened = [name], set[str]()  # chains of constants are longer than Python's own stack
        while pending:
            top = pending[-1]
            if top not in self._values and top not in opened:
                opened.add(top)
                pending += self._folded_from(top)
                continue
            if top not in self._values:
                self._values[top] = self._evaluated(top)
            pending.pop()
        return self._values[name]

    def _folded_from(self, name: str) -> list[str]:
        """What has to be constant for a tensor to be."""
        node = self._producer(name)
        if name in self.initializers or node is None or not _is_folded(node) or self._static_shape(node) is not None:
            return []
        return [source for source in node.input if source]

    def _evaluated(self, name: str) -> np.ndarray | None:
        if self.outer is not None and name in self.outside:
            return self.outer.constant(name)
        if name in self.initializers:
            return self._stored(self.initializers[name])
        node = self._producer(name)
        if node is None or not _is_folded(node):
            return None
        if (shape := self._static_shape(node)) is not None:
            return shape
        inputs = [self._values.get(source) if source else None for source in node.input]
        if any(value is None for value, source in zip(inputs, node.input, strict=True) if source):
            return None
        outputs = self.folded(node, inputs)
        return None if outputs is None else outputs[list(node.output).index(name)]

    def _producer(self, name: str) -> NodeProto | None:
        """The node that computes a tensor; a CastLike as the Cast that it is, where the type of the other is known."""
        node = self.producers.get(name)
        if node is None or not is_standard(node, "CastLike") or not (kind := self.dtype(node.input[1])):
            return node
        return helper.make_node("Cast", node.input[:1], node.output, to=kind)

    def _stored(self, tensor: TensorProto) -> np.ndarray | None:
        """The value of an initializer, or None where it is external and not among the weights."""
        if tensor.data_location == TensorProto.EXTERNAL:
            return self._weights.get(tensor.name)
        return numpy_helper.to_array(tensor)

    def _static_shape(self, node: NodeProto) -> np.ndarray | None:
        """What a Shape or Size node returns where the shape of its input is static."""
        shape = self.shape(node.input[0]) if measures(node) and node.input else None
        sizes = [size for size in shape or () if isinstance(size, int)]
        return None if shape is None or len(sizes) < len(shape) else measured(node, sizes)

    def folded(self, node: NodeProto, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
        """The outputs of one node on values, or None where computing them is left to the runtime: they are large, or
        their size is not known beforehand, or the reference evaluator does not have them, or has its own convention.
        """
        if node.op_type in _BY_CONVENTION:
            return None
        feeds = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
        count = self.shapes.element_count(node, self.version(node), feeds)
        if node.op_type not in _SELECTING and (count is None or count > FOLDED_ELEMENTS):
            return None
        try:
            with np.errstate(all="ignore"):
                return evaluate(node, inputs, self.opset_imports())
        except Exception:  # the evaluator lets through whatever numpy raises on values that do not fit
            return None

    # -- growth
    # ----------------------------------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        """A tensor name that nothing in the graph uses."""
        name = hint
        while name in self._taken:
            self._serial += 1
            name = f"{hint}_{self._serial}"
        self._taken.add(name)
        return name

    def rewrite(self, nodes: list[NodeProto]) -> None:
        """Put other nodes in place of all: what was not constant may be so now."""
        self.nodes = nodes
        self._values = {name: value for name, value in self._values.items() if value is not None}

    def infer_again(self) -> None:
        """Infer all types from the start: nodes were replaced that inference could not see through."""
        self.shapes = Shapes(self.model(self.nodes, [], []))
        self._infer_loops()

    def _infer_loops(self) -> None:
        """Make known what Loops carry: ONNX infers no shapes for it, nor for anything behind, since a Loop may change
        them.
        """
        found: set[str] = set()
        for node in self.nodes:
            if is_standard(node, "Loop"):
                body = self.loop_body(node)
                states = len(node.input) - 2
                for index, (name, result) in enumerate(zip(node.output, body.proto.graph.output[1:], strict=False)):
                    kind = body.shapes.stated(result.name)
                    if name and kind.dtype:
                        self.shapes.declare(name, kind if index < states else kind.stacked())
                        found.add(name)
            elif found.intersection(consumed(node)):
                unknown = [name for name in node.output if name and self.shape(name) is None]
                if unknown:
                    self.register(node)
                    found.update(unknown)

    def append(self, node: NodeProto) -> None:
        """Add a node after all others, and infer the types of its outputs."""
        self.nodes.append(node)
        self.register(node)

    @contextmanager
    def collecting(self) -> Iterator[list[NodeProto]]:
        """Collect the nodes that are appended, in the place of adding them."""
        around, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = around

    def register(self, node: NodeProto) -> None:
        """Make the outputs of a node known: their producer and, as far as they can be inferred, their types."""
        self.producers.update({name: node for name in node.output if name})
        constants = {name: value for name in node.input if name and (value := self.constant(name)) is not None}
        self.shapes.add_node(node, self.version(node), constants)

    def add_constant(self, value: np.ndarray, hint: str = "constant") -> str:
        """Add an initializer and return its name."""
        name = self.fresh(hint)
        self.adopt(numpy_helper.from_array(value, name))
        self._values[name] = value
        return name

    def adopt(self, tensor: TensorProto) -> None:
        """Add an initializer under its own name, which must be new."""
        self.initializers[tensor.name] = tensor
        self.shapes.add_constant(tensor.name, tensor.data_type, tensor.dims)

    def opset_imports(self) -> list[onnx.OperatorSetIdProto]:
        """The operator sets as ONNX writes them."""
        return [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]

    # -- subgraphs
    # --------------------------------------------------------------------------------------------------------

    def nested(self, body: GraphProto, inputs: Sequence[TensorType], reads: Iterable[str] = ()) -> Graph:
        """The body of one of this graph's nodes as a graph of its own, its inputs of the given types where they are
        known. What it reads from here, and what `reads` names, are further inputs of it.
        """
        model = onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.opset_imports())
        graph, outside = model.graph, dict.fromkeys((*read_from_outside(body), *reads))
        graph.CopyFrom(body)
        for value, kind in zip(graph.input, inputs, strict=True):
            if kind.dtype and (kind.shape is not None or not value.type.tensor_type.elem_type):
                value.type.CopyFrom(kind.proto())
        for name in outside:
            constant = self.constant(name)
            if constant is not None and constant.size <= SHAPE_ELEMENTS:
                graph.initializer.append(numpy_helper.from_array(constant, name))
            elif self.dtype(name):
                graph.input.add(name=name).type.CopyFrom(self.shapes.type(name).proto())
        return Graph(model, self._weights, outer=self, outside=outside)

    def capture(self, name: str) -> None:
        """Make an outer tensor known that the body did not read so far."""
        if self.outer is not None and name not in self.shapes and name in self.outer.shapes:
            self.outside |= {name}
            self.shapes.declare(name, self.outer.shapes.stated(name))

    def loop_body(self, node: NodeProto) -> Graph:
        """The body of a Loop, with the shapes that hold in every iteration: those of the initial states, less what an
        iteration changes of them.
        """
        (body,) = subgraphs(node)
        states = [self.shapes.type(name) for name in node.input[2:]]
        while True:
            nested = self.nested(body, [COUNTER, CONDITION, *states])
            carried = zip(states, body.input[2:], body.output[1:], strict=False)
            kept = [_kept(state, nested.shape(old.name), nested.shape(new.name)) for state, old, new in carried]
            if kept == states:
                return nested
            states = kept

    def subgraph(
        self, nodes: Sequence[NodeProto], inputs: Sequence[str], outputs: Sequence[str], name: str
    ) -> GraphProto:
        """A body of `nodes` for a node of the outer graph."""
        graph = GraphProto(name=name)
        graph.input.extend(map(self._declared, inputs))
        graph.output.extend(map(self._declared, outputs))
        self.fill(graph, nodes)
        return graph

    def _declared(self, name: str) -> onnx.ValueInfoProto:
        return self.value_info(name, name) if self.dtype(name) else onnx.ValueInfoProto(name=name)

    def fill(self, body: GraphProto, nodes: Sequence[NodeProto]) -> None:
        """Give a body these nodes, and the constants that they and its outputs read."""
        del body.node[:], body.initializer[:], body.value_info[:]
        body.node.extend(nodes)
        used = {name for node in nodes for name in consumed(node)} | {value.name for value in body.output}
        body.initializer.extend(
            tensor for name, tensor in self.initializers.items() if name in used and name not in self.outside
        )

    # -- the way back
    # ----------------------------------------------------------------------------------------------------

    def model(
        self, nodes: Iterable[NodeProto], inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The model with `nodes` for its own, and with further inputs and outputs."""
        own = self.proto.graph
        return self.part(nodes, [*own.input, *inputs], [*own.output, *outputs])

    def part(
        self, nodes: Iterable[NodeProto], inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """A model of `nodes` alone, with the initializers that they use.

        All types are stated: onnxruntime keeps tensors in one memory layout only where it knows that shapes agree.
        """
        own = self.proto
        model = onnx.ModelProto(ir_version=own.ir_version, opset_import=self.opset_imports())
        model.producer_name, model.producer_version = own.producer_name, own.producer_version
        model.metadata_props.extend(own.metadata_props)
        graph = model.graph
        graph.name = own.graph.name
        graph.sparse_initializer.extend(own.graph.sparse_initializer)
        graph.node.extend(nodes)
        graph.input.extend(inputs)
        graph.output.extend(outputs)
        declared = {value.name for value in graph.output}
        inner = {name for node in graph.node for name in node.output if name in self.shapes} - declared
        graph.value_info.extend(self.value_info(name, name) for name in sorted(inner))
        used = {name for node in graph.node for name in consumed(node)} | {output.name for output in graph.output}
        graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in used)
        return model

    def value_info(self, name: str, like: str) -> onnx.ValueInfoProto:
        """A graph input or output called `name` with the type and shape of `like`."""
        info = onnx.ValueInfoProto(name=name)
        info.type.CopyFrom(self.shapes.type_proto(like))
        return info


def _is_folded(node: NodeProto) -> bool:
    return node.op_type not in (*_RANDOM, "Dropout") and not any(subgraphs(node))


COUNTER, CONDITION = TensorType(TensorProto.INT64, ()), TensorType(TensorProto.BOOL, ())


def _kept(state: TensorType, before: Shape | None, after: Shape | None) -> TensorType:
    """The type of a state less the dimensions that differ after an iteration."""
    if before == after or state.shape is None:
        return state
    if after is None or len(after) != len(state.shape):
        return TensorType(state.dtype, None)
    dims = zip(state.shape, before or after, after, strict=True)
    return TensorType(state.dtype, tuple(dim if old == new else None for dim, old, new in dims))


def consumed(node: NodeProto) -> list[str]:
    """Every outer tensor that a node reads, those captured by its subgraphs included."""
    return [*(name for name in node.input if name), *captured(node)]


def without_unread(nodes: Sequence[NodeProto], outputs: Iterable[str], replaced: Iterable[str]) -> list[NodeProto]:
    """Nodes in their order, less those that computed what was replaced, and in turn what only they read."""
    read, doubtful = set(outputs), set(replaced)
    kept = []
    for node in reversed(nodes):
        if doubtful.issuperset(node.output) and read.isdisjoint(node.output):
            doubtful.update(consumed(node))
        else:
            kept.append(node)
            read.update(consumed(node))
    return kept[::-1]
