# %% [markdown]
# # Hybrid parallelism: three axes, one job
#
# Tensor, pipeline and data parallelism are not rivals. A large job uses all three, each on its own axis of a mesh of devices. Two
# questions remain: which device sits where, and what becomes of a checkpoint when the mesh changes.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from llmlab.course import compare, explore, figure, palette, plt, predict, show
from llmlab.models.llama import Llama, LlamaConfig

# %% [markdown]
# ## What it costs
#
# MT-NLG, 530 billion parameters, was trained on up to 3,360 GPUs
# ([Smith et al. 2022](https://arxiv.org/abs/2201.11990 "smith2022using")). No single axis gets there:
# %%
from llmlab.parallelism import World
from llmlab.parallelism.choosing import shapes
from llmlab.parallelism.hybrid import Hybrid, Placement, node_links, resharding
from llmlab.parallelism.pipeline import one_f_one_b

model = shapes.gpt(105, 20480, 128)
print(
    f"state with Adam: {16 * shapes.parameters(model) / 1e12:.1f} TB,"
    f" {16 * shapes.parameters(model) / 80e9:.0f} GPUs of 80 GB"
)
print(
    f"tensor parallelism alone: at most {model.heads} ways (heads), and all of them"
    " over the network beyond 8"
)
print(f"a pipeline alone: at most {model.layers} stages (layers)")
print(
    "data parallelism alone: none of the state is cut; with ZeRO-3, every microbatch"
    " moves all weights twice"
)
print(f"all three: tp 8 × pp 35 × dp 12 = {8 * 35 * 12:,}")

# %% [markdown]
# ## Predict
#
# Sixteen devices in two nodes of eight, tp = 8 and dp = 2. You may number them so that a tensor-parallel group lies in one node, or so
# that it is spread over both (every second device). The work, the model, and the loss are the same, and a wire between nodes is 12 times slower.

# %%
guess = predict("With tp spread out, how many times longer is a step?", unit="times")

# %% [markdown]
# ## The idea
#
# What each axis sends, and how often, is what decides. In a step with $m$ microbatches a rank whose stage has $L$ layers takes part in
# $4\,L\,m$ all-reduces of activations along tp, in two messages per microbatch along pp, and in *one* all-reduce of its gradients along
# dp. The first stand in the way of the next product, so nothing can hide them; the second are small; the last can run behind the
# backward pass. In the GPT-3 at the end of this page $L$ is 12 and $m$ is 96: a rank waits 4,608 times per step for tp and once for dp. Its
# best wire belongs to tp.
#
# A mesh gives every device a coordinate for each axis. Devices that differ in one coordinate only form a group, and talk about
# one thing only: along tp about activations, along pp about the border between two stages, along dp about gradients. The order of
# the axes decides who is neighbour to whom: the last one is innermost.

# %% tags=["hide-input"]
from matplotlib.patches import Rectangle

NODE = 8


def draw_placement(ax, place, axis, title):
    """Devices in two rows, a row a node; the first group along `axis` in colour."""
    groups = place.groups(axis)
    for r in range(place.devices):
        node, at = divmod(r, NODE)
        first = r in groups[0]
        color = (
            palette.vermillion
            if first and place.nodes(axis, NODE) > 1
            else palette.blue
            if first
            else palette.light
        )
        ax.add_patch(Rectangle((at, -1.2 * node), 0.9, 1, color=color))
        ax.text(
            at + 0.45,
            0.5 - 1.2 * node,
            str(r),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if first else palette.ink,
        )
    ax.set(xlim=(-0.1, 8.1), ylim=(-1.4, 1.2))
    ax.set_title(title, fontsize=9)
    ax.axis("off")


