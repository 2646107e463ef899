"""Three parallelisms at once: a Llama cut by tensor, then by layers, and the whole
repeated over data.

    rank  =  place along each axis of a mesh, tp innermost          g  gradients       n_r  tokens of replica r

    tensor     every matrix of a stage over the tp axis              (`tensor`)
    pipeline   the stages over the pp axis, any schedule             (`pipeline`)
    data       replicas over the dp axis:  g = Σ_r (n_r / Σ n) g_r   one all-reduce a
                                           step, after the last microbatch

Narayanan et al. 2021, https://arxiv.org/abs/2104.04473. The global norm counts every
number once: shards over tp and pp add up, what tp copies (norms, shared key/value
heads) is divided by its copies, a tied matrix on two stages counts on one, and dp
replicas are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlab.models.llama import Llama
from llmlab.parallelism import tensor
from llmlab.parallelism.hybrid.placement import Placement
from llmlab.parallelism.hybrid.resharding import Piece, load, piece
from llmlab.parallelism.pipeline import IGNORED, Microbatch, Pipeline, Schedule, split
from llmlab.parallelism.runtime import Communicator


class Hybrid:
    """One rank of a job that is split over `placement`; all ranks give the same whole
    model.

    Args:
        placement: sizes of the axes "pp", "dp" and "tp", outermost first.
        layers: how many layers each stage gets; None: as even as can be.
        after_op: as for `Pipeline`.
    Raises:
        ValueError: the placement has other axes, or not as many devices as `comm` has
            ranks.
    """

    def __init__(
        self,
        model: Llama,
        comm: Communicator,
        placement: Placement,
        *,
        layers: Sequence[int] | None = None,
        after_op: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if set(placement.sizes) != {"pp", "dp", "tp"} or placement.devices != comm.size:
            raise ValueError(
                f"placement={placement.sizes} must have pp, dp and tp, {comm.size}"
                " devices in all"
            )
        mesh = comm.mesh(*placement.sizes.values())
        self.comm, self.placement = comm, placement
        self.axes = dict(zip(placement.sizes, mesh.axes, strict=True))
        self.tp, self.pp, self.dp = (self.axes[name] for name in ("tp", "pp", "dp"))
        tensor.parallelize(model, self.tp, gather_output=True)
        stages = split(model, self.pp.rank, self.pp.size, layers=layers)
        for stage in stages:
            if stage.is_last:  # the gathered logits end with the vocabulary's padding
                stage.lm_head.register_forward_hook(
                    _without_padding(model.config.vocab_size)
                )
        self.pipe = Pipeline(stages, self.pp, after_op=after_op)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's shards."""
        return self.pipe.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """They, under the whole model's names."""
        for stage in self.pipe.stages:
            yield from stage.named_parameters()

    def step(self, schedule: Schedule, microbatches: Sequence[Microbatch]) -> float:
        """Gradients of the mean loss over all tokens of all replicas, added to `.grad`;
        returns that loss.

        Args:
            microbatches: those of this rank's replica; replicas may have different
                numbers of tokens.
        """
        counted = sum(int((y != IGNORED).sum()) for _, y in microbatches)
        share = counted / max(1, self.dp.all_reduce(torch.tensor(counted)).item())
        before = [None if w.grad is None else w.grad.clone() for w in self.parameters()]
        for w in self.parameters():
            w.grad = None
        loss = self.pipe.step(schedule, microbatches, weighting="token")
        for w, old in zip(self.parameters(), before, strict=True):
            g = self.dp.all_reduce(
                share * (torch.zeros_like(w) if w.grad is None else w.grad)
            )
            w.grad = g if old is None else g + old
        return self.dp.all_reduce(
            torch.tensor(share * loss, dtype=torch.float64)
        ).item()

    def pieces(self) -> dict[str, Piece]:
        """Where each of this rank's parameters lies in the whole model."""
        config = self.pipe.stages[0].config
        return {
            name: piece(name, config, self.tp.rank, self.tp.size)
            for name, _ in self.named_parameters()
        }

    def _second_copy(self) -> nn.Parameter | None:
        """The tied matrix on the last stage, when the first stage has it too."""
        return (
            self.pipe.tied_weight()
            if any(s.is_last for s in self.pipe.stages)
            else None
        )

    @torch.no_grad()
    def clip_grad_norm(self, limit: float) -> float:
        """Scale all gradients so that the norm over the whole model is at most `limit`;
        return the norm before.
        """
        places, twice, total = self.pieces(), self._second_copy(), torch.zeros(())
        for name, w in self.named_parameters():
            if w.grad is not None and w is not twice:
                total = (
                    total
                    + w.grad.to(torch.promote_types(w.dtype, torch.float32))
                    .square()
                    .sum()
                    / places[name].copies
                )
        norm = self.pp.all_reduce(self.tp.all_reduce(total)).sqrt().item()
        for w in self.parameters():
            if w.grad is not None:
                w.grad.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm

    def owned(
        self, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, tuple[Tensor, Piece]]:
        """What this rank writes into a checkpoint: each number of the model, and of
        Adam's averages, on one rank only.
        """
        if self.dp.rank:
            return {}
        places, twice, mine = self.pieces(), self._second_copy(), {}
        for name, w in self.named_parameters():
            if w is twice or self.tp.rank % places[name].copies:
                continue
            mine[name] = (w, places[name])
            for kind, value in (
                optimizer.state.get(w, {}) if optimizer else {}
            ).items():
                at = places[name] if value.dim() else Piece((1,), 0, 0, 1, 1)
                mine[f"optimizer.{kind}.{name}"] = (
                    value if value.dim() else value.view(1),
                    at,
                )
        return mine

    def load(
        self, folder: Path | str, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Read this rank's part of a checkpoint of any split, Adam's averages too if an
        optimizer is given.
        """
        places = {name: self._source(name, at) for name, at in self.pieces().items()}
        wanted, kinds = (
            dict(places.values()),
            ("step", "exp_avg", "exp_avg_sq") if optimizer else (),
        )
        for source, at in places.values():
            wanted |= {
                f"optimizer.{k}.{source}": (
                    Piece((1,), 0, 0, 1, 1) if k == "step" else at
                )
                for k in kinds
            }
        state = load(folder, wanted)
        for name, w in self.named_parameters():
            source, _ = places[name]
            w.data.copy_(state[source])
            if optimizer is not None:
                # two stages may share a source
                mine = {k: state[f"optimizer.{k}.{source}"].clone() for k in kinds}
                optimizer.state[w] = mine | {"step": mine["step"].view(())}

    def _source(self, name: str, at: Piece) -> tuple[str, Piece]:
        tied = (
            name == "lm_head.weight" and self.pipe.stages[0].config.tie_word_embeddings
        )
        return ("model.embed_tokens.weight" if tied else name), at


def _without_padding(V: int) -> Callable:
    return lambda _module, _args, logits: logits[..., :V]
