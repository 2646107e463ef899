# %% [markdown]
# # Solutions: Clusters and networks
#
# Four functions with which one argues about a network: what a hash does to flows, how links are shared, how long an all-reduce takes in a placement, and what a checkpoint costs.
#
# Stuck? `check.hint("fill")` shows a hint, and the next one when it is called again.

# %%
from llmlab.checks.chips.clusters_and_networks import check

# %% [markdown]
# ## Exercise 1: ecmp_seconds
# ●●○○○ difficulty · ●●●●● importance · 12 minutes · 2 points
#
# A switch has `ports` upward, each with its rate in bytes per second; a rate of 0 means that the cable is down. It numbers the ports that are up from 0, in order, and sends a flow to the one whose number is the flow's hash modulo how many are up. `hashes` and `sizes` (bytes) belong to the flows, in the same order. All flows start together, and a port is never idle as long as one of its flows has bytes left. Return the seconds until the last flow is through. Leave the lists as they are.


# %% tags=["exercise"]
def ecmp_seconds(hashes: list[int], sizes: list[float], ports: list[float]) -> float:
    """When the last flow is through, if a hash chooses their ports."""
    # BEGIN SOLUTION
    up = [i for i, rate in enumerate(ports) if rate > 0]
    load = [0.0] * len(ports)
    for value, size in zip(hashes, sizes, strict=True):
        load[up[value % len(up)]] += size
    return max(load[i] / ports[i] for i in up)
    # END SOLUTION


# %% tags=["check"]
check.ecmp_seconds(ecmp_seconds)

# %% [markdown] tags=["solution"]
# The hash knows neither bytes nor rates. When a cable goes down, `len(up)` changes, and with it the port of nearly every flow, also of those that were never on that cable: a network that was tuned yesterday has other collisions today.

# %% [markdown]
# ## Exercise 2: fill
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# One step on the way to max–min fair rates. `ways[f]` are the numbers of the links that flow f goes over, `capacity[l]` is what link l can carry. `rates[f]` is the flow's rate (perhaps 0) if it has stopped rising, else `None`; at least one flow still rises. All that rise have the same rate, and it grows until a link is full. That link's level is what stopped flows leave of it, divided by how many flows rise on it; the link with the lowest level is full first. Return a new list: flows that rise over this link get the level as their rate; all others stay as they are. If several links have the lowest level, the flows of all of them stop.


# %% tags=["exercise"]
def fill(
    ways: list[list[int]], rates: list[float | None], capacity: list[float]
) -> list[float | None]:
    """Rates after the next link is full."""
    # BEGIN SOLUTION
    levels = {}
    for link, room in enumerate(capacity):
        there = [rates[f] for f, way in enumerate(ways) if link in way]
        rising = there.count(None)
        if rising:
            levels[link] = (room - sum(r for r in there if r is not None)) / rising
    level = min(levels.values())
    full = {link for link in levels if levels[link] == level}
    return [
        level if rate is None and full & set(way) else rate
        for way, rate in zip(ways, rates, strict=True)
    ]
    # END SOLUTION


# %% tags=["check"]
check.fill(fill)

# %% [markdown] tags=["solution"]
# Repeat it until no `None` is left, and you have the simulator's rates. The order matters: a flow that stops at a narrow link leaves more to others on its wide ones, so their level is known only afterwards. That is why "each flow gets the least of its shares" is not fair, and leaves links half empty.

# %% [markdown]
# ## Exercise 3: ring_seconds
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# A ring all-reduce of `n` bytes over leaves and spines. Rank r is on host `hosts[r]`, and host h on leaf `h // per_leaf`. In each of the $2(p - 1)$ steps every rank sends $n / p$ bytes to the next rank, the last to the first; a step ends when its slowest message has arrived. A message is never faster than `host_rate`. A leaf has `leaf_rate` bytes per second to all spines together, and as much back; packets are sprayed, so the messages that leave a leaf in one step share this evenly. In a ring as many enter a leaf as leave it, so it is enough to count those that leave. Each cable adds `hop` seconds to a message: two cables if it stays on its leaf, four if not. If no message leaves its leaf, all take two.


