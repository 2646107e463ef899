# %% [markdown]
# # LoRA: fine-tune a sliver of the model
#
# To teach a model something new, LoRA freezes every weight and trains two thin matrices beside each: a fraction of a
# percent of the numbers, for most of the effect. By the end of this page you will have taught a model the King James
# Bible both ways, seen why so little is enough, and served three models from one set of weights.

# %%
import tempfile

import torch

from llmlab.course import compare, explore, figure, plt, show
from llmlab.models import course_model
from llmlab.models.accounting import adam_bytes, parameters
from llmlab.models.generation import generate
from llmlab.models.llama import Llama
from llmlab.models.presets import preset
from llmlab.peft import lora, walk
from llmlab.peft.lora import LoRAConfig, files
from llmlab.training import pretraining

# %% [markdown]
# ## What it costs
#
# Fine-tuning a 7B model the plain way means that all of it trains. Adam in mixed precision then holds 16 bytes for
# every parameter: 2 for the weight, 2 for its gradient, 4 for a master copy and 4 + 4 for Adam's two averages. Add that
# up, and ask what a shelf of one hundred such models takes on disk.

# %%
llama_7b = preset("llama-7b")
training = sum(adam_bytes(llama_7b).values())
shelf = 100 * 2 * parameters(llama_7b)
print(f"Llama 7B: {parameters(llama_7b):,} parameters")
print(
    f"to train all of them: {training / 1e9:.0f} GB, before a single activation; an 80"
    f" GB GPU holds {80e9 / training:.0%}"
)
print(f"to keep 100 fine-tuned copies: {shelf / 1e12:.2f} TB")

# %% [markdown]
# So the run does not fit on one of the largest GPUs, and every customer who wants a model of their own costs 13 GB of
# storage and, when it is served, 13 GB of GPU memory. Yet one hundred customers with one hundred copies mostly store
# the same thing one hundred times.

# %% [markdown]
# ## Predict
#
# LoRA puts a pair of thin matrices of rank 8 beside the query and the value projection of each of the 32 layers, and
# trains those alone. **What fraction of the 7B model's parameters is that?** Ten percent? One? A tenth of one? Write
# your guess down, as a percentage, before you run the next cell.

# %%
with torch.device("meta"):  # the shape of the model without its 27 GB
    big = Llama(llama_7b)
lora.apply(big, LoRAConfig(r=8, target_modules=("q_proj", "v_proj")))
trained, everything = walk.trainable(big)
frozen = everything - trained
print(
    f"trained: {trained:,} of {everything:,}, which is"
    f" {100 * trained / everything:.4f}%"
)
print(
    f"to train: {(2 * frozen + 16 * trained) / 1e9:.1f} GB instead of"
    f" {training / 1e9:.0f} GB"
)
print(
    f"to keep 100 fine-tuned models: {(2 * frozen + 100 * 2 * trained) / 1e9:.1f} GB"
    f" instead of {shelf / 1e9:,.0f} GB"
)

# %% [markdown]
# One number in sixteen hundred. The arithmetic is short. A square matrix of width 4,096 has 16.8 million
# entries; two matrices of 4,096 × 8 have 65,536, which is 0.4%. And only 64 of the 224 matrices get a pair.
#
# The surprise is not that it is small but that it works. To see why, look at what fine-tuning does to a weight.

# %% [markdown]
# ## The idea
#
# Any change that fine-tuning makes to a weight is a matrix, $\Delta W$, as large as the weight. LoRA bets that it can
# be written as a tall matrix times a flat one. Here are the three, drawn to scale for a weight of 128 × 128 and rank 4.

# %%
fig, ax = plt.subplots(figsize=(4.8, 2.9))
parts = [
    (0, 0, 128, 128, "#dfe1e4", "W₀  128 × 128\nfrozen"),
    (186, 0, 4, 128, "#d55e00", "B"),
    (206, 124, 128, 4, "#0072b2", "A"),
]
for x, y, width, height, color, _ in parts:
    ax.add_patch(plt.Rectangle((x, y), width, height, color=color))
