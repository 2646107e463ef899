# %% [markdown]
# # Collectives: how ranks talk
#
# This part splits a model over many machines, and every split is paid for in messages. Eight operations are enough for all of
# it. You will see each of them as a list of sends, run those lists in threads and in real processes, and learn when a ring is
# the best list and when it is the worst.

# %%
import torch

from llmlab.course import (
    compare,
    explore,
    figure,
    palette,
    plt,
    predict,
    show,
    steps,
)
from llmlab.course.steppers import all_reduce_trace

# %% [markdown]
# ## What it costs
#
# Sixty-four GPUs train one model, each on its own data. After each step they must agree on the sum of their gradients. The
# obvious way is that rank 0 collects all of them, adds, and sends the result to everybody.
# %%
from llmlab.models.accounting import training_flops, weight_bytes
from llmlab.models.presets import preset
from llmlab.parallelism.runtime import Link, cost

seven = preset("llama-2-7b")
# 16 bits per number; a 400 Gb/s network card
gradient, card = weight_bytes(seven), Link(latency=10e-6, bandwidth=50e9)
compute = training_flops(seven, 1, 4096) / (0.4 * 989e12)
print(
    f"Llama 2 7B: {gradient / 1e9:.1f} GB of gradients, {compute:.2f} s of computing on"
    " 4,096 tokens"
)
for algorithm in ("naive", "ring"):
    print(
        f"  their sum over 64 ranks, {algorithm:<6}"
        f" {cost.seconds('all_reduce', 64, gradient, card, algorithm):5.1f} s"
    )

# %% [markdown]
# (Computing at 40% of an H100's 989 TFLOP/s.) The wires and the result are the same, and there is a factor of 64 between two orders
# of sending. At 34 s per step nobody would train on 64 GPUs.
#
# What is sent decides how a model may be split, and the lessons of this part differ in little else:
#
# | lesson | what travels | in which operation |
# |---|---|---|
# | data parallelism | gradients | all-reduce |
# | ZeRO and FSDP | gradients, weights | reduce-scatter, all-gather |
# | pipeline | activations | send, receive |
# | tensor | activations | all-reduce |
# | sequence | activations, keys and values | all-gather, reduce-scatter, all-to-all |
# | experts | tokens | all-to-all |

# %% [markdown]
# ## Predict
#
# A ring all-reduce cuts the tensor of $n$ bytes into $p$ chunks and sends them around a ring of $p$ ranks, to your right-hand
# neighbour only. A tree is fast for small tensors. Take a network with 10 µs per message and 25 GB/s.

# %%
sent_guess = predict("How many bytes does each of 64 ranks send?", unit="times n")
tree_guess = predict("Below which size is a tree faster, on 16 ranks?", unit="MB")

# %% [markdown]
# ## The idea
#
# There are four ranks, one row each, and four chunks a, b, c, d; the colour says from which rank a chunk came, black is a sum over all ranks.
# The pictures are drawn from what the operations return.

# %% tags=["hide-input"]
from matplotlib.patches import Rectangle

from llmlab.parallelism import World

OPS = (
    "broadcast",
    "scatter",
    "gather",
    "all_gather",
    "reduce",
    "reduce_scatter",
    "all_reduce",
    "all_to_all",
)
COLORS = {
    1: palette.blue,
    2: palette.vermillion,
    4: palette.green,
    8: palette.purple,
    15: palette.ink,
}


def before_and_after(comm, op, label, reduction):
    """What a rank brings and gets when it holds label(rank, chunk) in each chunk."""
    whole = torch.tensor([label(comm.rank, c) for c in range(4)])
    parts, root = list(whole.split(1)), comm.rank == 0
    one = parts[comm.rank]
    bring, call = {
        "broadcast": (whole if root else None, lambda: comm.broadcast(whole)),
        "scatter": (
            whole if root else None,
            lambda: comm.scatter(parts if root else None),
        ),
        "gather": (one, lambda: comm.gather(one)),
        "all_gather": (one, lambda: comm.all_gather(one)),
        "reduce": (whole, lambda: comm.reduce(whole, op=reduction)),
        "reduce_scatter": (whole, lambda: comm.reduce_scatter(whole, op=reduction)),
        "all_reduce": (whole, lambda: comm.all_reduce(whole, reduction)),
        "all_to_all": (whole, lambda: comm.all_to_all(parts)),
    }[op]

    def flat(t):
        return (
            [] if t is None else (torch.cat(t) if isinstance(t, list) else t).tolist()
        )

    return flat(bring), flat(call())


