"""The head that training uses against the model's own logits, over many architectures made tiny."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memdec.decoders.head import Head
from memdec.decoders.loss import sparse_cross_entropy
from memdec.decoders.reading.errors import PackageError

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"rotary_pct": 0.5},
    "granite": {"logits_scaling": 7.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.0625},
    "phi": {},
    "mistral": {},
    "stablelm": {},
    "olmo2": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64},
    "gemma": {"head_dim": 8},
}


def tiny(kind: str, **options: Any) -> PreTrainedModel:
    """A model of some architecture with random weights, large enough for logits of some size; a bias too, where there is one."""
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **SPECIAL, **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5) if parameter.ndim == 2 else torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_own(kind: str) -> None:
    """From final hidden states, within roundings; and so is the loss."""
    model = tiny(kind, **KINDS[kind])
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head, wanted = Head.of(model), model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        assert (head.logits(hidden) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        labels = ids.reshape(-1, 1)
        loss = sparse_cross_entropy(*head.operands(hidden, torch.float32), labels, torch.ones(labels.shape))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(wanted.float(), labels[:, 0]), rtol=1e-4, atol=1e-5)


def test_a_scaled_and_shifted_head_is_trained() -> None:
    """Gradients of the fused loss through scale and bias, against autograd's own."""
    torch.manual_seed(0)
    weight, bias = torch.randn(11, 5, requires_grad=True), torch.randn(11, requires_grad=True)
    hidden, labels = torch.randn(7, 5, requires_grad=True), torch.randint(0, 11, (7,))
    found = torch.autograd.grad(
        sparse_cross_entropy(*Head(weight, bias, 0.3).operands(hidden, torch.float32), labels[:, None], torch.ones(7, 1)),
        (weight, bias, hidden),
    )
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(0.3 * hidden @ weight.T + bias, labels), (weight, bias, hidden))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_soft_cap_is_refused_by_name() -> None:
    """What is no linear function of the hidden state can't be computed so."""
    with pytest.raises(PackageError, match="Gemma2ForCausalLM: its logits are no linear function"):
        Head.of(tiny("gemma2", head_dim=8))
