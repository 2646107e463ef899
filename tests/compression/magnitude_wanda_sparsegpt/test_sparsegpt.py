"""SparseGPT: against least squares, GPTQ, Wanda and llmcompressor.

The oracle takes no inverse of H, no Cholesky factor and no running update. Before each
column it solves anew for the free weights, given what has been pruned so far.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.compression import gptq, hessian
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression.gptq import GPTQConfig
from llmlab.compression.magnitude_wanda_sparsegpt import PruneConfig
from llmlab.compression.quantization_basics import QuantConfig
from tests.compression.magnitude_wanda_sparsegpt.problems import (
    damped,
    golden,
    problem,
)

SHARES = [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "4:8"}]


def at_their_best(W, W_hat, done, H):
    """The rows of W with the first `done` weights at Ŵ and the others at their best."""
    error = (W - W_hat)[:, :done]
    best = W.clone()
    best[:, :done] = W_hat[:, :done]
    move = torch.linalg.solve(H[done:, done:], H[done:, :done] @ error.T)
    best[:, done:] += move.T
    return best


def by_solving(W, H, config, size):
    """SparseGPT without its shortcuts."""
    W_hat = W.clone()
    keep = torch.ones_like(W, dtype=torch.bool)
    columns = W.shape[1]
    for q in range(columns):
        now = at_their_best(W, W_hat, q, H)
        if q % size == 0:
            stop = min(q + size, columns)
            scores = torch.stack(
                [now[:, j] ** 2 / H[j:, j:].inverse()[0, 0] for j in range(q, stop)], 1
            )
            if config.pattern:
                n, m = map(int, config.pattern.split(":"))
                keep[:, q:stop] = pruning.n_of_m(scores, n, m)
            else:
                keep[:, q:stop] = pruning.from_matrix(scores, config.sparsity)
        W_hat[:, q] = now[:, q] * keep[:, q]
    return W_hat


@pytest.mark.parametrize("block_size", [1, 3, 8, 128])
@pytest.mark.parametrize("mask_block", [1, 5, 8, 128])
@pytest.mark.parametrize("kind", SHARES, ids=str)
def test_least_squares_agrees_and_block_size_changes_nothing(
    kind, mask_block, block_size
):
    W, X = problem()
    H = X @ X.T
    config = PruneConfig(
        "sparsegpt", mask_block=mask_block, block_size=block_size, **kind
    )
    size = int(config.pattern[2:]) if config.pattern else mask_block
    found = pruning.sparsegpt(W, H, config)
    torch.testing.assert_close(found, by_solving(W, damped(H), config, size))


def test_the_block_of_the_mask_decides_what_is_compared():
    """⌊n · s⌋ of each block go, exactly; in one block of all columns other weights."""
    W, X = problem(out=7, columns=18)
    for size, counts in ((5, [17, 17, 17, 10]), (18, [63]), (1, [3] * 18)):
        config = PruneConfig("sparsegpt", 0.5, mask_block=size)
        zeros = pruning.sparsegpt(W, X @ X.T, config) == 0
        assert [int(block.sum()) for block in zeros.split(size, 1)] == counts
    five, all_columns = (
        pruning.sparsegpt(W, X @ X.T, PruneConfig("sparsegpt", 0.5, mask_block=b)) == 0
        for b in (5, 18)
    )
    assert not torch.equal(five, all_columns)


def test_the_mask_of_a_group_is_chosen_from_the_updated_weights():
    """Not from those at the start, as Wanda does."""
    differs = 0
    for seed in range(5):
        W, X = problem(seed=seed)
        H = X @ X.T
        found = pruning.sparsegpt(W, H, PruneConfig("sparsegpt", pattern="2:4"))
        assert ((found != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        d = hessian.inverse_factor(H).diagonal()
        at_the_start = pruning.n_of_m(pruning.obs_scores(W, d), 2, 4)
        assert torch.equal((found != 0)[:, :4], at_the_start[:, :4])
        differs += int(((found != 0) != at_the_start).sum())
    assert differs > 0


def test_a_diagonal_h_prunes_as_wanda_and_updates_nothing():
    W = problem()[0]
    H = torch.diag(torch.logspace(-2, 2, 16, dtype=W.dtype)[torch.randperm(16)])
    scores = pruning.wanda_scores(W, H.diagonal().sqrt())
    config = PruneConfig("sparsegpt", 0.5, damping=0, mask_block=8)
    keep = torch.cat([pruning.from_matrix(s, 0.5) for s in scores.split(8, 1)], 1)
    assert torch.equal(pruning.sparsegpt(W, H, config), W.where(keep, 0.0))
    for n, m in ((2, 4), (4, 8)):
        config = PruneConfig("sparsegpt", pattern=f"{n}:{m}", damping=0)
        keep = pruning.n_of_m(scores, n, m)
        assert torch.equal(pruning.sparsegpt(W, H, config), W.where(keep, 0.0))


def test_nothing_pruned_is_nothing_changed():
    W, X = problem()
    found = pruning.sparsegpt(W, X @ X.T, PruneConfig("sparsegpt", 0.0))
    assert torch.equal(found, W)


@pytest.mark.parametrize("symmetric", [True, False])
def test_with_a_grid_and_nothing_pruned_it_is_gptq(symmetric):
    W, X = problem()
    grid = QuantConfig(3, symmetric, per="row", scale_dtype=torch.float32)
    config = PruneConfig("sparsegpt", 0.0, grid=grid, block_size=5)
    found = pruning.sparsegpt(W, X @ X.T, config)
    expected = gptq.gptq(W, X @ X.T, GPTQConfig(grid)).weight
    torch.testing.assert_close(found, expected)


def test_pruned_and_rounded_in_one_pass():
    W, X = problem()
    grid = QuantConfig(4, per="row", scale_dtype=torch.float32)
    config = PruneConfig("sparsegpt", pattern="2:4", grid=grid)
    found = pruning.sparsegpt(W, X @ X.T, config)
    assert ((found == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()
    for row, w in zip(found, W, strict=True):
        codes = row / (w.abs().max() / 7)
        torch.testing.assert_close(codes, codes.round(), atol=1e-5, rtol=0)


def test_rounding_in_the_same_pass_is_better_than_rounding_afterwards():
    """At 2 bits: columns to come make up for both errors."""
    grid = QuantConfig(2, per="row", scale_dtype=torch.float32)
    shares = []
    for seed in range(10):
        W, X = problem(out=16, columns=32, tokens=90, seed=seed)
        H = X @ X.T
        together = pruning.sparsegpt(
            W, H, PruneConfig("sparsegpt", pattern="2:4", grid=grid)
        )
        pruned = pruning.sparsegpt(W, H, PruneConfig("sparsegpt", pattern="2:4"))
        after = gptq.nearest(pruned.float(), grid).double()
        error = hessian.output_error(W, together, H)
        shares.append(error / hessian.output_error(W, after, H))
    assert sum(shares) / len(shares) < 0.95


# The best update ----------------------------------------------------------------------


def test_the_best_update_is_least_squares_on_the_outputs():
    W, X = problem()
    keep = pruning.from_each_row(W.abs(), 0.4)
    found = pruning.best_update(W, keep, X @ X.T)
    for row, kept, w in zip(found, keep, W, strict=True):
        solved = torch.linalg.lstsq(X[kept].T, (w @ X)[:, None]).solution[:, 0]
        torch.testing.assert_close(row[kept], solved)
        assert not row[~kept].any()
    keep[1] = False  # a row of which nothing is left
    assert not pruning.best_update(W, keep, X @ X.T)[1].any()


def test_one_pruned_weight_is_optimal_brain_surgeon():
    W, X = problem(out=1)
    H = X @ X.T
    for q in (0, 7, 15):
        keep = torch.ones_like(W, dtype=torch.bool)
        keep[0, q] = False
        surgeon = gptq.surgeon(W[0], q, 0.0, H.inverse())
        torch.testing.assert_close(pruning.best_update(W, keep, H)[0], surgeon)
        loss = hessian.output_error(W, surgeon[None], H) * (W @ X).square().sum()
        expected = W[0, q] ** 2 / H.inverse()[q, q]
        torch.testing.assert_close(loss, expected)


def test_sparsegpts_update_lies_between_none_and_the_best():
    for seed in range(5):
        W, X = problem(seed=seed)
        H = X @ X.T
        found = pruning.sparsegpt(W, H, PruneConfig("sparsegpt", 0.5, damping=0))
        keep = found != 0
        errors = [
            hessian.output_error(W, W_hat, H)
            for W_hat in (pruning.best_update(W, keep, H), found, W.where(keep, 0.0))
        ]
        assert errors == sorted(errors) and errors[0] < 0.99 * errors[1]


def test_without_correlation_between_them_columns_cannot_help():
    """Two halves whose inputs have nothing to do with each other are pruned apart."""
    W, X = problem()
    H = X @ X.T
    H[:8, 8:] = 0
    H[8:, :8] = 0
    config = PruneConfig("sparsegpt", pattern="2:4", damping=0)
    halves = [
        pruning.sparsegpt(W[:, s], H[s, s], config) for s in (slice(8), slice(8, 16))
    ]
    torch.testing.assert_close(pruning.sparsegpt(W, H, config), torch.cat(halves, 1))


# The same with a factor, dead columns, libraries --------------------------------------


def test_a_factor_in_h_changes_nothing_and_inputs_stay_as_they_are():
    W, X = problem()
    H = X @ X.T
    before = W.clone(), H.clone()
    config = PruneConfig("sparsegpt", 0.5)
    once, twice = (pruning.sparsegpt(W, factor * H, config) for factor in (1, 2))
    torch.testing.assert_close(once, twice)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


def test_dead_columns_become_zero_and_disturb_nothing():
    W, X = problem()
    X[4] = 0
    config = PruneConfig("sparsegpt", pattern="3:4", damping=0)
    found = pruning.sparsegpt(W, X @ X.T, config)
    assert not found[:, 4].any()
    # it takes the place of the one that goes, so no other of its group is touched
    assert (found[:, 5:8] != 0).all()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("2:4", {"pattern": "2:4"}),
        ("4:8", {"pattern": "4:8"}),
        ("2:8", {"pattern": "6:8"}),  # the library counts what is pruned
        ("half", {"sparsity": 49 / 96 + 1e-9}),  # and one more than 48 of 6 · 16
        ("30%", {"sparsity": 29 / 96 + 1e-9}),  # and one more than 28
    ],
)
def test_llmcompressor_finds_the_same_but_for_one_weight_a_block(name, ours):
    W, X = golden()["W"], golden()["X"]
    config = PruneConfig("sparsegpt", mask_block=16, **ours)
    found = pruning.sparsegpt(W, X.T @ X, config)
    torch.testing.assert_close(found, golden()[f"sparsegpt {name}"], atol=1e-4, rtol=0)


def test_llmcompressor_prunes_one_weight_too_many_in_each_block():
    for name, asked in (("half", 48), ("30%", 28)):
        zeros = golden()[f"sparsegpt {name}"] == 0
        counts = [int(block.sum()) for block in zeros.split(16, 1)]
        assert counts[0] == counts[2] == asked + 1
    W, X = golden()["W"], golden()["X"]
    ours = pruning.sparsegpt(W, X.T @ X, PruneConfig("sparsegpt", 0.5, mask_block=16))
    assert [int((block == 0).sum()) for block in ours.split(16, 1)] == [48] * 3


def test_bad_matrices_are_named():
    W, X = problem()
    H = X @ X.T
    config = PruneConfig("sparsegpt", 0.5)
    with pytest.raises(ValueError, match="H has shape"):
        pruning.sparsegpt(W, H[:5], config)
    with pytest.raises(ValueError, match="H is all zeros"):
        pruning.sparsegpt(W, 0 * H, config)
    with pytest.raises(ValueError, match="no inverse with damping=0"):
        one = X[:, :1]
        pruning.sparsegpt(W, one @ one.T, PruneConfig("sparsegpt", 0.5, damping=0))
    with pytest.raises(ValueError, match="m=5 must divide the columns, 16"):
        pruning.sparsegpt(W, H, PruneConfig("sparsegpt", pattern="2:5"))
    with pytest.raises(ValueError, match=r"grid\.per='group' must be 'row'"):
        PruneConfig("sparsegpt", 0.5, grid=QuantConfig(4))
    with pytest.raises(ValueError, match="only SparseGPT rounds"):
        PruneConfig("wanda", 0.5, grid=QuantConfig(4, per="row"))
