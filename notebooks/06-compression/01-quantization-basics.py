# %% [markdown]
# # Quantization basics
#
# A weight of a trained network does not need 32 bits, nor 16. With 4 bits a model breaks or remains usable, and that depends on one choice.
# Which one? This lesson stores a real language model in 8, 4 and 3 bits per weight, finds out where it breaks, and repairs much of it with
# nothing but more scales. At the end you own a quantizer for groups of weights.

# %% tags=["hide-input"]
from copy import deepcopy

import torch
from torch.nn.functional import mse_loss

from llmlab.checks.compression.quantization_basics import check
from llmlab.compression import quantization_basics as qb
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
from llmlab.models import accounting, course_model, language_model, real_model
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# A model must fit into the memory of the machines that serve it, and to make one token for one user all its weights
# are read once. Memory is bought by the gigabyte, and reading takes time by the gigabyte. So bits per weight are money,
# twice over. Say that a GPU has 80 GB of memory and reads 3 TB of it per second.

# %%
llama70b = preset("llama-2-70b")
for bits in (16, 8, 4):
    size = accounting.parameters(llama70b) * bits / 8
    gpus = -(-size // 80e9)
    print(
        f"Llama 2 70B at {bits:2} bits per weight: {size / 1e9:6.1f} GB,"
        f" GPUs: {gpus:.0f}, read in {size / gpus / 3e12 * 1e3:.0f} ms"
    )

# %% [markdown]
# At 8 bits one GPU does what took two, in the same time; at 4 bits, in half of it. Few changes to a trained model buy as
# much for as little work: nothing on this page trains anything, and rounding all the weights takes a second or two.
#
# ## Predict
#
# The model is SmolLM2-135M-Instruct. It is asked to predict a State of the Union address, token by token. We round every
# weight of its 210 linear layers to the nearest of 15 levels, which is what 4 bits give when there are as many levels
# below zero as above. The levels are evenly spaced up to the largest weight. Largest *of what* is the question: of the whole matrix,
# of each row, or of each run of 64 weights in a row. Each has a *scale* of its own, the step from one level to the next.
#
# Perplexity says how unsure the model is: twice the perplexity is as if it had to choose among twice as many tokens.

# %%
model = real_model.load()
text = course_model.corpus("addresses", "valid")[:4000]
tokens = torch.tensor(real_model.load_tokenizer().encode(text).ids)[:257]


def token_losses(model) -> torch.Tensor:
    return language_model.token_losses(model, tokens, context=256)


losses = {"float": token_losses(model)}
print(
    f"perplexity of {len(tokens) - 1} tokens, weights as they are:"
    f" {losses['float'].mean().exp():.0f}"
)
row_guess = predict(
    "One scale per row: by what factor does perplexity grow?", unit="times"
)
group_guess = predict(
    "One scale for 64 weights: by what factor does it grow?", unit="times"
)

# %% [markdown]
# ## By hand
#
# Four weights, 3 bits. Symmetric codes are $-3 \dots 3$, so the step is $s = \max|x| / 3 = 1.2 / 3 = 0.4$. Divide by $s$, round, keep the
# integer $q$; multiply to read the number back.
#
# | $x$ | $x / s$ | $q$ | $\hat x = s\,q$ | error |
# |---|---|---|---|---|
# | 0.7 | 1.75 | 2 | 0.8 | 0.1 |
# | −0.3 | −0.75 | −1 | −0.4 | −0.1 |
# | 0.1 | 0.25 | 0 | 0.0 | −0.1 |
# | 1.2 | 3.00 | 3 | 1.2 | 0.0 |
#
# No error is larger than half a step, 0.2. And the largest weight decides the step for all four: if it were 12 instead of 1.2, the step would be
# 4, and the other three would be rounded to 0.

# %%
x = torch.tensor([0.7, -0.3, 0.1, 1.2])
three_bits = QuantConfig(bits=3, per="tensor")
codes, s, z = qb.encode(x, three_bits)
print("codes", codes.int().tolist(), " scale", round(s.item(), 2))

# %% [markdown]
# ## The idea
#
# One row of the model's weights, as a histogram, and the levels of 3 bits. *Symmetric* levels lie evenly around zero. *Affine* levels lie
# evenly from the smallest weight to the largest.
#
# One large value makes the step long for all values that share its scale. That is the whole problem of this part of
# the course. The first remedy is to share less: a scale per **tensor**, per **row** (an output channel of a weight, a token of
# activations) or per **group** of neighbours in a row. The second figure colours a weight of 6 outputs and 12 inputs by the scale that each
# number uses.

# %% tags=["hide-input"]
weight = dict(model.named_parameters())["model.layers.12.mlp.up_proj.weight"].detach()
row = weight[7]
fig, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(4.8, 4.2))
for ax, symmetric in ((top, True), (bottom, False)):
    config = QuantConfig(bits=3, symmetric=symmetric, per="tensor")
    codes, s, z = qb.encode(row, config)
    levels = qb.dequantize(
        torch.arange(config.range[0], config.range[1] + 1), s, z
    ).flatten()
    ax.hist(row, bins=30, color=palette.light)
    ax.vlines(levels, 0, 24, color=palette.vermillion)
    for level, code in zip(
        levels, range(config.range[0], config.range[1] + 1), strict=True
    ):
        ax.text(level, 26, code, ha="center", color=palette.vermillion)
    ax.set(ylabel="weights", title="symmetric" if symmetric else "affine", yticks=[])
