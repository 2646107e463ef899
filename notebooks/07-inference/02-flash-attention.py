# %% [markdown]
# # FlashAttention
#
# Attention compares every token with every other. A textbook writes the whole table of scores down, reads it again for the softmax, writes it, and reads it once
# more. FlashAttention computes the same numbers and never stores the table. This lesson derives the one idea behind it, a softmax that can be taken in pieces, counts every byte
# that is saved, and runs the same kernel that a GPU would run. At the end you own the update that does it.

# %% tags=["hide-input"]
import csv
import math
import os

# Triton settles at its import whether it compiles or interprets: here is no GPU.
os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from llmlab.checks.inference.flash_attention import check
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
from llmlab.course.steppers import Mark, Plane, Step, Trace, steps
from llmlab.inference import flash_attention as flash
from llmlab.inference.flash_attention import FlashAttention, traffic, triton_kernel
from llmlab.models import course_model, real_model
from llmlab.models.attention import sdpa
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# A chip has two memories. On an A100 the large one, HBM, delivers 1.5 TB/s at least; the small one beside each processor, SRAM, holds 192 KB and is about ten times as fast
# ([Dao et al. 2022](https://arxiv.org/abs/2205.14135 "dao2022flashattention")). Its tensor cores do 312 TFLOP/s in 16 bits
# ([Dao 2023](https://arxiv.org/abs/2307.08691 "dao2023flashattention2")). Take one layer of Llama 3.1 8B that reads a text of 8,192 tokens, and give it a textbook's attention.

# %%
llama, N = preset("llama-3.1-8b"), 8192
heads, d = llama.num_attention_heads, llama.head_dim
moved = 2 * heads * traffic.elements("standard", N, d)  # bytes, to and from HBM
print(f"the products: {heads * 4 * N * N * d / 312e12 * 1e3:.1f} ms")
print(f"moving {moved / 1e9:.0f} GB: {moved / 1.5e12 * 1e3:.1f} ms")
kept = 2 * heads * N * N / 1e9
print(f"to train, the probabilities P are kept: {kept:.1f} GB per layer")
print(
    f"a head's table: {N * N / 1e6:.0f} million; q, k, v and O: {4 * N * d / 1e6:.0f}"
)

# %% [markdown]
# The tensor cores wait most of the time, for numbers that nobody asked for.
#
# ## Predict
#
# The paper's own example: attention of GPT-2 medium, forward and backward, 1,024 tokens, 16 heads of 64 channels, a batch of 64. FlashAttention does not store the
# probabilities for the backward pass, so it has to compute them a second time.

# %%
bytes_guess = predict("How many times fewer bytes does it move?", unit="times")
flops_guess = predict("How much more arithmetic does it do?", unit="%")

# %% [markdown]
# ## By hand
#
# One query, four keys. $e^S$ is 1, 2, 4, 1; the values are 6, 0, 3, 2. The softmax gives $(1\cdot 6 + 2\cdot 0 + 4\cdot 3 + 1\cdot 2)/8 = 2.5$. Now the keys come two at a time. We keep the largest score so
# far, $m$, and sum everything relative to it, so that no exponential is ever above 1:
#
# | keys | $e^m$ | $l = \sum e^{S-m}$ | $O = \sum e^{S-m} V$ |
# |---|---|---|---|
# | 1, 2 | 2 | ½ + 1 = 1.5 | ½ · 6 + 1 · 0 = 3 |
# | 3, 4 | 4 | 1 + ¼ = 1.25 | 1 · 3 + ¼ · 2 = 3.5 |
# | all | 4 | **½** · 1.5 + 1.25 = 2 | **½** · 3 + 3.5 = 5 |
#
# The maximum went from 2 to 4, so all that was summed before was twice too large. One factor, ½, corrects both sums. And 5 / 2 = 2.5.

# %%
S, V = torch.tensor([[1.0, 2, 4, 1]]).log(), torch.tensor([[6.0], [0], [3], [2]])
state = flash.start((1, 1), S)
for block in (slice(0, 2), slice(2, 4)):
    state = flash.online_softmax(*state, S[:, block], V[block])
    m, l, O = (x.item() for x in state)
    print(f"e^m {math.exp(m):.0f}, l {l:.2f}, O {O:.1f}")
