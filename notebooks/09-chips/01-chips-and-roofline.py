# %% [markdown]
# # Chips and roofline
#
# A data sheet has fifty numbers. Two of them decide how long a language model takes: how fast the chip computes, and how fast it reads its memory. The roofline puts both into one picture, with every layer of a model as a dot. Here you read data sheets of 29 chips, find what they hide, put your own machine beside them, and rank them by what you want to do. At the end you own the formula.

# %% tags=["hide-input"]
import time

import torch

from llmlab.checks.chips.chips_and_roofline import check
from llmlab.chips import chips_and_roofline as cr
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
from llmlab.models import real_model
from llmlab.models.chips import chip, chips, contradictions, figures
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# An H100 is sold for its arithmetic. How much of that does Llama 3.1 8B use when it writes one token after the other? All weights must come out of memory for each token, but for the table of embeddings, of which one row is taken:

# %%
llama, h100 = preset("llama-3.1-8b"), chip("H100")
token = cr.step(llama, sequences=1, new=1, past=1000)
speed = h100.speed("bf16")
took = cr.seconds(token, speed, h100.bandwidth)
print(
    f"to compute  {token.flops / 1e9:5.1f} GFLOP  {token.flops / speed * 1e3:5.2f} ms"
)
print(
    f"to read     {token.bytes / 1e9:5.1f} GB     "
    f"{token.bytes / h100.bandwidth * 1e3:5.2f} ms"
)
print(f"of the arithmetic that was paid for: {token.flops / took / speed:.1%}")

# %% [markdown]
# ## Predict
#
# The rows of a batch share one reading of the weights. And the H200 is the H100 with other memory: 4.8 TB/s where there were 3.35. Its arithmetic is the same.

# %%
rows_guess = predict(
    "From how many tokens at once on does a product with 4096 × 4096 weights keep"
    " an H100 computing all the time?",
    unit="tokens",
)
h200_guess = predict(
    "What does the H200 do faster?",
    choices=("reading a prompt", "writing token by token", "both", "neither"),
)

# %% [markdown]
# ## By hand
#
# A toy chip computes $\pi = 10$ FLOP per second and reads or writes $\beta = 20$ bytes per second, at the same time. It multiplies $m$ rows of four floats by weights of $4 \times 3$. Each row costs $2 \cdot 4 \cdot 3 = 24$ FLOP, and $16 + 12 = 28$ bytes for what goes in and comes out. The weights are 48 bytes, once.
#
# | $m$ | FLOP | computing | bytes | moving | limit |
# |---|---|---|---|---|---|
# | 1 | 24 | 2.4 s | 76 | 3.8 s | memory |
# | 2 | 48 | 4.8 s | 104 | 5.2 s | memory |
# | 3 | 72 | 7.2 s | 132 | 6.6 s | arithmetic |

# %%
for m in (1, 2, 3):
    work = cr.product(m, 4, 3, x_bytes=4, w_bytes=4, y_bytes=4)
    print(m, work.flops, work.bytes, f"{cr.seconds(work, 10, 20):.1f} s")
print("from", cr.smallest_batch(4, 3, 10, 20, 4, 4, 4), "rows on it computes")

# %% [markdown]
# ## The idea
#
# A chip computes while it reads, so the slower of the two decides. With $W$ FLOPs, $Q$ bytes, and $I = W / Q$, the **arithmetic intensity**,
#
# $$t \ge \max\left(\frac{W}{\pi}, \frac{Q}{\beta}\right) \qquad\text{or}\qquad \frac{W}{t} \le \min(\pi,\; I \beta)$$
#
# ([Williams et al. 2009](https://doi.org/10.1145/1498765.1498785 "williams2009roofline")). Drawn over $I$, the second form is a roof: it rises with the bandwidth and ends flat at the peak. The corner is the **ridge**, $\pi / \beta$. Left of it the chip waits for its memory. Where a dot lies is a property of the work; where the roof lies, of the chip.

