# %% [markdown]
# # Sequence parallelism
#
# A text can be too long for one accelerator, even if the model is not. Here its tokens are cut over the ranks, and the model computes what it
# computed before, up to the rounding of fp32. You will see three ways to do it, what each keeps and sends, and why a fair cut of a text is not the
# obvious one. At the end you own the line of mathematics that makes it possible: how two pieces of a softmax are merged.

# %% tags=["hide-input"]
from dataclasses import replace

import torch
import torch.nn.functional as F

from llmlab.checks.parallelism.sequence import check
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
from llmlab.models import course_model
from llmlab.models.accounting import weight_bytes
from llmlab.models.attention import sdpa
from llmlab.models.llama import Llama, rope_tables
from llmlab.models.presets import preset
from llmlab.parallelism import Link, World, launch, sequence, tensor
from llmlab.parallelism.sequence import (
    AttentionShape,
    RingAttention,
    Saved,
    UlyssesAttention,
    join,
    schedule,
    sent,
    shards,
    split_loss,
    sum_gradients,
    take,
)

# %% [markdown]
# ## What it costs
#
# Training keeps activations for the backward pass. How many, for a model of 8 billion parameters and one text as long as
# it can read? We let autograd tell. On PyTorch's meta device tensors have shapes and no numbers, so a layer of the real
# model runs here in a second; `Saved` adds up what it would have kept.

# %% tags=["hide-input"]
T, llama = 131072, preset("llama-3.1-8b")


def on_meta():
    """One layer of the model, and the cosines and sines of RoPE, without numbers."""
    with torch.device("meta"):
        model = Llama(replace(llama, num_hidden_layers=1, vocab_size=8)).bfloat16()
    rope = [
        t.bfloat16()
        for t in rope_tables(
            torch.empty(1, T, dtype=torch.long, device="meta"), model.model.theta
        )
    ]
    return model, rope


def layer_keeps(block, tokens, rope, attention):
    x = torch.empty(
        1,
        tokens,
        llama.hidden_size,
        dtype=torch.bfloat16,
        device="meta",
        requires_grad=True,
    )
    # the weights, and the tables of all layers, do not count
    with Saved([*block.parameters(), *rope]) as saved:
        block(x, rope, None, None, attention)
    return saved.bytes


def kept_alone(comm):
    model, rope = on_meta()
    # a ring of one rank is attention as usual
    whole = RingAttention(comm, [torch.arange(T)], tile=T)
    return layer_keeps(model.model.layers[0], T, rope, whole)


layer = World(1).run(kept_alone)[0]
L, d, H = llama.num_hidden_layers, llama.hidden_size, llama.num_attention_heads
print(f"Llama 3.1 8B in 16 bits: {weight_bytes(llama) / 1e9:.0f} GB of weights")
print(
    f"one text of {T:,} tokens: {layer * L / 1e9:.0f} GB of activations,"
    f" {layer / T / d:.0f} bytes per token and channel"
)
print(
    f"and the scores of attention, were they kept: {H * T * T * 2 / 1e9:,.0f} GB in"
    " every layer"
)

# %% [markdown]
# No accelerator holds that. Computing [all of them again](../../jupyter-book/pages/recomputation.md) in the backward pass costs a third more time.
# [Tensor parallelism](05-tensor.ipynb) cuts the weights, and some of these activations with them. This lesson cuts the text. That costs
# messages, because attention lets every token look at every earlier one.
#
# ## Predict
#
# First, tensor parallelism alone. With 8 ranks, each holds an eighth of every large weight. How much of the 911 GB does each still keep?
#
# Then the text. Four ranks each take a quarter of it, and all of them the whole model. Queries stay; keys and values go round from rank to
# rank until every rank has seen all. Rank $r$ takes the $r$-th quarter. Does everybody have the same work?

# %%
tensor_guess = predict(
    "Tensor parallelism on 8 ranks: how much does each rank still keep?",
    unit="% of the activations",
)
slowest_guess = predict(
    "A text cut over 4 ranks: how long does the slowest compute, if a fair share is 1?"
)

