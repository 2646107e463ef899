"""The lesson's repository: a text is tokenised, continued by a word, and written out.

    tok, lm, word   the course model in three steps
    complete        the ensemble of them
    steady          a stand-in for a large model: 5 ms for any batch

Written by `write_example` into a folder of one's own, where Triton can serve it, too.
Its python files need NumPy, tokenizers and safetensors, and nothing of this package.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "example_models"
TEXT_MODELS = ("tok", "lm", "word")


def write_example(
    folder: str | Path,
    steady: Mapping[str, str] | None = None,
    milliseconds: float = 5.0,
    models: Sequence[str] = (*TEXT_MODELS, "complete"),
) -> Path:
    """Make the repository.

    Args:
        folder: new, or empty.
        steady: copies of the model `steady`: their name → text added to their
            config.pbtxt, such as a `dynamic_batching { … }`.
        milliseconds: that an execution of theirs takes.
        models: which of the others.
    Returns:
        The folder.
    Raises:
        ValueError: there is something in the folder.
    """
    from llmlab.models import course_model  # it brings PyTorch, a server needs none

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise ValueError(f"folder={str(folder)!r} is not empty")
    for name in models:
        _copy(name, root / name)
        if name in TEXT_MODELS:
            _add(root / name, parameter("folder", str(course_model.MODEL)))
    for name, batching in (steady or {}).items():
        _copy("steady", root / name)
        _add(root / name, batching)
        _add(root / name, parameter("milliseconds", f"{milliseconds:g}"))
    return root


def dynamic(delay: float, preferred: Sequence[int] = ()) -> str:
    """The text `dynamic_batching { … }`; the delay in seconds."""
    sizes = f" preferred_batch_size: {list(preferred)}" if preferred else ""
    micro = round(delay * 1e6)
    return f"dynamic_batching {{ max_queue_delay_microseconds: {micro}{sizes} }}"


def parameter(key: str, value: str) -> str:
    """The text `parameters { … }`."""
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'parameters {{ key: "{key}" value {{ string_value: "{quoted}" }} }}'


def _copy(name: str, target: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / name, target, ignore=skip)


def _add(model: Path, text: str) -> None:
    with (model / "config.pbtxt").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
