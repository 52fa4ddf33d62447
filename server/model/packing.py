"""Slot, lambda and place carried beside each token's hidden states, so that they are at hand wherever vLLM computes logits.

vLLM computes logits in several places (sampled tokens, prompt log-probabilities, chunks of prompts) from rows of what `forward`
returned. So a row is [h_base | h_mem | tail], and the tail is nine columns that hold one byte each, as an integer from 0 to
255: four for the float32 lambda, two for the slot, three for the token's place in the step, which leads to the text before it,
and to the n-gram memory that its request has beside a decoder (see memdec.server.model.text).
bfloat16 holds integers exactly up to 256, so the round trip is exact in every dtype that vLLM serves.
"""

import torch
from torch import Tensor

TAIL = 9
SLOT, PLACE = 4, 6  # where they begin in it


def tail(slots: Tensor, lams: Tensor) -> Tensor:
    """The last columns, from slots [tokens] int64 and lams [tokens] float32 of a step's tokens in their order: [tokens, TAIL] uint8."""
    lam_bytes = lams.contiguous().view(torch.uint8).view(-1, 4)
    places = torch.arange(len(slots), device=slots.device)
    whole = torch.stack([slots & 255, slots >> 8, places & 255, places >> 8 & 255, places >> 16], 1)
    return torch.cat([lam_bytes, whole.to(torch.uint8)], 1)


def pack(base: Tensor, memory: Tensor, last: Tensor) -> Tensor:
    """Join [tokens, Hb], [tokens, Hm] and a `tail` into [tokens, Hb + Hm + TAIL]."""
    return torch.cat([base, memory.to(base.dtype), last.to(base.dtype)], 1)


def unpack(rows: Tensor, base_width: int, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split rows [n, Hb + Hm + TAIL] into h_base, h_mem, slot [n] int64 and lambda [n] float32.

    A slot above `slots` becomes 0 (no domain): vLLM's profiling passes random numbers through here.
    """
    base, memory, tail = rows.split([base_width, rows.shape[1] - base_width - TAIL, TAIL], 1)
    whole = _whole(tail)
    lam = whole[:, :SLOT].reshape(-1).view(torch.float32)
    slot = whole[:, SLOT].long() + (whole[:, SLOT + 1].long() << 8)
    return base, memory, torch.where(slot > slots, 0, slot), lam.nan_to_num(0.0).clamp(0.0, 1.0)


def places(rows: Tensor) -> Tensor:
    """Place in its step of each packed row's token, [n] int64. Random rows have random ones."""
    low, middle, high = _whole(rows[:, PLACE - TAIL :]).long().unbind(1)
    return low + (middle << 8) + (high << 16)


def _whole(columns: Tensor) -> Tensor:
    """Columns of bytes, uint8."""
    return columns.float().round().clamp(0, 255).to(torch.uint8)
