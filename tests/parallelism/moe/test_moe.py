"""The router, capacity, the balance loss and the layer on one process: against
transformers, Megatron-core and enumeration.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism.moe.moe import (
    ORDERS,
    MoE,
    MoEConfig,
    Routing,
    balance_loss,
    capacity,
    expert,
    keep,
    mixture,
    plan,
    route,
)

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "megatron_moe.json").read_text(
        encoding="utf-8"
    )
)["cases"]


def scattered(routing, values):
    """(T, E): a token's weight at each expert, 0 elsewhere."""
    return torch.zeros_like(routing.probs).scatter(
        1, routing.experts, values.to(routing.probs.dtype)
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"k={c['k']}")
def test_router_of_megatron(case):
    logits, k = torch.tensor(case["logits"]), case["k"]
    for renormalise, name in ((True, "renormalised"), (False, "plain")):
        routing = route(logits, k, renormalise)
        torch.testing.assert_close(
            scattered(routing, routing.weights), torch.tensor(case[name])
        )
        assert torch.equal(
            scattered(routing, torch.ones_like(routing.weights)).int(),
            torch.tensor(case["chosen"]).int(),
        )
        assert torch.equal(routing.load, torch.tensor(case["chosen"]).sum(0))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"k={c['k']}")
def test_capacity_and_dropping_of_megatron(case):
    """drop_policy="probs": the largest weights keep their places."""
    routing = route(torch.tensor(case["logits"]), case["k"], renormalise=False)
    T, E = routing.probs.shape
    for factor, golden in case["drops"].items():
        C = capacity(T, case["k"], E, float(factor))
        assert golden["capacity"] == C
        kept = keep(routing, C, "weight")
        assert torch.equal(
            scattered(routing, kept).int(), torch.tensor(golden["kept"]).int()
        )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"k={c['k']}")
