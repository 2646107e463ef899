# %% [markdown]
# # (IA)³: three vectors per layer
#
# (IA)³ trains no matrix at all. It learns, for each channel of the keys, the values and the MLP, one number that says how much
# of that channel to let through. By the end of this page you will have taught a model the Bible's manner with 2,048 numbers,
# and compared that with two other ways to spend the same 2,048.

# %%
import tempfile
import textwrap
import warnings

import torch

from llmlab.course import compare, explore, figure, plt, predict, show
from llmlab.models import course_model
from llmlab.models.accounting import forward_flops, parameters
from llmlab.models.generation import generate
from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import Llama
from llmlab.models.presets import preset
from llmlab.peft import activations, bitfit, ia3, lora, walk
from llmlab.peft.bitfit import BitFitConfig
from llmlab.peft.ia3 import IA3Config
from llmlab.peft.lora import LoRAConfig
from llmlab.training import pretraining

# %% [markdown]
# ## What it costs
#
# A model can be told a task by examples in its prompt. Nothing is trained, and it is paid for at every request: the model
# reads all examples again. Say that a request has 100 tokens, and that we put 32 solved examples of 100 tokens before it.

# %%
llama_7b = preset("llama-7b")
few, alone = (forward_flops(llama_7b, 1, tokens, logits=1) for tokens in (3300, 100))
print(f"a request alone:          {alone / 1e12:5.2f} TFLOP")
print(
    f"with 32 examples before:  {few / 1e12:5.2f} TFLOP, {few / alone:.0f} times as"
    " much, at every request"
)
print(
    "training on the same 32 examples for 1,000 steps of 8:"
    f" {1000 * 3 * 8 * alone / 1e15:.0f} PFLOP, once"
)
print(f"as much as {1000 * 3 * 8 * alone / (few - alone):,.0f} requests with examples")

# %% [markdown]
# A training step is counted as three forward passes here; with frozen weights it is nearer to two. Fewer than a thousand
# requests in, training has paid for itself. This is the argument of the paper, whose title is its conclusion:
# few-shot fine-tuning is better *and cheaper* than in-context learning. But it needs a fine-tuning that is small enough to
# keep for every task, that does not slow the model down, and that does not break a model on 32 examples.

# %% [markdown]
# ## Predict
#
# (IA)³ learns three vectors in each layer: as many numbers as a key has channels, as many as a value has, and as many as the MLP
# is wide inside.

# %%
count_guess = predict("How many numbers is that for Llama 7B?", unit="numbers")
tasks_guess = predict("How many tasks fit into one full copy's space?", unit="tasks")

# %% tags=["hide-output"]
with torch.device("meta"):  # the shape of the model without its 27 GB
    big = Llama(llama_7b)
ia3.apply(big, IA3Config())
trained, everything = walk.trainable(big)
copies = 2 * parameters(llama_7b) / (2 * trained)
print(
    f"trained: {trained:,} of {everything:,}, which is"
    f" {100 * trained / everything:.4f}%"
)
print(f"one task: {2 * trained / 1e6:.1f} MB in 16 bits")
count_guess.settle(trained)
tasks_guess.settle(copies)

# %% [markdown]
# That is fewer than one number in ten thousand, and a seventh of what LoRA trains at rank 8 on two matrices per layer.

# %% [markdown]
# ## The idea
#
# Here is a vector of activations, what a scale vector does to it, and the reason for the name: *Infused Adapter by Inhibiting
# and Amplifying Inner Activations*.

# %% tags=["hide-input"]
torch.manual_seed(4)
before, scale = (
    torch.randn(12),
    torch.tensor([1, 1.7, 0.2, 1, 1, 0, 1.4, 1, 0.5, 1, 2, 1]),
)
fig, axes = plt.subplots(1, 3, figsize=(4.8, 2.1), sharex=True, sharey=True)
paint = ["#d55e00" if s > 1 else "#0072b2" if s < 1 else "#b8bcc2" for s in scale]
for ax, heights, title in zip(
    axes,
    [before, scale, before * scale],
    ["activations", "scale l", "product"],
    strict=True,
):
    ax.bar(range(12), heights, color="#6b7078" if title == "activations" else paint)
    ax.set_title(title)
    ax.set_xticks([])
