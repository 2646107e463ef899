"""DualPipe and DualPipeV: the order of torch, the bubble and the memory of the authors'
table, and the training of one process.
"""

from __future__ import annotations

import copy

import pytest
import torch

from llmlab.parallelism import World, launch
from llmlab.parallelism.pipeline import (
    ActivationMeter,
    Costs,
    Pipeline,
    clip_grad_norm,
    dualpipe,
    dualpipe_pairs,
    dualpipe_v,
    one_f_one_b,
    simulate,
    split,
    stage_of,
)
from llmlab.parallelism.pipeline.schedules import check, peak_microbatches
from tests.parallelism.conftest import tiny
from tests.parallelism.pipeline.test_pipeline import (
    DUAL,
    assert_same_training,
    microbatches,
    piped_training,
    pipeline,
    uneven,
    whole_loss,
)

BOTH = "bidirectional"
SIZES = [(2, 4), (2, 6), (4, 8), (4, 14), (6, 12), (8, 20)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_every_microbatch_passes_every_stage_once(p, m):
    schedule = dualpipe(p, m)
    check(schedule, m, BOTH)
    for i in range(m):
        passed = [
            stage_of(rank, chunk, p, BOTH)
            for rank, ops in enumerate(schedule)
            for kind, j, chunk in ops
            if kind == "F" and j == i
        ]
        assert sorted(passed) == list(range(p))
    check(dualpipe_v(p, m), m)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_the_two_halves_mirror_each_other(p, m):
    schedule = dualpipe(p, m)
    for rank in range(p // 2):
        mirrored = [
            (kind, (i + m // 2) % m, 1 - chunk)
            for kind, i, chunk in schedule[p - 1 - rank]
        ]
        assert schedule[rank] == mirrored


def torchs(p: int, m: int) -> tuple[list, list]:
    """(lists of (kind, microbatch, stage), where pairs begin) of ScheduleDualPipeV."""
    from torch.distributed.pipelining.schedules import ScheduleDualPipeV

    fake = object.__new__(ScheduleDualPipeV)
    fake._n_microbatches, fake.pp_group_size = m, p
    lists, pairs = [], []
    for rank in range(p):
        ops, begins = [], set()
        for action in fake._calculate_single_rank_operations(rank):
            if action.sub_actions:
                begins.add(len(ops))
            ops += [
                (a.computation_type.value, a.microbatch_index, a.stage_index)
                for a in action.sub_actions or (action,)
            ]
        lists.append(ops)
        pairs.append(begins)
    return lists, pairs


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (2, 7), (3, 6), (4, 8), (4, 13)])
def test_the_order_and_the_pairs_are_pytorchs(p, m):
    ours = [
        [(kind, i, stage_of(rank, chunk, p, "v")) for kind, i, chunk in ops]
        for rank, ops in enumerate(dualpipe_v(p, m))
    ]
    order, pairs = torchs(p, m)
    assert ours == order
    assert dualpipe_pairs(p, m, "v") == pairs


# of a chunk; F = I, as in the authors' figure; pairs that hide nothing, and some
EVEN = [
    Costs(),
    Costs(pair=2.5),
    Costs(F=1.2, I=1.2, W=0.7, pair=2.0),
    Costs(F=1, I=1, W=0.5, pair=2.5),
]


@pytest.mark.parametrize("costs", EVEN, ids=str)
@pytest.mark.parametrize(("p", "m"), [(4, 8), (4, 12), (6, 14), (8, 20)])
def test_the_bubble_as_published(p, m, costs):
    """(PP/2 − 1)(F&B + B − 3W), on the rank in the middle, which joins the most."""
    pair = costs.pair or costs.F + costs.B
    published = (p / 2 - 1) * (pair + costs.B - 3 * costs.W)
    found = simulate(dualpipe(p, m), costs, BOTH, dualpipe_pairs(p, m))
    assert found.makespan - found.busy(p // 2 - 1) == pytest.approx(published)
    # half the ranks, half of everything: a chunk of 2p stages is half a chunk of p
    pairs = dualpipe_pairs(p // 2, m // 2, "v")
    found = simulate(dualpipe_v(p // 2, m // 2), costs, "v", pairs)
    assert found.makespan - found.busy(p // 2 - 1) == pytest.approx(published / 2)


def test_the_published_bubble_is_for_equal_f_and_i():
    """With others the waiting is that of F&B + F − 2W: the table has B − W in place of
    F.
    """
    for costs in (
        Costs(F=1, I=1.2, W=0.5, pair=2.0),
        Costs(F=1.5, I=1, W=1, pair=3.0),
    ):
        found = simulate(dualpipe(6, 12), costs, BOTH, dualpipe_pairs(6, 12))
        waits = found.makespan - found.busy(2)
        assert waits == pytest.approx(2 * (costs.pair + costs.F - 2 * costs.W))
        assert waits != pytest.approx(2 * (costs.pair + costs.B - 3 * costs.W))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_what_a_rank_holds_as_published(p, m):
    """PP + 1 chunks; DualPipeV's are those of 2p stages."""
    assert peak_microbatches(dualpipe(p, m), layout=BOTH) == [p + 1] * p
    assert peak_microbatches(dualpipe_v(p, m)) == [(2 * p + 1) / 2] * p


def test_a_pair_hides_its_messages_and_ends_as_one():
    schedule = [
        [("F", 0, 0), ("F", 1, 0), ("B", 0, 0), ("B", 1, 0)],
        [("F", 0, 0), ("B", 0, 0), ("F", 1, 0), ("B", 1, 0)],
    ]
    costs = Costs(F=1, I=1, W=1, pair=2.0)
    apart = {bar[:4]: bar for bar in simulate(schedule, costs).bars}
    joined = {
        bar[:4]: bar for bar in simulate(schedule, costs, pairs=[{1}, set()]).bars
    }
    assert (apart[0, "F", 1, 0].start, apart[1, "F", 1, 0].start) == (1, 4)
    # rank 0's pair waits for the gradient of microbatch 0, and lasts 2, not 3
    assert joined[0, "F", 1, 0].start == 4
    assert joined[0, "B", 0, 0].end == pytest.approx(6)
    # and its F is there only when the pair ends
    assert joined[1, "F", 1, 0].start == pytest.approx(6)


def test_links_of_their_own():
    """Ranks 1 and 2 stand on two machines: only messages between them take longer."""
    plan = one_f_one_b(3, 1)
    slow = Costs(comm=0.1, links={(1, 2): 0.5})
    assert simulate(plan, slow).makespan == pytest.approx(9 + 2 * (0.1 + 0.5))
    assert slow.message(2, 1) == 0.5
    assert slow.message(1, 1) == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("case", "p", "m"),
    [
        ("dualpipe", 2, 4),
        ("dualpipe", 4, 10),
        ("dualpipe-v", 1, 2),
        ("dualpipe-v", 3, 7),
    ],
)
def test_training_is_that_of_one_process(case, p, m, tied):
    """Two AdamW steps with clipping: losses, norms and all weights."""
    model, batch = uneven(case, p, tied), microbatches(m)
    assert_same_training(World(p).run(piped_training, model, case, batch), model, batch)


@pytest.mark.parametrize("case", DUAL)
def test_training_in_real_processes(case):
    model, batch = uneven(case, 2), microbatches(4)
    assert_same_training(
        launch(piped_training, 2, model, case, batch, timeout=120), model, batch
    )


def test_targets_that_do_not_count():
    model, batch = tiny(num_hidden_layers=3), microbatches(4, ignored=3)
    results = World(2).run(piped_training, model, "dualpipe", batch, "token")
    assert_same_training(results, model, batch, "token")


def test_gradients_add_up_over_steps_and_copies_stay_equal():
    model, batch = tiny(num_hidden_layers=4, tie_word_embeddings=True), microbatches(8)

    def fn(comm, model):
        pipe = pipeline(comm, model, "dualpipe")
        for _ in range(2):
            pipe.step(dualpipe(comm.size, 8), batch)
        norm = clip_grad_norm(pipe, 1e9)
        named = {n: w for stage in pipe.stages for n, w in stage.named_parameters()}
        return {name: w.grad for name, w in named.items()}, norm

    results = World(4).run(fn, model)
    whole = copy.deepcopy(model)
    (2 * whole_loss(whole, batch, "microbatch")).backward()
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9).item()
    expected = {name: w.grad for name, w in whole.named_parameters()}
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for rank, (grads, its_norm) in enumerate(results):
        assert its_norm == pytest.approx(norm, rel=1e-5)
        assert grads.keys() == results[3 - rank][0].keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], atol=2e-6, rtol=1e-4)
            assert torch.equal(grad, results[3 - rank][0][name])


def test_bytes_are_those_of_the_list():
    """p + 1 microbatches on every rank, measured, against one at a time."""
    model, m = tiny(num_hidden_layers=4, tie_word_embeddings=False), 8

    def fn(comm, model, make, layout, v):
        stages = split(model, comm.rank, comm.size, v, layout=layout)
        meter = ActivationMeter([w for stage in stages for w in stage.parameters()])
        pipe = Pipeline(stages, comm, layout=layout, meter=meter)
        pipe.step(make(comm.size, m), microbatches(m, (8,)))
        assert meter.now == 0
        return meter.peak

    dual = World(4).run(fn, model, dualpipe, BOTH, 2)
    plain = World(4).run(fn, model, one_f_one_b, "loop", 1)
    # ranks 1 and 2 have one block each and no head: 5 microbatches against 3 and 2
    each = plain[1] - plain[2]
    for rank in (1, 2):
        held = peak_microbatches(one_f_one_b(4, m))[rank]
        more = peak_microbatches(dualpipe(4, m), layout=BOTH)[rank] - held
        # F of a pair may begin while a backward's gradient is on its way
        assert dual[rank] - plain[rank] == pytest.approx(more * each, abs=0.15 * each)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: dualpipe(3, 6), "p=3 must be even"),
        (lambda: dualpipe(2, 5), "m=5 must be even"),
        (lambda: dualpipe(4, 6), "m=6 must be a number of at least 8"),
        (lambda: dualpipe_v(2, 3), "m=3 must be a number of at least 4"),
        (lambda: dualpipe_v(0, 3), "p=0"),
        (lambda: dualpipe_pairs(2, 4, "loop"), "layout='loop'"),
        (lambda: simulate(dualpipe(2, 4)), "never finishes the backward of microbatch"),
        (
            lambda: simulate(one_f_one_b(2, 2), pairs=[{0}, set()]),
            r"rank 0 has \['F', 'F'\] at 0, not a forward and a backward",
        ),
    ],
)
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_microbatch_in_the_other_half_s_chunk_is_refused():
    schedule = dualpipe(2, 4)
    schedule[0] = [(kind, i, 0) for kind, i, _ in schedule[0]]
    with pytest.raises(ValueError, match="microbatch 2 in chunk 0, which is the other"):
        check(schedule, 4, BOTH)
