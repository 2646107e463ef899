# %% [markdown]
# # Prefill, decode and the KV cache
#
# A language model reads your prompt in one pass and writes its answer in hundreds. Reading is fast, writing is slow, and both have one cause: how often the weights are fetched from memory. With two rates of a machine
# and a count of bytes you can predict tokens per second before you have bought anything. This lesson does so, for a CPU and for GPUs, and looks at what is kept to make writing
# possible at all, the cache. At the end you can say what a token costs, and which trick of vLLM or TensorRT-LLM saves which part of it.

# %% tags=["hide-input"]
import csv
import statistics
from itertools import pairwise

import torch

from llmlab.checks.inference.prefill_decode_kv_cache import check
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
from llmlab.inference import prefill_decode_kv_cache as cached
from llmlab.inference.prefill_decode_kv_cache import (
    MACHINES,
    Machine,
    cache_bytes,
    passes,
    weights_read,
)
from llmlab.models import accounting, course_model, machine, real_model
from llmlab.models.presets import preset

with cached.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))

# %% [markdown]
# ## What it costs
#
# An H100 does 989 TFLOP/s in 16 bits, and reads 3.35 TB/s from its memory ([NVIDIA](https://www.nvidia.com/en-us/data-center/h100/ "nvidia2023h100")). Llama 3.1 8B answers one reader.

# %%
llama, h100 = preset("llama-3.1-8b"), MACHINES["H100 80GB"]
step = passes(llama, h100, past=1000)
print(f"a token is {step.flops / 1e9:.0f} GFLOP and {step.bytes / 1e9:.0f} GB to read")
print(f"the arithmetic alone: {h100.speed / step.flops:,.0f} tokens per second")
print(f"the reading:          {h100.bandwidth / step.bytes:,.0f} tokens per second")
prompt_pass = passes(llama, h100, new=1000)
print(f"a prompt of 1,000 tokens, at least: {1e3 * prompt_pass.seconds:.0f} ms")
print(f"each token of the answer, at least: {1e3 * step.seconds:.1f} ms")

# %% [markdown]
# While the model writes, the arithmetic units are idle for more than 99% of the time: they wait for weights. The last two lines are what a user feels, the **time to first token** and the
# **time per output token**. The whole prompt costs as much as three or four tokens of the answer. (8 billion weights of 2 bytes would be 16 GB; the table of embeddings is not read whole.)
#
# ## Predict
#
# SmolLM2-135M, on one core. It reads a prompt of 512 tokens in one pass; it writes one token per pass. Then it writes for 16 readers at once: a batch of 16 rows, one token for each row in a pass.

# %%
phase_guess = predict(
    "How many times as long does a written token take as a read one?", unit="times"
)
batch_guess = predict(
    "A step with 16 rows: how many times as long as with one?", unit="times"
)

# %% [markdown]
# ## By hand
#
# A model of 100 weights, 2 bytes each: a pass reads 200 bytes, and a token is 200 FLOPs. The machine reads 100 bytes per second and does 1,000 FLOPs per second. Reading and computing overlap, so the longer one counts.
#
# | rows | reading | computing | step | tokens per second |
# |---|---|---|---|---|
# | 1 | 2 s | 0.2 s | 2 s | 0.5 |
# | 10 | 2 s | 2 s | 2 s | 5 |
# | 20 | 2 s | 4 s | 4 s | 5 |
# | 10, with 50 tokens of 1 byte in each row's cache | 7 s | 2 s | 7 s | 1.4 |
#
# Up to ten rows, each further row is free. Then computing is the limit. But a row brings its own cache, and that is not shared.

# %%
small = {"weights": 200, "work": 200, "bandwidth": 100, "speed": 1000}
for rows, context, kept in ((1, 0, 0), (10, 0, 0), (20, 0, 0), (10, 50, 1)):
    took = cached.decode_time(rows, context, cache=kept, **small)
    print(f"{rows:2} rows: {took:.0f} s, {rows / took:.1f} tokens per second")

