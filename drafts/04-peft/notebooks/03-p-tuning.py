# %% [markdown]
# # P-Tuning: prompts from a network, and prompts in every layer
#
# Soft prompts are hard to train and work poorly on labelling tasks. P-Tuning lets a small network make them; its
# second version gives every layer its own and puts a label head on top. This page builds both and lets them label
# the words of a text.

# %%
import tempfile

import torch
import torch.nn.functional as F

from llmlab.course import compare, explore, figure, plt, show
from llmlab.models import course_model
from llmlab.models.accounting import forward_flops
from llmlab.models.presets import preset
from llmlab.peft import label_head, p_tuning, p_tuning_v2, virtual_tokens, walk
from llmlab.peft.p_tuning import PromptEncoder, PTuningConfig
from llmlab.peft.p_tuning_v2 import PTuningV2Config

# %% [markdown]
# ## What it costs
#
# A language model can label text without any new part: write "This passage is from" after it and see which word comes. For a label
# on *every token* of a document, names or parts of speech, that means one question for each token. A label head reads all labels off one
# pass. Count both for a document of 512 tokens on a 7B model.

# %%
llama_7b = preset("llama-7b")
asked = sum(forward_flops(llama_7b, 1, t, logits=1) for t in range(1, 513))
read = forward_flops(llama_7b, 1, 512, logits=0)
print(f"512 questions, one for each token: {asked / 1e15:.2f} PFLOP")
print(f"one pass and a label head:         {read / 1e15:.4f} PFLOP, {asked / read:.0f} times less")

# %% [markdown]
# Sequence labelling is where prompting with words breaks down, and where the authors of P-Tuning v2 found that
# soft prompts did as well. The fix has two halves: a head that gives labels, and prompts that reach all layers.

# %% [markdown]
# ## Predict
#
# P-Tuning's first version puts 20 free vectors through a network with two hidden layers as wide as the model, and puts
# what comes out before the input. After training the network is thrown away. **Of everything that trains on Llama 7B, what share is kept?**
# All of it? Half? Write down a percentage.

# %%
shape_only = torch.nn.Module()
shape_only.config = llama_7b
trained, kept = p_tuning.num_parameters(shape_only, PTuningConfig(20)), 20 * llama_7b.hidden_size
print(f"trained {trained:,}, kept {kept:,}: {kept / trained:.2%}")

# %% [markdown]
# The network is large because it is free: it costs optimizer memory for the length of a run and nothing after. It is a
# way to *search* for 20 vectors, not a part of the model.

# %% [markdown]
# ## The idea
#
# **P-Tuning** ([Liu et al. 2021](https://arxiv.org/abs/2103.10385 "liu2021gpt")). Train free vectors $h_0 \dots h_{p-1}$
# directly and each finds its own way: they start apart, and nothing makes neighbours fit together as words in a sentence do.
# So let a bidirectional LSTM read all of them, and a small MLP turn its states into virtual tokens:
#
# $$P_i = \mathrm{MLP}\big([\overrightarrow{\mathrm{LSTM}}(h_{0:i}) : \overleftarrow{\mathrm{LSTM}}(h_{i:p-1})]\big)$$
#
# `peft` makes an MLP alone the default. The difference can be measured: move one free vector, and see which virtual
# tokens move.

# %%
dice = torch.Generator().manual_seed(0)
fig, axes = plt.subplots(1, 2, figsize=(5.2, 2.9))
for ax, kind in zip(axes, ["LSTM", "MLP"], strict=True):
    encoder = PromptEncoder(64, PTuningConfig(8, encoder=kind, hidden=64), dice)
    jacobian = torch.autograd.functional.jacobian(
        lambda h, e=encoder: torch.func.functional_call(e, {"embedding": h}, ()), encoder.embedding.detach()
    )  # (8, 64, 8, 64)
    moved = jacobian.norm(dim=(1, 3))
    ax.imshow(moved / moved.max(), cmap="cividis", vmin=0, vmax=1)
    ax.set(title=kind, xlabel="free vector $h_j$", xticks=range(0, 8, 2), yticks=range(0, 8, 2))
    ax.grid(False)
    assert (moved.fill_diagonal_(0).max() > 0) == (kind == "LSTM")
