# %% [markdown]
# # Auto-parallel: let a search choose the cuts
#
# Data parallel, column parallel, row parallel: three lessons, three inventions. Here they are three values of one variable,
# a search over that variable finds Megatron-LM by itself, and then, on a slower wire, finds something better.

# %%
import logging
import math
import random
from functools import cache

import torch

from llmlab.course import compare, explore, figure, palette, plt, predict, show
from llmlab.parallelism import World, auto_parallel
from llmlab.parallelism.auto_parallel import DeviceMesh, execute, graphs, sharding
from llmlab.parallelism.runtime import Link

# %% [markdown]
# ## What it costs
#
# A block of a Llama has 13 operators. On a mesh of 4 × 8 devices each of them can be cut in many ways, and the ways multiply.

# %%
# seconds, bytes per second: inside a node, and between nodes
FAST, SLOW = Link(5e-6, 300e9), Link(5e-6, 25e9)
USEFUL = 0.6 * 312e12  # FLOP/s that a product reaches


def block(b):
    """A block of LLaMA 7B on b sequences of 4,096 tokens."""
    return graphs.llama_block(b=b, S=4096, d=4096, f=11008, g=32, R=1, D=128)


def cluster(slow=SLOW, memory=float("inf")):
    return DeviceMesh((4, 8), (slow, FAST), flops=USEFUL, memory=memory)


p = auto_parallel.problem(block(64), cluster())
count = math.prod(len(options) for options in p.options)
hand = auto_parallel.seconds_of(p, graphs.by_hand(p.ops))[0]
mirrored = auto_parallel.seconds_of(p, graphs.by_hand(p.ops, data=1, tensor=0))[0]
print(f"ways to cut one block: {count:.1e}")
print(
    f"Megatron inside the node, data parallel across: {hand * 1e3:.0f} ms; the other"
    f" way around: {mirrored * 1e3:.0f} ms"
)

# %% [markdown]
# The two plans differ in one decision, and one takes twice as long as the other. Nobody can try $10^{13}$ plans; people who choose by rule try
# two or three. Most training code has the cuts written into its layers, so a new cluster, a new sequence length or a new kind of layer
# means that somebody decides again.

# %% [markdown]
# ## Predict
#
# The wire between nodes carries 25 GB/s, the one inside 300. A step has 64 sequences. The first question is about the better of the two
# plans above; the second about 4 sequences over a wire of 2.5 GB/s.

# %%
saved_guess = predict("How much time does the best of all plans save?", unit="%")
busy_guess = predict(
    "How many of the 32 devices does the best plan give different work?",
    unit="devices",
)

# %% [markdown]
# ## The idea
#
# Write an operator by its loops, as `einsum` does. A product with a weight is $y_{mn} = \sum_k x_{mk} w_{kn}$: three loops.
# Give a mesh axis one of them to cut, and everything else follows. Along that axis, a tensor *that has the loop* is cut, and a
# tensor *that lacks it* is summed in pieces, so it needs an all-reduce:
#
# | the axis cuts | cut | summed in pieces | name |
# |---|---|---|---|
# | $m$, the tokens | $x$, $y$ | the gradient of $w$ | data parallel |
# | $n$, the outputs | $w$, $y$ | the gradient of $x$ | column parallel |
# | $k$, the inputs | $x$, $w$ | $y$ | row parallel |
#
# The same rule reads for attention, for a norm, for experts. That is the view of GSPMD
# ([Xu et al. 2021](https://arxiv.org/abs/2105.04663 "xu2021gspmd")), the partitioner in XLA.

# %% tags=["hide-input"]
from matplotlib.patches import Rectangle

CUT = {"m": palette.blue, "n": palette.vermillion, "k": palette.green}


