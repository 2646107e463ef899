# %% [markdown]
# # LoRAPrune
#
# Which heads and channels does a model need least? The gradients of its weights would say, but for a large model they fill a second graphics card. Whoever trains LoRA has the gradients of two
# small matrices anyway. This lesson shows how much of the large gradient can be read off them, and what cannot. Then it cuts channels of a real model by either gradient, and those of a small one while LoRA learns, and compares the damage. At the end
# you own the estimate, the score, the schedule and the mask.

# %% tags=["hide-input"]
import csv
import math
import warnings
from functools import cache

import torch

from llmlab.checks.compression.loraprune import check
from llmlab.compression import calibration, loraprune
from llmlab.compression.loraprune import LoRAPruneConfig
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
from llmlab.models import accounting, course_model, real_model
from llmlab.models.checkpoint import config_to_hf
from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import Llama
from llmlab.models.presets import preset
from llmlab.peft import lora

# %% [markdown]
# ## What it costs
#
# [LLM-Pruner](10-llm-pruner.ipynb) multiplies each weight with its gradient. So each weight needs a gradient in memory, and to prune step by step while training, at every step.

# %%
llama = preset("llama-7b")
weights = accounting.weight_bytes(llama) / 1e9
full = loraprune.gradient_bytes(llama) / 1e9
small = loraprune.gradient_bytes(llama, r=8) / 1e9
card = 24
for name, size in {"none": 0.0, "of all linears": full, "of LoRA's": small}.items():
    fits = "fits" if weights + size < card else "does not fit"
    print(
        f"LLaMA-7B in 16 bits and gradients {name:15}{weights + size:5.1f} GB, {fits}"
    )
print(f"in {card} GB; LoRA's, of rank 8, are {full / small:.0f} times smaller")

# %% [markdown]
# ## Predict
#
# The real model, SmolLM2-135M-Instruct. In 26 of its 30 layers a fifth of the 1,536 channels of the MLP shall go: a row of `gate_proj`, a row of `up_proj` and a column of `down_proj` each.
# Full gradients choose a fifth. LoRA's, of rank 8 and before its first step, choose a fifth from the same 1,024 tokens of State of the Union addresses. Two fifths drawn by chance
# would have 20% in common.

# %%
common_guess = predict("How much of the two fifths is the same?", unit="%")
growth_guess = predict(
    "By what factor does perplexity grow once LoRA's fifth is cut?", unit="times"
)

# %% [markdown]
# ## By hand
#
# A weight $W$, its gradient $G$, which nobody computes, and LoRA of rank 1, $W + BA$, with $A = (1, 2)$ and $B = 0$ at the start. The gradient of $B$ is $\partial B = G A^\top$, and
# what LoRA knows of $G$ is $\hat g = \partial B\,A$.
#
# $$W = \begin{pmatrix} 1 & 1 \\ 1 & 2 \end{pmatrix} \quad G = \begin{pmatrix} 3 & 1 \\ 1 & -1 \end{pmatrix} \quad \partial B = \begin{pmatrix} 5 \\ -1 \end{pmatrix} \quad \hat g = \partial B\,A =
# \begin{pmatrix} 5 & 10 \\ -1 & -2 \end{pmatrix}$$
#
# The score of a row or column is the sum of (gradient · weight)² over it.
#
# | | row 1 | row 2 | column 1 | column 2 |
# |---|---|---|---|---|
# | with $G$ | 9 + 1 = 10 | 1 + 4 = 5 | 9 + 1 = 10 | 1 + 4 = 5 |
# | with $\hat g$ | 25 + 100 = 125 | 1 + 16 = 17 | 25 + 1 = 26 | 100 + 16 = 116 |
#
# Of the rows both let the second go. Of the columns $G$ lets the second go, and $\hat g$ the first, only because 1 is smaller than 2 in $A$.

# %%
W, G = torch.tensor([[1.0, 1], [1, 2]]), torch.tensor([[3.0, 1], [1, -1]])
A, B = torch.tensor([[1.0, 2]]), torch.zeros(2, 1)
estimate = loraprune.estimated_gradient(A, B, grad_A=B.T @ G, grad_B=G @ A.T)
for name, gradient in {"G": G, "estimate": estimate}.items():
    scores = loraprune.weight_importance(W, gradient)
    print(f"{name:9} rows {scores.sum(1).tolist()}  columns {scores.sum(0).tolist()}")

