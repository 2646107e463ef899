"""Warm kernels behave as plain ones, end when they should, and never fail a learner."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from llmlab.course.kernels import (
    forked,
    memory,
    place,
    preload,
    provisioner,
    server,
    starting,
    use,
    warm_environment,
    warm_up,
)
from llmlab.course.kernels.hiding import Hidden
from llmlab.course.kernels.provisioner import WarmProvisioner
from llmlab.course.kernels.wire import Lines, receive_request, send

pytestmark = pytest.mark.skipif(bool(starting.unsafe()), reason="kernels stay plain")

LIGHT = starting.PROGRAM.replace(
    "main(sys.argv[1:])",
    "import llmlab.course.kernels.warm_process as warm\nwarm.STEPS ="
    " ()\nmain(sys.argv[1:])",
)
# What a kernel can find out about its process.
FACTS = """
import json
def facts():
    import locale, logging, multiprocessing, os, resource, signal, socket, sys
    import threading, warnings
    lines = open("/proc/self/status").read().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    main = sys.modules["__main__"]
    files = []
    for number in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink("/proc/self/fd/" + number).partition(":")[0])
        except OSError:
            pass
    names = [n for n in dir(resource) if n.startswith("RLIMIT_")]
    return {
        "arguments": [a.rpartition("/")[2] for a in sys.argv[:2]],
        "command": [a.rpartition("/")[2] for a in sys.orig_argv[:4]],
        "path": sys.path,
        "flags": str(sys.flags),
        "main": [main.__name__, main.__dict__ is globals()],
        "main_names": sorted(n for n in vars(main) if n.startswith("__")),
        "environment": dict(os.environ),
        "variables": open("/proc/self/status").name,
        "cwd": os.getcwd(),
        "umask": status["Umask"],
        "signals": {s.name: str(signal.getsignal(s))[:20] for s in signal.Signals},
        "masks": [status[n] for n in ("SigBlk", "SigIgn", "SigCgt")],
        "session": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "limits": [resource.getrlimit(getattr(resource, n)) for n in names],
        "cpus": sorted(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "locale": [locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(False)],
        "streams": [type(s).__name__ for s in (sys.stdin, sys.stdout, sys.stderr)],
        "buffering": [sys.__stdout__.line_buffering, sys.__stderr__.line_buffering],
        "end of stdin": os.read(0, 1).decode(),
        "threads": sorted(t.daemon for t in threading.enumerate()),
        "system threads": len(os.listdir("/proc/self/task")),
        "warnings": list(map(str, warnings.filters)),
        "root log": [str(logging.root.handlers), logging.root.level],
        "timeout": socket.getdefaulttimeout(),
        "process": [multiprocessing.current_process().name,
                    multiprocessing.get_start_method()],
        "libraries": [n for n in WATCHED if n in sys.modules],
        "files": files,
    }
WATCHED = ("torch numpy matplotlib transformers peft bitsandbytes triton deepspeed "
           "scipy ipywidgets einops llmlab tokenizers safetensors").split()
print(json.dumps(facts()))
"""
LATER = """
def later():
    import ctypes, logging, os, sys
    import torch, numpy, transformers, peft, bitsandbytes, matplotlib
    import matplotlib.pyplot as plt
    from transformers import LlamaForCausalLM
    blas = []
    lines = open("/proc/self/maps").read().splitlines()
    for path in sorted({l.split()[-1] for l in lines if "openblas" in l}):
        library = ctypes.CDLL(path)
        for end in ("64_", ""):
            count = getattr(library, "scipy_openblas_get_num_threads" + end, None)
            blas.append(count and count())
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), blas],
        "parallel": torch.__config__.parallel_info(),
        "backend": matplotlib.get_backend(),
        "settings": {k: str(v) for k, v in matplotlib.rcParams.items()},
        "figures": plt.get_fignums(),
        "libraries": [n for n in WATCHED if n in sys.modules],
        "log": [h.stream.name for h in logging.getLogger("transformers").handlers],
        "environment": dict(os.environ),
        "grad": [torch.is_grad_enabled(), str(torch.get_default_dtype())],
        "seed": torch.initial_seed() != 67280421310721,
    }
