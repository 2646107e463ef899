# %% [markdown]
# # Expert parallelism
#
# A model with many experts computes with a few of them for each token, so most of its weights rest most of the time. Put them on
# different ranks, and the tokens must travel. You will see what the journey costs, what happens when everybody wants the same
# expert, and why a token should cross to another machine once.

# %%
import copy

import torch

from llmlab.course import compare, explore, figure, palette, plt, predict, show

# %% [markdown]
# ## What it costs
#
# DeepSeek-V3 has 671 billion parameters and uses 37 billion for a token ([DeepSeek-AI 2024](https://arxiv.org/abs/2412.19437
# "deepseek2024v3")): 58 layers with 256 experts and one that all tokens share, 3 matrices of 7168 × 2048 each, 8 experts per token.
# %%
from llmlab.parallelism.moe import expert_parameters

layers, d, f, k = 58, 7168, 2048, 8
held = expert_parameters(layers, 257, d, f)
used = expert_parameters(layers, k + 1, d, f)
wire = 2 * layers * k * d * 2  # out and home, 16 bits
print(
    f"all experts: {held / 1e9:.0f} G parameters, {held / 671e9:.0%} of the model; a"
    f" token uses {used / 1e9:.0f} G of them"
)
print(
    f"in 16 bits: {2 * held / 1e9:,.0f} GB, at least {-(-2 * held // 80e9):.0f} GPUs of"
    " 80 GB"
)
print(
    f"if every expert is on another machine, a token sends {wire / 1e6:.0f} MB in one"
    " forward pass"
)
print(
    f"at 50 GB/s: {wire / 50e9 * 1e6:.0f} µs; computing it, at 40% of 989 TFLOP/s:"
    f" {2 * 37e9 / (0.4 * 989e12) * 1e6:.0f} µs"
)

# %% [markdown]
# The weights leave no choice but to spread the experts. And then the wire is slower than the arithmetic, even if every expert had
# the same to do. It never has.

# %% [markdown]
# ## Predict
#
# 16 experts on 4 ranks, two for each token. An expert takes at most 1.25 times its fair share; who comes later is dropped. Now the
# router has favourites: the most popular expert is chosen three times as often as is fair.

# %%
dropped_guess = predict("What share of all assignments is dropped?", unit="%")
busiest_guess = predict(
    "Without a limit, how much does the busiest rank compute?", unit="fair shares"
)

# %% [markdown]
# ## The idea
#
# A router gives each token $x$ a probability for each of $E$ experts, and takes the $k$ best:
#
# $$\begin{gathered}
# P = \mathrm{softmax}(W_g x), \\
# y = \sum_{i=1}^{k} \frac{P_{e_i}}{\sum_j P_{e_j}}\, \mathrm{Expert}_{e_i}(x).
# \end{gathered}$$
#
# Rank $r$ has its own tokens and $E/p$ of the experts. An *all-to-all* brings every chosen row to its expert (**dispatch**), a
# second one brings the results home (**combine**). Below is a real run: 4 ranks, 4 tokens each, 2 experts per token. Colour is the
# rank that a token belongs to.

# %% tags=["hide-input"]
from matplotlib.patches import Rectangle

from llmlab.parallelism import World
from llmlab.parallelism.moe import ExpertParallelMoE, MoE, MoEConfig, in_order

RANKS = [palette.blue, palette.vermillion, palette.green, palette.purple]
torch.manual_seed(3)
tiny = MoE(MoEConfig(4, top_k=2), dim=8, hidden=8)
inputs = torch.randn(4, 4, 8)


def goes_to(comm):
    routing, kept = tiny.plan(inputs[comm.rank])
    # one expert a rank here
    return routing.experts.flatten()[in_order(routing, kept)].tolist()


