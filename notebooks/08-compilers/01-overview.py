# %% [markdown]
# # Overview
#
# Between a line of Python and the instructions of a CPU or a GPU lie several languages, and each program that "compiles a model" goes through a few of them. Here one function is read in nine, as real compilers print it: which line became which, and who decides what. Then you compile your first
# function to machine code, with a compiler that you can read in ten minutes.

# %% tags=["hide-input"]
import csv
import math
import re
import warnings

import torch
import torch.nn.functional as F
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from llmlab.checks.compilers.overview import check
from llmlab.compilers import overview
from llmlab.compilers.overview import (
    assembly,
    compile_expression,
    compile_with,
    hot_loop,
    in_language,
    maximum,
    minimum,
    to_llvm,
)
from llmlab.compilers.program import example_inputs, mlp
from llmlab.course import compare, explore, figure, plt, predict, show, steps, your_turn
from llmlab.course.steppers import Mark, Plane, Step, Trace

warnings.filterwarnings("ignore", module="torch|copyreg")

# %% [markdown]
# ## What it costs
#
# The function of this part is $\operatorname{GELU}(xw + b)$, here with 128 rows in $x$ and 256 × 512 weights. These are six ways of running it on one core (stored; `scripts/overview_sweep.py` measures again). They agree closely, and do not take the same time:

# %%
with (overview.STORED / "times.csv").open(newline="", encoding="utf-8") as lines:
    TIMES = list(csv.DictReader(lines))
of_mlp = {row["tool"]: float(row["us"]) for row in TIMES if row["function"] == "mlp"}
for tool, us in of_mlp.items():
    print(f"{tool:14}{us / 1000:8.2f} ms")
spread = max(of_mlp.values()) / min(of_mlp.values())
print(f"slowest / fastest: {spread:.0f}")
errors = [float(row["error"]) for row in TIMES if row["function"] == "mlp"]
print("all within 0.0001 of float64:", max(errors) < 1e-4)

# %% [markdown]
# The slowest is a compiler, and a good one: TVM was not told in which order to compute, and that is a decision which somebody must make. (Ours, the small one of this page, loses its time in `tanh`; Play shows why.) All of this part is about decisions: which there are, and who makes them. Nothing on this page needs a GPU or a C compiler. The nine languages, and who writes them:
#
# | language | printed by | it is |
# |---|---|---|
# | FX, ONNX | PyTorch | a graph of operations; ONNX is the one that is kept in files |
# | StableHLO, HLO | XLA, JAX's compiler | a graph, before and after XLA's own passes |
# | Relax, TIR | TVM | a graph; then loops |
# | linalg | MLIR, here by IREE | operations on whole arrays, with the formula for one number inside |
# | TTIR, TTGIR | Triton | what one tile needs; then also which thread holds what |
#
# ## Predict

# %%
whole_guess = predict("In how many of nine languages is GELU still one operation?")
apart_guess = predict(
    "Four real compilers compute one GELU. How far are their results apart?",
    choices=("0.000003, rounding", "0.00005, more than rounding", "not at all"),
)

# %% [markdown]
# ## By hand
#
# $f(x, y) = xy + x$, on four numbers. A compiler's language has one operation to a line, and gives each value a name once:
#
# | line | reads | for $x = 1, 2, 3, 4$ and $y = 2$ |
# |---|---|---|
# | `%v0 = fmul float %x0, %x1` | $x$, $y$ | 2, 4, 6, 8 |
# | `%v1 = fadd float %v0, %x0` | the line above, $x$ | 3, 6, 9, 12 |
#
# `%x0` is read twice, and it is one value. In Python it would be a line of text; here it is two operations and an edge from each to what it reads: a graph, written as a list. Below, `trace` calls `f` with two stand-ins, which write down what is done with them, and the next two functions make lines of that.


# %%
def f(x, y):
    return x * y + x


body, result = overview.lower(overview.linearise(overview.trace(f, 2)))
print("\n".join(body))
machine_code = compile_expression(f, 2)
print(machine_code(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4,), 2.0)).tolist())

# %% [markdown]
# That was compiled: the last line ran on your CPU as machine code.
#
# ## The idea
#
# A compiler translates a program $p$ from one language to the next, $p_0 \to p_1 \to \dots \to p_n$, and each step keeps the meaning,
#
# $$[\![\, p_{i+1} \,]\!] = [\![\, p_i \,]\!] \quad \text{(up to rounding)}$$
#
# (the brackets stand for what a program computes), while it decides something that the language before left open: in which order, in which memory, by which threads. Below, the same three parts in each language. Step through them: lines that correspond light up.

