# %% [markdown]
# # Data parallelism: one model, many batches
#
# Every rank has the whole model and its own data, and after each backward pass all ranks agree on the mean of their gradients.
# It is the first split that anybody makes, and the one inside all the others. You will see why the agreement costs next to
# nothing if it is done in the right pieces at the right time, and how many ways there are to compute a mean that is not one.

# %%
import copy

import torch
import torch.nn.functional as F

from llmlab.course import compare, explore, figure, palette, plt, predict, show

# %% [markdown]
# ## What it costs
#
# Sixty-four GPUs train a model of 1.2 billion parameters, four sequences of 4,096 tokens on each. Between two steps the gradients have to be
# summed over all of them, through one 400 Gb/s network card per GPU.
# %%
from llmlab.models.accounting import parameters
from llmlab.models.presets import preset
from llmlab.parallelism.runtime import Link, cost

config, card = preset("llama-3.2-1b"), Link(latency=10e-6, bandwidth=50e9)
# ranks; a rank's tokens; FLOP/s of an H100 at 40% of its peak
p, tokens, speed = 64, 4 * 4096, 0.4 * 989e12
n = 2 * parameters(config)  # bytes of the gradients in 16 bits
forward, wire = (
    2 * tokens * parameters(config) / speed,
    cost.seconds("all_reduce", p, n, card),
)
backward = 2 * forward
print(
    f"forward {1e3 * forward:.0f} ms, backward {1e3 * backward:.0f} ms, all-reduce of"
    f" {n / 1e9:.2f} GB {1e3 * wire:.0f} ms"
)
print(
    f"one after the other: {wire / (forward + backward + wire):.0%} of the time that is"
    f" paid for, all {p} GPUs wait"
)

# %% [markdown]
# ## Predict
#
# Gradients come one after another, from the last layer to the first. So they can be sent one after another, while backward goes on. You may choose
# in how large pieces.

# %%
guess = predict("How much of that waiting do pieces of 25 MiB leave?", unit="ms")

# %% [markdown]
# ## The idea
#
# A loss that is a mean over tokens has a gradient that is a mean over tokens, and a mean can be taken in two steps. With $N_r$ tokens on rank $r$
# and $N = \sum_r N_r$,
#
# $$\begin{aligned} g &= \frac1N \sum_{\text{all tokens}} \nabla \ell \\
# &= \frac1p \sum_{r=1}^{p} \Big( \frac{p}{N} \sum_{\text{tokens of } r} \nabla \ell \Big). \end{aligned}$$
#
# The outer mean is an all-reduce. All ranks then hold the same $g$, feed it to the same optimizer, and, if they began with the
# same weights, have the same weights after the step. Nobody ever sends a weight again.
#
# **When to send.** Here are six layers of equal size, whose gradients take as long to send as to compute:

# %% tags=["hide-input"]
from llmlab.parallelism.data_parallel import draw, exposed, timeline

# on two ranks an all-reduce of 1 byte takes 1 second here
unit, layers = Link(0.0, 1.0), [1] * 6
WAYS = {
    "after backward": ([[5, 4, 3, 2, 1, 0]], False),
    "two buckets": ([[5, 4, 3], [2, 1, 0]], True),
    "a bucket per layer": ([[i] for i in range(5, -1, -1)], True),
}
fig, axes = plt.subplots(3, 1, figsize=(4.8, 4.4), sharex=True)
for ax, (name, (plan, overlap)) in zip(axes, WAYS.items(), strict=True):
    spans = timeline(layers, layers, plan, 2, unit, overlap=overlap)
    draw(spans, ax, unit=1)
    ax.set(
        title=f"{name}: {exposed(spans):.0f} exposed",
        xlim=(0, 12.2),
        xlabel="time" if ax is axes[-1] else "",
    )
figure(
    fig,
    alt=(
        "Three time lines of six layers' backward, each a unit long, above what the"
        " wire carries. After backward: six more units, all exposed, hatched. Two"
        " buckets: the first leaves after three layers, three units stay exposed. A"
        " bucket per layer: one unit."
    ),
)