def tensor(ax, at, name, dims, loop):
    """A square; stripes along the dimension that is cut, a dashed edge where it is a
    partial sum.
    """
    x, y = at
    partial = loop not in dims
    for i in range(4):
        if partial:
            break
        rows = dims.index(loop) == 0
        place = (x, y + i * 0.25) if rows else (x + i * 0.25, y)
        size = (1, 0.22) if rows else (0.22, 1)
        ax.add_patch(Rectangle(place, *size, color=CUT[loop], alpha=1 - 0.2 * i))
    if partial:
        ax.add_patch(
            Rectangle(
                at, 1, 1, fill=False, edgecolor=CUT[loop], linestyle="--", linewidth=2
            )
        )
    ax.text(x + 0.5, y - 0.28, name, ha="center", fontsize=8)


fig, axes = plt.subplots(3, 1, figsize=(4.8, 4.4))
WHO = {"m": "data parallel", "n": "column parallel", "k": "row parallel"}
for ax, (loop, title) in zip(axes, WHO.items(), strict=True):
    gradient = loop in "mn"
    for i, (name, dims) in enumerate(
        (("x", "mk"), ("w", "kn"), ("y", "mn"), ("grad x", "mk"), ("grad w", "kn"))
    ):
        whole_forward = gradient and name == {"m": "w", "n": "x"}[loop]
        # the value is whole on each rank; its gradient is the partial sum
        if whole_forward:
            ax.add_patch(Rectangle((i * 1.5, 0), 1, 1, color=palette.light))
            ax.text(i * 1.5 + 0.5, -0.28, name, ha="center", fontsize=8)
        else:
            tensor(ax, (i * 1.5, 0), name, dims, loop)
    ax.set(xlim=(-2.6, 7.2), ylim=(-0.45, 1.1))
    ax.text(-2.6, 0.5, f"{title}\nan axis cuts {loop}", va="center", fontsize=8)
    ax.axis("off")
figure(
    fig,
    alt=(
        "For each loop of a matrix product that an axis can cut, the tensors x, w, y"
        " and the gradients of x and w. Cutting m stripes x, y and grad x by rows, w is"
        " whole and grad w a partial sum. Cutting n stripes w, y, grad w by columns, x"
        " is whole and grad x a partial sum. Cutting k stripes x by columns, w by rows,"
        " and y is a partial sum."
    ),
)

# %% [markdown]
# Each row is one of the lessons before, and the drawing has no other content than the rule. It also says what does *not* cost anything: an elementwise
# function has all the loops of its input, so whichever is cut, nothing is summed. That is why column and then row is such a
# good pair: between the two products stands only an activation function, which accepts any cut that the first leaves behind.
#
# Stripes: cut. Grey: whole on each rank. Dashed: a partial sum, hence an all-reduce.
#
# Between two operators the cut may have to change, and that costs too: an all-gather when an axis lets go of a dimension, an
# all-to-all when it moves to another one, nothing when it cuts what was whole (until the gradient comes back). So the best plan
# is not the best choice for each operator: it is the minimum of
#
# $$\begin{gathered}
# \sum_v s_v \cdot c_v \;+\; \sum_{(u,v)} s_u^\top R_{uv}\, s_v \\
# \text{with}\quad \sum_v s_v \cdot m_v \le M
# \end{gathered}$$
#
# where $s_v$ is one-hot over the strategies of operator $v$, $c_v$ their seconds, $m_v$ their bytes, and $R_{uv}$ the price of
# every change of cut. That is an integer program, equation 1 of Alpa
# ([Zheng et al. 2022](https://arxiv.org/abs/2201.12023 "zheng2022alpa")), and small: a block has a few hundred binary variables.

# %% [markdown]
# ## The code

# %%
show(
    sharding.Op,
    sharding.strategies,
    sharding.collectives,
    sharding.moves,
    auto_parallel.solve,
)

# %% [markdown]
# | what | shape |
# |---|---|
# | a strategy | one loop, or "", for each axis of the mesh |
# | $c_v$, $m_v$ | (strategies of $v$,) |
# | $R_{uv}$ | (strategies of $u$, strategies of $v$) |
# | a spec | for each dimension of a tensor, the axes that cut it |

# %% [markdown]
# ## Against the library
#
# There are three checks. The first compares the integer program with brute force, where brute force can be had: an MLP with 3 operators, and a
# branch of the block with 5.

