"""Online softmax: any cut of the keys gives the softmax over all of them."""

from __future__ import annotations

import math

import pytest
import torch

from llmlab.inference.flash_attention import (
    finish,
    merge,
    online_softmax,
    split_keys,
    start,
)
from llmlab.models.attention import sdpa


def scores_and_values(T=5, S=11, D=3, scale=1.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, T, S, generator=random, dtype=torch.float64) * scale
    return scores, torch.randn(2, S, D, generator=random, dtype=torch.float64)


def in_pieces(S, V, cuts):
    """m, l, O after the pieces of S that end at `cuts`."""
    state = start((*S.shape[:-1], V.shape[-1]), S)
    begin = 0
    for end in cuts:
        state = online_softmax(*state, S[..., begin:end], V[..., begin:end, :])
        begin = end
    return state


def test_by_hand():
    """Weights 1, 2 and 4, 1 in two pieces; values 6, 0 and 3, 2: 20 / 8."""
    S = torch.tensor([[1.0, 2.0, 4.0, 1.0]]).log()
    V = torch.tensor([[6.0], [0.0], [3.0], [2.0]])
    m, l, O = in_pieces(S, V, [2])
    assert (m.exp().item(), l.item(), O.item()) == pytest.approx((2.0, 1.5, 3.0))
    m, l, O = in_pieces(S, V, [2, 4])
    assert (m.exp().item(), l.item(), O.item()) == pytest.approx((4.0, 2.0, 5.0))
    out, lse = finish(m, l, O)
    assert (out.item(), lse.exp().item()) == pytest.approx((2.5, 8.0))


@pytest.mark.parametrize("cuts", [[11], [1, 11], [4, 8, 11], list(range(1, 12))])
def test_every_cut_gives_the_softmax(cuts):
    S, V = scores_and_values()
    out, lse = finish(*in_pieces(S, V, cuts))
    torch.testing.assert_close(out, S.softmax(-1) @ V)
    torch.testing.assert_close(lse, S.logsumexp(-1))


@pytest.mark.parametrize("shift", [-2000.0, 0.0, 2000.0])
def test_scores_of_any_size(shift):
    """e^2000 is infinite and e^−2000 is 0, in float64, too."""
    S, V = scores_and_values(scale=30.0)
    # the largest score comes last, so that every piece rescales
    S = S.sort(-1).values + shift
    out, lse = finish(*in_pieces(S, V, [3, 6, 11]))
    torch.testing.assert_close(out, S.softmax(-1) @ V)
    torch.testing.assert_close(lse, S.logsumexp(-1))


def test_without_rescaling_it_overflows():
    """What the maximum is for."""
    S = torch.tensor([[100.0, 101.0]])
    assert math.isinf(S.exp().sum().item())
    _, lse = finish(*in_pieces(S, torch.ones(2, 1), [1, 2]))
    assert lse.item() == pytest.approx(101 + math.log(1 + math.exp(-1)))


def test_rows_that_see_nothing():
    S, V = scores_and_values()
    S[:, 0] = -torch.inf  # never
    S[:, 1, :8] = -torch.inf  # the last piece only
    S[:, 2, 4:] = -torch.inf  # the first piece only
    out, lse = finish(*in_pieces(S, V, [4, 8, 11]))
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == -torch.inf).all()
    torch.testing.assert_close(out[:, 1:], (S.softmax(-1) @ V)[:, 1:])
    torch.testing.assert_close(lse, S.logsumexp(-1))


def test_partial_results_merge_in_any_order():
    S, V = scores_and_values(scale=20.0)
    S[:, 0, :4] = -torch.inf
    S[:, 1] = -torch.inf
    parts = [
        in_pieces(S[..., a:b], V[..., a:b, :], [b - a])
        for a, b in ((0, 4), (4, 9), (9, 11))
    ]
    whole = in_pieces(S, V, [11])
    for a, b, c in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        left = merge(*merge(*parts[a], *parts[b]), *parts[c])
        right = merge(*parts[a], *merge(*parts[b], *parts[c]))
        for x, y, z in zip(left, right, whole, strict=True):
            torch.testing.assert_close(x, z)
            torch.testing.assert_close(y, z)


def test_nothing_given_is_changed():
    S, V = scores_and_values()
    state = in_pieces(S, V, [4])
    copies = [x.clone() for x in (*state, S, V)]
    online_softmax(*state, S, V)
    merge(*state, *state)
    finish(*state)
    assert all(map(torch.equal, copies, (*state, S, V)))


@pytest.mark.parametrize("splits", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_keys(splits, dtype):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 16, dtype=dtype) for h, n in ((6, 1), (2, 33), (2, 33))
    )
    found = split_keys(q, k, v, splits)
    assert found.dtype == dtype
    wanted = sdpa(q.float(), k.float(), v.float(), None)
    tol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), wanted, atol=tol, rtol=tol)


def test_split_keys_refuses():
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="splits=4 must be 1 to 3"):
        split_keys(q, k, k, 4)
    with pytest.raises(ValueError, match="2 queries"):
        split_keys(torch.zeros(1, 1, 2, 4), k, k, 1)
