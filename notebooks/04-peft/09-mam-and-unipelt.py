# %% [markdown]
# # MAM and UniPELT: one view of them all
#
# Prefixes, adapters and LoRA look like three ideas; seen the right way they are one, with four settings. By the end of this page you
# will have shown that a prefix *is* an adapter, mixed two methods by design, let a model mix three by gates of its own, and
# found out what those gates are good for.

# %%
import tempfile

import torch
import torch.nn.functional as F

from llmlab.course import compare, explore, figure, plt, predict, show
from llmlab.models import course_model
from llmlab.models.accounting import parameters
from llmlab.models.presets import preset
from llmlab.peft import adapters, lora, walk
from llmlab.peft.adapters import bottleneck
from llmlab.peft.mam_and_unipelt import MAMConfig, UniPELTConfig, gates, mam, unipelt
from llmlab.peft.prompt_and_prefix_tuning import prefix_tuning
from llmlab.peft.published import bert_parameters
from llmlab.training import tasks

# %% [markdown]
# ## What it costs
#
# Which method suits a new task? One can try them all, each at several sizes and learning rates. With three methods, three sizes, four
# rates and three seeds that is a bill, before the real run has begun.

# %%
llama_7b = preset("llama-7b")
runs = 3 * 3 * 4 * 3
# forward 2N, backward through a frozen model 2N: no weight gradients
flops = 4 * parameters(llama_7b) * 10e6
print(f"{runs} trial runs of 10 million tokens on Llama 7B: {runs * flops:.1e} FLOP")
print(f"at 400 TFLOP/s on one GPU: {runs * flops / 400e12 / 3600:.0f} hours")

# %% [markdown]
# This page follows two ways out. *MAM* studies what the methods have in common and combines the best parts by hand. *UniPELT*
# puts all of them in and trains gates that decide.

# %% [markdown]
# ## Predict
#
# MAM for BART-large puts a prefix of 30 into every attention and a bottleneck of 512 beside every feed-forward layer. BART-large has 406
# million parameters, width 1,024, 24 layers, and 36 attentions, since each decoder layer has two.

# %%
guess = predict("What share of the parameters is trained?", unit="%")

# %% tags=["hide-output"]
d, layers = 1024, 12  # of BART-large's encoder, and again of its decoder
encoder = layers * (12 * d**2 + 13 * d)  # attention 4d², MLP 8d², biases, two norms
decoder = layers * (16 * d**2 + 19 * d)  # one attention more, and its norm
# words, two tables of positions, two norms
bart = encoder + decoder + (50265 + 2 * 1026 + 4) * d
prefix = 36 * 2 * 30 * d
beside = 24 * bottleneck.count(d, 512)
print(f"prefixes {prefix:,} and adapters {beside:,}")
print(f"BART-large has {bart:,}; the paper says 6.7%")
guess.settle(100 * (prefix + beside) / bart, digits=2)

# %% [markdown]
# Nine tenths of what is trained is in the feed-forward layers. That is the paper's advice in one number: attention is content with little,
# the feed-forward layers make use of much. How the authors came to it stands below.

# %% [markdown]
# ## The idea
#
# [He et al. 2022](https://arxiv.org/abs/2110.04366 "he2022towards") write each method as a change $\Delta h$ of some hidden state, and ask
# four things: which function gives $\Delta h$, what it reads, where it is added, and with which factor.
#
# | | $\Delta h$ | reads | changes | factor |
# |---|---|---|---|---|
# | prefix | $\mathrm{softmax}(q P_K^\top)\, P_V$ | attention's input | its output | $\lambda$, set by each query |
# | adapter | $f(h W_{down})\, W_{up}$ | a layer's output | the same output | 1 |
# | LoRA | $x A B$ | a layer's input | its output | $\alpha / r$ |
# | parallel adapter | $f(x W_{down})\, W_{up}$ | a layer's input | its output | $s = 4$ |
#
# ($1/\sqrt D$ and biases are left out.) Read the columns, not the rows: each cell could be filled otherwise. Two such fillings
# are this page's subject.

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(4.8, 4.0))
ORANGE, BLUE, GREEN = "#d55e00", "#0072b2", "#00805e"


