"""An ONNX graph under differentiation: nodes in topological order, with types and constants by tensor name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from explainserve.onnx_vjp.evaluation import evaluate
from explainserve.onnx_vjp.registry import canonical_domain
from explainserve.onnx_vjp.shapes import Shape, Shapes

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})

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
    """A private, growing copy of a model's graph. `model` must outlive nothing: it is copied.

    `weights` holds the values of initializers that the model only refers to as external data.
    """

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, np.ndarray] | None = None) -> None:
        self._weights = weights or {}
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model)
        graph = self.proto.graph
        self.opsets = {canonical_domain(entry.domain): entry.version for entry in model.opset_import}
        self.nodes: list[NodeProto] = list(graph.node)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.producers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self.shapes = Shapes(self.proto)
        self._values: dict[str, np.ndarray | None] = {}
        self._taken = (
            {value.name for value in graph.input}
            | set(self.producers)
            | set(self.initializers)
            | {node.name for node in self.nodes}
        )
        self._serial = 0

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
        node = self.producers.get(name)
        if name in self.initializers or node is None or not _is_folded(node) or self._static_shape(node) is not None:
            return []
        return [source for source in node.input if source]

    def _evaluated(self, name: str) -> np.ndarray | None:
        if name in self.initializers:
            return self._stored(self.initializers[name])
        node = self.producers.get(name)
        if node is None or not _is_folded(node):
            return None
        if (shape := self._static_shape(node)) is not None:
            return shape
        inputs = [self._values.get(source) if source else None for source in node.input]
        if any(value is None for value, source in zip(inputs, node.input, strict=True) if source):
            return None
        outputs = self.folded(node, inputs)
        return None if outputs is None else outputs[list(node.output).index(name)]

    def _stored(self, tensor: TensorProto) -> np.ndarray | None:
        """The value of an initializer, or None where it is external and not among the weights."""
        if tensor.data_location == TensorProto.EXTERNAL:
            return self._weights.get(tensor.name)
        return numpy_helper.to_array(tensor)

    def _static_shape(self, node: NodeProto) -> np.ndarray | None:
        """What a Shape node returns where the shape of its input is static."""
        shape = self.shape(node.input[0]) if node.op_type == "Shape" and node.input else None
        if shape is None or not all(isinstance(dimension, int) for dimension in shape):
            return None
        start, end = (next((a.i for a in node.attribute if a.name == key), None) for key in ("start", "end"))
        return np.array(shape[start:end], dtype=np.int64)

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

    def infer_again(self) -> None:
        """Infer all types from the start: nodes were replaced that inference could not see through."""
        self.shapes = Shapes(self.model(self.nodes, [], []))

    def append(self, node: NodeProto) -> None:
        """Add a node after all others, and infer the types of its outputs."""
        self.nodes.append(node)
        self.register(node)

    def register(self, node: NodeProto) -> None:
        """Make the outputs of a node known: their producer and, as far as they can be inferred, their types."""
        self.producers.update({name: node for name in node.output if name})
        constants = {name: value for name in node.input if name and (value := self.constant(name)) is not None}
        self.shapes.add_node(node, self.version(node), constants)

    def add_constant(self, value: np.ndarray, hint: str = "constant") -> str:
        """Add an initializer and return its name."""
        name = self.fresh(hint)
        self.initializers[name] = numpy_helper.from_array(value, name)
        self.shapes.add_constant(name, self.initializers[name].data_type, value.shape)
        self._values[name] = value
        return name

    def opset_imports(self) -> list[onnx.OperatorSetIdProto]:
        """The operator sets as ONNX writes them."""
        return [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]

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
        """A model of `nodes` alone, with the initializers that they use."""
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
        used = {name for node in graph.node for name in consumed(node)} | {output.name for output in graph.output}
        graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in used)
        return model

    def value_info(self, name: str, like: str) -> onnx.ValueInfoProto:
        """A graph input or output called `name` with the type and shape of `like`."""
        info = onnx.ValueInfoProto(name=name)
        info.type.CopyFrom(self.shapes.type_proto(like))
        return info


def _is_folded(node: NodeProto) -> bool:
    return node.op_type not in _RANDOM and not any(attribute.HasField("g") for attribute in node.attribute)


def consumed(node: NodeProto) -> list[str]:
    """Every outer tensor that a node reads, those captured by its subgraphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for subgraph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            inner = {name for child in subgraph.node for name in child.output} | {
                value.name for value in subgraph.input
            }
            inner |= {tensor.name for tensor in subgraph.initializer}
            names += [name for child in subgraph.node for name in consumed(child) if name not in inner]
            names += [value.name for value in subgraph.output if value.name not in inner]
    return names