def test_balance_loss_of_megatron(case):
    logits = torch.tensor(case["logits"]).requires_grad_()
    routing = route(logits, case["k"])
    loss = balance_loss(routing.probs, routing.load, len(logits), case["k"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    torch.testing.assert_close(
        logits.grad, torch.tensor(case["gradient"]), atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_of_transformers(k):
    """Theirs adds up the k choices where Megatron's averages them: k times ours."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    routing = route(logits, k)
    theirs = mixtral.load_balancing_loss_func((logits,), num_experts=6, top_k=k)
    assert k * balance_loss(routing.probs, routing.load, 40, k).item() == pytest.approx(
        theirs.item(), rel=1e-6
    )


def test_balance_loss_is_one_when_balanced_and_e_over_k_at_worst():
    T, E, k = 12, 6, 2
    even = torch.full((T, E), 1 / E)
    assert balance_loss(
        even, torch.full((E,), T * k // E), T, k
    ).item() == pytest.approx(1)
    probs = torch.zeros(T, E)
    probs[:, :k] = 1 / k
    assert balance_loss(
        probs, torch.tensor([T] * k + [0] * (E - k)), T, k
    ).item() == pytest.approx(E / k)


def test_balance_loss_counts_what_was_dropped():
    """Else an expert that is full would look balanced."""
    logits = torch.zeros(8, 4)
    logits[:, 0] = 3
    _, report = layer(logits, capacity_factor=1.0, top_k=1)
    assert report.dropped == 6 and report.load.tolist() == [8, 0, 0, 0]
    assert report.balance > 2


def layer(logits, **settings):
    """A layer whose router gives these logits: its inputs are unit vectors."""
    T, E = logits.shape
    moe = MoE(MoEConfig(E, **settings), T, 5)
    moe.gate.weight.data = logits.T.contiguous()
    return moe(torch.eye(T))


def test_capacity():
    """⌈T·k/E · factor⌉: k counts, it rounds up, and 1.1 does not round up what is
    whole.
    """
    assert capacity(8, 2, 4, 1.0) == 4 and capacity(8, 1, 4, 1.0) == 2
    assert capacity(9, 1, 4, 1.0) == 3 and capacity(64, 2, 8, 1.25) == 20
    assert capacity(250, 1, 5, 1.1) == 55, "the float 50 · 1.1 is 55.00000000000001"


def test_who_keeps_a_place():
    """Three tokens, two choices each; expert 0 is wanted by all and has two places."""
    experts = torch.tensor([[1, 0], [0, 2], [0, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    routing = Routing(experts, weights, torch.zeros(3, 3))
    T, f = True, False
    # the last token comes too late
    assert keep(routing, 2, "position").tolist() == [[T, T], [T, T], [f, T]]
    # the only second choice does
    assert keep(routing, 2, "choice").tolist() == [[T, f], [T, T], [T, T]]
    assert keep(routing, 2, "weight").tolist() == [[T, f], [T, T], [T, T]]
    assert keep(routing, 1, "weight").tolist() == [[T, f], [f, T], [T, f]]
    assert keep(routing, 3, "position").all() and not keep(routing, 0, "weight").any()


@pytest.mark.parametrize("order", ORDERS)
def test_nobody_gets_more_than_the_capacity_and_no_place_stays_empty(order):
    routing = route(
        torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 2, 2
    )
    for C in (1, 7, 17, 50):
        kept = keep(routing, C, order)
        got = torch.bincount(routing.experts[kept], minlength=6)
        assert torch.equal(got, routing.load.clamp_max(C))


def test_routing_is_in_fp32():
    """Two logits that bf16 products cannot tell apart: the router upcasts inputs and
    weights, not the result.
    """
    moe = MoE(MoEConfig(2, top_k=1), 4, 3).bfloat16()
    moe.gate.weight.data = torch.tensor([[1.0, 2**-7, 0, 0], [1.0, 0, 0, 0]]).bfloat16()
    x = torch.tensor([[64.0, 1.0, 0, 0]]).bfloat16()  # 64.0078 and 64: equal in bf16
    assert F.linear(x, moe.gate.weight).unique().numel() == 1
    routing, _ = moe.plan(x)
    assert (
        routing.experts.tolist() == [[0]]
        and routing.probs.dtype == routing.weights.dtype == torch.float32
    )
    assert 0.501 < routing.probs[0, 0] < 0.503


def test_logits_of_16_bits_are_routed_in_fp32():
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, exact = route(logits, 2), route(logits.float(), 2)
    assert ours.probs.dtype == torch.float32 and torch.equal(
        ours.weights, exact.weights
    )
    assert torch.equal(ours.experts, exact.experts)


def test_a_dropped_token_adds_zero():
    torch.manual_seed(0)
    moe = MoE(MoEConfig(2, top_k=1, capacity_factor=0.5), 3, 4)
    # ties: everybody wants expert 0, which has ⌈4/2 · 0.5⌉ = 1 place
    moe.gate.weight.data.zero_()
    x = torch.randn(4, 3, requires_grad=True)
    y, report = moe(x)
    assert report.dropped == 3 and report.rows == 1
    assert y[1:].count_nonzero() == 0 and y[0].count_nonzero() == 3
    y.sum().backward()
    assert x.grad[1:].count_nonzero() == 0, (
        "nor a gradient, but for the residual around the layer"
    )


def test_weights_are_not_renormalised_after_a_drop():
    """The weight of a dropped assignment is lost, not handed to the other one."""
    routing = Routing(
        torch.tensor([[0, 1], [0, 1]]),
        torch.tensor([[0.75, 0.25]] * 2),
        torch.zeros(2, 2),
    )
    torch.manual_seed(0)
    gate_up, down, x = torch.randn(2, 8, 3), torch.randn(2, 3, 4), torch.randn(2, 3)
    kept = torch.tensor([[True, True], [False, True]])
    y = mixture(x, routing, kept, gate_up, down)
    torch.testing.assert_close(y[1], 0.25 * expert(x[1:], gate_up[1], down[1])[0])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_layer_is_mixtrals(k):
    """transformers' MixtralSparseMoeBlock with the same weights: output and every
    gradient.
    """
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=12, intermediate_size=20, num_local_experts=6, num_experts_per_tok=k
    )
    config._experts_implementation = "eager"  # or it complains of being used alone
    torch.manual_seed(0)
    theirs, ours = (
        mixtral.MixtralSparseMoeBlock(config),
        MoE(MoEConfig(6, top_k=k), 12, 20),
    )
    theirs.load_state_dict(ours.state_dict())
    x, up = torch.randn(3, 7, 12), torch.randn(3, 7, 12)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    y, _ = ours(a.flatten(0, 1))
    z = theirs(b)
    torch.testing.assert_close(y.view_as(z), z, atol=1e-5, rtol=0)
    (y.view_as(up) * up).sum().backward()
    (z * up).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_with_one_expert_it_is_an_mlp():
    moe = MoE(MoEConfig(1, top_k=1), 4, 6)
    x = torch.randn(5, 4)
    torch.testing.assert_close(
        moe(x)[0], expert(x, moe.experts.gate_up_proj[0], moe.experts.down_proj[0])
    )


def test_a_switch_router_learns_only_without_renormalisation():
    """k = 1: a weight divided by itself is 1, and its gradient 0."""
    for renormalise in (False, True):
        moe = MoE(MoEConfig(4, top_k=1, renormalise=renormalise), 6, 5)
        moe(torch.randn(9, 6))[0].sum().backward()
        assert bool(moe.gate.weight.grad.abs().max() < 1e-6) is renormalise


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"experts": 4, "top_k": 5}, "top_k=5 must be 1 … experts=4"),
        (
            {"experts": 4, "capacity_factor": 0.0},
            "capacity_factor=0.0 must be positive",
        ),
        ({"experts": 4, "order": "luck"}, "order='luck'"),
    ],
)
def test_nonsense_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        MoEConfig(**settings)
    if "order" in settings:
        with pytest.raises(ValueError, match=says):
            keep(route(torch.zeros(2, 2), 1), 1, "luck")


def test_plan_without_a_capacity_drops_nobody():
    assert plan(torch.randn(30, 4) * 9, MoEConfig(4))[1].all()
