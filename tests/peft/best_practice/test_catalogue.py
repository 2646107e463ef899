"""The comparison's rows: every method of the part, at one budget, applied by one call
and removed without a trace.
"""

import copy

import pytest
import torch

from llmlab.models import course_model
from llmlab.peft import walk
from llmlab.peft.best_practice import catalogue

ROWS = catalogue.METHODS
OWN_SIZE = {"full fine-tuning", "(IA)³", "BitFit", "AdaLoRA"}


@pytest.fixture(scope="module")
def base():
    return course_model.load()


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_a_method_trains_about_the_budget(row, base):
    model = row.apply(copy.deepcopy(base), steps=40)
    trained, _ = walk.trainable(model)
    if row.name not in OWN_SIZE:
        assert abs(trained / catalogue.BUDGET - 1) < 0.05
    elif row.module not in ("", "adalora.adalora"):
        assert trained < catalogue.BUDGET, "a size of its own, and smaller"
    assert catalogue.optimizer_bytes(model) == 12 * trained


def test_adalora_ends_at_the_budget():
    """r = 2 at the start, one triplet a layer kept: λ aside, that is LoRA's budget."""
    from llmlab.peft.adalora import budget

    settings = catalogue.method("AdaLoRA").settings
    model = catalogue.method("AdaLoRA").apply(course_model.load(), steps=40)
    config = next(iter(budget.layers_of(model).values())).config
    assert budget.budget(40, config, 28) == 28 and settings["init_r"] == 2


@pytest.mark.parametrize("row", [r for r in ROWS if r.module], ids=lambda r: r.name)
def test_a_method_comes_off_bit_for_bit(row, base):
    model = copy.deepcopy(base)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    row.apply(model, steps=40)
    row.load().remove(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[n], before[n]) for n in before
    )


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.merges and r.module], ids=lambda r: r.name
)
def test_what_is_said_to_merge_merges(row, base):
    model = row.apply(copy.deepcopy(base), steps=40)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=dice))
    tokens = torch.arange(5, 25)[None]
    changed = model(tokens)
    merged = row.load().merge_and_unload(model)
    assert not walk.installed(merged, walk.Wrapper)
    assert torch.allclose(merged(tokens), changed, atol=1e-3)
    assert not torch.allclose(merged(tokens), base(tokens), atol=1e-2)


@pytest.mark.parametrize("row", [r for r in ROWS if not r.merges], ids=lambda r: r.name)
def test_what_is_said_not_to_merge_has_a_reason(row):
    assert row.extra and row.paper


def test_only_adalora_asks_for_more_than_a_loss(base):
    for row in (catalogue.method("LoRA"), catalogue.method("AdaLoRA")):
        hooks = catalogue.hooks(row.apply(copy.deepcopy(base), steps=40))
        assert set(hooks) == (
            {"penalty", "after_step"} if row.name == "AdaLoRA" else set()
        )


def test_a_wrong_name_is_named():
    with pytest.raises(ValueError, match="name='lora'"):
        catalogue.method("lora")
