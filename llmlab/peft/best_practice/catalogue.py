"""Every method of this part as data: what it trains at one budget, and what it costs.

The budget is that of LoRA at rank 1 on all linears of the course model: 9,728 numbers,
0.93% of the model. Each method is sized to come as near to it as its shape allows;
(IA)³ and BitFit have a size of their own, which is smaller.

    merges    whether inference can cost what the base costs: the change fits into the
              weights
    extra     what stays in the forward pass if it does not
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

import torch
from torch import nn

from llmlab.peft import walk

BUDGET = 9_728
ADAM_BYTES = 12  # of a trained number: gradient, momentum and variance, in fp32


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    module: str  # llmlab.peft.<module>; "" is full fine-tuning
    config: str = ""  # the name of its settings' class
    settings: dict[str, object] = field(default_factory=dict)
    merges: bool = False
    extra: str = ""
    paper: str = ""  # bibtex key

    def load(self) -> ModuleType:
        """The method's own file."""
        return import_module(f"llmlab.peft.{self.module}")

    def apply(self, model: nn.Module, steps: int, seed: int = 0) -> nn.Module:
        """Put the method on `model` for a run of `steps`, drawn from `seed`; in place.
        What trains is marked by requires_grad.
        """
        torch.manual_seed(seed)
        if not self.module:
            return model.requires_grad_(True)
        settings = dict(self.settings)
        if self.module == "adalora.adalora":  # its budget is a schedule of steps
            settings |= {"total_step": steps, "tinit": steps // 8, "tfinal": steps // 4}
        module = self.load()
        return module.apply(model, getattr(module, self.config)(**settings))


ALL = {"target_modules": walk.ALL_LINEAR}
NONE, TOKENS, PREFIX, LAYERS = "", "longer input", "longer cache", "more layers"

METHODS = (
    Method("full fine-tuning", "", "", {}, True, NONE),
    Method("BitFit", "bitfit", "BitFitConfig", ALL, True, NONE, "zaken2021bitfit"),
    Method("(IA)³", "ia3", "IA3Config", {}, True, NONE, "liu2022fewshot"),
    Method(
        "Prompt Tuning",
        "prompt_and_prefix_tuning.prompt_tuning",
        "PromptTuningConfig",
        {"num_virtual_tokens": 76},
        False,
        TOKENS,
        "lester2021power",
    ),
    Method(
        "P-Tuning",
        "p_tuning.p_tuning",
        "PTuningConfig",
        {"num_virtual_tokens": 20, "hidden": 24},
        False,
        TOKENS,
        "liu2021gpt",
    ),
    Method(
        "Prefix Tuning",
        "prompt_and_prefix_tuning.prefix_tuning",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 20, "hidden": 13},
        False,
        PREFIX,
        "li2021prefix",
    ),
    Method(
        "P-Tuning v2",
        "p_tuning.p_tuning_v2",
        "PTuningV2Config",
        {"num_virtual_tokens": 19},
        False,
        PREFIX,
        "liu2022ptuning",
    ),
    Method(
        "Houlsby adapters",
        "adapters.adapters",
        "AdapterConfig",
        {"kind": "houlsby", "bottleneck": 4},
        False,
        LAYERS,
        "houlsby2019adapters",
    ),
    Method(
        "Pfeiffer adapters",
        "adapters.adapters",
        "AdapterConfig",
        {"kind": "pfeiffer", "bottleneck": 9},
        False,
        LAYERS,
        "pfeiffer2021adapterfusion",
    ),
    Method(
        "LoRA",
        "lora.lora",
        "LoRAConfig",
        ALL | {"r": 1, "alpha": 2},
        True,
        NONE,
        "hu2021lora",
    ),
    Method(
        "AdaLoRA",
        "adalora.adalora",
        "AdaLoRAConfig",
        ALL | {"init_r": 2, "target_r": 1, "alpha": 4},
        True,
        NONE,
        "zhang2023adalora",
    ),
    Method(
        "QLoRA",
        "qlora.qlora",
        "QLoRAConfig",
        ALL | {"r": 1, "alpha": 2},
        False,
        "4-bit base",
        "dettmers2023qlora",
    ),
    Method(
        "MAM adapter",
        "mam_and_unipelt.mam",
        "MAMConfig",
        {"num_virtual_tokens": 6, "projection": False, "hidden": None, "bottleneck": 6},
        False,
        f"{PREFIX}, {LAYERS}",
        "he2022towards",
    ),
    Method(
        "UniPELT",
        "mam_and_unipelt.unipelt",
        "UniPELTConfig",
        {
            "num_virtual_tokens": 5,
            "projection": False,
            "hidden": None,
            "bottleneck": 3,
            "r": 1,
            "alpha": 2,
        },
        False,
        f"{PREFIX}, {LAYERS}",
        "mao2022unipelt",
    ),
)


def method(name: str) -> Method:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    for row in METHODS:
        if row.name == name:
            return row
    raise ValueError(
        f"name={name!r} is not in the catalogue: use one of"
        f" {', '.join(m.name for m in METHODS)}"
    )


def hooks(model: nn.Module) -> dict[str, Callable]:
    """What a training loop must do for the method on `model` besides the loss: {} for
    all but AdaLoRA.
    """
    from llmlab.peft import adalora
    from llmlab.peft.adalora import budget

    if not walk.installed(model, adalora.SVDLinear):
        return {}
    return {
        "penalty": lambda: adalora.regularizer(model),
        "after_step": budget.RankAllocator(model).step,
    }


def optimizer_bytes(model: nn.Module) -> int:
    """Gradient and Adam's two averages, in fp32, of whatever trains."""
    return ADAM_BYTES * walk.trainable(model)[0]
