"""Blocks: dominance by its definition, passes by running, both against others."""

from __future__ import annotations

import pytest

from llmlab.compilers.mlir import ssa
from llmlab.compilers.mlir import ssa_passes as passes
from llmlab.compilers.mlir.ssa import Block, Function, Op, Value
from llmlab.compilers.mlir.ssa_text import as_llvm, as_mlir
from tests.compilers.mlir.programs import random_graph, random_line

SEEDS = range(24)
ARGUMENTS = ((0, 0), (3, -5), (-7, 11), (2**31 - 1, 2))


def results(function: Function) -> list:
    return [ssa.run(function, *pair) for pair in ARGUMENTS]


def reached(function: Function, without: Block | None = None) -> set[Block]:
    """By its definition: the blocks that some way leads to."""
    found: set[Block] = set()
    waiting = [function.blocks[0]]
    while waiting:
        block = waiting.pop()
        if block is not without and block not in found:
            found.add(block)
            waiting += block.successors
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dominates_b_if_b_cannot_be_reached_without_a(seed):
    function = random_graph(seed)
    idom = ssa.immediate_dominators(function)
    blocks = reached(function)
    assert set(idom) == blocks
    for a in blocks:
        left = reached(function, without=a)
        for b in blocks:
            assert ssa.dominates(idom, a, b) == (b not in left)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_frontier_is_where_dominance_ends(seed):
    function = random_graph(seed)
    idom = ssa.immediate_dominators(function)
    found = ssa.frontiers(function)
    before = ssa.predecessors(list(idom))
    for a in idom:
        wanted = {
            block
            for block in idom
            if any(ssa.dominates(idom, a, each) for each in before[block])
            and not (ssa.dominates(idom, a, block) and a is not block)
        }
        assert found[a] == wanted


def xdsl_region(text: str):
    from xdsl.context import Context
    from xdsl.dialects import arith, builtin, cf, func
    from xdsl.parser import Parser

    context = Context()
    for dialect in (arith.Arith, builtin.Builtin, cf.Cf, func.Func):
        context.load_dialect(dialect)
    module = Parser(context, text).parse_module()
    return context, module, next(iter(module.ops)).regions[0]


def without_memory(function: Function) -> Function:
    """The graph with block arguments, and no prints, so that MLIR has words for it."""
    passes.promote(function)
    for block in function.blocks:
        block.ops = [op for op in block.ops if op.name != "print"]
    return function


@pytest.mark.parametrize("seed", SEEDS)
def test_dominance_equals_xdsls(seed):
    from xdsl.irdl.dominance import DominanceInfo

    function = without_memory(random_graph(seed))
    idom = ssa.immediate_dominators(function)
    _, module, region = xdsl_region(as_mlir(function))
    module.verify()
    theirs = DominanceInfo(region)
    pairs = list(zip(function.blocks, region.blocks, strict=True))
    for a, x in pairs:
        for b, y in pairs:
            assert ssa.dominates(idom, a, b) == theirs.dominates(x, y)


@pytest.mark.parametrize("seed", SEEDS)
def test_promoted_programs_compute_the_same_with_as_many_phis_as_llvms(seed):
    function = random_graph(seed)
    wanted = results(function)
    passes.remove_unreachable(function)
    phis = llvm_phis(as_llvm(function))
    added = passes.promote(function)
    ssa.check(function)
    assert results(function) == wanted
    assert not {op.name for b in function.blocks for op in b.ops} & {"load", "store"}
    assert added == sum(len(block.arguments) for block in function.blocks[1:])
    # LLVM's sroa also drops phis of one value
    assert added - passes.drop_arguments(function) == phis
    ssa.check(function)
    assert results(function) == wanted


def llvm_phis(text: str) -> int:
    """How many phis LLVM's sroa pass makes of allocas."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(text)
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine()
    builder = binding.create_pass_builder(
        machine, binding.create_pipeline_tuning_options()
    )
    manager = binding.create_new_module_pass_manager()
    manager.add_sroa_pass()
    manager.run(module, builder)
    assert "alloca" not in str(module)
    return str(module).count(" = phi ")


@pytest.mark.parametrize("seed", range(8))
def test_phis_say_the_same_as_block_arguments(seed):
    """LLVM's verifier and machine code on our text."""
    import ctypes

    from llvmlite import binding

    function = without_memory(random_graph(seed))
    text = as_llvm(function).replace("declare void @print(i32)", "")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(text)
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine()
    with binding.create_mcjit_compiler(module, machine) as engine:
        engine.finalize_object()
        kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
        compiled = kind(engine.get_function_address("f"))
        for pair in ARGUMENTS:
            assert compiled(*pair) == ssa.run(function, *pair)[0]


