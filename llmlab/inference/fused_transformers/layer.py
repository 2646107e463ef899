"""A whole Llama of fused layers, made from one that is not fused.

A layer is nine launches, eight of them over (N, d) tokens:

    add_rms_norm   product   rope_and_store   attention   product
    add_rms_norm   product   swiglu           product

The residual stream is handed on beside the result: the sum that ends a layer is taken
by the norm that begins the next one.

Simplified: FasterTransformer takes RoPE, the write and the attention of one new token
in one kernel; here attention is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.inference.fused_transformers import kernels
from llmlab.inference.fused_transformers.pieces import pack_qkv
from llmlab.models.attention import attention_mask_for, sdpa

# (layer, qkv of all tokens) → what W_o reads, (N, H·D)
Attend = Callable[[int, Tensor], Tensor]


class StaticCache:
    """Keys and values in memory that is taken once: a new token has its place.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        sizes = (layers, batch, kv_heads, head_dim, capacity)
        if min(sizes) < 1:
            raise ValueError(
                f"layers={layers}, batch={batch}, kv_heads={kv_heads}, head_dim="
                f"{head_dim} and capacity={capacity} must be at least 1"
            )
        shape = (batch, kv_heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.capacity = capacity
        self.length = 0


class Packed(nn.Module):
    """A weight, with a bias or not, that may be in 8 bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        y = kernels.linear_8bit(x, self.codes, self.scale)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def to_8bit(self) -> None:
        """Codes of 8 bits and a scale for each row take the weight's place."""
        codes, scale = kernels.to_8bit(self.weight)
        self.weight = None
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)


class FusedLayer(nn.Module):
    """One layer: four products, four passes, one attention."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        linears = {
            part: _linear(layer, part, name)
            for part in (
                *(f"self_attn.{x}_proj" for x in "qkvo"),
                *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            )
        }
        q, k, v, o, gate, up, down = linears.values()
        self.qkv = _packed(pack_qkv, name, q, k, v)
        self.gate_up = _packed(lambda *both: torch.cat(both), name, gate, up)
        self.o = _packed(lambda x: x, name, o)
        self.down = _packed(lambda x: x, name, down)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        for norm in norms:
            _check_norm(norm, name)
        self.norm_1, self.norm_2 = (norm.weight for norm in norms)
        self.eps = _eps(norms[0])

    def forward(
        self,
        x: Float[Tensor, "N d"] | None,
        residual: Float[Tensor, "N d"],
        index: int,
        attend: Attend,
    ) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]]:
        """What is still to be added to the residual stream, and the stream."""
        x, residual = kernels.add_rms_norm(x, residual, self.norm_1, self.eps)
        x = self.o(attend(index, self.qkv(x)))
        x, residual = kernels.add_rms_norm(x, residual, self.norm_2, self.eps)
        return self.down(kernels.swiglu(self.gate_up(x))), residual


@dataclass(frozen=True)
class BatchAttention:
    """B texts of T new tokens each, behind what the cache has."""

    cache: StaticCache
    cos: Float[Tensor, "N half"]
    sin: Float[Tensor, "N half"]
    mask: Tensor | None

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        start = self.cache.length
        q = kernels.rope_and_store(qkv, self.cos, self.sin, keys, values, start)
        stop = start + q.shape[2]
        out = sdpa(q, keys[:, :, :stop], values[:, :, :stop], self.mask)
        # (B, H, T, D) → (N, H·D): no copy, for it lies in memory as q does
        return out.transpose(1, 2).reshape(len(qkv), -1)


@dataclass(frozen=True)
class PackedAttention:
    """Texts of any lengths in a row: text i begins at starts[i]."""

    starts: list[int]
    kv_heads: int
    head_dim: int
    cos: Float[Tensor, "N half"]
    sin: Float[Tensor, "N half"]

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        shape = (1, self.kv_heads, len(qkv), self.head_dim)
        keys, values = qkv.new_empty(shape), qkv.new_empty(shape)
        q = kernels.rope_and_store(qkv, self.cos, self.sin, keys, values, 0)
        out = []
        for a, b in zip(self.starts[:-1], self.starts[1:], strict=True):
            if a < b:
                part = sdpa(q[:, :, a:b], keys[:, :, a:b], values[:, :, a:b], None)
                out.append(part[0].transpose(0, 1).flatten(1))  # (b − a, H·D)
        return torch.cat(out)


class FusedLlama(nn.Module):
    """The same logits, in a quarter of the launches. Made by `fuse`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.embedding = model.model.embed_tokens.weight
        self.head = model.lm_head.weight  # shared, tied or not
        layers = enumerate(model.model.layers)
        self.layers = nn.ModuleList(FusedLayer(x, f"layers.{i}") for i, x in layers)
        _check_norm(model.model.norm, "model")
        self.norm = model.model.norm.weight
        self.eps = _eps(model.model.norm)
        self.register_buffer("theta", _frequencies(model), persistent=False)
        self.head_dim = 2 * len(self.theta)

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        """Room for `capacity` tokens in each of `batch` texts."""
        dtype = self.embedding.dtype
        return StaticCache(
            len(self.layers), batch, self.kv_heads, self.head_dim, capacity, dtype
        )

    def angles(self, positions: Int[Tensor, "N"]) -> tuple[Tensor, Tensor]:
        """cos and sin, (N, D/2): the angle of a pair once, not twice."""
        angles = positions[:, None] * self.theta
        dtype = self.embedding.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def hidden(self, ids: Int[Tensor, "N"], attend: Attend) -> Float[Tensor, "N d"]:
        """The normed state of each token after the last layer."""
        residual = F.embedding(ids, self.embedding)  # (N, d), new: it may be changed
        x = None
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, index, attend)
        return kernels.add_rms_norm(x, residual, self.norm, self.eps)[0]

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        cache: StaticCache | None = None,
        logits_to_keep: int = 0,
    ) -> Float[Tensor, "B kept vocab"]:
        """Logits for every position, or for the last `logits_to_keep`.

        Args:
            cache: of `new_cache`; it is extended in place.
        Raises:
            ValueError: the cache is full.
        """
        B, T = ids.shape
        if cache is None:
            cache = self.new_cache(B, T)
        past = cache.length
        positions = torch.arange(past, past + T).repeat(B)  # (N,)
        mask = attention_mask_for(T, past, None, ids.device)
        attend = BatchAttention(cache, *self.angles(positions), mask)
        h = self.hidden(ids.reshape(-1), attend).unflatten(0, (B, T))
        cache.length = past + T
        return F.linear(h[:, -logits_to_keep:], self.head)

    def packed(
        self, ids: Int[Tensor, "N"], starts: Int[Tensor, "texts_and_1"]
    ) -> Float[Tensor, "N vocab"]:
        """Logits of texts that stand one after the other, without padding.

        Args:
            starts: where each text begins, and at the end N; see
                `padding.remove_padding`.
        Raises:
            ValueError: `starts` does not rise from 0 to N.
        """
        edges = starts.tolist()
        if edges[0] != 0 or edges[-1] != len(ids) or sorted(edges) != edges:
            raise ValueError(f"starts={edges} must rise from 0 to {len(ids)} tokens")
        lengths = starts.diff()
        begins = starts[:-1].repeat_interleave(lengths)
        tables = self.angles(torch.arange(len(ids)) - begins)
        attend = PackedAttention(edges, self.kv_heads, self.head_dim, *tables)
        return F.linear(self.hidden(ids, attend), self.head)

    def to_8bit(self) -> FusedLlama:
        """All products of the layers with weights of 8 bits, as FasterTransformer's
        int8_mode 1; embedding and head stay as they are.
        """
        for module in self.modules():
            if isinstance(module, Packed) and module.weight is not None:
                module.to_8bit()
        return self


