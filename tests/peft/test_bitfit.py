"""BitFit against its definition, and against `peft`'s BEFT, which trains added biases:
forward, gradients, files, merging.
"""

import json

import pytest
import torch
from torch import nn

from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.models.presets import preset
from llmlab.peft import activations, bitfit, vectors, walk
from llmlab.peft.bitfit import BitFitConfig
from llmlab.peft.lora import lora
from tests.peft.conftest import SHAPE, make_hf, make_llama

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    "all linears": dict(target_modules="all-linear"),
    "value alone, as BEFT": dict(target_modules=("v_proj",)),
    "a regular expression": dict(target_modules=r".*layers\.1\..*(q|up)_proj"),
    "the head": dict(target_modules=("lm_head", "k_proj")),
}
BIASES = dict(attention_bias=True, mlp_bias=True)
ODD = dict(
    hidden_size=30,
    intermediate_size=37,
    head_dim=10,
    num_attention_heads=3,
    num_key_value_heads=1,
)


def peft_model(model, target_modules):
    import peft

    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and walk.matches(n, target_modules)
    ]
    return peft.get_peft_model(
        model, peft.BeftConfig(target_modules=names, task_type="CAUSAL_LM")
    )


def changes(theirs):
    """peft's vectors by the name of the layer."""
    named = {n: p for n, p in theirs.named_parameters() if "beft_bias" in n}
    return {
        n.removeprefix("base_model.model.").partition(".beft_bias")[0]: p
        for n, p in named.items()
    }


def both(kind, case, **shape):
    """Ours and peft's, with the same random changes of bias."""
    theirs = peft_model(make_hf(**shape), **case)
    ours = bitfit.apply(
        make_llama(**shape) if kind == "ours" else make_hf(**shape),
        BitFitConfig(**case),
    )
    layers, dice = (
        walk.installed(ours, bitfit.BiasLayer),
        torch.Generator().manual_seed(1),
    )
    assert layers.keys() == changes(theirs).keys()
    with torch.no_grad():
        for name, p in changes(theirs).items():
            p.copy_(0.5 * torch.randn(p.shape, generator=dice))
            layers[name].vectors["default"].copy_(p.flatten())
    return ours, theirs


def randomise(model, seed=1):
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".vectors." in name:
                p.copy_(0.5 * torch.randn(p.shape, generator=dice))
    return model


def logits(model, tokens):
    out = model(tokens)
    return getattr(out, "logits", out)


# The definition -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_the_gradient_is_that_of_the_bias_itself(make, tokens):
    """β trains as b would: same gradients, and after ten steps of SGD b + β is the b of
    a model whose biases trained.
    """
    plain, ours = make(**BIASES), bitfit.apply(make(**BIASES), BitFitConfig())
    for name, p in plain.named_parameters():
        p.requires_grad_(name.endswith(".bias"))
    layers = walk.installed(ours, bitfit.BiasLayer)
    assert len(layers) == 14
    for model in (plain, ours):
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.5
        )
        for _ in range(10):
            optimizer.zero_grad()
            next_token_loss(logits(model, tokens), tokens).backward()
            optimizer.step()
    start = make(**BIASES)
    for name, layer in layers.items():
        learned, before = plain.get_submodule(name).bias, start.get_submodule(name).bias
        torch.testing.assert_close(layer.base.bias, before, rtol=0, atol=0)
        torch.testing.assert_close(
            before + layer.vectors["default"], learned, rtol=0, atol=1e-5
        )
    k_proj = ours.model.layers[0].self_attn.k_proj.vectors["default"]
    assert max(
        layer.vectors["default"].abs().max() for layer in layers.values()
    ) > 0.05 and k_proj.shape == (8,)


def test_a_model_without_biases_says_so_and_stays_as_it_was(llama):
    with pytest.raises(
        ValueError,
        match=r"target_modules=None .* this one has none .Llama leaves them out.",
    ):
        bitfit.apply(llama, BitFitConfig())
    assert all(p.requires_grad for p in llama.parameters()) and not walk.installed(
        llama, walk.Wrapper
    )


