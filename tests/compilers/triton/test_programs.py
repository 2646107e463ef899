"""Our interpreter of block programs: what it computes, counts and refuses."""

from __future__ import annotations

import pytest
import torch

from llmlab.compilers import triton_kernels as tk
from llmlab.compilers.triton_kernels import OutOfRange, Race, launch, tl


def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, 2 * x, mask=i < n)


def test_a_kernel_computes_and_is_counted():
    x, y = torch.randn(37), torch.zeros(37)
    report = launch(double, (5,), x, y, 37, BLOCK=8)
    torch.testing.assert_close(y, 2 * x)
    assert report.programs == 5
    assert dict(report.loaded) == {"x": 4 * 37} and dict(report.stored) == {"y": 4 * 37}
    assert report.calls["load"] == 5 and report.written["y"].all()
    # each program's 8 numbers are a sector, and the last has 5
    assert [len(p["x"]) for p in report.sectors] == [1] * 5
    assert report.wave_bytes(1) == report.wave_bytes(5) == 5 * 32


def test_programs_run_with_the_first_axis_fastest():
    def where(out_ptr):
        number = tl.program_id(0) + 2 * tl.program_id(1) + 6 * tl.program_id(2)
        tl.store(out_ptr + number, float(tl.num_programs(0) + 10 * tl.num_programs(2)))

    out = torch.zeros(24)
    report = launch(where, (2, 3, 4), out)
    assert (out == 42).all() and report.programs == 24


def test_a_wave_finds_what_another_program_has_loaded():
    def sums(x_ptr, y_ptr):
        tl.store(y_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + tl.arange(0, 16))))

    x, y = torch.ones(16), torch.zeros(4)
    report = launch(sums, (4,), x, y)
    assert (y == 16).all()
    assert [report.wave_bytes(n) for n in (1, 2, 3, 4)] == [256, 128, 128, 64]
    assert report.loaded["x"] == 4 * 64


def no_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def test_what_lies_outside_is_refused_by_name():
    x, y = torch.zeros(12), torch.zeros(16)
    with pytest.raises(OutOfRange, match=r"program 1 reads x\[12\], and x has 12") as e:
        launch(no_mask, (2,), x, y, 12, BLOCK=8)
    assert "(line: tl.store(y_ptr + i, tl.load(x_ptr + i)))" in str(e.value)
    with pytest.raises(OutOfRange, match=r"program 1 stores y\[12\], and y has 12"):
        launch(no_mask, (2,), y, x, 12, BLOCK=8)

    def before(x_ptr, y_ptr):
        tl.store(y_ptr, tl.load(x_ptr - 1))

    with pytest.raises(OutOfRange, match=r"reads x\[-1\]"):
        launch(before, (1,), x, y)


def test_the_gap_between_rows_of_a_view_is_not_the_tensors():
    wide = torch.arange(40.0).view(4, 10)
    view, out = wide[:, 2:8], torch.zeros(4, 8)

    def rows(x_ptr, y_ptr, d, stride):
        i = tl.arange(0, 8)
        row = tl.program_id(0)
        tl.store(y_ptr + row * 8 + i, tl.load(x_ptr + row * stride + i, mask=i < d))

    report = launch(rows, (4,), view, out, 6, 10)
    assert torch.equal(out[:, :6], view) and report.loaded["x"] == 4 * 24
    with pytest.raises(OutOfRange, match=r"x\[6\], which lies between the rows of x"):
        launch(rows, (4,), view, out, 7, 10)
    with pytest.raises(OutOfRange, match=r"x\[40\], .* 24 numbers, .* at x\[35\]"):
        launch(rows, (2,), view, out, 6, 40)


def test_a_masked_number_is_undefined_without_other():
    x, y = torch.ones(8), torch.zeros(8)

    def copy(x_ptr, y_ptr):
        i = tl.arange(0, 8)
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < 5))

    launch(copy, (1,), x, y)
    assert y[:5].eq(1).all() and y[5:].isnan().all()


