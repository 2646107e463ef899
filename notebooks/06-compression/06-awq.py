# %% [markdown]
# # AWQ
#
# A weight is rounded. How much does that hurt? It depends on what the weight is multiplied by. A few input channels of a language model are many times
# larger than the rest, and the weights that read them do most of the damage. AWQ finds them by looking at the inputs, and scales them up before rounding, so that they lose less.
# Nothing is computed more, and nothing is stored more. At the end you own the search for the scales.

# %% tags=["hide-input"]
import csv
import math
from copy import deepcopy

import torch

from llmlab.checks.compression.awq import check
from llmlab.compression import awq, calibration
from llmlab.compression import quantization_basics as qb
from llmlab.compression.awq import AWQConfig
from llmlab.compression.quantization_basics import QuantConfig
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
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# A chat reads every weight once for each token that it writes. So fewer bits are less memory, and less waiting. Say that 4 bits are not quite good
# enough, and that you keep one column in a hundred in 16 bits:

# %%
weights = accounting.parameters(preset("llama-2-70b"))
four_bits = QuantConfig(4, group_size=64)
for what, bits in {
    "16 bits": 16,
    "4 bits in groups of 64": qb.bits_per_weight(four_bits),
    "the same, 1% in 16 bits": awq.bits_with_protected(four_bits, 0.01),
}.items():
    size = weights * bits / 8 / 1e9
    print(f"Llama 2 70B, {what:24} {bits:5.2f} per weight, {size:5.1f} GB")

# %% [markdown]
# One gigabyte is little. But a kernel that finds 16-bit columns among 4-bit ones is slow and hard to write. AWQ wants the effect without the columns.
#
# ## Predict
#
# One linear of the real model, SmolLM2-135M-Instruct: the `q_proj` of layer 15, with 576 input channels. It is rounded to 4 bits. The *output error* is what this changes
# in its outputs, $\lVert WX - \hat WX \rVert^2 / \lVert WX \rVert^2$. Now the six columns with the largest inputs stay as they are, 1% of all.
# Then the whole model, without any column kept: AWQ's scales alone. The text that judges is one that AWQ did not see.

# %%
layer_guess = predict(
    "How much of the layer's output error is left when six columns stay?", unit="%"
)
model_guess = predict(
    "Whole model in 4 bits: how much of the growth of its loss do AWQ's scales undo?",
    unit="%",
)

# %% [markdown]
# ## By hand
#
# Two weights that share a step, 0.2 and 0.9, and codes −3 … 3. The step is $0.9 / 3 = 0.3$. The inputs are 10 and 2, so the first channel is the salient one, although its
# weight is small. The right output is $0.2 \cdot 10 + 0.9 \cdot 2 = 3.8$. Multiply the first weight by $s$, round, and divide it by $s$:
#
# | $s$ | scaled | step | rounded, by $s$ | output | error |
# |---|---|---|---|---|---|
# | 1 | 0.2, 0.9 | 0.3 | 0.3, 0.9 | 4.8 | 1.0 |
# | 2 | 0.4, 0.9 | 0.3 | 0.15, 0.9 | 3.3 | −0.5 |
# | 4 | 0.8, 0.9 | 0.3 | 0.225, 0.9 | 4.05 | 0.25 |
# | 8 | 1.6, 0.9 | 0.533 | 0.2, 1.067 | 4.13 | 0.33 |
#
# The error of the first weight halves each time $s$ doubles. With $s = 8$ it is the largest of its group: the step grows, and now its neighbour pays.

# %%
w = torch.tensor([[0.2, 0.9]])
x = torch.tensor([10.0, 2.0])
three_bits = QuantConfig(3, per="row", scale_dtype=torch.float32)
for s in (1.0, 2.0, 4.0, 8.0):
    w_hat = awq.scaled_nearest(w, torch.tensor([s, 1.0]), three_bits)
    print(f"s = {s:.0f}   output {(w_hat @ x).item():.2f}, 3.80 is right")

# %% [markdown]
# ## The idea
#
# First look at that `q_proj`. The model reads 512 tokens of State of the Union addresses. Above: the mean $|x|$ of each channel. Below: the error that each
# channel makes in the outputs after rounding, $\lVert W_{:j} - \hat W_{:j} \rVert^2 \sum_t x_{tj}^2$.