def test_only_what_has_a_bias_trains_when_nothing_is_named():
    model = bitfit.apply(make_llama(attention_bias=True), BitFitConfig())
    assert {
        n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad
    } == set(ALL[:4])


def test_layernorms_count_as_published():
    """BERT-base has 102,912 biases in 109,482,240 parameters; its LayerNorms' among
    them.
    """
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        bert = BertModel(BertConfig())
    own = sum(p.numel() for n, p in bert.named_parameters() if n.endswith("bias"))
    assert bitfit.num_parameters(bert, BitFitConfig()) == own == 102_912
    # β beside the frozen b
    assert walk.trainable(bitfit.apply(bert, BitFitConfig())) == (
        own,
        109_482_240 + own,
    )


def test_a_bias_behind_a_norm_is_a_bias_behind_each_linear_that_reads_it(llama, tokens):
    """W (norm(x) + β) = W norm(x) + W β."""
    behind = bitfit.apply(make_llama(), BitFitConfig(("input_layernorm",)))
    randomise(behind)
    beta = [
        layer.vectors["default"]
        for layer in vectors.layers_of(behind, bitfit.BiasLayer)
    ]
    bitfit.apply(llama, BitFitConfig(ALL[:3]))
    with torch.no_grad():
        for name, layer in walk.installed(llama, bitfit.BiasLayer).items():
            layer.vectors["default"].copy_(
                layer.base.weight @ beta[int(name.split(".")[2])]
            )
    torch.testing.assert_close(llama(tokens), behind(tokens), rtol=0, atol=1e-5)


