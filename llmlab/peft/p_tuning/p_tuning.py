"""P-Tuning (v1): soft prompts that a small network makes from free vectors.

Liu et al. 2021, https://arxiv.org/abs/2103.10385, section 3. Free vectors h_0 … h_{p−1}
are hard to train one by one, so a network makes the prompt P from all of them:

    P = MLP([LSTM(h_0 … h_i); LSTM(h_i … h_{p−1})])   a bidirectional LSTM, then two
                                                      linears with ReLU
    P = MLP(h)                                        three linears with ReLU; `peft`'s
                                                      default

P stands before the embedded input. The network is not needed after training: `fold`
keeps the p vectors.

    p  virtual tokens          h  (p, d)  free vectors
    d  hidden_size             P  (p, d)  the prompt
    m  the network's width

It acts on the input alone: the layers above see P as ordinary tokens. Names and widths
are those of `peft`'s PromptEncoder. Simplified, as there: the virtual tokens all stand
at the front, while the paper's templates may put them anywhere. One score vector comes
for each token where there is a label head (see `label_head.last_token`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import label_head
from llmlab.peft.prompt_and_prefix_tuning import (
    adapters,
    embedding_of,
    files,
    fold,
    prefixes,
    remove,
    set_adapter,
    shape_of,
    virtual_tokens,
)

__all__ = [
    "PTuningConfig",
    "adapters",
    "apply",
    "fold",
    "load",
    "num_parameters",
    "remove",
    "save",
    "set_adapter",
]
ENCODERS = ("MLP", "LSTM")


@dataclass(frozen=True)
class PTuningConfig:
    """How many virtual tokens, and the network that makes them."""

    num_virtual_tokens: int = 20
    encoder: str = "MLP"
    hidden: int | None = None  # m; None: hidden_size, as in `peft`
    lstm_layers: int = 2
    dropout: float = 0.0  # between the layers of the LSTM, while training
    # a label head in place of words that stand for labels (not in the paper)
    num_labels: int | None = None
    per_token: bool = False  # whether every token has a label, or the whole text

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "hidden", "lstm_layers", "num_labels"):
            value = getattr(self, name)
            optional = name in ("hidden", "num_labels") and value is None
            if not (isinstance(value, int) and value >= 1) and not optional:
                raise ValueError(
                    f"{name} must be an integer of at least 1, not {value!r}"
                )
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder={self.encoder!r} must be 'MLP' or 'LSTM'")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1, not {self.dropout!r}"
            )


class PromptEncoder(nn.Module):
    """h → P."""

    deep = False

    def __init__(
        self, d: int, config: PTuningConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        m = config.hidden or d
        self.embedding = nn.Parameter(
            torch.randn(config.num_virtual_tokens, d, generator=generator)
        )
        if config.encoder == "MLP":
            sizes = [(d, m), (m, m), (m, d)]
        else:
            self.lstm_head = nn.LSTM(
                d,
                m,
                config.lstm_layers,
                dropout=config.dropout,
                bidirectional=True,
                batch_first=True,
            )
            for p in self.lstm_head.parameters():
                nn.init.uniform_(p, -(m**-0.5), m**-0.5, generator=generator)
            sizes = [(2 * m, 2 * m), (2 * m, d)]
        linears = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
        self.mlp_head = nn.Sequential(*linears[:-1])  # no ReLU after the last
        prefixes.reset_linears(self.mlp_head, generator)

    def forward(self) -> Float[Tensor, "p d"]:
        """The virtual tokens."""
        h = self.embedding
        if hasattr(self, "lstm_head"):
            # (p, 2m): what came before token i, and what comes after
            h = self.lstm_head(h[None])[0][0]
        return self.mlp_head(h)


def apply(
    model: nn.Module,
    config: PTuningConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` (ours or transformers' Llama) and put the encoder's tokens before
    its input.

    Raises:
        ValueError: the adapter exists or has a bad name, or `model` is no Llama.
    """
    d = shape_of(model).d
    encoder = PromptEncoder(d, config, generator)
    if config.num_labels:
        encoder.head = label_head.make_head(
            d, config.num_labels, config.per_token, generator
        )
    return virtual_tokens.install(
        model, encoder.to(embedding_of(model).weight.device), config, adapter
    )


def num_parameters(model: nn.Module, config: PTuningConfig) -> int:
    """What `apply` would train: h, the network, and the label head if there is one."""
    d = shape_of(model).d
    m, layers = config.hidden or d, config.lstm_layers
    outside = config.num_virtual_tokens * d + (config.num_labels or 0) * (
        d + config.per_token
    )
    if config.encoder == "MLP":
        return outside + (d + 1) * m + (m + 1) * m + (m + 1) * d
    # two directions, two biases
    gates = sum(2 * 4 * m * (width + m + 2) for width in [d] + [2 * m] * (layers - 1))
    return outside + gates + (2 * m + 1) * 2 * m + (2 * m + 1) * d


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write the virtual tokens as `peft` does, without the network:
    `PeftModel.from_pretrained(base, folder)` opens them.
    """
    _, config = virtual_tokens.get(model, adapter)
    settings = {
        "encoder_reparameterization_type": config.encoder,
        "encoder_hidden_size": config.hidden or shape_of(model).d,
        "encoder_num_layers": config.lstm_layers,
        "encoder_dropout": config.dropout,
    }
    files.save(model, folder, adapter, "P_TUNING", settings)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put virtual tokens from a folder, ours or `peft`'s, on `model`.

    A file has no network: they come folded.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another width. The
            model is then as it was.
    """
    settings, table = files.read(model, folder, "P_TUNING")
    labels, per_token = files.labels_of(table)
    config = PTuningConfig(
        settings["num_virtual_tokens"],
        encoder=settings.get("encoder_reparameterization_type") or "MLP",
        hidden=settings.get("encoder_hidden_size"),
        lstm_layers=settings.get("encoder_num_layers", 2),
        dropout=settings.get("encoder_dropout", 0.0),
        num_labels=labels,
        per_token=per_token,
    )
    return virtual_tokens.install(model, table, config, adapter)
