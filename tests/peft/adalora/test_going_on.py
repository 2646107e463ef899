"""Training that stops and goes on from a state dict is training that never stopped."""

import copy

import pytest
import torch

from llmlab.peft.adalora import adalora, files
from llmlab.peft.adalora.adalora import AdaLoRAConfig
from llmlab.peft.adalora.budget import RankAllocator
from tests.peft.adalora.test_adalora import loss_of, run
from tests.peft.conftest import make_hf, make_llama

STEPS = 12
SCHEDULES = {
    "bare": dict(),
    "both ends": dict(tinit=2, tfinal=4),
    "every third step": dict(tinit=1, tfinal=3, delta_t=3),
}
ODD = dict(hidden_size=30, num_attention_heads=5, num_key_value_heads=1, head_dim=6)


def fresh(make=make_llama, schedule="both ends", **shape):
    config = AdaLoRAConfig(
        STEPS,
        target_r=1,
        init_r=4,
        target_modules=("q_proj", "v_proj", "down_proj"),
        **SCHEDULES[schedule],
    )
    dice = torch.Generator().manual_seed(0)
    model = adalora.apply(make(**shape), config, generator=dice)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.05)


def train(model, optimizer, steps):
    allocator = RankAllocator(model)
    ranks = []
    for t in steps:
        dice = torch.Generator().manual_seed(t)
        tokens = torch.randint(0, 61, (2, 7), generator=dice)
        loss = loss_of(run(model, tokens), tokens) + adalora.regularizer(model)
        loss.backward()
        optimizer.step()
        allocator.step(t)
        optimizer.zero_grad()
        ranks.append(list(adalora.ranks(model).values()))
    return ranks


def same(mine, peers):
    mine, peers = mine.state_dict(), peers.state_dict()
    assert mine.keys() == peers.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, peers[name]), name


@pytest.mark.parametrize("stop", [1, 3, 6, 8, 9, 11])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_going_on_is_never_having_stopped(schedule, stop, tmp_path):
    whole, optimizer = fresh(schedule=schedule)
    ranks = train(whole, optimizer, range(STEPS))
    assert sum(ranks[-1]) < sum(ranks[0])

    first, optimizer = fresh(schedule=schedule)
    train(first, optimizer, range(stop))
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    second, optimizer = fresh(schedule=schedule)
    with torch.no_grad():  # another start, which the state dict must overwrite
        for p in second.parameters():
            p.add_(0.01)
    state, moments = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state)
    optimizer.load_state_dict(moments)
    assert list(adalora.ranks(second).values()) == ranks[stop - 1]
    assert train(second, optimizer, range(stop, STEPS)) == ranks[stop:]
    same(second, whole)


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize("tied", [True, False])
def test_going_on_with_one_shared_head_of_keys_and_odd_widths(tied, make):
    shape = ODD | dict(tie_word_embeddings=tied)
    whole, optimizer = fresh(make, **shape)
    train(whole, optimizer, range(STEPS))
    first, optimizer = fresh(make, **shape)
    train(first, optimizer, range(5))
    second, rest = fresh(make, **shape)
    second.load_state_dict(first.state_dict(), assign=False)
    rest.load_state_dict(optimizer.state_dict())
    train(second, rest, range(5, STEPS))
    same(second, whole)


def test_a_copy_goes_on_too():
    whole, optimizer = fresh()
    train(whole, optimizer, range(4))
    twin = copy.deepcopy(whole)
    assert RankAllocator(twin).smooth.keys() == RankAllocator(whole).smooth.keys()
    RankAllocator(whole).smooth["model.layers.0.mlp.down_proj.lora_A"].zero_()
    assert RankAllocator(twin).smooth["model.layers.0.mlp.down_proj.lora_A"].any()


def test_a_state_from_before_the_budget_fell_forgets_what_came_after():
    model, optimizer = fresh()
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(STEPS))
    model.load_state_dict(start)
    again, other = fresh()
    train(again, other, range(STEPS))
    optimizer = torch.optim.AdamW(optimizer.param_groups[0]["params"], lr=0.05)
    train(model, optimizer, range(STEPS))
    same(model, again)


def test_a_state_without_what_the_budget_knows_is_refused():
    model, optimizer = fresh()
    train(model, optimizer, range(6))
    state = {n: t for n, t in model.state_dict().items() if ".steps" not in n}
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj\.steps"):
        fresh()[0].load_state_dict(state)


@pytest.mark.parametrize("t", [0, 5, 7, 11])
def test_a_step_that_is_not_the_next_is_refused(t):
    model, optimizer = fresh()
    train(model, optimizer, range(6))
    with pytest.raises(ValueError, match=rf"t={t} is not the next step: .* taken 6\."):
        train(model, optimizer, [t])


def test_an_adapters_folder_cannot_go_on_as_if_it_knew(tmp_path):
    model, optimizer = fresh()
    train(model, optimizer, range(6))
    files.save(model, tmp_path)
    opened = files.load(make_llama(), tmp_path)
    optimizer = torch.optim.AdamW([p for p in opened.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="an adapter's folder does not"):
        train(opened, optimizer, [6])
