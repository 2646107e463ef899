# %% [markdown]
# # Frameworks: one model, nine engines
#
# PyTorch, DeepSpeed, Megatron-LM: the parallelisms of this part, packed by others. You will train the same small Llama in each of
# them, see that the losses are the same, and find the one default that makes them differ. Then a rank is killed.

# %%
import shutil
import tempfile
from pathlib import Path

import torch

from llmlab.course import compare, explore, figure, palette, plt, predict, show
from llmlab.parallelism import World, launch
from llmlab.parallelism.frameworks import elastic, engines

# %% [markdown]
# ## What it costs
#
# On one machine a failure is an annoyance. On many it is a schedule. BigScience trained BLOOM 176B on 384 GPUs, and a step of 2,048
# sequences took 105 seconds ([Le Scao et al. 2022](https://arxiv.org/abs/2211.05100 "lescao2022bloom"); the time is that of its
# training log). Suppose that one GPU fails once in five years, which takes the whole job down.

# %%
devices, life = 384, 5 * 365 * 24  # hours
between = life / devices
share = elastic.lost_share(
    every=3 * 3600, writing=40, mean_time_between_failures=between * 3600, restart=900
)
print(
    f"a failure every {between / 24:.1f} days; with 16,384 GPUs, every"
    f" {life / 16_384:.1f} hours"
)
print(
    "a checkpoint of 2.3 TB every 3 hours, 40 s to write, 15 minutes to restart:"
    f" {share:.1%} of the time is lost"
)
best = elastic.best_interval(40, between * 3600)
least = elastic.lost_share(best, 40, between * 3600, restart=900)
print(f"the best interval: {best / 3600:.1f} hours, {least:.1%} lost")
print(f"a week: {7 * 24 / between:.1f} failures; BLOOM's report: 1 to 2")
print(f"Llama 3 on 16,384 GPUs: 419 in 54 days, one every {54 * 24 / 419:.1f} hours")

# %% [markdown]
# Five years is a guess, and two reports bear it out: BLOOM's, and Llama 3's 419 unexpected interruptions in 54 days
# ([Llama Team 2024](https://arxiv.org/abs/2407.21783 "llama2024herd"), section 3.3.4). BigScience saved every 3 hours, says its log,
# about twice the best interval, and lost 0.3% by it: the minimum is flat.
#
# A framework is what does this for you: it starts the ranks, finds them, wraps the model, notices when one is gone, and reads
# the checkpoint. You have written the mathematics yourself in the lessons before.

# %% [markdown]
# ## Predict
#
# DDP, FSDP2, tensor-parallel DTensors, a PyTorch pipeline, DeepSpeed's ZeRO and its pipeline, Megatron-core's layers: the same weights, the same data,
# four steps of AdamW. One of them disagrees in the fourth digit if its settings are left as they come.

# %%
guess = predict(
    "Which engine differs, with its settings as they come?",
    choices=["DDP", "FSDP2", "DTensor", "PyTorch pipelining", "DeepSpeed ZeRO"],
)

# %% [markdown]
# ## The idea
#
# Every engine answers the same five questions, each in its own words:
#
# | | PyTorch | DeepSpeed | Megatron-LM |
# |---|---|---|---|
# | who starts the ranks | `torchrun` | `deepspeed` | `torchrun` |
# | who finds whom | rendezvous (c10d) | hostfile, ssh | rendezvous |
# | what wraps the model | `DDP`, `fully_shard` | `initialize()` | its own layers |
# | who owns backward | you | the engine | the schedule |
# | where settings live | your code | a JSON file | command-line flags |
#
# The rows are where code differs. PyTorch is a library: it wraps your model and leaves the loop to you. DeepSpeed is an engine: you hand over model and
# settings, and ask it to run backward and step, because it decides when gradients are reduced and when an accumulated step is complete. Megatron-LM is a
# program: you start `pretrain_gpt.py` with flags, and change its source when the flags do not suffice.
#
# Under all three lies one picture: $n$ nodes of $g$ devices, a rank $r = g \cdot \text{node} + \text{local}$, and a store at a known
# address where the ranks leave each other theirs. A launcher on each node sets `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and
# `MASTER_PORT`; everything else follows from `init_process_group`.

