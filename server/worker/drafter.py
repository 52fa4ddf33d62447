"""Self-speculation: the memory that a request mixes in also drafts its next tokens. A decoder does so with its own weights and KV cache.

With a draft sampled from p_mem a token is accepted with probability 1 - (1 - lambda) * TV(p_mem, p_base), which is at least lambda
(Leviathan et al., arXiv 2211.17192, for the mixture as target). An n-gram memory drafts what followed the longest match, which takes
microseconds. vLLM verifies: greedy answers stay what they are, sampled ones keep their distribution.
"""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import override_forward_context
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from memdec.server.in_place import overwrite
from memdec.server.model.routing import NONE_KNOWN
from memdec.server.routing.domains import DECODER, NGRAM
from memdec.server.worker.draft_length import DraftLengths
from memdec.server.worker.fair import FairScheduler
from memdec.server.worker.forward_contexts import Numbers

LOOKED_AT = 256  # last tokens of a text, with which a match is searched; far more than the longest match has


class DraftingScheduler(FairScheduler):
    """Our scheduler, which also reserves KV-cache slots for the tokens that are being drafted."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        overwrite(self, "num_lookahead_tokens", self.num_spec_tokens)  # vLLM reserves none for a proposer of method custom_class


def _is_constrained(request: CachedRequestState) -> bool:
    return request.sampling_params.structured_outputs is not None


@dataclass(frozen=True)
class Seen:
    """Tokens that a request's decoder ran while drafting; their keys and values are in the KV cache."""

    position: int
    """Position of the first token in the request's text."""
    tokens: list[int]
    hidden: Tensor
    """The decoder's hidden states, [tokens or more, H_memory]."""