ax.text(64, 64, parts[0][-1], ha="center", va="center")
ax.text(157, 64, "+", ha="center", va="center", fontsize=20)
ax.text(188, -16, "B\n128 × 4", ha="center", va="center", color="#d55e00")
ax.text(270, 106, "A  4 × 128", ha="center", va="center", color="#0072b2")
ax.text(
    270,
    52,
    f"16,384 frozen\n{4 * (128 + 128):,} trained\n= 1 in 16",
    ha="center",
    va="center",
)
ax.set(xlim=(-4, 338), ylim=(-34, 132), aspect="equal")
ax.axis("off")
figure(
    fig,
    alt=(
        "A large grey square, the frozen weight, plus a thin upright bar B times a thin"
        " flat bar A, drawn to scale."
    ),
)

# %% [markdown]
# In the symbols of [Hu et al. 2021](https://arxiv.org/abs/2106.09685 "hu2021lora"), equation 3, with the scale of their
# section 4.1:
#
# $$\begin{gathered}
# h = W_0 x + \Delta W x, \qquad \Delta W = \frac{\alpha}{r}\, B A, \\
# B \in \mathbb{R}^{d \times r},\quad A \in \mathbb{R}^{r \times k}
# \end{gathered}$$
#
# Three small decisions carry the method.
#
# - **$B$ starts at zero.** So $\Delta W = 0$ and step 0 *is* the pretrained model, to the last bit. $A$ starts random:
#   with both at zero, neither would ever receive a gradient.
# - **The scale is $\alpha / r$, not $\alpha$.** Twice the rank adds twice as many terms; dividing by $r$ keeps the sum at
#   about the same size, so that the learning rate found for $r = 4$ is near right for $r = 8$.
# - **The product is never built while training.** $B(Ax)$ costs $r(k + d)$ multiplications per token, while $(BA)x$ costs
#   $kd$ and a $d \times k$ gradient. Once training is over, build it once and add it: $W = W_0 + \Delta W$ is an
#   ordinary weight again, and the adapter costs nothing at all at inference.
#
# A cost that is easy to overlook stays: the forward pass still runs through all of $W_0$, and so does the way back. LoRA
# saves memory and storage. It saves little arithmetic.

# %% [markdown]
# ## The code
#
# The mathematics is two lines. The layer that holds them adds the low-rank path to what the frozen linear gives, and
# knows how to fold itself in.

# %%
show(
    lora.delta_weight,
    lora.low_rank,
    lora.LoRALinear.change,
    lora.LoRALinear.forward,
    lora.LoRALinear.merge,
)

# %% [markdown]
# Shapes in the course model, which has 128 channels, 4 query heads of 32 and, by grouped-query attention, only 2 heads
# for keys and values. `v_proj` is therefore half as tall, and so is its $B$:
#
# | layer | $W_0$ $(d, k)$ | $A$ $(r, k)$ | $B$ $(d, r)$ | trained at $r=4$ | share of $W_0$ |
# |---|---|---|---|---|---|
# | `q_proj`, `o_proj` | 128 × 128 | 4 × 128 | 128 × 4 | 1,024 | 6.3% |
# | `k_proj`, `v_proj` | 64 × 128 | 4 × 128 | 64 × 4 | 768 | 9.4% |
# | `gate_proj`, `up_proj` | 384 × 128 | 4 × 128 | 384 × 4 | 2,048 | 4.2% |
# | `down_proj` | 128 × 384 | 4 × 384 | 128 × 4 | 2,048 | 4.2% |
#
# The smaller the model, the larger the share: $r(k+d)$ grows with the width, $kd$ with its square. `apply` finds the
# layers by the endings of their names, freezes the model and puts a wrapper around each. At that moment nothing has
# changed, and you can check it to the bit.

# %%
tokenizer = course_model.load_tokenizer()
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])
model = course_model.load()
plain = model(prompt)
lora.apply(model, LoRAConfig(r=4, alpha=8, target_modules="all-linear"))
compare(model(prompt), plain, what="logits with a fresh adapter", tol=0)
print("train: {:,} of {:,} parameters".format(*walk.trainable(model)))

# %% [markdown]
# ## Against the library
#
# `peft` is what you would use at work. The same course model opens in `transformers`; we give both sides the same $A$
# and $B$ by letting them exchange files. First ours writes a folder, and `peft` reads it.

# %%
import warnings

import peft
from transformers import LlamaForCausalLM
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
logging.disable_progress_bar()

torch.manual_seed(0)
for name, p in model.named_parameters():
    # a B that has learned something, so that the comparison says something
    if "lora_B" in name:
        torch.nn.init.normal_(p, std=0.01)

