# %% [markdown]
# # AdaLoRA: spend the rank where it pays
#
# LoRA gives every matrix the same rank, whether it needs it or not. AdaLoRA starts with a little too much everywhere, watches
# what each piece is worth while it trains, and takes the worst pieces away until a budget is met.

# %%
import itertools
import tempfile
import warnings

import torch

from llmlab.course import compare, explore, figure, palette, plt, show
from llmlab.models import course_model
from llmlab.models.accounting import linear_shapes
from llmlab.models.language_model import next_token_loss
from llmlab.models.presets import preset
from llmlab.peft import adalora, adalora_budget, adalora_files, lora, walk
from llmlab.peft.adalora import AdaLoRAConfig
from llmlab.peft.adalora_budget import RankAllocator
from llmlab.peft.lora import LoRAConfig
from llmlab.training import pretraining

# %% [markdown]
# ## What it costs
#
# A rank is not free, and it does not cost the same everywhere. One more rank on a $d \times k$ matrix trains $d + k$ numbers more, at 16 bytes
# each with Adam. In a 7B model, this is the price list, and the bill for rank 8 on everything.

# %%
shape = preset("llama-7b")
prices = {name.split(".")[1]: d + k for name, (d, k) in linear_shapes(shape).items()}
for name, price in prices.items():
    print(f"one rank of {name:10} {price:>7,} numbers")
bill = 8 * shape.num_hidden_layers * sum(prices.values())
print(
    f"rank 8 on all {7 * shape.num_hidden_layers} matrices: {bill:,} numbers, {16 * bill / 1e9:.2f} GB to train, {2 * bill / 1e6:.0f} MB to keep for each customer"
)

# %% [markdown]
# If half of these ranks teach the model nothing, half of that is waste: on disk for each customer, and in the memory of the server that holds a
# thousand adapters. But which half? Trying all divisions of 1,792 ranks over 224 matrices is out of the question.

# %% [markdown]
# ## Predict
#
# We shall teach the course model the Bible again, 28 matrices in 4 layers, with a budget of 28 ranks: one each, if they are dealt out evenly. AdaLoRA starts with
# three each and must take 56 of the 84 away. Each block has seven kinds of matrices: q, k, v, o, gate, up, down. **Which kinds end with nothing? How many of the 28
# matrices end with no rank at all?** Write your guess down; the heat map below answers.

# %% [markdown]
# A thought to guess by. The model reads English already; it has to learn what *this* book says and how. Queries and keys decide where a token looks, values and outputs what it takes from there, and the MLP what it makes of that.
# Which of these must change? And does the first layer, next to the words, need more than the last, next to the prediction?

# %%
my_guess = {"kinds that end with nothing": None, "matrices with rank 0": None}

# %% [markdown]
# ## The idea
#
# To take a piece away one must first have pieces. AdaLoRA writes the change of a weight as a singular value decomposition does, as a sum of *triplets*: a
# column of $P$, a number $\lambda$, a row of $Q$.

# %%
fig, ax = plt.subplots(figsize=(4.8, 2.6))
x = 0.0
for i, (size, kept) in enumerate([(0.9, True), (0.12, False), (0.6, True)]):
    color = palette.blue if kept else "#c9cdd2"
    ax.add_patch(plt.Rectangle((x, 0), 0.16, 2.2, color=color))
    ax.add_patch(plt.Circle((x + 0.55, 1.1), 0.26, color=palette.vermillion if kept else "#ffffff", ec="#6b7078"))
    ax.text(x + 0.55, 1.1, "λ" if kept else "0", ha="center", va="center", color="white" if kept else "#22262b")
    ax.add_patch(plt.Rectangle((x + 0.95, 1.02), 1.7, 0.16, color=color))
    ax.text(x + 1.2, -0.35, f"score {size}", ha="center", color=palette.ink)
    x += 3.1
    if i < 2:
        ax.text(x - 0.24, 1.1, "+", ha="center", va="center", fontsize=16)
