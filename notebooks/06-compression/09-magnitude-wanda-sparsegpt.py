# %% [markdown]
# # Magnitude, Wanda and SparseGPT
#
# A weight of zero need not be stored, nor multiplied. So which weights of a trained model can be set to zero? The smallest, one would think. This lesson
# shows that a real model survives without half of its weights if one asks first what they multiply, and is lost without the smallest half. Then it lets the weights that
# stay make up for those that went, counts the bytes that are saved, and measures the time that is not. At the end you own three masks and SparseGPT's loop.

# %% tags=["hide-input"]
import csv
import math
import time
import warnings

import torch
from torch import nn

from llmlab.checks.compression.magnitude_wanda_sparsegpt import check
from llmlab.compression import calibration, hessian
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression import quantization_basics as qb
from llmlab.compression.magnitude_wanda_sparsegpt import PruneConfig
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

warnings.filterwarnings("ignore", message="Sparse CSR")

# %% [markdown]
# ## What it costs
#
# A large model in 16 bits does not fit on a graphics card of 80 GB. If two of each four neighbouring weights are zero (semi-structured sparsity, the pattern **2:4**), the other two are
# stored, and for each of them 2 bits that say where in its four it stood.

# %%
llama = preset("llama-2-70b")
vocabulary = 2 * llama.vocab_size * llama.hidden_size  # embedding and head stay
rest = accounting.parameters(llama) - vocabulary
dense = 2 * (rest + vocabulary) / 1e9
packed = (2 * rest * 9 / 16 + 2 * vocabulary) / 1e9
for name, size in {"dense": dense, "2:4": packed}.items():
    fits = "fits" if size < 80 else "does not fit"
    print(f"Llama 2 70B, 16 bits, {name}: {size:.1f} GB, {fits} in 80 GB")

# %% [markdown]
# ## Predict
#
# The real model, SmolLM2-135M-Instruct. Half of the weights of each of its 210 linears become zero; nothing is trained. First the half with the smallest
# absolute values in each matrix. Then the half that Wanda chooses, after the model has read 1,024 tokens of other text.

# %%
magnitude_guess = predict(
    "By what factor does perplexity grow without the smallest half?", unit="times"
)
wanda_guess = predict("And without Wanda's half?", unit="times")

# %% [markdown]
# ## By hand
#
# An output with two weights, 4 and 1. The inputs of the second are large: over all tokens their norms are 1 and 8, so that
# $H = X X^\top = \begin{pmatrix} 1 & 6 \\ 6 & 64 \end{pmatrix}$. One of the two has to go. A change $\delta$ of the weights costs $\delta H \delta^\top$, the
# squared change of the outputs.
#
# | | $\hat w$ | $\delta$ | cost |
# |---|---|---|---|
# | magnitude: 1 is smaller than 4 | (4, 0) | (0, −1) | 1² · 64 = 64 |
# | Wanda: 4 · 1 is smaller than 1 · 8 | (0, 1) | (−4, 0) | 4² · 1 = 16 |
# | SparseGPT: the other makes up for it | (0, 1.375) | (−4, 0.375) | 16 + 9 − 18 = 7 |
#
# The large weight hardly ever mattered, because little came in. And as the two inputs are large and small together, the second weight can take over some of
# its work: $6 / 64$ of each unit that goes, $4 \cdot 6 / 64 = 0.375$.

# %%
w = torch.tensor([[4.0, 1.0]])
H = torch.tensor([[1.0, 6.0], [6.0, 64.0]])
norm = H.diagonal().sqrt()
pruned = {
    "magnitude": w * pruning.keep_mask(w, None, PruneConfig("magnitude", 0.5)),
    "Wanda": w * pruning.keep_mask(w, norm, PruneConfig("wanda", 0.5)),
    "SparseGPT": pruning.sparsegpt(w, H, PruneConfig("sparsegpt", 0.5, damping=0)),
}
for name, w_hat in pruned.items():
    cost = ((w_hat - w) @ H @ (w_hat - w).T).item()
    print(f"{name:10} {[round(x, 3) for x in w_hat[0].tolist()]}  cost {cost:.0f}")