folder = tempfile.mkdtemp()
files.save(model, f"{folder}/ours")
theirs = peft.PeftModel.from_pretrained(
    LlamaForCausalLM.from_pretrained(course_model.MODEL),
    f"{folder}/ours",
    is_trainable=True,
)
compare(model(prompt), theirs(prompt).logits, what="logits, ours in peft", tol=1e-4)

# %% [markdown]
# Then gradients, all 56 of them, and the way back: `peft` writes, and we read. We load its file onto `transformers`' own
# Llama: our code asks only for linears with names, and does not mind whose model they are in.

# %%
pretraining.next_token_loss(model(prompt), prompt).backward()
theirs(prompt, labels=prompt).loss.backward()
mine = torch.cat(
    [
        p.grad.flatten()
        for n, p in sorted(model.named_parameters())
        if p.grad is not None
    ]
)
peers = torch.cat(
    [
        p.grad.flatten()
        for n, p in sorted(theirs.named_parameters())
        if p.grad is not None
    ]
)
compare(mine, peers, what="gradients of every A and B")
compare(
    walk.trainable(model),
    theirs.get_nb_trainable_parameters(),
    what="parameters (trained, all)",
    tol=0,
)

theirs.save_pretrained(f"{folder}/theirs")
returned = files.load(
    LlamaForCausalLM.from_pretrained(course_model.MODEL), f"{folder}/theirs"
)
compare(
    returned(prompt).logits,
    model(prompt),
    what="logits, peft's file in our code on transformers' model",
    tol=1e-4,
)

# %% [markdown]
# Merging: the same function, with nothing left to slow it down. Unmerging gives back the old weights to the bit, which
# subtracting $\Delta W$ would not; our code keeps the old tensor and puts it back.

# %%
before = model(prompt)
lora.merge(model)
compare(model(prompt), before, what="logits, merged against unmerged", tol=1e-4)
lora.unmerge(model)
lora.remove(model)
compare(model(prompt), plain, what="logits after unmerging and removing", tol=0)

# %% [markdown]
# ## The experiment
#
# The course model has read the State of the Union addresses and *Moby-Dick*. It has never seen the Bible. We teach it
# 20 steps of the King James Bible: once with all 28 linears trained in full, and once for each of four ranks. Same
# batches, same order, same number of steps. Embedding and norms stay frozen in all of them, so that we compare the
# linears and nothing else.
#
# Each run has its own learning rate, the best of a search by factors of two: half of it and twice it were both worse. A
# shared rate would flatter one side: LoRA wants about seven times the rate of full fine-tuning, since its $\Delta W$ is a
# product of two small numbers. For the four ranks it is the same rate. That is the work of $\alpha/r$.


# %%
def encode(text):
    return torch.tensor(tokenizer.encode(text).ids)


def loss_on(model, text):
    return pretraining.evaluate(model, text, context=128, windows=16, batch=8)


bible = encode(course_model.corpus("bible")[:400_000])
new = encode(course_model.corpus("bible", "valid")[:60_000])
old = encode(course_model.corpus("addresses", "valid")[:60_000])

LEARNING_RATE = {"full": 3e-3, 1: 2e-2, 2: 2e-2, 4: 2e-2, 8: 2e-2}


def teach(rank, rate=None):
    """The course model after 20 steps of the Bible, in full or through adapters of one
    rank.
    """
    rate = rate or LEARNING_RATE[rank]
    recipe = pretraining.Recipe(
        20, batch=4, context=128, peak_lr=rate, warmup=4, weight_decay=0.0
    )
    torch.manual_seed(0)
    model = course_model.load().requires_grad_(False)
    if rank == "full":
        for layer in walk.find(model, "all-linear").values():
            layer.requires_grad_(True)
    else:
        lora.apply(
            model,
            LoRAConfig(r=rank, alpha=2 * rank, target_modules="all-linear"),
            "bible",
        )
    optimizer = pretraining.make_optimizer(model, recipe)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = pretraining.learning_rate(step, recipe)
        pretraining.training_step(
            model, optimizer, pretraining.sample_batch(bible, recipe, step), recipe.clip
        )
    return model


base = course_model.load()
full = teach("full")

# %% [markdown]
# First, what did full fine-tuning do to the weights? Subtract, and look at the singular values of every $\Delta W$. If a
# change used all its directions alike, the curve would be the grey one: that is a random matrix of the same shape.

