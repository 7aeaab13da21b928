"""Every RPC of ModelRepositoryService: what the model folder holds, and loading and unloading it while it is served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from explainserve import process
from explainserve.errors import Unsupported
from explainserve.repository import ModelEntry, Repository
from explainserve.rpc import model_messages
from explainserve.rpc.model_references import named_model
from explainserve.v1 import model_repository_service_pb2 as pb
from explainserve.v1.model_pb2 import NamedModel
from explainserve.v1.model_repository_service_pb2_grpc import ModelRepositoryServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class RepositoryServicer(ModelRepositoryServiceServicer):
    """Answers RPCs. Errors are raised; the interceptor translates them.

    Args:
        loading: the thread that loads and unloads, one after the other.
        enabled: else every RPC is refused.
    """

    def __init__(self, repository: Repository, loading: ThreadPoolExecutor, *, enabled: bool) -> None:
        self._repository = repository
        self._loading = loading
        self._enabled = enabled

    async def IndexModels(self, request: pb.IndexModelsRequest, context: Context) -> pb.IndexModelsResponse:
        """Every version in the folder and in the server."""
        self._check_enabled()
        entries = await asyncio.to_thread(self._repository.index)
        return pb.IndexModelsResponse(models=[model_messages.model_summary(entry) for entry in entries])

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        """Opens a version beside what is served, then serves it."""
        entry = await self._changed(self._repository.load, request.model)
        return pb.LoadModelResponse(model=model_messages.model_summary(entry))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        """Serves a version no longer."""
        entry = await self._changed(self._repository.unload, request.model)
        return pb.UnloadModelResponse(model=model_messages.model_summary(entry))

    async def _changed(self, change: Callable[[str, int | None], ModelEntry], model: NamedModel) -> ModelEntry:
        """Once begun it goes on when the caller leaves: half a change would be worse than either."""
        self._check_enabled()
        name, version = named_model(model)
        done = asyncio.get_running_loop().run_in_executor(self._loading, _settled, change, name, version)
        return await asyncio.shield(done)

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise Unsupported(
                "MODEL_CONTROL_OFF",
                "models of this server are not loaded and unloaded over the wire; start it with --allow-model-control",
                setting="allow_model_control",
            )


def _settled(change: Callable[[str, int | None], ModelEntry], name: str, version: int | None) -> ModelEntry:
    try:
        return change(name, version)
    finally:
        process.settle()
