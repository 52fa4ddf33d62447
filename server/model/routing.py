"""Which decoder each token of one engine step belongs to. Both runner adapters make it, the model reads it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_DOMAIN = 0  # the slot of requests that use the base alone; decoders have slots 1 to D, datastores D + 1 to D + S


@dataclass(frozen=True)
class RowChoice:
    """One request of the step: its slot (0: none), its lambda, and how many tokens it has in this step."""

    slot: int
    lam: float
    tokens: int


@dataclass(frozen=True)
class StepRouting:
    """One step's routing, grouped once and used by every layer."""

    slots: Tensor
    """Slot of each token, [tokens] int64."""
    lams: Tensor
    """Lambda of each token, [tokens] float32."""
    groups: tuple[tuple[int, Tensor], ...]
    """For each slot in use but 0: the slot and its tokens' positions, int64."""

    @classmethod
    def of(cls, rows: Sequence[RowChoice], tokens: int, device: torch.device) -> "StepRouting":
        """Spread the requests' choices over `tokens` tokens; tokens past the last request (padding) have no domain."""
        if all(row.slot == NO_DOMAIN for row in rows):
            return BASE_ALONE
        counts = torch.tensor([row.tokens for row in rows] + [tokens - sum(row.tokens for row in rows)])
        slots = torch.tensor([row.slot for row in rows] + [NO_DOMAIN]).repeat_interleave(counts)
        lams = torch.tensor([row.lam for row in rows] + [0.0], dtype=torch.float32).repeat_interleave(counts)
        return cls(slots.to(device), lams.to(device), group(slots, device))

    @property
    def uses_memory(self) -> bool:
        """Whether any token of the step has a decoder or a datastore."""
        return bool(self.groups)

    def up_to(self, most: int) -> "StepRouting":
        """The same without the groups of higher slots: datastores need no tower."""
        return self if all(slot <= most for slot, _ in self.groups) else replace(self, groups=tuple(g for g in self.groups if g[0] <= most))

    @property
    def only(self) -> int | None:
        """The slot whose decoder may run on all tokens, if just one is in use.

        Tokens of no domain then pass through it too, which harms nothing (their lambda is 0, their cache blocks are the base's own) and
        is cheaper than picking rows in every layer, unless they are the most.
        """
        if len(self.groups) == 1 and 2 * len(self.groups[0][1]) >= len(self.slots):
            return self.groups[0][0]
        return None


BASE_ALONE = StepRouting(torch.zeros(0, dtype=torch.int64), torch.zeros(0), ())
"""A step in which nobody asks for a memory."""


def group(slots: Tensor, device: torch.device) -> tuple[tuple[int, Tensor], ...]:
    """Positions of each slot but 0 in slots [n]."""
    used = [int(s) for s in slots.unique() if s != NO_DOMAIN]
    return tuple((slot, (slots == slot).nonzero().squeeze(1).to(device)) for slot in used)
