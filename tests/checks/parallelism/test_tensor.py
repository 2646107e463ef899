"""Wrong answers to the exercises of 05-parallelism/05-tensor, each with the diagnosis
that it must get.
"""

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.parallelism.tensor import check
from llmlab.parallelism.tensor import copy_to_ranks as f
from llmlab.parallelism.tensor import sum_over_ranks as g
from tests.checks.rejecting import Wrong, rejects, verdict

# Exercise 1


def no_padding(comm, x):
    return comm.all_gather(comm.reduce_scatter(x.flatten())).view_as(x)


def padding_left_on(comm, x):
    flat = x.flatten()
    return comm.all_gather(
        comm.reduce_scatter(F.pad(flat, (0, -len(flat) % comm.size)))
    )


def shape_lost(comm, x):
    return padding_left_on(comm, x)[: x.numel()]


def averaged(comm, x):
    return right_all_reduce(comm, x) / comm.size


def right_all_reduce(comm, x):
    return shape_lost(comm, x).view_as(x)


def gathers_everything(comm, x):
    return comm.all_gather(x[None]).sum(0)


def the_library(comm, x):
    return comm.all_reduce(x)


def summed_again(comm, x):
    flat = F.pad(x.flatten(), (0, -x.numel() % comm.size))
    piece = comm.reduce_scatter(flat) * comm.size
    return comm.all_gather(piece)[: x.numel()].view_as(x)


def ring_of_blocking_sends(comm, x):
    total = x.clone()
    for _ in range(comm.size - 1):
        comm.send(x, (comm.rank + 1) % comm.size)
        x = comm.recv((comm.rank - 1) % comm.size)
        total = total + x
    return total


def root_only(comm, x):
    total = comm.reduce(x, 0)
    return comm.broadcast(total) if comm.rank == 0 else x


# Exercise 2


def piece(comm, t, dim):
    return t.chunk(comm.size, dim)[comm.rank]


def hidden(comm, x, gate, up):
    return F.silu(x @ piece(comm, gate, 0).T) * (x @ piece(comm, up, 0).T)


def bias_p_times(comm, x, gate, up, down, bias):
    return g(hidden(comm, f(x, comm), gate, up) @ piece(comm, down, 1).T + bias, comm)


def no_bias(comm, x, gate, up, down, bias):
    return (
        g(hidden(comm, f(x, comm), gate, up) @ piece(comm, down, 1).T, comm) + 0 * bias
    )


def no_g(comm, x, gate, up, down, bias):
    return hidden(comm, f(x, comm), gate, up) @ piece(comm, down, 1).T + bias


def no_f(comm, x, gate, up, down, bias):
    return g(hidden(comm, x, gate, up) @ piece(comm, down, 1).T, comm) + bias


def two_fs(comm, x, gate, up, down, bias):
    h = F.silu(f(x, comm) @ piece(comm, gate, 0).T) * (
        f(x, comm) @ piece(comm, up, 0).T
    )
    return g(h @ piece(comm, down, 1).T, comm) + bias


def silu_before_the_sum(comm, x, gate, up, down, bias):
    mine = piece(comm, f(x, comm), 1)
    h = F.silu(mine @ piece(comm, gate, 1).T) * (mine @ piece(comm, up, 1).T)
    return g(h @ down.T, comm) + bias


def reduces_without_gradient(comm, x, gate, up, down, bias):
    return (
        comm.all_reduce(hidden(comm, f(x, comm), gate, up) @ piece(comm, down, 1).T)
        + bias.detach()
    )


def everything_everywhere(comm, x, gate, up, down, bias):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T + bias


def whole_hidden_on_each(comm, x, gate, up, down, bias):
    x = f(x, comm)
    h = F.silu(x @ gate.T) * (x @ up.T)
    return g(piece(comm, h, 1) @ piece(comm, down, 1).T, comm) + bias


def whole_hidden_by_einsum(comm, x, gate, up, down, bias):
    x = f(x, comm)
    h = F.silu(torch.einsum("nd,fd->nf", x, gate)) * (torch.einsum("nd,fd->nf", x, up))
    return g(piece(comm, h, 1) @ piece(comm, down, 1).T, comm) + bias


def wrong_shard_order(comm, x, gate, up, down, bias):
    other = down.chunk(comm.size, 1)[comm.size - 1 - comm.rank]
    return g(hidden(comm, f(x, comm), gate, up) @ other.T, comm) + bias


def silu_on_up(comm, x, gate, up, down, bias):
    return g(hidden(comm, f(x, comm), up, gate) @ piece(comm, down, 1).T, comm) + bias


