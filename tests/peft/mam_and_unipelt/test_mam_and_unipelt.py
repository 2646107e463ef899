"""The parallel adapter, MAM and UniPELT: against their equations and the `adapters`
library's golden file.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from llmlab.models.cache import KVCache
from llmlab.peft import ia3, walk
from llmlab.peft.adapters import bottleneck, parallel_adapter
from llmlab.peft.adapters.parallel_adapter import ParallelAdapterConfig
from llmlab.peft.lora import lora
from llmlab.peft.mam_and_unipelt import gates, mam, unipelt
from llmlab.peft.mam_and_unipelt.mam import MAMConfig
from llmlab.peft.mam_and_unipelt.unipelt import UniPELTConfig
from llmlab.peft.qlora import qlora
from tests.peft import goldens
from tests.peft.adapters.test_adapters import parts_of, run, stir
from tests.peft.conftest import make_hf, make_llama

PARALLEL = ParallelAdapterConfig(12, reads="residual")
MAM = MAMConfig(3, projection=False, bottleneck=6, reads="residual")
UNI = UniPELTConfig(3, projection=False, bottleneck=6, r=3, alpha=3)
METHODS = {
    "parallel": (parallel_adapter, PARALLEL),
    "parallel, normed": (parallel_adapter, ParallelAdapterConfig(5)),
    "mam": (mam, MAM),
    "mam through a network": (mam, MAMConfig(2, hidden=5, bottleneck=4)),
    "unipelt": (unipelt, UNI),
    "unipelt through a network": (
        unipelt,
        UniPELTConfig(2, hidden=5, bottleneck=4, r=2, gate_tokens=2),
    ),
}


def all_parts(model, case):
    """The trained parameters by the names in the file."""
    parts = unipelt.tensors(model, "default") if case == "unipelt" else parts_of(model)
    # state dicts give detached tensors: find the parameters behind them
    if case == "unipelt":
        own = {p.data_ptr(): p for p in model.parameters()}
        parts = {name: own[t.data_ptr()] for name, t in parts.items()}
    if case != "parallel":
        parts[goldens.PREFIX] = model.virtual_tokens.encoders["default"].embedding
    return parts


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("case", ["parallel", "mam", "unipelt"])
def test_forward_and_gradients_are_those_of_the_adapters_library(case, kind):
    method, config = METHODS[case]
    model = method.apply(goldens.base(kind), config)
    goldens.put(all_parts(model, case), goldens.of(case, "weight"))
    goldens.check(model, case, all_parts(model, case))


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize("case", METHODS)
def test_count_save_load_and_taking_off(case, make, tokens, tmp_path):
    method, config = METHODS[case]
    model = make()
    state, plain = copy.deepcopy(model.state_dict()), run(model, tokens)
    method.apply(model, config)
    assert walk.trainable(model)[0] == method.num_parameters(model, config)
    adapted = run(stir(model), tokens)
    assert (adapted - plain).abs().max() > 1e-2
    method.save(model, tmp_path)
    again = method.load(make(), tmp_path, "again")
    torch.testing.assert_close(run(again, tokens), adapted, rtol=0, atol=1e-5)
    method.set_adapter(model, None)
    assert torch.equal(run(model, tokens), plain) and walk.trainable(model)[0] == 0
    method.remove(model)
    assert model.state_dict().keys() == state.keys() and torch.equal(
        run(model, tokens), plain
    )
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("case", METHODS)
def test_two_on_one_base_and_only_the_active_one_trains(case, tokens):
    method, config = METHODS[case]
    model = stir(method.apply(make_llama(), config, "a"), 1)
    first = model(tokens)
    stir(method.apply(model, config, "b"), 2)
    assert not torch.equal(model(tokens), first)
    method.set_adapter(model, "a")
    assert torch.equal(model(tokens), first)
    F.cross_entropy(
        model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert walk.trainable(model)[0] == method.num_parameters(model, config)
    method.remove(model, "b")
    assert torch.equal(model(tokens), first)


@pytest.mark.parametrize("case", METHODS)
def test_a_file_of_another_shape_leaves_the_model_alone(case, tokens, tmp_path):
    method, config = METHODS[case]
    method.save(method.apply(make_llama(hidden_size=36, head_dim=4), config), tmp_path)
    model = make_llama()
    plain, keys = model(tokens), model.state_dict().keys()
    with pytest.raises(ValueError, match=r"this model needs|no place for|lacks"):
        method.load(model, tmp_path)
    assert torch.equal(model(tokens), plain) and model.state_dict().keys() == keys


@pytest.mark.parametrize("case", METHODS)
def test_a_half_precision_base(case, tokens):
    method, config = METHODS[case]
    model = stir(method.apply(make_hf().bfloat16(), config))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert run(model, tokens).dtype == torch.bfloat16


def test_the_parallel_adapter_starts_as_nothing_and_reads_what_the_mlp_reads(
    llama, tokens
):
    plain = llama(tokens)
    parallel_adapter.apply(llama, ParallelAdapterConfig(4, scale=2.5))
    assert torch.equal(llama(tokens), plain)
    stir(llama)
    block, x = llama.model.layers[0], torch.randn(1, 3, 24)
    net = block.beside_mlp.nets["default"]
    hidden = torch.relu(x @ net.down.weight.T + net.down.bias)
    change = 2.5 * (hidden @ net.up.weight.T + net.up.bias)
    with_it = block.mlp(x)
    parallel_adapter.set_adapter(llama, None)
    torch.testing.assert_close(with_it, block.mlp(x) + change, rtol=0, atol=1e-5)


# Gates --------------------------------------------------------------------------------


def test_a_gate_is_the_mean_of_sigmoids_over_the_real_tokens():
    x = torch.tensor([[[1.0], [3.0], [9.0]], [[-2.0], [0.0], [2.0]]])
    w, b = torch.tensor([[1.0]]), torch.tensor([0.5])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    s = torch.sigmoid(x + 0.5)
    torch.testing.assert_close(gates.pooled_gate(x, w, b), s.mean(1, keepdim=True))
    by_hand = torch.stack([s[0, :2].mean(), s[1, 1:].mean()]).view(2, 1, 1)
    torch.testing.assert_close(gates.pooled_gate(x, w, b, mask), by_hand)
    first = torch.stack([s[0, 0], s[1, 1]]).view(2, 1, 1)
    torch.testing.assert_close(gates.pooled_gate(x, w, b, mask, tokens=1), first)


def shut(model, method, bias):
    """Open (+) or shut (−) all gates of one method."""
    with torch.no_grad():
        for gate in gates_of(model)[method]:
            gate.bias.fill_(bias)
            gate.weight.zero_()
    return model


def gates_of(model):
    return {
        "lora": [
            layer.gates["default"]
            for layer in walk.installed(model, gates.GatedLoRALinear).values()
        ],
        "prefix": [block.prefix_gates.gates["default"] for block in model.model.layers],
        "adapter": [
            block.after_block.nets["default"].gate for block in model.model.layers
        ],
    }


def test_shut_gates_leave_the_base_but_for_the_prefix_s_share_of_attention(tokens):
    from llmlab.peft.prompt_and_prefix_tuning import prefix_tuning

    model = stir(unipelt.apply(make_llama(), UNI))
    for method in ("lora", "prefix", "adapter"):
        shut(model, method, -100.0)
    zero = prefix_tuning.apply(
        make_llama(), prefix_tuning.PrefixTuningConfig(3, projection=False, init="zero")
    )
    # keys and values of 0: both are scaled
    torch.testing.assert_close(model(tokens), zero(tokens), rtol=0, atol=1e-5)


def test_an_open_prefix_gate_is_plain_prefix_tuning(tokens):
    from llmlab.peft.prompt_and_prefix_tuning import prefix_tuning

    model = stir(unipelt.apply(make_llama(), UNI), std=0.5)
    for method, bias in (("lora", -100.0), ("prefix", 100.0), ("adapter", -100.0)):
        shut(model, method, bias)
    plain = prefix_tuning.apply(
        make_llama(), prefix_tuning.PrefixTuningConfig(3, projection=False)
    )
    with torch.no_grad():
        plain.virtual_tokens.encoder.embedding.copy_(
            model.virtual_tokens.encoder.embedding
        )
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=1e-5)


def test_gates_depend_on_the_input_and_each_row_has_its_own(tokens):
    model = stir(unipelt.apply(make_llama(), UNI), std=0.5)
    together = model(tokens)
    found = unipelt.gates(model)
    assert {name: tuple(g.shape) for name, g in found.items()} == {
        "lora": (4, 3),
        "prefix": (2, 3),
        "adapter": (2, 3),
    }
    assert all(
        (g > 0).all() and (g < 1).all() and (g[:, 0] != g[:, 1]).all()
        for g in found.values()
    )
    for row in range(3):
        torch.testing.assert_close(
            model(tokens[row : row + 1]), together[row : row + 1], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_padding_does_not_move_the_gates(make, tokens):
    model = stir(unipelt.apply(make(), UNI), std=0.5)
    alone = run(model, tokens)
    padded = F.pad(tokens, (0, 3), value=5)
    mask = F.pad(torch.ones_like(tokens), (0, 3))
    out = model(padded, attention_mask=mask)
    out = getattr(out, "logits", out)[:, : tokens.shape[1]]
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-5)


def test_with_gate_tokens_the_future_is_not_seen(tokens):
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 61
    for config, causal in (
        (UNI, False),
        (UniPELTConfig(3, projection=False, bottleneck=6, r=3, gate_tokens=2), True),
    ):
        model = stir(unipelt.apply(make_llama(), config), std=0.5)
        same = torch.allclose(model(tokens)[:, 1:4], model(changed)[:, 1:4], atol=1e-6)
        assert same == causal


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_decoding_keeps_the_gates_of_the_prompt(make, tokens):
    config = UniPELTConfig(3, projection=False, bottleneck=6, r=3, gate_tokens=4)
    model = stir(unipelt.apply(make(), config), std=0.5)
    whole = run(model, tokens)[:, 4:]
    with torch.no_grad():
        if make is make_llama:
            cache = KVCache(2)
            model(tokens[:, :4], cache=cache)
            steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(4, 7)]
        else:
            cache = model(tokens[:, :4], use_cache=True).past_key_values
            steps = [
                model(tokens[:, i : i + 1], past_key_values=cache).logits
                for i in range(4, 7)
            ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_a_model_whose_gates_have_run_can_be_copied(make, tokens):
    model = stir(unipelt.apply(make(), UNI), std=0.5)
    out = run(model, tokens)  # with a graph: the gates' last values hang on it
    again = copy.deepcopy(model)
    assert torch.equal(run(again, tokens), out)
    assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_lora_on_every_linear_and_a_second_adapter(make, tokens):
    config = UniPELTConfig(
        3, projection=False, bottleneck=4, r=3, alpha=5, target_modules=walk.ALL_LINEAR
    )
    model = make()
    plain = run(model, tokens)
    stir(unipelt.apply(model, config, "a"), std=0.5)
    first = run(model, tokens)
    assert unipelt.gates(model, "a")["lora"].shape == (14, 3)
    stir(unipelt.apply(model, config, "b"), seed=2, std=0.5)
    assert walk.trainable(model)[0] == unipelt.num_parameters(make(), config)
    unipelt.remove(model, "b")
    unipelt.set_adapter(model, "a")
    assert torch.equal(run(model, tokens), first)
    assert torch.equal(run(unipelt.remove(model), tokens), plain)


@pytest.mark.parametrize("method", [parallel_adapter, mam])
def test_a_base_whose_linears_are_wrapped_or_in_4_bits(method, tokens):
    config = ParallelAdapterConfig(4) if method is parallel_adapter else MAM
    for first in (
        ia3.apply(make_llama(), ia3.IA3Config(), "l"),
        qlora.apply(make_llama(), qlora.QLoRAConfig(r=2), "l"),
    ):
        before = first(tokens)
        method.apply(first, config, "m")
        parts = {
            p.dtype
            for net in walk.installed(first, bottleneck.Site).values()
            for p in net.parameters()
        }
        assert parts == {torch.float32}
        assert (stir(first, std=0.5)(tokens) - before).abs().max() > 1e-2


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ParallelAdapterConfig(reads="x"),
            "reads='x' must be one of 'normed', 'residual'",
        ),
        (lambda: ParallelAdapterConfig(0), "bottleneck must be an integer"),
        (lambda: MAMConfig(0), "num_virtual_tokens must be an integer"),
        (lambda: MAMConfig(bottleneck=0), "bottleneck must be an integer"),
        (lambda: UniPELTConfig(r=0), "r must be an integer"),
        (
            lambda: UniPELTConfig(gate_tokens=0),
            "gate_tokens must be None or an integer",
        ),
    ],
)
def test_a_bad_setting_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls_are_named(llama):
    unipelt.apply(llama, UNI)
    with pytest.raises(ValueError, match="has not run yet"):
        unipelt.gates(llama)
    with pytest.raises(ValueError, match="'default' exists already"):
        unipelt.apply(llama, UNI)
    with pytest.raises(ValueError, match="gated LoRA has no merged weight"):
        lora.merge(llama)
    for call in (unipelt.set_adapter, unipelt.remove, unipelt.gates):
        with pytest.raises(ValueError, match="'x' is not on the model"):
            call(llama, "x")
    plain = lora.apply(make_llama(), lora.LoRAConfig())
    with pytest.raises(ValueError, match="plain LoRA adapters on the same layers"):
        unipelt.apply(plain, UNI)


def test_a_model_that_is_no_llama_is_named():
    with pytest.raises(ValueError, match=r"is a Linear without model\.layers"):
        parallel_adapter.apply(torch.nn.Linear(2, 2), ParallelAdapterConfig())
