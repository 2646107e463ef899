# %% [markdown]
# # TensorRT
#
# TensorRT takes a trained network and builds an engine for one machine: it joins operations into layers, times several kernels for each, and runs products in 8 bits. It needs a GPU; its ideas do not. Here is a builder that reads in an evening, beside the real ONNX Runtime, OpenVINO and NVIDIA's ModelOpt.
# One choice decides more than all others: how large a number may be before it is clipped. At the end you own it, and know why the famous way to make it ruins a language model.

# %% tags=["hide-input"]
import csv
import json
import tempfile
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from llmlab.checks.compilers.tensorrt import check
from llmlab.compilers import tensorrt as trt
from llmlab.compilers.front_end import (
    capture,
    lines,
    one_by_one,
    program_of,
    to_onnx,
    traffic,
)
from llmlab.compilers.program import example_inputs, mlp
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
from llmlab.models import course_model, real_model

with trt.RUNS_FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def stored(form: str, method: str, kept: str = "") -> list[dict]:
    """Runs of the sweep, a seed each."""
    key = (form, method, kept)
    return [r for r in runs if (r["format"], r["method"], r["kept"]) == key]


def bits(*key: str) -> list[float]:
    """Bits per byte of text, for each seed."""
    return [float(run["bpb"]) for run in stored(*key)]


# %% [markdown]
# ## What it costs
#
# Codes of 8 bits are a quarter of the bytes of float32, and processors with instructions for them multiply them faster. The price is one number for each tensor, the scale. For SmolLM2-135M with 8-bit weights, by `scripts/tensorrt_sweep.py`:

# %%
(floats,) = bits("float", "weights only")
entropy = bits("int8", "entropy")
print(f"inputs in floats          {floats:.2f} bits per byte")
print(f"inputs in 8 bits, entropy {min(entropy):.2f} to {max(entropy):.2f} (3 seeds)")
pairs = [int(run["right"]) for run in stored("int8", "entropy")]
right = int(stored("float", "weights only")[0]["right"])
print(f"grammatical sentence preferred: {right}% before, {min(pairs)} to {max(pairs)}%")

# %% [markdown]
# Half of the pairs right is guessing: nothing is left of the model. Entropy calibration was TensorRT's own rule for years. The same bits, with another rule for one number per tensor, keep most of the model.
#
# ## Predict
#
# One linear of SmolLM2 reads 128 tokens of 1,536 numbers; half of the numbers are smaller than about 0.06. And four rules may choose the threshold: the maximum, a percentile (99.99%), the least entropy, the least squared error.

# %%
large_guess = predict("How large is the largest of the 196,608?")
rule_guess = predict(
    "Which rule keeps most of the model?",
    choices=("max", "99.99%", "entropy", "mse"),
)

# %% [markdown]
# ## By hand
#
# A histogram of $|x|$ has the counts 8, 4, 2, 2, 1, 1. A threshold keeps four bins, and there are two levels. $P$ is the truth, with what is clipped heaped onto the last bin. $Q$ is what two levels can tell of the kept bins; it does not know what was clipped.
#
# | bin | 1 | 2 | 3 | 4 |
# |---|---|---|---|---|
# | $P$ | 8 | 4 | 2 | 2 + 1 + 1 = 4 |
# | $Q$ | (8 + 4) / 2 = 6 | 6 | (2 + 2) / 2 = 2 | 2 |
#
# $P$ sums to 18, $Q$ to 16. $\sum \frac{P}{18} \ln \frac{P / 18}{Q / 16} = 0.074$. Had the last two values been a million times as large, it would be the same.

# %%
P, Q = torch.tensor([8.0, 4, 2, 4]), torch.tensor([6.0, 6, 2, 2])
P, Q = P / P.sum(), Q / Q.sum()
print(f"{(P * (P / Q).log()).sum():.3f}")