INSIDE, SPREAD = (
    Placement({"pp": 1, "dp": 2, "tp": 8}),
    Placement({"pp": 1, "tp": 8, "dp": 2}),
)
fig, axes = plt.subplots(2, 2, figsize=(4.8, 3.0))
for column, (place, name) in enumerate(
    ((INSIDE, "tp innermost"), (SPREAD, "dp innermost"))
):
    for row, axis in enumerate(("tp", "dp")):
        draw_placement(axes[row, column], place, axis, f"{name}: a {axis} group")
said = [
    f"{name}: the first {axis} group is {place.groups(axis)[0]}, in"
    f" {place.nodes(axis, NODE)} nodes"
    for place, name in ((INSIDE, "tp innermost"), (SPREAD, "dp innermost"))
    for axis in ("tp", "dp")
]
figure(fig, alt="Sixteen devices in two nodes. " + "; ".join(said) + ".")

# %% [markdown]
# With gradients $g_r$ of replica $r$ over $n_r$ tokens, the step that all three make together is the step of one process,
#
# $$\begin{gathered}
# g = \sum_r \frac{n_r}{\sum_s n_s}\, g_r, \\
# \lVert g\rVert^2 = \sum_{\text{stages}}\;\sum_{\text{tp ranks}}\;\sum_w \frac{\lVert g_w\rVert^2}{\text{copies of } w}
# \end{gathered}$$
#
# The first formula weighs replicas by their tokens. With sequences of different lengths the plain mean over replicas would give a token in a short
# batch more weight than one in a long batch, and two runs that differ only in dp would train differently.
#
# The second formula is where implementations go wrong. A norm's weight is held by every tp rank, a shared key/value head by some, a tied
# embedding by two stages: each number must count once, or clipping differs from run to run with the mesh.

# %% [markdown]
# ## The code
#
# The order of the cuts matters. Tensor first: it replaces matrices inside the blocks and leaves the blocks standing, so that the pipeline can deal them
# out as if nothing had happened. Data last: it needs to know nothing about either, since it only averages the gradients of whatever parameters
# this rank has. Each layer of the composition sees a model, and none sees the others.
#
# A hybrid is a composition, so it is short: the model is cut by `tensor.parallelize`, its layers dealt out by `split`, the
# schedule run by `Pipeline`, and one all-reduce over dp follows. A checkpoint is a set of pieces with their places.

# %%
show(
    Hybrid.step,
    Hybrid.clip_grad_norm,
    resharding.Piece,
    resharding.load,
    resharding.assemble,
)

# %% [markdown]
# | what | shape |
# |---|---|
# | mesh | (pp, dp, tp), tp innermost |
# | a rank's weights | (out / tp, in) or (out, in / tp), of layers / pp |
# | a rank's batch | sequences / dp, in $m$ microbatches |
# | `Piece` | whole shape, dimension, first and one past the last |

# %% [markdown]
# ## Against the library
#
# We compare eight ranks, 2 × 2 × 2, with one process: the same data, three steps of AdamW with clipping, replicas with different numbers of
# tokens, grouped-query attention, a tied embedding, and a vocabulary of 37 that divides by nothing.