# %% tags=["hide-input"]
DRAWN = {
    "B200": palette.green,
    "H100": palette.blue,
    "A100": palette.sky,
    "TPU v5e": palette.orange,
    "MLU370-X8": palette.purple,
}
DOTS = {1: "o", 64: "s", 2048: "^"}


def roofs(ax, low=0.5, high=5000):
    for name, color in DRAWN.items():
        one = chip(name)
        peak = one.speed("bf16")
        corner = cr.ridge(peak, one.bandwidth)
        at = [low, corner, high]
        roof = [cr.attainable(i, peak, one.bandwidth) / 1e12 for i in at]
        ax.loglog(at, roof, color=color)
        ax.text(high * 1.1, roof[-1], f"{name}  ", color=color, va="center", fontsize=9)


fig, ax = plt.subplots(figsize=(4.8, 3.6))
roofs(ax)
for tokens, marker in DOTS.items():
    works = cr.layer_products(llama, tokens)
    spots = [work.intensity for work in works]
    reached = [
        cr.attainable(i, h100.speed("bf16"), h100.bandwidth) / 1e12 for i in spots
    ]
    label = f"{tokens:,} token" + ("s" if tokens > 1 else "")
    ax.plot(spots, reached, marker, color=palette.ink, ms=5, label=label)
ax.set(xlabel="FLOP per byte", ylabel="TFLOP/s, bf16", xlim=(0.5, 5000))
ax.legend(loc="lower right", fontsize=9, title="layers of Llama 8B", title_fontsize=9)
figure(
    fig,
    alt=(
        "Roofs of five chips over FLOP per byte, both axes logarithmic. The layers of"
        " Llama 8B lie on the roof of the H100: at 1 token far down the slope near one"
        " FLOP per byte, at 64 tokens still on the slope, at 2,048 on the flat part."
    ),
)

# %% [markdown]
# For one token every layer of every model has about one FLOP per byte: each weight of two bytes meets one number, in a product and a sum. No chip here computes so little per byte that this would keep it busy.
#
# ## Your turn
#
# The formula, solved for the rows $m$ of $x$ $(m, k)$ times $W$ $(k, n)$, whose numbers have $b_x$, $b_w$ and, in the result, $b_y$ bytes: $2mkn/\pi \ge (m k b_x + k n b_w + m n b_y)/\beta$. A row brings bytes of its own; if these take as long as its FLOPs, no $m$ is enough, and the answer is `None`. Round up.


# %%
def my_smallest_batch(k, n, peak, bandwidth, x_bytes, w_bytes, y_bytes):
    """The first whole m at which computing takes as long as moving, or None."""
    raise NotImplementedError("five lines of yours")


your_turn(check.smallest_batch, my_smallest_batch)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(k, n, peak, bandwidth, x_bytes, w_bytes, y_bytes):
    import math

    a_row = 2 * k * n / peak - (k * x_bytes + n * y_bytes) / bandwidth
    if a_row <= 0:
        return None
    return math.ceil(k * n * w_bytes / bandwidth / a_row)


your_turn(check.smallest_batch, one_answer)
rows_guess.settle(cr.smallest_batch(4096, 4096, speed, h100.bandwidth), digits=3)

