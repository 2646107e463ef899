# %% [markdown]
# # ZeRO and FSDP: data parallelism without the copies
#
# Data parallelism keeps a whole copy of the training state on every rank. ZeRO keeps one copy, cut over all ranks, and
# computes the same losses. You will train one model at each of its stages, weigh what every rank holds, count what every
# rank sends, and see why the last stage, which PyTorch calls FSDP, pays with half as much traffic again.

# %%
import torch

from llmlab.course import compare, explore, figure, palette, plt, predict, show

# %% [markdown]
# ## What it costs
#
# Mixed-precision training with Adam keeps 16 bytes for each parameter: 2 for the weight and 2 for its gradient in 16 bits, and
# three numbers in 32 bits, the master weight $w$, the momentum $m$ and the variance $v$.
# %%
from llmlab.models.accounting import ADAM_BYTES

psi, N = 7.5e9, 64
for kind, each in ADAM_BYTES.items():
    print(f"{kind:<15}{each:>3} bytes per parameter {each * psi / 1e9:>6.0f} GB")
each = sum(ADAM_BYTES.values())
print(
    f"{'together':<15}{each:>3} bytes per parameter {each * psi / 1e9:>6.0f} GB"
    " for 7.5 B"
    " parameters"
)
print(
    f"{N} data-parallel GPUs hold {N * each * psi / 1e12:.2f} TB, of which"
    f" {each * psi / 1e12:.2f} TB differ"
)

# %% [markdown]
# No GPU of 80 GB can hold 120 GB, so data parallelism cannot even start, although the 64 of them have memory for 42 copies.
# Tensor parallelism and pipelines would cut the model and change how it computes. ZeRO leaves the computation alone:
# each rank still runs the whole model on its own batch. It only stops keeping what another rank keeps already.
#
# ## Predict
#
# Take the same 7.5 B parameters on 64 GPUs, with nothing kept twice.

# %%
held_guess = predict("How many GB does a GPU hold?", unit="GB")
sent_guess = predict(
    "How many bytes does it send in a step, if an all-reduce of the gradients is 1?"
)

# %% [markdown]
# ## The idea
#
# A bar is what one of four ranks holds: weights, gradients, and $w, m, v$. Grey is held by all four, colour by one alone.

# %% tags=["hide-input"]
from matplotlib.patches import Rectangle

RANKS = [palette.blue, palette.vermillion, palette.green, palette.purple]
STAGES = [
    "0: data\nparallel",
    "1: optimizer\nstate cut",
    "2: gradients\ncut, too",
    "3: weights\ncut, too",
]

fig, ax = plt.subplots(figsize=(4.8, 4.4))
for stage in range(4):
    for rank in range(4):
        x, y = rank * 18.5, -(stage * 1.5)
        # cut from stage `first` on; bytes per parameter
        for first, start, width in ((3, 0, 2), (2, 2, 2), (1, 4, 12)):
            if stage >= first:
                ax.add_patch(
                    Rectangle(
                        (x + start, y),
                        width,
                        1,
                        facecolor="none",
                        edgecolor=palette.light,
                    )
                )
                ax.add_patch(
                    Rectangle(
                        (x + start + rank * width / 4, y),
                        width / 4,
                        1,
                        facecolor=RANKS[rank],
                        lw=0,
                    )
                )
            else:
                ax.add_patch(
                    Rectangle(
                        (x + start, y), width, 1, facecolor="#b9bdc3", edgecolor="white"
                    )
                )
    ax.text(-1.5, y + 0.5, STAGES[stage], ha="right", va="center", linespacing=1.1)
for rank in range(4):
    ax.text(rank * 18.5 + 8, 1.25, f"rank {rank}", ha="center", color=RANKS[rank])
for x, depth, what in (
    (1, 6.7, "weights: 2 bytes per parameter"),
    (3, 6.0, "gradients: 2"),
    (10, 5.3, "w, m, v: 12"),
):
    ax.plot([x, x, x + 1], [-4.6, -depth, -depth], color=palette.gray, lw=1)
    ax.text(x + 1.8, -depth, what, va="center")
ax.set(xlim=(-27, 73), ylim=(-7.2, 1.9))
ax.axis("off")
figure(
    fig,
    alt=(
        "Four rows of four bars, a bar a rank: 16-bit weights, 16-bit gradients, and"
        " optimizer state, which is three quarters of the bar. Stage 0: all is grey,"
        " held by every rank. Stage 1: each rank holds a different quarter of the"
        " optimizer state. Stage 2: a quarter of the gradients as well. Stage 3: a"
        " quarter of everything."
    ),
)

