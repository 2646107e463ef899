# %% [markdown]
# # Back end
#
# A product of two matrices is three loops and one line. Compiled as it is written, it can take a hundred times as long as the library's, which does the very same multiplications. What differs is their order. Here the order becomes data, a **schedule**; you
# learn which orders are allowed, and make a compiler write a product that keeps up with the BLAS, the library behind `torch.mm`. At the end you own the test that says whether two loops may change places.

# %% tags=["hide-input"]
import csv
import json
import statistics
import textwrap
import time
from pathlib import Path

import torch

from llmlab.checks.compilers.back_end import check
from llmlab.compilers import back_end
from llmlab.compilers.back_end import (
    cost,
    interpret,
    machine,
    programs,
    run,
    schedule,
    to_c,
    to_llvm,
)
from llmlab.compilers.front_end import capture, optimise
from llmlab.compilers.program import attention_row, example_inputs, mlp
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

threads = torch.get_num_threads()
torch.set_num_threads(1)

# %% [markdown]
# ## What it costs
#
# The program is a loop nest: arrays, loops, statements. LLVM compiles it (`llvmlite` brings LLVM, so that no C compiler is needed). One thread, 256 × 256, beside `torch.mm`:


# %% tags=["nbval-ignore-output"]
def thread_seconds(*calls, rounds=5):
    """CPU seconds of the fastest call of each, called in turn."""
    return run.seconds_of(*calls, rounds=rounds, clock=time.thread_time)


product = programs.matmul(256, 256, 256)
print(product)
naive = run.compiled(product, "llvm")
a, b = interpret.random_inputs(product)
compare(naive(a, b), a @ b, "naive loops and torch.mm", tol=1e-4)
slow, library = thread_seconds(lambda: naive(a, b), lambda: torch.mm(a, b))
print(f"{slow / library:.0f} times as long, for the same {256**3:,} products")

# %% [markdown]
# ## Predict
#
# A schedule may reorder loops, cut them into tiles, use the lanes of vector registers, keep results in registers, and copy what lies badly in memory. It changes no product and no sum, only their order. How much can that be worth? And where does it stop being allowed?

# %%
gain_guess = predict("How many times as fast by schedule alone?", unit="times")
swap_guess = predict(
    "c[i, j] = c[i − 1, j + 1] / 2 in loops over i and j. Which order is allowed?",
    choices=("i outside", "j outside", "both"),
)

# %% [markdown]
# ## By hand
#
# $C = AB$ with matrices of 4 × 4. Written naively, each of the 64 products reads a number of $A$ and one of $B$, and 16 results are written: $64 + 64 + 16 = 144$ numbers move.
#
# Now a **block** of 2 × 2 results stays in registers while $k$ runs. For each $k$ it reads two numbers of $A$ and two of $B$, and does four products with them. There are four blocks: $4 \cdot 4 \cdot (2 + 2) + 16 = 80$. For $A$ of $n \times k$ and $B$ of $k \times m$, in blocks of $r \times c$ (at the end of the matrix they are smaller, but all rows are read just as often):
#
# $$Q = n k \left\lceil \frac{m}{c} \right\rceil + k m \left\lceil \frac{n}{r} \right\rceil + n m$$

# %%
for r, c in ((1, 1), (2, 2), (4, 4), (3, 2)):
    numbers = cost.product_traffic(4, 4, 4, r, c) // 4
    print(f"blocks of {r} × {c}: {numbers} numbers move")

# %% [markdown]
# ## The idea
#
# The algorithm says *what* is computed, the schedule *when and where*: Halide's idea ([Ragan-Kelley et al. 2013](https://doi.org/10.1145/2491956.2462176 "ragankelley2013halide")). Ours is a list of steps. Each rewrites loops into loops, so that the program can be read after each.
#
# | step | what becomes of the program |
# |---|---|
# | `("tile", loop, size)` | `loop` becomes `loop_o`, over tiles, around `loop_i`, of `size` iterations |
# | `("reorder", loop, …)` | loops directly inside each other stand in this order |
# | `("unroll", loop)`, `("vectorise", loop)`, `("parallel", loop)` | its iterations are written out, are lanes of a register, or are shared among threads |
# | `("pack", array, loop)` | what an iteration of `loop` reads of the array is copied side by side before |
# | `("cache", array, loop)` | what an iteration of `loop` computes of the array stays in registers until its end |
#
# The seven steps here are `tile j` by 16, `tile i` by 4, `reorder`, `pack B` before `j_o`, `cache C` in `i_o`, `unroll i_i` and `vectorise j_i`. Lines of one colour are the same statement or loop before and after; `with b` marks the loop that has the copy b.