print(f"output {flash.finish(*state)[0].item():.1f}")

# %% [markdown]
# ## The idea
#
# Cut queries and keys into blocks. A tile of scores is one block of queries times one block of keys, small enough for the fast memory, and it is gone when the next one comes. Step through it: which block
# stays on the chip, and what goes to and fro? The two versions of the paper take the loops in different orders; a button changes between them.

# %% tags=["hide-input"]
BLOCKS, CELL, LEFT, TOP = 4, 46, 64, 64


def tile_trace(keys_outside: bool) -> Trace:
    """Causal attention, tile by tile, as flash-1 or flash-2 goes through it."""
    plan = [(i, j) for i in range(BLOCKS) for j in range(i + 1)]
    if keys_outside:
        plan.sort(key=lambda tile: tile[::-1])

    def cell(name, left, top, text, here=(), done=False):
        """A block; `here` puts a bar on it: it is in the fast memory."""
        kind = "done" if done else "plain"
        return Mark(name, "cell", (left, top, CELL, CELL), text, kind, here)

    def q_and_o(i, here=(), done=False):
        top = TOP + i * CELL
        right = LEFT + BLOCKS * CELL + 16
        o = cell(f"o{i}", right, top, f"O{i + 1}", here, done)
        return cell(f"q{i}", 8, top, f"Q{i + 1}", here), o

    def k_and_v(j, here=()):
        return cell(f"k{j}", LEFT + j * CELL, 8, f"K,V{j + 1}", here)

    def score(i, j, here=(), done=False):
        text = "mask" if i == j else ""
        place = (LEFT + j * CELL, TOP + i * CELL)
        return cell(f"s{i}{j}", *place, text, here, done)

    marks = [m for i in range(BLOCKS) for m in q_and_o(i)]
    marks += [k_and_v(j) for j in range(BLOCKS)]
    marks += [score(i, j) for i, j in plan]
    start = "A blue bar will mark what is in the fast memory. No score exists yet."
    out = [Step(tuple(marks), start, facts={"blocks read": "0", "blocks written": "0"})]
    read = written = 0
    for n, (i, j) in enumerate(plan):
        last = plan[n - 1] if n else (-1, -1)
        following = plan[n + 1] if n + 1 < len(plan) else (-1, -1)
        marks, said = [], []
        if n:
            marks += [*q_and_o(last[0], done=last[0] == last[1]), k_and_v(last[1])]
            marks.append(score(*last, done=True))
        if j != last[1] or not keys_outside:
            read += 2
            said.append(f"K{j + 1} and V{j + 1} are read")
        if keys_outside:
            read += 2
            said.append(f"Q{i + 1} and O{i + 1} are read")
        elif i != last[0]:
            read += 1
            said.append(f"Q{i + 1} is read")
        if following[0] != i or keys_outside:
            written += 1
            said.append(f"O{i + 1} is written")
        marks += [*q_and_o(i, (1,)), k_and_v(j, (1,)), score(i, j, (1,))]
        text = f"Tile {n + 1} of {len(plan)}: {', '.join(said)}."
        facts = {"blocks read": str(read), "blocks written": str(written)}
        out.append(Step(tuple(marks), text, facts=facts))
    width = LEFT + BLOCKS * CELL + 16 + CELL + 8
    return Trace(Plane(width, TOP + BLOCKS * CELL + 8, (CELL, CELL)), tuple(out))


steps(
    {
        "flash-2: queries stay": tile_trace(False),
        "flash-1: keys stay": tile_trace(True),
    },
    title="Ten tiles of causal attention, none of them kept",
    start="first",
)

