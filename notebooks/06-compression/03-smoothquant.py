# %% [markdown]
# # SmoothQuant
#
# Weights are easy to put into 8 bits, activations are not: a few of their channels are far too large. SmoothQuant makes these channels smaller and the
# weights that read them larger, in such a way that no output changes. On this page you do that to a real model, see what it repairs and
# what it does not, and find the place that the paper leaves out. At the end you own the scale, the fold and the integer product.

# %% tags=["hide-input"]
import csv
import math
from copy import deepcopy

import torch

from llmlab.checks.compression.smoothquant import check
from llmlab.compression import calibration, folding, llm_int8, smoothquant, walk
from llmlab.compression.smoothquant import NORMS, SmoothQuantConfig
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
from llmlab.models import course_model, language_model, real_model

# %% [markdown]
# ## What it costs
#
# A model of 530 billion parameters, as MT-NLG, on machines with eight GPUs of 80 GB each:

# %%
for bits in (16, 8):
    size = 530e9 * bits / 8 / 1e9
    gpus = math.ceil(size / 80)
    print(
        f"{bits:2} bits: {size:.0f} GB, {gpus} GPUs, {math.ceil(gpus / 8)} machine(s)"
    )

# %% [markdown]
# One machine in place of two is what [Xiao et al. 2022](https://arxiv.org/abs/2211.10438 "xiao2022smoothquant") report for this model. It is not only
# storage. When weights *and* activations have 8 bits (W8A8), GPUs multiply integers, about twice as fast as 16-bit floats.
#
# [LLM.int8()](02-llm-int8.ipynb) gets there by a detour: it looks for outlier columns in each input and multiplies those in 16 bits. That needs a special
# kernel. Could *all* columns be integers?
#
# ## Predict
#
# SmolLM2-135M, all 210 linears in W8A8: a step for each row of a weight, and one step for each input as a whole. Perplexity on State of the
# Union addresses nearly doubles. SmoothQuant then smooths what enters $q$, $k$, $v$ and what enters the gate and up projections of every block, as
# the paper says. (These weights were stored in 4 bits once. In 8 bits almost nothing of them is lost: what breaks here comes from activations.)

# %%
guess = predict("How much of the growth of perplexity does that undo?", unit="%")

# %% [markdown]
# ## By hand
#
# Two tokens, two channels, one output. The weights are 4 and 1, and $\alpha$ is 0.5.
#
# | channel | tokens | $\max \lvert X_j \rvert$ | $\max \lvert W_j \rvert$ | $s_j = \sqrt{\max \lvert X_j \rvert / \max \lvert W_j \rvert}$ | $\hat X_j$ | $\hat W_j$ |
# |---|---|---|---|---|---|---|
# | 1 | 1, −0.5 | 1 | 4 | 0.5 | 2, −1 | 2 |
# | 2 | 16, 8 | 16 | 1 | 4 | 4, 2 | 4 |
#
# The outputs are as before: $2 \cdot 2 + 4 \cdot 4 = 20 = 1 \cdot 4 + 16 \cdot 1$. But with one step for all of $X$, channel 1 had
# $127 \cdot 1 / 16 = 7.9$ levels above zero; now it has $127 \cdot 2 / 4 = 63.5$. In each channel $\hat X$ and $\hat W$ are now equally large.

# %%
X = torch.tensor([[1.0, 16.0], [-0.5, 8.0]])
W = torch.tensor([[4.0, 1.0]])
s = smoothquant.smoothing_scale(X.abs().amax(0), W.abs().amax(0), alpha=0.5)
print("s:", s.tolist(), " outputs:", ((X / s) @ (W * s).T)[:, 0].tolist())
for name, scale in {"as it is": None, "smoothed": s}.items():
    config = SmoothQuantConfig(weights="channel", activations="tensor")
    error = smoothquant.output_error(X, [W], scale, config)
    print(f"{name}: output error {error:.1e}")

# %% [markdown]
# ## The idea
#
# First look. What enters the attention of layer 15 of the real model, and the columns of the weights that read it.