# %%
model = real_model.load()
encode = real_model.load_tokenizer().encode
seen_text = course_model.corpus("addresses", "train")[:100_000]
other_text = course_model.corpus("addresses", "valid")[:8_000]
batches = calibration.sample(torch.tensor(encode(seen_text).ids), 256, 2, seed=0)
held_out = torch.tensor(encode(other_text).ids)[None, :512]

PARTS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
*before, block = list(calibration.blocks(model).values())[:16]
linears = {part: block.get_submodule(part) for part in PARTS}


def inputs_of_layer_15(batches):
    """What enters the three linears while the model reads some text."""
    calls = calibration.first_calls(model, batches)
    for earlier in before:
        calls = calibration.next_calls(earlier, calls)
    return calibration.collect(linears, lambda: calibration.next_calls(block, calls))


seen = inputs_of_layer_15(batches)
judge = inputs_of_layer_15([held_out])


# %% tags=["hide-input", "numbers-within-5%"]
def channel_errors(part: str, W_hat) -> torch.Tensor:
    """The squared error of each channel's part of the outputs."""
    delta = W_hat - linears[part].weight.detach()
    return delta.square().sum(0) * judge[part].square_sum


W = linears["self_attn.q_proj"].weight.detach()
x_mean = seen["self_attn.q_proj"].absmean
kept = awq.salient(x_mean, 0.01)
errors = channel_errors("self_attn.q_proj", awq.nearest(W, four_bits))
fig, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(4.8, 3.8))
for ax, values in ((top, x_mean), (bottom, 100 * errors / errors.sum())):
    ax.bar(range(576), values, width=2, color=palette.blue)
    ax.bar(kept, values[kept], width=5, color=palette.vermillion)
top.set(ylabel="mean |x|")
bottom.set(xlabel="channel", ylabel="% of the error")
figure(
    fig,
    alt=(
        "Mean |x| of 576 channels: six stand out. Below, the share of the output error"
        " that each channel makes: the same six make most of it, one alone nearly two"
        " thirds."
    ),
)
share = 100 * (errors[kept].sum() / errors.sum()).item()
largest = (x_mean.max() / x_mean.median()).item()
print(f"six of 576 channels make {share:.0f}% of the error")
print(f"the largest mean |x| is {largest:.0f} times the median")

# %% [markdown]
# [Lin et al. 2023](https://arxiv.org/abs/2306.00978 "lin2023awq") call such channels *salient*. Rounding is off by a quarter of a step $\Delta$ on average, whatever the weight is. A weight that is
# scaled up by $s$ and whose input is divided by $s$ has this error instead:
#
# $$\mathrm{Err}\big(Q(w s) \cdot x / s\big) = \Delta' \cdot \mathrm{RoundErr} \cdot x \cdot \frac{1}{s}$$
#
# The ratio to the old error is $\frac{\Delta'}{\Delta} \cdot \frac{1}{s}$: smaller, as long as $\Delta'$, the step of its group, hardly grows. So the scales must be found by trial. But the
# paper does not search for 576 numbers. It takes the mean size of each channel and one exponent for all of them:
#
# $$s_j = \bar x_j^{\,\alpha} \qquad \bar x_j = \mathrm{mean}_t |x_{tj}| \qquad \alpha^* = \arg\min_\alpha \big\lVert Q(W \mathrm{diag}(s))\, \mathrm{diag}(s)^{-1} X - W X \big\rVert$$
#
# There are 20 trials, $\alpha = 0, 0.05 \dots 0.95$. Four details decide whether it works.
#
# 1. **The mean, not the largest.** $\bar x$ is the mean $|x|$ over tokens. The largest would follow one token.
# 2. **One scale where one input is read.** `q`, `k` and `v` share their $s$, and so do `gate` and `up`. The output of the whole attention, or of the whole MLP, judges them together.
# 3. **Folded.** The division goes into what makes $x$: the weight of the norm before it, the rows of `up` for `down`, and the rows of `v` for `o`. With grouped queries, as here, heads share
#    a `v`, and `o` is left alone.
# 4. **Restored.** A trial that is written into the weights must be taken out before the next.
#
# The authors' code also divides $s$ by $\sqrt{\max s \cdot \min s}$. A factor that all channels share changes no code, as every step grows with it.
#
# ## Your turn
#
# Multiply column $j$ of $W$ by $s_j$. Each run of `group_size` neighbours in a row shares a step, its largest $|w s|$ divided by `top`. Round to whole steps, and divide
# column $j$ by $s_j$.