axes[1].axhline(1, color="#22262b", linewidth=0.8, linestyle="--")
figure(
    fig,
    alt=(
        "Twelve activations, twelve scales, and their products. Scales above one, in"
        " orange, amplify their channel; scales below one, in blue, inhibit it, one of"
        " them down to zero; scales of one leave it."
    ),
)

# %% [markdown]
# [Liu et al. 2022](https://arxiv.org/abs/2205.05638 "liu2022fewshot") put such a vector at three places of a block. With $\odot$ for the
# product element by element:
#
# $$\begin{gathered}
# \mathrm{softmax}\!\left(\frac{Q\,(l_k \odot K^\top)}{\sqrt{d_k}}\right)(l_v \odot V), \\
# \big(l_\mathrm{ff} \odot \gamma(W_1 x)\big)\, W_2
# \end{gathered}$$
#
# In a Llama that means: $l_k$ and $l_v$ scale the *outputs* of `k_proj` and `v_proj`, and $l_\mathrm{ff}$ scales the *input* of
# `down_proj`. All start at 1, so step 0 is the pretrained model to the last bit. Four things to know:
#
# - **It is a change of weights.** $l \odot (Wx + b)$ is a linear with the rows of $W$ and the entries of $b$ scaled;
#   $W (l \odot x)$ is one with its columns scaled. So it can be merged and then costs nothing at inference.
# - **The change has full rank and little freedom.** $\Delta W = (\mathrm{diag}(l) - 1)\,W$ may touch all directions, but each row can
#   only grow or shrink. LoRA at rank 1 is the reverse: one direction, freely chosen.
# - **Under grouped-query attention, $l_k$ and $l_v$ are narrow**, as narrow as the keys and values that the query heads share.
# - **A scale can reach 0.** Then the merged row is gone. To undo a merge by dividing is impossible there, and inexact elsewhere.
#   Our code keeps the old tensor and puts it back.
#
# The paper's full recipe, T-Few, puts two more losses beside the usual one when a task is a choice among answers: one that lowers
# the probability of the wrong answers, and one that compares answers by their probability per token, so that short
# ones are not favoured. Both are about the task, not about the vectors, and are left out here.
#
# Here is one to try in your head: the MLP computes $W_\mathrm{down}\,(\mathrm{silu}(W_\mathrm{gate}x) \odot W_\mathrm{up}x)$. Does it matter
# whether $l_\mathrm{ff}$ scales the input of `down_proj` or the output of `up_proj`? The next section tells.

# %% [markdown]
# ## The code
#
# The two ways to scale a linear, as the weights that they amount to, and the layer that does it without touching them.

# %%
show(ia3.scale_output, ia3.scale_input, ia3.IA3Linear)

# %% [markdown]
# In the course model: 128 channels, 4 query heads of 32, 2 heads of keys and values, an MLP of 384.
#
# | layer | $W$ (out, in) | vector | what it scales | numbers in 4 layers |
# |---|---|---|---|---|
# | `k_proj` | 64 × 128 | $l_k$ (64) | output, before RoPE | 256 |
# | `v_proj` | 64 × 128 | $l_v$ (64) | output | 256 |
# | `down_proj` | 128 × 384 | $l_\mathrm{ff}$ (384) | input | 1,536 |
#
# Together 2,048. We settle the riddle by giving both places the same random scales:

# %%
tokenizer = course_model.load_tokenizer()
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])


def scatter(model):
    """Random scales around 1 on an adapted model."""
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in walk.installed(model, ia3.IA3Linear).values():
            vector = layer.vectors["default"]
            vector.copy_(1 + 0.3 * torch.randn(vector.shape, generator=dice))
    return model


at_down = scatter(
    ia3.apply(course_model.load(), IA3Config(("down_proj",), ("down_proj",)))
)
at_up = scatter(ia3.apply(course_model.load(), IA3Config(("up_proj",), ())))
compare(
    at_down(prompt),
    at_up(prompt),
    what="logits, input of down_proj against output of up_proj",
    tol=1e-4,
)