# %%
# NBVAL_IGNORE_OUTPUT
linears = walk.find(base, "all-linear")
delta = {
    name: (full.get_submodule(name).weight - layer.weight).detach()
    for name, layer in linears.items()
}
svd = {name: torch.linalg.svd(d, full_matrices=False) for name, d in delta.items()}
noise = [torch.linalg.svdvals(torch.randn_like(d)) for d in delta.values()]


def energy(S, r):
    return (S[:r].square().sum() / S.square().sum()).item()


def mean(values):
    return sum(values) / len(values)


top4, chance = (
    mean([energy(S, 4) for _, S, _ in svd.values()]),
    mean([energy(S, 4) for S in noise]),
)

fig, ax = plt.subplots()
for S, (_, D, _) in zip(noise, svd.values(), strict=True):
    ax.plot(range(1, 65), S[:64] / S.norm(), color="#b8bcc2", linewidth=0.8)
    ax.plot(range(1, 65), D[:64] / D.norm(), color="#0072b2", linewidth=0.8, alpha=0.6)
ax.set(
    xscale="log",
    xlabel="singular value, largest first",
    ylabel="share of the length of ΔW",
)
ax.set_title("28 changes against 28 random matrices")
ax.set_xticks([1, 2, 4, 8, 16, 32, 64], labels=["1", "2", "4", "8", "16", "32", "64"])
ax.minorticks_off()
ax.annotate("fine-tuning", (1.6, 0.42), color="#0072b2")
ax.annotate("random", (1.05, 0.08), color="#6b7078")
figure(
    fig,
    alt=(
        "Singular values of 28 weight changes fall steeply: the first four hold"
        f" {top4:.0%} of the squared length, against {chance:.0%} in a random matrix of"
        " the same shape."
    ),
)
assert top4 > 2 * chance
print(
    f"four directions of up to 128 hold {top4:.0%} of ΔW² on average; in a random"
    f" matrix {chance:.0%}"
)

# %% [markdown]
# The change collapses onto a few directions. It does not collapse onto four: there is a long tail, and part of that
# tail is noise that Adam adds, since it moves every entry by about the same amount however small its gradient. Length is
# not what we pay for, though. Loss is. So cut each $\Delta W$ after its first $r$ directions, put the stump back into
# the model, and ask how much of the improvement survives. Then let LoRA train with the same $r$ from the start.


# %%
ranks = [1, 2, 4, 8]
adapted = {r: teach(r) for r in ranks}


# %%
# NBVAL_IGNORE_OUTPUT
def cut(rank):
    """The base plus the best rank-r part of each full change."""
    model = course_model.load()
    with torch.no_grad():
        for name, layer in walk.find(model, "all-linear").items():
            U, S, Vh = svd[name]
            layer.weight += U[:, :rank] * S[:rank] @ Vh[:rank]
    return model


start, end = (loss_on(m, new) for m in (base, full))
adapted_loss = {r: loss_on(m, new) for r, m in adapted.items()}


def gain(loss):
    return (start - loss) / (start - end)


trained_share = {r: gain(loss) for r, loss in adapted_loss.items()}
cut_share = {r: gain(loss_on(cut(r), new)) for r in ranks}
energy_share = {r: mean([energy(S, r) for _, S, _ in svd.values()]) for r in ranks}

fig, ax = plt.subplots(figsize=(4.8, 3.8))
ax.axhline(1, color="#22262b", linewidth=1)
ax.text(8, 1.02, "full fine-tuning", ha="right", va="bottom")
for share, label, style in [
    (trained_share, "LoRA, trained at rank r: loss", "o-"),
    (cut_share, "full ΔW, cut to rank r: loss", "s-"),
    (energy_share, "full ΔW, cut to rank r: length²", "^--"),
]:
    ax.plot(ranks, [share[r] for r in ranks], style, label=label)
ax.set(xscale="log", xlabel="rank r", ylabel="share of full fine-tuning", ylim=(0, 1.7))
ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
ax.legend(loc="upper left")
ax.set_xticks(ranks, labels=ranks)
ax.minorticks_off()
ax.set_title("What a rank buys")
figure(
    fig,
    alt=(
        "Share of full fine-tuning's gain on the Bible. At rank 4, LoRA reaches"
        f" {trained_share[4]:.0%}, the cut change {cut_share[4]:.0%}."
    ),
)
assert trained_share[4] > 0.5

