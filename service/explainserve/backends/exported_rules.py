"""Every gradient rule of exported graphs, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.fx import Graph, Node

from explainserve.backends import torch_deeplift, torch_rules
from explainserve.backends.exported_patterns import pattern_rule
from explainserve.backends.exported_relevance import relevance_rule
from explainserve.backends.exported_rule import Copies, Copy, Route, Stated
from explainserve.backends.torch_lrp import LRP_RULES
from explainserve.plan import STANDARD, GradientRule

PATTERN_RULES = frozenset({"pattern_attribution", "pattern_net"})

HANDED_DOWN = LRP_RULES.keys() | PATTERN_RULES
"""Rules whose backward pass starts from cotangent times value, right at the output: no score head is between."""

Make = Callable[..., Copy]
"""From a route, what is stated beside the file, and the rule's options."""


def copy_by(rule: GradientRule, route: Route, stated: Stated) -> Copy:
    """How nodes are copied to a graph whose backward pass follows a rule on a route."""
    return _RULES[rule.name](route, stated, **dict(rule.options))


def _derivative(route: Route, stated: Stated) -> Copy:
    return lambda graph, node, copies: graph.node_copy(node, copies.__getitem__)


def _deeplift(route: Route, stated: Stated) -> Copy:
    return torch_deeplift.deeplift_rule(route)


def _of_rectifiers(name: str, route: Route, stated: Stated) -> Copy:
    def copied(graph: Graph, node: Node, copies: Copies) -> Node:
        source = torch_rules.rectified(node, route.module)
        if source is None:
            return graph.node_copy(node, copies.__getitem__)
        return torch_rules.RULES[name](graph, node, source, copies)

    return copied


def _of_relevance(name: str, route: Route, stated: Stated, **options: Any) -> Copy:
    return relevance_rule(LRP_RULES[name](**options), route, stated)


_RULES: Mapping[str, Make] = {
    STANDARD.name: _derivative,
    torch_deeplift.RULE: _deeplift,
    **{name: partial(_of_rectifiers, name) for name in torch_rules.RULES},
    **{name: partial(_of_relevance, name) for name in LRP_RULES},
    **{name: partial(pattern_rule, name == "pattern_attribution") for name in PATTERN_RULES},
}
