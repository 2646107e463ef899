"""launch: what comes back, how failures are told, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest
import torch

from llmlab.parallelism import RankFailed, launch
from tests import processes


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """No process, no file descriptor and no temporary folder more than before."""
    me = psutil.Process()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(me.children(recursive=True)), me.num_fds()
    yield
    assert set(me.children(recursive=True)) <= before[0]
    assert me.num_fds() <= before[1] + 1
    assert not list(tmp_path.glob("llmlab-launch-*"))


def test_closures_and_results():
    offset = 10

    def fn(comm, x):
        return {"rank": comm.rank + offset, "sum": comm.all_reduce(x * comm.rank)}

    out = launch(fn, 3, torch.ones(2))
    assert [o["rank"] for o in out] == [10, 11, 12] and torch.equal(
        out[2]["sum"], torch.full((2,), 3.0)
    )


def test_four_ranks_start_in_about_a_second():
    launch(lambda comm: comm.barrier(), 2)  # import what is needed
    started = time.monotonic()
    launch(lambda comm: comm.barrier(), 4)
    assert time.monotonic() - started < 6, "0.3 s on an idle machine"


def test_a_parent_that_has_used_threads_and_autograd():
    """The hazard of OpenMP and fork: a pool of threads that does not exist in the
    child.
    """
    a = torch.randn(700, 700, requires_grad=True)
    (a @ a).relu().sum().backward()

    def fn(comm):
        b = torch.randn(700, 700, requires_grad=True)
        (b @ b).relu().sum().backward()
        torch.nn.Linear(64, 64)(torch.randn(512, 64)).softmax(-1).sum().backward()
        return comm.all_reduce(b.grad).shape, torch.get_num_threads()

    assert launch(fn, 2, timeout=30) == [(torch.Size([700, 700]), 1)] * 2
    assert launch(lambda comm: torch.get_num_threads(), 1, threads=2) == [2]
    (a @ a).sum().backward()  # and the parent goes on


def test_ranks_start_with_the_parents_random_state():
    torch.manual_seed(4)
    expected = torch.randn(2, generator=torch.Generator().manual_seed(4))
    for got in launch(lambda comm: torch.randn(2), 2):
        assert torch.equal(got, expected)


def test_output_comes_in_rank_order(capsys):
    def fn(comm):
        if comm.rank == 0:
            time.sleep(0.2)
        print("hello", comm.rank)
        os.write(1, b"from C\n")
        print("careful", file=sys.stderr)

    launch(fn, 2)
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"[rank {r}] {w}" for r in range(2) for w in (f"hello {r}", "from C")
    ]
    assert said.err.splitlines() == ["[rank 0] careful", "[rank 1] careful"]
    launch(fn, 2, live=True)
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(said.out.splitlines())


def failure(fn, n=3, **kw):
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(fn, n, **kw)
    return caught.value, time.monotonic() - started


def test_a_rank_that_raises():
    def fn(comm):
        if comm.rank == 1:
            print("last words")
            raise ZeroDivisionError("by rank one")
        comm.all_reduce(torch.ones(1))

    error, seconds = failure(fn)
    assert (error.rank, error.kind) == (1, "raised") and seconds < 10
    assert "rank 1 of 3 raised" in str(
        error
    ) and 'raise ZeroDivisionError("by rank one")' in str(error)


def test_a_rank_that_is_killed():
    def fn(comm):
        if comm.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.all_reduce(torch.ones(1))

    error, seconds = failure(fn)
    assert (
        (error.rank, error.kind) == (2, "died")
        and "killed by SIGKILL" in str(error)
        and seconds < 10
    )


def test_a_rank_that_crashes():
    def fn(comm):
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        comm.barrier()

    error, _ = failure(fn)
    assert (error.rank, error.kind) == (1, "died") and "SIGSEGV" in str(error)


def test_a_rank_that_leaves():
    error, _ = failure(lambda comm: os._exit(3) if comm.rank == 0 else comm.barrier())
    assert (error.rank, error.kind) == (0, "died") and "exit code 3" in str(error)


def test_a_rank_that_hangs():
    def fn(comm):
        if comm.rank == 2:
            time.sleep(60)
        comm.all_reduce(torch.ones(1))

    error, seconds = failure(fn, timeout=2)
    assert (error.rank, error.kind) == (2, "hung") and seconds < 12
    said = str(error)
    assert (
        "rank 0 was at test_launch.py:" in said
        and "in fn, waiting in all_reduce" in said
    )
    assert "waiting" not in said[said.index("rank 2 was at") :]


def test_a_rank_that_returns_while_others_wait():
    error, seconds = failure(
        lambda comm: None if comm.rank == 1 else comm.barrier(), timeout=20
    )
    assert (
        error.kind == "raised"
        and "rank 1 had already returned" in str(error)
        and seconds < 15
    )


def test_a_result_that_cannot_be_pickled():
    error, _ = failure(lambda comm: lambda: 1, 1)
    assert error.rank == 0 and "pickle" in str(error)


def test_sys_exit_is_told():
    error, _ = failure(lambda comm: sys.exit(2), 1)
    assert "SystemExit" in str(error)


def test_interrupting_leaves_nothing(interruptible):
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launch(lambda comm: time.sleep(60), 2)


def test_children_of_children_go_too():
    def fn(comm):
        subprocess.Popen(["sleep", "300"])
        raise RuntimeError("stop")

    failure(fn, 1)  # the fixture looks for the sleep


def parent(folder):
    """Launches two ranks that write down who they are, and stay."""
    # A killed parent cannot clean up its folder.
    tempfile.tempdir = str(folder / "tmp")

    def fn(comm):
        (folder / f"pid{comm.rank}").write_text(str(os.getpid()))
        time.sleep(120)

    launch(fn, 2)


def test_parents_death_takes_the_children_along(tmp_path):
    (tmp_path / "tmp").mkdir()
    with processes.forked(parent, tmp_path) as fork:
        pids = _wait_for(
            lambda: [
                int(p.read_text()) for p in tmp_path.glob("pid*") if p.read_text()
            ],
            2,
        )
        assert all(psutil.pid_exists(pid) for pid in pids)
        psutil.Process(fork.pid).kill()
        _wait_for(lambda: [0 for pid in pids if not _runs(pid)], 2)


def _runs(pid):
    return (
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    )


def _wait_for(look, n):
    for _ in range(300):
        found = look()
        if len(found) == n:
            return found
        time.sleep(0.1)
    raise AssertionError(f"only {found} after 30 s")


def test_nonsense_is_refused():
    for arguments in ((0,), (1.5,)):
        with pytest.raises(ValueError, match="n="):
            launch(print, *arguments)
    with pytest.raises(ValueError, match="timeout=0"):
        launch(print, 1, timeout=0)


def test_a_parent_with_cuda_is_told_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA cannot"):
        launch(print, 1)


def test_a_platform_without_fork_is_told_what_to_use(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(RuntimeError, match="World"):
        launch(print, 1)
