# %% [markdown]
# # LLM-QAT
#
# GPTQ and AWQ choose better codes for weights that stay as they were. One can also train the rounded model until it has got used to its levels. That
# needs text like the text that the model was made from, and nobody hands that out. LLM-QAT lets the model write it. It also rounds the
# KV cache. At the end you own its rounding, its sampler, its loss and its cache.

# %% tags=["hide-input"]
import csv
import math

import torch

from llmlab.checks.compression.llm_qat import check
from llmlab.compression import llm_qat
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
from llmlab.models import accounting, course_model
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# The earlier lessons brought weights down to 4 bits. A server keeps something else, too: the keys and values of every token of every chat.

# %%
config = preset("llama-2-70b")
weights = accounting.parameters(config) * 4 / 8 / 1e9
print(f"Llama 2 70B, weights in 4 bits          {weights:5.1f} GB")
for bits in (16, 8, 4):
    cache = llm_qat.kv_bytes(config, tokens=4096, bits=bits, batch=64) / 1e9
    print(f"64 chats of 4,096 tokens, cache, {bits:2} bits {cache:5.1f} GB")

# %% [markdown]
# Once the weights are small, the cache is the larger part. Weights, activations and cache get their bits apart; the paper writes W-A-KV, as in 4-8-4, where 16
# stands for not rounded.
#
# ## Predict
#
# The course model (1.05 M parameters), rounded to 3-8-4, has a loss on held-out text that is a quarter of a nat per token above that of the float model. Call this difference the
# *added loss*. Now the rounded model is trained for 50 steps of 8 texts of 128 tokens. How much of the added loss is left?

# %%
own_guess = predict(
    "Trained on text that the float model wrote: how much added loss is left?",
    unit="%",
)
corpus_guess = predict(
    "Trained on the very corpus that the float model learned from: how much?",
    unit="%",
)

# %% [markdown]
# ## By hand
#
# A token with four values and 3 bits: codes −3 … 3. The largest $|x|$ is 1.4, so $\alpha = 1.4 / 3 = 0.467$.
#
# | | | | | |
# |---|---|---|---|---|
# | $x$ | 0.9 | −0.3 | 0.1 | −1.4 |
# | $x / \alpha$ | 1.93 | −0.64 | 0.21 | −3 |
# | code | 2 | −1 | 0 | −3 |
# | $\hat x$ | 0.93 | −0.47 | 0 | −1.4 |
#
# The largest value is a level itself: nothing is clipped.
#
# A quantiser that clips would have a smaller $\alpha$ and finer levels for the three other values, and would pay with the largest one.
#
# Now training. One weight $w = 0.6$, whole numbers as levels, and a loss of $\frac{1}{2} \hat w^2$. Its true derivative by $w$ is 0 almost everywhere, as $\hat w$ does not move when $w$ moves a little. *Straight-through* takes the derivative by $\hat w$ in
# its place: that is $\hat w$ itself, here 1. With a learning rate of 0.08:
#
# | step | $w$ | $\hat w$ | gradient | next $w$ |
# |---|---|---|---|---|
# | 1 | 0.60 | 1 | 1 | 0.52 |
# | 2 | 0.52 | 1 | 1 | 0.44 |
# | 3 | 0.44 | 0 | 0 | 0.44 |
#
# For two steps nothing seems to happen. Then the weight crosses to another level.

# %%
x = torch.tensor([[0.9, -0.3, 0.1, -1.4]])
step = llm_qat.step_size(x, bits=3)
print("codes ", llm_qat.codes_of(x, step, bits=3).int().tolist()[0])
print("x̂     ", [round(v, 2) for v in llm_qat.fake_quantize(x, 3)[0].tolist()])
w = 0.6
for i in (1, 2, 3):
    gradient = round(w)  # that of ½ ŵ², handed straight through
    print(f"step {i}: w = {w:.2f}, ŵ = {round(w)}, next w = {w - 0.08 * gradient:.2f}")
    w -= 0.08 * gradient