# %% [markdown]
# ## The idea
#
# A pass over $T$ new tokens in each of $B$ rows, with $S$ tokens in each row at its end, reads $Q$ bytes and does $W$ FLOPs:
#
# $$Q = \text{weights} + B\,S \cdot \text{cache per token}, \qquad W \approx 2N \cdot B\,T, \qquad \text{seconds} \ge \max\Bigl(\frac{Q}{\beta}, \frac{W}{\pi}\Bigr)$$
#
# with $N$ weights, bandwidth $\beta$ and speed $\pi$. This is the **roofline** ([Williams et al. 2009](https://doi.org/10.1145/1498765.1498785 "williams2009roofline")). $W/Q$ is the **arithmetic intensity**; where it is
# below $\pi/\beta$, reading is the limit. **Prefill** has $T$ in the hundreds: a weight that was fetched serves all of them. **Decode** has $T = 1$, and only other rows can share the fetch. ($W$ also has attention's products, which the package counts.)
#
# Why not read the text again for each token? Token $n$ would cost $n$ tokens' work, so a text of $n$ tokens about $n^2/2$. Keys and values of old tokens never change, since nobody looks ahead. So they are kept: the **KV cache**.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 3.1))
x = torch.logspace(-0.5, 4, 60)
roof = torch.minimum(x * h100.bandwidth, torch.tensor(h100.speed)) / 1e12
ax.plot(x, roof, color=palette.ink)
for name, color, points, side in (
    ("decode", palette.vermillion, [(1, b) for b in (1, 16, 256)], "left"),
    ("prefill", palette.blue, [(t, 1) for t in (128, 2048)], "right"),
):
    for new, rows in points:
        past = 1000 if new == 1 else 0
        made = passes(llama, h100, new=new, batch=rows, past=past)
        rate = made.flops / made.seconds / 1e12
        label = name if (new, rows) == points[0] else None
        ax.plot([made.intensity], [rate], "o", color=color, label=label)
        ax.annotate(
            f"{rows} row{'s' if rows > 1 else ''}" if new == 1 else f"{new:,} tokens",
            (made.intensity, rate),
            (7, -11) if side == "left" else (-4, 8),
            textcoords="offset points",
            color=color,
            ha=side if new < 2048 else "center",
        )
ax.set(xscale="log", yscale="log", xlim=(0.4, 1e4), ylim=(1, 3000))
ax.set(xlabel="FLOPs per byte", ylabel="TFLOP/s at most")
ax.legend(loc="lower right")
figure(
    fig,
    alt=(
        "The roofline of an H100: attainable TFLOP/s rise with FLOPs per byte up to 295"
        " and are flat at 989 from there. Decoding with 1 row lies far down on the"
        " slope, with 16 higher, with 256 still on it. A prompt of 128 tokens lies on"
        " the slope, one of 2,048 on the flat roof."
    ),
)

# %% [markdown]
# Each decoding row has 1,000 tokens in its cache. With 256 rows the weights are well shared, and still decode stays on the slope: each row's cache is read for that row alone.
#
# ## Your turn
#
# The time of a decoding step. `weights` and `cache` (per token) are bytes, `work` is FLOPs per row.


# %%
def my_decode_time(batch, context, *, weights, cache, work, bandwidth, speed):
    """Seconds of one step at least: every row gets one token."""
    raise NotImplementedError("three lines of yours")


your_turn(check.decode_time, my_decode_time)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(batch, context, *, weights, cache, work, bandwidth, speed):
    reading = (weights + batch * context * cache) / bandwidth
    computing = batch * work / speed
    return max(reading, computing)


your_turn(check.decode_time, one_answer)

# %% [markdown]
# ## The code
#
# Rows of a batch are rarely equally long. A cache that is allocated once gives each row `C` places and a length. A token's place is its position, new tokens go to the place of the row's length, and the mask ends at the query's own place.
#
# | value | shape | holds |
# |---|---|---|
# | `buffer` | (B, K, C, D) | keys or values of a layer |
# | `new` | (B, K, T, D) | new ones, padded on the right |
# | `lengths`, `counts` | (B,) | tokens that a row has, and gets |
# | `visible(…)` | (B, 1, T, S) | place ≤ length + index of the new token |
#
# So a row ends by setting its length to 0. What it leaves behind is never seen. (But it must be finite: a weight of 0 times NaN is NaN.)

