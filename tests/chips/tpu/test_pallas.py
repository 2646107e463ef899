"""Kernels in the TPU interpreter: results, what they moved, what nothing orders."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax")

from llmlab.chips.tpu import interpreter, pallas
from llmlab.chips.tpu.interpreter import MODES, watch
from llmlab.chips.tpu.pallas import (
    BUGS,
    loads,
    matmul,
    matmul_loads,
    refusal,
    ring_all_gather,
    ring_all_reduce,
    sum_blocks,
    vmem_bytes,
)

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def races_found() -> bool:
    """The interpreter's own verdict on the last kernel."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


# ------------------------------------------------------- a product, by the pipeline

# m, n, k, blocks, order
PRODUCTS = (
    (8, 8, 8, (4, 4, 4), "mn"),
    (10, 9, 13, (4, 4, 5), "nm"),
    (5, 7, 3, (8, 8, 8), "mn"),
    (6, 10, 13, (4, 3, 13), "mn"),
    (6, 10, 13, (4, 3, 13), "nm"),
)


@pytest.mark.parametrize(("m", "n", "k", "blocks", "order"), PRODUCTS)
def test_a_product_and_what_it_moves(m, n, k, blocks, order):
    x, w = numbers(m, k), numbers(k, n)
    y, report = matmul(x, w, *blocks, order)
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-5)
    counted = matmul_loads(m, n, k, *blocks, order)
    seen = report.loaded("x"), report.loaded("w"), report.stored("y")
    assert seen == tuple(counted[name][0] for name in "xwy")
    assert not report.races and not report.left_over and not races_found()


@pytest.mark.parametrize(("a", "b", "c"), [(1, 1, 1), (2, 3, 4), (3, 2, 1), (5, 1, 2)])
def test_loads_in_closed_form(a, b, c):
    """An axis that an index leaves out costs nothing if all further in are left out."""
    grid = (a, b, c)
    assert loads(grid, lambda i, j, k: (i, j, k)) == a * b * c
    assert loads(grid, lambda i, j, k: (i, j)) == a * b
    assert loads(grid, lambda i, j, k: (i,)) == a
    assert loads(grid, lambda i, j, k: ()) == 1
    # the last block of one sweep is not the first one of the next, unless it is alone
    assert loads(grid, lambda i, j, k: (k,)) == (a * b * c if c > 1 else 1)


def test_the_order_counts_only_where_k_is_one_block():
    sizes = (4096, 1024, 512)
    whole = [matmul_loads(*sizes, 256, 256, 512, order) for order in ("mn", "nm")]
    assert whole[0]["x"] == (16, 4 * 4096 * 512)
    assert whole[0]["w"] == (64, 4 * 16 * 1024 * 512)
    assert whole[1]["x"] == (64, 4 * 4 * 4096 * 512)
    assert whole[1]["w"] == (4, 4 * 1024 * 512)
    cut = [matmul_loads(*sizes, 256, 256, 256, order) for order in ("mn", "nm")]
    assert cut[0] == cut[1]
    assert cut[0]["y"] == whole[0]["y"] == (64, 4 * 4096 * 1024)


def test_what_vmem_must_hold():
    assert vmem_bytes(2, 3, 5) == 4 * (2 * (2 * 5 + 5 * 3 + 2 * 3) + 2 * 3)


def test_blocks_that_a_tpu_takes():
    """The interpreter takes any block; the compiler wants tiles of 8 by 128."""
    assert refusal(300, 200, 260, 128, 128, 128) == ""
    assert refusal(10, 9, 13, 10, 9, 13) == "", "or the whole matrix"
    for blocks in ((4, 128, 128), (128, 64, 128), (128, 128, 64)):
        assert "divisible by 8 and 128" in refusal(300, 200, 260, *blocks), blocks


# ------------------------------------------------------------------ copies by hand


def sums(x: np.ndarray, rows: int) -> np.ndarray:
    padded = np.concatenate([x, np.zeros((-len(x) % rows, x.shape[1]))])
    return padded.reshape(-1, rows, x.shape[1]).sum(0)


