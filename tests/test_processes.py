"""What a test starts ends with it, whatever ends the test."""

import os
import subprocess
import sys
import time

import pytest

from tests import processes

CHILDREN = 20
START = f"for i in $(seq {CHILDREN}); do (setsid sleep 600 &); done; sleep 600"
ENDLESS = ["bash", "-c", START]
STARTS_ONE = """
import sys
from tests import processes
with processes.started(sys.argv[2:], mark=sys.argv[1]) as program:
    print("started", flush=True)
    program.wait()
"""


def test_output_and_status_come_back():
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = processes.run([sys.executable, "-c", script])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert processes.run(["bash", "-c", "kill -9 $$"]).returncode == 128 + 9


def test_after_a_timeout_nothing_is_left():
    """Neither the program nor its children in other sessions, whose parent has gone."""
    mark = f"{os.getpid()}-late"
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(ENDLESS, timeout=0.5, mark=mark)
    assert processes.marked(mark) == []


def test_nothing_is_left_of_a_test_that_is_killed():
    """SIGKILL: no `finally` is run."""
    mark = f"{os.getpid()}-killed"
    test = subprocess.Popen(
        [sys.executable, "-c", STARTS_ONE, mark, *ENDLESS],
        cwd=processes.ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert test.stdout.readline() == b"started\n"
        deadline = time.monotonic() + 20
        while len(processes.marked(mark)) < CHILDREN:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        test.kill()
        test.wait()
        while processes.marked(mark):
            assert time.monotonic() < deadline + 20, processes.marked(mark)
            time.sleep(0.05)
    finally:
        test.kill()
        test.wait()
        test.stdout.close()
        processes.sweep(mark)
