"""Which cautions apply, in which words, and that each is explained in docs/reading-attributions.md."""

import dataclasses
import re
from pathlib import Path

import pytest

from explainserve.cautions import CAUTIONS, Caution, CautionKind, cautions_for_map, cautions_for_response
from explainserve.v1 import attribution_pb2

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reading-attributions.md"
ALWAYS = ["WHERE_NOT_WHY", "SINGLE_CASE", "PLAUSIBLE_NOT_CORRECT", "BASELINE_DEPENDENT", "FRAGILE"]
OBSERVED = {"OUT_OF_RANGE_INPUT", "NEGLIGIBLE_CHANGE", "NOT_CONVERGED", "ROW_BY_ROW"}


def names(cautions: list[Caution]) -> list[str]:
    return [caution.kind.name for caution in cautions]


def test_kinds_are_the_wires():
    assert {f"CAUTION_KIND_{kind.name}": kind.value for kind in CautionKind} | {"CAUTION_KIND_UNSPECIFIED": 0} == dict(
        attribution_pb2.CautionKind.items()
    )
    assert [field.name for field in dataclasses.fields(Caution)] == [
        field.name for field in attribution_pb2.Caution.DESCRIPTOR.fields
    ]


@pytest.mark.parametrize("kind", CautionKind)
def test_every_kind_has_a_row(kind):
    caution = CAUTIONS[kind]

    assert caution.kind is kind
    assert 1 <= len(re.findall(r"[.](?:\s|$)", caution.text)) <= 2, "one or two sentences"
    assert (caution.source == "") == (kind.name in OBSERVED)


@pytest.mark.parametrize("kind", CautionKind)
def test_every_kind_has_its_section_in_the_docs(kind):
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    bodies = {section.split("\n", 1)[0].strip(): section.split("\n", 1)[1].strip() for section in sections}

    assert len(bodies[kind.name].split()) >= 30, f"{kind.name} is not explained"


@pytest.mark.parametrize("kind", [kind for kind in CautionKind if CAUTIONS[kind].source])
def test_the_docs_name_every_source(kind):
    page = " ".join(PAGE.read_text(encoding="utf-8").split())

    for source in CAUTIONS[kind].source.split("; "):
        title = re.sub(r"^.*? \d{4}, |^Fiddler AI, ", "", source).split(",")[0]
        assert title in page, source


@pytest.mark.parametrize(("map_count", "joint"), [(0, False), (1, False), (2, True), (40, True)])
def test_several_maps_call_for_a_joint_scale(map_count, joint):
    got = names(cautions_for_response(map_count=map_count))

    assert ("JOINT_SCALE_ONLY" in got) == joint
    assert [name for name in got if name != "JOINT_SCALE_ONLY"] == ALWAYS


def test_methods_without_a_baseline_do_not_depend_on_one():
    assert "BASELINE_DEPENDENT" not in names(cautions_for_response(map_count=1, needs_baseline=False))


def test_a_map_without_trouble_has_no_caution_of_its_own():
    assert cautions_for_map(stop_reason="CONVERGED") == []


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"out_of_range_inputs": ["image"]}, "OUT_OF_RANGE_INPUT"),
        ({"negligible_change": True}, "NEGLIGIBLE_CHANGE"),
        ({"stop_reason": "TIME_BUDGET"}, "NOT_CONVERGED"),
        ({"row_by_row": True}, "ROW_BY_ROW"),
        ({"constant_baseline": True}, "BLIND_TO_BASELINE"),
        ({"fails_randomization": True}, "FAILS_RANDOMIZATION"),
        ({"complete_by_construction": True}, "COMPLETE_BY_CONSTRUCTION"),
        ({"behind_activation": True}, "BEHIND_ACTIVATION"),
        ({"incomplete": True}, "INCOMPLETE"),
    ],
)
def test_each_fact_has_its_caution(facts, kind):
    assert names(cautions_for_map(**facts)) == [kind]


def test_every_stop_reason_is_known_to_be_within_tolerance_or_not():
    wire = [name.removeprefix("STOP_REASON_") for name, _ in attribution_pb2.StopReason.items()]

    within = [name for name in wire if not cautions_for_map(stop_reason=name)]

    assert within == ["UNSPECIFIED", "FIXED_STEPS", "CONVERGED"]


def test_texts_name_the_inputs_and_the_stop_reason():
    got = cautions_for_map(out_of_range_inputs=["image", "depth"], stop_reason="MAX_STEPS")

    assert got[0].text.endswith(" Inputs: image, depth.")
    assert got[1].text.endswith(" Stop reason: MAX_STEPS.")
    assert all(caution.text.startswith(CAUTIONS[caution.kind].text) for caution in got)


def test_cautions_come_in_the_order_of_their_kinds():
    everything = cautions_for_map(
        out_of_range_inputs=["x"],
        stop_reason="NON_FINITE",
        negligible_change=True,
        row_by_row=True,
        constant_baseline=True,
        fails_randomization=True,
        complete_by_construction=True,
        behind_activation=True,
        incomplete=True,
    )

    for cautions in (everything, cautions_for_response(map_count=2)):
        values = [caution.kind.value for caution in cautions]
        assert values == sorted(values)
    assert set(names(everything)) | set(names(cautions_for_response(map_count=2))) == {k.name for k in CautionKind}