fig, axes = plt.subplots(4, 2, figsize=(4.8, 6.2))
for ax, op in zip(axes.flat, OPS, strict=True):
    owners = World(4).run(before_and_after, op, lambda r, c: 2**r, "sum")
    letters = World(4).run(before_and_after, op, lambda r, c: c, "max")
    for r in range(4):
        for side in (0, 1):
            ax.plot(
                [5.6 * side - 0.05, 5.6 * side + 3.97],
                [2.96 - r] * 2,
                color=palette.light,
                lw=0.8,
            )
            for i, (mask, letter) in enumerate(
                zip(owners[r][side], letters[r][side], strict=True)
            ):
                ax.add_patch(
                    Rectangle(
                        (5.6 * side + i, 3 - r),
                        0.92,
                        0.92,
                        facecolor=COLORS[mask],
                        edgecolor="none",
                    )
                )
                ax.text(
                    5.6 * side + i + 0.46,
                    3.42 - r,
                    "abcd"[letter],
                    color="white",
                    ha="center",
                    va="center",
                    size=9,
                )
    ax.text(4.75, 2, "→", ha="center", va="center")
    ax.set(
        xlim=(-0.2, 9.8), ylim=(-0.1, 4.1), aspect="equal", title=op.replace("_", "-")
    )
    ax.axis("off")
figure(
    fig,
    alt=(
        "Eight operations on four ranks, before and after. Broadcast: rank 0's row on"
        " all. Scatter: one chunk of it each. Gather: one chunk of each rank, in rank"
        " 0's row. All-gather: that row on all. Reduce: the sum on rank 0."
        " Reduce-scatter: one chunk of the sum each. All-reduce: the sum on all."
        " All-to-all: the table transposed."
    ),
)

# %% [markdown]
# Look for pairs. A gather is a scatter played backwards. A reduce is a broadcast played backwards, with a sum wherever a
# message arrives; a reduce-scatter is an all-gather played backwards. (That is also why the gradient of one is the other.) And an
# all-reduce can be had in two ways: reduce, then broadcast; or reduce-scatter, then all-gather.
#
# **What a message costs.** The usual model has two numbers, the seconds $\alpha$ to get a message going and the bytes
# $\beta$ that then flow per second. An algorithm of $s$ steps, in which the busiest rank sends $v$ bytes one message after another, takes
#
# $$T = s\,\alpha + v/\beta .$$
#
# Nobody can beat $\lceil\log_2 p\rceil\,\alpha$, because the number of ranks that know about a given number can at most double
# in a step. And an all-reduce cannot send less than $2\frac{p-1}{p}n$ bytes per rank: each number needs $p-1$ messages to be summed
# and $p-1$ to be known, and $p$ ranks share the work
# ([Patarasuk & Yuan 2009](https://doi.org/10.1016/j.jpdc.2008.09.002 "patarasuk2009bandwidth")). Three algorithms, drawn from their lists of
# messages:

# %% tags=["hide-input"]
from llmlab.parallelism.collectives import halving, ring, tree
from llmlab.parallelism.collectives import schedule as schedules

THREE = {
    "ring": ring.all_reduce,
    "tree": tree.all_reduce,
    "halving": halving.all_reduce,
}
fig, axes = plt.subplots(3, 1, figsize=(4.8, 6.2), sharex=True)
for ax, (name, algorithm) in zip(axes, THREE.items(), strict=True):
    moves = algorithm(8)
    schedules.draw(moves, 8, ax)
    ax.set(
        xlim=(-0.2, 14.2),
        title=f"{name}: {schedules.steps(moves)} steps, {len(moves)} messages",
    )
    ax.set(yticks=[0, 7], xlabel="step" if name == "halving" else "")
