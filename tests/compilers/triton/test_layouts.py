"""Layouts over GF(2): against the definition, and against Triton's own."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from llmlab.compilers.triton_kernels import layouts
from llmlab.compilers.triton_kernels.layouts import (
    Blocked,
    Linear,
    TensorCore,
    linear,
    parse,
    solve,
)


def by_definition(layout: Blocked, shape, row, col):
    """Owners of an element by division, where the layout covers the block exactly.

    A thread's block, then lanes, then warps, along each dimension; what is left over
    repeats in further registers, along `order`.
    """
    registers, lane, warp, wide = [], 0, 0, [1, 1, 1]
    repeat, repeats = 0, 1
    for dim in layout.order:
        i = (row, col)[dim]
        size = layout.size_per_thread[dim]
        lanes, warps = layout.threads_per_warp[dim], layout.warps[dim]
        registers.append((i % size, size))
        lane += wide[1] * (i // size % lanes)
        warp += wide[2] * (i // size // lanes % warps)
        wide[1] *= lanes
        wide[2] *= warps
        tile = size * lanes * warps
        repeat += repeats * (i // tile)
        repeats *= shape[dim] // tile
    register, wide_register = 0, 1
    for place, size in registers:
        register += wide_register * place
        wide_register *= size
    return register + wide_register * repeat, lane, warp


def blocked_layouts(count: int, seed: int = 0):
    choose = random.Random(seed)
    for _ in range(count):
        size = tuple(2 ** choose.randint(0, 3) for _ in range(2))
        t, w = 2 ** choose.randint(0, 5), 2 ** choose.randint(0, 2)
        order = choose.choice([(0, 1), (1, 0)])
        yield Blocked(size, (t, 32 // t), (w, 4 // w), order), choose


def test_blocked_layouts_are_their_definition():
    for layout, choose in blocked_layouts(12):
        tile = [
            s * t * w
            for s, t, w in zip(
                layout.size_per_thread,
                layout.threads_per_warp,
                layout.warps,
                strict=True,
            )
        ]
        shape = [n * choose.choice([1, 2]) for n in tile]
        found = linear(layout, shape)
        for _ in range(20):
            row, col = (choose.randrange(n) for n in shape)
            wanted = by_definition(layout, shape, row, col)
            assert found.owners((row, col)) == [wanted]
            assert found.element(*wanted) == (row, col)


def places(layout: Linear):
    sizes = [1 << len(getattr(layout, part)) for part in layouts.PARTS]
    return itertools.product(*map(range, sizes))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Blocked((1, 2), (8, 4), (2, 2), (1, 0)), (4, 8)),  # larger than the block
        (Blocked((2, 1), (4, 8), (1, 4), (0, 1)), (16, 64)),
        (TensorCore(2, (2, 2), (16, 8)), (32, 32)),
    ],
)
def test_owners_are_all_places_that_hold_the_element(layout, shape):
    found = linear(layout, shape)
    held: dict = {}
    for place in places(found):
        held.setdefault(found.element(*place), []).append(place)
    assert len(held) == shape[0] * shape[1]
    for element in random.Random(0).sample(sorted(held), 30):
        wanted = sorted(held[element], key=lambda place: place[::-1])
        assert found.owners(element) == wanted


def test_the_result_of_mma_m16n8_is_as_nvidia_draws_it():
    """Lane 4g + t holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)."""
    found = linear(TensorCore(2, (1, 1), (16, 8)), (16, 8))
    for group, t, register in itertools.product(range(8), range(4), range(4)):
        wanted = (group + 8 * (register // 2), 2 * t + register % 2)
        assert found.element(register, 4 * group + t, 0) == wanted


def test_the_matrix_times_a_place_is_its_element():
    found = linear(TensorCore(3, (4, 1), (16, 64, 16)), (64, 64))
    matrix = found.matrix()
    assert matrix.shape == (12, 12)
    for register, lane, warp in ((0, 0, 0), (5, 3, 1), (31, 31, 3), (9, 17, 2)):
        bits = [
            index >> bit & 1
            for index, part in ((register, "register"), (lane, "lane"), (warp, "warp"))
            for bit in range(len(getattr(found, part)))
        ]
        element = matrix.int() @ torch.tensor(bits, dtype=torch.int32) % 2
        row, col = found.element(register, lane, warp)
        wanted = [col >> i & 1 for i in range(6)] + [row >> i & 1 for i in range(6)]
        assert element.tolist() == wanted


def test_solve_over_gf_2():
    for seed in range(20):
        torch.manual_seed(seed)
        matrix = torch.randint(0, 2, (5, 7), dtype=torch.int8)
        x = torch.randint(0, 2, (7,), dtype=torch.int8)
        wanted = matrix.int() @ x.int() % 2
        first, free = solve(matrix, wanted.to(torch.int8))
        assert torch.equal(matrix.int() @ first.int() % 2, wanted)
        for vector in free:
            assert vector.any() and not (matrix.int() @ vector.int() % 2).any()
        found = {tuple(first.tolist())}
        for vector in free:
            found |= {tuple((torch.tensor(f) ^ vector).tolist()) for f in found}
        every = itertools.product((0, 1), repeat=7)
        right = [
            each
            for each in every
            if torch.equal(matrix.int() @ torch.tensor(each).int() % 2, wanted)
        ]
        assert found == set(right)
    nothing = torch.zeros(2, 3, dtype=torch.int8)
    assert solve(nothing, torch.tensor([0, 1], dtype=torch.int8)) is None


PRINTED = {
    "#ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4,"
    " 1], order = [1, 0]}>": Blocked((1, 8), (4, 8), (4, 1), (1, 0)),
    "#ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1],"
    " instrShape = [16, 64, 16]}>": TensorCore(3, (4, 1), (16, 64, 16)),
    "#ttg.amd_mfma<{version = 3, warpsPerCTA = [2, 4], instrShape = [32, 32, 8],"
    " isTransposed = true}>": TensorCore("mfma", (2, 4), (32, 32, 8)),
    "#ttg.linear<{register = [[0, 1], [2, 0]], lane = [[1, 0], [0, 2]], warp = [],"
    " block = []}>": Linear((4, 4), ((0, 1), (2, 0)), ((1, 0), (0, 2)), ()),
    "#ttg.swizzled_shared<{vec = 8, perPhase = 1, maxPhase = 8, order = [1, 0]}>": None,
}


@pytest.mark.parametrize("text", PRINTED, ids=lambda text: text[5:20])
def test_reads_what_ttgir_prints(text):
    assert parse(text) == PRINTED[text]


def test_all_layouts_equal_tritons_own():
    """`gluon` gives away the linear layout of any layout."""
    pytest.importorskip("triton")
    from triton._C.libtriton import gluon_ir, ir
    from triton.experimental.gluon.language import (
        BlockedLayout,
        NVMMADistributedLayout,
    )
    from triton.experimental.gluon.language.amd import AMDMFMALayout

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)

    def theirs(layout, shape):
        made = builder.to_linear_layout(layout._to_ir(builder), list(shape))
        return [made.reg_bases, made.lane_bases, made.warp_bases]

    def ours(layout, shape):
        made = linear(layout, shape)
        parts = (getattr(made, part) for part in layouts.PARTS)
        return [[list(basis) for basis in part] for part in parts]

    for layout, choose in blocked_layouts(150, seed=1):
        shape = tuple(2 ** choose.randint(0, 8) for _ in range(2))
        sizes = (layout.size_per_thread, layout.threads_per_warp, layout.warps)
        right = BlockedLayout(*map(list, sizes), list(layout.order))
        assert ours(layout, shape) == theirs(right, shape), (layout, shape)
    shapes = ((64, 64), (128, 128), (128, 64), (16, 8), (32, 256))
    for warps, shape in itertools.product(((4, 1), (2, 2), (8, 1), (4, 2)), shapes):
        mma = NVMMADistributedLayout([2, 0], list(warps), [16, 8])
        made = TensorCore(2, warps, (16, 8))
        assert ours(made, shape) == theirs(mma, shape)
        mfma = AMDMFMALayout(3, [32, 32, 8], True, list(warps))
        if min(shape) >= 32:
            made = TensorCore("mfma", warps, (32, 32, 8))
            assert ours(made, shape) == theirs(mfma, shape)
        if warps[0] % 4 == 0:
            wgmma = NVMMADistributedLayout([3, 0], list(warps), [16, 64, 16])
            made = TensorCore(3, warps, (16, 64, 16))
            assert ours(made, shape) == theirs(wgmma, shape)


def test_refuses():
    with pytest.raises(ValueError, match=r"order=\(1, 1\) must name each dimension"):
        Blocked((1, 1), (4, 8), (4, 1), (1, 1))
    with pytest.raises(ValueError, match=r"warps=\(3, 1\) must be powers of 2"):
        Blocked((1, 1), (4, 8), (3, 1), (1, 0))
    layout = Blocked((1, 1), (4, 8), (4, 1), (1, 0))
    with pytest.raises(ValueError, match=r"shape=\(4, 6\) must be powers of 2"):
        linear(layout, (4, 6))
    with pytest.raises(ValueError, match=r"shape=\(4,\) must have 2 dimensions"):
        linear(layout, (4,))
    found = linear(layout, (16, 8))
    with pytest.raises(ValueError, match="lane=32 must be from 0 to 31"):
        found.element(0, 32, 0)
    with pytest.raises(ValueError, match=r"element \(16, 0\) is not in a block"):
        found.owners((16, 0))
    hole = Linear((4,), ((1,),), (), ())
    with pytest.raises(ValueError, match=r"nobody holds element \(2,\)"):
        hole.owners((2,))
