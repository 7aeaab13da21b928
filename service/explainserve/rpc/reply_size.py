"""How large a reply will be, so that one that does not fit is refused before it is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from explainserve.figures import group_sizes
from explainserve.query_cost import Cost
from explainserve.rpc.baseline_messages import effective_baseline
from explainserve.rpc.model_messages import input_spec
from explainserve.rpc.requests import Explain
from explainserve.signature import InputSpec, OutputSpec

_MESSAGE_COPIES = 2  # as it came in and as a message; decoded inputs are counted where they are held
_REPLY_COPIES = 3  # as a message, as bytes, and on its way into the network


def memory_of_messages(message_bytes: int, reply_bytes: int) -> int:
    """What a request and its reply take at most, as long as the reader takes."""
    return _MESSAGE_COPIES * message_bytes + _REPLY_COPIES * reply_bytes


_RESPONSE_BYTES = 8192  # provenance, cautions
_MAP_BYTES = 4096  # numbers, and all cautions at once
_INPUT_BYTES = 384  # shape and layout, twice where there is a spread
_STATISTICS_BYTES = 2200  # one view with its recipes
_REGION_BYTES = 192
_PART_COPIES = 3  # segments, and two base maps
_POINT_BYTES = 16
_GROUP_BYTES = 64
_MEMBER_BYTES = 4
_PAIR_BYTES = 64
_BASELINE_BYTES = 320  # digest, positions, numbers of noise
_CLASS_BYTES = 40


@dataclasses.dataclass(frozen=True)
class ReplySize:
    """Size of a reply.

    Attributes:
        tensor_bytes: of its tensors, exactly.
        head_bytes: of the rest, an upper estimate.
    """

    tensor_bytes: int
    head_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of the reply in one message."""
        return self.tensor_bytes + self.head_bytes


def reply_size(request: Explain, cost: Cost, row_limit: int) -> ReplySize:
    """Size of the reply of Explain.

    Args:
        row_limit: above it groups are not looked at, and count as if each held all maps.

    Raises:
        InvalidRequest: a group selects nothing, or maps of different units (EMPTY_GROUP, INCOMMENSURABLE_GROUP).
    """
    maps = map_count(request, cost)
    if cost.max_rows > row_limit:
        sizes = [maps] * len(request.groups)
    else:
        sizes = group_sizes(request.query, request.fold_baselines, request.groups)
    layouts = sum(_text_bytes(input_spec(spec).ByteSize()) for spec in _explained(request))
    joint = _joint_bytes(request, maps, sizes)
    head_bytes = _RESPONSE_BYTES + layouts + maps * _bytes_of_map(request) + joint + _baselines_bytes(request)
    return ReplySize(_tensor_bytes(request, maps), head_bytes)


def _explained(request: Explain) -> list[InputSpec]:
    return [request.query.model.signature.input(name) for name in request.shapes]


def _text_bytes(text: str | int) -> int:
    """Of a name, or of that many bytes, with what stands before them."""
    return 8 + (text if isinstance(text, int) else len(text.encode()))


def _tensor_bytes(request: Explain, map_count: int) -> int:
    """Of maps, with what else comes with each of their elements, and of baselines."""
    options, query, total = request.options, request.query, 0
    of_map = 4 * query.subject.element_count
    if not options.omit_tensors:
        total += map_count * of_map * (1 + request.fold_baselines + options.include_standard_errors)
    if options.include_parts:
        total += map_count * of_map * _PART_COPIES
    if options.include_baseline_tensors:
        of_one = sum(values.nbytes for values in query.instances[0].moving.values())
        total += of_one * sum(query.baseline_count(index) for index in range(len(query.instances)))
    return total


def _bytes_of_map(request: Explain) -> int:
    """Without its tensors."""
    options, signature = request.options, request.query.model.signature
    total = _MAP_BYTES + max(_text_bytes(spec.name) + 2 * _label_bytes(spec) for spec in signature.outputs)
    for spec in request.query.subject.maps.values():
        views = 0 if options.omit_statistics else len(request.figures.views_of(spec))
        total += _INPUT_BYTES + 2 * _text_bytes(spec.name) + views * _STATISTICS_BYTES  # a caution names it too
    if not options.omit_regions:
        total += sum(2 * (_REGION_BYTES + _text_bytes(region.name)) for region in request.regions)
    if not (options.omit_score_path or request.fold_baselines):
        costs = [method.cost(request.query.subject) for method in request.query.methods]
        total += _POINT_BYTES * (2 + max(cost.max_gradient_rows for cost in costs))
    return total


def _label_bytes(spec: OutputSpec) -> int:
    return _text_bytes(max((len(label.encode()) for label in spec.labels), default=0))


def _joint_bytes(request: Explain, maps: int, sizes: Sequence[int]) -> int:
    views = {spec.name: len(request.figures.views_of(spec)) for spec in request.query.subject.maps.values()}
    figures = sum(_GROUP_BYTES + _text_bytes(name) + count * _STATISTICS_BYTES for name, count in views.items())
    pair = sum(count * (_PAIR_BYTES + _text_bytes(name)) for name, count in views.items())
    total = 0
    if request.figures.joint:
        query = request.query
        units = {
            (spec.function(query.model.signature).output, spec.score)
            for method in query.methods
            for spec in query.scored_targets(method)
        }
        total += _MEMBER_BYTES * maps + sum(_GROUP_BYTES + _text_bytes(output) + figures for output, _ in units)
    for group, size in zip(request.groups, sizes, strict=True):
        total += _GROUP_BYTES + _text_bytes(group.name) + _MEMBER_BYTES * size + figures
        total += pair * (size * (size - 1) // 2) if group.pairwise else 0
    return total


def _baselines_bytes(request: Explain) -> int:
    """Without their tensors."""
    query, total = request.query, 0
    for spec in query.baselines:
        own = _BASELINE_BYTES
        for name in query.instances[0].moving:
            own += _BASELINE_BYTES + _text_bytes(name) + effective_baseline(spec.of(name)).ByteSize()
        copies = len(query.instances) if spec.instance_index is None else 1
        total += own * copies * spec.baseline_count(tuple(query.instances[0].moving))
    return total


def prediction_bytes(spec: OutputSpec, shape: Sequence[int], count: int, *, include_tensor: bool) -> int:
    """Size of a prediction, as an upper estimate.

    Args:
        shape: of the scores of one instance.
        count: of classes that are asked for.
    """
    total = _INPUT_BYTES + _text_bytes(spec.name)
    if len(shape) == 1 and spec.class_axis == 1:
        total += min(count, shape[0]) * (_CLASS_BYTES + _label_bytes(spec))
    return total + (math.prod(shape) * spec.dtype.itemsize if include_tensor else 0)


def map_count(request: Explain, cost: Cost) -> int:
    """Maps of the answer: one per target where baselines are folded, else one per question."""
    if not request.fold_baselines:
        return cost.question_count
    return sum(request.query.target_count(index) for index in range(len(request.query.instances)))
