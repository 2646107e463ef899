"""Quantising beside bitsandbytes, and decoding with 4 bits beside transformers' floats.

Same weights, same threads. The calibrated methods stand beside llmcompressor, which
does not fit into the course's environment: `beside_llmcompressor` runs in its own.
"""

from __future__ import annotations

import torch

from benchmarks.case import Case
from llmlab.compression import kernels, llm_int8
from llmlab.compression import quantization_basics as qb
from llmlab.models import real_model
from llmlab.models.generation import generate
from llmlab.peft.qlora import nf4

ROWS, COLUMNS = 4096, 4096  # a projection of a Llama of 7B


def weight() -> torch.Tensor:
    """One projection's weight, float32."""
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def nf4_quantise() -> Case:
    """NF4 with blocks of 64; the same bytes come out."""
    from bitsandbytes import functional

    w = weight()
    return Case(
        "NF4, 4,096 × 4,096 (bitsandbytes' C++)",
        lambda: nf4.quantize(w, double=False),
        lambda: functional.quantize_4bit(w, quant_type="nf4"),
        rounds=7,
    )


def int8_quantise() -> Case:
    """8 bits, a scale for each row; the same codes come out."""
    from bitsandbytes import functional

    w = weight()
    return Case(
        "int8 rows, 4,096 × 4,096 (bitsandbytes)",
        lambda: llm_int8.quantize_rows(w),
        lambda: functional.int8_vectorwise_quant(w),
        rounds=7,
    )


def four_bit_decoding(new: int = 32) -> Case:
    """Greedy decoding of the real model: ours in 4 bits, theirs in floats."""
    from transformers import AutoModelForCausalLM

    ours = kernels.fast(qb.apply(real_model.load(), qb.QuantConfig(4, group_size=64)))
    theirs = AutoModelForCausalLM.from_pretrained(
        real_model.path(), dtype=torch.float32
    ).eval()
    ids = torch.tensor([real_model.chat([{"role": "user", "content": "Hello!"}])])
    mask = torch.ones_like(ids)

    def library():
        return theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    return Case(
        f"SmolLM2, {new} tokens, 4 bits (transformers, fp32)",
        lambda: generate(ours, ids, new),
        library,
        rounds=5,
    )


CASES = (nf4_quantise, int8_quantise, four_bit_decoding)
