# %% [markdown]
# # Adapters: small networks between frozen layers
#
# An adapter is a bottleneck of two thin matrices that sits in the path of every token, while the model around it stays as it
# was. By the end of this page you will have thrown half of them away at little cost, run eight tasks for the price of
# fewer, and watched a model choose between two adapters without being told the task.

# %%
import tempfile
import time

import torch

from llmlab.course import compare, explore, figure, plt, show
from llmlab.models import course_model
from llmlab.models.accounting import forward_flops, parameters
from llmlab.models.presets import preset
from llmlab.peft import adapter_fusion, adapters, bottleneck, walk
from llmlab.peft.adapter_fusion import FusionConfig
from llmlab.peft.adapters import AdapterConfig
from llmlab.training import tasks

# %% [markdown]
# ## What it costs
#
# A company has eight tasks for one 7B model: it sorts mail, writes summaries, answers in three languages. Fine-tuned in full,
# that is eight models. And a request that needs all eight answers runs all eight.

# %%
llama_7b = preset("llama-7b")
one = forward_flops(llama_7b, batch=1, seq=512)
print(f"eight fine-tuned copies of Llama 7B: {8 * 2 * parameters(llama_7b) / 1e9:.0f} GB in half precision")
print(f"one text of 512 tokens through all eight: {8 * one / 1e12:.0f} TFLOP, eight times {one / 1e12:.1f}")

# %% [markdown]
# Adapters make the storage small, as LoRA does. They were there first, in 2019. What they can do that merged weights cannot
# is share the *arithmetic*: the eight models have the same frozen layers, and where no adapter has spoken yet, the same numbers
# flow through them.

# %% [markdown]
# ## Predict
#
# Say the adapters sit only in the upper part of a model of 12 layers: the lowest five have none. One text is to go through
# eight tasks. The lowest five layers then run once for all. **By how much does the whole get cheaper?** By five twelfths, 42%?
# By a third? Write your number down.

# %%
left = adapters.shared_cost(layers=12, tasks=8, n=5)
print(
    f"work that is left: {left:.1%}, so {1 - left:.0%} cheaper; with two tasks {1 - adapters.shared_cost(12, 2, 5):.0%}"
)
print(f"with ever more tasks at most {5 / 12:.0%}")

# %% [markdown]
# [Rücklé et al. 2021](https://arxiv.org/abs/2010.11918 "ruckle2021adapterdrop") measured 39% faster inference in this very setting.
# Our count leaves the adapters' own cost out; where it is saved too, a little more is gained. The question is
# what the missing adapters cost in quality, and this page measures it.

# %% [markdown]
# ## The idea
#
# An adapter goes down from the model's width $d$ to a few numbers $m$, through an activation, and up again. Where it sits is
# what tells the classics apart.

# %%
fig, ax = plt.subplots(figsize=(4.8, 3.6))
for x0, name, spots in [(0, "Houlsby", (2.0, 4.6)), (5, "Pfeiffer", (5.6,))]:
    ax.plot([x0 + 2.6, x0 + 2.6], [0, 6.7], color="#6b7078", linewidth=2)  # the stream
    for y, label in [(0.6, "attention"), (3.2, "MLP")]:
        ax.add_patch(plt.Rectangle((x0, y), 1.9, 0.9, color="#dfe1e4"))
        ax.text(x0 + 0.95, y + 0.45, label, ha="center", va="center", fontsize=9)
        top = y + 2.2
        ax.plot([x0 + 2.6, x0 + 0.95, x0 + 0.95], [y - 0.3, y - 0.3, y], color="#6b7078", linewidth=1)
        ax.plot([x0 + 0.95, x0 + 0.95, x0 + 2.6], [y + 0.9, top, top], color="#6b7078", linewidth=1)
    for y in spots:
        center = x0 + 0.95 if name == "Houlsby" else x0 + 2.6
        shape = [(center - 0.7, y), (center + 0.7, y), (center + 0.2, y + 0.35), (center + 0.7, y + 0.7)]
        shape += [(center - 0.7, y + 0.7), (center - 0.2, y + 0.35)]
        ax.add_patch(plt.Polygon(shape, color="#d55e00", zorder=3))
    ax.text(x0 + 1.6, 7.2, name, ha="center", fontsize=11)
ax.set(xlim=(-0.4, 9), ylim=(-0.2, 7.8))
ax.axis("off")
figure(
    fig,
    alt="Two diagrams of a transformer block. Houlsby: a bottleneck behind attention and one behind the MLP, each before "
    "its output joins the stream. Pfeiffer: a single bottleneck on the stream, at the end of the block.",
)

