"""Corrections of vLLM's OpenAI answers: subclasses of its serving objects that change outputs and events.

What each mends, and what upstream change would let us drop it, is said beside it, here and in answer_tokens, answer_streams and answer_scoring.
"""

import copy
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import TypeVar

from fastapi import Request
from openai.types.responses.response_output_text import Logprob as ResponseLogprob
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionLogProbs, ChatCompletionLogProbsContent, ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionLogProbs, CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.context import ConversationContext
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, StreamingResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.inputs import EngineInput
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers.chat_utils import ConversationMessage
from vllm.sampling_params import SamplingParams

from memdec.server.choice import SCORED
from memdec.server.engine.answer_streams import Outputs, finish_apart, one_by_one, token_by_token
from memdec.server.engine.answer_tokens import Place, bytes_of, names_of
from memdec.server.engine.protocols import Tokenizer
from memdec.server.in_place import become

Candidates = Mapping[int, Logprob]
"""A token's log-probability and those of others in its place, by token id."""
Rendered = TypeVar("Rendered", list[EngineInput], tuple[list[ConversationMessage], list[EngineInput]])
"""A completion's prompts; a chat's, with its conversation."""
SPLIT = "one_event_per_token"  # a field of stream_options
UNSCORED = Logprob(0.0)  # of a prompt's first token
LEAST = -9999.0  # JSON has no minus infinity; vLLM's, and OpenAI's, number for it


def put_right(state: State) -> None:
    """Give the serving objects that vLLM has made the classes of this file."""
    become(state.openai_serving_completion, Completions)
    become(state.openai_serving_chat, Chats)


