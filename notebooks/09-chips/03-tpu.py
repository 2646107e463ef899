# %% [markdown]
# # TPU
#
# A TPU multiplies matrices in a grid of cells through which numbers march in step: a systolic array. Whether its multipliers work depends on shapes alone, and can be said for every cycle. Here you step through an array with your own matrices, count cycles as a simulator does, and see why one token takes as long as a hundred. At the end you can say what the brochure of a TPU leaves out.

# %% tags=["hide-input"]
import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from llmlab import chips as part
from llmlab.checks.chips.tpu import check
from llmlab.chips import tpu
from llmlab.chips.chips_and_roofline import ridge
from llmlab.chips.tpu import pallas
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
from llmlab.models.chips import chip
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# A TPU v5e has four arrays of 128 × 128 multipliers. How many of them work while LLaMA-7B writes for one user, if everything else were free?

# %%
mxu = tpu.Array(128, 128, "weight", double=True)
llama, small = preset("llama-7b"), preset("smollm2-135m")


def layer_cycles(config, tokens, array):
    return sum(run.cycles for run in tpu.layer_runs(config, tokens, array).values())


one = [*tpu.layer_runs(llama, 1, mxu).values()]
print(f"one token through a layer: {layer_cycles(llama, 1, mxu):,} cycles of one array")
print(f"its multipliers work {tpu.utilisation(one):.1%} of the time")

# %% [markdown]
# ## Predict

# %%
hundred = predict(
    "The same layer with 100 tokens at once: how many times as many cycles?",
    unit="times",
)
better = predict(
    "SmolLM2's matrices have sides of 192, 576 and 1,536. Which array uses more of its"
    " multipliers on a long prompt?",
    choices=("128 × 128", "256 × 256", "both the same"),
)

# %% [markdown]
# ## By hand
#
# Four cells hold $W = \begin{pmatrix}5&6\\7&8\end{pmatrix}$. $X = \begin{pmatrix}1&2\\3&4\end{pmatrix}$ comes from the left, its second column one cycle later. A cell multiplies what comes with its weight, adds the sum from above, hands the number to the right and the sum down.
#
# | cycle | at work | leaves |
# |---|---|---|
# | 0, 1 | – : the rows 7 8, then 5 6 come in from above | |
# | 2 | 1·5 | |
# | 3 | 3·5, 1·6, 5 + 2·7 | 19 |
# | 4 | 3·6, 15 + 4·7, 6 + 2·8 | 43, 22 |
# | 5 | 18 + 4·8 | 50 |
#
# Eight products in six cycles of four cells: a third of them worked.

# %%
X, W = np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7, 8]])
for cycle in tpu.cycles(tpu.Array(2, 2), X, W):
    print(cycle.number, len(cycle.works), "at work;", [v for *_, v in cycle.left])
Y, _ = tpu.product(tpu.Array(2, 2), X, W)
compare(torch.tensor(Y), torch.tensor(X @ W), "what has left", tol=0)

# %% [markdown]
# ## The idea
#
# Change the numbers, and step. Blue cells multiply. With *outputs* that stay, both matrices march and the sums wait; with a *second register* the next block of weights comes in while this one works. ([Kung 1982](https://doi.org/10.1109/MC.1982.1653825 "kung1982systolic") named such arrays after the heart: data pass many cells for each beat of the memory.)

# %% tags=["hide-input"]
X = np.array([[1, 2, 0], [3, 1, 2], [0, 4, 1], [2, 2, 5]])
W = np.array([[5, 6, 1], [7, 8, 2], [1, 0, 3]])
SIDE, CELL, TOP = 2, 58, 10


