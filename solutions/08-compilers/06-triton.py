# %% [markdown]
# # Solutions: Triton
#
# Two kernels, the order of their programs, and what lies below: who holds which number. Kernels run in the course's interpreter, `launch(kernel, grid, …)`. It runs every program of the grid, counts what is moved, and refuses what a GPU would do in silence: to read beyond a
# tensor, and to store where another program stores or reads. Names are Triton's:
#
# | in a kernel | is |
# |---|---|
# | `tl.program_id(0)` | the number of this program along the first axis of the grid |
# | `tl.arange(0, 8)` | the block 0, 1, …, 7; sizes are powers of 2. `[:, None]` makes it a column, `[None, :]` a row |
# | `x_ptr + offsets` | addresses: of x's first number, moved by a block of offsets |
# | `tl.load(addresses, mask=…, other=…)` | a block; where the mask is false nothing is read, and `other` stands there. Without `other` it is undefined (here NaN) |
# | `tl.store(addresses, block, mask=…)` | writes a block |
# | `tl.max(x, axis=0)`, `tl.sum(x, axis=0)`, `tl.exp(x)` | as in NumPy |
#
# Stuck? `check.hint("add_bias")` shows a hint, and the next one when it is called again.

# %%
import itertools

from llmlab.checks.compilers.triton import check
from llmlab.compilers.triton_kernels import tl

# %% [markdown]
# ## Exercise 1: add_bias
# ●●○○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# $y = x + b$, where x has T rows of d numbers, and b has d, one per column. The grid is two-dimensional: program $(i, j)$ computes rows $i \cdot$ ROWS to $i \cdot$ ROWS + ROWS − 1 and columns $j \cdot$ COLS to $j \cdot$ COLS + COLS − 1. In memory, rows of x lie `stride` numbers apart (x may
# be a part of a wider tensor); rows of y lie d apart. T and d need not be multiples of the block's sizes, so what lies beyond must be masked, in loads and in the store.


# %% tags=["exercise"]
def add_bias(x_ptr, b_ptr, y_ptr, T, d, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y = x + b, one block of it."""
    # BEGIN SOLUTION
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    there = (row < T) & (col < d)
    x = tl.load(x_ptr + row * stride + col, mask=there)
    b = tl.load(b_ptr + col, mask=col < d)
    tl.store(y_ptr + row * d + col, x + b, mask=there)
    # END SOLUTION


# %% tags=["check"]
check.add_bias(add_bias)

# %% [markdown] tags=["solution"]
# A column of row numbers plus a row of column numbers is a block of addresses: everything two-dimensional in Triton is made of these two. No `other` is needed here, for what is masked off in x is masked off in y as well. The check of columns alone would not do: the next
# row's numbers lie behind the last column, and a program would overwrite what another one has computed.

# %% [markdown]
# ## Exercise 2: softmax_row
# ●●○○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# The softmax of each row, $y_c = e^{x_c - \max x} / \sum_c e^{x_c - \max x}$. The grid has one program per row. A row has d numbers and is loaded **once**, as one block of COLS numbers, the next power of 2. Rows of x lie `stride` apart, those of y d. Whatever stands in the block beyond the
# row must change neither the maximum nor the sum, however low the numbers of the row are.


# %% tags=["exercise"]
def softmax_row(x_ptr, y_ptr, d, stride, COLS: tl.constexpr):
    """The softmax of one row."""
    # BEGIN SOLUTION
    row = tl.program_id(0)
    col = tl.arange(0, COLS)
    x = tl.load(x_ptr + row * stride + col, mask=col < d, other=float("-inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * d + col, e / tl.sum(e, axis=0), mask=col < d)
    # END SOLUTION


# %% tags=["check"]
check.softmax_row(softmax_row)

# %% [markdown] tags=["solution"]
# −∞ is what a maximum and a sum of exponentials do not see: it is below every number, and $e^{-\infty} = 0$. PyTorch, one operation at a time, would read and write the row five times; here it is read once and written once, and everything between happens on the chip.

# %% [markdown]
# ## Exercise 3: grouped
# ●●●○○ difficulty · ●●●●○ importance · 12 minutes · 2 points
#
# A product has `down` × `across` tiles, and program number `pid` computes tile (i, j). Programs with neighbouring numbers run at the same time, and those in one row of tiles load the same rows, those in one column the same columns. So that few of both are needed at a time, the tiles are taken in
# groups of `group` rows: the group's first column from top to bottom, then its second column, and so on; then the next group. The last group has fewer rows where `group` does not divide `down`. Return (i, j).


# %% tags=["exercise"]
def grouped(pid: int, down: int, across: int, group: int) -> tuple[int, int]:
    """Tile (i, j) of program `pid`."""
    # BEGIN SOLUTION
    per_group = group * across
    first = pid // per_group * group
    height = min(down - first, group)
    place = pid % per_group
    return first + place % height, place // height
    # END SOLUTION


# %% tags=["check"]
check.grouped(grouped)

# %% [markdown] tags=["solution"]
# Nine programs in a row of tiles need 1 row and 9 columns of tiles; in a square of 3 × 3 they need 3 and 3. The order changes no result and no program, only which of them run together, so that they find in the cache what another one has loaded.

# %% [markdown]
# ## Exercise 4: owners
# ●●●○○ difficulty · ●●●○○ importance · 20 minutes · 3 points
#
# A linear layout says which element of a block each register of each thread holds. `register`, `lane` and `warp` are lists of steps (row, col), one per bit: an index with n bits has n steps, so there are $2^n$ indices. The element is the combination, by exclusive or (`^`, for row and
# col each), of the steps of all bits that are 1, in the register's, the lane's and the warp's index; bit 0 is the lowest. Return the list of all triples (register, lane, warp) that hold the element (row, col), in any order. Several threads may hold the same element.


# %% tags=["exercise"]
def owners(
    register: tuple, lane: tuple, warp: tuple, row: int, col: int
) -> list[tuple[int, int, int]]:
    """All (register, lane, warp) that hold the element."""
    # BEGIN SOLUTION
    parts = (register, lane, warp)
    found = []
    for place in itertools.product(*(range(1 << len(steps)) for steps in parts)):
        at = (0, 0)
        for steps, index in zip(parts, place, strict=True):
            for bit, (down, right) in enumerate(steps):
                if index >> bit & 1:
                    at = (at[0] ^ down, at[1] ^ right)
        if at == (row, col):
            found.append(place)
    return found
    # END SOLUTION


# %% tags=["check"]
check.owners(owners)

# %% [markdown] tags=["solution"]
# This tries all threads. The compiler inverts the matrix instead: bits of the element = M · bits of the place, with sums without carry, so Gauss's elimination finds one place, and what M maps to zero gives the others. That is `Linear.owners`.