# %% [markdown]
# The [online softmax](https://arxiv.org/abs/1805.02867 "milakov2018online") makes it exact. When a block of keys with scores $S$ and values $V$ comes,
#
# $$\begin{gathered}
# m' = \max(m, \max_j S_j), \quad \alpha = e^{m - m'}, \\
# l' = \alpha\, l + \sum_j e^{S_j - m'}, \\
# O' = \alpha\, O + \sum_j e^{S_j - m'}\, V_j .
# \end{gathered}$$
#
# At the end the output is $O / l$. One number per query is kept for the backward pass, the log-sum-exp $L = m + \log l$. From it any tile of the probabilities can be had again without its neighbours, $P = e^{S - L}$. Below, $dX$ is the gradient of the loss for $X$, $\circ$ multiplies number by number, and $O$ is the output, already divided by $l$:
#
# $$\begin{gathered}
# dS = P \circ (dO\,V^\top - D), \\
# D_i = \textstyle\sum_c dO_{ic}\,O_{ic} .
# \end{gathered}$$
#
# Here $dO\,V^\top$ is $dP$. The slope of a softmax needs $\sum_k P_{ik}\,dP_{ik}$ over *all* keys of a row. No tile has them all, but row $i$ of $dO$ and of $O$, which are at hand, do: the sum is $D_i$.
#
# **How many bytes?** With $M$ numbers of fast memory and head dimension $d$, standard attention moves $\Theta(Nd + N^2)$ numbers and FlashAttention $\Theta(N^2 d^2 / M)$. Still a square, but $d^2$ is far smaller than $M$. What is *kept* grows with $N$ only.
#
# Under a causal mask, tiles beyond the diagonal are left out: nearly half of the work. And only tiles on the diagonal need a mask at all.
#
# ## Your turn
#
# Write the update. `m` and `l` have shape (…, T), `O` (…, T, D) and is not divided by $l$; `S` is (…, T, n), `V` (…, n, D). Return the new $m$, $l$, $O$. A query that may not look at any of the keys has $S = -\infty$ in
# the whole row, and before its first key $m = -\infty$, $l = 0$, $O = 0$. It must not become NaN.


# %%
def online_softmax(m, l, O, S, V):
    """m, l and O after the keys with scores S and values V."""
    raise NotImplementedError("five lines of yours")


your_turn(check.online_softmax, online_softmax)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(m, l, O, S, V):
    m_new = torch.maximum(m, S.amax(-1))
    base = m_new.masked_fill(m_new.isneginf(), 0.0)  # −∞ − (−∞) is not a number
    alpha = (m - base).exp()
    P = (S - base[..., None]).exp()
    return m_new, alpha * l + P.sum(-1), alpha[..., None] * O + P @ V


your_turn(check.online_softmax, one_answer)

# %% [markdown]
# ## The code
#
# The folded cell has the update, the plan of tiles, both passes, and the same forward pass as a kernel in [Triton](https://www.eecs.harvard.edu/~htk/publication/2019-mapl-tillet-kung-cox.pdf "tillet2019triton"), a language for GPUs that looks like NumPy.
#
# | value | shape | holds |
# |---|---|---|
# | `q` | (B, K, G, T, D) | G query heads for each of K key heads |
# | `k`, `v` | (B, K, 1, S, D) | nothing is copied for GQA |
# | `scores` | (B, K, G, rows, cols) | one tile, the only scores there are |
# | `state` | m, l: (…, rows), O: (…, rows, D) | in the fast memory until the block is done |
# | `lse` | (B, H, T) | $L$, all that the backward pass needs beside `out` |

# %% tags=["hide-output"]
show(
    flash.online_softmax,
    flash.causal_tiles,
    flash.forward,
    flash.score_gradient,
    flash.backward,
)
show(triton_kernel.flash_forward.fn)

# %% [markdown]
# ## Against the library
#
# PyTorch's attention has a kernel of the same family for CPUs, and gives its log-sum-exp away. Six query heads share three key heads, and 101 tokens fill no tile. Then the Triton kernel,
# in Triton's interpreter, which runs its programs one after another on the CPU.

# %%
torch.manual_seed(0)
q, k, v = (torch.randn(2, h, 101, 16, requires_grad=True) for h in (6, 3, 3))
ours = flash.flash_attention(q, k, v, rows=16, cols=32)
theirs = sdpa(q, k, v, None)
compare(ours, theirs, "output, and PyTorch's")
do = torch.randn_like(ours)
pairs = [torch.autograd.grad(out, (q, k, v), do) for out in (ours, theirs)]
for name, a, b in zip(("dQ", "dK", "dV"), *pairs, strict=True):
    compare(a, b, f"{name}, summed over shared heads" if name != "dQ" else name)

q, k, v = (x.detach() for x in (q, k, v))
wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (k, v))
kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
lse = flash.forward(q, k, v)[1]
compare(lse, kernel(q, wide_k, wide_v, 0.0, True)[1].view_as(lse), "log-sum-exp")
compare(triton_kernel.forward(q, k, v, rows=32, cols=32)[0], ours, "Triton, fp32")

