# %% [markdown]
# # Prompt and prefix tuning: words that are not words
#
# A frozen model can be steered by what stands before its input. This page trains what stands there: first a handful of
# embeddings that no word has (prompt tuning), then a handful of keys and values in every layer (prefix tuning), and
# finds out which of the two gives more for each number that you keep.

# %%
import tempfile
import textwrap

import torch

from llmlab.course import compare, explore, figure, plt, predict, show
from llmlab.models import course_model
from llmlab.models.accounting import forward_flops, kv_cache_bytes
from llmlab.models.generation import generate
from llmlab.models.presets import preset
from llmlab.peft import walk
from llmlab.peft.prompt_and_prefix_tuning import (
    PrefixTuningConfig,
    PromptTuningConfig,
    prefix_tuning,
    prefixes,
    prompt_tuning,
    virtual_tokens,
)
from llmlab.training import pretraining

# %% [markdown]
# ## What it costs
#
# The usual way to bend a model to a task without training it is a long prompt: instructions, then examples. It is
# paid for on every request, in arithmetic and in cache memory. Take 1,000 tokens of instructions before each request
# to a 7B model, and compare them with 20.

# %%
llama_7b = preset("llama-7b")
for tokens in (1000, 20):
    flops, memory = (
        forward_flops(llama_7b, 1, tokens, logits=0),
        kv_cache_bytes(llama_7b, 1, tokens),
    )
    print(
        f"{tokens:>5} tokens before each request: {flops / 1e12:>6.2f} TFLOP and"
        f" {memory / 1e6:>5.0f} MB of cache"
    )
million = 1e6 * forward_flops(llama_7b, 1, 1000, logits=0) / (0.4 * 312e12) / 3600
print(
    f"a million requests with the long one: {million:.0f} hours of an A100 at 40% of"
    " its 312 TFLOP/s"
)

# %% [markdown]
# A server can compute a fixed prompt once and keep its keys and values; the memory stays. But why should the best
# 20 tokens be *words*? A model never sees words. It sees vectors, and words are 32,000 points in a space that is
# otherwise empty. Gradient descent can look for vectors anywhere.

# %% [markdown]
# ## Predict
#
# Prompt tuning trains the *embeddings* of 20 virtual tokens. Prefix tuning trains the *keys and values* that 20 virtual
# tokens have in each of the 32 layers. How many times more numbers is that? On Llama 3 8B, 32 query heads share 8 heads of keys
# and values.

# %%
guesses = {
    "llama-7b": predict("On Llama 7B, how many times more numbers?", unit="times"),
    "llama-3-8b": predict("On Llama 3 8B, how many times more?", unit="times"),
}

# %% tags=["hide-output"]
for name in ("llama-7b", "llama-3-8b"):
    with torch.device("meta"):  # shapes without memory
        big = torch.nn.Module()
        big.config = preset(name)
    prompt = prompt_tuning.num_parameters(big, PromptTuningConfig(20))
    prefix = prefix_tuning.num_parameters(big, PrefixTuningConfig(20, projection=False))
    print(f"{name:11} prompt {prompt:>7,}   prefix {prefix:>9,}")
    guesses[name].settle(prefix / prompt)

# %% [markdown]
# A key and a value for each of 32 layers make 64. Under grouped-query attention both are a quarter as wide, which
# leaves 16. A fair comparison therefore counts numbers, not tokens, and so will ours.

# %% [markdown]
# ## The idea
#
# Here is what attention sees in each layer, with three virtual tokens before five real ones. Orange is trained, blue is
# what the frozen model computes from it, grey is the input and what becomes of it.

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.7), sharey=True)
for ax, title, deep in zip(
    axes, ["prompt tuning", "prefix tuning"], [False, True], strict=True
):
    for layer in range(5):
        for place in range(8):
            trained = place < 3 and (layer == 0 or deep) and not (deep and layer == 0)
            empty = deep and layer == 0 and place < 3
            color = (
                "none"
                if empty
                else "#d55e00"
                if trained
                else "#a8d0e6"
                if place < 3
                else "#c9cdd2"
            )
            ax.add_patch(plt.Rectangle((place, layer), 0.86, 0.8, color=color))
    ax.set(xlim=(-0.2, 8.1), ylim=(-0.3, 5.1), title=title)
    ax.set_xticks([1.4, 5.4], labels=["virtual", "input"])
    ax.set_yticks(
        [i + 0.4 for i in range(5)],
        labels=["embedding", "layer 1", "layer 2", "layer 3", "layer 4"],
    )
    ax.tick_params(length=0)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
