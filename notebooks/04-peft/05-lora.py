# %% [markdown]
# # LoRA: freeze the model, train a thin change
#
# To fine-tune a large model you train all its weights, and that takes more memory than a GPU has. LoRA freezes the weights and
# trains two thin matrices beside some of them. Why is so little enough? At the end of this page you own the function that does it,
# `lora_forward`, and you have measured what each rank buys.

# %% tags=["hide-input"]
import tempfile
import textwrap
import warnings

import torch
from torch import Tensor

from llmlab.checks.peft.lora import check
from llmlab.course import compare, explore, figure, plt, predict, show, your_turn
from llmlab.models import course_model
from llmlab.models.accounting import adam_bytes, parameters
from llmlab.models.generation import generate
from llmlab.models.presets import preset
from llmlab.peft import lora, walk
from llmlab.peft.lora import LoRAConfig, files
from llmlab.training import pretraining

# %% [markdown]
# ## What it costs
#
# Full fine-tuning trains every parameter. Adam in mixed precision then holds 16 bytes per parameter: 2 for the weight, 2 for its
# gradient, 4 for a master copy of the weight, and 4 + 4 for Adam's two averages. And each fine-tuned model is a full copy on disk.

# %%
llama_7b = preset("llama-7b")
training = sum(adam_bytes(llama_7b).values())
shelf = 100 * 2 * parameters(llama_7b)
print(f"Llama 7B: {parameters(llama_7b):,} parameters")
print(f"to train all of them: {training / 1e9:.0f} GB, before a single activation")
print(f"to keep 100 fine-tuned copies: {shelf / 1e12:.2f} TB")

# %% [markdown]
# ## Predict
#
# So the run does not fit on one GPU of 80 GB. And a hundred customers, each with a model of their own, store nearly the same
# 13 GB a hundred times.
#
# Now LoRA. It puts a pair of thin matrices of rank 8 beside the query and the value projection of each of the 32 layers. Those
# projections are 4,096 × 4,096; a pair is 8 × 4,096 and 4,096 × 8. Only the pairs are trained.
#
# And does it learn anything? Further down we teach a small model the Bible, in full and with pairs of rank 1. Full fine-tuning
# lowers its loss by some amount. What share of that does rank 1 reach? The first answer comes at once, the second with the experiment.

# %%
size_guess = predict(
    "How much of the whole model is trained?", unit="% of its parameters"
)
gain_guess = predict(
    "How much of full fine-tuning's gain does LoRA reach at rank 1?", unit="%"
)

# %% tags=["hide-output"]
frozen = parameters(llama_7b)
trained = 32 * 2 * (8 * 4096 + 4096 * 8)  # layers × matrices × (A and B)
size_guess.settle(100 * trained / (frozen + trained))
print(f"to train: {(2 * frozen + 16 * trained) / 1e9:.1f} GB")
print(f"to keep 100 models: {(2 * frozen + 100 * 2 * trained) / 1e9:.1f} GB")

# %% [markdown]
# ## By hand
#
# A square matrix of width 4,096 has 16.8 million entries. A pair of rank 8 has 65,536, and only 64 of the model's 224 matrices get
# one. So LoRA is small, and that is no surprise. The surprise is that it works. First see what it does, on numbers that you can check.
#
# Here are a weight $W$ of 2 × 3, a pair $B$, $A$ of rank $r = 1$ with $\alpha = 2$, and one input $x$:
#
# $$W = \begin{pmatrix} 1 & 0 & 2 \\ 0 & 1 & 1 \end{pmatrix}, \quad
# x = \begin{pmatrix} 1 \\ 2 \\ 3 \end{pmatrix},$$
#
# $$B = \begin{pmatrix} 1 \\ -2 \end{pmatrix}, \quad
# A = \begin{pmatrix} 1 & -1 & 1 \end{pmatrix}$$
#
# The output $h$ can be computed in two ways.
#
# | beside the weight | | merged into the weight | |
# |---|---|---|---|
# | $Wx$ | $(7,\ 5)$ | $\Delta W = \frac{\alpha}{r} BA$ | rows $(2, -2, 2)$ and $(-4, 4, -4)$ |
# | $Ax = 1 - 2 + 3$ | $2$ | $W + \Delta W$ | rows $(3, -2, 4)$ and $(-4, 5, -3)$ |
# | $\frac{\alpha}{r} B \cdot 2$ | $(4,\ -8)$ | first output | $3 - 4 + 12 = 11$ |
# | $h = (7 + 4,\ 5 - 8)$ | $(11,\ -3)$ | second output | $-4 + 10 - 9 = -3$ |
#
# The left way never builds $\Delta W$. That is how one trains. The right way leaves one ordinary weight. That is how one serves. And
# look at the rows of $\Delta W$: both are multiples of $A$. A change of rank 1 reads one direction of the input, whatever it does to
# the outputs.

# %%
W, x = torch.tensor([[1.0, 0, 2], [0, 1, 1]]), torch.tensor([1.0, 2, 3])
A, B = torch.tensor([[1.0, -1, 1]]), torch.tensor([[1.0], [-2]])
print("beside:", (W @ x + lora.low_rank(x, A, B, scaling=2.0)).tolist())
print("merged:", ((W + lora.delta_weight(A, B, scaling=2.0)) @ x).tolist())

