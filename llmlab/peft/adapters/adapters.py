"""Adapters: small networks between the frozen layers.

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, figure 2, two per block:

    a ← a + A₁(a),  m ← m + A₂(m)

Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, appendix A, one per block:

    h ← h + A(h)

Both have A(x) = W_up f(W_down x + b) + b', near zero at the start, so that the block
begins as it was.

    a  output of attention      h  the stream that both are added to
    m  output of the MLP        d  hidden_size

AdapterDrop (Rücklé et al. 2021, https://arxiv.org/abs/2010.11918) leaves the lowest n
blocks without adapters; a robust adapter has seen many n, drawn anew for each batch.
What the lowest blocks compute is then the same for every task. Simplified: the
published ones train the layer norms and a head as well; here the base stays as it is,
all of it. In a pre-norm model as Llama the stream itself has no norm after the block,
so Pfeiffer's adapter reads it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models.attention import sdpa
from llmlab.models.llama import Llama, rope_tables
from llmlab.peft import checkpoint
from llmlab.peft.adapters import bottleneck, files
from llmlab.peft.adapters.bottleneck import names as adapters

PEFT_TYPE = "BOTTLENECK"
KINDS = {"houlsby": ("after_attention", "after_mlp"), "pfeiffer": ("after_block",)}


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter, and how wide."""

    kind: str = "houlsby"  # or "pfeiffer"
    bottleneck: int = 64  # m
    # relu, gelu, silu, tanh; identity makes it a low-rank linear map
    activation: str = "relu"
    # "houlsby" N(0, 0.01²) cut at 2σ, "normal" N(0, 0.02²), "zero": exactly the
    # identity
    init: str = "houlsby"
    dropout: float = 0.0  # on what the adapter adds, while training

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"kind={self.kind!r} must be one of {', '.join(map(repr, KINDS))}"
            )
        bottleneck.check(self)


def apply(
    model: nn.Module,
    config: AdapterConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and give every block a new adapter, active from now on.

    `model` is our Llama or transformers'.

    Raises:
        ValueError: the adapter exists or has a bad name, or `model` is no Llama.
    """
    bottleneck.blocks(model)  # raises where there are none
    d = model.config.hidden_size
    shape = bottleneck.Shape(
        d, config.bottleneck, config.activation, 1.0, config.init, config.dropout
    )
    return bottleneck.install(
        model, KINDS[config.kind], shape, config, adapter, generator
    )


def set_adapter(model: nn.Module, adapter: str | None) -> None:
    """Make this adapter the active one, which alone trains. None: the plain base."""
    bottleneck.set_active(model, adapter)


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    known = adapters(model)
    if adapter is not None and adapter not in known:
        raise ValueError(
            f"adapter={adapter!r} is not on the model; it has {known or 'none'}"
        )
    return bottleneck.discard(model, known if adapter is None else [adapter])


def num_parameters(model: nn.Module, config: AdapterConfig) -> int:
    """What `apply` would train: 2·m·d + d + m per bottleneck."""
    each = bottleneck.count(model.config.hidden_size, config.bottleneck)
    return len(bottleneck.blocks(model)) * len(KINDS[config.kind]) * each


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter (safetensors)."""
    files.save(model, folder, adapter, PEFT_TYPE)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder on `model` and make it the active one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another shape. The
            model is then as it was.
    """
    settings, tensors = checkpoint.read(folder, PEFT_TYPE)
    config = files.settings_of(AdapterConfig, settings)
    apply(model, config, adapter)
    return files.fill(model, adapter, tensors, undo=lambda: remove(model, adapter))


# AdapterDrop --------------------------------------------------------------------------


def drop(model: nn.Module, n: int) -> nn.Module:
    """Leave the lowest n blocks without adapters; 0 brings them all back.

    Raises:
        ValueError: n is below 0 or above the number of blocks.
    """
    if not 0 <= n <= len(bottleneck.blocks(model)):
        raise ValueError(
            f"n={n} must be at least 0 and at most the {len(bottleneck.blocks(model))}"
            " blocks"
        )
    for site in bottleneck.sites(model).values():
        site.dropped = site.layer < n
    return model


def drop_at_random(
    model: nn.Module, generator: torch.Generator | None = None, most: int | None = None
) -> int:
    """`drop` n blocks, n uniform over 0 … most: call it before each training step.

    `most` is all but one block by default.
    """
    if most is None:
        most = len(bottleneck.blocks(model)) - 1
    n = int(torch.randint(most + 1, (1,), generator=generator))
    drop(model, n)
    return n


@contextmanager
def dropping(
    model: nn.Module, generator: torch.Generator | None = None, most: int | None = None
) -> Iterator[None]:
    """Inside, each forward pass in training mode draws a new n.

    Afterwards all adapters are back.
    """

    def draw(model: nn.Module, args: tuple) -> None:
        if model.training:
            drop_at_random(model, generator, most)

    handle = model.register_forward_pre_hook(draw)
    try:
        yield
    finally:
        handle.remove()
        drop(model, 0)


@torch.inference_mode()
def run_tasks(
    model: Llama, input_ids: Int[Tensor, "B T"], tasks: list[str], n: int
) -> list[Float[Tensor, "B T V"]]:
    """Logits of one input under several adapters, with the lowest n blocks shared.

    The shared blocks are computed once for all tasks.
    For our Llama, which it takes apart into blocks. The adapter that was active is so
    again afterwards.

    Raises:
        ValueError: `model` is not our Llama, a task without an adapter on it, or n out
            of range.
    """
    if not isinstance(model, Llama):
        raise ValueError(
            f"model is a {type(model).__name__}; run_tasks takes our Llama apart,"
            " llmlab.models.llama.Llama"
        )
    for task in tasks:
        if task not in adapters(model):
            raise ValueError(
                f"tasks: {task!r} is not on the model; it has"
                f" {adapters(model) or 'none'}"
            )
    if not 0 <= n <= len(model.model.layers):
        raise ValueError(
            f"n={n} must be at least 0 and at most the {len(model.model.layers)} blocks"
        )
    sites = list(bottleneck.sites(model).values())
    active_before = [site.active for site in sites]
    body = model.model
    h = body.embed_tokens(input_ids)  # (B, T, d)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    rope = tuple(t.to(h.dtype) for t in rope_tables(positions, body.theta.float()))

    def run(blocks: nn.ModuleList, h: Tensor, task: str | None) -> Tensor:
        for site in sites:
            site.active = task if task in site.nets else None
        for block in blocks:
            h = block(h, rope, None, None, sdpa)  # no padding mask, no cache
        return h

    shared = run(body.layers[:n], h, None)  # no adapter changes the lowest blocks
    outputs = []
    for task in tasks:
        top = run(body.layers[n:], shared, task)
        outputs.append(model.lm_head(body.norm(top)))
    for site, active in zip(sites, active_before, strict=True):
        site.active = active
    return outputs


def shared_cost(layers: int, tasks: int, n: int) -> float:
    """Blocks computed for `tasks` tasks with the lowest n shared; 1 is no sharing."""
    return (n + tasks * (layers - n)) / (tasks * layers)