# %% tags=["hide-input"]
model = real_model.load()
encode = real_model.load_tokenizer().encode
train, held_out = (
    torch.tensor(encode(course_model.corpus("addresses", split)[:20_000]).ids)
    for split in ("train", "valid")
)
layers = walk.linears(model)
KINDS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
watched = {name: layer for name, layer in layers.items() if name.endswith(KINDS)}
with llm_int8.inputs_of(watched) as calibrated:
    seen = smoothquant.statistics(model, calibration.sample(train, 256, 4))
judged = held_out[:513]
with llm_int8.inputs_of(watched) as others:
    float_losses = language_model.token_losses(model, judged, context=256)
others = {name: x[:256] for name, x in others.items()}  # the first of two windows

BLOCK = "model.layers.15"
seam = folding.SEAMS[0]
x_max = seen[f"{BLOCK}.self_attn.q_proj"].absmax
readers = [layers[f"{BLOCK}.{name}"].weight.detach() for name in seam.after]
w_max = torch.cat(readers).abs().amax(0)
s = smoothquant.smoothing_scale(x_max, w_max, 0.5)
worst = int(x_max.argmax())


def profile(ax, x, w, title: str, legend: bool = False, first: int = 0) -> None:
    """Largest |x| and |w| of each channel; channels are counted from `first`."""
    channels = range(first, first + len(x))
    ax.plot(channels, x, color=palette.blue, linewidth=1.4, label="inputs")
    ax.plot(channels, w, color=palette.vermillion, linewidth=0.6, label="weights")
    ax.set(yscale="log", ylim=(0.1, 20), title=title, ylabel="largest |·|")
    if legend:
        ax.legend(loc="upper right", ncols=2, fontsize=9)


fig, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(4.8, 4.4))
profile(top, x_max, w_max, "as it is", legend=True)
profile(bottom, x_max / s, w_max * s, "smoothed, α = 0.5: one curve now")
bottom.set(xlabel="channel")
figure(
    fig,
    alt=(
        "Largest value of each of 576 channels, on a logarithmic axis. Above: inputs"
        f" lie around 0.5 with one peak, channel {worst}, near 10; weights lie around"
        " 1. Below, after smoothing: both curves are one, below 1, and the peak is"
        " near 3."
    ),
)
before, after = ((v.max() / v.median()).item() for v in (x_max, x_max / s))
print(f"loudest channel of the inputs, by the median: {before:.0f}, then {after:.0f}")

# %% [markdown]
# A step for each channel of $X$ would be the cure, but it stands inside the sum over channels and cannot be taken out of an integer product. So it is put
# into the numbers themselves, for any $s > 0$:
#
# $$Y = \left(X \operatorname{diag}(s)^{-1}\right)\left(\operatorname{diag}(s)\, W^\top\right) = \hat X \hat W^\top$$
#
# Two things remain: which $s$, and who divides $X$?
#
# **Which.** The difficulty is shared out by the *migration strength* $\alpha$:
#
# $$s_j = \frac{\max |X_j|^{\alpha}}{\max |W_j|^{1 - \alpha}}$$
#
# At $\alpha = 1$ all of it moves to the weights. At 0.5 channel $j$ is as large in $\hat X$ as in $\hat W$. And $\alpha = 0$ is *not* "off":
# it makes all columns of $W$ equal, at the cost of $X$.
#
# **Who.** Nobody, while the model runs. The norm before makes the channels, so its weight is divided by $s$ once and for all. All linears that read this norm
# share one $s$, and the second maximum is over all of them. Such a place is a *seam*:
#
# | seam | in the paper |
# |---|---|
# | norm before the attention → $q$, $k$, $v$ | yes |
# | norm before the MLP → gate, up | yes |
# | $v$ → $o$ | no; and where heads share $v$ (GQA) this is no seam |
# | up → down, as `silu(gate) · up` lets $s$ through | no |
#
# The paper has three settings for the steps. $W$ always has one step per tensor; $X$ has one per token in O1, one per tensor in O2, and in O3 a *static* one, which
# calibration has fixed. O3 is the fastest: nothing has to be looked for in $X$. They are data here, `smoothquant.SETTINGS`.
#
# ## Your turn
#
# Write the scale. `X` is (tokens, in), `weights` are all that read it, (out, in) each. A channel that was always 0, or that no weight reads, would give 0
# or ∞: it keeps $s_j = 1$. About four lines.