@pytest.mark.parametrize(
    ("m", "n", "rows", "dma"),
    [
        (29, 5, 8, "on_wait"),
        (29, 5, 8, "eager"),
        (6, 3, 2, "eager"),
        (3, 4, 8, "eager"),
    ],
)
def test_blocks_are_copied_and_added(m, n, rows, dma):
    x = numbers(m, n)
    y, report = sum_blocks(x, rows, dma=dma)
    np.testing.assert_allclose(y, sums(x, rows), rtol=1e-5, atol=1e-5)
    assert not report.races and not report.left_over and not races_found()
    blocks = -(-m // rows)
    assert [c.number for c in report.copies] == list(range(blocks))
    assert [c.place[0][0] for c in report.copies] == [i % 2 for i in range(blocks)]
    assert all((c.source, c.target) == ("x", "slots") for c in report.copies)
    assert {c.bytes for c in report.copies} == {4 * rows * n}


def test_the_next_block_comes_while_this_one_is_added():
    """Nothing orders copy i + 1 and the use of block i: both may be at once."""
    _, report = sum_blocks(numbers(8, 3), 2)
    uses = [a for a in report.accesses if (a.buffer, a.kind) == ("slots", "read")]
    comes = [a for a in report.accesses if (a.buffer, a.kind) == ("slots", "write")]
    assert len(uses) == len(comes) == 4
    for block, use in enumerate(uses):
        together = [interpreter.unordered(use, copy) for copy in comes]
        assert together == [copy == block + 1 for copy in range(4)]


# mode, bug: the numbers, pairs (writer's line, other's kind), a semaphore left over
SEEN = {
    ("on_wait", "no wait"): ("nan", 0, False),
    ("on_wait", "next slot"): ("nan", 0, False),
    ("on_wait", "one slot"): ("right", 3, False),
    ("eager", "no wait"): ("right", 4, True),
    ("eager", "next slot"): ("right", 2, True),
    ("eager", "one slot"): ("wrong", 3, False),
}


@pytest.mark.parametrize(("dma", "bug"), SEEN)
def test_a_race_is_found_and_named(dma, bug):
    """No mode shows all three in the numbers; eagerly carried out, all three race."""
    x = numbers(8, 3)
    y, report = sum_blocks(x, 2, bug, dma)
    right = np.allclose(y, sums(x, 2), atol=1e-5)
    verdict = "nan" if np.isnan(y).any() else "right" if right else "wrong"
    assert (verdict, len(report.races), report.left_over) == SEEN[dma, bug]
    assert bool(report.races) == races_found()
    for a, b in report.races:
        assert a.buffer == b.buffer == "slots" and "write" in (a.kind, b.kind)


def test_a_race_in_words():
    _, report = sum_blocks(numbers(8, 3), 2, "one slot")
    told = [f"{a}; {b}" for a, b in report.races]
    assert told[0] == (
        "read of slots by chip 0 in `y[...] += slots[slot(block)]`; "
        "write of slots by copy 1 of chip 0 in `copy(block + 1).start()`"
    )
    assert "by copy 0 of chip 0 in `copy(0).start()`" in told[1]


def test_a_copy_that_nobody_waits_for_is_never_carried_out():
    _, report = sum_blocks(numbers(8, 3), 2, "next slot")
    assert [c.number for c in report.copies] == [1, 2, 3]


# ------------------------------------------------------------------ a ring of chips


@pytest.mark.parametrize(("p", "dma"), [(2, "on_wait"), (4, "eager"), (5, "on_wait")])
def test_all_gather(p, dma):
    shards = numbers(p, 3, 2)
    gathered, report = ring_all_gather(shards, dma)
    assert (gathered == shards).all() and gathered.shape == (p, p, 3, 2)
    assert not report.races and not report.left_over and not races_found()
    steps = [(c.source_chip, c.number, c.target_chip) for c in report.sent]
    assert steps == [(i, step, (i + 1) % p) for i in range(p) for step in range(p - 1)]
    shard = [c.place[0][0] for c in report.sent if c.source_chip == 1]
    assert shard == [(1 - step) % p for step in range(p - 1)]
    assert {c.bytes for c in report.sent} == {4 * 3 * 2}


@pytest.mark.parametrize(("p", "n"), [(2, 3), (3, 1), (5, 11)])
def test_all_reduce(p, n):
    values = numbers(p, n)
    reduced, report = ring_all_reduce(values)
    np.testing.assert_allclose(reduced[0], values.sum(0), rtol=1e-4, atol=1e-5)
    assert (reduced == reduced[0]).all(), "the same bits on every chip"
    assert not report.races and not report.left_over and not races_found()
    steps = [(c.source_chip, c.number, c.target_chip) for c in report.sent]
    sent = range(2 * (p - 1))
    assert steps == [(i, step, (i + 1) % p) for i in range(p) for step in sent]
    assert {c.bytes for c in report.sent} == {4 * -(-n // p)}


def test_a_chunk_is_added_in_the_order_of_the_ring():
    """Chunk c starts at chip c and goes right: so float32 is added in that order."""
    p, n = 4, 8
    values = (numbers(p, n) * 10.0 ** np.arange(p)[:, None]).astype(np.float32)
    reduced, _ = ring_all_reduce(values, dma="eager")
    for chunk in range(p):
        part = slice(2 * chunk, 2 * chunk + 2)
        total = values[chunk, part]
        for step in range(1, p):
            total = values[(chunk + step) % p, part] + total
        np.testing.assert_array_equal(reduced[0, part], total)


@pytest.mark.parametrize("dma", MODES)
def test_without_back_pressure_the_third_chunk_races(dma):
    """Two slots hold two chunks, whatever the neighbour does; four chips send three."""
    values = numbers(4, 8)
    _, report = ring_all_reduce(values, back_pressure=False, dma=dma)
    assert races_found() and not report.left_over
    (use, copy), _ = report.races
    assert (use.buffer, use.kind, copy.kind) == ("inbox", "read", "write")
    assert "inbox" in use.line and use.by == "chip 0"
    assert copy.by == "copy 2 of chip 3", "that of the third step"


def test_three_chips_need_no_back_pressure():
    _, report = ring_all_reduce(numbers(3, 7), back_pressure=False)
    assert not report.races and not races_found()


def lowered(call, *arrays, buffers):
    """In place of `watch`: JAX lowers the kernel for a TPU, and stops there."""
    import jax
    from jax import export

    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None))
        for a in arrays
    ]
    exported = export.export(jax.jit(call), platforms=["tpu"])(*shapes)
    return np.zeros(arrays[0].shape), exported


