"""Activation memory: the formula of the paper is what the running layer saves;
recomputation changes memory and nothing else.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmlab.parallelism import World, launch
from llmlab.parallelism.sequence.activation_memory import (
    RECOMPUTE,
    GPTShape,
    Peak,
    Saved,
    layer_bytes,
    recompute_flops,
)
from llmlab.parallelism.sequence.recomputation import GPTLayer, dropout, recompute

SHAPE = GPTShape(s=24, b=3, h=32, a=8)
# The paper leaves these out: a mean and a deviation per token, of two norms, 2 bytes
# each.
STATISTICS = 8 * SHAPE.s * SHAPE.b


def layer_input(comm, cut):
    x = torch.randn(
        SHAPE.b, SHAPE.s, SHAPE.h, generator=torch.Generator().manual_seed(3)
    )
    return x.chunk(comm.size, 1)[comm.rank].clone() if cut else x


@pytest.mark.parametrize("kind", RECOMPUTE)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("t", [1, 2, 4, 8])
def test_the_layer_saves_what_the_paper_says(t, cut, kind):
    """Every row of table 2, on every rank, to the byte."""

    def fn(comm):
        layer = GPTLayer(SHAPE, comm, sequence_parallel=cut, recompute=kind)
        x = layer_input(comm, cut).bfloat16().requires_grad_()
        with Saved(layer.parameters()) as saved:
            layer(x)
        return saved.bytes

    statistics = 0 if kind == "full" else STATISTICS / (t if cut else 1)
    expected = layer_bytes(SHAPE, t, sequence_parallel=cut, recompute=kind) + statistics
    assert World(t).run(fn) == [expected] * t


def test_the_formula_itself():
    """GPT-3's layer: 5as/h = 80, so selective recomputation leaves 34 of 114."""
    gpt3 = GPTShape(s=2048, b=1, h=12288, a=96)
    sbh = 2048 * 12288
    assert layer_bytes(gpt3) == sbh * 114
    assert layer_bytes(gpt3, recompute="selective") == sbh * 34
    assert layer_bytes(gpt3, 8) == sbh * (10 + 24 / 8 + 80 / 8)
    assert layer_bytes(gpt3, 8, sequence_parallel=True) == layer_bytes(gpt3) / 8
    assert layer_bytes(gpt3, 8, recompute="full") == sbh * 2


def run(comm, kind, cut=False, p=0.1, dtype=torch.float32):
    layer = GPTLayer(
        SHAPE, comm, sequence_parallel=cut, recompute=kind, p=p, dtype=dtype
    )
    x = layer_input(comm, cut).to(dtype).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), x.grad, [w.grad for w in layer.parameters()]


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("t", [1, 2])
def test_recomputation_changes_no_bit(t, kind):
    """Dropout included: the second run draws the first one's masks."""
    for (y, dx, dw), (y0, dx0, dw0) in zip(
        World(t).run(run, kind), World(t).run(run, "none"), strict=True
    ):
        assert torch.equal(y, y0) and torch.equal(dx, dx0)
        assert all(torch.equal(a, b) for a, b in zip(dw, dw0, strict=True))


def test_recomputation_leaves_the_generator_where_it_was():
    """Another layer drew in between; what comes after the backward pass must not draw
    its numbers again.
    """
    g, h = (torch.Generator().manual_seed(0) for _ in range(2))
    y = recompute(
        lambda t: dropout(t, 0.5, g),
        torch.ones(64, requires_grad=True),
        generators=(g,),
    )
    torch.rand(8, generator=g)
    y.sum().backward()
    torch.rand(64, generator=h), torch.rand(8, generator=h)
    assert torch.equal(torch.rand(4, generator=g), torch.rand(4, generator=h))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("t", [2, 4])
def test_the_split_layer_is_the_whole_layer(t, cut):
    y0, dx0, dw0 = World(1).run(run, "none", False, 0.0)[0]
    results = World(t).run(run, "selective", cut, 0.0)
    for r, (y, dx, _) in enumerate(results):
        take = (lambda whole: whole.chunk(t, 1)[r]) if cut else (lambda whole: whole)  # noqa: B023
        torch.testing.assert_close(y, take(y0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(dx, take(dx0), atol=1e-4, rtol=1e-4)
    q = torch.cat([dw[0] for _, _, dw in results])
    torch.testing.assert_close(q, dw0[0], atol=1e-4, rtol=1e-4)


def test_in_real_processes():
    for got, expected in zip(
        launch(run, 2, "selective", True),
        World(2).run(run, "selective", True),
        strict=True,
    ):
        torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [False, True])
def test_dropout_differs_where_activations_are_cut_and_agrees_where_they_are_whole(cut):
    def fn(comm):
        layer = GPTLayer(SHAPE, comm, sequence_parallel=cut)
        return [torch.rand(16, generator=g) for g in (layer.split, layer.whole)]

    (split_0, whole_0), (split_1, whole_1) = World(2).run(fn)
    assert not torch.equal(split_0, split_1)
    assert torch.equal(whole_0, whole_1) is not cut


@pytest.mark.parametrize("kind", ["none", "selective"])
def test_flops_are_those_of_appendix_a(kind):
    """PyTorch's counter: 3 · (24bsh² + 4bs²h), and 4bs²h more, once, for selective
    recomputation.
    """

    def fn(comm):
        layer = GPTLayer(SHAPE, comm, recompute=kind)
        x = layer_input(comm, False).bfloat16().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        return counter.get_total_flops()

    model, more = recompute_flops(SHAPE)
    assert World(1).run(fn)[0] == model + (more if kind == "selective" else 0)


def test_dropout():
    x = torch.ones(4000, requires_grad=True)
    y = dropout(x, 0.25, torch.Generator().manual_seed(0))
    y.sum().backward()
    kept = y != 0
    assert 0.72 < kept.float().mean() < 0.78
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75)) and torch.equal(
        x.grad, y.detach()
    )


# The counters


def test_saved_counts_each_storage_once_and_no_parameter():
    w, x = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(2, 4, requires_grad=True)
    with Saved([w]) as saved:
        (x @ w).exp() + (x @ w.T)  # x twice; exp saves its result
    assert saved.bytes == (8 + 8) * 4
    assert saved.kinds == [((2, 4), "float32", 32), ((2, 4), "float32", 32)]
    with Saved() as whole_storage:
        x[:1] @ w
    assert whole_storage.bytes == (8 + 16) * 4, "a view keeps its storage alive"


def test_peak_counts_what_is_alive_together():
    with Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b + 1
        view = c[:10]
        b.add_(1)
    assert peak.peak == 8000 and peak.now == 8000
    del b, c
    assert peak.now == 4000, "the view keeps its storage alive"
    del view
    assert peak.now == 0


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="h=30 must be a multiple of a=8"):
        GPTShape(8, 1, 30, 8)
    with pytest.raises(ValueError, match="recompute='some'"):
        layer_bytes(SHAPE, recompute="some")
    with pytest.raises(ValueError, match="must be multiples of 3 ranks"):
        World(3).run(lambda comm: GPTLayer(SHAPE, comm) and None)
