"""From a query's neighbours to their weights: the kNN-LM's softmax over negative distances (arXiv 2508.09874, eq. 2)."""

import numpy as np

from memdec.decoders.reading.array_types import Floats

NOT_FOUND = np.float32(1e38)  # distances from here on stand for missing neighbours


def weights(distances: Floats, tau: float) -> Floats:
    """Softmax of -distance / tau over the neighbours [n, k]. faiss fills missing neighbours with distance 3.4e38; their weight is 0."""
    reached = distances < NOT_FOUND
    logits = np.where(reached, distances.min(1, keepdims=True) - distances, -1e9 * tau) / tau
    result: Floats = np.exp(logits) * reached
    result /= np.maximum(result.sum(1, keepdims=True), np.finfo(np.float32).tiny)
    return result
