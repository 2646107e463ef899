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
# One step on the way to max–min fair rates. `ways[f]` are the numbers of the links that flow f goes over, `capacity[l]` is what link l can carry. `rates[f]` is the flow's rate if it has stopped rising, else `None`; at least one flow still rises. All that rise have the same rate, and it grows until a link is full. That link's level is what stopped flows leave of it, divided by how many flows rise on it; the link with the lowest level is full first. Return a new list: flows that rise over this link get the level as their rate; all others stay as they are. If several links have the lowest level, the flows of all of them stop.


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
# A ring all-reduce of `n` bytes over leaves and spines. Rank r is on host `hosts[r]`, and host h on leaf `h // per_leaf`. In each of the $2(p - 1)$ steps every rank sends $n / p$ bytes to the next rank, the last to the first; a step ends when its slowest message has arrived. A message is never faster than `host_rate`. A leaf has `leaf_rate` bytes per second to all spines together, and as much back; packets are sprayed, so the messages that leave a leaf in one step share this evenly. In a ring as many enter a leaf as leave it, so you need to count one of the two. Each cable adds `hop` seconds to a message: two cables if it stays on its leaf, four if not. If no message leaves its leaf, all take two.


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