def bow(ax, x, y, color):
    shape = [(-0.7, 0), (0.7, 0), (0.2, 0.35), (0.7, 0.7), (-0.7, 0.7), (-0.2, 0.35)]
    ax.add_patch(plt.Polygon([(x + a, y + b) for a, b in shape], color=color, zorder=3))


for ax, name in zip(axes, ("MAM", "UniPELT"), strict=True):
    ax.plot([0, 0], [0, 8.2], color="#6b7078", linewidth=2)  # the stream
    for y, label in [(1.0, "attention"), (4.4, "MLP")]:
        ax.plot(
            [0, 1.5, 1.5, 0],
            [y - 0.4, y - 0.4, y + 1.5, y + 1.5],
            color="#6b7078",
            linewidth=1,
        )
        ax.add_patch(plt.Rectangle((0.4, y), 2.2, 1.0, color="#dfe1e4", zorder=2))
        ax.text(1.5, y + 0.5, label, ha="center", va="center", fontsize=10)
    for i in range(3):
        ax.add_patch(plt.Rectangle((3.0 + 0.28 * i, 1.0), 0.18, 1.0, color=ORANGE))
    ax.text(3.4, 2.1, "prefix", ha="center", va="bottom", color=ORANGE, fontsize=10)
    if name == "MAM":
        ax.plot([1.5, 3.7, 3.7, 1.5], [4.0, 4.0, 5.9, 5.9], color=GREEN, linewidth=1)
        bow(ax, 3.7, 4.5, GREEN)
        ax.text(
            3.7, 6.1, "adapter × 4", ha="center", va="bottom", color=GREEN, fontsize=10
        )
    else:
        ax.add_patch(plt.Rectangle((0.4, 0.75), 2.2, 0.16, color=BLUE, zorder=3))
        ax.text(1.7, 0.35, "LoRA", ha="left", va="top", color=BLUE, fontsize=10)
        bow(ax, 0, 6.9, GREEN)
        ax.text(0.9, 7.25, "adapter", ha="left", va="center", color=GREEN, fontsize=10)
        for x, y, color in [(3.4, 0.5, ORANGE), (1.1, 0.18, BLUE), (-1.2, 7.25, GREEN)]:
            ax.text(
                x,
                y,
                "g",
                ha="center",
                va="center",
                color=color,
                fontweight="bold",
                style="italic",
            )
    ax.set(xlim=(-1.5, 4.9), ylim=(-0.4, 8.4), title=name)
    ax.axis("off")
figure(
    fig,
    alt=(
        "Two diagrams of a transformer block. MAM: a prefix beside attention and an"
        " adapter, scaled by four, beside the MLP. UniPELT: a prefix beside attention,"
        " LoRA inside it and an adapter at the block's end, each with a gate g."
    ),
)

# %% [markdown]
# The prefix is the surprise. Attention over $[P_K; K]$ has one softmax over both, and that softmax can be taken apart into
#
# $$(1-\lambda)\,\mathrm{Attn}(q, K, V) + \lambda\, \mathrm{softmax}(q P_K^\top) P_V$$
#
# where $\lambda$ is the part of the softmax that lies on the prefix. The second term is a network of width $p$: down by $P_K$, an
# activation (the softmax), up by $P_V$. A parallel adapter, in other words, with a factor that each query sets. Check it.

# %%
torch.manual_seed(0)
q, K, V, P_K, P_V = (torch.randn(n, 32) for n in (5, 7, 7, 3, 3))
whole = F.scaled_dot_product_attention(
    q[None], torch.cat([P_K, K])[None], torch.cat([P_V, V])[None]
)[0]
scores = q @ torch.cat([P_K, K]).T / 32**0.5
share = scores.softmax(-1)[:, :3].sum(-1, keepdim=True)  # λ
apart = (1 - share) * F.scaled_dot_product_attention(q[None], K[None], V[None])[
    0
] + share * (scores[:, :3].softmax(-1) @ P_V)
compare(apart, whole, what="attention with a prefix, and attention beside an adapter")