figure(
    fig,
    alt=(
        "Messages of an all-reduce over 8 ranks, steps to the right, ranks downward."
        " Ring: in each of 14 steps every rank sends a thin arrow, an eighth of the"
        " tensor, to the next. Tree: thick arrows of the whole tensor, 4, 2 and 1"
        " toward rank 0, then 1, 2 and 4 back. Halving: 6 steps in which pairs swap a"
        " half, a quarter, an eighth, then the same backwards."
    ),
)

# %% [markdown]
# Blue messages are added where they arrive, orange ones are kept; thickness is the share of the tensor. The **ring**
# keeps all wires busy all the time with the thinnest messages. The **tree** has few steps, and most ranks idle. **Recursive
# halving and doubling** ([Rabenseifner 2004](https://doi.org/10.1007/978-3-540-24685-5_1 "rabenseifner2004optimization")) pairs the
# ranks: partners swap halves of the tensor and add, then swap quarters with another partner, and so on, and back.

# %% [markdown]
# ## The code
#
# An algorithm is data: a list of moves `(step, src, dst, chunks, add)`. The whole ring for three ranks:

# %%
for move in ring.all_reduce(3):
    print(*move)

# %% [markdown]
# Follow chunk 1: in step 0 rank 1 sends it to 2; in step 1 rank 2 passes the sum of two on to 0, who completes it; then it travels on as
# it is.
#
# **Your turn: find the wrong chunk.** This all-reduce was written by hand, and one character of it is wrong. `all_reduce_trace` runs it on
# four ranks and looks into every message. The small squares in a chunk say whose summands are in it; an arrow carries a chunk and is about to be
# added or kept. Press *play* from the first step: it stops at the first wrong chunk and says what is wrong with it. The line of code that
# it shows is the one that brought the chunk; look at what is done with it. Repair that and run the cell again: at the end every chunk is green.
#
# <details><summary>The answer</summary>
#
# The reduce-scatter has $p-1$ rounds, not $p$: `if s < p - 1`. In round 4 of 6 each rank gets a chunk that is complete already, and adds it to
# its own part of it, so that one rank's summand is in it twice.
#
# </details>


# %%
def my_all_reduce(comm, x):
    p, r = comm.size, comm.rank
    chunks = list(x.chunk(p))
    for s in range(2 * (p - 1)):
        sent, arriving = (r - s) % p, (r - s - 1) % p
        got = comm.sendrecv(chunks[sent], (r + 1) % p, (r - 1) % p)
        if s < p:
            chunks[arriving] = chunks[arriving] + got
        else:
            chunks[arriving] = got
    return torch.cat(chunks)


trace = all_reduce_trace(my_all_reduce, 4)
steps(trace, title="An all-reduce by hand", start="first")

# %% tags=["hide-output"]
print(trace.fault or "right: every rank has every sum")

# %% [markdown]
# The functions that make the lists of ours are a few lines each, and `backwards` makes half of them.

# %%
show(
    ring.reduce_scatter,
    ring.all_gather,
    tree.broadcast,
    halving.reduce_scatter,
    schedules.backwards,
)

# %% [markdown]
# One function runs any list, with nothing but `send` and `recv`. What it costs can be read off the list, and what a rank sends is
# counted in the ledger as it happens:

# %%
show(schedules.perform)

# %%
from llmlab.parallelism.collectives import bruck

ALGORITHMS = THREE | {
    "doubling": halving.all_reduce_doubling,
    "bruck": bruck.all_reduce,
}
x = torch.arange(840.0)
print(
    f"{'all-reduce of n bytes, p =':<28}{'6':>16}{'8':>16}\n"
    f"{'':<28}{'steps':>7}{'bytes/n':>9}{'steps':>7}{'bytes/n':>9}"
)
for name, algorithm in ALGORITHMS.items():
    row = ""
    for p in (6, 8):
        world, moves = World(p), algorithm(p)
        for result in world.run(
            lambda comm, moves=moves: schedules.all_reduce(comm, x + comm.rank, moves)
        ):
            assert torch.equal(result, p * x + p * (p - 1) / 2)
        most = max(world.ledger.per_rank())
        row += f"{schedules.steps(moves):>7}{most / x.nbytes:>9.2f}"
    print(f"{name:<28}{row}")

