"""The walk finds what `peft` finds, and puts back what it found."""

import pytest
import torch
from torch import nn

from llmlab.peft import walk
from tests.peft.conftest import make_hf, make_llama


class Plus(walk.Wrapper):
    def forward(self, x):
        return self.base(x) + 1


ATTENTION = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]


def test_finds_by_the_ending_of_the_name(llama):
    assert list(walk.find(llama, ["q_proj", "o_proj"])) == [
        n for n in ATTENTION if n[-6] in "qo"
    ]


def test_an_ending_starts_at_a_dot(llama):
    with pytest.raises(
        ValueError,
        match=(
            r"'proj'.*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj,"
            r" lm_head"
        ),
    ):
        walk.find(llama, ["proj"])


def test_a_string_is_a_regular_expression_for_the_whole_name(llama):
    assert list(walk.find(llama, r".*\.1\..*[qk]_proj")) == ATTENTION[4:6]
    with pytest.raises(ValueError, match="no layer"):
        walk.find(llama, "q_proj")


def test_all_linear_is_all_but_the_head(llama):
    found = walk.find(llama, "all-linear")
    assert len(found) == 14 and "lm_head" not in found


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_finds_the_same_on_ours_and_on_transformers(make, llama):
    assert list(walk.find(make(), ["v_proj", "down_proj"])) == list(
        walk.find(llama, ["v_proj", "down_proj"])
    )


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], "all-linear", r".*layers\.0\..*_proj"]
)
def test_agrees_with_peft(targets):
    import peft

    theirs = peft.get_peft_model(
        make_hf(), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    )
    names = {
        n.split(".lora_A")[0].removeprefix("base_model.model.")
        for n, _ in theirs.named_parameters()
        if "lora_A" in n
    }
    assert set(walk.find(make_llama(), targets)) == names


def test_a_target_that_is_no_linear_is_named(llama):
    with pytest.raises(ValueError, match=r"embed_tokens.*Embedding.*only Linear"):
        walk.find(llama, ["embed_tokens"])


@pytest.mark.parametrize("targets", [[], "", ()])
def test_no_target_at_all_is_refused(llama, targets):
    with pytest.raises(ValueError, match="names no layer"):
        walk.find(llama, targets)


def test_one_unknown_target_among_known_ones_is_refused(llama):
    with pytest.raises(ValueError, match="'query'"):
        walk.find(llama, ["q_proj", "query"])


def test_a_wrapper_is_one_place_and_the_walk_never_looks_inside(llama):
    before = list(walk.find(llama, "all-linear"))
    for name, layer in walk.find(llama, ["q_proj"]).items():
        walk.replace(llama, name, Plus(Plus(layer)))
    assert list(walk.find(llama, "all-linear")) == before
    assert list(walk.installed(llama, Plus)) == [
        n for n in before if n.endswith("q_proj")
    ]
    assert isinstance(walk.base_of(llama.model.layers[0].self_attn.q_proj), nn.Linear)


def test_replacing_and_putting_back_leaves_no_trace(llama, tokens):
    plain, keys = llama(tokens), list(llama.state_dict())
    for name, layer in walk.find(llama, ["q_proj"]).items():
        walk.replace(llama, name, Plus(layer))
    assert not torch.allclose(llama(tokens), plain)
    for name, layer in walk.installed(llama, Plus).items():
        walk.replace(llama, name, layer.base)
    assert torch.equal(llama(tokens), plain) and list(llama.state_dict()) == keys


@pytest.mark.parametrize("training", [True, False])
def test_a_new_layer_takes_over_the_training_mode(llama, training):
    llama.train(training)
    name, layer = next(iter(walk.find(llama, ["q_proj"]).items()))
    walk.replace(llama, name, Plus(layer))
    assert llama.get_submodule(name).training is training


def test_trainable_counts_a_tied_weight_once():
    model = make_llama(tie_word_embeddings=True)
    untied = make_llama()
    assert walk.trainable(untied)[1] - walk.trainable(model)[1] == 61 * 24
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    assert walk.trainable(model)[0] == 24