# %%
def scale_and_round(W, s, group_size: int, top: int):
    """Q(W diag(s)) diag(s)⁻¹, (out, in)."""
    raise NotImplementedError("four lines of yours")


your_turn(check.scale_and_round, scale_and_round)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(W, s, group_size, top):
    V = (W * s).unflatten(1, (-1, group_size))  # (out, groups, group_size)
    step = V.abs().amax(-1, keepdim=True) / top
    V = torch.round(V / step) * step
    return V.flatten(1) / s


your_turn(check.scale_and_round, one_answer)

# %% [markdown]
# ## The code
#
# A trial gives the attention or the MLP other weights for one call (`functional_call`). The model's own weights are not touched, so there is nothing to restore.
#
# | value | shape | holds |
# |---|---|---|
# | `x_mean`, $\bar x$ | (in,) | mean $\lvert x\rvert$ of each channel, over all calibration tokens |
# | `s` | (in,) | the scale of each channel |
# | `W_hat` | (out, in) | $Q(W\,\mathrm{diag}(s))\,\mathrm{diag}(s)^{-1}$, of each linear that reads $x$ |
# | `errors` | 20 numbers | share of the outputs' squares, a number for each $\alpha$ |

# %% tags=["hide-output"]
show(awq.scale_of, awq.search, awq.search_seam, awq.fold_block, awq.apply)

# %% [markdown]
# ## Against mathematics, the authors and the libraries
#
# Folding changes nothing by itself. Brute force, with $W$ and $X$ multiplied out, has the least error at the same $\alpha$. And the walk finds the same scales in our Llama and in that of `transformers`. The tests hold every trial of the
# authors' own code and of llmcompressor against ours, on small models; the table below is what they differ in.

# %%
from transformers import LlamaForCausalLM
from transformers import logging as transformers_logging

transformers_logging.disable_progress_bar()
small = course_model.load()
text = torch.tensor(course_model.load_tokenizer().encode(other_text[:1500]).ids)
text = text[None, :100]
config = AWQConfig(QuantConfig(3, group_size=32), alphas=(0.0, 0.2, 0.4, 0.6, 0.8))

right = small(text)
blocks, found = awq.folded_blocks(small, [text], config)
folded = deepcopy(small)
for name, block in blocks.items():
    folded.get_submodule(name).load_state_dict(block.state_dict())
compare(folded(text), right, "folded, not rounded", tol=1e-3)

down = small.model.layers[0].mlp.down_proj
x = calibration.inputs(small, {"down": down}, [text])["down"]
brute = []
for alpha in config.alphas:
    s = x.absmean**alpha
    delta = awq.nearest(down.weight * s, config.grid) / s - down.weight
    brute.append(((delta @ x.gram) * delta).sum().item())
best = config.alphas[brute.index(min(brute))]
compare(found["model.layers.0.mlp.up_proj"].alpha, best, "α by brute force", tol=0)

theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL, dtype=torch.float32)
_, in_theirs = awq.folded_blocks(theirs, [text], config)
ours = [best.alpha for best in found.values()]
alphas = [best.alpha for best in in_theirs.values()]
compare(ours, alphas, "α of every seam in transformers' Llama", tol=0)

# %% [markdown]
# <details><summary>For the curious: paper, authors' code, llmcompressor, ours</summary>
#
# Measured with `llm-awq` at commit d6e797a and with llmcompressor 0.14.0.1, compressed-tensors 0.19.0.
#
# | | paper | authors' code | llmcompressor | ours |
# |---|---|---|---|---|
# | $s$ before it is normalised | $\bar x^\alpha$ | $\bar x^\alpha$, at least 1e-4 | $\bar x^\alpha / (\bar w^{1-\alpha} + 10^{-4})$, at least 1e-4 | as the authors; theirs with `duo=True` |
# | $\alpha$ | 20 in [0, 1] | 0 … 0.95 | no scales, then 0 … 1 in steps of 1/18 | 0 … 0.95 |
# | clipping search | yes | yes, after scaling | none | `clip=True` |
# | levels | symmetric | with a zero point | as the scheme says | as `grid` says |
# | without a GPU | – | stops | stops: "Cannot access accelerator device" | runs |
# | weights put back between trials | – | from `state_dict()`, moved to the CPU | from copies | never changed |
#
# $\bar w$ is the mean $|w|$ of a column, in units of the largest of its group. In the authors' code, moving to the CPU is what makes the copy. On a CPU it copies nothing, and what is
# put back is right only because the first trial has $\alpha = 0$: its scales are 1. Their clipping search wants at least 512 tokens ("slice step cannot be zero").
#
# </details>
#
# ## The experiment
#
# First the layer, judged by text that nobody calibrated on. Which 1% of the columns stays? And what do scales do that cost no bits?


