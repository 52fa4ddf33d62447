"""Whose turn it is, and what sits a step out: no engine, and steps that take what a test says."""

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from memdec.server.choice import CLIENT
from memdec.server.engine.admission import NOBODY, Account, Admission, Client, account, turn_of_request
from memdec.server.errors import QueueFull, RequestError, TooManyRequests
from memdec.server.worker.fair import NEIGHBOUR, FairSteps
from memdec.server.worker.shares import BACKGROUND, BESIDE, REMEMBERED, Shares, fitting

FIXED, TOKEN = 0.010, 0.001  # seconds of a step, and of a token in it


def shares() -> Shares:
    """That know what steps cost."""
    made = Shares()
    for tokens in (1, 4, 16, 64, 2, 32) * 20:
        made.learn(tokens, FIXED + TOKEN * tokens)
    return made


def seconds(tokens: dict[str, int]) -> float:
    """What a step of so many tokens takes."""
    return FIXED + TOKEN * sum(tokens.values())


def test_guests_lengthen_a_step_by_what_it_takes_without_them() -> None:
    """By no more, and by one token at least."""
    made = shares()
    assert made.guests == pytest.approx((BESIDE - 1) * FIXED / TOKEN, abs=1)
    assert Shares().guests == 1
    for tokens in (1, 2, 3) * 50:
        made.learn(tokens, 0.1 * tokens)
    assert made.guests >= 1


def test_what_small_steps_take_is_not_forgotten() -> None:
    """Nor mistaken for what the greedy client's steps suggest: these take more than a line through the small ones says."""
    made = shares()
    for tokens in (3, 5) * 20:
        made.learn(tokens, 0.015)
    for number in range(3000):
        made.learn(60 + number % 5, 0.130)
    assert made.guests < 15


def test_equal_time_for_clients_that_always_want_more() -> None:
    """One with prompts of 200 tokens, one with single tokens: turns follow time, not steps, nor tokens."""
    made = shares()
    used = dict.fromkeys(("long", "short"), 0.0)
    for _ in range(2000):
        turn = made.turn(["long", "short"])
        tokens = {"long": 200, "short": 1} if turn == "long" else {"short": 1}
        made.took(seconds(tokens), tokens)
        used["long"] += tokens.get("long", 0) * TOKEN + FIXED / 2 * ("long" in tokens)
        used["short"] += TOKEN + FIXED / len(tokens)
    assert used["long"] == pytest.approx(used["short"], rel=0.1)


def test_a_small_request_is_served_at_once_beside_one_that_fills_every_step() -> None:
    """Each of its steps is its own: it takes twice its time alone, even if all steps so far were the hog's."""
    made = shares()
    for _ in range(500):
        made.turn(["hog"])
        made.took(seconds({"hog": 128}), {"hog": 128})
    took = []
    for _ in range(20):
        assert made.turn(["hog", "small"]) == "small"
        tokens = {"small": 1, "hog": min(128, made.guests)}
        took.append(seconds(tokens) / seconds({"small": 1}))
        made.took(seconds(tokens), tokens)
    assert max(took) < 2.2 and tokens["hog"] > 5
    assert made.turn(["hog"]) == "hog"


def test_who_adds_too_much_sits_out_the_steps_of_others() -> None:
    """Whatever its tokens: each of a hog's steps takes long. A neighbour whose rows cost what they seem to goes on taking part; and both are tried again."""
    made = shares()
    for client in ("small", "neighbour"):
        made.took(seconds({client: 1}), {client: 1}, client)
    joined = Counter[str]()
    for _ in range(300):
        tokens = {"small": 1, **dict.fromkeys(made.joining(("hog", "neighbour"), "small", 1), 2)}
        joined.update(tokens.keys())
        made.took(seconds(tokens) + 0.05 * ("hog" in tokens), tokens, "small")
    assert joined["neighbour"] > 200 and 3 <= joined["hog"] < 60
    assert not Shares().joining(["hog"], "small", 1)