# %% [markdown]
# ## The idea
#
# Whatever fine-tuning does to a weight, it adds a matrix $\Delta W$ that is as large as the weight. LoRA bets that a tall matrix
# times a flat one will do. The figure draws the three to scale, for a weight of 128 × 128 and rank 4.
#
# In the symbols of [Hu et al. 2021](https://arxiv.org/abs/2106.09685 "hu2021lora"), equation 3, with the scale of their
# section 4.1:
#
# $$\begin{gathered}
# h = W_0 x + \Delta W x, \qquad \Delta W = \frac{\alpha}{r}\, B A, \\
# B \in \mathbb{R}^{d \times r},\quad A \in \mathbb{R}^{r \times k}
# \end{gathered}$$
#
# - **$B$ starts at zero, $A$ at random.** So $\Delta W = 0$, and step 0 *is* the pretrained model. If both were zero, neither would
#   ever get a gradient.
# - **The scale is $\alpha / r$.** The paper sets $\alpha$ once and then varies $r$, so that the learning rate need not be searched
#   anew. Many recipes use $\alpha = 2r$ instead, as we do below: then the scale is 2 at every rank.
# - **Training never builds $BA$.** $B(Ax)$ takes $r(k + d)$ multiplications per token, a product with a full $\Delta W$ takes $kd$.
# - **After training, merge.** $W_0 + \Delta W$ is an ordinary weight, and the adapter costs nothing when the model is used.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 2.9))
parts = [
    (0, 0, 128, 128, "#dfe1e4", "W₀  128 × 128\nfrozen"),
    (186, 0, 4, 128, "#d55e00", "B"),
    (206, 124, 128, 4, "#0072b2", "A"),
]
for left, bottom, width, height, color, _ in parts:
    ax.add_patch(plt.Rectangle((left, bottom), width, height, color=color))
ax.text(64, 64, parts[0][-1], ha="center", va="center")
ax.text(157, 64, "+", ha="center", va="center", fontsize=20)
ax.text(188, -16, "B\n128 × 4", ha="center", va="center", color="#d55e00")
ax.text(270, 106, "A  4 × 128", ha="center", va="center", color="#0072b2")
ax.text(
    270,
    52,
    f"16,384 frozen\n{4 * (128 + 128):,} trained\n= 1 in 16",
    ha="center",
    va="center",
)
ax.set(xlim=(-4, 338), ylim=(-34, 132), aspect="equal")
ax.axis("off")
figure(
    fig,
    alt=(
        "A large grey square, the frozen weight, plus a thin upright bar B times a thin"
        " flat bar A, drawn to scale."
    ),
)

# %% [markdown]
# ## Your turn
#
# Write the forward pass of one linear layer with a pair beside it, as it is trained:
#
# $$h = W x + \frac{\alpha}{r}\, B A\,(x \odot \text{keep})$$
#
# - `x` is (…, k): any number of dimensions, and the last one has size k. `W` is (d, k), `A` is (r, k), `B` is (d, r).
# - `alpha` is a number. The rank $r$ is no argument: read it from a shape.
# - `keep` is the dropout mask, as large as `x`: 0 where an input is dropped, $1/(1-p)$ elsewhere, if a share $p$ is dropped. It
#   is for the pair alone; $W$ sees all of `x`.
# - Return (…, d). Go down to $r$ numbers and up again: do not build $BA$. `A` and `B` are trained through what you return.
#
# One right answer is folded below.


# %%
def lora_forward(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float, keep: Tensor
) -> Tensor:
    """W x + (alpha / r) B A (x · keep): (…, k) → (…, d)."""
    raise NotImplementedError("five lines of yours")


your_turn(check.lora_forward, lora_forward)


# %% tags=["hide-cell"]
def one_right_answer(x, W, A, B, alpha, keep):
    r = A.shape[0]
    narrow = (x * keep) @ A.T  # (…, r)
    return x @ W.T + (alpha / r * narrow) @ B.T  # (…, d)


your_turn(check.lora_forward, one_right_answer)

# %% [markdown]
# ## The code
#
# In the package a layer, `LoRALinear`, holds the frozen linear and its pairs, one pair per adapter. The source is folded: open it when
# you have your own version. `add` makes a new pair, with $A$ random and $B$ zero; `merge` is one of the exercises. The lines about
# `magnitude` and `start` belong to two variants, DoRA and PiSSA: pass over them for now. In the course
# model, with 128 channels and only 2 heads for keys and values, the shapes are
#
# | layer | $W_0$ $(d, k)$ | $A$ $(r, k)$ | $B$ $(d, r)$ | trained at $r=4$ | share of $W_0$ |
# |---|---|---|---|---|---|
# | `q_proj`, `o_proj` | 128 × 128 | 4 × 128 | 128 × 4 | 1,024 | 6.3% |
# | `k_proj`, `v_proj` | 64 × 128 | 4 × 128 | 64 × 4 | 768 | 9.4% |
# | `gate_proj`, `up_proj` | 384 × 128 | 4 × 128 | 384 × 4 | 2,048 | 4.2% |
# | `down_proj` | 128 × 384 | 4 × 384 | 128 × 4 | 2,048 | 4.2% |
#
# A small model has a large share: $r(k+d)$ grows with the width, $kd$ with its square.

# %% tags=["hide-output"]
show(
    lora.LoRALinear.add,
    lora.low_rank,
    lora.LoRALinear.change,
    lora.LoRALinear.forward,
    lora.delta_weight,
    lora.LoRALinear.merge,
)

