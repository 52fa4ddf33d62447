"""Indexes a folder of text as an n-gram memory when a server starts, without measuring it beside a base.

Kept in a cache, by a hash of the text and of the tokenizer. Every document is remembered: nothing is held out, so order and lambda are defaults;
the discounts are the text's own. Answers may name its documents where a request asks for sources: the folder is its owner's.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memdec.decoders.reading.documents import KINDS, Document, documents_of, files_in
from memdec.decoders.reading.errors import CorpusError, ManifestError, PackageError
from memdec.decoders.reading.names import DOMAIN, DOMAIN_RULE
from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.ngram_index import Text, Vocabulary, write_memory
from memdec.decoders.reading.ngram_record import FORMAT, NAME
from memdec.decoders.reading.tokenizer import end_of_document, token_map_hash

Row = NDArray[np.uint32]
BATCH = 64  # documents per tokenizer call
ORDER = 8
LAMBDAS = [0.05, 0.15, 0.25, 0.3, 0.4, 0.45, 0.5]  # for a longest match of 1, 2, … tokens: about the best on held-out contracts
SHARD_TOKENS = 1 << 26  # at most in a shard, unless one document has more: building it takes about 100 bytes of memory a token, 6.5 GB


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The vocabulary that an n-gram memory of this tokenizer has. Raises PackageError if it has no token for a document's end."""
    return Vocabulary(max(tokenizer.get_vocab().values()) + 1, token_map_hash(tokenizer), end_of_document(tokenizer))


def documents_in(folder: Path) -> Iterator[Document]:
    """Yield all documents of a folder. Raises CorpusError if there is no such folder, or nothing in it that can be read."""
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder")
    paths = files_in(folder)
    if not paths:
        raise CorpusError(f"{folder}: no file in it that can be read (wanted {', '.join(KINDS)} files)")
    for path in paths:
        yield from documents_of(folder, path)


def text_hash(documents: Iterable[Document]) -> str:
    """Hash of documents' ids and texts, in their order."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            digest.update(hashlib.sha256(part.encode("utf-8", "surrogateescape")).digest())
    return digest.hexdigest()[:16]


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    """Yield documents as shards of at most SHARD_TOKENS tokens, special tokens spelled out in them as ordinary text. Shows its progress.

    Raises CorpusError if there is no document.
    """
    iterator, size, empty, end = iter(documents), 0, True, vocabulary_of(tokenizer).end
    rows: list[Row] = []
    names: list[str] = []
    with tqdm(desc="tokens", unit=" documents") as bar:
        while batch := list(islice(iterator, BATCH)):
            for document, row in zip(batch, _encoded(batch, tokenizer, end), strict=True):
                if size + len(row) > SHARD_TOKENS and size:
                    yield _joined(rows, names)
                    rows, names, size = [], [], 0
                rows.append(row)
                names.append(document.name)
                size, empty = size + len(row), False
            bar.update(len(batch))
    if empty:
        raise CorpusError("no document with text in it; wanted some")
    yield _joined(rows, names)


def _encoded(batch: list[Document], tokenizer: PreTrainedTokenizerBase, end: int) -> list[Row]:
    encoded = tokenizer([document.text for document in batch], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [np.array([*row, end], np.uint32) for row in encoded]


def _joined(rows: list[Row], names: list[str]) -> Text:
    return Text(np.concatenate(rows), np.cumsum([len(row) for row in rows], dtype=np.int64), names)


def index_folder(folder: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, name: str | None = None, sources: bool = True) -> Path:
    """Index a folder of text for `tokenizer`; returns the package's folder, in `cache`. Equal text was indexed before: it is reused.

    `name`: the domain's, or the folder's. `sources`: answers may name the documents. Raises DecoderError, one line; leaves nothing half-made.
    """
    name = name or folder.resolve().name
    if not DOMAIN.fullmatch(name):
        raise PackageError(f"{folder}: {name!r} is no name for a domain: wanted {DOMAIN_RULE}")
    vocabulary = vocabulary_of(tokenizer)
    suffix = "-sources" if sources else ""
    out = cache / f"{name}-{text_hash(documents_in(folder))}-{vocabulary.token_map}-{FORMAT}{suffix}"
    if (out / NAME).is_file():
        return out
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache, ignore_cleanup_errors=True) as partial:
            written = Path(partial) / "made"
            record = write_memory(
                written, name, tokenize(documents_in(folder), tokenizer), vocabulary, sources=sources, order=ORDER, **by_length(LAMBDAS)
            )
            _put(written, out)
            _warn_of_little(folder, record.tokens)
    except OSError as error:
        raise ManifestError(f"{error.filename or cache}: {error.strerror or error}; nothing was kept of the index of {folder}") from None
    except CorpusError as error:
        raise CorpusError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from None
    return out


def _warn_of_little(folder: Path, tokens: int) -> None:
    """Print one line if a text is shorter than the order: its memory has shorter contexts only."""
    if tokens < ORDER:
        print(
            f"memdec: warning: {folder}: has {tokens} tokens of text, fewer than the order, {ORDER}; add text", file=sys.stderr, flush=True
        )


def by_length(lambdas: Sequence[float]) -> dict[str, Any]:
    """The record's keys for a lambda by length of match: the largest, and each as a share of it."""
    most = max(lambdas)
    return {"lambda": most, "weights": [round(own / most, 4) if most else 1.0 for own in lambdas]}


def _put(made: Path, out: Path) -> None:
    """Rename a package into place, unless another process was faster. Raises OSError."""
    try:
        made.rename(out)
    except OSError:
        if not (out / NAME).is_file():
            shutil.rmtree(out, ignore_errors=True)
            made.rename(out)


def open_or_index(path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, name: str) -> NgramMemory:
    """Open a package, or index a folder of text and open that: what `--ngram NAME=PATH` takes. Raises DecoderError, one line.

    A package made for another tokenizer is refused, and one of an index that was damaged in the cache is made again.
    """
    if (path / NAME).is_file():
        memory = NgramMemory.open(path)
        if memory.tokenizer != (own := token_map_hash(tokenizer)):
            raise PackageError(f"{path}: made for another tokenizer (token map {memory.tokenizer}; the base has {own})")
        return memory
    made = index_folder(path, tokenizer, cache, name)
    try:
        return NgramMemory.open(made)
    except PackageError:
        shutil.rmtree(made, ignore_errors=True)
        return NgramMemory.open(index_folder(path, tokenizer, cache, name))
