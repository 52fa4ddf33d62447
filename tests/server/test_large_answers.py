"""Large answers are built and written in a thread, to the same bytes; no engine."""

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse, ChatCompletionResponseChoice, ChatMessage
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, UsageInfo

from memdec.server.engine.large_answers import LARGE, Unbuilt, build_later, size


def outputs(tokens: int, logprobs: int, choices: int = 1, prompt: int = 0) -> Any:
    """One prompt's answers."""
    steps = [dict.fromkeys(range(logprobs))] * tokens if logprobs else None
    found = [SimpleNamespace(token_ids=[1] * tokens, logprobs=steps)] * choices
    return SimpleNamespace(outputs=found, prompt_logprobs=[None, *[dict.fromkeys(range(logprobs))] * prompt] if prompt else None)


def completion(choices: int) -> CompletionResponse:
    """With text that JSON escapes."""
    told = [CompletionResponseChoice(index=i, text=f'"ü\n{i}', finish_reason="stop") for i in range(choices)]
    return CompletionResponse(id="x", created=1, model="base", choices=told, usage=UsageInfo(prompt_tokens=1, total_tokens=2))


def chat(choices: int) -> ChatCompletionResponse:
    """The same as a chat."""
    told = [ChatCompletionResponseChoice(index=i, message=ChatMessage(role="assistant", content=f'"ü\n{i}')) for i in range(choices)]
    return ChatCompletionResponse(id="x", created=1, model="base", choices=told, usage=UsageInfo(prompt_tokens=1, total_tokens=2))


@pytest.mark.parametrize("answer", [completion(0), completion(1), completion(5), chat(1), chat(7)])
def test_the_same_bytes(answer: Any) -> None:
    """As vLLM's route writes."""
    assert Unbuilt(lambda: answer).written() == (JSONResponse(answer.model_dump()).body, 200)


def test_an_error_in_its_place() -> None:
    """With its status."""
    error = ErrorResponse(error=ErrorInfo(message="no", type="BadRequestError", code=400))
    assert Unbuilt(lambda: error).written() == (JSONResponse(error.model_dump()).body, 400)


def test_what_is_large() -> None:
    """Tokens and log-probabilities count, a prompt's once for each choice, whose answers echo it."""
    assert size(outputs(10, 0)) == 10
    assert size(outputs(10, 5, choices=3)) == 180
    assert size(outputs(1, 2, choices=2, prompt=4)) == 22


def test_only_large_answers_are_built_elsewhere() -> None:
    """Small ones as ever; large ones of both routes in a thread, whatever they raise included."""
    threads: list[bool] = []
    main = threading.current_thread()

    def built(*_: Any) -> CompletionResponse:
        threads.append(threading.current_thread() is main)
        return completion(1)

    async def full(_: Any, results: AsyncIterator[Any], *__: Any) -> Any:
        threads.append(threading.current_thread() is main)
        assert [r async for r in results]
        return chat(1)

    async def results(*found: Any) -> AsyncIterator[Any]:
        for one in found:
            yield one

    state: Any = SimpleNamespace(
        openai_serving_completion=SimpleNamespace(request_output_to_completion_response=built),
        openai_serving_chat=SimpleNamespace(chat_completion_full_generator=full),
    )
    build_later(state)

    async def run() -> None:
        complete, chatted = (
            state.openai_serving_completion.request_output_to_completion_response,
            state.openai_serving_chat.chat_completion_full_generator,
        )
        assert isinstance(complete([outputs(5, 5)], None), CompletionResponse)
        assert isinstance(await chatted(None, results(outputs(1, 1), outputs(5, 5))), ChatCompletionResponse)
        assert threads == [True, True]
        for large in (complete([outputs(LARGE, 0)] * 2, None), await chatted(None, results(outputs(LARGE, 1)))):
            assert isinstance(large, Unbuilt)
            assert (await asyncio.to_thread(large.written))[1] == 200
        assert threads[2:] == [False, False]

    asyncio.run(run())