# %% [markdown]
# ## The idea
#
# All 576 weights of one row of a real layer, against the norm of the input that each of them multiplies. Magnitude prunes below a horizontal line. Wanda prunes
# below a line of equal *products*, which falls to the right: where inputs are large, small weights stay; where inputs are small, large weights go.

# %% tags=["hide-input"]
model = real_model.load()
encode = real_model.load_tokenizer().encode
seen_text = course_model.corpus("addresses", "train")[:100_000]
other_text = course_model.corpus("addresses", "valid")[:8_000]
train = torch.tensor(encode(seen_text).ids)
held_out = torch.tensor(encode(other_text).ids)[None, :1024]
NAMES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
first, second = list(calibration.blocks(model).values())[:2]
linears = {name: second.get_submodule(name) for name in NAMES}


def statistics(batches):
    """What enters four linears of the second layer."""
    calls = calibration.next_calls(first, calibration.first_calls(model, batches))
    return calibration.collect(linears, lambda: calibration.next_calls(second, calls))


seen = statistics(calibration.sample(train, length=256, count=4, seed=0))
judge = statistics([held_out])

ROW = 5
norm = seen["self_attn.o_proj"].norm
size = linears["self_attn.o_proj"].weight.detach()[ROW].abs()
scores = size * norm
kept = pruning.from_each_row(scores[None], 0.5)[0]
fig, ax = plt.subplots(figsize=(4.8, 3.4))
ax.loglog(norm[kept], size[kept], ".", color=palette.blue, label="Wanda keeps")
ax.loglog(norm[~kept], size[~kept], "x", color=palette.vermillion, label="Wanda prunes")
x = torch.tensor([norm.min(), norm.max()])
ax.loglog(x, scores.median() / x, color=palette.gray)
ax.axhline(size.median(), color=palette.gray, linestyle="--")
ax.text(x[0], size.median() * 0.8, "magnitude's border", va="top")
ax.set(xlabel="norm of the input", ylabel="absolute value of the weight")
ax.set_ylim(size.median() / 60, size.max() * 1.4)
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
differs = int((kept != (size > size.median())).sum())
print(f"norms: the largest is {norm.max() / norm.median():.0f} times the median")
print(f"weights about which the two disagree: {differs} of {len(size)}")
figure(
    fig,
    alt=(
        "Weights of one row by the norm of their input, both on logarithmic axes."
        " Magnitude's border is horizontal. Wanda's falls from left to right: right"
        " of the middle small weights are kept, left of it larger ones are pruned."
    ),
)

# %% [markdown]
# **Wanda** ([Sun et al. 2023](https://arxiv.org/abs/2306.11695 "sun2023wanda")) gives each weight a score, and of each *row*, which makes one output, the lowest go:
#
# $$S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2$$
#
# $S_{ij}^2$ is what it costs to prune this weight if nothing else changes. **Optimal Brain Surgeon** ([Hassibi & Stork
# 1992](https://papers.nips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html "hassibi1992second")) asks what it costs when all others make up for it:
# $w_q^2 / [H^{-1}]_{qq}$. The two agree when inputs have nothing to do with each other.
#
# **SparseGPT** ([Frantar & Alistarh 2023](https://arxiv.org/abs/2301.00774 "frantar2023sparsegpt")) goes through the columns as [GPTQ](05-gptq.ipynb) does, with one
# factor $H^{-1} = U^\top U$ for all rows, and with zero for a level:
#
# 1. Every 128 columns it chooses the **mask** of the next 128: the share $s$ of this block with the lowest $w^2 / U_{qq}^2$ goes.
# 2. What is pruned of column $q$, over $U_{qq}$, is subtracted from each later column $j$, times $U_{qj}$.
# 3. For N:M the mask of each M columns is chosen when their turn comes, from weights that **have been updated**.
#
# ## Your turn
#
# Wanda. Score each weight, and in each row drop the `int(W.shape[1] * sparsity)` weights with the lowest scores; of equal ones the first. The mask is True where
# a weight is **kept**. `X` has a row for each token.