# %% tags=["hide-input"]
from matplotlib.patches import FancyBboxPatch

NODES, PER_NODE = 2, 4
fig, ax = plt.subplots(figsize=(4.8, 2.7))


def box(x, y, w, h, **style):
    ax.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.08", **style)
    )


for node in range(NODES):
    left = 5.2 * node
    box(left, 0, 4.6, 2.6, facecolor="none", edgecolor=palette.gray)
    ax.text(left + 0.15, 2.72, f"node-{node + 1}", va="bottom", fontsize=9)
    box(left + 0.2, 1.85, 4.2, 0.55, facecolor=palette.blue)
    ax.text(
        left + 2.3,
        2.12,
        "torchrun: starts, watches",
        color="white",
        ha="center",
        va="center",
        fontsize=9,
    )
    for local in range(PER_NODE):
        box(left + 0.2 + 1.07 * local, 0.2, 0.98, 1.35, facecolor=palette.green)
        x = left + 0.69 + 1.07 * local
        ax.text(
            x,
            1.05,
            str(PER_NODE * node + local),
            color="white",
            ha="center",
            va="center",
            fontsize=15,
        )
        ax.text(
            x,
            0.45,
            f"local {local}",
            color="white",
            ha="center",
            va="center",
            fontsize=8,
        )
box(3.0, 3.7, 3.8, 0.6, facecolor=palette.vermillion)
ax.text(
    4.9, 4.0, "store: node-1:29500", color="white", ha="center", va="center", fontsize=9
)
for node in range(NODES):
    ax.annotate(
        "",
        (4.0 + 1.8 * node, 3.7),
        (2.3 + 5.2 * node, 2.42),
        arrowprops={"arrowstyle": "<->", "color": palette.ink},
    )
ax.set(xlim=(-0.1, 9.9), ylim=(-0.1, 4.4))
ax.axis("off")
figure(
    fig,
    alt=(
        f"{NODES} nodes with {PER_NODE} processes each, started and watched by a"
        " torchrun on each node. The large number is RANK, 0 to 7 over both nodes, the"
        " small one LOCAL_RANK, 0 to 3 on each. Both launchers meet at one store,"
        " node-1:29500."
    ),
)

# %% [markdown]
# And the loss must be the same, by the algebra of the lessons before: with $N$ tokens in all,
# $\nabla L = \frac{1}{N}\sum_r \sum_{t \in r} \nabla \ell_t$ whoever adds it up.

# %% [markdown]
# ## The code
#
# The task is as small as it can be and still show a mistake: a Llama of four layers, eight sequences of 24 tokens, four steps, no dropout, and an
# $\epsilon$ in Adam that is large enough for rounding not to be blown up. If an engine averages where it should add, forgets a gradient, or
# applies weight decay twice, the second loss tells.
#
# Read two of these side by side. What an engine costs you is what differs.

# %%
show(
    engines.train,
    engines.ddp,
    engines.fsdp2,
    engines.dtensor,
    engines.deepspeed,
    engines.megatron,
)

# %% [markdown]
# | engine | a rank sees | a rank holds |
# |---|---|---|
# | DDP | (8 / p, 24) tokens | all weights |
# | FSDP2, ZeRO-3 | (8 / p, 24) tokens | 1 / p of every weight |
# | DTensor, Megatron-core | (8, 24) tokens | 1 / p of each of 7 matrices per block |
# | pipelining, PipelineModule | (2, 24) tokens, 4 times | 4 / p blocks |

# %% [markdown]
# ## Against the library
#
# Here the library is all there is to it. PyTorch's four engines run live, two processes each, started from this cell. DeepSpeed takes its time to
# import, and Megatron-core wants an environment of its own, so those five are recorded: a script of the repository made them, and a test runs DeepSpeed again.

