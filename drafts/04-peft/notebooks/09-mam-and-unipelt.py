# %% [markdown]
# # MAM and UniPELT: one view of them all
#
# Prefixes, adapters and LoRA look like three ideas; seen rightly they are one, with three settings. By the end of this page you
# will have shown that a prefix *is* an adapter, mixed two methods by design, and let a model mix three by itself.

# %%
import tempfile

import torch
import torch.nn.functional as F

from llmlab.course import compare, explore, figure, plt, show
from llmlab.models import course_model
from llmlab.models.accounting import parameters
from llmlab.models.presets import preset
from llmlab.peft import bottleneck, gates, mam, unipelt, walk
from llmlab.peft.mam import MAMConfig
from llmlab.peft.unipelt import UniPELTConfig
from llmlab.training import tasks

# %% [markdown]
# ## What it costs
#
# Which method suits a new task? One can try them all, each at several sizes and learning rates. With three methods, three sizes, four
# rates and three seeds that is a bill, before the real run has begun.

# %%
llama_7b = preset("llama-7b")
runs = 3 * 3 * 4 * 3
flops = 4 * parameters(llama_7b) * 10e6  # forward 2N, backward through a frozen model 2N: no weight gradients
print(f"{runs} trial runs of 10 million tokens on Llama 7B: {runs * flops:.1e} FLOP")
print(f"at 400 TFLOP/s on one GPU: {runs * flops / 400e12 / 3600:.0f} hours")

# %% [markdown]
# This page follows two ways out. *MAM* studies what the methods have in common and combines the best parts by hand. *UniPELT*
# puts all of them in and trains gates that decide.

# %% [markdown]
# ## Predict
#
# MAM for BART-large puts a prefix of 30 into every attention and a bottleneck of 512 beside every feed-forward layer. BART-large has 406
# million parameters, width 1,024, 24 layers, and 36 attentions, since each decoder layer has two. **Which share of the parameters is
# trained?** Half a percent? Two? Ten?

# %%
from transformers import BartConfig, BartModel, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
with torch.device("meta"):  # shapes without numbers; BartConfig's defaults are BART-large
    bart = BartModel(BartConfig()).num_parameters()
prefix = 36 * 2 * 30 * 1024
beside = 24 * bottleneck.count(1024, 512)
print(f"prefixes {prefix:,} and adapters {beside:,}")
print(f"{(prefix + beside) / bart:.1%} of BART-large's {bart:,}; the paper says 6.7%")

# %% [markdown]
# Nine tenths of that is in the feed-forward layers. That is the paper's advice in one number: attention is content with little,
# the feed-forward layers make use of much.

# %% [markdown]
# ## The idea
#
# [He et al. 2022](https://arxiv.org/abs/2110.04366 "he2022towards") write each method as a change $\Delta h$ of some hidden state, and ask
# four things: which function gives $\Delta h$, what it reads, where it is added, and with which factor.

# %%
rows = [
    ("prefix", "softmax(q Pᴷᵀ) Pⱽ", "attention's input", "its output", "λ, by query"),
    ("adapter", "f(h W↓) W↑", "a layer's output", "the same output", "1"),
    ("LoRA", "x A B", "a layer's input", "its output", "α / r"),
    ("parallel", "f(x W↓) W↑", "a layer's input", "its output", "s = 4"),
]
fig, ax = plt.subplots(figsize=(4.8, 2.5))
ax.axis("off")
table = ax.table(
    cellText=[row[1:] for row in rows],
    rowLabels=[row[0] for row in rows],
    colLabels=["Δh", "reads", "changes", "factor"],
    loc="center",
    cellLoc="center",
)
table.auto_set_font_size(False)
table.set_fontsize(8)
table.scale(1, 1.9)
for cell in table.get_celld().values():
    cell.set_facecolor("none")
    cell.set_edgecolor("#9aa0a6")
figure(
    fig, alt="A table: " + "; ".join(f"{r[0]}: {r[1]}, reads {r[2]}, changes {r[3]}, factor {r[4]}" for r in rows) + "."
)

# %% [markdown]
# The prefix is the surprise. Attention over $[P_K; K]$ has one softmax over both, and that softmax can be taken apart:
#
# $$\mathrm{Attn}(q, [P_K; K], [P_V; V]) = (1-\lambda)\,\mathrm{Attn}(q, K, V) + \lambda\, \mathrm{softmax}(q P_K^\top) P_V$$
#
# where $\lambda$ is the part of the softmax that lies on the prefix. The second term is a network of width $p$: down by $P_K$, an
# activation (the softmax), up by $P_V$. A parallel adapter, in other words, with a factor that each query sets. Check it.