def test_step_times_of_clients_that_have_gone_are_forgotten() -> None:
    """However many keys there are."""
    made = shares()
    for number in range(2000):
        made.turn([f"once {number}", "busy"])
        made.took(0.01, {f"once {number}": 1})
        made.took(0.02, {f"once {number}": 1, "busy": 1}, "busy")
    assert len(made.alone) == len(made.added) == REMEMBERED


def test_nobody_saves_turns_up() -> None:
    """Who comes back after an hour has no hour of the engine's to its credit; and who has gone is forgotten."""
    made = shares()
    made.took(seconds({"early": 1}), {"early": 1})
    for _ in range(1000):
        made.turn(["busy"])
        made.took(seconds({"busy": 50}), {"busy": 50})
    turns = []
    for _ in range(20):
        turns.append(made.turn(["busy", "early"]))
        made.took(seconds({turns[-1]: 50}), {turns[-1]: 50})
    assert turns.count("early") == pytest.approx(10, abs=1)
    for number in range(1000):
        made.turn([f"once {number}", "busy"])
        made.took(0.1, {f"once {number}": 1, "busy": 10})
    assert len(made.used) < 1100


def test_replays_wait_for_everybody() -> None:
    """Their turn comes when nobody else wants one, however little they have had."""
    made = shares()
    for _ in range(10):
        assert made.turn([BACKGROUND, "busy"]) == "busy"
        made.took(0.01, {"busy": 10})
    assert made.turn([BACKGROUND]) == BACKGROUND


def test_what_fits() -> None:
    """In order; what is too long lets the next pass."""
    assert fitting([("a", 3), ("b", 9), ("c", 2), ("d", 1)], 5) == ["a", "c"]


@dataclass(eq=False)
class Request:
    """What the scheduler reads of a request."""

    request_id: str
    owner: str
    num_tokens: int = 1
    status: RequestStatus = RequestStatus.RUNNING
    num_computed_tokens: int = 0
    spec_token_ids: list[int] = field(default_factory=list)
    next_decode_eligible_step: int = 0

    @property
    def sampling_params(self) -> Any:
        """With the client."""
        return SimpleNamespace(extra_args={CLIENT: self.owner})

    @property
    def num_tokens_with_spec(self) -> int:
        """Drafts included."""
        return self.num_tokens + len(self.spec_token_ids)

    def is_finished(self) -> bool:
        """Never."""
        return False


class Queue(deque[Any]):
    """vLLM's, first come first served."""

    add_request = deque.append

    def remove_requests(self, requests: set[Any]) -> None:
        """All of them."""
        kept = [r for r in self if r not in requests]
        self.clear()
        self.extend(kept)


class Plain:
    """As much of vLLM's scheduler as fairness needs: all that run are in a step, then who waits while there are places."""

    def __init__(self, running: list[Request], waiting: list[Request], places: int = 128, free: int = 1000) -> None:
        self.running, self.waiting, self.max_num_running_reqs, self.current_step = running, Queue(waiting), places, 0
        for request in waiting:
            request.status = RequestStatus.WAITING
        self.free, self.block_size, self.requires_kv_delivery = free, 16, False
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[0])
        pool = SimpleNamespace(get_num_free_blocks=lambda: self.free)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.requests = {r.request_id: r for r in (*running, *waiting)}

    def _request_blocks_can_be_freed(self, _: Any) -> bool:
        return True

    def _preempt_request(self, request: Any, *_: Any, **__: Any) -> None:
        self.free += 10
        request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
        self.waiting.appendleft(request)

    def schedule(self) -> Any:
        """One step."""
        self.current_step += 1
        ran = [r for r in self.running if self.current_step >= r.next_decode_eligible_step]
        while self.waiting and len(self.running) < self.max_num_running_reqs:
            request = self.waiting.popleft()
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            ran.append(request)
        return SimpleNamespace(num_scheduled_tokens={r.request_id: r.num_tokens_with_spec - r.num_computed_tokens for r in ran})

    def update_from_output(self, *_: Any) -> Any:
        """Nothing."""


