"""What each fused kernel computes, against the unfused formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmlab.inference.fused_transformers import pieces
from llmlab.models.llama import RMSNorm, rope_tables, rotate

H, K, D, d = 6, 2, 4, 10


def weights(*extra: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(n * D, *extra) for n in (H, K, K))


@pytest.mark.parametrize("extra", [(d,), ()], ids=["weights", "biases"])
def test_one_product_gives_q_k_and_v(extra):
    q, k, v = weights(*extra)
    packed = pieces.pack_qkv(q, k, v)
    x = torch.randn(5, *extra)
    both = packed @ x.T if extra else packed
    expected = [(w @ x.T if extra else w) for w in (q, k, v)]
    torch.testing.assert_close(both, torch.cat(expected))


def test_split_gives_the_heads_back_as_views():
    q, k, v = weights(d)
    x = torch.randn(5, d)
    qkv = x @ pieces.pack_qkv(q, k, v).T
    found = pieces.split_qkv(qkv, H, K, D)
    for part, weight in zip(found, (q, k, v), strict=True):
        expected = (x @ weight.T).view(5, -1, D)
        torch.testing.assert_close(part, expected)
        assert part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


def test_in_parts_each_device_has_its_own_heads():
    """Megatron-LM's order: a key head after the query heads that share it."""
    q, k, v = weights(d)
    packed = pieces.pack_qkv(q, k, v, parts=K)
    rows = []
    for g in range(K):
        share = H // K * D
        rows += [q[g * share : (g + 1) * share]]
        rows += [k[g * D : (g + 1) * D], v[g * D : (g + 1) * D]]
    torch.testing.assert_close(packed, torch.cat(rows))


@pytest.mark.parametrize("parts", [0, 3])
def test_parts_that_do_not_divide_are_refused(parts):
    q, k, v = weights(d)
    with pytest.raises(ValueError, match=f"parts={parts} must be at least 1 and div"):
        pieces.pack_qkv(q, k, v, parts)


def test_add_rms_norm_by_hand():
    """(1, 5) + (2, −1) = (3, 4), whose mean square is 12.5."""
    x, r = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, -1.0]])
    y, total = pieces.add_rms_norm(x, r, torch.tensor([1.0, 10.0]), 0.0)
    assert total.tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(y, torch.tensor([[3.0, 40.0]]) / 12.5**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_is_the_norm_of_the_sum(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(7, eps=0.3)
    torch.nn.init.normal_(norm.weight)
    norm.to(dtype)
    x, r = torch.randn(2, 5, 7).to(dtype)
    y, total = pieces.add_rms_norm(x, r, norm.weight, norm.eps)
    assert y.dtype == total.dtype == dtype
    torch.testing.assert_close(total, x + r, rtol=0, atol=0)
    torch.testing.assert_close(y, norm(x + r))


def test_the_gradients_are_those_of_the_two_steps():
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=0.1)
    inputs = [torch.randn(3, 6, requires_grad=True) for _ in range(2)]
    gate_up = torch.randn(3, 8, requires_grad=True)
    y, total = pieces.add_rms_norm(*inputs, norm.weight, norm.eps)
    ours = (y * total).sum() + pieces.swiglu(gate_up).square().sum()
    added = inputs[0] + inputs[1]
    gate, up = gate_up.chunk(2, -1)
    theirs = (norm(added) * added).sum() + (F.silu(gate) * up).square().sum()
    known = (*inputs, norm.weight, gate_up)
    for a, b in zip(
        torch.autograd.grad(ours, known),
        torch.autograd.grad(theirs, known),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("B", "T", "start"), [(1, 1, 5), (2, 3, 0), (3, 2, 4)])
def test_rope_and_store_turns_and_writes(B, T, start):
    torch.manual_seed(0)
    qkv = torch.randn(B * T, (H + 2 * K) * D)
    positions = torch.arange(start, start + T)
    theta = torch.tensor([1.0, 0.3])
    cos, sin = rope_tables(positions[None], theta)  # (1, 1, T, D)
    half = [x[0, 0, :, : D // 2].repeat(B, 1) for x in (cos, sin)]
    keys, values = torch.randn(2, B, K, 9, D)
    before = keys.clone(), values.clone()
    found = pieces.rope_and_store(qkv, *half, keys, values, start)

    q, k, v = (
        x.unflatten(0, (B, T)).transpose(1, 2) for x in pieces.split_qkv(qkv, H, K, D)
    )
    torch.testing.assert_close(found, rotate(q, cos, sin))
    new = slice(start, start + T)
    torch.testing.assert_close(keys[:, :, new], rotate(k, cos, sin))
    torch.testing.assert_close(values[:, :, new], v)
    for now, old in ((keys, before[0]), (values, before[1])):
        assert torch.equal(now[:, :, :start], old[:, :, :start])
        assert torch.equal(now[:, :, start + T :], old[:, :, start + T :])
    # in memory token after token, as W_o will read what attention makes of it
    assert found.transpose(1, 2).is_contiguous()
