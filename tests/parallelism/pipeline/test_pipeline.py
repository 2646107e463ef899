"""The executor: for every schedule the training of one process, in threads and
processes; nothing left behind.
"""

from __future__ import annotations

import gc
import hashlib

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism import DeadlockError, World, launch
from llmlab.parallelism.pipeline import dualpipe, dualpipe_v
from llmlab.parallelism.pipeline.pipeline import (
    IGNORED,
    Pipeline,
    clip_grad_norm,
    loss_shares,
)
from llmlab.parallelism.pipeline.schedules import (
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    zb_h1,
    zb_h2,
    zb_v,
)
from llmlab.parallelism.pipeline.stages import layer_ranges, split
from llmlab.parallelism.pipeline.timeline import Costs, simulate
from tests.covering import each_value
from tests.parallelism.conftest import tiny

CASES = {  # schedule: (its function, chunks, layout)
    "naive": (naive, 1, "loop"),
    "gpipe": (gpipe, 1, "loop"),
    "1f1b": (one_f_one_b, 1, "loop"),
    "interleaved": (interleaved, 2, "loop"),
    "zb-h1": (zb_h1, 1, "loop"),
    "zb-h2": (zb_h2, 1, "loop"),
    "zb-v": (zb_v, 2, "v"),
}
# these want 2p microbatches, and "dualpipe" an even number of ranks, too
DUAL = {
    "dualpipe": (dualpipe, 2, "bidirectional"),
    "dualpipe-v": (dualpipe_v, 2, "v"),
}
EVERY = CASES | DUAL
# of every case, uneven stages: one layer more than there are stages; interleaved needs
# a multiple of p microbatches, and zb-h2 holds 2p − 1 of them
MICROBATCHES = {1: 3, 2: 4, 3: 6, 4: 4, 6: 6}  # of each number of ranks
STEPS = 2  # the second step's loss and the weights at the end show both updates
LIMIT = 0.2
REFERENCES: dict[tuple, tuple] = {}
# its usual 1e-8 blows up the rounding where a gradient is all but 0 (a key's bias)
ADAM = {"lr": 0.02, "eps": 1e-5}


def microbatches(m, lengths=(8, 5, 3), ignored=0):
    """m microbatches of different lengths; of each, `ignored` times its number of
    targets do not count.
    """
    generator, found = torch.Generator().manual_seed(3), []
    for i in range(m):
        tokens = torch.randint(
            37, (2, lengths[i % len(lengths)] + 1), generator=generator
        )
        targets = tokens[:, 1:].clone()
        targets.flatten()[: min(i * ignored, targets.numel())] = IGNORED
        found.append((tokens[:, :-1], targets))
    return found


def whole_loss(model, batch, weighting):
    """Written without the executor's helper: the mean of means, or the mean over all
    tokens.
    """
    logits = [model(x).flatten(0, 1) for x, _ in batch]
    targets = [y.flatten() for _, y in batch]
    if weighting == "token":
        return F.cross_entropy(
            torch.cat(logits), torch.cat(targets), ignore_index=IGNORED
        )
    means = [
        F.cross_entropy(z, y, ignore_index=IGNORED)
        for z, y in zip(logits, targets, strict=True)
    ]
    return torch.stack([mean for mean in means if not mean.isnan()]).sum() / len(batch)


def whole_training(model, batch, weighting="microbatch"):
    optimizer, found = torch.optim.AdamW(model.parameters(), **ADAM), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = whole_loss(model, batch, weighting)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def pipeline(comm, model, case, **options):
    _, v, layout = EVERY[case]
    stages = split(
        model,
        comm.rank,
        comm.size,
        v,
        layers=options.pop("layers", None),
        layout=layout,
    )
    return Pipeline(stages, comm, layout=layout, **options)


def piped_training(comm, model, case, batch, weighting="microbatch", layers=None):
    pipe = pipeline(comm, model, case, layers=layers)
    optimizer, found = torch.optim.AdamW(pipe.parameters(), **ADAM), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = pipe.step(EVERY[case][0](comm.size, len(batch)), batch, weighting)
        norm = clip_grad_norm(pipe, LIMIT)
        optimizer.step()
        found.append((loss, norm))
    return found, pipe.state_dict()


