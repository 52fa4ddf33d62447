"""The fused loss against dense autograd."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from decoders.loss import CHUNK, entropy, soft_targets, sparse_cross_entropy


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
    torch.testing.assert_close(fast - beta * entropy(knn_probs), slow)
    for ours, theirs in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