# %% tags=["exercise"]
def ring_seconds(
    hosts: list[int],
    per_leaf: int,
    n: float,
    host_rate: float,
    leaf_rate: float,
    hop: float,
) -> float:
    """Seconds of the all-reduce in this placement."""
    # BEGIN SOLUTION
    p = len(hosts)
    leaving: dict[int, int] = {}
    for r, host in enumerate(hosts):
        leaf, other = host // per_leaf, hosts[(r + 1) % p] // per_leaf
        if leaf != other:
            leaving[leaf] = leaving.get(leaf, 0) + 1
    if not leaving:
        return 2 * (p - 1) * (n / p / host_rate + 2 * hop)
    rate = min(host_rate, leaf_rate / max(leaving.values()))
    return 2 * (p - 1) * (n / p / rate + 4 * hop)
    # END SOLUTION


# %% tags=["check"]
check.ring_seconds(ring_seconds)

# %% [markdown] tags=["solution"]
# The order of the ranks is worth as much as cables. Sorted by leaf, one message leaves each leaf, however many hosts it has: oversubscription costs nothing. Dealt out in turn, all of them leave.

# %% [markdown]
# ## Exercise 4: checkpoint
# ●●○○○ difficulty · ●●●●○ importance · 12 minutes · 2 points
#
# A model has `parameters` parameters, and a checkpoint holds `each` bytes of each of them. `writers` hosts write equally much at the same time, with cards of `gbit` Gbit per second ($10^9$ bits). The network between them and the storage is oversubscribed `over` times: it carries that much less than all cards together. The storage takes `storage` bytes per second in all. Bytes flow through network and storage at once. Training waits meanwhile, and then goes on for `every` seconds until the next checkpoint. Return the seconds of a checkpoint, and the share of all time that goes into checkpoints.


# %% tags=["exercise"]
def checkpoint(
    parameters: float,
    each: float,
    writers: int,
    gbit: float,
    over: float,
    storage: float,
    every: float,
) -> tuple[float, float]:
    """(seconds of a checkpoint, share of all time)."""
    # BEGIN SOLUTION
    network = writers * gbit * 1e9 / 8 / over
    seconds = parameters * each / min(network, storage)
    return seconds, seconds / (seconds + every)
    # END SOLUTION


# %% tags=["check"]
check.checkpoint(checkpoint)

# %% [markdown] tags=["solution"]
# With thousands of hosts the storage is the narrow place, with a few the network. What the formula leaves out: files must be opened, one slow disk holds up everybody, and a second job writes at the same time.

# %% [markdown]
# ## Exercise 5, the challenge: a placement with two cables down
# ●●●●● difficulty · ●●●●○ importance · 45 minutes · 6 points
#
# Qwen2.5-14B is trained on nodes of four A100, with 100 Gbit/s for each GPU up to the node's leaf. Each leaf has a cable of 100 Gbit/s to each of four spines. Rank `job.rank(t, s, d)` is part t of stage s of replica d. GPUs are numbered node after node, leaf after leaf: `cluster.leaf(gpu)`. In a step the GPUs compute; tp groups sum inside of each layer; neighbouring stages exchange activations; at the end the ranks (t, s, ·) sum their gradients, in a ring in the order of d. All groups of a kind send at the same time and share links, packets are sprayed, and nothing else overlaps. The docstring of `challenge` has the formulas.
#
# Two cables between leaves and spines are down: `cluster.down`, and `cluster.up(leaf)` is how many a leaf has left. Return a list in which `placement[rank]` is the GPU of each rank. It is judged in the three cases of `challenge.CASES`, each with its `bound`; the first must take at most **2.52 s**. Rank r on GPU r (tp-pp-dp) takes 4.31 s, Megatron's default order (tp-dp-pp) 2.93 s, and with all cables up 2.21 s. `challenge.step(cluster, job, placement)` says what a placement takes and where, `challenge.in_order(job, "tp-dp-pp")` gives the usual one.

