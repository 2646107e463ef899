# %% [markdown]
# # TVM
#
# A library holds one fast program per operation and processor. A tensor compiler holds one *formula* per operation, and makes the program from it: TVM takes a formula and a **schedule**, a list of changes to its loops, and no change may alter the result. Here you write both, in a small language of
# our own and in the real TVM, and compare them loop by loop. At the end a product by schedule alone runs as fast as PyTorch's, and the part's two functions go down from PyTorch to machine code.

# %% tags=["hide-input"]
import csv
import logging
import math
import re
import tempfile
import time
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from llmlab.checks.compilers.tvm import check
from llmlab.compilers import tvm as small
from llmlab.compilers.program import attention_row, example_inputs, mlp
from llmlab.compilers.tvm import (
    compute,
    fusion,
    graph,
    loops,
    lower,
    placeholder,
    reduce_axis,
    sum_over,
    tuner,
    with_tvm,
)
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

logging.getLogger("tvm").setLevel(logging.ERROR)
torch.set_num_threads(1)

N = 512
generator = np.random.default_rng(0)
a, b = generator.standard_normal((2, N, N), dtype=np.float32)
wanted = a @ b
MATMUL = with_tvm.prim_func(small.matmul(N, N, N))


def seconds(function, repeat=5):
    """The least of several runs, in time of this thread."""
    function()
    times = []
    for _ in range(repeat):
        started = time.thread_time()
        function()
        times.append(time.thread_time() - started)
    return min(times)


def product_time(schedule, repeat=5):
    """Seconds of a product under a schedule, and of torch.mm beside it."""
    import tvm

    main = with_tvm.compiled(with_tvm.scheduled(MATMUL, schedule))["main"]
    ours = [tvm.runtime.tensor(x) for x in (a, b, np.zeros_like(a))]
    theirs = [torch.from_numpy(x) for x in (a, b)]
    took = seconds(lambda: main(*ours), repeat)
    np.testing.assert_allclose(ours[-1].numpy(), wanted, rtol=1e-3, atol=1e-3)
    return took, seconds(lambda: torch.mm(*theirs), repeat)


# %% [markdown]
# ## What it costs
#
# The product of two matrices as a formula: $C_{ij} = \sum_k A_{ik} B_{kj}$. TVM makes three loops of it, $i$, $j$, $k$, and compiles them for the processor here, with all its optimisations. On one core, beside `torch.mm`:

# %% tags=["nbval-ignore-output"]
naive, torch_mm = product_time([], repeat=1)
flops = 2 * N**3
print(f"three loops {1e3 * naive:6.1f} ms: {flops / naive / 1e9:6.1f} Gflop/s")
print(f"torch.mm    {1e3 * torch_mm:6.1f} ms: {flops / torch_mm / 1e9:6.1f} Gflop/s")

# %% [markdown]
# ## Predict

# %%
speed_guess = predict("The best schedule below: its speed in % of torch.mm?", unit="%")
nests_guess = predict(
    "TVM fuses matmul, bias and GELU into one function. Loop nests in it?", unit="nests"
)

# %% [markdown]
# ## By hand
#
# Five sums of three neighbours, every second place: $C_i = \sum_{r<3} P_{2i+r}$ for $i < 5$, where $P_j = x_j^2$ for $j < 11$. Split $i$ into parts of 2:
#
# | | |
# |---|---|
# | $i = 2 i_0 + i_1$ | 5 iterations in parts of 2 are 3 × 2 = 6 |
# | **guard** | $2 i_0 + i_1 < 5$, or the sixth would leave $C$ |
# | **region** of $P$ for one $i_0$ | places $4i_0 + 2i_1 + r$, from $4i_0$ to $4i_0 + 2 + 2$: 5 of them |
#
# So $P$ may be computed five places at a time, where it is read, and never lies in memory as a whole. Each tile computes one place that its neighbour computes as well. In the program `ax0` runs over the piece, with a guard of its own: the last piece would leave $P$.