# %%
def wanda_mask(W, X, sparsity: float):
    """M, bool, of the shape of W (out, in); X has shape (tokens, in)."""
    raise NotImplementedError("five lines of yours")


your_turn(check.wanda_mask, wanda_mask)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(W, X, sparsity):
    scores = W.abs() * X.norm(dim=0)
    order = scores.argsort(dim=1, stable=True)
    count = int(W.shape[1] * sparsity)
    keep = torch.ones_like(W, dtype=torch.bool)
    return keep.scatter_(1, order[:, :count], False)


your_turn(check.wanda_mask, one_answer)

# %% [markdown]
# ## The code
#
# Places are sorted, not values, so that exactly as many weights go as were asked, also where many are equal. In SparseGPT only `choose` and
# the line with `keep` differ from GPTQ.
#
# | value | shape | holds |
# |---|---|---|
# | `scores`, `keep` | (out, in) | a score for each weight; True where it stays |
# | `U` | (in, in) | upper Cholesky factor of the damped $H^{-1}$ |
# | `now` | (128, out) | the columns whose mask is chosen, updated so far |
# | `block`, `E` | (128, out) | columns as they are now, and their errors over $U_{qq}$ |

# %% tags=["hide-output"]
show(pruning.keep_best, pruning.n_of_m, pruning.keep_mask, pruning.sparsegpt)

# %% [markdown]
# ## Against mathematics and the libraries
#
# One weight pruned and the others at their best is a least-squares problem. With a diagonal $H$, SparseGPT is Wanda, and changes no weight that stays. Torch
# has magnitude, in a matrix and 2 of 4.

# %%
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils.prune import l1_unstructured

torch.manual_seed(0)
X = torch.randn(24, 24, dtype=torch.float64) @ torch.randn(24, 90, dtype=torch.float64)
W = torch.randn(8, 24, dtype=torch.float64)
keep = torch.ones_like(W, dtype=torch.bool)
keep[:, 0] = False  # the first column goes
solved = torch.linalg.lstsq(X[1:].T, (W @ X).T).solution.T
best = pruning.best_update(W, keep, X @ X.T)[:, 1:]
compare(best, solved, "update, and least squares")
alone = torch.diag(torch.arange(1.0, 25, dtype=torch.float64))
for pattern in ("2:4", "4:8"):
    config = PruneConfig("sparsegpt", pattern=pattern, damping=0)
    keep = pruning.keep_mask(
        W, alone.diagonal().sqrt(), PruneConfig("wanda", pattern=pattern)
    )
    theirs = pruning.sparsegpt(W, alone, config)
    compare(W * keep, theirs, f"Wanda, and SparseGPT with diagonal H, {pattern}")