figure(
    fig,
    alt=(
        "Two grids of layers by positions. Prompt tuning trains three vectors at the"
        " bottom, and the layers above compute from them. Prefix tuning trains the"
        " virtual tokens' keys and values in all four layers."
    ),
)

# %% [markdown]
# **Prompt tuning** ([Lester et al. 2021](https://arxiv.org/abs/2104.08691 "lester2021power")) puts a matrix
# $P \in \mathbb{R}^{p \times d}$ before the embedded input $X$ and maximises the likelihood of the target with
# respect to $P$ alone:
#
# $$\Pr\nolimits_{\theta;\theta_P}(Y \mid [P; X])$$
#
# The blue squares above it are *computed* from $P$ by frozen layers, so $P$ must reach the top through weights
# that were never made for it. It starts as the embeddings of common words, not as noise: the layers know how to
# handle those.
#
# **Prefix tuning** ([Li and Liang 2021](https://arxiv.org/abs/2101.00190 "li2021prefix")) trains the activations
# themselves. All that attention in layer $l$ reads of an earlier token is a key and a value, so
#
# $$\begin{gathered}
# K^{(l)} \leftarrow [P_K^{(l)}; K^{(l)}], \quad V^{(l)} \leftarrow [P_V^{(l)}; V^{(l)}], \\
# P = \mathrm{MLP}(P')
# \end{gathered}$$
#
# Three details are easy to get wrong.
#
# - **Widths.** Keys and values have the width of the key/value heads, which under GQA is not the model's.
# - **Positions and masks.** Virtual tokens take positions $0 \dots p-1$ and the input starts at $p$. A padding mask must grow
#   by $p$ ones, at the left, also when the batch is padded there.
# - **The network is a scaffold.** The authors found $P$ hard to train directly and made it with a small MLP from a smaller
#   $P'$. After training, run the MLP once, keep $P$ and throw the MLP away: same output, to the bit.

# %% [markdown]
# ## The code
#
# Shallow tokens are one `cat`. Deep ones need their vectors cut into layers and heads, and a cache that has them
# already: our Llama asks a cache for the keys and values of earlier tokens, and does not ask where they came from.

# %%
show(
    virtual_tokens.prepend,
    virtual_tokens.extend_mask,
    prefixes.split,
    prefixes.prefix_attention_inputs,
)

# %% [markdown]
# In the course model, with $d = 128$, $L = 4$ layers and $K = 2$ key/value heads of $D = 32$:
#
# | what | shape | numbers for one token |
# |---|---|---|
# | soft prompt $P$ | $p \times d$ | 128 |
# | prefix $P$ | $p \times 2LKD$ | 512 |
# | one layer's $P_K$, $P_V$ | $1 \times K \times p \times D$ each | 64 + 64 |
# | $P'$, before the MLP | $p \times KD$ | 64 |
#
# A test of understanding: a prefix can *be* a text. Take the keys and values that the model computes for some words, and
# use them as a prefix. Then the model must answer as if the words stood before the input. The same must hold
# for a soft prompt that starts from the words' embeddings.

# %%
tokenizer = course_model.load_tokenizer()


def ids(text):
    return torch.tensor(tokenizer.encode(text).ids)


