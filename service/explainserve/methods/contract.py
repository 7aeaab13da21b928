"""What every attribution method provides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from explainserve.explanation import Attribution, Question
from explainserve.plan import Evaluation, Plan


@dataclass(frozen=True)
class ReadingGuide:
    """How to read a value of a map.

    Attributes:
        family: "gradient", "path", "activation" or "perturbation".
        units: "output" or "output per unit of input".
        complete: whether attributions sum to F(x) - F(x').
    """

    family: str
    units: str
    complete: bool
    needs_baseline: bool
    deterministic: bool
    paper: str


@dataclass(frozen=True)
class Cost:
    """Rows that a method needs for one question, end points not counted.

    Attributes:
        min_gradient_rows, max_gradient_rows: rows with one forward and one backward evaluation each.
        common_gradient_rows: those among them that are the same for every target of an instance and a baseline.
    """

    min_gradient_rows: int
    max_gradient_rows: int
    common_gradient_rows: int


class Method(Protocol):
    """A frozen dataclass of options with pure functions around a question."""

    reading_guide: ClassVar[ReadingGuide]

    def plan(self, question: Question) -> Plan:
        """The first round of rows."""
        ...

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The answer, or the next round of rows: a subclass of Plan that remembers the earlier ones.

        Args:
            plan: the plan that was evaluated.
            evaluation: what came back for it.
        """
        ...

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The answer if time ended before `upcoming`, which `attribution` returned: the best map of the rounds."""
        ...

    def cost(self) -> Cost:
        """Rows that one question needs."""
        ...

    def path_bytes(self, element_count: int) -> int:
        """Memory that the path of one question takes at most between its first round and its answer.

        Args:
            element_count: of the moving inputs of one instance.
        """
        ...
