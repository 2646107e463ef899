# %% [markdown]
# # Background and BitFit: train almost nothing
#
# Fine-tuning a language model means holding it in memory several times over, and most of that memory belongs to weights
# that hardly move. This page counts the bill to the byte, shows the one idea that all methods of this part share, and
# tries the smallest of them: train the biases, freeze the rest.

# %%
import tempfile
import warnings
from dataclasses import replace

import torch
import torch.nn.functional as F

from llmlab.course import compare, explore, figure, plt, predict, show
from llmlab.models import course_model
from llmlab.models.accounting import adam_bytes, parameters
from llmlab.models.llama import Llama
from llmlab.models.presets import preset
from llmlab.peft import activations, bitfit, vectors, walk
from llmlab.peft.bitfit import BitFitConfig
from llmlab.training import pretraining

# %% [markdown]
# ## What it costs
#
# Take a 7B model and train all of it, the usual way: weights and gradients in 16 bits, a 32-bit master copy, and Adam's
# two averages in 32 bits. That part is easy to count. The other part is what the forward pass must keep for the
# backward pass, the *activations*. We count these too, without a GPU and without the model: PyTorch reports every tensor
# that it saves, and on the `meta` device tensors have shapes but no memory. Here is one text of 2,048 tokens.


# %%
def activation_bytes(config, tokens, setup=lambda model: model):
    """What one text of `tokens` tokens leaves behind in bf16, counted on one and two
    layers: all layers are alike.
    """
    counts = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = setup(Llama(replace(config, num_hidden_layers=layers)).bfloat16())
            text = torch.zeros(1, tokens, dtype=torch.long)
            with activations.saved_for_backward(model) as saved:
                logits = model(text, attention=activations.fused_attention)
                F.cross_entropy(logits[0].float(), text[0])
        counts.append(saved.bytes)
    return counts[0] + (config.num_hidden_layers - 1) * (counts[1] - counts[0])


llama_7b = preset("llama-7b")
bill = {**adam_bytes(llama_7b), "activations": activation_bytes(llama_7b, 2048)}
for part, size in bill.items():
    print(f"{part:15}{size / 1e9:>7.1f} GB")
print(f"{'together':15}{sum(bill.values()) / 1e9:>7.1f} GB; an H100 has 80 GB")

# %% [markdown]
# One text, a batch of one, and the run does not fit on one of the largest GPUs. Only the first line is the model.
# Everything else is there because it trains. (Activations can be recomputed instead of kept, at the price of one more
# forward pass; the other lines cannot.) And when the training is over, each task leaves a full copy of the model on disk.
#
# So the question of this whole part of the course: **how little of a model can we train, and still teach it?**

# %% [markdown]
# ## Predict
#
# Here is about the smallest answer that anyone has proposed: train the *biases* only, the vector $b$ in $Wx + b$. Give each
# of the 224 linears of Llama 7B a bias.

# %%
share_guess = predict("What share of the model's numbers are biases?", unit="%")
memory_guess = predict("How much memory does training them take?", unit="GB")

# %% tags=["hide-output"]
with torch.device("meta"):
    big = Llama(llama_7b)
count = bitfit.num_parameters(big, BitFitConfig("all-linear"))
total = parameters(llama_7b)
small = activation_bytes(
    llama_7b, 2048, lambda m: bitfit.apply(m, BitFitConfig("all-linear"))
)
memory = 2 * total + 16 * count + small
share_guess.settle(100 * count / total)
memory_guess.settle(memory / 1e9)
print(f"biases: {count:,} of {total:,}")
print(f"to train: {memory / 1e9:.1f} GB instead of {sum(bill.values()) / 1e9:.1f} GB")
print(
    f"to keep one more task: {2 * count / 1e6:.1f} MB instead of"
    f" {2 * total / 1e9:.1f} GB"
)
print(
    f"activations: {small / 1e9:.1f} GB instead of {bill['activations'] / 1e9:.1f} GB"
)

# %% [markdown]
# That is one number in five thousand. It was to be expected that the gradients and Adam's averages go away: a frozen weight has
# neither. But look at the last line. The activations shrank as well, and the reason is worth a minute. A linear
# $y = Wx + b$ that receives the gradient $g$ from above has three gradients to compute:
#
# $$\begin{gathered}
# \frac{\partial L}{\partial W} = g\,x^\top, \quad \frac{\partial L}{\partial b} = g, \quad \frac{\partial L}{\partial x} = W^\top g
# \end{gathered}$$
#
# Only the first one needs the input $x$. Freeze $W$, and $x$ need not be kept; train $b$, and nothing needs to be kept for
# it. What remains belongs to the norms, to attention and to the SwiGLU product, which multiply activations by activations.