# %% [markdown]
# ## Against the library
#
# At work you would use `peft`. `lora.apply` finds the layers by the endings of their names, freezes the model, and puts a pair beside
# each. First: does a fresh adapter change nothing? Then ours writes a folder, `peft` reads it, and both must compute the same. Last,
# merging: the same function, with nothing left to slow it down. To unmerge, our code puts the old tensor back, since subtracting
# $\Delta W$ would not give back the same bits.
#
# <details><summary>For the curious: the gradients, and the way back</summary>
#
# The second, folded cell compares the gradients of all 56 thin matrices. Then `peft` writes a file, and we read it onto `transformers`' own Llama.
#
# </details>

# %%
import peft
from transformers import LlamaForCausalLM
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
logging.disable_progress_bar()

tokenizer = course_model.load_tokenizer()
prompt = torch.tensor([tokenizer.encode("And the whale said unto the people").ids])
model = course_model.load()
plain = model(prompt)
lora.apply(model, LoRAConfig(r=4, alpha=8, target_modules="all-linear"))
compare(model(prompt), plain, what="logits with a fresh adapter", tol=0)

torch.manual_seed(0)
for name, p in model.named_parameters():
    if "lora_B" in name:  # a B that has learned something
        torch.nn.init.normal_(p, std=0.01)
folder = tempfile.mkdtemp()
files.save(model, f"{folder}/ours")
base_of_theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL)
theirs = peft.PeftModel.from_pretrained(
    base_of_theirs, f"{folder}/ours", is_trainable=True
)
beside = model(prompt)
compare(beside, theirs(prompt).logits, what="logits, ours in peft", tol=1e-4)

lora.merge(model)
compare(model(prompt), beside, what="logits, merged against unmerged", tol=1e-4)
lora.unmerge(model)
compare(model(prompt), beside, what="logits, unmerged", tol=0)

# %% tags=["hide-cell"]
pretraining.next_token_loss(model(prompt), prompt).backward()
theirs(prompt, labels=prompt).loss.backward()


def gradients(model):
    """The gradients of all that trains, in the order of the names."""
    parts = sorted(model.named_parameters())
    return torch.cat([p.grad.flatten() for _, p in parts if p.grad is not None])


compare(gradients(model), gradients(theirs), what="gradients of every A and B")
compare(
    walk.trainable(model),
    theirs.get_nb_trainable_parameters(),
    what="parameters (trained, all)",
    tol=0,
)
theirs.save_pretrained(f"{folder}/theirs")
returned = files.load(
    LlamaForCausalLM.from_pretrained(course_model.MODEL), f"{folder}/theirs"
)
compare(
    returned(prompt).logits,
    model(prompt),
    what="logits, peft's file in our code",
    tol=1e-4,
)
lora.remove(model)
compare(model(prompt), plain, what="logits after removing", tol=0)

# %% [markdown]
# ## The experiment
#
# The course model has read the State of the Union addresses and *Moby-Dick*. It has never seen the Bible. We teach it 20 steps of the
# King James Bible: once with all 28 linears trained in full, then with pairs of four ranks. Batches and their order are the same. In
# all runs the embedding and the norms stay frozen. Each side gets its own learning rate, found in a search by factors of two: 0.003 in
# full, 0.02 with LoRA. One rate for both would favour one side.
#
# First, what did full fine-tuning do to the weights? The *length* of a change $\Delta W$ is the root of the sum of all its squared
# entries. Its *singular values* say how much of that length lies in the strongest direction, in the second, and so on. A random matrix of
# the same shape shows what chance would give.


# %%
def encode(text):
    return torch.tensor(tokenizer.encode(text).ids)


bible = encode(course_model.corpus("bible")[:400_000])
new = encode(course_model.corpus("bible", "valid")[:60_000])
old = encode(course_model.corpus("addresses", "valid")[:60_000])


def loss_on(model, text):
    return pretraining.evaluate(model, text, context=128, windows=16, batch=8)


def teach(rank, rate):
    """The course model after 20 steps of the Bible. Rank "full" trains all linears."""
    recipe = pretraining.Recipe(
        20, batch=4, context=128, peak_lr=rate, warmup=4, weight_decay=0.0
    )
    torch.manual_seed(0)
    model = course_model.load().requires_grad_(False)
    if rank == "full":
        for layer in walk.find(model, "all-linear").values():
            layer.requires_grad_(True)
    else:
        config = LoRAConfig(r=rank, alpha=2 * rank, target_modules="all-linear")
        lora.apply(model, config, "bible")
    optimizer = pretraining.make_optimizer(model, recipe)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = pretraining.learning_rate(step, recipe)
        batch = pretraining.sample_batch(bible, recipe, step)
        pretraining.training_step(model, optimizer, batch, recipe.clip)
    return model


base = course_model.load()
full = teach("full", 3e-3)

# %% tags=["hide-input", "numbers-within-5%"]
linears = walk.find(base, "all-linear")
delta = {}
for name, layer in linears.items():
    delta[name] = (full.get_submodule(name).weight - layer.weight).detach()
svd = {name: torch.linalg.svd(d, full_matrices=False) for name, d in delta.items()}
random = {n: torch.linalg.svdvals(torch.randn_like(d)) for n, d in delta.items()}


def energy(spectra, r):
    """The share of the squared length in the first r directions, a mean over layers."""
    shares = [S[:r].square().sum() / S.square().sum() for S in spectra]
    return torch.stack(shares).mean().item()


spectra = {name: S for name, (_, S, _) in svd.items()}
top4 = energy(spectra.values(), 4)
chance = energy(random.values(), 4)
print(f"four directions of up to 128 hold {top4:.0%} of ΔW², by chance {chance:.0%}")

