"""Whether the engine still steps: a process that hangs keeps its sockets open, and everything that only asks whether it is there finds it well."""

import time
from collections.abc import Callable, Iterable

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core_client import AsyncMPClient

from memdec.server.in_place import overwrite


class Liveness:
    """Since when each engine of this server owes a step: since its last one, or since it was given work."""

    def __init__(self, working: Callable[[], Iterable[int]], clock: Callable[[], float] = time.monotonic) -> None:
        """`working` gives the numbers of the engines that have unfinished requests."""
        self.working, self.clock = working, clock
        self.limit = 60.0
        """Seconds that no step takes."""
        self.since: dict[int, float] = {}

    def given(self) -> None:
        """A request has gone to some engine."""
        for engine in self.working():
            self.since.setdefault(engine, self.clock())

    def stepped(self, engine: int) -> None:
        """A step's outputs have come."""
        self.since[engine] = self.clock()

    def waited(self) -> float | None:
        """Seconds that the slowest engine with work has owed a step for; None: there is no work."""
        working = set(self.working())
        for engine in set(self.since) - working:
            del self.since[engine]
        return max((self.clock() - self.since.setdefault(engine, self.clock()) for engine in working), default=None)

    @property
    def hung(self) -> bool:
        """Whether that is longer than any step should take."""
        return (self.waited() or 0.0) > self.limit

    def watch(self, client: AsyncMPClient) -> None:
        """See every step's outputs of vLLM's AsyncMPClient pass. An engine with statistics off sends none for steps without a token."""
        receive = client.get_output_async

        async def watched() -> EngineCoreOutputs:
            outputs = await receive()
            self.stepped(outputs.engine_index)
            return outputs

        overwrite(client, "get_output_async", watched)


def engines_with_work(client: AsyncMPClient, unfinished: int) -> set[int]:
    """Numbers of the engines that have some of the unfinished requests: only vLLM's load-balancing client has several, and knows who has which."""
    if not unfinished:
        return set()
    if len(client.engine_ranks_managed) == 1:
        return {client.engine_ranks_managed[0]}
    return {int.from_bytes(identity, "little") for identity in client.reqs_in_flight.values()}
