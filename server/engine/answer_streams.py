"""Corrections of streams: of the engine's outputs before vLLM turns them into events, and of the events."""

import copy
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

from vllm.logprobs import PromptLogprobs
from vllm.outputs import CompletionOutput, RequestOutput

from memdec.server.engine.answer_tokens import Place
from memdec.server.json_types import JsonObject

Outputs = AsyncIterator[tuple[int, RequestOutput]]
"""The outputs of several prompts, each with its prompt's number."""


async def one_by_one(outputs: Outputs) -> Outputs:
    """One choice an output, and every choice's first with the prompt's log-probabilities.

    When a choice that is a step ahead meets another's first output in RequestOutput.add, the newcomer's are dropped, and vLLM's stream then
    reads past the end of the wrong list. All choices share them, as in a plain answer. To be dropped when `add` keeps them.
    """
    of_prompt: dict[int, PromptLogprobs | None] = {}
    async for prompt, output in outputs:
        scores = of_prompt.setdefault(prompt, output.prompt_logprobs)
        for choice in output.outputs:
            single = copy.copy(output)
            single.outputs, single.prompt_logprobs = [choice], scores
            yield prompt, single


async def token_by_token(outputs: Outputs, place: Callable[[], Place]) -> Outputs:
    """One token an output, with its own piece of the text, where a step gave several or the client was slow to read."""
    shown: dict[tuple[int, int], int] = {}  # characters of each choice
    places: dict[tuple[int, int], Place] = {}
    async for prompt, output in outputs:
        (choice,) = output.outputs
        key = prompt, choice.index
        sent, here = shown.setdefault(key, 0), places.setdefault(key, place())
        shown[key] += len(choice.text)
        starts = here.pass_by(choice.token_ids)
        for part in _parts(choice, [max(0, end - sent) for end in [*starts[1:], here.at]]):
            single = copy.copy(output)
            single.outputs = [part]
            yield prompt, single


def _parts(choice: CompletionOutput, ends: Sequence[int]) -> list[CompletionOutput]:
    """A choice's output, token by token; `ends` [tokens] is where each one's text ends. What stop strings hold back comes later."""
    if len(choice.token_ids) < 2:
        return [choice]
    parts, begin = [], 0
    for number, token in enumerate(choice.token_ids):
        last = number + 1 == len(choice.token_ids)
        part, end = copy.copy(choice), len(choice.text) if last else max(begin, ends[number])
        part.token_ids, part.text = [token], choice.text[begin:end]
        part.logprobs = None if choice.logprobs is None else choice.logprobs[number : number + 1]
        if not last:
            part.finish_reason = part.stop_reason = None
        parts.append(part)
        begin = end
    return parts


async def finish_apart(events: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The last text of a choice, then an event with an empty delta and the reason: clients stop reading at the reason.

    To be dropped when vLLM sends a finish_reason by itself, as OpenAI does.
    """
    async for event in events:
        if '"finish_reason":"' not in event:  # never within a text, where quotes are escaped
            yield event
            continue
        body = json.loads(event.removeprefix("data: "))
        (choice,) = body["choices"]
        if _says(choice):
            text = {key: value for key, value in body.items() if key != "system_fingerprint"}
            yield _event({**text, "choices": [{**choice, "finish_reason": None, "stop_reason": None}]})
        yield _event({**body, "choices": [_only_finish(choice)]})


def _says(choice: JsonObject) -> bool:
    """Whether an event carries anything besides finish_reason."""
    scores = choice.get("logprobs") or {}
    said = (
        choice.get("text"),
        choice.get("token_ids"),
        choice.get("prompt_token_ids"),
        *scores.values(),
        *choice.get("delta", {}).values(),
    )
    return any(said)


def _only_finish(choice: JsonObject) -> JsonObject:
    """The choice with its content emptied and all its keys kept."""
    empty: JsonObject = {"text": "", "delta": {}, "prompt_token_ids": None}
    if choice.get("token_ids"):
        empty["token_ids"] = []
    if choice.get("logprobs"):  # those of no token, as at every event without one
        empty["logprobs"] = {name: [] for name in choice["logprobs"]}
    return {key: empty.get(key, value) for key, value in choice.items()}


def _event(body: JsonObject) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