# %%
reference = World(1).run(engines.plain)[0]
LIVE = {
    "DDP": engines.ddp,
    "FSDP2": engines.fsdp2,
    "DTensor": engines.dtensor,
    "pipelining": engines.pipelining,
}
found = {f"PyTorch {name}": launch(fn, 2, timeout=120)[0] for name, fn in LIVE.items()}
record = engines.recorded()
found |= record["losses"]
print(f"{'one process':32}", " ".join(f"{x:.4f}" for x in reference))
for name, losses in found.items():
    worst = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
    print(
        f"{name:32}",
        " ".join(f"{x:.4f}" for x in losses),
        " same" if worst < 1e-4 else f" differs by {worst:.1e}",
    )
print(
    f"{'ZeRO-1, settings as they come':32}",
    " ".join(f"{x:.4f}" for x in record["clipping left at its default"]),
)
guess.settle("DeepSpeed ZeRO")
print("recorded with", ", ".join(f"{k} {v}" for k, v in record["versions"].items()))

# %% [markdown]
# Nine engines agree to five digits. DeepSpeed needed one line to get there: unless told otherwise it **clips gradients at norm 1.0**,
# and PyTorch does
# not clip at all. The last line is DeepSpeed with its default: the third loss differs in the fourth digit, too little to notice, too much to be
# rounding. If you ever compare two engines, set `gradient_clipping` on both sides first.
#
# Why trust such a comparison? Because each engine took another road. DDP reduced whole gradients in buckets; FSDP2 and ZeRO-3 never had a whole gradient;
# DTensor and Megatron-core summed activations inside every block; the pipelines added up four microbatches. If five roads end at one number, it is the right
# number.
#
# The third distance, then: what is true of two processes must be true of two *machines*. The tests of this lesson build two hosts out of
# Linux's network namespaces, with a virtual cable between them, run one `torchrun` on each, and count the bytes on the cable. The losses are the
# same again, and more than a megabyte of gradients crosses it in six steps.
#
# ## All at once
#
# A real run wants several of these. torchtitan ([Liang et al. 2024](https://arxiv.org/abs/2410.06511 "liang2024torchtitan")) does not
# wrap the model in a class of its own. It gives the axes of a block of ranks names, `pp`, `dp` and `tp`, and applies PyTorch's parts to one
# model in one order: **this stage's layers, tensor, recomputing, compile, data**. Here is that order on the same Llama as above.

# %%
from llmlab.parallelism.frameworks import composed
from llmlab.parallelism.frameworks.composed import Axes

show(composed.parallelize, composed.shard_parameters)
MESHES = (Axes(dp=2, tp=2, recompute=True), Axes(pp=2, dp=2, recompute=True))
for axes in MESHES:
    losses = launch(composed.train, 4, axes, timeout=200)[0]
    name = f"pp={axes.pp} dp={axes.dp} tp={axes.tp} on 4 processes"
    compare(losses, reference, f"{name}: losses", tol=1e-4)

# %% [markdown]
# A matrix ends as a DTensor on two axes: `tp` has cut it by columns or rows, and `dp` cuts what is left along dimension 0. That is why tensor
# comes before data, and it is one of four things that surprise on the first day. A test holds each of them, with the version in which it
# was seen: PyTorch 2.13.
#
# | you do | what happens |
# |---|---|
# | `fully_shard` first, `parallelize_module` after it | an error: "Cannot distribute a DTensor with device mesh …" |
# | `clip_grad_norm_` when norms lie on `dp` and matrices on `dp` and `tp` | an error: "All operands … must have the same mesh". torchtitan puts the norms on `tp` too, and has a clipping of its own |
# | `checkpoint_wrapper` | `named_parameters()` has its name in between, `state_dict()` has not: an optimizer that is set up by name must know |
# | `torch.compile(block)` | every name in the state begins with `_orig_mod.`; `block.compile()` changes none |
# | what DeepSpeed and a distributed checkpoint do unasked | clipping, decay and casts: [ZeRO and FSDP](03-zero-and-fsdp.ipynb) has that table |
#
# ## The experiment
#
# Kill a rank. `elastic.supervise` does in a notebook what `torchrun --max-restarts` does on a cluster: it starts the ranks, waits, and
# starts all of them again when one dies. The rank function saves every second step, and rank 1 is told to kill itself, with a signal
# that nothing can catch, before its fourth step.

