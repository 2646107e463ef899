# %% [markdown]
# # PEQA and QLoRA
#
# A quantized model shall learn a task and stay quantized. QLoRA puts float matrices beside the frozen integers, and they remain there. PEQA
# trains the only floats that a quantized model has anyway: its scales. This lesson derives their gradient, trains a model of 2 and 3 bits
# with it, and measures what QLoRA's adapters lose when they must become integers. At the end you own that gradient.

# %% tags=["hide-input"]
import csv
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llmlab.checks.compression.peqa_and_qlora import check
from llmlab.compression import peqa_and_qlora as peqa
from llmlab.compression.peqa_and_qlora import PEQAConfig
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.course import (
    compare,
    explore,
    figure,
    palette,
    plt,
    predict,
    show,
    your_turn,
)
from llmlab.models import course_model
from llmlab.models.presets import preset
from llmlab.training import tasks

# %% [markdown]
# ## What it costs
#
# [QLoRA](../04-peft/07-qlora.ipynb) made it possible to train a model of 65B weights on one card. Here are four ways to do it, without
# activations: floats of 16 bits, and Adam with a master copy. PEQA has 4 bits and a scale per row, as in its paper; QLoRA has 4 bits in groups of 64.

# %%
llama = preset("llama-65b")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
print(f"{'LLaMA 65B':8}{'weights':>10}{'to train':>10}{'trained':>11}{'task file':>11}")
for method in peqa.METHODS:
    grid = QuantConfig(4, group_size=64) if method == "qlora" else None
    settings = {"grid": grid, "rank": 64, "targets": ALL}
    plan = peqa.memory_plan(llama, method, **settings)
    trained = peqa.trained_values(llama, method, **settings)
    rest = plan["gradients"] + plan["optimizer"]
    print(
        f"{method:9}{plan['weights'] / 1e9:7.1f} GB{rest / 1e9:7.1f} GB"
        f"{trained / 1e6:9.1f} M{plan['task'] / 1e6:8.0f} MB"
    )

# %% [markdown]
# Both fit. But a task of QLoRA is a file that is much larger, and a second product of matrices in each layer for each token. To be rid of it one merges
# the adapter into the weight, and what comes out is a float matrix. To serve it in 4 bits, it must be rounded once more.
#
# ## Predict
#
# The course model has never seen the Bible. We round it to 2 bits in groups of 32 and train it on verses for 30 steps: once with LoRA
# beside the integers, on every linear, once with PEQA, which trains about as many numbers. What a method *gains* is what the loss on held-out verses falls by.

# %%
peqa_guess = predict(
    "What does PEQA gain, as a share of what LoRA gains with its adapters beside?",
    unit="%",
)
merge_guess = predict(
    "Merge LoRA's adapters and round to 2 bits again: what share of its gain is left?",
    unit="%",
)

# %% [markdown]
# ## By hand
#
# Four weights on one scale, $s = 0.4$, with codes $-3 \dots 3$ and no zero point.
#
# | | | | | |
# |---|---|---|---|---|
# | float weight $w$ | 0.7 | −0.5 | 0.1 | −1.3 |
# | integer $\bar w$ | 2 | −1 | 0 | −3 |
# | $\hat w = s \bar w$ | 0.8 | −0.4 | 0 | −1.2 |
# | its gradient $g$ | 0.5 | 1 | 2 | −1 |
# | what it says to $s$: $g \bar w$ | 1 | −1 | 0 | 3 |
#
# The scale hears the sum, 3. A step of $-0.02 \cdot 3$ makes it 0.34, and all four weights move at once, in proportion to their integers: 0.68,
# −0.34, 0, −1.02. The third weight has the largest gradient and no say, because it stands on level 0.
#
# LoRA could have moved each weight by itself, say by +0.1 from $\hat w$. But rounded to the same levels, 0.9, −0.3, 0.1 and −1.1 have the integers 2, −1, 0 and −3
# again: nothing is left of it.

# %%
s = torch.tensor([[0.4]])
codes = torch.tensor([[2.0, -1, 0, -3]])
g = torch.tensor([[0.5, 1, 2, -1]])
four = QuantConfig(3, group_size=4)
grad = peqa.scale_gradient(g, codes, four)
moved = peqa.dequantize(codes, s - 0.02 * grad, four)
print("gradient of the scale:", round(grad.item(), 3))
print("weights after the step:", [round(v, 2) for v in moved[0].tolist()])
again = torch.round((s * codes + 0.1) / s)
print("integers after +0.1 and rounding:", again[0].int().tolist())

