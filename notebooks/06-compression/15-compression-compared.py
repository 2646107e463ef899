# %% [markdown]
# # Compression compared
#
# Each lesson of this part ended with a number that its method made better. Here all methods stand in one table: what they store, how much worse the model
# becomes, and what that buys on this CPU. At the end you can say for any compressed model what it really costs, throw out
# those that another beats, and choose one for a budget.

# %% tags=["hide-input"]
import csv
import itertools
import math
from copy import deepcopy
from dataclasses import replace

import torch

from llmlab.checks.compression.compression_compared import check
from llmlab.compression import compression_compared as compared
from llmlab.compression import kernels, recipes
from llmlab.compression import quantization_basics as qb
from llmlab.compression.quantization_basics import QuantConfig
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
from llmlab.models import accounting, course_model, language_model, real_model
from llmlab.models.llama import Llama
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# A model "in 4 bits" has a scale for each 64 weights, and embedding, output layer and norms in 16 bits. Counted over all parameters:

# %%
for name in ("llama-2-70b", "llama-2-7b", "smollm2-135m"):
    parts = accounting.parameters_by_part(preset(name))
    linears = parts["attention"] + parts["mlp"]
    weights = sum(parts.values())
    stored = qb.bits_per_weight(QuantConfig(4, group_size=64)) * linears
    stored += 16 * (weights - linears)
    print(
        f"{name:13} {stored / weights:.2f} bits per parameter, {stored / 8e6:,.0f} MB"
    )

# %% [markdown]
# The same "4 bits" are 4.3 in a large model and 6.7 in a small one, where half of the bytes are the embedding. Whoever pays for memory pays for all of it. And
# a reader who waits pays again: for each token a model reads nearly all of its bytes once.
#
# ## Predict
#
# SmolLM2-135M-Instruct, cut to its first six layers, gets codes of 4 bits for its linears and of 8 bits for its embedding, and decodes with a compiled
# kernel. Floats of 32 bits take about five times as many bytes.

# %%
speed_guess = predict(
    "How many times as fast as float32 does it write on this CPU?", unit="times"
)
task_guess = predict(
    "Of 100 easy questions of grammar the float model gets 87 right, and a coin 50."
    " How many after rounding to 4 bits in groups of 64?",
    unit="of 100",
)

# %% [markdown]
# ## By hand
#
# Four methods, two numbers each. Who is worth a look?
#
# | | MB | loss | |
# |---|---|---|---|
# | A | 4 | 3.9 | nobody is as small: stays |
# | B | 6 | 3.7 | A is smaller, but worse: stays |
# | C | 6 | 3.8 | B is as small and better: out |
# | D | 9 | 3.7 | B is smaller and as good: out |
#
# B *dominates* C and D: it is no worse in both numbers, and better in one. No exchange rate between megabytes and loss was needed. What nobody dominates is the
# *Pareto front*; between A and B the table does not decide, your budget does.

# %%
four = torch.tensor([[4, 3.9], [6, 3.7], [6, 3.8], [9, 3.7]])
for name, on_front in zip("ABCD", compared.pareto(four).tolist(), strict=True):
    print(name, "on the front" if on_front else "dominated")