# %% [markdown]
# ## By hand
#
# A query looks at four keys in two pieces, $A$ on this rank and $B$ on the next. Numbers that come out even: $e^S$ is 1 and 3 in $A$, 2 and 4 in
# $B$; the values are 1 and 5, 2 and 8.
#
# | | sum of $e^S$ | output |
# |---|---|---|
# | $A$ alone | 1 + 3 = 4 | (1 · 1 + 3 · 5) / 4 = 4 |
# | $B$ alone | 2 + 4 = 6 | (2 · 2 + 4 · 8) / 6 = 6 |
# | merged | 4 + 6 = 10 | 4/10 · 4 + 6/10 · 6 = 5.2 |
# | all four keys at once | 10 | (1 + 15 + 4 + 32) / 10 = 5.2 |
#
# So a piece is summed up by two numbers, its output and its sum. The sum is kept as its logarithm, the *log-sum-exp*, because scores in the hundreds would
# overflow.

# %%
scores, values = torch.tensor([1.0, 3, 2, 4]).log(), torch.tensor([1.0, 5, 2, 8])
o_a, o_b = (scores[i].softmax(0) @ values[i] for i in (slice(2), slice(2, 4)))
print(f"A {o_a:.1f}, B {o_b:.1f}, all four {scores.softmax(0) @ values:.1f}")

# %% [markdown]
# ## The idea
#
# Norms, products with weights and activation functions treat each token for itself. There a cut along the text is free.
# Only attention needs the other tokens, and there are three ways to get them:
#
# | | what travels | in attention a rank has | the rest of the layer |
# |---|---|---|---|
# | Megatron ([Korthikanti et al. 2022](https://arxiv.org/abs/2205.05198 "korthikanti2022reducing")) | hidden states | all tokens, its heads | its share of the weights |
# | Ulysses ([Jacobs et al. 2023](https://arxiv.org/abs/2309.14509 "jacobs2023ulysses")) | q, k, v and the output | all tokens, its heads | whole weights |
# | Ring ([Liu et al. 2023](https://arxiv.org/abs/2310.01889 "liu2023ring")) | k and v | its queries, all heads | whole weights |
#
# **The ring needs a softmax in pieces.** Let a query have looked at the keys in $A$, with scores $S_j$:
#
# $$\begin{gathered}
# o_A = \sum_{j\in A} e^{S_j-\ell_A} v_j, \quad \ell_A = \log\sum_{j\in A} e^{S_j}; \\
# \ell = \log(e^{\ell_A}+e^{\ell_B}), \\
# o = e^{\ell_A-\ell}\,o_A + e^{\ell_B-\ell}\,o_B .
# \end{gathered}$$
#
# The merge is exact, and its order does not matter, so keys may come from any rank at any time.
#
# **Who does how much?** In the figure, 24 tokens on three ranks, each square is a query (row) that looks at a key (column); its colour is
# the rank that has the query. A late token looks at many keys.

# %% tags=["hide-input"]
RANKS = [palette.blue, palette.vermillion, palette.green, palette.purple]