def fuse(model: nn.Module) -> FusedLlama:
    """A fused copy of a Llama, ours or one of `transformers`; `model` stays as it is.

    Its packed weights are copies; embedding, head and norms are shared.

    Raises:
        ValueError: the model is no Llama: another activation or norm, other parts in a
            layer, a sliding window; or a linear carries an adapter or is quantised.
    """
    _check_config(model)
    return FusedLlama(model).train(model.training)


# What a model must be -----------------------------------------------------------------

PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


def _check_config(model: nn.Module) -> None:
    """Raises: ValueError: the model is not a Llama."""
    config = getattr(model, "config", None)
    for name in ("hidden_act", "sliding_window"):
        value = getattr(config, name, None)
        if value not in (None, "silu"):
            raise ValueError(f"{name}={value!r}: only a Llama's layer can be fused")
    for i, layer in enumerate(model.model.layers):
        for place, known in PARTS.items():
            names = {name for name, _ in layer.get_submodule(place).named_children()}
            if names - known:
                raise ValueError(
                    f"layers.{i} has parts that a Llama's layer has not:"
                    f" {', '.join(sorted(names - known))}"
                )


def _linear(layer: nn.Module, part: str, name: str) -> nn.Linear:
    """Raises: ValueError: it is more than a linear."""
    module = layer.get_submodule(part)
    if type(module) is not nn.Linear:
        raise ValueError(
            f"{name}.{part} is a {type(module).__name__}, not an nn.Linear: merge its"
            " adapter or dequantise it first"
        )
    return module


@torch.no_grad()
def _packed(pack: Callable[..., Tensor], name: str, *linears: nn.Linear) -> Packed:
    """Several linears over one input as one."""
    biases = [linear.bias for linear in linears]
    some = [bias is not None for bias in biases]
    if any(some) and not all(some):
        # a bias of 0 for those that have none
        biases = [
            linear.weight.new_zeros(linear.out_features) if bias is None else bias
            for linear, bias in zip(linears, biases, strict=True)
        ]
    weight = pack(*(linear.weight for linear in linears)).clone()
    return Packed(weight, pack(*biases).clone() if any(some) else None)


def _eps(norm: nn.Module) -> float:
    """Ours calls it eps, transformers variance_epsilon."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


@torch.no_grad()
def _check_norm(norm: nn.Module, name: str) -> None:
    """Raises: ValueError: it is another norm than x / rms(x) · weight."""
    weight = norm.weight
    x = torch.linspace(-2, 3, 2 * len(weight)).to(weight).view(2, -1)
    wide = x.float()
    rms = (wide.square().mean(-1, keepdim=True) + _eps(norm)).sqrt()
    expected = weight * (wide / rms).to(x.dtype)
    if not torch.allclose(norm(x), expected, rtol=0.02, atol=1e-3):
        raise ValueError(f"{name} has a {type(norm).__name__} that is no RMSNorm")


def _frequencies(model: nn.Module) -> Float[Tensor, "half"]:
    """RoPE's angles per token.

    Raises:
        ValueError: they depend on the text's length, or come with a factor.
    """
    if hasattr(model.model, "theta"):
        return model.model.theta.float().clone()
    rope = model.model.rotary_emb
    if rope.rope_type == "dynamic" or rope.attention_scaling != 1:
        raise ValueError(
            f"rope_type={rope.rope_type!r} with attention_scaling="
            f"{rope.attention_scaling}: its angles are not those of a plain table"
        )
    return rope.inv_freq.float().clone()
