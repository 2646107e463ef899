"""Checks of 09-chips/02-nvidia-gpu.

An answer is run on cases, and what it returns is compared with what usual mistakes make
of them.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

from llmlab.checks.judging import Outcome, judge
from llmlab.chips import nvidia_gpu as nv
from llmlab.course.grading.checking import Checks, Mistake

check = Checks("09-chips/02-nvidia-gpu")


def whole(found: object, what: str) -> int:
    """What was found, if it is one whole number.

    Raises:
        Mistake: it is something else.
    """
    if isinstance(found, bool) or not isinstance(found, numbers.Integral):
        raise Mistake(f"{what} is {found!r}: it must be a whole number")
    return int(found)


def strided(stride: int, offset: int = 0, width: int = 4) -> list[int]:
    """Addresses of 32 lanes."""
    return [(lane * stride + offset) * width for lane in range(32)]


# 1 ------------------------------------------------------------------------------------

ALL = [True] * 32


@cache
def sector_cases() -> list[tuple[list[int], int, list[bool]]]:
    """(addresses, width, active)."""
    draw = np.random.default_rng(7)
    scattered = (draw.integers(0, 90, 32) * 4).tolist()
    some = (draw.random(32) < 0.4).tolist()
    some[3] = True
    return [
        (strided(1), 4, ALL),
        (strided(1, 3), 4, ALL),
        (strided(8), 4, ALL),
        (strided(1, width=16), 16, ALL),
        (strided(3, 5, 2), 2, ALL),
        (scattered, 4, ALL),
        (strided(2, 1, 8), 8, some),
        ([96] * 32, 4, ALL),
        (strided(40), 4, [lane < 5 for lane in range(32)]),
        (strided(1, 2, 1), 1, [lane % 3 == 1 for lane in range(32)]),
        (strided(-1, 500), 4, ALL),
        # the halves of the warp ask for the same sectors
        ([8 * (lane % 16) + 64 for lane in range(32)], 8, ALL),
    ]


def run_sectors(answer: Callable, n: int) -> Outcome:
    """Case n: sectors, and the part of them that was asked for."""
    addresses, width, active = sector_cases()[n]
    given = list(addresses), list(active)
    found = answer(given[0], width, given[1])
    if given != (addresses, active):
        raise Mistake("a list that was given is changed: work on a copy")
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Mistake(
            f"sectors(…) returned {found!r}: return the number of sectors and the"
            " efficiency"
        )
    part = found[1]
    if isinstance(part, bool) or not isinstance(part, numbers.Real):
        raise Mistake(f"the efficiency is {part!r}: it must be a number")
    return {
        "the number of sectors": whole(found[0], "the number of sectors"),
        "the efficiency": f"{float(part):.6g}",
    }


def right_sectors(addresses: list[int], width: int, active: list[bool]) -> tuple:
    """Of the room."""
    found = nv.global_memory(addresses, width, active)
    return found.sectors, found.efficiency


def touching(
    size: int = 32,
    mask: Callable = lambda on: on,
    touched: Callable = set,
    start: Callable = lambda addresses: 0,
    count: Callable = len,
    asked: Callable = lambda lanes, width: len(set(lanes)) * width,
    ratio: Callable = lambda asked, moved: asked / moved,
    moved: int = 32,
) -> Callable:
    """`sectors`, and what comes out with one thing changed."""

    def way(addresses: list[int], width: int, active: list[bool]) -> tuple:
        pairs = zip(addresses, active, strict=True)
        lanes = [a for a, on in pairs if mask(on)]
        first = start(lanes)
        found = count(touched([(a - first) // size for a in lanes]))
        return found, ratio(asked(lanes, width), moved * found)

    return way


def wrong_sectors() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "lines of 128 bytes were counted: a sector has 32": touching(128, moved=128),
        "lines of 128 bytes were counted as sectors of 32": touching(128),
        "lanes that are not active take part: they ask for nothing": touching(
            mask=lambda on: True
        ),
        "the efficiency counts what lanes that are not active would ask"
        " for": _all_asked,
        "a sector was counted once for each lane: the warp takes it once": touching(
            touched=list
        ),
        "neither sectors nor bytes were counted once: the warp takes each"
        " once": touching(touched=list, asked=_each),
        "sectors between the first and the last were counted, too: only those that a"
        " lane touches are taken": touching(
            count=lambda found: max(found) - min(found) + 1
        ),
        "sectors begin at multiples of 32, not at the first lane's address": touching(
            start=min
        ),
        "the bytes from the first to the last were divided by 32: only sectors that a"
        " lane touches are taken, and they begin at multiples of 32": touching(
            size=1, count=lambda found: (max(found) - min(found)) // 32 + 1
        ),
        "the bytes that were asked for were divided by 32: they may lie in more sectors"
        " than they would fill": _filled,
        "each part of a wide request was counted for itself: a sector is moved once per"
        " request": _by_parts,
        "the same bytes were counted once for each lane: asked for are different"
        " bytes": touching(asked=_each),
        "the efficiency is taken of 4 bytes per lane: it is `width`": touching(
            asked=lambda lanes, width: 4 * len(set(lanes))
        ),
        "the efficiency is upside down: asked for, over moved": touching(
            ratio=lambda asked, moved: moved / asked
        ),
        "the efficiency counts 32 lanes, not those that are active": touching(
            asked=lambda lanes, width: 32 * width
        ),
        "a sector moves 32 bytes, not one": touching(moved=1),
        "the efficiency is not in percent: a part, at most 1": touching(
            ratio=lambda asked, moved: 100 * asked / moved
        ),
        "bytes were counted, not sectors": touching(
            count=lambda found: 32 * len(found), moved=1
        ),
    }


def _each(lanes: list[int], width: int) -> int:
    return len(lanes) * width


def _asking(addresses: list[int], active: list[bool]) -> set[int]:
    return {a for a, on in zip(addresses, active, strict=True) if on}


def _all_asked(addresses: list[int], width: int, active: list[bool]) -> tuple:
    count, _ = right_sectors(addresses, width, active)
    return count, len(set(addresses)) * width / (32 * count)


def _filled(addresses: list[int], width: int, active: list[bool]) -> tuple:
    asked = len(_asking(addresses, active)) * width
    count = -(-asked // 32)
    return count, asked / (32 * count)


def _by_parts(addresses: list[int], width: int, active: list[bool]) -> tuple:
    lanes = min(32, 128 // width)
    count = 0
    for start in range(0, 32, lanes):
        part = slice(start, start + lanes)
        count += len({a // 32 for a in _asking(addresses[part], active[part])})
    return count, len(_asking(addresses, active)) * width / (32 * count)


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "In which sector does an address lie? Sectors begin at multiples of 32.",
        "A set keeps each sector once. And one of addresses keeps each number once.",
        (
            "`lanes = {a for a, on in zip(addresses, active) if on}`; then the set of"
            " `a // 32`, and `len(lanes) * width / (32 * …)`."
        ),
    ),
)
def sectors(answer):
    """Sectors of a warp's request, and the part of them that was asked for."""
    cases = len(sector_cases())
    judge(answer, run_sectors, right_sectors, wrong_sectors(), cases, "sectors(…)")