# %%
from llmlab.parallelism.examples.train_elastic import Settings, train

folder = Path(tempfile.mkdtemp())
whole = launch(train, 2, Settings(str(folder / "whole")))[0]
results, failures = elastic.supervise(
    train, 2, Settings(str(folder / "killed"), kill_rank=1, kill_at=3)
)
print("never killed:       ", " ".join(f"{x:.4f}" for x in whole))
print("the second attempt: ", " " * 13, " ".join(f"{x:.4f}" for x in results[0]))
for failure in failures:
    print(f"rank {failure.rank} {failure.kind}")
compare(results[0][-1], whole[-1], what="the last loss, with and without the kill")

# %%
show(elastic.save, elastic.load, elastic.supervise)

# %% [markdown]
# What happened in between is worth a look at the clock. Rank 0 was in an all-reduce when its neighbour vanished; over gloo the broken connection raises at
# once, over NCCL it would wait until a timeout of minutes, which is why the launch files set asynchronous error handling. Then the supervisor killed what
# was left, forked two new ranks, and both read the same file.
#
# Step 3 was done twice and nothing else was lost. Three things made that work, and each is easy to get wrong:
#
# - the checkpoint is **renamed into place**, so a rank that dies while writing leaves the one before intact;
# - the optimizer's averages are in it, not only the weights;
# - the data of a step is a function of the step's number, so the second attempt reads what the first one read.
#
# Leave out the second, and see what happens:


# %% tags=["hide-input"]
def resumed(with_optimizer):
    """Two steps, a restart, four more: the losses."""
    model = engines.build()
    optimizer = torch.optim.AdamW(model.parameters(), **engines.ADAM)
    losses = []
    for step in range(6):
        if step == 2:  # the restart
            state, averages = model.state_dict(), optimizer.state_dict()
            model = engines.build()
            model.load_state_dict(state)
            optimizer = torch.optim.AdamW(model.parameters(), **engines.ADAM)
            if with_optimizer:
                optimizer.load_state_dict(averages)
        x, y = engines.batch(step)
        loss = engines.loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


right, wrong = resumed(True), resumed(False)
fig, ax = plt.subplots(figsize=(4.8, 2.8))
ax.plot(
    range(1, 7), whole, "o-", color=palette.blue, label="never killed", markersize=9
)
ax.plot(
    range(1, 7),
    right,
    "x",
    color=palette.ink,
    label="weights and averages",
    markersize=8,
)
ax.plot(
    range(1, 7),
    wrong,
    "s--",
    color=palette.vermillion,
    label="weights only",
    markersize=5,
)
ax.axvline(2.5, color=palette.gray, linewidth=1)
ax.text(2.55, ax.get_ylim()[1], "restart", va="top", fontsize=8)
ax.set(xlabel="step", ylabel="loss", xticks=range(1, 7))
ax.legend(fontsize=8)
ax.set_title("What a checkpoint must hold")
figure(
    fig,
    alt="Losses of six steps with a restart after the second. "
    + "; ".join(
        f"{n}: " + ", ".join(f"{x:.3f}" for x in ys)
        for n, ys in (
            ("never killed", whole),
            ("weights and averages", right),
            ("weights only", wrong),
        )
    )
    + ".",
)
print(f"last loss: {right[-1]:.4f} with Adam's averages, {wrong[-1]:.4f} without")

# %% [markdown]
# No error, no warning: another run, and a worse one. Adam without its past takes full-sized steps again, in directions that two batches
# suggest. If you see a bump in a loss curve at every restart, look for what the checkpoint does not hold.