# %% tags=["hide-input"]
TEXTS = {name: in_language("mlp", name) for name in overview.LANGUAGES}
NOISE = re.compile(
    r"T\.(reads|writes|axis|func_attr|sblock|init)|with |def |@|# |\^bb0|} ->|yield|: {"
    r"|(tt\.(expand_dims|splat|broadcast|addptr|make_range)|arith\.(muli|addi))"
    r"|constant|cls\.|local_|async|memdesc"
)
WORDS = {"product": "x @ w", "bias": "… + b", "gelu": "GELU(…)"}
SAID = {"product": "The product", "bias": "The bias", "gelu": "GELU"}
WIDE, HIGH = 352, 23


def short(line):
    """A line without its types, at most 46 characters."""
    line = re.sub(r'T\.(float32|int64)\(([^)]*)\)|: "f32[^"]*"', r"\2", line.strip())
    line = re.sub(r': R\.Tensor.*?(?= =)|, out_dtype="\w+"', "", line)
    line = re.split(r" : | ins\(| -> | attributes", line)[0]
    line = re.sub(r"torch\.ops\.|\.default|\{indexing.*|v_|_output_0", "", line)
    line = re.sub(r'"/?|(?<=0\.[07]\d{3})\d+', "", line)
    return line if len(line) <= 46 else line[:45] + "…"


def digest(text):
    """Lines that compute a part, at most five of each."""
    kept = []
    for part in overview.PARTS:
        of = zip(text.lines, overview.parts(text), strict=True)
        lines = [line for line, p in of if p == part and not NOISE.search(line)]
        lines = list({short(line): line for line in lines}.values())
        kept += [(part, short(line), line.strip()) for line in lines[:5]]
        if len(lines) > 5:
            kept.append((part, f"… {len(lines) - 5} lines more", ""))
    return kept


def marks(lines, lit):
    """The parts in Python, the lines below, and those of one part lit."""
    for i, (part, word) in enumerate(WORDS.items()):
        at = (4 + i * 118, 4, 112, HIGH)
        yield Mark(part, "cell", at, word, "done" if part == lit else "plain")
    for i, (part, line, whole) in enumerate(lines):
        at = (4, 42 + i * HIGH, WIDE - 8, HIGH)
        kind = "done" if part == lit else "plain"
        yield Mark(f"l{i}", "cell", at, line, kind, line=whole)


RUN_BY = {"FX": "torch.compile", "ONNX": "onnxruntime", "Relax": "TVM", "TIR": "TVM"}
RUN_BY["linalg"] = "IREE"


def trace_of(text):
    lines = digest(text)
    facts = {"between operations": f"{overview.bytes_between(text) / 1e6:.1f} MB"}
    tool = RUN_BY.get(text.language)
    facts["run"] = f"{tool}, {of_mlp[tool] / 1e3:.2f} ms" if tool else "on a GPU"
    before = list(marks(lines, ""))
    told = f"Above the three parts in Python, below what {text.tool} printed."
    found = [Step(tuple(before), told, facts=facts)]
    for part in overview.PARTS:
        now = list(marks(lines, part))
        own = [line for p, line, _ in lines if p == part]
        left_out = [re.match(r"… (\d+) lines more", line) for line in own[2:]]
        rest = sum(int(each[1]) if each else 1 for each in left_out)
        more = f" and {rest} more" if rest else ""
        told = f"{SAID[part]} is here: {'; '.join(own[:2])}{more}"
        changed = [m for m, old in zip(now, before, strict=True) if m != old]
        found.append(Step(tuple(changed), told, facts=facts))
        before = now
    scene = Plane(WIDE, 48 + len(lines) * HIGH, (WIDE, HIGH))
    return Trace(scene, tuple(found))


READ = ("FX", "ONNX", "Relax", "TIR", "linalg", "TTIR")
steps(
    {name: trace_of(TEXTS[name]) for name in READ},
    title="x @ w + b, GELU: Python above, below what a tool printed",
    start="first",
)

# %% [markdown]
# Point at a line to see all of it. "Between operations" is what would be written to memory and read again if each operation ran as it stands there; the times are those from above. FX, ONNX and Relax are graphs: a line for each part, and what a GELU is stays in the name. TIR and linalg spell it out, and TIR has loops. TTIR comes from a Triton kernel, which a person wrote; it says what *one tile* of the result needs, and most of its lines compute
# addresses (left out here). The whole texts, with XLA's two and Triton's next step:

# %% tags=["hide-output"]
for name, text in TEXTS.items():
    print(f"──── {name}, by {text.tool}: {len(text.lines)} lines\n{text.text}\n")

# %% [markdown]
# ## Your turn
#
# The first step of our own compiler. A result comes as a graph of `Expression`s; put them into a list, arguments and constants too. `node.inputs` is a tuple of the expressions that `node` reads, and of an argument or a constant it is empty. Two objects that look alike stay two.


# %%
def my_linearise(result):
    """Each expression once, after all of its `inputs`; the result is the last."""
    raise NotImplementedError("seven lines of yours")


your_turn(check.linearise, my_linearise)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(result):
    order = []

    def visit(node):
        if node not in order:
            for each in node.inputs:
                visit(each)
            order.append(node)

    visit(result)
    return order


your_turn(check.linearise, one_answer)

# %% [markdown]
# ## The code
#
# Our compiler has four steps: trace a Python function, linearise, write a line of LLVM IR for each operation, and put a loop around them. LLVM does the rest: `llvmlite` brings it along, so no C compiler is needed. Here is a gate, $y \cdot \min(\max(y + 3, 0), 6) / 6$ with $y = x + b$, down to instructions. First for this CPU, to be
# called; then the loop for two CPUs that need not be here:


# %%
def gate(x, b):
    y = x + b
    return y * minimum(maximum(y + 3, 0), 6) * (1 / 6)


fast = compile_expression(gate, 2)
x, b = torch.randn(2, 1003)
compare(fast(x, b), F.hardswish(x + b), "our machine code and torch's", tol=1e-5)
print(fast.ir[fast.ir.index("  %v0") : fast.ir.index("  %to")])
vectors = re.findall(r".* = fmul <.*", overview.better(fast.ir, "x86-64, AVX2"))
print("After LLVM's passes:", vectors[0].strip(), "\n")
loops = [
    hot_loop(assembly(fast.ir, target)) for target in ("x86-64, AVX2", "AArch64, NEON")
]
for i in range(max(map(len, loops))):
    left, right = (loop[i] if i < len(loop) else "" for loop in loops)
    print(f"{left.expandtabs(12):44}{right.expandtabs(8)}")

# %% tags=["hide-cell"]
show(overview.trace, overview.linearise, overview.lower, overview.loop)

# %% [markdown]
# Four levels stand here. Our lines of LLVM IR work on one number. (`0x4008000000000000` is 3: LLVM writes a float as the bits of the double that is equal to it.) LLVM's passes turn them into lines that work on a vector of eight: still LLVM IR, which names no instruction of any CPU. Then each becomes instructions of one CPU, and its values get registers. The assembler turns the words into bytes, and `address` says where they begin.
#
# Left eight numbers per trip in a register `ymm`, right four in `v…4s`: LLVM turned our loop over numbers into a loop over vectors, and that is its decision. 3, 6 and ⅙ wait in registers. x86 needs three instructions for one maximum, since `vmaxps` alone would lose a NaN; AArch64's `fmax` keeps it.
#
# | value | type | holds |
# |---|---|---|
# | `Expression` | graph | `op`, `inputs`, `value`; shared where it is read twice |
# | `linearise(…)` | list | the order in which to compute |
# | `lower(…)` | lines, name | each with a name that no other has |
# | `Compiled.address` | int | where the instructions begin; called with pointers and $n$, how many numbers |
#
# ## torch.compile
#
# Ours runs the function once on stand-ins for arrays. torch.compile reads Python's bytecode instead, and hands over graphs; here to a back end that only keeps them. Where a number decides what Python does next, the graph ends: a **graph break**. And each graph holds for what was assumed when it was made: **guards**.

# %%
graphs = []


def keeps(graph, inputs):
    graphs.append(graph)
    return graph.forward


def either(x):
    y = F.gelu(x)
    return y * 2 if y.sum() > 0 else y * 3


torch.compile(either, backend=keeps)(torch.ones(2, 3))
for i, graph in enumerate(graphs, 1):
    calls = [n.target for n in graph.graph.nodes if n.op.startswith("call")]
    names = [getattr(target, "__name__", target) for target in calls]
    print(f"either, graph {i}:", *names)
