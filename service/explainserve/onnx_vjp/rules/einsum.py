"""Einsum: sums of products over named axes."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule
from explainserve.onnx_vjp.rules.indexing import counted


@rule("Einsum", broadcasts=True)
def einsum(op: Emitter, node: Node, g: str) -> Gradients:
    """The gradient of an operand is the einsum of the cotangent and the other operands, with the operand's subscripts
    as output.
    """
    equation = _Equation.of(op, node)
    return [
        _operand(op, node, g, equation, index) if node.differentiates(index) else None
        for index in range(len(node.inputs))
    ]


@dataclass(frozen=True)
class _Equation:
    """The subscripts of each operand and of the result, one letter per axis."""

    terms: tuple[str, ...]
    result: str

    @classmethod
    def of(cls, op: Emitter, node: Node) -> _Equation:
        """Read a node's equation: an ellipsis becomes letters, counted from the last axis it covers, and a result
        that is not given is what ONNX takes it to be.
        """
        left, arrow, right = node.attribute("equation").replace(" ", "").partition("->")
        terms = left.split(",")
        covered = [
            op.rank(name) - len(term) + 3 if "..." in term else 0 for name, term in zip(node.inputs, terms, strict=True)
        ]
        ellipsis = "".join(_unused(left + right, max(covered)))
        named = left.replace("...", "")
        if not arrow:
            right = "..." + "".join(sorted(letter for letter in {*named} - {","} if named.count(letter) == 1))
        return cls(
            tuple(
                term.replace("...", ellipsis[len(ellipsis) - count :])
                for term, count in zip(terms, covered, strict=True)
            ),
            right.replace("...", ellipsis),
        )


def _unused(letters: str, count: int) -> list[str]:
    return [letter for letter in ascii_letters if letter not in letters][:count]


def _operand(op: Emitter, node: Node, g: str, equation: _Equation, index: int) -> str:
    """An axis that nothing else has spreads over ones; a second axis of the same letter makes it a diagonal."""
    x, term = node.inputs[index], equation.terms[index]
    factors = [(equation.terms[i], name) for i, name in enumerate(node.inputs) if i != index]
    known = {*equation.result}.union(*(letters for letters, _ in factors))
    spare = _unused("".join((equation.result, *equation.terms)), len(term))
    result = ""
    for axis, letter in enumerate(term):
        if letter not in known and letter not in result:
            factors.append((letter, _ones(op, x, axis)))
        if letter in result:
            factors.append((letter + spare[axis], _identity_matrix(op, x, axis)))
        result += spare[axis] if letter in result else letter
    subscripts = ",".join([equation.result, *(letters for letters, _ in factors)])
    return op.Einsum(g, *(value for _, value in factors), equation=f"{subscripts}->{result}")


def _ones(op: Emitter, x: str, axis: int) -> str:
    return op.Expand(op.array(np.ones(1, op.numpy_dtype(x))), op.dim(x, axis))


def _identity_matrix(op: Emitter, x: str, axis: int) -> str:
    line = counted(op, op.dim(x, axis))
    return op.mask(op.Equal(op.Unsqueeze(line, [1]), line), x)
