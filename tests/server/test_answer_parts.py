"""What is done to vLLM's outputs and events, piece by piece, without an engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from transformers import AutoTokenizer
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from memdec.server.engine.answer_scoring import forced, scored
from memdec.server.engine.answer_streams import finish_apart, one_by_one, token_by_token
from memdec.server.engine.answer_tokens import Place, bytes_of, names_of

T = TypeVar("T")
TEXT = "naïve 日本語 🙂 d'été\n"


@pytest.fixture(scope="module")
def tokenizer(toys: Path) -> Any:
    """The toys' own, whose tokens are bytes."""
    return AutoTokenizer.from_pretrained(toys / "base")


class Fallback:
    """As much of a tokenizer as is asked here, with bytes beside words, as in Llama 2's."""

    pieces: tuple[str, ...] = ("<0xE6>", "<0x97>", "<0xA5>", "day", "\ufffd")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Entries of the vocabulary."""
        return [self.pieces[i] for i in ids]

    def decode(self, ids: list[int]) -> str:
        """Text of one token."""
        return self.pieces[ids[0]] if ids[0] > 2 else "\ufffd"


def collected(source: AsyncIterator[T]) -> list[T]:
    """Everything that comes."""

    async def collect() -> list[T]:
        return [item async for item in source]

    return asyncio.run(collect())


async def given(items: Iterable[T]) -> AsyncIterator[T]:
    """The items, as a stream."""
    for item in items:
        yield item


def output(*choices: tuple[int, list[int]], prompt_logprobs: Any = None, text: str = "", reason: str | None = None) -> RequestOutput:
    """One of the engine's, with (index, token ids) of each choice."""
    outputs = [CompletionOutput(i, text, ids, None, [{t: None} for t in ids], finish_reason=reason) for i, ids in choices]  # type: ignore[misc]
    return RequestOutput("r", "p", [1, 2], prompt_logprobs, outputs, False)


def test_bytes_are_the_text(tokenizer: Any) -> None:
    """Joined, whatever the vocabulary; a token that spells the replacement character spells it."""
    ids = tokenizer(TEXT)["input_ids"]
    parts = [bytes_of(tokenizer, token) for token in ids]
    assert b"".join(parts) == TEXT.encode() and len(parts) > len(TEXT)
    assert [bytes_of(Fallback(), token) for token in range(5)] == [b"\xe6", b"\x97", b"\xa5", b"day", "\ufffd".encode()]
    assert sorted(bytes_of(tokenizer, token) for token in range(4, 260)) == [bytes([b]) for b in range(256)]


def test_names_are_distinct() -> None:
    """Unique texts stay; others are spelled; what is spelled alike is numbered."""
    assert names_of(Fallback(), {0: "", 3: "day", 1: ""}) == {0: r"bytes:\xe6", 3: "day", 1: r"bytes:\x97"}
    assert names_of(Fallback(), {0: "", 3: "day"}) == {0: "", 3: "day"}
    Fallback.pieces += ("day",)
    assert names_of(Fallback(), {3: "day", 5: "day"}) == {3: "token_id:3", 5: "token_id:5"}


def test_places(tokenizer: Any) -> None:
    """Offsets are the text's, in pieces as at once; parts of a character share one; what isn't in the text has no length."""
    ids = tokenizer(TEXT)["input_ids"]
    special = tokenizer.convert_tokens_to_ids("<|system|>")
    offsets = Place(tokenizer, True).pass_by(ids)
    place = Place(tokenizer, True)
    assert offsets == [offset for token in ids for offset in place.pass_by([token])] and place.at == len(TEXT)
    for token, offset in zip(ids, offsets, strict=True):
        if (text := tokenizer.decode([token])) and "\ufffd" not in text:
            assert TEXT[offset:].startswith(text)
    assert Place(tokenizer, True).pass_by([ids[0], special, ids[1]]) == [0, offsets[1], offsets[1]]
    assert Place(tokenizer, True, [special, *ids], TEXT).pass_by([special, *ids, ids[0]]) == [0, *offsets, len(TEXT)]
    one, letter = (next(t for t in range(4, 260) if bytes_of(tokenizer, t) == b) for b in (b"\xe6", b"a"))
    assert Place(tokenizer, True).pass_by([one, letter, letter]) == [0, 1, 2]  # the text has a replacement character


def test_choices_share_the_prompts_scores() -> None:
    """A choice a step ahead meets another's first output, and vLLM's `add` drops the newcomer's."""
    ahead = output((0, [6]), prompt_logprobs=[])
    ahead.add(output((1, [5]), prompt_logprobs=[None, {2: 1}]), aggregate=True)
    assert ahead.prompt_logprobs == [], "vLLM keeps them now: one_by_one can go"
    parts = [(0, output((0, [5]), prompt_logprobs=[None, {2: 1}])), (1, output((0, [5]), prompt_logprobs=[None, {2: 2}])), (0, ahead)]
    found = [(prompt, one.outputs[0].index, one.prompt_logprobs) for prompt, one in collected(one_by_one(given(parts)))]
    assert found == [(0, 0, [None, {2: 1}]), (1, 0, [None, {2: 2}]), (0, 0, [None, {2: 1}]), (0, 1, [None, {2: 1}])]