model = course_model.load()
plain = model(prompt)
ia3.apply(model, IA3Config())
compare(model(prompt), plain, what="logits with fresh scales", tol=0)

# %% [markdown]
# It does not matter: the gate multiplies channel by channel, and so does $l$. It would matter if the nonlinearity came after
# the scale. That is why $l_\mathrm{ff}$ sits where it sits in the paper, and why `peft` can scale the *output* of `wi_1` in mT5 and
# call it the same method.

# %% [markdown]
# ## Against the library
#
# `peft` has (IA)³. It asks for `target_modules` and, among these, for the `feedforward_modules` that are scaled at the input. We
# write a file, it reads ours; then gradients; then the way back, onto `transformers`' own Llama.

# %%
import peft
from transformers import LlamaForCausalLM
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
logging.disable_progress_bar()

scatter(model)
folder = tempfile.mkdtemp()
ia3.save(model, f"{folder}/ours")
theirs = peft.PeftModel.from_pretrained(
    LlamaForCausalLM.from_pretrained(course_model.MODEL),
    f"{folder}/ours",
    is_trainable=True,
)
compare(model(prompt), theirs(prompt).logits, what="logits, ours in peft", tol=1e-4)

next_token_loss(model(prompt), prompt).backward()
theirs(prompt, labels=prompt).loss.backward()
mine = torch.cat(
    [
        p.grad.flatten()
        for n, p in sorted(model.named_parameters())
        if p.grad is not None
    ]
)
peers = torch.cat(
    [
        p.grad.flatten()
        for n, p in sorted(theirs.named_parameters())
        if p.grad is not None
    ]
)
compare(mine, peers, what="gradients of every scale", tol=1e-4)
compare(
    walk.trainable(model),
    theirs.get_nb_trainable_parameters(),
    what="parameters (trained, all)",
    tol=0,
)

theirs.save_pretrained(f"{folder}/theirs")
returned = ia3.load(
    LlamaForCausalLM.from_pretrained(course_model.MODEL), f"{folder}/theirs"
)
compare(
    returned(prompt).logits,
    model(prompt),
    what="logits, peft's file in our code on transformers' model",
    tol=1e-4,
)

# %% [markdown]
# Now the merge, and the case that division cannot undo. We set one scale to 0 in both libraries, merge, unmerge, and look at
# that row of the weight.

# %%
name = "model.layers.0.self_attn.v_proj"
mine, peers = model.get_submodule(name), theirs.base_model.model.get_submodule(name)
with torch.no_grad():
    mine.vectors["default"][5] = 0.0
    peers.ia3_l["default"][5] = 0.0
row = mine.base.weight[5].clone()
before_merge = model(prompt)
ia3.merge(model)
compare(model(prompt), before_merge, what="logits, merged against unmerged", tol=1e-4)
ia3.unmerge(model)
with warnings.catch_warnings():
    # peft says itself that its unmerging can be inaccurate
    warnings.simplefilter("ignore")
    theirs.merge_adapter()
    theirs.unmerge_adapter()
print(
    "the row after unmerging, ours: ",
    "the same to the bit" if torch.equal(mine.base.weight[5], row) else "changed",
)
print(
    "the row after unmerging, peft: ",
    "lost, all zeros" if not peers.base_layer.weight[5].any() else "kept",
)
ia3.remove(model)
compare(model(prompt), plain, what="logits after removing", tol=0)

# %% [markdown]
# ## The experiment
#
# The course model has never seen the Bible. We teach it 15 steps of it with exactly 2,048 trained numbers, spent in three ways:
#
# - **(IA)³**: the three vectors above, which multiply;
# - **BitFit**: biases on `q_proj` and `up_proj`, 4 × (128 + 384), which add ([lesson 1](01-background-and-bitfit.ipynb));
# - **LoRA**: rank 1 on `down_proj`, 4 × (384 + 128), which mixes ([lesson 5](05-lora.ipynb)).
#
# Same batches, and two seeds each, no more. Each method has its own learning rate: the best of five, a factor of two apart, by
# two runs each with other seeds and on another stretch of the Bible than the one we measure on. Full fine-tuning, which
# trains 384 times as many numbers and whose rate was found in the same way, gives the scale. At the same time we watch what
# is forgotten: how far the loss rises on the addresses, which the model knew.


