import pytest
import torch

from llmlab.models.llama import Llama, LlamaConfig

SHAPE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,  # GQA: k and v are 8 wide, q is 24
    # large enough for gradients that a tolerance of 1e-5 can tell apart
    initializer_range=0.2,
)


def make_llama(**other) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**SHAPE, **other})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model


def make_hf(**other):
    """transformers' Llama with the weights of `make_llama`."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM(
        HFConfig(**{**SHAPE, "max_position_embeddings": 64, **other})
    ).eval()
    theirs.load_state_dict(make_llama(**other).state_dict(), strict=False)
    return theirs


def randomise(model, seed=1):
    """Give every A and B of an adapted model, ours or peft's, values drawn by place, so
    that B is no longer 0.
    """
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=dice) * 0.1)
    return model


@pytest.fixture
def tokens():
    return torch.randint(
        0, SHAPE["vocab_size"], (3, 7), generator=torch.Generator().manual_seed(3)
    )


@pytest.fixture
def llama():
    return make_llama()