# %%
x = placeholder("x", (11,))
r = reduce_axis("r", 3)
P = compute("P", (11,), lambda j: x[j] * x[j])
C = compute("C", (5,), lambda i: sum_over(P[2 * i + r], r))
schedule = [("split", "C", "i", (None, 2)), ("compute_at", "P", "C", "i_0")]
print(lower(C, schedule=schedule))

# %% [markdown]
# ## The idea
#
# A formula says nothing of order. A schedule is a list of **primitives**; each takes a program to another that computes the same, or is refused. What must it look at?
#
# | primitive | asks |
# |---|---|
# | split, reorder | do the parts make up the loop? a guard, if they make more |
# | vectorize, parallel | do two iterations write to one place? then it is a sum, and refused |
# | compute_at, cache | which region is read? (interval arithmetic on indices) |
# | compute_inline | is it a plain formula, without a sum? |
#
# A read has the index $c_0 + \sum_l c_l\, l$ over loops $l$ of $n_l$ iterations. The loops inside the tile move, all others stand still; what stands still is $s = c_0 + \sum_{\text{standing}} c_l\, l$. The region goes from the smallest index to the largest:
#
# $$\begin{aligned} \text{first} &= s + \sum_{\text{moving}} \min(0, c_l (n_l - 1)) \\ \text{last} &= s + \sum_{\text{moving}} \max(0, c_l (n_l - 1)) \end{aligned}$$
#
# Before and after, for a product: lines of one axis have one colour.

# %% tags=["hide-input"]
COLORS = {"i": palette.blue, "j": palette.orange, "k": palette.green}


def listing(ax, text, title):
    """A program, its loops lit by the axis that they run along."""
    words = text.splitlines()
    for place, line in enumerate(words):
        name = line.split()[1] if line.strip().startswith("for ") else ""
        color = COLORS.get(name[:1], palette.gray)
        if name:
            ax.barh(-place, 0.02, 0.85, left=0, color=color)
        font = {"family": "monospace", "fontsize": 7.5}
        shown = line.replace("    ", " ")
        ax.text(0.04, -place, shown, va="center_baseline", **font)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set(xlim=(0, 1), ylim=(-len(words) + 0.4, 0.8))
    ax.axis("off")


tiny = small.matmul(8, 64, 8)
TILED = [
    ("split", "C", "i", (None, 4)),
    ("split", "C", "j", (None, 16)),
    ("reorder", "C", ("j_0", "i_0", "k", "i_1", "j_1")),
    ("unroll", "C", "i_1"),
    ("vectorize", "C", "j_1"),
]


def shortened(program):
    """The loops of a program, and the formula once."""
    kept = [line for line in str(program).splitlines() if "for " in line]
    return "\n".join([*kept, "    " * len(kept) + "C[i, j] += A[i, k] * B[k, j]"])


fig, axes = plt.subplots(2, 1, figsize=(3.6, 3.2), height_ratios=(4.4, 6.4))
listing(axes[0], shortened(lower(tiny)), "the formula, in the order of its axes")
listing(axes[1], shortened(lower(tiny, schedule=TILED)), "after five primitives")
figure(
    fig,
    alt=(
        "Two programs of loops. Above i, j and k. Below j_0, i_0, k, then i_1 unrolled"
        " and j_1 vectorized: both halves of i in one colour, both of j in another."
    ),
)

# %% [markdown]
# ## Your turn
#
# Bounds inference, for one dimension. `indices` are those of all reads; `moving` has the loops inside the tile and their extents. What stands still is the same in all reads. `index.part(names)` is the part of an index made of these loops; `interval(rest, moving)` gives its smallest and largest value, the constant included.


# %%
def my_region(indices, moving):
    """(where it begins: an Affine, how many places it has)."""
    raise NotImplementedError("seven lines of yours")


