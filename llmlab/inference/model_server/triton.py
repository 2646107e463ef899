"""The real Triton Inference Server, started for a repository of ours.

NVIDIA publishes no wheel of the server itself, but the one of PyTriton carries it: the
program `tritonserver`, its python backend, and the stubs in which a model.py runs. This
starts the program alone; nothing of PyTriton is used. `llmlab peer triton` makes the
environment. CPU only: there is no GPU backend in what is started here.

What it needs besides: Linux on x86-64, NumPy below 2 in its environment (the stub dies
with a newer one), and the shared library of its Python, `libpython3.x.so.1.0`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ASKED = (
    "import json, sys, sysconfig; print(json.dumps([sysconfig.get_paths()['purelib'],"
    " '%d.%d' % sys.version_info[:2], sysconfig.get_config_var('LIBDIR')]))"
)


class TritonServer:
    """A process of the real server, as a context.

        with TritonServer(python, "models") as server:
            client = tritonclient.http.InferenceServerClient(server.url)

    Args:
        python: of the environment that holds nvidia-pytriton.
        seconds: that it may take to become ready.
    Raises:
        FileNotFoundError: the environment has no server in it.
        RuntimeError: it ended, or did not become ready; with the end of its log.
    """

    def __init__(
        self, python: str | Path, repository: str | Path, seconds: float = 120.0
    ) -> None:
        asked = subprocess.run(
            [str(python), "-c", ASKED], capture_output=True, text=True, check=True
        )
        site, self._python_version, self._libraries = json.loads(asked.stdout)
        self._site = Path(site)
        self._home = self._site / "pytriton" / "tritonserver"
        self._bin = Path(python).parent
        if not (self._home / "bin" / "tritonserver").is_file():
            raise FileNotFoundError(
                f"{python} has no Triton server: `llmlab peer triton` makes one"
            )
        self.repository = Path(repository)
        self.seconds = seconds
        self.host = "127.0.0.1"
        self.port, self.metrics_port = free_ports(2)
        self._work = Path(tempfile.mkdtemp(prefix="llmlab-triton-"))
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """Host and port, as tritonclient wants them."""
        return f"{self.host}:{self.port}"

    def start(self) -> TritonServer:
        """Start it, and wait until it is ready."""
        log = self._work / "log"
        with log.open("w") as out:
            self._process = subprocess.Popen(
                self._command(),
                env=self._environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        ends = time.monotonic() + self.seconds
        while not self._is_ready():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > ends:
                said = log.read_text(errors="replace")[-2000:]
                self.stop()
                why = "ended" if ended else f"is not ready after {self.seconds:g} s"
                raise RuntimeError(f"tritonserver {why}. The end of its log:\n{said}")
            time.sleep(0.05)
        return self

    def _command(self) -> list[str]:
        """The program and its options; the python backend gets its stub beside it."""
        backends = self._work / "backends"
        shutil.copytree(self._home / "backends", backends)
        stubs = self._home / "python_backend_stubs" / self._python_version
        shutil.copy2(stubs / "triton_python_backend_stub", backends / "python")
        return [
            str(self._home / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--cache-directory={self._home / 'caches'}",
            f"--http-address={self.host}",
            f"--http-port={self.port}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.metrics_port}",
            "--allow-grpc=false",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=2",
        ]

    def _environment(self) -> dict[str, str]:
        libraries = [str(self._site / "nvidia_pytriton.libs"), self._libraries]
        return os.environ | {
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self._site),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://{self.url}/v2/health/ready", timeout=5
            ):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """End it. Its exit status is 1 after SIGTERM: that is normal."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._work, ignore_errors=True)

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
