"""RAG through the engine: a passage before the prompt, fetched once, or anew every `stride` tokens (paper, section 5.1: 4)."""

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import SimpleNamespace

from vllm.exceptions import VLLMValidationError
from vllm.inputs import EngineInput, TokensInput
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from memdec.server.choice import SEGMENT, MemoryChoice
from memdec.server.retrieval.rag import Count, PassageFinder

Generate = Callable[..., AsyncGenerator[RequestOutput, None]]  # AsyncLLM.generate
NOT_STRIDED = {  # what would have to be carried from one pass to the next, and isn't
    "n": (1, "n"),
    "presence_penalty": (0, "presence_penalty"),
    "frequency_penalty": (0, "frequency_penalty"),
    "repetition_penalty": (1, "repetition_penalty"),
    "min_tokens": (0, "min_tokens"),
    "prompt_logprobs": (None, "prompt log-probabilities (echo with logprobs, or prompt_logprobs)"),
    "structured_outputs": (None, "structured outputs"),
}


async def retrieve_once(
    generate: Generate, finder: PassageFinder, context: int, count: Count, prompt: TokensInput, params: SamplingParams,
    request_id: str, **rest: object
) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
    """Outputs of the prompt with a passage before it, whose tokens are added to `count`. Whatever they say of the prompt leaves the passage out."""
    ids = token_ids(prompt)
    room, params = make_room(finder, context, ids, params)
    # A search takes a millisecond or two, in which the event loop would stand still.
    augmented = await asyncio.to_thread(finder.augment, ids, room)
    count.tokens += augmented.passage
    async with aclosing(generate(_with_ids(prompt, augmented.ids), params, request_id, **rest)) as outputs:
        async for output in outputs:
            output.prompt, output.prompt_token_ids = prompt.get("prompt"), list(ids)
            if output.prompt_logprobs:  # a stream's later outputs have none
                output.prompt_logprobs = [None, *augmented.without(output.prompt_logprobs)[1:]]  # OpenAI's first is null
            yield output


async def retrieve_every(
    stride: int, generate: Generate, finder: PassageFinder, context: int, count: Count, prompt: TokensInput, params: SamplingParams,
    request_id: str, tokenizer: TokenizerLike, **rest: object
) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
    """As `retrieve_once`, but with a new passage every `stride` tokens, each in a new pass over passage, prompt and answer so far."""
    require_stridable(params)
    ids = token_ids(prompt)
    room, params = make_room(finder, context, ids, params)
    wanted = params.max_tokens or context - len(ids) - room
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=ids, request_id=request_id)
    text = IncrementalDetokenizer.from_new_request(tokenizer if params.detokenize else None, request)
    streamed = params.output_kind == RequestOutputKind.DELTA
    made: list[int] = []
    logprobs: list[dict[int, Logprob]] = []
    sent, arrival = 0, prompt.get("arrival_time", time.time())
    while True:
        piece = _piece(params, min(stride, wanted - len(made)), len(made))
        augmented = await asyncio.to_thread(finder.augment, [*ids, *made], room)
        count.tokens += augmented.passage
        part = {**_with_ids(prompt, augmented.ids), "arrival_time": arrival}
        async with aclosing(generate(part, piece, f"{request_id}-{len(made)}", **rest)) as outputs:
            async for output in outputs:
                arrival, new = time.time(), output.outputs[0]
                made += new.token_ids
                logprobs += new.logprobs or []
                stop = text.update(list(new.token_ids), new.finish_reason == "stop")
                reason = "stop" if stop is not None or new.finish_reason == "stop" else new.finish_reason
                done = (output.finished and (reason != "length" or len(made) >= wanted)) or stop is not None
                if streamed or done:
                    chunk = CompletionOutput(
                        0, text.get_next_output_text(done, streamed), made[sent:], None,
                        (logprobs[sent:] if params.logprobs is not None else None), finish_reason=reason if done else None,
                        stop_reason=(stop if stop is not None else new.stop_reason) if done else None,
                    )  # fmt: skip
                    sent = len(made) if streamed else 0
                    yield RequestOutput(request_id, prompt.get("prompt"), list(ids), None, [chunk], done)
                if done:
                    return


def make_room(finder: PassageFinder, context: int, ids: list[int], params: SamplingParams) -> tuple[int, SamplingParams]:
    """Tokens that a passage may have, and the parameters that leave them free.

    The client's prompt and max_tokens come first. A chat without max_tokens would take all of the context: here it leaves
    room for a passage, at most half of what is free.
    """
    free = context - len(ids)
    choice = MemoryChoice.of(params)
    if choice is None or not choice.open_ended or params.max_tokens is None:
        return free - (params.max_tokens or 0), params
    room = max(free - params.max_tokens, min(finder.package.rag.passage, free // 2))
    params = params.clone()
    params.max_tokens = min(params.max_tokens or free, free - room)
    return room, params


def require_stridable(params: SamplingParams) -> None:
    """Raise VLLMValidationError naming what doesn't work when an answer is made in several passes."""
    for field, (neutral, name) in NOT_STRIDED.items():
        if getattr(params, field, neutral) not in (neutral, None):
            raise VLLMValidationError(f"rag_stride can't be used with {name}: drop one of them", parameter="rag_stride")


def token_ids(prompt: EngineInput) -> list[int]:
    """The prompt's token ids. Raises VLLMValidationError for prompts that have none."""
    if not isinstance(prompt, dict) or prompt.get("type") != "token":
        raise VLLMValidationError("memory 'rag' needs a prompt of text or token ids", parameter="memory")
    ids: list[int] = prompt["prompt_token_ids"]
    if not ids:  # with a passage in front vLLM would no longer see that
        raise VLLMValidationError("The decoder prompt cannot be empty", parameter="prompt")
    return ids


def _with_ids(prompt: TokensInput, ids: list[int]) -> TokensInput:
    return {**{k: v for k, v in prompt.items() if k not in ("prompt", "prompt_token_offsets")}, "prompt_token_ids": ids}


def _piece(params: SamplingParams, tokens: int, done: int) -> SamplingParams:
    """Parameters of one pass: token by token, without text, its seed moved on so that passes differ."""
    piece = params.clone()
    piece.max_tokens, piece.output_kind = tokens, RequestOutputKind.DELTA
    piece.detokenize, piece.stop = False, []
    piece.seed = None if params.seed is None else params.seed + done
    piece.extra_args = {**copy.copy(params.extra_args or {}), SEGMENT: 2 if done else 1}
    return piece