fig, ax = plt.subplots()
for name, S in random.items():
    D = spectra[name]
    ax.plot(range(1, 65), S[:64] / S.norm(), color="#b8bcc2", linewidth=0.8)
    ax.plot(range(1, 65), D[:64] / D.norm(), color="#0072b2", linewidth=0.8, alpha=0.6)
ax.set(
    xscale="log",
    xlabel="singular value, largest first",
    ylabel="share of the length of ΔW",
)
ax.set_title("28 changes against 28 random matrices")
ax.set_xticks([1, 2, 4, 8, 16, 32, 64], labels=["1", "2", "4", "8", "16", "32", "64"])
ax.minorticks_off()
ax.annotate("fine-tuning", (1.6, 0.42), color="#0072b2")
ax.annotate("random", (1.05, 0.08), color="#6b7078")
figure(
    fig,
    alt=(
        "Singular values of 28 weight changes fall steeply: the first four hold"
        f" {top4:.0%} of the squared length, against {chance:.0%} in a random matrix of"
        " the same shape."
    ),
)
assert top4 > 2 * chance

# %% [markdown]
# The hope was that the change has low rank. **It has not.** Four directions hold three times what chance would give them, yet two
# thirds of the squared length lie outside them.
#
# But we do not pay for length. We pay for loss. So ask two things at each rank $r$. **Cut:** keep only the $r$ strongest directions of
# every full change; how much of the gain is left? **LoRA:** how much does it gain if it trains at rank $r$ from the start? At
# rank 1 it trains 9,728 numbers where full fine-tuning trains 786,432: one in 81.

# %% tags=["hide-input", "numbers-within-5%"]
start = loss_on(base, new)
end = loss_on(full, new)


def gain(model):
    return (start - loss_on(model, new)) / (start - end)


ranks = [1, 2, 4, 8]
adapted = {r: teach(r, 2e-2) for r in ranks}
lora_gain = {r: gain(adapted[r]) for r in ranks}


def cut(rank):
    """The base plus the strongest `rank` directions of each full change."""
    model = course_model.load()
    with torch.no_grad():
        for name, layer in walk.find(model, "all-linear").items():
            U, S, Vh = svd[name]
            layer.weight += U[:, :rank] * S[:rank] @ Vh[:rank]
    return model


cut_gain = {r: gain(cut(r)) for r in ranks}
length = {r: energy(spectra.values(), r) for r in ranks}

# %% tags=["hide-cell", "numbers-within-5%"]
gain_guess.settle(100 * lora_gain[1], digits=2)

# %% tags=["hide-input", "numbers-within-5%"]
fig, ax = plt.subplots(figsize=(4.8, 3.8))
ax.axhline(1, color="#22262b", linewidth=1)
ax.text(8, 1.02, "full fine-tuning", ha="right", va="bottom")
for share, label, style in [
    (lora_gain, "LoRA at rank r: gain", "o-"),
    (cut_gain, "full ΔW, cut to rank r: gain", "s-"),
    (length, "full ΔW, cut to rank r: length²", "^--"),
]:
    ax.plot(ranks, [share[r] for r in ranks], style, label=label)
ax.set(xscale="log", xlabel="rank r", ylabel="share of full fine-tuning", ylim=(0, 1.7))
ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
ax.legend(loc="upper left")
ax.set_xticks(ranks, labels=ranks)
ax.minorticks_off()
ax.set_title("What a rank buys")
told = "; ".join(
    f"rank {r}: length² {length[r]:.0%}, cut {cut_gain[r]:.0%}, LoRA {lora_gain[r]:.0%}"
    for r in ranks
)
figure(fig, alt=f"Share of full fine-tuning on the Bible. {told}.")
print(f"at rank 4: length² {length[4]:.0%}, gain {cut_gain[4]:.0%} when cut, ", end="")
print(f"{lora_gain[4]:.0%} with LoRA")
assert lora_gain[1] > cut_gain[1] + 0.1 and lora_gain[4] > cut_gain[4] + 0.05
assert cut_gain[4] > 1.5 * length[4]

