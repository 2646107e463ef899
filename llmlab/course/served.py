"""What `llmlab serve` serves: a folder, adapters, and whose functions the engine is of.

PIECES     the functions of the engine that exercises ask for
choose     what MODEL names: its folder and the name that clients use
whose      the table: which pieces are the learner's, which ours, and why
Loading    what the worker does first: the model, its adapters, the pieces
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.course import mine, standing
from llmlab.course.mine import Own
from llmlab.course.syllabus import find

# The engine's piece has the name of the exercise.
PIECES: dict[str, tuple[str, ...]] = {
    "07-inference/03-paged-attention": (
        "allocate",
        "append_slot",
        "free",
        "paged_attention",
    ),
    "07-inference/04-continuous-batching": ("schedule",),
    "07-inference/05-sampling-and-speculation": ("keep_top_p", "accept", "lookup"),
}
# What the process imports once from which each worker is forked.
PRELOAD = (
    "llmlab.compression.formats",
    "llmlab.compression.recipes",
    "llmlab.course.served",
    "llmlab.inference.engine",
    "llmlab.inference.serving",
    "torch._dynamo",  # torch imports it, for seconds, when a model is made
)
MODEL = (
    "smollm2 (the real model), course (the small one), a Llama's folder, or an engine's"
)
ENGINE = "engine.json"  # what makes a folder an engine's


@dataclass(frozen=True)
class Chosen:
    """A model that can be served.

    Attributes:
        limits: of a built engine, as `EngineConfig` takes them; else None.
    """

    name: str
    folder: Path
    limits: dict[str, Any] | None = None


def choose(model: str) -> Chosen:
    """What MODEL names.

    Raises:
        FileNotFoundError: the real model was not fetched yet.
        ValueError: no folder of that name, or one that holds no model.
    """
    from llmlab.models import course_model, real_model

    if model == "course":
        return Chosen("course", course_model.MODEL)
    if model == "smollm2":
        return Chosen("smollm2", real_model.path())
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f"--model {model!r} is no folder; {MODEL}")
    if (folder / ENGINE).is_file():
        return Chosen(folder.resolve().name, folder.resolve(), limits_of(folder))
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {model!r} has no config.json: it holds no model")
    return Chosen(folder.resolve().name, folder.resolve())


def limits_of(folder: Path) -> dict[str, Any]:
    """What an engine was built for. Whether it is whole, and whether its plugins are
    those of part 06, the worker sees.

    Raises:
        ValueError: it lacks a tokenizer, or is none.
    """
    try:
        document = json.loads((folder / ENGINE).read_text(encoding="utf-8"))
        limits = document["limits"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--model: {folder / ENGINE} is not what `build` writes"
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"--model: the engine {folder} has no tokenizer.json: older builds left it"
            " out. Build it anew, or copy the file from the checkpoint"
        )
    return limits


def adapters(given: Sequence[str], base: str) -> dict[str, Path]:
    """NAME=FOLDER, as many as there are.

    Raises:
        ValueError: not of that form, twice the same name, or no adapter's folder.
    """
    out: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"--adapter {each!r} must be NAME=FOLDER")
        if name == base or name in out:
            raise ValueError(f"--adapter {each!r}: the name {name!r} is taken")
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(
                f"--adapter {each!r}: {folder} has no adapter_config.json, so it is no"
                " adapter's folder"
            )
        out[name] = Path(folder).resolve()
    return out


def whose(
    root: Path, told: Callable[[Own], None] = lambda own: None
) -> tuple[list[dict[str, str]], tuple[Own, ...]]:
    """The pieces of the engine, and those that are the learner's.

    Each answer is marked by its check now, in a process of its own.

    Returns:
        Rows {"piece", "exercise", "whose", "why"}, and the answers that are right.
    """
    wanted = []
    absent = set()
    for slug, names in PIECES.items():
        built = standing.exercise_names(find(slug), root)
        for name in names:
            wanted.append((slug, name))
            if name not in built:
                absent.add(name)
    asked = [pair for pair in wanted if pair[1] not in absent]
    found = {own.name: own for own in mine.collect(asked, root, told=told)}
    rows = []
    for slug, name in wanted:
        row = {"piece": name, "exercise": slug, "whose": "ours"}
        if name in absent:
            row["why"] = "the exercise is not written yet"
        elif found[name].is_right:
            row |= {"whose": "yours", "why": ""}
        else:
            own = found[name]
            row["why"] = f"{mine.WORDS[own.outcome]}: {own.why}".removesuffix(": ")
        rows.append(row)
    return rows, tuple(own for own in found.values() if own.is_right)


def opened(folder: Path) -> Any:
    """The Llama of a folder: floats, what `llmlab compress` wrote, or an engine's.

    Raises:
        ValueError, FileNotFoundError: it cannot be read.
    """
    from llmlab.compression import formats, recipes, smoothquant
    from llmlab.compression.kernels import plugins
    from llmlab.inference.engine import open_engine
    from llmlab.models import checkpoint
    from llmlab.models.llama import Llama

    if (folder / ENGINE).is_file():
        return open_engine(folder, plugins=plugins.PLUGINS).model
    if not (folder / smoothquant.CONFIG).is_file():
        return formats.load(folder).eval()
    raw = checkpoint.read_json(folder / "config.json")
    return recipes.load_own(Llama(checkpoint.config_from_hf(raw)).eval(), folder)


@dataclass(frozen=True)
class Loading:
    """What the worker does first. It goes to that process, so it is plain data.

    Attributes:
        sizes: settings of `EngineConfig`.
        cache_tokens: that the cache has room for, where `sizes` has no num_blocks.
        threads: that torch computes with; None: as many as it likes.
    """

    folder: Path
    adapters: dict[str, Path]
    own: tuple[Own, ...]
    sizes: dict[str, Any]
    cache_tokens: int
    threads: int | None = None

    def __call__(self, mark: Callable[[str], None]) -> Callable:
        """Load, once; returns what makes an engine without the pieces that failed."""
        import torch

        from llmlab.inference.engine import (
            Adapter,
            Engine,
            EngineConfig,
            Pieces,
            packed,
        )
        from llmlab.inference.serving import marked

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = packed(opened(self.folder))
        loras = {name: Adapter.load(path) for name, path in self.adapters.items()}
        theirs = {own.name: mine.function(own) for own in self.own}
        sizes = {"block_size": 16} | self.sizes
        sizes.setdefault("num_blocks", -(-self.cache_tokens // sizes["block_size"]))
        config = EngineConfig(**sizes)

        def make(without: Collection[str]) -> Engine:
            kept = {
                name: marked(name, function, mark)
                for name, function in theirs.items()
                if name not in without
            }
            return Engine(model, config, pieces=Pieces(**kept), adapters=loras or None)

        return make
