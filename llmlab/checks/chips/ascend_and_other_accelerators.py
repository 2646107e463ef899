"""Checks of 09-chips/04-ascend-and-other-accelerators.

An answer is run on cases, and what it returns is compared with what usual mistakes make
of them.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial

from llmlab.checks.judging import Outcome, judge, whole
from llmlab.chips import ascend_and_other_accelerators as asc
from llmlab.course.grading.checking import Checks, Mistake

check = Checks("09-chips/04-ascend-and-other-accelerators")


def in_order(found: list[str], names: Sequence[str], what: str) -> list[str]:
    """What was found, if it is some of the names, each once and in their order.

    Raises:
        Mistake: it is something else.
    """
    if not set(found) <= set(names):
        raise Mistake(f"{what} returned {found!r}: the names are {', '.join(names)}")
    if len(set(found)) < len(found):
        raise Mistake(f"{what} returned {found!r}: name each once, however often it is")
    if found != [name for name in names if name in found]:
        raise Mistake(f"{what} returned {found!r}: the order is {', '.join(names)}")
    return found


# 1 ------------------------------------------------------------------------------------

# row, col, height, width, rows, cols
NZ_CASES = [
    (0, 0, 40, 50, 16, 16),
    (5, 3, 40, 50, 16, 16),
    (17, 3, 40, 50, 16, 16),
    (5, 20, 40, 50, 16, 16),
    (39, 49, 40, 50, 16, 16),
    (33, 40, 48, 128, 16, 32),
    (20, 70, 100, 96, 16, 32),
    (3, 5, 4, 6, 2, 2),
    (2, 1, 5, 9, 2, 3),
]


def run_nz(answer: Callable, n: int) -> Outcome:
    """Case n: one place."""
    row, col, *rest = NZ_CASES[n]
    found = whole(answer(row, col, *rest), "nz_offset(…)")
    return {f"the place of row {row}, column {col}": found}


def right_nz(row: int, col: int, height: int, width: int, rows: int, cols: int) -> int:
    """The reference; the width does not matter."""
    return asc.layout.nz_offset(row, col, height, rows, cols)


def placing(
    tall: Callable = lambda height, rows: -(-height // rows),
    fractal: Callable = lambda i, j, tall, wide: j * tall + i,
    inside: Callable = lambda r, c, rows, cols: r * cols + c,
    area: Callable = lambda rows, cols: rows * cols,
) -> Callable:
    """`nz_offset`, and what comes out with one thing changed."""

    def way(row, col, height, width, rows, cols):
        i, r = divmod(row, rows)
        j, c = divmod(col, cols)
        place = fractal(i, j, tall(height, rows), -(-width // cols))
        return place * area(rows, cols) + inside(r, c, rows, cols)

    return way


def wrong_nz() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the fractals lie row by row here, which is ZZ: N goes column by"
        " column": placing(fractal=lambda i, j, tall, wide: i * wide + j),
        "within a fractal the numbers lie column by column here: Z goes row by"
        " row": placing(inside=lambda r, c, rows, cols: c * rows + r),
        "fractals and numbers were both exchanged: N is for the fractals, Z for"
        " what is in them": placing(
            fractal=lambda i, j, tall, wide: i * wide + j,
            inside=lambda r, c, rows, cols: c * rows + r,
        ),
        "an uneven height takes one fractal more: round up": placing(
            tall=lambda height, rows: height // rows
        ),
        "the zeros at the lower edge lie in memory, too: round the height up to whole"
        " fractals": placing(tall=lambda height, rows: height / rows),
        "a column of fractals is as long as the height needs, not the width": placing(
            fractal=lambda i, j, tall, wide: j * wide + i
        ),
        "a row of a fractal has as many numbers as it has columns": placing(
            inside=lambda r, c, rows, cols: r * rows + c
        ),
        "fractals were counted, not the numbers in them": placing(
            area=lambda rows, cols: 1
        ),
        "a fractal has rows × cols numbers, not 256: it may be of another"
        " size": placing(area=lambda rows, cols: 256),
        "the fractals above in the same column are missing": placing(
            fractal=lambda i, j, tall, wide: j * tall
        ),
        "this is the place in a matrix without fractals": (
            lambda row, col, height, width, rows, cols: row * width + col
        ),
        "this is the first number of the fractal: add the place in it": placing(
            inside=lambda r, c, rows, cols: 0
        ),
    }


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=4,
    hints=(
        "How many fractals lie before the one with this number? How many numbers each?",
        (
            "`col // cols` whole columns of fractals come first; each has"
            " ceil(height / rows) of them."
        ),
        "`fractal * rows * cols + (row % rows) * cols + col % cols`",
    ),
)
def nz_offset(answer):
    """Where a number lies in NZ."""
    judge(answer, run_nz, right_nz, wrong_nz(), len(NZ_CASES), "nz_offset(…)")


# 2 ------------------------------------------------------------------------------------

OLD = {"l0a": 65536, "l0b": 65536, "l0c": 262144}
NEW = {"l0a": 65536, "l0b": 65536, "l0c": 131072}
# m, k, n, k0, size, double, buffers
FIT_CASES = [
    (128, 128, 128, 16, 2, True, OLD),  # to the last byte
    (129, 128, 100, 16, 2, True, OLD),
    (100, 128, 129, 16, 2, True, OLD),
    (250, 64, 129, 16, 2, True, OLD),
    (250, 64, 129, 16, 2, False, OLD),
    (256, 64, 256, 16, 2, False, NEW),
    (256, 64, 128, 16, 2, True, NEW),
    (64, 500, 64, 32, 1, True, OLD),
    (64, 513, 48, 32, 1, True, OLD),
    (256, 100, 16, 32, 1, True, OLD),
    (256, 129, 16, 32, 1, True, {"l0a": 73728, "l0b": 65536, "l0c": 262144}),
    (16, 1024, 48, 16, 2, True, OLD),
    (48, 1024, 16, 16, 2, False, OLD),
    (256, 16, 256, 16, 2, True, OLD),
    (17, 16, 16, 16, 2, False, {"l0a": 2048, "l0b": 512, "l0c": 1600}),
    (16, 16, 17, 16, 2, False, {"l0a": 512, "l0b": 900, "l0c": 2048}),
    (256, 96, 16, 16, 2, False, OLD),
    (200, 256, 200, 16, 2, True, OLD),
    (16, 16, 16, 16, 2, False, {"l0a": 512, "l0b": 512, "l0c": 1023}),
    (80, 384, 16, 32, 1, True, OLD),  # m is whole fractals, and not whole k0
    (48, 680, 16, 16, 2, False, OLD),  # k0 is not divided by the size
    (200, 256, 200, 16, 2, True, dict(reversed(OLD.items()))),
]


def run_fit(answer: Callable, n: int) -> Outcome:
    """Case n: the names of the buffers that are too small."""
    *sizes, buffers = FIT_CASES[n]
    given = dict(buffers)
    found = answer(*sizes, given)
    if not isinstance(found, list | tuple) or not all(
        isinstance(each, str) for each in found
    ):
        raise Mistake(f"too_small(…) returned {found!r}: return a list of names")
    if given != buffers:
        raise Mistake("too_small(…) changed the buffers: only look at them")
    m, k, n_ = sizes[:3]
    return {
        f"the buffers too small for m={m}, k={k}, n={n_}": in_order(
            list(found), list(buffers), "too_small(…)"
        )
    }


def fitting(
    pads: Callable = lambda k0: (16, k0, 16),
    up: Callable = lambda x, unit: -(-x // unit) * unit,
    bytes_of: Callable = lambda size: (size, size, 4),
    copies: Callable = lambda double: (2, 2, 2) if double else (1, 1, 1),
    shapes: Callable = lambda m, k, n: (m * k, k * n, m * n),
    over: Callable = lambda needed, has: needed > has,
    first: bool = False,
) -> Callable:
    """`too_small`, and what comes out with one thing changed."""

    def way(m, k, n, k0, size, double, buffers):
        m, k, n = map(up, (m, k, n), pads(k0))
        counts = shapes(m, k, n)
        parts = zip(counts, bytes_of(size), copies(double), strict=True)
        needed = dict(zip(("l0a", "l0b", "l0c"), map(math.prod, parts), strict=True))
        found = [name for name, has in buffers.items() if over(needed[name], has)]
        return found[:1] if first else found

    return way


def wrong_fits() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a part of a fractal takes a whole one: round m, k and n up": fitting(
            pads=lambda k0: (1, 1, 1)
        ),
        "m takes whole fractals, too: round it up to 16": fitting(
            pads=lambda k0: (1, k0, 16)
        ),
        "k takes whole fractals, too: round it up to k0": fitting(
            pads=lambda k0: (16, 1, 16)
        ),
        "n takes whole fractals, too: round it up to 16": fitting(
            pads=lambda k0: (16, k0, 1)
        ),
        "a part of a fractal takes a whole one: round up, not down": fitting(
            up=lambda x, unit: x // unit * unit
        ),
        "a size that is whole fractals already takes no further one": fitting(
            up=lambda x, unit: (x // unit + 1) * unit
        ),
        "k is rounded up to k0, which is 32 for numbers of a byte, not to 16": fitting(
            pads=lambda k0: (16, 16, 16)
        ),
        "m and n are rounded up to 16, only k to k0": fitting(
            pads=lambda k0: (k0, k0, k0)
        ),
        "m is rounded up to 16, not to k0": fitting(pads=lambda k0: (k0, k0, 16)),
        "n is rounded up to 16, not to k0": fitting(pads=lambda k0: (16, k0, k0)),
        "a number of A and B has `size` bytes": fitting(
            bytes_of=lambda size: (1, 1, 4)
        ),
        "the sums of C have four bytes, whatever A and B have": fitting(
            bytes_of=lambda size: (size, size, size)
        ),
        "with double, everything lies there twice": fitting(
            copies=lambda double: (1, 1, 1)
        ),
        "without double, everything lies there once": fitting(
            copies=lambda double: (2, 2, 2)
        ),
        "with double, C lies there twice as well": fitting(
            copies=lambda double: (2, 2, 1) if double else (1, 1, 1)
        ),
        "with double, A and B lie there twice as well": fitting(
            copies=lambda double: (1, 1, 2) if double else (1, 1, 1)
        ),
        "a tile that fills a buffer to the last byte fits": fitting(
            over=lambda needed, has: needed >= has
        ),
        "L0A holds m × k numbers, L0B k × n: they were exchanged": fitting(
            shapes=lambda m, k, n: (k * n, m * k, m * n)
        ),
        "L0C holds m × n sums, however long k is": fitting(
            shapes=lambda m, k, n: (m * k, k * n, m * k)
        ),
        "these are the buffers that are large enough: the question is which are"
        " not": fitting(over=lambda needed, has: needed <= has),
        "more than one buffer can be too small: name all of them": fitting(first=True),
    }


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=4,
    hints=(
        "Which of the three sizes does each buffer hold? What does each number take?",
        (
            "Round m and n up to 16 and k up to k0 first; then (m, k), (k, n) and (m,"
            " n), the last with 4 bytes a number."
        ),
        (
            "`up = lambda x, unit: -(-x // unit) * unit`; needed = {'l0a': m * k *"
            " size, …}, twice with double; then a list of the names with needed >"
            " buffers."
        ),
    ),
)
def too_small(answer):
    """Which buffers a tile does not fit into."""
    cases = len(FIT_CASES)
    judge(answer, run_fit, fitting(), wrong_fits(), cases, "too_small(…)", repr)


# 3 ------------------------------------------------------------------------------------


def table_of(*servers: Sequence[tuple[object, object]], count: object = None) -> dict:
    """A rank table of servers, each a list of (device_ip or None, rank_id)."""
    listed = []
    for place, devices in enumerate(servers):
        made = []
        for number, (address, rank) in enumerate(devices):
            one = {"device_id": str(number), "rank_id": str(rank)}
            if address is not None:
                one["device_ip"] = address
            made.append(one)
        listed.append({"server_id": f"10.0.0.{place + 1}", "device": made})
    count = str(len(servers)) if count is None else count
    return {"version": "1.0", "server_count": count, "server_list": listed}


def npus(server: int, ranks: Sequence[object]) -> list[tuple[object, object]]:
    """(device_ip, rank_id) of the NPUs of a server."""
    return [(f"192.168.{server}.{n}", rank) for n, rank in enumerate(ranks)]


@cache
def table_cases() -> tuple[dict, ...]:
    """Rank tables, right and wrong ones."""
    full = npus(0, range(8))
    no_address = npus(1, range(8, 12))
    no_address[2] = (None, 10)
    empty = npus(1, range(4, 8))
    empty[3] = ("", 7)
    shared = npus(0, range(2))  # an address twice is not asked for
    return (
        table_of(full, npus(1, range(8, 16))),
        table_of(full, npus(1, range(8, 12))),  # servers need not have 8
        table_of(full, npus(1, range(8, 16)), count="1"),
        table_of(full, npus(1, range(8, 16)), count=2),
        table_of(full, npus(1, range(8, 16)), count="16"),
        table_of(full, no_address),
        table_of(npus(0, range(4)), empty),
        table_of(full, npus(1, [7, 9, 10, 11])),  # twice, over two servers
        table_of(npus(0, [0, 1, 1, 3]), npus(1, range(4, 8))),
        table_of(npus(0, range(1, 5))),  # from 1
        table_of(npus(0, [0, 1, 2, 4])),
        table_of(npus(0, [3, 1, 2, 0])),  # order is not asked for
        table_of(npus(0, range(5, 12)), npus(1, range(5))),  # as numbers, not as text
        table_of(npus(0, [0, 0]), [(None, 5), ("192.168.1.1", 5)], count="3"),
        table_of(shared, [("192.168.0.0", 2), ("192.168.1.1", 3)]),
        table_of(npus(0, range(2)), npus(1, [2, 3]), npus(2, [5, 6]), npus(3, [4, 7])),
        table_of(npus(0, range(2)), npus(1, [2, 4])),
        table_of(npus(0, [0, 1, 2, 1])),  # twice, not side by side, and none above 2
        table_of(npus(0, [0, 3, 3, 0])),  # the sum is that of 0 to 3
    )


PROBLEMS = ("server_count", "no device_ip", "rank twice", "rank missing")


def run_table(answer: Callable, n: int) -> Outcome:
    """Case n: what is wrong with a table."""
    table = copy.deepcopy(table_cases()[n])
    found = answer(table)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise Mistake(f"problems(…) returned {found!r}: return a list of texts")
    if table != table_cases()[n]:
        raise Mistake("problems(…) changed the table: only look at it")
    found = in_order(found, PROBLEMS, "problems(…)")
    return {"what is wrong with the table": found}


def finding(
    count: Callable = lambda table, servers, devices: (
        table["server_count"] == str(len(servers))
    ),
    address: Callable = lambda device: bool(device.get("device_ip")),
    enough: Callable = all,
    twice: Callable = lambda servers, ranks: len(set(ranks)) < len(ranks),
    gap: Callable = lambda servers, ranks: set(range(len(ranks))) - set(ranks),
    named: Callable = lambda found: found,
) -> Callable:
    """`problems`, and what comes out with one thing changed."""

    def way(table):
        servers = table["server_list"]
        devices = [each for server in servers for each in server["device"]]
        ranks = [int(each["rank_id"]) for each in devices]
        wrong = (
            not count(table, servers, devices),
            not enough(address(each) for each in devices),
            twice(servers, ranks),
            gap(servers, ranks),
        )
        return named(
            [name for name, is_so in zip(PROBLEMS, wrong, strict=True) if is_so]
        )

    return way


def _twice_within(servers: list, ranks: list) -> bool:
    ranks_of = [[each["rank_id"] for each in server["device"]] for server in servers]
    return any(len(set(each)) < len(each) for each in ranks_of)


def _twice_addresses(servers: list, ranks: list) -> bool:
    found = [each.get("device_ip") for server in servers for each in server["device"]]
    return len(set(found)) < len(found)


def _text_gap(servers: list, ranks: list) -> bool:
    found = sorted(str(rank) for rank in ranks)
    return found != [str(n) for n in range(len(found))]


def wrong_tables() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "server_count is text: 2 as a number is wrong": finding(
            count=lambda table, servers, devices: (
                str(table["server_count"]) == str(len(servers))
            )
        ),
        "server_count is text: compare it with the number as text": finding(
            count=lambda table, servers, devices: table["server_count"] == len(servers)
        ),
        "server_count counts servers, not their NPUs": finding(
            count=lambda table, servers, devices: (
                table["server_count"] == str(len(devices))
            )
        ),
        "server_count was not compared": finding(
            count=lambda table, servers, devices: True
        ),
        "a device_ip that is there and empty is none, either": finding(
            address=lambda device: "device_ip" in device
        ),
        "a device_ip that is not there at all is missing, too": finding(
            address=lambda device: device.get("device_ip") != ""
        ),
        "one NPU without a device_ip is enough": finding(enough=any),
        "a rank may appear in two servers: look through all of them at once": finding(
            twice=_twice_within
        ),
        "the same rank may stand further away than in the next NPU": finding(
            twice=lambda servers, ranks: any(
                a == b for a, b in itertools.pairwise(ranks)
            )
        ),
        "it is ranks that were to be looked for twice, not addresses": finding(
            twice=_twice_addresses
        ),
        "a rank that is missing is not always one that appears twice: look for"
        " both": finding(gap=lambda servers, ranks: len(set(ranks)) < len(ranks)),
        "ranks were sorted as text, where '10' comes before '2': make them"
        " numbers": finding(gap=_text_gap),
        "a rank is missing in every table here: was text compared with numbers, or n"
        " taken for a rank?": finding(gap=lambda servers, ranks: ranks),
        "n is the number of NPUs, not that of different ranks or the largest": finding(
            gap=lambda servers, ranks: set(range(max(ranks))) - set(ranks)
        ),
        "the sum of the ranks can be right and one missing all the same": finding(
            gap=lambda servers, ranks: sum(ranks) != sum(range(len(ranks)))
        ),
        "a server need not have 8 NPUs: count them": finding(
            gap=lambda servers, ranks: set(range(8 * len(servers))) - set(ranks)
        ),
        "ranks begin at 0": finding(
            gap=lambda servers, ranks: (
                set(range(1, len(ranks) + 1)) - set(ranks) - {len(ranks)}
            )
        ),
        "the ranks need not rise: only whether each is there counts": finding(
            gap=lambda servers, ranks: ranks != list(range(len(ranks)))
        ),
        "only the largest rank was looked at: one below it may be missing": finding(
            gap=lambda servers, ranks: max(ranks) < len(ranks) - 1
        ),
        "more than one thing can be wrong: return all of them": finding(
            named=lambda found: found[:1]
        ),
        "where a rank is there twice, another can be missing: name both": finding(
            named=lambda found: (
                found[: 1 + found.index("rank twice")]
                if "rank twice" in found
                else found
            )
        ),
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=4,
    hints=(
        "Put the devices of all servers into one list first.",
        (
            "With n devices the ranks must be the set 0 … n − 1; as numbers, since they"
            " are text in the table."
        ),
        (
            "`ranks = [int(d['rank_id']) for d in devices]`; twice: `len(set(ranks)) <"
            " len(ranks)`; missing: `set(range(len(ranks))) - set(ranks)`."
        ),
    ),
)
def problems(answer):
    """What is wrong with a rank table."""
    cases = len(table_cases())
    judge(answer, run_table, finding(), wrong_tables(), cases, "problems(…)", repr)


# 4 ------------------------------------------------------------------------------------


def do(queue: str, count: int) -> tuple:
    """Work."""
    return ("do", queue, count)


def sets(src: str, dst: str) -> tuple:
    """set_flag."""
    return ("set", src, dst)


def waits(src: str, dst: str) -> tuple:
    """wait_flag."""
    return ("wait", src, dst)


@cache
def program_cases() -> tuple[list[tuple], ...]:
    """Programs."""
    there = [sets("MTE", "M"), waits("MTE", "M")]
    back = [sets("M", "MTE"), waits("M", "MTE")]
    pipeline = []
    for _ in range(4):
        pipeline += [do("MTE", 3), *there, do("M", 5)]
    locked = []
    for _ in range(3):
        locked += [do("MTE", 3), *there, do("M", 5), *back]
    return (
        [do("M", 4)],
        [do("MTE", 3), do("M", 5), do("V", 1)],
        [do("MTE", 3), *there, do("M", 5)],
        pipeline,
        locked,
        # work after the flag does not hold up the other queue
        [do("MTE", 2), sets("MTE", "M"), do("MTE", 9), waits("MTE", "M"), do("M", 3)],
        # the wait stands before its flag
        [waits("MTE", "M"), do("M", 5), do("MTE", 7), sets("MTE", "M"), do("V", 8)],
        # each wait has its own flag
        [
            do("MTE", 2),
            sets("MTE", "M"),
            do("MTE", 10),
            sets("MTE", "M"),
            waits("MTE", "M"),
            do("M", 6),
            waits("MTE", "M"),
            do("M", 1),
        ],
        [do("M", 2), waits("V", "M"), do("M", 3), do("V", 4)],  # for ever
        [
            waits("V", "M"),
            sets("M", "V"),
            waits("M", "V"),
            sets("V", "M"),
            do("V", 1),
        ],
        # a chain of three, and work before the wait
        [
            do("M", 9),
            do("MTE", 3),
            *there,
            do("M", 2),
            sets("M", "V"),
            do("V", 1),
            waits("M", "V"),
            do("V", 4),
        ],
        # what waits in M does not hold up V
        [do("V", 6), sets("V", "M"), waits("V", "M"), do("MTE", 1), do("V", 7)],
        [do("M", 3), sets("M", "V")],  # a flag for which nobody waits
        [sets("M", "V"), do("M", 8), waits("M", "V"), do("V", 2)],
        # one queue sets flags for two others
        [
            *(do("M", 3), sets("M", "V"), do("M", 4), sets("M", "MTE")),
            *(waits("M", "MTE"), do("MTE", 5), waits("M", "V"), do("V", 1)),
        ],
        [
            *(do("M", 3), sets("M", "MTE"), do("M", 4), sets("M", "V")),
            *(waits("M", "V"), do("V", 5), waits("M", "MTE"), do("MTE", 1)),
        ],
        # one queue waits for two others, first for the one that is written below
        [
            *(do("M", 9), sets("M", "V"), do("MTE", 2), sets("MTE", "V")),
            *(waits("MTE", "V"), do("V", 5), waits("M", "V"), do("V", 1)),
        ],
    )


def run_cycles(answer: Callable, n: int) -> Outcome:
    """Case n: when a program ends."""
    program = list(program_cases()[n])
    found = answer(program)
    if found is not None:
        found = whole(found, "cycles(…)", "a whole number or None")
        if found < 0:
            raise Mistake(
                f"cycles(…) returned {found}: if a queue waits for ever, return None"
            )
    return {"the number of cycles": found}


def timing(
    waits_for: Callable = lambda times, k: times[k],
    set_at: Callable = lambda end: end,
    flag_of: Callable = lambda src, dst: (src, dst),
    wait_queue: int = 2,
    overwritten: bool = False,
    never: Callable = lambda clocks: None,
    merge: Callable = max,
    ends: Callable = lambda clocks: max(clocks.values(), default=0),
) -> Callable:
    """`cycles`, and what comes out with one thing changed."""

    def way(program):
        queues = defaultdict(list)
        for each in program:
            place = wait_queue if each[0] == "wait" else 1
            queues[each[place]].append(each)
        clocks = dict.fromkeys(queues, 0)
        flags, used = defaultdict(list), defaultdict(int)
        moved = True
        while moved:
            moved = False
            for name, queue in queues.items():
                while queue:
                    kind, *rest = queue[0]
                    if kind == "do":
                        clocks[name] += rest[1]
                    else:
                        key = flag_of(*rest)
                        k = used[key]
                    if kind == "set":
                        if overwritten:
                            del flags[key][k:]
                        flags[key].append(set_at(clocks[name]))
                    if kind == "wait":
                        if k >= len(flags[key]):
                            break
                        clocks[name] = merge(clocks[name], waits_for(flags[key], k))
                        used[key] += 1
                    queue.pop(0)
                    moved = True
        return never(clocks) if any(queues.values()) else ends(clocks)

    return way


def _one_by_one(program: list) -> int:
    return sum(each[2] for each in program if each[0] == "do")


def _no_flags(program: list) -> int:
    totals = defaultdict(int)
    for each in program:
        if each[0] == "do":
            totals[each[1]] += each[2]
    return max(totals.values(), default=0)


def _as_written(program: list, passes: bool = False) -> int | None:
    """Takes the program line by line: a flag must be set above its wait, or else the
    wait is passed over.
    """
    clocks, flags = defaultdict(int), defaultdict(list)
    for kind, a, b in program:
        if kind == "do":
            clocks[a] += b
        elif kind == "set":
            flags[a, b].append(clocks[a])
        elif flags[a, b]:
            clocks[b] = max(clocks[b], flags[a, b].pop(0))
        elif not passes:
            return None
    return max(clocks.values(), default=0)


def _barrier(program: list) -> int:
    """Every flag stops everybody."""
    clocks = defaultdict(int)
    for kind, a, b in program:
        if kind == "do":
            clocks[a] += b
        elif kind == "wait":
            now = max(clocks.values(), default=0)
            for name in ("MTE", "M", "V"):
                clocks[name] = now
    return max(clocks.values(), default=0)


def _whole_source(program: list) -> int | None:
    """A wait is for all that stands above it in the source's queue."""
    clocks = defaultdict(int)
    for kind, a, b in program:
        if kind == "do":
            clocks[a] += b
        elif kind == "wait":
            clocks[b] = max(clocks[b], clocks[a])
    return max(clocks.values(), default=0)


