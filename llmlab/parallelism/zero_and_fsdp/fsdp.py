"""ZeRO-3 and FSDP: the weights too are cut, and whole only while a block needs them.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5.3; Zhao et al.
2023, https://arxiv.org/abs/2304.11277. For each unit (a block; the root has the
embedding, the last norm and the head):

    before its forward     all-gather the pieces
    after its forward      free them
    before its backward    all-gather the pieces again
    after its backward     reduce-scatter the gradients; free weights and gradients

So a block's weights travel three times per microbatch: 3Ψ in all, against 2Ψ for stages
0–2. The root is needed at the end of forward and at the start of backward, so it stays
between the two (as in FSDP2), and is gathered once.

`layout="flat"` cuts a unit's parameters joined (ZeRO-3, FSDP1), `layout="rows"` each by
its dimension 0 (FSDP2's `fully_shard`). `overlap=True` lets the wire work while the
rank computes: it asks for the next unit's weights before this one computes, and waits
for a unit's reduce-scatter only when the next one is ready. It costs one more unit of
weights, and of gradients.

    N  ranks
    s  numbers in this rank's piece of a unit

A parameter stays the same object all the time. "Free" empties the storage of its whole
value, and so the copies that autograd has saved, which share it; "gather" fills the
storage again before backward looks. PyTorch's FSDP does the same. Simplified: the model
is whole on every rank before it is cut (the libraries can start from the `meta`
device).

Frozen parameters (a base under LoRA) are cut and gathered too, a message for each of
their dtypes (PyTorch sends one of bytes for all). They have no gradient and no
optimizer state. A unit with frozen parameters serves longer than its own gradients:
with LoRA on the last linear of a block, they come first, and the frozen weights must
still pass the error on. So such a block is freed when the gradient of its input is
there, and the root at the end of backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.zero_and_fsdp.layout import LAYOUTS
from llmlab.parallelism.zero_and_fsdp.offload import Host
from llmlab.parallelism.zero_and_fsdp.units import (
    Adam,
    Cut,
    Frozen,
    Unit,
    keep_unchanged,
    state_tensors,
    units_of,
    update,
)
from llmlab.parallelism.zero_and_fsdp.zero import Watch


class Shard:
    """A unit whose weights come and go."""

    def __init__(self, name: str, cuts: list[Cut], comm: Communicator) -> None:
        self.name, self.cuts, self.comm, self.whole = name, cuts, comm, True
        self.unit = next((cut for cut in cuts if isinstance(cut, Unit)), None)
        self.has_frozen = any(isinstance(cut, Frozen) for cut in cuts)
        self.handles: list = []  # of gathers on their way
        # (1, s) for each cut, in the model's dtype
        self.pieces = [cut.new_piece() for cut in cuts]
        self.parameters = [w for cut in cuts for w in cut.parameters]
        # storages of their own, that can be emptied
        self.full = [w.detach().clone() for w in self.parameters]
        self.sizes = [t.untyped_storage().nbytes() for t in self.full]
        self.free()

    def start(self) -> None:
        """Ask for the whole weights, unless they are here or on their way."""
        if not self.whole and not self.handles:
            for piece in self.pieces:
                self.handles.append(self.comm.all_gather(piece, async_op=True))

    def need(self) -> bool:
        """Have the whole weights; True if they had to be gathered."""
        if self.whole:
            return False
        self.start()
        for w, t, size in zip(self.parameters, self.full, self.sizes, strict=True):
            t.untyped_storage().resize_(size)
            w.data = t
        for cut, handle in zip(self.cuts, self.handles, strict=True):
            cut.write(handle.wait())
        self.handles, self.whole = [], True
        return True

    def free(self) -> None:
        """Keep the piece only.

        A parameter is an empty tensor then; autograd's saved copies share the emptied
        storage.
        """
        for w, t in zip(self.parameters, self.full, strict=True):
            w.data = t.new_empty(0)
            t.untyped_storage().resize_(0)
        self.whole = False

    def renew(self) -> None:
        """After a step: a new piece.

        Old weights that a forward without a backward has left are dropped.
        """
        for handle in self.handles:
            handle.wait()
        self.handles = []
        self.pieces = [cut.new_piece() for cut in self.cuts]
        self.free()


def cuts_of(
    name: str,
    parameters: list[nn.Parameter],
    comm: Communicator,
    layout: str,
    host: Host | None,
) -> list[Cut]:
    """What is gathered together: the parameters that train, and the frozen ones of each
    dtype.
    """
    cuts: list[Cut] = []
    trained = [w for w in parameters if w.requires_grad]
    if trained:
        cuts.append(Unit(name, trained, comm.size, comm.rank, layout, host))
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for w in parameters:
        if not w.requires_grad:
            by_dtype.setdefault(w.dtype, []).append(w)
    for frozen in by_dtype.values():
        cuts.append(Frozen(frozen, comm.size, comm.rank, layout))
    return cuts


class Fsdp:
    """Stage 3 around a model: `loss.backward()` as always, then `step()`.

    Args:
        model: the same on every rank. From here on its parameters are empty, except
            while they are used.
        layout: "rows" or "flat".
        overlap: gather one unit ahead, and reduce one behind.
        host: keep w, m, v in host memory and step there.
        watch: told (event, unit) when a unit is gathered, has run forward, has run
            backward, is reduced, is freed.
        blocks: the modules that become units; by default `model.model.layers`.
    Raises:
        ValueError: an unknown layout, or a block that trains in two dtypes; later:
            nothing trains, or something else than at the start.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        adam: Adam | None = None,
        *,
        layout: str = "rows",
        overlap: bool = True,
        host: Host | None = None,
        watch: Watch | None = None,
        blocks: Iterable[nn.Module] | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
        self.comm, self.adam, self.overlap, self.t = comm, adam or Adam(), overlap, 0
        self.watch = watch or (lambda event, unit: None)
        self.shards, modules = [], []
        for name, module, ws in units_of(model, blocks):
            cuts = cuts_of(name, ws, comm, layout, host)
            self.shards.append(Shard(name, cuts, comm))
            modules.append(module)
        keep_unchanged(model)
        self.units = [shard.unit for shard in self.shards if shard.unit]
        # the root, if it has parameters, comes after them
        self.blocks = sum(module is not model for module in modules)
        self.in_backward: set[int] = set()
        # those whose input needs a gradient, and those whose output needs none
        self.passes_on: set[int] = set()
        self.out_of_reach: set[int] = set()
        # (unit, its gradients, the handle of their reduce-scatter)
        self.reducing: tuple | None = None
        for i, module in enumerate(modules):
            self._hook(i, module)

    def _hook(self, i: int, module: nn.Module) -> None:
        """Before and after forward; `_after_forward` and `_arrived` see to backward."""
        module.register_forward_pre_hook(
            lambda _, args, kwargs: self._before_forward(i, (*args, *kwargs.values())),
            with_kwargs=True,
        )
        module.register_forward_hook(
            lambda _, __, output: self._after_forward(i, output)
        )
        if self.shards[i].unit:
            for w in self.shards[i].unit.parameters:
                w.register_post_accumulate_grad_hook(partial(self._arrived, i))

    def _before(self, i: int, way: int) -> None:
        """Before forward (way = 1) or backward (−1): have the weights, and ask for the
        next unit's.
        """
        if self.shards[i].need():
            self.watch("gather", self.shards[i].name)
        if way < 0:
            self.in_backward.add(i)
        after = self._next(i, way)
        if way < 0 and after in self.out_of_reach:
            return  # all is frozen from there down
        if self.overlap and after is not None:
            self.shards[after].start()

    def _next(self, i: int, way: int) -> int | None:
        """The unit that runs after i: the root comes first in forward, and first in
        backward.
        """
        if i == self.blocks:
            return (0 if way > 0 else i - 1) if i else None
        return i + way if 0 <= i + way < self.blocks else None

    def _before_forward(self, i: int, inputs: tuple) -> None:
        self._before(i, +1)
        if not (self.shards[i].has_frozen and torch.is_grad_enabled()):
            return
        tensors = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        if i == self.blocks or not tensors:
            self.passes_on.discard(i)
            return
        self.passes_on.add(i)
        register_multi_grad_hook(tensors, lambda _: self._leave(i))

    def _after_forward(self, i: int, output) -> None:
        self.watch("forward", self.shards[i].name)
        if i in self.in_backward:
            return  # activation recomputation: backward is about to use these weights
        output = output if isinstance(output, Tensor) else output[0]
        if output.requires_grad:
            # backward is about to enter the unit
            output.register_hook(lambda _: self._before_backward(i))
            self.out_of_reach.discard(i)
        elif torch.is_grad_enabled():
            self.out_of_reach.add(i)
        if i < self.blocks or not torch.is_grad_enabled():
            self._free(i)

    def _before_backward(self, i: int) -> None:
        if i == self.blocks and self.shards[i].has_frozen:
            # backward has no last gradient that would say that the root has served
            Variable._execution_engine.queue_callback(lambda: self._end(i))
        self._before(i, -1)

    def _arrived(self, i: int, _: Tensor) -> None:
        """A gradient is ready.

        With the unit's last one its weights have served, too, unless frozen ones have
        still to pass the error on.
        """
        unit = self.shards[i].unit
        if unit.all_here():
            self.watch("backward", unit.name)
            self._finish_reduce()
            gradients = unit.take_gradients()  # (N, s)
            self.reducing = (
                unit,
                gradients,
                self.comm.reduce_scatter(gradients, async_op=True),
            )
            is_root = i == self.blocks
            if not (self.shards[i].has_frozen and (is_root or i in self.passes_on)):
                self._leave(i)
            if not self.overlap or is_root:  # the root comes last in backward
                self._finish_reduce()

    def _end(self, root: int) -> None:
        """Backward is over."""
        self._leave(root)
        self._finish_reduce()

    def _leave(self, i: int) -> None:
        """Backward is done with a unit's weights."""
        self.in_backward.discard(i)
        if self.shards[i].whole:
            self._free(i)

    def _finish_reduce(self) -> None:
        if self.reducing is not None:
            unit, _, handle = self.reducing
            unit.add(handle.wait()[0])
            self.reducing = None
            self.watch("reduce", unit.name)

    def _free(self, i: int) -> None:
        self.shards[i].free()
        self.watch("free", self.shards[i].name)

    def step(self) -> float:
        """Clip and AdamW on the pieces; returns the gradient's norm.

        Nothing is gathered: the next forward will.
        """
        if not self.units:
            raise ValueError("the model has no parameter that trains: there is no step")
        self._finish_reduce()
        self.t += 1
        norm = update(self.units, self.comm, self.t, self.adam)
        for shard in self.shards:
            shard.renew()
        return norm

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole weights on every rank, to save or to compare them.

        All ranks must enter.
        """
        for shard in self.shards:
            shard.need()
        try:
            yield
        finally:
            for shard in self.shards:
                shard.free()

    def tensors(self) -> dict[str, list[Tensor]]:
        """What this rank holds, by kind.

        A gather under way counts as the weights that it brings, a reduce as what it
        sums.
        """
        weights = [w for shard in self.shards for w in shard.parameters]
        coming = [
            piece.new_empty(piece.numel() * self.comm.size)
            for shard in self.shards
            if shard.handles
            for piece in shard.pieces
        ]
        pieces = [piece for shard in self.shards for piece in shard.pieces]
        going = [self.reducing[1]] if self.reducing else []
        return {
            "weights": weights + pieces + coming,
            "gradients": [w.grad for w in weights] + going,
            **state_tensors(self.units),
        }
