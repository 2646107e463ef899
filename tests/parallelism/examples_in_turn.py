"""One rank of torchrun's, in which several scripts run one after the other.

    torchrun … -m tests.parallelism.examples_in_turn FOLDER "module --option" "module" …

What takes long is imported once, and each script runs in a fork of its own: from its
first line to the interpreter's end it is a rank that torchrun started. What it prints
goes to FOLDER/<number>-<rank>.txt.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch._dynamo  # an optimizer imports it
import torch.distributed.fsdp  # noqa: F401


def main(folder: Path, commands: list[str]) -> None:
    """Run all; exit with the number of those that failed."""
    failed = 0
    for number, command in enumerate(commands):
        child = os.fork()
        if child == 0:
            run(command, number, folder / f"{number}-{os.environ['RANK']}.txt")
            return
        _, status = os.waitpid(child, 0)
        failed += status != 0
    sys.exit(failed)


def run(command: str, number: int, output: Path) -> None:
    """Be the script."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # torchrun's store has what the script before wrote into it, as after a restart
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    module, *sys.argv[1:] = command.split()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