# %%
from llmlab.chips.clusters_and_networks import challenge


# %% tags=["exercise"]
def placement(cluster: challenge.Cluster, job: challenge.Job) -> list[int]:
    """The GPU of each rank."""
    # BEGIN SOLUTION
    worst = sorted(range(cluster.leaves), key=cluster.up)
    chain = [worst[0], *worst[2:], worst[1]]
    each = cluster.nodes * cluster.gpus
    free = iter([leaf * each + i for leaf in chain for i in range(each)])
    found = [0] * job.ranks
    for s in range(job.pp):
        for d in range(job.dp):
            for t in range(job.tp):
                found[job.rank(t, s, d)] = next(free)
    return found
    # END SOLUTION


# %% tags=["check"]
check.placement(placement)

# %% tags=["solution"]
for case in challenge.CASES:
    cluster, job = case.cluster, case.job
    tries = {
        "rank r on GPU r": challenge.in_order(job, "tp-pp-dp"),
        "tp-dp-pp": challenge.in_order(job),
        "worst leaves at the ends": placement(cluster, job),
    }
    print(f"{cluster.leaves} leaves of {cluster.nodes} nodes, {cluster.down}")
    for name, gpus in tries.items():
        seconds = challenge.step(cluster, job, gpus).seconds
        print(f"  {name:26} {seconds:.2f} s")
    least = challenge.least_seconds(cluster, job)
    print(f"  asked {case.bound:.2f} s, by cuts no less than {least:.2f} s")

# %% tags=["solution", "hide-input"]
from llmlab.course import figure, palette, plt

STAGES = (palette.blue, palette.purple, palette.green)
cluster, job = challenge.CASES[0].cluster, challenge.CASES[0].job
fig, axes = plt.subplots(2, 1, figsize=(4.8, 4.6), sharex=True)
pairs = (("tp-dp-pp", challenge.in_order(job)), ("ours", placement(cluster, job)))
for ax, (name, gpus) in zip(axes, pairs, strict=True):
    done = challenge.step(cluster, job, gpus)
    for a, b in cluster.topology.cables("leaf", "spine") + list(cluster.down):
        leaf, spine = sorted((a, b))
        ends = 3 * int(leaf.split()[1]) + 1, 2.5 * int(spine.split()[1]) + 1.5
        down = (leaf, spine) in cluster.down
        slow = set(done.worst.slowest.split(" → ")) == {leaf, spine}
        color = palette.vermillion if down or slow else palette.gray
        style = {"ls": ":" if down else "-", "lw": 3 if slow else 1.2}
        ax.plot(ends, (1, 2), color=color, **style)
    for rank in range(0, job.ranks, job.tp):
        node, s = gpus[rank] // cluster.gpus, job.stage(rank)
        ax.bar(node, 0.5, 0.9, 0.4, color=STAGES[s])
        ax.text(node, 0.65, s, ha="center", va="center", color="white")
    ax.set_title(f"{name}: {done.seconds:.2f} s")
    ax.axis("off")
figure(
    fig,
    alt=(
        "Four leaves of three nodes, coloured by stage, under four spines; a cable of"
        " leaf 1 and one of leaf 2 are down. In the usual order each of these leaves"
        " has two stages; in ours each has one."
    ),
)

# %% [markdown] tags=["solution"]
# Each box is a node with the number of its stage. Dotted cables are down; the thick one is the slowest link.
#
# Stages are laid along a chain of leaves. A leaf in the middle has parts of two stages, and two rings leave it; a leaf at an end has one ring, so it can do with fewer cables. The two worst leaves are also kept apart: between leaves that lost different spines, only the spines that both still have are left. The bound by cuts is not quite reached: a leaf next to a worst one must send that ring's messages over fewer spines. A scheduler that knows which nodes are free, and not which cables are down, cannot see any of this.
