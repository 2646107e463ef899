"""LLM-QAT: train the rounded model on text that the float model writes itself.

Liu et al. 2023, https://arxiv.org/abs/2305.17888. Weights, activations and the KV cache
are rounded in the forward pass, symmetrically and up to the largest value (MinMax, no
outlier is clipped):

    X̂ = α ⌊X / α⌉        α = max|X| / (2^(N−1) − 1)

one α per output channel of a weight, per token of an activation, per token of the keys
and of the values. The backward pass takes ⌊·⌉ for the identity (straight-through,
Bengio et al. 2013). The float model T teaches the rounded one S by its whole
distribution, at each of the n positions, with no data but text x that T has written:

    L  =  −(1/n) Σ_t Σ_c  p_T(c | x_≤t) · log p_S(c | x_≤t)

A text starts with a token of the vocabulary. Its next 3 to 5 tokens are the likeliest
ones, the others are drawn from p_T (the hybrid).

    X     values; X̂ after rounding      N    bits
    α     step between two levels       B, T, V  batch, tokens, vocabulary
    S     tokens in the cache           K, D     key/value heads, head_dim

Simplified: one text per row, of one length; <|endoftext|> does not end a row. Keys are
rounded after RoPE, as a cache holds them; the authors' code rounds them before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from llmlab.compression import quantization_basics as qb
from llmlab.compression import walk
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.models.attention import Mask, sdpa
from llmlab.models.cache import KVCache
from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import LlamaConfig

# What scripts/llm_qat_sweep.py measured, a run a line.
FILE = Path(__file__).parent / "data" / "llm_qat.csv"

FLOAT = 16  # bits that stand for "not rounded", as in the paper's tables
KINDS = ("hybrid", "greedy", "sampled")
LABELS = ("soft", "hard")
SCALE_DTYPE = torch.float16  # in which α is stored, here and in the cache


def check_bits(name: str, bits: int) -> None:
    """Raises: ValueError: it is neither 2 to 8 nor 16."""
    if bits not in (*range(2, 9), FLOAT):
        raise ValueError(
            f"{name}={bits!r} must be an integer from 2 to 8, or 16 for floats"
        )


@dataclass(frozen=True)
class QATConfig:
    """What is rounded, and how it is trained. 16 bits: not rounded."""

    weight_bits: int = 4
    activation_bits: int = 8
    kv_bits: int = 4
    labels: str = "soft"  # the teacher's distribution, or "hard": the next token itself
    lr: float = 3e-4  # at the first step; half a cosine down to 0
    clip: float = 1.0  # the largest norm of all gradients together

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "kv_bits"):
            check_bits(name, getattr(self, name))
        if self.labels not in LABELS:
            raise ValueError(f"labels={self.labels!r} must be one of {LABELS}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be above 0 and finite")


# Rounding -----------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """Forward X̂, exactly; backward as if X̂ were X."""

    @staticmethod
    def forward(ctx, x: Tensor, x_hat: Tensor) -> Tensor:
        return x_hat

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x in float32, or in float64 where it is that."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def step_size(
    x: Float[Tensor, "..."], bits: int, dims: tuple[int, ...] = (-1,)
) -> Float[Tensor, "..."]:
    """α of each run of values along `dims`, which stay as dimensions of size 1.

    It is rounded to the type in which it is stored. A run of zeros gets 1.
    """
    top = 2 ** (bits - 1) - 1
    step = wide(x).abs().amax(dims, keepdim=True) / top
    return torch.where(step > 0, qb.storable(step, SCALE_DTYPE), 1.0)


def codes_of(
    x: Float[Tensor, "..."], step: Float[Tensor, "..."], bits: int
) -> Float[Tensor, "..."]:
    """⌊X / α⌉, within the codes of so many bits, as floats that hold integers."""
    top = 2 ** (bits - 1) - 1
    return torch.round(wide(x) / step).clamp(-top, top)


def fake_quantize(
    x: Float[Tensor, "..."], bits: int, dims: tuple[int, ...] = (-1,)
) -> Float[Tensor, "..."]:
    """X̂ with the straight-through gradient: 1 everywhere, for nothing is clipped.

    Args:
        bits: 16 gives x back.
        dims: the values along them share one α. (−1,) is per output channel of a
            weight (out, in), and per token of activations (B, T, in).
    """
    if bits == FLOAT:
        return x
    step = step_size(x, bits, dims)
    rounded = qb.finite(codes_of(x, step, bits) * step, x.dtype)
    return _StraightThrough.apply(x, rounded)


def kv_dims(per_head: bool) -> tuple[int, ...]:
    """Of keys or values (B, K, T, D): what shares one α."""
    return (3,) if per_head else (1, 3)


class QuantizedKV:
    """Attention over rounded keys and values, for training: the seam of our Llama.

    It computes what a `QuantizedCache` would, and lets gradients through.
    """

    def __init__(self, bits: int, per_head: bool = False, attention=sdpa) -> None:
        check_bits("bits", bits)
        self.bits = bits
        self.dims = kv_dims(per_head)
        self.attention = attention

    def __call__(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        mask: Mask | None,
    ) -> Float[Tensor, "B H T D"]:
        k = fake_quantize(k, self.bits, self.dims)
        v = fake_quantize(v, self.bits, self.dims)
        return self.attention(q, k, v, mask)


# The cache ----------------------------------------------------------------------------


def pack_rows(
    codes: Float[Tensor, "... n"], bits: int
) -> UInt8[Tensor, "... bytes_a_row"]:
    """Codes −top … top as bits, each row by itself: ⌈n / 8⌉ · bits bytes."""
    top = 2 ** (bits - 1) - 1
    n = codes.shape[-1]
    unsigned = F.pad(codes + top, (0, -n % 8))  # eight codes fill whole bytes
    rows = unsigned.shape[:-1]
    # (…, n) -> a stream of bytes -> (…, bytes)
    return qb.pack(unsigned, bits).reshape(*rows, unsigned.shape[-1] * bits // 8)


def unpack_rows(
    packed: UInt8[Tensor, "... bytes_a_row"], bits: int, n: int
) -> Float[Tensor, "... n"]:
    """The first n codes of each row that `pack_rows` made."""
    top = 2 ** (bits - 1) - 1
    count = packed.numel() * 8 // bits
    codes = qb.unpack(packed.flatten(), bits, count).float() - top
    return codes.reshape(*packed.shape[:-1], -1)[..., :n]


class QuantizedCache:
    """A KV cache of packed codes, and one α per token for its keys, one for its values.

    It stands in for `llmlab.models.cache.KVCache`. Each token is rounded by itself, so
    that a prompt at once gives what its tokens give one by one. All is dequantised when
    it is read. Simplified: a kernel on a GPU would do that in registers.

    Args:
        per_head: an α for each key/value head of each token.
    """

    def __init__(self, num_layers: int, bits: int = 4, per_head: bool = False) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        if bits not in range(2, 9):
            raise ValueError(f"bits={bits!r} must be an integer from 2 to 8")
        self.bits = bits
        self.dims = kv_dims(per_head)
        # of each layer: packed codes (B, S, bytes), α (B, S, 1 or K), for k and for v
        self.codes: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.steps: list[list[Tensor]] = [[] for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens that all layers have."""
        return min(codes[0].shape[1] if codes else 0 for codes in self.codes)

    def append(
        self, layer: int, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]
    ) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        """Store new keys and values of one layer as codes.

        Returns:
            All of that layer, dequantised.
        """
        new = [self._encode(x) for x in (k, v)]
        codes = [packed for packed, _ in new]
        steps = [step for _, step in new]
        if self.codes[layer]:
            pairs = zip(self.codes[layer], codes, strict=True)
            codes = [torch.cat(pair, dim=1) for pair in pairs]
            pairs = zip(self.steps[layer], steps, strict=True)
            steps = [torch.cat(pair, dim=1) for pair in pairs]
        self.codes[layer] = codes
        self.steps[layer] = steps
        k_hat, v_hat = (
            self._decode(c, s, like=k) for c, s in zip(codes, steps, strict=True)
        )
        return k_hat, v_hat

    def _encode(self, x: Float[Tensor, "B K T D"]) -> tuple[Tensor, Tensor]:
        step = step_size(x, self.bits, self.dims)  # (B, 1 or K, T, 1)
        codes = codes_of(x, step, self.bits).transpose(1, 2)  # (B, T, K, D)
        packed = pack_rows(codes.flatten(2), self.bits)  # (B, T, bytes)
        return packed, step.transpose(1, 2).flatten(2).to(SCALE_DTYPE)  # (B, T, 1 or K)

    def _decode(self, packed: Tensor, step: Tensor, like: Tensor) -> Tensor:
        K, D = like.shape[1], like.shape[3]
        codes = unpack_rows(packed, self.bits, K * D)  # (B, S, K·D)
        codes = codes.unflatten(2, (K, D))  # (B, S, K, D)
        x = codes * step.to(torch.promote_types(like.dtype, torch.float32))[..., None]
        return qb.finite(x.transpose(1, 2), like.dtype)  # (B, K, S, D)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on.

        Raises:
            ValueError: fewer tokens than `length` are stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"length={length} must lie between 0 and the {self.length} tokens"
                " stored"
            )
        for layer in range(len(self.codes)):
            self.codes[layer] = [t[:, :length] for t in self.codes[layer]]
            self.steps[layer] = [t[:, :length] for t in self.steps[layer]]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of every α."""
        stored = [t for layer in (*self.codes, *self.steps) for t in layer]
        return sum(t.numel() * t.element_size() for t in stored)


def kv_bytes(
    config: LlamaConfig,
    tokens: int,
    bits: int,
    batch: int = 1,
    per_head: bool = False,
) -> int:
    """Bytes of a KV cache: what `QuantizedCache.nbytes` says; 16 bits: of float16."""
    check_bits("bits", bits)
    K = config.num_key_value_heads
    numbers = K * config.head_dim  # of one token's keys in one layer
    if bits == FLOAT:
        token = 2 * numbers
    else:
        scales = K if per_head else 1
        token = -(-numbers // 8) * bits + scales * SCALE_DTYPE.itemsize
    return 2 * config.num_hidden_layers * batch * tokens * token


# Text that the model writes itself ----------------------------------------------------


def next_tokens(
    logits: Float[Tensor, "B V"],
    greedy: Bool[Tensor, "B"],
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B"]:
    """The likeliest token where `greedy`, else one drawn from softmax(logits)."""
    drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
    return torch.where(greedy, logits.argmax(-1), drawn)


@torch.no_grad()
def self_generate(
    model: nn.Module,
    count: int,
    length: int,
    kind: str = "hybrid",
    seed: int = 0,
    vocabulary: int | None = None,
) -> Int[Tensor, "count length"]:
    """`count` texts of `length` tokens, written by the model: its own training data.

    First tokens are drawn from the vocabulary, none twice before all have come. Then 3,
    4 or 5 greedy tokens, in turn from row to row, and the rest is drawn.

    Args:
        kind: "hybrid"; "greedy": all are the likeliest; "sampled": all are drawn.
        seed: the same seed gives the same texts.
        vocabulary: first tokens are below it; default all.
    Raises:
        ValueError: an unknown kind, or a count that is out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {KINDS}")
    size = model.config.vocab_size if vocabulary is None else vocabulary
    for name, value in (("count", count), ("length", length), ("vocabulary", size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    ids = order[torch.arange(count) % size][:, None]  # (count, 1)
    greedy_tokens = 3 + torch.arange(count) % 3
    if kind != "hybrid":
        greedy_tokens[:] = length if kind == "greedy" else 0
    past = None
    step = ids
    for made in range(length - 1):
        logits, past = _last_logits(model, step, past)
        step = next_tokens(logits, made < greedy_tokens, generator)[:, None]
        ids = torch.cat([ids, step], dim=1)
    return ids


def is_ours(model: nn.Module) -> bool:
    """Whether it is the Llama of this course; else it is one of transformers."""
    return "attention" in inspect.signature(model.forward).parameters


def _last_logits(model: nn.Module, step: Tensor, past) -> tuple[Tensor, object]:
    """Logits after the newest token, and the cache that has read it."""
    if is_ours(model):
        if past is None:
            past = KVCache(model.config.num_hidden_layers)
        return model(step, cache=past, logits_to_keep=1)[:, -1], past
    out = model(step, past_key_values=past, use_cache=True)
    return out.logits[:, -1], out.past_key_values


# Training -----------------------------------------------------------------------------


def soft_label_loss(
    student: Float[Tensor, "B T V"], teacher: Float[Tensor, "B T V"]
) -> Float[Tensor, ""]:
    """−(1/BT) Σ_bt Σ_c p_T log p_S, in nats per position.

    Both have read the same tokens, so that position t has its label at position t, and
    even the last position has one: nothing is shifted. No gradient reaches the teacher.
    """
    p = teacher.detach().float().softmax(-1)
    log_q = student.float().log_softmax(-1)
    return -(p * log_q).sum(-1).mean()


class FakeQuantLinear(nn.Linear):
    """A linear that rounds its weight and its input in each forward pass.

    It shares the float weight of the linear that it takes the place of, and trains it.
    """

    def __init__(self, linear: nn.Linear, config: QATConfig) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.config = config

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        W = fake_quantize(self.weight, self.config.weight_bits)
        x = fake_quantize(x, self.config.activation_bits)
        return F.linear(x, W, self.bias)


class LowBitLinear(QuantLinear):
    """What is left after training: packed codes, and an input that is rounded."""

    activation_bits = FLOAT

    @classmethod
    def from_float(cls, linear: nn.Linear, config: QATConfig) -> LowBitLinear:
        """The weight of `linear` as codes, one α per output channel."""
        grid = QuantConfig(config.weight_bits, per="row", scale_dtype=SCALE_DTYPE)
        made = cls(linear, grid)
        made.activation_bits = config.activation_bits
        return made

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return super().forward(fake_quantize(x, self.activation_bits))


def logits(
    model: nn.Module, ids: Int[Tensor, "B T"], kv_bits: int = FLOAT
) -> Float[Tensor, "B T V"]:
    """Logits at all positions, over rounded keys and values; gradients pass."""
    check_bits("kv_bits", kv_bits)
    if is_ours(model):
        if kv_bits == FLOAT:
            return model(ids)
        return model(ids, attention=QuantizedKV(kv_bits))
    if kv_bits == FLOAT:
        return model(ids, use_cache=False).logits
    return model(ids, past_key_values=_their_cache(kv_bits), use_cache=True).logits


def _their_cache(bits: int):
    """A cache of transformers that rounds what it is given, and keeps floats."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, k: Tensor, v: Tensor, *args, **kwargs):
            dims = kv_dims(per_head=False)
            k = fake_quantize(k, bits, dims)
            v = fake_quantize(v, bits, dims)
            return super().update(k, v, *args, **kwargs)

    return Rounding()


def train(
    student: nn.Module,
    teacher: nn.Module,
    batches: list[Int[Tensor, "B T"]],
    config: QATConfig,
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> None:
    """A step per batch, in place: AdamW, no weight decay, half a cosine.

    Args:
        student: its linears are `FakeQuantLinear`.
        progress: called with the steps that are done, how many there are, and the loss.
    Raises:
        ValueError: a loss is NaN or infinite.
    """
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for i, ids in enumerate(batches):
        said = logits(student, ids, config.kv_bits)
        if config.labels == "hard":
            loss = next_token_loss(said, ids)
        else:
            with torch.no_grad():
                label = logits(teacher, ids)
            loss = soft_label_loss(said, label)
        if not loss.isfinite():
            raise ValueError(f"lr={config.lr}: the loss of step {i + 1} is not finite")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        schedule.step()
        progress(i + 1, len(batches), loss.item())


def checked(batches: Iterable[Tensor]) -> list[Tensor]:
    """`batches` as a list.

    Raises:
        ValueError: one of them is no rows of at least two token ids.
    """
    batches = list(batches)
    for batch in batches:
        ids = isinstance(batch, Tensor) and not batch.is_floating_point()
        if not ids or batch.dim() != 2 or batch.shape[0] < 1 or batch.shape[1] < 2:
            raise ValueError(
                "each of batches must be rows of two token ids or more, of shape"
                f" (batch, seq), not {getattr(batch, 'shape', type(batch).__name__)}"
            )
    return batches


def apply(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "B T"]],
    config: QATConfig,
    skip: tuple[str, ...] = ("lm_head",),
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> nn.Module:
    """Every linear becomes a `LowBitLinear`, trained a step per batch, in place.

    A copy is trained, in float32, with the model itself as the teacher. Norms and
    embeddings are trained, too, and stay floats. With no batch at all it is rounding
    to nearest. Keys and values are rounded by whoever reads: `logits(model, ids,
    config.kv_bits)`, or a `QuantizedCache(layers, config.kv_bits)`.

    Args:
        batches: token ids, from `self_generate` or from any text.
        skip: last names of linears that are left out.
    Raises:
        ValueError: bad batches; a linear that cannot be rounded (named); a loss that is
            not finite. The model is then as it was.
    """
    batches = checked(batches)
    names = list(walk.linears(model, skip))
    student = deepcopy(model).float()
    walk.put_modules(
        student,
        {name: FakeQuantLinear(student.get_submodule(name), config) for name in names},
    )
    if batches:
        with torch.enable_grad():
            train(student, model, batches, config, progress)
    made: dict[str, nn.Module] = {}
    if config.weight_bits == FLOAT:
        made = {name: student.get_submodule(name) for name in names}
    else:
        for name in names:
            linear = student.get_submodule(name)
            made[name] = LowBitLinear.from_float(linear, config)
    _put(model, student, made)
    return model


@torch.no_grad()
def _put(model: nn.Module, student: nn.Module, made: dict[str, nn.Module]) -> None:
    """The student's floats and new linears go into the model, in its own dtypes."""
    trained = dict(student.named_parameters())
    for name, p in model.named_parameters():
        if name in trained:
            p.copy_(trained[name])
    for name, module in made.items():
        old = model.get_submodule(name)
        if module.bias is not None:
            module.bias = old.bias  # it has the trained values now
        if isinstance(module, FakeQuantLinear):
            module.weight = old.weight
    walk.put_modules(model, made)