layer = nn.Sequential(nn.Linear(24, 8))
W = layer[0].weight.detach().clone()
keep = pruning.keep_mask(W, None, PruneConfig("magnitude", pattern="2:4"))
sparsifier = WeightNormSparsifier(1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
sparsifier.prepare(layer, [{"tensor_fqn": "0.weight"}])
sparsifier.step()
sparsifier.squash_mask()
compare(W * keep, layer[0].weight.detach(), "2:4 by magnitude, torch", tol=0)
layer[0].weight.data = W.clone()
keep = pruning.keep_mask(W, None, PruneConfig("magnitude", 0.25))
compare(
    W * keep,
    l1_unstructured(layer[0], "weight", 0.25).weight,
    "a quarter, torch",
    tol=0,
)

# %% tags=["hide-cell"]
# Paper, authors' code, libraries, ours: what one gets.
rows = [
    ("", "paper", "authors' code", "llmcompressor*", "torch", "ours"),
    ("half of 9 weights", "–", "Wanda: 4", "Wanda: 4", "4", "4"),
    ("half of 7 weights", "–", "Wanda: 3", "Wanda: 3", "4, to even", "3"),
    ("0.29 of 100", "–", "28, a float", "28, a float", "29", "29"),
    (
        "SparseGPT, 128 columns",
        "the share",
        "one too many",
        "one too many",
        "–",
        "exact",
    ),
    ("its equal scores", "–", "all go", "all go", "–", "first go"),
    ("2:8 means", "–", "2 pruned", "2 pruned", "–", "2 kept"),
    ("ties in 2:4", "–", "as topk", "first kept", "as topk", "first go"),
    ("magnitude compares", "a layer", "a matrix", "–", "a matrix", "a matrix"),
    ("mask and lazy block", "B_s and B", "one number", "one number", "–", "B_s and B"),
]
for row in rows:
    print(f"{row[0]:23}" + "".join(f"{cell:>15}" for cell in row[1:]))
print("* as measured with llmcompressor 0.14.0.1; its functions were run on matrices")

# %% [markdown]
# ## The experiment
#
# First four linears of the second layer, half of their weights gone. `seen` is what 1,024 tokens of addresses put into them; the error is that of the outputs
# on another text, $\lVert WX - \hat WX \rVert^2 / \lVert WX \rVert^2$.

# %% tags=["numbers-within-5%"]
configs = {
    "magnitude": PruneConfig("magnitude", 0.5),
    "per row": PruneConfig("magnitude", 0.5, per="row"),
    "Wanda": PruneConfig("wanda", 0.5),
    "SparseGPT": PruneConfig("sparsegpt", 0.5),
}
print(f"{'':17}" + "".join(f"{name:>11}" for name in configs))
for name, linear in linears.items():
    W = linear.weight.detach()
    line = f"{name:17}"
    for config in configs.values():
        W_hat = pruning.prune(W, seen[name], config)
        line += f"{hessian.output_error(W, W_hat, judge[name].gram):>11.1%}"
    print(line)

# %% [markdown]
# It is the norm that helps; to compare magnitudes within rows does not. And in `down_proj` SparseGPT does worse than Wanda, which updates nothing. That linear has
# 1,536 inputs, more than there were tokens: what makes up for errors on the text that was seen makes new ones on another.
#
# Now the whole model. Each layer is calibrated on what the *pruned* layers before it put out. `scripts/prune_sweep.py` made these runs, judged on 1,024 tokens of held-out
# addresses. A dot is a draw of calibration text.

# %% tags=["hide-output"]
with pruning.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def factors(method: str, amount: str, text: str = "addresses", per: str = ""):
    """By how much perplexity grows, a number for each draw of calibration text."""
    usual = {"magnitude": "matrix", "wanda": "row", "sparsegpt": ""}[method]
    kind = {"method": method, "amount": amount, "per": per or usual, "text": text}
    if method == "magnitude":
        kind["text"] = ""
    if ":" in amount:
        kind["per"] = ""
    return [
        math.exp(float(run["grown"]))
        for run in runs
        if all(run[name] == value for name, value in kind.items())
    ]


magnitude_guess.settle(factors("magnitude", "0.5")[0], digits=2)
wanda_guess.settle(factors("wanda", "0.5")[0], digits=2)

# %% tags=["hide-input"]
COLORS = {
    "magnitude": palette.vermillion,
    "wanda": palette.blue,
    "sparsegpt": palette.green,
}
SHOWN = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
shares = [f"0.{tenth}" for tenth in range(2, 8)]
fig, ax = plt.subplots(figsize=(4.8, 3.4))
print("pruned     " + "".join(f"{float(s):>7.0%}" for s in shares))
for method, color in COLORS.items():
    found = {s: factors(method, s) for s in shares if factors(method, s)}
    mean = {s: sum(values) / len(values) for s, values in found.items()}
    x = [100 * float(s) for s in found]
    ax.plot(x, list(mean.values()), color=color, label=SHOWN[method])
    for s, values in found.items():
        ax.plot([100 * float(s)] * len(values), values, "o", color=color, markersize=4)
    line = [
        f"{mean[s]:.{1 if mean[s] > 9 else 2}f}" if s in mean else "–" for s in shares
    ]
    print(f"{SHOWN[method]:11}" + "".join(f"{value:>7}" for value in line))
print("\n50%, each draw of text")
for method in ("wanda", "sparsegpt"):
    for text in ("addresses", "bible"):
        values = "  ".join(f"{f:.2f}" for f in sorted(factors(method, "0.5", text)))
        print(f"{SHOWN[method]:11}{text:11}{values}")
print("magnitude, per row:  ", round(factors("magnitude", "0.5", per="row")[0], 1))
gains = [r for r in runs if r["amount"] == "0.5" and r["method"] == "wanda"]
least = min(float(r["gained"]) / float(r["gained_error"]) for r in gains)
print(f"Wanda's gain on magnitude: at least {least:.0f} standard errors")
print("\nhalf of the weights    50%    4:8    2:4")
for method, name in SHOWN.items():
    values = [factors(method, amount)[0] for amount in ("0.5", "4:8", "2:4")]
    print(f"{name:19}" + "".join(f"{value:>7.2f}" for value in values))
ax.set(yscale="log", xlabel="weights pruned, %", ylabel="growth of perplexity, times")
ax.set_yticks([1, 2, 5, 10, 100, 1000], ["1", "2", "5", "10", "100", "1000"])
ax.minorticks_off()
ax.set_ylim(0.9, 2000)
ax.legend()
figure(
    fig,
    alt=(
        "Growth of perplexity by the share of weights pruned, on a logarithmic axis."
        " At 20 percent all are close to 1. At 50 percent magnitude is at 15, Wanda and"
        " SparseGPT near 2, and at 70 percent magnitude is at about 1,000, the others"
        " at 10 or so."
    ),
)

# %% [markdown]
# The smallest half is not the least useful half: without it the model is lost, while Wanda's half costs a factor of about two. To tell them apart took a forward pass over
# 1,024 tokens, and a product. Nothing was trained. To compare within rows is not what does it, as the line "per row" shows: it is the norm.
#
# SparseGPT's update pays where there is much to make up for: at half of the weights each of its draws beats each of Wanda's, and most of all with a pattern, which dictates what
# must go. Up to 40% the two are alike.
#
# And the update leans on its text. After as many verses of the King James Bible SparseGPT loses more than Wanda does: it fits the weights to inputs that do not come
# again. Wanda takes one number for each channel from the text, and loses little. The authors of both calibrate with 128 runs of 2,048 tokens, 256 times our text.
#
# A pattern costs more than free choice, and the narrower it is, the more. What it buys comes next. One word on the subject: the file that this
# model was made from stored these linears in 4 bits once, so that 3 in 10,000 of its weights were zero before.
#
# ## What zeros save
#
# One linear, half of it zero. First its bytes, packed as 2:4. Then the time of a product with 64 inputs: with the weight as it was, with half of it zero,
# and in a format that lists only what is not zero ("CSR").

# %%
linear = nn.Linear(576, 1536, bias=False, dtype=torch.bfloat16)
linear.weight.data.copy_(linears["mlp.up_proj"].weight)
model_24 = nn.Sequential(linear)
before = qb.nbytes(model_24)
pruning.apply(model_24, None, PruneConfig("magnitude", pattern="2:4"))
x = torch.randn(3, 576, dtype=torch.bfloat16)
y = model_24(x)
print(f"with zeros: {qb.nbytes(model_24):,} of {before:,} bytes")
pruning.pack(model_24, "2:4")
print(f"packed:     {qb.nbytes(model_24):,} of {before:,} bytes, 9/16 of it")
compare(model_24(x), y, "outputs, packed and not", tol=0)

# %% tags=["nbval-ignore-output"]
W = linears["mlp.up_proj"].weight.detach()
X = torch.randn(576, 64)


def milliseconds(weight):
    """The shortest of 30 products."""
    times = []
    for _ in range(30):
        started = time.perf_counter()
        weight @ X
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


dense = milliseconds(W)
for sparsity in (0.5, 0.9):
    zeroed = W * pruning.from_matrix(W.abs(), sparsity)
    print(
        f"{sparsity:.0%} zeros: {milliseconds(zeroed) / dense:.1f} of the dense time,"
        f" listed: {milliseconds(zeroed.to_sparse_csr()) / dense:.1f}"
    )

# %% [markdown]
# Zeros save no time by themselves. The processor multiplies with 0 as it does with any number, eight or sixteen at a time. A list of what is not zero must be
# followed entry by entry, and at half the weights that is slower than to multiply with all of them. It pays when nine of ten are gone, and then so is the
# model. Hence 2:4: the tensor cores of NVIDIA's GPUs since Ampere read the packed form, and reach twice the rate of products
# ([Mishra et al. 2021](https://arxiv.org/abs/2104.08378 "mishra2021accelerating")). A CPU has no such unit.
#
# ## Play
#
# A small linear of 8 × 12 weights; the inputs grow from left to right. What is kept is dark. Move the share that is pruned, and how many times the largest
# input's norm is that of the smallest. At 1 all norms are equal, and Wanda is magnitude, row by row.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
SIZES = {"sparsity": [0.3, 0.4, 0.5, 0.6, 0.7], "spread": [1, 6, 30]}
SMALL = {
    "magnitude": lambda s: PruneConfig("magnitude", s, per="row"),
    "wanda": lambda s: PruneConfig("wanda", s),
    "sparsegpt": lambda s: PruneConfig("sparsegpt", s),
}


def small(spread: int):
    """W (8, 12) and X (12, 200), correlated, with norms from 1 to `spread`."""
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 200, generator=random)
    X = torch.randn(12, 200, generator=random) + shared
    X *= (torch.logspace(0, math.log10(spread), 12) / X.norm(dim=1))[:, None]
    return torch.randn(8, 12, generator=random), X


