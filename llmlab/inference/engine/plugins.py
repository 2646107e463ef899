"""Which function multiplies with a weight, and how the weight is stored for it.

A plugin is three functions. One packs a weight into the tensors that it wants, one
multiplies with them, one says what the weight was. Whoever builds an engine gives a
table, name → plugin; so part 06's kernels, or anybody's own, take part without this
file knowing them. An engine that was built with a plugin asks for it by name when it
is opened.

Several may be allowed for the same weight. Then all are measured, here, on this
machine, with as many tokens as a step is expected to have, and the fastest stays: a
*tactic*, in TensorRT's words. The times are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Clock = Callable[[Callable[[], object]], float]  # a function → its seconds
REPEATS = 5
CACHES = 64 * 2**20  # bytes; more than the caches of a CPU hold


class Plugin(NamedTuple):
    """How a linear is stored and computed.

    Attributes:
        pack: weight (out, in) → the tensors to store.
        product: x (…, in) and these tensors → x Wᵀ (…, out).
        weight: the tensors → the weight that they stand for.
    """

    pack: Callable[[Tensor], Tensors]
    product: Callable[[Tensor, Tensors], Tensor]
    weight: Callable[[Tensors], Tensor]


TORCH = Plugin(
    pack=lambda weight: {"weight": weight},
    product=lambda x, tensors: F.linear(x, tensors["weight"]),
    weight=lambda tensors: tensors["weight"],
)


class PluginLinear(nn.Module):
    """y = x Wᵀ + b, the product by a plugin."""

    def __init__(self, plugin: Plugin, tensors: Tensors, bias: Tensor | None) -> None:
        super().__init__()
        self.plugin = plugin
        self.names = sorted(tensors)
        for name in self.names:
            # under another name: `weight` is what all linears have
            self.register_buffer(f"stored_{name}", tensors[name])
        self.register_buffer("bias", bias)

    @property
    def tensors(self) -> Tensors:
        """What the plugin has packed."""
        return {name: getattr(self, f"stored_{name}") for name in self.names}

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight, decoded."""
        return self.plugin.weight(self.tensors)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = self.plugin.product(x, self.tensors)
        return y if self.bias is None else y + self.bias


class Tactic(NamedTuple):
    """What was measured for one plugin on one shape: seconds, the least of a few."""

    rows: int
    columns: int
    tokens: int
    plugin: str
    seconds: float


def seconds(
    run: Callable[[], object], others: int = 0, repeats: int = REPEATS
) -> float:
    """The least time of several runs, after one that does not count.

    Args:
        others: bytes that are touched before each run. A step reads all other weights
            before it comes back to this one; measured without them, a weight lies in
            the CPU's cache, and the largest one looks as good as the smallest.
    """
    buffer = torch.zeros(others // 4)
    run()
    times = []
    for _ in range(repeats):
        buffer.add_(1)
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.inference_mode()
def measured(
    weight: Float[Tensor, "out in"],
    tokens: int,
    plugins: Mapping[str, Plugin],
    allowed: Sequence[str],
    clock: Clock = seconds,
) -> list[Tactic]:
    """Each allowed plugin on a weight of this shape.

    Raises:
        ValueError: one that is not in the table.
    """
    rows, columns = weight.shape
    x = torch.randn(1, tokens, columns, dtype=weight.dtype)
    found = []
    for name in allowed:
        plugin = known(name, plugins)
        packed = plugin.pack(weight)
        took = clock(lambda plugin=plugin, packed=packed: plugin.product(x, packed))
        found.append(Tactic(rows, columns, tokens, name, took))
    return found


def known(name: str, plugins: Mapping[str, Plugin]) -> Plugin:
    """The plugin of that name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name not in plugins:
        raise ValueError(
            f"the plugin {name!r} was not given: there are {', '.join(plugins)}"
        )
    return plugins[name]


def fastest(found: Sequence[Tactic]) -> str:
    """The name of the plugin that took the least time."""
    return min(found, key=lambda tactic: tactic.seconds).plugin
