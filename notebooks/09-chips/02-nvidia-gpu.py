# %% [markdown]
# # NVIDIA GPU
#
# A data sheet says how fast a GPU is when nothing goes wrong. What goes wrong is countable: 32 threads ask for numbers together, and what they get costs as much as the pieces in which memory comes. Here real kernels run without a GPU, every address is written down, and NVIDIA's own rules judge them, from V100 to B200. At the end you own three counts: sectors, bank cycles, and blocks per processor.

# %% tags=["hide-input"]
import time

import numpy as np
import torch

from llmlab.checks.chips.nvidia_gpu import check
from llmlab.chips import nvidia_gpu as nv
from llmlab.compilers.triton_kernels import Job, TensorCore, linear, stored
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
from llmlab.models.accounting import parameters
from llmlab.models.chips import chip
from llmlab.models.presets import preset

cuda = nv.cuda_simulator()  # before `kernels`: from now on numba simulates
from llmlab.chips.nvidia_gpu import kernels

# %% [markdown]
# ## What it costs
#
# A GPU has about a hundred processors, **SMs**. Each runs **warps**: 32 threads, its lanes, that execute one instruction together. An SM holds dozens of warps, and in each clock four of them may issue an instruction; while one waits for memory, others go on. When a warp reads, memory sends **sectors** of 32 bytes, whole. So reading the weights of Llama 3.1 8B for one token takes an H100 this long, if neighbouring threads take neighbouring numbers of 16 bits; and if they take numbers below each other, in a matrix with rows of 4,096:

# %%
h100 = chip("H100")
weights = 2 * parameters(preset("llama-3.1-8b"))
lane = np.arange(32)
for name, stride in (("side by side", 1), ("below each other", 4096)):
    found = nv.global_memory(2 * stride * lane, width=2)
    took = weights / found.efficiency / h100.bandwidth
    print(f"{name:17} {found.efficiency:7.2%} of what is moved is used, {took:.4f} s")

# %% [markdown]
# Nothing on the data sheet has changed. (A cache may keep some of the rest until it is wanted; how much that helps is the experiment below.)
#
# ## Predict
#
# The rule of thumb says: with a stride of 32, a warp that reads floats of 4 bytes makes 32 times as many transactions.

# %%
bytes_guess = predict(
    "How many times as many bytes are moved as with stride 1?", unit="times"
)
blocks_guess = predict(
    "An SM has 65,536 registers. A kernel takes 1,280 per warp, and blocks of 10"
    " warps. How many blocks does a V100's SM hold?",
    unit="blocks",
)

# %% [markdown]
# ## By hand
#
# Four lanes, four bytes each. Sectors begin at 0, 32, 64, …:
#
# | addresses | sectors | asked for | moved |
# |---|---|---|---|
# | 0, 4, 8, 12 | 0 | 16 | 32 |
# | 24, 28, 32, 36 | 0, 1 | 16 | 64 |
# | 0, 32, 64, 96 | 0, 1, 2, 3 | 16 | 128 |
# | 8, 8, 8, 8 | 0 | 4 | 32 |

# %%
BY_HAND = [[0, 4, 8, 12], [24, 28, 32, 36], [0, 32, 64, 96], [8, 8, 8, 8]]
for addresses in BY_HAND:
    found = nv.global_memory(addresses)
    print(addresses, found.sectors, found.asked, found.moved)

# %% [markdown]
# ## The idea
#
# Here are the 32 lanes of a warp (dots), in the lines of 128 bytes, four sectors each, that they touch. Grey is what is moved:

# %% tags=["hide-input"]
SHOWN = {"stride 1": (1, 0), "one further": (1, 1), "stride 2": (2, 0)}
SHOWN["stride 8 (a quarter of it)"] = (8, 0)
fig, ax = plt.subplots(figsize=(4.8, 3.6))
top = 0
for name, (stride, offset) in SHOWN.items():
    bytes_ = 4 * (stride * lane + offset)
    bytes_ = bytes_[bytes_ < 256]
    ax.text(0, top - 0.3, name, fontsize=9, va="bottom")
    for sector in sorted({int(b) // 32 for b in bytes_}):
        y, x = top + sector // 4, sector % 4 * 8
        ax.barh(y + 0.5, 7.8, 0.8, left=x + 0.1, color=palette.gray, alpha=0.35)
    for b in bytes_:
        line, word = b // 128, b % 128 // 4
        ax.plot(word + 0.5, top + line + 0.5, "o", ms=4, color=palette.blue)
    top += int(bytes_.max()) // 128 + 2.1
ax.set(xlim=(0, 32), ylim=(top - 0.8, -1.3), yticks=[])
ax.set(xlabel="word of 4 bytes in a line of 128")
ax.grid(False)
figure(
    fig,
    alt=(
        "Lanes in sectors of memory. Stride 1 fills four sectors; one word further, it"
        " takes a fifth; stride 2 takes eight, each half used; with stride 8 there is"
        " one lane in each sector."
    ),
)

# %% [markdown]
# With addresses $a_l$ of the active lanes, in bytes, from compute capability 6.0 on (NVIDIA's number for a generation: 7.0 is V100, 8.0 or `sm_80` A100, 9.0 H100, 10.0 B200; [NVIDIA 2025](https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/ "nvidia2025bestpractices"), 10.2.1):
#
# $$\text{sectors} = \bigl|\{\lfloor a_l / 32 \rfloor\}\bigr|, \qquad \text{moved} = 32 \cdot \text{sectors}$$
#
# **Shared memory**, on the SM, has 32 banks; word $w = \lfloor a / 4 \rfloor$ lies in bank $w \bmod 32$. A bank gives one word per cycle, to all who want this one. Lanes of 8 or 16 bytes come in phases of 16 or 8 lanes:
#
# $$\text{cycles} = \sum_{\text{phases}} \max_{b} \bigl|\{w : w \bmod 32 = b\}\bigr|$$
#
# ## Your turn
#
# Sectors, and efficiency: different bytes asked for, over bytes moved. Each address is a multiple of the width.


# %%
def my_sectors(addresses, width, active):
    """(sectors, efficiency) of one request; lanes that are not active ask nothing."""
    raise NotImplementedError("three lines of yours")


your_turn(check.sectors, my_sectors)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(addresses, width, active):
    lanes = {a for a, on in zip(addresses, active, strict=True) if on}
    touched = {a // 32 for a in lanes}
    return len(touched), len(lanes) * width / (32 * len(touched))


your_turn(check.sectors, one_answer)
near, far = (nv.global_memory(4 * stride * lane) for stride in (1, 32))
print(f"lines {far.lines // near.lines} times, sectors {far.sectors // near.sectors}")
bytes_guess.settle(far.moved / near.moved)

# %% [markdown]
# Both are right: 32 times as many lines of 128 bytes, and 8 times as many sectors. What costs bandwidth is sectors, and from stride 8 on it gets no worse. So ask, when somebody says "transactions": of what?
#
# ## The code

# %% tags=["hide-cell"]
show(nv.global_memory, nv.shared_memory, nv.record, nv.occupancy, nv.TensorMap.read)

# %% [markdown]
# | value | shape | holds |
# |---|---|---|
# | `addresses`, `active` | (warps, 32) | bytes; which lanes take part |
# | `Transactions` | – | requests, sectors, lines, bytes asked for |
# | `Traffic.loads["x"]` | – | what all loads of array x took |
# | `Occupancy.room` | – | limit → blocks it allows |
#
# ## Real kernels
#
# `nv.record` runs a kernel in numba's CUDA simulator (0.68), with arrays that note who uses what. First a transpose: directly, and by tiles of 32 × 32 in shared memory, where a column of the tile lies in *one* bank; then with one column more per row; then with column $c$ of row $r$ stored at $c \oplus r$ (XOR, bit by bit: *swizzled*). *Used* is what was asked for, of what was moved.
#
# Second, NVIDIA's own example. Its guide multiplies a matrix by its transpose in three ways on a V100, and measures 12.8, 140.2 and 199.4 GB/s ([NVIDIA 2025](https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/ "nvidia2025bestpractices"), table 3). The same kernels run here, and say why. Third, a kernel that forgets its barrier (`syncthreads`: nobody goes on before all have arrived).

# %%
x = np.random.default_rng(0).random((32, 32), np.float32)
KINDS = {
    "direct": (kernels.transpose_naive, (1, 4)),
    "tile": (kernels.transpose_tiled(), (1, 1)),
    "tile, padded": (kernels.transpose_tiled(pad=1), (1, 1)),
    "tile, swizzled": (kernels.transpose_tiled(swizzled=True), (1, 1)),
}
print("                sectors  used  bank cycles")
for name, (kernel, grid) in KINDS.items():
    y = np.zeros_like(x)
    traffic = nv.record(kernel, grid, (32, 8), x, y)
    used = traffic.asked / (32 * traffic.sectors)
    print(f"{name:14} {traffic.sectors:8} {used:5.0%} {traffic.cycles:8}", end="")
    print("   right" if (y == x.T).all() else "   wrong")

c = np.zeros_like(x)
print()
THREE = [kernels.gram_direct, kernels.gram_tiled(), kernels.gram_tiled(pad=1)]
for kernel, printed in zip(THREE, (12.8, 140.2, 199.4), strict=True):
    found = nv.record(kernel, (1, 1), (32, 32), x, c)
    print(f"{printed:6} GB/s: {found.sectors:6} sectors, {found.conflicts:4} conflicts")
compare(torch.tensor(c), torch.tensor(x @ x.T), "x xᵀ", tol=1e-4)


def forgotten(x, y):
    part = cuda.shared.array(32, np.float32)
    t = cuda.threadIdx.x
    part[t] = x[t]
    y[t] = part[t // 2]  # another thread's: has it been there yet?


try:
    nv.record(forgotten, 1, 32, x[0], c[0])
except nv.Race as why:
    print("no barrier:", why)

# %% [markdown]
# The first kernel of NVIDIA's loads 32 sectors where one number is needed from each; the second repairs that, and its column in shared memory brings conflicts; the third has neither. What the guide shows as three bandwidths are two counts.
#
# The simulator alone accepts a negative index, blocks of 2,048 threads, and memory that nobody has written; its threads run in order, so most races are invisible. `record` refuses all of these.
#
# ## Occupancy
#
# While a warp waits for memory, the SM runs others; it holds as many blocks as fit. **Occupancy** is the part of its places for warps that they fill. The rules are in [exercise 3](../../work/09-chips/02-nvidia-gpu.ipynb); here they are against what NVIDIA prints (the [Best Practices](https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/ "nvidia2025bestpractices"), 11.1.1, and the [Programming Guide](https://docs.nvidia.com/cuda/cuda-programming-guide/ "nvidia2025programming"), 2.3.7):

# %%
PRINTED = [  # capability, threads, registers, shared → blocks, warps in percent
    ("7.0", 128, 37, 0, 12, 75),
    ("7.0", 320, 37, 0, 4, 63),
    ("7.0", 512, 64, 0, 2, 50),
    ("7.0", 512, 65, 0, 1, 25),
    ("10.0", 768, 32, 0, 2, 75),
    ("10.0", 32, 32, 0, 32, 50),
    ("10.0", 128, 32, 100 * 1024, 2, 13),
]
for capability, threads, registers, shared, blocks, percent in PRINTED:
    found = nv.occupancy(threads, registers, shared, nv.limits(capability))
    same = found.blocks == blocks and abs(100 * found.share - percent) <= 0.5
    print(f"{capability:>4} {threads:4} threads: {found.blocks:2} blocks,", end=" ")
    print(f"{found.share:5.1%}, limit: {found.limit:20}", "printed" if same else "!")

print("\npart 08's product, tiles of 128 × 128 × 64, 8 warps, compiled by Triton:")
for target, capability in (("sm_80", "8.0"), ("sm_90", "9.0"), ("sm_100", "10.0")):
    needs = stored.of(Job("mlp_tile", target, warps=8))
    sm = nv.limits(capability)
    found = nv.occupancy(256, needs["registers"], needs["shared"], sm)
    print(
        f"{target:6} {needs['registers']:3} registers, {needs['shared']:6} B:", end=" "
    )
    print(f"{found.blocks} blocks, {found.share:.1%}, limit: {found.limit}")

# %% tags=["hide-output"]
blocks_guess.settle(nv.occupancy(320, 37, 0, nv.limits("7.0")).blocks)

# %% [markdown]
# 65,536 registers would do for five blocks of ten warps. But an SM has four parts with a quarter each, and a warp takes all of its registers from one: twelve warps per part, 48 in all, four blocks. And look at the product: on no chip does it fill more than a quarter of the places. Occupancy is no goal. It is one of two ways to hide waiting; the other is that each warp has much under way.
#
# ## Tensor cores
#
# A product of small matrices in one instruction, by many threads together. Each lane holds certain elements. The formulas of PTX (NVIDIA's portable assembly), and the matrices of bits with which [part 08](../08-compilers/06-triton.ipynb) read Triton's layouts, say the same. Below them stands the machine code into which Triton 3.7 translated a product of 64 × 64 × 64: instructions per warp, or on `sm_90` and `sm_100` for four warps together. Then, what peaks are made of:

# %%
rng = np.random.default_rng(1)
A, B = rng.random((16, 16), np.float32), rng.random((16, 8), np.float32)
zero = np.zeros((32, 4), np.float32)
held = nv.mma(nv.fragments("A", A), nv.fragments("B", B), zero)
compare(torch.tensor(nv.gathered("C", held)), torch.tensor(A @ B), "A B by 32 lanes")
bits = linear(TensorCore(2, (1, 1), (16, 8)), (16, 8))
ours = [nv.element("C", lane_, i) for lane_ in range(32) for i in range(4)]
read = [bits.element(i, lane_, 0) for lane_ in range(32) for i in range(4)]
compare(torch.tensor(ours), torch.tensor(read), "who holds what")
for target in ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"):
    sass = stored.of(Job("one_dot", target))["sass"]
    words = [f"{n} {word}" for word, n in sass.items() if "MMA" in word]
    print(f"64³ on {target:6}: {', '.join(words) or 'no tensor core'}")

print("\n" + " " * 41 + "bytes per clock, tiles of")
print("      SMs FLOP/clock   GHz  TFLOP/s  printed   16×8  64×256  128×256")
for made in nv.generations().values():
    printed = chip(made.chip).speed(made.format) / 1e12
    print(f"{made.chip} {made.sms:4} {made.per_clock:10} {made.clock / 1e9:5}", end="")
    print(f" {made.peak / 1e12:8.1f} {printed:8.1f}", end="")
    tiles = ((16, 8), (64, 256), (128, 256))
    print(*(f"{nv.fed(m, n, 16, made.per_clock):7.0f}" for m, n in tiles))

# %% [markdown]
# A T4, `sm_75`, has tensor cores, and this Triton uses none of them. An RTX 5090, `sm_120`, is a Blackwell by name, and gets the A100's instruction. A peak needs a compiler, and the name of a generation promises no instruction.
#
# Peaks are SMs times clock times a number that doubles: FLOP per SM and clock ([Crovella 2023](https://forums.developer.nvidia.com/t/how-to-calculate-the-tensor-core-fp16-performance-of-h100/244727 "crovella2023tensor") for the first three, at the data sheet's clock). For the B200 NVIDIA prints no rate per SM; twice the H100's gives the tensor clock that [HMC](https://hmc-tech.com/gpus/nvidia-b200-vs-nvidia-b100 "hmctech2025b200") lists.
#
# The last columns are what A and B take, if each instruction reads them anew. Shared memory gives 32 banks · 4 = 128 bytes per clock. The A100's 16 × 8 would need 384: so its warps load operands into registers, and use them three times or more. The H100's 64 × 256 reads shared memory itself, and needs 80. On a B200 the same tile would need 160; so its tile is 128 × 256, with 96. The result, 32,768 numbers, would take half of an SM's registers. So it lies in a memory of its own, and one thread gives the order.
#
# | | V100 | A100 | H100 | B200 |
# |---|---|---|---|---|
# | threads that issue it | 8 | 32 | 128 | 1 |
# | operands lie in | registers | registers | shared memory | shared memory |
# | result lies in | registers | registers | registers | tensor memory |
# | copies | threads | `cp.async` | TMA, clusters | TMA, clusters |
#
# The B300 shows that a generation may also give something up: in [the course's file](01-chips-and-roofline.ipynb) it has a B200's 16-bit peak, and a 36th of its INT8.
#
# (Shapes, swizzles and boxes: [PTX ISA](https://docs.nvidia.com/cuda/parallel-thread-execution/ "nvidia2025ptx").)
#
# ## Copies without threads
#
# A number takes its time to arrive, and memory is busy only if enough others are on their way: bytes in flight = bandwidth · latency ([Little 1961](https://doi.org/10.1287/opre.9.3.383 "little1961proof")). With latencies [Dewing 2026](https://github.com/markdewing/AI_kernels "dewing2026latency") measured in clocks (the H100's on a GH200), all at the clock above. Then boxes, clusters, and `ldmatrix`, by which a warp loads 8 rows of 16 bytes at a time:

# %%
for made in nv.generations().values():
    if made.latency:
        flying = nv.in_flight(chip(made.chip).bandwidth, made.latency) / made.sms
        print(f"{made.chip}: {flying / 1024:4.1f} KiB per SM,", end=" ")
        print(f"{flying / 2048:4.1f} bytes by each of 2,048 threads, all the time")

box = nv.TensorMap(shape=(64, 3, 1000), box=(64, 1, 128), width=2, swizzle=128)
print(f"\nkeys of one head, 128 tokens: {box.bytes} bytes by one instruction;", end=" ")
print(f"the last box reads {box.read((0, 1, 896))[0]}, and fills up with zeros")
for cluster in ((1, 1), (2, 1), (2, 2)):
    asked = nv.multicast((4096, 4096, 4096), (128, 256, 64), cluster)
    print(f"4096³, 128 × 256 tiles, clusters of {cluster}: {asked / 2**30:.2f} GiB")
rows = 128 * np.arange(8)  # ldmatrix: 16 bytes of each of 8 rows
print("ldmatrix:", nv.shared_memory(rows, 16).cycles, "cycles,", end=" ")
print("swizzled as TMA does:", nv.shared_memory(nv.swizzle(rows), 16).cycles)
layout = stored.of(Job("one_dot", "sm_90"))["layouts"]["#shared"]
print("Triton's tile on sm_90:", layout.split("{")[1].split(",")[0])

# %% [markdown]
# On a V100 one float per thread was more than twice enough. On a B200 even 8 bytes by each of all its threads are not. So TMA: one thread names a box of a tensor, hardware fetches it (zeros beyond the edge, 16-byte pieces swizzled against bank conflicts), and blocks of a cluster (on SMs close to each other) that need one tile receive it together.
#
# ## The experiment
#
# SmolLM2's own numbers: keys of its first layer for 32 tokens, in fp16, and three query heads that share a key head. Two kernels (a thread per key; a warp per key), and the cache stored as tokens × heads × dims or heads × dims × tokens. All are right. What do they move? And how long does a step take for all keys of 8,192 tokens, if no cache keeps anything, or if one keeps everything? What a warp asks for still goes through the SM's own cache; we let that give 128 bytes per clock, as shared memory does.

# %%
model, kept = real_model.load(), {}
attention = model.model.layers[0].self_attn
for name in ("q_proj", "k_proj"):
    attention.get_submodule(name).register_forward_hook(
        lambda module, given, out, name=name: kept.__setitem__(name, out[0])
    )
with torch.no_grad():
    model(torch.arange(40, 72)[None])
q = kept["q_proj"][-1].view(9, 64)[:3].numpy()  # before the rotation
k = kept["k_proj"].view(32, 3, 64).numpy().astype(np.float16)
right = q @ k[:, 0].T.astype(np.float32)
turned = np.ascontiguousarray(k.transpose(1, 2, 0)).transpose(2, 0, 1)
PLANS = {
    "a thread per key": (kernels.scores_by_thread, (1, 3), 32),
    "a warp per key": (kernels.scores_by_warp(), (8, 3), 8),  # of 8 tokens
}
used = {}
for plan, (kernel, grid, tokens) in PLANS.items():
    for layout, there in (("tokens, heads, dims", k), ("heads, dims, tokens", turned)):
        out = np.zeros((3, 32), np.float32)
        found = nv.record(kernel, grid, 32, q, there, out, 3).loads["k"]
        used[plan, layout] = found.efficiency
        close = np.abs(out - right)[:, :tokens].max() < 1e-3
        print(f"{plan:16} {layout}: {found.sectors / found.requests:4.0f}", end=" ")
        print(f"sectors per request, {found.efficiency:6.1%} used, right: {close}")

made = nv.generations()["H100"]
through_l1 = made.sms * nv.SHARED_PER_CLOCK * made.clock
keys = 30 * 3 * 64 * 2 * 8192  # layers · heads · dims · bytes · tokens: all keys
print(f"\nkeys of 8,192 tokens, all layers: {keys / 1e6:.0f} MB")
for name, part in (("good pair", 1.0), ("bad pair", min(used.values()))):
    kept_all = max(keys / h100.bandwidth, keys / part / through_l1)
    nothing = keys / part / h100.bandwidth
    print(f"{name}: {kept_all * 1e6:4.0f} µs if a cache keeps all,", end=" ")
    print(f"{nothing * 1e6:4.0f} µs if it keeps nothing")

# %% [markdown]
# Neither layout is bad, nor either kernel: the pair is. A bad pair asks for 16 times the sectors. A cache can keep a sector until its other numbers are wanted, and then memory sends it once; but all 16 requests still go through it, so even a perfect cache does not save the bad pair. (Left out: waiting that nothing hides. All four are bounds.)
#
# This is why engines fix the order of their cache and write attention kernels for it, and why a weight that was transposed "for free" may not be free.
#
# Your own CPU moves lines, too, mostly of 64 bytes. Half a million floats, copied with a stride, the best of five:

# %% tags=["hide-input", "nbval-ignore-output"]
n = 1 << 19
source, target = np.ones(32 * n, np.float32), np.empty(n, np.float32)
STRIDES = (1, 2, 4, 8, 16, 32)
per_number = []
for stride in STRIDES:
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target[:] = source[: n * stride : stride]
        best = min(best, time.perf_counter() - started)
    per_number.append(best / n * 1e9)
per_warp = [nv.global_memory(4 * s * lane).sectors / 4 for s in STRIDES]
fig, ax = plt.subplots(figsize=(4.8, 2.8))
slower = [t / per_number[0] for t in per_number]
ax.loglog(STRIDES, slower, "o-", color=palette.orange, label="this CPU, seconds")
ax.loglog(STRIDES, per_warp, "s-", color=palette.blue, label="a warp, sectors")
ax.set(xlabel="stride", ylabel="times those of stride 1", xticks=STRIDES)
ax.set_xticklabels(STRIDES)
ax.minorticks_off()
ax.legend(fontsize=9)
figure(
    fig,
    alt=(
        "Over strides 1 to 32: sectors of a warp grow to 8 times at stride 8 and stay"
        " there. The time of this CPU's copy grows, too, and further, for its lines"
        " are longer."
    ),
)

# %% [markdown]
# ## Play
#
# A tile of 32 × 32 words in shared memory. A warp reads down a column, 4 or 16 bytes per lane, or along a row. Each row has some words of padding.

# %% tags=["hide-input", "slider"]
PADS = [0, 1, 2, 4, 8]
READS = ["column, 4 bytes", "row, 4 bytes", "column, 16 bytes"]


def addresses_of(pad: int, read: str):
    """Of 32 lanes, and their width."""
    row, width = 4 * (32 + pad), int(read.split()[1])
    return lane * (row if read.startswith("column") else width), width


def cycles_of(pad: int, read: str):
    """Cycles of the banks; None: a GPU refuses the addresses."""
    try:
        return nv.shared_memory(*addresses_of(pad, read)).cycles
    except ValueError:
        return None


def draw(pad: int, read: str):
    addresses, width = addresses_of(pad, read)
    words = {int(w) + i for w in addresses // 4 for i in range(width // 4)}
    fig, ax = plt.subplots(figsize=(4.8, 3.2))
    cycles = cycles_of(pad, read)
    counts = [len([w for w in words if w % 32 == bank]) for bank in range(32)]
    ax.bar(range(32), counts if cycles else 0, color=palette.blue)
    ax.set(xlabel="bank", ylabel="words that it must give", ylim=(0, 34))
    ax.set(xlim=(-0.7, 31.7), yticks=[0, 4, 8, 16, 32])
    title = f"{cycles} cycles" if cycles else "refused: not a multiple of 16 bytes"
    ax.set_title(title, fontsize=10)
    return fig


def told(pad: int, read: str) -> str:
    cycles = cycles_of(pad, read)
    what = f"{cycles} cycles" if cycles else "refused, addresses are misaligned"
    return f"Padding of {pad} words, {read} per lane: {what}"


def missing_step(pad: int, read: str) -> str:
    if read != "column, 16 bytes":
        return "the question is about columns, with 16 bytes per lane"
    cycles = cycles_of(pad, read)
    if cycles is None:
        return "a GPU refuses addresses that are no multiple of 16"
    return "" if cycles == 4 else f"{cycles} cycles; 512 bytes need only 4"


explore(
    draw,
    alt=told,
    title="Who waits for which bank?",
    challenge="Columns, 16 bytes per lane: the padding without a conflict.",
    missing=missing_step,
    start={"pad": 0, "read": "column, 4 bytes"},
    pad=PADS,
    read=READS,
)

# %% [markdown]
# ## At scale
#
# On a GPU the profiler counts the same things; sectors per request should be 4 for floats, 16 for 16 bytes per lane. The second line runs this page's kernels on a card, and puts bandwidth beside stride.
#
# ```bash
# ncu --metrics l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum,l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum python generate.py
# python scripts/gpu_check.py --only recorded_kernels strides occupancy
# ```
#
# The guide's V100 copies 790 GB/s where addresses are aligned ([NVIDIA 2025](https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/ "nvidia2025bestpractices"), 10.2.1.3). One word further, a warp takes five sectors instead of four: the guide expects 4/5 of it, and measures 9/10, as neighbouring warps share the fifth sector in a cache. Counts are what a warp asks for; what memory sends lies between them and the distinct bytes.
#
# ## What to keep
#
# ```python
# sectors = len({a // 32 for a in addresses})         # of 32 bytes, per request
# words = {a // 4 for a in addresses}
# cycles = max(Counter(w % 32 for w in words).values())
# in_flight = bandwidth * latency                     # bytes, all the time
# ```
#
# **Use it** when a kernel is slower than its roofline: it says which of its lines moves too much. **Not** to compare finished kernels: caches, and what hides behind what, decide the rest. And ask a vendor: at which clock, fed from where, and with how many bytes in flight?
#
# <details><summary>Why is padding by one column enough for 4-byte columns?</summary>
#
# Rows are then 33 words apart, and 33 mod 32 = 1: 32 rows go through 32 banks. With 16 bytes per lane, rows must stay multiples of 16 bytes, so it takes four words.
#
# </details>
#
# <details><summary>A kernel has 12% occupancy. Is it bad?</summary>
#
# Not if each of its few warps has much under way: large tiles, wide loads, TMA. The tile that Triton made above has no more.
#
# </details>
#
# <details><summary>The data sheet of a new chip doubles FLOP/s. What must have doubled with it?</summary>
#
# What feeds them: bytes per clock from shared memory, or tiles that use each byte twice as often; and bytes in flight, if bandwidth grew.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/09-chips/02-nvidia-gpu.ipynb).
#
# Further reading: [Austin et al. 2025](https://jax-ml.github.io/scaling-book/gpus/ "austin2025gpus") on GPUs beside TPUs; [Luo et al. 2024](https://arxiv.org/abs/2402.13499 "luo2024hopper"), Hopper measured instruction by instruction.
