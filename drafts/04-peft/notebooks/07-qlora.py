# %% [markdown]
# # QLoRA: fine-tune 65 billion parameters on one GPU
#
# LoRA trains little but still holds the whole model in 16 bits. QLoRA holds it in 4, in a format made for the way weights are
# distributed, and trains through it. By the end of this page you will have built that format, trained on top of it, and counted a 65B model into 48 GB.

# %%
import math
import tempfile
import warnings

import torch

from llmlab.course import compare, explore, figure, palette, plt, show
from llmlab.models import course_model, language_model, real_model
from llmlab.models.accounting import parameters
from llmlab.models.language_model import next_token_loss
from llmlab.models.presets import preset
from llmlab.peft import lora, nf4, paging, qlora, walk
from llmlab.peft.lora import LoRAConfig
from llmlab.peft.paging import UnifiedMemory
from llmlab.peft.qlora import QLoRAConfig
from llmlab.training import pretraining

# %% [markdown]
# ## What it costs
#
# To fine-tune all of a 65B model with 16-bit weights and gradients and Adam's two averages in 32 bits takes 12 bytes a parameter. LoRA does away with the gradients and the averages. It does not touch the first 2 of
# the 12, the frozen weights themselves.

# %%
llama_65b = preset("llama-65b")
n = parameters(llama_65b)
print(f"Llama 65B: {n / 1e9:.1f} billion parameters")
print(f"full fine-tuning: {12 * n / 1e9:.0f} GB, {math.ceil(12 * n / 80e9)} GPUs of 80 GB")
print(f"LoRA: {2 * n / 1e9:.0f} GB for the frozen weights alone, {math.ceil(2 * n / 80e9)} GPUs of 80 GB")

# %% [markdown]
# ## Predict
#
# A weight in 4 bits is one of 16 values, times a scale that it shares with its neighbors: 64 weights, one scale. We take weights from a normal distribution and round them in three ways: to **INT4**, whose levels are
# evenly spaced; to **FP4**, a tiny floating-point number with 2 exponent bits; and to **NF4**, made for the normal distribution. **By how much is NF4's squared error smaller than
# INT4's? And where does FP4 come out?** Write your guess down; the experiment computes it.

# %%
my_guess = {"NF4 error / INT4 error": None, "FP4 error / INT4 error": None}

# %% [markdown]
# ## The idea
#
# Trained weights look like draws from a normal distribution: many near zero, few far out. Evenly spaced levels then waste most of their number on the tails. Better put levels close where weights are many. NF4 puts them at
# *quantiles*, so that from one level to the next there is the same share of a normal distribution. Here are the levels of three formats, over the weights of a real layer divided by the largest of their 64.

# %%
real = real_model.load()
weight = dict(real.named_parameters())["model.layers.12.mlp.up_proj.weight"].detach()
_, scaled = nf4.absmax_blocks(weight.flatten(), 64)
fig, axes = plt.subplots(3, 1, figsize=(4.8, 4.2), sharex=True)
for ax, (kind, color) in zip(
    axes, {"int4": palette.gray, "fp4": palette.green, "nf4": palette.blue}.items(), strict=True
):
    ax.hist(scaled, bins=101, color=palette.light, density=True)
    ax.vlines(nf4.levels_of(kind), 0, 1.5, color=color)
    ax.set(yticks=[], ylabel=kind.upper())
axes[-1].set_xlabel("weight / largest of its block of 64")
figure(
    fig,
    alt="Histogram of scaled weights, a bell around zero, with the levels of INT4 evenly spaced, of FP4 crowded at zero with wide gaps outside, and of NF4 dense in the middle and wider apart towards the ends.",
)

# %% [markdown]
# In the symbols of [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314 "dettmers2023qlora"), with LoRA's letters for the adapter:
#
# $$h = \text{doubleDequant}(c_1, c_2, W^{\text{NF4}})\, x + \frac{\alpha}{r} B A x$$
#
# Four ideas, each worth a number:
#
# - **NF4.** Seven negative levels, an exact 0 and eight positive ones, at quantiles of $N(0,1)$, divided by the largest. A weight is stored as the number of its nearest level.
# - **Double quantization.** One 32-bit scale for 64 weights is half a bit a weight. So the scales are quantized too: subtract their mean (a largest absolute value is never negative), cut into blocks of 256, and keep 8 bits
#   each. $32/64 = 0.5$ bits become $8/64 + 32/(64 \cdot 256) = 0.127$.
# - **Two types.** Weights are *stored* in 4 bits and *computed with* in 16 or 32. Each product dequantizes its weight, uses it and throws it away, and the way back does so again. Gradients flow through $\hat W$ to $x$, and to $A$ and $B$;
#   $W$ itself gets none.
# - **Paged optimizers.** Adam's averages live in memory that may move to the host when a long sequence needs the room, and comes back when the optimizer asks for it.