# %% [markdown]
# ## The idea

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(4.8, 3.0), sharey=True)
for ax, title in zip(axes, ("PEQA", "LoRA, rounded"), strict=True):
    ax.set(
        title=title, xlim=(-0.3, 1.3), xticks=[0, 1], xticklabels=["before", "after"]
    )
axes[0].set_ylabel("weight")
for k in range(-3, 4):
    axes[0].plot([0, 1], [0.4 * k, 0.34 * k], color=palette.light)
    axes[1].plot([0, 1], [0.4 * k, 0.4 * k], color=palette.light)
for k in codes[0].int().tolist():
    axes[0].plot([0, 1], [0.4 * k, 0.34 * k], "o-", color=palette.blue)
    axes[1].plot([0, 0.5], [0.4 * k, 0.4 * k + 0.1], color=palette.vermillion)
    axes[1].plot(
        [0.5, 1], [0.4 * k + 0.1, 0.4 * k], color=palette.vermillion, linestyle=":"
    )
    axes[1].plot([0, 1], [0.4 * k, 0.4 * k], "o", color=palette.vermillion)
figure(
    fig,
    alt=(
        "Seven levels and four weights on them, before and after. With PEQA all levels"
        " come closer together, and the weights stay on theirs. With LoRA the levels"
        " stay; the weights leave them by a quarter of a step, and rounding puts each"
        " back where it was."
    ),
)

# %% [markdown]
# **PEQA** ([Kim et al. 2023](https://arxiv.org/abs/2305.14152 "kim2023peqa")) rounds each linear once and then freezes integers and zero points. With $s_0$ the
# scales of that rounding, it trains the change $\Delta s$:
#
# $$\hat W = (s_0 + \Delta s) \cdot (\bar W_0 - z_0) \qquad \frac{\partial L}{\partial s_b} = \sum_{(i,j) \in b} G_{ij} \, (\bar W_{ij} - z_b)$$
#
# $G$ is the gradient of $\hat W$, and $b$ a block of weights with one scale: a row in the paper, or a group. Three things follow.
#
# 1. **It stays a quantized model.** After training there are integers and scales, as before. Nothing is merged, and any kernel for such a model runs it.
# 2. **A task is its scales.** Whoever serves many tasks holds the integers once.
# 3. **With a scale per row, it trains a multiplier of each output**: $h = s \odot (x (\bar W - z)^\top)$, as [(IA)³](../04-peft/08-ia3.ipynb) does for
#    keys, values and the MLP, here behind every linear. Groups can do more: they weigh parts of the input, too.
#
# ## Your turn
#
# The gradient of the scales. `codes` (out, in) and `zero` (out, groups) are `uint8`, as in a file, in which 3 − 8 is 251: make floats of them
# first. The first `group_size` columns of a row are its first group, and so on.


# %%
def scale_gradient(G, codes, zero, group_size: int):
    """The gradient of each scale, (out, groups), from that of the weights."""
    raise NotImplementedError("three lines of yours")


your_turn(check.scale_gradient, scale_gradient)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(G, codes, zero, group_size):
    z = zero.float().repeat_interleave(group_size, dim=1)
    said = G * (codes.float() - z)
    return said.unflatten(1, (-1, group_size)).sum(-1)


your_turn(check.scale_gradient, one_answer)

# %% [markdown]
# ## The code
#
# The forward pass makes $\hat W$ and forgets it. The backward pass makes it once more, and keeps of $G$ only the sums.
#
# | value | shape | holds |
# |---|---|---|
# | `integers` | (out, in) | $\bar W - z$, packed or a byte each; frozen |
# | `scale` | (blocks, 1) | $s$, float32; all that trains |
# | `G` | (out, in) | $\sum_t g_t x_t^\top$, for a moment |

# %% tags=["hide-output"]
show(peqa.scale_gradient, peqa.ScaledIntegers, peqa.PEQALinear, peqa.load_scales)

