"""One engine of `make bench`, in a process of its own: reads batches as JSON lines, answers each with what it took.

The first line says what to be: {"kind": "vllm", ...} as memdec.server.launch.offline.OfflineEngine's arguments, or {"kind": "reference",
"base", "decoder"}: two Hugging Face models in turn, as the reference implementation does it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Ask = Callable[..., dict[str, Any]]


def main() -> None:
    """Serve until the input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ask: Ask | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if ask is None:
            kinds: dict[str, Callable[..., Ask]] = {"vllm": vllm, "reference": reference}
            ask = kinds[job.pop("kind")](**job)
            answer: dict[str, Any] = {"ready": True}
        else:
            answer = ask(**job)
        print(json.dumps(answer), file=answers, flush=True)


def vllm(**arguments: Any) -> Ask:
    """vLLM, plain or with decoders."""
    from memdec.server.launch.offline import OfflineEngine

    engine = OfflineEngine(**arguments)

    def ask(**job: Any) -> dict[str, Any]:
        before, parts_before = engine.drafts(), engine.parts()
        timed = engine.ask(**job)
        after, parts_after = engine.drafts(), engine.parts()
        accepted = [b - a for a, b in zip(before[1] or [0] * len(after[1]), after[1], strict=True)]
        return {
            "seconds": timed.seconds,
            "first": timed.first,
            "tokens": timed.tokens,
            "drafts": after[0] - before[0],
            "accepted": accepted,
            "parts": {part: parts_after[part] - parts_before[part] for part in parts_after},
        }

    return ask


def reference(base: str, decoder: str) -> Ask:
    """Both models at every token, each with its own cache, mixed and chosen greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    from memdec.server.model.mixing import mix

    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for path in (base, decoder)]

    @torch.inference_mode()
    def ask(prompts: list[list[int]], lams: list[float], tokens: int, **_: Any) -> dict[str, Any]:
        started = time.perf_counter()
        lam, ids = torch.tensor(lams), torch.tensor(prompts)
        caches: list[Any] = [None, None]
        made, first = [], 0.0
        for _step in range(tokens):
            outputs = [model(ids, past_key_values=cache, use_cache=True) for model, cache in zip(models, caches, strict=True)]
            caches = [output.past_key_values for output in outputs]
            ids = mix(outputs[0].logits[:, -1], outputs[1].logits[:, -1], lam).argmax(-1, keepdim=True)
            made.append(ids)
            first = first or time.perf_counter() - started
        return {
            "seconds": time.perf_counter() - started,
            "first": first,
            "tokens": torch.cat(made, 1).tolist(),
            "drafts": 0,
            "accepted": [],
        }

    return ask


if __name__ == "__main__":
    main()