trips = World(4).run(goes_to)
columns = {
    "tokens": [[r] * 4 for r in range(4)],
    "at the experts": [
        [s for s in range(4) for e in trips[s] if e == r] for r in range(4)
    ],
    "home again": [[r] * 4 for r in range(4)],
}
fig, ax = plt.subplots(figsize=(4.8, 2.5))
left = 0.0
for name, rows in columns.items():
    widest = max(4, *map(len, rows))
    ax.text(left, -0.55, name, ha="left")
    for r, boxes in enumerate(rows):
        for i, owner in enumerate(boxes):
            ax.add_patch(
                Rectangle((left + 0.62 * i, r), 0.56, 0.7, facecolor=RANKS[owner])
            )
    left += 0.62 * widest + 0.9
for r in range(4):
    ax.text(-0.3, r + 0.35, f"rank {r}", ha="right", va="center")
ax.set(xlim=(-2.2, left - 0.6), ylim=(4, -1))
ax.axis("off")
counts = [len(rows) for rows in columns["at the experts"]]
figure(
    fig,
    alt=(
        "Four ranks with four tokens each, in a color of their own. After dispatch,"
        f" ranks 0 to 3 hold {', '.join(map(str, counts))} rows of mixed colours, 32 in"
        " all, two for each token. Then each token is home again."
    ),
)

# %% [markdown]
# **Capacity.** The busiest expert makes all wait. So GShard ([Lepikhin et al. 2020](https://arxiv.org/abs/2006.16668
# "lepikhin2020gshard")) and Switch ([Fedus et al. 2021](https://arxiv.org/abs/2101.03961 "fedus2021switch")) give each expert
# room for $C$ rows of a rank's $T$ tokens:
#
# $$C = \lceil \tfrac{T k}{E} \cdot \text{capacity factor} \rceil .$$
#
# Who finds no room is dropped: this expert adds 0, and the residual carries the token on. With a fixed $C$ one can also *pad*: send
# $C$ rows to everybody, so that shapes never change.
#
# **Balance.** A loss that is added to the model's pushes the router to spread. With $f_e$ the share of the assignments and $\bar P_e$
# the mean probability of expert $e$, it is $L = E \sum_e f_e \bar P_e$: 1 when even, $E/k$ at worst. Counting has no gradient; $\bar P$
# has.

# %% [markdown]
# ## The code
#
# Routing is three pure functions. Note the fp32. A logit in bf16 has 8 significant bits, and with hundreds of experts the last one
# that is chosen and the first one that is not are often closer than that:

# %%
from llmlab.parallelism import moe

torch.manual_seed(1)
logits = torch.randn(4096, 256).bfloat16().topk(9).values
print(
    "8th and 9th of 256 logits equal in bf16:"
    f" {(logits[:, 7] == logits[:, 8]).float().mean().item():.0%} of the tokens"
)
show(moe.route, moe.keep, moe.balance_loss)

# %% [markdown]
# `keep` walks a queue, and who stands first in it is a choice. Token after token is what Switch does: the end of the batch is dropped,
# whatever it says. GShard serves all first choices before any second one. Megatron keeps the largest weights. The queue is the only
# difference between the three.
#
# The layer on one rank. Rows are sorted by expert, so they are sorted by rank too. Their numbers are known to the sender alone, so
# every rank first announces what will come:
#
# | step | result | shape | travels |
# |---|---|---|---|
# | route, keep | expert and weight of each choice, kept or not | $(T, k)$ | nothing |
# | sort | the kept rows, by expert | $(n, d)$, $n \leq Tk$ | nothing |
# | announce | rows from each rank for each of my experts | $(p, E/p)$ | a number per expert |
# | dispatch | the rows of all ranks for my experts | $(m, d)$ | the rows |
# | compute | the same rows, each through its expert | $(m, d)$ | nothing |
# | combine | my rows home, weighted and added up | $(T, d)$ | the rows |

# %%
show(ExpertParallelMoE.forward)

# %% [markdown]
# Backward, `exchange` runs the other way by itself. One trap is left: the gradient of an expert is complete where the expert is, because all
# ranks' tokens came there. Summing it over ranks, as data parallelism does with everything, would be wrong. The router's
# gradient is partial and must be summed.

