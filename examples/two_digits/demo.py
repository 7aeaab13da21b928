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
from report import BOXES, NEGLIGIBLE, Explained, alike_table, exceptions, model_summary, picture_report, table

MODELS = Path(__file__).parent / "models"
TRAINED = "two-digits"
NAMES = (TRAINED, "two-digits-random-a", "two-digits-random-b")
METHOD = IntegratedGradients(tolerance=0.02, completeness_tolerance=0.02, max_step_count=512)
DRAWN = (0, 1, 2)
"""Pictures of maps.png: the first three, not chosen."""


@contextmanager
def server() -> Iterator[str]:
    """A server of the embedded models on a free loopback port, for the length of the block; yields HOST:PORT."""
    serve = [sys.executable, "-m", "explainserve", "serve", "--models", str(MODELS)]
    options = ["--port", "0", "--http-port", "0", "--log-format", "console"]
    process = subprocess.Popen([*serve, *options], stdout=subprocess.PIPE, text=True)
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
    with server() as address, Client(address) as client:
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
        "summary": {model: model_summary([r for r in reports if r["model"] == model]) for model in NAMES},
        "exceptions": exceptions(reports, TRAINED),
        "cautions": [f"{caution.kind}: {caution.text}" for caution in answers[0].result.cautions],
        "pictures": reports,
    }


def _write(output: Path, answers: list[Explained], report: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
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


def _print(output: Path, reports: list[dict[str, Any]], report: dict[str, Any], seconds: float) -> None:
    summaries = report["summary"]
    trained = summaries[TRAINED]
    print(table(reports))
    print("\nHow alike the maps of the two classes look (medians over pictures; SSIM 1 is identical):\n")
    print(alike_table(summaries))
    print(
        f"\n{TRAINED}: a digit's box is positive for its own class and negative for the other in "
        f"{trained['expected_signs']} of {trained['maps']} maps; median sums "
        f"{trained['median_own_box_sum']:+.3f} (own) and {trained['median_other_box_sum']:+.3f} (other)."
    )
    for model in NAMES[1:]:
        twin = summaries[model]
        print(
            f"{model}: box sums below {NEGLIGIBLE} in {twin['negligible_sums']} of {twin['maps']} maps, the largest "
            f"{twin['largest_abs_box_sum']:.4f}; joint range {twin['median_joint_range']:.5f} against "
            f"{trained['median_joint_range']:.5f} of the trained model (medians)."
        )
    for line in report["exceptions"]:
        print(
            f"Exception: picture {line['picture']}, {line['model']}, class {line['class']}: own box "
            f"{line['own_box_sum']:+.4f}, other box {line['other_box_sum']:+.4f}."
        )
    print(f"\n{len(reports)} requests in {seconds:.1f} s, server start included. Results are in {output}.")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the results")
    run(parser.parse_args().output)


if __name__ == "__main__":
    main()