# %% [markdown]
# Read the curves from the bottom, at rank 4. A third of the squared length is left, but about 70% of the gain: the strong directions are the
# useful ones. And LoRA gains more than the cut. It does not imitate the full change; it finds another one inside its few directions.
#
# We repeated this with four seeds (other batches, another $A$). At rank 4 the cut kept 68–72% and LoRA reached 82–87%. At rank 1 it
# was 33–47% against 68–70%. So the order is no accident.
#
# **For the curious.** Does LoRA forget less? Where should the rank go? Is it as good as full fine-tuning, and at which rate? Is a
# variant better? The three folded cells measure it, the last two from runs that are stored with the package.
#
# <details><summary>For the curious: forgetting, and where the rank should go</summary>
#
# A model that learns the Bible unlearns the addresses. [Biderman et al. 2024](https://arxiv.org/abs/2405.09673 "biderman2024lora")
# put their finding at 7B into the title: "LoRA Learns Less and Forgets Less". The first table has one more row, full
# fine-tuning at half its rate. That row learns more than every LoRA here and forgets less than ranks 2, 4 and 8 (with three seeds
# out of three). So turn the rate down before you change the method.
#
# The second table sorts the full changes by kind of layer. All kinds move by about the same share, and each puts about three times as
# much into four directions as chance would. That speaks for a small rank on every linear, and against a large one on a few. The
# paper's table 5 agrees, with 18 million trained numbers in each row: $r = 8$ on $W_q$ alone reached 70.4% on WikiSQL, $r = 4$ on $W_q$
# and $W_v$ 73.7%.
#
# </details>
#
# <details><summary>For the curious: "LoRA Without Regret", claim by claim</summary>
#
# [Schulman et al. 2025](https://thinkingmachines.ai/blog/lora/ "schulman2025regret") trained Llama and Qwen models in full and with LoRA,
# each at its own best rate. They found that LoRA keeps up as long as its capacity suffices, and that low ranks leave the common
# curve first; that its best rate is about ten times that of full fine-tuning (fifteen in short runs), whatever the rank; and that
# adapters on the attention alone are worse than on the MLP alone, to which attention then adds nothing.
#
# We ran it on our model with their settings: a constant rate, $\alpha = 32$ at every rank, three seeds. `±` is half the distance
# between the best and the worst seed, of differences with the same batches. Their order of the ranks is here, and so is what they say of
# attention, with 43,008 numbers trained on either side. Two things are not. After 20 steps rank 16 is level with full fine-tuning, but
# after 160 even rank 64, which trains four fifths as many numbers, is behind by more than the seeds differ. And the
# best rate is only 2 to 4 times as high. One rate for all ranks from 1 to 64 does hold, to a factor of two. (The figure shows the text by
# which the rate is chosen; on that of the table the best rates are lower still.) Ours is a model of 1.3 million parameters, so take from
# it: expect LoRA's rate to be the higher one, and search for it.
#
# </details>
#
# <details><summary>For the curious: rsLoRA, PiSSA, OLoRA and DoRA</summary>
#
# Four later methods change the scale or the start. rsLoRA multiplies by $\alpha/\sqrt{r}$.
# PiSSA ([Meng et al. 2024](https://arxiv.org/abs/2404.02948 "meng2024pissa")) starts $BA$ at the strongest directions of $W_0$, and
# OLoRA ([Büyükakyüz 2024](https://arxiv.org/abs/2406.01775 "buyukakyuz2024olora")) at the first ones of its QR decomposition; both take them
# out of the base. DoRA ([Liu et al. 2024](https://arxiv.org/abs/2402.09353 "liu2024dora")) trains the length of each row apart from its
# direction. `LoRAConfig` has all of them. Rank 8, the same batches, each at its own best rate:
#
# The curves have one shape and one depth: their lowest points lie within 0.03 nats. What differs is where they lie. A larger scale or start
# learns as fast at a smaller rate, so whoever compares at one rate finds a winner and has measured the rate. rsLoRA and OLoRA come
# out 0.04 behind LoRA in the table, in every seed, because the rate was chosen on other text; at half that rate they are level. Only DoRA
# does better in all of its six seeds, by 0.008 nats, with 7% more numbers and a slower step.
#
# </details>

# %% tags=["hide-cell", "nbval-ignore-output"]
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mean(values):
    return sum(values) / len(values)


def distance(model):
    """How far the weights moved: the mean over layers of |ΔW| / |W₀|."""
    with_adapter = bool(lora.adapters(model))
    if with_adapter:
        lora.merge(model)
    moved = []
    for name, layer in walk.find(model, "all-linear").items():
        W0 = linears[name].weight
        moved.append(((walk.base_of(layer).weight - W0).norm() / W0.norm()).item())
    if with_adapter:
        lora.unmerge(model)
    return mean(moved)


gentle = teach("full", 1.5e-3)
runs = {"full": full, "full, rate / 2": gentle}
learned = {"full": start - end, "full, rate / 2": start - loss_on(gentle, new)}
for r in ranks:
    runs[f"r = {r}"] = adapted[r]
    learned[f"r = {r}"] = lora_gain[r] * (start - end)
known = loss_on(base, old)
forgot = {name: loss_on(m, old) - known for name, m in runs.items()}
print("run              trained  learned  forgot   moved")
for name, m in runs.items():
    print(
        f"{name:14}{walk.trainable(m)[0]:>10,}{learned[name]:>9.2f}"
        f"{forgot[name]:>8.2f}{distance(m):>8.0%}"
    )
assert max(learned, key=learned.get) == "full"
assert learned["full, rate / 2"] > learned["r = 8"]
assert forgot["full, rate / 2"] < forgot["r = 2"]

print("\nfull fine-tuning   moved   in 4 directions   by chance")
for kind in KINDS:
    its = [name for name in delta if name.endswith(kind)]
    moved = mean([(delta[n].norm() / linears[n].weight.norm()).item() for n in its])
    held = energy([spectra[n] for n in its], 4)
    by_chance = energy([random[n] for n in its], 4)
    print(f"{kind:16}{moved:>8.0%}{held:>18.0%}{by_chance:>12.0%}")

# %% tags=["hide-cell", "numbers-within-5%"]
import json
from importlib import resources
from itertools import pairwise


def stored(name):
    """Runs of `scripts/lora_regret.py`, with what made them."""
    file = resources.files("llmlab.peft") / "data" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def by_rate(study, method, part, steps):
    """rate → the losses of all seeds after `steps`."""
    k = study["steps"].index(steps)
    found = {}
    for run in study["runs"]:
        if run["method"] == method:
            found.setdefault(run["rate"], []).append(run[part][k])
    return dict(sorted(found.items()))


def best_rate(study, method, steps):
    """The rate with the least mean loss on text that is not what is told."""
    dev = by_rate(study, method, "dev", steps)
    return min(dev, key=lambda rate: mean(dev[rate]))


