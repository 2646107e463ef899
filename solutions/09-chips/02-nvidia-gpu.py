# %% [markdown]
# # Solutions: NVIDIA GPU
#
# Four functions with which one judges a kernel before it runs: what a warp's addresses take of global memory and of shared memory, how many blocks a processor holds, and which thread has which number in front of a tensor core.
#
# Stuck? `check.hint("sectors")` shows a hint, and the next one when it is called again.

# %%
from collections import Counter

from llmlab.checks.chips.nvidia_gpu import check

# %% [markdown]
# ## Exercise 1: sectors
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# A warp loads from global memory. Lane $l$ wants `width` bytes from `addresses[l]` on (in bytes, a multiple of `width`, which is 1, 2, 4, 8 or 16), if `active[l]`; at least one lane is active. Memory moves sectors of 32 bytes, which begin at multiples of 32, each once per request. Return how many sectors are moved, and the efficiency: different bytes that were asked for, as a part of the bytes that were moved.


# %% tags=["exercise"]
def sectors(addresses: list[int], width: int, active: list[bool]) -> tuple[int, float]:
    """(sectors, efficiency) of one request of a warp."""
    # BEGIN SOLUTION
    lanes = {a for a, on in zip(addresses, active, strict=True) if on}
    touched = {a // 32 for a in lanes}
    return len(touched), len(lanes) * width / (32 * len(touched))
    # END SOLUTION


# %% tags=["check"]
check.sectors(sectors)

# %% [markdown] tags=["solution"]
# An address is a multiple of the width, so no lane reaches into a second sector. Two sets do the rest: what several lanes want is moved once, and asked for once.

# %% [markdown]
# ## Exercise 2: bank_cycles
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# The same warp reads shared memory: 32 banks, each 4 bytes wide, and successive words of 4 bytes lie in successive banks. In one cycle a bank gives one word, to all lanes that want this word. Lanes of 4 bytes are all served together; of 8 bytes in two phases of 16 lanes, of 16 bytes in four phases of 8 lanes, in the order of the lanes. A phase takes as many cycles as the fullest bank has words to give. Phases follow each other. Return the cycles of all phases. All 32 lanes are active; `width` is 4, 8 or 16, and addresses are multiples of it.


# %% tags=["exercise"]
def bank_cycles(addresses: list[int], width: int) -> int:
    """Cycles in which the banks answer a warp of 32 lanes."""
    # BEGIN SOLUTION
    lanes = 32 * 4 // width
    cycles = 0
    for start in range(0, 32, lanes):
        phase = addresses[start : start + lanes]
        words = {w for a in phase for w in range(a // 4, (a + width) // 4)}
        cycles += max(Counter(w % 32 for w in words).values())
    return cycles
    # END SOLUTION


# %% tags=["check"]
check.bank_cycles(bank_cycles)

# %% [markdown] tags=["solution"]
# The set is the broadcast: a word that many lanes want is given once. Wide lanes are not slower for it: 16 bytes of 32 lanes are 512 bytes, and four cycles are all that 32 banks need for them.

# %% [markdown]
# ## Exercise 3: blocks_held
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# How many blocks does an SM hold at a time? A block has `threads` threads, each with `registers` registers, and asks for `shared` bytes. The smallest of four limits counts:
#
# | limit | rule |
# |---|---|
# | warps | a block has ⌈threads / 32⌉; the SM has room for `sm["warps"]` |
# | registers | a warp gets 32 · `registers`, rounded up to a multiple of 256. The SM has 65,536, in four parts of 16,384; a warp takes all of its registers from one part, whichever has room |
# | shared memory | a block gets `shared` and `sm["reserved"]` bytes, together rounded up to a multiple of `sm["unit"]`; the SM has `sm["shared"]`. A block for which both are 0 is not limited by it |
# | blocks | `sm["blocks"]` |
#
# A block that does not fit is held 0 times. What stands in `sm` differs from chip to chip; the other numbers hold for all.


# %% tags=["exercise"]
def blocks_held(threads: int, registers: int, shared: int, sm: dict[str, int]) -> int:
    """Blocks that an SM holds at a time."""
    # BEGIN SOLUTION
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // 256) * 256
    of_a_block = -(-(shared + sm["reserved"]) // sm["unit"]) * sm["unit"]
    room = [sm["warps"] // warps, 16384 // of_a_warp * 4 // warps, sm["blocks"]]
    if of_a_block:
        room.append(sm["shared"] // of_a_block)
    return min(room)
    # END SOLUTION


# %% tags=["check"]
check.blocks_held(blocks_held)

# %% [markdown] tags=["solution"]
# `-(-a // b)` rounds up. The four parts are what most calculators on the web forget: with 37 registers and 320 threads there are registers enough for five blocks, but not in the right places, so four are held. NVIDIA's guide prints that example without saying why.

# %% [markdown]
# ## Exercise 4: owner
# ●●●○○ difficulty · ●●●○○ importance · 15 minutes · 2 points
#
# Before a tensor core multiplies, its 16 × 16 operand A lies in the registers of a warp, eight numbers per lane. With $g = \lfloor \text{lane} / 4 \rfloor$ and $t = \text{lane} \bmod 4$, number $i$ (0 to 7) of a lane is the element in
#
# $$\text{row } g + 8\,[\,i \bmod 4 \ge 2\,], \qquad \text{column } 2t + (i \bmod 2) + 8\,[\,i \ge 4\,]$$
#
# where a bracket is 1 if it holds, else 0. Return `(lane, i)` for an element.


# %% tags=["exercise"]
def owner(row: int, col: int) -> tuple[int, int]:
    """(lane, i) that hold an element of A in mma.m16n8k16."""
    # BEGIN SOLUTION
    lane = 4 * (row % 8) + col % 8 // 2
    i = col % 2 + 2 * (row // 8) + 4 * (col // 8)
    return lane, i
    # END SOLUTION


# %% tags=["check"]
check.owner(owner)

# %% [markdown] tags=["solution"]
# Eight bits name an element, four of the row and four of the column. Each goes to one bit of lane or i: the layout is a permutation of bits, which is why a compiler can write it as a matrix over GF(2) (as in the lesson on Triton).