# %%
CONFIG = LlamaConfig(
    37,
    24,
    32,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
M = 3  # microbatches


def batches(dp, step):
    dice = torch.Generator().manual_seed(step)
    rows = [
        [torch.randint(37, (2, 6 + r + i), generator=dice) for i in range(M)]
        for r in range(dp)
    ]
    return [[(x[:, :-1], x[:, 1:]) for x in row] for row in rows]


def train(comm, sizes, steps, start=0, save=None, resume=None):
    torch.manual_seed(1)
    job = Hybrid(Llama(CONFIG), comm, Placement(sizes))
    optimizer = torch.optim.AdamW(job.parameters(), lr=1e-2, eps=1e-4)
    if resume:
        job.load(resume, optimizer)
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        losses.append(
            job.step(
                one_f_one_b(job.pp.size, M), batches(job.dp.size, step)[job.dp.rank]
            )
        )
        job.clip_grad_norm(0.5)
        optimizer.step()
    if save:
        resharding.save(save, comm.rank, job.owned(optimizer))
    return losses


def one_process(dp, steps):
    torch.manual_seed(1)
    model, losses = Llama(CONFIG), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    for step in range(steps):
        every = [b for row in batches(dp, step) for b in row]
        n = sum(y.numel() for _, y in every)
        optimizer.zero_grad()
        loss = (
            sum(
                F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
                for x, y in every
            )
            / n
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


folder = Path(tempfile.mkdtemp())
plain, expected = one_process(dp=2, steps=3)
CUBE = {"pp": 2, "dp": 2, "tp": 2}
found = World(8).run(train, CUBE, 3, save=folder / "cube")
compare(found[5], expected, what="losses of three steps, rank 5 of 8")
whole = resharding.load(
    folder / "cube",
    {n: resharding.piece(n, CONFIG) for n in resharding.whole_shapes(CONFIG)},
)
worst = max((whole[n] - w).abs().max().item() for n, w in plain.named_parameters())
compare(worst, 0.0, what="largest difference of any trained weight", tol=1e-4)

# %% [markdown]
# Then we run the same in eight real processes, and compare the groups with PyTorch's `DeviceMesh`:

# %%
from llmlab.parallelism import launch


def for_real(comm):
    from torch.distributed.device_mesh import init_device_mesh

    losses, place = train(comm, CUBE, 3), Placement(CUBE)
    mesh = init_device_mesh("cpu", tuple(CUBE.values()), mesh_dim_names=tuple(CUBE))
    theirs = {
        a: tuple(torch.distributed.get_process_group_ranks(mesh[a].get_group()))
        for a in CUBE
    }
    return losses, all(theirs[a] in place.groups(a) for a in CUBE)


results = launch(for_real, 8, timeout=120)
compare([losses for losses, _ in results][7], expected, what="losses, process 7 of 8")
print("groups of all ranks are DeviceMesh's:", all(same for _, same in results))

# %% [markdown]
# ## The experiment
#
# Now the clock. `World` can have two wires: here a node has eight devices, and a wire inside it is 12 times faster than one between nodes, as
# NVLink is against one InfiniBand port of an A100. Our model is 64 times narrower than a 7B Llama; so that products and wires keep
# their proportions, the devices compute 64 times slower too. A microbatch's compute is told to the clock by `comm.work`.

# %% tags=["hide-output"]
from llmlab.models.accounting import forward_flops
from llmlab.parallelism.runtime import Link

WIDE = LlamaConfig(
    64, 64, 160, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8
)
SPEED = 0.6 * 312e12 / 64  # FLOP/s
FAST, SLOW = Link(0.0, 300e9), Link(0.0, 25e9)
LENGTH = 32


def clocked(place, m=4, batch=8, layers=4):
    """A training step on the virtual clock: (loss, seconds, world)."""
    dp, tp, pp = (place.sizes[a] for a in ("dp", "tp", "pp"))
    world = World(place.devices, link=node_links(NODE, FAST, SLOW))
    config = replace(WIDE, num_hidden_layers=layers)
    flops = forward_flops(config, batch // dp // m, LENGTH) / tp / pp

    def step(comm):
        torch.manual_seed(0)
        job = Hybrid(
            Llama(config),
            comm,
            place,
            after_op=lambda kind, i, chunk: comm.work(
                flops * {"F": 1, "B": 2}[kind] / SPEED, kind
            ),
        )
        tokens = torch.randint(
            64, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(1)
        )
        mine = tokens.chunk(dp)[job.dp.rank].chunk(m)
        return job.step(one_f_one_b(pp, m), [(x[:, :-1], x[:, 1:]) for x in mine])

    losses = world.run(step)
    return losses[0], max(e.end for e in world.ledger), world


results = {
    name: clocked(place)
    for name, place in (("tp innermost", INSIDE), ("dp innermost", SPREAD))
}
for name, (loss, took, _) in results.items():
    print(f"{name}: loss {loss:.4f}, a step {took * 1e6:.0f} µs")
compare(results["tp innermost"][0], results["dp innermost"][0], what="the two losses")
ratio = results["dp innermost"][1] / results["tp innermost"][1]
guess.settle(ratio, digits=2)

# %% [markdown]
# The loss and the bytes are the same; only the numbering differs. Look at what rank 0 does in the two:

# %% tags=["hide-input"]
KINDS = {
    "compute": palette.blue,
    "tp": palette.vermillion,
    "dp": palette.green,
    "pp": palette.purple,
}


def spans(world, place, rank=0):
    """(kind, start, end) of everything that a rank does."""
    groups = {
        axis: next(g for g in place.groups(axis) if rank in g) for axis in place.sizes
    }
    for e in world.ledger.events(rank=rank):
        if e.end > e.start:
            kind = (
                "compute"
                if e.op == "work"
                else next((a for a, g in groups.items() if tuple(e.group) == g), "pp")
            )
            yield kind, e.start, e.end


fig, axes = plt.subplots(2, 1, figsize=(4.8, 2.8), sharex=True)
shares = {}
for ax, (name, place) in zip(
    axes, (("tp innermost", INSIDE), ("dp innermost", SPREAD)), strict=True
):
    _, took, world = results[name]
    total = dict.fromkeys(KINDS, 0.0)
    for kind, start, end in spans(world, place):
        ax.barh(0, (end - start) * 1e6, left=start * 1e6, color=KINDS[kind])
        total[kind] += end - start
    shares[name] = {k: t / took for k, t in total.items() if t}
    ax.set(yticks=[], ylabel="rank 0")
    ax.set_title(f"{name}: {took * 1e6:.0f} µs", fontsize=10)
axes[1].set_xlabel("µs on the virtual clock")
for kind in ("compute", "tp", "dp"):
    axes[0].bar(0, 0, color=KINDS[kind], label=kind)
axes[0].legend(fontsize=8, ncols=3, loc="upper right")
figure(
    fig,
    alt="What rank 0 does in a step. "
    + " ".join(
        f"{name}: " + ", ".join(f"{k} {s:.0%}" for k, s in each.items()) + "."
        for name, each in shares.items()
    ),
)

# %% [markdown]
# With tp in the node half of the step is compute. Spread out, most of it is tensor-parallel all-reduces, four for each layer and
# microbatch, while the single all-reduce of gradients, now inside a node, got *faster*. That is the whole reason for the rule "tp innermost, inside a
# node": the axis that talks most gets the best wire.
#
# The pipeline is missing from this picture because its messages are small: one activation of a microbatch goes from a stage to the next, once
# forward and once backward. That is why pp is the outermost axis, the one that may cross nodes, and even racks.
#
# Second question: the checkpoint. Four ranks train two steps with pp = 2 and tp = 2 and save. Read it with tp = 4 and no pipeline, and
# go on; then ask for it in two other splits, and compare every bit.

# %%
plain, expected = one_process(dp=1, steps=4)
World(4).run(train, {"pp": 2, "dp": 1, "tp": 2}, 2, save=folder / "first")
after = World(4).run(
    train,
    {"pp": 1, "dp": 1, "tp": 4},
    2,
    start=2,
    save=folder / "second",
    resume=folder / "first",
)
compare(after[0], expected[2:], what="losses of steps 3 and 4, in another split")

places = {n: resharding.piece(n, CONFIG) for n in resharding.whole_shapes(CONFIG)}
saved = resharding.load(folder / "first", places)
for tp, name in ((4, "four"), (1, "one")):
    World(tp).run(
        train,
        {"pp": 1, "dp": 1, "tp": tp},
        0,
        save=folder / name,
        resume=folder / "first",
    )
    again = resharding.load(folder / name, places)
    print(
        f"tp 2, pp 2 read as tp {tp}, pp 1: bit for bit equal:",
        all(torch.equal(saved[n], again[n]) for n in saved),
    )

# %%
import json

place = json.loads((folder / "first" / "rank-00001.json").read_text())
for name in [n for n in place if not n.startswith("optimizer")][:3]:
    at = place[name]
    print(
        f"rank 1 holds {name}: [{at['start']}:{at['stop']}] of dimension {at['dim']} of"
        f" {tuple(at['shape'])}"
    )

# %% [markdown]
# Why does it matter? Because no job keeps its shape. A node fails and 3,072 devices become 3,064; the long-context phase at the end of a run wants
# another mesh than the beginning; and the model that was trained with tp 8 is to be served with tp 2, or evaluated on one device. A
# checkpoint that remembers the mesh it came from makes each of these a conversion program with bugs of its own. A checkpoint that says for each
# piece where it lies in the whole makes all of them the same read.
#
# Nobody gathered a whole model for it. Each rank asks for its own pieces and reads, from each file, the part that overlaps. The
# vocabulary shows why the places must be kept: tp = 2 holds 19 + 18 rows, tp = 4 holds 10 + 10 + 10 + 7, and padding is never written.
#
# One trap is left. If four ranks save into a folder where eight did before, the files of ranks 4 to 7 stay, with old numbers at
# places that look right. `load` refuses a folder whose files contradict each other; give every save a folder of its own.

# %% [markdown]
# ## Play
#
# How would you number 16 devices? Choose the sizes and the order, and read what each axis has to cross. The bars are the times of a step
# on the virtual clock, for two layers and two microbatches.

# %% tags=["hide-input", "nbval-ignore-output"]
SIZES = {
    "tp 8, dp 2": (1, 2, 8),
    "tp 4, dp 4": (1, 4, 4),
    "tp 4, dp 2, pp 2": (2, 2, 4),
}
ORDERS = ("pp dp tp", "pp tp dp", "tp dp pp")
measured, known = {}, {}
for label, (pp, dp, tp) in SIZES.items():
    for order in ORDERS:
        sizes = {"pp": pp, "dp": dp, "tp": tp}
        place = Placement({axis: sizes[axis] for axis in order.split()})
        # an axis of one may stand anywhere
        same = tuple((axis, n) for axis, n in place.sizes.items() if n > 1)
        known[same] = known.get(same) or clocked(place, m=2, layers=2)[1]
        measured[label, order] = (place, known[same])


def draw(split, order):
    fig, ax = plt.subplots(figsize=(4.8, 2.6))
    names = list(SIZES)
    times = [measured[name, order][1] * 1e6 for name in names]
    ax.barh(
        names,
        times,
        color=[palette.blue if name == split else palette.light for name in names],
    )
    ax.axvline(
        min(t for _, t in measured.values()) * 1e6,
        color=palette.ink,
        linewidth=1,
        linestyle="--",
    )
    longest = max(t for _, t in measured.values())
    ax.set(xlabel="µs per step", xlim=(0, 1.05e6 * longest))
    ax.invert_yaxis()
    place = measured[split, order][0]
    crossing = [
        f"{axis} in {place.nodes(axis, NODE)}"
        for axis in ("tp", "dp", "pp")
        if place.sizes[axis] > 1
    ]
    ax.set_title("nodes per group: " + ", ".join(crossing), fontsize=9)
    return fig


def words(split, order):
    place, took = measured[split, order]
    rest = ", ".join(
        f"{axis} touches {place.nodes(axis, NODE)} nodes"
        for axis in place.sizes
        if place.sizes[axis] > 1
    )
    return f"{split}, axes from outer to inner {order}: {took * 1e6:.0f} µs; {rest}."


explore(
    draw,
    alt=words,
    title="Sixteen devices, two nodes",
    start={"split": "tp 8, dp 2", "order": "pp dp tp"},
    split=list(SIZES),
    order=list(ORDERS),
)

# %% [markdown]
# ## At scale
#
# The same mesh in PyTorch, and where each library hides the order of its axes:
#
# ```
# mesh = init_device_mesh("cuda", (35, 8, 8), mesh_dim_names=("pp", "dp", "tp"))      # PyTorch: outermost first
# torchrun … pretrain_gpt.py --tensor-model-parallel-size 8 --pipeline-model-parallel-size 35   # Megatron-LM: order tp-cp-ep-dp-pp, innermost first
# ```
#
# On one machine, with this lesson's own code: `torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_hybrid --pp 2 --dp 2 --tp 2`
# (it runs on CPUs as well, and takes `--save` and `--load` with any other split).
#
# [Narayanan et al. 2021](https://arxiv.org/abs/2104.04473 "narayanan2021megatron") call the composition PTD-P and train their 1T
# model with tp 8, pp 64, dp 6 on 3,072 GPUs. What would the wrong order cost there? Our planner prices a step of GPT-3 on 1,024 GPUs
# with tensor parallelism inside a node and over the network:

# %%
from llmlab.parallelism.choosing import Job, Plan, machines, planner

gpt3 = Job(shapes.gpt(96, 12288, 96), 1536, 2048, machines.machine("a100-80gb"))
# every group over the network
flat = Job(gpt3.shape, 1536, 2048, machines.machine("a100-80gb", link=25e9))
for name, where in (("tp inside the node", gpt3), ("tp over the network", flat)):
    e = planner.estimate(where, Plan(dp=16, tp=8, pp=8, sequence=True, chunks=3))
    print(f"{name}: {e.step:.1f} s a step, MFU {e.mfu:.0%}")

# %% [markdown]
# The planner assumes a flat ring over all members of a group. NCCL would reduce inside each node first, which softens the blow for a group that
# spans a few nodes, and cannot remove it: the sum has to cross the slow wire once in any case.
#
# The factor is smaller than in our experiment: a model that is 192 times wider does more arithmetic for each byte, and the wire counts
# for less. Width is what makes tensor parallelism affordable.

# %% [markdown]
# ## What to keep
#
# ```python
# def coordinates(rank, sizes):      # {"pp": …, "dp": …, "tp": …}, innermost last
#     place = {}
#     for axis, n in reversed(sizes.items()):
#         place[axis] = rank % n
#         rank //= n
#     return place
# ```
#
# 2 × 2 × 2 ranks train exactly as 1 process does, if every number counts once in the norm and every token once in the
# mean. The same 16 devices take 3.4 times as long when the tensor-parallel group leaves its node; the loss does not tell
# you. A checkpoint of pieces with their places needs 0 conversions: tp 2, pp 2 is read as tp 4 or as 1 process, bit for
# bit.
#
# **Use it** to number the devices of any mesh: the axis that talks most is innermost, so tp stays inside a node and pp
# may cross nodes. **Not** with a tp that is wider than a node, and not all three axes where one is enough.
#
# <details><summary>Why does tp get the best wire?</summary>
#
# Each microbatch all-reduces activations in every layer, and the next product waits for them. The gradients' all-reduce
# over dp comes once per step, and can run behind the backward pass.
#
# </details>
#
# <details><summary>What must be counted once in the gradient's norm?</summary>
#
# Whatever several ranks hold: a norm's weight on all tp ranks, a shared key/value head, an embedding that two stages
# share.
#
# </details>
#
# <details><summary>What makes a checkpoint readable by another mesh?</summary>
#
# Each piece is kept with its place in the whole tensor. A rank then reads from each file the part that overlaps its own
# pieces.
#
# </details>
#
# Now place the devices yourself: [Exercises](../../work/05-parallelism/07-hybrid.ipynb).
#
# References: [Narayanan et al. 2021](https://arxiv.org/abs/2104.04473 "narayanan2021megatron");
# [Smith et al. 2022](https://arxiv.org/abs/2201.11990 "smith2022using").
