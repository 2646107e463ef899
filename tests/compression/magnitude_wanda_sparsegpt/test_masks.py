"""Scores and masks: exact counts, ties, all masks enumerated, two libraries."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from llmlab.compression import hessian
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression.magnitude_wanda_sparsegpt import PruneConfig
from tests.compression.magnitude_wanda_sparsegpt.problems import golden, problem

# Scores -------------------------------------------------------------------------------


def test_wandas_score_is_the_root_of_the_loss_of_one_weight():
    """Only where nothing else changes: that is what Wanda means by it."""
    W, X = problem()
    scores = pruning.wanda_scores(W, X.norm(dim=1))
    for i, j in itertools.product(range(5), range(16)):
        without = W.clone()
        without[i, j] = 0
        loss = ((without - W) @ X).norm()
        torch.testing.assert_close(scores[i, j], loss)


def test_the_obs_score_is_the_loss_of_one_weight_when_later_ones_make_up_for_it():
    W, X = problem()
    H = X @ X.T
    U = hessian.inverse_factor(H, damping=0)
    scores = pruning.obs_scores(W, U.diagonal())
    for i, j in itertools.product(range(5), range(16)):
        later = X[j + 1 :].T  # (tokens, later columns)
        target = W[i, j] * X[j]
        if j < 15:
            found = torch.linalg.lstsq(later, target[:, None]).solution
            target = target - (later @ found)[:, 0]
        torch.testing.assert_close(scores[i, j], target.square().sum())


# Counts -------------------------------------------------------------------------------


def test_the_count_is_exact_for_every_share_of_a_hundred():
    for hundredths, n in itertools.product(range(100), (1, 3, 7, 50, 100, 576)):
        expected = n * hundredths // 100
        assert pruning.pruned_count(n, hundredths / 100) == expected
    assert int(100 * 0.29) == 28  # what a float makes of it


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.29, 0.5, 2 / 3, 0.99])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 16), (2, 100)])
def test_masks_have_exact_counts_also_with_ties(shape, sparsity):
    torch.manual_seed(0)
    for scores in (torch.rand(shape), torch.ones(shape), torch.randint(3, shape)):
        rows = pruning.from_each_row(scores.float(), sparsity)
        count = pruning.pruned_count(shape[1], sparsity)
        assert ((~rows).sum(1) == count).all()
        matrix = pruning.from_matrix(scores.float(), sparsity)
        count = pruning.pruned_count(shape[0] * shape[1], sparsity)
        assert (~matrix).sum() == count and matrix.shape == shape


def test_of_equal_scores_the_first_go():
    scores = torch.tensor([[1.0, 2, 1, 1], [1, 1, 0, 3]])
    keep = pruning.from_each_row(scores, 0.5)
    assert keep.tolist() == [[False, True, False, True], [False, True, False, True]]
    keep = pruning.from_matrix(scores, 0.5)
    assert keep.tolist() == [[False, True, False, False], [True, True, False, True]]
    keep = pruning.n_of_m(torch.ones(1, 8), 2, 4)
    assert keep.tolist() == [[False, False, True, True] * 2]


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 4), (6, 8), (3, 5), (0, 2)])
def test_n_of_m_is_the_best_of_all_masks_of_each_group(n, m):
    torch.manual_seed(n + m)
    scores = torch.rand(3, 2 * m)
    keep = pruning.n_of_m(scores, n, m)
    assert keep.shape == scores.shape
    for row, marked in zip(scores, keep, strict=True):
        for group, mask in zip(row.split(m), marked.split(m), strict=True):
            best = max(
                itertools.combinations(range(m), n), key=lambda c: group[[*c]].sum()
            )
            assert mask.nonzero().flatten().tolist() == sorted(best)


# Magnitude and Wanda ------------------------------------------------------------------


def test_wanda_with_equal_norms_is_magnitude_in_each_row():
    W, _ = problem()
    for kind in ({"sparsity": 0.4}, {"pattern": "2:4"}):
        wanda = pruning.keep_mask(W, torch.full((16,), 3.0), PruneConfig(**kind))
        per = {"per": "row"} if "sparsity" in kind else {}
        magnitude = PruneConfig("magnitude", **kind, **per)
        assert torch.equal(wanda, pruning.keep_mask(W, None, magnitude))


def test_wanda_asks_each_row_and_magnitude_the_matrix():
    """A row of small weights keeps its half with Wanda, and all go with magnitude."""
    W = torch.arange(1.0, 17).reshape(2, 8)
    keep = pruning.keep_mask(W, torch.ones(8), PruneConfig("wanda", 0.5))
    assert keep.sum(1).tolist() == [4, 4]
    keep = pruning.keep_mask(W, None, PruneConfig("magnitude", 0.5))
    assert keep.sum(1).tolist() == [0, 8]
    norm = torch.tensor([20.0, 1, 1, 1, 1, 1, 1, 1])
    keep = pruning.keep_mask(W, norm, PruneConfig("wanda", 0.5, per="matrix"))
    assert keep.sum(1).tolist() == [1, 7]


def test_a_factor_in_the_inputs_or_in_a_row_changes_no_mask_of_wanda():
    W, X = problem()
    config = PruneConfig("wanda", 0.5)
    keep = pruning.keep_mask(W, X.norm(dim=1), config)
    scaled = W * torch.logspace(-3, 3, 5, dtype=W.dtype)[:, None]
    assert torch.equal(keep, pruning.keep_mask(scaled, 7 * X.norm(dim=1), config))


def test_a_weight_that_reads_a_large_input_outlives_a_larger_one():
    W = torch.tensor([[4.0, 1.0]])
    keep = pruning.keep_mask(W, torch.tensor([1.0, 8.0]), PruneConfig("wanda", 0.5))
    assert keep.tolist() == [[False, True]]
    keep = pruning.keep_mask(W, None, PruneConfig("magnitude", 0.5))
    assert keep.tolist() == [[True, False]]


# Libraries ----------------------------------------------------------------------------

OURS = {  # the library counts what is pruned
    "half": {"sparsity": 0.5},
    "30%": {"sparsity": 0.3},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "2:8": {"pattern": "6:8"},
}


@pytest.mark.parametrize("name", OURS)
def test_llmcompressors_wanda_prunes_the_same(name):
    W, X = golden()["W"], golden()["X"]
    keep = pruning.keep_mask(W, X.norm(dim=0), PruneConfig("wanda", **OURS[name]))
    assert torch.equal(W.where(keep, 0.0), golden()[f"wanda {name}"])


def test_where_llmcompressor_differs():
    """Of a hundred weights it prunes 28 for 0.29; ties of 2:4 it breaks otherwise; of
    equal weights SparseGPT prunes all.
    """
    assert (golden()["wanda 0.29 of 100"] == 0).sum(1).tolist() == [28] * 3
    keep = pruning.from_each_row(golden()["wide"], 0.29)
    assert (~keep).sum(1).tolist() == [29] * 3
    tied = golden()["tied"]
    first_kept = tied.where(torch.tensor([True, True, False, False] * 2), 0.0)
    assert torch.equal(golden()["wanda tied 2:4"], first_kept)
    assert torch.equal(golden()["sparsegpt tied 2:4"], first_kept)
    keep = pruning.from_each_row(tied, 0.5)
    assert torch.equal(golden()["wanda tied half"], tied.where(keep, 0.0))
    assert not golden()["sparsegpt tied half"].any()
    config = PruneConfig("sparsegpt", 0.5)
    assert (pruning.sparsegpt(tied, torch.eye(8), config) != 0).sum() == 12


def test_torchs_l1_unstructured_is_magnitude_of_the_matrix():
    from torch.nn.utils import prune

    torch.manual_seed(0)
    linear = nn.Linear(12, 5, bias=False)
    W = linear.weight.detach().clone()
    prune.l1_unstructured(linear, "weight", amount=0.3)
    keep = pruning.keep_mask(W, None, PruneConfig("magnitude", 0.3))
    assert torch.equal(linear.weight.detach(), W.where(keep, 0.0))


def test_torch_rounds_the_count_to_even_and_ours_is_cut_off():
    from torch.nn.utils import prune

    for n, theirs, ours in ((3, 2, 1), (5, 2, 2), (7, 4, 3), (9, 4, 4)):
        linear = nn.Linear(n, 1, bias=False)
        prune.l1_unstructured(linear, "weight", amount=0.5)
        assert (linear.weight == 0).sum() == theirs
        assert pruning.pruned_count(n, 0.5) == ours


def test_torchs_sparsifier_with_two_zeros_in_blocks_of_four_is_2_of_4():
    from torch.ao.pruning import WeightNormSparsifier

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 3, bias=False))
    W = model[0].weight.detach().clone()
    sparsifier = WeightNormSparsifier(1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    keep = pruning.keep_mask(W, None, PruneConfig("magnitude", pattern="2:4"))
    assert torch.equal(model[0].weight.detach(), W.where(keep, 0.0))


# Refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "prune", "sparsity": 0.5}, "method='prune' must be one of"),
        ({}, "one of them must be given"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "and only one"),
        ({"sparsity": 1.0}, "sparsity=1.0 must be"),
        ({"sparsity": -0.1}, "sparsity=-0.1 must be"),
        ({"sparsity": float("nan")}, "sparsity=nan must be"),
        ({"pattern": "4:2"}, "pattern='4:2' must be 'N:M'"),
        ({"pattern": "0:4"}, "pattern='0:4' must be"),
        ({"pattern": "2-4"}, "pattern='2-4' must be"),
        ({"sparsity": 0.5, "per": "group"}, "per='group' must be"),
        ({"pattern": "2:4", "per": "row"}, "per='row' must be None"),
        ({"method": "sparsegpt", "sparsity": 0.5, "per": "row"}, "per='row' must"),
        ({"sparsity": 0.5, "damping": -1}, "damping=-1 must be"),
        ({"sparsity": 0.5, "mask_block": 0}, "mask_block=0 must be"),
        ({"sparsity": 0.5, "block_size": 0}, "block_size=0 must be"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**settings)


def test_bad_groups_are_named():
    with pytest.raises(ValueError, match="m=4 must divide the columns, 6"):
        pruning.n_of_m(torch.ones(2, 6), 2, 4)
    with pytest.raises(ValueError, match="n=5 must lie between 0 and m=4"):
        pruning.n_of_m(torch.ones(2, 8), 5, 4)
