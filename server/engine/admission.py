"""The bound on requests under way and waiting."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from memdec.server.errors import QueueFull


class Places:
    """Places that one HTTP request keeps for choices which the engine doesn't have yet."""

    def __init__(self, count: int) -> None:
        self.count = count


_mine: ContextVar[Places | None] = ContextVar("places", default=None)


class Admission:
    """Keeps a place for every choice from its admission until the engine counts it: vLLM counts alone, and a crowd that comes at once passes."""

    def __init__(self, bound: int | None) -> None:
        self.bound, self.kept = bound, 0

    @contextmanager
    def keep(self, choices: int, under_way: int) -> Iterator[None]:
        """Keep places within. Raises QueueFull if the engine's requests `under_way` and those on their way to it leave too few."""
        if self.bound is not None and under_way + self.kept + choices > self.bound:
            raise QueueFull("The server has as many requests as it takes. Try again in a few seconds, or on another replica.")
        places = Places(choices)
        self.kept += choices
        token = _mine.set(places)
        try:
            yield
        finally:
            _mine.reset(token)
            self._give_back(places, places.count)

    def arrived(self, choices: int) -> None:
        """The engine has so many choices of the request that is being served, or has refused them."""
        if (places := _mine.get()) is not None:
            self._give_back(places, min(choices, places.count))

    def _give_back(self, places: Places, count: int) -> None:
        places.count -= count
        self.kept -= count
