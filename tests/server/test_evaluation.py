"""A text's perplexity through the server, in the request shape of lm_eval's `local-completions`, equals the offline one."""

import math
import sysconfig
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Server
from transformers import AutoTokenizer

from memdec.decoders.models import load_model
from memdec.decoders.perplexity import WINDOW, label_logprobs, mix, perplexity, windows
from memdec.decoders.study.scores import Heldout
from memdec.decoders.study.served import ServerError, served_logprobs

pytestmark = pytest.mark.engine


def through_the_server(http: httpx.Client, ids: list[int], model: str) -> list[float]:
    """Log-probabilities of the second half of every window, one request a window."""
    scored: list[float] = []
    for start in windows(len(ids)):
        window = ids[start : start + WINDOW]
        context = WINDOW // 2 + 1  # lm_eval scores what follows the context
        body = {"model": model, "prompt": [window[:-1]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
        answer = http.post("/v1/completions", json=body).json()
        logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
        scored += logprobs[context:-1]
    return scored


@pytest.mark.parametrize(("model", "lam"), [("base", 0.0), ("base:a", 0.6)])
def test_perplexity_equals_the_offline_one(model: str, lam: float, http: httpx.Client, toys: Path) -> None:
    """To 0.1 %, for the base and for a mixture chosen by alias."""
    tokenizer = AutoTokenizer.from_pretrained(toys / "base")
    ids = tokenizer((Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()[:9000])["input_ids"]
    served = through_the_server(http, ids, model)
    array = np.array(ids, np.uint16)
    base, memory = (label_logprobs(load_model(toys / name), array, name) for name in ("base", "qwen_a"))
    # Offline each window also scores the token after it, and the one it generates: no room for them here.
    kept = np.arange(len(base)) % (WINDOW // 2) < WINDOW // 2 - 2
    offline = perplexity(mix(base, memory, lam)[kept])
    assert len(served) == kept.sum()
    assert math.exp(-np.mean(served)) == pytest.approx(offline, rel=1e-3)


def test_memdec_evaluate_through_the_server(server: Server, toys: Path) -> None:
    """Base and mixture, token by token; another base is left out, a server that isn't there is one line."""
    tokenizer = AutoTokenizer.from_pretrained(toys / "base")
    ids = np.array(tokenizer((Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()[:9000])["input_ids"], np.uint16)
    part = Heldout(ids, windows(len(ids), 2))
    served = served_logprobs(server.url, part, toys / "base", "a", 0.3)
    assert served is not None
    base, memory = (label_logprobs(load_model(toys / name), ids, name, part.starts) for name in ("base", "qwen_a"))
    np.testing.assert_allclose(served["base"], base[served["kept"]], atol=2e-3)
    np.testing.assert_allclose(served["decoder"], mix(base, memory, 0.3)[served["kept"]], atol=2e-3)
    assert served_logprobs(server.url, part, toys / "qwen_a", "a", 0.3) is None
    with pytest.raises(ServerError, match="no answer that can be used"):
        served_logprobs("http://127.0.0.1:9", part, toys / "base", "a", 0.3)
    with pytest.raises(ServerError, match="nowhere"):
        served_logprobs(server.url, part, toys / "base", "nowhere", 0.3)