# %% tags=["hide-input"]
SMALL = [
    ("tile", "j", 16),
    ("tile", "i", 4),
    ("reorder", "j_o", "i_o", "k", "i_i", "j_i"),
    ("pack", "B", "j_o"),
    ("cache", "C", "i_o"),
    ("unroll", "i_i"),
    ("vectorise", "j_i"),
]
small = programs.matmul(64, 64, 64)
after = back_end.apply(small, SMALL)


def color_of(line):
    """By the loop that a line came from, or what its statement does."""
    words = line.split()
    if words[0] != "for":
        return palette.vermillion if "+=" in words else palette.gray
    colors = {"i": palette.blue, "j": palette.green, "k": palette.orange}
    return colors.get(words[1][0], palette.gray)


def listing(ax, program, title):
    """A program, its loops and statements in colours."""
    lines = str(program).splitlines()
    for place, line in enumerate(lines):
        short = line.replace("C_i_o", "c").replace("B_j_o", "b")
        style = {"family": "monospace", "fontsize": 6.8, "color": color_of(line)}
        ax.text(0, -place, short, **style)
    ax.set(xlim=(0, 1), ylim=(-23, 1))
    ax.set_title(title, fontsize=9)
    ax.axis("off")


fig, (top, bottom) = plt.subplots(
    2, 1, figsize=(4.8, 4.8), gridspec_kw={"height_ratios": (1, 2.7)}
)
listing(top, small, "the product")
listing(bottom, after, "after seven steps")
top.set_ylim(-6, 1)
bottom.set_ylim(-18, 1)
figure(
    fig,
    alt=(
        "The product as a program of two nests, and after seven steps: tiles of 4 rows"
        " and 16 columns, B copied to a panel b, a block c that is read, added to while"
        " k runs, and written back. The statement with += is still one line."
    ),
)

# %% [markdown]
# Read the second program from the outside in. A panel of sixteen columns of B is copied side by side, once, and used by all rows. For each four rows, a block of C is loaded; $k$ runs; the block is stored. Inside, four rows are written out and sixteen columns are lanes of registers. Nothing else is special about a fast product.
#
# Which steps are allowed? Iteration $i$ writes $a$, iteration $i'$ reads it: a **dependence**, with the distance $d = i' - i$, one number per loop. The reader must still come later:
#
# $$d_{\text{reordered}} \ge 0 \quad \text{(lexicographically)}$$
#
# For indices that are sums of loop variables times whole numbers, this is a question about equations in whole numbers, and our `dependence` answers it without running anything; where it cannot exclude a conflict, it says that there is one. Sums count as sums of real numbers: their order may change, as in any BLAS. Lanes and threads ask more: no two
# iterations may touch one element at all. So a sum over $k$ is not allowed in lanes, unless each lane has a sum of its own (`partial_sums`).
#
# Take $c_{i,j} = c_{i-1,j+1} / 2$. What iteration $(i, j)$ reads was written one row before and one column later, at $(i-1, j+1)$: the distance is $(1, -1)$. With $i$ outside it begins with 1, and all is well. With $j$ outside it is $(-1, 1)$: the reader would come first.
#
# ## Your turn
#
# Distances are tuples, the outermost loop first; `order[0]` is the old number of the loop that becomes the outermost.


# %%
def my_legal(distances, order):
    """Whether each distance, in the new order, still points forward."""
    raise NotImplementedError("five lines of yours")


your_turn(check.legal, my_legal)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(distances, order):
    for distance in distances:
        moved = tuple(distance[loop] for loop in order)
        if moved < (0,) * len(moved):
            return False
    return True


your_turn(check.legal, one_answer)

# %% [markdown]
# ## The code
#
# What is refused is refused by name, before any code is written:

