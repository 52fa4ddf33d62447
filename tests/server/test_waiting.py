"""How the engine's threads wait for each other: on a machine with something else to do, spinning threads made a domain's token take ten times its time."""

import os
from pathlib import Path

import pytest
from conftest import Server

from memdec.server.launch.environment import SPINS, wait_briefly

pytestmark = pytest.mark.engine

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of the variables by which OpenMP's runtimes are told."""
    for name in NAMES:
        with monkeypatch.context() as patch:
            for other in NAMES:
                patch.delenv(other, raising=False)
            patch.setenv(name, "7")
            wait_briefly()
            assert {n: os.environ[n] for n in NAMES if n in os.environ} == {name: "7"}


def test_the_engines_threads_soon_sleep(server: Server) -> None:
    """Its environment says so when it starts, which is when the runtime reads it."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (engine,) = [Path("/proc") / pid for pid in children if b"VLLM" in (Path("/proc") / pid / "cmdline").read_bytes()]
    told = dict(line.split(b"=", 1) for line in (engine / "environ").read_bytes().split(b"\0") if b"=" in line)
    assert told[b"GOMP_SPINCOUNT"] == SPINS.encode() and told[b"KMP_BLOCKTIME"] == b"0"
