"""Cross-entropy against sparse targets, fused with the output projection.

The training loss of the paper (arXiv 2508.09874, eq. 4-6) is

    L = beta * KL(p_knn || p_mem) + (1 - beta) * CE(y, p_mem)

Both terms are cross-entropies of p_mem up to a constant, the entropy of p_knn. So L equals, up to that constant, one
cross-entropy with the soft target beta * p_knn + (1 - beta) * onehot(y), of which a few tokens are named. What their
probabilities lack of 1 is the *rest*: the mass of all tokens that are not named, as one event. So

    loss = - sum over named k of t_k log p_k  -  rest * log (1 - sum over named k of p_k)

which leaves it to the model how the rest is shared out. (Renormalising the named ones instead teaches that there is nothing else:
docs/experiments.md.) The full [tokens, vocabulary] matrix is made chunk by chunk and never kept: the gradient is computed in
the forward pass.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # rows of logits alive at a time

# logits [C, V] in float32 and the rows they are of -> the sum of the rows' losses, and its gradient by the logits, [C, V]. They are
# overwritten: at 8 k vocabulary a fresh chunk costs more in page faults than the arithmetic does.
PartOf = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def soft_targets(labels: Tensor, knn_ids: Tensor, knn_probs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Mix one-hot labels [N] with sparse kNN distributions ids/probs [N, K], a row's sum at most 1, into ids, probs [N, K + 1]."""
    ids = torch.cat([labels[:, None], knn_ids], 1)
    return ids, torch.cat([knn_probs.new_full((len(labels), 1), 1 - beta), beta * knn_probs], 1)


def sparse_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """The loss above, its mean over rows, with p = softmax(hidden @ weight.T).

    hidden [N, H] and weight [V, H] share a dtype; ids [N, K] int64; probs [N, K] float32, rows summing to 1 less the rest. Repeated
    ids in a row add up. Returns a float32 scalar.
    """
    loss: Tensor = _FusedSparseCrossEntropy.apply(hidden, weight, ids, probs)
    return loss


class _FusedSparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
        rest = (1 - probs.sum(1, keepdim=True)).clamp_min(0)
        any_rest = bool(rest.any())

        def part_of(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            norm = logits.logsumexp(1, keepdim=True)
            loss = (probs[part] * (norm - logits.gather(1, ids[part]))).sum()
            p = logits.sub_(norm).exp_()
            if any_rest:
                named = p.gather(1, ids[part])
                mass = p.scatter_(1, ids[part], 0.0).sum(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
                loss -= (rest[part] * mass.log()).sum()
                p.mul_(1 - rest[part] / mass).scatter_(1, ids[part], named)
            return loss, p.scatter_add_(1, ids[part], -probs[part])

        return _in_chunks(ctx, hidden, weight, part_of)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads[0]), None, None


def mixture_loss(hidden: Tensor, weight: Tensor, labels: Tensor, base: Tensor, lam: float) -> Tensor:
    """Mean over rows of -log(lam * p(label) + (1 - lam) * p_base(label)), with p = softmax(hidden @ weight.T).

    hidden [N, H] and weight [V, H] share a dtype; labels [N] int64; base [N] float32: log p_base(label). Returns a float32 scalar.
    """
    loss: Tensor = _FusedMixtureLoss.apply(hidden, weight, labels, base, lam)
    return loss


class _FusedMixtureLoss(torch.autograd.Function):
    """The gradient is that of the plain cross-entropy times the memory's share of the mixture's probability, row by row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, base: Tensor, lam: float) -> Tensor:
        def part_of(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            own = labels[part, None]
            p = logits.log_softmax(1)
            ours = p.gather(1, own)[:, 0] + math.log(lam)
            both = torch.logaddexp(ours, base[part] + math.log1p(-lam))
            p.exp_().scatter_add_(1, own, p.new_full(own.shape, -1.0))
            return -both.sum(), p.mul_((ours - both).exp_()[:, None])

        return _in_chunks(ctx, hidden, weight, part_of)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads[0]), None, None, None


def _in_chunks(ctx: Any, hidden: Tensor, weight: Tensor, part_of: PartOf) -> Tensor:
    """The mean loss over rows, its gradients saved in `ctx`: logits, and their gradient, are made for CHUNK rows at a time."""
    rows = hidden.shape[0]
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden, trained = torch.empty_like(hidden), ctx.needs_input_grad[1]
    grad_weight = torch.zeros(weight.shape if trained else (), dtype=torch.float32, device=weight.device)
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        loss, residual = part_of((hidden[part] @ weight.T).float(), part)
        total += loss
        residual = residual.div_(rows).to(hidden.dtype)
        grad_hidden[part] = residual @ weight
        if trained:
            grad_weight += residual.T @ hidden[part]
    ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
    return total / max(rows, 1)


def _gradients(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of hidden states and weight that a forward pass has saved, times `scale`."""
    grad_hidden, grad_weight = ctx.saved_tensors
    weight = grad_weight * scale.to(grad_weight.dtype) if ctx.needs_input_grad[1] else None
    return grad_hidden * scale.to(grad_hidden.dtype), weight
