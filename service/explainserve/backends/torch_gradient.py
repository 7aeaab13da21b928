"""Whether gradients flow through a torch model, found by asking it for one."""

from __future__ import annotations

from explainserve.backends.contract import LoadedModel, OperatorGap
from explainserve.backends.probe import free_extents, gradient_rows, sample_instances
from explainserve.errors import EvaluationFailed, ModelRefused, Unsupported
from explainserve.plan import Rows


def gradient_gaps(model: LoadedModel, captured_no_grad: bool) -> tuple[OperatorGap, ...]:
    """The one gap of a graph without any gradient; none where an output has one, or where none could be tried.

    Args:
        captured_no_grad: the file itself switches gradients off somewhere.

    Raises:
        ModelRefused: no gradient flows because the file switches it off (NO_GRADIENT).
    """
    if model.signature.undifferentiable_reason:
        return ()
    if _has_gradient(model) is not False:
        return ()
    if captured_no_grad:
        raise ModelRefused(
            "NO_GRADIENT",
            "the file runs under no_grad, so no gradient reaches its inputs; export the model without torch.no_grad()",
        )
    return (_GAP,)


def _has_gradient(model: LoadedModel) -> bool | None:
    """Whether an output has a gradient, or None where the model runs at none of the guessed extents."""
    for extents in free_extents(model.signature):
        instances = sample_instances(model.signature, 1, extents)
        try:
            return any(_differentiates(model, rows) for rows in gradient_rows(model.signature, instances))
        except EvaluationFailed as error:
            if error.reason == "OUT_OF_MEMORY":
                raise MemoryError(error.message) from error
    return None


def _differentiates(model: LoadedModel, rows: Rows) -> bool:
    try:
        model.evaluate(rows)
    except Unsupported:
        return False
    return True


_GAP = OperatorGap(
    operator="",
    node="",
    reason="no output has a gradient with respect to a floating-point input: comparisons or integers lie between",
    remedy="explain an earlier, differentiable output, or use a method that needs no gradient",
)
