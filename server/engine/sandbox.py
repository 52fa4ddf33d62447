"""The sandbox: a process that compiles each client's grammar in a child with limits, before the engine sees it.

vLLM converts and compiles grammars in native code, on the front end's event loop and in a thread of the engine, where nothing can interrupt a
compile that runs away. Here the same code runs first in a child process, one for each grammar. The kernel kills the child when it exceeds a limit
of CPU time, memory or wall time, and as soon as its client has left. (A limit on compiles in vLLM's own backends would replace all of this.)
"""

import ctypes
import fcntl
import json
import os
import pickle
import random
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from memdec.server.json_types import JsonObject

if TYPE_CHECKING:  # importing vLLM takes seconds
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] /\S+:\d+: ")  # what xgrammar puts before its messages: the time, and a line of its own source
SECONDS = 1.0  # of CPU time for a grammar: to parse it, to compile it, and to follow it for STEPS tokens
WALL_SECONDS = 20.0  # from the connection to the answer, however busy the machine
MEMORY = 512 << 20  # bytes that a compile may allocate
STEPS = 64  # tokens for which a compiled grammar is followed
SLOWEST_STEP = 0.005  # seconds of CPU time a token, on average: in every step the whole batch waits for it
BRIEF = 0.1  # seconds after which a compile's priority is lowered
NICE = 10  # a tenth of the CPU time that others get: on a busy machine a grammar within the limits still finishes
PR_SET_PDEATHSIG = 1  # of Linux's prctl
READY = b"."
DEADLY = (signal.SIGPROF, signal.SIGALRM, signal.SIGIO, signal.SIGTERM)


class Sandbox:
    """The front end's side of the sandbox process."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control

    @classmethod
    def fork(cls) -> "Sandbox":
        """Fork this process, which takes no time. Only for a launcher without threads, except those of libraries that allow for forks (BLAS)."""
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            try:
                serve(theirs)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        return cls(ours)

    @classmethod
    def start(cls) -> "Sandbox":
        """Start a fresh interpreter, which takes seconds."""
        ours, theirs = socket.socketpair()
        subprocess.Popen([sys.executable, "-m", "memdec.server.engine.sandbox", str(theirs.fileno())], pass_fds=[theirs.fileno()])  # noqa: S603
        theirs.close()
        return cls(ours)

    def equip(self, vllm_config: "VllmConfig") -> None:
        """Send vLLM's configuration, which names the tokenizer and the backend. It is the first message."""
        config = pickle.dumps(vllm_config)
        self.control.sendall(len(config).to_bytes(8, "big") + config)

    def ask(self) -> socket.socket:
        """Open a connection to a new child, which reads a grammar until the end of the stream, sends READY, and answers if no limit ends it first.

        Closing the connection ends the child. Raises OSError if the sandbox process has died.
        """
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self.control, [b"g"], [theirs.fileno()])
        finally:
            theirs.close()
        ours.setblocking(False)
        return ours


def serve(control: socket.socket) -> None:
    """Fork a child for each connection that arrives, until the other side is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the sandbox ends with the server, even one that was killed
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole process group; this process ends when the front end closes its socket
    config = _exactly(control, int.from_bytes(_exactly(control, 8), "big"))
    manager = _manager(pickle.loads(config))  # noqa: S301  # from the process that started this one
    started: dict[int, float] = {}  # by process id
    while True:
        if select.select([control], [], [], BRIEF / 2 if started else None)[0]:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            with socket.socket(fileno=descriptors[0]) as connection:
                if (child := os.fork()) == 0:
                    _answer(connection, manager)
                started[child] = time.monotonic()
        _tend(started)


def _tend(started: dict[int, float]) -> None:
    """Reap the children that have ended, and lower the priority of those that have run for BRIEF seconds."""
    while started and (child := os.waitpid(-1, os.WNOHANG)[0]):
        del started[child]
    for child, began in started.items():
        if time.monotonic() - began > BRIEF:
            for thread in Path(f"/proc/{child}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(thread.name), NICE)


def _manager(vllm_config: "VllmConfig") -> "StructuredOutputManager":
    """vLLM's manager of grammars as the engine has it, with its backend loaded, but compiling in the caller's thread."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output import StructuredOutputManager

    manager = StructuredOutputManager(vllm_config)
    manager._use_async_grammar_compilation = False
    manager._create_grammar = lambda _: None  # type: ignore[method-assign, return-value, assignment]
    params = SamplingParams(structured_outputs=StructuredOutputsParams(grammar='root ::= "a"'))
    _validate(params, manager)  # imports what a child would import each time
    manager.grammar_init(SimpleNamespace(sampling_params=params, structured_output_request=SimpleNamespace()))  # type: ignore[arg-type]
    del manager._create_grammar
    return manager


