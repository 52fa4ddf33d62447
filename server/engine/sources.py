"""Sources of an answer: for each token that an n-gram memory raised, the documents that hold its context, and the offsets there.

An n-gram memory raises a token where p_ngram = s + r * p_base is above p_base, which is where s > (1 - r) * p, p being the mixture's: so
the log-probability of each sampled token suffices. The look-ups are done again here, in a thread, when a choice is complete.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensInput
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from memdec.decoders.reading.errors import DecoderError
from memdec.decoders.reading.ngram import NgramMemory
from memdec.server.json_types import JsonObject
from memdec.server.routing.domains import Ngrams

Generate = Callable[..., AsyncGenerator[RequestOutput, None]]  # AsyncLLM.generate
Sources = list[JsonObject]
MOST = 3  # occurrences that are listed for a token


@dataclass
class Collected:
    """The sources of each choice of each prompt of one HTTP request, filled in as they are completed."""

    prompts: list[dict[int, Sources]] = field(default_factory=list)

    def of_next_prompt(self) -> dict[int, Sources]:
        """Append an empty entry for the request's next prompt, and return it."""
        self.prompts.append({})
        return self.prompts[-1]

    def of_choice(self, index: int, n: int) -> Sources:
        """The sources of one choice of the answer; `n` choices share each prompt."""
        return self.prompts[index // n].get(index % n, [])


collected: ContextVar[Collected] = ContextVar("collected", default=Collected())  # noqa: B039  set by each request that asks for sources


class OpenMemories:
    """N-gram memories whose sources were asked for, open in the front end; a path's newer revision takes the place of an older one."""

    def __init__(self) -> None:
        self.memories: dict[str, NgramMemory] = {}

    async def get(self, ngrams: Ngrams | None) -> NgramMemory:
        """The memory of a domain. Raises VLLMValidationError where its files are not those that the engine has, or it was unloaded since."""
        if ngrams is None:
            raise VLLMValidationError("memory_sources: the memory was unloaded", parameter="memory_sources")
        memory = self.memories.get(ngrams.path)
        if memory is None or memory.revision != ngrams.revision:
            try:
                memory = await asyncio.to_thread(NgramMemory.open, Path(ngrams.path))
            except (DecoderError, OSError):
                memory = None
            if memory is None or memory.revision != ngrams.revision:
                raise VLLMValidationError("memory_sources: the memory's files have changed since it was loaded", parameter="memory_sources")
            self.memories[ngrams.path] = memory
        return memory


async def with_sources(
    generate: Generate, opened: Awaitable[NgramMemory], sources: dict[int, Sources], mode: str, prompt: TokensInput, params: SamplingParams,
    request_id: str, **rest: object
) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
    """Outputs of one prompt; a choice's entry in `sources` is written before its last output comes. `mode` is the server's --logprobs-mode."""
    memory = await opened
    if mode != "raw_logprobs":
        raise VLLMValidationError(f"memory_sources can't be had where the server's --logprobs-mode is {mode}", parameter="memory_sources")
    ids, made = list(prompt["prompt_token_ids"]), dict[int, list[tuple[int, float]]]()
    if params.logprobs is None:
        params = params.clone()
        params.logprobs = 0  # of the sampled token alone
    async with aclosing(generate(prompt, params, request_id, **rest)) as outputs:
        async for output in outputs:
            for choice in output.outputs:
                tokens = list(choice.token_ids)
                steps = (choice.logprobs or [])[-len(tokens) :] if tokens else []
                made.setdefault(choice.index, []).extend((t, step[t].logprob) for t, step in zip(tokens, steps, strict=True))
                if choice.finished():
                    sources[choice.index] = await asyncio.to_thread(sources_of, memory, ids, made[choice.index])
            yield output


def sources_of(memory: NgramMemory, prompt: Sequence[int], made: Sequence[tuple[int, float]]) -> Sources:
    """An entry for each generated token (id and log-probability) that the memory raised."""
    sources: Sources = []
    text = [*prompt[-memory.order :], *(token for token, _ in made)]
    first = len(text) - len(made)
    for index, (token, logprob) in enumerate(made):
        context = text[max(0, first + index - memory.order + 1) : first + index]
        matched = raised_by(memory, context, token, logprob)
        if not matched:
            continue
        places = memory.occurrences(context, MOST)
        documents = [{"document": place.document, "offset": place.offset} for place in places]
        sources.append({"index": index, "token_id": token, "matched": matched, "occurrences": documents})
    return sources


def raised_by(memory: NgramMemory, context: Sequence[int], token: int, logprob: float) -> int:
    """Length of the matched context for which the memory gave a token a higher probability than the base did; 0 if it didn't.

    `logprob` is the mixture's.
    """
    after = memory.continuations(context)
    at = int(after.token_ids.searchsorted(token))
    if at == len(after.token_ids) or int(after.token_ids[at]) != token:
        return 0
    return after.matched if float(after.probabilities[at]) > (1 - after.base_mass) * math.exp(logprob) else 0