def tree(function: Function) -> object:
    """What a straight line returns, as nested tuples."""
    return tree_of(function.blocks[0])


def tree_of(block: Block) -> object:
    made = {op.result: op for op in block.ops}
    seen: dict[Value, object] = {a: f"arg{i}" for i, a in enumerate(block.arguments)}
    for op in block.ops[:-1]:
        seen[op.result] = (op.name, op.number, *(seen[v] for v in op.operands))
    assert block.ops[-1].operands[0] in {*made, *block.arguments}
    return seen[block.ops[-1].operands[0]]


def theirs(module) -> Function:
    """xDSL's program of one block as ours."""
    from xdsl.dialects import arith, func

    names = {arith.AddiOp: "add", arith.SubiOp: "sub", arith.MuliOp: "mul"}
    (entry,) = next(iter(module.ops)).regions[0].blocks
    block = Block([Value() for _ in entry.args])
    values = dict(zip(entry.args, block.arguments, strict=True))
    for op in entry.ops:
        if isinstance(op, arith.ConstantOp):
            values[op.result] = block.add("const", number=op.value.value.data)
        elif isinstance(op, func.ReturnOp):
            block.add("ret", values[op.operands[0]])
        else:
            read = [values[value] for value in op.operands]
            values[op.results[0]] = block.add(names[type(op)], *read)
    return Function([block])


XDSL = {"dce": passes.remove_dead, "canonicalize": passes.canonicalise}
XDSL["cse"] = lambda function: passes.merge_equal(function, commute=False)


@pytest.mark.parametrize("name", XDSL)
def test_passes_equal_xdsls(name):
    from xdsl.transforms.canonicalize import CanonicalizePass
    from xdsl.transforms.common_subexpression_elimination import (
        CommonSubexpressionElimination,
    )
    from xdsl.transforms.dead_code_elimination import DeadCodeElimination

    kind = {
        "dce": DeadCodeElimination,
        "canonicalize": CanonicalizePass,
        "cse": CommonSubexpressionElimination,
    }[name]
    changed = 0
    for seed in SEEDS:
        function = random_line(seed)
        wanted = results(function)
        context, module, _ = xdsl_region(as_mlir(function))
        kind().apply(context, module)
        before = len(function.blocks[0].ops)
        XDSL[name](function)
        ssa.check(function)
        if name == "cse":  # theirs removes what is dead as well
            passes.remove_dead(function)
            DeadCodeElimination().apply(context, module)
        other = theirs(module)
        assert tree(function) == tree(other)
        assert len(function.blocks[0].ops) == len(other.blocks[0].ops)
        assert results(function) == wanted
        changed += before != len(function.blocks[0].ops)
    assert changed > 12


def test_equal_values_equal_mlirs_which_knows_that_sums_commute():
    """MLIR itself, as IREE's wheel brings it."""
    from iree.compiler import ir
    from iree.compiler.passmanager import PassManager

    differs = 0
    with ir.Context(), ir.Location.unknown():
        for seed in SEEDS:
            function, strict = random_line(seed, 80), random_line(seed, 80)
            passes.remove_dead(function)
            passes.remove_dead(strict)
            module = ir.Module.parse(as_mlir(function))
            PassManager.parse("builtin.module(func.func(cse))").run(module.operation)
            passes.merge_equal(function)
            passes.merge_equal(strict, commute=False)
            entry = module.body.operations[0].regions[0].blocks[0]
            assert len(list(entry.operations)) == len(function.blocks[0].ops)
            differs += len(strict.blocks[0].ops) != len(function.blocks[0].ops)
    assert differs > 2


@pytest.mark.parametrize("seed", SEEDS)
def test_passes_leave_what_is_computed_on_graphs(seed):
    function = random_graph(seed)
    wanted = results(function)
    passes.promote(function)
    for each in (passes.merge_equal, passes.canonicalise, passes.remove_dead):
        each(function)
        ssa.check(function)
        assert results(function) == wanted


def diamond() -> tuple[Function, list[Block]]:
    """^0 → ^1, ^2 → ^3."""
    a, b, c, d = (Block() for _ in range(4))
    x = Value()
    a.arguments = [x]
    test = a.add("less", x, a.add("const", number=5))
    a.choose(test, (b, []), (c, []))
    b.goto(d)
    c.goto(d)
    d.add("ret", x)
    return Function([a, b, c, d]), [a, b, c, d]