# %% [markdown]
# Read the three curves from the bottom, at rank 4. It keeps about a third of the squared length of $\Delta W$. The model
# cut to it keeps far more of the gain than that, since the strong directions are the useful ones. And LoRA, which knows
# from the start that it has only four, picks better ones still. So an adapter does not approximate what full training
# would have done; it finds another way, within its means. Even rank 1, which trains one number in 81, does most of it.
#
# What about the price? A model that learns the Bible unlearns the addresses. How much, depends on the learning rate too:
# so here is full fine-tuning once more, at half its best rate.


# %%
# NBVAL_IGNORE_OUTPUT
def distance(model):
    """How far the weights moved: the mean over layers of |ΔW| / |W₀|."""
    lora.merge(model) if lora.adapters(model) else None
    moved = {
        name: walk.base_of(layer).weight
        for name, layer in walk.find(model, "all-linear").items()
    }
    far = mean(
        [
            ((moved[name] - layer.weight).norm() / layer.weight.norm()).item()
            for name, layer in linears.items()
        ]
    )
    lora.unmerge(model) if lora.adapters(model) else None
    return far


gentle = teach("full", LEARNING_RATE["full"] / 2)
runs = {"full": full, "full, rate / 2": gentle} | {
    f"r = {r}": m for r, m in adapted.items()
}
learned = {"full": start - end, "full, rate / 2": start - loss_on(gentle, new)}
learned |= {f"r = {r}": start - loss for r, loss in adapted_loss.items()}
known = loss_on(base, old)
forgot = {name: loss_on(m, old) - known for name, m in runs.items()}
print("run              trained  learned  forgot   moved")
for name, m in runs.items():
    print(
        f"{name:14}{walk.trainable(m)[0]:>10,}{learned[name]:>9.2f}"
        f"{forgot[name]:>8.2f}{distance(m):>8.0%}"
    )

fig, ax = plt.subplots(figsize=(4.8, 3.4))
at = torch.arange(len(runs))
ax.barh(at - 0.2, list(learned.values()), 0.38, color="#0072b2")
ax.barh(at + 0.2, list(forgot.values()), 0.38, color="#d55e00")
ax.text(
    learned["full"] - 0.02,
    -0.2,
    "learned (Bible)",
    color="white",
    ha="right",
    va="center",
)
ax.text(
    forgot["full"] - 0.02,
    0.2,
    "forgot (addresses)",
    color="black",
    ha="right",
    va="center",
)
ax.set_yticks(at, labels=list(runs))
ax.invert_yaxis()
ax.set(xlabel="change of the loss, nats a token")
ax.set_title("What is learned, what is forgotten")
figure(
    fig,
    alt="Bars for six runs: "
    + "; ".join(
        f"{name}: learned {learned[name]:.1f}, forgot {forgot[name]:.1f} nats"
        for name in runs
    )
    + ".",
)
assert max(learned, key=learned.get) == "full" and min(forgot.values()) > 0.2
assert forgot["r = 2"] < forgot["full"] and forgot["full, rate / 2"] < forgot["full"]

# %% [markdown]
# LoRA learned less, as it had to. Did it forget less? Against full fine-tuning at its best rate, up to rank 4, yes; so
# [Biderman et al. 2024](https://arxiv.org/abs/2405.09673 "biderman2024lora") found at 7B, and put it in their title:
# "LoRA Learns Less and Forgets Less". But the second row halves that rate, gives up a sliver of what was learned, and
# forgets less than half as much. Forgetting depends on how hard you push at least as much as on how many numbers you push. So
# measure the old task whenever you tune for a new one, and turn the rate down before you change the method. They also
# found that full fine-tuning makes changes whose rank is 10 to 100 times that of a usual adapter. That is the long tail
# of our first figure, at full size. A low rank is enough to change a model's manner in 20 steps; for a new field and
# billions of tokens, raise it.
#
# And where should the rank go? Sort the changes by the kind of layer.

# %%
# NBVAL_IGNORE_OUTPUT
kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
moved = {
    kind: mean(
        [
            (delta[n].norm() / linears[n].weight.norm()).item()
            for n in delta
            if n.endswith(kind)
        ]
    )
    for kind in kinds
}
held = {
    kind: mean([energy(svd[n][1], 4) for n in delta if n.endswith(kind)])
    for kind in kinds
}