axes[0].set_ylabel("virtual token $P_i$")
figure(
    fig,
    alt="How far virtual token i moves with free vector j. With the LSTM every token moves a little with every vector, most on "
    "the diagonal; with the MLP the matrix is diagonal.",
)

# %% [markdown]
# **P-Tuning v2** ([Liu et al. 2022](https://arxiv.org/abs/2110.07602 "liu2022ptuning")) changes two things, and drops the
# network by default.
#
# - **Depth.** Prompts at the input have few numbers, and what they do to the output passes through all the frozen layers. So
#   every layer gets prompts: keys and values before its own, exactly as in
#   [prefix tuning](02-prompt-and-prefix-tuning.ipynb), here for understanding rather than for generation.
# - **A label head.** Instead of vocabulary words that stand for labels, a linear layer that starts at random reads the last layer's
#   state $h_t$ of each token:
#
# $$\text{scores}_t = W h_t + b, \qquad W \in \mathbb{R}^{C \times d}$$
#
# In a decoder $h_t$ has seen the tokens up to $t$ and no further; a label of a whole text is read at its last token.

# %% [markdown]
# ## The code
#
# The encoder, the head that stands in for `lm_head`, and the place at which a text's label is read when a batch is padded. The rest is
# shared with the lesson before: whatever an encoder makes, `(p, d)` or `(p, 2LKD)`, is put where it belongs.

# %%
show(PromptEncoder.forward, p_tuning_v2.make_encoder, label_head.LabelHead.forward, label_head.last_token)

# %% [markdown]
# On the course model ($d = 128$, 4 layers, 2 key/value heads of 32), with $p = 16$ and three labels:
#
# | method | free vectors | network | kept | head |
# |---|---|---|---|---|
# | P-Tuning, MLP ($m = 128$) | 16 × 128 | 3 × (128 × 128 + 128) | 16 × 128 | 3 × 128 + 3 |
# | P-Tuning, LSTM ($m = 64$) | 16 × 128 | 2 layers, 2 directions, then 2 linears | 16 × 128 | 3 × 128 + 3 |
# | P-Tuning v2 | 16 × 512 | none | 16 × 512 | 3 × 128 + 3 |
#
# When training is over, `fold` runs the network once and keeps its output. Nothing else changes.

# %%
tokenizer = course_model.load_tokenizer()
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])
model = course_model.load()
plain = model(prompt)
p_tuning.apply(model, PTuningConfig(16, encoder="LSTM", hidden=64), generator=dice)
before, count = model(prompt), walk.trainable(model)[0]
p_tuning.fold(model)
compare(model(prompt), before, what="logits with the network folded away", tol=1e-4)
print(f"trained {count:,} numbers, {walk.trainable(model)[0]:,} left")
virtual_tokens.remove(model)
compare(model(prompt), plain, what="logits after removing", tol=0)

# %% [markdown]
# ## Against the library
#
# `peft` calls version 1 `PromptEncoderConfig`. Both encoders, with our numbers in its network: outputs and gradients.

# %%
import warnings

import peft
from transformers import LlamaForCausalLM, LlamaForTokenClassification
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
logging.disable_progress_bar()
logging.set_verbosity_error()  # that the classifier's head is new is the point

for kind in ("MLP", "LSTM"):
    p_tuning.apply(model, PTuningConfig(5, encoder=kind, hidden=32), generator=dice)
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=32, encoder_reparameterization_type=kind, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(LlamaForCausalLM.from_pretrained(course_model.MODEL), config)
    mine, peers = model.virtual_tokens.encoder, theirs.prompt_encoder["default"]
    peers.load_state_dict({n.replace("embedding", "embedding.weight"): t for n, t in mine.state_dict().items()})
    compare(model(prompt), theirs(prompt).logits[:, 5:], what=f"logits, {kind}", tol=1e-4)
    model(prompt).logsumexp(-1).sum().backward()
    theirs(prompt).logits[:, 5:].logsumexp(-1).sum().backward()
    gradients = [torch.cat([p.grad.flatten() for _, p in sorted(e.named_parameters())]) for e in (mine, peers)]
    compare(*gradients, what=f"gradients, {kind}", tol=1e-3)
    virtual_tokens.remove(model)

