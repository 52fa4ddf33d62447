"""Structured outputs: a request's grammar reaches the engine only after the sandbox has compiled it within its limits."""

import asyncio
import hashlib
import json
import socket
from collections import OrderedDict, defaultdict
from contextvars import ContextVar
from dataclasses import asdict
from http import HTTPStatus

from vllm.config import VllmConfig
from vllm.entrypoints.generate.base import protocol
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from memdec.server.engine.sandbox import READY, SECONDS, WALL_SECONDS, Sandbox
from memdec.server.json_types import JsonObject

KNOWN = 512  # grammars whose outcome is cached
AT_ONCE = 2  # compiles of one client that run at a time
ALTOGETHER = 8  # compiles of all clients that run at a time
REST = 3  # times a compile's CPU seconds for which it still counts against its client's AT_ONCE: other clients need the CPU too
START_SECONDS = 300  # that the sandbox process may take to start
FIELD = "structured_outputs"
TOO_COSTLY = (
    f"The schema, grammar, choice or regular expression of this request takes over {SECONDS:g} s of processor time, or too much memory, "
    "to compile. Make it smaller: fewer or shorter choices, fewer repetitions, less nesting."
)
TOO_BUSY = "The server is too busy to compile this request's grammar. Try again in a few seconds, or on another replica."

asking: ContextVar[str] = ContextVar("asking", default="")
"""The client of the current HTTP request: each has AT_ONCE compiles."""


def leave_tags_to_the_sandbox() -> None:
    """Have vLLM check only the form of structural tags while it parses a body: it would also convert them, on the event loop, without limits."""
    protocol.validate_structural_tag_payload = lambda *_, **__: None  # type: ignore[assignment]


class Grammars:
    """Has the sandbox check and compile each grammar, as vLLM would, and caches the outcomes."""

    def __init__(self, vllm_config: VllmConfig, sandbox: Sandbox | None) -> None:
        self.vllm_config = vllm_config
        self.sandbox = sandbox
        self.known: OrderedDict[bytes, JsonObject] = OrderedDict()
        self.places: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))
        self.all_places = asyncio.Semaphore(ALTOGETHER)
        leave_tags_to_the_sandbox()
        if sandbox is not None:
            sandbox.equip(vllm_config)

    async def checked(self, params: StructuredOutputsParams) -> StructuredOutputsParams:
        """The constraint in the form that the engine wants. Raises VLLMValidationError if the backend refuses it, or if it exceeds a limit."""
        fields = {name: value for name, value in asdict(params).items() if not name.startswith("_")}
        grammar = json.dumps(fields).encode()
        outcome = await self._outcome(grammar)
        if "refused" in outcome:
            raise VLLMValidationError(outcome["refused"], parameter=FIELD)
        passed = StructuredOutputsParams(**outcome["fields"])
        passed._backend = self.vllm_config.structured_outputs_config.backend
        return passed

    async def _outcome(self, grammar: bytes) -> JsonObject:
        key, client = hashlib.sha256(grammar).digest(), asking.get()
        if key not in self.known:
            place = self.places[client]
            await place.acquire()
            seconds = 0.0
            try:
                if key not in self.known:  # another request for the same grammar may have had it compiled meanwhile
                    seconds = SECONDS
                    async with self.all_places:
                        self.known[key] = await self._compiled(grammar)
                    seconds = self.known[key].get("seconds", SECONDS)
            finally:
                asyncio.get_running_loop().call_later(REST * seconds, self._free, client, place)
            while len(self.known) > KNOWN:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        return self.known[key]

    def _free(self, client: str, place: asyncio.Semaphore) -> None:
        """Give a client's place back, and forget the client when it has none taken."""
        place.release()
        if place._value == AT_ONCE and not place._waiters:
            self.places.pop(client, None)

    async def _compiled(self, grammar: bytes) -> JsonObject:
        """The sandbox's answer about a grammar. Cancelling this ends the compile. Raises GracefulHTTPError if the machine was too busy for it."""
        loop = asyncio.get_running_loop()
        try:
            connection = self._ask()
        except OSError:  # the sandbox has died
            self.sandbox = None
            connection = self._ask()
        with connection:
            async with asyncio.timeout(START_SECONDS + WALL_SECONDS):
                await loop.sock_sendall(connection, grammar)
                connection.shutdown(socket.SHUT_WR)
                answer = await loop.sock_recv(connection, len(READY))
                began = loop.time()
                while part := await loop.sock_recv(connection, 1 << 16):
                    answer += part
        if not answer:
            raise RuntimeError("the process that compiles grammars has failed; see the log")
        if answer == READY and loop.time() - began >= WALL_SECONDS:  # the wall time ended it, which says nothing about the grammar
            raise GracefulHTTPError(TOO_BUSY, HTTPStatus.SERVICE_UNAVAILABLE)
        outcome: JsonObject = json.loads(answer[len(READY) :] or json.dumps({"refused": TOO_COSTLY}))
        return outcome

    def _ask(self) -> socket.socket:
        """A connection to a new child of the sandbox, which is started if there is none."""
        if self.sandbox is None:
            self.sandbox = Sandbox.start()
            self.sandbox.equip(self.vllm_config)
        return self.sandbox.ask()
