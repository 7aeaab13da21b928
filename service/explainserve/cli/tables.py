"""Tables for terminals and pipes: plain text, columns of equal width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from explainserve_client import (
        Attribution,
        ExplainResult,
        Memory,
        ModelInfo,
        ModelSummary,
        Prediction,
        PredictResult,
    )

Row = Sequence[str]


def columns(heading: Row, rows: Sequence[Row]) -> str:
    """Rows under a heading, columns padded and two spaces apart; numbers are on the right."""
    cells = [heading, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    right = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(heading))]
    return "\n".join(_aligned(row, widths, right) for row in cells)


def attributions(result: ExplainResult) -> str:
    """One row per map: method, target, F(x), F(x'), sum, delta, error estimate, steps, stop reason."""
    heading = (
        "#",
        "method",
        "instance",
        "target",
        "baseline",
        "F(x)",
        "F(x')",
        "sum",
        "delta",
        "map error",
        "steps",
        "stop",
    )
    rows = [_attribution_row(result, index, line) for index, line in enumerate(result.attributions)]
    return columns(heading, rows)


def regions(result: ExplainResult) -> str:
    """One row per map, input and region: sums over all channels, and the share of the map's sum. "" without regions."""
    heading = ("#", "target", "input", "region", "sum", "positive", "negative", "share")
    rows = [
        (str(index), str(line.target), name, region, *map(_number, (s.sum, s.positive_sum, s.negative_sum, s.share)))
        for index, line in enumerate(result.attributions)
        for name, of_input in line.inputs.items()
        for region, by_view in of_input.regions.items()
        for s in [by_view["ELEMENTS"]]
    ]
    return columns(heading, rows) if rows else ""


def predictions(result: PredictResult) -> str:
    """One row per class, or for an output of one number; outputs that have neither are named."""
    heading = ("instance", "output", "class", "label", "score")
    rows = [row for line in result.predictions for row in _prediction_rows(line)]
    without = {line.output for line in result.predictions if not any(_prediction_rows(line))}
    notes = [f"output {name} has no classes; --json with --tensors shows its values" for name in sorted(without)]
    return "\n".join([*([columns(heading, rows)] if rows else []), *notes])


def _prediction_rows(line: Prediction) -> list[Row]:
    place = (str(line.instance_index), line.output)
    if line.tensor is not None and line.tensor.ndim == 0:
        return [(*place, "-", "-", _number(float(line.tensor)))]
    return [(*place, str(found.index), found.label or "-", _number(found.score)) for found in line.classes]


def models(summaries: Sequence[ModelSummary]) -> str:
    """One row per model version, failed ones with their reason."""
    rows = [
        (line.name, str(line.version), line.state, line.format, " ".join(line.reason.split()) or "-")
        for line in summaries
    ]
    return columns(("name", "version", "state", "format", "reason"), rows)


def model(info: ModelInfo) -> str:
    """A model in a few lines."""
    rows = [
        ("model", f"{info.name} version {info.version}, {info.summary.state}"),
        ("file", f"{info.summary.format}, sha256 {info.sha256}"),
        ("backend", f"{info.backend} on {', '.join(info.summary.devices)}, {_batching(info)}"),
        *(("input", f"{spec.name} {spec.dtype} {_axes(spec.shape)} {spec.layout}") for spec in info.inputs.values()),
        *(
            (
                "output",
                f"{spec.name} {spec.dtype} {_axes([a.size for a in spec.axes])} {spec.kind}, {len(spec.labels)} labels",
            )
            for spec in info.outputs.values()
        ),
        *(("left out", own.reason) for own in info.suppressed_outputs.values()),
        *(
            ("method", f"{line.method}: {'supported' if line.supported else line.reason}")
            for line in info.methods.values()
        ),
        *([("memory", _memory(info.memory))] if info.memory is not None else []),
        *(("layer", text) for text in layer_lines(tuple(info.layers.values()))),
        *(("no gradient", gap_line(gap)) for gap in info.gaps),
        *(("warning", text) for text in info.warnings),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def _batching(info: ModelInfo) -> str:
    together = "every row alone" if info.batching == "ROW_BY_ROW" else f"up to {info.max_batch_rows} rows together"
    return together if info.seconds_per_row is None else f"{together}, {1e3 * info.seconds_per_row:.3g} ms a row"


def _memory(memory: Memory) -> str:
    parts = [f"{memory.weight_bytes:,} bytes of weights", f"{memory.gradient_bytes:,} of gradient graphs"]
    return ", ".join([*parts, f"about {memory.session_bytes:,} of sessions"] if memory.session_bytes else parts)


class _Layer(Protocol):
    """A layer of a served model, or of a file."""

    @property
    def name(self) -> str: ...
    @property
    def operator(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def bypassing_inputs(self) -> tuple[str, ...]: ...


def layer_lines(layers: Sequence[_Layer]) -> list[str]:
    """The layers that no route to an output of theirs bypasses, one a line, and how many others there are."""
    through = [layer for layer in layers if not layer.bypassing_inputs]
    lines = [" ".join(filter(None, (layer.name, layer.operator, layer.module))) for layer in through]
    others = len(layers) - len(through)
    return [*lines, f"and {others} that other routes bypass; --json lists them"] if others else lines


class _Gap(Protocol):
    """What keeps a served model, or a file, from having a gradient."""

    @property
    def operator(self) -> str: ...
    @property
    def node(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def remedy(self) -> str: ...


def gap_line(gap: _Gap) -> str:
    """The operator and its node where the gap has them, why there is no gradient, and what to do."""
    place = " in ".join(filter(None, (gap.operator, gap.node)))
    return ": ".join(filter(None, (place, f"{gap.reason}; {gap.remedy}")))


def baseline_name(result: ExplainResult, line: Attribution) -> str:
    """Kind of the baseline of a map, such as "gray"; by input where inputs differ; "mean" where several were folded or
    taken together, and "-" where there is none."""
    if line.baseline_index is None:
        return "-" if line.baseline_output_value is None else "mean"
    place = (line.instance_index, line.baseline_index)
    used = next(found for found in result.baselines if (found.instance_index, found.baseline_index) == place)
    kinds = {part.kind for part in used.inputs}
    return kinds.pop() if len(kinds) == 1 else ",".join(f"{part.input}={part.kind}" for part in used.inputs)


def method_name(result: ExplainResult, line: Attribution) -> str:
    """Of the method that made a map, as the client's class is called; "?" where the client does not know it."""
    method = result.provenance.effective_methods[line.method_index]
    return "?" if method is None else type(method).__name__


def _attribution_row(result: ExplainResult, index: int, line: Attribution) -> Row:
    figures = (line.instance_output_value, line.baseline_output_value, line.attribution_sum, line.convergence_delta)
    return (
        str(index),
        method_name(result, line),
        str(line.instance_index),
        str(line.target),
        baseline_name(result, line),
        *map(_number, (*figures, line.map_error)),
        str(line.step_count),
        line.stop_reason,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _axes(sizes: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in sizes)}]"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True


def _aligned(row: Row, widths: Sequence[int], right: Sequence[bool]) -> str:
    cells = [
        cell.rjust(width) if numeric else cell.ljust(width)
        for cell, width, numeric in zip(row, widths, right, strict=True)
    ]
    return "  ".join(cells).rstrip()