def owners(cut, n):
    """Row i: the colour of the rank that has token i, for each key that it may see;
    white elsewhere.
    """
    picture = torch.ones(n, n, 3)
    for rank, positions in enumerate(cut):
        rgb = torch.tensor([int(RANKS[rank][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        for i in positions.tolist():
            picture[i, : i + 1] = rgb
    return picture


fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.7))
shares = {}
for ax, layout in zip(axes, ("contiguous", "zigzag"), strict=True):
    cut = shards(24, 3, layout)
    ax.imshow(owners(cut, 24), interpolation="nearest")
    work = [
        sum(pairs for r, _, _, pairs in schedule(cut) if r == rank) for rank in range(3)
    ]
    shares[layout] = [f"{w / sum(work):.0%}" for w in work]
    ax.set(title=layout, xticks=[], yticks=[], xlabel="keys")
    for rank in range(3):
        ax.text(
            23,
            1 + 3.2 * rank,
            f"rank {rank}: {shares[layout][rank]}",
            color=RANKS[rank],
            ha="right",
            va="center",
        )
axes[0].set_ylabel("queries")
figure(
    fig,
    alt=(
        "Two causal masks of 24 tokens, each row coloured by the rank that has the"
        " query. Contiguous cut: three bands, ranks 0 to 2 do"
        f" {', '.join(shares['contiguous'])} of the work. Zigzag cut: each rank has an"
        f" early and a late band, {', '.join(shares['zigzag'])}."
    ),
)

# %% [markdown]
# Zigzag ([Llama Team 2024](https://arxiv.org/abs/2407.21783 "llama2024herd")) cuts the text into $2p$ pieces and pairs the $r$-th
# from the front with the $r$-th from the back. Striping ([Brandon et al. 2023](https://arxiv.org/abs/2311.09431
# "brandon2023striped")) deals tokens out like cards.
#
# ## Your turn
#
# Write the merge. `o_a` and `o_b` are outputs of shape (B, H, T, D), `l_a` and `l_b` the log-sum-exps, of shape (B, H, T). Return both for all keys
# together. Never take $e^\ell$ itself, only $e^{\ell_A - \ell}$. A query that saw no key has $o = 0$ and $\ell = -\infty$, on one side or on both:
# the result then has no NaN. `torch.logaddexp(x, y)` is $\log(e^x + e^y)$.


# %%
def merge(o_a, l_a, o_b, l_b):
    """Output and log-sum-exp over the keys of a and b together."""
    raise NotImplementedError("four lines of yours")


your_turn(check.merge, merge)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(o_a, l_a, o_b, l_b):
    lse = torch.logaddexp(l_a, l_b)
    safe = torch.where(lse == -torch.inf, 0.0, lse)  # −∞ − (−∞) is not a number
    o = (l_a - safe).exp()[..., None] * o_a + (l_b - safe).exp()[..., None] * o_b
    return o, lse


your_turn(check.merge, one_answer)

# %% [markdown]
# ## The code
#
# A cut is data: a list with each rank's positions. The folded cell has the merge and the ring around it, then Ulysses'
# transpose and Megatron's scatter. Open ours when you have your own merge.
#
# Three things are easy to get wrong. A query that may see nothing of a piece has $\ell=-\infty$, and $-\infty-(-\infty)$ is not a
# number. RoPE must turn by the place in the whole text, so the model is given `position_ids`. And in the backward pass the gradients of $K$
# and $V$ travel with them, collecting what each rank adds, and need **one hop more** to get home.
#
# Ulysses is two transposes of who has what: dimension 2 (tokens) is gathered while dimension 1 (heads) is scattered, and back. The heads must
# divide over the ranks: that is Ulysses' limit, where the ring has none.
#
# Megatron's way starts from tensor parallelism, which leaves everything between two products whole on each rank. Cut it along the text, and the
# all-reduce of each product becomes an all-gather before it and a reduce-scatter after it: an all-reduce is just these two in a row.

# %% tags=["hide-output"]
show(
    sequence.merge,
    sequence.RingAttentionFunction,
    sequence.ulysses.tokens_to_heads,
    sequence.ScatterSequence,
)

# %% [markdown]
# ## Against the library
#
# DeepSpeed has Ulysses as `DistributedAttention`. Two real processes over gloo, the same shards into both; and our ring against
# PyTorch's attention on one process. 29 is a prime number, so the shards differ in length, and 6 query heads share 3 key/value heads.
#
# Then the whole course model: two steps of training on 2 × 101 tokens, cut in three ways over 4 ranks, in threads, and the
# ring in processes, too. With the text cut, the loss is the sum over a rank's tokens divided by the number of *all* tokens: a mean of
# means would favour short shards. Megatron's shards must be equal, so 101 is padded to 104, with targets that do not count.
#
# <details><summary>For the curious: a query that may see nothing, and other masks</summary>
#
# A row of padding, or the piece of a ring in which every key is later, leaves a query with no key. Libraries answer differently, and
# nothing warns. If one NaN spreads through your loss, or outputs of padding differ between two codes, this may be why. With PyTorch 2.13
# and transformers 5.23:
#
# | who | what such a query gets |
# |---|---|
# | PyTorch's attention, mask of booleans or of $-\infty$ | 0, and no gradient |
# | the same, with the lowest finite number in the mask | the mean of all values, hidden ones too |
# | transformers with `"eager"`, which masks so | the mean of all values |
# | `nn.MultiheadAttention` | NaN; with `need_weights=False` what 0 would give |
# | a softmax by hand, with $-\infty$ | NaN |
# | a piece of our ring | 0, with $\ell = -\infty$, which a merge leaves out |
# | our Llama | itself: a token of padding looks at itself |
#
# Two more that nothing warns of. `is_causal=True` starts from the top left corner: two new tokens after three in a cache see one key and two, not four and
# five. And transformers' `"eager"` adds a 4-D mask of booleans to the scores as 0 and 1, where `"sdpa"` takes it as a mask. The folded cell at the
# end of this section runs PyTorch's; tests of the project run all.
#
# </details>


# %% tags=["hide-input"]
def against_deepspeed(comm):
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.sequence.layer import DistributedAttention

    # it would be compiled, for minutes
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)

    def swap(t):
        return t.transpose(1, 2)  # theirs: (B, T, H, D)

    def local(q, k, v):
        return swap(sdpa(swap(q), swap(k), swap(v), None))

    mine = [
        torch.randn(2, 8, 32, 16)
        .chunk(comm.size, 2)[comm.rank]
        .clone()
        .requires_grad_()
        for _ in range(3)
    ]
    theirs = [swap(t.detach()).contiguous().requires_grad_() for t in mine]
    ours = UlyssesAttention(comm, [32 // comm.size] * comm.size)(*mine)
    ours.square().sum().backward()
    out = DistributedAttention(local, torch.distributed.group.WORLD)(*theirs, 0)
    out.square().sum().backward()
    return (
        ours.detach(),
        swap(out.detach()),
        [t.grad for t in mine],
        [swap(t.grad) for t in theirs],
    )


ours, theirs, our_grads, their_grads = launch(against_deepspeed, 2, timeout=120)[1]
compare(ours, theirs, "Ulysses and DeepSpeed: output on rank 1")
compare(our_grads, their_grads, "Ulysses and DeepSpeed: gradients of q, k, v")


torch.manual_seed(0)
q, k, v, upstream = (torch.randn(2, heads, 29, 8) for heads in (6, 3, 3, 6))
whole = [t.clone().requires_grad_() for t in (q, k, v)]
out = sdpa(*whole, None)
out.backward(upstream)


def around_the_ring(comm, cut):
    mine = [take(t, cut, comm.rank, 2).requires_grad_() for t in (q, k, v)]
    o = RingAttention(comm, cut, tile=8)(*mine)
    o.backward(take(upstream, cut, comm.rank, 2))
    return [join(t, cut, comm, 2) for t in (o.detach(), *(t.grad for t in mine))]


for p in (2, 3, 4, 6):
    o, *grads = World(p).run(around_the_ring, shards(29, p, "zigzag"))[0]
    compare(o, out, f"ring of {p}: output")
    compare(
        torch.cat(grads, 1),
        torch.cat([t.grad for t in whole], 1),
        f"ring of {p}: gradients",
    )

# %%
model = course_model.load()
tokens = course_model.tokens("valid")[: 2 * 102].view(2, 102)
x, y = tokens[:, :-1], tokens[:, 1:]


def train(model, loss_of, finish=lambda: None, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        finish()
        optimizer.step()
    return loss.item()


def train_megatron(comm, model):
    sequence.parallelize(model, comm)
    a, b = sequence.pad_to_multiple(x, y, comm.size)
    V = model.config.vocab_size
    loss = train(
        model,
        lambda: tensor.vocab_parallel_cross_entropy(model(a), b, comm, V),
        lambda: sequence.sum_replicated_gradients(model, comm),
    )
    return loss, sequence.gather_state(model, comm)


def train_cut(comm, model, method):
    cut = shards(101, comm.size, "zigzag" if method == "ring" else "contiguous")
    attention = (
        RingAttention(comm, cut)
        if method == "ring"
        else UlyssesAttention(comm, [len(c) for c in cut])
    )
    a, b = take(x, cut, comm.rank), take(y, cut, comm.rank)
    positions = cut[comm.rank][None]
    loss = train(
        model,
        lambda: split_loss(
            model(a, position_ids=positions, attention=attention), b, comm
        ),
        lambda: sum_gradients(model, comm),
    )
    return loss, model.state_dict()


results = {
    f"{m}, 4 threads": World(4).run(train_cut, model, m)[1] for m in ("ring", "ulysses")
}
results["megatron, 4 threads"] = World(4).run(train_megatron, model)[1]
results["ring, 4 processes"] = launch(train_cut, 4, model, "ring", timeout=120)[1]
plain = train(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
for where, (loss, state) in results.items():
    compare(loss, plain, f"{where}: loss after 2 steps")
    flat = [
        torch.cat([weights[n].flatten() for n in sorted(state)])
        for weights in (state, model.state_dict())
    ]
    compare(*flat, f"{where}: all weights")

# %% tags=["hide-cell"]
few, five = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 5, 4)
nothing, lowest = torch.zeros(2, 5, dtype=torch.bool), torch.finfo(torch.float32).min
module = torch.nn.MultiheadAttention(4, 1, bias=False, batch_first=True)
hidden = {"key_padding_mask": torch.ones(1, 5, dtype=torch.bool)}
inputs = few[0], five[0], five[0]
piece, lse = sequence.attend(few, five, five, torch.arange(2), torch.arange(2, 7))
found = {
    "PyTorch, booleans": F.scaled_dot_product_attention(few, five, five, nothing),
    "PyTorch, lowest number": F.scaled_dot_product_attention(
        few, five, five, torch.full((2, 5), lowest)
    ),
    "module, with weights": module(*inputs, **hidden)[0],
    "module, without": module(*inputs, **hidden, need_weights=False)[0],
    "by hand": torch.full((2, 5), -torch.inf).softmax(-1) @ five,
    f"a piece of ours, ℓ = {lse.max():g}": piece,
}
for name, out in found.items():
    what = "NaN" if out.isnan().all() else "something else"
    if (out == 0).all():
        what = "0"
    elif torch.allclose(out, five.mean(2, keepdim=True), atol=1e-6):
        what = "the mean of all values"
    print(f"{name:<28}{what}")

see = F.scaled_dot_product_attention(
    few, five, torch.eye(5)[None, None], is_causal=True
)
print("is_causal, 2 queries and 5 keys: they see", *(see[0, 0] > 0).sum(-1).tolist())

# %% [markdown]
# ## The experiment
#
# **What is kept.** The same count as on top of this page, times 32 layers, on every rank of up to 8.


# %% tags=["hide-input"]
def kept(comm, method):
    (model, rope), cut = on_meta(), shards(T, comm.size, "contiguous")
    n, lengths = len(cut[comm.rank]), [len(c) for c in cut]
    # all tokens, on this rank
    attention = RingAttention(comm.split(comm.rank), [torch.arange(T)], tile=T)
    if method in ("tensor", "megatron"):
        (tensor if method == "tensor" else sequence).parallelize(model, comm)
        n = T if method == "tensor" else n
    else:
        ring = method == "ring"
        attention = (
            RingAttention(comm, cut, tile=T)
            if ring
            else UlyssesAttention(comm, lengths, attention)
        )
        rope = [t[:, :, :n] for t in rope]
    return layer_keeps(model.model.layers[0], n, rope, attention)


ps = (1, 2, 4, 8)
methods = ("tensor", "megatron", "ring", "ulysses")
GB = {
    (method, p): max(World(p).run(kept, method)) * L / 1e9
    for method in methods
    for p in ps
}

# %% tags=["hide-cell"]
tensor_guess.settle(100 * GB["tensor", 8] / GB["tensor", 1], digits=2)

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 3.2))
for i, (method, marker) in enumerate(
    (("tensor", "o"), ("megatron", "s"), ("ring", "^"), ("ulysses", "x"))
):
    line = [GB[method, p] for p in ps]
    ax.plot(
        ps,
        line,
        color=f"C{i}",
        lw=1.5,
        marker=marker,
        ms=9 - 2 * i,
        mfc="none" if i else f"C{i}",
        label=method,
    )
ax.text(
    7.6, GB["tensor", 8] * 1.15, f"{GB['tensor', 8]:.0f} GB", ha="right", color="C0"
)
ax.text(
    7.6, GB["ring", 8] * 0.72, f"{GB['ring', 8]:.0f} GB", ha="right", color=palette.ink
)
ax.set(
    xscale="log",
    yscale="log",
    xlabel="ranks",
    ylabel="GB kept on each rank",
    xticks=ps,
    ylim=(70, 1300),
)
ax.set_xticks(ps, [str(p) for p in ps])
ax.set_yticks([100, 200, 400, 800], ["100", "200", "400", "800"])
ax.minorticks_off()
ax.legend(frameon=False, loc="lower left")
ax.set_title(f"One text of {T:,} tokens, an 8B model")
figure(
    fig,
    alt=(
        "Gigabytes that each rank keeps, against ranks, on logarithmic axes. Tensor"
        f" parallelism alone falls from {GB['tensor', 1]:.0f} to {GB['tensor', 8]:.0f}"
        " on 8 ranks. Megatron's sequence parallelism, ring and Ulysses lie on one"
        f" straight line down to {GB['ring', 8]:.0f}."
    ),
)
for method in ("megatron", "ring", "ulysses"):
    compare(
        [GB[method, p] * p for p in ps],
        [GB["ring", 1]] * 4,
        f"{method}: GB kept on a rank, times the number of ranks",
        tol=1e-6,
    )

# %% [markdown]
# Memory falls as $1/p$ exactly, whichever way the text is cut. Tensor parallelism alone stops short: the norms' inputs, the residuals
# and the inputs of the products are whole on every rank. On 8 ranks even 114 GB do not fit into 80: for this text one takes 16, or cuts the
# text and [recomputes a part](../../jupyter-book/pages/recomputation.md). (Attention's scores are in none of these counts. To merge a softmax in pieces is to forget them and
# compute them again.)
#
# **Who waits.** Now the clock. Each rank says how long its pieces take, and the ledger adds the wire: a hop of keys and values
# takes as long as half a piece. Bars are pieces, coloured by the rank whose keys they use; the thin line below is the hop.

# %% tags=["hide-input"]
n, p = 64, 4
full_piece = (n // p) ** 2  # query-key pairs of two whole shards
inputs = [torch.zeros(1, heads, n, 8) for heads in (4, 2, 2)]
hop = 2 * 2 * (n // p) * 8 * 4  # bytes: K and V, 2 heads of 8 channels
link = Link(latency=0.0, bandwidth=hop / (0.5 * full_piece))
runs = {}
for layout in ("contiguous", "zigzag"):
    world, cut = World(p, link=link), shards(n, p, layout)
    world.run(
        lambda comm, cut=cut: RingAttention(comm, cut, pace=1.0)(
            *(take(t, cut, comm.rank, 2) for t in inputs)
        ).sum()
    )
    runs[layout] = world.ledger
fair = n * (n + 1) / 2 / p


# %% tags=["hide-output"]
def share_of_slowest(ledger):
    busy = [sum(e.end - e.start for e in ledger.events("work", r)) for r in range(p)]
    return max(busy) / fair


slowest_guess.settle(share_of_slowest(runs["contiguous"]))
print(f"and with zigzag {share_of_slowest(runs['zigzag']):.2f}")

# %% tags=["hide-input"]
fig, axes = plt.subplots(2, 1, figsize=(4.8, 3.6), sharex=True)
for ax, (layout, ledger) in zip(axes, runs.items(), strict=True):
    for e in ledger.events("work"):
        owner = int(e.label.split()[-1])
        ax.barh(
            e.rank,
            (e.end - e.start) / fair,
            left=e.start / fair,
            height=0.6,
            color=RANKS[owner],
            edgecolor="white",
        )
    for e in ledger.events("send"):
        ax.barh(
            e.rank + 0.4,
            (e.end - e.start) / fair,
            left=e.start / fair,
            height=0.1,
            color=palette.gray,
            edgecolor="white",
        )
    ax.set(
        ylabel="rank",
        yticks=range(p),
        title=f"{layout}: {ledger.time / fair:.2f} × the fair share",
        xlim=(0, 1.85),
    )
    ax.invert_yaxis()
axes[1].set_xlabel("time, a fair share of the work = 1")
figure(
    fig,
    alt=(
        "Two timelines of four ranks. Contiguous: rank 0 is done after a piece of its"
        " own, rank 3 works through four pieces until"
        f" {runs['contiguous'].time / fair:.2f}. Zigzag: all four ranks work without a"
        f" gap until {runs['zigzag'].time / fair:.2f}. Hops run below the work and"
        " delay nobody."
    ),
)

# %% [markdown]
# On these 64 tokens a contiguous cut makes the last of four ranks compute 1.74 fair shares. With $N$ tokens on $p$ ranks it is
# $1 + \frac{p-1}{p} \cdot \frac{N}{N+1}$; as the text grows it tends to $(2p-1)/p$, 1.75 here and nearly two for a long ring. Zigzag gives every rank the same in
# every *step*, so nobody ever waits for keys that are still on a slower rank.
#
# ## Play
#
# Step through a ring of four. Strong colours: what is computed in this step, by the rank that has the query. Pale: done
# before.
#
# Four ranks take four steps each, 16 turns in all. In how many of them does a rank have nothing at all to do, with each of the three cuts? Count
# before you open the cell below the figure, whose bars count pairs of a query and a key.

# %% tags=["hide-input", "nbval-ignore-output"]
LAYOUTS = ["contiguous", "zigzag", "striped"]
TABLES = {layout: schedule(shards(16, 4, layout)) for layout in LAYOUTS}


def draw_step(cut, step):
    parts, (fig, (left, right)) = (
        shards(16, 4, cut),
        plt.subplots(1, 2, figsize=(4.8, 2.6), width_ratios=(3, 2)),
    )
    picture = torch.ones(16, 16, 3)
    for rank, s, source, _ in TABLES[cut]:
        rgb = torch.tensor([int(RANKS[rank][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        for i in parts[rank].tolist():
            seen = parts[source][parts[source] <= i]
            picture[i, seen] = (
                rgb
                if s == step
                else 0.3 * rgb + 0.7
                if s < step
                else torch.tensor([0.93] * 3)
            )
    left.imshow(picture, interpolation="nearest")
    left.set(xlabel="keys", ylabel="queries", xticks=[], yticks=[])
    work = [pairs for _, s, _, pairs in TABLES[cut] if s == step]
    right.bar(range(4), work, color=RANKS)
    right.set(xlabel="rank", xticks=range(4), ylim=(0, 17), title="query-key pairs")
    return fig


def describe_step(cut, step):
    work = [pairs for _, s, _, pairs in TABLES[cut] if s == step]
    return (
        f"{cut} cut, step {step}: rank r has the keys of rank r − {step}; ranks 0 to 3"
        f" compute {', '.join(map(str, work))} query-key pairs"
    )


def missing(cut, step):
    steps = [[n for _, s, _, n in TABLES[cut] if s == at] for at in range(4)]
    if len(set(steps[step])) > 1:
        return f"{min(steps[step])} pairs here, {max(steps[step])} there."
    even = all(len(set(work)) == 1 for work in steps)
    return "" if even else "in this step they do; look at the next."


explore(
    draw_step,
    alt=describe_step,
    title="Ring attention over 16 tokens and 4 ranks",
    challenge="With which cut do all ranks have the same work in every step?",
    missing=missing,
    start={"cut": "contiguous", "step": 1},
    cut=LAYOUTS,
    step=[0, 1, 2, 3],
)

# %% tags=["hide-output"]
for layout, table in TABLES.items():
    print(
        f"{layout}: {sum(pairs == 0 for *_, pairs in table)} of 16 turns with nothing"
        " to do"
    )

# %% [markdown]
# ## At scale
#
# The same rank functions on 8 GPUs; here, without GPUs, leave out the sizes:
#
# ```
# torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_sequence_parallel \
#     --method ring --vocab 128256 --hidden 2048 --intermediate 8192 --layers 16 \
#     --heads 32 --kv-heads 8 --batch 1 --seq 131072 --tile 1024
# ```
#
# **When does the wire keep up?** A piece of $c$ queries and keys with $d$ channels costs $4dc^2$ FLOPs, and its hop moves $4dc$ bytes. So on a
# chip of $F$ FLOPs per second and a link of $B$ bytes per second a hop hides behind its piece if $c \geq F/B$ (Liu et al., table 2, which asks
# for $6c$ tokens on each device).
#
# **Who sends least?** For $N$ tokens of $h$ channels on $P$ ranks, Jacobs et al. count $4Nh/P$ for Ulysses, and $4Nh$ for Megatron whatever $P$ is. Ours has
# $(p-1)/p$, and fewer key/value heads than query heads where the model has them.

# %% tags=["hide-input"]
TABLE = (
    ("A100, NVLink", 312, 300, 6.2),
    ("A100, InfiniBand", 312, 12.5, 149.5),
    ("TPU v3", 123, 112, 6.6),
    ("TPU v4", 275, 268, 6.2),
    ("TPU v5e", 196, 186, 6.3),
)
print("thousand tokens on a device    paper    ours")
for name, tflops, gigabytes, published in TABLE:
    block = sequence.smallest_block(tflops * 1e12, gigabytes * 1e9)
    print(f"{name:<28}{published:>8}{6 * block / 1e3:>8.1f}")

print("\nMB that a rank sends per layer, forward")
for name in ("llama-2-7b", "llama-3.1-405b"):
    c = preset(name)
    shape = AttentionShape(
        1, T, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    )
    for p in (8, 16, 32):
        megabytes = {
            m: sent(m, p, shape) / 1e6 for m in ("megatron", "ring", "ulysses")
        }
        print(
            f"{name:<15} {p:>2} ranks: "
            + "".join(f"{m} {b:>6.0f}   " for m, b in megabytes.items())
        )

# %% [markdown]
# Four of five devices are the same; InfiniBand's 149.5 needs blocks of 24.9 thousand tokens, where the table has 24.5 and $312/12.5$ is 24.96.
#
# With as many key/value heads as query heads (7B) Ulysses sends least, and less the more ranks there are. With 8 for 128 (405B)
# keys and values are so small that the ring sends less, up to 16 ranks. Llama 3 was trained on 131,072 tokens over 16 ranks, and its
# authors simply gather keys and values: they are small, is one of their two reasons (Llama Team 2024, section 3.3.2).
#
# <details><summary>For the curious: the bytes that were sent</summary>
#
# By the ledger and by formula, in the folded cell. The ring sends $K$ and $V$ $p-1$ times, and in the backward pass their gradients $p$ times;
# Ulysses swaps $(p-1)/p$ of $q$, $k$, $v$ and the output.
#
# </details>

# %% tags=["hide-cell"]
n, p = 64, 4  # as in the timelines above
shape = AttentionShape(B=1, T=n, H=4, K=2, D=8)
cut = shards(n, p, "contiguous")
for method, attention in (
    ("ring", lambda comm: RingAttention(comm, cut)),
    ("ulysses", lambda comm: UlyssesAttention(comm, [len(c) for c in cut])),
):
    world = World(p)
    world.run(
        lambda comm, a=attention: (
            a(comm)(*(take(t, cut, comm.rank, 2).requires_grad_() for t in inputs))
            .sum()
            .backward()
        )
    )
    predicted = sent(method, p, shape, itemsize=4) + sent(
        method, p, shape, backward=True, itemsize=4
    )
    compare(
        world.ledger.per_rank(),
        [predicted] * p,
        f"{method}: bytes that a rank sends, forward and backward",
        tol=0,
    )

# %% [markdown]
# ## What to keep
#
# ```python
# def merge(o_a, l_a, o_b, l_b):              # outputs and log-sum-exps of two pieces
#     lse = torch.logaddexp(l_a, l_b)
#     safe = lse.clamp(min=-1e30)             # −∞ where a query saw no key
#     o = (l_a - safe).exp()[..., None] * o_a + (l_b - safe).exp()[..., None] * o_b
#     return o, lse
# ```
#
# Cut over $p$ ranks, a text of any length is trained exactly, and a rank keeps $1/p$: 114 GB of 911 on 8; tensor parallelism
# alone leaves 354. Under a causal mask the contiguous cut makes the slowest of 4 ranks work 1.74 shares of
# 64 tokens, and 1.75 of very many; zigzag makes it 1.0, in every step.
#
# **Use it** when one text does not fit: a ring for any number of heads, Ulysses where heads divide and are many, Megatron's way on top of tensor parallelism.
# **Not** for short texts: then cut the batch, which sends nothing in attention.
#
# <details><summary>What must travel with an output so that it can be merged?</summary>
#
# Its log-sum-exp, one number per query and head.
#
# </details>
#
# <details><summary>Why is the contiguous cut unfair under a causal mask?</summary>
#
# A late token looks at more keys than an early one, so the rank with the last piece has nearly twice the fair share of the work.
#
# </details>
#
# <details><summary>Why do the gradients of K and V need one hop more than K and V?</summary>
#
# They are complete only after the last rank has added its part, and have then to go home to the rank that owns the keys.
#
# </details>
#
# Now write it yourself: [Exercises](../../work/05-parallelism/06-sequence.ipynb).
#
# References: [Korthikanti et al. 2022](https://arxiv.org/abs/2205.05198 "korthikanti2022reducing"),
# [Liu et al. 2023](https://arxiv.org/abs/2310.01889 "liu2023ring"), [Jacobs et al. 2023](https://arxiv.org/abs/2309.14509
# "jacobs2023ulysses"), [Brandon et al. 2023](https://arxiv.org/abs/2311.09431 "brandon2023striped"), [Llama Team
# 2024](https://arxiv.org/abs/2407.21783 "llama2024herd"); the merge of softmaxes is that of [Milakov & Gimelshein
# 2018](https://arxiv.org/abs/1805.02867 "milakov2018online").
