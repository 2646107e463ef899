"""Tactics: several ways to compute a layer, of which the fastest here is kept.

    arithmetic   "floats"; for 8-bit codes: "int8", a product of codes that is summed in
                 32 bits, where this machine's instructions do that rightly; "int32",
                 where they do not, and float64 does; and "codes in floats", exact while
                 every sum stays below 2²⁴
    joined       the weights of all products of a layer as one matrix
    packed       each weight copied to the order (in, out)

Which is fastest depends on the shapes and on the machine, and no rule is as good as a
clock. But a clock takes time: what was timed once is remembered in a timing cache, by a
key that has everything that the time depends on, and nothing else.

    in the key          operations and how they are wired, shapes, formats, attributes,
                        rows, threads
    in the cache's head the processor, its instructions, the version of torch: a cache
                        of another machine is refused
    in neither          the numbers in a weight, names: two layers of a model that look
                        alike are timed once
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmlab.compilers.front_end import OPS, Node
from llmlab.compilers.tensorrt.calibration import FORMATS
from llmlab.compilers.tensorrt.layers import (
    Layer,
    is_stored,
    operand,
    operands_format,
    weight_of,
)
from llmlab.compilers.tensorrt.placement import stored_format
from llmlab.models import codes
from llmlab.models.machine import processor

Values = Mapping[Node, Tensor]
CACHE_VERSION = 1


@dataclass(frozen=True)
class Tactic:
    """One way to compute a layer's products."""

    arithmetic: str
    joined: bool = False
    packed: bool = False

    def __str__(self) -> str:
        more = ", one matrix" if self.joined else ", packed" if self.packed else ""
        return self.arithmetic + more


def tactics_for(layer: Layer) -> list[Tactic]:
    """All that compute this layer rightly; the plainest first."""
    products = layer.products
    if not products:
        return [Tactic("floats")]
    kinds = ["floats"]
    if layer.precision == "int8" and all(map(has_one_scale, products)):
        kinds = ["int8" if codes.sums_are_exact() else "int32"]
        inner = operand(products[0]).type.shape[-1]
        if inner * 127 * 127 < 2**24:
            kinds.append("codes in floats")
    orders = [(False, False)]
    weights = [weight_of(node) for node in products]
    # products of packed codes are scaled afterwards
    scaled = layer.precision != "f32" and not all(map(has_one_scale, products))
    if all(is_stored(w) and len(w.type.shape) == 2 for w in weights) and not scaled:
        orders.append((False, True))
        if len(products) > 1:
            orders.append((True, True))
    return [Tactic(kind, *order) for kind in kinds for order in orders]


def has_one_scale(product: Node) -> bool:
    """Whether scales can leave the sum: one for x, one for each column of w."""
    x, w = product.inputs
    inner = -1 if product.attributes[0] else 0
    scale = w.inputs[1].type.shape
    fits = not scale or len(scale) == 1 or scale[inner] == 1
    return x.inputs[1].type.shape in ((), (1,)) and fits


# Running ------------------------------------------------------------------------------


def prepare(layer: Layer, tactic: Tactic, stored: Values) -> list[Tensor]:
    """The weights as this tactic reads them, (in, out); none if as they are."""
    if not tactic.packed:
        return []
    weights = [as_read(stored[weight_of(n)], n, tactic) for n in layer.products]
    if tactic.joined:
        weights = [torch.cat(weights, dim=1)]
    return [w.contiguous() for w in weights]


def run_layer(
    layer: Layer, tactic: Tactic, values: Values, prepared: Sequence[Tensor]
) -> dict[Node, Tensor]:
    """The values of the layer's roots, as they are stored.

    Args:
        values: all that it reads, codes in their own dtype.
    """
    inside: dict[Node, Tensor] = {}
    if layer.products and (tactic.packed or tactic.arithmetic != "floats"):
        inside.update(products(layer, tactic, values, prepared))

    def value(node: Node) -> Tensor:
        return inside[node] if node in inside else in_floats(node, values)

    needed = still_needed(layer, {*inside, *values})
    for node in layer.nodes:
        if node in needed:
            read = [value(each) for each in node.inputs]
            inside[node] = OPS[node.op].run(read, node.attributes)
    return {root: as_stored(root, value(root)) for root in layer.roots}


def still_needed(layer: Layer, known: set[Node]) -> set[Node]:
    """What must be computed for the roots: the DQ of a product of codes need not."""
    needed: set[Node] = set()
    waiting = list(layer.roots)
    while waiting:
        node = waiting.pop()
        if node not in known and node not in needed and node.data is None:
            needed.add(node)
            waiting += node.inputs
    return needed


def as_stored(node: Node, value: Tensor) -> Tensor:
    """Codes in their own dtype, all else as it is."""
    form = stored_format(node)
    return value if form is None else value.to(FORMATS[form].dtype)