# %%
def smoothing_scale(X, weights, alpha: float):
    """s, one for each channel: (in,)."""
    raise NotImplementedError("four lines of yours")


your_turn(check.smoothing_scale, smoothing_scale)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(X, weights, alpha):
    x_max = X.abs().amax(dim=0)
    w_max = torch.cat(weights).abs().amax(dim=0)
    s = x_max.pow(alpha) / w_max.pow(1 - alpha)
    return torch.where((x_max > 0) & (w_max > 0), s, 1.0)


your_turn(check.smoothing_scale, one_answer)
compare(
    one_answer(calibrated[f"{BLOCK}.self_attn.q_proj"], readers, 0.5),
    s,
    "four lines, and the package",
)

# %% [markdown]
# ## The code
#
# Three short functions. `fold_seam` finds $s$ and lets `folding.fold` put it into the norm and the linears.
#
# | value | shape | holds |
# |---|---|---|
# | `x_max`, `w_max`, `scale` | (in,) | one number for each channel |
# | codes of $\hat X$ and $\hat W$ | (tokens, in), (out, in) | int8, −127 … 127 |
# | sums | (tokens, out) | int32, then float |
# | `x_step` | (tokens,) or (1,) | what multiplies each row of $Y$ |
# | `w_step` | (out,) or (1,) | what multiplies each column of $Y$ |

# %% tags=["hide-output"]
show(smoothquant.smoothing_scale, smoothquant.fold_seam, folding.fold, smoothquant.w8a8)

# %% [markdown]
# ## Against mathematics and the libraries
#
# A smoothed model computes what it computed. The integer product is that of the rounded floats. And `llmcompressor` has another formula than the paper:
# the *range* of a channel, max − min, over *twice* the weight's maximum.

# %%
tokens = torch.arange(24).reshape(2, 12)
small = course_model.load()
everywhere = SmoothQuantConfig(0.7, seams=(*NORMS, "mlp.up_proj"))
stats = smoothquant.statistics(small, [tokens])
smooth = smoothquant.smooth(deepcopy(small), stats, everywhere)
compare(
    smooth(tokens).detach(), small(tokens).detach(), "smoothed, and as it was", 1e-3
)

x = others[f"{BLOCK}.self_attn.q_proj"]
codes, w_step = smoothquant.quantize_weight(readers[0], "channel")
x_codes, x_step = smoothquant.quantize_activations(x, "token")
floats = (x_codes * x_step[:, None]) @ (codes * w_step[:, None]).T
compare(
    smoothquant.w8a8(x, codes, w_step), floats, "integers, and rounded floats", 1e-4
)


def llmcompressor_scale(X, W, alpha):
    spread = X.amax(0) - X.amin(0)
    return spread.pow(alpha) / (2 * W.abs().amax(0)).pow(1 - alpha)


X = torch.tensor([[6.0], [-2.0]])
W = torch.tensor([[1.0], [-0.5]])
ours = smoothquant.smoothing_scale(X.abs().amax(0), W.abs().amax(0), 0.5)
theirs = llmcompressor_scale(X, W, 0.5)
print(f"paper {ours.item():.3f}, llmcompressor {theirs.item():.3f}")