# %% [markdown]
# ## Against the library
#
# transformers' Mixtral block ([Jiang et al. 2024](https://arxiv.org/abs/2401.04088 "jiang2024mixtral")) has the same parameter
# names. It runs on one process with all tokens; ours in four, with a quarter of the tokens and 2 of the 8 experts each. Then the
# balance loss.

# %%
from transformers.models.mixtral import modeling_mixtral as mixtral

from llmlab.parallelism import launch
from llmlab.parallelism.moe import sum_router_gradients

torch.manual_seed(0)
layer = MoE(MoEConfig(8, top_k=2), dim=32, hidden=48)
x, upstream = torch.randn(4, 12, 32), torch.randn(4, 12, 32)

config = mixtral.MixtralConfig(
    hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2
)
config._experts_implementation = "eager"
theirs = mixtral.MixtralSparseMoeBlock(config)
theirs.load_state_dict(layer.state_dict())
whole = x.clone().requires_grad_()
out = theirs(whole)
(out * upstream).sum().backward()


def on_a_rank(comm):
    ours, mine = (
        ExpertParallelMoE(copy.deepcopy(layer), comm),
        x[comm.rank].clone().requires_grad_(),
    )
    y, report = ours(mine)
    (y * upstream[comm.rank]).sum().backward()
    sum_router_gradients(ours, comm)
    return (
        y.detach(),
        mine.grad,
        ours.gate.weight.grad,
        ours.experts.down_proj.grad,
        report.balance.item(),
    )


ranks = launch(on_a_rank, 4, timeout=120)
compare(
    torch.stack([r[0] for r in ranks]),
    out,
    "output, 4 processes against Mixtral's block",
)
compare(
    torch.stack([r[1] for r in ranks]), whole.grad, "gradient of the tokens", tol=1e-4
)
compare(
    ranks[2][2],
    theirs.gate.weight.grad,
    "gradient of the router, summed over ranks",
    tol=1e-4,
)
compare(
    torch.cat([r[3] for r in ranks]),
    theirs.experts.down_proj.grad,
    "gradient of the experts, each from its owner",
    tol=1e-4,
)

logits = layer.gate(x.flatten(0, 1))
balance = mixtral.load_balancing_loss_func((logits,), num_experts=8, top_k=2)
compare(ranks[0][4], balance / 2, "balance loss: ours, and theirs divided by k")

# %% [markdown]
# transformers adds up the $k$ choices where Megatron averages them, so its loss is $k$ times as large for the same coefficient. In the tests,
# router, capacity, dropping, loss and its gradient are those of Megatron-core 0.16.1.
#
# <details><summary>For the curious: what else differs between libraries and models</summary>
#
# If your balance loss or your routing weights differ from another code's, it may be no mistake. The folded cell gives the routers of
# transformers 5.23 the same tokens and the same $W_g$, with 8 experts and $k = 2$.
#
# - **Weights.** In Mixtral the $k$ weights of a token add up to 1. Qwen3-MoE divides by their sum if `norm_topk_prob` says so, which by
#   default it does not. DeepSeek-V2 has that setting and never reads it. DeepSeek-V3 divides, and then multiplies by 2.5. So the same
#   weights in another model's block give outputs of another size.
# - **Loss.** Theirs goes from $k$ to $E$, ours from 1 to $E/k$. Theirs adds up all layers before it multiplies: layers that each have a favourite
#   of their own look balanced. Watch the layers one by one.
# - **Padding.** In theirs it counts, unless you pass `attention_mask`. Ours counts every row that it is given: take padding out first.
# - Theirs is not in the model's loss at all, until you set `output_router_logits=True`.
#
# </details>

# %% tags=["hide-cell"]
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