your_turn(check.region, my_region)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(indices, moving):
    spans = []
    for index in indices:
        standing = index.part(index.names - moving.keys())
        spans.append(small.interval(index - standing, moving))
    first = min(first for first, _ in spans)
    last = max(last for _, last in spans)
    return standing + first, last - first + 1


your_turn(check.region, one_answer)

# %% tags=["hide-cell"]
show(loops.split, loops.do_split, loops.region, loops.do_compute_at)

# %% [markdown]
# ## The code
#
# It is folded above. A primitive changes a `Stage`: its loops, and the value of each axis in terms of them. Nothing else is stored, so a split is one substitution: $i$ becomes $4 i_0 + i_1$ wherever it stands.
#
# | value | type | holds |
# |---|---|---|
# | `stage.loops` | list of `Loop` | name, extent, how it runs; outermost first |
# | `stage.index` | axis → `Affine` | `{"i": i_0 * 4 + i_1}` |
# | `stage.guards` | list of (`Affine`, int) | what must stay below what |
# | `stage.at` | (tensor, loop) | where it is computed, if not on its own |
#
# ## Against the real TVM
#
# The very same lists go to `tvm.s_tir.Schedule` (0.27; older texts write `te.create_schedule` or `tir.Schedule`). On random formulas and schedules TVM's loops, indices and guards are ours, and so are the numbers (the package's tests). Here is the one from above, then what is refused, and in whose words.
#
# The last of these TVM 0.27.0.post1 takes: to vectorize a loop inside which another tensor is computed. That tensor has room for one number, all lanes of the vector write to it, and **wrong numbers come out without a word**. Whoever lets a machine search for schedules must compare results, not only times.

# %%
real = with_tvm.scheduled(with_tvm.prim_func(C), schedule)
for name, (around, block) in with_tvm.realizations(real).items():
    words = [f"{loop.loop_var.name} < {int(loop.extent)}" for loop in around]
    print(f"TVM's {name}: {', '.join(words)}; index {block.iter_values[0]}", end="; ")
    print("guard", block.predicate)
numbers = np.arange(11, dtype=np.float32)
theirs = with_tvm.call(with_tvm.compiled(real), numbers, shape=(5,))
ours = loops.run(lower(C, schedule=schedule), {"x": numbers})["C"]
compare(torch.from_numpy(ours), torch.from_numpy(theirs), "ours and TVM's", tol=1e-6)

A = placeholder("A", (2, 8))
D = compute("D", (2, 8), lambda i, j: A[i, j] * 2.0)
E = compute("E", (2, 8), lambda i, j: D[i, j] + 1.0)
LANES = [("compute_at", "D", "E", "j"), ("vectorize", "E", "j")]
TRIES = {
    "a sum": (tiny, [("vectorize", "C", "k")]),
    "parts": (tiny, [("split", "C", "i", (2, 3))]),
    "lanes": (E, LANES),
}
for name, (tensor, steps) in TRIES.items():
    for tool, apply in (
        ("ours", lambda t, s: lower(t, schedule=s)),
        ("TVM", lambda t, s: with_tvm.scheduled(with_tvm.prim_func(t), s)),
    ):
        try:
            apply(tensor, steps)
            print(f"{name} {tool:5} taken")
        except loops.Refused as refusal:
            print(f"{name} {tool:5} {str(refusal)[:66]} …")
given = np.arange(16, dtype=np.float32).reshape(2, 8)
library = with_tvm.compiled(with_tvm.scheduled(with_tvm.prim_func(E), LANES))
print("right:", (given * 2 + 1)[0])
print("TVM's:", with_tvm.call(library, given, shape=(2, 8))[0])

# %% [markdown]
# ## The experiment: the same formula, seven schedules
#
# The schedule of the part's own back end (lesson 03), step by step in TVM's words. *rows*: k before j, so that rows are read in order. *vectors*: 16 numbers at once. *registers*: a block of 4 × 16 sums that stays in registers while k runs. *packed*: what the block reads of B, copied into panels, each in one piece. One core, 512 × 512 × 512.

