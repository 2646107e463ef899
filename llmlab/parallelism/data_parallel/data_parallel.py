"""Data parallelism as PyTorch's DDP does it: all weights on every rank, averaged grads.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training", https://arxiv.org/abs/2006.15704.

    g = 1/p Σ_r g_r        the gradient that every rank's optimizer sees, the same on
                           all, so weights stay the same on all

What makes it fast, and what must be right
- Buckets (§3.2.2): gradients travel in a few large messages, in the reverse order of
  the parameters.
- Overlap (§3.2.3): a bucket is sent as soon as its last gradient is there, while
  backward goes on in the layers below.
- Accumulation (§3.2.4): under `no_sync` gradients are added up locally; the last
  microbatch's backward sends the sum.
- All ranks send their buckets in the same order. Otherwise they would wait for each
  other for ever. A parameter without a gradient sends zeros.
- The mean over ranks is the mean over tokens only if all have as many: multiply the
  loss *sum* by `token_share`.

    p    ranks
    g_r  rank r's gradient
    N    target tokens of all ranks and microbatches
    Ψ    parameters

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
    """How gradients are put into buckets. The sizes are PyTorch's defaults."""

    bucket_bytes: int = 25 * MIB
    first_bucket_bytes: int = 1 * MIB  # small, so that sending starts early
    find_unused: bool = False  # parameters may go without a gradient
    overlap: bool = True  # buckets are sent during backward, not after it

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
    """The numbers of the parameters, bucket by bucket.

    A bucket is closed as soon as it holds `limit` bytes or more.

    Args:
        nbytes: bytes of each parameter.
        first: the limit of the first bucket (None: the same).
        kinds: one bucket holds one kind only, as (dtype, device).
        order: in which gradients are expected; by default the last parameter first.
    """
    if order is None:
        order = range(len(nbytes) - 1, -1, -1)
    if first is None:
        first = limit
    if sorted(order) != list(range(len(nbytes))):
        raise ValueError(
            f"order={list(order)} must name each of the {len(nbytes)} parameters once"
        )
    plan = []
    open_buckets: dict[Hashable, list[int]] = {}  # one per kind
    limits: dict[Hashable, int] = {}
    for i in order:
        kind = kinds[i] if kinds else None
        bucket = open_buckets.setdefault(kind, [])
        bucket.append(i)
        if sum(nbytes[j] for j in bucket) >= limits.get(kind, first):
            plan.append(open_buckets.pop(kind))
            limits[kind] = limit  # from the second bucket on
    return plan + list(open_buckets.values())


