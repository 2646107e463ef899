# %% [markdown]
# # Solutions: MLIR
#
# Four functions: who dominates whom, whether a program is valid, a pattern that leaves it valid, and an operation of your own on its way to machine code.
#
# Stuck? `check.hint("idoms")` shows a hint, and the next one when it is called again.

# %%
from llmlab.checks.compilers.mlir import check
from llmlab.compilers import mlir
from llmlab.compilers.mlir import dialect as lab
from llmlab.compilers.mlir.ssa import (
    OPERANDS,
    TARGETS,
    dominates,
    immediate_dominators,
)

# %% [markdown]
# ## Exercise 1: idoms
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# Block a dominates block b if every way from the entry to b leads through a. The **immediate** dominator of b is the last of those that dominate it, b itself left out.
#
# `successors` says where each block may jump to. `order` has the blocks that can be reached, in reverse postorder: the entry first, and each block before those it jumps to, but for jumps back. Return a dict with the immediate dominator of every
# block in `order`; the entry has itself. The method of Cooper, Harvey and Kennedy: begin with the entry alone, go through the order, and let all predecessors of a block that are in the dict already *meet*: of two, the one that comes later in the order goes up to its
# immediate dominator, until both are the same. Repeat until nothing changes.


# %% tags=["exercise"]
def idoms(successors: dict[str, list[str]], order: list[str]) -> dict[str, str]:
    """Block → its immediate dominator."""
    # BEGIN SOLUTION
    place = {block: i for i, block in enumerate(order)}
    before = {block: [] for block in order}
    for block in order:
        for after in successors[block]:
            before[after].append(block)
    idom = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            sides = [each for each in before[block] if each in idom]
            new = sides[0]
            for each in sides[1:]:
                while new != each:
                    if place[new] > place[each]:
                        new = idom[new]
                    else:
                        each = idom[each]
            if idom.get(block) != new:
                idom[block] = new
                changed = True
    return idom
    # END SOLUTION


# %% tags=["check"]
check.idoms(idoms)

# %% [markdown] tags=["solution"]
# The tree holds what is believed so far, and each round corrects it. In a program whose loops have one door, one round is right and the second finds nothing to change. A loop with two doors needs more. The two fingers go
# up the tree, never along predecessors: a predecessor is one way of several.

# %% [markdown]
# ## Exercise 2: first_problem
# ●●●●○ difficulty · ●●●●● importance · 30 minutes · 4 points
#
# `function.blocks` has blocks with `arguments` (values) and `ops`. An `op` has a `name`, `operands` (values), a `result` (a value or None), and `targets`: pairs of a block that it may jump to and the list of values that it hands on. `op.reads` has all values that it uses: operands, and values that
# it hands on. A value has a `type`. Return the first of these kinds that the program has anywhere, or `""`:
#
# 1. `"terminator"`: a block is empty, or its last operation is not in `TARGETS`, or one before the last is.
# 2. `"arguments"`: a jump hands on more or fewer values than the block has arguments.
# 3. `"type"`: the types of an operation's operands are not those in `OPERANDS[op.name]`, a tuple; or a value that is handed on has another type than the argument.
# 4. `"dominance"`: a use that its definition does not dominate. In one block, the definition must stand above; arguments stand at the top. In another block, that block must dominate: `dominates(idom, a, b)`, with `idom = immediate_dominators(function)`. `idom` has only the blocks that can be reached; in the others, no use is wrong.
#    A value that nobody defines is not dominated either. An operation does not define its own operands.


# %% tags=["exercise"]
def first_problem(function: mlir.ssa.Function) -> str:
    """The kind of the first problem, "" if there is none."""
    # BEGIN SOLUTION
    for block in function.blocks:
        ends = [op.name in TARGETS for op in block.ops]
        if not ends or not ends[-1] or any(ends[:-1]):
            return "terminator"
    ops = [op for block in function.blocks for op in block.ops]
    edges = [
        ([value.type for value in values], [value.type for value in block.arguments])
        for op in ops
        for block, values in op.targets
    ]
    if any(len(given) != len(wanted) for given, wanted in edges):
        return "arguments"
    if any(given != wanted for given, wanted in edges):
        return "type"
    if any(tuple(v.type for v in op.operands) != OPERANDS[op.name] for op in ops):
        return "type"
    idom = immediate_dominators(function)
    home = {op.result: block for block in function.blocks for op in block.ops}
    home |= {value: block for block in function.blocks for value in block.arguments}
    for block in idom:
        above = set(block.arguments)
        for op in block.ops:
            for value in op.reads:
                other = home.get(value)
                elsewhere = other is not block and other in idom
                if value not in above and not (
                    elsewhere and dominates(idom, other, block)
                ):
                    return "dominance"
            above.add(op.result)
    return ""
    # END SOLUTION


