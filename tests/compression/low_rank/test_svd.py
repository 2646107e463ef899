"""Truncation: against Eckart–Young's bound, gradient descent and closed forms."""

from __future__ import annotations

import pytest
import torch

from llmlab.compression.low_rank import svd


def problem(out=7, columns=5, tokens=30, seed=0, dtype=torch.float64):
    """W, and correlated inputs X of unequal size."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(out, columns, generator=random, dtype=dtype)
    mix = torch.randn(columns, columns, generator=random, dtype=dtype)
    X = mix @ torch.randn(columns, tokens, generator=random, dtype=dtype)
    return W, X * torch.logspace(0, 1.5, columns, dtype=dtype)[:, None]


def descend(W, X, rank, steps=3000):
    """The loss of factors that gradient descent found, from a random start."""
    random = torch.Generator().manual_seed(1)
    scale = X / X.norm() * X.shape[1] ** 0.5
    A = torch.randn(len(W), rank, generator=random, dtype=W.dtype).requires_grad_()
    B = torch.randn(rank, W.shape[1], generator=random, dtype=W.dtype).requires_grad_()
    found = torch.optim.LBFGS(
        [A, B], max_iter=steps, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        found.zero_grad()
        value = ((W - A @ B) @ scale).square().sum()
        value.backward()
        return value

    found.step(loss)
    return ((W - A @ B) @ X).square().sum().detach()


@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (6, 6), (3, 1)])
def test_eckart_young(shape):
    """What is left is the sum of the squares of the singular values left out."""
    W, _ = problem(*shape)
    sigma = torch.linalg.svdvals(W)
    for rank in range(1, min(shape) + 1):
        A, B = svd.truncate(W, rank)
        assert A.shape == (shape[0], rank) and B.shape == (rank, shape[1])
        left = (W - A @ B).square().sum()
        torch.testing.assert_close(left, sigma[rank:].square().sum())
        # both factors carry the root of each singular value
        torch.testing.assert_close(A.T @ A, torch.diag(sigma[:rank]))
        torch.testing.assert_close(B @ B.T, torch.diag(sigma[:rank]))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_descent_gets_below_either_optimum(rank):
    W, X = problem()
    eye = torch.eye(5, dtype=W.dtype)
    A, B = svd.truncate(W, rank)
    least = (W - A @ B).square().sum()
    torch.testing.assert_close(descend(W, eye, rank), least, rtol=1e-4, atol=0)
    A, B = svd.truncate_whitened(W, X @ X.T, rank)
    least = ((W - A @ B) @ X).square().sum()
    torch.testing.assert_close(descend(W, X, rank), least, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(7, 5), (4, 9)])
def test_whitened_singular_values_are_the_loss(shape):
    W, X = problem(*shape)
    S = svd.whitening(X @ X.T)
    assert torch.equal(S, S.tril())
    torch.testing.assert_close(S @ S.T, X @ X.T)
    sigma = torch.linalg.svdvals(W @ S)
    of_outputs = torch.linalg.svdvals(W @ X)[: min(shape)]
    torch.testing.assert_close(sigma, of_outputs)
    for rank in range(1, min(shape)):
        A, B = svd.truncate_whitened(W, X @ X.T, rank)
        left = ((W - A @ B) @ X).square().sum()
        torch.testing.assert_close(left, sigma[rank:].square().sum())
        plain = torch.matmul(*svd.truncate(W, rank))
        assert left < ((W - plain) @ X).square().sum()


def test_any_root_of_the_gram_whitens():
    """The symmetric root gives the same product as the Cholesky factor."""
    W, X = problem(4, 6)
    values, vectors = torch.linalg.eigh(X @ X.T)
    root = vectors * values.sqrt() @ vectors.T
    U, sigma, Vt = torch.linalg.svd(W @ root, full_matrices=False)
    by_root = U[:, :2] * sigma[:2] @ Vt[:2] @ torch.linalg.inv(root)
    torch.testing.assert_close(
        torch.matmul(*svd.truncate_whitened(W, X @ X.T, 2)), by_root
    )


def test_inputs_that_do_not_vary_together_alike_change_nothing():
    """With X Xᵀ a multiple of 1 whitening is plain SVD; a factor changes nothing."""
    W, X = problem()
    plain = torch.matmul(*svd.truncate(W, 2))
    eye = torch.eye(5, dtype=W.dtype)
    for factor in (1e-6, 1.0, 1e6):
        found = torch.matmul(*svd.truncate_whitened(W, factor * eye, 2))
        torch.testing.assert_close(found, plain)
    once = torch.matmul(*svd.truncate_whitened(W, X @ X.T, 2))
    twice = torch.matmul(*svd.truncate_whitened(W, 1e4 * X @ X.T, 2))
    torch.testing.assert_close(once, twice)


def test_damping_without_end_is_plain_svd_and_serves_few_tokens():
    W, X = problem(tokens=3)  # fewer tokens than inputs
    gram = X @ X.T
    with pytest.raises(ValueError, match="no Cholesky factor with damping=0"):
        svd.truncate_whitened(W, gram - 1e-9 * torch.eye(5) * gram.mean().abs(), 2)
    found = torch.matmul(*svd.truncate_whitened(W, gram, 2, damping=1e9))
    plain = torch.matmul(*svd.truncate(W, 2))
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    S = svd.whitening(gram, damping=0.5)
    whole = gram + 0.5 * gram.diagonal().mean() * torch.eye(5, dtype=gram.dtype)
    torch.testing.assert_close(S @ S.T, whole)
    damped = torch.matmul(*svd.truncate_whitened(W, gram, 2, damping=0.01))
    share = 0.01 * gram.diagonal().mean() * torch.eye(5, dtype=gram.dtype)
    by_hand = torch.matmul(*svd.truncate_whitened(W, gram + share, 2))
    torch.testing.assert_close(damped, by_hand)


def test_the_output_error_is_that_of_the_outputs():
    W, X = problem()
    W_hat = torch.matmul(*svd.truncate(W, 2))
    expected = ((W - W_hat) @ X).square().sum() / (W @ X).square().sum()
    found = svd.output_error(W, W_hat, X @ X.T)
    torch.testing.assert_close(found, expected.item())


def test_counting():
    assert svd.parameters(6, 4, 3) == 30
    assert svd.break_even(4096, 4096) == 2048
    assert svd.break_even(6, 3) == 2
    # 16 bits of 10 numbers per rank, of 24 weights: rank 3 takes 20 bits per weight
    assert svd.rank_within(20, 6, 4) == 3
    assert svd.rank_within(19.99, 6, 4) == 2
    # 8 bits, and two scales of 16 bits per rank: 112 bits per rank
    assert svd.rank_within(112 / 24, 6, 4, factor_bits=8) == 1
    assert svd.rank_within(1e9, 6, 4) == 4
    with pytest.raises(ValueError, match=r"bits=1 must be at least 6\.667"):
        svd.rank_within(1, 6, 4)


def test_bad_arguments_are_named():
    W, X = problem()
    gram = X @ X.T
    for rank in (0, 6, -1):
        with pytest.raises(ValueError, match=f"rank={rank} must be from 1 to 5"):
            svd.truncate(W, rank)
    with pytest.raises(ValueError, match="gram has shape"):
        svd.truncate_whitened(W, gram[:3, :3], 2)
    with pytest.raises(ValueError, match="gram is all zeros"):
        svd.truncate_whitened(W, gram * 0, 2)
    with pytest.raises(ValueError, match="gram holds 1 values"):
        bad = gram.clone()
        bad[0, 0] = torch.inf
        svd.truncate_whitened(W, bad, 2)
    with pytest.raises(ValueError, match="W holds 1 values"):
        W[0, 0] = torch.nan
        svd.truncate(W, 2)
    with pytest.raises(ValueError, match="it must be"):
        svd.truncate(W[0], 1)