# %% [markdown]
# The hatched part is *exposed*: the GPU has nothing to do. The last bucket always is. Smaller buckets expose less, but each message
# costs its latencies, $2(p-1)\,\alpha$ in a ring. So there is a best size in between.
#
# **What must be right** ([Li et al. 2020](https://arxiv.org/abs/2006.15704 "li2020pytorch")):
#
# 1. All ranks begin with rank 0's weights.
# 2. Buckets leave in the same order on every rank, or two ranks wait for each other for ever. A parameter without a gradient sends zeros.
# 3. Several microbatches are added up at home; only the last one's backward sends.
# 4. The mean is over tokens. Ranks with few tokens must not weigh as much as ranks with many.
# 5. The norm is clipped after the sum, because the norm of a mean is not the mean of norms.

# %% [markdown]
# ## The code
#
# The plan is data: numbers of parameters, bucket by bucket, the last parameter first. For the course model and buckets of 1 MiB:

# %%
from llmlab.models import course_model
from llmlab.parallelism import World, launch
from llmlab.parallelism.data_parallel import (
    MIB,
    DataParallel,
    DDPConfig,
    plan_buckets,
    token_share,
    train_step,
)

show(plan_buckets)
model = course_model.load()
names = [name for name, _ in model.named_parameters()]
sizes = [w.nbytes for w in model.parameters()]
for bucket in plan_buckets(sizes, limit=MIB):
    kib = sum(sizes[i] for i in bucket) / 1024
    print(
        f"{len(bucket):>3} parameters, {kib:>5.0f} KiB: {names[bucket[0]]} …"
        f" {names[bucket[-1]]}"
    )

# %% [markdown]
# Autograd calls a hook when it has added to a parameter's `.grad`. The hook counts; when the next bucket of the plan is full, an
# asynchronous all-reduce takes it away, and backward goes on.

# %%
show(
    DataParallel.gradient_arrived,
    DataParallel.next_is_full,
    DataParallel.send_next,
    DataParallel.finish,
)

# %% [markdown]
# The embedding of this model is tied to its head: one parameter, used twice. The hook fires once, after both uses have added their part, which is
# at the very end of backward. And the step around it, with all five points of the list:

# %%
show(token_share, train_step)

# %% [markdown]
# **How wrong is the usual mean?** Three ranks with 59, 19 and 3 target tokens. Each takes the mean over its own, and DDP takes the mean of the three:

# %%
stream = course_model.tokens("valid")
shares = stream[:60], stream[1000:1020], stream[2000:2004]


def gradient(comm, model, weigh):
    ddp, mine = DataParallel(model, comm), shares[comm.rank]
    x, y = mine[None, :-1], mine[1:]
    loss = F.cross_entropy(ddp(x).flatten(0, 1), y, reduction="sum")
    (loss * (token_share(len(y), comm) if weigh else 1 / len(y))).backward()
    ddp.finish()
    return torch.cat([w.grad.flatten() for w in model.parameters()])


N = sum(len(s) - 1 for s in shares)
sum(
    F.cross_entropy(model(s[None, :-1]).flatten(0, 1), s[1:], reduction="sum") / N
    for s in shares
).backward()
right = torch.cat([w.grad.flatten() for w in model.parameters()])
for weigh in (False, True):
    off = (World(3).run(gradient, model, weigh)[0] - right).norm() / right.norm()
    print(
        f"{'mean over tokens' if weigh else 'mean of the means':<18} off by {off:.0%}"
        " of the gradient's norm"
    )
model.zero_grad()

# %% [markdown]
# Three tokens on one rank had the say of fifty-nine on another. Training goes on without complaint; it just is another training. If all ranks
# have equally many tokens the two are the same, which is why this mistake is found late.

# %% [markdown]
# ## Against the library
#
# Three processes, uneven batches, three microbatches each (one rank has two), five steps of AdamW with clipping, from different initial weights:
# ours, torch's `DistributedDataParallel`, and one process that has all the data.

# %%
from contextlib import nullcontext

from torch.nn.parallel import DistributedDataParallel


