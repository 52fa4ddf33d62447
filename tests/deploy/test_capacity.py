"""The capacity formula of docs/deploy.md: its own code, beside what vLLM allocates."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, Server
from transformers import GPT2Config, Qwen2Config

pytestmark = pytest.mark.engine

PAGE = (ROOT / "docs" / "deploy.md").read_text()


@pytest.fixture(scope="module")
def kv_bytes_per_token() -> Callable[..., int]:
    """The page's function."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Callable[..., int]] = {}
    exec(code, names)
    return names["kv_bytes_per_token"]


def test_vllm_allocates_what_the_formula_says(kv_bytes_per_token: Callable[..., int], server: Server, toys: Path) -> None:
    """A token of the toy server takes base and one decoder, though it has two; the rest is less than a block."""
    a_token = kv_bytes_per_token(str(toys / "base"), 4) + kv_bytes_per_token(str(toys / "qwen_a"), 4)
    page = httpx.get(f"{server.url}/metrics").text
    (labels,) = re.findall(r"^vllm:cache_config_info{(.*)}", page, re.MULTILINE)
    cache = dict(re.findall(r'(\w+)="(.*?)"', labels))
    blocks, size = int(cache["num_gpu_blocks"]), int(cache["block_size"])
    assert blocks == int(cache["kv_cache_memory_bytes"]) // (a_token * size)
    assert int(cache["kv_cache_size_tokens"]) == blocks * size


def test_the_pages_figures(kv_bytes_per_token: Callable[..., int], tmp_path: Path) -> None:
    """The table's, from the shapes that it names; and a model without grouped heads."""
    base = Qwen2Config(num_hidden_layers=28, num_key_value_heads=4, num_attention_heads=28, hidden_size=3584)
    decoder = Qwen2Config(num_hidden_layers=24, num_key_value_heads=2, num_attention_heads=14, hidden_size=896)
    found = []
    for name, config in (("base", base), ("decoder", decoder), ("gpt", GPT2Config())):
        config.save_pretrained(tmp_path / name)
        found.append(kv_bytes_per_token(str(tmp_path / name)))
    assert found[2] == 2 * 12 * 768 * 2
    assert re.findall(r"\| ([\d,]+) B \|", PAGE) == [f"{n:,}" for n in (found[0], found[1], found[0] + found[1])]
    for decoders, left in ((10, 43.8), (40, 13.8)):
        free = 80e9 * 0.9 - 15.2e9 - 3e9 - decoders * 1.0e9
        tokens = free / (found[0] + found[1])
        text = f"{decoders} decoders leave {left} GB, {round(tokens, -3):,.0f} tokens, {int(tokens / 8192)} requests"
        assert text in PAGE
