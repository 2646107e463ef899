"""AdaLoRA against its equations and against `peft`: forward, gradients, importance, the
ranks kept at each step, files.
"""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlab.peft import walk
from llmlab.peft.adalora import adalora, files
from llmlab.peft.adalora import budget as adalora_budget
from llmlab.peft.adalora.adalora import AdaLoRAConfig
from llmlab.peft.adalora.budget import RankAllocator, budget
from tests.peft.conftest import make_hf, make_llama, randomise

CASES = {
    "q and v under GQA": dict(
        init_r=6, target_r=3, alpha=16, target_modules=("q_proj", "v_proj")
    ),
    "odd ranks, odd scale": dict(
        init_r=5, target_r=2, alpha=7, target_modules=("k_proj", "o_proj", "down_proj")
    ),
    "rank above the width": dict(
        init_r=11, target_r=9, alpha=3, target_modules=("k_proj",)
    ),
    "all linears": dict(init_r=4, target_r=1, alpha=4, target_modules="all-linear"),
    "alpha 0 is r": dict(init_r=4, target_r=2, alpha=0, target_modules=("up_proj",)),
    "the head": dict(
        init_r=3, target_r=2, alpha=4, target_modules=("lm_head", "q_proj")
    ),
}


def peft_model(model, **case):
    import peft

    names = {"alpha": "lora_alpha", "dropout": "lora_dropout", "delta_t": "deltaT"}
    case = {
        names.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in case.items()
    }
    return peft.get_peft_model(model, peft.AdaLoraConfig(**case, task_type="CAUSAL_LM"))


def factors_of(theirs):
    """peft's trained factors under our names: {("….q_proj", "lora_A"): parameter}."""
    found = {}
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            place, which, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            found[place, which] = p
    return found


def copy_factors(theirs, ours):
    layers = adalora.layers_of(ours)
    with torch.no_grad():
        for (place, which), p in factors_of(theirs).items():
            getattr(layers[place], which).copy_(p)
    return ours


def loss_of(logits, tokens):
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
    )


def run(model, tokens):
    out = model(tokens)
    return getattr(out, "logits", out)


# The equations ------------------------------------------------------------------------


def test_a_number_worked_by_hand():
    P, lam, Q = (
        torch.tensor([[1.0, 0.0], [2.0, 1.0]]),
        torch.tensor([[3.0], [0.0]]),
        torch.tensor([[1.0, 1.0], [5.0, 5.0]]),
    )
    assert adalora.delta_weight(P, lam, Q, 2.0).tolist() == [[6.0, 6.0], [12.0, 12.0]]
    assert adalora.triplets(torch.tensor([1.0, 2.0]), P, lam, Q, 2.0).tolist() == [
        18.0,
        36.0,
    ]


@given(
    d=st.integers(1, 9),
    k=st.integers(1, 9),
    r=st.integers(1, 12),
    batch=st.lists(st.integers(1, 3), max_size=3),
)
@settings(max_examples=30, deadline=None)
def test_the_path_is_the_product_with_delta_weight(d, k, r, batch):
    dice = torch.Generator().manual_seed(d * 100 + k * 10 + r)
    x, P, lam, Q = (
        torch.randn(*s, generator=dice).double()
        for s in ((*batch, k), (d, r), (r, 1), (r, k))
    )
    expected = x @ adalora.delta_weight(P, lam, Q, 0.7).T
    torch.testing.assert_close(
        adalora.triplets(x, P, lam, Q, 0.7), expected, rtol=1e-10, atol=1e-10
    )


def test_orthonormal_factors_cost_nothing_and_have_a_gradient():
    P, Q = (torch.linalg.qr(torch.randn(9, 3))[0].requires_grad_() for _ in range(2))
    for norm in adalora.orthogonality(P, Q.T):
        assert norm < 1e-5
    sum(adalora.orthogonality(P, Q.T)).backward()
    assert torch.isfinite(P.grad).all() and torch.isfinite(Q.grad).all()


