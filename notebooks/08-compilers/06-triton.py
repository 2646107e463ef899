# %% [markdown]
# # Triton
#
# A kernel for a GPU used to be written thread by thread, and again for each new chip. In Triton you write a program for one block of the result, in Python. The compiler shares the block among threads, keeps it in registers, and picks the chip's own instructions. Here you write such programs, run them on a CPU with every byte
# counted, and then follow one line down to the machine code of four chips. At the end you own offsets, masks and layouts.

# %% tags=["hide-input"]
import inspect
import itertools
import math
import os
import re

# Triton settles at its import whether it compiles or interprets: here it interprets.
os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton

from llmlab.checks.compilers.triton import check
from llmlab.compilers import program
from llmlab.compilers.triton_kernels import (
    Blocked,
    Job,
    TensorCore,
    compile_jobs,
    kernels,
    launch,
    launching,
    linear,
    parse,
    reading,
    stored,
    tl,
    tuning,
)
from llmlab.compilers.triton_kernels.launching import Tile
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

# %% [markdown]
# ## What it costs
#
# The function of this part is $\operatorname{GELU}(x w + b)$. Take the sizes of LLaMA-7B, 4,096 tokens of 4,096 numbers each, and a layer 11,008 wide, in 16 bits. Three kernels, one after another, write the wide result three times and read it twice. An H100 has a memory of 3.35 TB/s and 989 TFLOP/s of products
# ([NVIDIA 2023](https://www.nvidia.com/en-us/data-center/h100/ "nvidia2023h100")).

# %%
T, d, f = 4096, 4096, 11008
result = 2 * T * f
print(f"the result: {result / 1e6:.0f} MB, moved five times, and once is enough")
print(f"four times too many: {4 * result / 3.35e12 * 1e3:.2f} ms")
print(f"the product: {2 * T * d * f / 989.4e12 * 1e3:.2f} ms at the chip's peak")

# %% [markdown]
# The product cannot be shortened. What comes after it can be computed before it ever leaves the chip, if one writes the product oneself.
#
# ## Predict
#
# `tl.dot(a, b)` multiplies 64 × 64 by 64 × 64 numbers of 16 bits, with four warps (groups of 32 threads). On an A100 (`sm_80`) each warp issues 32 instructions for it.

# %%
dot_guess = predict("How many per warp on an H100 (sm_90)?", unit="instructions")
beyond_guess = predict(
    "On a GPU a kernel loads three numbers beyond the end of x. What does it get?",
    choices=("an error", "zeros", "what happens to lie there"),
)

# %% [markdown]
# ## By hand
#
# Double six numbers, in blocks of four. Two programs run the same code; each knows its number $p$.
#
# | $p$ | offsets: $4p + (0, 1, 2, 3)$ | mask: offset < 6 | bytes |
# |---|---|---|---|
# | 0 | 0, 1, 2, 3 | 1, 1, 1, 1 | 16 |
# | 1 | 4, 5, 6, 7 | 1, 1, **0, 0** | 8 |
#
# (So many are loaded, and as many stored.) A mask switches off what would lie beyond the end. `tl.constexpr` marks a number that is fixed when the kernel is compiled; `(2,)` is the grid, two programs along one axis. Our interpreter runs all programs, counts, and refuses what a GPU does without a word.


# %%
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, 2 * x, mask=i < n)


def no_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i))


def one_place(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i))


x, y = torch.arange(6.0), torch.zeros(6)
report = launch(double, (2,), x, y, 6, BLOCK=4)
print(y.tolist(), dict(report.loaded), dict(report.stored))
for kernel in (no_mask, one_place):
    try:
        launch(kernel, (2,), x, y, 6, BLOCK=4)
    except (IndexError, RuntimeError) as refusal:
        print(f"{type(refusal).__name__}: {str(refusal).split(' (line')[0]}")

# %% [markdown]
# ## The idea
#
# A **program** computes one tile of the result, $R$ rows by $C$ columns. Its place in the grid, $p_0$ and $p_1$, is all that tells it from the others:
#
# $$\text{row}_r = p_0 R + r, \qquad \text{col}_c = p_1 C + c$$
#
# $$\text{address}_{rc} = x + \text{row}_r \cdot \text{stride} + \text{col}_c$$
#
# A column of rows plus a row of columns is a block of addresses. Programs run in no order and cannot wait for each other. What one needs, it loads itself; so a product loads each row of $x$ once for every column of tiles. The cache helps, if programs that run together need the same rows and columns. This is why their
# numbers go through the tiles in groups. Here are nine of 81 programs, each of which reads a row and a column of tiles:


# %% tags=["hide-input"]
def note_tile(i_ptr, j_ptr, down, across, GROUP: tl.constexpr):
    i, j = grouped(tl.program_id(0), down, across, GROUP)
    tl.store(i_ptr + tl.program_id(0), i)
    tl.store(j_ptr + tl.program_id(0), j)


grouped = kernels.grouped
fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.9))
for ax, group in zip(axes, (1, 3), strict=True):
    rows, cols = torch.zeros(2, 81, dtype=torch.int64)
    launch(note_tile, (81,), rows, cols, 9, 9, group)
    first = torch.stack([rows, cols], 1)[:9].tolist()
    ax.set(xlim=(0, 9), ylim=(9, 0), xticks=[], yticks=[], aspect="equal")
    for number, (i, j) in enumerate(first):
        ax.barh(i + 0.5, 1, 1, left=j, color=palette.blue, edgecolor="white")
        middle = {"ha": "center", "va": "center_baseline", "color": "white"}
        ax.text(j + 0.5, i + 0.5, number, fontsize=9, **middle)
    needed = 9 * sum(len(set(each)) for each in zip(*first, strict=True))
    ax.set_title(f"groups of {group}: {needed} tiles read", fontsize=10)
figure(
    fig,
    alt=(
        "The first nine of 81 tiles. Left, in groups of one row: a row of nine, which"
        " need 90 tiles of the inputs. Right, in groups of three: a square, 54 tiles."
    ),
)

# %% [markdown]
# Left, the nine need one row of tiles of $x$ and nine columns of $w$, each nine tiles long: 9 · (1 + 9) = 90. Right they need three and three: 9 · (3 + 3) = 54. These are the counts of [Triton's own tutorial](https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html "triton2025matmul").
#
# ## Your turn
#
# $y = x + b$ on a grid of blocks: x has T rows of d numbers, b one number per column. Rows of x lie `stride` numbers apart, those of y d. T and d need not be multiples of ROWS and COLS.