# %% [markdown]
# ## The idea
#
# Six numbers describe a compressed model. Three are counted, three are measured.
#
# $$\begin{aligned}
# \text{bits per parameter} &= 8\, S \,/\, P \\
# \text{bits per byte} &= \textstyle\sum_t -\log_2 p(x_t) \,/\, T \\
# \text{accuracy} &= \text{share of } p_+ > p_- \\
# \text{tokens per second} &\le 1 \,/\, (Q / \beta + t)
# \end{aligned}$$
#
# and beside them bytes on disk, and bytes in memory. $S$ are the bytes that are stored, $P$ is the number of parameters before compression, $T$ that of the text's bytes; $p_+$ and $p_-$ are the probabilities of a right and a wrong sentence. Bits per byte
# ([Gao et al. 2020](https://arxiv.org/abs/2101.00027 "gao2020pile")) compare models whatever their tokenizer, and less is better. The task is one of *minimal pairs*
# ([Linzen et al. 2016](https://arxiv.org/abs/1611.01368 "linzen2016assessing"); [Warstadt et al. 2020](https://arxiv.org/abs/1912.00582 "warstadt2020blimp")): two sentences that
# differ in one word, one of them wrong. The last line is the *roofline* of decoding ([Williams et al. 2009](https://doi.org/10.1145/1498765.1498785 "williams2009roofline")): a step reads $Q$ bytes
# at the memory's bandwidth $\beta$, and $t$ seconds depend on no byte. A weight that was fetched is used for two operations, so that arithmetic
# hardly counts.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 2.6))
gigabytes = torch.linspace(0.03, 0.6, 100)
for t, color in ((0, palette.blue), (0.005, palette.vermillion)):
    rate = [compared.predicted_rate(g * 1e9, 20e9, t) for g in gigabytes.tolist()]
    ax.plot(1000 * gigabytes, rate, color=color)
ax.text(150, 210, "only memory", color=palette.blue)
ax.text(40, 12, "and 5 ms per token", color=palette.vermillion)
ax.set(xlabel="MB that a token reads", ylabel="tokens per second", ylim=(0, 420))
figure(
    fig,
    alt=(
        "Tokens per second over the megabytes that a token reads, at 20 GB per second."
        " The curve of the memory alone rises steeply below 100 MB. With 5 milliseconds"
        " that depend on no byte it stays below 200."
    ),
)

# %% [markdown]
# ## Your turn
#
# The front, in any number of coordinates. Less is better, but in the columns that `larger` lists more is. Return True for each row that no other dominates.


# %%
def front(points, larger):
    """(n,) bool from points (n, k)."""
    raise NotImplementedError("five lines of yours")


your_turn(check.front, front)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(points, larger):
    costs = points.clone()
    costs[:, larger] *= -1
    no_worse = (costs[:, None] <= costs).all(-1)
    better = (costs[:, None] < costs).any(-1)
    return ~(no_worse & better).any(0)


your_turn(check.front, one_answer)

# %% [markdown]
# ## The code
#
# `recipes` calls each method of this part by its name, as `llmlab compress` does. The counting below knows no method: it looks at the tensors that a model holds,
# each piece of memory once.
#
# | value | counts |
# |---|---|
# | `stored_bytes` | codes, scales, zero points, factors, embedding, norms, by part |
# | `per_token` | the same, but of an untied embedding one row, and the cache |
# | `preferred` | for each pair, whether the good sentence is the likelier one |

# %% tags=["hide-output"]
show(
    compared.stored_bytes,
    compared.per_token,
    compared.preferred,
    compared.pareto,
    recipes.compress,
)

# %% [markdown]
# ## Against the libraries and mathematics
#
# The front by brute force; bits per byte by the definition of the evaluation harness; bits by gguf's table of block sizes; and a file, whose
# bytes must be those that were counted.

# %%
import tempfile
from pathlib import Path

import gguf

torch.manual_seed(0)
points = torch.randint(0, 4, (30, 3)).float()
beaten = [any((a <= b).all() and (a < b).any() for a in points) for b in points]
compare(compared.pareto(points), ~torch.tensor(beaten), "front, one by one", tol=0)

losses = torch.rand(50) * 5
per_byte = -sum((-losses).tolist()) / 210 / math.log(2)  # -weighted_mean / ln 2
compare(language_model.bits_per_byte(losses, 210), per_byte, "lm-eval's bits per byte")

for kind, bits in (("Q4_0", 4), ("Q8_0", 8)):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    ours = qb.bits_per_weight(QuantConfig(bits, group_size=block))
    compare(ours, 8 * size / block, f"bits per weight of {kind}", tol=0)

