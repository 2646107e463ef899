"""How the formats of other libraries lay out 4-bit and 8-bit codes in 32-bit words.

Every format stores w = s · (u − z) with unsigned codes u of b bits, p = 32 / b in a
word. They differ in what shares a word, in which order, and in how z is written:

    format               words           in a word            z
    compressed-tensors   (out, in / p)   neighbours of a row  none, or (out / p, groups)
    GPTQ                 (in / p, out)   neighbours of a row  (groups, out / p), z − 1
    AWQ                  (in, out / p)   neighbours of a      (groups, out / p)
                                         column, 0 2 4 6 1 3 5 7

The first code of a word is its lowest bits. compressed-tensors 0.19; AutoGPTQ's layout,
which transformers calls "gptq"; llm-awq's "gemm", which has 4 bits only. At 3 bits the
first two let a code begin in one word and end in the next.

    u   unsigned codes, (out, in)      s   scales, (out, groups)      z   (out, groups)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from llmlab.compression import quantization_basics as qb

BITS = {
    "compressed-tensors": (2, 3, 4, 5, 6, 7, 8),
    "gptq": (2, 3, 4, 8),
    "awq": (4,),
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column stands at place 0, 1, 2 … of a word


@dataclass
class Stored:
    """A quantised weight: w = scale · (codes − zero), a scale for each group."""

    codes: Int[Tensor, "out in"]  # 0 … 2^bits − 1
    scale: Float[Tensor, "out groups"]
    zero: Int[Tensor, "out groups"]  # 0 … 2^bits − 1
    bits: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def symmetric(self) -> bool:
        """Whether the zero is in the middle of the codes, and need not be stored."""
        return bool((self.zero == 2 ** (self.bits - 1)).all())

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that is meant, in float32."""
        groups = self.codes.reshape(*self.scale.shape, -1)  # (out, groups, size)
        steps = groups - self.zero[..., None]
        return (self.scale.float()[..., None] * steps).reshape(self.codes.shape)


