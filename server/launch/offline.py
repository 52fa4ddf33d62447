"""The engine without HTTP, in this process: for benchmarks and offline batches."""

import os
import time
from dataclasses import dataclass

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
if not torch.cuda.is_available():
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Counter, Vector

from memdec.server.choice import MemoryChoice
from memdec.server.composite_spec import CompositeSpec, DecoderEntry
from memdec.server.launch.vllm_arguments import worker_class
from memdec.server.routing.domains import DECODER
from memdec.server.worker.draft_length import drafting


@dataclass(frozen=True)
class Timed:
    """The answers to one batch of prompts, and how long they took."""

    seconds: float
    first: float
    """Largest TTFT of the batch, in seconds."""
    tokens: list[list[int]]


class OfflineEngine:
    """A base, with decoders or as plain vLLM serves it."""

    def __init__(
        self, base: str, architecture: str, decoders: dict[str, str], drafter: str | None = None, drafted: int = 0, **options: object
    ) -> None:
        """`decoders` maps domains to folders; with none, this is vLLM without us. `drafter` names a class of memdec.server.worker.drafter."""
        self.composite = bool(decoders)
        if decoders:
            spec = CompositeSpec(architecture, tuple(DecoderEntry(name, path, revision=name) for name, path in decoders.items()))
            options |= {"hf_overrides": spec.overrides(), "worker_cls": worker_class()}
        if drafted:
            options |= drafting(drafted, drafter or "MemoryDrafter")
        self.llm = LLM(base, enforce_eager=not torch.cuda.is_available(), enable_prefix_caching=False, disable_log_stats=False, **options)

    def ask(self, prompts: list[list[int]], domains: list[str | None], lams: list[float], tokens: int, temperature: float) -> Timed:
        """Answer a batch of prompts (token ids) with `tokens` tokens each."""
        params = [
            SamplingParams(
                max_tokens=tokens, temperature=temperature, ignore_eos=True, detokenize=False,
                extra_args=MemoryChoice(DECODER, domain, lam).to_extra_args() if domain else None,
            )
            for domain, lam in zip(domains, lams, strict=True)
        ]  # fmt: skip
        started = time.perf_counter()
        answers = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        first = max(a.metrics.first_token_latency for a in answers if a.metrics is not None)
        return Timed(seconds, first, [list(a.outputs[0].token_ids) for a in answers])

    def parts(self) -> dict[str, float]:
        """Seconds since the start by part of a step; nothing for vLLM without us."""
        if not self.composite:
            return {}
        times: dict[str, tuple[float, int]] = self.llm.collective_rpc("step_times")[0]
        return {part: seconds for part, (seconds, _) in times.items()}

    def drafts(self) -> tuple[int, list[int]]:
        """Number of drafts, and of tokens accepted at each position, since the start."""
        counters = {m.name: m for m in self.llm.get_metrics() if "spec_decode" in m.name}
        if not counters:
            return 0, []
        at: Vector = counters["vllm:spec_decode_num_accepted_tokens_per_pos"]
        count: Counter = counters["vllm:spec_decode_num_drafts"]
        return count.value, list(at.values)