# %% [markdown]
# ## Against mathematics and the libraries
#
# Autograd takes another way through the same linear. PyTorch can train scales as well, with the rule of LSQ
# ([Esser et al. 2020](https://arxiv.org/abs/1902.08153 "esser2020lsq")): there the float weight $w$ is kept, and its integer follows the scale. So where $w$ is not
# clipped, its part of the gradient is $g (\bar w - w / s)$, what is left of the rounding. PEQA's integers stay, and the part is $g \bar w$.

# %%
torch.manual_seed(0)
W, x, g = torch.randn(6, 12), torch.randn(5, 12), torch.randn(5, 6)
linear = torch.nn.Linear(12, 6, bias=False)
linear.weight.data = W
rows = QuantConfig(3, per="row", scale_dtype=torch.float32)
layer = peqa.PEQALinear(QuantLinear(linear, rows))
h = layer(x)
h.backward(g)

free = layer.scale.detach().clone().requires_grad_()
(x @ (free * layer.integers()).T).backward(g)
compare(layer.scale.grad, free.grad, "PEQA's gradient, and autograd's")
by_outputs = (g * h).sum(0) / layer.scale[:, 0]
compare(layer.scale.grad[:, 0], by_outputs, "and as a multiplier of the outputs")

lsq, zero = free.detach()[:, 0].requires_grad_(), torch.zeros(6, requires_grad=True)
fake = torch._fake_quantize_learnable_per_channel_affine
fake(W.requires_grad_(), lsq, zero, 0, -3, 3, 1.0).backward(g.T @ x)
follows = peqa.scale_gradient(g.T @ x, (W / free).detach(), rows)
compare(lsq.grad, (layer.scale.grad - follows)[:, 0], "LSQ's, and PEQA's less g w / s")
size = lsq.grad.norm() / layer.scale.grad.norm()
print(f"LSQ's gradient is {size:.0%} as long as PEQA's")

# %% tags=["hide-cell"]
# Paper, library, ours. Does bitsandbytes train a scale that asks for a gradient?
import bitsandbytes as bnb

nf4 = bnb.nn.Linear4bit(
    64, 8, bias=False, quant_type="nf4", compress_statistics=False
).to("cpu")
nf4.train()
scales_of_nf4 = nf4.weight.quant_state.absmax.requires_grad_()
nf4(torch.randn(3, 64, requires_grad=True)).sum().backward()
got = "a gradient" if scales_of_nf4.grad is not None else "no gradient, no error"
table = [
    ("", "PEQA's paper", f"bitsandbytes {bnb.__version__}", "ours"),
    ("grid", "affine, rows", "NF4, blocks of 64", "any QuantConfig"),
    ("scales are", "trained", "frozen", "trained"),
    ("absmax.requires_grad", "–", got, "–"),
    ("after the task", "integers", "NF4 and adapters", "integers"),
]
for row in table:
    print(f"{row[0]:22}{row[1]:16}{row[2]:24}{row[3]}")

# %% [markdown]
# LSQ's gradient is much shorter: where integers may follow, a small change of the scale changes little. And nothing in bitsandbytes trains a
# scale; who asks for its gradient gets none, and no message.
#
# ## The experiment
#
# First one run, on this page: the course model in 3 bits and groups of 32, 15 steps of 8 pieces of the Bible.

# %% tags=["numbers-within-5%"]
tokenizer = course_model.load_tokenizer()
held_out = tasks.make("bible", tokenizer, "valid", batches=1, size=16)
grid = QuantConfig(3, symmetric=False, group_size=32, calibration="mse")
model = course_model.load()
print(f"floats, before: loss {tasks.score(model, held_out)[0]:.2f}")
peqa.apply(model, PEQAConfig(grid))
integers, start = peqa.fingerprint(model), peqa.scales(model)
print(f"3 bits, before: loss {tasks.score(model, held_out)[0]:.2f}")
tasks.fit(model, tasks.make("bible", tokenizer, batches=15), lr=3e-3)
print(f"scales trained: loss {tasks.score(model, held_out)[0]:.2f}")
print("the same integers:", peqa.fingerprint(model) == integers)

