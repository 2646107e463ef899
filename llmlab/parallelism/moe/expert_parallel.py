"""Expert parallelism: each rank has its tokens and E/p of the experts; tokens travel to
their experts and back.

GShard (Lepikhin et al. 2020, https://arxiv.org/abs/2006.16668), section 3; Switch
(Fedus et al. 2021), section 5. On every rank:

    route       T tokens of this rank, the router replicated                     which
                experts, which weights, who is dropped
    dispatch    all-to-all: the row of each kept assignment to its expert's rank    n
                rows out, as many as others want in
    compute     each local expert on the rows that came, whoever sent them
    combine     all-to-all the other way, then y = Σ weight · row                a
                dropped assignment adds 0

Every assignment that leaves costs d numbers each way: (p−1)/p · T·k·d when the router
spreads evenly. Backward, the two all-to-alls run again in the other direction. The
gradient of an expert is complete on its owner, and must not be summed over ranks; that
of the router must.

`padded` sends every expert of every rank C rows, filled up with zeros: bytes and work
no longer depend on the router, which is what static shapes need, and what an even
all-to-all costs.

    T  tokens of this rank     d  hidden size     E  experts     k  experts a token
                                                     p  ranks     n  rows     C
                                                     capacity
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.parallelism.moe.moe import (
    Experts,
    MoE,
    MoEConfig,
    Report,
    Routing,
    balance_loss,
    capacity,
    expert,
    plan,
)
from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.tensor import sum_over_ranks


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows: Tensor, comm: Communicator, send: list[int], receive: list[int]
    ) -> Tensor:
        ctx.comm, ctx.send, ctx.receive = comm, send, receive
        return torch.cat(comm.all_to_all(list(rows.split(send))))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (
            torch.cat(ctx.comm.all_to_all(list(grad.contiguous().split(ctx.receive)))),
            None,
            None,
            None,
        )


def exchange(
    rows: Float[Tensor, "n d"], comm: Communicator, send: list[int], receive: list[int]
) -> Float[Tensor, "m d"]:
    """Rows to every rank, `send[j]` of them to rank j, and the rows that came, rank 0's
    first. Backward the other way.
    """
    return _Exchange.apply(rows, comm, send, receive)


def in_order(routing: Routing, kept: Tensor) -> Int[Tensor, " n"]:
    """The kept assignments, as numbers token · k + choice, sorted by expert and within
    an expert by token.
    """
    assignments = kept.flatten().nonzero().squeeze(1)
    return assignments[routing.experts.flatten()[assignments].argsort(stable=True)]


def announce(counts: Int[Tensor, " E"], comm: Communicator) -> Int[Tensor, "p Ep"]:
    """Tell every rank how many rows come for each of its experts; returns what all
    ranks announce to this one.
    """
    return torch.stack(comm.all_to_all(list(counts.view(comm.size, -1))))


def compute(
    rows: Float[Tensor, "m d"], counts: Int[Tensor, "p Ep"], experts: Experts
) -> Float[Tensor, "m d"]:
    """Each local expert on its rows. They come sorted by sender, then by expert, and go
    back in the same order.
    """
    owner = (
        torch.arange(counts.shape[1], device=counts.device)
        .repeat(len(counts))
        .repeat_interleave(counts.flatten())
    )
    by_expert = owner.argsort(stable=True)
    groups = rows[by_expert].split(counts.sum(0).tolist())
    weights = zip(experts.gate_up_proj, experts.down_proj, strict=True)
    out = torch.cat(
        [expert(group, *w) for group, w in zip(groups, weights, strict=True)]
    )
    return out[by_expert.argsort()]


class ExpertParallelMoE(nn.Module):
    """The layer on one of p ranks.

    Args:
        moe: the whole layer, the same on every rank; this rank keeps its router and
            experts r·E/p … (r+1)·E/p − 1.
        padded: send C rows to each expert, always (needs a capacity factor).
    Raises:
        ValueError: E is not a multiple of p; `padded` without a capacity.
    """

    def __init__(self, moe: MoE, comm: Communicator, *, padded: bool = False) -> None:
        super().__init__()
        self.config, self.comm, self.padded = moe.config, comm, padded
        E, p = moe.config.experts, comm.size
        if E % p:
            raise ValueError(f"experts={E} must be a multiple of the {p} ranks")
        if padded and moe.config.capacity_factor is None:
            raise ValueError(
                "padded=True needs a capacity_factor: how many rows shall an expert be"
                " sent?"
            )
        self.gate = moe.gate
        self.experts = Experts(0, 1, 1)
        for name, whole in moe.experts.named_parameters():
            setattr(
                self.experts,
                name,
                nn.Parameter(whole.detach().chunk(p)[comm.rank].clone()),
            )

    def forward(self, x: Float[Tensor, "T d"]) -> tuple[Float[Tensor, "T d"], Report]:
        """y for this rank's tokens, which are one group: capacity is counted among
        them.
        """
        config, comm = self.config, self.comm
        routing, kept = plan(self.gate(x), config)
        order = in_order(routing, kept)
        token, chosen = order // config.top_k, routing.experts.flatten()[order]
        rows, counts = x[token], torch.bincount(chosen, minlength=config.experts)
        slots = None
        if self.padded:
            rows, counts, slots = _pad(rows, chosen, counts, _capacity(len(x), config))
        theirs = announce(counts, comm)
        send, receive = (
            counts.view(comm.size, -1).sum(1).tolist(),
            theirs.sum(1).tolist(),
        )
        done = compute(exchange(rows, comm, send, receive), theirs, self.experts)
        done = exchange(done, comm, receive, send)  # the same rows, in the same order
        done = done if slots is None else done[slots]
        y = torch.zeros_like(x).index_add(
            0, token, done * routing.weights.flatten()[order, None].to(done.dtype)
        )
        return y, Report(
            self._balance(routing), routing.load, int((~kept).sum()), int(theirs.sum())
        )

    def _balance(self, routing: Routing) -> Tensor:
        """The balance loss of all ranks' tokens, the same on every rank; its gradient
        is this rank's part.
        """
        tokens = int(
            self.comm.all_reduce(
                torch.tensor(len(routing.probs), device=routing.probs.device)
            )
        )
        load = self.comm.all_reduce(routing.load)
        return sum_over_ranks(
            balance_loss(routing.probs, load, tokens, self.config.top_k), self.comm
        )


def _capacity(T: int, config: MoEConfig) -> int:
    return capacity(T, config.top_k, config.experts, config.capacity_factor)


def _pad(
    rows: Tensor, chosen: Tensor, counts: Tensor, C: int
) -> tuple[Tensor, Tensor, Tensor]:
    """C rows for each expert, zeros where nobody comes; and where in them each row
    stands.
    """
    first = counts.cumsum(0) - counts  # where an expert's rows begin
    slots = chosen * C + torch.arange(len(rows), device=rows.device) - first[chosen]
    padded = rows.new_zeros(len(counts) * C, rows.shape[1]).index_copy(0, slots, rows)
    return padded, torch.full_like(counts, C), slots


def sum_router_gradients(layer: ExpertParallelMoE, comm: Communicator) -> None:
    """Sum over ranks what is replicated: the router. The experts' gradients are
    complete where they are.
    """
    layer.gate.weight.grad = comm.all_reduce(layer.gate.weight.grad)


def gather_state(layer: ExpertParallelMoE, comm: Communicator) -> dict[str, Tensor]:
    """The state dict of the whole `MoE`, on every rank."""

    def gather(name, value):
        return comm.all_gather(value) if name.startswith("experts.") else value.clone()

    return {name: gather(name, value) for name, value in layer.state_dict().items()}
