"""Pipeline parallelism: runs any schedule of `schedules` on a Llama whose layers lie on
several ranks.

    pipe = Pipeline(split(model, comm.rank, comm.size), comm)
    loss = pipe.step(one_f_one_b(comm.size, m), [(tokens, targets), …])  m microbatches
    clip_grad_norm(pipe, 1.0)
    optimizer.step()                                              over pipe.parameters()

    F  takes h from the stage before, keeps the graph of its layers, sends its h on
    I  takes ∂h from the stage after, runs backward through the kept graph, sends ∂h
       back
    W  computes the weights' gradients that I has left (see `pipeline_backward`)
    B  is I, then W, then the sending

The schedule alone decides the order; gradients, and so the trained weights, are those
of one process for every schedule (Huang et al. 2018, arXiv:1811.06965: synchronous, no
stale weights). All receives are posted when a step begins and each message has a tag of
its own, so nothing depends on the order in which messages come.

Simplified: no dropout, no padding mask; gradients that were sent, (B, T, d) each, are
kept until the step ends; gloo or `World` only (NCCL has no tags, and wants sends and
receives paired in one call, as torch's executor does).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.parallelism.pipeline import backward
from llmlab.parallelism.pipeline.memory import ActivationMeter
from llmlab.parallelism.pipeline.schedules import Op, Schedule, check, chunks, stage_of
from llmlab.parallelism.pipeline.stages import Stage
from llmlab.parallelism.pipeline.timeline import Bar
from llmlab.parallelism.runtime import Communicator

Microbatch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]
IGNORED = -100


class Pipeline:
    """One rank's stages, and the wire to the ranks of the stages before and after.

    Args:
        stages: this rank's chunks, from `pipeline_stages.split`.
        layout: as given to `split`.
        after_op: called as `after_op(kind, microbatch, chunk)` when an op has been
            computed, before its result is sent: `comm.work` or `time.sleep` here make
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
        self.stages, self.comm, self.layout, self.meter = (
            nn.ModuleList(stages),
            comm,
            layout,
            meter,
        )
        self.after_op = after_op or (lambda kind, i, chunk: None)
        self.p, self.v = comm.size, len(stages)
        self.count = self.p * self.v  # S stages in all
        self.rank_of = {
            stage_of(r, c, self.p, layout): r
            for r in range(self.p)
            for c in range(self.v)
        }
        self.bars: list[Bar] = []
        ends = (self.rank_of[0], self.rank_of[self.count - 1])
        self.two_copies = stages[0].config.tie_word_embeddings and ends[0] != ends[1]
        # None on the ranks between, too
        self.ends = comm.group(ends) if self.two_copies else None
        self.late = [
            backward.make_late(stage, meter and meter.hold) for stage in stages
        ]

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, each once."""
        return self.stages.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of the whole model's state, under the whole model's
        names.
        """
        return {
            name: value
            for stage in self.stages
            for name, value in stage.state_dict().items()
        }

    def tied_weight(self) -> nn.Parameter | None:
        """This rank's copy of the tied matrix, where two ranks have one."""
        for stage in self.stages if self.two_copies else ():
            if stage.is_first or stage.is_last:
                return (
                    stage.model.embed_tokens.weight
                    if stage.is_first
                    else stage.lm_head.weight
                )
        return None

    def step(
        self,
        schedule: Schedule,
        microbatches: Sequence[Microbatch],
        weighting: str = "microbatch",
    ) -> float:
        """Gradients of the loss, added to `.grad`; returns the loss, on every rank.
        Takes no optimizer step.

        Args:
            schedule: for these p ranks, v chunks and m microbatches.
            microbatches: (tokens, targets) for each; shapes may differ. Targets of −100
                do not count. All ranks are given all, though only the first stage looks
                at tokens and only the last at targets.
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
        check(schedule, len(microbatches))
        tied = self.tied_weight()
        before, _ = (
            (tied.grad, setattr(tied, "grad", None))
            if tied is not None
            else (None, None)
        )
        run = _Step(
            self, microbatches, loss_shares([y for _, y in microbatches], weighting)
        )
        run.post_receives(schedule[self.comm.rank])
        for op in schedule[self.comm.rank]:
            run.do(op)
        run.finish()
        if tied is not None and tied.grad is not None:
            tied.grad = self.ends.all_reduce(tied.grad) + (
                0 if before is None else before
            )
        return self.comm.broadcast(run.loss, self.rank_of[self.count - 1]).item()


def loss_shares(
    targets: Sequence[Int[Tensor, "B T"]], weighting: str = "microbatch"
) -> list[float]:
    """What each microbatch's sum of token losses is multiplied with: 1/(m n_i), or 1/Σ
    n_i for "token".

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
    """Scale all ranks' gradients so that their common norm is at most `limit`; return
    the norm before.

    The tied matrix counts once though two ranks have it. As
    `torch.nn.utils.clip_grad_norm_` on the whole model.
    """
    twice = pipe.tied_weight() if any(stage.is_last for stage in pipe.stages) else None
    mine = [w.grad for w in pipe.parameters() if w.grad is not None]
    counted = [
        w.grad for w in pipe.parameters() if w.grad is not None and w is not twice
    ]
    total = sum(
        (g.float().square().sum() for g in counted),
        torch.zeros((), device=pipe.comm.device),
    )
    norm = pipe.comm.all_reduce(total).sqrt().item()
    for g in mine:
        g.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