# %% [markdown]
# ## The code
#
# The format is a few pure functions on tensors; the layer holds their result and a pair of products.

# %%
show(nf4.normal_float, nf4.absmax_blocks, nf4.nearest, nf4.quantize_scales, nf4.dequantize, qlora._FrozenProduct)

# %% [markdown]
# What is stored of a `q_proj` of the course model, 128 × 128:
#
# | tensor | shape | type | bytes |
# |---|---|---|---|
# | codes, two a byte | 8,192 × 1 | uint8 | 8,192 |
# | scales | 256 | uint8 | 256 |
# | scales of scales | 1 | float32 | 4 |
# | mean of the scales | scalar | float32 | 4 |
#
# That is 4.129 bits a weight, against 32 before.

# %%
compare(nf4.normal_float(), nf4.NF4, what="NF4 derived against NF4 as published", tol=1e-6)
print(" ".join(f"{v:.3f}" for v in nf4.normal_float().tolist()))
print(
    f"bits a weight: {nf4.bits_per_weight(64, double=False)} with float scales, {nf4.bits_per_weight(64):.3f} with double quantization (paper: 4.5 and 4.127)"
)

# %% [markdown]
# ## Against the library
#
# `bitsandbytes` is the authors' library. Codes and scales must be *identical*, not merely close: weights quantized by one are read by the other. Odd sizes too, whose last block is short.

# %%
import bitsandbytes.functional as bnb

torch.manual_seed(0)
for shape in ((128, 128), (24, 40), (33, 130), (7,)):
    w = torch.randn(shape)
    for kind in ("nf4", "fp4"):
        ours = nf4.quantize(w, kind)
        codes, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=True)
        same = [
            (ours.packed, codes),
            (ours.scales, state.absmax),
            (ours.scales2, state.state2.absmax),
            (ours.offset, state.offset),
        ]
        assert all(torch.equal(a, b) for a, b in same), (shape, kind)
print("codes, scales, scales of scales and means: identical to bitsandbytes', bit for bit")
codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
compare(
    nf4.dequantize(nf4.quantize(weight)), bnb.dequantize_4bit(codes, state), what="a real layer, there and back", tol=0
)

# %% [markdown]
# Now the whole method. On their side `transformers` loads the course model with `load_in_4bit`, and `peft` adds an adapter. On ours, `qlora.apply` does both. The adapter travels in a file.

# %%
import peft
from transformers import BitsAndBytesConfig, LlamaForCausalLM, logging

warnings.filterwarnings("ignore", category=FutureWarning)
logging.disable_progress_bar()

tokenizer = course_model.load_tokenizer()
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])
model = qlora.apply(course_model.load(), QLoRAConfig(r=4, alpha=8), generator=torch.Generator().manual_seed(0))
for name, p in model.named_parameters():
    if "lora_B" in name:  # a B that has learned something, so that the comparison says something
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(len(name)))
folder = tempfile.mkdtemp()
qlora.save(model, folder)
four_bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
base = LlamaForCausalLM.from_pretrained(course_model.MODEL, quantization_config=four_bits, dtype=torch.float32)
theirs = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
compare(model(prompt), theirs(prompt).logits, what="logits, our 4 bits and theirs", tol=1e-4)

next_token_loss(model(prompt), prompt).backward()
theirs(prompt, labels=prompt).loss.backward()
mine = torch.cat([p.grad.flatten() for n, p in sorted(model.named_parameters()) if p.grad is not None])
peers = torch.cat([p.grad.flatten() for n, p in sorted(theirs.named_parameters()) if p.grad is not None])
compare(mine, peers, what="gradients of every A and B", tol=1e-5)

plain = course_model.load()(prompt)
compare(qlora.remove(model)(prompt), plain, what="logits after removing", tol=0)