# %% [markdown]
# **Two traps.** The interpreter multiplies bfloat16 tiles as if their bits were integers: nothing warns, and the result is off by millions. Converted to float32 after they are loaded, the same tiles are
# right to the precision of bfloat16. (A GPU multiplies bfloat16 itself.)
#
# And "causal" has two meanings when there are fewer queries than keys, as in every step over a cache. Two queries, five keys; 1 means that the key is seen. Ours puts the queries at the end, as `flash-attn` does [since 2.1](https://github.com/Dao-AILab/flash-attention#21-change-behavior-of-causal-flag).

# %%
half = [x[:1].bfloat16() for x in (q, k, v)]
for wide in (False, True):
    out, _ = triton_kernel.forward(*half, rows=32, cols=64, wide=wide)
    off = (out.float() - ours[:1]).abs().max().item()
    size = "over a million" if off > 1e6 else "under 0.05" if off < 0.05 else off
    print(f"bf16, {'fp32 after loading' if wide else 'as it is':18} off by {size}")

two, five, one_hot = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 5, 8), torch.eye(5)
looks = {
    "ours": flash.flash_attention(two, five, one_hot[None, None]),
    "PyTorch, is_causal=True": F.scaled_dot_product_attention(
        two, five, one_hot[None, None], is_causal=True
    ),
    "PyTorch, causal_lower_right": F.scaled_dot_product_attention(
        two, five, one_hot[None, None], attn_mask=causal_lower_right(2, 5)
    ),
}
for who, out in looks.items():
    print(f"{who:28}", (out[0, 0] > 0).int().tolist())

# %% [markdown]
# <details><summary>For the curious: what else differs, and flash decoding</summary>
#
# | | a query that sees no key | `causal` with T < S |
# |---|---|---|
# | ours, and the Triton kernel | output 0, $L = -\infty$ | bottom right |
# | PyTorch 2.13, mask of booleans | output 0 | top left for `is_causal` |
# | FlexAttention 2.13 | output 0, $L = -\infty$ | as its mask function says |
# | flash-attn, from 2.1 | output 0 | bottom right; top left before |
# | softmax by hand | NaN | as you write it |
#
# PyTorch's FlashAttention takes a mask, but not one that wants a gradient: then it falls back to the textbook's way, with the textbook's memory. Ours refuses such a mask.
#
# **Flash decoding.** While a model writes, there is one query per head, so one block, and most of a GPU would have nothing to do. [Flash decoding](https://crfm.stanford.edu/2023/10/12/flashdecoding.html "dao2023flashdecoding") cuts the *keys* into splits, one
# for each worker, and merges the partial $(m, l, O)$. That is `flash.split_keys`, and your exercise `merge`.
#
# **Is flash-2 the one that moves fewer bytes?** Not by this count: with a block of 128 queries it reads all keys $N/128$ times, where flash-1 with a block of 384 keys passes the queries $N/384$ times. It wins because its blocks of queries are independent, so that they run at once,
# and because it never scales an $O$ that was written down. Blocks that run at once read the same keys, and a cache that we do not count serves them.
#
# </details>
#
# ## The experiment
#
# What is kept for the backward pass, for one causal head of 64 channels in 32 bits: we let autograd tell. And how long does it take on a CPU? `scripts/flash_attention_sweep.py` ran each point in a process of its own, with one thread, and the longest text twice; times are the CPU's.
# Four ways: the textbook's, our tiles of 256 × 256 in a Python loop, and PyTorch's two kernels.

# %% tags=["hide-input"]
with flash.FILE.open(newline="", encoding="utf-8") as file:
    lines = list(csv.DictReader(file))