# %% [markdown]
# ## The idea

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 3.0))
line = torch.linspace(-1.4, 1.4, 561)
stairs = torch.round(line / step.item()) * step.item()
ax.plot(line, stairs, color=palette.blue)
ax.plot(line, line, color=palette.vermillion, linestyle="--")
ax.plot(x[0], llm_qat.fake_quantize(x, 3)[0], "o", color=palette.blue)
ax.text(-1.3, 0.75, "backward: slope 1", color=palette.vermillion)
ax.text(0.05, -1.2, "forward: stairs", color=palette.blue)
ax.set(xlabel="x", ylabel="x̂")
figure(
    fig,
    alt=(
        "A staircase of seven levels from −1.4 to 1.4, which the forward pass follows,"
        " and a straight line of slope 1 through it, which the backward pass follows."
        " Four dots on the staircase are the values worked by hand."
    ),
)

# %% [markdown]
# **LLM-QAT** ([Liu et al. 2023](https://arxiv.org/abs/2305.17888 "liu2023llmqat")) rounds symmetrically, up to the largest value:
#
# $$\hat X = \alpha \left\lfloor X / \alpha \right\rceil \qquad \alpha = \frac{\max|X|}{2^{N-1} - 1}$$
#
# with one $\alpha$ per output channel of a weight, per token of an activation, and per token of the keys and of the values. Outliers matter in language models, so
# nothing is clipped, and $\alpha$ is computed anew in each step. Gradients pass straight through
# ([Bengio et al. 2013](https://arxiv.org/abs/1308.3432 "bengio2013estimating")).
#
# **The data.** The float model writes it. The first token of a text is any of the vocabulary. The next three to five are the likeliest ones, all later ones are
# drawn from the model's distribution. The authors call this hybrid: a few greedy tokens lead from an odd first word to something sensible, and draws keep texts different.
#
# **The loss.** The float model $T$ is the teacher. At every position $t$ its whole distribution is the label for the rounded model $S$:
#
# $$L = -\frac{1}{n} \sum_t \sum_c p_T(c \mid x_{\le t}) \, \log p_S(c \mid x_{\le t})$$
#
# Both say at position $t$ what comes next, so nothing is shifted, as one must with tokens for labels.
#
# **The cache.** In training, attention sees rounded keys and values. In use they are stored as codes, and a token's $\alpha$ depends on that token alone. So a
# prompt read at once leaves the same cache as its tokens one by one.
#
# All weights are trained, norms and embeddings, too; but only linears are rounded. The float weights stay in memory during training. At the end each linear is rounded once more, for good.
#
# ## Your turn
#
# Rounding with the straight-through gradient. $x$ has shape (B, T, d), each of its tokens an $\alpha$ of its own. No gradient runs through $\alpha$, and a token of zeros
# comes back as zeros.


# %%
def fake_quantize(x, bits: int):
    """x̂, whose gradient is handed on to x as it is."""
    raise NotImplementedError("five lines of yours")


your_turn(check.fake_quantize, fake_quantize)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(x, bits):
    top = 2 ** (bits - 1) - 1
    alpha = x.detach().abs().amax(-1, keepdim=True) / top
    alpha = torch.where(alpha > 0, alpha, 1.0)
    x_hat = torch.round(x / alpha) * alpha
    return x + (x_hat - x).detach()


your_turn(check.fake_quantize, one_answer)

# %% [markdown]
# ## The code
#
# | value | shape | holds |
# |---|---|---|
# | `step` | (out, 1), (B, T, 1), (B, 1, T, 1) | $\alpha$ of weights, activations, keys; float16 |
# | `codes` | (B, S, ⌈K·D / 8⌉ · bits) | the bytes of each token's codes; S tokens, K key/value heads of D channels |
# | `student`, `teacher` | (B, T, V) | logits after the same tokens |

# %% tags=["hide-output"]
show(
    llm_qat.fake_quantize,
    llm_qat.self_generate,
    llm_qat.soft_label_loss,
    llm_qat.QuantizedCache,
)

# %% [markdown]
# ## Against the library and mathematics
#
# PyTorch's fake-quant has the same format when it is given our $\alpha$. Then values and gradients agree. With a smaller one it clips, and stops the gradient there; ours
# never does.

