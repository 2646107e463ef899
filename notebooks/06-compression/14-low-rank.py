# %% [markdown]
# # Low-rank factorisation
#
# Most matrices of a language model are not of low rank, and cutting them down to one ruins the model. But two thin matrices can repair what
# rounding to 4 bits has broken, if they are told which errors matter. This lesson derives the best factors from one theorem of 1936,
# builds the 4-bit floats of today's chips (FP4, MXFP4, NVFP4), and mends a real model with factors of rank 8.

# %% tags=["hide-input"]
import csv
import math

import gguf
import torch

from llmlab.checks.compression.low_rank import check
from llmlab.compression import calibration
from llmlab.compression.low_rank import (
    E2M1,
    E4M3,
    E5M2,
    FILE,
    FP4,
    MXFP4,
    MXFP8,
    NVFP4,
    LowRankConfig,
    bits_per_weight,
    block_formats,
    float_formats,
    lorc,
    svd,
)
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
from llmlab.models import course_model, real_model
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# A matrix of $m \times n$ weights as a product $A B$ of rank $r$ holds $r (m + n)$ numbers. That saves something only below the break-even rank,
# $mn / (m + n)$. As an addition to 4-bit weights, however, a small product is almost free. All linears of Llama 2 70B, in MXFP4, a
# 4-bit float format that is explained below:

# %%
c = preset("llama-2-70b")
d, ffn, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
shapes = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn)]
print(f"break-even rank of {d} × {d}: {svd.break_even(d, d):.0f}")
for rank in (0, 8, 32):
    config = LowRankConfig(MXFP4, rank)
    bits = sum(bits_per_weight(config, m, n) * m * n for m, n in shapes)
    size = c.num_hidden_layers * bits / 8 / 1e9
    print(f"MXFP4 and factors of rank {rank:2}: {size:.2f} GB")

# %% [markdown]
# The last two lines are what a repair may cost. What can so little do?
#
# ## Predict
#
# One linear of the real model, SmolLM2-135M-Instruct: the `up_proj` of its first layer, 1,536 rows of 576 weights. It is rounded to MXFP4, and a product of two
# factors of rank 8, in 8 bits, is added to make up for the errors. There are two best ones: one brings the *weights* back nearest, the other the layer's *outputs*. The *output
# error* is what is still wrong in these outputs, on text that no method has seen. With the inputs as the columns of $X$ it is
# $\lVert WX - \hat WX \rVert^2 / \lVert WX \rVert^2$. Then the whole model: rounding all its linears to MXFP4 adds some loss.

# %%
layer_guess = predict(
    "Best factors for the weights: how much of the output error is left?",
    unit="%",
)
model_guess = predict(
    "Whole model, best factors for the outputs: how much added loss is left?",
    unit="%",
)

# %% [markdown]
# ## By hand
#
# Rounding a $2 \times 2$ matrix has left the errors $E = \begin{pmatrix} 0.3 & 0.3 \\ -0.1 & 0.1 \end{pmatrix}$. Its rows are at right angles, so each row is one term of
# the SVD. A product of rank 1 can take away one of them. The larger one, surely?
#
# The inputs decide. Say that the second input is nearly the first with the other sign: $X X^\top = \begin{pmatrix} 1 & -0.9 \\ -0.9 & 1 \end{pmatrix}$.
#
# | left over | $\lVert \cdot \rVert^2$ of the weights | $\lVert \cdot X \rVert^2$ of the outputs |
# |---|---|---|
# | first row, (0.3, 0.3) | 0.09 + 0.09 = 0.18 | 0.09 + 0.09 − 2 · 0.9 · 0.09 = 0.018 |
# | second row, (−0.1, 0.1) | 0.01 + 0.01 = 0.02 | 0.01 + 0.01 + 2 · 0.9 · 0.01 = 0.038 |
#
# The first row's errors are three times as large and cancel in the outputs. Whoever looks at the weights repairs the wrong row.

# %%
E = torch.tensor([[0.3, 0.3], [-0.1, 0.1]])
gram = torch.tensor([[1.0, -0.9], [-0.9, 1.0]])
for name, (A, B) in {
    "best for the weights": svd.truncate(E, 1),
    "best for the outputs": svd.truncate_whitened(E, gram, 1),
}.items():
    left = E - A @ B
    outputs = (left @ gram * left).sum()  # ‖left X‖², by X Xᵀ alone
    print(f"{name}: weights {left.square().sum():.3f}, outputs {outputs:.3f}")