found = {}
for spread in SIZES["spread"]:
    W, X = small(spread)
    for sparsity in SIZES["sparsity"]:
        for method, config in SMALL.items():
            if method == "sparsegpt":
                W_hat = pruning.sparsegpt(W, X @ X.T, config(sparsity))
            else:
                W_hat = W * pruning.keep_mask(W, X.norm(dim=1), config(sparsity))
            error = hessian.output_error(W, W_hat, X @ X.T)
            found[sparsity, spread, method] = W_hat, error


def draw(sparsity: float, spread: int):
    fig, axes = plt.subplots(1, 3, figsize=(4.8, 1.8))
    for ax, method in zip(axes, SMALL, strict=True):
        W_hat, error = found[sparsity, spread, method]
        ax.imshow(W_hat != 0, cmap="Blues", vmin=0, vmax=1.3)
        ax.set_title(f"{SHOWN[method]}\nerror {error:.1%}", fontsize=10)
        ax.set(xticks=[], yticks=[])
    axes[1].set_xlabel("inputs grow to the right")
    return fig


LIMIT = 0.02
good = [key[:2] for key, (_, e) in found.items() if key[2] == "wanda" and e < LIMIT]
most = max(sparsity for sparsity, _ in good)


def missing(sparsity: float, spread: int) -> str:
    if (sparsity, spread) not in good:
        return f"Wanda's error is {found[sparsity, spread, 'wanda'][1]:.1%}."
    return "more can go." if sparsity < most else ""


