"""AdapterFusion against its equation and the `adapters` library's golden file."""

import copy

import pytest
import torch
import torch.nn.functional as F

from llmlab.peft import walk
from llmlab.peft.adapters import adapters, bottleneck
from llmlab.peft.adapters import fusion as adapter_fusion
from llmlab.peft.adapters.adapters import AdapterConfig
from llmlab.peft.adapters.fusion import FusionConfig
from tests.peft import goldens
from tests.peft.adapters.test_adapters import parts_of, run, stir
from tests.peft.conftest import make_hf, make_llama

TWO = FusionConfig(("a", "b"))


def with_two(model, kind="pfeiffer", m=6):
    for seed, name in enumerate(TWO.adapters):
        stir(adapters.apply(model, AdapterConfig(kind, m), name), seed)
    return model


def mixer_parts(model, fusion="fusion"):
    return {
        f"{path}.{name}": p
        for path, site in bottleneck.sites(model).items()
        for name, p in site.mixers[fusion].named_parameters()
    }


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_forward_and_gradients_are_those_of_the_adapters_library(kind):
    model = adapter_fusion.apply(with_two(goldens.base(kind)), TWO)
    weights = goldens.of("fusion", "weight")
    for name in TWO.adapters:
        goldens.put(
            parts_of(model, name),
            {
                n.removeprefix(f"{name}:"): t
                for n, t in weights.items()
                if n.startswith(f"{name}:")
            },
        )
    goldens.put(mixer_parts(model), {n: t for n, t in weights.items() if ":" not in n})
    goldens.check(model, "fusion", mixer_parts(model))
    assert walk.trainable(model)[0] == adapter_fusion.num_parameters(model)


def test_two_keys_worked_by_hand():
    query, key = torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    value = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    out, s = adapter_fusion.attend(query, key, value)
    heavy = torch.sigmoid(torch.tensor(1.0)).item()  # scores 0 and 1, not divided by √2
    torch.testing.assert_close(s, torch.tensor([1 - heavy, heavy]))
    torch.testing.assert_close(out, torch.tensor([10 * (1 - heavy), 10 * heavy]))


def test_the_value_matrix_starts_as_the_identity(llama):
    adapter_fusion.apply(with_two(llama), TWO)
    for site in bottleneck.sites(llama).values():
        W = site.mixers["fusion"].value.weight.detach()
        assert (
            torch.equal(W.diagonal(), torch.ones(24))
            and 0 < (W - torch.eye(24)).abs().max() <= 1e-6
        )
        assert site.mixers["fusion"].value.bias is None


def test_with_scores_of_zero_it_is_the_mean_of_the_adapters(llama, tokens):
    adapter_fusion.apply(with_two(llama), TWO)
    site = llama.model.layers[0].after_block
    with torch.no_grad():
        site.mixers["fusion"].query.weight.zero_()
    x = torch.randn(2, 5, 24)
    mean = (site.nets["a"](x) + site.nets["b"](x)) / 2
    torch.testing.assert_close(site.change(x), mean, rtol=0, atol=1e-4)


def test_base_and_adapters_are_frozen(llama, tokens):
    adapter_fusion.apply(with_two(llama, "houlsby"), TWO)
    before = {n: p.clone() for n, p in llama.named_parameters() if ".mixers." not in n}
    optimizer = torch.optim.SGD(
        [p for p in llama.parameters() if p.requires_grad], lr=1.0
    )
    F.cross_entropy(
        llama(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    optimizer.step()
    assert all(
        torch.equal(p, before[n]) and p.grad is None
        for n, p in llama.named_parameters()
        if n in before
    )
    assert len([p for p in llama.parameters() if p.requires_grad]) == 4 * 5


def test_the_penalty_is_zero_at_the_identity_and_pulls_back_to_it(llama):
    adapter_fusion.apply(with_two(llama), TWO)
    W = llama.model.layers[1].after_block.mixers["fusion"].value.weight
    assert adapter_fusion.value_penalty(llama).item() < 1e-8
    with torch.no_grad():
        W[0, 0] = 3.0
    penalty = adapter_fusion.value_penalty(llama, strength=0.5)
    assert abs(penalty.item() - 2.0) < 1e-5
    penalty.backward()
    assert abs(W.grad[0, 0].item() - 2.0) < 1e-5


def test_weights_are_shares(llama, tokens):
    adapter_fusion.apply(with_two(llama), TWO)
    with pytest.raises(ValueError, match="has not run yet"):
        adapter_fusion.weights(llama)
    llama(tokens)
    found = adapter_fusion.weights(llama)
    assert [*found] == ["model.layers.0.after_block", "model.layers.1.after_block"]
    for s in found.values():
        assert s.shape == (*tokens.shape, 2)
        torch.testing.assert_close(s.sum(-1), torch.ones(tokens.shape))


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_taken_off_only_the_fusion_goes_and_then_the_base_is_there_again(make, tokens):
    model = make()
    state, plain = copy.deepcopy(model.state_dict()), run(model, tokens)
    with_two(model)
    adapters.set_adapter(model, "a")
    alone = run(model, tokens)
    stir(adapter_fusion.apply(model, TWO))
    assert not torch.equal(run(model, tokens), alone)
    adapter_fusion.remove(model, "fusion")
    adapters.set_adapter(model, "a")
    assert torch.equal(run(model, tokens), alone)
    adapter_fusion.apply(model, TWO)
    adapters.remove(model)
    assert model.state_dict().keys() == state.keys() and torch.equal(
        run(model, tokens), plain
    )


def test_an_adapter_that_goes_takes_its_fusion_along(llama):
    adapter_fusion.apply(with_two(llama), TWO)
    adapters.remove(llama, "b")
    assert adapter_fusion.fusions(llama) == [] and adapters.adapters(llama) == ["a"]


def test_saved_and_loaded_it_is_the_same(llama, tokens, tmp_path):
    stir(adapter_fusion.apply(with_two(llama), TWO))
    adapter_fusion.save(llama, tmp_path)
    again = adapter_fusion.load(with_two(make_llama()), tmp_path)
    assert torch.equal(again(tokens), llama(tokens))


def test_a_file_of_another_width_leaves_the_model_alone(llama, tokens, tmp_path):
    wide = make_llama(hidden_size=36, head_dim=4)
    adapter_fusion.save(adapter_fusion.apply(with_two(wide), TWO), tmp_path)
    with_two(llama)
    before, trained = llama(tokens), walk.trainable(llama)
    with pytest.raises(
        ValueError, match=r"query\.weight.*\(36, 36\).*needs \(24, 24\)"
    ):
        adapter_fusion.load(llama, tmp_path)
    assert torch.equal(llama(tokens), before) and walk.trainable(llama) == trained


def test_bad_calls_are_named(llama):
    for names in (("a",), ("a", "a"), "ab"):
        with pytest.raises(ValueError, match="must be at least two different names"):
            FusionConfig(names)
    adapters.apply(llama, AdapterConfig("houlsby", 4), "a")
    with pytest.raises(ValueError, match="'b' is not on the model"):
        adapter_fusion.apply(llama, TWO)
    adapters.apply(llama, AdapterConfig("pfeiffer", 4), "b")
    with pytest.raises(ValueError, match="are of different kinds"):
        adapter_fusion.apply(llama, TWO)
    with pytest.raises(ValueError, match="fusion='x' is not on the model"):
        adapter_fusion.remove(llama, "x")