words, prompt = (
    ids("And the LORD spake unto Moses, saying,"),
    ids(" The whale is of the people")[None],
)
model = course_model.load()
plain = model(prompt)
expected = model(torch.cat([words[None], prompt], dim=1))[:, len(words) :]
prompt_tuning.apply(
    model,
    PromptTuningConfig(len(words), init="text", init_tokens=tuple(words.tolist())),
    "soft",
)
compare(model(prompt), expected, what="logits, soft prompt = text", tol=1e-4)
prefix_tuning.apply(
    model,
    PrefixTuningConfig(
        len(words), projection=False, init="text", init_tokens=tuple(words.tolist())
    ),
    "deep",
)
compare(model(prompt), expected, what="logits, prefix = text", tol=1e-4)
virtual_tokens.remove(model)
compare(model(prompt), plain, what="logits after removing both", tol=0)

# %% [markdown]
# So every soft prompt is also a prefix: the one that the frozen layers compute from it. The reverse is false, and that is
# the whole difference between the two methods.

# %% [markdown]
# ## Against the library
#
# `peft` calls them `PromptTuningConfig` and `PrefixTuningConfig`. Its file holds one tensor, `prompt_embeddings`, so we can let
# the two sides read each other's. First ours, with a prefix that an MLP makes; `peft` gets the folded $P$.

# %%
import warnings

import peft
from transformers import LlamaForCausalLM
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
logging.disable_progress_bar()

folder = tempfile.mkdtemp()
dice = torch.Generator().manual_seed(0)
prefix_tuning.apply(model, PrefixTuningConfig(5, hidden=32), generator=dice)
prefix_tuning.save(model, f"{folder}/ours")
theirs = peft.PeftModel.from_pretrained(
    LlamaForCausalLM.from_pretrained(course_model.MODEL), f"{folder}/ours"
)
compare(
    theirs(prompt).logits, model(prompt), what="logits, our prefix in peft", tol=1e-4
)
made = model(prompt)
prefix_tuning.fold(model)
compare(model(prompt), made, what="logits, the MLP folded away", tol=0)

# %% [markdown]
# Then we compare gradients of both methods, from the same numbers on both sides, and go the way back: `peft` writes a soft prompt and we
# open it on `transformers`' own Llama. `peft` also returns logits at the virtual tokens; ours drops them, so that
# no training loop needs to know.

# %%
virtual_tokens.remove(model)
settings = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
for ours, config, their_config in [
    (prompt_tuning, PromptTuningConfig(5), peft.PromptTuningConfig(**settings)),
    (
        prefix_tuning,
        PrefixTuningConfig(5, projection=False),
        peft.PrefixTuningConfig(**settings),
    ),
]:
    theirs = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(course_model.MODEL), their_config
    )
    ours.apply(model, config, generator=dice)
    table, peers = (
        model.virtual_tokens.encoder.embedding,
        theirs.prompt_encoder["default"].embedding.weight,
    )
    peers.data.copy_(table.data)
    pretraining.next_token_loss(model(prompt), prompt).backward()
    pretraining.next_token_loss(
        theirs(prompt).logits[:, -prompt.shape[1] :], prompt
    ).backward()
    compare(
        table.grad, peers.grad, what=f"gradients, {type(config).__name__}", tol=1e-4
    )
    compare(
        walk.trainable(model),
        theirs.get_nb_trainable_parameters(),
        what="parameters (trained, all)",
        tol=0,
    )
    theirs.save_pretrained(f"{folder}/theirs")
    returned = ours.load(
        LlamaForCausalLM.from_pretrained(course_model.MODEL), f"{folder}/theirs"
    )
    compare(
        returned(prompt).logits,
        model(prompt),
        what="logits, peft's file in our code",
        tol=1e-4,
    )
    virtual_tokens.remove(model)

# %% [markdown]
# ## The experiment
#
# The course model has read presidents and *Moby-Dick*, never the Bible. We adapt it with 15 steps of the King James Bible, of
# 4 windows of 64 tokens each, and compare soft prompts and prefixes **that keep equally many numbers**: 4 virtual tokens in
# a prompt against 1 in a prefix, 16 against 4, 64 against 16. The grey line below is full fine-tuning on the same batches.
#
# Each kind has its own learning rate: the best of five, a factor of two apart, by two runs each at the middle budget, with
# other seeds and on another stretch of the Bible than the one we measure on. Prefixes start from the first words of the
# Bible, prompts from common words, as their papers advise.

