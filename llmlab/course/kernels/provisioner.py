"""The provisioner that Jupyter asks for a kernel: `llmlab-warm`.

It is jupyter_client's own one for local kernels, whose process comes from a fork where
that is possible. Whatever goes wrong, the kernel starts the plain way, and one line in
the log says why.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo, LocalPortCache, port_names
from jupyter_client.provisioning import LocalProvisioner

from llmlab.course.kernels import place
from llmlab.course.kernels.forked import Forked
from llmlab.course.kernels.starting import Cold, connect
from llmlab.course.kernels.wire import send

said: set[str] = set()


class WarmProvisioner(LocalProvisioner):
    """Starts kernels as forks of a warm process."""

    ports_fixed = False  # whether a kernel was started, and clients may know its ports

    async def launch_kernel(
        self, cmd: list[str], **kwargs: Any
    ) -> KernelConnectionInfo:
        """Starts the kernel: warm when that can be done, else the plain way."""
        forked = None
        try:
            forked = await self._fork(cmd, kwargs)
        except Cold as why:
            self._say(str(why), why.usual)
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}", False)
        if forked is None:
            self.ports_fixed = True
            return await super().launch_kernel(cmd, **kwargs)
        self.process = forked
        self.pid = self.pgid = forked.pid
        self.cwd = kwargs.get("cwd") or Path.cwd()
        self._take_ports(forked.ports)
        return self.connection_info

    async def _fork(self, cmd: Sequence[str], options: Mapping[str, Any]) -> Forked:
        """Asks for a kernel.

        Raises:
            Cold: there is no warm kernel to be had.
        """
        wanted = dict(options)
        for name in ("extra_arguments", "kernel_id"):
            wanted.pop(name, None)
        env = dict(wanted.pop("env", None) or os.environ)
        cwd = os.path.abspath(wanted.pop("cwd", None) or os.getcwd())
        if os.environ.get("LLMLAB_COLD") or env.get("LLMLAB_COLD"):
            raise Cold("LLMLAB_COLD is set", usual=True)
        flags, argv = read_command(cmd)
        if os.path.exists(os.path.join(cwd, "matplotlibrc")):
            raise Cold(f"{cwd} has a matplotlibrc of its own")
        streams = open_streams(wanted)
        try:
            if wanted:
                raise Cold(f"it was asked for with {', '.join(sorted(wanted))}")
            env["JPY_PARENT_PID"] = str(os.getpid())
            request = {
                "ask": "kernel",
                "command": list(cmd),
                "argv": argv,
                "env": env,
                "cwd": cwd,
                "umask": place.umask(),
                "choose_ports": self._may_choose_ports(),
            }
            end = connect(env, flags, cwd)
            forked = Forked(end)
            try:
                send(end, request, streams)
                await forked.started()
            except BaseException as error:
                forked.give_up()
                if isinstance(error, OSError | asyncio.TimeoutError):
                    what = str(error) or "it took too long"
                    raise Cold(f"the warm process did not answer: {what}") from None
                raise
            return forked
        finally:
            for stream in streams:
                os.close(stream)

    def _may_choose_ports(self) -> bool:
        """Whether the kernel may bind any ports. Not after a restart: its clients stay
        connected to the ports that they know."""
        return self.parent is not None and not self.ports_fixed

    def _take_ports(self, ports: dict[str, int]) -> None:
        """Tells the kernel manager which ports the kernel has bound."""
        if self.ports_cached:
            cache = LocalPortCache.instance()
            for name in port_names:
                cache.return_port(self.connection_info[name])
        self.ports_fixed = True
        for name, port in ports.items():
            self.connection_info[name] = port
            setattr(self.parent, name, port)

    def _say(self, why: str, usual: bool) -> None:
        if usual:
            self.log.debug("The kernel starts the plain way: %s", why)
        elif why not in said:
            said.add(why)
            self.log.warning("The kernel starts the plain way: %s", why)


def read_command(cmd: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """(options of the interpreter, the kernel's `sys.argv`) of a kernel's command.

    Raises:
        Cold: it is another Python, or another program.
    """
    import ipykernel_launcher

    words = list(cmd)
    if not words or os.path.abspath(words[0]) != os.path.abspath(sys.executable):
        raise Cold(f"the kernel is to run in {words[0] if words else 'nothing'}")
    if "-m" not in words or words[words.index("-m") + 1 :][:1] != [
        "ipykernel_launcher"
    ]:
        raise Cold("the kernel is not ipykernel's")
    at = words.index("-m")
    rest = [os.path.expanduser(word) for word in words[at + 2 :]]
    return tuple(words[1:at]), [ipykernel_launcher.__file__, *rest]


def open_streams(options: dict[str, Any]) -> list[int]:
    """Takes the three streams out of the options; returns new open files for them.

    Raises:
        Cold: one is to be a pipe, which only a child can have.
    """
    given = [options.pop(name, None) for name in ("stdin", "stdout", "stderr")]
    if not options.get("independent"):
        options.pop("independent", None)
    files: list[int] = []
    try:
        for number, stream in enumerate(given):
            if stream is None and number == 0:
                reader, writer = os.pipe()  # at its end at once, as jupyter_client's is
                os.close(writer)
                files.append(reader)
            elif stream is None:
                files.append(os.dup(number))
            elif stream == subprocess.DEVNULL:
                files.append(os.open(os.devnull, os.O_RDWR))
            elif isinstance(stream, int) and stream < 0:
                raise Cold("its output is to go to a pipe")
            else:
                files.append(
                    os.dup(stream if isinstance(stream, int) else stream.fileno())
                )
    except BaseException:
        for file in files:
            os.close(file)
        raise
    return files