# %% [markdown]
# ## The idea
#
# Was that bad luck? Here is the real model after it has read 256 tokens, with both gradients at once. Each dot is a channel of layer 15: left its row of `gate_proj`, right its column of
# `down_proj`. Both axes are scores on a logarithmic scale.

# %% tags=["hide-input"]
model = real_model.load()
layers = [f"model.layers.{i}.mlp" for i in range(3, 29, 2)]
encode = real_model.load_tokenizer().encode
text = torch.tensor(encode(course_model.corpus("addresses", "train")[:60_000]).ids)
[batch] = calibration.sample(text, length=256, count=1, seed=0)

MLP = ("gate_proj", "up_proj", "down_proj")
config = lora.LoRAConfig(r=8, alpha=16, target_modules=MLP)
lora.apply(model, config, generator=torch.Generator().manual_seed(0))
adapted = loraprune.adapters(model)
for name, adapter in adapted.items():
    if name.rpartition(".")[0] in layers:
        adapter.base.weight.requires_grad_(True)  # only to compare with
next_token_loss(model(batch), batch).backward()

CRITERIA = {
    "LoRA": LoRAPruneConfig(),
    "full": LoRAPruneConfig(criterion="full"),
    "size": LoRAPruneConfig(criterion="magnitude"),
}


@cache
def lines(linear: str, criterion: str):
    """The score of each row of a gate or up, of each column of a down."""
    adapter = adapted[linear]
    gradient = adapter.gradient(linear, CRITERIA[criterion])
    scores = loraprune.weight_importance(adapter.weight, gradient)
    return scores.detach().sum(0 if "down" in linear else 1)


SHOWN = "model.layers.15.mlp"
fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.7), layout="constrained")
for ax, part in zip(axes, ("gate_proj", "down_proj"), strict=True):
    pair = [lines(f"{SHOWN}.{part}", criterion) for criterion in ("full", "LoRA")]
    ax.loglog(*pair, ".", color=palette.blue, markersize=2, alpha=0.5)
    ax.set_title("rows of gate" if part == "gate_proj" else "columns of down")
    ax.set(xlabel="by full gradients", xticks=[], yticks=[])
    ax.minorticks_off()
axes[0].set_ylabel("by LoRA's")
figure(
    fig,
    alt=(
        "Two clouds of 1,536 dots, score by full gradients to the right and by LoRA's"
        " gradients upwards. Rows of gate lie along a rising line. Columns of down form"
        " a round cloud without direction."
    ),
)

# %% [markdown]
# **LoRAPrune** ([Zhang et al. 2023](https://arxiv.org/abs/2305.18403 "zhang2023loraprune")) asks what a step of SGD at rate $\eta$ would do to the weight $W = W_0 + s B A$, with $W_0$ frozen
# and LoRA's scaling $s$. $A' = A - \eta\,\partial A$ and $B' = B - \eta\,\partial B$, so that the step takes $s (B A - B' A') = \eta\,\hat g$ off $W$:
#
# $$\hat g = s \left(\partial B\, A + B\, \partial A - \eta\, \partial B\, \partial A\right)$$
#
# That is exact. What has it to do with $G$? By the chain rule $\partial B = s\,G A^\top$ and $\partial A = s\,B^\top G$, and so
#
# $$\hat g = s^2 \left(G\,A^\top A + B B^\top G\right) - \eta\,s^3\, G A^\top B^\top G$$
#
# At the start, with $B = 0$, only $s^2\,G A^\top A$ is left. Each row of $G$ is projected on the $r$ directions in $A$ and back. On average over uniform draws of $A$,
#
# $$\mathbb E\, \hat g_{ij}^2 \;\propto\; \lVert G_i \rVert^2 + \left(r - \tfrac15\right) G_{ij}^2$$
#
# The first term is the squared length of row $i$: random projections keep it. The second is the weight's own gradient, and it is small as long as $r$ is small beside the row's
# 576 or 1,536 entries. So a row gets what it should. A column gets the rows' lengths, the same for each column. Columns come in by $B B^\top G$ only, and $B$ grows slowly.
#
# The score $\hat G$ of a unit, a channel or a key/value head, sums $(\hat g_{ij} W_{ij})^2$ over all its weights. One batch is noisy, so scores pass through a **moving average**, $\bar G \leftarrow \lambda \bar G + (1 -
# \lambda) \hat G$. While LoRA trains, the outputs of the lowest units are masked to 0, more and more of them, by a cubic schedule (drawn below). At the end LoRA is merged, and the units are cut.
#
# ## Your turn
#
# The estimate $\hat g$, of shape (d, k), from `A` and `grad_A` of shape (r, k), and `B` and `grad_B` of shape (d, r).