# %% [markdown]
# **Adam works on each element alone.** Whoever has an element's gradient and its $w, m, v$ can update it, and nobody else needs
# them. So give each of the $N$ ranks one piece of all elements ([Rajbhandari et al. 2020](https://arxiv.org/abs/1910.02054
# "rajbhandari2020zero")):
#
# $$\begin{aligned}
# \text{stage 0:}\quad & 2\Psi + 2\Psi + 12\Psi = 16\Psi \\
# \text{stage 1:}\quad & 2\Psi + 2\Psi + 12\Psi/N \\
# \text{stage 2:}\quad & 2\Psi + (2 + 12)\,\Psi/N \\
# \text{stage 3:}\quad & (2 + 2 + 12)\,\Psi/N
# \end{aligned}$$
#
# **The traffic** of stages 1 and 2 is no more than before. A ring all-reduce is a *reduce-scatter*, which leaves each rank one
# finished piece of the sum, and an *all-gather*, which hands the pieces around. ZeRO puts the update between the two: it
# reduces gradients, steps its piece, and gathers weights.
#
# **Stage 3** keeps no whole weights. Before a block runs forward, its weights are gathered; after it they are freed. Before it runs
# backward, they are gathered *again*. With the reduction of the gradients, $\Psi$ numbers travel three times, not twice.
#
# One thing is not elementwise: clipping needs the norm of the whole gradient. Each rank squares its own piece, and one number is
# all-reduced: $\lVert g\rVert^2 = \sum_r \lVert g_r\rVert^2$.

# %% [markdown]
# ## The code
#
# A *unit* is a group of parameters that travel together: one for each block, and the root for embedding, last norm and head. A
# tied head is the embedding, so it is in the root once. `update` is the whole arithmetic of a step. Stages 1 and 2 differ in *when*
# they reduce: at the step, or as soon as a unit has its last gradient.

# %%
from llmlab.parallelism.zero_and_fsdp import Zero, adamw_, update

show(adamw_, update, Zero._arrived, Zero._reduce, Zero.step)

# %% [markdown]
# Stage 3 adds four moments to every unit, and weights that come and go:

# %%
from llmlab.parallelism.zero_and_fsdp import Fsdp, Shard

show(Shard.need, Shard.free, Fsdp._before, Fsdp._after_forward, Fsdp._arrived)

# %% [markdown]
# Where is the cut? ZeRO joins a unit's parameters end to end and cuts the line, so one padding is enough, but a border falls
# inside a row. FSDP2 cuts each parameter by its rows: a rank's piece keeps the parameter's name, and a checkpoint can be
# loaded on another number of ranks. The price is a padding for each parameter. The course model over 24 ranks:

# %%
from llmlab.models import course_model
from llmlab.parallelism.zero_and_fsdp import padding, units_of

model = course_model.load().train()
print(
    f"{'unit':<10}{'parameters':>11}{'elements':>10}"
    f"{'padding: joined':>17}{'by rows':>9}"
)
for name, _, weights in units_of(model):
    shapes = [tuple(w.shape) for w in weights]
    pads = [padding(shapes, 24, layout) for layout in ("flat", "rows")]
    print(
        f"{name:<10}{len(weights):>11}{sum(w.numel() for w in weights):>10,}"
        f"{pads[0]:>17}{pads[1]:>9,}"
    )

# %% [markdown]
# A projection of 128 rows becomes 24 pieces of 6 rows, which is 144: rows cost 6% of padding in a block, where the line costs 8
# numbers. Over 2, 4 or 8 ranks neither pads anything here.
#
# And this is what rank 0 does in a forward and a backward pass of a model with two blocks. Each block is gathered twice, reduced
# once, and freed after each use; the root is gathered once and leaves last.

# %%
from llmlab.parallelism import World
from llmlab.parallelism.examples.train_zero import Settings, build


def log_events(comm):
    tiny, events = build(Settings()), []
    Fsdp(
        tiny,
        comm,
        overlap=False,
        watch=lambda event, unit: events.append(f"{event} {unit}"),
    )
    tiny(torch.arange(8)[None]).mean().backward()
    return events


events = World(3).run(log_events)[0]
middle = events.index("forward root") + 1
print("forward: ", ", ".join(events[:middle]))
print("backward:", ", ".join(events[middle:]))

# %% [markdown]
# ## Against the library
#
# First we compare with one process: a small Llama, six steps of PyTorch's AdamW with clipping, two microbatches per step. The ranks' shares
# are chosen to go wrong easily: 8 sequences of different lengths over 3 ranks, so the ranks count different numbers of tokens.
# Each loss is a sum, divided by the tokens of *all* ranks and microbatches. One thing may not be uneven: from stage 2 on, backward
# itself communicates, so a rank that has one microbatch less leaves the others waiting for ever.