fig, (left, right) = plt.subplots(1, 2, figsize=(4.8, 3.2), sharey=True)
left.barh(kinds, [100 * moved[k] for k in kinds], color="#0072b2")
right.barh(kinds, [100 * held[k] for k in kinds], color="#00805e")
left.invert_yaxis()
left.set(xlabel="% of the weight")
left.set_title("how far it moved")
right.set(xlabel="% of ΔW²")
right.set_title("in 4 directions")
figure(
    fig,
    alt=(
        "Two bar charts over the seven kinds of linear. Left, the length of the change"
        " relative to the weight: "
    )
    + ", ".join(f"{k} {100 * moved[k]:.0f}%" for k in kinds)
    + ". Right, the share of it in four directions: "
    + ", ".join(f"{k} {100 * held[k]:.0f}%" for k in kinds)
    + ".",
)

# %% [markdown]
# Every kind of layer moves, and by about the same share of its length; the attention layers put twice as much of it into
# four directions as those of the MLP. That is the argument for a pair on every linear, at a smaller rank, rather than
# a large one on a few. The paper found the same with the number of trained parameters held fixed at 18 million (its
# table 5): $r = 8$ on $W_q$ alone reached 70.4% on WikiSQL, $r = 4$ on $W_q$ and $W_v$ 73.7%.
#
# With LoRA the old model is never lost: it is still there, under the adapter. Which brings us to what adapters are for.

# %% [markdown]
# ## Play
#
# An adapter is a file of numbers that can be weighed. Multiply its $\Delta W$ by $w$: at 0 you have the old model, at
# 1 the one that was trained, and there is nothing that stops you at 1. Move the slider and read what the model
# writes.

# %%
# NBVAL_IGNORE_OUTPUT
mixed = adapted[8]
WEIGHTS = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0]
opening = torch.tensor([tokenizer.encode("And the people of the land").ids])
written, curve = {}, {}
for w in WEIGHTS:
    files.combine(mixed, {"bible": w}, "mix")
    tokens = generate(mixed, opening, 36, temperature=0.7, top_k=40, seed=3)[0].tolist()
    written[w], curve[w] = (
        " ".join(tokenizer.decode(tokens).split()),
        (loss_on(mixed, new), loss_on(mixed, old)),
    )
    lora.remove(mixed, "mix")
lora.set_adapter(mixed, "bible")


def draw(weight):
    import textwrap

    fig, (ax, page) = plt.subplots(2, 1, figsize=(4.8, 4.6), height_ratios=[1.2, 1])
    for i, name in enumerate(["Bible", "addresses"]):
        ax.plot(WEIGHTS, [curve[w][i] for w in WEIGHTS], label=name)
        ax.plot(weight, curve[weight][i], "o", color=f"C{i}", markersize=10)
    ax.set(xlabel="weight of the Bible adapter", ylabel="loss")
    ax.legend()
    page.axis("off")
    page.text(
        0,
        1,
        textwrap.fill(written[weight], 46),
        va="top",
        family="DejaVu Serif",
        transform=page.transAxes,
    )
    return fig


explore(
    draw,
    title="From senator to prophet",
    alt=lambda weight: (
        f"Weight {weight}: loss {curve[weight][0]:.2f} on the Bible,"
        f" {curve[weight][1]:.2f} on addresses. It writes: {written[weight]}"
    ),
    start={"weight": 1.0},
    weight=WEIGHTS,
)

# %% [markdown]
# One base can carry many adapters at once, and a batch can mix them. Below, three requests travel together: the first
# asks for the plain model, the second for the Bible adapter, the third for half of it. The frozen weights are read
# once for all three; each row adds its own thin path. Merged weights could not do this: they would be three models.

# %%
files.combine(mixed, {"bible": 0.5}, "blend")
batch = prompt.expand(3, -1)
with files.by_row(mixed, [None, "bible", "blend"]):
    together = mixed(batch)
alone = [base(prompt)]
for adapter in ("bible", "blend"):
    lora.set_adapter(mixed, adapter)
    alone.append(mixed(prompt))
compare(
    together,
    torch.cat(alone),
    what="three models in one batch, against each alone",
    tol=1e-4,
)

# %% [markdown]
# ## At scale
#
# The paper's largest model is GPT-3: 96 layers of width 12,288, where every attention matrix is square. So a rank $r$ on
# $n$ matrices per layer trains $96 \cdot n \cdot r \cdot 2 \cdot 12{,}288$ numbers. Let us count what the paper counts.