bottom.set_xlabel("weight")
figure(
    fig,
    alt=(
        "One row of weights as a histogram, and the levels of 3 bits over it: seven"
        " evenly spaced around zero when symmetric, eight from the smallest to the"
        " largest weight when affine. Both have a level at zero."
    ),
)

fig, axes = plt.subplots(1, 3, figsize=(4.8, 2.2))
for ax, per in zip(axes, qb.BLOCKS, strict=True):
    config = QuantConfig(per=per, group_size=4)
    blocks = qb.to_blocks(torch.zeros(6, 12), config)
    owner = torch.arange(len(blocks))[:, None].expand_as(blocks).reshape(6, 12)
    ax.imshow(owner % 6, cmap="Set2", vmin=0, vmax=7)
    ax.set(
        title=f"{len(blocks)} scale{'s' * (len(blocks) > 1)}",
        xlabel=f"per {per}",
        xticks=[],
        yticks=[],
    )
axes[0].set_ylabel("outputs")
figure(
    fig,
    alt=(
        "A weight matrix of 6 outputs and 12 inputs, coloured by the scale that each"
        " weight uses: one colour per tensor, six per row, eighteen per group of four"
        " along the rows."
    ),
)

# %% [markdown]
# With $b$ bits, codes from $q_\min$ to $q_\max$ and a *zero point* $z$, the code of the number 0
# ([Jacob et al. 2018](https://arxiv.org/abs/1712.05877 "jacob2018quantization"),
# [Nagel et al. 2021](https://arxiv.org/abs/2106.08295 "nagel2021white")):
#
# $$q = \mathrm{clamp}\left(\left\lfloor x / s \right\rceil + z,\; q_\min,\; q_\max\right) \qquad \hat x = s\,(q - z)$$
#
# - **Symmetric**: $z = 0$ and codes $-(2^{b-1}-1) \dots 2^{b-1}-1$, so $s = \max|x| / (2^{b-1}-1)$. One code is given up, and
#   products stay plain products of integers.
# - **Affine**: codes $0 \dots 2^b - 1$, so $s = (\max x - \min x) / (2^b - 1)$ and $z = \lfloor -\min x / s \rceil$. It uses every level
#   when values lie to one side. The range is widened to hold 0, which stays exact: padding and zeros are common.
#
# **How much is lost?** Between two levels a value may lie anywhere, so its error is about uniform from $-s/2$ to $s/2$, with
# mean square $s^2/12$. One bit more halves $s$, which quarters the squared error: 6 decibels per bit, since 10 decibels are a factor of 10
# and $10 \log_{10} 4 \approx 6$. A step that is four times too long
# is two bits thrown away, for every value that shares it.
#
# Why along rows? A linear layer computes $y_i = \sum_j W_{ij} x_j$. A scale that depends on $i$ alone comes out of the sum,
# so that integers can be multiplied and the scale applied once. One that changes every 64 columns comes out of each
# partial sum of 64. A scale that depends on $j$ does not come out at all.
#
# ## Your turn
#
# Write the quantizer that this page is about: symmetric, one scale for each run of `group_size` weights in a row. `W` has shape (out, in), and
# `group_size` divides in. Return the codes, int64 and of shape (out, in), and the scales, of shape (out, in / group_size). A group of zeros gets the
# scale 1. About five lines; `unflatten`, `abs`, `amax` and `round` will do.