ax.set(xlim=(-0.2, 9.1), ylim=(-0.7, 2.4), aspect="equal")
ax.axis("off")
figure(
    fig,
    alt="A sum of three triplets, each an upright bar, a circle with λ and a flat bar. The second has the lowest score: its λ is 0, its bars are grey but still there.",
)

# %% [markdown]
# In the symbols of [Zhang et al. 2023](https://arxiv.org/abs/2303.10512 "zhang2023adalora"), with $r_0$ triplets at the start and $\lambda = 0$, so that step 0 is the
# pretrained model:
#
# $$h = W_0 x + \frac{\alpha}{r_0} P \Lambda Q\, x, \qquad R(P, Q) = \lVert P^\top P - I \rVert_F + \lVert Q Q^\top - I \rVert_F$$
#
# $R$ joins the loss and keeps the columns of $P$, and the rows of $Q$, near orthogonal and of length 1. Otherwise a small $\lambda$ might hide behind a long row.
#
# **What is a triplet worth?** For each number $w$ in it, the loss would change by about $I = |w \cdot \partial E/\partial w|$ if it were zero. A batch is noisy, so average $I$ over
# time, and also average how much it wavers:
#
# $$\bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I, \qquad \bar U \leftarrow \beta_2 \bar U + (1-\beta_2)\,|I - \bar I|, \qquad s = \bar I \cdot \bar U$$
#
# A triplet's score is $S = s(\lambda) + \text{mean } s(P_{*}) + \text{mean } s(Q_{*})$. The wavering counts *for* a number: what still moves has not shown yet what it is worth.
#
# **How many may stay?** A budget $b(t)$ for the whole model falls from $b_0$ to $b_T$ along a cube: fast first, slowly where it hurts. At each step the $b(t)$ best triplets of
# all layers keep their $\lambda$; the others' is set to 0. Their $P$ and $Q$ are left alone. So $\partial E/\partial\lambda = p^\top (\partial E/\partial W)\, q$ is not zero, the optimizer moves
# $\lambda$ off zero at the next step, and a triplet that was cut too early can come back.
#
# One slip in print: the paper's equation 12 has $t - t_i - t_f$ in the numerator, by which the budget would start above $b_0$; the authors' code, `peft` and ours have $t - t_i$. And the
# paper squares the norms in $R$, which neither code does; we follow the code.

# %% [markdown]
# ## The code
#
# The layer is LoRA's with a $\Lambda$. The budget is five short functions and an object that remembers the averages.

# %%
show(
    adalora.triplets,
    adalora.orthogonality,
    adalora_budget.budget,
    adalora_budget.update,
    adalora_budget.triplet_scores,
    adalora_budget.keep_best,
)

# %% [markdown]
# Two details of `keep_best` are easy to get wrong. The threshold is one number for the whole model, not one a layer: that is what lets the budget move. And where nothing is to go, because `target_r` equals `init_r`, there is no threshold at all: ours then keeps
# everything, while `peft` 0.21 asks for the zeroth smallest score and raises an error.
#
# Shapes in the course model, with $r_0 = 3$. The names in the middle are those of the authors' code, and of the files:
#
# | layer | $W_0$ $(d, k)$ | `lora_B` $P$ | `lora_E` $\Lambda$ | `lora_A` $Q$ | numbers in a triplet |
# |---|---|---|---|---|---|
# | `q_proj`, `o_proj` | 128 × 128 | 128 × 3 | 3 × 1 | 3 × 128 | 257 |
# | `k_proj`, `v_proj` | 64 × 128 | 64 × 3 | 3 × 1 | 3 × 128 | 193 |
# | `gate_proj`, `up_proj` | 384 × 128 | 384 × 3 | 3 × 1 | 3 × 128 | 513 |
# | `down_proj` | 128 × 384 | 128 × 3 | 3 × 1 | 3 × 384 | 513 |
#
# A step has four calls, and their order is the method: `backward`, `optimizer.step`, `allocator.step`, `zero_grad`. Scores need the gradient that `zero_grad` throws away; the mask must come
# after the update that would undo it.

# %% [markdown]
# ## Against the library
#
# `peft` has AdaLoRA too. Both sides start from the same triplets and see the same batches for twelve steps. If a single importance differed, the two would soon keep different
# triplets; so the verdict on the ranks is a verdict on everything before it.

