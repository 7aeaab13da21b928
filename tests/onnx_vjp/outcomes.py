"""What became of every case of onnx's suite and of our own; docs/onnx-operators.tsv holds it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from explainserve.onnx_vjp import UnsupportedOperators
from onnx_vjp.microsoft_cases import cases as microsoft_cases
from onnx_vjp.operator_cases import own_cases
from onnx_vjp.suite import case, judged_by, operator, suite
from onnx_vjp.vjp_oracle import Case, check

TABLE = Path(__file__).parents[2] / "docs" / "onnx-operators.tsv"

PASSED, ZERO, NO_PATH, REFUSED = "passed", "zero gradient", "no float path", "refused"


@dataclass(frozen=True)
class Outcome:
    """A line of the table. `judge` says what stood in for onnx's reference evaluator or for onnxruntime, and why."""

    source: str
    domain: str
    operator: str
    case: str
    outcome: str
    reason: str = ""
    judge: str = ""


def of_suite(name: str) -> Outcome:
    """What becomes of a case of the suite. Raises AssertionError where a gradient is wrong."""
    state, reason = _state(case(name))
    return Outcome("suite", *operator(name), name, state, reason, judged_by(name) if state in (PASSED, ZERO) else "")


def _state(entry: Case) -> tuple[str, str]:
    if not entry.wrt or not entry.outputs:
        return NO_PATH, "no float input" if not entry.wrt else "no float output"
    try:
        return (PASSED if check(entry) else ZERO), ""
    except UnsupportedOperators as error:
        return REFUSED, "; ".join(dict.fromkeys(f"{gap.operator}: {gap.reason}" for gap in error.gaps))


def own() -> Iterator[Outcome]:
    """Our own cases, all of which must pass."""
    for entry in (*own_cases(), *microsoft_cases()):
        yield Outcome("own", entry.node.domain, entry.node.op_type, entry.name, PASSED)


def walked() -> list[Outcome]:
    """The whole table, made anew."""
    return sorted([*map(of_suite, suite()), *own()], key=astuple)


def recorded() -> list[Outcome]:
    """The table as it is committed."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [Outcome(**row) for row in csv.DictReader(file, delimiter="\t")]


def record(outcomes: Iterable[Outcome]) -> None:
    """Write the table."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(field.name for field in fields(Outcome))
        writer.writerows(map(astuple, outcomes))
