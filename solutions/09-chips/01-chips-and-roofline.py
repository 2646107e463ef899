# %% [markdown]
# # Solutions: Chips and roofline
#
# Four functions with which one reads a data sheet: bring the printed figure into units that can be compared, count a product, find the batch from which a chip computes instead of waiting, and put chips in an order.
#
# Stuck? `check.hint("to_si")` shows a hint, and the next one when it is called again.

# %%
import math

from llmlab.checks.chips.chips_and_roofline import check

# %% [markdown]
# ## Exercise 1: to_si
# ●●○○○ difficulty · ●●●●● importance · 12 minutes · 2 points
#
# Bring a printed figure into dense FLOP per second, bytes, or bytes per second in one direction. A unit is a prefix (`G`, `T`, `P`, or `Gi`, which is $2^{30}$) and a base:
#
# | base | counts |
# |---|---|
# | `FLOP/s`, `OPS` | one operation |
# | `MAC/s` | a product and a sum: two |
# | `B`, `B/s` | bytes |
# | `bit/s` | bits |
#
# `kind` says how the figure is to be read: `""`, `"dense"` and `"one way"` as it stands; `"sparse 2:4"` counts twice as many products as are computed; `"both ways"` adds both directions of a link; with `"unstated"` nobody can tell: return `None`.


# %% tags=["exercise"]
def to_si(value: float, unit: str, kind: str = "") -> float | None:
    """Dense FLOP/s, bytes or bytes/s one way; None if it is not stated."""
    # BEGIN SOLUTION
    if kind == "unstated":
        return None
    prefixes = {"Gi": 2**30, "G": 1e9, "T": 1e12, "P": 1e15}
    bases = {"FLOP/s": 1, "OPS": 1, "MAC/s": 2, "B": 1, "B/s": 1, "bit/s": 1 / 8}
    kinds = {"sparse 2:4": 1 / 2, "both ways": 1 / 2}
    prefix = next(each for each in prefixes if unit.startswith(each))
    base = unit.removeprefix(prefix)
    return value * prefixes[prefix] * bases[base] * kinds.get(kind, 1)
    # END SOLUTION


# %% tags=["check"]
check.to_si(to_si)

# %% [markdown] tags=["solution"]
# `Gi` stands before `G` in the dict, for `"GiB".startswith("G")` is true as well. Four of these factors are 2, and one data sheet may need two of them at once: a sparse figure in operations of MACs would be the same number as a dense one in FLOP, and would look right.

# %% [markdown]
# ## Exercise 2: product
# ●○○○○ difficulty · ●●●●● importance · 8 minutes · 2 points
#
# $y = xW$ with $x$ of shape $(m, k)$ and $W$ of shape $(k, n)$. Return the FLOPs, a product and a sum for each term, and the bytes that go over the memory at least: $x$ and $W$ are read once, $y$ is written once. Their numbers have `x_bytes`, `w_bytes` and `y_bytes` bytes each.


# %% tags=["exercise"]
def product(
    m: int, k: int, n: int, x_bytes: float, w_bytes: float, y_bytes: float
) -> tuple[float, float]:
    """(FLOPs, bytes) of x (m, k) times W (k, n)."""
    # BEGIN SOLUTION
    moved = m * k * x_bytes + k * n * w_bytes + m * n * y_bytes
    return 2 * m * k * n, moved
    # END SOLUTION


# %% tags=["check"]
check.product(product)

# %% [markdown] tags=["solution"]
# Each number of $y$ is a sum of $k$ products that starts from zero: $k$ products, $k$ sums. With $m = 1$ there are two FLOPs for each number of $W$: whatever the shape, a vector meets every weight once.

# %% [markdown]
# ## Exercise 3: smallest_batch
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# One row of $x$ waits for the whole of $W$; a thousand rows share that wait. Return the smallest whole number of rows $m$, at least 1, for which computing $xW$ takes as long as moving $x$, $W$ and $y$, or longer. `peak` is in FLOP/s, `bandwidth` in bytes/s. But each row also brings bytes of its own, $k$ numbers in and $n$ out: where these alone take as long as the row's FLOPs, or longer, no number of rows is enough: return `None`.


# %% tags=["exercise"]
def smallest_batch(
    k: int,
    n: int,
    peak: float,
    bandwidth: float,
    x_bytes: float,
    w_bytes: float,
    y_bytes: float,
) -> int | None:
    """The first number of rows at which computing takes as long as moving."""
    # BEGIN SOLUTION
    a_row = 2 * k * n / peak - (k * x_bytes + n * y_bytes) / bandwidth  # s
    weights = k * n * w_bytes / bandwidth  # s
    if a_row <= 0:
        return None
    return math.ceil(weights / a_row)
    # END SOLUTION


# %% tags=["check"]
check.smallest_batch(smallest_batch)

# %% [markdown] tags=["solution"]
# $2mkn/\pi \ge (m k b_x + k n b_w + m n b_y)/\beta$, solved for $m$. For large $k$ and $n$ the bytes of the rows do not matter, and what is left is $\pi b_w / 2\beta$: the ridge for numbers of two bytes. A narrow product never gets there: it has too few FLOPs for the numbers that it takes in and gives out.

# %% [markdown]
# ## Exercise 4: rank
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# `chips` says for each name `(peak, bandwidth, memory)`. A piece of work has `flops` to compute and `moved` bytes to move, and `held` bytes must lie in memory all the time. Of each chip's memory only a share can be used for them: `free`, 0.9 for example. Take as many chips of one kind as hold them, and no more. They share the work evenly, and their links cost nothing. Return tuples `(name, chips, chip-seconds)`: how many there are, and seconds times chips, which is what one pays for. The fewest chip-seconds come first.


# %% tags=["exercise"]
def rank(
    flops: float,
    moved: float,
    held: float,
    chips: dict[str, tuple[float, float, float]],
    free: float,
) -> list[tuple[str, int, float]]:
    """(name, chips, chip-seconds) of each kind of chip, the fewest first."""
    # BEGIN SOLUTION
    rows = []
    for name, (peak, bandwidth, memory) in chips.items():
        count = math.ceil(held / (free * memory))
        seconds = max(flops / peak, moved / bandwidth) / count
        rows.append((name, count, seconds * count))
    return sorted(rows, key=lambda row: row[2])
    # END SOLUTION


# %% tags=["check"]
check.rank(rank)

# %% [markdown] tags=["solution"]
# The number of chips goes away: twice as many take half as long. So memory does not decide what a token costs, as long as links are free; they are not, and how much they take is a lesson of its own, Clusters and networks. What memory decides is the least that one has to buy.
