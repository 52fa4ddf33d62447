"""A correct replacement of one of vLLM's stand-ins for Triton kernels on CPUs, which speculation with sampling needs.

vLLM 0.32's own casts temperatures and top-p to whole numbers and writes the result into a copy, so that the verifier's target
distribution is whatever lay in memory.
"""

import torch
from torch import Tensor
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.sample import rejection_sampler

from memdec.server.in_place import overwrite


def expand(output: Tensor, values: Tensor, ends: Tensor, replace_from: float, replace_to: float, *_: object, **__: object) -> None:
    """Write each request's value once for each of its tokens: values [requests], ends [requests] cumulative token counts, output [tokens]."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    spread = values.repeat_interleave(counts.long(), output_size=len(output))
    output.copy_(torch.where(spread == replace_from, replace_to, spread))


def install() -> None:
    """Let vLLM's rejection sampler use `expand` from now on; call it once vLLM has put its own stand-ins in place."""
    kernel: object = rejection_sampler.expand_kernel
    if isinstance(kernel, KernelOverride):  # with a Triton for CPUs the kernel itself runs
        overwrite(kernel, "_impl", expand)