def sums_whole_results(comm, x, gate, up, down, bias):
    return g(everything_everywhere(comm, f(x, comm), gate, up, down, 0), comm) + bias


def f_for_g(comm, x, gate, up, down, bias):
    return f(hidden(comm, g(x, comm), gate, up) @ piece(comm, down, 1).T, comm) + bias


# Exercise 3


def loss(comm, z, targets, m=None, s=None, picked=None):
    rows = z.shape[1]
    local = targets - comm.rank * rows
    here = (local >= 0) & (local < rows)
    own = z.gather(1, local.clamp(0, rows - 1)[:, None]).squeeze(1) * here
    m = comm.all_reduce(z.amax(1), "max") if m is None else m
    s = comm.all_reduce((z - m[:, None]).exp().sum(1)) if s is None else s(m)
    return s.log() + m - (comm.all_reduce(own) if picked is None else picked(own))


def own_maximum(comm, z, targets):
    return loss(comm, z, targets, m=z.amax(1))


def no_maximum(comm, z, targets):
    return loss(comm, z, targets, m=torch.zeros(len(z)))


def own_sum(comm, z, targets):
    return loss(comm, z, targets, s=lambda m: (z - m[:, None]).exp().sum(1))


def own_target(comm, z, targets):
    return loss(comm, z, targets, picked=lambda own: own)


def no_offset(comm, z, targets):
    picked = z.gather(1, (targets % z.shape[1])[:, None]).squeeze(1)
    return loss(comm, z, targets, picked=lambda own: comm.all_reduce(picked))


def gathers_logits(comm, z, targets):
    return F.cross_entropy(comm.all_gather(z, dim=1), targets, reduction="none")


def mean_loss(comm, z, targets):
    return loss(comm, z, targets).mean()


def wrong_sign(comm, z, targets):
    return -loss(comm, z, targets)


def maximum_lost(comm, z, targets):
    return loss(comm, z, targets) - comm.all_reduce(z.amax(1), "max")


def global_index(comm, z, targets):
    return loss(
        comm,
        z,
        targets,
        picked=lambda own: comm.all_reduce(z.gather(1, targets[:, None]).squeeze(1)),
    )


