"""Kernels in numba's simulator: their results, and what they are counted to move."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from llmlab.chips import nvidia_gpu as nv

nv.cuda_simulator()

import numba  # noqa: E402
from numba import cuda  # noqa: E402

from llmlab.chips.nvidia_gpu import kernels  # noqa: E402
from llmlab.models.llama import LlamaConfig  # noqa: E402


def random(*shape):
    return np.random.default_rng(sum(shape)).random(shape, np.float32)


def test_vector_add_and_its_last_warp():
    a, b, c = random(70), random(70), np.zeros(70, np.float32)
    traffic = nv.record(kernels.vector_add, 3, 32, a, b, c)
    np.testing.assert_array_equal(c, a + b)
    # 32, 32 and 6 lanes: 4, 4 and 1 sectors, of two inputs and the output
    assert traffic.loads["a"] == nv.Transactions(3, 9, 3, 280)
    assert traffic.stores["c"].sectors == traffic.loads["b"].sectors == 9
    assert (traffic.sectors, traffic.asked) == (27, 840)


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"), [(1, 0, 4), (1, 3, 5), (2, 0, 8), (32, 0, 32)]
)
def test_strided_copies_as_nvidia_counts_them(stride, offset, sectors):
    x, y = random(1100), np.zeros(1100, np.float32)
    traffic = nv.record(kernels.strided_copy, 1, 32, x, y, stride, offset)
    assert traffic.loads["x"].sectors == traffic.stores["y"].sectors == sectors
    places = np.arange(32) * stride + offset
    np.testing.assert_array_equal(y[places], x[places])
    assert np.count_nonzero(y) == 32


@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (33, 20)])
def test_transposes(rows, cols):
    x = random(rows, cols)
    kinds = {
        "naive": kernels.transpose_naive,
        "tiled": kernels.transpose_tiled(),
        "padded": kernels.transpose_tiled(pad=1),
        "swizzled": kernels.transpose_tiled(swizzled=True),
    }
    if (rows, cols) != (32, 32):  # edges: the two whose indices differ most
        kinds = {name: kinds[name] for name in ("naive", "swizzled")}
    found = {}
    for name, kernel in kinds.items():
        y = np.zeros((cols, rows), np.float32)
        grid = (-(-cols // 32), -(-rows // (8 if name == "naive" else 32)))
        found[name] = nv.record(kernel, grid, (32, 8), x, y)
        np.testing.assert_array_equal(y, x.T)
    if (rows, cols) == (32, 32):
        assert found["naive"].stores["y"].sectors == 32 * 32
        assert found["tiled"].stores["y"].sectors == 32 * 4
        columns = {name: found[name].shared_loads["tile"] for name in [*kinds][1:]}
        assert columns["tiled"] == nv.BankCycles(32, 32 * 32, 32)
        assert columns["padded"] == columns["swizzled"] == nv.BankCycles(32, 32, 32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_sums_by_halves(interleaved):
    x, out = random(100), np.zeros(2, np.float32)
    kernel = kernels.block_sum(64, interleaved)
    traffic = nv.record(kernel, 2, 64, x, out)
    np.testing.assert_allclose(out, [x[:64].sum(), x[64:].sum()], rtol=1e-6)
    # Harris: active lanes that lie apart meet in the same banks
    assert (traffic.conflicts > 0) == interleaved


@pytest.mark.parametrize(
    ("M", "K", "N"), [(8, 8, 8), (9, 7, 11), (1, 20, 6), (17, 3, 5)]
)
def test_products_by_tiles_with_uneven_edges(M, K, N):
    a, b, c = random(M, K), random(K, N), np.zeros((M, N), np.float32)
    grid = (-(-N // 8), -(-M // 8))
    traffic = nv.record(kernels.matmul_tiled(8), grid, (8, 8), a, b, c)
    np.testing.assert_allclose(c, a @ b, rtol=1e-5)
    # each number of a is asked for once per column of tiles, of b once per row
    assert traffic.loads["a"].asked == a.nbytes * grid[0]
    assert traffic.loads["b"].asked == b.nbytes * grid[1]
    assert traffic.stores["c"].asked == c.nbytes


def test_nvidias_three_kernels_of_a_times_its_transpose():
    """12.8, 140.2 and 199.4 GB/s on a V100 (Best Practices, table 3): the causes."""
    a, c = random(32, 32), np.zeros((32, 32), np.float32)
    kinds = [
        kernels.gram_direct,
        kernels.gram_tiled(),
        kernels.gram_tiled(pad=1),
    ]
    found = []
    for kernel in kinds:
        c[:] = 0
        found.append(nv.record(kernel, (1, 1), (32, 32), a, c))
        np.testing.assert_allclose(c, a @ a.T, rtol=1e-5)
    direct, tiled, padded = found
    # 32 lanes read one column: 32 sectors each time; the other factor is one word
    assert direct.loads["a"].sectors == 32 * 32 * (32 + 1)
    assert tiled.loads == padded.loads and tiled.loads["a"].sectors == 2 * 32 * 4
    assert tiled.shared_stores["turned"] == nv.BankCycles(32, 32 * 32, 32)
    assert padded.conflicts == 0


@pytest.mark.parametrize("layout", ["thd", "htd", "hdt"])
def test_scores_of_grouped_heads_in_three_layouts(layout):
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
    )
    heads, kept = config.num_attention_heads, config.num_key_value_heads
    tokens, width = 11, config.head_dim
    q, k = random(heads, width), random(tokens, kept, width)
    order = ["thd".index(letter) for letter in layout]
    back = [layout.index(letter) for letter in "thd"]
    k_there = np.ascontiguousarray(k.transpose(order)).transpose(back)
    right = np.einsum("hd,thd->ht", q, k.repeat(heads // kept, axis=1))
    group = heads // kept
    by_thread, by_warp = np.zeros((2, heads, tokens), np.float32)
    first = nv.record(
        kernels.scores_by_thread, (1, heads), 32, q, k_there, by_thread, group
    )
    second = nv.record(
        kernels.scores_by_warp(8), (tokens, heads), 8, q, k_there, by_warp, group
    )
    np.testing.assert_allclose(by_thread, right, rtol=1e-5)
    np.testing.assert_allclose(by_warp, right, rtol=1e-5)
    per_key = {"thd": tokens, "htd": tokens, "hdt": None}[layout]
    if per_key:  # lanes lie a row apart: a sector each
        assert first.loads["k"].sectors == heads * width * tokens
    assert second.loads["k"].asked == first.loads["k"].asked


# what is refused ----------------------------------------------------------------------


def negative(x, y):
    y[0] = x[cuda.threadIdx.x - 1]


def beyond(x, y):
    y[0] = x[cuda.threadIdx.x + 31]


def wrong_rank(x, y):
    y[0] = x[0, 0]


def unwritten(x, y):
    part = cuda.shared.array(32, numba.float32)
    part[cuda.threadIdx.x] = x[0]
    if cuda.blockIdx.x == 1:
        y[0] = part[0] + part[31 - 2 * cuda.threadIdx.x]


def without_barrier(x, y):
    part = cuda.shared.array(32, numba.float32)
    t = cuda.threadIdx.x
    part[t] = x[t]
    if t > 0:
        y[t] = part[t - 1]  # the simulator gets it right: its threads go in order


def with_barrier(x, y):
    part = cuda.shared.array(32, numba.float32)
    t = cuda.threadIdx.x
    part[t] = x[t]
    cuda.syncthreads()
    if t > 0:
        y[t] = part[t - 1]


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (negative, r"x\[-1\] is outside of shape \(32,\), in thread \[0, 0, 0\]"),
        (beyond, r"x\[32\] is outside"),
        (wrong_rank, r"x\[0, 0\] is outside"),
        (unwritten, r"part\[31\] is read before this block has written it"),
    ],
)
def test_what_a_gpu_would_take_without_a_word(kernel, words):
    x, y = random(32), np.zeros(32, np.float32)
    with pytest.raises(IndexError, match=words):
        nv.record(kernel, 2, 16, x, y)


def test_a_race_that_the_simulator_cannot_see():
    x, y = random(32), np.zeros(32, np.float32)
    with pytest.raises(nv.Race, match="both use byte 0 of part"):
        nv.record(without_barrier, 1, 32, x, y)
    np.testing.assert_array_equal(y[1:], x[:-1])
    nv.record(with_barrier, 1, 32, x, y)
    np.testing.assert_array_equal(y[1:], x[:-1])


def test_after_a_failure_the_simulator_is_as_it_was():
    from numba.cuda.simulator.kernel import BlockManager, BlockThread

    before = BlockManager.run, BlockThread.syncthreads
    with pytest.raises(IndexError):
        nv.record(negative, 1, 32, random(32), np.zeros(32, np.float32))
    assert (BlockManager.run, BlockThread.syncthreads) == before
    x, y = random(32), np.zeros(32, np.float32)
    cuda.jit(with_barrier)[1, 32](x, y)
    np.testing.assert_array_equal(y[1:], x[:-1])


def fails_after_a_barrier(x, y):
    cuda.syncthreads()
    if cuda.threadIdx.x == 5:
        y[99] = 0
    cuda.syncthreads()


def test_threads_that_wait_are_ended():
    import threading

    before = threading.active_count()
    with pytest.raises(IndexError, match=r"y\[99\]"):
        nv.record(fails_after_a_barrier, 1, 32, random(32), np.zeros(32, np.float32))
    assert threading.active_count() == before


def test_a_block_of_2048_threads_is_refused():
    """The simulator would run it."""
    with pytest.raises(ValueError, match="from 1 to 1024"):
        nv.record(kernels.vector_add, 1, 2048, random(8), random(8), random(8))


def same_line(x, y):
    y[cuda.threadIdx.x] = x[cuda.threadIdx.x] + x[2 * cuda.threadIdx.x]


def test_two_loads_of_one_line_are_two_requests():
    x, y = random(64), np.zeros(32, np.float32)
    traffic = nv.record(same_line, 1, 32, x, y)
    assert traffic.loads["x"] == nv.Transactions(2, 4 + 8, 1 + 2, 256)


def two_branches(x, y):
    t = cuda.threadIdx.x
    y[t] = x[t] if t < 16 else x[2 * t]


def test_two_branches_of_one_line_are_two_requests():
    x, y = random(64), np.zeros(32, np.float32)
    traffic = nv.record(two_branches, 1, 32, x, y)
    assert traffic.loads["x"] == nv.Transactions(2, 2 + 4, 1 + 1, 128)


def test_numba_of_a_real_gpu_is_named():
    code = (
        "import numba.cuda\n"
        "from llmlab.chips.nvidia_gpu import cuda_simulator\n"
        "try: cuda_simulator()\n"
        "except RuntimeError as why: print(why)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "numba.cuda was imported for a real GPU before" in done.stdout, done.stderr
