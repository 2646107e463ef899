"""Forms that decode: the same tokens as their floats; the limit of the memory."""

from __future__ import annotations

import pytest
import torch

from llmlab.compression import compression_compared as compared
from llmlab.compression import kernels
from llmlab.models.generation import generate
from tests.models.hugging_face import make

IDS = torch.arange(7)[None]


def test_the_limit_by_hand():
    # 100 MB at 20 GB/s are 5 ms; with 5 ms that no byte makes, half as fast
    assert compared.predicted_rate(100e6, 20e9) == pytest.approx(200)
    assert compared.predicted_rate(100e6, 20e9, 0.005) == pytest.approx(100)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0, 1), "traffic=0 and bandwidth=1 must be above 0"),
        ((1, 0), "must be above 0"),
        ((1, float("nan")), "must be above 0"),
        ((1, 1, -1), "fixed=-1 must be at least 0"),
    ],
)
def test_what_has_no_limit_is_refused(numbers, said):
    with pytest.raises(ValueError, match=said):
        compared.predicted_rate(*numbers)


def test_the_bandwidth_is_one():
    """Between a very slow memory and a large cache."""
    assert 1e8 < compared.bandwidth(megabytes=64, trials=2) < 5e12


def test_a_rate_counts_the_new_tokens_only(monkeypatch):
    from llmlab.compression.compression_compared import speed

    clock = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    model = make()
    calls = []
    model.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[1]))
    assert compared.decode_rate(model, IDS, new=4, trials=2) == 4.0
    assert calls == [7, 1, 1, 1, 1] * 2


@pytest.mark.skipif(not kernels.available(), reason="no C compiler")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits_compute_what_their_decoded_weights_do(tied, bias):
    torch.manual_seed(2)
    model = make(tie_word_embeddings=tied, attention_bias=bias)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    eight = compared.eight_bits(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = eight.get_submodule(name).weight.clone()
    table = eight.model.embed_tokens.table
    model.model.embed_tokens.weight.data = table.weight.clone()
    with torch.no_grad():
        torch.testing.assert_close(eight(IDS), model(IDS), rtol=1e-4, atol=1e-4)
        one = IDS[:, :1]  # through the kernel
        torch.testing.assert_close(eight(one), model(one), rtol=1e-4, atol=1e-4)
        assert torch.equal(generate(eight, IDS, 6), generate(model, IDS, 6))
    assert (eight.lm_head.table is table) == tied