balance_of = mixtral.load_balancing_loss_func
one_group = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1}
ROUTERS = {
    "Qwen3-MoE": (Qwen3MoeTopKRouter, Qwen3MoeConfig, {"num_experts": 8}),
    "DeepSeek-V2": (DeepseekV2TopkRouter, DeepseekV2Config, one_group),
    "DeepSeek-V3": (DeepseekV3TopkRouter, DeepseekV3Config, one_group),
}


def sums(router):
    """The smallest and the largest sum of a token's weights."""
    router.weight.data.copy_(layer.gate.weight.data)
    total = router(x.flatten(0, 1))[1].sum(-1)
    low, high = total.min().item(), total.max().item()
    return f"{low:.2f}" if high - low < 1e-4 else f"{low:.2f} to {high:.2f}"


print("sum of a token's weights   by default     norm_topk_prob=True")
print(f"{'Mixtral':<27}{sums(mixtral.MixtralTopKRouter(config)):<15}no such setting")
for name, (router, settings, more) in ROUTERS.items():
    shape = {"hidden_size": 32, "num_experts_per_tok": 2} | more
    usual, normed = (
        sums(router(settings(**shape, **norm)))
        for norm in ({}, {"norm_topk_prob": True})
    )
    print(f"{name:<27}{usual:<15}{normed}")


def favorite(e):
    """Logits of 16 tokens that all want expert e."""
    return 30 * torch.eye(8)[e].repeat(16, 1)


def our_loss(logits, k):
    routing = moe.route(logits, k)
    return moe.balance_loss(routing.probs, routing.load, len(logits), k).item()


def their_loss(k, *layers, **mask):
    return balance_of(layers, 8, k, **mask).item()


even, padded = torch.eye(8), torch.cat([logits, 4 * torch.eye(8)[0].repeat(48, 1)])
mask = torch.tensor([[1] * 48 + [0] * 48])
each = [favorite(e) for e in range(8)]
print("\nbalance loss                            theirs     ours")
for what, theirs, mine in (
    ("even, k = 2", their_loss(2, even), our_loss(even, 2)),
    ("all to one expert, k = 1", their_loss(1, each[0]), our_loss(each[0], 1)),
    (
        "8 layers, each with its own, k = 1",
        their_loss(1, *each),
        sum(our_loss(one, 1) for one in each) / 8,
    ),
    ("48 tokens and 48 of padding, k = 2", their_loss(2, padded), our_loss(padded, 2)),
    (
        "the same, padding left out",
        their_loss(2, padded, attention_mask=mask),
        our_loss(padded[:48], 2),
    ),
):
    print(f"{what:<36}{theirs:>10.2f}{mine:>9.2f}")
# %% [markdown]
# ## The experiment
#
# Give the router favourites: a constant channel in $x$ lets us add to each expert's logit what we like. We turn the preference up, and
# count what the ledger saw.

# %%
E, p, T, dim = 16, 4, 256, 32
torch.manual_seed(0)
popularity = -torch.arange(1.0, E + 1).log()[torch.randperm(E)]
texts = torch.randn(p, T, dim)
texts[:, :, 0] = 1.0


def favoring(skew, factor=None):
    torch.manual_seed(1)
    moe = MoE(MoEConfig(E, 2, factor), dim, 8)
    moe.gate.weight.data[:, 0] = skew * popularity
    return moe


def measure(skew, factor=None, padded=False):
    world = World(p)
    reports = world.run(
        lambda comm, m: ExpertParallelMoE(m, comm, padded=padded)(texts[comm.rank])[1],
        favoring(skew, factor),
    )
    load = sum(r.load for r in reports)
    fair_rows, rows = T * 2, [r.rows for r in reports]
    sent = [
        sum(
            e.bytes
            for e in world.ledger.events("all_to_all", rank)
            if e.shape[-1:] == (dim,)
        )
        for rank in range(p)
    ]
    return {
        "fullest": load.max().item() / load.float().mean().item(),
        "dropped": sum(r.dropped for r in reports) / (p * T * 2),
        "busiest": max(rows) / fair_rows,
        "sent": max(sent) / 1e3,
    }