# 2 ------------------------------------------------------------------------------------


@cache
def bank_cases() -> list[tuple[list[int], int]]:
    """(addresses, width)."""
    draw = np.random.default_rng(3)
    # phases that differ: the first is free of conflicts, the last is full of them
    mixed = [16 * lane for lane in range(8)] + [128 * lane for lane in range(24)]
    halves = [8 * lane for lane in range(16)] + [256 * lane for lane in range(16)]
    return [
        (strided(1), 4),
        (strided(2), 4),
        (strided(33), 4),
        ([128 * (lane % 2) for lane in range(32)], 4),
        ([20] * 32, 4),
        ((draw.integers(0, 200, 32) * 4).tolist(), 4),
        (strided(1, width=8), 8),
        (strided(3, width=8), 8),
        (halves, 8),
        (strided(1, width=16), 16),
        (strided(8, width=16), 16),
        (mixed, 16),
        ((draw.integers(0, 60, 32) * 16).tolist(), 16),
        ((draw.integers(0, 90, 32) * 8).tolist(), 8),
    ]


def run_banks(answer: Callable, n: int) -> Outcome:
    """Case n: cycles."""
    addresses, width = bank_cases()[n]
    given = list(addresses)
    found = answer(given, width)
    if given != addresses:
        raise Mistake("the list that was given is changed: work on a copy")
    return {"the number of cycles": whole(found, "the number of cycles")}