# %%
def my_add_bias(
    x_ptr, b_ptr, y_ptr, T, d, stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """y = x + b, the block of program (tl.program_id(0), tl.program_id(1))."""
    raise NotImplementedError("six lines of yours")


your_turn(check.add_bias, my_add_bias)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(
    x_ptr, b_ptr, y_ptr, T, d, stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    there = (row < T) & (col < d)
    x = tl.load(x_ptr + row * stride + col, mask=there)
    b = tl.load(b_ptr + col, mask=col < d)
    tl.store(y_ptr + row * d + col, x + b, mask=there)


your_turn(check.add_bias, one_answer)

# %% [markdown]
# ## The code
#
# The package has three kernels in real Triton: softmax of rows, the part's `mlp`, and attention. The first is an exercise, and so is `grouped`, which `mlp` calls; the other two are below. In attention the queries of the G heads that share a key head are rows of one tile, so a key is loaded once for all of them, and a single token still fills several rows.
#
# | value | shape | holds |
# |---|---|---|
# | `row`, `col` | (R, 1), (1, C) | places of the tile; `+` makes a block of them |
# | `acc` | (R, C), fp32 | the product so far, in registers |
# | `q`, `k`, `v` | (R, D), (C, D) | row $n$ of q: query $\lfloor n / G \rfloor$ of head $n \bmod G$ |
# | `m`, `l`, `o` | (R, 1), (R, 1), (R, D) | the online softmax |
# | `WIDE` | – | whether tiles are made fp32 before they are multiplied (why: next table) |

# %% tags=["hide-cell"]
show(kernels.mlp_tile.fn, kernels.attention_tile.fn, launch)

# %% [markdown]
# ## Against PyTorch
#
# Sizes that fill no tile, six query heads over three key heads, queries at the end of longer keys. Each kernel runs twice, unchanged: in Triton's interpreter and in ours.


# %%
def on_both(name, theirs, kernel, grid, tensors, rest, right):
    """The same kernel in Triton's interpreter and in ours, and what ours counted."""
    ours = torch.empty_like(right)
    report = launch(kernel, grid, *tensors, ours, *rest)
    both = torch.stack([theirs, ours])
    compare(both, torch.stack([right, right]), f"{name}, Triton's and ours", tol=1e-4)
    return report


x, w, b = program.example_inputs("mlp", T=37, d=50, f=70)
tile = Tile(16, 32, 16, group=2)
grid = launching.mlp_grid(x, w, tile)
rest = launching.mlp_arguments(x, w, b, x, tile)[4:]
mine = launching.mlp(x, w, b, tile)
report = on_both(
    "mlp", mine, kernels.mlp_tile, grid, (x, w, b), rest, program.mlp(x, w, b)
)
across, down = math.ceil(70 / 32), math.ceil(37 / 16)
print(f"{across} columns of tiles: x is read {report.loaded['x'] / x.nbytes:.0f} times")
print(f"{down} rows of tiles: w is read {report.loaded['w'] / w.nbytes:.0f} times")
moved = report.loaded.total() + report.stored.total()
print(f"moved: {moved:,} bytes; as three kernels {moved + 4 * mine.nbytes:,}")

wide = torch.randn(9, 40)[:, :33]
right, rest = wide.softmax(-1), (33, wide.stride(0), 64)
mine = launching.softmax(wide)
on_both("softmax", mine, kernels.softmax_rows, (9,), (wide,), rest, right)

q, k, v = torch.randn(2, 6, 5, 24), torch.randn(2, 3, 29, 24), torch.randn(2, 3, 29, 24)
seen = torch.arange(29) <= 24 + torch.arange(5)[:, None]
sdpa = torch.nn.functional.scaled_dot_product_attention
right = sdpa(q, k, v, attn_mask=seen, enable_gqa=True)
rest = (5, 29, 24**-0.5, 24, 2, 16, 16, 32, True, False)
mine = launching.attention(q, k, v, rows=16, cols=16)
report = on_both(
    "attention", mine, kernels.attention_tile, (1, 6), (q, k, v), rest, right
)
print(f"two heads share keys: they are read {report.loaded['k'] / k.nbytes:.0f} time")

# %% [markdown]
# Bytes are counted exactly; how long an interpreter takes says nothing about a GPU, so no time stands here. And a kernel that passes in one may still be wrong. What each does (Triton 3.7.1 was run, the GPU's column is what is documented):
#
# | | a GPU | Triton's | ours |
# |---|---|---|---|
# | an address beyond the tensor | what lies there, or an error | what lies there | refused, by name |
# | two programs store to one place | either number | the last program's | refused, both named |
# | masked off, without `other` | undefined | 0 | NaN |
# | bf16 tiles multiplied | right | wrong without a word | right |
#
# ## Down to the machine
#
# Triton lowers a kernel in steps: **TTIR**, tensors without threads; **TTGIR**, where each tensor has a layout over threads; [LLVM](03-back-end.ipynb)'s language; then **PTX** and machine code for NVIDIA, or AMD's assembly. Each instruction says which line it comes from. So pick a line of `mlp_tile` and a chip: the A100 (`sm_80`), the H100 (`sm_90`), the B200 (`sm_100`), or AMD's MI300 (`gfx942`). Below stands what the line became at each level, with the number of each instruction. (All of it was compiled without a GPU.)

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
CHIPS = ["sm_80", "sm_90", "sm_100", "gfx942"]
source = inspect.getsource(kernels.mlp_tile.fn).splitlines()
start = next(n for n, text in enumerate(source) if text.startswith("def "))
PARTS = {  # name → what its lines begin with, and how they are shown
    "load": ("x = tl.load", "x = tl.load(x_ptr + …, mask=…)"),
    "dot": ("acc = tl.dot", "acc = tl.dot(x, w, acc)"),
    "GELU": (("u = ", "e = tl.exp", "y = y *"), "y = y · sigmoid(2u)"),
    "store": ("tl.store", "tl.store(y_ptr + …, y, mask=…)"),
}
PLAIN = re.compile(  # addresses, masks, indices
    r"arith\.(\w*i|constant|select)$|ttg\.memdesc_index"
    r"|tt\.(splat|broadcast|expand_dims|make_range|addptr)"
)


def lit(part: str, chip: str) -> dict[str, str]:
    """Level → what the lines of this part became there."""
    lines = stored.of(Job("mlp_tile", chip, warps=8))["lines"]
    counts: dict[str, dict[str, int]] = {"ttir": {}, "ttgir": {}, "assembly": {}}
    for number, text in enumerate(source):
        if text.strip().startswith(PARTS[part][0]):
            for level, words in lines.get(str(number - start), {}).items():
                for name, n in words.items():
                    counts[level][name] = counts[level].get(name, 0) + n
    found = {}
    for level, words in counts.items():
        chosen, other = [], 0
        for name, n in words.items():
            plain = PLAIN.match(name)
            if level == "assembly":
                plain = reading.kind_of(name) in ("addresses and moves", "control")
            if plain:
                other += n
            else:
                short = name.replace(".sync.aligned", "").replace(".row.col", "")
                short = short if len(short) <= 38 else f"{short[:37]}…"
                chosen.append(f"{n:3} {short}")
        if other:
            chosen = [*chosen[:4], f"{other:3} moves, addresses, masks"]
        found[level] = chosen[:5]
    return found


def draw(part: str, chip: str):
    fig, ax = plt.subplots(figsize=(4.8, 4.5))
    ax.set(xlim=(0, 1), ylim=(22.5, -0.8))
    ax.axis("off")
    mono = {"family": "monospace", "fontsize": 9.5, "va": "center_baseline"}
    for place, (name, (_, shown)) in enumerate(PARTS.items()):
        on = name == part
        if on:
            ax.barh(place, 1, 0.95, color=palette.orange)
        ax.text(0.02, place, shown, color="black" if on else palette.gray, **mono)
    place = 4.6
    last = "PTX" if chip.startswith("sm") else "AMD's assembly"
    for level, words in lit(part, chip).items():
        title = {"ttir": "TTIR", "ttgir": "TTGIR", "assembly": f"{last}, {chip}"}
        ax.text(0.02, place, title[level], fontsize=9.5, va="center_baseline")
        ax.barh(
            place + (len(words) + 1) / 2,
            0.012,
            max(len(words), 1),
            left=0,
            color=palette.orange,
        )
        for n, words_shown in enumerate(words):
            ax.text(0.03, place + n + 1, words_shown, **mono)
        place += 6
    return fig


def told(part: str, chip: str) -> str:
    levels = [
        f"{level}: {', '.join(' '.join(w.split()) for w in words)}"
        for level, words in lit(part, chip).items()
    ]
    return f"{PARTS[part][1]} on {chip}. {'. '.join(levels)}"


explore(
    draw,
    alt=told,
    title="What a line of the kernel becomes",
    challenge="Find the chip whose tl.dot is fewest instructions in the text.",
    missing=lambda part, chip: (
        "" if (part, chip) == ("dot", "sm_90") else "another line, or another chip."
    ),
    start={"part": "load", "chip": "sm_80"},
    part=list(PARTS),
    chip=CHIPS,
)

# %% [markdown]
# On NVIDIA's chips loads became copies that run in the background, two blocks ahead of the product (`cp.async`: the compiler's pipeline). GELU's division is one instruction of PTX per number, an approximate one. The store goes through shared memory (a processor's own fast memory, which all threads of a tile see), so that neighbouring threads write neighbouring numbers.
#
# ## The experiment
#
# **What one `tl.dot` becomes.** `share` is how much of the 64 × 64 × 64 products one instruction does, with its $m \times n \times k$; `threads` start it together. The kernel `one_dot` is compiled now for two chips, and compared with what was stored; the other rows are read from the store (`scripts/triton_sweep.py --check` makes them again).

# %%
jobs = [Job("one_dot", chip) for chip in ("sm_80", "sm_90")]
try:
    made = compile_jobs(jobs)
except RuntimeError as problem:
    print(f"not compiled here ({problem}): the stored facts are shown")
    made = []
for compiled in made:
    fresh = reading.facts(compiled)
    same = all(fresh[name] == stored.of(compiled.job)[name] for name in fresh)
    print(f"{compiled.job.target} compiled now: {'as' if same else 'NOT as'} stored")

print(f"\n{'':8} {'':3}   {'instruction':18} {'m':>4} {'n':>3} {'k':>3} threads  share")
for chip in ("sm_75", *CHIPS):
    facts = stored.of(Job("one_dot", chip))
    if not facts["products"]:
        print(f"{chip:8}       none: multiply and add, thread by thread")
    for name, found in facts["products"].items():
        m, n, k = found["shape"]
        threads = found["threads"]
        short = re.sub(r"\.sync.*|\.cta.*|_f32.*", "", name)
        issues = found["count"]
        print(
            f"{chip:8} {issues:3} × {short:18} {m:4} {n:3} {k:3} {threads:7}"
            f" {m * n * k / 64**3:6.1%}"
        )

# %% tags=["hide-output"]
[found] = stored.of(jobs[1])["products"].values()
dot_guess.settle(found["count"], digits=1)
beyond_guess.settle("what happens to lie there")

# %% [markdown]
# The same line. On the A100 each of four warps does a quarter (32 × 0.8%), in small blocks out of its registers; on the H100 all four together start one large product that reads shared memory itself (4 × 25%); on the B200 (`sm_100`) a single thread starts it, and the result is not in registers at all but in a tensor memory; on the MI300 (`gfx942`) a wave of 64 threads (AMD's warp) works on 32 × 32. The T4 (`sm_75`) has tensor cores,
# and Triton 3.7.1 does not use them. Now count the instructions in the text of the whole kernel (registers are those of one thread), and see what another number type does:

# %% tags=["hide-input"]
print(f"{'mlp_tile 128 × 128 × 64':26}", *(f"{chip:>7}" for chip in CHIPS))
all_facts = [stored.of(Job("mlp_tile", chip, warps=8)) for chip in CHIPS]
for kind in ("tensor core", "background copy", "load", "shared memory", "wait"):
    counts = [facts["kinds"].get(kind, 0) for facts in all_facts]
    print(f"{kind:26}", *(f"{n:7}" for n in counts))
for name, unit in (("registers", 1), ("shared", 1024), ("tensor", 1)):
    shown = {"shared": "shared memory, KB", "tensor": "tensor memory, columns"}
    values = [facts[name] // unit for facts in all_facts]
    print(f"{shown.get(name, name):26}", *(f"{n:7}" for n in values))

for kernel in ("mlp_tile", "dots_by_descriptor"):
    kinds = stored.of(Job(kernel, "sm_90", warps=8))["kinds"]
    copies = [kinds.get(name, 0) for name in ("background copy", "copy engine")]
    print(f"{kernel} on sm_90: {copies[0]} cp.async, {copies[1]} by the copy engine")
for dtype in ("bf16", "fp32", "fp8e4nv"):
    cells = []
    for chip in CHIPS:
        facts = stored.of(Job("one_dot", chip, dtype))
        [name] = facts.get("products", ["refused"])
        multiplied = r"refused|tf32|xf32|bf16|e4m3|f8f6f4|f16"
        cells.append(re.search(multiplied, name.replace("f32.", ""))[0])
    print(f"{f'tl.dot of {dtype} multiplies':26}", *(f"{cell:>7}" for cell in cells))

# %% [markdown]
# Nobody asked for less precision, and fp32 becomes TF32 with 10 bits after the point (XF32 on AMD's). (On the B200 the instruction `kind::f16` takes both 16-bit types.) `input_precision="ieee"` forbids it; our kernels say so. And fp8 of this kind (`fp8e4nv`, which is E4M3) is refused for the A100, and silently widened to 16 bits on the MI300, whose own fp8 has another bias of the exponent. Newer chips also have an engine that copies: given a tensor's shape (`tl.make_tensor_descriptor`) instead of a block of addresses, the H100's kernel has no `cp.async` left.
#
# ## Play
#
# Who holds what? A tile lies in the registers of its threads. A layout says where, and in Triton it is a matrix of bits ([Zhou et al. 2025](https://arxiv.org/abs/2505.23819 "zhou2025linear")). Write the numbers of register, lane and warp in binary; each bit that is 1 moves the element by its step, and steps are added without carry. The cell prints the steps for the result of `mma.sync`, with the layout as TTGIR has it. Take register 3 of lane 10, warp 0: 3 is 11 in binary, so $(0, 1)$ and $(8, 0)$; 10 is 1010, so $(0, 4)$ and $(2, 0)$. Together that is element (10, 5). In the figure each number is the lane that holds the element, pale in other warps; orange is the chosen element, blue what else its thread holds.

# %%
facts = stored.of(jobs[0])
printed = {parse(text): text for text in facts["layouts"].values() if parse(text)}
mma = next(layout for layout in printed if isinstance(layout, TensorCore))
print(printed[mma])
whole = linear(mma, (64, 64))
for part in ("register", "lane", "warp"):
    print(f"{part:8} bits move by (row, col):", *getattr(whole, part))
print("element (10, 5) is in (register, lane, warp):", *whole.owners((10, 5)))

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
loads = next(layout for layout in printed if isinstance(layout, Blocked))
LAYOUTS = {"loaded": linear(loads, (64, 64)), "mma's result": whole}
ELEMENTS = [0, 1, 18, 27, 64, 91, 93, 127]
OWNERS = {}  # of the corner of 16 × 8
for name, each in LAYOUTS.items():
    sizes = (1 << len(bases) for bases in (each.register, each.lane, each.warp))
    places = (
        (each.element(*place), place) for place in itertools.product(*map(range, sizes))
    )
    OWNERS[name] = {e: place for e, place in places if e[0] < 16 and e[1] < 8}


def draw(element: int, layout: str):
    chosen = divmod(element, 8)
    register, lane, warp = OWNERS[layout][chosen]
    fig, ax = plt.subplots(figsize=(4.8, 4.2))
    ax.set(xlim=(0, 8), ylim=(16, 0), xticks=range(0, 9, 2), yticks=range(0, 17, 4))
    small = {"ha": "center", "va": "center_baseline", "fontsize": 9}
    for (r, c), (_, its_lane, its_warp) in OWNERS[layout].items():
        ink = palette.gray if its_warp == warp else "#cccccc"
        if (its_lane, its_warp) == (lane, warp):
            ink = "black"
            color = palette.orange if (r, c) == chosen else palette.sky
            ax.barh(r + 0.5, 1, 1, left=c, color=color, edgecolor="white")
        ax.text(c + 0.5, r + 0.5, its_lane, color=ink, **small)
    where = f"element {chosen}: register {register}, lane {lane}, warp {warp}"
    ax.set_title(where, fontsize=10)
    return fig


def told(element: int, layout: str) -> str:
    place = divmod(element, 8)
    register, lane, warp = OWNERS[layout][place]
    also = [e for e, o in OWNERS[layout].items() if o[1:] == (lane, warp)]
    return (
        f"{layout}: element {place} is in register {register} of lane {lane}, warp"
        f" {warp}. The same thread holds {also} of this corner"
    )


def missing(element: int, layout: str) -> str:
    found = OWNERS[layout][divmod(element, 8)]
    if layout == "mma's result" and found == (3, 13, 0):
        return ""
    return f"this is register {found[0]} of lane {found[1]}, warp {found[2]}."


explore(
    draw,
    alt=told,
    title="A corner of the tile, with the lane that holds each number",
    challenge="Find what lies in register 3 of lane 13, warp 0, in mma's result.",
    missing=missing,
    trace=False,
    start={"element": 18, "layout": "loaded"},
    element=ELEMENTS,
    layout=list(LAYOUTS),
)

# %% [markdown]
# Loads want eight numbers side by side for one thread; the tensor core wants pairs, eight rows apart. Between the two, `ttg.convert_layout` goes through shared memory. The compiler multiplies one matrix by the inverse of the other to see which threads must exchange what. Our steps equal Triton's own for every blocked and tensor-core layout that we tried.
#
# ## Which tile?
#
# Nobody knows beforehand, so candidates are tried: `@triton.autotune`. Most need not be. The compiled kernel says what it needs: a tile with too many registers **spills**, that is, keeps some in memory, one much larger than the problem is mostly masked off, and a processor holds few tiles that need much (in brackets: what runs out first). A model ranks what is left. As many tiles as the whole chip holds at a time are a wave, and a wave takes as long as its products, its bytes or its loads, whichever is longest. But a model has no clock, and the bench decides. Without a GPU we give Triton's autotuner a bench that only counts, to see what its cache goes by. `key` names the arguments that, when they change, start a new search.

# %% tags=["hide-input"]
for gpu in (tuning.A100, tuning.H100):
    for problem in (tuning.Problem(4096, 4096, 4096), tuning.Problem(16, 4096, 4096)):
        every = stored.candidates(gpu.target)
        why = [tuning.refusal(each, gpu, problem) for each in every]
        left = [each for each, words in zip(every, why, strict=True) if not words]
        best = min(left, key=lambda each: tuning.seconds(each, gpu, problem))
        sizes = best["constants"]
        spills = sum("went to memory" in words for words in why)
        held, limit = tuning.occupancy(best, gpu)
        print(
            f"{gpu.name}, {problem.T:4} rows: {len(every)} tiles, {spills} spill,"
            f" {len(left):2} worth a try; {sizes['ROWS']:3} × {sizes['COLS']:3} first,"
            f" {held} at a time ({limit})"
        )

# %%
benched = []
tuned = triton.autotune(
    [
        triton.Config({"ROWS": r, "COLS": c, "DEPTH": 32, "GROUP": 8})
        for r, c in ((16, 16), (32, 32), (64, 32))
    ],
    key=["T", "f"],
    do_bench=lambda call, quantiles: benched.append(call) or [1.0] * 3,
)(kernels.mlp_tile)


def tiles(sizes):
    return (triton.cdiv(T, sizes["ROWS"]) * triton.cdiv(f, sizes["COLS"]),)


for T, d, f, dtype in (
    (20, 16, 40, torch.float32),
    (20, 16, 40, torch.float32),
    (21, 16, 40, torch.float32),
    (20, 16, 40, torch.float16),
    (20, 64, 40, torch.float32),
):
    x, w, b = (t.to(dtype) for t in program.example_inputs("mlp", T=T, d=d, f=f))
    before = len(benched)
    tuned[tiles](x, w, b, x.new_empty(T, f), T, f, d, WIDE=True)
    print(f"T {T}, d {d}, f {f}, {dtype}: {len(benched) - before} benched")

# %% [markdown]
# A new T or a new type is a new search, even one row more; a new d is none, for `key` does not name it, and the tile of another depth is used. So whoever serves requests of all lengths had better round T up to a few sizes.
#
# ## At scale
#
# On a machine with a GPU, one script runs all of this for real, and more: every kernel against PyTorch with real bf16, the search with its log, the assembly that the device gets beside the table above.
#
# ```bash
# python scripts/gpu_check.py --out gpu.json
# TRITON_PRINT_AUTOTUNING=1 python train.py      # each search of your own model
# TRITON_KERNEL_DUMP=1 python train.py           # TTIR, TTGIR, PTX of each kernel
# ```
#
# Linear layouts made Triton's kernels 1.07 times as fast on average, over 265 benchmarks, and at best 1.40 times ([Zhou et al. 2025](https://arxiv.org/abs/2505.23819 "zhou2025linear")). The first Triton reached the speed of hand-written libraries on products
# ([Tillet et al. 2019](https://www.eecs.harvard.edu/~htk/publication/2019-mapl-tillet-kung-cox.pdf "tillet2019triton")).
#
# ## What to keep
#
# ```python
# row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
# col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
# there = (row < T) & (col < d)
# x = tl.load(x_ptr + row * stride + col, mask=there, other=0.0)
# tl.store(y_ptr + row * d + col, function(x), mask=there)
# ```
#
# **Use it** where several operations on one block follow each other and no library has them in one: what comes after a product, attention with a mask of its own, your own quantised format. **Not** for a plain product, where the vendor's library is hard to beat, nor where `torch.compile` writes the same kernel for you.
#
# <details><summary>Why may two programs not add to the same number?</summary>
#
# They run in no order, so one would overwrite what the other has stored. Each result has one program; or `tl.atomic_add`, whose order, and so whose rounding, changes from run to run.
#
# </details>
#
# <details><summary>What does <code>other</code> decide?</summary>
#
# What stands in the block where nothing was loaded: 0 for a sum or a product, −∞ for a maximum or a softmax. Without it the value is undefined.
#
# </details>
#
# <details><summary>The PTX of a kernel has four products on sm_90 and 32 on sm_80. Is it eight times as fast?</summary>
#
# No: each does eight times as much, for four warps together. Count the product of shape and number; speed is the chip's.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/08-compilers/06-triton.ipynb). The softmax in pieces is in [FlashAttention](../07-inference/02-flash-attention.ipynb).
#
# **Further reading.** [Tillet et al. 2019](https://www.eecs.harvard.edu/~htk/publication/2019-mapl-tillet-kung-cox.pdf "tillet2019triton") for the language; [Zhou et al. 2025](https://arxiv.org/abs/2505.23819 "zhou2025linear") for layouts.