# %%
torch.manual_seed(0)
x = torch.randn(6, 40, requires_grad=True)
alpha, zero = llm_qat.step_size(x, 4)[:, 0], torch.zeros(6, dtype=torch.int32)
library = torch.fake_quantize_per_channel_affine(x, alpha, zero, 0, -7, 7)
ours = llm_qat.fake_quantize(x, 4)
compare(ours, library, "values")
upstream = torch.randn(6, 40)
(ours_grad,) = torch.autograd.grad(ours, x, upstream)
(library_grad,) = torch.autograd.grad(library, x, upstream)
compare(ours_grad, library_grad, "gradients", tol=0)

small = LlamaConfig(61, 32, 48, 2, 4, num_key_value_heads=2, initializer_range=0.2)
model = Llama(small).double()
ids = torch.randint(61, (2, 12))
with torch.no_grad():
    in_training = llm_qat.logits(model, ids, kv_bits=4)
    cache = llm_qat.QuantizedCache(num_layers=2, bits=4)
    one_by_one = [model(ids[:, t : t + 1], cache=cache) for t in range(12)]
compare(torch.cat(one_by_one, 1), in_training, "cache, token by token, and training")
compare(cache.nbytes, llm_qat.kv_bytes(small, 12, 4, batch=2), "bytes", tol=0)

# %% tags=["hide-cell"]
# Paper, code of the authors, library, ours: where they differ.
rows = [
    ("", "paper", "authors' code", "llmcompressor*", "ours"),
    ("keys are rounded", "–", "before RoPE", "after RoPE", "after RoPE"),
    ("α of keys, values", "per token", "per token", "one per layer", "token or head"),
    ("α is", "dynamic", "dynamic", "static", "dynamic"),
    ("gradient stops", "–", "at |x| ≥ 2", "–", "never"),
    ("greedy tokens", "3 to 5", "2 to 4", "–", "3 to 5"),
    ("then drawn from", "the model", "its 50 likeliest", "–", "the model"),
    ("loss, positions", "–", "sum", "–", "mean"),
]
for row in rows:
    print(f"{row[0]:19}" + "".join(f"{cell:>17}" for cell in row[1:]))
print(
    "* as measured with 0.14.0.1: by default a moving average, the first sample rules"
)
print("transformers 5.23.0, QuantizedCache: ImportError without optimum-quanto or hqq")

# %% [markdown]
# The authors' repository differs from their paper in small things. `max_length=3` counts the first token, so that two greedy ones follow. `do_sample=True` takes only the 50
# likeliest tokens, the default of `transformers`. And the quantiser clips nothing, but its gradient stops at $|x| \ge 2$, which we ran to see.
#
# ## The experiment
#
# What does the course model write? Three texts of each kind, and how often four tokens in a row have come before in the same text:

# %% tags=["hide-input", "nbval-ignore-output"]
teacher = course_model.load()
decode = course_model.load_tokenizer().decode


def repeated(text) -> float:
    """The share of runs of four tokens that occur earlier in their text."""
    shares = []
    for row in text.unfold(1, 4, 1).tolist():  # (B, runs, 4)
        runs = [tuple(run) for run in row]
        shares.append(1 - len(set(runs)) / len(runs))
    return sum(shares) / len(shares)


for kind in llm_qat.KINDS:
    text = llm_qat.self_generate(teacher, 6, 48, kind, seed=0)
    print(f"{kind}: {repeated(text):.0%} repeated")
    for row in text[:3, :24].tolist():
        print("   ", decode(row).replace("\n", " ")[:74])

# %% [markdown]
# Greedy text runs in circles. Training takes longer than a page may, so the runs are stored: `scripts/llm_qat_sweep.py` made them, with three seeds, each with
# other text. They are judged on 48 windows of 256 held-out tokens. A dot is one seed.

# %% tags=["hide-output"]
with llm_qat.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def grown(model, bits, text="", labels="soft", alpha="token") -> list[float]:
    """The added loss: that of the float model is taken off; a number a seed."""
    key = (model, bits, text, labels if text else "", alpha)
    names = ("model", "bits", "text", "labels", "alpha")
    return [float(r["grown"]) for r in runs if tuple(r[n] for n in names) == key]