with TemporaryDirectory() as folder:
    file = peqa.save_task(model, Path(folder) / "bible.safetensors")
    print(f"task file: {file.stat().st_size / 1e3:.0f} kB")
    peqa.load_scales(model, start)
    print(f"the old task again: loss {tasks.score(model, held_out)[0]:.2f}")
    peqa.load_task(model, file)
peqa.store(model)  # plain quantized linears, scales in 16 bits
print(f"stored as integers: loss {tasks.score(model, held_out)[0]:.2f}")

# %% [markdown]
# Now the comparison. `scripts/peqa_and_qlora_sweep.py` gave each method the same verses and 30 steps, searched its rate from three or four on other held-out verses, and ran
# three seeds, which draw verses and start. LoRA begins with the very integers that PEQA has. Full dots: right after training, LoRA with its adapters
# beside. Rings: as integers again, which for LoRA is merging and rounding to the same grid, and for PEQA nothing but scales in 16 bits.

# %% tags=["hide-input"]
with peqa.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def chosen(method: str, bits: int, model: str = "course") -> list[dict[str, float]]:
    """A method's runs at its best rate, a seed each."""
    found = []
    for run in runs:
        if (run["model"], run["method"], run["bits"]) == (model, method, str(bits)):
            numbers = ["lr", "seed", "trained", "dev", "before", "loss", "stored"]
            found.append({name: float(run[name]) for name in numbers})
    best = min((run for run in found if run["seed"] == 0), key=lambda run: run["dev"])
    return [run for run in found if run["lr"] == best["lr"]]


def mean(method: str, bits: int, what: str, model: str = "course") -> float:
    values = [run[what] for run in chosen(method, bits, model)]
    return sum(values) / len(values)


METHODS = ("PEQA, rows", "PEQA, groups", "LoRA, q and v, r 4", "LoRA, all, r 2")
fig, axes = plt.subplots(2, 1, figsize=(4.8, 4.0), sharex=True)
for ax, bits in zip(axes, (3, 2), strict=True):
    for i, method in enumerate(METHODS):
        color = palette.blue if "PEQA" in method else palette.vermillion
        for run in chosen(method, bits):
            ax.plot([run["loss"], run["stored"]], [i, i], color=palette.light)
            ax.plot(run["loss"], i, "o", color=color)
            ax.plot(run["stored"], i, "o", mfc="none", mec=color, ms=10)
    ax.axvline(mean("PEQA, groups", bits, "before"), color=palette.gray, ls="--")
    ax.set_yticks(range(len(METHODS)), METHODS)
    ax.set(title=f"{bits} bits", ylim=(3.6, -0.6))
axes[1].set_xlabel("loss on held-out verses")
figure(
    fig,
    alt=(
        "Loss after training, for 3 and 2 bits, three seeds each. PEQA with groups and"
        " LoRA on all linears are far left of the dashed line, PEQA a little further;"
        " PEQA with rows and LoRA on q and v follow. As integers PEQA stays where it"
        " is. LoRA moves to the right, at 2 bits by more than half of what it gained."
    ),
)
print(f"{'':20}{'trained':>9}{'3 bits':>8}{'again':>7}{'2 bits':>9}{'again':>7}")
for method in METHODS:
    line = f"{method:20}{mean(method, 3, 'trained'):9,.0f}"
    for bits in (3, 2):
        line += f"{mean(method, bits, 'loss'):8.2f}{mean(method, bits, 'stored'):8.2f}"
    print(line)


# %% tags=["hide-output"]
def gain(method: str, what: str) -> float:
    return mean(method, 2, "before") - mean(method, 2, what)


lora = "LoRA, all, r 2"
peqa_guess.settle(100 * gain("PEQA, groups", "loss") / gain(lora, "loss"), digits=2)
merge_guess.settle(100 * gain(lora, "stored") / gain(lora, "loss"), digits=2)

# %% [markdown]
# The dashed line is the rounded model before training.
#
# **Scales are enough to learn.** With groups PEQA ends a little below LoRA on all linears, for each of the three seeds, with about as many trained numbers. With a scale per row,
# about five thousand in all, it beats LoRA on queries and values. At 2 bits its loss is far below that of the float model before training.
#
# **LoRA's change is in danger when it is rounded.** At 2 bits, at the rate that is best for LoRA with its adapters, about a third of the gain is left: a step of the grid is
# larger than most of the changes, and they are rounded away, as on our four weights. PEQA has nothing to lose: its rings are its dots.
#
# **It depends on the rate and on the bits.** Here is LoRA at each rate that was tried, with seed 0. A higher rate makes larger changes, and more of them survive: who
# means to merge should choose the rate by the loss *after* rounding. At 2 bits even that stays well above PEQA. At 4 bits the steps are fine and
# little is lost; and QLoRA in NF4, with four times as many trained numbers, learns more than any of these.