# %% [markdown]
# *Bytes* are what the busiest rank sends. Two more algorithms have joined: **doubling** swaps whole sums with partners 1, 2, 4, … ranks
# away, in half the tree's steps if $p$ is a power of two. **Bruck's** ([Bruck et al. 1997](https://doi.org/10.1109/71.642949 "bruck1997efficient")) has as few
# steps as a tree and the bytes of a ring, for *any* $p$; with $p = 6$ halving has to fold two ranks away first, and pays for it.

# %% [markdown]
# ## Against the library
#
# PyTorch's own collectives need real processes. `launch` forks five of them, an awkward number, and they talk over gloo.
# Each operation runs twice: as torch does it, and as our list of messages.

# %%
import torch.distributed as dist

from llmlab.parallelism import launch


def against_torch(comm):
    p, r, root, x = (
        comm.size,
        comm.rank,
        comm.size - 1,
        torch.arange(23.0) * (comm.rank + 1),
    )
    pairs, mine, lengths = {}, x[: 2 * r + 1], [2 * i + 1 for i in range(p)]
    theirs = x.clone()
    dist.all_reduce(theirs)
    for name, algorithm in ALGORITHMS.items():
        pairs[f"all-reduce, {name}"] = (
            schedules.all_reduce(comm, x, algorithm(p)),
            theirs,
        )
    theirs = x.clone()
    dist.broadcast(theirs, root)
    pairs["broadcast"] = (
        schedules.broadcast(comm, x, tree.broadcast(p, root), root),
        theirs,
    )
    theirs = x.clone()
    dist.reduce(theirs, root)
    ours = schedules.reduce(comm, x, tree.reduce(p, root), root)
    pairs |= {"reduce": (ours, theirs)} if r == root else {}  # the others get nothing
    every = [torch.empty(23) for _ in range(p)] if r == root else None
    dist.gather(x, every, root)
    ours = schedules.gather(comm, x, tree.gather(p, root), [23] * p, root)
    pairs |= {"gather": (torch.cat(ours), torch.cat(every))} if r == root else {}
    theirs, parts = torch.empty(23), [x * i for i in range(p)] if r == root else None
    dist.scatter(theirs, parts, root)
    pairs["scatter"] = (
        schedules.scatter(comm, parts, tree.scatter(p, root), [23] * p),
        theirs,
    )
    theirs = torch.empty(4)
    dist.reduce_scatter(theirs, list(x[: 4 * p].clone().split(4)))
    pairs["reduce-scatter"] = (
        schedules.reduce_scatter(comm, x[: 4 * p], bruck.reduce_scatter(p)),
        theirs,
    )
    every = [None] * p
    dist.all_gather_object(every, mine)
    pairs["all-gather, uneven"] = (
        schedules.all_gather(comm, mine, ring.all_gather(p), lengths),
        torch.cat(every),
    )
    table = [[(i + 2 * j) % 4 for j in range(p)] for i in range(p)]  # what i sends to j
    take, theirs = [row[r] for row in table], torch.empty(sum(row[r] for row in table))
    dist.all_to_all_single(theirs, x[: sum(table[r])], take, table[r])
    ours = schedules.all_to_all(
        comm, list(x[: sum(table[r])].split(table[r])), bruck.all_to_all(p), table
    )
    pairs["all-to-all, uneven"] = torch.cat(ours), theirs
    return pairs


ranks = launch(against_torch, 5, timeout=120)
for what in ranks[-1]:  # of the root, which has them all
    compare(
        *(
            torch.cat([pairs[what][i] for pairs in ranks if what in pairs])
            for i in (0, 1)
        ),
        what,
        tol=0,
    )

# %% [markdown]
# They are equal to the last bit, because these numbers are whole. With general floats the orders of addition differ, and so do the
# last bits: torch gives no promise there either. (The tests do this for 2, 3, 5, 6 and 8 processes, five dtypes, sum, max and min.)