# %% [markdown]
# The ridge of the H100 is at 295 FLOP per byte, and for large matrices of 16-bit numbers that is also the number of tokens; the rows' own bytes add the rest. With weights of four bits a quarter of the tokens would do. This holds for every chip: one with more arithmetic and the same memory needs *more* tokens at once.
#
# ## How to read a data sheet
#
# The letters first. They say little about speed: they name who makes a chip more than how it works; all of them multiply matrices in blocks.
#
# | called | made by | how it works |
# |---|---|---|
# | GPU | NVIDIA, AMD, Biren, Moore Threads | many small processors with thousands of threads, each with a unit for small matrix products |
# | DCU | Hygon | a GPU that is programmed as AMD's are |
# | TPU | Google | one or two large grids of multipliers; a compiler plans every move |
# | NPU and others | Huawei, Cambricon, Intel, AWS | units for matrices, vectors and scalars side by side, each fed by its own queue |
# | IPU, LPU, WSE | Graphcore, Groq, Cerebras | memory on the chip, in place of memory beside it |
#
# All figures lie in one file, `llmlab/models/data/chips.csv`, each as it is printed, with its source. The file also says who was read: the vendor, or somebody who quotes one. Between the printed number and the one you need lies a factor, often of two:
#
# | trap | printed | counts |
# |---|---|---|
# | zeros | 1,979 TFLOP/s "with sparsity" | 2:4 sparse: every second weight is zero and was counted; dense is half |
# | MAC or FLOP | MAC/s | a product and a sum: two FLOP |
# | both ways | 900 GB/s of NVLink | 450 in each direction |
# | bits | 400 Gbit/s of network | 50 GB/s |
# | GB or GiB | 95 GiB, 820 GiB/s | 7% more than GB |
# | eight chips | 36 PFLOP/s of an HGX board | an eighth |
# | formats | FP8 in large print, BF16 in small | twice as fast, if your numbers fit into it |
#
# Even one vendor contradicts itself. Here is what differs after everything has been brought into the same units:

# %%
lines = figures()
print(len(lines), "figures of", len(chips()), "chips;", end=" ")
print(sum(line.own for line in lines), "read on the vendor's page\n")
for group in contradictions():
    first = group[0]
    what = f"{first.quantity} {first.format}".strip()
    print(f"{first.chip:12} {what:11}", " | ".join(str(each) for each in group))

# %% [markdown]
# Google prints the memory of a v5p in GB on one page and in GiB on another, AWS the same 820 with two units. Nobody says whether Cerebras' 125 PFLOP/s are dense. Of Hygon's DCU we found no page with a figure of its products, so it is missing here. And a figure can be tried: a peak is units × FLOPs per clock × clock, so it implies a clock.

# %%
# units × FLOPs per clock, and the clock that is published, in GHz
BUILT = {
    ("A100", "bf16"): (432 * 512, 1.41),
    ("H100", "bf16"): (528 * 1024, 1.83),
    ("MI355X", "fp8"): (8 * 32 * 8192, 2.4),
}
clocks = []
for (name, kind), (per_clock, published) in BUILT.items():
    clock = cr.implied_clock(chip(name).flops[kind], per_clock) / 1e9
    clocks.append(clock / published)
    print(f"{name:7} {kind} implies {clock:.2f} GHz, published {published}")
compare(torch.tensor(clocks), torch.ones(3), "implied and published clocks", tol=0.01)
sparse = cr.implied_clock(1979e12, 528 * 1024) / 1e9
print(f"H100 with 1,979 TFLOP/s would run at {sparse:.2f} GHz: those are not dense")

# %% [markdown]
# (Units and FLOPs per clock: [Austin et al. 2025](https://jax-ml.github.io/scaling-book/gpus/ "austin2025gpus"), [Lockwood](https://glennklockwood.com/garden/processors/h100 "lockwood2025h100"), and for AMD [what it told at ISSCC](https://www.world-today-news.com/?p=7253162 "wtn2026mi355x").)
#
# ## The code

# %% tags=["hide-cell"]
show(cr.seconds, cr.product, cr.smallest_batch, cr.step, cr.rank)

# %% [markdown]
# | value | unit | of |
# |---|---|---|
# | `Work.flops`, `Work.bytes` | FLOP, bytes | the work: one product, or a step of a Llama |
# | `Chip.flops[format]` | FLOP/s, dense | the chip: $\pi$ |
# | `Chip.bandwidth` | bytes/s | its memory: $\beta$ |
# | `Place.chip_seconds` | s | chips × seconds: what one pays for |
#
# ## Against PyTorch
#
# PyTorch counts the FLOPs that it executes (`FlopCounterMode`, 2.13). A prompt through the real model, beside ours. On a CPU its counter has no formula for the kernel of attention, and says nothing about it; with attention in plain operations it has them all:

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

