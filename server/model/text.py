"""The text before each token of a step. Both runner adapters make it, for memories that look it up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from memdec.server.model.routing import Beside


@dataclass(frozen=True)
class StepText:
    """The texts of a step's requests: token ids on the host, including those that were drafted for the step."""

    starts: Sequence[int]
    """Place in the step of each request's first token, ascending."""
    positions: Sequence[int]
    """Position of that token in the request's own text."""
    read: Callable[[int, int, int], list[int]]
    """Request, position, end -> its tokens from that position to before the end; not beyond its last token in the step."""
    besides: Sequence[Beside | None] = ()
    """The n-gram memory that each request mixes in besides its decoder; empty: none does."""
    early: bool = True
    """Whether the host has the tokens before the forward pass; otherwise reading them waits for the device."""

    def request(self, place: int) -> int:
        """The request of the token that has this place in the step."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def beside(self, place: int) -> Beside | None:
        """The n-gram memory that is mixed in besides a decoder for the token that has this place in the step; None: there is none."""
        return self.besides[self.request(place)] if self.besides else None

    def up_to(self, place: int, most: int) -> list[int]:
        """The last `most` tokens of a request's text, up to the one that has this place in the step."""
        request = self.request(place)
        end = self.positions[request] + place - self.starts[request] + 1
        return self.read(request, max(0, end - most), end)
