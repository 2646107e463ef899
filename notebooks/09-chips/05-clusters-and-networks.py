# %% [markdown]
# # Clusters and networks
#
# A data sheet says 400 Gbit/s per GPU, and then two flows meet on one cable. Here you build five kinds of network, send real gradients through them with a simulator of flows that is checked against packets, and find where the time goes: hashes, pauses, oversubscription, storage. At the end you have written the arithmetic by which flows share a link.

# %% tags=["hide-input"]
import numpy as np
import torch

from llmlab.checks.chips.clusters_and_networks import check
from llmlab.chips import clusters_and_networks as cn
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
from llmlab.models import real_model
from llmlab.models.accounting import parameters
from llmlab.models.chips import chip
from llmlab.models.presets import preset
from llmlab.parallelism.collectives import ring as rings

# %% [markdown]
# ## What it costs
#
# Data-parallel training sums gradients over all hosts in every step. 64 hosts in 8 racks, one network card of 400 Gbit/s each; every rack's switch (a **leaf**) has 8 cables up, to 8 **spines**: as many as down to its hosts, so nothing is **oversubscribed**. The scheduler put rank 0 in the first rack, rank 1 in the second, and so on, so every message of the ring leaves its rack. The bound is the ring's time if each message had every cable for itself.

# %%
net = cn.leaf_spine(leaves=8, hosts=8, spines=8)
dealt = [leaf * 8 + host for host in range(8) for leaf in range(8)]
model = real_model.load()
GRADIENTS = {
    "SmolLM2": 2 * sum(p.numel() for p in set(model.parameters())),
    "LLaMA-7B": 2 * parameters(preset("llama-7b")),
}
alpha = 4 * cn.HOP  # four cables, a microsecond each
for name, n in GRADIENTS.items():
    bound = cn.ring_bound(64, n, alpha, cn.NDR)
    hashed = cn.ring_seconds(net, dealt, n, how="ecmp", seed=1)
    print(f"{name:9} {n / 1e9:5.2f} GB of gradients in bf16:", end=" ")
    print(f"bound {bound * 1e3:4.0f} ms, this network {hashed / bound:.1f} × as long")

# %% [markdown]
# No cable is broken and none too thin. All hosts wait, in every step.
#
# ## Predict
#
# A switch chooses one of several equally short ways by a hash of the flow's addresses and ports, so that its packets stay in order. This is **ECMP** (equal-cost multi-path).

# %%
free_guess = predict(
    "Eight flows leave a rack that has eight cables up. In how many of 10,000 hashes"
    " does every flow get a cable of its own?",
    unit="of 10,000",
)
slow_guess = predict(
    "64 messages of a ring go over 64 cables; by bad luck two of them share one, and"
    " one cable is empty. The all-reduce takes",
    choices=("1/64 longer", "1/32 longer", "half as long again", "twice as long"),
)

# %% [markdown]
# ## By hand
#
# Two racks of two hosts, two spines, cables of 1 byte/s. Four ranks on hosts 0, 2, 1, 3 sum 12 bytes in a ring: $2(4-1) = 6$ steps of $12/4 = 3$ bytes. In each step two messages go up from each leaf. If each has a spine of its own, it takes 3 s; six steps, 18 s. If the hash puts both on one spine, each gets half a byte per second: 6 s, in all 36 s. Messages that share nothing are done after 3 s, and their ranks wait (hash 0).

# %%
tiny = cn.leaf_spine(2, 2, 2, bandwidth=1.0, latency=0.0)
for seed in range(5):
    step = [cn.Flow(0, 2, 3.0), cn.Flow(2, 1, 3.0), cn.Flow(1, 3, 3.0)]
    step.append(cn.Flow(3, 0, 3.0))
    run = cn.simulate(tiny, step, seed=seed)
    total = cn.ring_seconds(tiny, [0, 2, 1, 3], 12.0, seed=seed)
    print(f"hash {seed}: messages take", run.finish, f"s, all-reduce {total:.0f} s")

