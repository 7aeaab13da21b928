"""Client of ExplainServe: raw feature attributions of compiled models over gRPC.

    from explainserve_client import Box, Client, IntegratedGradients

    with Client("localhost:8001") as client:
        result = client.explain("two-digits", image, targets=[3, 8], baselines="gray",
                                method=IntegratedGradients(step_count=64), regions={"left": Box(0, 0, 32, 64)})
        a = result.attributions[0]
        a.tensor, a.convergence_delta, a.statistics["CHANNEL_SUM"].max

Spellings of targets and baselines are listed in `explainserve_client.targets` and `explainserve_client.baselines`,
errors in `explainserve_client.errors`. `explainserve_client.draw` (needs pillow) draws maps from their metadata.
"""

from explainserve_client._async.client import AsyncClient
from explainserve_client._sync.client import Client
from explainserve_client._version import __version__
from explainserve_client.baselines import (
    Baseline,
    Blur,
    Constant,
    DataBaseline,
    GaussianNoise,
    TensorBaseline,
    UniformNoise,
    UsedBaseline,
    UsedInputBaseline,
    Zeros,
)
from explainserve_client.errors import (
    Cancelled,
    ClientClosedError,
    DeadlineExceeded,
    ExplainServeError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    MalformedResponseError,
    MissingEntryError,
    NotFound,
    RequestTypeError,
    RequestValueError,
    ResourceExhausted,
    ServerError,
    Unavailable,
    Unimplemented,
)
from explainserve_client.methods import (
    ExpectedGradients,
    Gradient,
    GradientXInput,
    IntegratedGradients,
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)
from explainserve_client.models import (
    Axis,
    InputSpec,
    Layer,
    Memory,
    MethodSupport,
    ModelInfo,
    ModelSummary,
    OperatorGap,
    OutputSpec,
    Preprocessing,
    ValueRange,
)
from explainserve_client.preprocess import Geometry, Preprocessed
from explainserve_client.regions import AttributionSelector, Box, Group, Region
from explainserve_client.results import (
    Attribution,
    Caution,
    ClassScore,
    CostEstimate,
    ExplainResult,
    InputAttribution,
    Prediction,
    PredictResult,
    Provenance,
    ScorePath,
)
from explainserve_client.statistics import (
    JointInput,
    JointStatistics,
    Normalization,
    PairRange,
    RegionSum,
    Statistics,
    reduce_to_view,
)
from explainserve_client.streams import Progress
from explainserve_client.table import Table
from explainserve_client.targets import Label, Margin, ResolvedTarget, Target, TopK

__all__ = [
    "AsyncClient",
    "Attribution",
    "AttributionSelector",
    "Axis",
    "Baseline",
    "Blur",
    "Box",
    "Cancelled",
    "Caution",
    "ClassScore",
    "Client",
    "ClientClosedError",
    "Constant",
    "CostEstimate",
    "DataBaseline",
    "DeadlineExceeded",
    "ExpectedGradients",
    "ExplainResult",
    "ExplainServeError",
    "FailedPrecondition",
    "GaussianNoise",
    "Geometry",
    "Gradient",
    "GradientXInput",
    "Group",
    "InputAttribution",
    "InputSpec",
    "IntegratedGradients",
    "Internal",
    "InvalidArgument",
    "JointInput",
    "JointStatistics",
    "Label",
    "Layer",
    "MalformedResponseError",
    "Margin",
    "Memory",
    "MethodSupport",
    "MissingEntryError",
    "ModelInfo",
    "ModelSummary",
    "Normalization",
    "NotFound",
    "OperatorGap",
    "OutputSpec",
    "PairRange",
    "PredictResult",
    "Prediction",
    "Preprocessed",
    "Preprocessing",
    "Progress",
    "Provenance",
    "Region",
    "RegionSum",
    "RequestTypeError",
    "RequestValueError",
    "ResolvedTarget",
    "ResourceExhausted",
    "ScorePath",
    "ServerError",
    "SmoothGrad",
    "SmoothGradSquared",
    "Statistics",
    "Table",
    "Target",
    "TensorBaseline",
    "TopK",
    "Unavailable",
    "UniformNoise",
    "Unimplemented",
    "UsedBaseline",
    "UsedInputBaseline",
    "ValueRange",
    "VarGrad",
    "Zeros",
    "__version__",
    "reduce_to_view",
]
