"""Wrong answers to 09-chips/04-ascend-and-other-accelerators, each with its
diagnosis.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque

import numpy as np
import pytest
import torch

from llmlab.checks.chips import ascend_and_other_accelerators as checks
from llmlab.checks.chips.ascend_and_other_accelerators import check
from llmlab.chips import ascend_and_other_accelerators as asc
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "09-chips/04-ascend-and-other-accelerators"

# Right, written otherwise -------------------------------------------------------------


def nz_by_permuting(row, col, height, width, rows, cols):
    x = torch.zeros(height, width)
    x[row, col] = 1
    return int(asc.layout.to_fractals(x, "NZ", rows, cols).flatten().argmax())


def nz_by_counting(row, col, height, width, rows, cols):
    tall = int(np.ceil(height / rows))
    return np.int64(
        (col // cols) * tall * rows * cols + row * cols + col - (col // cols) * cols
    )


def fit_by_room(m, k, n, k0, size, double, buffers):
    format = "int8" if k0 == 32 else "fp16"
    needed = asc.core.tile_bytes(asc.core.Tile(m, k, n), format, double)
    return [name for name in buffers if needed[name] > buffers[name]]


def fit_by_fractals(m, k, n, k0, size, double, buffers):
    rows, deep, cols = np.ceil([m / 16, k / k0, n / 16])
    room = {name: has / (2 if double else 1) for name, has in buffers.items()}
    found = []
    if rows * deep * 16 * k0 * size > room["l0a"]:
        found.append("l0a")
    if cols * deep * 16 * k0 * size > room["l0b"]:
        found.append("l0b")
    if rows * cols * 1024 > room["l0c"]:
        found.append("l0c")
    return [name for name in buffers if name in found]


def problems_by_counter(table):
    devices = []
    for server in table["server_list"]:
        devices += server["device"]
    counts = Counter(int(device["rank_id"]) for device in devices)
    found = []
    if table["server_count"] != f"{len(table['server_list'])}":
        found.append("server_count")
    if any(device.get("device_ip", "") == "" for device in devices):
        found.append("no device_ip")
    if max(counts.values()) > 1:
        found.append("rank twice")
    if not all(counts[rank] for rank in range(len(devices))):
        found.append("rank missing")
    return found


def problems_by_text(table):
    devices = [d for server in table["server_list"] for d in server["device"]]
    ranks = [device["rank_id"] for device in devices]
    checks_ = [
        ("server_count", str(len(table["server_list"])) != table["server_count"]),
        ("no device_ip", not all(device.get("device_ip") for device in devices)),
        ("rank twice", len(ranks) != len(set(ranks))),
        ("rank missing", any(str(n) not in ranks for n in range(len(ranks)))),
    ]
    return [name for name, wrong in checks_ if wrong]


def cycles_by_recursion(program):
    """Each line ends at the latest end of what it needs."""
    queue_of = [line[2] if line[0] == "wait" else line[1] for line in program]
    nth, seen = {}, Counter()
    for place, line in enumerate(program):
        nth[place] = seen[line]
        seen[line] += 1
    ends = {}

    def end(place, above=()):
        if place in above:
            return float("inf")
        if place not in ends:
            line = program[place]
            mine = [p for p in range(place) if queue_of[p] == queue_of[place]]
            begins = end(mine[-1], (*above, place)) if mine else 0
            if line[0] == "wait":
                flag = ("set", *line[1:])
                same = [p for p, each in enumerate(program) if each == flag]
                k = nth[place]
                set_ = end(same[k], (*above, place)) if k < len(same) else float("inf")
                begins = max(begins, set_)
            ends[place] = begins + (line[2] if line[0] == "do" else 0)
        return ends[place]

    last = max((end(place) for place in range(len(program))), default=0)
    return None if last == float("inf") else last


def cycles_by_ticks(program):
    queues = defaultdict(deque)
    for line in program:
        queues[line[2] if line[0] == "wait" else line[1]].append(list(line))
    flags, now = Counter(), 0
    while any(queues.values()):
        moved = True
        while moved:
            moved = False
            for lines in queues.values():
                if not lines:
                    continue
                kind, a, b = lines[0]
                done = kind == "set" or (kind == "wait" and flags[a, b])
                if done or (kind == "do" and b == 0):
                    if kind != "do":
                        flags[a, b] += 1 if kind == "set" else -1
                    lines.popleft()
                    moved = True
        work = [lines[0] for lines in queues.values() if lines and lines[0][0] == "do"]
        if not work:
            return None if any(queues.values()) else now
        for line in work:
            line[2] -= 1
        now += 1
    return now


RIGHT = {
    "nz_offset": (nz_by_permuting, nz_by_counting),
    "too_small": (fit_by_room, fit_by_fractals),
    "problems": (problems_by_counter, problems_by_text),
    "cycles": (cycles_by_recursion, cycles_by_ticks),
}


test_right_answers_written_otherwise = accepts(check, RIGHT)


@pytest.mark.parametrize("case", checks.program_cases())
def test_the_exercise_times_as_the_room_does(case):
    """Where flags are in pairs, and under the names of the room's queues."""
    names = {"MTE": "MTE1", "M": "M", "V": "V"}
    made = {
        "do": lambda queue, count: asc.queues.Do(names[queue], count),
        "set": lambda src, dst: asc.queues.Set(names[src], names[dst]),
        "wait": lambda src, dst: asc.queues.Wait(names[src], names[dst]),
    }
    program = [made[kind](*rest) for kind, *rest in case]
    wanted = checks.timing()(case)
    sets = Counter(line[1:] for line in case if line[0] == "set")
    waits = Counter(line[1:] for line in case if line[0] == "wait")
    if sets != waits or wanted is None:
        with pytest.raises(ValueError, match=r"flag|wait for each other"):
            asc.queues.simulate(program)
    else:
        assert asc.queues.simulate(program).cycles == wanted


