# %% [markdown]
# # Welcome: what does a token cost?
#
# Every word that a language model writes costs money. By the end of this page you can say how much, from nothing but bytes
# and seconds, and you own the function that says it. On the way you meet all that a lesson of this course is made of.

# %% [markdown]
# **How to read a lesson.** It is a notebook. Click on a cell and press Shift+Enter: it runs, and the next one is
# selected. Run the cells from top to bottom. Everything here runs on a laptop in seconds, without a GPU and without a network.
#
# Code that only draws or imports is folded in most lessons: click on the bar (or on *Show the code* in the book) to open it. Answers are folded too, until you
# run their cell. Change what you like: this is your own copy, and `llmlab reset 01-welcome` in a terminal gives a fresh one.
#
# ## What it costs
#
# Take Llama 2 70B, and count its parameters from its shape. In 16 bits, each takes two bytes. A large GPU of today, the
# H100, has 80 GB of memory and reads 3.35 TB per second from it. So the model needs two of them, and to write one token
# it has to read all its weights once, because every weight takes part in every token.
#
# The last number that we need is what an hour of a GPU costs. That one is no fact of nature: 3 dollars is a guess for
# this page, so put in your own.

# %%
import time

import torch

from llmlab.checks.start.welcome import check
from llmlab.course import compare, explore, figure, plt, predict, show, your_turn
from llmlab.models.accounting import kv_cache_bytes, parameters
from llmlab.models.presets import preset
from llmlab.start import welcome

llama = preset("llama-2-70b")
N = parameters(llama)
# of one H100: bytes, bytes per second, dollars per hour
memory, bandwidth, price = 80e9, 3.35e12, 3.00

W = welcome.weight_bytes(N, bits=16)
alone = welcome.tokens_per_second(W, 2 * bandwidth)
dollars_alone = welcome.dollars_per_million_tokens(2 * price, alone)
print(f"{N:,} parameters take {W / 1e9:.0f} GB: {W / memory:.1f} GPUs full of weights")
print(f"two GPUs read them {alone:.0f} times per second: {alone:.0f} tokens per second")
print(f"a million tokens cost {dollars_alone:.0f} dollars")

# %% [markdown]
# A million tokens is about ten novels. Nobody would pay that for ten novels of machine prose, and nobody does: the same model
# is sold for a small fraction of it. Nothing in the calculation is wrong. What is wrong is the *one reader*.
#
# ## Predict
#
# The two GPUs now write for 16 readers at once, each with a conversation of 4,096 tokens behind them. How many
# tokens do they write per second for all readers together? Type your guess below, then run the cell after it. A guess, even a bad one, is what makes the answer
# stay; each lesson asks for one.

# %%
guess = predict(
    "How many tokens per second do they write, all 16 readers together?",
    unit="tokens per second",
)

# %% tags=["hide-output"]
C = kv_cache_bytes(llama, batch=1, tokens=4096)  # one reader's own memory, in bytes
together = welcome.tokens_per_second(W, 2 * bandwidth, batch=16, cache_bytes=C)
guess.settle(together)
print(
    f"One reader alone got {alone:.0f}: this is {together / alone:.1f} times as many."
)

# %% [markdown]
# It looks like something for nothing: the same machines, nearly the same time for each reader, and far more tokens. It is the
# most important fact about serving language models.
#
# ## By hand
#
# A model keeps what it has worked out about each conversation so far (its *keys and values*) in a *cache*, one per reader.
#
# Take a tiny model. Its weights are $W = 10$ bytes, each reader's cache is $C = 2$ bytes, and the memory delivers
# $\beta = 60$ bytes per second. To write one token for every reader, the machine reads the weights *once* and each reader's cache once.
#
# | readers $b$ | bytes for one step | steps per second | tokens per second |
# |---|---|---|---|
# | 1 | 10 + 2 = 12 | 60 / 12 = 5 | 1 × 5 = 5 |
# | 5 | 10 + 10 = 20 | 60 / 20 = 3 | 5 × 3 = 15 |
# | 25 | 10 + 50 = 60 | 60 / 60 = 1 | 25 × 1 = 25 |
#
# Five readers get three times the tokens. Twenty-five readers get only five times: now the caches are most of what is read. With ever more
# readers it ends at $\beta / C = 30$ tokens per second.
#
# ## The idea
#
# The same for the 70B model. The weights are read once per step, however many readers wait for that step. Only the caches
# are read for each reader.