graphs.clear()
compiled = torch.compile(mlp, backend=keeps)
x, w, b = example_inputs("mlp")
for rows in (128, 128, 64, 32, 1):
    compiled(x[:rows], w, b)
    print(f"mlp with rows={rows}: graphs so far {len(graphs)}")
for version in reversed(_debug_get_cache_entry_list(mlp.__code__)):
    guard = re.search(
        r"check_tensor\(L\['x'\].*?(size=.*?\])", str(version.guard_manager)
    )
    print("guarded: x has", guard[1])
print("versions at most:", torch._dynamo.config.recompile_limit)
for function in ("mlp", "attention_row", "nine"):
    rows = {row["tool"]: row for row in TIMES if row["function"] == function}
    row = rows["torch.compile"]
    gain = float(row["eager_us"]) / float(row["us"])
    times = f"{row['eager_us']} → {row['us']} µs, {gain:.1f} ×"
    print(f"{function:14}{times}, first call {row['first_call_s']} s")

# %% [markdown]
# The second call finds its graph. With 64 rows the guard fails; the new graph is for *any* number of rows (`None`), so 32 costs nothing. One row is a case of its own again. Guards also hold the code of `mlp`, global settings and Python numbers: what may change the answer is looked at before each call.
#
# The last three lines are stored measurements on one core: eager, then torch.compile, how many times as fast it is, and what its first call takes. `nine` is GELU in nine calls on 2 MB, where there is something to fuse. `mlp` is mostly a product, which a library computed before and computes now. `attention_row`, one query over 128 keys, takes so few microseconds that the guards and the call itself double them. What becomes of the graphs, C++ here and Triton on a GPU, is read in the lesson on
# the back end.
#
# ## Against the libraries
#
# The same function by each tool, against float64, on inputs whose results are near 1, where GELU bends:

# %%
x, w, b = x / 4, w / 4, b / 4
right = mlp(x.double(), w.double(), b.double())
results = {}
for tool in ("PyTorch", "TVM", "IREE", "onnxruntime", "ours"):
    results[tool] = compile_with(tool, "mlp")(x, w, b)
    error = (results[tool] - right).abs().max().item()
    verdict = "rounding" if error < 1e-5 else "more than rounding"
    print(f"{tool:12} differs by {error:.5f}, {verdict}")

# %% [markdown]
# ## The experiment
#
# All agree to float32's rounding but one. Which line is it? Here is what each text says about $\sqrt{2/\pi}$, and what it has decided.

# %%
print(f"√(2/π) = {math.sqrt(2 / math.pi):.6f}")
for name, text in TEXTS.items():
    constant = overview.root_two_over_pi(text)
    if constant:
        print(f"{name:10}{constant:.6f}")
print(f"√(2/(22/7)) = {math.sqrt(7 / 11):.6f}")
forgot = [name for name, text in TEXTS.items() if not overview.knows_the_whole(text)]
print("without the shape of the whole result:", *forgot)
HLO = TEXTS["HLO"].text
print("fusions in HLO:", HLO.count(" fusion("))
rows = {name: in_language("attention_row", name) for name in TEXTS}
for name, text in rows.items():
    print(f"attention_row, {name:10}{overview.operations(text):3} operations")
line = next(line.strip() for line in rows["linalg"].lines if ":2 =" in line)
print("two results:", line[:20], "…")
as_iree = compile_expression(lambda h: overview.gelu(h, root=math.sqrt(7 / 11)), 1)
compare(as_iree(torch.addmm(b, x, w)), results["IREE"], "IREE, and π = 22/7", tol=1e-5)

# %% [markdown]
# The importer of torch-mlir, which IREE brings, has GELU with $\pi = 22/7$, Archimedes' fraction ([its source](https://github.com/llvm/torch-mlir/blob/0029fc2e102c6d604696b33eb618116b4957a2e3/lib/Conversion/TorchToLinalg/Uncategorized.cpp#L819 "torchmlir2026gelu"); IREE 3.13.0). No test with a tolerance of $10^{-3}$ finds it. Reading one line does, and the last line above proves it: our compiler, with that fraction, gives IREE's numbers. Results near 1 are not all: far from them, onnxruntime's sigmoid (1.32.0) is 0 below $x = -18$, TVM's tanh (0.27.0) is 0 at $x = 10^{-8}$, and torch.compile (2.13.0, on a CPU) writes $e^x - 1$ for `expm1`, which is 0 there, too.
#
# More can be read in the same way. XLA's HLO has two fusions: one with the product alone, which goes to a library, and one with all the rest. The attention row has few operations in a graph, and many in linalg. One of them has two results, the maximum of the scores *and the place where it is*: nobody
# reads the place, and a later pass must find that out.