# %% [markdown]
# It has no class for version 2: it *is* `PrefixTuningConfig`, on a model with a label head. `peft` writes a folder with prompts and head for
# transformers' token classifier; ours opens it on the course model, and gives the same scores.

# %%
folder = tempfile.mkdtemp()
classifier = LlamaForTokenClassification.from_pretrained(course_model.MODEL, num_labels=3)
config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="TOKEN_CLS")
theirs = peft.get_peft_model(classifier, config).eval()
theirs.save_pretrained(folder)
p_tuning_v2.load(model, folder)
compare(model(prompt), theirs(prompt).logits, what="label scores, peft's file in our code", tol=1e-4)
compare(walk.trainable(model)[0], theirs.get_nb_trainable_parameters()[0], what="parameters trained", tol=0)
virtual_tokens.remove(model)

# %% [markdown]
# ## The experiment
#
# The task: **which book is this passage from?** Given 24 tokens, say whether they are a president's, from *Moby-Dick* or from the Bible, which the
# model never read. All line breaks are gone, and passages start anywhere. The label is read at the last token. Test passages come from held-out
# documents, and we train on 1,280 passages only: 80 steps of 16.

# %%
BOOKS = ["addresses", "moby-dick", "bible"]


def stream(book, split):
    return torch.tensor(tokenizer.encode(" ".join(course_model.corpus(book, split)[:150_000].split())).ids)


STREAMS = {split: [stream(book, split) for book in BOOKS] for split in ("train", "valid")}


def passages(split, seed, count=16, length=24):
    """(tokens (count, length), labels (count,))."""
    dice = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=dice)
    places = torch.rand(count, generator=dice)
    streams = [STREAMS[split][y] for y in labels.tolist()]
    starts = [int(place * (len(s) - length)) for place, s in zip(places, streams, strict=True)]
    return torch.stack([s[i : i + length] for i, s in zip(starts, streams, strict=True)]), labels


test_tokens, test_labels = passages("valid", seed=10**6, count=384)
for book in range(3):
    print(f"{BOOKS[book]:10} …{tokenizer.decode(test_tokens[test_labels == book][0].tolist())}…")

# %% [markdown]
# Four ways to do it, with the same head, the same batches and the same learning rate of the head. **Probe**: the head alone, on the frozen
# model. **Shallow**: P-Tuning with an MLP. **Deep**: P-Tuning v2, started from the keys and values of a text. **Full**: everything trains. The rate of
# each method was the best of three, found beforehand. For the two in question three seeds draw starts and batches.

# %%
STEPS, HEAD_RATE, HEADS = 80, 1e-2, (".head.weight", "lm_head.weight")
RATES = {"probe": 0.0, "shallow": 1e-2, "deep": 0.3, "full": 1e-3}


def prepare(method, seed, p=16):
    """The course model with a label head and virtual tokens, ready to train."""
    model, dice = course_model.load(), torch.Generator().manual_seed(seed)
    if method == "shallow":
        p_tuning.apply(model, PTuningConfig(p, num_labels=3, hidden=64), generator=dice)
    elif method == "deep":
        text = tuple(STREAMS["train"][2][seed * p : (seed + 1) * p].tolist())
        p_tuning_v2.apply(model, PTuningV2Config(p, num_labels=3, init_tokens=text), generator=dice)
    else:
        model.requires_grad_(method == "full")
        model.lm_head = label_head.make_head(128, 3, bias=False, generator=dice)
    return model


