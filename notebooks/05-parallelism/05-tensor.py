# %% [markdown]
# # Tensor parallelism
#
# One matrix, many owners: every weight of a Llama is cut over the ranks, and the split model computes what the whole one
# does. You will see which cut needs one message where another needs two, and when a grid of ranks beats a line of them.

# %%
from functools import cache

import torch
import torch.nn.functional as F

from llmlab.course import compare, explore, figure, palette, plt, predict, show

# %% [markdown]
# ## What it costs
#
# A model that does not fit on one accelerator costs more than a bigger accelerator: it costs communication in every
# layer of every step. First the size of the problem, for a published model.
# %%
from llmlab.models.accounting import adam_bytes, parameters, weight_bytes
from llmlab.models.presets import preset

big = preset("llama-2-70b")
weights, training = weight_bytes(big), sum(adam_bytes(big).values())
print(f"Llama 2 70B: {parameters(big) / 1e9:.1f} G parameters")
print(
    f"to serve it in 16 bits: {weights / 1e9:.0f} GB of weights, at least"
    f" {-(-weights // 80e9):.0f} GPUs of 80 GB"
)
print(
    f"to train it with Adam: {training / 1e9:.0f} GB of state, at least"
    f" {-(-training // 80e9):.0f} GPUs of 80 GB"
)

# %% [markdown]
# Data parallelism does not help: each rank would still hold all of it. A pipeline gives each rank a few layers, but a
# single request then visits one rank after another, and each waits for the one before. Tensor parallelism cuts
# *inside* the layer, so all ranks work on the same token at the same time. That is why it is what serving systems reach
# for first. Its price is the subject of this lesson.

# %% [markdown]
# ## Predict
#
# An MLP has two matrices, $Z = \varphi(XA)\,B$. Four ranks each hold a quarter of $A$ and a quarter of $B$; all of them
# know $X$, and all of them need $Z$. If you cut $A$ by columns you can gather the pieces of $\varphi(XA)$; if you do
# the same with $B$ you gather again: two collectives in the forward pass. $\varphi(XA)$ is four times as wide as $X$.

# %%
count_guess = predict("With the best cut of B, how many collectives are left?")
bytes_guess = predict("How many bytes does a rank send, if gathering twice is 1?")

# %% [markdown]
# ## The idea
#
# Colour is ownership: what a rank holds has its colour, and what all ranks hold is grey.

# %% tags=["hide-input"]
from matplotlib.patches import Rectangle

RANKS = [palette.blue, palette.vermillion, palette.green, palette.purple]


def draw_matrix(ax, at, size, name, cut=None, mesh=(1, 1)):
    """A matrix at (x, y) of (width, height), its blocks coloured by the rank that owns
    them.
    """
    rows, columns = (
        mesh
        if cut == "blocks"
        else (4, 1)
        if cut == "rows"
        else (1, 4)
        if cut == "columns"
        else (1, 1)
    )
    w, h = size[0] / columns, size[1] / rows
    for i in range(rows):
        for j in range(columns):
            color = RANKS[(i * columns + j) % 4] if cut else "#b9bdc3"
            ax.add_patch(
                Rectangle(
                    (at[0] + j * w, at[1] + (rows - 1 - i) * h),
                    w,
                    h,
                    facecolor=color,
                    edgecolor="white",
                )
            )
    ax.text(at[0] + size[0] / 2, at[1] + size[1] + 0.12, name, ha="center")


fig, axes = plt.subplots(2, 1, figsize=(4.8, 4.0))
for ax, line in zip(axes, (True, False), strict=True):
    kinds = (None, "columns", "columns", "rows", None) if line else ("blocks",) * 5
    sizes = ((1, 1.2), (1.6, 1), (1.6, 1.2), (1, 1.6), (1, 1.2))
    x = 0.0
    for name, kind, size in zip("XAHBZ", kinds, sizes, strict=True):
        draw_matrix(ax, (x, 0), size, f"${name}$", kind, (2, 2))
        x += size[0] + 0.45
    ax.set(xlim=(-0.1, x - 0.35), ylim=(-0.15, 2.15), aspect="equal")
    ax.set_title("1-D: a line of 4 ranks" if line else "2-D: a grid of 2 × 2 ranks")
    ax.axis("off")
