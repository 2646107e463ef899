# %% [markdown]
# # Solutions: Ascend and other accelerators
#
# Four functions around an Ascend: where a number lies in memory, what fits beside the cube, whether a job over several servers can start, and when queues that wait for each other are done.
#
# Stuck? `check.hint("nz_offset")` shows a hint, and the next one when it is called again.

# %%
from collections import defaultdict

from llmlab.checks.chips.ascend_and_other_accelerators import check

# %% [markdown]
# ## Exercise 1: nz_offset
# ●●○○○ difficulty · ●●●●○ importance · 12 minutes · 2 points
#
# A matrix of `height` × `width` numbers is cut into fractals of `rows` × `cols`. At the lower and right edge they are filled with zeros. In NZ the fractals lie one after the other column by column (N), and the numbers within a fractal row by row (Z). Return the place of the number in row `row` and column `col`, all counted from 0.


# %% tags=["exercise"]
def nz_offset(row: int, col: int, height: int, width: int, rows: int, cols: int) -> int:
    """How many numbers lie before this one."""
    # BEGIN SOLUTION
    tall = -(-height // rows)  # fractals in a column of them
    fractal = (col // cols) * tall + row // rows
    return fractal * rows * cols + (row % rows) * cols + col % cols
    # END SOLUTION


# %% tags=["check"]
check.nz_offset(nz_offset)

# %% [markdown] tags=["solution"]
# The width is not needed: what lies to the right comes later. That is why NZ suits weights that are cut into columns for tensor parallelism: each part is one piece of memory. The height counts with its padding, so `-(-height // rows)`, which rounds up.

# %% [markdown]
# ## Exercise 2: too_small
# ●●○○○ difficulty · ●●●●○ importance · 12 minutes · 2 points
#
# A tile of a product lies in three buffers: $(m, k)$ of A in `l0a`, $(k, n)$ of B in `l0b`, and $(m, n)$ sums of C in `l0c`. All sizes are rounded up to whole fractals: $m$ and $n$ to 16, $k$ to `k0`. A number of A and B has `size` bytes, a sum of C always 4. With `double` everything lies there twice, so that one copy can be filled while the other is used. `buffers` has the bytes of each buffer. Return the list of those that are too small, in the order of `buffers`; a tile may fill a buffer to the last byte.


# %% tags=["exercise"]
def too_small(
    m: int, k: int, n: int, k0: int, size: int, double: bool, buffers: dict[str, int]
) -> list[str]:
    """The names of the buffers that cannot hold the tile."""

    # BEGIN SOLUTION
    def up(value, unit):
        return -(-value // unit) * unit

    m, k, n = up(m, 16), up(k, k0), up(n, 16)
    copies = 2 if double else 1
    needed = {"l0a": m * k * size, "l0b": k * n * size, "l0c": m * n * 4}
    return [name for name, has in buffers.items() if copies * needed[name] > has]
    # END SOLUTION


# %% tags=["check"]
check.too_small(too_small)

# %% [markdown] tags=["solution"]
# A and B cost $k$ numbers for each row and column, and $k$ may be small: it is C that limits how often a number is used again, and C does not get smaller with narrower formats. This is why L0C is four times as large as L0A.

# %% [markdown]
# ## Exercise 3: problems
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# A rank table is a dict: `"server_count"`, and `"server_list"`, in which each server has `"device"`, a list of NPUs with `"device_ip"` and `"rank_id"`. All values are text. Return a list of those that hold, each once, in this order:
#
# | return | if |
# |---|---|
# | `"server_count"` | it is not the number of servers, as text |
# | `"no device_ip"` | an NPU has none, or an empty one |
# | `"rank twice"` | two NPUs have the same rank, in one server or in two |
# | `"rank missing"` | of 0 to $n - 1$, with $n$ NPUs in all, one is not there |
#
# The order of ranks does not matter here, and a server may have any number of NPUs.


# %% tags=["exercise"]
def problems(table: dict) -> list[str]:
    """What is wrong with a rank table; [] if nothing is."""
    # BEGIN SOLUTION
    servers = table["server_list"]
    devices = [device for server in servers for device in server["device"]]
    ranks = [int(device["rank_id"]) for device in devices]
    found = {
        "server_count": table["server_count"] != str(len(servers)),
        "no device_ip": not all(device.get("device_ip") for device in devices),
        "rank twice": len(set(ranks)) < len(ranks),
        "rank missing": bool(set(range(len(ranks))) - set(ranks)),
    }
    return [name for name, wrong in found.items() if wrong]
    # END SOLUTION


# %% tags=["check"]
check.problems(problems)

# %% [markdown] tags=["solution"]
# A wrong table is found out late: sixteen processes have started, and each waits for one that does not come. To look at the file takes a millisecond.

# %% [markdown]
# ## Exercise 4: cycles
# ●●●●○ difficulty · ●●●○○ importance · 30 minutes · 4 points
#
# A challenge. A program is a list of tuples. The queues work side by side, each on its own lines, in their order:
#
# | line | stands in queue | means |
# |---|---|---|
# | `("do", queue, count)` | `queue` | work for `count` cycles |
# | `("set", src, dst)` | `src` | when all before it in `src` is done, a flag from `src` to `dst` is set |
# | `("wait", src, dst)` | `dst` | stop until that flag is set |
#
# The first wait of a pair `(src, dst)` belongs to the first set of this pair, the second to the second. Flags take no time. A line that sets a flag may stand below the one that waits for it. Return after how many cycles everything is done, or `None` if a queue waits for ever.


# %% tags=["exercise"]
def cycles(program: list[tuple]) -> int | None:
    """When the last queue is done; None if one never is."""
    # BEGIN SOLUTION
    queues = defaultdict(list)
    for line in program:
        queues[line[2] if line[0] == "wait" else line[1]].append(line)
    clock = dict.fromkeys(queues, 0)
    at = dict.fromkeys(queues, 0)  # the next line of each queue
    times = defaultdict(list)  # (src, dst) → when it was set
    waited = defaultdict(int)
    moved = True
    while moved:
        moved = False
        for name, lines in queues.items():
            while at[name] < len(lines):
                kind, a, b = lines[at[name]]
                if kind == "do":
                    clock[name] += b
                elif kind == "set":
                    times[a, b].append(clock[name])
                elif waited[a, b] < len(times[a, b]):
                    clock[name] = max(clock[name], times[a, b][waited[a, b]])
                    waited[a, b] += 1
                else:
                    break
                at[name] += 1
                moved = True
    if any(at[name] < len(lines) for name, lines in queues.items()):
        return None
    return max(clock.values(), default=0)
    # END SOLUTION


# %% tags=["check"]
check.cycles(cycles)

# %% [markdown] tags=["solution"]
# Nothing here knows the time of day: a queue's clock only ever meets another one at a flag. So the order in which the queues are visited does not matter, and one round after the other is enough. What these flags do not order is a race, whatever the clocks say.
