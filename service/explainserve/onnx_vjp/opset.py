"""Bringing a model to the one dialect that rules know: functions inlined, operator set 18 or newer.

Between operator sets 7 and 18 a few operators changed form: attributes became inputs, defaults moved, Softmax stopped
flattening. Each such node is rewritten here to its form of operator set 18 with the same meaning; all others mean the
same as they stand.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from explainserve.onnx_vjp.gaps import Gap, UnsupportedOperators
from explainserve.onnx_vjp.graph import consumed
from explainserve.onnx_vjp.inlining import inlined
from explainserve.onnx_vjp.lists import unroll_lists
from explainserve.onnx_vjp.registry import Refusal, canonical_domain
from explainserve.onnx_vjp.rounded_pools import RIGHT_SINCE, round_pools_down
from explainserve.onnx_vjp.subgraphs import make_names_unique, subgraphs

FLOOR = 18
OLDEST = 7
# Before it, Softmax, LogSoftmax and Hardmax ran over all axes from the given one on.
SINGLE_AXIS_SOFTMAX = 13
RUNTIME_DOMAINS = frozenset({"com.microsoft", "com.microsoft.nchwc"})


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` without local functions and in operator set 18 or newer; tensors keep their names.

    Raises ValueError for functions that `inlined` refuses and for operator sets older than 7, whose broadcasting was
    different; UnsupportedOperators with every node that operator set 18 has no form of.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(inlined(model))
    _drop_overridable_inputs(copy)
    _open_negative_extents(copy.graph)
    _lift_constants(copy.graph)
    _raise_opset(copy)
    if (version_of(copy) or 0) < RIGHT_SINCE:
        round_pools_down(copy.graph)
    make_names_unique(copy.graph)
    unroll_lists(copy.graph)
    import_domains(copy)
    sort_nodes(copy.graph)
    return copy


def import_domains(model: onnx.ModelProto) -> None:
    """Import, in place, onnxruntime's own domains where a node of the main graph needs them: its optimizer tools leave
    the import out, and it does not miss it.
    """
    imported = {entry.domain for entry in model.opset_import}
    used = dict.fromkeys(node.domain for node in model.graph.node if node.domain in RUNTIME_DOMAINS)
    model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in used if domain not in imported)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node, in place, behind those that it reads from, and change nothing else.

    ONNX asks for that order; onnxruntime does not, and its tools write files without it. A cycle is left as it is.
    """
    producers = {name: position for position, node in enumerate(graph.node) for name in node.output if name}
    sources = [{producers[name] for name in consumed(node) if name in producers} for node in graph.node]
    readers: list[list[int]] = [[] for _ in sources]
    for position, before in enumerate(sources):
        for source in before:
            readers[source].append(position)
    missing = [len(before) for before in sources]
    ready = [position for position, count in enumerate(missing) if not count]
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for reader in readers[order[-1]]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    if len(order) == len(sources) and order != list(range(len(order))):
        nodes = [graph.node[position] for position in order]
        del graph.node[:]
        graph.node.extend(nodes)


def version_of(model: onnx.ModelProto) -> int | None:
    """The version of ONNX's own operator set that a model imports, or None where it imports none."""
    return next((entry.version for entry in model.opset_import if canonical_domain(entry.domain) == ""), None)


def _raise_opset(model: onnx.ModelProto) -> None:
    """Rewrite a model without local functions in place to operator set 18 where it is older."""
    version = version_of(model)
    if version is None:
        model.opset_import.append(helper.make_opsetid("", FLOOR))
        return
    if version < OLDEST:
        raise ValueError(
            f"the model uses operator set {version}; gradients need {OLDEST} or newer: "
            "convert it with onnx.version_converter"
        )
    if version < FLOOR:
        gaps: list[Gap] = []
        _Upgrade(model.graph, version, gaps).run()
        if gaps:
            raise UnsupportedOperators(gaps)
        for entry in model.opset_import:
            if canonical_domain(entry.domain) == "":
                entry.version = FLOOR
        model.ir_version = max(model.ir_version, 8)