small = recipes.compress(course_model.load(), recipes.Recipe("rtn"))
with tempfile.TemporaryDirectory() as folder:
    data = compared.write(small, Path(folder) / "model.safetensors").read_bytes()
header = 8 + int.from_bytes(data[:8], "little")
counted = sum(compared.stored_bytes(small, torch.float16).values())
compare(len(data) - header, counted, "bytes of a file, and those counted", tol=0)

# %% [markdown]
# ## The experiment: speed
#
# First the machine: how many bytes per second does a sum over 256 MB read? Then the real model, cut to its first six layers so that this page runs in
# seconds, in four forms. The head is whole, so that the limit is what each form reads over the bandwidth.

# %% tags=["hide-input"]
model = real_model.load()
encode = real_model.load_tokenizer().encode
short = Llama(replace(model.config, num_hidden_layers=6)).eval()
short.load_state_dict({k: model.state_dict()[k] for k in short.state_dict()})
forms = {"float32": short, "bfloat16": deepcopy(short).bfloat16()}
four_bits = qb.apply(deepcopy(short), QuantConfig(4, group_size=64))
if kernels.available():
    forms["int8"] = compared.eight_bits(short)
    forms["int4 g64"] = kernels.fast(four_bits)
else:
    print("no C compiler here: the forms with few bits are left out")

# %% tags=["hide-output", "nbval-ignore-output"]
beta = compared.bandwidth()
prompt = torch.tensor([encode("The State of the Union is").ids])
read, written = {}, {}
print(f"memory: {beta / 1e9:.1f} GB per second, {torch.get_num_threads()} threads\n")
print(f"{'':9} {'MB a token':>10} {'limit':>7} {'measured':>9} {'reached':>8}")
for name, form in forms.items():
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    read[name] = compared.per_token(form, past=10, cache_dtype=dtype)
    limit = compared.predicted_rate(read[name], beta)
    written[name] = compared.decode_rate(form, prompt, new=8)
    print(
        f"{name:9} {read[name] / 1e6:10.1f} {limit:7.0f} {written[name]:9.0f}"
        f" {written[name] / limit:8.0%}"
    )
if "int4 g64" in written:
    speed_guess.settle(written["int4 g64"] / written["float32"], digits=2)

# %% [markdown]
# The whole model, and other forms of it, each in a process of its own, on the machine that the first line names
# (`scripts/compression_compared_sweep.py --speed`):

# %% tags=["hide-input"]
with compared.SPEED.open(newline="", encoding="utf-8") as file:
    speeds = list(csv.DictReader(file))
first = speeds[0]
print(f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}\n")
head = f"{'':18} {'MB held':>8} {'resident':>9} {'limit':>6}"
print(f"{head} {'tokens/s':>9} {'reached':>8}")
for row in speeds:
    limit = compared.predicted_rate(float(row["traffic"]), float(row["bandwidth"]))
    rate = float(row["rate"])
    print(
        f"{row['form']:18} {float(row['held']) / 1e6:8.0f}"
        f" {float(row['resident']) / 1e6:9.0f} {limit:6.0f} {rate:9.1f}"
        f" {rate / limit:8.0%}"
    )

order = sorted(read, key=read.get)
print("\nfewest bytes first:", ", ".join(order))
codes = compared.stored_bytes(four_bits)["linears"]
print("4-bit linears, codes and scales:", f"{codes / 1e6:.1f} MB")
if "int4 g64" in forms:
    held = compared.stored_bytes(forms["int4 g64"])["linears"]
    print("as its kernel wants them:", f"{held / 1e6:.1f} MB, {held / codes:.2f} times")

