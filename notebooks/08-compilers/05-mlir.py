# %% [markdown]
# # MLIR
#
# A compiler makes its decisions on different levels: what an operation means, in which order its loops run, where a number lies, which instruction adds it. MLIR is a way to write all of them down in one form, so that a program can go from one to the next in small steps. IREE, torch-mlir, Triton and XLA are made of it.
# Here you write the form itself, a dialect of your own in xDSL (an MLIR in Python), and take it down to machine code that runs. At the end you own an operation that no compiler knew before.

# %% tags=["hide-input"]
import math
import re
import time

import torch
import torch.nn.functional as F
from xdsl.irdl import irdl_op_definition, operand_def, result_def
from xdsl.pattern_rewriter import RewritePattern, op_type_rewrite_pattern
from xdsl.utils.exceptions import ParseError, VerifyException

from llmlab.checks.compilers.mlir import check
from llmlab.compilers import front_end, mlir
from llmlab.compilers.front_end import TypeMismatch, capture
from llmlab.compilers.mlir import dialect as lab
from llmlab.compilers.mlir import iree, machine, ssa, ssa_passes
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

torch.set_num_threads(1)


def seconds(function, *arguments, repeat=3):
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - started)
    return min(times)


# %% [markdown]
# ## What it costs
#
# The part's function, $\operatorname{GELU}(xw + b)$, compiled twice. One thing differs: the order of three loops in the product. The sums are the same, number by number, and so is the code for everything else.

# %% tags=["nbval-ignore-output"]
inputs = example_inputs("mlp")
graph = capture(mlp, *inputs)
programs = {}
for order in ("i, j, k", "i, k, j"):
    module = mlir.optimise(mlir.from_graph(graph))
    programs[order] = mlir.compile_module(module, reorder=order == "i, k, j")
    compare(programs[order](*inputs)[0], mlp(*inputs), f"loops {order}", tol=1e-4)
took = {order: seconds(program, *inputs) for order, program in programs.items()}
same = torch.equal(*(program(*inputs)[0] for program in programs.values()))
print("bit by bit the same:", same)
print(f"{took['i, j, k'] / took['i, k, j']:.0f} times as fast on this CPU")

# %% [markdown]
# In the order i, k, j the innermost loop goes along a row, and LLVM can do many numbers in one instruction. LLVM does not exchange the loops itself here: it would have to prove first that nothing else changes. On the level where the operation is called `matmul` that is known, and exchanging them is one pattern. **Each decision is easy on one level and hard on those below.**
#
# ## Predict

# %%
copy_guess = predict(
    "Two transposes that undo each other, as loops. What does LLVM leave of them?",
    choices=("nothing but a copy", "one transpose", "two transposes"),
)
dispatch_guess = predict(
    "IREE cuts an attention row into 3 kernels. To help, we write two loops of its"
    " softmax as one. How many kernels are there now?",
    unit="kernels",
)

# %% [markdown]
# ## By hand
#
# `y = a; if a < 5: y = a · a; return y + y`. In **static single assignment** each value is defined once, and here y has two definitions. In memory that is no problem: both store to one place. Which blocks lie on every way to a block (they **dominate** it), and which of them is the last before it, its immediate dominator or *idom*?
#
# | block | goes to | dominated by | idom |
# |---|---|---|---|
# | ^0: store a; a < 5? | ^1, ^2 | ^0 | – |
# | ^1: store a · a | ^2 | ^0, ^1 | ^0 |
# | ^2: load, load, add | – | ^0, ^2 | ^0 |
#
# ^1 does not dominate ^2, for there is a way around it. So its value cannot be used there by its name. Where the two ways meet, y becomes an **argument of the block**, and each side hands its own value on. LLVM says the same with a **phi**. (LLVM's own pass that does this is called mem2reg.)


# %%
def branch():
    """The example, with y in memory."""
    start, then, end = ssa.Block([ssa.Value()]), ssa.Block(), ssa.Block()
    (a,) = start.arguments
    y = start.add("slot")
    start.add("store", a, y)
    less = start.add("less", a, start.add("const", number=5))
    start.choose(less, (then, []), (end, []))
    then.add("store", then.add("mul", a, a), y)
    then.goto(end)
    end.add("ret", end.add("add", end.add("load", y), end.add("load", y)))
    return ssa.Function([start, then, end])