# %% [markdown]
# ## Play
#
# How often should you save? Often, and you spend your time writing; seldom, and each failure costs half an interval.
# [Young 1974](https://doi.org/10.1145/361147.361115 "young1974first") found where the sum is smallest: at $\sqrt{2 \cdot \text{writing} \cdot \text{MTBF}}$.
# Change the number of GPUs and the time that a checkpoint takes.

# %% tags=["hide-input", "nbval-ignore-output"]
HOURS = [0.05 * 1.25**i for i in range(28)]


def curve(gpus, writing):
    mtbf = life / gpus * 3600
    return [
        100 * elastic.lost_share(h * 3600, writing, mtbf, restart=900) for h in HOURS
    ], mtbf


def draw(gpus, writing):
    lost, mtbf = curve(gpus, writing)
    best = elastic.best_interval(writing, mtbf)
    fig, ax = plt.subplots(figsize=(4.8, 3.0))
    ax.plot(HOURS, lost, color=palette.blue)
    least = 100 * elastic.lost_share(best, writing, mtbf, restart=900)
    ax.plot(best / 3600, least, "o", color=palette.vermillion, markersize=9)
    ax.set(
        xscale="log",
        xlabel="hours between checkpoints",
        ylabel="% of the time lost",
        ylim=(0, min(100, 8 * least)),
    )
    ax.set_title(
        f"{gpus:,} GPUs: every {best / 3600:.1f} h, {least:.1f}% lost", fontsize=11
    )
    return fig


def words(gpus, writing):
    _, mtbf = curve(gpus, writing)
    best = elastic.best_interval(writing, mtbf)
    least = elastic.lost_share(best, writing, mtbf, restart=900)
    return (
        f"{gpus:,} GPUs, a failure every {mtbf / 3600:.1f} hours, {writing} s to write:"
        f" best every {best / 3600:.2f} hours, {least:.1%} lost."
    )


explore(
    draw,
    alt=words,
    title="Young's interval",
    start={"gpus": 384, "writing": 40},
    gpus=[8, 384, 4096, 16_384],
    writing=[5, 40, 300],
)

# %% [markdown]
# ## At scale
#
# Launch files for all of this lie in the repository, in `llmlab/parallelism/examples/cluster/`; tests check their syntax, that ranks and batches
# add up, and that the models are the models:
#
# | file | what it starts |
# |---|---|
# | `torchrun.sbatch` | Slurm, one torchrun per node, elastic |
# | `deepspeed.sbatch`, `ds_config.json`, `hostfile` | Slurm or ssh, ZeRO-3 with offload |
# | `megatron_llama.sbatch` | Megatron-LM, LLaMA 2 7B on 4 nodes |
# | `megatron_deepspeed_bloom.sbatch` | Megatron-DeepSpeed, BLOOM 176B as published, 48 nodes |
# | `pytorchjob.yaml` | Kubernetes, Kubeflow's PyTorchJob, elastic |
#
# One machine, many machines, a machine that dies:
#
# ```
# torchrun --nproc-per-node 8 --max-restarts 3 -m llmlab.parallelism.examples.train_elastic --folder run
# torchrun --nnodes 2 --node-rank 0 --master-addr node-1 --master-port 29500 --nproc-per-node 8 train.py    # and --node-rank 1 on the other
# torchrun --nnodes 1:4 --rdzv-backend c10d --rdzv-endpoint node-1:29500 --nproc-per-node 8 train.py        # nodes may come and go
# deepspeed --hostfile hostfile train.py --deepspeed --deepspeed_config ds_config.json
# kubectl apply -f pytorchjob.yaml
# ```
#
# Three things go wrong on the first day with more than one machine: the ranks wait for each other because a firewall closes the port; NCCL or gloo
# picks the wrong network interface (set `NCCL_SOCKET_IFNAME` or `GLOO_SOCKET_IFNAME`); and a script uses `RANK` where it needs `LOCAL_RANK` and looks for a
# ninth GPU on a machine of eight.
#
# What does BLOOM's file describe? Count it, and let the planner of this part's last lesson say how long a step should take:

