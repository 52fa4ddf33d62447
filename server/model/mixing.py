"""p = lambda * p_mem + (1 - lambda) * p_base, on logits (Memory Decoder, arXiv 2508.09874, eq. 7): p_mem dense, or a sparse part and the base.

And the two together: p = (1 - lambda_d - lambda_n) * p_base + lambda_d * p_mem + lambda_n * p_ngram.
"""

import torch
from torch import Tensor

from memdec.server.retrieval.ngram import SparseRows


def mix(base_logits: Tensor, memory_logits: Tensor, lam: Tensor) -> Tensor:
    """Logits whose softmax is the mixture, float32 [rows, V].

    base_logits [rows, V]; memory_logits [rows, Vm], where V and Vm may differ by padding: only ids that both have are mixed, p_mem
    being normalised over those. lam [rows] float32 in (0, 1]. The base's logsumexp is added back: softmax is unchanged by it, but
    repetition and presence penalties see values of a logit's usual size.
    """
    mixed = base_logits.float().log_softmax(-1)
    likeliest = mixed.argmax(-1, keepdim=True)
    norm = base_logits.gather(1, likeliest).float() - mixed.gather(1, likeliest)  # a logsumexp would cost as much again
    shared = min(base_logits.shape[-1], memory_logits.shape[-1])
    memory = memory_logits[:, :shared].float().log_softmax(-1).add_(lam.log()[:, None])
    mixed.add_(torch.log1p(-lam)[:, None])  # lambda 1 gives log 0 = -inf, which logaddexp takes
    torch.logaddexp(mixed[:, :shared], memory, out=mixed[:, :shared])
    return mixed.add_(norm)


def mix_sparse(base_logits: Tensor, rows: Tensor, tokens: Tensor, probabilities: Tensor, base_mass: Tensor, lam: Tensor) -> Tensor:
    """Logits whose softmax is (1 - lambda) * p_base + lambda * (s + r * p_base), float32 [n, V]; a row with r = 1 is the base's, bit for bit.

    base_logits [n, V]. The sparse parts s of all rows, one entry after the other: rows [m] int64, tokens [m] int64 below V, probabilities
    [m] float32, no token twice in a row. base_mass [n] is r, lam [n] float32 in (0, 1]. The base's logsumexp stays, as in `mix`.
    """
    base = base_logits.float()
    norm = base.logsumexp(-1)
    mixed = base + _log_left(lam, base_mass)[:, None]  # 0 is added where r is 1
    added = probabilities.log() + (lam.log() + norm)[rows]
    mixed[rows, tokens] = torch.logaddexp(mixed[rows, tokens], added)
    return mixed


def mix_both(base_logits: Tensor, memory_logits: Tensor, found: SparseRows, lam: Tensor, share: Tensor) -> Tensor:
    """Logits whose softmax is (1 - lambda * (1 + d)) * p_base + lambda * (d * p_mem + s + r * p_base), float32 [n, V], d being the decoder's share.

    base_logits [n, V], memory_logits [n, Vm], lam [n] float32 as in `mix`. `found` has s and r of the n-gram memory with its share of
    lambda as weight, so 1 - r is no more than that share. share [n] float64 is d; the shares add up to 1 at most.
    """
    mixed = base_logits.float().log_softmax(-1)
    likeliest = mixed.argmax(-1, keepdim=True)
    norm = base_logits.gather(1, likeliest).float() - mixed.gather(1, likeliest)
    mixed.add_(_log_left(lam, found.base_mass - share)[:, None])
    shared = min(base_logits.shape[-1], memory_logits.shape[-1])
    memory = memory_logits[:, :shared].float().log_softmax(-1).add_((lam * share).log().float()[:, None])
    torch.logaddexp(mixed[:, :shared], memory, out=mixed[:, :shared])
    at = found.rows, found.tokens
    mixed[at] = torch.logaddexp(mixed[at], found.probabilities.log() + lam.log()[found.rows])
    return mixed.add_(norm)


def _log_left(lam: Tensor, mass: Tensor) -> Tensor:
    """log(1 - lambda * (1 - mass)) [n] float32: what the base is weighted with. In float64, or little that is left to it would be rounded away."""
    return torch.log1p((-lam.double() * (1 - mass.double())).clamp(min=-1.0)).float()