# %%
for name, graph in (
    ("MLP", graphs.mlp(16, 512, 1024, 4096)),
    ("feed-forward branch", block(16)[7:12]),
):
    small = auto_parallel.problem(graph, cluster())
    compare(
        auto_parallel.solve(small)[1] * 1e3,
        auto_parallel.brute_force(small)[1] * 1e3,
        what=f"{name}: ms of the best plan",
        tol=1e-9,
    )

# %% [markdown]
# We compare a change of cut with PyTorch's DTensor, in four real processes: rows to columns is one all-to-all, in both.

# %%
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from llmlab.parallelism import launch

x = torch.arange(8 * 12, dtype=torch.float32).view(8, 12)
CUTS = [
    (("0", ""), ("", "0"), Shard(0), Shard(1)),
    (("", "0"), ("", ""), Shard(1), Replicate()),
]


def against_dtensor(comm):
    # over gloo, DTensor says that it makes an all-to-all out of an all-gather
    logging.disable(logging.WARNING)
    mesh, theirs_mesh, found = (
        comm.mesh(comm.size),
        init_device_mesh("cpu", (comm.size,)),
        [],
    )
    for src, dst, a, b in CUTS:
        ours = execute.reshard(execute.cut(x, src, mesh), src, dst, mesh)
        theirs = (
            distribute_tensor(x, theirs_mesh, [a])
            .redistribute(placements=[b])
            .to_local()
        )
        found.append((ours, theirs))
    return found


for (src, dst, *_), (ours, theirs) in zip(
    CUTS, launch(against_dtensor, 4, timeout=120)[3], strict=True
):
    kinds = [kind for kind, *_ in sharding.moves(src, dst)]
    compare(ours, theirs, what=f"{src} to {dst} by {kinds[0]}: rank 3's shard", tol=0)

# %% [markdown]
# What is compared here is the meaning of a cut, not its speed: gloo has no all-to-all of its own, and DTensor makes one out of an all-gather there. On
# GPUs it is a single call, and $p$ times cheaper than gathering the tensor and cutting it anew.
#
# Then we run the whole thing for real: a small block, every operator cut by a *random* strategy, run on six ranks, forward and backward.
# Any plan must compute what one process does, good or bad.

# %%
tiny = graphs.llama_block(b=6, S=5, d=12, f=18, g=6, R=2, D=4)
leaves, tiny_mesh = graphs.leaves(tiny), DeviceMesh((2, 3), (SLOW, FAST))


def run(world, shape, choice):
    return world.run(lambda comm: execute.run(comm, shape, tiny, choice, leaves))


whole, whole_gradients = run(World(1), (1,), {op.name: ("",) for op in tiny})[0]
random.seed(0)
for number in range(3):
    choice = {op.name: random.choice(sharding.strategies(op, tiny_mesh)) for op in tiny}
    world = World(6)
    out, gradients = run(world, (2, 3), choice)[4]
    compare(out, whole, what=f"random plan {number}: output", tol=1e-4)
    worst = max(
        (gradients[k] - whole_gradients[k]).abs().max().item() for k in gradients
    )
    compare(
        worst,
        0.0,
        what=f"random plan {number}: {len(gradients)} gradients, largest difference",
        tol=1e-4,
    )

# %% [markdown]
# ## The experiment
#
# Now let it choose, for a block of LLaMA 7B on 32 devices. `-` means that an axis does not cut an operator.


# %%
@cache
def table(b, slow):
    p = auto_parallel.problem(block(b), cluster(Link(5e-6, slow)))
    choice, best = auto_parallel.solve(p)
    hands = {
        "tp inside": graphs.by_hand(p.ops),
        "tp across": graphs.by_hand(p.ops, data=1, tensor=0),
        "dp only": {op.name: ("b", "b") for op in p.ops},
    }
    by_hand = {}
    for name, hand in hands.items():
        if all(
            hand[op.name] in options
            for op, options in zip(p.ops, p.options, strict=True)
        ):
            by_hand[name] = auto_parallel.seconds_of(p, hand)[0]
    return choice, best, by_hand