runs = {(r["way"], int(r["tokens"])): r for r in lines}
lengths = [1024, 2048, 4096, 8192]
looks = {
    "standard": ("textbook", palette.vermillion, "o-", (2048, 45)),
    "tiles": ("tiles, and PyTorch's flash", palette.blue, "s-", (4096, 1.1)),
}
fig, ax = plt.subplots(figsize=(4.8, 2.9))
for way, (label, color, style, place) in looks.items():
    kept = [float(runs[way, n]["saved_mib"]) for n in lengths]
    ax.plot(lengths, kept, style, color=color)
    ax.text(*place, label, color=color, ha="center")
    ax.text(
        lengths[-1],
        kept[-1] * 1.25,
        f"{kept[-1]:.0f} MiB",
        color=color,
        ha="right",
        va="bottom",
    )
ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="kept for backward, MiB")
ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
ax.set(ylim=(0.6, 2000), xlim=(900, 9500))
ax.minorticks_off()
figure(
    fig,
    alt=(
        "Memory kept for the backward pass against tokens, both axes logarithmic. The"
        " textbook's line rises four times with each doubling, to over 300 MiB at 8,192"
        " tokens; that of the tiles doubles, to 8 MiB."
    ),
)
ways = ("standard", "sdpa math", "tiles", "sdpa flash")
fewer = {w: float(runs[w, 8192]["saved_mib"]) for w in ways}
print(f"kept at 8,192 tokens: {fewer['standard'] / fewer['tiles']:.0f} times less")
print(
    f"PyTorch's flash and ours keep the same: {fewer['tiles'] == fewer['sdpa flash']}"
)
names = {"standard": "textbook", "sdpa math": "PyTorch, math"}
names |= {"tiles": "our tiles", "sdpa flash": "PyTorch, flash"}


def milliseconds(way: str, n: int) -> str:
    """Of all runs."""
    mine = [r for r in lines if (r["way"], int(r["tokens"])) == (way, n)]
    return ", ".join(sorted(f"{1000 * float(r['seconds']):4.0f}" for r in mine))


print(f"\nforward and backward, ms {'1,024':>6}{'8,192':>13}    peak at 8,192")
for way in ways:
    peak = float(runs[way, 8192]["peak_mib"])
    times = f"{milliseconds(way, 1024):>10}{milliseconds(way, 8192):>13}"
    print(f"{names[way]:21}{times}{peak:11.0f} MiB")

# %% [markdown]
# The square is gone from memory, exactly as counted: $4d + 1$ numbers per token, for q, k, v, the output and $L$. The times are of one CPU, which has a cache in place of SRAM, and yet it is the same
# story: PyTorch's flash kernel leaves its own textbook kernel ("math") far behind. Our tiles are a Python loop over matrix products; they are no rival to a kernel, but at this size of tile they beat the textbook, for they
# skip nearly half of the work, and a tile of scores fits in the cache.
#
# The same numbers, for a real model? Our Llama takes any attention. SmolLM2 reads a page with PyTorch's attention and with tiles of 64 × 32.

# %%
model = real_model.load()
text = course_model.corpus("addresses", "valid")[:900]
page = torch.tensor([real_model.load_tokenizer().encode(text).ids])
tiles = FlashAttention(rows=64, cols=32)
with torch.no_grad():
    plain, tiled = (model(page, attention=a) for a in (sdpa, tiles))
compare(tiled, plain, "logits of 30 layers", tol=1e-3)
same = (tiled.argmax(-1) == plain.argmax(-1)).all().item()
print(f"the same next token at all {page.shape[1]} places: {same}")

# %% [markdown]
# Now the paper's example, which you guessed at. `traffic` has the three loops, written as a chip runs them: they may compute only with what they loaded, and a counter stands at the door. Each count is
# compared with a closed form; then the form goes where no loop would end.

# %% tags=["hide-output"]
small = [torch.randn(96, 16, dtype=torch.float64) for _ in range(3)]
whole = (small[0] @ small[1].T / 4).softmax(-1) @ small[2]
for way, loop, sizes in (
    ("standard", traffic.standard, ()),
    ("flash-1", traffic.flash_1, (16, 24)),
    ("flash-2", traffic.flash_2, (16, 24)),
):
    hbm = traffic.HBM()
    out = loop(*small, *sizes, hbm)[0]
    compare(out, whole, f"{way}: output")
    compare(hbm.elements, traffic.elements(way, 96, 16, *sizes), f"{way}: count", tol=0)

