"""`memdec ngram`: corpus -> tokens -> a package (`memdec.decoders.ngram_package`)."""

from dataclasses import dataclass
from pathlib import Path

from memdec.decoders.build import TOKENS_ALONE, Build
from memdec.decoders.corpus import Corpus
from memdec.decoders.manifest import alone
from memdec.decoders.ngram_package import DEFAULTS, NgramOptions, NgramPackage, refuse_updated


@dataclass(frozen=True)
class NgramBuild:
    """The build of one domain's n-gram memory: its inputs, its options and its folders."""

    domain: str
    corpus: Corpus
    base: Path
    out: Path
    work: Path
    """Folder of the intermediate artifacts; may be that of a `Build` of the same corpus, whose tokens are then reused."""
    options: NgramOptions = DEFAULTS

    def run(self) -> Path:
        """Make every artifact that isn't fresh; returns the package's folder. Raises DecoderError, one line."""
        refuse_updated(self.out)
        # The checks, and the first two stages, are those of a decoder's build.
        tokens = Build(self.domain, self.corpus, self.base, self.out, self.work, TOKENS_ALONE).run("tokens")
        with alone(self.work):
            return NgramPackage(self.domain, self.corpus, self.base, self.out, self.work / "near_duplicates", self.options).write(tokens)