# %% [markdown]
# Once the methods are one form, one can change a single setting and keep the rest. The paper does so and asks four questions. The
# numbers are points of ROUGE-2, BART-large summarising XSum; in the last row BLEU, mBART translating English to Romanian:
#
# | question | answer | by how much |
# |---|---|---|
# | adapter after the MLP, or beside it? | beside | + 1.7 |
# | LoRA on attention, or on the MLP? | on the MLP | + 1 |
# | what is beside times 1, or times 4? | times 4 | 20.98 → 21.54 |
# | may a prefix shrink from 200 to 30? | it may | − 0.4 |
#
# Then they mix the winners, hence "mix and match":
#
# - a **prefix** with few tokens in attention, $p = 30$;
# - a **scaled parallel adapter** beside the MLP, $\mathrm{MLP}(x) + s\, W_{up} f(W_{down} x)$, with a wide bottleneck and $s = 4$.
#
# The mixture scores 21.90, full fine-tuning 21.94 in their run, and a parallel adapter alone, with nearly twice as many numbers
# as the mixture, 21.41.
#
# [Mao et al. 2022](https://arxiv.org/abs/2110.07577 "mao2022unipelt") leave the choice to the model. UniPELT has LoRA, a prefix and an
# adapter in every layer, each behind a gate that its input opens:
#
# $$g = \frac{1}{T}\sum_t \sigma(w \cdot x_t + b)$$
#
# The gates multiply LoRA's change, $g_L \tfrac{\alpha}{r} BAx$; the prefix's keys and values, $g_P P_K$ and $g_P P_V$; and what the
# adapter adds, $g_A A(h)$.
#
# In one layer a row of the batch has a single number for each method, so a text can be handled mostly by LoRA in one layer and mostly
# by the adapter in the next, and another text in the same batch the other way round. The gate of LoRA and that of the adapter read what
# these methods read; the prefix has no input of its own, so its gate reads what attention reads. Weights of a gate start small and its
# bias at zero, which leaves every gate half open: no method is favoured before training.
#
# Why a gate at all? LoRA has one already, the constant $\alpha / r$, and the authors find that the best constant differs from
# task to task and with the amount of data. A gate is that constant, learned, and allowed to look at the text.
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
show(
    gates.pooled_gate,
    gates.GatedLoRALinear.change,
    gates.scale_prefix,
    bottleneck.Bottleneck.forward,
    mam.apply,
)

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
# Here we take one adapter through a file, from one model to the other:

# %%
from transformers import LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.manual_seed(0)
for method, config in (
    (mam, MAMConfig(5, projection=False, bottleneck=32)),
    (unipelt, SIZES),
):
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
# (`sort`). UniPELT learns each from two seeds, 20 steps at a learning rate of 0.02, the best of three rates for all three tasks.
# Its gates read the first two tokens of a text and no more, so that whatever comes after these is predicted honestly. Then we
# read the gates, and put two questions to them:
#
# - *Are they right about the methods?* Each of the three learns each task **alone**, at the size it has inside UniPELT. LoRA and
#   the adapter keep the rate; a prefix alone learns next to nothing at 0.02 and gets 0.3.
# - *Does it help that they read the text?* We take the 16 values that the gates have after training, a mean over a batch of held-out texts,
#   and start again with every gate **nailed** to its value: same seed, same steps, but constants in place of gates. One more run
#   has them all nailed to one half.

# %%
NAMES, METHODS, SEEDS, RATE = (
    ("bible", "source", "sort"),
    ("lora", "prefix", "adapter"),
    (0, 1),
    2e-2,
)
SIZE = {"bible": 3, "source": 6, "sort": 8}
train = {
    name: tasks.make(name, tokenizer, batches=20, size=n) for name, n in SIZE.items()
}
valid = {
    name: tasks.make(name, tokenizer, "valid", batches=2, size=2 * n)
    for name, n in SIZE.items()
}
ALONE = {
    "lora": (lora.apply, SIZES.lora, RATE),
    "prefix": (prefix_tuning.apply, SIZES.prefix, 0.3),
    "adapter": (adapters.apply, SIZES.adapter, RATE),
}


