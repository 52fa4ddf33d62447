"""Entry point `vllm.general_plugins`: runs once in each process of vLLM, and again without harm."""

import ctypes
import multiprocessing
import os
import signal
import sys

from vllm import ModelRegistry

from memdec.server.composite_spec import ARCHITECTURE

SERVING = "MEMDEC_SERVING"  # set by `memdec serve` for its child processes
PR_SET_PDEATHSIG = 1


def register() -> None:
    """Register the composite by name (vLLM imports it only in the worker), and tie a server's child processes to its life."""
    ModelRegistry.register_model(ARCHITECTURE, "memdec.server.worker.registered:MemoryDecoderForCausalLM")
    if os.environ.get(SERVING) and multiprocessing.parent_process() is not None:
        end_with_parent()


def end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone: after a SIGKILL of the server its engine would stay, holding memory."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