figure(
    fig,
    alt=(
        "Five matrices X, A, H, B, Z. In 1-D, X and Z are held whole by all four ranks,"
        " A and H are cut by columns and B by rows. In 2-D each of the five is cut into"
        " a grid of 2 by 2 blocks, one for each rank."
    ),
)

# %% [markdown]
# **In one dimension** ([Shoeybi et al. 2019](https://arxiv.org/abs/1909.08053 "shoeybi2019megatron")) cut $A$ by columns
# and $B$ by rows, the same way:
#
# $$H_i = \varphi(X A_i), \qquad Z = \sum_i H_i B_i .$$
#
# $\varphi$ acts on each column alone, so $H_i$ never has to travel. The sum over $i$ is one all-reduce. Cut $A$ by rows
# instead and $\varphi$ would need the sum first, because $\varphi(a+b) \neq \varphi(a) + \varphi(b)$.
#
# Backward has a sum of its own: every rank computes $\partial L/\partial X$ from its columns only. Two conjugate functions
# put both sums where they belong. $f$ does nothing forward and all-reduces backward; it stands before $X A_i$. $g$
# all-reduces forward and does nothing backward; it stands after $H_i B_i$.
#
# **In attention** a head is a natural column: cut $W_q, W_k, W_v$ by heads and $W_o$ by rows. A bias after $W_o$ or
# $B$ belongs to no rank: add it once, after the sum. With grouped-query attention there may be fewer key/value heads than
# ranks; then several ranks hold a copy of one head, and its gradient must be summed over the copies.
#
# **The vocabulary** is the widest matrix of all. Each rank has $V/p$ rows of the embedding and $V/p$ columns of the logits
# $z$. The loss needs the largest logit, the sum of exponentials, and the target's logit:
#
# $$\begin{gathered}
# \ell = \log \sum_j e^{z_j - m} + (m - z_{\text{target}}), \\
# m = \max_j z_j .
# \end{gathered}$$
#
# Each of the three is a number per token, reduced over ranks. The logits stay where they are.

# %% [markdown]
# ## The code
#
# A *rank function* takes a communicator and runs once on each rank. `World(4)` runs it on four threads that take turns,
# and writes every byte into a ledger.

# %%
from llmlab.parallelism import World

world = World(4)
sums = world.run(
    lambda comm: comm.all_reduce(torch.full((1000,), float(comm.rank)))[0].item()
)
print("each rank has", sums)
print(world.ledger)

# %% [markdown]
# A ring all-reduce of $n$ bytes costs each rank $2\frac{p-1}{p}n$: here $1.5 \times 4000$. Below are $f$, $g$, and the two layers.

# %%
from llmlab.parallelism.tensor import (
    ColumnParallelLinear,
    CopyToRanks,
    RowParallelLinear,
    SumOverRanks,
)

show(CopyToRanks, SumOverRanks, ColumnParallelLinear, RowParallelLinear)

# %% [markdown]
# One call cuts a model: `parallelize(model, comm)`. What is cut is data, a plan that can be printed. Here it is for the
# course model over 4 ranks, which has 2 key/value heads: each is held twice.

# %%
from llmlab.models import course_model
from llmlab.parallelism.tensor import PLAN, gather_state, parallelize

model = course_model.load()
shapes = World(4).run(
    lambda comm, m: {
        n: tuple(w.shape) for n, w in parallelize(m, comm).named_parameters()
    },
    model,
)[0]
whole = {n: tuple(w.shape) for n, w in model.named_parameters()}
print(f"{'module':<14}{'cut by':<12}{'dimension':<11}{'whole':<14}on each rank")
for module, dim, by in PLAN:
    name = next((n for n in whole if n.endswith(f"{module}.weight")), None)
    if name:
        print(f"{module:<14}{by:<12}{dim:<11}{whole[name]!s:<14}{shapes[name]}")

