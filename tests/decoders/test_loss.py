"""The fused loss against dense autograd."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from memdec.decoders.loss import CHUNK, soft_targets, sparse_cross_entropy


def sparse_rows(rows: int, kept: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sparse distributions."""
    ids = torch.stack([torch.randperm(vocabulary)[:kept] for _ in range(rows)])
    return ids, torch.rand(rows, kept).softmax(-1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_and_gradients_equal_the_papers_formula(beta: float) -> None:
    """beta * KL(p_knn || p_mem) + (1 - beta) * CE, computed densely, over more rows than a chunk."""
    rows, vocabulary = CHUNK + 7, 50
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    knn_ids, knn_probs = sparse_rows(rows, 5, vocabulary)
    dense = torch.zeros(rows, vocabulary).scatter_add_(1, knn_ids, knn_probs)
    logits = hidden @ weight.T
    slow = beta * kl_div(logits.log_softmax(-1), dense, reduction="batchmean") + (1 - beta) * cross_entropy(logits, labels)
    slow_gradients = torch.autograd.grad(slow, (hidden, weight))
    fast = sparse_cross_entropy(hidden, weight, *soft_targets(labels, knn_ids, knn_probs, beta))
    fast_gradients = torch.autograd.grad(fast, (hidden, weight))
    torch.testing.assert_close(fast + beta * torch.xlogy(knn_probs, knn_probs).sum(1).mean(), slow)
    for ours, theirs in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_mass_of_tokens_that_are_not_named_is_one_event() -> None:
    """-sum t_k log p_k - rest * log(1 - sum p_k), by autograd; with a token named twice, and rows without a rest."""
    rows, vocabulary = CHUNK + 7, 50
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    ids, probs = sparse_rows(rows, 5, vocabulary)
    probs = probs * torch.rand(rows, 1)
    probs[: rows // 2] /= probs[: rows // 2].sum(1, keepdim=True)
    ids[:, 4] = ids[:, 3]
    named = torch.zeros(rows, vocabulary).scatter_(1, ids, 1.0)
    target = torch.zeros(rows, vocabulary).scatter_add_(1, ids, probs)
    p = (hidden @ weight.T).softmax(-1)
    rest = (1 - target.sum(1)).clamp_min(0)
    slow = (-(target * p.log()).sum(1) - rest * (p * (1 - named)).sum(1).log()).mean()
    fast = sparse_cross_entropy(hidden, weight, ids, probs)
    torch.testing.assert_close(fast, slow)
    expected = torch.autograd.grad(slow, (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(fast, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