# %%
def encode(text):
    return torch.tensor(tokenizer.encode(text).ids)


bible = encode(course_model.corpus("bible")[:400_000])
unseen = encode(course_model.corpus("bible", "valid")[:40_000])
old = encode(course_model.corpus("addresses", "valid")[:40_000])

METHODS = {
    "(IA)³": (5e-2, lambda m: ia3.apply(m, IA3Config())),
    "BitFit": (1e-1, lambda m: bitfit.apply(m, BitFitConfig(("q_proj", "up_proj")))),
    "LoRA": (
        3e-2,
        lambda m: lora.apply(
            m, LoRAConfig(r=1, alpha=2, target_modules=("down_proj",))
        ),
    ),
    "full": (
        1e-3,
        lambda m: [
            layer.requires_grad_(True) for layer in walk.find(m, "all-linear").values()
        ],
    ),
}


def loss_on(model, text):
    return pretraining.evaluate(model, text, context=64, windows=24, batch=24)


def teach(method, seed, share=1.0):
    """The course model after 15 steps of the Bible, at this share of the method's best
    rate.
    """
    rate, put_on = METHODS[method]
    torch.manual_seed(seed)
    model = course_model.load().requires_grad_(False)
    put_on(model)
    recipe = pretraining.Recipe(
        15,
        batch=4,
        context=64,
        peak_lr=share * rate,
        warmup=4,
        weight_decay=0.0,
        seed=seed,
    )
    optimizer = pretraining.make_optimizer(model, recipe)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = pretraining.learning_rate(step, recipe)
        pretraining.training_step(
            model, optimizer, pretraining.sample_batch(bible, recipe, step), recipe.clip
        )
    return model


# %%
base = course_model.load()
start, start_old = loss_on(base, unseen), loss_on(base, old)
models = {"(IA)³": [teach("(IA)³", seed) for seed in (0, 1)]}

# %%
models["BitFit"] = [teach("BitFit", seed) for seed in (0, 1)]

# %%
models["LoRA"] = [teach("LoRA", seed) for seed in (0, 1)]

# %%
models["full"] = [teach("full", seed) for seed in (0, 1)]

# %%
for method in ("BitFit", "full"):
    models[f"{method}, rate / 2"] = [teach(method, seed, 1 / 2) for seed in (0, 1)]

# %% tags=["nbval-ignore-output"]
learned = {run: [start - loss_on(m, unseen) for m in ms] for run, ms in models.items()}
forgot = {run: [loss_on(m, old) - start_old for m in ms] for run, ms in models.items()}


def mean(values):
    return sum(values) / len(values)


print("run               trained  learned (each seed)    of full  forgot")
for run, gains in learned.items():
    each = " ".join(f"{g:.2f}" for g in gains)
    print(
        f"{run:17}{walk.trainable(models[run][0])[0]:>8,}  {mean(gains):.2f} "
        f" ({each:9})"
        f" {mean(gains) / mean(learned['full']):>12.0%}{mean(forgot[run]):>8.2f}"
    )
assert all(
    walk.trainable(models[run][0])[0] == 2048 for run in ("(IA)³", "BitFit", "LoRA")
)
assert min(mean(gains) for gains in learned.values()) > 0.3 * mean(learned["full"])
assert mean(forgot["BitFit, rate / 2"]) < 0.7 * mean(forgot["BitFit"])

# %% tags=["hide-input", "nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(4.8, 3.6))
for i, run in enumerate(models):
    ax.barh(
        i - 0.2,
        mean(learned[run]),
        0.38,
        color="#0072b2",
        label="learned (Bible)" if i == 0 else None,
    )
    ax.barh(
        i + 0.2,
        mean(forgot[run]),
        0.38,
        color="#d55e00",
        label="forgot (addresses)" if i == 0 else None,
    )
    for values, shift in ((learned[run], -0.2), (forgot[run], 0.2)):
        ax.plot(values, [i + shift] * len(values), "|", color="#22262b", markersize=9)