# %%
bible = ids(course_model.corpus("bible")[:300_000])
held_out = ids(course_model.corpus("bible", "valid")[:60_000])
STEPS, CONTEXT = 15, 64
RATE = {
    "prompt": 5e-2,
    "prefix": 4e-1,
    "full": 1e-3,
    "prompt on the draft": 2e-1,
    "full draft": 2e-3,
}


def loss_on(model):
    return pretraining.evaluate(model, held_out, context=CONTEXT, windows=32, batch=32)


def teach(model, rate, seed=0):
    """`model` after 15 steps of the Bible; whatever may train does."""
    recipe = pretraining.Recipe(
        STEPS,
        batch=4,
        context=CONTEXT,
        peak_lr=rate,
        warmup=4,
        weight_decay=0.0,
        seed=seed,
    )
    optimizer = pretraining.make_optimizer(model, recipe)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = pretraining.learning_rate(step, recipe)
        pretraining.training_step(
            model, optimizer, pretraining.sample_batch(bible, recipe, step), recipe.clip
        )
    return model


def with_prompt(p, seed=0):
    dice = torch.Generator().manual_seed(seed)
    model = prompt_tuning.apply(
        course_model.load(), PromptTuningConfig(p), generator=dice
    )
    return teach(model, RATE["prompt"], seed)


def with_prefix(p, seed=0):
    start = PrefixTuningConfig(
        p, projection=False, init="text", init_tokens=tuple(bible[:p].tolist())
    )
    return teach(prefix_tuning.apply(course_model.load(), start), RATE["prefix"], seed)


# %%
prompts = {p: with_prompt(p) for p in (4, 16, 64)}
prompt_loss = {p * 128: loss_on(m) for p, m in prompts.items()}

# %%
prefixed = {p: with_prefix(p) for p in (1, 4, 16)}
prefix_loss = {p * 512: loss_on(m) for p, m in prefixed.items()}
base, full = (
    loss_on(course_model.load()),
    loss_on(teach(course_model.load(), RATE["full"])),
)

# %% tags=["hide-input", "nbval-ignore-output"]
middle = [
    [loss_on(make(p, seed=s)) for s in (1, 2)]
    for make, p in [(with_prompt, 16), (with_prefix, 4)]
]

fig, ax = plt.subplots(figsize=(4.8, 3.4))
for losses, label, style, others in [
    (prompt_loss, "soft prompt", "s--", middle[0]),
    (prefix_loss, "prefix", "o-", middle[1]),
]:
    (line,) = ax.plot(losses.keys(), losses.values(), style, label=label)
    ax.plot([2048] * 2, others, line.get_marker(), color=line.get_color(), alpha=0.4)
ax.axhline(base, color="#22262b", linewidth=1)
ax.text(8192, base, "the base", ha="right", va="bottom")
ax.axhline(full, color="#6b7078", linewidth=1)
ax.text(8192, full, "full fine-tuning, 1,049,728 numbers", ha="right", va="bottom")
ax.set(
    xscale="log",
    xlabel="numbers kept",
    ylabel="loss on the Bible",
    ylim=(full - 0.1, base + 0.15),
)
ax.set_xticks([512, 2048, 8192], labels=["512", "2,048", "8,192"])
ax.minorticks_off()
ax.set_title("The same numbers, one layer or all")
ax.legend(loc="center left")
figure(
    fig,
    alt=(
        "Loss on the Bible against numbers kept. At 2,048 numbers the soft prompt"
        f" reaches {prompt_loss[2048]:.2f}, the prefix {prefix_loss[2048]:.2f}; the"
        f" base has {base:.2f}, full fine-tuning {full:.2f}."
    ),
)
seeds = [[*middle[0], prompt_loss[2048]], [*middle[1], prefix_loss[2048]]]
spread = max(max(losses) - min(losses) for losses in seeds)
assert all(soft > deep for soft, deep in zip(*seeds, strict=True))
print(
    f"at 2,048 numbers: soft prompt {prompt_loss[2048]:.2f}, prefix"
    f" {prefix_loss[2048]:.2f}; over 3 seeds within {spread:.2f}"
)