# %% tags=["hide-input", "nbval-ignore-output"]
times = {"naive": (naive, torch_mm)}
for name, steps in list(small.STEPS.items())[1:]:
    times[name] = product_time(steps)
STEPS = {**small.STEPS, "14 × 32": small.registers(14, 32, packed=True)}
STEPS["16 × 32"] = small.registers(16, 32, packed=True)
for name in ("14 × 32", "16 × 32"):
    times[name] = product_time(STEPS[name])
fig, ax = plt.subplots(figsize=(3.9, 3.0))
speeds = [flops / took / 1e9 for took, _ in times.values()]
ax.barh([*times], speeds, color=palette.blue)
for place, (name, (took, _)) in enumerate(times.items()):
    said = f"{len(STEPS[name])} primitives, {1e3 * took:.1f} ms"
    inside = speeds[place] > 0.5 * max(speeds)
    at = 2 if inside else speeds[place] + 1
    color = {"color": "white"} if inside else {}
    ax.text(at, place, said, va="center", fontsize=8, **color)
line = flops / min(beside for _, beside in times.values()) / 1e9
ax.axvline(line, color=palette.vermillion, ls="--")
ax.text(line, -0.7, "torch.mm ", color=palette.vermillion, ha="right", fontsize=9)
ax.set(xlabel="Gflop/s on one core")
ax.invert_yaxis()
figure(
    fig,
    alt=(
        "Speed of seven schedules as bars: naive, rows, vectors, registers, packed, and"
        " packed with blocks of 14 by 32 and 16 by 32. Rows is many times as fast as"
        " naive, vectors no faster than rows, registers and packed are faster again;"
        " packed and 16 by 32 come near the line of torch.mm, 14 by 32 stays behind."
    ),
)

# %% [markdown]
# Nothing but loops has changed. The largest step is the cheapest: with k before j both rows are read in order, and LLVM makes vectors of it by itself, so that saying so gains nothing. Then memory is what is left: sums that stay in registers, and panels that are read in order. The block of 14 × 32, which our back end takes on AVX-512, stays behind in TVM. 14 does not divide 512, so six of its rows have a guard, and LLVM keeps the **sums of these rows in memory**, loaded and stored at every step of k; only the other eight rows are in registers (counted below). Size is not the reason: 16 × 32, which divides, is fast, though some of its sums no longer fit. Our back end writes the loop twice.
#
# What the processor sees in the end is below, for a processor with AVX2: in one step of $k$ two loads of B, four numbers of A, eight multiply-adds into eight registers. Then the sums of the larger blocks that go through memory, for AVX-512, and the same lists for other targets: which code generators can the wheel use without a vendor's tools?

# %% tags=["hide-input"]
GPU = [("split", "C", "j", (None, 16)), ("bind", "C", "i", "blockIdx.x")]
GPU += [("bind", "C", "j_0", "blockIdx.y"), ("bind", "C", "j_1", "threadIdx.x")]


def text_for(target, steps, form=""):
    """The code of a product under a schedule."""
    program = with_tvm.scheduled(MATMUL, steps)
    return with_tvm.source(with_tvm.compiled(program, target), form)


lines = text_for("haswell", small.STEPS["packed"], "asm").splitlines()
words = [" ".join(line.split()) for line in lines]
at = [i for i, line in enumerate(words) if line.startswith("vfmadd231ps")]
print("\n".join(w for w in words[at[0] - 3 : at[7] + 1] if not w.startswith(".")))
print()
for name in ("14 × 32", "16 × 32"):
    text = text_for("skylake-avx512", STEPS[name], "asm")
    blocks = re.split(r"\n\S+:|\n\s+j\w+ .*", text)
    sums = "".join(block for block in blocks if "vfmadd" in block)
    stored = len(re.findall(r"vmovup\w\s+%[yz]mm\d+, [^%\n]*\(", sums))
    print(f"{name}, a step of k: {sums.count('vfmadd')} multiply-adds, {stored} stored")
