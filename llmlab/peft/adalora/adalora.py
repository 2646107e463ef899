"""AdaLoRA: low-rank changes in singular-value form, with a shared budget of ranks.

The budget moves to the layers where it is worth most.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512, equations 3 to 12:

    h = W₀ x + (α/r₀) P Λ Q x         ΔW as r₀ triplets: P's column, λ, Q's row
    R = ‖PᵀP − I‖ + ‖QQᵀ − I‖         added to the loss: P and Q stay near orthogonal,
                                      and λ near singular values
    Ī ← β₁Ī + (1 − β₁)|w · ∂E/∂w|     smoothed sensitivity of a triplet's number w
    Ū ← β₂Ū + (1 − β₂)|I − Ī|         how much it varies
    S = s(λ) + mean s(P) + mean s(Q)  s = Ī · Ū, one score per triplet
    b(t)                              falls from b₀ to b_T by a cubic; only the b(t)
                                      best triplets keep their λ, the others get 0

Only λ is masked, never P or Q: the gradient of λ is pᵀ(∂E/∂W)qᵀ, so a masked triplet
can earn its way back.

    P  (d, r₀)  lora_B         W₀ (d, k)  frozen weight
    Λ  (r₀, 1)  lora_E, 0      r₀   init_r, the rank at the start
                at the start   b₀   r₀ · layers
    Q  (r₀, k)  lora_A         b_T  target_r · layers

`lora_A`, `lora_B` and `lora_E` are the names of the authors' code, of `peft` and of the
files.

As in the authors' code, not in the text: norms in R are not squared, and R is their
mean; b(t) falls from t_i on (the printed equation 12 would start above b₀); 10⁻⁵ stands
beside r₀. Budget and scores are in `budget.py`, files in `files.py`.
Simplified: one adapter at a time, as training one budget allows no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import walk


@dataclass(frozen=True)
class AdaLoRAConfig:
    """Where the changes go, and how the mean rank falls from `init_r` to `target_r`."""

    total_step: int  # T
    target_r: int = 8
    init_r: int = 12
    alpha: float = 8
    dropout: float = 0.0  # on the input of Q, while training
    target_modules: walk.Targets = ("q_proj", "v_proj")
    tinit: int = 0  # t_i: steps at the full budget
    tfinal: int = 0  # t_f: steps at the end with the ranks fixed
    delta_t: int = 1  # mask each so many steps
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5  # γ, of R in the loss

    def __post_init__(self) -> None:
        for name in ("total_step", "target_r", "init_r", "delta_t"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} must be an integer of at least 1, not {value!r}"
                )
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r={self.target_r} must be at most init_r={self.init_r}: ranks"
                " only fall"
            )
        negative = min(self.tinit, self.tfinal) < 0
        if negative or self.tinit + self.tfinal >= self.total_step:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} must leave steps of"
                f" total_step={self.total_step}"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must lie between 0 and 1"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1, not {self.dropout!r}"
            )
        if self.orth_reg_weight < 0:
            raise ValueError(
                f"orth_reg_weight={self.orth_reg_weight!r} must not be negative"
            )

    @property
    def scaling(self) -> float:
        """α/r₀; it stays when triplets are dropped.

        α = 0 stands for α = r₀, as in the authors' code.
        """
        alpha = self.alpha if self.alpha > 0 else self.init_r
        return alpha / (self.init_r + 1e-5)


def delta_weight(
    P: Float[Tensor, "d r"],
    lam: Float[Tensor, "r 1"],
    Q: Float[Tensor, "r k"],
    scaling: float,
) -> Float[Tensor, "d k"]:
    """ΔW = (α/r₀) P Λ Q, in fp32 or better."""
    dtype = torch.promote_types(P.dtype, torch.float32)
    return scaling * (P.to(dtype) @ (lam * Q).to(dtype))


def triplets(
    x: Float[Tensor, "*batch k"],
    P: Float[Tensor, "d r"],
    lam: Tensor,
    Q: Float[Tensor, "r k"],
    scaling: float,
) -> Float[Tensor, "*batch d"]:
    """ΔW x without building ΔW.

    Λ and the scale are multiplied into Q, which is smaller than the batch.
    """
    narrow = F.linear(x, Q * (lam * scaling))  # (*batch, r)
    return F.linear(narrow, P)  # (*batch, d)


def orthogonality(
    P: Float[Tensor, "d r"], Q: Float[Tensor, "r k"]
) -> tuple[Tensor, Tensor]:
    """‖PᵀP − I‖ and ‖QQᵀ − I‖ (Frobenius): equation 4, before the squares."""
    eye = torch.eye(Q.shape[0], dtype=Q.dtype, device=Q.device)
    return torch.linalg.norm(P.T @ P - eye), torch.linalg.norm(Q @ Q.T - eye)


FACTORS = ("lora_A", "lora_E", "lora_B")
# What the budget knows of a layer: Ī and Ū of each factor, and which triplets it keeps.
# They are buffers, so that a state dict holds all that training needs to go on.
SMOOTH = {factor: f"smooth_{factor}" for factor in FACTORS}
UNSURE = {factor: f"unsure_{factor}" for factor in FACTORS}
KNOWN = (*SMOOTH.values(), *UNSURE.values(), "kept")


class SVDLinear(walk.Wrapper):
    """A frozen linear, the triplets beside it, and what the budget knows of them."""

    def __init__(
        self,
        base: nn.Module,
        config: AdaLoRAConfig,
        adapter: str,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(base)
        self.config = config
        self.adapter = adapter
        # (W₀, W) while merged. In a tuple, they are no parameters of this module.
        self.saved_weight: tuple[nn.Parameter, ...] = ()
        linear = walk.base_of(base)
        r = config.init_r
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        like = {"device": linear.weight.device, "dtype": dtype}

        def normal(*shape):
            return torch.empty(*shape, **like).normal_(std=0.02, generator=generator)

        self.lora_A = nn.Parameter(normal(r, linear.in_features))
        self.lora_E = nn.Parameter(torch.zeros(r, 1, **like))
        self.lora_B = nn.Parameter(normal(linear.out_features, r))
        # how often the budget was asked, and what it knows: nothing yet
        self.register_buffer("steps", torch.tensor(0, device=linear.weight.device))
        for name in KNOWN:
            self.register_buffer(name, None)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Make room for what the state dict knows, and forget what it does not know."""
        for name in KNOWN if f"{prefix}steps" in state_dict else ():
            found = state_dict.get(f"{prefix}{name}")
            if found is not None:
                found = torch.empty_like(found, device=self.lora_A.device)
            setattr(self, name, found)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def merged(self) -> bool:
        """Whether ΔW is in the weight."""
        return bool(self.saved_weight)

    @property
    def weight(self) -> Float[Tensor, "d k"]:
        """W₀ + ΔW, in the dtype of W₀; without dropout."""
        W = walk.weight_of(self.base)
        return W if self.merged else (W + self.delta()).to(W.dtype)

    @property
    def adds(self) -> bool:
        """ΔW x does not depend on the base's weight."""
        return True

    def delta(self) -> Float[Tensor, "d k"]:
        """ΔW, in fp32 or better."""
        return delta_weight(self.lora_B, self.lora_E, self.lora_A, self.config.scaling)

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d"]:
        """W₀ x + ΔW x; the plain W x while merged."""
        out = self.base(x)
        if self.merged:
            return out
        x = x.to(self.lora_A.dtype)
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        change = triplets(x, self.lora_B, self.lora_E, self.lora_A, self.config.scaling)
        return (out + change).to(out.dtype)

    @property
    def rank(self) -> int:
        """Triplets with λ ≠ 0."""
        return int((self.lora_E != 0).sum())

    def keep_only(self, kept: Tensor) -> None:
        """Drop all triplets but those of the mask `kept`. The scale stays α/r₀."""
        trains = self.lora_A.requires_grad
        A = self.lora_A.detach()[kept].clone()
        E = self.lora_E.detach()[kept].clone()
        B = self.lora_B.detach()[:, kept].clone()
        self.lora_A = nn.Parameter(A, requires_grad=trains)
        self.lora_E = nn.Parameter(E, requires_grad=trains)
        self.lora_B = nn.Parameter(B, requires_grad=trains)
        for name in KNOWN:
            known = getattr(self, name)
            if known is not None:
                by_column = name.endswith("lora_B")
                setattr(self, name, known[:, kept] if by_column else known[kept])

    def merge(self) -> None:
        """W₀ + ΔW, summed in fp32 or better.

        A weight that was tied to another layer's is untied.
        """
        linear = walk.mergeable(self)
        W = linear.weight
        merged = (W.detach() + self.delta().detach()).to(W.dtype)
        linear.weight = nn.Parameter(merged, requires_grad=False)
        self.saved_weight = (W, linear.weight)

    def unmerge(self) -> None:
        """Put the very same W₀ back."""
        if not self.merged:
            return
        linear = walk.base_of(self.base)
        W, merged = self.saved_weight
        if linear.weight is not merged:
            raise ValueError(
                "unmerge: the weight has changed since: take off first what was merged"
                " on top"
            )
        linear.weight = W
        self.saved_weight = ()


