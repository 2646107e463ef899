"""Prompt Tuning: train the embeddings of a few tokens that come before every input.

Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2:

    Pr_{θ;θ_P}(Y | [P; X])        P (p, d) trained, everything else frozen

    p  virtual tokens    d  hidden_size    X  the embedded input    V  vocabulary

P starts as rows of the model's own embedding ("vocab": drawn from the most frequent
tokens; "text": those of a text), or as noise, uniform on [−0.5, 0.5] as in section 3.2
(`peft` draws it from N(0, 1)). The paper's class-label start is "text" with the labels'
tokens. Simplified: no prompt ensembling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft.prompt_and_prefix_tuning import files, virtual_tokens
from llmlab.peft.prompt_and_prefix_tuning.virtual_tokens import (
    adapters,
    embedding_of,
    fold,
    remove,
    set_adapter,
    shape_of,
)

__all__ = [
    "PromptTuningConfig",
    "adapters",
    "apply",
    "fold",
    "load",
    "num_parameters",
    "remove",
    "save",
    "set_adapter",
]
STARTS = ("vocab", "text", "random")


@dataclass(frozen=True)
class PromptTuningConfig:
    """How many virtual tokens, and where they start."""

    num_virtual_tokens: int = 20
    init: str = "vocab"
    # for "text": token ids, cut or repeated to num_virtual_tokens
    init_tokens: tuple[int, ...] = ()
    # for "vocab": draw from this many first ids (a BPE vocabulary begins with the
    # frequent tokens)
    most_frequent: int = 5000

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "most_frequent"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} must be an integer of at least 1, not {value!r}"
                )
        if self.init not in STARTS:
            raise ValueError(
                f"init={self.init!r} must be one of {', '.join(map(repr, STARTS))}"
            )
        if self.init == "text" and not self.init_tokens:
            raise ValueError(
                "init='text' needs init_tokens, the ids of the text to start from"
            )


def start(
    embedding: Float[Tensor, "V d"],
    config: PromptTuningConfig,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "p d"]:
    """P at step 0, a copy: training it must not move the vocabulary."""
    V, d = embedding.shape
    p = config.num_virtual_tokens
    if config.init == "random":
        return (torch.rand(p, d, generator=generator) - 0.5).to(embedding.device)
    if config.init == "vocab":
        rows = torch.randint(min(V, config.most_frequent), (p,), generator=generator)
    else:
        ids = torch.tensor(config.init_tokens)
        rows = ids.repeat(math.ceil(p / len(ids)))[:p]
        if not 0 <= int(rows.min()) <= int(rows.max()) < V:
            raise ValueError(
                f"init_tokens={config.init_tokens} must be ids below the"
                f" vocabulary's {V}"
            )
    return embedding.detach()[rows.to(embedding.device)].clone()


def apply(
    model: nn.Module,
    config: PromptTuningConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and put a soft prompt, active from now on, before its input.

    `model` is our Llama or transformers'.

    Raises:
        ValueError: the adapter exists or has a bad name, `init_tokens` are not in the
            vocabulary, or `model` is no Llama.
    """
    prompt = start(embedding_of(model).weight, config, generator)
    return virtual_tokens.install(model, virtual_tokens.Table(prompt), config, adapter)


def num_parameters(model: nn.Module, config: PromptTuningConfig) -> int:
    """p · d: what `apply` would train."""
    return config.num_virtual_tokens * shape_of(model).d


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one soft prompt as `peft` does: `PeftModel.from_pretrained(base, folder)`
    opens it.
    """
    files.save(
        model, folder, adapter, "PROMPT_TUNING", {"prompt_tuning_init": "RANDOM"}
    )


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put a soft prompt from a folder, ours or `peft`'s, on `model` and make it the
    active one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another width. The
            model is then as it was.
    """
    settings, table = files.read(model, folder, "PROMPT_TUNING")
    config = PromptTuningConfig(settings["num_virtual_tokens"], init="random")
    return virtual_tokens.install(model, table, config, adapter)
