"""A second look at maps that are further apart than equal maps may be, once the server is idle.

A map that a time budget cut, or whose points rounding moved, is compared with the map that the rule gives alone after
as many steps: so cut maps have to be equal too, but for means over baselines, each of which was cut somewhere else.
Where two maps of the same points still differ, the map may be badly conditioned: 1 - tanh^2 of a saturated tanh has few
bits left in float32, and micro-batches of other sizes round differently. So it is measured how far the map alone moves
when its inputs change in their last bit: rounding inside of the model may move it about as far. What is left is a
difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import equality
from explainserve.rpc.tensors import decode, encode
from explainserve.v1 import attribution_pb2, method_pb2
from explainserve.v1 import explainer_service_pb2 as pb

PILOT_COUNT = 8
"""Steps of the adaptive rule's first round, whose map is that of the midpoint rule."""

NUDGES = 12
"""Requests with other last bits."""

CONDITIONING_FACTOR = 4.0
"""A model rounds more than once on the way, and the farthest of a few samples is not the farthest."""

Attribution = attribution_pb2.Attribution
Ask = Callable[[pb.ExplainRequest], pb.ExplainResponse]


@dataclass(frozen=True, eq=False)
class Doubt:
    """A map that is not equal to the one given alone.

    Attributes:
        what: the action and the request, in words.
        position: of the map in both answers.
    """

    what: str
    request: pb.ExplainRequest
    found: pb.ExplainResponse
    alone: pb.ExplainResponse
    position: int

    def verdict(self, ask: Ask) -> tuple[str, str]:
        """What explains the difference, and what is wrong; one of them is "".

        Args:
            ask: for a request alone.
        """
        found, alone = self._map(self.found), self._map(self.alone)
        request, reference = self.request, alone
        if not equality.same_points(found, alone) and found.HasField("baseline_index"):
            request = _with_steps(self.request, found.step_count)
            reference = self._map(ask(request))
        if not equality.same_points(found, reference):
            return self._by_estimates(found, alone)
        distance, allowed = equality.distance(found, reference), equality.tolerance(self.alone, self.position)
        if distance <= allowed:
            return "equal to the map alone after as many steps", ""
        conditioning = self._conditioning(reference.step_count, ask)
        if distance <= CONDITIONING_FACTOR * conditioning:
            return "within what last bits of the inputs change", ""
        text = f"relative distance {distance:.2e} of the maps, allowed {allowed:.2e}, last bits {conditioning:.2e}"
        return "", f"{self.what}: attribution {self.position}: {text}"

    def _by_estimates(self, found: Attribution, alone: Attribution) -> tuple[str, str]:
        distance, allowed = equality.distance(found, alone), found.map_error + alone.map_error
        if distance <= allowed:
            return "of other points, within the estimates of their errors", ""
        text = f"relative distance {distance:.2e} of maps of other points, estimates {allowed:.2e}"
        return "", f"{self.what}: attribution {self.position}: {text}"

    def _conditioning(self, step_count: int, ask: Ask) -> float:
        """How far the map of a fixed rule moves with the last bits of its inputs: its points stay where they are."""
        steady = self.request
        if self._map(self.alone).stop_reason != attribution_pb2.STOP_REASON_FIXED_STEPS:
            steady = _midpoint(self.request, step_count)
        reference = self._map(ask(steady))
        moved = (self._map(ask(_nudged(steady, np.random.default_rng(seed)))) for seed in range(NUDGES))
        return max(equality.distance(each, reference) for each in moved)

    def _map(self, response: pb.ExplainResponse) -> Attribution:
        return response.attributions[self.position]


def doubts(what: str, request: pb.ExplainRequest, found: pb.ExplainResponse, alone: pb.ExplainResponse) -> list[Doubt]:
    """Maps that need a second look."""
    return [Doubt(what, request, found, alone, position) for position in equality.unequal_maps(found, alone)]


def _with_steps(request: pb.ExplainRequest, step_count: int) -> pb.ExplainRequest:
    """The same request, whose adaptive rule ends after so many steps."""
    if step_count <= PILOT_COUNT:
        return _midpoint(request, PILOT_COUNT)
    capped = pb.ExplainRequest()
    capped.CopyFrom(request)
    own = capped.methods[0] if capped.methods else capped.methods.add()
    own.integrated_gradients.max_step_count = step_count
    return capped


def _midpoint(request: pb.ExplainRequest, step_count: int) -> pb.ExplainRequest:
    """The same request by the midpoint rule."""
    fixed = pb.ExplainRequest()
    fixed.CopyFrom(request)
    del fixed.methods[:]
    rule = method_pb2.IntegratedGradients(step_count=step_count, quadrature="QUADRATURE_MIDPOINT")
    fixed.methods.add().integrated_gradients.CopyFrom(rule)
    return fixed


def _nudged(request: pb.ExplainRequest, random: np.random.Generator) -> pb.ExplainRequest:
    """The same request, whose floating-point inputs are the next numbers above or below."""
    moved = pb.ExplainRequest()
    moved.CopyFrom(request)
    for name, tensor in request.inputs.items():
        values = decode(name, tensor)
        if np.issubdtype(values.dtype, np.floating):
            towards = np.where(random.random(values.shape) < 0.5, -np.inf, np.inf).astype(values.dtype)
            moved.inputs[name].CopyFrom(encode(np.nextafter(values, towards)))
    return moved