# %% [markdown]
# `lm_head` is missing because it is tied: it *is* the embedding, and stays so on each rank. The loss:

# %%
from llmlab.parallelism.tensor import VocabParallelCrossEntropy

show(VocabParallelCrossEntropy)

# %% [markdown]
# ## Against the library
#
# PyTorch has the same two cuts, as `ColwiseParallel` and `RowwiseParallel` on DTensors. They need real processes. `launch`
# forks four of them from this cell, in about a second, and they talk over gloo; the rank function does not notice.

# %%
import torch.distributed.tensor.parallel as dtensor
from torch.distributed.device_mesh import init_device_mesh

from llmlab.parallelism import launch


def against_dtensor(comm):
    torch.manual_seed(0)
    p, r = comm.size, comm.rank
    mlp = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.SiLU(), torch.nn.Linear(256, 64)
    )
    up, down = (
        {k: v.detach().clone() for k, v in mlp[i].named_parameters()} for i in (0, 2)
    )
    x, y = (torch.ones(8, 64).cumsum(1).sin().requires_grad_() for _ in range(2))

    first = ColumnParallelLinear(up["weight"].chunk(p)[r], up["bias"].chunk(p)[r], comm)
    second = RowParallelLinear(down["weight"].chunk(p, 1)[r], down["bias"], comm)
    ours = second(F.silu(first(x)))
    ours.square().sum().backward()

    plan = {"0": dtensor.ColwiseParallel(), "2": dtensor.RowwiseParallel()}
    theirs = dtensor.parallelize_module(mlp, init_device_mesh("cpu", (p,)), plan)(y)
    theirs.square().sum().backward()
    grads = [first.weight.grad, x.grad], [mlp[0].weight.grad.to_local(), y.grad]
    return ours.detach(), theirs.detach(), *map(torch.cat, grads)


ours, theirs, our_grads, their_grads = launch(against_dtensor, 4, timeout=120)[3]
compare(ours, theirs, "output on rank 3")
compare(our_grads, their_grads, "gradients on rank 3: its slice of A, and X", tol=1e-4)

# %% [markdown]
# Now the whole course model: three steps of training, split over 4 ranks, then put together again. In `World`, and in four
# processes, against one plain model that was never split.

# %%
from llmlab.parallelism.tensor import vocab_parallel_cross_entropy

tokens = course_model.tokens("valid")[: 2 * 65].view(2, 65)


def train(model, loss_of, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(tokens[:, :-1]))
        loss.backward()
        optimizer.step()
    return loss.item()


def train_split(comm, model):
    parallelize(model, comm)
    V = model.config.vocab_size
    loss = train(
        model,
        lambda logits: vocab_parallel_cross_entropy(logits, tokens[:, 1:], comm, V),
    )
    return loss, gather_state(model, comm)


world = World(4)
in_threads = world.run(train_split, model)[0]
in_processes = launch(train_split, 4, model, timeout=120)[0]
plain = train(
    model, lambda logits: F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
)
for where, (loss, state) in (("4 threads", in_threads), ("4 processes", in_processes)):
    compare(loss, plain, f"{where}: loss after 3 steps")
    flat = [
        torch.cat([d[n].flatten() for n in sorted(state)])
        for d in (state, model.state_dict())
    ]
    compare(*flat, f"{where}: all weights")

# %% [markdown]
# The ledger knows what a step cost. Each of the 4 blocks has two all-reduces forward ($g$ after $W_o$ and after the MLP) and
# two backward ($f$ before each). One more forward is the embedding's $g$, one more backward the head's $f$; the loss has
# two small ones, and the shared key/value heads sum their gradients over pairs of ranks.

# %%
by_kind = {}
for e in world.ledger.events("all_reduce", rank=0):
    place, way = e.site.split(" in ")
    key = (place.split(":")[0], way, "×".join(map(str, e.shape)), len(e.group))
    by_kind[key] = by_kind.get(key, 0) + 1
