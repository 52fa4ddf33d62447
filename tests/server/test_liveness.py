"""When an engine counts as hung; no engine, and no clock but the test's."""

import asyncio
from types import SimpleNamespace
from typing import Any

from memdec.server.engine.liveness import Liveness, engines_with_work


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def test_only_an_engine_with_work_owes_steps() -> None:
    """From when it was given the first request, or from its last step; idle hours don't count."""
    clock, working = Clock(), set[int]()
    live = Liveness(lambda: working, clock)
    live.limit = 60
    clock.now = 5000
    assert live.waited() is None and not live.hung
    working.add(0)
    live.given()
    clock.now += 59
    live.given()  # another request doesn't start the time anew
    assert live.waited() == 59 and not live.hung
    clock.now += 2
    assert live.hung
    live.stepped(0)
    assert live.waited() == 0 and not live.hung
    clock.now += 61
    assert live.hung
    working.clear()
    assert live.waited() is None and not live.hung
    clock.now += 1000
    working.add(0)
    assert live.waited() == 0


def test_the_slowest_of_several_engines_counts() -> None:
    """One that steps hides none that doesn't."""
    clock = Clock()
    live = Liveness(lambda: {0, 1}, clock)
    live.given()
    for _ in range(10):
        clock.now += 10
        live.stepped(0)
    assert live.waited() == 100 and live.hung


def test_steps_are_seen_as_they_pass() -> None:
    """By the number of their engine, unchanged."""
    clock = Clock()
    live = Liveness(lambda: {3}, clock)
    live.given()
    sent = SimpleNamespace(engine_index=3)

    async def get_output_async() -> Any:
        return sent

    client = SimpleNamespace(get_output_async=get_output_async)
    live.watch(client)
    clock.now = 7
    assert live.waited() == 7
    assert asyncio.run(client.get_output_async()) is sent
    assert live.waited() == 0


def test_who_has_work() -> None:
    """The one engine of most clients; the load-balancing client's by what it has given them."""
    alone = SimpleNamespace(engine_ranks_managed=[2])
    assert engines_with_work(alone, 0) == set() and engines_with_work(alone, 1) == {2}
    several = SimpleNamespace(engine_ranks_managed=[0, 1, 2], reqs_in_flight={"a": b"\x01\x00", "b": b"\x02\x00"})
    assert engines_with_work(several, 2) == {1, 2} and engines_with_work(several, 0) == set()
