"""The tokenizer that a base and its decoders share, and the check that they really do."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from tokenizers import models as token_models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from memdec.decoders.errors import PackageError, TokenizerMismatch

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TRUST = "MEMDEC_TRUST_REMOTE_CODE"  # in the environment, so that child processes know: "1" if the user has asked to run code that comes with models
END_OF_TEXT = "<|endoftext|>"
CHAT_MARKS = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `vocabulary` ids in all, `<|endoftext|>` first."""
    bpe = Tokenizer(token_models.BPE())
    # Digits are split one by one: long numbers would otherwise eat a small vocabulary.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = token_decoders.ByteLevel()
    special = [END_OF_TEXT, *CHAT_MARKS]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE
    )


def trusted() -> bool:
    """Whether code that comes with a model may be run. Transformers, if not told, asks whoever is at the terminal."""
    return os.environ.get(TRUST) == "1"


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder or hub id. Raises PackageError if there is none."""
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in FILES):
        raise PackageError(f"{folder}: no tokenizer in it (wanted {', '.join(FILES[:-1])} or {FILES[-1]})")
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusted())
    except Exception as error:  # transformers raises many kinds here
        raise PackageError(f"{folder}: no usable tokenizer ({first_line(error)})") from None
    return loaded


def token_map_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the whole token -> id map. Equal vocabulary sizes don't mean equal maps."""
    ordered = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(ordered.encode()).hexdigest()[:16]


def require_same_token_map(base: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str) -> None:
    """Raise TokenizerMismatch naming the first token, by id, that the two map differently."""
    ours, theirs = base.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    differing = sorted(
        {(ours.get(t, theirs.get(t)), t) for t in ours.keys() ^ theirs.keys()} | {(i, t) for t, i in ours.items() if theirs.get(t, i) != i}
    )
    _, token = differing[0]
    raise TokenizerMismatch(
        f"{name}: its tokenizer differs from the base's in {len(differing)} of {len(ours)} tokens; "
        f"the first is {token!r}: id {ours.get(token, 'none')} in the base, {theirs.get(token, 'none')} in the other"
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
