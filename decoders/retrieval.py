"""The retrieval baselines as one folder to serve: a kNN-LM datastore of the base's own keys, tuned, and BM25 passages of the same text.

    retrieval.json    what it is, for which base, and every file's size and hash
    index.faiss       keys and index in one file, memory-mapped
    values.npy        the token after each key, [entries]
    passages.npy      the training text in passages, [passages, length]
    bm25/             the index over their words

The keys are the base's final normed hidden states, those of `decoders.datastore`, but of the base as it is: at inference
they come with the base's own pass. (The datastore that a decoder imitates has the keys of a teacher tuned on the domain, a whole further model.)
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from decoders import parallel
from decoders.corpus import Corpus
from decoders.datastore import PIECE, Datastore, spread, write_datastore, write_index
from decoders.errors import OptionError, PackageError
from decoders.evaluate import perplexity, score, scored, windows
from decoders.knn_lm import Tuned, tune
from decoders.manifest import Manifest, alone, fingerprint, refuse_foreign, stage
from decoders.models import load_model
from decoders.near_duplicates import Cleaned, write_near_duplicates
from decoders.package import DOMAIN, DOMAIN_RULE, check_weights, fingerprint_model, is_lambda, read_json
from decoders.passages import Passages, RagOptions
from decoders.tokenizer import load_tokenizer, token_map_hash
from decoders.tokens import load_tokens, write_tokens

NAME = "retrieval.json"
FORMAT = 1
KEY = "final hidden state of the base"
INDEX, VALUES = "index.faiss", "values.npy"
NEIGHBOURS = (16, 64, 256, 1024)
PROBED = (8, 16, 64)
LEAST_ENTRIES = 2_000
TOLERATED = 0.005  # nats that visiting fewer index cells may cost
HASHED = 16 << 30  # bytes a server reads through at start, a second a gigabyte; of larger files only the size is checked


@dataclass(frozen=True)
class RetrievalOptions:
    """What a retrieval folder is made of. The field names are the flags."""

    entries: int = field(default=1_000_000, metadata={"help": "datastore entries at most"})
    passage: int = field(default=128, metadata={"help": "tokens of a passage"})
    query: int = field(default=32, metadata={"help": "how many of the prompt's last tokens look for passages"})
    valid_windows: int = field(
        default=32, metadata={"help": "validation windows (256 tokens each) that tune k, tau, lambda and the cells visited"}
    )

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = LEAST_ENTRIES if name == "entries" else 1
            if value < least:
                raise OptionError(f"--{name.replace('_', '-')} {value}: wanted {least:,} or more")


@dataclass(frozen=True)
class RetrievalPackage:
    """A retrieval folder, checked."""

    path: Path
    domain: str
    entries: int
    neighbours: int
    """k."""
    tau: float
    lam: float
    """Tuned on the domain's validation text."""
    probed: int
    """Index cells a query visits."""
    rag: RagOptions
    base: str
    """Fingerprint of the base whose keys it holds."""
    files: dict[str, dict[str, Any]]
    """Every file's size and hash."""
    perplexity: dict[str, float]
    """Of the base and of the kNN-LM on the validation text."""

    def datastore(self) -> Datastore:
        """The datastore, memory-mapped: it costs no memory of its own and is there at once. Its keys are in the index alone."""
        index = faiss.read_index(str(self.path / INDEX), faiss.IO_FLAG_MMAP_IFC)
        return Datastore(np.zeros((0, index.d), np.float16), np.load(self.path / VALUES, mmap_mode="r"), index)

    @classmethod
    def read(cls, path: Path) -> "RetrievalPackage":
        """Read retrieval.json. Raises PackageError, one line."""
        if not path.is_dir():
            raise PackageError(f"{path}: no such folder")
        if not (path / NAME).is_file():
            raise PackageError(f"{path}: no {NAME} in it; make one with memdec retrieval")
        record = read_json(path / NAME)
        if record.get("format") != FORMAT:
            raise PackageError(f"{path / NAME}: format is {record.get('format')!r}, this version reads {FORMAT}")
        if record.get("key") != KEY:
            raise PackageError(f"{path}: its keys are {record.get('key')!r}, wanted {KEY!r}")
        try:
            knn, files = record["knn"], record["files"]
            found = cls(
                path, str(record["domain"]), int(record["entries"]), int(knn["neighbours"]), float(knn["tau"]), knn["lam"],
                int(knn["probed"]), RagOptions(**record["rag"]), str(record["base"]), files, dict(record["perplexity"]),
            )  # fmt: skip
            if not is_lambda(found.lam) or found.tau <= 0 or found.neighbours < 1 or found.probed < 1 or found.size < 1:
                raise ValueError(f"knn is {knn!r}, wanted lam from 0 to 1, the others above 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackageError(f"{path / NAME}: damaged ({type(error).__name__}: {error})") from None
        return found

    @classmethod
    def open(cls, path: Path, base: Path) -> "RetrievalPackage":
        """Read a folder and check it for a base. Raises PackageError, one line, if it is damaged or another base's."""
        found, own = cls.read(path), fingerprint_model(base)
        if found.base != own:
            raise PackageError(
                f"{path}: made for another base (fingerprint {found.base}; {base} has {own}); make one with memdec retrieval"
            )
        for name, expected in found.files.items():
            check_file(path / name, expected)
        return found

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(int(f["bytes"]) for f in self.files.values())

    @property
    def revision(self) -> str:
        """Fingerprint of its files."""
        return fingerprint(self.files)


@dataclass(frozen=True)
class RetrievalBuild:
    """One domain's retrieval folder: what it is made from, and where it goes."""

    domain: str
    corpus: Corpus
    base: Path
    out: Path
    work: Path
    """Text, tokens and keys; may be the work folder of a `Build` of the same corpus, whose tokens are then used."""
    options: RetrievalOptions = RetrievalOptions()

    def run(self) -> Path:
        """Make what isn't fresh; returns the folder. Raises DecoderError, one line."""
        if not DOMAIN.fullmatch(self.domain):
            raise OptionError(f"NAME {self.domain!r}: wanted {DOMAIN_RULE}")
        if not self.base.is_dir():
            raise OptionError(f"--base {self.base}: no such folder")
        check_weights(self.base)
        refuse_foreign(self.out)
        with alone(self.work):
            tokenizer = load_tokenizer(self.base)
            inputs: Manifest = {"corpus": self.corpus.fingerprint()}
            cleaned = write_near_duplicates(self.work / "near_duplicates", self.corpus, inputs)
            inputs = {"cleaned": fingerprint(inputs), "token_map": token_map_hash(tokenizer)}
            tokens = write_tokens(self.work / "tokens", Cleaned.open(self.corpus, cleaned), tokenizer, inputs)
            inputs = {"tokens": fingerprint(inputs), "base": fingerprint_model(self.base), "entries": self.options.entries, "pieces": PIECE}
            store = write_datastore(self.work / "own_keys", tokens, self.base, self.options.entries, inputs)
            inputs = {"store": fingerprint(inputs), "domain": self.domain, **asdict(self.options)}
            return self._write(store, tokens, inputs)

    def _write(self, store: Path, tokens: Path, inputs: Manifest) -> Path:
        with stage(self.out, inputs) as folder:
            if folder is None or parallel.rank() != 0:
                return self.out
            datastore = Datastore.open(store)
            write_index(datastore.index, folder / INDEX)
            np.save(folder / VALUES, datastore.values)
            rag = RagOptions(self.options.passage, self.options.query)
            text = spread(load_tokens(tokens, "train"), self.options.entries)
            Passages.build(text, load_tokenizer(self.base), rag.passage).save(folder)
            tuned, probed, figures = tune_beside_base(datastore, self.base, tokens, self.options.valid_windows)
            files = {
                str(f.relative_to(folder)): describe(f)
                for f in sorted(folder.rglob("*"))
                if f.is_file() and not f.name.startswith("inputs")
            }
            record = {
                "format": FORMAT,
                "domain": self.domain,
                "base": fingerprint_model(self.base),
                "key": KEY,
                "entries": len(datastore.values),
                "knn": {"neighbours": tuned.neighbours, "tau": tuned.tau, "lam": tuned.lam, "probed": probed},
                "rag": rag.to_dict(),
                "perplexity": figures,
                "corpus": self.corpus.name,
                "files": files,
            }
            (folder / NAME).write_text(json.dumps(record, indent=1) + "\n")
        return self.out


def tune_beside_base(store: Datastore, base: Path, tokens: Path, most: int) -> tuple[Tuned, int, dict[str, float]]:
    """k, tau and lambda with the lowest validation perplexity, and the fewest index cells that cost no more than TOLERATED."""
    valid = load_tokens(tokens, "valid")
    starts = windows(len(valid), most)
    logprobs, queries = score(load_model(base), valid, "tuning", starts, keys=True)
    labels = np.asarray(valid)[scored(starts)]
    found: dict[int, Tuned] = {}
    for probed in PROBED:
        distances, numbers = store.search(queries, min(max(NEIGHBOURS), len(store.values)), probed)
        found[probed] = tune(distances, store.values[numbers] == labels[:, None], np.exp(logprobs), NEIGHBOURS)
    lowest = min(t.perplexity for t in found.values())
    probed = next(p for p, t in found.items() if np.log(t.perplexity / lowest) <= TOLERATED)
    return found[probed], probed, {"base": round(perplexity(logprobs), 3), "knn": found[probed].perplexity}


def describe(file: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def check_file(file: Path, expected: dict[str, Any]) -> None:
    """Raise PackageError unless a file is as `describe` found it."""
    if not file.is_file():
        raise PackageError(f"{file}: missing")
    if file.stat().st_size != expected["bytes"]:
        raise PackageError(f"{file}: {file.stat().st_size:,} bytes, wanted {expected['bytes']:,}; truncated or damaged, copy it again")
    if file.stat().st_size <= HASHED and describe(file) != expected:
        raise PackageError(f"{file}: its bytes are not those that were written; damaged, copy it again")