ax.set_yticks(range(len(models)), labels=list(models))
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.set(xlabel="change of the loss, nats per token")
ax.set_title("2,048 numbers, or all 786,432")
ax.legend(loc="upper right", fontsize=9, handlelength=1)
figure(
    fig,
    alt="Bars for six runs: "
    + "; ".join(
        f"{run}: learned {mean(learned[run]):.2f}, forgot {mean(forgot[run]):.2f} nats"
        for run in models
    )
    + ". Ticks mark the seeds.",
)

# %% [markdown]
# **With one number in 384 of what full fine-tuning trains, each of the three gets about half of its gain.** With both seeds LoRA
# is a little ahead and (IA)³ a little behind, but the two seeds of one method lie as far apart as neighbours in this ranking.
# Whether the numbers multiply, add or mix makes little difference here. Each needs a rate of its own, though: thirty to a
# hundred times that of full fine-tuning.
#
# At these rates (IA)³ forgets less than half of what the others do. It is tempting to explain that by what a scale can do
# and a bias cannot. The last two rows are there to stop us: they are two of the methods at half their rate. BitFit then has
# the very rate of (IA)³; it forgets as little, and learns less, too. Full fine-tuning still learns far more than any of
# the three and forgets half of what it forgot before, not much more than (IA)³. So what is forgotten follows how hard one
# pushes, as [lesson 5](05-lora.ipynb) found for LoRA, and the rate that learns best is not the rate that keeps best.
#
# On this task, then, (IA)³ is not *better* than its rivals of the same size. The authors compare on T0, with billions of
# parameters and few examples, and report that it came out ahead. Take from both that the smallest methods are close to each
# other, and choose by what else you need: (IA)³ merges without a trace, and it can only ever rescale what the model already
# computes.
#
# What did the scales become?

# %% tags=["hide-input", "nbval-ignore-output"]
scaled = walk.installed(models["(IA)³"][0], ia3.IA3Linear)
fig, axes = plt.subplots(1, 3, figsize=(4.8, 2.7), sharey=True)
for ax, kind, title in zip(
    axes,
    ["k_proj", "v_proj", "down_proj"],
    ["$l_k$", "$l_v$", r"$l_\mathrm{ff}$"],
    strict=True,
):
    for i, layer in enumerate(x for n, x in scaled.items() if n.endswith(kind)):
        values = layer.vectors["default"].detach().sort().values
        ax.plot(
            torch.linspace(0, 100, len(values)),
            values,
            color=plt.cm.viridis(0.1 + 0.25 * i),
            label=f"layer {i}",
        )
    ax.axhline(1, color="#6b7078", linewidth=0.8, linestyle="--")
    ax.set(title=title, xlabel="% of channels")
axes[0].set_ylabel("learned scale, sorted")
axes[2].legend(fontsize=9, loc="lower right", handlelength=0.8, borderpad=0.2)
everyone = torch.cat([x.vectors["default"].detach() for x in scaled.values()])
amplified = (everyone > 1).float().mean().item()
figure(
    fig,
    alt=(
        "Learned scales of four layers, sorted, for keys, values and MLP."
        f" {amplified:.0%} of all channels are amplified, the others inhibited; they"
        f" reach from {everyone.min():.1f} to {everyone.max():.1f}."
    ),
)
print(
    f"amplified: {amplified:.0%} of the channels, inhibited: {1 - amplified:.0%}; "
    f"smallest scale {everyone.min():.1f}, largest {everyone.max():.1f}"
)

# %% [markdown]
# Inhibiting and amplifying, as the name says, in about equal parts; no vector and no layer is left alone, and none of the
# channels is switched off.
#
# What does each of the three hold in memory while it trains? The trained numbers and their optimizer state are the same 2,048
# each. The activations are not. A bias's gradient is the gradient from above and needs nothing else. A scale's gradient is that
# times *what was scaled*, so keys, values and the MLP's inner activations must be kept. LoRA keeps the input of its linear
# and the narrow middle. [Lesson 1](01-background-and-bitfit.ipynb) counts for whole models; here is the difference, for one batch
# of 4 × 128 tokens.

