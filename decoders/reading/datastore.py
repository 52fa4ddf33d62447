"""A kNN-LM datastore, open for search: keys, values and a faiss index (`memdec.decoders.datastore` says what they are, and makes them)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from memdec.decoders.reading.array_types import Floats, Ids, Keys, Numbers

PROBED = 8  # index cells a query visits
REFINED = 4  # candidates ranked again, as a multiple of k
CHUNK = 100_000  # keys in memory as float32 at a time


@dataclass(frozen=True)
class Datastore:
    """An open datastore: keys [entries, width] float16, values [entries], and an index over the keys."""

    keys: Keys
    values: Ids
    index: faiss.Index

    @classmethod
    def open(cls, folder: Path) -> "Datastore":
        """Memory-map the arrays, load the index and give it the keys to rank by."""
        keys = np.load(folder / "keys.npy", mmap_mode="r")
        index = faiss.read_index(str(folder / "index.faiss")) if (folder / "index.faiss").is_file() else None
        return cls(keys, np.load(folder / "values.npy", mmap_mode="r"), with_exact_distances(index, keys))

    def search(self, queries: Floats, neighbours: int, probed: int = PROBED) -> tuple[Floats, Numbers]:
        """Exact squared distances and entry numbers of the nearest entries, both [queries, neighbours], nearest first."""
        parameters: dict[str, Any] = {}
        if isinstance(self.index, faiss.IndexRefine):
            library: Any = faiss  # its stubs lack the parameters' keywords
            inner = library.SearchParametersIVF(nprobe=probed)
            parameters["params"] = library.IndexRefineSearchParameters(k_factor=REFINED, base_index_params=inner)
        distances, found = self.index.search(queries, neighbours, **parameters)
        return distances, found


def with_exact_distances(index: faiss.Index | None, keys: Keys) -> faiss.Index:
    """An index that ranks `index`'s candidates, or all entries if there is none, by their distances to the float16 keys."""
    exact = faiss.IndexScalarQuantizer(keys.shape[1], faiss.ScalarQuantizer.QT_fp16)
    for start in range(0, len(keys), CHUNK):
        exact.add(np.asarray(keys[start : start + CHUNK], np.float32))
    if index is None:
        return exact
    return faiss.IndexRefine(index, exact)  # which keeps both alive
