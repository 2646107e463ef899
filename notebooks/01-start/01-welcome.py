# %% [markdown]
# # Welcome: what does a token cost?
#
# Every word that a language model writes costs money, and by the end of this page you will be able to say how much,
# from nothing but bytes and seconds. On the way you meet all that a lesson of this course is made of: numbers computed
# before your eyes, a guess, a figure that moves, an exercise that says what is wrong with your answer.

# %% [markdown]
# **How to read a lesson.** It is a notebook. Click on a cell and press Shift+Enter: it runs, and the next one is
# selected. Run them from top to bottom, or all at once with *Run → Run All Cells*. Everything here runs on a laptop in
# seconds, without a GPU and without a network. Change what you like: this is your own copy, and `llmlab reset 01-welcome` in
# a terminal gives a fresh one. The next cell is the only set-up that a lesson needs.

# %%
import time

import torch

from llmlab.checks.start.welcome import check
from llmlab.course import compare, explore, figure, plt, show
from llmlab.course.grading.checking import Failed
from llmlab.models.accounting import kv_cache_bytes, parameters
from llmlab.models.presets import preset
from llmlab.start import welcome

# %% [markdown]
# ## What it costs
#
# Take Llama 2 70B, and count its parameters from its shape. In 16 bits, each takes two bytes. A large GPU of today, the
# H100, has 80 GB of memory and reads 3.35 TB per second from it. So the model needs two of them, and to write one token
# it has to read all its weights once, because every weight takes part in every token.
#
# The last number that we need is what an hour of a GPU costs. That one is no fact of nature: 3 dollars is a guess for
# this page, so put in your own.

# %%
llama = preset("llama-2-70b")
N = parameters(llama)
# of one H100: bytes, bytes per second, dollars per hour
memory, bandwidth, price = 80e9, 3.35e12, 3.00

W = welcome.weight_bytes(N, bits=16)
alone = welcome.tokens_per_second(W, 2 * bandwidth)
dollars_alone = welcome.dollars_per_million_tokens(2 * price, alone)
print(f"{N:,} parameters take {W / 1e9:.0f} GB: {W / memory:.1f} GPUs full of weights")
print(
    f"two GPUs read them {alone:.0f} times per second: at most {alone:.0f} tokens per"
    " second for one reader"
)
print(f"a million tokens cost {dollars_alone:.0f} dollars")

# %% [markdown]
# A million tokens is about ten novels. Nobody would pay that for ten novels of machine prose, and nobody does: the same model
# is sold for a small fraction of it. Nothing in the calculation is wrong. What is wrong is the *one reader*.

# %% [markdown]
# ## Predict
#
# The two GPUs now write for 16 readers at once, each with a conversation of 4,096 tokens behind them. **How many tokens per
# second do they write, all readers together?** Still 49? Sixteen times as many? Somewhere between? Write your guess down,
# then run the next cell. Guessing first, even badly, is what makes the answer stay; each lesson asks for one guess.

# %%
C = kv_cache_bytes(llama, batch=1, tokens=4096)
together = welcome.tokens_per_second(W, 2 * bandwidth, batch=16, cache_bytes=C)
print(f"each reader's own memory of the conversation: {C / 1e9:.2f} GB")
print(
    f"tokens per second: {together:.0f}, which is {together / alone:.1f} times as many"
)

# %% [markdown]
# Nearly sixteen times the tokens, on the same machines, in nearly the same time. It looks like something for nothing. It is
# the most important fact about serving language models.

# %% [markdown]
# ## The idea
#
# Here is what the GPUs read to write one token for each reader. The weights are read once per step, however many readers wait for
# that step. Only the *cache* (the keys and values of each conversation, which the lesson on the KV cache takes apart) is
# read for each reader anew.

# %%
readers = [1, 4, 16]
fig, ax = plt.subplots(figsize=(4.8, 2.9))
weights_part = [W / 1e9] * 3
cache_part = [b * C / 1e9 for b in readers]
labels = [f"{b} reader{'s' * (b > 1)}" for b in readers]
ax.barh(labels, weights_part, label="weights, read once")
ax.barh(labels, cache_part, left=weights_part, label="caches, one each")
for i, b in enumerate(readers):
    total = (W + b * C) / 1e9
    ax.text(total + 3, i, f"{total / b:.0f} GB per token", va="center")
