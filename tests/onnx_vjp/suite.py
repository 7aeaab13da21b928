"""The operator cases of onnx's own backend suite, as cases with plain tensors in float32."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase

from onnx_vjp.precision import in_type
from onnx_vjp.reference import OPERATORS, why
from onnx_vjp.sampling_oracles import ORACLES
from onnx_vjp.vjp_oracle import CONTROLS, POSITIVE, Case, Feeds, frozen, named


@cache
def suite() -> dict[str, TestCase]:
    """Every case of the suite by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return {entry.name: entry for entry in collect_testcases(None)}


def original(name: str) -> TestCase:
    """The single-node case that an expanded one spells out, or the case itself."""
    return suite().get(re.sub(r"_expanded(_ver\d+)?$", "", name), suite()[name])


def operator(name: str) -> tuple[str, str]:
    """The domain and name of the operator that a case tests."""
    node = original(name).model.graph.node[-1]
    return node.domain, node.op_type


def case(name: str, *, in_float32: bool = True) -> Case:
    """A case of the suite in float32, or in the types that it has; its sequences and optional values taken apart."""
    entry = suite()[name]
    model = onnx.ModelProto()
    model.CopyFrom(entry.model)
    given, results = entry.data_sets[0]
    feeds = _with_plain_inputs(model, given)
    _with_plain_outputs(model, results)
    if in_float32:
        model = in_type(model, TensorProto.FLOAT)
        feeds = {key: as_float32(value) for key, value in feeds.items()}
    if name in MADE_FINITE:
        feeds = {key: _made_finite(value) for key, value in feeds.items()}
    node = original(name).model.graph.node[-1]
    oracle = ORACLES.get(name, ORACLES.get(node.op_type))
    found = Case(
        name,
        model,
        feeds,
        oracle(node, feeds) if oracle else None,
        random=node.op_type in RANDOM,
        seeded=name in SEEDED,
        controls=named(node, CONTROLS),
        positive=named(node, POSITIVE),
    )
    return frozen(found) if name in STORED else found


def judged_by(name: str) -> str:
    """What stands in for onnx's reference evaluator in a case, and why; empty where nothing does."""
    node = original(name).model.graph.node[-1]
    oracle = ORACLES.get(name, ORACLES.get(node.op_type))
    inner = {child.op_type for child in suite()[name].model.graph.node}
    classes = [replaced for replaced in OPERATORS if replaced.__name__ in inner] if oracle is None else []
    notes = [f"{replaced.__name__} of tests/onnx_vjp/reference.py: {why(replaced)}" for replaced in classes]
    if oracle is not None:
        notes.append(f"{oracle.__name__} of tests/onnx_vjp/sampling_oracles.py, which says why")
    if name in MADE_FINITE:
        notes.append(f"inputs made finite: {MADE_FINITE[name]}")
    if name in STORED:
        notes.append(f"{STORED[name]} stored in the model, as files have it")
    if node.op_type in RANDOM:
        notes.append("random: the gradient is zero, and no difference can be taken")
    if name in SEEDED:
        notes.append("run by the reference evaluator alone: every runtime draws other numbers of a seed")
    return "; ".join(notes)


RANDOM = ("Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike")
SEEDED = {f"test_training_dropout{form}" for form in ("", "_mask", "_default", "_default_mask")}
# Integer inputs without whose values there is no gradient.
STORED = {"test_loop16_seq_none": "the trip count"}
# Inputs at which the operator is NaN.
MADE_FINITE = {
    f"test_mod_float_edge_cases_fmod_0_float{bits}": "a remainder of infinity or by zero" for bits in (16, 32, 64)
}


def _made_finite(value: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(value) & (value != 0), value, np.float32(2.5))


def as_float32(value: np.ndarray) -> np.ndarray:
    """A floating-point array in float32, any other as it is."""
    return value.astype(np.float32) if value.dtype.name in ("float16", "bfloat16", "float64") else value


def _with_plain_inputs(model: onnx.ModelProto, values: list[Any]) -> Feeds:
    """Nodes in front of the model build its sequences and optional inputs from tensors."""
    graph, feeds, nodes = model.graph, {}, []
    for position, (value_info, value) in reversed(list(enumerate(zip(graph.input, values, strict=False)))):
        parts = list(_parts(value_info.name, value_info.type, value, nodes))
        feeds.update((info.name, data) for info, data in reversed(parts))
        if value_info.type.HasField("tensor_type"):
            continue
        del graph.input[position]
        for info, _ in parts:
            graph.input.append(info)
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *body])
    return {key: feeds[key] for key in (value.name for value in graph.input) if key in feeds}


def _parts(
    name: str, kind: TypeProto, value: Any, nodes: list[onnx.NodeProto]
) -> Iterator[tuple[onnx.ValueInfoProto, np.ndarray]]:
    """The tensors that `name` is built from, by nodes that are added."""
    if kind.HasField("tensor_type"):
        value = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
        info = onnx.ValueInfoProto(name=name)
        info.type.CopyFrom(kind)
        yield info, value
    elif kind.HasField("sequence_type"):
        names = [f"{name}/{index}" for index in range(len(value))]
        element = kind.sequence_type.elem_type
        for part, item in zip(names, value, strict=True):
            yield from _parts(part, element, item, nodes)
        if names:
            nodes.append(helper.make_node("SequenceConstruct", names, [name]))
        else:
            nodes.append(helper.make_node("SequenceEmpty", [], [name], dtype=element.tensor_type.elem_type))
    elif value is None:
        nodes.append(helper.make_node("Optional", [], [name], type=kind.optional_type.elem_type))
    else:
        yield from _parts(f"{name}/value", kind.optional_type.elem_type, value, nodes)
        nodes.append(helper.make_node("Optional", [f"{name}/value"], [name]))


def _with_plain_outputs(model: onnx.ModelProto, values: list[Any]) -> None:
    """Nodes behind the model take its sequences and optional outputs apart."""
    graph = model.graph
    declared = list(graph.output)
    del graph.output[:]
    for info, value in zip(declared, values, strict=True):
        _take_apart(graph, info.name, info.type, value)


def _take_apart(graph: onnx.GraphProto, name: str, kind: TypeProto, value: Any) -> None:
    if kind.HasField("tensor_type"):
        graph.output.append(onnx.ValueInfoProto(name=name))
        graph.output[-1].type.CopyFrom(kind)
    elif kind.HasField("sequence_type"):
        for index, item in enumerate(value):
            position = helper.make_tensor(f"{name}/at/{index}", TensorProto.INT64, [], [index])
            graph.initializer.append(position)
            graph.node.append(helper.make_node("SequenceAt", [name, position.name], [f"{name}/{index}"]))
            _take_apart(graph, f"{name}/{index}", kind.sequence_type.elem_type, item)
    elif value is not None:
        graph.node.append(helper.make_node("OptionalGetElement", [name], [f"{name}/value"]))
        _take_apart(graph, f"{name}/value", kind.optional_type.elem_type, value)