for (file, way, size, ranks), n in by_kind.items():
    print(
        f"{n // 3:>3} all-reduces per step over {ranks} ranks in {way:<9} of {size:<9}"
        f" ({file})"
    )

# %% [markdown]
# ## The experiment
#
# First the question from above. Both rank functions compute the same $Z$ from the same quarter of the weights.

# %% tags=["hide-output"]
M, d, f = 64, 128, 512
torch.manual_seed(0)
X, A, B = torch.randn(M, d), torch.randn(d, f) / d**0.5, torch.randn(f, d) / f**0.5


def gather_twice(comm):
    H = comm.all_gather(F.silu(X @ A.chunk(4, 1)[comm.rank]), dim=1)
    return comm.all_gather(H @ B.chunk(4, 1)[comm.rank], dim=1)


def column_then_row(comm):
    H = F.silu(X @ A.chunk(4, 1)[comm.rank])
    return comm.all_reduce(H @ B.chunk(4, 0)[comm.rank])


spent = {}
for fn in (gather_twice, column_then_row):
    world = World(4)
    compare(world.run(fn)[2], F.silu(X @ A) @ B, fn.__name__, tol=1e-4)
    spent[fn] = world.ledger.count(rank=0), world.ledger.bytes(rank=0)
ratio = spent[column_then_row][1] / spent[gather_twice][1]
count_guess.settle(spent[column_then_row][0])
bytes_guess.settle(ratio, digits=2)

# %% [markdown]
# It takes one collective, and fewer bytes, because what travels is as wide as $X$ and not as wide as $H$.
#
# **But look at how it scales.** An all-reduce of $Z$ costs $2\frac{p-1}{p}|Z|$: nearly the same for 8 ranks as for 800. The
# ranks compute less and less and send as much as ever. And $X$ lies whole on each of them.
#
# **In two dimensions** ([van de Geijn & Watts 1997](https://www.netlib.org/lapack/lawnspdf/lawn96.pdf "geijn1997summa");
# [Xu et al. 2021](https://arxiv.org/abs/2104.05343 "xu2021optimus")) $p = q^2$ ranks form a grid, and rank $(i,j)$ holds one
# block of *every* matrix. In step $t$, block $X_{it}$ is broadcast along row $i$ and $A_{tj}$ down column $j$;
# each rank multiplies the two and adds. After $q$ steps it has $Y_{ij}$. This is SUMMA, and its two gradients are SUMMAs too.

# %%
from llmlab.parallelism.tensor import Summa, block, summa, unblock

show(Summa)


def product_on_a_grid(comm):
    grid = comm.mesh(2, 2)
    x, a = block(X, grid).requires_grad_(), block(A, grid).requires_grad_()
    y = summa(x, a, grid)
    y.sum().backward()
    return [unblock(t.detach(), grid) for t in (y, x.grad, a.grad)]


for ours, theirs, what in zip(
    World(4).run(product_on_a_grid)[3],
    (X @ A, torch.ones(M, f) @ A.T, X.T @ torch.ones(M, f)),
    ("SUMMA: Y", "SUMMA: gradient of X", "SUMMA: gradient of A"),
    strict=True,
):
    compare(ours, theirs, what, tol=1e-4)

# %% [markdown]
# A rank sends blocks of $1/q^2$ of a matrix, $q-1$ times: $\frac{q-1}{q^2}(|X|+|A|)$ forward, three times that with backward.
# This *falls* with $p$, as $1/\sqrt{p}$. The 2.5-D method ([Wang et al. 2021](https://arxiv.org/abs/2105.14500
# "wang2021tesseract")) stacks $d$ grids, each with its share of the rows of $X$ and a copy of the weights. The 3-D method
# ([Agarwal et al. 1995](https://doi.org/10.1147/rd.395.0575 "agarwal1995three");
# [Bian et al. 2021](https://arxiv.org/abs/2105.14450 "bian2021maximizing")) cuts all three loops of the product on a cube.
#
# Dots are measured: an MLP, forward and backward, on up to 64 threads. Lines are formulas.

# %%
from llmlab.parallelism.tensor import MLPShape, crossover, measure, mesh_for, mlp_cost

