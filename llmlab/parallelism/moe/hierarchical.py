"""All-to-all in two levels: first between nodes, where the link is slow, then inside.

DeepSpeed-MoE (Rajbhandari et al. 2022, https://arxiv.org/abs/2201.05596), section 5.3,
and DeepSeek-V3 (2024, https://arxiv.org/abs/2412.19437), section 3.2.2.

    flat          a rank sends p − 1 messages, p − L of them over the slow link
    two levels    a rank sends N − 1 messages over the slow link, to the ranks of the
                  same number j, then L − 1 inside its node

`hierarchical_all_to_all` moves the same bytes over the slow link as the flat one, in
fewer and larger messages.

`TwoLevelMoE` moves fewer bytes. A token whose experts lie on one node crosses to it
**once** and is passed on inside the node; its outputs are added up there before they
cross back. With weights w and the experts S(i) of node i:

    y = Σ_i ( Σ_{e ∈ S(i)} w_e · Expert_e(x) )

    N       nodes
    L       ranks per node
    p       ranks, N · L
    (i, j)  the rank of number j on node i
    T       tokens of this rank
    n       rows at the start of a hop
    d       hidden size
    E       experts
    w       weights of a row for all experts that it can still reach; 0 where it does
            not go
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.parallelism.moe.expert_parallel import (
    balance_over_ranks,
    exchange,
    local_experts,
)
from llmlab.parallelism.moe.moe import MoE, Report, expert, plan
from llmlab.parallelism.runtime import Communicator, Mesh


def hierarchical_all_to_all(xs: list[Tensor], mesh: Mesh) -> list[Tensor]:
    """`comm.all_to_all(xs)` in two levels.

    Args:
        xs: p tensors, one for each rank, that differ in dimension 0 at most.
        mesh: `comm.mesh(nodes, ranks_per_node)`.
    Returns:
        p tensors, one from each rank, in the order of the ranks.
    Raises:
        ValueError: the mesh does not have two axes, or xs not one tensor per rank.
    """
    if len(mesh.shape) != 2 or len(xs) != mesh.comm.size:
        raise ValueError(
            f"xs must hold {mesh.comm.size} tensors, and mesh.shape={mesh.shape} two"
            " axes: nodes, ranks per node"
        )
    N, L = mesh.shape
    between, inside = mesh.axes

    # Level 1, between nodes: one message to node i, with the rows for all its ranks.
    lengths = torch.tensor([len(x) for x in xs], device=mesh.comm.device).view(N, L)
    to_node = [torch.cat(xs[i * L : (i + 1) * L]) for i in range(N)]
    lengths = torch.stack(between.all_to_all(list(lengths)))  # (N, L): node, receiver
    from_node = between.all_to_all(to_node)
    blocks = _split_each(from_node, lengths)  # blocks[i][j]: from node i, for rank j

    # Level 2, inside the node: one message to rank j, with the rows of all nodes.
    to_rank = []
    for j in range(L):
        to_rank.append(torch.cat([blocks[i][j] for i in range(N)]))
    lengths = inside.all_to_all(list(lengths.T.contiguous()))
    lengths = torch.stack(lengths)  # (L, N): who passed it on, node
    from_rank = inside.all_to_all(to_rank)
    blocks = _split_each(from_rank, lengths)  # blocks[j][i]: from rank (i, j)

    ordered = []
    for i in range(N):
        for j in range(L):
            ordered.append(blocks[j][i])
    return ordered


def _split_each(messages: list[Tensor], lengths: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut each message into parts of the lengths in its line."""
    parts = []
    for message, line in zip(messages, lengths, strict=True):
        parts.append(message.split(line.tolist()))
    return parts