for b, slow in ((16, 25e9), (64, 25e9), (4, 2.5e9)):
    choice, best, by_hand = table(b, slow)
    print(
        f"\n{b} sequences, {slow / 1e9:g} GB/s between nodes: {best * 1e3:.1f} ms; by"
        " hand " + ", ".join(f"{n} {t * 1e3:.1f}" for n, t in by_hand.items())
    )
    for axis, name in ((0, "across"), (1, "inside")):
        print(
            f"  {name:7}"
            + "  ".join(
                f"{op}:{s[axis] or '-'}"
                for op, s in choice.items()
                if op not in ("k", "v", "up", "norm2", "add2")
            )
        )

# %% [markdown]
# Each took about a tenth of a second to find. Nothing about transformers is in the program: it knows loops, sizes, two wires and a speed.
#
# Read the three plans.
#
# - **16 sequences:** b across, and inside g for q, k, v and o, f for gate, up and down. Column, column, column, row; column, column,
#   row. The search has found Megatron-LM with data parallelism over the slow wire, to the letter, and knows neither.
# - **64 sequences:** something that no rule proposes. Attention runs data parallel on both axes, the feed-forward network tensor
#   parallel inside the node. Its weights are larger than those of attention, so their gradients cost more to reduce, and with
#   enough sequences attention does not need tp at all.
# - **4 sequences over a slow wire:** the axis across is not used. Four nodes compute the same thing, since any message would take
#   longer than the work it saves.

# %% tags=["hide-output"]
_, best, by_hand = table(64, 25e9)
saved = 1 - best / min(by_hand["tp inside"], by_hand["tp across"])
choice, _, _ = table(4, 2.5e9)
busy = 8 * (4 if any(s[0] for s in choice.values()) else 1)
saved_guess.settle(100 * saved, digits=2)
busy_guess.settle(busy)

# %% [markdown]
# That is a few percent of a training bill, for a tenth of a second of search. Here are all sizes:

# %% tags=["hide-input"]
SIZES = (4, 8, 16, 32, 64, 128, 256)
STYLE = {
    "tp inside": (palette.blue, "o"),
    "tp across": (palette.vermillion, "s"),
    "dp only": (palette.green, "^"),
}
curves = {name: [] for name in STYLE}
for b in SIZES:
    _, best, by_hand = table(b, 25e9)
    for name in STYLE:
        curves[name].append(by_hand[name] / best if name in by_hand else float("nan"))
fig, ax = plt.subplots(figsize=(4.8, 3.2))
for name, (color, marker) in STYLE.items():
    ax.plot(SIZES, curves[name], marker, linestyle="-", color=color, label=name)
ax.axhline(1, color=palette.ink, linewidth=1)
ax.text(SIZES[0], 1.02, "the search", fontsize=8, va="bottom")
ax.set(
    xscale="log",
    xlabel="sequences per step",
    ylabel="time, the search = 1",
    ylim=(0.9, 3),
)
ax.set_xticks(SIZES, [str(b) for b in SIZES])
ax.minorticks_off()
ax.legend(fontsize=8)
ax.set_title("No rule is right at every size")
figure(
    fig,
    alt=(
        "Time of three plans made by hand over that of the search, by sequences a"
        " step. "
    )
    + " ".join(
        f"{name}: "
        + ", ".join(f"{y:.2f} at {b}" for b, y in zip(SIZES, ys, strict=True) if y == y)
        + "."
        for name, ys in curves.items()
    ),
)

# %% [markdown]
# The curves cross where the gradients of the weights, which do not depend on the batch, and the activations, which do, cost the same. To the left it pays
# to cut the weights, to the right to repeat them. A rule has to guess on which side one is; the search looks.
#
# The second level of Alpa cuts the *chain of layers* into pipeline stages, each with its share of the devices. With $m$
# microbatches a pipeline takes $\sum_i t_i + (m-1)\max_i t_i$, so the slowest stage is what counts. A dynamic program runs over
# all values that it may take. Here, 12 blocks between an embedding and a wide output layer, over 4 nodes; equal cuts leave the last
# stage with the output layer on top.