# %% [markdown]
# ## The idea
#
# All methods of this part change a pretrained $\theta$ by a small $\Delta$ and keep $\theta$ as it was. [Ding et al.
# 2022](https://arxiv.org/abs/2203.06904 "ding2022delta") call them **delta tuning** and sort them by where $\Delta$ lives:
# beside the weights, among them, or behind a formula that makes a large change from few numbers.

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(4.8, 1.9))
grey, red = "#c9cdd2", "#d55e00"
for ax, title, below in zip(
    axes,
    ["addition", "specification", "reparameterisation"],
    [
        "new parts\nbeside the old",
        "some of\nthe old parts",
        "a large change\nfrom few numbers",
    ],
    strict=True,
):
    ax.add_patch(plt.Rectangle((0, 0), 10, 10, color=grey))
    ax.set(xlim=(-0.2, 17), ylim=(-4.2, 10.5), aspect="equal")
    ax.set_title(title, fontsize=9)
    ax.text(0, -1, below, va="top", fontsize=9)
    ax.axis("off")
axes[0].add_patch(plt.Rectangle((11, 0), 1.6, 10, color=red))
axes[1].add_patch(plt.Rectangle((9.2, 0), 0.8, 10, color=red))
for x, y, width, height in [(11, 0, 0.8, 10), (12.4, 9.2, 4, 0.8)]:
    axes[2].add_patch(plt.Rectangle((x, y), width, height, color=red))
figure(
    fig,
    alt=(
        "Three grey squares, the frozen weights. Orange, what trains: a bar beside the"
        " square; a strip inside it; a tall thin bar and a flat thin bar whose product"
        " has the size of the square."
    ),
)

# %% [markdown]
# | group | what trains | lessons |
# |---|---|---|
# | addition | new parts: virtual tokens, small networks, vectors that scale | [prompt and prefix tuning](02-prompt-and-prefix-tuning.ipynb), P-Tuning, adapters, (IA)³ |
# | specification | a chosen part of the old weights | BitFit, here |
# | reparameterisation | few numbers that stand for a large change | [LoRA](05-lora.ipynb), AdaLoRA, QLoRA |
#
# BitFit ([Ben Zaken et al. 2021](https://arxiv.org/abs/2106.10199 "zaken2021bitfit")) is the purest of the second kind. In
# BERT, every linear has a bias, and so has every LayerNorm. All of these train, and nothing else in the encoder:
#
# $$h = W x + b, \qquad W \text{ frozen}, \quad b \text{ trained}$$
#
# What can a bias do? It cannot turn or mix directions; it moves every token's vector by the *same* amount, whatever the
# token is. Behind a nonlinearity that is more than it sounds. A bias on `gate_proj` decides how far each hidden channel of
# the MLP is open; a bias on `q_proj` makes every query look a little more for one kind of key. The authors read
# their results as a sign that fine-tuning mainly *exposes* what pretraining has learned, rather than teaching more.
#
# **And Llama?** It has no biases at all: its authors left them out, as most do since. There is nothing to specify, so
# we *add* a bias, which starts at 0, and the method moves from the second group into the first. To keep the base
# untouched in both cases, our code freezes $b$ if there is one and trains a change $\beta$ beside it:
#
# $$\begin{gathered}
# h = W x + b + \beta, \qquad \beta = 0 \text{ at the start}, \\
# \frac{\partial L}{\partial \beta} = \frac{\partial L}{\partial b}
# \end{gathered}$$

# %% [markdown]
# ## The code
#
# A wrapper around the layer, an addition, and a rule for which layers are meant.

# %%
show(bitfit.BiasLayer, bitfit.find, bitfit.bias_width)

# %% [markdown]
# In the course model with its 4 layers, biases on all seven kinds of linears:
#
# | layer | $W$ (out, in) | $\beta$ (out) | share of $W$ |
# |---|---|---|---|
# | `q_proj`, `o_proj` | 128 × 128 | 128 | 0.8% |
# | `k_proj`, `v_proj` | 64 × 128 | 64 | 0.8% |
# | `gate_proj`, `up_proj` | 384 × 128 | 384 | 0.8% |
# | `down_proj` | 128 × 384 | 128 | 0.3% |
#
# The share of a matrix is one over its input width, so it falls as models grow: 0.8% at 128 channels, 0.02% at 4,096. What
# happens if we just ask for BitFit as published?