class _Step:
    """What one rank holds during a step: graphs between F and I, late weight gradients
    between I and W, messages under way.
    """

    def __init__(
        self,
        pipe: Pipeline,
        microbatches: Sequence[Microbatch],
        shares: Sequence[float],
    ) -> None:
        self.pipe, self.microbatches, self.shares = pipe, microbatches, shares
        self.graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.left: dict[tuple[int, int], tuple] = {}
        # handles, and tensors that stay on this rank
        self.mail: dict[tuple[str, int, int], object] = {}
        self.sends: dict[tuple[str, int, int], object] = {}
        self.loss = torch.zeros((), device=pipe.comm.device)
        pipe.bars = []

    def stage(self, chunk: int) -> int:
        return stage_of(self.pipe.comm.rank, chunk, self.pipe.p, self.pipe.layout)

    def input_of(self, op: Op) -> tuple[str, int, int] | None:
        """The message that an op waits for: ("F", i, s) is what stage s is fed, ("I",
        i, s) its output's gradient.
        """
        kind, i, s = op[0], op[1], self.stage(op[2])
        has = s > 0 if kind == "F" else kind in "BI" and s < self.pipe.count - 1
        return ("F" if kind == "F" else "I", i, s) if has else None

    def tag(self, key: tuple[str, int, int]) -> int:
        kind, i, s = key
        return ((kind == "I") * self.pipe.count + s) * len(self.microbatches) + i

    def post_receives(self, ops: Sequence[Op]) -> None:
        """Ask for every message of the step that comes from another rank."""
        for key in filter(None, map(self.input_of, ops)):
            source = self.pipe.rank_of[key[2] + (-1 if key[0] == "F" else 1)]
            if source != self.pipe.comm.rank:
                self.mail[key] = self.pipe.comm.irecv(source, self.tag(key))

    def do(self, op: Op) -> None:
        """Wait for an op's input, compute, send its output."""
        kind, i, chunk = op
        key = self.input_of(op)
        came = self.mail.pop(key) if key else None
        came = came if came is None or isinstance(came, Tensor) else came.wait()
        s = self.stage(chunk)
        # its gradient has come, so it has arrived: let go of h
        if kind in "BI" and ("F", i, s + 1) in self.sends:
            self.sends.pop(("F", i, s + 1)).wait()
        start = time.perf_counter()
        out = getattr(self, f"_{kind}")(i, chunk, came)
        self.pipe.after_op(kind, i, chunk)
        self.pipe.bars.append(
            Bar(self.pipe.comm.rank, kind, i, chunk, start, time.perf_counter())
        )
        if kind == "F" and s < self.pipe.count - 1:
            self.send(("F", i, s + 1), out)
        elif kind in "BI" and s > 0:
            self.send(("I", i, s - 1), out)

    def send(self, key: tuple[str, int, int], x: Tensor) -> None:
        target = self.pipe.rank_of[key[2]]
        if target == self.pipe.comm.rank:
            self.mail[key] = x
        else:
            self.sends[key] = self.pipe.comm.isend(x, target, self.tag(key))

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for handle in self.sends.values():
            handle.wait()

    def _F(self, i: int, chunk: int, h: Float[Tensor, "B T d"] | None) -> Tensor:
        stage, (tokens, targets) = self.pipe.stages[chunk], self.microbatches[i]
        x = tokens if h is None else h.requires_grad_()
        with self.pipe.meter or contextlib.nullcontext():
            y = stage(x)
            if stage.is_last:
                y = F.cross_entropy(
                    y.flatten(0, 1),
                    targets.flatten(),
                    ignore_index=IGNORED,
                    reduction="sum",
                )
                y = y * self.shares[i]  # the loss is divided here, once
                self.loss += y.detach()
        self.graphs[i, chunk] = x, y
        return y.detach()

    def _I(
        self, i: int, chunk: int, dy: Float[Tensor, "B T d"] | None
    ) -> Tensor | None:
        x, y = self.graphs.pop((i, chunk))
        torch.autograd.backward(y, dy)
        self.left[i, chunk] = self.pipe.late[chunk].take()
        return x.grad

    def _W(self, i: int, chunk: int, _: None = None) -> None:
        late, _holds = self.left.pop((i, chunk))
        backward.compute(late)

    def _B(
        self, i: int, chunk: int, dy: Float[Tensor, "B T d"] | None
    ) -> Tensor | None:
        dx = self._I(i, chunk, dy)
        self._W(i, chunk)
        return dx