# %%
def quantize_groups(W, bits: int, group_size: int):
    """Codes −(2^(bits−1) − 1) … 2^(bits−1) − 1 of W, and a scale for each group."""
    raise NotImplementedError("five lines of yours")


your_turn(check.quantize_groups, quantize_groups)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(W, bits, group_size):
    groups = W.unflatten(1, (-1, group_size))  # (out, in / g, g)
    scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)  # (out, in / g)
    scale = torch.where(scale > 0, scale, 1.0)
    codes = torch.round(groups / scale[..., None]).flatten(1)
    return codes.long(), scale


your_turn(check.quantize_groups, one_answer)

exactly = QuantConfig(4, group_size=64, scale_dtype=torch.float32)
codes, scale = one_answer(weight, bits=4, group_size=64)
read_back = (codes.unflatten(1, (-1, 64)) * scale[..., None]).flatten(1)
ours = qb.decode(*qb.encode(weight, exactly), exactly)
compare(read_back, ours, "five lines, and the package", tol=1e-7)

# %% [markdown]
# ## The code
#
# The mathematics is two one-line functions and the choice of a scale. `to_blocks` lays the values that share a scale into one row;
# everything else works on rows. Open ours when you have your own.
#
# | value | shape for a weight (out, in) | holds |
# |---|---|---|
# | `codes` | (out, in) | integers, $b$ bits each once packed |
# | `scale` | (1, 1), (out, 1) or (out · in / g, 1) | $s$, stored in 16 bits |
# | `zero` | as `scale` | $z$, $b$ bits; nothing is stored when symmetric |
#
# Rounding has gradient 0 almost everywhere, so nothing could be trained through it. `fake_quantize` returns $\hat x$ and
# passes the gradient on as if it were $x$, except where $x$ was clipped: the *straight-through estimator*
# ([Bengio et al. 2013](https://arxiv.org/abs/1308.3432 "bengio2013estimating")).

# %% tags=["hide-output"]
show(qb.quantize, qb.dequantize, qb.scale_and_zero, qb.to_blocks, qb.encode)

# %% [markdown]
# ## Against the library
#
# PyTorch has the same operation in C++, per tensor and per channel, with its gradient. We give it our scales and compare results
# and gradients; clipping is forced by a range that leaves out the outermost 5%.

# %%
torch.manual_seed(0)
x = torch.randn(16, 64, requires_grad=True)
upstream = torch.randn(16, 64)


