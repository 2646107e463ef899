# %% [markdown]
# # ZeroQuant
#
# Three ideas for integers in every linear layer: a scale for each block of the weights, a scale for each token, made on the spot, and, where 4 bits are too coarse, each
# layer learns to be its own float self, one layer at a time. The first two need no data at all. This page measures on a real model what each
# of them is worth, and at the end you own the loop that distils a layer.

# %% tags=["hide-input"]
import csv
import math
from copy import deepcopy
from importlib import metadata

import torch

from llmlab.checks.compression.zeroquant import check
from llmlab.compression import calibration, gptq, zeroquant
from llmlab.compression.gptq import GPTQConfig
from llmlab.compression.llm_int8 import inputs_of
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.compression.zeroquant import (
    LKDConfig,
    Student,
    ZeroQuantConfig,
    ZeroQuantLinear,
)
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
# Rounding to 4 bits breaks much, and training can mend it. But training wants memory: beside each 16-bit weight a float32 copy, a float32 gradient and
# Adam's two moments, 16 bytes, and for distillation the float model as a teacher.

# %%
shape = preset("llama-2-7b")
layer = sum(
    rows * columns for rows, columns in accounting.linear_shapes(shape).values()
)
whole = accounting.parameters(shape)
rest = whole - layer * shape.num_hidden_layers
costs = zeroquant.training_bytes(layer, shape.num_hidden_layers, rest)
for what, size in costs.items():
    print(f"Llama 2 7B, {what:24} {size / 1e9:6.1f} GB")

# %% [markdown]
# A layer at a time, distillation hardly costs more memory than running the model. Is it as good?
#
# ## Predict
#
# The model is SmolLM2-135M-Instruct, judged on 1,024 tokens of held-out State of the Union addresses. First all its 210 linears get weights and inputs in 8 bits (W8A8). Then the weights of
# its feed-forward networks, three quarters of each layer, go down to 4 bits (W4/8A8), with a scale for each row, and each layer is distilled on 2,048 tokens.

# %%
int8_guess = predict(
    "W8A8, without any data: by how much does perplexity grow?", unit="%"
)
lkd_guess = predict(
    "W4/8A8: how much of the loss that rounding costs does distillation undo?", unit="%"
)

# %% [markdown]
# ## By hand
#
# **A scale for each token.** Two tokens, three features, 4 bits, so codes from −7 to 7. The second token is loud.
#
# | token | one scale for both, 42 / 7 = 6 | a scale each |
# |---|---|---|
# | 1, −3.5, 0.5 | codes 0, −1, 0: **0, −6, 0** | 3.5 / 7 = 0.5, codes 2, −7, 1: **1, −3.5, 0.5** |
# | 42, −12, 6 | codes 7, −2, 1: 42, −12, 6 | the same |
#
# **A step of distillation.** Two weights, 0.45 and 0.3, and whole numbers as levels. The input is (1, 1): the teacher says 0.75, the student, who rounds, 0. The squared error is $0.75^2 = 0.5625$.
# Straight through, its gradient is $2 (0 - 0.75) \cdot 1 = -1.5$ for both weights. A step of 0.05 takes them to 0.525 and 0.375. Now the first rounds to 1: the student says 1, and the error is
# $0.25^2 = 0.0625$. The first level is no longer the one nearest to 0.45, but together the two are nearer to what the teacher says.

# %%
X = torch.tensor([[1.0, -3.5, 0.5], [42.0, -12.0, 6.0]])
for scales in ("tensor", "token"):
    config = ZeroQuantConfig(activation_bits=4, activation_scales=scales)
    codes, s_x = zeroquant.quantize_tokens(X, config)
    print(f"a scale per {scales:6}", (codes * s_x)[0].tolist())

w = torch.tensor([0.45, 0.3], requires_grad=True)
for _ in range(2):
    w_hat = w + (torch.round(w) - w).detach()  # straight through
    error = (w_hat.sum() - 0.75) ** 2
    (gradient,) = torch.autograd.grad(error, w)
    print(f"levels {w_hat.tolist()}  error {error.item():.4f}")
    w = (w - 0.05 * gradient).detach().requires_grad_()

# %% [markdown]
# ## The idea
#
# Above: who shares a scale, in a weight of 8 rows and 16 columns, and how many scales there are. Below: layer 3 learns.

