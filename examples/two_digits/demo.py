"""The experiment of the project on pictures of two handwritten digits.

Starts a server with the embedded models (a trained classifier and two randomly initialized twins), explains both
classes of every picture in one request, and writes what came back: `report.json`, `maps.png`, `attributions.npz`.

    python examples/two_digits/demo.py --output demo-output
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from explainserve_client import Box, Client, IntegratedGradients
from maps import draw_maps
from pictures import Pair, load_pairs
from report import (
    BOXES,
    NEGLIGIBLE,
    Explained,
    alike_table,
    exceptions,
    model_summary,
    picture_report,
    span_table,
    spans,
    table,
)

MODELS = Path(__file__).parent / "models"
TRAINED = "two-digits"
NAMES = (TRAINED, "two-digits-random-a", "two-digits-random-b")
METHOD = IntegratedGradients(tolerance=0.02, completeness_tolerance=0.02, max_step_count=512)
FADING = """
Expected is that the maps look more alike on their own scales than on the joint one. RMS and SSIM say so in few
pictures: a map that fades on the joint scale comes close to the flat rest of the other one, which both measures
take for likeness. What joint scales bring back is size: how much of a scale a map fills (medians over pictures):
"""

DRAWN = (0, 1, 2)
"""Pictures of maps.png: the first three, not chosen."""


@contextmanager
def server(log: Path) -> Iterator[str]:
    """A server of the embedded models on a free loopback port, for the length of the block; yields HOST:PORT."""
    serve = [sys.executable, "-m", "explainserve", "serve", "--models", str(MODELS)]
    options = ["--port", "0", "--http-port", "0", "--log-format", "console"]
    with log.open("w", encoding="utf-8") as lines:
        process = subprocess.Popen([*serve, *options], stdout=subprocess.PIPE, stderr=lines, text=True)
    try:
        yield _address(process)
    finally:
        process.terminate()
        process.wait(timeout=30)
    if process.returncode != 0:
        raise RuntimeError(f"the server ended with exit code {process.returncode}")


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("gRPC listening on "):
            return line.removeprefix("gRPC listening on ").strip()
    raise RuntimeError(f"the server did not start; exit code {process.wait()}")


def explain(client: Client, position: int, pair: Pair, model: str) -> Explained:
    """Both classes of one picture under one model, in one request."""
    prepared = client.preprocess(model, pair.picture.image)
    result = client.explain(
        model,
        prepared,
        targets=list(pair.labels),
        score="PROBABILITY",
        baselines="gray",
        method=METHOD,
        regions={name: Box(*box) for name, box in zip(BOXES, pair.picture.boxes, strict=True)},
        timeout=120,
    )
    return Explained(position, pair, model, prepared.tensor, result)


def run(output: Path) -> dict[str, Any]:
    """Explains every picture with every model, writes the results and returns the report."""
    pairs = load_pairs()
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    with server(output / "server.log") as address, Client(address) as client:
        answers = [explain(client, position, pair, model) for position, pair in enumerate(pairs) for model in NAMES]
    seconds = time.monotonic() - started
    reports = [picture_report(answer) for answer in answers]
    report = _report(answers, reports)
    _write(output, answers, report)
    _print(output, reports, report, seconds)
    return report


def _report(answers: list[Explained], reports: list[dict[str, Any]]) -> dict[str, Any]:
    provenance = answers[0].result.provenance
    return {
        "question": "IG of the probability of each digit's class, gray baseline, sums in a box around each digit",
        "method": {
            "name": "integrated_gradients",
            "tolerance": METHOD.tolerance,
            "completeness_tolerance": METHOD.completeness_tolerance,
            "max_step_count": METHOD.max_step_count,
        },
        "negligible_below": NEGLIGIBLE,
        "server_version": provenance.server_version,
        "models": {a.model: a.result.provenance.model_sha256 for a in answers[: len(NAMES)]},
        "summary": {model: model_summary([r for r in reports if r["model"] == model], TRAINED) for model in NAMES},
        "exceptions": exceptions(reports, TRAINED),
        "cautions": [f"{caution.kind}: {caution.text}" for caution in answers[0].result.cautions],
        "spans": _spans(reports),
        "pictures": reports,
    }


def _write(output: Path, answers: list[Explained], report: dict[str, Any]) -> None:
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(output / "attributions.npz", **dict(_tensors(answers)))
    for position in DRAWN:
        name = "maps.png" if position == DRAWN[0] else f"maps-{position}.png"
        draw_maps([answer for answer in answers if answer.picture == position]).save(output / name)


def _tensors(answers: list[Explained]) -> Iterator[tuple[str, np.ndarray]]:
    """Raw maps by "<model>/<picture>/<class>"."""
    for answer in answers:
        for attribution in answer.result.attributions:
            yield f"{answer.model}/{answer.picture}/{attribution.target.label}", attribution.tensor


def _spans(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pictures = [reports[start : start + len(NAMES)] for start in range(0, len(reports), len(NAMES))]
    return [line for picture in pictures for line in spans(picture)]


def _print(output: Path, reports: list[dict[str, Any]], report: dict[str, Any], seconds: float) -> None:
    summaries = report["summary"]
    print(table(reports, TRAINED))
    print("\nHow alike the displayed maps of the two classes are (medians over pictures; SSIM 1 is identical):\n")
    print(alike_table(summaries))
    print(FADING)
    print(span_table(report["spans"]))
    print()
    for line in (*_findings(summaries), *map(_exception, report["exceptions"])):
        print(line)
    print(f"\n{len(reports)} requests in {seconds:.1f} s, server start included. Results are in {output}.")


def _findings(summaries: dict[str, dict[str, Any]]) -> Iterator[str]:
    trained = summaries[TRAINED]
    found = trained["as_expected"]
    yield (
        f"{TRAINED}: a digit's box is positive for its own class and negative for the other in {found['yes']} of "
        f"{trained['maps']} maps\n  ({found['no']} not, {found['undecided']} undecided within the error of the sums); "
        f"median sums {trained['median_own_box_sum']:+.3f} (own) and {trained['median_other_box_sum']:+.3f} (other)."
    )
    for model in NAMES[1:]:
        twin = summaries[model]
        yield (
            f"{model}: box sums below {NEGLIGIBLE} in {twin['as_expected']['yes']} of {twin['maps']} maps, the largest "
            f"{twin['largest_abs_box_sum']:.4f};\n  joint range {twin['median_joint_range']:.5f} against "
            f"{trained['median_joint_range']:.5f} of the trained model (medians)."
        )


def _exception(line: dict[str, Any]) -> str:
    return (
        f"Exception ({line['outcome']}): picture {line['picture']}, {line['model']}, class {line['class']}: own box "
        f"{line['own_box_sum']:+.5f} (error {line['own_box_error']:.5f}), other box {line['other_box_sum']:+.5f} "
        f"(error {line['other_box_error']:.5f})."
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the results")
    run(parser.parse_args().output)


if __name__ == "__main__":
    main()