# %% [markdown]
# *Held* are the bytes of the model's tensors, *resident* those by which the process grew; *decoded* makes floats of the codes whenever they are used. *Limit* is $\beta / Q$ with $t = 0$, and no form reaches it. Calls, norms and attention take as long with few bytes as with many, and codes of 4 bits must be unpacked before they are
# multiplied. So a fifth of the bytes does not make a model five times as fast; still, the two forms with the fewest bytes are the fastest, and they are level:
# 4 bits read fewer bytes than 8, and unpacking takes back what that saves. And bfloat16 shows that a format is as fast
# as its kernel: half of the bytes help only where the CPU's library has a good product for them.
#
# ## The experiment: quality
#
# Now all methods on the whole model. `scripts/compression_compared_sweep.py` compressed it, wrote the file, read it back where there is a folder for it, and judged it on 4,096 tokens of
# held-out addresses and 500 pairs of five kinds: "The teachers near the house **are**/is", "My sister saw **herself**/himself", … Both words of a pair are as often right as wrong,
# so a model that always says "is" gets one half. In the names, `rtn` rounds to nearest; behind the method stand the bits of the linears, and `g64` for a scale per 64 weights or `row` for one per row; `e8` or `e4` are bits of the embedding, else 16 (in gguf's files 8). A few pairs, and what a model makes of them:

# %% tags=["hide-output"]
some = compared.pairs(each=2, seed=1)
ids = lambda text: encode(text).ids  # noqa: E731
right = compared.preferred(model, ids, some)
for pair, good in zip(some, right.tolist(), strict=True):
    print(f"{'✓' if good else '✗'} {pair.prefix}{pair.good}, not{pair.bad}")

with compared.FILE.open(newline="", encoding="utf-8") as file:
    runs = {row["recipe"]: row for row in csv.DictReader(file)}


def number(name: str, field: str) -> float:
    """One number of the table."""
    return float(runs[name][field])


task_guess.settle(100 * number("rtn 4 g64", "accuracy"), digits=2)

# %% tags=["hide-input"]
print(f"{'':16} {'bits of':>7} {'bits per':>8} {'MB on':>6}", end="")
print(f" {'bits per':>15} {'right':>13}")
print(f"{'':16} {'linears':>7} {'param.':>8} {'disk':>6}", end="")
print(f" {'byte':>15} {'of 100':>13}")
for name in sorted(runs, key=lambda name: number(name, "bytes")):
    bpb, accuracy = number(name, "bpb"), 100 * number(name, "accuracy")
    scale = number("floats", "bpb") / number("floats", "loss")
    spread = 2 * scale * number(name, "grown_error")
    change = 200 * number(name, "accuracy_change_error")
    print(
        f"{name:16} {number(name, 'linear_bits'):7.2f} {number(name, 'bits'):8.2f}"
        f" {number(name, 'bytes') / 1e6:6.1f} {bpb:7.3f} ± {spread:.3f}"
        f" {accuracy:6.1f} ± {change:.1f}"
    )

FAMILIES = {
    "floats": (palette.gray, "s"),
    "rtn": (palette.vermillion, "o"),
    "gptq awq lorc": (palette.blue, "o"),
    "smoothquant llm.int8 zeroquant": (palette.purple, "D"),
    "mxfp4 nvfp4 gguf": (palette.orange, "^"),
    "sparsegpt wanda magnitude": (palette.green, "v"),
}


def look(name: str) -> tuple[str, str]:
    """Colour and marker of a recipe's family."""
    return next(v for k, v in FAMILIES.items() if name.split()[0] in k.split())


names = list(runs)
table = torch.tensor([[number(n, "bytes") / 1e6, number(n, "bpb")] for n in names])
on_front = compared.pareto(table.double()).tolist()
best = sorted((table[i].tolist(), names[i]) for i in range(len(names)) if on_front[i])


