"""All-to-all on a machine with two kinds of wire: between nodes first, then inside the
node.

DeepSpeed-MoE (Rajbhandari et al. 2022, https://arxiv.org/abs/2201.05596), section 5.3,
and DeepSeek-V3 (2024, https://arxiv.org/abs/2412.19437), section 3.2.2. Rank (i, l) is
number l on node i; N nodes of L ranks, p = N·L.

    flat                (p − 1) messages a rank, (p − L) of them over the slow wire
    two levels          N − 1 over the slow wire, to the ranks of the same number l,
                        then L − 1 inside the node

`hierarchical_all_to_all` moves the same bytes over the slow wire as the flat one, in
fewer and larger messages.

`TwoLevelMoE` moves fewer: a token whose experts lie on one node crosses to it **once**,
is handed on inside the node, and its outputs are added up there before they cross back.
With weights w and experts in a set S(i) on node i: y = Σ_i ( Σ_{e ∈ S(i)} w_e
Expert_e(x) ).

    n  rows     d  hidden size     E  experts     w  a row's weights for the experts
                                                     below, 0 where it does not go
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.parallelism.moe.expert_parallel import exchange
from llmlab.parallelism.moe.moe import (
    Experts,
    MoE,
    Report,
    Routing,
    balance_loss,
    expert,
    plan,
)
from llmlab.parallelism.runtime import Communicator, Mesh
from llmlab.parallelism.tensor import sum_over_ranks


def hierarchical_all_to_all(xs: list[Tensor], mesh: Mesh) -> list[Tensor]:
    """`comm.all_to_all(xs)` in two levels: a tensor to each rank, a tensor from each
    rank, both in order of rank.

    Args:
        xs: p tensors, equal but for dimension 0.
        mesh: `comm.mesh(nodes, ranks_a_node)`.
    Raises:
        ValueError: the mesh has not two axes, or xs not a tensor for each rank.
    """
    if len(mesh.shape) != 2 or len(xs) != mesh.comm.size:
        raise ValueError(
            f"xs must hold {mesh.comm.size} tensors, and mesh.shape={mesh.shape} two"
            " axes: nodes, ranks a node"
        )
    (N, L), (between, inside) = mesh.shape, mesh.axes
    lengths = torch.tensor([len(x) for x in xs], device=mesh.comm.device).view(N, L)
    # for all ranks of node i, in one message
    to_node = [torch.cat(xs[i * L : (i + 1) * L]) for i in range(N)]
    # (N, L): from node i, for each rank of this node
    sizes = torch.stack(between.all_to_all(list(lengths)))
    blocks = [
        part.split(size.tolist())
        for part, size in zip(between.all_to_all(to_node), sizes, strict=True)
    ]
    # from all nodes, in one message
    to_rank = [torch.cat([blocks[i][m] for i in range(N)]) for m in range(L)]
    # (L, N): from rank m, what node i sent
    sizes = torch.stack(inside.all_to_all(list(sizes.T.contiguous())))
    parts = [
        part.split(size.tolist())
        for part, size in zip(inside.all_to_all(to_rank), sizes, strict=True)
    ]
    return [parts[m][i] for i in range(N) for m in range(L)]


class _Level:
    """One hop of a token: from this rank to every rank of `comm` below which one of its
    experts lies, once.
    """

    def __init__(self, comm: Communicator, w: Float[Tensor, "n E"]) -> None:
        self.comm = comm
        below = w.detach().unflatten(1, (comm.size, -1)).ne(0).any(-1)  # (n, ranks)
        # sorted by rank, then by row
        self.rank, self.row = below.T.nonzero(as_tuple=True)
        self.send = below.sum(0).tolist()
        self.receive = [int(c) for c in comm.all_to_all(list(below.sum(0).view(-1, 1)))]
        self.n = len(w)

    def down(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Each row once to each rank, with its weights for the experts there."""
        # (sent rows, E / ranks)
        mine = w.unflatten(1, (self.comm.size, -1))[self.row, self.rank]
        return tuple(
            exchange(t, self.comm, self.send, self.receive) for t in (x[self.row], mine)
        )

    def up(self, y: Tensor) -> Tensor:
        """The rows back, and what comes back for one row added up."""
        back = exchange(y, self.comm, self.receive, self.send)
        return back.new_zeros(self.n, back.shape[1]).index_add(0, self.row, back)


class TwoLevelMoE(nn.Module):
    """Expert parallelism over nodes and the ranks in them, each token once over the
    slow wire for each node.

    Args:
        moe: the whole layer, the same on every rank. mesh: `comm.mesh(nodes,
            ranks_a_node)`.
    Raises:
        ValueError: E is not a multiple of the number of ranks.
    """

    def __init__(self, moe: MoE, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.mesh = moe.config, mesh
        E, comm = moe.config.experts, mesh.comm
        if E % comm.size:
            raise ValueError(f"experts={E} must be a multiple of the {comm.size} ranks")
        self.gate, self.experts = moe.gate, Experts(0, 1, 1)
        for name, whole in moe.experts.named_parameters():
            setattr(
                self.experts,
                name,
                nn.Parameter(whole.detach().chunk(comm.size)[comm.rank].clone()),
            )

    def forward(self, x: Float[Tensor, "T d"]) -> tuple[Float[Tensor, "T d"], Report]:
        """y for this rank's tokens, which are one group: capacity is counted among
        them.
        """
        config = self.config
        routing, kept = plan(self.gate(x), config)
        w = torch.zeros_like(routing.probs).scatter(
            1, routing.experts, routing.weights * kept
        )
        levels = []
        for comm in self.mesh.axes:  # between nodes, then inside the node
            levels.append(_Level(comm, w))
            x_, w = levels[-1].down(x if len(levels) == 1 else x_, w)
        y, rows = self._compute(x_, w)
        for level in reversed(levels):
            y = level.up(y)
        return y, Report(self._balance(routing), routing.load, int((~kept).sum()), rows)

    def _compute(self, x: Tensor, w: Float[Tensor, "n Ep"]) -> tuple[Tensor, int]:
        """Σ over the local experts of weight · output, for each row that came."""
        y, rows = torch.zeros_like(x), 0
        for e, weights in enumerate(
            zip(self.experts.gate_up_proj, self.experts.down_proj, strict=True)
        ):
            chosen = w[:, e].nonzero().squeeze(1)
            y = y.index_add(
                0, chosen, expert(x[chosen], *weights) * w[chosen, e, None].to(x.dtype)
            )
            rows += len(chosen)
        return y, rows

    def _balance(self, routing: Routing) -> Tensor:
        comm, k = self.mesh.comm, self.config.top_k
        tokens = int(
            comm.all_reduce(
                torch.tensor(len(routing.probs), device=routing.probs.device)
            )
        )
        return sum_over_ranks(
            balance_loss(routing.probs, comm.all_reduce(routing.load), tokens, k), comm
        )