def array_trace(array: tpu.Array) -> Trace:
    """The cells on the left, what has left on the right, cycle by cycle."""
    right = 8 + SIDE * CELL + 30
    sums = np.zeros((len(X), W.shape[1]), dtype=int)

    def result(m, n, text="", kind="plain"):
        place = (right + n * 40, TOP + m * 30, 38, 28)
        return Mark(f"y{m}{n}", "cell", place, text, kind)

    def cell(r, c, text="", kind="plain", value=""):
        place = (8 + c * CELL, TOP + r * CELL, CELL - 2, CELL - 2)
        return Mark(f"p{r}{c}", "cell", place, text, kind, value=value)

    blank = [cell(r, c) for r in range(SIDE) for c in range(SIDE)]
    blank += [result(m, n) for m in range(len(X)) for n in range(W.shape[1])]
    out = [Step(tuple(blank), "An empty array, and an empty Y.")]
    worked = 0
    for now in tpu.cycles(array, X, W):
        marks = []
        for r in range(SIDE):
            for c in range(SIDE):
                x, w, total = now.x[r][c], now.weight[r][c], now.sum[r][c]
                kept = total if array.dataflow == "output" else w
                busy = (r, c) in now.works
                text = f"{x}·{w}" if busy else "" if kept is None else str(kept)
                kind = "blue" if busy else "pale-blue" if text else "plain"
                marks.append(cell(r, c, text, kind, f"sum {total}"))
        for m, n, value in now.left:
            sums[m, n] += value
            marks.append(result(m, n, str(sums[m, n]), "green"))
        worked += len(now.works)
        said = f"Cycle {now.number}: {len(now.works)} of {array.cells} cells multiply"
        said += f", {len(now.left)} sums leave." if now.left else "."
        so_far = f"{worked / (array.cells * (now.number + 1)):.0%}"
        facts = {"cycle": str(now.number), "used so far": so_far}
        out.append(Step(tuple(marks), said, facts=facts))
    height = TOP + max(SIDE * CELL, 30 * len(X)) + 8
    return Trace(Plane(right + 40 * W.shape[1] + 8, height, (CELL, CELL)), tuple(out))


steps(
    {
        "weights stay": array_trace(tpu.Array(SIDE, SIDE)),
        "outputs stay": array_trace(tpu.Array(SIDE, SIDE, "output")),
        "second register": array_trace(tpu.Array(SIDE, SIDE, double=True)),
    },
    title="X (4 × 3) times W (3 × 3) on four cells",
    start="first",
)

# %% [markdown]
# An array of $R \times C$ cells takes $W$ in blocks: $\lceil K/R \rceil \lceil N/C \rceil$ of them. A block comes in during $R$ cycles. Row $m$ of $X$ meets cell $(r, c)$ in cycle $R + m + r + c$, so the last of $M$ rows leaves the last cell in cycle $R + (M-1) + (R-1) + (C-1)$, and since cycles count from 0,
#
# $$T = \lceil K/R \rceil \lceil N/C \rceil\,(2R + C + M - 2) .$$
#
# With a second register only the first block pays for filling and the last for draining; between them a block costs its $M$ rows, or the $R$ cycles in which the next one comes in:
#
# $$T = \left(\lceil K/R \rceil \lceil N/C \rceil - 1\right) \max(M, R) + 2R + C + M - 2 .$$
#
# The array of TPU v1 worked so, with 256 × 256 cells ([Jouppi et al. 2017](https://arxiv.org/abs/1704.04760 "jouppi2017tpu")).
#
# ## Your turn
#
# Both formulas as a function. Blocks at the edge take as long as full ones.


# %%
def my_cycles(m, k, n, rows, columns, double):
    """Cycles of (m, k) times (k, n) with weights that stay."""
    raise NotImplementedError("five lines of yours")


your_turn(check.cycles, my_cycles)