# %% [markdown]
# ## The idea
#
# Whoever shares a full cable gets the same share of it, and what one flow cannot use (because another cable holds it back) goes to the others. Rates $x_f$ are **max–min fair** if a flow can get more only at the cost of one whose rate is no higher ([Bertsekas and Gallager 1992](https://web.mit.edu/dimitrib/www/datanets.html "bertsekas1992data")). With capacities $c_l$, they are found by filling: all flows rise together, until the first cable is full at the level
#
# $$\lambda_l = \frac{c_l - \sum_{f \text{ stopped, over } l} x_f}{\#\{f \text{ rising, over } l\}}$$
#
# Its flows stop there; the others rise on. Between two events, an arrival or a finish, rates stay as they are: the simulator jumps from event to event.

# %% tags=["hide-input"]
SHADES = [palette.light, palette.blue, palette.purple, palette.vermillion]


def flows_on(network, seed, hosts=None):
    """(messages of one step of the ring on each link)."""
    order = hosts or dealt
    pairs = zip(order, order[1:] + order[:1], strict=True)
    step = [cn.Flow(a, b, 1.0) for a, b in pairs]
    return cn.routes(network, step, seed=seed).load(network.links, np.ones(len(step)))


def picture(network, load, title):
    fig, ax = plt.subplots(figsize=(4.8, 2.9))
    leaves = [n for n in network.nodes if n.startswith("leaf")]
    spines = [n for n in network.nodes if n.startswith("spine")]
    x = {name: (i + 0.5) / len(leaves) for i, name in enumerate(leaves)}
    x |= {name: (i + 0.5) / len(spines) for i, name in enumerate(spines)}
    for a, b in network.cables("leaf", "spine"):
        worst = int(max(load[network.link(a, b)], load[network.link(b, a)]))
        shade = SHADES[min(worst, 3)]
        y = [0 if name in leaves else 1 for name in (a, b)]
        width = 0.6 if worst == 0 else 1.2 * worst
        ax.plot([x[a], x[b]], y, color=shade, lw=width, zorder=worst)
    for names, y in ((leaves, 0), (spines, 1)):
        ax.plot([x[n] for n in names], [y] * len(names), "s", color=palette.ink, ms=6)
    for worst, label in enumerate(("empty", "1 flow", "2 flows", "3 or more")):
        ax.plot([], [], color=SHADES[worst], lw=2, label=label)
    ax.text(-0.02, 1, "spines", ha="right", va="center", fontsize=9)
    ax.text(-0.02, 0, "leaves", ha="right", va="center", fontsize=9)
    ax.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, 0.0))
    ax.set(xlim=(-0.16, 1.02), ylim=(-0.1, 1.1))
    ax.set_title(title, fontsize=10)
    ax.axis("off")
    return fig


load = flows_on(net, seed=1)
fig = picture(net, load, "one step of the ring: the fuller way of each cable")
figure(
    fig,
    alt=(
        "Eight leaves below, eight spines above, 64 cables between them. A few are"
        " empty, many carry one flow in a direction or two, and some carry three."
    ),
)

# %% [markdown]
# ## Your turn
#
# One step of filling. `ways[f]` are the links of flow $f$, `rates[f]` is its rate or `None` while it rises, `capacity[l]` that of a link. Return the rates after the next link is full (if several are full at the same level, the flows of all of them stop).


# %%
def my_fill(ways, rates, capacity):
    """A new list of rates, in which flows over the next full link have theirs."""
    raise NotImplementedError("seven lines of yours")


your_turn(check.fill, my_fill)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(ways, rates, capacity):
    levels = {}
    for link, room in enumerate(capacity):
        there = [rates[f] for f, way in enumerate(ways) if link in way]
        if None in there:
            left = room - sum(rate for rate in there if rate is not None)
            levels[link] = left / there.count(None)
    level = min(levels.values())
    full = {link for link, each in levels.items() if each == level}
    return [
        level if rate is None and full & set(way) else rate
        for way, rate in zip(ways, rates, strict=True)
    ]


