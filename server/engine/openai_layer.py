"""vLLM's OpenAI layer: the only names of vLLM's that memdec.server.api uses, and what we change in it."""

import logging
from argparse import Namespace
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.middleware.cors import CORSMiddleware
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.utils.server_utils import lifespan
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.responses import serving as responses_serving
from vllm.entrypoints.openai.responses.api_router import cancel_responses, create_responses, retrieve_responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.instrumentator import register_instrumentator_api_routers
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.entrypoints.serve.tokenize.api_router import router as tokenize_router
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMServerError, VLLMValidationError
from vllm.inputs import TokensInput
from vllm.renderers.online_renderer import ResponsesRenderResult

from memdec.server.engine.answers import put_right
from memdec.server.engine.grammars import asking
from memdec.server.engine.large_answers import build_later, create_chat_completion, create_completion
from memdec.server.engine.responses import MemoryResponses
from memdec.server.in_place import become, overwrite

Rendered: TypeAlias = list[TokensInput] | tuple[object, list[TokensInput]] | ResponsesRenderResult
"""A completion's prompts, a chat's with its conversation, a response's."""
Render = Callable[..., Awaitable[Rendered | ErrorResponse]]
"""A method of vLLM's that turns a request into prompts of token ids."""

__all__ = [
    "BaseModelPath",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "CompletionRequest",
    "CompletionResponse",
    "ErrorResponse",
    "ResponsesRequest",
    "ResponsesResponse",
    "VLLMServerError",
    "add_middleware",
    "asking",
    "build_later",
    "cancel_responses",
    "create_chat_completion",
    "create_completion",
    "create_responses",
    "equip_responses",
    "exception_handler",
    "http_exception_handler",
    "init_app_state",
    "init_exception_handler",
    "lifespan",
    "limit_tokens",
    "log_no_client_errors",
    "put_right",
    "register_instrumentator_api_routers",
    "retrieve_responses",
    "tokenize_router",
    "validate_json_request",
    "with_cancellation",
]


def add_middleware(app: Starlette, args: Namespace) -> None:
    """Add vLLM's middleware, except its API-key check, request ids and CORS, which ours replace.

    To be dropped when `init_entrypoints_middleware` has an argument that leaves CORS out.
    """
    left_out = {"api_key": [""], "enable_request_id_headers": False}  # with None instead of [""] it would read VLLM_API_KEY
    init_entrypoints_middleware(Namespace(**{**vars(args), **left_out}), app, ("generate",))
    app.user_middleware[:] = [layer for layer in app.user_middleware if layer.cls is not CORSMiddleware]  # type: ignore[comparison-overlap]


def equip_responses(state: State) -> None:
    """Turn vLLM's serving object of /v1/responses into ours."""
    become(state.openai_serving_responses, MemoryResponses)


def limit_tokens(state: State, prompt: int | None, output: int | None) -> None:
    """Have the app's serving objects refuse prompts of more than `prompt` tokens, and end answers at `output` where a client names no max_tokens.

    vLLM's rendering is the first place where a prompt's number of tokens is known.
    """

    def limited(render: Render, parameter: str) -> Render:
        async def rendered(*args: object, **kwargs: object) -> Rendered | ErrorResponse:
            prompts = await render(*args, **kwargs)
            if prompt is None or isinstance(prompts, ErrorResponse):
                return prompts
            for one in _prompts(prompts):
                if (tokens := len(one["prompt_token_ids"])) > prompt:
                    raise VLLMValidationError(
                        f"The prompt has {tokens:,} tokens; this server takes at most {prompt:,}.", parameter=parameter
                    )
            return prompts

        return rendered

    completion, chat, responses = state.openai_serving_completion, state.openai_serving_chat, state.openai_serving_responses
    overwrite(completion, "render_completion_request", limited(completion.render_completion_request, "prompt"))
    overwrite(chat, "render_chat_request", limited(chat.render_chat_request, "messages"))
    overwrite(responses.online_renderer, "render_responses", limited(responses.online_renderer.render_responses, "input"))
    for serving in (completion, chat, responses):
        least = min((n for n in (serving.override_max_tokens, output) if n is not None), default=None)
        overwrite(serving, "override_max_tokens", least)


def _prompts(rendered: Rendered) -> Sequence[TokensInput]:
    """The engine's prompts in what vLLM has rendered: a chat's and a response's come with their conversation."""
    prompts: Sequence[TokensInput]
    if isinstance(rendered, tuple):
        _, prompts = rendered
    else:
        prompts = rendered if isinstance(rendered, list) else [rendered.engine_input]
    return prompts


def log_no_client_errors() -> None:
    """Keep tracebacks of client errors, full queues and cancelled responses out of vLLM's log: it writes one for whatever ends a stream."""

    def is_servers(record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], VLLMClientError | GracefulHTTPError | CancelledError)

    for module in (completion_serving, chat_serving, responses_serving):
        module.logger.addFilter(is_servers)