# %% [markdown]
# ## The idea
#
# **Q and DQ are operations of the network**, and where they stand decides what runs in 8 bits (explicit quantisation). Q divides by a scale, rounds and clips; DQ multiplies:
#
# $$q = \operatorname{clamp}(\lfloor x / s \rceil,\, {-127},\, 127)$$
#
# $$\hat{x} = s\,q \qquad s = T / 127$$
#
# A product whose two inputs come out of a DQ is a product of codes, since the scales leave the sum: $\sum_k s_x q_{ik}\, s_{w_j} q_{kj} = s_x s_{w_j} \sum_k q_{ik}\, q_{kj}$. The sum is exact, in 32-bit integers. No scale may change along $k$. As TensorRT does for int8, we take one for the whole of $x$ and one for each column of $w$. So Q stands **at the inputs of products**: bias, GELU and residual follow the product in the same layer, in floats, and are rounded once, by the next Q.

# %% tags=["hide-input"]
COLORS = [palette.blue, palette.vermillion]


def fastest(call, *given, repeat=20):
    """The least of some times, in words."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        call(*given)
        times.append(time.perf_counter() - started)
    return f"{min(times) * 1e3:.2f} ms on this CPU"


def listing(ax, graph, groups, title, lit=None):
    """A line per operation: the number of its layer, and the colour of that in the
    engine, or of layer `lit`.
    """
    of = {node: i for i, group in enumerate(groups) for node in group.nodes}
    words = dict(lines(graph))
    for place, node in enumerate(graph.work):
        name, rest = words[node].strip().split(" = ")
        shown = " ".join(rest.split()[: 1 + len(node.inputs)])
        text = f"{name} = {shown}"
        ax.text(0.09, -place, text, family="monospace", fontsize=9, va="center")
        color = COLORS[of[node] if lit is None else lit]
        ax.barh(-place, 0.06, 0.85, left=0, color=color)
        number = {"ha": "center", "va": "center", "fontsize": 7}
        ax.text(0.03, -place, of[node] + 1, color="white", **number)
    ax.set_title(title, fontsize=10)
    ax.set(xlim=(0, 1), ylim=(-14, 1))
    ax.axis("off")


x, w, b = example_inputs("mlp", T=32)
network = trt.define(mlp, [x], {"w": w, "b": b})
values = trt.quantised_values(network.graph, network.weights)
seen = trt.observe(network, values, [[x]])
scales = {node: trt.scale_of(h) for node, h in seen.items()}
quantised = trt.quantise(network, scales)
program = trt.split(quantised).after
layers = trt.fuse_layers(program)
captured = capture(mlp, x, w, b)
apart = one_by_one(captured)
in_layer = [{node.op for node in layer.nodes} for layer in layers]
[home] = [i for i, ops in enumerate(in_layer) if ops >= {n.op for n in captured.work}]
fig, (left, right_ax) = plt.subplots(1, 2, figsize=(4.8, 4.0))
size = f"{len(apart)} kernels, {traffic(apart) / 1e3:,.0f} kB"
took = fastest(program_of(captured, apart), x, w, b)
listing(left, captured, apart, f"captured\n{size}\n{took}", lit=home)
size = f"{len(layers)} layers, {trt.traffic(layers) / 1e3:,.0f} kB"
took = fastest(trt.build(quantised), x)
listing(right_ax, program, layers, f"int8 engine\n{size}\n{took}")
figure(
    fig,
    alt=(
        "The part's function as two lists of operations, with the number of its layer"
        " before each. Left eleven operations in eleven kernels. Right fourteen in two"
        " layers: one, blue, quantizes the input; the other, red, dequantizes both"
        " operands, multiplies, adds the bias and computes the GELU. All of the left"
        " is red, for it became part of the second. Bytes and time stand above each."
    ),
)

# %% [markdown]
# (In the figure, the number before an operation is the kernel or layer that runs it, the colour its layer in the engine; `%9 = quantize %0 %4` makes value 9 of values 0 and 4.)
#
# **Codes travel.** Q may go up and DQ down through an operation that only moves numbers, picks some, or changes their sign: reshape, transpose, maximum with zero. Rounding keeps order, so $Q(\max(x, 0)) = \max(Q(x), 0)$. Through GELU or a sum it may not.
#
# **Layers are chosen by rule, kernels by clock.** Vertical fusion takes what follows a product along its rows. Horizontal fusion joins products that read the same value: gate and up, or q, k and v. For each layer several **tactics** are timed, and the times kept in a **timing cache**. A tactic must be right before it is fast. PyTorch's product of int8 is wrong where oneDNN, its CPU library, may not use VNNI, the processor's instructions for products of bytes (seen in 2.13, with `ONEDNN_MAX_CPU_ISA=AVX2`). So the builder first tries a sum that it knows.
#
# ## Your turn
#
# How bad is a threshold, by TensorRT's measure, the KL divergence $\sum P \ln (P / Q)$ of the table above? `counts` are those of $|x|$; the first `kept` bins stay. Bin $j$ belongs to level $\lfloor j \cdot \text{levels} / \text{kept} \rfloor$, and a level's count goes in equal parts to those of its bins that are not empty. Where $P > 0$ and $Q = 0$, return `math.inf`.


# %%
def my_divergence(counts, kept, levels):
    """KL(P ‖ Q), as in the table above."""
    raise NotImplementedError("ten lines of yours")


your_turn(check.divergence_of, my_divergence)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(counts, kept, levels):
    inside = counts[:kept].double()
    P = inside.clone()
    P[-1] += counts[kept:].sum()
    level = torch.arange(kept) * levels // kept
    Q = torch.zeros_like(P)
    for each in range(levels):
        filled = (level == each) & (inside > 0)
        Q[filled] = inside[filled].mean()
    P, Q = P / P.sum(), Q / Q.sum()
    return (P * (P / Q).log())[P > 0].sum()


your_turn(check.divergence_of, one_answer)

# %% [markdown]
# ## The code
#
# The builder works on the [front end](02-front-end.ipynb)'s graphs. `divergence` takes all candidates at once, thresholds of 128 to 2,048 bins; `earlier` and `later` move Q and DQ; `products` multiplies codes.

# %% tags=["hide-cell"]
show(trt.divergence, trt.quantised_values, trt.pick)

# %% [markdown]
# | value | type | holds |
# |---|---|---|
# | `network.weights` | `Node` → name | inputs that are known when it is built |
# | `histogram.counts` | int64, (2048,) | counts of $\lvert x \rvert$ |
# | `layer.reads`, `layer.roots` | list of `Node` | what is read and written |
# | `cache.times` | text → tactic → s | times, by all that they depend on |
#
# Half a block of SmolLM2, with its own weights. Nothing here runs but what the engine stores:


# %%
def block(h, gain, gate, up, down):
    """From the norm to the residual."""
    x = h / torch.sqrt(torch.mean(h * h, -1, keepdim=True) + 1e-5) * gain
    return h + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


model = real_model.load()
layer = model.model.layers[5]
weights = {
    "gain": layer.post_attention_layernorm.weight.detach(),
    "gate": layer.mlp.gate_proj.weight.detach(),
    "up": layer.mlp.up_proj.weight.detach(),
    "down": layer.mlp.down_proj.weight.detach(),
}
h = torch.randn(16, 576, generator=torch.Generator().manual_seed(0))
network = trt.define(block, [h], weights, profiles=[trt.Profile(1, 16, 64)])
values = trt.quantised_values(network.graph, network.weights)
seen = trt.observe(network, values, [[h]])
scales = {node: trt.scale_of(each) for node, each in seen.items()}
quantised = trt.quantise(network, scales)
times = trt.TimingCache()
plain = trt.build(network, times, repeat=2)
engine = trt.build(quantised, times, refit=True, repeat=2)
trt.build(quantised, times)  # a second time: nothing is timed
print(f"layers timed: {times.misses}, found in the cache: {times.hits}")
for name, each in (("floats", plain), ("int8", engine)):
    moved = trt.traffic(each.layers) / 1e6
    print(f"{name:6} {len(each.layers)} layers, {moved:5.2f} MB read and written")
for each in engine.layers:
    print(f"  {each.precision:5} {str(each).replace('dequantize', 'DQ')}")

# %% [markdown]
# Norm and Q; gate, up, SiLU, product and Q; down and residual. The middle layer is horizontal fusion: two products, whose values are never written. Which tactic each layer got is this machine's affair (folded below).
#
# An engine takes any number of rows that its **profile** allows, lies in a folder, and takes new weights without a build (**refit**), if it was built for that. What it cannot be used for, it says:

# %% tags=["hide-cell", "nbval-ignore-output"]
for each, tactic in zip(engine.layers, engine.plans[0].tactics, strict=True):
    print(f"{each.precision:5} {tactic}")


# %%
def said(call, *arguments):
    """The first words of a refusal."""
    try:
        call(*arguments)
    except ValueError as refusal:
        words = str(refusal).replace(folder, "…")
        print("refused:", words.split(", and here")[0])


with tempfile.TemporaryDirectory() as folder:
    engine.save(folder)
    again = trt.load_engine(folder)
    compare(again(h[:3])[0], engine(h[:3])[0], "three rows, from disk", tol=0)
    again.refit("down", 2 * weights["down"])
    twice = h + 2 * (engine(h)[0] - h)
    compare(again(h)[0], twice, "after a refit with twice the weight", tol=1e-4)
    said(again.refit, "dwon", weights["down"])
    said(again, h[:1].expand(65, -1))
    file = Path(folder) / "engine.json"
    text = json.loads(file.read_text())
    text["machine"]["instructions"] = "another"
    file.write_text(json.dumps(text))
    said(trt.load_engine, folder)

# %% [markdown]
# An operation that the builder does not know is a **plugin** (`register_plugin`): its shape rule and its kernel. It runs as a layer of its own, since nothing can be fused with what nobody can look into; and an engine that needs it says so where it is not registered.
#
# ## Against the libraries
#
# The same Q/DQ network through ONNX Runtime's CPU provider. Its integer products take the place of ours:

# %% tags=["hide-input"]
import onnx
import onnxruntime


def in_onnxruntime(network, x):
    """Its result, and the operations of its optimised graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimised.onnx")
        session = onnxruntime.InferenceSession(
            to_onnx(trt.bound(network)).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        graph = onnx.load(options.optimized_model_filepath).graph
    result = torch.from_numpy(session.run(None, {"in0": x.numpy()})[0])
    return result, [node.op_type for node in graph.node]


def qdq(function, x, weights):
    """(with Q and DQ where they were put, the engine)."""
    network = trt.define(function, [x], weights)
    values = trt.quantised_values(network.graph, network.weights)
    found = trt.observe(network, values, [[x]])
    scales = {node: trt.scale_of(each) for node, each in found.items()}
    placed = trt.quantise(network, scales, carry=False)
    return placed, trt.build(trt.quantise(network, scales), repeat=1)


# %%
cases = {
    "GELU(x w) v": (lambda x, w, v: F.gelu(x @ w, approximate="tanh") @ v, False),
    "GELU(x w + b) v": (
        lambda x, w, v, b: F.gelu(x @ w + b, approximate="tanh") @ v,
        True,
    ),
}
for name, (function, biased) in cases.items():
    given = {"w": w, "v": w.T.contiguous()} | ({"b": b} if biased else {})
    placed, built = qdq(function, x, given)
    result, ops = in_onnxruntime(placed, x)
    exact, ours = function(x, *given.values()), built(x)[0]
    apart = (ours - result).abs().mean() / (ours - exact).abs().mean()
    print(f"{name}: apart by less than 2% of what 8 bits cost: {bool(apart < 0.02)}")
    codes = sum(each.precision == "int8" for each in built.layers)
    theirs = ops.count("MatMulIntegerToFloat")
    print(f"    products on codes: ours {codes}, ONNX Runtime {theirs} of 2")

# %% [markdown]
# A bias takes the int8 away: ONNX Runtime first makes product and sum a `Gemm`, and its integer rules no longer fit. (On x86 it leaves int8 inputs in floats altogether, unless `session.qdqisint8allowed` is set.) So placement depends on the compiler that will read it.
#
# - **ONNX Runtime 1.32.0**: int8, both FP8 formats, and its entropy on one histogram are as ours.
# - **OpenVINO 2026.4.1**, on two Q/DQ networks, told `INFERENCE_PRECISION_HINT=f32`: every product is in i8, with a bias too; results as ours but for single codes.
# - **ModelOpt 0.47.0**: the entropy of its `HistogramCalibrator` on four histograms, and its scales, are as ours.
# - **TensorRT 11.4.0**: its wheel fetches CUDA libraries from NVIDIA's index, and does not import without them. Nothing was run.
#
# Three defaults to know. In `quantize_static`, `CalibrationMethod.Entropy` has 128 bins and 128 levels: one candidate, the whole range. It is the maximum under another name, and the bins cannot be set there. ModelOpt's command line (`--calibration_method=entropy`, its default) inherits this: for our networks it writes
# the scales of `max`, digit by digit. And percentiles of both are the *lower* edge of a bin, so 100% clips the largest value. (ModelOpt's `mse` for int8 hands its settings over by place, and they arrive as others: on all four histograms it takes the first candidate.)
#
# ## The experiment
#
# Why did entropy ruin the model? Look at what one linear reads, `down_proj` of layer 11, in the first 128 tokens of a text:

# %%
read = {}
linear = model.model.layers[11].mlp.down_proj
hook = linear.register_forward_pre_hook(lambda _, given: read.update(x=given[0][0]))
tokenizer = real_model.load_tokenizer()
ids = tokenizer.encode(course_model.corpus("addresses", "valid")[:2000]).ids[:128]
with torch.no_grad():
    model(torch.tensor([ids]))
hook.remove()
x11 = read["x"].detach()
top = x11.abs().flatten().sort(descending=True)
where = (top.indices[:2] // x11.shape[1]).tolist()
largest = [f"{round(each, -1):,.0f}" for each in top.values[:2].tolist()]
print(f"the largest two, of tokens {where}: {largest[0]} and {largest[1]}")
print(f"the next {top.values[2]:.0f}, half are below {x11.abs().median():.2f}")
histogram = trt.histogram([x11])
thresholds = {name: rule(histogram) for name, rule in trt.CALIBRATORS.items()}
for name, T in thresholds.items():
    shown = f"{T:8.0f}" if T < 100 else f"{round(T, -1):8,.0f}"
    codes = trt.FORMATS["int8"].codes(x11, T / 127)
    print(f"{name:10} {shown}, codes that are not 0: {codes.ne(0).double().mean():.0%}")

# %% [markdown]
# Two numbers in 196,608, both of the first token, and the smaller is a hundred times as large as the next. They are known as massive activations, and act as biases that attention relies on ([Sun et al. 2024](https://arxiv.org/abs/2402.17762 "sun2024massive")).
#
# To KL divergence, a clipped value is one count, however far it was moved: here it cuts the largest to a third. The percentile cuts both to 4. The squared error weighs $3{,}000^2$ and clips nothing. But then a step is 24, and every other number of the tensor becomes 0: with one scale, there is no good choice.

# %% tags=["hide-input"]
rows = [("max", "int8", "max", ""), ("mse", "int8", "mse", "")]
rows += [(name, "int8", name, "") for name in ("99.999%", "99.99%", "99.9%")]
rows += [("entropy", "int8", "entropy", "")]
rows += [("max, down_proj\nin floats", "int8", "max", "down_proj")]
rows += [("entropy, down_proj\nin floats", "int8", "entropy", "down_proj")]
rows += [("each token its\nown scale", "int8", "each token", "")]
rows += [("E4M3, max", "e4m3", "max", ""), ("E5M2, max", "e5m2", "max", "")]
fig, ax = plt.subplots(figsize=(4.8, 4.2))
for place, (_, *key) in enumerate(rows):
    found = bits(*key)
    color = palette.blue if place < 6 else palette.orange
    color = palette.green if place > 8 else color
    ax.plot(found, [place] * len(found), "o", color=color, alpha=0.8)
ax.axvline(floats, color=palette.gray, lw=1)
ax.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0.85, 2.55), xlabel="bits per byte of text")
ax.text(floats + 0.02, -0.3, "inputs in floats", fontsize=8, color=palette.ink)
figure(
    fig,
    alt=(
        "Bits per byte of text by rule, a dot per seed. Int8: max 1.15 to 1.19, mse"
        " 1.09 to 1.10, percentiles from 1.24 up to 2.4, entropy 1.9 to 2.1. With"
        " down_proj in floats: max 0.99, entropy 1.12. A scale per token 0.96, FP8 0.95"
        " and 0.96. Inputs in floats: 0.95."
    ),
)

