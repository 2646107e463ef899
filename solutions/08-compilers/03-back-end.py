# %% [markdown]
# # Solutions: Back end
#
# Where a tile ends, which loops may change places, what a tile saves, how a tuner breeds, and a schedule of your own. A schedule is a list of steps, each with the names of loops and arrays.
#
# Stuck? `check.hint("tiles")` shows a hint, and the next one when it is called again.

# %%
from random import Random

from llmlab.checks.compilers.back_end import check
from llmlab.compilers.back_end import Choice, challenge
from llmlab.compilers.back_end.tuner import crossed, mutated

# %% [markdown]
# ## Exercise 1: tiles
# ●○○○○ difficulty · ●●●●○ importance · 8 minutes · 2 points
#
# A loop of `extent` iterations is cut into tiles of `size`. Return a list of pairs `(start, stop)`, one for each tile, in their order: the first iteration of the tile, and the first that is not in it, as `range` takes them. Every iteration is in one tile, and none goes beyond the loop: where `size` does not divide, the last tile is shorter.


# %% tags=["exercise"]
def tiles(extent: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of each tile."""
    # BEGIN SOLUTION
    return [(i, min(i + size, extent)) for i in range(0, extent, size)]
    # END SOLUTION


# %% tags=["check"]
check.tiles(tiles)

# %% [markdown] tags=["solution"]
# The `min` is what costs a compiler most work here. In a loop of a thousand tiles it is needed once, and a test in each iteration would be in the way of lanes. So code generation writes the outer loop twice: once over the whole tiles, whose length is a number, and once for the rest.

# %% [markdown]
# ## Exercise 2: legal
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# A statement in loops reads what another iteration has written. The **distance** says how many iterations later it reads, for each loop, the outermost first: `(1, -1)` is the next iteration of the outer loop, one earlier of the inner one. May the loops be put into the order `order`, where `order[0]` is the number of the old loop that becomes the outermost?
# They may if the reader still comes after the writer for each distance of the list: the first number of it that is not 0, in the new order, is above 0. A distance of zeros is one iteration, in which the order does not change. Return True or False.


# %% tags=["exercise"]
def legal(distances: list[tuple[int, ...]], order: tuple[int, ...]) -> bool:
    """Whether every dependence still points forward."""
    # BEGIN SOLUTION
    for distance in distances:
        moved = tuple(distance[loop] for loop in order)
        if moved < (0,) * len(moved):
            return False
    return True
    # END SOLUTION


# %% tags=["check"]
check.legal(legal)

# %% [markdown] tags=["solution"]
# Tuples are compared from the left, which is the order in which loops run. The package's `dependence` does the same with signs alone (`<`, `=`, `>`), since a distance need not be one number: two indices may meet at many.

# %% [markdown]
# ## Exercise 3: product_traffic
# ●●○○○ difficulty · ●●●●● importance · 12 minutes · 3 points
#
# $C = AB$ with $A$ of $n \times k$ and $B$ of $k \times m$ numbers, in fp32. A block of `rows` × `columns` numbers of $C$ stays in registers while all of $k$ runs; then it is written. For each block, its rows of $A$ and its columns of $B$ come from memory (nothing stays in a cache from block to block), and blocks at the end of $C$ are smaller. How many bytes are moved?


# %% tags=["exercise"]
def product_traffic(n: int, k: int, m: int, rows: int, columns: int) -> int:
    """Bytes read and written."""
    # BEGIN SOLUTION
    times_a = -(-m // columns)  # blocks side by side
    times_b = -(-n // rows)  # blocks one below the other
    return 4 * (n * k * times_a + k * m * times_b + n * m)
    # END SOLUTION


# %% tags=["check"]
check.product_traffic(product_traffic)

# %% [markdown] tags=["solution"]
# A smaller block at the end reads fewer rows, so that all of $A$ is read exactly as often as there are blocks side by side. With blocks of one number it would be $2nkm$ numbers, what the naive loop moves; a block of $r \times c$ divides the two parts by $c$ and by $r$. The same formula holds one level up, for tiles that stay in a cache.

# %% [markdown]
# ## Exercise 4: next_generation
# ●●●○○ difficulty · ●●●○○ importance · 20 minutes · 4 points
#
# An evolutionary tuner has measured some choices: `measured` maps each `Choice` to its seconds (infinite, if it could not be run). Return a list of `size` new ones to run next:
#
# 1. Parents are the `best` fastest choices.
# 2. A child has two parents, drawn with `random.choice`; `crossed(a, b, random)` mixes their knobs, and `mutated(choice, random)` draws one knob anew. Do both.
# 3. No child was measured before, and no two are the same.
#
# Draw with `random` alone: with the same seed, the same children come again. There are always enough choices left.


# %% tags=["exercise"]
def next_generation(
    measured: dict[Choice, float], size: int, random: Random, best: int = 4
) -> list[Choice]:
    """Children of the fastest."""
    # BEGIN SOLUTION
    parents = sorted(measured, key=lambda choice: measured[choice])[:best]
    children = []
    while len(children) < size:
        a, b = random.choice(parents), random.choice(parents)
        child = mutated(crossed(a, b, random), random)
        if child not in measured and child not in children:
            children.append(child)
    return children
    # END SOLUTION


# %% tags=["check"]
check.next_generation(next_generation)

# %% [markdown] tags=["solution"]
# Crossing brings together what was good in two; mutation brings in what none had. A search with crossing alone ends where its first guesses were. What was measured is never measured again: a run costs a compilation, a draw costs nothing.

# %% [markdown]
# ## Exercise 5, the challenge: an attention row by schedule alone
# ●●●●● difficulty · ●●●●○ importance · 45 minutes · 6 points
#
# `challenge.program()` is the part's attention row, 192 keys of width 32, one loop nest for each operation. Print it. On a simple machine (a cache of 4 kB, 16 registers of 8 lanes) it moves 452,544 bytes in 193,054 cycles; K and V alone are 49,152 bytes. Return a schedule, a list of steps, with which it moves at most **56,000 bytes** in at most **29,000 cycles**.
#
# These are the steps:
#
# | step | what becomes of the program |
# |---|---|
# | `("tile", loop, size)` | `loop` becomes `loop_o`, over tiles, around `loop_i`, of `size` iterations |
# | `("reorder", loop, …)` | loops directly inside each other stand in this order |
# | `("unroll", loop)`, `("vectorise", loop)`, `("parallel", loop)` | its iterations are written out, are lanes of a register, or are shared among threads |
# | `("pack", array, loop)` | what an iteration of `loop` reads of the array is copied side by side before |
# | `("cache", array, loop)` | what an iteration of `loop` computes of the array stays in registers until its end. Here and in `pack`, `""` for `loop` means the whole program |
# | `("merge", first, second)` | two loops one after the other become the first |
# | `("move", loop, before)` | a loop goes up to before another one |
# | `("inline", array)` | is computed where it is read, and not written |
# | `("partial_sums", loop, at)` | one sum for each iteration of `loop`; at the end of an iteration of `at` they are added |
# | `("prefetch", array, elements)` | lines are asked for so far before they are read |
#
# `challenge.judge(schedule)` says what a schedule reaches, and `challenge.seconds(schedule)` how long it takes here as machine code. Only the first counts. Loops that do not divide are judged, too: 37 keys, and 11. The names of loops after `tile("k0", 8)` are `k0_o` and `k0_i`; of the copies that steps make, the printed program tells the names (`print(challenge.scheduled(schedule))`).


# %% tags=["exercise"]
def row_schedule() -> list[tuple]:
    """The steps."""
    # BEGIN SOLUTION
    return [
        # a score: eight lanes along the key, eight sums, which are added at the end
        ("tile", "k0", 8),
        ("partial_sums", "k0_i", "j0"),
        ("vectorise", "k0_i"),
        ("vectorise", "t0_k0_i_zero"),
        ("unroll", "k0_o"),
        ("unroll", "t0_k0_i_sum"),
        # zero, sum and scale of a score in one loop, then the largest so far
        ("merge", "zj0", "j0"),
        ("merge", "zj0", "j1"),
        ("cache", "t0", "zj0"),
        ("move", "zj2", "zj0"),
        ("merge", "zj0", "k2"),
        # the exponentials in lanes, and so the division
        ("inline", "t3"),
        ("tile", "j4", 8),
        ("vectorise", "j4_i"),
        ("tile", "j6", 8),
        ("vectorise", "j6_i"),
        # the values row by row; the result stays in registers
        ("reorder", "k7", "j7"),
        ("tile", "j7", 8),
        ("vectorise", "j7_i"),
        ("unroll", "j7_o"),
        ("tile", "zj7", 8),
        ("vectorise", "zj7_i"),
        ("unroll", "zj7_o"),
        ("cache", "t7", ""),
    ]
    # END SOLUTION


# %% tags=["check"]
check.row_schedule(row_schedule)

# %% tags=["solution"]
for name, steps in (("naive", []), ("scheduled", row_schedule())):
    score = challenge.judge(steps)
    print(f"{name:10} {score.traffic:8,} bytes {score.cycles:8,} cycles")

# %% tags=["solution", "nbval-ignore-output"]
naive, scheduled = challenge.seconds([]), challenge.seconds(row_schedule())
print(f"real time on this machine: {1e6 * naive:.0f} µs, {1e6 * scheduled:.0f} µs")

# %% [markdown] tags=["solution"]
# One `reorder` does most for the traffic: the naive loop goes down the columns of V, and each number brings a whole line of 64 bytes that is gone again before its neighbour is wanted. The other steps are for the cycles: lanes everywhere, sums that do not wait for each other, and arrays that are never written. To divide each weight before
# the product, in lanes of its own, is 24 divisions; inlined into the product it would be 768. The arithmetic that FlashAttention changes, a softmax in one pass, is nothing that a schedule could do: it is another program.