# %%
for step in (("vectorise", "k"), ("reorder", "i", "k"), ("cache", "A", "zi")):
    try:
        back_end.apply(small, [step])
    except back_end.NotLegal as refusal:
        print(textwrap.fill(str(refusal), 86, subsequent_indent="  "))

# %% tags=["hide-cell"]
show(schedule.tile, schedule.reorder, schedule.vectorise, machine.best_schedule)

# %% [markdown]
# Code generation is one walk through the loops. It writes C, with the vector types of gcc and clang, or LLVM's language. Where a tile does not divide, the outer loop is written twice, for whole tiles and for the rest; then every count is a number, and a block becomes variables, which compilers keep in registers. Of 100 × 100, in blocks of 6 × 16:

# %%
odd = back_end.apply(
    programs.matmul(100, 100, 100), machine.best_schedule(machine.AVX2)
)
text = to_c.loops_of(to_c.to_c(odd))
begin = text.index("for (long k = 0")
for line in text[begin:].splitlines()[:4]:
    print(line.strip()[:86])
heads = [line for line in text.splitlines() if "for (long" in line]
print(f"… {len(heads)} loops; over i: {sum('i_o = 0' in h for h in heads)}")
for each in (machine.SSE, machine.AVX2, machine.AVX512):
    rows, columns = each.block
    print(f"{each.name:8} {each.registers} registers: blocks of {rows} × {columns}")

# %% [markdown]
# `interpret` runs the loops in Python with every index checked: it is what a program means. Tests compare random schedules with it, and run the generated C under the address sanitiser. Where there is no C compiler, or one that hangs or fails, it says so in a sentence, and LLVM takes its place.
#
# Times depend on the machine; `cost` counts instead, bytes between a small cache and memory, and cycles of a simple core. The challenge of this part is judged by it.
#
# ## Against the libraries
#
# The part's two functions, from the front end's graph to loops to machine code; and the product with 4-bit weights of part 06, whose codes lie two in a byte. There, each code becomes a float before it is multiplied. Here, each group of $x$ is rounded to whole numbers of 16 bits, with a step of its own, as the weights are: then codes stay whole numbers, and `Dot` multiplies two of them by two of $x$ and adds both up, in each lane at once. That is
# one instruction of x86, `vpmaddwd`. Nothing of the products is ever written. There is no GPU here, yet LLVM writes assembly for one: the same loops, with an outer one given to threads.


# %%
def lowered(function, name, **sizes):
    inputs = example_inputs(name, **sizes)
    return programs.from_graph(optimise(capture(function, *inputs)), name), inputs


block, mlp_inputs = lowered(mlp, "mlp", T=50, d=64, f=100)
steps = {"mlp": machine.mlp_schedule(block), "row": machine.attention_schedule()}
fused = run.compiled(back_end.apply(block, steps["mlp"]), "llvm")
compare(fused(*mlp_inputs), mlp(*mlp_inputs), "GELU(x w + b), fused", tol=1e-5)
row, row_inputs = lowered(attention_row, "attention_row", T=300, d=64)
one_row = run.compiled(back_end.apply(row, steps["row"]), "llvm")
compare(one_row(*row_inputs), attention_row(*row_inputs), "attention row", tol=1e-6)
print(len(block.body), "nests become", len(fused.program.body), "for the mlp")

torch.manual_seed(0)
codes = torch.randint(0, 16, (8, 2, 2, 32))  # rows, groups, halves of a group
packed = (codes[:, :, 0] | codes[:, :, 1] << 4).to(torch.uint8)
scale, x = torch.rand(8, 2), torch.randn(128)
matvec = back_end.apply(programs.matvec_4bit(8, 128, 64), machine.matvec_schedule(64))
words = programs.words(packed).view(2, 4, 2, 8)
four_bits = run.compiled(matvec, "llvm")(words, scale.view(2, 4, 2), x)
wanted = (scale[:, :, None] * (codes.flatten(2) - 8)).flatten(1) @ x
compare(four_bits.flatten(), wanted, "4-bit weights, x in 16 bits", tol=5e-3)