# %% [markdown]
# A dot is a seed, which draws the 1,024 tokens of calibration text; all is judged on other 1,024. (The weights were stored in 4 bits before they came here.)

# %%
print("                bits per byte   pairs right of 100   inputs clipped")
for form in ("int8", "e4m3"):
    for method in ("max", "mse", "99.999%", "entropy"):
        found = stored(form, method)
        if not found:
            continue
        columns = []
        for column in ("bpb", "right"):
            numbers = [float(run[column]) for run in found]
            digits = 3 if column == "bpb" else 0
            ends = [f"{f(numbers):.{digits}f}" for f in (min, max)]
            columns.append(" to ".join(dict.fromkeys(ends)))
        share = max(float(run["clipped"]) for run in found)
        print(f"{form} {method:9} {columns[0]:17} {columns[1]:20} {share:.4%}")

# %% tags=["hide-output"]
large_guess.settle(100 * round(top.values[0].item() / 100))
rule_guess.settle("mse")

# %% [markdown]
# The order is the same for all three seeds. Entropy is the worst but one, with three values in ten thousand clipped; the squared error is the best, and still loses much. Three ways out, none of them a better histogram: leave `down_proj` in floats, give each token its own scale (other kernels), or use FP8.
# An E4M3 code has the same 8 bits, but its steps grow with the number: its range is wide enough for the maximum, and a search for the least squared error makes it no better.
#
# ## Play
#
# The same tensor. Every threshold pays twice: for what it clips, and for its steps.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
LIMITS = [10, 100, 300, 1000, 1500, 2000, 2500, 3000]
flat = x11.abs().flatten()
top_value = float(flat.max())
LIMITS[-1] = round(top_value)
edges = torch.logspace(-3, 3.7, 60)
heights = [int(((flat >= a) & (flat < z)).sum()) for a, z in pairwise(edges)]