def test_equal_values_in_two_branches_stay_for_neither_dominates():
    function, (a, b, c, _) = diamond()
    x = a.arguments[0]
    for block in (b, c):
        block.ops.insert(0, Op("print", [x]))
        block.ops.insert(0, Op("mul", [x, x], Value()))
    passes.merge_equal(function)
    assert [op.name for op in b.ops] == [op.name for op in c.ops]
    # but what the entry has computed serves both
    a.ops.insert(0, Op("mul", [x, x], Value()))
    assert passes.merge_equal(function) == 2


def test_a_way_around_is_seen_by_the_verifier():
    function, (_, b, _, d) = diamond()
    y = Value()
    b.ops.insert(0, Op("const", [], y, 3))
    d.ops[-1].operands = [y]
    assert [p.kind for p in ssa.verify(function)] == ["dominance"]
    with pytest.raises(ssa.Invalid, match=r"in \^3, ret uses a value"):
        ssa.check(function)


def broken() -> dict[str, Function]:
    """A program for each kind of problem."""
    late = Block([Value()])
    y = Value()
    late.ops = [Op("add", [y, y], Value()), Op("const", [], y, 1), Op("ret", [y])]
    open_ended = Block([Value()])
    open_ended.add("const", number=1)
    after = Block([Value()])
    after.add("ret", after.arguments[0])
    after.add("const", number=1)
    few, target = Block([Value()]), Block([Value()])
    few.goto(target)
    target.add("ret", target.arguments[0])
    kinds, other = Block([Value()]), Block([Value("i1")])
    kinds.goto(other, kinds.arguments[0])
    other.add("ret", kinds.arguments[0])
    truth = Block([Value("i1")])
    truth.add("ret", truth.arguments[0])
    home = Block([Value()])
    home.goto(home, home.arguments[0])
    return {
        "dominance": Function([late]),
        "terminator": Function([open_ended]),
        "terminator ": Function([after]),
        "arguments": Function([few, target]),
        "type": Function([kinds, other]),
        "type ": Function([truth]),
        "entry": Function([home]),
    }


@pytest.mark.parametrize("kind", broken())
def test_each_kind_of_problem_is_named(kind):
    assert [p.kind for p in ssa.verify(broken()[kind])][:1] == [kind.strip()]


def test_what_mlir_refuses_of_these_we_refuse():
    """xDSL takes a use before its definition, and a jump with too few values."""
    from iree.compiler import ir

    taken = []
    for kind, function in broken().items():
        if kind.strip() in ("terminator", "entry"):
            continue
        text = as_mlir(function)
        with ir.Context(), pytest.raises(ir.MLIRError):
            ir.Module.parse(text)
        try:
            xdsl_region(text)[1].verify()
            taken.append(kind)
        except Exception:
            pass
    assert taken == ["dominance", "arguments", "type"]


def test_rules_that_never_end_are_stopped():
    def turn(op: Op, rewriter: passes.Rewriter) -> bool:
        if op.name != "add":
            return False
        new = Op("add", op.operands[::-1], Value())
        rewriter.replace(op, rewriter.before(op, new))
        return True

    function = random_line(1)
    with pytest.raises(passes.DoesNotEnd, match="limit=50"):
        passes.rewrite(function, [turn], limit=50)


def test_what_is_read_cannot_be_erased():
    function = random_line(2)
    rewriter = passes.Rewriter(function)
    read = next(op for op in function.blocks[0].ops if rewriter.users.get(op.result))
    with pytest.raises(ValueError, match="still read"):
        rewriter.erase(read)


def test_a_slot_that_nobody_wrote():
    block = Block([Value()])
    place = block.add("slot")
    block.add("ret", block.add("load", place))
    with pytest.raises(ValueError, match="before it was written"):
        passes.promote(Function([block]))


def test_a_program_as_text_and_one_that_goes_on():
    function, _ = diamond()
    assert str(function).splitlines()[:3] == [
        "^0(%0: i32):",
        "  %1 = const 5 : i32",
        "  %2 = less %0, %1 : i1",
    ]
    forever, again = Block([Value()]), Block()
    forever.goto(again)
    again.goto(again)
    with pytest.raises(ValueError, match="steps=10 blocks"):
        ssa.run(Function([forever, again]), 1, steps=10)
    with pytest.raises(ValueError, match="slot has no words"):
        as_mlir(random_graph(0))


def test_two_ways_may_be_given_one_list():
    entry, last = Block([Value()]), Block([Value()])
    (x,) = given = entry.arguments[:]
    zero = entry.add("const", number=0)
    entry.choose(entry.add("less", x, zero), (last, given), (last, given))
    last.ops.append(Op("ret", last.arguments[:]))
    function = Function([entry, last])
    assert passes.drop_arguments(function) == 1
    ssa.check(function)
    assert ssa.run(function, 3) == (3, [])