shape = MLPShape(M=1152, d=144, f=576)
dots = {
    "1-D": (2, 4, 9, 16, 36, 64),
    "2-D": (4, 9, 16, 36, 64),
    "2.5-D": (8, 18, 32),
    "3-D": (8, 27, 64),
}
measured = {m: [measure(m, p, shape).sent for p in ps] for m, ps in dots.items()}
for m, ps in dots.items():
    compare(
        measured[m],
        [mlp_cost(m, p, shape).sent for p in ps],
        f"{m}: measured and predicted bytes",
        tol=0.5,
    )

# %% tags=["hide-input"]
cross = crossover(shape)
ends = {"1-D": "center", "2-D": "bottom", "2.5-D": "top", "3-D": "center"}
fig, ax = plt.subplots(figsize=(4.8, 3.4))
for i, (m, ps) in enumerate(dots.items()):
    line = [p for p in range(ps[0], 1025) if mesh_for(m, p)]
    height = [mlp_cost(m, p, shape).sent / 1e6 for p in line]
    ax.plot(line, height, color=f"C{i}", lw=1.5)
    ax.plot(ps, [b / 1e6 for b in measured[m]], "o", color=f"C{i}", ms=5)
    ax.text(1150, height[-1], m, color=f"C{i}", va=ends[m])
ax.annotate(
    f"2-D sends less\nfrom p = {cross}",
    xy=(cross, mlp_cost("1-D", cross, shape).sent / 1e6),
    xytext=(cross, 4.4),
    ha="center",
    arrowprops={"arrowstyle": "->", "color": palette.ink},
)
ax.set(
    xscale="log",
    yscale="log",
    xlim=(1.7, 3200),
    ylim=(0.1, 7),
    xlabel="ranks p",
    ylabel="MB sent by a rank",
)
ax.set_title("A line saturates, a grid does not")
ax.set_xticks([4, 16, 64, 256, 1024], ["4", "16", "64", "256", "1024"])
ax.set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
ax.minorticks_off()
figure(
    fig,
    alt=(
        "Bytes sent by a rank against the number of ranks, both on logarithmic axes."
        f" 1-D rises and stays flat. 2-D starts above it, falls below it at {cross}"
        " ranks and keeps falling; 2.5-D and 3-D fall faster. Measured dots lie on the"
        " lines."
    ),
)

# %% [markdown]
# For small $p$ the line is the better choice, and for the $p = 8$ of one machine it is nearly always taken. The crossing moves:
# 2-D sends weights too, so it needs many tokens per weight to pay off.

# %%
for M_, d_ in ((512, 4096), (4096, 4096), (65536, 4096)):
    big_shape = MLPShape(M_, d_, 4 * d_)
    print(
        f"{M_:>6} tokens at a time, hidden size {d_}: 2-D sends less from p ="
        f" {crossover(big_shape)}"
    )

# %% [markdown]
# ## Play
#
# What each rank holds and sends, by method. Move $p$: 1-D's activations stay, the others' shrink. Move the tokens: with few
# of them, a grid mostly moves weights.

# %% tags=["hide-input", "nbval-ignore-output"]
PLAY = {4: 1, 8: 2, 64: 4, 512: 8}  # ranks: depth of the 2.5-D mesh


@cache
def costs(ranks, tokens):
    shape = MLPShape(tokens, 4096, 16384)
    fits = [
        m
        for m in dots
        if mesh_for(m, ranks, PLAY[ranks]) and not (m == "2.5-D" and PLAY[ranks] == 1)
    ]
    return {m: mlp_cost(m, ranks, shape, depth=PLAY[ranks]) for m in fits}


