"""A kNN-LM datastore, open for search: keys, values and a faiss index (`memdec.decoders.datastore` says what they are, and makes them)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from memdec.decoders.reading.array_types import Floats, Ids, Keys, Numbers

PROBED = 8  # index cells a query visits
REFINED = 4  # candidates that are re-ranked, as a multiple of k
CHUNK = 100_000  # keys converted to float32 at a time


@dataclass(frozen=True)
class Datastore:
    """An open datastore: keys [entries, width] float16, values [entries], and an index over the keys."""

    keys: Keys
    values: Ids
    index: faiss.Index

    @classmethod
    def open(cls, folder: Path) -> "Datastore":
        """Open a datastore folder: memory-map the arrays, load the index, and copy the keys into memory for exact distances."""
        keys = np.load(folder / "keys.npy", mmap_mode="r")
        index = faiss.read_index(str(folder / "index.faiss")) if (folder / "index.faiss").is_file() else None
        return cls(keys, np.load(folder / "values.npy", mmap_mode="r"), with_exact_distances(index, keys))

    def search(self, queries: Floats, neighbours: int, probed: int = PROBED) -> tuple[Floats, Numbers]:
        """Find the nearest entries of queries [n, width]: exact squared distances and entry numbers, both [n, neighbours], nearest first.

        `probed`: index cells visited per query.
        """
        parameters: dict[str, Any] = {}
        if isinstance(self.index, faiss.IndexRefine):
            library: Any = faiss  # its stubs lack the parameters' keywords
            inner = library.SearchParametersIVF(nprobe=probed)
            parameters["params"] = library.IndexRefineSearchParameters(k_factor=REFINED, base_index_params=inner)
        distances, numbers = self.index.search(queries, neighbours, **parameters)
        return distances, numbers


def with_exact_distances(index: faiss.Index | None, keys: Keys) -> faiss.Index:
    """An index that re-ranks the candidates of `index` by their distances to the float16 keys; without `index`, an exhaustive one."""
    exact = faiss.IndexScalarQuantizer(keys.shape[1], faiss.ScalarQuantizer.QT_fp16)
    for start in range(0, len(keys), CHUNK):
        exact.add(np.asarray(keys[start : start + CHUNK], np.float32))
    if index is None:
        return exact
    return faiss.IndexRefine(index, exact)  # keeps references to both
