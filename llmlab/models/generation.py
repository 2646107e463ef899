"""From logits to text: greedy decoding and sampling by temperature, top-k and top-p,
with a key/value cache.

Top-k: Fan et al. 2018, https://arxiv.org/abs/1805.04833. Top-p, the nucleus: Holtzman
et al. 2020, https://arxiv.org/abs/1904.09751: the smallest set of tokens whose
probability reaches p.

    B  batch        T  prompt tokens        V  vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlab.models.cache import Cache, KVCache
from llmlab.models.llama import Llama


def keep_top_k(
    logits: Float[Tensor, "batch vocab"], k: int
) -> Float[Tensor, "batch vocab"]:
    """All but the k largest logits of a row become −∞.

    Ties with the k-th stay, as in transformers, so more than k can.
    """
    if k < 1:
        raise ValueError(f"top_k={k} must be at least 1")
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(
    logits: Float[Tensor, "batch vocab"], p: float
) -> Float[Tensor, "batch vocab"]:
    """All but the nucleus become −∞: the fewest tokens, largest first, whose
    probability is at least p.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p={p} must be above 0 and at most 1")
    ascending, order = logits.sort()
    # what may go: together at most 1 − p
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[..., -1] = False  # the largest always stays
    return logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)


def probabilities(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "batch vocab"]:
    """What `sample` draws from: softmax of logits / temperature, after top-k, then
    top-p. Temperature 0 is greedy.

    With nothing given these are the model's own. `generate` of transformers then takes
    the 50 likeliest only, and refuses temperature 0 where it draws.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if temperature == 0:
        return torch.zeros_like(logits).scatter(
            -1, logits.argmax(-1, keepdim=True), 1.0
        )
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return logits.softmax(-1)


def sample(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch"]:
    """One token per row; see `probabilities`. Temperature 0 takes the largest logit."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(
        probabilities(logits, temperature, top_k, top_p), 1, generator=generator
    )[:, 0]


def generate(
    model: Llama,
    ids: Int[Tensor, "batch seq"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos: int | tuple[int, ...] | None = None,
    pad: int | None = None,
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    cache: Cache | None = None,
) -> Int[Tensor, "batch all_seq"]:
    """The prompts and up to `max_new_tokens` tokens after each.

    Greedy unless a temperature is given.

    Args:
        ids: prompts, padded on the left when their lengths differ, with
            `attention_mask` 1 on tokens and 0 on padding.
        seed: the same seed gives the same tokens; None draws from PyTorch's global
            generator.
        eos: token or tokens that end a row. A row that has ended is filled with `pad`
            (default: the first of `eos`), and generation stops when all rows have.
        cache: an empty cache of another kind than `KVCache`.
    Raises:
        ValueError: an argument out of range, or padding that is not on the left.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    steps = stream(
        model,
        ids,
        max_new_tokens,
        **options,
        eos=eos,
        pad=pad,
        attention_mask=attention_mask,
        cache=cache,
    )
    new = [token[:, None] for token in steps]
    return torch.cat([ids, *new], dim=1)


def stream(
    model: Llama,
    ids: Int[Tensor, "batch seq"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos: int | tuple[int, ...] | None = None,
    pad: int | None = None,
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    cache: Cache | None = None,
) -> Iterator[Int[Tensor, "batch"]]:
    """`generate`, one step at a time: yields the new token of every row as soon as it
    is known.
    """
    _check(ids, max_new_tokens, attention_mask)
    ends = torch.tensor(
        [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        dtype=ids.dtype,
        device=ids.device,
    )
    fill = pad if pad is not None else int(ends[0]) if len(ends) else 0
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    cache = (
        cache
        if cache is not None
        else KVCache(len(model.model.layers), capacity=ids.shape[1] + max_new_tokens)
    )
    mask = (
        None
        if attention_mask is None or bool(attention_mask.all())
        else attention_mask.long()
    )
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    step = ids
    for _ in range(max_new_tokens):
        logits = _last_logits(model, step, mask, cache)
        token = sample(logits.float(), temperature, top_k, top_p, generator)
        token = torch.where(running, token, fill)
        yield token
        running = running & ~torch.isin(token, ends)
        if not running.any():
            return
        step = token[:, None]
        mask = (
            mask
            if mask is None
            else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        )


@torch.inference_mode()
def _last_logits(
    model: Llama, step: Tensor, mask: Tensor | None, cache: Cache
) -> Float[Tensor, "batch vocab"]:
    """Logits after the newest token.

    A padded row counts its positions from its first real token.
    """
    positions = (
        None
        if mask is None
        else (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
    )
    return model(
        step, attention_mask=mask, position_ids=positions, cache=cache, logits_to_keep=1
    )[:, -1]


def _check(ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None) -> None:
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}; it must be (batch, seq) with at least"
            " one token"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if attention_mask is None:
        return
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, not that of ids,"
            f" {tuple(ids.shape)}"
        )
    if not attention_mask[:, -1].all():
        raise ValueError(
            "attention_mask ends with 0: pad prompts on the left, so that new tokens"
            " follow the last real one"
        )
