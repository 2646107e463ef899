"""LoRA against its equations and against `peft`: forward, gradients, counts,
merging.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlab.peft import walk
from llmlab.peft.lora import lora
from llmlab.peft.lora.lora import LoRAConfig
from tests.peft.conftest import make_hf, make_llama, randomise

CASES = {
    "q and v under GQA": dict(r=4, alpha=16, target_modules=("q_proj", "v_proj")),
    "odd rank, odd scale": dict(
        r=3, alpha=7, target_modules=("k_proj", "o_proj", "down_proj")
    ),
    "rank above the width": dict(r=11, alpha=33, target_modules=("k_proj",)),
    "all linears": dict(r=2, alpha=4, target_modules="all-linear"),
    "a regular expression": dict(
        r=2, alpha=4, target_modules=r".*layers\.1\..*(up|gate)_proj"
    ),
    "rank-stabilised": dict(r=5, alpha=4, target_modules=("q_proj",), rslora=True),
    "patterns": dict(
        r=2,
        alpha=4,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={"v_proj": 5, r"layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={"layers.1.self_attn.q_proj": 9},
    ),
    "the head": dict(r=2, alpha=4, target_modules=("lm_head", "q_proj")),
}


def peft_model(model, **case):
    import peft

    names = {"alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
    case = {
        names.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in case.items()
    }
    return peft.get_peft_model(model, peft.LoraConfig(**case, task_type="CAUSAL_LM"))


def copy_factors(theirs, ours):
    """peft's A and B into our model."""
    layers = walk.installed(ours, lora.LoRALinear)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                place, which, adapter, _ = name.removeprefix(
                    "base_model.model."
                ).rsplit(".", 3)
                getattr(layers[place], which)[adapter].copy_(p)


def loss_of(logits, tokens):
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
    )


# The equation -------------------------------------------------------------------------


def test_a_number_worked_by_hand():
    A, B = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0], [3.0]])
    x = torch.tensor([1.0, 1.0, 5.0])
    assert lora.low_rank(x, A, B, scaling=2.0).tolist() == [6.0, 18.0]
    assert lora.delta_weight(A, B, scaling=2.0).tolist() == [[2, 4, 0], [6, 12, 0]]


@given(
    d=st.integers(1, 9),
    k=st.integers(1, 9),
    r=st.integers(1, 12),
    batch=st.lists(st.integers(1, 3), max_size=3),
    scaling=st.floats(-4, 4),
)
@settings(max_examples=40, deadline=None)
def test_the_path_is_the_product_with_delta_weight(d, k, r, batch, scaling):
    dice = torch.Generator().manual_seed(d * 100 + k * 10 + r)
    x, A, B = (
        torch.randn(*s, generator=dice).double() for s in ((*batch, k), (r, k), (d, r))
    )
    expected = x @ lora.delta_weight(A, B, scaling).T
    torch.testing.assert_close(
        lora.low_rank(x, A, B, scaling), expected, rtol=1e-10, atol=1e-10
    )


def test_the_rank_of_the_change_is_at_most_r():
    A, B = torch.randn(3, 20), torch.randn(17, 3)
    assert torch.linalg.matrix_rank(lora.delta_weight(A, B, 0.5)) == 3


