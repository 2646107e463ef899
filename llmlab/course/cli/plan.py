"""`llmlab plan`: how to split a training job over devices.

The arithmetic is in `llmlab.parallelism.choosing.planner`.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, replace
from math import isfinite
from typing import Annotated

import typer

from llmlab.course.cli.base import Json, stop, write

MODELS = (
    "a name (llama-2-70b, gpt3-175b …), gpt:LAYERS,HIDDEN,HEADS, or a Hugging Face"
    " config.json (or its folder) of a Llama or a Mixtral"
)
LEGEND = """\
dp, tp, pp, cp, ep: ranks that share the data, the matrices, the layers, the text, the
  experts; b: sequences of a microbatch; v: pieces of the pipeline on each rank
  recompute + sp: activations computed twice; sp: sequence parallelism along tp
  GB: on each device; MFU: useful FLOPs of those that the devices could do
"""
GPTS = {  # layers, hidden, heads
    "gpt3-175b": (96, 12288, 96),
    "mt-nlg-530b": (105, 20480, 128),
    "gpt-1t": (128, 25600, 160),
}


def shape_and_rest(model: str):
    """(the shape that MODEL names, what its checkpoint has and that does not show).

    Raises:
        ValueError: it names none.
    """
    from llmlab.course import model_shapes
    from llmlab.models.presets import PRESETS
    from llmlab.parallelism.choosing import shapes

    if model in PRESETS:
        return shapes.llama(PRESETS[model]), ()
    if model in shapes.MIXTURES:
        return shapes.MIXTURES[model], ()
    if model in GPTS:
        return shapes.gpt(*GPTS[model]), ()
    if model.startswith("gpt:"):
        numbers = model.removeprefix("gpt:").split(",")
        if len(numbers) == 3 and all(map(_is_positive, numbers)):
            layers, hidden, heads = map(int, numbers)
            return shapes.gpt(layers, hidden, heads), ()
        raise ValueError(
            f"MODEL={model!r}: write gpt:LAYERS,HIDDEN,HEADS, as in gpt:96,12288,96"
        )
    file = model_shapes.config_file(model)
    if file is None:
        known = [*GPTS, *shapes.MIXTURES, *PRESETS]
        raise model_shapes.unknown(model, known, MODELS)
    found = model_shapes.from_file(file)
    dense = shapes.llama(found.config)
    shape = replace(dense, experts=found.experts, top_k=found.top_k)
    return shape, found.left_out


def _is_positive(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODELS)],
    devices: Annotated[int, typer.Option(min=1, help="how many devices")],
    machine: Annotated[
        str,
        typer.Option(
            help="what they are: a100-80gb, h100-80gb … (a wrong name lists all)"
        ),
    ] = "a100-80gb",
    batch: Annotated[
        int, typer.Option(min=1, help="sequences per step, over all devices")
    ] = 1024,
    seq: Annotated[int, typer.Option(min=1, help="tokens per sequence")] = 2048,
    tokens: Annotated[
        float, typer.Option(min=1, help="tokens to train on in all, as 300e9")
    ] = 300e9,
    price: Annotated[
        float | None, typer.Option(min=0, help="dollars per device and hour")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, help="GB per device, instead of the machine's"),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s a device between nodes, instead"),
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="of the peak, in matrix products"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="how many plans to print")] = 10,
    json: Json = None,
) -> None:
    """Plan a training job: rank the ways to split it over devices.

    They are dp × tp × pp × cp × ep, ranked by the time of a step. For those that cannot
    run it says why.
    """
    from llmlab.parallelism.choosing import Job, machines, planner

    all_finite(tokens=tokens, price=price, memory=memory, network=network)
    changes = {}
    if memory is not None:
        changes["memory"] = memory * 1e9
    if network is not None:
        changes["network"] = network * 1e9
    if efficiency is not None:
        changes["efficiency"] = efficiency
    try:
        on = machines.machine(machine, **changes)
        shape, ignored = shape_and_rest(model)
        job = Job(shape, batch, seq, on)
    except ValueError as error:
        stop(error, 2)
    found = planner.search(job, devices)
    uneven = planner.uneven(job, devices)
    rows = [_row(job, e, tokens, price) for e in found.splits()[:top]]
    if json:
        data = _data(model, job, found, rows)
        data["uneven"] = asdict(uneven)
        data["left_out"] = list(ignored)
        write(json, jsonlib.dumps(data, indent=1))
    if str(json) != "-":
        _print(model, job, devices, found, rows)
        _print_left_out(job, uneven, ignored)
    raise typer.Exit(0 if found.ranked else 1)


def all_finite(**options: float | None) -> None:
    """Stops where an option is infinite or not a number."""
    for name, value in options.items():
        if value is not None and not isfinite(value):
            stop(f"--{name} {value} must be a finite number", 2)


def _row(job, e, tokens: float, price: float | None) -> dict:
    from llmlab.parallelism.choosing import planner

    days = planner.days(job, e.step, tokens)
    row = asdict(e.plan)
    row["gigabytes"] = e.bytes / 1e9
    row["seconds"] = e.step
    row["mfu"] = e.mfu
    row["days"] = days
    if price is not None:
        row["dollars"] = planner.dollars(e.plan.devices, days, price)
    return row


def _data(model: str, job, found, rows: list[dict]) -> dict:
    return {
        "model": model,
        "machine": asdict(job.machine),
        "batch": job.batch,
        "seq": job.seq,
        "plans": rows,
        "rejected": dict(found.reasons()),
        "nearest": _nearest(found),
    }


def _nearest(found) -> str:
    return found.rejected[0].problems[0] if found.rejected else ""


def _print_left_out(job, uneven, ignored: tuple[str, ...]) -> None:
    """What was not planned at all, and what could be done about it."""
    if uneven.left_out:
        cure = ""
        if uneven.better is not None:
            cure = f": try --batch {uneven.better}"
        typer.echo(
            f"{uneven.left_out} of {uneven.of} splits were left out: dp does not divide"
            f" the batch of {job.batch}{cure}"
        )
    if ignored:
        typer.echo(
            f"Planned by the shape alone, without: {'; '.join(ignored)}. `Llama` does"
            " not load such a checkpoint"
        )


def _print(model: str, job, devices: int, found, rows: list[dict]) -> None:
    from rich.table import Table

    from llmlab.course.grading import report
    from llmlab.parallelism.choosing import shapes

    out = report.console()
    n = shapes.parameters(job.shape)
    size = f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"
    out.print(
        f"{model}: {size} parameters; {devices} × {job.machine.name};"
        f" {job.batch} × {job.seq} tokens per step"
    )
    if rows:
        table = Table(box=None, pad_edge=False)
        heads = ["dp", "tp", "pp", "cp", "ep", "b", "v", "recompute"]
        heads += ["ZeRO", "GB", "s/step", "MFU", "days"]
        if "dollars" in rows[0]:
            heads.append("$")
        for head in heads:
            table.add_column(head, justify="left" if head == "recompute" else "right")
        for r in rows:
            table.add_row(*_cells(r))
        out.print(table)
        out.print(LEGEND)
    out.print(f"{len(found.ranked)} plans can run, {len(found.rejected)} cannot:")
    for reason, count in found.reasons().most_common(5):
        out.print(f"  {count:>5}  {reason}")
    if not rows:
        nearest = _nearest(found) or "none divides the model and the batch"
        out.print(f"No plan can run. The nearest miss: {nearest}.")


def _cells(r: dict) -> list[str]:
    names = ("dp", "tp", "pp", "cp", "ep", "microbatch", "chunks")
    cells = [str(r[name]) for name in names]
    cells.append(f"{r['recompute']} + sp" if r["sequence"] else r["recompute"])
    cells.append(str(r["zero"]))
    cells.append(f"{r['gigabytes']:.0f}")
    cells.append(f"{r['seconds']:.3g}")
    cells.append(f"{r['mfu']:.1%}")
    cells.append(f"{r['days']:.3g}")
    if "dollars" in r:
        cells.append(f"{r['dollars']:,.0f}")
    return cells