# %%
import peft
from transformers import LlamaForCausalLM, logging

warnings.filterwarnings("ignore", module="peft|transformers")  # deprecations; and peft takes AdaLoRA's ranks for LoRA's
logging.disable_progress_bar()

tokenizer = course_model.load_tokenizer()


def ids(text):
    return torch.tensor(tokenizer.encode(text).ids)


bible = ids(course_model.corpus("bible")[:400_000])
new = ids(course_model.corpus("bible", "valid")[:60_000])
STEPS = 12
theirs = peft.get_peft_model(
    LlamaForCausalLM.from_pretrained(course_model.MODEL),
    peft.AdaLoraConfig(
        init_r=3,
        target_r=1,
        lora_alpha=32,
        total_step=STEPS,
        tinit=2,
        tfinal=3,
        orth_reg_weight=0.1,
        target_modules=["q_proj", "v_proj", "up_proj"],
        task_type="CAUSAL_LM",
    ),
)
config = AdaLoRAConfig(
    STEPS,
    init_r=3,
    target_r=1,
    alpha=32,
    tinit=2,
    tfinal=3,
    orth_reg_weight=0.1,
    target_modules=("q_proj", "v_proj", "up_proj"),
)
ours = adalora.apply(course_model.load(), config)
layers = adalora.layers_of(ours)
with torch.no_grad():
    peers = {
        tuple(n.removeprefix("base_model.model.").rsplit(".", 2)[:2]): p
        for n, p in theirs.named_parameters()
        if "lora_" in n
    }
    for (place, which), p in peers.items():
        getattr(layers[place], which).copy_(p)

# %%
allocator = RankAllocator(ours)
optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
recipe = pretraining.Recipe(steps=STEPS, batch=2, context=32, warmup=0)
losses, kept = ([], []), ([], [])
for t in range(STEPS):
    batch = pretraining.sample_batch(bible, recipe, t)
    mine = next_token_loss(ours(batch), batch) + adalora.regularizer(ours)
    other = theirs(batch, labels=batch).loss
    for side, loss in enumerate((mine, other)):
        loss.backward()
        losses[side].append(loss.item())
        optimizers[side].step()
    allocator.step(t)
    theirs.base_model.update_and_allocate(t)
    kept[0].append([int((layers[place].lora_E != 0).sum()) for place, which in peers if which == "lora_E"])
    kept[1].append([int((p != 0).sum()) for (_, which), p in peers.items() if which == "lora_E"])
    for optimizer in optimizers:
        optimizer.zero_grad()
compare(losses[0], losses[1], what="losses with the regularizer, 12 steps", tol=1e-4)
compare(kept[0], kept[1], what="ranks of 12 layers after each of 12 steps", tol=0)

# %% [markdown]
# Files go both ways. They hold the triplets that are left, and which they were.

# %%
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])
folder = tempfile.mkdtemp()
adalora_files.save(ours, f"{folder}/ours")
opened = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(course_model.MODEL), f"{folder}/ours")
compare(opened(prompt).logits, ours(prompt), what="logits, ours in peft", tol=1e-4)
theirs.save_pretrained(f"{folder}/theirs")
returned = adalora_files.load(course_model.load(), f"{folder}/theirs")
compare(returned(prompt), theirs(prompt).logits, what="logits, peft's in ours", tol=1e-4)
plain = course_model.load()(prompt)
compare(adalora.remove(ours)(prompt), plain, what="logits after removing", tol=0)

# %% [markdown]
# ## The experiment
#
# Now the Bible: 32 steps, three seeds (which draw both the starting triplets and the batches), and three ways to spend 28 ranks on 28 matrices.
#
# - **LoRA, even**: rank 1 everywhere.
# - **AdaLoRA**: three everywhere at first, one on average at the end. While it trains it has up to three times the numbers, an advantage in memory that LoRA does not get.
# - **LoRA, as found**: plain LoRA from the start, with the ranks that AdaLoRA ended with. It says whether the *division* of the budget is worth something, or only AdaLoRA's way of training.
#
# The learning rates were found beforehand, by doubling, for each method on its own: 0.02 came out best for LoRA, and for AdaLoRA with $\alpha = 32$.