class Hop:
    """One hop of the tokens along an axis of the mesh, and the hop back.

    A row goes to each rank of `comm` that has one of its experts or leads to one. It
    goes there once, however many of its experts there are.

    Args:
        comm: the ranks of this hop: one per node, or those of one node.
        w: weights of this rank's rows, sorted by the rank of `comm` to go to.
    """

    def __init__(self, comm: Communicator, w: Float[Tensor, "n E"]) -> None:
        self.comm = comm
        self.rows = len(w)
        # (n, E) -> (n, ranks, E / ranks) -> (n, ranks): has it an expert over there?
        goes = w.detach().unflatten(1, (comm.size, -1)).ne(0).any(-1)
        # One copy per True, sorted by rank, then by row.
        self.rank, self.row = goes.T.nonzero(as_tuple=True)
        counts = goes.sum(0)  # (ranks,)
        self.send_counts = counts.tolist()
        arriving = comm.all_to_all(list(counts.view(-1, 1)))
        self.receive_counts = [int(count) for count in arriving]

    def dispatch(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "n E"]
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m Ep"]]:
        """Send each row with its weights for the experts beyond this hop."""
        # (n, E) -> (n, ranks, E / ranks) -> (copies, E / ranks)
        weights = w.unflatten(1, (self.comm.size, -1))[self.row, self.rank]
        x = exchange(x[self.row], self.comm, self.send_counts, self.receive_counts)
        w = exchange(weights, self.comm, self.send_counts, self.receive_counts)
        return x, w

    def combine(self, y: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
        """Send the outputs back, and add up those of one row."""
        back = exchange(y, self.comm, self.receive_counts, self.send_counts)
        total = back.new_zeros(self.rows, back.shape[1])
        return total.index_add(0, self.row, back)


class TwoLevelMoE(nn.Module):
    """Expert parallelism over nodes and the ranks in them.

    A token crosses the slow link once per node, not once per expert.

    Args:
        moe: the whole layer, the same on every rank.
        mesh: `comm.mesh(nodes, ranks_per_node)`.
    Raises:
        ValueError: E is not a multiple of the number of ranks.
    """

    def __init__(self, moe: MoE, mesh: Mesh) -> None:
        super().__init__()
        self.config = moe.config
        self.mesh = mesh
        self.gate = moe.gate
        self.experts = local_experts(moe, mesh.comm)

    def forward(self, x: Float[Tensor, "T d"]) -> tuple[Float[Tensor, "T d"], Report]:
        """The outputs of this rank's tokens, and what happened.

        The tokens are one group: capacity is counted among them.
        """
        between, inside = self.mesh.axes

        # Route. w has the weight of each kept assignment, and 0 elsewhere.
        routing, kept = plan(self.gate(x), self.config)
        w = torch.zeros_like(routing.probs)  # (T, E)
        w = w.scatter(1, routing.experts, routing.weights * kept)

        # Dispatch: to the nodes, with (T, E / N) weights, then to the ranks in them.
        to_nodes = Hop(between, w)
        x, w = to_nodes.dispatch(x, w)
        to_ranks = Hop(inside, w)
        x, w = to_ranks.dispatch(x, w)  # w: (rows, E / p)

        y, rows = self._compute(x, w)

        # Combine on the way back: the node adds up first, the slow link carries sums.
        y = to_ranks.combine(y)
        y = to_nodes.combine(y)

        balance = balance_over_ranks(routing, self.mesh.comm, self.config.top_k)
        return y, Report(balance, routing.load, int((~kept).sum()), rows)

    def _compute(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "n Ep"]
    ) -> tuple[Float[Tensor, "n d"], int]:
        """Σ_e w_e · Expert_e(x) over the local experts, and how many rows they did."""
        y = torch.zeros_like(x)
        rows = 0
        weights = zip(self.experts.gate_up_proj, self.experts.down_proj, strict=True)
        for e, (gate_up, down) in enumerate(weights):
            chosen = w[:, e].nonzero().squeeze(1)
            out = expert(x[chosen], gate_up, down)
            y = y.index_add(0, chosen, out * w[chosen, e, None].to(x.dtype))
            rows += len(chosen)
        return y, rows
