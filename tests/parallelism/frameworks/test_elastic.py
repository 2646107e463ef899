"""A rank is killed, hangs or raises: training resumes from the last checkpoint and ends
at the same loss, at each distance.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from llmlab.parallelism import RankFailed, launch
from llmlab.parallelism.examples import train_elastic
from llmlab.parallelism.examples.train_elastic import Settings, train
from llmlab.parallelism.frameworks import elastic
from tests import processes

SCRIPT = train_elastic.__file__


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return launch(
        train, 2, Settings(str(tmp_path_factory.mktemp("whole"))), timeout=60
    )[0]


@pytest.mark.parametrize(("rank", "at"), [(1, 3), (0, 0), (0, 4)])
def test_a_killed_rank_costs_only_the_steps_since_the_checkpoint(
    rank, at, uninterrupted, tmp_path
):
    results, failures = elastic.supervise(
        train, 2, Settings(str(tmp_path), kill_rank=rank, kill_at=at), timeout=60
    )
    assert [(f.rank, f.kind) for f in failures] == [(rank, "died")]
    assert results[0] == pytest.approx(uninterrupted[at // 2 * 2 :], abs=1e-6)
    assert (
        elastic.newest(tmp_path).name == "step-00000006.pt"
        and len(list(tmp_path.glob("step-*.pt"))) == 2
    )


def test_it_gives_up_in_the_end(tmp_path):
    def always(comm):
        if comm.rank == 1:
            raise ArithmeticError("overflow")
        comm.barrier()

    with pytest.raises(RankFailed, match="overflow") as caught:
        elastic.supervise(always, 2, restarts=1, timeout=20)
    assert caught.value.__notes__ == ["(attempt 2, after 1 restarts)"]


def test_a_batch_that_does_not_divide_is_refused():
    """Eight sequences over three ranks: a mean of means would be another loss than that
    of one process.
    """
    from llmlab.parallelism import World
    from llmlab.parallelism.frameworks import engines

    with pytest.raises(
        ValueError, match="8 sequences must be a multiple of the 3 ranks"
    ):
        World(3).run(lambda comm: engines.shard(0, comm))


def test_a_hang_is_a_failure_too(tmp_path):
    def hangs_once(comm):
        if comm.rank == 1 and not (tmp_path / "hung").exists():
            (tmp_path / "hung").touch()
            time.sleep(60)
        return comm.all_reduce(torch.ones(()) * comm.rank).item()

    results, failures = elastic.supervise(hangs_once, 2, timeout=2)
    assert results == [1.0, 1.0] and failures[0].kind == "hung"


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert (
        elastic.newest(tmp_path) is None
        and elastic.load(tmp_path, model, optimizer) == 0
    )
    elastic.save(tmp_path, 3, model, optimizer)

    def dies(state, file):
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="no space"):
        elastic.save(tmp_path, 4, model, optimizer)
    assert elastic.load(tmp_path, model, optimizer) == 3
    monkeypatch.undo()
    (tmp_path / ".step-00000004.1").write_bytes(b"half of it, by a rank that is dead")
    elastic.save(tmp_path, 4, model, optimizer)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "step-00000003.pt",
        "step-00000004.pt",
    ], "the half is gone"
    with pytest.raises(ValueError, match="keep=0"):
        elastic.save(tmp_path, 5, model, optimizer, keep=0)


def test_youngs_interval_is_where_the_loss_is_smallest():
    best = elastic.best_interval(writing=30, mean_time_between_failures=3 * 3600)
    around = [
        elastic.lost_share(best * factor, 30, 3 * 3600, restart=300)
        for factor in (0.8, 1.0, 1.25)
    ]
    assert best == pytest.approx(805, abs=1) and around[1] == min(around)
    with pytest.raises(ValueError, match="every=0"):
        elastic.lost_share(0, 1, 1)
    with pytest.raises(ValueError, match="writing=0"):
        elastic.best_interval(0, 3600)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(uninterrupted, tmp_path):
    """A collective gives up after a minute: a rank that waits for a dead one is a
    failure too, and is restarted.
    """
    done = processes.run_fork(
        processes.torchrun_of_forks,
        *["--standalone", "--nproc-per-node=2", "--max-restarts=5"],
        *[SCRIPT, "--folder", str(tmp_path), "--timeout", "60"],
        *["--kill-rank", "1", "--kill-at", "3"],
        env=processes.on_cpu(),
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    # gloo may find a port of the attempt before: then one more restart is what the
    # launcher is for
    assert re.search(r"attempt [1-5]: 4 steps", done.stdout), (
        "the attempts after the first began at step 2"
    )
    assert losses_line(uninterrupted[2:]) in done.stdout


def losses_line(losses: list[float]) -> str:
    return "losses " + " ".join(f"{x:.4f}" for x in losses)


IN_THE_MIDDLE = """
import sys
from tests import processes
with processes.started(sys.argv[2:], mark=sys.argv[1], env=processes.on_cpu()) as job:
    job.wait()