def _drop_overridable_inputs(model: onnx.ModelProto) -> None:
    """An initializer that is listed as an input too is the default of what a caller may feed (before IR version 4 all
    had to be). Rules need constants where weights are, so gradients are built on the value in the file.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in initializers]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _open_negative_extents(graph: onnx.GraphProto) -> None:
    """Some exporters write -1 for an extent that is open, and runtimes read it so; inference would compute with it."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.Clear()


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes that hold a tensor become initializers."""
    kept = []
    for node in graph.node:
        for inner in subgraphs(node):
            _lift_constants(inner)
        tensor = (
            next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if node.op_type == "Constant"
            else None
        )
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    del graph.node[:]
    graph.node.extend(kept)


class _Upgrade:
    """Rewrites a graph in place; `gaps` receives the nodes that stay as they are, for lack of another form."""

    def __init__(self, graph: onnx.GraphProto, version: int, gaps: list[Gap]) -> None:
        self.graph, self.version, self.gaps = graph, version, gaps
        self.taken = {name for node in graph.node for name in (*node.input, *node.output)} | {
            t.name for t in graph.initializer
        }

    def run(self) -> None:
        nodes = [part for node in self.graph.node for part in self._upgraded(node)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _upgraded(self, node: NodeProto) -> Iterator[NodeProto]:
        for subgraph in subgraphs(node):
            nested = _Upgrade(subgraph, self.version, self.gaps)
            nested.taken |= self.taken
            nested.run()
        for until, rewrite in _REWRITES.get(node.op_type, ()) if canonical_domain(node.domain) == "" else ():
            if self.version < until:
                yield from self._rewritten(node, rewrite)
                return
        yield node

    def _rewritten(self, node: NodeProto, rewrite: Rewrite) -> list[NodeProto]:
        try:
            return rewrite(self, node)
        except Refusal as refusal:
            self.gaps.append(Gap.at(node, refusal))
            return [node]

    def constant(self, value: np.ndarray, hint: str) -> str:
        name = self.fresh(hint)
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def stored(self, name: str) -> np.ndarray | None:
        """The value of an initializer of this graph; None for other tensors, and where it is external data."""
        found = (tensor for tensor in self.graph.initializer if tensor.name == name and not tensor.external_data)
        return next(map(numpy_helper.to_array, found), None)

    def fresh(self, hint: str) -> str:
        name, serial = hint, 0
        while name in self.taken:
            serial += 1
            name = f"{hint}_{serial}"
        self.taken.add(name)
        return name


Rewrite = Callable[[_Upgrade, NodeProto], list[NodeProto]]


def _taken_attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Remove an attribute and return its value."""
    for position, attribute in enumerate(node.attribute):
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            del node.attribute[position]
            return value
    return default


def _number_to_input(upgrade: _Upgrade, node: NodeProto, position: int, value: float, name: str) -> NodeProto:
    """Make a number an input of the type of the first one, which inference will tell, and return the node that takes
    it there.
    """
    number = upgrade.constant(np.array(value, np.float32), f"{node.output[0]}/{name}")
    cast = helper.make_node("CastLike", [number, node.input[0]], [upgrade.fresh(f"{number}/cast")])
    _set_input(node, position, cast.output[0])
    return cast


def _set_input(node: NodeProto, position: int, name: str) -> None:
    while len(node.input) <= position:
        node.input.append("")
    node.input[position] = name