# %%
import torch.nn.functional as F

from llmlab.parallelism import launch
from llmlab.parallelism.examples.train_zero import adam, batches, train


def plain(s):
    small, a = build(s), adam(s)
    optimizer = torch.optim.AdamW(
        small.parameters(), a.lr, a.betas, a.eps, a.weight_decay
    )
    history = []
    for step in range(s.steps):
        x, y = (
            torch.cat(part)
            for part in zip(*batches(s, step, rank=0, ranks=1), strict=True)
        )
        loss = F.cross_entropy(small(x).flatten(0, 1), y.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        history.append(
            (
                loss.item(),
                torch.nn.utils.clip_grad_norm_(small.parameters(), a.clip).item(),
            )
        )
        optimizer.step()
    return history, dict(small.named_parameters())


def flat(weights):
    return torch.cat([weights[name].detach().flatten() for name in sorted(weights)])


history, weights = plain(Settings())
for stage in (1, 2, 3):
    threads = World(3).run(train, Settings(stage=stage))[2]
    processes = launch(train, 2, Settings(stage=stage), timeout=120)[1]
    for where, (ours, our_weights) in (
        ("3 threads", threads),
        ("2 processes", processes),
    ):
        compare(ours, history, f"stage {stage}, {where}: losses and norms of 6 steps")
        compare(
            flat(our_weights), flat(weights), f"stage {stage}, {where}: all weights"
        )

# %% [markdown]
# PyTorch's FSDP2 is one call per block, and one for the root. It averages over ranks where we sum, hence the factor.

# %%
from llmlab.parallelism.examples import zero_libraries

show(zero_libraries.train_fsdp2)
theirs, their_weights = launch(
    zero_libraries.train_fsdp2, 2, Settings(stage=3), timeout=120
)[0]
compare(processes[0], theirs, "stage 3 and FSDP2, 2 processes: losses and norms")
compare(
    flat(processes[1]),
    flat(their_weights),
    "stage 3 and FSDP2, 2 processes: all weights",
)

# %% [markdown]
# DeepSpeed is not run on this page: its losses were recorded, by `scripts/golden/zero_goldens.py`, and a test of the project
# runs it again. What was run is this, on two processes:

# %%
show(zero_libraries.train_deepspeed)
recorded = zero_libraries.recorded()
print(
    "recorded with",
    ", ".join(f"{name} {v}" for name, v in recorded["versions"].items()),
)
for stage in (1, 2, 3):
    ours = World(2).run(train, Settings(stage=stage))[0][0]
    compare(
        ours,
        recorded["history"][str(stage)],
        f"stage {stage} and DeepSpeed (recorded): losses and norms",
    )

# %% [markdown]
# ## The experiment
#
# The course model, in bf16 with fp32 masters, on four ranks, once for each stage. Between backward and step, when a rank holds
# most, we add up the storages behind its tensors.

# %%
from llmlab.parallelism.zero_and_fsdp import (
    Adam,
    held,
    sent_bytes,
    state_bytes,
    summed_loss,
    total_bytes,
)

RANKS_, TOKENS = 4, 16
tokens = course_model.tokens("valid")[: RANKS_ * (TOKENS + 1)].view(-1, TOKENS + 1)


def engine_for(stage, model, comm, **more):
    return (
        Fsdp(model, comm, Adam(lr=1e-3), **more)
        if stage == 3
        else Zero(model, comm, Adam(lr=1e-3), stage=stage)
    )


def experiment(comm, model, stage, steps=4):
    engine, mine, losses = (
        engine_for(stage, model, comm),
        tokens[comm.rank :: comm.size],
        [],
    )
    for _ in range(steps):
        loss = summed_loss(model, mine[:, :-1], mine[:, 1:]) / (len(tokens) * TOKENS)
        loss.backward()
        losses.append(comm.all_reduce(loss.detach()).item())
        most = held(engine)
        engine.step()
    return losses, most


half = course_model.load().train().bfloat16()  # each rank of a World gets its own copy
psi = sum(w.numel() for w in model.parameters())
measured = {stage: World(RANKS_).run(experiment, half, stage) for stage in range(4)}
kinds = ("weights", "gradients", "optimizer")
print(f"Ψ = {psi:,}; MB on each of {RANKS_} ranks")
print("stage" + "".join(f"{k:>11}" for k in (*kinds, "measured", "formula")))
for stage, ranks in measured.items():
    most = ranks[0][1]
    assert all(r[1] == most for r in ranks), "every rank holds as much"
    row = [most[k] for k in kinds] + [
        sum(most.values()),
        total_bytes(stage, psi, RANKS_),
    ]
    print(f"{stage:>5}" + "".join(f"{x / 1e6:>11.3f}" for x in row))
drift = max(
    abs(a - b)
    for s in range(4)
    for a, b in zip(measured[s][0][0], measured[0][0][0], strict=True)
)
print(
    "largest difference of a loss between stages: under"
    f" {0.01 if drift < 0.01 else drift}"
)

fig, (left, right) = plt.subplots(1, 2, figsize=(4.8, 3.2), width_ratios=(3, 2))
for stage, ranks in measured.items():
    below = 0.0
    for kind, color in zip(
        kinds, (palette.blue, palette.orange, palette.gray), strict=True
    ):
        height = ranks[0][1][kind] / 1e6
        left.bar(
            stage, height, bottom=below, color=color, label=kind if stage == 0 else None
        )
        below += height
    left.plot(
        stage,
        total_bytes(stage, psi, RANKS_) / 1e6,
        "_",
        color=palette.ink,
        ms=26,
        mew=2,
    )
    left.text(
        stage,
        below + 0.4,
        f"{below / psi * 1e6:.0f}Ψ" if stage in (0, 3) else f"{below / psi * 1e6:.1f}Ψ",
        ha="center",
    )
    right.plot(ranks[0][0], color=f"C{stage}", lw=6.5 - 1.8 * stage)
left.set(xlabel="stage", ylabel="MB on a rank", xticks=range(4), ylim=(0, 19.5))
left.set_title("Held")
left.legend(loc="upper right", handlelength=0.9)
right.set(xlabel="step", ylabel="loss", xticks=range(4), ylim=(0, None))
right.set_title("Same loss")
figure(
    fig,
    alt=(
        "Left: MB held by a rank at stages 0 to 3, from 16 bytes per parameter down"
        " to 4"
        " on four ranks; dashes mark the formula and lie on the bars. Right: four loss"
        " curves, drawn thinner and thinner, lie on each other."
    ),
)

# %% [markdown]
# The bytes are the formula's to the last one, and the losses agree to what bf16 can show. (In fp64, the tests find them equal
# to $10^{-9}$.)
#
# **But "16Ψ/N" is at rest.** While a block computes, its weights are whole. Sampled on rank 0, each time a block has run
# forward or backward:


# %% tags=["hide-input"]
def sample(comm, model, stage):
    engine, seen = engine_for(stage, model, comm), []

    def look(*_):
        return seen.append(sum(held(engine).values()))

    look()
    for block in model.model.layers:
        block.mlp.register_forward_hook(look)
        block.self_attn.register_full_backward_hook(look)
    summed_loss(model, tokens[:1, :4], tokens[:1, 1:5]).backward()
    look()
    engine.step()
    look()
    return [b / 1e6 for b in seen]


worlds = {(stage, 1): World(RANKS_) for stage in range(4)}  # (stage, microbatches)
curves = {stage: worlds[stage, 1].run(sample, half, stage)[0] for stage in range(4)}
fig, ax = plt.subplots(figsize=(4.8, 3.0))
LABELS = {0: (10.3, 14.7), 1: (9.3, 7.3), 2: (10.3, 5.2), 3: (10.3, 3.6)}
for stage, curve in curves.items():
    ax.plot(curve, "o-", ms=4, color=f"C{stage}")
    ax.text(*LABELS[stage], f"stage {stage}", color=f"C{stage}", va="center")
ax.axvspan(0.5, 4.5, color=palette.light, alpha=0.6, lw=0)
ax.text(2.5, 8.9, "forward", ha="center", color=palette.gray)
ax.text(6.5, 8.9, "backward", ha="center", color=palette.gray)
ax.set(
    xticks=[0, 10],
    xticklabels=["before", "after the\nstep"],
    ylabel="MB on rank 0",
    xlim=(-0.4, 12.6),
    ylim=(0, 18),
)
ax.set_title("State held, through one step")
figure(
    fig,
    alt=(
        "MB of state through a step. Stage 0 climbs during backward from"
        f" {curves[0][0]:.1f} to {max(curves[0]):.1f}, stage 1 to {max(curves[1]):.1f};"
        f" stage 2 stays near {max(curves[2]):.1f}; stage 3 starts at"
        f" {curves[3][0]:.1f}, holds up to {max(curves[3]):.1f} while blocks and root"
        f" are whole, and falls back to {curves[3][-1]:.1f}."
    ),
)
print(
    f"stage 3: {curves[3][0]:.1f} MB at rest, {max(curves[3]):.1f} MB at most; stage 2:"
    f" {max(curves[2]):.1f} MB at most"
)

# %% [markdown]
# At its peak, stage 3 holds as much as stage 2. In a model of 4 blocks, one whole block, one under way and the root are 60% of all
# weights. A 7B model has 32 blocks, and the same three are 10% of its weights.
#
# **The wire.** One step with one microbatch, and one with four whose gradients are summed before the step. In units of what an
# all-reduce of the gradients costs:


# %% tags=["hide-output"]
def accumulate(comm, model, stage, microbatches=4):
    engine = engine_for(stage, model, comm)
    for _ in range(microbatches):
        summed_loss(model, tokens[:1, :2], tokens[:1, 1:3]).backward()
    engine.step()


for stage in range(4):
    worlds[stage, 4] = World(RANKS_)
    worlds[stage, 4].run(accumulate, half, stage)
root = sum(w.numel() for w in units_of(model)[-1][2])
sent = {  # by rank 0, without the clipping's one number
    key: sum(e.bytes for e in world.ledger.events(rank=0) if e.payload > 8)
    for key, world in worlds.items()
}
all_reduce = sent[0, 1]
print(f"{'':<7}{'1 microbatch':>23}{'4 microbatches':>24}")
for stage in range(4):
    row = [
        x / all_reduce
        for m in (1, 4)
        for x in (
            sent[stage, m],
            sent_bytes(stage, psi, RANKS_, microbatches=m, kept=root),
        )
    ]
    print(
        "stage {}{:>11.3f}, formula {:.3f}{:>11.3f}, formula {:.3f}".format(stage, *row)
    )
print(
    "stage 3, were the root gathered twice as well:",
    sent_bytes(3, psi, RANKS_) / all_reduce,
)
held_guess.settle(total_bytes(3, 7.5e9, 64) / 1e9, digits=2)
sent_guess.settle(sent_bytes(3, 7.5e9, 64) / sent_bytes(0, 7.5e9, 64))

# %% [markdown]
# With one microbatch this is the paper's account: $2\Psi$, $2\Psi$, $2\Psi$, $3\Psi$. (Our stage 3, like FSDP2, keeps the root between
# forward and backward, and the root is a quarter of this model.) **With four it is another.** A rank that may not keep
# whole gradients must reduce them after each microbatch, so stage 2 sends $(m+1)\Psi$ and stage 3 $3m\Psi$.
# DeepSpeed's authors give this answer to
# [the same question](https://github.com/deepspeedai/DeepSpeed/issues/2252 "deepspeed2022stage2"). With many microbatches, take
# stage 1.
#
# **Can the traffic be hidden?** Four blocks with the proportions of a 7B model on 8 GPUs, at 50 GB/s per GPU and 40% of 989 TFLOP/s, 8,192
# tokens per GPU. The bytes are those of our small blocks, on a wire slower in proportion; the clock is the ledger's.

# %% tags=["hide-input"]
from llmlab.models.presets import preset
from llmlab.parallelism import Link

seven = preset("llama-2-7b")
block_7b = seven.hidden_size * (4 * seven.hidden_size + 3 * seven.intermediate_size)
SMALL = Settings(vocab=8, hidden=32, intermediate=86, layers=4, dtype="bfloat16")
block_small = sum(w.numel() for w in build(SMALL).model.layers[0].parameters())
forward_s = 2 * block_7b * 8192 / (0.4 * 989e12)
WORK = {"forward": forward_s, "backward": 2 * forward_s}


def timeline(overlap):
    def fn(comm):
        model = build(SMALL)

        def watch(event, unit):
            return (
                event in WORK
                and unit != "root"
                and comm.work(WORK[event], f"{event} {unit}")
            )

        Fsdp(model, comm, overlap=overlap, watch=watch)
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()

    world = World(8, link=Link(latency=0.0, bandwidth=50e9 * block_small / block_7b))
    world.run(fn)
    return world.ledger


GANTT = {
    "forward": palette.sky,
    "backward": palette.blue,
    "all_gather": palette.orange,
    "reduce_scatter": palette.vermillion,
}
fig, axes = plt.subplots(2, 1, figsize=(4.8, 3.5), sharex=True)
ledgers = {overlap: timeline(overlap) for overlap in (False, True)}
for ax, (overlap, ledger) in zip(axes, ledgers.items(), strict=True):
    for e in ledger.events(rank=0):
        kind = e.label.split()[0] if e.op == "work" else e.op
        lane = 1 if e.op == "work" else 0
        if kind in GANTT:
            ax.barh(
                lane,
                1e3 * (e.end - e.start),
                left=1e3 * e.start,
                color=GANTT[kind],
                height=0.8,
                edgecolor="white",
            )
    ax.set(yticks=[0, 1], yticklabels=["wire", "rank 0"], ylim=(-0.55, 1.55))
    ax.set_title(
        f"{'gather ahead, reduce behind' if overlap else 'one after the other'}:"
        f" {1e3 * ledger.time:.0f} ms"
    )
    ax.grid(False)
axes[1].set_xlabel("ms")
fig.legend(
    [plt.Rectangle((0, 0), 1, 1, color=c) for c in GANTT.values()],
    ["forward", "backward", "all-gather", "reduce-scatter"],
    loc="outside lower center",
    ncols=2,
)
figure(
    fig,
    alt=(
        "Two Gantt charts of rank 0 and its wire. One after the other: computation and"
        f" messages alternate, {1e3 * ledgers[False].time:.0f} ms. With overlap most"
        f" messages lie under computation, {1e3 * ledgers[True].time:.0f} ms; the first"
        " gather of each direction and the last reduction remain exposed."
    ),
)
computing = 1e3 * 4 * 3 * forward_s
print(f"computing alone: {computing:.0f} ms")

# %% [markdown]
# With 8,192 tokens a block computes longer than it travels, and three messages stay exposed, whatever the number of blocks: the first gather
# of each direction, and the last reduction. Computation shrinks with the tokens, messages do not.
#
# **Offload** ([Ren et al. 2021](https://arxiv.org/abs/2101.06840 "ren2021offload")). The 12 bytes of $w, m, v$ are touched once per step.
# They can live in the host's memory, with Adam running there; what crosses PCIe is a gradient down and a weight up, 2 bytes each.

# %%
from llmlab.parallelism.zero_and_fsdp import Host, offload_seconds


def offloaded(comm, model):
    host = Host()
    engine = Zero(model, comm, stage=2, host=host)
    host.clear()  # the masters' first way down is no part of a step
    summed_loss(model, tokens[:1, :4], tokens[:1, 1:5]).backward()
    most = held(engine)
    engine.step()
    return most, host.bytes_down, host.bytes_up


for n in (1, 4):
    most, down, up = World(n).run(offloaded, half)[0]
    device = (most["weights"] + most["gradients"]) / psi
    print(
        f"N = {n}: {device:.0f}Ψ on the device, {most['host'] / psi:.1f}Ψ on the host,"
        f" PCIe {down / psi:.1f}Ψ down, {up / psi:.1f}Ψ up"
    )
for n in (1, 8):
    parts = offload_seconds(7.5e9 / n)
    # tokens that take as long to compute
    same = sum(parts.values()) * 0.4 * 989e12 / (6 * 7.5e9)
    print(
        f"7.5 B over {n} GPU{'s' * (n > 1)}, ms per step: "
        + ", ".join(f"{k} {1e3 * v:.0f}" for k, v in parts.items())
    )
    print(f"   as long as {same / 1e3:.1f} k tokens per GPU take to compute")

# %% [markdown]
# The times are for PCIe 4.0 (32 GB/s one way) and a host memory of 200 GB/s, with nothing overlapped. Alone, a GPU must
# compute 17,500 tokens per step before the host's two seconds are half of it. Over 8 GPUs in 8 machines each host has an
# eighth of the work.

# %% [markdown]
# ## Play
#
# What a GPU holds at each stage. Move $N$: stages 1 and 2 run into a floor, stage 3 does not. The dashed line is 80 GB.

# %% tags=["hide-input", "nbval-ignore-output"]
MODELS = {"7.5 B": 7.5e9, "70 B": 70e9, "405 B": 405e9}


def draw_state(model, N):
    fig, ax = plt.subplots(figsize=(4.8, 3.0))
    for stage in range(4):
        left = 0.0
        for kind, color in zip(
            kinds, (palette.blue, palette.orange, palette.gray), strict=True
        ):
            width = state_bytes(stage, MODELS[model], N)[kind] / 1e9
            ax.barh(
                stage, width, left=left, color=color, label=kind if stage == 0 else None
            )
            left += width
        ax.text(
            left + 0.012 * 16 * MODELS[model] / 1e9,
            stage,
            f"{left:,.1f} GB" if left < 100 else f"{left:,.0f} GB",
            va="center",
        )
    ax.axvline(80, color=palette.ink, ls="--", lw=1.2)
    ax.set(
        xlim=(0, 1.28 * 16 * MODELS[model] / 1e9),
        xlabel="GB on a GPU",
        yticks=range(4),
        ylabel="stage",
    )
    ax.invert_yaxis()
    fig.legend(loc="outside upper left", ncols=3, handlelength=1.0)
    return fig


def describe_state(model, N):
    sizes = [total_bytes(stage, MODELS[model], N) / 1e9 for stage in range(4)]
    fits = [str(stage) for stage in range(4) if sizes[stage] <= 80]
    listed = ", ".join(
        f"stage {stage} {size:,.1f} GB" for stage, size in enumerate(sizes)
    )
    return (
        f"{model} parameters on {N} GPUs: {listed}. Fits in 80 GB:"
        f" {'stage ' + ', '.join(fits) if fits else 'none'}."
    )


explore(
    draw_state,
    alt=describe_state,
    title=(
        "Weights, gradients and optimizer state of mixed-precision training with Adam"
    ),
    start={"model": "7.5 B", "N": 64},
    model=list(MODELS),
    N=[1, 8, 64, 1024],
)

# %% [markdown]
# ## At scale
#
# The same training on 8 GPUs, NCCL instead of gloo, 7B parameters:
#
# ```
# torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_zero --stage 3 --dtype bfloat16 --vocab 32000 --hidden 4096 \
#     --intermediate 11008 --layers 32 --heads 32 --kv-heads 32 --sequences 8 --seq 4096
# ```
#
# (Each rank first builds the whole model on its host, in fp32, and then keeps its pieces. Beyond 7B one starts from tensors on the
# `meta` device instead, as the libraries do.) Which stage? The lowest that fits: stage 1 sends least under accumulation, stage 2 is for gradients that do not fit, stage 3 for weights
# that do not.
#
# In production take FSDP2, as in `train_fsdp2`, or DeepSpeed, as in `train_deepspeed`; both run under torchrun as
# `llmlab.parallelism.examples.zero_libraries`. DeepSpeed's stage is a line of its JSON configuration, below, and
# `"offload_optimizer": {"device": "cpu"}` beside it moves $w, m, v$ to the host. FSDP2's
# `MixedPrecisionPolicy(param_dtype=torch.bfloat16)` keeps pieces and gradients in fp32 and no second weight:
# $4 + 4 + 4 + 4$ bytes, 16 again.

# %%
import json

print(json.dumps(zero_libraries.deepspeed_config(Settings(stage=3), ranks=8), indent=1))

# %% [markdown]
# <details><summary>For the curious: what these libraries do where one would guess otherwise</summary>
#
# If your losses differ from those of a run in DeepSpeed, or a model that you loaded is a little off, look here first. Seen with DeepSpeed 0.19.8 and
# PyTorch 2.13; a test of the project runs each line.
#
# | what you write | one would guess | what happens |
# |---|---|---|
# | DeepSpeed, no `"gradient_clipping"` | no clipping | clips at the norm 1.0, as our `Adam` does; PyTorch's optimizers never clip. `0` turns it off |
# | DeepSpeed, `"type": "Adam"` | Adam with $L_2$ | AdamW; Adam only with `"adam_w_mode": false` |
# | `"AdamW"` without `"weight_decay"` | one default | 0, but PyTorch's 0.01 with `"torch_adam": true` |
# | `torch.distributed.checkpoint.load` into another dtype | an error | a cast without a word; into whole numbers it cuts off |
# | a shape or a name that is not in the checkpoint | an `Exception` | a `BaseException`: `except Exception` lets it pass, and your fallback does not run |
# | `save` into a folder that has a checkpoint | an error, or both | a warning, and the old names are gone |
#
# The folded cell runs the last three. So compare dtypes before you load, and give every checkpoint a folder of its own.
#
# </details>

# %% tags=["hide-cell"]
import tempfile
import warnings

from torch.distributed import checkpoint

warnings.filterwarnings("ignore", message="torch.distributed is disabled")
warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
folder, weights = tempfile.mkdtemp(), torch.tensor([1.7, 300.25, -2.5])
checkpoint.save({"w": weights}, checkpoint_id=folder, no_dist=True)
print(f"{'saved':<15}", *(f"{v:g}" for v in weights.tolist()))
for dtype in (torch.bfloat16, torch.int64):
    waiting = {"w": torch.zeros(3, dtype=dtype)}
    checkpoint.load(waiting, checkpoint_id=folder, no_dist=True)
    print(f"{dtype!s:<15}", *(f"{v:g}" for v in waiting["w"].tolist()))


def load_or_start_anew(state):
    """What a training script does; its fallback."""
    try:
        checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    except Exception:
        return "starts anew"
    return "loaded"


try:
    print(load_or_start_anew({"v": torch.zeros(3)}))
except BaseException as error:
    inside = type(error.failures[0][0]).__name__
    print(f"the script ends with {type(error).__name__}; inside it, a {inside}")

checkpoint.save({"v": weights}, checkpoint_id=folder, no_dist=True)
names = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
print("names after a second save:", ", ".join(names))

# %% [markdown]
# **The paper's Table 1**, GB per GPU, by our formulas:

# %%
from llmlab.parallelism.zero_and_fsdp import TABLE_1, TABLE_2, agreement, largest_model

print(
    "Figure 1, 7.5 B on 64:",
    ", ".join(f"stage {s}: {total_bytes(s, 7.5e9, 64) / 1e9:.1f}" for s in range(4)),
)
names, words = {7.5e9: "7.5 B", 128e9: "128 B", 1e12: "1 T"}, []
print(f"{'model':<7}{'N':>5}   {'paper: stages 1, 2, 3':<24}{'ours':<26}")
for parameters, rows in TABLE_1.items():
    for ranks, printed in rows.items():
        ours = [total_bytes(s, parameters, ranks) / 1e9 for s in (1, 2, 3)]
        words += (
            row := [agreement(x, text) for x, text in zip(ours, printed, strict=True)]
        )
        if ranks in (4, 64, 1024):
            theirs = "".join(f"{text:<8}" for text in printed)
            listed = "".join(f"{x:<9.4g}" for x in ours)
            print(
                f"{names[parameters]:<7}{ranks:>5}   {theirs:<24}{listed:<27}"
                f"{', '.join(row)}"
            )
print(
    f"all {len(words)} entries: {words.count('same')} the same, {words.count('cut')}"
    f" the same but cut off, {words.count('differs')} differ"
)

# %% [markdown]
# "Cut" is 4187 for our 4187.5: the digits were dropped, not rounded. **Table 2** asks the other way round, and has measurements: the
# largest model on 64 GPUs of 32 GB.

# %%
for stage, predicted in TABLE_2["predicted"].items():
    ours, ran = largest_model(stage, 32e9, 64), TABLE_2["ran"].get(stage)
    note = f"{ran / 1e9:.1f} B ran, {ran / ours:.0%} of it" if ran else "not run"
    print(
        f"stage {stage}: paper {predicted / 1e9:>5.1f} B, ours {ours / 1e9:>5.1f} B;"
        f" {note}"
    )
print(
    "offload on one GPU of 32 GB: the paper trains 13 B; 2Ψ of weights would allow"
    f" {32 / 2:.0f} B"
)

# %% [markdown]
# The predictions are the same. Less than that ran, because the formula leaves no room for activations and buffers.
#
# ## What to keep
#
# ```python
# def step(w, g, piece, adam, comm):      # w, g (Ψ,) whole; piece: this rank's w, m, v
#     g = comm.reduce_scatter(g)          # (Ψ/N,): its part of the sum over ranks
#     adam(*piece, g)                     # in place; elementwise, so nobody else is needed
#     w.copy_(comm.all_gather(piece[0]))  # Ψ + Ψ numbers, as an all-reduce
# ```
#
# Adam is elementwise, so ZeRO cuts $16\Psi$ bytes to $16\Psi/N$ with the same losses: 120 GB to 1.9 GB for 7.5 B
# parameters on 64 GPUs. Stages 1 and 2 send no more than an all-reduce ($2\Psi$), stage 3 half as much again ($3\Psi$);
# with $m$ microbatches it is $2\Psi$, $(m+1)\Psi$ and $3m\Psi$. Gathering ahead and reducing behind hides the wire where
# a block computes longer than it travels: 187 ms become 123, of which 101 are computation, and three messages stay
# exposed.
#
# **Use it** at the lowest stage that fits: stage 1, which is the function above, for optimizer states, stage 2 for
# gradients, stage 3 for weights. **Not** at stage 2 or 3 with many microbatches, each of which sends again, and not at
# stage 3 with few tokens per GPU, which leave too little work to hide the messages.
#
# <details><summary>Why may each rank update its piece alone?</summary>
#
# Adam works on each element by itself: whoever has its gradient and its w, m and v needs nothing else.
#
# </details>
#
# <details><summary>Which three journeys make the 3Ψ of stage 3?</summary>
#
# Weights are gathered before a block's forward and again before its backward, and gradients are reduced to their owners.
#
# </details>
#
# <details><summary>Which part of the step is not elementwise?</summary>
#
# Clipping. Each rank squares its own piece, and one number is all-reduced.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/05-parallelism/03-zero-and-fsdp.ipynb).
#
# References: Rajbhandari et al. 2020, Ren et al. 2021, and
# [Zhao et al. 2023](https://arxiv.org/abs/2304.11277 "zhao2023fsdp"), who tell what it took to make FSDP fast.
