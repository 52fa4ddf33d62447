"""Shadowing: a share of the real decoder requests is replayed with the baselines, so that metrics always compare them on the same prompts."""

import asyncio
import random
import secrets
from collections.abc import Mapping

from vllm.inputs import EngineInput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from memdec.server import metrics
from memdec.server.choice import CLIENT, MemoryChoice
from memdec.server.engine.protocols import Engine
from memdec.server.routing.domains import BOTH, DECODER, KNN, NGRAM, NONE, RAG
from memdec.server.worker.shares import BACKGROUND

PRIORITY = 1  # behind every client's 0: scheduled last, preempted first
QUEUED = 32
Baselines = Mapping[str, tuple[tuple[str, float], ...]]  # domain -> (mode, lambda) of each


class Shadows:
    """Replays requests one at a time, whatever the load. Those that don't fit into the queue are dropped and counted."""

    def __init__(self, engine: Engine, rate: float, baselines: Baselines) -> None:
        self.engine, self.rate, self.baselines = engine, rate, baselines
        self.queue: asyncio.Queue[tuple[Mapping[str, object], SamplingParams, MemoryChoice]] = asyncio.Queue(QUEUED)
        self.random = random.Random()  # noqa: S311
        self.salt = secrets.token_hex(16)
        """Prefix-cache salt of all replays and of nothing else, so that no client's request hits their blocks."""
        for domain, modes in baselines.items():
            for mode, _ in modes:
                for outcome in ("done", "failed", "dropped"):
                    metrics.SHADOWS.labels(mode, domain, outcome)  # exported from the start, at 0
        self.task = asyncio.get_running_loop().create_task(self._run())

    def offer(self, prompt: EngineInput, params: SamplingParams, choice: MemoryChoice) -> None:
        """Queue the replays of a client's decoder request, with probability `rate`; none in its own mode."""
        if self.engine.draining or self.random.random() >= self.rate or not isinstance(prompt, dict) or prompt.get("type") != "token":
            return
        replay = {"type": "token", "prompt_token_ids": list(prompt["prompt_token_ids"]), "cache_salt": self.salt}
        for mode, lam in self.baselines.get(
            choice.domain, ((NONE, 0.0),)
        ):  # a domain that was loaded later is compared with the base alone
            if mode == choice.mode:
                continue
            if self.queue.full():
                metrics.SHADOWS.labels(mode, choice.domain, "dropped").inc()
            else:
                self.queue.put_nowait((replay, params, self._replay(mode, choice.domain, lam)))

    def _replay(self, mode: str, name: str, lam: float) -> MemoryChoice:
        """What a replay chooses."""
        domain = self.engine.loaded.current.domains.get(name)
        shares = domain.shares_of(None) if domain is not None and mode == BOTH else None
        return MemoryChoice(mode, name, lam, shares=shares or ())

    async def _run(self) -> None:
        for number in range(1 << 62):
            prompt, params, choice = await self.queue.get()
            outcome = "dropped" if self.engine.draining else "done"
            try:
                if outcome == "done":
                    async for _ in self.engine.generate(dict(prompt), _replayed(params, choice), f"shadow-{number}", priority=PRIORITY):
                        pass
            except Exception:  # counted, and never shown to a client
                outcome = "failed"
            metrics.SHADOWS.labels(choice.mode, choice.domain, outcome).inc()


def _replayed(params: SamplingParams, choice: MemoryChoice) -> SamplingParams:
    """The client's parameters for one plain answer in the baseline's mode."""
    replay = params.clone()
    replay.n, replay.output_kind, replay.detokenize = 1, RequestOutputKind.FINAL_ONLY, False
    replay.logprobs = replay.prompt_logprobs = None
    replay.stop, replay.extra_args = [], {**(params.extra_args or {}), **choice.to_extra_args(), CLIENT: BACKGROUND}
    return replay


def baselines_of(
    retrieval: Mapping[str, float],
    domains: list[str],
    ngrams: Mapping[str, float] | None = None,
    both: Mapping[str, tuple[float, float]] | None = None,
) -> Baselines:
    """Each domain's baselines: the base alone; kNN-LM and RAG if it has a datastore; its n-grams if it has some. `retrieval`, `ngrams`: domain -> lambda.

    `both`: domain -> lambda of its decoder alone, and of decoder and n-grams together; these two are baselines where they were fitted to each other.
    """
    baselines = {}
    for name in domains:
        retrieved = ((KNN, retrieval[name]), (RAG, 0.0)) if name in retrieval else ()
        counted = ((NGRAM, ngrams[name]),) if ngrams and name in ngrams else ()
        together = tuple(zip((DECODER, BOTH), both[name], strict=True)) if both and name in both else ()
        baselines[name] = ((NONE, 0.0), *retrieved, *counted, *together)
    return baselines