# %% tags=["hide-input"]
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
# ## Your turn
#
# Write that table as a function. It gets $W$, $\beta$, $b$ and $C$ and returns the tokens per second of all readers together. One or two
# lines are enough. Replace the `raise` line and run the cell: a *check* calls your function on inputs that expose the
# usual mistakes, and tells you which one you made.


# %%
def tokens_per_second(
    weight_bytes: float, bandwidth: float, batch: int = 1, cache_bytes: float = 0.0
) -> float:
    """Tokens per second of all readers together, if only reading takes time."""
    raise NotImplementedError("two lines of yours")


your_turn(check.tokens_per_second, tokens_per_second)

# %% [markdown]
# Stuck? Each exercise has up to three hints, and every call shows the next. The first is a nudge, the last is nearly the answer.
#
# **A wrong answer gets its diagnosis.** A check does not only say "wrong", and it never shows the answer: it names the mistake. These
# are answers that people write, for this exercise and for two others of this lesson.

# %%
check.hint("tokens_per_second")

attempts = {
    "the weights are read per reader": (
        check.tokens_per_second,
        lambda W, beta, b, C: beta / (W + C),
    ),
    "tokens per hour": (
        check.tokens_per_second,
        lambda W, beta, b, C: 3600 * b * beta / (W + b * C),
    ),
    "bits instead of bytes": (check.weight_bytes, lambda n, bits: int(n * bits)),
    "a softmax over the wrong dimension": (check.softmax, lambda x: x.softmax(0)),
    "a softmax that forgets to return": (check.softmax, lambda x: None),
}
for name, (exercise, answer) in attempts.items():
    print(f"{name}\n    {exercise.verdict(answer).message}")

# %% [markdown]
# Who checks the checks? The course's own tests try many wrong answers on each check, each of which must get its diagnosis, and
# right answers in several spellings, which must pass.
#
# ## The code
#
# In symbols, with $W$ bytes of weights, $b$ readers (the *batch*), $C$ bytes of cache for each, and a memory that
# delivers $\beta$ bytes per second:
#
# $$\begin{aligned}
# \text{seconds per step} &\;\ge\; \frac{W + b\,C}{\beta} \\[1ex]
# \text{tokens per second} &\;\le\; \frac{b\,\beta}{W + b\,C}
# \end{aligned}$$
#
# This is the memory side of the model of
# [Pope et al. 2023](https://arxiv.org/abs/2211.05102 "pope2022efficiently"). It leaves out the arithmetic, which counts once the batch
# has hundreds of readers, and all overhead. So it is a *bound*: a system may be slower, and none is faster.
#
# Each lesson has a short file in the package that you can read from top to bottom. `show` puts it on the page as it is: never a
# copy, so never out of date. Open ours when you have your own.

# %% tags=["hide-output"]
show(welcome.tokens_per_second, welcome.dollars_per_million_tokens)

# %% [markdown]
# ## Against the library
#
# Never believe a course that only agrees with itself. In each lesson the code meets the library that the industry uses, on the
# same inputs, and one line says how far they agree. Here it is the softmax of your third exercise against PyTorch's, on
# logits that would overflow a careless one.
#
# And the bound meets a machine: yours. A matrix of 64 MB stands for the weights. One core multiplies it by one vector (one reader),
# then by sixteen vectors at once. If only arithmetic took time, the second would take sixteen times as long.