# %% tags=["hide-cell"]
show(cached.append, cached.visible, cached.read)

# %% [markdown]
# ## Against the library
#
# Three prompts of unequal lengths at once, greedy, through `generate` of `transformers` and through ours. There prompts are padded on the left, and padding stays in the cache; here on the right, and it never gets in.

# %%
from transformers import LlamaForCausalLM, logging

logging.set_verbosity_error()
logging.disable_progress_bar()

model, tokenizer = course_model.load(), course_model.load_tokenizer()
texts = ("The Congress of the United States", "We the people", "Peace")
prompts = [tokenizer.encode(text).ids for text in texts]
theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL)
longest = max(map(len, prompts))
left = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
found = theirs.generate(
    left,
    attention_mask=mask,
    max_new_tokens=24,
    return_dict_in_generate=True,
    **options,
)
mine = cached.generate(model, prompts, 24)
compare(mine, found.sequences[:, longest:].tolist(), "tokens of three rows", tol=0)

# %% tags=["hide-cell"]
# Paper, library, ours.
import transformers

kept = found.past_key_values.layers[0].keys.shape[2]
print(
    f"transformers {transformers.__version__}: places per row {kept}, of these", end=" "
)
print(f"padding {[longest - len(p) for p in prompts]}")
rows = [
    ("", "vLLM", "transformers", "ours"),
    ("room for a row", "blocks of 16", "grows, or static", "C places"),
    ("unequal prompts", "no padding", "padded left", "padded right"),
    ("padding is cached", "no", "yes", "no"),
    ("a row ends", "blocks freed", "row stays", "length 0"),
    ("MLA keeps", "–", "c and k_R", "c and k_R"),
    ("MLA computes", "–", "keys per head", "latent, or both"),
]
for row in rows:
    print(f"{row[0]:18}" + "".join(f"{cell:>18}" for cell in row[1:]))

# %% [markdown]
# ## The experiment
#
# Passes of SmolLM2-135M (fp32, one core), stored by `scripts/prefill_decode_sweep.py`. Two rates of that machine were measured between them. Which is its bandwidth? Adding up a large tensor reads faster than multiplying a vector by it,
# and decode does the second. So the prediction takes the product's rate, and nothing else is fitted.


# %%
def seconds(task: str, **wanted: int) -> float:
    """What a stored pass took."""
    for run in runs:
        if run["task"] == task and all(int(run[k]) == v for k, v in wanted.items()):
            return float(run["seconds"])
    raise KeyError(wanted)


smol = preset("smollm2-135m")
summed, beta, pi = (
    statistics.median(float(run[name]) for run in runs) * 1e9
    for name in ("sum", "product", "flops")
)
core = Machine(beta, pi)
fp32 = {"dtype": torch.float32}
step = passes(smol, core, past=128, **fp32)
took = seconds("decode", rows=1)
print(f"a sum reads {summed / 1e9:.0f} GB/s, a product {beta / 1e9:.0f} GB/s")
print(f"a product of matrices does {pi / 1e9:.0f} GFLOP/s: {core.ridge:.0f} per byte")
print(f"a decoding step reads {step.bytes / 1e6:.0f} MB", end=" ")
print(f"({accounting.kv_cache_bytes(smol, 1, 129, torch.float32) / 1e6:.0f} of cache)")
print(f"predicted {step.rate:.0f} tokens per second, measured {1 / took:.0f}")