def draw_costs(ranks, tokens):
    found = costs(ranks, tokens)
    fig, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(4.8, 3.0))
    parameters_, inputs, sent = (
        [getattr(c, k) / 2**20 for c in found.values()]
        for k in ("parameters", "activations", "sent")
    )
    left.barh(list(found), parameters_, label="weights", color="C0")
    left.barh(list(found), inputs, left=parameters_, label="inputs", color="C4")
    right.barh(list(found), sent, color="C1")
    # the same axes for all p, so that bars can be seen to shrink
    line = [costs(p, tokens)["1-D"] for p in PLAY]
    left.set(
        xlabel="MiB held",
        xlim=(0, 1.05 * max(c.parameters + c.activations for c in line) / 2**20),
    )
    right.set(
        xlabel="MiB sent",
        xlim=(
            0,
            1.3
            * max(max(x.sent for x in costs(p, tokens).values()) for p in PLAY)
            / 2**20,
        ),
    )
    fig.legend(frameon=False, loc="outside upper left", ncol=2)
    left.invert_yaxis()
    return fig


def describe_costs(ranks, tokens):
    lines = [
        f"{m} holds {(c.parameters + c.activations) / 2**20:.0f} and sends"
        f" {c.sent / 2**20:.0f}"
        for m, c in costs(ranks, tokens).items()
    ]
    return f"{ranks} ranks, {tokens} tokens, MiB per rank: " + "; ".join(lines)


explore(
    draw_costs,
    alt=describe_costs,
    title="One MLP of a 7B model (d = 4096), fp32, forward and backward",
    start={"ranks": 64, "tokens": 8192},
    ranks=list(PLAY),
    tokens=[512, 8192, 65536],
)

# %% [markdown]
# ## At scale
#
# The same rank function on 8 GPUs, a 7B model, NCCL instead of gloo; nothing but the launcher changes:
#
# ```
# torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_tensor_parallel \
#     --vocab 32000 --hidden 4096 --intermediate 11008 --layers 32 --heads 32 --kv-heads 32 --batch 1 --seq 4096
# ```
#
# On this machine, without GPUs: `torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.train_tensor_parallel`.
#
# What would the wire cost? Bytes by our count; link speeds are one-way: 450 GB/s for NVLink inside an H100 machine, 50 GB/s
# for a 400 Gb/s network card. Compute at 40% of 989 TFLOP/s.

# %%
from llmlab.models.accounting import training_flops
from llmlab.parallelism.tensor import llama_sent

seven = preset("llama-2-7b")
for p, link, speed in (
    (8, "NVLink", 450e9),
    (16, "network", 50e9),
    (64, "network", 50e9),
):
    sent = llama_sent(p, 4096, seven.hidden_size, seven.num_hidden_layers)
    compute = training_flops(seven, 1, 4096) / p / (0.4 * 989e12)
    wire = sent / speed
    print(
        f"p = {p:>2}: {sent / 1e9:.1f} GB per step over {link:<8}"
        f" {wire * 1e3:>4.0f} ms,"
        f" compute {compute * 1e3:>4.0f} ms"
    )

# %% [markdown]
# **A measured curve.** The [Ultra-Scale Playbook](https://huggingface.co/spaces/nanotron/ultrascale-playbook
# "tazi2025ultrascale") reports tokens per second and GPU for tensor parallelism over 2 to 32 H100s, 8 to a machine. Our
# model has two unknowns, the compute $c$ and the wire $k$: a token takes $c/p + k\,\frac{p-1}{p}$. Fit them on $p = 2$
# and $4$, predict the rest.

# %%
published = {2: 13923.18, 4: 12420.76, 8: 10903.32, 16: 6245.60, 32: 2146.44}
seconds = {p: 1 / (p * rate) for p, rate in published.items()}
# from c/2 + k/2 = seconds[2] and c/4 + 3k/4 = seconds[4]
k = 2 * seconds[4] - seconds[2]
c = 2 * seconds[2] - k
print("  p   paper   ours   (tokens per second and GPU)")
for p, rate in published.items():
    predicted = 1 / (p * (c / p + k * (p - 1) / p))
    note = (
        "fitted"
        if p <= 4
        else f"{predicted / rate - 1:+.0%}"
        + (", one machine" if p <= 8 else ", two machines or more")
    )
    print(f"{p:>3}  {rate:>6.0f} {predicted:>6.0f}   {note}")