# %% tags=["hide-cell"]
# One way to write it, and the first guess.
def one_answer(m, k, n, rows, columns, double):
    blocks = -(-k // rows) * -(-n // columns)
    one = 2 * rows + columns + m - 2
    return (blocks - 1) * max(m, rows) + one if double else blocks * one


your_turn(check.cycles, one_answer)
hundred.settle(layer_cycles(llama, 100, mxu) / layer_cycles(llama, 1, mxu), digits=2)

# %% [markdown]
# ## The code
#
# Twice, so that one can doubt the other: `registers.py` moves numbers from cell to cell and knows no formula; `array.py` has the formulas, and writes down which number each port asks for in each cycle without stepping. A skew is a stride there: in a table of cycles × ports, one port further and one cycle later is `ports + 1` numbers further.

# %% tags=["hide-cell"]
show(tpu.cycles, tpu.Run)

# %% [markdown]
# | value | shape | is |
# |---|---|---|
# | `run.cycles`, `run.utilisation` | | in closed form |
# | `run.busy` | (cycles) | cells at work |
# | `run.demands.x`, `.w`, `.y` | (cycles, ports) | place in the matrix, −1: idle |
#
# ## Against SCALE-Sim
#
# [SCALE-Sim](https://arxiv.org/abs/2504.15377 "raj2025scalesim") is what papers on such arrays use. Its reports for 14 shapes and arrays and three dataflows (`ws`, `os`, `is`: weights, outputs or inputs stay) are stored here; the tests also compare its tables of addresses, cycle by cycle.

# %%
stored = json.loads(
    (Path(part.__path__[0]) / "data" / "tpu_scale_sim.json").read_text("utf-8")
)
flows = {"ws": "weight", "os": "output", "is": "input"}
print("SCALE-Sim", stored["versions"]["scalesim"], "and ours")
names = ("cycles", "reads_x", "reads_w", "writes_y", "utilisation", "compute")
theirs, ours = [], []
for case in stored["cases"]:
    run = tpu.Run(tpu.Array(*case["array"], flows[case["flow"]]), *case["shape"])
    report = tpu.report(run)
    theirs.append([case[name] for name in names])
    ours.append([getattr(report, name) for name in names])
    if case["shape"] == [64, 64, 64]:
        print(f"64³ on 32 × 32, {case['flow']}: it says {case['cycles']},", end=" ")
        print(f"registers take {run.cycles}")
compare(torch.tensor(ours), torch.tensor(theirs), f"{len(ours)} reports", tol=1e-6)
with (Path(part.__path__[0]) / "data" / "tpu_scale_sim.csv").open() as file:
    lines = [*csv.DictReader(file)]
for flow in ("ws", "os"):
    ratios = [
        float(line["scale_sim_ms"]) / float(line["ours_ms"])
        for line in lines
        if line["flow"] == flow
    ]
    low, middle, high = np.quantile(ratios, [0, 0.5, 1])
    print(
        f"{flow}: {middle:.0f} × faster ({low:.0f} to {high:.0f}, {len(ratios)} runs)"
    )

# %% [markdown]
# `tpu.report` counts as it does, and that differs from what registers do in four places. It prints the number of the last cycle, one less than there are. With outputs that stay, its results leave in no time: 32 cycles per block are missing, and a result is written before its last product. There it also counts rows + columns more writes per block than there are results. And its "compute utilisation" with weights that stay divides by cycles that are $C - 1$ too many per block. The second decides a ranking: SCALE-Sim has the product above done a fifth sooner if outputs stay, where registers take 632 cycles either way. The last lines say how many times faster ours gives the same figures of 64³, in turn on one core, measured on a quiet machine and stored (on a busy one the ratios are larger); SCALE-Sim also follows three memories, which ours does not, and that takes most of its time.
#
# ## The experiment
#
# The shapes of two real models, a layer of seven products, on the two sizes of array that TPUs have had. Above: one product of SmolLM2, cycle by cycle. Below: the whole layer.

# %% tags=["hide-input"]
big = tpu.Array(256, 256, "weight", double=True)
fig, (left, right) = plt.subplots(2, 1, figsize=(4.8, 5.6))
shades = {256: palette.blue, 128: palette.green, 32: palette.orange}
for tokens, color in shades.items():
    run = tpu.layer_runs(small, tokens, mxu)["self_attn.k_proj"]
    share = run.busy / mxu.cells
    left.plot(share, color=color, lw=1.2, label=f"{tokens} tokens")
left.set(xlabel="cycle", ylabel="cells at work", xlim=(0, 3000), ylim=(0, 1.02))
left.legend(fontsize=9, loc="upper right")
counts = [2**i for i in range(12)]
for config, name, style in ((llama, "LLaMA-7B", "-"), (small, "SmolLM2", "--")):
    for array, color in ((mxu, palette.blue), (big, palette.orange)):
        used = [
            tpu.utilisation([*tpu.layer_runs(config, t, array).values()])
            for t in counts
        ]
        label = f"{name}, {array.rows}²"
        right.plot(counts, used, style, color=color, label=label)
right.set_xscale("log", base=2)
right.set(xlabel="tokens at once", ylabel="of the multipliers", ylim=(0, 1.02))
right.legend(fontsize=9, loc="upper left")
figure(
    fig,
    alt=(
        "Above, SmolLM2's keys: with 32 tokens a quarter of the cells work, then an"
        " eighth where the matrix ends inside a block; with 128 tokens all, then half;"
        " with 256 the same, twice as long. Below: utilisation grows in"
        " proportion to the tokens up to 128 or 256, then is flat: near 1 for LLaMA-7B,"
        " at 0.86 and 0.69 for SmolLM2."
    ),
)
for config, name in ((llama, "LLaMA-7B"), (small, "SmolLM2")):
    for array in (mxu, big):
        runs = [*tpu.layer_runs(config, 1, array).values()]
        half, most = (tpu.tokens_for(config, array, share) for share in (0.5, 0.9))
        print(
            f"{name:8} {array.rows}²: one token {tpu.utilisation(runs):5.1%}, at best"
            f" {tpu.mapping(runs):5.1%}; half of that from {half} tokens,"
            f" 90% from {most}"
        )

# %% tags=["hide-cell"]
better.settle("128 × 128")

# %% [markdown]
# Up to $R$ rows a block costs $R$ cycles, whatever comes through: **the time does not depend on the number of tokens, and the multipliers at work do**. That is where 100 tokens for the price of one come from. From $R$ on, what is lost is edges: 576 is four and a half blocks of 128, two and a quarter of 256. LLaMA-7B's 4,096 and 11,008 divide by both, and this is no accident of its authors.
#
# But is it the array for which a decode step waits? Its weights must come out of HBM, too. And a peak is 2 × arrays × cells × clock, so Google's printed peaks and numbers of arrays imply a clock:

# %%
v5e, v6e = chip("TPU v5e"), chip("TPU v6e")
for each in (v5e, v6e):
    made = tpu.GENERATIONS[each.name]
    tokens = ridge(each.speed("bf16"), each.bandwidth)  # two FLOP, two bytes
    fed = made.units * made.side * 2 * made.clock  # a row of weights per cycle
    print(
        f"{each.name}: arrays full from {made.side} tokens, HBM fast enough from"
        f" {tokens:.0f}; the arrays could load {fed / each.bandwidth:.1f} × as fast"
    )
print()
for made in tpu.GENERATIONS.values():
    print(
        f"{made.name:8} {made.peak / 1e12:6,.0f} TFLOP/s = 2 × {made.units} ×"
        f" {made.side}² × {made.clock / 1e9:.2f} GHz"
    )

# %% [markdown]
# The last figure of the first two lines compares the weights that the arrays can take in with those that HBM delivers. So HBM is the first limit, the array the second: a batch that no longer waits for memory is also large enough for the array. Where weights stay in the chip's own memory, VMEM, only the second one is left.
#
# Now the clocks. 1.50 GHz is what Google's authors say of the v5e ([Austin et al. 2025](https://jax-ml.github.io/scaling-book/tpus/ "austin2025tpus")). Then the [v6e](https://docs.cloud.google.com/tpu/docs/v6e "google2025tpuv6e"): two arrays of 256² would need 3.50 GHz, and JAX's table for the [TPU7x](https://github.com/jax-ml/jax "jax2026tpuinfo") implies 4.40. Either a cell makes two products per clock or there are more cells; an [earlier version](https://cloud.google.com/tpu/docs/v6e?authuser=9 "google2024tpuv6e") of the v6e page had four arrays. Ask, before you compute a utilisation: your denominator depends on it. (TPU v1's operations are int8.)
#
# ## What XLA makes of shapes
#
# A vector register holds 8 × 128 numbers. XLA, the compiler under JAX, lays arrays out in memory in such tiles, filled up ([Google](https://cloud.google.com/tpu/docs/performance-guide "google2025tpuperformance")). What a tile adds, in float32; and what JAX hands to XLA for a TPU, which needs none here:

# %%
for what, shape in {
    "one token, 4096 wide": (1, 4096),
    "SmolLM2's keys, head last": (3, 1000, 64),
    "the same, tokens last": (3, 64, 1000),
    "SmolLM2's W of k_proj": (576, 192),
    "LLaMA-7B's W of down_proj": (11008, 4096),
}.items():
    plain = 4 * int(np.prod(shape))
    more = tpu.padded_bytes(shape, 4) / plain
    print(f"{what:26} {shape!s:14} → {tpu.padded(shape)!s:14} {more:5.2f} × the bytes")

jax.config.update("jax_num_cpu_devices", 8)  # for the ring below
mlp = jax.jit(lambda x, w: jax.nn.relu(x @ w))
shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 576), (576, 1536))]
lowered = jax.export.export(mlp, platforms=["tpu"])(*shapes)
for line in lowered.mlir_module().splitlines():
    if line.strip().startswith("%") and ("dot" in line or "max" in line):
        print(line.split(" loc(")[0].strip())