ax.set(xlabel="GB read for one step", xlim=(0, 235))
ax.grid(axis="y", visible=False)
ax.invert_yaxis()
ax.legend(loc="lower left", bbox_to_anchor=(-0.25, 1), ncols=2)
figure(
    fig,
    alt=(
        "Three bars of GB read per step for 1, 4 and 16 readers. The weights are"
        f" {W / 1e9:.0f} GB in each; the caches add {C / 1e9:.1f} GB per reader. Per"
        f" token, reading falls from {(W + C) / 1e9:.0f} GB to"
        f" {(W / 16 + C) / 1e9:.0f} GB."
    ),
)

# %% [markdown]
# In symbols, with $W$ bytes of weights, $b$ readers (the *batch*), $C$ bytes of cache for each, and a memory that
# delivers $\beta$ bytes per second:
#
# $$\text{seconds per step} \;\ge\; \frac{W + b\,C}{\beta} \qquad\qquad \text{tokens per second} \;\le\; \frac{b\,\beta}{W + b\,C}$$
#
# Read the right one at its two ends. While $bC$ is small against $W$, it grows as $b\beta/W$: each further reader is
# free. When $b$ is large it tends to $\beta/C$, and no batch helps any more. This is the memory side of the model of
# [Pope et al. 2022](https://arxiv.org/abs/2211.05102 "pope2022efficiently"). It leaves out the arithmetic, which counts once the batch
# has hundreds of readers, and all overhead. So it is a *bound*: a system may be slower, and none is faster.

# %% [markdown]
# ## The code
#
# Each lesson has a short file in the package that you can read from top to bottom, and `show` puts it on the page as it is:
# never a copy, so never out of date. These two functions are all that the numbers above came from.

# %%
show(welcome.tokens_per_second, welcome.dollars_per_million_tokens)

# %% [markdown]
# | symbol | argument | unit | here |
# |---|---|---|---|
# | $W$ | `weight_bytes` | bytes | all weights, whatever the precision |
# | $\beta$ | `bandwidth` | bytes per second | of all GPUs together |
# | $b$ | `batch` | readers | one token for each per step |
# | $C$ | `cache_bytes` | bytes | of one reader |

# %% [markdown]
# ## Against the library
#
# Never believe a course that only agrees with itself. In each lesson the code meets the library that the industry uses, on the
# same inputs, and one line says how far they agree. Here it is the softmax of your third exercise against PyTorch's, on
# logits that would overflow a careless one.

# %%
torch.manual_seed(0)
logits = 1000 * torch.randn(64, 2048)
compare(welcome.softmax(logits), torch.softmax(logits, dim=-1), what="softmax")

# %% [markdown]
# And the bound meets a machine: yours. A matrix of 64 MB stands for the weights. The first number is the time that one core
# takes to multiply it by one vector (one reader), the second by sixteen at once. If reading cost nothing and arithmetic all, the
# second would take sixteen times as long.

# %%
# NBVAL_IGNORE_OUTPUT
weights = torch.randn(4096, 4096)


def seconds(batch: int) -> float:
    """The core's own time, the best of many: other programs only ever add to it."""
    x, best = torch.randn(4096, batch), float("inf")
    for _ in range(20):
        started = time.thread_time()
        weights @ x
        best = min(best, time.thread_time() - started)
    return best


threads = torch.get_num_threads()
torch.set_num_threads(1)
one, sixteen = seconds(1), seconds(16)
torch.set_num_threads(threads)
print(
    f"1 reader: {1000 * one:.1f} ms, so this core reads about"
    f" {weights.nbytes / one / 1e9:.0f} GB per second"
)
print(
    f"16 readers: {1000 * sixteen:.1f} ms, {sixteen / one:.1f} times as long for 16"
    " times the tokens"
)

# %% [markdown]
# It is more than the bound allows for, since a core has little arithmetic to go with its memory, and far less than sixteen. A GPU has
# hundreds of operations for each byte that it reads, so there the step hardly gets longer.
#
# Timings differ from one machine to the next, and yours will differ from the stored ones. That is the one kind of number
# here that may; all others should come out as printed.

# %% [markdown]
# ## The experiment
#
# So serve as many readers as possible. What stops us is memory: weights and caches have to fit together. Let us fill it, and
# also shrink the weights. At 4.5 bits per weight (4 bits and a shared scale for each small group) a good method loses little
# quality, as the part on compression will show you on a real model.

# %%
GPUS = 2