# %% [markdown]
# Inside one machine the count explains the curve to within a few percent. Beyond 8 the ring leaves the machine, the wire is no
# longer the one that was fitted, and our line is too kind. (Their batch also grew with $p$.)
#
# **Formulas.** Colossal-AI's documentation gives the communication of one linear layer, forward and backward, in units of a
# matrix ([1-D, 2-D, 2.5-D, 3-D](https://colossalai.org/docs/features/3D_tensor_parallel/ "colossalai2024tensor")). We
# measure square matrices on 64 ranks.

# %%
square, p = MLPShape(M=192, d=192, f=192), 64
rows = (  # method, depth, their formula, its value
    ("1-D", 1, "2(p-1)/p", 2 * 63 / 64),
    ("2-D", 1, "6(q-1)/q", 6 * 7 / 8),
    ("2.5-D", 4, "3(q-1)(d+1)/(dq)", 3 * 3 * 5 / (4 * 4)),
    ("3-D", 1, "6(q-1)/q³", 6 * 3 / 4**3),
)
print(f"{'method':<8}{'theirs':<20}{'value':>7}{'ours':>8}{'theirs / ours':>15}")
for m, depth, formula, value in rows:
    # an MLP is two linears
    mine = measure(m, p, square, depth=depth).sent / 2 / (4 * square.d**2)
    print(f"{m:<8}{formula:<20}{value:>7.3f}{mine:>8.3f}{value / mine:>15.2f}")

# %% [markdown]
# 1-D and 3-D are the same. In 2-D theirs is exactly $q = 8$ times ours: each of the $q$ broadcasts of a block counts all its
# $q-1$ hops, one after another, where we count what one rank sends. In 2.5-D ($q = 4$) the factor is a little under 4: we
# also count the all-reduce of the weights' gradients over the layers, which their formula leaves out.

# %% [markdown]
# ## What to keep
#
# ```python
# def mlp(X, A_i, B_i, comm):                # this rank's columns of A and rows of B
#     return g(phi(f(X, comm) @ A_i) @ B_i, comm)       # f, g: the two all-reduces
# def loss(z, z_target, comm):               # its columns of z; z_target is 0 elsewhere
#     m = comm.all_reduce(z.amax(-1), op="max")
#     s, z_t = comm.all_reduce(torch.stack([(z - m[:, None]).exp().sum(-1), z_target]))
#     return s.log() + (m - z_t)
# ```
#
# Column then row needs 1 all-reduce where gathering each product needs 2 collectives, so a block costs 2 forward and 2
# backward. The vocabulary-parallel loss sends 3 numbers per token instead of $V$, and is exact. A line of ranks sends up
# to $4|X|$ per MLP however long it is; a grid sends $1/\sqrt{p}$ of its matrices, and wins from $p = 16$ in our
# experiment, and from much larger $p$ when tokens are few.
#
# **Use it** inside one machine, when a layer does not fit or one request must be answered faster. **Not** across
# machines: the all-reduces stand in the way of the next product, and no computation hides them.
#
# <details><summary>Why is A cut by columns, and not by rows?</summary>
#
# φ acts on each column alone. Cut by rows, it would need the sum first, since φ(a + b) is not φ(a) + φ(b).
#
# </details>
#
# <details><summary>What do f and g do?</summary>
#
# f does nothing forward and all-reduces backward, before the first product. g all-reduces forward and does nothing
# backward, after the second.
#
# </details>
#
# <details><summary>Why is the bias after the second product added after the sum?</summary>
#
# It belongs to no rank. Added on each of them, it would count p times.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/05-parallelism/05-tensor.ipynb).
#
# Further reading: [Cannon's algorithm](https://doi.org/10.5555/905686 "cannon1969cellular") is SUMMA with shifts instead of
# broadcasts: `llmlab.parallelism.tensor.grid.cannon`. What happens to the activations that are still whole, between $g$ and the
# next $f$, is the subject of sequence parallelism ([Korthikanti et al. 2022](https://arxiv.org/abs/2205.05198
# "korthikanti2022reducing")), the next lesson of this part.