print(json.dumps(later()))
"""


class Kernel:
    """A kernel with its client."""

    def __init__(self, manager, client):
        self.manager, self.client = manager, client

    @property
    def process(self):
        return self.manager.provisioner.process

    @property
    def warm(self):
        return isinstance(self.process, forked.Forked)

    def run(self, code, seconds=120, answer=None):
        """What the cell printed, or how it failed."""
        said = []

        def output(message):
            content = message["content"]
            said.append(content.get("text") or "".join(content.get("traceback", [])))
            said.extend(k for k in content.get("data", {}) if k.startswith("image"))

        def stdin(message):
            self.client.input(answer)

        self.client.execute_interactive(
            code,
            output_hook=output,
            stdin_hook=stdin if answer else None,
            allow_stdin=bool(answer),
            timeout=seconds,
        )
        return "".join(said)

    def data(self, code):
        # the last line: on some CPUs bitsandbytes writes one of its own before it
        return json.loads(self.run(code).splitlines()[-1])


@contextmanager
def kernel(warm=True, ready=True, **options):
    """A kernel, warm or plain, in this process's environment."""
    name = use.PROVISIONER if warm else "local-provisioner"
    KernelProvisionerFactory.instance().default_provisioner_name = name
    env = options.pop("env", os.environ)
    # ipykernel shows no output of other programs when it believes that pytest runs it
    env = {name: env[name] for name in env if name != "PYTEST_CURRENT_TEST"}
    manager, client = started(env, ready, options)
    try:
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        if manager.has_kernel:
            manager.shutdown_kernel(now=True)


def started(env, ready, options, again=True):
    """A kernel's manager and client; a plain kernel that lost its ports begins anew.

    They are chosen before it runs, so another program can take one of them meanwhile.
    """
    manager = KernelManager()
    manager.shutdown_wait_time = 10.0
    manager.start_kernel(env=env, **options)
    client = manager.client()
    client.start_channels()
    try:
        if ready:
            client.wait_for_ready(timeout=120)
    except RuntimeError:
        plain = not isinstance(manager.provisioner.process, forked.Forked)
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        if not plain or not again:
            raise
        return started(env, ready, options, again=False)
    return manager, client


def settle(patch, home):
    """Warm kernels in use, with their sockets in the folder `home`."""
    patch.setenv("XDG_RUNTIME_DIR", str(home))
    for name in ("LLMLAB_COLD", use.OWNER, use.START, use.IDLE, use.CHOICE):
        patch.delenv(name, raising=False)
    for name, value in warm_environment().items():
        patch.setenv(name, value)
    provisioner.said.clear()


def end_all(home):
    """Ends the warm processes whose sockets lie in `home`."""
    for path in home.rglob("*.sock"):
        if pid := starting.ask(path, {"ask": "state"}).get("pid"):
            end(pid)


@pytest.fixture
def room(tmp_path_factory, monkeypatch):
    """An empty folder for sockets, and warm kernels in use."""
    home = tmp_path_factory.mktemp("warm")
    settle(monkeypatch, home)
    yield home / f"llmlab-warm-{os.geteuid()}"
    end_all(home)


@pytest.fixture(scope="module")
def light_home(tmp_path_factory):
    """The folder for the socket of `light`."""
    home = tmp_path_factory.mktemp("warm")
    yield home
    end_all(home)


@pytest.fixture
def light(light_home, monkeypatch):
    """A warm process that has imported ipykernel alone; its process id.

    The tests share one. After a test that ended it, another starts.
    """
    settle(monkeypatch, light_home)
    monkeypatch.setattr(starting, "PROGRAM", LIGHT)
    assert warm_up(seconds=60) == ""
    yield state(place.folder())["pid"]


@pytest.fixture(scope="module")
def both(warm):
    """(what a warm kernel says, what a plain one says) before and after its imports."""
    assert warm_up(seconds=300) == ""
    found = []
    for is_warm in (True, False):
        with kernel(is_warm) as one:
            assert one.warm == is_warm
            found.append([one.data(FACTS), one.data(LATER), one.run(DRAW)])
    with kernel() as one, kernel() as two:
        found.append([one.run(LOGGED), one.run(RANDOM), two.run(RANDOM)])
        found.append(memory.held(one.process.pid))
    return found


