"""`memdec retrieval`: corpus -> tokens -> the base's own keys -> tuned -> a folder to serve (see memdec.decoders.reading.retrieval)."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from memdec.decoders import parallel
from memdec.decoders.build import TOKENS_ALONE, Build
from memdec.decoders.build_options import LEAST_ENTRIES
from memdec.decoders.corpus import Corpus
from memdec.decoders.datastore import PIECE, spread, write_datastore, write_index
from memdec.decoders.knn_lm import Tuned, tune
from memdec.decoders.manifest import INPUTS, Manifest, alone, fingerprint, read_manifest, stage
from memdec.decoders.models import load_model
from memdec.decoders.perplexity import perplexity, score, scored, windows
from memdec.decoders.reading.datastore import Datastore
from memdec.decoders.reading.errors import OptionError
from memdec.decoders.reading.passages import Passages, RagOptions
from memdec.decoders.reading.retrieval import FORMAT, INDEX, KEY, NAME, VALUES, describe
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.reading.weights import fingerprint_model
from memdec.decoders.tokens import load_tokens

NEIGHBOURS = (16, 64, 256, 1024)
PROBED = (8, 16, 64)
TOLERATED = 0.005  # nats per token that visiting fewer index cells may cost


@dataclass(frozen=True)
class RetrievalOptions:
    """Options of `memdec retrieval`; the field names are the flags."""

    entries: int = field(default=1_000_000, metadata={"help": "datastore entries at most, in whole pieces of 4,096 tokens"})
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
class RetrievalBuild:
    """The build of one domain's retrieval folder: its inputs, its options and its folders."""

    domain: str
    corpus: Corpus
    base: Path
    out: Path
    work: Path
    """Folder of the intermediate artifacts; may be that of a `Build` of the same corpus, whose tokens are then reused."""
    options: RetrievalOptions = RetrievalOptions()

    def run(self) -> Path:
        """Make every artifact that isn't fresh; returns the retrieval folder. Raises DecoderError, one line."""
        # The checks, and the first two stages, are those of a decoder's build.
        tokens = Build(self.domain, self.corpus, self.base, self.out, self.work, TOKENS_ALONE).run("tokens")
        with alone(self.work):
            made_from = fingerprint(read_manifest(tokens)["inputs"])
            inputs: Manifest = {"tokens": made_from, "base": fingerprint_model(self.base), "entries": self.options.entries, "pieces": PIECE}
            store = write_datastore(self.work / "own_keys", tokens, self.base, self.options.entries, inputs)
            return self._write(store, tokens, {"store": fingerprint(inputs), "domain": self.domain, **asdict(self.options)})

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
            files = {str(f.relative_to(folder)): describe(f) for f in sorted(folder.rglob("*")) if f.is_file() and f.name != INPUTS}
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
    """Tune the kNN-LM beside the base on at most `most` validation windows.

    Returns the tuned kNN-LM, the fewest index cells whose loss is within TOLERATED of the best, and the validation perplexities.
    """
    valid = load_tokens(tokens, "valid")
    starts = windows(len(valid), most)
    logprobs, queries = score(load_model(base), valid, "tuning", starts, keys=True)
    labels = np.asarray(valid)[scored(starts)]
    tuned: dict[int, Tuned] = {}
    for probed in PROBED:
        distances, numbers = store.search(queries, min(max(NEIGHBOURS), len(store.values)), probed)
        tuned[probed] = tune(distances, store.values[numbers] == labels[:, None], np.exp(logprobs), NEIGHBOURS)
    lowest = min(t.perplexity for t in tuned.values())
    probed = next(p for p, t in tuned.items() if np.log(t.perplexity / lowest) <= TOLERATED)
    return tuned[probed], probed, {"base": round(perplexity(logprobs), 3), "knn": tuned[probed].perplexity}