def batch(rank, step):
    """A rank's microbatches: between 1 and 3 rows of 16 to 32 tokens."""
    rows = [1 + (rank + k) % 3 for k in range(3 - (rank == 2))]
    starts = [97 * (step + 5 * rank + 50 * k) for k in range(len(rows))]
    cuts = [
        stream[s : s + b * (17 + 8 * rank)].view(b, -1)
        for s, b in zip(starts, rows, strict=True)
    ]
    return [(c[:, :-1], c[:, 1:]) for c in cuts]


def loss_sum(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")


def with_torch(comm, model):
    ddp, losses = DistributedDataParallel(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        mine, total = batch(comm.rank, step), torch.zeros(())
        share = token_share(sum(y.numel() for _, y in mine), comm)
        for k, (x, y) in enumerate(mine):
            with nullcontext() if k == len(mine) - 1 else ddp.no_sync():
                loss = loss_sum(ddp, x, y)
                (loss * share).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        gradients = torch.cat([w.grad.flatten() for w in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        losses.append((comm.all_reduce(total) * share / comm.size).item())
    return losses, gradients


def with_ours(comm, model):
    if comm.rank:
        torch.nn.init.normal_(model.model.norm.weight)  # must not matter
    ddp, seen = DataParallel(model, comm, DDPConfig(MIB)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.cat([w.grad.flatten() for w in model.parameters()])
        )
    )
    losses = [
        train_step(ddp, optimizer, batch(comm.rank, step), max_norm=1.0)
        for step in range(5)
    ]
    return losses, seen[-1]


def alone(model):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(5):
        everything = [
            microbatch for rank in range(3) for microbatch in batch(rank, step)
        ]
        N = sum(y.numel() for _, y in everything)
        loss = sum(loss_sum(model, x, y) for x, y in everything) / N
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([w.grad.flatten() for w in model.parameters()])


single = alone(copy.deepcopy(model))
ours, theirs = (
    launch(with_ours, 3, model, timeout=120)[1],
    launch(with_torch, 3, model, timeout=120)[1],
)
compare(ours[0], theirs[0], "ours and DDP: losses of 5 steps")
compare(ours[1], theirs[1], "ours and DDP: gradients of the fifth")
compare(
    (ours[1] - theirs[1]).norm() / theirs[1].norm(),
    0.0,
    "ours and DDP: their distance over their norm",
    tol=1e-4,
)
compare(ours[0], single[0], "ours and one process: losses")
compare(ours[1], single[1], "ours and one process: gradients")

# %% [markdown]
# PyTorch also says how it cut its buckets. It begins with a guess, and after the first steps cuts again, in the order in which
# gradients really came. With that order our plan is the same, parameter by parameter:


# %%
def buckets_of_both(comm, model):
    ours, x = DataParallel(model, comm), stream[:32].view(2, 16)
    ours(x).mean().backward()
    ours.finish()
    plan = plan_buckets(sizes, MIB, order=ours.arrived)
    ours.remove()
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    for _ in range(3):
        ddp(x).mean().backward()
    said = ddp._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"]
    return plan, [[int(i) for i in bucket.split()] for bucket in said.split(", ")]


plan, torchs = launch(buckets_of_both, 2, model, timeout=120)[0]
print(
    f"torch's buckets are ours: {plan == torchs}; parameters in each:"
    f" {[len(b) for b in plan]}"
)

# %% [markdown]
# ## The experiment
#
# **First, what not to do.** `torch.nn.DataParallel`, which is older, has one owner of model and batch. In each step it copies the weights to all
# others, a piece of the batch to each, collects their logits, computes the loss, sends its gradient back, and collects the gradients of the weights:

# %%
from llmlab.parallelism.data_parallel import replicate_step

show(replicate_step)

# %%
text = stream[: 8 * 65].view(8, 65)
x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()


def mean_loss(logits, y):
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def owner_and_helpers(comm, model):
    return replicate_step(
        comm, model, *((x, y) if comm.rank == 0 else (None, None)), mean_loss
    )


def everybody_the_same(comm, model):
    ddp = DataParallel(model, comm)
    comm.barrier()
    start = comm.ledger.bytes(rank=comm.rank)
    mean_loss(ddp(x.chunk(4)[comm.rank]), y.chunk(4)[comm.rank]).backward()
    ddp.finish()
    # without the weights, which are sent once for all steps
    return comm.ledger.bytes(rank=comm.rank) - start


old, new = World(4, algorithm="naive"), World(4)
old.run(owner_and_helpers, model)
dp, ddp = (
    [b / 1e6 for b in old.ledger.per_rank()],
    [b / 1e6 for b in new.run(everybody_the_same, model)],
)
fig, ax = plt.subplots(figsize=(4.8, 2.8))
for i, (name, mb) in enumerate((("DataParallel", dp), ("DDP", ddp))):
    ax.bar(
        [r + 0.4 * i - 0.2 for r in range(4)],
        mb,
        width=0.38,
        label=name,
        color=f"C{1 - i}",
    )
ax.set(xticks=range(4), xlabel="rank", ylabel="MB sent per step")
ax.legend()
figure(
    fig,
    alt=(
        f"Megabytes sent in one step by each of 4 ranks. DataParallel: {dp[0]:.1f} by"
        f" the owner, {dp[1]:.1f} by each of the others. DDP: {ddp[0]:.1f} by every"
        " rank."
    ),
)
print(
    "MB sent per step by ranks 0 to 3:  DataParallel",
    *(f"{b:.1f}" for b in dp),
    "  DDP",
    *(f"{b:.1f}" for b in ddp),
)

# %% [markdown]
# The owner sends the weights $p-1$ times, and receives as many gradients and all logits: with $p$ its wire fills up, while the others wait. In DDP
# no rank is special, and none sends more than $2n$, however many there are.
#
# **Now the main thing**: the 1.2 billion parameters on 64 ranks. A gradient's computing time is proportional to its parameters; the head
# is tied to the embedding, so its products come first, and its gradient is complete last.

# %%
from llmlab.models.llama import Llama

with torch.device("meta"):  # shapes without numbers
    big = Llama(config).to(torch.bfloat16)
weights = dict(big.named_parameters())
# tied: its backward products are the head's, at the beginning
head = "model.embed_tokens.weight"
seconds = {
    name: 4 * tokens * w.numel() / speed if w.dim() == 2 and name != head else 0.0
    for name, w in weights.items()
}
before = 4 * tokens * weights[head].numel() / speed
nbytes = [w.nbytes for w in weights.values()]


def backward_pass(plan, p=p, overlap=True):
    return timeline(
        list(seconds.values()), nbytes, plan, p, card, overlap=overlap, before=before
    )


PLANS = {
    "each tensor, after backward": (plan_buckets(nbytes, 1), False),
    "each tensor, at once": (plan_buckets(nbytes, 1), True),
    "one message": (plan_buckets(nbytes, 10**12), True),
    "buckets of 25 MiB": (plan_buckets(nbytes, 25 * MIB, first=MIB), True),
}

# %% tags=["hide-output"]
waits = {
    name: 1e3 * exposed(backward_pass(plan, overlap=overlap))
    for name, (plan, overlap) in PLANS.items()
}
for name, (plan, _) in PLANS.items():
    print(f"{name:<28} {len(plan):>4} messages, {waits[name]:>4.0f} ms exposed")
print(
    "\nbucket, MiB" + "".join(f"{mib:>6}" for mib in (1, 2, 4, 8, 16, 25, 50, 100, 200))
)
sizes_tried = {
    mib: 1e3 * exposed(backward_pass(plan_buckets(nbytes, mib * MIB)))
    for mib in (1, 2, 4, 8, 16, 25, 50, 100, 200)
}
print("ms exposed " + "".join(f"{ms:>6.0f}" for ms in sizes_tried.values()))
guess.settle(sizes_tried[25], digits=2)

# %% tags=["hide-input"]
fig, axes = plt.subplots(4, 1, figsize=(4.8, 6.0), sharex=True)
for ax, (name, (plan, overlap)) in zip(axes, PLANS.items(), strict=True):
    draw(backward_pass(plan, overlap=overlap), ax)
    ax.set(
        title=f"{name}: {waits[name]:.0f} ms exposed",
        xlabel="milliseconds" if ax is axes[-1] else "",
    )
figure(
    fig,
    alt=(
        "Backward of a 1.2 billion parameter model on 64 ranks, and the wire. Exposed"
        " milliseconds: "
    )
    + ", ".join(f"{name} {ms:.0f}" for name, ms in waits.items())
    + ". With buckets the wire works while backward does, and only the embedding's"
    " gradient is left at the end.",
)

# %% [markdown]
# Sending each tensor by itself costs more in latencies than in bytes: 146 messages of 126 steps each. One message has no latency to speak of and hides
# nothing. Buckets of 25 MiB leave 24 of 281 ms, and any size from 16 to 50 MiB does about as well. What they leave is one matrix: the embedding's 525 MB, complete only when all is over.
#
# Is that how the hooks behave? Run the real class on the same model cut to four layers, on four threads whose clock moves with each gradient:

# %%
import dataclasses

from llmlab.parallelism.data_parallel import from_ledger, keep_time

with torch.device("meta"):
    short = Llama(dataclasses.replace(config, num_hidden_layers=4)).to(torch.bfloat16)


def real_backward(comm, model):
    keep_time(model, comm, seconds)
    ddp = DataParallel(model, comm)
    logits = ddp(torch.zeros(1, 8, dtype=torch.long, device="meta"))
    comm.work(before, "head")
    logits.sum().backward()
    ddp.finish()
    return ddp.plan, ddp.arrived


world = World(4, link=card)
plan, order = world.run(real_backward, short)[0]
kept = [name for name, _ in short.named_parameters()]
formula = timeline(
    [seconds[k] for k in kept],
    [weights[k].nbytes for k in kept],
    plan,
    4,
    card,
    before=before,
    order=order,
)
hooks = from_ledger(world.ledger)
compare(
    [1e3 * exposed(hooks)], [1e3 * exposed(formula)], "exposed, hooks and formula, ms"
)
ends = [
    [1e3 * s.end for s in found if s.lane == "all-reduce"] for found in (hooks, formula)
]
compare(*ends, "ends of all all-reduces, ms")

# %% [markdown]
# **Accumulation** buys the rest. With $m$ microbatches per step the same bytes serve $m$ times the tokens, if only the last one sends:


# %%
def bytes_for(comm, model, m, wait):
    ddp = DataParallel(model, comm)
    comm.barrier()
    start = comm.ledger.bytes(rank=comm.rank)
    for k in range(m):
        with ddp.no_sync() if wait and k < m - 1 else nullcontext():
            mean_loss(ddp(x[:1]), y[:1]).backward()
        if not wait or k == m - 1:
            ddp.finish()
    return comm.ledger.bytes(rank=comm.rank) - start


for wait, label in (
    (False, "every microbatch sends"),
    (True, "only the last one sends"),
):
    sent = [World(2).run(bytes_for, model, m, wait)[0] / 1e6 for m in (1, 4)]
    print(
        f"{label:<24} 1 microbatch {sent[0]:>5.1f} MB,  4 microbatches"
        f" {sent[1]:>5.1f} MB"
    )

# %% [markdown]
# ## Play
#
# Move the bucket size: on the left messages pile up, on the right nothing overlaps. Then go to 8 ranks, where a message has 14 steps and not 126: even a
# message for each tensor does well.

# %% tags=["hide-input", "nbval-ignore-output"]
LIMITS = {
    "1 tensor": 1,
    "4 MiB": 4 * MIB,
    "25 MiB": 25 * MIB,
    "100 MiB": 100 * MIB,
    "all": 10**12,
}
passes = {
    (bucket, ranks): backward_pass(plan_buckets(nbytes, limit), ranks)
    for bucket, limit in LIMITS.items()
    for ranks in (8, 64)
}


def draw_pass(bucket, ranks):
    fig, (top, low) = plt.subplots(2, 1, figsize=(4.8, 4.0), height_ratios=(2, 3))
    draw(passes[bucket, ranks], top)
    top.set(xlim=(0, 340))
    low.bar(
        list(LIMITS),
        [1e3 * exposed(passes[b, ranks]) for b in LIMITS],
        color=palette.light,
        width=0.7,
    )
    low.bar([bucket], [1e3 * exposed(passes[bucket, ranks])], color="C1", width=0.7)
    low.set(
        ylabel="ms exposed",
        ylim=(0, max(110, 1e3 * exposed(passes["1 tensor", ranks]) * 1.05)),
    )
    low.tick_params(axis="x", rotation=35)
    low.minorticks_off()
    return fig


def describe_pass(bucket, ranks):
    spans = passes[bucket, ranks]
    messages = sum(s.lane == "all-reduce" for s in spans)
    return (
        f"{ranks} ranks, buckets of {bucket}: {messages} messages,"
        f" {1e3 * exposed(spans):.0f} ms exposed after {1e3 * backward:.0f} ms of"
        " backward"
    )


explore(
    draw_pass,
    alt=describe_pass,
    title="1.2 billion parameters, 16,384 tokens per rank, one 400 Gb/s card each",
    start={"bucket": "25 MiB", "ranks": 64},
    bucket=list(LIMITS),
    ranks=[8, 64],
)

# %% [markdown]
# ## At scale
#
# The same rank function under torchrun, on this machine and on eight GPUs:
#
# ```
# torchrun --nproc-per-node 2 -m llmlab.parallelism.examples.train_data_parallel --cpu
# torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_data_parallel --vocab 128256 --hidden 2048 \
#     --intermediate 8192 --layers 16 --heads 32 --kv-heads 8 --seq 4096 --batch 1 --accumulate 4
# ```
#
# In production the two lines that matter are `DistributedDataParallel(model, bucket_cap_mb=25, gradient_as_bucket_view=True)` and `with
# model.no_sync():`.
#
# **A published budget.** [Goyal et al. 2017](https://arxiv.org/abs/1706.02677 "goyal2017accurate") trained ResNet-50 in an hour on 32 servers of 8 GPUs. A server
# had a 50 Gb/s card, backward took 120 ms, and they derive that 12.8 Gb/s would do. From our count:

# %%
resnet = 25e6 * 4  # bytes of gradients, as in the paper
sent = cost.sent("all_reduce", 0, [resnet / 32] * 32)
print(f"bytes sent by a server: {sent / 1e6:.0f} MB (paper: 200 MB)")
print(
    f"rate, if it is to be hidden in backward: {8 * sent / 0.125 / 1e9:.1f} Gb/s"
    " (paper: 12.8 Gb/s, with 0.125 s)"
)
for alpha in (10e-6, 100e-6):
    t = [
        cost.seconds("all_reduce", 32, resnet, Link(alpha, 50e9 / 8), a)
        for a in ("ring", "halving")
    ]
    print(
        f"on their card, {1e6 * alpha:>3.0f} µs per message: ring {1e3 * t[0]:.0f} ms,"
        f" halving {1e3 * t[1]:.0f} ms of 120"
    )

# %% [markdown]
# The difference is $\frac{31}{32}$, which they round to 1. On their card the wire was busy for under a third of backward.
#
# **What overlap can save.** With forward $f$, backward $b = 2f$ and wire $c$, a step takes $f+b+c$ without and at least $f+\max(b,c)$ with it.

# %%
print(" c/b   time saved at most   speed-up at most")
for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
    without, with_ = 0.5 + 1 + ratio, 0.5 + max(1, ratio)
    print(f"{ratio:>4.2f}{1 - with_ / without:>17.0%}{without / with_:>19.2f}")

# %% [markdown]
# Never more than 40% of the time, where the two are equally long. Li et al. report a speed-up of 38.0% on ResNet-50 and 35.2% on BERT with NCCL, and 26.8% and
# 21.5% with Gloo. Read as time saved or as rate gained, all four lie within the limit; read as time saved, the first is close to it. And ours:

# %%
work = 1e3 * (forward + backward)
single, best = work + waits["one message"], work + waits["buckets of 25 MiB"]
limit = 1 - (forward + max(backward, wire)) / (forward + backward + wire)
print(
    f"overlap: a step of {single:.0f} ms becomes one of {best:.0f} ms,"
    f" {1 - best / single:.0%} less; the limit at c/b = {wire / backward:.2f} is"
    f" {limit:.0%}"
)
print(
    "with a message per tensor, after backward, it was"
    f" {work + waits['each tensor, after backward']:.0f} ms"
)

# %% [markdown]
# **A larger batch is another training.** With $p$ ranks the batch is $p$ times as large, and there are $p$ times fewer steps. Goyal et al.'s rule: multiply the
# learning rate by $p$. Sixteen small steps of SGD on a text that the course model has never seen, against two steps with eight times the batch:

# %%
ids = torch.tensor(
    course_model.load_tokenizer().encode(course_model.corpus("bible")[:20_000]).ids
)
rows = ids[: 64 * 33].view(64, 33)
held_out = ids[64 * 33 : 96 * 33].view(32, 33)


trained = course_model.load()


def sgd(lr, at_once):
    model = copy.deepcopy(trained)
    for part in rows.split(4 * at_once):
        model.zero_grad()
        mean_loss(model(part[:, :-1]), part[:, 1:]).backward()
        with torch.no_grad():
            for w in model.parameters():
                w -= lr * w.grad
    with torch.no_grad():
        return mean_loss(model(held_out[:, :-1]), held_out[:, 1:]).item()


with torch.no_grad():
    print(f"before: {mean_loss(model(held_out[:, :-1]), held_out[:, 1:]).item():.1f}")
for lr in (0.01, 0.05):
    print(
        f"rate {lr}: 16 steps of batch 4 {sgd(lr, 1):.1f};  2 steps of batch 32"
        f" {sgd(lr, 8):.1f}, at 8 times the rate {sgd(8 * lr, 8):.1f}"
    )

# %% [markdown]
# At a rate of 0.01 the rule is right: an eighth of the steps, the same loss, and without it hardly any progress. At 0.05 it is wrong: two steps of
# 0.4 overshoot. It supposes that the gradient hardly changes over $p$ small steps, and that holds only while they are small. In the paper it held up to a
# batch of 8,192 images. For Adam, which divides by the gradient's size, a square root is derived instead ([Malladi et al. 2022](https://arxiv.org/abs/2205.10287
# "malladi2022sdes")).

# %% [markdown]
# ## What to keep
#
# ```python
# def gradient(loss_sum, tokens, weights, comm):           # of this rank: a sum, not a mean
#     N = comm.all_reduce(torch.tensor(tokens))            # tokens of all ranks
#     g = torch.autograd.grad(loss_sum * comm.size / N, weights)
#     return [comm.all_reduce(x) / comm.size for x in g]   # the mean over all tokens
# ```
#
# On 64 ranks, buckets of 25 MiB that leave during backward expose 24 ms, where one message for each tensor afterwards
# exposes 281 ms. DDP sends $2\frac{p-1}{p}n$ from every rank; `DataParallel`'s owner sends $(p-1)n$ and more, and 4
# microbatches with `no_sync` send as much as one. The mean of ranks' means is not the mean over tokens: with 59, 19 and 3
# tokens the gradient is off by 1.5 times its norm.
#
# **Use it** first, whenever the model and its optimizer states fit on one device. **Not** to get around memory, since
# every rank holds everything, and not with a batch so large that the rule for the learning rate fails.
#
# <details><summary>Why is each rank's sum multiplied by p / N, instead of taking its mean?</summary>
#
# All-reduce then takes the mean over ranks. With means on each rank, a token on a rank with few tokens would weigh more
# than one on a rank with many.
#
# </details>
#
# <details><summary>What is wrong with one message per tensor, and with one for all?</summary>
#
# The first pays the latencies of the ring for every tensor. The second cannot leave before the last gradient is there, so
# it hides nothing.
#
# </details>
#
# <details><summary>When is the gradient's norm clipped?</summary>
#
# After the sum over ranks and microbatches: the norm of a mean is not the mean of the norms.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/05-parallelism/02-data-parallel.ipynb).
#
# References: Li et al. 2020 for DDP, Goyal et al. 2017 for the budget and the learning rate. Every rank here still holds all weights, gradients and optimizer states;
# the next lesson takes that apart.
