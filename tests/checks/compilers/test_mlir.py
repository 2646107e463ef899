"""Wrong answers to 08-compilers/05-mlir, each with its diagnosis."""

from __future__ import annotations

import torch
from xdsl.rewriter import InsertPoint

from llmlab.checks.compilers import mlir as checks
from llmlab.checks.compilers.mlir import check
from llmlab.compilers import mlir
from llmlab.compilers.mlir import dialect as lab
from llmlab.compilers.mlir import ssa
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
    told_apart,
)

SLUG = "08-compilers/05-mlir"

# Right, written otherwise ------------------------------------------------------------


def idoms_by_sets(successors, order):
    doms = {block: set(order) for block in order}
    doms[order[0]] = {order[0]}
    for _ in order:
        for block in order[1:]:
            before = [doms[b] for b in order if block in successors[b]]
            doms[block] = {block} | set.intersection(*before)
    return {
        block: max(doms[block] - {block} or {block}, key=lambda a: len(doms[a]))
        for block in order
    }


def problem_by_the_package(function):
    kinds = [problem.kind for problem in ssa.verify(function)]
    for kind in ("terminator", "arguments", "type", "dominance"):
        if kind in kinds:
            return kind
    return ""


def problem_by_paths(function):
    """A use is fine if it cannot be reached without its definition."""
    found = problem_by_the_package(function)
    if found != "dominance" and found:
        return found
    idom = ssa.immediate_dominators(function)
    for block in idom:
        for i, op in enumerate(block.ops):
            for value in op.reads:
                if not defined(function, value, block, i):
                    return "dominance"
    return ""


def defined(function, value, use_block, use_place):
    waiting, seen = [function.blocks[0]], set()
    while waiting:
        block = waiting.pop()
        if block in seen:
            continue
        seen.add(block)
        stop = value in block.arguments
        for i, op in enumerate(block.ops):
            if stop:
                break
            if block is use_block and i == use_place:
                return False
            stop = op.result is value
        if not stop:
            waiting += block.successors
    return True


def transposes_by_index(op, rewriter):
    inner = op.x.owner
    source = op.x
    order = list(op.dims)
    if isinstance(inner, lab.TransposeOp):
        source = inner.x
        order = [inner.dims[i] for i in order]
    elif order != sorted(order):
        return False
    if order == sorted(order):
        rewriter.replace(op, [], [source])
    else:
        rewriter.replace(op, [lab.TransposeOp.make(source, order=lab.dims(*order))])
    return True


def transposes_by_insertion(op, rewriter):
    if list(op.dims) == sorted(op.dims):
        op.result.replace_all_uses_with(op.x)
        rewriter.erase(op)
        return True
    if not isinstance(op.x.owner, lab.TransposeOp):
        return False
    inner = op.x.owner
    new = lab.TransposeOp.make(
        inner.x, order=lab.dims(*map(inner.dims.__getitem__, op.dims))
    )
    rewriter.insert(new)
    rewriter.replace(op, [], [new.result])
    return True


def norm(
    square=lambda w, x: w.mul(x, x),
    finish=lambda w, x, total, gain, n, eps: w.mul(
        gain,
        w.div(x, w.sqrt(w.add(w.mul(total, w.number(1 / n)), w.number(eps)))),
    ),
    dim=None,
):
    """rms_norm, with one thing changed."""

    def way(build, x, gain, eps):
        shape = x.type.get_shape()
        axis = len(shape) - 1 if dim is None else dim
        total = build.along(x, axis, 0.0, lambda w, v, s: w.add(s, square(w, v)))
        inputs = [x, total, gain]
        maps = [mlir.broadcast_map(v.type.get_shape(), shape) for v in [*inputs, x]]
        return build.generic(
            inputs,
            maps,
            build.empty(*shape),
            lambda w, v, s, g, _: finish(w, v, s, g, shape[-1], eps),
        )

    return way


def root(w, total, n, eps):
    return w.sqrt(w.add(w.div(total, w.number(float(n))), w.number(eps)))


def norm_gain_last(build, x, gain, eps):
    return norm(finish=lambda w, x, s, g, n, e: w.div(w.mul(x, g), root(w, s, n, e)))(
        build, x, gain, eps
    )


def norm_with_a_reduction_by_hand(build, x, gain, eps):
    shape = x.type.get_shape()
    r = len(shape)
    maps = [mlir.map_of(r, *range(r)), mlir.map_of(r, *range(r - 1), None)]
    zero = build.filled(0.0, *shape[:-1], 1)
    total = build.generic(
        [x], maps, zero, lambda w, v, s: w.add(w.mul(v, v), s), reduced=[r - 1]
    )
    inverse = build.generic(
        [],
        [mlir.map_of(r, *range(r))],
        total,
        lambda w, s: w.div(w.number(1.0), root(w, s, shape[-1], eps)),
    )
    inputs = [inverse, gain, x]
    maps = [mlir.broadcast_map(v.type.get_shape(), shape) for v in [*inputs, x]]
    return build.generic(
        inputs,
        maps,
        build.empty(*shape),
        lambda w, i, g, v, _: w.mul(w.mul(v, i), g),
    )


