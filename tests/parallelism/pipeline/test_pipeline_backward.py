"""I now, W later: the gradients of autograd, the work halved in two, and the bytes
between.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmlab.parallelism import World
from llmlab.parallelism.pipeline.backward import LateLinear, compute, make_late
from llmlab.parallelism.pipeline.memory import ActivationMeter
from llmlab.parallelism.pipeline.pipeline import Pipeline
from llmlab.parallelism.pipeline.schedules import (
    gpipe,
    one_f_one_b,
    peak_microbatches,
    zb_h1,
    zb_h2,
)
from llmlab.parallelism.pipeline.stages import split
from tests.parallelism.conftest import tiny
from tests.parallelism.pipeline.test_pipeline import microbatches


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 10, bias=bias),
        nn.SiLU(),
        nn.Linear(10, 6, bias=bias),
        nn.SiLU(),
        nn.Linear(6, 3),
    )


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_autograd(bias):
    plain = network(bias)
    late_net = copy.deepcopy(plain)
    late = make_late(late_net)
    x, dy = torch.randn(4, 5, 6), torch.randn(4, 5, 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(a).backward(dy)
    for again in range(2):  # a second time: gradients add up
        if again:
            plain(a).backward(dy)
        late_net(b).backward(dy)
        if not again:
            torch.testing.assert_close(b.grad, a.grad)
            assert all(w.grad is None for w in late_net.parameters()), (
                "I must leave the weights alone"
            )
        compute(late.take()[0])
        for mine, theirs in zip(late_net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_names_and_parameters_stay():
    net = network()
    before = dict(net.named_parameters())
    make_late(net)
    assert {n: id(w) for n, w in net.named_parameters()} == {
        n: id(w) for n, w in before.items()
    }
    assert sum(isinstance(module, LateLinear) for module in net) == 3


def test_a_frozen_weight_gets_no_gradient():
    net = network()
    net[2].weight.requires_grad_(False)
    late = make_late(net)
    net(torch.randn(4, 6)).sum().backward()
    compute(late.take()[0])
    assert (
        net[2].weight.grad is None
        and net[0].weight.grad is not None
        and net[2].bias.grad is not None
    )


def flops(part):
    with FlopCounterMode(display=False) as counter:
        out = part()
    return counter.get_total_flops(), out


def test_the_work_is_split_in_half_and_none_is_done_twice():
    """F, I and W cost the same in matrix products; together I and W cost what backward
    does.
    """
    net = network(bias=False)
    whole, late, x = (
        copy.deepcopy(net),
        make_late(net),
        torch.randn(8, 6, requires_grad=True),
    )
    forward, y = flops(lambda: net(x).sum())
    first, _ = flops(y.backward)
    second, _ = flops(lambda: compute(late.take()[0]))
    assert forward == first == second > 0
    assert forward + first + second == flops(lambda: whole(x).sum().backward())[0]


def peaks(make, p, m, rank=None):
    """The bytes that each rank held at most, and after the step."""
    batch, model = microbatches(m, (8,)), tiny(num_hidden_layers=p)

    def fn(comm, model):
        stages = split(model, comm.rank, comm.size)
        meter = ActivationMeter(w for stage in stages for w in stage.parameters())
        pipe = Pipeline(stages, comm, meter=meter)
        pipe.step(make(p, m), batch)
        return meter.peak, meter.now

    results = World(p).run(fn, model)
    assert all(now == 0 for _, now in results), "something is still held"
    return [peak for peak, _ in results]


@pytest.fixture(scope="module")
def sizes():
    """For each of 3 ranks: the bytes of one microbatch, and what comes on top at the
    peak (one gradient on its way).
    """
    one, two = peaks(gpipe, 3, 1), peaks(gpipe, 3, 2)
    return [(b - a, 2 * a - b) for a, b in zip(one, two, strict=True)]


@pytest.mark.parametrize("make", [gpipe, one_f_one_b], ids=lambda f: f.__name__)
def test_1f1b_caps_what_gpipe_does_not(make, sizes):
    """To the byte: the microbatches that the schedule says are held."""
    for m in (3, 6):
        expected = [
            n * each + top
            for n, (each, top) in zip(peak_microbatches(make(3, m)), sizes, strict=True)
        ]
        assert peaks(make, 3, m) == expected
    assert all(0 <= top < 0.06 * each for each, top in sizes)


def test_a_late_w_holds_less_than_a_late_backward(sizes):
    """M_W < M_B (Table 1 of Qi et al.): H1's first rank holds what 1F1B's does, the
    others more, but less than the first.
    """
    p, late = 3, peaks(zb_h1, 3, 6)
    assert late[0] == p * sizes[0][0] + sizes[0][1]
    for r in (1, 2):
        assert (p - r) * sizes[r][0] + sizes[r][1] < late[r] < p * sizes[r][0]
    assert peaks(zb_h2, 3, 6)[0] == (2 * p - 1) * sizes[0][0] + sizes[0][1]


def test_the_meter_counts_a_shared_input_once_and_no_parameters():
    x = torch.randn(16, 32, requires_grad=True)  # so that the weights are kept, too
    one, two = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    meter = ActivationMeter([*one.parameters(), *two.parameters()])
    with meter:
        y = one(x) + two(x)
    assert meter.now == meter.peak == 16 * 32 * 4
    y.sum().backward()
    assert meter.now == 0 and meter.peak == 16 * 32 * 4


def test_an_op_that_keeps_its_own_output_is_let_go():
    meter = ActivationMeter([])
    with meter:
        y = torch.randn(100, requires_grad=True).exp()  # keeps its result
    assert meter.now == 400
    del y
    assert meter.now == 0
