"""kNN-LM: next-token probabilities from the neighbours of a hidden state (Khandelwal et al., arXiv 1911.00172; paper, eq. 2)."""

import numpy as np
import torch
from torch import Tensor

from memdec.decoders.reading.neighbours import weights
from memdec.decoders.reading.retrieval import RetrievalPackage


class KnnMemory:
    """One domain's datastore, open, with its tuned k and tau."""

    def __init__(self, package: RetrievalPackage) -> None:
        self.package, self.store = package, package.datastore()

    def search(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Values and weights of each key's neighbours: keys [n, width] -> tokens [n, k] int64, weights [n, k] float32, rows summing to 1."""
        queries = keys.float().cpu().numpy()
        distances, neighbours = self.store.search(queries, min(self.package.neighbours, len(self.store.values)), self.package.probed)
        tokens = np.asarray(self.store.values[np.maximum(neighbours, 0)], np.int64)
        return torch.from_numpy(tokens).to(keys.device), torch.from_numpy(weights(distances, self.package.tau)).to(keys.device)


def log_probabilities(tokens: Tensor, weights: Tensor, vocabulary: int) -> Tensor:
    """Dense log p_kNN [n, vocabulary] float32 from neighbours' tokens and weights [n, k]; -inf for tokens that no neighbour has."""
    dense = torch.zeros(len(tokens), vocabulary, dtype=torch.float32, device=weights.device)
    return dense.scatter_add_(1, tokens, weights).log_()