RIGHT = {
    "idoms": (idoms_by_sets, checks.climbing()),
    "first_problem": (problem_by_the_package, problem_by_paths),
    "fold_transposes": (transposes_by_index, transposes_by_insertion),
    "rms_norm": (norm_gain_last, norm_with_a_reduction_by_hand, norm(dim=-1)),
}


test_right_answers_written_otherwise = accepts(check, RIGHT, seeds=(0, 2))


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "idoms": ByCases(
        checks.run_idoms,
        checks.right_idoms,
        checks.wrong_idoms,
        checks.GRAPHS,
    ),
    "first_problem": ByCases(
        checks.run_problem,
        problem_by_the_package,
        checks.wrong_problems,
        checks.problem_cases,
    ),
    "fold_transposes": ByCases(
        checks.run_transposes,
        checks.folding(),
        checks.wrong_transposes,
        checks.transpose_cases,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def test_the_mistakes_of_a_norm_differ():
    x, gain = torch.randn(3, 6) + 0.5, torch.randn(6)
    right = checks.normed(x, gain, 0.5)
    found = {"right": right, **checks.wrong_norms(x, gain, 0.5)}
    told_apart(
        lambda words: [round(v, 3) for v in found[words].flatten().tolist()],
        "right",
        {words: words for words in found if words != "right"},
    )


def idoms_as_list(successors, order):
    return list(checks.right_idoms(successors, order).values())


def idoms_of_everybody(successors, order):
    """Predecessors that nothing reaches have no place in the order."""
    place = {block: i for i, block in enumerate(order)}
    before = {block: [] for block in successors}
    for block, after in successors.items():
        for each in after:
            before[each].append(block)
    return {b: min(before[b] or [b], key=lambda each: place[each]) for b in order}


def problem_everywhere(function):
    """Blocks that nothing reaches are not left out."""
    if found := checks.verifying(kinds=checks.KINDS[:-1])(function):
        return found
    idom = ssa.immediate_dominators(function)
    home = {op.result: block for block in function.blocks for op in block.ops}
    home |= {value: block for block in function.blocks for value in block.arguments}
    for block in function.blocks:
        for value in {value for op in block.ops for value in op.reads}:
            if value not in home or not ssa.dominates(idom, home[value], block):
                return "dominance"
    return ""


def problem_as_bool(function):
    return problem_by_the_package(function) == ""


def never_ends(op, rewriter):
    new = lab.TransposeOp.make(op.x, order=op.order)
    rewriter.replace(op, new)
    return True


def put_in_and_left(op, rewriter):
    if list(op.dims) != sorted(op.dims):
        rewriter.insert(lab.TransposeOp.make(op.x, order=op.order))
        return True
    return False


def erases_the_inner(op, rewriter):
    inner = op.x.owner
    if isinstance(inner, lab.TransposeOp):
        order = lab.dims(*(inner.dims[dim] for dim in op.dims))
        rewriter.replace(op, lab.TransposeOp.make(inner.x, order=order))
        rewriter.erase(inner)
        return True
    return checks.folding()(op, rewriter)


def below_its_reader(op, rewriter):
    """The new operation is put at the end of the block."""
    inner = op.x.owner
    if not isinstance(inner, lab.TransposeOp):
        return checks.folding()(op, rewriter)
    order = lab.dims(*(inner.dims[dim] for dim in op.dims))
    new = lab.TransposeOp.make(inner.x, order=order)
    end = op.parent.last_op
    readers = [use.operation for use in op.result.uses]
    rewriter.insert(new, InsertPoint.before(end))
    rewriter.replace(op, [], [new.result])
    if readers[0] is end:
        rewriter.insert(late := lab.NegOp.make(new.result), InsertPoint.before(new))
        end.operands = [late.result, *end.operands[1:]]
    return True


def says_nothing(op, rewriter):
    checks.folding()(op, rewriter)


def always_says_yes(op, rewriter):
    checks.folding()(op, rewriter)
    return True


def norm_returns_none(build, x, gain, eps):
    norm()(build, x, gain, eps)


def norm_returns_sums(build, x, gain, eps):
    return build.along(x, len(x.type.get_shape()) - 1, 0.0, lambda w, v, s: w.add(v, s))


def norm_keeps_squares(build, x, gain, eps):
    shape = x.type.get_shape()
    whole = mlir.broadcast_map(shape, shape)
    squares = build.generic(
        [x], [whole, whole], build.empty(*shape), lambda w, v, _: w.mul(v, v)
    )
    total = build.along(squares, len(shape) - 1, 0.0, lambda w, v, s: w.add(v, s))
    inputs = [x, total, gain]
    maps = [mlir.broadcast_map(v.type.get_shape(), shape) for v in [*inputs, x]]
    return build.generic(
        inputs,
        maps,
        build.empty(*shape),
        lambda w, v, s, g, _: w.mul(g, w.div(v, root(w, s, shape[-1], eps))),
    )


def norm_of_two_steps(build, x, gain, eps):
    """Right numbers, with the root in an operation of its own."""
    shape = x.type.get_shape()
    row = (*shape[:-1], 1)
    total = build.along(
        x, len(shape) - 1, 0.0, lambda w, v, so_far: w.add(so_far, w.mul(v, v))
    )
    same = mlir.broadcast_map(row, row)
    roots = build.generic(
        [total],
        [same, same],
        build.empty(*row),
        lambda w, s, _: root(w, s, shape[-1], eps),
    )
    inputs = [x, roots, gain]
    maps = [mlir.broadcast_map(v.type.get_shape(), shape) for v in [*inputs, x]]
    return build.generic(
        inputs,
        maps,
        build.empty(*shape),
        lambda w, v, r, g, _: w.mul(g, w.div(v, r)),
    )


def norm_with_maps_exchanged(build, x, gain, eps):
    shape = x.type.get_shape()
    whole = mlir.broadcast_map(shape, shape)
    return build.generic(
        [x, gain],
        [whole, whole],
        build.empty(*shape),
        lambda w, v, g, _: w.mul(v, g),
    )


def along_dimension_one(build, x, gain, eps):
    n = x.type.get_shape()[1]
    return norm(
        finish=lambda w, x, s, g, _, e: w.mul(g, w.div(x, root(w, s, n, e))), dim=1
    )(build, x, gain, eps)


def with_a_number_of_python(w, x, s, g, n, e):
    return w.mul(g, w.div(x, w.sqrt(w.add(w.div(s, w.number(n)), e))))


def rows_counted(build, x, gain, eps):
    n = x.type.get_shape()[0]
    return norm(finish=lambda w, x, s, g, _, e: w.mul(g, w.div(x, root(w, s, n, e))))(
        build, x, gain, eps
    )


def eps_outside(w, x, s, g, n, e):
    r = w.sqrt(w.mul(s, w.number(1 / n)))
    return w.mul(g, w.div(x, w.add(r, w.number(e))))


def first_dimension(build, x, gain, eps):
    return norm(
        finish=lambda w, x, s, g, n, e: w.mul(g, w.div(x, root(w, s, 3, e))), dim=0
    )(build, x, gain, eps)


NORMS = {
    "eps was left out": norm(
        finish=lambda w, x, s, g, n, e: w.mul(g, w.div(x, root(w, s, n, 0.0)))
    ),
    "eps was added after the root": norm(finish=eps_outside),
    "the sum of squares was taken": norm(
        finish=lambda w, x, s, g, n, e: w.mul(g, w.div(x, root(w, s, 1, e)))
    ),
    "the root was left out": norm(
        finish=lambda w, x, s, g, n, e: w.mul(
            g, w.div(x, w.add(w.mul(s, w.number(1 / n)), w.number(e)))
        )
    ),
    "the gain was left out": norm(
        finish=lambda w, x, s, g, n, e: w.div(x, root(w, s, n, e))
    ),
    "the gain was added": norm(
        finish=lambda w, x, s, g, n, e: w.add(w.div(x, root(w, s, n, e)), g)
    ),
    "x was multiplied by the root": norm(
        finish=lambda w, x, s, g, n, e: w.mul(w.mul(g, x), root(w, s, n, e))
    ),
    "x was left out": norm(finish=lambda w, x, s, g, n, e: w.div(g, root(w, s, n, e))),
}


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("idoms", idoms_as_list, "return a dict"),
        Wrong("idoms", idoms_of_everybody, "Nothing reaches this block"),
        Wrong(
            "first_problem", problem_everywhere, "only the blocks that can be reached"
        ),
        Wrong("first_problem", problem_as_bool, "return a string"),
        Wrong("fold_transposes", never_ends, "never ends"),
        Wrong("fold_transposes", put_in_and_left, "never ends"),
        Wrong("fold_transposes", erases_the_inner, "still has uses"),
        Wrong("fold_transposes", below_its_reader, "stands below it"),
        Wrong("fold_transposes", says_nothing, "returned None: True if"),
        Wrong("fold_transposes", always_says_yes, "the program was not changed"),
        *(Wrong("rms_norm", answer, words) for words, answer in NORMS.items()),
        Wrong("rms_norm", norm(finish=with_a_number_of_python), "write number(0.5)"),
        Wrong("rms_norm", rows_counted, "by the size of the first dimension"),
        Wrong("rms_norm", norm_returns_none, "returned NoneType"),
        Wrong("rms_norm", norm_returns_sums, "tensor<3x6xf32> is needed"),
        Wrong("rms_norm", norm_keeps_squares, "need not be kept"),
        Wrong("rms_norm", norm_of_two_steps, "two numbers per row"),
        Wrong("rms_norm", norm_with_maps_exchanged, "do not fit together"),
        Wrong("rms_norm", along_dimension_one, "the last one only of a matrix"),
        Wrong("rms_norm", first_dimension, "the first dimension"),
    ],
    drawing_nothing=("idoms", "first_problem", "fold_transposes"),
)
