# %% [markdown]
# # Ascend and other accelerators
#
# Not every cluster is NVIDIA's. Huawei's Ascend has a unit for matrices, one for vectors, one for scalars, and queues that must be told to wait. Here you put tiles beside its matrix unit, find a race that no run shows, carry a Llama block from PyTorch to MindSpore and Paddle until the logits are equal, and write the file with which 16 NPUs find each other. At the end you own its memory layout.

# %% tags=["hide-input"]
import copy
import csv

import torch

from llmlab.checks.chips.ascend_and_other_accelerators import check
from llmlab.chips import ascend_and_other_accelerators as asc
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
from llmlab.models.chips import chip
from llmlab.models.presets import preset
from llmlab.parallelism.choosing import Job, Plan, planner, shapes
from llmlab.parallelism.choosing.machines import Machine

# %% [markdown]
# ## What it costs
#
# MindFormers trained LLaMA-7B on Ascend 910, 2,048 tokens at a time, at 1,229 tokens per second and NPU ([model card](https://github.com/mindspore-lab/mindformers/blob/09dc3c65e370123abf54d7ee373a028ce6f91d33/docs/model_cards/llama.md "mindformers2023llama")). The brochure says 256 TFLOP/s. What part of it was used?

# %%
printed = chip("Ascend 910").flops["fp16"]
llama7 = shapes.llama(preset("llama-7b"))
used = 1229 * shapes.token_flops(llama7, 2048)
print(f"{used / 1e12:.1f} of {printed / 1e12:.0f} TFLOP/s: {used / printed:.1%}")

# %% [markdown]
# Four fifths of what was paid for did something else. This lesson is about what.
#
# ## Predict

# %%
unit_guess = predict(
    "SmolLM2 reads 2,048 tokens on an Ascend 910. Which unit does its attention wait"
    " for?",
    choices=("the cube (products)", "the vector unit (softmax)", "neither: equal"),
)
wrong_guess = predict(
    "A Llama is ported, and one thing is left as the new framework has it. Nothing"
    " complains. What changes the logits most?",
    choices=(
        "epsilon 1e-6, not 1e-5",
        "RoPE's base 10,000, not 100,000",
        "square weights not transposed",
        "token 0 taken for padding",
    ),
)

# %% [markdown]
# ## By hand
#
# The cube takes 16 × 16 numbers at once, so these lie together in memory: a *fractal*. In **NZ** the fractals go column by column (N: the pen goes down first), the numbers within row by row (Z: it goes to the right first). With fractals of 2 × 2, of
#
# $$\begin{pmatrix} 0 & 1 & 2 & 3 \\ 4 & 5 & 6 & 7 \\ 8 & 9 & 10 & 11 \\ 12 & 13 & 14 & 15 \end{pmatrix}$$
#
# first comes the fractal 0 1 4 5, then the one *below* it, 8 9 12 13, then the right column. In ZZ the one to the right would be second.

# %%
x = torch.arange(16).reshape(4, 4)
for layout in asc.layout.ORDERS:
    print(layout, asc.layout.to_fractals(x, layout, 2, 2).flatten().tolist())

# %% [markdown]
# ## The idea
#
# One core, with the sizes and bytes per cycle that Huawei's toolkit CANN has in its own file for the 910 ([Ascend910A.ini](https://gitcode.com/W4termy/runtime/blob/master/src/platform/platform_config/Ascend910A.ini "cann2025ascend910a"); [Liao et al. 2021](https://doi.org/10.1109/HPCA51647.2021.00071 "liao2021ascend") describe the design). MTE1 to 3 are the queues that move data, M is that of the cube, V that of the vector unit:

# %% tags=["hide-input"]
BOXES = {  # name: x, y, colour
    "memory\n(all cores)": (0.0, 0.0, palette.gray),
    "L1\n1 MB": (1.5, 0.0, palette.sky),
    "L0A 64 KB": (3.0, 0.55, palette.sky),
    "L0B 64 KB": (3.0, -0.55, palette.sky),
    "cube\n16×16×16": (4.5, 0.0, palette.blue),
    "L0C\n256 KB": (4.5, -1.7, palette.sky),
    "unified\nbuffer\n256 KB": (2.6, -1.7, palette.sky),
    "vector\n128 numbers": (2.6, -3.0, palette.orange),
}
ARROWS = [
    ("memory\n(all cores)", "L1\n1 MB", "MTE2", (0.75, 0.2)),
    ("L1\n1 MB", "L0A 64 KB", "MTE1 512", (2.05, 0.62)),
    ("L1\n1 MB", "L0B 64 KB", "256", (2.2, -0.6)),
    ("L0A 64 KB", "cube\n16×16×16", "", (0, 0)),
    ("L0B 64 KB", "cube\n16×16×16", "", (0, 0)),
    ("cube\n16×16×16", "L0C\n256 KB", "M", (4.68, -0.9)),
    ("L0C\n256 KB", "unified\nbuffer\n256 KB", "256", (3.6, -1.5)),
    ("unified\nbuffer\n256 KB", "vector\n128 numbers", "V", (2.78, -2.4)),
    ("unified\nbuffer\n256 KB", "memory\n(all cores)", "MTE3  64", (0.95, -1.25)),
]
fig, ax = plt.subplots(figsize=(4.8, 3.4))
for start, end, label, spot in ARROWS:
    ends = {"xy": BOXES[end][:2], "xytext": BOXES[start][:2]}
    arrow = {"arrowstyle": "->", "color": palette.gray, "shrinkA": 24, "shrinkB": 24}
    ax.annotate("", **ends, arrowprops=arrow)
    ax.text(*spot, label, fontsize=9, ha="center", color=palette.ink)
for name, (left, top, color) in BOXES.items():
    frame = {"boxstyle": "round", "fc": "white", "ec": color, "lw": 1.8}
    ax.text(left, top, name, ha="center", va="center", fontsize=9, bbox=frame)
ax.set(xlim=(-0.7, 5.2), ylim=(-3.5, 1.1))
ax.axis("off")
figure(
    fig,
    alt=(
        "A core: MTE2 brings data from memory to L1, MTE1 on to L0A with 512 and to L0B"
        " with 256 bytes per cycle; both feed the cube, which adds up in L0C; from"
        " there results go to the unified buffer, where the vector unit works, and MTE3"
        " takes them back to memory with 64 bytes per cycle."
    ),
)

# %% [markdown]
# A product $(M, K) \times (K, N)$ goes through in tiles: $(m, k)$ of A, $(k, n)$ of B, and $(m, n)$ sums that stay in L0C for all of $k$. Then
#
# $$\text{cube} = \frac{MKN}{16^3} \text{ cycles}, \qquad \text{moved} = MK\left\lceil \tfrac{N}{n} \right\rceil + KN\left\lceil \tfrac{M}{m} \right\rceil \text{ numbers}.$$
#
# Only $m$ and $n$ make a number be used again, and L0C limits both. Narrower formats do not help there: sums keep 32 bits.
#
# ## Your turn
#
# Where does a number lie in NZ? A matrix of `height` × `width` is cut into fractals of `rows` × `cols`; at its edges they are filled up. (The check asks for uneven sizes.)


# %%
def my_nz_offset(row, col, height, width, rows, cols):
    """How many numbers lie before this one, all counted from 0."""
    raise NotImplementedError("three lines of yours")


