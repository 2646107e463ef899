"""A training step of each method against peft's.

Same base, same start, same batch, same optimizer, same threads.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

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
# bitsandbytes 0.50.2 decodes rows of 688 in blocks of 64 wrongly on AVX-512.
# 704 is 11 × 64.
QLORA_SHAPE = dict(intermediate_size=704)
RANK = 8
ALPHA = 16
BATCH = 4
SEQ = 128
ALL_LINEARS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]


def models(targets: list[str]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """transformers' Llama twice, once with our adapters and once with peft's.

    The bases and the factors are equal.
    """
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = lora.apply(
        base, lora.LoRAConfig(r=RANK, alpha=ALPHA, target_modules=tuple(targets))
    )
    copy_factors(theirs, ours)
    return ours.train(), theirs.train()


@torch.no_grad()
def copy_factors(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Give our adapters the values of peft's factors A and B."""
    layers = walk.installed(ours, lora.LoRALinear)
    for name, value in theirs.named_parameters():
        if "lora_" in name:
            # base_model.model.<place>.lora_A.<adapter>.weight
            path = name.removeprefix("base_model.model.")
            place, factor, adapter, _ = path.rsplit(".", 3)
            getattr(layers[place], factor)[adapter].copy_(value)


def random_tokens() -> torch.Tensor:
    """The batch of every case, [BATCH, SEQ]."""
    dice = torch.Generator().manual_seed(0)
    return torch.randint(0, SHAPE["vocab_size"], (BATCH, SEQ), generator=dice)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that get a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def step_of(model: torch.nn.Module, tokens: torch.Tensor):
    """A training step as a function: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4)

    def step() -> float:
        # peft gives logits for virtual tokens too
        logits = model(tokens).logits[:, -tokens.shape[1] :]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def case(name: str, targets: list[str]) -> Case:
    ours, theirs = models(targets)
    tokens = random_tokens()
    steps = step_of(ours, tokens), step_of(theirs, tokens)
    return Case(name, *steps, models=(ours, theirs))


def lora_training_step_attention() -> Case:
    return case("LoRA step, q and v (peft)", ["q_proj", "v_proj"])


def lora_training_step_all_linear() -> Case:
    return case("LoRA step, all linears (peft)", ALL_LINEARS)


def virtual_token_case(name: str, module, config, their_config) -> Case:
    """A training step with virtual tokens, ours and peft's, from the same numbers."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    theirs = peft.get_peft_model(copy.deepcopy(base), their_config).train()
    ours = module.apply(base, config).train()
    encoder = ours.virtual_tokens.encoder
    state = {
        n.replace("embedding", "embedding.weight"): t
        for n, t in encoder.state_dict().items()
    }
    theirs.prompt_encoder["default"].load_state_dict(state)
    tokens = random_tokens()
    steps = step_of(ours, tokens), step_of(theirs, tokens)
    return Case(name, *steps, models=(ours, theirs))


def prompt_tuning_step() -> Case:
    import peft

    from llmlab.peft.prompt_and_prefix_tuning import prompt_tuning

    theirs = peft.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    return virtual_token_case(
        "Prompt Tuning step, 20 tokens (peft)",
        prompt_tuning,
        prompt_tuning.PromptTuningConfig(20),
        theirs,
    )


def prefix_tuning_step() -> Case:
    import peft

    from llmlab.peft.prompt_and_prefix_tuning import prefix_tuning

    theirs = peft.PrefixTuningConfig(
        num_virtual_tokens=20, prefix_projection=True, task_type="CAUSAL_LM"
    )
    return virtual_token_case(
        "Prefix Tuning step, 20 tokens (peft)",
        prefix_tuning,
        prefix_tuning.PrefixTuningConfig(20),
        theirs,
    )


def p_tuning_step() -> Case:
    import peft

    from llmlab.peft import p_tuning

    theirs = peft.PromptEncoderConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    return virtual_token_case(
        "P-Tuning step, 20 tokens, MLP (peft)",
        p_tuning,
        p_tuning.PTuningConfig(20),
        theirs,
    )


def p_tuning_v2_step() -> Case:
    import peft

    from llmlab.peft.p_tuning import p_tuning_v2

    theirs = peft.PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    return virtual_token_case(
        "P-Tuning v2 step, 20 tokens (peft)",
        p_tuning_v2,
        p_tuning_v2.PTuningV2Config(20),
        theirs,
    )