print()
MARKS = {"skylake-avx512": "zmm", "neoverse-v1": "fmla", "riscv64": "vfmacc"}
for target, mark in MARKS.items():
    text = text_for(target, small.STEPS["packed"], "asm")
    print(f"{target:15} has {mark!r}: {mark in text}")
MARKS = {"c": "for (int32_t", "cuda": "__global__", "webgpu": "@compute"}
MARKS |= {"opencl": "__kernel", "metal": "kernel void"}
for target, mark in MARKS.items():
    text = text_for(target, [] if target == "c" else GPU)
    print(f"{target:15} has {mark!r}: {mark in text}")

# %% [markdown]
# `nvptx` asks for CUDA's libdevice, `rocm` for ROCm's bitcode; Vulkan's is not in the wheel (0.27.0.post1).
#
# ## From PyTorch to loops: Relax
#
# A schedule is for one formula; a model has thousands. **Relax** is TVM's language of graphs: `from_exported_program` reads what `torch.export` gives, each operation becomes a formula's loops, called by `call_tir`. Then TVM looks at *indices* to find out what kind each is, and fuses by kinds:
#
# | kind | result $[i, j]$ needs | example |
# |---|---|---|
# | elementwise | $[i, j]$ | GELU, bias |
# | broadcast | $[j]$ | a row for all |
# | injective | $[j, i]$ | transpose |
# | reduction | all of $[i, \cdot]$ | sum |
# | anchor | many, each used often | matmul, softmax |
#
# Each operation asks whether it may join its **post-dominator**, the first operation that all ways from it lead to. Our `fuse_groups` makes TVM's groups on random graphs of all these kinds (the package's tests).
#
# Sizes need not be numbers: with `torch.export.Dim` the last module below serves every length, and memory is planned for the longest.

# %%
PROGRAMS = {"mlp": mlp, "attention_row": attention_row}
STAGES = {}
for name, function in PROGRAMS.items():
    STAGES[name] = graph.lowered(graph.imported(function, *example_inputs(name)))
    steps, outputs = graph.steps(STAGES[name]["annotate"])
    callee = {line: f for line, f, _ in graph.calls(STAGES[name]["annotate"])}
    print(name)
    for step in steps:
        print(f"    {callee[step.name]:10} {step.kind.name.lower()}")
    found = [[callee[line] for line in g] for g in fusion.fuse_groups(steps, outputs)]
    theirs = graph.groups(STAGES[name]["fuse"])
    print("  groups:", found, "as TVM's" if found == theirs else theirs)
S = torch.export.Dim("S", min=2, max=4096)
keys = {"k": {0: S}, "v": {0: S}}
module = graph.imported(
    attention_row, *example_inputs("attention_row", d=64), dynamic=keys
)
merged = graph.lowered(module)["merge"]
call = graph.executable(merged)
for length in (2, 300):
    given = example_inputs("attention_row", T=length, d=64)
    compare(call(*given), attention_row(*given), f"{length} keys", tol=1e-5)
print("planned, in bytes:", graph.planned(merged), "for 4,096 keys")

# %% [markdown]
# In `attention_row` the transpose of $k$ stays alone: the product after it is an anchor, and reads each number several times. (The front end of this part gave the product a transposed second input instead.)
#
# So `mlp` is one function. Is it one loop?

# %% tags=["hide-input", "nbval-ignore-output"]
kernel = graph.kernel(STAGES["mlp"]["merge"], "fused_matmul_add_gelu_tanh")
plain = with_tvm.scheduled(kernel, [])
nest = with_tvm.scheduled(kernel, graph.one_nest(kernel))
nests = len(with_tvm.realizations(plain))
print(f"fused by Relax: {nests} nests of loops,", end=" ")
print(f"{sum(graph.handed_on(plain)):,} bytes handed on in memory")
print(f"scheduled: 1 nest, {sum(graph.handed_on(nest))} bytes, a block of 4 × 16")

