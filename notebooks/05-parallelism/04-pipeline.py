# %% [markdown]
# # Pipeline parallelism: a few layers on each rank
#
# Cut a model across its depth and almost nothing has to travel. The price is waiting. You will see the waiting on a clock,
# in real processes, derive its size, and see what the order of the work alone does to time and to memory: one list per rank, from
# GPipe to zero bubble.

# %%
import copy
import time

import torch
import torch.nn.functional as F

from llmlab.course import compare, explore, figure, plt, predict, show, steps
from llmlab.course.steppers import schedule_trace

# %% [markdown]
# ## What it costs
#
# Training a 70B model takes more memory than a machine of 8 GPUs has. Two ways to cut it over 16: inside each layer
# ([tensor parallelism](05-tensor.ipynb)), or between layers.
# %%
from llmlab.models.accounting import adam_bytes
from llmlab.models.presets import preset
from llmlab.parallelism.tensor import llama_sent

big, p, tokens = preset("llama-2-70b"), 16, 4096
state = sum(adam_bytes(big).values())
inside = llama_sent(p, tokens, big.hidden_size, big.num_hidden_layers)
# one hidden state on, one gradient back, 2 bytes per number
between = 2 * tokens * big.hidden_size * 2
print(
    f"training state {state / 1e9:.0f} GB: {state / p / 1e9:.0f} GB on each of {p}"
    f" GPUs, {80 // p} layers per GPU"
)
print(
    f"sent by a GPU for {tokens} tokens: {inside / 1e9:.1f} GB when cut inside layers,"
    f" {between / 1e9:.2f} GB between"
)
print(
    f"but only 1 of {p} GPUs works at a time: {1 - 1 / p:.0%} of what you pay for is"
    " waiting"
)

# %% [markdown]
# There is three hundred times less to send, so this cut can cross machines and slow networks. But layer 6 needs what layer 5
# computed, and in the backward pass layer 5 needs layer 6. The whole lesson is about the last line.
#
# ## Predict
#
# Cut the batch into 8 microbatches, so that 4 ranks can work on different ones at the same time. Forward takes one unit per
# microbatch and rank, backward two. *GPipe* does all forwards, then all backwards. *1F1B* does a backward as soon as there
# is one.

# %%
gpipe_guess = predict("GPipe: for what share of the step does a rank wait?", unit="%")
bubble_guess = predict("1F1B: for what share of the step does a rank wait?", unit="%")
held_guess = predict(
    "1F1B: how many microbatches' activations does rank 0 hold at once?"
)

# %% [markdown]
# ## The idea
#
# A row is a rank, a bar is a piece of work with its microbatch's number, time runs to the right. Paler bars are a rank's
# second chunk of layers. In the last chart orange is half a backward, and green the other half.

# %%
from llmlab.parallelism.pipeline import (
    Costs,
    Timeline,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    schedules,
    simulate,
    zb_h1,
    zb_h2,
    zb_v,
)

p, m = 4, 8
charts = {
    "naive, first 3 microbatches": naive(p, 3),
    "GPipe": gpipe(p, m),
    "1F1B": one_f_one_b(p, m),
}
charts["interleaved 1F1B, 2 chunks per rank"] = interleaved(p, m)
charts["zero bubble H1"] = zb_h1(p, m)
fig, axes = plt.subplots(5, 1, figsize=(4.8, 6.6), sharex=True)
for ax, (name, schedule) in zip(axes, charts.items(), strict=True):
    simulate(schedule).draw(ax, until=36)
    ax.set_title(name, pad=4)
    ax.set_ylabel("")
axes[-1].set_xlabel("time, in forwards of one microbatch")
fig.supylabel("rank")
bars = [axes[-1].barh(-9, 1, color=f"C{i}") for i in range(3)]
names = ["forward", "backward", "weight gradient"]
fig.legend(
    bars, names, loc="outside lower center", ncol=3, columnspacing=1, handlelength=1
)
figure(
    fig,
    alt=(
        "Gantt charts of 4 ranks. Naive: one bar at a time climbs down and up the"
        " ranks. GPipe: 8 forwards, a gap, 8 backwards, 33 units. 1F1B: the same 33"
        " units, forwards and backwards alternating. Interleaved: 28.5 units, the gaps"
        " halved. Zero bubble H1: 27 units, weight gradients fill most of the gaps at"
        " the end."
    ),
)