def value_and_gradient(function, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    y = function(x, *arguments)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


exact = {"scale_dtype": torch.float32, "calibration": "percentile", "percentile": 95.0}
for symmetric in (True, False):
    config = QuantConfig(bits=4, symmetric=symmetric, per="tensor", **exact)
    _, s, z = qb.encode(x, config)
    theirs = value_and_gradient(
        torch.fake_quantize_per_tensor_affine, s.item(), int(z), *config.range
    )
    ours = value_and_gradient(qb.fake_quantize, config)
    compare(ours[0], theirs[0], f"symmetric={symmetric}, per tensor, values", tol=1e-6)
    compare(ours[1], theirs[1], f"symmetric={symmetric}, per tensor, gradients", tol=0)

config = QuantConfig(bits=8, per="row", scale_dtype=torch.float32)
codes, s, z = qb.encode(x, config)
theirs = torch.fake_quantize_per_channel_affine(
    x.detach(), s[:, 0], z[:, 0].int(), 0, *config.range
)
compare(qb.decode(codes, s, z, config), theirs, "per channel, values", tol=1e-6)

import bitsandbytes.functional as bnb

codes_bnb, largest, _ = bnb.int8_vectorwise_quant(x.detach())
compare(codes, codes_bnb, "int8 codes, bitsandbytes", tol=0)
compare(s[:, 0] * 127, largest, "largest of each row, bitsandbytes", tol=1e-6)

# %% [markdown]
# Libraries differ in what they call symmetric. OpenVINO 2026.4 (`nncf.compress_weights`, nncf 3.4) gives a scale a *sign*, the one that puts the largest
# value of a group on the lowest code. So it uses all $2^b$ codes, where ours leaves one out. What we read from its graphs:
#
# | 4 bits | symmetric | with a zero point |
# |---|---|---|
# | ours | $s = \max \lvert x\rvert / 7$, codes −7 … 7 | $s = (\max - \min) / 15$ |
# | OpenVINO | $s = \pm\max \lvert x\rvert / 8$, codes −8 … 7 | the same; rounded to 16 bits only after the codes are made |
# | group | of 128 by default; the last layer stays in 8 bits unless `all_layers=True` | likewise |
#
# The folded cell counts what the sign is worth on the real model.

# %% tags=["hide-cell"]
w = model.model.layers[12].mlp.up_proj.weight.detach()


def signed_scale(x: torch.Tensor, group: int = 64) -> torch.Tensor:
    """Rounded to −8 … 7, the largest of each group to −8."""
    blocks = x.reshape(-1, group)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    step = -largest / 8
    return ((blocks / step).round().clamp(-8, 7) * step).reshape(x.shape)


plain = qb.nearest(w, QuantConfig(group_size=64))
affine = qb.nearest(w, QuantConfig(group_size=64, symmetric=False))
rounded = {"ours": plain, "a scale with a sign": signed_scale(w), "zero point": affine}
for name, values in rounded.items():
    error = (values - w).square().mean() / (plain - w).square().mean()
    print(f"{name:20} squared error {error:.2f} of ours")

# %% [markdown]
# ## The experiment
#
# Each line copies the model, rounds all 210 linears of the copy (not the embedding, which is the output layer too) and reads the text. The
# same 256 tokens are read each time, so the *differences* of their losses are known better than the losses: ± is two standard errors of their mean.

# %% tags=["hide-output", "numbers-within-5%"]
settings = {
    "8 bits, row": QuantConfig(bits=8, per="row"),
    "4 bits, tensor": QuantConfig(per="tensor"),
    "4 bits, row": QuantConfig(per="row"),
    "4 bits, group 64": QuantConfig(group_size=64),
    "3 bits, group 64": QuantConfig(bits=3, group_size=64),
}


def factor_of_perplexity(name: str) -> tuple[float, float]:
    """How many times that of the floats, and two standard errors of it."""
    grown = losses[name] - losses["float"]
    factor = grown.mean().exp().item()
    return factor, 2 * factor * grown.std().item() / len(grown) ** 0.5


for name, config in settings.items():
    losses[name] = token_losses(qb.round_weights(deepcopy(model), config))
    factor, spread = factor_of_perplexity(name)
    broken = factor > 30
    print(f"{name:18}", "× over 30" if broken else f"× {factor:.2f} ± {spread:.2f}")
row_guess.settle(factor_of_perplexity("4 bits, row")[0], digits=2)
group_guess.settle(factor_of_perplexity("4 bits, group 64")[0], digits=2)

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 3.0))
ppl = {name: values.mean().exp().item() for name, values in losses.items()}
names = list(ppl)
shown = [min(value, 1000) for value in ppl.values()]
colors = [
    palette.gray,
    palette.green,
    palette.vermillion,
    palette.orange,
    palette.blue,
    palette.orange,
]
ax.barh(names, shown, color=colors)
for i, value in enumerate(ppl.values()):
    inside = value > 1000
    ax.text(
        900 if inside else shown[i] * 1.06,
        i,
        "over 1000" if inside else f"{value:.0f}",
        va="center",
        ha="right" if inside else "left",
        color="white" if inside else palette.ink,
    )
ax.set(xscale="log", xlim=(10, 1000), xlabel="perplexity (log scale), lower is better")
ax.invert_yaxis()
figure(
    fig,
    alt=(
        "Perplexity by setting: 8 bits equal the floats; 4 bits with one scale per"
        " matrix are broken; with one scale per row perplexity about doubles; with one"
        " scale for 64 weights about half of that damage is gone; 3 bits bring it"
        " back."
    ),
)

