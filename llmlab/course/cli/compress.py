"""`llmlab compress`: a model in, a smaller folder out.

The methods are in `llmlab.compression`; `recipes` calls them.
"""

from __future__ import annotations

import json as jsonlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmlab.course.cli.base import Json, stop, write

MODEL = "smollm2 (the real model), course (the small one), or a Llama's folder"
METHOD = (
    "rtn, gptq, gptq-act-order, awq, peqa; magnitude, wanda, sparsegpt; or smoothquant"
)
FORMAT = "compressed-tensors, gptq, awq; or gguf:Q4_0, gguf:Q8_0 … (rounds by itself)"
LENGTH = 256  # tokens of a run of text, for calibration and to judge
JUDGED = 2048
FLOATS = ("float32", "float16", "bfloat16")


def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="a folder to be made")
    ],
    method: Annotated[str, typer.Option(help=METHOD)] = "gptq",
    bits: Annotated[
        int | None, typer.Option(help="of a code, 2 to 8; 4, smoothquant: 8")
    ] = None,
    group: Annotated[
        int, typer.Option(min=0, help="weights that share a scale; 0: those of a row")
    ] = 64,
    symmetric: Annotated[
        bool, typer.Option(help="levels around 0, or with a zero point")
    ] = True,
    sparsity: Annotated[
        float | None, typer.Option(help="the share of weights that pruning takes")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="or how many of how many it keeps, as 2:4")
    ] = None,
    format: Annotated[str, typer.Option(help=FORMAT)] = "compressed-tensors",
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="to calibrate on, instead of the course's"),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=LENGTH, help="to calibrate on, in runs of 256")
    ] = 4096,
    seed: Annotated[int, typer.Option(help="which runs of the text")] = 0,
    floats: Annotated[
        str, typer.Option(help="what embedding and norms are stored in")
    ] = "float16",
    judge: Annotated[
        bool, typer.Option(help="measure perplexity before and after")
    ] = True,
    json: Json = None,
) -> None:
    """Compress a model, in a format that other libraries open.

    The linears of its blocks are quantised; embedding, head and norms stay as they are.
    """
    from llmlab.compression import recipes

    check_output(output)
    check_choices(format, floats)
    try:
        recipe = recipes.Recipe(
            method, bits, group or None, symmetric, sparsity, pattern
        )
        check_folder(recipe)
        choices = Choices(format, text, tokens, seed, floats)
        result = followed(model, output, recipe, choices, judge)
    except (ValueError, FileNotFoundError) as error:
        stop(error, 2)
    if json:
        write(json, jsonlib.dumps(result, indent=1) + "\n")
    if str(json) != "-":
        say(result)


@dataclass(frozen=True)
class Choices:
    """The options of the command that say how."""

    format: str
    text: Path | None
    tokens: int
    seed: int
    floats: str


def check_choices(format: str, floats: str) -> None:
    """Exits with 2 where a name is unknown."""
    from llmlab.compression import formats

    kind, _, gguf_type = format.partition(":")
    if kind not in (*formats.FORMATS, "gguf"):
        stop(f"--format {format!r}: use {FORMAT}", 2)
    if floats not in FLOATS:
        stop(f"--floats {floats!r}: use one of {', '.join(FLOATS)}", 2)
    if kind == "gguf" and gguf_type not in formats.TYPES:
        stop(f"--format {format!r}: after gguf: comes one of {formats.TYPES}", 2)


def followed(model: str, output: Path, recipe, choices: Choices, judge: bool) -> dict:
    """Compress, write, judge: what came of it.

    Raises:
        ValueError, FileNotFoundError: something does not fit; nothing is written.
    """
    from llmlab.compression import formats, recipes
    from llmlab.compression import magnitude_wanda_sparsegpt as pruning

    folder, loaded = opened(model)
    encode = tokenizer_of(model, folder)
    result = {
        "model": model,
        "output": str(output),
        "format": choices.format,
        "bytes_before": bytes_of(loaded),
    }
    before = judged(loaded, encode) if judge else None
    kind, _, gguf_type = choices.format.partition(":")
    if kind == "gguf":
        if folder is None:
            raise ValueError(f"MODEL={model!r} has no folder with a tokenizer for GGUF")
        file = output / "model.gguf"
        formats.save_gguf(loaded, file, gguf_type, tokenizer_from=folder)
        loaded = reopened(output)
    else:
        batches = None
        if recipes.METHODS[recipe.method].reads_text:
            batches = calibration_text(encode, choices)
        recipes.compress(loaded, recipe, batches, progress_bar(recipe.method))
        store(loaded, output, recipe, kind, folder, dtype_of(choices.floats))
        loaded = written(output, recipe)  # what is judged is what the folder holds
        result["method"] = recipe.method
        if recipe.method == "peqa":
            result["steps"] = len(batches)
        if recipes.METHODS[recipe.method].stores == "floats":
            result["sparsity"] = pruning.sparsity(loaded)
        else:
            result["bits_per_weight"] = recipes.bits_per_weight(loaded)
    files = [file for file in output.iterdir() if file.is_file()]
    result["bytes"] = sum(file.stat().st_size for file in files)
    if judge:
        result |= compared(before, judged(recipes.as_floats(loaded), encode))
    return result


