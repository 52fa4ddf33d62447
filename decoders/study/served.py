"""Log-probabilities of the held-out tokens from a running server, by `echo` and `logprobs` on /v1/completions."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np

from memdec.decoders.perplexity import SCORED, WINDOW
from memdec.decoders.reading.errors import DecoderError
from memdec.decoders.study.scores import Heldout
from memdec.decoders.train import progress


class ServerError(DecoderError):
    """The server given by `--server` doesn't answer, or gives an answer that can't be used."""


def served_logprobs(url: str, part: Heldout, base: Path, domain: str, lam: float) -> dict[str, Any] | None:
    """Log p(token) of the scored tokens under base and domain, as the server's prompt log-probabilities.

    Returns {"base": [n], "decoder": [n], "kept": bool [windows * SCORED]}; the last two tokens of a window are left out: one is generated,
    and one follows it. Returns None if the server's base has another name than `base`.
    """
    try:
        with httpx.Client(base_url=url, timeout=300) as http:
            card = http.get("/v1/models").raise_for_status().json()["data"][0]
            if card["id"] != base.resolve().name:
                return None
            served: dict[str, list[float]] = {"base": [], "decoder": []}
            with progress(f"served {domain}", 2 * len(part.starts), " windows") as bar:
                for start in part.starts:
                    prompt = [int(t) for t in part.ids[start : start + WINDOW - 1]]
                    for method, choice in (("base", {}), ("decoder", {"domain": domain, "lambda": lam})):
                        body = {
                            "model": card["id"],
                            "prompt": prompt,
                            "max_tokens": 1,
                            "temperature": 0,
                            "logprobs": 0,
                            "echo": True,
                            **choice,
                        }
                        answer = http.post("/v1/completions", json=body)
                        if answer.is_error:
                            raise ServerError(f"--server {url}: {answer.json()['error']['message']}")
                        logprobs = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
                        served[method] += logprobs[WINDOW - SCORED + 1 :][: SCORED - 2]
                        bar.update(1)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise ServerError(f"--server {url}: no answer that can be used ({type(error).__name__}: {error})") from None
    kept = np.tile(np.arange(SCORED) < SCORED - 2, len(part.starts))
    return {"kept": kept, **{method: np.array(values) for method, values in served.items()}}
