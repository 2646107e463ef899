"""Expert parallelism: a rank has its own tokens and E/p of the experts.

Tokens travel to their experts and back. GShard (Lepikhin et al. 2020,
https://arxiv.org/abs/2006.16668), section 3; Switch (Fedus et al. 2021,
https://arxiv.org/abs/2101.03961), section 5. On every rank:

    route       the router is replicated: for the T tokens of this rank, which experts,
                which weights, and which assignments are dropped
    dispatch    all-to-all: the row of each kept assignment goes to its expert's rank;
                n rows leave, and m rows arrive
    compute     each local expert on the rows that arrived, from all ranks
    combine     all-to-all the other way, then y = Σ weight · row; a dropped assignment
                adds 0

Every assignment to another rank costs d numbers each way: (p−1)/p · T·k·d when the
router spreads evenly. In the backward pass, the two all-to-alls run again in the other
direction. The gradient of an expert is complete on its owner and must not be summed
over ranks; that of the router must.

`padded` sends C rows from every rank to every expert, filled up with zeros. Bytes and
work no longer depend on the router: this is what static shapes need, and what an even
all-to-all costs.

    T   tokens of this rank
    d   hidden size
    E   experts
    Ep  experts of one rank, E / p
    k   experts per token
    p   ranks
    n   rows that this rank sends: its kept assignments
    m   rows that this rank receives
    C   capacity: the most rows that one rank sends to one expert
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.parallelism.moe.moe import (
    Experts,
    MoE,
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
        ctx,
        rows: Tensor,
        comm: Communicator,
        send_counts: list[int],
        receive_counts: list[int],
    ) -> Tensor:
        ctx.comm = comm
        ctx.receive_counts = receive_counts
        received = comm.all_to_all(list(rows.split(send_counts)))
        return torch.cat(received)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # The gradient of a row goes back to the rank that sent the row.
        to_senders = grad.contiguous().split(ctx.receive_counts)
        received = ctx.comm.all_to_all(list(to_senders))
        return torch.cat(received), None, None, None


def exchange(
    rows: Float[Tensor, "n d"],
    comm: Communicator,
    send_counts: list[int],
    receive_counts: list[int],
) -> Float[Tensor, "m d"]:
    """An all-to-all of rows, uneven and with a gradient.

    Args:
        rows: sorted by the rank that they go to.
        send_counts: p numbers, the rows for each rank.
        receive_counts: p numbers, the rows from each rank.
    Returns:
        The rows that arrived, those of rank 0 first.
    """
    return _Exchange.apply(rows, comm, send_counts, receive_counts)


def in_order(routing: Routing, kept: Tensor) -> Int[Tensor, " n"]:
    """The kept assignments, sorted by expert and within an expert by token.

    Returns:
        Numbers of assignments: token · k + choice.
    """
    assignments = kept.flatten().nonzero().squeeze(1)  # (n,)
    chosen = routing.experts.flatten()[assignments]  # (n,)
    return assignments[chosen.argsort(stable=True)]


def announce(counts: Int[Tensor, " E"], comm: Communicator) -> Int[Tensor, "p Ep"]:
    """Tell every rank how many rows it will receive for each of its experts.

    Returns:
        What all ranks announce to this one, one line per sender.
    """
    per_rank = counts.view(comm.size, -1)  # (E,) -> (p, Ep)
    return torch.stack(comm.all_to_all(list(per_rank)))


def compute(
    rows: Float[Tensor, "m d"], counts: Int[Tensor, "p Ep"], experts: Experts
) -> Float[Tensor, "m d"]:
    """Apply each local expert to its rows.

    Args:
        rows: sorted by sender, then by expert.
        counts: how many rows each sender sent to each local expert.
    Returns:
        The outputs, in the order of `rows`.
    """
    senders, local_experts = counts.shape
    numbers = torch.arange(local_experts, device=counts.device)
    # the expert of each row: 0, 0, 1, 2, 2 of sender 0, then 0, 1, … of sender 1
    owner = numbers.repeat(senders).repeat_interleave(counts.flatten())  # (m,)

    # An expert computes the rows of all senders at once, so sort by expert first.
    by_expert = owner.argsort(stable=True)
    groups = rows[by_expert].split(counts.sum(0).tolist())
    outputs = []
    for group, gate_up, down in zip(
        groups, experts.gate_up_proj, experts.down_proj, strict=True
    ):
        outputs.append(expert(group, gate_up, down))

    # The inverse permutation brings the outputs back into the order of arrival.
    return torch.cat(outputs)[by_expert.argsort()]


class ExpertParallelMoE(nn.Module):
    """The layer on one of p ranks.

    Args:
        moe: the whole layer, the same on every rank. Rank r keeps its router and the
            experts r·E/p … (r+1)·E/p − 1.
        padded: always send C rows to each expert. Needs a capacity factor.
    Raises:
        ValueError: E is not a multiple of p; `padded` without a capacity.
    """

    def __init__(self, moe: MoE, comm: Communicator, *, padded: bool = False) -> None:
        super().__init__()
        self.config = moe.config
        self.comm = comm
        self.padded = padded
        if padded and moe.config.capacity_factor is None:
            raise ValueError(
                "padded=True needs a capacity_factor: how many rows are sent to an"
                " expert?"
            )
        self.gate = moe.gate
        self.experts = local_experts(moe, comm)

    def forward(self, x: Float[Tensor, "T d"]) -> tuple[Float[Tensor, "T d"], Report]:
        """The outputs of this rank's tokens, and what happened.

        The tokens are one group: capacity is counted among them.
        """
        config = self.config
        comm = self.comm

        # Route and keep, then sort: by expert means by rank too.
        routing, kept = plan(self.gate(x), config)
        order = in_order(routing, kept)  # (n,)
        token = order // config.top_k
        chosen = routing.experts.flatten()[order]
        rows = x[token]  # (n, d)
        counts = torch.bincount(chosen, minlength=config.experts)  # (E,)
        if self.padded:
            C = capacity(len(x), config.top_k, config.experts, config.capacity_factor)
            rows, counts, slots = pad(rows, chosen, counts, C)

        # Announce: only the sender knows how many rows will come.
        arriving = announce(counts, comm)  # (p, Ep)
        send_counts = counts.view(comm.size, -1).sum(1).tolist()
        receive_counts = arriving.sum(1).tolist()

        # Dispatch, compute, and send the outputs back.
        received = exchange(rows, comm, send_counts, receive_counts)  # (m, d)
        outputs = compute(received, arriving, self.experts)
        # The two counts change places, and the rows return in the order they left in.
        outputs = exchange(outputs, comm, receive_counts, send_counts)
        if self.padded:
            outputs = outputs[slots]  # (E·C, d) -> (n, d)

        # Combine: up to k rows per token are weighted and added up.
        weights = routing.weights.flatten()[order, None].to(outputs.dtype)  # (n, 1)
        y = torch.zeros_like(x).index_add(0, token, outputs * weights)

        balance = balance_over_ranks(routing, comm, config.top_k)
        dropped = int((~kept).sum())
        return y, Report(balance, routing.load, dropped, int(arriving.sum()))


def local_experts(moe: MoE, comm: Communicator) -> Experts:
    """A copy of this rank's experts r·E/p … (r+1)·E/p − 1, frozen where they were.

    Raises:
        ValueError: E is not a multiple of p.
    """
    E = moe.config.experts
    if E % comm.size:
        raise ValueError(f"experts={E} must be a multiple of the {comm.size} ranks")
    experts = Experts(0, 1, 1)
    for name, whole in moe.experts.named_parameters():
        part = whole.detach().chunk(comm.size)[comm.rank]  # (E, …) -> (Ep, …)
        trained = whole.requires_grad
        setattr(experts, name, nn.Parameter(part.clone(), requires_grad=trained))
    return experts


def balance_over_ranks(
    routing: Routing, comm: Communicator, k: int
) -> Float[Tensor, ""]:
    """The balance loss of all ranks' tokens, the same number on every rank.

    Its gradient is this rank's part: the rank's own probabilities.
    """
    own_tokens = torch.tensor(len(routing.probs), device=routing.probs.device)
    tokens = int(comm.all_reduce(own_tokens))
    load = comm.all_reduce(routing.load)
    return sum_over_ranks(balance_loss(routing.probs, load, tokens, k), comm)


def pad(
    rows: Float[Tensor, "n d"],
    chosen: Int[Tensor, " n"],
    counts: Int[Tensor, " E"],
    C: int,
) -> tuple[Float[Tensor, "padded d"], Int[Tensor, " E"], Int[Tensor, " n"]]:
    """Fill up to C rows per expert with zeros.

    Args:
        rows: sorted by expert.
        chosen: the expert of each row.
        counts: the rows of each expert.
    Returns:
        E·C rows, the new counts (all C), and the place of each old row among the new.
    """
    first = counts.cumsum(0) - counts  # where the rows of each expert begin
    place = torch.arange(len(rows), device=rows.device) - first[chosen]
    slots = chosen * C + place  # (n,)
    empty = rows.new_zeros(len(counts) * C, rows.shape[1])  # (E·C, d)
    return empty.index_copy(0, slots, rows), torch.full_like(counts, C), slots


def sum_router_gradients(layer: ExpertParallelMoE, comm: Communicator) -> None:
    """Sum over ranks the gradient of what is replicated: the router.

    The gradients of the experts are complete on their owners.
    """
    layer.gate.weight.grad = comm.all_reduce(layer.gate.weight.grad)


def gather_state(layer: ExpertParallelMoE, comm: Communicator) -> dict[str, Tensor]:
    """The state dict of the whole `MoE`, on every rank."""
    state = {}
    for name, value in layer.state_dict().items():
        if name.startswith("experts."):
            state[name] = comm.all_gather(value)
        else:
            state[name] = value.clone()
    return state