skews = (0.0, 0.3, 0.45, 0.6, 0.8, 1.0)
policies = {
    "no limit": (None, False),
    "1.0": (1.0, False),
    "1.25": (1.25, False),
    "2.0": (2.0, False),
    "1.25 padded": (1.25, True),
}
seen = {name: [measure(s, *policy) for s in skews] for name, policy in policies.items()}

# %% tags=["hide-output"]
fullest = [m["fullest"] for m in seen["no limit"]]
three = min(range(len(skews)), key=lambda i: abs(fullest[i] - 3))
for i in (0, three):
    print(f"fullest expert at {fullest[i]:.1f} fair shares:")
    for name, rows in seen.items():
        m = rows[i]
        print(
            f"{name:<12} dropped {m['dropped']:>4.0%}   busiest rank {m['busiest']:.2f}"
            f"   it sends {m['sent']:.0f} kB"
        )
dropped_guess.settle(100 * seen["1.25"][three]["dropped"], digits=2)
busiest_guess.settle(seen["no limit"][three]["busiest"])

# %% tags=["hide-input"]
fig, (top, bottom) = plt.subplots(2, 1, figsize=(4.8, 4.6), sharex=True)
for i, name in enumerate(("1.0", "1.25", "2.0")):
    dropped = [100 * m["dropped"] for m in seen[name]]
    top.plot(fullest, dropped, "o-", color=f"C{i}", ms=4)
    top.text(
        fullest[-1] + 0.1, dropped[-1], f"factor {name}", color=f"C{i}", va="center"
    )
top.set(ylabel="% dropped", ylim=(-3, 60))
for name, color, style in (
    ("no limit", palette.ink, "o-"),
    ("1.25", "C1", "o-"),
    ("1.25 padded", palette.gray, "--"),
):
    busy = [m["busiest"] for m in seen[name]]
    bottom.plot(fullest, busy, style, color=color, ms=4)
    bottom.text(fullest[-1] + 0.1, busy[-1], name, color=color, va="center")
bottom.set(
    ylabel="busiest rank",
    xlabel="assignments of the fullest expert, fair = 1",
    xlim=(1.4, fullest[-1] + 1.7),
)
figure(
    fig,
    alt=(
        f"Two graphs against the load of the fullest expert, from {fullest[0]:.1f} to"
        f" {fullest[-1]:.1f} times the fair share. Above: the share dropped rises to"
        f" {100 * seen['1.0'][-1]['dropped']:.0f}% with factor 1,"
        f" {100 * seen['1.25'][-1]['dropped']:.0f}% with 1.25,"
        f" {100 * seen['2.0'][-1]['dropped']:.0f}% with 2. Below: without a limit the"
        f" busiest rank computes up to {seen['no limit'][-1]['busiest']:.1f} fair"
        " shares; with factor 1.25 it stays near 1."
    ),
)

# %% [markdown]
# You buy time with tokens. Without a limit nobody is dropped, and all wait for the busiest rank. A limit caps the wait, and drops a
# part that grows with the imbalance. At the left end the router has no favourites, only random weights, and still an expert is chosen more
# often than another: factor 1.0 drops 13% there, 2.0 none. Padding always computes and sends the same, also when half of it is zeros: at
# the left end the padded layer is the slowest of all, 1.25 against 1.17 without any limit, and it drops 5% besides. Its merit is that
# shapes, and so the time of a step, never change.

# %% [markdown]
# One consequence is easily missed. Capacity is counted among the tokens of one rank, so who is dropped depends on how the tokens are dealt
# out. All other kinds of parallelism in this part give the result of one process. This one does, too, as long as nobody is dropped:

# %%
everything = texts.flatten(0, 1)


def split_over(ranks, factor):
    deal = everything.chunk(ranks)

    def run(comm, m):
        return ExpertParallelMoE(m, comm)(deal[comm.rank])[0].detach()

    return torch.cat(World(ranks).run(run, favoring(0.45, factor)))


