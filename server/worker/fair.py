"""vLLM's scheduler with fair shares between clients.

vLLM's priorities can't give them: they say who is admitted first and who is preempted where the KV cache is full, but what runs is in every
step, however many rows and drafts that are, and a small request waits for all of it at each of its tokens. Here requests sit steps out.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from memdec.server.choice import CLIENT, KEY
from memdec.server.in_place import overwrite
from memdec.server.worker.shares import Shares, fitting

NEIGHBOUR = (
    10.0  # seconds for which a key that has nothing to run still counts as a neighbour: its next request is to find no full step under way
)
NOBODYS = "nobody's turn"
READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)  # others wait for something else than their turn


class FairSteps:
    """Mixin for vLLM's schedulers. Where one client alone has requests, and no other key had some lately, it changes nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.shares = Shares()
        self.under_way: dict[int, tuple[float, str]] = {}
        """When a step that hasn't ended was scheduled, and whose turn it is, by the identity of what was scheduled."""
        self.ended = 0.0
        """When the last step ended."""
        self.last_ran: dict[str, int] = {}
        """By request: the step it was in last."""
        self.stuck = False
        """Whether the last divided step scheduled nothing; then the next takes whatever it can."""
        self.seen: dict[str, float] = {}
        """When each client last had something to run, by the monotonic clock."""

    def schedule(self, *args: object, **kwargs: object) -> SchedulerOutput:
        """vLLM's choice among the requests that may take part in this step."""
        began = time.perf_counter()
        mine: Scheduler = self
        running = [r for r in mine.running if not r.is_finished()]
        waiting = [r for r in mine.waiting if r.status in READY]
        clients = {client_of(r) for r in (*running, *waiting)}
        neighbours = self._has_neighbours(clients)  # always asked: it also notes who is here
        divided = len(clients) > 1 or neighbours
        turn = NOBODYS
        if not divided or self.stuck:
            scheduled = super().schedule(*args, **kwargs)  # type: ignore[misc]
        else:
            turn = self.shares.turn(clients) if len(clients) > 1 else NOBODYS
            self._make_room(turn)
            with self._held(turn):
                scheduled = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.stuck = divided and not scheduled.num_scheduled_tokens
        self.under_way[id(scheduled)] = began, turn
        self._drop_stale_drafts(scheduled)
        return scheduled

    def _has_neighbours(self, clients: set[str]) -> bool:
        """Whether another key than those that want the step had something to run lately. Requests without keys have no neighbours."""
        now = time.monotonic()
        self.seen = {name: at for name, at in self.seen.items() if now - at < NEIGHBOUR} | dict.fromkeys(clients, now)
        return bool(clients) and any(name.startswith(KEY) for name in self.seen.keys() - clients)

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: object, **kwargs: object) -> dict[int, EngineCoreOutputs]:
        """Also learn what the step took, and who had how much of it."""
        requests, tokens = self.requests, Counter[str]()  # type: ignore[attr-defined]
        for name, count in scheduler_output.num_scheduled_tokens.items():
            if name in requests:
                tokens[client_of(requests[name])] += count
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        now = time.perf_counter()
        began, turn = self.under_way.pop(id(scheduler_output), (None, NOBODYS))
        if began is not None:
            # A step that was scheduled while another ran began when that one ended.
            self.shares.took(now - max(began, self.ended), tokens, turn)
        self.ended = now
        return outputs

    def _drop_stale_drafts(self, scheduled: SchedulerOutput) -> None:
        """Remember who ran. Drafts of a request that sat the step out can't be verified in a later one: their probabilities are gone."""
        mine: Scheduler = self
        now = dict.fromkeys(scheduled.num_scheduled_tokens, mine.current_step)
        self.last_ran = {name: step for name, step in self.last_ran.items() if name in mine.requests} | now
        if not isinstance(self, AsyncScheduler):  # whose drafts stay with the worker
            for request in mine.running:
                if request.spec_token_ids and request.request_id not in now:
                    overwrite(request, "spec_token_ids", [])

    @contextmanager
    def _held(self, turn: str) -> Iterator[None]:
        """Keep out of one step what doesn't fit it: the guests' requests beyond their tokens, those that ran longest ago first."""
        mine: Scheduler = self
        ready = [r for r in mine.waiting if r.status in READY]
        turn_waits = any(client_of(r) == turn for r in ready)
        # A client alone keeps its order: rows that run in each step keep their drafts, too.
        running = mine.running if turn == NOBODYS else sorted(mine.running, key=self._ran)
        guests = [r for r in (*running, *ready) if client_of(r) != turn]
        own = sum(asks(r) for r in mine.running if client_of(r) == turn)
        welcome: set[str] = set()
        clients = {client_of(r) for r in guests}
        for client in clients if turn == NOBODYS else self.shares.joining(clients, turn, own):
            asked = [(r.request_id, asks(r)) for r in guests if client_of(r) == client]
            room = max(self.shares.between, asked[0][1]) if turn == NOBODYS else self.shares.guests
            welcome |= set(fitting(asked, room))
        for request in mine.running:
            if client_of(request) != turn and request.request_id not in welcome:
                overwrite(request, "next_decode_eligible_step", mine.current_step + 2)  # schedule() counts one on: the step after the next
        held = [r for r in ready if client_of(r) != turn and (turn_waits or r.request_id not in welcome)]
        mine.waiting.remove_requests(set(held))
        try:
            yield
        finally:
            for request in held:
                mine.waiting.add_request(request)

    def _ran(self, request: Request) -> int:
        return self.last_ran.get(request.request_id, 0)

    def _make_room(self, turn: str) -> None:
        """Preempt the newest requests of whoever has most running, while this step's client wants for a place or for blocks and has fewer."""
        mine: Scheduler = self
        asked = [r for r in mine.waiting if r.status in READY and client_of(r) == turn]
        own = sum(client_of(r) == turn for r in mine.running)
        groups, size = len(mine.kv_cache_config.kv_cache_groups), mine.block_size
        # One block for each that runs: vLLM would preempt the newest of all, which is likely the one that has the least.
        blocks = groups * (own + (-(-asked[0].num_tokens // size) + 1 if asked else 0))
        wanted = min(len(asked), mine.max_num_running_reqs)
        while len(mine.running) + wanted > mine.max_num_running_reqs or mine.kv_cache_manager.block_pool.get_num_free_blocks() < blocks:
            victim = self._victim(turn, own)
            if victim is None:
                return
            mine.running.remove(victim)
            mine._preempt_request(victim, time.monotonic(), drop_stale_output=mine.requires_kv_delivery)
            own += 1  # the place is as good as taken: nobody is pushed below an equal share

    def _victim(self, turn: str, own: int) -> Request | None:
        """The newest request of the client with most running, if those are more than the `own` of this step's client; None: there is none."""
        mine: Scheduler = self
        counts = Counter(client_of(r) for r in mine.running if client_of(r) != turn)
        client, most = counts.most_common(1)[0] if counts else (None, 0)
        if most <= own:
            return None
        newest = next(r for r in reversed(mine.running) if client_of(r) == client)
        return newest if mine._request_blocks_can_be_freed(newest) else None


class FairScheduler(FairSteps, Scheduler):
    """Steps one after the other."""


class FairAsyncScheduler(FairSteps, AsyncScheduler):
    """The next step is scheduled while one runs."""


def fair_scheduler(vllm_config: VllmConfig, **rest: object) -> Scheduler:
    """`scheduler_cls` for engines that draft nothing: which of the two is known when vLLM has decided how it schedules."""
    chosen = FairAsyncScheduler if vllm_config.scheduler_config.async_scheduling else FairScheduler
    return chosen(vllm_config=vllm_config, **rest)


def asks(request: Request) -> int:
    """Tokens that a request wants of a step."""
    return max(1, int(request.num_tokens_with_spec - request.num_computed_tokens))


def client_of(request: Request) -> str:
    """Whose a request is; without a name, everybody's."""
    found: str | None = getattr(request, "client", None)
    if found is None:
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        found = request.client = str(extra.get(CLIENT, ""))
    return found