# %% [markdown]
# ## The idea
#
# How much is left of a matrix, as a share of its squared norm, when the first $r$ terms of its SVD are taken away? Four matrices of one layer: the weights $W$, the errors $E$ of rounding them to
# MXFP4, and both after *whitening*, that is, as the outputs see them.

# %% tags=["hide-input", "numbers-within-5%"]
model = real_model.load()
encode = real_model.load_tokenizer().encode
seen_text = course_model.corpus("addresses", "train")[:100_000]
other_text = course_model.corpus("addresses", "valid")[:8_000]
train = torch.tensor(encode(seen_text).ids)
held_out = torch.tensor(encode(other_text).ids)[None, :1024]
NAMES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
block = next(iter(calibration.blocks(model).values()))
linears = {name: block.get_submodule(name) for name in NAMES}


def statistics(batches):
    """X Xᵀ of four linears of the first layer."""
    calls = calibration.first_calls(model, batches)
    read = calibration.collect(linears, lambda: calibration.next_calls(block, calls))
    return {name: seen.gram for name, seen in read.items()}


judge = statistics([held_out])
grams = statistics(calibration.sample(train, length=256, count=8, seed=0))

W = linears["mlp.up_proj"].weight.detach()
E = W - block_formats.round_to(W, MXFP4)
G = grams["mlp.up_proj"]
S = svd.whitening(G / G.diagonal().mean(), damping=0.01)
curves = {
    "weights W": (W, palette.gray, "-"),
    "errors E": (E, palette.vermillion, "--"),
    "W, whitened": (W @ S, palette.green, "-"),
    "E, whitened": (E @ S, palette.blue, "--"),
}
fig, ax = plt.subplots(figsize=(4.8, 3.0))
for name, (matrix, color, style) in curves.items():
    energy = torch.linalg.svdvals(matrix).square()
    share = 1 - energy.cumsum(0) / energy.sum()
    ax.plot(range(1, 65), share[:64], style, color=color, label=name)
    print(f"{name:12} rank 8 leaves {share[7]:.0%}, rank 32 {share[31]:.0%}")
ax.set(xlabel="rank taken away", ylabel="share of the square left", ylim=(0, 1.04))
ax.legend(loc="lower left", fontsize="small")
figure(
    fig,
    alt=(
        "Share that is left against the rank taken away, up to 64. Weights and errors"
        " fall slowly and together, to nearly three quarters. Whitened weights fall to"
        " less than half, whitened errors to under a third, most of it within the first"
        " few ranks."
    ),
)

# %% [markdown]
# **Eckart–Young** ([1936](https://doi.org/10.1007/BF02288367 "eckart1936approximation")). With $W = U \Sigma V^\top$, no matrix of rank $r$ is nearer to $W$ than
# its first $r$ terms. They are a product of two thin matrices, and what is left is known beforehand:
#
# $$A = U_r \Sigma_r^{1/2} \qquad B = \Sigma_r^{1/2} V_r^\top \qquad \lVert W - A B \rVert^2 = \sum_{i > r} \sigma_i^2$$
#
# **LoRC** ([Yao et al. 2023](https://arxiv.org/abs/2303.08302 "yao2023zeroquantv2"); [Wu et al. 2023](https://arxiv.org/abs/2307.09782 "wu2023zeroquantfp") with FP4)
# rounds first, and takes these factors of the error $E = W - \hat W$. The layer then computes $\hat W x + A (B x)$.
#
# **Whitening** ([Wang et al. 2024](https://arxiv.org/abs/2403.07378 "wang2024svdllm")). A layer needs $E X$ to be small, not $E$. With the
# Cholesky factor $S S^\top = X X^\top$ we have $\lVert M X \rVert = \lVert M S \rVert$ for every $M$. So the theorem applies to $E S$, and $S$ is taken out again:
#
# $$E S = U \Sigma V^\top \qquad A = U_r \Sigma_r^{1/2} \qquad B = \Sigma_r^{1/2} V_r^\top S^{-1}$$
#
# This is the optimum, not an estimate. Below, LoRC with these factors is called *aware*. (First a little is added to the diagonal of $X X^\top$, the *damping*, so
# that it has an inverse.) ASVD ([Yuan et al. 2023](https://arxiv.org/abs/2312.05821 "yuan2023asvd")) came near it with a diagonal $S$;
# [EoRA](https://arxiv.org/abs/2410.21271 "liu2024eora") uses another root of $X X^\top$ on errors, with the same result.
#
# The figure says why this may work. Rounding errors are noise: as a matrix they have no favourite direction. But the inputs have. A few directions carry most of
# what a layer reads, and there the errors can be taken away.
#
# ## Your turn
#
# The factors that change the outputs least: decompose $W S$, keep the largest $r$ terms, and see to it that $A B S$ is what you kept. `gram` is $X X^\top$.


