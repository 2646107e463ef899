"""The kernels in C against the pieces that they compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmlab.inference.fused_transformers import count, kernels, pieces

needs_c = pytest.mark.skipif(
    kernels.library() is None, reason="there is no C compiler here"
)
ROWS = [(1, 1), (1, 7), (3, 16), (5, 33), (70, 1030)]


@needs_c
@torch.no_grad()
@pytest.mark.parametrize(("N", "d"), ROWS)
def test_add_rms_norm(N, d):
    torch.manual_seed(0)
    x, r, w = torch.randn(N, d), torch.randn(N, d), torch.randn(d)
    expected = pieces.add_rms_norm(x, r, w, 0.02)
    kept = x.clone()
    y, total = kernels.add_rms_norm(x, r, w, 0.02)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(total, expected[1])
    assert total is r  # in place
    assert torch.equal(x, kept)


@needs_c
@torch.no_grad()
def test_nothing_to_add():
    r, w = torch.randn(3, 9), torch.randn(9)
    y, total = kernels.add_rms_norm(None, r, w, 1e-5)
    expected = pieces.add_rms_norm(torch.zeros(3, 9), r, w, 1e-5)
    torch.testing.assert_close(y, expected[0])
    assert torch.equal(total, expected[1])


@needs_c
@torch.no_grad()
@pytest.mark.parametrize(("N", "f"), ROWS)
def test_swiglu(N, f):
    x = torch.randn(N, 2 * f) * 4
    torch.testing.assert_close(kernels.swiglu(x), pieces.swiglu(x))


@needs_c
@torch.no_grad()
def test_the_exponential_at_all_sizes():
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.linspace(-1, 1, 4001)])
    found = kernels.swiglu(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    exact = F.silu(gate.double())
    assert found.isfinite().all()
    close = (found - exact).abs() <= 4e-7 * exact.abs() + 1e-35
    assert close.all(), gate[~close]


@needs_c
@torch.no_grad()
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D", "start"),
    [(1, 1, 1, 1, 2, 3), (2, 3, 6, 2, 6, 0), (3, 2, 4, 1, 10, 4), (2, 40, 9, 3, 64, 0)],
)
def test_rope_and_store(B, T, H, K, D, start):
    torch.manual_seed(0)
    qkv = torch.randn(B * T, (H + 2 * K) * D)
    tables = torch.randn(2, B * T, D // 2)
    caches = [torch.randn(B, K, start + T + 2, D) for _ in range(2)]
    copies = [x.clone() for x in caches]
    found = kernels.rope_and_store(qkv, *tables, *caches, start)
    expected = pieces.rope_and_store(qkv, *tables, *copies, start)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    for a, b in zip(caches, copies, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("start", [-1, 3])
def test_a_full_cache_is_refused(start):
    qkv, tables = torch.randn(2, 12), torch.randn(2, 2, 2)
    caches = torch.zeros(2, 1, 1, 4, 4)
    with pytest.raises(ValueError, match=f"start={start} and 2 new tokens"):
        kernels.rope_and_store(qkv, *tables, *caches, start)


@needs_c
@torch.no_grad()
def test_each_is_one_launch():
    x, r, w = torch.randn(2, 6), torch.randn(2, 6), torch.randn(6)
    counter = count(kernels.add_rms_norm, x, r, w, 1e-5)
    assert [launch.name for launch in counter.launches] == ["add_rms_norm"]
    assert counter.bytes == 4 * (12 + 12 + 6 + 12 + 12)
    counter = count(kernels.add_rms_norm, None, r, w, 1e-5)
    assert counter.bytes == 4 * (12 + 6 + 12)
    counter = count(kernels.swiglu, torch.randn(2, 8))
    assert [launch.name for launch in counter.launches] == ["swiglu"]
    assert counter.bytes == 4 * (16 + 8)


def test_what_c_cannot_take_goes_to_pytorch():
    """Other types, other orders in memory, and where a gradient is owed."""
    x = torch.randn(3, 8)
    for other in (x.double(), x.bfloat16(), torch.randn(8, 3).T):
        assert not kernels.fits_c(other)
        torch.testing.assert_close(kernels.swiglu(other), pieces.swiglu(other))
    trained = x.clone().requires_grad_()
    kernels.swiglu(trained).sum().backward()
    expected = x.clone().requires_grad_()
    pieces.swiglu(expected).sum().backward()
    torch.testing.assert_close(trained.grad, expected.grad)


def test_without_a_compiler_pytorch_does_it(monkeypatch):
    monkeypatch.setattr("llmlab.models.c_library.compiler", lambda: None)
    kernels.library.cache_clear()
    try:
        assert kernels.describe() == "PyTorch (no C compiler here)"
        x = torch.randn(2, 6)
        torch.testing.assert_close(kernels.swiglu(x), pieces.swiglu(x))
    finally:
        kernels.library.cache_clear()


# Weights of 8 bits --------------------------------------------------------------------


@torch.no_grad()
def test_codes_are_off_by_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(5, 9)
    weight[3] = 0
    codes, scale = kernels.to_8bit(weight)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    error = (codes * scale[:, None] - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()


@torch.no_grad()
@pytest.mark.parametrize("N", [1, 3, kernels.FEW, kernels.FEW + 1])
def test_products_with_codes(N):
    torch.manual_seed(0)
    codes, scale = kernels.to_8bit(torch.randn(11, 70))
    x = torch.randn(N, 70)
    expected = x @ (codes * scale[:, None]).T
    found = kernels.linear_8bit(x, codes, scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
