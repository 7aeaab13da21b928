"""Whether gradients flow through a torch model, found by asking it for one."""

from __future__ import annotations

from explainserve.backends.contract import LoadedModel, OperatorGap
from explainserve.backends.probe import gradient_rows, sample_instances
from explainserve.errors import EvaluationFailed, ModelRefused, Unsupported


def gradient_gaps(model: LoadedModel, captured_no_grad: bool) -> tuple[OperatorGap, ...]:
    """The one gap of a graph without any gradient; none where an output has one, or where none could be tried.

    Args:
        captured_no_grad: the file itself switches gradients off somewhere.

    Raises:
        ModelRefused: no gradient flows because the file switches it off (NO_GRADIENT).
    """
    if not model.signature.differentiable_inputs:
        return ()
    (instance,) = sample_instances(model.signature, 1)
    for rows in gradient_rows(model.signature, (instance,)):
        try:
            model.evaluate(rows)
        except Unsupported:
            continue
        except EvaluationFailed:
            return ()
        return ()
    if captured_no_grad:
        raise ModelRefused(
            "NO_GRADIENT",
            "the file runs under no_grad, so no gradient reaches its inputs; export the model without torch.no_grad()",
        )
    return (_GAP,)


_GAP = OperatorGap(
    operator="",
    node="",
    reason="no output has a gradient with respect to a floating-point input: comparisons or integers lie between",
    remedy="explain an earlier, differentiable output, or use a method that needs no gradient",
)
