# %% [markdown]
# # LLM.int8(): multiply integers, but not all
#
# Weights in 8 bits are easy. Inputs in 8 bits, so that integers are multiplied by integers, break a real language model, and very few
# columns are to blame. On this page you find these columns, keep them out of the integers, and get the model back. At the end you own the
# product that does it.

# %% tags=["hide-input"]
import logging
import warnings
from copy import deepcopy

import torch

from llmlab.checks.compression.llm_int8 import check
from llmlab.compression import llm_int8, walk
from llmlab.compression.llm_int8 import Int8Config
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

warnings.filterwarnings("ignore")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# %% [markdown]
# ## What it costs
#
# A model of 175 billion parameters, as GPT-3, OPT or BLOOM, on GPUs of 80 GB:

# %%
for bits in (16, 8):
    size = 175e9 * bits / 8
    print(f"{bits:2} bits per weight: {size / 1e9:.0f} GB, {-(-size // 80e9):.0f} GPUs")

# %% [markdown]
# To store 8 bits is one thing. To *compute* with them is another: GPUs multiply 8-bit integers about twice as fast as 16-bit floats, but
# for that the inputs $X$ of each layer must be integers, too. This is called W8A8: weights and activations in 8 bits.
#
# ## Predict
#
# The model is SmolLM2-135M. All its 210 linears get weights in 8 bits, a scale for each row, and inputs in 8 bits, *one* scale for all of
# $X$. Its perplexity on a State of the Union address doubles. Now in each linear the columns of $X$ with the largest $|x|$ stay in 16 bits:
# one column, or two, or four of its 576 or 1,536. One column is 0.14% of all. (These weights were stored in 4 bits once. In 8 bits almost nothing of them is
# lost, so what breaks here comes from $X$.)

# %%
model = real_model.load()
text = course_model.corpus("addresses", "valid")[:4000]
tokens = torch.tensor(real_model.load_tokenizer().encode(text).ids)[:513]


def token_losses(model) -> torch.Tensor:
    return language_model.token_losses(model, tokens, context=256)


float_losses = token_losses(model)
print(f"perplexity of the floats: {float_losses.mean().exp():.0f}")
guess = predict(
    "One column in each linear stays. How much of the growth of perplexity goes?",
    unit="%",
)

# %% [markdown]
# ## By hand
#
# Two tokens, three features, one output with the weights $1, -1, 0.25$. The exact products are −11.75 and −4.75.
#
# | token | $x$ | largest $\lvert x\rvert$ | codes |
# |---|---|---|---|
# | 1 | 0.5, **12**, −1 | 12 | 5, 127, −11 |
# | 2 | 2, **7**, 1 | 7 | 36, 127, 18 |
#
# The codes of $w$ are 127, −127, 32. Token 1: $(5 \cdot 127 - 127 \cdot 127 - 11 \cdot 32) \cdot 12 \cdot 1 / 127^2 = -11.789$.
#
# Now the second column leaves. What remains of token 1 is 0.5 and −1, with the largest 1 and the codes 64 and −127:
# $(64 \cdot 127 - 127 \cdot 32) / 127^2 = 0.252$. The column itself is multiplied as it is: $12 \cdot (-1) = -12$. The sum is
# −11.748. The error fell from 0.039 to 0.002: the steps of the small numbers are 12 times shorter.

# %%
x = torch.tensor([[0.5, 12.0, -1.0], [2.0, 7.0, 1.0]])
w = torch.tensor([[1.0, -1.0, 0.25]])
codes, a_w = llm_int8.quantize_rows(w)
for alpha in (None, 6.0):
    y = llm_int8.int8_matmul(x, codes, a_w, Int8Config(alpha))
    print(f"threshold {alpha}:", *(f"{v:.3f}" for v in y[:, 0].tolist()))

# %% [markdown]
# ## The idea
#
# First look. This is what enters the attention of layer 15: 64 tokens, 576 features.

# %% tags=["hide-input"]
layers = walk.linears(model)
with llm_int8.inputs_of(layers) as inputs, torch.inference_mode():
    model(tokens[None, :256])
hidden = inputs["model.layers.15.self_attn.q_proj"]