# %%
def truncate_whitened(W, gram, rank: int):
    """A (out, rank) and B (rank, in)."""
    raise NotImplementedError("five lines of yours")


your_turn(check.truncate_whitened, truncate_whitened)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(W, gram, rank):
    S = torch.linalg.cholesky(gram)
    U, sigma, Vt = torch.linalg.svd(W @ S, full_matrices=False)
    A = U[:, :rank] * sigma[:rank]
    B = Vt[:rank] @ torch.linalg.inv(S)
    return A, B


your_turn(check.truncate_whitened, one_answer)

# %% [markdown]
# ## Small floats
#
# What is $\hat W$? Chips of today multiply floats of 8 and 4 bits. **E4M3** has 4 exponent bits and 3 mantissa bits, **E5M2** 5 and 2, and **E2M1**, the usual
# FP4, has 2 and 1: its levels are 0, 0.5, 1, 1.5, 2, 3, 4 and 6. They lie close together near 0, where most weights are, and far apart at the end.
#
# So small a range needs a scale for each block of weights. **MXFP4** ([OCP 2023](https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf "ocp2023microscaling"))
# shares a power of two among 32 weights $v$: $s = 2^{\lfloor \log_2 \max |v| \rfloor - 2}$, stored as its exponent in one byte (E8M0). The largest $|v| / s$ of a block
# then lies between 4 and 8, where the largest level is, 6; what is above 6 is clipped. **MXFP8** is the same with E4M3. **NVFP4** shares
# a scale in E4M3 among 16 weights, and a float32 among all.
#
# Below are the levels of E2M1 and of INT4, and what the formats make of 7, −5, 1.2, 0.6 and 0.2 in one block. The third line shares a float16 scale among 64 weights.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 1.5))
lines = {"INT4": torch.arange(-7, 8) / 7, "E2M1": float_formats.levels(E2M1) / 6}
for y, (name, at) in enumerate(lines.items()):
    color = palette.blue if name == "E2M1" else palette.gray
    ax.plot(at, [y] * len(at), "|", markersize=16, color=color)
ax.set_yticks([0, 1], list(lines))
ax.set(ylim=(1.6, -0.6), xlabel="weight, as a share of the block's largest")
figure(
    fig,
    alt=(
        "Two number lines from −1 to 1. INT4 has 15 levels in equal steps; E2M1 has 15,"
        " in steps of a twelfth near 0 and of a third at the ends."
    ),
)

formats = {"MXFP4": MXFP4, "NVFP4": NVFP4, "FP4, float16 scales": FP4, "MXFP8": MXFP8}
V = torch.tensor([[7.0, -5.0, 1.2, 0.6] + [0.2] * 60])
for name, kind in formats.items():
    shown = block_formats.round_to(V, kind)[0, :5].tolist()
    values = " ".join(f"{value:6.2f}" for value in shown)
    print(f"{name:20} {block_formats.bits_per_weight(kind):.2f} bits  {values}")

# %% [markdown]
# ## The code
#
# | value | shape | holds |
# |---|---|---|
# | `S` | (in, in) | lower Cholesky factor of the damped $X X^\top$ |
# | `A`, `B` | (out, r), (r, in) | both in 8 bits, with a scale per column of $A$ and row of $B$ |
# | `codes`, `scale` | (out, in), (out, in / 32) | elements and the exponents of their blocks |

# %% tags=["hide-output"]
show(svd.truncate_whitened, lorc.lorc, float_formats.round_to, block_formats.encode)

