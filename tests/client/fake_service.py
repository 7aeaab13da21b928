"""A service that records what it is asked and answers by hand, and models made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from google.rpc import error_details_pb2, status_pb2

from explainserve.v1 import (
    attribution_pb2,
    explainer_service_pb2,
    explainer_service_pb2_grpc,
    model_pb2,
    model_repository_service_pb2_grpc,
    statistics_pb2,
    target_pb2,
    tensor_pb2,
)

Answer = Callable[[Any, grpc.ServicerContext], Any]
IMAGE_SHAPE = (1, 64, 64)


class FakeService(
    explainer_service_pb2_grpc.ExplainerServiceServicer,
    model_repository_service_pb2_grpc.ModelRepositoryServiceServicer,
):
    """Records (call, request, metadata) and answers from `answers`, by the name of the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, str]]] = []
        self.models: dict[str, model_pb2.Model] = {model.summary.name: model for model in (two_digits(), captioner())}
        self.answers: dict[str, Answer] = {
            "GetModel": self._model,
            "Explain": lambda request, context: explain_response(),
            "ExplainStream": lambda request, context: stream_responses(),
            "Health": lambda request, context: Int32Value(value=1),
        }

    def requests(self, call: str) -> list[Any]:
        """What this call was sent, in order."""
        return [request for name, request, _ in self.calls if name == call]

    def Explain(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("Explain", request, context)

    def ExplainStream(self, request: Any, context: grpc.ServicerContext) -> Any:
        yield from self._answer("ExplainStream", request, context)

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("Predict", request, context)

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("ListModels", request, context)

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("GetModel", request, context)

    def EstimateCost(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("EstimateCost", request, context)

    def IndexModels(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("IndexModels", request, context)

    def LoadModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("LoadModel", request, context)

    def UnloadModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("UnloadModel", request, context)

    def check_health(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("Health", request, context)

    def _answer(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self.calls.append((name, request, metadata))
        context.set_trailing_metadata((("x-request-id", metadata["x-request-id"]),))
        return self.answers[name](request, context)

    def _model(self, request: Any, context: grpc.ServicerContext) -> Any:
        name = request.model.named.name
        if name not in self.models:
            refuse(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", f"no model {name!r}", {"model": name})
        return explainer_service_pb2.GetModelResponse(model=self.models[name])


def start(service: FakeService) -> tuple[grpc.Server, str]:
    """A server on a free loopback port, and its address."""
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    explainer_service_pb2_grpc.add_ExplainerServiceServicer_to_server(service, server)
    model_repository_service_pb2_grpc.add_ModelRepositoryServiceServicer_to_server(service, server)
    check = grpc.unary_unary_rpc_method_handler(
        service.check_health, StringValue.FromString, Int32Value.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def refuse(
    context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, message: str, metadata: dict[str, str]
) -> None:
    """Ends the call as the contract says: canonical code and google.rpc.ErrorInfo."""
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="explainserve", metadata=metadata))
    status = status_pb2.Status(code=code.value[0], message=message, details=[packed])
    request_id = dict(context.invocation_metadata())["x-request-id"]
    context.set_trailing_metadata(
        (("x-request-id", request_id), ("grpc-status-details-bin", status.SerializeToString()))
    )
    context.abort(code, message)


def axes(*sizes: int | None) -> list[model_pb2.Axis]:
    """Axes named "a0", "a1", ...; None is any extent."""
    return [model_pb2.Axis(name=f"a{position}", size=size) for position, size in enumerate(sizes)]


def two_digits() -> model_pb2.Model:
    """One image input of one channel with preprocessing, ten classes."""
    return model_pb2.Model(
        summary=model_pb2.ModelSummary(name="two-digits", version=2, state=model_pb2.MODEL_STATE_READY),
        inputs=[
            model_pb2.InputSpec(
                name="image",
                data_type=tensor_pb2.DATA_TYPE_FLOAT32,
                axes=axes(None, *IMAGE_SHAPE),
                layout="NCHW",
                batch_axis=0,
                channel_axis=1,
                value_range=model_pb2.ValueRange(low=0, high=1),
                preprocessing=model_pb2.Preprocessing(mean=[0.5], std=[0.25]),
                differentiable=True,
            )
        ],
        outputs=[
            model_pb2.OutputSpec(
                name="logits",
                data_type=tensor_pb2.DATA_TYPE_FLOAT32,
                axes=axes(None, 10),
                kind=model_pb2.OUTPUT_KIND_LOGITS,
                activation=model_pb2.ACTIVATION_SOFTMAX,
                class_axis=1,
                labels=[str(digit) for digit in range(10)],
            )
        ],
    )


def captioner() -> model_pb2.Model:
    """Two moving inputs, one with preprocessing and one without, and integer token ids."""
    return model_pb2.Model(
        summary=model_pb2.ModelSummary(name="captioner", version=1, state=model_pb2.MODEL_STATE_READY),
        inputs=[
            two_digits().inputs[0],
            model_pb2.InputSpec(
                name="mask",
                data_type=tensor_pb2.DATA_TYPE_FLOAT32,
                axes=axes(None, 7),
                batch_axis=0,
                differentiable=True,
            ),
            model_pb2.InputSpec(name="ids", data_type=tensor_pb2.DATA_TYPE_INT64, axes=axes(None, 7), batch_axis=0),
        ],
        default_target=4,
    )


def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    """A float32 tensor, encoded here and not by the client."""
    return tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=array.astype("<f4").tobytes()
    )


def figures(view: str, values: np.ndarray) -> statistics_pb2.Statistics:
    """A few figures of a view."""
    return statistics_pb2.Statistics(
        view=statistics_pb2.View.Value(f"VIEW_{view}"),
        element_count=values.size,
        finite_count=values.size,
        min=values.min(),
        max=values.max(),
        quantiles=[statistics_pb2.Quantile(probability=0.01, value=float(np.quantile(values, 0.01)))],
        abs_mass_thresholds=[statistics_pb2.AbsMassThreshold(mass=0.98, value=1.5)],
    )


def min_max(view: str, values: np.ndarray) -> statistics_pb2.Normalization:
    """The recipe MIN_MAX of a view."""
    low, high = values.min(), values.max()
    return statistics_pb2.Normalization(
        kind=statistics_pb2.NORMALIZATION_KIND_MIN_MAX,
        view=statistics_pb2.View.Value(f"VIEW_{view}"),
        center=low,
        scale=high - low,
        lower=0,
        upper=1,
        zero_at=np.clip(-low / (high - low), 0, 1),
    )


def maps(count: int = 2, shape: tuple[int, ...] = IMAGE_SHAPE) -> list[np.ndarray]:
    """Maps with values of both signs, always the same."""
    generator = np.random.default_rng(7)
    return [generator.normal(size=shape).astype(np.float32) for _ in range(count)]


def attribution(values: np.ndarray, target_index: int) -> attribution_pb2.Attribution:
    """The attribution of one target of two-digits, with every figure of one view."""
    view = values.astype(np.float64).sum(axis=0)
    return attribution_pb2.Attribution(
        target_index=target_index,
        baseline_index=0,
        target=target_pb2.ResolvedTarget(
            output="logits", score=target_pb2.SCORE_PROBABILITY, index=[3], label="3", selection="index"
        ),
        inputs=[
            attribution_pb2.InputAttribution(
                name="image",
                tensor=tensor(values),
                layout="CHW",
                channel_axis=0,
                statistics=[figures("CHANNEL_SUM", view)],
                normalizations=[min_max("CHANNEL_SUM", view)],
                regions=[
                    statistics_pb2.RegionSum(name="left", view=statistics_pb2.VIEW_ELEMENTS, sum=1.25, element_count=8),
                    statistics_pb2.RegionSum(name="left", view=statistics_pb2.VIEW_CHANNEL_SUM, sum=1.25, share=0.5),
                ],
            )
        ],
        instance_output_value=0.9,
        baseline_output_value=0.1,
        attribution_sum=0.81,
        convergence_delta=0.01,
        step_count=64,
        stop_reason=attribution_pb2.STOP_REASON_FIXED_STEPS,
        score_path=attribution_pb2.ScorePath(alphas=[0, 1], scores=[0.1, 0.9]),
        applied_normalization=attribution_pb2.APPLIED_NORMALIZATION_NONE,
        cautions=[attribution_pb2.Caution(kind=attribution_pb2.CAUTION_KIND_SINGLE_CASE, text="one input")],
    )


def explain_response(groups: tuple[str, ...] = ("all",)) -> explainer_service_pb2.ExplainResponse:
    """Two targets of one instance of two-digits, pooled in each of the groups."""
    both = maps()
    pooled = np.stack(both).astype(np.float64).sum(axis=1)
    joint = statistics_pb2.JointInput(
        input="image",
        statistics=[figures("CHANNEL_SUM", pooled)],
        normalizations=[min_max("CHANNEL_SUM", pooled)],
    )
    return explainer_service_pb2.ExplainResponse(
        attributions=[attribution(values, position) for position, values in enumerate(both)],
        joint=[statistics_pb2.JointStatistics(group=group, members=[0, 1], inputs=[joint]) for group in groups],
        inputs=two_digits().inputs,
        provenance=attribution_pb2.Provenance(model_name="two-digits", model_version=2, backend="onnxruntime"),
    )


def progress(step_count: int, stop_reason: str = "UNFINISHED") -> explainer_service_pb2.Progress:
    """Of the second target of two-digits."""
    return explainer_service_pb2.Progress(
        position=statistics_pb2.AttributionSelector(method_index=0, instance_index=0, target_index=1, baseline_index=0),
        step_count=step_count,
        max_step_count=64,
        map_error=1 / step_count,
        stop_reason=attribution_pb2.StopReason.Value(f"STOP_REASON_{stop_reason}"),
        path_count=2,
    )


def in_pieces(
    event: explainer_service_pb2.ExplainStreamResponse, tensors: Sequence[tensor_pb2.Tensor], size: int, first_key: int
) -> list[explainer_service_pb2.ExplainStreamResponse]:
    """The event without the bytes of these tensors of it, and the chunks that follow."""
    chunks = []
    for key, one in enumerate(tensors, first_key):
        for offset in range(0, len(one.data), size):
            piece = one.data[offset : offset + size]
            chunks.append(explainer_service_pb2.TensorChunk(chunk_key=key, offset=offset, data=piece))
        one.chunk_key = key
        one.ClearField("data")
    return [event, *(explainer_service_pb2.ExplainStreamResponse(chunk=chunk) for chunk in chunks)]


def stream_responses(size: int = 5000) -> list[explainer_service_pb2.ExplainStreamResponse]:
    """Progress, a map so far, progress, and what Explain gives."""
    partial = explainer_service_pb2.ExplainStreamResponse(partial=attribution(maps()[1], 1))
    partial.partial.stop_reason = attribution_pb2.STOP_REASON_UNFINISHED
    final = explainer_service_pb2.ExplainStreamResponse(final=explain_response())
    return [
        explainer_service_pb2.ExplainStreamResponse(progress=progress(8)),
        *in_pieces(partial, [partial.partial.inputs[0].tensor], size, 0),
        explainer_service_pb2.ExplainStreamResponse(progress=progress(16, "CONVERGED")),
        *in_pieces(final, [own.inputs[0].tensor for own in final.final.attributions], size, 1),
    ]
