"""Which decoder each token of one engine step belongs to. Both runner adapters make it, the model reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdec.server.model.packing import tail
from memdec.server.routing.domains import Shares

NO_DOMAIN = 0  # the slot of requests that use the base alone; decoders have slots 1 to D, datastores D + 1 to D + S, n-grams those above

NONE_KNOWN = torch.zeros(0, 0)
"""Hidden states of no tokens."""


@dataclass(frozen=True)
class Beside:
    """The n-gram memory that a decoder's request mixes in, too."""

    slot: int
    shares: Shares
    """How the two share the request's lambda."""


class Chosen(NamedTuple):
    """What a request mixes in: a memory's slot (0: none), lambda, and with mode `both` the n-gram memory besides the decoder."""

    slot: int
    lam: float
    beside: Beside | None = None

    @property
    def slots(self) -> tuple[int, ...]:
        """All slots that it uses."""
        return (self.slot,) if self.beside is None else (self.slot, self.beside.slot)


NOTHING = Chosen(NO_DOMAIN, 0.0)


@dataclass(frozen=True)
class RowChoice:
    """One request of the step: its slot (0: none), its lambda, and how many tokens it has in this step."""

    slot: int
    lam: float
    tokens: int
    known: int = 0
    """How many of these, counted from the first, the decoder has already run as drafts."""
    beside: Beside | None = None

    def looks_up(self, first_ngram: int) -> bool:
        """Whether its n-grams are looked up, in its text; `first_ngram` is the lowest slot of n-gram memories."""
        return self.slot >= first_ngram or self.beside is not None


@dataclass(frozen=True)
class Group:
    """The tokens of one slot that its decoder runs in a step: all of its requests' tokens except those it has already run as drafts."""

    slot: int
    requests: Tensor
    """Positions of the requests among the step's, int64."""
    lengths: npt.NDArray[np.int32]
    """Number of tokens to run of each request, which are its last ones in the step, int32."""
    tokens: Tensor | None
    """Positions of these tokens in the step, int64; None if they are all of its tokens."""


@dataclass(frozen=True)
class StepRouting:
    """Slot and lambda of every token of one step, and the tokens grouped by slot."""

    slots: Tensor
    """Slot of each token, [tokens] int64."""
    lams: Tensor
    """Lambda of each token, [tokens] float32."""
    groups: tuple[Group, ...]
    """One group for each slot in use except 0, in ascending order of slots."""
    known: Tensor
    """Positions of the tokens whose hidden states were computed while drafting, int64."""
    captured: bool = False
    """Whether the step is captured or replayed as a CUDA graph: the stacked tower runs all tokens, and Python decides nothing."""

    @classmethod
    def of(cls, rows: Sequence[RowChoice], tokens: int, device: torch.device, captured: bool = False) -> "StepRouting":
        """Spread the requests' choices over `tokens` tokens; tokens past the last request (padding) have no domain."""
        chosen = np.array([row.slot for row in rows], np.int64)
        if not chosen.any():
            return BASE_ALONE
        counts = np.array([row.tokens for row in rows], np.int64)
        known = np.array([row.known for row in rows], np.int64)
        padding = (0, tokens - int(counts.sum()))
        slots = np.pad(chosen.repeat(counts), padding)
        lams = np.pad(np.array([row.lam for row in rows], np.float32).repeat(counts), padding)
        starts = counts.cumsum() - counts
        run = np.pad(np.arange(counts.sum()) - starts.repeat(counts) >= known.repeat(counts), padding)
        groups = []
        for slot in sorted(set(chosen.tolist()) - {NO_DOMAIN}):
            own = np.flatnonzero((slots == slot) & run)
            requests = np.flatnonzero((chosen == slot) & (counts > known))
            picked = None if len(own) == tokens else torch.from_numpy(own).to(device)
            groups.append(Group(slot, torch.from_numpy(requests), (counts - known)[requests].astype(np.int32), picked))
        return cls(
            torch.from_numpy(slots).to(device),
            torch.from_numpy(lams).to(device),
            tuple(groups),
            torch.from_numpy(np.flatnonzero(~run & (slots > 0))).to(device),
            captured,
        )

    @classmethod
    def for_profiling(cls, tokens: int, device: torch.device) -> "StepRouting":
        """The routing of vLLM's profiling and capturing runs, which have no requests: every token has slot 1 and lambda 0."""
        return cls.over(torch.ones(tokens, dtype=torch.int64, device=device), torch.zeros(tokens, device=device))

    @classmethod
    def over(cls, slots: Tensor, lams: Tensor) -> "StepRouting":
        """The routing of a captured step, whose slots [tokens] int64 and lambdas [tokens] float32 only the device knows."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(slots, lams, (Group(1, none, np.zeros(0, np.int32), None),), none, captured=True)

    @property
    def uses_memory(self) -> bool:
        """Whether any token of the step has a memory."""
        return bool(self.groups)

    @property
    def tail(self) -> Tensor:
        """The last columns of the packed rows, [tokens, TAIL] uint8."""
        return tail(self.slots, self.lams) if self.captured else self._tail

    @cached_property
    def _tail(self) -> Tensor:
        """Cached, since most steps have the routing of the step before; a captured step must compute the tail at each replay."""
        return tail(self.slots, self.lams)


BASE_ALONE = StepRouting(torch.zeros(0, dtype=torch.int64), torch.zeros(0), (), torch.zeros(0, dtype=torch.int64))
"""The routing of a step in which no request has a memory."""


def positions_by_slot(slots: Tensor, device: torch.device) -> tuple[tuple[int, Tensor], ...]:
    """Each slot except 0 that occurs in slots [n], with its positions."""
    used = [int(s) for s in slots.unique() if s != NO_DOMAIN]
    return tuple((slot, (slots == slot).nonzero().squeeze(1).to(device)) for slot in used)