# %%
from llmlab.parallelism.auto_parallel import cut_stages, every_cut, latency

# embedding, blocks, output layer: milliseconds on one node
WORK = [0.2] + [1.0] * 12 + [2.5]


def chain(i, j, n):
    """Milliseconds of layers i … j; on n nodes they talk over the slow wire."""
    return sum(WORK[i:j]) / n**0.6


stages, searched = cut_stages(len(WORK), 4, 8, chain, shares=(1, 2, 4))
equal = [(0, 4, 1), (4, 7, 1), (7, 10, 1), (10, 14, 1)]
everything = min(
    latency([chain(*s) for s in cut], 8) for cut in every_cut(len(WORK), 4, (1, 2, 4))
)
print(
    "searched:", [f"{j - i} layers on {n}" for i, j, n in stages], f"{searched:.1f} ms"
)
print(
    "equal blocks:",
    [f"{j - i} layers on {n}" for i, j, n in equal],
    f"{latency([chain(*s) for s in equal], 8):.1f} ms",
)
compare(searched, everything, what="the dynamic program and brute force", tol=1e-9)

# %% [markdown]
# ## Play
#
# Move the batch and the wire, and watch the plan change, operator by operator. The upper row is the axis across nodes, the
# lower one inside the node. Find a place where the two halves of the block disagree.

# %% tags=["hide-input", "nbval-ignore-output"]
LOOPS = {
    "b": palette.blue,
    "g": palette.vermillion,
    "f": palette.vermillion,
    "k": palette.green,
    "n": palette.purple,
}
MEANING = {
    "b": "data",
    "g": "heads",
    "f": "channels",
    "k": "inputs",
    "n": "outputs",
    "": "not cut",
}


def draw(sequences, wire):
    choice, best, by_hand = table(sequences, wire * 1e9)
    fig, ax = plt.subplots(figsize=(4.8, 2.4))
    for x, (op, s) in enumerate(choice.items()):
        for axis in (0, 1):
            ax.add_patch(
                Rectangle(
                    (x, 1 - axis), 0.92, 0.9, color=LOOPS.get(s[axis], palette.light)
                )
            )
            ax.text(
                x + 0.46,
                1.45 - axis,
                s[axis],
                ha="center",
                va="center",
                color="white",
                fontsize=9,
            )
        ax.text(x + 0.5, -0.1, op, rotation=60, ha="right", va="top", fontsize=8)
    ax.text(-0.15, 1.45, "across", ha="right", va="center", fontsize=8)
    ax.text(-0.15, 0.45, "inside", ha="right", va="center", fontsize=8)
    ax.set(xlim=(-1.8, len(choice)), ylim=(-1.2, 2))
    ax.axis("off")
    first = min(by_hand, key=by_hand.get)
    ax.set_title(
        f"{best * 1e3:.1f} ms; best by hand: {first}, {by_hand[first] * 1e3:.1f} ms",
        fontsize=10,
    )
    return fig


def words(sequences, wire):
    choice, best, _ = table(sequences, wire * 1e9)
    rows = [
        f"{name}: " + ", ".join(f"{op} {MEANING[s[axis]]}" for op, s in choice.items())
        for axis, name in ((0, "across"), (1, "inside"))
    ]
    return (
        f"{sequences} sequences, {wire} GB/s between nodes, {best * 1e3:.1f} ms. "
        + "; ".join(rows)
        + "."
    )


explore(
    draw,
    alt=words,
    title="The best plan of a block on 4 × 8 devices",
    start={"sequences": 64, "wire": 25},
    sequences=[4, 16, 64, 256],
    wire=[1, 25, 100],
)