"""


@pytest.mark.slow
def test_nothing_is_left_of_an_elastic_test_that_is_killed(tmp_path):
    """SIGKILL to what pytest is otherwise: nobody runs a `finally`, and all ends.

    torchrun gives each rank a session of its own; what a rank does in it is the same
    to SIGKILL.
    """
    mark = f"{os.getpid()}-elastic"
    rank = ["--no-python", "bash", "-c", 'touch "$0/$RANK"; sleep 600', str(tmp_path)]
    command = [sys.executable, "-c", IN_THE_MIDDLE, mark, *processes.torchrun(*rank)]
    with processes.started(command, cwd=processes.ROOT) as guard:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, seconds=200)
        job = processes.marked(mark)
        ranks = [process for process in job if "RANK" in process.environ()]
        assert len({os.getsid(process.pid) for process in ranks}) == 2
        (test,) = psutil.Process(guard.pid).children()
        test.kill()
        wait_until(lambda: not processes.marked(mark), seconds=20)


def wait_until(look, seconds):
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return found


def namespaces() -> str:
    """Why two network namespaces cannot be made here, or ""."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return "needs root and the ip command"
    name = f"llmlab-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return "" if made.returncode == 0 else made.stderr.strip()


def remove_namespaces_of_the_dead() -> None:
    """A namespace is no process: one whose test was killed stays until the next
    test.
    """
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    for name, pid in re.findall(r"^(llmlab-(\d+)-\w+)", listed.stdout, re.MULTILINE):
        if not psutil.pid_exists(int(pid)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def two_hosts():
    """Two namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    if why := namespaces():
        pytest.skip(why)
    remove_namespaces_of_the_dead()
    names = [f"llmlab-{os.getpid()}-{i}" for i in (1, 2)]

    def ip(*a):
        return subprocess.run(["ip", *a], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "wire1",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "wire2",
            "netns",
            names[1],
        )
        for i, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", f"wire{i}")
            for device in (f"wire{i}", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts(two_hosts, uninterrupted, tmp_path):
    """One rank a host, every byte over the cable; the same command on both, as on a
    cluster.
    """
    common = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=static",
        "--master-addr=10.77.0.1",
        "--master-port=29511",  # of this test's own hosts
    ]
    script = [SCRIPT, "--folder", str(tmp_path), "--timeout", "120"]
    with ExitStack() as both:
        jobs = []
        for i, name in enumerate(two_hosts):
            host = partial(processes.torchrun_of_forks, namespace=name)
            job = processes.forked(
                *[host, *common, f"--node-rank={i}", *script],
                env=processes.on_cpu(f"wire{i + 1}"),
            )
            jobs.append(both.enter_context(job))
        done = [job.wait(280) for job in jobs]
    for job in done:
        assert job.returncode == 0, job.stdout
    assert losses_line(uninterrupted) in done[0].stdout
    sent = subprocess.run(
        ["ip", "-n", two_hosts[1], "-s", "link", "show", "wire2"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    received = int(re.search(r"RX:[^\n]*\n\s*(\d+)", sent).group(1))
    assert received > 6 * 4 * 50_000, "the gradients of six steps crossed the cable"
