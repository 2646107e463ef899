"""LoRA for each request: tokens of different adapters in one batch, nothing merged.

Sheng et al. 2023 (S-LoRA), https://arxiv.org/abs/2311.03285; Chen et al. 2023 (Punica),
https://arxiv.org/abs/2310.18547. One pass of the shared weights serves all; each token
adds the low-rank change of its own adapter:

    y_t = W x_t + B_a A_a x_t        a = the adapter of token t

    A  (r, k)     B  (d, r), times the adapter's α/r

The factors of all adapters of a batch stand one below the other, A (R, k), and one
beside the other, B (d, R), R the sum of their ranks. So two products serve any number
of adapters; between them, what belongs to others is set to 0:

    Y = X Wᵀ + ((X Aᵀ) ⊙ M) Bᵀ         M (T, R): 1 where the column is token t's own

A linear may have been joined with others of the same x (`fused`): what the adapter adds
then goes to its own outputs of the joint product.

Simplified: every token is multiplied with the factors of all adapters in the batch (the
papers' kernels skip those of others), and all adapters stay in memory. Adapters change
keys and values: what one has stored cannot serve another.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.inference.engine.fused import find

Factors = tuple[Float[Tensor, "r k"], Float[Tensor, "d r"]]
# Settings of `peft`, and the values with which they ask for no more than W + B A
PLAIN = {
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False,),
}


@dataclass(frozen=True)
class Adapter:
    """The factors of each changed linear, by its name in the model; B has the scale."""

    factors: Mapping[str, Factors] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """From a folder as `peft` and `llmlab.peft.lora` write it.

        Raises:
            ValueError: it is no LoRA, or one that does more than add B A.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        if settings.get("peft_type") != "LORA":
            raise ValueError(
                f"{folder}: peft_type={settings.get('peft_type')!r} must be 'LORA'"
            )
        for name, plain in PLAIN.items():
            value = settings.get(name, plain[0])
            if value not in plain:
                raise ValueError(
                    f"{folder}: {name}={value!r} must be {plain[0]!r}: only W + B A is"
                    " added per request"
                )
        tensors = load_file(folder / "adapter_model.safetensors")
        factors = {}
        for name in sorted(tensors):
            if not name.endswith(".lora_A.weight"):
                continue
            place = name.removesuffix(".lora_A.weight")
            A = tensors.pop(name)
            B = tensors.pop(f"{place}.lora_B.weight")
            module = place.removeprefix("base_model.model.")
            scale = _scale(settings, module, A.shape[0])
            factors[module] = (A.float(), scale * B.float())
        left = sorted(name for name in tensors if not name.endswith(".lora_B.weight"))
        if left:
            raise ValueError(f"{folder}: the tensor {left[0]} is no factor of LoRA")
        return cls(factors)

    @classmethod
    def of(cls, model: nn.Module, adapter: str = "default") -> Adapter:
        """From a model with our LoRA on it, which stays as it is.

        Raises:
            ValueError: it has none of that name.
        """
        factors = {}
        for name, module in model.named_modules():
            if adapter not in getattr(module, "lora_A", ()):
                continue
            if adapter in getattr(module, "magnitude", ()):
                raise ValueError(f"adapter={adapter!r} is DoRA: only B A can be added")
            A = module.lora_A[adapter].detach()
            B = module.lora_B[adapter].detach()
            if adapter in module.start_A:  # PiSSA's and OLoRA's have left the base
                A = torch.cat([A, module.start_A[adapter].detach()])
                B = torch.cat([B, -module.start_B[adapter].detach()], dim=1)
            factors[name] = (A.float().clone(), module.scaling[adapter] * B.float())
        if not factors:
            raise ValueError(f"adapter={adapter!r} is not on the model")
        return cls(factors)


def _scale(settings: dict, module: str, rank: int) -> float:
    """α/r, or α/√r, of one linear."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


class Adapters:
    """All adapters of an engine, on the linears of its model.

    Args:
        model: it is not changed: each linear that an adapter names gets a forward hook,
            which does nothing outside of this engine's passes. `remove` takes them off.
    Raises:
        ValueError: a linear that the model lacks, or factors of other shapes.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        for name, adapter in adapters.items():
            _check(model, name, adapter)
        self.adapters = dict(adapters)
        places = {place for a in self.adapters.values() for place in a.factors}
        self._active: tuple[str, ...] = ()
        self._column: Tensor | None = None  # (T,) which of the active, −1 for none
        # the factors of one set of adapters, side by side, by linear
        self._stacked: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._hooks = []
        for place in sorted(places):
            module, outputs, _ = find(model, place)
            hook = self._hook(place, outputs)
            self._hooks.append(module.register_forward_hook(hook))

    def __contains__(self, name: str) -> bool:
        return name in self.adapters

    def number(self, name: str | None) -> int:
        """0 for the plain model, then 1, 2 … in the order in which they were given."""
        return 0 if name is None else 1 + list(self.adapters).index(name)

    def use(self, names: Sequence[str | None]) -> None:
        """In the next pass token t goes through adapter names[t]; [] ends that."""
        active = tuple(sorted({name for name in names if name is not None}))
        if active and active != self._active:
            self._stacked = {}
        if active:
            self._active = active
            at = {name: i for i, name in enumerate(active)}
            self._column = torch.tensor([at.get(name, -1) for name in names])
        else:
            self._column = None

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, place: str, outputs: slice):
        def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor | None:
            if self._column is None:
                return None
            A, B, owner = self._factors(place)
            if not len(owner):
                return None
            x = inputs[0]
            own = self._column[:, None] == owner  # (T, R)
            narrow = F.linear(x.to(A.dtype), A) * own  # (1, T, R)
            change = F.linear(narrow, B).to(out.dtype)
            if outputs == slice(None):
                return out + change
            out = out.clone()
            out[..., outputs] += change
            return out

        return add

    def _factors(self, place: str) -> tuple[Tensor, Tensor, Tensor]:
        """A (R, k), B (d, R), and whose each of the R columns is."""
        if place not in self._stacked:
            As, Bs, owner = [], [], []
            for i, name in enumerate(self._active):
                if place in self.adapters[name].factors:
                    A, B = self.adapters[name].factors[place]
                    As.append(A)
                    Bs.append(B)
                    owner += [i] * len(A)
            A = torch.cat(As) if As else torch.zeros(0, 1)
            B = torch.cat(Bs, dim=1) if Bs else torch.zeros(1, 0)
            self._stacked[place] = (A, B, torch.tensor(owner))
        return self._stacked[place]


def _check(model: nn.Module, name: str, adapter: Adapter) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"adapters: the name {name!r} must be a word")
    if not isinstance(adapter, Adapter) or not adapter.factors:
        raise ValueError(
            f"adapters[{name!r}] must be an Adapter with factors, not"
            f" {type(adapter).__name__}"
        )
    for place, (A, B) in adapter.factors.items():
        found = find(model, place)
        if found is None:
            raise ValueError(f"adapters[{name!r}]: the model has no layer {place!r}")
        if isinstance(found.module, nn.Embedding):
            raise ValueError(f"adapters[{name!r}]: {place!r} is no linear")
        rows, columns = found.shape
        if A.shape != (A.shape[0], columns) or B.shape != (rows, A.shape[0]):
            raise ValueError(
                f"adapters[{name!r}]: {place!r} is {rows} × {columns}, which A"
                f" {tuple(A.shape)} and B {tuple(B.shape)} do not fit"
            )