def right_banks(addresses: list[int], width: int) -> int:
    """Of the room."""
    return nv.shared_memory(addresses, width).cycles


def cycling(
    lanes: Callable = lambda width: 32 // (width // 4),
    words: Callable = lambda a, width: range(a // 4, (a + width) // 4),
    kept: Callable[[Iterable], Iterable] = set,
    bank: Callable = lambda word: word % 32,
    of_phase: Callable = lambda counts: max(counts),
    together: Callable = sum,
) -> Callable:
    """`bank_cycles`, and what comes out with one thing changed."""

    def way(addresses: list[int], width: int) -> int:
        found = []
        step = lanes(width)
        for start in range(0, 32, step):
            asked = kept(
                [w for a in addresses[start : start + step] for w in words(a, width)]
            )
            banks = [bank(word) for word in asked]
            found.append(of_phase([banks.count(each) for each in set(banks)]))
        return together(found)

    return way


def wrong_banks() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "lanes that ask for the same word were counted as a conflict: it is sent to all"
        " of them at once": cycling(kept=list),
        "a bank is 4 bytes wide: the word's number modulo 32, not the"
        " address's": cycling(words=lambda a, width: range(a, a + width, 4)),
        "there are 32 banks, not 16": cycling(bank=lambda word: word % 16),
        "all lanes were served together: 8 bytes take two phases, 16 bytes"
        " four": cycling(lanes=lambda width: 32),
        "the slowest phase was returned: phases follow each other, so add them"
        " up": cycling(together=max),
        "conflicts were counted, not cycles: a phase without any takes one"
        " cycle": cycling(together=lambda found: sum(found) - len(found)),
        "only 16 lanes were served at once for 4 bytes: all 32 are": cycling(
            lanes=lambda width: min(16, 32 // (width // 4))
        ),
        "always 16 lanes were served at once: it is 32 for 4 bytes and 8 for 16": (
            cycling(lanes=lambda width: 16)
        ),
        "16 bytes were served like 8, 16 lanes at once: it is 8 lanes": cycling(
            lanes=lambda width: 16 if width > 4 else 32
        ),
        "8 bytes were served like 16, 8 lanes at once: it is 16 lanes": cycling(
            lanes=lambda width: 8 if width > 4 else 32
        ),
        "a bank was taken to be as wide as what a lane asks for: it is always 4 bytes"
        " wide": _banks_as_wide,
        "all phases were counted like the slowest: each has conflicts of its"
        " own": cycling(together=lambda found: len(found) * max(found)),
        "all phases were counted like the first: each has conflicts of its"
        " own": cycling(together=lambda found: len(found) * found[0]),
        "the number of banks with a conflict was counted: the fullest bank"
        " decides": cycling(of_phase=lambda counts: sum(c > 1 for c in counts) or 1),
        "conflicts of all banks were added up: banks work at the same time": cycling(
            of_phase=lambda counts: 1 + sum(c - 1 for c in counts)
        ),
        "phases were counted, without their conflicts": cycling(
            of_phase=lambda counts: 1
        ),
        "banks were counted: they work at the same time, and the fullest"
        " decides": cycling(of_phase=len),
    }


def _banks_as_wide(addresses: list[int], width: int) -> int:
    return cycling(words=lambda a, _: [a // width])(addresses, width)


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        "Which lanes are served together? Which words do they ask for, each once?",
        (
            "A phase has 32, 16 or 8 lanes: 32 · 4 // width. Its words go into a set;"
            " then count how many words lie in each bank."
        ),
        (
            "`words = {w for a in phase for w in range(a // 4, (a + width) // 4)}`, and"
            " `max(Counter(w % 32 for w in words).values())`, summed over phases."
        ),
    ),
)
def bank_cycles(answer):
    """Cycles in which the banks answer a warp."""
    cases = len(bank_cases())
    judge(answer, run_banks, right_banks, wrong_banks(), cases, "bank_cycles(…)")


# 3 ------------------------------------------------------------------------------------

KB = 1024
LARGE = {"warps": 64, "blocks": 32, "shared": 228 * KB, "reserved": KB, "unit": 128}
SMALL = {"warps": 48, "blocks": 24, "shared": 100 * KB, "reserved": KB, "unit": 128}
OLD = {"warps": 64, "blocks": 32, "shared": 96 * KB, "reserved": 0, "unit": 256}
# of no chip: what is reserved is no multiple of the unit
INVENTED = {"warps": 40, "blocks": 20, "shared": 64 * KB, "reserved": 96, "unit": 256}
# threads, registers, shared, SM
BLOCK_CASES = [
    (128, 37, 0, OLD),
    (320, 37, 0, OLD),
    (512, 64, 0, LARGE),
    (512, 65, 0, LARGE),
    (768, 32, 0, LARGE),
    (32, 16, 0, LARGE),
    (48, 16, 0, SMALL),
    (96, 90, 0, LARGE),
    (1024, 100, 0, LARGE),
    (128, 32, 113 * KB, LARGE),
    (64, 20, 24 * KB + 4, SMALL),
    (64, 24, 3 * KB + 8, OLD),
    (256, 40, 98_304, LARGE),
    (160, 33, 7_000, SMALL),
    (64, 40, 6_500, LARGE),
    (200, 16, 0, LARGE),
    (700, 16, 0, LARGE),
    (64, 20, 114 * KB, LARGE),
    (256, 16, 0, SMALL),
    (32, 16, 0, SMALL),
    (64, 16, 4_500, INVENTED),
]


def run_blocks(answer: Callable, n: int) -> Outcome:
    """Case n: blocks held."""
    threads, registers, shared, sm = BLOCK_CASES[n]
    given = dict(sm)
    found = answer(threads, registers, shared, given)
    if given != sm:
        raise Mistake("`sm` is changed in place: work on a copy")
    what = f"the number of blocks for {threads} threads and {registers} registers"
    return {what: whole(found, what)}


def holding(
    warps: Callable = lambda threads: -(-threads // 32),
    of_a_warp: Callable = lambda registers: -(-registers * 32 // 256) * 256,
    held: Callable = lambda of_a_warp, warps: 16384 // of_a_warp * 4 // warps,
    of_a_block: Callable = lambda shared, sm: (
        -(-(shared + sm["reserved"]) // sm["unit"]) * sm["unit"]
    ),
    memory: Callable = lambda sm: sm["shared"],
    by_warps: Callable = lambda threads, warps, sm: sm["warps"] // warps,
    by_blocks: Callable = lambda sm: sm["blocks"],
    together: Callable = min,
    result: Callable = lambda blocks, warps, sm: blocks,
) -> Callable:
    """`blocks_held`, and what comes out with one thing changed."""

    def way(threads: int, registers: int, shared: int, sm: dict) -> object:
        count = warps(threads)
        each = of_a_block(shared, sm)
        room = [
            by_warps(threads, count, sm),
            held(of_a_warp(registers), count),
            memory(sm) // each if each else sm["blocks"],
            by_blocks(sm),
        ]
        return result(together(room), count, sm)

    return way


def wrong_blocks() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a part of a warp is a warp: round up": holding(
            warps=lambda threads: max(1, threads // 32)
        ),
        "a warp gets registers by the 256: round up": holding(
            of_a_warp=lambda registers: registers * 32
        ),
        "registers were rounded down to 256 per warp: round up": holding(
            of_a_warp=lambda registers: max(1, registers * 32 // 256) * 256
        ),
        "the SM was taken as one: its registers lie in four parts, and a warp takes all"
        " of its from one": holding(
            held=lambda of_a_warp, warps: 65536 // (of_a_warp * warps)
        ),
        "warps of a block were spread evenly over the four parts: they go wherever"
        " there is room": holding(
            held=lambda of_a_warp, warps: 16384 // of_a_warp // -(-warps // 4)
        ),
        "there are four parts, not one": holding(
            held=lambda of_a_warp, warps: 16384 // of_a_warp // warps
        ),
        "all warps of a block were put into one part: each goes wherever there is"
        " room": holding(
            held=lambda of_a_warp, warps: 16384 // (of_a_warp * warps) * 4
        ),
        "registers were counted for the block or the SM as a whole: each warp is"
        " rounded up to 256, and has all of its registers in one of four"
        " parts": holding(
            of_a_warp=lambda registers: registers * 32,
            held=lambda of_a_warp, warps: 65536 // (-(-of_a_warp * warps // 256) * 256),
        ),
        "a thread's registers were rounded up to 256: a warp's are": holding(
            of_a_warp=lambda registers: -(-registers // 256) * 256 * 32
        ),
        "registers are a limit, too: each of a warp's 32 lanes has its own": holding(
            of_a_warp=lambda registers: -(-registers // 256) * 256
        ),
        "CUDA keeps some of a block's shared memory: add what is reserved": holding(
            of_a_block=lambda shared, sm: -(-shared // sm["unit"]) * sm["unit"]
        ),
        "a block gets shared memory by units: round up": holding(
            of_a_block=lambda shared, sm: shared + sm["reserved"]
        ),
        "shared memory was rounded up before what is reserved was added: both are"
        " rounded together": holding(
            of_a_block=lambda shared, sm: (
                -(-shared // sm["unit"]) * sm["unit"] + sm["reserved"]
            )
        ),
        "shared memory is a limit, too": holding(memory=lambda sm: 10**9),
        "what is reserved is kept once for each block, not once per SM": holding(
            of_a_block=lambda shared, sm: -(-shared // sm["unit"]) * sm["unit"],
            memory=lambda sm: sm["shared"] - sm["reserved"],
        ),
        "an SM holds only so many blocks, however small": holding(
            by_blocks=lambda sm: 10**6
        ),
        "not every SM holds 32 blocks: use `sm`": holding(by_blocks=lambda sm: 32),
        "not every SM has room for 64 warps: use `sm`": holding(
            by_warps=lambda threads, warps, sm: 64 // warps
        ),
        "an SM has room for warps, not for threads: the last warp of a block counts"
        " whole": holding(
            by_warps=lambda threads, warps, sm: sm["warps"] * 32 // threads
        ),
        "an SM has room for only so many warps": holding(
            by_warps=lambda threads, warps, sm: 10**6
        ),
        "the largest of the limits was taken: the smallest decides": holding(
            together=max
        ),
        "warps were returned: blocks are asked for": holding(
            result=lambda blocks, warps, sm: blocks * warps
        ),
        "a block that does not fit was given a place: the answer is 0": holding(
            result=lambda blocks, warps, sm: max(1, blocks)
        ),
    }


def right_blocks(threads: int, registers: int, shared: int, sm: dict) -> int:
    """Of the room."""
    limits = nv.Limits(
        capability="",
        chips="",
        warps=sm["warps"],
        blocks=sm["blocks"],
        shared=sm["shared"],
        shared_unit=sm["unit"],
        reserved=sm["reserved"],
        source="",
    )
    return nv.occupancy(threads, registers, shared, limits).blocks


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        "Four numbers of blocks, one per limit. The smallest is the answer.",
        (
            "Rounding up to a unit: `-(-value // unit) * unit`. Registers: how many"
            " warps fit into one part, times four, over the warps of a block."
        ),
        (
            "`of_a_warp = -(-registers * 32 // 256) * 256`, and `16384 // of_a_warp * 4"
            " // warps`."
        ),
    ),
)
def blocks_held(answer):
    """Blocks that an SM holds at a time."""
    cases = len(BLOCK_CASES)
    judge(answer, run_blocks, right_blocks, wrong_blocks(), cases, "blocks_held(…)")


# 4 ------------------------------------------------------------------------------------

ROWS = range(16)  # a case for each row of A


def run_owner(answer: Callable, n: int) -> Outcome:
    """Case n: who holds the elements of row n."""
    lanes, held = [], []
    for col in range(16):
        found = answer(n, col)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise Mistake(f"owner({n}, {col}) returned {found!r}: return (lane, i)")
        lanes.append(whole(found[0], "the lane"))
        held.append(whole(found[1], "i"))
    return {f"the lanes of row {n}": lanes, f"the numbers i of row {n}": held}


def right_owner(row: int, col: int) -> tuple[int, int]:
    """Of the room."""
    return nv.owner("A", row, col)


def owning(
    lane: Callable = lambda row, col: 4 * (row % 8) + col % 8 // 2,
    i: Callable = lambda row, col: col % 2 + 2 * (row // 8) + 4 * (col // 8),
    turned: bool = False,
    swapped: bool = False,
) -> Callable:
    """`owner`, and what comes out with one thing changed."""

    def way(row: int, col: int) -> tuple[int, int]:
        at = (col, row) if turned else (row, col)
        found = lane(*at), i(*at)
        return found[::-1] if swapped else found

    return way


def wrong_owners() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "rows and columns are exchanged": owning(turned=True),
        "the lane comes first, then i": owning(swapped=True),
        "rows 8 to 15 belong to the lanes of rows 0 to 7, as other numbers i": owning(
            lane=lambda row, col: 4 * row + col % 8 // 2
        ),
        "columns 8 to 15 belong to the lanes of columns 0 to 7, as other numbers"
        " i": owning(lane=lambda row, col: 4 * (row % 8) + col // 2),
        "a lane has two neighbours of a row: columns 2 t and 2 t + 1": owning(
            lane=lambda row, col: 4 * (row % 8) + col % 4
        ),
        "four lanes stand side by side in a row, then comes the next row": owning(
            lane=lambda row, col: row % 8 + 8 * (col % 8 // 2)
        ),
        "the row 8 below comes first (i = 2, 3), then the columns 8 to the right (i ="
        " 4 to 7)": owning(
            i=lambda row, col: col % 2 + 4 * (row // 8) + 2 * (col // 8)
        ),
        "row 8 and below have i = 2, 3, 6 and 7": owning(
            i=lambda row, col: col % 2 + 4 * (col // 8)
        ),
        "columns from 8 on have i from 4 on": owning(
            i=lambda row, col: col % 2 + 2 * (row // 8)
        ),
        "the lowest bit of i tells neighbours apart, the next one the rows: i mod 2,"
        " and i mod 4 ≥ 2": owning(
            i=lambda row, col: row // 8 + 2 * (col % 2) + 4 * (col // 8)
        ),
        "a lane has rows g and g + 8, not two neighbours": owning(
            lane=lambda row, col: 4 * (row // 2) + col % 8 // 2,
            i=lambda row, col: col % 2 + 2 * (row % 2) + 4 * (col // 8),
        ),
        "a lane has columns 2 t and 2 t + 1, not t and t + 4": owning(
            lane=lambda row, col: 4 * (row % 8) + col % 4,
            i=lambda row, col: col % 8 // 4 + 2 * (row // 8) + 4 * (col // 8),
        ),
        "of two neighbours the left one has the even i": owning(
            i=lambda row, col: 1 - col % 2 + 2 * (row // 8) + 4 * (col // 8)
        ),
        "i tells a column's two neighbours apart: i mod 2": owning(
            i=lambda row, col: 2 * (row // 8) + 4 * (col // 8)
        ),
        "A is not stored row by row among the lanes": owning(
            lambda row, col: (16 * row + col) // 8, lambda row, col: col % 8
        ),
    }


@check.exercise(
    points=2,
    minutes=15,
    difficulty=3,
    importance=3,
    hints=(
        "Which of row and column say g, which say t, and which say i?",
        "g = row mod 8, and t comes from col mod 8. Three bits are left: they are i.",
        "i = (col mod 2) + 2 · (is row ≥ 8?) + 4 · (is col ≥ 8?).",
    ),
)
def owner(answer):
    """Lane and number that hold an element of A."""
    judge(answer, run_owner, right_owner, wrong_owners(), len(ROWS), "owner(…)")
