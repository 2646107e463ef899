"""The kernels: in our interpreter, in Triton's, against torch.

Whether Triton interprets or compiles is settled at its import. So its interpreter has a
process of its own, and all cases run in it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from llmlab.compilers import program
from llmlab.compilers.triton_kernels import launch, tl

pytest.importorskip("triton")

from llmlab.compilers.triton_kernels import kernels, launching
from llmlab.compilers.triton_kernels.kernels import grouped

SOFTMAX = ((1, 1), (7, 33), (3, 64), (2, 100))
# T, d, f, tile
MLP = (
    (1, 1, 1, (16, 16, 16, 1)),
    (37, 50, 70, (16, 32, 16, 2)),
    (33, 17, 130, (16, 64, 32, 3)),
    (64, 32, 16, (32, 16, 32, 8)),
)
# B, H, K, T, S, D, causal, rows, cols
ATTENTION = (
    (2, 6, 3, 29, 29, 8, True, 16, 16),
    (1, 4, 2, 5, 37, 16, True, 16, 16),
    (2, 6, 2, 1, 50, 24, True, 16, 32),
    (1, 2, 2, 21, 18, 8, True, 16, 16),
    (1, 3, 1, 18, 21, 20, False, 32, 16),
    (1, 1, 1, 16, 17, 16, True, 16, 16),  # the last key alone in its tile
)

INTERPRETED = """
import json, torch
from llmlab.compilers.triton_kernels import kernels, launching
from llmlab.compilers.triton_kernels.kernels import grouped
from tests.compilers.triton import test_kernels as t

found = {"interpreted": launching.interpreted(), "off": {}}
def note(name, ours, right):
    assert ours.dtype == right.dtype and ours.shape == right.shape
    found["off"][name] = (ours.float() - right.float()).abs().max().item()
for shape in t.SOFTMAX:
    x = t.rows_with_gaps(*shape)
    note(f"softmax {shape}", launching.softmax(x), x.softmax(-1))
for T, d, f, tile in t.MLP:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if T != 37 and dtype != torch.float32:
            continue
        x, w, b = (x.to(dtype) for x in t.program.example_inputs("mlp", 1, T, d, f))
        ours = launching.mlp(x, w, b, launching.Tile(*tile))
        right = t.program.mlp(x.float(), w.float(), b.float()).to(dtype)
        note(f"mlp {T} {dtype}", ours, right)
for case in t.ATTENTION:
    q, k, v, causal, rows, cols = t.attention_case(case)
    ours = launching.attention(q, k, v, causal, rows, cols)
    note(f"attention {case}", ours, t.attention(q, k, v, causal))
