"""Schedules: what is accepted computes the same, what is refused is named."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from llmlab.compilers.back_end import interpret, machine, programs
from llmlab.compilers.back_end.dependence import Access, may_meet
from llmlab.compilers.back_end.ir import (
    Affine,
    Buffer,
    Load,
    Loop,
    Number,
    Program,
    Store,
    affine,
    var,
    walk,
)
from llmlab.compilers.back_end.schedule import NotLegal, apply
from llmlab.compilers.front_end import capture
from llmlab.compilers.program import attention_row, mlp
from tests.compilers.back_end.programs import (
    captured,
    random_schedule,
    recurrence,
    small_programs,
    three_steps,
)


def outputs(program: Program, inputs, seed: int = 0) -> torch.Tensor:
    return torch.cat([x.flatten() for x in interpret.run(program, *inputs, seed=seed)])


def test_indices_are_arithmetic():
    index = var("i") * 3 + var("j") + 2
    assert str(index) == "3*i + j + 2"
    assert index.put("i", var("i") * 4 + var("k")) == affine(
        {"i": 12, "k": 3, "j": 1}, 2
    )
    assert index.value({"i": 2, "j": 1}) == 9
    assert index - index == Affine()


@pytest.mark.parametrize("directions", ["=", "<", ">"])
def test_the_test_of_dependence_never_misses_a_pair(directions):
    """By enumeration: where two iterations meet, `may_meet` says that they may."""
    draw = random.Random(1)
    exact = 0
    for _ in range(150):
        n, m = draw.randint(1, 4), draw.randint(1, 4)
        loops = (Loop("i", n, ()), Loop("j", m, ()))
        indices = [
            affine(
                {"i": draw.randint(-2, 3), "j": draw.randint(-2, 3)},
                draw.randint(-3, 3),
            )
            for _ in range(2)
        ]
        a, b = (Access("C", (index,), "=", loops) for index in indices)
        space = list(itertools.product(range(n), range(m)))
        compare = {
            "=": lambda x, y: x == y,
            "<": lambda x, y: x < y,
            ">": lambda x, y: x > y,
        }
        met = any(
            compare[directions](x[0], y[0])
            and indices[0].value(dict(zip("ij", x, strict=True)))
            == indices[1].value(dict(zip("ij", y, strict=True)))
            for x, y in itertools.product(space, space)
        )
        said = may_meet(a, b, {"i": directions})
        assert said or not met
        exact += said == met
    assert exact > 110  # and it is seldom too careful


@pytest.mark.parametrize("which", range(len(small_programs())))
def test_random_schedules_compute_the_same(which):
    """Whatever is accepted, in every order that it allows."""
    program = small_programs()[which]
    inputs = interpret.random_inputs(program)
    wanted = outputs(program, inputs)
    draw = random.Random(which)
    accepted = rejected = 0
    for seed in range(12):
        scheduled, taken, refused = random_schedule(program, draw)
        found = outputs(scheduled, inputs, seed)
        assert torch.allclose(found, wanted, atol=1e-4), taken
        accepted += len(taken)
        rejected += refused
    assert accepted > 30
    assert rejected > 30


@pytest.mark.parametrize(
    ("di", "dj", "legal"), [(1, 1, True), (1, 0, True), (0, 1, True), (1, -1, False)]
)
def test_two_loops_may_be_swapped_unless_a_dependence_turns_round(di, dj, legal):
    program = recurrence(di=di, dj=dj)
    if legal:
        inputs = interpret.random_inputs(program)
        swapped = apply(program, [("reorder", "j", "i")])
        assert torch.equal(outputs(swapped, inputs), outputs(program, inputs))
    else:
        with pytest.raises(NotLegal, match="a later i and an earlier j"):
            apply(program, [("reorder", "j", "i")])


REFUSED = {
    "tiles of nothing": (("tile", "i", 0), "size=0 must be a whole number"),
    "no such loop": (("tile", "x", 2), "loop='x' must be one of"),
    "no such step": (("split", "i", 2), "'split' must be one of"),
    "lanes that add to one element": (("vectorise", "k"), "lanes would meet: C"),
    "threads that add to one element": (("parallel", "k"), "threads would meet: C"),
    "lanes of a loop with loops": (("vectorise", "i"), "only an innermost loop"),
    "a loop that is not inside": (("reorder", "i", "k"), "j stands between them"),
    "loops of two nests": (("reorder", "zi", "k"), "k does not stand inside zi"),
    "one loop": (("reorder", "i"), "two or more, each once"),
    "loops far apart": (("merge", "zi", "k"), "do not stand in the same loop"),
    "an output": (("inline", "C"), "C is an output"),
    "what is not touched": (("pack", "A", "zi"), "A is not touched in zi"),
    "a sum that moves": (("partial_sums", "k", "k"), "must be a loop around k"),
    "an order of too few": (("pack", "B", "j", (0,)), "order=(0,) must name each of 2"),
    "a loop to after itself": (("move", "zi", "i"), "does not come before zi"),
    "nothing ahead": (("prefetch", "A", 0), "elements=0 must be a whole number"),
    "too few arguments": (("tile", "i"), "size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    step, words = REFUSED[case]
    with pytest.raises(NotLegal) as refusal:
        apply(programs.matmul(4, 8, 8), [step])
    assert words in str(refusal.value) and "step 1" in str(refusal.value)


def test_merging_never_reads_what_is_not_there_yet():
    program = three_steps(6, 6)
    with pytest.raises(NotLegal, match="would come too early"):
        apply(program, [("move", "p", "i")])
    rows = [("merge", "i", "r"), ("merge", "i", "p")]
    inputs = interpret.random_inputs(program)
    found = outputs(apply(program, rows), inputs)
    torch.testing.assert_close(found, outputs(program, inputs))
    # the transpose reads a column, which the first row does not have yet
    with pytest.raises(NotLegal, match="would come too early"):
        apply(program, [*rows, ("merge", "i", "u")])


def test_a_partial_sum_may_be_lanes():
    program = programs.matmul(3, 8, 5)
    steps = [("tile", "k", 4), ("partial_sums", "k_i", "j"), ("vectorise", "k_i")]
    inputs = interpret.random_inputs(program)
    found = outputs(apply(program, steps), inputs)
    torch.testing.assert_close(found, (inputs[0] @ inputs[1]).flatten())
    with pytest.raises(NotLegal, match="lanes would meet"):
        apply(program, [steps[0], steps[2]])


@pytest.mark.parametrize("step", [("pack", "B", "j"), ("cache", "C", "j")])
def test_lanes_share_no_copy(step):
    program = apply(programs.matmul(3, 4, 8), [("reorder", "i", "k", "j")])
    with pytest.raises(NotLegal, match="each lane would need a copy"):
        apply(program, [("vectorise", "j"), step])


def test_a_copy_of_one_element_is_done_away_with():
    program = programs.from_graph(capture(torch.neg, torch.ones(1)))
    steps = [("pack", "in0", ""), ("inline", "in0_all")]
    assert str(apply(program, steps)) == str(program)
    assert outputs(apply(program, steps), [torch.ones(1)]).tolist() == [-1.0]


def test_an_index_outside_is_an_error():
    store = Store("C", (var("i") + 1,), Number(1.0))
    program = Program(
        "outside", (Buffer("C", (4,), role="output"),), (Loop("i", 4, (store,)),)
    )
    with pytest.raises(interpret.OutOfBounds, match=r"C\[4\] of shape \(4,\)"):
        interpret.run(program)
    reads = replace(store, index=(var("i"),), value=Load("C", (var("i"),)))
    program = replace(program, body=(Loop("i", 4, (reads,)),))
    with pytest.raises(interpret.NotWritten):
        interpret.run(program)


@pytest.mark.parametrize("lanes", [machine.AVX512, machine.AVX2, machine.NEON])
@pytest.mark.parametrize("sizes", [(7, 3, 5), (14, 2, 32), (9, 4, 37)])
def test_the_best_schedule_on_shapes_that_do_not_divide(lanes, sizes):
    program = programs.matmul(*sizes)
    inputs = interpret.random_inputs(program)
    found = outputs(apply(program, machine.best_schedule(lanes)), inputs)
    torch.testing.assert_close(found, (inputs[0] @ inputs[1]).flatten())


def test_the_two_functions_of_the_part():
    program, inputs = captured("mlp", T=5, d=3, f=9)
    scheduled = apply(program, machine.mlp_schedule(program, machine.AVX2))
    assert [b.name for b in scheduled.buffers if b.role == "temporary"] == [
        "in1_zj0_o",
        "t0_zi0_o",
    ]
    torch.testing.assert_close(interpret.run(scheduled, *inputs)[0], mlp(*inputs))
    program, inputs = captured("attention_row", T=11, d=16)
    scheduled = apply(program, machine.attention_schedule(machine.AVX2))
    found = interpret.run(scheduled, *inputs)[0]
    torch.testing.assert_close(found, attention_row(*inputs))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.sum(0, keepdim=True), (2, 1)),  # the result is one number
        (lambda x: x.amax(1, keepdim=True) * x, (1, 3)),
        (lambda x: (-x, x.exp(), x * 2), (3,)),  # outputs in the order returned
        (lambda x: (x.exp(), -x)[::-1], (3,)),
        (lambda x: x * 2 + 1, (1, 2, 1, 3, 1, 2, 2)),
    ],
)
def test_graphs_of_odd_forms(function, shape):
    x = torch.randn(shape)
    program = programs.from_graph(capture(function, x))
    wanted = function(x)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for found, right in zip(interpret.run(program, x), wanted, strict=True):
        torch.testing.assert_close(found, right)


def test_graphs_without_loops_are_refused_in_words():
    x = torch.ones((2,) * 14)
    for function, words in (
        (lambda x: x + 1, "13 dimensions at most"),
        (lambda x: (y := x.exp(), y), "returned twice"),
    ):
        with pytest.raises(programs.NotLowered, match=words):
            programs.from_graph(capture(function, x))


def test_the_interpreter_divides_by_0_as_processors_do():
    x = torch.tensor([0.0, -1.0, 4.0, math.inf, math.nan])
    for function in (
        lambda x: 1 / x,
        lambda x: x / x,
        lambda x: x.sqrt(),
        lambda x: x.amax(0, keepdim=True),
    ):
        program = programs.from_graph(capture(function, x))
        (found,) = interpret.run(program, x)
        torch.testing.assert_close(found, function(x), equal_nan=True)


def is_vector(node) -> bool:
    return isinstance(node, Loop) and node.kind == "vector"


@pytest.mark.parametrize("group", [64, 128])
def test_the_4_bit_product_is_that_of_part_06(group):
    """Codes in the layout of part 06: byte j has code j and code j + group / 2."""
    torch.manual_seed(0)
    rows, columns = 2, 2 * group
    codes = torch.randint(0, 16, (rows, columns // group, 2, group // 2))
    packed = (codes[:, :, 0] | codes[:, :, 1] << 4).to(torch.uint8)
    scale, x = torch.rand(rows, columns // group), torch.randn(columns)
    x[: group // 2] *= 1000  # a group with a step of its own
    w = (scale[:, :, None] * (codes.flatten(2) - 8)).double()
    wanted = w.flatten(1) @ x.double()
    program = programs.matvec_4bit(rows, columns, group, streams=2)
    words = programs.words(packed).view(2, 1, 2, -1)
    inputs = (words, scale.view(2, 1, 2), x)
    # half a step for each number of x, and what float32 loses
    step = x.view(-1, group).abs().amax(1, keepdim=True) / 32767
    most = (w.view(rows, -1, group).abs() * step * 0.5).sum((1, 2))
    most += 1e-6 * (w.abs().flatten(1) @ x.abs().double())
    for each in (None, machine.AVX512, machine.AVX2, machine.SSE):
        steps = machine.matvec_schedule(group, each) if each else []
        scheduled = apply(program, steps)
        assert ((outputs(scheduled, inputs) - wanted).abs() <= most).all()
        if each:  # no lane is left over
            lanes = min(each.lanes, group // 8)
            vectors = [node for node, _ in walk(scheduled.body) if is_vector(node)]
            assert {(node.extent, node.limits) for node in vectors} == {(lanes, ())}
    whole = torch.randint(-32767, 32768, (columns // group, group)).float()
    whole[:, 3] = 32767  # the step is 1: nothing is rounded
    found = outputs(program, (*inputs[:2], whole.flatten()))
    wanted = (w.flatten(1) @ whole.double().flatten()).float()
    torch.testing.assert_close(found, wanted, rtol=3e-6, atol=0.1)
    zeros = outputs(program, (*inputs[:2], torch.zeros(columns)))
    assert torch.equal(zeros, torch.zeros(rows))
    for sizes, words in (((4, 100, 64), "group=64"), ((3, 64, 64, 2), "streams=2")):
        with pytest.raises(ValueError, match=words):
            programs.matvec_4bit(*sizes)


@pytest.mark.parametrize(("away", "legal"), [(0, True), (1, True), (2, False)])
def test_a_merged_reader_may_look_back_and_not_ahead(away, legal):
    """t[i + 1] is written; then t[i + away] is read."""
    buffers = (
        Buffer("A", (8,)),
        Buffer("t", (10,), role="temporary"),
        Buffer("C", (8,), role="output"),
    )
    first = Store("t", (var("f"),), Number(0.0))
    write = Store("t", (var("i") + 1,), Load("A", (var("i"),)))
    read = Store("C", (var("j"),), Load("t", (var("j") + away,)))
    loops = (Loop("f", 10, (first,)), Loop("i", 8, (write,)), Loop("j", 8, (read,)))
    program = Program("looks", buffers, loops)
    if not legal:
        with pytest.raises(NotLegal, match="would come too early"):
            apply(program, [("merge", "i", "j")])
        return
    inputs = interpret.random_inputs(program)
    found = outputs(apply(program, [("merge", "i", "j")]), inputs)
    assert torch.equal(found, outputs(program, inputs))
