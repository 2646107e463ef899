# %% [markdown]
# # Front end
#
# PyTorch runs a function one operation at a time, and each writes its result to memory for the next to read. A compiler sees the whole function first. Its front end turns it into a graph, removes what is not needed, and decides
# which operations run together, so that most results never reach memory. Here you build one that you can read in an evening, and measure what it saves. At the end you own the rule of fusion.

# %% tags=["hide-input"]
import time
import warnings

import torch
import torch.nn.functional as F

from llmlab.checks.compilers.front_end import check
from llmlab.compilers import front_end
from llmlab.compilers.front_end import (
    CannotCapture,
    capture,
    compile_graph,
    fuse,
    one_by_one,
    traffic,
)
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
from llmlab.models import real_model

# %% [markdown]
# ## What it costs
#
# This part has one function, $\operatorname{GELU}(x w + b)$, and takes it from Python to machine code. The GELU alone is nine operations. Run one by one on a tensor of 34 MB, each reads one or two tensors and writes one. What runs in one go, with its results written at the end, is a **kernel**; here each operation is one:


# %%
def gelu(x):
    """The tanh form: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return 0.5 * x * (1 + torch.tanh(0.7978846 * (x + 0.044715 * x * x * x)))


x = torch.randn(2048, 4096)
graph = capture(gelu, x)
moved = traffic(one_by_one(graph))
needed = 2 * x.nbytes
print(f"one by one: {len(graph.work)} operations, {moved / 1e6:,.0f} MB moved")
print(f"needed: read x, write the result: {needed / 1e6:.0f} MB")
print(f"{moved / needed:.0f} times as much")

# %% [markdown]
# ## Predict
#
# If all nine ran in one pass over the tensor, in pieces that stay in the cache, how much faster would one core be? (The arithmetic stays the same, `tanh` included.)

# %%
speed_guess = predict("How many times as fast as PyTorch, one by one?", unit="times")
trace_guess = predict(
    "A function says `if x.sum() > 0`. What does torch.jit.trace do?",
    choices=("it refuses", "it keeps both ways", "it keeps the way of the example"),
)

# %% [markdown]
# ## By hand
#
# $y = \exp(2x)$ and $z = y + y / y_{\max}$, on a row of four floats, 16 bytes each:
#
# | operation | reads | writes |
# |---|---|---|
# | $a = 2x$ | 16 | 16 |
# | $y = \exp a$ | 16 | 16 |
# | $m = \max y$ | 16 | 4 |
# | $d = y / m$ | 16 + 4 | 16 |
# | $z = y + d$ | 16 + 16 | 16 |
# | **one by one** | **100** | **68** |
# | in one kernel that keeps the row | 16 | 16 |


# %%
def small(x):
    y = torch.exp(2 * x)
    return y + y / y.amax(-1, keepdim=True)


row = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
by_hand = capture(small, row)
print(by_hand)
print(
    "bytes one by one:", traffic(one_by_one(by_hand)), "fused:", traffic(fuse(by_hand))
)

# %% [markdown]
# ## The idea
#
# Four steps, and each is a function from a program to a program.
#
# 1. **Capture.** Run the function once on values that have a shape and no numbers. Every operation writes a line `%2 = add %0 %1`. Each value is written once (**static single assignment**), so a value may take another's place wherever both are the same.
# 2. **Simplify.** Remove what no result needs. Compute what is known. Merge what is equal. Apply rules of algebra. Let transposes wander into the products, which read them so at no cost.
# 3. **Fuse.** A kernel goes through its rows: a row is read, everything along it is computed, one result is written. It is named by its **root**, the last of its operations, whose value it writes. We go from the last operation to the first: an operation joins the kernel of its readers if all of them are in one kernel.
# 4. **Plan memory.** What is still written gets an offset in one arena; values that are not alive at one time share bytes.
#
# Let $\text{reads}_k$ be the values from outside that kernel $k$ reads, $\text{root}_k$ the one that it writes, and $|v|$ the bytes of $v$. What a program costs in memory traffic is
#
# $$Q = \sum_k \Big( |\text{root}_k| + \sum_{v \in \text{reads}_k} |v| \Big)$$
#
# and fusion makes the sum shorter. (Arithmetic stays: a program that computes much per byte gains nothing.)

# %% tags=["hide-input"]
COLORS = [palette.blue, palette.orange, palette.green, palette.vermillion]
COLORS += [palette.purple, palette.sky, palette.gray]


def listing(ax, graph, kernels, title, lit=None):
    """A line per operation, with the number of its kernel, and its colour."""
    of = {node: i for i, kernel in enumerate(kernels) for node in kernel.nodes}
    lit = lit or of
    words = dict(front_end.lines(graph))
    for place, node in enumerate(graph.work):
        name, rest = words[node].strip().split(" = ")
        shown = " ".join(rest.split()[: 1 + len(node.inputs)])
        color = COLORS[lit[node] % len(COLORS)]
        line = f"{name} = {shown}"
        ax.text(0.08, -place, line, family="monospace", va="center", fontsize=10)
        ax.barh(-place, 0.05, 0.85, left=0, color=color)
        number = {"ha": "center", "va": "center_baseline", "fontsize": 8}
        ax.text(0.025, -place, of[node] + 1, color="white", **number)
    size = f"{len(kernels)} kernels, {traffic(kernels) / 1e3:.0f} kB"
    ax.set_title(f"{title}\n{size}", fontsize=10)
    ax.set(xlim=(0, 1), ylim=(-max(9, len(graph.work)), 1))
    ax.axis("off")


inputs = example_inputs("attention_row", T=512, d=64)
attention = capture(attention_row, *inputs)
better = front_end.optimise(attention)
found = {node: i for i, kernel in enumerate(fuse(better)) for node in kernel.nodes}
# the first, a transpose, went into the product after it; the others kept their order
became = dict(zip(attention.work, [better.work[0], *better.work], strict=True))
lit = {node: found[after] for node, after in became.items()}
fig, (left, right) = plt.subplots(1, 2, figsize=(4.8, 3.7))
listing(left, attention, one_by_one(attention), "captured", lit)
listing(right, better, fuse(better), "optimised and fused")
figure(
    fig,
    alt=(
        "An attention row as two lists of operations, with the number of its kernel"
        " before each. Left nine operations in nine kernels; right eight in two:"
        " the first product with scaling and softmax, and the second product. Left each"
        " line has the colour of the kernel that it ends in."
    ),
)

# %% [markdown]
# The number before a line is that of its kernel; left and right have one colour where a line ends in one kernel. Names are given anew in each list, and inputs and constants have no line: %0 to %2 are $q$, $k$, $v$, and the division by 8 has become a product with ⅛.
#
# Two products cannot be in one kernel: the second reads each row of its input many times, once per column of its result, so that row must have been written. And a value with two readers is a question of its own. If both are in one kernel, it joins
# them. If they are in two, it is written once and read twice, unless its inputs are no larger than it is: then each kernel computes it again, and less is moved.
#
# Some operations have **effects**: they draw a random number, write to a log, or change an input. Nobody inside the program may read their value, and still they must happen, once each and in their order. No pass removes, merges or moves them.
#
# ## Your turn
#
# The simplest pass. `graph.nodes` are in order, `graph.results` must be computed (outputs, effects, new values of inputs), and each node has `inputs`. Return `front_end.Graph(inputs, nodes, outputs, updates)`: the nodes that a result needs, in their old order, and all inputs, whoever reads them.


# %%
def my_remove_dead(graph):
    """A new Graph(inputs, nodes, outputs, updates) without what no result needs."""
    raise NotImplementedError("seven lines of yours")


your_turn(check.remove_dead, my_remove_dead)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(graph):
    needed, waiting = set(graph.inputs), list(graph.results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.inputs
    kept = [node for node in graph.nodes if node in needed]
    return front_end.Graph(graph.inputs, kept, graph.outputs, graph.updates)


your_turn(check.remove_dead, one_answer)

# %% [markdown]
# ## The code
#
# Rules of algebra are data: a pattern, what takes its place, and whether it is exact for *every* float. $x - 0 = x$ is; $x + 0 = x$ is not, for $-0 + 0$ is $0$; nor is $x - x = 0$: $\infty - \infty$ is NaN. Rules that are not exact are used only when asked for ("fast math").

# %%
for rule in front_end.FAST_MATH:
    print(f"{rule.name:16} {'exact' if rule.exact else 'fast math'}")

# %% tags=["hide-cell"]
show(front_end.joins, front_end.merge_equal, front_end.key_of, front_end.plan)

# %% [markdown]
# Not every compiler asks. XLA joins the constants of $(x + c) - c$: under `jax.jit` (0.10.2) rounding to whole numbers by $c = 1.5 \cdot 2^{23}$ rounds nothing. torch.compile (2.13.0, on a CPU) drops a cast to bf16 and back, and $x$ less the rounded $x$ is 0; its option `emulate_precision_casts` keeps the cast.
#
# `merge_equal` needs one line of thought: nodes come in their order, and equal ones have been merged before, so two operations are the same when their inputs are the very same nodes. One dict finds whole trees that are equal. `choose_layout`
# uses that an elementwise operation does not care about the order of dimensions: it moves a transpose below it, again and again, until it meets its inverse, or a product that reads its second input transposed at no cost.
#
# | value | type | holds |
# |---|---|---|
# | `graph.nodes` | list of `Node` | each after those that it reads |
# | `node.type` | `Type` | shape and dtype, inferred from its inputs |
# | `kernels` | set of `Node` | the kernels of all readers, by their roots |
# | `offsets` | `Node` → int | bytes from the beginning of the arena |
#
# ## What a trace cannot see
#
# Tracing has one way through the function. Where the way depends on numbers, or where a tensor changes under a view of it, the program would be wrong without a word. So ours refuses.


# %%
def either(x):
    return x * 2 if x.sum() > 0 else x * 3


def under_a_view(x):
    y = x.view(-1)
    x += 1
    return y


example = torch.ones(2, 3)
for function in (either, under_a_view):
    try:
        capture(function, example)
    except CannotCapture as refusal:
        print(f"{function.__name__}: {str(refusal)[:62]} …")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    traced = torch.jit.trace(either, example)
print("torch.jit.trace on −1:", traced(-example)[0, 0].item(), "and it should be −3")
try:
    torch.fx.symbolic_trace(either)
except torch.fx.proxy.TraceError as refusal:
    print("torch.fx:", str(refusal)[:50], "…")

# %% tags=["hide-output"]
trace_guess.settle("it keeps the way of the example")

# %% [markdown]
# torch.compile looks at Python's bytecode instead, compiles up to the `if`, lets Python decide, and goes on: a **graph break**. It also guards what it took for granted, shapes and settings, and compiles anew when a guard fails. What ours takes for granted stands in the types of its inputs: a call with other shapes is refused, with a sentence that says which were captured.
#
# ## Against the libraries
#
# Every pass is tested on random programs: the same values, and never more traffic. Here are the same numbers as PyTorch's, and what onnxruntime makes of the very same graphs (`to_onnx`). It keeps a list of patterns that it has fused kernels for; what is not in the list stays apart.

# %%
import onnxruntime

onnxruntime.set_default_logger_severity(3)


def swiglu(x, gate, up):
    return F.silu(x @ gate) * (x @ up)


def rms_norm(x, gain):
    return x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + 1e-5) * gain


def turned(x, w):
    return (torch.tanh(x.mT) + (x * 2).mT).mT @ w.T / 4


random = torch.Generator().manual_seed(0)
shapes = {
    "swiglu": (swiglu, (64, 96), (96, 160), (96, 160)),
    "rms_norm": (rms_norm, (64, 96), (96,)),
    "turned": (turned, (64, 96), (32, 96)),
}
cases = {
    name: (function, [torch.randn(s, generator=random) for s in sizes])
    for name, (function, *sizes) in shapes.items()
}
cases["mlp"] = (mlp, example_inputs("mlp"))
cases["attention_row"] = (attention_row, example_inputs("attention_row"))


# %% tags=["hide-input"]
def fused_by_onnxruntime(graph, arguments):
    """How many nodes its optimised graph has, and what it computes."""
    import tempfile
    from pathlib import Path

    import onnx

    options = onnxruntime.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        session = onnxruntime.InferenceSession(
            front_end.to_onnx(graph).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        model = onnx.load(options.optimized_model_filepath)
    named = {f"in{i}": tensor.numpy() for i, tensor in enumerate(arguments)}
    result = torch.from_numpy(session.run(None, named)[0])
    return [node.op_type for node in model.graph.node], result


# %%
print(f"{'':14} captured  ours  onnxruntime, of these fused")
for name, (function, arguments) in cases.items():
    graph = capture(function, *arguments)
    program = compile_graph(graph)
    theirs, result = fused_by_onnxruntime(graph, arguments)
    special = sorted(
        {op for op in theirs if op in ("Gemm", "FusedMatMul", "QuickGelu")}
    )
    row = f"{name:14} {len(graph.work):8} {len(program.kernels):5} {len(theirs):12}"
    print(row, " ", *special)
    wanted = function(*arguments)
    found = torch.stack([program(*arguments)[0], result])
    compare(found, torch.stack([wanted, wanted]), "ours, onnxruntime's", tol=1e-4)

# %% [markdown]
# Counted are the operations that were captured, our kernels, and the nodes that onnxruntime keeps. It has kernels for a product with a bias (`Gemm`) and for one with a factor or a transpose (`FusedMatMul`). The tanh form of GELU it leaves in pieces (1.32.0): of the eleven operations of `mlp` ten nodes are left. Our rule knows no names, so it is
# indifferent to spelling; on the other hand, it has no fast kernel for anything.
#
# ## The experiment
#
# A block of SmolLM2-135M from its norm to its residual, with the real weights: RMSNorm, two products, SiLU, gate, the last product, and the sum. Traffic is counted for 256 tokens. Then the times on one core, ours and PyTorch's, of the GELU from above (all traffic) and of this block (nearly all arithmetic).

# %%
layer = real_model.load().model.layers[0]
weights = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
weights = [layer.post_attention_layernorm.weight, *weights, layer.mlp.down_proj.weight]
weights = [weight.detach() for weight in weights]


def block(h, gain, gate, up, down):
    x = rms_norm(h, gain)
    return h + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


h = torch.randn(256, 576, generator=random)
graph = capture(block, h, *weights)
program = compile_graph(graph)
apart = front_end.program_of(graph, one_by_one(graph))
compare(program(h, *weights)[0], block(h, *weights), "the block", tol=1e-4)
read = sum(weight.nbytes for weight in weights)
for name, each in (("one by one", apart), ("fused", program)):
    print(
        f"{name:11} {len(each.kernels):2} kernels, {each.traffic / 1e6:.1f} MB moved,"
    )
    without = f"{(each.traffic - read) / 1e6:4.1f} MB without weights"
    print(f"{'':11} {without}, arena {each.arena / 1e6:.1f} MB")


# %% tags=["hide-input"]
def seconds(function, *arguments, repeat=3):
    function(*arguments)
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - started)
    return min(times)


big = compile_graph(capture(gelu, x))
threads = torch.get_num_threads()
torch.set_num_threads(1)
gains = {}
for name, eager, ours, arguments in (
    ("GELU on 34 MB", gelu, big, (x,)),
    ("the block", block, program, (h, *weights)),
):
    gains[name] = seconds(eager, *arguments) / seconds(ours, *arguments)
of_part = {}
for name in ("mlp", "attention_row"):
    function, arguments = cases[name]
    captured = capture(function, *arguments)
    programs = {"one by one": front_end.program_of(captured, one_by_one(captured))}
    programs["fused"] = compile_graph(captured)
    of_part[name, "PyTorch"] = (None, seconds(function, *arguments, repeat=9))
    for how, each in programs.items():
        took = seconds(each, *arguments, repeat=9)
        of_part[name, how] = (each.traffic, took)
torch.set_num_threads(threads)

# %% tags=["nbval-ignore-output"]
for name, gain in gains.items():
    print(f"{name:14} {gain:.1f} times as fast as PyTorch, one by one")
for (name, how), (moved, took) in of_part.items():
    size = f"{moved / 1e6:.1f} MB" if moved else ""
    print(f"{name:14} {how:11}{size:7} {1e6 * took:6.0f} µs")

# %% tags=["hide-output", "nbval-ignore-output"]
speed_guess.settle(gains["GELU on 34 MB"], digits=1)

# %% [markdown]
# More than two thirds of the traffic is gone, with the same result, and the arena is half as large: what is never written needs no place. The weights are read in any case. What fusion is worth depends on what the time is spent on. The GELU moves an eleventh and is a few times as fast, not eleven: `tanh` itself takes its time, and our pieces are still torch calls. The block
# spends its time in products, which nobody has made faster; in pieces of few rows they are even a little slower. This is why compilers report large gains on small kernels and small gains on large models.
#
# The other lines are the part's two functions. Fused they move least, and PyTorch stays ahead: it has kernels for GELU and softmax that somebody wrote, and our kernel is still a torch call for each operation. A graph says what runs together, not in which loops: that is the next lesson.
#
# ## Play
#
# Pass by pass. Lines with one number run in one kernel. What no result reads any more is left out here; in the program it stands until the last pass.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
NAMES = ["captured", *(each.__name__ for each in front_end.PASSES)]
TO_PLAY = {"turned": cases["turned"], "rms_norm": cases["rms_norm"]}
stages = {}
for name, (function, arguments) in TO_PLAY.items():
    graphs = [capture(function, *arguments)]
    front_end.optimise(graphs[0], watch=lambda _, after, to=graphs: to.append(after))
    # what a pass has replaced still stands there until the last one
    stages[name] = [front_end.remove_dead(graph) for graph in graphs]


def draw(passes: int, program: str):
    graph = stages[program][passes]
    fig, ax = plt.subplots(figsize=(4.6, 3.7))
    listing(ax, graph, fuse(graph), f"{passes}: {NAMES[passes]}")
    return fig


def told(passes: int, program: str) -> str:
    graph = stages[program][passes]
    words = "; ".join(str(kernel) for kernel in fuse(graph))
    return f"{program} after {NAMES[passes]}: kernels {words}"


def missing(passes: int, program: str) -> str:
    if program != "turned":
        return "this is rms_norm: the question is about turned"
    costs = [traffic(fuse(graph)) for graph in stages["turned"]]
    drops = [costs[i] - costs[i + 1] for i in range(len(costs) - 1)]
    if passes == 1 + drops.index(max(drops)):
        return ""
    return f"{NAMES[passes]} saves {drops[passes - 1] / 1e3 if passes else 0:.0f} kB"


explore(
    draw,
    alt=told,
    title="From the captured program to the last pass",
    challenge="Stop after the pass that saves most traffic in the program turned.",
    missing=missing,
    start={"passes": 0, "program": "turned"},
    passes=list(range(len(NAMES))),
    program=list(TO_PLAY),
)

# %% [markdown]
# ## At scale
#
# torch.compile's front end (Dynamo captures, AOTAutograd traces the backward pass, Inductor fuses) prints the same things for your own model, with no change to it:
#
# ```bash
# TORCH_LOGS="graph_breaks,fusion,output_code" python train.py
# ```
#
# A front end must also be fast: half a layer was 20 operations above, and a model has dozens of layers. Every pass here looks at each node once. (These programs end in one kernel each: all their operations go along rows.)


# %% tags=["nbval-ignore-output"]
def deep(x, layers):
    for _ in range(layers):
        x = x + torch.tanh(rms_norm(x, 1.0) * 2.0) * 1.0
    return x


small_input = torch.randn(4, 8)
graphs = {
    layers: capture(lambda x, n=layers: deep(x, n), small_input)
    for layers in (250, 1000)
}
took = {}
for layers, graph in graphs.items():
    started = time.process_time()
    optimised = front_end.optimise(graph)
    found = fuse(optimised)
    took[layers] = time.process_time() - started
    print(f"{len(graph.work):6,} operations → {len(found):5,} kernels")
print(f"{len(graphs[1000].work):,} operations take {took[1000]:.2f} s")

# %% [markdown]
# Published gains have the same spread as ours. A reinforcement-learning environment, which is nearly all small operations, became up to 10.56 times as fast by other decisions of fusion
# in XLA ([Snider and Liang 2023](https://arxiv.org/abs/2301.13062 "snider2023operator")). For whole models, PyTorch 2's paper reports 2.27 times over eager mode for inference and 1.41 times for training,
# the geometric mean over more than 180 models on an A100 ([Ansel et al. 2024](https://docs.pytorch.org/assets/pytorch2-2.pdf "ansel2024pytorch")).
#
# ## What to keep
#
# ```python
# for node in reversed(graph.work):          # homes: operation → roots of its kernels
#     kernels = set().union(*(homes[user] for user in users[node]))
#     inside = kernels and node not in results and joins(node, users[node], kernels, with_product)
#     homes[node] = kernels if inside else {node}
# ```
#
# **Use it** where many small operations move large tensors: norms, activations, losses, optimisers. **Not** in the hope that products become faster, nor where shapes change with every call, for each is a new program.
#
# <details><summary>Why may a pass never merge two random draws?</summary>
#
# They look the same and are not: each takes the generator a step further. The same holds for anything that somebody outside sees.
#
# </details>
#
# <details><summary>An operation is read by two kernels. When is it computed in both?</summary>
#
# When its inputs are no larger than its result: writing it once and reading it twice would cost more than reading its input twice.
#
# </details>
#
# <details><summary>Why is x · 0 = 0 not a rule of every compiler?</summary>
#
# ∞ · 0 and NaN · 0 are NaN. The rule is right for real numbers, and wrong for floats. torch.compile (2.13.0) still has it where the 0 is an integer: `x * 0` is 0, `x * 0.0` is NaN.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/08-compilers/02-front-end.ipynb).
#
# Further reading: [Chen et al. 2018](https://arxiv.org/abs/1802.04799 "chen2018tvm") for rules of fusion by kinds of operations, on which ours is modelled; [Pisarchyk and Lee 2020](https://arxiv.org/abs/2001.03288 "pisarchyk2020efficient") for memory plans.
