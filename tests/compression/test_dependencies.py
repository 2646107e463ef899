"""Coupled structures: what is found, and that cutting is leaving out zeros."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlab.compression import dependencies
from llmlab.compression import quantization_basics as qb
from llmlab.compression.dependencies import cut, groups, mask
from tests.models.hugging_face import make, named, theirs

KINDS = {
    "plain": {},
    "gqa, odd": {"num_key_value_heads": 2, "intermediate_size": 47},
    "three heads each": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "hidden_size": 36,
        "tie_word_embeddings": True,
    },
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
STREAM = "model.embed_tokens"


def both(kind):
    return [make(**KINDS[kind]), theirs(make(**KINDS[kind]))]


def logits(model):
    out = model(IDS)
    return getattr(out, "logits", out)


def some(group, seed=0):
    """Between one and all but one of the units, in no order."""
    random = torch.Generator().manual_seed(seed + group.units)
    count = int(torch.randint(1, group.units, (), generator=random))
    return torch.randperm(group.units, generator=random)[:count]


def choose(found, stream=False):
    return {
        n: some(g, i) for i, (n, g) in enumerate(found.items()) if stream or n != STREAM
    }


def slots(group):
    return {(m.name, m.axis, m.index.shape[1]) for m in group.members}


# What is found ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_has_its_heads_and_its_channels_and_all_share_the_stream(kind):
    for model in both(kind):
        config = model.config
        H, K, D = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        found = groups(model)
        wanted = [STREAM]
        for i in range(config.num_hidden_layers):
            block = f"model.layers.{i}"
            bias = [("q", 0, H // K * D), ("k", 0, D), ("v", 0, D)]
            heads = {
                (f"{block}.self_attn.{n}_proj.{what}", axis, each)
                for n, axis, each in [*bias, ("o", 1, H // K * D)]
                for what in (
                    ["weight", "bias"] if "bias" in kind and axis == 0 else ["weight"]
                )
            }
            channels = {
                (f"{block}.mlp.{n}_proj.{what}", axis, 1)
                for n, axis in [("gate", 0), ("up", 0), ("down", 1)]
                for what in (
                    ["weight", "bias"] if "bias" in kind and axis == 0 else ["weight"]
                )
            }
            if K > 1:  # a single one cannot go
                wanted.append(f"{block}.self_attn")
                assert slots(found[wanted[-1]]) == heads
                assert found[wanted[-1]].units == K
            wanted.append(f"{block}.mlp")
            assert slots(found[wanted[-1]]) == channels
            assert found[wanted[-1]].units == config.intermediate_size
        assert list(found) == wanted
        # every parameter has one axis on the stream, or lies along it
        stream = {m.name for m in found[STREAM].members}
        inner = {f"{p}_proj.bias" for p in ("q", "k", "v", "gate", "up")}
        assert stream == {
            n
            for n, _ in model.named_parameters()
            if ".".join(n.split(".")[-2:]) not in inner
        }


def test_heads_of_a_group_are_neighbours():
    found = groups(make(**KINDS["three heads each"]))["model.layers.1.self_attn"]
    index = {m.name.split(".")[-2]: m.index for m in found.members}
    D = 6
    for unit in range(3):
        assert index["k_proj"][unit].tolist() == list(range(unit * D, unit * D + D))
        q = list(range(3 * unit * D, 3 * unit * D + 3 * D))
        assert index["q_proj"][unit].tolist() == q
        assert index["o_proj"][unit].tolist() == q


def test_eager_attention_shows_the_same_groups():
    ours = make(num_key_value_heads=2)
    hf = theirs(ours)
    hf.set_attn_implementation("eager")
    eager, fused = groups(hf), groups(ours)
    assert list(eager) == list(fused)
    for name, group in fused.items():
        assert slots(group) == slots(eager[name])
        for a, b in zip(group.members, eager[name].members, strict=True):
            assert torch.equal(a.index, b.index)


class Residual(nn.Module):
    """h + W₂ relu(W₁ h), where h = W₀ x, then W₃ h: h is one group with both ends."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.inner = nn.ModuleDict({"w1": nn.Linear(7, 11), "w2": nn.Linear(11, 7)})
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        h = self.first(x)
        h = h + self.inner["w2"](F.relu(self.inner["w1"](h)))
        return self.last(h)


def test_a_residual_ties_all_that_is_added_to_it():
    torch.manual_seed(0)
    model = Residual()
    found = groups(model, torch.randn(2, 5))
    assert {n: g.units for n, g in found.items()} == {"first": 7, "inner": 11}
    assert slots(found["first"]) == {
        ("first.weight", 0, 1),
        ("first.bias", 0, 1),
        ("inner.w1.weight", 1, 1),
        ("inner.w2.weight", 0, 1),
        ("inner.w2.bias", 0, 1),
        ("last.weight", 1, 1),
    }
    x = torch.randn(4, 5)
    kept = {"first": torch.tensor([6, 2, 3]), "inner": torch.tensor([0, 10])}
    zeros = mask(deepcopy(model), kept, found)
    torch.testing.assert_close(cut(model, kept, found)(x), zeros(x))
    assert model.inner["w1"].weight.shape == (2, 3)