# %%
def estimated_gradient(A, B, grad_A, grad_B, scaling: float, lr: float):
    """ĝ: what a step of SGD with rate lr takes off scaling · B A, over lr."""
    raise NotImplementedError("three lines of yours")


your_turn(check.estimated_gradient, estimated_gradient)


# %% tags=["hide-cell"]
# One way to write it: the step itself.
def one_answer(A, B, grad_A, grad_B, scaling, lr):
    before = B @ A
    after = (B - lr * grad_B) @ (A - lr * grad_A)
    return scaling * (before - after) / lr


your_turn(check.estimated_gradient, one_answer)

# %% [markdown]
# ## The code
#
# LoRA may be ours or that of the `peft` library: both are read by the names of their parts. Masks are hooks on the outputs of linears, so that no weight changes until the cut. What belongs together,
# such as a key/value head and its three query heads, comes from `dependencies.groups`, as in the last lesson.
#
# | value | shape | holds |
# |---|---|---|
# | `A`, `B` | (r, k), (d, r) | LoRA's factors; their gradients are all that is kept |
# | `gradient` | (d, k) | $\hat g$, of one linear at a time |
# | `average` | (units,) | $\bar G$ of one group |
# | `kept` | (units,) | False where a unit is masked |

# %% tags=["hide-output"]
show(
    loraprune.estimated_gradient,
    loraprune.importance,
    loraprune.share_pruned,
    loraprune.prune_to,
    loraprune.Pruner.step,
)

# %% [markdown]
# ## Against autograd, a step of SGD and peft
#
# The estimate is compared with a real step of SGD. With an orthogonal $A$ of full rank nothing is projected away, and $\hat g$ *is* the gradient. A small model shows the rest: `peft` gives the
# same scores, and a masked model computes what the cut one does. The folded table says where the authors' code differs from their paper.

# %%
import peft
from transformers import LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore", category=FutureWarning)
torch.manual_seed(0)
W, A, B = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 3)
A, B = A.requires_grad_(True), B.requires_grad_(True)
loss = (torch.randn(9, 7) @ (W + 0.5 * B @ A).T).square().mean()
loss.backward()
found = loraprune.estimated_gradient(
    A.detach(), B.detach(), A.grad, B.grad, 0.5, lr=0.1
)
before = (0.5 * B @ A).detach()
torch.optim.SGD([A, B], lr=0.1).step()
compare(found, (before - (0.5 * B @ A).detach()) / 0.1, "the estimate, a step of SGD")
G, Q = torch.randn(5, 7), torch.linalg.qr(torch.randn(7, 7)).Q
zero = torch.zeros(5, 7)
found = loraprune.estimated_gradient(Q, zero, zero.T @ G, G @ Q.T)
compare(found, G, "the estimate, the gradient (A orthogonal, r = k)")

tiny = Llama(preset("tiny"))
hf = LlamaForCausalLM(LlamaConfig(**config_to_hf(tiny.config)))
hf.load_state_dict(tiny.state_dict())
tiny_groups = loraprune.prunable(tiny, first=0, last=0)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
lora.apply(tiny, lora.LoRAConfig(r=4, alpha=8, target_modules=ALL))
theirs = peft.get_peft_model(
    hf, peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL))
)
base = theirs.get_base_model()
with torch.no_grad():  # the same A and B in both
    ours = loraprune.adapters(tiny)
    for name, adapter in loraprune.adapters(base).items():
        ours[name].B.normal_(std=0.1)
        adapter.A.copy_(ours[name].A)
        adapter.B.copy_(ours[name].B)
