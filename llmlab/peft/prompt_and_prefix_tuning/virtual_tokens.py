"""Virtual tokens: trained vectors that a model reads before its input.

Four methods share it. Prompt Tuning and P-Tuning make *embeddings* of tokens that are
in no vocabulary; Prefix Tuning and P-Tuning v2 make *keys and values* for every layer,
of tokens that were never computed. An encoder makes either:

    encoder()  →  (p, d)          shallow: put before the embedded input
    encoder()  →  (p, 2·L·K·D)    deep: put before each layer's keys and values
                                  (see prefixes.py)

    p  virtual tokens        L  layers
    B  batch                 K  key/value heads
    T  new tokens            D  head_dim
    S  tokens of a mask      d  hidden_size

The encoders live in `model.virtual_tokens`, which rewrites each call of the model (ours
or transformers' Llama): the attention mask and the positions count p tokens more, an
empty cache is filled, and logits come back for the real tokens alone. So training loops
and `generate` need not know. A cache that is not empty is taken to hold the virtual
tokens. Virtual token i has position i, and the input starts at p, padded on the left or
not.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models.llama import Llama
from llmlab.peft import walk
from llmlab.peft.label_head import LabelHead
from llmlab.peft.prompt_and_prefix_tuning import prefixes
from llmlab.peft.prompt_and_prefix_tuning.prefixes import embedding_of, shape_of

NAME = "virtual_tokens"


def prepend(
    prompt: Float[Tensor, "p d"], embeds: Float[Tensor, "B T d"]
) -> Float[Tensor, "B p+T d"]:
    """The same p vectors before every row, in the input's dtype."""
    rows = prompt.to(embeds.dtype).expand(len(embeds), -1, -1)  # (B, p, d)
    return torch.cat([rows, embeds], dim=1)


def extend_mask(mask: Tensor | None, p: int) -> Tensor | None:
    """A padding mask (B, S) with p ones before it: virtual tokens are never padding.

    None stays None.
    """
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; with virtual tokens it must"
            " be (batch, seq)"
        )
    return F.pad(mask, (p, 0), value=1)


def extend_positions(positions: Int[Tensor, "B T"], p: int) -> Int[Tensor, "B p+T"]:
    """0 … p − 1 for the virtual tokens, then the input's positions, moved on by p."""
    first = torch.arange(p, device=positions.device).expand(len(positions), -1)
    return torch.cat([first, positions + p], dim=1)


class Table(nn.Module):
    """The plainest encoder: the vectors themselves, in fp32 on any base."""

    def __init__(self, vectors: Float[Tensor, "p width"], deep: bool = False) -> None:
        super().__init__()
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        self.embedding = nn.Parameter(vectors.to(dtype))
        self.deep = deep

    def forward(self) -> Float[Tensor, "p width"]:
        """The vectors."""
        return self.embedding