# %% [markdown]
# ## At scale
#
# In JAX the same search is done by hand for the inputs and by GSPMD for the rest: name the axes, annotate a few tensors,
# and the compiler propagates the cuts and inserts the collectives. In PyTorch the annotations are DTensor placements:
#
# ```
# mesh = init_device_mesh("cuda", (4, 8), mesh_dim_names=("across", "inside"))
# x = distribute_tensor(x, mesh, [Shard(0), Replicate()])       # our ("b", "")
# w = distribute_tensor(w, mesh, [Replicate(), Shard(1)])       # our ("", "f")
# ```
#
# How large is the program for a whole model? Alpa's paper treats GPT-3 with 39 billion parameters on 64 GPUs, one integer program per
# stage and mesh. Ours grows with the operators; here is what a chain of blocks costs to solve.

# %% tags=["nbval-ignore-output"]
from time import perf_counter

for blocks in (1, 2, 4):
    graph, previous = [], "x"
    for i in range(blocks):
        names = {op.name: f"{op.name}_{i}" for op in block(64)} | {"x": previous}
        graph += [
            sharding.Op(
                names[op.name],
                op.dims,
                tuple(names.get(n, f"{n}_{i}") for n in op.inputs),
                op.sizes,
                op.fn,
                op.weights,
                op.work,
            )
            for op in block(64)
        ]
        previous = f"add2_{i}"
    started = perf_counter()
    chained = auto_parallel.problem(graph, cluster())
    _, seconds = auto_parallel.solve(chained)
    print(
        f"{blocks} blocks, {len(graph)} operators: {seconds * 1e3:.0f} ms per step,"
        " found"
        f" in {perf_counter() - started:.1f} s"
    )

# %% [markdown]
# The cost model is what such a search stands and falls with. Ours counts bytes and FLOPs; Alpa measures collectives and products on the cluster beforehand and
# looks them up. A plan that is best by a few percent on paper may be second in reality, and one that is twice as slow on paper will not be
# first.
#
# Blocks repeat, so a real system solves one and copies the answer, as long as the ends agree. What this lesson leaves out, and
# Alpa or GSPMD have: partial sums that are kept and reduced later (a reduce-scatter instead of an all-reduce, which is how
# sequence parallelism comes out), uneven shards, overlap, and a compiler that fuses what is between.

# %% [markdown]
# ## What to keep
#
# ```python
# def summed(dims, s):               # axes along which a tensor is a partial sum:
#     return [axis for axis, loop in enumerate(s) if loop and loop not in dims]
#
# def seconds(pick, c, R):           # what the program minimises, with Σ m_v ≤ M
#     work = sum(c[v][i] for v, i in pick.items())
#     return work + sum(R[u, v][pick[u], pick[v]] for u, v in R)
# ```
#
# A product has 3 loops, and cutting one of them is data, column or row parallelism: one rule, "who lacks the loop is
# summed", gives every all-reduce of a training step. The integer program is exact: it equals brute force, and it finds
# Megatron at 16 sequences; with tp inside the node, 64 sequences take 4% longer than the plan found, and 256 take 23%
# longer. On a wire of 2.5 GB/s with 4 sequences, the best use of 32 devices is 8 of them: 4 nodes that do the same.
#
# **Use it** for a new cluster, a new sequence length or a new kind of layer, for which nobody has a rule. **Not** as the
# last word: it counts bytes and FLOPs, so measure the plans that come within a few percent of the best.
#
# <details><summary>Cut the loop of the outputs, n. What is cut, and what is summed?</summary>
#
# The weight and the output are cut. The input lacks n, so its gradient is a partial sum and is all-reduced: column
# parallelism.
#
# </details>
#
# <details><summary>Why is the best plan not the best choice for each operator?</summary>
#
# Between two operators the cut may have to change, and that is paid for as well.
#
# </details>
#
# <details><summary>Why are column and then row such a good pair?</summary>
#
# Between the two products stands only an activation function, which accepts any cut. So nothing has to travel there.
#
# </details>
#
# Now write the search yourself: [Exercises](../../work/05-parallelism/08-auto-parallel.ipynb).
#
# References: [Zheng et al. 2022](https://arxiv.org/abs/2201.12023 "zheng2022alpa");
# [Xu et al. 2021](https://arxiv.org/abs/2105.04663 "xu2021gspmd").