# %%
d, layers, total = 12_288, 96, 175_255.8e6  # the total is table 4's


def count(n, r):
    return layers * n * r * 2 * d


def verdict(paper, ours):
    return (
        "same"
        if round(ours, 1) == paper
        else "same, cut off"
        if int(10 * ours) / 10 == paper
        else "no"
    )


for where, what, n, r, paper in [
    ("table 4", "r_q = r_v = 1", 2, 1, 4.7),
    ("table 4", "r_q = r_v = 8", 2, 8, 37.7),
    ("table 15", "r_q = r_v = 4", 2, 4, 18.8),
    ("table 15", "r_q = r_k = r_v = r_o = 4", 4, 4, 37.7),
    ("section D.4", "r_q = r_k = r_v = r_o = 2", 4, 2, 37.7),
    ("table 15", "r_q = r_v = 64", 2, 64, 301.9),
]:
    print(
        f"{where:12} {what:26} paper {paper:>6} M   ours {count(n, r) / 1e6:>7.2f} M  "
        f" {verdict(paper, count(n, r) / 1e6)}"
    )
small, large = 2 * count(2, 4), 2 * total
print(
    f"section 4.2  checkpoint at r = 4:    paper 35 MB, ours {small / 1e6:.1f} MB ="
    f" {small / 2**20:.1f} MiB; the model: paper 350 GB, ours {large / 1e9:.1f} GB"
)
print(
    "section 4.2  memory to train LoRA:   paper 350 GB, ours"
    f" {(large + 16 * count(2, 4)) / 1e9:.0f} GB without activations"
)
print(
    f"section 4.2  memory to train fully:  paper 1.2 TB, ours {16 * total / 1e12:.1f}"
    " TB by 16 bytes per parameter"
)

# %% [markdown]
# Three things deserve a word. Table 15 cuts 18.87 and 301.99 off after the first digit instead of rounding. Section D.4
# says that $r = 2$ on four matrices trains 37.7 M, table 15 says that $r = 4$ does; counting settles it, and the table is
# right. And the 1.2 TB for full fine-tuning is 6.8 bytes per parameter. That is less than Adam needs in any common setting,
# and the paper does not say how it was counted. So take the ratio in the abstract, a third of the memory, as theirs, and
# the 16 bytes as ours.
#
# The number that `peft` prints for Llama 7B, `4,194,304 || all params: 6,742,609,920 || 0.0622%`, is the one you
# predicted above.
#
# To run this on a GPU, or on eight, with any Llama-shaped checkpoint and any text file:
#
# ```
# python -m llmlab.peft.examples.lora_text --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# torchrun --nproc-per-node 8 -m llmlab.peft.examples.lora_text --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# ```
#
# With eight GPUs each holds the frozen model and reads its own batches; only the gradients of $A$ and $B$ are averaged.
# The cell counts what travels.

# %%
print(
    f"per step and GPU, full: {2 * parameters(llama_7b) / 1e9:.1f} GB of gradients;"
    f" LoRA at rank 8: {2 * trained / 1e6:.1f} MB"
)

# %% [markdown]
# ## Takeaways
#
# - Rank 8 on the query and value projections of a 7B model trains 0.06% of its parameters, and brings training from 108 GB
#   to under 14 GB before activations; the adapter is a file of 8 MB.
# - It works because fine-tuning changes a weight along few directions: four of up to 128 hold several times what
#   chance would give them, and LoRA, which trains inside such a budget from the start, keeps most of the gain at rank 4.
# - $B = 0$ makes step 0 the pretrained model, $\alpha/r$ keeps the learning rate, and merging makes inference cost
#   exactly 0 extra; unmerged, one base serves any number of adapters in one batch.
#
# Now write it yourself: [Exercises](../../work/04-peft/05-lora.ipynb), four of them, 10 points.
#
# References: the paper, [Hu et al. 2021](https://arxiv.org/abs/2106.09685 "hu2021lora"); the scale $\alpha/\sqrt{r}$ for large
# ranks, [Kalajdzievski 2023](https://arxiv.org/abs/2312.03732 "kalajdzievski2023rslora"); thousands of adapters on one
# server, [Sheng et al. 2023](https://arxiv.org/abs/2311.03285 "sheng2023slora"); what LoRA forgets,
# [Biderman et al. 2024](https://arxiv.org/abs/2405.09673 "biderman2024lora").
