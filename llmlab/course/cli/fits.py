"""`llmlab fits`: what of a model fits on this machine, and how long it takes.

The arithmetic is in `llmlab.course.fits`.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import Annotated

import typer

from llmlab.course.cli.base import Json, stop, write

MODEL = (
    "a name (llama-2-7b, smollm2-135m …), or a Hugging Face config.json, or the folder"
    " with one, of a Llama or a Mistral"
)
HONEST = """\
Memory is counted from the shape: weights, adapters, optimizer, KV cache, and each
block's input with recomputation. Attention scores, logits and what the allocator wastes
are not in it. Times are estimates from {seconds:g} s of products and reading on this
CPU, at its fastest: they leave out all that is not a matrix product, and the unpacking
of 4-bit weights. Real runs take longer, twice as long or more.
"""


def fits(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    batch: Annotated[int, typer.Option(min=1, help="sequences at once")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="tokens per sequence")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="of the adapters")] = 16,
    json: Json = None,
) -> None:
    """Say whether a model fits on this machine.

    For inference, LoRA, QLoRA and full fine-tuning. It measures this CPU for five
    seconds, and counts memory from the model's shape.
    """
    from llmlab.course import fits as counting

    try:
        config, left_out = counting.config_of(model)
    except ValueError as error:
        stop(error, 2)
    if str(json) != "-":
        typer.echo(f"measuring this CPU for {counting.SECONDS:g} seconds …", err=True)
    free = counting.memory_free()
    speed = counting.calibrate()
    rows = counting.needs(config, batch, seq, rank, speed)
    if json:
        data = _data(model, rows, free, speed)
        data |= {"batch": batch, "seq": seq, "rank": rank, "left_out": list(left_out)}
        write(json, jsonlib.dumps(data, indent=1))
    if str(json) != "-":
        _print(model, config, rows, free, speed)
        typer.echo(f"A step: {batch} × {seq} tokens; adapters of rank {rank}.")
        if left_out:
            typer.echo(f"Counted by the shape alone, without: {'; '.join(left_out)}.")
        typer.echo("\n" + HONEST.format(seconds=counting.SECONDS))


def _data(model: str, rows: list, free: float, speed) -> dict:
    uses = []
    for row in rows:
        own = {"use": row.use, "bytes": row.bytes, "parts": row.parts}
        own |= {"fits": row.bytes <= free, "seconds": row.seconds, "per": row.unit}
        uses.append(own)
    return {"model": model, "free_bytes": free, "speed": asdict(speed), "uses": uses}


def _print(model: str, config, rows: list, free: float, speed) -> None:
    from rich.table import Table

    from llmlab.course.grading import report
    from llmlab.models.accounting import parameters

    out = report.console()
    numbers = "bf16" if speed.width == 2 else "fp32"
    out.print(
        f"{model}: {parameters(config) / 1e9:.3g} B parameters;"
        f" {free / 1e9:.1f} GB of memory can be had here"
    )
    out.print(
        f"this CPU: {speed.flops_fp32 / 1e9:.3g} GFLOP/s in fp32,"
        f" {speed.flops_bf16 / 1e9:.3g} in bf16; it reads"
        f" {speed.bandwidth / 1e9:.3g} GB/s. Counted in {numbers}"
    )
    table = Table(box=None, pad_edge=False)
    for head in ("use", "GB", "fits", "about", "most of it"):
        table.add_column(head, justify="right" if head == "GB" else "left")
    for row in rows:
        fit = "yes" if row.bytes <= free else f"{row.bytes / free:.1f} × too large"
        time = f"{duration(row.seconds)} {row.unit}"
        size = f"{row.bytes / 1e9:.3g}"
        most = f"{row.most}, {row.parts[row.most] / 1e9:.3g} GB"
        table.add_row(row.use, size, fit, time, most)
    out.print(table)


def duration(seconds: float) -> str:
    """'20 ms', '3.1 s', '12 min', '5.2 h': two digits, since it is an estimate."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds * 1000:.2g}'):g} ms"
