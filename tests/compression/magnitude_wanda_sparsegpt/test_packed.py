"""N of M weights and their places: every bit counted, to the disk and back."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression import walk
from llmlab.compression.magnitude_wanda_sparsegpt import PruneConfig, packed
from llmlab.compression.quantization_basics import nbytes
from tests.compression.magnitude_wanda_sparsegpt.problems import text
from tests.models.hugging_face import make, theirs

PATTERNS = ["2:4", "4:8", "1:4", "1:2", "3:5", "6:8"]


def sparse_linear(pattern, out=3, dtype=torch.float32):
    n, m = map(int, pattern.split(":"))
    linear = nn.Linear(2 * m, out, dtype=dtype)
    keep = pruning.n_of_m(linear.weight.abs().float(), n, m)
    linear.weight.data.mul_(keep)
    return linear


def test_one_group_by_hand():
    values, places = packed.encode(torch.tensor([[0.0, 5, 0, -2, 7, 0, 0, 1]]), 2, 4)
    assert values.tolist() == [[5, -2, 7, 1]]
    assert places.tolist() == [[1, 3, 0, 3]]
    linear = nn.Linear(8, 1, bias=False)
    linear.weight.data = torch.tensor([[0.0, 5, 0, -2, 7, 0, 0, 1]])
    sparse = packed.SparseLinear(linear, "2:4")
    sparse.fill(linear.weight.detach())
    assert sparse.places.tolist() == [0b11_00_11_01]  # the lowest bits first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_and_back_is_the_weight_itself(pattern, dtype):
    torch.manual_seed(0)
    linear = sparse_linear(pattern, dtype=dtype)
    model = pruning.pack(nn.Sequential(linear), pattern)
    assert torch.equal(model[0].weight, linear.weight)
    x = torch.randn(5, linear.in_features, dtype=dtype)
    assert torch.equal(model(x), linear(x))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_bytes_are_n_values_and_n_places_a_group(pattern):
    n, m = map(int, pattern.split(":"))
    linear = sparse_linear(pattern, out=8)
    sparse = pruning.pack(nn.Sequential(linear), pattern)[0]
    assert sparse.values.numel() == 8 * 2 * n
    bits = {2: 1, 4: 2, 5: 3, 8: 3}[m]
    assert sparse.places.numel() == -(-8 * 2 * n * bits // 8)


def test_2_of_4_in_16_bits_takes_nine_sixteenths():
    linear = sparse_linear("2:4", out=16, dtype=torch.bfloat16)
    linear.bias = None
    before = nbytes(linear)
    assert nbytes(pruning.pack(nn.Sequential(linear), "2:4")) / before == 9 / 16


def test_a_group_with_fewer_weights_keeps_zeros():
    linear = nn.Linear(8, 2, bias=False)
    W = torch.tensor([[0.0, 0, 0, 3, 0, 0, 0, 0], [1, 0, 0, 0, 0, 2, 3, 0]])
    linear.weight.data.copy_(W)
    sparse = pruning.pack(nn.Sequential(linear), "2:4")[0]
    assert torch.equal(sparse.weight, W)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_model_goes_to_disk_and_comes_back(tmp_path, method):
    """As dense zeros, and packed; both give the outputs of the pruned model."""
    model = make(num_key_value_heads=2)
    pruning.apply(model, text(), PruneConfig(method, pattern="2:4"))
    expected = model(text()[0])
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    dense = make(num_key_value_heads=2)
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    assert torch.equal(dense(text()[0]), expected)
    assert pruning.sparsity(dense) == 0.5

    pruning.pack(model, "2:4")
    save_file(model.state_dict(), tmp_path / "packed.safetensors")
    other = pruning.with_places(make(num_key_value_heads=2), "2:4")
    other.load_state_dict(load_file(tmp_path / "packed.safetensors"))
    torch.testing.assert_close(other(text()[0]), expected)
    linears = walk.linears(dense).values()
    weights = sum(linear.weight.numel() for linear in linears)
    sizes = [
        (tmp_path / f"{f}.safetensors").stat().st_size for f in ("dense", "packed")
    ]
    saved = weights * (4 - (2 + 1 / 8))  # bytes: of 4, half the values and the places
    assert abs(sizes[0] - sizes[1] - saved) < 3_000  # the names of the tensors


def test_a_transformers_model_is_packed_as_ours():
    model = make()
    pruning.apply(model, None, PruneConfig("magnitude", pattern="2:4"))
    library = pruning.pack(theirs(model), "2:4")
    torch.testing.assert_close(library(text()[0]).logits, model(text()[0]))


def test_what_does_not_keep_to_the_pattern_is_named_and_nothing_changes():
    model = pruning.apply(make(), None, PruneConfig("magnitude", pattern="2:4"))
    model.model.layers[1].mlp.up_proj.weight.data[2, :4] = 1
    before = deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj: a group of 4 has 4"
    ):
        pruning.pack(model, "2:4")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"q_proj: m=5 must divide the columns"):
        pruning.pack(make(), "2:5")
    with pytest.raises(ValueError, match="pattern='half' must be"):
        pruning.pack(make(), "half")


def test_a_packed_model_is_not_pruned_again():
    model = pruning.apply(make(), None, PruneConfig("magnitude", pattern="2:4"))
    pruning.pack(model, "2:4")
    with pytest.raises(ValueError, match="is compressed already, a SparseLinear"):
        pruning.apply(model, None, PruneConfig("magnitude", 0.5))