# %% [markdown]
# ## The experiment
#
# First the prediction. A million weights from a normal distribution, blocks of 64, scales in float; the squared error relative to the variance. E2M1 is FP4 with a usual smallest step; `bitsandbytes`' FP4 has 1/16 of that step
# there, a level that nearly coincides with 0 and is as good as lost.

# %%
gaussian = torch.randn(2**20, generator=torch.Generator().manual_seed(0))


def error(w, kind, block=64):
    return ((nf4.dequantize(nf4.quantize(w, kind, block, double=False)) - w).square().mean() / w.square().mean()).item()


errors = {kind: error(gaussian, kind) for kind in ("int4", "fp4", "e2m1", "nf4")}
for kind, e in errors.items():
    print(f"{kind.upper():5} error {100 * e:.2f}% of the variance, {e / errors['int4']:.2f} × INT4's")
assert errors["nf4"] == min(errors.values())
doubled = nf4.dequantize(nf4.quantize(gaussian, double=True))
print(f"NF4 with double quantization: {100 * (doubled - gaussian).square().mean() / gaussian.square().mean():.2f}%")

# %% [markdown]
# NF4 wins, and double quantization costs next to nothing. Is NF4 *optimal*, as the paper says, in that each code is used equally often? Count. Dividing by the block's own maximum is what spoils it: the share of weights near ±1 depends on
# the block size, and quantiles fixed in advance cannot know it ([Yoshida 2023](https://arxiv.org/abs/2306.06965 "yoshida2023nf4") works this out).

# %%
fig, ax = plt.subplots(figsize=(4.8, 2.5))
_, scaled = nf4.absmax_blocks(gaussian, 64)
used = torch.bincount(nf4.nearest(scaled, nf4.levels_of("nf4")), minlength=16) / len(scaled)
ax.bar(range(16), 100 * used, color=palette.blue)
ax.axhline(100 / 16, color=palette.gray, linestyle="--")
ax.set(xlabel="NF4 code", ylabel="% of weights")
entropy = -(used * used.log2()).sum().item()
figure(
    fig,
    alt=f"Share of each of the 16 codes. Equal use would be 6.25%; it ranges from {100 * used.min():.1f}% to {100 * used.max():.1f}%.",
)
print(
    f"a code is used for {100 * used.min():.1f}% to {100 * used.max():.1f}% of weights, not 6.25%; it carries {entropy:.2f} bits of 4"
)

# %% [markdown]
# Now a real model, SmolLM2-135M. One caution: the file that it came from had its linears in 4 bits already (Q4_1: groups of 32, a scale and a minimum), so "float" here means dequantized, and the weights are not quite as smooth as trained ones. NF4's
# levels lie elsewhere and its blocks are of 64, so nothing coincides by chance. To keep this page quick, only the first 10 of its 30 blocks are rounded. Perplexity on a State of the Union address:

# %%
# NBVAL_IGNORE_OUTPUT
text = course_model.corpus("addresses", "valid")[:4000]
tokens = torch.tensor(real_model.load_tokenizer().encode(text).ids)[:129]
linears = list(walk.find(real, "all-linear").values())[:70]
originals = [linear.weight.detach().clone() for linear in linears]


def perplexity_in(kind):
    for linear, W in zip(linears, originals, strict=True):
        linear.weight.data = nf4.dequantize(nf4.quantize(W, kind, double=False)) if kind else W
    return language_model.perplexity(language_model.token_losses(real, tokens, context=128))


ppl = {kind or "float": perplexity_in(kind) for kind in (None, "nf4", "fp4", "int4")}
fig, ax = plt.subplots(figsize=(4.8, 2.5))
colors = [palette.gray, palette.blue, palette.green, palette.vermillion]
ax.barh([k.upper() if k != "float" else k for k in ppl], list(ppl.values()), color=colors)
for row, value in enumerate(ppl.values()):
    ax.text(value, row, f" {value:.1f}", va="center")
ax.set(xlabel="perplexity, lower is better", xlim=(0, 1.15 * max(ppl.values())))
ax.invert_yaxis()
figure(fig, alt="Perplexity of SmolLM2-135M: " + ", ".join(f"{k} {v:.1f}" for k, v in ppl.items()) + ".")
assert min(ppl, key=ppl.get) == "float"

