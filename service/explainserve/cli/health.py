"""`explainserve health`: whether a server answers. Light, because container health checks run it every few seconds."""

from __future__ import annotations

from typing import Annotated

import typer

from explainserve.cli.connection import DEFAULT_SERVER, ServerOption
from explainserve.cli.failures import FAILURE, fail


def health(
    server: ServerOption = DEFAULT_SERVER,
    service: Annotated[
        str, typer.Option("--service", metavar="NAME", help="A service of the server; empty means the whole server.")
    ] = "",
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Seconds to wait for the answer.")
    ] = 3.0,
) -> None:
    """Ask whether a server answers.

    Prints its state and exits with 0 if that is SERVING, with 1 otherwise."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(server) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
        except grpc.RpcError as error:
            raise fail(f"{error.code().name}: {error.details()} ({server})") from error
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    typer.echo(state)
    if state != "SERVING":
        raise typer.Exit(FAILURE)
