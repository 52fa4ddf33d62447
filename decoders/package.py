"""Stage 8: a decoder package: an ordinary Hugging Face folder plus `memory_decoder.json`; writing, reading and checking it.

This module is what the server needs of training: it imports neither torch models nor faiss.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memdec.decoders import parallel
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import MOST_JSON, parse_json, read_bytes, read_json, shown
from memdec.decoders.reading.names import RECORD
from memdec.decoders.reading.record import FORMAT, Config, Record, checked
from memdec.decoders.reading.tokenizer import load_tokenizer, token_map_hash
from memdec.decoders.reading.weights import CONFIG, Scanned, check_weights, fingerprint_model, revision_of, scan

CARD = "README.md"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.jinja",
)


@dataclass(frozen=True)
class Package:
    """What a server needs to know of one decoder folder, checked."""

    path: Path
    config: dict[str, Any]
    """The folder's config.json."""
    record: Record
    """Its memory_decoder.json; what a plain checkpoint lacks is at its default."""
    weights: Scanned
    """Hashes and size of its weights, all of whose bytes were read."""
    revision: str
    """Hash of config and weights."""
    lam: float
    """Tuned lambda for the base it is opened beside, or the default."""
    tuned: bool = False
    """Whether `lam` was tuned on that base."""
    perplexity: dict[str, Any] = field(default_factory=dict)
    """Measured test perplexities beside that base; empty if never measured."""

    @classmethod
    def open(cls, path: Path, base: Path | None = None) -> "Package":
        """Read and check a package or a plain checkpoint. Raises PackageError, one line, if it can't be served."""
        found = cls.read(path)
        return found if base is None else found.beside(lambda: fingerprint_model(base))

    @classmethod
    def read(cls, path: Path, within: Sequence[Path] = (), most: int | None = None) -> "Package":
        """The same without a base.

        `within`: folders of which one must hold each of its files, symbolic links followed; empty: anywhere. `most`: bytes its weights may have.
        """
        data = read_bytes(path / CONFIG, MOST_JSON, within)
        config = parse_json(data, path / CONFIG)
        checked(Config, config, path / CONFIG)
        record = read_record(path, within) or Record()
        check_weights(path, within, most)
        weights = scan(path, within)
        return cls(path, config, record, weights, revision_of(data, weights.digests), record.lam)

    def beside(self, base: Callable[[], str]) -> "Package":
        """The same with what was measured beside a base, whose revision is asked for only if anything was measured."""
        figures = self.record.bases.get(base()) if self.record.bases else None
        if figures is None:
            return self
        lam = self.lam if figures.lam is None else figures.lam
        return replace(self, lam=lam, tuned=figures.lam is not None, perplexity=figures.to_json())

    @property
    def domain(self) -> str | None:
        """Name given in training; None for a plain checkpoint."""
        return self.record.domain

    @property
    def tokenizer(self) -> str | None:
        """Hash of the token -> id map it was trained with."""
        return self.record.token_map

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return self.weights.size


def read_record(path: Path, within: Sequence[Path] = ()) -> Record | None:
    """`memory_decoder.json`, or None for a plain checkpoint. Raises PackageError."""
    if not os.path.lexists(path / RECORD):
        return None
    found = read_json(path / RECORD, within)
    if found.get("format") != FORMAT:
        raise PackageError(f"{path / RECORD}: format is {shown(found.get('format'))}, this version reads {FORMAT}")
    return checked(Record, found, path / RECORD)


def share(folder: Path) -> None:
    """Let everybody read a model: safetensors creates its files for the owner alone."""
    for file in folder.iterdir():
        file.chmod(0o644)


def write_package(out: Path, decoder: Path, domain: str, bases: dict[str, Any], training: dict[str, Any], manifest: Manifest) -> Path:
    """Copy a trained decoder into a package for `domain`.

    `bases`: fingerprint of a base -> the figures measured beside it, lambda among them; the first is the one it was built for.
    """
    with stage(out, manifest) as folder:
        if folder is None or parallel.rank() != 0:
            return out
        for pattern in MODEL_FILES:
            for file in decoder.glob(pattern):
                shutil.copy(file, folder / file.name)
        record = {
            "format": FORMAT,
            "domain": domain,
            "lambda": next(iter(bases.values()))["lambda"],
            "token_map": token_map_hash(load_tokenizer(decoder)),
            "bases": bases,
            "training": training,
        }
        checked(Record, record, out / RECORD)  # or no server would take it
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (folder / CARD).write_text(model_card(record))
        share(folder)
    return out


def model_card(record: dict[str, Any]) -> str:
    """README.md of a package: what it is, how to serve it, what was measured, what it was made from."""
    domain, training = record["domain"], record["training"]
    corpus = training["corpus"]
    first = next(iter(record["bases"].values()))["name"]
    rows = [
        f"| {b['name']} | {b['lambda']} | {b['base']} | {b['memory']} | **{b['mixture']}** | {b['tokens']:,} |"
        for b in record["bases"].values()
    ]
    made = [f"| {name} | {value} |" for name, value in {**training["options"], **training.get("tuned", {})}.items()]
    return "\n".join(
        [
            "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [memory-decoder]", "license: other", f"license_name: {json.dumps(corpus['licence'])}", "---", "",
            f"# {domain}: a memory decoder", "",
            "A small language model trained to imitate a kNN-LM retriever over one corpus ([arXiv 2508.09874](https://arxiv.org/abs/2508.09874)).",
            f"It is meant to run beside a base model with the same tokenizer (token map `{record['token_map']}`): p = λ·p_memory + (1 − λ)·p_base.", "",
            "```sh", f"memdec serve PATH/TO/{first} --decoder {domain}=.", "```", "",
            "## Measured", "",
            "Perplexity on the corpus's test split: windows of 512 tokens spread evenly, the second half of each scored; λ tuned on the validation split.", "",
            "| base | λ | base alone | memory alone | mixture | scored tokens |", "|---|---|---|---|---|---|", *rows, "",
            "## Made from", "",
            f"Corpus `{corpus['name']}` (fingerprint `{corpus['fingerprint']}`), licence of its text: {corpus['licence']}.", "",
            "| option | value |", "|---|---|", *made, "",
        ]
    )  # fmt: skip