# %% [markdown]
# Same bits, same rounding; only the number of scales changed. One scale per matrix breaks the model. A scale of 16 bits for every 64 weights
# costs a quarter of a bit per weight and removes about half of the damage that one scale per row had done. The model is not as good as before:
# on this text its perplexity is still about 40% higher, and the next lessons work on that.
#
# **Activations are worse.** To multiply integers by integers, the inputs of each linear are rounded too, while the model runs.
# Eight bits cost almost nothing for weights. And for activations, with one scale for the whole batch of tokens, or with one scale per
# token? The next cell measures both, and its figure shows the reason. For each linear we take the largest input of every channel, and
# divide the largest of these by their median. Of a quantizer's 127 levels above zero, a typical channel is left
# with 127 divided by that ratio.

# %% tags=["hide-input", "numbers-within-5%"]
int8_model = qb.round_weights(deepcopy(model), settings["8 bits, row"])
for per in ("tensor", "row"):
    hooks = qb.quantize_inputs(int8_model, QuantConfig(bits=8, per=per))
    losses[f"W8A8, {per}"] = token_losses(int8_model)
    for hook in hooks:
        hook.remove()
    factor, spread = factor_of_perplexity(f"W8A8, {per}")
    kind = "token" if per == "row" else per
    print(f"8-bit weights and activations, one scale per {kind}: × {factor:.2f}")
del int8_model

largest = {}


def watch(name):
    def hook(module, args):
        channels = args[0].abs().amax(dim=(0, 1))
        largest[name] = (channels.max() / channels.median()).item()

    return hook


hooks = [
    m.register_forward_pre_hook(watch(name)) for name, m in qb.linears(model).items()
]
with torch.inference_mode():
    model(tokens[None, :128])
for hook in hooks:
    hook.remove()

fig, ax = plt.subplots(figsize=(4.8, 3.0))
for kind, color in (
    ("down_proj", palette.vermillion),
    ("gate_proj", palette.green),
    ("q_proj", palette.blue),
):
    ratios = [value for name, value in largest.items() if name.endswith(kind)]
    ax.plot(ratios, "o-", markersize=3, color=color, label=kind)
ax.axhline(127, color=palette.gray, linestyle="--")
ax.text(12.3, 145, "127: one level left", color=palette.gray, fontsize=9)
ax.set(yscale="log", xlabel="layer", ylabel="largest / median channel")
ax.legend(ncols=3, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.17))
figure(
    fig,
    alt=(
        "Ratio of the largest to the median input channel by layer: between ten and"
        " thirty for q_proj, lower for gate_proj but for the last layers, and over a"
        " hundred in some layers for down_proj, once over a thousand."
    ),
)

# %% [markdown]
# In some layers a few channels carry values hundreds of times larger than the rest, in a few tokens. These are the outliers that
# LLM.int8(), SmoothQuant and AWQ, the next lessons, are about. A scale for each token keeps the damage to the tokens that
# have them.
#
# <details><summary>For the curious: inside a layer; how much to clip; is this model a fair subject?</summary>
#
# **Inside a layer.** By the rule above, a quarter of a bit more for every weight would have bought 1.5 decibels. The first folded cell
# measures layer 12: as scales it buys two or more, because scales do not act on the average weight. They act on the rows that hold one outlier and
# hundreds of ordinary weights. With one scale per matrix, most weights of five of the seven matrices are nearer to 0 than to the first level.
#
# **Calibration** is the other knob. The largest value need not be a level: a smaller range clips a few values and makes the step smaller for all
# others. The second folded cell tries which range leaves the least squared error. With few levels it pays to clip hard; with 8 bits hardly at
# all. `calibration="percentile"` and `"mse"` choose ranges this way. For weights, whose values are known, the search is exact; for activations
# it needs sample text, which is why it is called calibration.
#
# **A fair subject?** The file that this model was made from stored each linear in 4 bits already, in a format called Q4_1: groups of 32, a scale
# and a *minimum* in floating point. A quantizer with the same groups and a floating-point minimum finds the very same levels, and looks perfect.
# Ours must not. If its levels fall elsewhere, the error divided by the step is that of numbers that lie anywhere between two levels:
# $1/\sqrt{12} \approx 0.29$. The third folded cell measures it.
#
# </details>