# %% [markdown]
# The tests hold this formula to what `llmcompressor` itself made of a small model, weight by weight.
#
# <details><summary>For the curious: paper, authors' code and libraries</summary>
#
# Measured with `llmcompressor` 0.14.0.1, ONNX Runtime 1.32.0 and NNCF 3.4.0; the authors' code as of commit c61476d.
#
# | | paper | authors' code | `llmcompressor` | ONNX Runtime | NNCF | ours |
# |---|---|---|---|---|---|---|
# | $s$ | $x^\alpha / w^{1 - \alpha}$ | the same | $(\max - \min)^\alpha / (2 w)^{1 - \alpha}$ | needs `neural_compressor`, else RuntimeError | – | as the paper |
# | $\alpha$ | 0.5 | 0.5; Llama 0.8 to 0.9 | 0.5 | off; 0.5 | 0.95 | 0.5 |
# | dead channel | – | at least 1e-5 | 1e-5 | – | – | 1 |
# | nothing reads it | – | $w$ = 1e-5 | the range | – | – | 1 |
# | Llama's seams | – | both norms | both norms | – | – | chosen |
# | largest code | – | 127 | 127.5 | 127 | – | 127 |
# | static step | largest value seen | largest value seen | by default a moving average of maxima | largest value seen | – | largest value seen |
#
# Two of these can cost a model. With 1e-5, a channel that was silent in calibration and speaks later is multiplied by 100,000. And with a moving
# average of weight 0.01 the first sample decides: on the small model of our tests it gives 0.5 to 1.0 times the largest value seen.
#
# </details>
#
# ## The experiment
#
# First, layers. For each product: the error of its outputs on text that was not calibrated on, with one step for $X$ and one for each row of
# $W$. Without smoothing, and with $\alpha = 0.85$ at its seam. The first token sets the step like all others, but is not judged: its outputs are so
# large that they would hide all others.

# %% tags=["hide-input", "numbers-within-5%"]
CONFIG = SmoothQuantConfig(0.85, "channel", "tensor")
READERS = {seam.after[0]: seam.after for seam in folding.SEAMS}
COLORS = {
    KINDS[0]: palette.blue,
    KINDS[1]: palette.green,
    KINDS[2]: palette.vermillion,
}


def maxima(layer: int, kind: str):
    """max|X_j|, max|W_j|, and the weights that read the same input as `kind`."""
    names = [f"model.layers.{layer}.{name}" for name in READERS[kind]]
    weights = [layers[name].weight.detach() for name in names]
    return seen[names[0]].absmax, torch.cat(weights).abs().amax(0), weights


def error_of(layer: int, kind: str, alpha: float | None) -> float:
    """Output error in %, all tokens but the first."""
    X = others[f"model.layers.{layer}.{kind}"]
    x_max, w_max, weights = maxima(layer, kind)
    s = torch.ones_like(x_max)
    if alpha is not None:
        s = smoothquant.smoothing_scale(x_max, w_max, alpha)
    step = (X / s).abs().amax().reshape(1) / 127
    return 100 * smoothquant.output_error(X[1:], weights, s, CONFIG, step)


fig, ax = plt.subplots(figsize=(4.8, 3.6))
for kind, color in COLORS.items():
    plain = torch.tensor([error_of(i, kind, None) for i in range(30)])
    smoothed = torch.tensor([error_of(i, kind, 0.85) for i in range(30)])
    label = kind.partition(".")[2].removesuffix("_proj")
    ax.plot(plain, ":", color=color)
    ax.plot(smoothed, color=color, label=label)
    print(
        f"{label:5} median error {plain.median():5.2f}% -> {smoothed.median():5.2f}%,"
        f" worst {plain.max():4.0f}% -> {smoothed.max():4.1f}%"
    )
ax.set(yscale="log", xlabel="layer", ylabel="output error, %")
ax.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
fig.legend(loc="outside upper center", ncols=3, title="dotted: not smoothed")
figure(
    fig,
    alt=(
        "Output error of three products in each of 30 layers, on a logarithmic axis."
        " For q and gate it is a tenth of a percent, and a tenth of that with"
        " smoothing. For down it is about one percent with and without, but for some"
        " layers: in layer 11 it is 100 percent without smoothing and about 10 with it,"
        " in layer 28 it falls from over 50 to about 1."
    ),
)
# what the slider below shows, as long as the weights are floats
ALPHAS = [0.0, 0.25, 0.5, 0.7, 0.85, 1.0]
PLAY = {"q, k, v": "self_attn.q_proj", "down": "mlp.down_proj"}
tried, profiles = {}, {}
for label, kind in PLAY.items():
    x_max, w_max, _ = maxima(11, kind)
    order = x_max.argsort(descending=True)
    for alpha in ALPHAS:
        s = smoothquant.smoothing_scale(x_max, w_max, alpha)
        tried[label, alpha] = error_of(11, kind, alpha)
        profiles[label, alpha] = ((x_max / s)[order], (w_max * s)[order])

