"""Programs that begin as forks of a process that has imported torch already.

A program that imports torch anew spends its time on that. Where such a start is not
what is tested, it can begin after it. The process is one of its own, and not the test's
(`tests.processes.forked`): what a program imports besides torch is new to it, and
nothing has been computed before, so that variables that torch reads late still count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.processes import ROOT

PROGRAM = """
import json, os, runpy, sys
import torch, torch._dynamo
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, flush=True)
        continue
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(asked["files"], 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(asked["env"])
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [place for place in places if place]
    sys.modules.pop("sitecustomize", None)  # Python imports it at its start
    try:
        import sitecustomize
    except ImportError:
        pass
    sys.argv = ["-m", *asked["words"]]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    sys.exit()
"""


class Preloaded:
    """The process that has imported torch."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command: Sequence[str], env: dict[str, str]):
        """`subprocess.run` of `python -m MODULE …`, output kept.

        Raises:
            ValueError: `command` is no such program.
        """
        python, option, module, *words = command
        if (python, option) != (sys.executable, "-m"):
            raise ValueError(f"command={command} must be {sys.executable} -m …")
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("out", "err")]
            for file in files:
                file.touch()
            asked = {
                "module": module,
                "words": words,
                "env": env,
                "files": [str(file) for file in files],
            }
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            out, err = (file.read_text() for file in files)
        return subprocess.CompletedProcess(command, status, out, err)

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()