# %% tags=["check"]
check.first_problem(first_problem)

# %% [markdown] tags=["solution"]
# The first three kinds are seen in one place. Dominance needs the whole graph, so it comes last, and a program without terminators has no graph. This is the verifier that every pass relies on: after it, a value may be put in the place of an equal one wherever its definition dominates,
# with no other question.

# %% [markdown]
# ## Exercise 3: fold_transposes
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# A pattern on the dialect `lab`. `op` is a `lab.TransposeOp`: `op.x` is its operand, a value, and dimension i of its result is dimension `op.dims[i]` of it. `op.x.owner` is the operation that made the operand, or a block, if it is an argument.
#
# - A transpose that leaves every dimension in its place is its operand.
# - A transpose of a transpose is one transpose, whatever else reads the inner one.
#
# Change the program by the rewriter only: `rewriter.replace(op, new_operation)`, or `rewriter.replace(op, [], [value])`. A new operation is made by `lab.TransposeOp.make(x, order=lab.dims(1, 0))`. Return True if you changed something, else False. The pattern is tried again and again, until it changes nothing; what nobody reads is removed after it.


# %% tags=["exercise"]
def fold_transposes(op: lab.TransposeOp, rewriter) -> bool:
    """One transpose for two, none where nothing moves. True if it applied."""
    # BEGIN SOLUTION
    if op.dims == tuple(range(len(op.dims))):
        rewriter.replace(op, [], [op.x])
        return True
    inner = op.x.owner
    if not isinstance(inner, lab.TransposeOp):
        return False
    order = lab.dims(*(inner.dims[dim] for dim in op.dims))
    rewriter.replace(op, lab.TransposeOp.make(inner.x, order=order))
    return True
    # END SOLUTION


# %% tags=["check"]
check.fold_transposes(fold_transposes)

# %% [markdown] tags=["solution"]
# The new operation stands where the old one stood, so whatever defined its operand stands above it: `inner.x` was defined before `inner`, which was before `op`. The rewriter hands every use over and takes the old one out. The inner transpose is left alone. Somebody else may read it, and if nobody does, it is dead.
# It ends because each step makes a chain of transposes shorter.

# %% [markdown]
# ## Exercise 4: rms_norm
# ●●●●○ difficulty · ●●●●● importance · 30 minutes · 4 points
#
# A new operation, `lab.rms_norm`: $\operatorname{gain} \cdot x / \sqrt{\operatorname{mean}(x^2) + \varepsilon}$ along the last dimension. Write its way down to linalg; the check takes it from there to machine code, and runs it. `x` and `gain` are values; `x.type.get_shape()` is a shape. `build` writes operations:
#
# - `build.along(x, dim, start, write)`: one number per row along `dim`, which stays with the size 1. `write(scalars, number, so_far)` returns the new number so far.
# - `build.generic(inputs, maps, out, write)`: loops. `maps` has a map for each input and one for the result, `mlir.broadcast_map(shape_of_the_input, shape_of_the_result)`. `out` is `build.empty(*shape)`. `write(scalars, *one_number_of_each_input, old_result)` returns the new number.
# - `scalars` writes arithmetic: `add`, `sub`, `mul`, `div`, `sqrt`, `number(0.5)`.
#
# Return the value of the last operation. Between your operations, one number per row may be kept in memory, in all.


# %% tags=["exercise"]
def rms_norm(build: mlir.Linalg, x, gain, eps: float):
    """RMSNorm as operations of linalg."""
    # BEGIN SOLUTION
    shape = x.type.get_shape()

    def add_square(write, number, so_far):
        return write.add(so_far, write.mul(number, number))

    def scale(write, number, total, gain, _):
        mean = write.mul(total, write.number(1 / shape[-1]))
        root = write.sqrt(write.add(mean, write.number(eps)))
        return write.mul(gain, write.div(number, root))

    squares = build.along(x, len(shape) - 1, 0.0, add_square)
    inputs = [x, squares, gain]
    maps = [mlir.broadcast_map(each.type.get_shape(), shape) for each in [*inputs, x]]
    return build.generic(inputs, maps, build.empty(*shape), scale)
    # END SOLUTION


# %% tags=["check"]
check.rms_norm(rms_norm)

# %% [markdown] tags=["solution"]
# Two loops over the tensor, and a row's sum between them. The square is computed in the body of the reduction, so no tensor of squares is ever written; this is fusion, done by hand at the level where it is one line. The maps do the broadcasting: the sum is read at (i, 0), the gain at (j).
# Nothing in the levels below had to learn what a norm is.