program = branch()
print(program)
added = ssa_passes.promote(program)
print(f"\nin values: {added} block argument added\n{program}")
print(next(line.strip() for line in mlir.as_llvm(program).split("\n") if "phi" in line))
print([ssa.run(program, a)[0] for a in (3, 7)])

# %% [markdown]
# ## The idea
#
# Everything is an **operation**: it has operands and results with types, **attributes** (what is known when it is compiled), and perhaps **regions** of blocks inside it. A loop is an operation with a region; so is a function, so is the module. A **dialect** is a set of operations. Levels are dialects:
#
# | dialect | says | decided on the way down from it |
# |---|---|---|
# | `lab`, ours | what: matmul, gelu | which operations are one |
# | `linalg` on tensors | loops, by maps from iterations to elements | how many buffers, and who shares bytes |
# | `linalg` on `memref` | where the numbers lie | the order of loops |
# | `scf` | loops, one by one | – |
# | `cf` | blocks and jumps | – |
# | `llvm` | instructions on pointers | registers, vectors (by LLVM) |

# %% tags=["hide-input"]
WORDS = ("load", "store", "mulf", "addf", "subf", "divf", "tanh", "exp", "maximumf")


def short(text):
    """A program of loops, a line per loop and one for each body."""
    lines, body = [], []
    depth = 0
    sizes = dict(re.findall(r"(%\d+) = arith.constant (\d+) : index", text))
    for line in text.splitlines():
        loop = re.search(r"scf.for (%\d+) = %\d+ to (%\d+)", line)
        word = re.search(r"\.(\w+) ", line)
        if loop:
            lines.append("  " * depth + f"for {sizes[loop[2]]}:")
            depth += 1
        elif line.strip() == "}" and depth:
            if body:
                lines.append("  " * depth + " ".join(body))
                body = []
            depth -= 1
        elif depth and word and word[1] in WORDS:
            body.append(word[1].removesuffix("imumf").removesuffix("f"))
    return lines


def wrapped(line, width=30):
    """A long body on several lines."""
    indent = len(line) - len(line.lstrip())
    rows = [""]
    for word in line.split():
        if len(rows[-1]) + len(word) + indent > width:
            rows.append("")
        rows[-1] += f"{word} "
    return [" " * indent + row for row in rows]


def moved_by(lines):
    """Bytes that loops load and store."""
    total, sizes = 0, []
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        if line.endswith(":"):
            sizes[depth:] = [int(line.split()[1][:-1])]
        else:
            touched = line.count("load") + line.count("store")
            total += 4 * touched * math.prod(sizes[:depth])
    return total


def tensor_bytes(module):
    """Bytes of what each operation reads and writes."""
    return sum(
        4 * math.prod(value.type.get_shape())
        for op in lab.operations(module)
        for value in (*op.operands, *op.results)
    )


module = mlir.optimise(mlir.from_graph(capture(mlp, *inputs)))
tensors = tensor_bytes(module)
lowered = mlir.lower(module)
left = [
    line.strip() for line in lowered.stage("lab").text.splitlines() if "lab." in line
]
right = short(lowered.stage("scf").text)
owner, owners = -1, []  # the nests: zeros, the product, the rest
for line in right:
    owner += not line.startswith(" ")
    owners.append(palette.blue if owner < 2 else palette.vermillion)

fig, (a, b) = plt.subplots(1, 2, figsize=(5.0, 3.9), width_ratios=(1, 1.2))
rows = [
    (part, color)
    for line, color in zip(right, owners, strict=True)
    for part in wrapped(line)
]
for row, (part, color) in enumerate(rows):
    b.barh(-row, 0.03, 1, left=0, color=color)
    b.text(0.05, -row, part, family="monospace", fontsize=9, va="center_baseline")
for line, color in zip(left, (palette.blue, palette.vermillion), strict=True):
    own = [row for row, (_, each) in enumerate(rows) if each == color]
    a.barh([-row for row in own], 0.04, 1, left=0, color=color)
    words = re.match(r".*(lab\.\w+) (.*) : .*-> (.*)", line).groups()
    for row, word in enumerate(words):
        at = sum(own) / len(own) + row - 1
        a.text(0.08, -at, word, family="monospace", fontsize=9, va="center_baseline")
count = sum("for" in line for line in right)
for ax, title in ((a, f"lab: {len(left)} operations"), (b, f"scf: {count} loops")):
    ax.set(xlim=(0, 1), ylim=(-len(rows) - 1.8, 1))
    ax.set_title(title, fontsize=10)
    ax.axis("off")