# %% [markdown]
# [Houlsby et al. 2019](https://arxiv.org/abs/1902.00751 "houlsby2019parameter") put two in every block, on the outputs of attention
# and MLP before they join the stream. [Pfeiffer et al. 2021](https://arxiv.org/abs/2005.00247 "pfeiffer2021adapterfusion")
# searched over positions and kept one, at the block's end:
#
# $$h \leftarrow h + W_{up}\, f(W_{down}\, h + b_{down}) + b_{up}, \qquad W_{down} \in \mathbb{R}^{m \times d},\; W_{up} \in \mathbb{R}^{d \times m}$$
#
# - **Near the identity at the start.** The weights begin small (a standard deviation of 0.01), so that step 0 is almost the
#   pretrained model. From a large start, training fails.
# - **The activation forbids merging.** LoRA's product folds into the weight; an adapter stays in the path and costs
#   a little at each token, for ever.
# - **It is a module.** It can be left out in some layers, which is *AdapterDrop*, or stand beside others while attention chooses
#   among them, which is *AdapterFusion*.
#
# AdapterFusion comes second, after the adapters are trained and frozen. At each place, what the block computed asks a query; each
# adapter's output $z_i$ is a key and a value:
#
# $$s = \mathrm{softmax}_i\big((Q h) \cdot (K z_i)\big), \qquad h \leftarrow h + \sum_i s_i\, V z_i$$
#
# $V$ starts as the identity, so that the first output is a mean of things that trained adapters say.

# %% [markdown]
# ## The code
#
# The bottleneck, the hook that adds it to what a module gave, and the attention over several.

# %%
show(bottleneck.Bottleneck.forward, bottleneck.Site.change, bottleneck.Site.after, adapter_fusion.attend, adapters.drop)

# %% [markdown]
# A hook on a module's output leaves the model's own code and the names of its weights alone: the same file of ours works on
# `transformers`' Llama. Shapes in the course model, $d = 128$, for a bottleneck of $m = 16$:
#
# | what | shape | numbers |
# |---|---|---|
# | $W_{down}$, $b_{down}$ | 16 × 128, 16 | 2,064 |
# | $W_{up}$, $b_{up}$ | 128 × 16, 128 | 2,176 |
# | one adapter | $2md + d + m$ | 4,240 |
# | Houlsby, 4 blocks | 8 adapters | 33,920 |
# | Pfeiffer, 4 blocks | 4 adapters | 16,960 |
# | a fusion, one block: $Q$, $K$ with biases, $V$ | $3d^2 + 2d$ | 49,408 |
#
# A fusion is larger than the adapters that it joins. It does not grow with their number.

# %%
tokenizer = course_model.load_tokenizer()
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])
model = course_model.load()
plain = model(prompt)
for kind in ("houlsby", "pfeiffer"):
    adapters.apply(model, AdapterConfig(kind, bottleneck=16), kind)
    adapters.set_adapter(model, kind)
    moved = (model(prompt) - plain).abs().max().item()
    print(f"{kind:9} trains {walk.trainable(model)[0]:,} numbers; at the start no logit moves by 0.1: {moved < 0.1}")
adapters.remove(model)
compare(model(prompt), plain, what="logits after both came off", tol=0)

# %% [markdown]
# ## Against the library
#
# `peft` has no bottleneck adapters. The library `adapters` has; it needs an older `transformers` than ours, so it lives in an
# environment of its own, where a script of this repository ran it once, on a small Llama with grouped-query attention and random
# weights everywhere. What it computed is kept in a file of 177 kB that the package's tests compare with, to $10^{-5}$, logits
# *and* every gradient: Houlsby, Pfeiffer and AdapterFusion, on our Llama and on `transformers`'.
#
# Here we check what can be checked without it: both models, one file, exchanged.

# %%
from transformers import LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL)
adapters.apply(model, AdapterConfig("houlsby", 16), "shared")
torch.manual_seed(0)
for p in model.parameters():
    if p.requires_grad:  # adapters that say something
        torch.nn.init.normal_(p, std=0.1)
folder = tempfile.mkdtemp()
adapters.save(model, folder, "shared")
adapters.load(theirs, folder, "shared")
compare(theirs(prompt).logits, model(prompt), what="logits, our file on transformers' Llama", tol=1e-3)
adapters.remove(model)

# %% [markdown]
# ## The experiment
#
# First, dropping. We teach the course model the King James Bible through Pfeiffer adapters, 30 steps of four windows of 64 tokens, in
# two ways. The *standard* run keeps all four adapters throughout. The *robust* run draws a number $n$ from 0 to 3 at every
# step and leaves the lowest $n$ blocks bare. Then both are tested with 0 to 4 bare blocks. Three seeds each; the learning rate,
# 0.01, was the better of 0.01 and 0.03 for the standard run, in trials with eight windows a step.