# %%
batch = pretraining.sample_batch(
    bible, pretraining.Recipe(1, batch=4, context=128, warmup=0), 0
)
kept = {}
for method in METHODS:
    with activations.saved_for_backward(models[method][0]) as saved:
        next_token_loss(models[method][0](batch), batch)
    kept[method] = saved.bytes
    print(f"{method:7} keeps {kept[method] / 1e6:.1f} MB of activations")
assert max(kept["BitFit"], kept["LoRA"]) < kept["(IA)³"] < kept["full"]

# %% [markdown]
# The scales keep nearly as much as full fine-tuning. LoRA comes out lowest for a reason of its own: its first vector sits on the
# first `down_proj`, so nothing below that, the whole first attention included, has to be kept.
#
# A frozen weight saves its own gradient and Adam's averages, and often its input. Of a step's arithmetic it saves a third
# at most: the backward pass still walks down through every layer to reach the scales at the bottom. None of these methods
# makes a step much faster; they make it fit.

# %% [markdown]
# ## Play
#
# The scales lie on a line from 1, the old model, to what was learned, and the line goes on. Move along it: $1 + w\,(l - 1)$.

# %% tags=["hide-input", "nbval-ignore-output"]
WEIGHTS = [0.0, 0.5, 1.0, 2.0]
adapted = models["(IA)³"][0]
target = {
    name: layer.vectors["default"].detach().clone() for name, layer in scaled.items()
}
opening = encode("And the people of the land")[None]
curve, written, spread = {}, {}, {}
for w in WEIGHTS:
    with torch.no_grad():
        for name, layer in scaled.items():
            layer.vectors["default"].copy_(1 + w * (target[name] - 1))
    curve[w] = (loss_on(adapted, unseen), loss_on(adapted, old))
    tokens = generate(adapted, opening, 24, temperature=0.7, top_k=40, seed=3)[
        0
    ].tolist()
    written[w] = " ".join(tokenizer.decode(tokens).split())
    spread[w] = torch.cat(
        [layer.vectors["default"].detach() for layer in scaled.values()]
    )


def draw(weight):
    fig, (left, right, page) = plt.subplots(
        3, 1, figsize=(4.8, 5.4), height_ratios=[1.3, 1, 0.9]
    )
    for i, name in enumerate(["Bible", "addresses"]):
        left.plot(WEIGHTS, [curve[w][i] for w in WEIGHTS], label=name)
        left.plot(weight, curve[weight][i], "o", color=f"C{i}", markersize=9)
    left.set(xlabel="w", ylabel="loss")
    left.legend()
    right.hist(
        spread[weight].numpy(), bins=torch.linspace(-1, 3, 41).numpy(), color="#d55e00"
    )
    right.set(xlabel="scale", ylabel="channels", xlim=(-1, 3), ylim=(0, 400))
    page.axis("off")
    page.text(
        0,
        1,
        textwrap.fill(written[weight], 46),
        va="top",
        family="DejaVu Serif",
        transform=page.transAxes,
    )
    return fig


explore(
    draw,
    title="Along the line of scales",
    alt=lambda weight: (
        f"w = {weight}: loss {curve[weight][0]:.2f} on the Bible,"
        f" {curve[weight][1]:.2f} on addresses. It writes: {written[weight]}"
    ),
    start={"weight": 1.0},
    weight=WEIGHTS,
)

# %% [markdown]
# ## At scale
#
# `peft`'s documentation prints what (IA)³ trains in mT0-large, and says "about 0.01%" for T0, the model of the paper, with 11 billion
# parameters. Both are encoder-decoders of the T5 family, whose decoders have keys and values twice, for the text so far and for
# the input. We build their shapes from `transformers`' configuration, without their weights, and let our own `apply` count. Both
# checkpoints have an output matrix of their own; where the library ties it to the input's, we add it to the total.

# %%
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

shape = dict(num_layers=24, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
with torch.device("meta"):
    mt0 = MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=250_112, d_model=1024, d_ff=2816, num_heads=16, d_kv=64, **shape
        )
    )
    t0 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=32_128, d_model=4096, d_ff=10_240, num_heads=64, d_kv=64, **shape
        )
    )
