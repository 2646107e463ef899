"""AdapterFusion: at every token, attention over the outputs of several frozen adapters.

Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, section 3.2, for one block and
one token:

    s = softmax_i((W_Q x + b_Q) · (W_K z_i + b_K))        out ← out + Σ_i s_i W_V z_i

    x         (…, d)     what the adapters read, here the query
    z         (…, N, d)  z_i is what adapter i would add: key and value
    N                    adapters
    W_Q, W_K  (d, d)     random at the start
    W_V       (d, d)     starts as the identity: a mean of the adapters

Base and adapters are frozen: only the three matrices train. The scores are not divided
by √d, as in the paper. The authors pull W_V towards the identity with a small penalty,
`value_penalty`; add it to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import checkpoint
from llmlab.peft.adapters import bottleneck, files
from llmlab.peft.adapters.bottleneck import mixtures as fusions

PEFT_TYPE = "ADAPTER_FUSION"
OFF_DIAGONAL = 1e-6  # of W_V at the start, as in the authors' code


@dataclass(frozen=True)
class FusionConfig:
    """Which adapters are fused. They are on the model already, all of one kind."""

    adapters: tuple[str, ...]
    dropout: float = 0.0  # on the scores, while training

    def __post_init__(self) -> None:
        repeats = len(set(self.adapters)) != len(self.adapters)
        if isinstance(self.adapters, str) or repeats or len(self.adapters) < 2:
            raise ValueError(
                f"adapters={self.adapters!r} must be at least two different names"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1, not {self.dropout!r}"
            )


def attend(
    query: Float[Tensor, "*batch d"],
    key: Float[Tensor, "*batch N d"],
    value: Float[Tensor, "*batch N d"],
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch N"]]:
    """(Σ_i s_i value_i, s) with s = softmax of query · key_i, unscaled."""
    s = torch.softmax((query[..., None, :] * key).sum(-1), dim=-1)
    return (s[..., None] * value).sum(-2), s


class Fusion(nn.Module):
    """W_Q, W_K and W_V of one seam, in fp32 even on a half-precision base."""

    def __init__(
        self,
        d: int,
        config: FusionConfig,
        like: Tensor,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        kind = {"device": like.device, "dtype": dtype}
        self.names = config.adapters
        self.dropout = config.dropout
        self.query = nn.utils.skip_init(nn.Linear, d, d, **kind)
        self.key = nn.utils.skip_init(nn.Linear, d, d, **kind)
        self.value = nn.utils.skip_init(nn.Linear, d, d, bias=False, **kind)
        self.weights: Tensor | None = None  # s of the last forward pass, to look at
        with torch.no_grad():
            for linear in (self.query, self.key):
                nn.init.normal_(linear.weight, std=0.02, generator=generator)
                nn.init.zeros_(linear.bias)
            self.value.weight.fill_(OFF_DIAGONAL).fill_diagonal_(1.0)

    def forward(
        self, x: Float[Tensor, "B T d"], z: Float[Tensor, "B T N d"]
    ) -> Float[Tensor, "B T d"]:
        """What is added instead of one adapter's output."""
        query = self.query(x.to(z.dtype))  # (B, T, d)
        key = self.key(z)  # (B, T, N, d)
        if self.dropout and self.training:
            scores = F.dropout((query[..., None, :] * key).sum(-1), self.dropout)
            s = torch.softmax(scores, dim=-1)
            out = (s[..., None] * self.value(z)).sum(-2)
        else:
            out, s = attend(query, key, self.value(z))
        self.weights = s.detach()
        return out


def apply(
    model: nn.Module,
    config: FusionConfig,
    fusion: str = "fusion",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Fuse adapters at every place where they are; the fusion is active from now on.

    Raises:
        ValueError: an adapter is not on the model, or not at the places where the first
            one is; the name is taken.
    """
    bottleneck.check_new(model, fusion)
    for name in config.adapters:
        if name not in bottleneck.names(model):
            raise ValueError(
                f"adapters: {name!r} is not on the model; it has"
                f" {bottleneck.names(model) or 'none'}"
            )
    here = []
    for site in bottleneck.sites(model).values():
        present = [name in site.nets for name in config.adapters]
        if any(present) and not all(present):
            raise ValueError(
                f"adapters={config.adapters!r} are of different kinds: fuse Houlsby's"
                " or Pfeiffer's, not both"
            )
        if all(present):
            here.append(site)
    for site in here:
        like = site.nets[config.adapters[0]].down.weight
        mixer = Fusion(like.shape[1], config, like, generator)
        site.mixers[fusion] = mixer.train(site.training)
        site.configs[fusion] = config
    bottleneck.set_active(model, fusion)
    return model


def set_fusion(model: nn.Module, fusion: str | None) -> None:
    """Make this fusion the active one, which alone trains: its adapters stay frozen.

    None is the plain base.
    """
    bottleneck.set_active(model, fusion)


def remove(model: nn.Module, fusion: str) -> nn.Module:
    """Take a fusion off; its adapters stay."""
    if fusion not in fusions(model):
        raise ValueError(
            f"fusion={fusion!r} is not on the model; it has {fusions(model) or 'none'}"
        )
    return bottleneck.discard(model, [fusion])


def value_penalty(
    model: nn.Module, fusion: str = "fusion", strength: float = 0.01
) -> Tensor:
    """strength · Σ |W_V − 1|² over all places: it keeps W_V near the identity.

    Add it to the loss.
    """
    total = 0
    for site in bottleneck.sites(model).values():
        if fusion in site.mixers:
            W_V = site.mixers[fusion].value.weight
            identity = torch.eye(len(W_V), device=W_V.device)
            total = total + (W_V - identity).square().sum()
    return strength * total


def weights(
    model: nn.Module, fusion: str = "fusion"
) -> dict[str, Float[Tensor, "B T N"]]:
    """s of the last forward pass, by place: how much each adapter counted per token."""
    found = {
        path: site.mixers[fusion].weights
        for path, site in bottleneck.sites(model).items()
        if fusion in site.mixers
    }
    if not found or any(w is None for w in found.values()):
        raise ValueError(f"fusion={fusion!r} has not run yet, or is not on the model")
    return found


def num_parameters(model: nn.Module, places: int | None = None) -> int:
    """3·d² + 2·d per place; by default there is one place per block."""
    d = model.config.hidden_size
    if places is None:
        places = len(bottleneck.blocks(model))
    return places * (3 * d * d + 2 * d)


def save(model: nn.Module, folder: str | Path, fusion: str = "fusion") -> None:
    """Write the fusion's matrices (safetensors). Its adapters have folders of their
    own.
    """
    files.save(model, folder, fusion, PEFT_TYPE)


def load(model: nn.Module, folder: str | Path, fusion: str = "fusion") -> nn.Module:
    """Put a fusion on a `model` that has its adapters, under the names that they had.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's file, an adapter that is not there, or a wrong
            shape. The model is then as it was.
    """
    settings, tensors = checkpoint.read(folder, PEFT_TYPE)
    active = {path: site.active for path, site in bottleneck.sites(model).items()}
    apply(model, files.settings_of(FusionConfig, settings), fusion)
    return files.fill(model, fusion, tensors, undo=lambda: _undo(model, fusion, active))


def _undo(model: nn.Module, fusion: str, active: dict[str, str | None]) -> None:
    remove(model, fusion)
    for path, site in bottleneck.sites(model).items():
        site.active = active[path]
        for name, net in site.nets.items():
            net.requires_grad_(name == site.active)