@pytest.mark.parametrize("n", range(len(checks.table_cases())))
def test_the_exercise_finds_what_the_room_finds(n):
    table = checks.table_cases()[n] | {"status": "completed"}
    found = " ".join(asc.rank_table.problems(table))
    words = {
        "server_count": "server_count is",
        "no device_ip": "has no device_ip",
        "rank twice": "rank_id",
        "rank missing": "missing",
    }
    for name in checks.finding()(table):
        if name != "rank missing" or "rank_id" not in found:
            assert words[name] in found, (name, found)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "nz_offset": ByCases(
        checks.run_nz, checks.right_nz, checks.wrong_nz, checks.NZ_CASES
    ),
    "too_small": ByCases(
        checks.run_fit, checks.fitting(), checks.wrong_fits, checks.FIT_CASES
    ),
    "problems": ByCases(
        checks.run_table, checks.finding(), checks.wrong_tables, checks.table_cases
    ),
    "cycles": ByCases(
        checks.run_cycles, checks.timing(), checks.wrong_cycles, checks.program_cases
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def nz_as_pair(row, col, height, width, rows, cols):
    return row // rows, col // cols


def fit_as_text(*case):
    return ", ".join(checks.fitting()(*case))


def fit_with_sizes(*case):
    case[-1]["l0a"] //= 2
    return checks.fitting()(*case)


def fit_with_other_names(*case):
    return [name.upper() for name in checks.fitting()(*case)]


def fit_in_its_own_order(*case):
    return sorted(checks.fitting()(*case))


def problems_in_another_order(table):
    return sorted(checks.finding()(table), key=len)


def problems_for_each_npu(table):
    devices = [each for server in table["server_list"] for each in server["device"]]
    missing = sum(not each.get("device_ip") for each in devices)
    found = checks.finding()(table)
    return [x for x in found for _ in range(missing if x == "no device_ip" else 1)] + (
        ["rank missing"] if "rank missing" in found else []
    )


def problems_in_other_words(table):
    return [name.replace(" ", "_") for name in checks.finding()(table)]


def problems_as_one_text(table):
    return "; ".join(checks.finding()(table))


def problems_that_repair(table):
    found = checks.finding()(table)
    table["server_count"] = str(len(table["server_list"]))
    return found


def cycles_that_take_away(program):
    found = checks.timing()(list(program))
    program.clear()
    return found


def cycles_as_text(program):
    return str(checks.timing()(program))


def cycles_that_never_end(program):
    found = checks.timing()(program)
    return float("inf") if found is None else found


def cycles_below_zero(program):
    found = checks.timing()(program)
    return -1 if found is None else found


def fit_with_k0_in_bytes(m, k, n, k0, size, double, buffers):
    return checks.fitting(pads=lambda k0: (16, k0 // size, 16))(
        m, k, n, k0, size, double, buffers
    )


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("nz_offset", nz_as_pair, "return a whole number"),
        Wrong("too_small", fit_as_text, "return a list of names"),
        Wrong("too_small", fit_with_sizes, "changed the buffers"),
        Wrong("too_small", fit_with_other_names, "the names are"),
        Wrong("too_small", fit_in_its_own_order, "the order is l0c, l0b, l0a"),
        Wrong("too_small", fit_with_k0_in_bytes, "for m=48, k=680"),
        Wrong("problems", problems_in_another_order, "the order is"),
        Wrong("problems", problems_for_each_npu, "name each once"),
        Wrong("problems", problems_in_other_words, "the names are"),
        Wrong("problems", problems_as_one_text, "return a list of texts"),
        Wrong("problems", problems_that_repair, "changed the table"),
        Wrong("cycles", cycles_that_take_away, "in place: work on a copy"),
        Wrong("cycles", cycles_as_text, "return a whole number"),
        Wrong("cycles", cycles_that_never_end, "return a whole number or None"),
        Wrong("cycles", cycles_below_zero, "return None"),
    ],
)
