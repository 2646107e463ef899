"""Data parallelism as PyTorch's DDP does it: every rank has all weights and its own
data, and gradients are averaged.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training", https://arxiv.org/abs/2006.15704.

    g = 1/p Σ_r g_r        the gradient that every rank's optimizer sees, the same on
                           all, so weights stay the same on all

What makes it fast, and what must be right
- Buckets (§3.2.2): gradients travel in a few large messages, in the reverse order of
  the parameters.
- Overlap (§3.2.3): a bucket leaves as soon as its last gradient has come, while
  backward goes on below.
- Accumulation (§3.2.4): `no_sync` keeps gradients at home; the last microbatch's
  backward sends the sum.
- All ranks send their buckets in one order, or they would wait for each other for ever.
  A parameter without a gradient sends zeros.
- The mean over ranks is the mean over tokens only if all have as many: multiply the
  loss *sum* by `token_share`.

    p  ranks      g_r  rank r's gradient      N  target tokens of all ranks and
                                                 microbatches      Ψ  parameters

Simplified: buckets are copies (DDP can let gradients be views of them); `finish()` is
called by hand (DDP queues a callback at the end of backward); a parameter without a
gradient is found in `finish()` (DDP walks the graph after forward, and so need not hold
back the buckets after it); buffers are broadcast once, not at each forward.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator

MIB = 2**20
# tokens (B, T) and targets (B, T); target −100 is not counted
Microbatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DDPConfig:
    """`bucket_bytes` and `first_bucket_bytes`: PyTorch's defaults. The first is small,
    so that the wire starts early.

    `find_unused`: parameters may go without a gradient. `overlap`: buckets leave during
        backward, not after it.
    """

    bucket_bytes: int = 25 * MIB
    first_bucket_bytes: int = 1 * MIB
    find_unused: bool = False
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("bucket_bytes", "first_bucket_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def plan_buckets(
    nbytes: Sequence[int],
    limit: int,
    first: int | None = None,
    kinds: Sequence[Hashable] | None = None,
    order: Sequence[int] | None = None,
) -> list[list[int]]:
    """The numbers of the parameters, bucket by bucket: a bucket is closed as soon as it
    holds `limit` bytes or more.

    Args:
        nbytes: bytes of each parameter.
        first: the limit of the first bucket (None: the same).
        kinds: one bucket holds one kind only, as (dtype, device).
        order: in which gradients are expected; by default the last parameter first.
    """
    order = range(len(nbytes) - 1, -1, -1) if order is None else order
    if sorted(order) != list(range(len(nbytes))):
        raise ValueError(
            f"order={list(order)} must name each of the {len(nbytes)} parameters once"
        )
    plan, filling, limits = [], {}, {}
    for i in order:
        kind = kinds[i] if kinds else None
        filling.setdefault(kind, []).append(i)
        if sum(nbytes[j] for j in filling[kind]) >= limits.setdefault(
            kind, limit if first is None else first
        ):
            plan.append(filling.pop(kind))
            limits[kind] = limit
    return plan + list(filling.values())


class DataParallel(nn.Module):
    """A module whose gradients become the mean over all ranks: `loss.backward()`, then
    `finish()`, then the optimizer.

    Args:
        module: the same on every rank in its shapes; rank 0's values are sent to all.
        order: in which gradients are expected (`arrived` of an earlier run); by default
            the last parameter first.

    Attributes:
        plan: the buckets, as numbers of `weights`.
        arrived: the order in which the gradients of the last synchronized backward
            came.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        config: DDPConfig | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.module, self.comm, self.config = module, comm, config or DDPConfig()
        # a tied weight is named once
        named = [(n, w) for n, w in module.named_parameters() if w.requires_grad]
        self.names, self.weights = [n for n, _ in named], [w for _, w in named]
        kinds = [(w.dtype, w.device) for w in self.weights]
        sizes = [w.numel() * w.element_size() for w in self.weights]
        self.plan = plan_buckets(
            sizes,
            self.config.bucket_bytes,
            self.config.first_bucket_bytes,
            kinds,
            order,
        )
        self._bucket_of = {i: b for b, bucket in enumerate(self.plan) for i in bucket}
        broadcast_state(module, comm)
        self._hooks = [
            w.register_post_accumulate_grad_hook(partial(self._arrive, i))
            for i, w in enumerate(self.weights)
        ]
        self._sync, self.arrived = True, []
        self._reset()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add to `.grad` and send nothing."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def finish(self) -> None:
        """Wait for the buckets and put the means into `.grad`. All ranks must call it,
        after the last microbatch's backward.

        Raises:
            RuntimeError: a parameter got no gradient, and `find_unused` is off.
        """
        silent = [name for i, name in enumerate(self.names) if i not in self._here]
        if silent and not self.config.find_unused:
            raise RuntimeError(
                "no gradient came for"
                f" {', '.join(silent[:3])}{' …' if len(silent) > 3 else ''} in the last"
                " backward: use DDPConfig(find_unused=True), or let every parameter"
                " take part in the loss"
            )
        used = [w.grad is not None for w in self.weights]
        while len(self._under_way) < len(self.plan):
            self._launch()
        # one that no rank used keeps its None: Adam must not count a step for it
        if self.config.find_unused:
            used = self.comm.all_reduce(
                torch.tensor(used, dtype=torch.int32, device=self.comm.device), "max"
            ).tolist()
        for bucket, handle in zip(self.plan, self._under_way, strict=True):
            means = handle.wait().split([self.weights[i].numel() for i in bucket])
            for i, mean in zip(bucket, means, strict=True):
                self.weights[i].grad = (
                    mean.view_as(self.weights[i]) if used[i] else None
                )
        self._reset()

    def remove(self) -> None:
        """Take the hooks off; the module is a plain one again."""
        for hook in self._hooks:
            hook.remove()

    def _reset(self) -> None:
        self._here, self._under_way = set(), []
        self._missing = [len(bucket) for bucket in self.plan]

    def _arrive(self, i: int, weight: Tensor) -> None:
        """Autograd has just added to the gradient of parameter i."""
        if not self._sync:
            return
        if i in self._here:
            raise RuntimeError(
                f"{self.names[i]} got a second gradient: call finish(), or use"
                " no_sync() for all but the last"
            )
        self.arrived = [*self.arrived, i] if self._here else [i]
        self._here.add(i)
        self._missing[self._bucket_of[i]] -= 1
        while self.config.overlap and self._next_is_full():
            self._launch()

    def _next_is_full(self) -> bool:
        following = len(self._under_way)
        return following < len(self.plan) and self._missing[following] == 0

    def _launch(self) -> None:
        """Send the next bucket of the plan, never another: the order is the same on
        every rank.
        """
        bucket = [self.weights[i] for i in self.plan[len(self._under_way)]]
        flat = torch.cat(
            [
                (torch.zeros_like(w) if w.grad is None else w.grad).flatten()
                for w in bucket
            ]
        )
        self._under_way.append(self.comm.all_reduce(flat, "mean", async_op=True))