# %% tags=["hide-input"]
head = f"{'bits':>5}{'rate':>8}{'loss':>7}{'again':>7}{'gain left':>11}"
print(f"{'LoRA, all, r 2':16}{head}")
for run in runs:
    if (run["method"], run["model"], run["seed"]) == (lora, "course", "0"):
        before, loss, again = (float(run[k]) for k in ("before", "loss", "stored"))
        left = (before - again) / (before - loss)
        print(
            f"{'':16}{run['bits']:>5}{run['lr']:>8}{loss:7.2f}{again:7.2f}{left:11.0%}"
        )
nf4 = "QLoRA, all, r 8"
trained, loss, again = (mean(nf4, 4, k) for k in ("trained", "loss", "stored"))
print(f"QLoRA in NF4, all, r 8: {trained:,.0f} trained")
print(f"{'':21}{loss:15.2f}{again:7.2f}")
real = [run for run in runs if run["model"] == "real"]
print("\nSmolLM2-135M-Instruct, 3 bits in groups of 64, 15 steps of 3 pieces, one seed")
for run in real:
    before, loss, again = (float(run[k]) for k in ("before", "loss", "stored"))
    print(
        f"{run['method']:15} rate {run['lr']:7} {int(run['trained']):9,} trained:"
        f" {before:.2f} → {loss:.2f}, as integers {again:.2f}"
    )

# %% [markdown]
# The last lines are the real model, whose file stored its linears in 4 bits once. One seed, few steps and one or two rates: take the direction from it and
# not the size. LoRA, with more trained numbers, learns more there while its adapters stay. At the rate 0.003 rounding takes nearly all of it.
#
# ## Play
#
# Each dot is a method at some bits: what it takes to train, with weights, gradients and optimizer, and its loss once all is integers. Choose one.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
BITS = [bits for bits in (4, 3, 2) if any(run["bits"] == str(bits) for run in runs)]
SETTINGS = {
    "PEQA, rows": ("peqa", "row", 0, ()),
    "PEQA, groups": ("peqa", "group", 0, ()),
    "LoRA, q and v, r 4": ("qlora", "row", 4, ("q_proj", "v_proj")),
    "LoRA, all, r 2": ("qlora", "group", 2, ALL),
}


def memory(method: str, bits: int) -> float:
    """kB to train it: weights, gradients and optimizer."""
    kind, per, rank, targets = SETTINGS[method]
    grid = QuantConfig(bits, symmetric=False, per=per, group_size=32)
    plan = peqa.memory_plan(preset("course"), kind, grid, rank, targets)
    return (plan["weights"] + plan["gradients"] + plan["optimizer"]) / 1e3


points = {}
for method in METHODS:
    for bits in BITS:
        points[method, bits] = memory(method, bits), mean(method, bits, "stored")


def draw(method: str, bits: int):
    fig, ax = plt.subplots(figsize=(4.8, 2.8))
    for (other, _), (kb, loss) in points.items():
        color = palette.blue if "PEQA" in other else palette.vermillion
        ax.plot(kb, loss, "o", color=color, alpha=0.35)
    kb, loss = points[method, bits]
    color = palette.blue if "PEQA" in method else palette.vermillion
    ax.plot(kb, loss, "s", color=color, ms=12)
    ax.set(xlabel="kB to train", ylabel="loss as integers")
    ax.set_title(f"{method}, {bits} bits: {kb:.0f} kB, loss {loss:.2f}")
    return fig


good = {setting for setting, (_, loss) in points.items() if loss < 4.1}
least = min(points[setting][0] for setting in good)


def missing(method: str, bits: int) -> str:
    if (method, bits) not in good:
        return f"the loss is {points[method, bits][1]:.2f}."
    return "another takes less memory." if points[method, bits][0] > least else ""