class MemoryDrafter:
    """A proposer for vLLM's method `custom_class`.

    It drafts with the composite's own towers and their KV cache, so a decoder need not run again over its draft when that is verified.
    """

    adaptive = True

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.most: int = vllm_config.num_speculative_tokens
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.context: int = vllm_config.model_config.max_model_len
        self.vocabulary: int = vllm_config.model_config.get_vocab_size()
        self.seen: dict[str, Seen] = {}
        """Request -> what its decoder ran in the last step. Older entries are dropped: a request that sits a step out may lose its KV-cache blocks."""
        self.looked_up: dict[str, int] = {}
        """Request -> number of tokens that an n-gram memory drafted for it in the last step."""
        self.ended = 0.0
        """When the last drafting ended (perf_counter); 0: nothing was drafted, so the next step can't be timed."""

    def load_model(self, target: Any) -> None:
        """Take the composite, whose towers draft."""
        self.model = target
        sizes = [sum(p.nbytes for p in part.parameters()) for part in (target.base, *target.towers[:1])]
        sizes += [0] * (2 - len(sizes))  # no decoder
        self.lengths = DraftLengths(self.most, sizes[1] / sum(sizes))

    def attach(self, runner: GPUModelRunner) -> None:
        """Take the runner, once its KV cache is set up."""
        self.runner = runner

    @torch.inference_mode()
    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Numbers, token_ids_cpu: Numbers, **_: object
    ) -> list[list[int]]:
        """Draft tokens of each request of the batch; none for requests without a decoder or an n-gram memory.

        `sampled_token_ids` are the step's new tokens, already appended to `token_ids_cpu` [requests, context], of which the first
        `num_tokens_no_spec` [requests] are valid.
        """
        if not any(self._request(row).memory.slot for row in range(len(sampled_token_ids))):
            self.seen, self.looked_up, self.ended = {}, {}, 0.0
            return [[] for _ in sampled_token_ids]
        self._learn(sampled_token_ids)
        self.seen, self.looked_up = {}, {}
        lengths = self._lengths(sampled_token_ids, num_tokens_no_spec)
        drafts: list[list[int]] = [[] for _ in lengths]
        by_slot: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            if length and self._drafter(self._request(row)) == NGRAM:
                drafts[row] = self._look_up(row, length, token_ids_cpu[row, : num_tokens_no_spec[row]])
            elif length:
                by_slot.setdefault(self._request(row).memory.slot, []).append(row)
        sampling: SamplingMetadata = self.runner.input_batch.sampling_metadata
        probabilities = None
        if by_slot and not sampling.all_greedy:
            probabilities = torch.zeros(len(lengths), max(lengths), self.vocabulary, device=self.runner.device)
            for row, draft in enumerate(drafts):  # drafted with probability 1, which vLLM assumes where there are no probabilities
                probabilities[row, range(len(draft)), draft] = 1.0
        started = time.perf_counter()
        for slot, rows in by_slot.items():
            last = num_tokens_no_spec[rows] - 1
            with self.model.times.part("drafting", self.runner.device):
                self._draft(slot, rows, [lengths[r] for r in rows], token_ids_cpu[rows, last], last, sampling, drafts, probabilities)
        if probabilities is not None:  # what vLLM's runner hands to its rejection sampler in the next step
            overwrite(self.runner, "_draft_probs", probabilities)
            overwrite(self.runner, "_draft_prob_req_ids", self.runner.input_batch.req_ids.copy())
        self.ended = time.perf_counter()
        if by_slot:
            self.lengths.drafted((self.ended - started) / max(lengths[row] for rows in by_slot.values() for row in rows))
        return drafts

    def _look_up(self, row: int, length: int, text: Numbers) -> list[int]:
        """What followed the longest match of a row's text in its n-gram memory, at most `length` tokens."""
        with self.model.times.part("drafting", self.runner.device):
            draft: list[int] = self.model.ngrams.loaded[self._request(row).memory.slot].draft(text[-LOOKED_AT:].tolist(), length)
        self.looked_up[self.runner.input_batch.req_ids[row]] = len(draft)
        return draft

    def _learn(self, sampled_token_ids: list[list[int]]) -> None:
        """Learn from the step that has just run: how many drafts were accepted, and what the step cost."""
        runner = self.runner
        ids: list[str] = runner.input_batch.req_ids
        counts = np.diff(runner.query_start_loc.np[: len(ids) + 1])
        for name, new, count in zip(ids, sampled_token_ids, counts.tolist(), strict=True):
            drafted = self._drafted(name, count - 1)
            if new and drafted and name in self.lengths.requests:
                self.lengths.verified(name, self._kind(runner.requests[name]), drafted, len(new) - 1)
            if new and drafted:
                self.lengths.count(DECODER if name in self.seen else NGRAM, drafted, len(new) - 1)
        # Timed only if a request was in the step before, so that no wait lies between; not with prompts, whose tokens cost more than drafts.
        if self.ended and counts.max() <= self.most + 1 and any(name in self.lengths.requests for name in ids):
            self.lengths.step.add(int(counts.sum()), time.perf_counter() - self.ended)
        self.lengths.keep(set(ids))

    def _drafted(self, name: str, verified: int) -> int:
        """How many drafted tokens of a request's last step count as tried; `verified` of them reached the verifier.

        Under a grammar all count: those that it drops are as wrong as rejected ones. (vLLM shows a drafter no grammar: the mask of a token exists
        in the scheduler, once the token before it is accepted.) Otherwise tokens are dropped where a step is full, which says nothing of them.
        """
        drafted = len(self.seen[name].tokens) if name in self.seen else self.looked_up.get(name, 0)
        return verified if drafted and not _is_constrained(self.runner.requests[name]) else drafted

    @staticmethod
    def _kind(request: CachedRequestState) -> Hashable:
        """The slots of a request's memories, and whether it has a grammar: requests that agree in both have about the same acceptance rate."""
        return request.memory.slots, _is_constrained(request)

    def known(self, request: str, position: int, tokens: Numbers) -> Tensor:
        """The decoder's hidden states of the first n of `tokens`, from `position` on, as far as they are what it ran while drafting: [n, H_memory]."""
        seen = self.seen.get(request)
        if seen is None or seen.position != position:
            return NONE_KNOWN
        same = 0
        while same < min(len(tokens), len(seen.tokens)) and tokens[same] == seen.tokens[same]:
            same += 1
        return seen.hidden[:same]

    def _request(self, row: int) -> CachedRequestState:
        """The runner's state of a row's request."""
        return self.runner.requests[self.runner.input_batch.req_ids[row]]

    def _lengths(self, sampled_token_ids: list[list[int]], tokens: Numbers) -> list[int]:
        """How many tokens to draft for each request, as DraftLengths chooses. Requests with a seed get a fixed number, so that they repeat; under a grammar none."""
        batch = self.runner.input_batch
        able = [bool(new) and self._drafter(self._request(row)) is not None for row, new in enumerate(sampled_token_ids)]
        limits = [self._limit(self._request(row), int(tokens[row])) if able[row] else 0 for row in range(len(able))]
        if self.adaptive:  # under a grammar a fixed number would mostly be in vain
            limits = [0 if row in batch.generators and _is_constrained(self._request(row)) else limit for row, limit in enumerate(limits)]
        asked = [row for row, limit in enumerate(limits) if limit and self.adaptive and row not in batch.generators]
        for row in asked:
            request = self._request(row)
            self.lengths.begin(batch.req_ids[row], self._kind(request), request.memory.lam)
        for drafter in (DECODER, NGRAM):
            rows = [row for row in asked if self._drafter(self._request(row)) == drafter]
            names = [batch.req_ids[row] for row in rows]
            chosen = self.lengths.choose(names, len(limits) - len(rows), free=drafter == NGRAM) if rows else []
            for row, length in zip(rows, chosen, strict=True):
                limits[row] = min(limits[row], length)
        return limits

    def _drafter(self, request: CachedRequestState) -> str | None:
        """The kind of memory that drafts for a request; None if it has none that can."""
        slot = request.memory.slot
        if 0 < slot <= len(self.model.towers):
            return DECODER
        return NGRAM if slot in self.model.ngrams.loaded else None

    def _limit(self, request: CachedRequestState, tokens: int) -> int:
        """The most tokens that may be drafted for a request whose text has `tokens`; a step adds one to those it accepts."""
        params = request.sampling_params
        if params.min_p or params.logit_bias:
            return 0  # vLLM's verifier can't apply these
        left = (params.max_tokens or self.context) - len(request.output_token_ids)
        return max(0, min(self.most, left - 1, self.context - tokens - 1))

    def _draft(
        self, slot: int, rows: Sequence[int], lengths: Sequence[int], tokens: Numbers, positions: Numbers,
        sampling: SamplingMetadata, drafts: list[list[int]], probabilities: Tensor | None,
    ) -> None:  # fmt: skip
        """Draft for the rows of one slot, token by token; `drafts` and `probabilities` [requests, drafted, V] are filled in."""
        tower = self.model.towers[slot - 1]
        device = self.runner.device
        requests, ids = torch.tensor(rows), torch.from_numpy(tokens.astype(np.int64))
        places = torch.from_numpy(positions.astype(np.int64))
        wanted, local = torch.tensor(lengths), torch.arange(len(rows))
        states = torch.empty(len(rows), max(lengths), self.model.memory_width, dtype=self.dtype, device=device)
        for number in range(max(lengths)):
            keep = wanted > number
            if not bool(keep.all()):
                requests, ids, places, wanted, local = requests[keep], ids[keep], places[keep], wanted[keep], local[keep]
            with override_forward_context(self.runner.attention.of_next_tokens(requests, places)):
                hidden = tower(ids.clamp(max=self.model.memory_ids - 1).to(device), places.to(device))
            states[local, number] = hidden
            logits = tower.compute_logits(hidden)[:, : self.vocabulary].float()
            chosen = logits.argmax(-1) if probabilities is None else self._sampled(logits, requests, number, sampling, probabilities)
            ids = chosen.cpu()
            for row, token in zip(requests.tolist(), ids.tolist(), strict=True):
                drafts[row].append(token)
            places = places + 1
        for i, row in enumerate(rows):
            seen = Seen(int(positions[i]), [int(tokens[i]), *drafts[row][:-1]], states[i])
            self.seen[self.runner.input_batch.req_ids[row]] = seen

    def _sampled(self, logits: Tensor, requests: Tensor, number: int, sampling: SamplingMetadata, probabilities: Tensor) -> Tensor:
        """Tokens drawn from the memory at each request's temperature; the most likely ones where that is 0. logits [n, V] float32.

        Every distribution is exact if the verifier is given its probabilities; one shaped like the target's is accepted most often.
        """
        at = requests.to(logits.device)
        temperature = sampling.temperature.index_select(0, at)  # type: ignore[union-attr]  # there unless all are greedy
        greedy = logits.argmax(-1)
        scaled = logits / torch.where(temperature == 0, 1.0, temperature)[:, None]
        k, p = (None if x is None else x.index_select(0, at) for x in (sampling.top_k, sampling.top_p))
        likely = apply_top_k_top_p(scaled, k, p).softmax(-1)
        probabilities[at, number, : likely.shape[1]] = likely
        # By the inverse of the cumulative distribution: an exponential race, as in vLLM's sampler, takes V random numbers a row.
        cumulative = likely.double().cumsum(-1)
        spots = torch.rand(len(likely), 1, dtype=torch.float64, device=logits.device)
        for i, row in enumerate(requests.tolist()):
            if (generator := sampling.generators.get(row)) is not None:
                spots[i].uniform_(generator=generator)
        drawn = torch.searchsorted(cumulative, spots * cumulative[:, -1:], right=True).squeeze(1).clamp(max=likely.shape[1] - 1)
        return torch.where(temperature == 0, greedy, drawn)


class FixedDrafter(MemoryDrafter):
    """Always drafts as many tokens as it may: for tests, and for measuring what adapting is worth."""

    adaptive = False
