"""A benchmark compares only if both sides do the same work.

Their losses are equal, step after step. Here all models are narrower than in a real
run, with as much for activations beside the weights.
"""

import random
from dataclasses import replace

import pytest
import torch._dynamo  # an optimizer imports it: once here, not once in each forked rank
import torch.distributed.fsdp  # and these
import torch.distributed.tensor.parallel

from benchmarks import compression, inference, models, parallelism, peft
from benchmarks.run import main
from llmlab.parallelism import launch

NARROW = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
}
METHODS = [
    "lora",
    "prompt_tuning",
    "prefix_tuning",
    "p_tuning",
    "p_tuning_v2",
    "adalora",
    "qlora",
    "ia3",
    "bitfit",
]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(peft, "SHAPE", peft.SHAPE | NARROW)
    monkeypatch.setattr(peft, "QLORA_SHAPE", {"intermediate_size": 192})
    monkeypatch.setattr(peft, "SEQ", 32)
    monkeypatch.setattr(parallelism, "SHAPE", replace(models.SHAPE, **NARROW))


def training_step():
    return models.training_step(seq=32, config=replace(models.SHAPE, **NARROW))


@pytest.mark.parametrize(
    "make", [training_step, *peft.CASES], ids=lambda make: make.__name__
)
def test_both_sides_train_alike_and_ours_holds_no_more_memory(make):
    case = make()
    for _ in range(2):
        assert case.ours() == pytest.approx(case.theirs(), abs=4e-6)
    if held := case.memory():
        mine, library = held
        assert 0 < mine <= 1.02 * library


@pytest.mark.parametrize(
    "make",
    [parallelism.data_parallel, parallelism.fully_sharded, parallelism.tensor_parallel],
)
def test_both_sides_train_alike_on_two_ranks(make):
    case = make()

    def losses(comm):
        ours, theirs = case.ours(comm), case.theirs(comm)
        return [(ours(), theirs()) for _ in range(2)]

    for rank in launch(losses, 2):
        for ours, theirs in rank:
            assert ours == pytest.approx(theirs, abs=2e-4)


def test_each_method_that_peft_has_has_a_row():
    names = [make.__name__ for make in peft.CASES]
    assert all(
        any(name.startswith(f"{method}_") for name in names) for method in METHODS
    )


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run", "--only", "ia3"])
    assert main() == 0
    (row,) = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| (IA)")
    ]
    assert row.count("|") == 6 and row.count("MiB") == 1


def test_both_sides_quantise_to_the_same_codes(monkeypatch):
    monkeypatch.setattr(compression, "ROWS", 24)
    monkeypatch.setattr(compression, "COLUMNS", 128)
    case = compression.nf4_quantise()
    packed, state = case.theirs()
    ours = case.ours()
    assert torch.equal(ours.packed.flatten(), packed.flatten())
    assert torch.equal(ours.scales.flatten(), state.absmax.flatten())
    case = compression.int8_quantise()
    codes, absmax = case.ours()
    theirs, their_absmax, _ = case.theirs()
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, their_absmax)


def test_both_sides_write_the_same(monkeypatch):
    """Of the padded batch, what each request had asked for."""
    ours, theirs = models.twins(replace(models.SHAPE, **NARROW))
    draw = random.Random(0)
    tokens = [draw.randrange(128) for _ in range(2000)]
    monkeypatch.setattr(inference, "our_model", lambda: ours)
    monkeypatch.setattr(inference, "their_model", lambda: theirs)
    monkeypatch.setattr(inference, "text", lambda: tokens)
    for make in (inference.sixteen_requests, inference.shared_prefix):
        case = make()
        written = case.ours()
        in_batch = case.theirs()
        assert [
            row[: len(mine)] for mine, row in zip(written, in_batch, strict=True)
        ] == written
