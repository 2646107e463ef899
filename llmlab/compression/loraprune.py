"""LoRAPrune: heads and channels are cut, and LoRA's gradients say which.

Zhang et al. 2023, https://arxiv.org/abs/2305.18403. A linear W = W₀ + s B A has a
frozen W₀, of which no gradient is kept. What its weights matter is read off the
gradients of A and B. One step of SGD on A and B changes W by −η ĝ, exactly, with

    ĝ  =  s (∂B A + B ∂A − η ∂B ∂A)              equation 9; the paper sets η = 1
    I  =  (ĝ ⊙ W)²                               equation 10, of each weight
    Ĝ_g  =  Σ I over all weights of group g      equation 4, heads and channels
    Ḡ  ←  λ Ḡ + (1 − λ) Ĝ                        equation 11, step by step
    z  =  (W₀ x + s B A x) ⊙ M                   equation 13, M = 0 where Ḡ is lowest

With G = ∂L/∂W, which nobody computes, the chain rule says ∂B = s G Aᵀ and ∂A = s Bᵀ G:

    ĝ  =  s² (G AᵀA + B Bᵀ G)  −  η s³ G Aᵀ Bᵀ G

At the start B = 0, and each row of G is seen through r random directions. Over A, with
entries of variance σ²,

    E ĝ_ij²  =  r σ⁴ s⁴ (‖G_i‖² + (r − 1/5) G_ij²)

so a *row* is ranked by its own gradient's length. A *column* is not: every entry of ĝ_i
has nearly the same variance. Columns are seen by B Bᵀ G, once B has grown.

    W₀   frozen weight, (d, k)             ∂A, ∂B  gradients of A and B
    A    (r, k)    B  (d, r)               ĝ   estimate of G, (d, k)
    s    α/r, LoRA's scale                 η   learning rate in the last term
    M    1 for a unit that is kept         λ   decay of the moving average
    unit what is cut at once: a key/value head with its query heads, or a channel

Simplified: no weight is kept in 8 bits. Each linear's ĝ exists while it is summed.

The authors' code differs from the paper: |ĝ ⊙ W| in place of the square, and the scores
of each linear are brought to length 1 before they are added (`power=1`,
`normalise=True`). It leaves s out of ĝ, which changes no order if all linears have the
same. The first tenth of the layers and the last are not pruned: leave their groups out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmlab.compression import calibration, dependencies, walk
from llmlab.compression.dependencies import Group, Member
from llmlab.models.accounting import linear_shapes
from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import LlamaConfig

# What scripts/loraprune_sweep.py measured on the real model, a run a line.
FILE = Path(__file__).parent / "data" / "loraprune.csv"
CRITERIA = ("lora", "full", "magnitude")


@dataclass(frozen=True)
class LoRAPruneConfig:
    """How much goes, when, and by which score."""

    final: float = 0.2  # share of each group's units that is gone at the end
    steps: int = 100
    warmup: float = 0.1  # share of the steps before anything goes
    cooldown: float = 0.1  # share of the steps at the end in which nothing more goes
    every: int = 10  # steps from one pruning to the next
    decay: float = 0.9  # λ
    lr: float = 1.0  # η in ĝ; the paper's 1 is not the learning rate of the training
    criterion: str = "lora"  # or "full": W₀ has a gradient; or "magnitude": ĝ = 1
    power: int = 2  # 1 as in the authors' code
    normalise: bool = False  # the scores of each linear to length 1, as in their code
    columns: bool = True  # whether the columns of o_proj and down_proj have a say

    def __post_init__(self) -> None:
        if not 0 <= self.final < 1:
            raise ValueError(f"final={self.final} must be at least 0 and below 1")
        for name in ("steps", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        for name in ("warmup", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if self.warmup + self.cooldown > 1:
            raise ValueError(
                f"warmup={self.warmup} and cooldown={self.cooldown} must be at most 1"
                " together"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1")
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be a number of at least 0")
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"criterion={self.criterion!r} must be one of {', '.join(CRITERIA)}"
            )
        if self.power not in (1, 2):
            raise ValueError(f"power={self.power} must be 1 or 2")


# The mathematics ----------------------------------------------------------------------


def estimated_gradient(
    A: Float[Tensor, "r k"],
    B: Float[Tensor, "d r"],
    grad_A: Float[Tensor, "r k"],
    grad_B: Float[Tensor, "d r"],
    scaling: float = 1.0,
    lr: float = 1.0,
) -> Float[Tensor, "d k"]:
    """ĝ = s (∂B A + B ∂A − η ∂B ∂A): what a step of SGD takes off W, over η."""
    return scaling * (grad_B @ A + B @ grad_A - lr * (grad_B @ grad_A))


def expected_square(G: Float[Tensor, "d k"], r: int) -> Float[Tensor, "d k"]:
    """E ĝ² over A at B = 0, up to a factor: ‖G_i‖² + (r − 1/5) G_ij².

    A's entries are uniform around 0, as LoRA's are: their fourth moment is 9/5 σ⁴.
    """
    return G.square().sum(1, keepdim=True) + (r - 0.2) * G.square()


def weight_importance(
    W: Float[Tensor, "d k"], gradient: Float[Tensor, "d k"], power: int = 2
) -> Float[Tensor, "d k"]:
    """(ĝ ⊙ W)²: how much the loss changes, to first order, if this weight becomes 0.

    Args:
        W: W₀ + s B A, the weight that is at work.
    """
    return (gradient * W).abs() ** power


def by_unit(
    importance: Float[Tensor, "d k"], axis: int, index: Int[Tensor, "units each"]
) -> Float[Tensor, "units"]:
    """The sum over the rows (axis 0) or columns (axis 1) that each unit takes."""
    lines = importance.sum(1 - axis)  # (d,) or (k,)
    return lines[index].sum(1)  # (units, each) -> (units,)


def moving_average(
    old: Float[Tensor, "units"] | None, new: Float[Tensor, "units"], decay: float
) -> Float[Tensor, "units"]:
    """λ Ḡ + (1 − λ) Ĝ. None: nothing yet, which counts as 0, as in the authors' code.

    All units start from the same 0, so that it changes no order.
    """
    old = torch.zeros_like(new) if old is None else old
    return decay * old + (1 - decay) * new


def share_pruned(
    step: int, steps: int, warmup: float, cooldown: float, final: float
) -> float:
    """The share of units that is gone after so many steps, 1 … steps.

    It rises as a cubic, fast first, from 0 at the end of the warm-up to `final` where
    the cool-down begins (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878).
    """
    start = warmup * steps
    stop = steps - cooldown * steps
    if step >= stop:
        return final
    if step <= start:
        return 0.0
    left = 1 - (step - start) / (stop - start)
    return final * (1 - left**3)


def units_pruned(units: int, share: float) -> int:
    """⌊units · share⌋; 0.29 of 100 are 29, though the product of floats is below."""
    return math.floor(round(units * share, 6))


def prune_to(
    average: Float[Tensor, "units"], kept: Bool[Tensor, "units"], count: int
) -> Bool[Tensor, "units"]:
    """`count` units are gone: those that were, and of the others the lowest.

    Of equal ones the first go. What is gone does not come back.
    """
    scores = average.masked_fill(~kept, -math.inf)
    gone = scores.argsort(stable=True)[: max(count, int((~kept).sum()))]
    after = torch.ones_like(kept)
    after[gone] = False
    return after


def masked_linear(
    x: Float[Tensor, "*batch k"],
    W: Float[Tensor, "d k"],
    A: Float[Tensor, "r k"],
    B: Float[Tensor, "d r"],
    scaling: float,
    mask: Float[Tensor, "d"],
) -> Float[Tensor, "*batch d"]:
    """z = (W₀ x + s B A x) ⊙ M: the mask is on both, so that the merged W has it."""
    return (x @ W.T + scaling * (x @ A.T @ B.T)) * mask


def rank_correlation(a: Float[Tensor, "units"], b: Float[Tensor, "units"]) -> float:
    """Spearman's: 1 where both rank alike, 0 where one says nothing of the other."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def overlap(a: Float[Tensor, "units"], b: Float[Tensor, "units"], count: int) -> float:
    """Of the `count` lowest by a, the share that is among the `count` lowest by b."""
    lowest = [set(x.argsort(stable=True)[:count].tolist()) for x in (a, b)]
    return len(lowest[0] & lowest[1]) / count