def reference(model, batch, weighting):
    """(losses and norms, state at the end) of one process, once for all schedules."""
    parts = [
        *model.state_dict().values(),
        *[tensor for pair in batch for tensor in pair],
    ]
    digest = hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for tensor in parts)
    ).hexdigest()
    key = (str(model.config), digest, weighting)
    if key not in REFERENCES:
        found = whole_training(model, batch, weighting)
        REFERENCES[key] = found, model.state_dict()
    return REFERENCES[key]


def assert_same_training(results, model, batch, weighting="microbatch"):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected, end = reference(model, batch, weighting)
    for found, state in results:
        # losses and norms, on every rank
        assert found == [pytest.approx(pair, abs=1e-5) for pair in expected]
        for name, value in state.items():
            torch.testing.assert_close(
                value, end[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert {name for _, state in results for name in state} == set(start)
    moved = {name: (end[name] - value).abs().max() for name, value in start.items()}
    assert all(
        by > 0.01 for name, by in moved.items() if not name.endswith("k_proj.bias")
    ), "steps too small"
    assert expected[0][1] > LIMIT, "the clipping must clip"


def uneven(case, p, tied=True):
    """A model of one layer more than the case has stages, so that these are uneven."""
    stages = p * EVERY[case][1]
    return tiny(num_hidden_layers=stages + 1, tie_word_embeddings=tied)


# Each schedule on three ranks, tied, and on two, untied, with one collective less; one,
# four and six ranks with some.
TRAININGS = [(case, p, tied) for case in CASES for p, tied in ((3, True), (2, False))]
TRAININGS += each_value(list(CASES), [4, 6, 1], [True, False])


@pytest.mark.parametrize(
    ("case", "p", "tied"),
    TRAININGS,
    ids=[f"{case}-{p}-{'tied' if tied else 'untied'}" for case, p, tied in TRAININGS],
)
def test_training_is_that_of_one_process(case, p, tied):
    """Two AdamW steps with clipping: losses, norms and all weights."""
    model, batch = uneven(case, p, tied), microbatches(MICROBATCHES[p])
    assert_same_training(World(p).run(piped_training, model, case, batch), model, batch)


@pytest.mark.parametrize(
    ("case", "p"), each_value(["1f1b", "interleaved", "zb-h2", "zb-v"], [2, 4])
)
def test_training_in_real_processes(case, p):
    model, batch = uneven(case, p), microbatches(4)
    assert_same_training(
        launch(piped_training, p, model, case, batch, timeout=120), model, batch
    )


@pytest.mark.parametrize("weighting", ["microbatch", "token"])
@pytest.mark.parametrize("case", ["gpipe", "zb-h1"])
def test_weighting_with_targets_that_do_not_count(case, weighting):
    """Unequal lengths and masks; the last microbatch has no target at all."""
    model, batch = tiny(num_hidden_layers=3), microbatches(6, ignored=3)
    assert (batch[-1][1] == IGNORED).sum() > 0
    batch[-1][1][:] = IGNORED
    assert_same_training(
        World(3).run(piped_training, model, case, batch, weighting),
        model,
        batch,
        weighting,
    )


def test_the_two_weightings_differ():
    model, batch = tiny(), microbatches(3)
    assert (
        abs(whole_loss(model, batch, "token") - whole_loss(model, batch, "microbatch"))
        > 1e-3
    )
    shares = loss_shares([y for _, y in batch], "token")
    assert sum(
        s * y.numel() for s, (_, y) in zip(shares, batch, strict=True)
    ) == pytest.approx(1)


@pytest.mark.parametrize(
    ("case", "p", "layers", "tied"),
    [
        ("1f1b", 3, [1, 4, 2], False),
        # the ends have the embedding and the head only
        ("zb-h1", 4, [0, 5, 2, 0], True),
        ("interleaved", 2, [1, 3, 0, 3], True),
        ("zb-v", 2, [2, 0, 4, 1], False),
    ],
)
def test_stages_of_any_size(case, p, layers, tied):
    model, batch = tiny(num_hidden_layers=7, tie_word_embeddings=tied), microbatches(4)
    results = World(p).run(piped_training, model, case, batch, "microbatch", layers)
    assert_same_training(results, model, batch)


@pytest.mark.parametrize(
    ("case", "m"), each_value(["gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v"], [1, 2, 3])
)
def test_fewer_microbatches_than_ranks(case, m):
    model, batch = uneven(case, 4), microbatches(m)
    assert_same_training(World(4).run(piped_training, model, case, batch), model, batch)


@pytest.mark.parametrize("case", ["1f1b", "zb-h2"])
def test_biases(case):
    model = tiny(
        num_hidden_layers=3, num_key_value_heads=8, attention_bias=True, mlp_bias=True
    )
    batch = microbatches(4)
    assert_same_training(World(3).run(piped_training, model, case, batch), model, batch)


@pytest.mark.parametrize("case", CASES)
def test_gradients_add_up_over_steps(case):
    """Two steps without zero_grad: twice the gradient, also of the tied matrix that two
    ranks add up.
    """
    model, batch = tiny(num_hidden_layers=4, tie_word_embeddings=True), microbatches(4)

    def fn(comm, model):
        pipe = pipeline(comm, model, case)
        found = []
        for _ in range(2):
            pipe.step(CASES[case][0](comm.size, 4), batch)
            named = {n: w for stage in pipe.stages for n, w in stage.named_parameters()}
            found.append({name: w.grad.clone() for name, w in named.items()})
        return found

    results = World(2).run(fn, model)
    whole_loss(model, batch, "microbatch").backward()
    expected = {name: w.grad for name, w in model.named_parameters()}
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for once, twice in results:
        for name in once:
            torch.testing.assert_close(once[name], expected[name], atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(
                twice[name], 2 * expected[name], atol=2e-6, rtol=1e-4
            )


def test_tied_copies_stay_equal():
    model, batch = tiny(num_hidden_layers=3, tie_word_embeddings=True), microbatches(4)
    states = [state for _, state in World(3).run(piped_training, model, "1f1b", batch)]
    assert torch.equal(
        states[0]["model.embed_tokens.weight"], states[2]["lm_head.weight"]
    )
    assert (
        "lm_head.weight" not in states[0]
        and "model.embed_tokens.weight" not in states[2]
    )


def test_each_rank_holds_its_layers_only():
    names = World(2).run(
        lambda comm, m: list(pipeline(comm, m, "zb-v").state_dict()),
        tiny(num_hidden_layers=4),
    )
    layers = [
        sorted({name.split(".")[2] for name in rank if ".layers." in name})
        for rank in names
    ]
    assert layers == [["0", "3"], ["1", "2"]]
    assert (
        "model.embed_tokens.weight" in names[0]
        and "lm_head.weight" in names[0]
        and "lm_head.weight" not in names[1]
    )


@pytest.mark.parametrize("case", CASES)
def test_the_clock_of_world_is_that_of_the_simulator(case):
    """The executor with `comm.work` after each op: the ledger's work, the bars of
    `simulate`, and the schedule's order.
    """
    p, m, costs = 3, 6, Costs(1.0, 1.5, 0.75)
    make, v, layout = CASES[case]
    model = tiny(num_hidden_layers=6)

    def fn(comm, model):
        def work(kind, i, c):
            return comm.work(getattr(costs, kind) / v, f"{kind} {i} {c}")

        pipe = pipeline(comm, model, case, after_op=work)
        pipe.step(make(p, m), microbatches(m))
        return [(bar.kind, bar.microbatch, bar.chunk) for bar in pipe.bars]

    world = World(p)
    assert world.run(fn, model) == make(p, m)
    simulated = simulate(make(p, m), costs, layout)
    for r in range(p):
        ours = [(e.label, e.start, e.end) for e in world.ledger.events("work", rank=r)]
        theirs = [
            (f"{b.kind} {b.microbatch} {b.chunk}", b.start, b.end)
            for b in simulated.bars
            if b.rank == r
        ]
        assert ours == [
            (
                pytest.approx(bar)
                if not isinstance(bar[0], str)
                else (bar[0], *map(pytest.approx, bar[1:]))
            )
            for bar in theirs
        ]


@pytest.mark.parametrize(
    ("case", "boundaries"),
    [("gpipe", 2), ("1f1b", 2), ("zb-h1", 2), ("interleaved", 5), ("zb-v", 4)],
)
def test_what_is_sent(case, boundaries):
    """One hidden state forward and one gradient back for each microbatch and each
    boundary between ranks.
    """
    p, m = 3, 6
    make = CASES[case][0]
    world = World(p)
    world.run(
        lambda comm, model: pipeline(comm, model, case).step(
            make(p, m), microbatches(m, (8,))
        ),
        tiny(num_hidden_layers=6),
    )
    assert world.ledger.bytes("send") == boundaries * 2 * m * (2 * 8 * 24 * 4)
    assert world.ledger.count("send") == boundaries * 2 * m


@pytest.fixture
def only_new_objects():
    """`gc.get_objects` sees what is made from here on."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_after_a_step(case, only_new_objects):
    """The second and third step leave no tensor more than the first has."""
    make = CASES[case][0]

    def alive():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    def fn(comm, model):
        pipe, counts = pipeline(comm, model, case), []
        for _ in range(3):
            pipe.step(make(comm.size, 4), microbatches(4))
            comm.barrier()
            counts.append(alive())
            comm.barrier()
        assert not any(w.grad.requires_grad for w in pipe.parameters())
        return counts, [len(left.take()[0]) for left in pipe.weight_gradients]

    for counts, late in World(2).run(
        fn, tiny(num_hidden_layers=4, tie_word_embeddings=True)
    ):
        assert counts[0] == counts[1] == counts[2] > 0 and not any(late)


@pytest.mark.parametrize("case", ["zb-h1", "zb-v", "1f1b"])
def test_weights_wait_for_their_op(case):
    """The gradients of a chunk's linears change in its W (or B), and in no other op."""
    make = CASES[case][0]

    def fn(comm, model):
        seen, wrong = {}, []

        def look(kind, i, chunk):
            for c, stage in enumerate(pipe.stages):
                weight = next(
                    w for name, w in stage.named_parameters() if "q_proj" in name
                )
                now = 0.0 if weight.grad is None else weight.grad.abs().sum().item()
                if (now != seen.get(c, 0.0)) != (kind in "WB" and c == chunk):
                    wrong.append((kind, i, chunk))
                seen[c] = now

        pipe = pipeline(comm, model, case, after_op=look)
        pipe.step(make(comm.size, 4), microbatches(4))
        return wrong

    assert World(2).run(fn, tiny(num_hidden_layers=4)) == [[], []]


def test_finished_microbatches_are_let_go():
    """The hidden states that rank 0 keeps, for their backward or because they were
    sent, do not grow with m under 1F1B.
    """

    def fn(comm, model, make, m):
        most = [0]

        def look(kind, i, chunk):
            shapes = [
                x.shape for x in gc.get_objects() if issubclass(type(x), torch.Tensor)
            ]
            most[0] = max(most[0], shapes.count((2, 8, 24)))

        pipe, batch = (
            pipeline(comm, model, "1f1b", after_op=look),
            microbatches(m, (8,)),
        )
        gc.collect()
        gc.freeze()
        pipe.step(make(comm.size, m), batch)
        return most[0]

    def kept(make, m):
        return launch(fn, 2, tiny(), make, m)[0]

    assert kept(one_f_one_b, 4) == kept(one_f_one_b, 10) > 0
    assert kept(gpipe, 10) >= kept(gpipe, 4) + 6, "the count must see what grows"


def test_schedules_that_do_not_fit():
    def fn(comm, model, schedule, m):
        return pipeline(comm, model, "1f1b").step(schedule, microbatches(m))

    for schedule, m, says in (
        (
            one_f_one_b(3, 4),
            4,
            "schedule is for 3 ranks of 1 chunks, the pipeline has 2 of 1",
        ),
        (interleaved(2, 4), 4, "2 ranks of 2 chunks"),
        (one_f_one_b(2, 3), 4, "never finishes the backward of microbatch 3"),
        (one_f_one_b(2, 5), 4, "is no op for m=4"),
    ):
        with pytest.raises(ValueError, match=says):
            World(2).run(fn, tiny(), schedule, m)
    crossed = [
        [("F", 0, 0), ("B", 0, 0), ("F", 1, 0), ("B", 1, 0)],
        [("F", 0, 0), ("F", 1, 0), ("B", 0, 0), ("B", 1, 0)],
    ]
    with pytest.raises(DeadlockError):
        World(2).run(fn, tiny(), crossed, 2)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="weighting='sum'"):
        loss_shares([], "sum")
    with pytest.raises(ValueError, match="2 layers cannot be dealt to 3 stages"):
        layer_ranges(2, 3)
    for layers in ([1, 1], [1, 1, 1], [3, -1, 0]):
        with pytest.raises(ValueError, match="3 numbers, 0 or more, that add up to 2"):
            layer_ranges(2, 3, layers)
    assert layer_ranges(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