def test_at_the_start_nothing_changes(llama, tokens):
    plain = llama(tokens)
    adalora.apply(llama, AdaLoRAConfig(10, target_modules="all-linear"))
    assert torch.equal(llama(tokens), plain)
    assert all(
        not layer.lora_E.any() and layer.lora_A.std() < 0.03
        for layer in adalora.layers_of(llama).values()
    )


def test_the_budget_falls_as_a_cube_between_its_ends():
    config = AdaLoRAConfig(total_step=100, init_r=12, target_r=4, tinit=10, tfinal=20)
    b = [budget(t, config, layers=7) for t in range(100)]
    assert b[:11] == [84] * 11 and b[80:] == [28] * 20 and b == sorted(b, reverse=True)
    assert b[45] == 28 + int(56 * 0.5**3)  # half of the way in time


def test_importance_by_hand():
    smooth, unsure = torch.tensor([1.0]), torch.tensor([2.0])
    adalora_budget.update(
        smooth, unsure, torch.tensor([-3.0]), torch.tensor([2.0]), beta1=0.5, beta2=0.75
    )
    assert smooth.item() == 0.5 * 1 + 0.5 * 6  # 3.5
    assert unsure.item() == 0.75 * 2 + 0.25 * (6 - 3.5)  # with the new average


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=20), b=st.integers(0, 25)
)
@settings(deadline=None)
def test_the_best_b_are_kept_and_ties_with_the_first_out_go(scores, b):
    flat = torch.tensor(scores, dtype=torch.float32)
    kept = torch.cat(
        list(
            adalora_budget.keep_best(
                {"a": flat[: len(flat) // 2], "b": flat[len(flat) // 2 :]}, b
            ).values()
        )
    )
    assert kept.sum() <= b or b == 0
    if kept.any() and not kept.all():
        assert flat[kept].min() > flat[~kept].max()
    if b >= len(scores):
        assert kept.all()
    elif len(set(scores)) == len(scores):
        assert kept.sum() == b


# Against peft -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_loss_and_gradients_with_the_regulariser_are_peft_s(case, kind, tokens):
    theirs = randomise(
        peft_model(
            make_hf(attention_bias=True), **case, total_step=10, orth_reg_weight=0.3
        )
    )
    ours = (
        make_llama(attention_bias=True)
        if kind == "ours"
        else make_hf(attention_bias=True)
    )
    copy_factors(
        theirs, adalora.apply(ours, AdaLoRAConfig(10, **case, orth_reg_weight=0.3))
    )
    logits = run(ours, tokens)
    expected = theirs(tokens, labels=tokens)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    loss = loss_of(logits, tokens) + adalora.regularizer(ours)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    layers = adalora.layers_of(ours)
    for (place, which), p in factors_of(theirs).items():
        torch.testing.assert_close(
            getattr(layers[place], which).grad, p.grad, rtol=0, atol=1e-5
        )
    assert walk.trainable(ours)[0] == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    "schedule",
    [(0, 0, 1), (2, 4, 1), (3, 3, 2)],
    ids=["bare", "both ends", "every other step"],
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_same_ranks_are_kept_at_each_step(schedule, optimizer):
    steps, (tinit, tfinal, every) = 16, schedule
    case = dict(
        init_r=5, target_r=2, alpha=16, target_modules=("q_proj", "v_proj", "down_proj")
    )
    case |= dict(
        total_step=steps, tinit=tinit, tfinal=tfinal, delta_t=every, orth_reg_weight=0.1
    )
    theirs = peft_model(make_hf(), **case)
    ours = copy_factors(theirs, adalora.apply(make_llama(), AdaLoRAConfig(**case)))
    allocator, layers = RankAllocator(ours), adalora.layers_of(ours)
    peers = theirs.base_model.rankallocator
    sides = [
        optimizer([p for p in m.parameters() if p.requires_grad], lr=0.05)
        for m in (ours, theirs)
    ]
    returned, before = 0, None
    for t in range(steps):
        tokens = torch.randint(
            0, 61, (2, 7), generator=torch.Generator().manual_seed(t)
        )
        (loss_of(ours(tokens), tokens) + adalora.regularizer(ours)).backward()
        theirs(tokens, labels=tokens).loss.backward()
        for side in sides:
            side.step()
        allocator.step(t)
        theirs.base_model.update_and_allocate(t)
        for (place, which), p in factors_of(theirs).items():
            torch.testing.assert_close(
                getattr(layers[place], which), p, rtol=0, atol=2e-5
            )
            key = f"{place}.{which}"
            if key in allocator.smooth:
                expected = peers.exp_avg_ipt[f"{key}.default"]
                torch.testing.assert_close(
                    allocator.smooth[key], expected, rtol=1e-3, atol=1e-7
                )
                expected = peers.exp_avg_unc[f"{key}.default"]
                torch.testing.assert_close(
                    allocator.unsure[key], expected, rtol=1e-3, atol=1e-7
                )
            if which == "lora_E":
                assert torch.equal(layers[place].lora_E == 0, p == 0), (
                    f"step {t}, {place}"
                )
        if allocator.kept is not None:
            now = torch.cat(list(allocator.kept.values()))
            returned += int((now & ~before).sum()) if before is not None else 0
            before = now
        for side in sides:
            side.zero_grad()
    assert sum(adalora.ranks(ours).values()) < 5 * len(layers)
    if every == 1 and optimizer is torch.optim.AdamW:
        assert returned > 0, (
            "no triplet ever came back, so the test would not see P or Q masked"
        )


def test_a_masked_triplet_comes_back(llama, tokens):
    """λ alone is masked: its gradient is not 0, and the next update moves it."""
    adalora.apply(llama, AdaLoRAConfig(10, target_modules=("q_proj",)))
    layer = next(iter(adalora.layers_of(llama).values()))
    P, Q = layer.lora_B.clone(), layer.lora_A.clone()
    allocator = RankAllocator(llama)
    allocator.kept = {
        name: torch.zeros(12, dtype=torch.bool) for name in adalora.layers_of(llama)
    }
    with torch.no_grad():
        allocator._mask()
    assert (
        torch.equal(layer.lora_B, P)
        and torch.equal(layer.lora_A, Q)
        and layer.rank == 0
    )
    loss_of(llama(tokens), tokens).backward()
    assert (layer.lora_E.grad != 0).all() and not layer.lora_A.grad.any()
    torch.optim.SGD([layer.lora_E], lr=1.0).step()
    assert layer.rank == 12


def test_target_r_equal_to_init_r_masks_nothing_where_peft_fails(tokens):
    case = dict(init_r=3, target_r=3, target_modules=("q_proj",), total_step=5)
    ours = adalora.apply(make_llama(), AdaLoRAConfig(**case))
    allocator, optimizer = (
        RankAllocator(ours),
        torch.optim.AdamW(ours.parameters(), lr=1e-2),
    )
    for t in range(5):
        loss_of(ours(tokens), tokens).backward()
        optimizer.step()
        assert allocator.step(t) == 6 and set(adalora.ranks(ours).values()) == {3}
        optimizer.zero_grad()


def test_a_half_precision_base_keeps_its_factors_in_fp32(tokens):
    case = dict(
        init_r=4,
        target_r=2,
        alpha=16,
        target_modules=("q_proj", "v_proj"),
        total_step=5,
    )
    theirs = randomise(peft_model(make_hf().bfloat16(), **case))
    ours = copy_factors(
        theirs, adalora.apply(make_hf().bfloat16(), AdaLoRAConfig(**case))
    )
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    out = ours(tokens).logits
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, theirs(tokens).logits, rtol=0, atol=1e-5)


# Files --------------------------------------------------------------------------------


def trained_by_peft(tokens, steps=6, **case):
    """peft's model after a few steps with a budget, its λ masked."""
    theirs = peft_model(make_hf(), **case, total_step=steps, tfinal=2)
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=0.05
    )
    for t in range(steps):
        theirs(tokens, labels=tokens).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(t)
        optimizer.zero_grad()
    return theirs.eval()