# %% [markdown]
# ## The experiment
#
# When does which algorithm win? Lines are the formula; dots are the virtual clock of 16 threads that really exchanged the messages.

# %% tags=["hide-input"]
link, p = Link(latency=10e-6, bandwidth=25e9), 16
sizes = [4**k for k in range(4, 16)]


def steps_and_volume(moves, route=schedules.crossbar):
    k = schedules.pieces(moves)
    return schedules.steps(moves), schedules.seconds(
        moves, [1 / k] * k, Link(0, 1), route
    )  # in units of α and of n / β


def times(moves, n, route=schedules.crossbar):
    steps, volume = steps_and_volume(moves, route)
    return steps * link.latency + volume * n / link.bandwidth


def clock(moves, n):
    world = World(p, link=link)
    world.run(
        lambda comm: schedules.all_reduce(
            comm, torch.empty(n // 4, device="meta"), moves
        )
    )  # sizes without numbers
    return world.ledger.time


# where 30 α + 2 (15/16) n/β = 8 (α + n/β)
cross = link.latency * link.bandwidth * (p - 1 - 4) / (4 - (p - 1) / p)

# %% tags=["hide-output"]
print(
    f"a rank of a ring of 64 sends {cost.sent('all_reduce', 0, [1] * 64) / 64:.2f} n; a"
    f" tree wins below {cross / 1e6:.1f} MB at p = {p}"
)
sent_guess.settle(cost.sent("all_reduce", 0, [1] * 64) / 64)
tree_guess.settle(cross / 1e6, digits=2)

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 3.4))
for i, (name, algorithm) in enumerate(THREE.items()):
    moves = algorithm(p)
    ax.plot(sizes, [1e3 * times(moves, n) for n in sizes], color=f"C{i}", label=name)
    measured = [clock(moves, n) for n in sizes[1::4]]
    ax.plot(sizes[1::4], [1e3 * t for t in measured], "o", color=f"C{i}")
    compare(
        [1e3 * t for t in measured],
        [1e3 * times(moves, n) for n in sizes[1::4]],
        f"{name}: clock and formula, ms",
    )
ax.annotate(
    f"{cross / 1e6:.1f} MB",
    xy=(cross, 1e3 * times(ring.all_reduce(p), cross)),
    xytext=(cross / 60, 1.6),
    arrowprops={"arrowstyle": "->", "color": palette.ink},
)
ax.set(
    xscale="log",
    yscale="log",
    xlabel="bytes of the tensor",
    ylabel="milliseconds",
    title="All-reduce over 16 ranks",
)
ax.legend()
figure(
    fig,
    alt=(
        "Time of an all-reduce over 16 ranks against its size, logarithmic axes. The"
        " tree is flat at 0.08 ms and the ring at 0.3 ms for small tensors; they cross"
        f" at {cross / 1e6:.1f} MB, beyond which the tree takes 4 times as long."
        " Halving lies on the lower of both."
    ),
)

# %% [markdown]
# The ring's first part is $2(p-1)\alpha$ whatever the size, its second part hardly depends on $p$. So a ring is the best there is for
# large tensors and the worst for small ones. A tree wins below 0.9 MB: the 8 KB that a 7B model all-reduces for a token would have
# to come from a hundred tokens before the ring is as good.
#
# **But why does anybody use rings**, if halving has the ring's bytes and the tree's steps? Because the formula believes that any
# two ranks have a wire of their own. Give the 16 ranks a ring of cables, or one network card for four ranks, and
# count the busiest wire in each step:

# %%
n = 2**30
print(
    f"{'1 GiB over 16 ranks, ms':<36}"
    + "".join(f"{name:>10}" for name in (*THREE, "bruck"))
)
networks = {
    "a switch, a wire for any pair": schedules.crossbar,
    "machines of 4 with one card each": schedules.shared_card(4),
    "a ring of cables": schedules.cable_ring(16),
}
for network, route in networks.items():
    print(
        f"{network:<36}"
        + "".join(
            f"{1e3 * times(ALGORITHMS[a](16), n, route):>10.0f}"
            for a in (*THREE, "bruck")
        )
    )

