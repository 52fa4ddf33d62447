"""How many tokens are drafted: follows acceptance and cost; no engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memdec.server.model.routing import Chosen
from memdec.server.worker.draft_length import PROBE, DraftLengths
from memdec.server.worker.drafter import MemoryDrafter, Seen


def lengths(step: float, a_token: float, draft: float) -> DraftLengths:
    """With costs measured: `step` seconds, `a_token` for each token it verifies, `draft` for one drafted."""
    made = DraftLengths(6, 0.1)
    for tokens in (1, 4, 7, 2, 5) * 20:
        made.step.add(tokens, step + a_token * tokens)
        made.drafted(draft)
    return made


def settle(made: DraftLengths, rate: float, drafting: int = 1) -> int:
    """The length that is chosen once a request has seen drafts accepted at this rate."""
    made.begin("r", 1, 0.6)
    for n in range(200):
        made.verified("r", 1, 1, int((n + 1) * rate) - int(n * rate))
    return made.choose(["r"] * drafting, 0)[0]


def test_costs_are_learned() -> None:
    """A line through what was measured; stalls hardly move it."""
    made = lengths(0.005, 0.0001, 0.001)
    assert made.step.of(1) == pytest.approx(0.0051, rel=0.01)
    assert made.step.of(40) == pytest.approx(0.009, rel=0.05)
    made.step.add(3, 60.0)
    assert made.step.of(3) < 0.01


def test_more_is_drafted_where_more_is_accepted() -> None:
    """Up to the most when drafts are nearly free and right, nothing when they are dear and wrong."""
    assert settle(lengths(0.005, 0.0001, 0.001), 1.0) == 6
    assert settle(lengths(0.005, 0.0001, 0.001), 0.5) in (1, 2)
    assert settle(lengths(0.005, 0.0001, 0.004), 0.1) == 0
    assert settle(lengths(0.005, 0.0001, 0.0001), 0.9) == 6


def test_large_batches_draft_less() -> None:
    """Each of many requests' drafts is a token more for all to wait for."""
    assert settle(lengths(0.005, 0.0005, 0.001), 0.8, drafting=64) < settle(lengths(0.005, 0.0005, 0.001), 0.8, drafting=1)


@pytest.mark.parametrize("a_token", [0.0, 0.0001, 0.001, 0.01, 0.1])
@pytest.mark.parametrize("draft", [0.0, 0.0001, 0.01])
@pytest.mark.parametrize("drafting", [1, 8, 64])
def test_lengths_stay_in_range(a_token: float, draft: float, drafting: int) -> None:
    """Whatever things cost, and where a token's place costs more than any token brings: from none to the most."""
    for step in (-0.9 * a_token, 0.0001, 0.005, 1.0):  # below 0: a line through costs that rise faster than a line
        made = lengths(step, a_token, draft)
        for rate, name in ((0.0, "never"), (0.5, "half"), (1.0, "always")):
            made.begin(name, 1, rate)
            for n in range(50):
                made.verified(name, 1, 1, int((n + 1) * rate) - int(n * rate))
        for others in (0, 5):
            chosen = made.choose((["never", "half", "always"] * drafting)[:drafting], others)
            assert len(chosen) == drafting
            assert all(0 <= length <= 6 for length in chosen)


def test_nothing_is_drafted_where_a_place_costs_more_than_a_token() -> None:
    """Costs that rise faster than the line through them: the length was negative once."""
    made = DraftLengths(6, 0.1)
    made.step = SimpleNamespace(slope=1.0, of=lambda _: 0.01)  # type: ignore[assignment]
    made.begin("r", 1, 0.6)
    assert made.choose(["r"], 0) == [0]


def test_who_is_accepted_less_drafts_less() -> None:
    """In one batch: the shared number suits most, and whoever is mostly wrong adds fewer tokens to the step."""
    made = lengths(0.005, 0.0004, 0.0005)
    made.begin("good", 1, 0.6)
    made.begin("bad", 2, 0.6)
    for n in range(200):
        made.verified("good", 1, 1, 1)
        made.verified("bad", 2, 1, int(n % 4 == 0))
    *good, bad = made.choose(["good"] * 7 + ["bad"], 0)
    assert min(good) > bad


def test_a_new_request_expects_what_is_usual_in_its_domain() -> None:
    """At first what lambda promises; then what others saw."""
    made = lengths(0.005, 0.0001, 0.001)
    made.begin("first", 1, 0.9)
    assert made.requests["first"].rate == pytest.approx(0.95)
    for _ in range(300):
        made.verified("first", 1, 2, 0)
    made.begin("second", 1, 0.9)
    made.begin("elsewhere", 2, 0.9)
    assert made.requests["second"].rate < 0.1 < 0.9 < made.requests["elsewhere"].rate


def test_a_request_that_gave_up_tries_again_now_and_then() -> None:
    """Texts change: one token every so many steps."""
    made = lengths(0.005, 0.0001, 0.004)
    settle(made, 0.0)
    chosen = [made.choose(["r"], 0)[0] for _ in range(3 * (PROBE + 1))]
    assert set(chosen) == {0, 1}
    assert sum(chosen) == 3


def test_an_unmeasured_engine_drafts_by_its_weights() -> None:
    """A decoder of a tenth of the bytes is worth asking from the first token on; who left is forgotten."""
    made = DraftLengths(4, 0.1)
    made.begin("r", 1, 0.6)
    assert made.choose(["r"], 0)[0] >= 2
    made.keep({"s"})
    assert not made.requests


def drafter(requests: dict[str, bool], seeded: tuple[int, ...] = ()) -> Any:
    """A drafter whose batch has these requests, each under a grammar or not."""
    made: Any = object.__new__(MemoryDrafter)
    made.most, made.context, made.ended, made.seen = 6, 512, 0.0, {}
    made.model, made.lengths = SimpleNamespace(towers=[None]), lengths(0.005, 0.0001, 0.001)
    states = {
        name: SimpleNamespace(
            memory=Chosen(1, 0.6),
            output_token_ids=[],
            sampling_params=SimpleNamespace(structured_outputs=grammar or None, min_p=0, logit_bias=None, max_tokens=100),
        )
        for name, grammar in requests.items()
    }
    batch = SimpleNamespace(req_ids=list(requests), generators=dict.fromkeys(seeded))
    made.runner = SimpleNamespace(requests=states, input_batch=batch, query_start_loc=SimpleNamespace(np=np.arange(len(requests) + 1)))
    return made


def test_what_a_grammar_drops_was_rejected() -> None:
    """Its drafts never reach the verifier; a request without one whose drafts found no room learns nothing. Each kind expects its own."""
    made = drafter({"json": True, "plain": False})
    first = made._lengths([[5], [5]], np.array([10, 10]))
    assert min(first) > 0
    for _ in range(40):
        made.seen = {name: Seen(10, [5] * 6, torch.zeros(6, 1)) for name in ("json", "plain")}
        made._learn([[5], [5]])
    under_grammar, plain = made._lengths([[5], [5]], np.array([10, 10]))
    assert under_grammar == 0 < plain
    assert made.lengths.usual[(1,), True] < 0.6 < made.lengths.usual[(1,), False]


def test_seeds_under_a_grammar_draft_nothing() -> None:
    """With a seed the number is fixed, and under a grammar any but none is mostly in vain."""
    assert drafter({"json": True, "plain": False}, seeded=(0, 1))._lengths([[5], [5]], np.array([10, 10])) == [0, 6]