# %% tags=["hide-input"]
decided = {name: sum(overview.decided(text).values()) for name, text in TEXTS.items()}
names = sorted(TEXTS, key=decided.get)
fig, ax = plt.subplots(figsize=(4.8, 4.5))
for column, text in enumerate(TEXTS[name] for name in names):
    for row, made in enumerate(overview.decided(text).values()):
        color = "C0" if made else "none"
        ax.scatter(column, -row, s=90, color=color, edgecolor="C7", linewidth=0.8)
    ax.text(column, -8.1, overview.operations(text), ha="center", fontsize=9)
    ax.text(column, -9.1, len(text.lines), ha="center", fontsize=9)
    between = f"{overview.bytes_between(text) / 1e6:.1f}"
    ax.text(column, -10.1, between, ha="center", fontsize=9)
ax.set_xticks(range(len(names)), names, rotation=55, ha="left", fontsize=9)
ax.xaxis.tick_top()
ax.grid(False)
labels = [*overview.DECISIONS, "operations", "lines", "MB between"]
ax.set_yticks(range(0, -11, -1), labels, fontsize=9)
ax.set(xlim=(-0.5, len(names) - 0.5), ylim=(-10.6, 0.6))
ax.tick_params(length=0)
ax.set_title("filled: decided in this text", fontsize=10)
for side in ax.spines.values():
    side.set_visible(False)
figure(
    fig,
    alt="Decisions that stand in each text, of eight: "
    + ", ".join(f"{name} {decided[name]}" for name in names)
    + ". Operations: "
    + ", ".join(f"{name} {overview.operations(TEXTS[name])}" for name in names),
)

# %% [markdown]
# It is nearly a staircase; the last three rows count. FX, ONNX and Relax have decided none of the eight and know most: the shape of each result, what is a GELU. Further right more is decided, and less is known. "MB between" grows where GELU is spelled out, and shrinks where somebody decided what runs together. TTIR has tiles and addresses, and the shape of the whole result stands nowhere in it; it has also decided, unasked, to multiply with fewer digits than float32 has (`inputPrecision = tf32`, "digits of the product"). TTGIR, Triton's next
# step, says which thread of a warp holds which number. This is why there are several languages: fusing is easy on the left, vectorising on the right, and no step can be taken back.

# %% tags=["hide-output"]
spelled = [overview.decided(text)["GELU in + and ×"] for text in TEXTS.values()]
whole_guess.settle(spelled.count(False))
apart_guess.settle("0.00005, more than rounding")

# %% [markdown]
# ## Play
#
# The loop of a function as a CPU would run it. At level 0 LLVM translates line by line, at 1 it tidies up, and at 3 it makes loops of vectors. GELU calls `tanhf` once per number: vectors do not help there.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
FORMULAS = {"gate": (gate, 2), "GELU": (overview.gelu, 1)}
LOOPS = {
    (f"{name}, {target.split(', ')[1]}", level): hot_loop(
        assembly(to_llvm(*formula), target, level)
    )
    for name, formula in FORMULAS.items()
    for target in overview.TARGETS
    for level in (0, 1, 3)
    if name == "gate" or "AVX2" in target
}


def per_instruction(key):
    return overview.floats_per_trip(LOOPS[key]) / len(LOOPS[key])


def draw(level: int, loop: str):
    lines = LOOPS[loop, level]
    shown = lines if len(lines) <= 18 else [*lines[:17], f"… {len(lines) - 17} more"]
    fig, ax = plt.subplots(figsize=(4.8, 4.0))
    for row, line in enumerate(shown):
        ax.text(0, -row, line.expandtabs(12), family="monospace", fontsize=9)
    floats = overview.floats_per_trip(lines)
    ax.set_title(f"instructions: {len(lines)}, numbers per trip: {floats}", fontsize=10)
    ax.set(xlim=(0, 1), ylim=(-18, 1))
    ax.axis("off")
    return fig


def told(level: int, loop: str) -> str:
    lines = LOOPS[loop, level]
    floats = overview.floats_per_trip(lines)
    first = "; ".join(lines[:3]).expandtabs(1)
    return (
        f"{loop} at level {level}: instructions {len(lines)}, numbers per trip"
        f" {floats}; it begins with {first}"
    )


