"""The devices of a server: an engine each, and which of them evaluates a request.

A model may be loaded on several devices. A request goes to one of them, whole: to the one that is expected to be done
with it first, for its rows share what is copied there, and its maps state one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from explainserve.engine import Engine
from explainserve.errors import QueueFull
from explainserve.plan import Evaluation, Plan
from explainserve.scheduling import Request
from explainserve.served_model import ServedModel


class Devices:
    """Evaluates plans on the devices of a server.

    Args:
        engines: by name of the device.
        replicas: the same model on each device that holds it now, given one of them.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        replicas: Callable[[ServedModel], Sequence[ServedModel]] = lambda model: (model,),
    ) -> None:
        self._engines = engines
        self._replicas = replicas

    def start(self) -> None:
        """Starts every engine."""
        for engine in self._engines.values():
            engine.start()

    def stop(self) -> None:
        """Stops all engines at once, so that none waits for the last batch of another."""
        with ThreadPoolExecutor(len(self._engines)) as threads:
            list(threads.map(Engine.stop, self._engines.values()))

    @contextmanager
    def admitted(self, model: ServedModel, request: Request, row_count: int) -> Iterator[ServedModel]:
        """A place in the queue of one device for all rows that a request may need, as long as the context lasts.

        Yields:
            The replica of the model that evaluates its rows.

        Raises:
            QueueFull: no device that holds the model has one (QUEUE_FULL).
        """
        with ExitStack() as place:
            yield self._admit(place, model, request, row_count)

    async def evaluate(self, model: ServedModel, plan: Plan, request: Request) -> tuple[Evaluation, float]:
        """Evaluates all rows of a plan of a request that was admitted with this replica; see `Engine.evaluate`."""
        return await self._engines[model.device].evaluate(model, plan, request)

    def _admit(self, place: ExitStack, model: ServedModel, request: Request, row_count: int) -> ServedModel:
        """On the first device in the order in which they are expected to be done that has room."""
        refusals = []
        for replica in self._soonest_first(model, row_count):
            engine = self._engines[replica.device]
            request.seconds_per_row = engine.seconds_per_row(replica)
            try:
                place.enter_context(engine.admitted(request, row_count))
                return replica
            except QueueFull as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def _soonest_first(self, model: ServedModel, row_count: int) -> list[ServedModel]:
        def expected(replica: ServedModel) -> tuple[float, int]:
            return self._engines[replica.device].expected(replica, row_count)

        return sorted(self._replicas(model), key=expected)
