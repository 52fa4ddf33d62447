"""What a server must answer, the slow and obvious way: Hugging Face alone, no cache, no batch."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def hugging_face(path: Path) -> PreTrainedModel:
    """A toy in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model


@torch.inference_mode()
def greedy(base: PreTrainedModel, decoder: PreTrainedModel | None, prompt: list[int], count: int) -> list[int]:
    """The mixture's most probable tokens, lambda 0.6."""
    ids = list(prompt)
    for _ in range(count):
        tokens = torch.tensor([ids])
        p = base(tokens).logits[0, -1].double().softmax(-1)
        if decoder is not None:
            logits = decoder(tokens).logits[0, -1].double()
            p = 0.4 * p
            p[: len(logits)] += 0.6 * logits.softmax(-1)
        ids.append(int(p.argmax()))
    return ids[len(prompt) :]