def missing(level: int, loop: str) -> str:
    if per_instruction((loop, level)) == max(map(per_instruction, LOOPS)):
        return ""
    return f"here {per_instruction((loop, level)):.2f} numbers per instruction"


explore(
    draw,
    alt=told,
    title="One loop, four instruction sets, three levels of LLVM",
    challenge="Find the loop with the most numbers per instruction.",
    missing=missing,
    start={"level": 0, "loop": "GELU, AVX2"},
    level=[0, 1, 3],
    loop=list(dict.fromkeys(name for name, _ in LOOPS)),
)

# %% [markdown]
# ## At scale
#
# Who compiles what, and when. "First call" is just in time: the shapes are known, and somebody waits.
#
# | tool | reads | down to | when | source |
# |---|---|---|---|---|
# | torch.compile 2.13 | Python's bytecode → FX | Triton, or C++ and calls of libraries | first call, again when a guard fails | [Ansel et al. 2024](https://docs.pytorch.org/assets/pytorch2-2.pdf "ansel2024pytorch") |
# | XLA (JAX 0.10.2) | StableHLO → HLO | LLVM IR, PTX, TPU code | first call, or ahead | [OpenXLA](https://openxla.org/xla/architecture "openxla2026architecture") |
# | TVM 0.27 | Relax → TIR | LLVM IR, C, CUDA | ahead, after a search for schedules | [Chen et al. 2018](https://arxiv.org/abs/1802.04799 "chen2018tvm") |
# | IREE 3.13 on MLIR | torch, ONNX, StableHLO → linalg | LLVM IR, PTX, SPIR-V | ahead | [Lattner et al. 2021](https://arxiv.org/abs/2002.11054 "lattner2021mlir") |
# | Triton 3.7 | a kernel in Python → TTIR → TTGIR | PTX, AMD's code | first call | [Tillet et al. 2019](https://www.eecs.harvard.edu/~htk/publication/2019-mapl-tillet-kung-cox.pdf "tillet2019triton") |
# | TensorRT | ONNX → a network | a plan of chosen kernels, for its own version | ahead, on the GPU it is for | [NVIDIA](https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html "nvidia2026tensorrt") |
# | LLVM 22 | LLVM IR | machine code | both | [Lattner and Adve 2004](https://llvm.org/pubs/2004-01-30-CGO-LLVM.html "lattner2004llvm") |
#
# To see the same steps of your own model:
#
# ```bash
# TORCH_LOGS="dynamo,guards,graph_breaks,recompiles,output_code" python train.py
# XLA_FLAGS="--xla_dump_to=hlo --xla_dump_hlo_as_text" python train_with_jax.py
# TRITON_KERNEL_DUMP=1 TRITON_DUMP_DIR=kernels python train.py
# iree-compile model.mlir --iree-hal-target-backends=llvm-cpu --compile-to=flow
# ```
#
# ## What to keep
#
# ```python
# order = linearise(trace(function, arguments=2))     # a graph as a list
# lines, result = lower(order)                        # an operation to a line
# module = llvm.parse_assembly(loop(lines, result, 2))
# engine = llvm.create_mcjit_compiler(module, machine)
# code = CFUNCTYPE(None, *pointers, c_int64)(engine.get_function_address("f"))
# ```
#
# **Compile** where many small operations run often with the same shapes, and read what came out. **Do not** expect gains where libraries do the work already, or where shapes and Python's way change with each call.
#
# <details><summary>Why does a compiler have several languages and not one?</summary>
#
# Each step needs what a language says plainly: fusion needs to know what is an operation, vectorising needs loops and addresses. What has been decided cannot be found again below.
#
# </details>
#
# <details><summary>A model is called with 100 different lengths. What does torch.compile do?</summary>
#
# The second length fails a guard, and the graph that is made then is for any length (but 1 and 0). If something else changes with each call, such as a Python number, it stops compiling after 8 versions and runs eagerly.
#
# </details>
#
# <details><summary>Two compilers differ by 0.00005. How do you find out who is right?</summary>
#
# Compute in float64, see which is nearer, and read its constants and its order of sums, from the graph downwards.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/08-compilers/01-overview.ipynb).
#
# Further reading: [Lattner et al. 2021](https://arxiv.org/abs/2002.11054 "lattner2021mlir") on why one language is not enough; [Ansel et al. 2024](https://docs.pytorch.org/assets/pytorch2-2.pdf "ansel2024pytorch") on capturing Python.