# %%
tokenizer = course_model.load_tokenizer()
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])
model = course_model.load()
plain = model(prompt)
try:
    bitfit.apply(model, BitFitConfig())
except ValueError as error:
    print(error)
bitfit.apply(model, BitFitConfig("all-linear"))
compare(model(prompt), plain, what="logits with fresh biases", tol=0)
print("train: {:,} of {:,} parameters".format(*walk.trainable(model)))

# %% [markdown]
# ## Against the library
#
# There are two references. For a model that *has* biases, the reference is the definition: build `transformers`' Llama with
# `attention_bias` and `mlp_bias`, let PyTorch train the biases themselves, and compare gradients with those of our $\beta$.

# %%
import peft
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
# true, and the point
warnings.filterwarnings("ignore", message="Detected that the base layer has no bias")
logging.disable_progress_bar()


def with_biases():
    torch.manual_seed(0)
    shape = dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    theirs = LlamaForCausalLM(
        TheirConfig(vocab_size=2048, attention_bias=True, mlp_bias=True, **shape)
    )
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return theirs


by_name = with_biases()
for name, p in by_name.named_parameters():
    p.requires_grad_(name.endswith("bias"))
by_change = bitfit.apply(with_biases(), BitFitConfig())
for one in (by_name, by_change):
    one(prompt, labels=prompt).loss.backward()
layers = walk.installed(by_change, bitfit.BiasLayer)
compare(
    torch.cat([layer.vectors["default"].grad for layer in layers.values()]),
    torch.cat([by_name.get_submodule(name).bias.grad for name in layers]),
    what="gradients of β against those of b",
)

# %% [markdown]
# For biases that are *added*, `peft` has a method of its own, BEFT ([Huang et al. 2025](https://arxiv.org/abs/2509.15974
# "huang2025beft"), who add them to `v_proj`). We write its format and it opens our file; then its file comes back to us.

# %%
torch.manual_seed(0)
for layer in vectors.layers_of(model, bitfit.BiasLayer):
    torch.nn.init.normal_(layer.vectors["default"], std=0.1)

folder = tempfile.mkdtemp()
bitfit.save(model, f"{folder}/ours")
theirs = peft.PeftModel.from_pretrained(
    LlamaForCausalLM.from_pretrained(course_model.MODEL),
    f"{folder}/ours",
    is_trainable=True,
)
compare(model(prompt), theirs(prompt).logits, what="logits, ours in peft", tol=1e-4)
compare(
    walk.trainable(model),
    theirs.get_nb_trainable_parameters(),
    what="parameters (trained, all)",
    tol=0,
)
theirs.save_pretrained(f"{folder}/theirs")
returned = bitfit.load(course_model.load(), f"{folder}/theirs")
compare(returned(prompt), model(prompt), what="logits, peft's file in our code", tol=0)
before = model(prompt)
bitfit.merge(model)
compare(model(prompt), before, what="logits, merged against unmerged", tol=1e-4)
bitfit.unmerge(model)
bitfit.remove(model)
compare(model(prompt), plain, what="logits after unmerging and removing", tol=0)

# %% [markdown]
# Merging is where ours can do more: `peft` refuses to merge into a linear without a bias, and ours gives it one. The
# result is an ordinary Llama with `attention_bias` and `mlp_bias`, which any server loads.

# %% [markdown]
# ## The experiment
#
# The course model has read speeches and *Moby-Dick*, never the Bible. We teach it 20 steps of the King James Bible, in three
# ways, with three seeds each:
#
# - **full**: all weights of the 28 linears train;
# - **biases**: 5,120 of them, one vector on each linear;
# - **random**: 5,120 *weights*, drawn at random among all those of the linears. It is the authors' own question: are
#   biases special, or would any handful do?
#
# Each way has its own learning rate: the best of five, a factor of two apart, by two runs each with other seeds and on
# another stretch of the Bible than the one we measure on.


# %%
def encode(text):
    return torch.tensor(tokenizer.encode(text).ids)


bible = encode(course_model.corpus("bible")[:400_000])
unseen = encode(course_model.corpus("bible", "valid")[:40_000])
LEARNING_RATE = {"full": 1e-3, "biases": 5e-2, "random": 5e-2}