@cache
def costs(threshold: float, form: str) -> tuple[float, float]:
    """Squared error of what is clipped, and of the rest; sums over the tensor."""
    kind = trt.FORMATS[form]
    error = (kind.fake(flat, threshold / kind.largest) - flat).square()
    beyond = flat > threshold
    return float(error[beyond].sum()), float(error[~beyond].sum())


def draw(threshold: int, form: str):
    clipped, rounded = costs(threshold, form)
    fig, (upper, lower) = plt.subplots(
        2, 1, figsize=(4.6, 3.7), height_ratios=(3, 1), layout="none"
    )
    fig.subplots_adjust(left=0.19, right=0.96, top=0.92, bottom=0.15, hspace=0.55)
    upper.step(edges[:-1], heights, where="post", color=palette.blue)
    upper.axvspan(threshold, 5000, color=palette.vermillion, alpha=0.25, lw=0)
    upper.set(xscale="log", yscale="log", ylim=(0.5, 1e5), xlim=(1e-3, 5000))
    upper.set(xlabel="|x|", ylabel="numbers", title=f"{form}, clipped at {threshold:,}")
    lower.barh([1, 0], [clipped, rounded], color=[palette.vermillion, palette.blue])
    lower.set_yticks([1, 0], ["clipping", "rounding"])
    lower.set(xscale="log", xlim=(1, 2e7), xlabel="sum of squared errors")
    upper.minorticks_off()
    lower.minorticks_off()
    return fig