def test_two_programs_at_one_place_are_a_race():
    x, y = torch.ones(8), torch.zeros(8)

    def both(x_ptr, y_ptr):
        i = tl.arange(0, 4)
        tl.store(y_ptr + 2 * tl.program_id(0) + i, tl.load(x_ptr + i))

    with pytest.raises(Race, match=r"program 1 stores y\[2\], which program 0 stores"):
        launch(both, (2,), x, y)

    def shift(x_ptr):
        i = tl.program_id(0) + tl.arange(0, 1)
        tl.store(x_ptr + i, tl.load(x_ptr + i + 1))

    with pytest.raises(Race, match=r"program 1 stores x\[1\], which program 0 reads"):
        launch(shift, (3,), x)

    def shift_back(x_ptr):
        i = 1 + tl.program_id(0) + tl.arange(0, 1)
        tl.store(x_ptr + i, tl.load(x_ptr + i - 1))

    with pytest.raises(Race, match=r"program 1 reads x\[1\], which program 0 stores"):
        launch(shift_back, (3,), x)

    def twice(y_ptr):
        tl.store(y_ptr + tl.arange(0, 4) // 2, tl.arange(0, 4))

    with pytest.raises(Race, match="stores several numbers to one place of y at once"):
        launch(twice, (1,), y)


def test_a_reader_is_remembered_behind_another_reader():
    """Program 0 and 1 read x[0], then 1 stores it: a race with 0."""

    def read_then_store(x_ptr):
        first = tl.load(x_ptr + tl.arange(0, 1))
        if tl.program_id(0):
            tl.store(x_ptr + tl.arange(0, 1), first)

    with pytest.raises(Race, match=r"program 1 stores x\[0\], which another program"):
        launch(read_then_store, (2,), torch.ones(2))


def test_a_program_may_change_what_only_it_reads():
    def add_one(x_ptr):
        i = tl.program_id(0) * 4 + tl.arange(0, 4)
        tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)
        tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)

    x = torch.zeros(8)
    launch(add_one, (2,), x)
    assert (x == 2).all()


def test_refuses():
    x = torch.zeros(4)
    for grid in ((), (0,), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match="must have 1 to 3 axes, each 1 at least"):
            launch(double, grid, x, x, 4, BLOCK=4)
    with pytest.raises(TypeError, match="missing a required argument"):
        launch(double, (1,), x, x)
    with pytest.raises(TypeError, match="a kernel is a function, not a int"):
        launch(3, (1,), x)
    with pytest.raises(ValueError, match=r"tl\.arange of 6: the size must be a power"):
        launch(double, (1,), x, x, 4, BLOCK=6)
    with pytest.raises(RuntimeError, match=r"tl\.load belongs into a kernel"):
        tl.load(x)

    def shapes(x_ptr):
        tl.dot(tl.zeros((4, 4), tl.float32), tl.zeros((8, 4), tl.float32))

    with pytest.raises(ValueError, match=r"tl\.dot of \(4, 4\) and \(8, 4\)"):
        launch(shapes, (1,), x)

    def wide_mask(x_ptr):
        tl.load(x_ptr + tl.arange(0, 4), mask=tl.zeros((2, 4), tl.int32) == 0)

    with pytest.raises(ValueError, match=r"a mask \(2, 4\) for addresses \(4,\)"):
        launch(wide_mask, (1,), x)

    def no_pointer(x_ptr):
        tl.load(tl.arange(0, 4))

    with pytest.raises(TypeError, match=r"tl\.load takes a pointer plus offsets, not"):
        launch(no_pointer, (1,), x)


def test_a_kernels_own_functions_see_the_same_program():
    x, y = torch.randn(8), torch.zeros(8)

    def kernel(x_ptr, y_ptr):
        i = place(4)
        tl.store(y_ptr + i, tl.load(x_ptr + i))

    launch(kernel, (2,), x, y)
    assert torch.equal(x, y)


def place(size):
    return tl.program_id(0) * size + tl.arange(0, size)


def test_bf16_and_whole_numbers():
    """torch's arithmetic: right in bf16, where Triton's interpreter is not."""
    x = torch.randn(16, 16).bfloat16()
    y, numbers = torch.zeros(16, 16), torch.arange(16)

    def square(x_ptr, n_ptr, y_ptr):
        i = tl.arange(0, 16)
        at = i[:, None] * 16 + i[None, :]
        block = tl.load(x_ptr + at)
        n = tl.load(n_ptr + i, mask=i < 8)
        tl.store(y_ptr + at, tl.dot(block, tl.trans(block)) + n[None, :])

    report = launch(square, (1,), x, numbers, y)
    wanted = x.float() @ x.float().T + torch.where(numbers < 8, numbers, 0)
    torch.testing.assert_close(y, wanted)
    assert report.flops == 2 * 16**3 and report.loaded["x"] == 512


def test_the_room_shows_what_others_use():
    for name in tk.__all__:
        assert getattr(tk, name) is not None