DRAW = (
    "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nplt.plot([2, 1]);"
)
RANDOM = """
import numpy, random, torch
print(torch.rand(1).item(), numpy.random.rand(), random.random(), torch.initial_seed())
"""
LOGGED = """
from transformers.utils import logging
logging.get_logger("transformers.x").warning("heard")
"""


def state(folder):
    (path,) = folder.glob("*.sock")
    return starting.ask(path, {"ask": "state"})


def end(pid, number=signal.SIGKILL):
    """Ends a process that this test started, and waits until it has gone."""
    try:
        psutil.Process(pid).send_signal(number)
    except psutil.Error:
        return
    gone(pid)


def gone(pid, seconds=20):
    """Whether the process ends within so many seconds."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


# As a plain kernel


def test_a_warm_kernel_finds_what_a_plain_one_finds(both):
    warm, plain = dict(both[0][0]), dict(both[1][0])
    files = [
        Counter(
            name
            for name in facts.pop("files")
            if ".sqlite" not in name and "profile_" not in name
        )
        for facts in (warm, plain)
    ]
    watch = Counter(anon_inode=1)  # on the process that asked for the kernel
    assert files[0] == files[1] + watch
    assert warm == plain
    assert "llmlab" not in warm["libraries"] and "torch" not in warm["libraries"]


def test_after_its_imports_too(both):
    warm, plain = both[0][1], both[1][1]
    assert "inline" in warm["backend"]
    assert "torch" in warm["libraries"]
    assert warm == plain


def test_figures_are_shown_as_in_a_plain_kernel(both):
    assert both[0][2] == both[1][2]
    assert both[0][2].count("image/png") == 2


def test_each_kernel_draws_its_own_numbers(both):
    one, two = both[2][1].split(), both[2][2].split()
    assert len(one) == len(two) == 4
    assert all(a != b for a, b in zip(one, two, strict=True))


def test_a_librarys_warnings_reach_the_notebook(both):
    assert "heard" in both[2][0]


def test_a_kernel_shares_most_of_its_memory(both):
    held = both[3]
    assert held["rss"] > 300 * memory.MIB
    assert held["own"] < held["rss"] / 2


def test_output_of_every_kind(light):
    with kernel() as one:
        assert one.warm
        said = one.run(
            "import os, sys\nprint('a', flush=True)\nprint('b', file=sys.stderr)\n"
            "os.write(1, b'c\\n')\nos.system('echo d')\nimport time; time.sleep(0.5)"
        )
        assert sorted(said.split()) == ["a", "b", "c", "d"]


def test_input_and_errors(light):
    with kernel() as one:
        assert one.run("print(input('name? ') * 2)", answer="ab").endswith("abab\n")
        assert "ZeroDivisionError" in one.run("1 / 0")
        assert one.run("print(1)") == "1\n"


def test_interrupt(light):
    with kernel() as one:
        one.client.execute("import time\nprint('in')\ntime.sleep(60)")
        while one.client.get_iopub_msg(timeout=20)["msg_type"] != "stream":
            pass
        one.manager.interrupt_kernel()
        reply = one.client.get_shell_msg(timeout=20)
        while reply["msg_type"] != "execute_reply":
            reply = one.client.get_shell_msg(timeout=20)
        assert reply["content"]["ename"] == "KeyboardInterrupt"


def test_restart_keeps_the_ports_and_forgets_the_names(light):
    with kernel() as one:
        one.run("x = 1")
        before, ports = one.process.pid, one.manager.get_connection_info()
        one.manager.restart_kernel()
        one.client.wait_for_ready(timeout=60)
        assert one.warm and one.process.pid != before
        assert one.manager.get_connection_info() == ports
        assert "NameError" in one.run("x")
        assert gone(before)


def test_exit_status_reaches_the_manager(light):
    with kernel() as one:
        one.client.execute("import os; os._exit(7)")
        assert one.process.wait(timeout=20) == 7
        assert not one.manager.is_alive()
    with kernel() as one:
        os.kill(one.process.pid, signal.SIGTERM)
        assert one.process.wait(timeout=20) == -signal.SIGTERM


def test_shutdown_is_clean(light):
    with kernel() as one:
        assert state(place.folder())["kernels"] == 1
        pid = one.process.pid
        one.manager.shutdown_kernel()
        assert gone(pid)
    assert state(place.folder())["kernels"] == 0
    assert not [p for p in psutil.Process(light).children()]  # no zombie


def test_the_packages_code_is_read_anew(light, tmp_path, monkeypatch):
    with kernel() as one:
        code = "import sys; print([m for m in sys.modules if m.startswith('llmlab')])"
        assert one.run(code) == "[]\n"
        assert one.run("import llmlab.course; print('ok')") == "ok\n"


def test_folder_variables_and_a_closed_door(light, tmp_path):
    env = dict(os.environ, COLOUR="blue")
    with kernel(env=env, cwd=str(tmp_path)) as one:
        assert one.warm
        code = "import os; print(os.getcwd(), os.environ['COLOUR'])"
        assert one.run(code) == f"{tmp_path} blue\n"
        assert one.run("!echo $COLOUR").strip() == "blue"
    with pytest.raises(FileNotFoundError), kernel(cwd=str(tmp_path / "none")):
        pass


def test_a_cell_may_fork(light):
    with kernel() as one:
        said = one.run(
            "import multiprocessing as mp\ndef double(x): return 2 * x\nwith"
            " mp.get_context('fork').Pool(2) as pool: print(pool.map(double, [1, 2]))"
        )
        assert said == "[2, 4]\n"


def test_a_cell_may_launch_ranks(warm):
    assert warm_up(seconds=120) == ""
    with kernel() as one:
        assert one.warm
        said = one.run(
            "from llmlab.parallelism import launch\ndef rank(comm): return"
            " comm.rank\nprint(launch(rank, 2))"
        )
        assert said.endswith("[0, 1]\n")


def test_many_at_once_have_ports_of_their_own(light):
    def answer(n):
        manager = KernelManager()
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=120)
            one = Kernel(manager, client)
            info = manager.get_connection_info()
            ports = [info[name] for name in provisioner.port_names]
            return one.warm, one.run(f"print({n})"), ports
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)

    KernelProvisionerFactory.instance().default_provisioner_name = use.PROVISIONER
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answer, range(8)))
    assert all(warm for warm, _, _ in found)
    assert [said for _, said, _ in found] == [f"{n}\n" for n in range(8)]
    ports = [port for _, _, ports in found for port in ports]
    assert len(set(ports)) == 40


def test_a_port_that_is_taken_meanwhile_does_no_harm(light, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        cache = provisioner.LocalPortCache
        monkeypatch.setattr(cache, "find_available_port", lambda self, ip: taken)
        with kernel() as one:
            assert one.warm and one.run("print(1)") == "1\n"
            assert taken not in one.manager.ports


def test_a_kernel_ends_with_the_process_that_asked_for_it(light):
    code = (
        "import os\n"
        "from jupyter_client.manager import KernelManager\n"
        "m = KernelManager(); m.start_kernel()\n"
        "print(m.provisioner.pid, type(m.provisioner.process).__name__, flush=True)\n"
        "os._exit(0)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    ).stdout.split()
    assert said[1] == "Forked"
    assert gone(int(said[0]))


FORK = """
import os, pathlib, time
if os.fork() == 0:
    if os.fork() == 0:  # its parent ends: nobody's child
        pathlib.Path({file!r}).write_text(str(os.getpid()) + ".")
        time.sleep(600)
    os._exit(0)
