"""The tables of the book's page "Recomputing activations".

What a layer keeps for its backward pass, counted in a layer that runs and by the
paper's formula; and what both say of the models that the paper measured.
"""

from __future__ import annotations

from dataclasses import dataclass

RANKS = 4  # of the layer that runs here
PAPERS_RANKS = 8


@dataclass(frozen=True)
class Way:
    """How a layer keeps less: cut along the sequence, or recomputed.

    `formula` is the paper's, in bytes per token and channel.
    """

    name: str
    formula: str
    sequence: bool = False
    recompute: str = "none"


WAYS = (
    Way("tensor parallelism alone", "10 + 24/t + 5as/(ht)"),
    Way("… and selective recomputation", "10 + 24/t", recompute="selective"),
    Way("… and sequence parallelism", "(34 + 5as/h)/t", sequence=True),
    Way("… and both", "34/t", sequence=True, recompute="selective"),
    Way("tensor parallelism, full recomputation", "2", recompute="full"),
)
# name → heads, hidden size, batch: table 3 of the paper, with 2,048 tokens
MODELS = {
    "22B": (64, 6144, 4),
    "175B": (96, 12288, 1),
    "530B": (128, 20480, 1),
    "1T": (160, 25600, 1),
}
# model → what selective recomputation saves and costs, in %, as section 5 has it
PUBLISHED = {"175B": ("GPT-3", 70, 2.7), "530B": ("MT-NLG", 65, 1.6)}


def counted() -> str:
    """A small layer on four ranks: counted while it runs, and by formula."""
    from llmlab.parallelism import World
    from llmlab.parallelism.sequence import GPTShape, layer_bytes

    shape = GPTShape(s=48, b=2, h=64, a=8)
    sbh = shape.s * shape.b * shape.h
    lines = ["| what a rank keeps, per token and channel | formula | bytes | counted |"]
    lines += ["|---|---|--:|--:|"]
    for way in WAYS:
        expected = layer_bytes(
            shape, RANKS, sequence_parallel=way.sequence, recompute=way.recompute
        )
        found = World(RANKS).run(_count, shape, way)[0]
        numbers = f"{expected / sbh:.2f} | {found / sbh:.2f}"
        lines.append(f"| {way.name} | ${way.formula}$ | {numbers} |")
    return "\n".join(lines)


def _count(comm, shape, way: Way) -> int:
    """Bytes that one rank's layer keeps, without the norms' means and deviations."""
    import torch

    from llmlab.parallelism.sequence import GPTLayer, Saved

    layer = GPTLayer(
        shape, comm, sequence_parallel=way.sequence, recompute=way.recompute
    )
    tokens = shape.s // comm.size if way.sequence else shape.s
    x = torch.ones(shape.b, tokens, shape.h, dtype=torch.bfloat16, requires_grad=True)
    with Saved(layer.parameters()) as saved:
        layer(x)
    return sum(size for kept, _, size in saved.kinds if kept[-1] > 1)


def large() -> str:
    """The paper's four models on eight ranks: bytes per layer, and what is left."""
    from llmlab.parallelism.sequence import layer_bytes

    names = ["selective", "sequence", "both", "full"]
    lines = [f"| model | MB per layer and rank | {' | '.join(names)} |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for name in MODELS:
        shape = _shape(name)
        sizes = []
        for way in WAYS:
            size = layer_bytes(
                shape,
                PAPERS_RANKS,
                sequence_parallel=way.sequence,
                recompute=way.recompute,
            )
            sizes.append(size)
        shares = " | ".join(f"{size / sizes[0]:.1%}" for size in sizes[1:])
        lines.append(f"| {name} | {sizes[0] / 1e6:,.0f} | {shares} |")
    return "\n".join(lines)


def price() -> str:
    """What selective recomputation saves and costs: the paper's numbers and ours."""
    from llmlab.parallelism.sequence import layer_bytes, recompute_flops

    lines = ["| model | saves: paper | ours | costs FLOPs: paper | ours |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for name, (title, saves, costs) in PUBLISHED.items():
        shape = _shape(name)
        left = layer_bytes(shape, recompute="selective") / layer_bytes(shape)
        flops, more = recompute_flops(shape)
        lines.append(
            f"| {title} | {saves}% | {1 - left:.0%} | {costs}% | {more / flops:.1%} |"
        )
    return "\n".join(lines)


def _shape(name: str):
    """One layer of a model of the paper."""
    from llmlab.parallelism.sequence import GPTShape

    heads, hidden, batch = MODELS[name]
    return GPTShape(s=2048, b=batch, h=hidden, a=heads)