fig, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(4.8, 4.2))
top.imshow(hidden[:64].abs(), aspect="auto", cmap="viridis", vmax=8)
top.set(ylabel="token")
top.grid(visible=False)
largest = hidden.abs().amax(0)
bottom.bar(range(576), largest, width=2, color=palette.blue)
worst = int(largest.argmax())
bottom.bar(worst, largest[worst], width=5, color=palette.vermillion)
bottom.annotate(
    f"feature {worst}", (worst + 12, largest[worst] - 1), color=palette.vermillion
)
bottom.axhline(6, color=palette.gray, linestyle="--")
bottom.set(xlabel="feature, a column of X", ylabel="largest |x|")
figure(
    fig,
    alt=(
        "A picture of the inputs of layer 15 by token and feature: one bright vertical"
        f" line, feature {worst}, in nearly all tokens. Below, the largest value of"
        " each feature: all are below 4 but that one, which is above 8."
    ),
)

# %% [markdown]
# One feature is large, in nearly every token.
# [Dettmers et al. 2022](https://arxiv.org/abs/2208.07339 "dettmers2022int8") call these *outlier features*, and they cannot be removed: the model uses them.
# In the paper's large models at most seven of thousands of dimensions are of this kind. When these are set to zero, perplexity becomes 7 to 11 times
# as large; seven other dimensions, taken at random, cost 0.1%. A scale for each
# token does not help against them, since every token has the outlier. A scale for each column would, but it does not come out of the
# sum over columns. So they take two steps.
#
# **Vector-wise quantization.** Each token has a scale, and each output has one:
#
# $$a_{x,t} = \max_h |X_{th}| \qquad a_{w,o} = \max_h |W_{oh}| \qquad \text{codes} = \lfloor 127\, x / a \rceil$$
#
# **Mixed decomposition.** A column goes to the set $O$ when any token has $|x| \ge \alpha$ in it, with $\alpha = 6$. The columns in
# $O$ are multiplied in 16 bits, all others as integers, and the two results are added:
#
# $$X W^\top \approx \sum_{h \in O} X_h W_h^\top \;+\; \frac{a_x \otimes a_w}{127^2} \sum_{h \notin O} Q^X_h (Q^W_h)^\top$$
#
# The scales $a_x$ are taken once $O$ has left. The integers are added up in 32 bits.
#
# What does it cost? The 16-bit product has $|O|$ columns instead of all of them, so its work is a share $|O| / h$ of the whole, where $h$ is the number of features.
# Memory grows by nothing: $W$ is stored once, in 8 bits, and the few columns that are needed are decoded on the way. Only what must be known first
# costs something: all of $X$ is read to find its outliers.
#
# ## Your turn
#
# Write the mixed product. $W$ was coded before: `codes` (out, features), int8, and `a_w` (out,). `X` is (tokens, features).
# The weights of the columns in $O$ are decoded: `codes · a_w / 127`. `llm_int8.quantize_rows` gives codes and $a$ for the rows of a
# matrix; multiply its codes in int32. About five lines.


# %%
def mixed_product(X, codes, a_w, alpha: float):
    """X Wᵀ, (tokens, out)."""
    raise NotImplementedError("five lines of yours")


your_turn(check.mixed_product, mixed_product)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(X, codes, a_w, alpha):
    out = (X.abs() >= alpha).any(dim=0)  # (features,)
    q, a_x = llm_int8.quantize_rows(X * ~out)
    regular = (q.int() @ codes.int().T) * (a_x / 127)[:, None] * (a_w / 127)
    few = codes[:, out] * (a_w / 127)[:, None]  # (out, |O|)
    return regular + X[:, out] @ few.T


your_turn(check.mixed_product, one_answer)

codes, a_w = llm_int8.quantize_rows(layers["model.layers.15.self_attn.q_proj"].weight)
ours = llm_int8.int8_matmul(hidden, codes, a_w, Int8Config())
compare(one_answer(hidden, codes, a_w, 6.0), ours, "five lines, and the package", 1e-5)

# %% [markdown]
# ## The code
#
# The product is one function. The layer holds its codes, and finds $O$ anew for each batch. Open ours when you have your own.
#
# | value | shape | type |
# |---|---|---|
# | `codes` of $W$ | (out, features) | int8 |
# | `absmax`, $a_w$ | (out,) | float32 |
# | codes of $X$ | (tokens, features) | int8 |
# | the sums | (tokens, out) | int32, then float |
# | the columns in $O$ | (tokens, \|O\|) and (out, \|O\|) | the type of $X$ |

# %% tags=["hide-output"]
show(
    llm_int8.quantize_rows,
    llm_int8.outlier_columns,
    llm_int8.int8_matmul,
    llm_int8.Int8Linear,
)