half = [x.bfloat16() for x in (q, k, v)]
note("attention bf16", launching.attention(*half), t.attention(*half, True))
q, k, v = t.program.example_inputs("attention_row", T=50, d=20)
row = launching.attention(q[None, None], k[None, None], v[None, None])[0, 0]
note("the part's row", row, t.program.attention_row(q, k, v))
print(json.dumps(found))
"""


def rows_with_gaps(T, d):
    """Rows that do not touch, with numbers for which e overflows without a maximum."""
    torch.manual_seed(T)
    return (torch.randn(T, d + 7) * 200)[:, 3 : d + 3]


def attention_case(case):
    B, H, K, T, S, D, causal, rows, cols = case
    torch.manual_seed(T)
    q, k, v = (torch.randn(B, h, n, D) for h, n in ((H, T), (K, S), (K, S)))
    return q, k, v, causal, rows, cols


def attention(q, k, v, causal):
    """In torch, with the last query at the last key, and 0 where none is seen."""
    G, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    wide_k, wide_v = (x.float().repeat_interleave(G, 1) for x in (k, v))
    scores = q.float() @ wide_k.mT / q.shape[-1] ** 0.5
    if causal:
        late = torch.arange(S) > S - T + torch.arange(T)[:, None]
        scores = scores.masked_fill(late, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ wide_v).to(q.dtype)


@pytest.fixture(scope="module")
def interpreted():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", INTERPRETED],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_in_tritons_interpreter_all_kernels_equal_torch(interpreted):
    assert interpreted["interpreted"]
    assert len(interpreted["off"]) == len(SOFTMAX) + len(MLP) + 2 + len(ATTENTION) + 2
    for name, off in interpreted["off"].items():
        limit = 2e-5
        # a unit in the last place of the largest result, which is below 64
        for dtype, unit in (("torch.float16", 2**-5), ("torch.bfloat16", 2**-2)):
            if name.endswith(dtype):
                limit = unit
        if name == "attention bf16":
            limit = 0.03
        assert off <= limit, name


@pytest.mark.parametrize("shape", SOFTMAX)
def test_softmax_reads_each_number_once(shape):
    x = rows_with_gaps(*shape)
    y = torch.empty(shape)
    cols = 1 << (shape[1] - 1).bit_length()
    grid = (shape[0],)
    report = launch(kernels.softmax_rows, grid, x, y, shape[1], x.stride(0), cols)
    torch.testing.assert_close(y, x.softmax(-1))
    assert report.loaded["x"] == report.stored["y"] == x.numel() * 4


@pytest.mark.parametrize("case", MLP, ids=lambda c: f"{c[0]}x{c[1]}x{c[2]}")
def test_mlp_equals_the_parts_function_and_moves_what_tiles_need(case):
    T, d, f, sizes = case
    x, w, b = program.example_inputs("mlp", 1, T, d, f)
    y, tile = torch.empty(T, f), launching.Tile(*sizes)
    grid = launching.mlp_grid(x, w, tile)
    arguments = launching.mlp_arguments(x, w, b, y, tile)
    report = launch(kernels.mlp_tile, grid, *arguments)
    torch.testing.assert_close(y, program.mlp(x, w, b), rtol=1e-4, atol=1e-4)
    # x is read once per column of tiles, w once per row of tiles
    down, across = math.ceil(T / tile.rows), math.ceil(f / tile.cols)
    assert report.loaded["x"] == 4 * T * d * across
    assert report.loaded["w"] == 4 * d * f * down
    assert report.written["y"].all()


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_equals_torch_and_loads_keys_once_for_all_heads(case):
    q, k, v, causal, rows, cols = attention_case(case)
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    G = H // K
    o = torch.empty_like(q)
    grid = (math.ceil(T * G / rows), B * K)
    width = max(16, 1 << (D - 1).bit_length())
    fixed = (D, G, rows, cols, width, causal, False)
    report = launch(kernels.attention_tile, grid, q, k, v, o, T, S, D**-0.5, *fixed)
    torch.testing.assert_close(o, attention(q, k, v, causal), rtol=1e-4, atol=1e-5)
    assert report.loaded["q"] == report.stored["o"] == 4 * q.numel()
    if T == 1:
        assert report.loaded["k"] == 4 * k.numel()


def test_every_tile_has_one_program():
    for down, across, group in ((1, 1, 1), (5, 3, 2), (7, 4, 3), (3, 5, 8), (6, 6, 1)):
        found = grouped_order(down, across, group)
        assert sorted(found) == [(i, j) for i in range(down) for j in range(across)]


def grouped_order(down, across, group):
    out = torch.zeros(down * across, dtype=torch.int64)
    launch(note_tile, (down * across,), out, down, across, group)
    return [divmod(number, 1000) for number in out.tolist()]


def note_tile(out_ptr, down, across, GROUP):
    pid = tl.program_id(0)
    i, j = grouped(pid, down, across, GROUP)
    tl.store(out_ptr + pid, 1000 * i + j)


def test_the_tutorials_count_of_blocks():
    """9 x 9 blocks: the first nine results need 90 in rows, 54 in groups of three."""
    for group, blocks in ((1, 90), (3, 54)):
        tiles = grouped_order(9, 9, group)[:9]
        rows, cols = ({tile[axis] for tile in tiles} for axis in (0, 1))
        assert 9 * (len(rows) + len(cols)) == blocks


def test_refuses():
    for arguments in ({"rows": 12}, {"cols": 0}, {"depth": -4}):
        (name, value), *_ = arguments.items()
        with pytest.raises(ValueError, match=f"{name}={value} must be a power of 2"):
            launching.Tile(**arguments)
    with pytest.raises(ValueError, match="group=0 must be 1 at least"):
        launching.Tile(group=0)
    with pytest.raises(ValueError, match="the numbers of a row must touch"):
        launching.softmax(torch.zeros(4, 6).T)
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match="4 query heads must be a multiple of 3"):
        launching.attention(q, k, k)
    with pytest.raises(ValueError, match="rows=3 must be a power of 2"):
        launching.attention(q, q, q, rows=3)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted")
def test_without_a_gpu_and_without_the_interpreter_it_says_what_to_do():
    assert not launching.interpreted()
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before anything"):
        launching.softmax(torch.zeros(4, 6))