on_gpu = back_end.apply(small, [*SMALL[:3], ("cache", "C", "i_o"), ("unroll", "i_i")])
on_gpu = back_end.apply(on_gpu, [("unroll", "j_i"), ("parallel", "j_o")])
for gpu, cpu, word in (("nvptx", "sm_80", "fma.rn"), ("amdgcn", "gfx942", "v_fma")):
    lines = to_llvm.assembly(on_gpu, gpu, cpu).splitlines()
    found = [line for line in lines if word in line]
    print(f"{cpu}: {len(found)} of", found[0].split()[0])

# %% [markdown]
# torch.compile does both ends for real. Dynamo reads Python's bytecode, keeps **guards** on what it took for granted, and where it cannot go on makes a **graph break**; Inductor fuses what is elementwise and writes C++ for it. This is what it wrote for `mlp` (stored, torch 2.13): the GELU is one loop with lanes, in place. Product and bias are not in it: they remain one call of the library.

# %% tags=["hide-input"]
DATA = Path(back_end.__file__).parents[1] / "data"
kernel_text = (DATA / "inductor_mlp.cpp").read_text()
lines = kernel_text[kernel_text.index("for(") :].splitlines()
for line in lines[:1] + lines[5:7] + lines[8:16]:
    print(line.replace("static_cast<int64_t>", "").strip()[:86])
print(
    f"… of {len(kernel_text.splitlines())} lines; products: {kernel_text.count('mm(')}"
)
broken = json.loads((DATA / "dynamo.json").read_text())
print("\nwith a print in the middle:", broken["graphs"], "graphs,", end=" ")
print(broken["breaks"], "break; guards on", ", ".join(broken["guards"][:2]), "…")

# %% [markdown]
# ## The experiment
#
# A product of 512 × 512 on one thread, with one idea more at each step. Three runs each, stored by `scripts/back_end_sweep.py`; bars are their medians, and the dashed line is `torch.mm` in the same runs. Below, the tuner: it draws schedules, breeds the fastest, or asks a model that it fitted on what was measured; every run is a line in a log, from which a stopped search goes on.

# %% tags=["hide-input"]
with (DATA / "back_end.csv").open(newline="") as stored:
    table = list(csv.DictReader(stored))
LADDER = [*machine.ladder()]
STRATEGIES = {
    "random": palette.gray,
    "evolution": palette.green,
    "model": palette.vermillion,
}


def stored_runs(task, name, target):
    """Lines of the table."""
    key = (task, name, target)
    return [row for row in table if (row["task"], row["name"], row["target"]) == key]


def rate(rows, column="seconds"):
    """The median, in GFLOP/s."""
    return 2 * 512**3 / statistics.median(float(row[column]) for row in rows) / 1e9


all_runs = [row for row in table if row["task"] == "ladder"]
library_rate = rate(all_runs, "torch_mm")
fig, (ax, tuned) = plt.subplots(2, 1, figsize=(4.8, 5.4))
for target, shift, color in (("llvm", -0.2, palette.blue), ("c", 0.2, palette.orange)):
    heights = [rate(stored_runs("ladder", name, target)) for name in LADDER]
    places = [place + shift for place in range(len(LADDER))]
    label = {"llvm": "LLVM 22", "c": "gcc 12"}[target]
    ax.bar(places, heights, 0.38, color=color, label=label)
    for place, height in zip(places, heights, strict=True):
        ax.text(place, height + 2, f"{height:.0f}", ha="center", fontsize=7)
ax.axhline(library_rate, ls="--", color=palette.gray, label="torch.mm")
ax.set_xticks(range(len(LADDER)), [n.replace(" ", "\n") for n in LADDER], fontsize=8)
ax.set(ylabel="GFLOP/s", ylim=(0, 145))
ax.set_title(table[0]["machine"], fontsize=9)
ax.legend(fontsize=8, ncols=3, loc="upper left")
for strategy, color in STRATEGIES.items():
    for seed in ("1", "2", "3"):
        rows = [row for row in table if row["task"] == "tuner" and row["run"] == seed]
        rows = [row for row in rows if row["name"].startswith(strategy)]
        runs = [int(row["name"].split()[1]) for row in rows]
        best = [1e6 * float(row["seconds"]) for row in rows]
        label = strategy if seed == "1" else None
        tuned.plot(runs, best, "o-", ms=3, color=color, label=label)
