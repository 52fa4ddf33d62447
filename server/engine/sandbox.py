"""A process that compiles grammars before the engine sees them, in children with bounds: nothing else ends a compile that runs away.

vLLM converts and compiles a client's grammar in the event loop of the front end and in a thread of the engine, in native code that no exception
reaches. Here the same code runs first, in a child of this process for each grammar. The kernel ends the child when its processor time, its
memory or its time is spent, and as soon as nobody waits for it. (A bound on a compile in vLLM's own backends would replace all of this.)
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
from typing import Any

import numpy as np

PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] /\S+:\d+: ")  # when, and at which line of its own source, xgrammar found the fault
SECONDS = 1.0  # of processor time for a grammar: to parse, to compile, and to follow for a while
WALL_SECONDS = 20.0  # however busy the machine
MEMORY = 512 << 20  # bytes beyond what the process has
STEPS = 64  # tokens that a grammar is followed for
SLOWEST_STEP = 0.005  # seconds of processor time for a token, on average: every request waits for it, in every step
BRIEF = 0.1  # seconds after which a compile gives way to everything else
NICE = 10  # a tenth of what others get: an honest grammar still ends in time where they leave nothing
PR_SET_PDEATHSIG = 1  # of Linux's prctl
READY = b"."
DEADLY = (signal.SIGPROF, signal.SIGALRM, signal.SIGIO, signal.SIGTERM)


class Sandbox:
    """The asking side: where grammars are sent to be compiled."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control

    @classmethod
    def fork(cls) -> "Sandbox":
        """Split off this process, which costs nothing. For a launcher that has no threads yet but those of libraries that mind forks (BLAS)."""
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

    def equip(self, vllm_config: Any) -> None:
        """Tell it the tokenizer and the backend: the first message."""
        config = pickle.dumps(vllm_config)
        self.control.sendall(len(config).to_bytes(8, "big") + config)

    def ask(self) -> socket.socket:
        """A connection to a new child: it reads a grammar to the end of what is sent, says READY, and answers, unless it is ended before.

        Closing the connection ends the child. Raises OSError if there is no sandbox any more.
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
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing stays behind a server that was killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever asks decides when this ends
    config = _exactly(control, int.from_bytes(_exactly(control, 8), "big"))
    manager = _manager(pickle.loads(config))  # noqa: S301  # from the process that started this one
    born: dict[int, float] = {}
    while True:
        if select.select([control], [], [], BRIEF / 2 if born else None)[0]:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            with socket.socket(fileno=descriptors[0]) as connection:
                if (child := os.fork()) == 0:
                    _answer(connection, manager)
                born[child] = time.monotonic()
        _tend(born)


def _tend(born: dict[int, float]) -> None:
    """Bury the dead; let those who take long give way."""
    while born and (child := os.waitpid(-1, os.WNOHANG)[0]):
        del born[child]
    for child, began in born.items():
        if time.monotonic() - began > BRIEF:
            for thread in Path(f"/proc/{child}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(thread.name), NICE)


def _manager(vllm_config: Any) -> Any:
    """vLLM's manager of grammars as the engine has it, with its backend, but compiling where it is asked to."""
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


def _validate(params: Any, manager: Any) -> None:
    config = manager.vllm_config
    params._validate_structured_outputs(config.model_config, config.structured_outputs_config, manager.tokenizer)


def _answer(connection: socket.socket, manager: Any) -> None:
    """A child's life."""
    try:
        connection.setblocking(True)
        asked = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        _bound(connection)
        connection.sendall(READY)
        connection.sendall(json.dumps(_checked(json.loads(asked), manager)).encode())
    except (OSError, MemoryError):
        pass  # nobody waits any more, or too much was asked for: who is silent has not passed
    finally:
        os._exit(0)


def _bound(connection: socket.socket) -> None:
    """Have the kernel end this process when what it may use is used up, or when nobody waits for it."""
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
    if any(event & select.POLLHUP for _, event in poll.poll(0)):  # it had closed before
        os._exit(0)


def _checked(fields: dict[str, Any], manager: Any) -> dict[str, Any]:
    """What became of a grammar: `fields` as the engine wants them, or why it is `refused`; and the `seconds` of processor time it took."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.request import StructuredOutputRequest

    params = SamplingParams(structured_outputs=StructuredOutputsParams(**fields))
    began = time.process_time()
    try:
        _validate(params, manager)
        passed = asdict(params.structured_outputs)  # type: ignore[arg-type]
        request: Any = SimpleNamespace(
            request_id="sandbox", sampling_params=params, structured_output_request=StructuredOutputRequest(params.structured_outputs)  # type: ignore[arg-type]
        )  # fmt: skip
        request.structured_output_request.grammar = manager._create_grammar(request)
        _follow(request.structured_output_request.grammar, manager)
    except Exception as error:  # whatever a backend raises of a client's grammar, it is about that grammar
        return {"refused": PLACE.sub("", str(error)).strip() or type(error).__name__, "seconds": time.process_time() - began}
    passed = {name: value for name, value in passed.items() if not name.startswith("_")}
    return {"fields": passed, "seconds": time.process_time() - began}


def _follow(grammar: Any, manager: Any) -> None:
    """Walk through a compiled grammar by random tokens. Raises ValueError if it allows none at first, or is slow to follow."""
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
    received = b""
    while len(received) < count:
        if not (part := connection.recv(min(count - len(received), 1 << 20))):
            os._exit(0)
        received += part
    return received


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