# %% tags=["hide-output", "numbers-within-5%"]
def output_error(part: str, W_hat) -> float:
    """‖WX − ŴX‖², from X Xᵀ."""
    delta = W_hat - linears[part].weight.detach()
    return ((delta @ judge[part].gram) * delta).sum().item()


random = torch.Generator().manual_seed(0)
left = {}
print("output error left, % of that of rounding to nearest")
for part, linear in linears.items():
    W = linear.weight.detach()
    x_mean = seen[part].absmean
    rounded = output_error(part, awq.nearest(W, four_bits))
    choices = {
        "by |x|": x_mean,
        "by |w|": W.square().sum(0),
        "random": torch.rand(len(x_mean), generator=random),
    }
    for how, size in choices.items():
        W_hat = awq.protect(W, awq.salient(size), four_bits)
        left[part, how] = 100 * output_error(part, W_hat) / rounded
    scales = (awq.scale_of(x_mean, alpha) for alpha in AWQConfig().alphas)
    tried = [output_error(part, awq.scaled_nearest(W, s, four_bits)) for s in scales]
    left[part, "scaled"] = 100 * min(tried) / rounded
    line = "  ".join(f"{how} {left[part, how]:3.0f}" for how in (*choices, "scaled"))
    print(f"{part:17} {line}")
layer_guess.settle(left["self_attn.q_proj", "by |x|"], digits=2)

# %% [markdown]
# Six columns of 576, and only a quarter of the error in `q_proj` is left, if the inputs choose them. Chosen by the size of the weights, or by
# chance, they change nothing. Scaling keeps no column and comes close. In the MLP, inputs are less unequal, and there is less to gain.
#
# Now the whole model. `scripts/awq_sweep.py` made the runs: 210 linears, groups of 64, 2,048 tokens to calibrate on, judged by 2,048 others. Each run rounds or protects all of them.

# %% tags=["hide-output"]
with awq.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def chosen(method: str, bits: int, text: str = "", per: str = "group") -> list[dict]:
    """The runs of a method, one for each seed."""
    key = (method, str(bits), per)
    found = [run for run in runs if (run["method"], run["bits"], run["per"]) == key]
    return [run for run in found if run["text"] in (text, "")]


def undone(run: dict) -> float:
    """How much of the growth of rounding's loss a run undoes, in percent."""
    gained = float(run["gained"])
    return 100 * gained / (float(run["grown"]) + gained)


with_scales = [undone(run) for run in chosen("AWQ", 4, "addresses")]
model_guess.settle(sum(with_scales) / len(with_scales), digits=2)

# %% tags=["hide-input"]
METHODS = {
    "rounding": ("rounding", ""),
    "1% at random": ("1% random", ""),
    "1% by |w|": ("1% by w", ""),
    "1% by |x|": ("1% by x", "addresses"),
    "AWQ": ("AWQ", "addresses"),
    "AWQ, Bible": ("AWQ", "bible"),
    "GPTQ": ("GPTQ", "addresses"),
    "GPTQ, Bible": ("GPTQ", "bible"),
}
fig, ax = plt.subplots(figsize=(4.8, 3.2))
for i, (name, (method, text)) in enumerate(METHODS.items()):
    found = chosen(method, 4, text)
    grown = [math.exp(float(run["grown"])) for run in found]
    color = {"AWQ": palette.vermillion, "GPTQ": palette.green}.get(
        name.partition(",")[0], palette.blue
    )
    ax.plot(grown, [i] * len(grown), "o", color=color, alpha=0.8)
    for factor, run in zip(grown, found, strict=True):
        gained, error = float(run["gained"]), 2 * float(run["gained_error"])
        what = f"loss less by {gained:6.3f} ± {error:.3f}, {undone(run):3.0f}% undone"
        print(f"{name:13} perplexity × {factor:.2f}   {what}")
ax.set_yticks(range(len(METHODS)), list(METHODS))
ax.set(xlabel="growth of perplexity in 4 bits, times")
ax.invert_yaxis()
figure(
    fig,
    alt=(
        "By how much perplexity grows in 4 bits, a dot for each run: 1.4 times with"
        " rounding, and hardly less with 1% of the columns kept at random or by the"
        " size of the weights; less than 1.2 with 1% kept by the inputs; about 1.2 with"
        " AWQ, whether it read addresses or the Bible; GPTQ is better than AWQ after"
        " addresses and no better after the Bible."
    ),
)