# %% [markdown]
# The ring never notices: its messages go to neighbours, and neighbours are near in every network. Halving's long steps share cables, and it
# takes twice the ring's time; Bruck's longest messages travel furthest, and it takes over five times. NCCL
# therefore has rings and, since version 2.4, trees ([release notes](https://docs.nvidia.com/deeplearning/nccl/archives/nccl_2127/release-notes/rel_2-4-2.html
# "nvidia2019nccl24")), and chooses by size and topology.
#
# **On the machine that made this page** there are 2 cores for 8 processes, and a third law holds. Messages do not travel side by side; each
# takes its turn on a core. Real processes, real sockets:

# %% tags=["nbval-ignore-output"]
import time


def stopwatch(comm, moves, n, repeats=5):
    x, taken = torch.zeros(n), []
    for _ in range(repeats):
        comm.barrier()
        start = time.perf_counter()
        schedules.all_reduce(comm, x, moves)
        taken.append(time.perf_counter() - start)
    return min(taken)


def all_three(comm):
    return {
        name: [stopwatch(comm, f(comm.size), n) for n in (1, 1_000_000)]
        for name, f in THREE.items()
    }


taken = launch(all_three, 8, timeout=120)[0]
print(f"{'8 processes':<12}{'messages':>10}{'4 bytes':>12}{'4 MB':>12}")
for name, (small, large) in taken.items():
    print(
        f"{name:<12}{len(THREE[name](8)):>10}{1e3 * small:>9.1f}"
        f" ms{1e3 * large:>9.1f} ms"
    )

# %% [markdown]
# For 4 bytes the times follow the *number of messages* in the list, 112 to 14 to 48, not the number of steps. A model is as good
# as the resource that it counts; know which one yours runs out of.

# %% [markdown]
# ## Play
#
# Move the ranks: the ring's flat part rises with $p$, the tree's with $\log p$, and the crossing moves to the right. Then change the network.

# %% tags=["nbval-ignore-output"]
PLAY = {
    "switch": lambda p: schedules.crossbar,
    "cards": lambda p: schedules.shared_card(4),
    "cables": schedules.cable_ring,
}
GRID = [4**k for k in range(4, 16)]
counted = {
    (p, network): {name: steps_and_volume(f(p), route(p)) for name, f in THREE.items()}
    for p in (4, 16, 64)
    for network, route in PLAY.items()
}
lines = {
    key: {
        name: [s * link.latency + v * n / link.bandwidth for n in GRID]
        for name, (s, v) in found.items()
    }
    for key, found in counted.items()
}


def winners(ranks, network):
    """The fastest of the three at each size, as (name, largest size)."""
    best = [
        min(THREE, key=lambda a: lines[ranks, network][a][i]) for i in range(len(GRID))
    ]
    return [
        (a, n) for a, n, b in zip(best, GRID, [*best[1:], None], strict=True) if a != b
    ]


def draw_times(ranks, network):
    fig, ax = plt.subplots(figsize=(4.8, 3.2))
    for i, (name, t) in enumerate(lines[ranks, network].items()):
        ax.plot(GRID, [1e3 * s for s in t], color=f"C{i}", label=name, lw=3.5 - i)
    ax.set(
        xscale="log",
        yscale="log",
        ylim=(0.03, 2e4),
        xlabel="bytes of the tensor",
        ylabel="milliseconds",
    )
    ax.minorticks_off()
    ax.legend(loc="upper left")
    return fig


def size(n):
    return (
        f"{n / 2**30:.0f} GiB"
        if n >= 2**30
        else f"{n / 2**20:.0f} MiB"
        if n >= 2**20
        else f"{n / 2**10:.0f} KiB"
    )


def describe_times(ranks, network):
    return f"{ranks} ranks, {network}. Fastest: " + ", then ".join(
        f"{a} up to {size(n)}" for a, n in winners(ranks, network)
    )


explore(
    draw_times,
    alt=describe_times,
    title="All-reduce, 10 µs per message, 25 GB/s a wire",
    start={"ranks": 16, "network": "switch"},
    ranks=[4, 16, 64],
    network=list(PLAY),
)

