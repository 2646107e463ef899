"""`checkpoint.save` of a model that a method has been on: what it writes loads as it
was, here and in transformers; else it refuses, and writes nothing."""

import pytest
import torch

from llmlab.models import checkpoint
from llmlab.peft import bitfit
from llmlab.peft.lora import lora
from tests.peft.conftest import make_llama
from tests.peft.held_out import move, ours_on
from tests.peft.held_out_methods import METHODS


def opened(model, folder, tokens):
    """The logits of the folder that `model` is saved to: by us, by transformers."""
    from transformers import AutoModelForCausalLM

    checkpoint.save(model, folder)
    ours = checkpoint.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return ours(tokens), theirs(tokens).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_on_is_refused(name, tied, tmp_path, tokens):
    model = move(ours_on(name, make_llama(tie_word_embeddings=tied)))
    with pytest.raises(ValueError, match=r"holds what no Llama's folder can: \w+"):
        checkpoint.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_merged_for_good_loads_as_it_was(name, tmp_path, tokens):
    module = METHODS[name].module
    if not hasattr(module, "merge_and_unload"):
        pytest.skip("it does not merge")
    model = move(ours_on(name, make_llama(tie_word_embeddings=True)))
    module.merge_and_unload(model)
    with torch.no_grad():
        before = model(tokens)
    try:
        found = opened(model, tmp_path / "new", tokens)
    except ValueError as error:
        assert "holds what no Llama's folder can" in str(error)
        assert not (tmp_path / "new").exists()
        assert name == "BitFit"  # on norms and head
        return
    for out in found:
        torch.testing.assert_close(out, before, rtol=0, atol=1e-5)


def test_the_training_of_a_tied_head_is_kept(tmp_path, tokens):
    model = make_llama(tie_word_embeddings=True)
    plain = model(tokens)
    config = lora.LoRAConfig(r=2, target_modules=("lm_head", "q_proj"))
    lora.merge_and_unload(move(lora.apply(model, config)))
    with torch.no_grad():
        before = model(tokens)
    assert (before - plain).abs().max() > 0.1
    for out in opened(model, tmp_path, tokens):
        torch.testing.assert_close(out, before, rtol=0, atol=1e-5)
    assert not checkpoint.load(tmp_path).config.tie_word_embeddings


def test_biases_that_merging_added_come_with_zeros_beside_them(tmp_path, tokens):
    model = make_llama()
    config = bitfit.BitFitConfig(("q_proj", "down_proj"))
    bitfit.merge_and_unload(move(bitfit.apply(model, config)))
    with torch.no_grad():
        before = model(tokens)
    for out in opened(model, tmp_path, tokens):
        torch.testing.assert_close(out, before, rtol=0, atol=1e-5)