def prepare(kind, seed):
    model = course_model.load().requires_grad_(False)
    if kind == "biases":
        return bitfit.apply(model, BitFitConfig("all-linear"))
    linears = walk.find(model, "all-linear").values()
    share = 5120 / sum(layer.weight.numel() for layer in linears)
    dice = torch.Generator().manual_seed(seed)
    for layer in linears:
        layer.requires_grad_(True)
        if kind == "random":
            chosen = torch.rand(layer.weight.shape, generator=dice) < share
            layer.weight.register_hook(lambda grad, chosen=chosen: grad * chosen)
    return model


def teach(kind, seed):
    recipe = pretraining.Recipe(
        20,
        batch=4,
        context=64,
        peak_lr=LEARNING_RATE[kind],
        warmup=4,
        weight_decay=0.0,
        seed=seed,
    )
    model = prepare(kind, seed)
    optimizer = pretraining.make_optimizer(model, recipe)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = pretraining.learning_rate(step, recipe)
        pretraining.training_step(
            model, optimizer, pretraining.sample_batch(bible, recipe, step), recipe.clip
        )
    return model


def loss_on(model):
    return pretraining.evaluate(model, unseen, context=64, windows=32, batch=32)


# %%
SEEDS = (0, 1, 2)
start = loss_on(course_model.load())
models = {"full": [teach("full", seed) for seed in SEEDS]}

# %%
models["biases"] = [teach("biases", seed) for seed in SEEDS]

# %%
models["random"] = [teach("random", seed) for seed in SEEDS]

# %% tags=["nbval-ignore-output"]
gains = {kind: [start - loss_on(m) for m in runs] for kind, runs in models.items()}
mean = {kind: sum(g) / len(g) for kind, g in gains.items()}
trained = {"full": walk.trainable(models["full"][0])[0], "biases": 5120, "random": 5120}
share = {kind: mean[kind] / mean["full"] for kind in mean}
for kind, g in gains.items():
    each = " ".join(f"{one:.2f}" for one in g)
    print(
        f"{kind:8}{trained[kind]:>9,} trained   gain {mean[kind]:.2f} nats (seeds:"
        f" {each})   {share[kind]:.0%}"
    )
assert min(share["biases"], share["random"]) > 0.4

# %% tags=["hide-input", "nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(4.8, 3.0))
colors = {"full": "#22262b", "biases": "#d55e00", "random": "#0072b2"}
for i, kind in enumerate(["full", "biases", "random"]):
    ax.barh(i, 100 * share[kind], color=colors[kind], height=0.6)
    ticks = [100 * g / mean["full"] for g in gains[kind]]
    ax.plot(
        ticks, [i] * len(ticks), "|", color="#b8bcc2", markersize=16, markeredgewidth=2
    )
    ax.text(max(ticks) + 4, i, f"{share[kind]:.0%}", va="center")
of_all = 100 * 5120 / trained["full"]
ax.set_yticks(
    range(3),
    labels=[
        "all weights\n100%",
        f"biases\n{of_all:.2f}%",
        f"random weights\n{of_all:.2f}%",
    ],
)
ax.set(xlabel="% of full fine-tuning's gain on the Bible", xlim=(0, 120))
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.set_title("What a handful buys")
figure(
    fig,
    alt="Bars of the gain on the Bible relative to full fine-tuning: "
    + ", ".join(f"{kind} {share[kind]:.0%}" for kind in share)
    + f". Biases and random weights train {of_all:.2f}% as many numbers. Ticks mark the"
    " seeds.",
)

# %% [markdown]
# The biases are 0.65% as many numbers as the linears hold, and training them gives about three fifths of what training
# everything gives. The three seeds, the ticks on the bars, lie close together.
#
# The blue bar is the surprise. The authors report that on BERT a random choice of as many parameters did clearly worse than
# the biases. In our experiment it does not: random weights come out a little ahead, with every seed. What they need
# is their own learning rate, fifty times that of full fine-tuning. Adam moves a number by about its rate at each
# step, so at the rate of full fine-tuning 20 steps could have moved none by more than about 0.02. On our task, then, it is
# not the bias that is special: a few knobs in every layer are enough, if one turns them far. It is one small model, one
# kind of text and 20 steps, so this says that the question is open, not that the authors are wrong.
#
# What speaks for biases here is the bill. A random weight needs the input of its layer kept, the gradient of its whole
# matrix computed, and its place written down beside its value. A bias needs none of these.
#
# Three fifths is not all. The paper finds BitFit on a par with full fine-tuning on small and medium data, sometimes above
# it, and behind it where there is more data. Five thousand tokens of a new style are plenty for a model of one million
# parameters.
#
# Where did the biases move?

