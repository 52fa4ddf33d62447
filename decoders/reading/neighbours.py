"""From a query's neighbours to their weights: the kNN-LM's softmax over negative distances (arXiv 2508.09874, eq. 2)."""

import numpy as np

from memdec.decoders.reading.array_types import Floats

NOT_FOUND = np.float32(1e38)


def weights(distances: Floats, tau: float) -> Floats:
    """The neighbours' softmax weights, [n, k]. Neighbours that weren't found come as distances of 3.4e38 and get none."""
    found = distances < NOT_FOUND
    logits = np.where(found, distances.min(1, keepdims=True) - distances, -1e9 * tau) / tau
    result: Floats = np.exp(logits) * found
    result /= np.maximum(result.sum(1, keepdims=True), np.finfo(np.float32).tiny)
    return result