x = others["model.layers.11.mlp.down_proj"].abs()
print(
    f"down in layer 11: the first token reaches {x[0].max():.0f}, all others"
    f" {x[1:].max():.0f}; half a step is {x.max() / 254:.0f}"
)

# %% [markdown]
# At the paper's two seams smoothing takes off most of the error; but that error was never large. The disaster is `down_proj` of layer 11, and nearly so of layer 28. Its first token holds values in
# the thousands, a *massive activation* ([Sun et al. 2024](https://arxiv.org/abs/2402.17762 "sun2024massive")). It sets the step, and all other tokens
# round to 0: an error of 100%. These values sit in a few channels, so a scale per channel helps here, too, if only somebody folds it into `up`. In most other layers `down` gains little by it.
#
# Now the whole model. Each run takes a quarter of a minute or more, so the runs are stored: `scripts/smoothquant_sweep.py` made them. Judged on 2,048
# tokens of held-out addresses; ± is two standard errors, token by token, of the factor by which perplexity grows.


# %% tags=["hide-output"]
with smoothquant.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))
START = {"left_out": "", "text": "addresses", "tokens": "2048", "seed": "0"}


def factor(setting: str, weights: str, seams: str, alpha="0.5", **more):
    """The growth of perplexity, and two standard errors of it."""
    wanted = START | more | {"setting": setting, "weights": weights, "seams": seams}
    wanted["alpha"] = "" if seams == "none" else str(alpha)
    (run,) = [r for r in runs if all(r[k] == v for k, v in wanted.items())]
    grown = math.exp(float(run["grown"]))
    return grown, 2 * grown * float(run["grown_error"])


broken = factor("O2", "channel", "none")[0]
paper = factor("O2", "channel", "norms")[0]
guess.settle(100 * (broken - paper) / (broken - 1), digits=2)

# %% tags=["hide-input"]
TABLE = (
    ("one step per weight", "tensor", "0.5"),
    ("one step per row of W", "channel", "0.5"),
    ("one step per row of W", "channel", "0.85"),
)
SEAMS = {
    "none": "not smoothed",
    "norms": "the paper's seams",
    "norms and up": "+ up → down",
}
for title, weights, alpha in TABLE:
    print(f"{title}, α {alpha}")
    for seams, label in SEAMS.items():
        line = f"  {label:18}"
        for setting in ("O1", "O2", "O3"):
            grown, spread = factor(setting, weights, seams, alpha)
            line += f"  {setting} × {grown:.2f} ± {spread:.2f}"
        print(line)
print("down_proj left in floats, O2, one step per weight, α 0.5")
for seams in ("none", "norms"):
    grown, spread = factor("O2", "tensor", seams, left_out="down_proj")
    print(f"  {SEAMS[seams]:18}  × {grown:.2f} ± {spread:.2f}")

print("O3, + up → down, α 0.85, a step per row: three draws of calibration text")
DRAWS = {
    "addresses, 2,048 tokens": {},
    "addresses, 256 tokens": {"tokens": "256"},
    "King James Bible, 2,048": {"text": "bible"},
}
for label, more in DRAWS.items():
    values = [
        factor("O3", "channel", "norms and up", "0.85", **more, seed=seed)
        for seed in ("0", "1", "2")
    ]
    shown = "  ".join(f"× {grown:.2f} ± {spread:.2f}" for grown, spread in values)
    print(f"  {label:24} {shown}")

fig, ax = plt.subplots(figsize=(4.8, 3.4))
ALL = ["0.0", "0.25", "0.5", "0.7", "0.85", "1.0"]
for weights, seams, color, label in (
    ("tensor", "norms", palette.gray, "the paper's seams"),
    ("tensor", "norms and up", palette.vermillion, "+ up → down"),
    ("channel", "norms and up", palette.blue, "+ up → down, a step per row of W"),
):
    values = [factor("O2", weights, seams, alpha)[0] for alpha in ALL]
    ax.plot([float(a) for a in ALL], values, "o-", color=color, label=label)