# %% [markdown]
# ## Against the library
#
# `bitsandbytes` is the authors' own library. First one layer, forward and backward, then the loss of a whole model that `transformers` loads with
# `load_in_8bit`. `bitsandbytes` casts to float16 first, so both get numbers that fit it. We take the tokens in which the outlier feature
# is an outlier. The others, where it is 5.9, say, are counted below: theirs takes their scales in another way.

# %%
from bitsandbytes.nn import Linear8bitLt
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

transformers_logging.disable_progress_bar()
linear = deepcopy(layers["model.layers.15.self_attn.q_proj"])
linear.weight.data = linear.weight.data.half().float()
library = {}
hidden = hidden.half().float()
loud = hidden[hidden[:, worst].abs() >= 6]
for alpha in (None, 6.0):
    theirs = Linear8bitLt(
        576, 576, bias=False, has_fp16_weights=False, threshold=alpha or 0.0
    )
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").eval()
    library[alpha] = theirs
    ours = llm_int8.Int8Linear(linear, Int8Config(alpha))
    results = []
    for layer in (ours, theirs):
        x = loud.clone().requires_grad_()
        y = layer(x)
        y[:, :100].sum().backward()
        results.append((y.detach(), x.grad))
    compare(results[0][0], results[1][0], f"threshold {alpha}, outputs", 1e-3)
    compare(results[0][1], results[1][1], f"threshold {alpha}, gradients", 1e-3)

theirs = LlamaForCausalLM.from_pretrained(
    course_model.MODEL,
    quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    dtype=torch.float32,
).eval()
ours = llm_int8.apply(course_model.load())
ids = torch.tensor(course_model.load_tokenizer().encode(text[:1200]).ids)[:257]
means = [language_model.token_losses(m, ids, 256).mean() for m in (ours, theirs)]
compare(means[0], means[1], "loss of the course model", 0.02)

# %% [markdown]
# <details><summary>For the curious: what bitsandbytes does where one would guess otherwise</summary>
#
# The folded cell runs each row of this table, with `bitsandbytes` 0.50.2 on a CPU.
#
# | | paper | `bitsandbytes` | ours |
# |---|---|---|---|
# | $\alpha$ when nothing is said | 6.0 | `Linear8bitLt`: 0.0, which is none; `BitsAndBytesConfig`: 6.0 | 6.0 |
# | in training mode | – | floats times decoded weights; $\alpha$ has no effect | as in evaluation |
# | a new layer is in | – | training mode | the linear's mode |
# | row [4, −3, 1, 0.5], first column in $O$ | $a_x = 3$ | $a_x = 4$: only the large values leave before the scale is taken | 3 |
# | its effect: error in the tokens where feature 247 of layer 15 stays below 6 | – | 3.6 times that of the other tokens | 1.4 times |
# | an input of 70,000, no $\alpha$ | – | NaN: inputs are cast to float16 | finite |
#
# So a test that forgets `.eval()` measures weights in 8 bits and nothing else. `from_pretrained` calls it for you.
#
# </details>

# %% tags=["hide-cell"]
import bitsandbytes.functional as bnb

fresh = Linear8bitLt(4, 4)
print(
    "thresholds:",
    fresh.state.threshold,
    BitsAndBytesConfig(load_in_8bit=True).llm_int8_threshold,
    Int8Config().threshold,
)
print("a new layer trains:", fresh.training)
with torch.inference_mode():
    decoded = llm_int8.Int8Linear(linear, Int8Config()).weight
    floats = torch.nn.functional.linear(hidden, decoded)
    for training in (True, False):
        off = (library[6.0].train(training)(hidden) - floats).abs().max().item()
        rounds = "rounds X" if off > 0.01 else "does not round X"
        print(f"bitsandbytes, training={training}: {rounds}")
    row = torch.tensor([[8, -3, 1, 0.5], [4, -3, 1, 0.5]])
    out = llm_int8.outlier_columns(row, Int8Config())
    print(
        "a_x of [4, −3, 1, 0.5]:",
        bnb.int8_vectorwise_quant(row.clone(), threshold=6.0)[1][1].item(),
        "theirs,",
        llm_int8.quantize_rows(row.masked_fill(out, 0))[1][1].item(),
        "ours",
    )
    quiet = hidden[:, worst].abs() < 6
    for name, layer in (
        ("theirs", library[6.0]),
        ("ours", llm_int8.Int8Linear(linear, Int8Config())),
    ):
        error = (layer(hidden) - floats).square().mean(1).sqrt()
        ratio = error[quiet].mean() / error[~quiet].mean()
        print(
            f"error of {int(quiet.sum())} tokens below 6, by that of the others,"
            f" {name}: {ratio:.1f}"
        )
    large = hidden[:4].clone()
    large[0, 0] = 70_000
    for name, layer in (
        ("theirs", library[None]),
        ("ours", llm_int8.Int8Linear(linear, Int8Config(None))),
    ):
        finite = "finite" if layer(large).isfinite().all() else "NaN"
        print(f"an input of 70,000 without a threshold, {name}: {finite}")

