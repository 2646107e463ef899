"""torchtitan's way of composing, against one process; and what torch does when the
order or the helper is another.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.parallelism import World, launch
from llmlab.parallelism.frameworks import composed, engines
from llmlab.parallelism.frameworks.composed import Axes
from llmlab.parallelism.pipeline import split
from tests.libraries import seen_in


@pytest.fixture(scope="module")
def reference():
    return World(1).run(engines.plain)[0]


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (2, Axes(tp=2, recompute=True)),
        (2, Axes(dp=2, compile_with="eager")),
        (4, Axes(dp=2, tp=2, recompute=True)),
        (4, Axes(pp=2, dp=2, recompute=True)),
        (4, Axes(pp=2, tp=2)),
    ],
    ids=str,
)
def test_every_mesh_trains_as_one_process(ranks, axes, reference):
    assert reference[-1] < reference[0] - 0.1
    for losses in launch(composed.train, ranks, axes, timeout=200):
        assert losses == pytest.approx(reference, abs=1e-5)


def on_a_mesh(comm):
    """What is where after all steps: (mesh's names, shape here, shape of the whole)."""
    axes = Axes(dp=2, tp=2, recompute=True)
    mesh = composed.make_mesh(axes, comm.size)
    (part,) = split(engines.build(), 0, 1)
    composed.parallelize(part, mesh, axes)
    found = {}
    for name, weight in part.named_parameters():
        local = tuple(weight.to_local().shape)
        names = weight.device_mesh.mesh_dim_names
        found[name] = names, local, tuple(weight.shape)
    return found, list(part.state_dict())


def test_each_parameter_is_cut_by_tensor_and_then_by_data():
    """Column parallel: both along dimension 0. Row parallel: 1 by tensor, 0 by data."""
    found, names = launch(on_a_mesh, 4, timeout=120)[0]
    block = "model.layers.0._checkpoint_wrapped_module."
    up, down = block + "mlp.up_proj.weight", block + "mlp.down_proj.weight"
    assert found[up] == (("dp", "tp"), (40, 64), (160, 64))
    assert found[down] == (("dp", "tp"), (32, 80), (64, 160))
    norm = found[block + "input_layernorm.weight"]
    assert norm == (("dp",), (32,), (64,))  # the same on both tensor ranks
    # the wrapper shows in the names of parameters, and not in those of the state
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not any("_checkpoint_wrapped_module" in name for name in names)


def test_each_block_is_compiled_by_itself():
    (part,) = split(engines.build(), 0, 1)
    composed.parallelize(part, None, Axes(compile_with="eager", recompute=True))
    assert all(b._compiled_call_impl is not None for b in composed.blocks(part))
    assert part._compiled_call_impl is None


def sharded_first(comm):
    mesh = composed.make_mesh(Axes(dp=2, tp=2), comm.size)
    (part,) = split(engines.build(), 0, 1)
    composed.shard_parameters(part, mesh["dp"])
    try:
        composed.cut_matrices(composed.blocks(part)[0], mesh["tp"])
    except ValueError as error:
        return str(error)
    return "no error"


@seen_in("torch", "2.13.0")
def test_data_before_tensor_is_refused():
    assert "different device mesh" in launch(sharded_first, 4, timeout=120)[0]


def clipped(comm):
    axes = Axes(dp=2, tp=2)
    mesh = composed.make_mesh(axes, comm.size)
    (part,) = split(engines.build(), 0, 1)
    composed.parallelize(part, mesh, axes)
    x, y = composed.shard(0, mesh)
    engines.loss_of(part(x), y).backward()
    try:
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
    except RuntimeError as error:
        return str(error)
    return "no error"


@seen_in("torch", "2.13.0")
def test_torchs_clipping_does_not_know_two_meshes():
    """Norms lie on ("dp",), matrices on ("dp", "tp")."""
    assert "must have the same mesh" in launch(clipped, 4, timeout=120)[0]


@seen_in("torch", "2.13.0")
def test_compiling_in_place_keeps_names():
    first, second = engines.build().model.layers[:2]
    compiled = torch.compile(first)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    before = list(second.state_dict())
    second.compile()
    assert list(second.state_dict()) == before


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Axes(tp=0), "tp=0 must be at least 1"),
        (lambda: composed.make_mesh(Axes(dp=2), 3), "must be the 3 ranks"),
    ],
)
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