@pytest.mark.parametrize(("rslora", "expected"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling(rslora, expected):
    assert LoRAConfig(r=4, alpha=16, rslora=rslora).scaling("x") == expected


# The start ----------------------------------------------------------------------------


def test_at_the_start_nothing_changes(llama, tokens):
    plain = llama(tokens)
    lora.apply(llama, LoRAConfig(target_modules="all-linear"))
    assert torch.equal(llama(tokens), plain)


def test_b_is_zero_and_a_is_uniform_within_one_over_root_k():
    model = nn.ModuleDict({"q_proj": nn.Linear(400, 30)})
    lora.apply(
        model,
        LoRAConfig(r=64, target_modules=("q_proj",)),
        generator=torch.Generator().manual_seed(0),
    )
    A, B = (p["default"] for p in (model["q_proj"].lora_A, model["q_proj"].lora_B))
    bound = 1 / math.sqrt(400)
    assert not B.any() and A.abs().max() <= bound
    assert (
        A.abs().max() > 0.99 * bound
        and abs(A.std() - bound / math.sqrt(3)) < 0.01 * bound
    )


def test_a_generator_makes_it_repeatable():
    def draw(seed):
        model = lora.apply(
            make_llama(), LoRAConfig(), generator=torch.Generator().manual_seed(seed)
        )
        return torch.cat(
            [p.flatten() for n, p in model.named_parameters() if "lora_A" in n]
        )

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


# Against peft -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_gradients_and_count_are_peft_s(case, kind, tokens):
    theirs = randomise(peft_model(make_hf(attention_bias=True), **case))
    ours = (
        make_llama(attention_bias=True)
        if kind == "ours"
        else make_hf(attention_bias=True)
    )
    expected_count = lora.num_parameters(ours, LoRAConfig(**case))
    lora.apply(ours, LoRAConfig(**case))
    copy_factors(theirs, ours)
    mine = ours(tokens) if kind == "ours" else ours(tokens).logits
    torch.testing.assert_close(mine, theirs(tokens).logits, rtol=0, atol=1e-5)

    loss_of(mine, tokens).backward()
    loss_of(theirs(tokens).logits, tokens).backward()
    layers = walk.installed(ours, lora.LoRALinear)
    compared = 0
    for name, p in theirs.named_parameters():
        if p.grad is not None:
            place, which, adapter, _ = name.removeprefix("base_model.model.").rsplit(
                ".", 3
            )
            torch.testing.assert_close(
                getattr(layers[place], which)[adapter].grad, p.grad, rtol=0, atol=1e-5
            )
            compared += 1
    assert compared == 2 * len(layers) and any(
        p.grad.abs().max() > 1e-4 for p in ours.parameters() if p.requires_grad
    )
    assert walk.trainable(ours) == theirs.get_nb_trainable_parameters()
    assert walk.trainable(ours)[0] == expected_count


def test_several_active_adapters_add_up_as_in_peft(tokens):
    import peft

    theirs = peft_model(make_hf(), r=2, alpha=4, target_modules=("q_proj",))
    theirs.add_adapter(
        "second",
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    )
    randomise(theirs)
    theirs.base_model.set_adapter(["default", "second"])
    ours = make_llama()
    lora.apply(ours, LoRAConfig(r=2, alpha=4, target_modules=("q_proj",)))
    lora.apply(
        ours, LoRAConfig(r=3, alpha=5, target_modules=("q_proj", "v_proj")), "second"
    )
    copy_factors(theirs, ours)
    lora.set_adapter(ours, ["default", "second"])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_a_half_precision_base_keeps_its_factors_in_fp32(tokens):
    theirs = randomise(
        peft_model(
            make_hf().bfloat16(), r=4, alpha=16, target_modules=("q_proj", "v_proj")
        )
    )
    ours = lora.apply(make_hf().bfloat16(), LoRAConfig(r=4, alpha=16))
    copy_factors(theirs, ours)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    out = ours(tokens).logits
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, theirs(tokens).logits, rtol=0, atol=1e-5)


def test_trained_side_by_side_with_peft_for_ten_steps(tokens):
    theirs = peft_model(make_hf(), r=4, alpha=8, target_modules=("q_proj", "v_proj"))
    ours = lora.apply(make_llama(), LoRAConfig(r=4, alpha=8))
    copy_factors(theirs, ours)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1.0
        )
        for _ in range(10):
            logits = model(tokens)
            loss = loss_of(getattr(logits, "logits", logits), tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(
        torch.tensor(losses[:10]), torch.tensor(losses[10:]), rtol=0, atol=1e-5
    )
    assert losses[9] < losses[0]


# What trains --------------------------------------------------------------------------


def test_only_the_factors_train(llama, tokens):
    before = {n: p.clone() for n, p in llama.named_parameters()}
    lora.apply(llama, LoRAConfig(target_modules="all-linear"))
    optimizer = torch.optim.SGD(llama.parameters(), lr=10.0)
    for _ in range(2):
        loss_of(llama(tokens), tokens).backward()
        optimizer.step()
    trained = {n for n, p in llama.named_parameters() if p.grad is not None}
    assert (
        trained == {n for n, _ in llama.named_parameters() if "lora_" in n}
        and len(trained) == 28
    )
    lora.remove(llama)
    assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters())