def cost_curve(bits: float, gpus: int = GPUS) -> tuple[list[int], list[float]]:
    """Batches up to what memory holds, and the dollars for a million tokens at each."""
    W = welcome.weight_bytes(N, bits)
    most = int((gpus * memory - W) // C)
    batches = (
        sorted({max(1, round(most ** (i / 24))) for i in range(25)})
        if most >= 1
        else []
    )
    speed = [welcome.tokens_per_second(W, gpus * bandwidth, b, C) for b in batches]
    return batches, [welcome.dollars_per_million_tokens(gpus * price, s) for s in speed]


fig, ax = plt.subplots(figsize=(6, 3.6))
for bits in (16, 8, 4.5):
    batches, dollars = cost_curve(bits)
    (line,) = ax.plot(batches, dollars, label=f"{bits:g} bits")
    ax.plot(batches[-1], dollars[-1], "o", color=line.get_color())
    ax.annotate(f" ${dollars[-1]:.2f}", (batches[-1], dollars[-1]), va="bottom")
    print(
        f"{bits:>4g} bits: room for {batches[-1]:>2} readers, ${dollars[-1]:.2f} for a"
        " million tokens"
    )
ax.set(
    xscale="log",
    yscale="log",
    xlabel="readers at once",
    ylabel="dollars per million tokens",
    xlim=(0.9, 200),
)
ax.set_title(
    f"Llama 2 70B on {GPUS} GPUs: the dot is where memory is full", fontsize=10
)
ax.legend()
figure(
    fig,
    alt=(
        "Dollars per million tokens against readers at once, both logarithmic, for"
        " weights of 16, 8 and 4.5 bits. All fall nearly in proportion to the readers;"
        " each line ends in a dot where memory is full, lowest for 4.5 bits."
    ),
)
last = cost_curve(4.5)[1][-1]
print(
    f"from one reader at 16 bits to a full machine at 4.5: {dollars_alone / last:.0f}"
    " times cheaper"
)

# %% [markdown]
# The same model, on the same two GPUs. Smaller weights help twice: less to read per step, and more room for readers. That is the whole
# course in one plot. Its parts are the ways to move these lines: fewer bits (compression), more chips (parallelism), caches
# that waste nothing and kernels that read less (inference, compilers, chips), and many fine-tuned models on one set of
# weights (parameter-efficient fine-tuning).

# %% [markdown]
# ## A wrong answer gets its diagnosis
#
# You learn a function by writing it. Each lesson has a notebook of exercises; below each stands a *check*. It
# calls your function on inputs that are chosen to expose the usual mistakes, and when you make one, it tells you which.
# Here is a softmax that many would write, and that passes a quick look. The real check, from this lesson's exercises,
# reads it.


# %%
def one_maximum_for_all(x):
    e = (x - x.max()).exp()
    return e / e.sum(dim=-1, keepdim=True)


try:
    check.softmax(one_maximum_for_all)
except Failed as verdict:
    print(verdict)

# %% [markdown]
# It did not say "wrong", nor did it show the answer. It named the mistake, and that is enough to go on. (In the exercises
# you call the check without the `try`: the cell then fails with this text.) More wrong answers, some of them foreseen by
# the author of the check, some recognised by how they differ from the right one:

# %%
attempts = {
    "no maximum at all": (
        check.softmax,
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    ),
    "the wrong dimension": (check.softmax, lambda x: x.softmax(0)),
    "changes its input": (
        check.softmax,
        lambda x: x.exp_().div_(x.sum(-1, keepdim=True)),
    ),
    "forgets to return": (check.softmax, lambda x: None),
    "weights read per reader": (
        check.tokens_per_second,
        lambda W, beta, b, C: beta / (W + C),
    ),
    "tokens per hour": (
        check.tokens_per_second,
        lambda W, beta, b, C: 3600 * b * beta / (W + b * C),
    ),
    "bits, not bytes": (check.weight_bytes, lambda n, bits: int(n * bits)),
}
for name, (exercise, answer) in attempts.items():
    print(f"{name}\n    {exercise.verdict(answer).message}")

# %% [markdown]
# When the diagnosis is not enough, there are hints. Each exercise has up to three, and every call shows the next. The first
# is a nudge, the last nearly the answer.

# %%
check.hint("softmax")

# %% [markdown]
# Who checks the checks? Each one comes with the mistakes that its author thought of, as code, and the course's own tests
# hold it to rejecting them all, each with its diagnosis, and to accepting the solution.

# %% [markdown]
# ## Play
#
# A lesson has a figure that moves. Drag its sliders, or put the focus on one and press the arrow keys. It works in the published book too. Look
# for three things: where one GPU stops being enough; what a further GPU does to the *price* of a token, not to its speed;
# and which of 16 bits on eight GPUs and 4.5 bits on one is the cheaper.


# %%
# NBVAL_IGNORE_OUTPUT
def draw(bits: float, gpus: int):
    fig, ax = plt.subplots(figsize=(6, 3.2))
    batches, dollars = cost_curve(bits, gpus)
    if batches:
        ax.plot(batches, dollars)
        ax.plot(batches[-1], dollars[-1], "o", color="C1")
        ax.annotate(f"${dollars[-1]:.2f} with {batches[-1]} readers", (1.2, 0.3))
    else:
        ax.annotate("the weights do not fit", (1.2, 0.3))
    ax.set(xscale="log", yscale="log", xlim=(0.9, 1000), ylim=(0.2, 60))
    ax.set(xlabel="readers at once", ylabel="dollars per million tokens")
    ax.set_title(
        f"Llama 2 70B, {bits:g} bits, {gpus} GPU{'s' * (gpus > 1)}", fontsize=10
    )
    return fig


def describe(bits: float, gpus: int) -> str:
    batches, dollars = cost_curve(bits, gpus)
    if not batches:
        return f"{bits:g} bits on {gpus} GPU: the weights do not fit."
    return (
        f"{bits:g} bits on {gpus} GPUs: from ${dollars[0]:.2f} for one reader to"
        f" ${dollars[-1]:.2f} for {batches[-1]}."
    )


explore(
    draw,
    alt=describe,
    title="What a million tokens cost",
    bits=[16, 8, 4.5],
    gpus=[1, 2, 4, 8],
)

# %% [markdown]
# ## At scale
#
# Each lesson ends where the real work is done: on many chips and large models, next to what a paper reports. Pope et al.
# write a token of PaLM 540B in 29 ms at a small batch, with 8-bit weights on 64 TPU v4 chips of 1.2 TB per second each. Our
# bound for the same, with the caches left out:

# %%
ours = 1 / welcome.tokens_per_second(
    welcome.weight_bytes(540_000_000_000, bits=8), 64 * 1.2e12
)
print("                     paper      ours")
print(f"milliseconds         29         at least {1000 * ours:.1f}")
print(f"not the same: the real system takes {29e-3 / ours:.1f} times the bound")

# %% [markdown]
# A bound that is broken is wrong; this one holds. What fills the gap is what it leaves out: 64 chips have to talk to each other in every
# layer, and no memory delivers all that is written on the box. The part on parallelism counts that talk byte by byte.
#
# To see what your own machine is worth to the course, and whether anything in it is amiss, open a terminal (*File → New
# → Terminal*). These are all the commands that you need:
#
# | command | what it does |
# |---|---|
# | `llmlab doctor` | looks at versions, memory, cores, GPU and models, and says what to do |
# | `llmlab start 01-welcome` | makes your copy of the exercises, once; it is never overwritten |
# | `llmlab check 01-welcome` | runs your copy in a fresh kernel and marks it |
# | `llmlab hint 01-welcome softmax` | shows the next hint |
# | `llmlab progress` | shows the map of the course with what you have done |

# %% [markdown]
# ## Takeaways
#
# - A 70B model is 138 GB in 16 bits, and two GPUs that read 6.7 TB per second write at most 49 tokens per second for
#   one reader.
# - The weights are read once per step for all readers, so 16 readers get 13.8 times the tokens in nearly the same time.
# - Filling the memory and shrinking the weights to 4.5 bits brings a million tokens from 34 dollars to 44 cents: 78 times
#   cheaper.
#
# Now write it yourself: [the exercises](../../work/01-start/01-welcome.ipynb) are three, gentle, and take about 25 minutes. Then
# [meet the course's models](02-the-course-models.ipynb): one that was trained on two cores, and a real one.
#
# References: [Pope et al. 2022](https://arxiv.org/abs/2211.05102 "pope2022efficiently"), Efficiently Scaling Transformer
# Inference; [Touvron et al. 2023](https://arxiv.org/abs/2307.09288 "touvron2023llama2"), Llama 2.