# %% tags=["hide-cell"]
read = seconds("prefill", new=512) / 512
phase_guess.settle(took / read, digits=2)
batch_guess.settle(seconds("decode", rows=16) / took, digits=2)

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(4.8, 3.0))
tokens = [int(run["new"]) for run in runs if run["task"] == "prefill"]
fine = [round(2 ** (i / 4)) for i in range(37)]
axes[0].plot(
    fine,
    [1e3 * passes(smol, core, new=t, **fp32).seconds / t for t in fine],
    color=palette.gray,
)
axes[0].plot(
    tokens,
    [1e3 * seconds("prefill", new=t) / t for t in tokens],
    "o",
    color=palette.blue,
)
axes[0].set(xscale="log", yscale="log", xlabel="tokens in a pass")
axes[0].set_title("ms per token", fontsize=10)
axes[0].set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
axes[0].set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
axes[0].minorticks_off()
many = [int(run["rows"]) for run in runs if run["task"] == "decode"]
axes[1].plot(
    many,
    [passes(smol, core, batch=b, past=128, **fp32).rate for b in many],
    color=palette.gray,
)
axes[1].plot(
    many,
    [b / seconds("decode", rows=b) for b in many],
    "o",
    color=palette.vermillion,
)
axes[1].set(xscale="log", yscale="log", xlabel="rows that decode")
axes[1].set_title("tokens per second", fontsize=10)
axes[1].set_xticks(many, [str(b) for b in many])
axes[1].set_yticks([20, 50, 100, 200, 400], ["20", "50", "100", "200", "400"])
axes[1].minorticks_off()
for name, x, y, shift, side in (
    ("roofline", 4, 110, (-8, 0), "right"),
    ("measured", 8, 81, (5, -17), "center"),
):
    axes[1].annotate(
        name, (x, y), shift, textcoords="offset points", ha=side, fontsize=10
    )
figure(
    fig,
    alt=(
        "Left, milliseconds per token against tokens in a pass: they fall from 53 with"
        " one token to 3 with 128, and stay there; the roofline falls likewise and is"
        " flat from about 15 tokens on. Right, tokens per second of decoding against"
        " rows: from 19 with one row to 123 with 16; two rows gain little. The"
        " roofline goes from 28 to about 350."
    ),
)
gain = seconds("decode", rows=1) * 16 / seconds("decode", rows=16)
share = passes(smol, core, new=512, **fp32).seconds / seconds("prefill", new=512)
print(
    f"a prompt of 512: {share:.0%} of the roofline; one row: {step.seconds / took:.0%}"
)
print(f"16 rows: {gain:.1f} times the tokens per second of one row")

# %% [markdown]
# The roofline gives the order of size and the shape, as a bound from above. What lies between is not reading: small matrices, calls, norms. With two to sixteen rows it is far off: this CPU's product of a few rows runs at neither rate.
#
# Two more costs. **Without a cache** each token takes a pass over all before it. And the **cache itself** grows with the text:

# %%
known = [
    (int(run["new"]), float(run["seconds"])) for run in runs if run["task"] == "prefill"
]
without = sum(  # a trapezium between each two measured lengths
    (t2 - t1) * (s1 + s2) / 2 for (t1, s1), (t2, s2) in pairwise(known)
)
print(f"512 tokens with a cache: {512 * took:.0f} s, without: {without:.0f} s")
extra = seconds("context", past=4096) - took
grown = accounting.kv_cache_bytes(smol, 1, 4096 - 128, torch.float32)
longer = seconds("context", past=4096) / took
print(f"4,096 tokens in the cache: a step takes {longer:.1f} times as long")
print(f"  {grown / 1e6:.0f} MB more: predicted {1e3 * grown / beta:.0f} ms,", end=" ")
print(f"measured {1e3 * extra:.0f}")
for heads in (3, 9):
    alone = seconds("attention", rows=heads)
    whole = accounting.kv_cache_bytes(smol, 1, 4096, torch.float32)
    print(f"  attention, {heads} query heads: {1e3 * alone:.0f} ms,", end=" ")
    print(f"{whole / alone / 1e9:.0f} GB/s")

# %% [markdown]
# The prediction for a long text is too kind, and the last two lines say where to look. Attention alone, over all layers, with three query heads on the three key heads, reads nearly at the product's rate. With the model's nine query heads on the same keys
# it takes nearly twice as long: PyTorch's CPU kernel shares the reading within a group badly. That is most of what is missing, not all.
#
# Now your own machine. Its numbers will be others, and the order of size should hold.