# %% [markdown]
# About half of what 4 bits break is broken by one column in a hundred: kept by $|x|$, they undo 54% of the growth of the loss, for 0.13 bits per weight. Kept by the size
# of the weights they undo 8%, by chance next to nothing. AWQ's scales undo two fifths or more, and cost no bit. One run of GPTQ, after the same text, undoes 60%.
#
# And what does an unlucky text cost? In [GPTQ](05-gptq.ipynb) verses of the Bible took most of the gain in 3 bits. In 4 bits they take a third, in one run each. AWQ loses nothing by them: its numbers
# after the two texts differ by less than their spread. The paper (its figure 8) reports the like for OPT 6.7B: another text costs AWQ 0.5 to 0.6 of perplexity, and GPTQ 2.3 to 4.9. AWQ takes from its text the mean size of each channel
# and one exponent per seam. GPTQ takes how all channels vary together, and moves each weight by it.
#
# The file that this model was made from stored these linears in 4 bits once. As the first lesson measures, its levels are not ours, so that no method here finds its work done.
#
# ## Play
#
# One exponent serves all channels, and it is a bargain: the larger α is, the less the salient channels lose, and the more all others pay. Move α. Bars are shares
# of the error of rounding to nearest, on the held-out text. *In all* is the output error itself, in which errors of channels may cancel.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
ALPHAS = [i / 10 for i in range(11)]
PLAYED = {"layer 15, q_proj": PARTS[0], "layer 15, down_proj": PARTS[2]}
tried = {}
for label, part in PLAYED.items():
    W = linears[part].weight.detach()
    kept = awq.salient(seen[part].absmean)
    others = torch.ones(W.shape[1], dtype=torch.bool)
    others[kept] = False
    before = channel_errors(part, awq.nearest(W, four_bits)).sum()
    before_all = output_error(part, awq.nearest(W, four_bits))
    for alpha in ALPHAS:
        s = awq.scale_of(seen[part].absmean, alpha)
        W_hat = awq.scaled_nearest(W, s, four_bits)
        now = channel_errors(part, W_hat) / before
        whole = output_error(part, W_hat) / before_all
        shares = [now[kept].sum().item(), now[others].sum().item(), whole]
        tried[label, alpha] = [100 * share for share in shares]


def draw(linear: str, alpha: float):
    fig, ax = plt.subplots(figsize=(4.8, 2.2))
    colors = [palette.vermillion, palette.blue, palette.gray]
    names = ["salient 1%", "all others", "in all"]
    ax.barh(names, tried[linear, alpha], color=colors)
    ax.axvline(100, color=palette.gray, linestyle="--")
    ax.set(xlim=(0, 250), xlabel="% of the error of rounding to nearest")
    ax.set_title(f"α = {alpha}: {tried[linear, alpha][2]:.0f}% in all")
    ax.invert_yaxis()
    return fig


first = "layer 15, q_proj"


def missing(linear: str, alpha: float) -> str:
    if linear != first:
        return "that is the other linear."
    whole = tried[linear, alpha][2]
    return "" if whole < 40 else f"{whole:.0f}% is left."


explore(
    draw,
    alt=lambda linear, alpha: (
        f"{linear}, α = {alpha}: the salient channels make"
        f" {tried[linear, alpha][0]:.0f}% of what rounding loses, all others"
        f" {tried[linear, alpha][1]:.0f}%; in all {tried[linear, alpha][2]:.0f}% is"
        " left."
    ),
    title="What the salient win, what the others pay",
    challenge="In layer 15's q_proj, leave less than 40% of the error in all.",
    missing=missing,
    start={"linear": first, "alpha": 0.0},
    linear=list(PLAYED),
    alpha=ALPHAS,
)

# %% [markdown]
# With α = 1 the salient channels are nearly exact, and all the others lose more than the whole layer did before. In `down_proj` there is little to win, as no channel
# stands out by so much.
#
# ## At scale
#
# The paper's tables 1, 3 and 4, WikiText-2, groups of 128. Perplexities of two models grow from unlike beginnings, so we compare what share of the growth of the *loss*, the logarithm of perplexity, is
# undone.

