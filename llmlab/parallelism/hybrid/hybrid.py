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
from llmlab.parallelism.hybrid.resharding import (
    Piece,
    load,
    piece,
    stored_names,
    whole_shapes,
)
from llmlab.parallelism.pipeline import IGNORED, Microbatch, Pipeline, Schedule, split
from llmlab.parallelism.runtime import Communicator

ADAM_AVERAGES = ("exp_avg", "exp_avg_sq")
AMSGRAD = "max_exp_avg_sq"
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
            stage.register_forward_pre_hook(_check_plain)
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

        Each number of the model, and of Adam's averages, is written by one rank only. A
        parameter that Adam has not stepped yet is written with a count of 0.

        Args:
            optimizer: `Adam` or `AdamW`.
        Raises:
            ValueError: another optimizer.
        """
        groups = _groups(optimizer)
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
            if id(w) not in groups:
                continue
            state = optimizer.state.get(w) or {"step": torch.zeros(())}
            for kind, value in state.items():
                key = _optimizer_key(kind, name)
                if kind == "step":
                    owned[key] = (value.view(1), ONE_NUMBER)
                else:
                    owned[key] = (value, pieces[name])
        return owned

    def load(
        self, folder: Path | str, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Read this rank's part of a checkpoint of any split.

        As torch's `load_state_dict` does, it casts what was saved in another precision
        to that of the parameter. What is not state (learning rates, groups) stays.

        Args:
            optimizer: `Adam` or `AdamW`, whose averages are read, too.
        Raises:
            ValueError: another optimizer; the checkpoint has no state for a parameter
                that trains, or another state than this optimizer has (with `amsgrad`,
                without); or as `resharding.load`. Nothing is changed then.
        """
        groups = _groups(optimizer)
        pieces = self.pieces()
        steps = self._stored_steps(folder, groups)
        wanted = {}
        for name, place in pieces.items():
            stored = self._stored_name(name)
            wanted[stored] = place
        for name, w in self.named_parameters():
            stored = self._stored_name(name)
            if steps.get(stored, 0) > 0 and id(w) in groups:
                for kind in _averages(groups[id(w)]):
                    wanted[_optimizer_key(kind, stored)] = pieces[name]
        state = load(folder, wanted)
        for name, w in self.named_parameters():
            stored = self._stored_name(name)
            w.data.copy_(state[stored])
            if id(w) not in groups:
                continue
            optimizer.state.pop(w, None)
            if not steps.get(stored):
                continue  # never stepped
            group = groups[id(w)]
            # a copy for each: two stages of one rank may read the same stored tensor
            optimizer.state[w] = {"step": _count(steps[stored], w, group)}
            for kind in _averages(group):
                value = state[_optimizer_key(kind, stored)]
                optimizer.state[w][kind] = value.to(w.device, w.dtype, copy=True)

    def _stored_steps(
        self, folder: Path | str, groups: dict[int, dict]
    ) -> dict[str, float]:
        """How often Adam had stepped each of this rank's parameters; 0: not yet.

        Raises:
            ValueError: the state is not what the optimizer needs.
        """
        kinds: dict[str, set[str]] = {}  # of state, by parameter
        for key in stored_names(folder):
            if key.startswith("optimizer."):
                _, kind, name = key.split(".", 2)
                kinds.setdefault(name, set()).add(kind)
        wanted = {}
        for name, w in self.named_parameters():
            stored = self._stored_name(name)
            found = kinds.get(stored, set())
            if id(w) not in groups or not (found or w.requires_grad):
                continue
            if "step" not in found:
                raise ValueError(
                    f"the checkpoint {folder} has no optimizer state for {stored}: it"
                    " was saved without an optimizer, or with one that lacked it"
                )
            wanted[_optimizer_key("step", stored)] = ONE_NUMBER
            needed = {"step", *_averages(groups[id(w)])}
            if found not in ({"step"}, needed):
                raise ValueError(
                    f"the checkpoint {folder} has the optimizer state"
                    f" {', '.join(sorted(found))} of {stored}, and here it is"
                    f" {', '.join(sorted(needed))}: use the same optimizer, with the"
                    " same amsgrad"
                )
        prefix = _optimizer_key("step", "")
        read = load(folder, wanted)
        return {key.removeprefix(prefix): n.item() for key, n in read.items()}

    def _stored_name(self, name: str) -> str:
        """A parameter's name in a checkpoint, which has a tied matrix once."""
        is_tied = self.pipe.stages[0].config.tie_word_embeddings
        if name == "lm_head.weight" and is_tied:
            return "model.embed_tokens.weight"
        return name


def _check_plain(stage: nn.Module, _args: tuple) -> None:
    """A forward pre-hook: a stage has the parameters of a Llama, and no others.

    Raises:
        ValueError: it has an adapter's, that was put on after the split.
    """
    known = whole_shapes(stage.config)
    for name, _ in stage.named_parameters():
        if name not in known and name != "lm_head.weight":  # that of a tied matrix
            raise ValueError(
                f"{name} came after the split: adapters are not supported here, as"
                " their gradients would be those of this rank's part only. Merge them"
                " for good before the split"
            )


def _groups(optimizer: torch.optim.Optimizer | None) -> dict[int, dict]:
    """The group of each parameter, by its id; raises as `Hybrid.owned`."""
    if optimizer is None:
        return {}
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}: only the state of Adam and"
            " AdamW can be saved and loaded"
        )
    return {id(w): group for group in optimizer.param_groups for w in group["params"]}


def _averages(group: dict) -> tuple[str, ...]:
    return (*ADAM_AVERAGES, AMSGRAD) if group["amsgrad"] else ADAM_AVERAGES


def _count(step: float, w: Tensor, group: dict) -> Tensor:
    """Adam's count of steps, where this optimizer wants it."""
    on_device = group.get("capturable") or group.get("fused")
    return torch.tensor(float(step), device=w.device if on_device else "cpu")


def _optimizer_key(kind: str, name: str) -> str:
    return f"optimizer.{kind}.{name}"


def _without_padding(V: int) -> Callable:
    """A forward hook that drops the columns beyond the vocabulary."""

    def hook(_module: nn.Module, _args: tuple, logits: Tensor) -> Tensor:
        return logits[..., :V]  # (B, T, p·Vp) → (B, T, V)

    return hook