class Fair(FairSteps, Plain):  # type: ignore[misc]  # vLLM's scheduler takes Plain's place
    """The same, fair."""


def step(scheduler: Fair) -> Counter[str]:
    """Tokens of a step by client."""
    found = Counter[str]()
    for name, tokens in scheduler.schedule().num_scheduled_tokens.items():
        found[scheduler.requests[name].owner] += tokens
    return found


def rows(owner: str, count: int, **more: Any) -> list[Request]:
    """Requests of one client."""
    return [Request(f"{owner}-{i}", owner, **more) for i in range(count)]


def test_alone_all_run() -> None:
    """Nothing is held back, whatever one client asks."""
    scheduler = Fair(rows("hog", 100), [Request(f"more {i}", "hog", 100) for i in range(50)])
    assert step(scheduler)["hog"] == 100 + 28 * 100


def test_beside_another_all_of_a_hogs_rows_take_turns() -> None:
    """A few in each step of the other's, those first that have waited longest."""
    scheduler = Fair(rows("hog", 100), rows("small", 1, num_tokens=20))
    scheduler.shares = shares()
    scheduler.shares.used = {"hog": 1.0, "small": 0.0}
    room = scheduler.shares.guests
    assert step(scheduler) == {"small": 20, "hog": room}
    seen: set[str] = set()
    for _ in range(100 // room + 1):
        seen |= {name for name in scheduler.schedule().num_scheduled_tokens if name.startswith("hog")}
    assert len(seen) == 100


def test_a_key_alone_leaves_room_for_one_that_was_here_lately() -> None:
    """Its steps stay short for some seconds, its first rows go on; without keys, and later, all run."""
    scheduler = Fair(rows("key hog", 100, spec_token_ids=[1, 2]), [])
    scheduler.shares = shares()
    scheduler.seen = {"key small": time.monotonic()}
    first, second = scheduler.schedule().num_scheduled_tokens, scheduler.schedule().num_scheduled_tokens
    assert 0 < sum(first.values()) <= max(3, scheduler.shares.between) and set(first) <= set(second)
    scheduler.seen = {"key small": time.monotonic() - NEIGHBOUR}
    assert len(scheduler.schedule().num_scheduled_tokens) > len(first)
    scheduler = Fair(rows("request 7", 100), [])
    scheduler.shares, scheduler.seen = shares(), {"": time.monotonic(), "request 6": time.monotonic()}
    assert len(scheduler.schedule().num_scheduled_tokens) == 100


def test_one_that_only_ever_comes_beside_another_was_here_lately() -> None:
    """It needn't have had a step to itself to be remembered."""
    hog = rows("key hog", 100)
    scheduler = Fair(list(hog), rows("key small", 1))
    scheduler.shares = shares()
    scheduler.schedule()
    scheduler.running = hog
    assert 0 < sum(scheduler.schedule().num_scheduled_tokens.values()) <= scheduler.shares.between


def test_a_step_that_was_scheduled_while_another_ran_began_when_that_one_ended() -> None:
    """What steps take isn't counted twice where the next is scheduled before the last has ended."""
    scheduler = Fair(rows("one", 1), [])
    first, second = scheduler.schedule(), scheduler.schedule()
    time.sleep(0.05)
    scheduler.update_from_output(first)
    scheduler.update_from_output(second)
    assert scheduler.shares.used["one"] < 0.09 and not scheduler.under_way


def test_places_and_blocks_are_taken_back_from_who_has_most() -> None:
    """The newest of the hog's requests go back to the queue, where all places or all blocks are theirs; not below an equal share."""
    for full in ({"places": 8}, {"free": 0}):
        scheduler = Fair(rows("hog", 8), rows("small", 2, num_tokens=20), **full)
        scheduler.shares.used = {"hog": 1.0, "small": 0.0}
        assert step(scheduler)["small"] == 40
        assert [r.request_id for r in scheduler.waiting][-1] == "hog-7"
        assert sum(r.owner == "hog" for r in scheduler.running) >= 5
    scheduler = Fair(rows("one", 4) + rows("two", 4), [Request(f"more {i}", "two") for i in range(9)], places=8)
    scheduler.shares.used = {"one": 1.0, "two": 0.0}
    step(scheduler)
    assert Counter(r.owner for r in scheduler.running) == {"one": 4, "two": 4}


def test_the_queue_keeps_what_was_held() -> None:
    """In the order in which each client's came."""
    scheduler = Fair([], rows("hog", 30, num_tokens=400) + rows("small", 1), places=1)
    scheduler.shares = shares()
    scheduler.shares.used = {"hog": 1.0, "small": 0.0}
    assert step(scheduler) == {"small": 1}
    assert [r.request_id for r in scheduler.waiting] == [f"hog-{i}" for i in range(30)]


def test_drafts_of_a_request_that_sat_a_step_out_are_dropped() -> None:
    """They can't be verified any more: what they were drawn from is gone."""
    scheduler = Fair(rows("hog", 50, spec_token_ids=[1, 2]), rows("small", 1))
    scheduler.shares = shares()
    scheduler.shares.used = {"hog": 1.0, "small": 0.0}
    ran = scheduler.schedule().num_scheduled_tokens
    kept = {r.request_id for r in scheduler.running if r.spec_token_ids}
    assert 0 < len(kept) < 50 and kept <= set(ran)


def test_what_one_key_may_have_under_way() -> None:
    """Choices and tokens, of all its requests; what can never fit is the request's fault, and said so."""
    client = Client("lab", most_choices=4, most_tokens=100)
    first, second = Account(client), Account(client)
    first.ask(1)
    first.ask(3)
    second.ask(1)
    with pytest.raises(TooManyRequests, match="3 choices under way; its limit is 4"):
        second.ask(2)
    with pytest.raises(RequestError, match="asks for 5 choices"):
        second.ask(5)
    first.spend(60)
    with pytest.raises(TooManyRequests, match="60 tokens under way"):
        second.spend(50)
    with pytest.raises(RequestError, match="may have 101 tokens"):
        second.spend(101)
    first.close()
    second.spend(50)
    second.ask(4)
    second.close()
    assert (client.choices, client.tokens) == (0, 0)


def test_a_queue_full_of_others_requests() -> None:
    """A key that has less than its part of the places gets them; who has more is refused; and turns are told apart by key, or by request."""
    admission, names = Admission(8), []

    def admitted(client: Client | None, choices: int, under_way: int) -> None:
        token = account.set(Account(client) if client else None)
        try:
            with admission.keep(choices, under_way):
                names.append(turn_of_request())
        finally:
            account.reset(token)

    hog, lab = Client("hog", peers=4), Client("lab", peers=4)
    admitted(hog, 8, 0)
    with pytest.raises(QueueFull):
        admitted(hog, 1, 8)
    admitted(lab, 2, 8)
    with pytest.raises(QueueFull):
        admitted(Client("other", peers=4), 3, 8)
    admitted(None, 1, 0)
    admitted(None, 2, 0)
    admitted(None, 2, 0)
    assert names[:3] == ["key hog", "key lab", NOBODY]
    assert len(set(names[3:])) == 2 and NOBODY not in names[3:]
    assert admission.kept == 0


def test_accounts_follow_the_request() -> None:
    """Into the tasks that it starts."""

    async def main() -> str:
        with Admission(None).keep(2, 0):
            return await asyncio.create_task(asyncio.to_thread(turn_of_request))

    assert asyncio.run(main()).startswith("request ")
