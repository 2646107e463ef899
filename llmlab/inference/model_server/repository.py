"""A model repository: a folder of models, each with versions.

    models/
        lm/                  a model; the folder's name is the model's
            config.pbtxt
            1/model.py       version 1
            2/model.py       version 2, served: the newest is
        complete/            an ensemble
            config.pbtxt
            1/               empty: there is nothing but the configuration

Everything is read and held against each other before the first request: what does not
fit is said at the start, in one sentence, and nothing is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmlab.inference.model_server.config import ModelConfig, load_config
from llmlab.inference.model_server.ensemble import check_ensemble


@dataclass(frozen=True)
class Entry:
    """A model in the repository, and the version that is served."""

    config: ModelConfig
    folder: Path
    version: int

    @property
    def name(self) -> str:
        """The model's name."""
        return self.config.name


def versions(folder: Path) -> list[int]:
    """The versions in a model's folder, the oldest first.

    They are folders whose names are numbers, without zeros before them.
    """
    found = []
    for path in folder.iterdir():
        name = path.name
        if path.is_dir() and name.isascii() and name.isdigit() and name[0] != "0":
            found.append(int(name))
    return sorted(found)


def read_repository(folder: str | Path) -> dict[str, Entry]:
    """All models of a repository, by name.

    Raises:
        ValueError: there is none, or a model or an ensemble that does not fit.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"repository={str(folder)!r} is no folder")
    found = {}
    for path in sorted(root.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        config = load_config(path)
        there = versions(path)
        if not there:
            raise ValueError(f"{path.name} has no version: make a folder {path.name}/1")
        found[config.name] = Entry(config, path.resolve(), there[-1])
    if not found:
        raise ValueError(f"repository={str(folder)!r} holds no model")
    configs = {name: entry.config for name, entry in found.items()}
    for config in configs.values():
        if config.is_ensemble:
            check_ensemble(config, configs)
    return found