def gradient_bytes(config: LlamaConfig, r: int | None = None, size: int = 2) -> int:
    """Bytes of the gradients of all linears in the blocks, or of rank r's A and B.

    Args:
        size: bytes of a number.
    """
    numbers = 0
    for d, k in linear_shapes(config).values():
        numbers += d * k if r is None else r * (d + k)
    return numbers * config.num_hidden_layers * size


# LoRA on a model, ours or that of `peft` ----------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A, B and s of one linear, and the frozen linear itself."""

    base: nn.Linear
    A: Float[Tensor, "r k"]
    B: Float[Tensor, "d r"]
    scaling: float

    @property
    def weight(self) -> Float[Tensor, "d k"]:
        """W₀ + s B A, in fp32 or better."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        delta = self.B.detach().to(dtype) @ self.A.detach().to(dtype)
        return self.base.weight.detach().to(dtype) + self.scaling * delta

    def gradient(self, name: str, config: LoRAPruneConfig) -> Float[Tensor, "d k"]:
        """What the criterion multiplies W with."""
        if config.criterion == "magnitude":
            return torch.ones_like(self.base.weight, dtype=torch.float32)
        if config.criterion == "full":
            return checked(f"{name}.weight", self.base.weight).float()
        grad_A = checked(f"{name}: A", self.A)
        grad_B = checked(f"{name}: B", self.B)
        A, B = self.A.detach(), self.B.detach()
        return estimated_gradient(A, B, grad_A, grad_B, self.scaling, config.lr)

    def merged(self) -> nn.Linear:
        """A plain linear that computes the same."""
        d, k = self.base.weight.shape
        linear = nn.Linear(k, d, bias=False, device="meta")
        weight = self.weight.to(self.base.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.base.bias
        return linear


def checked(name: str, parameter: Tensor) -> Tensor:
    """The gradient of a parameter.

    Raises:
        ValueError: there is none, or it holds NaN or ∞.
    """
    if parameter.grad is None:
        raise ValueError(f"{name} has no gradient: call backward() on the loss first")
    bad = int((~parameter.grad.isfinite()).sum())
    if bad:
        raise ValueError(f"the gradient of {name} holds {bad} values NaN or infinite")
    return parameter.grad


def adapter_at(name: str, module: nn.Module) -> Adapter | None:
    """The LoRA adapter that a module carries; None: it is a plain layer.

    Raises:
        ValueError: more than one adapter is active, or one that is no plain LoRA.
    """
    if not hasattr(module, "lora_A"):
        return None
    base = getattr(module, "base_layer", None) or module.base  # `peft`'s, or ours
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"{name} has a {type(base).__name__} below its adapter; it must be a plain"
            " nn.Linear of floats"
        )
    active = getattr(module, "active_adapters", None) or module.active
    if len(active) != 1:
        raise ValueError(f"{name} has active adapters {list(active)}; it must be one")
    if module.merged:
        raise ValueError(f"{name} has its adapter merged: unmerge it first")
    [adapter] = active
    for special in ("lora_magnitude_vector", "magnitude", "start_A"):
        if adapter in getattr(module, special, {}):
            raise ValueError(
                f"{name} has more than A and B ({special}): take plain LoRA, whose"
                " weight is W₀ + s B A"
            )
    A, B = module.lora_A[adapter], module.lora_B[adapter]
    if isinstance(A, nn.Module):
        A, B = A.weight, B.weight
    return Adapter(base, A, B, module.scaling[adapter])


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """All linears that carry LoRA, by the name that they have in the plain model."""
    found = {}
    for name, module in model.named_modules():
        adapter = adapter_at(name, module)
        if adapter is not None:
            found[name] = adapter
    if not found:
        raise ValueError(
            f"model={type(model).__name__} has no LoRA; of a model of `peft` give what"
            " get_base_model() returns"
        )
    return found


# The walk over a model ----------------------------------------------------------------


def prunable(model: nn.Module, first: float = 0.1, last: int = 1) -> dict[str, Group]:
    """Heads and channels of a plain model, but for those of the outer layers.

    The residual stream is left out: it is shared by all layers, and no mask on the
    outputs of one linear takes a channel of it away.

    Args:
        first: the share of the layers that is left whole at the input, rounded down.
        last: how many are left whole at the output.
    """
    layers = list(calibration.blocks(model))
    inner = layers[int(len(layers) * first) : len(layers) - last]
    found = {}
    for name, group in dependencies.groups(model).items():
        in_layer = any(name.startswith(f"{layer}.") for layer in inner)
        if in_layer and not strangers(model, group):
            found[name] = group
    return found


def linear_of(member: Member) -> str:
    """The name of the module that holds a parameter."""
    return member.name.rpartition(".")[0]


def strangers(model: nn.Module, group: Group) -> list[str]:
    """Those members of a group that are of no linear, plain or with an adapter."""
    found = []
    for member in group.members:
        module = model.get_submodule(linear_of(member))
        if not isinstance(module, nn.Linear) and not hasattr(module, "lora_A"):
            found.append(member.name)
    return found


def weights_of(group: Group, columns: bool) -> dict[str, Member]:
    """The members of a group that are scored, by the name of their linear."""
    return {
        linear_of(member): member
        for member in group.members
        if member.name.endswith(".weight") and (columns or member.axis == 0)
    }


def importance(
    adapted: Mapping[str, Adapter], group: Group, config: LoRAPruneConfig
) -> Float[Tensor, "units"]:
    """Ĝ of one group after a backward pass: summed over its linears that carry LoRA."""
    total = torch.zeros(group.units)
    for name, member in weights_of(group, config.columns).items():
        if name not in adapted:
            continue
        adapter = adapted[name]
        gradient = adapter.gradient(name, config)
        weights = weight_importance(adapter.weight, gradient, config.power)
        scores = by_unit(weights, member.axis, member.index).to(total)
        if config.normalise:
            scores = scores / (scores.norm() + 1e-8)
        total += scores
    return total


class Pruner:
    """Follows the training of LoRA, and masks more and more units.

        loss.backward()
        pruner.step()          # before the gradients are used up
        optimizer.step()

    Masks sit on the outputs of linears, as hooks: nothing of the weights changes.
    """

    def __init__(
        self, model: nn.Module, groups: Mapping[str, Group], config: LoRAPruneConfig
    ) -> None:
        """`groups` are those of the model before it got LoRA, as `prunable` gives them.

        Raises:
            ValueError: the model has no LoRA; a group has no linear with LoRA that is
                asked, or is of more than linears.
        """
        self.model = model
        self.groups = dict(groups)
        self.config = config
        self.adapted = adapters(model)
        for name, group in groups.items():
            asked = list(weights_of(group, config.columns))
            if not any(linear in self.adapted for linear in asked):
                raise ValueError(f"groups: {name} has no linear with LoRA, of {asked}")
            if strangers(model, group):
                raise ValueError(
                    f"groups: {name} holds {strangers(model, group)[0]}, which is of no"
                    " linear: only heads and channels can be masked"
                )
        self.steps = 0
        self.average: dict[str, Tensor] = {}
        self.kept = {
            name: torch.ones(group.units, dtype=torch.bool)
            for name, group in groups.items()
        }
        self.hooks = []
        for group in groups.values():
            for name, member in weights_of(group, columns=False).items():
                linear = model.get_submodule(name)
                self.hooks.append(
                    linear.register_forward_hook(self.masking(group, member))
                )

    def masking(self, group: Group, member: Member) -> Callable:
        """A hook that multiplies an output by M."""

        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            gone = ~self.kept[group.name]
            if not gone.any():
                return None
            mask = torch.ones(member.size, dtype=out.dtype, device=out.device)
            mask[member.index[gone].flatten()] = 0
            return out * mask

        return hook

    @torch.no_grad()
    def step(self) -> None:
        """Score all units by the gradients that are there; prune if it is time."""
        config = self.config
        found = {
            name: importance(self.adapted, group, config)
            for name, group in self.groups.items()
        }
        self.steps += 1
        for name, new in found.items():
            old = self.average.get(name)
            self.average[name] = moving_average(old, new, config.decay)
        cooling = self.steps >= config.steps - config.cooldown * config.steps
        if self.steps % config.every and not cooling:
            return
        share = share_pruned(
            self.steps, config.steps, config.warmup, config.cooldown, config.final
        )
        for name, group in self.groups.items():
            count = units_pruned(group.units, share)
            self.kept[name] = prune_to(self.average[name], self.kept[name], count)

    def remove(self) -> None:
        """Take the masks off the model."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def state_dict(self) -> dict[str, Tensor]:
        """All that a training needs to go on, besides the model and its optimiser."""
        state = {"steps": torch.tensor(self.steps)}
        for name, kept in self.kept.items():
            state[f"{name}.kept"] = kept
        for name, average in self.average.items():
            state[f"{name}.average"] = average
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there.

        Raises:
            ValueError: it is the state of other groups.
        """
        shapes = {"steps": ()}
        for name, group in self.groups.items():
            shapes[f"{name}.kept"] = (group.units,)
            if int(state.get("steps", 0)):
                shapes[f"{name}.average"] = (group.units,)
        if state.keys() != shapes.keys():
            other = sorted(state.keys() ^ shapes.keys())
            raise ValueError(f"state: {other[0]} is in it and not asked, or lacking")
        for name, tensor in state.items():
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(
                    f"state: {name} has shape {tuple(tensor.shape)}, not {shapes[name]}"
                )
        self.steps = int(state["steps"])
        for name in self.groups:
            self.kept[name] = state[f"{name}.kept"].bool()
            if self.steps:
                self.average[name] = state[f"{name}.average"].clone()


def finish(
    model: nn.Module,
    groups: Mapping[str, Group],
    kept: Mapping[str, Bool[Tensor, "units"]],
) -> nn.Module:
    """Merge LoRA into the weights and cut what is not kept: a smaller, plain model.

    Raises:
        ValueError: `kept` is of other groups, or keeps nothing of one. The model is
            then as it was.
    """
    units = {}
    for name, mask in kept.items():
        if name not in groups or mask.shape != (groups[name].units,):
            raise ValueError(
                f"kept[{name!r}] has shape {tuple(mask.shape)}, and groups has"
                f" {groups[name].units if name in groups else 'no group'} of that name"
            )
        if not mask.any():
            raise ValueError(f"kept[{name!r}] keeps nothing: one unit must stay")
        units[name] = mask.nonzero().flatten()
    merged = {name: adapter.merged() for name, adapter in adapters(model).items()}
    walk.put_modules(model, merged)
    return dependencies.cut(model, units, known=groups)


def apply(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    config: LoRAPruneConfig,
    groups: Mapping[str, Group],
    optimizer: torch.optim.Optimizer,
) -> nn.Module:
    """Train LoRA on `batches`, prune as it learns, then merge and cut.

    Args:
        model: with LoRA on it; of a `peft` model what get_base_model() returns.
        batches: at least `config.steps` of them; more are not read.
        groups: `prunable(model)` from before it had LoRA, or some of them.
        optimizer: of the parameters of LoRA.
    Raises:
        ValueError: as `Pruner`, or there are too few batches; no mask is left then.
    """
    pruner = Pruner(model, groups, config)
    try:
        for batch in batches:
            optimizer.zero_grad()
            out = model(batch)
            next_token_loss(getattr(out, "logits", out), batch).backward()
            pruner.step()
            optimizer.step()
            if pruner.steps == config.steps:
                break
    finally:
        pruner.remove()
    if pruner.steps < config.steps:
        raise ValueError(
            f"batches holds {pruner.steps} batches; steps={config.steps} needs one each"
        )
    return finish(model, groups, pruner.kept)