def told(study, method, steps):
    return by_rate(study, method, "test", steps)[best_rate(study, method, steps)]


def behind(method, other, steps):
    """How much more loss a method has, seed by seed: the mean, and the spread."""
    pairs = zip(told(regret, method, steps), told(regret, other, steps), strict=True)
    gaps = [a - b for a, b in pairs]
    return mean(gaps), max(gaps) - min(gaps)


regret = stored("regret")
runs = len(regret["runs"])
print(f"{runs} runs, {regret['command']}, {regret['date']}, {regret['versions']}")
RANKS = {1: "r=1", 4: "r=4", 16: "r=16", 64: "r=64"}
short, long = 20, 160
ratios = {}
for steps in (short, long):
    in_full = best_rate(regret, "full", steps)
    rates = {r: best_rate(regret, name, steps) for r, name in RANKS.items()}
    ratios[steps] = {r: rate / in_full for r, rate in rates.items()}
    print(f"\nafter {steps} steps    best rate   loss (3 seeds)       behind full")
    for name in ("full", *RANKS.values()):
        losses = sorted(told(regret, name, steps))
        gap, spread = behind(name, "full", steps)
        rate = best_rate(regret, name, steps)
        print(
            f"{name:<18}{rate:<12g}{losses[0]:.2f} to {losses[-1]:.2f}"
            f"{gap:>14.2f} ± {spread / 2:.2f}"
        )


def gap(method, other, steps):
    """What a method loses against another, seed by seed, and whether that is clear."""
    middle, spread = behind(method, other, steps)
    return f"{middle:+.2f} ± {spread / 2:.2f}", middle > spread


late = [mean(told(regret, name, long)) for name in RANKS.values()]
in_order = all(low > high for low, high in pairwise(late))
high_rank, is_behind = gap("r=64", "full", long)
attention, is_worse = gap("attention, r=12", "MLP, r=7", long)
mlp, mlp_is_worse = gap("MLP, r=7", "r=4", long)
short_ratios, long_ratios = ratios[short].values(), ratios[long].values()
fixed = max(long_ratios) / min(long_ratios) <= 2
every_ratio = [*short_ratios, *long_ratios]
ratio = f"{min(every_ratio):g} to {max(every_ratio):g}"
near_10 = min(every_ratio) > 5
rows = [
    ("low ranks fall behind first", "yes", "yes" if in_order else "no", in_order),
    ("high rank keeps up with full", "yes", high_rank, not is_behind),
    ("best rate, times that of full", "10 (short: 15)", ratio, near_10),
    ("the same rate for every rank", "yes", "within 2" if fixed else "no", fixed),
    ("attention alone, less MLP alone", "worse", attention, is_worse),
    ("MLP alone, less all (r=4)", "0", mlp, not mlp_is_worse),
]
print(f"\n{'claim':<34}{'theirs':<16}{'ours':<16}same?")
for claim, theirs, ours, same in rows:
    print(f"{claim:<34}{theirs:<16}{ours:<16}{'yes' if same else 'no'}")

# one of them again, its first ten steps
tokens = encode(course_model.corpus("bible")[:1_600_000])
held_out = encode(course_model.corpus("bible", "valid"))
recipe = pretraining.Recipe(
    10, batch=4, context=128, peak_lr=0.004, warmup=0, final_lr=1.0, weight_decay=0.0
)
torch.manual_seed(0)
again = course_model.load()
lora.apply(again, LoRAConfig(r=16, alpha=32, target_modules="all-linear"))
optimizer = pretraining.make_optimizer(again, recipe)
for step in range(recipe.steps):
    batch = pretraining.sample_batch(tokens, recipe, step)
    pretraining.training_step(again, optimizer, batch, recipe.clip)