@torch.no_grad()
def broadcast_state(
    module: nn.Module, comm: Communicator, src: int = 0, limit: int = 250 * MIB
) -> None:
    """Parameters and buffers of rank `src` on every rank, in a few large messages."""
    state = [*module.parameters(), *module.buffers()]
    sizes, kinds = (
        [t.numel() * t.element_size() for t in state],
        [(t.dtype, t.device) for t in state],
    )
    for bucket in plan_buckets(sizes, limit, kinds=kinds):
        flat = comm.broadcast(torch.cat([state[i].flatten() for i in bucket]), src)
        for i, values in zip(
            bucket, flat.split([state[i].numel() for i in bucket]), strict=True
        ):
            state[i].copy_(values.view_as(state[i]))


def token_share(tokens: int, comm: Communicator) -> float:
    """p / N: what to multiply a *sum* of token losses by, so that the mean over ranks
    of its gradient is the mean over tokens.

    Args:
        tokens: target tokens of this rank, of all its microbatches.
    Raises:
        ValueError: no rank has any.
    """
    N = comm.all_reduce(torch.tensor(tokens, device=comm.device)).item()
    if not N:
        raise ValueError(
            f"tokens={tokens} on every rank: there is nothing to learn from"
        )
    return comm.size / N


def train_step(
    model: DataParallel,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Microbatch],
    max_norm: float | None = None,
) -> float:
    """One optimizer step on all ranks' microbatches; returns the mean loss a token over
    all of them.

    Gradients travel in the last microbatch's backward only. The norm is clipped after
    they have: then it is the norm of the whole batch's gradient, the same on every
    rank.
    """
    comm = model.comm
    share = token_share(sum(int((y != -100).sum()) for _, y in microbatches), comm)
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    for k, (x, y) in enumerate(microbatches):
        with nullcontext() if k == len(microbatches) - 1 else model.no_sync():
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
            (loss * share).backward()
        total += loss.detach()
    model.finish()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.weights, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return comm.all_reduce(total * share / comm.size).item()
