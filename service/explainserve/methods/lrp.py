"""Layer-wise relevance propagation (Bach, Binder, Montavon, Klauschen, Mueller, Samek: On Pixel-Wise Explanations for
Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation, PLOS ONE 2015), with the rules of Montavon, Binder,
Lapuschkin, Samek, Mueller: Layer-Wise Relevance Propagation: An Overview, 2019, and Deep Taylor decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

from explainserve.errors import InvalidRequest
from explainserve.methods.contract import ReadingGuide
from explainserve.methods.instance_gradient import InstanceGradient
from explainserve.methods.sampling import check_has_effect, check_option
from explainserve.plan import GradientRule

_OPTIONS = {
    "epsilon": ("epsilon",),
    "gamma": ("epsilon", "gamma"),
    "alpha_beta": ("epsilon", "alpha"),
    "composite": ("epsilon",),
    "deep_taylor": ("epsilon",),
    "epsilon_gamma_box": ("epsilon", "gamma"),
}
"""What each rule has a say in."""

_DEFAULTS = {"gamma": 0.25, "alpha": 2.0}
"""Of options that only some rules have."""

_INDEPENDENT_OF_LATER_LAYERS = frozenset({"alpha_beta", "composite", "deep_taylor"})
"""Those with z+ or alpha-beta within, by Sixt, Granz, Landgraf: When Explanations Lie, ICML 2020."""


@dataclass(frozen=True)
class Lrp(InstanceGradient):
    """The score, handed down layer by layer in proportion to contributions: sums to it less what biases and epsilon
    absorb.

    After construction every option that the rule has is set to its effective value, and the others are None.

    Attributes:
        rule: a key of `_OPTIONS`.
        epsilon: of all denominators, positive.
        gamma: positive.
        alpha: at least 1; beta is alpha - 1.

    Raises:
        InvalidRequest: OPTION_OUT_OF_RANGE, OPTION_WITHOUT_EFFECT, ENUM_UNKNOWN.
    """

    rule: str = "composite"
    epsilon: float = 1e-6
    gamma: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in _OPTIONS:
            raise InvalidRequest("ENUM_UNKNOWN", f"LRP has no rule {self.rule!r}", field="rule", value=self.rule)
        check_option("epsilon", self.epsilon)
        for option, default in _DEFAULTS.items():
            if option not in _OPTIONS[self.rule]:
                check_has_effect(self, option, f"under the rule {self.rule}")
            elif getattr(self, option) is None:
                object.__setattr__(self, option, default)
        if self.gamma is not None:
            check_option("gamma", self.gamma)
        if self.alpha is not None:
            check_option("alpha", self.alpha, low=1.0, above=False)

    @property
    def reading_guide(self) -> ReadingGuide:
        """That of the rule."""
        return ReadingGuide(
            family="backward rule",
            units="output",
            complete=False,
            needs_baseline=False,
            deterministic=True,
            paper="Bach et al.: On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance "
            "Propagation, PLOS ONE 2015, doi:10.1371/journal.pone.0130140",
            tier="T3",
            score_before_activation=True,
            fails_randomization=self.rule in _INDEPENDENT_OF_LATER_LAYERS,
        )

    @property
    def gradient_rule(self) -> GradientRule:
        """The rule's own table, with the options that it takes."""
        options = tuple((name, float(getattr(self, name))) for name in _OPTIONS[self.rule])
        return GradientRule(f"lrp_{self.rule}", options)