# %% tags=["hide-input", "nbval-ignore-output"]
kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
moved = {}
for kind in kinds:
    found = [
        x.vectors["default"]
        for m in models["biases"]
        for n, x in walk.installed(m, bitfit.BiasLayer).items()
        if n.endswith(kind)
    ]
    moved[kind] = torch.cat(found).square().mean().sqrt().item()
fig, ax = plt.subplots(figsize=(4.8, 2.8))
ax.barh(kinds, list(moved.values()), color="#d55e00")
ax.invert_yaxis()
ax.set(xlabel="size of the change (root mean square)")
ax.set_title("How far each kind of bias moved")
figure(
    fig,
    alt="Bars of the change of bias: "
    + ", ".join(f"{k} {v:.2f}" for k, v in moved.items())
    + ".",
)

# %% [markdown]
# They moved most for gate and up, in the middle of the MLP, and for queries and keys, and least for values. In BERT the authors saw the
# query's bias and the one in the middle of the MLP move most, and training those two alone, half of all biases, cost them
# little. Ours agree in part. One kind has a special role here and there: the bias of `k_proj`. Without RoPE it would do
# nothing at all, since it adds the same number to every score of a query, and softmax does not notice. With RoPE the keys
# are turned by their positions after the bias is added, so it can say *how far back* to look.

# %% [markdown]
# ## Play
#
# What fits on one 80 GB GPU? Choose a model and the length of the text. Each frame counts the bill twice: all
# weights train, or only biases.

# %% tags=["hide-input", "nbval-ignore-output"]
MODELS = ["smollm2-1.7b", "llama-7b", "llama-33b"]
TOKENS = [512, 2048, 8192]
PARTS = {
    "weights": "#8a9099",
    "gradients": "#0072b2",
    "optimizer": "#00805e",
    "activations": "#d55e00",
}


def bills(name):
    """For each length, [weights, gradients, optimizer, activations] of both ways to
    train. All that is saved has a row per token.
    """
    config, few = preset(name), BitFitConfig("all-linear")
    total, kept = parameters(config), activation_bytes(config, 512)
    with torch.device("meta"):
        count = bitfit.num_parameters(Llama(config), few)
    less = activation_bytes(config, 512, lambda m: bitfit.apply(m, few))
    return {
        (name, tokens): [
            [2 * total, 2 * n, 12 * n, act * tokens // 512]
            for n, act in ((total, kept), (count, less))
        ]
        for tokens in TOKENS
    }


counted = {key: bill for name in MODELS for key, bill in bills(name).items()}


def draw(model, tokens):
    fig, ax = plt.subplots(figsize=(4.8, 2.8))
    for row, parts in enumerate(counted[model, tokens]):
        left = 0
        for (label, color), size in zip(PARTS.items(), parts, strict=True):
            ax.barh(
                row,
                size / 1e9,
                left=left,
                color=color,
                height=0.55,
                label=label if row == 0 else None,
            )
            left += size / 1e9
        ax.text(
            left,
            row,
            f" {left:.0f} GB",
            va="center",
            bbox={"facecolor": "#fdfdfb", "edgecolor": "none", "pad": 1},
        )
    ax.axvline(80, color="#22262b", linestyle="--", linewidth=1)
    ax.set_yticks([0, 1], labels=["all weights", "biases"])
    ax.set(
        xlabel="GB; the dashed line is one 80 GB GPU",
        xlim=(0, max(100, 1.2 * sum(counted[model, tokens][0]) / 1e9)),
    )
    ax.invert_yaxis()
    tight = {
        "handlelength": 0.9,
        "handletextpad": 0.4,
        "columnspacing": 0.9,
        "fontsize": 11,
    }
    fig.legend(
        *ax.get_legend_handles_labels(), loc="outside upper left", ncols=4, **tight
    )
    return fig


explore(
    draw,
    title="What fits on one GPU",
    alt=lambda model, tokens: (
        f"{model}, {tokens} tokens: {sum(counted[model, tokens][0]) / 1e9:.0f} GB to"
        f" train all weights, {sum(counted[model, tokens][1]) / 1e9:.0f} GB to train"
        f" biases, of which {counted[model, tokens][1][3] / 1e9:.0f} GB activations"
    ),
    start={"model": "llama-7b", "tokens": 2048},
    model=MODELS,
    tokens=TOKENS,
)

# %% [markdown]
# With long texts the activations are the larger part of what is left, and no choice of trained weights removes them.

# %% [markdown]
# ## At scale
#
# The paper says what share of BERT-large the biases are, and what share its two most mobile kinds. We build both sizes of
# BERT from `transformers`' configuration, on the meta device, and count; for BERT-base the count is only ours. BERT's
# LayerNorms have biases too, and `BitFitConfig()` finds them.

# %%
from transformers import BertConfig, BertModel

large = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)
QUERY_AND_MIDDLE = ("query", "intermediate.dense")
for name, shape, config, paper in [
    ("BERT-base, all biases", {}, BitFitConfig(), None),
    ("BERT-large, all biases", large, BitFitConfig(), 0.08),
    ("BERT-large, query and middle", large, BitFitConfig(QUERY_AND_MIDDLE), 0.04),
]:
    with torch.device("meta"):
        bert = BertModel(BertConfig(**shape))
    ours, everything = (
        bitfit.num_parameters(bert, config),
        sum(p.numel() for p in bert.parameters()),
    )
    percent = 100 * ours / everything
    verdict = (
        ""
        if paper is None
        else (
            f"   paper {paper}%:"
            f" {'same' if round(percent, 2) == paper else 'not the same'}"
        )
    )
    print(f"{name:28} {percent:.4f}% ({ours:,} of {everything:,}){verdict}")

