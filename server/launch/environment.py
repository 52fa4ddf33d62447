"""Defaults that vLLM, and the engine's process, read from the environment."""

import os
from collections.abc import Collection

import torch

SPINS = "1000"  # of a waiting thread before it sleeps: some ten microseconds
SEVERAL = ("--tensor", "--pipeline", "--data-parallel", "-tp", "-pp", "-dp")


def set_environment(words: Collection[str]) -> None:
    """Defaults that vLLM reads from the environment when it is imported; what the user has set stays."""
    os.environ["MEMDEC_SERVING"] = "1"  # tells memdec.server.worker.plugin, in child processes, that memdec started them
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # routing reaches the step through the V1 runner
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "16")  # answers whose tokens are published in one go; others wait
    wait_briefly()
    if small_cpu() and any(word.startswith(SEVERAL) for word in words):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM would give each worker a NUMA node, or cores, of its own
    elif small_cpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # asks for the worker inside the engine's process
    if "--enforce-eager" in words:
        # One sampler helper has a torch.compile decorator of its own, and would build C++ at the first request with logprobs.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def wait_briefly() -> None:
    """Have OpenMP's threads, in the engine's process, spin for a moment and then sleep while they wait for each other; what the user has set stays.

    A step has hundreds of short parallel regions. By default a thread that waits for the next one spins for milliseconds: on a machine that
    has something else to do, spinning uses up its share of the cores, and where it is needed it isn't scheduled, while the others spin for it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # GNU's runtime, which comes with torch
        os.environ["KMP_BLOCKTIME"] = "0"  # Intel's, where it is preloaded: milliseconds


def small_cpu() -> bool:
    """Whether this is a machine of few cores, where binding a worker process to cores of its own costs more than it brings."""
    return not torch.cuda.is_available() and (os.cpu_count() or 1) <= 4
