"""A rank is killed, hangs or raises: training resumes from the last checkpoint and ends at the same loss, at each distance."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmlab.parallelism import RankFailed, elastic, launch
from llmlab.parallelism.examples.train_elastic import Settings, train

MODULE = "llmlab.parallelism.examples.train_elastic"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return launch(train, 2, Settings(str(tmp_path_factory.mktemp("whole"))), timeout=60)[0]


@pytest.mark.parametrize(("rank", "at"), [(1, 3), (0, 0), (0, 4)])
def test_a_killed_rank_costs_only_the_steps_since_the_checkpoint(rank, at, uninterrupted, tmp_path):
    results, failures = elastic.supervise(train, 2, Settings(str(tmp_path), kill_rank=rank, kill_at=at), timeout=60)
    assert [(f.rank, f.kind) for f in failures] == [(rank, "died")]
    assert results[0] == pytest.approx(uninterrupted[at // 2 * 2 :], abs=1e-6)
    assert elastic.newest(tmp_path).name == "step-00000006.pt" and len(list(tmp_path.glob("step-*.pt"))) == 2


def test_it_gives_up_in_the_end(tmp_path):
    def always(comm):
        if comm.rank == 1:
            raise ArithmeticError("overflow")
        comm.barrier()

    with pytest.raises(RankFailed, match="overflow") as caught:
        elastic.supervise(always, 2, restarts=1, timeout=20)
    assert caught.value.__notes__ == ["(attempt 2, after 1 restarts)"]


def test_a_batch_that_does_not_divide_is_refused():
    """Eight sequences over three ranks: a mean of means would be another loss than that of one process."""
    from llmlab.parallelism import World, engines

    with pytest.raises(ValueError, match="8 sequences must be a multiple of the 3 ranks"):
        World(3).run(lambda comm: engines.shard(0, comm))


def test_a_hang_is_a_failure_too(tmp_path):
    def hangs_once(comm):
        if comm.rank == 1 and not (tmp_path / "hung").exists():
            (tmp_path / "hung").touch()
            time.sleep(60)
        return comm.all_reduce(torch.ones(()) * comm.rank).item()

    results, failures = elastic.supervise(hangs_once, 2, timeout=5)
    assert results == [1.0, 1.0] and failures[0].kind == "hung"


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert elastic.newest(tmp_path) is None and elastic.load(tmp_path, model, optimizer) == 0
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
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000003.pt", "step-00000004.pt"], "the half is gone"
    with pytest.raises(ValueError, match="keep=0"):
        elastic.save(tmp_path, 5, model, optimizer, keep=0)


def test_youngs_interval_is_where_the_loss_is_smallest():
    best = elastic.best_interval(writing=30, mean_time_between_failures=3 * 3600)
    around = [elastic.lost_share(best * factor, 30, 3 * 3600, restart=300) for factor in (0.8, 1.0, 1.25)]
    assert best == pytest.approx(805, abs=1) and around[1] == min(around)
    with pytest.raises(ValueError, match="every=0"):
        elastic.lost_share(0, 1, 1)
    with pytest.raises(ValueError, match="writing=0"):
        elastic.best_interval(0, 3600)


def run_torchrun(*arguments, prefix=(), **more):
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process) -> str:
    try:
        out, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()  # torchrun's ranks end when their parent does
        raise
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(uninterrupted, tmp_path):
    script = ["--standalone", "--nproc-per-node=2", "--max-restarts=5", "-m", MODULE, "--folder", str(tmp_path)]
    out = finish(run_torchrun(*script, "--kill-rank", "1", "--kill-at", "3", GLOO_SOCKET_IFNAME="lo"))
    # gloo may find a port of the attempt before, and then one more restart is what the launcher is for
    assert re.search(r"attempt [1-5]: 4 steps", out), "the attempts after the first began at step 2"
    assert "losses " + " ".join(f"{x:.4f}" for x in uninterrupted[2:]) in out


def namespaces() -> str:
    """Why two network namespaces cannot be made here, or ""."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return "needs root and the ip command"
    made = subprocess.run(["ip", "netns", "add", "llmlab-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "llmlab-probe"], capture_output=True)
    return "" if made.returncode == 0 else made.stderr.strip()


@pytest.fixture
def two_hosts():
    """Two namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    if why := namespaces():
        pytest.skip(why)
    names = [f"llmlab-{os.getpid()}-{i}" for i in (1, 2)]
    ip = lambda *a: subprocess.run(["ip", *a], check=True, capture_output=True)  # noqa: E731
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire1", "netns", names[0], "type", "veth", "peer", "name", "wire2", "netns", names[1])
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
    """One rank a host, every byte over the cable; the same command on both, as on a cluster."""
    common = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=static",
        "--master-addr=10.77.0.1",
        "--master-port=29511",
    ]
    jobs = [
        run_torchrun(
            *common,
            f"--node-rank={i}",
            "-m",
            MODULE,
            "--folder",
            str(tmp_path),
            prefix=("ip", "netns", "exec", name),
            GLOO_SOCKET_IFNAME=f"wire{i + 1}",
        )
        for i, name in enumerate(two_hosts)
    ]
    out = [finish(job) for job in jobs]
    assert "losses " + " ".join(f"{x:.4f}" for x in uninterrupted) in out[0]
    sent = subprocess.run(
        ["ip", "-n", two_hosts[1], "-s", "link", "show", "wire2"], capture_output=True, text=True, check=True
    ).stdout
    received = int(re.search(r"RX:[^\n]*\n\s*(\d+)", sent).group(1))
    assert received > 6 * 4 * 50_000, "the gradients of six steps crossed the cable"