half = LoRAPruneConfig(0.5, steps=1, warmup=0, cooldown=1)  # at once
tokens = torch.arange(24).reshape(2, 12)
pruners = [loraprune.Pruner(each, tiny_groups, half) for each in (tiny, base)]
next_token_loss(tiny(tokens), tokens).backward()
next_token_loss(theirs(tokens).logits, tokens).backward()
for pruner in pruners:
    pruner.step()
name = "model.layers.1.self_attn"
pair = [pruner.average[name] / pruners[0].average[name] for pruner in pruners]
compare(*pair, "scores of heads, ours and with peft", tol=1e-3)
masked = tiny(tokens)
pruners[0].remove()
cut = loraprune.finish(tiny, tiny_groups, pruners[0].kept)
compare(cut(tokens), masked, "the masked model, the cut one")
shape = tuple(cut.model.layers[0].mlp.down_proj.weight.shape)
print(f"down_proj is {shape} now, and LoRA is gone")

# %% tags=["hide-cell"]
# Paper, authors' code (their commit 4da5272), ours.
rows = [
    ("", "paper", "authors' code", "ours"),
    ("score of a weight", "(ĝ W)²", "|ĝ W|", "(ĝ W)²"),
    ("scores of a linear", "added", "to length 1, added", "added"),
    ("s in ĝ", "no", "no", "yes"),
    ("η in ĝ", "1", "1", "1"),
    ("decay λ", "–", "0.9", "0.9"),
    ("layers left whole", "–", "first tenth, last", "first tenth, last"),
    ("half of 32 heads", "16", "15*", "16"),
    ("grouped-query attention", "–", "cuts parts of heads*", "whole heads"),
]
for row in rows:
    print(f"{row[0]:25}" + "".join(f"{cell:>21}" for cell in row[1:]))
print("* run: its last pruning comes before the final share, and the count is cut off;")
print("  its k and v lose a slice for each query head, also where 4 share a head")

# %% [markdown]
# ## The experiment
#
# The same batch, and every second of the 26 layers that may be pruned (the first tenth and the last are left whole, as in the authors' code). How well does each way rank the channels? Rank
# correlation is 1 where two rank alike, and 0 where one says nothing of the other.


# %% tags=["numbers-within-5%"]
def mean_correlation(part: str, criterion: str) -> float:
    """With full gradients, over the layers."""
    found = [
        loraprune.rank_correlation(
            lines(f"{name}.{part}", criterion), lines(f"{name}.{part}", "full")
        )
        for name in layers
    ]
    return sum(found) / len(found)


print("rank correlation with full gradients")
for part in MLP:
    kind = "columns" if part == "down_proj" else "rows"
    values = [round(mean_correlation(part, c), 1) + 0.0 for c in ("LoRA", "size")]
    print(f"{kind} of {part}".ljust(22), f"LoRA {values[0]:4}   size {values[1]:4}")


def of_channels(name: str, criterion: str):
    """Ĝ of each channel of a layer."""
    return sum(lines(f"{name}.{part}", criterion) for part in MLP)


whole = {
    name: loraprune.rank_correlation(
        of_channels(name, "LoRA"), of_channels(name, "full")
    )
    for name in layers
}
lowest = min(whole, key=whole.get)
print(
    "whole channels, LoRA, every third:",
    ", ".join(f"{whole[n]:.1f}" for n in layers[::3]),
)
share = lines(f"{lowest}.down_proj", "full").sum() / of_channels(lowest, "full").sum()
print(f"lowest in {lowest}: {whole[lowest]:.1f}; its columns hold {share:.0%}")
print("of the score by full gradients")

# %% [markdown]
# As the formula says, LoRA ranks rows well, and columns not at all. And the size of the weights, which costs no gradient, says nothing about what full gradients say.
#
# A channel has two rows and a column, so LoRA's score is right in two of its three parts. Does that suffice? `scripts/loraprune_sweep.py` cut the model for real, in all 26 layers: channels scored on 1,024 tokens, nothing trained, judged on 1,024
# tokens of held-out addresses. Each of three draws has its own text and its own $A$. "Rows only" leaves the columns out of LoRA's score.

# %% tags=["hide-output"]
with loraprune.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def column(name: str, criterion: str, when: str = "at once", share: str = "0.2"):
    """One value for each draw."""
    kind = (criterion, when, share)
    found = [r for r in runs if (r["criterion"], r["when"], r["share"]) == kind]
    return [float(run[name]) for run in sorted(found, key=lambda run: run["seed"])]


