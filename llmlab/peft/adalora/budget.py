"""AdaLoRA's budget: which triplets are worth their place, step by step.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512, equations 7 to 12. The order within
a step matters:

    loss.backward()  →  optimizer.step()  →  allocator.step(t)  →  optimizer.zero_grad()

since the sensitivity |w · ∂E/∂w| needs the gradient that `zero_grad` throws away, and
the mask must come after the update, which moves a masked λ off 0. As in the authors'
code, w is what the update made of it; algorithm 1 scores before that.

    Ī  smoothed sensitivity      t_i, t_f  steps before and after the budget falls
    Ū  smoothed uncertainty      b         triplets that keep their λ, over all layers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llmlab.peft.adalora.adalora import (
    FACTORS,
    SMOOTH,
    UNSURE,
    AdaLoRAConfig,
    layers_of,
)


def budget(step: int, config: AdaLoRAConfig, layers: int) -> int:
    """b(t), in triplets of all layers: b₀ until t_i, then a cubic, rounded down.

    b(t) = b_T + (b₀ − b_T)(1 − (t − t_i)/(T − t_i − t_f))³
    """
    first = config.init_r * layers  # b₀
    last = config.target_r * layers  # b_T
    end = config.total_step - config.tfinal  # T − t_f
    if step <= config.tinit:
        return first
    if step > end:
        return last
    left = 1 - (step - config.tinit) / (end - config.tinit)
    return int((first - last) * left**3 + last)


def masks_now(step: int, config: AdaLoRAConfig) -> bool:
    """Whether the budget is enforced at this step.

    It is, every Δ_T steps while the budget falls, and at each step afterwards.
    """
    end = config.total_step - config.tfinal
    return step >= end or (step > config.tinit and step % config.delta_t == 0)


def update(
    smooth: Float[Tensor, "*s"],
    unsure: Float[Tensor, "*s"],
    w: Tensor,
    grad: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """One step of Ī and Ū, in place (equations 9 and 10); |I − Ī| uses the new Ī."""
    now = (w * grad).abs()
    smooth.mul_(beta1).add_(now, alpha=1 - beta1)
    unsure.mul_(beta2).add_(now.sub_(smooth).abs_(), alpha=1 - beta2)


def triplet_scores(
    s_P: Float[Tensor, "d r"], s_lam: Float[Tensor, "r 1"], s_Q: Float[Tensor, "r k"]
) -> Float[Tensor, "r"]:
    """S = s(λ) + mean s(P) + mean s(Q), with s = Ī · Ū (equations 7 and 11)."""
    return s_lam.flatten() + (s_Q.mean(1) + s_P.mean(0))


def keep_best(
    scores: dict[str, Float[Tensor, "r"]], b: int
) -> dict[str, Bool[Tensor, "r"]]:
    """Which triplets are among the b best of all layers.

    Those that tie with the best one left out are left out too.
    """
    every = torch.cat(list(scores.values()))
    if b >= len(every):
        return {
            name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()
        }
    threshold = every.kthvalue(len(every) - b).values  # the best score left out
    return {name: s > threshold for name, s in scores.items()}


@dataclass
class RankAllocator:
    """Ī and Ū of every number of every triplet, and the masks that follow from them.

    The layers hold them, as buffers: a new allocator on a model with the state dict of
    an old one goes on where that stopped.
    """

    model: nn.Module

    def __post_init__(self) -> None:
        self.layers = layers_of(self.model)
        self.config = next(iter(self.layers.values())).config

    @property
    def smooth(self) -> dict[str, Tensor]:
        """Ī, by `<layer>.<factor>`; empty before the first step and after the last."""
        return self._known(SMOOTH)

    @property
    def unsure(self) -> dict[str, Tensor]:
        """Ū, likewise."""
        return self._known(UNSURE)

    def _known(self, names: dict[str, str]) -> dict[str, Tensor]:
        found = {}
        for name, layer in self.layers.items():
            for factor in FACTORS:
                known = getattr(layer, names[factor])
                if known is not None:
                    found[f"{name}.{factor}"] = known
        return found

    @property
    def kept(self) -> dict[str, Tensor] | None:
        """The masks of the last allocation, by layer."""
        masks = {name: layer.kept for name, layer in self.layers.items()}
        return None if any(mask is None for mask in masks.values()) else masks

    @kept.setter
    def kept(self, masks: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.kept = masks[name]

    @torch.no_grad()
    def step(self, t: int) -> int:
        """Call once per step, t = 0, 1, …, before gradients are zeroed.

        Returns the budget b(t).

        Raises:
            ValueError: a gradient is missing, or t is not the next step.
        """
        self._check_next(t)
        b = budget(t, self.config, len(self.layers))
        end = self.config.total_step - self.config.tfinal
        if t < end:
            self._observe()
        if masks_now(t, self.config):
            if t <= end:
                self.kept = keep_best(self.scores(), b)
            self._mask()
        for layer in self.layers.values():
            if t == end:  # the ranks are final
                for name in (*SMOOTH.values(), *UNSURE.values()):
                    setattr(layer, name, None)
            layer.steps += 1
        return b

    def _check_next(self, t: int) -> None:
        """Raises: ValueError: the layers have taken more or fewer steps than t."""
        # one transfer from an accelerator, not one for each layer
        taken = torch.stack([layer.steps for layer in self.layers.values()]).tolist()
        for name, steps in zip(self.layers, taken, strict=True):
            if steps != t:
                raise ValueError(
                    f"t={t} is not the next step: {name} has taken {steps}."
                    " To go on with training, load the state dict of the model that"
                    " was trained: it holds what the budget knows, and an adapter's"
                    " folder does not"
                )

    def _observe(self) -> None:
        """Update Ī and Ū of every number from its gradient."""
        for name, layer in self.layers.items():
            for factor in FACTORS:
                key = f"{name}.{factor}"
                w = getattr(layer, factor)
                if w.grad is None:
                    raise ValueError(
                        f"{key} has no gradient: call step after backward and before"
                        " zero_grad"
                    )
                for known in (SMOOTH[factor], UNSURE[factor]):
                    if getattr(layer, known) is None:
                        setattr(layer, known, torch.zeros_like(w))
                smooth = getattr(layer, SMOOTH[factor])
                unsure = getattr(layer, UNSURE[factor])
                update(smooth, unsure, w, w.grad, self.config.beta1, self.config.beta2)

    def scores(self) -> dict[str, Tensor]:
        """S of each triplet, by layer."""
        unsure = self.unsure
        s = {key: smooth * unsure[key] for key, smooth in self.smooth.items()}
        found = {}
        for name in self.layers:
            s_P = s[f"{name}.lora_B"]
            s_lam = s[f"{name}.lora_E"]
            s_Q = s[f"{name}.lora_A"]
            found[name] = triplet_scores(s_P, s_lam, s_Q)
        return found

    def _mask(self) -> None:
        """λ = 0 for the triplets that were not kept."""
        for name, kept in (self.kept or {}).items():
            self.layers[name].lora_E.masked_fill_(~kept[:, None], 0.0)