inputs = [x.numpy() for x in example_inputs("mlp")]
right = mlp(*example_inputs("mlp"))
took = {}
for name, program in (("fused", plain), ("scheduled", nest)):
    library = with_tvm.compiled(program)
    result = with_tvm.call(library, *inputs, shape=(128, 512))
    np.testing.assert_allclose(result, right, rtol=1e-3, atol=1e-3)
    took[name] = seconds(
        lambda library=library: with_tvm.call(library, *inputs, shape=(128, 512)), 3
    )
took["torch"] = seconds(lambda: mlp(*example_inputs("mlp")))
took["torch"] -= seconds(lambda: example_inputs("mlp"))
print(", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in took.items()))
for name, runs in (("TVM", call), ("torch", attention_row)):
    row = seconds(lambda runs=runs: runs(*given), 20)
    print(f"attention_row, 300 keys, {name}: {1e6 * row:.0f} µs")

LIT = {"matmul": [palette.blue], "T_add": [palette.orange]}
LIT |= {"matmul_init": [palette.blue], "matmul_update": [palette.blue]}
programs = {"fused": plain, "scheduled": nest}
fig, axes = plt.subplots(1, 2, figsize=(3.9, 4.6))
for ax, (name, program) in zip(axes, programs.items(), strict=True):
    for place, (block, nest_of) in enumerate(with_tvm.realizations(program).items()):
        colors = LIT.get(block, [palette.green])
        if name == "scheduled" and block not in LIT:
            colors = [palette.orange, palette.green]
        width = 0.04 / len(colors)
        for part, color in enumerate(colors):
            ax.barh(-place, width, 0.85, left=width * part, color=color)
        names = [str(loop.loop_var.name).removesuffix("_init") for loop in nest_of[0]]
        font = {"family": "monospace", "va": "center", "fontsize": 7}
        ax.text(0.07, -place, f"{block}\n {' '.join(names)}", **font)
    title = f"{name}: {1e3 * took[name]:.1f} ms"
    moved = f"{sum(graph.handed_on(program)):,} bytes handed on"
    ax.set_title(f"{title}\n{moved}", fontsize=8, loc="left")
    ax.set(xlim=(0, 1), ylim=(-10.6, 0.6))
    ax.axis("off")
figure(
    fig,
    alt=(
        "mlp in TVM's loops. Left eleven nests, each with loops of its own: one for the"
        " product, one for the bias, nine for GELU. Right one nest, with the loops i1_0"
        " and i0_0 around all: the product begins at zero, is summed, and one formula"
        " with the bias and GELU takes each block."
    ),
)

# %% tags=["hide-output", "nbval-ignore-output"]
speed_guess.settle(100 * times["packed"][1] / times["packed"][0])
nests_guess.settle(nests)

# %% [markdown]
# Blue is the product, orange the bias, green GELU. Fusion puts operations into one function, and that alone saves launches, not memory: **without a schedule every intermediate tensor is still written**. GELU alone is nine formulas. `one_nest` inlines the nine between the product and the last, and lets the last take each block of the product from the registers. PyTorch remains faster here: TVM calls
# the C library's `expf` for each number of the GELU, and PyTorch computes 8 or 16 at a time. `attention_row`, without a schedule, is slower, too.
#
# ## Finding a schedule
#
# Which block? A tuner tries. TVM's MetaSchedule needs a package that TVM does not install, and with it crashed here (0.27.0.post1), so `tuner` is ours, over the same `Schedule`: random draws, then mutations of the best four, each measurement a line of JSON that a later run reads instead of measuring. All
# schedules of its space were measured once, for a product of 512, by `scripts/tvm_sweep.py`. So we can replay the search with 40 seeds.

# %%
TABLE = resources.files(small).joinpath("data/schedules.csv").read_text("utf-8")
stored = list(csv.DictReader(TABLE.splitlines()))
KEYS = ("rows", "columns", "steps", "packed", "by_columns")
MS = {tuple(int(line[key]) for key in KEYS): float(line["ms"]) for line in stored}
SPACE = tuner.product_space(N, N, N)


def replayed(decisions):
    i, j, k, *flags = decisions.values()
    return MS[i[-1], j[-1], k[-1], *map(int, flags)]


def found_after(trials, random_first, seeds=40):
    """The best time after so many trials: mean over seeds, and its standard error."""
    best = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log.jsonl"
            known = tuner.tune(
                "512", SPACE, replayed, log, trials, seed, random_first=random_first
            )
        best.append(tuner.best(known).seconds)
    return np.mean(best), np.std(best) / math.sqrt(seeds)


every = np.array([*MS.values()])
share = (every < 1.1 * every.min()).mean()
print(f"{len(every)} schedules: the best {every.min():.2f} ms,", end=" ")
print(f"the median {np.median(every):.1f}, the worst {every.max():.0f};", end=" ")
print(f"{share:.0%} within 10% of the best")
for trials in (4, 12, 32):
    (chance, e), (evolved, f) = found_after(trials, trials), found_after(trials, 6)
    row = f"{trials:2} trials: random {chance:.2f} ± {e:.2f} ms"
    print(f"{row}, evolutionary {evolved:.2f} ± {f:.2f} ms")

# %% [markdown]
# A search is worth much: the median schedule takes about twice as long as the best. A *clever* search is worth little here, for one schedule in five is good. In spaces of billions, as those of the papers, that is different.
#
# ## Play
#
# Where is a tensor computed? $C_{ij}$ is the sum of $P$ over 3 × 3 places, of 32 × 32 results, in tiles of $t × t$. Before all of them: every number of $P$ once, and all of them in memory. In strips (at the loop `i_0`) or in tiles (at `j_0`): a piece at a time, and what tiles share at their borders is computed by each. The darker, the more often.

# %% tags=["hide-input", "slider"]
image = placeholder("x", (34, 34))
q = reduce_axis("q", 3)
blurred = compute("P", (34, 34), lambda i, j: image[i, j] * 0.5)
summed = compute("C", (32, 32), lambda i, j: sum_over(blurred[i + r, j + q], r, q))
MOST = 256  # numbers of P at a time


def computed(tile: int, at: str):
    """How often each number of P is computed; the size of one piece."""
    steps = [("split", "C", name, (None, tile)) for name in "ij"]
    steps.append(("reorder", "C", ("i_0", "j_0", "i_1", "j_1")))
    if at != "before":
        steps.append(
            ("compute_at", "P", "C", {"in strips": "i_0", "in tiles": "j_0"}[at])
        )
    program = lower(summed, schedule=steps)
    stage = program.stages["P"]
    inner = {loop.name: loop.extent for loop in stage.loops}
    outer = {loop.name: loop.extent for loop in program.stages["C"].loops}
    counts = np.zeros((34, 34), int)
    spans = []
    for axis in "ij":
        index = stage.index[axis]
        own = {n: inner.get(n, outer.get(n)) for n in index.names}
        begin, extent = small.region(
            [index], {n: inner[n] for n in index.names & inner.keys()}
        )
        (loop,) = begin.names or {""}
        step = dict(begin.terms).get(loop, 0)
        spans.append(
            [slice(step * o, step * o + extent) for o in range(own.get(loop, 1))]
        )
    for rows in spans[0]:
        for columns in spans[1]:
            counts[rows, columns] += 1
    first = spans[0][0], spans[1][0]
    return counts, first


def draw(tile: int, at: str):
    counts, (rows, columns) = computed(tile, at)
    fig, ax = plt.subplots(figsize=(3.3, 3.5))
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=9)
    piece = (columns.stop - columns.start, rows.stop - rows.start)
    ax.add_patch(
        plt.Rectangle((-0.5, -0.5), *piece, fill=False, lw=2, color=palette.vermillion)
    )
    ax.set_title(
        f"{math.prod(piece):,} numbers at a time\n"
        f"{counts.sum():,} computed, of {counts.size:,}",
        fontsize=10,
    )
    ax.axis("off")
    return fig


