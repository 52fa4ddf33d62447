"""Stage 8: a decoder package: an ordinary Hugging Face folder plus `memory_decoder.json`; writing, reading and checking it.

This module is what the server needs of training: it imports neither torch models nor faiss.
"""

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdec.decoders import parallel
from memdec.decoders.errors import PackageError
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.tokenizer import load_tokenizer, token_map_hash

NAME = "memory_decoder.json"
CARD = "README.md"
DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a domain's name: safe in a header, a model alias and a metric label
DOMAIN_RULE = "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
FORMAT = 1
DEFAULT_LAMBDA = 0.6  # the paper's v1, table 7: best or near it for most models
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
    revision: str
    """Fingerprint of config and weights."""
    domain: str | None
    """Name given in training; None for a plain checkpoint."""
    lam: float
    """Tuned lambda for the base it is opened beside, or the default."""
    tuned: bool
    """Whether `lam` was tuned on that base."""
    perplexity: dict[str, Any]
    """Measured test perplexities beside that base; empty if never measured."""
    tokenizer: str | None
    """Hash of the token -> id map it was trained with."""

    @classmethod
    def open(cls, path: Path, base: Path | None = None) -> "Package":
        """Read and check a package or a plain checkpoint. Raises PackageError, one line, if it can't be served."""
        config = read_json(path / "config.json")
        check_architecture(path, config)
        check_weights(path)
        record = read_record(path)
        measured = record.get("bases", {}).get(fingerprint_model(base), {}) if base is not None else {}
        lam = measured.get("lambda", record.get("lambda", DEFAULT_LAMBDA))
        if not is_lambda(lam):
            raise PackageError(f"{path / NAME}: lambda is {lam!r}, wanted a number from 0 to 1")
        return cls(
            path, config, fingerprint_model(path), record.get("domain"), float(lam), "lambda" in measured, measured, record.get("token_map")
        )

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(p.stat().st_size for p in self.path.glob("*.safetensors"))


def is_lambda(value: object) -> bool:
    """Whether a value is a usable lambda: a finite number in [0, 1], booleans not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises PackageError naming the file."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise PackageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise PackageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise PackageError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value


def read_record(path: Path) -> dict[str, Any]:
    """`memory_decoder.json`, or {} for a plain checkpoint. Raises PackageError on another format."""
    if not (path / NAME).is_file():
        return {}
    record = read_json(path / NAME)
    bases = record.get("bases", {})
    if not isinstance(bases, dict) or not all(isinstance(found, dict) for found in bases.values()):
        raise PackageError(f"{path / NAME}: bases is {bases!r}, wanted an object of objects")
    if record.get("format") != FORMAT:
        raise PackageError(f"{path / NAME}: format is {record.get('format')!r}, this version reads {FORMAT}")
    return record


def check_architecture(path: Path, config: dict[str, Any]) -> None:
    """Raise PackageError unless config.json names exactly one architecture."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise PackageError(f"{path / 'config.json'}: architectures is {names!r}, wanted a list with one name")


def check_weights(path: Path) -> None:
    """Raise PackageError if safetensors files are missing or shorter or longer than their headers say."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise PackageError(f"{path}: no .safetensors file in it (only safetensors are loaded)")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(wanted - {f.name for f in files})
        if missing:
            raise PackageError(f"{path}: {missing[0]} is missing, named in {index.name}")
    for file in files:
        expected, actual = expected_bytes(file), file.stat().st_size
        if expected != actual:
            raise PackageError(f"{file}: {actual:,} bytes, its header says {expected:,}; truncated or damaged, copy it again")


def safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the parsed header. Raises PackageError."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > 100_000_000:
            raise PackageError(f"{file}: not a safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise PackageError(f"{file}: its header is damaged; truncated or not a safetensors file") from None
    if not isinstance(header, dict):
        raise PackageError(f"{file}: its header is damaged; truncated or not a safetensors file")
    return 8 + length, header


def expected_bytes(file: Path) -> int:
    """Size that a safetensors file must have according to its header."""
    start, header = safetensors_header(file)
    return start + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def fingerprint_model(path: Path) -> str:
    """Fingerprint of a model folder: its config, and sizes and samples of its weights.

    Weights are sampled (64 KiB at 16 places a file), so that it costs milliseconds for tens of gigabytes; every retraining
    moves all weights, so samples tell revisions apart.
    """
    digest = hashlib.sha256()
    if (path / "config.json").is_file():
        digest.update((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for i in range(16):
                stream.seek(size * i // 16)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:16]


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
        (folder / NAME).write_text(json.dumps(record, indent=1) + "\n")
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
