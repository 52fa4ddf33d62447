"""Answers 404 on paths of vLLM's and OpenAI's that this server doesn't serve, and says what to do instead."""

from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter

from memdec.server.errors import NotServed

NO_TEXT = "This server generates text; serve a model for that with vLLM."
ROUTER_ONLY = "That is for vLLM's own routers and render servers."
UNMIXED = {  # they would answer, but a memory can't be chosen there: vLLM's requests of these routes carry no further arguments to the engine
    "/v1/chat/completions/batch": "Send a request for each conversation to /v1/chat/completions: all share the engine's batches.",
    "/invocations": "Send the same body to /v1/completions, /v1/chat/completions or /v1/responses.",
    "/v1/messages": "Use /v1/chat/completions or /v1/responses; gateways such as LiteLLM translate Anthropic's API into them.",
    "/inference/v1/generate": "Send token ids as the prompt of /v1/completions.",
    "/generative_scoring": "Use /v1/completions with echo and logprobs.",
    "/v1/systemone": "Use /v1/chat/completions with structured_outputs.",
}
NEVER = {
    **dict.fromkeys(("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"), NO_TEXT),
    **dict.fromkeys(("/v2/embed", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations"), NO_TEXT),
    **dict.fromkeys((f"/v1/{of}/render" for of in ("completions", "chat/completions", "messages", "responses")), "Use /tokenize."),
    **dict.fromkeys((f"/v1/{of}/derender" for of in ("completions", "chat/completions")), ROUTER_ONLY),
    "/inference/v1/abort_requests": "Close the connection, and the request ends.",
    "/v1/messages/count_tokens": "Use /tokenize.",
    "/v1/load_lora_adapter": "LoRA adapters don't work with memory decoders yet.",
    "/v1/unload_lora_adapter": "LoRA adapters don't work with memory decoders yet.",
    "/scale_elastic_ep": "Start further servers behind a load balancer.",
    "/is_scaling_elastic_ep": "Start further servers behind a load balancer.",
}  # fmt: skip
TOKENIZER_INFO = {"/tokenizer_info": "It takes --enable-tokenizer-info-endpoint."}


def absent(tokenizer_info: bool = False) -> APIRouter:
    """Routes that refuse all these paths, and /tokenizer_info unless it is served."""
    return refusals({**UNMIXED, **NEVER, **({} if tokenizer_info else TOKENIZER_INFO)})


def refusals(paths: Mapping[str, str]) -> APIRouter:
    """A router that answers 404 on these paths, whatever the method or body."""
    router = APIRouter()
    for path, instead in paths.items():
        router.add_api_route(path, _refusal(path, instead), methods=["GET", "POST"], include_in_schema=False)
    return router


def _refusal(path: str, instead: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise NotServed(f"{path} is not served here. {instead}")

    return refuse
