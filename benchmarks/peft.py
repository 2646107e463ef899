"""Our LoRA training step against peft's: same base, same A and B, same batch, same optimizer, same threads."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.nn.functional as F

from benchmarks.case import Case
from llmlab.peft import lora, walk

SHAPE = dict(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)
RANK, ALPHA, BATCH, SEQ = 8, 16, 4, 128


def models(targets: list[str]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """transformers' Llama twice, once with our adapters and once with peft's; the bases and factors are equal."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = lora.apply(base, lora.LoRAConfig(r=RANK, alpha=ALPHA, target_modules=tuple(targets)))
    layers = walk.installed(ours, lora.LoRALinear)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                place, which, adapter, _ = name.removeprefix("base_model.model.").rsplit(".", 3)
                getattr(layers[place], which)[adapter].copy_(p)
    return ours.train(), theirs.train()


def step_of(model: torch.nn.Module, tokens: torch.Tensor):
    """A training step as a function: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        logits = model(tokens).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def case(name: str, targets: list[str]) -> Case:
    ours, theirs = models(targets)
    tokens = torch.randint(0, SHAPE["vocab_size"], (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    return Case(name, step_of(ours, tokens), step_of(theirs, tokens))


def lora_training_step_attention() -> Case:
    return case("LoRA training step, q and v, against peft", ["q_proj", "v_proj"])


def lora_training_step_all_linear() -> Case:
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return case("LoRA training step, all linears, against peft", every)


CASES = [lora_training_step_attention, lora_training_step_all_linear]