# %% [markdown]
# The paper's table 2, a mean over models of 125M to 13B parameters, has INT4 at 34.34, FP4 (E2M1) at 31.07 and NF4 with double quantization at 27.41: our order need not be that one. A third of one small model's blocks, weights that were in 4 bits once, and 128 tokens are too little to tell NF4 from FP4; INT4 last is what both have in common.
#
# Four bits leave a dent, then. The claim of the paper is that *fine-tuning through* them does not: the adapter learns on top of the rounded weights and can mend what rounding broke. We teach the course model the Bible with the same adapter (rank 4 on all linears), the
# same data and the same learning rate, on a base in float, NF4, FP4 and INT4, two seeds each.


# %%
# NBVAL_IGNORE_OUTPUT
def ids(text):
    return torch.tensor(tokenizer.encode(text).ids)


bible = ids(course_model.corpus("bible")[:400_000])
new = ids(course_model.corpus("bible", "valid")[:60_000])


def loss_on(model):
    return pretraining.evaluate(model, new, context=64, windows=16, batch=16)


def teach(kind, seed):
    """(loss before, loss after) 20 steps of the Bible on a base in `kind`."""
    dice, shared = torch.Generator().manual_seed(seed), {"r": 4, "alpha": 8, "target_modules": "all-linear"}
    if kind == "float":
        model = lora.apply(course_model.load(), LoRAConfig(**shared), generator=dice)
    else:
        model = qlora.apply(course_model.load(), QLoRAConfig(**shared, kind=kind), generator=dice)
    before = loss_on(model)
    recipe = pretraining.Recipe(steps=20, batch=4, context=64, warmup=5, weight_decay=0.0, seed=seed, peak_lr=2e-2)
    optimizer = pretraining.make_optimizer(model, recipe)
    for t in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = pretraining.learning_rate(t, recipe)
        pretraining.training_step(model, optimizer, pretraining.sample_batch(bible, recipe, t), recipe.clip)
    return before, loss_on(model)


runs = {"float": [teach("float", seed) for seed in (0, 1)]}

# %%
# NBVAL_IGNORE_OUTPUT
runs["nf4"] = [teach("nf4", seed) for seed in (0, 1)]

# %%
# NBVAL_IGNORE_OUTPUT
runs |= {kind: [teach(kind, seed) for seed in (0, 1)] for kind in ("fp4", "int4")}
print(f"{'base':6} {'before':>7} {'after, two seeds':>18}")
for kind, pairs in runs.items():
    print(f"{kind:6} {pairs[0][0]:>7.3f} {pairs[0][1]:>11.3f} {pairs[1][1]:.3f}")
gap = {
    k: (v[0][0] - runs["float"][0][0], sum(b for _, b in v) / 2 - sum(b for _, b in runs["float"]) / 2)
    for k, v in runs.items()
}

# %%
# NBVAL_IGNORE_OUTPUT
fig, ax = plt.subplots(figsize=(4.8, 2.6))
for i, kind in enumerate(("nf4", "fp4", "int4")):
    ax.bar([i - 0.18, i + 0.18], gap[kind], width=0.34, color=[palette.gray, palette.vermillion])
ax.axhline(0, color=palette.ink, linewidth=1)
ax.set_xticks(range(3), labels=["NF4", "FP4", "INT4"])
ax.set(ylabel="loss above the float base's")
ax.set_title("Grey: before training. Red: after.")
figure(
    fig,
    alt="How far each 4-bit base lies above the float base in loss: "
    + "; ".join(f"{k}: {gap[k][0]:.3f} before, {gap[k][1]:.3f} after" for k in ("nf4", "fp4", "int4"))
    + ".",
)
seeds = abs(runs["float"][0][1] - runs["float"][1][1])
print(
    f"NF4 costs {gap['nf4'][0]:+.3f} before training and {gap['nf4'][1]:+.3f} after; two seeds of one method differ by {seeds:.3f}"
)

# %% [markdown]
# Set the red bars beside the difference of two seeds before you rank anything; NF4 ends where the float base does, give or take that difference, and no format is far off. Nor is the order of the grey bars worth much, on a text that this model has never seen. That NF4's gap does not
# *grow* while a rank-4 adapter trains through four bits is the point, and it is the paper's finding at 7B to 65B. A toy cannot rank the formats; the Gaussian weights above can.

