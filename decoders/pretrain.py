"""The base language model: a tokenizer, then a small Qwen2, from plain text alone.

Only needed when there is no base yet: `memdec build` starts from any Hugging Face folder.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from decoders.corpus import Corpus
from decoders.manifest import Manifest, fingerprint, stage
from decoders.package import share
from decoders.tokenizer import load_tokenizer, token_map_hash, train_tokenizer
from decoders.tokens import load_tokens, write_tokens
from decoders.train import Schedule, train

SAMPLE = 8_000_000  # characters of each corpus that the tokenizer sees


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
    """Whether the output projection is the embedding: smaller, at the same cost a token."""


BASE = Shape()
DECODER = Shape(hidden=256, layers=3, intermediate=608, heads=4, kv_heads=1, tied=True)


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, its vocabulary that of the tokenizer."""
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
    tokens = write_tokens(work / "tokens", corpus, tokenizer, inputs)
    inputs = {"tokens": fingerprint(inputs), "shape": asdict(shape), "schedule": schedule.to_dict()}
    with stage(out, inputs) as folder:
        if folder is not None:
            model = new_model(shape, tokenizer, schedule.seed)
            train(model, load_tokens(tokens, "train"), schedule, "base", log=folder / "training.jsonl")
            model.to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            share(folder)
    return out


def balanced(corpora: list[Corpus]) -> Iterator[str]:
    """The first SAMPLE characters of each corpus's training documents."""
    for corpus in corpora:
        taken = 0
        for document in corpus.documents("train"):
            yield document
            taken += len(document)
            if taken > SAMPLE:
                break