def plot(ax, size: int = 30) -> None:
    """All recipes and the front, as stairs: a budget buys the last step before it."""
    xs, ys = zip(*(point for point, _ in best), strict=True)
    ax.step([*xs, 290], [*ys, ys[-1]], where="post", color=palette.gray, zorder=1)
    for name, (x, y) in zip(names, table.tolist(), strict=True):
        color, marker = look(name)
        ax.scatter(x, y, s=size, color=color, marker=marker, zorder=2)
    ax.set(xlim=(60, 290), ylim=(0.955, 1.45), xlabel="MB on disk")
    ax.set_ylabel("bits per byte")


fig, ax = plt.subplots(figsize=(4.8, 3.8))
plot(ax)
for family, (color, marker) in FAMILIES.items():
    ax.scatter([], [], color=color, marker=marker, label=family.replace(" ", ", "))
ax.legend(fontsize=8, loc="upper right")
figure(
    fig,
    alt=(
        "Bits per byte over megabytes on disk, a mark for each recipe, and stairs"
        " through those that none beats, from 72 megabytes on. At 113 megabytes, the"
        " linears in 4 bits, the method decides: GPTQ lies far below rounding. From 135"
        " to 163 megabytes 8 bits lie at"
        " the height of the floats, which take 269. SparseGPT in 2:4, at 176, lies far"
        " above the stairs."
    ),
)
print("on the front:", ", ".join(name for _, name in best))
above = [name for name, (_, y) in zip(names, table.tolist(), strict=True) if y > 1.45]
print("above the picture:", ", ".join(above) or "none")


# %%
def lost(name: str) -> float:
    """Bits per byte above the floats."""
    return number(name, "bpb") - number("floats", "bpb")


def surely(name: str) -> str:
    """Whether the questions of grammar tell it from the floats."""
    change = number(name, "accuracy_change")
    sure = abs(change) > 2 * number(name, "accuracy_change_error")
    return "worse" if sure and change < 0 else "better" if sure else "no difference"


of_rounding = lost("rtn 4 g64")
print("bits per byte lost, as a share of what 4 bits by rounding lose; grammar")
for name in sorted(names, key=lost):
    print(f"{name:16} {lost(name) / of_rounding:5.0%}   {surely(name)}")

agree = total = 0
for a, b in itertools.combinations(names, 2):
    gap = number(a, "accuracy") - number(b, "accuracy")
    total += gap != 0
    agree += gap * (lost(a) - lost(b)) < 0
embedding = accounting.parameters_by_part(model.config)["embedding"]
print(f"the embedding in 16 bits: {2 * embedding / 1e6:.1f} MB of every such file")
print(f"bits per byte and grammar agree on {agree} of {total} pairs of recipes")

# %% [markdown]
# ± is two standard errors of the *change* from the float model, token by token or pair by pair: both judged the same text. What is within it may be chance.
#
# **8 bits are free.** Rounded row by row, without any text, the model loses next to nothing, and the questions see no difference, also where the embedding has 8 bits
# (*e8*) and the file half its size. Whoever stores 16 bits pays for nothing.
#
# **At 4 bits the method decides.** GPTQ with the largest inputs first, AWQ and LoRC with factors for the outputs lose about a third of what rounding does, in the same bytes or
# 2% more. The questions of grammar tell the rounded model from the floats, and none of these three. It is the place in the table where a few thousand tokens of text buy most. Of the 4-bit floats, NVFP4 lies between, and
# MXFP4 loses more than integers with finer scales. One bit less by rounding, and the model has forgotten half of its grammar beyond chance; with 2 bits it flips a coin.
#
# **The embedding decides the size.** With linears in 4 bits it takes half of the file, whichever method made them. In 8 bits it takes half of that and costs nothing that 4,096 tokens
# could show; in 4 bits (*e4*) it costs more than the linears did. The challenge of this part begins here.
#
# **Zeros are no bytes.** Half of the weights gone wherever they matter least: the file is as large as before. In the pattern 2:4 they leave 9 bits per weight: more than codes of 8 bits take, and
# more is lost. They are for processors that multiply such a pattern twice as fast.
#
# Loss and task mostly agree on which of two recipes is better. Where they do not, the ± says why: 500 questions cannot tell apart what
# 4,096 tokens can. One word on the subject: the file that this model was made from stored these linears in 4 bits once (Q4_1), so a form that has its very levels, groups of
# 32 with a minimum, would seem to lose nothing. None of the recipes has them; gguf's Q4_0, with the same groups and no minimum, comes nearest, and may look too good.
#
# ## Play
#
# You have a budget in megabytes. The dashed line is what it buys, and the ring is the best that fits, by bits per byte or by the questions of grammar.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
BUDGETS = [75, 80, 86, 92, 100, 115, 140, 165, 275]
FIELDS = {"bits per byte": ("bpb", 1), "grammar": ("accuracy", -1)}
sizes = table[:, 0]