# %% tags=["hide-cell"]
layer = {
    n.split(".")[-1]: m.weight.detach()
    for n, m in qb.linears(model).items()
    if ".layers.12." in n
}


def decibels(weight, config):
    """Error below the weights' own size, in decibels."""
    error = qb.decode(*qb.encode(weight, config), config) - weight
    return -10 * torch.log10(error.square().mean() / weight.square().mean()).item()


print("layer 12    rounded to 0 by one scale   one a row   one for 64 weights")
for name, w in layer.items():
    lost = (qb.encode(w, settings["4 bits, tensor"])[0] == 0).float().mean()
    row_db, group_db = (
        decibels(w, settings[f"4 bits, {per}"]) for per in ("row", "group 64")
    )
    print(f"{name:12}{lost:>25.0%}{row_db:>9.1f} dB{group_db:>18.1f} dB")

# %% tags=["hide-cell"]
fig, ax = plt.subplots(figsize=(4.8, 3.0))
shrink = torch.linspace(0.2, 1, 33)
for bits, color in (
    (2, palette.purple),
    (3, palette.vermillion),
    (4, palette.blue),
    (8, palette.green),
):
    config = QuantConfig(bits=bits, per="row")
    errors = []
    for c in shrink:
        s, z = qb.scale_and_zero(
            *(c * end for end in qb.minmax(weight, config)), config
        )
        errors.append(
            mse_loss(
                qb.dequantize(qb.quantize(weight, s, z, *config.range), s, z), weight
            )
            / weight.var()
        )
    best = int(torch.tensor(errors).argmin())
    ax.plot(shrink, errors, color=color, label=f"{bits} bits")
    ax.plot(shrink[best], errors[best], "o", color=color)
ax.set(
    yscale="log",
    xlabel="range, as a part of the largest |weight|",
    ylabel="squared error / variance",
)
ax.legend(fontsize=9)
figure(
    fig,
    alt=(
        "Squared error against the clipping range for 2, 3, 4 and 8 bits. With 8 bits"
        " the best range is nearly the whole; with fewer bits the best range is"
        " smaller, and at 2 bits it is under half."
    ),
)

# %% tags=["hide-cell"]
group = weight.reshape(-1, 32)
low = group.amin(1, keepdim=True)
step = (group.amax(1, keepdim=True) - low) / 15
trap = torch.round((group - low) / step) * step + low
print(
    "4 bits, groups of 32, float minimum: error / step ="
    f" {((trap - group) / step).square().mean().sqrt():.2f}  <- the trap"
)
for label, config in {
    "4 bits, one scale per row": QuantConfig(per="row"),
    "4 bits, groups of 64": QuantConfig(),
    "4 bits, groups of 32": QuantConfig(group_size=32),
    "3 bits, groups of 64": QuantConfig(bits=3),
}.items():
    codes, s, z = qb.encode(weight, config)
    error = (qb.decode(codes, s, z, config) - weight).reshape(len(s), -1) / s
    print(f"{label}, symmetric: error / step = {error.square().mean().sqrt():.2f}")

# %% [markdown]
# ## Play
#
# Bits and group size, on the weight whose row you saw above. Its rows are 576 long.
# Which buys more, a bit or a scale? Try it; the folded cell below the figure answers.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
some = weight[:128]


def measure(bits: int, group: int) -> tuple[float, float]:
    """Bits per weight, and the error's size as a part of the weights' size."""
    config = QuantConfig(bits=bits, group_size=group)
    error = mse_loss(qb.decode(*qb.encode(some, config), config), some)
    return qb.bits_per_weight(config), (error / some.square().mean()).sqrt().item()