class DataParallel(nn.Module):
    """A module whose gradients become the mean over all ranks.

    A step is `loss.backward()`, then `finish()`, then the optimizer's step.

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
        self.module = module
        self.comm = comm
        self.config = config or DDPConfig()
        self.names: list[str] = []
        self.weights: list[nn.Parameter] = []
        for name, weight in module.named_parameters():  # a tied weight comes once
            if weight.requires_grad:
                self.names.append(name)
                self.weights.append(weight)
        kinds = [(w.dtype, w.device) for w in self.weights]
        sizes = [w.numel() * w.element_size() for w in self.weights]
        self.plan = plan_buckets(
            sizes,
            self.config.bucket_bytes,
            self.config.first_bucket_bytes,
            kinds,
            order,
        )
        self._bucket_of: dict[int, int] = {}
        for number, bucket in enumerate(self.plan):
            for i in bucket:
                self._bucket_of[i] = number
        broadcast_state(module, comm)
        self._hooks = [
            w.register_post_accumulate_grad_hook(partial(self.gradient_arrived, i))
            for i, w in enumerate(self.weights)
        ]
        self._sync = True
        self.arrived: list[int] = []
        self._reset()

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled():
            self._check_unchanged()
        return self.module(*args, **kwargs)

    def _check_unchanged(self) -> None:
        """Raises: ValueError: what trains is not what did when the buckets were made:
        some gradients would stay this rank's own.
        """
        named = self.module.named_parameters()
        now = {name: id(w) for name, w in named if w.requires_grad}
        before = dict(zip(self.names, map(id, self.weights), strict=True))
        changed = sorted(dict(now.items() ^ before.items()))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{', '.join(changed[:3])}{more} came, went, was frozen or set free"
                " after DataParallel was made: put adapters on, and freeze, before it"
            )

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add to `.grad` and send nothing."""
        before = self._sync
        self._sync = False
        try:
            yield
        finally:
            self._sync = before

    def finish(self) -> None:
        """Wait for the buckets and put the means into `.grad`.

        All ranks must call it, after the last microbatch's backward.

        Raises:
            RuntimeError: a parameter got no gradient, and `find_unused` is off.
        """
        silent = [n for i, n in enumerate(self.names) if i not in self._ready]
        if silent and not self.config.find_unused:
            more = " …" if len(silent) > 3 else ""
            raise RuntimeError(
                f"no gradient came for {', '.join(silent[:3])}{more} in the last"
                " backward: use DDPConfig(find_unused=True), or let every parameter"
                " take part in the loss"
            )
        used = [w.grad is not None for w in self.weights]
        while len(self._in_flight) < len(self.plan):
            self.send_next()
        if self.config.find_unused:
            # A parameter that no rank used keeps its None: Adam must not count a step.
            flags = torch.tensor(used, dtype=torch.int32, device=self.comm.device)
            used = self.comm.all_reduce(flags, "max").tolist()
        for bucket, handle in zip(self.plan, self._in_flight, strict=True):
            means = handle.wait().split([self.weights[i].numel() for i in bucket])
            for i, mean in zip(bucket, means, strict=True):
                weight = self.weights[i]
                weight.grad = mean.view_as(weight) if used[i] else None
        self._reset()

    def remove(self) -> None:
        """Take the hooks off; the module is a plain one again."""
        for hook in self._hooks:
            hook.remove()

    def _reset(self) -> None:
        self._ready: set[int] = set()  # parameters whose gradient is there
        self._in_flight: list = []  # one handle per bucket that was sent
        self._missing = [len(bucket) for bucket in self.plan]  # gradients per bucket

    def gradient_arrived(self, i: int, weight: Tensor) -> None:
        """Autograd has just added to the gradient of parameter i."""
        if not self._sync:
            return
        if i in self._ready:
            raise RuntimeError(
                f"{self.names[i]} got a second gradient: call finish(), or use"
                " no_sync() for all but the last"
            )
        if not self._ready:  # the first gradient of a new backward pass
            self.arrived = []
        self.arrived.append(i)
        self._ready.add(i)
        self._missing[self._bucket_of[i]] -= 1
        if self.config.overlap:
            while self.next_is_full():
                self.send_next()

    def next_is_full(self) -> bool:
        """Whether all gradients of the next bucket in the plan are there."""
        following = len(self._in_flight)
        return following < len(self.plan) and self._missing[following] == 0

    def send_next(self) -> None:
        """Send the next bucket of the plan.

        It is never another one that is full already: the order must be the same on
        every rank.
        """
        gradients = []
        for i in self.plan[len(self._in_flight)]:
            weight = self.weights[i]
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(grad.flatten())
        flat = torch.cat(gradients)
        self._in_flight.append(self.comm.all_reduce(flat, "mean", async_op=True))


@torch.no_grad()
def broadcast_state(
    module: nn.Module, comm: Communicator, src: int = 0, limit: int = 250 * MIB
) -> None:
    """Parameters and buffers of rank `src` on every rank, in a few large messages."""
    state = [*module.parameters(), *module.buffers()]
    sizes = [t.numel() * t.element_size() for t in state]
    kinds = [(t.dtype, t.device) for t in state]
    for bucket in plan_buckets(sizes, limit, kinds=kinds):
        flat = comm.broadcast(torch.cat([state[i].flatten() for i in bucket]), src)
        pieces = flat.split([state[i].numel() for i in bucket])
        for i, values in zip(bucket, pieces, strict=True):
            state[i].copy_(values.view_as(state[i]))


def token_share(tokens: int, comm: Communicator) -> float:
    """p / N, the factor for a *sum* of token losses.

    With it the mean over ranks of the gradient is the mean over tokens.

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
    """One optimizer step on all ranks' microbatches; returns the mean loss per token.

    Gradients travel in the last microbatch's backward only. The norm is clipped after
    that: then it is the norm of the whole batch's gradient, the same on every rank.
    """
    comm = model.comm
    share = token_share(sum(int((y != -100).sum()) for _, y in microbatches), comm)
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    for k, (x, y) in enumerate(microbatches):
        is_last = k == len(microbatches) - 1
        with nullcontext() if is_last else model.no_sync():
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
            (loss * share).backward()
        total += loss.detach()
    model.finish()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.weights, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return comm.all_reduce(total * share / comm.size).item()