def mean(values) -> float:
    return sum(values) / len(values)


common_guess.settle(100 * mean(column("overlap", "lora")), digits=2)
factor = mean([math.exp(grown) for grown in column("grown", "lora")])
growth_guess.settle(factor, digits=2)

# %% tags=["hide-input"]
NAMES = {
    "full": "full gradients",
    "lora": "LoRA's",
    "lora rows": "LoRA's, rows only",
    "magnitude": "size of the weights",
    "random": "chance",
}
COLORS = {"lora": palette.blue, "lora rows": palette.blue}
fig, ax = plt.subplots(figsize=(4.8, 2.9), layout="constrained")
print("a fifth cut, beside full gradients; growth of perplexity in each draw")
print(f"{'':20}{'rank':>5}{'same':>6}   growth")
for i, (criterion, name) in enumerate(NAMES.items()):
    color = COLORS.get(criterion, palette.vermillion)
    for share, face in (("0.1", "none"), ("0.2", color)):
        growth = [math.exp(g) for g in column("grown", criterion, share=share)]
        style = {
            "color": color,
            "markerfacecolor": face,
            "label": f"{float(share):.0%}",
        }
        ax.plot(growth, [i] * len(growth), "o", **style)
    if not i:
        ax.legend(loc="upper right", title="cut")
    growth = "  ".join(f"{math.exp(g):.2f}" for g in column("grown", criterion))
    correlation = mean(column("correlation", criterion))
    share = mean(column("overlap", criterion))
    print(f"{name:20}{abs(correlation):5.2f}{share:6.0%}   × {growth}")
for criterion in ("full", "lora"):
    growth = "  ".join(
        f"{math.exp(g):.2f}" for g in column("grown", criterion, "no average")
    )
    correlation = mean(column("correlation", criterion, "no average"))
    share = mean(column("overlap", criterion, "no average"))
    name = f"{NAMES[criterion]}*"
    print(f"{name:20}{correlation:5.2f}{share:6.0%}   × {growth}")
print("* from one batch of 256 tokens instead of the sum over four")
ax.set_yticks(range(len(NAMES)), list(NAMES.values()))
ax.set(xscale="log", xlabel="growth of perplexity, times", ylim=(4.6, -0.6))
ax.set_xticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
ax.minorticks_off()
ax.set_xlim(0.95, 20)
figure(
    fig,
    alt=(
        "Growth of perplexity when a tenth or a fifth of the channels is cut. Full"
        " gradients lose least, LoRA's about twice as much in logarithm, chance and the"
        " size of the weights far more."
    ),
)
random, ours, best = (mean(column("grown", c)) for c in ("random", "lora", "full"))
each = zip(column("grown", "lora"), column("grown", "full"), strict=True)
times = "  ".join(f"{mine / its:.1f}" for mine, its in each)
print(f"log of the growth, LoRA's over full gradients', each draw: {times}")
saved = (random - ours) / (random - best)
print(f"in logs LoRA's save {saved:.0%} of what full gradients save over chance")

# %% [markdown]
# LoRA's gradients do most of what full gradients do, and not all of it. They agree with full gradients about as well as full gradients of a quarter of the text do (the line with a star). But the damage
# is another matter: in each draw it is about twice as large, in the logarithm of perplexity, and full gradients of little text lose hardly more than those of all. So it is not how many channels are chosen otherwise, but which. LoRA
# overlooks those that matter by their *column*. In the layer where its rank correlation is lowest, most of the score is in the columns, as printed above.
#
# Rows only raise the agreement. That does not lower the damage beyond the spread of the draws. More batches raise the agreement, too: a single one leaves LoRA's score much noisier than a full one.
# That is why the scores are averaged. Here as well the damage moves less than the agreement does.
#
# Chance is far worse than either, and the size of the weights is worse than chance: channels with small weights are not those that matter little. (These linears were stored in 4 bits once; they are floats here.)
#
# ## Prune while LoRA learns
#
# So far nothing was trained. LoRA of rank 8 now trains for 100 steps on the **course model**, which is small enough to be trained many times. Two fifths of its channels go: all after the first batch, more and
# more by the cubic, or all after the last. The figure shows the plans. The table has the growth of perplexity in each of three draws, beside LoRA that trained as long and cut nothing; each draw has other text and another $A$.