class VirtualTokens(walk.Wrapper):
    """The adapters of one model, by name.

    It wraps no layer. It is a `Wrapper` so that the walk does not look inside.
    """

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.encoders = nn.ModuleDict()
        self.configs: dict[str, object] = {}
        self.active: str | None = None

    @property
    def encoder(self) -> nn.Module | None:
        """The active adapter's encoder."""
        return None if self.active is None else self.encoders[self.active]

    def before(
        self, model: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """Forward pre-hook: the call as the model must see it."""
        if self.encoder is None:
            return None
        return (), rewrite(model, self.encoder, as_keywords(model, args, kwargs))

    def after(
        self, model: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> object:
        """Forward hook: drop the logits of the last virtual token again.

        With `labels` it is asked for them, since it predicts the first real token.
        """
        if (
            kwargs.get("labels") is None
            or kwargs.get("inputs_embeds") is None
            or self.encoder is None
        ):
            return output
        if isinstance(output, tuple):  # return_dict=False: (loss, logits, …)
            return (output[0], output[1][:, 1:], *output[2:])
        output.logits = output.logits[:, 1:]
        return output


def as_keywords(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call of `model`, all by name."""
    names = inspect.signature(model.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


def cache_name(model: nn.Module) -> str:
    """How `model` calls the argument that holds its cache."""
    return "cache" if isinstance(model, Llama) else "past_key_values"


def stored_tokens(model: nn.Module, call: dict) -> int:
    """How many tokens the cache of a call holds."""
    cache = call.get(cache_name(model))
    if cache is None:
        return 0
    return cache.length if isinstance(model, Llama) else cache.get_seq_length()


def new_tokens(call: dict) -> Tensor:
    """The input of a call: (B, T) ids or (B, T, d) embeddings."""
    ids = call.get("input_ids")
    return call["inputs_embeds"] if ids is None else ids


def rewrite(model: nn.Module, encoder: nn.Module, call: dict) -> dict:
    """The keyword arguments of a call, with the virtual tokens of `encoder` in it.

    Raises:
        ValueError: a prefix on a model that recomputes its layers, which leaves it no
            cache to live in.
    """
    if (
        encoder.deep
        and model.training
        and any(getattr(m, "gradient_checkpointing", False) for m in model.model.layers)
    ):
        raise ValueError(
            "model has gradient_checkpointing=True: transformers then runs its layers"
            " without a cache, which is where a prefix lives; turn it off, or take"
            " prompt tuning or P-Tuning, which need none"
        )
    vectors = encoder()
    p = len(vectors)
    starts = stored_tokens(model, call) == 0  # else the cache has the virtual tokens
    call = {**call, "attention_mask": extend_mask(call.get("attention_mask"), p)}
    if starts and not encoder.deep:
        return _shallow(model, vectors, call)
    if call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"] + p
    if starts:
        shape = shape_of(model)
        dtype = embedding_of(model).weight.dtype
        pairs = prefixes.split(vectors.to(dtype), shape.layers, shape.heads)
        call[cache_name(model)] = prefixes.fill(
            call.get(cache_name(model)),
            pairs,
            batch=len(new_tokens(call)),
            transformers=not isinstance(model, Llama),
        )
    return call


def _shallow(model: nn.Module, prompt: Float[Tensor, "p d"], call: dict) -> dict:
    """The call with `inputs_embeds` of p + T tokens and logits for the T real ones.

    Where labels are given there is one logit more.
    """
    ids = call.pop("input_ids", None)
    embeds = call.get("inputs_embeds")
    if embeds is None:
        embeds = embedding_of(model)(ids)
    p = len(prompt)
    T = embeds.shape[1]
    call["inputs_embeds"] = prepend(prompt, embeds)
    if call.get("position_ids") is not None:
        call["position_ids"] = extend_positions(call["position_ids"], p)

    keep = call.get("logits_to_keep", 0)  # 0: all
    if isinstance(keep, Tensor):  # places in the input
        call["logits_to_keep"] = keep + p
    else:
        call["logits_to_keep"] = min(keep or T, T)
    if call.get("labels") is not None:
        # the loss shifts: the last virtual token predicts the first label
        call["labels"] = F.pad(call["labels"], (1, 0), value=-100)
        call["logits_to_keep"] = T + 1
    return call


# Adapters -----------------------------------------------------------------------------


def check_new(model: nn.Module, adapter: str) -> None:
    """Raises: ValueError: `adapter` is on the model already, or is no good name."""
    if not adapter or "." in adapter or hasattr(nn.ModuleDict, adapter):
        raise ValueError(
            f"adapter={adapter!r} must be a name without dots that torch does not use"
            " itself (as 'type')"
        )
    if adapter in adapters(model):
        raise ValueError(
            f"adapter={adapter!r} exists already: remove it first, or take another name"
        )


def install(
    model: nn.Module, encoder: nn.Module, config: object, adapter: str
) -> nn.Module:
    """Freeze `model` and give it the virtual tokens that `encoder` makes.

    They are the active ones from now on.
    """
    check_new(model, adapter)
    model.requires_grad_(False)
    if not hasattr(model, NAME):
        model.virtual_tokens = VirtualTokens()
        model.register_forward_pre_hook(model.virtual_tokens.before, with_kwargs=True)
        model.register_forward_hook(model.virtual_tokens.after, with_kwargs=True)
    tokens = model.virtual_tokens
    if has_head(encoder) and not isinstance(model.lm_head, LabelHead):
        walk.replace(model, "lm_head", LabelHead(model.lm_head, tokens))
    tokens.encoders[adapter] = encoder.train(model.training)
    tokens.configs[adapter] = config
    set_adapter(model, adapter)
    return model


def adapters(model: nn.Module) -> list[str]:
    """The adapters that give `model` virtual tokens, in the order they came."""
    return list(model.virtual_tokens.configs) if hasattr(model, NAME) else []


def has_head(encoder: nn.Module) -> bool:
    """Whether an encoder brings a label head."""
    return getattr(encoder, "head", None) is not None


def get(model: nn.Module, adapter: str) -> tuple[nn.Module, object]:
    """(encoder, config) of one adapter.

    Raises:
        ValueError: it is not on the model.
    """
    if adapter not in adapters(model):
        raise ValueError(
            f"adapter={adapter!r} is not on the model; it has"
            f" {adapters(model) or 'none'}"
        )
    return model.virtual_tokens.encoders[adapter], model.virtual_tokens.configs[adapter]


def set_adapter(model: nn.Module, adapter: str | None) -> None:
    """Make this adapter the active one, which alone trains. None: the plain base."""
    if adapter is not None:
        get(model, adapter)
    if hasattr(model, NAME):
        model.virtual_tokens.active = adapter
        for name, encoder in model.virtual_tokens.encoders.items():
            encoder.requires_grad_(name == adapter)


def fold(model: nn.Module, adapter: str = "default") -> None:
    """Replace an encoder by the table of what it gives.

    Its network is no longer needed once training is over.
    """
    encoder, _ = get(model, adapter)
    table = Table(vectors_of(encoder), encoder.deep)
    table.head = getattr(encoder, "head", None)
    table.requires_grad_(model.virtual_tokens.active == adapter)
    model.virtual_tokens.encoders[adapter] = table


@torch.no_grad()
def vectors_of(encoder: nn.Module) -> Float[Tensor, "p width"]:
    """What an encoder gives with its dropout off."""
    training = encoder.training
    vectors = encoder.eval()().detach().clone()
    encoder.train(training)
    return vectors


def of_text(model: nn.Module, ids: tuple[int, ...]) -> Float[Tensor, "p width"]:
    """A text's own keys and values, as the plain base computes them.

    An adapter that is active is so again afterwards.
    """
    active = model.virtual_tokens.active if adapters(model) else None
    set_adapter(model, None)
    device = embedding_of(model).weight.device
    prefix = prefixes.of_tokens(model, torch.tensor(ids, device=device))
    set_adapter(model, active)
    return prefix


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    names = adapters(model) if adapter is None else [adapter]
    for name in names:
        get(model, name)  # raises where there is none
        tokens = model.virtual_tokens
        del tokens.encoders[name]
        del tokens.configs[name]
        if tokens.active == name:
            tokens.active = None
    if not hasattr(model, NAME):
        return model
    heads_left = any(has_head(e) for e in model.virtual_tokens.encoders.values())
    if isinstance(getattr(model, "lm_head", None), LabelHead) and not heads_left:
        walk.replace(model, "lm_head", model.lm_head.base)
    if not adapters(model):
        walk.unhook(model, model.virtual_tokens)
        del model.virtual_tokens
    return model
