"""Checks of request bodies before vLLM sees them: what its validators or engine would fail on becomes a client error that says why."""

from typing import Self, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator

from memdec.server.api import structured_outputs
from memdec.server.api.bounds import require_bounded
from memdec.server.api.plain_json import require_plain
from memdec.server.engine.openai_layer import ChatCompletionRequest, CompletionRequest, ResponsesRequest, asking
from memdec.server.errors import RequestError
from memdec.server.json_types import JsonObject
from memdec.server.routing.domains import MODES
from memdec.server.routing.spelling import require_spelt_headers

LONGEST_PRIORITY = 18  # characters
OURS = {  # what our routes read beside OpenAI's and vLLM's fields
    "domain": {"type": "string", "description": "The memory to answer with, one of /v1/domains."},
    "lambda": {"type": "number", "minimum": 0, "maximum": 1, "description": "How much the memory counts; by default as tuned."},
    "memory": {"enum": list(MODES), "description": "How the domain is remembered; a domain's modes are in /v1/domains."},
    "rag_stride": {"type": "integer", "minimum": 1, "description": "With memory 'rag': tokens between retrievals."},
    "memory_sources": {"type": "boolean", "description": "With memory 'ngram': name the documents that the answer's tokens were seen in."},
    "ngram_share": {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "description": "With memory 'both': the n-gram memory's share of lambda; the rest is the decoder's. By default as fitted.",
    },
}
WRONG_TYPES = (AttributeError, KeyError, IndexError, TypeError, RecursionError)


Body = TypeVar("Body", bound=BaseModel)


def _described(schema: JsonObject) -> None:
    schema["properties"].update(OURS)


class Completion(CompletionRequest):
    """OpenAI's completion request."""

    model_config = ConfigDict(json_schema_extra=_described)

    @model_validator(mode="wrap")
    @classmethod
    def _as_client_error(cls, body: object, validate: ModelWrapValidatorHandler[Self]) -> Self:
        return _validated(body, validate)


class ChatCompletion(ChatCompletionRequest):
    """OpenAI's chat completion request."""

    model_config = ConfigDict(json_schema_extra=_described)

    @model_validator(mode="wrap")
    @classmethod
    def _as_client_error(cls, body: object, validate: ModelWrapValidatorHandler[Self]) -> Self:
        return _validated(body, validate)


class ResponseRequest(ResponsesRequest):
    """OpenAI's request for a response."""

    model_config = ConfigDict(json_schema_extra=_described)

    @model_validator(mode="wrap")
    @classmethod
    def _as_client_error(cls, body: object, validate: ModelWrapValidatorHandler[Self]) -> Self:
        return _validated(body, validate)


def _validated(body: object, validate: ModelWrapValidatorHandler[Body]) -> Body:
    """Make a client error of what vLLM's validators raise: they run before pydantic's type checks, and fail in many ways on an unexpected type."""
    try:
        return validate(body)
    except WRONG_TYPES as error:
        raise ValueError(f"a field has not the type that it should have ({type(error).__name__}: {str(error)[:200]})") from None


async def require_sound(raw_request: Request) -> None:
    """Raise RequestError for contradictory or malformed JSON and headers, and for schemas that are too large to compile."""
    require_plain(await raw_request.body())
    engine, key, client = raw_request.app.state.engine_client, getattr(raw_request.state, "key", None), raw_request.client
    asking.set(key.name if key is not None else client.host if client is not None else "")
    if len(raw_request.headers.get("x-vllm-priority", "")) > LONGEST_PRIORITY:
        raise RequestError("The header X-Vllm-Priority is not a number that fits 64 bits.")
    require_spelt_headers(raw_request.headers.keys())
    body = await raw_request.json()
    require_bounded(body)
    if isinstance(body, dict):
        structured_outputs.require_small(body)
        structured_outputs.require_effective(body, engine.vllm_config.structured_outputs_config.disable_any_whitespace)
