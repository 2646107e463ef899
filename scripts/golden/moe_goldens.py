"""Makes tests/parallelism/golden/megatron_moe.json, on the CPU.

It holds Megatron-core's router, capacity and balance loss.

Run with megatron-core 0.16.1 (it is not in the lock) and torch 2.13.0:

    pip download \\
        --no-deps megatron-core==0.16.1 && unzip megatron_core-*.whl -d megatron
    PYTHONPATH=megatron python scripts/golden/moe_goldens.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from megatron.core.transformer.moe import moe_utils

OUT = (
    Path(__file__).parents[2] / "tests" / "parallelism" / "golden" / "megatron_moe.json"
)
CASES = ((23, 6, 2), (16, 8, 1), (20, 5, 3))  # tokens, experts, experts per token


def case(T: int, E: int, k: int) -> dict:
    """Logits, and what the library makes of them."""
    logits = torch.randn(
        T, E, generator=torch.Generator().manual_seed(T)
    ).requires_grad_()
    renormalised, chosen = moe_utils.topk_routing_with_score_function(logits, k)
    plain, _ = moe_utils.topk_routing_with_score_function(
        logits, k, use_pre_softmax=True
    )
    loss = moe_utils.switch_load_balancing_loss_func(
        probs=logits.softmax(-1),
        tokens_per_expert=chosen.sum(0),
        total_num_tokens=T,
        topk=k,
        num_experts=E,
        moe_aux_loss_coeff=1.0,
    )
    loss.backward()
    drops = {}
    for factor in (0.5, 1.0, 1.25):
        _, kept = moe_utils.apply_router_token_dropping(
            plain.detach(), chosen, k, factor, drop_policy="probs"
        )
        drops[str(factor)] = {
            "capacity": moe_utils.get_capacity(T * k, E, factor),
            "kept": kept.int().tolist(),
        }
    return {
        "k": k,
        "logits": logits.tolist(),
        "chosen": chosen.int().tolist(),
        "renormalised": renormalised.tolist(),
        "plain": plain.tolist(),
        "loss": loss.item(),
        "gradient": logits.grad.tolist(),
        "drops": drops,
    }


if __name__ == "__main__":
    text = json.dumps(
        {"megatron-core": "0.16.1", "cases": [case(*sizes) for sizes in CASES]},
        separators=(",", ":"),
    )
    OUT.write_text(text + "\n", encoding="utf-8")