# %%
STEPS = 32


def train(model, seed, rate, step=lambda t: None, extra=lambda: 0.0):
    """The model after STEPS steps of the Bible."""
    recipe = pretraining.Recipe(steps=STEPS, batch=4, context=64, warmup=5, weight_decay=0.0, seed=seed, peak_lr=rate)
    optimizer = pretraining.make_optimizer(model, recipe)
    for t in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = pretraining.learning_rate(t, recipe)
        batch = pretraining.sample_batch(bible, recipe, t)
        (next_token_loss(model(batch), batch) + extra()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        step(t)
        optimizer.zero_grad()
    return model


def with_lora(seed, ranks):
    """LoRA with a rank for each layer; a layer of rank 0 has none."""
    ranks = {name: r for name, r in ranks.items() if r}
    dice = torch.Generator().manual_seed(seed)
    alphas = {name: 2 * r for name, r in ranks.items()}
    settings = LoRAConfig(r=1, alpha=2, target_modules=tuple(ranks), rank_pattern=ranks, alpha_pattern=alphas)
    return train(lora.apply(course_model.load(), settings, generator=dice), seed, 2e-2)


def with_adalora(seed):
    """AdaLoRA, the ranks it had after each step, and which triplets were kept."""
    settings = AdaLoRAConfig(
        STEPS, init_r=3, target_r=1, alpha=32, tinit=4, tfinal=10, orth_reg_weight=0.1, target_modules="all-linear"
    )
    model = adalora.apply(course_model.load(), settings, generator=torch.Generator().manual_seed(seed))
    allocator, history, masks = RankAllocator(model), [], []

    def step(t):
        allocator.step(t)
        masks.append(None if allocator.kept is None else torch.cat(list(allocator.kept.values())))
        history.append(list(adalora.ranks(model).values()))

    return train(model, seed, 2e-2, step, lambda: adalora.regularizer(model)), history, masks


def loss_on(model, text):
    return pretraining.evaluate(model, text, context=64, windows=32, batch=16)


# %%
# NBVAL_IGNORE_OUTPUT
names, seeds = list(walk.find(course_model.load(), "all-linear")), (0, 1, 2)
start = loss_on(course_model.load(), new)
even = [with_lora(seed, dict.fromkeys(names, 1)) for seed in seeds]

# %%
# NBVAL_IGNORE_OUTPUT
adaptive, histories, masks = zip(*(with_adalora(seed) for seed in seeds), strict=True)
found = [adalora.ranks(model) for model in adaptive]

# %%
# NBVAL_IGNORE_OUTPUT
same = [with_lora(seed, ranks) for seed, ranks in zip(seeds, found, strict=True)]
results = {"LoRA, even": even, "AdaLoRA": adaptive, "LoRA, as found": same}
results = {label: [loss_on(model, new) for model in models] for label, models in results.items()}
print(f"before: {start:.2f}")
for label, values in results.items():
    print(f"{label:16} {'  '.join(f'{v:.3f}' for v in values)}   mean {sum(values) / 3:.3f}")
print(f"numbers kept: even {walk.trainable(even[0])[0]:,}; as found, {[walk.trainable(m)[0] for m in same]}")

# %% [markdown]
# The heat map shows where the 28 ranks went, averaged over the seeds. An even deal would be one color.

# %%
# NBVAL_IGNORE_OUTPUT
KINDS = ["q", "k", "v", "o", "gate", "up", "down"]
grid = torch.tensor([list(f.values()) for f in found], dtype=torch.float32).mean(0).view(4, 7)
fig, ax = plt.subplots(figsize=(4.8, 3.0))
ax.imshow(grid, cmap="Blues", vmin=0, vmax=3, aspect="auto")
for i in range(4):
    for j in range(7):
        ax.text(j, i, f"{grid[i, j]:.1f}", ha="center", va="center", color="white" if grid[i, j] > 1.7 else "#22262b")
ax.set_xticks(range(7), labels=KINDS)
ax.set_yticks(range(4), labels=[f"layer {i}" for i in range(4)])
ax.set_title("Where 28 ranks went (mean of 3 seeds)")
ax.grid(False)
by_kind = dict(zip(KINDS, grid.sum(0).tolist(), strict=True))
empty = [sum(r == 0 for r in f.values()) for f in found]
figure(
    fig,
    alt="Heat map of final ranks, layer by matrix kind. "
    + ", ".join(f"{k} {v:.1f}" for k, v in by_kind.items())
    + " ranks by kind over four layers.",
)
print("ranks by kind:", ", ".join(f"{k} {v:.1f}" for k, v in by_kind.items()))
print(f"matrices with rank 0, by seed: {empty}")
queries = by_kind["q"] + by_kind["k"]
assert queries < 3 < by_kind["v"] + by_kind["o"]

# %% [markdown]
# Queries and keys get next to nothing; values, outputs and the MLP take the budget. To sound like the Bible the model need not look elsewhere, it needs
# to *say* something else. Three seeds with different batches and different starting triplets agree on it, so it is not chance. And the loss:

# %%
# NBVAL_IGNORE_OUTPUT
fig, ax = plt.subplots(figsize=(4.8, 2.4))
for row, values in enumerate(results.values()):
    ax.plot(values, [row] * 3, "o", color=[palette.gray, palette.vermillion, palette.blue][row], markersize=8)
    ax.plot(sum(values) / 3, row, "|", color=palette.ink, markersize=22)
ax.set_yticks(range(3), labels=list(results))
ax.set(xlabel="loss on the Bible after 32 steps", ylim=(-0.5, 2.5))
ax.invert_yaxis()
means = {label: sum(v) / 3 for label, v in results.items()}
figure(
    fig,
    alt="Loss of three seeds for each method: "
    + ", ".join(f"{label} {m:.2f} on average" for label, m in means.items())
    + ".",
)
spread = max(max(v) - min(v) for v in results.values())
for label in ("AdaLoRA", "LoRA, as found"):
    pairs = [a - b for a, b in zip(results["LoRA, even"], results[label], strict=True)]
    verdict = "better in all three" if min(pairs) > 0 else "worse in all three" if max(pairs) < 0 else "a tie"
    print(f"{label} against LoRA, even, seed by seed: {verdict} ({'  '.join(f'{p:+.3f}' for p in pairs)})")
print(f"for scale: the seeds of one method differ by up to {spread:.3f}")

# %% [markdown]
# Read it with care. The differences are a few hundredths of a nat where the whole lesson gained nearly one. Compare seed by seed: the same batches, in the same order. The ranks that
# AdaLoRA finds cost more numbers than an even deal, since an MLP's triplet has twice those of an attention matrix and the budget counts *triplets*, not numbers. And AdaLoRA had
# up to three times the parameters while it trained. What the heat map shows is firmer than what the losses show.

# %% [markdown]
# ## Play
#
# Watch the budget fall. Each frame is a moment of the first seed's training: which matrices still hold which ranks.

# %%
# NBVAL_IGNORE_OUTPUT
MOMENTS = [0, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 31]
history = histories[0]
allowed = [
    adalora_budget.budget(t, AdaLoRAConfig(STEPS, init_r=3, target_r=1, tinit=4, tfinal=10), 28) for t in range(STEPS)
]
returns = [
    sum(int((b & ~a).sum()) for a, b in itertools.pairwise(m) if a is not None) for m in masks
]  # triplets cut at one step and kept at the next


def draw(step):
    fig, (top, ax) = plt.subplots(2, 1, figsize=(4.8, 4.2), height_ratios=[1, 2])
    top.plot(range(STEPS), allowed, color=palette.gray)
    top.plot(step, allowed[step], "o", color=palette.vermillion)
    top.set(ylabel="budget", ylim=(0, 90))
    ax.imshow(torch.tensor(history[step]).view(4, 7), cmap="Blues", vmin=0, vmax=3, aspect="auto")
    for i, r in enumerate(history[step]):
        ax.text(i % 7, i // 7, r, ha="center", va="center", color="white" if r > 1 else "#22262b")
    ax.set_xticks(range(7), labels=KINDS)
    ax.set_yticks(range(4), labels=[f"layer {i}" for i in range(4)])
    ax.grid(False)
    return fig


explore(
    draw,
    title="The budget at work",
    alt=lambda step: (
        f"Step {step}: budget {allowed[step]}, {sum(history[step])} ranks in use, {sum(r == 0 for r in history[step])} matrices empty."
    ),
    start={"step": 12},
    step=MOMENTS,
)
print(f"triplets that were cut and came back, by seed: {returns}")

# %% [markdown]
# ## At scale
#
# The paper's table 1 compares on DeBERTaV3-base: 12 layers of width 768, MLP 3,072, adapters on all six matrices of a block. LoRA's counts follow from the shapes alone. AdaLoRA's depend on where
# the ranks end up. The shapes give the two ends between which its count must lie, at 8 triplets a matrix.

# %%
attention, mlp, matrices = 768 + 768, 768 + 3072, 12 * 6


def lora_count(r):
    return 12 * r * (4 * attention + 2 * mlp)


r, b = 8, 8 * matrices
count = lora_count(r) / 1e6
low, high = b * (attention + 1) / 1e6, b * (mlp + 1) / 1e6
print(f"LoRA r = 8: paper 1.33 M, ours {count:.2f} M, {'same' if round(count, 2) == 1.33 else 'NOT the same'}")
print(f"AdaLoRA, {b} triplets: paper 1.27 M, ours from {low:.2f} M (all in attention) to {high:.2f} M (all in the MLP)")

# %% [markdown]
# On a GPU with any Llama, through `peft`; `total_step` must be the true number of steps, and `update_and_allocate` must be called between `optimizer.step()` and `zero_grad()`. `Trainer` does not
# call it by itself.
#
# ```python
# config = peft.AdaLoraConfig(init_r=12, target_r=8, tinit=200, tfinal=500, deltaT=10, total_step=3000,
#                             target_modules="all-linear", task_type="CAUSAL_LM")
# model = peft.get_peft_model(model, config)
# for step, batch in enumerate(loader):
#     model(**batch).loss.backward()          # peft adds the regularizer to this loss
#     optimizer.step()
#     model.base_model.update_and_allocate(step)
#     optimizer.zero_grad()
# ```
#
# With eight GPUs, averaged gradients make every rank's scores equal, so that all mask the same triplets without a word between them. What it costs: Ī and Ū, two more numbers for each trained one.

# %%
start_numbers = 12 * shape.num_hidden_layers * sum(prices.values())
print(
    f"7B, init_r 12 on all linears: {start_numbers / 1e6:.0f} M numbers; the averages add {8 * start_numbers / 1e9:.2f} GB to {16 * start_numbers / 1e9:.2f} GB"
)

# %% [markdown]
# ## Takeaways

# %%
# NBVAL_IGNORE_OUTPUT
print(
    f"1. Of 28 matrices, {sum(empty) / 3:.0f} end with rank 0; queries and keys together hold {queries / 28:.0%} of the ranks, though they are 8 of 28 matrices."
)
print(
    f"2. On the same 28 ranks the loss is {means['LoRA, even']:.2f} even, {means['AdaLoRA']:.2f} with AdaLoRA, {means['LoRA, as found']:.2f} for LoRA with the ranks that it found; before, {start:.2f}."
)
print(
    f"3. Only λ is masked, so a cut triplet can return: {sum(returns)} did so, in three runs, while the budget fell from 84 to 28."
)

# %% [markdown]
# Now write it yourself: [Exercises](../../work/04-peft/06-adalora.ipynb), four of them, 9 points. Before this: [LoRA](05-lora.ipynb).
#
# References: the paper, [Zhang et al. 2023](https://arxiv.org/abs/2303.10512 "zhang2023adalora"); plain LoRA, [Hu et al. 2021](https://arxiv.org/abs/2106.09685 "hu2021lora").
