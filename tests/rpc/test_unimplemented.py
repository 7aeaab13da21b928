"""What is not built yet says so, and says what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
import pytest

from explainserve.rpc.repository_servicer import RepositoryServicer
from explainserve.rpc.servicer import Servicer
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceServicer, ExplainerServiceStub
from explainserve.v1.model_repository_service_pb2_grpc import ModelRepositoryServiceServicer
from rpc.loopback import Loopback, refusal


def drained(answers: Iterable[Any]) -> list[Any]:
    return list(answers)


EXPLAINER: dict[str, Callable[[ExplainerServiceStub], object]] = {
    "Compare": lambda stub: drained(stub.Compare(pb.CompareRequest(), timeout=60)),
    "Evaluate": lambda stub: drained(stub.Evaluate(pb.EvaluateRequest(), timeout=60)),
}


def check(call: Callable[[], object], rpc: str) -> None:
    refused = refusal(call)

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNIMPLEMENTED, "RPC_UNIMPLEMENTED")
    assert refused.metadata == {"rpc": rpc}
    assert refused.message.startswith(f"{rpc} is not built yet: ")
    assert refused.trailing["x-request-id"]


@pytest.mark.parametrize("rpc", EXPLAINER)
def test_explainer_rpc_says_what_is_missing(service: Loopback, rpc: str) -> None:
    check(lambda: EXPLAINER[rpc](service.stub), rpc)
    assert service.stub.ListModels(pb.ListModelsRequest(), timeout=60).models


@pytest.mark.parametrize(
    ("own", "generated"),
    [(Servicer, ExplainerServiceServicer), (RepositoryServicer, ModelRepositoryServiceServicer)],
)
def test_servicer_overrides_every_rpc(own: type, generated: type) -> None:
    """What it does not override would answer UNIMPLEMENTED without a reason."""
    rpcs = [name for name in vars(generated) if not name.startswith("_")]

    assert rpcs
    assert [name for name in rpcs if name not in vars(own)] == []
