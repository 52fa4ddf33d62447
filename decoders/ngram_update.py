"""Adds documents to an n-gram memory and removes documents from it, which a trained decoder can't do.

Added documents become a further shard. Removed ones are cut out of their shard's text and suffix array: what is left gives exactly the counts
of a memory that never saw them. Discounts are estimated anew; order and lambda stay as they were tuned.

The package is replaced as a whole by a renamed folder: a server that has the old one open goes on with that.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from memdec.decoders.manifest import stage
from memdec.decoders.ngram_package import CARD, model_card
from memdec.decoders.reading.errors import CorpusError, OptionError
from memdec.decoders.reading.ngram import NgramMemory, read_documents
from memdec.decoders.reading.ngram_folder import documents_in, tokenize, vocabulary_of
from memdec.decoders.reading.ngram_index import Vocabulary, add_shard, write_documents, write_record
from memdec.decoders.reading.ngram_record import DOCUMENTS, LONGEST_ORDER, NAME
from memdec.decoders.reading.ngram_shard import Shard, write_arrays
from memdec.decoders.reading.record import BesideRecord

Change = Callable[[NgramMemory, Path, Vocabulary], None]
"""Writes the new package's shards; arguments: the open package, the new folder, the vocabulary."""


def append(out: Path, domain: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Add all documents of a folder of text to the package `out` of `domain`. Raises DecoderError, one line, and leaves the package as it was."""
    own = vocabulary_of(tokenizer)

    def add(memory: NgramMemory, made: Path, vocabulary: Vocabulary) -> None:
        if own != vocabulary:
            raise OptionError(f"--base: its tokenizer has token map {own.token_map}, {out} was made with {memory.tokenizer}")
        known = {name for shard in memory.shards for name in read_documents(shard.folder / DOCUMENTS)}
        for number, shard in enumerate(memory.shards):
            _link(shard.folder, made / f"shard-{number}")
        for number, text in enumerate(tokenize(documents_in(folder), tokenizer), len(memory.shards)):
            if twice := sorted(known.intersection(text.names)):
                raise CorpusError(f"--corpus {folder}: {twice[0]} is in {out} already, one of {len(twice):,} such; --remove it first")
            add_shard(made, number, text, vocabulary)

    return _update(out, domain, f"added {folder.resolve().name}", add)


def remove(out: Path, domain: str, names: Sequence[str]) -> Path:
    """Remove documents from the package `out` of `domain` by their ids. Raises DecoderError, one line, and leaves the package as it was."""

    def cut(memory: NgramMemory, made: Path, vocabulary: Vocabulary) -> None:
        documents = [read_documents(shard.folder / DOCUMENTS) for shard in memory.shards]
        if missing := sorted(set(names).difference(*documents)):
            raise OptionError(f"--remove {missing[0]}: {out} has no document of this id; the first it has is {documents[0][0]}")
        gone = [np.isin(np.array(own), list(names)) for own in documents]
        if all(removed.all() for removed in gone):
            raise OptionError(f"--remove: no document would be left in {out}; delete the folder instead")
        left = [i for i, removed in enumerate(gone) if not removed.all()]
        for number, i in enumerate(left):
            _cut(memory.shards[i], documents[i], gone[i], made / f"shard-{number}", vocabulary)

    return _update(out, domain, f"removed {len(set(names))} documents", cut)


def _cut(shard: Shard, documents: list[str], removed: NDArray[np.bool_], place: Path, vocabulary: Vocabulary) -> None:
    """Write a shard without the documents that are `removed` [documents]."""
    if not removed.any():
        _link(shard.folder, place)
        return
    lengths = np.diff(shard.ends, prepend=0)
    kept = np.repeat(~removed, lengths)
    moved = np.cumsum(kept) - 1  # where each kept token is in the shorter text
    suffixes = moved[shard.suffixes[kept[shard.suffixes]]]
    place.mkdir()
    write_arrays(place, shard.ids[kept], suffixes, np.cumsum(lengths[~removed]), vocabulary.end, vocabulary.size, LONGEST_ORDER)
    write_documents(place, [name for name, out in zip(documents, removed, strict=True) if not out])


def _update(out: Path, domain: str, what: str, change: Change) -> Path:
    """Replace a package by a changed one."""
    memory = NgramMemory.open(out)
    record = memory.record
    if record.domain != domain:
        raise OptionError(f"NAME {domain!r}: {out} is of {record.domain!r}")
    vocabulary = Vocabulary(record.vocabulary, record.token_map, record.end)
    with stage(out, {"before": memory.revision, "update": what}) as made:
        if made is None:
            return out
        for leftover in made.glob("shard-*"):  # of a killed run
            shutil.rmtree(leftover)
        change(memory, made, vocabulary)
        training = {**record.training, "updates": [*record.training.get("updates", []), what]}
        training.setdefault("measured before updates", record.perplexity)
        write_record(
            made, record.domain, vocabulary, order=record.order, **{"lambda": record.lam}, weights=record.weights, tuned=record.tuned, sources=record.sources,
            base=record.base, training=training, beside=[unmeasured(one) for one in record.beside],
        )  # fmt: skip
        (made / CARD).write_text(model_card(json.loads((made / NAME).read_text())))
    return out


def unmeasured(beside: BesideRecord) -> dict[str, Any]:
    """What is kept of a decoder's entry when the text changes: shares stay as they were fitted, as lambda does."""
    return beside.model_dump(mode="json", by_alias=True, exclude={"perplexity"})


def _link(source: Path, target: Path) -> None:
    """The same files in another folder, as hard links where the file system has them."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy(file, target / file.name)