def _integers_to_input(attribute: str, position: int) -> Rewrite:
    """An integer-list attribute becomes an int64 input."""

    def rewrite(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
        values = _taken_attribute(node, attribute)
        if values is not None:
            _set_input(
                node,
                position,
                upgrade.constant(np.atleast_1d(np.array(values, np.int64)), f"{node.output[0]}/{attribute}"),
            )
        return [node]

    return rewrite


def _slice_1(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    for position, name in enumerate(("starts", "ends", "axes"), 1):
        _integers_to_input(name, position)(upgrade, node)
    return [node]


def _split_2(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    if len(node.input) < 2:
        _integers_to_input("split", 1)(upgrade, node)
    return _split_13(upgrade, node)


def _split_13(_: _Upgrade, node: NodeProto) -> list[NodeProto]:
    if len(node.input) < 2:
        node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
    return [node]


def _clip_6(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    bounds = [(position, name, _taken_attribute(node, name)) for position, name in enumerate(("min", "max"), 1)]
    casts = [
        _number_to_input(upgrade, node, position, bound, name) for position, name, bound in bounds if bound is not None
    ]
    return [*casts, node]


def _pad_2(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    value = _taken_attribute(node, "value", 0.0)
    _integers_to_input("pads", 1)(upgrade, node)
    return [_number_to_input(upgrade, node, 2, value, "value"), node] if value else [node]


def _flattened(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    """Softmax before 13 works on the input flattened to a matrix at `axis`."""
    axis = _taken_attribute(node, "axis", 1)
    if axis == -1:
        node.attribute.append(helper.make_attribute("axis", -1))
        return [node]
    source, result = node.input[0], node.output[0]
    flat, soft, shape = (upgrade.fresh(f"{result}/{part}") for part in ("flat", "soft", "shape"))
    return [
        helper.make_node("Flatten", [source], [flat], axis=axis),
        helper.make_node(node.op_type, [flat], [soft], axis=1, name=node.name),
        helper.make_node("Shape", [source], [shape]),
        helper.make_node("Reshape", [soft, shape], [result]),
    ]


def _dropout_7(_: _Upgrade, node: NodeProto) -> list[NodeProto]:
    _taken_attribute(node, "ratio")
    return [node]


def _batch_normalization_7(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    if _taken_attribute(node, "spatial", 1):
        return _batch_normalization_13(upgrade, node)
    if any(node.output[1:]):
        raise Refusal("it takes statistics of each pixel by itself", "export the model in evaluation mode")
    return _by_pixel(upgrade, node)


def _by_pixel(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    """y = (x - mean) scale / sqrt(variance + epsilon) + bias, with statistics of the shape of a row."""
    x, scale, bias, mean, variance = node.input
    y = node.output[0]
    centered, shifted, deviation, normal, scaled = (
        upgrade.fresh(f"{y}/{part}") for part in ("centered", "shifted", "deviation", "normal", "scaled")
    )
    shift = helper.make_node("Add", [variance], [shifted])
    epsilon = _number_to_input(upgrade, shift, 1, _taken_attribute(node, "epsilon", 1e-5), "epsilon")
    return [
        epsilon,
        shift,
        helper.make_node("Sqrt", [shifted], [deviation]),
        helper.make_node("Sub", [x, mean], [centered]),
        helper.make_node("Div", [centered, deviation], [normal]),
        helper.make_node("Mul", [normal, scale], [scaled]),
        helper.make_node("Add", [scaled, bias], [y], name=node.name),
    ]


def _batch_normalization_13(_: _Upgrade, node: NodeProto) -> list[NodeProto]:
    """Before 14 it was in training mode where it had more than one output; the last two are no more."""
    if any(node.output[1:]):
        node.attribute.append(helper.make_attribute("training_mode", 1))
        del node.output[3:]
    return [node]


def _scan_8(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    """Scan before 9 scans every row of a batch by itself: a Scan of today over the rows."""
    lengths, *inputs = node.input
    if lengths:
        raise Refusal("every row has a length of its own", "export the model with operator set 9 or newer")
    count = _taken_attribute(node, "num_scan_inputs")
    directions = _taken_attribute(node, "directions", [0] * count)
    body: onnx.GraphProto = _taken_attribute(node, "body")
    rows, results = ([upgrade.fresh(f"{name}/row") for name in names] for names in (inputs, node.output))
    row = helper.make_node(
        "Scan", rows, results, body=body, num_scan_inputs=count, scan_input_directions=list(directions)
    )
    formals = list(map(_of_type, rows, body.input)), list(map(_of_type, results, body.output))
    by_row = helper.make_graph([row], "rows", *formals)
    return [helper.make_node("Scan", inputs, node.output, node.name, body=by_row, num_scan_inputs=len(inputs))]


def _of_type(name: str, like: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """A value of the element type of another one."""
    return helper.make_tensor_value_info(name, like.type.tensor_type.elem_type, None)


def _upsample(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    if upgrade.version < 9:
        stated = _taken_attribute(node, "scales")
        _set_input(node, 1, upgrade.constant(np.array(stated, np.float32), f"{node.output[0]}/scales"))
    x, scales = node.input
    return [_asymmetric(node, x, scales, node.output[0], "floor")]


def _resize_10(upgrade: _Upgrade, node: NodeProto) -> list[NodeProto]:
    """`nearest` rounds down along axes that grow and up along those that shrink. ONNX left it open; onnxruntime does
    so.
    """
    (x, scales), (y,) = node.input, node.output
    stored = upgrade.stored(scales)
    linear = any(attribute.name == "mode" and attribute.s == b"linear" for attribute in node.attribute)
    if linear or (stored is not None and np.all(stored >= 1)):
        return [_asymmetric(node, x, scales, y, "floor")]
    if stored is not None and np.all(stored <= 1):
        return [_asymmetric(node, x, scales, y, "ceil")]
    one = upgrade.constant(np.array(1, np.float32), f"{y}/one")
    down, up, small = (upgrade.fresh(f"{y}/{part}") for part in ("down", "up", "small"))
    return [
        helper.make_node("Min", [scales, one], [down]),
        helper.make_node("Max", [scales, one], [up]),
        _asymmetric(node, x, down, small, "ceil"),
        _asymmetric(node, small, up, y, "floor"),
    ]


def _asymmetric(node: NodeProto, x: str, scales: str, y: str, rounding: str) -> NodeProto:
    """A Resize in the mode of an older one, by output position / scale."""
    resized = helper.make_node("Resize", [x, "", scales], [y], name=node.name)
    resized.attribute.extend(attribute for attribute in node.attribute if attribute.name == "mode")
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": rounding}
    resized.attribute.extend(helper.make_attribute(name, value) for name, value in how.items())
    return resized


def _roi_align_10(_: _Upgrade, node: NodeProto) -> list[NodeProto]:
    node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "output_half_pixel"))
    return [node]


def _scatter(_: _Upgrade, node: NodeProto) -> list[NodeProto]:
    node.op_type = "ScatterElements"
    return [node]


# Operators that operator set 18 no longer has, and what takes their place here.
REPLACED = {"Scatter": "ScatterElements", "Upsample": "Resize"}

# Per operator: (first operator set in which this rewriting is not needed, the rewriting), oldest form first.
_REWRITES: dict[str, tuple[tuple[int, Rewrite], ...]] = {
    "BatchNormalization": ((9, _batch_normalization_7), (14, _batch_normalization_13)),
    "Clip": ((11, _clip_6),),
    "Dropout": ((12, _dropout_7),),
    "Hardmax": ((13, _flattened),),
    "LogSoftmax": ((13, _flattened),),
    "Pad": ((11, _pad_2),),
    "ReduceSum": ((13, _integers_to_input("axes", 1)),),
    "Resize": ((11, _resize_10),),
    "RoiAlign": ((16, _roi_align_10),),
    "Scan": ((9, _scan_8),),
    "Scatter": ((FLOOR, _scatter),),
    "Slice": ((10, _slice_1),),
    "Softmax": ((13, _flattened),),
    "Split": ((13, _split_2), (18, _split_13)),
    "Squeeze": ((13, _integers_to_input("axes", 1)),),
    "TopK": ((10, _integers_to_input("k", 1)),),
    "Unsqueeze": ((13, _integers_to_input("axes", 1)),),
    "Upsample": ((10, _upsample),),
} | {
    operator: ((18, _integers_to_input("axes", 1)),)
    for operator in (
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSumSquare",
    )
}