def left(bits, text, labels="soft") -> list[float]:
    """What is left of the added loss, in percent."""
    (rounding,) = grown("course", bits)
    return [100 * g / rounding for g in grown("course", bits, text, labels)]


def mean(values) -> float:
    return sum(values) / len(values)


own_guess.settle(mean(left("3-8-4", "hybrid")), digits=2)
corpus_guess.settle(mean(left("3-8-4", "corpus")), digits=2)

# %% tags=["hide-input"]
lines = {
    "own text, hybrid": ("hybrid", "soft"),
    "own text, all drawn": ("sampled", "soft"),
    "own text, greedy": ("greedy", "soft"),
    "its corpus": ("corpus", "soft"),
    "the Bible": ("bible", "soft"),
    "hybrid, hard labels": ("hybrid", "hard"),
    "its corpus, hard labels": ("corpus", "hard"),
}
fig, ax = plt.subplots(figsize=(4.8, 3.0))
for i, (name, key) in enumerate(lines.items()):
    values = left("3-8-4", *key)
    own = name.startswith("own") or "hybrid" in name
    color = palette.blue if own else palette.vermillion
    ax.plot(values, [i] * len(values), "o", color=color, alpha=0.8)
    print(f"{name:24} " + "  ".join(f"{v:.0f}%" for v in sorted(values)) + " left")
for bits in ("3-8-4", "4-4-4", "4-8-4"):
    (rounding,) = grown("course", bits)
    shares = "  ".join(f"{v:.0f}%" for v in sorted(left(bits, "hybrid")))
    print(
        f"{bits}: rounding adds {rounding:.2f} nats; trained on own text {shares} left"
    )
gaps = [
    a - b for a, b in zip(left("3-8-4", "hybrid"), left("3-8-4", "corpus"), strict=True)
]
print("own text less its corpus, in points:", "  ".join(f"{g:+.1f}" for g in gaps))
ax.set_yticks(range(len(lines)), list(lines))
ax.set(xlim=(0, 103), xlabel="added loss that is left, %")
ax.axvline(100, color=palette.gray, linestyle="--")
ax.text(98, 0.1, "not trained", color=palette.gray, ha="right", fontsize=9)
ax.invert_yaxis()
figure(
    fig,
    alt=(
        "What is left of the added loss, a dot a seed: about 55% after training"
        " on hybrid or drawn text of its own and on its corpus, close to 70% on the"
        " Bible and with hard labels, and about 80% on greedy text."
    ),
)

# %% [markdown]
# Fifty steps take away close to half of the added loss, and **text that the model wrote serves as well as its corpus**: the last line gives the difference for each seed. It is
# small, and its sign changes. Neither beats the other. The model was trained on that corpus for long, so what it writes is much like it; that is the whole trick.
#
# Three things do matter. *Labels*: with the next token in place of the distribution, over two thirds of it are left, on the very same text. One token says little of
# the distribution that it was drawn from. *Kind of text*: greedy text mends least, for it shows the model a few phrases again and again. *Foreign text*: verses of the Bible, which this model has never seen, are
# worse than its own text. And one thing does not matter here: hybrid or all drawn. A model of one million parameters and a vocabulary of 2,048 tokens may be too small to show what the
# greedy start is good for.
#
# With 4-bit weights the added loss is smaller, and so is what 50 steps mend: about a quarter of it at 4-8-4, and a third at 4-4-4, where most of it comes from the activations.
# Fifty steps are few: the authors' script makes one pass over all of its texts, eight in a step.
#
# ## Fewer bits for the cache
#
# And without any training, how few bits do keys and values bear? The real model, SmolLM2-135M-Instruct, its weights and activations as they are, on 1,024 tokens of
# held-out addresses:

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 2.6))
KV = (8, 4, 3, 2)
growth = {}
for alpha, color in (("token", palette.vermillion), ("head", palette.blue)):
    for bits in KV:
        (g,) = grown("real", f"16-16-{bits}", alpha=alpha)
        growth[bits, alpha] = math.exp(g)
    values = [growth[bits, alpha] for bits in KV]
    ax.plot(KV, values, "o-", color=color, label=f"one α per {alpha}")
    print(f"α per {alpha:6}", *(f"{b} bits × {growth[b, alpha]:.2f} " for b in KV))