def gates_of(model):
    """Its 16 gates, always in the same order."""
    return [m for m in model.modules() if isinstance(m, gates.Gate)]


def nailed(levels):
    """UniPELT with constants for gates."""

    def apply(model, config):
        unipelt.apply(model, config)
        for gate, level in zip(gates_of(model), levels, strict=True):
            gate.requires_grad_(False)
            gate.weight.zero_()
            gate.bias.fill_(torch.logit(level, eps=1e-4))
        return model

    return apply


def learn(name, apply, config, rate=RATE, seed=0):
    """The course model after 20 steps of one task, and its loss on the held-out
    part.
    """
    torch.manual_seed(seed)
    model = apply(course_model.load(), config)
    tasks.fit(model, train[name], rate)
    return model, tasks.score(model, valid[name])[0]


loss, mixtures, opened = {}, {}, {}
for name in NAMES:
    loss[name, "before"] = [tasks.score(course_model.load(), valid[name])[0]]
    for seed in SEEDS:
        model, after = learn(name, unipelt.apply, SIZES, seed=seed)
        opened[name, seed] = {
            m: g.mean().item() for m, g in unipelt.gates(model).items()
        }
        levels = [gate.value.mean() for gate in gates_of(model)]
        loss.setdefault((name, "UniPELT"), []).append(after)
        loss.setdefault((name, "nailed as found"), []).append(
            learn(name, nailed(levels), SIZES, seed=seed)[1]
        )
        mixtures[name] = mixtures.get(name, model)  # seed 0's
    loss[name, "nailed to 1/2"] = [
        learn(name, nailed(torch.full((16,), 0.5)), SIZES)[1]
    ]
    for method, how in ALONE.items():
        loss[name, f"{method} alone"] = [learn(name, *how)[1]]

# %% tags=["nbval-ignore-output"]
COLOR = {"lora": "#0072b2", "prefix": "#d55e00", "adapter": "#00805e"}
gate = {n: {m: sum(opened[n, s][m] for s in SEEDS) / 2 for m in METHODS} for n in NAMES}
gain = {
    n: {
        m: (
            (loss[n, "before"][0] - loss[n, f"{m} alone"][0])
            / (loss[n, "before"][0] - loss[n, "UniPELT"][0])
        )
        for m in METHODS
    }
    for n in NAMES
}
fig, (top, bottom) = plt.subplots(2, 1, figsize=(4.8, 4.8), sharex=True)
for i, method in enumerate(METHODS):
    for j, name in enumerate(NAMES):
        x = j + 0.26 * (i - 1)
        top.bar(
            x,
            gate[name][method],
            0.24,
            color=COLOR[method],
            label=method if j == 0 else None,
        )
        top.plot(
            [x] * 2,
            [opened[name, seed][method] for seed in SEEDS],
            "o",
            color="#22262b",
            markersize=3,
        )
        bottom.bar(x, 100 * gain[name][method], 0.24, color=COLOR[method])
top.set(ylabel="mean gate", ylim=(0, 1.35), yticks=[0, 0.5, 1])
top.legend(ncol=3, loc="upper center", columnspacing=1, handlelength=1.2)
top.set_title("What the gates say …")
bottom.axhline(100, color="#22262b", linewidth=1)
bottom.set(ylabel="% of UniPELT's gain", ylim=(0, 120), yticks=[0, 50, 100])
bottom.set_title("… and what each does alone")
bottom.set_xticks(range(3), labels=NAMES)
figure(
    fig,
    alt="Two rows of bars. Above, the mean gates: "
    + "; ".join(
        f"{n}: " + ", ".join(f"{m} {gate[n][m]:.2f}" for m in METHODS) for n in NAMES
    )
    + ". Below, what each method alone gains, in percent of UniPELT's gain: "
    + "; ".join(
        f"{n}: " + ", ".join(f"{m} {gain[n][m]:.0%}" for m in METHODS) for n in NAMES
    )
    + ".",
)
print(f"{'loss':15}" + "".join(f"{name:>11}" for name in NAMES))
for row in dict.fromkeys(row for _, row in loss):
    print(
        f"{row:15}"
        + "".join(
            f"{' '.join(f'{v:.2f}' for v in loss[name, row]):>11}" for name in NAMES
        )
    )