# %% tags=["hide-input"]
PLANS = {
    "at the start": ((0.0, 1.0), "--"),
    "progressive": ((0.1, 0.5), "-"),
    "at the end": ((1.0, 0.0), ":"),
}
fig, ax = plt.subplots(figsize=(4.8, 2.3), layout="constrained")
for when, ((warmup, cooldown), style) in PLANS.items():
    shares = [
        100 * loraprune.share_pruned(step, 100, warmup, cooldown, 0.4)
        for step in range(1, 101)
    ]
    ax.plot(range(1, 101), shares, style, label=when, color=palette.blue)
ax.set(xlabel="step", ylabel="channels gone, %")
ax.legend(loc="center")
figure(
    fig,
    alt=(
        "The share of channels that is gone, by step. At the start: 40 percent at once."
        " Progressive: a curve that rises fast from step 10 and reaches 40 at step 50."
        " At the end: 0 until the last step."
    ),
)

uncut = column("grown", "lora", "uncut", share="0")


def beside_uncut(criterion: str, when: str) -> list[float]:
    """The growth of perplexity, a factor for each draw."""
    found = zip(column("grown", criterion, when, share="0.4"), uncut, strict=True)
    return [math.exp(grown - without) for grown, without in found]


for criterion, when in (
    ("lora", "at the start"),
    ("lora", "progressive"),
    ("lora", "at the end"),
    ("full", "progressive"),
    ("magnitude", "progressive"),
):
    factors = "  ".join(f"{factor:.2f}" for factor in beside_uncut(criterion, when))
    print(f"{NAMES[criterion]:20}{when:13} × {factors}")

# %% [markdown]
# Cut at the end, nothing mends the damage. Cut early, LoRA mends most of it. The progressive plan beats the cut at the start in each draw, but by no more than the draws differ among
# themselves: take it as a hint, and as a convenience, since nobody has to score before training. Which score is used still shows after the training. Full gradients stay ahead of LoRA's in each draw, and LoRA's ahead
# of the size of the weights.
#
# ## Play
#
# How much rank do columns need? The same layer 15 and the same gradient $G$, LoRA at its start with a rank $r$ of your choice. The axes are ranks: 0 is the lowest score of the 1,536, and dots on the
# diagonal are ranked alike.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
RANKS = [1, 4, 16, 64, 256, 512]
SIDES = {"rows of gate": ("gate_proj", 1), "columns of down": ("down_proj", 0)}
LIMIT = 0.35
shown = {}
for side, (part, axis) in SIDES.items():
    adapter = adapted[f"{SHOWN}.{part}"]
    G, W = adapter.base.weight.grad, adapter.base.weight.detach()
    right = loraprune.weight_importance(W, G).sum(axis)
    for r in RANKS:
        draws = []
        for seed in range(2):
            random = torch.Generator().manual_seed(seed)
            A = torch.rand(r, W.shape[1], generator=random) * 2 - 1
            scores = loraprune.weight_importance(W, G @ A.T @ A).sum(axis)
            draws.append(loraprune.rank_correlation(scores, right))
        pair = [each.argsort().argsort() for each in (right, scores)]
        shown[side, r] = mean(draws), pair


def draw(r: int):
    fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.7), layout="constrained")
    for ax, side in zip(axes, SIDES, strict=True):
        value, pair = shown[side, r]
        ax.plot(*pair, ".", color=palette.blue, markersize=2, alpha=0.5)
        ax.set_title(f"{side}\n{value:.2f}", fontsize=10)
        ax.set(xlabel="by full gradients", xticks=[0, 1536], yticks=[])
    axes[0].set_ylabel("by LoRA's")
    return fig


def missing(r: int) -> str:
    value = shown["columns of down", r][0]
    if value < LIMIT:
        return f"the columns' rank correlation is {value:.2f}."
    lower = [s for s in RANKS if s < r and shown["columns of down", s][0] >= LIMIT]
    return "a lower rank does, too." if lower else ""