gpt2 = {"N": 1024, "d": 64}
rows, cols = traffic.paper_tiles(192 * 1024 // 2, gpt2["d"])  # 192 KB, 16-bit numbers


def gigabytes(way: str, *tiles) -> float:
    """Forward and backward, 16 heads, batch 64."""
    both = (
        traffic.elements(w, **gpt2, rows=rows, cols=cols)
        for w in (way, f"{way} backward")
    )
    return 2 * 64 * 16 * sum(both) / 1e9


bytes_guess.settle(gigabytes("standard") / gigabytes("flash-1"), digits=2)
flops = [traffic.matmul_flops(**gpt2, flash=flash) for flash in (False, True)]
flops_guess.settle(100 * (flops[1] / flops[0] - 1), digits=2)

# %% [markdown]
# ## Play
#
# Larger tiles mean fewer passes, but they have to fit. A block on an A100 can address [163 KB](https://docs.nvidia.com/cuda/ampere-tuning-guide/index.html#unified-shared-memory-l1-texture-cache) of fast memory, on an H100 [227 KB](https://docs.nvidia.com/cuda/hopper-tuning-guide/index.html#unified-shared-memory-l1-texture-cache). Here are one head of 128 channels, 8,192 tokens and the
# loop of flash-2, with Q, K, V in 16 bits, S and O in 32, all in the fast memory.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
SIZES = {"rows": [16, 32, 64, 128, 256], "cols": [16, 32, 64, 128]}
LIMIT = 163


def costs(rows: int, cols: int) -> tuple[float, float]:
    """KB of fast memory, MB moved."""
    moved = 2 * traffic.elements("flash-2", 8192, 128, rows, cols)
    return traffic.chip_bytes(rows, cols, 128) / 1024, moved / 1e6


def draw(rows: int, cols: int):
    chip, moved = costs(rows, cols)
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(4.8, 2.7))
    color = palette.blue if chip <= LIMIT else palette.vermillion
    top.barh([0], [min(chip, 460)], color=color)
    for limit, name in ((163, "A100"), (227, "H100")):
        top.axvline(limit, color=palette.gray, linestyle="--")
        top.text(limit + 4, 0.62, name, color=palette.gray, va="center")
    top.set(xlim=(0, 460), ylim=(-0.5, 0.9), yticks=[], xlabel="fast memory, KB")
    bottom.barh([0], [moved], color=palette.gray)
    bottom.set(xlim=(0, 2300), yticks=[], xlabel="moved, MB")
    top.set_title(f"{chip:.0f} KB, {moved:.0f} MB, {-(-8192 // cols)} rounds")
    return fig


fitting = {
    (r, c) for r in SIZES["rows"] for c in SIZES["cols"] if costs(r, c)[0] <= LIMIT
}
best = min(fitting, key=lambda tile: (costs(*tile)[1], -tile[1]))


def missing(rows: int, cols: int) -> str:
    chip, moved = costs(rows, cols)
    if (rows, cols) not in fitting:
        return f"{chip:.0f} KB do not fit in {LIMIT}."
    if moved > costs(*best)[1]:
        return "fewer bytes are possible."
    return "" if (rows, cols) == best else "the bytes are right; fewer rounds fit, too."


explore(
    draw,
    alt=lambda rows, cols: (
        f"Tiles of {rows} queries by {cols} keys: {costs(rows, cols)[0]:.0f} KB of fast"
        f" memory, {costs(rows, cols)[1]:.0f} MB moved."
    ),
    title="What fits on the chip",
    challenge="Move the fewest bytes on an A100, in the fewest rounds over the keys.",
    missing=missing,
    start={"rows": 32, "cols": 128},
    **SIZES,
)

# %% [markdown]
# Only the rows change the bytes: flash-2 reads all keys once per block of queries. The columns cost memory and save rounds. The answer is the tile that `flash-attn` itself takes for 128 channels on an A100 ([its source](https://github.com/Dao-AILab/flash-attention/blob/main/csrc/flash_attn/src/flash_fwd_launch_template.h)). Real kernels keep S and O in
# registers, another limit that we leave out.
#
# ## At scale
#
# What the paper measured on an A100 for your guess, and what we count. And FlashAttention-2 reports 50 to 73% of the chip's peak, about twice the first version.

