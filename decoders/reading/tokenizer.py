"""Load tokenizers, and check that a base and its decoders share one token -> id map."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memdec.decoders.reading.errors import PackageError, TokenizerMismatch
from memdec.decoders.reading.files import read_bytes

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")
MOST = 128 << 20  # bytes of the copied files, four times the largest known tokenizers
END_OF_TEXT = "<|endoftext|>"
TRUST = "MEMDEC_TRUST_REMOTE_CODE"  # environment variable, so that child processes inherit it; "1" after --trust-remote-code


def trusted() -> bool:
    """Whether code that comes with a model may run. Always passed to transformers, which would otherwise prompt on the terminal."""
    return os.environ.get(TRUST) == "1"


def load_tokenizer(folder: Path | str, name: Path | str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, which messages call `name`, or hub id. Raises PackageError if there is none."""
    name = name or folder
    if Path(folder).is_dir() and not any((Path(folder) / file).is_file() for file in FILES):
        raise PackageError(f"{name}: no tokenizer in it (wanted {', '.join(FILES[:-1])} or {FILES[-1]})")
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusted())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises many kinds here, and a panic of tokenizers is no Exception
        raise PackageError(f"{name}: no usable tokenizer ({first_line(error).replace(str(folder), str(name))[:300]})") from None
    return loaded


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a document: END_OF_TEXT where the tokenizer has it, since a chat model's own end token ends a turn.

    Raises PackageError if the tokenizer has no such token.
    """
    end: int | None = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if end is None:
        raise PackageError(f"{tokenizer.name_or_path}: its tokenizer has no end-of-text token, which separates documents")
    return end


def load_copied(folder: Path, within: Sequence[Path] = ()) -> PreTrainedTokenizerBase:
    """Load a tokenizer from an untrusted folder, by way of a copy of its files: transformers opens whatever is there, and would block on a pipe.

    `within`: every file, symbolic links resolved, must lie in one of these folders; if empty, anywhere. Raises PackageError.
    """
    left = MOST
    with tempfile.TemporaryDirectory(prefix="memdec-") as copy:
        for file in sorted(f for pattern in COPIED + (("*.py",) if trusted() else ()) for f in folder.glob(pattern)):
            data = read_bytes(file, left, within)
            left -= len(data)
            (Path(copy) / file.name).write_bytes(data)
        return load_tokenizer(copy, folder)


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