def test_a_plain_mlp_keeps_its_inputs_and_outputs():
    model = nn.Sequential(
        nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 6), nn.Tanh(), nn.Linear(6, 4)
    )
    found = groups(model, torch.zeros(2, 8))
    assert {n: g.units for n, g in found.items()} == {"0": 15, "2": 6}
    cut(model, {"0": torch.arange(7), "2": torch.arange(2)}, found)
    assert [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)] == [
        (7, 8),
        (2, 7),
        (4, 2),
    ]
    assert (model[2].in_features, model[2].out_features) == (7, 2)


class Halves(nn.Module):
    """A fused gate and up: channel i is rows i and i + f of one matrix."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(5, 12, bias=False)
        self.down = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Heads(nn.Module):
    """A view into heads of a written length, and no attention."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(5, 12)
        self.back = nn.Linear(12, 5)

    def forward(self, x):
        heads = self.wide(x).view(*x.shape[:-1], -1, 4)
        return self.back(torch.tanh(heads).flatten(-2))


def test_a_written_length_makes_units():
    model = Heads()
    found = groups(model, torch.zeros(2, 5))
    assert found["wide"].units == 3
    assert found["wide"].members[0].index.tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    cut(model, {"wide": torch.tensor([2])}, found)(torch.zeros(2, 5))


def test_fused_matrices_give_units_with_two_rows():
    group = groups(Halves(), torch.zeros(2, 5))["both"]
    assert group.units == 6
    assert group.members[0].index.tolist() == [[i, i + 6] for i in range(6)]


@pytest.mark.parametrize(
    "old, new, axes",
    [
        ((1, 2, 12), (1, 2, 3, 4), [3]),
        ((1, 2, 3, 4), (1, 2, 12), []),
        ((2, 12), (2, 1, 12), [2]),
        ((1, 2, 12), (2, 12), []),
        ((2, 24), (2, 2, 3, 4), [2, 3]),
        ((2, 3, 4), (3, 8), [1]),
    ],
)
def test_written_axes_are_what_a_split_adds(old, new, axes):
    if old == (2, 24):
        axes = [2, 3]
    assert dependencies.written_axes(torch.Size(old), torch.Size(new)) == axes


def test_components_are_those_of_a_walk():
    random = torch.Generator().manual_seed(0)
    pairs = torch.randint(300, (2, 180), generator=random)
    parent = list(range(300))

    def find(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for a, b in pairs.T.tolist():
        parent[max(find(a), find(b))] = min(find(a), find(b))
    wanted = [find(i) for i in range(300)]
    assert (
        dependencies.components(300, [pairs[:, :90], pairs[:, 90:]]).tolist() == wanted
    )
    chain = torch.stack([torch.arange(1, 300), torch.arange(299)])
    assert not dependencies.components(300, [chain.flip(1)]).any()
    assert dependencies.components(3, []).tolist() == [0, 1, 2]


# Cutting is leaving out zeros ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_zeros(kind):
    for model in both(kind):
        model = model.double()
        found = groups(model)
        kept = choose(found)
        zeros = mask(deepcopy(model), kept, found)
        before = dict(zeros.named_parameters())
        small = cut(model, kept, found)
        torch.testing.assert_close(logits(small), logits(zeros))
        weights = torch.linspace(-1, 1, logits(zeros).numel()).double()
        for m in (small, zeros):
            (logits(m).flatten() * weights).sum().backward()
        index = {name: {} for name in before}
        for name, units in kept.items():
            for member in found[name].members:
                its = member.index[units.sort().values].flatten().sort().values
                index[member.name][member.axis] = its
        shorter = 0
        for name, parameter in small.named_parameters():
            grad = before[name].grad
            for axis, its in index[name].items():
                grad = grad.index_select(axis, its)
            torch.testing.assert_close(parameter.grad, grad)
            shorter += parameter.numel() < before[name].numel()
            assert parameter.is_contiguous() and parameter.is_leaf
        assert shorter >= 2 * 3


@pytest.mark.parametrize("kind", ["gqa, odd", "tied", "biases"])
def test_a_narrower_stream_is_zeros_whose_norms_count_what_is_there(kind):
    for model in both(kind):
        model = model.double()
        found = groups(model)
        kept = choose(found, stream=True)
        zeros = mask(deepcopy(model), kept, found)
        # a mean over d channels of which d' are not 0 is d'/d of the mean over d'
        d, left = found[STREAM].units, len(kept[STREAM])
        for name, module in zeros.named_modules():
            if name.endswith("norm"):
                for field in ("eps", "variance_epsilon"):
                    if hasattr(module, field):
                        setattr(module, field, getattr(module, field) * left / d)
                module.weight.data *= (left / d) ** 0.5
        # norms are taken in fp32
        small = logits(cut(model, kept, found))
        torch.testing.assert_close(small, logits(zeros), rtol=1e-3, atol=1e-4)
        assert model.config.hidden_size == left


def test_in_bf16_too():
    model = make(num_key_value_heads=2).bfloat16()
    found = groups(model)
    kept = choose(found)
    zeros = mask(deepcopy(model), kept, found)
    cut(model, kept, found)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), logits(zeros), rtol=0.02, atol=0.05)


