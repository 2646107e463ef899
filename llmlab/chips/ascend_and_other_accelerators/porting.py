"""A Llama's parameters under the names, and in the layouts, of other frameworks.

Three things change on the way from PyTorch, and each is exact:

    names    self_attn.q_proj → attention.wq           (MindFormers; Paddle keeps them)
    layout   W of (out, in) → Wᵀ of (in, out)          (Paddle's Linear)
    order    the rows of W_q and W_k, where RoPE turns the pairs (2i, 2i + 1), and of a
             fused W_qkv

PaddleFormers 1.2.0 turns the seven linears of a block around, and not the head:
`lm_head.weight` stays (vocabulary, hidden). MindSpore's `nn.Dense` is laid out as
PyTorch's; MindFormers' convert_weight.py renames, and stacks q, k and v if told to
(https://github.com/mindspore-lab/mindformers, mindformers/models/llama).

    d  hidden_size      D  head_dim      n  heads of a matrix      K  key/value heads

A tied head is listed once, as the embedding. Measured defaults, kernels lowered for
Ascend and SmolLM2's logits are in `data/`: `defaults()`, `lowered()`, `smollm2()`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.models.llama import Llama, LlamaConfig

DATA = Path(__file__).parent / "data"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
MINDFORMERS = {  # Hugging Face → MindFormers
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "model.norm_out",
}


@dataclass(frozen=True)
class Place:
    """Where a parameter of ours lies in another framework."""

    name: str
    shape: tuple[int, ...]
    turned: bool = False  # (out, in) → (in, out)


def _paddle(name: str, shape: tuple[int, ...]) -> Place:
    """PaddleFormers keeps Hugging Face's names; a `Linear` keeps (in, out)."""
    turned = "_proj." in name and len(shape) == 2
    return Place(name, shape[::-1] if turned else shape, turned)


def _mindformers(name: str, shape: tuple[int, ...]) -> Place:
    """MindFormers' names; `nn.Dense` keeps (out, in), as PyTorch does."""
    for ours, theirs in MINDFORMERS.items():
        name = name.replace(ours, theirs)
    return Place(name, shape)


def paddle_places(config: LlamaConfig) -> dict[str, Place]:
    """Our name → where PaddleFormers' Llama has that parameter."""
    return {name: _paddle(name, shape) for name, shape in _shapes(config).items()}


def mindspore_places(config: LlamaConfig) -> dict[str, Place]:
    """Our name → where MindFormers' Llama has that parameter."""
    return {name: _mindformers(name, shape) for name, shape in _shapes(config).items()}


