"""Mixture of experts on one process: a router, capacity, the balance loss, and a loop
over experts.

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; GShard (Lepikhin et al. 2020,
https://arxiv.org/abs/2006.16668); Switch (Fedus et al. 2021,
https://arxiv.org/abs/2101.03961); Mixtral (Jiang et al. 2024,
https://arxiv.org/abs/2401.04088). A token goes to k of E experts, and comes back as
their weighted sum:

    P = softmax(W_g x)  in fp32        top-k of P: experts e_1 … e_k        g_i =
                                       P_{e_i}  (or divided by their sum)
    y = Σ_i g_i · Expert_{e_i}(x)           Expert(x) = W_down (silu(W_gate x) ⊙ W_up x)

    C = ⌈T·k/E · factor⌉               an expert takes at most C tokens; who comes too
                                       late is dropped and adds 0
    L = E · Σ_e f_e P̄_e                f_e the share of the T·k assignments, P̄_e the
                                        mean probability; 1 when balanced

    T  tokens (of one group: a rank's)     d  hidden size     E  experts     k  experts
                                              a token     C  capacity

Everything but `MoE` is a pure function of tensors. Simplified: no noise in the router,
no z-loss, no bias instead of a loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# Who keeps a place when an expert is full: the earliest token; all first choices before
# all second ones, earliest first (GShard, algorithm 1); the largest weight
# (Megatron-LM's default).
ORDERS = ("position", "choice", "weight")


@dataclass(frozen=True)
class MoEConfig:
    """E experts, k a token; capacity as a factor of the fair share (None: no token is
    dropped).
    """

    experts: int
    top_k: int = 2
    capacity_factor: float | None = None
    order: str = "position"
    renormalise: bool = True

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
    """Where each token goes: its experts, best first, their weights, and all
    probabilities.
    """

    experts: Int[Tensor, "T k"]
    weights: Float[Tensor, "T k"]
    probs: Float[Tensor, "T E"]

    @property
    def load(self) -> Int[Tensor, " E"]:
        """Assignments to each expert, before any is dropped."""
        return torch.bincount(self.experts.flatten(), minlength=self.probs.shape[1])


def route(logits: Float[Tensor, "T E"], k: int, renormalise: bool = True) -> Routing:
    """The k most probable experts of each token, in fp32 whatever the dtype of the
    logits.

    Args:
        renormalise: divide the k weights by their sum (Mixtral). A Switch router, k =
            1, must not: its weight would be the constant 1, and the router would learn
            nothing from the loss.
    """
    probs = logits.float().softmax(-1)
    weights, experts = probs.topk(k, dim=-1)
    return Routing(
        experts,
        weights / weights.sum(-1, keepdim=True) if renormalise else weights,
        probs,
    )


def capacity(T: int, k: int, E: int, factor: float) -> int:
    """C = ⌈T·k/E · factor⌉: k counts, or top-2 would have half the room that it
    needs.
    """
    # 50 · 1.1 is 55, and not the float 55.00000000000001
    return math.ceil(round(T * k / E * factor, 9))


def keep(routing: Routing, C: int, order: str = "position") -> Bool[Tensor, "T k"]:
    """Which assignments find a place, when each expert has C."""
    T, k = routing.experts.shape
    # (token 0, choice 0), (token 0, choice 1), …
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
    # (T·k, E), in the order of the queue
    chosen = F.one_hot(routing.experts.flatten()[queue], routing.probs.shape[1])
    # how many came before, at the same expert
    place = (chosen.cumsum(0) * chosen).sum(-1) - 1
    kept = torch.empty_like(queue, dtype=torch.bool)
    kept[queue] = place < C
    return kept.view(T, k)


def balance_loss(
    probs: Float[Tensor, "T E"], load: Int[Tensor, " E"], tokens: int, k: int
) -> Float[Tensor, ""]:
    """L = E · Σ_e f_e P̄_e (Switch, equation 4; Megatron-LM's for any k). The gradient
    flows through P̄ only.

    Args:
        probs: of this process' tokens. load: assignments to each expert, dropped ones
            included.
        tokens: that `load` counts. With the load of all ranks, the ranks' losses add up
            to the loss of the whole batch.
    """
    f = load.float() / (k * tokens)
    return probs.shape[1] * (f * probs.sum(0) / tokens).sum()


def expert(
    x: Float[Tensor, "n d"], gate_up: Float[Tensor, "2f d"], down: Float[Tensor, "d f"]
) -> Float[Tensor, "n d"]:
    """W_down (silu(W_gate x) ⊙ W_up x), gate and up in one matrix as transformers'
    Mixtral keeps them.
    """
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def mixture(
    x: Float[Tensor, "T d"],
    routing: Routing,
    kept: Bool[Tensor, "T k"],
    gate_up: Float[Tensor, "E 2f d"],
    down: Float[Tensor, "E d f"],
) -> Float[Tensor, "T d"]:
    """Σ_i g_i · Expert_{e_i}(x): every expert in turn, on the tokens that it keeps.
    What expert parallelism must equal.
    """
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, choice = ((routing.experts == e) & kept).nonzero(as_tuple=True)
        out = expert(x[token], gate_up[e], down[e])
        y = y.index_add(
            0, token, out * routing.weights[token, choice, None].to(out.dtype)
        )
    return y


@dataclass(frozen=True)
class Report:
    """What one pass through the layer did, on one process."""

    balance: Tensor  # the balance loss, to be weighed and added to the loss
    load: Int[Tensor, " E"]  # assignments of these tokens
    dropped: int  # of them, without a place
    rows: int  # that this process' experts computed, padding included


class Router(nn.Module):
    """W_g, one row an expert."""

    def __init__(self, experts: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, dim) / dim**0.5)

    def forward(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "T E"]:
        """Logits in fp32: a bf16 product would round near ties the other way."""
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
    """The layer on one process. Parameter names are those of transformers'
    `MixtralSparseMoeBlock`.
    """

    def __init__(self, config: MoEConfig, dim: int, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.gate, self.experts = (
            Router(config.experts, dim),
            Experts(config.experts, dim, hidden),
        )

    def plan(self, x: Float[Tensor, "T d"]) -> tuple[Routing, Bool[Tensor, "T k"]]:
        """Where these tokens go, and which assignments find a place. They are one
        group: capacity is counted among them.
        """
        return plan(self.gate(x), self.config)

    def forward(self, x: Float[Tensor, "T d"]) -> tuple[Float[Tensor, "T d"], Report]:
        """y, without the residual that carries a dropped token, and what happened."""
        routing, kept = self.plan(x)
        y = mixture(x, routing, kept, self.experts.gate_up_proj, self.experts.down_proj)
        loss = balance_loss(routing.probs, routing.load, len(x), self.config.top_k)
        return y, Report(loss, routing.load, int((~kept).sum()), int(kept.sum()))


def plan(
    logits: Float[Tensor, "T E"], config: MoEConfig
) -> tuple[Routing, Bool[Tensor, "T k"]]:
    """`route`, then `keep`, as the settings say."""
    routing = route(logits, config.top_k, config.renormalise)
    if config.capacity_factor is None:
        return routing, torch.ones_like(routing.experts, dtype=torch.bool)
    C = capacity(len(logits), config.top_k, config.experts, config.capacity_factor)
    return routing, keep(routing, C, config.order)