# %% tags=["nbval-ignore-output", "hide-input"]
real = real_model.load()
here = Machine(machine.product_bandwidth(128, 3), machine.speed(512, 3))
prompt = torch.arange(1000, 1128)[None]
store = cached.BatchCache(30, 1, 160)
prefill = machine.seconds(lambda: cached.read(real, prompt, store))
decode = min(
    machine.seconds(lambda: cached.read(real, prompt[:, :1], store)) for _ in range(4)
)
bound = passes(smol, here, past=128, **fp32).rate
print(f"here: predicted {bound:.0f} tokens per second, decoded {1 / decode:.0f}")
print(f"a written token takes {128 * decode / prefill:.0f} times as long as a read one")

# %% [markdown]
# ## A smaller cache
#
# Since the cache is what rows do not share, models were built to keep less of it. Ordinary attention (MHA) keeps a key and a value per head. MQA, multi-query attention, shares one pair among all heads, GQA one among the heads of a group ([Ainslie et al. 2023](https://arxiv.org/abs/2305.13245 "ainslie2023gqa")).
# **Multi-head latent attention** keeps one latent vector $c$ per token, from which every head makes its own key $W^{UK} c$ and value $W^{UV} c$, and one key with positions for all heads
# ([DeepSeek-V2](https://arxiv.org/abs/2405.04434 "deepseek2024v2")). And as $q \cdot (W^{UK} c) = ({W^{UK}}^\top q) \cdot c$, even those keys need not be made. Only RoPE must stay outside: its rotation would stand between $q$ and $W^{UK}$, with another angle for each pair of query and key.

# %%
shape = {"layers": 60, "heads": 128, "head_dim": 128, "bytes_each": 1}
for kind, more in (
    ("MHA", {}),
    ("GQA", {"groups": 8}),
    ("MQA", {}),
    ("MLA", {"latent": 512, "rope": 64}),
):
    print(f"{kind}: {cache_bytes(kind, **shape, **more) / 1e3:8,.1f} thousand numbers")
mla = cache_bytes("MLA", 60, 128, 128, latent=512, rope=64, bytes_each=6 / 8)
dense = cache_bytes("GQA", 95, 64, 128, groups=8)  # DeepSeek 67B, 16 bits
print(f"in 6 bits, under DeepSeek 67B: {1 - mla / dense:.1%} less; published 93.3%")