ax.axhline(factor("O2", "tensor", "none")[0], color=palette.gray, linestyle="--")
ax.text(0.42, 2.3, "not smoothed", color=palette.gray, fontsize=9)
ax.set(yscale="log", ylim=(0.95, 20), xlabel="α", ylabel="perplexity, times")
ax.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
ax.minorticks_off()
fig.legend(loc="outside upper center", fontsize=9)
figure(
    fig,
    alt=(
        "Growth of perplexity against alpha, one step for each input. With the paper's"
        " seams it stays near 2 for all alpha from 0.25 to 0.85. With up to down and"
        " one step per weight it has a minimum of 1.4 at 0.5 and leaves the figure"
        " beyond 0.85. With a step per row it falls to 1.03 at 0.85."
    ),
)

# %% [markdown]
# Broken, and fixed: with one step for each input perplexity doubles, and SmoothQuant brings the growth down to a few percent. But not as the paper has
# it. Read the table from top to bottom.
#
# - **The paper's seams alone** undo a fifth to a quarter. They are not to blame: with `down_proj` in floats they undo two thirds of what is left.
# - **Up → down** is where this model needs it. OPT, for which the paper was written, does without it (see *At scale*).
# - It has a price. Dividing the rows of `up` by $s$ makes them unequal, and with **one step per weight** the small rows vanish: at $\alpha = 0.85$ the model is
#   ruined. With a **step per row** nothing of that is lost, since $s$ goes into the step.
# - Then an **$\alpha$ of 0.7 to 0.85** is best; the authors' code takes 0.85 for Llama. With a step per token (O1) little was broken on a model as small as this, so
#   little is gained.
# - **Calibration** counts. With 2,048 tokens of addresses all three draws give the same growth of 3%; verses of the King James Bible cost 5 to 7%. With one run of 256
#   tokens the loud channels of other texts have not been seen, and nearly a fifth is lost whichever run it is.
#
# Last, your own run, O2, calibrated on the 1,024 tokens from above: expect a growth between those for 2,048 and for 256. The model becomes integers in place: 8 bits per weight, and to disk with `smoothquant.save`.

# %% tags=["hide-output", "numbers-within-5%"]
before = sum(layer.weight.nbytes for layer in layers.values())
best = SmoothQuantConfig(0.85, "channel", "tensor", seams=(*NORMS, "mlp.up_proj"))
smoothquant.quantize(model, seen, best)
grown = language_model.token_losses(model, judged, context=256) - float_losses
spread = 2 * grown.std().item() / len(grown) ** 0.5
after = sum(model.get_submodule(name).codes.nbytes for name in layers)
print(f"perplexity × {grown.mean().exp():.2f} ± {spread:.2f}")
print(f"linears: {before / 1e6:.0f} MB of float32, {after / 1e6:.0f} MB of codes")
print(model.get_submodule("model.layers.11.mlp.down_proj"))

# %% [markdown]
# ## Play
#
# One product of layer 11 at a time. What does $\alpha$ do to its channels, and to the error of its outputs?

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
HEIGHT = {"q, k, v": (0.01, 100), "down": (1e-3, 1e4)}


def draw(product: str, alpha: float):
    fig, ax = plt.subplots(figsize=(4.8, 2.9))
    x, w = profiles[product, alpha]
    title = f"output error {tried[product, alpha]:.3g}%"
    profile(ax, x, w, title, legend=True, first=1)  # a log axis has no 0
    ax.set(xscale="log", ylim=HEIGHT[product], xlabel="channel; 1 is the loudest")
    return fig


least = min(ALPHAS, key=lambda alpha: tried["down", alpha])


def missing(product: str, alpha: float) -> str:
    if product != "down":
        return "that is the other product."
    return "" if alpha == least else f"the error is {tried[product, alpha]:.3g}%."