for factor in (None, 1.25):
    one = split_over(1, factor)
    for ranks in (2, 4, 8):
        other = (split_over(ranks, factor) - one).abs().amax(1) > 1e-4
        limit = "no limit" if factor is None else f"factor {factor}"
        print(
            f"{limit}, {ranks} ranks: {other.float().mean().item():.0%} of the tokens"
            " have another output than on 1 rank"
        )

# %% [markdown]
# Nearly a third of the tokens keep other experts than they would on one rank. A model trained with a limit depends, a little, on how
# many machines train it. DeepSeek-V3 drops none.
#
# Does the balance loss help? We take the same favourites, and 40 steps in which only the router learns, from this loss alone.

# %%
router = favoring(1.5)
text = texts.flatten(0, 1)
optimizer = torch.optim.SGD(router.gate.parameters(), lr=0.3)
for step in range(41):
    routing, _ = router.plan(text)
    loss = moe.balance_loss(routing.probs, routing.load, len(text), 2)
    if step % 20 == 0:
        print(
            f"step {step:>2}: balance loss {loss.item():.1f}, fullest expert"
            f" {routing.load.max().item() / (len(text) * 2 / E):.1f} fair shares"
        )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% [markdown]
# It does, and quickly. In training it pulls at the same weights as the language model's loss, so its coefficient is small: Switch takes
# 0.01. DeepSeek-V3 goes without, mostly: a bias on each expert's score, which only counts for who is chosen, is moved down when the
# expert had too many tokens and up when it had too few.
#
# **Two kinds of wire.** Between machines a wire is several times slower than inside. An all-to-all in two levels goes between machines
# first, to the rank of the same number, then inside. DeepSpeed-MoE does it the other way round, inside first, and either way the slow
# wire carries the same bytes in fewer messages, while every row travels twice ([Rajbhandari et al.
# 2022](https://arxiv.org/abs/2201.05596 "rajbhandari2022deepspeedmoe")). What saves bytes is another thing: a token whose experts are all
# on one machine need cross *once*, and its weighted results can be added up there before they come home.

# %%
from llmlab.parallelism.moe import hierarchical

show(hierarchical.Hop)

# %%
from llmlab.parallelism.moe import TwoLevelMoE, distinct_nodes

machines, local = 2, 4
shared = torch.randn(machines * local, 64, dim)


def two_levels(comm, m):
    return TwoLevelMoE(m, comm.mesh(machines, local))(shared[comm.rank])[0].detach()


