"""Broken ONNX files by the thousand: small valid models, each with a few things in it changed at random.

    PYTHONPATH=tests python tests/fuzz.py load 20000        what loading makes of them, in a process of its own
    PYTHONPATH=tests python tests/fuzz.py gradients 20000   what `input_gradient` makes of them

A case is its number: the same number gives the same file. `benchmarks/results/fuzz.md` has what was found.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from onnx import TensorProto, helper
from onnx.backend.test.case.node import collect_testcases

from explainserve.backends import LoadOptions
from explainserve.backends.trial import FATAL, TrialLimits, Trials
from explainserve.backends.tried import Tried
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig
from explainserve.onnx_vjp import UnsupportedOperators, input_gradient
from hostile_graphs import endless
from onnx_graphs import linear, model, node, quantized_twice

MOST_CHANGES = 4
TOLD = {"LOAD_FAILED", *FATAL, *signal.Signals.__members__}
"""Outcomes whose cases are printed."""

LIMITS = TrialLimits(seconds=20.0, memory_bytes=1 << 30)

_INTEGERS = (0, 1, -1, 2, 3, 7, 127, 2**31 - 1, -(2**31), 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
_FLOATS = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf"))
_WORDS = ("", "x", "y", "ai.onnx.ml", "com.microsoft", "\0", "a" * 300, "NHWC", "../../etc/passwd")


@dataclass(frozen=True)
class Site:
    """A place in a message: one value of one field."""

    message: Any
    field: FieldDescriptor
    index: int

    @property
    def repeated(self) -> bool:
        return bool(self.field.is_repeated)


def seeds() -> list[onnx.ModelProto]:
    """Valid models: every operator of ONNX's own suite, and a few of several nodes."""
    with np.errstate(all="ignore"):
        operators = [case.model for case in collect_testcases(None) if case.model.ByteSize() < 20_000]
    return [*networks(), *operators]


def case(number: int, models: Sequence[onnx.ModelProto]) -> bytes:
    """The file of a case."""
    random = np.random.default_rng(number)
    mutant = onnx.ModelProto()
    mutant.CopyFrom(models[int(random.integers(len(models)))])
    for _ in range(int(random.integers(1, MOST_CHANGES + 1))):
        _change(mutant, random)
    content = mutant.SerializeToString()
    return _damaged(content, random) if random.random() < 0.1 else content


def load_outcomes(numbers: range, models: Sequence[onnx.ModelProto]) -> Iterator[tuple[int, str, str]]:
    """For each case its number, "" or the reason of its refusal, and the message."""
    with tempfile.TemporaryDirectory() as folder, Trials(LIMITS, Tried()) as trials:
        path = Path(folder) / "model.onnx"
        for number in numbers:
            path.write_bytes(case(number, models))
            try:
                trials.check(trials.files(path), str(number), ModelConfig(), LoadOptions(thread_count=1))
                yield number, "", ""
            except ModelRefused as refusal:
                yield number, refusal.reason, refusal.message


def gradient_outcomes(numbers: range, models: Sequence[onnx.ModelProto]) -> Iterator[tuple[int, str, str]]:
    """For each case its number, "" or the name of the exception, and its trace. ValueError, UnsupportedOperators and
    MemoryError are answers, and ONNX's native code may crash; anything else is a bug.
    """
    for number in numbers:
        try:
            proto = onnx.ModelProto.FromString(case(number, models))
        except Exception:  # protobuf's own, which derives from Exception directly
            continue
        yield number, *_forked(proto)


