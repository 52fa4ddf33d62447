"""Which decoder each token of one engine step belongs to. Both runner adapters make it, the model reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from server.model.packing import tail

NO_DOMAIN = 0  # the slot of requests that use the base alone; decoders have slots 1 to D, datastores D + 1 to D + S


@dataclass(frozen=True)
class RowChoice:
    """One request of the step: its slot (0: none), its lambda, and how many tokens it has in this step."""

    slot: int
    lam: float
    tokens: int


@dataclass(frozen=True)
class Group:
    """The requests of one slot."""

    slot: int
    requests: Tensor
    """Their positions among the step's requests, int64."""
    tokens: Tensor | None
    """Positions of their tokens, int64; None: they are all the step has."""


@dataclass(frozen=True)
class StepRouting:
    """One step's routing, grouped once."""

    slots: Tensor
    """Slot of each token, [tokens] int64."""
    lams: Tensor
    """Lambda of each token, [tokens] float32."""
    groups: tuple[Group, ...]
    """One for each slot in use but 0, in the order of slots."""

    @classmethod
    def of(cls, rows: Sequence[RowChoice], tokens: int, device: torch.device) -> "StepRouting":
        """Spread the requests' choices over `tokens` tokens; tokens past the last request (padding) have no domain."""
        chosen = np.array([row.slot for row in rows], np.int64)
        if not chosen.any():
            return BASE_ALONE
        counts = np.array([row.tokens for row in rows], np.int64)
        padding = (0, tokens - int(counts.sum()))
        slots = np.pad(chosen.repeat(counts), padding)
        lams = np.pad(np.array([row.lam for row in rows], np.float32).repeat(counts), padding)
        groups = []
        for slot in sorted(set(chosen.tolist()) - {NO_DOMAIN}):
            own = np.flatnonzero(slots == slot)
            picked = None if len(own) == tokens else torch.from_numpy(own).to(device)
            groups.append(Group(slot, torch.from_numpy(np.flatnonzero(chosen == slot)), picked))
        return cls(torch.from_numpy(slots).to(device), torch.from_numpy(lams).to(device), tuple(groups))

    @classmethod
    def untold(cls, tokens: int, device: torch.device) -> "StepRouting":
        """For vLLM's own profiling, which has no requests: every token passes through the first decoder, with lambda 0."""
        slots = torch.ones(tokens, dtype=torch.int64, device=device)
        return cls(slots, torch.zeros(tokens, device=device), (Group(1, torch.zeros(0, dtype=torch.int64), None),))

    @property
    def uses_memory(self) -> bool:
        """Whether any token of the step has a decoder or a datastore."""
        return bool(self.groups)

    @cached_property
    def tail(self) -> Tensor:
        """What packed rows end with; kept, since most steps are routed like the one before."""
        return tail(self.slots, self.lams)


BASE_ALONE = StepRouting(torch.zeros(0, dtype=torch.int64), torch.zeros(0), ())
"""A step in which nobody asks for a memory."""


def positions_by_slot(slots: Tensor, device: torch.device) -> tuple[tuple[int, Tensor], ...]:
    """Positions of each slot but 0 in slots [n]."""
    used = [int(s) for s in slots.unique() if s != NO_DOMAIN]
    return tuple((slot, (slots == slot).nonzero().squeeze(1).to(device)) for slot in used)
