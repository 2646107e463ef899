"""Merging, and several adapters on one base, against `peft` on the bases of
`test_held_out.py`.
"""

import pytest
import torch

from llmlab.peft import ia3, walk
from llmlab.peft.lora import files, lora
from tests.peft.conftest import make_hf, make_llama
from tests.peft.held_out import (
    assert_as_before,
    base_of,
    close,
    copy,
    logits,
    move,
    ours_on,
    snapshot,
    theirs_on,
)
from tests.peft.held_out_methods import GQA, KINDS, METHODS

kinds = pytest.mark.parametrize("kind", KINDS)

# Merging ------------------------------------------------------------------------------

MERGING = [
    "LoRA, r 3",
    "LoRA, r 5, all linears, rank-stabilised",
    "AdaLoRA",
    "(IA)³",
    "BitFit",
]


def merged_weights(model):
    """{layer.weight or layer.bias: tensor} of a merged model, ours or `peft`'s."""
    layers = {
        n: walk.base_of(m) for n, m in walk.places(model) if isinstance(m, walk.Wrapper)
    }
    if hasattr(model, "merge_adapter"):
        named = model.base_model.model.named_modules()
        layers = {
            n: m.get_base_layer() for n, m in named if hasattr(m, "merged_adapters")
        }
    return {
        f"{n}.{what}": p.detach()
        for n, m in layers.items()
        for what, p in m.named_parameters()
    }


def differ(mine, peers):
    """The share of numbers that are not the same."""
    assert (
        mine.keys() == peers.keys()
        and len(mine) > 0
        and all(mine[n].dtype == peers[n].dtype for n in mine)
    )
    unequal = sum((mine[n] != peers[n]).sum().item() for n in mine)
    return unequal / sum(t.numel() for t in mine.values())


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merged_weights_are_peft_s_and_unmerged_are_the_old_bits(name, dtype, tokens):
    base, module = base_of(name) | dict(mlp_bias=True), METHODS[name].module
    theirs, ours = (
        theirs_on(name, make_hf(**base).to(dtype)),
        ours_on(name, make_hf(**base).to(dtype)),
    )
    copy(move(theirs), ours)
    before, adapted, old = snapshot(ours), logits(ours, tokens), merged_weights(ours)
    module.merge(ours)
    theirs.merge_adapter()
    if dtype == torch.bfloat16:
        # a tie may fall either way
        assert differ(merged_weights(ours), merged_weights(theirs)) < 2e-3
        assert differ(merged_weights(ours), old) > 0.01
    close(
        logits(ours, tokens).float(),
        adapted.float(),
        1e-5 if dtype == torch.float32 else 0.1,
        "merged",
    )
    close(
        logits(ours, tokens).float(),
        logits(theirs, tokens).float(),
        1e-5 if dtype == torch.float32 else 0.1,
        "peft's",
    )
    module.unmerge(ours)
    assert_as_before(ours, before)
    assert torch.equal(logits(ours, tokens), adapted)


def test_two_adapters_merge_into_bf16_with_one_rounding():
    """Against sums in double precision. `peft` rounds after each adapter."""
    import peft

    theirs = theirs_on("LoRA, r 3", make_hf(**GQA).bfloat16())
    theirs.add_adapter(
        "second",
        peft.LoraConfig(r=5, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    )
    theirs.base_model.set_adapter(["default", "second"])
    ours = ours_on("LoRA, r 3", make_llama(**GQA).bfloat16())
    lora.apply(ours, lora.LoRAConfig(r=5, alpha=4), "second")
    exact = {}
    for n, layer in walk.installed(ours, lora.LoRALinear).items():
        peer, total = (
            theirs.base_model.model.get_submodule(n),
            layer.base.weight.detach().double(),
        )
        for a, scale in (("default", 7 / 3), ("second", 4 / 5)):
            A, B = peer.lora_A[a].weight.data, peer.lora_B[a].weight.data
            B.normal_(std=0.05, generator=torch.Generator().manual_seed(len(exact)))
            layer.lora_A[a].data.copy_(A)
            layer.lora_B[a].data.copy_(B)
            total = total + scale * B.double() @ A.double()
        exact[f"{n}.weight"] = total.bfloat16()
    lora.set_adapter(ours, ["default", "second"])
    lora.merge(ours)
    theirs.merge_adapter()
    assert (
        differ(merged_weights(ours), exact)
        < 2e-3
        < 0.02
        < differ(merged_weights(theirs), exact)
    )


# Several adapters ---------------------------------------------------------------------

SEVERAL = [n for n in METHODS if n not in ("QLoRA", "AdaLoRA")]


@pytest.mark.parametrize("name", SEVERAL)
@kinds
def test_two_adapters_take_turns_as_in_peft(name, kind, tokens):
    import peft

    base, (module, config) = base_of(name), (METHODS[name].module, METHODS[name].config)
    theirs, ours = theirs_on(name, make_hf(**base)), ours_on(name, KINDS[kind](**base))
    copy(move(theirs, seed=1), ours)
    theirs.add_adapter(
        "second",
        getattr(peft, METHODS[name].cls)(
            task_type="CAUSAL_LM", **METHODS[name].settings
        ),
    )
    theirs.set_adapter("second")
    module.apply(ours, config, "second")
    copy(move(theirs, seed=2, adapter="second"), ours, "second")
    seen = {}
    for adapter in ("second", "default"):
        module.set_adapter(ours, adapter)
        theirs.set_adapter(adapter)
        seen[adapter] = logits(ours, tokens)
        close(seen[adapter], logits(theirs, tokens), what=adapter)
    assert (seen["default"] - seen["second"]).abs().max() > 1e-2
    module.remove(ours, "default")
    module.set_adapter(ours, "second")
    assert torch.equal(logits(ours, tokens), seen["second"])
    assert module.adapters(ours) == ["second"]


@pytest.mark.parametrize(("name", "module"), [("LoRA, r 3", lora), ("(IA)³", ia3)])
def test_two_adapters_at_once_and_a_batch_of_mixed_rows_are_peft_s(
    name, module, tokens
):
    import peft

    base = base_of(name)
    theirs, ours = theirs_on(name, make_hf(**base)), ours_on(name, make_llama(**base))
    copy(move(theirs, seed=1), ours)
    theirs.add_adapter(
        "second", getattr(peft, METHODS[name].cls)(**METHODS[name].settings)
    )
    theirs.set_adapter("second")
    module.apply(ours, METHODS[name].config, "second")
    copy(move(theirs, seed=2, adapter="second"), ours, "second")
    if name == "LoRA, r 3":
        rows = ["second", None, "default"]
        with files.by_row(ours, rows):
            mine = logits(ours, tokens)
        close(
            mine,
            logits(theirs, tokens, adapter_names=[r or "__base__" for r in rows]),
            what="rows",
        )
        close(
            mine[1], logits(make_llama(**base), tokens)[1], what="the row of the base"
        )
    module.set_adapter(ours, ["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    close(logits(ours, tokens), logits(theirs, tokens), what="both at once")