def adalora_step() -> Case:
    """Forward with the regulariser, backward, AdamW and the allocation of ranks."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmlab.peft import adalora
    from llmlab.peft.adalora import budget

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    shared = dict(init_r=12, target_r=8, total_step=100_000, orth_reg_weight=0.1)
    theirs = peft.AdaLoraConfig(
        **shared,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), theirs)
    ours = adalora.apply(base, adalora.AdaLoRAConfig(**shared, alpha=16))
    layers = adalora.layers_of(ours)
    allocator = budget.RankAllocator(ours)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                place, which, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
                getattr(layers[place], which).copy_(p)
    tokens = random_tokens()

    def step_with(model, loss_of, allocate):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-4)
        time = iter(range(100_000))

        def step() -> float:
            loss = loss_of()
            loss.backward()
            optimizer.step()
            allocate(next(time))
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    def mine():
        return ours(tokens, labels=tokens).loss + adalora.regularizer(ours)

    def averages() -> Iterable[torch.Tensor]:
        """What the library's allocator holds; in ours these are buffers of the model.

        Both hold two averages of each number; the library holds the last value as well.
        """
        rank_allocator = theirs.base_model.rankallocator
        yield from rank_allocator.exp_avg_ipt.values()
        yield from rank_allocator.exp_avg_unc.values()

    return Case(
        "AdaLoRA step, q and v (peft)",
        step_with(ours.train(), mine, allocator.step),
        step_with(
            theirs.train(),
            lambda: theirs(tokens, labels=tokens).loss,
            theirs.base_model.update_and_allocate,
        ),
        models=(ours, theirs),
        beside=averages,
    )


def qlora_step() -> Case:
    """NF4 with double quantisation under LoRA on all linears, in fp32.

    Against peft on bitsandbytes.
    """
    import bitsandbytes as bnb
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmlab.peft import qlora

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**(SHAPE | QLORA_SHAPE)))
    four = copy.deepcopy(base)
    for name, linear in walk.find(four, "all-linear").items():
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            False,
            quant_type="nf4",
            compute_dtype=torch.float32,
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, quant_type="nf4", module=layer
        )
        # On AVX-512-BF16 a forward in eval mode would repack the weight and then pass
        # no gradient. Nothing here evaluates, and nothing that is added later shall.
        layer.support_avx512bf16_for_cpu = False
        walk.replace(four, name, layer.to("cpu"))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(four, config)
    ours = qlora.apply(base, qlora.QLoRAConfig(r=RANK, alpha=ALPHA, keep_base=False))
    copy_factors(theirs, ours)
    tokens = random_tokens()
    return Case(
        "QLoRA step, all linears (peft on bitsandbytes)",
        step_of(ours.train(), tokens),
        step_of(theirs.train(), tokens),
        models=(ours, theirs),
    )


def vector_case(name: str, module, config, their_config) -> Case:
    """A training step with one vector per layer, ours and peft's, same start."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", message="Detected that the base layer has no bias"
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    theirs = peft.get_peft_model(copy.deepcopy(base), their_config).train()
    ours = module.apply(base, config).train()
    assert walk.trainable(ours) == theirs.get_nb_trainable_parameters()
    tokens = random_tokens()
    steps = step_of(ours, tokens), step_of(theirs, tokens)
    return Case(name, *steps, models=(ours, theirs))


def ia3_step() -> Case:
    import peft

    from llmlab.peft import ia3

    theirs = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    return vector_case("(IA)³ step (peft)", ia3, ia3.IA3Config(), theirs)


def bitfit_step() -> Case:
    import peft

    from llmlab.peft import bitfit

    theirs = peft.BeftConfig(target_modules=ALL_LINEARS, task_type="CAUSAL_LM")
    ours = bitfit.BitFitConfig(tuple(ALL_LINEARS))
    return vector_case("BitFit step, all linears (peft's BEFT)", bitfit, ours, theirs)


CASES = [
    lora_training_step_attention,
    lora_training_step_all_linear,
    prompt_tuning_step,
    prefix_tuning_step,
    p_tuning_step,
    p_tuning_v2_step,
    adalora_step,
    qlora_step,
    ia3_step,
    bitfit_step,
]
