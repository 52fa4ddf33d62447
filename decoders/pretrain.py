"""Train a base language model from plain text: a tokenizer, then a small Qwen2.

Only needed if there is no base yet: `memdec build` starts from any Hugging Face folder.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from memdec.decoders import parallel
from memdec.decoders.corpus import Corpus
from memdec.decoders.manifest import Manifest, fingerprint, stage
from memdec.decoders.models import load_model, save_model
from memdec.decoders.near_duplicates import Cleaned
from memdec.decoders.new_tokenizer import train_tokenizer
from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.tokenizer import load_tokenizer, token_map_hash
from memdec.decoders.reading.weights import fingerprint_model
from memdec.decoders.tokens import load_tokens, write_tokens
from memdec.decoders.train import Schedule, train

SAMPLE = 8_000_000  # characters of each corpus that the tokenizer is trained on


@dataclass(frozen=True)
class Shape:
    """Size of a Qwen2-shaped model."""

    hidden: int = 320
    """Width of the residual stream."""
    layers: int = 6
    """Number of blocks."""
    intermediate: int = 832
    """Width of the MLP."""
    heads: int = 5
    """Query heads; the head size is hidden / heads."""
    kv_heads: int = 1
    """Key and value heads."""
    positions: int = 1024
    """Longest context in tokens."""
    tied: bool = False
    """Whether the output projection shares the embedding's weights: a smaller model at the same cost per token."""


BASE = Shape()
DECODER = Shape(hidden=256, layers=3, intermediate=608, heads=4, kv_heads=1, tied=True)


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of `shape` with random weights and the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def pretrain(
    corpus: Corpus, tokenizer_corpora: list[Corpus], work: Path, out: Path, shape: Shape, schedule: Schedule, vocabulary: int
) -> Path:
    """Train a tokenizer on a balanced mix of corpora, then a base model on `corpus`; write a Hugging Face folder to `out`."""
    mix = [corpus, *tokenizer_corpora]
    texts = [c.fingerprint() for c in mix]
    inputs: Manifest = {"vocabulary": vocabulary, "corpora": texts}
    with stage(work / "tokenizer", inputs) as folder:
        if folder is not None:
            train_tokenizer(balanced(mix), vocabulary).save_pretrained(folder)
    tokenizer = load_tokenizer(work / "tokenizer")
    inputs = {"tokenizer": token_map_hash(tokenizer), "corpus": texts[0]}
    tokens = write_tokens(work / "tokens", Cleaned(corpus, frozenset()), tokenizer, inputs)
    inputs = {"tokens": fingerprint(inputs), "shape": asdict(shape), "schedule": schedule.to_dict()}
    with stage(out, inputs) as folder:
        if folder is not None:
            model = new_model(shape, tokenizer, schedule.seed)
            train(model, load_tokens(tokens, "train"), schedule, "training", folder=folder)
            if parallel.rank() == 0:
                save_model(model, folder, tokenizer, torch.bfloat16)
    return out


def grow(source: Path, corpus: Corpus, work: Path, out: Path, tokens: int) -> Path:
    """Double the layers of the model `source`, train it on `corpus`, and write a Hugging Face folder to `out`."""
    tokenizer = load_tokenizer(source)
    inputs: Manifest = {"corpus": corpus.fingerprint(), "token_map": token_map_hash(tokenizer)}
    encoded = write_tokens(work / "tokens", Cleaned(corpus, frozenset()), tokenizer, inputs)
    schedule = Schedule(tokens, batch=8, seed=1, matrix_lr=0.01, other_lr=1.5e-3, cooldown=0.7, stretched=0.05)
    inputs = {"tokens": fingerprint(inputs), "source": fingerprint_model(source), "schedule": schedule.to_dict()}
    with stage(out, inputs) as folder:
        if folder is not None:
            model = doubled(load_model(source))
            train(model, load_tokens(encoded, "train"), schedule, "training", folder=folder)
            if parallel.rank() == 0:
                save_model(model, folder, tokenizer, torch.bfloat16)
    return out


def doubled(small: PreTrainedModel) -> PreTrainedModel:
    """A model with a new layer after each layer of `small`; before training it computes the same function.

    A new layer is a copy of the one before it, with zeros as output projections, so that it adds nothing to the residual stream.
    Raises PackageError for architectures whose layers have other names.
    """
    layers = small.config.num_hidden_layers
    config = AutoConfig.for_model(**{k: v for k, v in small.config.to_dict().items() if k not in ("layer_types", "max_window_layers")})
    config.num_hidden_layers = 2 * layers
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for kind in small.config.layer_types for _ in range(2)]
    state = {}
    for name, value in small.state_dict().items():
        before, in_a_layer, after = name.partition(".layers.")
        if not in_a_layer:
            state[name] = value
            continue
        number, _, leaf = after.partition(".")
        state[f"{before}.layers.{2 * int(number)}.{leaf}"] = value
        ends = leaf.startswith(("self_attn.o_proj.", "mlp.down_proj."))
        state[f"{before}.layers.{2 * int(number) + 1}.{leaf}"] = torch.zeros_like(value) if ends else value.clone()
    large: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    try:
        large.load_state_dict(state)
    except RuntimeError:
        raise PackageError(f"--grow: layers of {small.config.model_type} models can't be doubled; wanted a Llama or Qwen kind") from None
    return large.to(small.device)


def balanced(corpora: list[Corpus]) -> Iterator[str]:
    """The first SAMPLE characters of each corpus's training documents."""
    for corpus in corpora:
        taken = 0
        for document in corpus.documents("train"):
            yield document
            taken += len(document)
            if taken > SAMPLE:
                break