# %% [markdown]
# This is StableHLO, the language in which XLA gets a program. It has shapes, and no word of tiles, blocks or cycles: they are the compiler's to choose.
#
# ## Pallas: saying it oneself
#
# A Pallas kernel names what XLA would choose: a *grid* of steps, a *BlockSpec* per matrix (which block a step needs), and, by hand, *DMA*: copies that run beside the work, each with a semaphore to wait for. JAX can interpret kernels as TPU cores would run them. Its interpreter keeps a *vector clock* for each core and each copy: not time, but what must have happened before. It runs `pallas.matmul`, a product over a grid whose blocks are double-buffered, and counts; then a kernel that adds up blocks, copies by hand, and forgets to wait. The interpreter may carry a copy out when it is started, or when somebody waits for it; hardware promises neither.

# %%
rng = np.random.default_rng(0)
x, w = (rng.standard_normal(s).astype(np.float32) for s in ((32, 256), (256, 128)))
y, seen = pallas.matmul(x, w, block_m=16, block_n=128, block_k=128)
compare(torch.tensor(y), torch.tensor(x @ w), "the product", tol=1e-4)
loads = pallas.matmul_loads(32, 128, 256, 16, 128, 128)
print(
    "blocks of x, w, y:", seen.loaded("x"), seen.loaded("w"), seen.stored("y"), end=""
)
print("; by the grid:", *(count for count, _ in loads.values()))