class Completions(OpenAIServingCompletion):
    """`/v1/completions`. A copy of the app's object makes each answer; it knows the place in the text that each choice has reached."""

    next_places: Iterator[Place]
    """The places of the choices whose log-probabilities vLLM makes next, in the order of its calls."""

    async def create_completion(
        self, request: CompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | CompletionResponse | ErrorResponse:
        """Answer as vLLM does. A request to score its prompt is marked as one for the engine's client."""
        if _is_scoring(request):
            request.vllm_xargs = {**(request.vllm_xargs or {}), SCORED: 1}
        return await super().create_completion(request, raw_request)

    async def render_completion_request(self, request: CompletionRequest) -> list[EngineInput] | ErrorResponse:
        """The prompts as token ids; those to be echoed also have their text, which vLLM leaves out with return_token_ids."""
        prompts = await super().render_completion_request(request.model_copy(update={"return_token_ids": False}))
        return prompts if _is_scoring(request) else _with_room(prompts, self.model_config.max_model_len, request.max_tokens)

    def completion_stream_generator(
        self, request: CompletionRequest, engine_inputs: list[EngineInput], result_generator: Outputs, *args: object, **kwargs: object
    ) -> AsyncGenerator[str, None]:
        """Events of an answer."""
        outputs = one_by_one(result_generator)
        if by_token(request):
            outputs = token_by_token(outputs, partial(self._place, request))
        mine = copy.copy(self)
        outputs = mine._followed(request, engine_inputs, outputs)
        return finish_apart(
            super(Completions, mine).completion_stream_generator(_generating(request), engine_inputs, outputs, *args, **kwargs)
        )

    async def _followed(self, request: CompletionRequest, engine_inputs: list[EngineInput], outputs: Outputs) -> Outputs:
        """Yield the outputs, `next_places` being set for each; a choice's first has the prompt's text where vLLM leaves it out."""
        places: dict[tuple[int, int], Place] = {}
        async for number, output in outputs:
            (choice,) = output.outputs
            key = number, choice.index
            if key not in places:
                prompt = output.prompt if output.prompt is not None else self._extract_prompt_text(engine_inputs[number])
                places[key] = self._place(request, output.prompt_token_ids, prompt)
                output.outputs = [_echoing(request, choice, prompt)]
            self.next_places = repeat(places[key])
            yield number, output

    def request_output_to_completion_response(
        self, final_res_batch: list[RequestOutput], request: CompletionRequest, *args: object, **kwargs: object
    ) -> CompletionResponse:
        """An answer that isn't streamed."""
        choices = [output for output in final_res_batch for _ in output.outputs]
        mine = copy.copy(self)  # answers are made in threads, too
        mine.next_places = (self._place(request, one.prompt_token_ids, one.prompt) for one in choices)
        for output in final_res_batch:
            output.outputs = [_echoing(request, choice, output.prompt) for choice in output.outputs]
        return super(Completions, mine).request_output_to_completion_response(final_res_batch, _generating(request), *args, **kwargs)

    def _place(self, request: CompletionRequest, prompt: Sequence[int] | None = None, text: str | None = None) -> Place:
        """The place where a choice's text begins: at the prompt if it is echoed."""
        echoed = request.echo and request.logprobs is not None
        return Place(self.renderer.tokenizer, request.skip_special_tokens, *((prompt or (), text or "") if echoed else ()))

    def _create_completion_logprobs(
        self, token_ids: Sequence[int], top_logprobs: Sequence[Candidates | None], num_output_top_logprobs: int, tokenizer: Tokenizer,
        logprob_token_ids: list[int] | None = None, return_as_token_id: bool | None = None, **_: object
    ) -> CompletionLogProbs:  # fmt: skip
        """Log-probabilities of a stretch of tokens.

        vLLM's have one entry for all candidates of one text, such as parts of characters, and offsets that count the letters of placeholders. To
        be dropped when its entries have names of their own, and its offsets come from the text.
        """
        by_id = self.return_tokens_as_token_ids if return_as_token_id is None else return_as_token_id
        logprobs = CompletionLogProbs(text_offset=next(self.next_places).pass_by(token_ids), token_logprobs=[], tokens=[], top_logprobs=[])
        shown = None if logprob_token_ids or num_output_top_logprobs == -1 else num_output_top_logprobs + 1
        for token, candidates in zip(token_ids, top_logprobs, strict=False):
            offered = dict(list((candidates or {token: None}).items())[:shown])
            texts = {t: self._get_decoded_token(c or UNSCORED, t, tokenizer, by_id) for t, c in offered.items()}
            names = names_of(tokenizer, texts)
            logprobs.tokens.append(names[token])
            logprobs.token_logprobs.append(_floored(candidates[token]) if candidates else None)
            logprobs.top_logprobs.append({names[t]: _floored(c) for t, c in offered.items()} if candidates else None)
        return logprobs


class Chats(OpenAIServingChat):
    """`/v1/chat/completions`."""

    async def render_chat_request(
        self, request: ChatCompletionRequest
    ) -> tuple[list[ConversationMessage], list[EngineInput]] | ErrorResponse:
        """The conversation and its prompt as token ids."""
        asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return _with_room(await super().render_chat_request(request), self.model_config.max_model_len, asked)

    def chat_completion_stream_generator(
        self, request: ChatCompletionRequest, result_generator: AsyncIterator[RequestOutput], *args: object, **kwargs: object
    ) -> AsyncGenerator[str, None]:
        """Events of an answer."""
        outputs = self._split(request, result_generator) if by_token(request) else result_generator
        return finish_apart(super().chat_completion_stream_generator(request, outputs, *args, **kwargs))

    async def _split(self, request: ChatCompletionRequest, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[RequestOutput]:
        """One token an output."""
        numbered = ((0, output) async for output in outputs)
        place = partial(Place, self.renderer.tokenizer, request.skip_special_tokens)
        async for _, output in token_by_token(one_by_one(numbered), place):
            yield output

    def _create_chat_logprobs(
        self, token_ids: Sequence[int], top_logprobs: Sequence[Candidates | None], tokenizer: Tokenizer, *args: object, **kwargs: object
    ) -> ChatCompletionLogProbs:
        """vLLM's log-probabilities with each token's own bytes."""
        logprobs: ChatCompletionLogProbs = super()._create_chat_logprobs(token_ids, top_logprobs, tokenizer, *args, **kwargs)
        for entry, token, candidates in zip(logprobs.content or (), token_ids, top_logprobs, strict=False):
            _give_bytes(entry, tokenizer, token, candidates)
        return logprobs


class Responses(OpenAIServingResponses):
    """`/v1/responses`. A copy of the app's object makes each stream; it keeps the tokens that no event has carried yet."""

    pending: list[tuple[int, Candidates]] | None = None
    """A stream's tokens, with their log-probabilities, that no event has carried yet."""

    def _validate_generator_input(self, engine_input: EngineInput) -> ErrorResponse | None:
        """Raise VLLMValidationError for a prompt without room for an answer; vLLM's own message says that 512 exceeds 512."""
        _with_room([engine_input], self.model_config.max_model_len, None)
        return super()._validate_generator_input(engine_input)

    async def _process_simple_streaming_events(
        self,
        request: ResponsesRequest,
        sampling_params: SamplingParams,
        result_generator: AsyncIterator[ConversationContext],
        *args: object,
        **kwargs: object,
    ) -> AsyncIterator[StreamingResponsesResponse]:
        """vLLM's events with all log-probabilities: vLLM makes no event of an output without text, such as a part of a character.

        To be dropped when it keeps what belongs to such an output for the next event.
        """
        mine = copy.copy(self)
        mine.pending = []
        source = super(Responses, mine)._process_simple_streaming_events
        async for event in source(request, sampling_params, mine._collected(result_generator), *args, **kwargs):
            if event.type.endswith(".delta"):  # of reasoning or of a call, which have no log-probabilities; those of text carry them
                mine.pending.clear()
            yield event

    async def _collected(self, contexts: AsyncIterator[ConversationContext]) -> AsyncIterator[ConversationContext]:
        """The stream's contexts, whose latest tokens become pending."""
        async for context in contexts:
            if self.pending is not None and context.last_output is not None:
                for choice in context.last_output.outputs:
                    self.pending += zip(choice.token_ids, choice.logprobs or (), strict=False)
            yield context

    def _create_response_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Candidates], tokenizer: Tokenizer, top_logprobs: int | None = None
    ) -> list[ResponseLogprob]:
        """vLLM's log-probabilities with each token's own bytes, as in chats; in a stream, those of all tokens since the last text."""
        if self.pending is not None:
            token_ids, logprobs = [t for t, _ in self.pending], [c for _, c in self.pending]
            self.pending.clear()
        entries: list[ResponseLogprob] = super()._create_response_logprobs(token_ids, logprobs, tokenizer, top_logprobs)
        for entry, token, candidates in zip(entries, token_ids, logprobs, strict=True):
            _give_bytes(entry, tokenizer, token, candidates)
        return entries