def pack_words(codes: Int[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Each row as a stream of bits in 32-bit words, the first code in the lowest bits.

    A code of 3 bits may begin in one word and end in the next: 32 codes take 3 words.
    """
    rows, n = codes.shape
    padded = F.pad(codes, (0, -n % 32))  # so that each row ends with a word
    stream = qb.pack(padded, bits)  # bytes; the numbers of a row lie together
    words = stream.view(torch.int32).reshape(rows, -1)  # little-endian, as the files
    return words[:, : -(-n * bits // 32)].contiguous()


def unpack_words(
    words: Int32[Tensor, "rows words"], bits: int, count: int
) -> Int[Tensor, "rows count"]:
    """The first `count` codes of each row that `pack_words` put in."""
    rows, n = words.shape
    words = F.pad(words, (0, -n % bits)).contiguous()  # whole runs of 32 codes
    codes = qb.unpack(
        words.view(torch.uint8).flatten(), bits, words.numel() * 32 // bits
    )
    return codes.reshape(rows, -1)[:, :count].long()


def check_fits(name: str, stored: Stored, format_name: str) -> None:
    """Raises: ValueError: this format cannot hold the weight called `name`."""
    rows, columns = stored.codes.shape
    allowed = BITS[format_name]
    if stored.bits not in allowed:
        raise ValueError(
            f"{name}: bits={stored.bits} must be one of {allowed} in the format"
            f" {format_name!r}"
        )
    # compressed-tensors fills up what is left of a word; the others do not
    if format_name == "compressed-tensors":
        return
    for what, size in (("rows", rows), ("columns", columns)):
        if size * stored.bits % 32:
            raise ValueError(
                f"{name} has {size} {what}; at {stored.bits} bits the format"
                f" {format_name!r} needs a number of them that fills whole 32-bit words"
            )


# compressed-tensors -------------------------------------------------------------------


def to_compressed_tensors(stored: Stored) -> dict[str, Tensor]:
    """The tensors of "pack-quantized", by what follows the layer's name."""
    tensors = {
        "weight_packed": pack_words(stored.codes, stored.bits),
        "weight_scale": stored.scale,
        "weight_shape": torch.tensor(stored.codes.shape),
    }
    if not stored.symmetric:
        # zero points share words along the rows
        packed = pack_words(stored.zero.T.contiguous(), stored.bits)  # (groups, words)
        tensors["weight_zero_point"] = packed.T.contiguous()  # (words, groups)
    return tensors


def from_compressed_tensors(tensors: dict[str, Tensor], bits: int) -> Stored:
    """The inverse."""
    rows, columns = tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"]
    if "weight_zero_point" in tensors:
        packed = tensors["weight_zero_point"].T  # (groups, words)
        zero = unpack_words(packed, bits, rows).T  # (out, groups)
    else:
        zero = torch.full(scale.shape, 2 ** (bits - 1))
    codes = unpack_words(tensors["weight_packed"], bits, columns)
    return Stored(codes, scale, zero, bits)


# GPTQ ---------------------------------------------------------------------------------


def to_gptq(stored: Stored) -> dict[str, Tensor]:
    """The tensors of AutoGPTQ, which stores z − 1."""
    columns = stored.codes.shape[1]
    less_one = stored.zero - 1 & 2**stored.bits - 1  # 0 goes around to the largest
    return {
        "qweight": pack_words(stored.codes, stored.bits).T.contiguous(),
        "qzeros": pack_words(less_one.T.contiguous(), stored.bits),
        "scales": stored.scale.T.contiguous(),
        "g_idx": (torch.arange(columns) // stored.group_size).to(torch.int32),
    }


def from_gptq(tensors: dict[str, Tensor], bits: int, v2: bool = False) -> Stored:
    """The inverse.

    Args:
        v2: z itself is stored, as in the format that is called "gptq_v2".
    Raises:
        ValueError: the columns of a group do not lie together in g_idx.
    """
    columns = len(tensors["qweight"]) * 32 // bits
    scale = tensors["scales"].T.contiguous()  # (out, groups)
    size = columns // scale.shape[1]
    g_idx = tensors.get("g_idx")
    if g_idx is not None and not torch.equal(
        g_idx.long(), torch.arange(columns) // size
    ):
        raise ValueError(
            "g_idx puts columns of a group apart (act-order with groups made anew):"
            " this is not supported"
        )
    codes = unpack_words(tensors["qweight"].T, bits, columns)
    zero = unpack_words(tensors["qzeros"], bits, len(scale)).T  # (out, groups)
    if not v2:
        zero = zero + 1 & 2**bits - 1
    return Stored(codes, scale, zero, bits)


# AWQ ----------------------------------------------------------------------------------


def to_awq(stored: Stored) -> dict[str, Tensor]:
    """The tensors of llm-awq's "gemm": 8 columns of Wᵀ in a word, in AWQ_ORDER."""

    def words(values: Tensor) -> Tensor:
        values = values.T.reshape(values.shape[1], -1, 8)  # (rows, words, 8)
        return pack_words(values[..., AWQ_ORDER].flatten(1), 4)

    return {
        "qweight": words(stored.codes),  # (in, out / 8)
        "qzeros": words(stored.zero),  # (groups, out / 8)
        "scales": stored.scale.T.contiguous(),  # (groups, out)
    }


def from_awq(tensors: dict[str, Tensor], bits: int = 4) -> Stored:
    """The inverse."""
    back = torch.tensor(AWQ_ORDER).argsort()

    def values(words: Tensor) -> Tensor:
        codes = unpack_words(words, bits, 8 * words.shape[1])
        codes = codes.reshape(len(words), -1, 8)[..., back]  # (rows, words, 8)
        return codes.flatten(1).T  # (out, rows)

    scale = tensors["scales"].T.contiguous()
    return Stored(values(tensors["qweight"]), scale, values(tensors["qzeros"]), bits)