# %% [markdown]
# ## The experiment
#
# Each line reads the same 512 tokens. What is compared are differences of losses, token by token; ± is two standard errors of their mean.

# %% tags=["hide-output", "numbers-within-5%"]
int8_model = llm_int8.apply(model)  # `layers` keeps the float ones
columns = sum(layer.in_features for layer in layers.values())
settings = {
    "one scale for X": Int8Config(None, scales="tensor"),
    "  1 column stays": Int8Config(None, 1, "tensor"),
    "  2 columns stay": Int8Config(None, 2, "tensor"),
    "  4 columns stay": Int8Config(None, 4, "tensor"),
    "a scale per token": Int8Config(None),
    "LLM.int8()": Int8Config(),
}
factors = {}
for name, config in settings.items():
    grown = token_losses(llm_int8.configure(int8_model, config)) - float_losses
    factors[name] = grown.mean().exp().item()
    spread = 2 * factors[name] * grown.std().item() / len(grown) ** 0.5
    kept = f"{100 * config.columns * len(layers) / columns:.2f}%"
    kept = "α = 6" if config.threshold else kept
    print(f"{name:18} kept {kept:>6}   perplexity × {factors[name]:.2f} ± {spread:.2f}")

with_all, with_one = factors["one scale for X"], factors["  1 column stays"]
guess.settle(100 * (with_all - with_one) / (with_all - 1), digits=2)

# %% [markdown]
# One scale for all of $X$ doubles the perplexity. One column in each linear, 0.14% of them, undoes about three quarters of that. With four columns, 0.56%, what is
# left is hardly larger than its spread. With a scale for each token little is lost to begin with, on a model as small as this: the gain of the decomposition is
# about as large as its spread here. So look at the products themselves. How much of the squared error of each product goes when its *one* largest
# column leaves, with a scale for each token?


# %% tags=["hide-input", "numbers-within-5%"]
def squared_errors(name: str, *configs: Int8Config) -> list[float]:
    """Against the same product with X as it is."""
    x = inputs[name]
    codes, absmax = llm_int8.quantize_rows(layers[name].weight.detach())
    right = x @ llm_int8.dequantize_rows(codes, absmax).T
    errors = []
    for config in configs:
        y = llm_int8.int8_matmul(x, codes, absmax, config)
        errors.append((y - right).square().sum().item())
    return errors


KINDS = {
    "self_attn.q_proj": palette.blue,
    "mlp.gate_proj": palette.green,
    "mlp.down_proj": palette.vermillion,
}
fig, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(4.8, 5.0))
gone, taken = {}, {}
for kind, color in KINDS.items():
    names = [name for name in layers if name.endswith(kind)]
    gone[kind], taken[kind] = [], []
    for name in names:
        plain, one = squared_errors(name, Int8Config(None), Int8Config(None, 1))
        gone[kind].append(100 * (1 - one / plain))
        out = llm_int8.outlier_columns(inputs[name], Int8Config())
        taken[kind].append(100 * out.float().mean().item())
    label = kind.partition(".")[2]
    top.plot(gone[kind], "o-", markersize=3, color=color, label=label)
    bottom.plot(taken[kind], "o-", markersize=3, color=color)
top.set(ylabel="% of the error that\none column removes", ylim=(-5, 105))
bottom.set(ylabel="% of the columns\nwith |x| ≥ 6", xlabel="layer", yscale="symlog")
bottom.set_ylim(-0.1, 60)
bottom.set_yticks([0, 1, 10, 50], labels=["0", "1", "10", "50"])
fig.legend(loc="outside upper center", ncols=3, fontsize=9)
figure(
    fig,
    alt=(
        "Above: the share of the squared error that goes with one column. For q_proj"
        " it is about nine tenths from layer 12 to 19, for gate_proj half to eight"
        " tenths in the middle, for down_proj little in most layers. Below: the share"
        " of columns with outliers: for q_proj 0 or a sixth of a percent; for"
        " down_proj it rises to 40 percent in the last layers."
    ),
)
middle = gone["self_attn.q_proj"][12:20]
print(
    f"q_proj, layers 12 to 19: one column of 576 ({100 / 576:.2f}%) makes"
    f" {min(middle):.0f} to {max(middle):.0f}% of the error"
)
print(
    f"down_proj: one column of 1,536 makes {sorted(gone['mlp.down_proj'])[15]:.0f}%"
    " in the median layer;"
    f" α = 6 takes {max(taken['mlp.down_proj']):.0f}% of the last layer's columns"
)

