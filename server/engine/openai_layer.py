"""vLLM's OpenAI layer, under one roof: the only names that server.api takes from vLLM."""

from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.utils.server_utils import lifespan
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.instrumentator import register_instrumentator_api_routers
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.entrypoints.serve.tokenize.api_router import attach_router as attach_tokenize
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

__all__ = [
    "BaseModelPath",
    "ChatCompletionRequest",
    "CompletionRequest",
    "attach_tokenize",
    "create_chat_completion",
    "create_completion",
    "http_exception_handler",
    "init_app_state",
    "init_entrypoints_middleware",
    "init_exception_handler",
    "lifespan",
    "register_instrumentator_api_routers",
    "validate_json_request",
    "with_cancellation",
]
