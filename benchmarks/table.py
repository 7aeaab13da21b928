"""The table of the benchmark, and its summary."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from contestants import Run

CAPTUM, IN_PROCESS, GRPC = "Captum", "in process", "gRPC"


class Question(enum.Enum):
    """What a line is about."""

    STEPS = "equal steps"
    DEFAULT_ERROR = "the error of our default"
    ERROR = "an error that was asked for"
    GROWTH = "growth with steps, targets or instances"
    FORMAT = "another format"


@dataclass(eq=False)
class Line:
    """One line of the table.

    Attributes:
        rows: gradients per map, by contestant.
        runs: by contestant; the same index is the same round.
        distance: relative L2 distance of our maps to Captum's, where both evaluate the same points.
    """

    model: str
    question: Question
    what: str
    clients: int
    map_count: int
    rows: dict[str, str]
    runs: dict[str, list[Run]]
    distance: float | None = None

    def median(self, name: str) -> float:
        """Wall seconds of a run."""
        return float(np.median([run.wall for run in self.runs[name]]))

    def milliseconds(self, name: str) -> str:
        """Wall time per map, median (min to max)."""
        times = [1000 * run.wall / self.map_count for run in self.runs.get(name, ())]
        return f"{_shown(np.median(times))} ({_shown(min(times))} to {_shown(max(times))})" if times else "—"

    def ratio(self, name: str) -> str:
        """Of our time to Captum's in the same round, median (min to max)."""
        if name not in self.runs or CAPTUM not in self.runs:
            return "—"
        ratios = self.ratios(name)
        return f"**{np.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"

    def ratios(self, name: str) -> list[float]:
        """Of our times to Captum's, round by round."""
        pairs = zip(self.runs[name], self.runs[CAPTUM], strict=True)
        return [ours.wall / captum.wall for ours, captum in pairs]

    def peak(self, name: str) -> str:
        """Most resident memory in MiB."""
        return f"{max(run.peak_bytes for run in self.runs[name]) / 2**20:.0f}" if name in self.runs else "—"

    @property
    def cells(self) -> list[str]:
        """Of the table."""
        distance = f"{self.distance:.0e}" if self.distance is not None else ""
        rows = " / ".join(dict.fromkeys(self.rows[name] for name in (CAPTUM, GRPC) if name in self.rows))
        times = [self.milliseconds(name) for name in (CAPTUM, IN_PROCESS, GRPC)]
        ratios = [self.ratio(name) for name in (IN_PROCESS, GRPC)]
        peaks = " / ".join(self.peak(name) for name in (CAPTUM, GRPC))
        return [self.model, self.what, str(self.clients), rows, *times, *ratios, distance, peaks]


HEADER = (
    "model",
    "what",
    "clients",
    "rows per map: Captum / ours",
    "Captum, ms per map",
    "ours in process, ms",
    "ours over gRPC, ms",
    "in process / Captum",
    "gRPC / Captum",
    "maps differ by",
    "peak MiB: Captum / server",
)

SUMMARY_HEADER = (
    "model",
    "equal steps, gRPC: 1 / 4 / 16 clients",
    "in process",
    "equal error, gRPC: 1 / 4 / 16 clients",
    "in process",
    "equal error, Captum's default rule, gRPC",
)


QUOTE_HEADING = "## How fast\n"


def page(heading: Sequence[str], lines: Sequence[Line]) -> str:
    """Markdown: heading, summary, table."""
    parts = [
        "# Beside Captum",
        "",
        *heading,
        "",
        "## Summary",
        "",
        "Our wall time over Captum's, medians; below 1 we are faster. Equal error: that of the map that we give by",
        "default, which Captum reaches by whichever of its default and midpoint rules needs fewer gradients.",
        "",
        *summary(lines),
        "",
        "## All lines",
        "",
        "Times are wall time per map, ratios are of neighbouring runs: medians, in brackets the least and the largest.",
        "",
        *_table(HEADER, (line.cells for line in lines)),
    ]
    return "\n".join(parts) + "\n"


def summary(lines: Sequence[Line]) -> list[str]:
    """One line per model; the README quotes it."""
    models = dict.fromkeys(line.model for line in lines if CAPTUM in line.runs)
    return _table(SUMMARY_HEADER, (_summary_cells([line for line in lines if line.model == name]) for name in models))


def quoted(readme: str, lines: Sequence[Line]) -> str:
    """The README with this summary in the place of the one that it quotes."""
    before, heading, rest = readme.partition(QUOTE_HEADING)
    text, table, after = rest.partition("\n| ")
    _, gap, others = (table + after).partition("\n\n")
    return "".join((before, heading, text, "\n", "\n".join(summary(lines)), gap, others))


def _summary_cells(lines: Sequence[Line]) -> Iterator[str]:
    yield lines[0].model
    for question in (Question.STEPS, Question.DEFAULT_ERROR):
        best = _best([line for line in lines if line.question is question])
        for name in (GRPC, IN_PROCESS):
            yield " / ".join(f"{np.median(line.ratios(name)):.2f}" for line in best) or "—"
    default = [line for line in lines if line.question is Question.DEFAULT_ERROR and "gauss-legendre" in line.what]
    yield f"{np.median(default[0].ratios(GRPC)):.2f}" if default else "—"


def _best(lines: Sequence[Line]) -> list[Line]:
    """Per number of clients the line where Captum takes the least time."""
    counts = sorted({line.clients for line in lines})
    return [
        min((line for line in lines if line.clients == count), key=lambda line: line.median(CAPTUM)) for count in counts
    ]


def _shown(milliseconds: float) -> str:
    """Three digits, without an exponent."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