def test_tied_weights_stay_tied_and_frozen_ones_frozen():
    for model in both("tied"):
        model.requires_grad_(False)
        cut(model, {STREAM: torch.arange(5, 20)})
        embedding = model.get_submodule(STREAM)
        assert model.lm_head.weight is embedding.weight
        assert embedding.weight.shape == (61, 15) and embedding.embedding_dim == 15
        assert model.lm_head.in_features == 15
        assert not any(p.requires_grad for p in model.parameters())


def test_the_config_says_it_where_all_layers_are_alike():
    for model in both("gqa, odd"):
        kept = {
            n: torch.arange(1 if "attn" in n else 9)
            for n in groups(model)
            if n != STREAM
        }
        cut(model, kept)
        config = model.config
        assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
        assert (config.head_dim, config.intermediate_size) == (8, 9)
        cut(model, {"model.layers.0.mlp": torch.arange(4)})
        assert config.intermediate_size == 9  # no longer one width: as it was


def test_generation_with_a_cache_after_the_cut():
    from llmlab.models.cache import KVCache

    ours, hf = both("gqa, odd")
    kept = choose(groups(ours))
    cut(ours, kept), cut(hf, kept)
    whole = ours(IDS)
    cache = KVCache(2)
    steps = [ours(IDS[:, i : i + 1], cache=cache) for i in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hf(IDS).logits, whole, rtol=1e-4, atol=1e-5)
    first = hf(IDS[:, :4], use_cache=True)
    rest = hf(IDS[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)


def test_units_can_be_cut_again():
    model = make()
    cut(model, {"model.layers.0.mlp": torch.arange(10, 30)})
    zeros = deepcopy(model)
    mask(zeros, {"model.layers.0.mlp": torch.tensor([7])})
    cut(model, {"model.layers.0.mlp": torch.tensor([7])})
    torch.testing.assert_close(logits(model), logits(zeros))


# What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("change", [cut, mask], ids=named)
@pytest.mark.parametrize(
    "name, units, words",
    [
        ("model.layers.0.mlp", torch.tensor([], dtype=torch.long), "is empty"),
        (
            "model.layers.0.mlp",
            torch.tensor([47, 48]),
            "from 47 to 48; units are 0 … 47",
        ),
        ("model.layers.0.mlp", torch.tensor([-1, 2]), "from -1 to 2"),
        ("model.layers.0.mlp", torch.tensor([2, 2]), "twice"),
        ("model.layers.0.mlp", torch.tensor([0.5]), "numbers of units"),
        ("model.layers.0.mlp", torch.ones(48, dtype=torch.bool), "numbers of units"),
        ("model.layers.0.mlp", torch.tensor([[1]]), r"of shape \(1, 1\)"),
        ("model.layers.7.mlp", torch.tensor([1]), "no such group; it has model.embed"),
    ],
)
def test_bad_units_are_named_and_change_nothing(change, name, units, words):
    model = make()
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        change(model, {"model.layers.1.mlp": torch.arange(3), name: units})
    for n, p in model.named_parameters():
        assert p is before[n][0] and torch.equal(p, before[n][1])


def test_groups_of_another_model_are_refused():
    model = make()
    found = groups(model)
    kept = {"model.layers.0.mlp": torch.arange(40)}
    cut(model, kept, found)
    with pytest.raises(ValueError, match=r"gate_proj.weight.*find them anew"):
        cut(model, kept, found)


def test_adapters_and_quantised_models_are_refused():
    class Adapter(nn.Module):
        is_wrapper = True

    model = make()
    model.model.layers[0].mlp.up_proj = Adapter()
    with pytest.raises(ValueError, match="carries an adapter"):
        groups(model)
    with pytest.raises(ValueError, match="is compressed already"):
        groups(qb.apply(make(), qb.QuantConfig(group_size=4)))


def test_functions_that_are_not_known_are_named():
    class Sorted(nn.Sequential):
        def forward(self, x):
            return super().forward(x).sort(dim=-1).values

    with pytest.raises(ValueError, match=r"cannot be followed through.* sort"):
        groups(Sorted(nn.Linear(4, 4)), torch.zeros(1, 4))

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.places = nn.Parameter(torch.ones(2, 4))
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) + self.places

    with pytest.raises(ValueError, match="places is used by no linear"):
        groups(Table(), torch.zeros(2, 4))


def test_the_mode_of_each_module_comes_back():
    model = make().train()
    model.model.norm.eval()
    groups(model)
    assert model.training and not model.model.norm.training