touched = moved_by(right)
a.text(0, -len(rows) - 0.3, f"{tensors / 1e6:.1f} MB in tensors", fontsize=9)
b.text(0, -len(rows) - 0.3, f"{touched / 1e6:.0f} MB loaded, stored", fontsize=9)
b.text(0, -len(rows) - 1.3, f"{took['i, k, j'] * 1e3:.1f} ms on this CPU", fontsize=9)
print(f"the loops touch {touched / tensors:.0f} times the bytes of the tensors")
figure(
    fig,
    alt=(
        "The MLP on two levels, with a coloured bar beside lines that belong together."
        " Left lab.matmul in blue and lab.bias_gelu in red. Right loops: in blue two"
        " that store zeros and three that load, multiply, add and store; in red two"
        " with the arithmetic of bias and GELU in one body. Under each the bytes that"
        " are moved at this level, and under the loops their time."
    ),
)

# %% [markdown]
# On the left an operation reads and writes each tensor once; on the right a number is loaded as often as a loop needs it, and registers and caches have to catch that.
#
# Between levels a program is only rewritten, by **patterns**: an operation is matched, others take its place, and so on until no pattern fits (a *greedy* driver does that). A pattern may rely on one thing, that the program is valid: each use is dominated by its definition. With $\mathrm{pred}(b)$ for the blocks that may jump to $b$:
#
# $$\mathrm{Dom}(b) = \{b\} \cup \bigcap_{p \in \mathrm{pred}(b)} \mathrm{Dom}(p)$$
#
# So it may use whatever the old operation could use. The dominators form a tree, and [Cooper et al. 2001](http://citeseerx.ist.psu.edu/viewdoc/summary?doi=10.1.1.14.3249 "cooper2001simple") find it by guessing and correcting: two blocks go up the tree until they meet. Our own core (`ssa.py`) is tested on random programs: dominance, dead code, equal values and folding equal xDSL's, the number of phis equals LLVM's.
#
# ## Your turn
#
# A pattern on `lab`. Dimension i of a transpose's result is dimension `op.dims[i]` of its operand `op.x`, whose maker is `op.x.owner`: an operation, or the block, if it is an argument. A transpose that moves nothing is its operand; two are one.


# %%
def my_fold_transposes(op, rewriter):
    """True if it changed something, else False.

    rewriter.replace(op, [], [value]), or
    rewriter.replace(op, lab.TransposeOp.make(value, order=lab.dims(...)))
    """
    raise NotImplementedError("eight lines of yours")


your_turn(check.fold_transposes, my_fold_transposes)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(op, rewriter):
    if op.dims == tuple(range(len(op.dims))):
        rewriter.replace(op, [], [op.x])
        return True
    inner = op.x.owner
    if not isinstance(inner, lab.TransposeOp):
        return False
    order = lab.dims(*(inner.dims[dim] for dim in op.dims))
    rewriter.replace(op, lab.TransposeOp.make(inner.x, order=order))
    return True


your_turn(check.fold_transposes, one_answer)


# %% [markdown]
# This is the first pattern of [MLIR's Toy tutorial](https://mlir.llvm.org/docs/Tutorials/Toy/Ch-3/ "mlir2026toy"), which says that it is trivial to match on such a level and hard for LLVM. So we ask LLVM, for a chip that is named. (Passes and bytes are those of the text that LLVM gets. In its instructions both loops are still there, and no `memcpy`.)
#
# A pattern may also decide what is computed first. A chain of products is the textbook's case: [Cormen et al. 2022](https://mitpress.mit.edu/9780262046305/introduction-to-algorithms/ "cormen2022introduction") give 15,125 multiplications for the best order of six matrices. `CheapestOrder` is that algorithm as a pattern. Another order rounds differently, so it runs only when asked for.


# %%
def turned_twice():
    module, block = lab.program([(100, 60)], [(100, 60)])
    value = block.args[0]
    for _ in range(2):
        op = lab.TransposeOp.make(value, order=lab.dims(1, 0))
        block.add_op(op)
        value = op.result
    lab.finish(block, value)
    return module