# %%
from llmlab.parallelism.choosing import Job, Plan, machines, planner, shapes

bloom = shapes.gpt(70, 14336, 112, vocab=250_880, positions=0)
counted = shapes.parameters(bloom) + 2 * 14336  # a LayerNorm above the embedding
print(f"parameters: {counted:,} (the model card: 176,247,271,424)")
job = Job(bloom, 2048, 2048, machines.machine("a100-80gb"))
e = planner.estimate(job, Plan(dp=8, tp=4, pp=12, microbatch=2, recompute="full"))
print(f"as it stands: {e.problems[0]}")
even = Job(
    shapes.gpt(72, 14336, 112, vocab=250_880, positions=0), 2048, 2048, job.machine
)
e = planner.estimate(even, Plan(dp=8, tp=4, pp=12, microbatch=2, recompute="full"))
print(
    f"with 72: {e.step:.0f} s a step and {e.bytes / 1e9:.0f} GB per device; reported:"
    " 105 s"
)
useful = planner.mfu(job, 384, 105)
print(
    f"MFU of the reported step: {useful:.0%}; with the second forward pass:"
    f" {useful * 4 / 3 * 312:.0f} TFLOP/s; reported: 150"
)

# %% [markdown]
# The embedding of 250,880 tokens weighs as much as a layer and a half, so BigScience counted the embedding and the head as layers of the
# pipeline: 70 + 2 = 72. That is also why our planner, which wants equal stages, refuses 70. With 72 its 111 seconds are 6% above
# what the log reports, of which two layers too many explain 3%.

# %%
shutil.rmtree(folder)

# %% [markdown]
# ## What to keep
#
# ```python
# def lost_share(every, writing, mtbf, restart=0):           # all in seconds
#     return writing / every + (every / 2 + restart) / mtbf
#
# def best_interval(writing, mtbf):
#     return (2 * writing * mtbf) ** 0.5
# ```
#
# Nine engines give the same 4 losses to 5 digits, once DeepSpeed's default of clipping at 1.0 is switched off. A killed
# rank costs the steps since the last checkpoint and a restart; here 1 step of 6, and the last loss is the same to 6
# digits. 384 GPUs that live five years each fail every 4.8 days, 16,384 every 2.7 hours: from there on, restarting is
# part of training.
#
# **Use it** to choose how often a long job saves; the minimum is flat, so a factor of two matters little. **Not** before
# a restart gives the same losses as a run without one: no interval helps a checkpoint that lacks the optimizer's
# averages.
#
# <details><summary>Which default of DeepSpeed makes its losses differ?</summary>
#
# It clips gradients at norm 1.0, and PyTorch does not clip at all. Set it on both sides before you compare.
#
# </details>
#
# <details><summary>Which three things made the restart exact?</summary>
#
# The checkpoint was renamed into place when it was complete, it held the optimizer's averages, and the data of a step
# followed from the step's number.
#
# </details>
#
# <details><summary>What does Young's interval balance?</summary>
#
# Saving often spends the time on writing. Saving seldom loses half an interval with each failure.
#
# </details>
#
# Now write the pieces yourself: [Exercises](../../work/05-parallelism/10-frameworks.ipynb).
#
# References: [Le Scao et al. 2022](https://arxiv.org/abs/2211.05100 "lescao2022bloom");
# [Llama Team 2024](https://arxiv.org/abs/2407.21783 "llama2024herd");
# [Young 1974](https://doi.org/10.1145/361147.361115 "young1974first");
# [Liang et al. 2024](https://arxiv.org/abs/2410.06511 "liang2024torchtitan");
# [Shoeybi et al. 2019](https://arxiv.org/abs/1909.08053 "shoeybi2019megatron");
# [Rajbhandari et al. 2020](https://arxiv.org/abs/1910.02054 "rajbhandari2020zero").