# %% [markdown]
# ## At scale
#
# NVIDIA's own benchmark, on 8 machines of 8 GPUs, and once more with the algorithm forced:
#
# ```
# mpirun -np 64 -N 8 ./build/all_reduce_perf -b 8 -e 8G -f 2 -g 1
# NCCL_ALGO=Tree mpirun -np 64 -N 8 ./build/all_reduce_perf -b 8 -e 8G -f 2 -g 1
# ```
#
# Its column `busbw` is size / time × $2\frac{p-1}{p}$ ([NCCL tests](https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
# "nvidia2024nccltests")): the ring's bytes over the time, so that a perfect ring shows the speed of its wire at any $p$.
#
# **The wires.** Inside a machine GPUs talk over PCIe, or over NVLink and a switch that gives any pair full speed. Between machines the bytes go
# through network cards. InfiniBand and RoCE cards do *RDMA*: the card itself reads and writes the GPU's memory, where TCP copies the data
# through two operating systems first. NCCL (NVIDIA GPUs), gloo (CPUs) and MPI (supercomputers) hide all that, and `torch.distributed`
# is one interface to the three. An H100 has 450 GB/s of NVLink in each direction on paper;
# [380 were measured](https://github.com/NVIDIA/nccl/issues/1264 "nvidia2024p2p") between two. The other speeds are the standards' own, one way:

# %%
lane = 128 / 130 / 8  # bytes a transfer on a PCIe lane: 128 bits of data in 130
WIRES = {
    "10 Gb/s Ethernet": (1.25, (8, 1024)),
    "PCIe 4.0, 16 lanes of 16 GT/s": (16 * 16 * lane, (8,)),
    "PCIe 5.0, 16 lanes of 32 GT/s": (16 * 32 * lane, (8,)),
    "400 Gb/s InfiniBand or RoCE": (50, (8, 1024)),
    "NVLink of an H100, as measured": (380, (8,)),
}
print(f"{'all-reduce of 7B gradients':<31}{'GB/s':>6}{'p = 8':>11}{'p = 1024':>11}")
for wire, (speed, sizes_) in WIRES.items():
    row = [
        cost.seconds("all_reduce", p, gradient, Link(10e-6, speed * 1e9))
        for p in sizes_
    ]
    print(f"{wire:<31}{speed:>6.4g}" + "".join(f"{1e3 * t:>8,.0f} ms" for t in row))

# %% [markdown]
# From the slowest wire to the fastest it is a factor of 300, and that decides how a model is split: what travels most must stay
# inside the machine. A ring of 1,024 is less than a fifth slower than one of 8, because its bytes are $2\frac{p-1}{p}n$ for any $p$.
#
# **A measured choice.** [Goyal et al. 2017](https://arxiv.org/abs/1706.02677 "goyal2017accurate") trained on 32 servers with 50 Gb/s Ethernet, and
# report that halving and doubling was 3 times as fast as the ring, and better up to a million elements and beyond. The steps allow at most a factor of 6.2:


# %%
def goyal(alpha, n):
    return [
        cost.seconds("all_reduce", 32, n, Link(alpha, 50e9 / 8), a)
        for a in ("ring", "halving")
    ]


print(
    "steps:",
    *(cost.steps_and_volume("all_reduce", 32, 1, a)[0] for a in ("ring", "halving")),
)
print("ring / halving, by latency and size of the tensor")
print(
    f"{'':>8}"
    + "".join(
        f"{f'{n // 1000} KB':>10}" for n in (4_000, 400_000, 4_000_000, 100_000_000)
    )
)
for alpha in (10e-6, 30e-6, 100e-6):
    row = [goyal(alpha, n) for n in (4_000, 400_000, 4_000_000, 100_000_000)]
    print(f"{1e6 * alpha:>5.0f} µs" + "".join(f"{a / b:>10.1f}" for a, b in row))