for name, module in (
    ("as loops", turned_twice()),
    ("after the pattern", mlir.optimise(turned_twice())),
):
    lowered = mlir.lower(module)
    code = machine.assembly(lowered.stages[-1].text, "x86-64 with AVX2")
    print(
        f"{name:18} {lowered.passes} passes over memory,",
        f"{lowered.buffers.arena:6,} bytes between,",
        f"{len(mlir.instructions(code)):4} instructions,",
        "memcpy" if "memcpy" in code else "no memcpy",
    )
count, order = mlir.cheapest([30, 35, 15, 5, 10, 20, 25])
print(f"a chain of six: {count:,} multiplications, {order}")

# %% tags=["hide-cell"]
copy_guess.settle("two transposes")

# %% [markdown]
# ## The code
#
# An operation in xDSL is a class. All of ours share one verifier: the type that is written must be the one that follows from the operands.

# %% tags=["hide-cell"]
show(lab.LabOp, lab.MatmulOp, ssa.immediate_dominators, ssa.meeting)

# %% [markdown]
# | step | file | what it must get right |
# |---|---|---|
# | import | `importing.py` | nine operations of the graph are one GELU |
# | patterns | `patterns.py` | not where somebody else reads the value between |
# | lowering | `to_linalg.py` | a trait for all elementwise operations; maps for broadcasting |
# | bufferisation | `bufferise.py` | a destination that is read later is copied |
# | last step | `to_llvm.py` | types change, too: an index is i64, a buffer a pointer |
#
# xDSL has no pass for the last step, so ours is here. Where no pattern fits, the error names the operation: *failed to legalise*.
#
# ## Against the libraries
#
# Broken programs, shown to three verifiers: ours, xDSL's, and MLIR's own, which is in IREE's wheel.


# %% tags=["hide-input"]
def broken_programs():
    """One for each kind."""
    late = ssa.Block([ssa.Value()])
    y = ssa.Value()
    late.ops = [ssa.Op("add", [y, y], ssa.Value()), ssa.Op("const", [], y, 1)]
    late.add("ret", y)
    one_way = branch()
    ssa_passes.promote(one_way)
    start, then, end = one_way.blocks
    end.arguments = []
    for block in (start, then):
        block.ops[-1].targets = [(to, []) for to, _ in block.ops[-1].targets]
    end.ops = [ssa.Op("ret", [then.ops[0].result])]
    few, target = ssa.Block([ssa.Value()]), ssa.Block([ssa.Value()])
    few.goto(target)
    target.add("ret", target.arguments[0])
    truth = ssa.Block([ssa.Value("i1")])
    truth.add("ret", truth.arguments[0])
    return {
        "used above its definition": ssa.Function([late]),
        "defined on one way of two": one_way,
        "a jump hands on too little": ssa.Function([few, target]),
        "a result of another type": ssa.Function([truth]),
    }


def verdict(verify, problem):
    """What a verifier says."""
    try:
        verify()
    except problem:
        return "refuses"
    return "takes it"


# %%
from iree.compiler import ir as mlir_itself

print(f"{'':28}{'ours':10}{'xDSL':10}MLIR")
for name, program in broken_programs().items():
    text = mlir.as_mlir(program)
    ours = verdict(lambda p=program: ssa.check(p), ssa.Invalid)
    xdsl = verdict(lambda t=text: lab.parse(t), (ParseError, VerifyException))
    with mlir_itself.Context():
        theirs = verdict(
            lambda t=text: mlir_itself.Module.parse(t), mlir_itself.MLIRError
        )
    print(f"{name:28}{ours:10}{xdsl:10}{theirs}")

# %% [markdown]
# xDSL 0.74 checks each operation, and neither whether definitions dominate uses nor what a jump hands on. It is made for trying things out, and MLIR reads the same text. So every program that we write at `linalg`, `memref`, `scf` and `cf` is given to MLIR in the tests.
#
# ## Write an operation, lower it, run it
#
# SwiGLU: $\operatorname{silu}(g) \cdot u$. A class with a rule for shapes is the whole definition; a body of four lines is the way down. Everything below knows only arithmetic. The line with arrows counts the operations at each level. LLVM makes code of the last text for any chip that it knows; the cell ends with the product's multiplication on six of them, none of which needs to be here (with √ in place of exp, for a GPU has no library to call).


# %%
@irdl_op_definition
class SwiGLU(lab.LabOp):
    name = "lab.swiglu"
    gate = operand_def(lab.TENSOR)
    up = operand_def(lab.TENSOR)
    result = result_def(lab.TENSOR)

    def shape(self, shapes):
        if shapes[0] != shapes[1]:
            raise TypeMismatch(f"gate {shapes[0]} and up {shapes[1]} differ")
        return shapes[0]