# %% [markdown]
# ## Against mathematics and the libraries
#
# What is left must be the singular values that were left out. Floats must be PyTorch's to the last bit, and blocks those that other programs read.

# %%
torch.manual_seed(0)
M = torch.randn(20, 30, dtype=torch.float64)
X = torch.randn(30, 30, dtype=torch.float64) @ torch.randn(30, 90, dtype=torch.float64)
A, B = svd.truncate(M, 5)
compare((M - A @ B).norm(), torch.linalg.svdvals(M)[5:].norm(), "Eckart–Young")
A, B = svd.truncate_whitened(M, X @ X.T, 5)
least = torch.linalg.svdvals(M @ X)[5:].norm()
compare(((M - A @ B) @ X).norm(), least, "whitened: what the outputs lose", tol=1e-6)

x = 100 * torch.randn(10_000)
for kind, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
    inside = x.clamp(-kind.top, kind.top)
    codes = float_formats.encode(inside, kind)
    compare(codes, inside.to(dtype).view(torch.uint8), str(dtype), tol=0)
stored = block_formats.encode(W, MXFP4)
halves = stored.codes.reshape(-1, 2, 16)  # gguf puts elements i and i + 16 in byte i
packed = torch.cat([stored.scale.reshape(-1, 1), halves[:, 0] | halves[:, 1] << 4], 1)
kind = gguf.GGMLQuantizationType.MXFP4
read = gguf.quants.dequantize(packed.reshape(len(W), -1).numpy(), kind)
compare(block_formats.decode(stored, MXFP4), read, "MXFP4, as gguf reads it", tol=0)

# %% tags=["hide-cell"]
# Specification, libraries, ours: the scale of a block by its largest value, and ties.
tops = [4.0, 6.0, 6.5, 7.0, 7.9, 8.0]
blocks = torch.zeros(len(tops), 32)
blocks[:, 0] = torch.tensor(tops)


def exponents(rule: str):
    kind = block_formats.with_rule(MXFP4, rule)
    return (block_formats.encode(blocks, kind).scale[:, 0].int() - 127).tolist()


cast = (blocks[:, 0] / 4).to(torch.float8_e8m0fnu).float().log2().int().tolist()
tie = torch.tensor([[0.75, 4.0] + [0.0] * 30])
theirs = gguf.quants.dequantize(gguf.quants.quantize(tie.numpy(), kind), kind)
print("largest value of a block       ", *(f"{top:5}" for top in tops))
for name, found in {
    "specification, gguf, ours": exponents("floor"),
    "compressed-tensors*": exponents("carry"),
    "never clipped": exponents("ceil"),
    f"torch {torch.__version__[:4]}, cast to E8M0": cast,
}.items():
    print(f"{name:31}", *(f"{2**exponent:5}" for exponent in found))
ours = block_formats.round_to(tie, MXFP4)[0, 0].item()
print(f"0.75, between 0.5 and 1: ours {ours}, gguf {theirs[0, 0]}")
print("* our `carry` rule; its bytes equal those of 0.19.0, as our tests check")

# %% [markdown]
# <details><summary>For the curious: four ways to a scale</summary>
#
# The specification rounds the scale down, and clips. compressed-tensors first rounds the maximum as if it had one mantissa bit, so that from 7 on the scale doubles.
# PyTorch's cast to E8M0 goes to the nearest power of two, and drops a minus sign. For ties gguf takes the smaller level, all others the even code. Nor is every "FP4"
# E2M1: bitsandbytes' type of that name has another smallest level. Files of one name, written by two programs, hold different bytes; both read well.
#
# </details>
#
# ## The experiment
#
# First, layers. The model reads 2,048 tokens of State of the Union addresses for $X X^\top$, and held-out addresses judge. What is left of the output error of MXFP4 when
# factors of rank 8 in 8 bits are added?

# %% tags=["hide-output", "numbers-within-5%"]
left = {}
print(f"{'':18}{'MXFP4':>8}{'LoRC':>8}{'aware LoRC':>12}")
for name, linear in linears.items():
    W = linear.weight.detach()
    errors = []
    for config in (
        LowRankConfig(MXFP4, 0),
        LowRankConfig(MXFP4, 8),
        LowRankConfig(MXFP4, 8, aware=True),
    ):
        found = lorc.lorc(W, config, grams[name])
        errors.append(svd.output_error(W, found.weight, judge[name]))
    left[name] = [error / errors[0] for error in errors]
    print(f"{name:18}{errors[0]:8.2%}{left[name][1]:8.0%}{left[name][2]:12.1%}")

with FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def grown(kind: str, method: str, rank: int, seed: int = 0, inputs: str = "float"):
    """By how much the loss grew, twice its standard error, and the bits per weight."""
    asked = (kind, method, str(rank), str(seed), inputs)
    keys = ("format", "method", "rank", "seed", "inputs")
    run = next(run for run in runs if tuple(run[key] for key in keys) == asked)
    return float(run["grown"]), 2 * float(run["grown_error"]), float(run["bits"])


share = grown("mxfp4", "aware", 8)[0] / grown("mxfp4", "lorc", 0)[0]
layer_guess.settle(100 * left["mlp.up_proj"][1], digits=2)
model_guess.settle(100 * share, digits=2)

# %% [markdown]
# LoRC hardly helps the MLP: the error is noise, and eight terms of noise are little. With the inputs known the same eight terms do far more. In attention
# nearly all is repaired: what these linears read lies in a few directions, and the factors cover them.
#
# Now all 210 linears. These runs take a minute each, so they are stored; `scripts/low_rank_sweep.py` made them. Judged on 2,048 tokens of held-out addresses.

# %% tags=["hide-input"]
KINDS = {
    "int4 row": "INT4, scale per row",
    "mxfp4": "MXFP4",
    "int4 g64": "INT4, groups of 64",
    "nvfp4": "NVFP4",
}
METHODS = {
    "rounded": ("lorc", 0, palette.vermillion, "s"),
    "LoRC, rank 8": ("lorc", 8, palette.gray, "o"),
    "aware LoRC, rank 8": ("aware", 8, palette.blue, "D"),
}
fig, ax = plt.subplots(figsize=(4.8, 3.1))
for label, (method, rank, color, marker) in METHODS.items():
    found = [grown(kind, method, rank) for kind in KINDS]
    losses, spreads, bits = zip(*found, strict=True)
    ax.errorbar(
        losses, range(len(KINDS)), xerr=spreads, fmt=marker, color=color, label=label
    )
    for name, loss, spread, size in zip(KINDS, losses, spreads, bits, strict=True):
        print(f"{KINDS[name]:20} {label:19} {size:.2f} bits  {loss:.3f} ± {spread:.3f}")
ax.set_yticks(range(len(KINDS)), list(KINDS.values()))
ax.set(xlabel="loss added, nats per token", xlim=(0, None))
ax.set_ylim(len(KINDS) - 0.5, -0.5)
ax.legend(fontsize="small", loc="lower right")
other = grown("mxfp4", "aware", 8, seed=1)
print(f"MXFP4, aware, calibrated on another draw: {other[0]:.3f} ± {other[1]:.3f}")
bible = grown("mxfp4", "aware bible", 8)
print(f"MXFP4, aware of the Bible: {bible[0]:.3f} ± {bible[1]:.3f}")
figure(
    fig,
    alt=(
        "Loss added by four 4-bit formats. Rounded: 0.7 for INT4 with a scale per row,"
        " 0.4 for MXFP4 and INT4 in groups, 0.2 for NVFP4. LoRC of rank 8 takes away a"
        " fifth to a quarter, of NVFP4's next to nothing; aware LoRC takes away more"
        " than half of each, and leaves about 0.1 for all but INT4 with one per row."
    ),
)

# %% [markdown]
# Does rank 8 repair 4 bits? As published, with factors for the weights: a part, and for NVFP4 nothing beyond the spread.
# With factors for the outputs: more than half of it for every format, at the same 0.2 bits per weight, and by far more than the spread. INT4 with one
# scale per row, and aware, beats MXFP4 with plain LoRC. The last two lines change the calibration text: another draw changes little, and the Bible in place of
# addresses costs part of the gain.
#
# The rest of the sweep: is more rank worth its bits, may inputs be FP8 as in ZeroQuant-FP, and can factors do without $\hat W$?