# %% [markdown]
# Their 3 is ours for 0.4 MB at 10 µs per message, and for 4 MB, a million elements, at 100 µs. The paper gives no latency, so this is no more than
# consistent. For the whole gradient of 100 MB at once our model sees little difference. They sent it layer by layer, and that is the subject
# of the next lesson.
#
# **Formulas.** [Thakur et al. 2005](https://doi.org/10.1177/1094342005051521 "thakur2005optimization") give the cost of MPICH's
# collectives in closed form. Counted from our lists, for 8 ranks:

# %%
rows = (  # operation, steps and bytes/n of the paper, our list
    ("all-gather, ring", 7, 7 / 8, ring.all_gather(8)),
    ("all-gather, doubling", 3, 7 / 8, halving.all_gather(8)),
    ("all-gather, Bruck", 3, 7 / 8, bruck.all_gather(8)),
    ("reduce-scatter, halving", 3, 7 / 8, halving.reduce_scatter(8)),
    ("broadcast, tree", 3, 3, tree.broadcast(8)),
    (
        "broadcast, scatter + ring",
        3 + 7,
        2 * 7 / 8,
        schedules.then(tree.scatter(8), ring.all_gather(8)),
    ),
    ("reduce, tree", 3, 3, tree.reduce(8)),
    (
        "reduce, Rabenseifner",
        6,
        2 * 7 / 8,
        schedules.then(halving.reduce_scatter(8), tree.gather(8)),
    ),
    ("all-reduce, doubling", 3, 3, halving.all_reduce_doubling(8)),
    ("all-reduce, Rabenseifner", 6, 2 * 7 / 8, halving.all_reduce(8)),
)
for name, rounds, volume, moves in rows:
    ours = steps_and_volume(moves)
    print(
        f"{name:<27} {rounds:>2} α + {volume:<5} n/β   counted {ours[0]:>2} α +"
        f" {ours[1]:<5g} n/β"
    )
    assert ours == (rounds, volume)

# %% [markdown]
# NCCL's newest algorithm for all-gather and reduce-scatter, PAT ([Jeaugey 2025](https://arxiv.org/abs/2506.20252 "jeaugey2025pat")), has logarithmically
# many steps for any number of ranks, as Bruck's has, but sends its long-distance messages while they are small: the lesson of the table of networks.

# %% [markdown]
# ## What to keep
#
# ```python
# def ring_all_reduce(p):            # moves (step, src, dst, chunk, add), p chunks
#     return [(s, r, (r + 1) % p, (r - s) % p, s < p - 1)
#             for s in range(2 * (p - 1)) for r in range(p)]
#
# def seconds(p, n, alpha, beta):
#     return 2 * (p - 1) * alpha + 2 * (p - 1) / p * n / beta
# ```
#
# A ring all-reduce sends $2\frac{p-1}{p}n$ bytes per rank, 1.97 $n$ for 64 ranks, and nothing sends less; collecting on
# one rank takes 64 times as long. A ring takes $2(p-1)$ steps and a tree $2\lceil\log_2 p\rceil$: with 10 µs and 25 GB/s
# a tree wins below 0.9 MB on 16 ranks. Halving has the bytes of the one and the steps of the other, but on a ring of
# cables takes twice as long as the ring for 1 GiB: the network decides.
#
# **Use it** for large tensors, on any network: a ring's messages go to neighbours only. **Not** for small ones, where its
# many latencies are most of the time: there take a tree.
#
# <details><summary>Why can no all-reduce send less than 2 (p − 1)/p · n bytes per rank?</summary>
#
# Each number needs p − 1 messages to be summed and p − 1 to be known everywhere, and p ranks share that work.
#
# </details>
#
# <details><summary>Of which two operations is a ring all-reduce made?</summary>
#
# A reduce-scatter, after which each rank has one finished chunk of the sum, and an all-gather, which hands the chunks
# around.
#
# </details>
#
# <details><summary>Why is halving not always the best?</summary>
#
# The formula gives any two ranks a wire of their own. On real networks its long steps share cables.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/05-parallelism/01-collectives.ipynb).
#
# References: Thakur et al. 2005 and Rabenseifner 2004 for the algorithms, Patarasuk & Yuan 2009 for the bound, Bruck et al. 1997 for any number of
# ranks, Goyal et al. 2017 for the choice in training.