model = real_model.load()
prompt = torch.arange(100)[None]
ours = cr.step(model.config, sequences=1, new=100, weight_bytes=4, cache_bytes=4)
for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
    with torch.no_grad(), sdpa_kernel(kernel), FlopCounterMode(display=False) as count:
        model(prompt)
    seen = count.get_total_flops() / ours.flops
    print(f"{kernel.name:15} counts {seen:7.2%} of ours")
weights = sum(p.nbytes for p in set(model.parameters()))
cache = 2 * 30 * 3 * 64 * 100 * 4  # k and v, layers, heads, width, tokens, fp32
compare(torch.tensor(weights + cache), torch.tensor(int(ours.bytes)), "bytes")

# %% [markdown]
# ## The experiment
#
# First your own machine, measured by `cr.measure()`: sums over pieces of 256 MB for $\beta$, products of matrices for $\pi$. Then the layers of SmolLM2 on it, for 1 to 512 tokens, each a dot at the FLOP/s that it reached. The roof was measured on other shapes; nothing was fitted. Both are the best of many tries.

# %% tags=["hide-input", "nbval-ignore-output"]
mine, missing = cr.measure()
print(f"memory {mine.bandwidth / 1e9:.0f} GB/s;", end=" ")
print(
    "  ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in mine.flops.items())
)
for name, why in missing.items():
    print(f"{name} is missing: {why}")


@torch.inference_mode()
def dots_of(model, tokens):
    """(intensity, FLOP/s) of the products of one layer."""
    layer, found = model.model.layers[0], []
    for name, work in zip(
        ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"),
        [cr.layer_products(model.config, tokens, 4)[i] for i in (0, 4, 6)],
        strict=True,
    ):
        weight = layer.get_submodule(name).weight
        # a set of copies that is larger than the caches, as the layers of a model are
        copies = [weight.clone() for _ in range(max(1, int(1e8 / weight.nbytes)))]
        x = torch.randn(tokens, weight.shape[1])
        best = float("inf")  # as for the roof: what it can do, undisturbed
        for each in copies * 2:
            started = time.perf_counter()
            x @ each.T
            best = min(best, time.perf_counter() - started)
        work = cr.product(tokens, *weight.T.shape, 4, 4, 4)
        found.append((work.intensity, work.flops / best))
    return found


measured = {tokens: dots_of(model, tokens) for tokens in (1, 8, 64, 512)}
fig, ax = plt.subplots(figsize=(4.8, 3.2))
peak = mine.flops["fp32"]
at = [0.2, cr.ridge(peak, mine.bandwidth), 300]
roof = [cr.attainable(i, peak, mine.bandwidth) / 1e9 for i in at]
ax.loglog(at, roof, color=palette.blue, label="roof, measured apart")
for (tokens, found), marker in zip(measured.items(), "osD^", strict=True):
    spots = [(i, reached / 1e9) for i, reached in found]
    ax.plot(*zip(*spots, strict=True), marker, ms=6, label=f"{tokens} at once")
ax.set(xlabel="FLOP per byte", ylabel="GFLOP/s, fp32")
ax.legend(fontsize=9, loc="lower right")
figure(
    fig,
    alt=(
        "The roof of this machine and products of SmolLM2's layers: at one token they"
        " lie at half a FLOP per byte on the slope, with more tokens further right and"
        " up, at 512 tokens under the flat part."
    ),
)
roof_of = {
    i: cr.attainable(i, peak, mine.bandwidth) for f in measured.values() for i, _ in f
}
for tokens, found in measured.items():
    parts = [reached / roof_of[i] for i, reached in found]
    print(f"{tokens:4} tokens: {min(parts):.0%} to {max(parts):.0%} of the roof")

# %% [markdown]
# Distance from the roof is a question for whoever wrote the kernel, not for whoever built the chip. One token lies within a factor of two or so of it, because a product with a vector is nothing but reading. A few tokens lie furthest away: too many to be reading only, too few to fill the units that multiply, and every library has its own way of doing so. From some hundreds on little is missing. (If your dots lie lower, or above the roof, ask first what else is running: it disturbs one of the two measurements.)
#
# Now the ranking: one formula, three kinds of work with Llama 3.1 8B in 16 bits. Reading a prompt of 2,048 tokens; writing one token for one user; writing one for each of 64 users with 2,048 tokens behind them. What counts is chip-seconds: seconds, times as many chips as are needed to hold weights and cache.