def products(
    layer: Layer, tactic: Tactic, values: Values, prepared: Sequence[Tensor]
) -> dict[Node, Tensor]:
    """All products of a layer, scaled."""
    nodes = layer.products
    x = values[operand(nodes[0])]
    flat = x.reshape(-1, x.shape[-1])
    if tactic.joined:
        widths = [node.type.shape[-1] for node in nodes]
        results = multiply(flat, prepared[0], tactic).split(widths, dim=1)
    else:
        weights = prepared or [as_read(values[weight_of(n)], n, tactic) for n in nodes]
        xs = [values[operand(node)] for node in nodes]
        results = [
            multiply(a.reshape(-1, a.shape[-1]), w, tactic)
            for a, w in zip(xs, weights, strict=True)
        ]
    found = {}
    for node, y in zip(nodes, results, strict=True):
        if operands_format(node) != "f32":
            y = y.float() * scales(node, values)
        found[node] = y.reshape(*x.shape[:-1], y.shape[-1])
    return found


def as_read(w: Tensor, product: Node, tactic: Tactic) -> Tensor:
    """A weight as (in, out)."""
    w = w.mT if product.attributes[0] else w
    return w.float() if tactic.arithmetic == "codes in floats" else w


def multiply(x: Tensor, w: Tensor, tactic: Tactic) -> Tensor:
    """The product: int32 of int8 codes, or floats."""
    if tactic.arithmetic in ("int8", "int32"):
        return codes.product(x, w)
    return x.float() @ w.float()


def scales(product: Node, values: Values) -> Tensor:
    """s_x s_w, one for each column of the product."""
    x, w = product.inputs
    s_x, s_w = (in_floats(each.inputs[1], values) for each in (x, w))
    return s_x.reshape(()) * (s_w.flatten() if s_w.dim() else s_w)


def in_floats(node: Node, values: Values) -> Tensor:
    """A constant, or a value that is stored or computed; its codes as floats."""
    return values[node].to(node.type.dtype) if node.data is None else node.data


# Timing -------------------------------------------------------------------------------


def timing_key(layer: Layer, rows: int | None, threads: int) -> str:
    """All that the time of a layer depends on, on one machine."""
    names: dict[Node, str] = {}
    parts = [f"{threads} threads"]
    parts += [] if rows is None else [f"{rows} rows"]
    for node in [*layer.reads, *layer.nodes]:
        outside = node in layer.reads
        words = ["read"] if outside else [node.op]
        for each in () if outside else node.inputs:
            words.append(names.get(each, f"constant {each.type}"))
        names[node] = f"%{len(names)}"
        words += [str(node.type), stored_format(node) or "", str(node.attributes)]
        parts.append(" ".join(words))
    parts.append("writes " + " ".join(names[root] for root in layer.roots))
    return "; ".join(parts)


def machine() -> dict[str, str]:
    """What a time depends on beside the layer."""
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def check_machine(found: Mapping[str, str], what: str) -> None:
    """Raises: ValueError: it was made on another machine; what differs is named."""
    here = machine()
    for key, value in here.items():
        if found.get(key) != value:
            raise ValueError(
                f"{what} was made with {key} {found.get(key)!r}, and here it is"
                f" {value!r}: times from there say nothing of here"
            )


@dataclass
class TimingCache:
    """Times of tactics, in seconds, by the key of the layer.

    Attributes:
        hits, misses: how many layers were found, and how many had to be timed.
    """

    times: dict[str, dict[str, float]] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0

    def save(self, file: str | Path) -> None:
        """As JSON, with the machine."""
        text = {"version": CACHE_VERSION, "machine": machine(), "times": self.times}
        Path(file).write_text(json.dumps(text, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path, other_machine: bool = False) -> TimingCache:
        """From a file.

        Args:
            other_machine: take times that were measured elsewhere.

        Raises:
            ValueError: it is no timing cache, of another version or another machine.
        """
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
            version, times = found["version"], found["times"]
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{file} is no timing cache: {problem}") from None
        if version != CACHE_VERSION:
            raise ValueError(
                f"{file} has version {version!r}; known is {CACHE_VERSION}: delete it"
            )
        if not other_machine:
            check_machine(found.get("machine", {}), str(file))
        return cls(times)


def pick(
    layer: Layer,
    values: Values,
    cache: TimingCache,
    rows: int | None = None,
    repeat: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Tactic:
    """The fastest tactic, timed in turns; from the cache if it knows the layer.

    Args:
        values: examples of all that the layer reads.
        repeat: rounds; the least time of each counts.
    """
    known = {str(tactic): tactic for tactic in tactics_for(layer)}
    if len(known) == 1:
        return next(iter(known.values()))
    key = timing_key(layer, rows, torch.get_num_threads())
    if set(cache.times.get(key, ())) == set(known):
        cache.hits += 1
    else:
        cache.misses += 1
        ready = {name: prepare(layer, known[name], values) for name in known}
        times = dict.fromkeys(known, float("inf"))
        for _ in range(repeat + 1):  # the first one warms up
            for name, tactic in known.items():
                started = clock()
                run_layer(layer, tactic, values, ready[name])
                times[name] = min(times[name], clock() - started)
        cache.times[key] = times
    times = cache.times[key]
    return known[min(times, key=times.get)]
