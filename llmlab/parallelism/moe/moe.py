"""Mixture of experts on one process: router, capacity, balance loss, loop over experts.

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; GShard (Lepikhin et al. 2020,
https://arxiv.org/abs/2006.16668); Switch (Fedus et al. 2021,
https://arxiv.org/abs/2101.03961); Mixtral (Jiang et al. 2024,
https://arxiv.org/abs/2401.04088). A token goes to k of E experts, and returns as
their weighted sum:

    P = softmax(W_g x)                 in fp32
    g_i = P_{e_i}                      for the k largest of P, at experts e_1 … e_k;
                                       or divided by the sum of the k
    Expert(x) = W_down (silu(W_gate x) ⊙ W_up x)
    y = Σ_i g_i · Expert_{e_i}(x)

    C = ⌈T·k/E · factor⌉               an expert takes at most C assignments; those
                                       that come later are dropped and add 0
    L = E · Σ_e f_e P̄_e                the balance loss: 1 when balanced
    f_e                                share of expert e in the T·k assignments
    P̄_e                                mean probability of expert e

    T  tokens of one group: those of one rank
    d  hidden size
    f  inner width of an expert, in shapes
    E  experts
    k  experts per token
    C  capacity of an expert

Everything but the modules at the end is a pure function of tensors. Simplified: no
noise in the router, no z-loss, no bias instead of a loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# Which assignments keep their place when an expert is full.
ORDERS = (
    "position",  # the earliest tokens
    "choice",  # all first choices before all second ones (GShard, algorithm 1)
    "weight",  # the largest weights (Megatron-LM's default)
)


@dataclass(frozen=True)
class MoEConfig:
    """The settings of the layer, but for its sizes.

    Raises:
        ValueError: a setting is out of its range, named in the message.
    """

    experts: int  # E
    top_k: int = 2  # k
    capacity_factor: float | None = None  # of the fair share; None: nothing is dropped
    order: str = "position"  # one of `ORDERS`
    renormalise: bool = True  # divide the k weights by their sum

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must be 1 … experts={self.experts}")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be positive, or None for"
                " no limit"
            )
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} must be one of {', '.join(ORDERS)}")


@dataclass(frozen=True)
class Routing:
    """Where each token goes."""

    experts: Int[Tensor, "T k"]  # most probable first
    weights: Float[Tensor, "T k"]  # g
    probs: Float[Tensor, "T E"]  # P

    @property
    def load(self) -> Int[Tensor, " E"]:
        """Assignments to each expert, before any is dropped."""
        return torch.bincount(self.experts.flatten(), minlength=self.probs.shape[1])


def route(logits: Float[Tensor, "T E"], k: int, renormalise: bool = True) -> Routing:
    """The k most probable experts of each token, in fp32 for logits of any dtype.

    Args:
        renormalise: divide the k weights by their sum (Mixtral). A Switch router, with
            k = 1, must not: its weight would be the constant 1, and the router would
            learn nothing from the loss. Qwen3-MoE's and DeepSeek-V2's routers do not,
            by default; DeepSeek-V3's does, and multiplies by 2.5.
    """
    probs = logits.float().softmax(-1)
    weights, experts = probs.topk(k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights, probs)


def capacity(T: int, k: int, E: int, factor: float) -> int:
    """C = ⌈T·k/E · factor⌉. Without the k, top-2 would have half the room it needs."""
    fair_share = T * k / E
    # Rounded first: 50 · 1.1 is 55, not the float 55.00000000000001.
    return math.ceil(round(fair_share * factor, 9))


def keep(routing: Routing, C: int, order: str = "position") -> Bool[Tensor, "T k"]:
    """Which assignments find a place, when each expert has C places.

    Args:
        order: who stands first in the queue, one of `ORDERS`.
    """
    T, k = routing.experts.shape
    E = routing.probs.shape[1]
    # The queue holds numbers of assignments: token · k + choice.
    by_token = torch.arange(T * k, device=routing.experts.device)
    match order:
        case "position":
            queue = by_token
        case "choice":
            queue = by_token.view(T, k).T.flatten()
        case "weight":
            queue = routing.weights.flatten().argsort(descending=True, stable=True)
        case _:
            raise ValueError(f"order={order!r} must be one of {', '.join(ORDERS)}")
    chosen = F.one_hot(routing.experts.flatten()[queue], E)  # (T·k, E), as queued
    # How many stand before it in the queue for the same expert. (T·k, E) -> (T·k,)
    place = (chosen.cumsum(0) * chosen).sum(-1) - 1
    kept = torch.empty_like(queue, dtype=torch.bool)
    kept[queue] = place < C  # from the order of the queue back to that of the tokens
    return kept.view(T, k)


def balance_loss(
    probs: Float[Tensor, "T E"], load: Int[Tensor, " E"], tokens: int, k: int
) -> Float[Tensor, ""]:
    """L = E · Σ_e f_e P̄_e (Switch, equation 4; for any k as in Megatron-LM).

    The gradient flows through P̄ only: f is a count. From 1, when even, to E/k. That of
    transformers goes from k to E: it does not divide f by k, and it adds up f and P̄
    of all layers before it multiplies them, where this is the loss of one layer.

    Args:
        probs: those of this process's tokens. All rows count: leave padding out.
        load: assignments to each expert, dropped ones included.
        tokens: how many tokens `load` counts. With the load of all ranks, the losses
            of the ranks add up to the loss of the whole batch.
    """
    E = probs.shape[1]
    f = load.float() / (k * tokens)  # (E,)
    return E * (f * probs.sum(0) / tokens).sum()


def expert(
    x: Float[Tensor, "n d"], gate_up: Float[Tensor, "2f d"], down: Float[Tensor, "d f"]
) -> Float[Tensor, "n d"]:
    """W_down (silu(W_gate x) ⊙ W_up x).

    Gate and up are one matrix, as in the Mixtral of transformers.
    """
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)  # (n, 2f) -> two of (n, f)
    return F.linear(F.silu(gate) * up, down)


def mixture(
    x: Float[Tensor, "T d"],
    routing: Routing,
    kept: Bool[Tensor, "T k"],
    gate_up: Float[Tensor, "E 2f d"],
    down: Float[Tensor, "E d f"],
) -> Float[Tensor, "T d"]:
    """Σ_i g_i · Expert_{e_i}(x): one expert after the other, on the tokens it keeps.

    This is what expert parallelism must equal.
    """
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, choice = ((routing.experts == e) & kept).nonzero(as_tuple=True)
        out = expert(x[token], gate_up[e], down[e])
        weights = routing.weights[token, choice, None].to(out.dtype)  # (n, 1)
        y = y.index_add(0, token, out * weights)
    return y


@dataclass(frozen=True)
class Report:
    """What one pass through the layer did, on one process."""

    balance: Tensor  # the balance loss, to be weighted and added to the loss
    load: Int[Tensor, " E"]  # assignments of these tokens to each expert
    dropped: int  # assignments of these tokens that found no place
    rows: int  # rows that this process's experts computed, padding included


class Router(nn.Module):
    """W_g, one row per expert."""

    def __init__(self, experts: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, dim) / dim**0.5)

    def forward(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "T E"]:
        """Logits in fp32: in bf16, rounding would decide between close experts."""
        return F.linear(x.float(), self.weight.float())


class Experts(nn.Module):
    """The weights of some experts, stacked."""

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.randn(experts, 2 * hidden, dim) / dim**0.5
        )
        self.down_proj = nn.Parameter(torch.randn(experts, dim, hidden) / hidden**0.5)


class MoE(nn.Module):
    """The layer on one process.

    Parameter names are those of `MixtralSparseMoeBlock` in transformers.
    """

    def __init__(self, config: MoEConfig, dim: int, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config.experts, dim)
        self.experts = Experts(config.experts, dim, hidden)

    def plan(self, x: Float[Tensor, "T d"]) -> tuple[Routing, Bool[Tensor, "T k"]]:
        """Where these tokens go, and which assignments find a place.

        The tokens are one group: capacity is counted among them.
        """
        return plan(self.gate(x), self.config)

    def forward(self, x: Float[Tensor, "T d"]) -> tuple[Float[Tensor, "T d"], Report]:
        """The outputs y, and what happened.

        The residual around the layer is not added here. It carries dropped tokens.
        """
        routing, kept = self.plan(x)
        y = mixture(x, routing, kept, self.experts.gate_up_proj, self.experts.down_proj)
        loss = balance_loss(routing.probs, routing.load, len(x), self.config.top_k)
        return y, Report(loss, routing.load, int((~kept).sum()), int(kept.sum()))


def plan(
    logits: Float[Tensor, "T E"], config: MoEConfig
) -> tuple[Routing, Bool[Tensor, "T k"]]:
    """`route`, then `keep`, with the settings of the layer."""
    routing = route(logits, config.top_k, config.renormalise)
    if config.capacity_factor is None:
        return routing, torch.ones_like(routing.experts, dtype=torch.bool)
    C = capacity(len(logits), config.top_k, config.experts, config.capacity_factor)
    return routing, keep(routing, C, config.order)