def test_the_closed_form_on_a_real_7b_without_its_memory():
    from llmlab.models.llama import Llama, LlamaConfig

    with torch.device("meta"):
        model = Llama(LlamaConfig())
    lora.apply(model, LoRAConfig(r=8))
    assert walk.trainable(model) == (4_194_304, 6_742_609_920)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_on_the_low_rank_path_alone_and_only_while_training(training):
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(1, 1)}).train(training)
    base = model["q_proj"]
    lora.apply(
        model, LoRAConfig(r=1, alpha=1, dropout=0.25, target_modules=("q_proj",))
    )
    layer = model["q_proj"]
    with torch.no_grad():
        layer.lora_A["default"].fill_(1.0)
        layer.lora_B["default"].fill_(3.0)
    x = torch.full((40_000, 1), 2.0)
    change = (layer(x) - base(x)).flatten()
    if not training:
        torch.testing.assert_close(change, torch.full_like(change, 6.0))
        return
    kept = change > 1
    # 6 / (1 − 0.25)
    torch.testing.assert_close(change[kept], torch.full_like(change[kept], 8.0))
    assert change[~kept].abs().max() < 1e-5 and abs(kept.float().mean() - 0.75) < 0.01
    assert abs(change.mean() - 6) < 0.1  # the mean is kept


# Merging and removing -----------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_merged_equals_unmerged_and_unmerging_returns_the_same_bits(case, make, tokens):
    model = make(attention_bias=True)
    plain = {n: p.clone() for n, p in model.state_dict().items()}

    def run():
        return getattr(out := model(tokens), "logits", out)

    before = run()
    randomise(lora.apply(model, LoRAConfig(**case)))
    adapted = run()
    assert (adapted - before).abs().max() > 1e-3
    lora.merge(model)
    torch.testing.assert_close(run(), adapted, rtol=0, atol=1e-5)
    lora.unmerge(model)
    assert torch.equal(run(), adapted)
    lora.remove(model)
    assert model.state_dict().keys() == plain.keys()
    assert all(
        torch.equal(p, plain[n]) for n, p in model.state_dict().items()
    ) and torch.equal(run(), before)


def test_merged_for_good_is_a_plain_model_of_the_same_speed(llama, tokens):
    keys = llama.state_dict().keys()
    randomise(lora.apply(llama, LoRAConfig()))
    adapted = llama(tokens)
    lora.merge_and_unload(llama)
    torch.testing.assert_close(llama(tokens), adapted, rtol=0, atol=1e-5)
    assert llama.state_dict().keys() == keys and not walk.installed(llama, walk.Wrapper)
    assert {type(m) for m in walk.find(llama, ["q_proj", "v_proj"]).values()} == {
        nn.Linear
    }


def test_merge_and_unload_after_merge_merges_once(llama, tokens):
    randomise(lora.apply(llama, LoRAConfig()))
    adapted = llama(tokens)
    lora.merge(llama)
    torch.testing.assert_close(
        lora.merge_and_unload(llama)(tokens), adapted, rtol=0, atol=1e-5
    )


def test_merging_is_rounded_once_from_fp32():
    """0.5 + 2⁻⁹ + 2⁻⁹ in bf16: two changes too small one by one, not too small
    together.
    """
    model = nn.ModuleDict({"q_proj": nn.Linear(1, 1, bias=False)}).bfloat16()
    nn.init.constant_(model["q_proj"].weight, 0.5)
    for adapter in ("a", "b"):
        lora.apply(model, LoRAConfig(r=1, alpha=1, target_modules=("q_proj",)), adapter)
        with torch.no_grad():
            model["q_proj"].lora_A[adapter].fill_(2.0**-9)
            model["q_proj"].lora_B[adapter].fill_(1.0)
    lora.set_adapter(model, ["a", "b"])
    lora.merge_and_unload(model)
    assert model["q_proj"].weight.item() == 0.5 + 2.0**-8


def test_double_precision_survives_merging():
    # 53 bits, not 24 that were widened
    model = nn.ModuleDict({"q_proj": nn.Linear(5, 4, dtype=torch.float64)})
    randomise(lora.apply(model, LoRAConfig(target_modules=("q_proj",))))
    x = torch.randn(3, 5).double()
    adapted = model["q_proj"](x)
    lora.merge(model)
    torch.testing.assert_close(model["q_proj"](x), adapted, rtol=0, atol=1e-12)