explore(
    draw,
    alt=lambda method, bits: (
        f"{method}, {bits} bits: {points[method, bits][0]:.0f} kB to train, loss"
        f" {points[method, bits][1]:.2f} as integers."
    ),
    title="Memory against loss",
    challenge="As integers, a loss below 4.10 with the least memory to train.",
    missing=missing,
    start={"method": "LoRA, all, r 2", "bits": BITS[0]},
    trace=False,
    method=list(METHODS),
    bits=BITS,
)

# %% [markdown]
# In so small a model the embedding, which stays in floats, takes about half of the memory, and yet the order is that of large ones: rows are cheapest,
# groups learn more.
#
# ## At scale
#
# The paper trains LLaMA up to 65B. It reports about 130 GB of weights for that model in 16 bits and 33 GB in 4 bits with PEQA. Both come out of a count. Below it, the numbers that train: a scale per row,
# and LoRA of rank 4 on the queries and values.

# %% tags=["hide-input"]
published = {"full": 130, "peqa": 33}
for method, reported in published.items():
    ours = peqa.memory_plan(llama, method)["weights"] / 1e9
    same = "same" if abs(ours - reported) < 1 else "differs"
    print(f"LLaMA 65B, {method}: about {reported} GB, ours {ours:.1f} GB  {same}")
for name in ("llama-7b", "llama-13b", "llama-65b"):
    scales = peqa.trained_values(preset(name), "peqa")
    adapters = peqa.trained_values(preset(name), "lora", rank=4)
    print(f"{name:10} scales {scales / 1e6:.2f} M, LoRA {adapters / 1e6:.2f} M")

# %% [markdown]
# The rows of a large model are long, so that a scale per row is one number for thousands of weights: PEQA trains fewer numbers than the smallest usual LoRA.
#
# No widely used library has PEQA's linear. What ours stores is a folder that vLLM serves, before and after a task; only the scales in it differ:
#
# ```python
# from llmlab.compression import formats, peqa_and_qlora as peqa
#
# model = peqa.train_scales(formats.load("Llama-2-7b-W4A16"))    # codes of GPTQ, say
# ...                                              # any loop of yours, without weight decay
# peqa.save_task(model, "task.safetensors")                      # scales alone
# formats.save(peqa.store(model), "Llama-2-7b-W4A16-task")       # vllm serve this folder
# ```
#
# The end-to-end phase of EfficientQAT ([Chen et al. 2024](https://arxiv.org/abs/2407.11062 "chen2024efficientqat")) trains scales alone as well, after a first phase that
# also moves the integers. QA-LoRA ([Xu et al. 2024](https://arxiv.org/abs/2309.14717 "xu2024qalora")) goes between: its adapter sees the mean of each group of
# inputs, so that it adds the same to all weights of a group, and merges exactly into the zero points, if these may be floats.
#
# ## What to keep
#
# ```python
# integers = codes.float() - zero                        # frozen for good
# weight = scale * integers                              # a block shares its scale
# G = grad_output.T @ x                                  # gradient of the weight
# grad_scale = (G * integers).sum(over_the_block)        # all that trains
# ```
#
# **Use it** when the model must stay in integers, at 3 or 2 bits above all, and when many tasks share one base. **Not** when 4 bits and adapters beside
# them are fine: QLoRA can learn more there. And not to change single weights: a block moves as one.
#
# <details><summary>Why has a weight on level 0 no say in the gradient of its scale?</summary>
#
# It is s · 0 whatever s is. The gradient of a scale weighs each weight's gradient with its integer.
#
# </details>
#
# <details><summary>Why does a merged LoRA lose much at 2 bits and little at 4?</summary>
#
# Rounding keeps a change only where it crosses the middle between two levels. At 2 bits these lie several times further apart.
#
# </details>
#
# <details><summary>A task file has the right names and shapes. Why may its scales still mean nothing?</summary>
#
# They were trained with certain integers. With those of another rounding they are arbitrary; so the file carries a fingerprint of its integers.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/08-peqa-and-qlora.ipynb).
#
# Further reading: [QLoRA](../04-peft/07-qlora.ipynb) and its memory, and [Esser et al. 2020](https://arxiv.org/abs/1902.08153 "esser2020lsq") for scales
# that train while the integers follow.
