"""HBM traffic: what the loops count is what the closed forms say."""

from __future__ import annotations

import csv

import pytest
import torch

from llmlab.inference.flash_attention import FILE, traffic
from llmlab.inference.flash_attention.traffic import HBM

SIZES = [(24, 4, 8, 6), (25, 8, 4, 7), (16, 4, 16, 16), (9, 2, 1, 2)]


def head(N, d):
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(N, d, dtype=torch.float64) for _ in range(4))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    S = inputs[0] @ inputs[1].T * d**-0.5
    out = S.softmax(-1) @ inputs[2]
    grads = torch.autograd.grad(out, inputs, do)
    return (q, k, v), do, out.detach(), S.logsumexp(-1).detach(), grads


@pytest.mark.parametrize(("N", "d", "rows", "cols"), SIZES)
def test_forward(N, d, rows, cols):
    qkv, _, out, lse, _ = head(N, d)
    hbm = HBM()
    found, P = traffic.standard(*qkv, hbm)
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(P.sum(-1), torch.ones_like(lse))
    assert hbm.elements == traffic.elements("standard", N, d)
    for way, loop in (("flash-1", traffic.flash_1), ("flash-2", traffic.flash_2)):
        hbm = HBM()
        found, found_lse = loop(*qkv, rows, cols, hbm)
        torch.testing.assert_close(found, out)
        torch.testing.assert_close(found_lse, lse)
        assert hbm.elements == traffic.elements(way, N, d, rows, cols)


@pytest.mark.parametrize(("N", "d", "rows", "cols"), SIZES)
def test_backward(N, d, rows, cols):
    qkv, do, out, lse, grads = head(N, d)
    _, P = traffic.standard(*qkv, HBM())
    hbm = HBM()
    found = traffic.standard_backward(*qkv, P, do, hbm)
    assert hbm.elements == traffic.elements("standard backward", N, d)
    ways = {"flash-1": traffic.flash_1_backward, "flash-2": traffic.flash_2_backward}
    for way, loop in ways.items():
        hbm = HBM()
        again = loop(*qkv, out, lse, do, rows, cols, hbm)
        wanted = traffic.elements(f"{way} backward", N, d, rows, cols)
        assert hbm.elements == wanted
        for a, b, c in zip(found, again, grads, strict=True):
            torch.testing.assert_close(a, c)
            torch.testing.assert_close(b, c)


def test_who_goes_to_and_fro():
    """Flash-1 sends queries, O, m and l past the keys; flash-2 keys past queries."""
    qkv, *_ = head(24, 4)
    one, two = HBM(), HBM()
    traffic.flash_1(*qkv, 8, 6, one)
    traffic.flash_2(*qkv, 8, 6, two)
    assert one.loaded["K"] == 24 * 4
    assert one.loaded["Q"] == one.loaded["O"] == 4 * 24 * 4  # 4 blocks of keys
    assert two.loaded["Q"] == two.stored["O"] == 24 * 4
    assert two.loaded["K"] == two.loaded["V"] == 3 * 24 * 4  # 3 blocks of queries
    assert "m" not in two.loaded + two.stored


def test_theorem_2():
    """With cols = M / 4d, twice the fast memory halves what grows with N²."""
    N, d = 2**16, 64
    moved = []
    for M in (2**15, 2**16, 2**17):
        rows, cols = traffic.paper_tiles(M, d)
        assert (rows, cols) == (64, M // 256)
        moved.append(traffic.elements("flash-1", N, d, rows, cols))
        # 3 N d and 4 N for each of the 4 N d / M blocks of keys
        assert moved[-1] / (4 * N * N * d / M * (3 * d + 4)) == pytest.approx(
            1, abs=0.01
        )
    assert moved[0] / moved[1] == pytest.approx(2, abs=0.02)
    assert moved[1] / moved[2] == pytest.approx(2, abs=0.02)


def test_the_papers_example():
    """Dao et al. 2022, figure 2: GPT-2 medium, N = 1024, d = 64, 16 heads, batch 64."""
    heads, N, d = 16 * 64, 1024, 64
    rows, cols = traffic.paper_tiles(192 * 1024 // 2, d)  # 192 KB of 16-bit numbers
    assert (rows, cols) == (64, 384)
    flash = sum(
        traffic.elements(way, N, d, rows, cols)
        for way in ("flash-1", "flash-1 backward")
    )
    assert flash * heads * 2 / 1e9 == pytest.approx(4.4, rel=0.1)
    standard = sum(
        traffic.elements(way, N, d) for way in ("standard", "standard backward")
    )
    assert 20e9 < standard * heads * 2 < 40.3e9  # no masking and no dropout here
    ratio = traffic.matmul_flops(N, d, flash=True) / traffic.matmul_flops(N, d)
    assert ratio == pytest.approx(7 / 6)


def test_chip_bytes():
    # Q, K, V of 2 bytes; S and O of 4
    assert traffic.chip_bytes(64, 32, 16) == 2 * 16 * (64 + 32 + 32) + 4 * (
        64 * 32 + 64 * 16
    )


def test_refuses():
    with pytest.raises(ValueError, match="way='flash-3' must be one of standard"):
        traffic.elements("flash-3", 4, 4)
    with pytest.raises(ValueError, match="cols=0 must be at least 1"):
        traffic.elements("flash-1", 4, 4, 1, 0)


def test_the_stored_runs():
    """What was measured: memory by the square without tiles, by the tokens with."""
    with FILE.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 20
    runs = {(r["way"], int(r["tokens"])): r for r in lines}
    saved = {key: float(r["saved_mib"]) for key, r in runs.items()}
    for n in (1024, 2048, 4096, 8192):
        kept = (4 * 64 + 1) * n * 4 / 2**20  # q, k, v, the output, a number per query
        assert saved["tiles", n] == pytest.approx(kept, abs=0.02)
        assert saved["sdpa flash", n] == pytest.approx(kept, abs=0.02)
        assert saved["standard", n] > n * n * 4 / 2**20