FILES = {
    "q and v": CASES["q and v under GQA"],
    "down to a rank of 0": dict(init_r=3, target_r=1, target_modules="all-linear"),
}


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("case", FILES.values(), ids=FILES.keys())
def test_we_open_what_peft_saves_and_peft_what_we_save(case, kind, tokens, tmp_path):
    import peft

    theirs = trained_by_peft(tokens, **case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = files.load(
        make_llama() if kind == "ours" else make_hf(), tmp_path / "theirs"
    )
    torch.testing.assert_close(
        run(ours, tokens), theirs(tokens).logits, rtol=0, atol=1e-5
    )
    assert min(adalora.ranks(ours).values()) < case["init_r"]
    files.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make_hf(), tmp_path / "ours").eval()
    torch.testing.assert_close(
        again(tokens).logits, run(ours, tokens), rtol=0, atol=1e-5
    )


def test_what_we_train_opens_in_peft(tokens, tmp_path):
    import peft

    ours = adalora.apply(
        make_llama(),
        AdaLoRAConfig(8, **CASES["odd ranks, odd scale"], tfinal=2, dropout=0.1),
    ).eval()
    allocator, optimizer = (
        RankAllocator(ours),
        torch.optim.AdamW(ours.parameters(), lr=0.05),
    )
    for t in range(8):
        loss_of(ours(tokens), tokens).backward()
        optimizer.step()
        allocator.step(t)
        optimizer.zero_grad()
    for name, kept in (("by λ", None), ("by mask", allocator.kept)):
        files.save(ours, tmp_path / name, kept)
        theirs = peft.PeftModel.from_pretrained(make_hf(), tmp_path / name).eval()
        torch.testing.assert_close(
            theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-5
        )
    again = files.load(make_llama(), tmp_path / "by λ")
    # Masked triplets are not in the file. Sums without their zeros go in another order:
    # a logit is a sum of 24 products, and each may round by 2^-24 of the largest.
    logits = ours(tokens)
    tol = 24 * 2**-24 * logits.abs().max().item()
    torch.testing.assert_close(again(tokens), logits, rtol=0, atol=tol)
    assert (
        adalora.ranks(again) == adalora.ranks(ours)
        and len(set(adalora.ranks(ours).values())) > 1
    )