# %% [markdown]
# At every budget the prefix wins, though it spends its numbers on a quarter of the tokens. The pale points are two more
# seeds at 2,048 numbers: the prefix wins with each of the three. At the other two budgets we have one seed, and at 512 the
# gap is smaller than what seeds differ by. A prefix writes into every layer; the soft prompt must send its message through
# the first.
#
# Neither comes near full fine-tuning here. The title of Lester's paper says why it need not stay so: *The Power of Scale*.
# On T5 a soft prompt trails full fine-tuning badly in small models and matches it in the largest one, of 11 billion
# parameters. We own two models of the same family, the course model and its draft of a quarter of the size. Can we see the
# beginning of that curve? Here is the share of full fine-tuning's gain that a 16-token prompt reaches on each. The draft has
# rates of its own, searched in the same way.

# %% tags=["nbval-ignore-output"]
small = loss_on(course_model.load_draft())
small_full = loss_on(teach(course_model.load_draft(), RATE["full draft"]))
small_prompts = []
for seed in (0, 1, 2):
    draft = prompt_tuning.apply(
        course_model.load_draft(),
        PromptTuningConfig(16),
        generator=torch.Generator().manual_seed(seed),
    )
    small_prompts.append(loss_on(teach(draft, RATE["prompt on the draft"], seed)))
shares = {
    "draft model,  230 thousand parameters": [
        (small - one) / (small - small_full) for one in small_prompts
    ],
    "course model, 1.05 million parameters": [
        (base - one) / (base - full) for one in seeds[0]
    ],
}
for name, share in shares.items():
    print(
        f"{name}: {sum(share) / 3:.0%} of the gain, seeds {min(share):.0%} to"
        f" {max(share):.0%}"
    )
assert max(max(share) for share in shares.values()) < 0.5

# %% [markdown]
# No. Both models reach about the same small share, and the seeds of one differ by more than the two models do. A factor of
# four in size is little on a curve that runs over a factor of more than a hundred, and both models are at least ten
# thousand times smaller than the one where it arrives. One reading of that curve is that a larger model has more of what
# you want already inside, where it needs only to be called, while a small one has to be *changed*, and no prompt changes a
# weight. This page cannot test it.

# %% [markdown]
# ## Play
#
# How much do the real tokens look at the virtual ones? Our Llama takes the attention function as an argument, so we
# can pass one that writes down the weights. Choose an adapter and read, for each layer and head, the share of attention
# that goes to virtual tokens, and below it what the model writes.


# %% tags=["hide-input", "nbval-ignore-output"]
def attention_to(model, text, p):
    """(layers, heads): the mean share of attention on the first p tokens, over the real
    ones.
    """
    shares = []

    def watching(q, k, v, mask):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(
            ~mask if mask is not None else causal(q, k), -torch.inf
        )
        weights = scores.softmax(-1)
        shares.append(weights[:, :, -text.shape[1] :, :p].sum(-1).mean((0, 2)))
        return weights @ v

    with torch.no_grad():
        model(text, attention=watching)
    return torch.stack(shares)


def causal(q, k):
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(
        1 + k.shape[2] - q.shape[2]
    )


ADAPTERS = {f"prompt of {p}": (prompts[p], p) for p in (16, 64)} | {
    f"prefix of {p}": (prefixed[p], p) for p in (4, 16)
}
window, opening = held_out[None, :96], ids("And the people of the land")[None]
looks = {name: attention_to(m, window, p) for name, (m, p) in ADAPTERS.items()}
written = {
    name: " ".join(
        tokenizer.decode(
            generate(m, opening, 30, temperature=0.7, top_k=40, seed=3)[0].tolist()
        ).split()
    )
    for name, (m, _) in ADAPTERS.items()
}


