"""The tile loops: against PyTorch's attention, its log-sum-exp and its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from llmlab.inference.flash_attention import (
    FlashAttention,
    backward,
    causal_tiles,
    flash_attention,
    forward,
    score_gradient,
    standard_attention,
)
from llmlab.models.attention import sdpa
from llmlab.models.cache import KVCache
from llmlab.models.llama import Llama, LlamaConfig

# B, H, K, T, S, D: odd lengths, GQA, more keys than queries
SHAPES = [
    (2, 6, 3, 29, 29, 8),
    (1, 4, 1, 5, 37, 16),
    (2, 2, 2, 1, 33, 5),
    (1, 3, 3, 16, 16, 4),
]


def tensors(B, H, K, T, S, D, dtype=torch.float64, scale=1.0):
    torch.manual_seed(0)
    q = torch.randn(B, H, T, D, dtype=dtype) * scale
    k, v = (torch.randn(B, K, S, D, dtype=dtype) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v)]


def bottom_right(T, S):
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


def theirs(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


# The plan of tiles --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "S", "rows", "cols"),
    [
        (4, 4, 2, 2),
        (7, 7, 3, 2),
        (5, 12, 2, 4),
        (1, 9, 4, 4),
        (9, 4, 2, 3),
        (6, 6, 99, 99),
    ],
)
def test_tiles_cover_what_is_seen_once_and_skip_the_rest(T, S, rows, cols):
    visible = bottom_right(T, S)
    count = torch.zeros(T, S, dtype=torch.int)
    plan = causal_tiles(T, S, rows, cols)
    for r0, r1, c0, c1, masked in plan:
        tile = visible[r0:r1, c0:c1]
        assert tile.any(), "a tile that nobody sees"
        assert masked == (not tile.all())
        assert r1 - r0 <= rows
        assert c1 - c0 <= cols
        count[r0:r1, c0:c1] += 1
    assert (count[visible] == 1).all()
    assert plan == sorted(plan)


def test_half_of_the_tiles_are_skipped():
    plan = causal_tiles(1024, 1024, 64, 64)
    assert len(plan) == 16 * 17 // 2
    assert sum(masked for *_, masked in plan) == 16


# Forward ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (7, 3), (1, 1), (64, 64)])
def test_forward_and_gradients_equal_pytorchs(shape, rows, cols):
    q, k, v = tensors(*shape)
    mask = bottom_right(shape[3], shape[4])[None, None]
    wanted = theirs(q, k, v, mask)
    do = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, (q, k, v), do)
    for given in (None, mask):
        out = flash_attention(q, k, v, given, rows=rows, cols=cols)
        torch.testing.assert_close(out, wanted)
        found = torch.autograd.grad(out, (q, k, v), do)
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a, b)


def test_exact_in_fp32():
    q, k, v = (x.detach() for x in tensors(1, 2, 2, 200, 200, 64, torch.float32))
    wanted = theirs(
        q.double(), k.double(), v.double(), bottom_right(200, 200)[None, None]
    )
    ours = (flash_attention(q, k, v) - wanted).abs().max()
    textbook = (standard_attention(q, k, v) - wanted).abs().max()
    assert ours < 2e-6
    assert ours < 3 * textbook + 1e-7


def test_log_sum_exp_equals_that_of_pytorchs_kernel():
    q, k, v = (x.detach() for x in tensors(2, 4, 4, 65, 65, 16, torch.float32))
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(q, k, v, 0.0, True)
    ours, our_lse = forward(q, k, v, rows=16, cols=32)
    torch.testing.assert_close(our_lse, lse.view_as(our_lse), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, out, atol=1e-5, rtol=1e-5)


def test_without_a_causal_mask():
    q, k, v = tensors(1, 4, 2, 9, 13, 8)
    out = flash_attention(q, k, v, causal=False, rows=4, cols=4)
    torch.testing.assert_close(out, theirs(q, k, v, None))


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(heads, kind):
    q, k, v = tensors(2, 6, 3, 10, 10, 8)
    mask = torch.rand(2, heads, 10, 10) < 0.4
    mask[:, :, 4:] &= bottom_right(6, 10)
    mask[..., 0] = True
    mask[:, :, 5:8, 3:6] = False  # a tile that nobody sees
    if kind == "float":
        mask = torch.where(mask, torch.randn(2, heads, 10, 10).double(), -torch.inf)
    wanted = theirs(q, k, v, mask)
    out = flash_attention(q, k, v, mask, rows=3, cols=3)
    torch.testing.assert_close(out, wanted)
    do = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), do),
        torch.autograd.grad(wanted, (q, k, v), do),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_rows_that_see_nothing_give_zero_and_no_gradient():
    q, k, v = tensors(1, 2, 2, 6, 6, 4)
    mask = bottom_right(6, 6)[None, None].clone()
    mask[..., 2, :] = False
    out = flash_attention(q, k, v, mask, rows=2, cols=2)
    assert (out[:, :, 2] == 0).all()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[:, :, 2] == 0).all()
    # more queries than keys: the first ones see nothing, as in flash-attn
    q, k, v = tensors(1, 2, 2, 5, 3, 4)
    out, lse = forward(q, k, v, rows=2, cols=2)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -torch.inf).all()
    torch.testing.assert_close(out[:, :, 2:], standard_attention(q, k, v)[:, :, 2:])


@pytest.mark.parametrize("scale", [1.0, 100.0, 3000.0])
def test_large_scores(scale):
    q, k, v = tensors(1, 2, 2, 20, 20, 8, torch.float32, scale)
    out = flash_attention(q, k, v, rows=8, cols=4)
    assert out.isfinite().all()
    torch.testing.assert_close(out, sdpa(q, k, v, None), atol=1e-4, rtol=1e-4)
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors(*SHAPES[0]))
    out = flash_attention(q, k, v, rows=8, cols=8)
    assert out.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = sdpa(*exact, None)
    torch.testing.assert_close(out.double(), wanted, atol=2e-2, rtol=2e-2)
    do = torch.randn_like(wanted)
    found = torch.autograd.grad(out, (q, k, v), do.to(dtype))
    grads = torch.autograd.grad(wanted, exact, do)
    for a, b in zip(found, grads, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=6e-2, rtol=6e-2)


# Backward -----------------------------------------------------------------------------


def test_the_numerical_gradient():
    q, k, v = tensors(1, 4, 2, 5, 7, 3)
    assert torch.autograd.gradcheck(
        lambda *x: flash_attention(*x, rows=2, cols=3), (q, k, v)
    )


def test_the_gradient_of_scores_is_that_of_a_softmax():
    torch.manual_seed(0)
    S = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    V, dO = torch.randn(8, 4).double(), torch.randn(3, 4).double()
    O = S.softmax(-1) @ V
    (wanted,) = torch.autograd.grad(O, S, dO)
    # a tile of the columns knows nothing of the others but L and O
    lse = S.logsumexp(-1).detach()
    for j in (slice(0, 3), slice(3, 8)):
        P, dS = score_gradient(S.detach()[:, j], lse, O.detach(), dO, V[j])
        torch.testing.assert_close(P, S.softmax(-1)[:, j].detach())
        torch.testing.assert_close(dS, wanted[:, j])


def test_the_order_of_tiles_does_not_matter():
    q, k, v = (x.detach() for x in tensors(1, 4, 2, 11, 11, 8))
    out, lse = forward(q, k, v)
    do = torch.randn_like(out)
    first = backward(q, k, v, out, lse, do, rows=3, cols=5)
    for a, b in zip(
        first, backward(q, k, v, out, lse, do, rows=5, cols=2), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_what_is_kept_grows_with_the_tokens_and_not_with_their_square():
    def kept(attention, n):
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        q, k, v = tensors(1, 2, 1, n, n, 8, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attention(q, k, v)
        assert out.requires_grad
        return sum(sizes.values())

    q, k, v, out, lse = 2 * 8, 8, 8, 2 * 8, 2  # numbers per token
    assert kept(flash_attention, 64) == 4 * 64 * (q + k + v + out + lse)
    assert kept(flash_attention, 128) == 2 * kept(flash_attention, 64)
    assert kept(standard_attention, 128) > 3 * kept(standard_attention, 64)
    assert kept(standard_attention, 128) >= 4 * 2 * 128**2


# In our Llama -------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    return Llama(
        LlamaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
        )
    )


def test_llama_computes_the_same_with_it():
    model = llama()
    x = torch.randint(0, 61, (2, 13))
    padding = torch.ones(2, 13, dtype=torch.long)
    padding[0, :4] = 0
    documents = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5]])
    tiles = FlashAttention(rows=4, cols=5)
    for arguments in ({}, {"attention_mask": padding}, {"position_ids": documents}):
        wanted = model(x, **arguments)
        found = model(x, attention=tiles, **arguments)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        gradients = []
        for out in (wanted, found):
            model.zero_grad()
            out.square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_llama_in_chunks_over_a_cache():
    """The queries stand at the end of the keys: prefill in two chunks, then decode."""
    model = llama()
    x = torch.randint(0, 61, (1, 12))
    wanted = model(x)
    cache = KVCache(2)
    chunks = [
        model(x[:, a:b], cache=cache, attention=FlashAttention(4, 4))
        for a, b in itertools.pairwise((0, 5, 11, 12))
    ]
    torch.testing.assert_close(torch.cat(chunks, 1), wanted, atol=1e-5, rtol=1e-5)


# PyTorch, as measured -----------------------------------------------------------------


def test_is_causal_of_pytorch_is_top_left():
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
    v = torch.eye(5)[None, None]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (out[0, 0] > 0).int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    ours, _ = forward(q, k, v)
    assert (ours[0, 0] > 0).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


# What is refused ----------------------------------------------------------------------


def test_refuses():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 3, 5, 8)
    with pytest.raises(ValueError, match="4 query heads must be a multiple of 3"):
        flash_attention(q, k, k)
    k = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="rows=0"):
        flash_attention(q, k, k, rows=0)
    with pytest.raises(ValueError, match="cols=0"):
        FlashAttention(4, 0)
    with pytest.raises(ValueError, match="head_dim"):
        flash_attention(torch.zeros(1, 4, 3, 7), k, k)
    with pytest.raises(ValueError, match="they must be"):
        flash_attention(q, k, k[:, :, :4])
    for mask in (torch.zeros(3, 5), torch.zeros(1, 1, 5, 3), torch.zeros(1, 2, 3, 5)):
        with pytest.raises(ValueError, match="here T=3, S=5"):
            flash_attention(q, k, k, mask)
    with pytest.raises(ValueError, match=r"int64: it must be boolean"):
        flash_attention(q, k, k, torch.ones(1, 1, 3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="requires a gradient"):
        flash_attention(q, k, k, torch.zeros(1, 1, 3, 5, requires_grad=True))