def labeller(method, seed=0):
    """A trained one."""
    model = prepare(method, seed)
    trained = {name: t for name, t in model.named_parameters() if t.requires_grad}
    groups = [
        {"params": [t for n, t in trained.items() if not n.endswith(HEADS)], "rate": RATES[method]},
        {"params": [t for n, t in trained.items() if n.endswith(HEADS)], "rate": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / 5) * (1 - step / STEPS)
        tokens, labels = passages("train", seed * 1000 + step)
        loss = F.cross_entropy(model(tokens)[:, -1], labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    return model


@torch.inference_mode()
def accuracy(model):
    return (model(test_tokens)[:, -1].argmax(-1) == test_labels).float().mean().item()


# %%
models = {"probe": [labeller("probe")], "shallow": [labeller("shallow", seed) for seed in (0, 1, 2)]}

# %%
models |= {"deep": [labeller("deep", seed) for seed in (0, 1, 2)], "full": [labeller("full")]}

# %%
# NBVAL_IGNORE_OUTPUT
right = {name: [accuracy(m) for m in group] for name, group in models.items()}
kept = {"probe": 384, "shallow": 16 * 128 + 384, "deep": 16 * 512 + 384, "full": walk.trainable(models["full"][0])[0]}

fig, ax = plt.subplots(figsize=(4.8, 3.2))
for i, (name, scores) in enumerate(right.items()):
    mean = sum(scores) / len(scores)
    color = {"shallow": "#0072b2", "deep": "#d55e00"}.get(name, "#a9afb7")
    ax.bar(i, mean, color=color, width=0.6)
    ax.plot([i] * len(scores), scores, "o", color="#22262b", markersize=4)
    ax.text(i, 0.03, f"{mean:.0%}", ha="center", color="white", fontweight="bold")
ax.axhline(1 / 3, color="#22262b", linewidth=1, linestyle="--")
ax.text(-0.4, 1 / 3 + 0.01, "chance", va="bottom")
ax.set_xticks(range(4), labels=[f"{name}\n{kept[name]:,} kept" for name in right])
ax.set(ylabel="accuracy on held-out passages", ylim=(0, 1))
ax.set_title("Which book is this from?")
average = {name: sum(scores) / len(scores) for name, scores in right.items()}
figure(
    fig,
    alt="Accuracy of four ways to label: " + ", ".join(f"{name} {value:.0%}" for name, value in average.items()) + ".",
)
assert average["deep"] > average["shallow"]
print(
    f"deep beats shallow by {100 * (average['deep'] - average['shallow']):.0f} points of accuracy, mean of three seeds"
)

# %% [markdown]
# The bars are means, the dots single runs. All four heads read the same state; what differs is how far that state could be bent toward the
# question. A shallow prompt can only say something once, at the bottom. A deep one speaks in every layer.
#
# Deep prompts also keep four times as many numbers, and that is part of the method: the paper lists the small number of trainable parameters as the first
# weakness of shallow prompts. A longer shallow prompt would have as many, but 64 tokens before a passage of 24 make every pass several times as
# expensive, and the last lesson showed that at equal numbers the prefix wins. Neither reaches full fine-tuning here: P-Tuning v2's claim to match it
# is made for models of 300 million parameters and more; ours has one million.

# %% [markdown]
# ## Play
#
# Read over the labellers' shoulders. Choose a passage: each row is a way to label, each column a token, and the color is the
# probability that the head gives to the *right* book after reading up to there. Watch for the word that gives it away.

# %%
# NBVAL_IGNORE_OUTPUT
SHOWN = [int((test_labels == book).nonzero()[k, 0]) for k in range(2) for book in range(3)]
with torch.no_grad():
    chances = {name: group[0](test_tokens[SHOWN]).softmax(-1) for name, group in models.items()}


def track(passage):
    """(4, 24): the right book's probability after each token, one row for each way to label."""
    book = int(test_labels[SHOWN[passage - 1]])
    return torch.stack([chances[name][passage - 1, :, book] for name in models])


def draw(passage):
    pieces = [tokenizer.decode([t]) for t in test_tokens[SHOWN[passage - 1]].tolist()]
    fig, ax = plt.subplots(figsize=(5.4, 3.0))
    picture = ax.imshow(track(passage), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    ax.set_yticks(range(4), labels=list(models))
    ax.set_xticks(range(24), labels=pieces, rotation=90)
    ax.grid(False)
    ax.set_title(f"from {BOOKS[int(test_labels[SHOWN[passage - 1]])]}")
    fig.colorbar(picture, ax=ax, format=lambda v, _: f"{v:.0%}")
    return fig


def describe(passage):
    ends = ", ".join(f"{name} {value:.0%}" for name, value in zip(models, track(passage)[:, -1], strict=True))
    return f"A passage from {BOOKS[int(test_labels[SHOWN[passage - 1]])]}. Probability of the right book at its last token: {ends}."


explore(draw, title="When do they know?", alt=describe, start={"passage": 1}, passage=list(range(1, 7)))

# %% [markdown]
# ## At scale
#
# `peft`'s documentation shows P-Tuning with 20 tokens and an encoder of width 128 on two models. Both have width 1,024, so
# the encoder must be the same; on RoBERTa the classifier trains as well. Count the pieces.

# %%
d, m = 1024, 128
encoder = 20 * d + (d * m + m) + (m * m + m) + (m * d + d)
classifier = (d * d + d) + (2 * d + 2)  # RoBERTa's: a linear, tanh, and a linear to two labels


def verdict(paper, ours):
    return "same" if paper == ours else f"NOT the same: off by {abs(paper - ours):,}"


print(f"BLOOMZ-560M    peft   300,288   ours {encoder:>9,}   {verdict(300_288, encoder)}")
print(f"RoBERTa-large  peft 1,351,938   ours {encoder + classifier:>9,}   {verdict(1_351_938, encoder + classifier)}")
print(
    f"of the second, the classifier is {classifier / (encoder + classifier):.0%}, and what is kept of the encoder {20 * d / (encoder + classifier):.1%}"
)
roberta, per_token = 355_662_082 - encoder, 2 * 24 * d
print(
    f"P-Tuning v2 on RoBERTa-large: {per_token:,} numbers a token; 0.1% is {1e-3 * roberta / per_token:.0f} tokens, 3% is {0.03 * roberta / per_token:.0f}"
)

# %% [markdown]
# The last line turns the abstract's "0.1%-3% tuned parameters" into lengths of prompts. (The paper gives the range; the lengths are ours, for 24
# layers of width 1,024.)
#
# To run either on a GPU, or on eight, with any Llama-shaped checkpoint and any text file:
#
# ```
# python -m llmlab.peft.examples.virtual_text --method p-tuning --tokens 20 --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# torchrun --nproc-per-node 8 -m llmlab.peft.examples.virtual_text --method p-tuning-v2 --tokens 20 --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# ```
#
# Each GPU holds the frozen model, and only the prompts' gradients travel. How much is that, for 7B and version 2?

# %%
print(
    f"per step and GPU: {4 * p_tuning_v2.num_parameters(shape_only, PTuningV2Config(20)) / 1e6:.0f} MB of gradients in fp32"
)

# %% [markdown]
# ## Takeaways
#
# - P-Tuning trains 50 million numbers on a 7B model to find 81,920: the encoder ties the virtual tokens together while they train, and is folded
#   away after.
# - P-Tuning v2 puts prompts in each of the $L$ layers and a label head on top; with 16 virtual tokens and 1,280 labelled passages, deep
#   beat shallow by the points printed above.
# - A label head reads the labels of 512 tokens in 1 pass, where questions in words need 512.
#
# Now write it yourself: [Exercises](../../work/04-peft/03-p-tuning.ipynb), three of them, 7 points.
#
# References: [Liu et al. 2021](https://arxiv.org/abs/2103.10385 "liu2021gpt"); [Liu et al. 2022](https://arxiv.org/abs/2110.07602 "liu2022ptuning"). The prefix itself is in
# [Prompt and prefix tuning](02-prompt-and-prefix-tuning.ipynb).