your_turn(check.fill, one_answer)
free_guess.settle(cn.no_collision(8, 8) * 10_000, digits=2)
slow_guess.settle("twice as long")

# %% [markdown]
# The first is the **birthday problem**: $8!/8^8$. The second is what you did by hand: a ring is as fast as its slowest message, wherever that is. One collision doubles the time of an all-reduce.
#
# ## The code
#
# The compiled part fills; around it a clock runs from event to event.

# %% tags=["hide-cell"]
show(cn.simulate, cn.routes, cn.ring_seconds, cn.hierarchical)

# %% [markdown]
# | value | unit | of |
# |---|---|---|
# | `Topology.bandwidth`, `.latency` | bytes/s, s | each link, one way |
# | `Flow(src, dst, bytes, start, after)` | bytes, s | a message, and those it waits for |
# | `Run.finish` | s | each flow: its last byte has arrived |
# | `ring_seconds(net, hosts, n)` | s | an all-reduce; `hosts[r]` is where rank r runs |
#
# Five networks for about 64 GPUs, and what each does to gradients of LLaMA-7B and to an all-to-all (experts) of a tenth of them. Cables between switches are what one pays for; `far` counts the cables from endpoint 0 to the farthest. In a fat tree every tier has as much bandwidth up as down; on rails GPU g of every node hangs on leaf g; a dragonfly is groups of switches, with a cable between any two groups.

# %% tags=["hide-input"]
NETS = {
    "leaf–spine": cn.leaf_spine(8, 8, 8),
    "fat tree": cn.fat_tree(8),
    "rails": cn.rail_optimised(8, 8, spines=4),
    "torus 4 × 4 × 4": cn.torus((4, 4, 4), bandwidth=cn.NDR),
    "dragonfly": cn.dragonfly(4, 2, 2),
}
n = GRADIENTS["LLaMA-7B"]
print(f"{'':16}endpoints  switches  cables  far  ring  all-to-all")
for name, each in NETS.items():
    ends = each.endpoints
    switches = 0 if each.forwarding else len(each.nodes) - ends
    between = each.links // 2 - (0 if each.forwarding else ends)
    if name == "rails":  # NVSwitches stand in the nodes
        switches, between = switches - 8, between - ends
    far = each.distances([0])[:ends].max()
    ring = cn.ring_seconds(each, range(64), n, "spray")
    flows = cn.as_flows(cn.all_to_all(64, n / 10), range(64))
    exchange = cn.simulate(each, flows, "ecmp", merge=0.01).seconds
    print(
        f"{name:16}{ends:9} {switches:9} {between:7} {far:4}"
        f" {ring * 1e3:4.0f} {exchange * 1e3:8.0f} ms"
    )

# %% [markdown]
# With ranks in order a ring asks for little, and all but one carry it at the speed of one card. (In the dragonfly a message to the next group shares cables inside its own with others; real ones also take longer ways round.) An all-to-all asks for everything at once. The torus has no switch at all, but six links per chip, each as fast as a card here; on rails NVLink carries what stays in a node. **InfiniBand** and **RoCE** (the same commands, over Ethernet) differ in how they route and brake, not in this table. Inside a node: NVLink 4 gives an H100 450 GB/s one way, through NVSwitches; PCIe 5 with 16 lanes 63 GB/s ($32 \cdot 16 \cdot \frac{128}{130} / 8$); a card of 400 Gbit/s, 50 GB/s.
#
# ## Against packets
#
# [ns-3](https://www.nsnam.org/) (3.44) simulates every packet of TCP. Its packets carry 536 bytes of data and 54 of headers, so our flows are larger by the headers. The paths are the same; "three on one cable" is what a hash did.

