"""What vLLM's front end does on the event loop though a client decides how long it takes: done elsewhere, or cut short first."""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request
from starlette.datastructures import State
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.entrypoints.serve.exception_handling.handlers import http, validation
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message

from memdec.server.errors import cut
from memdec.server.in_place import overwrite

Create = Callable[[object, Request], Coroutine[object, object, object]]
"""A method of ServingTokenization: of a request, as its class has it, and the HTTP request."""
LONGEST_MESSAGE = 1500  # characters
TOKENISERS = 2  # threads: a client that tokenises megabytes keeps these busy, and nothing else


def cut_messages() -> None:
    """Cut messages before vLLM looks for paths in them: its expressions take quadratic time, on the event loop, and a client's 2 MB of `/a/a/…` hours.

    Not needed once vLLM's `sanitize_message` takes linear time, or cuts first.
    """
    for module in (error_response, http, validation):
        overwrite(module, "sanitize_message", lambda message: sanitize_message(cut(message, LONGEST_MESSAGE)))


def tokenise_in_threads(state: State) -> None:
    """Have `/tokenize` and `/detokenize` make their answers in threads: vLLM turns ids into texts and models one by one on the event loop.

    Each runs on a loop of its own, since vLLM's methods are coroutines that hand the tokenizer's part to yet another thread.
    Not needed once vLLM's ServingTokenization does the same.
    """
    serving, threads = state.serving_tokenization, ThreadPoolExecutor(TOKENISERS, thread_name_prefix="tokenise")

    def threaded(create: Create) -> Create:
        async def created(request: object, raw_request: Request) -> object:
            context = contextvars.copy_context()
            return await asyncio.get_running_loop().run_in_executor(threads, context.run, asyncio.run, create(request, raw_request))

        return created

    overwrite(serving, "create_tokenize", threaded(serving.create_tokenize))
    overwrite(serving, "create_detokenize", threaded(serving.create_detokenize))