explore(
    draw,
    alt=lambda sparsity, spread: (
        f"{sparsity:.0%} pruned, norms from 1 to {spread}. Output error: "
        + ", ".join(
            f"{SHOWN[method]} {found[sparsity, spread, method][1]:.1%}"
            for method in SMALL
        )
        + "."
    ),
    title="Which weights are kept",
    challenge="Prune as much as you can with an error of Wanda below 2%.",
    missing=missing,
    start={"sparsity": 0.5, "spread": 6},
    **SIZES,
)

# %% [markdown]
# The further apart the norms are, the more Wanda's mask leans to the right, where inputs are large, and the more can go. Magnitude's mask stays as it is. With
# norms that are equal only SparseGPT can do better, because inputs still vary together.
#
# ## At scale
#
# SparseGPT prunes OPT-175B in less than four and a half hours, and at 60% more than 100 billion weights need not be read, says its abstract; we count them. Below
# it what the authors of Wanda report for LLaMA-2 on WikiText ([their
# repository](https://github.com/locuslab/wanda "sun2023wanda")), as factors of the dense model's perplexity, beside ours.

# %% tags=["hide-input"]
gone = 0.6 * 12 * 96 * 12288**2  # of the linears of OPT-175B
print(f"OPT-175B at 60%: {gone / 1e9:.0f} billion weights of its linears are zero\n")
published = {  # dense, then magnitude, SparseGPT and Wanda at 50%, and at 2:4
    "LLaMA-2 7B": (5.12, (14.89, 6.51, 6.42), (54.59, 10.17, 11.02)),
    "LLaMA-2 13B": (4.57, (6.37, 5.63, 5.56), (8.33, 8.32, 8.27)),
    "LLaMA-2 70B": (3.12, (4.98, 3.98, 3.98), (6.33, 5.40, 5.16)),
}
print(f"{'':13}{'50%:':>5} magn. SparseG. Wanda {'2:4:':>7} magn. SparseG. Wanda")
for name, (ppl, *columns) in published.items():
    half, two = ([f"{value / ppl:.2f}" for value in column] for column in columns)
    print(f"{name:18}{half[0]:>6}{half[1]:>9}{half[2]:>6}{'':8}", end="")
    print(f"{two[0]:>6}{two[1]:>9}{two[2]:>6}")