def to_paddle(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Our state for PaddleFormers' Llama.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape, or a tied head
            is not the embedding. The message has the names.
    """
    return _there(state, config, paddle_places)


def from_paddle(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The state of PaddleFormers' Llama for ours; raises as `to_paddle`."""
    return _back(state, config, paddle_places)


def to_mindspore(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Our state under MindFormers' names; raises as `to_paddle`."""
    return _there(state, config, mindspore_places)


def from_mindspore(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """MindFormers' state under our names; raises as `to_paddle`."""
    return _back(state, config, mindspore_places)


Places = Callable[[LlamaConfig], dict[str, Place]]


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of our parameters; a tied one is listed once."""
    with torch.device("meta"):
        model = Llama(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _there(state: dict, config: LlamaConfig, places: Places) -> dict[str, Tensor]:
    where = places(config)
    state = _untied(state, config, EMBEDDING)
    _check(state, _shapes(config))
    return {place.name: _turn(state[name], place) for name, place in where.items()}


def _back(state: dict, config: LlamaConfig, places: Places) -> dict[str, Tensor]:
    where = places(config)
    state = _untied(state, config, where[EMBEDDING].name)
    _check(state, {place.name: place.shape for place in where.values()})
    return {name: _turn(state[place.name], place) for name, place in where.items()}


def _turn(x: Tensor, place: Place) -> Tensor:
    return x.T.contiguous() if place.turned else x


def _untied(state: dict, config: LlamaConfig, embedding: str) -> dict[str, Tensor]:
    """The state without a head that is the embedding again."""
    if not config.tie_word_embeddings or HEAD not in state:
        return state
    if embedding in state and not torch.equal(state[HEAD], state[embedding]):
        raise ValueError(
            f"tie_word_embeddings=True, but {HEAD} differs from {embedding}"
        )
    return {name: x for name, x in state.items() if name != HEAD}


def _check(state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    both = sorted(wanted.keys() & state.keys())
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {wanted[name]}"
        for name in both
        if tuple(state[name].shape) != wanted[name]
    ]
    found = {
        "missing": sorted(wanted.keys() - state.keys()),
        "not part of this model": sorted(state.keys() - wanted.keys()),
        "wrong shape": wrong,
    }
    problems = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    if problems:
        raise ValueError("state: " + "; ".join(problems))


# The order of rows -------------------------------------------------------------------


def interleaved(
    weight: Float[Tensor, "rows *cols"], head_dim: int
) -> Float[Tensor, "rows *cols"]:
    """Rows of W_q or W_k for a RoPE that turns neighbours, (2i, 2i + 1).

    Ours turns i with i + D/2; so each head's rows go 0, D/2, 1, D/2 + 1, …
    """
    heads = _heads(weight, head_dim)
    halves = weight.unflatten(0, (heads, 2, head_dim // 2))  # (n, 2, D/2, …)
    return halves.transpose(1, 2).flatten(0, 2)  # (n·D, …)


def half_split(
    weight: Float[Tensor, "rows *cols"], head_dim: int
) -> Float[Tensor, "rows *cols"]:
    """The way back from `interleaved`."""
    heads = _heads(weight, head_dim)
    pairs = weight.unflatten(0, (heads, head_dim // 2, 2))  # (n, D/2, 2, …)
    return pairs.transpose(1, 2).flatten(0, 2)  # (n·D, …)


def _heads(weight: Tensor, head_dim: int) -> int:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even: RoPE turns pairs")
    if weight.shape[0] % head_dim:
        raise ValueError(
            f"weight has {weight.shape[0]} rows, no multiple of head_dim={head_dim}"
        )
    return weight.shape[0] // head_dim


def fuse_qkv(
    q: Float[Tensor, "q_rows *cols"],
    k: Float[Tensor, "kv_rows *cols"],
    v: Float[Tensor, "kv_rows *cols"],
    groups: int = 1,
) -> Float[Tensor, "all_rows *cols"]:
    """One matrix for queries, keys and values.

    Args:
        groups: 1 stacks all of q, k and v (MindFormers' `qkv_concat`). As many as there
            are key/value heads lays each beside its queries, as Megatron does: then a
            cut between groups leaves every device whole heads.
    Raises:
        ValueError: the rows of one cannot be cut into so many groups.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if groups < 1 or x.shape[0] % groups:
            raise ValueError(f"{name} has {x.shape[0]} rows, not {groups} equal groups")
    parts = [x.unflatten(0, (groups, -1)) for x in (q, k, v)]  # (groups, rows, …)
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(
    fused: Float[Tensor, "all_rows *cols"], q_rows: int, kv_rows: int, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The way back from `fuse_qkv`.

    Raises:
        ValueError: the fused matrix has not q_rows + 2 kv_rows rows, or they cannot be
            cut into so many groups.
    """
    if fused.shape[0] != q_rows + 2 * kv_rows:
        raise ValueError(
            f"fused has {fused.shape[0]} rows, not q_rows + 2 kv_rows ="
            f" {q_rows + 2 * kv_rows}"
        )
    if groups < 1 or q_rows % groups or kv_rows % groups:
        raise ValueError(f"groups={groups} must divide {q_rows} and {kv_rows}")
    each = [rows // groups for rows in (q_rows, kv_rows, kv_rows)]
    parts = fused.unflatten(0, (groups, -1)).split(each, dim=1)
    q, k, v = (x.flatten(0, 1) for x in parts)
    return q, k, v


# What was measured -------------------------------------------------------------------


@dataclass(frozen=True)
class Default:
    """What a framework does when nothing is said.

    Attributes:
        call: what was run.
        value: what came out; `torch` is PyTorch's answer to the same.
        effect: the largest change of the block's logits when this default is taken for
            PyTorch's, over the largest logit; None where it does not apply.
    """

    thing: str
    framework: str
    call: str
    value: str
    torch: str
    effect: float | None

    @property
    def differs(self) -> bool:
        return self.value != self.torch


@cache
def defaults() -> tuple[Default, ...]:
    """The rows of data/defaults.csv (scripts/golden/port_defaults_goldens.py)."""
    with (DATA / "defaults.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(
        Default(**row | {"effect": float(row["effect"]) if row["effect"] else None})
        for row in rows
    )


@cache
def lowered() -> dict:
    """Four kernels' texts by triton-ascend and by Triton, as data/triton.json has them.

    lowered()["ascend"]["kernels"]["add"]["ttadapter"] is Linalg, line by line.
    """
    return json.loads((DATA / "triton.json").read_text(encoding="utf-8"))


@cache
def smollm2() -> dict:
    """SmolLM2's logits by PaddleFormers, as data/smollm2.json has them."""
    return json.loads((DATA / "smollm2.json").read_text(encoding="utf-8"))