# %% [markdown]
# In the attention of the middle layers the paper's picture holds as it stands: 0.2% of the columns, about nine tenths of the error. Elsewhere
# it does not. The inputs of `down_proj` have outliers of another kind: the first token alone holds values in the thousands, in layers 11
# and 28, and in the last layers *many* columns exceed 6. There the threshold sends up to two fifths of the product back to 16 bits.
# A scale for each token is what helps against single tokens. The paper leaves this layer out when it counts outliers.
#
# ## Play
#
# The threshold, on two products. What does a larger $\alpha$ save, and when does it break?

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
PRODUCTS = {
    "layer 15, q_proj": "model.layers.15.self_attn.q_proj",
    "layer 27, down_proj": "model.layers.27.mlp.down_proj",
}
ALPHAS = [3, 4, 6, 8, 10, 15]
tried = {}
for label, name in PRODUCTS.items():
    configs = [Int8Config(None), *(Int8Config(float(alpha)) for alpha in ALPHAS)]
    plain, *errors = squared_errors(name, *configs)
    for alpha, error in zip(ALPHAS, errors, strict=True):
        out = llm_int8.outlier_columns(inputs[name], Int8Config(float(alpha)))
        tried[label, alpha] = (100 * out.float().mean().item(), 100 * error / plain)


def describe(product: str, alpha: int) -> str:
    kept, error = tried[product, alpha]
    return (
        f"{kept:.2f}% of the columns stay in 16 bits, {error:.0f}% of the error is left"
    )


def draw(product: str, alpha: int):
    sizes = inputs[PRODUCTS[product]].abs().amax(0).sort(descending=True).values
    fig, ax = plt.subplots(figsize=(4.8, 2.8))
    ax.plot(range(1, len(sizes) + 1), sizes, color=palette.blue)
    ax.axhline(alpha, color=palette.vermillion)
    above = int((sizes >= alpha).sum())
    ax.plot(range(1, above + 1), sizes[:above], color=palette.vermillion, linewidth=3)
    ax.set(xscale="log", yscale="log", xlabel="column, the largest first")
    ax.set(ylabel="its largest |x|", ylim=(0.3, 200))
    kept, error = tried[product, alpha]
    ax.set_title(f"{kept:.2f}% in 16 bits, {error:.0f}% of the error left")
    return fig


first = "layer 15, q_proj"
good = [alpha for alpha in ALPHAS if tried[first, alpha][1] < 10]


def missing(product: str, alpha: int) -> str:
    if product != first:
        return "that is the other product."
    if alpha not in good:
        return f"{tried[product, alpha][1]:.0f}% of the error is left."
    return "a larger threshold does it, too." if alpha != max(good) else ""


explore(
    draw,
    alt=lambda product, alpha: f"{product}, α = {alpha}: {describe(product, alpha)}.",
    title="Columns by size, and the threshold",
    challenge=(
        "In layer 15, find the largest threshold that leaves less than a tenth of the"
        " error."
    ),
    missing=missing,
    start={"product": first, "alpha": 15},
    product=list(PRODUCTS),
    alpha=ALPHAS,
)

# %% tags=["hide-output"]
print(f"α = {max(good)}: {describe(first, max(good))}")

# %% [markdown]
# ## At scale
#
# The paper follows outlier features through models of all sizes (its table 4). A dimension of the hidden state counts when it reaches 6 in a quarter of the
# layers, and in 6% of the positions. "Positions" is our reading: the share of all hidden vectors. Then perplexity with W8A8, as a factor of the
# floats' (its table 1). Ours has a scale for each row of $W$ in all columns; the paper's "one scale" has one for $W$ as well.

# %% tags=["hide-input", "numbers-within-5%"]
states = []
for i in range(30):
    parts = ("self_attn.q_proj", "mlp.gate_proj")
    states.append(torch.cat([inputs[f"model.layers.{i}.{part}"] for part in parts]))
