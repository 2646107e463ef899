"""Warm kernels: a notebook's kernel that has torch, transformers and peft in memory.

    JupyterLab, nbclient, nbval          warm process, one thread
    ---------------------------          ------------------------
    provisioner  -- request, streams -->  fork --+
        |  ^                               ^     |
        |  +-- {"pid": 71} ----------------+     v
        |  +-- {"ready": ports} ----------- kernel 71, a plain ipykernel
        |  +-- {"exit": 0} -- warm process
        +----- ZeroMQ ------------------->  cells

1. A process has imported the libraries once. It forks a kernel on request.
2. Jupyter reaches it through a provisioner, chosen by an environment variable, so the
   usual kernelspec "python3" is used everywhere.
3. The request carries the folder, the variables, the arguments and the three streams.
4. The kernel makes new what a fork would share: session, random numbers, streams.
5. What was imported ahead stays out of `sys.modules` until a cell imports it.
6. The kernel binds its ports itself and reports them: two never pick the same one.
7. The warm process tells how a kernel ended; the kernel ends with who asked for it.
8. The first kernel starts the plain way while the warm process imports beside it.
9. The warm process ends with its owner, and after ten minutes without a kernel.
10. Whatever fails, the kernel starts the plain way, and the log says why in one line.

What lies where: `use` switches it on, `provisioner` is Jupyter's side, `starting` finds
or starts the warm process, `place` says which one fits and where its socket is,
`warm_process` is that process, `server` its loop, `preload` its imports, `hiding` keeps
them out of sight, `child` turns a fork into a kernel, `forked` watches it from
Jupyter's side, `wire` has the messages, `memory` the bytes.

Memory, measured with torch 2.13 and transformers 5.23 on x86-64: the warm process holds
550 MiB. A kernel that was just forked shows 400 MiB as its own size (RSS), of which
55 MiB are its own and the rest is shared; a plain kernel takes 560 MiB after the same
imports. `python -m benchmarks.kernels` measures it again.

What differs from a plain kernel: its parent process is the warm one (JPY_PARENT_PID
names the process that asked for it), its size counts the shared pages, modules of
Python's own library may be loaded already, sets of strings have one order in all
kernels of one warm process, and one more file is open.

LLMLAB_COLD=1, or the option --cold of the commands, leaves all of this out.
"""

from __future__ import annotations

from llmlab.course.kernels.use import (
    PROVISIONER,
    use_warm_kernels,
    warm_environment,
    warm_kernels,
    warm_up,
)

__all__ = [
    "PROVISIONER",
    "use_warm_kernels",
    "warm_environment",
    "warm_kernels",
    "warm_up",
]
