"""Every method that `peft` has too, with settings for both sides, and bases of shapes
that no other test uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from torch import nn

from llmlab.peft import bitfit, ia3
from llmlab.peft.adalora import adalora
from llmlab.peft.adalora import files as adalora_files
from llmlab.peft.lora import files as lora_adapters
from llmlab.peft.lora import lora
from llmlab.peft.p_tuning import p_tuning, p_tuning_v2
from llmlab.peft.prompt_and_prefix_tuning import prefix_tuning, prompt_tuning
from llmlab.peft.qlora import qlora
from tests.peft.conftest import make_hf, make_llama
from tests.peft.qlora.test_qlora import in_bitsandbytes

GQA = dict(
    hidden_size=36,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=50,
)
BASES = {
    "6 heads over 2, q wider than d": GQA,
    "the same with biases": GQA | dict(attention_bias=True, mlp_bias=True),
    "1 kv head, tied, odd widths": dict(
        hidden_size=27,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=14,
        intermediate_size=31,
        vocab_size=67,
        tie_word_embeddings=True,
    ),
    "no GQA, 3 layers, MLP narrower than d": dict(
        hidden_size=30,
        num_attention_heads=5,
        num_key_value_heads=5,
        intermediate_size=17,
        num_hidden_layers=3,
        attention_bias=True,
    ),
}
# Every weight a multiple of 64, no row's length one of 16: what `in_bitsandbytes`
# takes.
FOUR_BIT = dict(
    hidden_size=72,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    intermediate_size=56,
)
KINDS = {"ours": make_llama, "transformers": make_hf}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADA = dict(
    init_r=5,
    target_r=2,
    target_modules=("q_proj", "v_proj", "down_proj"),
    total_step=3,
    tfinal=1,
)


@dataclass(frozen=True)
class Method:
    """One method on both sides: our module and settings, `peft`'s class and
    settings.
    """

    module: ModuleType
    config: object
    cls: str
    settings: dict = field(default_factory=dict)
    files: ModuleType | None = None  # where save and load are, if not in `module`
    # what `peft`'s side does to the base first
    base: Callable[[nn.Module], nn.Module] = lambda model: model
    # `peft` runs its network once for each row of the batch, we once: the same numbers
    # but for the order of sums, and so for the last bit when they are rounded to bf16.
    network_runs_a_row: bool = False
    # a fresh adapter leaves the function as it is, to the bit
    starts_as_the_base: bool = True


def prompt(module: ModuleType, config: object, cls: str, **settings) -> Method:
    """A method whose virtual tokens change the function from the start."""
    network = "encoder_hidden_size" in settings
    return Method(
        module,
        config,
        cls,
        settings,
        starts_as_the_base=False,
        network_runs_a_row=network,
    )


METHODS = {
    "LoRA, r 3": Method(
        lora,
        lora.LoRAConfig(r=3, alpha=7, target_modules=("q_proj", "v_proj")),
        "LoraConfig",
        dict(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]),
        lora_adapters,
    ),
    "LoRA, r 5, all linears, rank-stabilised": Method(
        lora,
        lora.LoRAConfig(r=5, alpha=4, target_modules="all-linear", rslora=True),
        "LoraConfig",
        dict(r=5, lora_alpha=4, target_modules="all-linear", use_rslora=True),
        lora_adapters,
    ),
    "QLoRA": Method(
        qlora,
        qlora.QLoRAConfig(r=3, alpha=9),
        "LoraConfig",
        dict(r=3, lora_alpha=9, target_modules=list(LINEARS)),
        base=in_bitsandbytes,
        starts_as_the_base=False,  # 4 bits are not the base's
    ),
    "AdaLoRA": Method(
        adalora,
        adalora.AdaLoRAConfig(**ADA, alpha=7),
        "AdaLoraConfig",
        ADA | dict(lora_alpha=7, target_modules=list(ADA["target_modules"])),
        adalora_files,
    ),
    "(IA)³": Method(
        ia3,
        ia3.IA3Config(),
        "IA3Config",
        dict(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    ),
    "BitFit": Method(
        bitfit,
        bitfit.BitFitConfig(target_modules="all-linear"),
        "BeftConfig",
        dict(target_modules=list(LINEARS)),
    ),
    "Prompt Tuning": prompt(
        prompt_tuning,
        prompt_tuning.PromptTuningConfig(3),
        "PromptTuningConfig",
        num_virtual_tokens=3,
    ),
    "P-Tuning, MLP": prompt(
        p_tuning,
        p_tuning.PTuningConfig(3, hidden=7),
        "PromptEncoderConfig",
        num_virtual_tokens=3,
        encoder_hidden_size=7,
    ),
    "P-Tuning, LSTM": prompt(
        p_tuning,
        p_tuning.PTuningConfig(5, encoder="LSTM", hidden=3, lstm_layers=1),
        "PromptEncoderConfig",
        num_virtual_tokens=5,
        encoder_hidden_size=3,
        encoder_num_layers=1,
        encoder_reparameterization_type="LSTM",
    ),
    "Prefix Tuning": prompt(
        prefix_tuning,
        prefix_tuning.PrefixTuningConfig(3, hidden=7),
        "PrefixTuningConfig",
        num_virtual_tokens=3,
        prefix_projection=True,
        encoder_hidden_size=7,
    ),
    "P-Tuning v2": prompt(
        p_tuning_v2,
        p_tuning_v2.PTuningV2Config(5),
        "PrefixTuningConfig",
        num_virtual_tokens=5,
    ),
}


# QLoRA has a base of its own: where a weight is no multiple of its block, bitsandbytes
# compiles on a CPU, for 20 seconds.
PAIRS = {
    f"{name}, {base}": (name, shape)
    for name in METHODS
    for base, shape in BASES.items()
    if name != "QLoRA"
}
PAIRS["QLoRA, 6 heads over 2, q wider than d"] = ("QLoRA", FOUR_BIT)