def winner(budget: int, judge: str) -> str | None:
    """The recipe that is best within the budget."""
    field, sign = FIELDS[judge]
    loss = torch.tensor([sign * number(name, field) for name in names])
    place = compared.best_within(sizes, loss, budget)
    return None if place is None else names[place]


def bought(budget: int, judge: str) -> str:
    """The winner in words."""
    name = winner(budget, judge)
    if name is None:
        return "nothing fits"
    right = 100 * number(name, "accuracy")
    return f"{name}: {number(name, 'bpb'):.3f} bits per byte, {right:.0f} of 100"


def draw(budget: int, judge: str):
    fig, ax = plt.subplots(figsize=(4.8, 2.9))
    plot(ax, size=18)
    ax.axvline(budget, color=palette.ink, linestyle="--", linewidth=1)
    name = winner(budget, judge)
    if name is not None:
        x, y = table[names.index(name)].tolist()
        ax.scatter(x, min(y, 1.44), s=150, facecolors="none", edgecolors=palette.ink)
    ax.set_title(bought(budget, judge), fontsize=9)
    return fig


def good_enough(budget: int) -> bool:
    name = winner(budget, "bits per byte")
    return name is not None and number(name, "bpb") - number("floats", "bpb") < 0.02


least = min(budget for budget in BUDGETS if good_enough(budget))


def missing(budget: int, judge: str) -> str:
    name = winner(budget, judge)
    if name is None:
        return "nothing fits into so little."
    gap = number(name, "bpb") - number("floats", "bpb")
    if gap >= 0.02:
        return f"it is {gap:.3f} worse."
    return "a smaller budget does it." if budget > least else ""


explore(
    draw,
    alt=lambda budget, judge: (
        f"Budget {budget} MB, by {judge}: {bought(budget, judge)}"
    ),
    title="What a budget buys",
    challenge="Find the smallest budget that loses less than 0.02 bits per byte.",
    missing=missing,
    start={"budget": 275, "judge": "bits per byte"},
    budget=BUDGETS,
    judge=list(FIELDS),
)

# %% [markdown]
# ## At scale
#
# On a GPU nothing changes but the numbers: an H100 reads 3.35 TB per second. What the limit is for one reader, and for which a card of 80 GB is enough:

# %% tags=["hide-input"]
H100, CARD = 3.35e12, 80e9
shape = preset("llama-2-70b")
parts = accounting.parameters_by_part(shape)
inside = parts["attention"] + parts["mlp"]
rest = 2 * (sum(parts.values()) - inside)
cache = accounting.kv_cache_bytes(shape, 1, 4096)
for bits in (16, 8.25, 4.25, 3.25):
    size = bits * inside / 8 + rest + cache
    fits = "fits" if size < CARD else "does not fit"
    rate = compared.predicted_rate(size, H100)
    need = f"Llama 2 70B, {bits:5} bits: {size / 1e9:5.0f} GB"
    print(f"{need} {fits:12} {rate:4.0f} tokens/s")

# %% tags=["hide-cell"]
# Paper, ours: what papers of this part say about sizes, counted again.
from llmlab.course.book import published