blocks = rng.standard_normal((16, 128)).astype(np.float32)
wanted = blocks[:8] + blocks[8:]
for dma in ("on_wait", "eager"):
    got, seen = pallas.sum_blocks(blocks, 8, bug="no wait", dma=dma)
    right = np.allclose(got, wanted)
    print(f"{dma:8} right: {right!s:6} races: {len(seen.races)}")
print(*seen.races[0], sep="\n  and ")

# %% [markdown]
# Each of the two block rows of $y$ loads all of $W$ again: the grid decides the traffic. Of the two careless runs the second is right, and it must frighten: the sum came out, and nothing orders the read and the write that it is made of. Only the vector clocks show it, and they name both lines. (In the first run nobody waits, so nothing is copied: no race, but the sum is NaN, which is hard to miss.)
#
# ## Chips on a torus
#
# TPUs have links to their neighbours only, along two or three axes whose ends are joined. An all-gather over a ring of $n$ goes both ways: $(n-1)/2$ shards per link and direction. Over several axes the bytes are cut, and each part begins with another axis. With $w$ bytes/s per link and direction, $d$ equal axes and $N$ chips an all-reduce of $V$ bytes takes
#
# $$t = \frac{V (1 - 1/N)}{d\,w} \quad\text{plus hops},$$
#
# which is also the least that any algorithm can take. First on four simulated TPUs, by a ring in Pallas that sends in one direction; then pods:

# %%
values = rng.standard_normal((4, 256)).astype(np.float32)
sums, seen = pallas.ring_all_reduce(values)
compare(torch.tensor(sums[3]), torch.tensor(values.sum(0)), "chip 3", tol=1e-5)
sent = sum(copy.bytes for copy in seen.sent)
print(f"sent {sent:,} bytes; 4 chips × 2 (1 − 1/4) × 1,024 = {4 * 2 * 3 * 1024 // 4:,}")
print(f"races: {len(seen.races)}\n")
for name, sides in (
    ("TPU v5e", (16, 16)),
    ("TPU v6e", (16, 16)),
    ("TPU v4", (16,) * 3),
):
    pod = tpu.Torus.of(name, *sides)
    links = pod.chips * tpu.PORTS[name] * pod.link
    got = pod.chips * 1e9 / tpu.all_reduce_seconds(pod, 1e9)
    print(
        f"{name}: bisection {pod.bisection / 1e12:4.1f} TB/s; all links"
        f" {links / 1e12:,.1f}; summed in an all-reduce {got / 1e12:,.1f} TB/s"
    )
gradients = 2 * 6.7e9
for wrap in (True, False):
    pod = tpu.Torus.of("TPU v5e", 16, 16, hop=1e-6, wrap=wrap)
    took = tpu.all_reduce_seconds(pod, gradients) * 1e3
    print(
        f"gradients of 7B on 16 × 16 v5e, {'torus' if wrap else 'mesh '}: {took:.0f} ms"
    )