explore(
    draw,
    alt=lambda r: (
        f"Rank {r}. Rank correlation with full gradients: "
        + ", ".join(f"{side} {shown[side, r][0]:.2f}" for side in SIDES)
    ),
    title="What LoRA's gradients see",
    challenge="Find the lowest rank whose columns reach a rank correlation of 0.35.",
    missing=missing,
    start={"r": 4},
    r=RANKS,
)

# %% [markdown]
# Rows are ranked well by a rank of 16, and not much better by more. Columns need a rank that is no small part of the 1,536 entries of a row, as $(r - \frac15)\, G_{ij}^2$ must stand up to $\lVert G_i \rVert^2$. That is no longer low rank.
#
# ## At scale
#
# For LLaMA-7B the authors report the memory on the GPU with the gradients of all weights and with LoRA's, which is 52.6% less by their abstract, and the perplexity on WikiText-2 when half is pruned ([Zhang et al.
# 2023](https://arxiv.org/abs/2305.18403 "zhang2023loraprune"), tables 2 and 4). We count what the gradients take.

# %% tags=["hide-input"]
published = {"full": 38.6, "LoRA": 18.3, "LoRA, weights in 8 bits": 13.8}
for name, size in published.items():
    less = 1 - size / published["full"]
    print(f"{name:24}{size:5.1f} GB, {less:.1%} less")
difference = published["full"] - published["LoRA"]
print(f"\ndifference, published: {difference:.1f} GB")
for bits in (16, 32):
    counted = loraprune.gradient_bytes(llama, size=bits // 8) / 1e9
    lora_too = loraprune.gradient_bytes(llama, r=8, size=bits // 8) / 1e9
    print(f"counted, gradients of {bits} bits less LoRA's: {counted - lora_too:.1f} GB")
print("\nhalf of LLaMA-7B pruned, then perplexity on WikiText-2 (published)")
print("LLM-Pruner 16.41   LoRAPrune 11.60   LoRAPrune, weights in 8 bits 11.65")

# %% [markdown]
# What they measured lies between the counts for 16 and for 32 bits; the paper does not say in which the gradients were. With the authors' code, on a GPU:
#
# ```bash
# git clone https://github.com/aim-uofa/LoRAPrune && cd LoRAPrune
# python prune.py --base_model huggyllama/llama-7b --ratio 0.5 \
#     --data_path MBZUAI/LaMini-instruction --output_dir pruned \
#     --lora_r 8 --lora_alpha 16 --prune_metric lora --prune_freq 10
# ```
#
# Ours, for any Llama with LoRA on it: `loraprune.apply(model, batches, LoRAPruneConfig(0.5), groups, optimizer)`, with `groups = loraprune.prunable(model)`, found before LoRA was put on.
#
# ## What to keep
#
# ```python
# g = s * (grad_B @ A + B @ grad_A - grad_B @ grad_A)    # η = 1; of one linear, then gone
# scores = (g * (W0 + s * B @ A)).square()               # (d, k)
# unit = scores.sum(1)                                   # rows; columns: sum(0)
# average = 0.9 * average + 0.1 * unit
# z = (x @ W0.T + s * (x @ A.T @ B.T)) * mask            # on both parts
# ```
#
# **Use it** when you fine-tune with LoRA anyway and the gradients of all weights do not fit: heads and channels go, the rest stays an ordinary, smaller model. **Do not** where full gradients
# fit: they cut better. Nor without training afterwards, nor to score the columns of a linear alone.
#
# <details><summary>Why does a rank of 8 rank rows of 576 entries?</summary>
#
# A row's score needs the length of its gradient, not each entry. Projections on a few random directions keep lengths; the error falls with the root of the rank.
#
# </details>
#
# <details><summary>Why not columns?</summary>
#
# Before the first step ĝ is G AᵀA: each entry of a row is a mixture of all the row's entries. Columns come in by B, which is 0 at first.
#
# </details>
#
# <details><summary>Why must the mask be on both parts?</summary>
#
# LoRA is merged at the end. If it still wrote to a masked output, the merged row would not be 0, and cutting it would change the model.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/11-loraprune.ipynb).
#
# Further reading: [Zhu & Gupta 2017](https://arxiv.org/abs/1710.01878 "zhu2017prune") prune step by step with the cubic schedule, and [Hu et al. 2021](https://arxiv.org/abs/2106.09685 "hu2021lora") is
# LoRA itself.
