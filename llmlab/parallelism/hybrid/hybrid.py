"""Three parallelisms at once: a Llama cut by tensor and by layers, repeated over data.

Narayanan et al. 2021, https://arxiv.org/abs/2104.04473. A rank has a place along each
axis of a mesh:

    tp   tensor: every matrix of a stage is cut over this axis (`tensor`)
    pp   pipeline: the stages lie along this axis, any schedule (`pipeline`)
    dp   data: replicas, with one all-reduce per step, after the last microbatch:
         g = Σ_r (n_r / Σ n) g_r

The global norm counts every number once:

    shards over tp and pp add up
    what tp copies (norms, shared key/value heads) is divided by its copies
    a tied matrix on two stages counts on one of them
    dp replicas are equal, and one of them counts

    g    gradients
    n_r  tokens of replica r
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

ADAM_AVERAGES = ("exp_avg", "exp_avg_sq")
ONE_NUMBER = Piece((1,), dim=0, start=0, stop=1, padded=1)  # Adam's count of steps


class Hybrid:
    """One rank of a job that is split over `placement`.

    Args:
        model: the whole model, the same on all ranks. It is cut in place.
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
        self.comm = comm
        self.placement = placement
        mesh = comm.mesh(*placement.sizes.values())
        self.axes = dict(zip(placement.sizes, mesh.axes, strict=True))
        self.tp = self.axes["tp"]
        self.pp = self.axes["pp"]
        self.dp = self.axes["dp"]
        # first every matrix, then the layers: `split` takes the shards as they are
        tensor.parallelize(model, self.tp, gather_output=True)
        stages = split(model, self.pp.rank, self.pp.size, layers=layers)
        for stage in stages:
            if stage.is_last:
                # the gathered logits end with the padding of the vocabulary
                hook = _without_padding(model.config.vocab_size)
                stage.lm_head.register_forward_hook(hook)
        self.pipe = Pipeline(stages, self.pp, after_op=after_op)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's shards."""
        return self.pipe.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's shards, under the whole model's names."""
        for stage in self.pipe.stages:
            yield from stage.named_parameters()

    def step(self, schedule: Schedule, microbatches: Sequence[Microbatch]) -> float:
        """Add the gradients of the mean loss over all replicas' tokens to `.grad`.

        Args:
            microbatches: those of this rank's replica; replicas may have different
                numbers of tokens.
        Returns:
            That loss.
        """
        # this replica's share of the tokens that count: n_r / Σ n
        tokens = sum(int((targets != IGNORED).sum()) for _, targets in microbatches)
        all_tokens = self.dp.all_reduce(torch.tensor(tokens)).item()
        share = tokens / max(1, all_tokens)
        # Earlier gradients are set aside: they are averaged over dp already, and must
        # not be averaged again.
        trained = [w for w in self.parameters() if w.requires_grad]
        earlier_grads = []
        for w in trained:
            earlier_grads.append(None if w.grad is None else w.grad.clone())
            w.grad = None
        loss = self.pipe.step(schedule, microbatches, weighting="token")
        for w, earlier in zip(trained, earlier_grads, strict=True):
            local_grad = torch.zeros_like(w) if w.grad is None else w.grad
            grad = self.dp.all_reduce(share * local_grad)
            w.grad = grad if earlier is None else grad + earlier
        local_loss = torch.tensor(share * loss, dtype=torch.float64)
        return self.dp.all_reduce(local_loss).item()

    def pieces(self) -> dict[str, Piece]:
        """Where each of this rank's parameters lies in the whole model."""
        config = self.pipe.stages[0].config
        return {
            name: piece(name, config, self.tp.rank, self.tp.size)
            for name, _ in self.named_parameters()
        }

    def _tied_copy(self) -> nn.Parameter | None:
        """The tied matrix on the last stage, when the first stage has it too."""
        if any(stage.is_last for stage in self.pipe.stages):
            return self.pipe.tied_weight()
        return None

    @torch.no_grad()
    def clip_grad_norm(self, limit: float) -> float:
        """Scale all gradients so that the whole model's norm is at most `limit`.

        Returns:
            The norm before.
        """
        pieces = self.pieces()
        tied_copy = self._tied_copy()
        # the same type on a rank where nothing trains
        dtype = next(self.parameters()).dtype
        squares = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32))
        for name, w in self.named_parameters():
            if w.grad is None or w is tied_copy:
                continue
            grad = w.grad.to(torch.promote_types(w.dtype, torch.float32))
            # each copy over tp counts its part of the whole
            squares = squares + grad.square().sum() / pieces[name].copies
        norm = self.pp.all_reduce(self.tp.all_reduce(squares)).sqrt().item()
        scale = min(1.0, limit / (norm + 1e-6))
        for w in self.parameters():
            if w.grad is not None:
                w.grad.mul_(scale)
        return norm

    def owned(
        self, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, tuple[Tensor, Piece]]:
        """What this rank writes into a checkpoint.

        Each number of the model, and of Adam's averages, is written by one rank only.
        """
        if self.dp.rank != 0:
            return {}
        pieces = self.pieces()
        tied_copy = self._tied_copy()
        owned = {}
        for name, w in self.named_parameters():
            is_first_copy = self.tp.rank % pieces[name].copies == 0
            if w is tied_copy or not is_first_copy:
                continue
            owned[name] = (w, pieces[name])
            if optimizer is None:
                continue
            for kind, value in optimizer.state.get(w, {}).items():
                key = _optimizer_key(kind, name)
                if value.dim():
                    owned[key] = (value, pieces[name])
                else:  # the count of steps
                    owned[key] = (value.view(1), ONE_NUMBER)
        return owned

    def load(
        self, folder: Path | str, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Read this rank's part of a checkpoint of any split.

        Args:
            optimizer: Adam, whose averages are read, too.
        """
        wanted = {}
        for name, piece_of_name in self.pieces().items():
            stored = self._stored_name(name)
            wanted[stored] = piece_of_name
            if optimizer is not None:
                wanted[_optimizer_key("step", stored)] = ONE_NUMBER
                for kind in ADAM_AVERAGES:
                    wanted[_optimizer_key(kind, stored)] = piece_of_name
        state = load(folder, wanted)
        for name, w in self.named_parameters():
            stored = self._stored_name(name)
            w.data.copy_(state[stored])
            if optimizer is None:
                continue
            # Copies: two stages of one rank may read the same stored tensor.
            step = state[_optimizer_key("step", stored)].clone().view(())
            adam_state = {"step": step}
            for kind in ADAM_AVERAGES:
                adam_state[kind] = state[_optimizer_key(kind, stored)].clone()
            optimizer.state[w] = adam_state

    def _stored_name(self, name: str) -> str:
        """A parameter's name in a checkpoint, which has a tied matrix once."""
        is_tied = self.pipe.stages[0].config.tie_word_embeddings
        if name == "lm_head.weight" and is_tied:
            return "model.embed_tokens.weight"
        return name


def _optimizer_key(kind: str, name: str) -> str:
    return f"optimizer.{kind}.{name}"


def _without_padding(V: int) -> Callable:
    """A forward hook that drops the columns beyond the vocabulary."""

    def hook(_module: nn.Module, _args: tuple, logits: Tensor) -> Tensor:
        return logits[..., :V]  # (B, T, p·Vp) → (B, T, V)

    return hook