# %% tags=["hide-input"]
fig, axes = plt.subplots(2, 2, figsize=(4.8, 3.0))
ROWS, COLUMNS = torch.arange(8)[:, None], torch.arange(16)[None]
SHARED = {
    "per matrix": 0 * ROWS + 0 * COLUMNS,
    "the paper's groups": ROWS // 2 + 0 * COLUMNS,
    "per row": ROWS + 0 * COLUMNS,
    "groups of 4 columns": 4 * ROWS + COLUMNS // 4,
}
for ax, (name, who) in zip(axes.flat, SHARED.items(), strict=True):
    ax.imshow((who * 0.618) % 1, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    ax.set_title(f"{name}: {int(who.max()) + 1}", fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
figure(
    fig,
    alt=(
        "Four pictures of one weight, coloured by scale: one colour for all; four bands"
        " of two rows; a colour for each row; and four runs of four columns in each"
        " row, 32 colours."
    ),
)

fig, ax = plt.subplots(figsize=(4.8, 2.1))
ax.set(xlim=(0, 10.4), ylim=(0, 4.4))
ax.axis("off")
BOXES = (
    (0.2, 1.5, "L₁", palette.gray),
    (2.2, 1.5, "L₂", palette.gray),
    (4.9, 2.8, "L₃", palette.blue),
    (4.9, 0.3, "L̂₃", palette.vermillion),
    (7.6, 1.5, "L₄", palette.light),
    (9.3, 1.5, "…", palette.light),
)
for x, y, name, color in BOXES:
    ax.add_patch(plt.Rectangle((x, y), 1.1, 1.1, color=color))
    ink = palette.gray if color == palette.light else "white"
    ax.text(x + 0.55, y + 0.55, name, ha="center", va="center", fontsize=12, color=ink)
arrow = {"arrowstyle": "->", "linewidth": 1.6, "color": palette.gray}
for start, end in (
    ((1.3, 2.05), (2.2, 2.05)),
    ((3.3, 2.05), (4.9, 3.3)),
    ((3.3, 2.05), (4.9, 0.85)),
):
    ax.annotate("", end, start, arrowprops=arrow)
ax.text(3.75, 1.93, "h")
ax.annotate("", (5.45, 1.45), (5.45, 2.75), arrowprops={**arrow, "arrowstyle": "<->"})
ax.text(5.6, 1.93, "MSE")
ax.text(6.2, 3.2, "teacher: floats", color=palette.blue)
ax.text(6.2, 0.55, "student: trains", color=palette.vermillion)
figure(
    fig,
    alt=(
        "Boxes L1 and L2 put out h, which enters two boxes: the teacher L3 above and"
        " the student L3 with a hat below. Between their outputs stands MSE. The layers"
        " after them are pale: they take no part."
    ),
)

# %% [markdown]
# [Yao et al. 2022](https://arxiv.org/abs/2206.01861 "yao2022zeroquant") put it together for large models.
#
# **Group-wise weights, token-wise activations.** $Q$ are codes, $s_x$ is the scale of a token, $s_{w,g}$ that of a group of weights:
#
# $$X W^\top \approx s_x \cdot \sum_g s_{w,g} \; Q_{x,g} \, Q_{w,g}^\top \qquad s_x = \max_i |x_i| \, / \, (2^{b-1} - 1)$$
#
# $s_x$ is made from the token itself, so nobody has to calibrate, and a loud token spoils no other. What the paper calls a group is a number of
# equal parts of the *whole matrix*: with fewer groups than rows, several rows share a scale. Today's groups are runs of columns within a row, and each
# of them needs its own sum of integers. Both are in the formula; the figure shows how far they are apart.
#
# **Layer-by-layer knowledge distillation** (LKD). Layer $k$ is replaced by a student $\hat L_k$, which rounds its weights and inputs:
#
# $$\min_{\hat L_k} \; \mathrm{MSE}\bigl(L_k(h), \; \hat L_k(h)\bigr) \qquad h = L_{k-1} \cdots L_1(X)$$
#
# Only one layer has gradients and moments. The teacher is the layer itself. No label is needed, so $X$ can be any tokens. And nothing after layer $k$ is computed: training all
# layers costs about as much as the forward and backward passes of the whole model, a layer at a time. Rounding has no
# gradient; the [straight-through estimator](https://arxiv.org/abs/1308.3432 "bengio2013estimating") takes that of the identity.
#
# ## Your turn
#
# Distil one layer. `teacher(h)` computes with floats, `student(W, h)` rounds the float weights $W$ first and goes straight through. For each $h$: the mean squared error, then one plain gradient step on
# $W$. Neither change nor train the teacher. Return $W$ without a gradient.


# %%
def distill_layer(W, student, teacher, inputs, learning_rate):
    """The float weights after one step for each h in inputs."""
    raise NotImplementedError("seven lines of yours")


your_turn(check.distill_layer, distill_layer)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(W, student, teacher, inputs, learning_rate):
    for h in inputs:
        with torch.no_grad():
            target = teacher(h)
        W = W.detach().requires_grad_()
        loss = (student(W, h) - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, W)
        W = W - learning_rate * gradient
    return W.detach()


your_turn(check.distill_layer, one_answer)

# %% [markdown]
# ## The code
#
# The package trains with Adam, all parameters of the layer, norms as well. `apply` puts in layers that hold codes and multiply integers.
#
# | value | shape | type |
# |---|---|---|
# | `Q_x`, `s_x` | (tokens, in), (tokens, 1) | int8, float32 |
# | `Q_w`, `s_w` | (out, in), (out, groups) | int8, float16 when stored |
# | `sums`, within a group | (tokens, out) | int32 |
# | `h`, `target` | (batch, seq, hidden) | float |

# %% tags=["hide-output"]
show(
    zeroquant.quantize_tokens,
    zeroquant.integer_product,
    zeroquant.Student,
    zeroquant.train_layer,
    zeroquant.distill,
)

# %% [markdown]
# ## Against mathematics and the libraries
#
# The gradient through rounding is that of torch's own fake quantization. The gradient of LKD for one linear has a closed form, $\frac{2}{N} (\hat X \hat W^\top - Y)^\top \hat X$.
# And the layer that multiplies integers computes what the student did while it trained.

# %%
torch.manual_seed(0)
per_row = ZeroQuantConfig(group_size=None)
W, X, Y = torch.randn(6, 24), torch.randn(9, 24), torch.randn(9, 6)
leaf = W.clone().requires_grad_()
_, scale = zeroquant.quantize_weight(W, 4, per_row)
zero = torch.zeros(6, dtype=torch.int32)
theirs = torch.fake_quantize_per_channel_affine(leaf, scale, zero, 0, -7, 7)
ours = zeroquant.fake_quantize_weight(leaf, 4, per_row)
compare(ours, theirs, "levels, and torch's")
gradients = [torch.autograd.grad((v * W).sum(), leaf)[0] for v in (ours, theirs)]
compare(*gradients, "straight through, and torch's")

linear = torch.nn.Linear(24, 6, bias=False)
linear.weight.data.copy_(W)
groups = ZeroQuantConfig(group_size=8)
student = Student(linear, 4, groups)
zeroquant.lkd_loss(student, ((X,), {}), Y).backward()
codes, s_x = zeroquant.quantize_tokens(X, groups)
X_hat, W_hat = codes * s_x, zeroquant.fake_quantize_weight(W, 4, groups)
closed = 2 / Y.numel() * (X_hat @ W_hat.T - Y).T @ X_hat
compare(linear.weight.grad, closed, "LKD's gradient, in closed form")
compare(
    ZeroQuantLinear(linear, 4, groups)(X), student(X), "integers, and student", 1e-4
)

# %% [markdown]
# <details><summary>For the curious: what the authors' library does</summary>
#
# DeepSpeed had a compression library. The version installed here has none any more, as the folded cell shows. We ran 0.18.2 on a small linear, and keep its
# results in a file that our tests read.
#
# | | DeepSpeed 0.18.2 | ours |
# |---|---|---|
# | `quantize_groups` of 64, a weight of 1,536 rows | 24 whole rows share a scale | `groups=64` the same; `group_size` for columns |
# | step in 4 bits, codes | largest / 8, codes −8 … 7: the largest positive weight of a group loses an eighth | largest / 7, codes −7 … 7 |
# | a token of zeros | NaN | zeros |
# | gradient of a clipped weight | passes | nothing is clipped |
# | after `init_compression` | floats still: the scheduler switches it on | – |
# | after `redundancy_clean` | weights on levels, but inputs are floats | integers |
# | what enters a layer in LKD (their BERT example) | hidden states of the float teacher | `inputs="float"`, or `"quantized"` |
#
# </details>

# %% tags=["hide-cell"]
files = [str(file) for file in metadata.files("deepspeed") or ()]
there = any(file.endswith("deepspeed/compression/compress.py") for file in files)
print(f"deepspeed {metadata.version('deepspeed')} has init_compression: {there}")
row = torch.tensor([[0.8, -0.3, 0.1]])
step = row.abs().amax() / 8
print("4 bits, theirs:", ((row / step).round().clamp(-8, 7) * step).tolist())
print("4 bits, ours:  ", zeroquant.fake_quantize_weight(row, 4, per_row).tolist())

# %% [markdown]
# ## The experiment
#
# Whole models take a minute or more each with LKD, so the runs are stored: `scripts/zeroquant_sweep.py` made them. A dot is one draw of text to distil on; ± is two standard errors over the judged tokens.

# %% tags=["hide-output"]
with zeroquant.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def found(weights, scales="row", inputs="token", lkd="", text=""):
    """The runs of one kind, a line for each draw of text."""
    key = (weights, scales, inputs, lkd, text)
    return [run for run in runs if tuple(run.values())[:5] == key]


def factors(*key) -> list[float]:
    """By how much perplexity grows."""
    return [math.exp(float(run["grown"])) for run in found(*key)]


def undone(*key) -> list[float]:
    """The share of what rounding costs that LKD gives back, in %."""
    without = float(found(*key[:3])[0]["grown"])
    return [100 * float(run["gained"]) / without for run in found(*key)]


lkd_runs = undone("4/8", "row", "token", "float", "addresses")
int8_guess.settle(100 * (factors("8")[0] - 1), digits=2)
lkd_guess.settle(sum(lkd_runs) / len(lkd_runs), digits=2)

# %% tags=["hide-input"]
LINES = {
    "W8A8, one scale for X": ("8", "row", "tensor"),
    "W8A8, 64 groups a matrix": ("8", "64 per matrix"),
    "W8A8, per row": ("8",),
    "W4/8A8, 64 groups a matrix": ("4/8", "64 per matrix"),
    "W4/8A8, per row": ("4/8",),
    "W4/8A8, 64 columns": ("4/8", "64 columns"),
    "W4/8A16, per row": ("4/8", "row", "float"),
    "W4A8, per row": ("4",),
    "per row, LKD": ("4/8", "row", "token", "float", "addresses"),
    "64 columns, LKD": ("4/8", "64 columns", "token", "float", "addresses"),
}
fig, ax = plt.subplots(figsize=(4.8, 3.9))
for i, (name, key) in enumerate(LINES.items()):
    color = palette.blue if "LKD" in name else palette.vermillion
    ax.plot(factors(*key), [i] * len(factors(*key)), "o", color=color, alpha=0.8)
    for run in found(*key):
        factor = math.exp(float(run["grown"]))
        spread = 2 * factor * float(run["grown_error"])
        print(f"{name:27} × {factor:.2f} ± {spread:.2f}")
ax.axvline(1, color=palette.gray, linestyle="--")
ax.set_yticks(range(len(LINES)), list(LINES))
ax.set(xscale="log", xlabel="growth of perplexity, times", xlim=(0.95, 4))
ax.set_xticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
ax.minorticks_off()
ax.set_ylim(len(LINES) - 0.5, -0.5)
figure(
    fig,
    alt=(
        "By how much perplexity grows. In 8 bits with a scale for each token hardly at"
        " all, with one scale for all inputs it doubles. With feed-forward weights in 4"
        " bits: 3.5 times with 64 groups per matrix, 1.7 per row, 1.4 in groups of 64"
        " columns. With LKD, about 1.2 per row and in groups of 64 columns."
    ),
)

# %% [markdown]
# **In 8 bits the inputs decide.** One scale for all of $X$ doubles perplexity. A scale for each token costs 2 to 3%, hardly more than the spread, and no data was used. Who shares
# the scale of a weight does not matter then.
#
# **In 4 bits it is everything.** The paper's kind of groups, here 64 per matrix, makes perplexity 3.5 times as large; a scale for each row, which stores hardly more, 1.7 times.
# LKD takes the rows to about 1.2, with the same bits, and so below what groups of 64 columns reach by rounding. Begun with these groups it ends at the same place, within the spread. Inputs are hardly to blame: as floats (W4/8A16) they leave 1.6. And
# the attention, a quarter of these weights, is worth its 8 bits: with all weights in 4 bits (W4A8) perplexity doubles.
#
# A word on the subject: the file that this model was made from stored these linears in 4 bits once, with a scale and an offset for each 32 weights. These are not the levels that we round to, as
# [the first lesson](01-quantization-basics.ipynb) measures, so rounding does not find its work done; but "floats" here means that model.
#
# Whose text did the students read? Each line is as long, 2,048 tokens.

# %% tags=["hide-input"]
TEXTS = ["addresses", "bible", "its own", "random tokens"]
print("of what rounding costs, LKD gives back, and ± two standard errors")
for text in TEXTS:
    key = ("4/8", "row", "token", "float", text)
    without = float(found("4/8")[0]["grown"])
    shares = [
        f"{share:3.0f}% ± {200 * float(run['gained_error']) / without:.0f}"
        for share, run in zip(undone(*key), found(*key), strict=True)
    ]
    print(f"{text:15}", "   ".join(shares))
print(
    "after students:", [f"{s:.0f}%" for s in undone(*key[:3], "quantized", "addresses")]
)

# %% [markdown]
# Any tokens help, even random ones: "without the original data" is true. But text of the kind that the model is judged by gives back about three times as much as random tokens,
# and the Bible's old prose lies between. What the model wrote itself, from a random first token, did no better than random tokens: these are bits of advice, code and geometry, and nothing
# like an address. So LKD, too, is fitted to what it reads. Whether $h$ comes from the float layers, as in the paper, or from the finished students, as in GPTQ, makes no difference beyond the
# spread.
#
# Now one layer, live, and one linear of it beside GPTQ, which solves for the best weights instead of walking there. The same levels, a scale per row, judged on text that neither saw.

# %% tags=["hide-output", "numbers-within-5%"]
model = real_model.load()
encode = real_model.load_tokenizer().encode
train = torch.tensor(encode(course_model.corpus("addresses", "train")[:40_000]).ids)
other = torch.tensor(encode(course_model.corpus("addresses", "valid")[:4_000]).ids)
batches = calibration.sample(train, length=128, count=16)
name, teacher = next(iter(calibration.blocks(model).items()))
calls = calibration.first_calls(model, batches)
(judged,) = calibration.first_calls(model, [other[None, :256]])
with torch.no_grad():
    target = zeroquant.output(teacher, judged)


def left(student) -> float:
    """MSE on the text that was not seen."""
    with torch.no_grad():
        return zeroquant.lkd_loss(student, judged, target).item()


student = zeroquant.student_of(teacher, per_row, name)
before = left(student)
losses = zeroquant.train_layer(student, teacher, calls, LKDConfig(steps=16))
print(f"layer 1: {left(student) / before:.0%} of the error of rounding is left")

# one linear of it alone, beside the closed form: what is left on the other text
up, four_bits = teacher.mlp.up_proj, QuantConfig(4, per="row")
with inputs_of({"up": up}) as seen, torch.no_grad():
    for call in calls:
        zeroquant.output(teacher, call)
with inputs_of({"up": up}) as seen_other, torch.no_grad():
    zeroquant.output(teacher, judged)
rows, judge = seen["up"], seen_other["up"].T @ seen_other["up"]
one = Student(deepcopy(up), 4, ZeroQuantConfig(activation_bits=None, group_size=None))
pieces = [((piece,), {}) for piece in rows.split(128)]
zeroquant.train_layer(one, up, pieces, LKDConfig(steps=16))
W = up.weight.detach()
closed_form = gptq.gptq(W, rows.T @ rows, GPTQConfig(four_bits, act_order=True)).weight
rounding = gptq.output_error(W, gptq.nearest(W, four_bits), judge)
distilled = zeroquant.fake_quantize_weight(one.linear.weight.detach(), 4, one.config)
for what, W_hat in {"LKD": distilled, "GPTQ": closed_form}.items():
    share = gptq.output_error(W, W_hat, judge) / rounding
    print(f"its up_proj alone, {what:4}: {share:.0%}")

# %% [markdown]
# GPTQ leaves less of the error than sixteen steps of Adam do, and takes a fraction of their time. But it sees one linear and float inputs. LKD trains a whole layer together, norms and all, with rounded inputs.
#
# ## Play
#
# The first layer with rounded weights and inputs, no training. The error is in % of what the layer adds to its input; bits are those of its feed-forward weights, with their share of the scales.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
SCALES = {
    "64 per matrix": {"group_size": None, "groups": 64},
    "per row": {"group_size": None},
    "64 columns": {"group_size": 64},
    "32 columns": {"group_size": 32},
}
WEIGHTS = {}
for bits, who in (
    (4, "64 per matrix"),
    (4, "per row"),
    (4, "64 columns"),
    (4, "32 columns"),
    (5, "per row"),
    (5, "64 columns"),
    (8, "per row"),
):
    WEIGHTS[f"{bits} bits, {who}"] = (bits, SCALES[who])
added = (target - judged[0][0]).square().mean().item()
mlp = list(teacher.mlp.parameters())
tried, stored = {}, {}
for weights, (bits, who) in WEIGHTS.items():
    for inputs in ("tensor", "token"):
        config = ZeroQuantConfig(8, bits, 8, activation_scales=inputs, **who)
        student = zeroquant.student_of(teacher, config, name)
        tried[weights, inputs] = 100 * left(student) / added
    scales = sum(len(zeroquant.quantize_weight(W, bits, config)[1]) for W in mlp)
    stored[weights] = bits + 16 * scales / sum(W.numel() for W in mlp)


def draw(weights: str, inputs: str):
    error, size = tried[weights, inputs], stored[weights]
    fig, ax = plt.subplots(figsize=(4.8, 2.6))
    for (other_weights, other_inputs), value in tried.items():
        color = palette.gray if other_inputs == inputs else palette.light
        ax.plot(stored[other_weights], value, "o", color=color, markersize=4)
    ax.plot(size, error, "o", color=palette.vermillion, markersize=9)
    ax.axhline(1.1, color=palette.blue, linestyle="--")
    ax.set(yscale="log", xlabel="bits per weight", ylabel="error, %", ylim=(0.1, 12))
    ax.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    ax.minorticks_off()
    ax.set_title(f"{size:.2f} bits per weight, {error:.2f}% error")
    return fig


good = {weights for (weights, _), error in tried.items() if error < 1.1}
fewest = min(stored[weights] for weights in good)


def missing(weights: str, inputs: str) -> str:
    if tried[weights, inputs] >= 1.1:
        return f"the error is {tried[weights, inputs]:.2f}%."
    return "fewer bits do it." if stored[weights] > fewest else ""


explore(
    draw,
    alt=lambda weights, inputs: (
        f"Weights in {weights}, a scale per {inputs} for the inputs:"
        f" {stored[weights]:.2f} bits per weight, {tried[weights, inputs]:.2f}% error."
    ),
    title="Bits and scales of one layer",
    challenge="Stay below 1.1% error with the fewest bits per weight.",
    missing=missing,
    start={"weights": "8 bits, per row", "inputs": "tensor"},
    weights=list(WEIGHTS),
    inputs=["tensor", "token"],
)

# %% [markdown]
# With a scale per row 4 bits are not enough here, and 5 cost more than short groups do. One scale for all of $X$ undoes what the shorter groups gain.
#
# ## At scale
#
# What can be counted of the paper's claims, and its perplexities on WikiText-2 for a GPT-3 with 1.3B parameters as factors.

# %% tags=["hide-input"]
attention, mlp = 4, 8  # parts of a GPT layer's weights, in d²
bits = (8 * attention + 4 * mlp) / (attention + mlp)
print(f"W4/8: {bits:.2f} bits per weight, {16 / bits:.1f} times less than 16: paper 3")
efficiency = 2 * 65 / (1 * 25)  # GPUs × ms
print(f"GPT-NeoX-20B, 2 GPUs × 65 ms to 1 × 25 ms: {efficiency:.1f} times, paper 5.2")

print("\nMB that a norm and its linear, 4,096 x 4,096, move")
for tokens in (1, 2048):
    for how, size in zeroquant.moved_bytes(tokens, 4096, 4096).items():
        print(f"{tokens:5} tokens, {how:22} {size / 1e6:6.1f}")

PAPER = {"W8A8": 15.7, "W4/8A16": 21.9, "W4/8A8": 24.1, "W4/8A8, LKD": 18.2}
OURS = {
    "W8A8": factors("8"),
    "W4/8A16": factors("4/8", "row", "float"),
    "W4/8A8": factors("4/8"),
    "W4/8A8, LKD": factors("4/8", "row", "token", "float", "addresses"),
}
print("\nperplexity ×    paper, 1.3B   ours, 135M")
for what, ppl in PAPER.items():
    mine = sum(OURS[what]) / len(OURS[what])
    print(f"{what:14}{ppl / 15.3:>10.2f}{mine:>13.2f}")

# %% [markdown]
# Codes pay off only when they are *fused*. At 2,048 tokens, 8 bits with a kernel for each step move more bytes than 16-bit floats; when the norm writes codes and the product ends
# in 16 bits, they move two thirds of what floats do. For one token only the weight counts. That is the paper's third part, and why its speed-ups need kernels of its own.
#
# Its picture is ours: 8 bits for nothing, 4 bits broken by rounding, most of it mended by LKD. Random tokens helped there, too: perplexity fell from 92.1 to
# 40.6 with them. The scheme has a limit: [Xiao et al. 2022](https://arxiv.org/abs/2211.10438 "xiao2022smoothquant") report 84,648 on WikiText-2 for OPT-175B with ZeroQuant's W8A8, where floats have 10.99. Outlier features are in every
# token; that is [LLM.int8()](02-llm-int8.ipynb)'s subject. And GPTQ's authors extrapolate LKD, three hours for 1.3B, to weeks for 175B
# ([Frantar et al. 2022](https://arxiv.org/abs/2210.17323 "frantar2022gptq")).
#
# On a GPU, per-row weights and token-wise inputs are the preset W8A8 of `llmcompressor`, which vLLM serves:
#
# ```python
# from llmcompressor import oneshot
# from llmcompressor.modifiers.quantization import QuantizationModifier
#
# recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
# oneshot(model="meta-llama/Llama-2-7b-hf", recipe=recipe, output_dir="llama-w8a8")
# ```
#
# Ours takes any Llama of `transformers`: `zeroquant.apply(model, ZeroQuantConfig(), batches)`.
#
# ## What to keep
#
# ```python
# for layer, student in zip(layers, students):       # float, rounded
#     target = layer(h).detach()                     # the same h for both
#     for _ in range(16):
#         F.mse_loss(student(h), target).backward()  # straight through
#         adam.step(); adam.zero_grad()              # moments of one layer
#     h = target                                     # and on to the next
# ```
#
# **Use it** for 8 bits at once and without data, and LKD where you have little memory and want 4 bits together with 8-bit inputs. **Not** where outlier
# features are strong, and not for weights alone before you have tried GPTQ.
#
# <details><summary>Why may a scale differ from token to token, but not from column to column of X?</summary>
#
# A product sums over columns. What differs from token to token comes out of the sum; what differs from column to column does not, unless the sum is cut
# into groups.
#
# </details>
#
# <details><summary>Why does LKD need no labels, and hardly any memory?</summary>
#
# Its target is the output of the float layer. Gradients and moments exist for one layer at a time, and the teacher is that layer's own copy.
#
# </details>
#
# <details><summary>What does the straight-through estimator do to a weight whose rounding is wrong for the outputs?</summary>
#
# It moves the float weight by the gradient that the level has, until the weight is nearer to the next level. Then the level jumps.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/04-zeroquant.ipynb).
#
# Further reading: [Yao et al. 2023](https://arxiv.org/abs/2303.08302 "yao2023zeroquantv2") compare it with GPTQ and repair what is left with low ranks;
# [Li et al. 2021](https://arxiv.org/abs/2102.05426 "li2021brecq") reconstruct blocks with learned rounding.
