"""Three axes at once equal one process; a checkpoint of one split is read by another,
bit for bit; who sits where.
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism import World, launch
from llmlab.parallelism.hybrid import resharding
from llmlab.parallelism.hybrid.hybrid import Hybrid
from llmlab.parallelism.hybrid.placement import Placement, node_links
from llmlab.parallelism.pipeline.schedules import gpipe, one_f_one_b
from llmlab.parallelism.runtime.cost import Link
from tests.covering import each_value

MICROBATCHES = 3


def config_of(tied=False, K=2, bias=False, layers=5):
    return LlamaConfig(
        vocab_size=37,  # divides by nothing
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=K,
        tie_word_embeddings=tied,
        attention_bias=bias,
    )


def batches(dp, step):
    """Replicas and microbatches of unequal lengths: (tokens, targets) for each."""
    dice = torch.Generator().manual_seed(step)
    rows = [
        [torch.randint(37, (2, 6 + r + i), generator=dice) for i in range(MICROBATCHES)]
        for r in range(dp)
    ]
    return [[(x[:, :-1], x[:, 1:]) for x in row] for row in rows]


REFERENCES: dict[tuple, tuple] = {}


def one_process(config, dp, steps, dtype=torch.float64):
    """(the trained model, losses, norms), once for all splits: nobody changes them."""
    key = (str(config), dp, steps, dtype)
    if key not in REFERENCES:
        REFERENCES[key] = _one_process(config, dp, steps, dtype)
    return REFERENCES[key]


def _one_process(config, dp, steps, dtype):
    torch.manual_seed(1)
    model = Llama(config).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms = [], []
    for step in range(steps):
        every = [b for row in batches(dp, step) for b in row]
        n = sum(y.numel() for _, y in every)
        optimizer.zero_grad()
        parts = [
            F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / n
            for x, y in every
        ]
        sum(parts).backward()
        losses.append(sum(parts).item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
    return model, losses, norms


def train(
    comm,
    config,
    sizes,
    steps,
    start=0,
    save=None,
    resume=None,
    layers=None,
    make=one_f_one_b,
    dtype=torch.float64,
):
    torch.manual_seed(1)
    job = Hybrid(Llama(config).to(dtype), comm, Placement(sizes), layers=layers)
    optimizer = torch.optim.AdamW(job.parameters(), lr=1e-2)
    if resume:
        job.load(resume, optimizer)
    losses, norms = [], []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        losses.append(
            job.step(
                make(job.pp.size, MICROBATCHES), batches(job.dp.size, step)[job.dp.rank]
            )
        )
        norms.append(job.clip_grad_norm(0.5))
        optimizer.step()
    if save:
        resharding.save(save, comm.rank, job.owned(optimizer))
    return losses, norms


def read_whole(folder, config):
    return resharding.load(
        folder,
        {n: resharding.piece(n, config) for n in resharding.whole_shapes(config)},
    )


SPLITS = [
    {"pp": 2, "dp": 2, "tp": 2},
    {"pp": 1, "dp": 3, "tp": 2},
    {"dp": 2, "pp": 3, "tp": 1},
    {"tp": 4, "dp": 1, "pp": 2},
    {"dp": 2, "tp": 4, "pp": 1},
]


def named(value):
    """A split's name in a test's."""
    if isinstance(value, dict):
        return " ".join(f"{axis}{size}" for axis, size in value.items())
    return None


MODELS = [(False, 4, True), (True, 2, False), (True, 1, True)]


@pytest.mark.parametrize(
    ("sizes", "model"), [*each_value(SPLITS, MODELS), (SPLITS[3], MODELS[2])], ids=named
)
def test_a_split_trains_as_one_process_does(sizes, model, tmp_path):
    """Token-weighted loss, clipped global norm, AdamW, uneven replicas; K < tp shares
    key/value heads; V does not divide.
    """
    tied, K, bias = model
    config = config_of(tied, K, bias, layers=sizes["pp"] + 1)  # stages are uneven
    model, losses, norms = one_process(config, sizes["dp"], 2)
    p = sizes["pp"] * sizes["dp"] * sizes["tp"]
    for found in World(p).run(train, config, sizes, 2, save=tmp_path):
        assert found[0] == pytest.approx(losses, abs=1e-6) and found[
            1
        ] == pytest.approx(norms, abs=1e-5)
    whole = read_whole(tmp_path, config)
    assert whole.keys() == dict(model.named_parameters()).keys()
    for name, w in model.named_parameters():
        assert torch.allclose(whole[name], w, atol=1e-5), name


def test_uneven_stages_and_another_schedule(tmp_path):
    config, sizes = config_of(), {"pp": 2, "dp": 1, "tp": 2}
    _, losses, _ = one_process(config, 1, 2)
    found = World(4).run(train, config, sizes, 2, layers=[4, 1], make=gpipe)
    assert found[3][0] == pytest.approx(losses, abs=1e-6)


def test_real_processes(tmp_path):
    config, sizes = config_of(tied=True, layers=3), {"pp": 2, "dp": 2, "tp": 2}
    _, losses, norms = one_process(config, 2, 2, torch.float32)
    found = launch(
        train,
        8,
        config,
        sizes,
        2,
        0,
        None,
        None,
        None,
        one_f_one_b,
        torch.float32,
        timeout=120,
    )
    for mine in found:
        assert mine[0] == pytest.approx(losses, abs=1e-4) and mine[1] == pytest.approx(
            norms, abs=1e-4
        )


WAYS = [
    ({"pp": 1, "dp": 1, "tp": 2}, {"pp": 1, "dp": 1, "tp": 4}),
    ({"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 1, "tp": 1}),
    ({"pp": 1, "dp": 2, "tp": 4}, {"pp": 3, "dp": 1, "tp": 2}),
    ({"pp": 2, "dp": 1, "tp": 2}, {"pp": 1, "dp": 1, "tp": 4}),
]


@pytest.mark.parametrize(("way", "tied", "K"), each_value(WAYS, [False, True], [2, 1]))
def test_a_checkpoint_is_read_by_another_split_bit_for_bit(way, tied, K, tmp_path):
    first, second = way
    config = config_of(tied, K, layers=max(first["pp"], second["pp"]) + 1)
    count = [s["pp"] * s["dp"] * s["tp"] for s in (first, second)]
    World(count[0]).run(train, config, first, 1, save=tmp_path / "a")
    World(count[1]).run(
        train, config, second, 0, resume=tmp_path / "a", save=tmp_path / "b"
    )
    a, b = (read_whole(tmp_path / x, config) for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    averages = {f"optimizer.exp_avg_sq.{n}": resharding.piece(n, config) for n in a}
    before, after = (resharding.load(tmp_path / x, averages) for x in "ab")
    assert all(
        torch.equal(before[n], moved) and moved.abs().sum() > 0
        for n, moved in after.items()
    )


def test_a_rank_with_nothing_but_padding(tmp_path):
    """Five words over four ranks: 2, 2, 1 and 0 rows of the vocabulary."""
    config = LlamaConfig(
        5, 16, 8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
    )

    def pass_on(comm, sizes, save, resume=None):
        torch.manual_seed(0)
        job = Hybrid(Llama(config), comm, Placement(sizes))
        if resume:
            job.load(resume)
        resharding.save(save, comm.rank, job.owned())

    World(2).run(pass_on, {"pp": 1, "dp": 1, "tp": 2}, tmp_path / "two")
    World(4).run(
        pass_on, {"pp": 1, "dp": 1, "tp": 4}, tmp_path / "four", tmp_path / "two"
    )
    World(1).run(
        pass_on, {"pp": 1, "dp": 1, "tp": 1}, tmp_path / "one", tmp_path / "four"
    )
    two, four, one = (read_whole(tmp_path / x, config) for x in ("two", "four", "one"))
    assert all(
        torch.equal(two[n], x) and torch.equal(one[n], x) for n, x in four.items()
    )


def test_training_goes_on_in_another_split_as_if_nothing_had_happened(tmp_path):
    config, first, second = (
        config_of(True, layers=3),
        {"pp": 2, "dp": 1, "tp": 2},
        {"pp": 1, "dp": 1, "tp": 4},
    )
    _, losses, _ = one_process(config, 1, 4)
    World(4).run(train, config, first, 2, save=tmp_path)
    found = World(4).run(train, config, second, 2, start=2, resume=tmp_path)
    assert found[0][0] == pytest.approx(losses[2:], abs=1e-6)


def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path):
    config = config_of()
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        read_whole(tmp_path, config)
    World(2).run(train, config, {"pp": 1, "dp": 1, "tp": 2}, 0, save=tmp_path)
    with pytest.raises(
        ValueError, match=r"has shape \(37, 24\) in the checkpoint and \(41, 24\) here"
    ):
        resharding.load(
            tmp_path, {"lm_head.weight": resharding.Piece((41, 24), 0, 0, 41, 41)}
        )
    with pytest.raises(ValueError, match=r"model\.nothing is not in the checkpoint"):
        resharding.load(tmp_path, {"model.nothing": resharding.Piece((1,), 0, 0, 1, 1)})
    for end in ("json", "safetensors"):
        os.remove(tmp_path / f"rank-00001.{end}")
    with pytest.raises(ValueError, match="lacks 18 of its 37 entries"):
        read_whole(tmp_path, config)
    with pytest.raises(ValueError, match="name='x\\.y' is not a parameter"):
        resharding.piece("x.y", config)


def test_files_of_an_earlier_split_in_the_same_folder_are_not_mixed_in(tmp_path):
    """Four ranks saved here before two did: ranks 2 and 3 left files that the two do
    not write over.
    """
    config = config_of()
    World(4).run(train, config, {"pp": 2, "dp": 1, "tp": 2}, 0, save=tmp_path)
    World(2).run(train, config, {"pp": 1, "dp": 1, "tp": 2}, 1, save=tmp_path)
    with pytest.raises(
        ValueError,
        match=r"rank-0000[23]\.safetensors is not what another file says: use a folder",
    ):
        read_whole(tmp_path, config)


@pytest.mark.parametrize("p", [1, 2, 4, 6, 12])
def test_pieces_tile_the_whole(p):
    config = LlamaConfig(97, 48, 36, 1, 12, 2)
    for name, shape in resharding.whole_shapes(config).items():
        pieces = [resharding.piece(name, config, r, p) for r in range(p)]
        covered = sorted({(at.start, at.stop) for at in pieces})
        assert covered[0][0] == 0 and covered[-1][1] == shape[pieces[0].dim]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
        assert len(covered) * pieces[0].copies == p or not all(
            at.length for at in pieces
        )


def test_a_placement_must_fit(tmp_path):
    with pytest.raises(ValueError, match=r"must have pp, dp and tp, 3 devices"):
        World(3).run(train, config_of(), {"pp": 1, "dp": 1, "tp": 2}, 1)
    with pytest.raises(ValueError, match="tp must be at least 1"):
        Placement({"tp": 0})


def test_groups_are_those_of_pytorchs_device_mesh():
    from torch.distributed.device_mesh import init_device_mesh

    place = Placement({"pp": 2, "dp": 2, "tp": 2})

    def theirs(comm):
        mesh = init_device_mesh(
            "cpu", tuple(place.sizes.values()), mesh_dim_names=tuple(place.sizes)
        )
        groups = {
            axis: torch.distributed.get_process_group_ranks(mesh[axis].get_group())
            for axis in place.sizes
        }
        return groups, dict(zip(place.sizes, mesh.get_coordinate(), strict=True))

    for rank, (groups, coordinates) in enumerate(launch(theirs, 8, timeout=120)):
        assert coordinates == place.coordinates(rank)
        assert all(
            tuple(groups[axis]) in place.groups(axis) and rank in groups[axis]
            for axis in groups
        )


def test_axes_and_nodes():
    place = Placement({"pp": 2, "dp": 4, "tp": 4})
    assert place.groups("tp")[1] == (4, 5, 6, 7) and place.groups("pp")[3] == (3, 19)
    assert [place.nodes(axis, 8) for axis in ("tp", "dp", "pp")] == [1, 2, 2]
    assert Placement({"tp": 4, "dp": 8}).nodes("tp", 8) == 4


def test_a_world_can_have_two_wires():
    fast, slow = Link(0.0, 100.0), Link(0.0, 10.0)
    x = torch.zeros(100, dtype=torch.uint8)

    def talk(comm, groups):
        comm.group(groups[comm.rank % 2]) if groups else None
        mesh = comm.mesh(2, 2)
        mesh.axes[0].all_gather(x)
        mesh.axes[1].all_gather(x)

    world = World(4, link=node_links(2, fast, slow))
    world.run(talk, None)
    took = [e.end - e.start for e in world.ledger.events("all_gather", 0)]
    assert took == pytest.approx([10.0, 1.0])  # across: ranks 0 and 2; inside: 0 and 1
    both = World(2, link=node_links(1, fast, slow))
    both.run(lambda comm: comm.send(x, 1) if comm.rank == 0 else comm.recv(0))
    assert max(e.end for e in both.ledger.events()) == pytest.approx(10.0)


def test_the_example_goes_on_in_another_split(tmp_path):
    from llmlab.parallelism.examples.train_hybrid import Settings
    from llmlab.parallelism.examples.train_hybrid import train as example

    expected = World(1).run(example, Settings(steps=4))[0]
    first = World(8).run(
        example, Settings(pp=2, dp=2, tp=2, steps=2, save=str(tmp_path))
    )[0]
    rest = World(4).run(example, Settings(tp=4, steps=2, start=2, load=str(tmp_path)))[
        3
    ]
    assert [*first, *rest] == pytest.approx(expected, abs=1e-4)
