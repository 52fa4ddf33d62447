"""Packing, mixing and routing against slow, obvious references; no engine."""

import pytest
import torch
from torch import Tensor

from memdec.server.choice import MAX_SLOT
from memdec.server.model.mixing import mix
from memdec.server.model.packing import TAIL, pack, tail, unpack
from memdec.server.model.routing import RowChoice, StepRouting, positions_by_slot

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slot_and_lambda_survive_packing_exactly(dtype: torch.dtype) -> None:
    """Every byte pattern that a lambda in [0, 1] can have, and slots past what bfloat16 counts to."""
    lams = torch.cat([torch.tensor([0.0, 1.0, 0.1, 1e-38, 1 - 2**-24, 1 / 3]), torch.rand(1000)])
    slots = torch.randint(0, MAX_SLOT + 1, (len(lams),))
    base, memory = torch.randn(len(lams), 16).to(dtype), torch.randn(len(lams), 8).to(dtype)
    rows = pack(base, memory, tail(slots, lams))
    assert rows.dtype == dtype
    assert rows.shape == (len(lams), 16 + 8 + TAIL)
    got_base, got_memory, got_slots, got_lams = unpack(rows, 16, MAX_SLOT)
    assert torch.equal(got_base, base)
    assert torch.equal(got_memory, memory)
    assert torch.equal(got_slots, slots)
    assert torch.equal(got_lams, lams)


def test_one_row_unpacks() -> None:
    """A single row's strides are not those of many."""
    rows = pack(torch.ones(3, 4), torch.ones(3, 2), tail(torch.tensor([1, 2, 3]), torch.tensor([0.1, 0.2, 0.3])))
    assert unpack(rows[1:2], 4, 3)[3].item() == pytest.approx(0.2)


def test_random_rows_unpack_to_usable_values() -> None:
    """vLLM's profiling sends random numbers through compute_logits."""
    _, _, slots, lams = unpack(torch.rand(64, 20), 8, 2)
    assert ((slots >= 0) & (slots <= 2)).all()
    assert ((lams >= 0) & (lams <= 1)).all()


def slow_mixture(base: Tensor, memory: Tensor, lam: float) -> Tensor:
    """Eq. 7 in float64."""
    return lam * memory.double().softmax(-1) + (1 - lam) * base.double().softmax(-1)


@pytest.mark.parametrize("lam", [1e-6, 0.3, 0.999, 1.0])
def test_mixture_equals_the_equation(lam: float) -> None:
    """Softmax of the mixed logits is the mixture, lambda 1 included."""
    base, memory = torch.randn(5, 300) * 8, torch.randn(5, 300) * 8
    mixed = mix(base, memory, torch.full((5,), lam))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double().softmax(-1), slow_mixture(base, memory, lam), atol=1e-6, rtol=1e-4)


def test_mixed_logits_keep_the_bases_normaliser() -> None:
    """Penalties divide and subtract: they need values of a logit's usual size, not log-probabilities."""
    base, memory = torch.randn(4, 100) + 30, torch.randn(4, 100)
    mixed = mix(base, memory, torch.full((4,), 0.5))
    torch.testing.assert_close(mixed.logsumexp(-1), base.logsumexp(-1))


@pytest.mark.parametrize(("base_ids", "memory_ids"), [(100, 96), (96, 100)])
def test_vocabularies_may_differ_by_padding(base_ids: int, memory_ids: int) -> None:
    """Only shared ids are mixed; the memory is normalised over those, and the rest of the base's ids get no memory."""
    base, memory = torch.randn(3, base_ids), torch.randn(3, memory_ids)
    expected = 0.4 * base.double().softmax(-1)
    expected[:, :96] += 0.6 * memory[:, :96].double().softmax(-1)
    torch.testing.assert_close(mix(base, memory, torch.full((3,), 0.6)).double().softmax(-1), expected, atol=1e-6, rtol=1e-4)
    assert not mix(base, memory, torch.ones(3)).isnan().any()


def test_routing_spreads_requests_over_tokens() -> None:
    """Requests of different lengths, one without a domain, and padding at the end."""
    routing = StepRouting.of([RowChoice(2, 0.5, 3), RowChoice(0, 0.0, 2), RowChoice(1, 1.0, 1)], 8, CPU)
    assert routing.slots.tolist() == [2, 2, 2, 0, 0, 1, 0, 0]
    assert routing.lams.tolist() == [0.5, 0.5, 0.5, 0, 0, 1, 0, 0]
    assert [(g.slot, g.requests.tolist(), g.tokens.tolist()) for g in routing.groups if g.tokens is not None] == [
        (1, [2], [5]),
        (2, [0], [0, 1, 2]),
    ]


def test_one_domain_takes_the_step_as_it_is() -> None:
    """No token needs to be picked; padding and requests without a domain make it a part of the step."""
    assert [g.tokens for g in StepRouting.of([RowChoice(3, 0.5, 4), RowChoice(3, 0.2, 2)], 6, CPU).groups] == [None]
    assert StepRouting.of([RowChoice(3, 0.5, 4)], 6, CPU).groups[0].tokens is not None
    assert StepRouting.of([RowChoice(3, 0.5, 4), RowChoice(0, 0.0, 2)], 6, CPU).groups[0].tokens is not None
    assert not StepRouting.of([RowChoice(0, 0.0, 2)], 2, CPU).uses_memory


def test_positions_by_slot() -> None:
    """Rows without a memory belong to no group."""
    assert positions_by_slot(torch.zeros(3, dtype=torch.int64), CPU) == ()
    assert [(slot, rows.tolist()) for slot, rows in positions_by_slot(torch.tensor([2, 0, 1, 2]), CPU)] == [(1, [2]), (2, [0, 3])]


def test_known_tokens_are_not_run_again() -> None:
    """A request's first tokens may be known; the last ones are what its group runs."""
    routing = StepRouting.of([RowChoice(1, 0.5, 3, 2), RowChoice(2, 0.5, 2, 2), RowChoice(0, 0.0, 1), RowChoice(1, 0.5, 2)], 8, CPU)
    one, two = routing.groups
    assert one.tokens is not None and two.tokens is not None
    assert (one.requests.tolist(), one.lengths.tolist(), one.tokens.tolist()) == ([0, 3], [1, 2], [2, 6, 7])
    assert (two.requests.tolist(), two.lengths.tolist(), two.tokens.tolist()) == ([], [], [])
    assert routing.known.tolist() == [0, 1, 3, 4]
    assert routing.slots.tolist() == [1, 1, 1, 2, 2, 0, 1, 1]
