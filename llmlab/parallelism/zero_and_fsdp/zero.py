"""ZeRO stages 1 and 2: data parallelism without copies of the optimizer's state.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5. Adam works on each
element alone, so it does not matter which rank updates an element, as long as one does.
Rank r owns piece r of every unit (a block's parameters, joined and cut into N pieces):

    stage   bytes per parameter   what happens
    0       2 + 2 + 12            plain data parallelism: all-reduce the gradients,
                                  every rank updates everything
    1       2 + 2 + 12/N          at the step: reduce-scatter the gradients, update the
                                  own piece, all-gather the weights
    2       2 + 2/N + 12/N        the reduce-scatter comes during backward, as soon as
                                  a unit's gradients are there; they are freed then

    Ψ  parameters
    N  ranks

The bytes are 16-bit weights, 16-bit gradients, and master weights, momentum and
variance in fp32.

Gradients are summed, not averaged: divide each microbatch's summed loss by the tokens
of all ranks and microbatches, as `train_step` does, and unequal numbers of tokens are
right. Parameters keep the model's dtype. Frozen ones (of a base under LoRA, say) have
no optimizer state and no gradient, and stay whole on every rank. Simplified: one weight
decay for all; no loss scaling, which fp16 would need. DeepSpeed joins all parameters
before it cuts; we cut each unit, as FSDP does, so that one reduce-scatter finishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.zero_and_fsdp.offload import Host
from llmlab.parallelism.zero_and_fsdp.units import (
    Adam,
    Unit,
    keep_unchanged,
    state_tensors,
    units_of,
    update,
)

# (event, unit): "gather", "forward", "backward", "reduce", "free"
Watch = Callable[[str, str], None]


class Zero:
    """Stages 0, 1 and 2 around a model: `loss.backward()` as always, then `step()`.

    Args:
        model: the same on every rank; its parameters stay whole.
        host: keep w, m, v in host memory and step there (ZeRO-Offload); None: on the
            model's device.
        watch: told ("reduce", unit) after each reduction.
        blocks: the modules that become units; by default `model.model.layers`.
    Raises:
        ValueError: a stage other than 0, 1, 2 (stage 3 is
            `llmlab.parallelism.zero_and_fsdp.fsdp.Fsdp`), or a block that trains in two
            dtypes; later: nothing trains, or something else than at the start.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        adam: Adam | None = None,
        *,
        stage: int = 2,
        host: Host | None = None,
        watch: Watch | None = None,
        blocks: Iterable[nn.Module] | None = None,
    ) -> None:
        if stage not in (0, 1, 2):
            raise ValueError(
                f"stage={stage!r} must be 0, 1 or 2; stage 3 is"
                " llmlab.parallelism.zero_and_fsdp.fsdp.Fsdp"
            )
        self.comm, self.adam, self.stage, self.t = comm, adam or Adam(), stage, 0
        self.watch = watch or (lambda event, unit: None)
        # stage 0: one piece, everybody's
        p, rank = (comm.size, comm.rank) if stage else (1, 0)
        self.model = model
        keep_unchanged(model)
        self.units = []
        for name, _, ws in units_of(model, blocks):
            trained = [w for w in ws if w.requires_grad]
            if trained:
                self.units.append(Unit(name, trained, p, rank, "flat", host))
        if not self.units:
            raise ValueError("the model has no parameter that trains")
        for unit in self.units if stage == 2 else ():
            for w in unit.parameters:
                w.register_post_accumulate_grad_hook(partial(self._arrived, unit))

    def _arrived(self, unit: Unit, _: Tensor) -> None:
        if unit.all_here():
            self._reduce(unit)

    def _reduce(self, unit: Unit) -> None:
        reduce = self.comm.reduce_scatter if self.stage else self.comm.all_reduce
        unit.add(reduce(unit.take_gradients())[0])
        self.watch("reduce", unit.name)

    def step(self) -> float:
        """Clip, AdamW, whole weights again; returns the gradient's norm.

        Stages 0 and 1 reduce here, once.
        """
        for unit in self.units if self.stage < 2 else ():
            self._reduce(unit)
        self.t += 1
        norm = update(self.units, self.comm if self.stage else None, self.t, self.adam)
        for unit in self.units:
            piece = unit.new_piece()
            unit.write(self.comm.all_gather(piece) if self.stage else piece)
        return norm

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole weights on every rank: in these stages they always are."""
        yield

    def tensors(self) -> dict[str, list[Tensor]]:
        """What this rank holds, by kind."""
        weights = list(self.model.parameters())
        return {
            "weights": weights,
            "gradients": [w.grad for w in weights],
            **state_tensors(self.units),
        }


def summed_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy summed over the targets that are not −100, in fp32 at least."""
    logits = model(x)
    logits = getattr(logits, "logits", logits).flatten(0, 1)  # (B·T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, y.flatten(), ignore_index=-100, reduction="sum")


def train_step(
    engine,
    model: nn.Module,
    comm: Communicator,
    batches: Sequence[tuple[Tensor, Tensor]],
) -> tuple[float, float]:
    """One optimizer step over this rank's microbatches of (tokens, targets).

    Target −100 is not counted.

    Returns:
        The mean loss a token over all ranks and microbatches, and the gradient's norm:
        both the same on every rank.
    Raises:
        ValueError: no rank has a target that counts.
    """
    mine = torch.tensor(
        sum((y != -100).sum().item() for _, y in batches), device=comm.device
    )
    total, losses = comm.all_reduce(mine).item(), []
    if not total:
        raise ValueError(
            "batches have no target but −100, on every rank: there is nothing to learn"
            " from"
        )
    for x, y in batches:
        loss = summed_loss(model, x, y) / total
        loss.backward()
        losses.append(loss.detach())
    norm = engine.step()
    return comm.all_reduce(torch.stack(losses).sum()).item(), norm