tuned.set(xlabel="schedules that were run", ylabel="best so far, µs")
tuned.set_title("the tuner, 256 × 256, three seeds each", fontsize=9)
tuned.legend(fontsize=8)
figure(
    fig,
    alt=(
        "Bars of GFLOP/s for six schedules. With LLVM the naive product reaches less"
        " than 1, the reordered one about 45, the register block about 100, as torch.mm"
        " does. gcc reaches 17 with the naive one. Below, the best time of three"
        " search strategies, by the number of schedules that were run: all are within a"
        " few hundredths of each other after twelve."
    ),
)

# %% tags=["nbval-ignore-output"]
ours = [rate(stored_runs("ladder", "pack", target)) for target in run.TARGETS]
first, second = (rate(stored_runs("ladder", n, "llvm")) for n in ("naive", "reorder"))
print(
    f"stored, 512 × 512: naive {library_rate / first:.0f} times as long as mm;", end=" "
)
print(f"reordered {second / first:.0f} times as fast as that,", end=" ")
print(f"packed {min(ours) / library_rate:.2f} to {max(ours) / library_rate:.2f} × mm")
for name in ("mlp", "attention_row"):
    for how in ("torch.compile", "c", "llvm"):
        rows = stored_runs("functions", name, how)
        gains = sorted(float(r["torch_mm"]) / float(r["seconds"]) for r in rows)
        print(f"{name:13} {how:13} {gains[0]:.1f} to {gains[-1]:.1f} × eager PyTorch")

scheduled = run.compiled(back_end.apply(product, machine.best_schedule()), "llvm")
compare(scheduled(a, b), a @ b, "scheduled product", tol=1e-4)
fast, library = thread_seconds(lambda: scheduled(a, b), lambda: torch.mm(a, b))
print(f"here, {machine.this().name}: {slow / fast:.0f} times the naive one,", end=" ")
print(f"{library / fast:.2f} × torch.mm")

print("stored, 4 bits, as a share of the speed at which a sum reads memory:")
for name, target in (("as floats", "c"), ("4 bits", "c"), ("4 bits", "llvm")):
    rows = stored_runs("codes", name, target)
    shares = sorted(float(row["torch_mm"]) / float(row["seconds"]) for row in rows)
    label = "as floats (part 06)" if name == "as floats" else "whole numbers"
    print(f"  {label:20} {target:5} {shares[0]:.0%} to {shares[-1]:.0%}")

