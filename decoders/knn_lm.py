"""The kNN-LM: next-token probabilities from neighbours, and the tuning of tau, k and lambda on held-out text.

    p_kNN(y) is proportional to the sum over neighbours i with v_i = y of exp(-d_i / tau)      (arXiv 2508.09874, eq. 2)

d is the squared L2 distance.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.decoders.reading.array_types import Floats, Ids
from memdec.decoders.reading.neighbours import weights

TAUS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LAMBDAS = tuple(round(0.05 * i, 2) for i in range(20))  # with 0, so that a harmful retriever is switched off


@dataclass(frozen=True)
class Tuned:
    """The kNN-LM with the lowest validation perplexity."""

    neighbours: int
    """k."""
    tau: float
    lam: float
    """Weight of p_kNN beside the language model."""
    perplexity: float
    tried: tuple[dict[str, float], ...]
    """Every (k, tau) with its best lambda and perplexity."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, to be stored as JSON."""
        return asdict(self)

    def logprobs(self, distances: Floats, hits: NDArray[np.bool_], base: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-probabilities of the label tokens under this kNN-LM, [n]; arguments as in `tune`."""
        return _mixed(label_probability(distances, hits, self.neighbours, self.tau), base, self.lam)


def _mixed(knn: NDArray[np.float64], base: NDArray[np.float64], lam: float) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.log(np.maximum(lam * knn + (1 - lam) * base, 1e-30))
    return result


def label_probability(distances: Floats, hits: NDArray[np.bool_], neighbours: int, tau: float) -> NDArray[np.float64]:
    """p_kNN of the label tokens, [n], from the first `neighbours` of rows [n, k] sorted by distance.

    `hits` [n, k]: whether a neighbour's value is the label.
    """
    part = weights(distances[:, :neighbours], tau)
    result: NDArray[np.float64] = (part * hits[:, :neighbours]).sum(1).astype(np.float64)
    return result


def tune(distances: Floats, hits: NDArray[np.bool_], base: NDArray[np.float64], choices: tuple[int, ...]) -> Tuned:
    """Find the k of `choices`, tau and lambda with the lowest perplexity.

    `distances` [n, k] are sorted; `hits` [n, k]: whether a neighbour's value is the label; `base` [n]: the language model's probability of it.
    """
    tried = []
    for neighbours in sorted({min(k, distances.shape[1]) for k in choices}):
        for tau in TAUS:
            p_knn = label_probability(distances, hits, neighbours, tau)
            nats = {lam: float(-_mixed(p_knn, base, lam).mean()) for lam in LAMBDAS}
            lam = min(nats, key=nats.__getitem__)
            tried.append({"neighbours": neighbours, "tau": tau, "lambda": lam, "perplexity": round(float(np.exp(nats[lam])), 3)})
    best = min(tried, key=lambda row: row["perplexity"])
    return Tuned(int(best["neighbours"]), best["tau"], best["lambda"], best["perplexity"], tuple(tried))


def token_masses(distances: Floats, tokens: Ids, tau: float) -> tuple[Ids, Floats]:
    """p_kNN (eq. 2) as sparse rows: token ids and probabilities, both [n, k]; padding has probability 0."""
    return add_up(tokens, weights(distances, tau))


def add_up(tokens: Ids, masses: Floats) -> tuple[Ids, Floats]:
    """Merge repeated tokens in each row [n, k], adding their masses; the row is padded at the end with token 0 and mass 0."""
    order = np.argsort(tokens, 1, kind="stable")
    ordered, mass = np.take_along_axis(tokens, order, 1), np.take_along_axis(masses, order, 1)
    group = np.zeros(ordered.shape, np.int64)
    np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, out=group[:, 1:])
    rows = np.arange(len(ordered))[:, None]
    summed, ids = np.zeros(ordered.shape, np.float32), np.zeros(ordered.shape, ordered.dtype)
    np.add.at(summed, (np.broadcast_to(rows, group.shape), group), mass)
    ids[rows, group] = ordered
    return ids, summed