# %% [markdown]
# Both come out, and "half of the biases", as the paper calls the last set, is 45% of them by our count.
#
# To run BitFit on a GPU, or on eight, with any Llama-shaped checkpoint (Qwen2 has biases on q, k and v and trains those; a
# Llama gets new ones):
#
# ```
# python -m llmlab.peft.examples.vector_text --method bitfit --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# torchrun --nproc-per-node 8 -m llmlab.peft.examples.vector_text --method bitfit --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# ```
#
# Each GPU holds the frozen model and reads its own texts; only the gradients of the biases are averaged.

# %%
print(
    f"per step and GPU, full: {2 * total / 1e9:.1f} GB of gradients; biases, in fp32:"
    f" {4 * count / 1e6:.1f} MB"
)

# %% [markdown]
# ## What to keep
#
# ```python
# def linear(x, W, b, beta):         # W, b frozen; β trained, 0 at the start
#     return x @ W.T + b + beta      # ∂L/∂β = ∂L/∂b = Σ g: no x is kept for it
#
# def merged(b, beta):               # the weight stays
#     return b + beta
# ```
#
# Training all of a 7B model takes 16 bytes per parameter, 108 GB, plus activations; a frozen parameter takes 2, and a
# frozen linear does not even keep its input. Biases are 0.02% of Llama 7B and 0.08% of BERT-large; on the course model,
# 0.65% as many numbers as the linears have gave about three fifths of full fine-tuning's gain, with a learning rate fifty
# times as high, and as many weights drawn at random did slightly better. Llama has no biases: one adds 224 of them at 0,
# trains the change, and takes it off again with the base unchanged to the bit.
#
# **Use it** when activations and optimizer states are what does not fit, or when a server keeps thousands of adapters.
# **Not** where there is much data: there the paper finds it behind full fine-tuning.
#
# <details><summary>Which of a linear's three gradients needs the input x?</summary>
#
# That of the weight, g xᵀ. The bias's gradient is g and the input's is Wᵀ g, so with W frozen x need not be kept.
#
# </details>
#
# <details><summary>What can a bias not do?</summary>
#
# Turn or mix directions. It moves every token's vector by the same amount, whatever the token is.
#
# </details>
#
# <details><summary>Why do biases want a learning rate of their own?</summary>
#
# Adam moves a number by about its rate at each step. The few numbers that train must move far, so at the rate of full
# fine-tuning they would hardly have moved in 20 steps.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/04-peft/01-background-and-bitfit.ipynb), three of them, 8 points.
#
# References: the method, [Ben Zaken et al. 2021](https://arxiv.org/abs/2106.10199 "zaken2021bitfit"); the family,
# [Ding et al. 2022](https://arxiv.org/abs/2203.06904 "ding2022delta"); added biases,
# [Huang et al. 2025](https://arxiv.org/abs/2509.15974 "huang2025beft").
