"""All decoders as one tower that picks weights on the device: the way a step can be a CUDA graph, followed here without one."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offline import Row, composite, run
from reference import FLOAT32, MIX, worst
from tools import needs
from vllm.compilation import cuda_graph

from memdec.server.model.composite import MemoryDecoderForCausalLM
from memdec.server.model.stacked import FEW, NONE, Blocks
from memdec.server.worker import v1

pytestmark = pytest.mark.engine
TRITON = Path(sys.prefix) / "triton"


@pytest.mark.parametrize("seed", range(40))
def test_blocks_hold_every_token_once_beside_its_own_kind(seed: int) -> None:
    """Few tokens and many, slots that nobody has, slots of datastores."""
    random = torch.Generator().manual_seed(seed)
    tokens, decoders, size = (int(torch.randint(low, high, (), generator=random)) for low, high in ((1, 80), (1, 7), (1, 3)))
    size *= 16
    slots = torch.randint(0, decoders + 3, (tokens,), generator=random)
    blocks = Blocks.of(slots, decoders, size)
    assert blocks.experts.tolist() == [slot - 1 if 0 < slot <= decoders else NONE for slot in slots.tolist()]
    if blocks.order is None:
        assert tokens <= FEW
        assert blocks.owners.tolist() == blocks.experts.tolist()
        return
    used = int(blocks.used)
    owners = blocks.owners.repeat_interleave(size)[:used]
    placed = [(token, int(owner)) for token, owner in zip(blocks.order[:used].tolist(), owners, strict=True) if token < tokens]
    assert sorted(placed) == list(enumerate(blocks.experts.tolist()))
    assert (blocks.order[used:] == tokens).all()


KERNEL = """
import torch
from memdec.server.model.stacked import Blocks, block_size, by_row, multiply
from vllm.triton_utils import HAS_TRITON
assert HAS_TRITON
for tokens in (1, 4, 5, 40):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2**-9)):
        x, weights, bias = torch.randn(tokens, 48).to(dtype), torch.randn(3, 72, 48).to(dtype), torch.randn(3, 72).to(dtype)
        blocks = Blocks.of(torch.randint(0, 5, (tokens,)), 3, block_size(tokens, 3))
        for added in (None, bias):
            got, wanted = multiply(x, weights, added, blocks), by_row(x.float(), weights.float(), added if added is None else added.float(), blocks)
            torch.testing.assert_close(got.float(), wanted, rtol=bound, atol=4 * bound)
"""


@needs("triton", "make install-dev puts it there", found=str(TRITON) if TRITON.exists() else None)
def test_the_kernel_multiplies_as_the_reference_does() -> None:
    """vLLM's kernel, in Triton's interpreter (which can't multiply bfloat16); rows without a decoder are zeros."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root / "tests" / "v2_on_cpu", TRITON, root)))
    done = subprocess.run([sys.executable, "-c", KERNEL], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_prompt_and_generated_logprobs_of_a_mixed_batch(toys: Path, tmp_path: Path) -> None:
    """All domains, none and every lambda, prompts in chunks, in one batch: GPT-2's kinds of layers."""
    result = run(tmp_path, toys, "gpt", MIX, sampling={"prompt_logprobs": 1}, changed={"stacked": True})
    assert worst(toys, "gpt", MIX, result["rounds"][0]) <= FLOAT32


def test_one_graph_serves_every_routing(toys: Path, tmp_path: Path) -> None:
    """What runs at the first batch of a size, run again as it was for others': other domains in other places, and requests that come and go.

    One of the decoders is loaded when the engine runs.
    """
    mix: Sequence[Row] = [(prompt, domain, lam) for prompt, domain, lam, *_ in MIX if len(prompt) > 40] * 2
    first = composite(toys, "qwen", {}).decoders[:1]
    result = run(
        tmp_path, toys, "qwen", mix, rounds=2, sampling={"max_tokens": 16}, max_num_seqs=4,
        changed={"stacked": True, "decoders": first, "slots": 2}, traced=True, later={"b": toys / "qwen_b"},
    )  # fmt: skip
    for records in result["rounds"]:
        assert worst(toys, "qwen", mix, records) <= FLOAT32
    shapes, replays = result["replays"]["stacked"]
    assert replays > 5 * shapes


def test_base_and_memories_are_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM wraps as a whole is unwrapped, and its parts are wrapped instead."""

    class Wrapper:
        def __init__(self, part: Any, *_: Any) -> None:
            self.part = part

        def unwrap(self) -> Any:
            return self.part

    class Runner:
        def load_model(self) -> None:
            self.model = Wrapper(composite)

    class Routed(v1.RoutesSteps, Runner):
        def __init__(self) -> None:
            self.vllm_config = None  # type: ignore[assignment]

    composite: Any = SimpleNamespace(base="base", stacked="stacked", graphs={})
    composite.wrap = lambda wrapped: MemoryDecoderForCausalLM.wrap(composite, wrapped)
    monkeypatch.setattr(v1, "CUDAGraphWrapper", Wrapper)
    runner: Any = Routed()
    runner.load_model()
    assert runner.model is composite
    assert {name: graph.part for name, graph in composite.graphs.items()} == {"base": "base", "stacked": "stacked"}
    assert cuda_graph.CUDAGraphOptions(weak_ref_output=False).weak_ref_output is False