# %%
torch.manual_seed(0)
q, K, V, P_K, P_V = (torch.randn(n, 32) for n in (5, 7, 7, 3, 3))
whole = F.scaled_dot_product_attention(q[None], torch.cat([P_K, K])[None], torch.cat([P_V, V])[None])[0]
scores = q @ torch.cat([P_K, K]).T / 32**0.5
share = scores.softmax(-1)[:, :3].sum(-1, keepdim=True)  # λ
apart = (1 - share) * F.scaled_dot_product_attention(q[None], K[None], V[None])[0] + share * (
    scores[:, :3].softmax(-1) @ P_V
)
compare(apart, whole, what="attention with a prefix, and attention beside an adapter")

# %% [markdown]
# The view also says what can be varied. The paper tried the combinations and mixed the winners, hence "mix and match":
#
# - a **prefix** with few tokens in attention, $p = 30$;
# - a **scaled parallel adapter** beside the MLP, $\mathrm{MLP}(x) + s\, W_{up} f(W_{down} x)$, with a wide bottleneck and $s = 4$.
#
# [Mao et al. 2022](https://arxiv.org/abs/2110.07577 "mao2022unipelt") leave the choice to the model. UniPELT has LoRA, a prefix and an
# adapter in every layer, each behind a gate that its input opens:
#
# $$g = \frac{1}{T}\sum_t \sigma(w \cdot x_t + b), \qquad \Delta W x \leftarrow g_L \tfrac{\alpha}{r} BAx,\quad P_K, P_V \leftarrow g_P P_K, g_P P_V,\quad A(h) \leftarrow g_A A(h)$$
#
# In one layer a row of the batch has a single number for each method, so a text can be handled mostly by LoRA in one layer and mostly
# by the adapter in the next, and another text in the same batch the other way round. The gate of LoRA and that of the adapter read what
# these methods read; the prefix has no input of its own, so its gate reads what attention reads. Weights of a gate start small and its
# bias at zero, which leaves every gate half open: no method is favored before training.
#
# Two traps. The prefix gate scales keys *and* values; even so a shut gate is not no prefix, since a key of 0 still takes its part of
# the softmax. And the mean runs over the whole text. That is right for the paper's encoders. A decoder would see its own future in
# the gate, so ours can take the mean over the first $n$ tokens only (`gate_tokens`). These $n$ still see one another through the
# gate; whatever is predicted after them is honest.

# %% [markdown]
# ## The code
#
# The gate, the three things it stands before, and what MAM is made of.

# %%
show(gates.pooled_gate, gates.GatedLoRALinear.change, gates.scale_prefix, bottleneck.Bottleneck.forward, mam.apply)

# %% [markdown]
# Shapes in the course model (4 layers, $d = 128$, 2 key/value heads of 32), for the sizes of the experiment below:
#
# | part | shape | numbers in all |
# |---|---|---|
# | prefix, $p = 5$ | 5 × (4 layers · 2 · 2 heads · 32) | 2,560 when trained |
# | adapter, $m = 8$ | 4 × (8 × 128 + 8 + 128 × 8 + 128) | 8,736 |
# | LoRA, $r = 4$ on `q_proj`, `v_proj` | 4 × (4 × 128 + 128 × 4 + 4 × 128 + 64 × 4) | 7,168 |
# | gates | 16 × (128 + 1) | 2,064 |

# %%
SIZES = UniPELTConfig(5, projection=False, bottleneck=8, r=4, alpha=4, gate_tokens=2)
tokenizer = course_model.load_tokenizer()
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])
model = course_model.load()
plain = model(prompt)
unipelt.apply(model, SIZES)
print("UniPELT trains {:,} of {:,} numbers".format(*walk.trainable(model)))
unipelt.remove(model)
compare(model(prompt), plain, what="logits after it came off", tol=0)

# %% [markdown]
# ## Against the library
#
# `peft` has neither method. The `adapters` library has both, in an environment of its own; the package's tests compare logits and every
# gradient with a file that it wrote, to $10^{-5}$, on a small Llama with grouped-query attention. Three differences came to light.
# The library gives the first token position 0 whether or not there is a prefix, ours starts at $p$ as `peft` does: with RoPE our
# stored keys are its keys turned on by $p$ positions. Its parallel adapter reads the stream before the norm (`reads="residual"`
# with us). And where LoRA has a gate, the gate replaces $\alpha/r$.
#
# Here, the same adapter on two models, through a file:

# %%
torch.manual_seed(0)
for method, config in ((mam, MAMConfig(5, projection=False, bottleneck=32)), (unipelt, SIZES)):
    method.apply(model, config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    folder = tempfile.mkdtemp()
    method.save(model, folder)
    theirs = method.load(LlamaForCausalLM.from_pretrained(course_model.MODEL), folder)
    compare(
        theirs(prompt).logits,
        model(prompt),
        what=f"{method.__name__.split('.')[-1]}: our file on transformers' Llama",
        tol=1e-3,
    )
    method.remove(model)

# %% [markdown]
# ## The experiment
#
# Three tasks for the course model: continue the Bible (`bible`), name the book that a passage is from (`source`), put digits in order
# (`sort`). UniPELT learns each from the same start, 25 steps at a learning rate of 0.01, three seeds. Then we read the gates.

# %%
NAMES, SEEDS = ("bible", "source", "sort"), range(3)
SIZE = {"bible": 4, "source": 8, "sort": 8}
train = {name: tasks.make(name, tokenizer, batches=25, size=n) for name, n in SIZE.items()}
valid = {name: tasks.make(name, tokenizer, "valid", batches=3, size=n) for name, n in SIZE.items()}


def learn(method, config, name, seed):
    """The course model with `method` after 25 steps of one task, and its loss."""
    torch.manual_seed(seed)
    model = method.apply(course_model.load(), config)
    tasks.fit(model, train[name], 1e-2)
    return model, tasks.score(model, valid[name])[0]


before = {name: tasks.score(course_model.load(), valid[name])[0] for name in NAMES}
losses, opened, learned = {}, {}, {}
for name in NAMES:
    for seed in SEEDS:
        model, losses[name, seed] = learn(unipelt, SIZES, name, seed)
        learned[name, seed] = model
        opened[name, seed] = {m: g.mean().item() for m, g in unipelt.gates(model).items()}
mixed = {name: learn(mam, MAMConfig(5, projection=False, bottleneck=16), name, 0)[1] for name in NAMES}

# %%
# NBVAL_IGNORE_OUTPUT
METHODS = ("lora", "prefix", "adapter")
fig, ax = plt.subplots(figsize=(4.8, 3.2))
for i, method in enumerate(METHODS):
    for j, name in enumerate(NAMES):
        values = [opened[name, seed][method] for seed in SEEDS]
        ax.bar(j + 0.26 * (i - 1), sum(values) / 3, 0.24, color=f"C{i}", label=method if j == 0 else None)
        ax.plot([j + 0.26 * (i - 1)] * 3, values, "o", color="#22262b", markersize=3)
ax.set_xticks(range(3), labels=NAMES)
ax.set(ylabel="mean gate", ylim=(0, 1.25))
ax.legend(ncol=3, loc="upper center")
ax.set_title("How far each gate is open")
average = {n: {m: sum(opened[n, s][m] for s in SEEDS) / 3 for m in METHODS} for n in NAMES}
figure(
    fig,
    alt="Mean gates by task: "
    + "; ".join(f"{n}: " + ", ".join(f"{m} {average[n][m]:.2f}" for m in METHODS) for n in NAMES)
    + ".",
)
print("task      before   UniPELT, three seeds     MAM    gates: lora  prefix  adapter")
for name in NAMES:
    three = " ".join(f"{losses[name, seed]:.2f}" for seed in SEEDS)
    print(
        f"{name:8}{before[name]:>8.2f}   {three:<22}{mixed[name]:>6.2f}"
        + " " * 9
        + "".join(f"{average[name][m]:>8.2f}" for m in METHODS)
    )
assert all(losses[n, s] < before[n] for n, s in losses) and all(mixed[n] < before[n] for n in NAMES)

# %% [markdown]
# The hope was that the gates would choose a different method for each task. They did not: in all three the order is the same, the
# adapter first and nearly fully open, then LoRA, then the prefix. This model has *one* favourite, whatever the task. What
# the task does set is how far the other gates open. Read the dots, one for each seed: where those of two tasks do not overlap, the
# difference is more than chance of the start. The prefix's gate passes that test. It ends below the one half where it began on the
# Bible, and above it where a question has to be answered with a label.
#
# Two cautions. A gate is not the use that is made of a method: one of a half costs nothing if what stands behind it can grow to
# twice its size, and the adapter's gate may be wide open because it is a cheap way to a larger adapter in 25 steps. And
# a gate reads tokens: here the first two, which are words in two of the tasks and digits in the third. Do the gates answer to the
# task that they were trained on, or to the text before them? That can be seen by showing one model all three.

# %%
# NBVAL_IGNORE_OUTPUT
final = learned["bible", 0]
by_task = {}
for name in NAMES:
    batch = valid[name][0]
    with torch.no_grad():
        tasks.logits_of(final, batch)
    by_task[name] = {m: g.view(4, -1).mean(1) for m, g in unipelt.gates(final).items()}
spread = {m: max((by_task[a][m] - by_task[b][m]).abs().max().item() for a in NAMES for b in NAMES) for m in METHODS}
for method in METHODS:
    print(
        f"{method:8} trained on the Bible, shown the three tasks: a layer's mean gate moves by at most {spread[method]:.2f}"
    )

# %% [markdown]
# These gates were trained on the Bible and shown three tasks: they do depend on the input, the adapter's and the prefix's more than
# LoRA's, and move when another kind of text comes. That is what sets UniPELT apart from three fixed factors. Whether the
# movement is of use is another question, which this page does not answer. A fair test would train a
# twin whose gates are constants and compare. Where such a twin does as well, leave the gates out: a method without gates is simpler,
# its LoRA can be merged, and there is no mean over tokens that could look ahead.
#
# MAM stands in the table's next column, with one seed, at a similar budget and the same learning rate. It was not tuned for any of the three
# tasks, so read it as a check that it learns rather than as a ranking. The comparison of all methods at equal budgets is
# the business of the chapter's last lesson.

# %% [markdown]
# ## Play
#
# Choose a layer, and a task to show to the model that learned the Bible. The bars are its three gates there.


# %%
# NBVAL_IGNORE_OUTPUT
def draw(layer, task):
    fig, ax = plt.subplots(figsize=(4.8, 2.6))
    values = [by_task[task][m][layer].item() for m in METHODS]
    ax.bar(METHODS, values, color=["C0", "C1", "C2"])
    ax.set(ylim=(0, 1), ylabel="gate")
    ax.set_title(f"layer {layer}, shown: {task}")
    return fig


explore(
    draw,
    title="Three gates",
    alt=lambda layer, task: (
        f"Layer {layer}, shown {task}: " + ", ".join(f"{m} {by_task[task][m][layer]:.2f}" for m in METHODS) + "."
    ),
    start={"layer": 0, "task": "bible"},
    layer=[0, 1, 2, 3],
    task=list(NAMES),
)

# %% [markdown]
# ## At scale
#
# MAM's count stood above: 6.7% of BART-large in the paper, and the same in ours. UniPELT's defaults in the `adapters` library are a prefix of 10, an
# adapter of $d/16$ and LoRA of rank 8 on queries and values. Counted for BERT-base, 12 layers of width 768, and for Llama 7B:

# %%
for what, layers, d, total in (("BERT-base", 12, 768, 110e6), ("Llama 7B", 32, 4096, parameters(llama_7b))):
    parts = {
        "prefix": layers * 2 * 10 * d,
        "adapter": layers * bottleneck.count(d, d // 16),
        "LoRA": layers * 2 * 8 * 2 * d,
        "gates": layers * 4 * (d + 1),
    }
    print(f"{what:10}" + ", ".join(f"{k} {n:,}" for k, n in parts.items()) + f": {sum(parts.values()) / total:.2%}")

# %% [markdown]
# Compare the columns. On the small model the adapter is the largest part by far; on the large one it is so still more, because $d/16$
# grows with the width and a rank of 8 does not. Sizes copied from a paper to another width change what is being compared: fix the
# budgets, not the settings, when you let methods compete.
#
# The gates are the cheapest part. But nothing of UniPELT can be merged, LoRA included, since every gate depends on the input: it pays
# for all three methods at each token. Its use would be in trials, one run in place of three, if the gates told which method a task
# leans on. On this page they told of a favourite that all tasks share, so try the winner alone before you believe them.
#
# ```
# torchrun --nproc-per-node 8 train.py   # your loop; unipelt.apply(model, UniPELTConfig(gate_tokens=32)) before DDP wraps it
# ```

# %% [markdown]
# ## Takeaways
#
# - A prefix of $p$ tokens is a parallel adapter of width $p$ with a softmax inside and a factor $\lambda$ set by each query; the two
#   sides agree to $10^{-5}$.
# - MAM gives attention a prefix of 30 and the MLP a parallel bottleneck of 512 scaled by 4: 6.7% of BART-large, nine tenths of it in the
#   feed-forward layers.
# - UniPELT puts 3 methods behind gates, one number a sequence and layer; on our three tasks the gates gave one order of the three
#   methods, the adapter's above 0.9, rather than a choice for each task.
#
# Now write it yourself: [Exercises](../../work/04-peft/09-mam-and-unipelt.ipynb), three of them, 8 points.
#
# References: [He et al. 2022](https://arxiv.org/abs/2110.04366 "he2022towards");
# [Mao et al. 2022](https://arxiv.org/abs/2110.07577 "mao2022unipelt"); the library,
# [Poth et al. 2023](https://arxiv.org/abs/2311.11077 "poth2023adapters").