def _give_bytes(
    entry: ChatCompletionLogProbsContent | ResponseLogprob, tokenizer: Tokenizer, token: int, candidates: Candidates | None
) -> None:
    """Give a token's entry and its candidates their own bytes: vLLM gives the bytes of the text, and a part of a character has none."""
    entry.bytes = list(bytes_of(tokenizer, token))
    for other, candidate in zip(entry.top_logprobs, candidates or (), strict=False):
        other.bytes = list(bytes_of(tokenizer, candidate))


def by_token(request: CompletionRequest | ChatCompletionRequest) -> bool:
    """Whether a stream has one event a token. Raises VLLMValidationError if the option isn't a boolean."""
    asked = ((request.stream_options and request.stream_options.model_extra) or {}).get(SPLIT, False)
    if not isinstance(asked, bool):
        raise VLLMValidationError(f"stream_options.{SPLIT} must be true or false", parameter="stream_options")
    return asked


def _is_scoring(request: CompletionRequest) -> bool:
    return bool(request.echo) and request.max_tokens == 0


def _generating(request: CompletionRequest) -> CompletionRequest:
    """A copy of a scoring request with max_tokens 1: vLLM then builds the answer from the prompt and the outputs, which are empty."""
    return request.model_copy(update={"max_tokens": 1}) if _is_scoring(request) else request


def _echoing(request: CompletionRequest, choice: CompletionOutput, prompt: str | None) -> CompletionOutput:
    """A choice's first output, with the prompt's text where vLLM takes it for empty: with return_token_ids."""
    if not (request.echo and request.return_token_ids):
        return choice
    echoing = copy.copy(choice)
    echoing.text = (prompt or "") + choice.text
    return echoing


def _with_room(rendered: Rendered | ErrorResponse, context: int, asked: int | None) -> Rendered | ErrorResponse:
    """Return `rendered`. Raises VLLMValidationError if a prompt leaves no token of the context for an answer that was asked for.

    vLLM's own check lets it pass, and then finds that max_tokens, whatever the client said, is 0. To be dropped when it doesn't.
    """
    if isinstance(rendered, ErrorResponse) or asked == 0:
        return rendered
    for one in rendered[1] if isinstance(rendered, tuple) else rendered:  # a chat's come with its conversation
        if (tokens := len(one.get("prompt_token_ids") or ())) == context:
            raise VLLMValidationError(
                f"This model's maximum context length is {context} tokens. However, your prompt contains {tokens} input tokens, "
                f"which leaves no room for output tokens. Please reduce the length of the input prompt.",
                parameter="input_tokens",
                value=tokens,
            )
    return rendered


def _floored(score: Logprob) -> float:
    return max(float(score.logprob), LEAST)