# %% [markdown]
# ## Play
#
# Block size against format. Small blocks follow the weights closely and pay for it in scales; with one scale for 4,096 weights, an outlier takes the levels away from all the others. The dot is where you are.

# %%
# NBVAL_IGNORE_OUTPUT
BLOCKS = [32, 64, 128, 256, 1024, 4096]
KINDS = ["nf4", "e2m1", "fp4", "int4"]
sample = gaussian[: 2**18]
curves = {kind: [100 * error(sample, kind, block) for block in BLOCKS] for kind in KINDS}


def draw(block, kind):
    fig, ax = plt.subplots(figsize=(4.8, 3.2))
    for (name, values), color in zip(
        curves.items(), [palette.blue, palette.sky, palette.green, palette.gray], strict=True
    ):
        ax.plot(BLOCKS, values, color=color, label=name.upper(), linewidth=3 if name == kind else 1.2)
    ax.plot(block, curves[kind][BLOCKS.index(block)], "o", color=palette.vermillion, markersize=10)
    ax.set(xscale="log", xlabel="weights that share a scale", ylabel="squared error, % of variance", title=cost(block))
    ax.set_xticks(BLOCKS, labels=BLOCKS)
    ax.minorticks_off()
    ax.legend(ncols=4, fontsize=8)
    return fig


def cost(block):
    return f"{nf4.bits_per_weight(block, double=False):.3f} bits, {nf4.bits_per_weight(block):.3f} with double quantization"


explore(
    draw,
    title="What a scale buys",
    alt=lambda block, kind: (
        f"{kind.upper()} with blocks of {block}: error {curves[kind][BLOCKS.index(block)]:.2f}% of the variance, {cost(block)}."
    ),
    start={"block": 64, "kind": "nf4"},
    block=BLOCKS,
    kind=KINDS,
)

# %% [markdown]
# ## At scale
#
# Now count the 65B model: codes, scales, embedding and head in 16 bits, adapters of rank 64 on all linears (the paper's setting), their gradients, Adam, and the activations of one sequence of 512 with gradient checkpointing.

# %%
sizes = {
    name: qlora.memory_plan(preset(name), QLoRAConfig()) for name in ("llama-7b", "llama-13b", "llama-33b", "llama-65b")
}
fig, ax = plt.subplots(figsize=(4.8, 3.0))
left = [0.0] * 4
tints = [palette.blue, palette.sky, palette.gray, palette.orange, palette.vermillion, palette.purple, palette.green]
for part, color in zip(sizes["llama-65b"], tints, strict=True):
    widths = [plan[part] / 1e9 for plan in sizes.values()]
    ax.barh([name.removeprefix("llama-") for name in sizes], widths, left=left, color=color, label=part)
    left = [a + b for a, b in zip(left, widths, strict=True)]
ax.axvline(48, color=palette.ink, linestyle="--")
ax.text(47.3, -0.2, "48 GB", ha="right")
ax.set(xlabel="GB to train with QLoRA", ylim=(3.6, -0.6))
ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3)
figure(
    fig,
    alt="Stacked memory of four models: "
    + ", ".join(f"{n} {sum(p.values()) / 1e9:.1f} GB" for n, p in sizes.items())
    + ". All lie below 48 GB.",
)

# %%
big = sizes["llama-65b"]
total = sum(big.values()) / 1e9
saved = 0.373 * n / 8 / 1e9
rows = [
    ("full fine-tuning of 65B, GB", "> 780", f"{12 * n / 1e9:.0f}", "same, at 12 bytes a parameter"),
    ("bits a weight for scales", "0.127", f"{nf4.bits_per_weight() - 4:.3f}", "same"),
    ("saved by double quantization, GB", "about 3", f"{saved:.1f}", "same"),
    ("65B in all, GB (figure 6)", "45.0", f"{total:.1f}", "near; see below"),
    ("33B in all, GB (figure 6)", "24.7", f"{sum(sizes['llama-33b'].values()) / 1e9:.1f}", "near; see below"),
    (
        "65B, 4-bit model, MB (figure 6)",
        "37,074",
        f"{(big['4-bit codes'] + big['scales'] + big['other weights']) / 1e6:,.0f}",
        "NOT the same",
    ),
    ("65B, adapters, MB (figure 6)", "1,440", f"{big['adapters'] / 1e6:,.0f}", "NOT the same: 0.90 of ours"),
    ("65B, optimizer / adapters", "4", f"{big['optimizer'] / big['adapters']:.0f}", "same"),
]
print(f"{'':34}{'paper':>9}{'ours':>9}")
for what, paper, mine, verdict in rows:
    print(f"{what:34}{paper:>9}{mine:>9}  {verdict}")
