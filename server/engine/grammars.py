"""Structured outputs on their way to the engine: only what the sandbox has compiled, within bounds, gets there."""

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

KNOWN = 512  # grammars whose outcome is remembered
AT_ONCE = 2  # compiles of one client
ALTOGETHER = 8
REST = 3  # a client's place stays taken for this many times its compile's seconds: others need the processor too
START_SECONDS = 300  # that a sandbox may take to start
FIELD = "structured_outputs"
TOO_COSTLY = (
    f"The schema, grammar, choice or regular expression of this request takes over {SECONDS:g} s of processor time, or too much memory, "
    "to compile. Make it smaller: fewer or shorter choices, fewer repetitions, less nesting."
)
TOO_BUSY = "The server is too busy to compile this request's grammar. Try again in a few seconds, or on another replica."

asking: ContextVar[str] = ContextVar("asking", default="")
"""Who asks: compiles are shared out by it."""


def leave_tags_to_the_sandbox() -> None:
    """vLLM also converts structural tags while it parses a body, in the event loop; their form is checked there, the rest with all others."""
    protocol.validate_structural_tag_payload = lambda *_, **__: None  # type: ignore[assignment]


class Grammars:
    """Checks each request's grammar once, in the sandbox, as vLLM would check and compile it."""

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
        """The same constraint as the engine wants it. Raises VLLMValidationError if the backend refuses it, or it costs too much."""
        fields = {name: value for name, value in asdict(params).items() if not name.startswith("_")}
        asked = json.dumps(fields).encode()
        outcome = await self._outcome(asked)
        if "refused" in outcome:
            raise VLLMValidationError(outcome["refused"], parameter=FIELD)
        passed = StructuredOutputsParams(**outcome["fields"])
        passed._backend = self.vllm_config.structured_outputs_config.backend
        return passed

    async def _outcome(self, asked: bytes) -> JsonObject:
        key, who = hashlib.sha256(asked).digest(), asking.get()
        if key not in self.known:
            place = self.places[who]
            await place.acquire()
            seconds = 0.0
            try:
                if key not in self.known:  # somebody else may have asked meanwhile
                    seconds = SECONDS
                    async with self.all_places:
                        self.known[key] = await self._compiled(asked)
                    seconds = self.known[key].get("seconds", SECONDS)
            finally:
                asyncio.get_running_loop().call_later(REST * seconds, self._free, who, place)
            while len(self.known) > KNOWN:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        return self.known[key]

    def _free(self, who: str, place: asyncio.Semaphore) -> None:
        place.release()
        if place._value == AT_ONCE and not place._waiters:
            self.places.pop(who, None)

    async def _compiled(self, asked: bytes) -> JsonObject:
        """What the sandbox says of a grammar. Leaving ends the compile. Raises GracefulHTTPError where it found no time."""
        loop = asyncio.get_running_loop()
        try:
            connection = self._ask()
        except OSError:  # the sandbox has died
            self.sandbox = None
            connection = self._ask()
        with connection:
            async with asyncio.timeout(START_SECONDS + WALL_SECONDS):
                await loop.sock_sendall(connection, asked)
                connection.shutdown(socket.SHUT_WR)
                answer = await loop.sock_recv(connection, len(READY))
                began = loop.time()
                while part := await loop.sock_recv(connection, 1 << 16):
                    answer += part
        if not answer:
            raise RuntimeError("the process that compiles grammars has failed; see the log")
        if answer == READY and loop.time() - began >= WALL_SECONDS:  # it may be as small as any
            raise GracefulHTTPError(TOO_BUSY, HTTPStatus.SERVICE_UNAVAILABLE)
        outcome: JsonObject = json.loads(answer[len(READY) :] or json.dumps({"refused": TOO_COSTLY}))
        return outcome

    def _ask(self) -> socket.socket:
        if self.sandbox is None:
            self.sandbox = Sandbox.start()
            self.sandbox.equip(self.vllm_config)
        return self.sandbox.ask()
