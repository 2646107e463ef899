"""Wrong answers to 09-chips/02-nvidia-gpu, each with its diagnosis."""

from __future__ import annotations

import numpy as np

from llmlab.checks.chips import nvidia_gpu as checks
from llmlab.checks.chips.nvidia_gpu import check
from llmlab.chips import nvidia_gpu as nv
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "09-chips/02-nvidia-gpu"
KINDS = {
    "sectors": ByCases(
        checks.run_sectors,
        checks.right_sectors,
        checks.wrong_sectors,
        checks.sector_cases,
    ),
    "bank_cycles": ByCases(
        checks.run_banks, checks.right_banks, checks.wrong_banks, checks.bank_cases
    ),
    "blocks_held": ByCases(
        checks.run_blocks, checks.right_blocks, checks.wrong_blocks, checks.BLOCK_CASES
    ),
    "owner": ByCases(
        checks.run_owner, checks.right_owner, checks.wrong_owners, checks.ROWS
    ),
}

test_no_two_mistakes_are_alike = kept_apart(KINDS)

# Right, written otherwise ------------------------------------------------------------


def sectors_by_bytes(addresses, width, active):
    wanted = set()
    for lane, address in enumerate(addresses):
        if active[lane]:
            wanted.update(range(address, address + width))
    moved = {byte // 32 for byte in wanted}
    return [len(moved), len(wanted) / len(moved) / 32]


def sectors_by_arrays(addresses, width, active):
    lanes = np.unique(np.array(addresses)[np.array(active)])
    count = len(np.unique(lanes >> 5))
    return np.int64(count), np.float32(lanes.size * width / (count * 32))


def cycles_by_shifting(addresses, width):
    total = 0
    per_phase = {4: 32, 8: 16, 16: 8}[width]
    while addresses:
        phase, addresses = addresses[:per_phase], addresses[per_phase:]
        banks = [set() for _ in range(32)]
        for address in phase:
            for byte in range(address, address + width):
                banks[byte >> 2 & 31].add(byte >> 2)
        total += max(len(words) for words in banks)
    return total


def cycles_by_arrays(addresses, width):
    words = np.array(addresses)[:, None] // 4 + np.arange(width // 4)
    total = 0
    for phase in words.reshape(width // 4, -1):
        total += np.bincount(np.unique(phase) % 32).max()
    return total


def cycles_by_first_words(addresses, width):
    """Aligned lanes: the banks of their first words are as full as the others."""
    step = 128 // width
    total = 0
    for start in range(0, 32, step):
        words = np.unique(np.array(addresses[start : start + step]) // 4)
        total += np.bincount(words % 32).max()
    return total


def held_by_placing(threads, registers, shared, sm):
    """One block after the other, while there is room."""
    warps = (threads + 31) // 32
    each = (registers * 32 + 255) // 256 * 256
    unit = sm["unit"]
    bytes_ = (shared + sm["reserved"] + unit - 1) // unit * unit
    parts, memory, count = [16384] * 4, sm["shared"], 0
    while count < sm["blocks"] and (count + 1) * warps <= sm["warps"]:
        memory -= bytes_
        if memory < 0:
            break
        for _ in range(warps):
            part = parts.index(max(parts))
            if parts[part] < each:
                return count
            parts[part] -= each
        count += 1
    return count


def held_by_the_spreadsheet(threads, registers, shared, sm):
    warps = -(-threads // 32)
    regs = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4
    used = -(-(shared + sm["reserved"]) // sm["unit"]) * sm["unit"]
    return min(
        sm["warps"] // warps,
        regs // warps,
        sm["shared"] // max(used, 1),
        sm["blocks"],
    )


def owner_by_search(row, col):
    return next(
        (lane, i)
        for lane in range(32)
        for i in range(8)
        if nv.element("A", lane, i) == (row, col)
    )


def owner_by_bits(row, col):
    lane = (row & 7) << 2 | (col >> 1 & 3)
    return [np.int32(lane), (col & 1) | (row >> 3) << 1 | (col >> 3) << 2]


RIGHT = {
    "sectors": [sectors_by_bytes, sectors_by_arrays],
    "bank_cycles": [cycles_by_shifting, cycles_by_arrays, cycles_by_first_words],
    "blocks_held": [held_by_placing, held_by_the_spreadsheet],
    "owner": [owner_by_search, owner_by_bits],
}
test_right_answers_written_otherwise = accepts(check, RIGHT)


# Wrong ------------------------------------------------------------------------------


def sectors_only(addresses, width, active):
    return checks.right_sectors(addresses, width, active)[0]


def sectors_as_float(addresses, width, active):
    count, part = checks.right_sectors(addresses, width, active)
    return float(count), part


def efficiency_as_text(addresses, width, active):
    count, part = checks.right_sectors(addresses, width, active)
    return count, f"{part:.0%}"


def sorts_in_place(addresses, width, active):
    found = checks.right_sectors(addresses, width, active)
    addresses.sort(reverse=True)
    return found


def two_too_many(addresses, width, active):
    count, part = checks.right_sectors(addresses, width, active)
    return count + 2, part


def cycles_as_float(addresses, width):
    return float(checks.right_banks(addresses, width))


def pops(addresses, width):
    found = checks.right_banks(addresses, width)
    addresses.pop()
    return found


def registers_of_the_whole_sm(threads, registers, shared, sm):
    asked = -(-(shared + sm["reserved"]) // sm["unit"]) * sm["unit"]
    return min(
        sm["warps"] // -(-threads // 32),
        65536 // (threads * registers),
        sm["shared"] // max(asked, 1),
        sm["blocks"],
    )


def occupancy_as_share(threads, registers, shared, sm):
    blocks = checks.right_blocks(threads, registers, shared, sm)
    return blocks * threads / 32 / sm["warps"]


def changes_the_sm(threads, registers, shared, sm):
    found = checks.right_blocks(threads, registers, shared, sm)
    sm["shared"] -= found * shared + 1
    return found


def lane_only(row, col):
    return nv.owner("A", row, col)[0]


def lane_as_float(row, col):
    lane, i = nv.owner("A", row, col)
    return lane / 1, i


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("sectors", sectors_only, "the number of sectors and the efficiency"),
        Wrong("sectors", sectors_as_float, "it must be a whole number"),
        Wrong("sectors", efficiency_as_text, "it must be a number"),
        Wrong("sectors", sorts_in_place, "work on a copy"),
        Wrong("sectors", two_too_many, "is not right in case 1"),
        Wrong("bank_cycles", cycles_as_float, "it must be a whole number"),
        Wrong("bank_cycles", pops, "work on a copy"),
        Wrong("blocks_held", registers_of_the_whole_sm, "the SM as a whole"),
        Wrong("blocks_held", occupancy_as_share, "it must be a whole number"),
        Wrong("blocks_held", changes_the_sm, "changed in place"),
        Wrong("owner", lane_only, "return (lane, i)"),
        Wrong("owner", lane_as_float, "it must be a whole number"),
    ],
)