"""


def test_what_a_cell_forked_ends_with_the_kernel_that_nobody_needs(light, tmp_path):
    file = tmp_path / "pid"
    code = (
        "import os, pathlib, time\n"
        "from jupyter_client.manager import KernelManager\n"
        "m = KernelManager(); m.start_kernel()\n"
        "c = m.client(); c.start_channels(); c.wait_for_ready()\n"
        f"c.execute({FORK.format(file=str(file))!r})\n"
        f"file = pathlib.Path({str(file)!r})\n"
        "while not (file.exists() and file.read_text().endswith('.')):\n"
        "    time.sleep(0.05)\n"
        "print(type(m.provisioner.process).__name__, flush=True)\n"
        "os._exit(0)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    ).stdout
    assert said == "Forked\n"
    assert gone(int(file.read_text().rstrip(".")))


# The warm process's life


def test_it_ends_with_its_owner(room, monkeypatch):
    monkeypatch.setattr(starting, "PROGRAM", LIGHT)
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = psutil.Process(owner.pid).create_time()
    monkeypatch.setenv(use.OWNER, f"{owner.pid}:{start:.2f}")
    assert warm_up(seconds=60) == ""
    pid = state(room)["pid"]
    assert not gone(pid, 0.5)
    owner.communicate(b"\n", timeout=20)
    assert gone(pid)
    assert not list(room.glob("*.sock"))


def test_it_ends_after_idling_but_not_under_a_kernel(room, monkeypatch):
    monkeypatch.setattr(starting, "PROGRAM", LIGHT)
    monkeypatch.setenv(use.IDLE, "2")
    assert warm_up(seconds=60) == ""
    pid = state(room)["pid"]
    with kernel() as one:
        assert one.warm
        assert not gone(pid, 2.5)
    assert not gone(pid, 0.5)  # idle from the kernel's end on, as for a restart
    assert gone(pid, 20)


def test_an_owner_that_is_gone_starts_nothing(room, monkeypatch):
    monkeypatch.setattr(starting, "PROGRAM", LIGHT)
    monkeypatch.setenv(use.OWNER, f"{os.getpid()}:12.00")  # another of the same number
    warm_up()
    (lock,) = room.glob("*.lock")
    limit = time.monotonic() + 60
    while (file := starting.take(lock)) is None:  # it has not ended yet
        assert not list(room.glob("*.sock")) and time.monotonic() < limit
        time.sleep(0.05)
    os.close(file)
    assert not list(room.glob("*.sock"))


def test_two_at_most_and_the_idle_one_makes_room(room, monkeypatch):
    monkeypatch.setattr(starting, "PROGRAM", LIGHT)
    pids = []
    for tone in ("a", "b", "c"):
        monkeypatch.setenv("HF_TONE", tone)
        before = set(room.glob("*.sock")) if room.exists() else set()
        assert warm_up(seconds=60) == ""
        (new,) = set(room.glob("*.sock")) - before
        pids.append(starting.ask(new, {"ask": "state"})["pid"])
    assert gone(pids[0])
    assert not gone(pids[1], 0.2) and not gone(pids[2], 0.2)


def test_a_third_is_refused_while_both_have_kernels(room, monkeypatch, caplog):
    monkeypatch.setattr(starting, "PROGRAM", LIGHT)
    monkeypatch.setattr(starting, "MOST", 1)
    assert warm_up(seconds=60) == ""
    with kernel() as one:
        assert one.warm
        monkeypatch.setenv("HF_TONE", "other")
        with kernel() as two:
            assert not two.warm and two.run("print(1)") == "1\n"


# Whatever goes wrong, there is a kernel


def test_the_first_kernel_does_not_wait(room, monkeypatch):
    monkeypatch.setattr(starting, "PROGRAM", "import time; time.sleep(1)")
    with kernel() as one:
        assert not one.warm
        assert one.run("print(1)") == "1\n"


def test_killed_before_the_request(light, monkeypatch):
    monkeypatch.setenv(use.START, "0")
    end(light)
    with kernel() as one:
        assert not one.warm
        assert one.run("print(1)") == "1\n"


def test_killed_under_its_kernels(light):
    with kernel() as one:
        one.run("x = 5")
        end(light)
        assert one.run("print(x)") == "5\n"
        one.manager.interrupt_kernel()
        assert one.run("print(x)") == "5\n"
        assert one.process.poll() is None
        pid = one.process.pid
        one.manager.shutdown_kernel()
        assert gone(pid)


def test_killed_at_any_moment(room, monkeypatch):
    """The warm process ends at moments all over the start of a kernel."""
    monkeypatch.setattr(starting, "PROGRAM", LIGHT)
    for delay in (0.0, 0.05, 0.15):
        assert warm_up(seconds=60) == ""
        killer = threading.Timer(delay, os.kill, (state(room)["pid"], signal.SIGKILL))
        killer.start()
        with kernel() as one:
            assert one.run("print(1)") == "1\n"
        killer.join()


def fake(room, *answers, close=True):
    """A warm process that answers with these messages and no more."""
    path = starting.socket_path(os.environ, (), os.getcwd())
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve():
        end, _ = listener.accept()
        _, files = receive_request(end)
        for file in files:
            os.close(file)
        for answer in answers:
            send(end, answer)
        if close:
            end.close()
        else:
            time.sleep(3)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return listener


@pytest.mark.parametrize(
    ("answers", "close"),
    [
        ([], True),
        ([], False),
        ([{"refused": "it is tired"}], True),
        ([{"pid": 2**22 - 1}], True),
        ([{"ready": {}}], True),
        ([{"strange": 1}], True),
    ],
)
def test_a_warm_process_that_fails(room, monkeypatch, caplog, answers, close):
    monkeypatch.setattr(forked, "FORK_SECONDS", 0.5)
    listener = fake(room, *answers, close=close)
    runs = answers == [{"strange": 1}]  # what a plain kernel computes, once
    with listener, caplog.at_level("WARNING"), kernel(ready=runs) as one:
        assert not one.warm and one.manager.is_alive()
        assert not runs or one.run("print(1)") == "1\n"
    assert sum("the plain way" in line for line in caplog.messages) == 1


def test_a_kernel_that_takes_too_long_is_ended(room, monkeypatch):
    sleeper = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(forked, "READY_SECONDS", 0.5)
    with fake(room, {"pid": sleeper.pid}, close=False), kernel() as one:
        assert not one.warm
    assert sleeper.wait(timeout=10) == -signal.SIGKILL


def answered(pair, one):
    """What a server says to one request that comes through a real socket."""
    send(pair, {"ask": "kernel"})
    new, stay = one.answer()
    assert new is None
    return Lines().take(pair.recv(1 << 12))[0], stay


@pytest.fixture
def served(tmp_path):
    """(a client's end, a server in this process)"""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            yield client, server.Server(listener, -1, path)


def test_memory_short(served):
    client, one = served
    one.available = lambda: memory.TO_FORK - 1
    assert answered(client, one) == ({"refused": "memory is short"}, False)


def test_fork_refused(served, monkeypatch):
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    client, one = served
    monkeypatch.setattr(server, "threads", lambda: 1)
    monkeypatch.setattr(os, "fork", refuse)
    said, stay = answered(client, one)
    assert "temporarily unavailable" in said["refused"] and stay


def test_a_second_thread_stops_all_forks(served):
    client, one = served
    wait = threading.Event()
    thread = threading.Thread(target=wait.wait)
    thread.start()
    try:
        said, stay = answered(client, one)
    finally:
        wait.set()
        thread.join()
    assert "threads" in said["refused"] and not stay


def test_too_little_memory_starts_none(room, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: memory.TO_START - 1)
    assert "memory" in warm_up(seconds=5)
    assert not list(room.glob("*.sock"))


def test_a_warm_process_that_cannot_start_is_not_tried_again_at_once(room, monkeypatch):
    broken = LIGHT.replace("warm.STEPS = ()", "warm.STEPS = 7")
    monkeypatch.setattr(starting, "PROGRAM", broken)
    assert "failed: TypeError" in warm_up(seconds=60)
    monkeypatch.setattr(starting, "PROGRAM", LIGHT)
    assert "failed: TypeError" in warm_up(seconds=5)
    monkeypatch.setattr(starting, "RETRY_SECONDS", 0.0)
    assert warm_up(seconds=60) == ""


@pytest.mark.parametrize(
    ("cmd", "why"),
    [
        (["/usr/bin/other", "-m", "ipykernel_launcher"], "is to run in"),
        ([sys.executable, "-m", "other"], "not ipykernel"),
        ([sys.executable], "not ipykernel"),
        ([], "nothing"),
    ],
)
def test_other_kernels_stay_plain(cmd, why):
    with pytest.raises(starting.Cold, match=why):
        provisioner.read_command(cmd)


def test_streams_that_only_a_child_can_have(tmp_path):
    with pytest.raises(starting.Cold, match="pipe"):
        provisioner.open_streams({"stdout": subprocess.PIPE})
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(starting.Cold):
        provisioner.open_streams({"stdout": None, "stderr": subprocess.STDOUT})
    assert len(os.listdir("/proc/self/fd")) == before


def test_output_goes_where_the_caller_says(light, tmp_path):
    with (tmp_path / "out").open("w") as out, kernel(stderr=out) as one:
        assert one.warm
        end_of_kernel = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        stream = one.data("import os; print(os.fstat(0).st_ino)")
        assert stream > 0
        one.client.execute(end_of_kernel)
        assert one.process.wait(timeout=20) == -signal.SIGKILL
    assert "TCP without encryption" in (tmp_path / "out").read_text()


# Whose socket


def test_the_folder_is_the_users_alone(tmp_path):
    good = tmp_path / "good"
    place.own(good)
    place.own(good)
    assert good.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(good)
    with pytest.raises(OSError, match="no folder"):
        place.own(tmp_path / "link")
    good.chmod(0o750)
    with pytest.raises(OSError, match="others may enter"):
        place.own(good)


def test_a_folder_of_another_user(tmp_path, monkeypatch):
    place.own(tmp_path / "theirs")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OSError, match="another user"):
        place.own(tmp_path / "theirs")