# %%
STEPS, RATE = 30, 1e-2
SIZE = {"bible": 4, "sort": 16}
train = {name: tasks.make(name, tokenizer, batches=STEPS, size=n) for name, n in SIZE.items()}
valid = {name: tasks.make(name, tokenizer, "valid", batches=4, size=n) for name, n in SIZE.items()}


def teach(robust, seed):
    """The course model after 30 steps of the Bible, with a Pfeiffer adapter in each block."""
    torch.manual_seed(seed)
    model = adapters.apply(course_model.load(), AdapterConfig("pfeiffer", 16), "bible")
    if not robust:
        tasks.fit(model, train["bible"], RATE)
        return model
    with adapters.dropping(model, torch.Generator().manual_seed(seed)):
        tasks.fit(model, train["bible"], RATE)
    return model


def loss_on(model, name):
    return tasks.score(model, valid[name])[0]


runs = {kind: [teach(kind == "robust", seed) for seed in range(3)] for kind in ("standard", "robust")}

# %%
# NBVAL_IGNORE_OUTPUT
curve = {
    kind: torch.tensor([[loss_on(adapters.drop(m, n), "bible") for n in range(5)] for m in models])
    for kind, models in runs.items()
}
bare = curve["standard"][0, 4].item()

fig, ax = plt.subplots(figsize=(4.8, 3.4))
for kind, style in (("standard", "s--"), ("robust", "o-")):
    losses = curve[kind]
    ax.plot(range(5), losses.mean(0), style, label=f"{kind} training")
    ax.fill_between(range(5), losses.min(0).values, losses.max(0).values, alpha=0.25)
ax.set(xlabel="blocks without an adapter, from below", ylabel="loss on the Bible", xticks=range(5))
ax.legend()
ax.set_title("Dropping the lower adapters")
keeps = {
    k: [((bare - c[:, n]) / (bare - curve["standard"][:, 0])).mean().item() for n in range(5)] for k, c in curve.items()
}
figure(
    fig,
    alt="Loss on the Bible against the number of blocks without an adapter. With two of four bare, standard training keeps "
    f"{keeps['standard'][2]:.0%} of its gain, robust training {keeps['robust'][2]:.0%}.",
)
print("share of the full gain that is kept, by bare blocks (mean of three seeds)")
for kind, shares in keeps.items():
    print(f"{kind:9}" + "".join(f"{n}: {share:>4.0%}   " for n, share in enumerate(shares[:4])))
assert keeps["robust"][3] > keeps["standard"][3] + 0.1 and keeps["robust"][2] > 0.7

# %% [markdown]
# The lower adapters matter least, which is the paper's finding too: drop one, and hardly anything is lost either way. Beyond
# that the two curves part. Standard training spreads the work over all four adapters and misses them when they go. Robust
# training costs something while all are there, and then barely notices: it has put what it learned where it will stay.
#
# What does that buy? Fewer blocks to walk back through in training, since no gradient goes below the lowest adapter; and, with
# several tasks, lower blocks that run once for all. Counted for our four blocks and eight tasks, and measured.

# %%
# NBVAL_IGNORE_OUTPUT
many = course_model.load()
names = [f"task{i}" for i in range(8)]
for name in names:
    adapters.apply(many, AdapterConfig("pfeiffer", 16), name)
text = torch.cat([batch.input_ids for batch in valid["bible"][:2]])


def seconds(n):
    adapters.drop(many, n)
    spent = []
    for _ in range(2):
        started = time.perf_counter()
        adapters.run_tasks(many, text, names, n)
        spent.append(time.perf_counter() - started)
    return min(spent)


measured = {n: seconds(n) for n in range(4)}
print("bare blocks   counted, blocks only   measured, whole model")
for n in range(4):
    print(f"{n:>11}   {adapters.shared_cost(4, 8, n):>20.0%}   {measured[n] / measured[0]:>21.0%}")
alone = adapters.run_tasks(adapters.drop(many, 2), text[:2], names[:2], 2)
adapters.set_adapter(many, names[1])
compare(alone[1], many(text[:2]), what="logits of a task that shared its lower blocks", tol=1e-3)

# %% [markdown]
# The measured ratio falls with the counted one, but not as far: the output head, a matrix of 2,048 × 128, still runs for each
# task, and in a model this small it is a good part of all the work. In a 7B model it is 2%.
#
# Second, fusion. We train two adapters on one base: one on the Bible, one on putting digits in order (`538=358`), which no text teaches.
# Then both are frozen and a fusion reads a mixture of the two tasks, 20 batches of each (learning rate 0.001, the best of three).