# Against peft's BEFT ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize(
    "shape",
    [BIASES, ODD | dict(tie_word_embeddings=True)],
    ids=["biases", "odd widths, tied"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_gradients_and_count_are_peft_s(case, shape, kind, tokens):
    ours, theirs = both(kind, case, **shape)
    torch.testing.assert_close(
        logits(ours, tokens), theirs(tokens).logits, rtol=0, atol=1e-5
    )
    next_token_loss(logits(ours, tokens), tokens).backward()
    next_token_loss(theirs(tokens).logits, tokens).backward()
    layers = walk.installed(ours, bitfit.BiasLayer)
    for name, p in changes(theirs).items():
        torch.testing.assert_close(
            layers[name].vectors["default"].grad, p.grad.flatten(), rtol=0, atol=1e-5
        )
    assert max(p.grad.abs().max() for p in changes(theirs).values()) > 1e-4
    assert walk.trainable(ours) == theirs.get_nb_trainable_parameters()
    assert walk.trainable(ours)[0] == bitfit.num_parameters(
        make_llama(**shape), BitFitConfig(**case)
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_files_go_both_ways(case, tokens, tmp_path):
    import peft

    ours, theirs = both("ours", case)
    theirs.save_pretrained(tmp_path / "theirs")
    bitfit.save(ours, tmp_path / "ours")
    loaded = bitfit.load(make_llama(), tmp_path / "theirs", "new")
    assert bitfit.adapters(loaded) == ["new"]
    torch.testing.assert_close(loaded(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    opened = peft.PeftModel.from_pretrained(make_hf(), tmp_path / "ours").eval()
    assert torch.equal(opened(tokens).logits, theirs(tokens).logits)


def test_biases_that_were_there_and_behind_norms_come_back_from_a_file(
    tmp_path, tokens
):
    for config in (
        BitFitConfig(),
        BitFitConfig(("norm", "post_attention_layernorm", "q_proj")),
    ):
        ours = randomise(bitfit.apply(make_llama(**BIASES), config))
        bitfit.save(ours, tmp_path)
        assert torch.equal(
            bitfit.load(make_hf(**BIASES), tmp_path)(tokens).logits.argmax(),
            ours(tokens).argmax(),
        )
        assert torch.equal(
            bitfit.load(make_llama(**BIASES), tmp_path)(tokens), ours(tokens)
        )


def test_a_half_precision_base_keeps_its_changes_in_fp32(tokens):
    ours = randomise(bitfit.apply(make_hf().bfloat16(), BitFitConfig("all-linear")))
    theirs = peft_model(make_hf().bfloat16(), "all-linear")
    with torch.no_grad():
        for name, p in changes(theirs).items():
            p.copy_(ours.get_submodule(name).vectors["default"].view_as(p))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert (
        torch.equal(ours(tokens).logits, theirs(tokens).logits)
        and ours(tokens).logits.dtype == torch.bfloat16
    )


# The start, merging, removing ---------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize("shape", [{}, BIASES], ids=["no biases", "biases"])
def test_starts_as_the_base_merges_unmerges_and_comes_off_bit_for_bit(
    make, shape, tokens
):
    model = make(**shape)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    plain = logits(model, tokens)
    bitfit.apply(model, BitFitConfig("all-linear"))
    assert torch.equal(logits(model, tokens), plain)
    changed = logits(randomise(model), tokens)
    assert (changed - plain).abs().max() > 1e-3
    bitfit.merge(model)
    torch.testing.assert_close(logits(model, tokens), changed, rtol=0, atol=1e-5)
    bitfit.unmerge(model)
    assert torch.equal(logits(model, tokens), changed)
    bitfit.remove(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(logits(model, tokens), plain)


def test_merged_for_good_is_a_llama_with_biases(llama, tokens):
    """peft refuses this: it cannot merge into a layer that has no bias."""
    changed = randomise(bitfit.apply(llama, BitFitConfig("all-linear")))(tokens)
    bitfit.merge_and_unload(llama)
    with_biases = Llama(LlamaConfig(**SHAPE, **BIASES))
    with_biases.load_state_dict(llama.state_dict())
    torch.testing.assert_close(with_biases(tokens), changed, rtol=0, atol=1e-5)


def test_an_rmsnorm_cannot_take_a_bias_in_and_nothing_is_half_merged(llama):
    bitfit.apply(llama, BitFitConfig(("q_proj", "norm")))
    with pytest.raises(ValueError, match="RMSNorm has no place for a bias"):
        bitfit.merge(llama)
    assert all(not layer.merged for layer in vectors.layers_of(llama, bitfit.BiasLayer))
    bitfit.remove(llama)
    assert llama.state_dict().keys() == make_llama().state_dict().keys()


def test_several_adapters_add_up_and_alone_train(llama, tokens):
    for name in "ab":
        bitfit.apply(llama, BitFitConfig(("v_proj",)), name)
    assert all(n.endswith(".b") for n, p in llama.named_parameters() if p.requires_grad)
    randomise(llama)
    bitfit.set_adapter(llama, ["a", "b"])
    together = llama(tokens)
    with torch.no_grad():
        for layer in vectors.layers_of(llama, bitfit.BiasLayer):
            layer.vectors["a"] += layer.vectors["b"]
    bitfit.remove(llama, "b")
    torch.testing.assert_close(llama(tokens), together, rtol=0, atol=1e-6)
    assert bitfit.adapters(llama) == ["a"]


# Misuse -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("mlp",), "a MLP: only a linear or a norm"),
        (("embed_tokens",), "Embedding"),
        (("query",), "'query'"),
    ],
)
def test_a_bad_target_leaves_the_model_as_it_was(targets, message, llama):
    with pytest.raises(ValueError, match=message):
        bitfit.apply(llama, BitFitConfig(targets))
    assert all(p.requires_grad for p in llama.parameters())


def test_a_file_that_does_not_fit_is_named_and_the_model_left_alone(tmp_path, llama):
    bitfit.save(
        bitfit.apply(make_llama(num_key_value_heads=3), BitFitConfig(("v_proj",))),
        tmp_path,
    )
    with pytest.raises(
        ValueError, match=r"v_proj\.beft_bias' has shape \(1, 12\).*needs \(1, 8\)"
    ):
        bitfit.load(llama, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["lm_head"]})
    )
    with pytest.raises(ValueError, match="modules_to_save"):
        bitfit.load(llama, tmp_path)
    assert not walk.installed(llama, walk.Wrapper)


# What the backward pass keeps ---------------------------------------------------------


def test_a_trained_weight_keeps_its_input_and_a_trained_bias_does_not():
    x = torch.randn(6, 3, requires_grad=True)
    for train_weight, expected in [(True, 6 * 3 * 4), (False, 0)]:
        linear = nn.Linear(3, 5)
        linear.weight.requires_grad_(train_weight)
        with activations.saved_for_backward(linear) as saved:
            linear(x + 0)
        assert saved.bytes == expected


def test_views_of_the_same_memory_count_once():
    linear = nn.Linear(3, 3)
    with activations.saved_for_backward(linear) as saved:
        h = torch.ones(4, 3)
        (linear(h) + linear(h.view(2, 2, 3)).view(4, 3)).sum()
    assert saved.bytes == 4 * 3 * 4


def test_bitfit_keeps_less_than_lora_and_lora_less_than_all(tokens):
    kept = []
    for setup in (
        lambda m: bitfit.apply(m, BitFitConfig("all-linear")),
        lambda m: lora.apply(m, lora.LoRAConfig(r=1, target_modules="all-linear")),
        lambda m: m,
    ):
        model = setup(make_llama())
        with activations.saved_for_backward(model) as saved:
            next_token_loss(model(tokens), tokens)
        kept.append(saved.bytes)
    assert kept[0] < kept[1] < kept[2]


def test_the_meta_device_counts_what_the_cpu_counts_but_for_attention():
    counts = []

    def none(q, k, v, mask):
        return q  #  the kernels differ

    for device in ("cpu", "meta"):
        with torch.device(device):
            model, tokens = Llama(preset("tiny")), torch.zeros(2, 16, dtype=torch.long)
            with activations.saved_for_backward(model) as saved:
                model(tokens, attention=none)
        counts.append(saved.bytes)
    assert counts[0] == counts[1] > 0


def test_fused_attention_counts_q_k_v_output_and_one_number_a_query():
    with torch.device("meta"):
        q, k = (
            torch.zeros(2, 4, 8, 16, requires_grad=True),
            torch.zeros(2, 2, 8, 16, requires_grad=True),
        )
        v = torch.zeros(2, 2, 8, 16, requires_grad=True)
        with activations.saved_for_backward(nn.Identity()) as saved:
            assert activations.fused_attention(q, k, v, None).shape == q.shape
    assert saved.bytes == 4 * (2 * q.numel() + k.numel() + v.numel() + 2 * 4 * 8)
    with pytest.raises(ValueError, match="q is on cpu"):
        activations.fused_attention(
            torch.zeros(1), torch.zeros(1), torch.zeros(1), None
        )


# The script at scale, on a small scale ------------------------------------------------


@pytest.mark.parametrize("method", ["bitfit", "ia3"])
def test_the_script_trains_and_saves_what_peft_opens(method, tmp_path, capsys):
    import peft

    from llmlab.models import course_model
    from llmlab.peft.examples import vector_text

    (tmp_path / "text.txt").write_text(
        course_model.corpus("bible", "valid")[:4000], encoding="utf-8"
    )
    call = (
        f"--method {method} --model {course_model.MODEL} --text {tmp_path / 'text.txt'}"
        f" --out {tmp_path / 'out'}"
    )
    vector_text.main(f"{call} --steps 2 --batch 1 --context 24".split())
    from transformers import LlamaForCausalLM

    opened = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(course_model.MODEL), tmp_path / "out"
    )
    count = {"bitfit": 5120, "ia3": 2048}[method]
    assert (
        sum(
            p.numel()
            for n, p in opened.named_parameters()
            if "ia3_l" in n or "beft" in n
        )
        == count
    )
    assert f"training {count:,} of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)], ids=repr
)
@pytest.mark.parametrize("targets", [None, ("mixer",)])
def test_a_bias_along_channels_is_refused(layer, targets):
    """Along the last dimension it would fit where that is as long, and be wrong."""
    model = nn.ModuleDict({"mixer": layer, "out": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"its bias runs along the channels"):
        bitfit.apply(model, BitFitConfig(targets))
    assert not walk.installed(model, walk.Wrapper)
    assert all(p.requires_grad for p in model.parameters())