def test_a_fresh_adapter_is_saved_whole(llama, tmp_path, tokens):
    files.save(adalora.apply(llama, AdaLoRAConfig(5)), tmp_path)
    again = files.load(make_llama(), tmp_path)
    assert torch.equal(again(tokens), llama(tokens))
    assert all(
        layer.lora_A.shape[0] == 12 for layer in adalora.layers_of(again).values()
    )


def test_a_wrong_shape_or_setting_is_named_and_leaves_the_model_alone(tmp_path, llama):
    files.save(
        adalora.apply(make_llama(hidden_size=36, head_dim=4), AdaLoRAConfig(5)),
        tmp_path,
    )
    with pytest.raises(
        ValueError, match=r"q_proj\.lora_A.*\(12, 36\).*needs \(12, 24\)"
    ):
        files.load(llama, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bias": "all"}))
    with pytest.raises(ValueError, match="bias='all'"):
        files.load(llama, tmp_path)
    assert not walk.installed(llama, walk.Wrapper)


# Merging and removing -----------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_is_unmerged_and_removed_is_the_base_to_the_bit(make, tied, tokens):
    model = make(attention_bias=True, tie_word_embeddings=tied)
    plain = {n: p.clone() for n, p in model.state_dict().items()}
    before = run(model, tokens)
    randomise(
        adalora.apply(
            model,
            AdaLoRAConfig(
                5, alpha=64, target_modules=("q_proj", "down_proj", "lm_head")
            ),
        )
    )
    adapted = run(model, tokens)
    assert (adapted - before).abs().max() > 1e-3
    adalora.merge(model)
    torch.testing.assert_close(run(model, tokens), adapted, rtol=0, atol=1e-5)
    adalora.unmerge(model)
    assert torch.equal(run(model, tokens), adapted)
    adalora.merge(model)
    adalora.remove(model)
    assert model.state_dict().keys() == plain.keys() and torch.equal(
        run(model, tokens), before
    )
    assert all(torch.equal(p, plain[n]) for n, p in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert not tied or model.lm_head.weight is model.model.embed_tokens.weight


def test_merged_for_good_is_a_plain_model(llama, tokens):
    keys = llama.state_dict().keys()
    randomise(adalora.apply(llama, AdaLoRAConfig(5)))
    adapted = llama(tokens)
    adalora.merge_and_unload(llama)
    torch.testing.assert_close(llama(tokens), adapted, rtol=0, atol=1e-5)
    assert llama.state_dict().keys() == keys and not walk.installed(llama, walk.Wrapper)


def test_dropping_masked_triplets_for_good_changes_nothing(llama, tokens):
    randomise(adalora.apply(llama, AdaLoRAConfig(5)))
    layer = next(iter(adalora.layers_of(llama).values()))
    kept = torch.arange(12) % 3 == 0
    with torch.no_grad():
        layer.lora_E[~kept] = 0
    before = llama(tokens)
    layer.keep_only(kept)
    torch.testing.assert_close(llama(tokens), before, rtol=0, atol=1e-5)
    assert layer.lora_A.shape == (4, 24) and layer.lora_A.requires_grad


# Misuse -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"init_r": 0}, "init_r must be an integer of at least 1, not 0"),
        ({"target_r": 13}, "target_r=13 must be at most init_r=12"),
        (
            {"tinit": 5, "tfinal": 5},
            "tinit=5 and tfinal=5 must leave steps of total_step=10",
        ),
        ({"beta1": 1.0}, "beta1=1.0 must lie between 0 and 1"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"orth_reg_weight": -1}, "orth_reg_weight=-1"),
        ({"total_step": 0}, "total_step must be"),
    ],
)
def test_bad_settings_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(AdaLoRAConfig(10), **other)