def swiglu(write, gate, up, _):
    bottom = write.add(write.number(1.0), write.exp(write.neg(gate)))
    return write.mul(write.div(gate, bottom), up)


class LowerSwiGLU(RewritePattern):
    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: SwiGLU, rewriter):
        build, shape = mlir.Linalg(rewriter), op.result.type.get_shape()
        maps = [mlir.broadcast_map(shape, shape)] * 3
        out = build.generic([op.gate, op.up], maps, build.empty(*shape), swiglu)
        rewriter.replace(op, [], [out])


def gated(T=32, d=24, f=40):
    module, block = lab.program([(T, d), (d, f), (d, f)], [(T, f)])
    x, gate, up = block.args
    block.add_op(g := lab.MatmulOp.make(x, gate))
    block.add_op(u := lab.MatmulOp.make(x, up))
    block.add_op(last := SwiGLU.make(g.result, u.result))
    lab.finish(block, last.result)
    return module


compiled = mlir.compile_module(gated(), more=[LowerSwiGLU()])
random = torch.Generator().manual_seed(0)
x, gate, up = (torch.randn(s, generator=random) for s in ((32, 24), (24, 40), (24, 40)))
wanted = F.silu(x @ gate) * (x @ up)
compare(compiled(x, gate, up)[0], wanted, "machine code of lab.swiglu", tol=1e-4)
try:
    SwiGLU.make(*lab.program([(2, 3), (2, 4)], [])[1].args)
except TypeMismatch as refusal:
    print("refused:", refusal)
print(" → ".join(f"{stage.name} {stage.operations}" for stage in compiled.stages))

MULTIPLY = r"v?mulps|fmul(\.s)?|mul\.rn\.f32|v_(pk_)?mul_f32"
text = mlir.lower(gated(), more=[LowerSwiGLU()]).stages[-1].text
text = text.replace("llvm.exp", "llvm.sqrt")  # a GPU has no library to call for exp
for target in mlir.TARGETS:
    code = mlir.instructions(machine.assembly(text, target))
    line = next(line for line in code if re.match(rf"({MULTIPLY})\s", line))
    print(f"{target:17} {' '.join(line.split())[:44]}")

# %% [markdown]
# ## The experiment
#
# What does each level decide? The same two functions, three ways: every operation of the captured graph lowered as it stands; with names (GELU, softmax) given back; and fused by patterns. A pass goes once over a tensor. *In tensors* is what all operations read and write, *between* is what all buffers between operations take, the *arena* what they take when those that are not needed at one time share bytes.

# %% tags=["hide-input"]
FUNCTIONS = {"mlp": mlp, "attention_row": attention_row}
rows = []
for name, function in FUNCTIONS.items():
    arguments = example_inputs(name)
    graph = capture(function, *arguments)
    for way in ("as captured", "with names", "fused"):
        module = mlir.from_graph(graph, raising=way != "as captured")
        mlir.optimise(module, fuse=way == "fused")
        count, moved = len(lab.operations(module)), tensor_bytes(module)
        made = mlir.compile_module(module)
        error = (made(*arguments)[0] - function(*arguments)).abs().max()
        assert error < 1e-4
        rows.append((name, way, moved, made, arguments))
        size = made.buffers
        print(
            f"{name:14}{way:12}{count:3} operations, {made.passes:2} passes,",
            f"{size.alone / 1024:7,.1f} kB between, arena {size.arena / 1024:7,.1f} kB",
        )

# %% tags=["hide-input", "nbval-ignore-output"]
for name, way, moved, made, arguments in rows:
    took_now = seconds(made, *arguments, repeat=5)
    print(
        f"{name:14}{way:12}{moved / 1024:8,.1f} kB in tensors {took_now * 1e3:6.2f} ms"
    )