def test_one_token_an_output(tokenizer: Any) -> None:
    """Texts, tokens and log-probabilities add up; each token has its own; the reason comes with the last; held-back text comes late."""
    ids = tokenizer(TEXT)["input_ids"]
    for held in (0, 3):
        shown = [TEXT[: len(TEXT) - 1 - held], TEXT[len(TEXT) - 1 - held :]]
        parts = [
            (0, output((0, ids[:-1]), text=shown[0])),
            (0, output((1, [ids[0]]), text="n")),
            (0, output((0, ids[-1:]), text=shown[1], reason="stop")),
        ]
        found = [one.outputs[0] for _, one in collected(token_by_token(given(parts), lambda: Place(tokenizer, True)))]
        first = [choice for choice in found if choice.index == 0]
        assert [choice.token_ids for choice in first] == [[token] for token in ids] and "".join(c.text for c in first) == TEXT
        assert [c.finish_reason for c in first] == [None] * (len(ids) - 1) + ["stop"] and [list(c.logprobs[0]) for c in first] == [
            [t] for t in ids
        ]
        assert "n" in first[0].text and [c.text for c in first[:2]] == [tokenizer.decode([token]) for token in ids[:2]]


def test_the_reason_comes_by_itself() -> None:
    """Text first. Other events are passed on as they are, also such as talk of a reason."""
    said = 'data: {"choices":[{"index":0,"text":"\\"finish_reason\\":\\"stop\\"","finish_reason":null}]}\n\n'
    usage = 'data: {"choices":[],"usage":{"prompt_tokens":3}}\n\n'
    last = {"index": 0, "text": "é.", "logprobs": {"tokens": ["é."]}, "finish_reason": "stop", "stop_reason": 7, "token_ids": [5, 6]}
    sent = [said, f"data: {json.dumps({'id': 'x', 'choices': [last], 'system_fingerprint': 'f'}, separators=(',', ':'))}\n\n", usage]
    first, text, end, *rest, done = collected(finish_apart(given([*sent, "data: [DONE]\n\n"])))
    assert [first, *rest, done] == [said, usage, "data: [DONE]\n\n"]
    assert json.loads(text[6:]) == {"id": "x", "choices": [{**last, "finish_reason": None, "stop_reason": None}]}
    empty = {**last, "text": "", "logprobs": {"tokens": []}, "token_ids": []}
    assert json.loads(end[6:]) == {"id": "x", "choices": [empty], "system_fingerprint": "f"}
    for delta, events in (({"content": "hi"}, 2), ({"content": ""}, 1), ({"tool_calls": [{"index": 0}]}, 2)):
        chat = {"choices": [{"index": 1, "delta": delta, "logprobs": None, "finish_reason": "length", "token_ids": None}]}
        found = collected(finish_apart(given([f"data: {json.dumps(chat, separators=(',', ':'))}\n\n"])))
        assert len(found) == events and json.loads(found[-1][6:])["choices"][0]["delta"] == {}


def test_a_prompt_that_fills_the_context_is_scored() -> None:
    """All but the last token go in, the last is forced; its score joins the prompt's; nothing is left of an answer."""
    asked: list[Any] = []

    async def generate(prompt: dict[str, Any], params: SamplingParams, request_id: str) -> AsyncIterator[RequestOutput]:
        asked.append((prompt["prompt_token_ids"], params.allowed_token_ids, params.logprobs))
        yield output((0, [8]), prompt_logprobs=[None, {7: 1}], text="x", reason="stop")

    class Config:
        max_model_len, logprobs_mode = 3, "raw_logprobs"

    def run(ids: list[int]) -> RequestOutput:
        params = SamplingParams(max_tokens=1, prompt_logprobs=4, logprobs=2)
        (found,) = collected(scored(generate, Config, {"prompt_token_ids": ids}, params, "r"))  # type: ignore[arg-type]
        assert (found.outputs[0].text, found.outputs[0].token_ids, found.outputs[0].finish_reason) == ("", [], "length")
        return found

    full = run([6, 7, 8])
    assert full.prompt_token_ids == [6, 7, 8] and full.prompt_logprobs == [None, {7: 1}, {8: None}]
    assert run([6, 7]).prompt_logprobs == [None, {7: 1}]
    assert asked == [([6, 7], [8], 4), ([6, 7], None, 2)]
    plain = forced(SamplingParams(stop=["x"], min_tokens=1, bad_words=["y"], logit_bias={3: 1}, max_tokens=2), 5)
    assert (plain.stop, plain.min_tokens, plain.bad_words, plain.logit_bias, plain.logprobs) == ([], 0, None, None, None)
