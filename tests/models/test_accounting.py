"""Counts: against the model itself, PyTorch's FLOP counter, the cache, and the numbers
that papers give.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmlab.models import accounting
from llmlab.models.cache import KVCache
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.models.presets import PRESETS, preset
from tests.models.hugging_face import VARIANTS, make


def eager(q, k, v, mask):
    """Attention as two matrix products, which the counter sees (it has no formula for
    the fused CPU kernel).
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_equal_the_models(name):
    with torch.device("meta"):
        model = Llama(preset(name))
    assert accounting.parameters(preset(name)) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_of_every_variant(name):
    model = make(**VARIANTS[name])
    assert accounting.parameters(model.config) == sum(
        p.numel() for p in model.parameters()
    )


PUBLISHED = {  # parameters of the published checkpoints
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert accounting.parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-7b", 6.7), ("llama-13b", 13.0), ("llama-33b", 32.5), ("llama-65b", 65.2)],
)
def test_table_2_of_the_llama_paper(name, billions):
    assert abs(accounting.parameters(preset(name)) / 1e9 - billions) < 0.1


@settings(max_examples=15, deadline=None)
@given(
    kv=st.integers(1, 2),
    group=st.integers(1, 3),
    seq=st.integers(1, 9),
    batch=st.integers(1, 3),
    past=st.integers(0, 7),
    ff=st.integers(3, 30),
)
def test_forward_flops_equal_the_counter(kv, group, seq, batch, past, ff):
    config = LlamaConfig(23, 20, ff, 2, kv * group, kv, head_dim=6)
    model, cache = Llama(config), KVCache(2)
    with torch.no_grad():
        if past:
            model(torch.zeros(batch, past, dtype=torch.long), cache=cache)
        ids = torch.zeros(batch, seq, dtype=torch.long)
        assert counted(
            lambda: model(ids, cache=cache, attention=eager)
        ) == accounting.forward_flops(config, batch, seq, past)


def test_training_flops_equal_the_counter():
    model, ids = make(num_key_value_heads=2), torch.zeros(2, 8, dtype=torch.long)

    def step():
        logits = model(ids, attention=eager)
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()

    assert counted(step) == accounting.training_flops(model.config, 2, 8)


def test_last_logits_only():
    model, ids = make(), torch.zeros(2, 8, dtype=torch.long)
    assert counted(
        lambda: model(ids, attention=eager, logits_to_keep=1)
    ) == accounting.forward_flops(model.config, 2, 8, logits=1)


@pytest.mark.parametrize("name", ["llama-7b", "llama-2-70b", "smollm2-135m"])
def test_six_n(name):
    """With PaLM's attention term it is exact but for the norms' parameters; without, a
    few percent less.
    """
    config, seq = preset(name), 2048
    exact = accounting.training_flops(config, 1, seq)
    norms = 6 * accounting.parameters_by_part(config)["norms"] * seq
    assert accounting.six_n_flops(config, seq, seq) - norms == exact
    assert accounting.six_n_flops(config, seq) < exact


def test_kv_cache_bytes():
    model, cache = make(num_key_value_heads=2), KVCache(2)
    with torch.no_grad():
        model(torch.zeros(3, 11, dtype=torch.long), cache=cache)
    assert accounting.kv_cache_bytes(model.config, 3, 11, torch.float32) == cache.nbytes
    # half a MiB per token in fp16
    assert accounting.kv_cache_bytes(preset("llama-7b"), 1, 1) == 524_288


def test_weight_bytes():
    model = make()
    assert accounting.weight_bytes(model.config, torch.float32) == sum(
        p.nbytes for p in model.parameters()
    )
    assert sum(
        accounting.adam_bytes(model.config).values()
    ) == 16 * accounting.parameters(model.config)