# %%
WORKS = {
    "prompt": cr.step(llama, 1, 2048),
    "one user": cr.step(llama, 1, 1, 2048),
    "64 users": cr.step(llama, 64, 1, 2048),
}
formats = ("bf16", "fp16")
tables = {}
for name, work in WORKS.items():
    held = WORKS["64 users"].bytes if name == "64 users" else WORKS["one user"].bytes
    tables[name] = cr.rank(work, held, [*chips().values()], *formats)
    bounds = {place.bound for place in tables[name]}
    print(f"{name:9} {work.intensity:7,.0f} FLOP per byte; bound by", *sorted(bounds))
print(f"\n{'':11}", *(f"{name:>9}" for name in WORKS), "  chips")
for place in tables["64 users"]:
    costs = [
        next(p for p in tables[name] if p.chip.name == place.chip.name)
        for name in WORKS
    ]
    numbers = " ".join(f"{p.chip_seconds * 1e3:9.2f}" for p in costs)
    print(f"{place.chip.name:11} {numbers} ms {place.chips:4}")

palm = 540e9 / (64 * chip("TPU v4").bandwidth)  # a byte per weight
print(f"\nPaLM 540B, int8, on 64 TPU v4: {palm * 1e3:.1f} ms to read the weights")

# %% tags=["hide-input"]
LABELLED = ["B200", "TPU7x", "H200", "H100", "MI300X", "Gaudi 3", "BR100"]
LABELLED += ["TPU v5p", "TPU v6e", "A100", "V100"]
COLORS = {"H100": palette.blue, "H200": palette.green, "TPU v6e": palette.orange}
fig, ax = plt.subplots(figsize=(4.8, 3.8))
places = {}
for x, name in enumerate(WORKS):
    order = [p.chip.name for p in tables[name] if p.chip.name in LABELLED]
    for y, each in enumerate(order):
        places.setdefault(each, []).append((x, y + 1))
for each, spots in places.items():
    color = COLORS.get(each, palette.gray)
    width = 2.5 if each in COLORS else 1
    ax.plot(*zip(*spots, strict=True), "o-", color=color, lw=width, ms=4)
    ax.text(-0.08, spots[0][1], each, ha="right", va="center", fontsize=9, color=color)
    ax.text(2.08, spots[-1][1], each, va="center", fontsize=9, color=color)
ax.set(xticks=range(3), xticklabels=WORKS, xlim=(-0.75, 2.75))
ax.set(ylabel="place", yticks=range(1, len(LABELLED) + 1))
ax.invert_yaxis()
ax.grid(False)
figure(
    fig,
    alt=(
        "Places of eleven chips for reading a prompt, for one user and for 64 users."
        " H100 and H200 are equal for the prompt; for one user the H200 is ahead of"
        " the H100, and TPU v6e falls from the middle to the end."
    ),
)

# %% tags=["hide-output"]
h200_guess.settle("writing token by token")

# %% [markdown]
# For a prompt, arithmetic ranks; for users, bandwidth. So the H200 gains nothing where prompts are read (the two tie there, and the figure can only put one below the other), and 1.4 times where answers are written. Chips without a clear 16-bit figure are left out. Chips with memory *on* the chip (GC200, LPU) read five to ten times as fast as a B200 and hold so little that it takes 40 or 156 of them: all their users wait less, and somebody buys a rack. (Links cost nothing here. They do: [choosing a split](../05-parallelism/11-choosing.ipynb).) And peaks are peaks: what a kernel reaches is another lesson.
#
# ## Play
#
# How many tokens must go through at once? The roof of each chip, with the product of Llama 8B's widest layer as a dot.

# %% tags=["hide-input", "slider"]
SIZES = [1, 4, 16, 64, 128, 256, 512, 1024, 4096]