# %%
for name, case in cn.packets().items():
    small = cn.leaf_spine(2, 4, 4, case.bandwidth, latency=10e-6)
    flows = [cn.Flow(path[0], path[-1], case.on_the_wire) for path in case.paths]
    ours = cn.simulate(small, flows, seed=case.seed).finish
    theirs = torch.tensor(case.seconds, dtype=torch.float64)
    compare(torch.from_numpy(ours), theirs, name, tol=0.03)

# a schedule of the lesson on collectives, all 126 steps, each waiting for the last
order = np.random.default_rng(0).permutation(64)
sent = cn.messages(rings.all_reduce(64), [n / 64] * 64)
whole = cn.simulate(net, cn.as_flows(sent, order), seed=1, merge=0.0).seconds
steps = cn.ring_seconds(net, order, n, seed=1)
print(f"8,064 messages that wait: {whole / steps:.3f} of 126 × the slowest")

# %% [markdown]
# TCP shares a cable as fairly as our arithmetic says, within 3% (ns-3 was read every 20 ms). Rates are also equal to those of linear programs, ways to those of networkx; the tests have both. Now figures of real clusters with 8 H100 per node. `busbw`, as nccl-tests prints it, is the all-reduce's bytes turned into those that a ring moves over one link: at best the link's rate (of a node, the rate of its eight cards together). A switch that adds by itself moves fewer, so its busbw may be above the link's rate.


# %% tags=["hide-input"]
def eight_rings(nodes, n=8e9):
    """busbw of rings that enter and leave each node on a card of their own."""
    p, flows = 8 * nodes, []
    for j in range(8):
        order = []
        for node in range(nodes):
            inside = [node * 8 + (j + i) % 8 for i in range(8)]
            order += inside if node % 2 == 0 else inside[::-1]
        pairs = zip(order, order[1:] + order[:1], strict=True)
        flows += [cn.Flow(a, b, n / 8 / p) for a, b in pairs]
    seconds = cn.simulate(cn.rail_optimised(nodes), flows).seconds
    return cn.busbw(p, n, 2 * (p - 1) * seconds)


box = cn.leaf_spine(1, 8, 1, bandwidth=chip("H100").link)
one = cn.busbw(8, 8e9, cn.ring_seconds(box, range(8), 8e9))
in_switch = cn.busbw(8, 8e9, 8e9 / chip("H100").link)  # each byte up once, down once
ROWS = [
    ("8 GPUs, ring over NVLink", one, 370),
    ("8 GPUs, NVSwitch adds (NVLS)", in_switch, 480),
    ("32 GPUs, RoCE, 8 rings", eight_rings(4), 320),
]
print(f"{'busbw, GB/s':30} bound  measured")
for name, bound, measured in ROWS:
    print(f"{name:30} {bound / 1e9:5.0f} {measured:9}  {measured / bound * 1e9:.0%}")

# %% [markdown]
# The first two are what NCCL's developer expects of an H100 ([NCCL tests 212](https://github.com/NVIDIA/nccl-tests/issues/212 "nccltests2024issue212")): 450 GB/s is the line rate, and protocols take a fifth of it from the ring, more where the switch adds. The third was measured by a user ([NCCL 1221](https://github.com/NVIDIA/nccl/issues/1221 "nccl2024issue1221")). No brochure prints that fifth; a bound that you compute yourself shows it.
#
# ## The experiment
#
# The all-reduce from above for 200 hashes: what differs is only the seed. Beside it: several queue pairs per connection (each with a port, and so a hash, of its own), packets sprayed over all ways, ranks in the order of the racks, and rails. Then the birthday problem, measured over 200 hashes for two to four flows.