your_turn(check.nz_offset, my_nz_offset)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(row, col, height, width, rows, cols):
    tall = -(-height // rows)  # fractals in a column of them
    fractal = (col // cols) * tall + row // rows
    return fractal * rows * cols + (row % rows) * cols + col % cols


your_turn(check.nz_offset, one_answer)

# %% [markdown]
# ## The code
#
# `product_cycles` and `layer` count, `to_fractals` cuts and turns, `simulate` and `races` come further below.
#
# | name | shape | in |
# |---|---|---|
# | ZZ | $(M_1, K_1, 16, 16)$ | L0A |
# | ZN | $(K_1, N_1, 16, 16)$, columns of B in rows | L0B |
# | NZ | $(N_1, M_1, 16, 16)$ | L0C, and weights in memory |
#
# ## Against what is published
#
# | what | source | beside ours |
# |---|---|---|
# | NZ of (8, 100, 30) is (8, 2, 112, 16) | [CANN 7.0](https://www.hiascend.com/document/detail/zh/canncommercial/700/foundmodeldev/ascendtb/ascendtb_01_0076.html "cann2024transdata") | below |
# | 256 TFLOP/s fp16, 512 TOPS int8 | [Hot Chips 2019](https://vengineer.hatenablog.com/entry/2019/09/06/070000 "vengineer2019ascend") | below |
# | SmolLM2's logits | PaddleFormers 1.2.0, recorded | further below |
# | ChatGLM-6B's block | [`modeling_chatglm.py`](https://github.com/samson-wang/chatglm-6b-huggingface "thudm2023chatglm") | equal, a test holds it |

# %% tags=["hide-cell"]
show(asc.core.product_cycles, asc.balance.layer, asc.layout.to_fractals)
show(asc.queues.simulate, asc.queues.races)

# %%
nz = asc.layout.to_fractals(torch.zeros(8, 100, 30)).flatten(2, 3)
compare(torch.tensor(nz.shape), [8, 2, 112, 16], "shape in NZ", tol=0)
a, b = torch.randint(-9, 9, (37, 50)), torch.randint(-9, 9, (50, 21))
by_cube = asc.layout.cube_product(
    asc.layout.to_fractals(a, "ZZ"), asc.layout.to_fractals(b, "ZN")
)
compare(asc.layout.from_fractals(by_cube, 37, 21), a @ b, "product", tol=0)
ascend = asc.core.core("Ascend 910")
for format in ("fp16", "int8"):
    built = asc.core.peak(ascend, format)
    print(f"{format}: 32 cores × cube × 1 GHz = {built / 1e12:.1f} T/s", end=", ")
    print(f"printed {chip('Ascend 910').flops[format] / 1e12:.0f}")

# %% [markdown]
# Printed is rounded down: 8 TFLOP/s per core for 8.192. Beware of the same talk's "Max has 8192 MACs in a cube" ([live blog](https://www.anandtech.com/show/14756/hot-chips-live-blogs-huawei-da-vinci-architecture "cutress2019davinci")): it would be 512 TFLOP/s. It is 4,096 MACs a cycle, or 8,192 FLOP. Of the 910B even the peak is in dispute: [280](https://ai.gitee.com/docs/compute/clusters_gpu/ascend_gpu "gitee2025ascend") TFLOP/s or [320](https://boardor.com/blog/huawei-ascend-910b-outperforms-h20-910c-approaches-h100 "boardor2025ascend"), while CANN's file of one version ([910B2C](https://gitcode.com/W4termy/runtime/blob/master/src/platform/platform_config/Ascend910B2C.ini "cann2025ascend910b")) makes 24 cores × 8,192 × 1.8 GHz, 354. Several versions are sold.
#
# ## The experiment: which unit waits
#
# SmolLM2's layer, 2,048 tokens, on one core. The vector unit takes one cycle per instruction on 128 numbers, and five instructions per score for a softmax.

# %%
parts = asc.balance.layer(ascend, preset("smollm2-135m"), 2048, 2048)
for part in parts:
    print(f"{part.name:13} cube {part.cube:9,.0f}  vector {part.vector:9,.0f} cycles")
for name in ("smollm2-135m", "llama-13b"):
    for which in asc.core.CORES:
        core = asc.core.core(which)
        part = asc.balance.layer(core, preset(name), 2048, 2048)[2]
        share = part.cube / part.vector
        print(f"attention of {name:12} on {which:11}: cube / vector {share:.2f}")

# %% tags=["hide-cell"]
unit_guess.settle("the vector unit (softmax)")

# %% [markdown]
# Heads of 64 channels give the cube $2 \cdot 64 / 4096$ cycles per score, the softmax takes $5 / 128$. With heads of 128 it is the other way round, and the 910B puts *two* vector units beside each cube. No brochure prints a vector peak.
#
# ## The experiment: flags
#
# Each unit has a queue, and queues know nothing of each other. `set_flag` and `wait_flag` order them ([SetFlag](https://www.hiascend.com/document/detail/en/canncommercial/800/apiref/ascendcopapi/atlasascendc_api_07_0270.html "cann2024setflag")): one flag says *it is there*, one back says *it is free*. `MTE1_M` goes from MTE1 to M. Eight tiles, with one buffer and with two, then without one of the flags. A *race* is two queues at one buffer, and no flag says which comes first:

# %% tags=["hide-input"]
COLOR = {"MTE2": palette.sky, "MTE1": palette.green, "M": palette.blue}
fig, axes = plt.subplots(2, 1, figsize=(4.8, 3.2), sharex=True)
runs = {}
for ax, buffers in zip(axes, (1, 2), strict=True):
    program = asc.queues.product_program(8, 100, 40, 128, buffers=buffers)
    run = runs[buffers] = asc.queues.simulate(program)
    for line, begin, end in zip(run.program, run.begins, run.ends, strict=True):
        if isinstance(line, asc.queues.Do) and line.queue in COLOR:
            row = [*COLOR].index(line.queue)
            width = end - begin - 6  # a gap between two
            ax.barh(row, width, left=begin, color=COLOR[line.queue], height=0.7)
    ax.set(yticks=range(3), yticklabels=COLOR, xlim=(0, runs[1].cycles))
    ax.set_title(f"{buffers} buffer{'s' if buffers > 1 else ''}", fontsize=10)
    ax.invert_yaxis()
    ax.grid(False)
axes[1].set_xlabel("cycles")
figure(
    fig,
    alt=(
        "Three queues over time. With one buffer the cube, M, pauses between tiles;"
        " with two it works without a gap after the first tile and ends earlier."
    ),
)

for buffers, run in runs.items():
    busy = run.busy("M")
    print(f"{buffers} of each buffer: {run.cycles:,.0f} cycles, cube busy {busy:.0%}")
for flag in ("MTE1_M", "M_MTE1"):
    broken = asc.queues.product_program(8, 100, 40, 128, without=flag)
    cycles, found = asc.queues.simulate(broken).cycles, asc.queues.races(broken)
    print(f"\nwithout {flag}: {cycles:,.0f} cycles, {len(found)} races")
    print(found[0])

# %% [markdown]
# Without `MTE1_M` the program ends earlier, since the cube does not wait for its numbers. Without `M_MTE1` nothing is faster, and in this run nothing goes wrong either, because loading happens to be late enough. The order that flags *force* shows the race; the times do not.
#
# ## The experiment: port a block
#
# Now the software. One Llama block with the same weights, in each framework on a CPU, forward and backward (`scripts/golden/port_block_goldens.py` ran them; a test compares again). Then all of SmolLM2 beside PaddleFormers; the defaults that are not PyTorch's and move the logits, each of which had to be found first; and what triton-ascend 3.2.0 makes of four [Triton](../08-compilers/06-triton.ipynb) kernels, without a card.
#
# Then the question: what happens to the real model if *one* of them is missed? In the figure it is PyTorch that computes, with one thing as the other framework has it.

# %%
with (asc.porting.DATA / "block.csv").open(encoding="utf-8") as file:
    for row in csv.DictReader(file):
        far = f"logits {row['logits']}, gradients {row['gradients']}"
        print(f"{row['framework']:13} {row['version']:7} relative difference: {far}")
model, golden = real_model.load(), asc.porting.smollm2()["texts"]
plain = torch.tensor(golden["plain"]["ids"])
with torch.no_grad():
    ours = model(plain[None])[0]
top = torch.tensor(golden["plain"]["top ids"])
theirs = golden["plain"]["top logits"]
compare(ours[-1, top], theirs, "SmolLM2, ten logits by PaddleFormers", tol=1e-3)
for one in asc.porting.defaults():
    if one.differs and (one.effect or 0) > 1e-4:
        print(f"{one.framework:16} {one.thing:34} {one.value}")
for name, kernel in asc.porting.lowered()["ascend"]["kernels"].items():
    text = "\n".join(kernel["ttadapter"])
    unit = "cube" if "linalg.matmul" in text else "vector"
    counts = f"{text.count('memref.copy')} copies, {text.count('scf.for')} loops"
    print(f"kernel {name:8} for the {unit:6}  {counts}")

# %% tags=["hide-input", "numbers-within-5%"]
document = torch.tensor(golden["after a document"]["ids"])  # begins with token 0


def turned(model):
    """Paddle keeps (in, out); these two are square and fit as they are."""
    for block in model.model.layers:
        for linear in (block.self_attn.q_proj, block.self_attn.o_proj):
            linear.weight.data = linear.weight.data.T.contiguous()


def neighbours(model):
    """A fused RoPE that turns 2i with 2i + 1."""
    for block in model.model.layers:
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj):
            linear.weight.data = asc.porting.half_split(linear.weight.data, 64)


def epsilon(model):
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6


def base(model):
    model.model.theta = 10_000.0 ** (-torch.arange(0, 64, 2) / 64)


def padding(model):
    """Paddle's embedding gives zeros for the token of the padding, here 0."""
    model.model.embed_tokens.register_forward_hook(
        lambda layer, given, found: found * (given[0] != 0)[..., None]
    )


def floor(q, k, v, mask):
    """Attention whose softmax stops at exp(-64), as Paddle's on a CPU does."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:]).triu(1).bool()
    scores = scores.masked_fill(later, -torch.inf)
    far = scores - scores.amax(-1, keepdim=True)
    return far.clamp(min=-64).softmax(-1) @ v


@torch.no_grad()
def ported(change=None, ids=document, **attention):
    model = real_model.load()
    if change:
        change(model)
    return model(ids[None], **attention)[0]


MISSED = {  # what, on which text
    "softmax's end exp(-64)": (None, document, {"attention": floor}),
    "epsilon 1e-6": (epsilon, plain, {}),
    "RoPE's base 10,000": (base, plain, {}),
    "token 0 is padding": (padding, document, {}),
    "RoPE turns neighbours": (neighbours, plain, {}),
    "exp(-64) and token 0": (padding, document, {"attention": floor}),
    "weights not transposed": (turned, plain, {}),
}
rights = {len(ids): ported(ids=ids) for ids in (plain, document)}
found = {}
for name, (change, ids, attention) in MISSED.items():
    before, after = rights[len(ids)][-1], ported(change, ids, **attention)[-1]
    far = float((after - before).abs().max() / before.abs().max())
    found[name] = far, bool(after.argmax() == before.argmax())
fig, ax = plt.subplots(figsize=(4.8, 3.4))
for y, (far, stays) in enumerate(found.values()):
    color = palette.sky if stays else palette.orange
    ax.barh(y, far, color=color, height=0.65)
    ax.text(far * 1.4, y, f"{far:.1g}", va="center", fontsize=9)
ax.set_yticks(range(len(found)), found, fontsize=9)
ax.set(xscale="log", xlim=(1e-7, 200), xticks=[1e-6, 1e-3, 1])
ax.set_xlabel("change / largest logit", fontsize=10)
ax.set_title("orange: other token", fontsize=10)
ax.invert_yaxis()
ax.grid(False)
figure(
    fig,
    alt=(
        "Changes of SmolLM2's next logits by what was missed, logarithmic: the floor of"
        " the softmax about a millionth, the epsilon under a thousandth, RoPE's base"
        " some hundredths, token 0 as padding and RoPE on neighbours some tenths,"
        " square weights and the floor together with the padding about as much as the"
        " largest logit, both with another token on top."
    ),
)

wrong = ported(padding, attention=floor)
top = torch.tensor(golden["after a document"]["top ids"])
theirs = golden["after a document"]["top logits"]
compare(wrong[-1, top], theirs, "exp(-64) and token 0: by PaddleFormers", tol=0.1)
other = document.clone()
other[-1] = 260  # another last token: earlier logits must not know
for name, attention in (("token 0", {}), ("with exp(-64)", {"attention": floor})):
    one, two = (ported(padding, ids, **attention) for ids in (document, other))
    print(f"{name:14} earlier logits change by {(one - two)[:-1].abs().max():.0f}")

# %% tags=["hide-cell"]
wrong_guess.settle("square weights not transposed")

# %% [markdown]
# None of these raises an error (how large each is holds for these five or six tokens). $W_q$ and $W_o$ of SmolLM2 are square, so no shape can tell that Paddle's linear layers keep (in, out).
#
# The bar above that one, `exp(-64) and token 0`, is what PaddleFormers really does with a text that begins with token 0, here `<|endoftext|>`. Where a model's file names no `pad_token_id`, token 0 is the padding, and its embedding becomes zero. And Paddle's softmax on a CPU gives a masked key no zero, but $e^{-64} \approx 10^{-28}$. That alone changes nothing that one would see. But in a row of zeros that little of *later* tokens is all there is, and each norm multiplies it by up to $1/\sqrt{\epsilon} = 316$. After some layers the first token knows the future: with another last token, earlier logits change. Texts that begin otherwise are right. (SmolLM2's weights here were rounded to 4 bits once; both sides have the same.)
#
# The kernels: no threads, whole blocks are copied into local buffers. `gather` becomes a loop that loads number by number; what is cheap on an NVIDIA chip is the kernel to avoid here.
#
# ## Play

# %% tags=["hide-input", "slider"]
SIDES = [32, 64, 128, 256]


def at(m: int, n: int):
    tile = asc.core.Tile(m, 64, n)
    needed = asc.core.tile_bytes(tile)
    filled = {
        name.upper(): needed[name] / has for name, has in ascend.buffers().items()
    }
    over = asc.core.overflows(ascend, tile)
    if over:
        return filled, over, None
    cycles = asc.core.product_cycles(ascend, 2048, 2048, 2048, tile)
    return filled, over, {q: cycles[q] / cycles["M"] for q in ("MTE2", "MTE1")}


def draw(m: int, n: int):
    filled, over, loads = at(m, n)
    fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.6))
    colors = [
        palette.orange if name.lower() in over else palette.sky for name in filled
    ]
    axes[0].bar(list(filled), list(filled.values()), color=colors)
    axes[0].set(ylim=(0, 2.1), title="buffers, filled twice")
    axes[1].bar(*zip(*(loads or {"MTE2": 0, "MTE1": 0}).items(), strict=True))
    axes[1].set(ylim=(0, 4.2), title="loading / cube" if loads else "does not fit")
    for ax in axes:
        ax.axhline(1, color=palette.ink, lw=1)
        ax.title.set_size(10)
    return fig


def told(m: int, n: int) -> str:
    filled, over, loads = at(m, n)
    text = ", ".join(f"{name} {part:.0%}" for name, part in filled.items())
    if over:
        return f"m = {m}, n = {n}: {text}; does not fit"
    waits = ", ".join(f"{q} {part:.2f}" for q, part in loads.items())
    return f"m = {m}, n = {n}: {text}; of the cube's cycles {waits}"


def busiest(m: int, n: int) -> float:
    loads = at(m, n)[2]
    return sum(loads.values()) if loads else float("inf")


BEST = min((busiest(m, n), m, n) for m in SIDES for n in SIDES)


def missing(m: int, n: int) -> str:
    _, over, loads = at(m, n)
    if over:
        return f"{', '.join(over).upper()} cannot hold it twice"
    if (m, n) == BEST[1:]:
        return ""
    return f"another tile that fits loads less than {sum(loads.values()):.2f} in all"


explore(
    draw,
    alt=told,
    title="A tile of (m, 64) by (64, n), fed from the cache L2",
    challenge="Find the tile that fits twice and keeps the loaders least busy.",
    missing=missing,
    start={"m": 64, "n": 64},
    m=SIDES,
    n=SIDES,
)

# %% [markdown]
# Above the line the cube waits. L0B's road is half as wide as L0A's, so $m$ and $n$ are not alike.
#
# ## At scale
#
# LLaMA-13B on 16 NPUs: the [planner](../05-parallelism/11-choosing.ipynb) with MindFormers' own split (two servers; [run_llama_13b.yaml](https://github.com/mindspore-lab/mindformers/blob/09dc3c65e370123abf54d7ee373a028ce6f91d33/configs/llama/run_llama_13b.yaml "mindformers2023yaml")), and with the 7B run for comparison. Memory is the yaml's 31 GB, bandwidth CANN's 32 bytes per cycle and core, links the talk's 3 × 240 Gbit/s in groups of four; 100 Gbit/s of network per NPU are assumed.

# %%
machine = Machine(
    "Ascend 910", printed, 31e9, 1.024e12, link=90e9, network=12.5e9, node=4
)
llama13 = shapes.llama(preset("llama-13b"))
CASES = {
    "7B, 8 NPUs": (llama7, 128, Plan(dp=2, pp=4, microbatch=4, recompute="full")),
    "13B, 16 NPUs": (
        llama13,
        64,
        Plan(dp=2, tp=4, pp=2, microbatch=2, recompute="full"),
    ),
}
for name, (shape, batch, plan) in CASES.items():
    job = Job(shape, batch, 2048, machine)
    planned = planner.estimate(job, plan)
    speed = batch * 2048 / planned.step / plan.devices
    print(f"{name:12} {planned.bytes / 1e9:.1f} GB, {speed:,.0f} tokens/s per NPU")
    if shape is llama7:
        factor = 1229 / speed
    else:
        days = planner.days(job, planned.step / factor, 1e12)
print(f"published for 7B: 1,229, {factor:.2f} of that.")
print(f"13B with the same factor: {days:,.0f} days for a trillion tokens")
newer = Machine("910B", 280e12, 64e9, 1.382e12, link=200e9, network=25e9)
best = planner.search(Job(llama13, 64, 2048, newer), 8).ranked[0]
print(f"8 × 910B: {best.bytes / 1e9:.1f} GB, ZeRO-{best.plan.zero}, dp={best.plan.dp}")
glm = asc.glm.GLMConfig()
print(f"ChatGLM-6B: {asc.glm.parameters(glm) / 1e9:.2f} billion parameters, ", end="")
print(f"residual × {glm.alpha:.2f}; its mask with a prompt of 3:")
print(*asc.glm.prefix_mask(5, 3).int().tolist())

# %% [markdown]
# The planner's efficiency is fitted to A100s, with fused attention; the yaml has that off, and scores of 2,048 × 2,048 go through the vector unit and memory. 1,282 days are no plan: 16 NPUs hold the model, and one fine-tunes on them. Of the 910B (280 TFLOP/s, CANN's 32 bytes × 24 × 1.8 GHz; its links are our assumption) one server is enough, and ZeRO-3 alone: no tensor and no pipeline parallelism.
#
# Each NPU learns who it is from a **rank table** ([MindSpore](https://www.mindspore.cn/tutorials/en/r2.7.2/_sources/parallel/rank_table.md.txt "mindspore2025ranktable")), which HCCL, Huawei's NCCL, reads on every server. `merge_hccl.py` joins such files without looking at them. Ours looks:

# %%
servers = [
    (f"10.0.0.{s}", [f"192.168.{s}.{npu}" for npu in range(1, 9)]) for s in (1, 2)
]
table = asc.rank_table.make(servers)
print(asc.rank_table.text(table)[:260], "…\n")
broken = copy.deepcopy(table)
broken["server_list"][1]["device"][0]["rank_id"] = "7"
del broken["server_list"][0]["device"][3]["device_ip"]
broken["server_count"] = "1"
print(*asc.rank_table.problems(broken), sep="\n")

# %% [markdown]
# The two-server example in MindFormers' model card does not pass: it gives address 192.168.0.1 to two NPUs. The commands, on each server, from the sources named above and [msrun](https://www.mindspore.cn/tutorials/en/r2.10.0/_sources/parallel/msrun_launcher.md.txt "mindspore2026msrun"), which needs no table:
#
# ```bash
# python mindformers/tools/hccl_tools.py --device_num "[0,8)" --server_ip 10.0.0.1
# python mindformers/tools/merge_hccl.py hccl_8p_*.json      # once, then copy it to all
# bash run_distribute.sh hccl_2s_16p.json ../configs/llama/run_llama_13b.yaml [0,8] train 16
# bash run_distribute.sh hccl_2s_16p.json ../configs/llama/run_llama_13b.yaml [8,16] train 16
#
# msrun --worker_num=16 --local_worker_num=8 --master_addr=10.0.0.1 --node_rank=0 train.py
#
# bash run_distribute.sh hccl_8p.json ../configs/glm/run_glm_6b_finetune.yaml '[0,8]' finetune
# bash llama_npu_sft_N1C8.sh        # PaddleNLP, llm/devices/npu/llama, paddle-custom-npu
# ```
#
# The one before last tunes ChatGLM-6B with eight-way tensor parallelism; to ask it something takes one NPU ([model card](https://github.com/mindspore-lab/mindformers/blob/06c481f46517e10d12e0cd0572202b5bd29ca915/docs/model_cards/glm.md "mindformers2023glm"), MindSpore 2.0):
#
# ```python
# from mindformers import pipeline
# pipeline(task="text_generation", model="glm_6b_chat", max_length=2048)("你好")
# ```
#
# ChatGLM is no Llama. Its prompt sees all of itself, the answer only what is before it (the mask above: rows see columns). Each token has two positions, the place of its gap and the place within the answer, and half of each head turns by each. The residual is $\sqrt{2L}$ times the *normed* input ([Du et al. 2022](https://arxiv.org/abs/2103.10360 "du2022glm"); `asc.glm`).
#
# ## What changes from CUDA
#
# | | CUDA | Ascend |
# |---|---|---|
# | import, device | `torch`, `cuda:0` | also `torch_npu`, `npu:0` |
# | calls | `torch.cuda.…`, `.cuda()` | `torch_npu.npu.…`, `.npu()`, or one line: `from torch_npu.contrib import transfer_to_npu` |
# | collectives | `nccl` | `hccl`; a test like `backend == "nccl"` must be changed by hand |
# | not there | | `channels_last`; `torch.jit.script` with the one line; DataParallel |
# | weights | rows | NZ, where it pays |
# | a kernel | CUDA, Triton | Ascend C, Triton with care |
#
# ([Huawei's migration guide](https://www.hiascend.com/doc_center/source/zh/Pytorch/600/ptmoddevg/trainingmigrguide/PT_LMTMOG_0014.html "ascend2025migration").) MindSpore compiles the whole model first (`mode: 0` in the yaml above): the first answer of ChatGLM takes its time, as its model card says.
#
# <details><summary>For the curious: the others</summary>
#
# | chip | device in PyTorch | collectives | kernels | source |
# |---|---|---|---|---|
# | Cambricon MLU | `mlu` | `cncl` | BANG | [DeepSpeed](https://github.com/microsoft/DeepSpeed/blob/03aecee816cece2b4d94af485af7bd69bd4a201a/accelerator/real_accelerator.py "deepspeed2025accelerators") |
# | Intel Gaudi | `hpu` | `hccl`: another library of that name | TPC | the same |
# | AMD; Hygon's DCU likewise | `cuda` | RCCL as `nccl` | HIP | [PyTorch](https://docs.pytorch.org/docs/2.13/notes/hip.html "pytorch2026hip") |
# | Moore Threads | `musa` | `mccl` | MUSA | [torch_musa](https://github.com/MooreThreads/torch_musa "moorethreads2026torch") |
# | AWS Trainium | `neuron`, before `xla` | Neuron's | NKI | [AWS](https://awsdocs-neuron.readthedocs-hosted.com/en/latest/frameworks/torch/pytorch-native-overview.html "aws2026torch") |
#
# Of Biren, Groq and Cerebras we found no page to cite; the last two compile a whole model, and there is no device to name.
#
# </details>
#
# ## What to keep
#
# ```python
# place = ((col // 16) * tall + row // 16) * 256 + row % 16 * 16 + col % 16  # NZ
# moved = m * k * ceil(n / tile_n) + k * n * ceil(m / tile_m)
# wait_for = "cube" if 2 * head_dim / 4096 > 5 / 128 else "vector"
# ```
#
# **Use it** when a chip is offered that runs "all PyTorch models": ask for the vector peak, port one block, compare logits and gradients. **Not** as a forecast: rates are published, stalls are not. And what the brochure leaves out: the vector unit, the software's defaults, and which of three chips of one name it means.
#
# <details><summary>A port loads without error and the loss is a little higher. Where do you look?</summary>
#
# Square matrices first: their shape cannot tell. Then the order in which RoPE turns, special tokens, epsilon; each on one block with the same input.
#
# </details>
#
# <details><summary>A kernel gives right results a thousand times. Is a flag missing?</summary>
#
# One cannot tell from results: look at which order the flags force.
#
# </details>
#
# <details><summary>Sixteen NPUs start and nothing happens. What first?</summary>
#
# The rank table: counts, ranks from 0 on, each address once, on all servers the same file.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/09-chips/04-ascend-and-other-accelerators.ipynb).
#
# Further reading: [Zuo et al. 2025](https://arxiv.org/abs/2506.12708 "zuo2025cloudmatrix") on 384 NPUs as one machine; [PaddleNLP on Ascend](https://github.com/PaddlePaddle/PaddleNLP/blob/d858436ea881b25e62012845cd62b394e321ad86/llm/devices/npu/llama/README.md "paddlenlp2024npu").