def test_merging_into_a_tied_head_leaves_the_embedding_alone(tokens):
    model = make_llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    before = embedding.clone()
    randomise(lora.apply(model, LoRAConfig(target_modules=("lm_head",))))
    adapted = model(tokens)
    lora.merge(model)
    assert torch.equal(embedding, before)
    torch.testing.assert_close(model(tokens), adapted, rtol=0, atol=1e-5)
    lora.unmerge(model)
    lora.remove(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_into_a_quantized_weight_is_refused():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(
        torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False
    )
    model = lora.apply(
        nn.ModuleDict({"q_proj": layer}), LoRAConfig(target_modules=("q_proj",))
    )
    with pytest.raises(ValueError, match=r"uint8.*dequantise"):
        lora.merge(model)


def test_removing_one_of_two_leaves_the_other(llama, tokens):
    randomise(lora.apply(llama, LoRAConfig(target_modules=("q_proj",)), "a"))
    only_a = llama(tokens)
    randomise(lora.apply(llama, LoRAConfig(target_modules=("v_proj",)), "b"), seed=2)
    lora.remove(llama, "b")
    assert lora.adapters(llama) == ["a"] and isinstance(
        llama.model.layers[0].self_attn.v_proj, nn.Linear
    )
    lora.set_adapter(llama, "a")
    assert not torch.equal(only_a, make_llama()(tokens))
    assert lora.remove(lora.remove(llama)) is llama and lora.adapters(llama) == []


def test_an_active_adapter_that_is_removed_is_no_longer_added(llama, tokens):
    plain = llama(tokens)
    lora.apply(llama, LoRAConfig(), "a")
    lora.apply(llama, LoRAConfig(), "b")
    randomise(llama)
    lora.set_adapter(llama, ["a", "b"])
    lora.remove(llama, "b")
    with_a_alone = llama(tokens)
    lora.set_adapter(llama, "a")
    assert torch.equal(llama(tokens), with_a_alone) and not torch.equal(
        with_a_alone, plain
    )


# Misuse -------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, -1, 1.5, None])
def test_a_rank_below_one_is_refused(r):
    with pytest.raises(
        ValueError, match=f"r must be an integer of at least 1, not {r}"
    ):
        LoRAConfig(r=r)
    with pytest.raises(ValueError, match="r must be"):
        LoRAConfig(rank_pattern={"q_proj": r})


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2])
def test_a_dropout_that_is_no_probability_below_one_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout must be"):
        LoRAConfig(dropout=dropout)


def test_an_unknown_target_leaves_the_model_as_it_was(llama):
    with pytest.raises(ValueError, match="'query'"):
        lora.apply(llama, LoRAConfig(target_modules=("q_proj", "query")))
    assert (
        all(p.requires_grad for p in llama.parameters()) and lora.adapters(llama) == []
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("default", "exists already"), ("a.b", "dots"), ("", "dots"), ("type", "torch")],
)
def test_an_adapter_that_exists_or_has_a_bad_name_is_refused(llama, name, message):
    lora.apply(llama, LoRAConfig())
    with pytest.raises(ValueError, match=f"adapter='{name}'.*{message}"):
        lora.apply(llama, LoRAConfig(), name)


def test_what_is_not_there_cannot_be_set_removed_or_merged(llama):
    for call in (lora.merge, lora.unmerge, lora.merge_and_unload):
        with pytest.raises(ValueError, match="no LoRA adapter"):
            call(llama)
    for call in (lora.set_adapter, lora.remove):
        with pytest.raises(
            ValueError, match="'bible' is not on the model; it has none"
        ):
            call(llama, "bible")


def test_merged_twice_and_changes_while_merged_are_refused(llama):
    lora.apply(llama, LoRAConfig())
    lora.merge(llama)
    for call in (
        lambda: lora.merge(llama),
        lambda: lora.remove(llama),
        lambda: lora.set_adapter(llama, []),
        lambda: lora.apply(llama, LoRAConfig(), "b"),
    ):
        with pytest.raises(ValueError, match=r"unmerge\(model\) first"):
            call()


def test_no_active_adapter_is_the_plain_base(llama, tokens):
    plain = llama(tokens)
    randomise(lora.apply(llama, LoRAConfig()))
    lora.set_adapter(llama, [])
    assert torch.equal(llama(tokens), plain) and walk.trainable(llama)[0] == 0