# %% tags=["hide-input"]
PAPER = {  # floats, rounded, 1% by |x| kept, AWQ
    "OPT 1.3B, 3 bits": (14.62, 119.00, 16.91, 16.32),
    "OPT 6.7B, 3 bits": (10.86, 23.54, 11.39, 11.39),
    "OPT 13B, 3 bits": (10.13, 46.04, 10.43, 10.56),
    "Llama 2 7B, 3 bits": (5.47, 6.66, None, 6.24),
    "Llama 2 7B, 4 bits": (5.47, 5.73, None, 5.60),
    "Llama 2 70B, 3 bits": (3.32, 3.98, None, 3.74),
    "Llama 2 70B, 4 bits": (3.32, 3.46, None, 3.41),
}
print(f"{'growth of the loss undone by':31}1% by |x|    AWQ")
for name, (floats, rounded, one_percent, scaled) in PAPER.items():
    grown = math.log(rounded / floats)
    shown = [
        f"{100 * math.log(rounded / ppl) / grown:4.0f}%" if ppl else "    –"
        for ppl in (one_percent, scaled)
    ]
    print(f"{name:31}{shown[0]:>9}{shown[1]:>7}")
for bits in (3, 4):
    shown = []
    for method in ("1% by x", "AWQ"):
        values = [undone(run) for run in chosen(method, bits, "addresses")]
        shown.append(f"{sum(values) / len(values):4.0f}%")
    print(f"{f'SmolLM2 135M, {bits} bits, ours':31}{shown[0]:>9}{shown[1]:>7}")

# %% [markdown]
# In OPT, where the paper finds salient channels, nearly all the damage is theirs. In Llama 2 AWQ undoes a third to a half, and ours in 4 bits is of that kind.
#
# In 3 bits ours are **not the same**: one run, and the loss grows a little more than by rounding, beyond its spread. Yet no attention and no MLP has a larger error than before on the text that judged
# the search, since $\alpha = 0$ is among the trials. The errors of layers do not add up to the loss of a model. One reason may be that each layer is judged on the inputs that the *float* model gives it: where rounding makes
# perplexity six times as large, as here, it will never see such inputs again. Columns kept in 16 bits do help there, by a third.
#
# On a GPU, llmcompressor. AWQ only scales; the quantizer that follows does the rounding:
#
# ```python
# from llmcompressor import oneshot
# from llmcompressor.modifiers.quantization import QuantizationModifier
# from llmcompressor.modifiers.transform.awq import AWQModifier
#
# oneshot(
#     model="meta-llama/Llama-2-7b-hf",
#     dataset="open_platypus",
#     recipe=[
#         AWQModifier(duo_scaling=False),
#         QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"]),
#     ],
#     num_calibration_samples=128,
#     max_seq_length=512,
#     output_dir="llama-2-7b-awq",
# )
# ```
#
# Ours walks any Llama by names: `awq.apply(model, batches, AWQConfig())` folds the scales in and stores the codes.
#
# ## What to keep
#
# ```python
# x_mean = X.abs().mean(0)                              # X: (tokens, in)
# for alpha in alphas:                                  # each trial begins with W itself
#     s = x_mean**alpha
#     W_hat = nearest(W * s) / s                        # nearest: round in groups
#     errors.append((X @ (W_hat - W).T).square().mean())
# # then: W ← W * s, and what makes X is divided by s
# ```
#
# **Use it** for 4-bit weights with activations in 16 bits, when there is time for minutes of calibration: it takes little text and leaves plain codes that any 4-bit kernel reads.
# **Not** where no channel of the inputs stands out, for then it is rounding; and not without measuring the whole model: in 3 bits ours won nothing.
#
# <details><summary>Why do the inputs decide which weights matter, and not the weights?</summary>
#
# All weights of a group are rounded with the same step, so their errors are alike. What reaches the output is the error times the input.
#
# </details>
#
# <details><summary>Why not α = 1?</summary>
#
# The scaled weights of the salient channels become the largest of their groups. Their steps grow, and all the others lose more.
#
# </details>
#
# <details><summary>Where does the division by s go?</summary>
#
# Into the weight of the norm before q, k, v and before gate, up; into the rows of up for down, and of v for o where heads do not share a v.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/06-awq.ipynb).
#
# Further reading: [Xiao et al. 2023](https://arxiv.org/abs/2211.10438 "xiao2022smoothquant") fold scales the other way, for activations in 8 bits, and
# [Lee et al. 2023](https://arxiv.org/abs/2306.02272 "lee2023owq") keep the salient columns in 16 bits.