# %%
torch.manual_seed(0)
model = course_model.load()
for name in ("bible", "sort"):
    adapters.apply(model, AdapterConfig("pfeiffer", 16), name)
    tasks.fit(model, train[name], RATE)
results = {"no adapter": None, "bible": None, "sort": None}
for name in results:
    adapters.set_adapter(model, None if name == "no adapter" else name)
    results[name] = [loss_on(model, task) for task in train]

adapter_fusion.apply(model, FusionConfig(("bible", "sort")), "both", torch.Generator().manual_seed(0))
results["their mean"] = [loss_on(model, task) for task in train]
mixture = [batch for pair in zip(train["bible"][:20], train["sort"][:20], strict=True) for batch in pair]
tasks.fit(model, mixture, 1e-3)
results["fusion"] = [loss_on(model, task) for task in train]

# %%
# NBVAL_IGNORE_OUTPUT
print("loss on           bible     sort")
for name, (bible, sort) in results.items():
    print(f"{name:14}{bible:>9.2f}{sort:>9.2f}")
best = [results["bible"][0], results["sort"][1]]
assert all(results["fusion"][i] < results["their mean"][i] for i in (0, 1))
assert all(results["fusion"][i] < best[i] + 0.2 for i in (0, 1))

# %% [markdown]
# Each adapter is good at its own task and worse than nothing at the other. At its start the fusion is the mean of the
# two. After 40 steps it does both tasks with one set of weights, about as well as each specialist its own, and nobody tells it
# which task is before it. It must see that for itself. Look at what it reads, token by token.


# %%
# NBVAL_IGNORE_OUTPUT
def reading(batch):
    """(blocks, T): how much of the Bible adapter the first example's tokens read; and the tokens as text."""
    with torch.no_grad():
        model(batch.input_ids[:1])
    real = int(batch.attention_mask[0].sum())
    rows = torch.stack([w[0, :real, 0] for w in adapter_fusion.weights(model, "both").values()])
    return rows, [tokenizer.decode([i]).strip() or "·" for i in batch.input_ids[0, :real].tolist()]


pictures = [reading(valid["bible"][0]), reading(valid["sort"][0])]
fig, axes = plt.subplots(2, 1, figsize=(4.8, 3.4))
for ax, (rows, words), title in zip(axes, pictures, ("a verse", "digits to sort"), strict=True):
    n = min(12, len(words))
    image = ax.imshow(rows[:, :n], cmap="cividis", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(n), labels=words[:n], rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(4), labels=[f"block {i}" for i in range(4)], fontsize=8)
    ax.grid(False)
    ax.set_title(title)
fig.colorbar(image, ax=axes, label="weight of the Bible's adapter")
shares = {name: torch.cat([r.flatten() for r in [reading(b)[0] for b in valid[name]]]).mean().item() for name in train}
figure(
    fig,
    alt="Weights of the Bible's adapter by block and token, for a verse and for digits to sort. On average "
    f"{shares['bible']:.0%} of what is read is the Bible's in verses and {shares['sort']:.0%} in digits.",
)
print(f"the Bible's adapter is read: {shares['bible']:.0%} in verses, {shares['sort']:.0%} in digits")
assert shares["bible"] > shares["sort"]

# %% [markdown]
# No label said "verse". The query is what the block computed, the keys are what the adapters would say, and training has driven
# their scores so far apart that almost every square is all one adapter or all the other. In verses that is the Bible's adapter nearly
# everywhere. In digits it is not simply the opposite: some blocks change over to the other adapter, and some read the Bible's for
# digits as well, as they do for words. So a weight says where the fusion reads, and not what for: $V$ trains too, and can turn what an adapter says to the other task's use. The authors add a small penalty that
# keeps $V$ near the identity (`adapter_fusion.value_penalty`), which makes such pictures easier to trust.

# %% [markdown]
# ## Play
#
# Move the sliders: bare blocks from below, and the number of tasks that share them. The bars say what is left of the work, counted
# over blocks; the title what is left of the gain under robust training.


# %%
# NBVAL_IGNORE_OUTPUT
def draw(bare, tasks):
    fig, ax = plt.subplots(figsize=(4.8, 2.9))
    left = adapters.shared_cost(4, tasks, bare)
    for block in range(4):
        times = 1 if block < bare else tasks
        ax.barh(block, times, color="#b8bcc2" if block < bare else "#d55e00")
    ax.set(xlim=(0, 16), xlabel="times that a block runs", yticks=range(4))
    ax.set_yticks(range(4), labels=[f"block {i}" for i in range(4)])
    ax.set_title(f"work left {left:.0%}, gain left {keeps['robust'][bare]:.0%}")
    return fig