def draw(adapter):
    fig, (ax, page) = plt.subplots(2, 1, figsize=(4.8, 4.4), height_ratios=[1.5, 1])
    picture = ax.imshow(looks[adapter], vmin=0, vmax=0.7, cmap="cividis", aspect="auto")
    for layer in range(4):
        for head in range(4):
            value = looks[adapter][layer, head].item()
            ax.text(
                head,
                layer,
                f"{value:.0%}",
                ha="center",
                va="center",
                color="white" if value < 0.42 else "black",
            )
    ax.set(
        xticks=range(4),
        yticks=range(4),
        xlabel="head",
        ylabel="layer",
        title=f"attention on the {adapter}",
    )
    ax.set_xticklabels(range(1, 5))
    ax.set_yticklabels(range(1, 5))
    ax.grid(False)
    fig.colorbar(picture, ax=ax, format=lambda v, _: f"{v:.0%}")
    page.axis("off")
    page.text(
        0,
        1,
        textwrap.fill(written[adapter], 46),
        va="top",
        family="DejaVu Serif",
        transform=page.transAxes,
    )
    return fig


explore(
    draw,
    title="Who listens to tokens that are not words",
    alt=lambda adapter: (
        f"With a {adapter}, {looks[adapter].mean():.0%} of attention goes to virtual"
        f" tokens, at most {looks[adapter].max():.0%} in one head. It writes:"
        f" {written[adapter]}"
    ),
    start={"adapter": "prefix of 4"},
    adapter=list(ADAPTERS),
)

# %% [markdown]
# One more thing that words before the input allow: a batch in which each row has its own. The prompt is data, so a server
# with one frozen model can serve a hundred tasks in one batch. Nothing but `cat` is needed.

# %%
frozen = course_model.load()
mine, yours = (
    virtual_tokens.vectors_of(prompts[16].virtual_tokens.encoder),
    frozen.model.embed_tokens(bible[:16]),
)
rows = frozen.model.embed_tokens(window).expand(2, -1, -1)
mixed = frozen(
    inputs_embeds=torch.cat([torch.stack([mine, yours.detach()]), rows], dim=1)
)[:, 16:]
compare(
    mixed[0],
    prompts[16](window)[0],
    what="row 1 of the mixed batch, against its own model",
    tol=1e-4,
)
compare(
    mixed[1],
    frozen(torch.cat([bible[None, :16], window], 1))[0, 16:],
    what="row 2, likewise",
    tol=1e-4,
)

# %% [markdown]
# ## At scale
#
# Lester's table 4 lists the numbers that a soft prompt has for each size of T5 (widths 512, 768, 1,024, 2,048 and
# 4,096). Multiply them out; each row of the loop is one cell of the table.

# %%
WIDTH = {"Small": 512, "Base": 768, "Large": 1024, "XL": 2048, "XXL": 4096}


def verdict(paper, ours):
    return "same" if paper == ours else f"NOT the same: off by {abs(paper - ours):,}"


for size, p, paper in [
    ("Small", 5, 2_560),
    ("Small", 20, 10_420),
    ("Base", 100, 76_800),
    ("Large", 20, 20_480),
    ("XL", 150, 307_200),
    ("XXL", 5, 20_480),
    ("XXL", 150, 614_400),
]:
    print(
        f"T5 {size:5} p = {p:>3}   paper {paper:>7,}   ours {p * WIDTH[size]:>7,}  "
        f" {verdict(paper, p * WIDTH[size])}"
    )
alone = 11_135_336_448 - 4_096  # XXL: total with a prompt of 1, less the prompt
for p, paper in [(20, 11_135_414_272), (50, 11_137_380_352), (100, 11_135_741_952)]:
    print(
        f"T5 XXL total, p = {p:>3}   paper {paper:,}   ours {alone + 4096 * p:,}  "
        f" {verdict(paper, alone + 4096 * p)}"
    )

# %% [markdown]
# All 30 rows of the table follow from $p \cdot d$ but for three slips of the pen: 10,420 for 20 · 512, whose digits were swapped; one
# total that does not grow evenly with its neighbours; and, in its last column, 0.01907% for 102,400 of 783,252,480, which is 0.01307%.
# Next the numbers that `peft`'s documentation prints for BLOOMZ-560M
# (24 layers, width 1,024, no GQA), and the 0.1% of Li and Liang's abstract, where the question is how long a prefix that is.