def draw(bits: int, group: int):
    config = QuantConfig(bits=bits, group_size=group)
    error = qb.decode(*qb.encode(some, config), config) - some
    fig, ax = plt.subplots(figsize=(4.8, 2.8))
    shape = {"bins": 60, "range": (-0.6, 0.6)}
    ax.hist(some.flatten(), color=palette.light, label="weights", **shape)
    line = {"histtype": "step", "color": palette.vermillion}
    ax.hist(error.flatten(), label="errors", **shape, **line)
    ax.set(yscale="log", ylim=(1, 1e5), xlabel="value", ylabel="how many")
    ax.set_title(describe(bits, group))
    ax.legend(fontsize=9, loc="upper right")
    return fig


def describe(bits: int, group: int) -> str:
    stored, error = tried[bits, group]
    return f"{stored:.2f} bits per weight, error {100 * error:.1f}%"


SIZES = {"bits": [3, 4, 5, 6, 8], "group": [576, 192, 64, 16]}
tried = {(b, g): measure(b, g) for b in SIZES["bits"] for g in SIZES["group"]}
good = {setting: stored for setting, (stored, error) in tried.items() if error < 0.1}
best = min(good, key=good.get)


def missing(bits: int, group: int) -> str:
    if (bits, group) in good:
        return "another setting stores less." if (bits, group) != best else ""
    return f"the error is {100 * tried[bits, group][1]:.1f}%."


explore(
    draw,
    alt=lambda bits, group: (
        f"{bits} bits, groups of {group}: {describe(bits, group)} of the weights' size."
    ),
    title="Weights and what rounding does to them",
    challenge="Store the fewest bits per weight with an error below 10%.",
    missing=missing,
    start={"bits": 4, "group": 64},
    **SIZES,
)

# %% tags=["hide-output"]
print("{} bits in groups of {}: {:.2f} bits per weight".format(*best, good[best]))

print("\nfrom 4 bits       stored   error divided by   decibels per bit stored")
bought = {}
for step, before, after in (
    ("576 to 64", (4, 576), (4, 64)),
    ("64 to 16", (4, 64), (4, 16)),
    ("a bit, by 64", (4, 64), (5, 64)),
):
    added = tried[after][0] - tried[before][0]
    smaller = tried[before][1] / tried[after][1]
    bought[step] = 20 * torch.tensor(smaller).log10().item() / added
    print(f"{step:16}{added:>+8.2f}{smaller:>19.2f}{bought[step]:>26.1f}")
order = sorted(bought, key=bought.get, reverse=True)
print("most for a stored bit:", ", then ".join(order))

# %% [markdown]
# ## At scale
#
# The bits of the scales count. First the real thing on this machine: every linear replaced by one that holds packed codes and scales, bytes
# counted from the stored tensors. Then the formula for published models.
#
# What others report, and what our count says. llama.cpp's formats are read from its own `gguf` package. The
# [QLoRA paper](https://arxiv.org/abs/2305.14314 "dettmers2023qlora") counts what scales cost, before and after they are quantized in turn to 8 bits, 256 at a time.

# %% tags=["hide-input"]
packed = qb.apply(deepcopy(model), QuantConfig(bits=4, group_size=64))
ours = sum(
    module.packed.nbytes + module.scale.nbytes
    for module in packed.modules()
    if isinstance(module, qb.QuantLinear)
)
formula = (
    sum(m.weight.numel() for m in qb.linears(model).values())
    * qb.bits_per_weight(QuantConfig(group_size=64))
    / 8
)
compare(ours, formula, "bytes of the quantized linears", tol=0)
print(
    f"whole model: {qb.nbytes(model) / 1e6:.0f} MB as float32,"
    f" {qb.nbytes(packed) / 1e6:.0f} MB now; the embedding keeps its 32 bits"
)

print("\nGB, all but the embedding and the output layer quantized, those in 16 bits:")
print(
    f"{'':12}{'16 bits':>9}{'8, row':>10}{'4, row':>10}{'4, g 128':>11}{'4, g 32':>10}"
    f"{'3, g 128':>11}"
)
for name in ("llama-2-7b", "llama-3-8b", "llama-2-70b"):
    shape = preset(name)
    parts = accounting.parameters_by_part(shape)
    linear = parts["attention"] + parts["mlp"]
    rest = 2 * (accounting.parameters(shape) - linear)
    columns = [QuantConfig(8, per="row"), QuantConfig(4, per="row")] + [
        QuantConfig(b, group_size=g) for b, g in ((4, 128), (4, 32), (3, 128))
    ]
    sizes = [
        (rest + linear * qb.bits_per_weight(c, shape.hidden_size) / 8) / 1e9
        for c in columns
    ]
    print(
        f"{name:12}{accounting.weight_bytes(shape) / 1e9:9.1f}"
        + "".join(
            f"{size:{width}.1f}"
            for size, width in zip(sizes, (10, 10, 11, 10, 11), strict=True)
        )
    )

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

