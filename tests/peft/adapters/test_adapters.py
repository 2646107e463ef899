"""Houlsby's and Pfeiffer's adapters, AdapterDrop: against the equations and the
`adapters` library's golden file.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlab.peft import walk
from llmlab.peft.adapters import adapters, bottleneck
from llmlab.peft.adapters.adapters import AdapterConfig
from llmlab.peft.lora import lora
from tests.peft import goldens
from tests.peft.conftest import make_hf, make_llama

CONFIGS = {
    "houlsby": AdapterConfig("houlsby", bottleneck=6, activation="silu"),
    "pfeiffer": AdapterConfig("pfeiffer", bottleneck=4),
}


def parts_of(model, adapter="default"):
    """An adapter's parameters by the names in its file."""
    return {
        f"{path}.{name}": p
        for path, site in bottleneck.sites(model).items()
        if adapter in site.nets
        for name, p in site.nets[adapter].named_parameters()
    }


def stir(model, seed=1, std=0.2):
    """Move every trained tensor away from its start."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=dice) * std
    return model


def run(model, tokens):
    return getattr(out := model(tokens), "logits", out)


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("case", CONFIGS)
def test_forward_and_gradients_are_those_of_the_adapters_library(case, kind):
    model = adapters.apply(goldens.base(kind), CONFIGS[case])
    goldens.put(parts_of(model), goldens.of(case, "weight"))
    goldens.check(model, case, parts_of(model))
    assert walk.trainable(model)[0] == adapters.num_parameters(model, CONFIGS[case])


def test_a_number_worked_by_hand():
    net = bottleneck.Bottleneck(
        bottleneck.Shape(2, 1, "relu", 3.0, "zero", 0.0), torch.zeros(1)
    )
    with torch.no_grad():
        net.down.weight.copy_(torch.tensor([[1.0, -1.0]]))
        net.down.bias.fill_(0.5)
        net.up.weight.copy_(torch.tensor([[2.0], [4.0]]))
        net.up.bias.copy_(torch.tensor([1.0, 0.0]))
    assert net(torch.tensor([[3.0, 1.0], [1.0, 3.0]])).tolist() == [
        [18.0, 30.0],
        [3.0, 0.0],
    ]


@pytest.mark.parametrize(("kind", "places"), [("houlsby", 2), ("pfeiffer", 1)])
def test_the_start_is_near_the_identity_or_exactly_it(kind, places, tokens):
    plain = make_llama()(tokens)
    near = adapters.apply(make_llama(), AdapterConfig(kind, 8))
    exact = adapters.apply(make_llama(), AdapterConfig(kind, 8, init="zero"))
    assert 0 < (near(tokens) - plain).abs().max() < 0.05 and torch.equal(
        exact(tokens), plain
    )
    assert len(bottleneck.sites(near)) == 2 * places
    net = next(iter(bottleneck.sites(near).values())).nets["default"]
    assert (
        net.down.weight.abs().max() <= 0.02
        and not net.down.bias.any()
        and not net.up.bias.any()
    )


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize(
    "extra", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}], ids=str
)
@pytest.mark.parametrize("case", CONFIGS)
def test_taken_off_the_base_is_there_again_to_the_bit(case, extra, make, tokens):
    model = make(**extra)
    state, plain = copy.deepcopy(model.state_dict()), run(model, tokens)
    stir(adapters.apply(model, CONFIGS[case], "a"))
    stir(adapters.apply(model, AdapterConfig("pfeiffer", 3), "b"))
    assert (run(model, tokens) - plain).abs().max() > 1e-2
    adapters.remove(model, "a")
    assert adapters.adapters(model) == ["b"]
    adapters.remove(model)
    assert model.state_dict().keys() == state.keys() and torch.equal(
        run(model, tokens), plain
    )
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules()
    )


def test_only_the_active_adapter_trains_and_the_base_never(llama, tokens):
    before = {n: p.clone() for n, p in llama.named_parameters()}
    adapters.apply(llama, AdapterConfig(bottleneck=4), "a")
    adapters.apply(llama, AdapterConfig(bottleneck=4), "b")
    adapters.set_adapter(llama, "a")
    F.cross_entropy(
        llama(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    assert {n for n, p in llama.named_parameters() if p.grad is not None} == {
        n for n, _ in llama.named_parameters() if ".nets.a." in n
    }
    torch.optim.SGD(
        [p for p in llama.parameters() if p.grad is not None], lr=1.0
    ).step()
    assert all(
        torch.equal(p, before[n]) for n, p in llama.named_parameters() if n in before
    )


def test_none_is_the_plain_base(llama, tokens):
    plain = llama(tokens)
    stir(adapters.apply(llama, CONFIGS["houlsby"]))
    adapters.set_adapter(llama, None)
    assert torch.equal(llama(tokens), plain) and walk.trainable(llama)[0] == 0


def test_a_half_precision_base_keeps_its_adapter_in_fp32(tokens):
    model = stir(adapters.apply(make_hf().bfloat16(), CONFIGS["houlsby"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert run(model, tokens).dtype == torch.bfloat16


def test_decoding_with_a_cache_gives_the_same_logits(tokens):
    from llmlab.models.cache import KVCache

    model = stir(adapters.apply(make_llama(), CONFIGS["pfeiffer"]))
    cache = KVCache(2)
    steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(tokens.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=0, atol=1e-5)


def test_lora_still_finds_every_linear(llama):
    adapters.apply(llama, CONFIGS["houlsby"])
    lora.apply(llama, lora.LoRAConfig(target_modules="all-linear"))
    assert len(walk.installed(llama, lora.LoRALinear)) == 14


def test_dropout_works_while_training_only(llama, tokens):
    adapters.apply(llama, AdapterConfig(bottleneck=4, dropout=0.5))
    assert torch.equal(llama(tokens), llama(tokens))
    llama.train()
    assert not torch.equal(llama(tokens), llama(tokens))


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize("case", CONFIGS)
def test_saved_and_loaded_it_is_the_same(case, make, tokens, tmp_path):
    model = stir(adapters.apply(make(), CONFIGS[case]))
    adapters.save(model, tmp_path)
    again = adapters.load(make(), tmp_path, "again")
    assert torch.equal(run(again, tokens), run(model, tokens)) and adapters.adapters(
        again
    ) == ["again"]
    assert bottleneck.sites(again).popitem()[1].configs == {"again": CONFIGS[case]}


def test_a_file_of_another_shape_is_refused_and_leaves_the_model_alone(
    tokens, tmp_path
):
    adapters.save(
        adapters.apply(
            make_llama(hidden_size=36, head_dim=4), AdapterConfig(bottleneck=4)
        ),
        tmp_path,
    )
    model, plain = make_llama(), make_llama()(tokens)
    with pytest.raises(
        ValueError, match=r"after_attention\.down\.weight.*\(4, 36\).*needs \(4, 24\)"
    ):
        adapters.load(model, tmp_path)
    assert not bottleneck.sites(model) and torch.equal(model(tokens), plain)


# AdapterDrop --------------------------------------------------------------------------


def test_dropped_layers_have_no_adapter(llama, tokens):
    plain = llama(tokens)
    stir(adapters.apply(llama, CONFIGS["houlsby"]))
    full = llama(tokens)
    half = adapters.drop(llama, 1)(tokens)
    assert not torch.equal(half, full) and not torch.equal(half, plain)
    assert torch.equal(adapters.drop(llama, 2)(tokens), plain) and torch.equal(
        adapters.drop(llama, 0)(tokens), full
    )


def test_no_gradient_goes_below_the_lowest_adapter(llama, tokens):
    adapters.drop(adapters.apply(llama, CONFIGS["pfeiffer"]), 1)
    seen = []
    llama.model.layers[0].register_forward_hook(
        lambda m, a, out: seen.append(out.requires_grad)
    )
    llama.model.layers[1].register_forward_hook(
        lambda m, a, out: seen.append(out.requires_grad)
    )
    llama(tokens).sum().backward()
    assert seen == [False, True]


def test_n_is_drawn_uniformly():
    model, dice = (
        adapters.apply(make_llama(num_hidden_layers=4), CONFIGS["pfeiffer"]),
        torch.Generator().manual_seed(0),
    )
    drawn = [adapters.drop_at_random(model, dice) for _ in range(400)]
    counts = torch.bincount(torch.tensor(drawn), minlength=5).tolist()
    assert counts[4] == 0 and all(70 < c < 130 for c in counts[:4])
    assert [s.dropped for s in bottleneck.sites(model).values()] == [
        i < drawn[-1] for i in range(4)
    ]


def test_dropping_draws_while_training_only_and_brings_all_back(llama, tokens):
    adapters.apply(llama, CONFIGS["pfeiffer"])
    first, seen = bottleneck.sites(llama)["model.layers.0.after_block"], set()
    with adapters.dropping(llama, torch.Generator().manual_seed(0)):
        llama.eval()(tokens)
        assert not first.dropped
        for _ in range(12):
            llama.train()(tokens)
            seen.add(first.dropped)
    assert seen == {True, False} and not first.dropped and not llama._forward_pre_hooks


def test_tasks_that_share_their_lower_blocks_give_what_each_gives_alone(llama, tokens):
    for seed, name in enumerate(["a", "b", "c"]):
        stir(adapters.apply(llama, CONFIGS["houlsby"], name), seed)
    adapters.drop(llama, 1)
    together = adapters.run_tasks(llama, tokens, ["c", "a"], 1)
    for name, logits in zip(["c", "a"], together, strict=True):
        adapters.set_adapter(llama, name)
        torch.testing.assert_close(logits, llama(tokens), rtol=0, atol=1e-5)
    assert not torch.equal(*together)


def test_the_cost_of_eight_tasks():
    assert (
        adapters.shared_cost(12, 8, 5) == 61 / 96 and adapters.shared_cost(4, 1, 3) == 1
    )


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lora"}, "kind='lora' must be one of 'houlsby', 'pfeiffer'"),
        ({"bottleneck": 0}, "bottleneck must be an integer of at least 1, not 0"),
        ({"activation": "glue"}, "activation='glue' must be one of"),
        ({"init": "ones"}, "init='ones' must be one of"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_a_bad_setting_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**change)


def test_bad_calls_are_named(llama):
    with pytest.raises(ValueError, match=r"is a Linear without model\.layers"):
        adapters.apply(nn.Linear(2, 2), CONFIGS["houlsby"])
    adapters.apply(llama, CONFIGS["houlsby"])
    with pytest.raises(ValueError, match="'default' exists already"):
        adapters.apply(llama, CONFIGS["houlsby"])
    with pytest.raises(ValueError, match="must be a name without dots"):
        adapters.apply(llama, CONFIGS["houlsby"], "a.b")
    for call in (adapters.set_adapter, adapters.remove):
        with pytest.raises(ValueError, match="'x' is not on the model"):
            call(llama, "x")
    with pytest.raises(ValueError, match="n=3 must be at least 0 and at most the 2"):
        adapters.drop(llama, 3)
    with pytest.raises(ValueError, match="'x' is not on the model"):
        adapters.run_tasks(llama, torch.zeros(1, 2, dtype=torch.long), ["x"], 0)
    with pytest.raises(
        ValueError, match="model is a LlamaForCausalLM; run_tasks takes our Llama apart"
    ):
        adapters.run_tasks(
            adapters.apply(make_hf(), CONFIGS["houlsby"]),
            torch.zeros(1, 2, dtype=torch.long),
            ["x"],
            0,
        )