# %% [markdown]
# **Why $(p-1)/(m+p-1)$.** Rank 0 works for $m$ slots of a forward and a backward. The first microbatch needs $p-1$ forwards
# more to get to the last rank and $p-1$ backwards to come home: $p-1$ slots in which rank 0 could have worked, of $m+p-1$:
#
# $$\text{bubble} = \frac{p-1}{m+p-1} .$$
#
# **GPipe** ([Huang et al. 2018](https://arxiv.org/abs/1811.06965 "huang2018gpipe")) makes $m$ large. Then all $m$
# microbatches' activations wait for their backward.
#
# **1F1B**, or PipeDream-flush ([Narayanan et al. 2020](https://arxiv.org/abs/2006.09503 "narayanan2020memory")), has the same
# bubble, but rank $r$ starts only $\min(p-r-1, m)$ forwards ahead, and from then on finishes one microbatch before it takes the
# next.
#
# **Interleaved** ([Narayanan et al. 2021](https://arxiv.org/abs/2104.04473 "narayanan2021megatron")): give each rank $v$
# short runs of layers rather than one long one. Filling the pipe takes $p-1$ *short* forwards: the bubble is $v$ times
# smaller, and $v$ times as much is sent.
#
# **Zero bubble** ([Qi et al. 2023](https://arxiv.org/abs/2401.10241 "qi2023zero")): a backward is two computations. The next
# rank waits for the gradient of the *input* ($I$). Nobody waits for the gradients of the *weights* ($W$): they can be
# computed when there is nothing else to do.

# %% [markdown]
# ## The code
#
# A schedule is a list of ops for each rank, and an op is `(kind, microbatch, chunk)`: `F` forward, `B` backward, or `I`
# and `W` for its halves. Schedules are tables of phases, unrolled.

# %%
show(schedules.unroll, one_f_one_b, schedules.deferred, zb_h1)
print(one_f_one_b(4, 2)[2])
print(schedules.as_text(one_f_one_b(4, 6)))

# %% [markdown]
# What waits for what is one small function. The simulator walks all lists at once, lets an op begin when its rank is free and
# its inputs are there, and says so when nobody can go on. Here rank 1 wants a second forward before its first
# backward, while rank 0 wants it the other way round:

# %%
from llmlab.parallelism.pipeline import timeline

show(timeline.needs)
crossed = [one_f_one_b(1, 2)[0], gpipe(1, 2)[0]]
try:
    simulate(crossed)
except ValueError as error:
    print(error)

# %% [markdown]
# **Your turn: from GPipe to 1F1B by hand.** Two ranks, four microbatches, GPipe's lists. Move ops until no rank holds more than two
# microbatches, and the step is no longer than before. Choose an op, then move it with the buttons, or with Shift and an arrow.
# Try rank 0 first: it deadlocks, and the page says who waits for whom. When the goal is reached, *as Python* copies your lists. Put them into
# the cell below it in place of GPipe's: the same rules hold there.
#
# <details><summary>Which rank must change first, and why?</summary>
#
# Rank 1, the last. It can do a backward as soon as it has done the forward, because the loss is its own. Rank 0 may
# hold back its third forward only if rank 1 sends it a gradient before it asks for that forward. If rank 0 is changed alone, rank 0
# waits for the gradient of microbatch 0 and rank 1 for the third forward: a circle.
#
# </details>

# %%
steps(
    schedule_trace(gpipe(2, 4), goal={"time": 15, "peak": 2}),
    title="GPipe on two ranks: make it 1F1B",
)

# %%
mine = gpipe(2, 4)
found = simulate(mine)
most = max(schedules.peak_microbatches(mine))
print(f"time {found.makespan:g} (goal: 15), most held {most:g} (goal: 2)")
print("reached" if found.makespan <= 15 and most <= 2 else "not reached yet")

# %% [markdown]
# **Half a backward.** Asking autograd for the inputs' gradients and later for the weights' would walk through the layers twice.
# Instead each linear's backward computes $\partial X = \partial Y\,W$ and leaves $\partial W = \partial Y^\top X$ on a list.

# %%
from llmlab.parallelism import pipeline
from llmlab.parallelism.pipeline import Pipeline, backward, clip_grad_norm

show(backward.InputGradientLinear, backward.compute)

# %% [markdown]
# **The executor** goes down its rank's list. It does not know which schedule that is.
#
# | op | waits for | computes | sends |
# |---|---|---|---|
# | F | $h$ from stage $s-1$: `(B, T, d)`; tokens on stage 0 | its layers; on the last stage the loss, divided by $m$ | $h$ to stage $s+1$ |
# | I | $\partial h$ from stage $s+1$: `(B, T, d)`; nothing on the last stage | backward through the kept graph | $\partial h$ to stage $s-1$ |
# | W | nothing | what I has left | nothing |
# | B | as I | I, then W | as I |