ax.set(yscale="log", xlabel="bits of keys and values", ylabel="perplexity, times")
ax.set_yticks([1, 2, 10, 100], ["1", "2", "10", "100"])
ax.minorticks_off()
ax.invert_xaxis()
ax.legend()
figure(
    fig,
    alt=(
        "By how much perplexity grows on a logarithmic axis, as bits fall from 8 to 2:"
        " not at all at 8, by about a third at 4, and then steeply; the line with one α"
        " per head lies below that with one α per token throughout."
    ),
)

# %% [markdown]
# Eight bits cost nothing that can be seen. At 4 bits perplexity grows by about a third, below that the model is ruined. An $\alpha$ per head is better: else the loudest of its three
# key/value heads sets the step for all of them. This is the smallest of models, and larger ones have more to spare. But it shows why LLM-QAT trains with a rounded cache, not only with
# rounded weights. (The file of this model stored its linears in 4 bits once. Here they are floats again, and they are the same in all eight runs: what is compared is the cache.)
#
# ## Play
#
# Llama 3.1 8B has room for 131,072 tokens. Move the bits and the tokens. The bytes are counted for its shape, with one $\alpha$ per head of each token; the growth of perplexity is that
# measured on the real model above.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
shape = preset("llama-3.1-8b")
TOKENS = [8192, 32768, 131072]
LIMIT = 5  # GB


def cost(bits: int, tokens: int) -> tuple[float, float]:
    """GB of the cache, and by what factor perplexity grows."""
    size = llm_qat.kv_bytes(shape, tokens, bits, per_head=True) / 1e9
    return size, growth.get((bits, "head"), 1.0)


def draw(bits: int, tokens: int):
    size, factor = cost(bits, tokens)
    fig, ax = plt.subplots(figsize=(4.8, 1.9))
    ax.barh(["cache"], [size], color=palette.blue)
    ax.axvline(LIMIT, color=palette.vermillion, linestyle="--")
    ax.set(xlim=(0, 18), xlabel="GB; the line is the limit")
    ax.set_title(f"{size:.2f} GB, perplexity × {factor:.2f}")
    return fig


small_enough = [bits for bits in (16, *KV) if cost(bits, TOKENS[-1])[0] < LIMIT]
best = min(small_enough, key=lambda bits: cost(bits, TOKENS[-1])[1])


def missing(bits: int, tokens: int) -> str:
    size, factor = cost(bits, tokens)
    if tokens < TOKENS[-1]:
        return f"{tokens:,} tokens are fewer than asked."
    if size >= LIMIT:
        return f"{size:.2f} GB are too many."
    return "" if bits == best else f"it can be better than × {factor:.2f}."


explore(
    draw,
    alt=lambda bits, tokens: (
        f"{bits} bits, {tokens:,} tokens: the cache takes {cost(bits, tokens)[0]:.2f}"
        f" GB, perplexity grows by a factor of {cost(bits, tokens)[1]:.2f}."
    ),
    title="Bits for the cache",
    challenge="131,072 tokens in less than 5 GB, with the least growth of perplexity.",
    missing=missing,
    start={"bits": 16, "tokens": 8192},
    bits=[16, *KV],
    tokens=TOKENS,
)

# %% [markdown]
# ## At scale
#
# The authors train LLaMA 7B. Their script starts a text from each token of the vocabulary, three times, with one more greedy token each time. Below
# it, the accuracy over eight tasks that their repository lists, without examples in the prompt. The line of the float model is from LLaMA's own paper
# ([Touvron et al. 2023](https://arxiv.org/abs/2302.13971 "touvron2023llama")), so compare it with the others only roughly.