explore(
    draw,
    title="Bare blocks run once",
    alt=lambda bare, tasks: (
        f"{bare} bare blocks, {tasks} tasks: {adapters.shared_cost(4, tasks, bare):.0%} of the work and "
        f"{keeps['robust'][bare]:.0%} of the gain are left."
    ),
    start={"bare": 2, "tasks": 8},
    bare=[0, 1, 2, 3],
    tasks=[1, 2, 4, 8, 16],
)

# %% [markdown]
# ## At scale
#
# Houlsby et al. report, in their abstract, that adapters add 3.6% of BERT-large's parameters per task on GLUE. They chose $m$ for
# each task, so no single count gives 3.6%; counting tells which $m$ it would be. BERT-large has 24 layers of width 1,024
# and, by the sizes that BERT published, the parameters counted below.

# %%
width, layers, words = 1024, 24, 30522
block = 12 * width**2 + 13 * width  # attention 4d², MLP 8d², biases, two layer norms
bert = layers * block + (words + 512 + 2 + 2) * width + width**2 + width  # embeddings, their norm, the pooler
print(f"BERT-large has {bert / 1e6:.0f} million parameters")
for m in (8, 64, 256):
    print(f"m = {m:>3}: {2 * layers * bottleneck.count(width, m) / bert:.1%} of BERT-large")
fits = min(range(1, 257), key=lambda m: abs(2 * layers * bottleneck.count(width, m) / bert - 0.036))
print(f"3.6% would be m = {fits} for all tasks")
print(
    f"AdapterDrop, 5 of 12 layers, 8 tasks: paper 39% (measured), ours {1 - adapters.shared_cost(12, 8, 5):.0%} (counted)"
)

# %% [markdown]
# The sum misses their trained layer norms and heads, a few tenths of a percent at most. The 39% is not the same as ours: theirs is
# measured with the adapters' own cost in it, ours counts blocks.
#
# On Llama 7B, a Pfeiffer adapter of 64 in every block, and what it costs at each token since it can never be merged:

# %%
d, L = llama_7b.hidden_size, llama_7b.num_hidden_layers
size = L * bottleneck.count(d, 64)
share = L * bottleneck.flops(d, 64, 512) / one
print(f"{size:,} numbers, {size / parameters(llama_7b):.2%} of the model, a file of {2 * size / 1e6:.0f} MB")
print(f"{share:.2%} more FLOPs for every token; a merged LoRA adds none")
print(
    f"a fusion of any number of them: {L * (3 * d * d + 2 * d) / 1e9:.1f} billion numbers, which is why one fuses small models"
)

# %% [markdown]
# The extra arithmetic is small, but at batch size 1 a GPU waits for each small product in turn: there the paper's 4 to 6%
# slower inference, measured on BERT, can be more. To serve one task, merge LoRA. To serve many tasks over one text, adapters with
# bare lower layers do what LoRA cannot.
#
# On eight GPUs each holds the frozen model and its own share of the *tasks*; nothing need be exchanged. For training with data
# parallelism only adapter gradients travel, as with LoRA:
#
# ```
# torchrun --nproc-per-node 8 train.py   # your loop; adapters.apply(model, AdapterConfig("pfeiffer", 64)) before DDP wraps it
# ```

# %% [markdown]
# ## Takeaways
#
# - An adapter is $2md + d + m$ numbers, 4,240 in our model at $m = 16$; Houlsby has two in a block, Pfeiffer one, and neither can be
#   merged.
# - With $n$ drawn anew at each step, adapters in the upper half of four blocks keep most of the gain, and eight tasks that share the
#   other half cost 56% of the work in blocks.
# - AdapterFusion freezes $N$ adapters and learns, with $3d^2 + 2d$ numbers a block, which to read at each token; its value matrix
#   starts as the identity.
#
# Now write it yourself: [Exercises](../../work/04-peft/04-adapters.ipynb), three of them, 7 points.
#
# References: [Houlsby et al. 2019](https://arxiv.org/abs/1902.00751 "houlsby2019parameter");
# [Pfeiffer et al. 2021](https://arxiv.org/abs/2005.00247 "pfeiffer2021adapterfusion");
# [Rücklé et al. 2021](https://arxiv.org/abs/2010.11918 "ruckle2021adapterdrop"); the library,
# [Poth et al. 2023](https://arxiv.org/abs/2311.11077 "poth2023adapters").