@pytest.mark.parametrize(
    ("call", "chips"),
    [
        (lambda: sum_blocks(np.ones((64, 128), np.float32), 8), 1),
        (lambda: ring_all_gather(np.ones((4, 8, 128), np.float32)), 4),
        (lambda: ring_all_reduce(np.ones((1, 4096), np.float32).repeat(4, 0)), 4),
    ],
)
def test_kernels_that_a_tpu_would_take(call, chips, monkeypatch):
    """Not only the interpreter: they are lowered for a TPU, without one."""
    monkeypatch.setattr(pallas, "watch", lowered)
    monkeypatch.setattr(pallas, "settings", lambda dma: False)
    _, exported = call()
    assert exported.nr_devices == chips and exported.platforms == ("tpu",)
    assert "tpu_custom_call" in exported.mlir_module()


# -------------------------------------------------------------- what must not happen


def test_a_kernel_leaves_no_trace(capsys):
    """NumPy's stream of random numbers goes on as if nothing had run."""
    np.random.seed(0)
    expected = np.random.rand(2)
    np.random.seed(0)
    ring_all_gather(numbers(2, 1, 1))
    sum_blocks(numbers(4, 1), 2, "no wait", "eager")
    assert (np.random.rand(2) == expected).all()
    assert capsys.readouterr().out == ""


def test_a_kernel_that_fails_does_not_stop_the_next_one():
    import jax
    from jax.experimental import pallas as pl

    def kernel(x, y):
        y[...] = x[pl.ds(x[0].astype(int), 4)]

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((4,), np.float32),
        interpret=pallas.settings(),
    )
    buffers = [("x", (8,)), ("y", (4,)), ("x block", (8,)), ("y block", (4,))]
    with pytest.raises(Exception, match="Out-of-bounds read"):
        watch(call, np.full(8, 7, np.float32), buffers=buffers)
    y, report = watch(call, np.full(8, 2, np.float32), buffers=buffers)
    assert (y == 2).all() and report.loaded("x") == report.stored("y") == 1


def test_records_that_have_moved(monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    sum_blocks(numbers(2, 1), 1)
    monkeypatch.delattr(interpret_pallas_call.races, "reads")
    with pytest.raises(RuntimeError, match=r"JAX .* keeps the races .* elsewhere"):
        interpreter._recorded()


def test_jax_that_was_started_with_one_device(monkeypatch):
    import jax

    one = jax.devices("cpu")[:1]
    monkeypatch.setattr(jax, "devices", lambda kind: one)
    with pytest.raises(RuntimeError, match="ring of 3 chips, but JAX runs with 1 CPU"):
        ring_all_gather(numbers(3, 1, 1))


X = np.ones((4, 4), np.float32)
REFUSED = (
    (lambda: matmul(X, X[:3], 2, 2, 2), r"x is \(4, 4\) and w is \(3, 4\)"),
    (lambda: matmul(X, X, 2, 0, 2), "block_n=0 must be a whole number"),
    (lambda: matmul(X, X, 2, 2, 2, "kmn"), "order='kmn' must be 'mn' or 'nm'"),
    (lambda: matmul(X[:0], X, 2, 2, 2), "m=0 must be"),
    (lambda: matmul_loads(4, 4, 4, -1, 2, 2), "block_m=-1 must be"),
    (lambda: matmul_loads(4, 4, 4, 1, 2, 2, "k"), "order='k' must be"),
    (lambda: vmem_bytes(4, 4, 0), "block_k=0 must be"),
    (lambda: refusal(0, 1, 1, 1, 1, 1), "m=0 must be"),
    (lambda: sum_blocks(X, 0), "rows=0 must be"),
    (lambda: sum_blocks(X[:0], 1), "m=0 must be"),
    (
        lambda: sum_blocks(X, 1, "none"),
        r"bug='none' must be None or one of \('no wait'",
    ),
    (lambda: sum_blocks(X, 1, dma="now"), "dma='now' must be one of"),
    (lambda: ring_all_gather(X[:1, None]), "p=1 chips must be from 2 to 8"),
    (lambda: ring_all_gather(np.ones((9, 1, 1), np.float32)), "p=9 chips must be"),
    (lambda: ring_all_reduce(X[:, :0]), "n=0 must be"),
    (lambda: ring_all_reduce(X[:1]), "p=1 chips must be from 2 to 8"),
)


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_nonsense_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_every_bug_is_tested():
    assert {bug for _, bug in SEEN} == set(BUGS)
