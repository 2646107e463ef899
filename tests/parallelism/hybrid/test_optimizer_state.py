"""Sharded optimizer state is taken up by another split, in another precision, with
other groups, as torch's own `load_state_dict` does in one process; what does not fit
is named before anything is changed.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism import World
from llmlab.parallelism.hybrid import resharding
from llmlab.parallelism.hybrid.hybrid import Hybrid
from llmlab.parallelism.hybrid.placement import Placement
from llmlab.parallelism.pipeline.schedules import one_f_one_b

FIRST, SECOND = {"pp": 1, "dp": 1, "tp": 2}, {"pp": 2, "dp": 2, "tp": 1}
IDS = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
BATCH = (IDS[:, :-1], IDS[:, 1:])


def llama(frozen=(), dtype=torch.float32, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = Llama(config).to(dtype)
    for name, w in model.named_parameters():
        w.requires_grad_(not any(part in name for part in frozen))
    return model


def adamw(parameters, **more):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, **more)


def trained(model):
    return [w for w in model.parameters() if w.requires_grad]


def split_run(comm, sizes, steps, make=llama, load=None, save=None, **more):
    """Steps of a split job; returns the losses and the averages of each parameter."""
    job = Hybrid(make(), comm, Placement(sizes))
    optimizer = adamw(job.parameters(), **more)
    if load:
        job.load(load, optimizer)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(job.step(one_f_one_b(job.pp.size, 1), [BATCH]))
        optimizer.step()
    if save:
        resharding.save(save, comm.rank, job.owned(optimizer))
    dtypes = {
        (w.dtype, *(v.dtype for k, v in optimizer.state[w].items() if k != "step"))
        for w in job.parameters()
        if w in optimizer.state
    }
    return losses, dtypes


def alone(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(BATCH[0]).flatten(0, 1), BATCH[1].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ranks(sizes):
    return sizes["pp"] * sizes["dp"] * sizes["tp"]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_in_another_precision_as_torch_does(before, after, amsgrad, tmp_path):
    World(2).run(
        split_run,
        FIRST,
        2,
        lambda: llama(dtype=before),
        None,
        tmp_path,
        amsgrad=amsgrad,
    )
    found = World(4).run(
        split_run, SECOND, 2, lambda: llama(dtype=after), tmp_path, amsgrad=amsgrad
    )
    old = llama(dtype=before)
    optimizer = adamw(old.parameters(), amsgrad=amsgrad)
    alone(old, optimizer, 2)
    new = llama(dtype=after)
    new.load_state_dict(old.state_dict())
    again = adamw(new.parameters(), amsgrad=amsgrad)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = alone(new, again, 2)
    half = torch.bfloat16 in (before, after)
    for losses, dtypes in found:
        assert losses == pytest.approx(expected, abs=0.05 if half else 1e-5)
        assert dtypes == {(after,) * (4 if amsgrad else 3)}


@pytest.mark.parametrize("tied", [False, True])
def test_with_frozen_weights(tied, tmp_path):
    def make():
        return llama(("mlp", "norm"), tied=tied)

    model = make()
    expected = alone(model, adamw(trained(model)), 4)
    first = World(2).run(split_run, FIRST, 2, make, None, tmp_path)
    rest = World(4).run(split_run, SECOND, 2, make, tmp_path)
    assert [*first[0][0], *rest[0][0]] == pytest.approx(expected, abs=1e-5)


def test_saved_before_any_step(tmp_path):
    """Adam begins at 0 after it, and is not told that it has stepped."""
    expected = alone(model := llama(), adamw(model.parameters()), 2)
    World(2).run(split_run, FIRST, 0, llama, None, tmp_path)
    found = World(4).run(split_run, SECOND, 2, llama, tmp_path)
    assert found[0][0] == pytest.approx(expected, abs=1e-5)


def test_old_state_does_not_outlive_a_checkpoint_without_any(tmp_path):
    World(2).run(split_run, FIRST, 0, llama, None, tmp_path)

    def fn(comm):
        job = Hybrid(llama(), comm, Placement(FIRST))
        optimizer = adamw(job.parameters())
        job.step(one_f_one_b(1, 1), [BATCH])
        optimizer.step()
        job.load(tmp_path, optimizer)
        return len(optimizer.state)

    assert World(2).run(fn) == [0, 0]


def test_other_groups(tmp_path):
    """State goes by name: groups and their settings are those of the new optimizer."""

    def grouped(model):
        norms = [w for n, w in model.named_parameters() if "norm" in n]
        rest = [w for n, w in model.named_parameters() if "norm" not in n]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": rest}]
        return adamw(groups, weight_decay=0.3)

    model = llama()
    optimizer = adamw(model.parameters())
    alone(model, optimizer, 2)
    again = grouped(model)
    for w in model.parameters():
        again.state[w] = optimizer.state[w]
    expected = alone(model, again, 3)
    World(2).run(split_run, FIRST, 2, llama, None, tmp_path)

    def fn(comm):
        job = Hybrid(llama(), comm, Placement(SECOND))
        optimizer = grouped(job)
        job.load(tmp_path, optimizer)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(job.step(one_f_one_b(2, 1), [BATCH]))
            optimizer.step()
        return losses

    for losses in World(4).run(fn):
        assert losses == pytest.approx(expected, abs=1e-5)


def refused(folder, says, optimizer_of=adamw, make=llama):
    def fn(comm):
        job = Hybrid(make(), comm, Placement(SECOND))
        optimizer = optimizer_of(job.parameters())
        before = [w.detach().clone() for w in job.parameters()]
        with pytest.raises(ValueError, match=says):
            job.load(folder, optimizer)
        same = all(map(torch.equal, job.parameters(), before))
        return same and not optimizer.state

    assert World(4).run(fn) == [True] * 4


def shifted(frozen=()):
    """Other weights: a load that began would show."""
    model = llama(frozen)
    with torch.no_grad():
        for w in model.parameters():
            w.add_(1)
    return model


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    plain, ams, without, part = (tmp_path / n for n in ("p", "a", "w", "f"))
    World(2).run(split_run, FIRST, 1, llama, None, plain)
    World(2).run(split_run, FIRST, 1, llama, None, ams, amsgrad=True)
    both = r"exp_avg, exp_avg_sq, max_exp_avg_sq, step"
    refused(
        plain,
        rf"has the optimizer state exp_avg, exp_avg_sq, step .* here it is {both}",
        lambda ws: adamw(ws, amsgrad=True),
        shifted,
    )
    refused(ams, rf"has the optimizer state {both} .*same amsgrad", make=shifted)

    def save_without(comm, folder, frozen=()):
        job = Hybrid(llama(frozen), comm, Placement(FIRST))
        optimizer = adamw([w for w in job.parameters() if w.requires_grad])
        job.step(one_f_one_b(1, 1), [BATCH])
        optimizer.step()
        resharding.save(folder, comm.rank, job.owned(optimizer if frozen else None))

    World(2).run(save_without, without)
    refused(without, "has no optimizer state for .*without an optimizer", make=shifted)
    World(2).run(save_without, part, ("mlp",))
    refused(part, r"has no optimizer state for .*mlp.*that lacked it", make=shifted)
    # as it was saved, and without the optimizer, it is read
    World(4).run(split_run, SECOND, 1, lambda: llama(("mlp",)), part)
    for folder in (plain, ams, without, part):
        World(4).run(
            lambda comm, f=folder: Hybrid(llama(), comm, Placement(SECOND)).load(f)
        )


def test_other_optimizers_are_named(tmp_path):
    def fn(comm):
        job = Hybrid(llama(), comm, Placement(FIRST))
        optimizer = torch.optim.SGD(job.parameters(), lr=0.1, momentum=0.9)
        for call in (lambda: job.owned(optimizer), lambda: job.load("x", optimizer)):
            with pytest.raises(ValueError, match=r"optimizer is a SGD: only .*AdamW"):
                call()
        return True

    assert World(2).run(fn) == [True, True]