def test_no_place_means_plain_kernels(room, monkeypatch):
    monkeypatch.setattr(place, "SOCKET_PATH", 5)
    assert "no safe place" in warm_up()
    with kernel() as one:
        assert not one.warm


def test_a_lock_is_no_link(room):
    path = starting.socket_path(os.environ, (), os.getcwd()).with_suffix(".lock")
    target = path.with_name("target")
    path.symlink_to(target)
    assert warm_up() != ""
    assert not target.exists()


@pytest.mark.parametrize(
    "name",
    ["OMP_NUM_THREADS", "HF_HOME", "TRITON_INTERPRET", "PYTHONPATH", "LD_PRELOAD"],
)
def test_what_is_read_while_importing_names_another_process(name):
    env = dict(os.environ)
    env.pop(name, None)
    assert place.key(env) == place.key(dict(env, COLOUR="blue", JPY_PARENT_PID="5"))
    assert place.key(env) != place.key(dict(env, **{name: "/x"}))


def test_a_new_package_is_noticed(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = place.key({})
    (site / "new-1.0.dist-info").mkdir()
    assert place.key({}) != before


def test_other_limits_name_another_process():
    code = "from llmlab.course.kernels import place; print(place.key({'A': 'b'}))"
    run = [sys.executable, "-c", code]
    keys = [
        subprocess.run([*before, *run], capture_output=True, text=True).stdout.strip()
        for before in (["env"], ["env"], ["nice", "-n", "3"], ["taskset", "-c", "0"])
    ]
    assert keys[0] and keys[0] == keys[1]
    assert keys[2] != keys[0]
    if len(os.sched_getaffinity(0)) > 1:
        assert keys[3] != keys[0]


# What is imported ahead


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package `toy_a` that needs `toy_b`, in a folder that counts as installed."""
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "toy_b.py").write_text("def f():\n    return 1\n")
    (site / "toy_a").mkdir()
    (site / "toy_a" / "__init__.py").write_text(
        "import os, warnings\nfrom toy_b import f\nfrom toy_a import inner\n"
        "warnings.filterwarnings('ignore', 'toy')\nos.environ['TOY'] = '1'\n"
    )
    (site / "toy_a" / "inner.py").write_text("N = []\n")
    (site / "toy_loud.py").write_text("print('hello from toy')\n")
    monkeypatch.syspath_prepend(str(site))
    with monkeypatch.context() as patch:
        patch.setenv("TOY", "")
        del os.environ["TOY"]
        filters = list(__import__("warnings").filters)
        yield site
        __import__("warnings").filters[:] = filters
    for name in [n for n in sys.modules if n.startswith("toy_")]:
        del sys.modules[name]


def test_hidden_until_it_is_imported(toy):
    packages = preload.import_ahead([("toy_a",), ("toy_missing",)])
    assert packages.keys() == {"toy_a", "toy_b"}
    first = sys.modules["toy_a"]
    hidden = Hidden(packages, os.environ)
    del os.environ["TOY"]
    hidden.hide()
    try:
        assert not {"toy_a", "toy_b", "toy_a.inner"} & sys.modules.keys()
        spec = importlib.util.find_spec("toy_a")
        assert spec.origin == first.__spec__.origin and "toy_a" not in sys.modules
        import toy_a.inner

        assert toy_a is first and toy_a.__spec__.loader is not hidden
        assert {"toy_b", "toy_a.inner"} <= sys.modules.keys()
        assert os.environ["TOY"] == "1"
        assert hidden not in sys.meta_path  # nothing waits any more
    finally:
        if hidden in sys.meta_path:
            sys.meta_path.remove(hidden)


def test_a_loud_import_is_left_out(toy, room, monkeypatch):
    steps = "warm.STEPS = (('toy_loud',), ('toy_b',))"
    monkeypatch.setattr(starting, "PROGRAM", LIGHT.replace("warm.STEPS = ()", steps))
    monkeypatch.setenv("PYTHONPATH", str(toy))
    assert warm_up(seconds=60) == ""
    with kernel() as one:
        assert one.warm
        assert one.run("import toy_loud") == "hello from toy\n"
        assert one.run("import toy_b; print(toy_b.f())") == "1\n"


def test_a_package_from_elsewhere_is_refused(tmp_path, monkeypatch):
    (tmp_path / "toy_elsewhere.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(preload.Outside, match="toy_elsewhere"):
        preload.import_ahead([("toy_elsewhere",)])
    del sys.modules["toy_elsewhere"]


def test_a_variable_that_comes_too_late_is_named(toy, monkeypatch):
    from llmlab.course.kernels import hiding

    packages = preload.import_ahead([("toy_a",)])
    monkeypatch.setitem(hiding.OWNERS, "toy_a", ("HF_",))
    hidden = Hidden(packages, os.environ)
    hidden.hide()
    monkeypatch.setenv("HF_LATE", "1")
    try:
        with pytest.warns(UserWarning, match=r"HF_LATE.*--cold"):
            import toy_a  # noqa: F401
    finally:
        if hidden in sys.meta_path:
            sys.meta_path.remove(hidden)


# Switching it on and off


def test_the_environment_says_so(monkeypatch):
    plain = {"PATH": "x"}
    env = warm_environment(plain)
    assert (
        env[use.CHOICE] == "llmlab-warm" and env[use.OWNER] == starting.this_process()
    )
    assert plain == {"PATH": "x"}
    assert use.CHOICE not in warm_environment(env, cold=True)
    assert use.CHOICE not in warm_environment(dict(env, LLMLAB_COLD="1"))
    assert warm_environment({use.CHOICE: "mine"})[use.CHOICE] == "mine"
    assert warm_environment(plain, idle=5)[use.IDLE] == "5"
    monkeypatch.setattr(use, "entry_points", lambda **_: ())
    assert use.CHOICE not in warm_environment(plain)


def test_where_forking_is_not_safe(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in starting.unsafe()
    assert warm_environment({"A": "b"}) == {"A": "b"}


def test_variables_are_put_back(monkeypatch):
    monkeypatch.delenv(use.CHOICE, raising=False)
    with use.warm_kernels():
        assert os.environ[use.CHOICE] == use.PROVISIONER
    assert use.CHOICE not in os.environ


def test_the_provisioner_is_installed():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group=use.GROUP, name=use.PROVISIONER)
    assert entry.load() is WarmProvisioner and issubclass(
        WarmProvisioner, LocalProvisioner
    )


def test_cold_is_obeyed_by_the_provisioner(light, monkeypatch):
    monkeypatch.setenv("LLMLAB_COLD", "1")
    with kernel() as one:
        assert not one.warm