def store(model, output: Path, recipe, kind: str, folder: Path | None, dtype) -> None:
    """Write the folder: packed linears, 8-bit linears in a form of our own, or after
    pruning floats as any model has them.

    Raises:
        ValueError: the format cannot hold it.
    """
    from llmlab.compression import formats, recipes
    from llmlab.models import checkpoint

    stores = recipes.METHODS[recipe.method].stores
    if stores == "packed":
        formats.save(model, output, kind, folder, dtype)
        return
    if stores == "own":
        recipes.save_own(model, output, dtype)
        config = checkpoint.config_to_hf(model.config)
        text = jsonlib.dumps(config, indent=2) + "\n"
        (output / "config.json").write_text(text, encoding="utf-8")
    else:
        checkpoint.save(model.to(dtype), output)
    checkpoint.copy_tokenizer(folder, output)


def written(output: Path, recipe):
    """The model that `store` put into the folder."""
    from llmlab.compression import formats, recipes
    from llmlab.models import checkpoint
    from llmlab.models.llama import Llama

    if recipes.METHODS[recipe.method].stores != "own":
        return formats.load(output)
    raw = checkpoint.read_json(output / "config.json")
    blank = Llama(checkpoint.config_from_hf(raw)).eval()
    return recipes.load_own(blank, output)


def check_folder(recipe) -> None:
    """Raises: ValueError: what the method makes has no folder."""
    from llmlab.compression import recipes

    if recipes.METHODS[recipe.method].stores == "memory":
        raise ValueError(
            f"method={recipe.method!r} has no folder: in Python, recipes.compress gives"
            f" its model. Here, use {METHOD}"
        )


def check_output(output: Path) -> None:
    """Exits with 2 where something is there already: nothing is overwritten."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        stop(f"{output} is there already: name another folder, or remove it", 2)


def opened(model: str):
    """(its folder, or None; the model) that MODEL names.

    Raises:
        ValueError, FileNotFoundError: it names none that can be read.
    """
    from llmlab.models import checkpoint, course_model, real_model

    if model == "course":
        return None, course_model.load()
    if model == "smollm2":
        return real_model.path(), real_model.load()
    if not Path(model).is_dir():
        raise ValueError(f"MODEL={model!r} is no folder; {MODEL}")
    return Path(model), checkpoint.load(model)


def tokenizer_of(model: str, folder: Path | None):
    """text → ids."""
    from llmlab.models import course_model, real_model

    if model == "course":
        return lambda text: course_model.load_tokenizer().encode(text).ids
    return lambda text: real_model.load_tokenizer(folder).encode(text).ids


def dtype_of(name: str):
    """The dtype of that name."""
    import torch

    return getattr(torch, name)


def calibration_text(encode, choices: Choices) -> list:
    """Runs of 256 tokens, from FILE or from the course's addresses.

    Raises:
        ValueError: the text is shorter than one run.
    """
    import torch

    from llmlab.compression import calibration
    from llmlab.models import course_model

    if choices.text is None:
        source = course_model.corpus("addresses", "train")[: 40 * choices.tokens]
    else:
        source = choices.text.read_text(encoding="utf-8")
    ids = torch.tensor(encode(source))
    count = choices.tokens // LENGTH
    return calibration.sample(ids, LENGTH, count, choices.seed)


def judged(model, encode):
    """The loss of each token of a held-out text, in nats."""
    import torch

    from llmlab.models import course_model, language_model

    text = course_model.corpus("addresses", "valid")[: 10 * JUDGED]
    ids = torch.tensor(encode(text))[: JUDGED + 1]
    return language_model.token_losses(model, ids, context=LENGTH)


def compared(before, after) -> dict:
    """Perplexities, and by what factor it grew, with two standard errors."""
    grown = (after - before).double()
    error = 2 * (grown.std() / len(grown) ** 0.5).item()
    return {
        "perplexity_before": before.double().mean().exp().item(),
        "perplexity": after.double().mean().exp().item(),
        "factor": math.exp(grown.mean().item()),
        "factor_low": math.exp(grown.mean().item() - error),
        "factor_high": math.exp(grown.mean().item() + error),
    }


def bytes_of(model) -> int:
    """What its tensors take."""
    from llmlab.compression import quantization_basics

    return quantization_basics.nbytes(model)


def reopened(folder: Path):
    """The model of a GGUF file that was just written."""
    import tempfile

    from llmlab.models import checkpoint, gguf_import

    with tempfile.TemporaryDirectory() as scratch:
        return checkpoint.load(
            gguf_import.convert(folder / "model.gguf", Path(scratch) / "floats")
        )


def progress_bar(method: str):
    """progress(done, total), drawn on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(method, total=None)

    def progress(done: int, total: int) -> None:
        if done == 1:
            bar.start()
        of = "steps" if method == "peqa" else "blocks"
        bar.update(task, completed=done, total=total, description=f"{method}, {of}")
        if done == total:
            bar.stop()

    return progress


def say(result: dict) -> None:
    """The result in words."""
    share = result["bytes"] / result["bytes_before"]
    typer.echo(
        f"{result['output']}: {result['bytes'] / 1e6:.1f} MB, {share:.0%} of the"
        f" {result['bytes_before'] / 1e6:.1f} MB that the floats take"
    )
    if "bits_per_weight" in result:
        typer.echo(f"{result['bits_per_weight']:.2f} bits per weight of the linears")
    if "steps" in result:
        typer.echo(
            f"rounded to nearest; then {result['steps']} steps of training, a run of"
            f" {LENGTH} tokens each, for the scales alone"
        )
    if "sparsity" in result:
        typer.echo(f"{result['sparsity']:.1%} of the weights of the linears are 0")
    if "factor" in result:
        typer.echo(
            f"perplexity {result['perplexity_before']:.2f} →"
            f" {result['perplexity']:.2f}, × {result['factor']:.3f}"
            f" ({result['factor_low']:.3f} to {result['factor_high']:.3f}: two standard"
            f" errors), on {JUDGED:,} tokens of held-out addresses"
        )