assert total < 48

# %% [markdown]
# The totals agree to within a gigabyte, though not part by part. The paper's bar for the model is 2.6 GB above what weights and scales come to, and it does not say what else is in it; its bars for the adapter, at rank 64 on all linears, are nine tenths of
# our count at every size. So take our total as a sum that one can check and theirs as a measurement with something besides in it. Both fit, with 3 GB to spare.
#
# Three gigabytes are soon gone: attention and logits are not in the count, and a longer sequence needs more. That is what paging is for. We let the small model of unified memory train 65B on a GPU of 48 GB with sequences of 512 tokens, one of 3,072, then 512 again.

# %%
settings = QLoRAConfig()
gpu = UnifiedMemory(capacity=int(48e9))
gpu.pin(sum(big[part] for part in ("4-bit codes", "scales", "other weights", "adapters", "gradients")))
blocks = [f"Adam, layer {i}" for i in range(llama_65b.num_hidden_layers)]
for name in blocks:
    gpu.allocate(name, big["optimizer"] // len(blocks))
for step, length in enumerate([512, 512, 512, 3072, 512, 512]):
    spike = qlora.memory_plan(llama_65b, settings, seq=length)["activations"]
    before = gpu.moved_out
    moved = paging.training_step(gpu, spike, blocks)
    note = (
        "the first touch"
        if step == 0
        else f"{(gpu.moved_out - before) / 1e9:.1f} GB out, then back"
        if moved
        else "nothing moves"
    )
    print(f"step {step}: {length:5} tokens, {spike / 1e9:4.1f} GB of activations, {moved / 1e9:4.1f} GB moved: {note}")
    if step == 3:
        print(
            f"        at 8 GB/s, half of what PCIe 3.0 × 16 can do: {moved / 8e9:.1f} s; without paging: out of memory"
        )

# %% [markdown]
# Where nothing is short, paging costs nothing; a spike costs a fraction of a second instead of the run. On a CPU there is nothing to page: `bitsandbytes` says so and uses plain Adam. On one GPU, the run itself:
#
# ```python
# four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
#                                bnb_4bit_compute_dtype=torch.bfloat16)
# model = AutoModelForCausalLM.from_pretrained("huggyllama/llama-65b", quantization_config=four_bits, device_map={"": 0})
# model = peft.prepare_model_for_kbit_training(model)      # gradient checkpointing, norms in fp32
# model = peft.get_peft_model(model, peft.LoraConfig(r=64, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
# optimizer = bitsandbytes.optim.PagedAdamW32bit(model.parameters(), lr=1e-4)
# ```
#
# With eight GPUs each holds the 4-bit model and averages the adapters' gradients; or the model is sharded, 4-bit codes and all. What QLoRA does not save is time: every product dequantizes first. And merging gives floats: put back into 4 bits, most of what was learned would
# fall between two levels. The lesson on [quantization](../06-compression/01-quantization-basics.ipynb) has the uniform formats.

# %% [markdown]
# ## Takeaways

# %%
print(
    f"1. On normal weights NF4's squared error is {errors['nf4'] / errors['int4']:.2f} of INT4's; FP4's, with its wasted level, is {errors['fp4'] / errors['int4']:.2f}."
)
print(f"2. Double quantization takes the scales from 0.5 to 0.127 bits a weight, {saved:.1f} GB of a 65B model.")
print(
    f"3. 65B trains in {total:.1f} GB where full fine-tuning takes {12 * n / 1e9:.0f}: on one GPU of 48 GB, and paging carries it over a spike."
)

# %% [markdown]
# Now write it yourself: [Exercises](../../work/04-peft/07-qlora.ipynb), four of them, 10 points. Before this: [LoRA](05-lora.ipynb).
#
# References: the paper, [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314 "dettmers2023qlora"); the 8-bit format of the scales, [Dettmers et al. 2022](https://arxiv.org/abs/2110.02861 "dettmers2022optimizers"); what
# is and is not optimal about NF4, [Yoshida 2023](https://arxiv.org/abs/2306.06965 "yoshida2023nf4").