def _validate(params: "SamplingParams", manager: "StructuredOutputManager") -> None:
    """Check and convert a grammar as vLLM's front end does. Raises ValueError, and whatever a backend raises."""
    config = manager.vllm_config
    params._validate_structured_outputs(config.model_config, config.structured_outputs_config, manager.tokenizer)


def _answer(connection: socket.socket, manager: "StructuredOutputManager") -> None:
    """Run a child: read a grammar from the connection, check it under the limits, send the outcome, and exit."""
    try:
        connection.setblocking(True)
        asked = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        _limit(connection)
        connection.sendall(READY)
        connection.sendall(json.dumps(_checked(json.loads(asked), manager)).encode())
    except (OSError, MemoryError):
        pass  # the client has left, or memory ran out: the front end takes silence for a refusal
    finally:
        os._exit(0)


def _limit(connection: socket.socket) -> None:
    """Have the kernel kill this process when it exceeds a limit, or when the other end of the connection closes."""
    for number in DEADLY:
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    status = Path("/proc/self/status").read_text().splitlines()
    has = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (has + MEMORY, has + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)  # SIGIO when the other end closes
    poll = select.poll()
    poll.register(connection, 0)
    if any(event & select.POLLHUP for _, event in poll.poll(0)):  # it was closed before SIGIO was set up
        os._exit(0)


def _checked(fields: JsonObject, manager: "StructuredOutputManager") -> JsonObject:
    """Validate, compile and follow a grammar: returns its `fields` as the engine wants them, or why it is `refused`, and the `seconds` of CPU time."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.request import StructuredOutputRequest

    params = SamplingParams(structured_outputs=StructuredOutputsParams(**fields))
    began = time.process_time()
    try:
        _validate(params, manager)
        passed = asdict(params.structured_outputs)  # type: ignore[arg-type]
        request = SimpleNamespace(
            request_id="sandbox", sampling_params=params, structured_output_request=StructuredOutputRequest(params.structured_outputs)  # type: ignore[arg-type]
        )  # fmt: skip
        request.structured_output_request.grammar = manager._create_grammar(request)
        _follow(request.structured_output_request.grammar, manager)
    except Exception as error:  # backends raise errors of all kinds about a client's grammar
        return {"refused": PLACE.sub("", str(error)).strip() or type(error).__name__, "seconds": time.process_time() - began}
    passed = {name: value for name, value in passed.items() if not name.startswith("_")}
    return {"fields": passed, "seconds": time.process_time() - began}


def _follow(grammar: "StructuredOutputGrammar", manager: "StructuredOutputManager") -> None:
    """Follow a compiled grammar along random tokens. Raises ValueError if it allows no first token, or takes over SLOWEST_STEP a token."""
    mask = manager.backend.allocate_token_bitmask(1)
    end = set(np.atleast_1d(manager.tokenizer.eos_token_id).tolist())
    chance, began, steps = random.Random(0), time.process_time(), 0  # noqa: S311
    while steps < STEPS and not grammar.is_terminated():
        grammar.fill_bitmask(mask, 0)
        allowed = np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")).tolist()
        if not allowed and not steps:
            raise ValueError("it allows no text at all")
        onwards = [token for token in chance.choices(allowed, k=8) if token not in end] if allowed else []
        if not onwards or not grammar.accept_tokens("sandbox", [onwards[0]]):
            break
        steps += 1
    if steps and (time.process_time() - began) / steps > SLOWEST_STEP:
        raise ValueError("it takes too long to follow from token to token; make it simpler")


def _exactly(connection: socket.socket, count: int) -> bytes:
    """Receive `count` bytes; exit if the connection ends first."""
    received = b""
    while len(received) < count:
        if not (part := connection.recv(min(count - len(received), 1 << 20))):
            os._exit(0)
        received += part
    return received


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