def only_the_owner_reduces(comm, z, targets):
    rows = z.shape[1]
    if (targets // rows == comm.rank).any():
        return loss(comm, z, targets)
    m = comm.all_reduce(z.amax(1), "max")
    return comm.all_reduce((z - m[:, None]).exp().sum(1)).log() + m


# Exercise 4


def swapped_groups(along, down, X, W):
    return sum(down.broadcast(X, t) @ along.broadcast(W, t) for t in range(along.size))


def last_step_only(along, down, X, W):
    for t in range(along.size):
        Y = along.broadcast(X, t) @ down.broadcast(W, t)
    return Y


def own_blocks(along, down, X, W):
    return X @ W


def one_step_short(along, down, X, W):
    return sum(
        along.broadcast(X, t) @ down.broadcast(W, t) for t in range(along.size - 1)
    )


def first_step_missing(along, down, X, W):
    return sum(
        along.broadcast(X, t) @ down.broadcast(W, t) for t in range(1, along.size)
    )


def from_oneself(along, down, X, W):
    return sum(
        along.broadcast(X, along.rank) @ down.broadcast(W, down.rank)
        for _ in range(along.size)
    )


def sends_too_much(along, down, X, W):
    for _ in range(2):
        Y = sum(along.broadcast(X, t) @ down.broadcast(W, t) for t in range(along.size))
    return Y


def line_of(comm, x, padding=None):
    n = x.numel()
    padding = -n % comm.size if padding is None else padding
    return F.pad(x.reshape(-1), (0, padding))


def one_piece(comm, x):
    return comm.reduce_scatter(line_of(comm, x))


def nothing_added(comm, x):
    own = line_of(comm, x).chunk(comm.size)[comm.rank]
    return comm.all_gather(own)[: x.numel()].view(x.shape)


def zeros_in_front(comm, x):
    flat = F.pad(x.reshape(-1), (-x.numel() % comm.size, 0))
    return comm.all_gather(comm.reduce_scatter(flat))[: x.numel()].view(x.shape)


def always_padded(comm, x):
    flat = line_of(comm, x, comm.size - x.numel() % comm.size)
    return comm.all_gather(comm.reduce_scatter(flat))[: x.numel()].view(x.shape)


def in_rows(comm, x):
    """Right: the line as a matrix, one row per rank."""
    width = -(-x.numel() // comm.size)
    rows = x.new_zeros(comm.size, width)
    rows.view(-1)[: x.numel()] = x.reshape(-1)
    return comm.all_gather(comm.reduce_scatter(rows)).view(-1)[: x.numel()].view_as(x)


def shares(comm, x, gate, up, down, *, activation=F.silu):
    p, r = comm.size, comm.rank
    hidden = activation(x @ gate.chunk(p)[r].T) * (x @ up.chunk(p)[r].T)
    return hidden @ down.chunk(p, 1)[r].T


def without_a_record(comm, x, gate, up, down, bias):
    return comm.all_reduce(shares(comm, f(x, comm), gate, up, down)) + bias


def bias_in_parts(comm, x, gate, up, down, bias):
    y = shares(comm, f(x, comm), gate, up, down) + bias / comm.size
    return g(y, comm)


def f_before_the_bias(comm, x, gate, up, down, bias):
    return g(shares(comm, f(x, comm), gate, up, down), comm) + f(bias, comm)


def f_twice(comm, x, gate, up, down, bias):
    return g(shares(comm, f(f(x, comm), comm), gate, up, down), comm) + bias


def f_and_g_exchanged(comm, x, gate, up, down, bias):
    return f(shares(comm, g(x, comm), gate, up, down), comm) + bias


def with_gelu(comm, x, gate, up, down, bias):
    y = shares(comm, f(x, comm), gate, up, down, activation=F.gelu)
    return g(y, comm) + bias


def silu_of_the_product(comm, x, gate, up, down, bias):
    p, r = comm.size, comm.rank
    x = f(x, comm)
    hidden = F.silu((x @ gate.chunk(p)[r].T) * (x @ up.chunk(p)[r].T))
    return g(hidden @ down.chunk(p, 1)[r].T, comm) + bias


def x_detached(comm, x, gate, up, down, bias):
    return g(shares(comm, x.detach(), gate, up, down), comm) + bias


def down_by_rows(comm, x, gate, up, down, bias):
    p, r = comm.size, comm.rank
    x = f(x, comm)
    hidden = F.silu(x @ gate.chunk(p)[r].T) * (x @ up.chunk(p)[r].T)
    return g(hidden @ down.chunk(p)[r].T, comm) + bias


def sums_before_silu(comm, x, gate, up, down, bias):
    p, r = comm.size, comm.rank
    own = x.chunk(p, 1)[r]
    a = g(own @ gate.chunk(p, 1)[r].T, comm)
    b = g(own @ up.chunk(p, 1)[r].T, comm)
    hidden = (F.silu(a) * b).chunk(p, 1)[r]
    return g(hidden @ down.chunk(p, 1)[r].T, comm) + bias


def every_pth_channel(comm, x, gate, up, down, bias):
    """Right: channels dealt out like cards, silu by hand."""
    share = slice(comm.rank, None, comm.size)
    x = f(x, comm)
    a = F.linear(x, gate[share])
    y = (a * a.sigmoid() * F.linear(x, up[share])) @ down[:, share].T
    return g(y, comm) + bias


def loss_where(comm, logits, targets, here, reduction="sum"):
    """`here(t, rows)`: whether this rank has column t."""
    rows = logits.shape[1]
    m = comm.all_reduce(logits.amax(1), "max")
    s = comm.all_reduce((logits - m[:, None]).exp().sum(1))
    t = targets - comm.rank * rows
    logit = logits.gather(1, t.clamp(0, rows - 1)[:, None])[:, 0]
    z = comm.all_reduce(torch.where(here(t, rows), logit, 0.0), reduction)
    return s.log() + m - z


def targets_by_their_maximum(comm, logits, targets):
    def here(t, rows):
        return (t >= 0) & (t < rows)

    return loss_where(comm, logits, targets, here, "max")


def one_column_too_many(comm, logits, targets):
    return loss_where(comm, logits, targets, lambda t, rows: (t >= 0) & (t <= rows))


def first_column_missing(comm, logits, targets):
    return loss_where(comm, logits, targets, lambda t, rows: (t > 0) & (t < rows))


def last_column_missing(comm, logits, targets):
    return loss_where(comm, logits, targets, lambda t, rows: (t >= 0) & (t < rows - 1))


def masked_target(comm, logits, targets):
    rows = logits.shape[1]
    here = targets // rows == comm.rank
    return logits.gather(1, (targets % rows)[:, None])[:, 0] * here


def added_log_sums(comm, logits, targets):
    total = comm.all_reduce(logits.logsumexp(1))
    return total - comm.all_reduce(masked_target(comm, logits, targets))


def maximum_on_each_rank(comm, logits, targets):
    m = comm.all_reduce(logits.amax(1), "max")
    s = comm.all_reduce((logits - m[:, None]).exp().sum(1))
    return s.log() - comm.all_reduce(masked_target(comm, logits, targets) - m)


def one_maximum_for_all(comm, logits, targets):
    m = comm.all_reduce(logits.max(), "max")
    s = comm.all_reduce((logits - m).exp().sum(1))
    return s.log() + m - comm.all_reduce(masked_target(comm, logits, targets))


def by_log_sums(comm, logits, targets):
    """Right: the ranks' log-sum-exps are merged, as pieces of attention are."""
    own = logits.logsumexp(1)
    m = comm.all_reduce(own, "max")
    s, z = comm.all_reduce(
        torch.stack([(own - m).exp(), masked_target(comm, logits, targets)])
    )
    return m + s.log() - z


def summed_along_the_row(along, down, X, W):
    return along.all_reduce(X @ W)


def stays(along, down, X, W, which):
    steps = range(along.size)
    if which == "W":
        return sum(along.broadcast(X, t) for t in steps) @ W
    return X @ sum(down.broadcast(W, t) for t in steps)


def W_stays(along, down, X, W):
    return stays(along, down, X, W, "W")


def X_stays(along, down, X, W):
    return stays(along, down, X, W, "X")


def steps_mixed(along, down, X, W):
    q = along.size
    return sum(along.broadcast(X, t) @ down.broadcast(W, q - 1 - t) for t in range(q))


def mean_of_steps(along, down, X, W):
    q = along.size
    return sum(along.broadcast(X, t) @ down.broadcast(W, t) for t in range(q)) / q


def blocks_gathered(along, down, X, W):
    """Right: all blocks of the row and the column, then the products."""
    q = along.size
    xs = along.all_gather(X).chunk(q)
    ws = down.all_gather(W).chunk(q)
    return torch.einsum("tmk,tkn->mn", torch.stack(xs), torch.stack(ws))


def silu_twice(comm, x, gate, up, down, bias):
    p, r = comm.size, comm.rank
    x = f(x, comm)
    hidden = F.silu(x @ gate.chunk(p)[r].T) * F.silu(x @ up.chunk(p)[r].T)
    return g(hidden @ down.chunk(p, 1)[r].T, comm) + bias


def parts_averaged(comm, x, gate, up, down, bias):
    return g(shares(comm, f(x, comm), gate, up, down), comm) / comm.size + bias


def gate_detached(comm, x, gate, up, down, bias):
    return g(shares(comm, f(x, comm), gate.detach(), up, down), comm) + bias


def exponentials_averaged(comm, logits, targets):
    m = comm.all_reduce(logits.amax(1), "max")
    s = comm.all_reduce((logits - m[:, None]).exp().mean(1))
    return s.log() + m - comm.all_reduce(masked_target(comm, logits, targets))


def begins_at_rank(comm, logits, targets):
    moved = targets + comm.rank * (logits.shape[1] - 1)
    return loss_where(comm, logits, moved, lambda t, rows: (t >= 0) & (t < rows))


test_wrong_answers = rejects(
    "05-parallelism/05-tensor",
    [
        Wrong("all_reduce", no_padding, "cut the padding off again"),
        Wrong("all_reduce", padding_left_on, "padding is still there"),
        Wrong("all_reduce", shape_lost, "the sum is one line"),
        Wrong("all_reduce", averaged, "this is the mean"),
        Wrong("all_reduce", gathers_everything, "numbers where"),
        Wrong("all_reduce", the_library, "build it from reduce_scatter and all_gather"),
        Wrong(
            "all_reduce", summed_again, "after reduce_scatter the pieces are finished"
        ),
        Wrong("all_reduce", ring_of_blocking_sends, "rank 0 waits in send to rank 1"),
        Wrong("all_reduce", root_only, "do not fit together"),
        Wrong("split_mlp", bias_p_times, "added 4 times"),
        Wrong("split_mlp", no_bias, "bias is missing"),
        Wrong("split_mlp", no_g, "g is missing"),
        Wrong("split_mlp", no_f, "f is missing before x"),
        Wrong("split_mlp", two_fs, "put f before x once"),
        Wrong("split_mlp", silu_before_the_sum, "silu was applied before the sum"),
        Wrong(
            "split_mlp", reduces_without_gradient, "comm.all_reduce does not record one"
        ),
        Wrong("split_mlp", everything_everywhere, "nothing was sent"),
        Wrong("split_mlp", whole_hidden_on_each, "more than its share"),
        Wrong("split_mlp", whole_hidden_by_einsum, "more than its share"),
        Wrong("split_mlp", wrong_shard_order, "belong to other channels"),
        Wrong("split_mlp", silu_on_up, "silu was applied to up"),
        Wrong("split_mlp", sums_whole_results, "4 times too large"),
        Wrong("split_mlp", f_for_g, "f and g are exchanged"),
        Wrong("vocab_parallel_loss", own_maximum, "each rank took its own maximum"),
        Wrong("vocab_parallel_loss", no_maximum, "exp overflows"),
        Wrong(
            "vocab_parallel_loss", own_sum, "sum of exponentials is this rank's only"
        ),
        Wrong("vocab_parallel_loss", own_target, "target's logit is this rank's only"),
        Wrong("vocab_parallel_loss", no_offset, "every rank added a logit"),
        Wrong("vocab_parallel_loss", gathers_logits, "the logits stay where they are"),
        Wrong("vocab_parallel_loss", mean_loss, "loss of each position"),
        Wrong("vocab_parallel_loss", wrong_sign, "sign is wrong"),
        Wrong("vocab_parallel_loss", maximum_lost, "not added again"),
        Wrong("vocab_parallel_loss", global_index, "out of bounds"),
        Wrong("vocab_parallel_loss", only_the_owner_reduces, "do not fit together"),
        Wrong("matmul_2d", swapped_groups, "X went down the columns"),
        Wrong("matmul_2d", last_step_only, "overwrote"),
        Wrong("matmul_2d", own_blocks, "without their partners"),
        Wrong("matmul_2d", one_step_short, "last step is missing"),
        Wrong("matmul_2d", first_step_missing, "first step is missing"),
        Wrong("matmul_2d", from_oneself, "different root"),
        Wrong("matmul_2d", sends_too_much, "no product travels"),
        Wrong("all_reduce", one_piece, "one finished piece"),
        Wrong("all_reduce", nothing_added, "nothing was added"),
        Wrong("all_reduce", zeros_in_front, "pad at the end"),
        Wrong("all_reduce", always_padded, "none where its length divides"),
        Wrong("split_mlp", without_a_record, "no gradient reaches gate"),
        Wrong("split_mlp", bias_in_parts, "divided by 4"),
        Wrong("split_mlp", f_before_the_bias, "f stands before the bias"),
        Wrong("split_mlp", f_twice, "f stands before x twice"),
        Wrong("split_mlp", f_and_g_exchanged, "exchanged"),
        Wrong("split_mlp", with_gelu, "another activation"),
        Wrong("split_mlp", silu_of_the_product, "of the gate alone"),
        Wrong("split_mlp", x_detached, "no gradient reaches x"),
        Wrong("split_mlp", down_by_rows, "another dimension of down"),
        Wrong("split_mlp", sums_before_silu, "one all-reduce is enough"),
        Wrong("vocab_parallel_loss", targets_by_their_maximum, "by their maximum"),
        Wrong(
            "vocab_parallel_loss", one_column_too_many, "right after its last column"
        ),
        Wrong("vocab_parallel_loss", first_column_missing, "its first column"),
        Wrong("vocab_parallel_loss", last_column_missing, "its last column"),
        Wrong("vocab_parallel_loss", added_log_sums, "log-sum-exps were added"),
        Wrong("vocab_parallel_loss", maximum_on_each_rank, "once on each rank"),
        Wrong("vocab_parallel_loss", one_maximum_for_all, "one maximum"),
        Wrong("matmul_2d", summed_along_the_row, "along the row as well"),
        Wrong("matmul_2d", W_stays, "W does not travel"),
        Wrong("matmul_2d", X_stays, "X does not travel"),
        Wrong("matmul_2d", steps_mixed, "same step"),
        Wrong("matmul_2d", mean_of_steps, "mean of the steps"),
        Wrong("split_mlp", silu_twice, "to up as well"),
        Wrong("split_mlp", parts_averaged, "were averaged"),
        Wrong("split_mlp", gate_detached, "`.detach()` and `.data` cut it"),
        Wrong("vocab_parallel_loss", exponentials_averaged, "were averaged"),
        Wrong("vocab_parallel_loss", begins_at_rank, "rank · rows"),
    ],
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("all_reduce", in_rows),
        ("split_mlp", every_pth_channel),
        ("vocab_parallel_loss", by_log_sums),
        ("matmul_2d", blocks_gathered),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
