"""Scoring a prompt: `echo` with `max_tokens` 0. vLLM generates a token that nobody asked for; here it is neither shown nor counted.

To be dropped when vLLM's engine takes max_tokens 0, and with it prompts that fill the context.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensInput
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

Generate = Callable[..., AsyncGenerator[RequestOutput, None]]  # AsyncLLM.generate


async def scored(
    generate: Generate, model_config: ModelConfig, prompt: TokensInput, params: SamplingParams, request_id: str, **rest: object
) -> AsyncGenerator[RequestOutput, None]:
    """Outputs that end with the prompt. One that fills the context goes in without its last token, which is then the one generated."""
    ids: list[int] = prompt.get("prompt_token_ids") or []
    fills = len(ids) == model_config.max_model_len
    if fills:
        _require_raw(model_config.logprobs_mode, params)
        prompt, params = {**prompt, "prompt_token_ids": ids[:-1]}, forced(params, ids[-1])
    async with aclosing(generate(prompt, params, request_id, **rest)) as outputs:
        async for output in outputs:
            if fills:
                output.prompt_token_ids = list(ids)
                if output.prompt_logprobs:
                    output.prompt_logprobs = [*output.prompt_logprobs, *(output.outputs[0].logprobs or [])]
            for one in output.outputs:
                _hide(one)
            yield output


def forced(params: SamplingParams, token: int) -> SamplingParams:
    """Parameters under which `token` comes next, with its log-probability before anything is forced, and as many others as the prompt's tokens have."""
    scoring = params.clone()
    scoring.allowed_token_ids, scoring.logprobs = [token], params.prompt_logprobs
    scoring.structured_outputs = scoring.logit_bias = scoring.bad_words = None
    scoring.stop, scoring.stop_token_ids, scoring.min_tokens = [], [], 0
    return scoring


def _require_raw(mode: str, params: SamplingParams) -> None:
    if params.prompt_logprobs is not None and mode != "raw_logprobs":
        raise VLLMValidationError(
            f"A prompt of exactly the context can't be scored where the server's --logprobs-mode is {mode}. Shorten it by one token.",
            parameter="prompt",
        )


def _hide(one: CompletionOutput) -> None:
    """Remove the generated token from an output."""
    one.text, one.token_ids, one.stop_reason = "", [], None
    one.logprobs = None if one.logprobs is None else []
    if one.finish_reason == "stop":
        one.finish_reason = "length"