# %%
bloomz = 559_214_592
for what, ours, paper in [
    ("prompt tuning, 8 tokens", 8 * 1024, (8_192, 559_222_784)),
    ("prefix tuning, 20 tokens", 20 * 2 * 24 * 1024, (983_040, 560_197_632)),
]:
    same = verdict(paper[0], ours) if bloomz + ours == paper[1] else "NOT the same"
    print(
        f"{what:25} peft {paper[0]:>7,} of {paper[1]:,}   ours {ours:>7,} of"
        f" {bloomz + ours:,}   {same}"
    )
per_token = 2 * 36 * 1280
print(
    f"GPT-2 large (774 M, 36 layers of 1,280): {per_token:,} numbers per token; 0.1% is"
    f" {774e6 * 0.001 / per_token:.0f} tokens"
)

# %% [markdown]
# To run this on a GPU, or on eight, with any Llama-shaped checkpoint and any text file (`--method` is `prompt`, `prefix`,
# `p-tuning` or `p-tuning-v2`; search the learning rate, which for soft prompts is far larger than for weights):
#
# ```
# python -m llmlab.peft.examples.virtual_text --method prompt --tokens 20 --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# torchrun --nproc-per-node 8 -m llmlab.peft.examples.virtual_text --method prefix --tokens 20 --model meta-llama/Llama-2-7b-hf --text notes.txt --out adapter
# ```
#
# The price of the small file: unlike LoRA, nothing can be merged. Each request carries its virtual tokens through every layer, and their
# keys and values stay in the cache. And one trap: to save memory, one recomputes layers instead of keeping activations, and `transformers`
# then turns its cache off, in which a prefix lives. `peft` refuses to train a prefix that way, and so do we; a soft prompt does not mind.

# %%
print(
    f"20 virtual tokens on Llama 7B: {kv_cache_bytes(llama_7b, 1, 20) / 1e6:.1f} MB of"
    " cache for each request in flight"
)

# %% [markdown]
# ## What to keep
#
# ```python
# def prompt(P, X):                                # P (p, d) before the embedded X (B, T, d)
#     return torch.cat([P.expand(len(X), -1, -1), X], dim=1)
#
# def prefix(P_K, K):                              # P_K (1, K, p, D), for V the same
#     return torch.cat([P_K.expand(len(K), -1, -1, -1), K], dim=2)
# ```
#
# A soft prompt of 20 tokens is 81,920 numbers on Llama 7B, a prefix of 20 is 64 times that (16 times on Llama 3 8B), and
# a file of either is all that a new task needs. With 2,048 numbers each, a prefix in 4 layers beats a soft prompt at the
# input with each of 3 seeds: it sets what attention reads, instead of hoping that frozen layers compute it. Soft prompts
# want scale: in the paper they matched full fine-tuning at 11 billion parameters, and on our two small models they reach
# a small share of its gain, the same on both.
#
# **Use it** when one large, frozen model serves many tasks, each row of a batch with its own tokens. **Not** on a small
# model, and not where every token counts at inference: nothing can be merged, and each request carries its virtual tokens
# through every layer.
#
# <details><summary>Why is every soft prompt also a prefix, and not the reverse?</summary>
#
# The frozen layers compute keys and values from a soft prompt, and these are a prefix. A trained prefix may hold keys and
# values that they would compute from no prompt.
#
# </details>
#
# <details><summary>What happens to the positions and to the padding mask?</summary>
#
# The virtual tokens take the positions 0 … p − 1 and the input starts at p. The mask grows by p ones at the left, also
# when the batch is padded there.
#
# </details>
#
# <details><summary>Why is a prefix 64 times as large on Llama 7B, but 16 times on Llama 3 8B?</summary>
#
# A key and a value for each of 32 layers make 64. Under grouped-query attention both are a quarter as wide.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/04-peft/02-prompt-and-prefix-tuning.ipynb), three of them, 7 points.
#
# References: [Lester et al. 2021](https://arxiv.org/abs/2104.08691 "lester2021power");
# [Li and Liang 2021](https://arxiv.org/abs/2101.00190 "li2021prefix"). The next lesson, [P-Tuning](03-p-tuning.ipynb), takes both to a labelling task.
