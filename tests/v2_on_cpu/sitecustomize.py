"""Lets vLLM's V2 runner work on a CPU, for tests: its Triton kernels run in Triton's interpreter, behind a backend that does nothing."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import triton.backends


class Driver:
    """Active wherever it is asked."""

    @staticmethod
    def is_active() -> bool:
        """Always."""
        return True


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
