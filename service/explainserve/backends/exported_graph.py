"""Whether the description of an exported graph says nothing but a graph.

`torch.export.load` looks operators up by attribute access in the whole of torch, parses shapes with `sympy.sympify`
(which evaluates Python), and prints names into Python source that it executes. A description written by
`torch.export.save` holds operators of torch's registries, arithmetic, and identifiers there; anything else is refused.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from explainserve.errors import ModelRefused

_OPERATOR = re.compile(
    r"torch\.ops\.(?!(higher_order|load_library|loaded_libraries|import_module)\.)[a-z]\w*"
    r"\.((?!__)\w+|__(and|or|xor|lshift|rshift)__)(\.(?!__)\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|invoke_subgraph|flex_attention"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift)"
    r"|math\.(ceil|floor|trunc|sqrt)"
    r"|torch\.sym_(\w+)|torch\._sym_sqrt"
)
_FORBIDDEN_OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.(from_file|save)\b.*")
_NAME = re.compile(r"[\w.@]*")
_TREE_SURPRISE = re.compile(r"__enum__|\\u")
_FREE_TEXT = frozenset({"metadata", "as_string", "as_strings", "torch_version", "guards_code"})
_TREES = frozenset({"in_spec", "out_spec"})
_FUNCTIONS = frozenset(
    """
    Symbol Integer Float Rational Add Mul Pow Max Min Abs Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan LessThan
    StrictGreaterThan GreaterThan And Or Not Piecewise ExprCondPair floor ceiling sqrt FloorDiv ModularIndexing Where
    PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv
    IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity
    """.split()  # noqa: SIM905 (a list of words is read more easily than one of strings)
)
_VALUES = (ast.Expression, ast.Name, ast.Load, ast.Constant, ast.Call, ast.keyword, ast.Tuple)
_OPERATIONS = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)


def require_plain_graph(description: dict[str, Any], file_name: str) -> None:
    """Passes a graph description, the JSON of `models/*.json`, that only describes a graph.

    Raises:
        ModelRefused: an operator, expression or name is none (UNSAFE_GRAPH).
    """
    for key, text in _strings(description, ""):
        if not _is_plain(key, text):
            raise ModelRefused(
                "UNSAFE_GRAPH",
                f"{file_name}: {text[:80]!r} as {key or 'name'} is nothing that torch.export.save writes",
                file=file_name,
                field=key,
            )


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All strings that may take effect, with the key they stand under; names of entries stand under no key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            if name not in _FREE_TEXT or not _is_text(item):
                yield from _strings(item, name)


def _is_text(value: Any) -> bool:
    """Whether a value is text throughout: a tensor may bear the name of a free text, and hides nothing by it."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(isinstance(item, str) for item in items)


def _is_plain(key: str, text: str) -> bool:
    if key in ("target", "as_operator"):
        return bool(_OPERATOR.fullmatch(text)) and not _FORBIDDEN_OPERATOR.fullmatch(text)
    if key == "expr_str":
        return _is_arithmetic(text)
    if key in _TREES:
        return not _TREE_SURPRISE.search(text)
    return bool(_NAME.fullmatch(text))


def _is_arithmetic(text: str) -> bool:
    """Whether an expression is numbers, symbols, operators and known functions."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    names = {id(node.args[0]) for node in nodes if _is_symbol(node)}
    return all(isinstance(node, (*_VALUES, *_OPERATIONS)) and _is_harmless(node, names) for node in nodes)


def _is_symbol(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether a node is `Symbol("name", ...)`, the only place of a string: elsewhere sympy would evaluate it."""
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Symbol" and bool(node.args)
    )


def _is_harmless(node: ast.AST, names: set[int]) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) or (id(node) in names and str(node.value).isidentifier())
    return not (isinstance(node, ast.Name) and node.id.startswith("__"))
