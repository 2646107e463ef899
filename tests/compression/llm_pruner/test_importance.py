"""Importance: closed forms, the loss itself, and torch-pruning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llmlab.compression import dependencies, llm_pruner
from llmlab.compression.dependencies import Group, Member
from llmlab.compression.llm_pruner import Slopes
from llmlab.models.llama import Llama, LlamaConfig
from tests.models.hugging_face import make, theirs

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = [torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([[2, 6, 5], [3, 5, 8]])]


def loss_of(model, texts):
    """The mean over texts of the mean loss of each, one backward pass for all."""
    rows = [row[None] for batch in texts for row in batch]
    return sum(F.cross_entropy(model(r)[0, :-1], r[0, 1:]) for r in rows) / len(rows)


# One unit of two rows in one matrix, and of two columns in another.
W1 = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
W2 = torch.tensor([[2.0, 1.0], [-1.0, 4.0], [0.0, 1.0]])
PARAMETERS = {"a": W1, "b": W2}
SLOPES = {
    "a": Slopes(torch.tensor([[1.0, 1.0], [0.0, -4.0]]), torch.full((2, 2), 2.0)),
    "b": Slopes(torch.full((3, 2), 0.5), torch.full((3, 2), 1.0)),
}
EACH = torch.tensor([[0], [1]])
GROUP = Group("g", 2, (Member("a", 0, 2, EACH), Member("b", 1, 2, EACH)))


@pytest.mark.parametrize(
    "kind, rows, columns",
    [
        ("magnitude", (1 + 4, 9 + 0.25), (4 + 1 + 0, 1 + 16 + 1)),
        # g w: (1, -2), (0, -2); and 0.5 of (2, -1, 0), (1, 4, 1)
        ("vector", (abs(1 - 2), abs(0 - 2)), (0.5, 3)),
        ("first", (1 + 2, 0 + 2), (1.5, 3)),
        # F w²: 2 of (1, 4), (9, 0.25); and (4, 1, 0), (1, 16, 1)
        ("second", (2 + 8, 18 + 0.5), (5, 18)),
        # |g w - F w² / 2|
        (
            "mix",
            (abs(1 - 1) + abs(-2 - 4), abs(0 - 9) + abs(-2 - 0.25)),
            (
                abs(1 - 2) + abs(-0.5 - 0.5) + 0,
                abs(0.5 - 0.5) + abs(2 - 8) + abs(0.5 - 0.5),
            ),
        ),
    ],
)
def test_scores_are_those_worked_by_hand(kind, rows, columns):
    for aggregate, join in {
        "sum": lambda a, b: a + b,
        "prod": lambda a, b: a * b,
        "max": max,
        "last": lambda a, b: b,
    }.items():
        found = llm_pruner.group_importance(PARAMETERS, SLOPES, GROUP, kind, aggregate)
        wanted = [join(a, b) for a, b in zip(rows, columns, strict=True)]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32))


def test_rows_of_one_unit_are_summed():
    heads = Group("h", 1, (Member("a", 0, 2, torch.tensor([[0, 1]])),))
    found = llm_pruner.group_importance(PARAMETERS, SLOPES, heads, "vector")
    assert found.tolist() == [abs(1 - 2) + abs(-2)]  # a row is a vector, not the unit


def test_vectors_and_biases_have_scores_too():
    b = torch.tensor([-2.0, 3.0])
    its = Slopes(torch.tensor([2.0, -1.0]), torch.ones(2))
    for kind, wanted in {
        "vector": [4, 3],
        "first": [4, 3],
        "magnitude": [4, 9],
        "second": [4, 9],
        "mix": [6, 7.5],
    }.items():
        assert llm_pruner.axis_scores(b, its, kind, 0).tolist() == wanted


# Slopes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"num_key_value_heads": 2}])
def test_slopes_are_means_over_texts(kind):
    model = make(**kind)
    names = [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    found = llm_pruner.slopes(model, TEXTS, names)
    assert list(found) == names
    loss_of(model, TEXTS).backward()
    for name in names:
        torch.testing.assert_close(found[name].mean, model.get_parameter(name).grad)
    squares = {name: 0 for name in names}
    for row in [row[None] for batch in TEXTS for row in batch]:
        model.zero_grad()
        loss_of(model, [row]).backward()
        for name in names:
            squares[name] = squares[name] + model.get_parameter(name).grad.square() / 3
    for name in names:
        torch.testing.assert_close(found[name].square, squares[name])


def test_slopes_leave_the_model_alone():
    model = make().train().requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    llm_pruner.slopes(model, TEXTS, ["model.layers.0.mlp.up_proj.weight"])
    assert model.training
    for n, p in model.named_parameters():
        assert p.grad is None and torch.equal(p, before[n])
        assert p.requires_grad == (n == "model.norm.weight")


def test_ours_and_transformers_have_the_same_slopes():
    model = make(num_key_value_heads=2)
    names = [n for n, _ in model.named_parameters() if "layers.1" in n]
    ours = llm_pruner.slopes(model, TEXTS, names)
    hf = llm_pruner.slopes(theirs(model), TEXTS, names)
    for name in names:
        torch.testing.assert_close(ours[name].mean, hf[name].mean, rtol=1e-3, atol=1e-5)


def test_first_and_mix_say_what_a_small_weight_costs():
    """The signed terms are a Taylor series: checked against the loss, in float64."""
    model = make().double()
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight[5] *= 1e-3  # so small that the series holds
        whole = loss_of(model, TEXTS)
    grad = llm_pruner.slopes(model, TEXTS, [name])[name].mean.double()
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[5] = 0
        without = loss_of(model, TEXTS)
    torch.testing.assert_close(
        whole - without, (grad * kept)[5].sum(), rtol=1e-2, atol=1e-12
    )
    vector = llm_pruner.axis_scores(kept, Slopes(grad, grad**2), "vector", 0)[5]
    torch.testing.assert_close(vector, (whole - without).abs(), rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize(
    "batches, names, words",
    [
        ([], ["lm_head.weight"], "batches is empty"),
        ([torch.tensor([[1], [2]])], ["lm_head.weight"], "one token"),
        (TEXTS, ["nothing.weight"], "no such parameter"),
    ],
)
def test_bad_texts_and_names_are_refused(batches, names, words):
    with pytest.raises(ValueError, match=words):
        llm_pruner.slopes(make(), batches, names)


def test_bad_kinds_are_refused():
    for call, words in [
        (
            lambda: llm_pruner.group_importance(PARAMETERS, SLOPES, GROUP, "third"),
            "third",
        ),
        (
            lambda: llm_pruner.group_importance(PARAMETERS, {}, GROUP, "mix"),
            "slopes=None",
        ),
        (
            lambda: llm_pruner.group_importance(
                PARAMETERS, SLOPES, GROUP, "mix", "mean"
            ),
            "aggregate='mean'",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_slopes_that_are_not_finite_are_named():
    model = make()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"slope of model.layers.1.mlp.up_proj"):
        llm_pruner.slopes(model, TEXTS, ["model.layers.1.mlp.up_proj.weight"])


# The library --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    """The golden table, the golden tensors, and the same model, ours."""
    table = json.loads((GOLDEN / "llm_pruner.json").read_text(encoding="utf-8"))
    tensors = load_file(GOLDEN / "llm_pruner.safetensors")
    model = Llama(LlamaConfig(**table["shape"])).eval()
    state = {n.removeprefix("model/"): t for n, t in tensors.items() if "model/" in n}
    model.load_state_dict(state)
    return table, tensors, model


@pytest.mark.parametrize("part, unit", [("mlp", 5), ("self_attn", 1)])
def test_what_goes_together_is_what_torch_pruning_finds(library, part, unit):
    table, _, model = library
    group = dependencies.groups(model)[f"model.layers.0.{part}"]
    ours = sorted([m.name, m.axis, m.index[unit].tolist()] for m in group.members)
    assert ours == table["coupled"][part]


@pytest.mark.parametrize("kind", ["magnitude", "first", "vector"])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_scores_are_those_of_torch_pruning(library, part, kind):
    _, tensors, model = library
    group = dependencies.groups(model)[f"model.layers.0.{part}"]
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    slopes = llm_pruner.slopes(model, [text], [m.name for m in group.members])
    names = [key.split("/")[2] for key in tensors if key.startswith(f"{part}/{kind}/")]
    assert len(names) == (3 if kind == "magnitude" else 1)
    for how in names:
        theirs_ = tensors[f"{part}/{kind}/{how}"]
        if part == "mlp":
            found = llm_pruner.group_importance(
                dict(model.named_parameters()), slopes, group, kind, how
            )
        elif how == "sum":  # a score for each row there: the rows of a head are summed
            found = llm_pruner.group_importance(
                dict(model.named_parameters()), slopes, group, kind, how
            )
            theirs_ = theirs_.reshape(3, 4).sum(1)
        else:
            continue
        torch.testing.assert_close(found, theirs_, rtol=1e-4, atol=1e-7)
