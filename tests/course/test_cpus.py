"""Which part of the CPU matrix has its day: every cell gets one, parts are short."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from scripts import test_cpus as cpus

ROOT = Path(__file__).resolve().parents[2]
EVERY = cpus.cells(cpus.pieces(), cpus.settings())
PARTS = cpus.parts(EVERY)
# What torch and bitsandbytes take the CPU to be.
REPORT = """
import json, torch
from llmlab.course.four_bits import without_compiler
with without_compiler():
    import bitsandbytes as b
layer = b.nn.Linear4bit(64, 64)
print(json.dumps([torch.backends.cpu.get_cpu_capability(),
                  torch.get_num_threads(), bool(layer.support_avx512bf16_for_cpu)]))
"""


def test_every_cell_of_the_matrix_gets_its_day(capsys):
    start = date(2026, 11, 28)
    seen = []
    for day in range(len(PARTS)):
        seen += PARTS[cpus.part_of_day(start + timedelta(day), len(PARTS))]
    with capsys.disabled():
        print(f"\n{len(EVERY)} cells in {len(PARTS)} days")
    assert len(seen) == len(EVERY) and set(seen) == set(EVERY)


def test_the_matrix_is_whole():
    found = {(cell.setting, cell.piece.path) for cell in EVERY}
    lessons = sorted((ROOT / "notebooks").rglob("*.ipynb"))
    files = [p for f in cpus.FOLDERS for p in (ROOT / "tests" / f).glob("test_*.py")]
    assert lessons and files
    for path in lessons + files:
        name = path.relative_to(ROOT).as_posix()
        if ".ipynb_checkpoints" in path.parts:
            continue
        four_bits = any(place in name for place in cpus.FOUR_BITS)
        for setting in cpus.settings():
            due = four_bits or setting.bitsandbytes == "avx2"
            assert ((setting, name) in found) == due, (setting, name)


def test_what_uses_bitsandbytes_is_run_under_all_its_paths():
    """A lesson or a test that names it lies where FOUR_BITS says."""
    for piece in cpus.pieces():
        text = (ROOT / piece.path).read_text(encoding="utf-8")
        if "import bitsandbytes" in text or "Linear4bit" in text:
            assert any(place in piece.path for place in cpus.FOUR_BITS), piece.path


def test_a_part_keeps_to_its_budget():
    for part in PARTS:
        seconds = math.fsum(cell.piece.seconds for cell in part)
        assert seconds <= cpus.BUDGET or len(part) == 1
        assert seconds <= cpus.LIMIT


def test_shards_of_a_file_hold_each_test_once(monkeypatch):
    kept = []
    for shard in range(3):
        monkeypatch.setenv(cpus.SHARD, f"{shard}/3")
        items = list(range(10))
        cpus.pytest_collection_modifyitems(None, items)
        kept += items
    assert sorted(kept) == list(range(10))


@pytest.mark.parametrize("count", [1, 7, 170])
def test_parts_n_of_m_hold_each_cell_once(count):
    together = []
    for number in range(1, count + 1):
        together += cpus.share(EVERY, number, count)
    assert together == EVERY
    with pytest.raises(ValueError, match="1 … "):
        cpus.share(EVERY, count + 1, count)


def test_a_failing_cell_fails_the_run_and_time_is_bounded(capsys):
    now = [0.0]

    def run(cell):
        now[0] += 70.0
        return int(cell == EVERY[1])

    code = cpus.run_all(EVERY[:4], 120.0, run=run, clock=lambda: now[0])
    said = capsys.readouterr().out
    assert code == 1 and now[0] == 140.0
    assert said.count("NOT RUN") == 2 and said.count("FAILED") == 1
    assert cpus.run_all(EVERY[:1], None, run=run, clock=lambda: now[0]) == 0


@pytest.mark.parametrize("vectors", [v for v in cpus.VECTORS if v != "best"])
def test_a_setting_reaches_torch_and_bitsandbytes(vectors):
    import torch

    if vectors not in cpus.here() and torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip(f"torch has no {vectors} here")
    setting = cpus.Setting(vectors, "avx512bf16", 4)
    env = os.environ | setting.environment()
    done = subprocess.run(
        [sys.executable, "-c", REPORT], env=env, capture_output=True, text=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == [vectors.upper(), 4, True]