ours = [row for row in rows if row[0] == "mlp"]
fig, (a, b) = plt.subplots(1, 2, figsize=(5.0, 2.5), sharey=True)
ways = [way for _, way, *_ in ours]
a.barh(ways, [made.passes for *_, made, _ in ours], color=palette.blue)
b.barh(ways, [made.buffers.alone / 1024 for *_, made, _ in ours], color=palette.sky)
b.barh(
    ways,
    [made.buffers.arena / 1024 for *_, made, _ in ours],
    0.4,
    color=palette.vermillion,
    label="arena",
)
a.set_xlabel("passes")
b.set_xlabel("kB (red: arena)")
a.invert_yaxis()
figure(
    fig,
    alt=(
        "The MLP, three ways. Passes over tensors: 12 as captured, 4 with names, 3"
        " fused. Buffers between: 2,560, 512 and 256 kB; the arena: 1,024, 512 and 256."
    ),
)

# %% [markdown]
# The MLP's passes fall to a quarter, and the bytes between its operations to a tenth. The time moves little, if at all: at this size everything stays in the cache, and the product and `tanh` take the time, whoever stores between them. The order of loops, which is not in this table at all, decided far more. So decide where it matters, and measure.
#
# **Now IREE**, a real compiler made of MLIR. It reads our text at `linalg`. Its dialect `flow` cuts the program into dispatches, which will be kernels. Our front end's rule of fusion (lesson 02) makes its own cut of the same graph.

# %%
arguments = example_inputs("attention_row")
graph = capture(attention_row, *arguments)
texts = {}
for way, names, apart in (
    ("as captured", False, True),
    ("named, softmax loop by loop", True, True),
    ("named, two loops as one", True, False),
):
    module = mlir.optimise(mlir.from_graph(graph, raising=names))
    texts[way] = str(mlir.to_linalg(module, apart=apart))
    cut = iree.dispatches(iree.stage(texts[way], "flow"))
    shown = " ".join(re.match(r"[a-z]+", each)[0] for each in cut)
    print(f"{way:28} {len(cut)}: {shown}")
result = iree.run(texts[way], *arguments)[0]
compare(result, attention_row(*arguments), "the last, run by IREE", tol=1e-4)
kernels = front_end.fuse(front_end.optimise(graph))
print(f"{'our front end':28} {len(kernels)}:", ", ".join(map(str, kernels)))

# %% tags=["hide-cell"]
dispatch_guess.settle(
    len(iree.dispatches(iree.stage(texts["named, two loops as one"], "flow")))
)

# %% [markdown]
# IREE 3.13 knows a softmax by its form: a maximum, a difference, an exponential, a sum, a quotient, each a loop of its own. It gives it back its name, and has one good kernel for it. We helped by writing difference and exponential in one body, and the form was gone. **A level that is left too early takes its knowledge with it.** This is why dialects keep names as long as they are of use. IREE itself leaves a power so: where the exponents stand in a tensor it becomes $\exp(y \log x)$, and $(-2)^2$ is NaN.
#
# (Our front end needs two kernels, since its rule asks only whether operations go along rows.)
#
# ## Stage by stage
#
# | stage | what is decided there |
# |---|---|
# | flow | what is one kernel |
# | stream | when it runs, where its buffers lie |
# | hal | calls of a driver; kernels become binaries |
# | vm | the calls, as instructions of a small machine |
#
# Below, how many operations of each dialect a stage leaves; `linalg` lives until the kernels are made of it, and each stage's own dialect is gone in the next. Then the MLP for three devices that are not here. A compiler needs no device: for NVIDIA it writes PTX, an assembly text that the driver translates; for AMD a code object, an ELF file as on Linux; for Vulkan SPIR-V. What is in them can be read, and not run.

# %% tags=["hide-input"]
text = texts["as captured"]
for name in iree.STAGES:
    counted = iree.counts(iree.stage(text, name))
    known = {k: v for k, v in counted.items() if k in ("linalg", *iree.STAGES)}
    print(f"{name:6}", "  ".join(f"{dialect} {n}" for dialect, n in known.items()))

small_graph = capture(mlp, *example_inputs("mlp", T=8, d=4, f=6))
module = mlir.optimise(mlir.from_graph(small_graph))
text = str(mlir.to_linalg(module))
for device, (_, _, ending) in iree.DEVICES.items():
    kernel = iree.for_device(text, device)
    (data,) = kernel.files.values()
    words = {"ptx": r"\.target \w+", "hsaco": "gfx942", "spv": "GLCompute"}
    found = re.search(words[ending], kernel.listing)
    print(f"{device:21} {ending:6} starts with {data[:4]!r:21} {found[0]}")

# %% [markdown]
# ## Play
#
# One product, level by level; the line that multiplies is blue.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
LEVELS = mlir.lower(mlir.optimise(mlir.from_graph(small_graph))).stages