half, two = (
    [f"{factors(m, a)[0]:.2f}" for m in ("magnitude", "sparsegpt", "wanda")]
    for a in ("0.5", "2:4")
)
print(f"{'ours, 135M':18}{half[0]:>6}{half[1]:>9}{half[2]:>6}{'':8}", end="")
print(f"{two[0]:>6}{two[1]:>9}{two[2]:>6}")

# %% [markdown]
# At 50% with Wanda or SparseGPT, theirs grow by about a quarter, and ours about doubles: a model of 135M weights has little to spare, and nobody would halve it. Magnitude
# is nowhere better. With llmcompressor, on a GPU:
#
# ```python
# from llmcompressor import oneshot
# from llmcompressor.modifiers.pruning import SparseGPTModifier
#
# recipe = SparseGPTModifier(
#     sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head"]
# )
# oneshot(
#     model="meta-llama/Llama-2-7b-hf",
#     dataset="open_platypus",
#     recipe=recipe,
#     num_calibration_samples=128,
#     max_seq_length=2048,
#     output_dir="llama-2-7b-2of4",
# )
# ```
#
# There "2:8" means two of eight *pruned*, whatever `sparsity` says. Without a pattern its SparseGPT prunes one weight more than asked in each block of 128 columns, and all
# weights whose scores are equal to the border's: of a matrix of ones nothing was left at 50%. Ours: `pruning.apply(model, batches, PruneConfig("wanda", 0.5))`, and
# `pruning.hold_zeros(model)` keeps the zeros when training goes on.
#
# ## What to keep
#
# ```python
# scores = W.abs() * X.norm(dim=0)                     # X (tokens, in)
# order = scores.argsort(dim=1, stable=True)           # in each row
# keep = torch.ones_like(W, dtype=torch.bool)
# keep.scatter_(1, order[:, : int(W.shape[1] * sparsity)], False)
# ```
#
# **Use Wanda** first: it takes a forward pass, changes no weight, and leans little on the text. **Use SparseGPT** for 2:4 and for half or more, with text of
# the kind that the model will read and many more tokens than a linear has inputs. **Do not prune** to be faster on a CPU, nor by magnitude alone; and where [4
# bits](01-quantization-basics.ipynb) will do, they save more bytes and lose less.
#
# <details><summary>Why is the smallest weight not the one to prune?</summary>
#
# What counts is what it adds to the output: weight times input. A small weight on a large input adds more than a large one on an input that is nearly always zero.
#
# </details>
#
# <details><summary>When does SparseGPT choose what Wanda would, and change nothing else?</summary>
#
# When H is diagonal: no input varies with another, so none can make up for it. (It still compares all rows of a block together.)
#
# </details>
#
# <details><summary>Half of the weights are zero. Why is the product not twice as fast?</summary>
#
# The hardware multiplies blocks of neighbours, zeros or not. Only a pattern that it knows, as 2:4 on a GPU, lets it skip them.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/09-magnitude-wanda-sparsegpt.ipynb).
#
# Further reading: [Frantar et al. 2022a](https://arxiv.org/abs/2208.11580 "frantar2022obc") prune one weight after the other, each row in its own order, and are the
# ground that SparseGPT stands on.