def apply(
    model: nn.Module,
    config: AdaLoRAConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and give its target linears triplets that train.

    Changes any `model` of `nn.Linear`s in place.

    Raises:
        ValueError: the model has an AdaLoRA adapter already, the name is bad, or a
            target names no linear.
    """
    if not adapter or "." in adapter:
        raise ValueError(f"adapter={adapter!r} must be a name without dots")
    for layer in walk.installed(model, SVDLinear).values():
        name = layer.adapter
        raise ValueError(
            f"adapter={adapter!r}: the model has the AdaLoRA adapter {name!r} already;"
            " remove it first"
        )
    # before anything changes: it may raise
    found = walk.find(model, config.target_modules)
    for name in found:
        walk.check_drops_nothing(model, name, config.dropout)
    model.requires_grad_(False)
    for name, layer in found.items():
        walk.replace(model, name, SVDLinear(layer, config, adapter, generator))
    return model


def layers_of(model: nn.Module) -> dict[str, SVDLinear]:
    """The layers with triplets by name.

    Raises:
        ValueError: there are none.
    """
    layers = walk.installed(model, SVDLinear)
    if not layers:
        raise ValueError(
            "the model has no AdaLoRA adapter: apply(model, config) puts one on"
        )
    return layers


def regularizer(model: nn.Module) -> Tensor:
    """γ · mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖ over all layers: add it to the loss."""
    layers = list(layers_of(model).values())
    norms = []
    for layer in layers:
        norms += orthogonality(layer.lora_B, layer.lora_A)
    gamma = layers[0].config.orth_reg_weight
    return gamma * (torch.stack(norms).sum() / len(norms))


def ranks(model: nn.Module) -> dict[str, int]:
    """Triplets in use (λ ≠ 0) by layer."""
    return {name: layer.rank for name, layer in layers_of(model).items()}


def merge(model: nn.Module) -> None:
    """Fold the triplets into the weights. Inference then costs what the base costs."""
    if any(layer.merged for layer in layers_of(model).values()):
        raise ValueError(
            "the adapter is merged into the weights already: unmerge(model) first"
        )
    for layer in layers_of(model).values():
        walk.mergeable(layer)  # before anything changes, since it may raise
    for layer in layers_of(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the weights are again the very tensors that they were."""
    for layer in layers_of(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge for good: `model` is left with plain linears."""
    if not any(layer.merged for layer in layers_of(model).values()):
        merge(model)
    for name, layer in layers_of(model).items():
        walk.replace(model, name, layer.base)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take the adapter off: `model` is the base again, bit for bit (still frozen)."""
    unmerge(model)
    for name, layer in layers_of(model).items():
        walk.replace(model, name, layer.base)
    return model