# %% tags=["hide-input"]
SEEDS = range(200)
bound = cn.ring_bound(64, n, alpha, cn.NDR)
slow = {
    qps: np.array(
        [
            cn.ring_seconds(net, dealt, n, seed=s, qps=qps) / bound
            for s in SEEDS[: 200 if qps == 1 else 20]
        ]
    )
    for qps in (1, 4, 16)
}
for qps, each in slow.items():
    print(
        f"ECMP, {qps:2} queue pairs: {each.mean():.2f} ± {each.std():.2f} × the bound,"
        f" {each.min():.1f} to {each.max():.1f}, {len(each)} seeds"
    )
sprayed = cn.ring_seconds(net, dealt, n, "spray") / bound
sorted_ = cn.ring_seconds(net, range(64), n, "ecmp", seed=1) / bound
print(f"sprayed: {sprayed:.2f}    ECMP, ranks in the order of the racks: {sorted_:.2f}")
rails = cn.rail_optimised(8, 8, spines=4)
sent = cn.as_flows(cn.hierarchical(8, 8, n), range(64))
both = {cn.simulate(rails, sent, seed=s, merge=0.0).seconds for s in (1, 2)}
print(f"rails, NVLink first: {max(both) / bound:.2f} with any hash", len(both) == 1)

for count in (2, 3, 4):
    up = [cn.Flow(i, 8 + i, 1.0) for i in range(count)]
    alone = 0
    for seed in range(200):
        ways = cn.routes(net, up, seed=seed)
        alone += len({int(ways.of(f)[1]) for f in range(count)}) == count
    wanted = cn.no_collision(count, 8)
    spread = (wanted * (1 - wanted) / 200) ** 0.5
    near = abs(alone / 200 - wanted) < 3 * spread
    print(f"{count} flows, 8 cables: no collision {wanted:.0%}, measured so: {near}")

fig, ax = plt.subplots(figsize=(4.8, 2.8))
edges = np.arange(0.95, 6.3, 0.1)
colors = (palette.vermillion, palette.purple, palette.blue)
for (qps, each), color in zip(slow.items(), colors, strict=True):
    share = np.full(len(each), 1 / len(each))
    label = f"{qps} queue pair" + ("s" if qps > 1 else "")
    ax.hist(each, edges, weights=share, color=color, alpha=0.85, label=label)
ax.axvline(1, color=palette.ink, lw=1, ls="--")
ax.text(0.93, 0.25, "sprayed", fontsize=9, rotation=90, ha="right")
ax.set(xlabel="all-reduce, times its bound", ylabel="share of hashes", xlim=(0.5, 6.3))
ax.legend(fontsize=9)
figure(
    fig,
    alt=(
        "Histogram of the all-reduce's time over its bound. With one queue pair it is 3"
        " or 4 for most hashes, from 2 to 6; with four about 2.2, with sixteen about"
        " 1.6. Sprayed packets reach 1."
    ),
)

# %% [markdown]
# With one queue pair the time is a whole number: that many flows on the fullest of 128 ways up and down. Queue pairs cut flows into smaller pieces that even out, slowly. Llama 3 was trained with 16 flows between two GPUs for this reason ([Llama Team 2024](https://arxiv.org/abs/2407.21783 "llama2024herd")); Meta saw all-reduces gain up to 40% ([Gangidi et al. 2024](https://engineering.fb.com/2024/08/05/data-center-engineering/roce-network-distributed-ai-training-at-scale/ "gangidi2024roce")); our ranks, spread over the racks, are the worst case. The order of ranks costs nothing and helps as much as spraying; rails need neither, because no message of their rings has a choice. (They also send less over the network: nodes sum by NVLink first.)
#
# ### Many to one
#
# In a ring nobody receives twice. In an all-to-all many send to one: **incast**. RDMA (cards that write into another host's memory) wants no packet dropped, so on Ethernet a full switch stops the one before it (**PFC**), which fills, and stops all who send through *it*, also flows that go elsewhere. **ECN** marks packets before that; DCQCN slows their senders down ([Zhu et al. 2015](https://doi.org/10.1145/2785956.2787484 "zhu2015dcqcn")). Eight senders, one receiver, and a ninth flow over the same cable to somebody else:

# %% tags=["hide-input"]
SETTINGS = {
    "nothing": cn.Switches(pfc=False, ecn=False),
    "PFC": cn.Switches(ecn=False),
    "PFC and ECN": cn.Switches(),
}
fig, (top, low) = plt.subplots(2, 1, figsize=(4.8, 3.8), sharex=True)
for (name, switches), color in zip(
    SETTINGS.items(), (palette.vermillion, palette.purple, palette.blue), strict=True
):
    trace = cn.incast(switches, seconds=10e-3)
    ms = np.arange(len(trace.queue)) / 1e3
    top.plot(ms, trace.queue / 1e6, color=color, label=name)
    mean = np.convolve(trace.victim / 1e9, np.ones(200) / 200, "valid")
    low.plot(ms[199:], mean, color=color)
    end = slice(5000, None)
    print(
        f"{name:12} receiver {trace.received[end].mean() / cn.NDR:4.0%}, ninth flow"
        f" {trace.victim[end].mean() / cn.NDR:4.0%} of its rate,"
        f" lost {trace.lost / 1e6:5,.0f} MB"
    )
top.set(ylabel="queue, MB")
top.legend(fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
low.set(ylabel="ninth flow, GB/s", xlabel="ms")
figure(
    fig,
    alt=(
        "Above, the queue: without brakes it stays at the buffer's 16 MB, with PFC near"
        " 8 MB, with ECN below 1 MB after a first peak. Below, the ninth flow: with PFC"
        " it falls to an eighth of its rate, with ECN it keeps all of it."
    ),
)

# %% [markdown]
# Without both, whatever is lost must be sent again. PFC loses nothing, but slows a flow that did no harm. ECN spares the ninth flow; at first it brakes too hard: the queue runs empty, and the receiver waits. (This is a fluid with equal senders. Meta runs its 400 Gbit/s network without DCQCN: [receivers ask for data](https://engineering.fb.com/2024/08/05/data-center-engineering/roce-network-distributed-ai-training-at-scale/ "gangidi2024roce"), so few send to one at a time.)
#
# ## Play
#
# The ring's step on 8 leaves, again. Cables go down, too: then *all* flows of that leaf are dealt anew, as the hash is modulo the cables that are up.

# %% tags=["hide-input", "slider"]
SPINES = [4, 6, 8, 12, 16]
STATES = ["hash 1", "hash 1, two down", "hash 2, two down"]


def network_of(spines: int, state: str):
    each = cn.leaf_spine(8, 8, spines)
    if "down" not in state:
        return each
    return each.without([("leaf 0", "spine 0"), ("leaf 0", "spine 1")])


def load_of(spines: int, state: str):
    each = network_of(spines, state)
    return each, flows_on(each, seed=int(state.split()[1].strip(",")))


def draw(spines: int, state: str):
    each, load = load_of(spines, state)
    title = f"{spines} spines, {state}: {load.max():.0f} × the bound"
    return picture(each, load, title)


def told(spines: int, state: str) -> str:
    most = load_of(spines, state)[1].max()
    return (
        f"{spines} spines, {state}: up to {most:.0f} flows on one cable, so the"
        f" all-reduce takes {most:.0f} times its bound."
    )


def missing(spines: int, state: str) -> str:
    if "down" not in state:
        return "all cables are up: the question is about two down"
    best = min(load_of(n, s)[1].max() for n in SPINES for s in STATES[1:])
    most = load_of(spines, state)[1].max()
    return f"{most:.0f} times the bound: there is better" if most > best else ""


explore(
    draw,
    alt=told,
    title="How many spines does a hash need?",
    challenge="Two cables are down. Find spines and hash with the fastest all-reduce.",
    missing=missing,
    start={"spines": 8, "state": "hash 1"},
    spines=SPINES,
    state=STATES,
)

# %% [markdown]
# Twice the cables do not buy one flow per cable. The opposite, fewer cables where little traffic is, can be enough: Llama 3's network has eight pods of 3,072 GPUs and a seventh of the bandwidth between them ([Llama Team 2024](https://arxiv.org/abs/2407.21783 "llama2024herd")).
#
# ### Checkpoints
#
# The last network leads to storage. Meta's had 2 TB/s, 7 at its peak, for up to 16,384 GPUs ([Llama Team 2024](https://arxiv.org/abs/2407.21783 "llama2024herd")). Weights in bf16, a master copy and Adam's moments in fp32 are 14 bytes per parameter:

# %%
held = cn.checkpoint_bytes(parameters(preset("llama-3.1-405b")))
hosts = 16_384 // 8
for rate in (2e12, 7e12):
    took, limit = cn.write_seconds(held, hosts, cn.NDR, rate, oversubscription=7)
    lost = cn.share_lost(took, every=600)
    print(
        f"{held / 1e12:.1f} TB at {rate / 1e12:.0f} TB/s: {took:.1f} s ({limit}),"
        f" {lost:.2%} of the time if every 10 minutes"
    )
few, limit = cn.write_seconds(held, 8, cn.NDR, 2e12)
print(f"written by 8 hosts only: {few:.0f} s ({limit})")

# %% [markdown]
# ## At scale
#
# ```bash
# # one pair of cards, before anything else: near 400 Gbit/s, or a cable is bad
# ib_write_bw -d mlx5_0 --report_gbits -q 4              # on one host
# ib_write_bw -d mlx5_0 --report_gbits -q 4 OTHER_HOST   # on the other
# # all of them; compare busbw with your bound, and with another order of hosts
# mpirun -np 32 -N 8 -x NCCL_IB_QPS_PER_CONNECTION=4 -x NCCL_ALGO=Ring \
#     ./build/all_reduce_perf -b 8M -e 8G -f 2 -g 1
# ```
#
# `NCCL_IB_QPS_PER_CONNECTION` is 1 by default, and is for "multi-level fabrics"; `NCCL_CROSS_NIC` decides whether a ring may change its rail ([NCCL's manual](https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html "nvidia2026ncclenv")). InfiniBand switches can route each packet by load; on Ethernet ask for that, and for what happens to packets that overtake others.
#
# The simulator runs 10,000 flows on a fat tree of 1,024 hosts in seconds: `python -m benchmarks.network`.
#
# ## What to keep
#
# ```python
# seconds = 2 * (p - 1) * (alpha + n / (p * slowest_message_rate))
# slowest_message_rate = capacity / flows_on_the_fullest_cable
# no_collision = prod(1 - i / cables for i in range(flows))
# ```
#
# **Use it** to check a network with a bound that you computed, and to place ranks. **Not** for queues of microseconds or losses: those are packets, and need a simulator of packets.
#
# <details><summary>A vendor shows 98% of line rate between two hosts. What do you ask?</summary>
#
# The same for all hosts at once, in a random order, with the number of queue pairs, with two cables down, and busbw beside its bound.
#
# </details>
#
# <details><summary>Why does one slow cable among hundreds cost everyone half?</summary>
#
# Each rank waits for its neighbour's message in every step; after a few steps all run at the pace of the slowest.
#
# </details>
#
# <details><summary>Twice as many cables, or another order of ranks?</summary>
#
# The order: sorted by rack, one message leaves each rack, and there is nothing to collide with.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/09-chips/05-clusters-and-networks.ipynb), with the part's challenge.
#
# Further reading: [Al-Fares et al. 2008](https://doi.org/10.1145/1402958.1402967 "alfares2008fattree") for fat trees, [Kim et al. 2008](https://doi.org/10.1109/ISCA.2008.19 "kim2008dragonfly") for dragonflies, [Addanki et al. 2024](https://arxiv.org/abs/2407.00550 "addanki2024spraying") on whether packets must be sprayed.
