"""WHAT to evaluate: attribution methods as pure functions around a value. numpy only, no model, no thread.

A method is a frozen dataclass of its options (`contract.py`): `plan` says what to evaluate, `attribution` turns what
came back into the answer or asks for more. To add one: a file here, its line in METHODS, its message in `oneof method`.
"""

from __future__ import annotations

from explainserve.methods.blur_integrated_gradients import BlurIntegratedGradients
from explainserve.methods.contract import Cost, Method, Needs, ReadingGuide
from explainserve.methods.deconv_net import DeconvNet
from explainserve.methods.deep_lift import DeepLift
from explainserve.methods.expected_gradients import ExpectedGradients
from explainserve.methods.feature_ablation import FeatureAblation
from explainserve.methods.grad_cam import GradCam
from explainserve.methods.grad_cam_plus_plus import GradCamPlusPlus
from explainserve.methods.gradient import Gradient
from explainserve.methods.gradient_x_input import GradientXInput
from explainserve.methods.guided_backpropagation import GuidedBackpropagation
from explainserve.methods.guided_grad_cam import GuidedGradCam
from explainserve.methods.guided_integrated_gradients import GuidedIntegratedGradients
from explainserve.methods.idgi import Idgi
from explainserve.methods.integrated_gradients import IntegratedGradients
from explainserve.methods.kernel_shap import KernelShap
from explainserve.methods.layer_cam import LayerCam
from explainserve.methods.lime import Lime
from explainserve.methods.lrp import Lrp
from explainserve.methods.occlusion import Occlusion
from explainserve.methods.pattern_attribution import PatternAttribution
from explainserve.methods.pattern_net import PatternNet
from explainserve.methods.rise import Rise
from explainserve.methods.score_cam import ScoreCam
from explainserve.methods.shapley_value_sampling import ShapleyValueSampling
from explainserve.methods.smooth_grad import SmoothGrad
from explainserve.methods.smooth_grad_squared import SmoothGradSquared
from explainserve.methods.var_grad import VarGrad
from explainserve.methods.xrai import Xrai

METHODS: dict[str, type[Method]] = {
    "integrated_gradients": IntegratedGradients,
    "gradient": Gradient,
    "gradient_x_input": GradientXInput,
    "smooth_grad": SmoothGrad,
    "smooth_grad_squared": SmoothGradSquared,
    "var_grad": VarGrad,
    "expected_gradients": ExpectedGradients,
    "blur_integrated_gradients": BlurIntegratedGradients,
    "guided_integrated_gradients": GuidedIntegratedGradients,
    "idgi": Idgi,
    "grad_cam": GradCam,
    "grad_cam_plus_plus": GradCamPlusPlus,
    "layer_cam": LayerCam,
    "score_cam": ScoreCam,
    "guided_grad_cam": GuidedGradCam,
    "guided_backpropagation": GuidedBackpropagation,
    "deconv_net": DeconvNet,
    "deep_lift": DeepLift,
    "lrp": Lrp,
    "pattern_net": PatternNet,
    "pattern_attribution": PatternAttribution,
    "occlusion": Occlusion,
    "rise": Rise,
    "feature_ablation": FeatureAblation,
    "kernel_shap": KernelShap,
    "shapley_value_sampling": ShapleyValueSampling,
    "lime": Lime,
    "xrai": Xrai,
}
"""Methods by the name of their field in MethodSpec."""


def name_of(method: Method) -> str:
    """Its key in METHODS."""
    return next(name for name, kind in METHODS.items() if kind is type(method))


__all__ = [
    "METHODS",
    "BlurIntegratedGradients",
    "Cost",
    "DeconvNet",
    "DeepLift",
    "ExpectedGradients",
    "FeatureAblation",
    "GradCam",
    "GradCamPlusPlus",
    "Gradient",
    "GradientXInput",
    "GuidedBackpropagation",
    "GuidedGradCam",
    "GuidedIntegratedGradients",
    "Idgi",
    "IntegratedGradients",
    "KernelShap",
    "LayerCam",
    "Lime",
    "Lrp",
    "Method",
    "Needs",
    "Occlusion",
    "PatternAttribution",
    "PatternNet",
    "ReadingGuide",
    "Rise",
    "ScoreCam",
    "ShapleyValueSampling",
    "SmoothGrad",
    "SmoothGradSquared",
    "VarGrad",
    "Xrai",
    "name_of",
]