def describe(product: str, alpha: float) -> str:
    x, _ = profiles[product, alpha]
    return (
        f"{product}, α = {alpha}: the loudest channel of the inputs is"
        f" {x.max() / x.median():.3g} times the median; the output error is"
        f" {tried[product, alpha]:.3g}%."
    )


explore(
    draw,
    alt=describe,
    title="Where the difficulty goes",
    challenge="Find the α with the least error of down.",
    missing=missing,
    start={"product": "q, k, v", "alpha": 0.5},
    product=list(PLAY),
    alpha=ALPHAS,
)

# %% [markdown]
# ## At scale
#
# What the [authors' code](https://github.com/mit-han-lab/smoothquant "xiao2022code") reports: last-token accuracy of OPT-13B on 1,000 texts of LAMBADA, one step per tensor
# for all, $\alpha = 0.5$; and perplexities on WikiText-2 with a step per token and per row of $W$. As factors, beside ours with the same kinds of steps.

# %% tags=["hide-input"]
print("OPT-13B     floats 78.6%   W8A8 4.8%   smoothed 79.3%")
LLAMA = (  # floats, W8A8 smoothed, alpha
    ("Llama-2-7B", 5.474, 5.515, 0.85),
    ("Llama-2-13B", 4.950, 4.929, 0.85),
    ("Llama-2-70B", 3.320, 3.359, 0.9),
    ("Llama-3-8B", 6.138, 6.258, 0.85),
    ("Mistral-7B", 5.253, 5.277, 0.8),
    ("Falcon-7B", 6.590, 6.629, 0.6),
)
for name, floats, smoothed, alpha in LLAMA:
    print(f"{name:12} × {smoothed / floats:.3f}   α {alpha}")
grown, spread = factor("O1", "channel", "norms", "0.85")
print(f"SmolLM2-135M × {grown:.3f} ± {spread:.3f}   α 0.85, ours")

# %% [markdown]
# OPT-13B is the paper's case: all is lost with one step per tensor, and its two seams bring it back. Llama-like models are in their table with a step per
# token only; the figure above says why.
#
# On a GPU, `llmcompressor` smooths, quantizes, and writes what vLLM serves:
#
# ```python
# from llmcompressor import oneshot
# from llmcompressor.modifiers.quantization import QuantizationModifier
# from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
#
# oneshot(
#     model="meta-llama/Llama-2-7b-hf",
#     dataset="open_platypus",
#     recipe=[
#         SmoothQuantModifier(smoothing_strength=0.85),
#         QuantizationModifier(scheme="W8A8", targets="Linear", ignore=["lm_head"]),
#     ],
#     num_calibration_samples=512,
#     output_dir="llama-2-7b-w8a8",
# )
# ```
#
# ## What to keep
#
# ```python
# x_max = X.abs().amax(0)                                # of calibration text
# w_max = torch.cat(weights).abs().amax(0)               # of all that read X
# s = x_max.pow(alpha) / w_max.pow(1 - alpha)            # 1 for dead channels
# norm.weight.div_(s)
# for W in weights:
#     W.mul_(s)                                          # columns
# ```
#
# **Use it** when inputs must be integers as well, and outliers sit in channels: above all with one step for each input. Smooth every seam that has outliers, with
# a step per row of $W$. **Not** for weights alone (AWQ chooses $s$ for that), and not where a step per token already loses nothing.
#
# <details><summary>Why does the model compute what it computed?</summary>
#
# Each channel is divided by $s_j$ where it is made and multiplied by it where it is read. The norm and the linear make up for each other.
#
# </details>
#
# <details><summary>Why do q, k and v share one s?</summary>
#
# They read one norm, and only one scale can be folded into it.
#
# </details>
#
# <details><summary>What does α = 0 do?</summary>
#
# It makes all columns of W equally large, and moves what they differed in to the inputs. It is not "off".
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/03-smoothquant.ipynb).
#
# Further reading: [Nagel et al. 2019](https://arxiv.org/abs/1906.04721 "nagel2019datafree") equalize the weights of two layers by the same identity, and
# [Bondarenko et al. 2023](https://arxiv.org/abs/2306.12929 "bondarenko2023quantizable") train models that have no outliers to begin with.
