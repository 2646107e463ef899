"""Pipeline parallelism: run any schedule on a Llama whose layers lie on several ranks.

    pipe = Pipeline(split(model, comm.rank, comm.size), comm)
    loss = pipe.step(one_f_one_b(comm.size, m), [(tokens, targets), …])  m microbatches
    clip_grad_norm(pipe, 1.0)
    optimizer.step()                                              over pipe.parameters()

    F  receives h from the stage before, keeps the graph of its layers, sends its own h
    I  receives ∂h from the stage after, runs backward through that graph, sends ∂h
    W  computes the weight gradients that I has left (see `backward`)
    B  is I, then W, then the sending

    h   hidden states (B, T, d)         p   ranks            i   a microbatch
    dh  their gradient (B, T, d)        v   chunks per rank  s   a stage, 0 … p·v − 1
                                        m   microbatches

The schedule alone decides the order. Gradients, and so the trained weights, are those
of one process for every schedule (Huang et al. 2018, arXiv:1811.06965: synchronous, no
stale weights). All receives are posted when a step begins, and each message has its own
tag, so nothing depends on the order in which messages arrive.

In the "bidirectional" layout (`dualpipe`) two ranks have each stage. Microbatches of
the second half go from rank p − 1 to rank 0, and the gradients of both copies of a
stage are added up when the step ends.

Simplified: no dropout, no padding mask; gradients that were sent, (B, T, d) each, are
kept until the step ends; gloo or `World` only (NCCL has no tags, and wants sends and
receives paired in one call, as torch's executor does).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.parallelism.pipeline import backward
from llmlab.parallelism.pipeline.memory import ActivationMeter
from llmlab.parallelism.pipeline.schedules import (
    BIDIRECTIONAL,
    Kind,
    Op,
    Schedule,
    check,
    chunks,
    stage_count,
    stage_of,
)
from llmlab.parallelism.pipeline.stages import Stage
from llmlab.parallelism.pipeline.timeline import Bar
from llmlab.parallelism.runtime import Communicator

Microbatch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]
IGNORED = -100
# These take the gradient of the stage after, and give one to the stage before.
GRADIENT_KINDS = (Kind.INPUT_GRAD, Kind.BACKWARD)


class Pipeline:
    """One rank's stages, and the wire to the ranks of the stages before and after.

    Args:
        stages: this rank's chunks, from `stages.split`.
        layout: as given to `split`.
        after_op: called as `after_op(kind, microbatch, chunk)` when an op has been
            computed, before its result is sent. `comm.work` or `time.sleep` here make
            compute take as long as one likes.
        meter: counts the bytes that forwards keep.
    Attributes:
        bars: when this rank computed each op of the last step, in seconds of
            `time.perf_counter`.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        comm: Communicator,
        *,
        layout: str = "loop",
        after_op: Callable[[str, int, int], None] | None = None,
        meter: ActivationMeter | None = None,
    ) -> None:
        self.stages = nn.ModuleList(stages)
        self.comm = comm
        self.layout = layout
        self.after_op = after_op
        self.meter = meter
        self.bars: list[Bar] = []

        self.p = comm.size
        self.v = len(stages)
        self.is_bidirectional = layout == BIDIRECTIONAL
        self.stage_count = stage_count(self.p, self.v, layout)
        # (stage, direction) → rank; one direction, 0, but in the bidirectional layout
        self.rank_of: dict[tuple[int, int], int] = {}
        for rank in range(self.p):
            for chunk in range(self.v):
                stage = stage_of(rank, chunk, self.p, layout)
                self.rank_of[stage, self.direction(chunk)] = rank

        # With tied embeddings the first stage and the last both need the one matrix.
        first_rank = self.rank_of[0, 0]
        last_rank = self.rank_of[self.stage_count - 1, 0]
        is_tied = stages[0].config.tie_word_embeddings
        self.has_tied_copies = is_tied and first_rank != last_rank
        # The ranks that have copies of the same weights.
        self.copies_group = None
        if self.is_bidirectional:
            # Every rank makes these calls. Ranks outside a group get None.
            for rank in range(self.p // 2):
                group = comm.group((rank, self.p - 1 - rank))
                self.copies_group = group or self.copies_group
        elif self.has_tied_copies:
            self.copies_group = comm.group((first_rank, last_rank))

        hold = None if meter is None else meter.hold
        self.weight_gradients = [backward.make_late(stage, hold) for stage in stages]

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, each once."""
        return self.stages.parameters()

    def direction(self, chunk: int) -> int:
        """1 for a chunk whose microbatches go from the last rank to the first."""
        return chunk if self.is_bidirectional else 0

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of the whole model's state, with the whole model's names."""
        state: dict[str, Tensor] = {}
        for stage in self.stages:
            state.update(stage.state_dict())
        return state

    def tied_weight(self) -> nn.Parameter | None:
        """This rank's copy of the tied matrix (V, d), where two ranks have one."""
        if not self.has_tied_copies:
            return None
        for stage in self.stages:
            if stage.is_first:
                return stage.model.embed_tokens.weight
            if stage.is_last:
                return stage.lm_head.weight
        return None

    def copied_weights(self) -> list[nn.Parameter]:
        """The weights that another rank has, too, in an order that both share."""
        if self.is_bidirectional:
            named: dict[str, nn.Parameter] = {}
            for stage in self.stages:
                named.update(stage.named_parameters())
            # a tied matrix has two names on one rank
            return list(dict.fromkeys(named[name] for name in sorted(named)))
        tied_weight = self.tied_weight()
        return [] if tied_weight is None else [tied_weight]

    def counted_weights(self) -> Iterator[nn.Parameter]:
        """This rank's parameters without those that another rank counts as its own."""
        stages = list(self.stages)
        if self.is_bidirectional:
            stages = stages[:1]  # the other chunk is another rank's first
        done: set[nn.Parameter] = set()
        if self.has_tied_copies and stages[-1].is_last:
            done.add(stages[-1].lm_head.weight)  # the first stage counts the matrix
        for stage in stages:
            for weight in stage.parameters():
                if weight not in done:
                    done.add(weight)
                    yield weight

    def step(
        self,
        schedule: Schedule,
        microbatches: Sequence[Microbatch],
        weighting: str = "microbatch",
    ) -> float:
        """Add the loss's gradients to `.grad`; return the loss, on every rank.

        Takes no optimizer step.

        Args:
            schedule: for these p ranks, v chunks and m microbatches.
            microbatches: (tokens, targets) of each; shapes may differ. Targets of −100
                do not count. All ranks are given all, though only the first stage reads
                tokens and only the last reads targets.
            weighting: "microbatch": the mean over microbatches of each one's mean over
                tokens; "token": the mean over all tokens. They differ when microbatches
                have different numbers of tokens.
        Raises:
            ValueError: the schedule is not complete, or not for p ranks with v chunks.
        """
        if len(schedule) != self.p or chunks(schedule) != self.v:
            raise ValueError(
                f"schedule is for {len(schedule)} ranks of {chunks(schedule)} chunks,"
                f" the pipeline has {self.p} of {self.v}"
            )
        check(schedule, len(microbatches), self.layout)
        shares = loss_shares([targets for _, targets in microbatches], weighting)

        # This step's gradients of copied weights are collected alone. What `.grad` held
        # before is already the sum of both copies: to add it up again would count it
        # twice.
        copied_weights = self.copied_weights()
        earlier_grads = [weight.grad for weight in copied_weights]
        for weight in copied_weights:
            weight.grad = None

        ops = schedule[self.comm.rank]
        run = PipelineStep(self, microbatches, shares)
        run.post_receives(ops)
        for op in ops:
            run.execute(op)
        run.wait_for_sends()

        for weight, earlier_grad in zip(copied_weights, earlier_grads, strict=True):
            if weight.grad is None:
                continue
            weight.grad = self.copies_group.all_reduce(weight.grad)
            if earlier_grad is not None:
                weight.grad = weight.grad + earlier_grad
        if self.is_bidirectional:  # the first rank and the last have half of it each
            return self.comm.all_reduce(run.loss).item()
        last_rank = self.rank_of[self.stage_count - 1, 0]
        return self.comm.broadcast(run.loss, last_rank).item()


def loss_shares(
    targets: Sequence[Int[Tensor, "B T"]], weighting: str = "microbatch"
) -> list[float]:
    """The factor of each microbatch's sum of token losses.

    With n_i tokens that count in microbatch i: 1/(m n_i), or 1/Σ n_i for "token".

    Raises:
        ValueError: `weighting` is neither.
    """
    counts = [int((y != IGNORED).sum()) for y in targets]
    if weighting == "token":
        return [1 / max(sum(counts), 1)] * len(counts)
    if weighting == "microbatch":
        return [1 / (len(counts) * max(n, 1)) for n in counts]
    raise ValueError(f"weighting={weighting!r} must be 'microbatch' or 'token'")


@torch.no_grad()
def clip_grad_norm(pipe: Pipeline, limit: float) -> float:
    """Scale all ranks' gradients to a common norm of at most `limit`.

    Returns the norm before. A weight counts once though two ranks have it. As
    `torch.nn.utils.clip_grad_norm_` on the whole model.
    """
    # Copies are scaled, but counted on one rank only.
    square_sum = torch.zeros((), device=pipe.comm.device)
    for weight in pipe.counted_weights():
        if weight.grad is not None:
            square_sum = square_sum + weight.grad.float().square().sum()

    norm = pipe.comm.all_reduce(square_sum).sqrt().item()
    scale = min(1.0, limit / (norm + 1e-6))
    for weight in pipe.parameters():
        if weight.grad is not None:
            weight.grad.mul_(scale)
    return norm


class Carries(Enum):
    """What a message between two stages carries."""

    HIDDEN = 0
    GRADIENT = 1


class Message(NamedTuple):
    """One message of a step: what it carries, its microbatch, and who receives it."""

    carries: Carries
    microbatch: int
    to_stage: int
    direction: int = 0


class PipelineStep:
    """What one rank holds during one step.

    stash                  (x, y) of each F whose I has not come: y has the graph
    pending_weight_grads   what each I has left for its W
    inbox                  handles of receives, and tensors that stay on this rank
    in_flight              handles of sends
    """

    def __init__(
        self,
        pipe: Pipeline,
        microbatches: Sequence[Microbatch],
        shares: Sequence[float],
    ) -> None:
        self.pipe = pipe
        self.microbatches = microbatches
        self.shares = shares
        self.stash: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.pending_weight_grads: dict[tuple[int, int], tuple] = {}
        self.inbox: dict[Message, object] = {}
        self.in_flight: dict[Message, object] = {}
        self.loss = torch.zeros((), device=pipe.comm.device)
        pipe.bars = []

    def stage(self, chunk: int) -> int:
        """The stage that this rank's `chunk` is."""
        return stage_of(self.pipe.comm.rank, chunk, self.pipe.p, self.pipe.layout)

    def input_of(self, op: Op) -> Message | None:
        """The message that an op waits for, if it waits for one."""
        kind, i, chunk = op
        s = self.stage(chunk)
        direction = self.pipe.direction(chunk)
        if kind == Kind.FORWARD and s > 0:
            return Message(Carries.HIDDEN, i, s, direction)
        if kind in GRADIENT_KINDS and s < self.pipe.stage_count - 1:
            return Message(Carries.GRADIENT, i, s, direction)
        return None

    def output_of(self, op: Op) -> Message | None:
        """The message that an op's result becomes, if another stage needs it."""
        kind, i, chunk = op
        s = self.stage(chunk)
        direction = self.pipe.direction(chunk)
        if kind == Kind.FORWARD and s < self.pipe.stage_count - 1:
            return Message(Carries.HIDDEN, i, s + 1, direction)
        if kind in GRADIENT_KINDS and s > 0:
            return Message(Carries.GRADIENT, i, s - 1, direction)
        return None

    def source(self, message: Message) -> int:
        """The rank that sends a message."""
        if message.carries is Carries.HIDDEN:
            return self.pipe.rank_of[message.to_stage - 1, message.direction]
        return self.pipe.rank_of[message.to_stage + 1, message.direction]

    def tag(self, message: Message) -> int:
        """A number of its own for each message of the step."""
        row = message.carries.value * self.pipe.stage_count + message.to_stage
        return row * len(self.microbatches) + message.microbatch

    def post_receives(self, ops: Sequence[Op]) -> None:
        """Ask for every message of the step that comes from another rank."""
        for op in ops:
            message = self.input_of(op)
            if message is None:
                continue
            source = self.source(message)
            if source != self.pipe.comm.rank:
                self.inbox[message] = self.pipe.comm.irecv(source, self.tag(message))

    def execute(self, op: Op) -> None:
        """Wait for an op's input, compute, send its output."""
        kind, i, chunk = op
        received = self.receive(self.input_of(op))
        if kind in GRADIENT_KINDS:
            self.free_sent_hidden(i, chunk)

        start = time.perf_counter()
        result = self.compute[kind](self, i, chunk, received)
        if self.pipe.after_op is not None:
            self.pipe.after_op(kind, i, chunk)
        end = time.perf_counter()
        self.pipe.bars.append(Bar(self.pipe.comm.rank, kind, i, chunk, start, end))

        message = self.output_of(op)
        if message is not None:
            self.send(message, result)

    def receive(self, message: Message | None) -> Tensor | None:
        """A message's tensor, (B, T, d), once it has arrived."""
        if message is None:
            return None
        item = self.inbox.pop(message)
        if isinstance(item, Tensor):  # its sender is a stage of this rank
            return item
        return item.wait()

    def free_sent_hidden(self, i: int, chunk: int) -> None:
        """Free the h that the next stage was sent.

        Its gradient is here, so h has certainly arrived, and the wait ends at once.
        """
        next_stage = self.stage(chunk) + 1
        direction = self.pipe.direction(chunk)
        message = Message(Carries.HIDDEN, i, next_stage, direction)
        handle = self.in_flight.pop(message, None)
        if handle is not None:
            handle.wait()

    def send(self, message: Message, x: Float[Tensor, "B T d"]) -> None:
        """Send x to the rank of the message's stage, which may be this one."""
        target = self.pipe.rank_of[message.to_stage, message.direction]
        if target == self.pipe.comm.rank:
            self.inbox[message] = x
        else:
            self.in_flight[message] = self.pipe.comm.isend(x, target, self.tag(message))

    def wait_for_sends(self) -> None:
        """Wait until all that was sent has arrived."""
        for handle in self.in_flight.values():
            handle.wait()

    def forward(self, i: int, chunk: int, h: Float[Tensor, "B T d"] | None) -> Tensor:
        """F: the chunk's layers, and the loss on the last stage. Keeps the graph."""
        stage = self.pipe.stages[chunk]
        tokens, targets = self.microbatches[i]
        # A leaf that requires a gradient: I finds ∂h in its `.grad`.
        x = tokens if h is None else h.requires_grad_()
        with self.pipe.meter or contextlib.nullcontext():
            y = stage(x)
            if stage.is_last:
                y = F.cross_entropy(
                    y.flatten(0, 1),  # (B, T, V) → (B·T, V)
                    targets.flatten(),  # (B, T) → (B·T)
                    ignore_index=IGNORED,
                    reduction="sum",
                )
                y = y * self.shares[i]  # the loss is divided here, once
                self.loss += y.detach()
        self.stash[i, chunk] = x, y
        return y.detach()

    def input_gradient(
        self, i: int, chunk: int, dh: Float[Tensor, "B T d"] | None
    ) -> Float[Tensor, "B T d"] | None:
        """I: backward through the kept graph. The linears leave their W for later."""
        x, y = self.stash.pop((i, chunk))
        if y.requires_grad:  # else nothing trains from the tokens up to here
            torch.autograd.backward(y, dh)
        self.pending_weight_grads[i, chunk] = self.pipe.weight_gradients[chunk].take()
        return x.grad

    def weight_gradient(self, i: int, chunk: int, _: None = None) -> None:
        """W: the weight gradients that I has left."""
        # The holds live until W is done, so that a meter counts X and ∂Y till then.
        pending, _holds = self.pending_weight_grads.pop((i, chunk))
        backward.compute(pending)

    def full_backward(
        self, i: int, chunk: int, dh: Float[Tensor, "B T d"] | None
    ) -> Float[Tensor, "B T d"] | None:
        """B: I, then W."""
        dx = self.input_gradient(i, chunk, dh)
        self.weight_gradient(i, chunk)
        return dx

    # Functions, not bound methods: these would keep the step alive in a cycle.
    compute: ClassVar = {
        Kind.FORWARD: forward,
        Kind.INPUT_GRAD: input_gradient,
        Kind.WEIGHT_GRAD: weight_gradient,
        Kind.BACKWARD: full_backward,
    }
