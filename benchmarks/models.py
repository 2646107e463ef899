"""The model beside transformers': a forward pass, a training step, generation.

Both have the same weights and shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.case import Case
from llmlab.models.checkpoint import config_to_hf
from llmlab.models.generation import generate
from llmlab.models.llama import Llama, LlamaConfig

# As wide as a model that trains on a laptop: 12 M parameters, grouped-query attention,
# tied embedding.
SHAPE = LlamaConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)


def twins(config: LlamaConfig = SHAPE):
    """The same weights in our Llama and in transformers'.

    Theirs runs with its fused attention, which is its default.
    """
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    ours = Llama(config)
    theirs = LlamaForCausalLM(HFConfig(**config_to_hf(config)))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def forward(batch: int = 2, seq: int = 256, config: LlamaConfig = SHAPE) -> Case:
    """Logits of every position, without gradients."""
    ours, theirs = twins(config)
    ids = torch.randint(0, config.vocab_size, (batch, seq))

    @torch.inference_mode()
    def mine():
        return ours.eval()(ids)

    @torch.inference_mode()
    def library():
        return theirs.eval()(ids, use_cache=False).logits

    return Case("Llama forward (transformers)", mine, library)


def training_step(batch: int = 4, seq: int = 128, config: LlamaConfig = SHAPE) -> Case:
    """Forward, loss, backward and an AdamW step; returns the loss."""
    ours, theirs = twins(config)
    ids = torch.randint(0, config.vocab_size, (batch, seq))
    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)

    def step(loss, optimizer):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def mine():
        targets = F.pad(ids[:, 1:], (0, 1), value=-100)  # the last position has none
        loss = F.cross_entropy(ours(ids).flatten(0, 1), targets.flatten())
        return step(loss, our_optimizer)

    def library():
        loss = theirs(ids, labels=ids, use_cache=False).loss
        return step(loss, their_optimizer)

    return Case("Llama training step (transformers)", mine, library)


def generation(
    batch: int = 1, prompt: int = 32, new: int = 32, config: LlamaConfig = SHAPE
) -> Case:
    """Greedy decoding with a cache; both return the same tokens."""
    ours, theirs = twins(config)
    ours.eval()
    theirs.eval()
    ids = torch.randint(0, config.vocab_size, (batch, prompt))
    mask = torch.ones_like(ids)

    def mine():
        return generate(ours, ids, new)

    def library():
        return theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    name = f"greedy generation, {batch} × {new} tokens (transformers' generate)"
    return Case(name, mine, library, rounds=9)


def batched_generation() -> Case:
    """Eight prompts at once."""
    return generation(batch=8)


CASES = (forward, training_step, generation, batched_generation)