TYPES = r" : \(.*| : \w+(?=\})| : [^)]*| -> .*|\(tensor.*|inbounds |\{indexing.*"


def excerpt(stage, around=6, width=46):
    """The lines about the product: (line, whether it multiplies)."""
    lines = [re.sub(TYPES, "", line) for line in stage.text.splitlines()]
    lines = [re.sub(r"  +(?=0x)", " ", line.replace('"', "")) for line in lines]
    at = next(i for i, line in enumerate(lines) if re.search("matmul|mulf|fmul", line))
    shown = range(max(0, at - around), min(at + around, len(lines)))
    skipped = r"builtin|func\.|^\s*\}|^\s*$|constant"
    shown = [i for i in shown if not re.search(skipped, lines[i])]
    margin = min(len(lines[i]) - len(lines[i].lstrip()) for i in shown)
    return [(lines[i][margin:][:width], i == at) for i in shown]


def draw(level: int):
    stage = LEVELS[level]
    fig, ax = plt.subplots(figsize=(4.6, 3.6))
    for place, (line, hit) in enumerate(excerpt(stage)):
        style = {"color": palette.blue, "weight": "bold"} if hit else {}
        ax.text(0, -place, line, family="monospace", fontsize=9, **style)
    ax.set(xlim=(0, 1), ylim=(-13, 1))
    ax.set_title(f"{stage.name}: {stage.operations} operations in all", fontsize=10)
    ax.axis("off")
    return fig


def told(level: int) -> str:
    stage = LEVELS[level]
    lines = "; ".join(line.strip() for line, hit in excerpt(stage) if hit)
    return (
        f"the MLP at {stage.name}, {stage.operations} operations; its product: {lines}"
    )


def missing(level: int) -> str:
    names = [stage.name for stage in LEVELS]
    if names[level] == "memref":
        return ""
    early = level < names.index("memref")
    return f"{names[level]} has {'no places yet' if early else 'had them before'}"


explore(
    draw,
    alt=told,
    title="From operations to instructions",
    challenge="Stop at the first level that says where a number lies in memory.",
    missing=missing,
    start={"level": 0},
    level=list(range(len(LEVELS))),
)

# %% [markdown]
# ## At scale
#
# The same steps from a shell, for a card that is not here; `--compile-to=` stops at a stage and prints it.
#
# ```bash
# iree-compile model.mlir --iree-hal-target-backends=cuda --iree-cuda-target=sm_90 -o model.vmfb
# iree-compile model.mlir --iree-hal-target-backends=llvm-cpu --compile-to=flow -o -
# iree-opt model.mlir --canonicalize --cse
# ```
#
# ## What to keep
#
# ```python
# class Fuse(RewritePattern):
#     @op_type_rewrite_pattern
#     def match_and_rewrite(self, op: lab.GeluOp, rewriter):
#         if isinstance(op.x.owner, lab.AddBiasOp) and read_once(op.x):
#             rewriter.replace(op, lab.BiasGeluOp.make(op.x.owner.x, op.x.owner.b))
# ```
#
# **Use it** where you have operations that a general compiler does not know, or a chip that none knows: one dialect and one lowering, and the rest is there. **Not** for one kernel: Triton (lesson 06) is shorter.
#
# <details><summary>Two branches compute the same product. Why may common subexpression elimination (CSE) not merge them?</summary>
#
# Neither block dominates the other, so neither value may be used in the other. It could be computed once before the branch; that is another pass (hoisting).
#
# </details>
#
# <details><summary>When does bufferisation have to copy?</summary>
#
# When an operation would write into a buffer whose old value somebody reads later, or which belongs to the caller.
#
# </details>
#
# <details><summary>Why does a greedy driver end?</summary>
#
# Because each pattern makes something smaller: operations, products of a transpose, multiplications. A pattern that turns a + b into b + a makes nothing smaller, and the driver would turn it forever.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/08-compilers/05-mlir.ipynb).
#
# Further reading: [Lattner et al. 2021](https://arxiv.org/abs/2002.11054 "lattner2021mlir") for MLIR; [Fehr et al. 2025](https://arxiv.org/abs/2311.07422 "fehr2025sidekick") for xDSL; [Cytron et al. 1991](https://doi.org/10.1145/115372.115320 "cytron1991efficiently") for phis and frontiers.