# %% tags=["hide-input"]
for words, asked in {
    "MXFP4, aware, rank 8": ("mxfp4", "aware", 8),
    "MXFP4, aware, rank 32": ("mxfp4", "aware", 32),
    "MXFP4, LoRC, rank 32": ("mxfp4", "lorc", 32),
    "FP4, groups of 64": ("fp4 g64", "lorc", 0),
    "FP4, LoRC, rank 8": ("fp4 g64", "lorc", 8),
    "A B alone, SVD": ("none", "svd", 0),
    "A B alone, whitened SVD": ("none", "svd aware", 0),
}.items():
    loss, spread, bits = grown(*asked)
    factor = f"perplexity × {math.exp(loss):.3g}"
    print(f"{words:30} {bits:.2f} bits  {loss:.2f} ± {spread:.2f}  {factor}")

up = linears["mlp.up_proj"]
inputs = []
hook = up.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
calibration.next_calls(block, calibration.first_calls(model, [held_out]))
hook.remove()
outputs = inputs[0] @ up.weight.detach().T
lost = lorc.round_tokens(inputs[0], E4M3) @ up.weight.detach().T - outputs
share = (lost.square().sum() / outputs.square().sum()).item()
print(f"up_proj, floats, with FP8 inputs: output error {share:.2%}")

# %% [markdown]
# At the same 4.25 bits FP4 with float16 scales adds less loss than MXFP4: what separates the two is the size of the blocks and the precision of their
# scales, and a power of two, cheap for the chip, is a coarse one. Where the scales are fine, plain LoRC finds little to repair, since what is left is noise.
#
# Inputs in FP8, with a scale per token, cost a small part of what MXFP4 did to this layer. Factors alone, at the bytes of 4-bit weights, ruin the model. Whitening saves most of what plain SVD destroys,
# and is still far worse than the crudest rounding: weights are not of low rank, and for a layer Eckart–Young says that no better factors exist.
#
# The file that this model was made from stored its linears in 4 bits once, on other levels than any of these; so no format here finds its work done.
#
# ## Play
#
# The `up_proj` again: what rank, for which rounding? Factors have 8 bits, and the axis counts all that is stored.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
RANKS = [0, 4, 8, 16, 32, 64]
ROUNDED = {"INT4 per row": QuantConfig(4, per="row"), "MXFP4": MXFP4}
CHOICES = [f"{name}, {how}" for name in ROUNDED for how in ("LoRC", "aware")]
W = linears["mlp.up_proj"].weight.detach()
tried = {}
for name, grid in ROUNDED.items():
    base = lorc.rounded(W, grid).weight
    for how in ("LoRC", "aware"):
        if how == "LoRC":
            A, B = svd.truncate(W - base, max(RANKS))
        else:
            A, B = svd.truncate_whitened(W - base, G, max(RANKS), damping=0.01)
        for rank in RANKS:
            W_hat = base
            if rank:
                a, b = lorc.stored_factors(A[:, :rank], B[:rank], 8)
                W_hat = base + a @ b
            bits = bits_per_weight(LowRankConfig(grid, rank), *W.shape)
            error = svd.output_error(W, W_hat, judge["mlp.up_proj"])
            tried[f"{name}, {how}", rank] = (bits, error)


def draw(rounding: str, rank: int):
    fig, ax = plt.subplots(figsize=(4.8, 2.6))
    bits, errors = zip(*(tried[rounding, r] for r in RANKS), strict=True)
    ax.plot(bits, [100 * error for error in errors], color=palette.light)
    bits, error = tried[rounding, rank]
    ax.plot(bits, 100 * error, "o", color=palette.blue, markersize=9)
    ax.axhline(1.2, color=palette.vermillion, linestyle="--")
    ax.set(xlim=(3.9, 6.0), ylim=(0, 4.8))
    ax.set(xlabel="bits per weight", ylabel="output error, %")
    ax.set_title(f"{bits:.2f} bits, output error {error:.2%}")
    return fig


good = {key: bits for key, (bits, error) in tried.items() if error < 0.012}
fewest = min(good.values())


def missing(rounding: str, rank: int) -> str:
    if (rounding, rank) not in good:
        return f"the error is {tried[rounding, rank][1]:.2%}."
    return "fewer bits do it." if good[rounding, rank] > fewest else ""