def one_level(comm, m):
    routing, _ = m.plan(shared[comm.rank])
    away = (routing.experts // (E // machines) != comm.rank // local).sum().item()
    return ExpertParallelMoE(m, comm)(shared[comm.rank])[0].detach(), away * dim * 4


print("rows over the slow wire, a token (16 experts, 2 machines of 4)")
for k in (1, 2, 4, 8):
    torch.manual_seed(2)
    many = MoE(MoEConfig(E, k), dim, 8)
    flat = World(8).run(one_level, many)
    world = World(8)
    outputs = world.run(two_levels, many)
    assert all(
        torch.allclose(a, b, atol=1e-4) for (a, _), b in zip(flat, outputs, strict=True)
    )
    crossed = [
        next(
            e.bytes
            for e in world.ledger.events("all_to_all", r)
            if len(e.group) == machines and e.shape[-1:] == (dim,)
        )
        for r in range(8)
    ]
    row = 8 * 64 * dim * 4
    print(
        f"k = {k}: flat {sum(b for _, b in flat) / row:.2f}   two levels"
        f" {sum(crossed) / row:.2f}   by formula"
        f" {distinct_nodes(E, k, machines) / 2:.2f}"
    )

# %% [markdown]
# The outputs are the same, as the cell asserts. With 8 experts per token the flat exchange crosses 4 times as often. The formula
# assumes that all experts are equally likely.

# %% [markdown]
# ## Play
#
# One rank's tokens at 16 experts. Move the capacity factor: blue rows are computed, vermillion ones dropped, and light ones are the
# padding that is sent for nothing.

# %% tags=["hide-input", "nbval-ignore-output"]
SKEWS = {"indifferent": 0.0, "choosy": 0.5, "favorites": 1.0, "one star": 2.0}
LOADS = {}
for name, skew in SKEWS.items():
    routing, _ = favoring(skew).plan(texts[0])
    LOADS[name] = routing.load.sort(descending=True).values


def shares(router, capacity_factor):
    C = moe.capacity(T, 2, E, capacity_factor)
    load = LOADS[router]
    return C, load.clamp_max(C), (load - C).clamp_min(0), (C - load).clamp_min(0)


def draw_capacity(router, capacity_factor):
    C, kept, dropped, empty = shares(router, capacity_factor)
    fig, ax = plt.subplots(figsize=(4.8, 2.9))
    edges = [e - 0.5 for e in range(E + 1)]
    for below, height, color, label in (
        (kept, empty, palette.light, "padding"),
        (torch.zeros(E), kept, palette.blue, "computed"),
        (kept, dropped, palette.vermillion, "dropped"),
    ):
        ax.stairs(
            (below + height).numpy(),
            edges,
            baseline=below.numpy(),
            fill=True,
            color=color,
            label=label,
        )
    ax.axhline(C, color=palette.ink, lw=1)
    ax.set(
        xlabel="experts, the most popular first",
        ylabel="rows",
        ylim=(0, 260),
        xticks=[],
    )
    ax.legend(frameon=False, loc="upper right", ncol=1)
    return fig


def describe_capacity(router, capacity_factor):
    C, _, dropped, empty = shares(router, capacity_factor)
    return (
        f"{router} router, capacity factor {capacity_factor:g}: {C} places an expert,"
        f" {dropped.sum().item() / (2 * T):.0%} of the assignments dropped,"
        f" {empty.sum().item() / (C * E):.0%} of the padded rows empty"
    )


explore(
    draw_capacity,
    alt=describe_capacity,
    title="256 tokens, 2 of 16 experts each",
    start={"router": "choosy", "capacity_factor": 1.25},
    router=list(SKEWS),
    capacity_factor=[1.0, 1.25, 2.0],
)

# %% [markdown]
# ## At scale
#
# `ExpertParallelMoE` takes the communicator of any launcher, gloo or NCCL. Save this as `ep.py` and run
# `torchrun --nproc-per-node 8 ep.py` on a machine with 8 GPUs, or with 4 and no GPU here:
#
# ```
# import torch
# from llmlab.parallelism import attach
# from llmlab.parallelism.moe.expert_parallel import ExpertParallelMoE
# from llmlab.parallelism.moe.moe import MoE, MoEConfig
#
# def run(comm):
#     torch.manual_seed(0)                               # one master weight: every rank keeps its experts
#     layer = ExpertParallelMoE(MoE(MoEConfig(64, 8, 1.25), 1024, 512), comm).to(comm.device)
#     y, report = layer(torch.randn(4096, 1024, device=comm.device))
#     print(comm.rank, report.rows, report.dropped, comm.ledger.bytes())
#
# attach(run)
# ```
#
# **GShard's models** (table 1; experts in every other layer, two matrices of 1024 × 8192 each, as in its appendix A.2):

# %%
TABLE = (
    ("2048E, 36L", 2048, 36, 36684, 600),
    ("2048E, 12L", 2048, 12, 12228, 200),
    ("512E, 36L", 512, 36, 9216, 150),
    ("128E, 12L", 128, 12, 768, 12.5),
)
print(
    f"{'':<14}{'experts: paper':>15}{'ours':>8}{'weights: paper':>18}"
    f"{'experts alone, ours':>22}"
)
for name, experts, depth, total, billions in TABLE:
    ours = expert_parameters(depth // 2, experts, 1024, 8192, matrices=2) / 1e9
    print(
        f"{name:<14}{total:>15}{experts * depth // 2:>8}{billions:>16} B{ours:>20.1f} B"
    )
switch = expert_parameters(2 * 15, 2048, 2080, 6144, matrices=2) / 1e9
print(
    "Switch-C, 15 + 15 layers of 2048 experts: paper 1571 B, experts alone"
    f" {switch:.0f} B"
)

# %% [markdown]
# Switch-C is its experts, to 0.1%. GShard's first two counts of experts are misprinted: $18 \cdot 2048$ is 36864, and $6 \cdot 2048$ is
# 12288; the other rows agree. Its weights are 3% below what the experts alone come to; the table seems to round.
#
# **DeepSeek-V3** spreads 256 experts over 64 GPUs on 8 machines, and lets a token go to 4 machines at most. NVLink has 160 GB/s, the
# network 50; the report concludes that 13 experts would cost no more than its 8.

# %%
free = distinct_nodes(256, 8, 8)
print(
    f"rows to other machines per token: flat {8 * 7 / 8:.1f}, once per machine"
    f" {free * 7 / 8:.1f}, with at most 4 machines ≤ 4"
)
print(f"machines that a token would visit without the rule: {free:.1f}")
print(
    "experts per machine that NVLink hands on while the network brings one row:"
    f" {160 / 50:.1f}; on 4 machines {4 * 160 / 50:.0f}; paper 13"
)

# %% [markdown]
# ## What to keep
#
# ```python
# def route(logits, k, C):                                   # logits (T, E)
#     P, e = logits.float().softmax(-1).topk(k)              # (T, k)
#     chosen = F.one_hot(e.flatten(), logits.shape[1])       # (T·k, E), in order of arrival
#     place = (chosen.cumsum(0) * chosen).sum(-1) - 1        # how many came before
#     return e, P / P.sum(-1, keepdim=True), (place < C).view(e.shape)
# ```
#
# Expert parallelism is two all-to-alls forward and two backward, exact against a loop over experts; experts' gradients
# are not summed over ranks, the router's are. Imbalance costs time or tokens: with the fullest expert at 3 fair shares,
# factor 1.25 drops 19% of all assignments, and no limit makes the busiest of 4 ranks compute 1.3 shares. A token that
# crosses once per machine, and not once per expert, puts a quarter of the bytes on the slow wire, at 8 experts per token
# and 2 machines, for the same result.
#
# **Use it** when a model's experts do not fit on one rank, with tokens that cross to another machine once. **Not** with a
# capacity limit where the result must not depend on the number of ranks: who is dropped is decided on each of them.
#
# <details><summary>Why are experts' gradients not summed over ranks?</summary>
#
# All ranks' tokens came to the expert, so its gradient is complete where it is. The router's is partial on each rank and
# must be summed.
#
# </details>
#
# <details><summary>What does a capacity limit buy, and with what?</summary>
#
# Time, with tokens. Nobody waits for the fullest expert, and what finds no room is dropped: the residual carries the
# token on.
#
# </details>
#
# <details><summary>How can the balance loss train the router, if counting has no gradient?</summary>
#
# It multiplies each expert's share of the assignments by its mean probability. The gradient flows through the
# probability.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/05-parallelism/09-moe.ipynb).
#
# References: [Shazeer et al. 2017](https://arxiv.org/abs/1701.06538 "shazeer2017outrageously"), [Lepikhin et al.
# 2020](https://arxiv.org/abs/2006.16668 "lepikhin2020gshard"), [Fedus et al. 2021](https://arxiv.org/abs/2101.03961
# "fedus2021switch"), [Jiang et al. 2024](https://arxiv.org/abs/2401.04088 "jiang2024mixtral"), [Rajbhandari et al.
# 2022](https://arxiv.org/abs/2201.05596 "rajbhandari2022deepspeedmoe"), [DeepSeek-AI 2024](https://arxiv.org/abs/2412.19437
# "deepseek2024v3").