torch.manual_seed(0)
H, d_c, d_r = 128, 512, 64
each = {"MHA": 1, "GQA": H // 8, "MLA": H * (2 * d_c + d_r) / (d_c + d_r)}
print("FLOPs per byte of cache:", {kind: round(x) for kind, x in each.items()})
print(f"where reading and computing take equally long, H100: {h100.ridge:.0f}")

layer = cached.LatentAttention(cached.LatentConfig(48, 4, 16, 12, 8, 6, 10))
x = torch.randn(2, 9, 48)
compare(layer(x), layer(x, absorb=False), "absorbed and expanded", tol=1e-5)

# %% [markdown]
# The published number holds for the deployed model, whose cache has 6 bits per number on average. In 16 bits a number that is read serves one product with MHA. With GQA every query head of a group uses it; with absorbed latents all 128 heads do, and twice, as key and as value.
# So decoding's attention comes near the point where an H100 is no longer waiting.
#
# In the package's tests the layer has the very weights of `DeepseekV2Attention` and `DeepseekV3Attention`, and gives their outputs, with their cache. They make all keys and values in each step.
#
# ## Play
#
# A model of Llama 3.1 8B's shape on an H100, with three kinds of attention. (MLA's sizes are DeepSeek-V2's.) Every row has 8,192 tokens.

# %% tags=["hide-input", "slider"]
CONTEXT = 8192
CHOICES = {"rows": [1, 8, 32, 64, 128, 256], "kind": ["MHA", "GQA", "MLA"]}
sizes = {"groups": 8, "latent": 512, "rope": 64}
weights = accounting.weight_bytes(llama)


def kept_by(kind: str) -> float:
    return cache_bytes(kind, 32, 32, 128, **sizes)


def fits(rows: int, kind: str) -> bool:
    return rows <= cached.max_batch(h100.memory, weights, kept_by(kind), CONTEXT)


def parts(rows: int, kind: str) -> dict[str, float]:
    """Milliseconds of a step, by what takes them."""
    work = passes(llama, h100, past=0).flops  # attention's products left out
    return {
        "read weights": 1e3 * weights_read(llama) / h100.bandwidth,
        "read caches": 1e3 * rows * CONTEXT * kept_by(kind) / h100.bandwidth,
        "compute": 1e3 * rows * work / h100.speed,
    }


def rate(rows: int, kind: str) -> float:
    ms = parts(rows, kind)
    longest = max(ms["read weights"] + ms["read caches"], ms["compute"])
    return 1e3 * rows / longest


def draw(rows: int, kind: str):
    fig, ax = plt.subplots(figsize=(4.8, 2.4))
    ms = parts(rows, kind)
    each = rate(rows, kind)
    ms["whole step"] = 1e3 * rows / each
    colors = (palette.blue, palette.orange, palette.green, palette.ink)
    for y, (took, color) in enumerate(zip(ms.values(), colors, strict=True)):
        ax.plot([took], [y], "o", markersize=9, color=color)
    ax.set_yticks(range(len(ms)), list(ms))
    ax.set(xlim=(0.01, 500), xscale="log", ylim=(3.5, -0.5), xlabel="ms")
    room = "fits" if fits(rows, kind) else "does NOT fit"
    ax.set_title(
        f"{each:,.0f} tokens/s, {each / rows:.0f} a reader; {room}", fontsize=10
    )
    return fig


every = [(r, k) for r in CHOICES["rows"] for k in CHOICES["kind"] if fits(r, k)]
most = max(rate(*one) for one in every)


def missing(rows: int, kind: str) -> str:
    if not fits(rows, kind):
        return "weights and caches do not fit into 80 GB."
    if rate(rows, kind) < most:
        return f"{rate(rows, kind):,.0f} tokens per second; more is possible."
    return ""


explore(
    draw,
    alt=lambda rows, kind: (
        f"{rows} rows with {kind}: {rate(rows, kind):,.0f} tokens per second, reading"
        f" {parts(rows, kind)['read weights']:.1f} ms of weights and"
        f" {parts(rows, kind)['read caches']:.1f} ms of caches; it"
        f" {'fits' if fits(rows, kind) else 'does not fit'} into 80 GB."
    ),
    title="Rows, cache, memory",
    challenge="Find the most tokens per second that fit into 80 GB.",
    missing=missing,
    start={"rows": 1, "kind": "MHA"},
    **CHOICES,
)

# %% [markdown]
# ## At scale
#
# The prediction on A100s: `gpt-fast` decodes one row with a few tokens in the cache ([its README](https://github.com/meta-pytorch/gpt-fast "gptfast2023")). Predicted are the bytes of the weights over the 2,039 GB/s of the data sheet.

# %% tags=["hide-input"]
a100 = MACHINES["A100 80GB"]
published = [  # model, dtype, GPUs, tokens per second
    ("llama-2-7b", torch.bfloat16, 1, 104.9),
    ("llama-2-7b", torch.int8, 1, 155.58),
    ("llama-3.1-8b", torch.bfloat16, 1, 93.89),
    ("llama-2-70b", torch.int8, 1, 19.13),
    ("llama-2-7b", torch.bfloat16, 8, 328.43),
]
print(f"{'':15}bytes each  GPUs  predicted  measured")
for name, dtype, gpus, measured in published:
    most_rate = gpus * a100.bandwidth / weights_read(preset(name), dtype)
    print(
        f"{name:15}{dtype.itemsize:10}{gpus:6}{most_rate:11.0f}{measured:10.0f}"
        f"  {measured / most_rate:.0%}"
    )

# %% [markdown]
# On one GPU 16-bit weights reach about the share that our core did. Eight GPUs come to 27%: each reads an eighth of the weights, and in every layer they must [add up their results](../05-parallelism/05-tensor.ipynb) before any goes on.
#
# What do the frameworks do about it? Every trick in this part saves one term of the sum. Fewer bits make the weights smaller. A paged cache and shared prefixes leave room for more rows, and continuous batching keeps those rows busy.
# Speculation turns several steps of decode into one short prefill, for the few readers who leave arithmetic idle. Chunked prefill lets long prompts use the arithmetic that decoding rows do not need. They differ less in what they have than in where
# they run: TensorRT-LLM on NVIDIA's GPUs, vLLM on those and on AMD's, Intel's and TPUs, llama.cpp's server also on a bare CPU.
#
# ✓: named in the project's own overview ([vLLM](https://github.com/vllm-project/vllm "vllm2025readme"), [SGLang](https://huggingface.co/docs/inference-endpoints/main/engines/sglang "sglang2025features"),
# [TensorRT-LLM](https://nvidia.github.io/TensorRT-LLM/latest/key-features.html "tensorrtllm2025features"), [llama.cpp's server](https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md "llamacpp2025server"),
# [TGI](https://github.com/huggingface/text-generation-inference "tgi2025readme"), which is in maintenance mode and points to the others). A blank is not a "no".
#
# | what | saves | lesson | vLLM | SGLang | TRT-LLM | llama.cpp | TGI |
# |---|---|---|---|---|---|---|---|
# | fused attention | traffic of prefill | [2](02-flash-attention.ipynb) | ✓ | | | | ✓ |
# | paged cache | unused places | [3](03-paged-attention.ipynb) | ✓ | ✓ | ✓ | | ✓ |
# | shared prefixes | prefill, cache | [3](03-paged-attention.ipynb) | ✓ | ✓ | ✓ | | |
# | continuous batching | idle rows | 4 | ✓ | ✓ | ✓ | ✓ | ✓ |
# | chunked prefill | waiting readers | 4 | ✓ | ✓ | ✓ | | |
# | speculation | passes | [5](05-sampling-and-speculation.ipynb) | ✓ | | ✓ | ✓ | ✓ |
# | quantised weights | bytes | [Part 06](../06-compression/01-quantization-basics.ipynb) | ✓ | ✓ | ✓ | ✓ | ✓ |
#
# ```bash
# vllm bench latency --model meta-llama/Llama-3.1-8B-Instruct \
#   --input-len 1000 --output-len 128 --batch-size 1
# ```
#
# Published at the largest scale: PaLM 540B decodes a token in 29 ms with int8 weights, and reads prompts at 76% of the chips' FLOPs ([Pope et al. 2022](https://arxiv.org/abs/2211.05102 "pope2022efficiently")).
#
# ## What to keep
#
# ```python
# traffic = weights + rows * context * cache_per_token      # bytes that a step reads
# step = max(traffic / bandwidth, rows * flops / speed)     # seconds, at least
# tokens_per_second = rows / step
# rows_that_fit = (memory - weights) // (context * cache_per_token)
# ```
#
# **Use it** to choose a GPU, a batch, a cache: before you measure. **Not** as a promise: it is a bound, and few rows on a CPU, or many GPUs, stay well below it.
#
# <details><summary>Why does a second reader cost almost nothing on a GPU?</summary>
#
# The step reads the weights once for both. Only his own cache and his own arithmetic come on top, and arithmetic is idle.
#
# </details>
#
# <details><summary>Why does the gain end?</summary>
#
# Caches are not shared. With long contexts they are soon larger than the weights, in traffic and in memory. Or computing becomes the limit.
#
# </details>
#
# <details><summary>Why has MLA a second, small key?</summary>
#
# RoPE turns queries and keys by their positions. The rotation would stand between the query and W_UK, and no one matrix can hold it: the angle is another for each pair. So positions get channels of their own, and all heads share that key.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/07-inference/01-prefill-decode-kv-cache.ipynb).
#
# Further reading: [Pope et al. 2022](https://arxiv.org/abs/2211.05102 "pope2022efficiently"), section 2, where these sums come from.