found = llm_int8.outlier_features(states)
PAPER = (  # model, parameters, features, layers, positions
    ("GPT-2", "117M", 1, 25, 6),
    ("GPT-2", "1.5B", 2, 41, 35),
    ("fairseq", "2.7B", 5, 52, 18),
    ("fairseq", "6.7B", 6, 100, 75),
    ("fairseq", "13B", 7, 100, 73),
)
print("outlier features     how many   layers   positions")
for name, size, count, in_layers, in_tokens in PAPER:
    print(f"{name:13}{size:>6}{count:>10}{in_layers:>8}%{in_tokens:>10}%")
print(
    f"{'SmolLM2, ours':13}{'135M':>6}{len(found):>10}{100 * found[0].layers:>8.0f}%"
    f"{100 * found[0].tokens:>10.0f}%   feature {found[0].dimension}"
)
TABLE_1 = (  # parameters, floats, one scale, vector-wise, LLM.int8()
    ("125M", 25.65, 87.76, 35.84, 25.83),
    ("1.3B", 15.91, 16.55, 16.82, 15.93),
    ("6.7B", 13.30, 14.59, 14.13, 13.24),
    ("13B", 12.45, 19.08, 16.48, 12.45),
)
print("\nperplexity ×        one scale   one per token   LLM.int8()")
for size, floats, *ppls in TABLE_1:
    ratios = [ppl / floats for ppl in ppls]
    print(f"fairseq{size:>12}{ratios[0]:>10.2f}{ratios[1]:>16.2f}{ratios[2]:>13.2f}")
ratios = [factors[n] for n in ("one scale for X", "a scale per token", "LLM.int8()")]
print(f"SmolLM2, ours  135M{ratios[0]:>10.2f}{ratios[1]:>16.2f}{ratios[2]:>13.2f}")

# %% [markdown]
# **Outlier features: same.** A model of this size has one, as the paper says of its smallest; ours reaches more layers. **LLM.int8(): same**, nothing is lost at any
# size. **A scale for each token: not the same.** The paper's model of 125M loses 40% with it, ours next to nothing. It is another architecture, trained on
# far more text, and we cannot say which of these does it. At 13B the paper loses a third, because outliers are in all layers there.
#
# On a GPU, any checkpoint of `transformers`:
#
# ```python
# config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
# model = AutoModelForCausalLM.from_pretrained(
#     "facebook/opt-13b", device_map="auto", quantization_config=config
# )
# ```
#
# It halves the memory. It does not always save time: in the paper's table 5 the first product of a feed-forward network runs at 0.14 times the speed of
# 16 bits in the smallest GPT-3, 0.86 times at 6.7B, and 1.81 times at 175B.
#
# ## What to keep
#
# ```python
# def mixed_product(X, codes, a_w, alpha=6.0):            # W in 8 bits: codes, a_w
#     out = (X.abs() >= alpha).any(0)                     # whole columns leave
#     q, a_x = quantize_rows(X * ~out)                    # scales without them
#     y = (q.int() @ codes.int().T) * a_x[:, None] * a_w / 127**2
#     return y + X[:, out] @ (codes[:, out] * a_w[:, None] / 127).T
# ```
#
# With one scale for $X$, W8A8 doubled the perplexity of the 135M model. One column in each linear, 0.14% of them, undid about three quarters of that, four columns nearly all. In the middle layers'
# attention one column of 576 makes about nine tenths of the error.
#
# **Use it** to fit a model in half the memory, at once and without calibration. **Not** for speed below about 10B parameters, not when weights in 8 bits alone are enough
# (then leave $X$ in 16), and not where a static graph is wanted: $O$ changes with each batch, and with it what a token gets.
#
# <details><summary>Why does a scale for each token not help against outlier features?</summary>
#
# They are in nearly every token. So each token's scale is set by its outlier.
#
# </details>
#
# <details><summary>Why not a scale for each column of X?</summary>
#
# The product sums over the columns. Integers with other scales cannot be added; only a scale of the row or of the output comes out of the sum.
#
# </details>
#
# <details><summary>Why do whole columns leave, and not the large values alone?</summary>
#
# A gathered column is a thin dense product, which a GPU does fast. Single values would be a sparse one.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/02-llm-int8.ipynb).
#
# Further reading: the paper, [Dettmers et al. 2022](https://arxiv.org/abs/2208.07339 "dettmers2022int8"); where such outliers come from,
# [Bondarenko et al. 2023](https://arxiv.org/abs/2306.12929 "bondarenko2023quantizable"); tokens with values in the thousands,
# [Sun et al. 2024](https://arxiv.org/abs/2402.17762 "sun2024massive").