explore(
    draw,
    alt=lambda rounding, rank: (
        f"{rounding}, rank {rank}: {tried[rounding, rank][0]:.2f} bits per weight,"
        f" output error {tried[rounding, rank][1]:.2%}."
    ),
    title="Bits for rank",
    challenge="Get below an output error of 1.2%, with the fewest bits.",
    missing=missing,
    start={"rounding": CHOICES[0], "rank": 8},
    rounding=CHOICES,
    rank=RANKS,
)

# %% [markdown]
# ## At scale
#
# The wider a layer, the cheaper its factors: rank 8 in 8 bits adds $64 (m + n) / mn$ bits per weight and two scales per rank, and the share falls as layers grow. And what
# MXFP4 takes can be checked against a model that was published in it. gpt-oss-120b has 36 layers of 128 experts in MXFP4, each with $3 \cdot 2880^2$ weights; the rest
# of its 116.8 billion weights has 16 bits ([OpenAI 2025](https://arxiv.org/abs/2508.10925 "openai2025gptoss")).

# %%
experts = 36 * 128 * 3 * 2880**2
rest = 116.8e9 - experts
size = (experts * block_formats.bits_per_weight(MXFP4) + rest * 16) / 8 / 1024**3
off = 0.05e9 * 16 / 8 / 1024**3  # as 116.8 is rounded
print(f"gpt-oss-120b: published 60.8 GiB, counted {size:.1f} ± {off:.1f} GiB")
for width in (576, 4096, 16384):
    extra = bits_per_weight(LowRankConfig(MXFP4, 8), width, width) - 4.25
    print(f"rank 8 in a layer of {width} × {width}: {extra:.3f} bits per weight")

# %% [markdown]
# On a GPU, llmcompressor writes these formats (`MXFP4A16`, `NVFP4A16`) and vLLM serves them:
#
# ```python
# from llmcompressor import oneshot
# from llmcompressor.modifiers.quantization import QuantizationModifier
#
# recipe = QuantizationModifier(
#     targets="Linear", scheme="NVFP4A16", ignore=["lm_head"]
# )
# oneshot(model="meta-llama/Llama-2-7b-hf", recipe=recipe, output_dir="llama-nvfp4")
# ```
#
# Factors for the outputs are in GPTQModel, as EoRA. Ours walks any Llama of `transformers`:
# `low_rank.apply(model, LowRankConfig(MXFP4, 8, aware=True), batches, store=True)`, and `save` and `load` take what it stores to disk and back.
#
# ## What to keep
#
# ```python
# S = torch.linalg.cholesky(X @ X.T)                    # ‖M X‖ = ‖M S‖ for every M
# E = W - W_hat                                         # what rounding lost
# U, sigma, Vt = torch.linalg.svd(E @ S, full_matrices=False)
# A = U[:, :rank] * sigma[:rank]
# B = Vt[:rank] @ torch.linalg.inv(S)                   # y = Ŵ x + A (B x)
# ```
#
# **Use it** to repair 4-bit weights when you can spare a fraction of a bit and have some thousand tokens; rank 8 to 32 is enough. **Not** in place of rounding: weights
# are not of low rank. And the second product takes time: two more matrices per layer must be read, however thin they are.
#
# <details><summary>Why does LoRC gain little from eight terms, and aware LoRC much?</summary>
#
# The error of rounding is spread evenly over all directions. The inputs are not: in the few directions that they use most, eight terms are many.
#
# </details>
#
# <details><summary>Why may any S with S Sᵀ = X Xᵀ be used?</summary>
#
# ‖M X‖² is the trace of M X Xᵀ Mᵀ, which knows of X only through X Xᵀ.
#
# </details>
#
# <details><summary>Which weights does MXFP4 clip, and why does NVFP4 clip none?</summary>
#
# Those above 6 times the scale, as the scale is a power of two, rounded down. NVFP4's scale has a mantissa and is chosen so that the maximum becomes about 6.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/14-low-rank.ipynb).
#
# Further reading: [Micikevicius et al. 2022](https://arxiv.org/abs/2209.05433 "micikevicius2022fp8") define FP8;
# [Zhang et al. 2024](https://arxiv.org/abs/2402.02446 "zhang2024lqer") scale the errors by a diagonal, between LoRC and what we do.