rows = []
for kind, config, extra in (
    ("Q4_0", QuantConfig(4, group_size=32), 0),
    ("Q4_1", QuantConfig(4, group_size=32), 16 / 32),
    ("Q8_0", QuantConfig(8, group_size=32), 0),
):
    values, stored = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows.append(
        (
            f"llama.cpp {kind}, bits per weight",
            8 * stored / values,
            qb.bits_per_weight(config) + extra,
        )
    )
float_scales = (
    qb.bits_per_weight(QuantConfig(4, group_size=64, scale_dtype=torch.float32)) - 4
)
rows.append(("QLoRA, scales, bits per weight", 0.5, float_scales))
rows.append(("QLoRA, scales quantized too", 0.127, 8 / 64 + float_scales / 256))
print(f"{'':32}{'theirs':>8}{'ours':>8}")
for label, theirs, ours in rows:
    print(
        f"{label:32}{theirs:8.3f}{ours:8.3f} "
        f" {'same' if abs(theirs - ours) < 1e-3 else 'differs'}"
    )

# %% [markdown]
# On a GPU, libraries keep the codes packed and dequantize inside the matrix product. Any folder of a Llama checkpoint will do:
#
# ```python
# import torch
# from transformers import AutoModelForCausalLM, BitsAndBytesConfig
#
# model = AutoModelForCausalLM.from_pretrained(
#     "meta-llama/Llama-2-7b-hf", device_map="auto",
#     quantization_config=BitsAndBytesConfig(
#         load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
#     ),
# )
# print(model.get_memory_footprint())
# ```
#
# With llama.cpp, on a laptop: `llama-quantize model-f16.gguf model-q4_0.gguf Q4_0`. And to run this lesson's rounding on another model,
# `qb.round_weights(real_model.load("path/to/folder"), QuantConfig())`, or hand it a `transformers` model: it walks by names and kinds of layers.
#
# ## What to keep
#
# ```python
# def quantize_groups(W, bits, group_size):
#     groups = W.unflatten(1, (-1, group_size))             # (out, in / g, g)
#     scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)  # the largest sets the step
#     scale = scale.where(scale > 0, 1.0)                   # a group of zeros
#     return (groups / scale[..., None]).round().flatten(1).long(), scale
# ```
#
# At 4 bits, one scale per row doubled the perplexity of the 135M model. One scale for 64 weights left it 1.4 times as large, and costs a
# quarter of a bit. At 8 bits nothing was lost that one could see.
#
# **Use it** in 8 bits for any weights, with one scale per row; in 4 bits with groups of 32 to 128, when some quality may go and
# nothing may be trained. **Not** in 4 bits with one scale per row or per matrix, and not for activations with one scale per tensor.
#
# <details><summary>Why does one large weight harm its neighbours?</summary>
#
# It sets the step of all weights that share its scale. The error of each is up to half a step.
#
# </details>
#
# <details><summary>What do groups of 64 cost, with scales of 16 bits?</summary>
#
# 16 / 64, a quarter of a bit per weight.
#
# </details>
#
# <details><summary>Why do groups run along a row, and not along a column?</summary>
#
# A linear sums over the inputs, along a row. A scale shared by 64 neighbours there comes out of their partial sum, so integers can be multiplied.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/01-quantization-basics.ipynb).
#
# Further reading: [Krishnamoorthi 2018](https://arxiv.org/abs/1806.08342 "krishnamoorthi2018quantizing") on per-channel weights and calibration, and
# [Dettmers et al. 2022](https://arxiv.org/abs/2208.07339 "dettmers2022int8") on the outliers of large models.