# %% tags=["hide-input"]
texts = 64 * 500 * 3  # GPUs, first tokens for each, numbers of greedy tokens
print(f"texts: {texts:,}, up to {texts * 2048 / 1e6:.0f} M tokens")
tasks = {  # boolq, piqa, siqa, hellaswag, winogrande, arc easy, arc challenge, obqa
    "8-8-16": (65.9, 75.7, 79.1, 48.9, 75.8, 70.4, 72.8, 47.8, 56.3),
    "8-8-8": (65.6, 75.5, 79.1, 48.7, 75.5, 70.1, 73.1, 47.2, 56.0),
    "8-8-4": (63.9, 74.1, 78.6, 49.3, 73.3, 67.9, 70.1, 45.5, 52.4),
    "4-8-16": (63.6, 72.9, 77.9, 47.9, 72.9, 68.0, 69.1, 44.8, 55.6),
    "4-8-8": (63.6, 73.6, 77.4, 48.5, 73.0, 68.8, 68.4, 45.5, 53.4),
    "4-8-4": (62.0, 72.4, 76.9, 47.6, 70.5, 65.8, 67.5, 44.4, 50.4),
}
floats = (76.5, 79.8, 48.9, 76.1, 70.1, 72.8, 47.6, 57.2)  # LLaMA's own paper
llama = preset("llama-7b")
print("W-A-KV   published  mean of tasks   cache of 2,048 tokens")
size = llm_qat.kv_bytes(llama, 2048, 16) / 1e6
print(f"16-16-16 {'–':>9} {sum(floats) / 8:10.2f} {'':7} {size:12.0f} MB")
for bits, (published, *each) in tasks.items():
    average = sum(each) / len(each)
    same = "same" if abs(average - published) < 0.1 else "differs"
    size = llm_qat.kv_bytes(llama, 2048, int(bits.split("-")[-1])) / 1e6
    print(f"{bits:8} {published:9} {average:10.2f} {same:>7} {size:12.0f} MB")

# %% [markdown]
# At 4-8-8 the trained model is two to three points below the floats. And the table says what ours says: 8 bits for the cache cost next to nothing, 4 bits cost more. Exactly as they run it:
#
# ```bash
# git clone https://github.com/facebookresearch/LLM-QAT && cd LLM-QAT
# python generate_data.py 0        # and 1 … 63: one GPU each
# python merge_gen_data.py
# bash run_train.sh 4 8 4          # bits of weights, activations, cache; eight GPUs
# ```
#
# Today's servers mostly store keys and values in 8-bit floats, with no training: `vllm serve meta-llama/Llama-3.1-8B-Instruct --kv-cache-dtype fp8`. Its scales
# are 1 by default; llmcompressor finds better ones (`kv_cache_scheme` in its recipe).
#
# Ours trains any Llama of `transformers` by names and kinds of layers: `llm_qat.apply(model, batches, QATConfig(4, 8, 4))`.
#
# ## What to keep
#
# ```python
# alpha = x.detach().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
# x_hat = x + (torch.round(x / alpha) * alpha - x).detach()    # straight-through
#
# p = teacher(ids).detach().softmax(-1)                        # ids: the teacher's own text
# loss = -(p * student(ids).log_softmax(-1)).sum(-1).mean()    # nothing is shifted
# ```
#
# **Use it** when rounding and GPTQ lose too much, you can afford to train the whole model, and its training text is not at hand. **Not** at 8 bits,
# where there is nothing to mend; not when memory is short, for it holds float weights, their gradients, Adam's two moments and a teacher.
#
# <details><summary>Why is the gradient of rounding replaced by 1?</summary>
#
# The true one is 0 nearly everywhere, and nothing would be learned. With 1 the float weight moves on, and crosses to another level now and then.
#
# </details>
#
# <details><summary>Why are soft labels not shifted by one?</summary>
#
# Both models say at position t what comes at t + 1. Logits are compared with logits, so both are at t.
#
# </details>
#
# <details><summary>Why does each token of the cache have its own α?</summary>
#
# Then what is stored never changes when tokens arrive, and a prompt at once gives the same cache as its tokens one by one.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/07-llm-qat.ipynb).
#
# Further reading: [Liu et al. 2024](https://arxiv.org/abs/2402.02750 "liu2024kivi") round keys per channel and values per token, down to 2 bits.
