# %% [markdown]
# # Solutions: TPU
#
# Four functions that say what a TPU's brochure leaves out: when a number is where, how many cycles a product takes, how many bytes a tile adds, and how long a torus takes for a sum.
#
# Stuck? `check.hint("when")` shows a hint, and the next one when it is called again.

# %%
import math

from llmlab.checks.chips.tpu import check

# %% [markdown]
# ## Exercise 1: when
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# An array with `rows` rows keeps a block of weights. The block is shifted in from above, a row per cycle, from cycle 0 on, until all its rows are in their places. In the next cycle row 0 of $X$ begins to enter on the left: its first number goes into row 0 of the array, and row $r$ of the array gets its number $r$ cycles after row 0. Row $m$ of $X$ follows $m$ cycles after row 0 of $X$. From then on each number moves one column to the right per cycle, and each partial sum one row down. A cell works in the cycle in which a number reaches it; column 0 is reached in the cycle of entering.
#
# Everything counts from 0. Return two cycles: the one in which row `m` of $X$ is multiplied in the cell in row `r` and column `c`, and the one in which the result of row `m` and column `c` leaves, which is the cycle in which the lowest row adds to it.


# %% tags=["exercise"]
def when(rows: int, m: int, r: int, c: int) -> tuple[int, int]:
    """(cycle in which they meet, cycle in which the result leaves below)."""
    # BEGIN SOLUTION
    meets = rows + m + r + c
    leaves = rows + m + (rows - 1) + c
    return meets, leaves
    # END SOLUTION


# %% tags=["check"]
check.when(when)

# %% [markdown] tags=["solution"]
# Rows of weights come in the cycles 0 to rows − 1. The skew exists so that a number and the partial sum from above arrive in the same cycle: both are one cycle later per row. So the cells that see row $m$ at the same time lie on a diagonal, $r + c$ = constant, and the work runs through the array as a wave.

# %% [markdown]
# ## Exercise 2: cycles
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# $Y = XW$ with $X$ $(m, k)$ and $W$ $(k, n)$ on an array of `rows` × `columns` in which weights stay, as in exercise 1. $W$ is cut into blocks of `rows` × `columns`; $k$ lies along the rows, $n$ along the columns. A block at the edge that fills a part of the array takes as long as a full one.
#
# Without a second register (`double` is `False`) a block begins when the last result of the block before has left. With it, the next block comes in while this one works: from the beginning of a block to the beginning of the next it takes as long as its $m$ rows, or as long as it takes to load the next block, `rows` cycles, whichever is longer. The first block must be loaded before anything begins, and the last result of the last block must leave. Return how many cycles there are in all.


# %% tags=["exercise"]
def cycles(m: int, k: int, n: int, rows: int, columns: int, double: bool) -> int:
    """All cycles, from the first weight that comes in to the last result."""
    # BEGIN SOLUTION
    blocks = math.ceil(k / rows) * math.ceil(n / columns)
    one = 2 * rows + columns + m - 2
    if double:
        return (blocks - 1) * max(m, rows) + one
    return blocks * one
    # END SOLUTION


# %% tags=["check"]
check.cycles(cycles)

# %% [markdown] tags=["solution"]
# The last result of a block leaves in the cycle `when(rows, m - 1, rows - 1, columns - 1)`, which is 2 rows + columns + m − 3; cycles count from 0, so there is one more. With a second register, filling and draining are paid once. What remains is max(m, rows): for one row of $X$ the array waits rows − 1 cycles of every rows for its next weights.

# %% [markdown]
# ## Exercise 3: padded_bytes
# ●○○○○ difficulty · ●●●●○ importance · 8 minutes · 2 points
#
# XLA lays arrays out in tiles of 8 × 128 numbers: the last dimension along the 128 lanes, the one before along the 8 rows. Both are filled up to whole tiles; dimensions before them stay as they are. A shape of one dimension is one row along the lanes. Return how many bytes an array takes whose numbers have `itemsize` bytes each.


# %% tags=["exercise"]
def padded_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes with the last two dimensions filled up to tiles of 8 × 128 numbers."""
    # BEGIN SOLUTION
    if len(shape) == 1:
        shape = (1, *shape)
    *others, rows, lanes = shape
    tiles = math.ceil(rows / 8) * math.ceil(lanes / 128)
    return math.prod(others) * tiles * 8 * 128 * itemsize
    # END SOLUTION


# %% tags=["check"]
check.padded_bytes(padded_bytes)

# %% [markdown] tags=["solution"]
# A head of 64 numbers takes the room of 128. Which dimension comes last is a decision that one can make: a cache of shape (heads, tokens, 64) takes twice its bytes, one of shape (heads, 64, tokens) hardly more than them.

# %% [markdown]
# ## Exercise 4: all_reduce
# ●●●●○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# A torus has `sides` chips along its axes, each at least 3, and every axis is a ring. Neighbours have a link: `link` bytes/s in each direction, both at the same time. From chip to chip it takes `hop` seconds more, however few bytes there are.
#
# *One axis.* In a ring of $n$ chips each has a shard, and all shall get all. Half of the others is nearer one way round, half the other way, so $(n-1)/2$ shards cross each link in each direction, and the furthest comes over $\lceil (n-1)/2 \rceil$ hops. Add the time of these hops and that of the bytes.
#
# *All axes.* The `total` bytes are cut into as many equal parts as there are axes, and of each part every chip has an equal share at first: the part divided by the number of chips. In the first step part 0 is gathered along axis 0, part 1 along axis 1, and so on; in each further step every part takes the next axis (after the last comes the first), and what a chip has of it by then is its shard. A step ends when its slowest part is done.
#
# That is an all-gather. A reduce-scatter is the same backwards and takes as long; an all-reduce is one after the other. Return its seconds.


# %% tags=["exercise"]
def all_reduce(total: float, sides: tuple[int, ...], link: float, hop: float) -> float:
    """Seconds until each chip has the sum of `total` bytes."""
    # BEGIN SOLUTION
    axes = len(sides)
    have = [total / axes / math.prod(sides)] * axes
    seconds = 0.0
    for step in range(axes):
        took = []
        for part in range(axes):
            n = sides[(part + step) % axes]
            took.append(hop * math.ceil((n - 1) / 2) + (n - 1) / 2 * have[part] / link)
            have[part] *= n
        seconds += max(took)
    return 2 * seconds
    # END SOLUTION


# %% tags=["check"]
check.all_reduce(all_reduce)

# %% [markdown] tags=["solution"]
# With equal sides all links work all the time, and without hops the time is total × (1 − 1/chips) / (axes × link): no algorithm is faster, since each chip must send 2 (1 − 1/chips) of the bytes over 2 × axes links. The number of chips has nearly gone away. Where the sides differ, a step waits for one of its parts, and links stand still.
