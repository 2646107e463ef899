"""Several scripts under torchrun, one after the other, on two ranks.

    python -m tests.parallelism.examples_in_turn FOLDER "module --option" "module" …

What takes long is imported once: torchrun forks the ranks, and a rank forks for each
script. From its first line to the interpreter's end a script is a rank that torchrun
started. What it prints goes to FOLDER/<number>-<rank>.txt.
"""

from __future__ import annotations

import ctypes
import gc
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch._dynamo  # an optimizer imports it
import torch.distributed.fsdp  # noqa: F401

from tests import processes


def main(folder: Path, commands: list[str]) -> None:
    """Run all; exit with the number of those that failed."""
    failed = 0
    for number, command in enumerate(commands):
        child = os.fork()
        if child == 0:
            run(command, number, folder / f"{number}-{os.environ['RANK']}.txt")
        _, status = os.waitpid(child, 0)
        failed += status != 0
    sys.exit(failed)


def run(command: str, number: int, output: Path) -> None:
    """Be the script. This never returns."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # torchrun's store has what the script before wrote into it, as after a restart
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    module, *sys.argv[1:] = command.split()
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
        status = 1
    # The interpreter's end, which multiprocessing leaves out for the ranks it forks.
    ctypes.pythonapi.Py_Exit(status)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(Path(sys.argv[1]), sys.argv[2:])
    # The end of each script would go through all that torch is made of: two seconds.
    gc.collect()
    gc.freeze()
    ranks = ["--standalone", "--nproc-per-node=2"]
    processes.torchrun_of_forks(*ranks, __file__, *sys.argv[1:])