second_half = held_out[len(held_out) // 2 :]
now = pretraining.evaluate(again, second_half, context=128, windows=32)
then = by_rate(regret, "r=16", "test", 10)[0.004][0]
compare(
    torch.tensor(now),
    torch.tensor(then),
    what="r=16, ten steps, now and then",
    tol=0.02,
)

fig, ax = plt.subplots(figsize=(4.8, 3.4))
for name in ("full", *RANKS.values()):
    losses = by_rate(regret, name, "dev", long)  # the rate is chosen by these
    line = ax.plot(
        list(losses), [mean(x) for x in losses.values()], "o-", ms=4, label=name
    )
    ax.fill_between(
        list(losses),
        [min(x) for x in losses.values()],
        [max(x) for x in losses.values()],
        color=line[0].get_color(),
        alpha=0.25,
    )
ax.set(xscale="log", ylim=(3.0, 4.0), xlabel="rate", ylabel=f"loss after {long} steps")
ax.legend()
told_rates = ", ".join(
    f"{name} {best_rate(regret, name, long):g}" for name in ("full", *RANKS.values())
)
figure(
    fig,
    alt=(
        "Held-out loss against the rate: five curves, each with a minimum. The higher"
        f" the rank, the lower the curve, and full fine-tuning is lowest. Best rates:"
        f" {told_rates}."
    ),
)

# %% tags=["hide-cell"]
variants = stored("variants")
print(f"{len(variants['runs'])} runs, {variants['command']}, {variants['date']}")


def at_best(name, steps):
    """The loss of each seed, at the rate that is best with the first three."""
    dev = by_rate(variants, name, "dev", steps)
    rate = min(dev, key=lambda rate: mean(dev[rate][:3]))
    return rate, by_rate(variants, name, "test", steps)[rate]


print("                  best rate    loss, less that of LoRA with the same seed")
for steps in variants["steps"]:
    _, of_lora = at_best("LoRA", steps)
    for name in variants["trained"]:
        rate, losses = at_best(name, steps)
        # some rates have six seeds, the others three
        gaps = [a - b for a, b in zip(losses, of_lora, strict=False)]
        print(
            f"{steps} steps  {name:<8} {rate:<10g}{mean(gaps):>+8.3f}"
            f"   from {min(gaps):+.3f} to {max(gaps):+.3f} in {len(gaps)} seeds"
        )

fig, ax = plt.subplots(figsize=(4.8, 3.4))
lowest = {}
for name in variants["trained"]:
    losses = by_rate(variants, name, "dev", 80)  # the rate is chosen by these
    middle = [mean(x[:3]) for x in losses.values()]
    lowest[name] = min(middle)
    line = ax.plot(list(losses), middle, "o-", ms=4, label=name)
    ax.fill_between(
        list(losses),
        [min(x[:3]) for x in losses.values()],
        [max(x[:3]) for x in losses.values()],
        color=line[0].get_color(),
        alpha=0.2,
    )
ax.set(xscale="log", ylim=(3.3, 3.7), xlabel="rate", ylabel="loss after 80 steps")
ax.set_title("Five ways to begin, rank 8")
ax.legend()
minima = ", ".join(f"{name} {loss:.2f}" for name, loss in lowest.items())
figure(
    fig,
    alt=(
        "Held-out loss after 80 steps against the rate, with the spread of three seeds:"
        " five curves of one shape. PiSSA's, OLoRA's and rsLoRA's lie to the left, at"
        f" smaller rates. Their lowest points: {minima}."
    ),
)

# %% [markdown]
# ## Play
#
# An adapter has a volume knob. Multiply its $\Delta W$ by $w$: at 0 you have the old model, at 1 the one that was trained, and you may go
# on. The slider turns the knob of the rank 8 adapter. Watch both losses, and read what the model writes.
# Is 1 the best place?

# %% tags=["hide-input", "nbval-ignore-output"]
mixed = adapted[8]
WEIGHTS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
opening = torch.tensor([tokenizer.encode("And the people of the land").ids])
written = {}
curve = {}
for w in WEIGHTS:
    files.combine(mixed, {"bible": w}, "mix")
    tokens = generate(mixed, opening, 36, temperature=0.7, top_k=40, seed=3)[0]
    written[w] = " ".join(tokenizer.decode(tokens.tolist()).split())
    curve[w] = (loss_on(mixed, new), loss_on(mixed, old))
    lora.remove(mixed, "mix")
lora.set_adapter(mixed, "bible")
best = min(WEIGHTS, key=lambda w: sum(curve[w]))


def draw(weight):
    fig, (ax, page) = plt.subplots(2, 1, figsize=(4.8, 4.4), height_ratios=[1.6, 1])
    for i, name in enumerate(["Bible", "addresses"]):
        ax.plot(WEIGHTS, [curve[w][i] for w in WEIGHTS], label=name)
        ax.plot(weight, curve[weight][i], "o", color=f"C{i}", markersize=10)
    ax.set(xlabel="weight of the Bible adapter", ylabel="loss")
    both = sum(curve[weight])
    ax.set_title(f"{curve[weight][0]:.2f} + {curve[weight][1]:.2f} = {both:.2f}")
    ax.legend()
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
    title="From senator to prophet",
    alt=lambda weight: (
        f"Weight {weight}: loss {curve[weight][0]:.2f} on the Bible,"
        f" {curve[weight][1]:.2f} on addresses. It writes: {written[weight]}"
    ),
    challenge="At which weight are the two losses together smallest?",
    missing=lambda weight: (
        f"{sum(curve[weight]):.2f} together, and less is possible."
        if weight != best
        else ""
    ),
    start={"weight": 1.0},
    weight=WEIGHTS,
)

# %% tags=["hide-output", "numbers-within-5%"]
for w in (best, 1.0):
    learned = curve[0.0][0] - curve[w][0]
    forgot = curve[w][1] - curve[0.0][1]
    print(f"weight {w:g}: learned {learned:.2f} nats, forgot {forgot:.2f} nats")

# %% [markdown]
# The run went too far. Turned down, the adapter knows the Bible about as well and forgets far less (so it was with three seeds out of
# three). A finished adapter can still be corrected, and the old model is never lost: it lies under the adapter.
#
# ## At scale
#
# That is also why one base can serve many customers. Below, three requests travel in one batch: the first asks for the plain model,
# the second for the Bible adapter, the third for half of it. The frozen weights are read once for all three, and each row adds its
# own thin path. Merged weights could not do this: they would be three models.
#
# GPT-3, the paper's largest model, has 96 layers of width 12,288. A rank $r$ on $n$ square matrices per layer trains
# $96 \cdot n \cdot r \cdot 2 \cdot 12{,}288$ numbers. With eight GPUs, each holds the frozen model and reads its own batches: only the
# gradients of $A$ and $B$ travel. To run it on one GPU or on eight, with any Llama-shaped checkpoint and any text file:
#
# ```
# python -m llmlab.peft.examples.lora_text \
#     --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# torchrun --nproc-per-node 8 -m llmlab.peft.examples.lora_text \
#     --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# ```
#
# LoRA saves less time than memory. Of the three large products per weight (the output, the gradient of the input, the gradient of the
# weight) only the last is left out. For GPT-3 the paper measured 43.1 tokens per second and GPU, against 32.5 in full (section 4.2,
# footnote 5).
#
# **For the curious.** The folded cell counts again what the paper's tables count.
#
# <details><summary>For the curious: where the paper's counts differ</summary>
#
# Table 15 cuts 18.87 and 301.99 off after one digit. Section D.4 says that $r = 2$ on four matrices trains 37.7 M, table 15 says that
# $r = 4$ does; the table is right. And 1.2 TB for full fine-tuning is 6.8 bytes per parameter, less than Adam needs in any common
# setting; the paper does not say how it was counted.
#
# </details>