def told(tile: int, at: str) -> str:
    counts, (rows, columns) = computed(tile, at)
    piece = (rows.stop - rows.start) * (columns.stop - columns.start)
    return (
        f"P computed {at}, tiles of {tile}: {piece} numbers at a time,"
        f" {counts.sum()} computed in all, of {counts.size}"
    )


def missing(tile: int, at: str) -> str:
    def cost(tile: int, at: str) -> tuple[int, int]:
        counts, (rows, columns) = computed(tile, at)
        return (rows.stop - rows.start) * (columns.stop - columns.start), counts.sum()

    room, work = cost(tile, at)
    if room > MOST:
        return f"{room} numbers at a time are more than {MOST}"
    every = [cost(t, a) for t in TILES for a in PLACES]
    least = min(work for room, work in every if room <= MOST)
    return "" if work == least else f"{work:,} computed: it can be done with fewer"


TILES, PLACES = [2, 4, 8, 16], ["before", "in strips", "in tiles"]
explore(
    draw,
    alt=told,
    title="Where P is computed",
    challenge=f"At most {MOST} numbers of P at a time, as few computed as possible.",
    missing=missing,
    start={"tile": 4, "at": "in tiles"},
    tile=TILES,
    at=PLACES,
)

# %% [markdown]
# ## At scale
#
# On a GPU the graph and its passes stay; schedules come from rules by kind (`dlight`), and what is left over gets a default:
#
# ```python
# from tvm.s_tir import dlight as dl
#
# with tvm.target.Target("nvidia/nvidia-a100"):
#     rules = (dl.gpu.Matmul(), dl.gpu.GEMV(), dl.gpu.Reduction(), dl.gpu.Fallback())
#     module = dl.ApplyDefaultSchedule(*rules)(merged)
# library = tvm.compile(module, target="nvidia/nvidia-a100")
# ```
#
# What a search gains there depends on what it is compared with. Ansor, whose moves ours has, reports networks up to 3.8 times as fast as the best other tool of its time on an Intel CPU, 2.6 times on an ARM CPU and 1.7 times on an NVIDIA GPU ([Zheng et al. 2020](https://arxiv.org/abs/2006.06762 "zheng2020ansor")). The vendor's GPU library is the hardest to beat, and for a plain product nobody tries.
#
# ## What to keep
#
# ```python
# for index in indices:
#     standing = index.part(index.names - moving.keys())
#     spans.append(interval(index - standing, moving))
# begin = standing + min(first for first, _ in spans)
# extent = max(last for _, last in spans) - min(first for first, _ in spans) + 1
# ```
#
# **Use it** for processors without a good library, for formulas that no library has, and to ship one file without PyTorch. **Not** for plain products on a GPU, nor without comparing results.
#
# <details><summary>Why may k not be vectorized, and i and j may?</summary>
#
# All iterations of k add to the same number. For i and j each writes its own.
#
# </details>
#
# <details><summary>A split does not divide. Where does the guard stand, and what does it cost?</summary>
#
# In the innermost loop, unless it can be moved out: a comparison per iteration, and sums that no longer stay in registers.
#
# </details>
#
# <details><summary>Two operations are in one function. Is the tensor between them still written?</summary>
#
# Yes, until a schedule computes one inside the loops of the other.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/08-compilers/04-tvm.ipynb).
#
# Further reading: [Chen et al. 2018](https://arxiv.org/abs/1802.04799 "chen2018tvm") for the whole; [Ragan-Kelley et al. 2013](https://dl.acm.org/doi/10.1145/2491956.2462176 "ragankelley2013halide") for schedules and bounds; [Feng et al. 2022](https://arxiv.org/abs/2207.04296 "feng2022tensorir") for the loops that TVM has now; [Lai et al. 2023](https://arxiv.org/abs/2311.02103 "lai2023relax") for Relax.