def test_misuse_is_refused_and_leaves_the_model_alone(llama):
    with pytest.raises(ValueError, match="no AdaLoRA adapter"):
        adalora.merge(llama)
    with pytest.raises(ValueError, match="'query'"):
        adalora.apply(llama, AdaLoRAConfig(5, target_modules=("query",)))
    assert all(p.requires_grad for p in llama.parameters())
    adalora.apply(llama, AdaLoRAConfig(5), "a")
    with pytest.raises(ValueError, match="has the AdaLoRA adapter 'a' already"):
        adalora.apply(llama, AdaLoRAConfig(5), "b")
    with pytest.raises(
        ValueError,
        match=r"lora_A has no gradient: call step after backward and before zero_grad",
    ):
        RankAllocator(llama).step(0)
    adalora.merge(llama)
    with pytest.raises(ValueError, match=r"unmerge\(model\) first"):
        adalora.merge(llama)


def test_dropout_is_on_the_path_of_the_triplets_alone():
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(1, 1)}).train()
    base = model["q_proj"]
    adalora.apply(
        model,
        AdaLoRAConfig(
            5, init_r=1, target_r=1, alpha=1, dropout=0.25, target_modules=("q_proj",)
        ),
    )
    layer = model["q_proj"]
    with torch.no_grad():
        for p, value in ((layer.lora_A, 1.0), (layer.lora_E, 1.0), (layer.lora_B, 3.0)):
            p.fill_(value)
    x = torch.full((40_000, 1), 2.0)
    change = (layer(x) - base(x)).flatten()
    kept = change > 1
    torch.testing.assert_close(
        change[kept], torch.full_like(change[kept], 8.0), rtol=1e-4, atol=0
    )
    assert abs(kept.float().mean() - 0.75) < 0.01