for row in published.rows():
    if row.part == "compression":
        same = "same" if row.same else "differs"
        print(
            f"{row.paper:20} {row.what[:44]:44} {row.published:>4} {row.unit:3} {same}"
        )

# %% [markdown]
# A folder that vLLM opens, from this course, and its server; the second line wants a GPU:
#
# ```bash
# llmlab compress smollm2 -o small --method gptq-act-order --bits 4 --group 64
# vllm serve ./small --max-model-len 4096
# ```
#
# `llmlab compress` writes folders for rounding, GPTQ and AWQ that other libraries open, ordinary ones after pruning, and one of our own after SmoothQuant. LLM.int8(), ZeroQuant, the low-rank
# repair and the 4-bit floats are simulations here: their codes are counted from real tensors, but no kernel of ours multiplies with them.
#
# <details><summary>Which method when</summary>
#
# | you have | take | lesson |
# |---|---|---|
# | memory for 8 bits | round to nearest, one scale per row; nothing to calibrate | [1](01-quantization-basics.ipynb) |
# | a GPU, large batches, prompts | W8A8: SmoothQuant, or LLM.int8() without calibration | [2](02-llm-int8.ipynb), [3](03-smoothquant.ipynb) |
# | memory for 4 bits, a few thousand tokens of your text | GPTQ with the largest inputs first, or AWQ | [5](05-gptq.ipynb), [6](06-awq.ipynb) |
# | no text at all | 4 bits with small groups and a zero point, or gguf | [1](01-quantization-basics.ipynb) |
# | a GPU with units for 4-bit floats | NVFP4 before MXFP4 | [14](14-low-rank.ipynb) |
# | some hours of training | distillation of the layers, or LLM-QAT | [4](04-zeroquant.ipynb), [7](07-llm-qat.ipynb) |
# | several tasks on one base | scales or adapters on codes that stay | [8](08-peqa-and-qlora.ipynb) |
# | a GPU with sparse units | SparseGPT in 2:4 | [9](09-magnitude-wanda-sparsegpt.ipynb) |
# | a smaller model of the same family | take it, or distil into it | [12](12-distillation.ipynb) |
#
# </details>
#
# ## What to keep
#
# ```python
# sum(t.numel() * t.element_size() for t in each_once(model)) * 8 / parameters   # bits
# losses.sum() / math.log(2) / len(text.encode())                                # bits per byte
# (losses - float_losses).std() / n**0.5                                         # its ±, paired
# no_worse, better = (a[:, None] <= a).all(-1), (a[:, None] < a).any(-1)
# front = ~(no_worse & better).any(0)
# 1 / (bytes_per_token / bandwidth + fixed)                                      # tokens per second
# ```
#
# **Use** all of them before you believe a table: bits without scales, sizes without the embedding, a loss without its spread and a speed without its kernel each make a method look better than it is. **Not** for a choice between
# models of different sizes: whether a large model in few bits beats a small one in many is another experiment.
#
# <details><summary>A model in 4 bits is a quarter of one in 16. Why is it not four times as fast?</summary>
#
# Embedding and head may have stayed in 16 bits, scales come on top, and calls, norms, attention and unpacking take time that no byte explains.
#
# </details>
#
# <details><summary>Half of the weights are zero. What does the file save?</summary>
#
# Nothing, as long as zeros are stored like other numbers. Packed as 2:4 in 16 bits it is 9/16.
#
# </details>
#
# <details><summary>Two methods differ by less than their ±. Which one is better?</summary>
#
# This measurement does not say. Look whether the ± is that of the paired difference, then take more text, or the cheaper method.
#
# </details>
#
# Now write it yourself, and take up the challenge of this part: [the exercises](../../work/06-compression/15-compression-compared.ipynb).
#
# Further reading: [Dettmers & Zettlemoyer 2022](https://arxiv.org/abs/2212.09720 "dettmers2022case") ask how many bits are best when the bytes of a model are fixed, over
# 35,000 experiments.