# %%
files.combine(mixed, {"bible": 0.5}, "blend")
with files.by_row(mixed, [None, "bible", "blend"]):
    together = mixed(prompt.expand(3, -1))
alone = [base(prompt)]
for adapter in ("bible", "blend"):
    lora.set_adapter(mixed, adapter)
    alone.append(mixed(prompt))
compare(together, torch.cat(alone), what="three models in one batch", tol=1e-4)

gpt3 = 96 * 2 * 4 * 2 * 12_288  # r = 4 on two matrices per layer
print(f"GPT-3 checkpoint: paper 35 MB, ours {2 * gpt3 / 1e6:.1f} MB")
print(f"Llama 7B, full: {2 * parameters(llama_7b) / 1e9:.1f} GB travel per step")
print(f"Llama 7B, LoRA of rank 8: {2 * trained / 1e6:.1f} MB travel per step")

# %% tags=["hide-cell"]
total = 175_255.8e6  # table 4's


def verdict(paper, ours):
    if round(ours, 1) == paper:
        return "same"
    if int(10 * ours) / 10 == paper:
        return "same, cut off"
    return "no"


for where, what, n, r, paper in [
    ("table 4", "r_q = r_v = 1", 2, 1, 4.7),
    ("table 4", "r_q = r_v = 8", 2, 8, 37.7),
    ("table 15", "r_q = r_v = 4", 2, 4, 18.8),
    ("table 15", "r_q = r_k = r_v = r_o = 4", 4, 4, 37.7),
    ("section D.4", "r_q = r_k = r_v = r_o = 2", 4, 2, 37.7),
    ("table 15", "r_q = r_v = 64", 2, 64, 301.9),
]:
    ours = 96 * n * r * 2 * 12_288 / 1e6
    print(
        f"{where:12} {what:26} paper {paper:>6} M   ours {ours:>7.2f} M  "
        f" {verdict(paper, ours)}"
    )
lora_memory = (2 * total + 16 * gpt3) / 1e9
print(f"memory to train LoRA:  paper 350 GB, ours {lora_memory:.0f} GB")
print(f"memory to train fully: paper 1.2 TB, ours {16 * total / 1e12:.1f} TB")

# %% [markdown]
# ## What to keep
#
# Rank 8 on two matrices per layer trains 0.06% of a 7B model and brings 108 GB down to 13.5, before activations. The key function:
#
# ```python
# def lora_forward(x, W, A, B, alpha):
#     r = A.shape[0]
#     narrow = x @ A.T * (alpha / r)  # (…, r)
#     return x @ W.T + narrow @ B.T   # W is frozen; B starts at zero
# ```
#
# **Use it when**
#
# - gradients and Adam's averages do not fit, but the model does;
# - many tasks or customers share one model: each is a file of megabytes, and one batch can mix them;
# - you want the option to turn the change down or take it off again.
#
# **Not when**
#
# - the frozen weights alone do not fit: then [QLoRA](07-qlora.ipynb) holds them in 4 bits;
# - there is much to learn. On code and mathematics, Biderman et al. found that LoRA at usual ranks learned less than full
#   fine-tuning, whose changes had 10 to 100 times the rank of a usual adapter. Raise the rank, or train in full;
# - you only want to forget less: try a lower learning rate first.
#
# <details><summary>Why does B start at zero, and A not?</summary>
#
# With $B = 0$ the change is zero, and training starts from the pretrained model itself. The gradient of $B$ contains $A x$, and the
# gradient of $A$ contains $B$. So with both at zero, neither would ever move.
#
# </details>
#
# <details><summary>When do you merge an adapter, and when not?</summary>
#
# Merge it when one model serves one task: it then costs nothing at all. Leave it beside the weight when requests for several adapters share
# a batch, or when it will be trained on.
#
# </details>
#
# <details><summary>The full change is not of low rank. Why is rank 4 enough for most of the gain?</summary>
#
# The few strong directions carry most of the gain, though only a third of the squared length. And LoRA does not have to copy the full
# change: it searches for the best one that its rank allows.
#
# </details>
#
# Now write it for points: [Exercises](../../work/04-peft/05-lora.ipynb), four of them, 10 points. Next:
# [AdaLoRA](06-adalora.ipynb) asks which matrix should get how much of the rank.
#
# References: the paper, [Hu et al. 2021](https://arxiv.org/abs/2106.09685 "hu2021lora"); the scale $\alpha/\sqrt{r}$ for large
# ranks, [Kalajdzievski 2023](https://arxiv.org/abs/2312.03732 "kalajdzievski2023rslora"); thousands of adapters on one
# server, [Sheng et al. 2023](https://arxiv.org/abs/2311.03285 "sheng2023slora"); what LoRA forgets,
# [Biderman et al. 2024](https://arxiv.org/abs/2405.09673 "biderman2024lora").