# %%
torch.manual_seed(0)
logits = 1000 * torch.randn(64, 2048)
compare(welcome.softmax(logits), torch.softmax(logits, dim=-1), what="softmax")

# %% tags=["hide-input", "nbval-ignore-output"]
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
# Sixteen vectors take longer than the bound says, since a core has little arithmetic to go with its memory, but far less than sixteen times as long. A GPU has
# hundreds of operations for each byte that it reads, so there the step hardly gets longer.
#
# Timings differ from one machine to the next, and yours will differ from the stored ones. That is the one kind of number
# here that may; all others should come out as printed.
#
# ## The experiment
#
# So serve as many readers as possible. What stops us is memory: weights and caches have to fit together. Let us fill it, and
# also shrink the weights. At 4.5 bits per weight (4 bits and a shared scale for each small group) a good method loses little
# quality, as the part on compression will show you on a real model.

# %% tags=["hide-input"]
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
#
# ## Play
#
# A lesson has a figure that moves. Drag its sliders, or put the focus on one and press the arrow keys. It works in the published book too.
# A pale trace shows what was there before. When you think that you have met the challenge, press *Check*.


# %% tags=["hide-input", "nbval-ignore-output"]
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


BITS, MACHINES, LIMIT, NONE = [16, 8, 4.5], [1, 2, 4, 8], 0.5, float("inf")
least = {(b, n): min(cost_curve(b, n)[1], default=NONE) for b in BITS for n in MACHINES}
fewest = {b: min(n for n in MACHINES if least[b, n] < LIMIT) for b in BITS}


def missing(bits: float, gpus: int) -> str:
    if least[bits, gpus] == NONE:
        return "the weights do not fit."
    if least[bits, gpus] >= LIMIT:
        return f"a million tokens cost ${least[bits, gpus]:.2f}."
    return "fewer GPUs can do it." if gpus > min(fewest.values()) else ""


explore(
    draw,
    alt=describe,
    title="What a million tokens cost",
    challenge="Bring a million tokens below $0.50 with as few GPUs as possible.",
    missing=missing,
    bits=BITS,
    gpus=MACHINES,
)

# %% tags=["hide-output"]
for bits, gpus in fewest.items():
    print(f"{bits:>4g} bits: {gpus} GPUs, ${least[bits, gpus]:.2f}")

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
#
# ## What to keep
#
# ```python
# def tokens_per_second(W, beta, b, C):
#     return b * beta / (W + b * C)
# ```
#
# Two GPUs write 49 tokens per second from the 138 GB of a 70B model for one reader, and 13.8 times as many for 16 readers. Filling
# the memory and shrinking the weights to 4.5 bits brings a million tokens from 34 dollars to 44 cents: 78 times cheaper.
#
# **Use it** to bound the speed of any decoder whose weights and caches you can count, and to see what a smaller weight, a smaller
# cache or a larger batch would bring. **Not** for reading a long prompt, or for batches of hundreds: there the arithmetic takes the time.
#
# <details><summary>Why do 16 readers get nearly 16 times the tokens?</summary>
#
# The weights are most of what is read, and they are read once per step for all readers.
#
# </details>
#
# <details><summary>What ends the growth with the batch, in this model?</summary>
#
# The caches: the speed tends to β / C. On a real machine memory is full before that, or the arithmetic takes longer than the reading.
#
# </details>
#
# <details><summary>Why do 4.5 bits per weight help twice?</summary>
#
# There are fewer bytes to read per step, and more room for readers.
#
# </details>
#
# Now write it all yourself: [the exercises](../../work/01-start/01-welcome.ipynb) are three, and gentle. Then
# [meet the course's models](02-the-course-models.ipynb): one that was trained on two cores, and a real one.
#
# References: [Pope et al. 2023](https://arxiv.org/abs/2211.05102 "pope2022efficiently"), Efficiently Scaling Transformer
# Inference; [Touvron et al. 2023](https://arxiv.org/abs/2307.09288 "touvron2023llama2"), Llama 2.