def told(threshold: int, form: str) -> str:
    clipped, rounded = costs(threshold, form)
    return (
        f"{form}, threshold {threshold}: clipping costs {clipped:.2g}, rounding"
        f" {rounded:.2g}"
    )


def missing(threshold: int, form: str) -> str:
    if form != "int8":
        return "this is FP8: the question is about int8"
    totals = {each: sum(costs(each, "int8")) for each in LIMITS}
    best = min(totals, key=totals.get)
    if threshold == best:
        return ""
    return f"the sum is {totals[threshold] / totals[best]:.1f} times the least"


explore(
    draw,
    alt=told,
    title="What a threshold costs",
    challenge="Find the threshold with the least sum of both costs, in int8.",
    missing=missing,
    start={"threshold": 10, "form": "int8"},
    threshold=LIMITS,
    form=["int8", "e4m3"],
)

# %% [markdown]
# ## At scale
#
# Since TensorRT 11 there is no calibrator inside: `--int8`, `--fp16` and `--calib` are gone, networks are strongly typed, and Q and DQ in the ONNX file say all ([NVIDIA 2026](https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-trtexec.html "tensorrt2026migration")). `to_onnx` writes such a file. On a machine with a GPU:
#
# ```bash
# python -m modelopt.onnx.quantization --onnx_path=model.onnx --quantize_mode=fp8 \
#   --calibration_data_path=calib.npz --calibration_method=max --output_path=qdq.onnx
# trtexec --onnx=qdq.onnx --saveEngine=model.plan --refit --timingCacheFile=gpu.cache \
#   --minShapes=in0:1x576 --optShapes=in0:16x576 --maxShapes=in0:64x576 \
#   --profilingVerbosity=detailed --dumpLayerInfo
# polygraphy run qdq.onnx --trt --onnxrt --atol 1e-2
# ```
#
# (`trtexec`'s flags are those of its source at 11.1.0; for dynamic shapes, the file's first dimension must be a name. The first was run here, with `--calibration_eps cpu`; the third on an int8 file, without `--trt`.) What differs from ours: fusion by its own list of patterns, tactics from libraries of GPU kernels, profiles for every dimension, chosen by the caller.
#
# On images the old rule was good: NVIDIA's tutorial expects over 76% from entropy and from mse on ResNet-50, and a little less from 99.9% ([NVIDIA 2026](https://github.com/NVIDIA/TensorRT/blob/main/tools/pytorch-quantization/docs/source/tutorials/quant_resnet50.rst "nvidia2026resnet")). In MLPerf, one team calibrated ResNet-50 by KL divergence and BERT-large by its minimum and maximum
# ([MLCommons 2023](https://github.com/mlcommons/inference_results_v3.0/blob/main/open/H3C/documentation/calibration.md "mlcommons2023h3c")). How a whole LLM is built and served this way is in [Engine](../07-inference/08-engine.ipynb).
#
# ## What to keep
#
# ```python
# scale = histogram.largest / 127                    # the plain rule: try it first
# q = (x / scale).clamp(-127, 127).round()           # at the inputs of products
# y = (q.int() @ w_q.int()) * (scale * w_scale) + b  # one layer, up to the next Q
# key = (operations, wiring, shapes, formats, rows, threads)  # of a timing cache
# ```
#
# **Use** one scale per tensor for images and small outliers; for language models FP8, or a scale per token. **Never** trust a calibrator that you have not measured on the model's task, least of all by the share of values that it clips.
#
# <details><summary>Why does Q stand before a product and not behind it?</summary>
#
# A product needs codes at its inputs. Behind it, bias and GELU would be applied to rounded numbers, with a DQ before and another Q after.
#
# </details>
#
# <details><summary>Why must the builder not compute a weight's DQ ahead of time?</summary>
#
# Its result is a matrix of floats, and the product becomes one of floats. Q of a weight is computed; DQ stays.
#
# </details>
#
# <details><summary>What must not be in a timing cache's key?</summary>
#
# What the time does not depend on: names, and the numbers in a weight. Thirty equal blocks should be timed once.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/08-compilers/07-tensorrt.ipynb).
#
# Further reading: [Migacz 2017](https://on-demand.gputechconf.com/gtc/2017/presentation/s7310-8-bit-inference-with-tensorrt.pdf "migacz2017int8"), where entropy calibration comes from; [Wu et al. 2020](https://arxiv.org/abs/2004.09602 "wu2020integer") for int8 in practice; [Micikevicius et al. 2022](https://arxiv.org/abs/2209.05433 "micikevicius2022fp8") for FP8.
