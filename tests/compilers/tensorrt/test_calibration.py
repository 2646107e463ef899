"""Ranges from histograms: by hand, by the plain definition, and by the libraries."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmlab.compilers import tensorrt as trt
from tests.compilers.tensorrt.programs import histograms

GOLDEN = Path(__file__).parents[1] / "golden" / "tensorrt.json"
W = 1 / 256  # width of a bin in the golden histograms


def made(counts: torch.Tensor, width: float = W) -> trt.Histogram:
    return trt.Histogram(counts, width, len(counts) * width)


def test_a_calibrator_leaves_the_histogram_as_it_is():
    counts = torch.arange(512, dtype=torch.float64)
    trt.by_entropy(made(counts))
    assert counts.tolist() == list(range(512))


def plain_divergence(counts: list[int], kept: int, levels: int) -> float:
    """KL(P ‖ Q) as the definition says, bin by bin."""
    c = [float(x) for x in counts]
    c[0] = c[1]
    P = c[:kept]
    P[-1] += sum(c[kept:])
    Q = [0.0] * kept
    for level in range(levels):
        bins = [j for j in range(kept) if j * levels // kept == level]
        filled = [j for j in bins if c[j] > 0]
        for j in filled:
            Q[j] = sum(c[j] for j in filled) / len(filled)
    total = 0.0
    for p, q in zip(P, Q, strict=True):
        if p > 0 and q == 0:
            return float("inf")
        if p > 0:
            p, q = p / sum(P), q / sum(Q)
            total += p * np.log(p / q)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_divergence_is_the_definition(seed):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 30, 23) * (random.random(23) < 0.7)
    counts[[2, 5]] += 3
    found = trt.divergence(torch.from_numpy(counts), levels=8)
    wanted = [plain_divergence(counts.tolist(), i, 8) for i in range(8, 24)]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_divergence_leaves_the_counts_as_they_are():
    counts = histograms()["zeros"]
    before = counts.clone()
    trt.divergence(counts)
    trt.divergence(counts.double())
    assert torch.equal(counts, before)


@pytest.mark.parametrize("name", histograms())
def test_entropy_is_modelopts(name):
    golden = json.loads(GOLDEN.read_text())["modelopt"]
    found = trt.by_entropy(made(histograms()[name]))
    assert found == pytest.approx(golden[name]["entropy"], abs=1e-9)


@pytest.mark.parametrize("name", histograms())
def test_percentile_is_one_bin_above_modelopts(name):
    """Ours is the upper edge of the bin, so that what was asked for lies below."""
    golden = json.loads(GOLDEN.read_text())["modelopt"]
    counts = histograms()[name]
    found = trt.by_percentile(made(counts), 99.5)
    assert found == pytest.approx(golden[name]["percentile"] + W, abs=1e-9)
    below = counts[: round(found / W)].sum()
    assert below >= 0.995 * counts.sum() > counts[: round(found / W) - 1].sum()


def test_percentile_100_clips_nothing():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    h = trt.histogram([x])
    assert trt.by_percentile(h, 100.0) == float(x.abs().max()) == trt.by_max(h)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_mse_is_the_least(form):
    """Of all thresholds on the edges, by brute force on the values themselves."""
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(1)) ** 3
    h = trt.histogram([x], bins=512)
    kind = trt.FORMATS[form]

    def error(threshold):
        return float((kind.fake(x, threshold / kind.largest) - x).square().mean())

    least = min(error(i * h.width) for i in range(128, 513, 4))
    assert error(trt.by_mse(h, form)) <= 1.03 * least
    assert error(trt.by_mse(h, form)) <= 1.001 * error(trt.by_max(h))


def test_modelopts_mse_takes_the_first_candidate():
    """0.47.0 hands its settings on by place, and they arrive as others: bin 128."""
    golden = json.loads(GOLDEN.read_text())["modelopt"]
    assert {golden[name]["mse"] for name in histograms()} == {128.5 * W}


def ort_histogram(x, bins, levels):
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector("entropy", False, bins, levels, 99.99, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": x.numpy()})
    counts, edges, *_ = collector.get_histogram_dict()["x"]
    wide = (counts, edges, np.float32(-1e9), np.float32(1e9))  # no clipping to min, max
    low, high = collector.get_entropy_threshold(wide, levels)
    return torch.from_numpy(counts), torch.from_numpy(edges), float(low), float(high)


@pytest.mark.parametrize(("bins", "levels"), [(128, 128), (301, 64), (600, 128)])
@pytest.mark.parametrize("power", [1, 3])
def test_two_sided_entropy_is_onnxruntimes(bins, levels, power):
    for seed in range(3):
        x = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) ** power
        x = torch.cat([x, x[:seed] * 9])
        counts, edges, low, high = ort_histogram(x, bins, levels)
        found = trt.entropy_two_sided(counts, edges, levels)
        assert found == pytest.approx((low, high))
        if bins == levels:  # one candidate: the whole range
            assert high == pytest.approx(float(x.abs().max()))


def test_a_histogram_has_every_number_once():
    x = torch.tensor([[-2.0, 0.5], [1.0, 0.0]])
    h = trt.histogram([x, torch.tensor([0.25])], bins=256)
    assert (h.largest, h.width, int(h.counts.sum())) == (2.0, 2 / 256, 5)
    assert h.counts[[0, 32, 64, 128, 255]].tolist() == [1, 1, 1, 1, 1]
    assert h.centres[0] == h.width / 2


def test_codes():
    x = torch.tensor([-3.0, -0.5, 0.5, 1.5, 2.5, 1000.0])
    assert trt.FORMATS["int8"].codes(x, 1.0).tolist() == [-3, 0, 0, 2, 2, 127]
    e4m3 = trt.FORMATS["e4m3"].codes(torch.tensor([1.0625, 17.0, 1e9, -1e9]), 1.0)
    assert e4m3.tolist() == [1.0, 16.0, 448.0, -448.0]
    e5m2 = trt.FORMATS["e5m2"].codes(torch.tensor([1.125, 9.0, 1e9]), 1.0)
    assert e5m2.tolist() == [1.0, 8.0, 57344.0]


def test_a_scale_is_the_threshold_over_the_largest_code():
    h = made(histograms()["smooth"])
    for form, largest in (("int8", 127), ("e4m3", 448), ("e5m2", 57344)):
        assert trt.scale_of(h, "max", form) == pytest.approx(8 / largest)


def test_a_tensor_of_zeros_has_a_range():
    assert trt.scale_of(trt.histogram([torch.zeros(5)])) > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: trt.histogram([]), "tensors is empty"),
        (lambda: trt.histogram([torch.tensor([1.0, torch.nan])]), "NaN"),
        (lambda: trt.histogram([torch.ones(3)], bins=100), "bins=100"),
        (lambda: trt.by_percentile(made(torch.ones(256)), 0.0), "percentile=0"),
        (lambda: trt.divergence(torch.ones(100), 128), "100 bins"),
        (lambda: trt.scale_of(made(torch.ones(256)), "kl"), "method='kl'"),
        (lambda: trt.scale_of(made(torch.ones(256)), "max", "fp8"), "format='fp8'"),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