assert all(g["adapter"] > g["lora"] > g["prefix"] for g in opened.values())
assert all(
    loss[n, "nailed as found"][s] < loss[n, "UniPELT"][s] + 0.03
    for n in NAMES
    for s in SEEDS
)

# %% [markdown]
# The hope was that the gates choose another method for each task. They do not. In all three tasks, on both seeds, the order is the
# same: the adapter's gate nearly or fully open, LoRA's behind it, the prefix's last. This model has one favourite.
#
# The lower row says that the gates are right about it. The adapter alone gets all of UniPELT's gain on two tasks. Only the digits
# profit from the mixture, 1.91 and 1.88 against 2.03 for the adapter and 2.04 for LoRA. And there it is the weighing that counts: the
# same three methods, each behind a half-open gate, end at 2.00.
#
# Now the surprise. Nailed to the values that its gates had found, the mixture learns *as well or better*, in six runs of six; on the
# digits it ends at 1.86 with both seeds. So what UniPELT gains here are 16 numbers, how much of which method in which layer. That
# the numbers can change from text to text bought nothing. Nor are they a measure of the use made of a method: with time,
# a gate of one half costs nothing, if what stands behind it grows to twice its size.
#
# The paper reports more. Over eight tasks of GLUE with BERT-base, it compares with the best single method *of each task*. With 100
# examples per task that makes 60.60 points on average, and UniPELT has 62.59; with 500 it is 70.02 against 69.98, with 1,000
# it is 73.19 against 73.31. The lead is where data are scarce and single methods fail at random; then a mixture is the safer bet.
#
# Do our gates read at all? Show the three tasks to the model that learned the Bible:

# %% tags=["nbval-ignore-output"]
final, by_task = mixtures["bible"], {}
for name in NAMES:
    batch = valid[name][0]
    with torch.no_grad():
        tasks.logits_of(final, batch)
    by_task[name] = {m: g.view(4, -1).mean(1) for m, g in unipelt.gates(final).items()}
for method in METHODS:
    moved = max(
        (by_task[a][method] - by_task[b][method]).abs().max().item()
        for a in NAMES
        for b in NAMES
    )
    print(
        f"{method:8} between two tasks, a layer's mean gate moves by at most"
        f" {moved:.2f}"
    )

# %% [markdown]
# They do: at the sight of two tokens that are not the Bible's, an adapter's gate can swing by most of its range. It was no use to
# the loss, but it is real, and the page's last figure lets you look at it.

# %% [markdown]
# ## Play
#
# Choose a layer, and a task to show to the model that learned the Bible. The bars are its three gates there. Which gates stay, whatever
# it reads?


# %% tags=["hide-input", "nbval-ignore-output"]
def draw(layer, task):
    fig, ax = plt.subplots(figsize=(4.8, 2.6))
    values = [by_task[task][m][layer].item() for m in METHODS]
    ax.bar(METHODS, values, color=[COLOR[m] for m in METHODS])
    ax.set(ylim=(0, 1), ylabel="gate")
    ax.set_title(f"layer {layer}, shown: {task}")
    return fig


explore(
    draw,
    title="Three gates",
    alt=lambda layer, task: (
        f"Layer {layer}, shown {task}: "
        + ", ".join(f"{m} {by_task[task][m][layer]:.2f}" for m in METHODS)
        + "."
    ),
    start={"layer": 0, "task": "bible"},
    layer=[0, 1, 2, 3],
    task=list(NAMES),
)

# %% [markdown]
# ## At scale
#
# MAM's count stood above: 6.7% of BART-large in the paper, and the same in ours. UniPELT's paper has BERT-base, 12 layers of width
# 768, with a prefix of 10, an adapter of 48, LoRA of rank 8 on queries and values, and three gates per layer (the library's LoRA has a
# gate for each matrix, as ours). The library's defaults keep these, with $d/16$ for the adapter. The same settings on Llama 7B:

# %%
bert = bert_parameters(12, 768, 3072, 30_522)
for what, L, d, total in (
    ("BERT-base", 12, 768, bert),
    ("Llama 7B", 32, 4096, parameters(llama_7b)),
):
    parts = {
        "prefix": L * 2 * 10 * d,
        "adapter": L * bottleneck.count(d, d // 16),
        "LoRA": L * 2 * 8 * 2 * d,
        "gates": L * 3 * (d + 1),
    }
    trained = sum(parts.values())
    print(f"{what}: {trained:,} numbers, {trained / (total + trained):.2%} of all")
    print("   " + ", ".join(f"{name} {n / trained:.1%}" for name, n in parts.items()))
print("the paper says 1.26% for BERT-base")

# %% [markdown]
# The count is the paper's. Now compare the shares. On the small model the adapter is the largest part by far; on the large one it is
# nearly all, because $d/16$ grows with the width and a rank of 8 does not. Sizes copied from a paper to another width change what
# is being compared: fix the budgets, not the settings, when you let methods compete.
#
# The gates are the cheapest part, but a gate has a price besides its size. Nothing behind it can be merged, LoRA included, and all
# three methods are paid for at each token. The paper measures it on BERT-base: inference takes 105% of the plain model's time with LoRA,
# 107% with the adapter, 114% with the prefix, and 127% with all three and their gates. Constants instead of gates would give LoRA its merge back.
#
# Both methods on any Llama, on one GPU or eight:
#
# ```
# python -m llmlab.peft.examples.bottleneck_text --method mam --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# torchrun --nproc-per-node 8 -m llmlab.peft.examples.bottleneck_text --method unipelt --gate-tokens 32 --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# ```

# %% [markdown]
# ## What to keep
#
# ```python
# def with_prefix(q, K, V, P_K, P_V):                # q (D,), K (S, D), P_K (p, D)
#     a, b = P_K @ q / len(q)**0.5, K @ q / len(q)**0.5
#     lam = (a.logsumexp(0) - b.logsumexp(0)).sigmoid()
#     return (1 - lam) * b.softmax(0) @ V + lam * a.softmax(0) @ P_V
# def gate(x, w, b):                                 # UniPELT: one number per sequence
#     return (x @ w + b).sigmoid().mean(1)
# ```
#
# A prefix of $p$ tokens is a parallel adapter of width $p$ with a softmax inside and a factor $\lambda$ set by each
# query; the two sides agree to $10^{-5}$. MAM gives attention a prefix of 30 and the MLP a parallel bottleneck of 512
# scaled by 4: 6.7% of BART-large, nine tenths of it in the feed-forward layers. UniPELT puts 3 methods behind gates, one
# number per sequence and layer: on our 3 tasks they found one order of the methods, the adapter alone did as well on 2 of
# them, and constants at the values that the gates had found did as well in 6 runs of 6.
#
# **Use it**, gates and all, to *find* a mixture when it is not clear which method suits the data; then nail the gates, so
# that LoRA can be merged again and a decoder sees no future. **Not** at inference: nothing behind a gate can be merged,
# and all three methods are paid for at each token.
#
# <details><summary>What is λ?</summary>
#
# The part of the softmax over prefix and text that lies on the prefix. Each query sets its own.
#
# </details>
#
# <details><summary>Why is a prefix behind a shut gate not the same as no prefix?</summary>
#
# A key of 0 still takes its part of the softmax, and the value of 0 dilutes the rest.
#
# </details>
#
# <details><summary>Why may a decoder's gate read the first tokens only?</summary>
#
# A mean over the whole text would let every token see its own future. What comes after the first n tokens is predicted
# honestly.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/04-peft/09-mam-and-unipelt.ipynb), three of them, 8 points.
#
# References: [He et al. 2022](https://arxiv.org/abs/2110.04366 "he2022towards");
# [Mao et al. 2022](https://arxiv.org/abs/2110.07577 "mao2022unipelt"); the library,
# [Poth et al. 2023](https://arxiv.org/abs/2311.11077 "poth2023adapters").