def _forked(proto: onnx.ModelProto) -> tuple[str, str]:
    """The outcome in a copy of this process, which has no other threads, with a limit on its memory and time."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMITS.memory_bytes, LIMITS.memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(int(LIMITS.seconds))
        os.write(writing, "\n".join(_gradient_outcome(proto)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        outcome, _, trace = pipe.read().partition("\n")
    _, status = os.waitpid(child, 0)
    return (signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else outcome), trace


def _gradient_outcome(proto: onnx.ModelProto) -> tuple[str, str]:
    weights = {tensor.name for tensor in proto.graph.initializer}
    floats = [v.name for v in proto.graph.input if v.type.tensor_type.elem_type == 1 and v.name not in weights]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            input_gradient(proto, floats, [value.name for value in proto.graph.output][:1] or ["y"])
    except (ValueError, UnsupportedOperators) as error:
        return type(error).__name__, ""
    except Exception as error:
        return type(error).__name__, traceback.format_exc()
    return "", ""


def networks() -> list[onnx.ModelProto]:
    """Models of several nodes, with branches, loops and functions."""
    image, kernel = ("x", ["batch", 3, 8, 8]), np.ones((4, 3, 3, 3), np.float32)
    picture = [
        node("Conv", ["x", "k"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["c"], ["d"]),
        node("Flatten", ["d"], ["y"]),
    ]
    shaped = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Concat", ["n", "rest"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["r"]),
        node("MatMul", ["r", "w"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "rest": np.array([-1]), "w": np.ones((192, 2), np.float32)}
    small = endless()
    small.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array(3), "count"))
    return [
        linear(np.ones((3, 2), np.float32)),
        quantized_twice(),
        model(picture, [image], [("y", ["batch", 4])], {"k": kernel}),
        model(shaped, [image], [("y", ["batch", 2])], constants),
        small,
        _branching(),
        _calling(),
    ]


def _branching() -> onnx.ModelProto:
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(operator, ["x"], [name])], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3])]
        )
        for name, operator in (("then", "Neg"), ("else", "Exp"))
    }
    nodes = [node("ReduceSum", ["x"], ["s"], keepdims=0), node("Greater", ["s", "s"], ["c"])]
    return model([*nodes, node("If", ["c"], ["y"], **branches)], [("x", [1, 3])], [("y", [1, 3])])


def _calling() -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    inner = helper.make_function("own", "Inner", ["a"], ["b"], [node("Tanh", ["a"], ["b"])], imports)
    body = [node("Inner", ["a"], ["c"], domain="own"), node("Mul", ["c", "a"], ["b"])]
    outer = helper.make_function("own", "Outer", ["a"], ["b"], body, imports)
    calls = [node("Outer", ["x"], ["h"], domain="own"), node("Outer", ["h"], ["y"], domain="own")]
    proto = model(calls, [("x", [1, 3])], [("y", [1, 3])], domains=["own"])
    proto.functions.extend([inner, outer])
    return proto


def _change(proto: onnx.ModelProto, random: np.random.Generator) -> None:
    sites = list(_sites(proto))
    site = sites[int(random.integers(len(sites)))]
    if site.repeated and random.random() < 0.3:
        _rearrange(site, random)
    elif site.field.message_type is not None:
        _replace_message(site, sites, random)
    elif random.random() < 0.1 and not site.repeated:
        site.message.ClearField(site.field.name)
    else:
        _set(site, _value(site, sites, random))


def _sites(message: Any) -> Iterator[Site]:
    """Every value that is set anywhere in a message."""
    for field, value in message.ListFields():
        values = list(value) if field.is_repeated else [value]
        for index, each in enumerate(values[:64]):
            yield Site(message, field, index)
            if field.message_type is not None:
                yield from _sites(each)


def _rearrange(site: Site, random: np.random.Generator) -> None:
    """Drops, repeats or exchanges values of a repeated field."""
    values = getattr(site.message, site.field.name)
    kept = list(values)
    other = int(random.integers(len(kept)))
    match int(random.integers(3)):
        case 0:
            del kept[site.index]
        case 1:
            kept.insert(other, kept[site.index])
        case _:
            kept[other], kept[site.index] = kept[site.index], kept[other]
    if site.field.message_type is not None:
        kept = [type(each).FromString(each.SerializeToString()) for each in kept]
    del values[:]
    values.extend(kept)


def _replace_message(site: Site, sites: Sequence[Site], random: np.random.Generator) -> None:
    """By another one of its type, itself included, or an empty one."""
    alike = [other for other in sites if other.field.message_type is site.field.message_type]
    content = _of(alike[int(random.integers(len(alike)))]).SerializeToString() if random.random() < 0.8 else b""
    _of(site).ParseFromString(content)


def _value(site: Site, sites: Sequence[Site], random: np.random.Generator) -> Any:
    """Something else of the type of a field."""

    def one_of(values: Sequence[Any]) -> Any:
        return values[int(random.integers(len(values)))]

    match site.field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if site.field.type == FieldDescriptor.TYPE_BYTES:
            return _damaged(_of(site), random)
        case FieldDescriptor.CPPTYPE_STRING:
            strings = [_of(other) for other in sites if other.field.type == FieldDescriptor.TYPE_STRING]
            return one_of([*strings, *strings, *_WORDS])
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return one_of(_FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            return one_of([value.number for value in site.field.enum_type.values])
        case FieldDescriptor.CPPTYPE_INT32:
            return int(random.integers(-1, 30))
        case FieldDescriptor.CPPTYPE_UINT64:
            return abs(one_of(_INTEGERS))
        case _:
            return one_of([*_INTEGERS, int(random.integers(0, 64))])


def _of(site: Site) -> Any:
    value = getattr(site.message, site.field.name)
    return value[site.index] if site.repeated else value


def _set(site: Site, value: Any) -> None:
    if site.repeated:
        getattr(site.message, site.field.name)[site.index] = value
    else:
        setattr(site.message, site.field.name, value)


def _damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Cut off, prolonged, or with a few bytes changed."""
    match int(random.integers(3)):
        case 0:
            return content[: int(random.integers(len(content) + 1))]
        case 1:
            return content + random.bytes(int(random.integers(1, 64)))
        case _:
            changed = bytearray(content)
            for _ in range(int(random.integers(1, 8)) if content else 0):
                changed[int(random.integers(len(changed)))] = int(random.integers(256))
            return bytes(changed)


def main() -> None:
    """Runs cases, prints those that crash or are bugs as they come, and counts in the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("target", choices=["load", "gradients"])
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    models, counts = seeds(), Counter[str]()
    outcomes = load_outcomes if arguments.target == "load" else gradient_outcomes
    started = before = time.monotonic()
    slowest = (0.0, -1)
    for number, outcome, text in outcomes(range(arguments.first, arguments.first + arguments.count), models):
        counts[outcome or "accepted"] += 1
        now = time.monotonic()
        slowest, before = max(slowest, (now - before, number)), now
        if outcome in TOLD or text.startswith("Traceback"):
            print(f"case {number}: {outcome}: {text.strip()}", flush=True)
    seconds = time.monotonic() - started
    print(f"{sum(counts.values())} cases in {seconds:.0f} s, the slowest {slowest[0]:.1f} s (case {slowest[1]})")
    for outcome, count in counts.most_common():
        print(f"{outcome:24} {count}")
    sys.exit(1 if bugs(arguments.target, counts) else 0)


def bugs(target: str, counts: Iterable[str]) -> set[str]:
    """Outcomes that are our own mistakes."""
    if target == "load":
        return {"LOAD_FAILED"} & set(counts)
    answers = {"", "accepted", "ValueError", "UnsupportedOperators", "MemoryError"}
    return set(counts) - answers - signal.Signals.__members__.keys()


if __name__ == "__main__":
    main()