# %%
step = pipeline.PipelineStep
show(step.execute, step.forward, step.input_gradient, step.weight_gradient)

# %% [markdown]
# Now the course model under each schedule: two steps of AdamW, with the gradient's norm clipped over all ranks. Two traps are
# in it. Its embedding is also its head, so the first and the last rank hold one matrix and must add their
# gradients; and the norm must count that matrix once. The microbatches have different lengths.

# %%
from llmlab.models import course_model
from llmlab.parallelism import World
from llmlab.parallelism.pipeline import dualpipe, dualpipe_v, split

model = course_model.load()
text = course_model.tokens("valid")
batch = []
for i, length in enumerate((32, 16, 48, 24)):
    sequence = text[i * 200 :][: length + 1].view(1, -1)
    batch.append((sequence[:, :-1], sequence[:, 1:]))


def train(parameters, step, clip, steps=2):
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step()
        clip(0.5)
        optimizer.step()
    return loss


def train_split(comm, model, make, v=1, layout="loop"):
    pipe = Pipeline(
        split(model, comm.rank, comm.size, v, layout=layout), comm, layout=layout
    )
    plan = make(comm.size, len(batch))
    loss = train(
        pipe.parameters(),
        lambda: pipe.step(plan, batch),
        lambda limit: clip_grad_norm(pipe, limit),
    )
    return loss, pipe.state_dict()