def wrong_cycles() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the queues work side by side: this is everything one after the"
        " other": _one_by_one,
        "the flags were not looked at: each queue by itself": _no_flags,
        "a flag may be set by a line further below: a queue that waits does not hold up"
        " the others": _as_written,
        "a wait whose flag is set further below was passed over": partial(
            _as_written, passes=True
        ),
        "a flag stops the queue that waits for it, not all of them": _barrier,
        "a wait is for what stands above its flag, not for all that the other queue"
        " has been given": _whole_source,
        "the first wait belongs to the first flag: here each waits for the last that"
        " was set": timing(waits_for=lambda times, k: times[-1]),
        "the second wait belongs to the second flag: here each waits for the"
        " first": timing(waits_for=lambda times, k: times[0]),
        "a flag is set when the work above it is done, not at the beginning": timing(
            set_at=lambda end: 0
        ),
        "a queue that is busy until later than the flag does not go back in time: take"
        " the later of both": timing(merge=lambda clock, flag: flag),
        "a queue waits until the flag is set, not for so many cycles from"
        " now on": timing(merge=lambda clock, flag: clock + flag),
        "a program that waits for ever has no number of cycles: return None": timing(
            never=lambda clocks: 0
        ),
        "a queue that still waits at the end waits for ever: return None": timing(
            never=lambda clocks: max(clocks.values())
        ),
        "a flag from M to V and one from M to MTE are two: the pair counts": timing(
            flag_of=lambda src, dst: src
        ),
        "a flag from M to V and one from MTE to V are two: the pair counts": timing(
            flag_of=lambda src, dst: dst
        ),
        "a flag from M to MTE is not one from MTE to M": timing(
            flag_of=lambda src, dst: frozenset((src, dst))
        ),
        "a flag may be set twice before the first wait: keep both": timing(
            overwritten=True
        ),
        "a set stands in queue src and its wait in queue dst: not both in one": timing(
            wait_queue=1
        ),
        "the program ends when the last queue ends, not the cube": timing(
            ends=lambda clocks: clocks.get("M", 0)
        ),
    }


@check.exercise(
    points=4,
    minutes=30,
    difficulty=4,
    importance=3,
    hints=(
        "Make a list of its own for each queue first, and a clock for each.",
        (
            "Go round the queues until none gets any further. A queue works until it"
            " meets a wait whose flag has no time yet."
        ),
        (
            "`times[src, dst]` is a list of when it was set. The k-th wait of (src,"
            " dst) takes `clock[dst] = max(clock[dst], times[src, dst][k])`. If a round"
            " changes nothing and something is left: None."
        ),
    ),
)
def cycles(answer):
    """When a program with flags ends."""
    cases = len(program_cases())
    judge(answer, run_cycles, timing(), wrong_cycles(), cases, "cycles(…)", repr)