def draw(tokens: int, bits: str):
    fig, ax = plt.subplots(figsize=(4.8, 3.4))
    roofs(ax)
    work = cr.product(tokens, 4096, 14336, w_bytes=int(bits) / 8)
    for name, color in DRAWN.items():
        one = chip(name)
        peak = one.speed("bf16")
        reached = cr.attainable(work.intensity, peak, one.bandwidth)
        full = "full" if reached >= 0.999 * peak else "none"
        ax.plot(work.intensity, reached / 1e12, "o", ms=8, color=color, fillstyle=full)
    ax.set(xlabel="FLOP per byte", ylabel="TFLOP/s, bf16", xlim=(0.5, 5000))
    ax.set_title("filled: computes all the time", fontsize=10)
    return fig


def busy(tokens: int, bits: str) -> list[str]:
    work = cr.product(tokens, 4096, 14336, w_bytes=int(bits) / 8)
    return [
        name
        for name in DRAWN
        if work.intensity >= cr.ridge(chip(name).speed("bf16"), chip(name).bandwidth)
    ]


def told(tokens: int, bits: str) -> str:
    names = ", ".join(busy(tokens, bits)) or "none"
    return f"{tokens} tokens, weights of {bits} bits. Computing all the time: {names}"


def missing_step(tokens: int, bits: str) -> str:
    if bits != "16":
        return "these weights have fewer bits: the question is about 16"
    all_busy = [size for size in SIZES if len(busy(size, "16")) == len(DRAWN)]
    if tokens == all_busy[0]:
        return ""
    waiting = [name for name in DRAWN if name not in busy(tokens, bits)]
    return f"still waiting: {', '.join(waiting)}" if waiting else "fewer are enough"


explore(
    draw,
    alt=told,
    title="From how many tokens on?",
    challenge="With 16 bits: the fewest tokens that keep all five chips computing.",
    missing=missing_step,
    start={"tokens": 16, "bits": "16"},
    tokens=SIZES,
    bits=["16", "8", "4"],
)

# %% [markdown]
# ## At scale
#
# On a GPU the profiler draws this picture for every kernel; the planner of this course computes with the same file of chips.
#
# ```bash
# ncu --set roofline --export roofline python generate.py    # NVIDIA, Nsight Compute
# rocprof-compute profile --name llama --roof-only -- python generate.py    # AMD
# llmlab plan --help    # chips, network and model → a split, days, and memory
# ```
#
# What the bound says of a published run: Google served PaLM 540B on 64 TPU v4 with 29 ms per token at a batch of 64, with weights in int8 ([Pope et al. 2022](https://arxiv.org/abs/2211.05102 "pope2022efficiently")). Reading the weights alone takes the last line of the ranking's cell, a quarter of that. The rest is the cache, links between 64 chips, and what no bound counts.
#
# ## What to keep
#
# ```python
# seconds = max(flops / peak, bytes / bandwidth)
# ridge = peak / bandwidth                        # FLOP per byte
# tokens_at_once = ridge * weight_bytes / 2       # large matrices
# ```
#
# **Use it** before you buy, and before you optimise: it says which of two things is worth doing. **Not** as a forecast: nothing reaches its roof, and a network may be the lower one.
#
# <details><summary>Why do all models have one FLOP per byte when they write for one user?</summary>
#
# Each weight is used once: a product and a sum, two FLOPs, for two bytes. The shape does not matter, nor the number of layers.
#
# </details>
#
# <details><summary>A new chip has three times the arithmetic and the same memory. For whom?</summary>
#
# For prompts and for training, where many tokens share each weight. For writing to few users it is the old chip.
#
# </details>
#
# <details><summary>A data sheet says 4 PFLOP/s. What do you ask?</summary>
#
# In which format, dense or with zeros counted, for how many chips, at which clock, and whether products and sums were counted apart.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/09-chips/01-chips-and-roofline.ipynb).
#
# Further reading: [Austin et al. 2025](https://jax-ml.github.io/scaling-book/tpus/ "austin2025tpus"), a book on models and chips; [Zuo et al. 2025](https://arxiv.org/abs/2506.12708 "zuo2025cloudmatrix") for a machine of 384 Ascends.