# %% tags=["hide-input"]
paper = {"GB moved": (40.3, 4.4), "GFLOPs": (66.6, 75.2), "ms": (41.7, 7.3)}
counted = {
    "GB moved": (gigabytes("standard"), gigabytes("flash-1")),
    "GFLOPs": tuple(64 * 16 * f / 1e9 for f in flops),
    "ms": tuple(gigabytes(way) / 1.5 for way in ("standard", "flash-1")),
}
print(f"{'':10}{'standard':>20}{'flash':>18}{'ratio':>18}")
print(f"{'':10}{'paper':>10}{'ours':>10}{'paper':>9}{'ours':>9}{'paper':>9}{'ours':>9}")
for what, (standard, flashed) in paper.items():
    a, b = counted[what]
    name = what if what != "ms" else "ms*"
    print(
        f"{name:10}{standard:10.1f}{a:10.1f}{flashed:9.1f}{b:9.1f}"
        f"{standard / flashed:9.2f}{a / b:9.2f}"
    )
print("* ours: moving the bytes at 1.5 TB/s, the least time that it can take")
one_pass = 2 * 64 * 16 * 1024**2 / 1e9
extra = (paper["GB moved"][0] - counted["GB moved"][0]) / one_pass
print(f"\none pass over all tables: {one_pass:.2f} GB; we lack {extra:.1f} passes")
masks = 2 + 2.5 + 2.5  # read, write; dropout also has a mask of bytes, twice
print(f"masking, dropout and its backward as kernels of their own: {masks:.0f} passes")
for who, (a, b) in (("paper", paper["GFLOPs"]), ("ours", counted["GFLOPs"])):
    print(f"GFLOPs of flash over standard, {who}: {b / a:.2f}")

# %% [markdown]
# FlashAttention's bytes agree to a tenth; the paper does not say its tile sizes, ours are those of its algorithm 1. For the standard one we count less: its algorithms 0 and 3 pass eleven times over the tables. What we lack is, to a digit, what masking and
# dropout would move as kernels of their own; but the paper does not say that it counted them. The GFLOPs differ by a factor of twelve that the sizes given do not explain. Their ratio nearly agrees: seven products in place of six. More arithmetic, less time.
#
# On a GPU (not run here; the project's tests compile the Triton kernel for `sm_80` and `sm_90` and find tensor-core products in it):
#
# ```python
# # pip install flash-attn --no-build-isolation
# from flash_attn import flash_attn_func         # (B, T, H, D), 16 bits
# out = flash_attn_func(q, k, v, causal=True)
#
# AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16,
#                                      attn_implementation="flash_attention_2")
#
# triton_kernel.forward(q.cuda(), k.cuda(), v.cuda())   # ours; leave TRITON_INTERPRET unset
# ```
#
# ## What to keep
#
# ```python
# m_new = torch.maximum(m, S.amax(-1))  # where it is −∞, subtract 0 below
# alpha = (m - m_new).exp()
# P = (S - m_new[..., None]).exp()
# l = alpha * l + P.sum(-1)
# O = alpha[..., None] * O + P @ V      # at the end: O / l, and L = m + log l
# ```
#
# **Use it** always: it is exact. PyTorch's attention does, where the inputs allow. **It does not help** where one token is written at a time: there the cache is read once in any case, and what counts is how the cache is stored. Nor can it
# hand you the probabilities: they never existed.
#
# <details><summary>Why must O be rescaled as well as l?</summary>
#
# Both are sums of $e^{S_j - m}$ with the old maximum. Rescale only one, and old and new keys count in different units.
#
# </details>
#
# <details><summary>How can the backward pass do without the probabilities?</summary>
#
# $P = e^{S - L}$ for any tile, with one stored number $L$ per query; and the sum over all keys that the softmax's slope needs is $\sum_c dO_{ic} O_{ic}$.
#
# </details>
#
# <details><summary>It does more arithmetic. Why is it faster?</summary>
#
# The chip was waiting for memory. Scores that stay in the fast memory cost arithmetic, of which there was enough, and no bytes.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/07-inference/02-flash-attention.ipynb).
#
# **Further reading.** [Dao et al. 2022](https://arxiv.org/abs/2205.14135 "dao2022flashattention"), section 3.1; [Dao 2023](https://arxiv.org/abs/2307.08691 "dao2023flashattention2"), section 3.1; [Milakov & Gimelshein 2018](https://arxiv.org/abs/1805.02867 "milakov2018online"), three pages;
# [Rabe & Staats 2021](https://arxiv.org/abs/2112.05682 "rabe2021memory"), the same idea without the tiles. Across several chips it becomes [ring attention](../05-parallelism/06-sequence.ipynb).
