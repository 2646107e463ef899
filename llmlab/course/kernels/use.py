"""Switches warm kernels on for a process and all that it starts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points

from llmlab.course.kernels.starting import (
    IDLE,
    OWNER,
    START,
    Cold,
    connect,
    this_process,
    unsafe,
)

PROVISIONER = "llmlab-warm"
CHOICE = "JUPYTER_DEFAULT_PROVISIONER_NAME"
COLD = "LLMLAB_COLD"
GROUP = "jupyter_client.kernel_provisioners"


def warm_environment(
    env: Mapping[str, str] | None = None,
    *,
    cold: bool = False,
    start: bool = True,
    idle: float | None = None,
) -> dict[str, str]:
    """The variables with which Jupyter's programs start warm kernels.

    The warm process ends with the process that calls this. Where LLMLAB_COLD is set,
    forking is not safe or the provisioner is not installed, kernels stay plain. A
    provisioner that the user chose stays chosen.

    Args:
        env: the variables to begin with; this process's when left out.
        cold: leave warm kernels out, here and in what is started.
        start: start a warm process when none is there. It costs about 12 CPU seconds,
            too much for a single kernel; without it, one that runs already is used.
        idle: seconds after which a warm process without kernels ends; 600 by default.
    """
    found = dict(os.environ if env is None else env)
    if cold:
        found[COLD] = "1"
    if found.get(COLD):
        if found.get(CHOICE) == PROVISIONER:
            del found[CHOICE]
        return found
    if unsafe() or not entry_points(group=GROUP, name=PROVISIONER):
        return found
    found.setdefault(CHOICE, PROVISIONER)
    found.setdefault(OWNER, this_process())
    if start:
        found.pop(START, None)
    else:
        found[START] = "0"
    if idle is not None:
        found[IDLE] = f"{idle:g}"
    return found


def use_warm_kernels(*, cold: bool = False, start: bool = True) -> None:
    """`warm_environment` for this process. Call it before the first kernel starts."""
    found = warm_environment(cold=cold, start=start)
    for name in (CHOICE, OWNER, COLD, START):
        if name in found:
            os.environ[name] = found[name]
        else:
            os.environ.pop(name, None)


@contextmanager
def warm_kernels(*, cold: bool = False, start: bool = True) -> Iterator[None]:
    """`use_warm_kernels`, and the variables as they were afterwards."""
    before = {name: os.environ.get(name) for name in (CHOICE, OWNER, COLD, START)}
    use_warm_kernels(cold=cold, start=start)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def warm_up(env: Mapping[str, str] | None = None, *, seconds: float = 0.0) -> str:
    """Starts the warm process now, so that it is ready for the first kernel.

    Args:
        env: the variables that the kernels will have.
        seconds: how long to wait until it is ready.

    Returns:
        why there is none by then; nothing when it answers.
    """
    found = dict(os.environ if env is None else env)
    if found.get(CHOICE) != PROVISIONER:
        return "warm kernels are not in use"
    end = time.monotonic() + seconds
    while True:
        try:
            connect(found, (), os.getcwd()).close()
            return ""
        except Cold as why:
            if not why.usual or time.monotonic() > end:
                return str(why)
        time.sleep(0.1)
