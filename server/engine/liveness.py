"""Whether the engine still takes steps: a process that hangs keeps its sockets open, so vLLM's health check finds nothing wrong with it."""

import time
from collections.abc import Callable, Iterable

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core_client import AsyncMPClient

from memdec.server.in_place import overwrite


class Liveness:
    """How long each engine of this server has owed a step: since its last one, or since it got its first request after being idle."""

    def __init__(self, working: Callable[[], Iterable[int]], clock: Callable[[], float] = time.monotonic) -> None:
        """`working` gives the numbers of the engines that have unfinished requests."""
        self.working, self.clock = working, clock
        self.limit = 60.0
        """Seconds after which an engine that owes a step counts as hung; a step takes less."""
        self.since: dict[int, float] = {}
        """Engine -> the clock at its last step, or at its first request since."""

    def given(self) -> None:
        """Note that an engine has been sent a request."""
        for engine in self.working():
            self.since.setdefault(engine, self.clock())

    def stepped(self, engine: int) -> None:
        """Note that an engine's outputs of a step have arrived."""
        self.since[engine] = self.clock()

    def waited(self) -> float | None:
        """The most seconds that an engine with work has owed a step; None if no engine has work."""
        working = set(self.working())
        for engine in set(self.since) - working:
            del self.since[engine]
        return max((self.clock() - self.since.setdefault(engine, self.clock()) for engine in working), default=None)

    @property
    def hung(self) -> bool:
        """Whether an engine has owed a step for more than `limit` seconds."""
        return (self.waited() or 0.0) > self.limit

    def watch(self, client: AsyncMPClient) -> None:
        """Note each step whose outputs vLLM's AsyncMPClient receives. An engine with statistics off sends none for steps without a token."""
        receive = client.get_output_async

        async def watched() -> EngineCoreOutputs:
            outputs = await receive()
            self.stepped(outputs.engine_index)
            return outputs

        overwrite(client, "get_output_async", watched)


def engines_with_work(client: AsyncMPClient, unfinished: int) -> set[int]:
    """Numbers of the engines that have unfinished requests. Only vLLM's load-balancing client has several, and knows each one's requests."""
    if not unfinished:
        return set()
    if len(client.engine_ranks_managed) == 1:
        return {client.engine_ranks_managed[0]}
    return {int.from_bytes(identity, "little") for identity in client.reqs_in_flight.values()}