def train_whole(model):
    def step():
        losses = [
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in batch
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.item()

    weights = list(model.parameters())
    return (
        train(
            weights, step, lambda limit: torch.nn.utils.clip_grad_norm_(weights, limit)
        ),
        model.state_dict(),
    )


loss, state = train_whole(copy.deepcopy(model))
plans = [
    (gpipe, 4, 1, "loop"),
    (one_f_one_b, 4, 1, "loop"),
    (interleaved, 2, 2, "loop"),
]
plans += [(zb_h1, 4, 1, "loop"), (zb_h2, 4, 1, "loop"), (zb_v, 2, 2, "v")]
plans += [(dualpipe, 2, 2, "bidirectional"), (dualpipe_v, 2, 2, "v")]
for make, ranks, v, layout in plans:
    world = World(ranks)
    results = world.run(train_split, model, make, v, layout)
    merged = {name: value for _, part in results for name, value in part.items()}
    flat = [
        torch.cat([d[name].flatten() for name in sorted(state)])
        for d in (merged, state)
    ]
    compare(results[0][0], loss, f"{make.__name__} on {ranks} ranks: loss")
    compare(*flat, f"{make.__name__} on {ranks} ranks: weights")

# %% [markdown]
# It is one training in eight orders (the last two are for later). This is what *synchronous* means: all microbatches see the same weights, and the sum of their
# gradients does not care about the order. It is also what the bubble pays for. The first PipeDream
# ([Harlap et al. 2018](https://arxiv.org/abs/1806.03377 "harlap2018pipedream")) never empties its pipe: it starts the next batch
# at once, keeps old versions of the weights for the microbatches under way, and learns from gradients of weights that have changed since.
# The *flush* in PipeDream-flush is the pause that it left out.

# %% [markdown]
# ## Against the library
#
# PyTorch has these schedules in `torch.distributed.pipelining`. We compare in real processes, started from this cell: the same model,
# the same microbatches, and the order in which torch does things.

# %%
from torch.distributed import pipelining

from llmlab.parallelism import launch
from llmlab.parallelism.pipeline import stage_of

even = [(t[:, :-1], t[:, 1:]) for t in text[: 4 * 2 * 33].view(4, 2, 33)]


def against_torch(comm, model, name, make, v, layout):
    mine = Pipeline(
        split(copy.deepcopy(model), comm.rank, comm.size, v, layout=layout),
        comm,
        layout=layout,
    )
    loss = mine.step(make(comm.size, 4), even)

    # torch's executor does not tie
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    chunks = split(model, comm.rank, comm.size, v, layout=layout)
    where = [stage_of(comm.rank, c, comm.size, layout) for c in range(v)]
    stages = [
        pipelining.PipelineStage(c, s, comm.size * v, comm.device)
        for c, s in zip(chunks, where, strict=True)
    ]

    def cross_entropy(y, target):
        return F.cross_entropy(y.flatten(0, 1), target.flatten())

    theirs = getattr(pipelining.schedules, name)(
        stages if v > 1 else stages[0], 4, loss_fn=cross_entropy
    )
    x, y = (torch.cat([pair[k] for pair in even]) for k in (0, 1))
    losses, last = [], any(c.is_last for c in chunks)
    targets = {"target": y, "losses": losses} if last else {}
    theirs.step(*([x] if chunks[0].is_first else []), **targets, return_outputs=False)
    their_order = [
        (a.computation_type.value, a.microbatch_index, a.stage_index)
        for step in theirs.pipeline_order[comm.rank]
        if step
        for a in step.sub_actions or [step]  # a pair, under DualPipeV
    ]
    our_order = [(kind, i, where[c]) for kind, i, c in make(comm.size, 4)[comm.rank]]
    grads = {n: w.grad for c in mine.stages for n, w in c.named_parameters()}
    pairs = [
        (grads[n], w.grad)
        for c in chunks
        for n, w in c.named_parameters()
        if "layers" in n
    ]
    same_order = our_order == [a for a in their_order if a[0] != "REDUCE_GRAD"]
    return (
        [torch.cat([g.flatten() for g in gs]) for gs in zip(*pairs, strict=True)],
        loss,
        losses,
        same_order,
    )


for name, make, v, layout in (
    ("ScheduleGPipe", gpipe, 1, "loop"),
    ("ScheduleInterleaved1F1B", interleaved, 2, "loop"),
    ("ScheduleZBVZeroBubble", zb_v, 2, "v"),
    ("ScheduleDualPipeV", dualpipe_v, 2, "v"),
):
    results = launch(against_torch, 2, model, name, make, v, layout, timeout=120)
    found = next(r for r in results if r[2])
    compare(found[1], torch.stack(found[2]).mean(), f"{name}: loss")
    compare(*found[0], f"{name}: gradients of the last rank's layers")
    print(f"{name}: same order of work on every rank: {all(r[3] for r in results)}")

# %% [markdown]
# 1F1B is missing for a reason: torch 2.13 prints the last rank's forwards as 1 … $m$ instead of 0 … $m-1$ (it runs them
# right). The tests repair that and compare 1F1B, ZB-H1 and three chunks too, on up to 4 ranks, and DeepSpeed's
# `PipelineModule`: same losses, same order.
#
# ## The experiment
#
# We take four processes, a real model, real messages over gloo, and a clock. Four ranks on a laptop of two cores would fight for the
# cores and measure that; so each op computes on a small model and then *sleeps* for 25 ms (a whole backward: 50). The
# waiting, the messages and the order are real.

# %% tags=["nbval-ignore-output"]
from llmlab.models.llama import Llama, LlamaConfig

SECONDS = {"F": 0.025, "I": 0.025, "W": 0.025, "B": 0.05}
timed = {"GPipe": gpipe(4, 8), "1F1B": one_f_one_b(4, 8), "zero bubble H1": zb_h1(4, 8)}
small = LlamaConfig(256, 64, 176, 4, 4, 2)
torch.manual_seed(0)
small_model = Llama(small)
sequences = torch.randint(256, (16, 2, 33))


def on_the_clock(comm, model):
    short, found = [(t[:, :8], t[:, 1:9]) for t in sequences[:8]], {}
    pipe = Pipeline(split(model, comm.rank, comm.size), comm)
    pipe.step(gpipe(4, 8), short)  # the first step of a process is slow
    pipe.after_op = lambda kind, i, chunk: time.sleep(SECONDS[kind])
    for name, plan in timed.items():
        comm.barrier()
        pipe.step(plan, short)
        found[name] = pipe.bars
    return found


ranks = launch(on_the_clock, 4, small_model, timeout=120)
measured = {
    name: Timeline([bar for rank in ranks for bar in rank[name]], 4) for name in timed
}
unit = Costs(0.025, 0.025, 0.025)
until = 1.02 * measured["1F1B"].makespan
for name, plan in timed.items():
    print(
        f"{name:<15} bubble measured {measured[name].bubble:.1%}, simulated"
        f" {simulate(plan, unit).bubble:.1%}"
    )


def late(name, ms):
    return simulate(timed[name], Costs(0.025, 0.025, 0.025, ms / 1000)).bubble


delay = min(
    (k / 10 for k in range(200)),
    key=lambda ms: abs(late("1F1B", ms) - measured["1F1B"].bubble),
)
print(
    f"with {delay:.1f} ms per message, fitted on 1F1B, the simulator gives H1"
    f" {late('zero bubble H1', delay):.1%}"
)
fig, axes = plt.subplots(4, 1, figsize=(4.8, 5.6), sharex=True)
for i, name in enumerate(("1F1B", "zero bubble H1")):
    simulate(timed[name], unit).draw(axes[2 * i], until=until)
    measured[name].draw(axes[2 * i + 1], until=until)
    axes[2 * i].set_title(f"{name}, simulated", pad=4)
    axes[2 * i + 1].set_title(f"{name}, measured in 4 processes", pad=4)
axes[-1].set_xlabel("seconds")
figure(
    fig,
    alt=(
        "Four Gantt charts of 4 ranks and 8 microbatches. 1F1B simulated and measured"
        " in four processes look alike: about a second, with a triangle of waiting"
        " before the first backward and one at the end. Zero bubble H1, simulated and"
        " measured, ends earlier; weight gradients fill most of the second triangle."
    ),
)

# %% [markdown]
# The triangles on the clock are those of the formula: $3/11 = 27\%$ for GPipe and for 1F1B, $1/9 = 11\%$ for H1. What the
# clock adds are gaps *between* the bars: messages take time, and neighbours that answer each other wait for every one. Fit that
# delay on 1F1B, and the simulator, which knows nothing else about this machine, comes close to H1's bubble, too.
#
# Now memory. Saved-tensor hooks count every byte that autograd keeps for a backward. We count on rank 0.

# %% tags=["hide-input"]
from llmlab.parallelism.pipeline import ActivationMeter


def peak_bytes(comm, model, plan, m):
    stages = split(model, comm.rank, comm.size)
    meter = ActivationMeter([w for stage in stages for w in stage.parameters()])
    pipe = Pipeline(stages, comm, meter=meter)
    pipe.step(plan, [(t[:, :-1], t[:, 1:]) for t in sequences[:m]])
    assert meter.now == 0  # nothing is left
    return meter.peak


counts, kinds = (
    (1, 4, 7, 12),
    {"GPipe": gpipe, "zero bubble H2": zb_h2, "1F1B": one_f_one_b},
)
found = {
    name: [World(4).run(peak_bytes, small_model, make(4, m), m)[0] for m in counts]
    for name, make in kinds.items()
}
each = (found["GPipe"][1] - found["GPipe"][0]) // 3  # one microbatch
top = found["GPipe"][0] - each  # and one gradient on its way
for name, make in kinds.items():
    listed = [schedules.peak_microbatches(make(4, m))[0] * each + top for m in counts]
    compare(
        found[name], listed, f"{name}: bytes measured, and counted in the list", tol=0
    )
peaks = {name: [b / 2**20 for b in row] for name, row in found.items()}
fig, ax = plt.subplots(figsize=(4.8, 3.2))
for name, heights in peaks.items():
    ax.plot(counts, heights, "o-", ms=5)
    ax.text(
        12.3,
        heights[-1],
        f"{name}\n{heights[-1]:.1f} MiB",
        va="center",
        color=ax.lines[-1].get_color(),
    )
ax.set(
    xlim=(0, 19),
    ylim=(0, 4.4),
    xlabel="microbatches m",
    ylabel="peak on rank 0, MiB",
    xticks=counts,
)
ax.set_title("1F1B caps what GPipe piles up")
figure(
    fig,
    alt=(
        "Peak bytes of activations on rank 0 of 4 against the number of microbatches."
        f" GPipe rises in a straight line to {peaks['GPipe'][-1]:.1f} MiB at 12; 1F1B"
        f" stops rising at 4 and stays at {peaks['1F1B'][-1]:.1f} MiB; zero bubble H2"
        f" stops at 7 and stays at {peaks['zero bubble H2'][-1]:.1f} MiB."
    ),
)

# %% [markdown]
# To the byte, this is what one reads off the lists, so memory can be planned without running anything: under 1F1B rank $r$ never holds
# more than $\min(p-r, m)$ microbatches, under H2 $2(p-r)-1$. That sets $m$ free, and with it the bubble. Your guesses:

# %%
plans = {"GPipe": gpipe(4, 8), "1F1B": one_f_one_b(4, 8)}
for name, plan in plans.items():
    found = simulate(plan)
    print(
        f"{name}: waits {found.bubble:.0%} of the time, rank 0 holds"
        f" {schedules.peak_microbatches(plan)[0]:.0f} microbatches at once"
    )
gpipe_guess.settle(100 * simulate(plans["GPipe"]).bubble)
bubble_guess.settle(100 * simulate(plans["1F1B"]).bubble)
held_guess.settle(schedules.peak_microbatches(plans["1F1B"])[0])

# %% [markdown]
# ## Play
#
# Move the schedule at 12 microbatches: where do the gaps go? Then go down to 4: the triangles stay as they are, the
# work between them shrinks. ZB-V puts the first *and* the last layers on rank 0, so that each microbatch turns around near home.

# %% tags=["hide-input", "nbval-ignore-output"]
NAMES = {
    "GPipe": gpipe,
    "1F1B": one_f_one_b,
    "interleaved": interleaved,
    "ZB-H1": zb_h1,
    "ZB-H2": zb_h2,
    "ZB-V": zb_v,
}


def play(schedule, microbatches):
    plan = NAMES[schedule](4, microbatches)
    return plan, simulate(plan, layout="v" if schedule == "ZB-V" else "loop")


def draw_play(schedule, microbatches):
    plan, found = play(schedule, microbatches)
    fig, ax = plt.subplots(figsize=(4.8, 2.1))
    until = max(found.makespan, 3 * microbatches + 9)
    found.draw(ax, until=until, labels=False)
    for r, most in enumerate(schedules.peak_microbatches(plan)):
        ax.text(1.03 * until, r, f"{most:g}", va="center")
    ax.text(1.03 * until, -0.8, "held", va="center")
    ax.set_title(f"{schedule}, m = {microbatches}: waits {found.bubble:.0%}")
    ax.set_xlabel("forwards of one microbatch")
    return fig


def describe_play(schedule, microbatches):
    plan, found = play(schedule, microbatches)
    held = ", ".join(f"{x:g}" for x in schedules.peak_microbatches(plan))
    return (
        f"{schedule}, {microbatches} microbatches on 4 ranks: {found.makespan:g} units,"
        f" ranks wait {found.bubble:.0%} of the time, rank by rank at most {held}"
        " microbatches are held"
    )


explore(
    draw_play,
    alt=describe_play,
    title="F, I and W of one unit each",
    start={"schedule": "1F1B", "microbatches": 12},
    schedule=list(NAMES),
    microbatches=[4, 12],
)

# %% [markdown]
# ## At scale
#
# The same rank function under torchrun, on one machine or several, over gloo:
#
# ```
# torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.train_pipeline --schedule zb-h1 --microbatches 16
# ```
#
# On GPUs, Megatron-LM's flags for 16 stages of 5 layers in chunks of one: `--pipeline-model-parallel-size 16
# --num-layers-per-virtual-pipeline-stage 1`; sequences per step and microbatch size give $m$.
#
# **GPipe** published the throughput of a 48-layer Transformer on $K$ TPUs with $M$ microbatches, in units of $K = 2$, $M = 1$.
# Ours is $K$ times the share of time in which a rank works, in the same units.

# %%
paper = {1: (1.0, 1.07, 1.3), 4: (1.7, 3.2, 4.8), 32: (1.8, 3.4, 6.3)}
print("      K = 2          K = 4          K = 8       (paper, ours)")
for M, row in paper.items():
    ours = [K * (1 - schedules.bubble_fraction(K, M)) for K in (2, 4, 8)]
    print(
        f"M = {M:<4}"
        + "".join(f"{a:<5} {b:<9.2f}" for a, b in zip(row, ours, strict=True))
    )

# %% [markdown]
# At $M = 32$ we are within 8%, and a little too high, as one is who counts no communication. At $M = 4$ the paper is far above
# what the bubble allows for $M = 4$ against $M = 1$. It says that batch sizes were changed to fit memory; with
# $M = 1$ the unit itself is likely a smaller, slower batch, so that row is no test of the formula.
#
# **Megatron-LM** kept the batch and gave it to more and more GPUs, so that each pipeline got fewer microbatches. Is the
# loss the bubble? 175B: $p = 12$ stages (96 GPUs, 8 to a stage), 530B: $p = 35$. One number is fitted, the first of
# each model.

# %%
published = {
    "175B": (12, 1536, {384: 153, 768: 149, 1536: 141}),
    "530B": (35, 2240, {560: 171, 1120: 167, 2240: 159}),
}
print("model    GPUs     m   bubble   paper   ours   (TFLOP/s a GPU)")
for name, (stages, sequences_a_step, rows) in published.items():
    for gpus, achieved in rows.items():
        m = sequences_a_step // (gpus // (8 * stages))
        share = 1 - schedules.bubble_fraction(stages, m)
        if gpus == min(rows):
            full = achieved / share
        print(
            f"{name:<8}{gpus:>5}{m:>6}{1 - share:>9.1%}{achieved:>8}"
            f"{full * share:>7.0f}"
        )

# %% [markdown]
# The formula without interleaving explains both columns to within 2 TFLOP/s. The paper reports 10% and more of
# throughput from interleaving: for 12 stages, two chunks and 48 microbatches the formula gives
# $(48+11)/(48+5.5) - 1 = 10\%$.
#
# **Zero bubble** published the times of F, I, W and of a message for four models, and the bubble rates that its authors computed
# from them. Our simulator, fed with those times:

# %%
# model, p, m, (T_F, T_I, T_W, T_comm) in ms, chunks; the paper's rates of 1F1B,
# interleaved, H1, H2
rows = (
    ("1.5B", 8, 24, (18.522, 18.086, 9.337, 0.601), 3, (24.31, 10.55, 15.85, 10.83)),
    ("6.2B", 8, 24, (29.718, 29.444, 19.927, 0.527), 4, (23.47, 8.08, 13.23, 6.98)),
    ("14.6B", 16, 48, (11.347, 11.248, 8.132, 0.377), 3, (25.52, 11.04, 13.97, 6.72)),
    ("28.3B", 32, 96, (10.419, 10.207, 7.715, 0.408), 2, (26.46, 14.93, 14.21, 6.41)),
)
print(
    "bubble rate in %    1F1B            interleaved     ZB-H1           ZB-H2      "
    " (paper, ours)"
)
for name, p, m, times, v, rates in rows:
    plans = one_f_one_b(p, m), interleaved(p, m, v), zb_h1(p, m), zb_h2(p, m)
    ours = [100 * simulate(plan, Costs(*times)).bubble_rate for plan in plans]
    cells = "".join(f"{a:<6.2f} {b:<9.2f}" for a, b in zip(rates, ours, strict=True))
    print(f"{name:<6} p={p:<3} m={m:<4}  {cells}")
first, p, m = Costs(*rows[0][3]), 8, 24
late = simulate(one_f_one_b(p, m), first).makespan - (m + p - 1) * first.work
print(f"1.5B under 1F1B: {late / first.comm:.0f} messages on the critical path")

# %% [markdown]
# 1F1B, H1 and H2 agree in every digit printed. Interleaved is 0.2 to 0.5 points off: with one layer per chunk the first and
# the last stage have other things to do, and how the authors charged that, the paper does not say. Note that 1F1B's rate is
# above $7/31 = 22.6\%$ for the first model: neighbours that wait for each other in every round pay for messages of 0.6 ms.
#
# One catch. H2's ranks end one after another, as they began, and its zero bubble counts on a next step that begins in the same
# slant (the rates above are measured that way). But a gradient norm is a meeting of all ranks, and so is the search for
# overflows. The authors let each rank update at once and take the update back in the rare step that needed correction; without
# that, they report, about 8% of the throughput is gone.
#
# ## From both ends
#
# So far a message takes a moment. In a mixture of experts it does not: all tokens go to other GPUs and come back inside each layer, and a forward may
# wait for that as long as it computes. **DualPipe** ([DeepSeek-AI 2024](https://arxiv.org/abs/2412.19437 "deepseek2024v3"), section 3.2.1) gives a rank
# something to do meanwhile. Half of the microbatches enter at rank 0, half at the last rank. Rank $r$ holds stage $r$ for the first half,
# and a second copy of weights, those of stage $p-1-r$, for the other. In the middle of the step it always has a forward of one direction and a
# backward of the other. It runs the two as one, written F&B: the messages of one are on the wire while the other computes.
#
# **DualPipeV** is one half of that picture: what would come from the other end has turned round, as under ZB-V, and no weights are held
# twice. In the chart below, F&B takes 2.5 units where F and B one after the other take 3.

# %% tags=["hide-input"]
from llmlab.parallelism.pipeline import dualpipe_pairs

BOTH_ENDS = "bidirectional"
both = {
    "1F1B, 8 ranks": (one_f_one_b(8, 20), "loop", ()),
    "zero bubble H1, 8 ranks": (zb_h1(8, 20), "loop", ()),
    "DualPipe, 8 ranks": (dualpipe(8, 20), BOTH_ENDS, dualpipe_pairs(8, 20)),
    "DualPipeV, 4 ranks": (dualpipe_v(4, 10), "v", dualpipe_pairs(4, 10, "v")),
}
hidden = Costs(pair=2.5)  # of one stage
two_stages = Costs(2, 2, 2, pair=5)  # a rank's share, under DualPipeV
forward, weights = hidden.F, hidden.W
slot, saved = forward + hidden.B, hidden.B - 3 * weights
dual = (8 / 2 - 1) * (hidden.pair + saved)
published = [(8 - 1) * slot, (8 - 1) * (slot - 2 * weights), dual, dual]
print("                         a rank in the middle waits       holds, in")
print("                         simulated      published         stages' activations")
fig, axes = plt.subplots(4, 1, figsize=(4.8, 6.6), sharex=True)
spoken = []
for ax, (name, (plan, layout, pairs)), paper in zip(
    axes, both.items(), published, strict=True
):
    stages = 2 if layout == "v" else 1  # of a rank, for a microbatch
    found = simulate(plan, two_stages if stages == 2 else hidden, layout, pairs)
    found.draw(ax, until=82, labels=False)
    ax.set_title(f"{name}: {found.makespan:g} units", pad=4)
    ax.set_ylabel("")
    waits = found.makespan - found.busy(3)
    held = stages * max(schedules.peak_microbatches(plan, layout=layout))
    print(f"{name:<25}{waits:<15g}{paper:<18g}{held:g}")
    spoken.append(f"{name}: {found.makespan:g} units")
plain = simulate(dualpipe(8, 20), Costs(), BOTH_ENDS).makespan
turned = simulate(zb_v(8, 20), Costs(), "v").makespan
print(f"where nothing is hidden: DualPipe {plain:g} units, ZB-V {turned:g}")
axes[-1].set_xlabel("time, in forwards of one microbatch and stage")
fig.supylabel("rank")
figure(
    fig,
    alt=(
        "Gantt charts over 8 stages. "
        + "; ".join(spoken)
        + ". Under DualPipe the first rank and the last begin at once, and those in"
        " the middle three units later; its gaps are small. DualPipeV is the upper"
        " half of DualPipe's chart."
    ),
)

# %% [markdown]
# DeepSeek's table says $(p-1)(F+B)$, $(p-1)(F+B-2W)$ and $(\frac{p}{2}-1)(F\&B + B - 3W)$, and $p+1$ microbatches held, with $p$ stages:
# the simulator agrees. Two things the table does not say. Its last formula is for $F = I$; with others the rank at the turn waits
# $F\&B + F - 2W$ in place of the bracket (a test has both). And where nothing is hidden DualPipe is hardly faster than ZB-V, which holds all
# weights once: it is the experts' messages that pay for the second copy. DualPipeV has half the ranks and half the microbatches, and the
# same waiting and activations on each.
#
# Both ran above, with one training's loss and weights, and DualPipeV in PyTorch's order. Now it is your turn: can you
# [beat ZB-H1 at twice its memory](../../work/05-parallelism/04-pipeline.ipynb)? The simulator judges.
#
# ## What to keep
#
# ```python
# def one_f_one_b(p, m, r):                 # the ops of rank r
#     ahead = min(p - r - 1, m)             # forwards ahead; at most ahead + 1 are held
#     F, B = [("F", i) for i in range(m)], [("B", i) for i in range(m)]
#     steady = [op for pair in zip(F[ahead:], B) for op in pair]
#     return F[:ahead] + steady + B[m - ahead:]
# # the bubble: (p - 1) / (m + p - 1)
# ```
#
# A pipeline sends 0.13 GB where tensor parallelism sends 40, and waits $(p-1)/(m+p-1)$ of the time: 27% for 4 ranks and 8
# microbatches, and a few points more on a real clock. 1F1B has GPipe's bubble and holds $\min(p-r, m)$ microbatches
# instead of $m$: a third of the bytes at $m = 12$, $p = 4$. Splitting the backward cuts 33 units to 27 with no more
# memory on the fullest rank (H1), and the bubble to 0 with almost twice as much (H2); none of it changes a gradient.
#
# **Use it** across machines and slow networks, with many more microbatches than ranks. **Not** with few microbatches,
# where ranks wait most of the time, and not to answer a single request faster.
#
# <details><summary>Where do the p − 1 slots of the bubble come from?</summary>
#
# The first microbatch needs p − 1 forwards more to get to the last rank, and p − 1 backwards to come home. Meanwhile rank
# 0 could have worked.
#
# </details>
#
# <details><summary>What does 1F1B gain over GPipe?</summary>
#
# Memory, not time. A rank starts only a few forwards ahead, and then finishes one microbatch before it takes the next.
#
# </details>
#
# <details><summary>Why may the weights' gradients wait?</summary>
#
# No rank needs them before the update, whereas the rank before waits for the gradient of the input. So they fill the
# bubble.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/05-parallelism/04-pipeline.ipynb).
#
# References: [Huang et al. 2018](https://arxiv.org/abs/1811.06965 "huang2018gpipe"), GPipe;
# [Harlap et al. 2018](https://arxiv.org/abs/1806.03377 "harlap2018pipedream"), PipeDream;
# [Narayanan et al. 2020](https://arxiv.org/abs/2006.09503 "narayanan2020memory"), PipeDream-flush;
# [Narayanan et al. 2021](https://arxiv.org/abs/2104.04473 "narayanan2021megatron"), interleaving, and how to combine the
# axes; [Qi et al. 2023](https://arxiv.org/abs/2401.10241 "qi2023zero"), zero bubble;
# [DeepSeek-AI 2024](https://arxiv.org/abs/2412.19437 "deepseek2024v3"), DualPipe.