ia3.apply(mt0, IA3Config(("k", "v", "wi_1"), ()))
ia3.apply(t0, IA3Config(("k", "v", "wo"), ("wo",)))


def counted(model):
    trained, total = walk.trainable(model)
    return trained, total + model.lm_head.weight.numel() * (
        model.lm_head.weight is model.shared.weight
    )


ours, documented = counted(mt0), (282_624, 1_229_863_936)
print(
    f"mT0-large  docs {documented[0]:,} of {documented[1]:,}   ours {ours[0]:,} of"
    f" {ours[1]:,}   {'same' if ours == documented else 'not the same'}"
)
few, total = counted(t0)
print(
    f"T0         docs about 0.01%   ours {few:,} of {total:,} ="
    f" {100 * few / total:.4f}%  "
    f" {'same' if round(100 * few / total, 2) == 0.01 else 'no'}"
)
for name in ("llama-7b", "llama-3-8b", "llama-3-70b"):
    with torch.device("meta"):
        big = Llama(preset(name))
    ia3.apply(big, IA3Config())
    print(
        f"{name:11} {walk.trainable(big)[0]:>9,} ="
        f" {100 * walk.trainable(big)[0] / walk.trainable(big)[1]:.4f}%"
    )

# %% [markdown]
# Both agree. In the Llamas watch the MLP take over: with grouped-query attention, $l_\mathrm{ff}$ is most of what trains.
#
# To run it on a GPU, or on eight, with any Llama-shaped checkpoint and any text file:
#
# ```
# python -m llmlab.peft.examples.vector_text --method ia3 --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# torchrun --nproc-per-node 8 -m llmlab.peft.examples.vector_text --method ia3 --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# ```
#
# Each GPU holds the frozen model and reads its own texts. What travels between them at each step is the gradient of the
# scales, 2.5 MB in fp32 for 7B. At inference, either merge, or keep one base and let every row of a batch have its own three vectors
# per layer; that is the last exercise.

# %% [markdown]
# ## What to keep
#
# ```python
# def scale_output(W, b, l):         # k_proj, v_proj: l ⊙ (W x + b)
#     return l[:, None] * W, l * b
#
# def scale_input(W, l):             # down_proj: W (l ⊙ x)
#     return W * l
# ```
#
# Three vectors per layer are 614,400 numbers in Llama 7B, 0.009%: a file of 1.2 MB, and one copy of the model has room
# for eleven thousand of them. On the course model 2,048 scales, 1 in 384 of the linears' weights, got about half of full
# fine-tuning's gain, and so did 2,048 biases or rank-1 factors, each at its own learning rate; halving the rate changed
# what was forgotten as much as changing the method did. All scales start at 1 and merge to exactly 0 extra cost; a scale
# of 0 cannot be divided away, so unmerging means keeping $W$.
#
# **Use it** when each of very many tasks may keep next to nothing, merged or with vectors of its own for each row of a
# batch. **Not** to save activations, of which it keeps nearly as many as full fine-tuning, and not where rescaling what
# the model already computes is not enough.
#
# <details><summary>Which outputs are scaled, and which input?</summary>
#
# The outputs of k_proj and v_proj, biases included, and the input of down_proj.
#
# </details>
#
# <details><summary>Does it matter whether l_ff scales the input of down_proj or the output of up_proj?</summary>
#
# No. The gate multiplies channel by channel, and so does l. It would matter if the nonlinearity came after the scale.
#
# </details>
#
# <details><summary>How does its ΔW differ from that of LoRA at rank 1?</summary>
#
# (diag(l) − 1) W may have full rank, but each row can only grow or shrink. LoRA at rank 1 has one direction, freely
# chosen.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/04-peft/08-ia3.ipynb), three of them, 8 points.
#
# References: the paper, [Liu et al. 2022](https://arxiv.org/abs/2205.05638 "liu2022fewshot"); its rivals here,
# [Ben Zaken et al. 2021](https://arxiv.org/abs/2106.10199 "zaken2021bitfit") and [Hu et al. 2021](https://arxiv.org/abs/2106.09685 "hu2021lora").