# %% [markdown]
# Google prints a bisection of [1.6](https://docs.cloud.google.com/tpu/docs/v5e "google2025tpuv5e"), [3.2](https://docs.cloud.google.com/tpu/docs/v6e "google2025tpuv6e") and [24 TB/s](https://docs.cloud.google.com/tpu/docs/v4 "google2025tpuv4") for these pods, and an "all-reduce bandwidth" of 51.2 TB/s, 102.4 TB/s and 1.1 PB/s. The first are ours (we get 23.0 for the v4). The second are all links added up: twice what a user sees, who gets a sum of $V$ bytes for $2V$ that are sent. Slices smaller than a pod have open ends on most axes, and take twice as long, as the mesh above. (A *twisted torus* joins the ends with an offset, which shortens ways in slices with unequal sides.)
#
# ## Play

# %% tags=["hide-input", "slider"]
TOKENS = [1, 16, 64, 128, 256, 1024]
SHORT = ("q", "k", "v", "o", "gate", "up", "down")


def shares(tokens: int, side: str) -> list[float]:
    array = tpu.Array(int(side), int(side), "weight", double=True)
    return [run.utilisation for run in tpu.layer_runs(small, tokens, array).values()]


def draw(tokens: int, side: str):
    fig, ax = plt.subplots(figsize=(4.8, 3))
    ax.bar(SHORT, shares(tokens, side), color=palette.blue)
    ax.set(ylim=(0, 1), ylabel="of the multipliers")
    ax.set_title(f"SmolLM2, {tokens} tokens, array of {side}²", fontsize=10)
    return fig


def told(tokens: int, side: str) -> str:
    worst, best = min(shares(tokens, side)), max(shares(tokens, side))
    return f"{tokens} tokens on {side}²: between {worst:.0%} and {best:.0%} are used"


def lacking(tokens: int, side: str) -> str:
    enough = [t for t in TOKENS if min(shares(t, side)) > 0.5]
    if side != "128":
        return "the question is about 128²"
    if tokens == enough[0]:
        return ""
    if tokens in enough:
        return "fewer are enough"
    return f"the least used product is at {min(shares(tokens, side)):.0%}"


explore(
    draw,
    alt=told,
    title="Which product wastes the array?",
    challenge="On 128²: the fewest tokens for which all products use over half.",
    missing=lacking,
    start={"tokens": 16, "side": "256"},
    tokens=TOKENS,
    side=["128", "256"],
)

# %% [markdown]
# ## At scale
#
# ```bash
# gcloud compute tpus tpu-vm create v5e --accelerator-type=v5litepod-256 \
#     --version=v2-alpha-tpuv5-lite --zone=us-west4-a
# XLA_FLAGS=--xla_dump_to=hlo python train.py    # layouts T(8,128), fusions
# ```
#
# On a TPU the profiler shows what no formula here counts: VMEM that is full, transposes between layouts, a vector unit that is slower than the array it feeds.
#
# ## What to keep
#
# ```python
# blocks = ceil(k / rows) * ceil(n / columns)
# cycles = (blocks - 1) * max(m, rows) + 2 * rows + columns + m - 2
# utilisation = m * k * n / (rows * columns * cycles)
# ```
#
# **Use it** to choose batch sizes, heads and widths before anybody trains. **Not** as a forecast: memory is the first limit of a decode step, and nobody publishes all of a TPU's clocks.
#
# <details><summary>Why do 100 tokens take as long as one?</summary>
#
# The next block of weights needs as many cycles as the array has rows. With fewer rows of X than that, the array waits for weights.
#
# </details>
#
# <details><summary>A vendor doubles the side of the array. Who gains nothing?</summary>
#
# Whoever has few tokens at once, since the time to load a block doubles as well, and whoever has widths that do not divide.
#
# </details>
#
# <details><summary>A kernel gives the right numbers. Has it no race?</summary>
#
# It may have one that was won. Ask whether something orders each write and each read of the same place.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/09-chips/03-tpu.ipynb).
#
# Further reading: [Samajdar et al. 2020](https://doi.org/10.1109/ISPASS48437.2020.00016 "samajdar2020scalesim"), SCALE-Sim's formulas; [Jouppi et al. 2023](https://arxiv.org/abs/2304.01433 "jouppi2023tpuv4"), the torus of the v4 and its optical switches; [Pallas on TPUs](https://docs.jax.dev/en/latest/pallas/tpu/pipelining.html "jax2026pallaspipelining").
