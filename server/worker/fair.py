"""vLLM's scheduler with fair shares of the engine's time between clients.

vLLM's priorities can't give them. They decide which request is admitted first, and which is preempted when the KV cache is full; but every
running request takes part in every step. So a client with many rows and drafts lengthens each step, and with it each token of another
client's small request. Here the scheduler leaves requests out of some steps instead.
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

# Seconds for which an API key without requests still counts as a neighbour, so that its next request doesn't have to wait for a full step.
NEIGHBOUR = 10.0
NOBODYS = "nobody's turn"
READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)  # others wait for something else, such as a grammar


class FairSteps:
    """Mixin for vLLM's schedulers: divides steps between clients. It changes nothing while one client alone has requests and has no neighbour."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.shares = Shares()
        self.under_way: dict[int, tuple[float, str]] = {}
        """Id of the SchedulerOutput of each step that hasn't ended -> when it was scheduled (perf_counter), and the client whose turn it is."""
        self.ended = 0.0
        """When the last step ended."""
        self.last_ran: dict[str, int] = {}
        """Request -> number of the last step it took part in."""
        self.stuck = False
        """Whether the last step that was divided between clients scheduled nothing; the next one is then left to vLLM."""
        self.seen: dict[str, float] = {}
        """Client -> when it last had a request to run, by the monotonic clock."""

    def schedule(self, *args: object, **kwargs: object) -> SchedulerOutput:
        """vLLM's choice among the requests that may take part in this step."""
        began = time.perf_counter()
        mine: Scheduler = self
        running = [r for r in mine.running if not r.is_finished()]
        waiting = [r for r in mine.waiting if r.status in READY]
        clients = {client_of(r) for r in (*running, *waiting)}
        neighbours = self._has_neighbours(clients)  # called in any case: it also records which clients are here
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
        """Whether an API key that isn't among `clients` had a request in the last NEIGHBOUR seconds; clients without a key don't count."""
        now = time.monotonic()
        self.seen = {name: at for name, at in self.seen.items() if now - at < NEIGHBOUR} | dict.fromkeys(clients, now)
        return bool(clients) and any(name.startswith(KEY) for name in self.seen.keys() - clients)

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: object, **kwargs: object) -> dict[int, EngineCoreOutputs]:
        """Also record how long the step took, and how many of its tokens each client had."""
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
        """Record which requests are in the step, and drop the drafts of the others: the worker keeps their probabilities for one step only."""
        mine: Scheduler = self
        now = dict.fromkeys(scheduled.num_scheduled_tokens, mine.current_step)
        self.last_ran = {name: step for name, step in self.last_ran.items() if name in mine.requests} | now
        if not isinstance(self, AsyncScheduler):  # AsyncScheduler leaves drafts in the worker
            for request in mine.running:
                if request.spec_token_ids and request.request_id not in now:
                    overwrite(request, "spec_token_ids", [])

    @contextmanager
    def _held(self, turn: str) -> Iterator[None]:
        """Within, leave other clients' requests (guests) out of the step beyond the tokens they may have; those that ran longest ago come first."""
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
                overwrite(
                    request, "next_decode_eligible_step", mine.current_step + 2
                )  # schedule() first adds one to current_step: the request sits out this step
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
        """Preempt the newest requests of the client with most running, until `turn` has the places and blocks it needs, or as many requests."""
        mine: Scheduler = self
        asked = [r for r in mine.waiting if r.status in READY and client_of(r) == turn]
        own = sum(client_of(r) == turn for r in mine.running)
        groups, size = len(mine.kv_cache_config.kv_cache_groups), mine.block_size
        # One spare block for each running request of `turn`: for want of one vLLM would preempt the newest request of all, likely of a client with few.
        blocks = groups * (own + (-(-asked[0].num_tokens // size) + 1 if asked else 0))
        wanted = min(len(asked), mine.max_num_running_reqs)
        while len(mine.running) + wanted > mine.max_num_running_reqs or mine.kv_cache_manager.block_pool.get_num_free_blocks() < blocks:
            victim = self._victim(turn, own)
            if victim is None:
                return
            mine.running.remove(victim)
            mine._preempt_request(victim, time.monotonic(), drop_stale_output=mine.requires_kv_delivery)
            own += 1  # counts the freed place as taken, so that no client is pushed below an equal share

    def _victim(self, turn: str, own: int) -> Request | None:
        """The newest request of the other client with most running, if it has more than `own`, the number of `turn`; None: no request may be preempted."""
        mine: Scheduler = self
        counts = Counter(client_of(r) for r in mine.running if client_of(r) != turn)
        client, most = counts.most_common(1)[0] if counts else (None, 0)
        if most <= own:
            return None
        newest = next(r for r in reversed(mine.running) if client_of(r) == client)
        return newest if mine._request_blocks_can_be_freed(newest) else None


class FairScheduler(FairSteps, Scheduler):
    """Fair shares where a step is scheduled when the one before has ended."""


class FairAsyncScheduler(FairSteps, AsyncScheduler):
    """Fair shares where the next step is scheduled while one runs."""


def fair_scheduler(vllm_config: VllmConfig, **rest: object) -> Scheduler:
    """`scheduler_cls` for engines without drafting: asynchronous if vLLM has decided so when it calls this."""
    chosen = FairAsyncScheduler if vllm_config.scheduler_config.async_scheduling else FairScheduler
    return chosen(vllm_config=vllm_config, **rest)


def asks(request: Request) -> int:
    """Number of tokens that a request wants in its next step, drafts included."""
    return max(1, int(request.num_tokens_with_spec - request.num_computed_tokens))


def client_of(request: Request) -> str:
    """The client of a request, which is kept on it; "" if its parameters name none."""
    client: str | None = getattr(request, "client", None)
    if client is None:
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        client = request.client = str(extra.get(CLIENT, ""))
    return client