large = programs.matvec_4bit(65536, 4096)  # more than most caches hold
matvec = run.compiled(back_end.apply(large, machine.matvec_schedule()), "llvm")
words, scale, x = interpret.random_inputs(large)
numbers = torch.ones((words.nbytes + scale.nbytes) // 4)  # as many bytes
four_bits, reading = thread_seconds(lambda: matvec(words, scale, x), numbers.sum)
print(f"here, 4 bits, {words.nbytes / 1e6:.0f} MB: {reading / four_bits:.0%}")
torch.set_num_threads(threads)

# %% tags=["hide-cell", "nbval-ignore-output"]
gain_guess.settle(slow / fast, digits=0)
swap_guess.settle("i outside")

# %% [markdown]
# Half of the way is one `reorder`: with $j$ innermost, neighbours in memory are neighbours in time, and the compiler finds lanes by itself. (gcc makes lanes of $j$ in the naive loops, too, with $k$ inside; LLVM does not.) The other half is the block in registers: one row of B that is loaded serves fourteen rows of C. Tiles for the cache, lanes by hand and packing change little at this size, where B
# fits a cache as it is. The three searches cannot be told apart: in so small a space, drawing finds what breeding finds.
#
# The 4-bit product has no reuse to gain: each code is read once, so memory sets its time, if unpacking keeps up with it. With floats it does not: each code needs a product of its own, and a conversion before. No schedule changes that; whole numbers do, for the same bytes. (On this processor LLVM goes one further than gcc: it finds `vpdpwssd`, which also adds to the sum.)
#
# In the fused `mlp`, the bias and the GELU are done while the block is in registers, and one write is all that is left. torch.compile gains nothing here: its product is the same call, eager PyTorch has one kernel for GELU already, and each call first checks its guards, for which a row of attention is too short. It gains where many small operations stand in a row, as
# in [the lesson before](02-front-end.ipynb).
#
# ## Play
#
# Choose the block of C that a processor with 16 registers of 8 lanes keeps. It needs rows × columns for C, a row of columns for B, and one register for a number of A. Too many, and the rest goes to memory in each step.

# %% tags=["hide-input", "slider"]
REGISTERS = 16


def used(rows, vectors):
    return rows * vectors + vectors + 1


def loads(rows, vectors):
    """Loads for each product of registers, with those that do not fit."""
    spilled = max(0, used(rows, vectors) - REGISTERS)
    return (rows + vectors + 2 * spilled) / (rows * vectors)


def draw(rows: int, vectors: int):
    fig, (left, right) = plt.subplots(1, 2, figsize=(4.8, 2.4))
    many = used(rows, vectors)
    left.bar(["C", "B", "A"], [rows * vectors, vectors, 1], color=palette.blue)
    left.set(title=f"{many} of {REGISTERS} registers", ylim=(0, 40))
    color = palette.green if many <= REGISTERS else palette.vermillion
    right.bar(["loads"], [loads(rows, vectors)], color=color)
    right.set(title="loads per product", ylim=(0, 2.2))
    for axis in (left, right):
        axis.title.set_fontsize(9)
    return fig


def told(rows: int, vectors: int) -> str:
    words = f"{rows} rows of {vectors} registers: {used(rows, vectors)} registers"
    return f"{words}, {loads(rows, vectors):.2f} loads per product"


def missing(rows: int, vectors: int) -> str:
    choices = [(r, v) for r in (1, 2, 4, 6, 8) for v in range(1, 5)]
    least = min(loads(r, v) for r, v in choices)
    if loads(rows, vectors) == least:
        return ""
    return f"{loads(rows, vectors):.2f} loads per product; {least:.2f} is possible"


explore(
    draw,
    alt=told,
    title="The block in registers",
    challenge="Find the block with the fewest loads for each product.",
    missing=missing,
    start={"rows": 1, "vectors": 1},
    rows=[1, 2, 4, 6, 8],
    vectors=list(range(1, 5)),
)

# %% [markdown]
# ## At scale
#
# The loop around the loops is Goto's: panels that fit the caches, packed, and a small block in registers ([Goto and van de Geijn 2008](https://doi.org/10.1145/1356052.1356053 "goto2008anatomy")). BLIS, written by hand in assembly, keeps 6 × 16 floats on a processor with AVX2 ([Van Zee and van de Geijn 2015](https://github.com/flame/blis/tree/master/kernels/haswell/3 "vanzee2015blis")). `Machine.block` counts registers, and comes to the same. (By loads alone, 4 × 24 would be a little better; it leaves no register free.)
#
# For your own model, on a GPU or a CPU, Inductor searches templates of products when asked to, and prints what it measured:
#
# ```bash
# # with model = torch.compile(model, mode="max-autotune") in it
# TORCH_LOGS="output_code,recompiles,graph_breaks" python train.py
# ```
#
# ## What to keep
#
# ```python
# program = from_graph(optimise(capture(function, *inputs)))
# steps = [("tile", "j", 32), ("reorder", "i", "k", "j_o", "j_i"), ("vectorise", "j_i")]
# kernel = compiled(apply(program, steps))
# ```
#
# **Use it** where an operation has no library, or stands beside one that has: epilogues, odd formats, reductions. **Not** to replace a BLAS that is there: you would reach it, on this shape and this machine.
#
# <details><summary>Why may a sum over k not become lanes as it stands?</summary>
#
# All lanes would add to one number at one time. Each needs a sum of its own; they are added up at the end.
#
# </details>
#
# <details><summary>The block is 14 × 32, and the matrix has 512 rows. What happens to the last 8?</summary>
#
# They are a block of their own, 8 × 32, for which the loop is written a second time.
#
# </details>
#
# <details><summary>A larger block needs fewer loads. Why not 20 × 32?</summary>
#
# There are 32 registers. What does not fit is stored and loaded in each step.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/08-compilers/03-back-end.ipynb), with the part's challenge.
#
# Further reading: [Chen et al. 2018](https://arxiv.org/abs/1802.04799 "chen2018tvm") for schedules and a tuner that learns what costs time.
