"""The script for a GPU, without one: its checks in their CPU's form, and its runner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import gpu_check, gpu_checks
from scripts.gpu_checks import CHECKS, Skipped

HERE = [c.name for c in CHECKS.values() if c.cpu and not c.interprets]
INTERPRETED = [c.name for c in CHECKS.values() if c.cpu and c.interprets]


def test_most_checks_have_a_form_for_a_cpu():
    assert len(HERE) + len(INTERPRETED) >= len(CHECKS) - 1


@pytest.mark.parametrize("name", HERE)
def test_a_check_passes_on_a_cpu(name):
    check = CHECKS[name]
    for package in check.needs:
        pytest.importorskip(package)
    try:
        found = check.run("cpu")
    except Skipped as reason:
        pytest.skip(str(reason))
    json.dumps(found)
    assert found


def test_kernels_pass_in_tritons_interpreter():
    """As the script runs them: in processes where Triton interprets."""
    pytest.importorskip("triton")
    code = (
        "import sys, json; from scripts.gpu_checks import CHECKS; json.dump({n:"
        " CHECKS[n].run('cpu') for n in sys.argv[1:]}, sys.stdout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == set(INTERPRETED)


def test_the_command_runs_checks_and_writes_what_they_found(tmp_path, capsys):
    out = tmp_path / "found.json"
    asked = ["--cpu", "--only", "memory", "attention_times", "--out", str(out)]
    assert gpu_check.main(asked) == 0
    report = json.loads(out.read_text())
    assert report["device"] == "cpu" and report["versions"]["torch"]
    assert report["checks"]["memory"]["status"] == "passed"
    assert report["checks"]["memory"]["results"]["weights"] > 0
    assert report["checks"]["attention_times"]["why"] == "it has no form for a CPU"
    said = capsys.readouterr().out
    assert "passed   memory" in said and "1 passed, 1 skipped" in said
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_one_that_fails_hangs_or_dies_does_not_stop_the_others(monkeypatch, tmp_path):
    ends = iter([None, (-11, "noise\nSegmentation fault"), (1, "")])
    monkeypatch.setattr(gpu_check, "finished", lambda *_: next(ends))
    out = tmp_path / "found.json"
    names = ["device", "memory", "lora"]
    assert gpu_check.run_all(names, "cpu", out, 100) == 1
    checks = json.loads(out.read_text())["checks"]
    assert [checks[name]["status"] for name in names] == ["timeout", "failed", "failed"]
    assert checks["device"]["why"] == "took longer than 45 s"
    assert checks["memory"]["why"] == "the process ended with -11: Segmentation fault"


def test_what_is_missing_is_skipped_by_name(monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    found = gpu_check.one(CHECKS["qlora"], "cpu", 100)
    assert found["status"] == "skipped"
    assert found["why"] == "bitsandbytes, transformers, peft is not installed"
    assert gpu_check.one(CHECKS["memory"], "cpu", 3)["why"] == "no time is left"


def test_a_check_that_fails_says_why(monkeypatch, tmp_path, capsys):
    def broken(device):
        gpu_checks.near({"logits": 0.5}, 0.1)

    monkeypatch.setitem(
        CHECKS, "memory", gpu_checks.Check("memory", "", broken, (), True, False, 1.0)
    )
    assert (
        gpu_check.main(["--cpu", "--run", "memory", "--result", f"{tmp_path}/r"]) == 1
    )
    found = json.loads((tmp_path / "r").read_text())
    why = "AssertionError: logits is off by 0.5, more than 0.1"
    assert found == {"status": "failed", "why": why}


def test_a_hanging_check_is_ended_with_all_that_it_started(tmp_path):
    marker = tmp_path / "child"
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c',"
        " 'import time; time.sleep(60)']);"
        f" open({str(marker)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    assert gpu_check.finished([sys.executable, "-c", code], dict(os.environ), 3) is None
    assert time.monotonic() - started < 20
    child = int(marker.read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("what the check had started still runs")


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--cpu runs the checks that can do without" in capsys.readouterr().out
    assert gpu_check.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in CHECKS)


def test_families_and_ranks():
    assert gpu_checks.family("wgmma.mma_async.sync") == "wgmma"
    assert gpu_checks.rank_correlation([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]) == 1
    assert gpu_checks.rank_correlation([1.0, 2.0, 3.0], [9.0, 4.0, 2.0]) == -1
